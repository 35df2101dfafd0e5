//! TLS as the server offers it: certificates and keys read from their files, and who a client's certificate is about.
//!
//! Promises: [`load`] takes over everything or nothing, and says of each file what is wrong with it and what to do; a key
//! never appears in a message. Reads files, so it is called where that may block: by the daemon at a start and a reload,
//! and by `check-config`. Which connections use what was loaded last, [`Current`] says.

use super::config::ServerConfig;
use super::load::{Content, Stamps, any_fresh, read, unchanged};
use super::problem::{Problem, Severity};
use super::tls_keys::{ExportTls, Subject, TlsKeys, TlsMode, Verify, Versions};
use crate::ring::tls::{Acceptor, Secured, kernel};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{CipherSuite, RootCertStore, ServerConfig as RustlsConfig, SupportedProtocolVersion, version};
use std::fmt;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::revocation_list::CertificateRevocationList;

/// Most certificates in one file.
const MAX_CERTIFICATES: usize = 1000;

/// What a server offers. Made by [`load`].
#[derive(Clone, Debug, Default)]
pub struct Offer {
    /// Who uses TLS.
    pub mode: TlsMode,
    /// `None`: there is no TLS.
    pub acceptor: Option<Acceptor>,
    /// Who makes and opens the records, for people.
    records: String,
    /// The keys it was made from.
    keys: TlsKeys,
    /// What its files looked like.
    stamps: Stamps,
}

impl Offer {
    /// Whether these keys would give the same, because they are the same and their files have not changed.
    pub fn is_still(&self, keys: &TlsKeys) -> bool {
        self.keys == *keys && unchanged(&self.stamps)
    }

    /// Its files, if one of them has just changed.
    pub fn recent(&self) -> Stamps {
        if any_fresh(&self.stamps) { self.stamps.clone() } else { Stamps::new() }
    }

    /// The server's certificate, for people.
    pub fn describe(&self) -> String {
        match (&self.keys.key, self.mode) {
            (Some(key), TlsMode::On | TlsMode::Required) => {
                let certificate = self.keys.certificate.as_ref().unwrap_or(key).display();
                format!("certificate {certificate}, records {}", self.records)
            }
            _ => "none".to_owned(),
        }
    }
}

/// What is in force now, for whoever accepts a connection.
#[derive(Debug, Default)]
pub struct Current(RwLock<Arc<Offer>>);

impl Current {
    /// What is in force.
    pub fn get(&self) -> Arc<Offer> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another one in force. Connections keep theirs.
    pub fn set(&self, offer: Arc<Offer>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = offer;
    }
}

/// What [`load`] found.
#[derive(Debug)]
pub struct LoadedTls {
    /// `None`: something is missing or wrong, and the problems say what.
    pub offer: Option<Arc<Offer>>,
    /// Everything found.
    pub problems: Vec<Problem>,
    /// Something is wrong with a file that has just changed: it, or one that belongs to it, may still be written.
    pub unsettled: bool,
    /// Its files that have just changed.
    pub recent: Stamps,
}

/// Reads what the keys of `[generic]` name; `base` is the file they stand in.
pub fn load(server: &ServerConfig, base: &Path) -> LoadedTls {
    let keys = &server.tls;
    let mut files = Files { base, stamps: Stamps::new(), problems: Vec::new() };
    let config = match (keys.mode, &keys.key) {
        (TlsMode::Off, _) | (_, None) => Ok(None),
        (_, Some(key)) => config(keys, key, &mut files).map(Some),
    };
    let Files { stamps, mut problems, .. } = files;
    let fresh = any_fresh(&stamps);
    let recent = if fresh { stamps.clone() } else { Stamps::new() };
    match config {
        Ok(config) => {
            let (suites, records) = match config.is_some() && !keys.without_kernel {
                true => records(kernel::suites()),
                false => (Vec::new(), HERE.to_owned()),
            };
            let acceptor = config.map(|config| Acceptor::new(config, suites));
            let offer = Offer { mode: keys.mode, acceptor, records, keys: keys.clone(), stamps };
            LoadedTls { offer: Some(Arc::new(offer)), problems, unsettled: false, recent }
        }
        Err(problem) => {
            problems.push(*problem);
            LoadedTls { offer: None, problems, unsettled: fresh, recent }
        }
    }
}

/// Where records are made that the kernel does not make.
const HERE: &str = "in this process";

/// The cipher suites whose records the kernel makes, and who makes which, for people.
fn records(suites: Result<Vec<CipherSuite>, kernel::Reason>) -> (Vec<CipherSuite>, String) {
    match suites {
        Ok(suites) => (suites, "of TLS 1.3 over TCP by the kernel".to_owned()),
        Err(reason) => (Vec::new(), format!("{HERE}: {reason}")),
    }
}

/// The files of one load.
struct Files<'a> {
    base: &'a Path,
    stamps: Stamps,
    problems: Vec<Problem>,
}

impl Files<'_> {
    fn problem(
        &self,
        severity: Severity,
        key: &str,
        path: &Path,
        what: impl Into<String>,
        remedy: &str,
    ) -> Box<Problem> {
        let mut problem = Problem::in_file(severity, self.base, what, remedy).group("generic");
        problem.key = Some(key.to_owned());
        problem.value = Some(path.display().to_string());
        Box::new(problem)
    }

    fn error(&self, key: &str, path: &Path, what: impl Into<String>, remedy: &str) -> Box<Problem> {
        self.problem(Severity::Error, key, path, what, remedy)
    }

    fn warn(&mut self, key: &str, path: &Path, what: impl Into<String>, remedy: &str) {
        let problem = self.problem(Severity::Warning, key, path, what, remedy);
        self.problems.push(*problem);
    }

    fn read(&mut self, key: &str, path: &Path) -> Result<Vec<u8>, Box<Problem>> {
        let Content { text, stamp, .. } = read(path).map_err(|e| {
            let remedy = "make it a file that the server's user can read, or correct the path";
            self.error(key, path, format!("this file cannot be read: {e}"), remedy)
        })?;
        self.stamps.insert(path.to_owned(), stamp);
        Ok(text)
    }

    /// The certificates in a file, at least one.
    fn certificates(&mut self, key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Box<Problem>> {
        let text = self.read(key, path)?;
        let remedy = "write certificates as PEM, each between BEGIN CERTIFICATE and END CERTIFICATE";
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).take(MAX_CERTIFICATES + 1).collect();
        match found {
            Err(e) => Err(self.error(key, path, format!("this is no PEM file: {e}"), remedy)),
            Ok(found) if found.is_empty() => Err(self.error(key, path, "there is no certificate in this file", remedy)),
            Ok(found) if found.len() > MAX_CERTIFICATES => {
                let what = format!("there are more than {MAX_CERTIFICATES} certificates in this file");
                Err(self.error(key, path, what, "leave out those that are not needed"))
            }
            Ok(found) => Ok(found),
        }
    }

    fn private_key(&mut self, path: &Path) -> Result<PrivateKeyDer<'static>, Box<Problem>> {
        let text = self.read("keyfile", path)?;
        if let Ok(found) = fs::metadata(path)
            && found.permissions().mode() & 0o004 != 0
        {
            let what = "everybody on this machine can read this private key";
            self.warn("keyfile", path, what, "take the permission from others, as with chmod o= FILE");
        }
        PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
            // what stands there instead is not for a message
            let encrypted = text.windows(9).any(|w| w == b"ENCRYPTED");
            let (what, remedy) = match encrypted {
                true => ("this private key is encrypted", "decrypt it: nobody is there to give a passphrase"),
                false => (
                    "there is no private key in this file",
                    "write the key as PEM, between BEGIN PRIVATE KEY and END PRIVATE KEY",
                ),
            };
            self.error("keyfile", path, what, remedy)
        })
    }
}

fn config(keys: &TlsKeys, key_file: &Path, files: &mut Files<'_>) -> Result<RustlsConfig, Box<Problem>> {
    let (cert_key, cert_file) = match &keys.certificate {
        Some(path) => ("certfile", path.as_path()),
        None => ("keyfile", key_file),
    };
    let chain = files.certificates(cert_key, cert_file)?;
    look_at(&chain[0], cert_key, cert_file, files)?;
    let key = files.private_key(key_file)?;
    let verifier = verifier(keys, files)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let internal = |e: rustls::Error| files.error("tlsprio", Path::new(""), e.to_string(), "remove the key");
    let builder = RustlsConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(keys.versions))
        .map_err(internal)?
        .with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(chain, key).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => {
            let what = format!("this key does not belong to the certificate in {}", cert_file.display());
            files.error("keyfile", key_file, what, "use the key that the certificate was made for")
        }
        e => {
            let what = format!("key and certificate cannot be used: {e}");
            files.error("keyfile", key_file, what, "make an RSA key of 2048 bits or more, an ECDSA or an Ed25519 one")
        }
    })?;
    config.ignore_client_order = keys.versions.server_order;
    // A session taken up again would go by what was checked when it began, and connections live long.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn versions(wanted: Versions) -> Vec<&'static SupportedProtocolVersion> {
    let all = [(wanted.tls13, &version::TLS13), (wanted.tls12, &version::TLS12)];
    all.into_iter().filter(|(wanted, _)| *wanted).map(|(_, version)| version).collect()
}

/// Complains of a server certificate that clients will not take.
fn look_at(certificate: &[u8], key: &str, path: &Path, files: &mut Files<'_>) -> Result<(), Box<Problem>> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else {
        let what = "the first certificate in this file is not one of X.509";
        return Err(files.error(key, path, what, "make a new one"));
    };
    let validity = parsed.validity();
    let now = now();
    if validity.not_after.timestamp() < now {
        let what = format!("this certificate has expired, on {}; clients will not accept it", validity.not_after);
        files.warn(key, path, what, "renew it, and reload");
    } else if validity.not_before.timestamp() > now {
        let what = format!("this certificate is not valid before {}", validity.not_before);
        files.warn(key, path, what, "wait, or see whether the clock is right");
    }
    Ok(())
}

fn now() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64)
}

/// Who judges the certificates of clients.
fn verifier(keys: &TlsKeys, files: &mut Files<'_>) -> Result<Arc<dyn ClientCertVerifier>, Box<Problem>> {
    let (Some(path), Verify::Optional | Verify::Required) = (&keys.authorities, keys.verify()) else {
        return Ok(WebPkiClientVerifier::no_client_auth());
    };
    let mut roots = RootCertStore::empty();
    for certificate in files.certificates("cacertfile", path)? {
        roots.add(certificate).map_err(|e| {
            let what = format!("a certificate in this file cannot be that of an authority: {e}");
            files.error("cacertfile", path, what, "put the certificates of authorities here, and no others")
        })?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    if let Some(list) = &keys.revoked {
        // as other implementations do: a list that is too old says nothing
        builder = builder.with_crls(revoked(list, files)?).enforce_revocation_expiration();
    }
    if keys.verify() == Verify::Optional {
        builder = builder.allow_unauthenticated();
    }
    builder.build().map_err(|e| {
        let (key, path) = match &keys.revoked {
            Some(list) => ("crlfile", list),
            None => ("cacertfile", path),
        };
        files.error(key, path, format!("it cannot be used: {e}"), "make a new one")
    })
}

/// The lists of revoked certificates in a file.
fn revoked(path: &Path, files: &mut Files<'_>) -> Result<Vec<CertificateRevocationListDer<'static>>, Box<Problem>> {
    let text = files.read("crlfile", path)?;
    let remedy = "write lists as PEM, each between BEGIN X509 CRL and END X509 CRL";
    let lists: Result<Vec<_>, _> =
        CertificateRevocationListDer::pem_slice_iter(&text).take(MAX_CERTIFICATES + 1).collect();
    let lists = lists.map_err(|e| files.error("crlfile", path, format!("this is no PEM file: {e}"), remedy))?;
    if lists.is_empty() || lists.len() > MAX_CERTIFICATES {
        let what = format!("there are {} lists of revoked certificates in this file", lists.len());
        return Err(files.error("crlfile", path, what, remedy));
    }
    for list in &lists {
        let next = CertificateRevocationList::from_der(list).ok().and_then(|(_, list)| list.next_update());
        if let Some(next) = next.filter(|next| next.timestamp() < now()) {
            let what =
                format!("a list in this file was to be replaced by {next}; until it is, its clients are refused");
            files.warn("crlfile", path, what, "put the authority's new list here, and reload");
        }
    }
    Ok(lists)
}

/// Whom a certificate is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The subject's distinguished name, as RFC 4514 writes it.
    pub subject: String,
    common_names: Vec<String>,
    dns_names: Vec<String>,
}

impl Identity {
    /// Reads a certificate (DER) that was verified. One that cannot be read is about nobody.
    pub fn of(certificate: &[u8]) -> Identity {
        let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return Identity::default() };
        let subject = parsed.subject();
        let common_names = subject.iter_common_name().filter_map(|cn| cn.as_str().ok()).map(str::to_owned).collect();
        let mut dns_names = Vec::new();
        if let Ok(Some(names)) = parsed.subject_alternative_name() {
            for name in &names.value.general_names {
                if let x509_parser::extensions::GeneralName::DNSName(name) = name {
                    dns_names.push((*name).to_owned());
                }
            }
        }
        Identity { subject: distinguished::name(subject), common_names, dns_names }
    }

    /// Whether one of these subjects is this one.
    pub fn is_among(&self, allowed: &[Subject]) -> bool {
        allowed.iter().any(|subject| match subject {
            Subject::Name(name) => {
                self.common_names.contains(name) || self.dns_names.iter().any(|dns| dns.eq_ignore_ascii_case(name))
            }
            Subject::Distinguished(name) => !self.subject.is_empty() && self.subject == *name,
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.subject.is_empty() { "(no name)" } else { &self.subject })
    }
}

/// How a client's connection is encrypted, and who the client is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encrypted {
    /// The version of TLS, such as `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite by its registered name.
    pub cipher: String,
    /// The kernel makes and opens the records.
    pub kernel: bool,
    /// Whom the client's certificate is about, if it has shown one.
    pub identity: Option<Identity>,
}

impl Encrypted {
    /// What a handshake has agreed on.
    pub fn new(secured: &Secured) -> Encrypted {
        Encrypted {
            version: secured.version,
            cipher: secured.cipher.clone(),
            kernel: secured.kernel,
            identity: secured.certificate.as_deref().map(Identity::of),
        }
    }
}

impl fmt::Display for Encrypted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = if self.kernel { " (kernel)" } else { "" };
        write!(f, "{} {}{kernel}", self.version, self.cipher)?;
        match &self.identity {
            Some(identity) => write!(f, " {identity}"),
            None => Ok(()),
        }
    }
}

/// Why an export is not for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Barred {
    /// It is served with TLS only.
    Plain,
    /// It is served without TLS only.
    Encrypted,
    /// It is for others.
    Subject,
}

/// Whether an export is for a client whose connection is encrypted so, or not at all.
pub fn admit(export: &ExportTls, client: Option<&Encrypted>) -> Result<(), Barred> {
    match (export.mode, client) {
        (TlsMode::Required, None) => Err(Barred::Plain),
        (TlsMode::Off, Some(_)) => Err(Barred::Encrypted),
        (_, Some(client)) if !export.allow.is_empty() => {
            match client.identity.as_ref().is_some_and(|identity| identity.is_among(&export.allow)) {
                true => Ok(()),
                false => Err(Barred::Subject),
            }
        }
        _ => Ok(()),
    }
}

mod distinguished;

#[cfg(test)]
mod tests;
