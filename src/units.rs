//! Offsets and ranges that cannot be mixed up.
//!
//! A guest offset counts bytes of the virtual disk a client sees; a host offset counts bytes of the file or device
//! that stores it. Neither can be handed to a function that wants the other. All values are in bytes.

use std::fmt;

/// A position on the virtual disk, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct GuestOffset(pub u64);

/// A position in an image file or block device, in bytes from its start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct HostOffset(pub u64);

/// A run of bytes on the virtual disk. `start + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

/// A run of bytes in an image file or block device. `start + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct HostRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `start`; `None` when its end does not fit 64 bits.
    pub fn checked(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len)?;
        Some(ByteRange { start, len })
    }

    /// The range from `start` up to, not including, `end`. Panics when `end < start`: our own arithmetic only.
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "range {start}..{end} runs backwards");
        ByteRange { start, len: end - start }
    }

    /// First byte.
    pub fn start(self) -> GuestOffset {
        GuestOffset(self.start)
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// True for a range of no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// One past the last byte.
    pub fn end(self) -> GuestOffset {
        GuestOffset(self.start + self.len)
    }

    /// The first `len` bytes (all of it when it is shorter).
    pub fn prefix(self, len: u64) -> Self {
        ByteRange { start: self.start, len: self.len.min(len) }
    }

    /// What is left without the first `len` bytes.
    pub fn skip(self, len: u64) -> Self {
        let len = len.min(self.len);
        ByteRange { start: self.start + len, len: self.len - len }
    }

    /// The part below `end`.
    pub fn clip(self, end: u64) -> Self {
        let end = self.end().0.min(end).max(self.start);
        ByteRange { start: self.start, len: end - self.start }
    }
}

impl HostRange {
    /// The range of `len` bytes from `start`; `None` when its end does not fit 64 bits.
    pub fn checked(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len)?;
        Some(HostRange { start, len })
    }

    /// The range of `len` bytes from `start`. Panics on overflow: for offsets already validated.
    pub fn new(start: HostOffset, len: u64) -> Self {
        Self::checked(start.0, len).expect("host range fits 64 bits")
    }

    /// First byte.
    pub fn start(self) -> HostOffset {
        HostOffset(self.start)
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// True for a range of no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// One past the last byte.
    pub fn end(self) -> HostOffset {
        HostOffset(self.start + self.len)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

/// Parses a number of bytes with an optional binary suffix K, M, G, T or P (64K is 65,536), as qemu-img does.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        other => return Err(format!("the suffix {other:?} is not known; K, M, G, T and P are")),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("write a whole number of bytes, with K, M, G, T or P behind it if you like".to_owned());
    }
    let number: u64 = digits.parse().map_err(|_| "the number is too large".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the number is too large".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overflow() {
        assert!(ByteRange::checked(u64::MAX, 1).is_none());
        assert!(HostRange::checked(1, u64::MAX).is_none());
        assert_eq!(ByteRange::checked(u64::MAX, 0).unwrap().end(), GuestOffset(u64::MAX));
    }

    #[test]
    fn cutting_keeps_inside() {
        let r = ByteRange::checked(100, 50).unwrap();
        assert_eq!(r.prefix(80), r);
        assert_eq!(r.skip(20), ByteRange::between(120, 150));
        assert!(r.skip(60).is_empty());
        assert_eq!(r.clip(120), ByteRange::between(100, 120));
        assert!(r.clip(10).is_empty());
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("2T", 2 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "-1", "1.5G", "10X", "10GiB", "1 G", "99999999999999999999", "16384P", "\u{e4}"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
