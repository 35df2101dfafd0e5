//! virtnbdbackup's calls: backups that a client pulls out of an export, full ones by what is allocated and incremental ones
//! by a dirty bitmap, and the restore of what it stored. With the machine's libnbd, which asks about 4 GiB less one block
//! at most, and with a newer one that asks about everything at once.

mod common;

use common::daemon::Setup;
use common::libnbd::Libnbd;
use common::qemu::{self, qemu_img, run};
use std::process::Command;

const CLIENT: &str = include_str!("clients/pull_backup.py");

#[test]
fn a_full_backup_is_pulled_and_restored() {
    for libnbd in Libnbd::BOTH {
        let setup = Setup::new();
        let image = setup.image("disk.qcow2", "", "6G");
        let target = setup.image("target.qcow2", "", "6G");
        let changes = "-c|write -P 1 1M 70M|-c|write -P 2 3G 1000k|-c|write -z 3073M 5M|-c|write -P 3 6143M 1M|-c|write -P 4 100k 512";
        run(Command::new("qemu-io").args(changes.split('|')).arg(&image));
        setup.export("disk", &image, "readonly = true");
        setup.export("target", &target, "");
        let daemon = setup.start();
        let stored = daemon.dir().join("stored");
        let stored = stored.to_str().unwrap();
        let told = libnbd.python(CLIENT, &["pull", &daemon.tcp("disk"), stored, "base:allocation"]);
        let moved: u64 = told.trim().parse().unwrap();
        assert!((72 << 20..90 << 20).contains(&moved), "{libnbd:?} {moved} bytes were read");
        libnbd.python(CLIENT, &["restore", &daemon.uri("target"), stored]);
        let (_dir, _) = daemon.stop();
        qemu::check(&target);
        qemu_img("compare -f qcow2 -F qcow2", &[&image, &target]);
    }
}

/// What changed since a bitmap was made, or since an overlay was laid over its parent, is enough to bring an older copy up
/// to date.
#[test]
fn an_incremental_backup_is_pulled_by_a_bitmap_and_by_what_the_overlay_holds() {
    for libnbd in Libnbd::BOTH {
        for context in ["qemu:dirty-bitmap:day-1", "qemu:dirty-bitmap:since-parent"] {
            let setup = Setup::new();
            let base = setup.image("base.qcow2", "", "6G");
            let (disk, target) = (setup.dir().join("disk.qcow2"), setup.dir().join("target.qcow2"));
            let before = "-c|write -P 1 1M 20M|-c|write -P 2 5G 1M";
            run(Command::new("qemu-io").args(before.split('|')).arg(&base));
            std::fs::copy(&base, &target).unwrap();
            if context.ends_with("day-1") {
                std::fs::rename(&base, &disk).unwrap();
                qemu_img("bitmap --add -f qcow2", &[&disk, "day-1".as_ref()]);
            } else {
                qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &disk]);
            }
            setup.export("disk", &disk, "");
            setup.export("target", &target, "");
            let daemon = setup.start();
            let changes = "-c|write -P 3 5M 300k|-c|write -z 9M 1M|-c|discard 10M 64k|-c|write -P 4 6140M 4M|-c|flush";
            run(Command::new("qemu-io").args(["-f", "raw"]).args(changes.split('|')).arg(daemon.tcp("disk")));
            let stored = daemon.dir().join("stored");
            let stored = stored.to_str().unwrap();
            let told = libnbd.python(CLIENT, &["pull", &daemon.tcp("disk"), stored, context]);
            let moved: u64 = told.trim().parse().unwrap();
            assert!((5 << 20..8 << 20).contains(&moved), "{libnbd:?} {context}: {moved} bytes were read");
            libnbd.python(CLIENT, &["restore", &daemon.uri("target"), stored]);
            let (_dir, _) = daemon.stop();
            qemu::check(&disk);
            qemu::check(&target);
            qemu_img("compare -f qcow2 -F qcow2", &[&disk, &target]);
        }
    }
}
