//! An export as the text of its configuration group, to be written to a file of its own.
//!
//! Pure; called by `export::store`. Promises: what [`serialize`] returns is read back by `export::config` as the same
//! export, because it is read back here before it is returned; what the configuration cannot express is an error,
//! never a file that says something else.

use crate::export::client_keys::{ClientKeys, CopyOnWrite};
use crate::export::config::{self, ExportConfig, Role};
use crate::export::device_keys::DeviceKeys;
use crate::export::image_keys::{DetectZeroes, ImageKeys};
use crate::export::limit_keys::LimitKeys;
use crate::export::problem::{Problem, Severity, printable};
use crate::export::tls_keys::{ExportTls, Subject, TlsMode};
use crate::qcow2::compress::Compression;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// Why an export cannot be written as a group of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("export {name:?} cannot be written to a configuration file: {why}")]
pub struct Unwritable {
    /// The export's name, made printable.
    pub name: String,
    /// What stands against it, and what to do.
    pub why: String,
}

/// The group of an export: its header and its keys, each on a line. A key that has its default is left out, except
/// the format, which nobody shall have to guess.
pub fn serialize(config: &ExportConfig) -> Result<String, Unwritable> {
    let unwritable = |why: String| Unwritable { name: printable(config.name.as_bytes()), why };
    let text = group(config).map_err(unwritable)?;
    read_back(&text, config).map_err(unwritable)?;
    Ok(text)
}

/// The export that a group of this name with these keys would define. `Err`: what stands against it, a line each; a key
/// that would be ignored does, too.
pub fn from_keys(name: &str, keys: &[(String, String)]) -> Result<ExportConfig, Vec<String>> {
    let mut group = Lines::new(name);
    let is_key = |key: &str| !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    for (key, value) in keys {
        if !is_key(key) {
            let key = printable(key.as_bytes());
            return Err(vec![format!("{key}: this is no key of an export; see cowgate.conf(5) for those there are")]);
        }
        group.text(key, value);
    }
    let parsed = config::parse(group.text.as_bytes(), Path::new("/"), Role::Included);
    // a name that ends its header early makes other groups of it, or none
    let another =
        || format!("{}: a configuration file cannot hold this name; choose another", printable(name.as_bytes()));
    if !matches!(&parsed.defined[..], [(defined, _)] if defined == name) {
        return Err(vec![another()]);
    }
    if !parsed.problems.is_empty() {
        let line = |p: &Problem| match (&p.key, &p.value) {
            (Some(key), Some(value)) => format!("{key} = {value}: {}; {}", p.what, p.remedy),
            _ => format!("{}; {}", p.what, p.remedy),
        };
        return Err(parsed.problems.iter().map(line).collect());
    }
    parsed.exports.first().map(|export| (**export).clone()).ok_or_else(|| vec![another()])
}

fn group(config: &ExportConfig) -> Result<String, String> {
    // every field by name, so that none can be forgotten here
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
        image: ImageKeys { compress, detect_zeroes, cache_bytes, snapshot, lock_timeout },
        client: ClientKeys { auth_file, prerun, postrun, file_size, multi_file, copy_on_write, sync, untrusted: _ },
        limits: LimitKeys { bandwidth, iops, idle_timeout },
        tls: ExportTls { mode, allow },
        device,
        source: _,
    } = config;
    let mut group = Lines::new(name);
    group.path("exportname", path)?;
    // else a % makes it a template
    if path.as_os_str().as_encoded_bytes().contains(&b'%') {
        group.line("virtstyle", "none");
    }
    group.line("format", format);
    group.flag("readonly", *read_only);
    group.choice("flush", *flush);
    group.choice("fua", *fua);
    group.choice("trim", *trim);
    group.flag("rotational", *rotational);
    if let Some(text) = description {
        group.text("description", text);
    }
    if let Some(limit) = max_connections {
        group.line("maxconnections", limit);
    }
    match compress {
        Some(Compression::Zstd) => group.line("compress", "zstd"),
        Some(Compression::Zlib) => group.line("compress", "zlib"),
        None => {}
    }
    match detect_zeroes {
        DetectZeroes::Off => {}
        DetectZeroes::On => group.line("detectzeroes", "on"),
        DetectZeroes::Unmap => group.line("detectzeroes", "unmap"),
    }
    if let Some(bytes) = cache_bytes {
        group.line("l2cache", bytes);
    }
    if let Some(snapshot) = snapshot {
        group.text("snapshot", snapshot);
    }
    if let Some(time) = lock_timeout {
        group.line("locktimeout", seconds(time));
    }
    if let Some(path) = auth_file {
        group.path("authfile", path)?;
    }
    for (key, command) in [("prerun", prerun), ("postrun", postrun)] {
        if let Some(command) = command {
            group.text(key, command);
        }
    }
    if let Some(bytes) = file_size {
        group.line("filesize", bytes);
    }
    group.flag("multifile", *multi_file);
    if let Some(CopyOnWrite { directory }) = copy_on_write {
        group.line("copyonwrite", true);
        if let Some(directory) = directory {
            group.path("cowdir", directory)?;
        }
    }
    group.flag("sync", *sync);
    if let Some(rate) = bandwidth {
        group.line("bandwidthlimit", rate);
    }
    if let Some(rate) = iops {
        group.line("iopslimit", rate);
    }
    if let Some(time) = idle_timeout {
        group.line("idletimeout", seconds(time));
    }
    match mode {
        TlsMode::Off => group.line("tls", "off"),
        TlsMode::On => {}
        TlsMode::Required => group.line("tls", "required"),
    }
    if !allow.is_empty() {
        group.text("tlsallow", &allow.iter().map(Subject::text).collect::<Vec<_>>().join("; "));
    }
    if let Some(DeviceKeys { id, queues, depth, zero_copy }) = device {
        group.flag("ublk", true);
        group.number("ublkid", *id);
        group.number("ublkqueues", *queues);
        group.number("ublkdepth", *depth);
        if !zero_copy {
            group.line("ublkzerocopy", "false");
        }
    }
    Ok(group.text)
}

/// Whether the text says what was meant. This also stands guard over all that escapes cannot express.
fn read_back(text: &str, config: &ExportConfig) -> Result<(), String> {
    let parsed = config::parse(text.as_bytes(), Path::new("/"), Role::Included);
    if let Some(problem) = parsed.problems.iter().find(|p| p.severity > Severity::Warning) {
        let key = problem.key.as_ref().map_or(String::new(), |key| format!("{key}: "));
        return Err(format!("{key}{}; {}", problem.what, problem.remedy));
    }
    match &parsed.exports[..] {
        [export] if export.same(config) => Ok(()),
        _ => Err("it would be read as another export; give it a name and values that a configuration file can hold"
            .to_owned()),
    }
}

/// The lines of a group.
struct Lines {
    text: String,
}

impl Lines {
    fn new(name: &str) -> Lines {
        Lines { text: format!("[{name}]\n") }
    }

    /// A value that needs no escapes.
    fn line(&mut self, key: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{key} = {value}"); // writing to a string cannot fail
    }

    /// A boolean whose default is false.
    fn flag(&mut self, key: &str, value: bool) {
        if value {
            self.line(key, true);
        }
    }

    /// A boolean that may have been left open.
    fn choice(&mut self, key: &str, value: Option<bool>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }

    fn number(&mut self, key: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }

    fn text(&mut self, key: &str, value: &str) {
        self.line(key, escaped(value));
    }

    fn path(&mut self, key: &str, path: &Path) -> Result<(), String> {
        if !path.is_absolute() {
            return Err(format!("{key} = {}: this path is not absolute; write one that begins with /", path.display()));
        }
        match path.to_str() {
            Some(text) => self.text(key, text),
            None => return Err(format!("{key} = {}: this path is not UTF-8; rename the file", path.display())),
        }
        Ok(())
    }
}

/// A string with the escapes of the grammar. Blanks at the ends, where they would be lost or doubted, are escaped too.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (begin, end) = (text.len() - text.trim_start_matches(' ').len(), text.trim_end_matches(' ').len());
    for (at, c) in text.char_indices() {
        match c {
            '\\' => out.push_str(r"\\"),
            '\n' => out.push_str(r"\n"),
            '\t' => out.push_str(r"\t"),
            '\r' => out.push_str(r"\r"),
            ' ' if at < begin || at >= end => out.push_str(r"\s"),
            c => out.push(c),
        }
    }
    out
}

/// A time to the millisecond, in decimal: a binary fraction would have more digits than are read back.
fn seconds(time: &Duration) -> String {
    let text = format!("{}.{:03}", time.as_secs(), time.subsec_millis());
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::{Format, MAX_NAME_BYTES, Source};
    use crate::export::keyfile;
    use crate::export::reader::MAX_PATH_BYTES;
    use crate::image::MIN_CACHE_BYTES;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;
    use std::time::Duration;

    fn export(name: &str, path: &str) -> ExportConfig {
        ExportConfig::new(name, path, Source { file: "/etc/a.conf".into(), line: 1 })
    }

    fn refused(config: ExportConfig) -> String {
        serialize(&config).expect_err("cannot be expressed").to_string()
    }

    #[test]
    fn defaults_are_left_out() {
        assert_eq!(serialize(&export("a", "/a")).as_deref(), Ok("[a]\nexportname = /a\nformat = raw\n"));
    }

    #[test]
    fn from_keys_that_somebody_names() {
        let made = |name: &str, keys: &[(&str, &str)]| {
            let keys: Vec<_> = keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            from_keys(name, &keys)
        };
        let found = made("a b", &[("exportname", "/x\\y\n "), ("maxconnections", "3")]).expect("an export");
        assert_eq!((found.path.to_str(), found.max_connections), (Some("/x\\y\n "), Some(3)));
        for name in ["a]\n[b", "a]", "[", "", "a\nexportname=/etc/passwd", "\0", "a\u{1b}[2J", "generic"] {
            assert!(made(name, &[("exportname", "/x")]).is_err(), "{name:?}");
        }
        for key in ["", "a b", "a\nb", "]", "[x", "no_such_key", "exportname]"] {
            assert!(made("a", &[("exportname", "/x"), (key, "1")]).is_err(), "{key:?}");
        }
        let problems = made("a", &[("exportname", "/x"), ("readonly", "perhaps"), ("format", "vhd")]);
        assert_eq!(problems.map_err(|p| p.len()), Err(2), "all of them");
    }

    #[test]
    fn every_key() {
        let config = ExportConfig {
            format: Format::Qcow2,
            read_only: true,
            flush: Some(true),
            fua: Some(false),
            trim: Some(true),
            rotational: true,
            description: Some("the mail server's disk".into()),
            max_connections: Some(7),
            image: ImageKeys {
                compress: Some(Compression::Zlib),
                detect_zeroes: DetectZeroes::Unmap,
                cache_bytes: Some(MIN_CACHE_BYTES),
                snapshot: Some(" before\tupdate\\1 ".into()),
                lock_timeout: Some(Duration::from_millis(2500)),
            },
            client: ClientKeys {
                auth_file: Some("/etc/allow".into()),
                prerun: Some(r#"check "$COWGATE_PATH" 100%%"#.into()),
                postrun: Some("log".into()),
                file_size: Some(4096),
                multi_file: false,
                copy_on_write: None,
                sync: true,
                untrusted: None,
            },
            limits: LimitKeys {
                bandwidth: Some(1 << 20),
                iops: Some(500),
                idle_timeout: Some(Duration::from_millis(1500)),
            },
            tls: ExportTls {
                mode: TlsMode::Required,
                allow: vec![Subject::Name("backup 1".into()), Subject::Distinguished(r"CN=a\,b,O=c".into())],
            },
            device: Some(DeviceKeys { id: Some(7), queues: Some(2), depth: None, zero_copy: false }),
            ..export("disk 1", "/srv/50%.qcow2 ")
        };
        let lines = [
            "[disk 1]",
            r"exportname = /srv/50%.qcow2\s",
            "virtstyle = none",
            "format = qcow2",
            "readonly = true",
            "flush = true",
            "fua = false",
            "trim = true",
            "rotational = true",
            "description = the mail server's disk",
            "maxconnections = 7",
            "compress = zlib",
            "detectzeroes = unmap",
            &format!("l2cache = {MIN_CACHE_BYTES}"),
            r"snapshot = \sbefore\tupdate\\1\s",
            "locktimeout = 2.5",
            "authfile = /etc/allow",
            r#"prerun = check "$COWGATE_PATH" 100%%"#,
            "postrun = log",
            "filesize = 4096",
            "sync = true",
            "bandwidthlimit = 1048576",
            "iopslimit = 500",
            "idletimeout = 1.5",
            "tls = required",
            r"tlsallow = backup 1; CN=a\\,b,O=c",
            "ublk = true",
            "ublkid = 7",
            "ublkqueues = 2",
            "ublkzerocopy = false",
            "",
        ];
        assert_eq!(serialize(&config).expect("text"), lines.join("\n"));
    }

    #[test]
    fn what_cannot_be_expressed_is_an_error() {
        for name in ["", "a]", "[", "a\nexportname = /b\n[b", "a\tb", "a\0", "generic", "a\u{85}"] {
            refused(export(name, "/a"));
        }
        refused(export(&"n".repeat(MAX_NAME_BYTES + 1), "/a"));
        for path in ["", "a", "/a\0b"] {
            refused(export("a", path));
        }
        refused(export("a", &format!("/{}", "p".repeat(MAX_PATH_BYTES))));
        let mut not_text = export("a", "/a");
        not_text.path = std::ffi::OsStr::from_bytes(b"/\xff").into();
        assert!(refused(not_text).contains("not UTF-8"));
        refused(ExportConfig { max_connections: Some(0), ..export("a", "/a") });
        refused(ExportConfig { max_connections: Some(u32::MAX), ..export("a", "/a") });
        let keys = |image| ExportConfig { format: Format::Qcow2, image, ..export("a", "/a") };
        let message = refused(keys(ImageKeys { cache_bytes: Some(1), ..ImageKeys::default() }));
        assert!(message.starts_with("export \"a\" cannot be written to a configuration file: l2cache: "), "{message}");
        let snapshot = |name: &str| ImageKeys { snapshot: Some(name.into()), ..ImageKeys::default() };
        refused(keys(snapshot("writable")));
        for name in ["", "\x0cform feed", "a\0"] {
            refused(ExportConfig { read_only: true, ..keys(snapshot(name)) });
        }
        assert!(serialize(&ExportConfig { read_only: true, ..keys(snapshot("s")) }).is_ok());
        let raw = ImageKeys { compress: Some(Compression::Zstd), ..ImageKeys::default() };
        refused(ExportConfig { image: raw, ..export("a", "/a") });
    }

    /// Text with everything that has a meaning in the grammar.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![r"[ \t\r\n\\=#;\[\]%sntr\x0b\x0c\x00a\u{e4}\u{85}\u{2028}]{0,12}", ".{0,40}"]
    }

    fn image_keys() -> impl Strategy<Value = ImageKeys> {
        let compress = proptest::option::of(prop_oneof![Just(Compression::Zlib), Just(Compression::Zstd)]);
        let detect = prop_oneof![Just(DetectZeroes::Off), Just(DetectZeroes::On), Just(DetectZeroes::Unmap)];
        let cache = proptest::option::of(prop_oneof![Just(MIN_CACHE_BYTES), MIN_CACHE_BYTES..=u64::MAX, any::<u64>()]);
        let time = proptest::option::of((0..=3_600_000_u64).prop_map(Duration::from_millis));
        (compress, detect, cache, proptest::option::weighted(0.3, text()), time).prop_map(
            |(compress, detect_zeroes, cache_bytes, snapshot, lock_timeout)| ImageKeys {
                compress,
                detect_zeroes,
                cache_bytes,
                snapshot,
                lock_timeout,
            },
        )
    }

    fn client_keys() -> impl Strategy<Value = ClientKeys> {
        let path = || proptest::option::weighted(0.3, "/[a-z ]{1,8}".prop_map(std::path::PathBuf::from));
        let command = || proptest::option::weighted(0.3, "[a-z \\\\$\"']{0,9}[a-z](%%)?");
        let size = proptest::option::weighted(0.3, prop_oneof![1..=i64::MAX as u64, any::<u64>()]);
        let cow = proptest::option::weighted(0.3, path().prop_map(|directory| CopyOnWrite { directory }));
        let flag = || proptest::bool::weighted(0.2);
        (path(), command(), command(), size, flag(), cow, flag()).prop_map(
            |(auth_file, prerun, postrun, file_size, multi_file, copy_on_write, sync)| ClientKeys {
                auth_file,
                prerun,
                postrun,
                file_size,
                multi_file,
                copy_on_write,
                sync,
                untrusted: None,
            },
        )
    }

    prop_compose! {
        fn any_export()(
            name in text(),
            path in text(),
            absolute in proptest::bool::weighted(0.9),
            qcow2 in proptest::bool::weighted(0.8),
            read_only: bool,
            flush: Option<bool>,
            fua: Option<bool>,
            trim: Option<bool>,
            rotational: bool,
            description in proptest::option::of("[^\0]{1,40}"),
            max_connections in proptest::option::of(prop_oneof![1..9_u32, any::<u32>()]),
            image in image_keys(),
            client in client_keys(),
            bandwidth in proptest::option::of(4096..1_u64 << 40),
            idle_ms in proptest::option::of(1000..100_000_u64),
            device in proptest::option::of((proptest::option::of(0..1_u32 << 20), 1..5000_u16)),
        ) -> ExportConfig {
            let path = if absolute { format!("/{path}") } else { path };
            let format = if qcow2 { Format::Qcow2 } else { Format::Raw };
            let limits = LimitKeys { bandwidth, iops: bandwidth.map(|n| n % 1000 + 1), idle_timeout: idle_ms.map(Duration::from_millis) };
            let device = device.map(|(id, n)| {
                let queues = if client.copy_on_write.is_some() { 1 } else { n };
                DeviceKeys { id, queues: Some(queues), depth: (n % 2 == 0).then_some(n), zero_copy: n % 3 == 0 }
            });
            ExportConfig {
                device, limits, format, read_only, flush, fua, trim, rotational, description, max_connections, image, client,
                ..export(&name, &path)
            }
        }
    }

    fn parsed(text: &str) -> config::Parsed {
        config::parse(text.as_bytes(), Path::new("/etc/cowgate/conf.d/a.conf"), Role::Included)
    }

    #[test]
    fn times_have_no_more_digits_than_are_read() {
        let times = [(7637, "7.637"), (2500, "2.5"), (10_000, "10"), (0, "0"), (1, "0.001")];
        for (ms, text) in times {
            assert_eq!(seconds(&Duration::from_millis(ms)), text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        /// Either the file says exactly this, or there is none; and it is refused only for what cannot be said.
        #[test]
        fn an_export_is_read_back_or_refused(config in any_export()) {
            // what the configuration of nbd-server has no way to say
            let ImageKeys { compress, cache_bytes, snapshot, .. } = &config.image;
            let name_fits = !config.name.is_empty()
                && config.name != "generic"
                && !config.name.contains(|c: char| c.is_control() || matches!(c, '[' | ']'));
            let path_fits = config.path.is_absolute() && !config.path.as_os_str().as_bytes().contains(&0);
            let limit_fits = config.max_connections.is_none_or(|n| (1..=i32::MAX as u32).contains(&n));
            let cache_fits = cache_bytes.is_none_or(|n| n >= MIN_CACHE_BYTES);
            let ClientKeys { file_size, multi_file, copy_on_write, .. } = &config.client;
            let writes_image = copy_on_write.is_none();
            let client_fits = file_size.is_none_or(|n| (1..=i64::MAX as u64).contains(&n))
                && !(*multi_file && config.format == Format::Qcow2)
                && !(copy_on_write.is_some() && config.read_only);
            let snapshot_fits = snapshot.as_ref().is_none_or(|s| {
                (config.read_only || !writes_image) && !s.is_empty() && !s.starts_with('\x0c') && !s.contains('\0')
            });
            let format_fits = config.format == Format::Qcow2 || (compress.is_none() && snapshot.is_none());
            let device_fits = config.device.as_ref().is_none_or(|keys| {
                keys.queues.is_none_or(|n| n <= 4096) && keys.depth.is_none_or(|n| n <= 4096)
            });
            let fits = device_fits && name_fits && path_fits && limit_fits && cache_fits && snapshot_fits && format_fits && client_fits;
            match serialize(&config) {
                Err(why) => prop_assert!(!fits, "{why}"),
                Ok(text) => {
                    prop_assert!(fits);
                    let parsed = parsed(&text);
                    prop_assert!(!parsed.failed);
                    prop_assert_eq!(parsed.exports.len(), 1);
                    prop_assert!(parsed.exports[0].same(&config));
                }
            }
        }

        /// Whatever a file can hold can be written again.
        #[test]
        fn what_was_read_can_be_written(lines in proptest::collection::vec(
            ("(exportname|snapshot|l2cache|maxconnections|bandwidthlimit|iopslimit|idletimeout|format|readonly|virtstyle|compress|flush)", text()), 0..6,
        )) {
            let mut file = "[a]\nexportname = /a.qcow2\n".to_owned();
            for (key, value) in lines {
                file += &format!("{key} = {}\n", value.replace('\n', ""));
            }
            for export in parsed(&file).exports {
                let again = serialize(&export).expect("it was read from a file");
                prop_assert!(parsed(&again).exports[0].same_service(&export), "{again}");
            }
        }

        #[test]
        fn escapes_are_undone(text in text()) {
            let value = escaped(&text);
            prop_assert!(!value.contains(['\n', '\r', '\t']) && !value.starts_with(' ') && !value.ends_with(' '));
            prop_assert_eq!(keyfile::string(value.as_bytes()), Ok(text));
        }
    }
}
