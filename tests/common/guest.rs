//! Scripts of tests/clients that run as root in a guest with a stock Debian kernel (tools/vm).

use super::qemu;
use std::path::Path;
use std::process::Command;

/// Runs the script in a guest; `machine`: options of tools/vm/run. `arguments` come after the program under test.
///
/// Panics with all that it said unless it says that all is well.
#[track_caller]
pub fn run(machine: &[&str], script: &str, arguments: &[&str]) {
    let said = said(machine, script, arguments);
    assert!(said.ends_with("all is well\n"), "{said}");
    println!("{said}");
}

/// The same with a script that may end otherwise: what it said. Panics when it failed.
#[track_caller]
pub fn said(machine: &[&str], script: &str, arguments: &[&str]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut run = Command::new(root.join("tools/vm/run"));
    // far more than it takes on a busy machine
    run.args(["--timeout", "900"]).args(machine).arg("bash").arg(root.join("tests/clients").join(script));
    run.arg(env!("CARGO_BIN_EXE_cowgate")).args(arguments);
    qemu::run(&mut run)
}
