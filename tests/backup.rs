//! The Capture Agent's job with its exact behaviour: two read-write connections, one request at a time of up to 32 MiB at
//! any 512-byte border, WRITE_ZEROES, no flush, no disconnect.

mod common;

use common::daemon::Setup;
use common::qemu;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const AGENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/capture_agent.py");

/// A disk with data, holes and zeroes whose borders are sectors.
fn disk(path: &Path, size: u64, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0u8; size as usize];
    let mut at = 0;
    while at < bytes.len() {
        let len = (rng.random_range(1..6000) * 512).min(bytes.len() - at);
        if rng.random_bool(0.6) {
            rng.fill(&mut bytes[at..at + len]);
        }
        at += len;
    }
    std::fs::write(path, bytes).unwrap();
}

/// Changes some sectors of a disk.
fn change(path: &Path, seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut bytes = std::fs::read(path).unwrap();
    for _ in 0..20 {
        let at = rng.random_range(0..bytes.len() / 512) * 512;
        let len = (rng.random_range(1..2000) * 512).min(bytes.len() - at);
        if rng.random_bool(0.7) {
            rng.fill(&mut bytes[at..at + len]);
        } else {
            bytes[at..at + len].fill(0);
        }
    }
    std::fs::write(path, bytes).unwrap();
}

fn agent(args: &[&str]) {
    qemu::run(Command::new("/usr/bin/python3").arg(AGENT).args(args));
}

/// After the agent has gone, whatever happens two seconds later, the image is complete.
#[test]
fn a_backup_is_safe_two_seconds_after_the_agent_closed_its_sockets() {
    const SIZE: u64 = (150 << 20) + 3 * 512;
    let setup = Setup::new();
    let (full, source) = (setup.image("full.qcow2", "", &SIZE.to_string()), setup.dir().join("source.raw"));
    disk(&source, SIZE, 1);
    setup.export("full", &full, "readonly = false\nmultifile = false\ncopyonwrite = false");
    let daemon = setup.start();
    agent(&["full", &daemon.tcp("full"), source.to_str().unwrap()]);
    std::thread::sleep(Duration::from_secs(2)); // the promise, not a measurement
    let dir = daemon.kill();
    qemu::check(&full);
    qemu::same_content(&full, &source);
    drop(dir);
}

#[test]
fn an_incremental_backup_holds_the_changes_only() {
    const SIZE: u64 = 64 << 20;
    let setup = Setup::new();
    let full = setup.image("full.qcow2", "", &SIZE.to_string());
    let (source, before) = (setup.dir().join("source.raw"), setup.dir().join("before.raw"));
    disk(&source, SIZE, 2);
    setup.export("full", &full, "");
    let daemon = setup.start();
    agent(&["full", &daemon.tcp("full"), source.to_str().unwrap()]);
    std::fs::copy(&source, &before).unwrap();
    let mut chain = vec![full];
    for round in 1..=3 {
        change(&source, 10 + round);
        let name = format!("incr{round}");
        let overlay = daemon.dir().join(format!("{name}.qcow2"));
        let below = chain.last().unwrap().to_str().unwrap();
        qemu::run(
            Command::new(env!("CARGO_BIN_EXE_cowgate"))
                .args(["image", "create", "--backing", below, "--backing-format", "qcow2"])
                .arg(&overlay),
        );
        daemon.add_export(&name, &overlay, "");
        agent(&["incremental", &daemon.tcp(&name), source.to_str().unwrap(), before.to_str().unwrap()]);
        std::fs::copy(&source, &before).unwrap();
        chain.push(overlay);
    }
    let (dir, _) = daemon.stop();
    for image in &chain {
        qemu::check(image);
    }
    let top = chain.last().unwrap();
    qemu::same_content(top, &source);
    let allocated = std::fs::metadata(top).unwrap().len();
    assert!(allocated < SIZE / 2, "the overlay holds {allocated} bytes: more than the changes");
    drop(dir);
}

/// Nobody who vanishes in the middle of a write takes what others wrote with it.
#[test]
fn an_agent_that_is_killed_loses_nothing_it_was_told_is_written() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "256M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
for i in range(40):
    h.pwrite(bytes([i + 1]) * (1 << 20), i * (3 << 20) + 512)
# half a request, then gone: sent by hand
raw = socket.socket(socket.AF_UNIX)
raw.connect(uri.split('socket=')[1])
def exactly(n):
    data = b''
    while len(data) < n:
        data += raw.recv(n - len(data))
    return data
exactly(18)
raw.sendall(struct.pack('>I', 3) + b'IHAVEOPT' + struct.pack('>II', 1, 4) + b'disk')
exactly(10)
raw.sendall(struct.pack('>IHHQQI', 0x25609513, 0, 1, 7, 0, 8 << 20) + b'x' * 100000)
os._exit(0)
"#,
    );
    daemon.wait_for("both connections to end", || daemon.log().contains("the last writer left"));
    let expect = daemon.dir().join("expect.raw");
    let mut bytes = vec![0u8; 256 << 20];
    for i in 0..40usize {
        bytes[i * (3 << 20) + 512..][..1 << 20].fill(i as u8 + 1);
    }
    std::fs::write(&expect, bytes).unwrap();
    let dir = daemon.kill();
    qemu::check(&image);
    qemu::same_content(&image, &expect);
    drop(dir);
}
