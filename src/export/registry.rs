//! Who is served, to whom, until when.
//!
//! The registry maps names to exports; a reload swaps entries, clients keep the [`Export`] they were given. Images are
//! opened when the first client comes and closed, which unlocks them, when the last one has left. An image is found by
//! device and inode: two exports of one file share one brain and one lock.

use super::config::ExportConfig;
use super::plan::Plan;
use super::write;
use crate::block::{BlockDev, Completion, Errno, Geometry, Op, Request};
use crate::image::{self, Disk, FileId, Gate, Image, OpenOptions, Opener};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::rc::{Rc, Weak as LocalWeak};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;
use thiserror::Error;
use tracing::{error, info, warn};

/// A lock held by somebody else is asked for again this often: `qemu-img` looks at images for moments, and a client
/// that just left may still be letting go.
const LOCK_TRIES: u32 = 10;
/// Pause between two of these tries.
const LOCK_PAUSE: Duration = Duration::from_millis(30);
/// First pause before a flush that found no space is tried again; each further one is twice as long.
const FLUSH_PAUSE: Duration = Duration::from_millis(500);
/// Longest of these pauses.
const FLUSH_PAUSE_MAX: Duration = Duration::from_secs(30);
/// Forgotten images are swept out of the table when it has grown to this many entries, and from then on at its double.
const SWEEP_AT: usize = 64;

/// All exports.
pub struct Registry {
    exports: RwLock<BTreeMap<String, Arc<Export>>>,
    images: Arc<Images>,
}

/// One export as it was configured at some time.
pub struct Export {
    config: ExportConfig,
    images: Arc<Images>,
    clients: Mutex<u32>,
}

/// Why a client does not get an export.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The image cannot be opened.
    #[error("export {name:?}: {source}")]
    Image {
        /// The export.
        name: String,
        /// What is wrong with its image.
        source: image::Error,
    },
    /// All places are taken.
    #[error("export {name:?}: {limit} clients are connected, which is its `maxconnections`; disconnect one first")]
    Full {
        /// The export.
        name: String,
        /// Its limit.
        limit: u32,
    },
}

/// One connection's hold on an export. Belongs to the worker that made it. End it with [`Client::detach`].
#[must_use = "a client that is dropped without `detach` leaves the image unflushed"]
pub struct Client {
    export: Arc<Export>,
    disk: Rc<Disk>,
    writer: Option<Writer>,
    _seat: Seat,
}

/// A place among an export's clients.
struct Seat(Arc<Export>);

/// A counted writer of an image.
struct Writer(Arc<Image>);

/// The open images, by identity.
struct Images {
    gate: Gate,
    table: Mutex<Table>,
    /// Flushes at the leaving of a last writer that failed.
    failed_flushes: AtomicUsize,
}

struct Table {
    /// The inner lock serialises opening one image; it is an async one because opening reads the file.
    slots: HashMap<FileId, Arc<tokio::sync::Mutex<Slot>>>,
    sweep_at: usize,
}

/// What is open of one file: the disk as it is, and internal snapshots of it, which keep that one open.
#[derive(Default)]
struct Slot {
    active: Weak<Image>,
    snapshots: HashMap<String, Weak<Image>>,
}

thread_local! {
    /// This worker's disks, so that its clients of one image share descriptors: (image address, writable).
    static DISKS: RefCell<HashMap<(usize, bool), LocalWeak<Disk>>> = RefCell::default();
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// An empty registry. `image_roots`: see [`Gate::new`].
    pub fn new(image_roots: Option<Vec<PathBuf>>) -> Arc<Registry> {
        let table = Mutex::new(Table { slots: HashMap::new(), sweep_at: SWEEP_AT });
        let gate = Gate::new(image_roots);
        let images = Arc::new(Images { gate, table, failed_flushes: AtomicUsize::new(0) });
        Arc::new(Registry { exports: RwLock::default(), images })
    }

    /// Carries out a plan. Connected clients keep the export they have.
    pub fn apply(&self, plan: &Plan) {
        let mut exports = self.exports.write().unwrap_or_else(PoisonError::into_inner);
        for name in &plan.remove {
            exports.remove(name);
        }
        for config in plan.add.iter().chain(&plan.change) {
            let export = Export { config: config.clone(), images: Arc::clone(&self.images), clients: Mutex::default() };
            exports.insert(config.name.clone(), Arc::new(export));
        }
    }

    /// The export of this name, if it is served now.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// How often the flush for a last writer that left has failed: what that writer was told is written may be lost.
    pub fn failed_flushes(&self) -> usize {
        self.images.failed_flushes.load(Ordering::Relaxed)
    }

    /// The names of all exports, sorted.
    pub fn names(&self) -> Vec<String> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

impl Export {
    /// How it was configured.
    pub fn config(&self) -> &ExportConfig {
        &self.config
    }

    /// Gives the calling worker's connection a hold on the export; opens and locks the image for the first client.
    pub async fn attach(self: &Arc<Self>) -> Result<Client, AttachError> {
        let seat = self.seat()?;
        let mut tries = 0;
        loop {
            match self.open().await {
                Ok((disk, writer)) => return Ok(Client { export: Arc::clone(self), disk, writer, _seat: seat }),
                Err(image::Error::Locked { .. }) if tries < LOCK_TRIES => {
                    tries += 1;
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(source) => {
                    error!("export {:?}: {source}", self.config.name);
                    return Err(AttachError::Image { name: self.config.name.clone(), source });
                }
            }
        }
    }

    /// What a client would get, without taking hold of it: nothing is locked, and what the image names is not opened.
    pub async fn describe(&self) -> Result<Geometry, AttachError> {
        let failed = |source| AttachError::Image { name: self.config.name.clone(), source };
        let (size, corrupt) = match self.images.open_now(&self.config).map_err(failed)? {
            Ok(image) => (image.size(), image.marked_corrupt()),
            Err(opener) => {
                let snapshot = self.config.image.snapshot.as_deref();
                let size = opener.virtual_size(self.config.format, snapshot).await.map_err(failed)?;
                (size, opener.marked_corrupt(self.config.format).await.map_err(failed)?)
            }
        };
        Ok(Disk::geometry_for(size, !self.config.read_only && !corrupt))
    }

    fn seat(self: &Arc<Self>) -> Result<Seat, AttachError> {
        let mut clients = locked(&self.clients);
        match self.config.max_connections {
            Some(limit) if *clients >= limit => Err(AttachError::Full { name: self.config.name.clone(), limit }),
            _ => {
                *clients += 1;
                Ok(Seat(Arc::clone(self)))
            }
        }
    }

    async fn open(&self) -> Result<(Rc<Disk>, Option<Writer>), image::Error> {
        let image = self.images.open(&self.config).await?;
        check_compression(&image, &self.config)?;
        let writer = match self.config.read_only {
            true => None,
            false if image.marked_corrupt() => {
                warn!(
                    "export {:?}: {}: is marked corrupt and served read-only; see `cowgate image check`",
                    self.config.name,
                    image.path().display()
                );
                None
            }
            false => {
                image.begin_writing()?;
                Some(Writer(Arc::clone(&image)))
            }
        };
        match local_disk(&image, writer.is_some()) {
            Ok(disk) => {
                if writer.is_some() {
                    // what fails here fails the first write
                    let _ = disk.mark_bitmaps().await;
                }
                Ok((disk, writer))
            }
            Err(e) => {
                if let Some(writer) = writer {
                    writer.count_out();
                    image.end_writing();
                }
                Err(e)
            }
        }
    }

    /// Carries out a request on a device of this export: the only way in.
    ///
    /// A request with FUA completes when what it wrote is durable.
    pub async fn submit(&self, disk: &impl BlockDev, request: Request) -> Completion {
        let (range, fua) = (request.range(), request.fua());
        let op = request.into_op();
        let durable = fua && op.writes();
        let mut done = Completion { result: Ok(()), buf: None, extents: Vec::new() };
        match op {
            Op::Read(buf) => {
                let (result, buf) = disk.read(range.start(), buf).await;
                (done.result, done.buf) = (result, Some(buf));
            }
            Op::Write(buf) => {
                let (result, buf) = write::write(disk, &self.config.image, range.start(), buf).await;
                (done.result, done.buf) = (result, Some(buf));
            }
            Op::WriteZeroes(flags) => done.result = disk.write_zeroes(range, flags).await,
            Op::Discard => done.result = disk.discard(range).await,
            Op::Flush => done.result = disk.flush().await,
            Op::Extents { .. } if range.is_empty() => done.result = Err(Errno::EINVAL),
            Op::Extents { most } => match disk.extents(range, most).await {
                Ok(extents) => done.extents = extents,
                Err(e) => done.result = Err(e),
            },
            Op::Cache => done.result = disk.cache(range).await,
        }
        if durable && done.result.is_ok() {
            done.result = disk.flush().await;
        }
        done
    }
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

impl Client {
    /// The export.
    pub fn export(&self) -> &Arc<Export> {
        &self.export
    }

    /// The calling worker's hands on its image.
    pub fn disk(&self) -> &Rc<Disk> {
        &self.disk
    }

    /// Ends the hold. The last writer of an image flushes it, data and metadata, and gives the write lock back; the
    /// last client of all closes the image. Call it when no request is in flight any more.
    ///
    /// A flush that finds no space is tried again until there is some: the client was told that its data is written, and
    /// what is still in memory is lost when the image is closed.
    pub async fn detach(mut self) {
        let Some(writer) = self.writer.take() else { return };
        let image = Arc::clone(&writer.0);
        if writer.count_out() > 0 {
            return;
        }
        let path = image.path().display();
        let mut pause = FLUSH_PAUSE;
        loop {
            match self.disk.settle().await {
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
                    self.export.images.failed_flushes.fetch_add(1, Ordering::Relaxed);
                    error!("{path}: the last writer left, and the flush failed: {e}");
                }
            }
            break;
        }
        image.end_writing();
    }
}

impl Writer {
    /// Counts the writer out; returns how many are left.
    fn count_out(self) -> usize {
        let image = Arc::clone(&self.0);
        drop(self);
        image.writers()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.writer_left();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        *locked(&self.0.clients) -= 1;
    }
}

impl Images {
    /// The image of an export if it is open in the same format, else its file.
    fn open_now(&self, config: &ExportConfig) -> Result<Result<Arc<Image>, Opener>, image::Error> {
        let opener = Opener::new(&config.path)?;
        let slot = locked(&self.table).slots.get(&opener.id()).cloned();
        let open = slot.and_then(|slot| slot.try_lock().ok().and_then(|slot| slot.get(&config.image.snapshot)));
        Ok(open.filter(|image| image.format() == config.format).ok_or(opener))
    }

    /// The image of an export, opened if it is not.
    async fn open(&self, config: &ExportConfig) -> Result<Arc<Image>, image::Error> {
        let mut opener = Opener::new(&config.path)?;
        let slot = self.slot(opener.id());
        let mut slot = slot.lock().await;
        if let Some(image) = slot.get(&config.image.snapshot) {
            check_format(&image, config)?;
            return Ok(image);
        }
        let active = match slot.active.upgrade() {
            Some(active) => active,
            None => {
                if !config.read_only && config.image.snapshot.is_none() {
                    opener.repair_if_dirty(config.format).await?;
                }
                let options = OpenOptions { format: config.format, cache_bytes: config.image.cache_bytes };
                let image = Arc::new(opener.open(options, &self.gate).await?);
                slot.active = Arc::downgrade(&image);
                info!("{}: opened, {} bytes, {} layers", image.path().display(), image.size(), image.layers().len());
                image
            }
        };
        check_format(&active, config)?;
        let Some(name) = &config.image.snapshot else { return Ok(active) };
        let image = Arc::new(active.snapshot(name, config.image.cache_bytes).await?);
        slot.snapshots.retain(|_, image| image.strong_count() > 0);
        slot.snapshots.insert(name.clone(), Arc::downgrade(&image));
        info!("{}: snapshot {name:?} opened, {} bytes", image.path().display(), image.size());
        Ok(image)
    }

    fn slot(&self, id: FileId) -> Arc<tokio::sync::Mutex<Slot>> {
        let mut table = locked(&self.table);
        if table.slots.len() >= table.sweep_at {
            // nobody can be opening a slot that only the table holds: it is handed out under this lock
            table.slots.retain(|_, slot| {
                Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|slot| slot.active.strong_count() > 0)
            });
            table.sweep_at = (table.slots.len() * 2).max(SWEEP_AT);
        }
        Arc::clone(table.slots.entry(id).or_default())
    }
}

fn check_format(image: &Image, config: &ExportConfig) -> Result<(), image::Error> {
    match image.format() == config.format {
        true => Ok(()),
        false => {
            let (served, wanted) = (image.format(), config.format);
            Err(image::Error::TwoFormats { path: config.path.clone(), served, wanted })
        }
    }
}

impl Slot {
    fn get(&self, snapshot: &Option<String>) -> Option<Arc<Image>> {
        match snapshot {
            None => self.active.upgrade(),
            Some(name) => self.snapshots.get(name)?.upgrade(),
        }
    }
}

fn local_disk(image: &Arc<Image>, writable: bool) -> Result<Rc<Disk>, image::Error> {
    let key = (Arc::as_ptr(image) as usize, writable);
    DISKS.with_borrow_mut(|disks| {
        // a disk that lives keeps its image alive, so the address cannot belong to another one
        if let Some(disk) = disks.get(&key).and_then(LocalWeak::upgrade) {
            return Ok(disk);
        }
        disks.retain(|_, disk| disk.strong_count() > 0);
        let disk = Disk::open(Arc::clone(image), writable)?;
        disks.insert(key, Rc::downgrade(&disk));
        Ok(disk)
    })
}
