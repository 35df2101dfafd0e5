//! Persistent dirty bitmaps (section "Bitmaps"): the directory, the tables, and where a bit is.
//!
//! Called by whoever keeps bitmaps up to date, edits them or checks an image. What a directory says is untrusted: it is
//! parsed into [`Bitmap`]s that can be worked with, or refused as a whole as QEMU does. Bitmaps that must be left alone
//! (left behind by a crash, with data nobody here knows) are told by [`Bitmap::unusable`].

use super::header::BitmapsExtension;
use super::layout::Layout;
use super::metadata::Metadata;
use crate::units::{ByteRange, HostOffset};
use std::collections::BTreeMap;

/// Most bitmaps in a directory, as QEMU.
pub const MAX_BITMAPS: u32 = 65_535;
/// Largest directory in bytes, as QEMU.
pub const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Longest name in bytes, as QEMU.
pub const MAX_NAME: usize = 1023;
/// Smallest granularity QEMU knows: 512 bytes.
pub const MIN_GRANULARITY_BITS: u32 = 9;
/// Largest granularity QEMU knows: 2 GiB.
pub const MAX_GRANULARITY_BITS: u32 = 31;
/// Largest data of one bitmap in bytes, as QEMU.
pub const MAX_DATA_BYTES: u64 = 512 << 20;
/// Most table entries of all bitmaps of an image together: they are looked at when it is opened.
pub const MAX_TABLE_ENTRIES: u64 = 1 << 20;

const FIXED: usize = 24;

/// Bits of a directory entry's `flags`.
pub mod flag {
    /// Not saved correctly: must not be used.
    pub const IN_USE: u32 = 1 << 0;
    /// Enabled: reflects all changes of the disk.
    pub const AUTO: u32 = 1 << 1;
    /// May be used by who does not know its extra data.
    pub const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    /// What the format defines.
    pub const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// The only type there is: a dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;

/// One entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Where its table starts.
    pub table: HostOffset,
    /// Entries of its table.
    pub table_entries: u32,
    /// See [`flag`].
    pub flags: u32,
    /// log2 of the bytes of the disk that one bit stands for.
    pub granularity_bits: u32,
    /// Type-specific data, kept as it is.
    pub extra: Vec<u8>,
    /// Its name as stored.
    pub name: Vec<u8>,
}

impl Bitmap {
    /// The name, for people.
    pub fn display_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Bytes of the disk that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Why the bitmap of a disk of `size` bytes must not be used. `None`: it is good.
    pub fn unusable(&self, size: u64, layout: Layout) -> Option<&'static str> {
        if self.has(flag::IN_USE) {
            return Some("it was not saved: the program that kept it did not close the image");
        }
        if !self.extra.is_empty() && !self.has(flag::EXTRA_DATA_COMPATIBLE) {
            return Some("it has extra data of an unknown kind");
        }
        if u64::from(self.table_entries) != table_entries(size, self.granularity_bits, layout) {
            return Some("its size is not that of the disk");
        }
        None
    }

    fn bytes(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    fn check(&self, kind: u8, layout: Layout) -> Result<(), String> {
        let refuse = |field: &str, value: u64, why: &str| Err(format!("{field} is {value}: {why}"));
        if self.table.0 == 0 || !self.table.0.is_multiple_of(layout.cluster()) {
            return refuse("bitmap_table_offset", self.table.0, "a multiple of the cluster size is needed");
        }
        if self.table_entries == 0 || u64::from(self.table_entries) > MAX_DATA_BYTES / layout.cluster() {
            return refuse("bitmap_table_size", self.table_entries.into(), "1 to 512 MiB of bitmap data are allowed");
        }
        if self.flags & !flag::KNOWN != 0 {
            return refuse("flags", self.flags.into(), "bits 3 to 31 are reserved");
        }
        if kind != DIRTY_TRACKING {
            return refuse("type", kind.into(), "1 (dirty tracking bitmap) is the only one there is");
        }
        if !(MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS).contains(&self.granularity_bits) {
            return refuse("granularity_bits", self.granularity_bits.into(), "9 to 31 are allowed");
        }
        check_name(&self.name)
    }
}

/// Whether a bitmap can have this name.
pub fn check_name(name: &[u8]) -> Result<(), String> {
    match name.len() {
        1..=MAX_NAME => Ok(()),
        len => Err(format!("a name of {len} bytes: 1 to {MAX_NAME} are allowed")),
    }
}

/// Whether the place of the directory can be right in a file of `file_len` bytes.
pub fn check_extension(extension: &BitmapsExtension, layout: Layout, file_len: u64) -> Result<(), String> {
    let BitmapsExtension { count, directory_bytes, directory_offset: at } = *extension;
    if !(1..=MAX_BITMAPS).contains(&count) {
        return Err(format!("nb_bitmaps is {count}: 1 to {MAX_BITMAPS} are allowed"));
    }
    if directory_bytes > MAX_DIRECTORY_BYTES {
        return Err(format!("bitmap_directory_size is {directory_bytes}: at most {MAX_DIRECTORY_BYTES} are allowed"));
    }
    if at.0 == 0 || !at.0.is_multiple_of(layout.cluster()) || at.0.saturating_add(directory_bytes) > file_len {
        return Err(format!("bitmap_directory_offset is {}: a whole cluster inside the file is needed", at.0));
    }
    Ok(())
}

/// Parses the `count` entries of a directory. Anything out of order refuses all of it: who wrote it is not to be trusted
/// with the rest either.
pub fn parse(bytes: &[u8], count: u32, layout: Layout) -> Result<Vec<Bitmap>, String> {
    let mut at = 0usize;
    let mut list = Vec::new();
    for index in 0..count {
        let short = || format!("bitmap {index}: the directory ends after {} bytes, inside this entry", bytes.len());
        let fixed = bytes.get(at..at + FIXED).ok_or_else(short)?;
        let be32 = |i: usize| u32::from_be_bytes(fixed[i..i + 4].try_into().expect("four bytes"));
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let extra_len = be32(20) as usize; // usize has 64 bits wherever io_uring runs
        let rest = bytes[at + FIXED..].get(..extra_len + name_len).ok_or_else(short)?;
        let bitmap = Bitmap {
            table: HostOffset(u64::from_be_bytes(fixed[..8].try_into().expect("eight bytes"))),
            table_entries: be32(8),
            flags: be32(12),
            granularity_bits: u32::from(fixed[17]),
            extra: rest[..extra_len].to_vec(),
            name: rest[extra_len..].to_vec(),
        };
        bitmap.check(fixed[16], layout).map_err(|why| format!("bitmap {index}: {why}"))?;
        at += bitmap.bytes();
        list.push(bitmap);
    }
    if at != bytes.len() {
        return Err(format!("its {count} entries take {at} bytes, not the {} it has", bytes.len()));
    }
    let mut names: Vec<&[u8]> = list.iter().map(|b| &b.name[..]).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two bitmaps have the name {:?}", String::from_utf8_lossy(twice[0])));
    }
    let entries: u64 = list.iter().map(|b| u64::from(b.table_entries)).sum();
    if entries > MAX_TABLE_ENTRIES {
        return Err(format!("its bitmap tables have {entries} entries, at most {MAX_TABLE_ENTRIES} are allowed"));
    }
    Ok(list)
}

/// The directory of these bitmaps as stored.
pub fn build(list: &[Bitmap]) -> Vec<u8> {
    let mut out = Vec::with_capacity(list.iter().map(Bitmap::bytes).sum());
    for bitmap in list {
        let end = out.len() + bitmap.bytes();
        out.extend(bitmap.table.0.to_be_bytes());
        out.extend(bitmap.table_entries.to_be_bytes());
        out.extend(bitmap.flags.to_be_bytes());
        out.extend([DIRTY_TRACKING, bitmap.granularity_bits as u8]);
        out.extend((bitmap.name.len() as u16).to_be_bytes());
        out.extend((bitmap.extra.len() as u32).to_be_bytes());
        out.extend(&bitmap.extra);
        out.extend(&bitmap.name);
        out.resize(end, 0);
    }
    out
}

/// The header extension's content for a directory.
pub fn extension_bytes(extension: &BitmapsExtension) -> Vec<u8> {
    let mut out = Vec::with_capacity(24);
    out.extend(extension.count.to_be_bytes());
    out.extend([0; 4]);
    out.extend(extension.directory_bytes.to_be_bytes());
    out.extend(extension.directory_offset.0.to_be_bytes());
    out
}

/// One entry of a bitmap table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// No bit is set.
    Zeros,
    /// Every bit is set.
    Ones,
    /// The bits are in this cluster.
    Data(HostOffset),
}

/// Bits 9 to 55 of a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl TableEntry {
    /// Decodes an entry as stored.
    pub fn decode(raw: u64, layout: Layout) -> Result<TableEntry, &'static str> {
        match (raw & OFFSET, raw & !OFFSET) {
            (0, 0) => Ok(TableEntry::Zeros),
            (0, 1) => Ok(TableEntry::Ones),
            (at, 0) if at % layout.cluster() == 0 => Ok(TableEntry::Data(HostOffset(at))),
            (_, 0) => Err("its offset is not aligned to a cluster"),
            _ => Err("reserved bits are set"),
        }
    }

    /// The entry as stored.
    pub fn raw(self) -> u64 {
        match self {
            TableEntry::Zeros => 0,
            TableEntry::Ones => 1,
            TableEntry::Data(at) => at.0,
        }
    }
}

/// Decodes a table; the error names the entry.
pub fn parse_table(bytes: &[u8], layout: Layout) -> Result<Vec<TableEntry>, String> {
    let raw = bytes.chunks_exact(8).map(|b| u64::from_be_bytes(b.try_into().expect("eight bytes")));
    raw.enumerate().map(|(i, raw)| TableEntry::decode(raw, layout).map_err(|why| format!("entry {i}: {why}"))).collect()
}

/// A table as stored.
pub fn build_table(table: &[TableEntry]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.raw().to_be_bytes()).collect()
}

/// Bits of a bitmap of a disk of `size` bytes.
pub fn bits(size: u64, granularity_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits)
}

/// Entries of the table of a bitmap of a disk of `size` bytes.
pub fn table_entries(size: u64, granularity_bits: u32, layout: Layout) -> u64 {
    layout.clusters_for(bits(size, granularity_bits).div_ceil(8))
}

/// The granularity of a new bitmap when none is asked for: the cluster size within 4 KiB and 64 KiB, as QEMU.
pub fn default_granularity_bits(layout: Layout) -> u32 {
    layout.cluster_bits.clamp(12, 16)
}

/// Sets the bits `from..to` of a piece of bitmap data: the first is the lowest of the first byte.
pub fn set_bits(bytes: &mut [u8], from: usize, to: usize) {
    let mut bit = from;
    while bit < to {
        if bit.is_multiple_of(8) && to - bit >= 8 {
            let whole = to / 8;
            bytes[bit / 8..whole].fill(0xff);
            bit = whole * 8;
        } else {
            bytes[bit / 8] |= 1 << (bit % 8);
            bit += 1;
        }
    }
}

/// The runs of equal bits among the bits `from..to` of a piece of bitmap data: length and value.
pub fn runs(bytes: &[u8], from: usize, to: usize) -> Vec<(u64, bool)> {
    let mut runs: Vec<(u64, bool)> = Vec::new();
    let mut bit = from;
    while bit < to {
        let byte = bytes[bit / 8];
        // a whole byte at a time where it is all the same
        let (len, set) = match byte {
            0 | 0xff => ((8 - bit % 8).min(to - bit), byte != 0),
            _ => (1, byte >> (bit % 8) & 1 != 0),
        };
        push_run(&mut runs, len as u64, set);
        bit += len;
    }
    runs
}

/// Appends a run, joined to the last of the same value.
pub fn push_run(runs: &mut Vec<(u64, bool)>, len: u64, set: bool) {
    match runs.last_mut() {
        Some((last, value)) if *value == set => *last += len,
        _ if len > 0 => runs.push((len, set)),
        _ => {}
    }
}

/// A set of numbers kept as ranges that do not touch: the bits set since a bitmap was last stored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// Adds `start..end`.
    pub fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        if let Some((&before, &before_end)) = self.0.range(..=start).next_back()
            && before_end >= start
        {
            if before_end >= end {
                return; // the common case: written again
            }
            start = before;
        }
        while let Some((&next, &next_end)) = self.0.range(start..=end).next() {
            self.0.remove(&next);
            end = end.max(next_end);
        }
        self.0.insert(start, end);
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(&start, &end)| (start, end))
    }

    /// The parts of the ranges inside `start..end`, in order.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.0.range(..=start).next_back().map_or(start, |(&s, _)| s);
        let parts = self.0.range(first..end.max(first)).map(move |(&s, &e)| (s.max(start), e.min(end)));
        parts.filter(|(s, e)| s < e)
    }

    /// The ranges inside `start..end`, at most `most` of them, and where the part ends that they are all of.
    pub fn part(&self, start: u64, end: u64, most: usize) -> (Ranges, u64) {
        let mut within = self.within(start, end);
        let part = Ranges(within.by_ref().take(most).collect());
        (part, within.next().map_or(end, |(next, _)| next))
    }

    /// Number of ranges: what memory they take.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What was written since the enabled bitmaps were last stored, per granularity: bitmaps that share one share it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tracker(BTreeMap<u32, Ranges>);

impl Tracker {
    /// Keeps track for bitmaps of these granularities.
    pub fn new(granularity_bits: impl IntoIterator<Item = u32>) -> Tracker {
        Tracker(granularity_bits.into_iter().map(|bits| (bits, Ranges::default())).collect())
    }

    /// Notes that bytes of the disk change.
    pub fn mark(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        for (bits, ranges) in &mut self.0 {
            ranges.insert(range.start().0 >> bits, ((range.end().0 - 1) >> bits) + 1);
        }
    }

    /// The dirty bits of this granularity.
    pub fn ranges(&self, granularity_bits: u32) -> Option<&Ranges> {
        self.0.get(&granularity_bits)
    }

    /// Takes everything out, to be stored.
    pub fn take(&mut self) -> Tracker {
        let empty = Tracker::new(self.0.keys().copied());
        std::mem::replace(self, empty)
    }

    /// Ranges held: what memory they take.
    pub fn len(&self) -> usize {
        self.0.values().map(Ranges::len).sum()
    }

    /// Whether nothing was noted.
    pub fn is_empty(&self) -> bool {
        self.0.values().all(Ranges::is_empty)
    }
}

impl Metadata {
    /// Notes that clusters belong to bitmaps, so that guest data is never written there. Nothing is noted, and the first
    /// contradiction told, when one of them holds something else or two claim the same.
    pub fn adopt(&mut self, places: &[(u64, u64, &'static str)]) -> Result<(), String> {
        let layout = self.layout;
        let mut runs = Vec::new();
        for &(at, len, name) in places {
            if at.checked_add(len).is_none_or(|end| end > self.file_end) || at % layout.cluster() != 0 {
                return Err(format!("{name} at byte {at} runs past the end of the file"));
            }
            runs.push((at >> layout.cluster_bits, layout.clusters_for(len), name));
        }
        for (i, &(first, count, name)) in runs.iter().enumerate() {
            if let Err(cluster) = self.structures.insert(first, count, name) {
                let other = self.structures.get(cluster).unwrap_or("bitmap");
                for &(first, count, _) in &runs[..i] {
                    (first..first + count).for_each(|noted| self.structures.remove(noted));
                }
                let at = cluster << layout.cluster_bits;
                return Err(format!("{name} at byte {at}: its cluster holds another structure too ({other})"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAYOUT: Layout = Layout::plain(3, 16, 4);

    fn bitmap(name: &str) -> Bitmap {
        Bitmap {
            table: HostOffset(0x50000),
            table_entries: 1,
            flags: flag::AUTO,
            granularity_bits: 16,
            extra: vec![],
            name: name.as_bytes().to_vec(),
        }
    }

    #[test]
    fn what_is_built_is_parsed() {
        let mut odd = bitmap("second one");
        (odd.flags, odd.extra) = (flag::EXTRA_DATA_COMPATIBLE, vec![1, 2, 3]);
        let list = vec![bitmap("a"), odd, bitmap(&"x".repeat(1023))];
        let bytes = build(&list);
        assert_eq!(parse(&bytes, 3, LAYOUT).unwrap(), list);
        assert_eq!(bytes.len(), 32 + 40 + 1048);
    }

    #[test]
    fn each_field_is_refused_by_name() {
        let refused = |at: usize, patch: &[u8], words: &str| {
            let mut bytes = build(&[bitmap("abcdefgh")]);
            bytes[at..at + patch.len()].copy_from_slice(patch);
            let why = parse(&bytes, 1, LAYOUT).expect_err("must be refused");
            assert!(why.contains(words), "{why:?} should say {words:?}");
        };
        refused(0, &513u64.to_be_bytes(), "bitmap_table_offset is 513");
        refused(0, &0u64.to_be_bytes(), "bitmap_table_offset is 0");
        refused(8, &0u32.to_be_bytes(), "bitmap_table_size is 0");
        refused(8, &8193u32.to_be_bytes(), "bitmap_table_size is 8193");
        refused(12, &8u32.to_be_bytes(), "flags is 8");
        refused(16, &[2], "type is 2");
        refused(17, &[8], "granularity_bits is 8");
        refused(17, &[32], "granularity_bits is 32");
        refused(18, &0u16.to_be_bytes(), "name of 0 bytes");
        refused(18, &5000u16.to_be_bytes(), "ends after");
        refused(20, &u32::MAX.to_be_bytes(), "ends after");
        let twice = build(&[bitmap("a"), bitmap("a")]);
        assert!(parse(&twice, 2, LAYOUT).unwrap_err().contains("two bitmaps"));
        assert!(parse(&twice, 1, LAYOUT).unwrap_err().contains("take 32 bytes"));
    }

    #[test]
    fn table_entries_as_the_format_has_them() {
        let decode = |raw| TableEntry::decode(raw, LAYOUT);
        for entry in [TableEntry::Zeros, TableEntry::Ones, TableEntry::Data(HostOffset(0x30000))] {
            assert_eq!(decode(entry.raw()), Ok(entry));
        }
        assert!(decode(0x30001).is_err());
        assert!(decode(2).is_err());
        assert!(decode(0x30200).is_err());
        assert!(decode(1 << 56).is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(bits(1 << 30, 16), 1 << 14);
        assert_eq!(bits((1 << 30) + 1, 16), (1 << 14) + 1);
        assert_eq!(table_entries(1 << 30, 9, LAYOUT), 4);
        assert_eq!(table_entries(512, 9, LAYOUT), 1);
        assert_eq!(runs(&[0b0000_0110, 0xff, 0], 1, 20), vec![(2, true), (5, false), (8, true), (4, false)]);
    }

    proptest! {
        #[test]
        fn no_directory_panics(
            noise in proptest::collection::vec((0usize..96, any::<u8>()), 0..8),
            count in 0u32..5,
            cut in 0usize..97,
        ) {
            let mut bytes = build(&[bitmap("one"), bitmap("two"), bitmap("three")]);
            for (at, byte) in noise {
                bytes[at] = byte;
            }
            if let Ok(list) = parse(&bytes[..cut.min(bytes.len())], count, LAYOUT) {
                prop_assert_eq!(parse(&build(&list), count, LAYOUT).unwrap(), list);
            }
        }

        #[test]
        fn ranges_are_a_set(inserts in proptest::collection::vec((0u64..60, 0u64..20), 0..30), a in 0u64..80, b in 0u64..80) {
            let (mut ranges, mut model) = (Ranges::default(), vec![false; 80]);
            for (start, len) in inserts {
                ranges.insert(start, start + len);
                model[start as usize..(start + len) as usize].fill(true);
            }
            let mut last = None;
            let mut found = vec![false; 80];
            for (s, e) in ranges.iter() {
                prop_assert!(s < e && last.is_none_or(|last| last < s), "apart and in order");
                last = Some(e);
                found[s as usize..e as usize].fill(true);
            }
            prop_assert_eq!(&found, &model);
            let mut part = [false; 80];
            for (s, e) in ranges.within(a, b) {
                part[s as usize..e as usize].fill(true);
            }
            for i in 0..80u64 {
                prop_assert_eq!(part[i as usize], model[i as usize] && (a..b).contains(&i));
            }
        }

        #[test]
        fn bits_are_set_and_read_as_runs(sets in proptest::collection::vec((0usize..100, 0usize..100), 0..6)) {
            let (mut bytes, mut model) = (vec![0; 16], vec![false; 128]);
            for (from, len) in sets {
                let to = (from + len).min(128);
                set_bits(&mut bytes, from, to);
                model[from..to].fill(true);
            }
            let back: Vec<bool> =
                runs(&bytes, 3, 128).into_iter().flat_map(|(n, set)| std::iter::repeat_n(set, n as usize)).collect();
            prop_assert_eq!(&back[..], &model[3..]);
        }
    }
}
