//! A file of the kernel: one try of each operation, in place or through the ring. [`super::file`] continues short
//! counts, retries, and has checked that offsets fit the kernel's.

use super::exclusive::Exclusive;
use super::pace::Pace;
use super::runtime::{Held, yield_now};
use crate::pagebuf::{PAGE, PageBuf};
use crate::units::HostRange;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statvfs::fstatvfs;
use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Instant;
use tokio_uring::buf::{IoBuf, IoBufMut};

/// A file of the kernel.
///
/// What the page cache can serve is done in place, the rest goes through the ring. A read that does not wait
/// (RWF_NOWAIT) costs a quarter of a ring's round trip when it hits, and when it misses it has started the
/// read-ahead. A buffered write in place costs a fifth to a half, as ext4 among others makes io_uring hand it to a
/// kernel thread: `kernel-notes/2026-11-22-ext4-buffered-writes-in-io-uring.md`. [`Pace`] sees to it that neither
/// keeps the thread from its other tasks.
pub(super) struct Real {
    file: tokio_uring::fs::File,
    /// Reads that do not wait are possible: the file is cached, and the file system has not said otherwise.
    reads_nowait: Cell<bool>,
    /// Buffered writes may be done in place.
    pub(super) writes_in_place: bool,
    /// Writes that do not wait are possible: the file system has not said otherwise.
    writes_nowait: Cell<bool>,
    /// Where the device's exclusive descriptor is, if there is one.
    exclusive: Option<Arc<Exclusive>>,
}

/// Largest write done in place, in bytes; a longer one is done in pieces. 256 KiB take 25 to 40 us when memory is hot.
pub(super) const IN_PLACE_MAX: usize = 256 << 10;

impl Real {
    pub(super) fn new(file: std::fs::File) -> Self {
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
        if flags.contains(OFlag::O_NONBLOCK) {
            // Openers use it so as not to hang on a FIFO; left on, io_uring would answer EAGAIN instead of waiting.
            // Should it fail, reads that must wait are retried: slower, not wrong.
            let _ = fcntl(&file, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK));
        }
        // With O_DIRECT the disk's work, with O_DSYNC (a part of O_SYNC) also its flush would be done inside the call.
        let is_disk = file.metadata().is_ok_and(|m| m.is_file() || m.file_type().is_block_device());
        let cached = is_disk && !flags.contains(OFlag::O_DIRECT);
        Real {
            file: tokio_uring::fs::File::from_std(file),
            reads_nowait: Cell::new(cached),
            writes_in_place: cached && !flags.contains(OFlag::O_DSYNC),
            writes_nowait: Cell::new(true),
            exclusive: None,
        }
    }

    pub(super) fn with(self, exclusive: Arc<Exclusive>) -> Self {
        Real { exclusive: Some(exclusive), ..self }
    }

    /// Reads into a first part of `buf[from..]`.
    pub(super) async fn read(&self, at: u64, mut buf: PageBuf, from: usize) -> (io::Result<usize>, PageBuf) {
        match self.read_now(at, &mut buf[from..]) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                let (outcome, lent) = self.file.read_at(Lent::new(buf, from), at).await;
                (outcome, lent.buf)
            }
            outcome => {
                in_place(&outcome).await;
                (outcome, buf)
            }
        }
    }

    /// Reads into a first part of `buf` what needs no waiting; EAGAIN when nothing does.
    pub(super) fn read_now(&self, at: u64, buf: &mut [u8]) -> io::Result<usize> {
        if !self.reads_nowait.get() {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let at = at as libc::off64_t; // `check` saw to the sign
        // SAFETY: one iovec over `buf`, borrowed mutably until the call, which does not outlast itself, returns; the
        // descriptor is open as long as `self`.
        let count = unsafe { libc::preadv2(self.file.as_raw_fd(), &iov, 1, at, libc::RWF_NOWAIT) };
        let outcome = counted(count);
        if unsupported(&outcome) {
            self.reads_nowait.set(false);
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        outcome
    }

    /// Writes a first part of `buf[from..]`.
    pub(super) async fn write(&self, at: u64, buf: PageBuf, from: usize) -> (io::Result<usize>, PageBuf) {
        match self.write_now(at, &buf[from..]) {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
                let (outcome, lent) = self.file.write_at(Lent::new(buf, from), at).submit().await;
                (outcome, lent.buf)
            }
            outcome => {
                in_place(&outcome).await;
                (outcome, buf)
            }
        }
    }

    pub(super) async fn sync(&self) -> io::Result<()> {
        self.file.sync_data().await
    }

    pub(super) async fn fallocate(&self, r: HostRange, mode: i32) -> io::Result<()> {
        if let Some(exclusive) = &self.exclusive
            && let Some(done) = exclusive.fallocate(r, mode).await
        {
            return done;
        }
        self.file.fallocate(r.start().0, r.len(), mode).await
    }

    pub(super) fn is_device(&self) -> bool {
        fstat(self.fd()).is_ok_and(|meta| kind(&meta) == SFlag::S_IFBLK)
    }

    /// What the file occupies and what the file system has left, in bytes; `None` when that is not known or says nothing.
    pub(super) fn room(&self) -> Option<u64> {
        let (meta, system) = (fstat(self.fd()).ok()?, fstatvfs(self.fd()).ok()?);
        // a file system without a size of its own says 0
        if kind(&meta) != SFlag::S_IFREG || system.blocks() == 0 {
            return None;
        }
        let free = system.blocks_free().saturating_mul(system.fragment_size());
        Some(free.saturating_add(u64::try_from(meta.st_blocks).ok()?.saturating_mul(512)))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`, which what is returned borrows.
        unsafe { BorrowedFd::borrow_raw(self.file.as_raw_fd()) }
    }

    /// Whether nothing is stored from `at` on for `len` bytes. Not knowing is "no".
    pub(super) fn is_hole(&self, at: u64, len: u64) -> bool {
        let at = at as libc::off64_t; // `check` saw to the sign
        // SAFETY: no memory is handed over; the descriptor is open as long as `self`. Its cursor, which this moves, is
        // used by nothing else here.
        let data = unsafe { libc::lseek64(self.file.as_raw_fd(), at, libc::SEEK_DATA) };
        match u64::try_from(data) {
            Ok(data) => data >= at as u64 + len,
            // there is no data up to the end of the file
            Err(_) => io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO),
        }
    }

    /// Writes a first piece of `bytes` in place; EAGAIN when it should go through the ring.
    fn write_now(&self, at: u64, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(IN_PLACE_MAX)];
        // A page written in part may have to be read from the disk first.
        let whole_pages = (at | piece.len() as u64).is_multiple_of(PAGE as u64);
        let start = Instant::now();
        if !self.writes_in_place || !whole_pages || !Pace::here(|pace| pace.may_write(start)) {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let mut outcome = if self.writes_nowait.get() {
            self.pwritev2(at, piece, libc::RWF_NOWAIT)
        } else {
            self.pwritev2(at, piece, 0)
        };
        if self.writes_nowait.get() && unsupported(&outcome) {
            self.writes_nowait.set(false);
            outcome = self.pwritev2(at, piece, 0);
        }
        Pace::here(|pace| pace.wrote(start, Instant::now()));
        outcome
    }

    fn pwritev2(&self, at: u64, bytes: &[u8], flags: i32) -> io::Result<usize> {
        let iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let at = at as libc::off64_t; // `check` saw to the sign
        // SAFETY: one iovec over `bytes`, only read, and borrowed until the call, which does not outlast itself,
        // returns; the descriptor is open as long as `self`.
        counted(unsafe { libc::pwritev2(self.file.as_raw_fd(), &iov, 1, at, flags) })
    }
}

fn kind(meta: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(meta.st_mode) & SFlag::S_IFMT
}

/// The outcome of a system call that has just returned a count or -1.
fn counted(count: isize) -> io::Result<usize> {
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// The file system or kernel does not know RWF_NOWAIT.
fn unsupported(outcome: &io::Result<usize>) -> bool {
    matches!(outcome, Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)))
}

/// An operation was done in place: lets other tasks have a turn when it is time.
async fn in_place(outcome: &io::Result<usize>) {
    let bytes = outcome.as_ref().map_or(0, |&count| count);
    if Pace::here(|pace| pace.spend(bytes)) {
        yield_now().await;
    }
}

/// A buffer while an operation on `buf[from..]` is with the kernel.
struct Lent {
    buf: PageBuf,
    from: usize,
    /// Counted so that the runtime outlives it, see [`super::runtime`].
    _held: Held,
}

impl Lent {
    fn new(buf: PageBuf, from: usize) -> Self {
        Lent { buf, from, _held: Held::buffer() }
    }
}

// SAFETY: the pointer is into the allocation of `buf`, which does not move when `Lent` does and lives as long as it;
// tokio-uring owns the `Lent` until the operation has completed, also when its future is dropped, and the runtime is
// not dropped before that (`Held`). The bytes of a PageBuf are always initialised.
unsafe impl IoBuf for Lent {
    fn stable_ptr(&self) -> *const u8 {
        self.buf[self.from..].as_ptr()
    }

    fn bytes_init(&self) -> usize {
        self.buf.len() - self.from
    }

    fn bytes_total(&self) -> usize {
        self.buf.len() - self.from
    }
}

// SAFETY: as for IoBuf; a PageBuf is the only view of its bytes, so the kernel is their only writer meanwhile.
unsafe impl IoBufMut for Lent {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.buf[self.from..].as_mut_ptr()
    }

    unsafe fn set_init(&mut self, _: usize) {}
}
