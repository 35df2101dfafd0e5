//! Refcounts and the allocation of host clusters.
//!
//! Clusters come from what was freed since the image was opened, else from a cursor that walks the refcounts once from
//! the start: contiguous runs for contiguous writes, every hole of an old image found, nothing scanned twice. Refcount
//! blocks are made at the first cluster they describe; a full refcount table moves to the end, with room to spare.

use super::entry::{CompressedRange, compressed_limit};
use super::journal::Order;
use super::layout::MAX_REFTABLE_BYTES;
use super::metadata::{Corrupt, Fault, Metadata, Ready, RootKind, Stop};
use super::tables::TableKind;
use crate::block::Errno;
use crate::units::HostOffset;

/// Bits 9 to 63 of a refcount table entry.
const REFTABLE_MASK: u64 = !0x1ff;
/// Freed runs looked at for one allocation.
const FREE_RUNS_TRIED: usize = 32;
/// A freed run shorter than the allocation is still taken when the allocation is at most this many clusters.
const SMALL_ALLOCATION: u64 = 16;

/// Contiguous host clusters, refcount one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Index of the first cluster.
    pub first: u64,
    /// Number of clusters, at least one.
    pub count: u64,
    /// The file was never written here: it reads as zeroes.
    pub untouched: bool,
}

/// Where a cluster's refcount is.
enum Place {
    /// The refcount table has no entry for it.
    BehindTable,
    /// Its refcount block does not exist: the refcount is 0.
    NoBlock,
    /// In this slice, in memory, at this index.
    At(u64, usize),
}

impl Metadata {
    fn refcount_place(&mut self, cluster: u64) -> Result<Place, Stop> {
        let layout = self.layout;
        let block_index = cluster / layout.refblock_entries();
        let Some(&raw) = usize::try_from(block_index).ok().and_then(|i| self.reftable.entries.get(i)) else {
            return Ok(Place::BehindTable);
        };
        let block = raw & REFTABLE_MASK;
        if block == 0 {
            return Ok(Place::NoBlock);
        }
        self.check_table_place("refcount block", block)?;
        let in_block = cluster % layout.refblock_entries();
        let slice = block + in_block / layout.refslice_entries() * layout.slice();
        self.need(TableKind::Refcount, slice)?;
        Ok(Place::At(slice, (in_block % layout.refslice_entries()) as usize))
    }

    /// The refcount of a cluster.
    pub(super) fn refcount(&mut self, cluster: u64) -> Result<u64, Stop> {
        Ok(match self.refcount_place(cluster)? {
            Place::BehindTable | Place::NoBlock => 0,
            Place::At(slice, index) => {
                let layout = self.layout;
                layout.refcount(self.tables.get(slice).expect("looked up"), index)
            }
        })
    }

    pub(super) fn set_refcount(&mut self, cluster: u64, value: u64) -> Result<(), Stop> {
        let Place::At(slice, index) = self.refcount_place(cluster)? else {
            panic!("refcount of cluster {cluster} is changed before its block exists");
        };
        let layout = self.layout;
        let range = layout.refcount_bytes(index);
        let bytes = self.tables.change(slice);
        let mut old = [0; 8];
        let old = &mut old[..range.len()];
        old.copy_from_slice(&bytes[range.clone()]);
        layout.set_refcount(bytes, index, value);
        if let Some(journal) = &mut self.journal {
            journal.note(Order::Refcounts, slice + range.start as u64, old, &bytes[range]);
        }
        Ok(())
    }

    /// Allocates one to `want` contiguous clusters.
    pub(super) fn allocate(&mut self, want: u64) -> Result<Run, Stop> {
        let fits = |len: u64| len >= want || want <= SMALL_ALLOCATION;
        if let Some(run) = self.allocate_freed(want, fits)? {
            return Ok(run);
        }
        match self.allocate_at_cursor(want) {
            Err(Stop::Fault(Fault::Errno(Errno::ENOSPC))) => {
                // a piece is better than nothing
                self.allocate_freed(want, |_| true)?.ok_or(Stop::Fault(Fault::Errno(Errno::ENOSPC)))
            }
            result => result,
        }
    }

    /// Allocates where no cluster was allocated since the image was opened.
    fn allocate_at_cursor(&mut self, want: u64) -> Result<Run, Stop> {
        loop {
            let cluster = self.cursor;
            let room = self.limit.saturating_sub(cluster);
            if room == 0 {
                return Err(Stop::Fault(Fault::Errno(Errno::ENOSPC)));
            }
            match self.refcount_place(cluster)? {
                Place::BehindTable => self.grow_reftable()?,
                Place::NoBlock => self.create_refblock(cluster)?,
                Place::At(slice, index) => {
                    let count = self.free_run_length(slice, index, want.min(room));
                    if count > 0 {
                        self.cursor += count;
                        return self.take(cluster, count);
                    }
                    self.cursor += self.used_run_length(slice, index);
                }
            }
        }
    }

    /// Allocates `count` clusters that lie one after the other. Returns the index of the first.
    pub(super) fn allocate_contiguous(&mut self, count: u64) -> Result<u64, Stop> {
        // a refcount block is made in the first cluster it describes and ends every run there
        if count > self.layout.refblock_entries() / 2 {
            return self.new_region(count);
        }
        let mut first = self.cursor;
        let mut next = first;
        while next - first < count {
            if next >= self.limit {
                return Err(Stop::Fault(Fault::Errno(Errno::ENOSPC)));
            }
            let used = match self.refcount_place(next)? {
                Place::BehindTable => {
                    self.grow_reftable()?;
                    continue;
                }
                Place::NoBlock => {
                    self.create_refblock(next)?;
                    true
                }
                Place::At(slice, index) => self.free_run_length(slice, index, 1) == 0,
            };
            next += 1;
            if used {
                first = next;
            }
        }
        Ok(self.take(first, count)?.first)
    }

    /// Allocates `len` bytes, whole sectors and at most one cluster, for compressed data: behind the last ones as long
    /// as their cluster has room. `None`: the format cannot name a place that far out.
    pub(super) fn allocate_packed(&mut self, len: u64) -> Result<Option<CompressedRange>, Stop> {
        let bits = self.layout.cluster_bits;
        let cluster = self.layout.cluster();
        // whoever is in the last cluster counts as one of its users
        let mut behind = None;
        if let Some(at) = self.pack {
            let users = self.refcount(at >> bits)?;
            if users > 0 && users < self.layout.refcount_max() {
                behind = Some((at, users));
            }
        }
        let fits = |at: u64| at % cluster + len <= cluster;
        let start = match behind {
            Some((at, users)) if fits(at) => {
                self.set_refcount(at >> bits, users + 1)?;
                at
            }
            _ => {
                let run = self.allocate(1)?;
                match behind {
                    Some((at, users)) if (at >> bits) + 1 == run.first => {
                        self.set_refcount(at >> bits, users + 1).expect("the refcount was just read");
                        at
                    }
                    _ => run.first << bits,
                }
            }
        };
        let end = start + len;
        self.pack = (!end.is_multiple_of(cluster)).then_some(end);
        if end > compressed_limit(self.layout) {
            self.free_clusters(start, len);
            return Ok(None);
        }
        Ok(Some(CompressedRange { start: HostOffset(start), len }))
    }

    /// Allocates from the clusters freed since the image was opened: from a run whose length fits.
    fn allocate_freed(&mut self, want: u64, fits: impl Fn(u64) -> bool) -> Result<Option<Run>, Stop> {
        let found = self.free.iter().take(FREE_RUNS_TRIED).find(|&(_, &len)| fits(len)).map(|(&s, &l)| (s, l));
        let Some((start, len)) = found else { return Ok(None) };
        let Place::At(slice, index) = self.refcount_place(start)? else {
            return Err(refcount_lost(start << self.layout.cluster_bits).into());
        };
        // only as far as this slice of refcounts goes: the rest stays for the next call
        let count = self.free_run_length(slice, index, want.min(len));
        if count == 0 {
            return Err(refcount_lost(start << self.layout.cluster_bits).into());
        }
        let run = self.take(start, count)?;
        self.free.remove(&start);
        if count < len {
            self.free.insert(start + count, len - count);
        }
        Ok(Some(run))
    }

    /// Free clusters from `index` of a refcount slice on, at most `want`, within the slice.
    fn free_run_length(&mut self, slice: u64, index: usize, want: u64) -> u64 {
        let layout = self.layout;
        let bytes = self.tables.get(slice).expect("looked up");
        let end = (layout.refslice_entries() as usize).min(index + want as usize);
        (index..end).take_while(|&i| layout.refcount(bytes, i) == 0).count() as u64
    }

    fn used_run_length(&mut self, slice: u64, index: usize) -> u64 {
        let layout = self.layout;
        let bytes = self.tables.get(slice).expect("looked up");
        let end = layout.refslice_entries() as usize;
        (index..end).take_while(|&i| layout.refcount(bytes, i) != 0).count() as u64
    }

    /// Gives free clusters of one refcount slice the refcount one.
    fn take(&mut self, first: u64, count: u64) -> Result<Run, Stop> {
        let bits = self.layout.cluster_bits;
        for cluster in first..first + count {
            if let Some(structure) = self.structures.get(cluster) {
                return Err(refcount_zero(structure, cluster << bits).into());
            }
        }
        for cluster in first..first + count {
            self.set_refcount(cluster, 1)?;
        }
        Ok(Run { first, count, untouched: self.note_use(first, count) })
    }

    /// Moves the marks behind clusters that come into use; true when the file was never written there.
    fn note_use(&mut self, first: u64, count: u64) -> bool {
        let bits = self.layout.cluster_bits;
        let untouched = first << bits >= self.untouched;
        let end = (first + count) << bits;
        if end > self.untouched {
            self.untouched = end;
        }
        self.file_end = self.file_end.max(end);
        untouched
    }

    /// Makes the refcount block that describes `cluster`, in that cluster.
    fn create_refblock(&mut self, cluster: u64) -> Result<(), Stop> {
        let layout = self.layout;
        if let Some(structure) = self.structures.get(cluster) {
            return Err(refcount_zero(structure, cluster << layout.cluster_bits).into());
        }
        let at = cluster << layout.cluster_bits;
        let mut block = vec![0; layout.cluster() as usize];
        layout.set_refcount(&mut block, (cluster % layout.refblock_entries()) as usize, 1);
        self.add_refblock(cluster / layout.refblock_entries(), at, &block);
        self.note_use(cluster, 1);
        Ok(())
    }

    fn add_refblock(&mut self, block_index: u64, at: u64, block: &[u8]) {
        self.create_table(TableKind::Refcount, at, block);
        self.set_root(RootKind::Reftable, block_index as usize, at);
        self.note_structure(at, self.layout.cluster(), "refcount block");
    }

    /// Moves the refcount table to the end of what it describes, half as large again.
    fn grow_reftable(&mut self) -> Result<(), Stop> {
        let layout = self.layout;
        let per_table_cluster = layout.cluster() / 8;
        let old_clusters = layout.clusters_for(self.reftable.entries.len() as u64 * 8);
        let max = MAX_REFTABLE_BYTES / layout.cluster();
        let new_clusters = (old_clusters + old_clusters / 2 + 1).min(max);
        if self.blocks_in_use() + self.blocks_for_region(new_clusters) > new_clusters * per_table_cluster {
            return Err(Stop::Fault(Fault::Errno(Errno::ENOSPC)));
        }
        let (old_at, old_entries) = (self.reftable.at.0, self.reftable.entries.len());
        self.reftable.entries.resize((new_clusters * per_table_cluster) as usize, 0);
        let at = match self.new_region(new_clusters) {
            Ok(first) => first << layout.cluster_bits,
            Err(stop) => {
                // the table is still where it was, and what lies behind it is not ours
                self.reftable.entries.truncate(old_entries);
                return Err(stop);
            }
        };
        self.reftable.at = HostOffset(at);
        self.root_moved(RootKind::Reftable);
        self.note_structure(at, new_clusters * layout.cluster(), "refcount table");
        self.free_clusters(old_at, old_clusters * layout.cluster());
        Ok(())
    }

    /// Moves the L1 table to where it has room for `entries`.
    pub(super) fn grow_l1(&mut self, entries: usize) -> Result<(), Stop> {
        let layout = self.layout;
        let clusters = layout.clusters_for(entries as u64 * 8);
        let old = (self.l1.at.0, self.l1.entries.len() as u64 * 8);
        // always to a new place: what lies behind the old table's end in its last cluster may be anything
        let at = self.allocate_contiguous(clusters)? << layout.cluster_bits;
        self.l1.at = HostOffset(at);
        self.note_structure(at, clusters * layout.cluster(), "L1 table");
        self.free_clusters(old.0, old.1);
        self.l1.entries.resize(entries, 0);
        self.root_moved(RootKind::L1);
        Ok(())
    }

    /// Allocates `count` contiguous clusters where no refcount block describes any yet, with the blocks that describe
    /// them. Returns the index of the first.
    fn new_region(&mut self, count: u64) -> Result<u64, Stop> {
        let layout = self.layout;
        let per_block = layout.refblock_entries();
        let blocks = self.blocks_for_region(count);
        let first_block = self.blocks_to_make(blocks);
        let first = first_block * per_block;
        if first_block + blocks > self.reftable.entries.len() as u64 {
            self.grow_reftable()?;
            return self.new_region(count);
        }
        if first + blocks + count > self.limit {
            return Err(Stop::Fault(Fault::Errno(Errno::ENOSPC)));
        }
        let used = blocks + count;
        for cluster in first..first + used {
            if let Some(structure) = self.structures.get(cluster) {
                return Err(refcount_zero(structure, cluster << layout.cluster_bits).into());
            }
        }
        for i in 0..blocks {
            let mut block = vec![0; layout.cluster() as usize];
            for entry in 0..per_block.min(used.saturating_sub(i * per_block)) {
                layout.set_refcount(&mut block, entry as usize, 1);
            }
            self.add_refblock(first_block + i, (first + i) << layout.cluster_bits, &block);
        }
        self.note_use(first, used);
        Ok(first + blocks)
    }

    /// Entries of the refcount table up to the last that names a block.
    fn blocks_in_use(&self) -> u64 {
        self.reftable.entries.iter().rposition(|&e| e != 0).map_or(0, |i| i as u64 + 1)
    }

    /// Where so many entries of the refcount table name no block, one after the other: the first such place, as one entry
    /// far out must not make the file grow to there. May run past the end of the table.
    fn blocks_to_make(&self, blocks: u64) -> u64 {
        let mut first = 0;
        for (i, &entry) in self.reftable.entries.iter().enumerate() {
            if entry != 0 {
                first = i as u64 + 1;
            } else if i as u64 + 1 - first == blocks {
                break;
            }
        }
        first
    }

    /// Refcount blocks that describe themselves and `count` clusters behind them.
    fn blocks_for_region(&self, count: u64) -> u64 {
        count.div_ceil(self.layout.refblock_entries() - 1)
    }

    /// Allocates `count` clusters, one after the other, for a structure of this name.
    pub fn allocate_structure(&mut self, count: u64, name: &'static str) -> Result<Ready<HostOffset>, Fault> {
        let allocated = match self.check_writable() {
            Ok(true) => return Ok(Ready::Prepare),
            Ok(false) => self.allocate_contiguous(count),
            Err(stop) => Err(stop),
        };
        Ready::answer(allocated.map(|first| {
            let at = first << self.layout.cluster_bits;
            self.note_structure(at, count * self.layout.cluster(), name);
            HostOffset(at)
        }))
    }

    /// Gives back the clusters of a structure that nothing on disk will refer to any more: when the next write-back
    /// cycle is complete.
    pub fn free_structure(&mut self, at: HostOffset, len: u64) {
        self.free_clusters(at.0, len);
    }

    /// Changes the virtual size: the L1 table has room for it then. The header's `size` field is the caller's to write,
    /// after the next write-back cycle when the disk grows.
    pub fn resize(&mut self, size: u64) -> Result<Ready<()>, Fault> {
        let entries = self.layout.l1_entries_for(size) as usize;
        let grown = match self.check_writable() {
            Ok(true) => return Ok(Ready::Prepare),
            Ok(false) if entries > self.l1.entries.len() => self.grow_l1(entries),
            Ok(false) => Ok(()),
            Err(stop) => Err(stop),
        };
        if grown.is_ok() {
            self.size = size;
        }
        Ready::answer(grown)
    }

    /// Takes one reference from each cluster of a range, once that is safe (see [`super::writeback`]).
    pub(super) fn free_clusters(&mut self, at: u64, len: u64) {
        let bits = self.layout.cluster_bits;
        if len > 0 {
            self.freed.extend(at >> bits..=(at + len - 1) >> bits);
        }
    }

    /// A cluster nobody refers to can be allocated again.
    pub(super) fn reuse(&mut self, cluster: u64) {
        let bits = self.layout.cluster_bits;
        self.structures.remove(cluster);
        self.tables.forget(cluster << bits, 1 << bits);
        if cluster >= self.cursor {
            return; // the cursor will come by
        }
        let mut start = cluster;
        let mut len = 1;
        if let Some((&before, &before_len)) = self.free.range(..cluster).next_back()
            && before + before_len == cluster
        {
            (start, len) = (before, before_len + 1);
        }
        if let Some(after) = self.free.remove(&(cluster + 1)) {
            len += after;
        }
        self.free.insert(start, len);
    }
}

fn refcount_zero(structure: &'static str, at: u64) -> Corrupt {
    Corrupt { structure, at, why: "its refcount is 0" }
}

fn refcount_lost(at: u64) -> Corrupt {
    Corrupt { structure: "refcount block", at, why: "a freed cluster is in use" }
}
