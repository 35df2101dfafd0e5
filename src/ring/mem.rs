//! [`MemDisk`]: a file in memory that delays, fails, holds and loses what it is told to. For tests.
//!
//! It stands behind the same [`File`] as the kernel, so short counts, retries and the sticky sync are exercised too, and
//! it needs no io_uring: a plain tokio current-thread runtime will do. One seed drives every random choice: on one
//! thread the same seed gives the same run.
//!
//! The model of a crash: an image is what was durable plus any part of the writes since, in any order, each perhaps
//! torn at 512-byte sectors. A sync makes durable what had completed before it was asked for. A failed sync makes
//! durable what it likes and forgets the rest, as kernels do: a later sync does not bring it back.

mod change;
mod fault;
mod seed;
mod state;

pub use fault::Fault;
pub use seed::Seed;

#[cfg(doc)]
use super::file::File;
use super::runtime::yield_now;
use crate::block::Errno;
use crate::units::HostRange;
use change::Effect;
use state::{State, will_be_retried};
use std::cell::Cell;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// What a disk keeps or loses as one, in bytes.
pub const SECTOR: u64 = 512;
/// The kinds of operations, for faults, holds and statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// [`File::read`] and [`File::read_cached`].
    Read,
    /// [`File::write`].
    Write,
    /// [`File::sync`].
    Sync,
    /// [`File::punch`], [`File::zero_range`] and [`File::allocate`].
    Fallocate,
}

/// How many operations were carried out, retries and failed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Reads that were answered at once ([`File::read_cached`]).
    pub cached_reads: u64,
    /// Writes.
    pub writes: u64,
    /// Syncs.
    pub syncs: u64,
    /// Punches, zeroed ranges and allocations.
    pub fallocates: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
}

/// A file in memory, its faults and its history. Clones are the same file; `Send` and `Sync`.
#[derive(Clone)]
pub struct MemDisk {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Told when a hold may have ended.
    released: Notify,
    /// Apart from the state, as it looks at the disk while it runs.
    hook: Mutex<Option<Hook>>,
}

type Hook = Box<dyn FnMut(&MemDisk) + Send>;

impl MemDisk {
    /// A disk that durably holds `content`. [`File::memory`] opens it.
    pub fn new(content: Vec<u8>, seed: u64) -> MemDisk {
        let state = State::new(&content, seed);
        MemDisk {
            shared: Arc::new(Shared { state: Mutex::new(state), released: Notify::new(), hook: Mutex::new(None) }),
        }
    }

    /// Operations wait, before they take effect and again before they complete, for up to `most` turns of the runtime
    /// each, so they overlap and complete out of order. Reads that do not wait find nothing half of the time.
    pub fn delay(&self, most: u64) {
        self.state().most_delay = most;
    }

    /// Reads and writes do only a part of what was asked, `percent` times of a hundred; [`File`] continues them.
    pub fn cut_short(&self, percent: u64) {
        self.state().cut_short = percent;
    }

    /// Writes and allocations that would make the file longer than `bytes` fail with ENOSPC.
    pub fn limit(&self, bytes: u64) {
        self.state().limit = bytes;
    }

    /// Adds an error to come. A write that fails may have stored a part of its sectors, from the first on.
    pub fn fail(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// Removes every fault.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Syncs succeed from now on without making anything durable: a control that a crash test must notice.
    pub fn lie(&self) {
        self.state().lying = true;
    }

    /// Operations of `kind` that begin from now on wait, without effect, until [`MemDisk::release`].
    pub fn hold(&self, kind: Kind) {
        let mut state = self.state();
        let hold = state.holds.entry(kind).or_default();
        (hold.on, hold.passes) = (true, 0);
    }

    /// How many operations of `kind` are held.
    pub fn held(&self, kind: Kind) -> usize {
        self.state().holds.get(&kind).map_or(0, |hold| hold.waiting)
    }

    /// Lets one operation of `kind`, held now or the next to come, go on; the hold stays.
    pub fn release_one(&self, kind: Kind) {
        self.state().holds.entry(kind).or_default().passes += 1;
        self.shared.released.notify_waiters();
    }

    /// Ends the hold on `kind`.
    pub fn release(&self, kind: Kind) {
        let mut state = self.state();
        let hold = state.holds.entry(kind).or_default();
        (hold.on, hold.passes) = (false, 0);
        drop(state);
        self.shared.released.notify_waiters();
    }

    /// Calls `hook` just before and just after each sync takes effect: the moments to take crash states. It replaces
    /// an earlier one. A sync that ends while the hook runs (the hook must not await one) does not call it again.
    pub fn on_barrier(&self, hook: impl FnMut(&MemDisk) + Send + 'static) {
        *self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(hook));
    }

    /// What a crash now might leave, chosen by `seed`.
    pub fn crash(&self, seed: &mut Seed) -> Vec<u8> {
        self.state().crash(seed)
    }

    /// `n` images a crash now might leave: first the one that lost everything not durable, then the one that lost
    /// nothing, then random ones.
    pub fn crash_states(&self, n: usize) -> Vec<Vec<u8>> {
        let mut state = self.state();
        let mut seed = Seed::new(state.crash_seed.draw());
        (0..n)
            .map(|i| match i {
                0 => state.durable.to_vec(),
                1 => state.all_kept().to_vec(),
                _ => state.crash(&mut seed),
            })
            .collect()
    }

    /// The content as reads see it.
    pub fn content(&self) -> Vec<u8> {
        self.state().volatile.to_vec()
    }

    /// The length as reads see it, in bytes.
    pub fn len(&self) -> u64 {
        self.state().volatile.len
    }

    /// Whether the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many changes a crash now could lose.
    pub fn unsynced(&self) -> usize {
        self.state().log.len()
    }

    /// Operations so far.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panicked elsewhere should not hide behind a second panic here.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call_hook(&self) {
        let lock = || self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = lock().take();
        if let Some(mut hook) = taken {
            hook(self);
            lock().get_or_insert(hook); // unless it has set another one
        }
    }
}

impl fmt::Debug for MemDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "MemDisk({} bytes, {} unsynced changes)", state.volatile.len, state.log.len())
    }
}

/// An open [`MemDisk`], as [`File`] sees it: one try of each operation.
pub(super) struct MemFile {
    disk: MemDisk,
    /// How many of the disk's failed syncs this open file knows of.
    seen_errors: Cell<u64>,
}

impl MemFile {
    pub(super) fn open(disk: &MemDisk) -> MemFile {
        MemFile { disk: disk.clone(), seen_errors: Cell::new(disk.state().sync_errors) }
    }

    /// Reads into a first part of `buf`.
    pub(super) async fn read(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.begin(Kind::Read).await;
        let outcome = {
            let mut state = self.disk.state();
            state.counts.reads += 1;
            state.fault(Kind::Read, at, buf.len() as u64).map(|()| {
                let len = state.part_of(buf.len());
                state.read(at, &mut buf[..len])
            })
        };
        self.delay().await;
        outcome
    }

    /// Reads a first part of `buf` unless that would take time: then EAGAIN.
    pub(super) fn read_now(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.disk.state();
        let held = state.holds.get(&Kind::Read).is_some_and(|hold| hold.on);
        if held || (state.most_delay > 0 && state.seed.chance(50)) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        state.counts.cached_reads += 1;
        state.fault(Kind::Read, at, buf.len() as u64)?;
        let len = state.part_of(buf.len());
        Ok(state.read(at, &mut buf[..len]))
    }

    /// Writes a first part of `bytes`.
    pub(super) async fn write(&self, at: u64, bytes: &[u8]) -> io::Result<usize> {
        self.begin(Kind::Write).await;
        let (outcome, change) = {
            let mut state = self.disk.state();
            state.counts.writes += 1;
            let fault =
                state.fault(Kind::Write, at, bytes.len() as u64).and_then(|()| state.room(at, bytes.len() as u64));
            match fault {
                Ok(()) => {
                    let len = state.part_of(bytes.len());
                    (Ok(len), state.write(at, &bytes[..len]))
                }
                Err(e) => {
                    let len = state.stored_by_failed_write(at, bytes.len(), &e);
                    (Err(e), state.write(at, &bytes[..len]))
                }
            }
        };
        self.complete(change).await;
        outcome
    }

    pub(super) async fn sync(&self) -> io::Result<()> {
        let completed = self.disk.state().completed();
        self.begin(Kind::Sync).await;
        self.disk.call_hook();
        let outcome = {
            let mut state = self.disk.state();
            state.counts.syncs += 1;
            let outcome = state.fault(Kind::Sync, 0, 0);
            match &outcome {
                Ok(()) if state.lying => {}
                Ok(()) => state.make_durable(&completed),
                Err(e) if will_be_retried(e) => {}
                Err(_) => state.fail_to_make_durable(&completed),
            }
            let unseen = self.seen_errors.replace(state.sync_errors) < state.sync_errors;
            if outcome.is_ok() && unseen { Err(Errno::EIO.into()) } else { outcome }
        };
        self.disk.call_hook();
        self.delay().await;
        outcome
    }

    pub(super) async fn fallocate(&self, r: HostRange, mode: i32) -> io::Result<()> {
        self.begin(Kind::Fallocate).await;
        let (at, len) = (r.start().0, r.len());
        let change = {
            let mut state = self.disk.state();
            state.counts.fallocates += 1;
            let extends = mode & libc::FALLOC_FL_KEEP_SIZE == 0;
            let room = if extends { state.room(at, len) } else { Ok(()) };
            state.fault(Kind::Fallocate, at, len).and(room).map(|()| {
                if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
                    // What lies past the end is a hole already.
                    let inside = state.volatile.len.saturating_sub(at).min(len);
                    state.change(at, Effect::Punch(inside))
                } else if mode & libc::FALLOC_FL_ZERO_RANGE != 0 {
                    state.change(at, Effect::Zero(len))
                } else {
                    state.change(at, Effect::Extend(len))
                }
            })
        };
        match change {
            Ok(change) => {
                self.complete(Some(change)).await;
                Ok(())
            }
            Err(e) => {
                self.delay().await;
                Err(e)
            }
        }
    }

    /// An operation has been asked for: it takes effect after its delay and its hold.
    async fn begin(&self, kind: Kind) {
        self.delay().await;
        let mut waiting = false;
        loop {
            // Made before the look at the hold, so that a release between the two is heard.
            let released = self.disk.shared.released.notified();
            if self.disk.state().may_pass(kind, &mut waiting) {
                return;
            }
            released.await;
        }
    }

    /// A change has taken effect: it completes after its delay.
    async fn complete(&self, change: Option<u64>) {
        self.delay().await;
        if let Some(change) = change {
            self.disk.state().set_completed(change);
        }
    }

    async fn delay(&self) {
        let turns = {
            let mut state = self.disk.state();
            let most = state.most_delay;
            state.seed.below(most + 1)
        };
        for _ in 0..turns {
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagebuf::PageBuf;
    use crate::ring::File;
    use crate::units::HostOffset;
    use futures_util::future::join;
    use std::collections::BTreeSet;
    use std::future::Future;
    use std::rc::Rc;

    /// No io_uring here: the double needs none.
    fn run<F: Future>(future: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, future)
    }

    fn range(start: u64, len: u64) -> HostRange {
        HostRange::checked(start, len).unwrap()
    }

    async fn put(file: &File, at: u64, byte: u8, len: usize) -> Result<(), Errno> {
        file.write(HostOffset(at), PageBuf::copy_of(&vec![byte; len])).await.0
    }

    async fn get(file: &File, at: u64, len: usize) -> Vec<u8> {
        let (outcome, buf) = file.read(HostOffset(at), PageBuf::new(len)).await;
        outcome.unwrap();
        buf.to_vec()
    }

    #[test]
    fn whole_lengths_whatever_the_disk_does() {
        let mut repeated = 0;
        for seed in 0..20 {
            let disk = MemDisk::new(Vec::new(), seed);
            disk.delay(3);
            disk.cut_short(70);
            disk.fail(Fault::new(Errno(libc::EINTR)).percent(30));
            disk.fail(Fault::new(Errno(libc::EAGAIN)).percent(30));
            run(async {
                let file = File::memory(&disk);
                let bytes: Vec<u8> = (0..50_000u32).map(|i| (i % 241) as u8 + 1).collect();
                let (written, back) = file.write(HostOffset(1000), PageBuf::copy_of(&bytes)).await;
                written.unwrap();
                assert!(back[..] == bytes, "seed {seed}: the buffer comes back as it went");
                file.sync().await.unwrap();
                file.punch(range(2000, 10)).await.unwrap();
                let seen = get(&file, 0, 60_000).await;
                assert!(seen[..1000].iter().all(|&b| b == 0) && seen[51_000..].iter().all(|&b| b == 0), "seed {seed}");
                assert!(seen[1000..2000] == bytes[..1000] && seen[2010..51_000] == bytes[1010..], "seed {seed}");
                assert!(seen[2000..2010].iter().all(|&b| b == 0), "seed {seed}");
            });
            repeated += disk.counts().writes + disk.counts().reads - 2;
        }
        assert!(repeated > 40, "calls were cut short and repeated: {repeated}");
    }

    #[test]
    fn a_cached_read_answers_at_once_or_not_at_all() {
        let disk = MemDisk::new(vec![7; 100], 1);
        let file = File::memory(&disk);
        let mut buf = [1; 200];
        assert_eq!(file.read_cached(HostOffset(50), &mut buf), Some(Ok(())));
        assert!(buf[..50] == [7; 50] && buf[50..] == [0; 150]);
        disk.hold(Kind::Read);
        assert_eq!(file.read_cached(HostOffset(50), &mut buf), None);
        disk.release(Kind::Read);
        disk.delay(1);
        let answers: BTreeSet<bool> = (0..50).map(|_| file.read_cached(HostOffset(0), &mut buf).is_some()).collect();
        assert_eq!(answers.len(), 2);
        disk.delay(0);
        disk.fail(Fault::new(Errno::EIO).on(Kind::Read));
        assert_eq!(file.read_cached(HostOffset(50), &mut buf), Some(Err(Errno::EIO)));
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_loses_tears_or_keeps_the_rest() {
        let disk = MemDisk::new(Vec::new(), 3);
        run(async {
            let file = File::memory(&disk);
            put(&file, 0, 1, 4096).await.unwrap();
            file.sync().await.unwrap();
            put(&file, 0, 2, 2048).await.unwrap();
            put(&file, 8192, 3, 512).await.unwrap();
        });
        assert_eq!(disk.unsynced(), 2);
        let states = disk.crash_states(200);
        assert_eq!(states[0], [1; 4096]);
        assert_eq!(states[1], disk.content());
        let mut heads = BTreeSet::new();
        for state in &states {
            assert!(state[2048..4096] == [1; 2048], "synced and not written since");
            assert!(state.len() == 4096 || (state.len() == 8704 && state[8192..] == [3; 512]));
            let sectors: Vec<u8> = state[..2048].chunks(512).map(|s| s[0]).collect();
            assert!(state[..2048].chunks(512).all(|s| s.iter().all(|&b| b == s[0])), "torn at sectors only");
            heads.insert((sectors, state.len()));
        }
        assert!(heads.len() > 8, "only {} different outcomes", heads.len());
        let mut dice = Seed::new(9);
        let one = disk.crash(&mut dice);
        assert_eq!(one, disk.crash(&mut Seed::new(9)), "a seed brings an image back");
    }

    /// Every byte of a crash image is the durable one or one written since, through thousands of random operations.
    #[test]
    fn no_crash_invents_or_resurrects_bytes() {
        const SIZE: u64 = 6000;
        for seed in 0..30 {
            let disk = MemDisk::new(vec![0; SIZE as usize], seed);
            disk.cut_short(20);
            let mut dice = Seed::new(seed ^ 0xabcd);
            let mut possible: Vec<BTreeSet<u8>> = vec![BTreeSet::from([0]); SIZE as usize];
            run(async {
                let file = File::memory(&disk);
                for step in 0..200 {
                    let at = dice.below(SIZE);
                    let len = 1 + dice.below(SIZE - at);
                    let byte = match dice.below(8) {
                        0 => {
                            file.sync().await.unwrap();
                            let now = disk.content();
                            possible.iter_mut().zip(now).for_each(|(set, b)| *set = BTreeSet::from([b]));
                            None
                        }
                        1 => file.punch(range(at, len)).await.map(|()| Some(0)).unwrap(),
                        2 => file.zero_range(range(at, len)).await.map(|()| Some(0)).unwrap(),
                        _ => {
                            put(&file, at, step as u8, len as usize).await.unwrap();
                            Some(step as u8)
                        }
                    };
                    if let Some(byte) = byte {
                        let touched = &mut possible[at as usize..(at + len) as usize];
                        for set in touched {
                            set.insert(byte);
                        }
                    }
                    let image = disk.crash(&mut dice);
                    let wrong = image.iter().zip(&possible).position(|(b, set)| !set.contains(b));
                    assert_eq!((wrong, image.len() as u64), (None, SIZE), "seed {seed} step {step}");
                }
            });
        }
    }

    #[test]
    fn a_lying_disk_loses_what_was_synced() {
        let disk = MemDisk::new(vec![0; 512], 1);
        disk.lie();
        run(async {
            let file = File::memory(&disk);
            put(&file, 0, 1, 512).await.unwrap();
            file.sync().await.unwrap();
        });
        assert!(disk.crash_states(1)[0] == [0; 512]);
    }

    #[test]
    fn a_sync_covers_what_had_completed_when_it_was_asked_for() {
        let disk = MemDisk::new(vec![0; 1024], 1);
        run(async {
            let (file, other) = (File::memory(&disk), File::memory(&disk));
            put(&file, 0, 1, 512).await.unwrap();
            disk.hold(Kind::Sync);
            let late = async {
                while disk.held(Kind::Sync) == 0 {
                    yield_now().await;
                }
                put(&other, 512, 2, 512).await.unwrap();
                disk.release(Kind::Sync);
            };
            join(file.sync(), late).await.0.unwrap();
        });
        assert_eq!(disk.unsynced(), 1);
        let lost = &disk.crash_states(1)[0];
        assert!(lost[..512] == [1; 512] && lost[512..] == [0; 512]);
    }

    /// An older write still under way must not reappear over a newer one that was synced.
    #[test]
    fn what_was_synced_stays_on_top() {
        let disk = MemDisk::new(vec![0; 2048], 1);
        {
            let mut state = disk.state();
            state.write(0, &[1; 2048]);
            let newer = state.write(512, &[2; 512]).unwrap();
            state.set_completed(newer);
            let completed = state.completed();
            state.make_durable(&completed);
        }
        for state in disk.crash_states(50) {
            assert!(state[512..1024] == [2; 512]);
        }
        assert!(disk.crash_states(2)[1] == disk.content());
    }

    #[test]
    fn a_failed_sync_loses_data_for_good_and_says_so_once_per_open_file() {
        let mut outcomes = BTreeSet::new();
        for seed in 0..20 {
            let disk = MemDisk::new(vec![0; 512], seed);
            run(async {
                let (file, other) = (File::memory(&disk), File::memory(&disk));
                put(&file, 0, 1, 512).await.unwrap();
                disk.fail(Fault::new(Errno::ENOSPC).on(Kind::Sync).nth(1));
                let clone = file.clone();
                assert_eq!(file.sync().await, Err(Errno::ENOSPC));
                assert_eq!(clone.sync().await, Err(Errno::EIO), "sticky, for every clone");
                assert_eq!(disk.counts().syncs, 1, "the kernel, which would now lie, is not asked again");
                assert_eq!(other.sync().await, Err(Errno::EIO), "told, although it was not its sync");
                assert_eq!(other.sync().await, Err(Errno::EIO), "and sticky there too");
                File::memory(&disk).sync().await.unwrap();
            });
            assert_eq!((disk.unsynced(), disk.content()), (0, vec![1; 512]));
            outcomes.insert(disk.crash_states(2)[1][0]);
        }
        assert_eq!(outcomes, BTreeSet::from([0, 1]), "lost or kept, by the seed");
    }

    #[test]
    fn an_overlapping_sync_hears_of_the_failure() {
        let disk = MemDisk::new(Vec::new(), 1);
        disk.delay(3);
        disk.fail(Fault::new(Errno::EIO).on(Kind::Sync).nth(1));
        run(async {
            let file = File::memory(&disk);
            assert_eq!(join(file.sync(), file.sync()).await, (Err(Errno::EIO), Err(Errno::EIO)));
        });
    }

    #[test]
    fn faults_strike_where_and_when_told() {
        let disk = MemDisk::new(vec![0; 4096], 5);
        run(async {
            let file = File::memory(&disk);
            disk.fail(Fault::new(Errno::EIO).on(Kind::Write).nth(2));
            put(&file, 0, 1, 512).await.unwrap();
            get(&file, 0, 10).await;
            assert_eq!(put(&file, 512, 1, 512).await, Err(Errno::EIO));
            put(&file, 512, 1, 512).await.unwrap();
            disk.fail(Fault::new(Errno::EIO).within(range(1000, 10)));
            assert_eq!(put(&file, 1009, 1, 1).await, Err(Errno::EIO));
            assert_eq!(file.read(HostOffset(0), PageBuf::new(1001)).await.0, Err(Errno::EIO));
            assert_eq!(file.punch(range(900, 200)).await, Err(Errno::EIO));
            put(&file, 1010, 1, 512).await.unwrap();
            get(&file, 0, 1000).await;
            file.sync().await.unwrap();
            disk.heal();
            put(&file, 1000, 1, 10).await.unwrap();
            disk.fail(Fault::new(Errno::EIO).on(Kind::Read).percent(50));
            let mut failures = 0;
            for _ in 0..100 {
                failures += usize::from(file.read(HostOffset(0), PageBuf::new(1)).await.0.is_err());
            }
            assert!((20..80).contains(&failures), "{failures}");
        });
    }

    #[test]
    fn a_failed_write_may_have_stored_its_first_sectors() {
        let mut lengths = BTreeSet::new();
        for seed in 0..50 {
            let disk = MemDisk::new(vec![0; 2048], seed);
            disk.fail(Fault::new(Errno::EIO).on(Kind::Write));
            run(async { assert_eq!(put(&File::memory(&disk), 0, 1, 2048).await, Err(Errno::EIO)) });
            let content = disk.content();
            let stored = content.iter().take_while(|&&b| b == 1).count();
            assert!(content[stored..].iter().all(|&b| b == 0));
            lengths.insert(stored);
        }
        assert_eq!(lengths, BTreeSet::from([0, 512, 1024, 1536]));
    }

    #[test]
    fn a_full_disk_takes_no_more() {
        let disk = MemDisk::new(Vec::new(), 1);
        disk.limit(4096);
        run(async {
            let file = File::memory(&disk);
            put(&file, 0, 1, 4096).await.unwrap();
            assert_eq!(put(&file, 4096, 1, 1).await, Err(Errno::ENOSPC));
            assert_eq!(file.allocate(range(0, 8192)).await, Err(Errno::ENOSPC));
            assert_eq!(file.zero_range(range(1 << 60, 1 << 61)).await, Err(Errno::ENOSPC));
            put(&file, 0, 2, 4096).await.unwrap();
            file.punch(range(1 << 60, 1 << 61)).await.unwrap();
        });
        assert_eq!(disk.len(), 4096);
    }

    #[test]
    fn held_operations_wait_and_go_on_when_released() {
        let disk = MemDisk::new(Vec::new(), 1);
        run(async {
            let file = File::memory(&disk);
            disk.hold(Kind::Write);
            let order = Rc::new(Cell::new(0));
            for byte in [1, 2, 3] {
                let (file, order) = (file.clone(), Rc::clone(&order));
                tokio::task::spawn_local(async move {
                    put(&file, 0, byte, 512).await.unwrap();
                    order.set(order.get() * 10 + byte);
                });
            }
            let settle = async || {
                for _ in 0..20 {
                    yield_now().await;
                }
            };
            settle().await;
            assert_eq!((disk.held(Kind::Write), disk.len(), order.get()), (3, 0, 0));
            get(&file, 0, 512).await;
            disk.release_one(Kind::Write);
            settle().await;
            assert_eq!((disk.held(Kind::Write), order.get()), (2, 1));
            disk.release(Kind::Write);
            settle().await;
            assert_eq!((disk.held(Kind::Write), order.get(), disk.content()), (0, 123, vec![3; 512]));
        });
    }

    #[test]
    fn delays_reorder_and_a_seed_repeats_the_order() {
        let order_of = |seed| {
            let disk = MemDisk::new(Vec::new(), seed);
            disk.delay(5);
            let order = Arc::new(Mutex::new(Vec::new()));
            run(async {
                let file = File::memory(&disk);
                let one = |byte: u8| {
                    let (file, order) = (&file, &order);
                    async move {
                        put(file, 0, byte, 512).await.unwrap();
                        order.lock().unwrap().push(byte);
                    }
                };
                futures_util::future::join_all((1..=4).map(one)).await;
            });
            let order = order.lock().unwrap().clone();
            (order, disk.content()[0])
        };
        let orders: BTreeSet<_> = (0..50).map(order_of).collect();
        assert!(orders.len() > 10, "{}", orders.len());
        assert!((0..50).all(|seed| order_of(seed) == order_of(seed)));
    }

    #[test]
    fn the_hook_sees_the_disk_at_each_barrier() {
        let disk = MemDisk::new(vec![0; 512], 1);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        disk.on_barrier(move |disk| log.lock().unwrap().push(disk.crash_states(1)[0][0]));
        run(async {
            let file = File::memory(&disk);
            put(&file, 0, 1, 512).await.unwrap();
            file.sync().await.unwrap();
            file.sync().await.unwrap();
        });
        assert_eq!(*seen.lock().unwrap(), [0, 1, 1, 1], "before and after each sync");
    }

    #[test]
    fn fallocate_changes_sizes_and_can_be_lost() {
        let disk = MemDisk::new(vec![9; 4096], 1);
        run(async {
            let file = File::memory(&disk);
            file.punch(range(4000, 10_000)).await.unwrap();
            assert_eq!(disk.len(), 4096, "a punch does not extend");
            file.zero_range(range(0, 512)).await.unwrap();
            file.allocate(range(4096, 4096)).await.unwrap();
            assert_eq!(disk.len(), 8192);
            assert!(get(&file, 512, 4000 - 512).await.iter().all(|&b| b == 9));
            assert!(disk.content()[..512] == [0; 512] && disk.content()[4000..] == [0; 4192]);
        });
        let states = disk.crash_states(100);
        assert_eq!(states[0], [9; 4096]);
        for at in [0, 4050] {
            assert_eq!(states.iter().map(|s| s[at]).collect::<BTreeSet<u8>>(), BTreeSet::from([0, 9]));
        }
        assert!(states.iter().map(Vec::len).collect::<BTreeSet<_>>().len() > 2, "sizes between are possible too");
    }
}
