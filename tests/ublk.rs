//! Exports as block devices, /dev/ublkbN, in guests with stock Debian kernels (tools/vm), because few machines have the
//! driver; tests/clients/ublk.sh and ublk_recovery.sh say what is done there.

mod common;

use common::guest;

fn in_guest(kernel: &str, script: &str, arguments: &[&str]) {
    guest::run(&["--kernel", kernel, "--memory", "2048"], script, arguments);
}

#[test]
fn exports_are_block_devices_of_the_newest_kernel() {
    in_guest("newest", "ublk.sh", &["zero copy"]);
}

/// How often the daemon is killed; `COWGATE_ROUNDS=N` asks for more.
fn rounds() -> String {
    std::env::var("COWGATE_ROUNDS").unwrap_or("6".to_owned())
}

#[test]
fn devices_outlive_the_daemon() {
    in_guest("newest", "ublk_recovery.sh", &[&rounds()]);
}

mod at_length {
    #[test]
    fn exports_are_block_devices() {
        super::in_guest("6.12", "ublk.sh", &["user copy"]);
    }

    #[test]
    fn devices_outlive_the_daemon() {
        super::in_guest("6.12", "ublk_recovery.sh", &[&super::rounds()]);
    }
}
