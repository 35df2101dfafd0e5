//! The keys of TLS, as they stand in a configuration.

use super::*;
use crate::export::config::{Parsed, Role, parse};
use proptest::prelude::*;

fn base(text: &str) -> Parsed {
    parse(format!("[generic]\n{text}\n").as_bytes(), Path::new("/etc/cowgate/config"), Role::Base)
}

fn keys(text: &str) -> TlsKeys {
    base(text).server.unwrap_or_else(|| panic!("{text}")).tls
}

fn export(text: &str) -> ExportTls {
    let text = format!("[a]\nexportname=/a\n{text}\n");
    parse(text.as_bytes(), Path::new("/etc/a.conf"), Role::Included).exports[0].tls.clone()
}

#[test]
fn a_key_turns_it_on() {
    assert_eq!(keys("").mode, TlsMode::Off);
    assert_eq!(keys("certfile=/c").mode, TlsMode::Off);
    assert_eq!(keys("keyfile=/k\ncertfile=/c").mode, TlsMode::On);
    assert_eq!(keys("keyfile=\ncertfile=").mode, TlsMode::Off);
    assert_eq!(keys("keyfile=/k\ntls=off").mode, TlsMode::Off);
    for required in ["tls=required", "force_tls=1", "tlsonly=true", "tls = required \nforce_tls=true"] {
        assert_eq!(keys(&format!("keyfile=/k\n{required}")).mode, TlsMode::Required, "{required}");
        assert!(base(required).server.is_none(), "never served without: {required}");
    }
    assert!(base("keyfile=/k\nforce_tls=true\ntls=off").server.is_none());
}

#[test]
fn an_authority_is_asked_for() {
    assert_eq!(keys("keyfile=/k").verify(), Verify::None);
    assert_eq!(keys("keyfile=/k\ncacertfile=/a").verify(), Verify::Required);
    assert_eq!(keys("keyfile=/k\ncacertfile=/a\ntlsverify=optional").verify(), Verify::Optional);
    assert_eq!(keys("keyfile=/k\ncacertfile=/a\ntlsverify=none").verify(), Verify::None);
    for bad in ["tlsverify=required", "tlsverify=optional", "cacertfile=/a\ntlsverify=perhaps"] {
        assert!(base(&format!("keyfile=/k\n{bad}")).server.is_none(), "{bad}");
    }
}

#[test]
fn versions_of_a_priority_string() {
    let versions = |text: &str| {
        let Versions { tls12, tls13, server_order } = keys(&format!("tlsprio={text}")).versions;
        (tls12, tls13, server_order)
    };
    assert_eq!(versions(""), (true, true, false));
    assert_eq!(versions("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:%SERVER_PRECEDENCE"), (true, false, true));
    assert_eq!(versions("NORMAL:-VERS-TLS1.2"), (false, true, false));
    assert_eq!(versions("NONE:+VERS-TLS1.3"), (false, true, false));
    assert_eq!(versions("SECURE128:-VERS-TLS1.0:-VERS-TLS1.1"), (true, true, false));
    assert!(base("tlsprio=NORMAL:-VERS-ALL:+VERS-TLS1.1").server.is_none());
    assert_eq!(base("tlsprio=NORMAL:+AES-256-CBC:%COMPAT").problems.len(), 1, "said once");
}

#[test]
fn the_kernel_is_left_out_only_by_name() {
    assert!(!keys("").without_kernel && !keys("ktls=true").without_kernel);
    assert!(keys("ktls=false").without_kernel);
    assert!(base("ktls=perhaps").server.is_none());
}

#[test]
fn exports() {
    assert_eq!(export(""), ExportTls::default());
    for (text, mode) in [
        ("tls=off", TlsMode::Off),
        ("tls=on", TlsMode::On),
        ("tls=required", TlsMode::Required),
        ("force_tls=true", TlsMode::Required),
        ("tlsonly=1", TlsMode::Required),
        ("force_tls=false", TlsMode::On),
    ] {
        assert_eq!(export(text).mode, mode, "{text}");
    }
    let found = export(r"tlsallow = a b ;; CN=c\\,d,O=e;f");
    let names = ["a b", r"CN=c\,d,O=e", "f"];
    assert_eq!(found.allow.iter().map(Subject::text).collect::<Vec<_>>(), names);
    assert!(matches!(found.allow[1], Subject::Distinguished(_)) && found.mode == TlsMode::Required);
}

#[test]
fn what_a_server_cannot_give_is_refused() {
    let (plain, both) = (keys(""), keys("keyfile=/k"));
    let (all, asks) = (keys("keyfile=/k\ntls=required"), keys("keyfile=/k\ncacertfile=/a"));
    let (any, must, never) = (export(""), export("tls=required"), export("tls=off"));
    let some = export("tlsallow=a");
    let fits = |export: &ExportTls, server: &TlsKeys| export.conflict(server).is_none();
    assert!(fits(&any, &plain) && fits(&any, &both) && fits(&any, &all));
    assert!(!fits(&must, &plain) && fits(&must, &both) && fits(&must, &all));
    assert!(fits(&never, &plain) && fits(&never, &both) && !fits(&never, &all));
    assert!(!fits(&some, &plain) && !fits(&some, &both) && fits(&some, &asks));
}

proptest! {
    #[test]
    fn arbitrary_values_never_panic(
        key in "(tls|tlsallow|tlsprio|tlsverify|force_tls|keyfile|certfile|cacertfile|crlfile|ktls)",
        value in "[^\n]{0,60}",
    ) {
        let parsed = base(&format!("{key}={value}\n[a]\nexportname=/a\n{key}={value}"));
        prop_assert!(parsed.server.is_some() || parsed.failed);
    }
}
