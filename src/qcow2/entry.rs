//! L1 and L2 table entries, as the "Cluster mapping" section of the specification has them.

use super::layout::{Layout, MAX_HOST_OFFSET};
use crate::units::HostOffset;

/// Bit 63: the table or cluster has a refcount of exactly one and may be written in place.
pub const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;
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

/// An L2 entry as stored: the descriptor, and the subcluster bitmap of an extended entry (else 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RawEntry {
    /// The first 64 bits.
    pub descriptor: u64,
    /// The last 64 bits of an extended entry: allocated subclusters below, those that read as zeroes above bit 32.
    pub subclusters: u64,
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
    /// Subclusters that differ, or a cluster reserved for what is still unallocated.
    Mixed(Mixed),
    /// Compressed data.
    Compressed(CompressedRange),
}

/// A cluster whose subclusters differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixed {
    /// Its host cluster.
    pub host: Option<HostOffset>,
    /// That cluster's refcount is one.
    pub copied: bool,
    /// Subclusters with data, from the least significant bit on. Never without a host cluster.
    pub allocated: u32,
    /// Subclusters that read as zeroes; never allocated ones. All others are unallocated.
    pub zero: u32,
}

impl RawEntry {
    /// Nothing stored.
    pub const UNALLOCATED: RawEntry = RawEntry { descriptor: 0, subclusters: 0 };

    /// Reads an entry of a table.
    pub fn load(bytes: &[u8], layout: Layout) -> RawEntry {
        let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        RawEntry { descriptor: be64(0), subclusters: if layout.extended_l2 { be64(8) } else { 0 } }
    }

    /// Stores the entry in a table.
    pub fn store(self, bytes: &mut [u8], layout: Layout) {
        bytes[..8].copy_from_slice(&self.descriptor.to_be_bytes());
        if layout.extended_l2 {
            bytes[8..16].copy_from_slice(&self.subclusters.to_be_bytes());
        }
    }

    /// A cluster of data with refcount one.
    pub fn data(host: HostOffset, layout: Layout) -> RawEntry {
        let subclusters = if layout.extended_l2 { u64::from(u32::MAX) } else { 0 };
        RawEntry { descriptor: host.0 | COPIED, subclusters }
    }

    /// A cluster of zeroes; a reserved host cluster has refcount one.
    pub fn zero(host: Option<HostOffset>, layout: Layout) -> RawEntry {
        let descriptor = host.map_or(0, |h| h.0 | COPIED);
        match layout.extended_l2 {
            true => RawEntry { descriptor, subclusters: u64::from(u32::MAX) << 32 },
            false => RawEntry { descriptor: descriptor | ZERO, subclusters: 0 },
        }
    }

    /// A cluster whose subclusters differ (extended entries only).
    pub fn mixed(mixed: Mixed) -> RawEntry {
        let copied = if mixed.copied { COPIED } else { 0 };
        RawEntry {
            descriptor: mixed.host.map_or(0, |h| h.0 | copied),
            subclusters: u64::from(mixed.zero) << 32 | u64::from(mixed.allocated),
        }
    }

    /// Compressed data. Panics when the layout cannot hold the place.
    pub fn compressed(range: CompressedRange, layout: Layout) -> RawEntry {
        let offset_bits = compressed_offset_bits(layout);
        let sectors = (range.start.0 + range.len).div_ceil(512) - range.start.0 / 512 - 1;
        assert!(range.start.0 < compressed_limit(layout) && sectors < 1 << (62 - offset_bits));
        RawEntry { descriptor: COMPRESSED | sectors << offset_bits | range.start.0, subclusters: 0 }
    }
}

/// Bits of a compressed descriptor that hold the offset.
fn compressed_offset_bits(layout: Layout) -> u32 {
    62 - (layout.cluster_bits - 8)
}

/// Compressed clusters begin below this host offset.
pub fn compressed_limit(layout: Layout) -> u64 {
    MAX_HOST_OFFSET.min(1 << compressed_offset_bits(layout))
}

impl Entry {
    /// Decodes an L2 entry. `Err` says what is wrong with it. Reserved bits are ignored, as QEMU does.
    pub fn decode(raw: RawEntry, layout: Layout) -> Result<Entry, &'static str> {
        let RawEntry { descriptor, subclusters } = raw;
        if descriptor & COMPRESSED != 0 {
            if layout.data_file {
                return Err("compressed cluster in an image with an external data file");
            }
            let offset_bits = compressed_offset_bits(layout);
            let start = descriptor & ((1 << offset_bits) - 1);
            let sectors = ((descriptor & !(COPIED | COMPRESSED)) >> offset_bits) + 1;
            if start >= MAX_HOST_OFFSET {
                return Err("compressed cluster offset above 2^56");
            }
            return Ok(Entry::Compressed(CompressedRange {
                start: HostOffset(start),
                len: sectors * 512 - start % 512,
            }));
        }
        let copied = descriptor & COPIED != 0;
        let offset = descriptor & OFFSET_MASK;
        if !offset.is_multiple_of(layout.cluster()) {
            return Err("host cluster offset is not aligned to a cluster");
        }
        // in an external data file offset 0 is a cluster like any other, with bit 63 set
        let host = (offset != 0 || (layout.data_file && copied)).then_some(HostOffset(offset));
        if offset == 0 && copied && !layout.data_file && descriptor & ZERO == 0 {
            return Err("host cluster offset 0 is the image header");
        }
        let copied = host.is_some() && (copied || layout.data_file);
        if layout.extended_l2 {
            return Entry::decode_extended(host, copied, subclusters);
        }
        if descriptor & ZERO != 0 {
            if layout.version < 3 {
                return Err("zero flag in a version 2 image");
            }
            return Ok(Entry::Zero { host, copied });
        }
        Ok(host.map_or(Entry::Unallocated, |host| Entry::Data { host, copied }))
    }

    fn decode_extended(host: Option<HostOffset>, copied: bool, subclusters: u64) -> Result<Entry, &'static str> {
        let (allocated, zero) = (subclusters as u32, (subclusters >> 32) as u32);
        if allocated & zero != 0 {
            return Err("a subcluster is allocated and reads as zeroes");
        }
        Ok(match (host, allocated, zero) {
            (None, 0, 0) => Entry::Unallocated,
            (None, 0, u32::MAX) => Entry::Zero { host, copied },
            (None, 0, _) => Entry::Mixed(Mixed { host, copied, allocated, zero }),
            (None, _, _) => return Err("subclusters are allocated without a host cluster"),
            (Some(_), 0, u32::MAX) => Entry::Zero { host, copied },
            (Some(host), u32::MAX, 0) => Entry::Data { host, copied },
            (Some(_), _, _) => Entry::Mixed(Mixed { host, copied, allocated, zero }),
        })
    }

    /// The host cluster the entry refers to, other than for compressed data.
    pub fn host(self) -> Option<HostOffset> {
        match self {
            Entry::Data { host, .. } => Some(host),
            Entry::Zero { host, .. } => host,
            Entry::Mixed(mixed) => mixed.host,
            Entry::Unallocated | Entry::Compressed(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const L: Layout = Layout::plain(3, 16, 4);

    fn decode(descriptor: u64, layout: Layout) -> Result<Entry, &'static str> {
        Entry::decode(RawEntry { descriptor, subclusters: 0 }, layout)
    }

    #[test]
    fn standard_entries() {
        assert_eq!(decode(0, L), Ok(Entry::Unallocated));
        let host = HostOffset(0x50000);
        assert_eq!(Entry::decode(RawEntry::data(host, L), L), Ok(Entry::Data { host, copied: true }));
        assert_eq!(decode(0x50000, L), Ok(Entry::Data { host, copied: false }));
        assert_eq!(Entry::decode(RawEntry::zero(None, L), L), Ok(Entry::Zero { host: None, copied: false }));
        assert_eq!(Entry::decode(RawEntry::zero(Some(host), L), L), Ok(Entry::Zero { host: Some(host), copied: true }));
        assert!(decode(0x50200, L).is_err());
        assert!(decode(COPIED, L).is_err());
        assert!(decode(1, Layout::plain(2, 16, 4)).is_err());
    }

    #[test]
    fn compressed_entries_split_at_the_documented_bit() {
        // 64 KiB clusters: x = 62 - (16 - 8) = 54
        let raw = COMPRESSED | (3 << 54) | 0x12345;
        let Ok(Entry::Compressed(c)) = decode(raw, L) else { panic!() };
        assert_eq!((c.start, c.len), (HostOffset(0x12345), 4 * 512 - 0x145));
        assert_eq!(RawEntry::compressed(c, L).descriptor, raw);
        // 512 B clusters: x = 61, so one additional sector at most
        let small = Layout::plain(3, 9, 4);
        let Ok(Entry::Compressed(c)) = decode(COMPRESSED | (1 << 61) | 512, small) else { panic!() };
        assert_eq!((c.start, c.len), (HostOffset(512), 1024));
        assert!(decode(COMPRESSED | (1 << 57), small).is_err());
        assert!(decode(raw, Layout { data_file: true, ..L }).is_err());
    }

    #[test]
    fn extended_entries_are_uniform_or_mixed() {
        let l = Layout { extended_l2: true, ..L };
        let host = HostOffset(0x50000);
        let decode = |descriptor, subclusters| Entry::decode(RawEntry { descriptor, subclusters }, l);
        assert_eq!(decode(0, 0), Ok(Entry::Unallocated));
        assert_eq!(Entry::decode(RawEntry::data(host, l), l), Ok(Entry::Data { host, copied: true }));
        assert_eq!(Entry::decode(RawEntry::zero(Some(host), l), l), Ok(Entry::Zero { host: Some(host), copied: true }));
        let mixed = Mixed { host: Some(host), copied: true, allocated: 5, zero: 8 };
        assert_eq!(Entry::decode(RawEntry::mixed(mixed), l), Ok(Entry::Mixed(mixed)));
        let reserved = Mixed { host: Some(host), copied: false, allocated: 0, zero: 0 };
        assert_eq!(decode(0x50000, 0), Ok(Entry::Mixed(reserved)), "preallocated, still unallocated");
        assert!(decode(0x50000, 1 << 32 | 1).is_err());
        assert!(decode(0, 1).is_err());
    }

    #[test]
    fn a_data_file_has_a_cluster_at_offset_0() {
        let l = Layout { data_file: true, ..L };
        assert_eq!(decode(COPIED, l), Ok(Entry::Data { host: HostOffset(0), copied: true }));
        assert_eq!(decode(0, l), Ok(Entry::Unallocated));
        assert_eq!(decode(COPIED | ZERO, l), Ok(Entry::Zero { host: Some(HostOffset(0)), copied: true }));
        assert_eq!(decode(ZERO, l), Ok(Entry::Zero { host: None, copied: false }));
    }
}
