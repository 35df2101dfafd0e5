//! What one client of an export reads and writes: its images opened, covered by a layer of its own or joined, as the
//! export's keys ask; and given back, flushed, when it has left. Called by [`super::service`] on the client's worker.

use super::config::ExportConfig;
use super::images::{Images, local_disk};
use super::service::AttachError;
use crate::block::{Errno, Geometry, NamedContext};
use crate::image::create::create_raw;
use crate::image::device::{exported_size, parts_of, total};
use crate::image::{self, Device, Disk, Format, Image, contexts, scratch};
use crate::units::ByteRange;
use futures_util::future::join_all;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tracing::{error, info};

/// First pause before a flush that found no space is tried again; each further one is twice as long.
const FLUSH_PAUSE: Duration = Duration::from_millis(500);
/// Longest of these pauses.
const FLUSH_PAUSE_MAX: Duration = Duration::from_secs(30);

/// One client's device, with the images it writes.
pub(super) struct Storage {
    device: Rc<Device>,
    writers: Vec<Writer>,
    /// The images of the configuration, in order; not the layers over them.
    images: Vec<Arc<Image>>,
}

/// A counted writer of an image.
struct Writer {
    image: Arc<Image>,
    /// This worker's hands on it, to flush it with.
    disk: Rc<Disk>,
    counted: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.count_out();
    }
}

impl Storage {
    /// Opens what the export serves. `may_write` is asked for each image that would be written.
    pub(super) async fn open(
        images: &Images,
        config: &ExportConfig,
        may_write: impl Fn(&Image) -> Result<bool, AttachError>,
    ) -> Result<Storage, AttachError> {
        let failed = |source| AttachError::image(config, source);
        let mut storage = Parts::default();
        for path in paths(config).map_err(failed)? {
            let image = images.open(&path, config).await.map_err(failed)?;
            if let Err(refused) = storage.add(image, config, &may_write).await {
                storage.give_up();
                return Err(refused);
            }
        }
        let device = Device::new(&config.path, std::mem::take(&mut storage.disks), config.client.file_size);
        let device = device.and_then(|device| match window(config) {
            Some(window) => device.window(&config.path, window),
            None => Ok(device),
        });
        match device {
            Ok(device) => {
                for writer in &storage.writers {
                    // what fails here fails the first write
                    let _ = writer.disk.mark_bitmaps().await;
                }
                Ok(Storage { device: Rc::new(device), writers: storage.writers, images: storage.images })
            }
            Err(e) => {
                storage.give_up();
                Err(failed(e))
            }
        }
    }

    /// What [`Storage::open`] would make, without taking hold of it: nothing is locked or made.
    pub(super) async fn describe(images: &Images, config: &ExportConfig) -> Result<Geometry, image::Error> {
        let keys = &config.client;
        let mut sizes = Vec::new();
        let mut corrupt = false;
        match keys.file_size {
            Some(size) if makes_file(config) && !exists(config) => sizes.push(size),
            _ => {
                for path in existing_paths(config)? {
                    let (size, marked) = images.describe(&path, config).await?;
                    sizes.push(size);
                    corrupt |= marked;
                }
            }
        }
        let size = exported_size(&config.path, total(sizes), keys.file_size)?;
        let size = window(config).map_or(size, |window| window.len());
        let writable = !config.read_only && (!corrupt || keys.copy_on_write.is_some());
        Ok(Disk::geometry_for(size, writable))
    }

    /// The contexts that device would offer, found in the same way.
    pub(super) async fn contexts(images: &Images, config: &ExportConfig) -> Result<Vec<NamedContext>, image::Error> {
        if makes_file(config) && !exists(config) {
            return Ok(contexts::of_parts());
        }
        match &existing_paths(config)?[..] {
            [path] => images.contexts(path, config).await,
            _ => Ok(contexts::of_parts()),
        }
    }

    /// What the client reads and writes.
    pub(super) fn device(&self) -> &Rc<Device> {
        &self.device
    }

    /// The images of the configuration, in order.
    pub(super) fn images(&self) -> &[Arc<Image>] {
        &self.images
    }

    /// Gives it back. The last writer of an image flushes it, data and metadata, and gives the write lock back.
    ///
    /// A flush that finds no space is tried again until there is some: the client was told that its data is written, and
    /// what is still in memory is lost when the image is closed. `failed` counts flushes that fail otherwise.
    pub(super) async fn close(self, failed: &AtomicUsize) {
        join_all(self.writers.into_iter().map(|writer| writer.leave(failed))).await;
    }
}

/// Storage in the making.
#[derive(Default)]
struct Parts {
    disks: Vec<Rc<Disk>>,
    writers: Vec<Writer>,
    images: Vec<Arc<Image>>,
}

impl Parts {
    async fn add(
        &mut self,
        image: Arc<Image>,
        config: &ExportConfig,
        may_write: impl Fn(&Image) -> Result<bool, AttachError>,
    ) -> Result<(), AttachError> {
        let failed = |source| AttachError::image(config, source);
        let disk = match &config.client.copy_on_write {
            Some(cow) => {
                let options = scratch::Options {
                    directory: cow.directory.as_deref(),
                    compression: config.image.compress,
                    cache_bytes: config.image.cache_bytes,
                };
                let layer = scratch::over(&image, options).await.map_err(failed)?;
                // the client's own: no other on this worker shares it
                Disk::open(Arc::new(layer), true).map_err(failed)?
            }
            None => {
                check_compression(&image, config).map_err(failed)?;
                let writable = !config.read_only && may_write(&image)?;
                if writable {
                    image.begin_writing().map_err(failed)?;
                }
                match local_disk(&image, writable) {
                    Ok(disk) => {
                        if writable {
                            self.writers.push(Writer {
                                image: Arc::clone(&image),
                                disk: Rc::clone(&disk),
                                counted: true,
                            });
                        }
                        disk
                    }
                    Err(e) => {
                        if writable && image.writer_left() {
                            image.end_writing();
                        }
                        return Err(failed(e));
                    }
                }
            }
        };
        image.warn_of_claims();
        self.disks.push(disk);
        self.images.push(image);
        Ok(())
    }

    /// Nothing was written: there is nothing to flush.
    fn give_up(&mut self) {
        for mut writer in self.writers.drain(..) {
            if writer.count_out() {
                writer.image.end_writing();
            }
        }
    }
}

impl Writer {
    /// Whether it was the last one, which is to be followed by `end_writing`.
    fn count_out(&mut self) -> bool {
        std::mem::take(&mut self.counted) && self.image.writer_left()
    }

    async fn leave(mut self, failed: &AtomicUsize) {
        if !self.count_out() {
            return;
        }
        let (image, disk) = (&self.image, &self.disk);
        let path = image.path().display();
        let mut pause = FLUSH_PAUSE;
        loop {
            match disk.settle().await {
                Ok(()) => info!("{path}: the last writer left, flushed"),
                Err(Errno::ENOSPC | Errno::EDQUOT) => {
                    if pause == FLUSH_PAUSE {
                        error!(
                            "{path}: the last writer left, and there is no space for the flush; free some: it is tried \
                             again until it succeeds"
                        );
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(FLUSH_PAUSE_MAX);
                    continue;
                }
                Err(e) => {
                    failed.fetch_add(1, Ordering::Relaxed);
                    error!("{path}: the last writer left, and the flush failed: {e}");
                }
            }
            break;
        }
        image.end_writing();
    }
}

/// The part of the storage that is exported, if it is not all.
fn window(config: &ExportConfig) -> Option<ByteRange> {
    config.client.untrusted.as_ref()?.window
}

/// Whether a file that does not exist is made.
fn makes_file(config: &ExportConfig) -> bool {
    let keys = &config.client;
    let is_asked_for =
        keys.file_size.is_some() && config.format == Format::Raw && !keys.multi_file && !config.read_only;
    // a backup that has vanished is none of zeroes
    is_asked_for && keys.untrusted.is_none()
}

fn exists(config: &ExportConfig) -> bool {
    config.path.symlink_metadata().is_ok()
}

/// The files that are joined, or the one there is.
pub(super) fn existing_paths(config: &ExportConfig) -> Result<Vec<PathBuf>, image::Error> {
    match config.client.multi_file {
        true => parts_of(&config.path),
        false => Ok(vec![config.path.clone()]),
    }
}

/// The same; one that does not exist is made, if the keys ask for that.
fn paths(config: &ExportConfig) -> Result<Vec<PathBuf>, image::Error> {
    if let (Some(size), true) = (config.client.file_size, makes_file(config)) {
        create_raw(&config.path, size)?;
    }
    existing_paths(config)
}

/// All compressed clusters of an image are packed in one way: the export cannot choose another.
fn check_compression(image: &Image, config: &ExportConfig) -> Result<(), image::Error> {
    match (config.image.compress, image.compression()) {
        (Some(wanted), can) if can != Some(wanted) => {
            Err(image::Error::Compression { path: config.path.clone(), wanted, can })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::client_keys::Untrusted;
    use crate::export::config::Source;
    use std::path::Path;

    #[test]
    fn a_disk_of_somebody_else_is_never_made() {
        let mut config = ExportConfig::new("x", Path::new("/x.raw"), Source { file: "config".into(), line: 1 });
        config.client.file_size = Some(4096);
        assert!(makes_file(&config));
        config.client.untrusted = Some(Untrusted::default());
        assert!(!makes_file(&config));
    }
}
