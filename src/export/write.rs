//! What an export makes of a write: zeroes found in it, clusters compressed.

use super::image_keys::{DetectZeroes, ImageKeys};
use crate::block::{BlockDev, Errno, ZeroFlags};
use crate::pagebuf::{PageBuf, is_zero};
use crate::units::{ByteRange, GuestOffset};

/// Zeroes are looked for in blocks of this many bytes, at multiples of it: a cluster of the usual size. Shorter runs
/// inside data would cost more requests than they save bytes.
const BLOCK: u64 = 64 << 10;

/// Writes `buf` at `at` as the export's keys want it. The buffer comes back as it was.
pub(super) async fn write(
    disk: &impl BlockDev,
    keys: &ImageKeys,
    at: GuestOffset,
    mut buf: PageBuf,
) -> (Result<(), Errno>, PageBuf) {
    let how = match keys.detect_zeroes {
        DetectZeroes::Off => return store(disk, keys, at, buf).await,
        DetectZeroes::On => ZeroFlags { sparse: true, ..ZeroFlags::default() },
        DetectZeroes::Unmap => ZeroFlags { may_unmap: true, ..ZeroFlags::default() },
    };
    let mut at = at.0;
    let mut done = buf.split_to(0);
    let mut result = Ok(());
    while !buf.is_empty() && result.is_ok() {
        let (len, zero) = run(at, &buf);
        let part = buf.split_to(len);
        let part = match zero {
            true => {
                result = disk.write_zeroes(ByteRange::between(at, at + len as u64), how).await;
                part
            }
            false => {
                let (written, part) = store(disk, keys, GuestOffset(at), part).await;
                result = written;
                part
            }
        };
        done.unsplit(part);
        at += len as u64;
    }
    done.unsplit(buf);
    (result, done)
}

async fn store(disk: &impl BlockDev, keys: &ImageKeys, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
    match keys.compress {
        None => disk.write(at, buf).await,
        Some(_) => disk.write_compressed(at, buf).await,
    }
}

/// The first run of blocks that are all zero or all not: its length in bytes, and which.
fn run(at: u64, bytes: &[u8]) -> (usize, bool) {
    let block_end = |from: usize| (((at + from as u64) / BLOCK + 1) * BLOCK - at).min(bytes.len() as u64) as usize;
    let mut end = block_end(0);
    let zero = is_zero(&bytes[..end]);
    while end < bytes.len() && is_zero(&bytes[end..block_end(end)]) == zero {
        end = block_end(end);
    }
    (end, zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_at_blocks() {
        let mut bytes = vec![0u8; 5 * BLOCK as usize];
        assert_eq!(run(0, &bytes), (bytes.len(), true));
        bytes[2 * BLOCK as usize] = 1;
        assert_eq!(run(0, &bytes), (2 * BLOCK as usize, true));
        assert_eq!(run(2 * BLOCK, &bytes[2 * BLOCK as usize..]), (BLOCK as usize, false));
        // the same bytes elsewhere on the disk are cut elsewhere
        assert_eq!(run(1000, &bytes), (2 * BLOCK as usize - 1000, true));
        assert_eq!(run(1000, &bytes[..10]), (10, true));
        assert_eq!(run(0, &[1; 100]), (100, false));
    }
}
