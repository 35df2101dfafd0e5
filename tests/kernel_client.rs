//! The kernel's own NBD client against the daemon: block devices, file systems on them, and what happens to both when the
//! configuration changes or the daemon ends. In a guest with a stock Debian kernel (tools/vm), because not every kernel has
//! the driver; what is done there is tests/clients/kernel_client.sh.

mod common;

use common::qemu;
use std::path::Path;
use std::process::Command;

#[test]
fn the_kernel_keeps_file_systems_on_exports() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut run = Command::new(root.join("tools/vm/run"));
    // far more than it takes on a busy machine
    run.args(["--timeout", "900", "bash"]);
    run.arg(root.join("tests/clients/kernel_client.sh")).arg(env!("CARGO_BIN_EXE_cowgate"));
    let said = qemu::run(&mut run);
    assert!(said.ends_with("all is well\n"), "{said}");
    println!("{said}");
}
