//! Whom certificates are about.

use super::*;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

fn certificate(parts: &[(DnType, &str)], names: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::new(names.iter().map(|n| n.to_string()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name = DistinguishedName::new();
    parts.iter().for_each(|(kind, value)| params.distinguished_name.push(kind.clone(), *value));
    params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
}

fn names(text: &str) -> [Subject; 1] {
    match text.contains('=') {
        true => [Subject::Distinguished(text.to_owned())],
        false => [Subject::Name(text.to_owned())],
    }
}

#[test]
fn a_subject_is_compared_exactly() {
    let custom = DnType::from_oid(&[1, 3, 6, 1, 4, 1, 99999, 1]);
    let parts = [
        (DnType::CountryName, "DE"),
        (DnType::OrganizationName, "Example, Inc."),
        (custom, "x"),
        (DnType::CommonName, "backup 1"),
    ];
    let identity = Identity::of(&certificate(&parts, &["Host.example", "10.0.0.1"]));
    assert_eq!(identity.subject, r"CN=backup 1,1.3.6.1.4.1.99999.1=#0c0178,O=Example\, Inc.,C=DE");
    for good in ["backup 1", "host.EXAMPLE", &identity.subject.clone()] {
        assert!(identity.is_among(&names(good)), "{good}");
    }
    for bad in ["backup", "Backup 1", "backup 1 ", "10.0.0.1", "CN=backup 1", "C=DE", "*.example", "", "Example, Inc."]
    {
        assert!(!identity.is_among(&names(bad)), "{bad}");
    }
    assert!(!identity.is_among(&[]));
}

#[test]
fn a_certificate_about_nobody_is_nobodys() {
    for identity in [Identity::of(&certificate(&[], &[])), Identity::of(b"nonsense"), Identity::of(&[])] {
        assert_eq!(identity, Identity::default());
        assert!(!identity.is_among(&[Subject::Name(String::new()), Subject::Distinguished(String::new())]));
        assert_eq!(identity.to_string(), "(no name)");
    }
}

#[test]
fn who_is_admitted() {
    let client =
        |identity: Option<Identity>| Encrypted { version: "TLSv1.3", cipher: String::new(), kernel: false, identity };
    let keys = |mode, allow: &[Subject]| ExportTls { mode, allow: allow.to_vec() };
    let alice = client(Some(Identity::of(&certificate(&[(DnType::CommonName, "alice")], &[]))));
    let nobody = client(None);
    let any = keys(TlsMode::On, &[]);
    assert!([None, Some(&alice), Some(&nobody)].iter().all(|c| admit(&any, *c).is_ok()));
    let off = keys(TlsMode::Off, &[]);
    assert_eq!((admit(&off, None), admit(&off, Some(&alice))), (Ok(()), Err(Barred::Encrypted)));
    let must = keys(TlsMode::Required, &[]);
    assert_eq!((admit(&must, None), admit(&must, Some(&nobody))), (Err(Barred::Plain), Ok(())));
    let some = keys(TlsMode::Required, &names("alice"));
    assert_eq!((admit(&some, None), admit(&some, Some(&nobody))), (Err(Barred::Plain), Err(Barred::Subject)));
    assert_eq!(admit(&some, Some(&alice)), Ok(()));
    let other = keys(TlsMode::Required, &names("bob"));
    assert_eq!(admit(&other, Some(&alice)), Err(Barred::Subject));
}
