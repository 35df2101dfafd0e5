//! The small buffer requests are read through, several with one call. It exists only while it holds bytes or is read
//! into, so an idle connection has none.

use crate::nbd::handshake::Replies;
use crate::nbd::request::{Header, Violation, header_len};
use crate::pagebuf::PageBuf;
use crate::ring::Stream;
use std::io;

/// Size of the buffer in bytes: hundreds of requests without payload, a few small writes; of a large write this much
/// is copied once more than the rest.
const INPUT_BYTES: usize = 16 << 10;

/// Bytes received but not looked at.
pub(super) struct Input {
    buf: Option<PageBuf>,
    start: usize,
    end: usize,
}

impl Input {
    /// Begins with bytes received earlier, at most the buffer's size.
    pub(super) fn beginning_with(bytes: &[u8]) -> Self {
        let mut input = Input { buf: None, start: 0, end: 0 };
        if !bytes.is_empty() {
            input.buffer()[..bytes.len()].copy_from_slice(bytes);
            input.end = bytes.len();
        }
        input
    }

    /// Takes a request header of the agreed form, if there is a whole one.
    pub(super) fn take_header(&mut self, replies: Replies) -> Option<Result<Header, Violation>> {
        let len = header_len(replies);
        let header = Header::parse(self.bytes().get(..len)?, replies);
        self.start += len;
        Some(header)
    }

    /// Moves bytes to the front of `target`; returns how many.
    pub(super) fn take_into(&mut self, target: &mut [u8]) -> usize {
        let n = target.len().min(self.len());
        target[..n].copy_from_slice(&self.bytes()[..n]);
        self.start += n;
        n
    }

    /// Drops up to `n` bytes; returns how many.
    pub(super) fn skip(&mut self, n: usize) -> usize {
        let n = n.min(self.len());
        self.start += n;
        n
    }

    /// Receives more into the free part, with one call. Zero is the end of the stream. There is room whenever less
    /// than a whole header is left, which is when it is called.
    pub(super) fn receive(&mut self, stream: &Stream) -> io::Result<usize> {
        let (start, end) = (self.start, self.end);
        let buf = self.buffer();
        buf.copy_within(start..end, 0);
        self.start = 0;
        self.end = end - start;
        let end = self.end;
        let n = stream.try_read(&mut self.buffer()[end..])?;
        self.end += n;
        Ok(n)
    }

    /// Whether the latest call filled the buffer, so that more is probably waiting.
    pub(super) fn is_full(&self) -> bool {
        self.end == INPUT_BYTES
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    /// Gives the buffer back if it holds nothing.
    pub(super) fn release(&mut self) {
        if self.len() == 0 {
            *self = Input { buf: None, start: 0, end: 0 };
        }
    }

    fn bytes(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    fn buffer(&mut self) -> &mut PageBuf {
        self.buf.get_or_insert_with(|| PageBuf::new(INPUT_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_taken_in_order() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut input = Input::beginning_with(&bytes);
        assert_eq!(input.take_header(Replies::Simple), Some(Err(Violation::Magic(0x0001_0203))));
        let mut target = [0; 10];
        assert_eq!(input.take_into(&mut target), 10);
        assert_eq!(target[..], bytes[28..38]);
        assert_eq!(input.skip(40), 40);
        assert!(input.take_header(Replies::Simple).is_none());
        assert_eq!(input.take_into(&mut [0; 100]), 22);
        input.release();
        assert!(input.buf.is_none());
    }

    #[test]
    fn the_rest_of_a_message_is_joined_to_its_beginning() {
        use std::io::Write;
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        crate::ring::run(async {
            let stream = Stream::from_std(ours).unwrap();
            let bytes: Vec<u8> = (0..56).collect();
            let mut input = Input::beginning_with(&bytes[..30]);
            let take = |input: &mut Input| input.take_header(Replies::Structured);
            assert!(take(&mut input).is_some() && take(&mut input).is_none());
            theirs.write_all(&bytes[30..]).unwrap();
            stream.readable().await.unwrap();
            assert_eq!(input.receive(&stream).unwrap(), 26);
            assert_eq!(take(&mut input), Some(Err(Violation::Magic(0x1c1d_1e1f))));
            assert!(input.receive(&stream).is_err());
            drop(theirs);
            stream.readable().await.unwrap();
            assert_eq!(input.receive(&stream).unwrap(), 0);
        })
        .unwrap();
    }
}
