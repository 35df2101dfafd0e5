//! Every seed of the fuzz targets and every input that ever broke something, on the stable toolchain: `tools/fuzz` makes
//! up new ones.

#[path = "../fuzz/targets/mod.rs"]
#[allow(dead_code)] // what only the engine uses
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

/// More than any input may make the process take, in KiB.
const MOST_MEMORY: u64 = 512 << 10;

fn files(directory: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(directory);
    let Ok(entries) = fs::read_dir(&directory) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries.map(|e| e.expect("directory entry").path()).collect();
    files.sort();
    files
}

/// Most memory the process ever took, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("VmHWM")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

fn replay(target: &str, seeds: &str, run: fn(&[u8])) {
    let mut inputs = files(&format!("corpus/{seeds}"));
    assert!(inputs.len() >= 3, "the seeds of {target} are missing");
    inputs.extend(files(&format!("regressions/{target}")));
    for input in inputs {
        println!("{}", input.display()); // shown when it fails
        run(&fs::read(&input).expect("an input"));
        assert!(peak() < MOST_MEMORY, "{} took {} MiB", input.display(), peak() >> 10);
    }
}

#[test]
fn headers() {
    replay("header", "header", targets::header::run);
}

#[test]
fn tables() {
    replay("tables", "tables", targets::tables::run);
}

#[test]
fn images_read() {
    replay("open_read", "image", targets::open_read::run);
}

#[test]
fn images_written() {
    replay("open_write", "image", targets::open_write::run);
}

#[test]
fn images_checked() {
    replay("check", "image", targets::check::run);
}

#[test]
fn nbd_handshakes() {
    replay("nbd_handshake", "nbd_handshake", targets::nbd_handshake::run);
}

#[test]
fn nbd_requests() {
    replay("nbd_requests", "nbd_requests", targets::nbd_requests::run);
}
