//! How a range is written: in place, into new clusters, or by saying "zero".
//!
//! A write that needs new clusters is an [`Allocation`]: the caller writes the data (and what surrounds it in its
//! clusters) and then commits, which publishes the new clusters in the L2 table, or aborts, which gives them back.
//! Until then the guest clusters are pending: other writes to them wait, reads see the old content.

use super::alloc::Run;
use super::entry::{COPIED, Entry};
use super::metadata::{Corrupt, Fault, Metadata, Stop};
use super::tables::{Table, TableKind};
use crate::block::Errno;
use crate::units::{ByteRange, HostOffset};

/// Answer to [`Metadata::begin_write`]; each speaks about the first part of the range.
#[derive(Debug)]
pub enum Write {
    /// Write the first part of the range into the cluster it has.
    InPlace {
        /// Where its first byte goes.
        host: HostOffset,
        /// Length of that part in bytes.
        len: u64,
    },
    /// Write into new clusters, then [`Metadata::commit`].
    Allocate(Allocation),
    /// Read this table, hand it in, ask again.
    Load(Table),
    /// Another request must make progress first.
    Wait,
    /// Run a write-back cycle, ask again: the header must change before the first write.
    Prepare,
}

/// What zeroing may do to the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give clusters back (NBD write zeroes, holes allowed).
    Unmap,
    /// Keep or reserve clusters, so that later writes cannot fail for lack of space (NBD NO_HOLE).
    Provision,
    /// Content is no longer needed: whole clusters are given back, the rest stays (NBD trim).
    Discard,
}

/// Answer to [`Metadata::begin_zero`]; each speaks about the first part of the range.
#[derive(Debug)]
pub enum Zero {
    /// The first so many bytes are done.
    Done(u64),
    /// Write zero bytes to the first so many bytes: they share clusters with data.
    Data(u64),
    /// Reserve these clusters in the file, then commit.
    Allocate(Allocation),
    /// Read this table, hand it in, ask again.
    Load(Table),
    /// Another request must make progress first.
    Wait,
    /// Run a write-back cycle, ask again.
    Prepare,
}

/// New clusters on their way: must be given to [`Metadata::commit`] or [`Metadata::abort`].
#[must_use = "an allocation is committed or aborted; dropped, it blocks its guest clusters for ever"]
#[derive(Debug)]
pub struct Allocation {
    /// The guest bytes the caller brings.
    pub range: ByteRange,
    /// The guest clusters they lie in. What of them is outside `range` is to be filled with the old content.
    pub clusters: ByteRange,
    /// Where the first of the clusters goes; the others follow.
    pub host: HostOffset,
    /// The old content around `range` is zeroes.
    pub zero_around: bool,
    /// The file reads as zeroes here: zeroes around `range` need no write.
    pub untouched: bool,
    slice: u64,
    index: usize,
    new: bool,
    reserve: bool,
}

/// How an entry takes a write.
enum Kind {
    /// Its host cluster can be written.
    InPlace(HostOffset),
    /// A reserved cluster becomes data.
    Reserved(HostOffset),
    /// Needs a new cluster; the old content is zeroes, or not.
    New { zero: bool },
}

impl Allocation {
    /// Where the first byte of `range` goes.
    pub fn data_host(&self) -> HostOffset {
        HostOffset(self.host.0 + (self.range.start().0 - self.clusters.start().0))
    }

    /// The guest bytes before `range` in its first cluster.
    pub fn head(&self) -> ByteRange {
        ByteRange::between(self.clusters.start().0, self.range.start().0)
    }

    /// The guest bytes behind `range` in its last cluster; may reach beyond the end of the disk.
    pub fn tail(&self) -> ByteRange {
        ByteRange::between(self.range.end().0, self.clusters.end().0)
    }
}

impl Metadata {
    /// How to write the first part of `range`, which is not empty and lies inside the disk.
    pub fn begin_write(&mut self, range: ByteRange) -> Result<Write, Fault> {
        match self.try_write(range) {
            Err(Stop::Load(table)) => Ok(Write::Load(table)),
            Err(Stop::Wait) => Ok(Write::Wait),
            Err(Stop::Fault(fault)) => Err(fault),
            Ok(write) => Ok(write),
        }
    }

    fn try_write(&mut self, range: ByteRange) -> Result<Write, Stop> {
        if self.check_writable()? {
            return Ok(Write::Prepare);
        }
        let bits = self.layout.cluster_bits;
        let first = range.start().0 >> bits;
        let (slice, index) = self.writable_slice(first)?;
        let max = self.run_limit(first, index, (range.end().0 - 1) >> bits);
        match self.write_kind(slice, index, first)? {
            Kind::InPlace(host) => {
                let count = self.contiguous_run(slice, index, first, max, host, false)?;
                let in_cluster = range.start().0 % self.layout.cluster();
                let len = ((count << bits) - in_cluster).min(range.len());
                Ok(Write::InPlace { host: HostOffset(host.0 + in_cluster), len })
            }
            Kind::Reserved(host) => {
                let count = self.contiguous_run(slice, index, first, max, host, true)?;
                Ok(Write::Allocate(self.pend(range, slice, index, count, host, (false, true, false))))
            }
            Kind::New { zero } => {
                let count = self.new_run(slice, index, first, max, zero)?;
                let Run { first: cluster, count, untouched } = self.allocate(count)?;
                let host = HostOffset(cluster << bits);
                Ok(Write::Allocate(self.pend(range, slice, index, count, host, (true, zero, untouched))))
            }
        }
    }

    /// Refuses writes to a broken image; true when the header must change first.
    fn check_writable(&mut self) -> Result<bool, Stop> {
        if self.broken.is_some() {
            return Err(Stop::Fault(Fault::Errno(Errno::EIO)));
        }
        self.first_write |= self.autoclear != 0;
        Ok(self.autoclear != 0)
    }

    /// The L2 slice of a guest cluster in memory, in a table that only the active L1 table refers to: made or copied
    /// when need be.
    fn writable_slice(&mut self, guest_cluster: u64) -> Result<(u64, usize), Stop> {
        let layout = self.layout;
        if self.pending_over(guest_cluster) {
            return Err(Stop::Wait);
        }
        let l1_index = (guest_cluster / layout.l2_entries()) as usize;
        if l1_index >= self.l1.entries.len() {
            self.grow_l1(layout.l1_entries_for(self.size) as usize)?;
        }
        match self.l2_table(l1_index)? {
            Some((_, true)) => {}
            Some((shared, false)) => self.copy_l2(l1_index, shared)?,
            None => {
                let run = self.allocate(1)?;
                self.adopt_l2(l1_index, run.first, &vec![0; layout.cluster() as usize]);
            }
        }
        Ok(self.l2_slice(guest_cluster)?.expect("the table exists"))
    }

    /// Copies an L2 table that a snapshot shares; the snapshot keeps the old one.
    fn copy_l2(&mut self, l1_index: usize, shared: u64) -> Result<(), Stop> {
        let layout = self.layout;
        let slices = (shared..shared + layout.cluster()).step_by(layout.slice() as usize);
        let mut bytes = Vec::with_capacity(layout.cluster() as usize);
        for slice in slices {
            self.need(TableKind::L2, slice)?;
            bytes.extend_from_slice(self.tables.get(slice).expect("looked up"));
        }
        let run = self.allocate(1)?;
        self.adopt_l2(l1_index, run.first, &bytes);
        self.free_clusters(shared, layout.cluster());
        Ok(())
    }

    fn adopt_l2(&mut self, l1_index: usize, cluster: u64, bytes: &[u8]) {
        let at = cluster << self.layout.cluster_bits;
        self.tables.create(TableKind::L2, at, bytes);
        self.note_structure(at, self.layout.cluster(), "L2 table");
        self.l1.set(l1_index, at | COPIED);
    }

    fn pending_over(&self, guest_cluster: u64) -> bool {
        self.pending.range(..=guest_cluster).next_back().is_some_and(|(_, &last)| last >= guest_cluster)
    }

    /// How many clusters from `first` on may be looked at together: to the end of the request, of the slice, or to the
    /// next pending cluster.
    fn run_limit(&self, first: u64, index: usize, last: u64) -> u64 {
        let in_slice = self.layout.slice_entries() - index as u64;
        let free = self.pending.range(first..).next().map_or(u64::MAX, |(&start, _)| start - first);
        (last - first + 1).min(in_slice).min(free)
    }

    fn write_kind(&mut self, slice: u64, index: usize, guest_cluster: u64) -> Result<Kind, Corrupt> {
        let zero_below = self.zero_below(guest_cluster);
        Ok(match self.decode(slice, index)? {
            Entry::Data { host, copied: true } => {
                self.check_data_place(host)?;
                Kind::InPlace(host)
            }
            Entry::Zero { host: Some(host), copied: true } => {
                self.check_data_place(host)?;
                Kind::Reserved(host)
            }
            Entry::Zero { .. } => Kind::New { zero: true },
            Entry::Unallocated => Kind::New { zero: zero_below },
            Entry::Data { .. } | Entry::Compressed(_) => Kind::New { zero: false },
        })
    }

    /// Whether an unallocated cluster reads as zeroes because no backing file reaches it.
    fn zero_below(&self, guest_cluster: u64) -> bool {
        guest_cluster << self.layout.cluster_bits >= self.backing_size
    }

    /// Guest data must not overwrite metadata, whatever an L2 table says.
    fn check_data_place(&self, host: HostOffset) -> Result<(), Corrupt> {
        let why = if self.structures.contains_key(&(host.0 >> self.layout.cluster_bits)) {
            "it is guest data by an L2 entry and metadata at the same time"
        } else if host.0 >= self.file_end {
            "an L2 entry places guest data behind the end of the file"
        } else {
            return Ok(());
        };
        Err(Corrupt { structure: "cluster", at: host.0, why })
    }

    /// Clusters from `first` on that lie one after the other in the file and take the write the same way.
    fn contiguous_run(
        &mut self,
        slice: u64,
        index: usize,
        first: u64,
        max: u64,
        host: HostOffset,
        reserved: bool,
    ) -> Result<u64, Stop> {
        let mut count = 1;
        while count < max {
            let expect = HostOffset(host.0 + (count << self.layout.cluster_bits));
            // a broken entry ends the run; the write to its own bytes will report it
            let same = match self.write_kind(slice, index + count as usize, first + count) {
                Ok(Kind::InPlace(h)) => !reserved && h == expect,
                Ok(Kind::Reserved(h)) => reserved && h == expect,
                _ => false,
            };
            if !same {
                break;
            }
            count += 1;
        }
        Ok(count)
    }

    /// Clusters from `first` on that all need a new cluster, with the same kind of content around.
    fn new_run(&mut self, slice: u64, index: usize, first: u64, max: u64, zero: bool) -> Result<u64, Stop> {
        let mut count = 1;
        while count < max {
            match self.write_kind(slice, index + count as usize, first + count) {
                Ok(Kind::New { zero: z }) if z == zero => count += 1,
                _ => break,
            }
        }
        Ok(count)
    }

    fn pend(
        &mut self,
        range: ByteRange,
        slice: u64,
        index: usize,
        count: u64,
        host: HostOffset,
        (new, zero_around, untouched): (bool, bool, bool),
    ) -> Allocation {
        let bits = self.layout.cluster_bits;
        let first = range.start().0 >> bits;
        let clusters = ByteRange::between(first << bits, (first + count) << bits);
        self.pending.insert(first, first + count - 1);
        self.tables.pin(slice);
        let range = range.clip(clusters.end().0);
        Allocation { range, clusters, host, zero_around, untouched, slice, index, new, reserve: false }
    }

    /// The allocation's bytes are in the file: publishes its clusters.
    pub fn commit(&mut self, a: Allocation) {
        let bits = self.layout.cluster_bits;
        let count = (a.clusters.len() >> bits) as usize;
        for i in 0..count {
            let host = HostOffset(a.host.0 + ((i as u64) << bits));
            if a.new {
                // decoded before: the slice was pinned and the clusters pending, so nothing changed meanwhile
                let old = self.decode(a.slice, a.index + i).expect("the entry was decoded when the write began");
                self.free_entry(old);
            }
            let raw = if a.reserve { Entry::zero(Some(host)) } else { Entry::data(host) };
            self.set_entry(a.slice, a.index + i, raw);
        }
        self.unpend(&a);
    }

    /// The allocation's bytes could not be written: nothing changes, its clusters are given back.
    pub fn abort(&mut self, a: Allocation) {
        if a.new {
            self.free_clusters(a.host.0, a.clusters.len());
        }
        self.unpend(&a);
    }

    fn unpend(&mut self, a: &Allocation) {
        self.pending.remove(&(a.clusters.start().0 >> self.layout.cluster_bits));
        self.tables.unpin(a.slice);
    }

    /// Takes back the reference an L2 entry held.
    fn free_entry(&mut self, old: Entry) {
        match old {
            Entry::Unallocated | Entry::Zero { host: None, .. } => {}
            Entry::Data { host, .. } | Entry::Zero { host: Some(host), .. } => {
                self.free_clusters(host.0, self.layout.cluster());
            }
            Entry::Compressed(c) => self.free_clusters(c.start.0, c.len),
        }
    }

    /// Whether zeroing all of `range` needs no data written, as far as whole clusters go (`ZeroMode::Discard`: always).
    pub fn zeroes_fast(&self) -> bool {
        self.layout.version >= 3
    }

    /// How to zero the first part of `range`, which is not empty and lies inside the disk.
    pub fn begin_zero(&mut self, range: ByteRange, mode: ZeroMode) -> Result<Zero, Fault> {
        match self.try_zero(range, mode) {
            Err(Stop::Load(table)) => Ok(Zero::Load(table)),
            Err(Stop::Wait) => Ok(Zero::Wait),
            Err(Stop::Fault(fault)) => Err(fault),
            Ok(zero) => Ok(zero),
        }
    }

    fn try_zero(&mut self, range: ByteRange, mode: ZeroMode) -> Result<Zero, Stop> {
        if self.check_writable()? {
            return Ok(Zero::Prepare);
        }
        let layout = self.layout;
        let bits = layout.cluster_bits;
        let first = range.start().0 >> bits;
        if self.pending_over(first) {
            return Err(Stop::Wait);
        }
        let cluster_end = ((first + 1) << bits).min(self.size);
        let whole = range.start().0 == first << bits && range.end().0 >= cluster_end;
        if !whole {
            let part = range.clip(cluster_end);
            return self.zero_part(part, first, mode);
        }
        // one past the last whole cluster: the one that holds the end of the disk counts as whole
        let end = if range.end().0 == self.size { range.end().0.div_ceil(1 << bits) } else { range.end().0 >> bits };

        let l1_index = (first / layout.l2_entries()) as usize;
        if mode != ZeroMode::Provision && self.l2_table(l1_index)?.is_none() && self.zero_below(first) {
            let table_end = (first / layout.l2_entries() + 1) * layout.l2_entries();
            return Ok(Zero::Done((end.min(table_end) << bits).min(range.end().0) - range.start().0));
        }
        let (slice, index) = self.writable_slice(first)?;
        let max = self.run_limit(first, index, end - 1);
        let bytes = |clusters: u64| ((first + clusters) << bits).min(range.end().0) - range.start().0;
        let mut count = 0;
        while count < max {
            let at = index + count as usize;
            let entry = self.decode(slice, at)?;
            match self.zero_entry(entry, first + count, mode) {
                ZeroEntry::Keep => {}
                ZeroEntry::Set(raw) => {
                    if mode != ZeroMode::Provision {
                        self.free_entry(entry);
                    }
                    self.set_entry(slice, at, raw);
                }
                ZeroEntry::Data if count == 0 => return Ok(Zero::Data(bytes(1))),
                ZeroEntry::Reserve if count == 0 => return self.reserve(range, slice, at, first, max),
                ZeroEntry::Data | ZeroEntry::Reserve => break,
            }
            count += 1;
        }
        Ok(Zero::Done(bytes(count)))
    }

    /// Part of a cluster: nothing to do where it reads as zeroes already, else the bytes are written.
    fn zero_part(&mut self, part: ByteRange, first: u64, mode: ZeroMode) -> Result<Zero, Stop> {
        if mode == ZeroMode::Discard {
            return Ok(Zero::Done(part.len()));
        }
        let entry = match self.l2_slice(first)? {
            Some((slice, index)) => self.decode(slice, index)?,
            None => Entry::Unallocated,
        };
        let zero = match entry {
            Entry::Unallocated => self.zero_below(first) && mode == ZeroMode::Unmap,
            Entry::Zero { host, .. } => host.is_some() || mode == ZeroMode::Unmap,
            Entry::Data { .. } | Entry::Compressed(_) => false,
        };
        Ok(if zero { Zero::Done(part.len()) } else { Zero::Data(part.len()) })
    }

    fn zero_entry(&self, entry: Entry, guest_cluster: u64, mode: ZeroMode) -> ZeroEntry {
        let zero_below = self.zero_below(guest_cluster);
        let flag = self.layout.version >= 3;
        match (mode, entry) {
            (ZeroMode::Provision, Entry::Zero { host: Some(_), copied: true }) => ZeroEntry::Keep,
            (ZeroMode::Provision, Entry::Data { host, copied: true }) if flag => {
                match self.check_data_place(host) {
                    Ok(()) => ZeroEntry::Set(Entry::zero(Some(host))),
                    Err(_) => ZeroEntry::Data, // the write of those bytes reports it
                }
            }
            (ZeroMode::Provision, _) => {
                if flag {
                    ZeroEntry::Reserve
                } else {
                    ZeroEntry::Data
                }
            }
            (_, Entry::Zero { host: None, .. }) => ZeroEntry::Keep,
            (_, Entry::Unallocated) if zero_below => ZeroEntry::Keep,
            (_, _) if flag => ZeroEntry::Set(Entry::zero(None)),
            // version 2 has no zero flag: unallocated reads as zeroes only where no backing file is
            (_, _) if zero_below => ZeroEntry::Set(0),
            (ZeroMode::Discard, _) => ZeroEntry::Keep,
            (_, _) => ZeroEntry::Data,
        }
    }

    /// New clusters that are reserved but read as zeroes ([`ZeroMode::Provision`]).
    fn reserve(&mut self, range: ByteRange, slice: u64, index: usize, first: u64, max: u64) -> Result<Zero, Stop> {
        let mut count = 1;
        while count < max {
            let Ok(entry) = self.decode(slice, index + count as usize) else { break };
            if !matches!(self.zero_entry(entry, first + count, ZeroMode::Provision), ZeroEntry::Reserve) {
                break;
            }
            count += 1;
        }
        let run = self.allocate(count)?;
        let host = HostOffset(run.first << self.layout.cluster_bits);
        let mut a = self.pend(range, slice, index, run.count, host, (true, true, run.untouched));
        a.reserve = true;
        Ok(Zero::Allocate(a))
    }
}

/// What zeroing does to one L2 entry.
enum ZeroEntry {
    /// It reads as zeroes already, or may stay.
    Keep,
    /// Replace it.
    Set(u64),
    /// Its bytes must be written.
    Data,
    /// It gets a reserved cluster.
    Reserve,
}
