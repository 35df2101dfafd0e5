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
