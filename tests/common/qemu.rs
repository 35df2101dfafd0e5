//! QEMU's tools as judges, and the images they make.

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
