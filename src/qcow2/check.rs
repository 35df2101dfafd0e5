//! Checking an image: counts how often each cluster is referred to and compares that with the refcounts.
//!
//! [`Check`] is told what the tables hold, piece by piece, by who reads them (`image::check`), and keeps the verdict:
//! what `qemu-img check` calls errors and leaks, by the same rules as far as they can be seen from outside. Tables are
//! untrusted: whatever they name is only counted, never believed.

use super::bitmap::TableEntry;
use super::entry::{COMPRESSED, COPIED, CompressedRange, Entry, OFFSET_MASK, RawEntry, ZERO};
use super::header::Header;
use super::layout::Layout;
use super::references::{ClusterSet, OutOfMemory, References};
use crate::units::HostOffset;
use std::collections::HashMap;

/// Descriptions of what was found that are kept; the rest is only counted.
pub const MAX_LINES: usize = 500;
/// Bits that are 0 in every L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits that are 0 in every descriptor of a standard cluster.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// References past the end of the file count for refcounts when they are this many clusters behind it at most (or no
/// farther than the file is long): a file that was cut off must not get something else where they point.
const BEHIND_END: u64 = 1 << 12;
/// Memory that an entry of the map of L2 tables takes.
const L2_MAP_ENTRY: u64 = 48;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Errors: data may be lost already, or be lost by writing.
    pub corruptions: u64,
    /// Clusters whose refcount is higher than the number of references: storage is wasted, nothing else.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow their predecessor there.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
    /// Descriptions, at most [`MAX_LINES`].
    pub lines: Vec<String>,
    /// Refcounts differ from the references.
    pub refcounts_differ: bool,
    /// The place reserved for a cluster of zeroes is misaligned: it can be forgotten without loss.
    pub misplaced_zeroes: bool,
    /// References past the end of the file.
    pub past_end: u64,
    /// There are references that were not followed: what seems leaked may be in use.
    pub unfollowed: bool,
}

impl Findings {
    /// Neither errors nor leaks, and everything was checked.
    pub fn clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    fn say(&mut self, line: impl FnOnce() -> String) {
        if self.lines.len() < MAX_LINES {
            self.lines.push(line());
        }
    }

    /// Counts an error.
    pub fn error(&mut self, line: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.say(|| format!("ERROR {}", line()));
    }

    /// Counts something that could not be checked.
    pub fn unchecked(&mut self, line: impl FnOnce() -> String) {
        self.check_errors += 1;
        self.say(|| format!("ERROR {}", line()));
    }

    fn leak(&mut self, line: impl FnOnce() -> String) {
        self.leaks += 1;
        self.say(line);
    }
}

/// References to one L2 table from L1 tables.
#[derive(Clone, Copy, Debug, Default)]
struct Referrers {
    /// From snapshots.
    inactive: u64,
    all: u64,
}

/// A check under way. Order: [`Check::refcounts`] for every part of a refcount block, then everything that refers to
/// clusters, then [`Check::compare`] for every part of a refcount block again, and [`Check::finish`].
pub struct Check {
    layout: Layout,
    file_len: u64,
    /// Clusters of the file.
    clusters: u64,
    counted: References,
    /// Clusters whose refcount is 1, which is what COPIED promises.
    ones: ClusterSet,
    l2_tables: HashMap<u64, Referrers>,
    /// Ranges of clusters that were compared.
    compared: Vec<(u64, u64)>,
    /// Where the next cluster would lie if nothing were fragmented.
    contiguous: Option<u64>,
    /// What was found so far.
    pub findings: Findings,
}

impl Check {
    /// A check of an image whose file is `file_len` bytes long; takes at most `memory` bytes.
    pub fn new(header: &Header, file_len: u64, memory: u64) -> Check {
        let layout = header.layout;
        let total_clusters = layout.clusters_for(header.size);
        Check {
            layout,
            file_len,
            clusters: layout.clusters_for(file_len),
            counted: References::new(memory),
            ones: ClusterSet::default(),
            l2_tables: HashMap::new(),
            compared: Vec::new(),
            contiguous: None,
            findings: Findings { total_clusters, ..Findings::default() },
        }
    }

    /// The image's layout.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// What the refcount of a cluster should be: the references counted so far. References far behind the end of the
    /// file get none, as a refcount table would have to reach that far.
    pub fn refcount(&self, cluster: u64) -> u64 {
        if cluster < self.far() { self.counted.get(cluster) } else { 0 }
    }

    /// The first cluster that is too far behind the end of the file.
    pub fn far(&self) -> u64 {
        (self.clusters * 2).max(self.clusters + BEHIND_END)
    }

    /// The L2 tables that L1 tables refer to, in the order of the file.
    pub fn l2_tables(&self) -> Vec<u64> {
        let mut list: Vec<u64> = self.l2_tables.keys().copied().collect();
        list.sort_unstable();
        list
    }

    /// References counted so far.
    pub fn counted(&self) -> &References {
        &self.counted
    }

    /// Clusters of the file.
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    /// Counts `times` references to each cluster that a range touches. What lies behind the end of the file is an error.
    pub fn count(&mut self, at: u64, len: u64, times: u64) -> Result<(), OutOfMemory> {
        if len == 0 {
            return Ok(());
        }
        let end = at.saturating_add(len);
        // the last cluster of a file need not be there as a whole
        if end.saturating_sub(self.file_len) >= self.layout.cluster() {
            self.findings.unfollowed = true;
            self.findings.past_end += 1;
            self.findings.error(|| format!("a reference past the end of the file: {len} bytes at {at:#x}"));
            // nobody can say which of them was meant; remembered, so that nothing else is put there
            return self.counted.add(at >> self.layout.cluster_bits, times);
        }
        let bits = self.layout.cluster_bits;
        for cluster in at >> bits..=(end - 1) >> bits {
            self.counted.add(cluster, times)?;
        }
        Ok(())
    }

    /// Reads one L1 entry: `Some` is an L2 table to be followed.
    pub fn l1_entry(&mut self, index: u64, raw: u64, active: bool, times: u64) -> Result<Option<u64>, OutOfMemory> {
        if raw == 0 {
            return Ok(None);
        }
        if raw & L1_RESERVED != 0 {
            self.findings.error(|| format!("L1 entry {index} has reserved bits set: {raw:#x}"));
        }
        let at = raw & OFFSET_MASK;
        if at == 0 {
            self.findings.error(|| format!("L1 entry {index} names the image header as an L2 table: {raw:#x}"));
            return Ok(None);
        }
        self.count(at, self.layout.cluster(), times)?;
        if active {
            self.check_copied("L2 table", at, raw);
        }
        if !at.is_multiple_of(self.layout.cluster()) {
            self.findings.unfollowed = true;
            self.findings.error(|| format!("L1 entry {index}: the L2 table at {at:#x} is not aligned to a cluster"));
            return Ok(None);
        }
        if at >= self.file_len {
            return Ok(None);
        }
        if !self.l2_tables.contains_key(&at) {
            self.counted.reserve(L2_MAP_ENTRY)?;
        }
        let referrers = self.l2_tables.entry(at).or_default();
        referrers.all += times;
        if !active {
            referrers.inactive += times;
        }
        self.contiguous = None;
        Ok(Some(at))
    }

    /// L2 tables that snapshots refer to, and how many times each, in the order of the file.
    pub fn inactive_l2_tables(&self) -> Vec<(u64, u64)> {
        let mut list: Vec<_> = self.l2_tables.iter().map(|(&at, r)| (at, r.inactive)).filter(|&(_, n)| n > 0).collect();
        list.sort_unstable();
        list
    }

    /// Reads entries of an L2 table. `times`: how often the table is referred to. Only a table of the active L1 table
    /// counts for the statistics, and only there COPIED means something.
    pub fn l2_entries(&mut self, bytes: &[u8], active: bool, times: u64) -> Result<(), OutOfMemory> {
        for entry in bytes.chunks_exact(self.layout.l2_entry_bytes() as usize) {
            let raw = RawEntry::load(entry, self.layout);
            if raw != RawEntry::UNALLOCATED {
                self.l2_entry(raw, active, times)?;
            }
        }
        Ok(())
    }

    fn l2_entry(&mut self, raw: RawEntry, active: bool, times: u64) -> Result<(), OutOfMemory> {
        let layout = self.layout;
        let descriptor = raw.descriptor;
        if descriptor & COMPRESSED != 0 {
            return self.compressed(raw, active, times);
        }
        if descriptor & L2_RESERVED != 0 {
            self.findings.error(|| format!("L2 entry has reserved bits set: {descriptor:#x}"));
        }
        let at = descriptor & OFFSET_MASK;
        let has_host = at != 0 || (layout.data_file && descriptor & COPIED != 0);
        let (allocated, zero) = (raw.subclusters as u32, (raw.subclusters >> 32) as u32);
        if has_host && allocated & zero != 0 {
            self.findings.error(|| format!("subclusters of {at:#x} are both allocated and zero"));
        } else if !has_host && allocated != 0 {
            self.findings.error(|| "subclusters are allocated without a cluster".to_owned());
        }
        if !has_host {
            return Ok(());
        }
        if active {
            self.findings.allocated_clusters += 1;
            if self.contiguous.is_some_and(|next| next != at) {
                self.findings.fragmented_clusters += 1;
            }
            self.contiguous = Some(at + layout.cluster());
        }
        if !at.is_multiple_of(layout.cluster()) {
            self.findings.misplaced_zeroes |= self.is_misplaced_zero(raw);
            self.findings.error(|| format!("the cluster at {at:#x} is not aligned; L2 entry {descriptor:#x}"));
        }
        if !layout.data_file {
            self.count(at, layout.cluster(), times)?;
        }
        if active {
            self.check_copied("cluster", at, descriptor);
        }
        Ok(())
    }

    fn compressed(&mut self, raw: RawEntry, active: bool, times: u64) -> Result<(), OutOfMemory> {
        let layout = self.layout;
        let descriptor = raw.descriptor;
        if layout.data_file {
            self.findings.error(|| format!("compressed cluster in an image with a data file: {descriptor:#x}"));
            return Ok(());
        }
        if raw.subclusters != 0 {
            self.findings.error(|| format!("compressed cluster with subclusters: {descriptor:#x}"));
            return Ok(());
        }
        if descriptor & COPIED != 0 {
            self.findings.error(|| format!("compressed cluster with the COPIED flag: {descriptor:#x}"));
        }
        match Entry::decode(raw, layout) {
            Ok(Entry::Compressed(CompressedRange { start, len })) => self.count(start.0, len, times)?,
            _ => self.findings.error(|| format!("compressed cluster past 2^56: {descriptor:#x}")),
        }
        if active {
            self.findings.allocated_clusters += 1;
            self.findings.compressed_clusters += 1;
            // packed without regard to clusters: none follows another
            self.findings.fragmented_clusters += 1;
        }
        Ok(())
    }

    fn check_copied(&mut self, what: &str, at: u64, raw: u64) {
        let counted_alone = match what {
            "cluster" if self.layout.data_file => true,
            _ => self.ones.contains(at >> self.layout.cluster_bits),
        };
        if counted_alone != (raw & COPIED != 0) {
            let is = if counted_alone { "1" } else { "not 1" };
            self.findings
                .error(|| format!("COPIED flag of the {what} at {at:#x} is wrong: {raw:#x}, its refcount is {is}"));
        }
    }

    /// Reads entries of a bitmap's table.
    pub fn bitmap_table(&mut self, bytes: &[u8]) -> Result<(), OutOfMemory> {
        for raw in bytes.chunks_exact(8) {
            let raw = u64::from_be_bytes(raw.try_into().expect("eight bytes"));
            match TableEntry::decode(raw, self.layout) {
                Ok(TableEntry::Data(HostOffset(at))) => self.count(at, self.layout.cluster(), 1)?,
                Ok(_) => {}
                Err(why) => {
                    self.findings.unfollowed = true;
                    self.findings.error(|| format!("bitmap table entry {raw:#x}: {why}"));
                }
            }
        }
        Ok(())
    }

    /// Counts an entry of the refcount table. `Some` is a refcount block to be read.
    pub fn refcount_block(&mut self, index: u64, raw: u64) -> Result<Option<u64>, OutOfMemory> {
        let at = block_offset(raw);
        let reserved = raw != at;
        if reserved {
            self.findings.error(|| format!("refcount table entry {index} has reserved bits set: {raw:#x}"));
        } else if !at.is_multiple_of(self.layout.cluster()) {
            self.findings.error(|| format!("refcount block {index} at {at:#x} is not aligned to a cluster"));
        } else if at >> self.layout.cluster_bits >= self.clusters {
            self.findings.error(|| format!("refcount block {index} at {at:#x} is outside the file"));
        } else if at == 0 {
            return Ok(None);
        } else {
            self.count(at, self.layout.cluster(), 1)?;
            if self.counted.get(at >> self.layout.cluster_bits) == 1 {
                return Ok(Some(at));
            }
            self.findings.error(|| format!("refcount block {index} at {at:#x} is used for something else too"));
        }
        self.findings.refcounts_differ = true;
        let possible = at.is_multiple_of(self.layout.cluster()) && i64::try_from(at).is_ok();
        if !possible && index * self.layout.refblock_entries() < self.clusters {
            self.findings.unchecked(|| format!("the refcounts in refcount block {index} cannot be read"));
            self.compared.push((index * self.layout.refblock_entries(), (index + 1) * self.layout.refblock_entries()));
        }
        Ok(Some(at).filter(|&at| self.is_block_readable(at)))
    }

    /// Whether refcounts can be read from there.
    pub fn is_block_readable(&self, at: u64) -> bool {
        at != 0 && at.is_multiple_of(self.layout.cluster()) && at >> self.layout.cluster_bits < self.clusters
    }

    /// Notes refcounts as stored, from the cluster `first` on.
    pub fn refcounts(&mut self, first: u64, bytes: &[u8]) -> Result<(), OutOfMemory> {
        for (index, cluster) in self.refcounts_in(first, bytes) {
            if self.layout.refcount(bytes, index) == 1 {
                let taken = self.ones.insert(cluster);
                self.counted.reserve(taken)?;
            }
        }
        Ok(())
    }

    /// Compares refcounts as stored, from the cluster `first` on, with what was counted.
    pub fn compare(&mut self, first: u64, bytes: &[u8]) {
        let mut end = first;
        for (index, cluster) in self.refcounts_in(first, bytes) {
            let (refcount, references) = (self.layout.refcount(bytes, index), self.counted.get(cluster));
            self.compare_one(cluster, refcount, references);
            end = cluster + 1;
        }
        match self.compared.last_mut() {
            Some(last) if last.1 == first => last.1 = end,
            _ => self.compared.push((first, end)),
        }
    }

    fn compare_one(&mut self, cluster: u64, refcount: u64, references: u64) {
        if refcount > 0 || references > 0 {
            let end = (cluster + 1) << self.layout.cluster_bits;
            self.findings.image_end_offset = self.findings.image_end_offset.max(end);
        }
        if refcount == references {
            return;
        }
        self.findings.refcounts_differ = true;
        let line = || format!("cluster {cluster} refcount={refcount} reference={references}");
        match refcount > references {
            true => self.findings.leak(|| format!("Leaked {}", line())),
            false => self.findings.error(line),
        }
    }

    /// Compares what no refcount block describes, where refcounts are 0, and gives the verdict.
    pub fn finish(&mut self) {
        let mut compared = std::mem::take(&mut self.compared);
        compared.sort_unstable();
        let counted = std::mem::replace(&mut self.counted, References::new(0));
        let clusters = self.clusters;
        let mut ranges = compared.into_iter().peekable();
        for (cluster, references) in counted.iter().take_while(|&(cluster, _)| cluster < clusters) {
            while ranges.next_if(|&(_, end)| end <= cluster).is_some() {}
            if ranges.peek().is_none_or(|&(first, _)| cluster < first) {
                self.compare_one(cluster, 0, references);
            }
        }
        self.counted = counted;
    }

    /// Refcounts of clusters of the file in a part of a refcount block: index there, and cluster.
    fn refcounts_in(&self, first: u64, bytes: &[u8]) -> impl Iterator<Item = (usize, u64)> + use<> {
        let count = (bytes.len() as u64 * 8) >> self.layout.refcount_order;
        (first..self.clusters.min(first + count)).enumerate()
    }

    /// Whether nothing but L1 tables refers to this L2 table: only then it is safe to take it for one and change it.
    pub fn is_only_l2_table(&self, at: u64) -> bool {
        let cluster = at >> self.layout.cluster_bits;
        self.l2_tables.get(&at).is_some_and(|referrers| self.counted.get(cluster) == referrers.all)
    }

    /// Whether the entry reserves a place for zeroes that cannot be one.
    pub fn is_misplaced_zero(&self, raw: RawEntry) -> bool {
        let at = raw.descriptor & OFFSET_MASK;
        let plain = self.layout.version >= 3 && !self.layout.extended_l2 && !self.layout.data_file;
        plain && raw.descriptor & (COMPRESSED | ZERO) == ZERO && !at.is_multiple_of(self.layout.cluster())
    }
}

/// The place of a refcount block that an entry of the refcount table names.
pub fn block_offset(raw: u64) -> u64 {
    raw & !0x1ff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::create::{NewImage, lay_out};
    use crate::qcow2::rebuild::{Mode, Old, Rebuild};

    const LAYOUT: Layout = Layout::plain(3, 9, 4);

    /// A check of a file of `clusters` clusters of 512 bytes; refcounts are stored as given, from cluster 0 on.
    fn check(clusters: u64, refcounts: &[u16]) -> (Check, Vec<u8>) {
        let new = NewImage::new(LAYOUT, 1 << 20);
        let header = Header::parse(&lay_out(&new).unwrap().remove(0).1).unwrap();
        let mut check = Check::new(&header, clusters * 512, 1 << 20);
        let mut block: Vec<u8> = refcounts.iter().flat_map(|n| n.to_be_bytes()).collect();
        block.resize(512, 0);
        check.refcounts(0, &block).unwrap();
        (check, block)
    }

    fn verdict(mut check: Check, block: &[u8]) -> (u64, u64, u64) {
        check.compare(0, block);
        check.finish();
        (check.findings.corruptions, check.findings.leaks, check.findings.image_end_offset)
    }

    #[test]
    fn too_low_is_an_error_and_too_high_a_leak() {
        let (mut sound, block) = check(4, &[1, 2]);
        sound.count(0, 512, 1).unwrap();
        sound.count(600, 400, 2).unwrap();
        assert_eq!(verdict(sound, &block), (0, 0, 1024));
        let (mut wrong, block) = check(4, &[2, 1, 0, 1, 1]);
        wrong.count(0, 513, 1).unwrap();
        wrong.count(512, 1024, 1).unwrap();
        // 0 and 3 leak, 1 and 2 are too low, 4 is behind the end of the file
        assert_eq!(verdict(wrong, &block), (2, 2, 2048));
    }

    #[test]
    fn references_that_no_block_describes_are_errors() {
        let (mut check, block) = check(1000, &[1]);
        check.count(0, 512, 1).unwrap();
        check.count(300 * 512, 1024, 1).unwrap();
        assert_eq!(verdict(check, &block), (2, 0, 302 * 512));
    }

    #[test]
    fn the_last_cluster_may_be_cut_short() {
        let (mut check, _) = check(4, &[]);
        check.file_len = 3 * 512 + 1;
        check.count(3 * 512, 512, 1).unwrap();
        assert_eq!(check.findings.corruptions, 0);
        check.count(4 * 512, 512, 1).unwrap();
        check.count(u64::MAX - 5, u64::MAX, 1).unwrap();
        assert_eq!(check.findings.corruptions, 2);
    }

    #[test]
    fn entries_and_their_flags() {
        let (mut check, _) = check(8, &[1, 1, 1, 2]);
        let table = |entries: &[u64]| entries.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>();
        let right = [0, 1, COPIED | 1024, 3 * 512, COPIED | COPIED >> 63];
        check.l2_entries(&table(&right), true, 1).unwrap();
        assert_eq!(check.findings.corruptions, 0, "{:?}", check.findings.lines);
        assert_eq!((check.findings.allocated_clusters, check.findings.fragmented_clusters), (2, 0));
        let wrong = [1024, COPIED | (3 * 512), COPIED | 1024 | 4, COMPRESSED | COPIED | 512];
        check.l2_entries(&table(&wrong), true, 1).unwrap();
        assert_eq!(check.findings.corruptions, 4, "{:?}", check.findings.lines);
        // in a snapshot the flag says nothing
        check.l2_entries(&table(&wrong[..2]), false, 1).unwrap();
        assert_eq!(check.findings.corruptions, 4);
        assert_eq!(check.l1_entry(0, COPIED | 1024, true, 1), Ok(Some(1024)));
        assert_eq!(check.l1_entry(1, 2 * 512 + 512, false, 1), Ok(Some(3 * 512)));
        assert_eq!(check.findings.corruptions, 4);
        assert_eq!(check.l1_entry(2, 1 << 40, true, 1), Ok(None));
        assert_eq!(check.findings.corruptions, 5, "past the end");
    }

    #[test]
    fn only_so_many_findings_are_described() {
        let (mut check, _) = check(8, &[]);
        for _ in 0..MAX_LINES * 2 {
            check.count(1 << 40, 1, 1).unwrap();
        }
        assert_eq!((check.findings.lines.len(), check.findings.corruptions), (MAX_LINES, MAX_LINES as u64 * 2));
    }

    #[test]
    fn a_rebuilt_structure_describes_everything_and_itself() {
        for order in 0..=6 {
            let (mut check, _) = check(3000, &[]);
            check.layout.refcount_order = order;
            let layout = check.layout;
            for cluster in [0, 1, 5, 2000, 2999] {
                check.count(cluster * 512, 512, 1).unwrap();
            }
            let plan = Rebuild::plan(&check, layout, Mode::References, Old::default(), 0, u64::MAX).unwrap();
            let table = plan.table_bytes();
            let refcount = |cluster: u64| {
                let (block, index) = (cluster / layout.refblock_entries(), cluster % layout.refblock_entries());
                let at = (block * 8) as usize;
                let place = u64::from_be_bytes(table.get(at..at + 8)?.try_into().unwrap());
                let number = (0..plan.blocks().len()).find(|&n| plan.block_at(n).0 == place)?;
                Some(layout.refcount(&plan.block_bytes(number, &check, &[]), index as usize))
            };
            let end = plan.block_at(plan.blocks().len()).0 / 512;
            for cluster in 0..end + 10 {
                let used = [0, 1, 5, 2000, 2999].contains(&cluster) || (3000..end).contains(&cluster);
                assert_eq!(refcount(cluster).unwrap_or(0), u64::from(used), "order {order} cluster {cluster}");
            }
            assert!(Rebuild::plan(&check, layout, Mode::References, Old::default(), 0, 3000).is_err());
        }
    }
}
