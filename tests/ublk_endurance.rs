//! What block devices bear: NBD clients beside them, hundreds of them, little memory, power cuts. In guests with stock
//! Debian kernels (tools/vm), because few machines have the driver; what is done there is tests/clients/ublk_*.sh.
//!
//! `COWGATE_ROUNDS=N` makes more of those that go round.

mod common;

use common::guest;
use std::path::Path;

/// A device with four queues and two NBD clients write one image at the same time.
#[test]
fn nbd_clients_write_beside_a_device() {
    nbd_clients_write("newest");
}

fn nbd_clients_write(kernel: &str) {
    guest::run(&["--kernel", kernel, "--memory", "1536", "--cpus", "4"], "ublk_shared.sh", &[]);
}

/// Two hundred devices come and go by SIGHUP; threads, descriptors and memory are given back.
#[test]
fn two_hundred_devices_come_and_go() {
    let rounds = rounds(1);
    guest::run(&["--kernel", "newest", "--memory", "2048"], "ublk_many.sh", &[&rounds]);
}

/// Devices whose daemon needs memory while there is none to be had but by writing to them.
fn memory_is_short(kernel: &str) {
    let disk = Disk::new(2 << 30);
    guest::run(&["--kernel", kernel, "--memory", "512", "--disk", disk.path()], "ublk_memory.sh", &[]);
}

/// The power of a machine with a file system on a device is cut, again and again: what was fsynced is there, and the file
/// system and the chain below it are sound.
#[test]
fn what_was_fsynced_survives_power_cuts() {
    power_cuts("6.12", "ext4");
}

mod at_length {
    #[test]
    fn nbd_clients_write_beside_a_device() {
        super::nbd_clients_write("6.12");
    }

    #[test]
    fn a_device_does_not_wait_for_itself_when_memory_is_short() {
        super::memory_is_short("newest");
    }

    #[test]
    fn a_device_does_not_wait_for_itself_on_an_older_kernel() {
        super::memory_is_short("6.12");
    }

    #[test]
    fn what_was_fsynced_survives_power_cuts() {
        super::power_cuts("newest", "xfs");
    }
}

fn power_cuts(kernel: &str, kind: &str) {
    let disk = Disk::new(2 << 30);
    let share = tempfile::tempdir().expect("a directory");
    let share = share.path().to_str().expect("UTF-8");
    let last: u32 = rounds(1).parse().expect("a number");
    for round in 0..=last {
        let mut machine = vec!["--kernel", kernel, "--disk", disk.path(), "--share", share];
        if round < last {
            machine.push("--power-cut");
        }
        let said = guest::said(&machine, "ublk_power.sh", &[kind, &round.to_string(), &last.to_string(), share]);
        match round < last {
            true => {
                let cut = std::fs::read_to_string(Path::new(share).join("cut")).unwrap_or_default();
                assert!(cut.starts_with(&format!("round {round}: ")), "round {round} of {last}: {said}{cut}");
                println!("{said}{cut}");
            }
            false => assert!(said.ends_with("all is well\n"), "{said}"),
        }
    }
}

/// A guest's disk.
struct Disk(tempfile::NamedTempFile);

impl Disk {
    fn new(size: u64) -> Disk {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.as_file().set_len(size).expect("a size");
        Disk(file)
    }

    fn path(&self) -> &str {
        self.0.path().to_str().expect("UTF-8")
    }
}

fn rounds(most: usize) -> String {
    let rounds = std::env::var("COWGATE_ROUNDS").map_or(most, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    rounds.to_string()
}
