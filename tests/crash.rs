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

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// A raw backing file of this size.
    backing: Option<u64>,
    snapshot: bool,
    /// The image begins with compressed clusters.
    compressed: bool,
    /// Full clusters are written compressed.
    packs: bool,
}

const PLAIN: Case = Case {
    name: "64k",
    options: "cluster_size=65536",
    size: 2 << 20,
    backing: None,
    snapshot: false,
    compressed: false,
    packs: false,
};

const CASES: [Case; 17] = [
    PLAIN,
    Case { name: "512", options: "cluster_size=512", size: 1 << 20, ..PLAIN },
    Case { name: "512-refcount64", options: "cluster_size=512,refcount_bits=64", size: 3 << 20, ..PLAIN },
    Case { name: "overlay", options: "cluster_size=4096", size: 1 << 20, backing: Some(700 << 10), ..PLAIN },
    Case { name: "snapshot", options: "cluster_size=4096", size: 1 << 20, snapshot: true, ..PLAIN },
    Case {
        name: "snapshot-512-refcount2",
        options: "cluster_size=512,refcount_bits=2",
        size: 512 << 10,
        snapshot: true,
        ..PLAIN
    },
    Case { name: "compressed", options: "cluster_size=4096", size: 1 << 20, compressed: true, ..PLAIN },
    Case { name: "v2", options: "cluster_size=1024,compat=0.10", size: 768 << 10, ..PLAIN },
    Case { name: "subclusters", options: "cluster_size=16384,extended_l2=on", ..PLAIN },
    Case { name: "subclusters-64k", options: "cluster_size=65536,extended_l2=on", ..PLAIN },
    Case {
        name: "subclusters-overlay",
        options: "cluster_size=16384,extended_l2=on",
        size: 1 << 20,
        backing: Some(700 << 10),
        ..PLAIN
    },
    Case {
        name: "subclusters-snapshot",
        options: "cluster_size=16384,extended_l2=on",
        size: 1 << 20,
        snapshot: true,
        ..PLAIN
    },
    Case { name: "packs", options: "cluster_size=4096,compression_type=zstd", size: 1 << 20, packs: true, ..PLAIN },
    Case {
        name: "packs-again",
        options: "cluster_size=512,refcount_bits=8",
        size: 512 << 10,
        compressed: true,
        packs: true,
        snapshot: true,
        ..PLAIN
    },
    Case {
        name: "packs-subclusters",
        options: "cluster_size=16384,extended_l2=on",
        size: 1 << 20,
        packs: true,
        backing: Some(700 << 10),
        ..PLAIN
    },
    Case {
        name: "data-file",
        options: "cluster_size=4096,data_file=data",
        size: 1 << 20,
        backing: Some(500 << 10),
        ..PLAIN
    },
    Case {
        name: "raw-data-file",
        options: "cluster_size=4096,data_file=data,data_file_raw=on",
        size: 1 << 20,
        ..PLAIN
    },
];

/// The files of an image.
#[derive(Clone)]
struct Files {
    image: Vec<u8>,
    /// Its external data file.
    data: Option<Vec<u8>>,
    /// Its backing file.
    backing: Option<Vec<u8>>,
}

struct State {
    files: Files,
    parts: Vec<Part>,
}

/// Makes the image with QEMU; returns its files and the guest content.
fn make(case: &Case, seed: &mut Seed) -> (Files, Vec<u8>) {
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
        // QEMU looks for a data file without a directory where it runs, and stores its name as it is given
        create.current_dir(dir.path()).args(["create", "-q", "-f", "qcow2", "-o", case.options]);
        if let Some(backing) = &backing {
            std::fs::write(&raw, backing).unwrap();
            create.args(["-b", "raw", "-F", "raw"]);
            let seen = backing.len().min(content.len());
            content[..seen].copy_from_slice(&backing[..seen]);
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
    let data = std::fs::read(dir.path().join("data")).ok();
    (Files { image: std::fs::read(&path).unwrap(), data, backing }, content)
}

async fn task(disk: Rc<Disk>, parts: Parts, me: usize, mut seed: Seed, packs: bool) {
    const OPS: usize = 40;
    for _ in 0..OPS {
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
            0..25 if packs => {
                let short = noise(&mut seed, 40);
                let bytes: Vec<u8> = short.into_iter().cycle().take(len as usize).collect();
                note(bytes.clone());
                disk.write_compressed(GuestOffset(at), PageBuf::copy_of(&bytes)).await.0.unwrap();
            }
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

/// An image that is open, and the disks below it.
struct Opened {
    image: Arc<Image>,
    top: MemDisk,
    data: Option<MemDisk>,
}

async fn open(files: Files, seed: u64) -> Opened {
    let top = MemDisk::new(files.image, seed);
    let data = files.data.map(|bytes| MemDisk::new(bytes, seed ^ 1));
    let mut chain = vec![(top.clone(), Format::Qcow2)];
    chain.extend(files.backing.map(|b| (MemDisk::new(b, seed), Format::Raw)));
    let image = Image::in_memory_with_data(&chain, data.as_ref()).await.expect("the image opens");
    Opened { image: Arc::new(image), top, data }
}

/// Runs the tasks and collects crash states from every barrier on the way. Returns them with the image as it is at the
/// end, after everything was flushed.
async fn live(case: &Case, seed: u64, lie: bool) -> Vec<State> {
    let mut dice = Seed::new(seed);
    let (files, content) = make(case, &mut dice);
    let backing = files.backing.clone();
    let Opened { image, top, data } = open(files, seed).await;
    top.delay(6);
    if let Some(data) = &data {
        data.delay(6);
    }
    if lie {
        top.lie();
    }
    let parts: Parts = Arc::new(Mutex::new(cut_up(&content, TASKS, &mut dice)));
    let states = Arc::new(Mutex::new(Vec::new()));
    for disk in [Some(&top), data.as_ref()].into_iter().flatten() {
        let (parts, states, mut cuts) = (Arc::clone(&parts), Arc::clone(&states), Seed::new(dice.draw()));
        let (top, data, backing) = (top.clone(), data.clone(), backing.clone());
        disk.on_barrier(move |_| {
            for _ in 0..CUTS {
                let image = top.crash(&mut cuts);
                let data = data.as_ref().map(|data| data.crash(&mut cuts));
                let files = Files { image, data, backing: backing.clone() };
                states.lock().unwrap().push(State { files, parts: parts.lock().unwrap().clone() });
            }
        });
    }
    image.begin_writing().unwrap();
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    let count = parts.lock().unwrap().len();
    let mut tasks = Vec::new();
    for me in 0..count {
        let seed = Seed::new(dice.draw());
        tasks.push(task(Rc::clone(&disk), Arc::clone(&parts), me, seed, case.packs));
    }
    futures_util::future::join_all(tasks).await;
    let counts: Vec<usize> = parts.lock().unwrap().iter().map(|p| p.since.len()).collect();
    disk.settle().await.unwrap();
    for (part, count) in parts.lock().unwrap().iter_mut().zip(counts) {
        part.flushed(count);
    }
    let files = Files { image: top.content(), data: data.map(|data| data.content()), backing };
    let end = State { files, parts: parts.lock().unwrap().clone() };
    let mut states = std::mem::take(&mut *states.lock().unwrap());
    let stride = states.len().div_ceil(STATES).max(1);
    let mut index = 0;
    states.retain(|_| {
        index += 1;
        index % stride == 0
    });
    states.push(end);
    states
}

/// QEMU's verdict on an image: errors are a failure, leaks are not.
fn check(dir: &Path, files: &Files, leaks_allowed: bool) -> Result<(), String> {
    let path = dir.join("crashed.qcow2");
    std::fs::write(&path, &files.image).unwrap();
    for (name, content) in [("raw", &files.backing), ("data", &files.data)] {
        if let Some(content) = content {
            std::fs::write(dir.join(name), content).unwrap();
        }
    }
    let mut qemu_img = std::process::Command::new("qemu-img");
    // QEMU looks for a data file without a directory where it runs
    let out = qemu::output(qemu_img.current_dir(dir).args(["check", "-f", "qcow2"]).arg(&path));
    match out.status.code() {
        Some(0) => Ok(()),
        Some(3) if leaks_allowed => Ok(()),
        code => Err(format!("qemu-img check says {code:?}: {}{}", qemu::text(&out.stdout), qemu::text(&out.stderr))),
    }
}

/// Verifies one crash state: metadata by QEMU, content by reading it, and that it takes writes again.
async fn verify(dir: &Path, state: State) -> Result<(), String> {
    check(dir, &state.files, true)?;
    let backing = state.files.backing.clone();
    let Opened { image, top, data } = open(state.files, 1).await;
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
    let files = Files { image: top.content(), data: data.map(|data| data.content()), backing };
    check(dir, &files, true).map_err(|e| format!("after writing again: {e}"))
}

fn run_case(case: &Case, seed: u64, lie: bool) -> Result<(), String> {
    println!("case {} seed {seed}", case.name);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    ring::run(async {
        let mut states = live(case, seed, lie).await;
        let end = states.pop().expect("the end is a state");
        assert!(states.len() > 20, "only {} crash states", states.len());
        check(dir.path(), &end.files, false).map_err(|e| format!("at the end: {e}"))?;
        verify(dir.path(), end).await?;
        for (i, state) in states.into_iter().enumerate() {
            verify(dir.path(), state).await.map_err(|e| format!("crash state {i}: {e}"))?;
        }
        Ok(())
    })
    .unwrap()
}

fn run_named(name: &str) {
    let case = CASES.iter().find(|c| c.name == name).unwrap();
    let fixed = std::env::var("COWGATE_SEED").ok().map(|s| s.parse().expect("COWGATE_SEED is a number"));
    let rounds: usize = std::env::var("COWGATE_ROUNDS").map_or(1, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
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
    subclusters: "subclusters";
    subclusters_of_2k: "subclusters-64k";
    subclusters_overlay: "subclusters-overlay";
    subclusters_snapshot: "subclusters-snapshot";
    compressed_writing: "packs";
    compressed_writing_over_compressed: "packs-again";
    compressed_writing_with_subclusters: "packs-subclusters";
    data_file: "data-file";
    raw_data_file: "raw-data-file";
}

/// The control: a disk whose syncs do nothing must be caught, or the test proves nothing.
#[test]
fn a_lying_disk_is_caught() {
    let caught = (0..3).filter(|&seed| run_case(&CASES[1], seed, true).is_err()).count();
    assert_eq!(caught, 3);
}

/// Resizing moves the L1 table: a crash leaves the old disk or the new one, whole.
#[test]
fn resizing() {
    let cases = [
        Case { name: "512", options: "cluster_size=512", size: 1 << 20, ..PLAIN },
        Case {
            name: "512-overlay",
            options: "cluster_size=512,refcount_bits=64",
            size: 1 << 20,
            backing: Some(3 << 20),
            ..PLAIN
        },
        Case { name: "snapshot", options: "cluster_size=512", size: 1 << 20, snapshot: true, ..PLAIN },
        Case { name: "subclusters", options: "cluster_size=16384,extended_l2=on", size: 1 << 20, ..PLAIN },
    ];
    for case in cases {
        let seed = std::env::var("COWGATE_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
        println!("case {} seed {seed}", case.name);
        ring::run(resize_case(&case, seed)).unwrap();
    }
}

async fn resize_case(case: &Case, seed: u64) {
    let mut dice = Seed::new(seed);
    let (files, mut content) = make(case, &mut dice);
    let backing = files.backing.clone();
    let dir = tempfile::tempdir().unwrap();
    let mut image = files.image;
    let steps: [u64; 4] = [(2 << 20) + 512, 7 << 20, (5 << 20) + 1536, 600 << 10];
    for size in steps {
        let Opened { image: opened, top, .. } = open(Files { image, data: None, backing: backing.clone() }, seed).await;
        let states = Arc::new(Mutex::new(Vec::new()));
        opened.begin_writing().unwrap();
        let disk = Disk::open(Arc::clone(&opened), true).unwrap();
        let at = dice.below(content.len() as u64 - 70_000);
        let bytes = noise(&mut dice, 60_000);
        content[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        disk.write(GuestOffset(at), PageBuf::copy_of(&bytes)).await.0.unwrap();
        disk.settle().await.unwrap();
        let (kept, mut cuts) = (Arc::clone(&states), Seed::new(dice.draw()));
        top.on_barrier(move |top| {
            for _ in 0..CUTS * 3 {
                kept.lock().unwrap().push(top.crash(&mut cuts));
            }
        });
        cowgate::image::resize::resize_open(&disk, size, &|_, _| {}).await.unwrap();
        let old = content.clone();
        content.resize(size as usize, 0);
        let states = std::mem::take(&mut *states.lock().unwrap());
        assert!(!states.is_empty());
        for (i, image) in states.into_iter().chain([top.content()]).enumerate() {
            let files = Files { image, data: None, backing: backing.clone() };
            let what = format!("{} to {size}: crash state {i}", case.name);
            check(dir.path(), &files, true).unwrap_or_else(|e| panic!("{what}: {e}"));
            let image = open(files, 1).await.image;
            let disk = Disk::open(Arc::clone(&image), false).unwrap();
            let (read, found) = disk.read(GuestOffset(0), PageBuf::new(image.size() as usize)).await;
            read.unwrap();
            assert!(found[..] == old[..] || found[..] == content[..], "{what}: neither the old disk nor the new");
        }
        image = top.content();
    }
}
