//! Exports as block devices of this machine, `/dev/ublkbN`: the devices that there are follow the configuration.
//!
//! - [`driver`]: what the kernel's ublk driver has, and who uses a device
//! - `device`: the life of one device; `queue`: one of its queues, a thread; `direct`: data that is not copied;
//!   `control`: what the driver says of a device; `params`: the driver's numbers; `record`: what outlives the daemon
//! - `reclaim`: what keeps short memory from making the devices wait for themselves; `stack`: what lies on which device
//! - [`single`]: one device that belongs to no configuration
//!
//! [`Devices::follow`] is called when exports have changed. The first call blocks until the images of devices that wait for
//! a daemon are what they were; the others return at once: each device has a thread that makes it, serves
//! it, and deletes it when it is not wanted any more and nobody has it open. A device of a changed export goes before
//! the one of the new definition comes.

mod control;
mod device;
mod direct;
pub mod driver;
mod params;
mod queue;
mod reclaim;
mod record;
pub mod single;
mod stack;

use crate::export::control::Resize;
use crate::export::device_keys::DeviceKeys;
use crate::export::registry::{Entry, Registry};
use crate::export::service::Export;
use crate::image;
use crate::image::resize::NewSize;
use crate::ring::Peer;
use device::{Event, Lasting};
use record::Record;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Place;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// How long the images of devices that wait may be locked by somebody else.
const OTHERS_READ: Duration = Duration::from_secs(10);
/// Until they are looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The devices of the configuration.
#[derive(Clone)]
pub struct Devices {
    shared: Arc<Shared>,
}

struct Shared {
    registry: Arc<Registry>,
    /// The configuration whose devices these are.
    config: PathBuf,
    table: Mutex<Table>,
    /// Told when a device has gone.
    gone: Condvar,
}

#[derive(Default)]
struct Table {
    /// By export.
    devices: BTreeMap<String, Device>,
    /// While there are devices.
    resident: Option<reclaim::Resident>,
    /// The daemon ends: nothing new is made.
    stopping: bool,
    /// Devices of a daemon before this one that wait for what the configuration says of them.
    waiting: Vec<u32>,
    /// Nothing is missing in the configuration as it was read last.
    whole: bool,
}

struct Device {
    export: Arc<Export>,
    keys: DeviceKeys,
    events: Sender<Event>,
    /// It was told to go.
    leaving: bool,
    /// Its number, once it has one.
    id: Option<u32>,
}

impl Devices {
    /// None yet, for the configuration in this file. Clears away after daemons that have gone.
    ///
    /// To be called by the thread that starts all others, before it does: see `reclaim`.
    pub fn new(registry: Arc<Registry>, config: &Path) -> Devices {
        reclaim::begin();
        let table = Mutex::new(Table { waiting: driver::sweep(), ..Table::default() });
        let config = config.canonicalize().unwrap_or_else(|_| config.to_owned());
        Devices { shared: Arc::new(Shared { registry, config, table, gone: Condvar::new() }) }
    }

    /// Makes the devices that the configuration asks for, and has those go that it does not.
    ///
    /// The first call goes on with the devices of a former daemon. It blocks until their images are what they were: before
    /// anybody else may open them. `whole`: nothing is missing in the configuration because of an error in it; else those
    /// that it does not name wait on.
    pub fn follow(&self, whole: bool) {
        self.shared.table().whole = whole;
        self.shared.follow();
    }

    /// Has an export's device get the size of its disk, which is resized before if that is asked for. Its users wait
    /// meanwhile.
    pub fn resize(&self, name: &str, resize: Resize) {
        let table = self.shared.table();
        let device = table.devices.get(name).filter(|device| !device.leaving);
        let Some((device, id)) = device.and_then(|device| Some((device, device.id?))) else {
            let why =
                "the export is no block device now: an image that nobody uses is resized with cowgate image resize";
            return resize.answer(Err(why.to_owned()));
        };
        if let (Some(NewSize::Exactly(size)), Some(now)) = (resize.size, driver::size(id))
            && size < now
        {
            let why = format!("it has {now} bytes, and does not become smaller while it is a device");
            return resize.answer(Err(why));
        }
        let connections = device.export.connections();
        let others = connections.iter().filter(|other| !matches!(other.peer, Peer::Queue(_))).count();
        if others > 0 {
            return resize.answer(Err(format!("{others} other clients use the export; disconnect them first")));
        }
        let config = device.export.config();
        let why = match &config.client {
            keys if keys.multi_file => Some("it is several files, which are its parts"),
            keys if keys.file_size.is_some() => Some("its size is what `filesize` in its configuration says"),
            _ if config.read_only && resize.size.is_some() => Some("it is read-only"),
            _ => None,
        };
        if let Some(why) = why {
            return resize.answer(Err(why.to_owned()));
        }
        let _ = device.events.send(Event::Resize(resize)); // dropped by one that ends: then who asked hears so
    }

    /// Has all devices go, and waits for that; those that somebody has open go after `patience`. `hand_over`: those that
    /// can do so wait for the next daemon instead.
    ///
    /// Blocks: not for an async thread.
    pub fn stop(&self, patience: Duration, hand_over: bool) {
        let mut table = self.shared.table();
        table.stopping = true;
        for device in table.devices.values_mut() {
            match hand_over && !device.leaving {
                true => device.hand_over(),
                false => device.leave(false),
            }
        }
        let deadline = Instant::now() + patience;
        while !table.devices.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            table = self.shared.gone.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        table.devices.values_mut().for_each(|device| device.leave(true));
        while !table.devices.is_empty() {
            table = self.shared.gone.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Device {
    fn leave(&mut self, force: bool) {
        if !self.leaving || force {
            let _ = self.events.send(Event::Stop { force }); // it may have gone by itself
            self.leaving = true;
        }
    }

    fn hand_over(&mut self) {
        let _ = self.events.send(Event::HandOver); // it may have gone by itself
        self.leaving = true;
    }

    /// A device waits until nobody uses it, and a file system on it that holds its next image is always in use.
    fn complain_of_a_loop(&self, new: &Entry) {
        let config = new.export.config();
        if let Some(id) = self.id.filter(|id| new.device.is_some() && stack::under(&config.path) == Some(*id)) {
            error!(
                "export {:?}: {} lies on the export's own block device {}, which goes when that is unmounted: a device \
                 cannot hold its own image; choose another place for it",
                config.name,
                config.path.display(),
                driver::node(id).display()
            );
        }
    }

    fn is_of(&self, entry: &Entry) -> bool {
        Arc::ptr_eq(&self.export, &entry.export) && Some(&self.keys) == entry.device.as_ref()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn follow(self: &Arc<Self>) {
        let table = &mut *self.table();
        if table.stopping {
            return;
        }
        let named = |entry: Entry| (entry.export.config().name.clone(), entry);
        let wanted: BTreeMap<String, Entry> = self.registry.devices().into_iter().map(named).collect();
        for (name, device) in &mut table.devices {
            let new = wanted.get(name);
            if !new.is_some_and(|entry| device.is_of(entry)) {
                device.leave(false);
                new.iter().for_each(|entry| device.complain_of_a_loop(entry));
            }
        }
        let mut former = self.former(&mut table.waiting, table.whole, &wanted);
        for (name, entry) in wanted {
            let Some(keys) = entry.device else { continue };
            let former = former.remove(&name);
            if let Place::Vacant(place) = table.devices.entry(name) {
                // before its threads, which inherit of it
                table.resident.get_or_insert_with(|| {
                    driver::warn_of_blindness();
                    reclaim::Resident::new()
                });
                let is_other = former.as_ref().is_some_and(|(_, record)| !record.has(&keys));
                if let Some(mut device) = self.start(entry.export, keys, former.map(|(id, _)| id)) {
                    if is_other {
                        device.leave(false); // for one of the new definition
                    }
                    place.insert(device);
                }
            }
        }
    }

    /// Which of the devices that wait are gone on with, by export. Those that are nobody's any more are deleted, if the
    /// configuration is whole.
    fn former(
        &self,
        waiting: &mut Vec<u32>,
        whole: bool,
        wanted: &BTreeMap<String, Entry>,
    ) -> BTreeMap<String, (u32, Record)> {
        let mut former = BTreeMap::new();
        let deadline = Instant::now() + OTHERS_READ;
        for id in std::mem::take(waiting) {
            let Some(record) = Record::read(id) else {
                warn!("ublk device {id}: nobody knows any more what it was");
                driver::discard(id);
                continue;
            };
            if record.config != self.config {
                info!("ublk device {id}: waits for the daemon of {}", record.config.display());
                continue;
            }
            if !whole && !wanted.contains_key(&record.export) {
                warn!(
                    "export {:?}: its device and who uses it wait until it is in the configuration, or the configuration \
                     has no errors",
                    record.export
                );
                waiting.push(id);
                continue;
            }
            let carried_out = match wanted.get(&record.export).map(|entry| record.is_of(entry.export.config())) {
                Some(true) => carry_out(&record, deadline).map_err(|e| e.to_string()),
                Some(false) => Err("the configuration has something else under its name".to_owned()),
                None => Err("the configuration has no such device any more".to_owned()),
            };
            match carried_out {
                Ok(()) => match former.entry(record.export.clone()) {
                    Place::Vacant(place) => {
                        place.insert((id, record));
                    }
                    // the driver took the first for served, so that a second one was made
                    Place::Occupied(mut place) => {
                        let other = place.get().0;
                        let goes = if driver::is_used(other) { id } else { place.insert((id, record)).0 };
                        error!("export {:?}: of two devices that wait, ublk device {goes} goes", place.key());
                        driver::discard(goes);
                    }
                },
                Err(why) => {
                    error!("export {:?}: its device cannot be gone on with: {why}", record.export);
                    driver::discard(id);
                }
            }
        }
        // now that all that was noted is in the images
        former.values().for_each(|(_, record)| record.forget_journals(&[]));
        former
    }

    /// Starts the thread of a device, which may be there already: then it waits for a daemon.
    fn start(self: &Arc<Self>, export: Arc<Export>, keys: DeviceKeys, former: Option<u32>) -> Option<Device> {
        let (events, heard) = mpsc::channel();
        let device = Device { export: Arc::clone(&export), keys: keys.clone(), events, leaving: false, id: None };
        let (shared, orders) = (Arc::clone(self), device.events.clone());
        let name = export.config().name.clone();
        let lasting = Lasting::Yes(self.config.clone());
        let thread = thread::Builder::new().name("cowgate-ublk".to_owned()).spawn({
            let name = name.clone();
            move || {
                let started = |id| {
                    if let Some(device) = shared.table().devices.get_mut(&name) {
                        device.id = Some(id);
                    }
                };
                let ended = device::run(&export, &keys, &lasting, former, &orders, &heard, started);
                match &ended {
                    Ok(()) | Err(device::Error::Stopped) => {}
                    Err(e) => error!("export {name:?}: no block device: {e}"),
                }
                drop(export);
                shared.ended(&name, ended.is_ok());
            }
        });
        match thread {
            Ok(_) => Some(device),
            Err(e) => {
                error!("export {name:?}: no block device: cannot start a thread: {e}");
                None
            }
        }
    }

    /// A device has gone.
    fn ended(self: &Arc<Self>, name: &str, well: bool) {
        let told = {
            let mut table = self.table();
            let told = table.devices.remove(name).is_some_and(|device| device.leaving);
            if table.devices.is_empty() {
                table.resident = None;
            }
            told
        };
        self.gone.notify_all();
        // another definition may wait for its place; one that failed is tried again with the next reload
        if told {
            self.follow();
        } else if well {
            info!("export {name:?}: its device was deleted by somebody else; it comes back with the next reload");
        }
    }
}

/// Brings a device's images to where they were. Somebody may have one open for a moment, to read it.
fn carry_out(record: &Record, deadline: Instant) -> Result<(), image::Error> {
    loop {
        match record.carry_out() {
            Err(e) if e.is_in_use() && Instant::now() < deadline => thread::sleep(LOOK_AGAIN),
            done => return done,
        }
    }
}
