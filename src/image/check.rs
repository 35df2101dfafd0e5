//! Checking an image: reads its tables in bounded pieces and lets [`crate::qcow2::check`] judge them.
//!
//! Called by `cowgate image check` and before a dirty image is written. The image may be hostile: memory is limited, and
//! so is what is read: tables that lie in each other cannot make it read more than a multiple of what the file stores.

use super::open::Opener;
use super::{Error, Format, Progress, reading};
use crate::pagebuf::PageBuf;
use crate::qcow2::check::{Check, Findings, block_offset};
use crate::qcow2::header::{Header, PEEK_BYTES, autoclear};
use crate::qcow2::journal::Patched;
use crate::qcow2::{bitmap, snapshot};
use crate::ring;
use crate::ring::mem::MemDisk;
use crate::units::{HostOffset, HostRange};
use serde::Serialize;
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Memory that the command's counts may take: enough for 64 TiB of data in 64 KiB clusters, a few times over.
pub const COMMAND_MEMORY: u64 = 4 << 30;
/// The same for a daemon that opens a dirty image.
pub const DAEMON_MEMORY: u64 = 256 << 20;
/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 64 << 10;
/// How many times what the file stores may be read. Sound tables are read twice; where holes were punched into them,
/// more bytes are read than stored.
const READ_FACTOR: u64 = 32;
/// What may be read of the smallest file.
const READ_LEAST: u64 = 64 << 20;

/// A QCOW2 file to be checked or repaired.
pub struct Subject {
    pub(super) file: ring::File,
    pub(super) path: PathBuf,
    /// Its length in bytes.
    pub(super) len: u64,
    /// Bytes of storage it takes.
    stored: u64,
    /// It cannot become longer.
    pub(super) fixed_len: bool,
    /// Bytes that may still be read.
    budget: Cell<u64>,
    memory: u64,
    /// What is read differs from the file in this.
    pub(super) patched: Option<Patched>,
}

/// The verdict, with the keys of `qemu-img check --output=json`.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// The file.
    pub filename: PathBuf,
    /// Its format.
    pub format: Format,
    /// What could not be checked.
    pub check_errors: u64,
    /// Where the last cluster in use ends.
    pub image_end_offset: u64,
    /// Errors that there are now.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Leaked clusters that there are now.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Errors that were repaired.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaked clusters that were given back.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a place in the file.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Those that do not follow their predecessor there.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// What was found, described; not everything when that is much.
    #[serde(skip)]
    pub lines: Vec<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Report {
    pub(super) fn new(path: &Path, before: &Findings, after: Option<&Findings>) -> Report {
        let now = after.unwrap_or(before);
        let mut lines = before.lines.clone();
        let lost = before.past_end.saturating_sub(now.past_end);
        if lost > 0 {
            lines.push(format!("{lost} references led past the end of the file; what they name reads as zeroes now"));
        }
        Report {
            filename: path.to_owned(),
            format: Format::Qcow2,
            check_errors: now.check_errors,
            image_end_offset: now.image_end_offset,
            corruptions: now.corruptions,
            leaks: now.leaks,
            corruptions_fixed: before.corruptions.saturating_sub(now.corruptions),
            leaks_fixed: before.leaks.saturating_sub(now.leaks),
            total_clusters: now.total_clusters,
            allocated_clusters: now.allocated_clusters,
            fragmented_clusters: now.fragmented_clusters,
            compressed_clusters: now.compressed_clusters,
            lines,
        }
    }
}

/// A table that is being read, piece by piece. What the file does not store is passed over: it is zeroes, which say
/// nothing in any table.
pub(super) struct Pieces<'a> {
    subject: &'a Subject,
    at: u64,
    end: u64,
}

impl Pieces<'_> {
    /// The next piece and where it begins.
    pub(super) async fn next(&mut self) -> Result<Option<(u64, PageBuf)>, Error> {
        while self.at < self.end {
            let at = self.at;
            let len = (self.end - at).min(PIECE);
            self.at += len;
            let patched = self.subject.patched.as_ref().is_some_and(|patched| patched.touches(at, len));
            if patched || !self.subject.file.is_hole(HostRange::new(HostOffset(at), len)) {
                return Ok(Some((at, self.subject.read(at, len).await?)));
            }
        }
        Ok(None)
    }
}

/// An entry of the refcount table that is not 0.
#[derive(Clone, Copy)]
pub(super) struct RefcountBlock {
    pub index: u64,
    pub raw: u64,
}

impl Subject {
    pub(super) fn new(file: ring::File, path: PathBuf, len: u64, stored: u64, fixed_len: bool, memory: u64) -> Subject {
        Subject { file, path, len, stored, fixed_len, budget: Cell::new(0), memory, patched: None }
    }

    /// A file of the test double, which may take `memory` bytes for its counts.
    pub fn in_memory(disk: &MemDisk, memory: u64) -> Subject {
        Subject::new(ring::File::memory(disk), PathBuf::from("memory"), disk.len(), disk.len(), false, memory)
    }

    pub(super) fn broken(&self, why: impl ToString) -> Error {
        Error::Broken { path: self.path.clone(), why: why.to_string() }
    }

    pub(super) async fn read(&self, at: u64, len: u64) -> Result<PageBuf, Error> {
        self.charge(len)?;
        let (result, mut buf) = self.file.read(HostOffset(at), PageBuf::new(len as usize)).await;
        result.map_err(|e| Error::io(&self.path, "read its metadata")(e.into()))?;
        if let Some(patched) = &self.patched {
            patched.apply(at, &mut buf);
        }
        Ok(buf)
    }

    /// Takes work that grows with `bytes` of tables out of the budget.
    fn charge(&self, bytes: u64) -> Result<(), Error> {
        match self.budget.get().checked_sub(bytes) {
            Some(left) => {
                self.budget.set(left);
                Ok(())
            }
            None => Err(self.broken("its tables overlap: following them takes more than any sound image's would")),
        }
    }

    pub(super) fn pieces(&self, at: u64, len: u64) -> Pieces<'_> {
        let end = at.saturating_add(len).min(self.len);
        Pieces { subject: self, at: at.min(end), end }
    }

    /// Begins a pass over the tables: the header, and what counts.
    pub(super) async fn begin(&self) -> Result<(Header, Check), Error> {
        self.budget.set(self.stored.saturating_mul(READ_FACTOR).saturating_add(READ_LEAST));
        let refused = |source| Error::Header { path: self.path.clone(), source };
        let peek = self.read(0, self.len.min(PEEK_BYTES as u64)).await?;
        let cluster = Header::first_cluster(&peek).map_err(refused)?;
        let first = self.read(0, self.len.min(cluster)).await?;
        let header = Header::parse(&first).map_err(refused)?;
        let check = Check::new(&header, self.len, self.memory);
        Ok((header, check))
    }

    /// Checks the image.
    pub async fn check(&self, progress: Progress<'_>) -> Result<Findings, Error> {
        Ok(self.full_check(progress).await?.findings)
    }

    pub(super) async fn full_check(&self, progress: Progress<'_>) -> Result<Check, Error> {
        let (header, mut check) = self.begin().await?;
        let blocks = self.refcount_table(&header).await?;
        for block in &blocks {
            if check.is_block_readable(block_offset(block.raw)) {
                self.each_refcount(&header, *block, |first, bytes| check.refcounts(first, bytes)).await?;
            }
        }
        self.count(&header, &mut check, progress).await?;
        let table_len = u64::from(header.reftable_clusters) * header.layout.cluster();
        check.count(header.reftable_offset.0, table_len, 1).map_err(|e| self.broken(e))?;
        let mut found = Vec::new();
        for block in blocks {
            if check.refcount_block(block.index, block.raw).map_err(|e| self.broken(e))?.is_some() {
                found.push(block);
            }
        }
        for block in found {
            let compare = |first, bytes: &[u8]| {
                check.compare(first, bytes);
                Ok(())
            };
            self.each_refcount(&header, block, compare).await?;
        }
        check.finish();
        Ok(check)
    }

    /// The entries of the refcount table.
    pub(super) async fn refcount_table(&self, header: &Header) -> Result<Vec<RefcountBlock>, Error> {
        let start = header.reftable_offset.0;
        let mut pieces = self.pieces(start, u64::from(header.reftable_clusters) * header.layout.cluster());
        let mut blocks = Vec::new();
        while let Some((at, bytes)) = pieces.next().await? {
            let entries = entries(&bytes).enumerate().filter(|&(_, raw)| raw != 0);
            blocks.extend(entries.map(|(i, raw)| RefcountBlock { index: (at - start) / 8 + i as u64, raw }));
        }
        Ok(blocks)
    }

    /// Shows the refcounts that a block stores, with the cluster that the first is of.
    async fn each_refcount(
        &self,
        header: &Header,
        block: RefcountBlock,
        mut show: impl FnMut(u64, &[u8]) -> Result<(), crate::qcow2::references::OutOfMemory>,
    ) -> Result<(), Error> {
        let layout = header.layout;
        let start = block_offset(block.raw);
        let mut pieces = self.pieces(start, layout.cluster());
        while let Some((at, bytes)) = pieces.next().await? {
            let first = block.index * layout.refblock_entries() + (((at - start) * 8) >> layout.refcount_order);
            show(first, &bytes).map_err(|e| self.broken(e))?;
        }
        Ok(())
    }

    /// Counts everything that refers to clusters, but for the refcount table and its blocks.
    pub(super) async fn count(&self, header: &Header, check: &mut Check, progress: Progress<'_>) -> Result<(), Error> {
        let layout = header.layout;
        check.count(0, layout.cluster(), 1).map_err(|e| self.broken(e))?;
        let l1_len = u64::from(header.l1_entries) * 8;
        check.count(header.l1_offset.0, l1_len, 1).map_err(|e| self.broken(e))?;
        let mut pieces = self.pieces(header.l1_offset.0, l1_len);
        while let Some((at, bytes)) = pieces.next().await? {
            for (index, raw) in ((at - header.l1_offset.0) / 8..).zip(entries(&bytes)) {
                if let Some(table) = check.l1_entry(index, raw, true, 1).map_err(|e| self.broken(e))? {
                    self.count_l2(header, check, table, true, 1).await?;
                }
                progress(index.saturating_mul(layout.l2_coverage()).min(header.size), header.size);
            }
        }
        self.count_snapshots(header, check).await?;
        self.count_bitmaps(header, check).await?;
        progress(header.size, header.size);
        Ok(())
    }

    async fn count_l2(
        &self,
        header: &Header,
        check: &mut Check,
        table: u64,
        active: bool,
        times: u64,
    ) -> Result<(), Error> {
        let mut pieces = self.pieces(table, header.layout.cluster());
        while let Some((_, bytes)) = pieces.next().await? {
            check.l2_entries(&bytes, active, times).map_err(|e| self.broken(e))?;
        }
        Ok(())
    }

    async fn count_snapshots(&self, header: &Header, check: &mut Check) -> Result<(), Error> {
        let Some((snapshots, len)) = self.snapshots(header, check).await? else { return Ok(()) };
        let layout = header.layout;
        check.count(header.snapshots_offset.0, len, 1).map_err(|e| self.broken(e))?;
        for snapshot in &snapshots {
            let (start, l1_len) = (snapshot.l1_offset.0, u64::from(snapshot.l1_entries) * 8);
            if layout.version >= 3 && snapshot.disk_size.is_none() {
                check.findings.error(|| format!("snapshot {:?}: its table entry is incomplete", snapshot.id));
            }
            if i64::try_from(start.saturating_add(l1_len)).is_err() {
                check.findings.unchecked(|| format!("snapshot {:?}: no file has a place {start:#x}", snapshot.id));
            }
            if !start.is_multiple_of(layout.cluster()) {
                check.findings.unfollowed = true;
                check.findings.error(|| format!("snapshot {:?}: L1 table at {start:#x} is misaligned", snapshot.id));
                continue;
            }
            // also for what is a hole: counting its clusters takes time too
            self.charge(layout.clusters_for(l1_len) * 8)?;
            check.count(start, l1_len, 1).map_err(|e| self.broken(e))?;
            let mut pieces = self.pieces(start, l1_len);
            while let Some((at, bytes)) = pieces.next().await? {
                for (index, raw) in ((at - start) / 8..).zip(entries(&bytes)) {
                    check.l1_entry(index, raw, false, 1).map_err(|e| self.broken(e))?;
                }
            }
        }
        // snapshots share their tables: each is read once
        for (table, times) in check.inactive_l2_tables() {
            self.count_l2(header, check, table, false, times).await?;
        }
        Ok(())
    }

    async fn snapshots(
        &self,
        header: &Header,
        check: &mut Check,
    ) -> Result<Option<(Vec<snapshot::Snapshot>, u64)>, Error> {
        if header.snapshots == 0 {
            return Ok(None);
        }
        let at = header.snapshots_offset.0;
        let mut len = 64 << 10;
        let why = loop {
            let bytes = self.read(at, len).await?;
            match snapshot::parse(&bytes, header.snapshots) {
                Ok(Some(found)) => return Ok(Some(found)),
                Ok(None) if len >= snapshot::MAX_TABLE_BYTES => break "it is larger than 16 MiB".to_owned(),
                Ok(None) => len *= 4,
                Err(why) => break why,
            }
        };
        check.findings.unfollowed = true;
        check.findings.error(|| format!("snapshot table at {at:#x}: {why}"));
        Ok(None)
    }

    async fn count_bitmaps(&self, header: &Header, check: &mut Check) -> Result<(), Error> {
        let Some(extension) = header.bitmaps.filter(|_| header.autoclear & autoclear::BITMAPS != 0) else {
            return Ok(()); // nobody vouches for it: its clusters are leaked
        };
        let refused = |why| self.broken(format!("bitmap directory: {why}"));
        bitmap::check_extension(&extension, header.layout, self.len).map_err(refused)?;
        let (at, len) = (extension.directory_offset.0, extension.directory_bytes);
        let bytes = self.read(at, len).await?;
        let bitmaps = bitmap::parse(&bytes, extension.count, header.layout).map_err(refused)?;
        check.count(at, len, 1).map_err(|e| self.broken(e))?;
        for bitmap in bitmaps {
            let len = u64::from(bitmap.table_entries) * 8;
            check.count(bitmap.table.0, len, 1).map_err(|e| self.broken(e))?;
            let mut pieces = self.pieces(bitmap.table.0, len);
            while let Some((_, bytes)) = pieces.next().await? {
                check.bitmap_table(&bytes).map_err(|e| self.broken(e))?;
            }
        }
        Ok(())
    }
}

/// Big endian table entries.
pub(super) fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|raw| u64::from_be_bytes(raw.try_into().expect("eight bytes")))
}

/// Checks an image file, locked so that nobody writes it meanwhile. `None`: the format has nothing to check.
pub fn check(path: &Path, format: Option<Format>, progress: Progress<'_>) -> Result<Option<Report>, Error> {
    let opener = Opener::new(path)?;
    if opener.format(format)? == Format::Raw {
        return Ok(None);
    }
    let work = async {
        opener.lock()?;
        let findings = opener.subject(false, COMMAND_MEMORY)?.check(progress).await?;
        Ok(Report::new(path, &findings, None))
    };
    reading::run(path, work).map(Some)
}
