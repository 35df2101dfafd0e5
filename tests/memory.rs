//! Memory and time have bounds that do not depend on the size of an image: 64 TiB open in a moment, and requests all over
//! an image take no more memory than `l2cache` allows.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use std::process::Command;

/// Processor time for opening an image, in milliseconds.
const OPEN_MS: u64 = 50;
/// What a test lets the process grow by beside cached tables, in KiB: the allocator's reserves, buffers in use.
const ALLOWANCE_KIB: u64 = 8 << 10;

/// Processor time of all threads so far, in milliseconds.
fn cpu_ms(daemon: &Daemon) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let time = |task: std::fs::DirEntry| -> u64 {
        let text = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().map_or(0, |ns| ns.parse().unwrap())
    };
    tasks.map(|task| time(task.unwrap())).sum::<u64>() / 1_000_000
}

/// Resident memory that is the daemon's own, in KiB.
fn memory_kib(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn an_image_of_64_tib_opens_in_a_moment() {
    let setup = Setup::new();
    let small = setup.image("small.qcow2", "", "1M");
    setup.export("small", &small, "");
    let options = ["", "extended_l2=on", "cluster_size=2M", "cluster_size=2M,refcount_bits=64,extended_l2=on"];
    for (i, options) in options.iter().enumerate() {
        let image = setup.image(&format!("{i}.qcow2"), options, "64T");
        setup.export(&i.to_string(), &image, "");
    }
    let daemon = setup.start();
    let program =
        "h.pread(512, 0)\nh.pread(512, h.get_size() - 512)\nh.pwrite(b'x' * 512, h.get_size() // 2)\nh.flush()";
    daemon.python("small", program); // what only the first client pays
    for (i, options) in options.iter().enumerate() {
        let before = cpu_ms(&daemon);
        daemon.python(&i.to_string(), program);
        let took = cpu_ms(&daemon) - before;
        println!("{options:?}: {took} ms");
        assert!(took < OPEN_MS, "opening and closing an image with {options:?} took {took} ms of processor time");
    }
    let (dir, _) = daemon.stop();
    qemu::check(&dir.path().join("0.qcow2"));
}

/// Touches every part of every L2 table of a big image; returns by how many KiB the daemon grew.
fn growth(export: &str, options: &str, program: &str) -> u64 {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", options, "256G");
    let warm = setup.image("warm.qcow2", "", "64M");
    setup.export("image", &image, export);
    setup.export("warm", &warm, "");
    let daemon = setup.start();
    let all = "import random\nplaces = list(range(0, h.get_size(), 32 << 20))\nrandom.Random(1).shuffle(places)\n";
    daemon.python("warm", &format!("{all}places *= 2000\nh.pwrite(b'x' * 512, 0)\n{}", program));
    let before = memory_kib(&daemon);
    let mut child = Command::new("/usr/bin/python3");
    let prelude = format!("import nbd, sys\nh = nbd.NBD()\nh.connect_uri({:?})\n", daemon.uri("image"));
    // measured while the client is there: the image is closed when it has gone
    let script = format!("{prelude}{all}{program}\nprint('done', flush=True)\nsys.stdin.read()\n");
    let child = child.args(["-c", &script]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    let mut said = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut said).unwrap();
    let after = memory_kib(&daemon);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success() && said == "done\n");
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("ERROR"), "{log}");
    qemu::check(&image);
    println!("{export:?} {options:?}: {after} KiB after {before} KiB");
    after.saturating_sub(before)
}

const READ: &str = "for at in places:\n    h.pread(512, at)\n";
const WRITE: &str = "for at in places[:2000]:\n    h.pwrite(b'x' * 512, at)\n";

#[test]
fn reads_all_over_an_image_stay_within_the_limit() {
    let grown = growth("l2cache = 1M", "preallocation=metadata", READ);
    assert!(grown < (1 << 10) + ALLOWANCE_KIB, "grew by {grown} KiB");
}

#[test]
fn writes_all_over_an_image_stay_within_the_limit() {
    let grown = growth("l2cache = 1M", "", WRITE);
    assert!(grown < (1 << 10) + ALLOWANCE_KIB, "grew by {grown} KiB");
}

/// The control: without the limit the same reads take more, and no more than the default.
#[test]
fn without_a_limit_tables_are_kept_up_to_32_mib() {
    let grown = growth("", "preallocation=metadata", READ);
    assert!(grown > (8 << 10) + ALLOWANCE_KIB, "grew by {grown} KiB only: the test would not notice");
    assert!(grown < (32 << 10) + 2 * ALLOWANCE_KIB, "grew by {grown} KiB");
}
