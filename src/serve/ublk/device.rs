//! The life of one device, on a thread of its own: made, started, stopped when nobody has it open, deleted.
//!
//! The queues open the image before the driver hears of the device, and let it go when the driver has deleted it, so a
//! device never answers without its image, and an image's lock is given back when nothing can be read any more.

use super::driver::{self, Link, NoDriver, Unused};
use super::params::{MAX_REQUEST, SECTOR, params};
use super::queue;
use super::record::{self, Held, Record};
use crate::block::{BlockDev, Geometry};
use crate::export::device_keys::{DEFAULT_DEPTH, DeviceKeys, MAX_DEFAULT_QUEUES};
use crate::export::service::Export;
use crate::ring::{self, Peer};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::sync::oneshot;
use tracing::{info, warn};

/// How often a device that is to be stopped is looked at while somebody has it open.
const LOOK: Duration = Duration::from_millis(500);

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error(transparent)]
    NoDriver(#[from] NoDriver),
    #[error("ublkqueues = {wanted}, and this machine has {cpus} processors: write {cpus} or less, or remove the key")]
    Queues { wanted: u16, cpus: u16 },
    #[error("{0}")]
    Image(String),
    #[error("the disk is smaller than a sector of 512 bytes")]
    Size,
    #[error("/dev/ublkb{0} exists already: choose another ublkid, or remove the key")]
    Taken(u32),
    #[error("its disk had {before} bytes when the former daemon ended, and has {now} now")]
    Resized { before: u64, now: u64 },
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    #[error("the driver refuses to {what}: {source}")]
    Driver { what: &'static str, source: UblkError },
    #[error("its queues have ended")]
    Ended,
    #[error("it was told to go before it was there")]
    Stopped,
}

/// What a device's thread is told, by whom it belongs to and by its queues.
pub(super) enum Event {
    /// The device is to go: at once with `force`, else when nobody has it open any more.
    Stop { force: bool },
    /// A queue has opened the image, or has not.
    Attached(Result<Attached, String>),
    /// A queue may be used. Its number and its thread.
    Made(u16, libc::pid_t),
    /// A queue's thread has ended.
    Ended(Result<(), String>),
}

/// What a queue knows of the image.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    geometry: Geometry,
    cluster: u32,
}

/// What the first queue has found, and has seen to.
pub(super) struct Attached {
    shape: Shape,
    /// The images, if what happens to them outlives the daemon.
    held: Option<Vec<Held>>,
}

/// Whether a device outlives the daemon that serves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lasting {
    /// It ends with the daemon, and so do those who use it.
    No,
    /// It waits for the next daemon with this configuration; who uses it waits, too.
    Yes(PathBuf),
}

/// Makes a device of an export, or goes on with the one of a former daemon, and serves it until it is told to stop;
/// `started` gets its number. When it cannot be gone on with, it is deleted.
pub(super) fn run(
    export: &Arc<Export>,
    keys: &DeviceKeys,
    lasting: &Lasting,
    former: Option<u32>,
    orders: &Sender<Event>,
    events: &Receiver<Event>,
    started: impl FnOnce(u32),
) -> Result<(), Error> {
    let mut left = former;
    let ended = serve_device(export, keys, lasting, &mut left, orders, events, started);
    if let Some(id) = left {
        driver::discard(id);
    }
    ended
}

/// As [`run`]; takes `former` when it is this one's to delete.
fn serve_device(
    export: &Arc<Export>,
    keys: &DeviceKeys,
    lasting: &Lasting,
    former: &mut Option<u32>,
    orders: &Sender<Event>,
    events: &Receiver<Event>,
    started: impl FnOnce(u32),
) -> Result<(), Error> {
    let features = driver::features()?;
    let refused = |what| move |source| Error::Driver { what, source };
    let known = former.map(|id| UblkCtrl::new_simple(id as i32)).transpose().map_err(refused("find the device"))?;
    let known = known.map(|control| (control.dev_info(), control));
    let count = known.as_ref().map_or_else(|| queue_count(keys), |(info, _)| Ok(info.nr_hw_queues))?;
    if let (None, Some(id)) = (&known, keys.id.filter(|id| driver::node(*id).exists())) {
        return Err(Error::Taken(id));
    }
    let mut queues = Queues::start(export, count, lasting, orders)?;
    let Attached { shape, held } = queues.attached(events)?;
    let builder = UblkCtrlBuilder::default().name("cowgate").nr_queues(count);
    let control = match known {
        Some((info, former)) => {
            let sectors = shape.geometry.size / SECTOR * SECTOR;
            if let Some(before) = driver::size(info.dev_id).filter(|before| *before != sectors) {
                return Err(Error::Resized { before, now: sectors });
            }
            former.start_user_recover().map_err(refused("begin again with the device"))?;
            builder.id(info.dev_id as i32).depth(info.queue_depth).dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        }
        None => builder
            .id(keys.id.map_or(-1, |id| id as i32)) // below 2^20
            .depth(keys.depth.unwrap_or(DEFAULT_DEPTH))
            .io_buf_bytes(MAX_REQUEST)
            .ctrl_flags(driver::flags(features, keys.zero_copy, held.is_some()))
            .ctrl_target_flags(driver::OURS)
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV),
    };
    let control = control.build().map_err(refused("make the device"))?;
    let id = control.dev_info().dev_id;
    if let (Some(images), Lasting::Yes(config)) = (held, lasting) {
        let config_of = export.config();
        let record =
            Record { config: config.clone(), export: config_of.name.clone(), path: config_of.path.clone(), images };
        if let Err(e) = record.write(id) {
            record::warn_of(&config_of.name, &e);
        }
    }
    let rotational = export.config().rotational;
    let set = |device: &mut UblkDev| {
        device.tgt.dev_size = shape.geometry.size;
        device.tgt.params = params(&shape.geometry, shape.cluster, rotational);
        Ok(())
    };
    let device = Arc::new(UblkDev::new(control.get_name(), set, &control).map_err(refused("open the device"))?);
    let made = queues.make(&device, &control, events);
    let begun = made.and_then(|()| control.start_dev(&device).map_err(refused("start the device")));
    if let Err(e) = begun {
        let _ = control.kill_dev(); // else its queues would wait for requests
        return Err(e);
    }
    let name = &export.config().name;
    let link = Link::make(name, id);
    if let Err(e) = &link {
        warn!("export {name:?}: no link in {}: {e}", driver::BY_NAME);
    }
    let again = if former.take().is_some() { "again " } else { "" };
    info!("export {name:?}: is {again}{}, {count} queues", driver::node(id).display());
    started(id);
    let claim = until_stopped(id, events);
    if let Err(e) = control.kill_dev() {
        warn!("{}: {e}", driver::node(id).display());
    }
    drop((link, claim));
    queues.join();
    drop(device);
    if let Err(e) = driver::remove(&control) {
        warn!("{}: {e}", driver::node(id).display()); // somebody else has deleted it
    }
    record::forget(id);
    info!("export {name:?}: {} is deleted", driver::node(id).display());
    Ok(())
}

fn queue_count(keys: &DeviceKeys) -> Result<u16, Error> {
    let cpus = thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX));
    match keys.queues {
        Some(wanted) if wanted > cpus => Err(Error::Queues { wanted, cpus }),
        Some(wanted) => Ok(wanted),
        None => Ok(cpus.min(MAX_DEFAULT_QUEUES)),
    }
}

/// Waits until the device may go. What is returned keeps others from opening it meanwhile.
fn until_stopped(id: u32, events: &Receiver<Event>) -> Option<Unused> {
    let mut wanted = false;
    loop {
        let event = match wanted {
            false => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            true => match Unused::claim(id) {
                Ok(None) => events.recv_timeout(LOOK),
                Ok(claim) => return claim,
                // there is nothing that somebody could have open
                Err(_) => return None,
            },
        };
        match event {
            Ok(Event::Stop { force: false }) => wanted = true,
            Err(RecvTimeoutError::Timeout) => {}
            // a queue has ended: somebody else has deleted the device, or it has failed
            Ok(Event::Stop { force: true } | Event::Ended(_)) | Err(RecvTimeoutError::Disconnected) => return None,
            Ok(Event::Attached(_) | Event::Made(..)) => {}
        }
    }
}

/// The threads of a device's queues.
struct Queues {
    threads: Vec<JoinHandle<()>>,
    /// Where each waits for the device. Dropped: there will be none.
    go: Vec<oneshot::Sender<Arc<UblkDev>>>,
}

impl Queues {
    fn start(export: &Arc<Export>, count: u16, lasting: &Lasting, events: &Sender<Event>) -> Result<Queues, Error> {
        let mut queues = Queues { threads: Vec::new(), go: Vec::new() };
        for id in 0..count {
            let (go, device) = oneshot::channel();
            let (export, events) = (Arc::clone(export), events.clone());
            let lasts = id == 0 && *lasting != Lasting::No; // one is enough to keep a journal
            let thread = thread::Builder::new().name(format!("cowgate-q{id}")).spawn(move || {
                let run =
                    || ring::run(serve(id, &export, lasts, device, &events)).unwrap_or_else(|e| Err(e.to_string()));
                let ended = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("its thread panicked".into()));
                let _ = events.send(Event::Ended(ended)); // nobody may wait for it any more
            });
            queues.threads.push(thread.map_err(Error::Thread)?);
            queues.go.push(go);
        }
        Ok(queues)
    }

    /// Waits until every queue has the image open.
    fn attached(&self, events: &Receiver<Event>) -> Result<Attached, Error> {
        let (mut shape, mut held) = (None, None);
        for _ in &self.threads {
            match events.recv() {
                Ok(Event::Attached(Ok(found))) => {
                    shape = Some(found.shape);
                    held = held.or(found.held);
                }
                Ok(Event::Attached(Err(why)) | Event::Ended(Err(why))) => return Err(Error::Image(why)),
                Ok(Event::Stop { .. }) => return Err(Error::Stopped),
                Ok(Event::Ended(Ok(())) | Event::Made(..)) | Err(_) => return Err(Error::Ended),
            }
        }
        let shape = shape.filter(|shape| shape.geometry.size >= SECTOR).ok_or(Error::Size)?;
        Ok(Attached { shape, held })
    }

    /// Gives each queue the device, and waits until all may be used.
    fn make(&mut self, device: &Arc<UblkDev>, control: &UblkCtrl, events: &Receiver<Event>) -> Result<(), Error> {
        for go in self.go.drain(..) {
            let _ = go.send(Arc::clone(device)); // a thread that has ended says so below
        }
        for _ in &self.threads {
            match events.recv() {
                // libublk's own record of the device is left out: it would go into a directory that everybody may write
                Ok(Event::Made(queue, thread)) => control.set_thread_affinity(queue, thread),
                Ok(Event::Stop { .. }) => return Err(Error::Stopped),
                Ok(Event::Ended(Err(why))) => return Err(Error::Image(why)),
                Ok(Event::Ended(Ok(())) | Event::Attached(_)) | Err(_) => return Err(Error::Ended),
            }
        }
        Ok(())
    }

    fn join(&mut self) {
        self.go.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a panic was printed when it happened
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        self.join();
    }
}

/// One queue from the opening of its image to the last flush. `lasts`: it sees to it that what happens to the images
/// outlives the daemon.
async fn serve(
    id: u16,
    export: &Arc<Export>,
    lasts: bool,
    device: oneshot::Receiver<Arc<UblkDev>>,
    events: &Sender<Event>,
) -> Result<(), String> {
    let tell = |event| {
        let _ = events.send(event); // nobody may wait for it any more
    };
    let patient = async |time| {
        tokio::time::sleep(time).await;
        true
    };
    let client = match export.attach(Peer::Queue(id), patient).await {
        Ok(client) => client,
        Err(e) => {
            tell(Event::Attached(Err(e.to_string())));
            return Ok(());
        }
    };
    let shape = Shape { geometry: client.device().geometry(), cluster: client.device().cluster() };
    // what is in a layer that is thrown away cannot be found again
    let kept = match lasts && export.config().client.copy_on_write.is_none() {
        true => record::keep(client.device()).await.inspect_err(|e| record::warn_of(&export.config().name, e)).ok(),
        false => None,
    };
    tell(Event::Attached(Ok(Attached { shape, held: kept.as_ref().map(|kept| kept.held.clone()) })));
    let served = match device.await {
        Ok(device) => {
            let made = || tell(Event::Made(id, UblkCtrl::init_queue_thread()));
            let mut serving = pin!(queue::serve(id, &device, &client, made));
            let served = tokio::select! {
                served = &mut serving => served,
                // somebody wants all clients of the export to go
                () = client.connection().disconnected() => {
                    tell(Event::Stop { force: true });
                    serving.await
                }
            };
            served.map_err(|e| e.to_string())
        }
        Err(_) => Ok(()),
    };
    client.detach().await.run().await;
    drop(kept); // not before all is flushed
    served
}
