//! `cowgate restore`: backups mounted from their images, in guests with stock Debian kernels (tools/vm); what is done there
//! is tests/clients/restore.sh.

mod common;

use common::qemu;
use std::path::Path;
use std::process::Command;

/// Runs the script in a guest with this kernel.
fn in_guest(kernel: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut run = Command::new(root.join("tools/vm/run"));
    // far more than it takes on a busy machine
    run.args(["--kernel", kernel, "--memory", "2048", "--timeout", "900", "bash"]);
    run.arg(root.join("tests/clients/restore.sh")).arg(env!("CARGO_BIN_EXE_cowgate"));
    let said = qemu::run(&mut run);
    assert!(said.ends_with("all is well\n"), "{said}");
    println!("{said}");
}

#[test]
fn backups_are_mounted() {
    in_guest("6.12");
}

#[test]
fn backups_are_mounted_by_the_newest_kernel() {
    in_guest("newest");
}
