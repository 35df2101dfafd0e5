//! How a range is written: in place, into new clusters, or by saying "zero".
//!
//! A write that needs new clusters is an [`Allocation`]: the caller writes the data (and what surrounds it in its
//! clusters) and then commits, which publishes the new clusters in the L2 table, or aborts, which gives them back.
//! Until then the guest clusters are pending: other writes to them wait, reads see the old content.

use super::entry::{COPIED, CompressedRange, Entry, Mixed, RawEntry};
use super::layout::{Layout, SUBCLUSTERS};
use super::metadata::{Corrupt, Fault, Metadata, Ready, RootKind, Stop};
use super::tables::{Table, TableKind};
use crate::block::Errno;
use crate::units::{ByteRange, GuestOffset, HostOffset, HostRange};

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
    /// Keep the clusters there are, and reserve none.
    Keep,
    /// Keep or reserve clusters, so that later writes cannot fail for lack of space (NBD NO_HOLE).
    Provision,
    /// Content is no longer needed: whole clusters are given back, the rest stays (NBD trim).
    Discard,
    /// Whole clusters become unallocated, so that the backing file shows through; the rest stays.
    Expose,
    /// The bytes were zeroed where a raw external data file has them: whatever leads there, or nowhere, stays.
    InPlace,
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
    /// The guest bytes that are stored anew. What of them is outside `range` is to be filled with the old content.
    pub span: ByteRange,
    /// Where the first byte of `span` goes; the others follow.
    pub host: HostOffset,
    /// The old content around `range` is zeroes.
    pub zero_around: bool,
    /// The file reads as zeroes here: zeroes around `range` need no write.
    pub untouched: bool,
    slice: u64,
    index: usize,
    /// First guest cluster, their number, and the host cluster of the first.
    first: u64,
    count: u64,
    cluster_host: HostOffset,
    /// Its host clusters were allocated for it.
    new: bool,
    kind: Publish,
}

/// What an allocation's clusters become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Publish {
    Data,
    /// Reserved, reading as zeroes.
    Reserve,
    Compressed(CompressedRange),
}

/// Compressed data on its way into one guest cluster: where it goes, and the allocation to commit or abort.
#[derive(Debug)]
pub enum Packed {
    /// Write the compressed bytes at the allocation's `host`, then commit.
    Allocate(Allocation),
    /// The format has no place for compressed data here: write the cluster plainly.
    Plain,
}

/// How an entry takes a write.
enum Kind {
    /// Its host cluster can be written.
    InPlace(HostOffset),
    /// A reserved cluster becomes data.
    Reserved(HostOffset),
    /// Some subclusters of its host cluster can be written.
    Parts(Mixed),
    /// Needs a new cluster; the old content is zeroes or not, and moves along as a whole or not.
    New { zero: bool, whole: bool },
}

/// How the clusters of an allocation are filled.
#[derive(Clone, Copy)]
struct Fill {
    new: bool,
    whole: bool,
    zero_around: bool,
    untouched: bool,
}

impl Allocation {
    /// Where the first byte of `range` goes.
    pub fn data_host(&self) -> HostOffset {
        HostOffset(self.host.0 + (self.range.start().0 - self.span.start().0))
    }

    /// The host clusters that belong to nothing but this allocation.
    pub fn fresh(&self) -> Option<HostRange> {
        (self.new && self.kind == Publish::Data).then(|| HostRange::new(self.host, self.span.len()))
    }

    /// The guest bytes of `span` before `range`.
    pub fn head(&self) -> ByteRange {
        ByteRange::between(self.span.start().0, self.range.start().0)
    }

    /// The guest bytes of `span` behind `range`; may reach beyond the end of the disk.
    pub fn tail(&self) -> ByteRange {
        ByteRange::between(self.range.end().0, self.span.end().0)
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

    /// Where the first part of `range` can be written in place, and the length of that part, as far as the tables in
    /// memory tell. Changes nothing and asks for nothing: `None` says to ask [`Metadata::begin_write`].
    pub fn in_place(&mut self, range: ByteRange) -> Option<HostRange> {
        let bits = self.layout.cluster_bits;
        let first = range.start().0 >> bits;
        let own = matches!(self.l2_table((first / self.layout.l2_entries()) as usize), Ok(Some((_, true))));
        let settled = self.broken.is_none() && self.autoclear == 0 && !self.pending_over(first);
        if !(own && settled && self.at_hand(first)) {
            return None;
        }
        let (slice, index) = self.l2_slice(first).ok()??;
        match self.write_kind(slice, index, first) {
            Ok(Kind::InPlace(host)) => self.run_in_place(range, slice, index, host).ok(),
            _ => None,
        }
    }

    /// What of `range`, from its start, lies one after the other in clusters of our own; the first is at `host`.
    fn run_in_place(
        &mut self,
        range: ByteRange,
        slice: u64,
        index: usize,
        host: HostOffset,
    ) -> Result<HostRange, Stop> {
        let bits = self.layout.cluster_bits;
        let first = range.start().0 >> bits;
        let max = self.run_limit(first, index, (range.end().0 - 1) >> bits);
        let count = self.contiguous_run(slice, index, first, max, host, false)?;
        let in_cluster = range.start().0 % self.layout.cluster();
        let len = ((count << bits) - in_cluster).min(range.len());
        Ok(HostRange::new(HostOffset(host.0 + in_cluster), len))
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
                let run = self.run_in_place(range, slice, index, host)?;
                Ok(Write::InPlace { host: run.start(), len: run.len() })
            }
            Kind::Reserved(host) => {
                let count = self.contiguous_run(slice, index, first, max, host, true)?;
                let fill = Fill { new: false, whole: false, zero_around: true, untouched: false };
                Ok(Write::Allocate(self.pend(range, slice, index, count, host, fill)))
            }
            Kind::Parts(mixed) => Ok(self.write_parts(range, slice, index, mixed)),
            Kind::New { zero, whole } => {
                let mut count = self.new_run(slice, index, first, max, (zero, whole))?;
                let mut untouched = false;
                let mut host = HostOffset(first << bits);
                if !self.layout.data_file {
                    let run = self.allocate(count)?;
                    (host, count, untouched) = (HostOffset(run.first << bits), run.count, run.untouched);
                }
                let fill = Fill { new: true, whole, zero_around: zero, untouched };
                Ok(Write::Allocate(self.pend(range, slice, index, count, host, fill)))
            }
        }
    }

    /// A write into a cluster of our own whose subclusters differ: the first of them that take it the same way.
    fn write_parts(&mut self, range: ByteRange, slice: u64, index: usize, mixed: Mixed) -> Write {
        let (cluster, unit) = (self.layout.cluster(), self.layout.unit());
        let host = mixed.host.expect("it can be written in place");
        let in_cluster = range.start().0 % cluster;
        let base = range.start().0 - in_cluster;
        let allocated = |sub: u64| mixed.allocated >> sub & 1 != 0;
        let sub = in_cluster / unit;
        let end = (sub + 1..SUBCLUSTERS).find(|&next| allocated(next) != allocated(sub)).unwrap_or(SUBCLUSTERS);
        let part = range.clip(base + end * unit);
        if allocated(sub) {
            return Write::InPlace { host: HostOffset(host.0 + in_cluster), len: part.len() };
        }
        let last = (part.end().0 - 1 - base) / unit;
        let zero_below = self.zero_below(base >> self.layout.cluster_bits);
        let zero = |sub: u64| mixed.zero >> sub & 1 != 0 || zero_below;
        let fill = Fill { new: false, whole: false, zero_around: zero(sub) && zero(last), untouched: false };
        Write::Allocate(self.pend(part, slice, index, 1, host, fill))
    }

    /// Where `len` bytes of compressed data (whole sectors, less than a cluster) for the guest cluster that begins at
    /// `guest` go.
    pub fn begin_packed(&mut self, guest: GuestOffset, len: u64) -> Result<Ready<Packed>, Fault> {
        match self.check_writable() {
            Ok(true) => Ok(Ready::Prepare),
            Ok(false) => Ready::answer(self.try_packed(guest, len)),
            Err(stop) => Ready::answer(Err(stop)),
        }
    }

    fn try_packed(&mut self, guest: GuestOffset, len: u64) -> Result<Packed, Stop> {
        let cluster = self.layout.cluster();
        assert!(guest.0.is_multiple_of(cluster) && len.is_multiple_of(512) && len < cluster);
        if self.layout.data_file {
            return Ok(Packed::Plain);
        }
        let first = guest.0 >> self.layout.cluster_bits;
        let (slice, index) = self.writable_slice(first)?;
        let old = self.decode(slice, index, first)?;
        self.check_given_up(old)?;
        let Some(place) = self.allocate_packed(len)? else { return Ok(Packed::Plain) };
        let fill = Fill { new: true, whole: true, zero_around: true, untouched: true };
        let range = ByteRange::between(guest.0, guest.0 + cluster);
        let mut a = self.pend(range, slice, index, 1, place.start, fill);
        a.kind = Publish::Compressed(place);
        Ok(Packed::Allocate(a))
    }

    /// Refuses writes to a broken image; true when a flush must come first, because the header is to change, or the journal
    /// to get room.
    pub(super) fn check_writable(&mut self) -> Result<bool, Stop> {
        if self.broken.is_some() {
            return Err(Stop::Fault(Fault::Errno(Errno::EIO)));
        }
        self.first_write |= self.autoclear != 0;
        Ok(self.autoclear != 0 || self.journal_crowded())
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
        self.create_table(TableKind::L2, at, bytes);
        self.note_structure(at, self.layout.cluster(), "L2 table");
        self.set_root(RootKind::L1, l1_index, at | COPIED);
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
        let entry = self.decode(slice, index, guest_cluster)?;
        self.check_given_up(entry)?;
        Ok(match entry {
            Entry::Data { host, copied: true } => {
                self.check_data_place(host)?;
                Kind::InPlace(host)
            }
            Entry::Zero { host: Some(host), copied: true } => {
                self.check_data_place(host)?;
                Kind::Reserved(host)
            }
            Entry::Mixed(mixed @ Mixed { host: Some(host), copied: true, .. }) => {
                self.check_data_place(host)?;
                Kind::Parts(mixed)
            }
            Entry::Zero { .. } => Kind::New { zero: true, whole: false },
            Entry::Unallocated => Kind::New { zero: zero_below, whole: false },
            Entry::Mixed(mixed) => Kind::New { zero: false, whole: mixed.allocated != 0 },
            Entry::Data { .. } | Entry::Compressed(_) => Kind::New { zero: false, whole: true },
        })
    }

    /// Whether an unallocated cluster reads as zeroes because no backing file reaches it.
    fn zero_below(&self, guest_cluster: u64) -> bool {
        guest_cluster << self.layout.cluster_bits >= self.backing_size
    }

    /// Guest data must not overwrite metadata, whatever an L2 table says.
    fn check_data_place(&self, host: HostOffset) -> Result<(), Corrupt> {
        if self.layout.data_file {
            return Ok(()); // nothing but guest data is there
        }
        let why = if self.structures.get(host.0 >> self.layout.cluster_bits).is_some() {
            "it is guest data by an L2 entry and metadata at the same time"
        } else if host.0 >= self.file_end {
            "an L2 entry places guest data behind the end of the file"
        } else {
            return Ok(());
        };
        Err(Corrupt { structure: "cluster", at: host.0, why })
    }

    /// Metadata must not lose its cluster either, because an L2 entry that is replaced says it was guest data.
    fn check_given_up(&self, entry: Entry) -> Result<(), Corrupt> {
        let (at, len) = match entry {
            Entry::Compressed(packed) => (packed.start.0, packed.len),
            _ if self.layout.data_file => return Ok(()),
            _ => match entry.host() {
                Some(host) => (host.0, self.layout.cluster()),
                None => return Ok(()),
            },
        };
        let bits = self.layout.cluster_bits;
        let mut clusters = at >> bits..=(at + len - 1) >> bits;
        match clusters.find(|&cluster| self.structures.get(cluster).is_some()) {
            Some(cluster) => Err(Corrupt {
                structure: "cluster",
                at: cluster << bits,
                why: "it is guest data by an L2 entry and metadata at the same time",
            }),
            None => Ok(()),
        }
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
    fn new_run(&mut self, slice: u64, index: usize, first: u64, max: u64, like: (bool, bool)) -> Result<u64, Stop> {
        let mut count = 1;
        while count < max {
            match self.write_kind(slice, index + count as usize, first + count) {
                Ok(Kind::New { zero, whole }) if (zero, whole) == like => count += 1,
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
        cluster_host: HostOffset,
        fill: Fill,
    ) -> Allocation {
        let bits = self.layout.cluster_bits;
        let first = range.start().0 >> bits;
        let (start, end) = (first << bits, (first + count) << bits);
        self.pending.insert(first, first + count - 1);
        self.tables.pin(slice);
        let range = range.clip(end);
        let unit = if fill.whole { self.layout.cluster() } else { self.layout.unit() };
        let span_start = range.start().0 / unit * unit;
        let mut span_end = range.end().0.next_multiple_of(unit);
        if self.layout.data_file {
            // the data file is the disk: it does not get longer
            span_end = span_end.min(self.size.max(range.end().0));
        }
        Allocation {
            range,
            span: ByteRange::between(span_start, span_end),
            host: HostOffset(cluster_host.0 + (span_start - start)),
            zero_around: fill.zero_around,
            untouched: fill.untouched,
            slice,
            index,
            first,
            count,
            cluster_host,
            new: fill.new,
            kind: Publish::Data,
        }
    }

    /// The allocation's bytes are in the file: publishes its clusters.
    pub fn commit(&mut self, a: Allocation) {
        for i in 0..a.count {
            let index = a.index + i as usize;
            // decoded before: the slice was pinned and the clusters pending, so nothing changed meanwhile
            let old = self.decode(a.slice, index, a.first + i).expect("the entry was decoded when the write began");
            self.set_entry(a.slice, index, self.published(&a, i, old));
            if a.new {
                self.free_entry(old);
            }
        }
        self.unpend(&a);
        self.seal_journal();
    }

    /// What the entry of an allocation's cluster `i` becomes.
    fn published(&self, a: &Allocation, i: u64, old: Entry) -> RawEntry {
        let (layout, bits) = (self.layout, self.layout.cluster_bits);
        let host = HostOffset(a.cluster_host.0 + (i << bits));
        match a.kind {
            Publish::Compressed(place) => return RawEntry::compressed(place, layout),
            Publish::Reserve => return RawEntry::zero(Some(host), layout),
            Publish::Data if !layout.extended_l2 => return RawEntry::data(host, layout),
            Publish::Data => {}
        }
        let start = (a.first + i) << bits;
        let written = subclusters(layout, start, a.span);
        let (allocated, zero) = match old {
            Entry::Zero { .. } => (0, u32::MAX),
            Entry::Mixed(mixed) => (mixed.allocated, mixed.zero),
            Entry::Unallocated | Entry::Data { .. } | Entry::Compressed(_) => (0, 0),
        };
        // in a new cluster there is nothing but what was written; old data moved along as a whole
        let kept = if a.new { 0 } else { allocated };
        RawEntry::mixed(Mixed { host: Some(host), copied: true, allocated: kept | written, zero: zero & !written })
    }

    /// The allocation's bytes could not be written: nothing changes, its clusters are given back.
    pub fn abort(&mut self, a: Allocation) {
        match a.kind {
            Publish::Compressed(place) => self.free_clusters(place.start.0, place.len),
            _ if a.new && !self.layout.data_file => {
                self.free_clusters(a.cluster_host.0, a.count << self.layout.cluster_bits);
            }
            _ => {}
        }
        self.unpend(&a);
    }

    fn unpend(&mut self, a: &Allocation) {
        self.pending.remove(&a.first);
        self.tables.unpin(a.slice);
    }

    /// Takes back the reference an L2 entry held.
    fn free_entry(&mut self, old: Entry) {
        match old {
            Entry::Compressed(c) => self.free_clusters(c.start.0, c.len),
            _ if self.layout.data_file => {}
            _ => {
                if let Some(host) = old.host() {
                    self.free_clusters(host.0, self.layout.cluster());
                }
            }
        }
    }

    /// Whether zeroing all of `range` needs no data written, as far as whole clusters go.
    pub fn zeroes_fast(&self, range: ByteRange, mode: ZeroMode) -> bool {
        let unmaps = !matches!(mode, ZeroMode::Provision);
        self.layout.version >= 3 || (unmaps && self.zero_below(range.start().0 >> self.layout.cluster_bits))
    }

    /// How to zero the first part of `range`, which is not empty and lies inside the disk.
    pub fn begin_zero(&mut self, range: ByteRange, mode: ZeroMode) -> Result<Zero, Fault> {
        let zero = self.try_zero(range, mode);
        self.seal_journal();
        match zero {
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
        if mode == ZeroMode::InPlace {
            return Ok(Zero::Done(range.len()));
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
        let unmapped_suffices = match mode {
            ZeroMode::Provision => false,
            ZeroMode::Expose | ZeroMode::InPlace => true,
            ZeroMode::Unmap | ZeroMode::Keep | ZeroMode::Discard => self.zero_below(first),
        };
        if unmapped_suffices && self.l2_table(l1_index)?.is_none() {
            let run_end = self.unmapped_run(range, l1_index).end().0;
            return Ok(Zero::Done((end << bits).min(run_end).min(range.end().0) - range.start().0));
        }
        let (slice, index) = self.writable_slice(first)?;
        let max = self.run_limit(first, index, end - 1);
        let bytes = |clusters: u64| ((first + clusters) << bits).min(range.end().0) - range.start().0;
        let mut count = 0;
        while count < max {
            let at = index + count as usize;
            let entry = self.decode(slice, at, first + count)?;
            self.check_given_up(entry)?;
            match self.zero_entry(entry, first + count, mode) {
                ZeroEntry::Keep => {}
                ZeroEntry::Set(raw) => {
                    self.set_entry(slice, at, raw);
                    let after = self.decode(slice, at, first + count)?;
                    if after.host() != entry.host() || matches!(entry, Entry::Compressed(_)) {
                        self.free_entry(entry);
                    }
                }
                ZeroEntry::Data if count == 0 => {
                    let clusters = self.data_run(slice, index, first, max, mode);
                    return Ok(Zero::Data(bytes(clusters)));
                }
                ZeroEntry::Reserve if count == 0 => return self.reserve(range, slice, at, first, max),
                ZeroEntry::Data | ZeroEntry::Reserve => break,
            }
            count += 1;
        }
        Ok(Zero::Done(bytes(count)))
    }

    /// Clusters from `first` on whose zeroes all have to be data.
    fn data_run(&mut self, slice: u64, index: usize, first: u64, max: u64, mode: ZeroMode) -> u64 {
        let mut count = 1;
        while count < max {
            let entry = self.decode(slice, index + count as usize, first + count);
            // a broken entry ends the run; the write to its own bytes will report it
            let data = entry.is_ok_and(|entry| matches!(self.zero_entry(entry, first + count, mode), ZeroEntry::Data));
            if !data {
                break;
            }
            count += 1;
        }
        count
    }

    /// Part of a cluster: nothing to do where it reads as zeroes already, else the bytes are written.
    fn zero_part(&mut self, part: ByteRange, first: u64, mode: ZeroMode) -> Result<Zero, Stop> {
        if matches!(mode, ZeroMode::Discard | ZeroMode::Expose | ZeroMode::InPlace) {
            return Ok(Zero::Done(part.len()));
        }
        let entry = match self.l2_slice(first)? {
            Some((slice, index)) => self.decode(slice, index, first)?,
            None => Entry::Unallocated,
        };
        let done = match entry {
            Entry::Unallocated => self.zero_below(first) && mode != ZeroMode::Provision,
            Entry::Zero { host, .. } => host.is_some() || mode != ZeroMode::Provision,
            Entry::Mixed(_) | Entry::Data { .. } | Entry::Compressed(_) => false,
        };
        if done {
            return Ok(Zero::Done(part.len()));
        }
        match self.layout.extended_l2 {
            true => self.zero_subclusters(part, first, entry, mode),
            false => Ok(Zero::Data(part.len())),
        }
    }

    /// Part of a cluster with subclusters: whole ones need no data written, unless nothing is reserved for them and
    /// something shall be.
    fn zero_subclusters(&mut self, part: ByteRange, first: u64, entry: Entry, mode: ZeroMode) -> Result<Zero, Stop> {
        let unit = self.layout.unit();
        let (start, end) = (part.start().0, part.end().0);
        let whole_end = if end == self.size { end.next_multiple_of(unit) } else { end / unit * unit };
        let reserved = matches!(
            entry,
            Entry::Data { copied: true, .. }
                | Entry::Zero { host: Some(_), copied: true }
                | Entry::Mixed(Mixed { host: Some(_), copied: true, .. })
        );
        let by_flag = !matches!(entry, Entry::Compressed(_)) && (mode != ZeroMode::Provision || reserved);
        if !by_flag || !start.is_multiple_of(unit) || whole_end <= start {
            let len = if by_flag { ((start / unit + 1) * unit).min(end) - start } else { part.len() };
            return Ok(Zero::Data(len));
        }
        let (slice, index) = self.writable_slice(first)?;
        let zeroed = subclusters(self.layout, first << self.layout.cluster_bits, ByteRange::between(start, whole_end));
        let (allocated, zero) = match entry {
            Entry::Unallocated | Entry::Compressed(_) => (0, 0),
            Entry::Zero { .. } => (0, u32::MAX),
            Entry::Data { .. } => (u32::MAX, 0),
            Entry::Mixed(mixed) => (mixed.allocated, mixed.zero),
        };
        let copied = matches!(entry, Entry::Data { copied: true, .. } | Entry::Zero { copied: true, .. })
            || matches!(entry, Entry::Mixed(mixed) if mixed.copied);
        let mixed = Mixed { host: entry.host(), copied, allocated: allocated & !zeroed, zero: zero | zeroed };
        self.set_entry(slice, index, RawEntry::mixed(mixed));
        Ok(Zero::Done(whole_end.min(end) - start))
    }

    fn zero_entry(&self, entry: Entry, guest_cluster: u64, mode: ZeroMode) -> ZeroEntry {
        let zero_below = self.zero_below(guest_cluster);
        let flag = self.layout.version >= 3;
        match (mode, entry) {
            (ZeroMode::InPlace, _) | (ZeroMode::Expose, Entry::Unallocated) => ZeroEntry::Keep,
            (ZeroMode::Expose, _) => ZeroEntry::Set(RawEntry::UNALLOCATED),
            (ZeroMode::Provision, Entry::Zero { host: Some(_), copied: true }) => ZeroEntry::Keep,
            (ZeroMode::Keep, Entry::Zero { .. }) => ZeroEntry::Keep,
            (
                ZeroMode::Provision | ZeroMode::Keep,
                Entry::Data { host, copied: true } | Entry::Mixed(Mixed { host: Some(host), copied: true, .. }),
            ) if flag => {
                match self.check_data_place(host) {
                    Ok(()) => ZeroEntry::Set(RawEntry::zero(Some(host), self.layout)),
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
            (_, _) if flag => ZeroEntry::Set(RawEntry::zero(None, self.layout)),
            // version 2 has no zero flag: unallocated reads as zeroes only where no backing file is
            (_, _) if zero_below => ZeroEntry::Set(RawEntry::UNALLOCATED),
            (ZeroMode::Discard, _) => ZeroEntry::Keep,
            (_, _) => ZeroEntry::Data,
        }
    }

    /// New clusters that are reserved but read as zeroes ([`ZeroMode::Provision`]).
    fn reserve(&mut self, range: ByteRange, slice: u64, index: usize, first: u64, max: u64) -> Result<Zero, Stop> {
        let mut count = 1;
        while count < max {
            let Ok(entry) = self.decode(slice, index + count as usize, first + count) else { break };
            if self.check_given_up(entry).is_err() {
                break;
            }
            if !matches!(self.zero_entry(entry, first + count, ZeroMode::Provision), ZeroEntry::Reserve) {
                break;
            }
            count += 1;
        }
        let mut host = HostOffset(first << self.layout.cluster_bits);
        if !self.layout.data_file {
            let run = self.allocate(count)?;
            (host, count) = (HostOffset(run.first << self.layout.cluster_bits), run.count);
        }
        let fill = Fill { new: true, whole: true, zero_around: true, untouched: false };
        let mut a = self.pend(range, slice, index, count, host, fill);
        a.kind = Publish::Reserve;
        Ok(Zero::Allocate(a))
    }
}

/// The subclusters of the cluster that begins at `start` that lie in `range`, whose borders are borders of subclusters
/// or the end of the disk.
fn subclusters(layout: Layout, start: u64, range: ByteRange) -> u32 {
    let bit = |at: u64| (at.clamp(start, start + layout.cluster()) - start).div_ceil(layout.unit());
    let (from, to) = (bit(range.start().0), bit(range.end().0));
    (((1u64 << to) - 1) & !((1u64 << from) - 1)) as u32
}

/// What zeroing does to one L2 entry.
enum ZeroEntry {
    /// It reads as zeroes already, or may stay.
    Keep,
    /// Replace it.
    Set(RawEntry),
    /// Its bytes must be written.
    Data,
    /// It gets a reserved cluster.
    Reserve,
}
