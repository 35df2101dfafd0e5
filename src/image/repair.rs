//! Repairing an image: refcounts that are right again, and flags that say so.
//!
//! In this order, with barriers between: new refcounts beside the old ones, the header's pointer to them, COPIED flags,
//! the dirty and corrupt bits. A crash leaves the image as it was before or with a part of it repaired, and never makes
//! anything worse; repairing it again finishes the work.

use super::check::{COMMAND_MEMORY, DAEMON_MEMORY, RefcountBlock, Report, Subject, entries};
use super::open::Opener;
use super::{Error, Format, Progress, reading};
use crate::pagebuf::PageBuf;
use crate::qcow2::check::{Check, Findings, block_offset};
use crate::qcow2::entry::RawEntry;
use crate::qcow2::header::{Header, autoclear, field, incompatible};
use crate::qcow2::rebuild::{Mode, Old, Rebuild, with_right_copied, without_place};
use crate::units::HostOffset;
use std::path::Path;
use tracing::{info, warn};

/// What is repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Leaked clusters.
    Leaks,
    /// Errors too.
    All,
}

/// Known bits of `autoclear_features`: repairing keeps true what they promise.
const KEPT_AUTOCLEAR: u64 = autoclear::BITMAPS | autoclear::RAW_DATA_FILE;

impl Subject {
    /// Checks the image, repairs it, checks it again: what was found first, and at last. The file is locked by the
    /// caller and opened for writing.
    pub async fn repair(&mut self, scope: Scope, progress: Progress<'_>) -> Result<(Findings, Findings), Error> {
        let found = self.full_check(progress).await?;
        let before = found.findings.clone();
        let mut after = before.clone();
        if !before.clean() {
            let all = scope == Scope::All;
            let misplaced = all && before.misplaced_zeroes;
            if misplaced {
                self.change_l2_tables(&found, |check, raw| {
                    check.is_misplaced_zero(raw).then(|| without_place(check.layout()))
                })
                .await?;
            }
            drop(found);
            let (header, mut counted) = self.begin().await?;
            self.count(&header, &mut counted, progress).await?;
            if before.refcounts_differ || misplaced {
                let mode = match scope {
                    Scope::Leaks => Mode::LeaksOnly,
                    Scope::All if before.unfollowed => Mode::KeepUnreferenced,
                    Scope::All => Mode::References,
                };
                self.rebuild(&header, &counted, mode, before.image_end_offset).await?;
            }
            if all {
                self.right_flags(&header, &counted).await?;
            }
            drop(counted);
            after = self.full_check(progress).await?.findings;
        }
        if after.corruptions == 0 && after.check_errors == 0 {
            self.mark_clean().await?;
        }
        Ok((before, after))
    }

    pub(super) async fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let (result, _) = self.file.write(HostOffset(at), PageBuf::copy_of(bytes)).await;
        result.map_err(|e| Error::io(&self.path, "repair it")(e.into()))?;
        self.len = self.len.max(at + bytes.len() as u64);
        Ok(())
    }

    pub(super) async fn barrier(&self) -> Result<(), Error> {
        self.file.sync().await.map_err(|e| Error::io(&self.path, "make repairs durable")(e.into()))
    }

    /// Writes new refcounts beside the old ones and lets the header point to them.
    async fn rebuild(&mut self, header: &Header, counted: &Check, mode: Mode, used_end: u64) -> Result<(), Error> {
        let layout = header.layout;
        let old: Vec<RefcountBlock> = self.refcount_table(header).await?;
        let mut replaced = Old { blocks: old.iter().map(|block| block.index).collect(), ..Old::default() };
        let table = header.reftable_offset.0 >> layout.cluster_bits;
        let places = old.iter().map(|block| block_offset(block.raw)).filter(|&at| counted.is_block_readable(at));
        for cluster in
            places.map(|at| at >> layout.cluster_bits).chain(table..table + u64::from(header.reftable_clusters))
        {
            replaced.clusters.insert(cluster);
        }
        let limit = if self.fixed_len { self.len >> layout.cluster_bits } else { u64::MAX };
        let free = layout.clusters_for(used_end);
        let plan = Rebuild::plan(counted, layout, mode, replaced, free, limit)
            .map_err(|why| self.broken(format!("refcounts cannot be rebuilt: {why}")))?;
        for number in 0..plan.blocks().len() {
            let index = plan.blocks()[number];
            let mut before = vec![0; layout.cluster() as usize];
            let place = old.binary_search_by_key(&index, |block| block.index).ok().map(|i| block_offset(old[i].raw));
            if let Some(place) = place.filter(|&at| plan.needs_old() && counted.is_block_readable(at)) {
                let mut pieces = self.pieces(place, layout.cluster());
                while let Some((at, bytes)) = pieces.next().await? {
                    let from = (at - place) as usize;
                    before[from..from + bytes.len()].copy_from_slice(&bytes);
                }
            }
            self.write(plan.block_at(number).0, &plan.block_bytes(number, counted, &before)).await?;
        }
        let (table, clusters) = plan.table();
        self.write(table.0, &plan.table_bytes()).await?;
        self.barrier().await?;
        // both fields lie in one sector
        let pointer = [&table.0.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
        self.write(field::REFTABLE, &pointer).await?;
        self.barrier().await
    }

    /// Sets COPIED flags to what the number of references asks for.
    async fn right_flags(&mut self, header: &Header, counted: &Check) -> Result<(), Error> {
        let layout = header.layout;
        let bits = layout.cluster_bits;
        let (start, len) = (header.l1_offset.0, u64::from(header.l1_entries) * 8);
        let clusters = start >> bits..(start + len).div_ceil(layout.cluster());
        if clusters.into_iter().any(|cluster| counted.counted().get(cluster) > 1) {
            return Ok(()); // something else lies in the L1 table: not to be touched
        }
        let mut changes = Vec::new();
        let mut pieces = self.pieces(start, len);
        while let Some((at, bytes)) = pieces.next().await? {
            for (i, raw) in entries(&bytes).enumerate() {
                if let Some(right) = with_right_copied(raw, layout, |cluster| counted.refcount(cluster)) {
                    changes.push((at + i as u64 * 8, right));
                }
            }
        }
        for (at, right) in changes {
            self.write(at, &right.to_be_bytes()).await?;
        }
        self.change_active_tables(header, counted, |check, raw| {
            let references = |cluster| if layout.data_file { 1 } else { check.refcount(cluster) };
            let descriptor = with_right_copied(raw.descriptor, layout, references)?;
            Some(RawEntry { descriptor, ..raw })
        })
        .await?;
        self.barrier().await
    }

    /// Changes entries of the L2 tables of the active L1 table.
    async fn change_active_tables(
        &mut self,
        header: &Header,
        check: &Check,
        change: impl Fn(&Check, RawEntry) -> Option<RawEntry>,
    ) -> Result<(), Error> {
        let mut tables = Vec::new();
        let mut pieces = self.pieces(header.l1_offset.0, u64::from(header.l1_entries) * 8);
        while let Some((_, bytes)) = pieces.next().await? {
            let offsets = entries(&bytes).map(|raw| raw & crate::qcow2::entry::OFFSET_MASK);
            tables.extend(offsets.filter(|&at| check.is_only_l2_table(at)));
        }
        tables.sort_unstable();
        tables.dedup();
        for table in tables {
            self.change_table(header, check, table, &change).await?;
        }
        Ok(())
    }

    /// Changes entries of all L2 tables.
    async fn change_l2_tables(
        &mut self,
        check: &Check,
        change: impl Fn(&Check, RawEntry) -> Option<RawEntry>,
    ) -> Result<(), Error> {
        let (header, _) = self.begin().await?;
        for table in check.l2_tables().into_iter().filter(|&at| check.is_only_l2_table(at)) {
            self.change_table(&header, check, table, &change).await?;
        }
        self.barrier().await
    }

    async fn change_table(
        &mut self,
        header: &Header,
        check: &Check,
        table: u64,
        change: &impl Fn(&Check, RawEntry) -> Option<RawEntry>,
    ) -> Result<(), Error> {
        let entry_len = header.layout.l2_entry_bytes() as usize;
        let end = table + header.layout.cluster();
        let mut next = table;
        while next < end {
            let mut pieces = self.pieces(next, end - next);
            let Some((at, mut bytes)) = pieces.next().await? else { break };
            next = at + bytes.len() as u64;
            let mut changed = false;
            for entry in bytes.chunks_exact_mut(entry_len) {
                if let Some(new) = change(check, RawEntry::load(entry, header.layout)) {
                    new.store(entry, header.layout);
                    changed = true;
                }
            }
            if changed {
                self.write(at, &bytes).await?;
            }
        }
        Ok(())
    }

    /// Takes back the bits that say that the image is dirty or corrupt, and those that promise what nobody here knows.
    async fn mark_clean(&mut self) -> Result<(), Error> {
        let (header, _) = self.begin().await?;
        if header.layout.version < 3 {
            return Ok(());
        }
        let bits = self.read(field::INCOMPATIBLE, 8).await?;
        let bits = u64::from_be_bytes(bits[..].try_into().expect("eight bytes"));
        let clean = bits & !(incompatible::DIRTY | incompatible::CORRUPT);
        if clean == bits && header.autoclear & !KEPT_AUTOCLEAR == 0 {
            return Ok(());
        }
        self.barrier().await?;
        self.write(field::AUTOCLEAR, &(header.autoclear & KEPT_AUTOCLEAR).to_be_bytes()).await?;
        self.write(field::INCOMPATIBLE, &clean.to_be_bytes()).await?;
        self.barrier().await
    }
}

/// Repairs an image file, locked as a writer locks it. `None`: the format has nothing to repair.
pub fn repair(
    path: &Path,
    format: Option<Format>,
    scope: Scope,
    progress: Progress<'_>,
) -> Result<Option<Report>, Error> {
    let opener = Opener::new(path)?;
    if opener.format(format)? == Format::Raw {
        return Ok(None);
    }
    let work = async {
        opener.lock()?;
        let _claim = opener.lock_for_writing()?;
        let (before, after) = opener.subject(true, COMMAND_MEMORY)?.repair(scope, progress).await?;
        Ok(Report::new(path, &before, Some(&after)))
    };
    reading::run(path, work).map(Some)
}

impl Opener {
    /// Makes a QCOW2 image that was not closed fit for writing: rebuilds its refcounts. Does nothing to others. The
    /// file is locked as a writer locks it meanwhile.
    pub async fn repair_if_dirty(&mut self, format: Format) -> Result<(), Error> {
        if format == Format::Raw {
            return Ok(());
        }
        let header = self.parse_header().await?;
        if !header.dirty || header.corrupt {
            return Ok(());
        }
        self.lock()?;
        let claim = self.lock_for_writing()?;
        let repaired = self.rebuild_dirty().await;
        drop(claim);
        let unlocked = self.unlock_for_writing();
        repaired.and(unlocked)
    }

    async fn rebuild_dirty(&mut self) -> Result<(), Error> {
        let mut subject = self.subject(true, DAEMON_MEMORY)?;
        let path = subject.path.clone();
        // whoever held the lock before may have repaired it
        if !self.parse_header().await?.dirty {
            return Ok(());
        }
        info!("{}: was not closed, its refcounts are being rebuilt", path.display());
        let (before, after) = subject.repair(Scope::All, &|_, _| {}).await?;
        self.note_length()?;
        if after.corruptions > 0 || after.check_errors > 0 {
            let why = "it was not closed and could not be repaired as a whole; see `cowgate image check`";
            return Err(Error::NotWritable { path, why });
        }
        if before.past_end > 0 {
            warn!("{}: {} references led past the end of the file", path.display(), before.past_end);
        }
        info!(
            "{}: refcounts rebuilt: {} errors and {} leaked clusters repaired",
            path.display(),
            before.corruptions,
            before.leaks
        );
        Ok(())
    }
}
