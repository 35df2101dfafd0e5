//! Storage that fails under load: the image engine works on a disk in memory whose reads, writes, allocations and syncs
//! fail at random points. A failure must reach whoever asked as the errno it is, change nothing but the bytes that were
//! asked for, and be over when the storage is whole again: no panic, no hang, no corrupt image, no leaked cluster.
//! At every barrier on the way the disk is also cut as by a power failure: what was flushed must be there.
//!
//! A failure prints its case and seed; `COWGATE_SEED=N` replays it, `COWGATE_ROUNDS=N` runs more.

mod common;

use common::parts::{Part, Parts, cut_up, noise};
use common::qemu;
use cowgate::block::{BlockDev, Errno, ZeroFlags};
use cowgate::image::{Disk, Format, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::ring;
use cowgate::ring::mem::{Fault, Kind, MemDisk, Seed};
use cowgate::units::{ByteRange, GuestOffset};
use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const TASKS: usize = 4;
/// Requests of each task.
const REQUESTS: usize = 60;
/// Crash states verified per run: the rest are passed over evenly.
const STATES: usize = 24;
/// Far more than a run takes: what is not over by then hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// The images: `qemu-img create` options, size, size of a raw backing file, whether a snapshot shares its clusters.
const IMAGES: [(&str, u64, Option<u64>, bool); 5] = [
    ("cluster_size=65536", 2 << 20, None, false),
    ("cluster_size=512", 1 << 20, None, false),
    ("cluster_size=512,refcount_bits=64", 1 << 20, None, false),
    ("cluster_size=4096", 1 << 20, Some(700 << 10), false),
    ("cluster_size=2048,refcount_bits=4", 1 << 20, None, true),
];

/// What fails in a run: operations of this kind, with this error.
type Trouble = &'static [(Kind, Errno)];

/// The images of one run, as bytes: the exported one, its backing file, and what a guest sees.
struct Made {
    image: Vec<u8>,
    backing: Option<Vec<u8>>,
    content: Vec<u8>,
}

fn make((options, size, backing, snapshot): (&str, u64, Option<u64>, bool), seed: &mut Seed) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    let mut content = vec![0; size as usize];
    let backing = backing.map(|len| noise(seed, len as usize));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-o", options]);
    if let Some(backing) = &backing {
        std::fs::write(dir.path().join("raw"), backing).unwrap();
        create.args(["-b", "raw", "-F", "raw"]);
        content[..backing.len()].copy_from_slice(backing);
    }
    qemu::run(create.arg(&path).arg(size.to_string()));
    if snapshot {
        let half = size / 2;
        qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", &format!("write -P 99 0 {half}")]).arg(&path));
        content[..half as usize].fill(99);
        qemu::qemu_img("snapshot -c one", &[&path]);
    }
    Made { image: std::fs::read(&path).unwrap(), backing, content }
}

/// A source of numbers for one user of its own.
fn fork(dice: &mut Seed) -> Seed {
    Seed::new(dice.below(1 << 50))
}

async fn open(top: &MemDisk, backing: &Option<Vec<u8>>) -> Rc<Disk> {
    let mut chain = vec![(top.clone(), Format::Qcow2)];
    chain.extend(backing.clone().map(|b| (MemDisk::new(b, 1), Format::Raw)));
    let image = Arc::new(Image::in_memory(&chain).await.expect("the image opens"));
    image.begin_writing().expect("the image can be written");
    Disk::open(image, true).unwrap()
}

/// One task and its part of the disk.
struct Task {
    disk: Rc<Disk>,
    top: MemDisk,
    parts: Parts,
    me: usize,
    seed: Seed,
    trouble: Trouble,
    /// Errors that reached any task.
    errors: Rc<Cell<u32>>,
    /// What a reader must see of this part.
    now: Vec<u8>,
    start: u64,
}

impl Task {
    async fn run(mut self) -> Vec<u8> {
        for _ in 0..REQUESTS {
            if self.seed.chance(15) {
                let (kind, errno) = self.trouble[self.seed.below(self.trouble.len() as u64) as usize];
                let first = self.seed.below(12) + 1;
                for _ in 0..=self.seed.below(4) {
                    self.top.fail(Fault::new(errno).on(kind).nth(first));
                }
            }
            let from = self.seed.below(self.now.len() as u64) as usize;
            let longest = (self.now.len() - from).min(if self.seed.chance(20) { 200 << 10 } else { 9000 });
            let len = self.seed.below(longest as u64) as usize + 1;
            match self.seed.below(100) {
                0..45 => self.write(from, len).await,
                45..65 => self.zero(from, len).await,
                65..75 => self.discard(from, len).await,
                75..85 => self.read(from, len).await,
                _ => self.flush().await,
            }
        }
        self.now
    }

    /// An error must be one that was made. True for success.
    fn succeeded(&self, what: &str, result: Result<(), Errno>) -> bool {
        if let Err(e) = result {
            assert!(self.trouble.iter().any(|(_, errno)| *errno == e), "{what}: {e} was never made");
            self.errors.set(self.errors.get() + 1);
        }
        result.is_ok()
    }

    fn note(&self, from: usize, bytes: &[u8]) {
        self.parts.lock().unwrap()[self.me].note(from, bytes.to_vec());
    }

    async fn write(&mut self, from: usize, len: usize) {
        let bytes = noise(&mut self.seed, len);
        self.note(from, &bytes);
        let result = self.disk.write(GuestOffset(self.start + from as u64), PageBuf::copy_of(&bytes)).await.0;
        let written = self.succeeded("write", result);
        self.settle_on(from, bytes, written).await;
    }

    async fn zero(&mut self, from: usize, len: usize) {
        self.note(from, &vec![0; len]);
        let flags = ZeroFlags { may_unmap: self.seed.chance(60), sparse: self.seed.chance(30), fast: false };
        let result = self.disk.write_zeroes(self.range(from, len), flags).await;
        let written = self.succeeded("write zeroes", result);
        self.settle_on(from, vec![0; len], written).await;
    }

    /// Discarded bytes are zeroes or what they were, whether it succeeded or not.
    async fn discard(&mut self, from: usize, len: usize) {
        self.note(from, &vec![0; len]);
        let result = self.disk.discard(self.range(from, len)).await;
        self.succeeded("discard", result);
        self.settle_on(from, vec![0; len], false).await;
    }

    async fn read(&mut self, from: usize, len: usize) {
        let (result, found) = self.disk.read(GuestOffset(self.start + from as u64), PageBuf::new(len)).await;
        if self.succeeded("read", result) {
            self.same(from, &found);
        }
    }

    async fn flush(&mut self) {
        let covered = self.parts.lock().unwrap()[self.me].since.len();
        let result = self.disk.flush().await;
        if self.succeeded("flush", result) {
            self.parts.lock().unwrap()[self.me].flushed(covered);
        }
    }

    /// `new` was written; or it was perhaps, then each byte is the old or the new one, and stays what it is.
    async fn settle_on(&mut self, from: usize, new: Vec<u8>, written: bool) {
        if written {
            self.now[from..from + new.len()].copy_from_slice(&new);
            return;
        }
        let found = loop {
            let at = GuestOffset(self.start + from as u64);
            let (result, found) = self.disk.read(at, PageBuf::new(new.len())).await;
            if self.succeeded("read", result) {
                break found;
            }
        };
        for (i, &byte) in found.iter().enumerate() {
            let old = self.now[from + i];
            let at = self.start + (from + i) as u64;
            assert!(byte == old || byte == new[i], "byte {at} is {byte:#04x}, was {old:#04x}, not {:#04x}", new[i]);
        }
        self.note(from, &found);
        self.now[from..from + new.len()].copy_from_slice(&found);
    }

    fn same(&self, from: usize, found: &[u8]) {
        let wrong = (0..found.len()).find(|i| found[*i] != self.now[from + i]);
        if let Some(i) = wrong {
            panic!("byte {} is {:#04x}, not {:#04x}", self.start + (from + i) as u64, found[i], self.now[from + i]);
        }
    }

    fn range(&self, from: usize, len: usize) -> ByteRange {
        let at = self.start + from as u64;
        ByteRange::between(at, at + len as u64)
    }
}

/// An image as it was at a barrier.
struct State {
    image: Vec<u8>,
    parts: Vec<Part>,
}

/// What is left when the tasks are done.
struct Outcome {
    top: MemDisk,
    disk: Rc<Disk>,
    parts: Parts,
    /// What a reader must see.
    now: Vec<u8>,
    states: Vec<State>,
    errors: u32,
}

async fn live(made: &Made, trouble: Trouble, dice: &mut Seed) -> Outcome {
    let top = MemDisk::new(made.image.clone(), dice.below(1 << 50));
    top.delay(5);
    let disk = open(&top, &made.backing).await;
    // another worker's hands on the same image
    let second = Disk::open(Arc::clone(disk.image()), true).unwrap();
    let parts: Parts = Arc::new(Mutex::new(cut_up(&made.content, TASKS, dice)));
    let states = Arc::new(Mutex::new(Vec::new()));
    let (hook_parts, hook_states, mut cuts) = (Arc::clone(&parts), Arc::clone(&states), fork(dice));
    top.on_barrier(move |disk| {
        let parts = hook_parts.lock().unwrap().clone();
        hook_states.lock().unwrap().push(State { image: disk.crash(&mut cuts), parts });
    });
    let errors = Rc::new(Cell::new(0));
    let begun = parts.lock().unwrap().clone();
    let tasks = begun.into_iter().enumerate().map(|(me, part)| {
        let disk = Rc::clone(if me % 2 == 0 { &disk } else { &second });
        let (top, parts) = (top.clone(), Arc::clone(&parts));
        let (seed, errors) = (fork(dice), Rc::clone(&errors));
        Task { disk, top, parts, me, seed, trouble, errors, now: part.stable, start: part.start }.run()
    });
    let now = futures_util::future::join_all(tasks).await.concat();
    top.heal();
    let states = std::mem::take(&mut *states.lock().unwrap());
    Outcome { top, disk, parts, now, states, errors: errors.get() }
}

/// QEMU finds no errors in the image (leaks are allowed) and reads what the model allows.
async fn verify(dir: &Path, state: &State, backing: &Option<Vec<u8>>) -> Result<(), String> {
    let path = dir.join("image.qcow2");
    std::fs::write(&path, &state.image).unwrap();
    qemu::check_leaks_allowed(&path);
    let disk = open(&MemDisk::new(state.image.clone(), 1), backing).await;
    for part in &state.parts {
        let (read, found) = disk.read(GuestOffset(part.start), PageBuf::new(part.stable.len())).await;
        read.map_err(|e| format!("read: {e}"))?;
        part.allows(&found)?;
    }
    Ok(())
}

async fn verify_states(dir: &Path, states: Vec<State>, backing: &Option<Vec<u8>>) {
    let stride = states.len().div_ceil(STATES).max(1);
    for (i, state) in states.iter().enumerate().filter(|(i, _)| i % stride == 0) {
        verify(dir, state, backing).await.unwrap_or_else(|e| panic!("crash state {i}: {e}"));
    }
}

/// A directory with the backing file, where QEMU will look at images.
fn bench(made: &Made) -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    if let Some(backing) = &made.backing {
        std::fs::write(dir.path().join("raw"), backing).unwrap();
    }
    dir
}

/// Runs `job` for each image on seeds of its own.
fn each_image(what: &str, job: impl AsyncFn(&Made, &mut Seed)) {
    let fixed = std::env::var("COWGATE_SEED").ok().map(|s| s.parse().expect("COWGATE_SEED is a number"));
    let rounds: usize = std::env::var("COWGATE_ROUNDS").map_or(2, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    for image in IMAGES {
        for _ in 0..rounds {
            let seed = fixed.unwrap_or_else(rand::random);
            println!("{what}, {}, seed {seed}", image.0);
            let mut dice = Seed::new(seed);
            let made = make(image, &mut dice);
            let over = ring::run(async { tokio::time::timeout(PATIENCE, job(&made, &mut dice)).await }).unwrap();
            over.expect("it hangs");
        }
    }
}

/// Trouble that passes: when it is over nothing of it is left.
fn passes(what: &str, trouble: Trouble) {
    each_image(what, async |made, dice| {
        let dir = bench(made);
        let Outcome { top, disk, now, states, errors, .. } = live(made, trouble, dice).await;
        assert!(errors > 0, "no error reached a task: the test proves nothing");

        let (read, found) = disk.read(GuestOffset(0), PageBuf::new(now.len())).await;
        read.unwrap();
        assert!(found[..] == now[..], "the disk reads back differently");
        let mut now = now;
        let third = now.len() / 3;
        now[third..2 * third].fill(0x77);
        disk.write(GuestOffset(third as u64), PageBuf::copy_of(&now[third..2 * third])).await.0.unwrap();
        disk.settle().await.unwrap();

        let (image, raw) = (dir.path().join("end.qcow2"), dir.path().join("end.raw"));
        std::fs::write(&image, top.content()).unwrap();
        std::fs::write(&raw, &now).unwrap();
        qemu::check(&image);
        qemu::same_content(&image, &raw);
        verify_states(dir.path(), states, &made.backing).await;
    });
}

#[test]
fn writes_that_find_no_space() {
    passes("ENOSPC", &[(Kind::Write, Errno::ENOSPC), (Kind::Fallocate, Errno::ENOSPC)]);
}

#[test]
fn writes_that_fail() {
    passes("EIO on write", &[(Kind::Write, Errno::EIO)]);
}

#[test]
fn reads_that_fail() {
    passes("EIO on read", &[(Kind::Read, Errno::EIO)]);
}

#[test]
fn everything_but_syncs_fails() {
    passes("all", &[(Kind::Write, Errno::ENOSPC), (Kind::Read, Errno::EIO), (Kind::Fallocate, Errno::EIO)]);
}

/// A failed sync may have lost what was written before it, whatever later ones say: no flush succeeds any more until the
/// image was opened anew, and then everything is there that was flushed before.
#[test]
fn a_failed_sync_stays_failed_until_the_image_is_opened_anew() {
    each_image("sync", async |made, dice| {
        let dir = bench(made);
        let Outcome { top, disk, parts, states, errors, .. } =
            live(made, &[(Kind::Sync, Errno::EIO), (Kind::Write, Errno::EIO)], dice).await;
        assert!(errors > 0, "no error reached a task: the test proves nothing");
        verify_states(dir.path(), states, &made.backing).await;

        top.fail(Fault::new(Errno::EIO).on(Kind::Sync).nth(1));
        disk.write(GuestOffset(0), PageBuf::zeroed(1)).await.0.unwrap();
        parts.lock().unwrap()[0].note(0, vec![0]);
        assert_eq!(disk.flush().await, Err(Errno::EIO));
        top.heal();
        assert_eq!(disk.flush().await, Err(Errno::EIO), "a later sync says nothing about what an earlier one lost");
        let elsewhere = Disk::open(Arc::clone(disk.image()), true).unwrap();
        assert_eq!(elsewhere.settle().await, Err(Errno::EIO), "on another worker's descriptor neither");
        drop((disk, elsewhere));

        let state = State { image: top.content(), parts: parts.lock().unwrap().clone() };
        verify(dir.path(), &state, &made.backing).await.unwrap();
        let disk = open(&top, &made.backing).await;
        let bytes = noise(dice, made.content.len());
        disk.write(GuestOffset(0), PageBuf::copy_of(&bytes)).await.0.unwrap();
        disk.settle().await.unwrap();
        let (image, raw) = (dir.path().join("end.qcow2"), dir.path().join("end.raw"));
        std::fs::write(&image, top.content()).unwrap();
        std::fs::write(&raw, &bytes).unwrap();
        qemu::check_leaks_allowed(&image);
        qemu::same_content(&image, &raw);
    });
}
