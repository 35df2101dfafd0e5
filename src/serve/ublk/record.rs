//! What a daemon leaves behind of its devices, so that the next one goes on with them: for each device a record of what it
//! is, and a journal for each image that it writes (see [`crate::image::recovery`]).
//!
//! All of it is in [`DIRECTORY`], which only root may look into. It is to be on a tmpfs, as /run is: what is in there means
//! something only as long as the machine runs, and so long it survives every end of the daemon.

use crate::export::config::ExportConfig;
use crate::export::device_keys::DeviceKeys;
use crate::image::{self, Device, FileId, Image, recovery};
use crate::qcow2::journal::{self, Patched};
use crate::ring::{self, lasting};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tracing::warn;

/// Where records and journals are.
const DIRECTORY: &str = "/run/cowgate/devices";
/// Bytes of a record at most.
const RECORD_MAX: u64 = 1 << 20;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The configuration of its daemon: another daemon leaves it alone.
    pub config: PathBuf,
    /// The export that it is.
    pub export: String,
    /// What the export's `exportname` is.
    pub path: PathBuf,
    /// What else says which bytes it shows, and whether they can be written.
    content: Content,
    /// How the device was asked for.
    keys: DeviceKeys,
    /// Its images.
    images: Vec<Held>,
}

/// What an export's definition says of the bytes that it shows, beside its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    format: image::Format,
    read_only: bool,
    snapshot: Option<String>,
    file_size: Option<u64>,
    multi_file: bool,
    copy_on_write: bool,
}

impl Content {
    fn of(export: &ExportConfig) -> Content {
        Content {
            format: export.format,
            read_only: export.read_only,
            snapshot: export.image.snapshot.clone(),
            file_size: export.client.file_size,
            multi_file: export.client.multi_file,
            copy_on_write: export.client.copy_on_write.is_some(),
        }
    }
}

/// An image of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Where its changes are noted, if it is written and has metadata.
    journal: Option<PathBuf>,
}

impl Record {
    /// Of the device of an export, for the daemon of this configuration.
    pub(super) fn new(config: &Path, export: &ExportConfig, keys: &DeviceKeys, images: Vec<Held>) -> Record {
        let (config, path, name) = (config.to_owned(), export.path.clone(), export.name.clone());
        Record { config, export: name, path, content: Content::of(export), keys: keys.clone(), images }
    }

    /// Whether the export's definition shows what the device has shown.
    pub(super) fn is_of(&self, export: &ExportConfig) -> bool {
        self.path == export.path && self.content == Content::of(export)
    }

    /// Whether the device is what these keys ask for.
    pub(super) fn has(&self, keys: &DeviceKeys) -> bool {
        self.keys == *keys
    }

    /// The same for a device that is gone on with: it is what it was made as.
    pub(super) fn made_as(self, before: Record) -> Record {
        Record { keys: before.keys, ..self }
    }

    /// Writes it down, for whoever comes after this process.
    pub(super) fn write(&self, id: u32) -> io::Result<()> {
        directory()?;
        let fresh = file(id).with_extension("new");
        let _ = fs::remove_file(&fresh); // one that was not written to its end
        serde_json::to_writer(OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?, self)?;
        fs::rename(fresh, file(id))
    }

    /// What was written down of a device; `None`: nothing that can be read.
    pub(super) fn read(id: u32) -> Option<Record> {
        let open = File::open(file(id)).ok()?;
        serde_json::from_reader(io::Read::take(open, RECORD_MAX)).ok()
    }

    /// Brings the images to where they were when the process ended: all that it has answered is in them then.
    ///
    /// Blocks: it checks the images. Errors: they are not what they were.
    pub(super) fn carry_out(&self) -> Result<(), image::Error> {
        let thread = std::thread::scope(|scope| scope.spawn(|| ring::run(self.recover())).join());
        let failed = |source| image::Error::Io { path: self.path.clone(), action: "start a thread for", source };
        thread.unwrap_or_else(|_| Err(io::Error::other("it panicked"))).map_err(failed)?
    }

    async fn recover(&self) -> Result<(), image::Error> {
        for held in &self.images {
            let id = FileId { device: held.device, inode: held.inode };
            recovery::recover(&held.path, id, held.noted()?).await?;
        }
        Ok(())
    }

    /// Removes its journals, but for those that somebody needs: `others` are records of other devices.
    pub(super) fn forget_journals(&self, others: &[Record]) {
        let in_use: Vec<PathBuf> = there_are().iter().filter_map(Weak::upgrade).map(|j| j.path.clone()).collect();
        for journal in self.journals() {
            if !in_use.contains(journal) && !others.iter().any(|other| other.names(journal)) {
                let _ = fs::remove_file(journal); // it may never have been made
            }
        }
    }

    fn journals(&self) -> impl Iterator<Item = &PathBuf> {
        self.images.iter().filter_map(|held| held.journal.as_ref())
    }

    fn names(&self, journal: &Path) -> bool {
        self.journals().any(|named| named == journal)
    }
}

/// All records that there are.
fn records() -> Vec<Record> {
    let files = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    files.filter_map(|entry| Record::read(id_of(&entry.file_name())?)).collect()
}

/// The device whose record this file is.
fn id_of(name: &OsStr) -> Option<u32> {
    name.to_str()?.strip_suffix(".json")?.parse().ok()
}

impl Held {
    fn noted(&self) -> Result<Patched, image::Error> {
        let Some(journal) = &self.journal else { return Ok(Patched::default()) };
        let memory = match fs::read(journal) {
            // it goes when all that it has noted is in the image
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Patched::default()),
            read => read.map_err(|source| image::Error::Io {
                path: journal.clone(),
                action: "read what a former daemon has noted in",
                source,
            })?,
        };
        let broken = || image::Error::Broken { path: journal.clone(), why: "it is no journal".to_owned() };
        journal::read(&memory).and_then(Patched::new).ok_or_else(broken)
    }
}

/// Forgets a device: what is left of its record, and of its journals.
pub(super) fn forget(id: u32) {
    let record = Record::read(id);
    let _ = fs::remove_file(file(id)); // there may be none
    if let Some(record) = record {
        record.forget_journals(&records());
    }
}

/// Forgets all devices that are not among these.
pub(super) fn forget_all_but(ids: &[u32]) {
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        if let Some(id) = id_of(&entry.file_name()).filter(|id| !ids.contains(id)) {
            forget(id);
        }
    }
}

/// The images of a device, and what notes their changes down as long as it lives.
#[derive(Default)]
pub(super) struct Kept {
    pub held: Vec<Held>,
    pub journals: Vec<Arc<Journal>>,
}

/// Has all changes of a device's images noted down from now on, for the next daemon with this configuration.
///
/// Runs on a thread of a ring. Errors: they cannot be.
pub(super) async fn keep(device: &Device, config: &Path) -> io::Result<Kept> {
    let mut kept = Kept::default();
    for disk in device.disks() {
        let image = disk.image();
        let journal = match disk.writable() && image.format() == image::Format::Qcow2 {
            true => Some(Journal::keep(disk, config).await?),
            false => None,
        };
        let id = image.id();
        let path = journal.as_ref().map(|journal| journal.path.clone());
        let held = Held { path: image.path().to_owned(), device: id.device, inode: id.inode, journal: path };
        kept.held.push(held);
        kept.journals.extend(journal);
    }
    Ok(kept)
}

/// The journal of an image, for as long as a device needs it.
pub(super) struct Journal {
    image: Arc<Image>,
    path: PathBuf,
}

/// One is begun at a time, so that those there are have begun.
static BEGINNING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
/// Those there are: two devices may write one image.
static JOURNALS: Mutex<Vec<Weak<Journal>>> = Mutex::new(Vec::new());

fn there_are() -> MutexGuard<'static, Vec<Weak<Journal>>> {
    JOURNALS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    async fn keep(disk: &image::Disk, config: &Path) -> io::Result<Arc<Journal>> {
        let _alone = BEGINNING.lock().await;
        let image = disk.image();
        let same = |journal: &Arc<Journal>| Arc::ptr_eq(&journal.image, image);
        if let Some(there) = there_are().iter().filter_map(Weak::upgrade).find(same) {
            return Ok(there);
        }
        let id = image.id();
        let path = directory()?.join(format!("{:x}-{:x}.journal", id.device, id.inode));
        if let Some(other) = records().iter().find(|record| record.config != config && record.names(&path)) {
            let why =
                format!("the daemon of {} has left changes of the image in {}", other.config.display(), path.display());
            return Err(io::Error::other(why));
        }
        let mut open = OpenOptions::new();
        let open = open.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let memory = lasting::map(&open.open(&path)?, journal::bytes_for(u64::from(disk.cluster())))?;
        let journal = Arc::new(Journal { image: Arc::clone(image), path });
        disk.keep_journal(Box::new(memory)).await.map_err(io::Error::from)?;
        let mut journals = there_are();
        journals.retain(|journal| journal.strong_count() > 0);
        journals.push(Arc::downgrade(&journal));
        Ok(journal)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // what could not be flushed is only here
        if self.image.is_written() {
            let _ = fs::remove_file(&self.path); // somebody may have done so
        }
        self.image.drop_journal();
    }
}

fn directory() -> io::Result<&'static Path> {
    let directory = Path::new(DIRECTORY);
    for (place, mode) in directory.parent().map(|parent| (parent, 0o755)).into_iter().chain([(directory, 0o700)]) {
        match DirBuilder::new().mode(mode).create(place) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let found = fs::symlink_metadata(place)?;
        if !found.is_dir() || found.uid() != 0 || found.mode() & 0o022 != 0 {
            let why = format!("others than root may write to {}; remove it", place.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
    }
    Ok(directory)
}

fn file(id: u32) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{id}.json"))
}

/// Says why a device will not outlive the daemon.
pub(super) fn warn_of(export: &str, why: &io::Error) {
    warn!(
        "export {export:?}: its device ends with this process, as what outlives it cannot be written to {DIRECTORY}: {why}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_version_knows_the_device_again() {
        let written = r#"{
            "config": "/etc/cowgate/config", "export": "disk", "path": "/srv/disk.qcow2",
            "content": {
                "format": "qcow2", "read_only": false, "snapshot": "monday",
                "file_size": null, "multi_file": false, "copy_on_write": false
            },
            "keys": { "id": 3, "queues": 2, "key_of_another_version": 1 },
            "images": [{ "path": "/srv/disk.qcow2", "device": 1, "inode": 2, "journal": null }]
        }"#;
        let record: Record = serde_json::from_str(written).unwrap();
        let content = &record.content;
        assert_eq!((content.format, content.snapshot.as_deref()), (image::Format::Qcow2, Some("monday")));
        assert!(record.has(&DeviceKeys { id: Some(3), queues: Some(2), ..DeviceKeys::default() }));
        assert!(!record.has(&DeviceKeys { id: Some(3), queues: Some(1), ..DeviceKeys::default() }));
        let again = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&again).unwrap(), record);
    }
}
