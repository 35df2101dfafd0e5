//! Changes of metadata that outlive the process: noted while an image is written, carried out when it is opened again.
//!
//! For devices of this machine, whose users stay when the daemon dies (see [`crate::qcow2::journal`]). Nobody writes the
//! image between the two but somebody who ignores what was promised: so before anything is carried out, the
//! places that are to change are compared with what they were, and the image is checked as it would be then.

use super::check::{DAEMON_MEMORY, Subject};
use super::disk::Disk;
use super::open::Opener;
use super::repair::Scope;
use super::{Device, Error, FileId, Image};
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::qcow2::journal::{Journal, Memory, Order, Patched};
use crate::units::HostOffset;
use std::collections::BTreeMap;
use std::path::Path;

/// Why nothing is carried out.
const CHANGED: &str = "another program has changed it since it was last written; it is left as it is";

impl Disk {
    /// From now on every change of the image is noted in `memory` before it is answered, whoever makes it. Does nothing
    /// to a raw image, which has no metadata.
    ///
    /// Returns when that holds: what was changed before is durable then.
    pub async fn keep_journal(&self, memory: Memory) -> Result<(), Errno> {
        if self.is_raw() {
            return Ok(());
        }
        self.metadata().keep_journal(Journal::new(memory));
        let begun = self.flush_image().await;
        if begun.is_err() {
            self.image().drop_journal();
        }
        begun
    }

    /// After a change, before it is answered: makes it durable if it, or what it rests on, could not be noted.
    pub(super) async fn keep_promise(&self) -> Result<(), Errno> {
        let lapsed = !self.is_raw() && self.metadata().journal_lapsed();
        if lapsed { self.flush_image().await } else { Ok(()) }
    }
}

impl Device {
    /// After a write whose bytes somebody else has moved: makes it durable if what it rests on could not be noted.
    pub async fn keep_promise(&self) -> Result<(), Errno> {
        for disk in self.disks() {
            disk.keep_promise().await?;
        }
        Ok(())
    }
}

impl Image {
    /// Nothing is noted any more.
    pub fn drop_journal(&self) {
        if let Some(mut metadata) = self.layers[0].metadata() {
            metadata.drop_journal();
        }
    }

    /// Whether its tables on disk are what they are in memory.
    pub fn is_written(&self) -> bool {
        self.layers[0].metadata().is_none_or(|metadata| metadata.is_written())
    }
}

impl Subject {
    /// Carries out what was noted: in the order of a write-back cycle, so that a crash meanwhile leaves nothing worse than
    /// leaks. Clusters of writes that were under way are given back.
    ///
    /// Errors, with nothing changed: the image would not be sound then, because somebody else has changed it since. The
    /// file is locked by the caller and opened for writing.
    pub async fn carry_out(&mut self, patched: Patched) -> Result<(), Error> {
        if patched.is_empty() {
            return Ok(());
        }
        if self.fixed_len && patched.end() > self.len {
            return Err(self.broken("its journal speaks of places behind the end of the device"));
        }
        let mut found = BTreeMap::new();
        for (at, len) in patched.places() {
            let (read, bytes) = self.file.read(HostOffset(at), PageBuf::new(len as usize)).await;
            read.map_err(|e| Error::io(&self.path, "read its metadata")(e.into()))?;
            found.insert(at, bytes);
        }
        if !patched.is_ours(|at, len| part(&found, at, len)) {
            return Err(self.broken(CHANGED));
        }
        let len = self.len.max(patched.end());
        let len = std::mem::replace(&mut self.len, len);
        self.patched = Some(patched);
        let found = self.check(&|_, _| {}).await;
        let patched = self.patched.take().unwrap_or_default();
        self.len = len;
        let found = found?;
        if found.corruptions > 0 || found.check_errors > 0 {
            return Err(self.broken(CHANGED));
        }
        for order in Order::ALL {
            let pieces = patched.of(order);
            if pieces.is_empty() {
                continue;
            }
            for (at, bytes) in pieces {
                self.write(at.0, &bytes).await?;
            }
            self.barrier().await?;
        }
        if found.leaks > 0 {
            self.repair(Scope::Leaks, &|_, _| {}).await?;
        }
        Ok(())
    }
}

/// Bytes of the file at `at`, from the pieces of it that were read.
fn part(found: &BTreeMap<u64, PageBuf>, at: u64, len: u64) -> Vec<u8> {
    let Some((start, bytes)) = found.range(..=at).next_back() else { return Vec::new() };
    let from = (at - start) as usize;
    bytes.get(from..from + len as usize).map(<[u8]>::to_vec).unwrap_or_default()
}

/// Carries out on an image what the journal of a process that has gone says. `id`: which file it is to be.
///
/// Runs inside `ring::run`. Errors: the image is another one, is locked by somebody, or was changed by somebody.
pub async fn recover(path: &Path, id: FileId, journal: Patched) -> Result<(), Error> {
    let opener = Opener::new(path)?;
    if opener.id() != id {
        let why = "another file has its name by now".to_owned();
        return Err(Error::Broken { path: path.to_owned(), why });
    }
    if journal.is_empty() {
        return Ok(()); // it may be read-only, and open elsewhere
    }
    opener.lock()?;
    let _claim = opener.lock_for_writing()?;
    opener.subject(true, DAEMON_MEMORY)?.carry_out(journal).await
}
