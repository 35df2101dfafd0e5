//! Certificates as an administrator makes them: authorities, servers' and clients' certificates, lists of revoked ones,
//! in the files that daemon and clients look for.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
    date_time_ymd,
};
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Who signs certificates.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    serial: Cell<u64>,
}

/// A certificate and its key (PEM).
pub struct Certificate {
    pub serial: u64,
    pub certificate: String,
    pub key: String,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = subject(&[(DnType::CommonName, name)]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Authority { issuer, serial: Cell::new(1000) }
    }

    /// Its own certificate.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A server's certificate for this machine.
    pub fn server(&self) -> Certificate {
        self.sign("server", &["localhost", "127.0.0.1"], ExtendedKeyUsagePurpose::ServerAuth, 4000)
    }

    /// A client's certificate: its subject is `CN=name,O=Example`.
    pub fn client(&self, name: &str) -> Certificate {
        self.sign(name, &[], ExtendedKeyUsagePurpose::ClientAuth, 4000)
    }

    /// The same with DNS names.
    pub fn client_with_names(&self, name: &str, names: &[&str]) -> Certificate {
        self.sign(name, names, ExtendedKeyUsagePurpose::ClientAuth, 4000)
    }

    /// A client's certificate of long ago.
    pub fn expired(&self, name: &str) -> Certificate {
        self.sign(name, &[], ExtendedKeyUsagePurpose::ClientAuth, 2020)
    }

    fn sign(&self, name: &str, names: &[&str], usage: ExtendedKeyUsagePurpose, until: i32) -> Certificate {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = subject(&[(DnType::OrganizationName, "Example"), (DnType::CommonName, name)]);
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.not_before = date_time_ymd(2019, 1, 1);
        params.not_after = date_time_ymd(until, 1, 1);
        let serial = self.serial.get();
        self.serial.set(serial + 1);
        params.serial_number = Some(SerialNumber::from(serial));
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        Certificate { serial, certificate, key: key.serialize_pem() }
    }

    /// The list of those it has revoked, to be replaced in that year.
    pub fn revokes(&self, revoked: &[&Certificate], until: i32) -> String {
        let one = |certificate: &&Certificate| RevokedCertParams {
            serial_number: SerialNumber::from(certificate.serial),
            revocation_time: date_time_ymd(2020, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2020, 1, 1),
            next_update: date_time_ymd(until, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(one).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }

    /// What a client has: the certificates it trusts and, perhaps, one of its own, as libnbd and QEMU look for them.
    pub fn directory(&self, parent: &Path, name: &str, own: Option<&Certificate>) -> PathBuf {
        let directory = parent.join(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("ca-cert.pem"), self.pem()).unwrap();
        if let Some(own) = own {
            fs::write(directory.join("client-cert.pem"), &own.certificate).unwrap();
            secret(&directory.join("client-key.pem"), &own.key);
        }
        directory
    }
}

impl Certificate {
    /// Writes `server-cert.pem` and `server-key.pem`.
    pub fn install(&self, directory: &Path) {
        fs::write(directory.join("server-cert.pem"), &self.certificate).unwrap();
        secret(&directory.join("server-key.pem"), &self.key);
    }
}

/// Writes a file that is for its owner only.
pub fn secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn subject(parts: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    parts.iter().for_each(|(kind, value)| name.push(kind.clone(), *value));
    name
}
