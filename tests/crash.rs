//! Power failures: the image engine works on a disk in memory that is cut at every barrier, with any part of what was
//! not yet durable kept, in any order, torn at sectors. Each remaining image must pass `qemu-img check` without errors
//! (leaked clusters are allowed), hold everything that was flushed, never show bytes that nobody wrote there, and take
//! writes again.
//!
//! A failure prints its case and seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` runs more.

mod common;

use common::parts::{Part, Parts, cut_up, noise};
use common::qemu;
use cowgate::block::{BlockDev, ZeroFlags};
use cowgate::image::{Disk, Format, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::ring;
use cowgate::ring::mem::{MemDisk, Seed};
use cowgate::units::{ByteRange, GuestOffset};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

const TASKS: usize = 4;
/// Crash states looked at for each barrier.
const CUTS: usize = 2;
/// Crash states verified per run: the rest are passed over evenly.
const STATES: usize = 120;

struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// A raw backing file of this size.
    backing: Option<u64>,
    snapshot: bool,
    compressed: bool,
}

const CASES: [Case; 8] = [
    Case {
        name: "64k",
        options: "cluster_size=65536",
        size: 2 << 20,
        backing: None,
        snapshot: false,
        compressed: false,
    },
    Case { name: "512", options: "cluster_size=512", size: 1 << 20, backing: None, snapshot: false, compressed: false },
    Case {
        name: "512-refcount64",
        options: "cluster_size=512,refcount_bits=64",
        size: 3 << 20,
        backing: None,
        snapshot: false,
        compressed: false,
    },
    Case {
        name: "overlay",
        options: "cluster_size=4096",
        size: 1 << 20,
        backing: Some(700 << 10),
        snapshot: false,
        compressed: false,
    },
    Case {
        name: "snapshot",
        options: "cluster_size=4096",
        size: 1 << 20,
        backing: None,
        snapshot: true,
        compressed: false,
    },
    Case {
        name: "snapshot-512-refcount2",
        options: "cluster_size=512,refcount_bits=2",
        size: 512 << 10,
        backing: None,
        snapshot: true,
        compressed: false,
    },
    Case {
        name: "compressed",
        options: "cluster_size=4096",
        size: 1 << 20,
        backing: None,
        snapshot: false,
        compressed: true,
    },
    Case {
        name: "v2",
        options: "cluster_size=1024,compat=0.10",
        size: 768 << 10,
        backing: None,
        snapshot: false,
        compressed: false,
    },
];

struct State {
    image: Vec<u8>,
    parts: Vec<Part>,
}

/// Makes the image with QEMU; returns its bytes, its backing file's bytes and the guest content.
fn make(case: &Case, seed: &mut Seed) -> (Vec<u8>, Option<Vec<u8>>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("image.qcow2"), dir.path().join("raw"));
    let mut content = vec![0; case.size as usize];
    let backing = case.backing.map(|len| noise(seed, len as usize));
    if case.compressed {
        content = (0..case.size).map(|i| (i >> 9) as u8 | 1).collect();
        std::fs::write(&raw, &content).unwrap();
        qemu::qemu_img(&format!("convert -c -f raw -O qcow2 -o {}", case.options), &[&raw, &path]);
    } else {
        let mut create = std::process::Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", case.options]);
        if let Some(backing) = &backing {
            std::fs::write(&raw, backing).unwrap();
            create.args(["-b", "raw", "-F", "raw"]);
            content[..backing.len()].copy_from_slice(backing);
        }
        qemu::run(create.arg(&path).arg(case.size.to_string()));
    }
    if case.snapshot {
        let len = case.size / 2;
        let write = format!("write -P 99 0 {len}");
        qemu::run(std::process::Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(&path));
        content[..len as usize].fill(99);
        qemu::qemu_img("snapshot -c one", &[&path]);
    }
    (std::fs::read(&path).unwrap(), backing, content)
}

async fn task(disk: Rc<Disk>, parts: Parts, me: usize, mut seed: Seed, ops: usize) {
    for _ in 0..ops {
        let (start, len) = {
            let parts = parts.lock().unwrap();
            (parts[me].start, parts[me].stable.len() as u64)
        };
        let from = seed.below(len);
        let longest = (len - from).min(if seed.chance(20) { 200 << 10 } else { 9000 });
        let len = seed.below(longest) + 1;
        let at = start + from;
        let range = ByteRange::between(at, at + len);
        let note = |bytes| parts.lock().unwrap()[me].note(from as usize, bytes);
        match seed.below(100) {
            0..55 => {
                let bytes = noise(&mut seed, len as usize);
                note(bytes.clone());
                disk.write(GuestOffset(at), PageBuf::copy_of(&bytes)).await.0.unwrap();
            }
            55..75 => {
                note(vec![0; len as usize]);
                let flags = ZeroFlags { may_unmap: seed.chance(60), sparse: seed.chance(30), fast: false };
                disk.write_zeroes(range, flags).await.unwrap();
            }
            75..85 => {
                // zeroes or unchanged: what it is now is learned by reading, and allowed from here on
                note(vec![0; len as usize]);
                disk.discard(range).await.unwrap();
                let (read, now) = disk.read(GuestOffset(at), PageBuf::new(len as usize)).await;
                read.unwrap();
                note(now.to_vec());
            }
            _ => {
                let covered = parts.lock().unwrap()[me].since.len();
                disk.flush().await.unwrap();
                parts.lock().unwrap()[me].flushed(covered);
            }
        }
    }
}

async fn open(image: Vec<u8>, backing: &Option<Vec<u8>>, seed: u64) -> (MemDisk, Arc<Image>) {
    let top = MemDisk::new(image, seed);
    let mut chain = vec![(top.clone(), Format::Qcow2)];
    chain.extend(backing.clone().map(|b| (MemDisk::new(b, seed), Format::Raw)));
    (top, Arc::new(Image::in_memory(&chain).await.expect("the image opens")))
}

/// Runs the tasks and collects crash states from every barrier on the way. Returns them with the image as it is at the
/// end, after everything was flushed.
async fn live(case: &Case, seed: u64, lie: bool) -> (Vec<State>, Option<Vec<u8>>) {
    let mut dice = Seed::new(seed);
    let (image, backing, content) = make(case, &mut dice);
    let (top, image) = open(image, &backing, seed).await;
    top.delay(6);
    if lie {
        top.lie();
    }
    let parts: Parts = Arc::new(Mutex::new(cut_up(&content, TASKS, &mut dice)));
    let states = Arc::new(Mutex::new(Vec::new()));
    let (hook_parts, hook_states, mut cuts) = (Arc::clone(&parts), Arc::clone(&states), Seed::new(seed ^ 0xc0ffee));
    top.on_barrier(move |disk| {
        for _ in 0..CUTS {
            let parts = hook_parts.lock().unwrap().clone();
            hook_states.lock().unwrap().push(State { image: disk.crash(&mut cuts), parts });
        }
    });
    image.begin_writing().unwrap();
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    let count = parts.lock().unwrap().len();
    let mut tasks = Vec::new();
    for me in 0..count {
        let seed = Seed::new(dice.draw());
        tasks.push(task(Rc::clone(&disk), Arc::clone(&parts), me, seed, 40));
    }
    futures_util::future::join_all(tasks).await;
    let counts: Vec<usize> = parts.lock().unwrap().iter().map(|p| p.since.len()).collect();
    disk.settle().await.unwrap();
    for (part, count) in parts.lock().unwrap().iter_mut().zip(counts) {
        part.flushed(count);
    }
    let end = State { image: top.content(), parts: parts.lock().unwrap().clone() };
    let mut states = std::mem::take(&mut *states.lock().unwrap());
    let stride = states.len().div_ceil(STATES).max(1);
    let mut index = 0;
    states.retain(|_| {
        index += 1;
        index % stride == 0
    });
    states.push(end);
    (states, backing)
}

/// QEMU's verdict on an image: errors are a failure, leaks are not.
fn check(dir: &Path, image: &[u8], backing: &Option<Vec<u8>>, leaks_allowed: bool) -> Result<(), String> {
    let path = dir.join("crashed.qcow2");
    std::fs::write(&path, image).unwrap();
    if let Some(backing) = backing {
        std::fs::write(dir.join("raw"), backing).unwrap();
    }
    let out = qemu::output(std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path));
    match out.status.code() {
        Some(0) => Ok(()),
        Some(3) if leaks_allowed => Ok(()),
        code => Err(format!("qemu-img check says {code:?}: {}{}", qemu::text(&out.stdout), qemu::text(&out.stderr))),
    }
}

/// Verifies one crash state: metadata by QEMU, content by reading it, and that it takes writes again.
async fn verify(dir: &Path, state: State, backing: &Option<Vec<u8>>) -> Result<(), String> {
    check(dir, &state.image, backing, true)?;
    let (top, image) = open(state.image, backing, 1).await;
    image.begin_writing().map_err(|e| e.to_string())?;
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    for part in &state.parts {
        let (read, found) = disk.read(GuestOffset(part.start), PageBuf::new(part.stable.len())).await;
        read.map_err(|e| format!("read: {e}"))?;
        part.allows(&found)?;
    }
    let buf = PageBuf::zeroed(image.size() as usize / 3);
    disk.write(GuestOffset(image.size() / 3 + 100), buf).await.0.map_err(|e| format!("write after the crash: {e}"))?;
    disk.settle().await.map_err(|e| format!("flush after the crash: {e}"))?;
    check(dir, &top.content(), backing, true).map_err(|e| format!("after writing again: {e}"))
}

fn run_case(case: &Case, seed: u64, lie: bool) -> Result<(), String> {
    println!("case {} seed {seed}", case.name);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    ring::run(async {
        let (mut states, backing) = live(case, seed, lie).await;
        let end = states.pop().expect("the end is a state");
        assert!(states.len() > 20, "only {} crash states", states.len());
        check(dir.path(), &end.image, &backing, false).map_err(|e| format!("at the end: {e}"))?;
        verify(dir.path(), end, &backing).await?;
        for (i, state) in states.into_iter().enumerate() {
            verify(dir.path(), state, &backing).await.map_err(|e| format!("crash state {i}: {e}"))?;
        }
        Ok(())
    })
    .unwrap()
}

fn run_named(name: &str) {
    let case = CASES.iter().find(|c| c.name == name).unwrap();
    let fixed = std::env::var("COWGATE_SEED").ok().map(|s| s.parse().expect("COWGATE_SEED is a number"));
    let rounds: usize = std::env::var("COWGATE_ROUNDS").map_or(2, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    for _ in 0..rounds {
        let seed = fixed.unwrap_or_else(rand::random);
        run_case(case, seed, false).unwrap_or_else(|e| panic!("case {name} seed {seed}: {e}"));
    }
}

macro_rules! cases {
    ($($test:ident: $name:literal;)+) => {
        $(#[test] fn $test() { run_named($name); })+
    };
}

cases! {
    ordinary_clusters: "64k";
    tiny_clusters: "512";
    growing_refcounts: "512-refcount64";
    overlay: "overlay";
    snapshot: "snapshot";
    snapshot_narrow_refcounts: "snapshot-512-refcount2";
    compressed: "compressed";
    version_2: "v2";
}

/// The control: a disk whose syncs do nothing must be caught, or the test proves nothing.
#[test]
fn a_lying_disk_is_caught() {
    let caught = (0..3).filter(|&seed| run_case(&CASES[1], seed, true).is_err()).count();
    assert_eq!(caught, 3);
}
