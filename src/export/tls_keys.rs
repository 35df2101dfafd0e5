//! The keys that say who must use TLS, with which certificates, and whose certificates are accepted: nbd-server's in
//! `[generic]` and our own, there and in exports.
//!
//! Pure; `export::tls` reads the files they name. Promises: keys that contradict each other, or ask for a restriction that
//! nothing could enforce, are errors or refuse their export; none of them is ever taken as permission.

use super::problem::{Problem, Severity};
use super::reader::{At, Reader};
use std::path::{Path, PathBuf};

/// Longest list of subjects, in bytes.
const MAX_ALLOW_BYTES: usize = 64 << 10;

/// Who uses TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsMode {
    /// Nobody.
    #[default]
    Off,
    /// Whoever wants to.
    On,
    /// Everybody.
    Required,
}

/// Whose certificates are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// Nobody's.
    None,
    /// A client need not show one; one that it shows must be good.
    Optional,
    /// Every client shows a good one.
    Required,
}

/// The versions of TLS, and who chooses the cipher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// TLS 1.2.
    pub tls12: bool,
    /// TLS 1.3.
    pub tls13: bool,
    /// The server's order of ciphers counts, not the client's.
    pub server_order: bool,
}

impl Default for Versions {
    fn default() -> Self {
        Versions { tls12: true, tls13: true, server_order: false }
    }
}

/// The keys of `[generic]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsKeys {
    /// Who uses TLS on this server.
    pub mode: TlsMode,
    /// The server's certificate and those that lead from it to its authority; `None`: in the file of the key.
    pub certificate: Option<PathBuf>,
    /// Its private key. Without one there is no TLS.
    pub key: Option<PathBuf>,
    /// The authorities whose certificates clients may show.
    pub authorities: Option<PathBuf>,
    /// The certificates that these have revoked.
    pub revoked: Option<PathBuf>,
    /// Whose certificates are asked for; `None`: everybody's if there are `authorities`.
    pub verify: Option<Verify>,
    /// The versions offered.
    pub versions: Versions,
    /// The kernel may not take connections over.
    pub without_kernel: bool,
}

impl TlsKeys {
    /// Whose certificates are asked for.
    pub fn verify(&self) -> Verify {
        let default = if self.authorities.is_some() { Verify::Required } else { Verify::None };
        self.verify.unwrap_or(default)
    }
}

/// The keys of `[generic]` as they are read, before what they mean together is known.
#[derive(Default)]
pub(super) struct Draft<'a> {
    keys: TlsKeys,
    mode: Option<(At<'a>, TlsMode)>,
    forced: Option<At<'a>>,
    verify: Option<At<'a>>,
    certificate: Option<At<'a>>,
    revoked: Option<At<'a>>,
}

impl<'a> Draft<'a> {
    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'a>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "tls" => self.mode = mode(at, reader).map(|mode| (at, mode)),
            "force_tls" | "tlsonly" => {
                if reader.boolean(at) == Some(true) {
                    self.forced = Some(at);
                }
            }
            "certfile" => {
                self.certificate = Some(at);
                self.keys.certificate = file(at, reader);
            }
            "keyfile" => self.keys.key = file(at, reader),
            "cacertfile" => self.keys.authorities = file(at, reader),
            "crlfile" => {
                self.revoked = Some(at);
                self.keys.revoked = file(at, reader);
            }
            "tlsverify" => {
                self.verify = Some(at);
                self.keys.verify = verify(at, reader);
            }
            "tlsprio" => self.keys.versions = priority(at, reader),
            "ktls" => self.keys.without_kernel = reader.boolean(at) == Some(false),
            _ => return false,
        }
        true
    }

    /// The keys, and complaints of those that contradict each other.
    pub(super) fn finish(self, reader: &mut Reader<'_>) -> TlsKeys {
        let Draft { mut keys, mode, forced, verify, certificate, revoked } = self;
        let without_key = |at, reader: &mut Reader<'_>| {
            let what = "there is no TLS without a key, and serving without it is not what this asks for";
            reader.key(Severity::Error, at, what, "set keyfile and certfile, or remove the key");
        };
        let wanted = match (mode, forced) {
            (Some((at, TlsMode::Off | TlsMode::On)), Some(_)) => {
                let what = "this contradicts force_tls = true";
                reader.key(Severity::Error, at, what, "remove one of the two, or write tls = required");
                TlsMode::Required
            }
            (Some((at, wanted)), _) => {
                if wanted > TlsMode::Off && keys.key.is_none() {
                    without_key(at, reader);
                }
                wanted
            }
            (None, Some(at)) => {
                if keys.key.is_none() {
                    without_key(at, reader);
                }
                TlsMode::Required
            }
            (None, None) if keys.key.is_some() => TlsMode::On,
            (None, None) => TlsMode::Off,
        };
        keys.mode = wanted;
        if let (Some(at), None) = (certificate, &keys.key) {
            reader.key(Severity::Warning, at, "a certificate without a key gives no TLS", "set keyfile too");
        }
        let checks = matches!(keys.verify, Some(Verify::Optional | Verify::Required));
        if let (Some(at), true, None) = (verify, checks, &keys.authorities) {
            let what = "there is no authority whose certificates could be accepted";
            reader.key(Severity::Error, at, what, "set cacertfile, or write tlsverify = none");
        }
        if let (Some(at), Verify::None) = (revoked, keys.verify()) {
            let what = "nobody's certificate is looked at, so a revoked one makes no difference";
            reader.key(Severity::Warning, at, what, "set cacertfile, and no tlsverify = none");
        }
        keys
    }
}

/// The keys of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportTls {
    /// Who uses TLS, if the server has it.
    pub mode: TlsMode,
    /// The subjects that are let in; empty: all that the server lets in.
    pub allow: Vec<Subject>,
}

impl Default for ExportTls {
    fn default() -> Self {
        ExportTls { mode: TlsMode::On, allow: Vec::new() }
    }
}

/// A subject as `tlsallow` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A common name, or a DNS name among the alternative names.
    Name(String),
    /// The whole distinguished name, as RFC 4514 writes it.
    Distinguished(String),
}

impl Subject {
    /// The text of `tlsallow` that stands for it.
    pub fn text(&self) -> &str {
        match self {
            Subject::Name(text) | Subject::Distinguished(text) => text,
        }
    }
}

/// The keys of an export as they are read, before what they mean together is known.
#[derive(Default)]
pub(super) struct ExportDraft<'a> {
    mode: Option<(At<'a>, TlsMode)>,
    forced: bool,
    allow: Vec<Subject>,
}

impl<'a> ExportDraft<'a> {
    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'a>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "tls" => self.mode = mode(at, reader).map(|mode| (at, mode)),
            "tlsallow" => self.allow = subjects(at, reader),
            "force_tls" | "tlsonly" => self.forced |= reader.boolean(at) == Some(true),
            _ => return false,
        }
        true
    }

    /// The keys, and complaints of those that contradict each other.
    pub(super) fn finish(self, reader: &mut Reader<'_>) -> ExportTls {
        let ExportDraft { mode, forced, allow } = self;
        let remedy = "remove one of the two, or write tls = required";
        match mode {
            Some((at, TlsMode::Off | TlsMode::On)) if forced => {
                let what = "this contradicts force_tls = true, so this export is not served";
                reader.key(Severity::Refused, at, what, remedy);
            }
            Some((at, TlsMode::Off)) if !allow.is_empty() => {
                let what = "without TLS nobody shows a certificate, which tlsallow asks for; this export is not served";
                reader.key(Severity::Refused, at, what, remedy);
            }
            _ => {}
        }
        // who shows no certificate is not on the list
        let mode = match forced || !allow.is_empty() {
            true => TlsMode::Required,
            false => mode.map_or(TlsMode::On, |(_, mode)| mode),
        };
        ExportTls { mode, allow }
    }
}

impl ExportTls {
    /// What keeps a server with these keys from serving the export as it asks for. With the remedy.
    pub(super) fn conflict(&self, server: &TlsKeys) -> Option<(&'static str, &'static str)> {
        match (self.mode, server.mode) {
            (TlsMode::Required, TlsMode::Off) => Some((
                "it is to be served with TLS only, and this server has none; it is not served",
                "set keyfile and certfile in [generic], or remove tls, force_tls and tlsallow",
            )),
            (TlsMode::Off, TlsMode::Required) => Some((
                "it is to be served without TLS, and this server requires TLS of everybody; it is not served",
                "remove tls = off here, or write tls = on in [generic]",
            )),
            _ if !self.allow.is_empty() && server.verify() == Verify::None => Some((
                "tlsallow names subjects, and this server asks nobody for a certificate; it is not served",
                "set cacertfile in [generic], and no tlsverify = none there",
            )),
            _ => None,
        }
    }
}

/// The complaint that an export cannot be served as it asks for by a server with these keys.
pub(super) fn refused(file: &Path, line: u32, name: &str, (what, remedy): (&str, &str)) -> Problem {
    Problem::in_file(Severity::Refused, file, what, remedy).at(line).group(name)
}

fn mode(at: At<'_>, reader: &mut Reader<'_>) -> Option<TlsMode> {
    match reader.string(at)?.trim_end() {
        "off" => Some(TlsMode::Off),
        "on" => Some(TlsMode::On),
        "required" => Some(TlsMode::Required),
        _ => {
            reader.key(Severity::Error, at, "this is no way to use TLS", "write off, on or required");
            None
        }
    }
}

fn verify(at: At<'_>, reader: &mut Reader<'_>) -> Option<Verify> {
    match reader.string(at)?.trim_end() {
        "none" => Some(Verify::None),
        "optional" => Some(Verify::Optional),
        "required" => Some(Verify::Required),
        _ => {
            let what = "this is no way to ask for certificates";
            reader.key(Severity::Error, at, what, "write none, optional or required");
            None
        }
    }
}

/// A file; nbd-server takes an empty value as none.
fn file(at: At<'_>, reader: &mut Reader<'_>) -> Option<PathBuf> {
    if at.entry.value.is_empty() {
        return None;
    }
    reader.path(at)
}

/// Names separated by semicolons; a comma belongs to a distinguished name.
fn subjects(at: At<'_>, reader: &mut Reader<'_>) -> Vec<Subject> {
    let Some(text) = reader.string(at) else { return Vec::new() };
    let mut found = Vec::new();
    for name in text.split(';').map(str::trim).filter(|name| !name.is_empty()) {
        match name.contains('=') {
            true => found.push(Subject::Distinguished(name.to_owned())),
            false if name.contains(',') => {
                let what = format!("{name:?} is neither a name nor a distinguished name");
                let remedy = "separate subjects by semicolons, such as backup1; CN=backup2,O=Example";
                reader.key(Severity::Error, at, what, remedy);
            }
            false => found.push(Subject::Name(name.to_owned())),
        }
    }
    if found.is_empty() {
        let what = "this list names nobody, so nobody could use this export; it is not served";
        reader.key(Severity::Refused, at, what, "name the subjects to let in, or remove the key");
    }
    if text.len() > MAX_ALLOW_BYTES {
        let what = format!("this list has more than {MAX_ALLOW_BYTES} bytes");
        reader.key(Severity::Error, at, what, "give those clients certificates of an authority of their own");
    }
    found
}

/// What of a GnuTLS priority string concerns the versions and who chooses the cipher. A warning says what else it asks for
/// that is not followed.
fn priority(at: At<'_>, reader: &mut Reader<'_>) -> Versions {
    let mut versions = Versions::default();
    let Some(text) = reader.string(at) else { return versions };
    let mut not_followed = Vec::new();
    for word in text.split(':').map(str::trim).filter(|word| !word.is_empty()) {
        match word {
            "NORMAL" => {}
            "NONE" | "-VERS-ALL" | "-VERS-TLS-ALL" | "!VERS-ALL" | "!VERS-TLS-ALL" => {
                (versions.tls12, versions.tls13) = (false, false);
            }
            "+VERS-ALL" | "+VERS-TLS-ALL" => (versions.tls12, versions.tls13) = (true, true),
            "+VERS-TLS1.2" => versions.tls12 = true,
            "+VERS-TLS1.3" => versions.tls13 = true,
            "-VERS-TLS1.2" | "!VERS-TLS1.2" => versions.tls12 = false,
            "-VERS-TLS1.3" | "!VERS-TLS1.3" => versions.tls13 = false,
            // older ones are never offered
            "-VERS-TLS1.1" | "!VERS-TLS1.1" | "-VERS-TLS1.0" | "!VERS-TLS1.0" | "-VERS-SSL3.0" | "!VERS-SSL3.0" => {}
            "-VERS-DTLS-ALL" | "!VERS-DTLS-ALL" => {}
            "%SERVER_PRECEDENCE" => versions.server_order = true,
            _ => not_followed.push(word),
        }
    }
    if !versions.tls12 && !versions.tls13 {
        let what = "this leaves no version of TLS; there are 1.2 and 1.3";
        reader.key(Severity::Error, at, what, "add +VERS-TLS1.2 or +VERS-TLS1.3, or remove the key");
    }
    if !not_followed.is_empty() {
        let what = format!("{} is not followed; only what concerns TLS 1.2 and 1.3 is", not_followed.join(":"));
        reader.key(Severity::Warning, at, what, "remove it; the ciphers offered are all of the strong ones");
    }
    versions
}

#[cfg(test)]
mod tests;
