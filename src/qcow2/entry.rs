//! L1 and L2 table entries, as the "Cluster mapping" section of the specification has them.

use super::layout::Layout;
use crate::units::HostOffset;

/// Bit 63: the table or cluster has a refcount of exactly one and may be written in place.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset of a table or standard cluster.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// The bytes of the image file that a compressed cluster may occupy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRange {
    /// First byte of the compressed data; not aligned.
    pub start: HostOffset,
    /// Upper bound of its length in bytes: up to the end of its last 512-byte sector.
    pub len: u64,
}

/// What an L2 entry says about its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing stored here: the backing file shows through, or zeroes.
    Unallocated,
    /// Data in a host cluster.
    Data {
        /// The cluster.
        host: HostOffset,
        /// Its refcount is one.
        copied: bool,
    },
    /// Reads as zeroes.
    Zero {
        /// A cluster reserved for it.
        host: Option<HostOffset>,
        /// That cluster's refcount is one.
        copied: bool,
    },
    /// Compressed data.
    Compressed(CompressedRange),
}

impl Entry {
    /// Decodes an L2 entry. `Err` says what is wrong with it. Reserved bits are ignored, as QEMU does.
    pub fn decode(raw: u64, layout: Layout) -> Result<Entry, &'static str> {
        if raw & COMPRESSED != 0 {
            let offset_bits = 62 - (layout.cluster_bits - 8);
            let start = raw & ((1 << offset_bits) - 1);
            let sectors = ((raw & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
            if start >= super::layout::MAX_HOST_OFFSET {
                return Err("compressed cluster offset above 2^56");
            }
            return Ok(Entry::Compressed(CompressedRange {
                start: HostOffset(start),
                len: sectors * 512 - start % 512,
            }));
        }
        let copied = raw & COPIED != 0;
        let offset = raw & OFFSET_MASK;
        if !offset.is_multiple_of(layout.cluster()) {
            return Err("host cluster offset is not aligned to a cluster");
        }
        if raw & ZERO != 0 {
            if layout.version < 3 {
                return Err("zero flag in a version 2 image");
            }
            let host = (offset != 0).then_some(HostOffset(offset));
            return Ok(Entry::Zero { host, copied: copied && host.is_some() });
        }
        match offset {
            0 if copied => Err("host cluster offset 0 is the image header"),
            0 => Ok(Entry::Unallocated),
            _ => Ok(Entry::Data { host: HostOffset(offset), copied }),
        }
    }

    /// The stored form of a data entry with refcount one.
    pub fn data(host: HostOffset) -> u64 {
        host.0 | COPIED
    }

    /// The stored form of a zero entry; a reserved host cluster has refcount one.
    pub fn zero(host: Option<HostOffset>) -> u64 {
        ZERO | host.map_or(0, |h| h.0 | COPIED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Layout = Layout { version: 3, cluster_bits: 16, refcount_order: 4 };

    #[test]
    fn standard_entries() {
        assert_eq!(Entry::decode(0, L), Ok(Entry::Unallocated));
        let host = HostOffset(0x50000);
        assert_eq!(Entry::decode(Entry::data(host), L), Ok(Entry::Data { host, copied: true }));
        assert_eq!(Entry::decode(0x50000, L), Ok(Entry::Data { host, copied: false }));
        assert_eq!(Entry::decode(Entry::zero(None), L), Ok(Entry::Zero { host: None, copied: false }));
        assert_eq!(Entry::decode(Entry::zero(Some(host)), L), Ok(Entry::Zero { host: Some(host), copied: true }));
        assert!(Entry::decode(0x50200, L).is_err());
        assert!(Entry::decode(COPIED, L).is_err());
        assert!(Entry::decode(1, Layout { version: 2, ..L }).is_err());
    }

    #[test]
    fn compressed_entries_split_at_the_documented_bit() {
        // 64 KiB clusters: x = 62 - (16 - 8) = 54
        let raw = COMPRESSED | (3 << 54) | 0x12345;
        let Ok(Entry::Compressed(c)) = Entry::decode(raw, L) else { panic!() };
        assert_eq!((c.start, c.len), (HostOffset(0x12345), 4 * 512 - 0x145));
        // 512 B clusters: x = 61, so one additional sector at most
        let small = Layout { cluster_bits: 9, ..L };
        let Ok(Entry::Compressed(c)) = Entry::decode(COMPRESSED | (1 << 61) | 512, small) else { panic!() };
        assert_eq!((c.start, c.len), (HostOffset(512), 1024));
        assert!(Entry::decode(COMPRESSED | (1 << 57), small).is_err());
    }
}
