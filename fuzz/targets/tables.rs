//! Tables of every kind, and the brain driven by a script while it is handed hostile tables.

use super::input::Fields;
use cowgate::block::Errno;
use cowgate::qcow2::compress::{self, Compression};
use cowgate::qcow2::create::{NewImage, lay_out};
use cowgate::qcow2::entry::{Entry, RawEntry};
use cowgate::qcow2::header::field;
use cowgate::qcow2::metadata::Surroundings;
use cowgate::qcow2::{
    Allocation, Fault, Header, Layout, Map, Metadata, Packed, Ready, Source, Step, Table, Write, Zero, ZeroMode,
    bitmap, snapshot,
};
use cowgate::units::{ByteRange, GuestOffset, HostOffset};
use std::collections::BTreeMap;

pub fn run(data: &[u8]) {
    let mut fields = Fields(data);
    match fields.u8() % 8 {
        0 => snapshots(fields),
        1 => bitmaps(fields),
        2 => entries(fields),
        3 => unpack(fields),
        _ => Brain::run(fields),
    }
}

fn layout(fields: &mut Fields<'_>) -> Layout {
    let bits = u32::from(fields.u8());
    let flags = fields.u8();
    let extended_l2 = flags & 1 != 0;
    let smallest = if extended_l2 { 14 } else { 9 };
    Layout {
        version: if flags & 4 != 0 && !extended_l2 && flags & 2 == 0 { 2 } else { 3 },
        // most often small ones: more happens in fewer bytes
        cluster_bits: if bits & 0xc0 == 0xc0 { smallest + bits % (22 - smallest) } else { smallest + bits % 4 },
        refcount_order: if flags & 4 != 0 && !extended_l2 { 4 } else { u32::from(flags >> 4) % 7 },
        extended_l2,
        data_file: flags & 2 != 0,
    }
}

fn snapshots(mut fields: Fields<'_>) {
    let count = u32::from(fields.u16());
    if let Ok(Some((list, len))) = snapshot::parse(fields.0, count) {
        assert_eq!(list.len(), count as usize);
        assert!(len <= fields.0.len() as u64 + 8);
    }
}

fn bitmaps(mut fields: Fields<'_>) {
    let layout = layout(&mut fields);
    let (count, size) = (u32::from(fields.u8()), fields.u64());
    let table_len = usize::from(fields.u8()) * 8;
    let table = fields.bytes(table_len).to_vec();
    if let Ok(entries) = bitmap::parse_table(&table, layout) {
        assert_eq!(bitmap::build_table(&entries), table[..table.len() / 8 * 8]);
    }
    if let Ok(list) = bitmap::parse(fields.0, count, layout) {
        let built = bitmap::build(&list);
        assert_eq!(bitmap::parse(&built, count, layout).as_ref(), Ok(&list));
        for bitmap in &list {
            let _ = bitmap.unusable(size, layout);
            let _ = (bitmap.display_name(), bitmap.granularity());
        }
    }
}

fn entries(mut fields: Fields<'_>) {
    let layout = layout(&mut fields);
    for bytes in fields.0.chunks_exact(layout.l2_entry_bytes() as usize) {
        let raw = RawEntry::load(bytes, layout);
        let mut stored = bytes.to_vec();
        raw.store(&mut stored, layout);
        assert_eq!(stored, bytes);
        let Ok(entry) = Entry::decode(raw, layout) else { continue };
        if let Some(host) = entry.host() {
            assert!(host.0 % layout.cluster() == 0 && host.0 < 1 << 56);
        }
        let again = match entry {
            Entry::Unallocated => RawEntry::UNALLOCATED,
            Entry::Data { host, copied: true } => RawEntry::data(host, layout),
            Entry::Zero { host, copied } if copied || host.is_none() => RawEntry::zero(host, layout),
            Entry::Mixed(mixed) if !layout.data_file => RawEntry::mixed(mixed),
            Entry::Compressed(range) if !layout.extended_l2 => {
                assert!(range.len > 0 && range.len <= 2 * layout.cluster() + 512, "{range:?}");
                RawEntry::compressed(range, layout)
            }
            _ => continue,
        };
        assert_eq!(Entry::decode(again, layout), Ok(entry), "{raw:?}");
    }
}

fn unpack(mut fields: Fields<'_>) {
    let kind = if fields.u8() & 1 == 0 { Compression::Zlib } else { Compression::Zstd };
    let mut out = vec![0xaa; 512 << (fields.u8() % 13)];
    let unpacked = compress::unpack(kind, fields.0, &mut out);
    let plain = if unpacked.is_ok() { out } else { fields.0.to_vec() };
    let plain = &plain[..plain.len().min(64 << 10)];
    if let Some(packed) = compress::pack(kind, plain) {
        assert!(packed.len().is_multiple_of(compress::SECTOR) && packed.len() < plain.len());
        let mut out = vec![0; plain.len()];
        assert_eq!(compress::unpack(kind, &packed, &mut out), Ok(()));
        assert!(out == plain);
    }
}

/// Steps of a script at most.
const MOST_STEPS: usize = 400;
/// Answers that ask for something else first, one after the other, before a question counts as one without end.
const MOST_TURNS: usize = 5000;

/// The brain with a disk of hostile content behind it.
struct Brain<'a> {
    md: Metadata,
    layout: Layout,
    /// By slice: what was written, or was handed in.
    disk: BTreeMap<u64, Vec<u8>>,
    /// What tables that nobody wrote hold.
    noise: &'a [u8],
    pending: Vec<Allocation>,
    operations: Vec<u64>,
    cycle: bool,
    size: u64,
}

enum Asked<T> {
    Done(T),
    Load(Table),
    Prepare,
    Wait,
    Fault,
}

impl<'a> Brain<'a> {
    fn run(mut fields: Fields<'a>) {
        let layout = layout(&mut fields);
        let entries = 1 + u64::from(fields.u8()) % 8;
        let size = (entries * layout.l2_coverage()).saturating_sub(u64::from(fields.u16()) % layout.l2_coverage());
        // without the features that it does not lay out: the places are the same
        let plain = Layout { data_file: false, extended_l2: false, ..layout };
        let Ok(pieces) = lay_out(&NewImage {
            layout: plain,
            size,
            backing: None,
            compression: Compression::Zlib,
            data_file: None,
            lazy_refcounts: false,
        }) else {
            return;
        };
        let mut header = Header::parse(&pieces[0].1).expect("a new image has a header");
        header.layout = layout;
        header.l1_entries = header.l1_entries.min(layout.l1_entries_for(size) as u32);
        header.autoclear = u64::from(fields.u8() & 3);
        let mut file = BTreeMap::new();
        for (at, bytes) in &pieces {
            for (i, slice) in bytes.chunks(layout.slice() as usize).enumerate() {
                file.insert(at + i as u64 * layout.slice(), slice.to_vec());
            }
        }
        let file_len = pieces.iter().map(|(at, bytes)| at + bytes.len() as u64).max().unwrap_or(0);
        let around = Surroundings {
            file_len: file_len + u64::from(fields.u8() % 32) * layout.cluster(),
            grows_with_zeroes: fields.u8() & 1 == 0,
            backing_size: u64::from(fields.u16()) * 512,
            cache_bytes: 1 << (fields.u8() % 20),
            maintained: 2,
        };
        let place = |at: HostOffset, len: u64| -> Vec<u8> {
            let slices = (at.0..at.0 + len.next_multiple_of(layout.slice())).step_by(layout.slice() as usize);
            let mut bytes: Vec<u8> =
                slices.flat_map(|at| file.get(&at).cloned().unwrap_or(vec![0; layout.slice() as usize])).collect();
            bytes.truncate(len as usize);
            bytes
        };
        let mut l1 = place(header.l1_offset, u64::from(header.l1_entries) * 8);
        let mut reftable = place(header.reftable_offset, u64::from(header.reftable_clusters) * layout.cluster());
        // hostile entries: small ones in units of clusters, so that they often name something
        for table in [&mut l1, &mut reftable] {
            for _ in 0..fields.u8() % 8 {
                let at = usize::from(fields.u8()) * 8 % table.len().max(8);
                let raw = match fields.u8() {
                    kind if kind & 0x80 != 0 => fields.u64(),
                    kind => (u64::from(fields.u8()) * layout.cluster()) | (u64::from(kind & 1) << 63),
                };
                if let Some(entry) = table.get_mut(at..at + 8) {
                    entry.copy_from_slice(&raw.to_be_bytes());
                }
            }
        }
        let noise_len = usize::from(fields.u16()) % 2048;
        let noise = &fields.0[..noise_len.min(fields.0.len())];
        fields.0 = &fields.0[noise.len()..];
        let md = Metadata::new(&header, &l1, &reftable, &[], around);
        let (pending, operations) = (Vec::new(), Vec::new());
        let mut brain = Brain { md, layout, disk: file, noise, pending, operations, cycle: false, size };
        for _ in 0..MOST_STEPS {
            if fields.is_empty() {
                break;
            }
            brain.step(&mut fields);
        }
        brain.finish();
    }

    fn range(&self, fields: &mut Fields<'_>) -> ByteRange {
        let (at, len) = (u64::from(fields.u32()), u64::from(fields.u16()));
        let scale = if at >> 31 != 0 { self.layout.cluster() } else { self.layout.unit().min(512) };
        let start = (at & 0x7fff_ffff).wrapping_mul(scale) % self.size;
        let start = if len & 1 != 0 { start / self.layout.unit() * self.layout.unit() } else { start };
        ByteRange::between(start, (start + 1 + len * 97).min(self.size))
    }

    fn step(&mut self, fields: &mut Fields<'_>) {
        let kind = fields.u8();
        match kind % 16 {
            0 | 1 => {
                let range = self.range(fields);
                let mapped = self.ask(|md| match md.map(range)? {
                    Map::Extent(mapped) => Ok(Asked::Done(mapped)),
                    Map::Load(table) => Ok(Asked::Load(table)),
                    Map::Wait => Ok(Asked::Wait),
                });
                if let Some(mapped) = mapped {
                    assert!(mapped.range.start() == range.start() && mapped.range.end() <= range.end());
                    assert!(!mapped.range.is_empty());
                    if let Source::Data(host) = mapped.source {
                        assert!(host.0.checked_add(mapped.range.len()).is_some());
                    }
                }
            }
            2..=5 => self.write(fields),
            6..=8 => self.zero(fields, kind >> 4),
            9 => self.packed(fields),
            10 if !self.pending.is_empty() => {
                let index = usize::from(kind >> 4) % self.pending.len();
                let allocation = self.pending.swap_remove(index);
                self.md.commit(allocation);
            }
            11 if !self.pending.is_empty() => {
                let index = usize::from(kind >> 4) % self.pending.len();
                let allocation = self.pending.swap_remove(index);
                self.md.abort(allocation);
            }
            12 => match kind >> 4 {
                0 => {
                    let grown = self.size + u64::from(fields.u16()) * self.layout.l2_coverage() / 16;
                    if self.ask(|md| ready(md.resize(grown))).is_some() {
                        self.size = grown;
                    }
                }
                1..=3 => {
                    let count = 1 + u64::from(fields.u8()) / 4;
                    let at = self.ask(|md| ready(md.allocate_structure(count, "bitmap")));
                    if let Some(at) = at {
                        assert!(at.0 > 0 && at.0.is_multiple_of(self.layout.cluster()));
                        self.md.free_structure(at, count * self.layout.cluster());
                    }
                }
                4..=9 => self.operations.push(self.md.enter()),
                _ => {
                    if let Some(token) = self.operations.pop() {
                        self.md.leave(token);
                    }
                }
            },
            _ => self.write_back(kind & 0x80 != 0, kind & 0x40 != 0),
        }
    }

    /// Asks until there is an answer; `None`: it must wait for another, or cannot be.
    fn ask<T>(&mut self, question: impl Fn(&mut Metadata) -> Result<Asked<T>, Fault>) -> Option<T> {
        let mut last = None;
        for _ in 0..MOST_TURNS {
            match question(&mut self.md).unwrap_or_else(|fault| {
                if let Fault::Corrupt(corrupt) = fault {
                    self.md.break_off(corrupt);
                }
                Asked::Fault
            }) {
                Asked::Done(answer) => return Some(answer),
                Asked::Load(table) => {
                    last = Some(table);
                    self.load(table);
                }
                Asked::Prepare => {
                    self.write_back(true, true);
                    if self.md.broken().is_some() {
                        return None;
                    }
                }
                Asked::Wait | Asked::Fault => return None,
            }
        }
        panic!("a question without end, {:?}, {last:?}", self.layout);
    }

    fn load(&mut self, table: Table) {
        assert!(table.at.0.is_multiple_of(table.len), "{table:?}");
        let noise = self.noise;
        let bytes = self.disk.entry(table.at.0).or_insert_with(|| {
            // each slice another part of the noise, repeated
            let from = (table.at.0 / table.len) as usize * 8 % noise.len().max(1);
            let mut bytes: Vec<u8> =
                noise.iter().cycle().skip(from / 8 * 8).take(table.len as usize).copied().collect();
            bytes.resize(table.len as usize, 0);
            bytes
        });
        self.md.loaded(table, Ok(bytes));
    }

    /// Where guest data goes is no structure and not somebody else's new cluster.
    fn allowed(&self, host: HostOffset, len: u64) {
        assert!(host.0.checked_add(len).is_some_and(|end| end <= 1 << 57));
        if self.layout.data_file {
            return;
        }
        assert!(host.0 >= self.layout.cluster(), "guest data goes into the header");
        let bits = self.layout.cluster_bits;
        for cluster in host.0 >> bits..=(host.0 + len - 1) >> bits {
            assert_eq!(self.md.structure(cluster), None, "guest data goes to {host:?}");
        }
    }

    fn write(&mut self, fields: &mut Fields<'_>) {
        let range = self.range(fields);
        let write = self.ask(|md| match md.begin_write(range)? {
            Write::Load(table) => Ok(Asked::Load(table)),
            Write::Wait => Ok(Asked::Wait),
            Write::Prepare => Ok(Asked::Prepare),
            done => Ok(Asked::Done(done)),
        });
        match write {
            Some(Write::InPlace { host, len }) => {
                assert!(len > 0 && len <= range.len());
                self.allowed(host, len);
            }
            Some(Write::Allocate(allocation)) => self.pend(allocation, range),
            _ => {}
        }
    }

    fn pend(&mut self, a: Allocation, range: ByteRange) {
        assert!(a.range.start() == range.start() && a.range.end() <= range.end() && !a.range.is_empty());
        assert!(a.span.start() <= a.range.start() && a.span.end() >= a.range.end());
        self.allowed(a.host, a.span.len());
        for other in &self.pending {
            let apart = a.span.end() <= other.span.start() || other.span.end() <= a.span.start();
            assert!(apart, "two writes to one cluster at the same time");
        }
        self.pending.push(a);
    }

    fn zero(&mut self, fields: &mut Fields<'_>, mode: u8) {
        let range = self.range(fields);
        let modes = [ZeroMode::Unmap, ZeroMode::Keep, ZeroMode::Provision, ZeroMode::Discard, ZeroMode::Expose];
        let mode = modes[usize::from(mode) % modes.len()];
        let zero = self.ask(|md| match md.begin_zero(range, mode)? {
            Zero::Load(table) => Ok(Asked::Load(table)),
            Zero::Wait => Ok(Asked::Wait),
            Zero::Prepare => Ok(Asked::Prepare),
            done => Ok(Asked::Done(done)),
        });
        match zero {
            Some(Zero::Done(len) | Zero::Data(len)) => assert!(len > 0 && len <= range.len(), "{len} of {range:?}"),
            Some(Zero::Allocate(allocation)) => self.pend(allocation, range),
            _ => {}
        }
    }

    fn packed(&mut self, fields: &mut Fields<'_>) {
        let cluster = self.layout.cluster();
        let guest = GuestOffset(self.range(fields).start().0 / cluster * cluster);
        let len = (u64::from(fields.u8()) * 512) % cluster;
        if len == 0 {
            return;
        }
        if let Some(Packed::Allocate(a)) = self.ask(|md| ready(md.begin_packed(guest, len))) {
            self.allowed(a.host, len);
            self.pending.push(a);
        }
    }

    /// One step of a cycle, or all of them.
    fn write_back(&mut self, all: bool, well: bool) {
        if !self.cycle {
            if self.md.begin_cycle().is_err() {
                return;
            }
            self.cycle = true;
        }
        for _ in 0..MOST_TURNS {
            let Some(step) = self.md.next_step() else {
                self.cycle = false;
                return;
            };
            match &step {
                Step::Load(table) => {
                    self.load(*table);
                    continue;
                }
                Step::Wait => return,
                Step::Pause => continue,
                Step::Write(pieces) => {
                    for (at, bytes) in pieces {
                        self.written(at.0, bytes);
                    }
                }
                Step::Punch(ranges) => {
                    for range in ranges {
                        assert!(range.start().0 >= self.layout.cluster(), "the header is given back");
                        let end = range.end().0;
                        for at in (range.start().0..end).step_by(self.layout.slice() as usize) {
                            self.disk.remove(&at);
                        }
                    }
                }
                Step::Barrier => {}
            }
            let result = if well { Ok(()) } else { Err(Errno::EIO) };
            let over = !well && !matches!(step, Step::Punch(_)); // that may fail
            self.md.step_done(step, result);
            if over {
                self.cycle = false;
                return;
            }
            if !all {
                return;
            }
        }
        panic!("a cycle without end");
    }

    fn written(&mut self, at: u64, bytes: &[u8]) {
        let header = [field::L1, field::REFTABLE, field::AUTOCLEAR];
        if at < self.layout.cluster() {
            assert!(header.contains(&at) && bytes.len() <= 12, "{} bytes at {at} of the header", bytes.len());
            return;
        }
        let slice = self.layout.slice();
        for (i, &byte) in bytes.iter().enumerate() {
            let at = at + i as u64;
            let piece = self.disk.entry(at / slice * slice).or_insert_with(|| vec![0; slice as usize]);
            piece[(at % slice) as usize] = byte;
        }
    }

    fn finish(&mut self) {
        for (i, allocation) in std::mem::take(&mut self.pending).into_iter().enumerate() {
            match i % 2 {
                0 => self.md.commit(allocation),
                _ => self.md.abort(allocation),
            }
        }
        for token in std::mem::take(&mut self.operations) {
            self.md.leave(token);
        }
        for _ in 0..4 {
            self.write_back(true, true);
        }
        assert!(self.md.broken().is_some() || self.md.is_clean(), "nothing is left when all is written");
    }
}

fn ready<T>(answer: Result<Ready<T>, Fault>) -> Result<Asked<T>, Fault> {
    Ok(match answer? {
        Ready::Done(done) => Asked::Done(done),
        Ready::Load(table) => Asked::Load(table),
        Ready::Wait => Asked::Wait,
        Ready::Prepare => Asked::Prepare,
    })
}
