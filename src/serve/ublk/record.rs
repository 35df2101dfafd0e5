//! What a daemon leaves behind of its devices, so that the next one goes on with them: for each device a record of what it
//! is, and a journal for each image that it writes (see [`crate::image::recovery`]).
//!
//! All of it is in [`DIRECTORY`], which only root may look into. It is to be on a tmpfs, as /run is: what is in there means
//! something only as long as the machine runs, and so long it survives every end of the daemon.

use crate::image::{self, Device, FileId, Image, recovery};
use crate::qcow2::journal::{self, Patched};
use crate::ring::{self, lasting};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use tracing::warn;

/// Where records and journals are.
const DIRECTORY: &str = "/run/cowgate/devices";
/// Bytes of a journal: what some ten thousand writes to new clusters change.
const JOURNAL_BYTES: u64 = 1 << 20;
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
    /// Its images.
    pub images: Vec<Held>,
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
    /// Writes it down, for whoever comes after this process.
    pub(super) fn write(&self, id: u32) -> io::Result<()> {
        directory()?;
        let fresh = file(id).with_extension("new");
        let mut open = OpenOptions::new();
        let open = open.write(true).create(true).truncate(true).mode(0o600);
        serde_json::to_writer(open.open(&fresh)?, self)?;
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
        let done = thread.unwrap_or_else(|_| Err(io::Error::other("it panicked"))).map_err(failed)?;
        done.inspect(|()| self.forget_journals())
    }

    async fn recover(&self) -> Result<(), image::Error> {
        for held in &self.images {
            let id = FileId { device: held.device, inode: held.inode };
            recovery::recover(&held.path, id, held.noted()?).await?;
        }
        Ok(())
    }

    fn forget_journals(&self) {
        let in_use: Vec<PathBuf> = there_are().iter().filter_map(Weak::upgrade).map(|j| j.path.clone()).collect();
        for journal in self.images.iter().filter_map(|held| held.journal.as_ref()) {
            if !in_use.contains(journal) {
                let _ = fs::remove_file(journal); // it may never have been made
            }
        }
    }
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
    if let Some(record) = Record::read(id) {
        record.forget_journals();
    }
    let _ = fs::remove_file(file(id)); // there may be none
}

/// Forgets all devices that are not among these.
pub(super) fn forget_all_but(ids: &[u32]) {
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse::<u32>().ok());
        if let Some(id) = id.filter(|id| !ids.contains(id)) {
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

/// Has all changes of a device's images noted down from now on.
///
/// Runs on a thread of a ring. Errors: they cannot be.
pub(super) async fn keep(device: &Device) -> io::Result<Kept> {
    let mut kept = Kept::default();
    for disk in device.disks() {
        let image = disk.image();
        let journal = match disk.writable() && image.format() == image::Format::Qcow2 {
            true => Some(Journal::keep(disk).await?),
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

/// Those there are: two devices may write one image.
static JOURNALS: Mutex<Vec<Weak<Journal>>> = Mutex::new(Vec::new());

fn there_are() -> MutexGuard<'static, Vec<Weak<Journal>>> {
    JOURNALS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    async fn keep(disk: &image::Disk) -> io::Result<Arc<Journal>> {
        let image = disk.image();
        let same = |journal: &Arc<Journal>| Arc::ptr_eq(&journal.image, image);
        let journal = {
            let mut journals = there_are();
            journals.retain(|journal| journal.strong_count() > 0);
            if let Some(there) = journals.iter().filter_map(Weak::upgrade).find(same) {
                return Ok(there);
            }
            let id = image.id();
            let path = directory()?.join(format!("{:x}-{:x}.journal", id.device, id.inode));
            let journal = Arc::new(Journal { image: Arc::clone(image), path });
            journals.push(Arc::downgrade(&journal));
            journal
        };
        let mut open = OpenOptions::new();
        let file = open.read(true).write(true).create(true).truncate(false).mode(0o600).open(&journal.path)?;
        let memory = lasting::map(&file, JOURNAL_BYTES)?;
        disk.keep_journal(Box::new(memory)).await.map_err(io::Error::from)?;
        Ok(journal)
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.image.drop_journal();
        let _ = fs::remove_file(&self.path); // it may not have come to be made
    }
}

fn directory() -> io::Result<&'static Path> {
    DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    Ok(Path::new(DIRECTORY))
}

fn file(id: u32) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{id}.json"))
}

/// Says why a device will not outlive the daemon.
pub(super) fn warn_of(export: &str, why: &io::Error) {
    warn!("export {export:?}: its device ends with this process, as {DIRECTORY} cannot be written: {why}");
}
