//! Images that were not closed, or are marked corrupt, behind the real daemon: the former are made sound before the first
//! byte is written, the latter are served and never written.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn qemu_io(target: &str, commands: &[&str]) -> Output {
    let mut io = Command::new("qemu-io");
    io.args(["-f", if target.starts_with("nbd") { "raw" } else { "qcow2" }]);
    for command in commands {
        io.args(["-c", command]);
    }
    qemu::output(io.arg(target))
}

fn is_dirty(image: &Path) -> bool {
    std::fs::read(image).unwrap()[79] & 1 != 0
}

/// An image with lazy refcounts whose writer was killed: its refcounts are wrong.
fn dirty_image(setup: &Setup, name: &str) -> PathBuf {
    let image = setup.image(name, "lazy_refcounts=on", "64M");
    qemu_io(image.to_str().unwrap(), &["write -P 1 0 3M", "write -P 2 40M 100k", "flush", "abort"]);
    assert!(is_dirty(&image));
    let check = qemu::output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image));
    assert_eq!(check.status.code(), Some(2), "its refcounts are wrong");
    image
}

fn reads_right(daemon: &Daemon, export: &str) {
    let uri = daemon.uri(export);
    let out = qemu::output(
        Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read -P 1 0 3M", "-c", "read -P 2 40M 100k"]).arg(uri),
    );
    let text = qemu::text(&out.stdout);
    assert!(out.status.success() && !text.contains("failed"), "{text}{}", qemu::text(&out.stderr));
}

#[test]
fn refcounts_are_rebuilt_before_the_first_writer_comes_in() {
    let setup = Setup::new();
    let image = dirty_image(&setup, "lazy.qcow2");
    setup.export("lazy", &image, "");
    let daemon = setup.start();
    let out = qemu_io(&daemon.uri("lazy"), &["write -P 3 10M 5M", "write -P 4 1M 64k", "flush"]);
    assert!(out.status.success(), "{}{}", qemu::text(&out.stdout), daemon.log());
    let out =
        qemu_io(&daemon.uri("lazy"), &["read -P 1 0 1M", "read -P 4 1M 64k", "read -P 3 10M 5M", "read -P 2 40M 100k"]);
    assert!(!qemu::text(&out.stdout).contains("failed"), "{}", qemu::text(&out.stdout));
    let (_dir, log) = daemon.stop();
    assert!(log.contains("lazy.qcow2: refcounts rebuilt"), "{log}");
    assert!(!is_dirty(&image));
    qemu::check(&image);
}

#[test]
fn readers_get_a_dirty_image_as_it_is() {
    let setup = Setup::new();
    let image = dirty_image(&setup, "lazy.qcow2");
    setup.export("reader", &image, "readonly = true");
    setup.export("writer", &image, "");
    let daemon = setup.start();
    let before = std::fs::read(&image).unwrap();
    reads_right(&daemon, "reader");
    assert!(std::fs::read(&image).unwrap() == before);
    // as long as a reader is connected a writer is told why not; then it gets in
    let uri = daemon.uri("writer");
    let program = format!(
        "h.pread(512, 0)\nw = nbd.NBD()\ntry:\n    w.connect_uri({uri:?})\n    print('connected')\n\
         except nbd.Error:\n    print('refused')\n"
    );
    assert!(!daemon.python("reader", &program).contains("connected"));
    let words = "was not closed and its refcounts may be wrong";
    daemon.wait_for(words, || daemon.log().contains(words));
    assert!(daemon.log().contains("--repair"));
    assert!(std::fs::read(&image).unwrap() == before);
    daemon.wait_for("the reader to be gone", || daemon.log().contains("lazy.qcow2: closed"));
    let out = qemu_io(&daemon.uri("writer"), &["write -P 1 1M 1M"]);
    assert!(out.status.success(), "{}", daemon.log());
    reads_right(&daemon, "reader");
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
}

#[test]
fn a_dirty_image_that_cannot_be_repaired_is_not_written() {
    let setup = Setup::new();
    let image = dirty_image(&setup, "lazy.qcow2");
    let bytes = std::fs::read(&image).unwrap();
    let be64 = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let l2 = be64(be64(40)) & 0x00ff_ffff_ffff_fe00;
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let misaligned = be64(l2) | 512;
    file.write_all_at(&misaligned.to_be_bytes(), l2).unwrap();
    setup.export("broken", &image, "");
    setup.export("reader", &image, "readonly = true");
    let daemon = setup.start();
    let out = qemu_io(&daemon.uri("broken"), &["write 1M 64k"]);
    assert!(!out.status.success());
    daemon.wait_for("the reason", || daemon.log().contains("could not be repaired as a whole"));
    assert!(is_dirty(&image));
    let out = daemon.python("reader", "print(h.pread(512, 65536) == b'\\x01' * 512)\n");
    assert_eq!(out.trim(), "True");
    let (_dir, _) = daemon.stop();
}

#[test]
fn a_corrupt_image_is_served_read_only() {
    let setup = Setup::new();
    let image = setup.image("bad.qcow2", "", "64M");
    qemu_io(image.to_str().unwrap(), &["write -P 1 0 3M", "write -P 2 40M 100k"]);
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    file.write_all_at(&2u64.to_be_bytes(), 72).unwrap();
    let before = std::fs::read(&image).unwrap();
    setup.export("bad", &image, "");
    let daemon = setup.start();
    let flags = |arguments: &[&str]| {
        let out = qemu::run(Command::new("nbdinfo").args(arguments));
        let info: serde_json::Value = serde_json::from_str(&out).unwrap();
        let export = &info["exports"][0];
        (export["is_read_only"].clone(), export["can_trim"].clone(), export["can_zero"].clone())
    };
    let read_only = (true.into(), false.into(), false.into());
    assert_eq!(flags(&["--json", &daemon.uri("bad")]), read_only);
    assert_eq!(flags(&["--json", "--list", &daemon.uri("bad")]), read_only);
    reads_right(&daemon, "bad");
    assert!(daemon.log().contains("marked corrupt and served read-only"), "{}", daemon.log());
    let told = daemon.python(
        "bad",
        "h.set_strict_mode(0)\ntry:\n    h.pwrite(b'x' * 512, 0)\n    print('written')\nexcept nbd.Error as e:\n    \
         print(e.errno)\n",
    );
    assert!(told.contains("EPERM"), "{told}");
    let (_dir, _) = daemon.stop();
    assert!(std::fs::read(&image).unwrap() == before);
    // repaired, it is served as configured again
    qemu::run(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["image", "check", "--repair"]).arg(&image));
    qemu::check(&image);
    assert_eq!(std::fs::read(&image).unwrap()[79], 0);
}
