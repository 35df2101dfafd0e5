//! nbd-server's configuration keys turned into types: one file's text in, settings, exports and problems out.
//!
//! Pure: `export::load` reads the files and calls [`parse`]; `export::keyfile` knows the grammar. Promises: every
//! problem of a file is reported, with file, line, key, value and remedy; a key that is ignored is a warning, never
//! silence; a key that restricts who may use an export, or decides where its writes go, and that is not supported,
//! refuses that export rather than serving it without the restriction.

use crate::export::client_keys::{self, ClientKeys};
use crate::export::device_keys::{self, DeviceKeys};
use crate::export::image_keys::{ImageKeys, lock_timeout};
use crate::export::keyfile::{self, Group, KeyFile};
use crate::export::limit_keys::{LimitKeys, ServerLimits};
use crate::export::problem::{Problem, Severity, printable};
use crate::export::reader::{At, Reader};
use crate::export::tls_keys::{self, ExportTls, TlsKeys};
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
    /// Words for people, told to clients that ask.
    pub description: Option<String>,
    /// Clients at one time; `None`: no limit.
    pub max_connections: Option<u32>,
    /// How the image is used.
    pub image: ImageKeys,
    /// What each client gets.
    pub client: ClientKeys,
    /// What its clients may take. A change does not retire the export.
    pub limits: LimitKeys,
    /// Who must use TLS, and who may.
    pub tls: ExportTls,
    /// The block device that it is as well. A change does not retire the export.
    pub device: Option<DeviceKeys>,
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
            description: None,
            max_connections: None,
            image: ImageKeys::default(),
            client: ClientKeys::default(),
            limits: LimitKeys::default(),
            tls: ExportTls::default(),
            device: None,
            source,
        }
    }

    /// Whether its clients write the image itself.
    pub fn writes_image(&self) -> bool {
        !self.read_only && self.client.copy_on_write.is_none()
    }

    /// Whether both serve the same thing to NBD clients in the same way: everything but how fast, the block device and
    /// the place of the definition.
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
            description,
            max_connections,
            image,
            client,
            limits: _,
            tls,
            device: _,
            source: _,
        } = self;
        (name, path, format, read_only) == (&other.name, &other.path, &other.format, &other.read_only)
            && (flush, fua, trim) == (&other.flush, &other.fua, &other.trim)
            && (rotational, max_connections) == (&other.rotational, &other.max_connections)
            && description == &other.description
            && (image, client, tls) == (&other.image, &other.client, &other.tls)
    }

    /// Whether both are the same but for the place of the definition.
    pub fn same(&self, other: &ExportConfig) -> bool {
        self.same_service(other) && (&self.limits, &self.device) == (&other.limits, &other.device)
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
    /// The export of clients that ask for none by name.
    pub default_export: Option<String>,
    /// Worker threads; `None`: one per core.
    pub workers: Option<usize>,
    /// Directories below which backing files may be; `None`: the exported image's own directory.
    pub image_roots: Option<Vec<PathBuf>>,
    /// How long a client waits for an image that is in use elsewhere, if its export does not say.
    pub lock_timeout: Option<Duration>,
    /// What clients may take.
    pub limits: ServerLimits,
    /// TLS.
    pub tls: TlsKeys,
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
            default_export: None,
            workers: None,
            image_roots: None,
            lock_timeout: None,
            limits: ServerLimits::default(),
            tls: TlsKeys::default(),
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
            ("maxmemory", self.limits.max_memory != other.limits.max_memory),
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
    let mut tls = tls_keys::Draft::default();
    for entry in group.effective() {
        let at = At { group, entry };
        match entry.key.as_str() {
            "listenaddr" => server.listen = listen_addresses(at, reader),
            "port" => server.port = port(at, reader).unwrap_or(DEFAULT_PORT),
            "unixsock" => server.unix_socket = socket_path(at, reader),
            "controlsock" => server.control_socket = control_socket(at, reader),
            "duallisten" => server.dual_listen = reader.boolean(at).unwrap_or(false),
            "allowlist" => server.list_allowed = reader.boolean(at).unwrap_or(false),
            "defaultexport" => server.default_export = default_export(at, reader),
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
            "user" => server.user = account(at, reader),
            "group" => server.group = account(at, reader),
            "max_threads" => {
                if reader.integer(at).is_some() {
                    reader.key(Severity::Warning, at, "this key is ignored", "workers = N sets the number of threads");
                }
            }
            _ if server.limits.read(at, reader) => {}
            _ if tls.read(at, reader) => {}
            _ => reader.unknown(at),
        }
    }
    server.tls = tls.finish(reader);
    if server.dual_listen && server.unix_socket.is_none() {
        let line = group.effective().find(|e| e.key == "duallisten").map_or(group.line, |e| e.line);
        let what = "duallisten means nothing without unixsock";
        let problem = Problem::in_file(Severity::Warning, reader.file, what, "set unixsock or remove the key");
        reader.problems.push(problem.at(line).group(&group.name));
    }
    server
}

/// The name of an export. Whether there is one may change with every reload.
fn default_export(at: At<'_>, reader: &mut Reader<'_>) -> Option<String> {
    let name = reader.string(at)?;
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        let what = format!("the name of an export has 1 to {MAX_NAME_BYTES} bytes, not {}", name.len());
        reader.key(Severity::Error, at, &what, "write the name of an export, or remove the key");
        return None;
    }
    Some(name)
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
    let mut tls = tls_keys::ExportDraft::default();
    let mut device = device_keys::Draft::default();
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
            "description" => config.description = description(at, reader),
            "maxconnections" => config.max_connections = max_connections(at, reader),
            _ if config.image.read(at, reader) || client.read(at, reader) => {}
            _ if config.limits.read(at, reader) || tls.read(at, reader) || device.read(at, reader) => {}
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
    config.tls = tls.finish(reader);
    config.device = device.finish(config.client.copy_on_write.is_some(), reader);
    // a snapshot is never written
    config.read_only |= config.image.snapshot.is_some() && config.client.copy_on_write.is_none();
    let usable = reader.problems[before..].iter().all(|p| p.severity == Severity::Warning);
    usable.then_some(config)
}

/// A string of the NBD protocol.
fn description(at: At<'_>, reader: &mut Reader<'_>) -> Option<String> {
    let text = reader.string(at)?;
    if text.len() > MAX_NAME_BYTES {
        let what = format!("a description has at most {MAX_NAME_BYTES} bytes in the NBD protocol");
        reader.key(Severity::Error, at, what, "shorten it");
    }
    (!text.is_empty()).then_some(text)
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
mod tests;
