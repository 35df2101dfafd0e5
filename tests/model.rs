//! The image engine against a model in memory: thousands of reads, writes, zeroings and discards from several workers
//! at once on one image, across cluster sizes, refcount widths, chains, snapshots and compressed clusters. Afterwards
//! QEMU must find no fault in the image and read the same content.
//!
//! A failure prints its case and seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` runs more.

mod common;

use common::qemu;
use cowgate::block::{BlockDev, ZeroFlags};
use cowgate::image::{Disk, Format, Gate, Image, Opener};
use cowgate::pagebuf::PageBuf;
use cowgate::ring::{self, Workers};
use cowgate::units::{ByteRange, GuestOffset};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

const WORKERS: usize = 3;
const TASKS: usize = 8;

/// What the image is made of.
#[derive(Clone, Debug)]
struct Case {
    name: &'static str,
    /// Options for `qemu-img create -o`; DIR stands for the image's directory.
    options: &'static str,
    size: u64,
    /// Layers below: `raw`, or options of a QCOW2 image with its size in percent of the overlay's.
    backing: &'static [(&'static str, u64)],
    /// Fill the image through qemu-img and take a snapshot of it first.
    snapshot: bool,
    /// Start from a compressed image.
    compressed: bool,
    /// Write full clusters compressed, sometimes.
    packs: bool,
    /// Operations of each task in each phase.
    ops: usize,
}

const PLAIN: Case = Case {
    name: "64k",
    options: "cluster_size=65536",
    size: (24 << 20) + 512,
    backing: &[],
    snapshot: false,
    compressed: false,
    packs: false,
    ops: 120,
};

fn cases() -> Vec<Case> {
    vec![
        PLAIN,
        Case { name: "512", options: "cluster_size=512", size: 3 << 20, ..PLAIN },
        Case { name: "512-refcount64", options: "cluster_size=512,refcount_bits=64", size: 4 << 20, ..PLAIN },
        Case { name: "1k-refcount1", options: "cluster_size=1024,refcount_bits=1", size: 3 << 20, ..PLAIN },
        Case { name: "4k-refcount2", options: "cluster_size=4096,refcount_bits=2", size: 9 << 20, ..PLAIN },
        Case { name: "16k-refcount8-v3", options: "cluster_size=16384,refcount_bits=8", size: 20 << 20, ..PLAIN },
        Case { name: "2m", options: "cluster_size=2097152", size: (41 << 20) + 4096, ops: 60, ..PLAIN },
        Case { name: "v2", options: "compat=0.10,cluster_size=65536", size: 12 << 20, ..PLAIN },
        Case {
            name: "v2-on-raw",
            options: "compat=0.10,cluster_size=4096",
            size: 6 << 20,
            backing: &[("raw", 60)],
            ..PLAIN
        },
        Case { name: "on-short-raw", backing: &[("raw", 37)], ..PLAIN },
        Case { name: "on-long-qcow2-on-raw", backing: &[("cluster_size=4096", 130), ("raw", 90)], ..PLAIN },
        Case {
            name: "deep-chain",
            options: "cluster_size=4096",
            size: 6 << 20,
            backing: &[("cluster_size=65536", 50), ("cluster_size=512,compat=0.10", 110), ("raw", 70)],
            ..PLAIN
        },
        Case { name: "snapshot", options: "cluster_size=65536", snapshot: true, ..PLAIN },
        Case { name: "snapshot-4k", options: "cluster_size=4096", size: 7 << 20, snapshot: true, ..PLAIN },
        Case { name: "snapshot-v2", options: "cluster_size=512,compat=0.10", size: 2 << 20, snapshot: true, ..PLAIN },
        Case { name: "compressed-zlib", compressed: true, size: 16 << 20, ..PLAIN },
        Case {
            name: "compressed-zstd-4k",
            options: "cluster_size=4096,compression_type=zstd",
            size: 5 << 20,
            compressed: true,
            ..PLAIN
        },
        Case {
            name: "compressed-snapshot",
            options: "cluster_size=65536",
            size: 8 << 20,
            snapshot: true,
            compressed: true,
            ..PLAIN
        },
        Case { name: "subclusters-16k", options: "cluster_size=16384,extended_l2=on", size: 9 << 20, ..PLAIN },
        Case {
            name: "subclusters-2m",
            options: "cluster_size=2097152,extended_l2=on",
            size: 23 << 20,
            ops: 60,
            ..PLAIN
        },
        Case {
            name: "subclusters-on-short-raw",
            options: "cluster_size=65536,extended_l2=on",
            size: 12 << 20,
            backing: &[("raw", 37)],
            ..PLAIN
        },
        Case {
            name: "subclusters-on-subclusters",
            options: "cluster_size=16384,extended_l2=on",
            size: 8 << 20,
            backing: &[("cluster_size=65536,extended_l2=on", 120), ("raw", 60)],
            ..PLAIN
        },
        Case {
            name: "subclusters-snapshot",
            options: "cluster_size=65536,extended_l2=on",
            size: 12 << 20,
            snapshot: true,
            ..PLAIN
        },
        Case {
            name: "subclusters-compressed",
            options: "cluster_size=16384,extended_l2=on",
            size: 8 << 20,
            compressed: true,
            packs: true,
            ..PLAIN
        },
        Case { name: "packs", options: "compression_type=zstd", size: 12 << 20, packs: true, ..PLAIN },
        Case { name: "packs-512", options: "cluster_size=512", size: 2 << 20, packs: true, ..PLAIN },
        Case {
            name: "packs-refcount1",
            options: "cluster_size=4096,refcount_bits=1",
            size: 4 << 20,
            packs: true,
            compressed: true,
            ..PLAIN
        },
        Case {
            name: "packs-snapshot",
            options: "cluster_size=4096",
            size: 4 << 20,
            packs: true,
            compressed: true,
            snapshot: true,
            backing: &[],
            ..PLAIN
        },
        Case {
            name: "data-file",
            options: "cluster_size=4096,data_file=DIR/data",
            size: 8 << 20,
            backing: &[("raw", 70)],
            ..PLAIN
        },
        Case {
            name: "data-file-subclusters",
            options: "cluster_size=65536,extended_l2=on,data_file=DIR/data",
            size: 8 << 20,
            ..PLAIN
        },
        Case { name: "raw-data-file", options: "data_file=DIR/data,data_file_raw=on", size: 8 << 20, ..PLAIN },
        Case { name: "preallocated", options: "cluster_size=65536,preallocation=metadata", size: 8 << 20, ..PLAIN },
    ]
}

/// Content that compresses and differs from place to place.
fn pattern(rng: &mut SmallRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0u8; len];
    for sector in bytes.chunks_mut(512) {
        match rng.random_range(0..4) {
            0 => {}
            1 => sector.fill(rng.random()),
            _ => sector.iter_mut().enumerate().for_each(|(i, b)| *b = (i as u8).wrapping_mul(3) ^ rng.random::<u8>()),
        }
    }
    bytes
}

/// Makes the image of a case; returns its path and the content a guest sees.
fn make(case: &Case, dir: &Path, rng: &mut SmallRng) -> (PathBuf, Vec<u8>) {
    let mut below: Option<(PathBuf, &str, Vec<u8>)> = None;
    for (i, &(kind, percent)) in case.backing.iter().enumerate().rev() {
        let size = case.size * percent / 100 / 512 * 512;
        let format = if kind == "raw" { "raw" } else { "qcow2" };
        let path = dir.join(format!("layer{i}.{format}"));
        let content = if kind == "raw" {
            let content = pattern(rng, size as usize);
            std::fs::write(&path, &content).unwrap();
            content
        } else {
            fill_layer(&path, kind, size, below.as_ref(), rng)
        };
        below = Some((path, format, content));
    }
    let path = dir.join("image.qcow2");
    let content = if case.compressed {
        let content = pattern(rng, case.size as usize);
        let raw = dir.join("source.raw");
        std::fs::write(&raw, &content).unwrap();
        qemu::qemu_img(&format!("convert -c -f raw -O qcow2 -o {}", case.options), &[&raw, &path]);
        content
    } else {
        fill_layer(&path, case.options, case.size, below.as_ref(), rng)
    };
    if case.snapshot {
        qemu::qemu_img("snapshot -c before", &[&path]);
    }
    (path, content)
}

/// Creates a QCOW2 layer and writes some of it through qemu-io.
fn fill_layer(
    path: &Path,
    options: &str,
    size: u64,
    below: Option<&(PathBuf, &str, Vec<u8>)>,
    rng: &mut SmallRng,
) -> Vec<u8> {
    let mut create = std::process::Command::new("qemu-img");
    let options = options.replace("DIR", &path.parent().expect("a directory").display().to_string());
    create.args(["create", "-q", "-f", "qcow2", "-o", &options]);
    let mut content = vec![0; size as usize];
    if let Some((backing, format, below)) = below {
        create.arg("-b").arg(backing).args(["-F", format]);
        let shared = below.len().min(content.len());
        content[..shared].copy_from_slice(&below[..shared]);
    }
    qemu::run(create.arg(path).arg(size.to_string()));
    let mut io = std::process::Command::new("qemu-io");
    io.args(["-f", "qcow2"]);
    for _ in 0..12 {
        let at = rng.random_range(0..size / 512) * 512;
        let len = (rng.random_range(1..200u64) * 512).min(size - at);
        if rng.random_bool(0.2) {
            io.args(["-c", &format!("write -z {at} {len}")]);
            content[at as usize..(at + len) as usize].fill(0);
        } else {
            let byte: u8 = rng.random();
            io.args(["-c", &format!("write -P {byte} {at} {len}")]);
            content[at as usize..(at + len) as usize].fill(byte);
        }
    }
    qemu::run(io.arg(path));
    content
}

/// One task's part of the disk: ranges nobody else touches, at borders that ignore clusters.
#[derive(Clone)]
struct Part {
    ranges: Vec<(u64, Vec<u8>)>,
}

fn cut(content: &[u8], rng: &mut SmallRng) -> Vec<Part> {
    let mut parts = vec![Part { ranges: Vec::new() }; TASKS];
    let mut at = 0usize;
    while at < content.len() {
        let longest = if rng.random_bool(0.1) { 3 << 20 } else { 48 << 10 };
        // mostly sectors, sometimes any byte
        let unit = if rng.random_bool(0.8) { 512 } else { 1 };
        let len = (rng.random_range(1..=longest / unit) * unit).min(content.len() - at);
        let owner = rng.random_range(0..TASKS);
        parts[owner].ranges.push((at as u64, content[at..at + len].to_vec()));
        at += len;
    }
    parts
}

fn joined(parts: &[Part], size: usize) -> Vec<u8> {
    let mut content = vec![0; size];
    for (at, bytes) in parts.iter().flat_map(|p| &p.ranges) {
        content[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
    }
    content
}

async fn read(disk: &Disk, at: u64, len: usize) -> PageBuf {
    let (result, buf) = disk.read(GuestOffset(at), PageBuf::new(len)).await;
    result.unwrap_or_else(|e| panic!("read {len} at {at}: {e}"));
    buf
}

/// One random operation on bytes that belong to the caller.
async fn operate(disk: &Disk, start: u64, bytes: &mut [u8], packs: bool, rng: &mut SmallRng) {
    let from = rng.random_range(0..bytes.len());
    let longest = bytes.len() - from;
    let len = if rng.random_bool(0.3) { longest } else { rng.random_range(1..=longest) };
    let model = &mut bytes[from..from + len];
    let at = start + from as u64;
    let range = ByteRange::between(at, at + len as u64);
    match rng.random_range(0..100) {
        0..30 => assert!(read(disk, at, len).await[..] == *model, "read {len} at {at} differs"),
        30..70 => {
            let data = pattern(rng, len);
            let buf = PageBuf::copy_of(&data);
            let (result, back) = match packs && rng.random_bool(0.6) {
                true => disk.write_compressed(GuestOffset(at), buf).await,
                false => disk.write(GuestOffset(at), buf).await,
            };
            result.unwrap_or_else(|e| panic!("write {len} at {at}: {e}"));
            assert!(back[..] == data[..], "a write gives its buffer back as it was");
            model.copy_from_slice(&data);
        }
        70..85 => {
            let flags =
                ZeroFlags { may_unmap: rng.random_bool(0.6), fast: rng.random_bool(0.3), sparse: rng.random_bool(0.3) };
            match disk.write_zeroes(range, flags).await {
                Ok(()) => model.fill(0),
                Err(e) => assert!(flags.fast && e == cowgate::block::Errno::ENOTSUP, "zero {len} at {at}: {e}"),
            }
        }
        85..93 => {
            disk.discard(range).await.unwrap();
            let now = read(disk, at, len).await;
            for (m, n) in model.iter_mut().zip(now.iter()) {
                assert!(*n == *m || *n == 0, "discarded bytes are zero or as before");
                *m = *n;
            }
        }
        93..97 => {
            let extents = disk.extents(range, usize::MAX).await.unwrap();
            let mut pos = 0;
            for e in extents {
                assert!(!e.zero || model[pos..pos + e.len as usize].iter().all(|&b| b == 0), "zero extent holds data");
                pos += e.len as usize;
            }
            assert!(pos > 0 && pos <= len);
        }
        _ => disk.flush().await.unwrap(),
    }
}

async fn task(disk: std::rc::Rc<Disk>, mut part: Part, seed: u64, packs: bool, ops: usize) -> Part {
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..ops {
        if part.ranges.is_empty() {
            break;
        }
        let i = rng.random_range(0..part.ranges.len());
        let (start, bytes) = &mut part.ranges[i];
        operate(&disk, *start, bytes, packs, &mut rng).await;
    }
    part
}

/// Runs every part as a task of its own, spread over the workers.
fn all_at_once(
    workers: &Workers,
    image: &Arc<Image>,
    parts: Vec<Part>,
    seed: u64,
    packs: bool,
    ops: usize,
) -> Vec<Part> {
    let (done, finished) = mpsc::channel();
    let count = parts.len();
    for (i, part) in parts.into_iter().enumerate() {
        let (image, done) = (Arc::clone(image), done.clone());
        workers.run_on(
            i % workers.count(),
            Box::new(move || {
                ring::spawn(async move {
                    let disk = Disk::open(image, true).unwrap();
                    let part = task(disk, part, seed ^ (i as u64) << 32, packs, ops).await;
                    done.send((i, part)).unwrap();
                });
            }),
        );
    }
    drop(done);
    let mut parts: Vec<(usize, Part)> = finished.iter().collect();
    assert_eq!(parts.len(), count, "a task died: see its panic above");
    parts.sort_by_key(|(i, _)| *i);
    parts.into_iter().map(|(_, part)| part).collect()
}

fn run_case(case: &Case, seed: u64) {
    println!("case {} seed {seed}", case.name);
    let mut rng = SmallRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let (path, mut content) = make(case, dir.path(), &mut rng);
    let before = case.snapshot.then(|| content.clone());
    let workers = Workers::start(WORKERS).unwrap();
    for phase in 0..3u64 {
        let image = ring::run(async { Opener::new(&path).unwrap().open(Format::Qcow2, &Gate::default()).await });
        let image = Arc::new(image.unwrap().unwrap());
        assert_eq!(image.size(), content.len() as u64);
        image.begin_writing().unwrap();
        let parts = cut(&content, &mut rng);
        let parts = all_at_once(&workers, &image, parts, seed ^ phase << 16, case.packs, case.ops);
        content = joined(&parts, content.len());
        // one task alone: operations across everything
        let whole = vec![Part { ranges: vec![(0, content)] }];
        let whole = all_at_once(&workers, &image, whole, seed ^ phase << 17, case.packs, 12);
        content = joined(&whole, whole[0].ranges[0].1.len());
        let all = content.clone();
        let reader = Arc::clone(&image);
        ring::run(async move {
            let disk = Disk::open(reader, true).unwrap();
            assert!(read(&disk, 0, all.len()).await[..] == all[..], "the whole disk differs from the model");
            disk.settle().await.unwrap();
        })
        .unwrap();
        image.writer_left();
        image.end_writing();
        drop(image);
        let raw = dir.path().join("model.raw");
        std::fs::write(&raw, &content).unwrap();
        qemu::check(&path);
        qemu::same_content(&path, &raw);
        if case.options.contains("data_file_raw") {
            qemu::qemu_img("compare -f raw -F raw", &[&dir.path().join("data"), &raw]);
        }
    }
    if let Some(before) = before {
        let raw = dir.path().join("before.raw");
        qemu::qemu_img("convert -f qcow2 -O raw -l before", &[&path, &raw]);
        assert!(std::fs::read(&raw).unwrap() == before, "the snapshot changed");
    }
    workers.stop();
}

fn run_named(names: &[&str]) {
    let fixed = std::env::var("COWGATE_SEED").ok().map(|s| s.parse().expect("COWGATE_SEED is a number"));
    let rounds = std::env::var("COWGATE_ROUNDS").map_or(1, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    for case in cases().iter().filter(|c| names.contains(&c.name)) {
        for _ in 0..rounds {
            run_case(case, fixed.unwrap_or_else(rand::random));
        }
    }
}

macro_rules! cases {
    ($($test:ident: $($name:literal),+;)+) => {
        $(#[test] fn $test() { run_named(&[$($name),+]); })+

        #[test]
        fn every_case_has_its_test() {
            let tested = [$($($name),+),+];
            assert!(cases().iter().all(|c| tested.contains(&c.name)));
            assert!(tested.iter().all(|t| cases().iter().any(|c| c.name == *t)));
        }
    };
}

cases! {
    ordinary_clusters: "64k", "16k-refcount8-v3";
    tiny_clusters: "512", "512-refcount64", "1k-refcount1";
    small_clusters: "4k-refcount2";
    huge_clusters: "2m";
    version_2: "v2", "v2-on-raw";
    short_backing: "on-short-raw";
    long_backing: "on-long-qcow2-on-raw";
    deep_chain: "deep-chain";
    snapshots: "snapshot", "snapshot-4k", "snapshot-v2";
    compressed: "compressed-zlib", "compressed-zstd-4k";
    compressed_snapshot: "compressed-snapshot";
    preallocated: "preallocated";
    subclusters: "subclusters-16k", "subclusters-2m";
    subclusters_in_chains: "subclusters-on-short-raw", "subclusters-on-subclusters";
    subclusters_with_snapshots_and_compressed: "subclusters-snapshot", "subclusters-compressed";
    compressed_writing: "packs", "packs-512", "packs-refcount1", "packs-snapshot";
    data_files: "data-file", "data-file-subclusters", "raw-data-file";
}
