//! The commands around names and configuration files: what they print, and with which exit status.

mod common;

use common::qemu;
use serde_json::{Value, json};
use std::process::{Command, Output};

fn cowgate(arguments: &[&str]) -> Output {
    qemu::output(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(arguments))
}

/// What a command that succeeds prints.
#[track_caller]
fn prints(arguments: &[&str]) -> String {
    let output = cowgate(arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", qemu::text(&output.stderr));
    qemu::text(&output.stdout)
}

/// What a command that fails with `status` says.
#[track_caller]
fn fails(status: i32, arguments: &[&str]) -> String {
    let output = cowgate(arguments);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {}", qemu::text(&output.stderr));
    assert_eq!(qemu::text(&output.stdout), "");
    qemu::text(&output.stderr)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

const BACKUP: [&str; 7] = ["name", "--vm-context", "ctx-pgtest2", "--disk", "0", "--type", "full"];
const UUID: &str = "0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5f";

#[test]
fn a_backup_is_named_and_its_name_taken_apart() {
    let name = "backup-ctx-pgtest2-disk0-full-20250101T120000";
    for time in ["20250101T120000", "2025-01-01T12:00:00Z", "2025-01-01T13:00:00+01:00", "@1735732800"] {
        assert_eq!(prints(&[&BACKUP[..], &["--time", time]].concat()), format!("{name}\n"), "{time}");
    }
    let lines = "kind: backup\ncontext: ctx-pgtest2\ndisk: 0\ntype: full\ntime: 2025-01-01T12:00:00Z\n";
    assert_eq!(prints(&["name", "--parse", name]), lines);
    let parts = json!({
        "name": name, "kind": "backup", "context": "ctx-pgtest2", "shortened": false, "disk": 0, "type": "full",
        "time": "2025-01-01T12:00:00Z",
    });
    assert_eq!(json(&prints(&["name", "--parse", name, "--json"])), parts);
    assert_eq!(json(&prints(&[&BACKUP[..], &["--time", "@1735732800", "--json"]].concat())), parts);
}

#[test]
fn without_a_time_it_is_now_in_utc() {
    let clock = || prints_of("date", &["-u", "+%Y%m%dT%H%M%S"]);
    let before = clock();
    let name = qemu::run(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(BACKUP).env("TZ", "Asia/Tokyo"));
    let time = name.trim().rsplit('-').next().unwrap().to_owned();
    assert!(before.trim() <= time.as_str() && time.as_str() <= clock().trim(), "{before} {time}");
}

fn prints_of(program: &str, arguments: &[&str]) -> String {
    qemu::run(Command::new(program).args(arguments))
}

#[test]
fn a_long_context_is_shortened_and_told_so() {
    let arguments = ["name", "--vm-context", UUID, "--disk", "3", "--type", "incr", "--time", "@0", "--json"];
    let made = json(&prints(&arguments));
    let name = made["name"].as_str().unwrap();
    assert!(name.len() <= 63 && name.starts_with("backup-0b9f4c~"), "{name}");
    assert_eq!(made["shortened"], true);
    assert_eq!(json(&prints(&["name", "--parse", name, "--json"])), made);
    assert!(prints(&["name", "--parse", name]).contains(" (shortened)\n"));
    // what is shortened already is not taken for a whole context
    let context = made["context"].as_str().unwrap();
    let message = fails(1, &["name", "--vm-context", context, "--disk", "3", "--type", "incr"]);
    assert!(message.contains("shortened"), "{message}");
}

#[test]
fn a_migration_is_named_and_its_name_taken_apart() {
    let name = format!("migration-vm-{UUID}-disk0");
    assert_eq!(prints(&["name", "--migration", UUID, "--disk", "0"]), format!("{name}\n"));
    let parts = json!({"name": name, "kind": "migration", "vm": UUID, "disk": 0});
    assert_eq!(json(&prints(&["name", "--parse", &name, "--json"])), parts);
    assert_eq!(prints(&["name", "--parse", &name]), format!("kind: migration\nvm: {UUID}\ndisk: 0\n"));
}

#[test]
fn what_cannot_be_a_name_is_refused_with_the_reason() {
    let message = fails(1, &["name", "--vm-context", "a/b", "--disk", "0", "--type", "full"]);
    assert_eq!(message, "cowgate: the context holds '/'; it may hold ASCII letters, digits, `-`, `_` and `.`\n");
    for (what, arguments) in [
        ("0 to 999", &["name", "--vm-context", "a", "--disk", "1000", "--type", "full"][..]),
        ("full or incr", &["name", "--vm-context", "a", "--disk", "1", "--type", "diff"]),
        ("RFC 3339", &[&BACKUP[..], &["--time", "yesterday"]].concat()),
        ("--type", &["name", "--vm-context", "a", "--disk", "1"]),
        ("--disk", &["name", "--migration", UUID]),
        ("cannot be used with", &["name", "--migration", UUID, "--disk", "1", "--time", "@0"]),
        ("cannot be used with", &["name", "--parse", "x", "--disk", "1"]),
        ("cannot be used with", &["name", "--parse", "x", "--vm-context", "a"]),
        ("--vm-context", &["name"]),
    ] {
        let message = fails(2, arguments);
        assert!(message.contains(what), "{arguments:?}: {message}");
    }
    assert!(fails(1, &["name", "--migration", "x", "--disk", "0"]).contains("8-4-4-4-12"));
    assert!(fails(1, &["name", "--parse", "disk0"]).contains("is no name of a backup or migration export"));
    // an argument that is no text
    use std::os::unix::ffi::OsStrExt;
    let not_text = std::ffi::OsStr::from_bytes(b"\xff");
    let status = Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["name", "--parse"]).arg(not_text).output().unwrap();
    assert_eq!(status.status.code(), Some(2));
}
