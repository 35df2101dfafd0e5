//! `cowgate image check` beside `qemu-img check`: the same verdict on images of every kind, sound and damaged; what it
//! repairs is sound for QEMU, holds what it held before, and survives a power failure at any moment of the repair.
//!
//! A failure prints its seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` damages more copies.

mod common;

use common::holder::Holder;
use common::qemu;
use cowgate::image::check::Subject;
use cowgate::image::repair::Scope;
use cowgate::ring;
use cowgate::ring::mem::{MemDisk, Seed};
use serde_json::Value;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

const MEMORY: u64 = 64 << 20;

fn ours(arguments: &str, image: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    qemu::output(command.args(["image", "check"]).args(arguments.split_whitespace()).arg(image))
}

fn theirs(arguments: &str, image: &Path) -> Output {
    qemu::output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).args(arguments.split_whitespace()).arg(image))
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("it was not killed")
}

fn told(output: &Output) -> String {
    format!("{}{}", qemu::text(&output.stdout), qemu::text(&output.stderr))
}

/// A directory that is quick to write.
fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn io(image: &Path, commands: &[&str]) {
    let mut io = Command::new("qemu-io");
    io.args(["-f", "qcow2"]);
    for command in commands {
        io.args(["-c", command]);
    }
    qemu::run(io.arg(image));
}

/// Kinds of images: a name, options for `qemu-img create`, what happens then.
const KINDS: [(&str, &str, &[Step]); 22] = [
    ("empty", "", &[]),
    ("plain", "", &[Step::Write]),
    ("clusters-512", "cluster_size=512", &[Step::Write]),
    ("clusters-4k", "cluster_size=4k", &[Step::Write]),
    ("clusters-2m", "cluster_size=2M", &[Step::Write]),
    ("refcounts-1", "refcount_bits=1", &[Step::Write]),
    ("refcounts-2", "refcount_bits=2,cluster_size=512", &[Step::Write, Step::Snapshot, Step::Overwrite]),
    ("refcounts-8", "refcount_bits=8,cluster_size=1k", &[Step::Write, Step::Snapshot, Step::Overwrite]),
    ("refcounts-32", "refcount_bits=32", &[Step::Write]),
    ("refcounts-64", "refcount_bits=64,cluster_size=512", &[Step::Write, Step::Snapshot]),
    ("version-2", "compat=0.10", &[Step::Write, Step::Snapshot, Step::Overwrite]),
    ("snapshots", "", &[Step::Write, Step::Snapshot, Step::Overwrite, Step::Snapshot, Step::Overwrite]),
    ("extended", "extended_l2=on", &[Step::Write, Step::Snapshot, Step::Overwrite]),
    ("extended-16k", "extended_l2=on,cluster_size=16k", &[Step::Write]),
    ("bitmaps", "cluster_size=4k", &[Step::Write, Step::Bitmaps, Step::Overwrite]),
    ("lazy", "lazy_refcounts=on", &[Step::Write]),
    ("metadata", "preallocation=metadata", &[Step::Overwrite]),
    ("full", "preallocation=full,cluster_size=4k", &[]),
    ("data-file", "data_file=DIR/data-file.raw", &[Step::Write]),
    ("data-file-raw", "data_file=DIR/data-file-raw.raw,data_file_raw=on", &[Step::Write]),
    ("zlib", "", &[Step::Compress, Step::Overwrite]),
    ("zstd", "compression_type=zstd,cluster_size=4k", &[Step::Compress, Step::Snapshot, Step::Overwrite]),
];

#[derive(Clone, Copy)]
enum Step {
    Write,
    Overwrite,
    Snapshot,
    Bitmaps,
    Compress,
}

fn make(dir: &Path, name: &str, options: &str, steps: &[Step]) -> PathBuf {
    let path = dir.join(format!("{name}.qcow2"));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]);
    if !options.is_empty() {
        create.args(["-o", &options.replace("DIR", &dir.display().to_string())]);
    }
    qemu::run(create.arg(&path).arg("8M"));
    for (number, step) in steps.iter().enumerate() {
        match step {
            Step::Write => io(&path, &["write -P 1 0 700k", "write -P 2 6M 64k", "write -P 3 3M 9k", "write -z 5M 1M"]),
            Step::Overwrite => io(&path, &["write -P 4 100k 300k", "write -P 5 7M 10k", "discard 3M 64k"]),
            Step::Snapshot => drop(qemu::qemu_img(&format!("snapshot -c s{number}"), &[&path])),
            Step::Bitmaps => {
                for bitmap in ["--add -g 4k", "--add -g 64k --disable"] {
                    let name = format!("b{}", bitmap.len());
                    let mut add = Command::new("qemu-img");
                    qemu::run(add.arg("bitmap").args(bitmap.split_whitespace()).arg(&path).arg(name));
                }
            }
            Step::Compress => {
                let raw = dir.join("content.raw");
                let content: Vec<u8> = (0..8u32 << 20).map(|i| if i < 3 << 20 { (i >> 9) as u8 } else { 0 }).collect();
                std::fs::write(&raw, content).unwrap();
                let options = if options.is_empty() { "compat=1.1" } else { options };
                qemu::qemu_img(&format!("convert -c -f raw -O qcow2 -o {options}"), &[&raw, &path]);
            }
        }
    }
    path
}

fn zoo(dir: &Path) -> Vec<PathBuf> {
    let mut images: Vec<PathBuf> = KINDS.iter().map(|(name, options, steps)| make(dir, name, options, steps)).collect();
    let overlay = dir.join("overlay.qcow2");
    qemu::qemu_img("create -q -f qcow2 -F qcow2 -b plain.qcow2", &[&overlay]);
    io(&overlay, &["write -P 9 50k 200k", "write -z 0 20k"]);
    images.push(overlay);
    images
}

/// The same verdict in exit status and, value by value, in JSON.
#[track_caller]
fn same_report(image: &Path) {
    let (our, their) = (ours("--json", image), theirs("--output=json", image));
    assert_eq!(code(&our), code(&their), "{}: {}, QEMU: {}", image.display(), told(&our), told(&their));
    let parse = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).expect("JSON") };
    assert_eq!(parse(&our), parse(&their), "{}", image.display());
}

#[test]
fn sound_images_are_sound() {
    let dir = directory();
    for image in zoo(dir.path()) {
        same_report(&image);
        let (our, their) = (ours("", &image), theirs("", &image));
        assert_eq!(qemu::text(&our.stdout), qemu::text(&their.stdout));
        let before = std::fs::read(&image).unwrap();
        assert_eq!(code(&ours("--repair", &image)), 0);
        assert!(std::fs::read(&image).unwrap() == before, "{}: nothing to repair, nothing changed", image.display());
    }
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

/// Where the metadata of an image is: start and length.
fn metadata(image: &[u8]) -> Vec<(u64, u64)> {
    let cluster = 1u64 << image[23];
    let mask = 0x00ff_ffff_ffff_fe00;
    let (l1, table) = (be64(image, 40), be64(image, 48));
    let mut places = vec![(l1, 32), (table, 32)];
    let inside = |at: &u64| *at > 0 && at + 512 <= image.len() as u64;
    places.extend(Some(be64(image, l1) & mask).filter(inside).map(|at| (at, cluster.min(1 << 10))));
    places.extend(Some(be64(image, table)).filter(inside).map(|at| (at, cluster.min(256))));
    if image[63] > 0 {
        let snapshots = be64(image, 64);
        places.extend([(snapshots, 16), (be64(image, snapshots), 16)]);
        let l2 = be64(image, be64(image, snapshots)) & mask;
        places.extend(Some(l2).filter(inside).map(|at| (at, cluster.min(256))));
    }
    places.retain(|place| inside(&place.0));
    places
}

fn seeds() -> Vec<u64> {
    match std::env::var("COWGATE_SEED") {
        Ok(seed) => vec![seed.parse().expect("COWGATE_SEED is a number")],
        Err(_) => {
            let rounds =
                std::env::var("COWGATE_ROUNDS").map_or(150, |n| n.parse().expect("COWGATE_ROUNDS is a number"));
            (0..rounds).map(|_| rand::random()).collect()
        }
    }
}

/// QEMU's verdict. Where a snapshot says too much it gives up before the check, which is not to call the image sound.
fn verdict(their: &Output) -> i32 {
    match told(their).contains("Check failed: File too large") {
        true => 2,
        false => code(their),
    }
}

/// Random bits of the metadata are flipped. QEMU's verdict may differ where it does not get as far as a check: it does
/// not open an image with a broken bitmap at all. A repair of ours must leave what QEMU has the same verdict on.
#[test]
fn damaged_images_get_the_same_verdict() {
    let dir = directory();
    let images = zoo(dir.path());
    let copy = dir.path().join("copy.qcow2");
    for seed in seeds() {
        let mut dice = Seed::new(seed);
        let image = &images[dice.below(images.len() as u64) as usize];
        let mut bytes = std::fs::read(image).unwrap();
        let places = metadata(&bytes);
        for _ in 0..[1, 1, 2, 5][dice.below(4) as usize] {
            let (start, len) = places[dice.below(places.len() as u64) as usize];
            let at = (start + dice.below(len)) as usize;
            bytes[at] ^= 1 << dice.below(8);
        }
        std::fs::write(&copy, &bytes).unwrap();
        let (our, their) = (ours("", &copy), theirs("", &copy));
        let case = format!("seed {seed}, {}", image.display());
        if told(&their).contains("Could not open") {
            continue;
        }
        assert_eq!(code(&our), verdict(&their), "{case}: {}\nQEMU: {}", told(&our), told(&their));
        let repaired = ours("--repair", &copy);
        let their = theirs("", &copy);
        assert_eq!(code(&repaired), verdict(&their), "{case}, repaired: {}\nQEMU: {}", told(&repaired), told(&their));
    }
}

/// An image with content, a raw copy of it, and where it is.
fn with_content(name: &str) -> (TempDir, PathBuf, PathBuf) {
    let dir = directory();
    let kind = KINDS.iter().find(|kind| kind.0 == name).unwrap();
    let image = make(dir.path(), kind.0, kind.1, kind.2);
    let raw = dir.path().join("before.raw");
    qemu::qemu_img("convert -f qcow2 -O raw", &[&image, &raw]);
    (dir, image, raw)
}

/// Spoils refcounts and COPIED flags, nothing else.
fn spoil(bytes: &mut [u8], dice: &mut Seed) {
    let cluster = 1usize << bytes[23];
    let (l1, table) = (be64(bytes, 40), be64(bytes, 48));
    let block = be64(bytes, table) as usize;
    for _ in 0..1 + dice.below(20) {
        let at = block + dice.below(cluster.min(128) as u64) as usize;
        bytes[at] ^= 1 << dice.below(8);
    }
    if dice.chance(30) {
        bytes[table as usize..table as usize + 8].fill(0);
    }
    if dice.chance(50) {
        bytes[l1 as usize] ^= 0x80;
    }
    let l2 = (be64(bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let entry_len = if bytes[79] & 16 != 0 { 16 } else { 8 };
    for _ in 0..dice.below(10) {
        let at = l2 + dice.below(8) as usize * entry_len;
        if be64(bytes, at as u64) & 0x40ff_ffff_ffff_fe00 != 0 && bytes[at] & 0x40 == 0 {
            bytes[at] ^= 0x80;
        }
    }
}

#[test]
fn repaired_refcounts_are_right_and_nothing_is_lost() {
    for name in
        ["plain", "snapshots", "refcounts-2", "refcounts-64", "extended", "bitmaps", "version-2", "zlib", "zstd"]
    {
        let (_dir, image, raw) = with_content(name);
        let sound = std::fs::read(&image).unwrap();
        for seed in 0..6 {
            let mut bytes = sound.clone();
            spoil(&mut bytes, &mut Seed::new(seed));
            std::fs::write(&image, &bytes).unwrap();
            let repaired = ours("--repair", &image);
            assert_eq!(code(&repaired), 0, "{name} seed {seed}: {}", told(&repaired));
            qemu::check(&image);
            qemu::same_content(&image, &raw);
            same_report(&image);
        }
    }
}

#[test]
fn leaks_can_be_repaired_alone() {
    let (_dir, image, raw) = with_content("plain");
    let bytes = std::fs::read(&image).unwrap();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let block = be64(&bytes, be64(&bytes, 48));
    let end = bytes.len() as u64;
    file.set_len(end + (1 << 20)).unwrap();
    let leak = |cluster: u64| file.write_all_at(&1u16.to_be_bytes(), block + cluster * 2).unwrap();
    leak((end >> 16) + 3);
    assert_eq!(code(&ours("", &image)), 3);
    same_report(&image);
    assert_eq!(code(&ours("--repair=leaks", &image)), 0);
    qemu::check(&image);
    qemu::same_content(&image, &raw);
    // a refcount that is too low is left alone, and said
    let bytes = std::fs::read(&image).unwrap();
    let l2 = be64(&bytes, be64(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    let block = be64(&bytes, be64(&bytes, 48));
    file.write_all_at(&[0, 0], block + (l2 >> 16) * 2).unwrap();
    assert_eq!(code(&ours("--repair=leaks", &image)), 2);
    assert_eq!(code(&ours("--repair", &image)), 0);
    qemu::check(&image);
    qemu::same_content(&image, &raw);
}

/// What is leaked beside a reference that leads nowhere may be what it should lead to: it is kept.
#[test]
fn what_a_broken_reference_may_have_meant_is_kept() {
    let (_dir, image, _) = with_content("plain");
    let bytes = std::fs::read(&image).unwrap();
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    let l2 = be64(&bytes, be64(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    let host = be64(&bytes, l2) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&(1u64 << 63 | 1 << 52).to_be_bytes(), l2).unwrap();
    let repaired = ours("--repair", &image);
    assert_eq!(code(&repaired), 2, "{}", told(&repaired));
    let their = told(&theirs("", &image));
    assert!(their.contains(&format!("Leaked cluster {} ", host >> 16)), "{their}");
    file.write_all_at(&(1u64 << 63 | host).to_be_bytes(), l2).unwrap();
    qemu::check(&image);
}

#[test]
fn marks_of_trouble_are_taken_back() {
    let (_dir, image, raw) = with_content("plain");
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    file.write_all_at(&3u64.to_be_bytes(), 72).unwrap();
    file.write_all_at(&(1u64 << 40).to_be_bytes(), 88).unwrap();
    let sound = ours("", &image);
    assert_eq!((code(&sound), code(&theirs("", &image))), (0, 0));
    assert_eq!(code(&ours("--repair", &image)), 0);
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!((be64(&bytes, 72), be64(&bytes, 88)), (0, 0), "neither dirty nor corrupt; unknown promises end");
    qemu::same_content(&image, &raw);
}

#[test]
fn what_cannot_be_checked() {
    let dir = directory();
    let raw = dir.path().join("a.raw");
    std::fs::write(&raw, [7; 5000]).unwrap();
    assert_eq!((code(&ours("", &raw)), code(&ours("--format raw --repair", &raw))), (63, 63));
    assert_eq!(code(&ours("", &dir.path().join("missing.qcow2"))), 1);
    let image = make(dir.path(), "plain", "", &[Step::Write]);
    let before = std::fs::read(&image).unwrap();
    let holder = Holder::qemu_io(&["-f", "qcow2"], &image).unwrap();
    let refused = ours("--repair", &image);
    let check = ours("", &image);
    let words = format!("in use by {}", holder.named());
    drop(holder);
    for output in [refused, check] {
        assert_eq!(code(&output), 1);
        assert!(told(&output).contains(&words), "{}", told(&output));
    }
    assert!(std::fs::read(&image).unwrap() == before);
}

/// Repairs in memory; returns what a power failure at some moment leaves, and the end.
fn repair_with_crashes(image: Vec<u8>, seed: u64, lie: bool) -> (Vec<Vec<u8>>, Vec<u8>) {
    let disk = MemDisk::new(image, seed);
    disk.delay(3);
    if lie {
        disk.lie();
    }
    let states = Arc::new(Mutex::new(Vec::new()));
    let (hook_states, mut cuts) = (Arc::clone(&states), Seed::new(seed ^ 0xc0ffee));
    disk.on_barrier(move |disk| {
        for _ in 0..3 {
            hook_states.lock().unwrap().push(disk.crash(&mut cuts));
        }
    });
    let work = async { Subject::in_memory(&disk, MEMORY).repair(Scope::All, &|_, _| {}).await.map(|_| ()) };
    ring::run(work).unwrap().unwrap();
    let states = std::mem::take(&mut *states.lock().unwrap());
    (states, disk.content())
}

/// Content is there in every state, a state that is not marked dirty any more is sound, and repairing one again makes it
/// so.
fn survives(name: &str, seed: u64, lie: bool) -> Result<(), String> {
    let (dir, image, raw) = with_content(name);
    let mut bytes = std::fs::read(&image).unwrap();
    spoil(&mut bytes, &mut Seed::new(seed));
    bytes[79] |= 1; // dirty
    let (mut states, end) = repair_with_crashes(bytes, seed, lie);
    assert!(states.len() >= 6, "{name}: only {} states", states.len());
    states.push(end);
    let path = dir.path().join("state.qcow2");
    for (number, state) in states.into_iter().enumerate() {
        let case = format!("{name} seed {seed} state {number}");
        std::fs::write(&path, &state).unwrap();
        let mut compare = Command::new("qemu-img");
        let same = qemu::output(compare.args(["compare", "-U", "-f", "qcow2", "-F", "raw"]).arg(&path).arg(&raw));
        if code(&same) != 0 {
            return Err(format!("{case}: {}", told(&same)));
        }
        let their = theirs("-U", &path);
        if state[79] & 1 == 0 && code(&their) != 0 {
            return Err(format!("{case} is not marked dirty: {}", told(&their)));
        }
        let repaired = ours("--repair", &path);
        let their = theirs("", &path);
        if (code(&repaired), code(&their)) != (0, 0) {
            return Err(format!("{case}: {}\nQEMU: {}", told(&repaired), told(&their)));
        }
        qemu::same_content(&path, &raw);
    }
    Ok(())
}

#[test]
fn a_power_failure_during_a_repair_loses_nothing() {
    for (seed, name) in ["plain", "snapshots", "clusters-512", "refcounts-64", "extended", "bitmaps"].iter().enumerate()
    {
        let seed = std::env::var("COWGATE_SEED").map_or(seed as u64, |s| s.parse().unwrap());
        survives(name, seed, false).unwrap();
    }
}

/// The control: a disk whose syncs do nothing must be caught at least once, or the test proves nothing.
#[test]
fn a_lying_disk_is_caught() {
    assert!((0..16).any(|seed| survives("plain", seed, true).is_err()));
}

/// Runs the check with little memory and processor time; it must end, whatever it says.
#[track_caller]
fn ends_soon(image: &Path) {
    for arguments in ["", "--repair"] {
        let program = env!("CARGO_BIN_EXE_cowgate");
        // address space in KiB, processor time in seconds
        let line =
            format!("ulimit -v 1500000; ulimit -t 300; exec {program} image check {arguments} {}", image.display());
        let output = qemu::output(Command::new("sh").args(["-c", &line]));
        assert!((0..=3).contains(&code(&output)), "{arguments}: {:?} {}", output.status, told(&output));
    }
}

fn patch(file: &std::fs::File, at: u64, values: impl IntoIterator<Item = u64>) {
    let bytes: Vec<u8> = values.into_iter().flat_map(u64::to_be_bytes).collect();
    file.write_all_at(&bytes, at).unwrap();
}

/// As many entries as an L1 table may have.
const ENTRIES: u64 = 4 << 20;

/// An image to be made hostile: its path, its file and its bytes.
fn fresh(dir: &Path, name: &str, options: &str) -> (PathBuf, std::fs::File, Vec<u8>) {
    let path = make(dir, name, options, &[Step::Write]);
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (path, file, bytes)
}

#[test]
fn l1_entries_that_all_name_one_table() {
    let dir = directory();
    // every L1 entry names the same full L2 table
    let (path, file, bytes) = fresh(dir.path(), "same-table", "cluster_size=2M");
    let l1 = 64 << 20;
    patch(&file, 40, [l1]);
    file.write_all_at(&(ENTRIES as u32).to_be_bytes(), 36).unwrap();
    patch(&file, l1, std::iter::repeat_n(be64(&bytes, be64(&bytes, 40)), ENTRIES as usize));
    ends_soon(&path);
}

#[test]
fn tables_in_a_hole_of_terabytes() {
    let dir = directory();
    let l1 = 64 << 20;
    // L1 entries name tables in a hole of terabytes
    let (path, file, _) = fresh(dir.path(), "holes", "cluster_size=2M");
    patch(&file, 40, [l1]);
    file.write_all_at(&(ENTRIES as u32).to_be_bytes(), 36).unwrap();
    patch(&file, l1, (0..ENTRIES / 32).map(|i| (1 << 40) + (i << 21)));
    file.set_len(8 << 40).unwrap();
    ends_soon(&path);
}

#[test]
fn references_all_over_a_sparse_file() {
    let dir = directory();
    // L2 entries name places all over a sparse file: counting them would take much memory
    let (path, file, bytes) = fresh(dir.path(), "scattered", "cluster_size=2M");
    let l2 = be64(&bytes, be64(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    patch(&file, l2, (0..1 << 18).map(|i: u64| i << 25));
    file.set_len(8 << 40).unwrap();
    ends_soon(&path);
}

#[test]
fn one_refcount_block_for_everything() {
    let dir = directory();
    // the refcount table names one block again and again, then blocks in a hole
    for (name, block) in [("same-block", 0u64), ("hole-blocks", 1)] {
        let (path, file, bytes) = fresh(dir.path(), name, "cluster_size=2M");
        let table = 16 << 20;
        let first = be64(&bytes, be64(&bytes, 48));
        patch(&file, 48, [table]);
        file.write_all_at(&1u32.to_be_bytes(), 56).unwrap();
        patch(&file, table, (0..1 << 18).map(|i: u64| if block == 0 { first } else { (1 << 40) + (i << 21) }));
        file.set_len(6 << 40).unwrap();
        ends_soon(&path);
    }
}

#[test]
fn snapshots_without_end() {
    let dir = directory();
    // 65,536 snapshots with one L1 table of 32 MiB
    let (path, file, bytes) = fresh(dir.path(), "snapshots-hostile", "cluster_size=512");
    let l1_at = 64 << 20;
    let mut entry = [0u8; 56];
    entry[..8].copy_from_slice(&u64::to_be_bytes(l1_at));
    entry[8..12].copy_from_slice(&(ENTRIES as u32).to_be_bytes());
    entry[39] = 16;
    let table: Vec<u8> = entry.iter().copied().cycle().take(entry.len() * 65_536).collect();
    file.write_all_at(&table, 16 << 20).unwrap();
    patch(&file, 64, [16 << 20]);
    file.write_all_at(&65_536u32.to_be_bytes(), 60).unwrap();
    patch(&file, l1_at, std::iter::repeat_n(be64(&bytes, be64(&bytes, 40)), 1 << 16));
    file.set_len(256 << 20).unwrap();
    ends_soon(&path);
}
