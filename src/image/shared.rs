//! What all threads share of one image.

use super::bitmaps::Bitmaps;
use super::claim;
use super::flush::FlushState;
use super::lock::{self, Refused};
use super::open::Parsed;
use super::{Error, Format};
use crate::qcow2::compress::Compression;
use crate::qcow2::{Corrupt, Metadata};
use crate::ring::{self, Exclusive};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;
use tracing::{error, info, warn};

/// Device and inode: the identity of an image file, whatever path leads to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct FileId {
    /// Device that holds the file, or the block device itself.
    pub device: u64,
    /// Inode number; 0 for a block device.
    pub inode: u64,
}

/// An open image: its chain of layers, the exported one first.
///
/// Lock order: `writers`, then a layer's metadata, then `flush`; none is held across an await.
pub struct Image {
    pub(super) layers: Vec<Arc<Layer>>,
    pub(super) id: FileId,
    /// The image that this one is an internal snapshot of: its lock covers both.
    parent: Option<Arc<Image>>,
    /// The image that this one is a temporary layer over.
    base: Option<Still>,
    writers: Mutex<Writers>,
    pub(super) flush: Mutex<FlushState>,
    /// Rung whenever something happened that a `Wait` may have waited for.
    pub(super) progress: Notify,
    /// Why nobody may write: dirty or corrupt as found.
    pub(super) not_writable: Option<&'static str>,
    /// Whether its devices have been looked at for [`Image::warn_of_claims`].
    looked_for_claims: AtomicBool,
}

/// Connected writers, and whether the file's write lock is held: until the last of them was flushed.
#[derive(Default)]
struct Writers {
    count: usize,
    locked: bool,
    /// Writers that were the last and have not called `end_writing` yet.
    ending: usize,
    /// Temporary layers over the image: nobody writes it meanwhile.
    still: usize,
}

/// Nobody writes the image while this exists.
#[must_use = "dropping it lets writers in again"]
pub(super) struct Still(Arc<Image>);

impl Drop for Still {
    fn drop(&mut self) {
        unpoisoned(&self.0.writers).still -= 1;
    }
}

/// One file of a chain.
pub struct Layer {
    pub(super) path: PathBuf,
    pub(super) storage: Storage,
    /// Virtual size in bytes.
    pub(super) size: u64,
    pub(super) content: Content,
    /// Where its guest data is, when that is not the image file.
    pub(super) data: Option<DataFile>,
    /// Its bitmaps, when it is the exported layer and has some that can be kept.
    pub(super) bitmaps: Option<Bitmaps>,
    /// What its image header says; `None` for a raw layer.
    pub(super) parsed: Option<Parsed>,
}

/// The external data file of a layer.
pub(super) struct DataFile {
    pub path: PathBuf,
    pub storage: Storage,
    /// It is a raw image of the disk by itself and has to stay one: zeroes are written to it, not only noted.
    pub raw: bool,
}

/// Where a layer's bytes are kept.
pub(super) enum Storage {
    /// A file or block device; this descriptor holds the lock, threads open their own.
    File {
        file: File,
        /// For a block device: what has it for us alone while the image has writers.
        device: Option<Arc<Exclusive>>,
    },
    /// The test double.
    Memory(ring::mem::MemDisk),
}

/// What a layer's bytes mean.
pub(super) enum Content {
    Raw,
    Qcow2 { metadata: Box<Mutex<Metadata>>, compression: Compression },
}

impl Layer {
    /// The layer's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self.content {
            Content::Raw => Format::Raw,
            Content::Qcow2 { .. } => Format::Qcow2,
        }
    }

    /// Size in bytes of the disk that this layer and those below it make.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Storage in bytes that its files occupy, now.
    pub fn allocated_bytes(&self) -> std::io::Result<u64> {
        let data = self.data.as_ref().map(|data| &data.storage);
        std::iter::once(&self.storage).chain(data).map(Storage::allocated_bytes).sum()
    }

    pub(super) fn metadata(&self) -> Option<MutexGuard<'_, Metadata>> {
        match &self.content {
            Content::Raw => None,
            Content::Qcow2 { metadata, .. } => Some(unpoisoned(metadata)),
        }
    }

    /// A new descriptor of the layer's file for the calling thread.
    pub(super) fn open_file(&self, write: bool) -> Result<ring::File, Error> {
        self.storage.open(write).map_err(Error::io(&self.path, "open it once more"))
    }

    /// A new descriptor of the layer's external data file, if it has one.
    pub(super) fn open_data_file(&self, write: bool) -> Result<Option<ring::File>, Error> {
        let open = |data: &DataFile| data.storage.open(write).map_err(Error::io(&data.path, "open it once more"));
        self.data.as_ref().map(open).transpose()
    }

    /// Length of the layer's file in bytes, now.
    pub(super) fn file_len(&self) -> std::io::Result<u64> {
        self.storage.len()
    }

    /// Where the layer's guest data is.
    pub(super) fn data_storage(&self) -> &Storage {
        self.data.as_ref().map_or(&self.storage, |data| &data.storage)
    }

    /// Its files, and what claims them if they are block devices. The locks of the exported layer's cover what a writer changes.
    fn lockable(&self) -> impl Iterator<Item = (&Path, &File, Option<&Exclusive>)> {
        let data = self.data.as_ref().map(|data| (data.path.as_path(), &data.storage));
        let all = std::iter::once((self.path.as_path(), &self.storage)).chain(data);
        all.filter_map(|(path, storage)| match storage {
            Storage::File { file, device } => Some((path, file, device.as_deref())),
            Storage::Memory(_) => None,
        })
    }
}

impl Storage {
    pub(super) fn new(file: File, block_device: bool) -> Storage {
        Storage::File { file, device: block_device.then(Arc::default) }
    }

    /// A new descriptor for the calling thread.
    fn open(&self, write: bool) -> std::io::Result<ring::File> {
        match self {
            Storage::Memory(disk) => Ok(ring::File::memory(disk)),
            Storage::File { file, device } => {
                // through /proc: the same inode, even when the path names another file by now
                let same = format!("/proc/self/fd/{}", file.as_raw_fd());
                let file = File::options().read(true).write(write).open(same)?;
                Ok(match device {
                    Some(device) if write => ring::File::of_device(file, Arc::clone(device)),
                    _ => ring::File::from_std(file),
                })
            }
        }
    }

    /// Device and inode; `None` for the test double.
    pub(super) fn id(&self) -> std::io::Result<Option<FileId>> {
        let Storage::File { file, device } = self else { return Ok(None) };
        let meta = file.metadata()?;
        Ok(Some(match device.is_some() {
            true => FileId { device: meta.rdev(), inode: 0 },
            false => FileId { device: meta.dev(), inode: meta.ino() },
        }))
    }

    /// Makes a regular file longer or shorter, durably.
    pub(super) fn set_len(&self, len: u64) -> std::io::Result<()> {
        match self {
            Storage::Memory(_) => Err(std::io::ErrorKind::Unsupported.into()),
            Storage::File { file, .. } => {
                let file = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
                file.set_len(len)?;
                file.sync_all()
            }
        }
    }

    /// Length in bytes, now.
    pub(super) fn len(&self) -> std::io::Result<u64> {
        match self {
            Storage::Memory(disk) => Ok(disk.len()),
            Storage::File { file, .. } => (&*file).seek(SeekFrom::End(0)),
        }
    }

    fn allocated_bytes(&self) -> std::io::Result<u64> {
        match self {
            Storage::Memory(disk) => Ok(disk.len()),
            Storage::File { file, .. } => Ok(file.metadata()?.blocks() * 512),
        }
    }

    /// The same open file, and with it the same lock, once more.
    pub(super) fn again(&self) -> std::io::Result<Storage> {
        Ok(match self {
            Storage::Memory(disk) => Storage::Memory(disk.clone()),
            Storage::File { file, device } => Storage::File { file: file.try_clone()?, device: device.clone() },
        })
    }
}

/// A panic elsewhere does not make metadata wrong: every change to it is complete before anything can panic.
pub(super) fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Image {
    pub(super) fn new(layers: Vec<Arc<Layer>>, id: FileId, not_writable: Option<&'static str>) -> Image {
        Image {
            layers,
            id,
            parent: None,
            base: None,
            writers: Mutex::default(),
            flush: Mutex::default(),
            progress: Notify::new(),
            not_writable,
            looked_for_claims: AtomicBool::new(false),
        }
    }

    /// An internal snapshot of `parent` as an image of its own, which is only read: `top` is the snapshot, what lies
    /// below is the parent's.
    pub(super) fn snapshot_of(parent: &Arc<Image>, top: Layer) -> Image {
        let mut layers = vec![Arc::new(top)];
        layers.extend(parent.layers[1..].iter().cloned());
        let mut image =
            Image::new(layers, parent.id, Some("it is an internal snapshot; export it with `readonly = true`"));
        image.parent = Some(Arc::clone(parent));
        image
    }

    /// A temporary image that begins as `base`: what is written goes to `top`, and is gone when the image is closed.
    pub(super) fn over(base: Still, top: Layer) -> Image {
        let mut layers = vec![Arc::new(top)];
        layers.extend(base.0.layers.iter().cloned());
        let mut image = Image::new(layers, base.0.id, None);
        image.base = Some(base);
        image
    }

    /// Keeps writers away: what a temporary layer over the image does not hold is read from it.
    pub(super) fn hold_still(self: &Arc<Image>) -> Result<Still, Error> {
        let mut writers = unpoisoned(&self.writers);
        if writers.locked {
            let why = "clients of another export are writing it, and a `copyonwrite` export of it needs it to stay as it \
                       is; connect again when they have left";
            return Err(Error::Busy { path: self.path().to_owned(), why });
        }
        writers.still += 1;
        drop(writers);
        Ok(Still(Arc::clone(self)))
    }

    /// Whether nothing of what is written to it is to be found again.
    pub(super) fn ephemeral(&self) -> bool {
        self.base.is_some()
    }

    /// The image that it is a temporary layer over.
    pub(super) fn below_temporary(&self) -> Option<&Arc<Image>> {
        self.base.as_ref().map(|still| &still.0)
    }

    /// Device and inode of the exported file.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The chain, the exported layer first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// The exported layer's path.
    pub fn path(&self) -> &Path {
        &self.layers[0].path
    }

    /// The exported layer's format.
    pub fn format(&self) -> Format {
        self.layers[0].format()
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.layers[0].size
    }

    /// How the exported layer's compressed clusters are packed; `None` for a raw image and for one that can hold none.
    pub fn compression(&self) -> Option<Compression> {
        match &self.layers[0].content {
            Content::Qcow2 { compression, .. } if self.layers[0].data.is_none() => Some(*compression),
            _ => None,
        }
    }

    /// Whether the image is marked corrupt: it is served, and never written.
    pub fn marked_corrupt(&self) -> bool {
        self.layers[0].parsed.as_ref().is_some_and(|parsed| parsed.header.corrupt)
    }

    /// Counts a writer in; the first takes the write lock, and has block devices for the image alone. Each success is
    /// paired with [`Image::writer_left`].
    pub fn begin_writing(&self) -> Result<(), Error> {
        if let Some(why) = self.not_writable {
            return Err(Error::NotWritable { path: self.path().to_owned(), why });
        }
        let mut writers = unpoisoned(&self.writers);
        if writers.still > 0 {
            let why = "clients of a `copyonwrite` export read it and need it to stay as it is; it can be written when \
                       they have left";
            return Err(Error::Busy { path: self.path().to_owned(), why });
        }
        if !writers.locked {
            if let Err(e) = self.take_write_locks() {
                self.drop_write_locks();
                return Err(e);
            }
            writers.locked = true;
        }
        writers.count += 1;
        Ok(())
    }

    /// Counts a writer out. `true`: it was the last one; it flushes the image and then calls [`Image::end_writing`].
    pub fn writer_left(&self) -> bool {
        let mut writers = unpoisoned(&self.writers);
        writers.count -= 1;
        let last = writers.count == 0;
        writers.ending += usize::from(last);
        last
    }

    /// What a last writer wrote is flushed: gives the write lock back, unless a writer has come again or another one
    /// that was the last still flushes.
    pub fn end_writing(&self) {
        let mut writers = unpoisoned(&self.writers);
        writers.ending -= 1;
        if writers.count == 0 && writers.ending == 0 && std::mem::take(&mut writers.locked) {
            self.drop_write_locks();
        }
    }

    fn take_write_locks(&self) -> Result<(), Error> {
        for (path, file, device) in self.layers[0].lockable() {
            lock::add_write(file).map_err(|refused| locked(path, refused))?;
            if let Some(device) = device {
                device.hold(claim::claim(path, file)?);
            }
        }
        Ok(())
    }

    fn drop_write_locks(&self) {
        for (path, file, device) in self.layers[0].lockable() {
            if let Some(device) = device {
                device.release();
            }
            if let Err(e) = lock::drop_write(file) {
                warn!("{}: the write lock stays until the image is closed: {e}", path.display());
            }
        }
    }

    /// Warns, once, of devices that are mounted or claimed in another way while they are only read: what is read of
    /// them may change under the reader. Call it when the first client has got the image.
    pub fn warn_of_claims(&self) {
        if self.looked_for_claims.swap(true, Ordering::Relaxed) {
            return;
        }
        // held until the end: a writer that comes meanwhile must not find the device claimed by this very look
        let writers = unpoisoned(&self.parent.as_ref().map_or(self, |parent| parent).writers);
        for (index, layer) in self.layers.iter().enumerate() {
            if index == 0 && writers.locked {
                continue; // claimed by us
            }
            for (path, file, _) in layer.lockable().filter(|(_, _, device)| device.is_some()) {
                if let Some(by) = claim::claimed_by(file) {
                    warn!("{}: {by}; what is read of it may be outdated or inconsistent", path.display());
                }
            }
        }
    }

    /// Whether the file's write lock is held: while there are writers, and until the last one's data is flushed.
    pub fn locked_for_writing(&self) -> bool {
        unpoisoned(&self.writers).locked
    }

    /// Ends writing to the image because a layer is corrupt; the first report is logged.
    pub(super) fn break_off(&self, layer: usize, corrupt: Corrupt) {
        let first = self.layers[layer].metadata().is_some_and(|mut md| md.break_off(corrupt.clone()));
        if first {
            self.log_corrupt(layer, &corrupt);
        }
    }

    pub(super) fn log_corrupt(&self, layer: usize, corrupt: &Corrupt) {
        error!(
            "{}: {corrupt}; requests that need it fail, the image is not written any more; examine it with \
             `cowgate image check`",
            self.layers[layer].path.display()
        );
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.ephemeral() {
            return; // one for each client: nobody asks when
        }
        // the files' locks end with their descriptors
        info!("{}: closed", self.path().display());
    }
}

pub(super) fn locked(path: &Path, refused: Refused) -> Error {
    match refused {
        Refused::Conflict { lock, conflict } => Error::Locked {
            path: path.to_owned(),
            lock,
            conflict: Box::new(conflict),
            holders: Box::default(),
            remedy: "stop that program, or serve the export with `readonly = true` if it only reads",
        },
        Refused::Io(source) => Error::Io { path: path.to_owned(), action: "lock it", source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::mem::MemDisk;

    #[test]
    fn a_writer_that_fails_does_not_unlock_what_another_one_still_flushes() {
        let image = ring::run(Image::in_memory(&[(MemDisk::new(vec![0; 4096], 0), Format::Raw)])).unwrap().unwrap();
        let locked = || unpoisoned(&image.writers).locked;
        image.begin_writing().unwrap();
        assert!(image.writer_left(), "it begins to flush");
        image.begin_writing().unwrap();
        assert!(image.writer_left(), "it could not open its disk");
        image.end_writing();
        assert!(locked());
        image.end_writing();
        assert!(!locked());
        // a writer that stays keeps the lock
        image.begin_writing().unwrap();
        assert!(image.writer_left());
        image.begin_writing().unwrap();
        image.end_writing();
        assert!(locked());
    }
}
