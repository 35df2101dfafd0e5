//! nbd-server's configuration keys turned into types: one file's text in, settings, exports and problems out.
//!
//! Pure: `export::load` reads the files and calls [`parse`]; `export::keyfile` knows the grammar. Promises: every
//! problem of a file is reported, with file, line, key, value and remedy; a key that is ignored is a warning, never
//! silence; a key that restricts who may use an export, or decides where its writes go, and that is not supported,
//! refuses that export rather than serving it without the restriction.

use crate::export::client_keys::{self, ClientKeys};
use crate::export::image_keys::{ImageKeys, lock_timeout};
use crate::export::keyfile::{self, Group, KeyFile};
use crate::export::problem::{Problem, Severity, printable};
use crate::export::reader::{At, Reader};
pub use crate::image::Format;
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The port that IANA assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;
/// Where the control API listens when the configuration does not say.
pub const DEFAULT_CONTROL_SOCKET: &str = "/run/cowgate/control.sock";
/// Longest export name in bytes that the NBD protocol allows.
pub const MAX_NAME_BYTES: usize = 4096;
/// Longest Unix socket path in bytes that Linux takes.
pub const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Most worker threads that may be asked for.
pub const MAX_WORKERS: usize = 1024;

/// Where in the configuration an export is defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The configuration file.
    pub file: PathBuf,
    /// Line of the group's header, from 1.
    pub line: u32,
}

/// One export as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    /// The name that clients ask for.
    pub name: String,
    /// The image, absolute unless the configuration file's own path was relative.
    pub path: PathBuf,
    /// How to read it: declared, or `.qcow2` by its name; never probed.
    pub format: Format,
    /// Refuse writes.
    pub read_only: bool,
    /// Offer flush; `None`: not said, so it is offered.
    pub flush: Option<bool>,
    /// Offer FUA; `None`: not said, so it is offered.
    pub fua: Option<bool>,
    /// Offer trim; `None`: not said, so it is offered.
    pub trim: Option<bool>,
    /// Tell clients that the storage rotates.
    pub rotational: bool,
    /// Clients at one time; `None`: no limit.
    pub max_connections: Option<u32>,
    /// How the image is used.
    pub image: ImageKeys,
    /// What each client gets.
    pub client: ClientKeys,
    /// Where it is defined.
    pub source: Source,
}

impl ExportConfig {
    /// An export with no key but `exportname`. The format is raw.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>, source: Source) -> ExportConfig {
        ExportConfig {
            name: name.into(),
            path: path.into(),
            format: Format::Raw,
            read_only: false,
            flush: None,
            fua: None,
            trim: None,
            rotational: false,
            max_connections: None,
            image: ImageKeys::default(),
            client: ClientKeys::default(),
            source,
        }
    }

    /// Whether its clients write the image itself.
    pub fn writes_image(&self) -> bool {
        !self.read_only && self.client.copy_on_write.is_none()
    }

    /// Whether both serve the same thing in the same way: everything but the place of the definition.
    pub fn same_service(&self, other: &ExportConfig) -> bool {
        let ExportConfig {
            name,
            path,
            format,
            read_only,
            flush,
            fua,
            trim,
            rotational,
            max_connections,
            image,
            client,
            source: _,
        } = self;
        (name, path, format, read_only) == (&other.name, &other.path, &other.format, &other.read_only)
            && (flush, fua, trim) == (&other.flush, &other.fua, &other.trim)
            && (rotational, max_connections) == (&other.rotational, &other.max_connections)
            && (image, client) == (&other.image, &other.client)
    }
}

/// An address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// An IP address.
    Ip(IpAddr),
    /// A host name, looked up when the server starts.
    Host(String),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Ip(ip) => write!(f, "{ip}"),
            Listen::Host(name) => f.write_str(name),
        }
    }
}

/// Where the control API listens (`controlsock`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ControlSocket {
    /// At [`DEFAULT_CONTROL_SOCKET`], if that can be had.
    #[default]
    Default,
    /// Nowhere.
    Off,
    /// At this path.
    At(PathBuf),
}

/// The `[generic]` group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// Addresses to listen on; empty: every IPv6 and IPv4 address of the machine.
    pub listen: Vec<Listen>,
    /// TCP port; 0 lets the kernel choose.
    pub port: u16,
    /// Unix socket to listen on. It turns TCP off unless `dual_listen`.
    pub unix_socket: Option<PathBuf>,
    /// Listen on TCP although there is a Unix socket.
    pub dual_listen: bool,
    /// Clients may list the exports.
    pub list_allowed: bool,
    /// Worker threads; `None`: one per core.
    pub workers: Option<usize>,
    /// Directories below which backing files may be; `None`: the exported image's own directory.
    pub image_roots: Option<Vec<PathBuf>>,
    /// How long a client waits for an image that is in use elsewhere, if its export does not say.
    pub lock_timeout: Option<Duration>,
    /// Directory with further files of exports.
    pub include_dir: Option<PathBuf>,
    /// Where the control API listens.
    pub control_socket: ControlSocket,
    /// Name of the user to become once everything that needs root is done.
    pub user: Option<String>,
    /// Name of the group to become; `None`: the user's own.
    pub group: Option<String>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            listen: Vec::new(),
            port: DEFAULT_PORT,
            unix_socket: None,
            dual_listen: false,
            list_allowed: false,
            workers: None,
            image_roots: None,
            lock_timeout: None,
            include_dir: None,
            control_socket: ControlSocket::Default,
            user: None,
            group: None,
        }
    }
}

impl ServerConfig {
    /// Whether TCP is served.
    pub fn tcp(&self) -> bool {
        self.unix_socket.is_none() || self.dual_listen
    }

    /// How many worker threads to start.
    pub fn worker_count(&self) -> usize {
        self.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_WORKERS))
    }

    /// The keys whose values differ in `other` and that only a restart can apply.
    pub fn needs_restart(&self, other: &ServerConfig) -> Vec<&'static str> {
        let keys = [
            ("listenaddr", self.listen != other.listen),
            ("port", self.port != other.port),
            ("unixsock", self.unix_socket != other.unix_socket),
            ("duallisten", self.dual_listen != other.dual_listen),
            ("workers", self.workers != other.workers),
            ("imageroots", self.image_roots != other.image_roots),
            ("locktimeout", self.lock_timeout != other.lock_timeout),
            ("controlsock", self.control_socket != other.control_socket),
            ("user", self.user != other.user),
            ("group", self.group != other.group),
        ];
        keys.into_iter().filter(|(_, differs)| *differs).map(|(key, _)| key).collect()
    }
}

/// Which rules a file is read by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The file named on the command line: its first group is `[generic]`.
    Base,
    /// A file of `includedir`: exports only, possibly none.
    Included,
}

/// What one file says.
#[derive(Debug)]
pub struct Parsed {
    /// The `[generic]` group of a base file; `None` when it cannot be relied on, and for included files.
    pub server: Option<ServerConfig>,
    /// The exports that can be served. Do not use them when `failed`.
    pub exports: Vec<Arc<ExportConfig>>,
    /// Every export's name with the line of its header, refused ones too.
    pub defined: Vec<(String, u32)>,
    /// Everything found, in file order.
    pub problems: Vec<Problem>,
    /// A problem is an error, so this file's exports stay what they were.
    pub failed: bool,
}

/// Reads the text of one configuration file. `file` is its path, for messages and as the start of relative paths.
pub fn parse(text: &[u8], file: &Path, role: Role) -> Parsed {
    let (parsed, faults) = keyfile::parse(text);
    let mut reader = Reader::new(file);
    for fault in &faults {
        let mut problem =
            Problem::in_file(Severity::Error, file, fault.kind.what(), fault.kind.remedy()).at(fault.line);
        problem.value = Some(printable(fault.text.as_bytes()));
        reader.problems.push(problem);
    }
    let server = match role {
        Role::Base => base_settings(&parsed, &mut reader, faults.is_empty()),
        Role::Included => None,
    };
    let (mut exports, mut defined) = (Vec::new(), Vec::new());
    for group in &parsed.groups {
        if group.name == "generic" {
            if role == Role::Included {
                reader.group(
                    Severity::Error,
                    group,
                    "a file of includedir cannot hold the [generic] group",
                    "move its keys to the main configuration file",
                );
            }
            continue;
        }
        reader.warn_of_repetition(group);
        defined.push((group.name.clone(), group.line));
        exports.extend(export(group, &mut reader).map(Arc::new));
    }
    let mut problems = reader.problems;
    problems.sort_by_key(|p| p.line);
    let failed = problems.iter().any(|p| p.severity == Severity::Error);
    Parsed { server, exports, defined, problems, failed }
}

/// The `[generic]` group, or `None` with problems: then nothing of the configuration can be relied on.
fn base_settings(parsed: &KeyFile, reader: &mut Reader<'_>, grammar_holds: bool) -> Option<ServerConfig> {
    let Some(group) = parsed.groups.first().filter(|g| g.name == "generic") else {
        let remedy = "begin the file with a line [generic], even if no key follows";
        let problem = Problem::in_file(Severity::Error, reader.file, "the first group is not [generic]", remedy);
        reader.problems.push(match parsed.groups.first() {
            Some(group) => problem.at(group.line).group(&group.name),
            None => problem,
        });
        return None;
    };
    reader.warn_of_repetition(group);
    let errors_before = reader.errors();
    let server = generic(group, reader);
    (grammar_holds && reader.errors() == errors_before).then_some(server)
}

fn generic(group: &Group, reader: &mut Reader<'_>) -> ServerConfig {
    let mut server = ServerConfig::default();
    for entry in group.effective() {
        let at = At { group, entry };
        match entry.key.as_str() {
            "listenaddr" => server.listen = listen_addresses(at, reader),
            "port" => server.port = port(at, reader).unwrap_or(DEFAULT_PORT),
            "unixsock" => server.unix_socket = socket_path(at, reader),
            "controlsock" => server.control_socket = control_socket(at, reader),
            "duallisten" => server.dual_listen = reader.boolean(at).unwrap_or(false),
            "allowlist" => server.list_allowed = reader.boolean(at).unwrap_or(false),
            "workers" => server.workers = workers(at, reader),
            "imageroots" => server.image_roots = image_roots(at, reader),
            "locktimeout" => server.lock_timeout = lock_timeout(at, reader),
            "includedir" => server.include_dir = reader.path(at),
            "oldstyle" => {
                if reader.boolean(at) == Some(true) {
                    let what = "the oldstyle protocol no longer exists";
                    reader.key(Severity::Error, at, what, "remove the key; clients ask for an export by its name");
                }
            }
            "force_tls" | "tlsonly" => {
                if reader.boolean(at) == Some(true) {
                    let what = "TLS is not supported yet, and serving without it is not what this asks for";
                    reader.key(
                        Severity::Error,
                        at,
                        what,
                        "remove the key and tunnel connections if they leave the host",
                    );
                }
            }
            "certfile" | "keyfile" | "cacertfile" | "tlsprio" => {
                reader.ignored_string(at, "TLS is not supported yet, so this key is ignored");
            }
            "user" => server.user = account(at, reader),
            "group" => server.group = account(at, reader),
            "max_threads" => {
                if reader.integer(at).is_some() {
                    reader.key(Severity::Warning, at, "this key is ignored", "workers = N sets the number of threads");
                }
            }
            _ => reader.unknown(at),
        }
    }
    if server.dual_listen && server.unix_socket.is_none() {
        let line = group.effective().find(|e| e.key == "duallisten").map_or(group.line, |e| e.line);
        let what = "duallisten means nothing without unixsock";
        let problem = Problem::in_file(Severity::Warning, reader.file, what, "set unixsock or remove the key");
        reader.problems.push(problem.at(line).group(&group.name));
    }
    server
}

/// The name of a user or group. Whether it exists is for the daemon to find out.
fn account(at: At<'_>, reader: &mut Reader<'_>) -> Option<String> {
    let text = reader.string(at)?;
    let name = text.trim_end();
    if name.is_empty() || name.contains([':', '/', '\0', '\n']) {
        reader.key(Severity::Error, at, "this is no name", "write the name of a user or group, or remove the key");
        return None;
    }
    Some(name.to_owned())
}

/// A comma list of addresses and host names.
fn listen_addresses(at: At<'_>, reader: &mut Reader<'_>) -> Vec<Listen> {
    let Some(text) = reader.string(at) else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        match part.parse() {
            Ok(ip) => out.push(Listen::Ip(ip)),
            Err(_) if is_host_name(part) => out.push(Listen::Host(part.to_owned())),
            Err(_) => {
                let what = format!("{:?} is neither an IP address nor a host name", part);
                reader.key(Severity::Error, at, what, "write addresses separated by commas, such as 127.0.0.1, ::1");
            }
        }
    }
    out
}

/// Looks like something a resolver can be asked for, and not like a mistyped IP address.
fn is_host_name(text: &str) -> bool {
    let allowed = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    allowed && text.bytes().any(|b| b.is_ascii_alphabetic()) && !text.starts_with(['-', '.'])
}

fn port(at: At<'_>, reader: &mut Reader<'_>) -> Option<u16> {
    let text = reader.string(at)?;
    let port = text.trim().parse().ok();
    if port.is_none() {
        reader.key(
            Severity::Error,
            at,
            "this is not a TCP port",
            "write a number from 1 to 65535, or 0 for any free port",
        );
    }
    port
}

fn socket_path(at: At<'_>, reader: &mut Reader<'_>) -> Option<PathBuf> {
    let path = reader.path(at)?;
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        let what = format!("a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes");
        reader.key(Severity::Error, at, what, "choose a shorter path");
        return None;
    }
    Some(path)
}

fn control_socket(at: At<'_>, reader: &mut Reader<'_>) -> ControlSocket {
    if at.entry.value.trim_ascii() == b"none" {
        return ControlSocket::Off;
    }
    socket_path(at, reader).map_or(ControlSocket::Default, ControlSocket::At)
}

fn workers(at: At<'_>, reader: &mut Reader<'_>) -> Option<usize> {
    let number = reader.integer(at)?;
    match usize::try_from(number) {
        Ok(0) => None,
        Ok(n) if n <= MAX_WORKERS => Some(n),
        _ => {
            let remedy = format!("write a number from 1 to {MAX_WORKERS}, or 0 for one per core");
            reader.key(Severity::Error, at, "this is no number of worker threads", remedy);
            None
        }
    }
}

fn image_roots(at: At<'_>, reader: &mut Reader<'_>) -> Option<Vec<PathBuf>> {
    let text = reader.string(at)?;
    let roots: Vec<&str> = text.split(',').map(str::trim).filter(|r| !r.is_empty()).collect();
    let what = match roots.iter().find(|r| !r.starts_with('/')) {
        Some(relative) => format!("{relative:?} is not an absolute path"),
        None if roots.is_empty() => "no directory is named".to_owned(),
        None => return Some(roots.into_iter().map(PathBuf::from).collect()),
    };
    reader.key(Severity::Error, at, what, "write absolute directories separated by commas, or remove the key");
    None
}

/// One export group. `None`: it has an error or is refused; the problems say which.
fn export(group: &Group, reader: &mut Reader<'_>) -> Option<ExportConfig> {
    let before = reader.problems.len();
    check_name(group, reader);
    let source = Source { file: reader.file.to_owned(), line: group.line };
    let mut config = ExportConfig::new(&group.name, PathBuf::new(), source);
    let mut format = None;
    let mut exportname = None;
    let mut client = client_keys::Draft::default();
    for entry in group.effective() {
        let at = At { group, entry };
        match entry.key.as_str() {
            "exportname" => exportname = Some(at),
            "readonly" => config.read_only = reader.boolean(at).unwrap_or(false),
            "format" => format = image_format(at, reader),
            "flush" => config.flush = reader.boolean(at),
            "fua" => config.fua = reader.boolean(at),
            "trim" => config.trim = reader.boolean(at),
            "rotational" => config.rotational = reader.boolean(at).unwrap_or(false),
            "maxconnections" => config.max_connections = max_connections(at, reader),
            _ if config.image.read(at, reader) || client.read(at, reader) => {}
            _ => unsupported(at, reader),
        }
    }
    match exportname {
        Some(at) => {
            config.path = reader.path(at).unwrap_or_default();
            check_template(at, group, reader);
        }
        None => {
            let remedy = "add exportname = PATH OF THE IMAGE";
            reader.group(Severity::Error, group, "the export has no exportname", remedy);
        }
    }
    config.format = format.unwrap_or_else(|| Format::by_name(&config.path));
    let key = |key: &str| group.effective().find(|e| e.key == key).map(|entry| At { group, entry });
    config.image.check(config.format, key, reader);
    config.client = client.finish(&config.path, config.format, config.read_only, reader);
    // a snapshot is never written
    config.read_only |= config.image.snapshot.is_some() && config.client.copy_on_write.is_none();
    let usable = reader.problems[before..].iter().all(|p| p.severity == Severity::Warning);
    usable.then_some(config)
}

fn check_name(group: &Group, reader: &mut Reader<'_>) {
    if group.name.len() > MAX_NAME_BYTES {
        let what = format!("an export's name has at most {MAX_NAME_BYTES} bytes in the NBD protocol");
        reader.group(Severity::Error, group, what, "choose a shorter name");
    }
    if group.name.chars().any(char::is_control) {
        reader.group(Severity::Error, group, "an export's name holds no control characters", "choose another name");
    }
}

fn image_format(at: At<'_>, reader: &mut Reader<'_>) -> Option<Format> {
    match reader.string(at)?.trim_end() {
        "qcow2" => Some(Format::Qcow2),
        "raw" => Some(Format::Raw),
        _ => {
            reader.key(Severity::Error, at, "this image format is not known", "write qcow2 or raw");
            None
        }
    }
}

fn max_connections(at: At<'_>, reader: &mut Reader<'_>) -> Option<u32> {
    // nbd-server takes zero and below as no limit
    u32::try_from(reader.integer(at)?).ok().filter(|n| *n > 0)
}

/// With a virtstyle other than `none`, nbd-server reads exportname as a template in which % introduces the client.
fn check_template(at: At<'_>, group: &Group, reader: &mut Reader<'_>) {
    let literal = group.effective().any(|e| e.key == "virtstyle" && e.value.starts_with(b"none"));
    if !literal && at.entry.value.contains(&b'%') {
        let what = "% makes this a template with a file per client, which is not supported yet";
        reader.key(Severity::Refused, at, what, "for a path that holds a % add virtstyle = none");
    }
}

/// Keys of nbd-server that are not supported, and unknown keys.
fn unsupported(at: At<'_>, reader: &mut Reader<'_>) {
    match at.entry.key.as_str() {
        // where writes go, or what the bytes are
        "temporary" => reader.refuse_if_true(at, "temporary files are not supported yet"),
        "treefiles" => reader.refuse_if_true(at, "trees of block files are not supported yet"),
        "waitfile" => reader.refuse_if_true(at, "waiting for the file is not supported yet"),
        // who may connect
        "force_tls" | "tlsonly" => reader.refuse_if_true(at, "TLS is not supported yet"),
        "virtstyle" => check_virtstyle(at, reader),
        // the rest changes neither
        "splice" | "sdp" => reader.ignored_boolean(at, "this key is ignored"),
        "transactionlog" | "datalog" | "listenaddr" => reader.ignored_string(at, "this key is ignored"),
        _ => reader.unknown(at),
    }
}

fn check_virtstyle(at: At<'_>, reader: &mut Reader<'_>) {
    let Some(text) = reader.string(at) else {
        return;
    };
    let known = ["none", "ipliteral", "iphash"].iter().any(|style| text.starts_with(style));
    let prefix = text.strip_prefix("cidrhash").is_some_and(|rest| !rest.trim().is_empty());
    if !known && !prefix {
        reader.key(Severity::Error, at, "this virtstyle is not known", "remove the key, or write virtstyle = none");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::client_keys::CopyOnWrite;
    use crate::export::image_keys::DetectZeroes;
    use crate::export::reader::MAX_PATH_BYTES;
    use crate::qcow2::compress::Compression;
    use proptest::prelude::*;

    const FILE: &str = "/etc/cowgate/config";

    fn base(text: &str) -> Parsed {
        parse(text.as_bytes(), Path::new(FILE), Role::Base)
    }

    fn included(text: &str) -> Parsed {
        parse(text.as_bytes(), Path::new("/etc/cowgate/conf.d/a.conf"), Role::Included)
    }

    /// The problems as `line severity key`.
    fn found(parsed: &Parsed) -> Vec<String> {
        let show = |p: &Problem| format!("{} {} {}", p.line.unwrap_or(0), p.severity, p.key.as_deref().unwrap_or("-"));
        parsed.problems.iter().map(show).collect()
    }

    #[test]
    fn a_complete_configuration() {
        let parsed = base(
            "[generic]\nlistenaddr = 127.0.0.1, ::1, localhost\nport = 10810\nincludedir = /etc/cowgate/conf.d\n\
             allowlist = true\nunixsock = /run/cowgate/nbd.sock\nduallisten = 1\nworkers = 3\n\
             imageroots = /srv/images, /srv/back up\n\
             [disk]\nexportname = /srv/images/disk.qcow2\nreadonly = true\nflush = false\nfua = 1\ntrim = true\n\
             rotational = true\nmaxconnections = 4\n",
        );
        assert_eq!(found(&parsed), [] as [&str; 0]);
        let server = parsed.server.expect("server");
        assert_eq!(server.listen.len(), 3);
        assert_eq!(server.listen[2], Listen::Host("localhost".into()));
        assert_eq!((server.port, server.workers), (10810, Some(3)));
        assert!(server.tcp() && server.list_allowed && server.dual_listen);
        assert_eq!(server.image_roots, Some(vec!["/srv/images".into(), "/srv/back up".into()]));
        let disk = &parsed.exports[0];
        assert_eq!((disk.name.as_str(), disk.format), ("disk", Format::Qcow2));
        assert_eq!((disk.flush, disk.fua, disk.trim), (Some(false), Some(true), Some(true)));
        assert_eq!((disk.read_only, disk.rotational, disk.max_connections), (true, true, Some(4)));
        assert_eq!(disk.source, Source { file: FILE.into(), line: 10 });
    }

    #[test]
    fn how_the_image_is_used() {
        let parsed = included(
            "[a]\nexportname=/a.qcow2\ncompress = zstd\ndetectzeroes = unmap\nl2cache = 16M\n\
             [b]\nexportname=/b.qcow2\nsnapshot = before update\n",
        );
        assert_eq!(found(&parsed), [] as [&str; 0]);
        let (a, b) = (&parsed.exports[0], &parsed.exports[1]);
        assert_eq!((a.image.compress, a.image.detect_zeroes), (Some(Compression::Zstd), DetectZeroes::Unmap));
        assert_eq!((a.image.cache_bytes, a.read_only), (Some(16 << 20), false));
        assert_eq!((b.image.snapshot.as_deref(), b.read_only), (Some("before update"), true));
        let parsed = included(
            "[a]\nexportname=/a.qcow2\ncompress=lzo\ndetectzeroes=true\nl2cache=1K\nsnapshot=\n\
             [b]\nexportname=/b\ncompress=zlib\nsnapshot=x\nl2cache=1M\ndetectzeroes=on\n",
        );
        let expected = [
            "3 error compress",
            "4 error detectzeroes",
            "5 error l2cache",
            "6 error snapshot",
            "9 error compress",
            "10 error snapshot",
            "11 warning l2cache",
        ];
        assert_eq!(found(&parsed), expected);
    }

    #[test]
    fn what_each_client_gets() {
        let parsed = included(
            "[a]\nexportname=/srv/a\nauthfile=/etc/allow\nprerun=check %s\npostrun = log \"%s\" 100%%\nfilesize=1099511627776\n\
             multifile=1\ncopyonwrite=true\ncowdir=/tmp\nsparse_cow=true\nsync=true\n\
             [b]\nexportname=/b.qcow2\nsnapshot=x\ncopyonwrite=1\n\
             [c]\nexportname=/c d\nauthfile=\nprerun=\npostrun=look \"$COWGATE_PATH\"\nfilesize=0\nmultifile=0\ncopyonwrite=0\ncowdir=\n",
        );
        assert_eq!(found(&parsed), [] as [&str; 0]);
        let [a, b, c] = &parsed.exports[..] else { panic!("three exports") };
        let expected = ClientKeys {
            auth_file: Some("/etc/allow".into()),
            prerun: Some("check %s".into()),
            postrun: Some("log \"%s\" 100%%".into()),
            file_size: Some(1 << 40),
            multi_file: true,
            copy_on_write: Some(CopyOnWrite { directory: Some("/tmp".into()) }),
            sync: true,
        };
        assert_eq!(a.client, expected);
        assert!(b.client.copy_on_write.is_some() && !b.read_only, "the snapshot is not written, the layer over it is");
        let postrun = Some("look \"$COWGATE_PATH\"".into());
        assert_eq!(c.client, ClientKeys { postrun, ..ClientKeys::default() });
        let parsed = included(
            "[a]\nexportname=/a b\nprerun=check '%s'\n[b]\nexportname=/b.qcow2\nmultifile=1\n\
             [c]\nexportname=/c\nreadonly=1\ncopyonwrite=1\n[d]\nexportname=/d\ncowdir=/tmp\nsparse_cow=1\n\
             [e]\nexportname=/e\nfilesize=-1\n",
        );
        let expected = [
            "3 refused prerun",
            "6 error multifile",
            "10 warning copyonwrite",
            "13 warning cowdir",
            "14 warning sparse_cow",
            "17 refused filesize",
        ];
        assert_eq!(found(&parsed), expected);
    }

    #[test]
    fn defaults() {
        let parsed = base("[generic]\n[a]\nexportname=/dev/vg/a\n");
        assert_eq!(parsed.server, Some(ServerConfig::default()));
        let a = &parsed.exports[0];
        assert_eq!((a.format, a.read_only, a.flush, a.max_connections), (Format::Raw, false, None, None));
        assert!(base("[generic]\n").exports.is_empty(), "zero exports is normal");
        assert!(!included("").failed, "an empty included file is fine");
    }

    #[test]
    fn every_problem_of_a_file_is_collected() {
        let parsed = included(
            "[a]\nexportname=/a\nreadonly=yes\nsize=5\n[b]\nflush=TRUE\nmaxconnections=10G\n[c]\nexportname=/c\nformat=vmdk\n",
        );
        let expected = [
            "3 error readonly",
            "4 warning size",
            "5 error -",
            "6 error flush",
            "7 error maxconnections",
            "10 error format",
        ];
        assert_eq!(found(&parsed), expected);
        assert!(parsed.failed);
        assert_eq!(
            parsed.problems[0].to_string(),
            "/etc/cowgate/conf.d/a.conf:3: error: [a] readonly = yes: the value is not a boolean; \
             write true or false, with nothing behind it"
        );
    }

    #[test]
    fn the_base_file_begins_with_generic() {
        for text in ["", "[a]\nexportname=/a\n", "[a]\nexportname=/a\n[generic]\n", "# nothing\n"] {
            let parsed = base(text);
            assert!(parsed.server.is_none() && parsed.failed, "{text:?}");
        }
        let parsed = included("[b]\nexportname=/b\n[generic]\nport=1\n");
        assert!(parsed.failed);
        assert_eq!(found(&parsed), ["3 error -"]);
    }

    #[test]
    fn an_error_in_an_export_of_the_base_file_leaves_generic_usable() {
        let parsed = base("[generic]\nport=1\n[a]\nexportname=/a\nreadonly=no\n");
        assert!(parsed.failed);
        assert_eq!(parsed.server.map(|s| s.port), Some(1));
        assert!(base("[generic]\nallowlist=no\n").server.is_none());
        assert!(base("[generic]\n[a]\nfoo\n").server.is_none(), "broken grammar: trust nothing");
    }

    #[test]
    fn generic_errors_fail_closed() {
        for key in ["oldstyle=true", "force_tls=true", "tlsonly=true", "port=nbdx", "port=65536", "workers=-1"] {
            assert!(base(&format!("[generic]\n{key}\n")).server.is_none(), "{key}");
        }
        for key in ["listenaddr=1.2.3", "listenaddr=a b", "imageroots=", "imageroots=rel", "workers=100000"] {
            assert!(base(&format!("[generic]\n{key}\n")).server.is_none(), "{key}");
        }
        let long = format!("[generic]\nunixsock=/{}\n", "s".repeat(MAX_SOCKET_PATH_BYTES));
        assert!(base(&long).server.is_none());
    }

    #[test]
    fn generic_keys_that_are_ignored_warn() {
        let text = "[generic]\nuser=nbd\ngroup=nbd\nmax_threads=8\ncertfile=/c\nkeyfile=/k\ncacertfile=/a\ntlsprio=N\n\
                    force_tls=false\noldstyle=0\nsplice=true\nduallisten=true\n";
        let parsed = base(text);
        let server = parsed.server.expect("usable");
        assert_eq!((server.user.as_deref(), server.group.as_deref()), (Some("nbd"), Some("nbd")));
        let keys: Vec<_> = parsed.problems.iter().map(|p| (p.line.unwrap_or(0), p.severity)).collect();
        let lines = [4, 5, 6, 7, 8, 11, 12];
        assert_eq!(keys, lines.map(|line| (line, Severity::Warning)));
    }

    #[test]
    fn keys_that_restrict_or_redirect_refuse_their_export_only() {
        let keys = [
            "temporary=true",
            "treefiles=true",
            "waitfile=true",
            "force_tls=true",
            "tlsonly=true",
            "prerun=/bin/check %d",
            "postrun=/bin/check %",
            "filesize=-5",
            "exportname=/srv/%s",
        ];
        for key in keys {
            let parsed = included(&format!("[a]\nexportname=/a\n{key}\n[b]\nexportname=/b\n"));
            assert!(!parsed.failed, "{key}");
            assert_eq!(parsed.exports.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["b"], "{key}");
            assert_eq!(parsed.problems[0].severity, Severity::Refused, "{key}");
        }
        let parsed =
            included("[a]\nexportname=/a%d\nvirtstyle=none\ncopyonwrite=false\nauthfile=\n[b]\nexportname=/b\n");
        assert_eq!((parsed.exports.len(), found(&parsed).len()), (2, 0));
    }

    #[test]
    fn export_keys_that_are_ignored_warn() {
        let text = "[a]\nexportname=/a\nsplice=true\nsdp=true\nsparse_cow=1\ncowdir=/c\n\
                    transactionlog=/t\ndatalog=/d\nlistenaddr=::\nsize=5\n;old=1\nexportname[de]=/x\ntimeout=5\n";
        let parsed = included(text);
        assert_eq!((parsed.exports.len(), parsed.problems.len()), (1, 11));
        assert!(parsed.problems.iter().all(|p| p.severity == Severity::Warning && p.line.is_some()));
        assert_eq!(found(&included("[a]\nexportname=/a\nsync=false\nsdp=0\n")), [] as [&str; 0]);
    }

    #[test]
    fn a_bad_value_of_an_ignored_known_key_is_still_an_error_as_in_nbd_server() {
        for key in
            ["sync=x", "sdp=x", "treefiles=x", "datalog=\\q", "filesize=10G", "virtstyle=foo", "virtstyle=cidrhash"]
        {
            assert!(included(&format!("[a]\nexportname=/a\n{key}\n")).failed, "{key}");
        }
        assert!(!included("[a]\nexportname=/a\nsize=\\q\n").failed);
    }

    #[test]
    fn paths() {
        let path = |value: &str| included(&format!("[a]\nexportname={value}\n")).exports[0].path.clone();
        assert_eq!(path("/srv/a\\sb"), Path::new("/srv/a b"));
        assert_eq!(path("disks/a.qcow2"), Path::new("/etc/cowgate/conf.d/disks/a.qcow2"));
        assert_eq!(found(&included("[a]\nexportname=a\n")), ["2 warning exportname"]);
        assert_eq!(found(&included("[a]\nexportname=/a \n")), ["2 warning exportname"]);
        assert_eq!(path("/a "), Path::new("/a "));
        assert_eq!(found(&included("[a]\nexportname=/a\\s\n")), [] as [&str; 0]);
        assert!(included("[a]\nexportname=\n").failed);
        assert!(included(&format!("[a]\nexportname=/{}\n", "p".repeat(MAX_PATH_BYTES))).failed);
    }

    #[test]
    fn format_is_declared_or_taken_from_the_name() {
        let format = |keys: &str| included(&format!("[a]\n{keys}\n")).exports[0].format;
        assert_eq!(format("exportname=/a.qcow2"), Format::Qcow2);
        assert_eq!(format("exportname=/a.QCOW2"), Format::Qcow2);
        assert_eq!(format("exportname=/a.qcow2\nformat=raw "), Format::Raw);
        assert_eq!(format("exportname=/a.img\nformat=qcow2"), Format::Qcow2);
        assert_eq!(format("exportname=/qcow2"), Format::Raw);
    }

    #[test]
    fn names_follow_the_protocol() {
        assert!(!included(&format!("[{}]\nexportname=/a\n", "n".repeat(MAX_NAME_BYTES))).failed);
        assert!(included(&format!("[{}]\nexportname=/a\n", "n".repeat(MAX_NAME_BYTES + 1))).failed);
        assert!(included("[a\u{85}b]\nexportname=/a\n").failed);
    }

    #[test]
    fn max_connections_counts_from_one() {
        let limit = |n: &str| included(&format!("[a]\nexportname=/a\nmaxconnections={n}\n")).exports[0].max_connections;
        assert_eq!((limit("1"), limit("0"), limit("-1"), limit("8 ")), (Some(1), None, None, Some(8)));
    }

    #[test]
    fn a_repeated_group_merges_with_a_warning() {
        let parsed = included("[a]\nexportname=/a\n[b]\nexportname=/b\n[a]\nexportname=/c\n");
        assert_eq!(parsed.exports.len(), 2);
        assert_eq!(parsed.exports[0].path, Path::new("/c"));
        assert_eq!(found(&parsed), ["5 warning -"]);
    }

    #[test]
    fn service_is_compared_without_its_place() {
        let a = included("[a]\nexportname=/a\n").exports.remove(0);
        let moved = included("\n\n[a]\nexportname=/a\n").exports.remove(0);
        assert!(a != moved && a.same_service(&moved));
        for other in [
            "format=qcow2",
            "readonly=1",
            "flush=1",
            "fua=0",
            "trim=1",
            "rotational=1",
            "maxconnections=1",
            "detectzeroes=on",
            "authfile=/x",
            "prerun=x",
            "postrun=x",
            "filesize=1",
            "multifile=1",
            "copyonwrite=1",
            "copyonwrite=1\ncowdir=/x",
            "sync=1",
        ] {
            let other = included(&format!("[a]\nexportname=/a\n{other}\n")).exports.remove(0);
            assert!(!a.same_service(&other));
        }
    }

    #[test]
    fn settings_that_need_a_restart() {
        let a = ServerConfig::default();
        let b = ServerConfig { port: 1, include_dir: Some("/x".into()), workers: Some(1), ..ServerConfig::default() };
        assert_eq!(a.needs_restart(&b), ["port", "workers"]);
        let c = ServerConfig { user: Some("nbd".into()), group: Some("nbd".into()), ..ServerConfig::default() };
        assert_eq!(a.needs_restart(&c), ["user", "group"]);
    }

    #[test]
    fn users_and_groups_are_names() {
        for bad in ["", "  ", "a:b", "../a", "a\\nb"] {
            for key in ["user", "group"] {
                let parsed = base(&format!("[generic]\n{key} = {bad}\n"));
                assert!(parsed.server.is_none(), "{key} = {bad:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), is_base: bool) {
            let role = if is_base { Role::Base } else { Role::Included };
            let parsed = parse(&bytes, Path::new("c"), role);
            for problem in &parsed.problems {
                prop_assert!(!problem.to_string().contains('\n'));
            }
        }

        #[test]
        fn arbitrary_values_never_panic(
            key in "(exportname|port|readonly|workers|imageroots|listenaddr|maxconnections|virtstyle|format|unixsock)",
            value in "[^\n]{0,40}",
        ) {
            let parsed = base(&format!("[generic]\n{key}={value}\n[a]\nexportname=/a\n{key}={value}\n"));
            prop_assert!(parsed.server.is_some() || parsed.failed);
        }
    }
}
