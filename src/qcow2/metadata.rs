//! The brain of one image: its tables in memory and the answer to "where is this range?".
//!
//! [`Metadata`] performs no I/O. When a question needs bytes from the disk it answers `Load(table)`; the caller reads
//! them, hands them to [`Metadata::loaded`] and asks again. `Wait` means that another request must make progress
//! first. One `Metadata` serves every thread, behind a mutex that is never held across an await.
//!
//! Host clusters that an operation is using stay what they are until the operation is over: callers bracket each
//! operation with [`Metadata::enter`] and [`Metadata::leave`], and a freed cluster is reused only when everything that
//! may still point at it has left (see [`super::writeback`]).

use super::entry::{COPIED, CompressedRange, Entry, Mixed, OFFSET_MASK, RawEntry};
use super::header::{Header, field};
use super::journal::{Journal, Order};
use super::layout::{Layout, MAX_HOST_OFFSET, SUBCLUSTERS};
use super::places::Places;
use super::tables::{Table, TableKind, Tables};
use super::writeback::Cycle;
use crate::block::Errno;
use crate::units::{ByteRange, HostOffset};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use thiserror::Error;

/// A structure of the image contradicts the format.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("corrupt {structure} at byte {at}: {why}")]
pub struct Corrupt {
    /// Name of the structure in the specification.
    pub structure: &'static str,
    /// Its position in the image file, in bytes.
    pub at: u64,
    /// What is wrong.
    pub why: &'static str,
}

/// Why a question has no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    /// The image is broken here.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The request cannot be carried out.
    #[error("{0}")]
    Errno(Errno),
}

/// Where a run of guest bytes comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Contiguous bytes of the image file, or of its external data file, from here.
    Data(HostOffset),
    /// Zeroes.
    Zero {
        /// A host cluster is kept for them.
        reserved: bool,
    },
    /// Part of one compressed cluster.
    Compressed(CompressedRange),
    /// The backing file, or zeroes beyond its end.
    Unallocated,
}

/// A run of guest bytes with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// The run.
    pub range: ByteRange,
    /// Where its bytes are.
    pub source: Source,
}

/// Answer to [`Metadata::map`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Map {
    /// The first run of the range.
    Extent(Mapped),
    /// Read this table, hand it in, ask again.
    Load(Table),
    /// Somebody else is reading that table: wait for progress, ask again.
    Wait,
}

/// Answer to a change of the metadata itself.
#[derive(Debug)]
pub enum Ready<T> {
    /// Done; durable after the next write-back cycle.
    Done(T),
    /// Read this table, hand it in, ask again.
    Load(Table),
    /// Another request must make progress first.
    Wait,
    /// Run a write-back cycle, ask again.
    Prepare,
}

impl<T> Ready<T> {
    pub(super) fn answer(result: Result<T, Stop>) -> Result<Ready<T>, Fault> {
        match result {
            Ok(done) => Ok(Ready::Done(done)),
            Err(Stop::Load(table)) => Ok(Ready::Load(table)),
            Err(Stop::Wait) => Ok(Ready::Wait),
            Err(Stop::Fault(fault)) => Err(fault),
        }
    }
}

/// Why an internal step stopped short; callers turn it into their own answer.
#[derive(Debug)]
pub(super) enum Stop {
    Load(Table),
    Wait,
    Fault(Fault),
}

impl From<Corrupt> for Stop {
    fn from(c: Corrupt) -> Self {
        Stop::Fault(Fault::Corrupt(c))
    }
}

/// A table in memory as a whole (L1, refcount table) and what of it is newer than the disk.
pub(super) struct Root {
    pub at: HostOffset,
    pub entries: Vec<u64>,
    pub dirty: BTreeSet<usize>,
    /// The table moved: the header still names its old place.
    pub moved: bool,
    /// Entries that its place has room for.
    pub room: usize,
}

/// The tables that the header leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum RootKind {
    L1,
    Reftable,
}

impl RootKind {
    /// When a table at a new place is written.
    fn table(self) -> Order {
        match self {
            RootKind::L1 => Order::L2,
            RootKind::Reftable => Order::Refcounts,
        }
    }

    /// When its entries, and the header's fields that name it, are.
    fn pointer(self) -> Order {
        match self {
            RootKind::L1 => Order::L1,
            RootKind::Reftable => Order::Reftable,
        }
    }

    /// The header's fields for a table of `entries` at `at`: where they are, and their bytes.
    pub fn header_field(self, at: HostOffset, entries: u64, cluster: u64) -> (u64, Vec<u8>) {
        let at = at.0.to_be_bytes();
        match self {
            RootKind::L1 => (field::L1, [&(entries as u32).to_be_bytes()[..], &at].concat()),
            RootKind::Reftable => {
                let clusters = (entries * 8 / cluster) as u32;
                (field::REFTABLE, [&at[..], &clusters.to_be_bytes()].concat())
            }
        }
    }
}

/// What surrounds the metadata: facts about the file it lives in.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// Length of the image file in bytes.
    pub file_len: u64,
    /// Bytes behind `file_len` read as zeroes once the file has grown over them (regular files).
    pub grows_with_zeroes: bool,
    /// Virtual size in bytes of the backing file; 0 without one.
    pub backing_size: u64,
    /// Limit for cached tables in bytes.
    pub cache_bytes: u64,
    /// Autoclear feature bits that whoever uses the metadata keeps true.
    pub maintained: u64,
}

/// The state of one image's metadata.
pub struct Metadata {
    pub(super) layout: Layout,
    pub(super) size: u64,
    pub(super) backing_size: u64,
    pub(super) l1: Root,
    pub(super) reftable: Root,
    pub(super) tables: Tables,
    /// Clusters that hold metadata, by index: guest data is never written there.
    pub(super) structures: Places,
    /// Autoclear feature bits that must go before the first write.
    pub(super) autoclear: u64,
    /// Autoclear feature bits that stay as they are.
    pub(super) kept: u64,
    /// That write is waiting.
    pub(super) first_write: bool,
    /// Set when a corruption was seen: no more writes.
    pub(super) broken: Option<Corrupt>,
    /// `broken` was found without a caller to tell.
    unreported: bool,

    // allocation (alloc.rs)
    /// Clusters below this index were looked at, or are in `free`.
    pub(super) cursor: u64,
    /// Clusters freed since the image was opened, as start and length.
    pub(super) free: BTreeMap<u64, u64>,
    /// From here on the file was never written: it reads as zeroes. `u64::MAX` when it does not grow with zeroes.
    pub(super) untouched: u64,
    /// End of the file, in bytes, with all that was allocated.
    pub(super) file_end: u64,
    /// Where the next compressed cluster goes: behind the last, in a cluster with room left.
    pub(super) pack: Option<u64>,
    /// Clusters below this index can be allocated. A device does not grow: a table placed behind its end could never be
    /// written, and no flush would succeed any more.
    pub(super) limit: u64,

    // writes under way (write.rs): first guest cluster -> last guest cluster
    pub(super) pending: BTreeMap<u64, u64>,

    // freed clusters on their way (writeback.rs)
    pub(super) freed: Vec<u64>,
    pub(super) freed_durable: VecDeque<(u64, Vec<u64>)>,
    pub(super) cycle: Option<Cycle>,
    epoch: u64,
    active: BTreeMap<u64, u64>,

    /// Where changes are noted that outlive the process.
    pub(super) journal: Option<Box<Journal>>,
}

impl Metadata {
    /// The metadata of an image whose header, L1 table and refcount table were read. `l1` and `reftable` are the bytes
    /// at the places the header names, zero-filled where the file ends; `structures` are further places that must
    /// never be written as data (start in bytes, length in bytes, name).
    ///
    /// Contradictions that make writing unsafe are kept and refuse writes later: a broken image stays readable.
    pub fn new(
        header: &Header,
        l1: &[u8],
        reftable: &[u8],
        structures: &[(u64, u64, &'static str)],
        around: Surroundings,
    ) -> Metadata {
        let layout = header.layout;
        let file_end = around.file_len.next_multiple_of(layout.cluster());
        let mut md = Metadata {
            layout,
            size: header.size,
            backing_size: around.backing_size,
            l1: Root::new(header.l1_offset, l1),
            reftable: Root::new(header.reftable_offset, reftable),
            tables: Tables::new(layout.slice(), around.cache_bytes, layout.cluster()),
            structures: Places::default(),
            autoclear: header.autoclear & !around.maintained,
            kept: header.autoclear & around.maintained,
            first_write: false,
            broken: None,
            unreported: false,
            cursor: 1,
            free: BTreeMap::new(),
            untouched: if around.grows_with_zeroes { file_end } else { u64::MAX },
            file_end,
            limit: if around.grows_with_zeroes { MAX_HOST_OFFSET } else { around.file_len } >> layout.cluster_bits,
            pack: None,
            pending: BTreeMap::new(),
            freed: Vec::new(),
            freed_durable: VecDeque::new(),
            cycle: None,
            epoch: 0,
            active: BTreeMap::new(),
            journal: None,
        };
        md.note_structure(0, layout.cluster(), "header");
        md.note_structure(header.l1_offset.0, l1.len() as u64, "L1 table");
        md.note_structure(header.reftable_offset.0, reftable.len() as u64, "refcount table");
        for &(at, len, name) in structures {
            md.note_structure(at, len, name);
        }
        for i in 0..md.reftable.entries.len() {
            let at = md.reftable.entries[i] & !0x1ff;
            if at != 0 {
                md.note_structure(at, layout.cluster(), "refcount block");
            }
        }
        // without refcounts it is only read: a layer of a chain
        let written = !md.reftable.entries.is_empty();
        for i in 0..if written { md.l1.entries.len() } else { 0 } {
            let at = md.l1.entries[i] & OFFSET_MASK;
            if at != 0 {
                md.note_structure(at, layout.cluster(), "L2 table");
            }
        }
        md
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the part of the disk ends that the L1 table has entries for; what it maps there may lie behind the end of
    /// the disk.
    pub fn mapped_end(&self) -> u64 {
        (self.l1.entries.len() as u64).saturating_mul(self.layout.l2_coverage()).min(i64::MAX as u64)
    }

    /// Another backing file is to come: as long as any of them may show through, zeroes are said and never left out.
    pub fn expect_any_backing(&mut self) {
        self.backing_size = u64::MAX;
    }

    /// Cluster size and widths.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Keeps these autoclear feature bits, as far as they are set: from now on somebody sees to it that what they promise
    /// is true.
    pub fn maintain(&mut self, bits: u64) {
        self.kept |= self.autoclear & bits;
        self.autoclear &= !bits;
    }

    /// The corruption that ended writing, if any.
    pub fn broken(&self) -> Option<&Corrupt> {
        self.broken.as_ref()
    }

    /// What a host cluster holds, when that is metadata.
    pub fn structure(&self, cluster: u64) -> Option<&'static str> {
        self.structures.get(cluster)
    }

    /// Ends writing to this image. True for the first report, which the caller logs.
    pub fn break_off(&mut self, why: Corrupt) -> bool {
        let first = self.broken.is_none();
        self.broken.get_or_insert(why);
        first
    }

    /// As [`Metadata::break_off`], where no caller waits for an answer.
    pub(super) fn break_off_later(&mut self, why: Corrupt) {
        self.unreported |= self.break_off(why);
    }

    /// A corruption found since the last call that nobody was told of yet, for the log.
    pub fn take_unreported(&mut self) -> Option<Corrupt> {
        std::mem::take(&mut self.unreported).then(|| self.broken.clone()).flatten()
    }

    /// Begins an operation; hand the token to [`Metadata::leave`] when no I/O of it is left.
    pub fn enter(&mut self) -> u64 {
        *self.active.entry(self.epoch).or_insert(0) += 1;
        self.epoch
    }

    /// Ends an operation.
    pub fn leave(&mut self, token: u64) {
        let count = self.active.get_mut(&token).expect("each operation leaves once");
        *count -= 1;
        if *count == 0 {
            self.active.remove(&token);
        }
    }

    /// Closes the current epoch and returns it: operations that begin later cannot see what was freed before.
    pub(super) fn next_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch - 1
    }

    /// Whether every operation that began in `epoch` or before has left.
    pub(super) fn drained(&self, epoch: u64) -> bool {
        self.active.keys().next().is_none_or(|&oldest| oldest > epoch)
    }

    /// The first run of `range` with one source. `range` is not empty and lies inside the disk.
    pub fn map(&mut self, range: ByteRange) -> Result<Map, Fault> {
        match self.try_map(range) {
            Ok(mapped) => Ok(Map::Extent(mapped)),
            Err(Stop::Load(table)) => Ok(Map::Load(table)),
            Err(Stop::Wait) => Ok(Map::Wait),
            Err(Stop::Fault(fault)) => Err(fault),
        }
    }

    /// As [`Metadata::map`], as far as the tables in memory tell; asks for nothing.
    pub fn map_at_hand(&mut self, range: ByteRange) -> Option<Mapped> {
        match self.at_hand(range.start().0 >> self.layout.cluster_bits).then(|| self.try_map(range)) {
            Some(Ok(mapped)) => Some(mapped),
            _ => None,
        }
    }

    /// Whether the L2 entry of a guest cluster can be looked at without a load, or there is none.
    pub(super) fn at_hand(&mut self, guest_cluster: u64) -> bool {
        let layout = self.layout;
        match self.l2_table((guest_cluster / layout.l2_entries()) as usize) {
            Ok(Some((table, _))) => self.tables.get(layout.slice_of(table, guest_cluster)).is_some(),
            Ok(None) => true,
            Err(_) => false,
        }
    }

    fn try_map(&mut self, range: ByteRange) -> Result<Mapped, Stop> {
        let layout = self.layout;
        let start = range.start().0;
        let l1_index = (start / layout.l2_coverage()) as usize;
        if self.l2_table(l1_index)?.is_none() {
            return Ok(Mapped { range: self.unmapped_run(range, l1_index), source: Source::Unallocated });
        }
        let first = start >> layout.cluster_bits;
        let (slice, index) = self.l2_slice(first)?.expect("the table exists");
        let last = (range.end().0 - 1) >> layout.cluster_bits;
        let end_index = (index as u64 + (last - first) + 1).min(layout.slice_entries()) as usize;

        let source = self.decode(slice, index, first)?;
        let mut count = 1;
        match source {
            Entry::Mixed(mixed) => return Ok(self.map_mixed(range, mixed)),
            Entry::Compressed(_) => {}
            _ => {
                while index + count < end_index && self.continues(source, slice, index, first, count)? {
                    count += 1;
                }
            }
        }
        let run_end = ((first + count as u64) << layout.cluster_bits).min(range.end().0);
        let source = match source {
            Entry::Unallocated => Source::Unallocated,
            Entry::Zero { host, .. } => Source::Zero { reserved: host.is_some() },
            Entry::Compressed(c) => Source::Compressed(c),
            Entry::Data { host, .. } => Source::Data(HostOffset(host.0 + start % layout.cluster())),
            Entry::Mixed(_) => unreachable!("answered above"),
        };
        Ok(Mapped { range: ByteRange::between(start, run_end), source })
    }

    /// The first run of `range` within one cluster whose subclusters differ.
    fn map_mixed(&self, range: ByteRange, mixed: Mixed) -> Mapped {
        let (cluster, unit) = (self.layout.cluster(), self.layout.unit());
        let in_cluster = range.start().0 % cluster;
        let state = |sub: u64| (mixed.allocated >> sub & 1, mixed.zero >> sub & 1);
        let sub = in_cluster / unit;
        let end = (sub + 1..SUBCLUSTERS).find(|&next| state(next) != state(sub)).unwrap_or(SUBCLUSTERS);
        let source = match (state(sub), mixed.host) {
            ((1, _), Some(host)) => Source::Data(HostOffset(host.0 + in_cluster)),
            ((_, 1), host) => Source::Zero { reserved: host.is_some() },
            _ => Source::Unallocated,
        };
        Mapped { range: range.clip(range.start().0 - in_cluster + end * unit), source }
    }

    /// Whether the entry `distance` clusters further continues the run that began with `first`, for reading.
    fn continues(
        &mut self,
        first: Entry,
        slice: u64,
        index: usize,
        guest_cluster: u64,
        distance: usize,
    ) -> Result<bool, Stop> {
        // a broken entry ends the run; the request for its own bytes will report it
        let Ok(entry) = self.decode(slice, index + distance, guest_cluster + distance as u64) else {
            return Ok(false);
        };
        let distance = distance as u64;
        Ok(match (first, entry) {
            (Entry::Unallocated, Entry::Unallocated) => true,
            (Entry::Zero { host: a, .. }, Entry::Zero { host: b, .. }) => a.is_some() == b.is_some(),
            (Entry::Data { host: a, .. }, Entry::Data { host: b, .. }) => {
                b.0 == a.0 + (distance << self.layout.cluster_bits)
            }
            _ => false,
        })
    }

    /// The part of `range` from its start that no L2 table maps.
    pub(super) fn unmapped_run(&self, range: ByteRange, l1_index: usize) -> ByteRange {
        let coverage = self.layout.l2_coverage();
        let absent = |i: &usize| self.l1.entries.get(*i).is_none_or(|e| e & OFFSET_MASK == 0);
        let mut end_index = l1_index + 1;
        while (end_index as u64) * coverage < range.end().0 && absent(&end_index) {
            end_index += 1;
        }
        range.clip(end_index as u64 * coverage)
    }

    /// The L2 table an L1 entry names: its start in bytes and whether its refcount is one.
    pub(super) fn l2_table(&self, l1_index: usize) -> Result<Option<(u64, bool)>, Corrupt> {
        let raw = self.l1.entries.get(l1_index).copied().unwrap_or(0);
        let at = raw & OFFSET_MASK;
        if at == 0 {
            return Ok(None);
        }
        self.check_table_place("L2 table", at)?;
        Ok(Some((at, raw & COPIED != 0)))
    }

    /// The slice and index of a guest cluster's L2 entry, in memory. `None`: it has no L2 table.
    pub(super) fn l2_slice(&mut self, guest_cluster: u64) -> Result<Option<(u64, usize)>, Stop> {
        let layout = self.layout;
        let l1_index = (guest_cluster / layout.l2_entries()) as usize;
        let Some((table, _)) = self.l2_table(l1_index)? else { return Ok(None) };
        let slice = layout.slice_of(table, guest_cluster);
        self.need(TableKind::L2, slice)?;
        let in_table = guest_cluster % layout.l2_entries();
        Ok(Some((slice, (in_table % layout.slice_entries()) as usize)))
    }

    /// Makes sure a slice is in memory.
    pub(super) fn need(&mut self, kind: TableKind, at: u64) -> Result<(), Stop> {
        if self.tables.get(at).is_some() {
            return Ok(());
        }
        Err(self.tables.want(kind, at).map_or(Stop::Wait, Stop::Load))
    }

    /// Decodes the L2 entry of a guest cluster in a slice in memory.
    pub(super) fn decode(&mut self, slice: u64, index: usize, guest_cluster: u64) -> Result<Entry, Corrupt> {
        let layout = self.layout;
        let at = index * layout.l2_entry_bytes() as usize;
        let bytes = self.tables.get(slice).expect("the slice was looked up");
        let corrupt = |why| Corrupt { structure: "L2 entry", at: slice + at as u64, why };
        let entry = Entry::decode(RawEntry::load(&bytes[at..], layout), layout).map_err(corrupt)?;
        if layout.data_file && entry.host().is_some_and(|host| host.0 != guest_cluster << layout.cluster_bits) {
            return Err(corrupt("in an external data file each cluster lies at its guest offset"));
        }
        Ok(entry)
    }

    pub(super) fn set_entry(&mut self, slice: u64, index: usize, raw: RawEntry) {
        let layout = self.layout;
        let at = index * layout.l2_entry_bytes() as usize;
        let len = layout.l2_entry_bytes() as usize;
        let bytes = &mut self.tables.change(slice)[at..at + len];
        let mut old = [0; 16];
        let old = &mut old[..len];
        old.copy_from_slice(bytes);
        raw.store(bytes, layout);
        if let Some(journal) = &mut self.journal {
            journal.note(Order::L2, slice + at as u64, old, bytes);
        }
    }

    /// Puts a whole new table into memory.
    pub(super) fn create_table(&mut self, kind: TableKind, at: u64, bytes: &[u8]) {
        self.tables.create(kind, at, bytes);
        if let Some(journal) = &mut self.journal {
            let order = match kind {
                TableKind::Refcount => Order::Refcounts,
                TableKind::L2 => Order::L2,
            };
            journal.note(order, at, &[], bytes);
        }
    }

    /// Changes an entry of the L1 table or the refcount table.
    pub(super) fn set_root(&mut self, kind: RootKind, index: usize, raw: u64) {
        let root = match kind {
            RootKind::L1 => &mut self.l1,
            RootKind::Reftable => &mut self.reftable,
        };
        let old = std::mem::replace(&mut root.entries[index], raw).to_be_bytes();
        root.dirty.insert(index);
        // behind that only while the table is on its way to another place, where it is noted as a whole
        if let Some(journal) = self.journal.as_mut().filter(|_| index < root.room) {
            journal.note(kind.pointer(), root.at.0 + index as u64 * 8, &old, &raw.to_be_bytes());
        }
    }

    /// The L1 table or the refcount table was given a new place, and all its entries.
    pub(super) fn root_moved(&mut self, kind: RootKind) {
        let root = match kind {
            RootKind::L1 => &mut self.l1,
            RootKind::Reftable => &mut self.reftable,
        };
        root.moved = true;
        root.room = root.entries.len();
        if let Some(journal) = &mut self.journal {
            let cluster = self.layout.cluster();
            let whole = root.bytes((root.room as u64 * 8).next_multiple_of(cluster));
            journal.note(kind.table(), root.at.0, &[], &whole);
            let (at, pointer) = kind.header_field(root.at, root.room as u64, cluster);
            journal.note(kind.pointer(), at, &[], &pointer);
        }
    }

    /// From now on changes are noted in a journal, too, which has lapsed until the next write-back cycle is complete.
    pub fn keep_journal(&mut self, journal: Journal) {
        self.journal = Some(Box::new(journal));
    }

    /// No journal any more.
    pub fn drop_journal(&mut self) {
        self.journal = None;
    }

    /// Whether there is a journal that says nothing: what is changed is to be flushed before it is answered.
    pub fn journal_lapsed(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.lapsed())
    }

    /// Whether there is a journal that should get room before anything else is changed.
    pub(super) fn journal_crowded(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.crowded())
    }

    /// What was changed so far outlives the process.
    pub(super) fn seal_journal(&mut self) {
        if let Some(journal) = &mut self.journal {
            journal.seal();
        }
    }

    /// A table was read, or could not be (`Err`): then the next question asks for it again.
    pub fn loaded(&mut self, table: Table, bytes: Result<&[u8], Errno>) {
        self.tables.loaded(table, bytes.ok());
    }

    pub(super) fn check_table_place(&self, structure: &'static str, at: u64) -> Result<(), Corrupt> {
        let why = if !at.is_multiple_of(self.layout.cluster()) {
            "its offset is not aligned to a cluster"
        } else if at >= MAX_HOST_OFFSET || at >= self.file_end {
            "it lies behind the end of the file"
        } else if at == 0 {
            "its offset is the image header"
        } else {
            return Ok(());
        };
        Err(Corrupt { structure, at, why })
    }

    /// Notes that clusters hold metadata. Two structures in one cluster: no writes to this image.
    pub(super) fn note_structure(&mut self, at: u64, len: u64, name: &'static str) {
        if self.broken.is_some() {
            return; // nothing will be written
        }
        let first = at >> self.layout.cluster_bits;
        if let Err(cluster) = self.structures.insert(first, self.layout.clusters_for(len), name) {
            let at = cluster << self.layout.cluster_bits;
            self.break_off_later(Corrupt { structure: name, at, why: "its cluster holds another structure too" });
        }
    }
}

impl Root {
    fn new(at: HostOffset, bytes: &[u8]) -> Self {
        let be64 = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("eight bytes"));
        let entries: Vec<u64> = bytes.chunks_exact(8).map(be64).collect();
        Root { at, room: entries.len(), entries, dirty: BTreeSet::new(), moved: false }
    }

    /// The whole table as stored, filled up to `len` bytes.
    pub(super) fn bytes(&self, len: u64) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.entries.iter().flat_map(|e| e.to_be_bytes()).collect();
        bytes.resize(len as usize, 0);
        bytes
    }
}
