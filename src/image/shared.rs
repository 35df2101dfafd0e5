//! What all threads share of one image.

use super::flush::FlushState;
use super::lock::{self, Refused};
use super::{Error, Format};
use crate::qcow2::compress::Compression;
use crate::qcow2::{Corrupt, Metadata};
use crate::ring;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
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
    pub(super) layers: Vec<Layer>,
    pub(super) id: FileId,
    writers: Mutex<Writers>,
    pub(super) flush: Mutex<FlushState>,
    /// Rung whenever something happened that a `Wait` may have waited for.
    pub(super) progress: Notify,
    /// Why nobody may write: dirty or corrupt as found.
    pub(super) not_writable: Option<&'static str>,
}

/// Connected writers, and whether the file's write lock is held: until the last of them was flushed.
#[derive(Default)]
struct Writers {
    count: usize,
    locked: bool,
}

/// One file of a chain.
pub struct Layer {
    pub(super) path: PathBuf,
    pub(super) storage: Storage,
    /// Virtual size in bytes.
    pub(super) size: u64,
    pub(super) content: Content,
}

/// Where a layer's bytes are kept.
pub(super) enum Storage {
    /// A file or block device; this descriptor holds the lock, threads open their own.
    File { file: File, block_device: bool },
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

    pub(super) fn metadata(&self) -> Option<MutexGuard<'_, Metadata>> {
        match &self.content {
            Content::Raw => None,
            Content::Qcow2 { metadata, .. } => Some(unpoisoned(metadata)),
        }
    }

    /// A new descriptor of the layer's file for the calling thread.
    pub(super) fn open_file(&self, write: bool) -> Result<ring::File, Error> {
        match &self.storage {
            Storage::Memory(disk) => Ok(ring::File::memory(disk)),
            Storage::File { file, .. } => {
                // through /proc: the same inode, even when the path names another file by now
                let same = format!("/proc/self/fd/{}", file.as_raw_fd());
                let opened = File::options().read(true).write(write).open(same);
                Ok(ring::File::from_std(opened.map_err(Error::io(&self.path, "open it once more"))?))
            }
        }
    }
}

/// A panic elsewhere does not make metadata wrong: every change to it is complete before anything can panic.
pub(super) fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Image {
    pub(super) fn new(layers: Vec<Layer>, id: FileId, not_writable: Option<&'static str>) -> Image {
        Image { layers, id, writers: Mutex::default(), flush: Mutex::default(), progress: Notify::new(), not_writable }
    }

    /// Device and inode of the exported file.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The chain, the exported layer first.
    pub fn layers(&self) -> &[Layer] {
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

    /// Counts a writer in; the first takes the write lock. Each success is paired with [`Image::writer_left`].
    pub fn begin_writing(&self) -> Result<(), Error> {
        if let Some(why) = self.not_writable {
            return Err(Error::NotWritable { path: self.path().to_owned(), why });
        }
        let mut writers = unpoisoned(&self.writers);
        if !writers.locked
            && let Storage::File { file, .. } = &self.layers[0].storage
        {
            lock::add_write(file).map_err(|refused| locked(self.path(), refused))?;
            writers.locked = true;
        }
        writers.count += 1;
        Ok(())
    }

    /// Counts a writer out. The last one flushes the image and then calls [`Image::end_writing`].
    pub fn writer_left(&self) {
        unpoisoned(&self.writers).count -= 1;
    }

    /// Gives the write lock back, unless a writer has come again.
    pub fn end_writing(&self) {
        let mut writers = unpoisoned(&self.writers);
        if writers.count == 0
            && std::mem::take(&mut writers.locked)
            && let Storage::File { file, .. } = &self.layers[0].storage
            && let Err(e) = lock::drop_write(file)
        {
            warn!("{}: the write lock stays until the image is closed: {e}", self.path().display());
        }
    }

    /// Number of connected writers.
    pub fn writers(&self) -> usize {
        unpoisoned(&self.writers).count
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
             `qemu-img check`",
            self.layers[layer].path.display()
        );
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // the files' locks end with their descriptors
        info!("{}: closed", self.path().display());
    }
}

pub(super) fn locked(path: &Path, refused: Refused) -> Error {
    match refused {
        Refused::Conflict(lock) => Error::Locked {
            path: path.to_owned(),
            lock,
            remedy: "stop that program, or serve the export with `readonly = true` if it only reads",
        },
        Refused::Io(source) => Error::Io { path: path.to_owned(), action: "lock it", source },
    }
}
