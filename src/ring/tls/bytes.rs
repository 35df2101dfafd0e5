//! Bytes on their way through a TLS session: appended at one end, taken from the other. Holds memory only while it holds
//! bytes or is being filled, so an idle connection has none.

use crate::pagebuf::{PAGE, PageBuf};

/// The queue.
#[derive(Default)]
pub(super) struct Bytes {
    buf: Option<PageBuf>,
    start: usize,
    end: usize,
}

impl Bytes {
    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory it has.
    #[cfg(test)]
    pub(super) fn buf_len(&self) -> usize {
        self.buf.as_ref().map_or(0, |buf| buf.len())
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[self.start..self.end])
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        self.buf.as_mut().map_or(&mut [], |buf| &mut buf[self.start..self.end])
    }

    /// Room at the end for `want` bytes or more; [`Bytes::grow`] says how many of them were filled.
    pub(super) fn room(&mut self, want: usize) -> &mut [u8] {
        self.room_within(self.len() + want)
    }

    /// What room there is at the end if there are to be `capacity` bytes of memory, or those that are there already.
    pub(super) fn room_within(&mut self, capacity: usize) -> &mut [u8] {
        let (start, end) = (self.start, self.end);
        (self.start, self.end) = (0, end - start);
        let fits = self.buf.as_ref().is_some_and(|buf| buf.len() >= capacity);
        match &mut self.buf {
            Some(buf) if fits => buf.copy_within(start..end, 0),
            old => {
                let mut buf = PageBuf::new(capacity.next_multiple_of(PAGE));
                if let Some(old) = old {
                    buf[..end - start].copy_from_slice(&old[start..end]);
                }
                self.buf = Some(buf);
            }
        }
        let end = self.end;
        self.buf.as_mut().map_or(&mut [], |buf| &mut buf[end..])
    }

    /// The first `n` bytes of the room were filled.
    pub(super) fn grow(&mut self, n: usize) {
        self.end += n;
        debug_assert!(self.buf.as_ref().is_some_and(|buf| self.end <= buf.len()));
    }

    /// Appends.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
            self.grow(bytes.len());
        }
    }

    /// Drops the first `n` bytes.
    pub(super) fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.len());
        self.start += n;
    }

    /// Moves bytes to the front of `target`; returns how many.
    pub(super) fn take_into(&mut self, target: &mut [u8]) -> usize {
        let n = target.len().min(self.len());
        target[..n].copy_from_slice(&self.as_slice()[..n]);
        self.consume(n);
        n
    }

    /// Gives the memory back if there is nothing in it.
    pub(super) fn release(&mut self) {
        if self.is_empty() {
            *self = Bytes::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_they_came_in() {
        let mut bytes = Bytes::default();
        let (mut wrote, mut read) = (0u8, 0u8);
        for round in 0..1000usize {
            let piece: Vec<u8> = (0..round % 97).map(|i| wrote.wrapping_add(i as u8)).collect();
            wrote = wrote.wrapping_add(piece.len() as u8);
            bytes.push(&piece);
            let mut target = vec![0; round % 103];
            let n = bytes.take_into(&mut target);
            for byte in &target[..n] {
                assert_eq!(*byte, read);
                read = read.wrapping_add(1);
            }
        }
        let left = bytes.len();
        bytes.consume(left);
        bytes.release();
        assert!(bytes.is_empty() && bytes.buf.is_none());
    }

    #[test]
    fn room_is_as_asked_for_and_keeps_what_is_there() {
        let mut bytes = Bytes::default();
        bytes.push(b"abcdef");
        bytes.consume(2);
        assert!(bytes.room(10_000).len() >= 10_000);
        assert_eq!(bytes.as_slice(), b"cdef");
        let capacity = bytes.len() + bytes.room(0).len();
        assert_eq!(bytes.room_within(100).len(), capacity - 4);
        bytes.as_mut_slice()[0] = b'C';
        assert_eq!(bytes.as_slice(), b"Cdef");
    }
}
