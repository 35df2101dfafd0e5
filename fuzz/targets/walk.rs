//! A second opinion: walks an image's structures by the specification and counts who uses which cluster. It shares only
//! the header's parser with the code under test.

use cowgate::qcow2::Header;
use std::collections::{BTreeMap, BTreeSet};

/// Larger files are not walked.
const MOST_BYTES: usize = 64 << 20;
/// Nor are tables of more entries.
const MOST_ENTRIES: u64 = 1 << 18;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What a cluster is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    Snapshots,
    SnapshotL1,
    Bitmaps,
    Data,
    Packed,
}

/// What was found.
pub struct Walk {
    pub header: Header,
    /// By cluster: what it is, and how often it is referred to.
    pub uses: BTreeMap<u64, (Use, u64)>,
    /// L2 tables that the active L1 table names.
    pub active_l2: BTreeSet<u64>,
    /// Contradictions. Without any the image is sound, but for leaks.
    pub errors: Vec<String>,
    /// Clusters counted more often than they are referred to.
    pub leaks: u64,
    /// Those of them inside the file: QEMU, and the check after it, look at no others.
    pub leaks_in_file: u64,
}

struct Walker<'a> {
    image: &'a [u8],
    cluster: u64,
    walk: Walk,
}

/// Walks an image. `None`: it has no usable header, or is too large.
pub fn walk(image: &[u8]) -> Option<Walk> {
    let header = Header::parse(&image[..image.len().min(2 << 20)]).ok()?;
    if image.len() > MOST_BYTES || u64::from(header.l1_entries) > MOST_ENTRIES {
        return None;
    }
    let cluster = header.layout.cluster();
    if u64::from(header.reftable_clusters) * cluster / 8 > MOST_ENTRIES || header.snapshots > 16 {
        return None;
    }
    let walk = Walk {
        header,
        uses: BTreeMap::new(),
        active_l2: BTreeSet::new(),
        errors: Vec::new(),
        leaks: 0,
        leaks_in_file: 0,
    };
    let mut walker = Walker { image, cluster, walk };
    walker.everything();
    Some(walker.walk)
}

impl Walk {
    /// Whether a structure is guarded whatever the refcounts say: all that the image is used through. Snapshots' tables
    /// and bitmaps are as safe as their refcounts.
    pub fn guarded(&self, cluster: u64, what: Use) -> bool {
        match what {
            Use::L2 => self.active_l2.contains(&cluster),
            Use::Bitmaps | Use::Data | Use::Packed => false,
            _ => true,
        }
    }

    /// Whether there are compressed clusters.
    pub fn has_packed(&self) -> bool {
        self.uses.values().any(|(what, _)| *what == Use::Packed)
    }

    /// Clusters that hold structures, and what they are.
    pub fn structures(&self) -> impl Iterator<Item = (u64, Use)> + '_ {
        let structure = |what| !matches!(what, Use::Data | Use::Packed);
        self.uses.iter().filter(move |(_, (what, _))| structure(*what)).map(|(&cluster, &(what, _))| (cluster, what))
    }
}

impl Walker<'_> {
    fn be64(&self, at: u64) -> u64 {
        let bytes = usize::try_from(at).ok().and_then(|at| self.image.get(at..at.checked_add(8)?));
        bytes.map_or(0, |b| u64::from_be_bytes(b.try_into().expect("eight bytes")))
    }

    fn error(&mut self, what: String) {
        if self.walk.errors.len() < 20 {
            self.walk.errors.push(what);
        }
    }

    /// Notes one more reference to each cluster of a range.
    fn note(&mut self, at: u64, len: u64, what: Use) {
        if what != Use::Packed && !at.is_multiple_of(self.cluster) {
            return self.error(format!("{what:?} at {at} is not aligned"));
        }
        let end = at.saturating_add(len);
        if len == 0 {
            return;
        }
        if end.div_ceil(self.cluster) > (self.image.len() as u64).div_ceil(self.cluster) {
            // the length of packed data is only known in sectors
            if what != Use::Packed || at >= self.image.len() as u64 {
                return self.error(format!("{what:?} at {at} is behind the end of the file"));
            }
        }
        for cluster in at / self.cluster..=(end - 1) / self.cluster {
            let (first, count) = *self.walk.uses.entry(cluster).and_modify(|(_, n)| *n += 1).or_insert((what, 1));
            // tables and data are shared with snapshots, one cluster by several packed ones
            let shared = first == what && matches!(what, Use::L2 | Use::Data | Use::Packed);
            if count > 1 && !shared {
                self.error(format!("cluster {cluster} is {first:?} and {what:?}"));
            }
        }
    }

    fn everything(&mut self) {
        let header = self.walk.header.clone();
        let cluster = self.cluster;
        self.note(0, cluster, Use::Header);
        let table = header.reftable_offset.0;
        self.note(table, u64::from(header.reftable_clusters) * cluster, Use::RefcountTable);
        let mut blocks = Vec::new();
        for i in 0..u64::from(header.reftable_clusters) * cluster / 8 {
            let raw = self.be64(table + i * 8);
            let block = raw & !0x1ff;
            if raw != block {
                self.error(format!("reserved bits in the refcount table: {raw:#x}"));
            }
            if block != 0 {
                self.note(block, cluster, Use::RefcountBlock);
            }
            blocks.push(block);
        }
        self.snapshots(&header);
        self.bitmaps(&header);
        self.l1(&header, header.l1_offset.0, header.l1_entries, Use::L1);
        if u64::from(header.l1_entries) < header.layout.l1_entries_for(header.size) {
            self.error("the L1 table is shorter than the disk needs".to_owned());
        }
        self.compare(&header, &blocks);
        self.copied_flags(&header, &blocks);
    }

    fn l1(&mut self, header: &Header, at: u64, entries: u32, what: Use) {
        self.note(at, u64::from(entries) * 8, what);
        for i in 0..u64::from(entries) {
            let l2 = self.be64(at + i * 8) & OFFSET;
            if l2 == 0 {
                continue;
            }
            self.note(l2, self.cluster, Use::L2);
            if what == Use::L1 {
                self.walk.active_l2.insert(l2 / self.cluster);
            }
            if !l2.is_multiple_of(self.cluster) || self.walk.errors.len() >= 20 {
                continue;
            }
            self.l2(header, l2);
        }
    }

    fn l2(&mut self, header: &Header, l2: u64) {
        let entry_bytes = header.layout.l2_entry_bytes();
        for i in 0..header.layout.l2_entries() {
            let (entry, bitmap) = (self.be64(l2 + i * entry_bytes), self.be64(l2 + i * entry_bytes + 8));
            if entry & COMPRESSED != 0 {
                let shift = 62 - (header.layout.cluster_bits - 8);
                let start = entry & ((1 << shift) - 1);
                let sectors = ((entry & !(COMPRESSED | COPIED)) >> shift) + 1;
                if header.layout.data_file || (header.layout.extended_l2 && bitmap != 0) {
                    self.error("a compressed cluster that cannot be".to_owned());
                }
                self.note(start, sectors * 512 - start % 512, Use::Packed);
                continue;
            }
            if header.layout.extended_l2 {
                let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
                if allocated & zero != 0 || (allocated != 0 && entry & OFFSET == 0 && !header.layout.data_file) {
                    self.error(format!("subclusters {bitmap:#x} of the entry at {}", l2 + i * entry_bytes));
                }
            } else if entry & 1 != 0 && header.layout.version < 3 {
                self.error("zero flag in version 2".to_owned());
            }
            let host = entry & OFFSET;
            if header.layout.data_file {
                continue;
            }
            if host != 0 {
                self.note(host, self.cluster, Use::Data);
            } else if entry & COPIED != 0 {
                self.error("data in the header".to_owned());
            }
        }
    }

    fn snapshots(&mut self, header: &Header) {
        if header.snapshots == 0 {
            return;
        }
        let at = header.snapshots_offset.0;
        let bytes = self.image.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
        let mut padded = bytes[..bytes.len().min(1 << 20)].to_vec();
        padded.resize(1 << 20, 0);
        match cowgate::qcow2::snapshot::parse(&padded, header.snapshots) {
            Ok(Some((list, len))) => {
                self.note(at, len, Use::Snapshots);
                for snapshot in list {
                    match u64::from(snapshot.l1_entries) <= MOST_ENTRIES {
                        true => self.l1(header, snapshot.l1_offset.0, snapshot.l1_entries, Use::SnapshotL1),
                        false => self.error("a snapshot with a large L1 table".to_owned()),
                    }
                }
            }
            _ => self.error("the snapshot table".to_owned()),
        }
    }

    /// Bitmaps are counted where they are sound; else the image is not.
    fn bitmaps(&mut self, header: &Header) {
        use cowgate::qcow2::bitmap;
        let Some(extension) = &header.bitmaps else { return };
        if bitmap::check_extension(extension, header.layout, self.image.len() as u64).is_err() {
            return self.error("the bitmaps extension".to_owned());
        }
        let at = extension.directory_offset.0;
        let bytes = &self.image[at as usize..(at + extension.directory_bytes) as usize];
        let Ok(list) = bitmap::parse(bytes, extension.count, header.layout) else {
            return self.error("the bitmap directory".to_owned());
        };
        self.note(at, extension.directory_bytes, Use::Bitmaps);
        for bitmap in list {
            let len = u64::from(bitmap.table_entries) * 8;
            self.note(bitmap.table.0, len, Use::Bitmaps);
            for i in 0..u64::from(bitmap.table_entries).min(MOST_ENTRIES) {
                let data = self.be64(bitmap.table.0 + i * 8) & OFFSET;
                if data != 0 {
                    self.note(data, self.cluster, Use::Bitmaps);
                }
            }
        }
    }

    fn refcount(&self, header: &Header, blocks: &[u64], cluster: u64) -> u64 {
        let per_block = header.layout.refblock_entries();
        let block = blocks.get((cluster / per_block) as usize).copied().unwrap_or(0);
        if block == 0 || !block.is_multiple_of(self.cluster) {
            return 0;
        }
        let Some(bytes) = self.image.get(block as usize..).filter(|b| b.len() as u64 >= self.cluster) else { return 0 };
        let (index, width) = (cluster % per_block, 1u64 << header.layout.refcount_order);
        if width >= 8 {
            let at = (index * width / 8) as usize;
            return bytes[at..at + width as usize / 8].iter().fold(0, |n, &b| n << 8 | u64::from(b));
        }
        let bit = index * width;
        u64::from(bytes[(bit / 8) as usize]) >> (bit % 8) & ((1 << width) - 1)
    }

    fn compare(&mut self, header: &Header, blocks: &[u64]) {
        if !self.walk.errors.is_empty() {
            return;
        }
        let uses = std::mem::take(&mut self.walk.uses);
        for (&cluster, &(what, users)) in &uses {
            let counted = self.refcount(header, blocks, cluster);
            if counted < users {
                self.error(format!("cluster {cluster} ({what:?}) has {users} users and is counted {counted} times"));
            }
        }
        let per_block = header.layout.refblock_entries();
        let named = (0u64..).zip(blocks).filter(|(_, block)| **block != 0).take(64);
        for cluster in named.flat_map(|(i, _)| i * per_block..(i + 1) * per_block) {
            let users = uses.get(&cluster).map_or(0, |&(_, users)| users);
            if self.refcount(header, blocks, cluster) > users {
                self.walk.leaks += 1;
                self.walk.leaks_in_file += u64::from(cluster < (self.image.len() as u64).div_ceil(self.cluster));
            }
        }
        self.walk.uses = uses;
    }

    /// The active tables' flags say whether a cluster is used once.
    fn copied_flags(&mut self, header: &Header, blocks: &[u64]) {
        if !self.walk.errors.is_empty() {
            return;
        }
        for i in 0..u64::from(header.l1_entries) {
            let l1_entry = self.be64(header.l1_offset.0 + i * 8);
            let l2 = l1_entry & OFFSET;
            if l2 == 0 {
                continue;
            }
            self.copied(header, blocks, l1_entry, "L1");
            if self.refcount(header, blocks, l2 / self.cluster) != 1 {
                continue; // the flags in a shared table are those of whoever made it
            }
            for i in 0..header.layout.l2_entries() {
                let entry = self.be64(l2 + i * header.layout.l2_entry_bytes());
                if entry & COMPRESSED == 0 && entry & OFFSET != 0 && !header.layout.data_file {
                    self.copied(header, blocks, entry, "L2");
                }
            }
        }
    }

    fn copied(&mut self, header: &Header, blocks: &[u64], entry: u64, table: &str) {
        let cluster = (entry & OFFSET) / self.cluster;
        let refcount = self.refcount(header, blocks, cluster);
        // a flag that is missing costs a copy; one too many costs data
        if entry & COPIED != 0 && refcount != 1 {
            self.error(format!("{table} entry {entry:#x} says refcount 1, it is {refcount}"));
        }
    }
}
