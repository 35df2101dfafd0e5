//! Zeroing, discarding and hole finding on a raw file or block device.

use crate::block::{Errno, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::ring;
use crate::units::{ByteRange, HostOffset, HostRange};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::unistd::{Whence, lseek};
use std::fs::File;

/// Block devices zero whole logical blocks only, and none has larger ones.
const BLOCK: u64 = 4096;
/// Zeroes written at once, in bytes, where the file system cannot make them.
const ZERO_CHUNK: u64 = 1 << 20;
/// Bytes that the kernel is asked to zero at once: until it has done that, others wait for the file.
pub(super) const AT_ONCE: u64 = 1 << 30;

/// Makes a range read as zeroes: by punching a hole (`may_unmap`), by zeroing in place, or by writing.
///
/// ENOTSUP, with nothing changed, when `fast` is asked and only writing would do. ENOSPC, with nothing changed, when
/// storage for all of the range is asked and there surely is not enough.
pub(super) async fn write_zeroes(file: &ring::File, range: ByteRange, f: ZeroFlags) -> Result<(), Errno> {
    let (head, middle, tail) = aligned(range);
    if f.fast && middle.is_empty() && range.len() > BLOCK {
        return Err(Errno::ENOTSUP);
    }
    if !f.may_unmap && middle.len() > AT_ONCE && !file.may_hold(middle.len()) {
        return Err(Errno::ENOSPC);
    }
    let mut rest = middle;
    while !rest.is_empty() {
        let part = rest.prefix(AT_ONCE);
        match zero_blocks(file, host(part), f).await {
            result if unsupported(result) && f.fast => return Err(Errno::ENOTSUP),
            result if unsupported(result) => write_zero_bytes(file, part).await?,
            result => result?,
        }
        rest = rest.skip(part.len());
    }
    write_zero_bytes(file, head).await?;
    write_zero_bytes(file, tail).await
}

/// Has whole blocks zeroed by the file system or the device, if it knows how.
async fn zero_blocks(file: &ring::File, range: HostRange, f: ZeroFlags) -> Result<(), Errno> {
    let mut result = Err(Errno::ENOTSUP);
    if f.may_unmap {
        result = file.punch(range).await;
    }
    // for a device that cannot do it the kernel writes the zeroes
    if unsupported(result) && !(f.fast && file.is_device()) {
        result = file.zero_range(range).await;
    }
    if unsupported(result) && !f.may_unmap && !file.is_device() {
        // tmpfs knows holes only: a hole, and storage for it
        file.punch(range).await?;
        result = file.allocate(range).await;
    }
    result
}

/// Gives whole blocks of a range back to the file system where it takes them.
pub(super) async fn discard(file: &ring::File, range: ByteRange) -> Result<(), Errno> {
    let (_, middle, _) = aligned(range);
    let mut rest = middle;
    while !rest.is_empty() {
        let part = rest.prefix(AT_ONCE);
        match file.punch(host(part)).await {
            result if unsupported(result) => return Ok(()), // a hint, and nobody there to take it
            result => result?,
        }
        rest = rest.skip(part.len());
    }
    Ok(())
}

/// Makes sure a range of an image file has storage; its content does not matter.
pub(super) async fn reserve(file: &ring::File, range: HostRange) -> Result<(), Errno> {
    if file.is_device() {
        return Ok(()); // it has all of it
    }
    match file.allocate(range).await {
        result if unsupported(result) => {
            let bytes = ByteRange::between(range.start().0, range.end().0);
            write_zero_bytes(file, bytes).await
        }
        result => result,
    }
}

/// The runs of a range of a file as (length in bytes, hole), at most about `limit` of them from its start.
/// All data when the file system cannot tell.
pub(super) fn holes(file: &File, range: HostRange, limit: usize) -> Vec<(u64, bool)> {
    let mut runs = Vec::new();
    let (mut at, end) = (range.start().0, range.end().0);
    let seek = |at: u64, whence| lseek(file, at as i64, whence).map(|found| found as u64);
    while at < end && runs.len() < limit {
        // ENXIO: no data up to the end of the file
        let data = match seek(at, Whence::SeekData) {
            Ok(data) => data.min(end),
            Err(nix::errno::Errno::ENXIO) => end,
            Err(_) => at,
        };
        if data > at {
            runs.push((data - at, true));
        }
        if data == end {
            break;
        }
        let hole = seek(data, Whence::SeekHole).map_or(end, |hole| hole.min(end)).max(data + 1);
        runs.push((hole - data, false));
        at = hole;
    }
    runs
}

/// Asks the kernel to read a range of a file into its cache.
pub(super) fn will_need(file: &File, range: HostRange) {
    // a hint: a file system that does not take it loses nothing
    let _ = posix_fadvise(file, range.start().0 as i64, range.len() as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

fn unsupported(result: Result<(), Errno>) -> bool {
    matches!(result, Err(Errno(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV)))
}

fn host(range: ByteRange) -> HostRange {
    HostRange::new(HostOffset(range.start().0), range.len())
}

/// The parts before, of and behind the whole blocks of a range.
fn aligned(range: ByteRange) -> (ByteRange, ByteRange, ByteRange) {
    let (start, end) = (range.start().0, range.end().0);
    let first = start.checked_next_multiple_of(BLOCK).map_or(end, |at| at.min(end));
    let last = (end / BLOCK * BLOCK).max(first);
    (ByteRange::between(start, first), ByteRange::between(first, last), ByteRange::between(last, end))
}

async fn write_zero_bytes(file: &ring::File, range: ByteRange) -> Result<(), Errno> {
    let mut rest = range;
    while !rest.is_empty() {
        let part = rest.prefix(ZERO_CHUNK);
        file.write(HostOffset(part.start().0), PageBuf::zeroed(part.len() as usize)).await.0?;
        rest = rest.skip(part.len());
    }
    Ok(())
}
