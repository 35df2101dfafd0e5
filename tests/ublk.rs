//! Exports as block devices, /dev/ublkbN, in guests with stock Debian kernels (tools/vm), because few machines have the
//! driver; tests/clients/ublk.sh and ublk_recovery.sh say what is done there.

mod common;

use common::qemu;
use std::path::Path;
use std::process::Command;

/// Runs a script in a guest with this kernel.
fn in_guest(kernel: &str, script: &str, arguments: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut run = Command::new(root.join("tools/vm/run"));
    // far more than it takes on a busy machine
    run.args(["--kernel", kernel, "--memory", "2048", "--timeout", "900", "bash"]);
    run.arg(root.join("tests/clients").join(script)).arg(env!("CARGO_BIN_EXE_cowgate")).args(arguments);
    let said = qemu::run(&mut run);
    assert!(said.ends_with("all is well\n"), "{said}");
    println!("{said}");
}

#[test]
fn exports_are_block_devices() {
    in_guest("6.12", "ublk.sh", &[]);
}

#[test]
fn exports_are_block_devices_of_the_newest_kernel() {
    in_guest("newest", "ublk.sh", &[]);
}

/// How often the daemon is killed; `COWGATE_ROUNDS=N` asks for more.
fn rounds() -> String {
    std::env::var("COWGATE_ROUNDS").unwrap_or("20".to_owned())
}

#[test]
fn devices_outlive_the_daemon() {
    in_guest("6.12", "ublk_recovery.sh", &[&rounds()]);
}

#[test]
fn devices_of_the_newest_kernel_outlive_the_daemon() {
    in_guest("newest", "ublk_recovery.sh", &[&rounds()]);
}
