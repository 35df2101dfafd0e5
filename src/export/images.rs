//! The open images. An image is found by device and inode: two exports of one file share one brain and one lock.
//!
//! Images are opened when the first client of an export comes; nothing here keeps them open, so they are closed, which
//! unlocks them, when the last client has left.

use super::config::ExportConfig;
use super::locked;
use crate::block::NamedContext;
use crate::image::{self, Disk, FileId, Gate, Image, OpenOptions, Opener};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::rc::{Rc, Weak as LocalWeak};
use std::sync::{Arc, Mutex, Weak};
use tracing::info;

/// Forgotten images are swept out of the table when it has grown to this many entries, and from then on at its double.
const SWEEP_AT: usize = 64;

/// The open images, by identity.
pub(super) struct Images {
    gate: Gate,
    table: Mutex<Table>,
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

impl Images {
    pub(super) fn new(gate: Gate) -> Images {
        Images { gate, table: Mutex::new(Table { slots: HashMap::new(), sweep_at: SWEEP_AT }) }
    }

    /// What images may name.
    pub(super) fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The size in bytes of the disk in a file of an export, and whether it is marked corrupt. Nothing is locked.
    pub(super) async fn describe(&self, path: &Path, config: &ExportConfig) -> Result<(u64, bool), image::Error> {
        let opener = Opener::new(path)?;
        match self.open_already(&opener, config) {
            Some(image) => Ok((image.size(), image.marked_corrupt())),
            None => {
                let size = opener.virtual_size(config.format, config.image.snapshot.as_deref()).await?;
                Ok((size, opener.marked_corrupt(config.format).await?))
            }
        }
    }

    /// The contexts that the disk in a file of an export offers. Nothing is locked.
    pub(super) async fn contexts(&self, path: &Path, config: &ExportConfig) -> Result<Vec<NamedContext>, image::Error> {
        let opener = Opener::new(path)?;
        match self.open_already(&opener, config) {
            Some(image) => Ok(image.contexts().await),
            None => opener.contexts(config.format, config.image.snapshot.is_some()).await,
        }
    }

    /// The image in a file of an export, if a client has it open.
    fn open_already(&self, opener: &Opener, config: &ExportConfig) -> Option<Arc<Image>> {
        let slot = locked(&self.table).slots.get(&opener.id()).cloned()?;
        let open = slot.try_lock().ok()?.get(&config.image.snapshot)?;
        (open.format() == config.format).then_some(open)
    }

    /// The image in a file of an export, opened if it is not.
    pub(super) async fn open(&self, path: &Path, config: &ExportConfig) -> Result<Arc<Image>, image::Error> {
        let mut opener = Opener::new(path)?;
        let slot = self.slot(opener.id());
        let mut slot = slot.lock().await;
        if let Some(image) = slot.get(&config.image.snapshot) {
            check_format(&image, config)?;
            return Ok(image);
        }
        let active = match slot.active.upgrade() {
            Some(active) => active,
            None => {
                if config.writes_image() {
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

/// The calling worker's hands on an image.
pub(super) fn local_disk(image: &Arc<Image>, writable: bool) -> Result<Rc<Disk>, image::Error> {
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
