//! A process that is killed while it writes an image, and a machine that goes on: with a journal, everything that was
//! answered is there afterwards, flushed or not. The image engine works on a disk in memory; moments are taken after each
//! answer and around each barrier. What is in the file then (all that was written to it: the page cache survives) and in
//! the journal is brought together again; the image must pass `qemu-img check` without leaks, and hold all of it.
//!
//! A failure prints its case and seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` runs more.

mod common;

use common::parts::{Parts, cut_up, noise};
use common::qemu;
use cowgate::block::{BlockDev, ZeroFlags};
use cowgate::image::check::{DAEMON_MEMORY, Subject};
use cowgate::image::{Disk, Format, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::qcow2::journal::{Patched, read};
use cowgate::ring;
use cowgate::ring::lasting;
use cowgate::ring::mem::{MemDisk, Seed};
use cowgate::units::{ByteRange, GuestOffset};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

const TASKS: usize = 4;
const OPS: usize = 60;
/// Moments verified per run: the rest are passed over evenly.
const STATES: usize = 100;
/// Bytes of the journal: so few that it goes round.
const JOURNAL: u64 = (64 << 10) + 1024;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    options: &'static str,
    size: u64,
    /// A raw backing file of this size.
    backing: Option<u64>,
    snapshot: bool,
    packs: bool,
}

const PLAIN: Case =
    Case { name: "64k", options: "cluster_size=65536", size: 2 << 20, backing: None, snapshot: false, packs: false };

const CASES: [Case; 10] = [
    PLAIN,
    Case { name: "512", options: "cluster_size=512", size: 1 << 20, ..PLAIN },
    Case { name: "512-refcount64", options: "cluster_size=512,refcount_bits=64", size: 3 << 20, ..PLAIN },
    Case { name: "refcount1", options: "cluster_size=1024,refcount_bits=1", size: 1 << 20, ..PLAIN },
    Case { name: "overlay", options: "cluster_size=4096", size: 1 << 20, backing: Some(700 << 10), ..PLAIN },
    Case { name: "snapshot", options: "cluster_size=4096", size: 1 << 20, snapshot: true, ..PLAIN },
    Case { name: "v2", options: "cluster_size=1024,compat=0.10", size: 768 << 10, ..PLAIN },
    Case {
        name: "subclusters",
        options: "cluster_size=16384,extended_l2=on",
        size: 1 << 20,
        backing: Some(700 << 10),
        ..PLAIN
    },
    Case { name: "packs", options: "cluster_size=4096,compression_type=zstd", size: 1 << 20, packs: true, ..PLAIN },
    Case {
        name: "packs-snapshot",
        options: "cluster_size=512,refcount_bits=8",
        size: 512 << 10,
        packs: true,
        snapshot: true,
        ..PLAIN
    },
];

/// A moment: what is in the image file, in the journal, and what was answered.
struct State {
    image: Vec<u8>,
    journal: Vec<u8>,
    parts: Vec<common::parts::Part>,
}

/// Where moments are taken from.
#[derive(Clone)]
struct Camera {
    top: MemDisk,
    journal: PathBuf,
    parts: Parts,
    states: Arc<Mutex<Vec<State>>>,
}

impl Camera {
    fn take(&self) {
        let journal = std::fs::read(&self.journal).unwrap();
        let state = State { image: self.top.content(), journal, parts: self.parts.lock().unwrap().clone() };
        self.states.lock().unwrap().push(state);
    }

    /// All that task `me` has begun was answered.
    fn answered(&self, me: usize) {
        {
            let part = &mut self.parts.lock().unwrap()[me];
            part.flushed(part.since.len());
        }
        self.take();
    }
}

/// Makes the image with QEMU; returns its bytes, its backing file's, and the guest content.
fn make(case: &Case, seed: &mut Seed) -> (Vec<u8>, Option<Vec<u8>>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (path, raw) = (dir.path().join("image.qcow2"), dir.path().join("raw"));
    let mut content = vec![0; case.size as usize];
    let backing = case.backing.map(|len| noise(seed, len as usize));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", case.options]);
    if let Some(backing) = &backing {
        std::fs::write(&raw, backing).unwrap();
        create.args(["-b", "raw", "-F", "raw"]);
        let seen = backing.len().min(content.len());
        content[..seen].copy_from_slice(&backing[..seen]);
    }
    qemu::run(create.arg(&path).arg(case.size.to_string()));
    if case.snapshot {
        let len = case.size / 2;
        qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", &format!("write -P 99 0 {len}")]).arg(&path));
        content[..len as usize].fill(99);
        qemu::qemu_img("snapshot -c one", &[&path]);
    }
    (std::fs::read(&path).unwrap(), backing, content)
}

async fn task(disk: Rc<Disk>, camera: Camera, me: usize, mut seed: Seed, packs: bool) {
    for _ in 0..OPS {
        let (start, len) = {
            let parts = camera.parts.lock().unwrap();
            (parts[me].start, parts[me].stable.len() as u64)
        };
        let from = seed.below(len);
        let longest = (len - from).min(if seed.chance(20) { 200 << 10 } else { 9000 });
        let len = seed.below(longest) + 1;
        let at = start + from;
        let range = ByteRange::between(at, at + len);
        let note = |bytes| camera.parts.lock().unwrap()[me].note(from as usize, bytes);
        match seed.below(100) {
            0..25 if packs => {
                let short = noise(&mut seed, 40);
                let bytes: Vec<u8> = short.into_iter().cycle().take(len as usize).collect();
                note(bytes.clone());
                disk.write_compressed(GuestOffset(at), PageBuf::copy_of(&bytes)).await.0.unwrap();
            }
            0..60 => {
                let bytes = noise(&mut seed, len as usize);
                note(bytes.clone());
                disk.write(GuestOffset(at), PageBuf::copy_of(&bytes)).await.0.unwrap();
            }
            60..80 => {
                note(vec![0; len as usize]);
                let flags = ZeroFlags { may_unmap: seed.chance(60), sparse: seed.chance(30), fast: false };
                disk.write_zeroes(range, flags).await.unwrap();
            }
            80..93 => {
                // zeroes or unchanged: what it is now is learned by reading
                note(vec![0; len as usize]);
                disk.discard(range).await.unwrap();
                let (read, now) = disk.read(GuestOffset(at), PageBuf::new(len as usize)).await;
                read.unwrap();
                note(now.to_vec());
            }
            _ => disk.flush().await.unwrap(),
        }
        camera.answered(me);
    }
}

async fn open(image: Vec<u8>, backing: &Option<Vec<u8>>, seed: u64) -> (Arc<Image>, MemDisk) {
    let top = MemDisk::new(image, seed);
    let mut chain = vec![(top.clone(), Format::Qcow2)];
    chain.extend(backing.iter().map(|bytes| (MemDisk::new(bytes.clone(), seed), Format::Raw)));
    let image = Image::in_memory(&chain).await.expect("the image opens");
    (Arc::new(image), top)
}

/// Runs the tasks, and takes moments on the way.
async fn live(dir: &Path, case: &Case, seed: u64, noted: bool) -> (Vec<State>, Option<Vec<u8>>) {
    let mut dice = Seed::new(seed);
    let (image, backing, content) = make(case, &mut dice);
    let (image, top) = open(image, &backing, seed).await;
    top.delay(6);
    image.begin_writing().unwrap();
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    let journal = dir.join("journal");
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&journal).unwrap();
    let memory = lasting::map(&file, JOURNAL).unwrap();
    disk.keep_journal(Box::new(memory)).await.unwrap();
    if !noted {
        image.drop_journal();
    }
    let parts: Parts = Arc::new(Mutex::new(cut_up(&content, TASKS, &mut dice)));
    let camera = Camera { top: top.clone(), journal, parts, states: Arc::default() };
    let at_barriers = camera.clone();
    top.on_barrier(move |_| at_barriers.take());
    let count = camera.parts.lock().unwrap().len();
    let tasks: Vec<_> =
        (0..count).map(|me| task(Rc::clone(&disk), camera.clone(), me, Seed::new(dice.draw()), case.packs)).collect();
    futures_util::future::join_all(tasks).await;
    top.on_barrier(|_| {});
    let mut states = std::mem::take(&mut *camera.states.lock().unwrap());
    let stride = states.len().div_ceil(STATES).max(1);
    let mut index = 0;
    states.retain(|_| {
        index += 1;
        index % stride == 0
    });
    disk.settle().await.unwrap();
    (states, backing)
}

fn check(path: &Path, image: &[u8]) -> Result<(), String> {
    std::fs::write(path, image).unwrap();
    let out = qemu::output(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path));
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("qemu-img check: {}{}", qemu::text(&out.stdout), qemu::text(&out.stderr))),
    }
}

/// Brings the image and its journal together, and verifies what comes out.
async fn verify(dir: &Path, state: State, backing: &Option<Vec<u8>>) -> Result<(), String> {
    let patched = Patched::new(read(&state.journal).ok_or("the journal cannot be read")?).ok_or("a place far out")?;
    let top = MemDisk::new(state.image, 1);
    let mut subject = Subject::in_memory(&top, DAEMON_MEMORY);
    subject.carry_out(patched.clone()).await.map_err(|e| format!("carrying out: {e}"))?;
    let path = dir.join("killed.qcow2");
    if let Some(bytes) = backing {
        std::fs::write(dir.join("raw"), bytes).unwrap();
    }
    check(&path, &top.content())
        .or_else(|e| if patched.is_empty() && e.contains("leaked") { Ok(()) } else { Err(e) })?;
    let (image, top) = open(top.content(), backing, 1).await;
    image.begin_writing().map_err(|e| e.to_string())?;
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    for part in &state.parts {
        let (read, found) = disk.read(GuestOffset(part.start), PageBuf::new(part.stable.len())).await;
        read.map_err(|e| format!("read: {e}"))?;
        part.allows(&found)?;
    }
    let buf = PageBuf::zeroed(image.size() as usize / 3);
    disk.write(GuestOffset(image.size() / 3 + 100), buf).await.0.map_err(|e| format!("write after the kill: {e}"))?;
    disk.settle().await.map_err(|e| format!("flush after the kill: {e}"))?;
    drop(disk);
    check(&path, &top.content()).or_else(|e| if e.contains("leaked") { Ok(()) } else { Err(e) })
}

fn run_case(case: &Case, seed: u64, noted: bool) -> Result<(), String> {
    println!("case {} seed {seed}", case.name);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    ring::run(async {
        let (states, backing) = live(dir.path(), case, seed, noted).await;
        assert!(states.len() > 40, "only {} moments", states.len());
        let mut whole = 0;
        for (i, state) in states.into_iter().enumerate() {
            whole += usize::from(read(&state.journal).is_some_and(|patches| !patches.is_empty()));
            verify(dir.path(), state, &backing).await.map_err(|e| format!("moment {i}: {e}"))?;
        }
        assert!(whole > 10, "only {whole} journals said anything");
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
        run_case(case, seed, true).unwrap_or_else(|e| panic!("case {name} seed {seed}: {e}"));
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
    narrow_refcounts: "refcount1";
    overlay: "overlay";
    snapshot: "snapshot";
    version_2: "v2";
    subclusters: "subclusters";
    compressed_writing: "packs";
    compressed_writing_after_a_snapshot: "packs-snapshot";
}

/// Writes at once below many tables that a snapshot shares: each notes a whole table, and together more than the journal
/// holds.
#[test]
fn copies_of_shared_tables_wait_for_room() {
    const TABLES: u64 = 64;
    const REACH: u64 = 2 << 20; // of a table in a cluster of 4 KiB
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("image.qcow2");
    let size = (TABLES * REACH).to_string();
    qemu::run(
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"]).arg(&path).arg(size),
    );
    let commands = (0..TABLES).map(|table| format!("write -P 99 {} 4k", table * REACH));
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2"]).args(commands.flat_map(|c| ["-c".into(), c])).arg(&path));
    qemu::qemu_img("snapshot -c one", &[&path]);
    let image = std::fs::read(&path).unwrap();
    ring::run(async {
        let (image, top) = open(image, &None, 1).await;
        top.delay(6);
        image.begin_writing().unwrap();
        let disk = Disk::open(Arc::clone(&image), true).unwrap();
        let journal = dir.path().join("journal");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&journal).unwrap();
        disk.keep_journal(Box::new(lasting::map(&file, JOURNAL).unwrap())).await.unwrap();
        for table in 0..TABLES {
            disk.read(GuestOffset(table * REACH), PageBuf::new(512)).await.0.unwrap(); // it is in memory then
        }
        let answered = Arc::new(Mutex::new(Vec::new()));
        let states = Arc::new(Mutex::new(Vec::new()));
        let take = {
            let (top, answered, states) = (top.clone(), Arc::clone(&answered), Arc::clone(&states));
            move || {
                let state = (top.content(), std::fs::read(&journal).unwrap(), answered.lock().unwrap().clone());
                states.lock().unwrap().push(state);
            }
        };
        let at_barriers = take.clone();
        top.on_barrier(move |_| at_barriers());
        let write = async |table| {
            disk.write(GuestOffset(table * REACH), PageBuf::copy_of(&[table as u8; 4096])).await.0.unwrap();
            answered.lock().unwrap().push(table);
            take();
        };
        write(0).await;
        futures_util::future::join_all((1..TABLES).map(write)).await;
        top.on_barrier(|_| {});
        let states = std::mem::take(&mut *states.lock().unwrap());
        for (image, journal, answered) in states {
            let patched = Patched::new(read(&journal).unwrap()).unwrap();
            let top = MemDisk::new(image, 1);
            Subject::in_memory(&top, DAEMON_MEMORY).carry_out(patched).await.unwrap();
            let (image, _) = open(top.content(), &None, 1).await;
            let disk = Disk::open(image, true).unwrap();
            for table in answered {
                let (result, found) = disk.read(GuestOffset(table * REACH), PageBuf::new(4096)).await;
                result.unwrap();
                assert!(found.iter().all(|byte| *byte == table as u8), "the write below table {table} is lost");
            }
        }
        disk.settle().await.unwrap();
    })
    .unwrap();
}

/// The control: without a journal what was answered is lost, or the test proves nothing.
#[test]
fn without_a_journal_answers_are_lost() {
    let lost = run_case(&PLAIN, 1, false).unwrap_err();
    assert!(lost.contains("flushed was"), "{lost}");
}
