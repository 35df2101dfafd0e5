//! Replies of the transmission phase, encoded into small heads that travel in front of their payload.

use super::handshake::Replies;
use super::{
    MAX_DESCRIPTORS, MAX_PAYLOAD, MAX_STRING, NBD_EXTENDED_REPLY_MAGIC, NBD_REPLY_FLAG_DONE,
    NBD_REPLY_TYPE_BLOCK_STATUS, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET,
    NBD_REPLY_TYPE_NONE, NBD_REPLY_TYPE_OFFSET_DATA, NBD_REPLY_TYPE_OFFSET_HOLE, NBD_SIMPLE_REPLY_MAGIC,
    NBD_STRUCTURED_REPLY_MAGIC, errno,
};
use crate::block::{Errno, Run};
use std::ops::Deref;

/// The fixed bytes of a reply or chunk. Its payload, if it announces one, follows directly.
#[derive(Clone, Copy)]
pub struct Head {
    bytes: [u8; Head::MAX],
    len: u8,
}

impl Head {
    /// The longest head: an extended header with the offset and size of a hole.
    const MAX: usize = 44;

    fn new() -> Self {
        Head { bytes: [0; Head::MAX], len: 0 }
    }

    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        let at = usize::from(self.len);
        self.bytes[at..at + N].copy_from_slice(&field);
        self.len += N as u8;
        self
    }
}

impl Deref for Head {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Which request is answered, and in which form. Every chunk but the last of an answer is made with `done` false.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// The form that was agreed on.
    pub replies: Replies,
    /// The client's name for the request.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
}

impl Answer {
    /// Success with nothing more to say; `read`: the request was one, which has no simple reply where there are chunks.
    pub fn success(self, read: bool) -> Head {
        match self.replies {
            Replies::Simple => self.simple(0),
            Replies::Structured if !read => self.simple(0),
            _ => self.chunk(true, NBD_REPLY_TYPE_NONE, 0),
        }
    }

    /// The last, and without chunks the only, data of a read; `len` bytes follow, which are in hand.
    ///
    /// Panics when `len` is zero or above the payload limit: callers cut their reads.
    pub fn last_data(self, offset: u64, len: usize) -> Head {
        if self.replies == Replies::Simple { self.simple(0) } else { self.content(true, offset, len) }
    }

    /// Some of the data of a read, in a chunk; `len` bytes follow. Panics as [`Answer::last_data`].
    pub fn data(self, offset: u64, len: usize) -> Head {
        self.content(false, offset, len)
    }

    fn content(self, done: bool, offset: u64, len: usize) -> Head {
        assert!(len > 0 && len <= MAX_PAYLOAD as usize, "content chunk of {len} bytes");
        self.chunk(done, NBD_REPLY_TYPE_OFFSET_DATA, 8 + len as u32).put(offset.to_be_bytes())
    }

    /// A part of a read that is all zeroes, in a chunk: `len` bytes, of which none follow. `len` is not zero.
    pub fn hole(self, done: bool, offset: u64, len: u32) -> Head {
        self.chunk(done, NBD_REPLY_TYPE_OFFSET_HOLE, 12).put(offset.to_be_bytes()).put(len.to_be_bytes())
    }

    /// The end of an answer that is an error, and what follows the head: a message for people where the form has one.
    pub fn error(self, e: Errno) -> (Head, Vec<u8>) {
        if self.replies == Replies::Simple {
            return (self.simple(errno::to_wire(e)), Vec::new());
        }
        let message = message(e);
        (self.error_chunk(true, NBD_REPLY_TYPE_ERROR, e, message.len(), 0), message)
    }

    /// An error at `offset` bytes, which is inside the request, in a chunk; and what follows its head.
    pub fn error_at(self, done: bool, e: Errno, offset: u64) -> (Head, Vec<u8>) {
        let mut tail = message(e);
        let head = self.error_chunk(done, NBD_REPLY_TYPE_ERROR_OFFSET, e, tail.len(), 8);
        tail.extend(offset.to_be_bytes());
        (head, tail)
    }

    fn error_chunk(self, done: bool, kind: u16, e: Errno, message: usize, more: u32) -> Head {
        self.chunk(done, kind, 6 + message as u32 + more)
            .put(errno::to_wire(e).to_be_bytes())
            .put((message as u16).to_be_bytes())
    }

    /// The status in the metadata context of this `id`, in a chunk, and its descriptors, which follow.
    ///
    /// `runs` start at the request's offset and differ from their neighbours. Runs beyond `length` bytes of the request
    /// are left out and the last one is cut there, so that with compact headers every length fits its 32 bits; `one`
    /// keeps the first only. Panics when there are none: `BlockDev::status` promises at least one.
    pub fn status(self, done: bool, id: u32, runs: &[Run], length: u64, one: bool) -> (Head, Vec<u8>) {
        let extended = self.replies == Replies::Extended;
        let size = if extended { 16 } else { 8 };
        let limit = if one { 1 } else { MAX_DESCRIPTORS };
        let mut descriptors = Vec::with_capacity(size * runs.len().min(limit));
        let mut left = length;
        for run in runs.iter().take(limit) {
            let len = run.len.min(left);
            if len == 0 {
                break;
            }
            left -= len;
            if extended {
                descriptors.extend(len.to_be_bytes());
                descriptors.extend(u64::from(run.status).to_be_bytes());
            } else {
                descriptors.extend((len as u32).to_be_bytes());
                descriptors.extend(run.status.to_be_bytes());
            }
        }
        assert!(!descriptors.is_empty(), "a status reply has an extent");
        let len = descriptors.len() as u32;
        let head = if extended {
            self.chunk(done, NBD_REPLY_TYPE_BLOCK_STATUS_EXT, 8 + len)
                .put(id.to_be_bytes())
                .put((len / size as u32).to_be_bytes())
        } else {
            self.chunk(done, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + len).put(id.to_be_bytes())
        };
        (head, descriptors)
    }

    fn simple(self, error: u32) -> Head {
        Head::new().put(NBD_SIMPLE_REPLY_MAGIC.to_be_bytes()).put(error.to_be_bytes()).put(self.cookie.to_be_bytes())
    }

    /// The header of a chunk with `payload` bytes behind it.
    fn chunk(self, done: bool, kind: u16, payload: u32) -> Head {
        let extended = self.replies == Replies::Extended;
        let magic = if extended { NBD_EXTENDED_REPLY_MAGIC } else { NBD_STRUCTURED_REPLY_MAGIC };
        let flags = if done { NBD_REPLY_FLAG_DONE } else { 0 };
        let head = Head::new()
            .put(magic.to_be_bytes())
            .put(flags.to_be_bytes())
            .put(kind.to_be_bytes())
            .put(self.cookie.to_be_bytes());
        if extended {
            head.put(self.offset.to_be_bytes()).put(u64::from(payload).to_be_bytes())
        } else {
            head.put(payload.to_be_bytes())
        }
    }
}

/// What people are told of an error, as a string of the protocol.
fn message(e: Errno) -> Vec<u8> {
    let mut message = e.to_string().into_bytes();
    message.truncate(MAX_STRING);
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const COOKIE: u64 = 0x1122_3344_5566_7788;
    const COOKIE_BYTES: [u8; 8] = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    const OFFSET_BYTES: [u8; 8] = [0, 0, 0, 0, 0, 0, 0x0a, 0];

    fn to(replies: Replies) -> Answer {
        Answer { replies, cookie: COOKIE, offset: 0x0a00 }
    }

    const STRUCTURED: [u8; 4] = [0x66, 0x8e, 0x33, 0xef];
    const EXTENDED: [u8; 4] = [0x6e, 0x8a, 0x27, 0x8c];

    fn run(len: u64, status: u32) -> Run {
        Run { len, status }
    }

    /// The descriptors of a chunk, and whether its head announces just them.
    fn pairs(replies: Replies, (head, d): &(Head, Vec<u8>)) -> Vec<(u64, u64)> {
        let number = |b: &[u8]| b.iter().fold(0, |n, &b| n << 8 | u64::from(b));
        let (length, fixed, size) = match replies {
            Replies::Extended => (number(&head[24..32]), 8, 16),
            _ => (number(&head[16..20]), 4, 8),
        };
        assert_eq!(length as usize, fixed + d.len());
        if replies == Replies::Extended {
            assert_eq!(number(&head[36..40]) as usize, d.len() / size);
        }
        d.chunks_exact(size).map(|d| (number(&d[..size / 2]), number(&d[size / 2..]))).collect()
    }

    #[test]
    fn simple_replies() {
        let plain = [&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0][..], &COOKIE_BYTES].concat();
        let simple = to(Replies::Simple);
        assert_eq!(simple.success(false)[..], plain);
        assert_eq!(simple.success(true)[..], plain);
        assert_eq!(simple.last_data(7, 512)[..], plain);
        assert_eq!(to(Replies::Structured).success(false)[..], plain);
        let (head, message) = simple.error(Errno(libc::EDQUOT));
        assert_eq!((&head[4..8], &message[..]), (&[0, 0, 0, 28][..], &[][..]));
    }

    #[test]
    fn structured_chunks() {
        let to = to(Replies::Structured);
        assert_eq!(to.success(true)[..], [&STRUCTURED[..], &[0, 1, 0, 0], &COOKIE_BYTES, &[0; 4]].concat());
        let head = to.data(0x0a0b, 4096);
        assert_eq!(head.len(), 28);
        assert_eq!(&head[4..8], [0, 0, 0, 1]);
        assert_eq!(&head[16..], [0, 0, 0x10, 8, 0, 0, 0, 0, 0, 0, 0x0a, 0x0b]);
        assert_eq!(&to.last_data(0, 1)[4..8], [0, 1, 0, 1]);
        let hole = to.hole(true, 0x0a0b, 0x0100_0000);
        assert_eq!(&hole[4..8], [0, 1, 0, 2]);
        assert_eq!(&hole[16..], [0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0x0a, 0x0b, 1, 0, 0, 0]);
    }

    #[test]
    fn extended_chunks() {
        let to = to(Replies::Extended);
        let header = |flags_and_type: [u8; 4], len: u8| {
            [&EXTENDED[..], &flags_and_type, &COOKIE_BYTES, &OFFSET_BYTES, &[0; 7], &[len]].concat()
        };
        for read in [true, false] {
            assert_eq!(to.success(read)[..], header([0, 1, 0, 0], 0));
        }
        let at = [0, 0, 0, 0, 0, 0, 0x0a, 0x0b];
        assert_eq!(to.data(0x0a0b, 100)[..], [&header([0, 0, 0, 1], 108)[..], &at].concat());
        assert_eq!(to.last_data(0x0a0b, 100)[..], [&header([0, 1, 0, 1], 108)[..], &at].concat());
        assert_eq!(to.hole(false, 0x0a0b, 3)[..], [&header([0, 0, 0, 2], 12)[..], &at, &[0, 0, 0, 3]].concat());
        let (head, message) = to.error(Errno::EIO);
        assert_eq!(head[..32], header([0, 1, 0x80, 1], 6 + message.len() as u8));
    }

    #[test]
    fn errors_have_words_and_may_have_a_place() {
        for replies in [Replies::Structured, Replies::Extended] {
            let fields = if replies == Replies::Extended { 32 } else { 20 };
            let (head, text) = to(replies).error(Errno::EIO);
            assert_eq!(&head[4..8], [0, 1, 0x80, 1]);
            assert_eq!(usize::from(head[fields - 1]), 6 + text.len());
            assert_eq!(&head[fields..], [0, 0, 0, 5, 0, text.len() as u8]);
            assert!(String::from_utf8(text.clone()).unwrap().contains("Input/output error"));
            for done in [false, true] {
                let (head, tail) = to(replies).error_at(done, Errno::ENOSPC, 0x0a0b);
                assert_eq!(&head[4..8], [0, u8::from(done), 0x80, 2]);
                assert_eq!(usize::from(head[fields - 1]), 6 + tail.len());
                let (message, offset) = tail.split_at(tail.len() - 8);
                assert_eq!(&head[fields..], [0, 0, 0, 28, 0, message.len() as u8]);
                assert_eq!(offset, [0, 0, 0, 0, 0, 0, 0x0a, 0x0b]);
            }
        }
    }

    #[test]
    fn status_is_cut_to_the_request() {
        let runs = [run(4096, 0), run(4096, 3), run(1 << 40, 2)];
        for replies in [Replies::Structured, Replies::Extended] {
            let status = |runs: &[Run], length, one| pairs(replies, &to(replies).status(true, 9, runs, length, one));
            assert_eq!(status(&runs, 10_000, false), [(4096, 0), (4096, 3), (1808, 2)]);
            assert_eq!(status(&runs, 10_000, true), [(4096, 0)]);
            assert_eq!(status(&runs, 700, true), [(700, 0)]);
            assert_eq!(status(&runs, 4096, false), [(4096, 0)]);
            assert_eq!(status(&runs[2..], u32::MAX.into(), false), [(u32::MAX.into(), 2)]);
        }
        let wide = to(Replies::Extended).status(true, 9, &runs[2..], 1 << 50, false);
        assert_eq!(pairs(Replies::Extended, &wide), [(1 << 40, 2)]);
        let (head, _) = to(Replies::Structured).status(false, 9, &runs, 10_000, false);
        assert_eq!((&head[4..8], &head[16..]), (&[0, 0, 0, 5][..], &[0, 0, 0, 28, 0, 0, 0, 9][..]));
        assert_eq!((&wide.0[4..8], &wide.0[32..36]), (&[0, 1, 0, 6][..], &[0, 0, 0, 9][..]));
    }

    #[test]
    fn a_fragmented_device_gets_the_most_descriptors_allowed() {
        let runs: Vec<_> = (0..MAX_DESCRIPTORS + 5).map(|i| run(512, i as u32 % 2)).collect();
        let (_, d) = to(Replies::Structured).status(true, 1, &runs, u32::MAX.into(), false);
        assert_eq!(d.len(), 8 * MAX_DESCRIPTORS);
    }

    proptest! {
        #[test]
        fn status_obeys_the_specification(
            runs in proptest::collection::vec((1u64..=u64::from(u32::MAX) * 2, 0u32..4), 1..20),
            length in 1u32..,
            one in any::<bool>(),
            extended in any::<bool>(),
        ) {
            let mut joined = Vec::new();
            runs.into_iter().for_each(|(len, status)| Run::push(&mut joined, len, status));
            let replies = if extended { Replies::Extended } else { Replies::Structured };
            let pairs = pairs(replies, &to(replies).status(true, 1, &joined, length.into(), one));
            prop_assert!(!pairs.is_empty() && (!one || pairs.len() == 1));
            prop_assert!(pairs.iter().all(|p| p.0 > 0));
            prop_assert!(pairs.windows(2).all(|w| w[0].1 != w[1].1));
            prop_assert!(pairs.iter().map(|p| p.0).sum::<u64>() <= u64::from(length));
        }
    }
}
