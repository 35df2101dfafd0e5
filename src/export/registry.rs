//! Which exports there are: those of the configuration by name, and former ones that still have clients.
//!
//! A reload swaps entries and counts generations; clients keep the [`Export`] they were given, and only its limits
//! change under them. The daemon applies the plans; frontends and whoever describes the daemon look things up.

use super::config::{ExportConfig, Source};
use super::device_keys::DeviceKeys;
use super::images::Images;
use super::locked;
use super::plan::Plan;
use super::service::{Export, LOCK_TIMEOUT};
use crate::image::{FileId, Gate};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tracing::info;

/// All exports.
pub struct Registry {
    table: RwLock<Table>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Table {
    generation: u64,
    exports: BTreeMap<String, Entry>,
    /// Whose export the empty name stands for.
    default: Option<String>,
}

/// An export of the configuration.
#[derive(Clone)]
pub struct Entry {
    /// The export.
    pub export: Arc<Export>,
    /// Where the configuration has it by now: its place may change while the export goes on.
    pub source: Source,
    /// The block device that it is to be as well, by now.
    pub device: Option<DeviceKeys>,
}

/// What the exports share.
pub(super) struct Shared {
    pub(super) images: Images,
    /// Former definitions that still have clients.
    pub(super) draining: Mutex<Vec<Arc<Export>>>,
    /// Told when one of them has none any more.
    a_drained_one: Notify,
    /// How long a client waits for an image that is in use elsewhere, if its export does not say.
    pub(super) lock_timeout: Duration,
    /// Flushes at the leaving of a last writer that failed.
    pub(super) failed_flushes: AtomicUsize,
}

impl Entry {
    /// Whether it is served just as `config` has it.
    pub fn serves(&self, config: &ExportConfig) -> bool {
        self.export.serves(config) && self.device == config.device
    }
}

impl Registry {
    /// An empty registry. `image_roots`: see [`Gate::new`]; `lock_timeout`: how long a client waits for an image that is
    /// in use elsewhere, `None` for a moment.
    pub fn new(image_roots: Option<Vec<PathBuf>>, lock_timeout: Option<Duration>) -> Arc<Registry> {
        let shared = Shared {
            images: Images::new(Gate::new(image_roots)),
            draining: Mutex::default(),
            a_drained_one: Notify::new(),
            lock_timeout: lock_timeout.unwrap_or(LOCK_TIMEOUT),
            failed_flushes: AtomicUsize::new(0),
        };
        Arc::new(Registry { table: RwLock::default(), shared: Arc::new(shared) })
    }

    /// Carries out a plan of configuration `generation`. Connected clients keep the export they have.
    pub fn apply(&self, plan: &Plan, generation: u64) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.generation = generation;
        for name in &plan.remove {
            if let Some(former) = table.exports.remove(name)
                && former.export.retire()
            {
                info!("export {name:?}: removed; its connected clients stay until they leave");
            }
        }
        for config in plan.add.iter().chain(&plan.change) {
            let former = table.exports.remove(&config.name).map(|entry| entry.export);
            let history = former.as_ref().map(|former| former.history()).unwrap_or_default();
            let limiter = former.as_ref().map(|former| Arc::clone(former.limiter())).unwrap_or_default();
            limiter.set(config.limits);
            let is_new = former.is_none();
            if former.is_some_and(|former| former.retire()) {
                info!("export {:?}: changed; its connected clients keep the former definition", config.name);
            }
            let export = match is_new.then(|| self.shared.revive(config)).flatten() {
                Some(export) => {
                    info!("export {:?}: is back while clients of it are connected; they go on", config.name);
                    export.limiter().set(config.limits);
                    export
                }
                None => {
                    let shared = Arc::clone(&self.shared);
                    Arc::new(Export::new(Arc::clone(config), generation, shared, history, limiter))
                }
            };
            let ExportConfig { source, device, .. } = &**config;
            let entry = Entry { export, source: source.clone(), device: device.clone() };
            table.exports.insert(config.name.clone(), entry);
        }
        for config in plan.moved.iter().chain(&plan.adjust) {
            if let Some(entry) = table.exports.get_mut(&config.name) {
                entry.export.limiter().set(config.limits);
                entry.source = config.source.clone();
                entry.device = config.device.clone();
            }
        }
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which export clients get that name none; it need not be there.
    pub fn set_default(&self, name: Option<String>) {
        self.table.write().unwrap_or_else(PoisonError::into_inner).default = name;
    }

    /// The export of this name, if it is served now. The empty name stands for the default export.
    pub fn get(&self, name: &str) -> Option<Arc<Export>> {
        let table = self.table();
        let name = if name.is_empty() { table.default.as_deref()? } else { name };
        table.exports.get(name).map(|entry| Arc::clone(&entry.export))
    }

    /// The same with its place in the configuration.
    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.table().exports.get(name).cloned()
    }

    /// The first `most` exports whose names come behind this one, sorted by name; `None`: from the beginning.
    pub fn after(&self, name: Option<&str>, most: usize) -> Vec<Arc<Export>> {
        let from = name.map_or(Bound::Unbounded, Bound::Excluded);
        let table = self.table();
        let behind = table.exports.range::<str, _>((from, Bound::Unbounded));
        behind.take(most).map(|(_, entry)| Arc::clone(&entry.export)).collect()
    }

    /// All exports, sorted by name.
    pub fn entries(&self) -> Vec<Entry> {
        self.table().exports.values().cloned().collect()
    }

    /// Those that are to be block devices as well.
    pub fn devices(&self) -> Vec<Entry> {
        self.table().exports.values().filter(|entry| entry.device.is_some()).cloned().collect()
    }

    /// Former definitions that still have clients, the oldest first.
    pub fn draining(&self) -> Vec<Arc<Export>> {
        locked(&self.shared.draining).clone()
    }

    /// The configuration's number and how many exports it has.
    pub fn generation(&self) -> (u64, usize) {
        let table = self.table();
        (table.generation, table.exports.len())
    }

    /// Waits until no former definition of a name has clients any more: they have left, and the last writer's data is
    /// flushed and its lock given back.
    pub async fn drained(&self, name: &str) {
        loop {
            let told = self.shared.a_drained_one.notified();
            if !locked(&self.shared.draining).iter().any(|export| export.config().name == name) {
                return;
            }
            told.await;
        }
    }

    /// How often the flush for a last writer that left has failed: what that writer was told is written may be lost.
    pub fn failed_flushes(&self) -> usize {
        self.shared.failed_flushes.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn former(&self, name: &str, than: &Export) -> Vec<Arc<Export>> {
        let is_former = |other: &&Arc<Export>| other.config().name == name && !std::ptr::eq(other.as_ref(), than);
        locked(&self.draining).iter().filter(is_former).cloned().collect()
    }

    /// The removed export of just this definition, if it still has clients: it takes new ones again.
    fn revive(&self, config: &ExportConfig) -> Option<Arc<Export>> {
        let same = |export: &&Arc<Export>| export.config().same_service(config);
        let former = locked(&self.draining).iter().rev().find(same).cloned()?;
        let revived = former.revive();
        self.a_drained_one.notify_waiters();
        revived.then_some(former)
    }

    /// Clients of former definitions of a name.
    pub(super) fn clients_of_former(&self, name: &str, than: &Export) -> usize {
        self.former(name, than).iter().map(|export| export.connections().len()).sum()
    }

    /// Clients of former definitions of a name that may write the image.
    pub(super) fn writers_of_former(&self, name: &str, than: &Export, image: FileId) -> usize {
        self.former(name, than).iter().map(|export| export.writers(image)).sum()
    }

    /// The last client of a former definition has left, and its image is flushed.
    pub(super) fn drained(&self, export: &Arc<Export>) {
        locked(&self.draining).retain(|other| !Arc::ptr_eq(other, export));
        let ExportConfig { name, path, .. } = &**export.config();
        info!("export {name:?} of configuration {}: drained, {} is released", export.generation(), path.display());
        self.a_drained_one.notify_waiters();
    }
}
