//! [`File`]: a file or block device as the image layer uses it.
//!
//! Promises: whole lengths (short counts are continued, EINTR and EAGAIN retried, here and nowhere else), zeroes past
//! the end of the file, the buffer comes back on success and on failure, and a failed sync stays failed.

use super::exclusive::Exclusive;
use super::mem::{MemDisk, MemFile};
use super::real::Real;
use super::runtime::yield_now;
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::units::{HostOffset, HostRange};
use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How often EAGAIN is met with an immediate retry before retries are spaced by [`AGAIN_PAUSE`].
const AGAIN_AT_ONCE: u32 = 8;
/// Pause between later retries.
const AGAIN_PAUSE: Duration = Duration::from_millis(1);
/// Retries of one operation after which EAGAIN is reported: about five seconds.
const AGAIN_LIMIT: u32 = 5000;

/// An open file. Cheap to clone; all clones are one open file. Lives on one thread (`!Send`).
///
/// The descriptor is closed (and its locks released) when the last clone and the last operation are gone.
#[derive(Clone)]
pub struct File {
    inner: Rc<Inner>,
}

struct Inner {
    backend: Backend,
    sync: SyncGate,
}

enum Backend {
    Real(Real),
    Memory(MemFile),
}

impl File {
    /// Takes over a file or block device opened with the access it needs.
    ///
    /// Give each thread a file it opened itself, not a duplicated descriptor: the kernel reports a write-back error once
    /// per open file, so of two threads that share one only the first to sync would hear of it.
    pub fn from_std(file: std::fs::File) -> File {
        File::new(Backend::Real(Real::new(file)))
    }

    /// The same for a block device that a descriptor somewhere else may have for itself: what it must do, it does.
    pub fn of_device(file: std::fs::File, exclusive: Arc<Exclusive>) -> File {
        File::new(Backend::Real(Real::new(file).with(exclusive)))
    }

    /// A file of the test double. Each is an open file of its own.
    pub fn memory(disk: &MemDisk) -> File {
        File::new(Backend::Memory(MemFile::open(disk)))
    }

    fn new(backend: Backend) -> File {
        File { inner: Rc::new(Inner { backend, sync: SyncGate::default() }) }
    }

    /// Fills all of `buf` from `at`; bytes past the end of the file are zeroes.
    ///
    /// Errors: EINVAL for a range past the largest file offset, else what the kernel reports; then the contents of
    /// `buf` are unspecified.
    pub async fn read(&self, at: HostOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if let Err(e) = check(at, buf.len() as u64) {
            return (Err(e), buf);
        }
        let mut done = 0;
        let mut patience = Patience::default();
        while done < buf.len() {
            let outcome;
            (outcome, buf) = self.inner.backend.read(at.0 + done as u64, buf, done).await;
            match outcome {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(count) => {
                    done += count;
                    patience = Patience::default();
                }
                Err(e) => {
                    if let Err(e) = patience.after(e).await {
                        return (Err(e), buf);
                    }
                }
            }
        }
        (Ok(()), buf)
    }

    /// Fills all of `buf` when that needs no waiting (the page cache has it), else `None`: use [`File::read`].
    ///
    /// For a caller that can answer at once; [`File::read`] itself takes from the page cache what is there.
    /// After `None` and after an error the contents of `buf` are unspecified.
    pub fn read_cached(&self, at: HostOffset, buf: &mut [u8]) -> Option<Result<(), Errno>> {
        if let Err(e) = check(at, buf.len() as u64) {
            return Some(Err(e));
        }
        let mut done = 0;
        while done < buf.len() {
            match self.inner.backend.read_now(at.0 + done as u64, &mut buf[done..]) {
                // Only a zero count is the end of the file; a short one may just be where the cached pages end.
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return None,
                Err(e) => return Some(Err(e.into())),
            }
        }
        Some(Ok(()))
    }

    /// The descriptor, for operations on a ring of somebody else's; `None` for the test double. Who uses it continues
    /// short counts and tries again himself, or has [`File::read`] and [`File::write`] do all of it anew.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.inner.backend {
            Backend::Real(real) => Some(real.fd()),
            Backend::Memory(_) => None,
        }
    }

    /// Whether the file system says that nothing is stored in the range, which reads as zeroes then: for who would read
    /// much of nothing in a sparse file. False when that is not known.
    pub fn is_hole(&self, r: HostRange) -> bool {
        check(r.start(), r.len()).is_ok() && self.inner.backend.is_hole(r)
    }

    /// Stores all of `buf` at `at`, extending the file as needed; durable only after a later [`File::sync`].
    ///
    /// Errors: EINVAL for a range past the largest file offset, else what the kernel reports; then any part of `buf`
    /// may have been stored.
    pub async fn write(&self, at: HostOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if let Err(e) = check(at, buf.len() as u64) {
            return (Err(e), buf);
        }
        let mut done = 0;
        let mut patience = Patience::default();
        while done < buf.len() {
            let outcome;
            (outcome, buf) = self.inner.backend.write(at.0 + done as u64, buf, done).await;
            match outcome {
                // No error and no progress: going on would never end.
                Ok(0) => return (Err(Errno::EIO), buf),
                Ok(count) => {
                    done += count;
                    patience = Patience::default();
                }
                Err(e) => {
                    if let Err(e) = patience.after(e).await {
                        return (Err(e), buf);
                    }
                }
            }
        }
        (Ok(()), buf)
    }

    /// Makes every write and fallocate that completed before this call durable (fdatasync, with the file's size).
    ///
    /// Calls that overlap share a sync. A failure is final: this and every later call on this file (any clone) fails,
    /// the later ones with EIO. After a failed sync the kernel may have marked the lost pages clean, so the next
    /// fdatasync would report success for data that never reached the disk. Only opening the file anew starts over.
    /// Dropping the future of a sync under way counts as its failure: the outcome went unseen.
    pub async fn sync(&self) -> Result<(), Errno> {
        self.inner.sync.pass(|| self.retry(|| self.inner.backend.sync())).await
    }

    /// Gives the storage of the range back; it reads as zeroes. The file's size stays.
    ///
    /// Errors: EINVAL for a range past the largest file offset; ENOTSUP when the file system or device cannot.
    pub async fn punch(&self, r: HostRange) -> Result<(), Errno> {
        self.fallocate(r, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).await
    }

    /// Whether it is a block device: all of it is there, and zeroes may take as long as data.
    pub fn is_device(&self) -> bool {
        match &self.inner.backend {
            Backend::Real(real) => real.is_device(),
            Backend::Memory(_) => false,
        }
    }

    /// Whether the file may be able to hold so many bytes: false only when the file system surely has not enough room.
    pub fn may_hold(&self, len: u64) -> bool {
        match &self.inner.backend {
            Backend::Real(real) => real.room().is_none_or(|room| len <= room),
            Backend::Memory(_) => true,
        }
    }

    /// Makes the range read as zeroes with storage kept or reserved for it, extending the file as needed.
    ///
    /// Errors: EINVAL for a range past the largest file offset; ENOTSUP when the file system or device cannot.
    pub async fn zero_range(&self, r: HostRange) -> Result<(), Errno> {
        self.fallocate(r, libc::FALLOC_FL_ZERO_RANGE).await
    }

    /// Reserves storage for the range, extending the file as needed; contents stay, new ones are zeroes.
    ///
    /// Errors: EINVAL for a range past the largest file offset; ENOTSUP when the file system cannot; ENOSPC.
    pub async fn allocate(&self, r: HostRange) -> Result<(), Errno> {
        self.fallocate(r, 0).await
    }

    async fn fallocate(&self, r: HostRange, mode: i32) -> Result<(), Errno> {
        check(r.start(), r.len())?;
        if r.is_empty() {
            return Ok(()); // the kernel calls an empty range EINVAL
        }
        self.retry(|| self.inner.backend.fallocate(r, mode)).await
    }

    /// An operation that can be repeated as a whole.
    async fn retry(&self, mut op: impl AsyncFnMut() -> io::Result<()>) -> Result<(), Errno> {
        let mut patience = Patience::default();
        loop {
            match op().await {
                Ok(()) => return Ok(()),
                Err(e) => patience.after(e).await?,
            }
        }
    }
}

/// File offsets are signed in the kernel, and offset -1 means "the file's cursor" to io_uring.
fn check(at: HostOffset, len: u64) -> Result<(), Errno> {
    match at.0.checked_add(len) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

/// Which errors are met with another try.
#[derive(Default)]
struct Patience {
    agains: u32,
}

impl Patience {
    /// Returns when the operation should be tried again, or the error to report.
    async fn after(&mut self, e: io::Error) -> Result<(), Errno> {
        match e.raw_os_error() {
            Some(libc::EINTR) => Ok(()),
            Some(libc::EAGAIN) if self.agains < AGAIN_LIMIT => {
                self.agains += 1;
                if self.agains <= AGAIN_AT_ONCE {
                    yield_now().await
                } else {
                    tokio::time::sleep(AGAIN_PAUSE).await
                }
                Ok(())
            }
            _ => Err(e.into()),
        }
    }
}

/// Lets one sync run at a time, shares it between callers that wait, and remembers failure.
///
/// One at a time is needed for correctness: the kernel gives a write-back error to one of two overlapping syncs only,
/// and the other one's success may be seen first.
#[derive(Default)]
struct SyncGate {
    failed: Cell<bool>,
    running: Cell<bool>,
    started: Cell<u64>,
    finished: Cell<u64>,
    turn: Notify,
}

impl SyncGate {
    async fn pass(&self, sync: impl AsyncFnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        // A sync already running may have passed over our writes: the next one to start is ours.
        let mine = self.started.get() + 1;
        loop {
            if self.failed.get() {
                return Err(Errno::EIO);
            }
            if self.finished.get() >= mine {
                return Ok(());
            }
            if !self.running.get() {
                break;
            }
            self.turn.notified().await;
        }
        let running = Running::start(self);
        let outcome = sync().await;
        running.end(&outcome);
        outcome
    }
}

/// The caller whose sync runs.
#[must_use = "dropping it without an outcome counts as a failure"]
struct Running<'a> {
    gate: &'a SyncGate,
    number: u64,
    ended: bool,
}

impl<'a> Running<'a> {
    fn start(gate: &'a SyncGate) -> Self {
        gate.running.set(true);
        gate.started.set(gate.started.get() + 1);
        Running { gate, number: gate.started.get(), ended: false }
    }

    fn end(mut self, outcome: &Result<(), Errno>) {
        match outcome {
            Ok(()) => self.gate.finished.set(self.number),
            Err(_) => self.gate.failed.set(true),
        }
        self.ended = true;
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // The future was dropped, which nobody should do: the sync goes on, and its error would go unseen.
            self.gate.failed.set(true);
        }
        self.gate.running.set(false);
        self.gate.turn.notify_waiters();
    }
}

/// One try of an operation: short counts, EINTR and EAGAIN are for [`File`] to deal with.
impl Backend {
    /// Reads into `buf[from..]`.
    async fn read(&self, at: u64, mut buf: PageBuf, from: usize) -> (io::Result<usize>, PageBuf) {
        match self {
            Backend::Real(real) => real.read(at, buf, from).await,
            Backend::Memory(mem) => (mem.read(at, &mut buf[from..]).await, buf),
        }
    }

    /// Reads what needs no waiting; EAGAIN when nothing does.
    fn read_now(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Backend::Real(real) => real.read_now(at, buf),
            Backend::Memory(mem) => mem.read_now(at, buf),
        }
    }

    fn is_hole(&self, r: HostRange) -> bool {
        match self {
            Backend::Real(real) => real.is_hole(r.start().0, r.len()),
            Backend::Memory(_) => false,
        }
    }

    /// Writes `buf[from..]`.
    async fn write(&self, at: u64, buf: PageBuf, from: usize) -> (io::Result<usize>, PageBuf) {
        match self {
            Backend::Real(real) => real.write(at, buf, from).await,
            Backend::Memory(mem) => (mem.write(at, &buf[from..]).await, buf),
        }
    }

    async fn sync(&self) -> io::Result<()> {
        match self {
            Backend::Real(real) => real.sync().await,
            Backend::Memory(mem) => mem.sync().await,
        }
    }

    async fn fallocate(&self, r: HostRange, mode: i32) -> io::Result<()> {
        match self {
            Backend::Real(real) => real.fallocate(r, mode).await,
            Backend::Memory(mem) => mem.fallocate(r, mode).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::real::IN_PLACE_MAX;
    use crate::ring::run;
    use nix::fcntl::{FcntlArg, fcntl};
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    const MIB: usize = 1 << 20;

    fn pattern(len: usize) -> PageBuf {
        let mut buf = PageBuf::new(len);
        for (i, b) in buf.iter_mut().enumerate() {
            *b = (i / 7 % 251) as u8 + 1;
        }
        buf
    }

    fn with_file<T>(test: impl AsyncFnOnce(File, &std::fs::File) -> T) -> T {
        let std = tempfile::tempfile().unwrap();
        let file = File::from_std(std.try_clone().unwrap());
        run(test(file, &std)).unwrap()
    }

    #[test]
    fn three_mebibytes_go_out_and_come_back() {
        with_file(async |file, std| {
            let (written, buf) = file.write(HostOffset(12_345), pattern(3 * MIB)).await;
            written.unwrap();
            let mut seen = vec![0; 3 * MIB];
            std.read_exact_at(&mut seen, 12_345).unwrap();
            assert!(seen == buf[..]);
            let (read, back) = file.read(HostOffset(12_345), PageBuf::zeroed(3 * MIB)).await;
            read.unwrap();
            assert!(back[..] == buf[..]);
        });
    }

    #[test]
    fn past_the_end_are_zeroes() {
        with_file(async |file, std| {
            std.write_all_at(&[9; 5000], 0).unwrap();
            let mut dirty = PageBuf::new(3 * MIB);
            dirty.fill(0xee);
            let (read, mut buf) = file.read(HostOffset(4000), dirty).await;
            read.unwrap();
            assert!(buf[..1000].iter().all(|&b| b == 9) && buf[1000..].iter().all(|&b| b == 0));
            buf.fill(0xee);
            if let Some(read) = file.read_cached(HostOffset(4000), &mut buf) {
                read.unwrap();
                assert!(buf[..1000].iter().all(|&b| b == 9) && buf[1000..].iter().all(|&b| b == 0));
            } else {
                assert_eq!(file.read_cached(HostOffset(0), &mut [0]), None, "this file system never answers at once");
            }
            buf.fill(0xee);
            let (read, buf) = file.read(HostOffset(1 << 40), buf).await;
            read.unwrap();
            assert!(buf.iter().all(|&b| b == 0));
        });
    }

    /// Every way a write can take (in place by pieces, through the ring, both) stores the same bytes.
    #[test]
    fn writes_of_all_alignments_arrive() {
        with_file(async |file, std| {
            for (at, len) in [(0, 4096), (8192, 3 * IN_PLACE_MAX), (4096, IN_PLACE_MAX + 512), (3, 5), (512, 8192)] {
                let (written, buf) = file.write(HostOffset(at), pattern(len)).await;
                written.unwrap();
                let mut seen = vec![0; len];
                std.read_exact_at(&mut seen, at).unwrap();
                assert!(seen == buf[..], "{len} bytes at {at}");
            }
        });
    }

    /// A task that only hits the page cache lets others have their turn.
    #[test]
    fn cached_work_does_not_keep_the_thread() {
        with_file(async |file, _| {
            file.write(HostOffset(0), pattern(4096)).await.0.unwrap();
            let turns = Rc::new(Cell::new(0));
            let other = Rc::clone(&turns);
            crate::ring::spawn(async move {
                loop {
                    other.set(other.get() + 1);
                    yield_now().await;
                }
            });
            let mut buf = PageBuf::new(4096);
            for i in 0..10_000 {
                let outcome;
                (outcome, buf) = file.read(HostOffset(0), buf).await;
                outcome.unwrap();
                (_, buf) = file.write(HostOffset(0), buf).await;
                assert!(i < 1000 || turns.get() > 0, "the other task never ran");
            }
            assert!(turns.get() > 50, "{}", turns.get());
        });
    }

    #[test]
    fn the_last_offsets_are_refused_not_taken_for_the_cursor() {
        with_file(async |file, std| {
            std.write_all_at(&[9; 16], 0).unwrap();
            for at in [u64::MAX, u64::MAX - 8, i64::MAX as u64] {
                let mut buf = PageBuf::zeroed(8);
                assert_eq!(file.read_cached(HostOffset(at), &mut buf), Some(Err(Errno::EINVAL)));
                assert_eq!(file.read(HostOffset(at), buf).await.0, Err(Errno::EINVAL));
                assert_eq!(file.write(HostOffset(at), PageBuf::zeroed(8)).await.0, Err(Errno::EINVAL));
            }
            let far = HostRange::checked(i64::MAX as u64, 1).unwrap();
            assert_eq!(file.punch(far).await, Err(Errno::EINVAL));
        });
    }

    #[test]
    fn punched_and_zeroed_ranges_read_as_zeroes() {
        with_file(async |file, std| {
            file.write(HostOffset(0), pattern(MIB)).await.0.unwrap();
            let zeroed = file.zero_range(HostRange::checked(MIB as u64 - 4096, 8192).unwrap()).await;
            if zeroed == Err(Errno::ENOTSUP) {
                return; // so says tmpfs
            }
            zeroed.unwrap();
            file.punch(HostRange::checked(4096, 8192).unwrap()).await.unwrap();
            file.punch(HostRange::checked(2 * MIB as u64, 4096).unwrap()).await.unwrap();
            file.punch(HostRange::checked(2 * MIB as u64, 0).unwrap()).await.unwrap();
            assert_eq!(std.metadata().unwrap().len(), MIB as u64 + 4096, "punch keeps the size, zero_range extends it");
            let (_, buf) = file.read(HostOffset(0), PageBuf::new(MIB)).await;
            let whole = pattern(MIB);
            assert!(buf[4096..12288].iter().all(|&b| b == 0) && buf[MIB - 4096..].iter().all(|&b| b == 0));
            assert!(buf[..4096] == whole[..4096] && buf[12288..MIB - 4096] == whole[12288..MIB - 4096]);
            file.allocate(HostRange::checked(0, 3 * MIB as u64).unwrap()).await.unwrap();
            assert_eq!(std.metadata().unwrap().len(), 3 * MIB as u64);
            assert_eq!(file.read(HostOffset(0), PageBuf::new(4096)).await.1[..], whole[..4096]);
        });
    }

    #[test]
    fn errors_give_the_buffer_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("read-only");
        std::fs::write(&path, [1; 100]).unwrap();
        run(async {
            let file = File::from_std(std::fs::File::open(&path).unwrap());
            let (outcome, buf) = file.write(HostOffset(0), pattern(100)).await;
            assert_eq!(outcome, Err(Errno(libc::EBADF)));
            assert_eq!(buf[..], pattern(100)[..]);
            let (outcome, buf) = file.write(HostOffset(0), PageBuf::new(0)).await;
            assert_eq!((outcome, buf.len()), (Ok(()), 0));
        })
        .unwrap();
    }

    #[test]
    fn a_cut_buffer_touches_its_own_bytes_only() {
        with_file(async |file, std| {
            std.write_all_at(&[5; 300], 0).unwrap();
            let mut head = PageBuf::zeroed(300);
            let mut middle = head.split_to(200);
            let first = middle.split_to(100);
            let (read, middle) = file.read(HostOffset(0), middle).await;
            read.unwrap();
            assert!(middle.iter().all(|&b| b == 5));
            assert!(first.iter().chain(head.iter()).all(|&b| b == 0));
        });
    }

    #[test]
    fn a_nonblocking_opener_does_not_make_reads_fail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [3; 4096]).unwrap();
        let std = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let again = std.try_clone().unwrap();
        run(async {
            let file = File::from_std(std);
            assert_eq!(fcntl(&again, FcntlArg::F_GETFL).unwrap() & libc::O_NONBLOCK, 0);
            let (read, buf) = file.read(HostOffset(0), PageBuf::new(4096)).await;
            read.unwrap();
            assert!(buf.iter().all(|&b| b == 3));
        })
        .unwrap();
    }

    #[test]
    fn sync_reaches_a_real_file_and_overlapping_calls_share() {
        with_file(async |file, _| {
            file.write(HostOffset(0), pattern(4096)).await.0.unwrap();
            let all = futures_util::future::join_all((0..10).map(|_| file.sync())).await;
            assert!(all.iter().all(|r| r.is_ok()));
            assert_eq!(file.inner.sync.started.get(), 2, "the first runs, the other nine wait for one more");
        });
    }

    #[test]
    fn a_failed_sync_stays_failed() {
        // A pipe cannot be synced: the kernel says EINVAL.
        let (reader, _writer) = std::io::pipe().unwrap();
        run(async {
            let file = File::from_std(std::os::fd::OwnedFd::from(reader).into());
            assert_eq!(file.sync().await, Err(Errno::EINVAL));
            assert_eq!(file.clone().sync().await, Err(Errno::EIO));
        })
        .unwrap();
    }
}
