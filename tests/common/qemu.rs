//! QEMU's tools as judges, and the images they make.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// Runs a command; panics with its output unless it succeeds.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let out = output(command);
    assert!(out.status.success(), "{command:?} failed: {}\n{}{}", out.status, text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// Runs a command; panics only when it cannot be started.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}; tools/test installs what it needs"))
}

/// Bytes a program printed.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs qemu-img with the words of `line` and then `paths`.
#[track_caller]
pub fn qemu_img(line: &str, paths: &[&Path]) -> String {
    run(Command::new("qemu-img").args(line.split_whitespace()).args(paths))
}

/// `qemu-img check` finds neither errors nor leaks.
#[track_caller]
pub fn check(image: &Path) {
    let out = output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image));
    assert_eq!(out.status.code(), Some(0), "{}: {}{}", image.display(), text(&out.stdout), text(&out.stderr));
}

/// `qemu-img check` finds no errors; leaks are allowed.
#[track_caller]
pub fn check_leaks_allowed(image: &Path) {
    let out = output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image));
    let code = out.status.code();
    assert!(code == Some(0) || code == Some(3), "{}: {}{}", image.display(), text(&out.stdout), text(&out.stderr));
}

/// QEMU reads the same guest content from the QCOW2 image as the raw file holds.
#[track_caller]
pub fn same_content(image: &Path, raw: &Path) {
    run(Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw"]).arg(image).arg(raw));
}

/// Bits as QEMU reads them from an image: the dirty ranges of the disk.
pub fn qemus_bits(image: &Path, bitmap: &str) -> Vec<(u64, u64)> {
    let map = run(Command::new("nbdinfo")
        .arg(format!("--map=qemu:dirty-bitmap:{bitmap}"))
        .args(["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap])
        .arg(image)
        .arg("]"));
    let mut dirty: Vec<(u64, u64)> = Vec::new();
    for line in map.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (at, len): (u64, u64) = (words[0].parse().unwrap(), words[1].parse().unwrap());
        match (words[3], dirty.last_mut()) {
            ("dirty", Some(last)) if last.0 + last.1 == at => last.1 += len,
            ("dirty", _) => dirty.push((at, len)),
            _ => {}
        }
    }
    dirty
}

/// The bitmaps as `qemu-img info` lists them.
pub fn qemus_list(image: &Path) -> Value {
    let info: Value = serde_json::from_str(&qemu_img("info -U --output=json", &[image])).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// The exit codes of `qemu-img check` and `cowgate image check`, which agree, with what was said.
#[track_caller]
pub fn checked_by_both(image: &Path) -> (Option<i32>, String) {
    let theirs = output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image));
    let ours = output(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["image", "check", "-q"]).arg(image));
    let say = |out: &Output| text(&out.stdout) + &text(&out.stderr);
    let said = format!("qemu-img check: {}\ncowgate image check: {}", say(&theirs), say(&ours));
    assert_eq!(theirs.status.code(), ours.status.code(), "{}: {said}", image.display());
    (ours.status.code(), said)
}
