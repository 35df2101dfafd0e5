//! The one block interface of the daemon: what a frontend may ask, what a device answers.
//!
//! Frontends (NBD, ublk) turn wire requests into [`Request`]; [`Request::new`] is the only validation. Devices
//! implement [`BlockDev`]. Errors on this path are [`Errno`]: the words for people went to the log where they arose.

use crate::pagebuf::PageBuf;
use crate::units::{ByteRange, GuestOffset};
use std::fmt;
use std::io;
use std::sync::Arc;

/// A Linux error number, as a machine wants it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Operation not permitted: a write to a read-only export.
    pub const EPERM: Errno = Errno(1);
    /// Input/output error.
    pub const EIO: Errno = Errno(5);
    /// Out of memory.
    pub const ENOMEM: Errno = Errno(12);
    /// Invalid argument: the request itself is wrong.
    pub const EINVAL: Errno = Errno(22);
    /// No space left on device; also a write past the end of the export.
    pub const ENOSPC: Errno = Errno(28);
    /// Value too large.
    pub const EOVERFLOW: Errno = Errno(75);
    /// Operation not supported: a zeroing that would not be fast.
    pub const ENOTSUP: Errno = Errno(95);
    /// Disk quota exceeded.
    pub const EDQUOT: Errno = Errno(122);
    /// The server is shutting down.
    pub const ESHUTDOWN: Errno = Errno(108);
}

impl From<io::Error> for Errno {
    fn from(e: io::Error) -> Self {
        Errno(e.raw_os_error().unwrap_or(Errno::EIO.0))
    }
}

impl From<Errno> for io::Error {
    fn from(e: Errno) -> Self {
        io::Error::from_raw_os_error(e.0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

/// What a device is and can do, fixed while a client is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Smallest request and alignment in bytes, a power of two.
    pub min_block: u32,
    /// Request size in bytes below which work is wasted, a power of two.
    pub preferred_block: u32,
    /// Largest payload in bytes a frontend should advertise.
    pub max_payload: u32,
    /// No write, zeroing or discard is accepted.
    pub read_only: bool,
}

/// How zeroes may be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// The range may lose its storage (NBD: NO_HOLE is not set).
    pub may_unmap: bool,
    /// What has no storage need not get any, although what has some keeps it.
    pub sparse: bool,
    /// Fail with ENOTSUP, changing nothing, rather than write data (NBD: FAST_ZERO).
    pub fast: bool,
}

/// One run of the virtual disk with one allocation status (NBD `base:allocation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never zero.
    pub len: u64,
    /// No storage holds this run anywhere in the chain.
    pub hole: bool,
    /// Reads return zeroes.
    pub zero: bool,
}

/// What block status is asked about: a meta context of NBD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`: [`Run::HOLE`] and [`Run::ZERO`].
    Allocation,
    /// `qemu:allocation-depth`: which layer of the chain holds it, 1 being the top one; 0: none does.
    Depth,
    /// `qemu:dirty-bitmap:NAME`: [`Run::DIRTY`] where the image's bitmap of this name has bits.
    Bitmap(Arc<str>),
    /// `cowgate:since-parent`: [`Run::DIRTY`] where the disk is not what its backing file holds there.
    SinceParent,
}

/// A context that is offered, under a name. One context may have several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedContext {
    /// With its namespace, as NBD clients ask for it.
    pub name: String,
    /// What it stands for.
    pub context: Context,
}

/// One run of the virtual disk with one status in a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Length in bytes, never zero.
    pub len: u64,
    /// As the context defines it.
    pub status: u32,
}

impl Run {
    /// `base:allocation`: no storage holds the run anywhere in the chain.
    pub const HOLE: u32 = 1;
    /// `base:allocation`: the run reads as zeroes.
    pub const ZERO: u32 = 2;
    /// A bitmap: the run was changed.
    pub const DIRTY: u32 = 1;

    /// Appends a run, joined to the last one of the same status.
    pub fn push(runs: &mut Vec<Run>, len: u64, status: u32) {
        match runs.last_mut() {
            Some(last) if last.status == status => last.len += len,
            _ if len > 0 => runs.push(Run { len, status }),
            _ => {}
        }
    }
}

impl From<Extent> for Run {
    fn from(extent: Extent) -> Run {
        let hole = if extent.hole { Run::HOLE } else { 0 };
        let zero = if extent.zero { Run::ZERO } else { 0 };
        Run { len: extent.len, status: hole | zero }
    }
}

/// A request's kind, with the buffer it carries.
#[derive(Debug)]
pub enum Op {
    /// Fill the buffer from the device.
    Read(PageBuf),
    /// Store the buffer.
    Write(PageBuf),
    /// Make the range read as zeroes.
    WriteZeroes(ZeroFlags),
    /// The range's content is no longer needed.
    Discard,
    /// Everything completed before this request becomes durable.
    Flush,
    /// Report status from the start of the range.
    Status {
        /// What about.
        context: Context,
        /// More runs than these are not wanted.
        most: usize,
    },
    /// The range will be read soon.
    Cache,
}

impl Op {
    /// Whether the operation changes the device.
    pub fn writes(&self) -> bool {
        matches!(self, Op::Write(_) | Op::WriteZeroes(_) | Op::Discard)
    }
}

/// A validated request.
#[derive(Debug)]
pub struct Request {
    op: Op,
    range: ByteRange,
    fua: bool,
}

impl Request {
    /// Validates `op` on `start + len` against the device: the only validation there is.
    ///
    /// `fua` (force unit access): the completion waits until what was written is durable.
    /// Errors, in the words of the NBD specification: EPERM for a write to a read-only device, EINVAL for a read or
    /// status outside the device or off its minimum block size, ENOSPC for a write or zeroing outside it. On error
    /// the buffer is dropped with `op`.
    pub fn new(op: Op, start: u64, len: u64, fua: bool, geometry: &Geometry) -> Result<Self, Errno> {
        let range = Self::check(&op, start, len, geometry)?;
        if let Op::Read(buf) | Op::Write(buf) = &op {
            assert_eq!(buf.len() as u64, len, "the buffer is the request's length");
        }
        Ok(Request { op, range, fua: fua && !geometry.read_only })
    }

    fn check(op: &Op, start: u64, len: u64, geometry: &Geometry) -> Result<ByteRange, Errno> {
        if op.writes() && geometry.read_only {
            return Err(Errno::EPERM);
        }
        if matches!(op, Op::Flush) {
            // offset and length are reserved for flush and may hold anything an old client put there
            return Ok(ByteRange::between(0, 0));
        }
        let outside = match op {
            Op::Write(_) | Op::WriteZeroes(_) => Errno::ENOSPC,
            _ => Errno::EINVAL,
        };
        let range = ByteRange::checked(start, len).ok_or(outside)?;
        if range.end().0 > geometry.size {
            return Err(outside);
        }
        let mask = u64::from(geometry.min_block) - 1;
        if (start | len) & mask != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(range)
    }

    /// The guest range; empty for a flush.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Whether the completion must wait until the written data is durable.
    pub fn fua(&self) -> bool {
        self.fua
    }

    /// Takes the request apart.
    pub fn into_op(self) -> Op {
        self.op
    }
}

/// Which way the bytes of a read or write go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the device.
    Read,
    /// To the device.
    Write,
}

/// A validated read or write without a buffer: its bytes are to be moved without passing through our memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    direction: Direction,
    range: ByteRange,
    fua: bool,
}

impl Transfer {
    /// Validates it as [`Request::new`] does.
    pub fn new(direction: Direction, start: u64, len: u64, fua: bool, geometry: &Geometry) -> Result<Self, Errno> {
        let op = match direction {
            Direction::Read => Op::Read(PageBuf::new(0)),
            Direction::Write => Op::Write(PageBuf::new(0)),
        };
        let range = Request::check(&op, start, len, geometry)?;
        Ok(Transfer { direction, range, fua: fua && direction == Direction::Write })
    }

    /// Which way.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The guest range.
    pub fn range(&self) -> ByteRange {
        self.range
    }

    /// Whether the completion must wait until the written data is durable.
    pub fn fua(&self) -> bool {
        self.fua
    }
}

/// The one answer to a request.
#[derive(Debug)]
pub struct Completion {
    /// Success or the errno for the client.
    pub result: Result<(), Errno>,
    /// The request's buffer comes back, filled for a read that succeeded.
    pub buf: Option<PageBuf>,
    /// Status, contiguous from the start of the range, neighbours differing; empty for other requests.
    pub runs: Vec<Run>,
}

/// A block device as frontends see it. One value per thread; nothing here is `Send`.
///
/// Ranges given are inside the device (a [`Request`] saw to it). Buffers always come back.
#[allow(async_fn_in_trait)] // one thread per device handle: no Send bound is wanted
pub trait BlockDev: 'static {
    /// Size, block sizes and access.
    fn geometry(&self) -> Geometry;
    /// Fills all of `buf` from `at`.
    async fn read(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf);
    /// Stores all of `buf` at `at`; durable only after a later [`BlockDev::flush`].
    async fn write(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf);
    /// As [`BlockDev::write`], stored compressed where the device can do that and it saves space.
    async fn write_compressed(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf);
    /// Makes the range read as zeroes.
    async fn write_zeroes(&self, r: ByteRange, f: ZeroFlags) -> Result<(), Errno>;
    /// Gives storage of the range back where the format can; contents become zeroes or stay.
    async fn discard(&self, r: ByteRange) -> Result<(), Errno>;
    /// Everything completed before this call is durable when it returns success.
    async fn flush(&self) -> Result<(), Errno>;
    /// Status in a context from the start of `r`, which is not empty: contiguous, at least one run, at most `most` of
    /// them, neighbours differing, not beyond `r`. May stop early when an answer for all of it would be too long or
    /// take too long. EINVAL for a context that the device does not offer.
    async fn status(&self, context: &Context, r: ByteRange, most: usize) -> Result<Vec<Run>, Errno>;
    /// Reads the range into the page cache, as far as that is cheap.
    async fn cache(&self, r: ByteRange) -> Result<(), Errno>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(read_only: bool) -> Geometry {
        Geometry { size: 4096, min_block: 512, preferred_block: 4096, max_payload: 1 << 25, read_only }
    }

    #[test]
    fn a_request_outside_the_device_is_refused() {
        let g = geometry(false);
        let try_op = |op, start, len| Request::new(op, start, len, false, &g).map(|r| r.range());
        assert!(try_op(Op::Discard, 0, 4096).is_ok());
        assert_eq!(try_op(Op::Discard, 512, 4096).unwrap_err(), Errno::EINVAL);
        assert_eq!(try_op(Op::WriteZeroes(ZeroFlags::default()), 512, 4096).unwrap_err(), Errno::ENOSPC);
        assert_eq!(try_op(Op::WriteZeroes(ZeroFlags::default()), u64::MAX, 512).unwrap_err(), Errno::ENOSPC);
        assert_eq!(
            try_op(Op::Status { context: Context::Allocation, most: 1 }, u64::MAX - 511, 512).unwrap_err(),
            Errno::EINVAL
        );
        assert_eq!(try_op(Op::Status { context: Context::Allocation, most: 1 }, 1, 512).unwrap_err(), Errno::EINVAL);
        assert!(try_op(Op::Flush, 77, 3).is_ok());
    }

    #[test]
    fn a_transfer_is_validated_as_a_request_is() {
        let try_op = |direction, start, len| Transfer::new(direction, start, len, true, &geometry(false));
        let write = try_op(Direction::Write, 512, 1024).unwrap();
        assert_eq!((write.range(), write.fua()), (ByteRange::between(512, 1536), true));
        assert!(!try_op(Direction::Read, 0, 4096).unwrap().fua());
        assert_eq!(try_op(Direction::Write, 512, 4096), Err(Errno::ENOSPC));
        assert_eq!(try_op(Direction::Read, 512, 4096), Err(Errno::EINVAL));
        assert_eq!(try_op(Direction::Read, 1, 512), Err(Errno::EINVAL));
        assert_eq!(Transfer::new(Direction::Write, 0, 512, false, &geometry(true)), Err(Errno::EPERM));
    }

    #[test]
    fn a_read_only_device_takes_no_writes() {
        let g = geometry(true);
        assert_eq!(Request::new(Op::Discard, 0, 512, false, &g).unwrap_err(), Errno::EPERM);
        assert!(Request::new(Op::Flush, 0, 0, true, &g).is_ok());
        assert!(!Request::new(Op::Cache, 0, 512, true, &g).unwrap().fua());
    }
}
