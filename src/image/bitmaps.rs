//! Persistent dirty bitmaps of the exported layer: found when it is opened, kept up to date, read.
//!
//! From the first writer on the enabled bitmaps are marked `in_use` in the image, and what is written is noted in memory.
//! When the image is settled ([`Disk::settle`]: the last writer has left) the notes are merged into the stored bits, and
//! only when those are durable the marks go. A crash in between leaves bitmaps that say of themselves that they must not
//! be used; such a bitmap is reported, left as it is, and never taken for good again.
//!
//! The order holds whoever calls when: a write that finds the marks gone sets them again before it goes on.

use super::disk::{Disk, TURN};
use super::shared::unpoisoned;
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::qcow2::bitmap::{self, Bitmap, Ranges, TableEntry, Tracker, flag};
use crate::qcow2::header::{Header, autoclear};
use crate::qcow2::{Layout, Metadata, Ready};
use crate::ring;
use crate::units::{ByteRange, HostOffset};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::path::Path;
use std::sync::Mutex;
use tracing::{error, warn};

/// Ranges noted in memory that make the notes go to the image before it is settled: some 10 MiB.
const MAX_RANGES: usize = 1 << 18;
/// Bitmap tables read together when an image is opened.
const TABLES_IN_FLIGHT: usize = 64;
/// Table entries read at once for what a bitmap tells.
const TABLE_WINDOW: usize = 4096;
/// Bits looked at together.
const PAGE_BITS: u64 = 32_768;
/// Ranges that are noted and not stored yet, for each piece of a bitmap that is looked at.
const NOTES_PER_PIECE: usize = 8;
/// Name of bitmap data in messages about clusters.
const DATA: &str = "bitmap data";

/// The bitmaps of an open image.
pub(super) struct Bitmaps {
    /// What the image holds; an async lock, because it is held while that is read and changed. Taken before all others.
    pub stored: tokio::sync::Mutex<Stored>,
    noted: Mutex<Noted>,
}

/// The bitmaps as the image holds them.
pub(super) struct Stored {
    /// Start of the directory.
    pub directory: HostOffset,
    /// Its entries.
    pub list: Vec<Bitmap>,
    /// Which of them are kept up to date.
    tracked: Vec<usize>,
}

/// What was written since the bits were last stored.
struct Noted {
    state: State,
    tracker: Tracker,
}

/// How one bitmap takes new bits.
#[derive(Default)]
struct Plan {
    /// Bits in a cluster.
    per_cluster: u64,
    /// Its table, before and after.
    old: Vec<TableEntry>,
    new: Vec<TableEntry>,
    /// Table entries whose bits change.
    touched: Vec<usize>,
    /// Clusters that only the new table refers to.
    allocated: Vec<HostOffset>,
    /// Clusters that only the old table refers to.
    freed: Vec<HostOffset>,
}

impl Plan {
    /// The bits of a table entry.
    fn span(&self, index: usize) -> (u64, u64) {
        (index as u64 * self.per_cluster, (index as u64 + 1) * self.per_cluster)
    }

    /// Appends the table entries that change, and where they belong.
    fn changed(&self, bitmap: &Bitmap, pieces: &mut Vec<(HostOffset, Vec<u8>)>) {
        for i in (0..self.new.len()).filter(|&i| self.new[i] != self.old[i]) {
            let (at, raw) = (bitmap.table.0 + i as u64 * 8, self.new[i].raw().to_be_bytes());
            match pieces.last_mut() {
                Some((start, bytes)) if start.0 + bytes.len() as u64 == at => bytes.extend(raw),
                _ => pieces.push((HostOffset(at), raw.to_vec())),
            }
        }
    }
}

/// Whether changes are noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The bitmaps must be marked as in use first.
    Asleep,
    /// They are marked, durably.
    Active,
    /// They are marked, and none is kept any more.
    Retired,
}

/// What became of a note.
enum Note {
    Taken,
    /// Taken, and it is time to store some.
    Full,
    /// The bitmaps must be marked first.
    Asleep,
}

/// Runs of a bitmap: length in bytes of the disk, and whether it was written there.
pub type DirtyRuns = Vec<(u64, bool)>;

/// Reads the directory an image's header vouches for; `None` when it does not.
pub(super) async fn read_directory(
    file: &ring::File,
    header: &Header,
    file_len: u64,
) -> Result<Option<Vec<Bitmap>>, String> {
    if header.autoclear & autoclear::BITMAPS == 0 {
        return Ok(None);
    }
    let Some(extension) = &header.bitmaps else {
        return Err("autoclear feature bit 0 is set, and there is no bitmaps extension".to_owned());
    };
    bitmap::check_extension(extension, header.layout, file_len)?;
    let bytes = read(file, extension.directory_offset.0, extension.directory_bytes).await?;
    bitmap::parse(&bytes, extension.count, header.layout).map(Some)
}

async fn read(file: &ring::File, at: u64, len: u64) -> Result<PageBuf, String> {
    let (result, buf) = file.read(HostOffset(at), PageBuf::new(len as usize)).await;
    result.map_err(|e| format!("it cannot be read: {e}"))?;
    Ok(buf)
}

/// Finds the bitmaps of an image that is being opened, and makes their clusters known to the metadata. Bitmaps that
/// contradict the format are given up: the image is served, and the first write takes back the promise that they are
/// up to date.
pub(super) async fn load(
    file: &ring::File,
    path: &Path,
    header: &Header,
    file_len: u64,
    metadata: &mut Metadata,
) -> Option<Bitmaps> {
    match try_load(file, header, file_len, metadata).await {
        Ok(mut bitmaps) => {
            for bitmap in bitmaps.iter_mut().flat_map(|b| &b.stored.get_mut().list) {
                if let Some(why) = bitmap.unusable(header.size, header.layout) {
                    let name = bitmap.display_name();
                    warn!(
                        "{}: bitmap {name:?} is not used: {why}; remove it with `cowgate image bitmap remove`",
                        path.display()
                    );
                }
            }
            bitmaps
        }
        Err(why) => {
            warn!(
                "{}: its bitmaps are not used, and marked as outdated by the first write: bitmap directory: {why}",
                path.display()
            );
            None
        }
    }
}

async fn try_load(
    file: &ring::File,
    header: &Header,
    file_len: u64,
    metadata: &mut Metadata,
) -> Result<Option<Bitmaps>, String> {
    let (layout, size) = (header.layout, header.size);
    let Some(list) = read_directory(file, header, file_len).await? else { return Ok(None) };
    let extension = header.bitmaps.as_ref().expect("the directory was found through it");
    let mut places = vec![(extension.directory_offset.0, extension.directory_bytes, "bitmap directory")];
    let tables = stream::iter(&list).map(|bitmap| async move {
        let table_bytes = u64::from(bitmap.table_entries) * 8;
        let named = |why: String| format!("table of bitmap {:?}: {why}", bitmap.display_name());
        if bitmap.table.0.checked_add(table_bytes).is_none_or(|end| end > file_len) {
            return Err(named(format!("at byte {} it runs past the end of the file", bitmap.table.0)));
        }
        let bytes = read(file, bitmap.table.0, table_bytes).await.map_err(named)?;
        let table = bitmap::parse_table(&bytes, layout).map_err(named)?;
        let data = table.into_iter().filter_map(|entry| match entry {
            TableEntry::Data(at) => Some((at.0, layout.cluster(), DATA)),
            _ => None,
        });
        let mut places = vec![(bitmap.table.0, table_bytes, "bitmap table")];
        places.extend(data);
        Ok(places)
    });
    let tables: Vec<_> = tables.buffered(TABLES_IN_FLIGHT).try_collect().await?;
    places.extend(tables.into_iter().flatten());
    metadata.adopt(&places)?;
    metadata.maintain(autoclear::BITMAPS);

    let good = |bitmap: &Bitmap| bitmap.has(flag::AUTO) && bitmap.unusable(size, layout).is_none();
    let tracked: Vec<usize> = (0..list.len()).filter(|&i| good(&list[i])).collect();
    let tracker = Tracker::new(tracked.iter().map(|&i| list[i].granularity_bits));
    let stored = Stored { directory: extension.directory_offset, list, tracked };
    let noted = Mutex::new(Noted { state: State::Asleep, tracker });
    Ok(Some(Bitmaps { stored: tokio::sync::Mutex::new(stored), noted }))
}

impl Bitmaps {
    fn note(&self, range: ByteRange) -> Note {
        let mut noted = unpoisoned(&self.noted);
        match noted.state {
            State::Asleep => return Note::Asleep,
            State::Retired => return Note::Taken,
            State::Active => noted.tracker.mark(range),
        }
        if noted.tracker.len() > MAX_RANGES { Note::Full } else { Note::Taken }
    }
}

impl Stored {
    /// Whether a bitmap tells the truth, together with what was noted since.
    pub fn good(&self, index: usize, size: u64, layout: Layout) -> Result<(), &'static str> {
        match self.list[index].unusable(size, layout) {
            Some(_) if self.tracked.contains(&index) => Ok(()), // only marked as in use, by us
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    pub fn find(&self, name: &[u8]) -> Option<usize> {
        self.list.iter().position(|b| b.name == name)
    }
}

impl Disk {
    fn bitmaps(&self) -> Option<&Bitmaps> {
        self.image().layers[0].bitmaps.as_ref()
    }

    /// Notes in the enabled bitmaps that bytes of the disk are about to change. Nothing to do without bitmaps.
    pub(super) async fn note_change(&self, range: ByteRange) -> Result<(), Errno> {
        let Some(bitmaps) = self.bitmaps() else { return Ok(()) };
        let range = range.clip(self.image().size()); // a disk that grows is zeroed behind its old end
        loop {
            match bitmaps.note(range) {
                Note::Taken => return Ok(()),
                Note::Full => {
                    self.store_some(bitmaps).await;
                    return Ok(());
                }
                Note::Asleep => self.wake(bitmaps).await?,
            }
        }
    }

    /// Marks the enabled bitmaps as in use, before the first write: for a writer that has come in.
    pub async fn mark_bitmaps(&self) -> Result<(), Errno> {
        match self.bitmaps() {
            Some(bitmaps) => self.wake(bitmaps).await,
            None => Ok(()),
        }
    }

    /// Marks every enabled bitmap as in use, before the first write. One that is not kept up to date is marked too: it
    /// is outdated from now on.
    async fn wake(&self, bitmaps: &Bitmaps) -> Result<(), Errno> {
        let mut stored = bitmaps.stored.lock().await;
        if unpoisoned(&bitmaps.noted).state != State::Asleep {
            return Ok(());
        }
        if self.metadata().broken().is_some() {
            return Err(Errno::EIO);
        }
        let mut list = stored.list.clone();
        list.iter_mut().filter(|b| b.has(flag::AUTO)).for_each(|b| b.flags |= flag::IN_USE);
        self.write_directory(stored.directory, &list).await?;
        stored.list = list;
        unpoisoned(&bitmaps.noted).state = State::Active;
        Ok(())
    }

    pub(super) async fn write_directory(&self, at: HostOffset, list: &[Bitmap]) -> Result<(), Errno> {
        // in place: only flags change, and no flag lies on both sides of a sector's border
        self.write_pieces(&[(at, bitmap::build(list))]).await?;
        self.barrier().await
    }

    /// Stores the bitmaps, marks all of them as in use and keeps none any more: somebody is about to replace them. Returns
    /// where the directory is and what it held before.
    pub(super) async fn retire_bitmaps(&self) -> Result<Option<(HostOffset, Vec<Bitmap>)>, Errno> {
        let Some(bitmaps) = self.bitmaps() else { return Ok(None) };
        self.store_bitmaps().await;
        let mut stored = bitmaps.stored.lock().await;
        let before = stored.list.clone();
        stored.list.iter_mut().for_each(|b| b.flags |= flag::IN_USE);
        stored.tracked.clear();
        self.write_directory(stored.directory, &stored.list).await?;
        unpoisoned(&bitmaps.noted).state = State::Retired;
        Ok(Some((stored.directory, before)))
    }

    /// Merges what was noted into the image although more will come, so that the notes stay small.
    async fn store_some(&self, bitmaps: &Bitmaps) {
        let mut stored = bitmaps.stored.lock().await;
        let taken = {
            let mut noted = unpoisoned(&bitmaps.noted);
            if noted.tracker.len() <= MAX_RANGES {
                return; // somebody else did it
            }
            noted.tracker.take()
        };
        self.merge_all(&mut stored, &taken).await;
    }

    /// Stores the bitmaps and says so in the image. What cannot be stored is logged and stays marked as in use; the image
    /// is none the worse. True when something was written.
    pub(super) async fn store_bitmaps(&self) -> bool {
        let Some(bitmaps) = self.bitmaps() else { return false };
        let mut stored = bitmaps.stored.lock().await;
        loop {
            let taken = {
                let mut noted = unpoisoned(&bitmaps.noted);
                if noted.state != State::Active {
                    return false;
                }
                if noted.tracker.is_empty() {
                    noted.state = State::Asleep; // who writes from here on marks the bitmaps again, when we are done
                    break;
                }
                noted.tracker.take()
            };
            self.merge_all(&mut stored, &taken).await;
        }
        let mut list = stored.list.clone();
        stored.tracked.iter().for_each(|&i| list[i].flags &= !flag::IN_USE);
        match self.write_directory(stored.directory, &list).await {
            Ok(()) => stored.list = list,
            Err(e) => {
                let path = self.image().path().display();
                error!("{path}: bitmaps cannot be stored ({e}): they stay marked as in use and cannot be used");
                stored.tracked.clear();
            }
        }
        true
    }

    /// Merges notes into all tracked bitmaps, which are marked as in use; one that fails is tracked no more.
    ///
    /// Refcounts are durable before anything refers to what they count, and bits before a table refers to them: else a
    /// crash could leave a table that points behind the end of the file.
    async fn merge_all(&self, stored: &mut Stored, taken: &Tracker) {
        let mut merges = Vec::new();
        let mut failed: Vec<(usize, Errno)> = Vec::new();
        for &i in &stored.tracked {
            let bitmap = &stored.list[i];
            let Some(ranges) = taken.ranges(bitmap.granularity_bits).filter(|r| !r.is_empty()) else { continue };
            match self.plan(bitmap, ranges).await {
                Ok(plan) => merges.push((i, plan, ranges)),
                Err(e) => failed.push((i, e)),
            }
        }
        if merges.iter().any(|(_, plan, _)| !plan.allocated.is_empty())
            && let Err(e) = self.flush_image().await
        {
            for (i, plan, _) in merges.drain(..) {
                self.give_back(plan.allocated);
                failed.push((i, e));
            }
        }
        let mut pieces = Vec::new();
        let mut freed = Vec::new();
        for (i, plan, ranges) in merges {
            match self.write_bits(&plan, ranges).await {
                Ok(()) => {
                    plan.changed(&stored.list[i], &mut pieces);
                    freed.extend(plan.freed);
                }
                Err(e) => {
                    self.give_back(plan.allocated);
                    failed.push((i, e));
                }
            }
        }
        let tables = async {
            self.barrier().await?;
            if !pieces.is_empty() {
                self.write_pieces(&pieces).await?;
                self.barrier().await?;
            }
            Ok(())
        };
        match tables.await {
            Ok(()) => self.give_back(freed),
            Err(e) => failed.extend(stored.tracked.iter().map(|&i| (i, e))),
        }
        let path = self.image().path().display();
        for &(i, e) in &failed {
            let name = stored.list[i].display_name();
            error!("{path}: bitmap {name:?} cannot be stored ({e}): it stays marked as in use and cannot be used");
        }
        stored.tracked.retain(|tracked| !failed.iter().any(|(i, _)| i == tracked));
    }

    /// Decides what becomes of the pieces of a bitmap when the bits of `ranges` are set.
    async fn plan(&self, bitmap: &Bitmap, ranges: &Ranges) -> Result<Plan, Errno> {
        let per_cluster = self.metadata().layout().cluster() * 8;
        let bits = bitmap::bits(self.image().size(), bitmap.granularity_bits);
        let old = self.read_table(bitmap).await?;
        let mut plan = Plan { per_cluster, new: old.clone(), old, ..Plan::default() };
        for (from, to) in ranges.iter() {
            let first = (from / per_cluster) as usize;
            let first = plan.touched.last().map_or(first, |&last| first.max(last + 1));
            plan.touched.extend(first..=((to - 1) / per_cluster) as usize);
        }
        for &i in &plan.touched {
            let (start, end) = plan.span(i);
            // not in the last cluster: bits beyond the disk must be zero
            let all = end <= bits && ranges.within(start, end).next() == Some((start, end));
            plan.new[i] = match plan.old[i] {
                TableEntry::Ones => TableEntry::Ones,
                old if all => {
                    if let TableEntry::Data(at) = old {
                        plan.freed.push(at);
                    }
                    TableEntry::Ones
                }
                TableEntry::Zeros => match self.new_clusters(1, DATA).await {
                    Ok(at) => {
                        plan.allocated.push(at);
                        TableEntry::Data(at)
                    }
                    Err(e) => {
                        self.give_back(plan.allocated);
                        return Err(e);
                    }
                },
                data => data,
            };
        }
        Ok(plan)
    }

    /// Sets bits where they are, and in new clusters.
    async fn write_bits(&self, plan: &Plan, ranges: &Ranges) -> Result<(), Errno> {
        let cluster = plan.per_cluster / 8;
        for &i in &plan.touched {
            let TableEntry::Data(at) = plan.new[i] else { continue };
            let (start, end) = plan.span(i);
            let mut data = match plan.old[i] {
                TableEntry::Zeros => PageBuf::zeroed(cluster as usize),
                _ => self.read_exactly(at, cluster).await?,
            };
            for (from, to) in ranges.within(start, end) {
                bitmap::set_bits(&mut data, (from - start) as usize, (to - start) as usize);
            }
            self.file(0).write(at, data).await.0?;
        }
        Ok(())
    }

    /// Gives clusters back that no table refers to.
    fn give_back(&self, clusters: Vec<HostOffset>) {
        let mut md = self.metadata();
        let cluster = md.layout().cluster();
        clusters.into_iter().for_each(|at| md.free_structure(at, cluster));
    }

    pub(super) async fn read_exactly(&self, at: HostOffset, len: u64) -> Result<PageBuf, Errno> {
        let (result, buf) = self.file(0).read(at, PageBuf::new(len as usize)).await;
        result.map(|()| buf)
    }

    pub(super) async fn read_table(&self, bitmap: &Bitmap) -> Result<Vec<TableEntry>, Errno> {
        self.read_entries(bitmap, 0, bitmap.table_entries as usize).await
    }

    /// Entries of a bitmap's table from `first` on, as many as it has, at most `most`.
    async fn read_entries(&self, bitmap: &Bitmap, first: usize, most: usize) -> Result<Vec<TableEntry>, Errno> {
        let count = (bitmap.table_entries as usize).saturating_sub(first).min(most) as u64;
        let at = HostOffset(bitmap.table.0 + first as u64 * 8);
        let bytes = self.read_exactly(at, count * 8).await?;
        let layout = self.metadata().layout();
        bitmap::parse_table(&bytes, layout).map_err(|why| {
            let (path, name) = (self.image().path().display(), bitmap.display_name());
            error!("{path}: table of bitmap {name:?} from entry {first} on: {why}");
            Errno::EIO
        })
    }

    /// Allocates clusters, one after the other, for a structure.
    pub(super) async fn new_clusters(&self, count: u64, name: &'static str) -> Result<HostOffset, Errno> {
        loop {
            let progress = self.image().progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let answer = self.metadata().allocate_structure(count, name);
            match answer {
                Ok(Ready::Done(at)) => return Ok(at),
                Ok(Ready::Load(table)) => self.load(0, table).await?,
                Ok(Ready::Wait) => progress.await,
                Ok(Ready::Prepare) => self.flush_image().await?,
                Err(fault) => return Err(self.fault(0, fault)),
            }
        }
    }

    // ---- reading

    /// Where a bitmap says that the disk was written: the runs of `range`, at most `most` of them, from its start. What
    /// is noted and not stored yet counts. The error says why the bitmap cannot be used.
    pub async fn dirty_runs(&self, name: &[u8], range: ByteRange, most: usize) -> Result<DirtyRuns, String> {
        self.some_dirty_runs(name, range, most, usize::MAX).await
    }

    /// The same, of as much of the range as `pieces` of the bitmap tell, as [`Disk::runs_of`] counts them.
    pub(super) async fn some_dirty_runs(
        &self,
        name: &[u8],
        range: ByteRange,
        most: usize,
        pieces: usize,
    ) -> Result<DirtyRuns, String> {
        let missing = || format!("there is no bitmap {:?}", String::from_utf8_lossy(name));
        let bitmaps = self.bitmaps().ok_or_else(missing)?;
        let stored = bitmaps.stored.lock().await;
        let index = stored.find(name).ok_or_else(missing)?;
        let (layout, size) = (self.metadata().layout(), self.image().size());
        let named = |why: &str| format!("bitmap {:?}: {why}", String::from_utf8_lossy(name));
        stored.good(index, size, layout).map_err(named)?;
        let bitmap = &stored.list[index];
        let mut range = range;
        let mut noted = Ranges::default();
        if stored.tracked.contains(&index) && !range.is_empty() {
            let bits = bitmap.granularity_bits;
            let (from, to) = (range.start().0 >> bits, ((range.end().0 - 1) >> bits) + 1);
            let taken = unpoisoned(&bitmaps.noted);
            if let Some(ranges) = taken.tracker.ranges(bits) {
                let (part, end) = ranges.part(from, to, pieces.saturating_mul(NOTES_PER_PIECE));
                (noted, range) = (part, range.clip(end << bits));
            }
        }
        let runs = self.runs_of(bitmap, &noted, range, most, pieces).await;
        runs.map_err(|e| named(&format!("it cannot be read: {e}")))
    }

    /// The runs of a bitmap with further bits set, of as much of the range as `pieces` of it tell: pages of bits, or what
    /// one table entry stands for.
    pub(super) async fn runs_of(
        &self,
        bitmap: &Bitmap,
        more: &Ranges,
        range: ByteRange,
        most: usize,
        pieces: usize,
    ) -> Result<DirtyRuns, Errno> {
        let layout = self.metadata().layout();
        let per_cluster = layout.cluster() * 8;
        let granularity = bitmap.granularity_bits;
        let mut table = (0, Vec::new());
        let mut runs = DirtyRuns::new();
        let (mut at, end) = (range.start().0, range.end().0);
        // one run more than asked for, so that the last one is whole
        for piece in 0..pieces {
            if at >= end || runs.len() > most {
                break;
            }
            if piece % TURN == TURN - 1 {
                ring::yield_now().await;
            }
            let bit = at >> granularity;
            let index = (bit / per_cluster) as usize;
            let first = index as u64 * per_cluster;
            let last = (first + per_cluster).min(((end - 1) >> granularity) + 1);
            if !(table.0..table.0 + table.1.len()).contains(&index) {
                table = (index, self.read_entries(bitmap, index, TABLE_WINDOW).await?);
            }
            let entry = table.1.get(index - table.0);
            let uniform = match entry {
                Some(TableEntry::Data(_)) => None,
                Some(TableEntry::Ones) => Some(true),
                Some(TableEntry::Zeros) | None => more.within(bit, last).next().is_none().then_some(false),
            };
            if let Some(set) = uniform {
                let next = (last << granularity).min(end);
                bitmap::push_run(&mut runs, next - at, set);
                at = next;
                continue;
            }
            let stop = ((bit / PAGE_BITS + 1) * PAGE_BITS).min(last);
            let base = bit / 8 * 8;
            let len = (stop - base).div_ceil(8);
            let mut bytes = match entry {
                Some(TableEntry::Data(data)) => self.read_exactly(HostOffset(data.0 + (base - first) / 8), len).await?,
                _ => PageBuf::zeroed(len as usize),
            };
            for (from, to) in more.within(bit, stop) {
                bitmap::set_bits(&mut bytes, (from - base) as usize, (to - base) as usize);
            }
            for (count, set) in bitmap::runs(&bytes, (bit - base) as usize, (stop - base) as usize) {
                let next = (((at >> granularity) + count) << granularity).min(end);
                bitmap::push_run(&mut runs, next - at, set);
                at = next;
            }
        }
        runs.truncate(most);
        Ok(runs)
    }
}
