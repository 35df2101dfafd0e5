//! Replies of the transmission phase, encoded into small heads that travel in front of their payload.

use super::{
    BASE_ALLOCATION_ID, MAX_DESCRIPTORS, MAX_STRING, NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS,
    NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_SIMPLE_REPLY_MAGIC, NBD_STATE_HOLE,
    NBD_STATE_ZERO, NBD_STRUCTURED_REPLY_MAGIC, errno,
};
use crate::block::{Errno, Extent};
use std::ops::Deref;

/// The fixed bytes of a reply or chunk. Its payload, if it announces one, follows directly.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; Head::MAX],
    len: u8,
}

impl Head {
    /// The longest head: a structured header with the offset of its data.
    const MAX: usize = 28;

    fn new() -> Self {
        Head { bytes: [0; Head::MAX], len: 0 }
    }

    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        let at = usize::from(self.len);
        self.bytes[at..at + N].copy_from_slice(&field);
        self.len += N as u8;
        self
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, payload: u32) -> Self {
        Head::new()
            .put(NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(flags.to_be_bytes())
            .put(kind.to_be_bytes())
            .put(cookie.to_be_bytes())
            .put(payload.to_be_bytes())
    }
}

impl Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// A simple reply. For a read that succeeded (only without structured replies) its data follows.
pub fn simple(cookie: u64, result: Result<(), Errno>) -> Head {
    let error = result.err().map_or(0, errno::to_wire);
    Head::new().put(NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()).put(error.to_be_bytes()).put(cookie.to_be_bytes())
}

/// The final chunk of a reply that has no more to say.
pub fn none(cookie: u64) -> Head {
    Head::chunk(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_NONE, cookie, 0)
}

/// A content chunk; `len` bytes of data follow. `done` only when the data is in hand and nothing else will be said.
///
/// Panics when `len` is zero or above the payload limit: callers cut their reads.
pub fn offset_data(cookie: u64, offset: u64, len: usize, done: bool) -> Head {
    assert!(len > 0 && len <= super::MAX_PAYLOAD as usize, "content chunk of {len} bytes");
    let flags = if done { NBD_REPLY_FLAG_DONE } else { 0 };
    Head::chunk(flags, NBD_REPLY_TYPE_OFFSET_DATA, cookie, 8 + len as u32).put(offset.to_be_bytes())
}

/// The final error chunk of a reply, and its message, which follows.
pub fn error(cookie: u64, e: Errno) -> (Head, Vec<u8>) {
    let mut message = e.to_string().into_bytes();
    message.truncate(MAX_STRING);
    let head = Head::chunk(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_ERROR, cookie, 6 + message.len() as u32)
        .put(errno::to_wire(e).to_be_bytes())
        .put((message.len() as u16).to_be_bytes());
    (head, message)
}

/// The whole reply to a block status request for `base:allocation`, and its descriptors, which follow.
///
/// `extents` start at the request's offset. Extents beyond `length` bytes of the request are left out, the last one
/// is cut there (so every length fits its 32 bits); neighbours of one status become one; `one` keeps the first only.
/// Panics when `extents` is empty: `BlockDev::extents` promises at least one.
pub fn block_status(cookie: u64, extents: &[Extent], length: u32, one: bool) -> (Head, Vec<u8>) {
    let limit = if one { 1 } else { MAX_DESCRIPTORS };
    let mut descriptors: Vec<u8> = Vec::with_capacity(8 * extents.len().min(limit));
    let mut left = length;
    let mut runs = extents.chunk_by(|a, b| status(a) == status(b)).peekable();
    assert!(runs.peek().is_some() && length > 0, "a status reply has an extent");
    for run in runs {
        if left == 0 || descriptors.len() == 8 * limit {
            break;
        }
        let total = run.iter().fold(0u64, |sum, e| sum.saturating_add(e.len));
        let len = u32::try_from(total).map_or(left, |total| total.min(left));
        descriptors.extend(len.to_be_bytes());
        descriptors.extend(status(&run[0]).to_be_bytes());
        left -= len;
    }
    let head = Head::chunk(NBD_REPLY_FLAG_DONE, NBD_REPLY_TYPE_BLOCK_STATUS, cookie, 4 + descriptors.len() as u32)
        .put(BASE_ALLOCATION_ID.to_be_bytes());
    (head, descriptors)
}

fn status(e: &Extent) -> u32 {
    (if e.hole { NBD_STATE_HOLE } else { 0 }) | (if e.zero { NBD_STATE_ZERO } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COOKIE: u64 = 0x1122_3344_5566_7788;
    const COOKIE_BYTES: [u8; 8] = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];

    fn extent(len: u64, hole: bool, zero: bool) -> Extent {
        Extent { len, hole, zero }
    }

    fn pairs(descriptors: &[u8]) -> Vec<(u32, u32)> {
        let word = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
        descriptors.chunks_exact(8).map(|d| (word(&d[..4]), word(&d[4..]))).collect()
    }

    #[test]
    fn simple_replies() {
        let head = simple(COOKIE, Ok(()));
        assert_eq!(&head[..], [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &COOKIE_BYTES].concat());
        let head = simple(COOKIE, Err(Errno(libc::EDQUOT)));
        assert_eq!(&head[4..8], [0, 0, 0, 28]);
    }

    #[test]
    fn chunks() {
        let magic = [0x66, 0x8e, 0x33, 0xef];
        assert_eq!(&none(COOKIE)[..], [&magic[..], &[0, 1, 0, 0], &COOKIE_BYTES, &[0; 4]].concat());
        let head = offset_data(COOKIE, 0x0a0b, 4096, false);
        assert_eq!(head.len(), 28);
        assert_eq!(&head[4..8], [0, 0, 0, 1]);
        assert_eq!(&head[16..], [0, 0, 0x10, 8, 0, 0, 0, 0, 0, 0, 0x0a, 0x0b]);
        assert_eq!(&offset_data(COOKIE, 0, 1, true)[4..8], [0, 1, 0, 1]);
        let (head, message) = error(COOKIE, Errno::EIO);
        assert_eq!(&head[4..8], [0, 1, 0x80, 1]);
        assert_eq!(usize::from(head[19]), 6 + message.len());
        assert_eq!(&head[20..24], [0, 0, 0, 5]);
        assert_eq!(usize::from(head[25]), message.len());
        assert!(String::from_utf8(message).unwrap().contains("Input/output error"));
    }

    #[test]
    fn status_is_cut_to_the_request() {
        let extents = [extent(4096, false, false), extent(4096, true, true), extent(1 << 40, false, true)];
        let (head, d) = block_status(COOKIE, &extents, 10_000, false);
        assert_eq!(pairs(&d), [(4096, 0), (4096, 3), (1808, 2)]);
        assert_eq!(&head[4..8], [0, 1, 0, 5]);
        assert_eq!(&head[16..], [0, 0, 0, 28, 0, 0, 0, 1]);
        assert_eq!(pairs(&block_status(COOKIE, &extents, 10_000, true).1), [(4096, 0)]);
        assert_eq!(pairs(&block_status(COOKIE, &extents, 4096, false).1), [(4096, 0)]);
        assert_eq!(pairs(&block_status(COOKIE, &extents[2..], u32::MAX, false).1), [(u32::MAX, 2)]);
    }

    #[test]
    fn neighbours_of_one_status_become_one() {
        let extents = [extent(512, true, true), extent(512, true, true), extent(512, false, false)];
        assert_eq!(pairs(&block_status(COOKIE, &extents, 4096, false).1), [(1024, 3), (512, 0)]);
        assert_eq!(pairs(&block_status(COOKIE, &extents, 4096, true).1), [(1024, 3)]);
        assert_eq!(pairs(&block_status(COOKIE, &extents, 700, true).1), [(700, 3)]);
    }

    #[test]
    fn a_fragmented_device_gets_the_most_descriptors_allowed() {
        let extents: Vec<_> = (0..MAX_DESCRIPTORS + 5).map(|i| extent(512, i % 2 == 0, false)).collect();
        let (_, d) = block_status(COOKIE, &extents, u32::MAX, false);
        assert_eq!(d.len(), 8 * MAX_DESCRIPTORS);
    }

    proptest! {
        #[test]
        fn status_obeys_the_specification(
            extents in proptest::collection::vec((1u64..=u64::from(u32::MAX) * 2, any::<bool>(), any::<bool>()), 1..20),
            length in 1u32..,
            one in any::<bool>(),
        ) {
            let extents: Vec<_> = extents.into_iter().map(|(len, hole, zero)| extent(len, hole, zero)).collect();
            let (head, d) = block_status(COOKIE, &extents, length, one);
            prop_assert_eq!(u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize, 4 + d.len());
            let pairs = pairs(&d);
            prop_assert!(!pairs.is_empty() && (!one || pairs.len() == 1));
            prop_assert!(pairs.iter().all(|p| p.0 > 0));
            prop_assert!(pairs.windows(2).all(|w| w[0].1 != w[1].1));
            prop_assert!(pairs.iter().map(|p| u64::from(p.0)).sum::<u64>() <= u64::from(length));
        }
    }
}
