//! The arithmetic of an image: sizes and indices that follow from cluster size and refcount width.

use std::ops::Range;

/// Cached tables are loaded and written in pieces of this many bytes (or one cluster, when that is smaller): a miss
/// then costs one page, not a whole table of up to 2 MiB.
pub const SLICE_BYTES: u64 = 4096;

/// Smallest `cluster_bits` the format allows.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Smallest `cluster_bits` with extended L2 entries.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Subclusters of a cluster with extended L2 entries.
pub const SUBCLUSTERS: u64 = 32;
/// Largest `cluster_bits` QEMU opens.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Host offsets an L1 or L2 entry can hold end here (bits 9 to 55).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// Largest L1 table in bytes, as QEMU.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes, as QEMU.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// Cluster size, refcount width and version of an image. Cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Format version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes.
    pub cluster_bits: u32,
    /// log2 of the refcount width in bits.
    pub refcount_order: u32,
    /// L2 entries are 16 bytes long and divide their cluster into 32 subclusters.
    pub extended_l2: bool,
    /// Guest data lies in an external data file, each cluster at its guest offset and not counted.
    pub data_file: bool,
}

impl Layout {
    /// An image without the features that change its layout.
    pub const fn plain(version: u32, cluster_bits: u32, refcount_order: u32) -> Layout {
        Layout { version, cluster_bits, refcount_order, extended_l2: false, data_file: false }
    }

    /// Cluster size in bytes.
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Number of clusters that `bytes` bytes occupy.
    pub fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster())
    }

    /// Bytes of one L2 entry.
    pub fn l2_entry_bytes(self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries in one L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster() / self.l2_entry_bytes()
    }

    /// Bytes that can be allocated on their own: a subcluster, else a cluster.
    pub fn unit(self) -> u64 {
        if self.extended_l2 { self.cluster() / SUBCLUSTERS } else { self.cluster() }
    }

    /// Guest bytes one L2 table maps.
    pub fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries needed for a disk of `size` bytes.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Bytes in one slice of an L2 table or refcount block.
    pub fn slice(self) -> u64 {
        SLICE_BYTES.min(self.cluster())
    }

    /// Where the slice is that has a guest cluster's entry, in its L2 table.
    pub fn slice_of(self, table: u64, guest_cluster: u64) -> u64 {
        table + guest_cluster % self.l2_entries() / self.slice_entries() * self.slice()
    }

    /// L2 entries in one slice.
    pub fn slice_entries(self) -> u64 {
        self.slice() / self.l2_entry_bytes()
    }

    /// Refcounts in one refcount block.
    pub fn refblock_entries(self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// Refcounts in one slice of a refcount block.
    pub fn refslice_entries(self) -> u64 {
        (self.slice() * 8) >> self.refcount_order
    }

    /// Largest refcount the width can hold.
    pub fn refcount_max(self) -> u64 {
        match 1u32 << self.refcount_order {
            64 => u64::MAX,
            bits => (1 << bits) - 1,
        }
    }

    /// Reads refcount `index` of a block or slice: big endian, below a byte counted from the least significant bit.
    pub fn refcount(self, bytes: &[u8], index: usize) -> u64 {
        match self.refcount_order {
            order @ 0..=2 => {
                let bits = 1usize << order;
                let bit = index * bits;
                u64::from(bytes[bit / 8] >> (bit % 8)) & ((1 << bits) - 1)
            }
            order => {
                let width = 1usize << (order - 3);
                let at = index * width;
                bytes[at..at + width].iter().fold(0, |n, &b| (n << 8) | u64::from(b))
            }
        }
    }

    /// The bytes of a block or slice that refcount `index` is in.
    pub fn refcount_bytes(self, index: usize) -> Range<usize> {
        let bits = 1usize << self.refcount_order;
        let first = index * bits / 8;
        first..first + bits.div_ceil(8)
    }

    /// Stores refcount `index` of a block or slice. Panics when the width cannot hold `value`.
    pub fn set_refcount(self, bytes: &mut [u8], index: usize, value: u64) {
        assert!(value <= self.refcount_max());
        match self.refcount_order {
            order @ 0..=2 => {
                let bits = 1usize << order;
                let bit = index * bits;
                let mask = ((1u8 << bits) - 1) << (bit % 8);
                let byte = &mut bytes[bit / 8];
                *byte = (*byte & !mask) | ((value as u8) << (bit % 8));
            }
            order => {
                let width = 1usize << (order - 3);
                let at = index * width;
                bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refcount_width_keeps_its_neighbours() {
        for refcount_order in 0..=6 {
            let l = Layout::plain(3, 9, refcount_order);
            let mut block = vec![0u8; 512];
            let n = l.refblock_entries() as usize;
            assert_eq!(n, 4096 >> refcount_order);
            for i in 0..n {
                let mut changed = block.clone();
                l.set_refcount(&mut changed, i, (i as u64 * 7 + 1) & l.refcount_max());
                let bytes = l.refcount_bytes(i);
                block[bytes.clone()].copy_from_slice(&changed[bytes]);
                assert_eq!(block, changed, "order {refcount_order} entry {i}: nothing else changes");
            }
            l.set_refcount(&mut block, 1, l.refcount_max());
            for i in 0..n {
                let expect = if i == 1 { l.refcount_max() } else { (i as u64 * 7 + 1) & l.refcount_max() };
                assert_eq!(l.refcount(&block, i), expect, "order {refcount_order} entry {i}");
            }
        }
    }

    #[test]
    fn sub_byte_refcounts_start_at_the_least_significant_bit() {
        let l = Layout::plain(3, 9, 0);
        assert_eq!(l.refcount(&[0b0000_0010], 1), 1);
        let l = Layout::plain(3, 9, 4);
        assert_eq!(l.refcount(&[1, 2], 0), 0x0102);
    }
}
