//! What block devices bear: NBD clients beside them, hundreds of them, little memory, power cuts. In guests with stock
//! Debian kernels (tools/vm), because few machines have the driver; what is done there is tests/clients/ublk_*.sh.
//!
//! `COWGATE_ROUNDS=N` makes more of those that go round.

mod common;

use common::guest;

/// A device with four queues and two NBD clients write one image at the same time.
#[test]
fn nbd_clients_write_beside_a_device() {
    guest::run(&["--kernel", "6.12", "--memory", "1536", "--cpus", "4"], "ublk_shared.sh", &[]);
}

#[test]
fn nbd_clients_write_beside_a_device_of_the_newest_kernel() {
    guest::run(&["--kernel", "newest", "--memory", "1536", "--cpus", "4"], "ublk_shared.sh", &[]);
}

/// Two hundred devices come and go by SIGHUP; threads, descriptors and memory are given back.
#[test]
fn two_hundred_devices_come_and_go() {
    let rounds = rounds(3);
    guest::run(&["--kernel", "newest", "--memory", "2048"], "ublk_many.sh", &[&rounds]);
}

fn rounds(most: usize) -> String {
    let rounds = std::env::var("COWGATE_ROUNDS").map_or(most, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    rounds.to_string()
}
