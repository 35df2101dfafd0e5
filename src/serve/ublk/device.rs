//! The life of one device, on a thread of its own: made, started, stopped when nobody has it open, deleted.
//!
//! The queues open the image before the driver hears of the device, and let it go when the driver has deleted it, so a
//! device never answers without its image, and an image's lock is given back when nothing can be read any more. A device
//! that outlives its daemon may be let go between: the driver holds it still (UBLK_F_QUIESCE), its users wait, and the next
//! daemon goes on with it, or this one does when the image has another size.

use super::driver::{self, Link, NoDriver, Unused};
use super::params::{MAX_REQUEST, SECTOR, params};
use super::queue;
use super::record::{self, Kept, Record};
use crate::block::{BlockDev, Geometry};
use crate::export::control::Resize;
use crate::export::device_keys::{DEFAULT_DEPTH, DeviceKeys, MAX_DEFAULT_QUEUES};
use crate::export::service::Export;
use crate::image::resize::{NewSize, resize};
use crate::ring::{self, Peer};
use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

/// How often a device that is to be stopped is looked at while somebody has it open.
const LOOK: Duration = Duration::from_millis(500);

/// How long it is tried to go on with a device whose users wait.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// How long the driver may take to hold a device still when the daemon ends, in milliseconds.
const HOLD_MS: u64 = 5000;
/// It may take as long as it likes.
const FOREVER: u64 = 0;

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
    #[error("ublk device {0} exists already: choose another ublkid, or remove the key")]
    Taken(u32),
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    #[error("the driver refuses to {what}: {}", driver::explain(source))]
    Driver { what: &'static str, source: UblkError },
    #[error("its queues have ended")]
    Ended,
    #[error("it was told to go before it was there")]
    Stopped,
    #[error("it was told to wait for the next daemon before it was there")]
    HandedOver,
    #[error("ublk device {0}, which was to be gone on with, was deleted by somebody else")]
    Deleted(u32),
}

impl Error {
    /// Whether another try may go better.
    fn may_pass(&self) -> bool {
        !matches!(self, Error::HandedOver | Error::Stopped | Error::Deleted(_))
    }
}

/// What a device's thread is told, by whom it belongs to and by its queues.
pub(super) enum Event {
    /// The device is to go: at once with `force`, else when nobody has it open any more.
    Stop { force: bool },
    /// The device is to wait for the next daemon. One that cannot is to go.
    HandOver,
    /// The disk is to have another size.
    Resize(Resize),
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
    /// The images and their journals, if what happens to them outlives the daemon.
    kept: Option<Kept>,
}

/// How the service of a device has ended.
enum End {
    /// It is deleted.
    Gone,
    /// The driver holds it still, and the image is closed.
    Held(u32, Resize),
    /// It waits for the next daemon.
    Left,
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
/// `started` gets its number. When it cannot be gone on with for a while, it is deleted.
pub(super) fn run(
    export: &Arc<Export>,
    keys: &DeviceKeys,
    lasting: &Lasting,
    former: Option<u32>,
    orders: &Sender<Event>,
    events: &Receiver<Event>,
    mut started: impl FnMut(u32),
) -> Result<(), Error> {
    let mut left = former;
    let mut asked: Option<(Resize, Result<(), String>)> = None;
    let mut told = Told { orders, events, has_users: former.is_some(), leaving: false };
    let mut deadline = None;
    let ended = loop {
        let started = |id, fits| {
            started(id);
            if let Some((resize, done)) = asked.take() {
                let size = driver::size(id).ok_or_else(|| format!("{} has no size", driver::node(id).display()));
                resize.answer(done.and(fits).and(size));
            }
        };
        let mut served = serve_device(export, keys, lasting, &mut left, &mut told, started);
        if let Err(e) = &served
            && e.may_pass()
            && left.is_some()
            && Instant::now() < *deadline.get_or_insert_with(|| Instant::now() + PATIENCE)
        {
            warn!("export {:?}: its device waits, and it is tried again: {e}", export.config().name);
            told.pass_over();
            match told.pause() {
                Ok(()) => continue,
                Err(e) => served = Err(e),
            }
        }
        match served {
            Ok(End::Gone | End::Left) => break Ok(()),
            Ok(End::Held(id, wanted)) => {
                let done = wanted.size.map_or(Ok(()), |size| resize_image(export, size));
                asked = Some((wanted, done));
                (left, told.has_users, deadline) = (Some(id), true, None);
            }
            Err(Error::HandedOver) => {
                left = None;
                break Ok(());
            }
            Err(e) => break Err(e),
        }
    };
    if let (Some((resize, _)), Err(e)) = (asked, &ended) {
        resize.answer(Err(e.to_string()));
    }
    if let Some(id) = left.filter(|id| driver::exists(*id)) {
        driver::discard(id);
    }
    ended
}

/// What a device's thread hears.
struct Told<'a> {
    orders: &'a Sender<Event>,
    events: &'a Receiver<Event>,
    /// The device was there before: somebody may have it open all the while, and it does not go before nobody has.
    has_users: bool,
    /// It is to go when nobody has it open.
    leaving: bool,
}

impl Told<'_> {
    /// What comes next while a device is being made. Errors: it will not be.
    fn heard(&mut self) -> Result<Event, Error> {
        loop {
            let event = self.events.recv().map_err(|_| Error::Ended)?;
            if let Some(event) = self.order(event)? {
                return Ok(event);
            }
        }
    }

    /// Lets some time pass. Errors: the device is not to be tried again.
    fn pause(&mut self) -> Result<(), Error> {
        let until = Instant::now() + PAUSE;
        while let Ok(event) = self.events.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.order(event)?;
        }
        Ok(())
    }

    /// Sees to an order; what is none is returned.
    fn order(&mut self, event: Event) -> Result<Option<Event>, Error> {
        match event {
            Event::Stop { force: false } if self.has_users => self.leaving = true,
            Event::Stop { .. } => return Err(Error::Stopped),
            Event::HandOver => return Err(Error::HandedOver),
            Event::Ended(Err(why)) => return Err(Error::Image(why)),
            Event::Resize(resize) => resize.answer(Err(BUSY.to_owned())),
            event => return Ok(Some(event)),
        }
        Ok(None)
    }

    /// Forgets what the queues have said that have ended. Orders stay.
    fn pass_over(&self) {
        let heard: Vec<_> = self.events.try_iter().collect();
        for event in heard {
            match event {
                Event::Stop { .. } | Event::HandOver => {
                    let _ = self.orders.send(event); // `events` is its other end
                }
                Event::Resize(resize) => resize.answer(Err(BUSY.to_owned())),
                Event::Attached(_) | Event::Made(..) | Event::Ended(_) => {}
            }
        }
    }
}

fn resize_image(export: &Export, size: NewSize) -> Result<(), String> {
    let config = export.config();
    let silent = |_, _| {};
    resize(&config.path, config.format, size, false, &silent).map(drop).map_err(|e| e.to_string())
}

/// As [`run`], once. `former` is taken when the device is served again: with an error it still waits, and can be tried again.
fn serve_device(
    export: &Arc<Export>,
    keys: &DeviceKeys,
    lasting: &Lasting,
    former: &mut Option<u32>,
    told: &mut Told<'_>,
    started: impl FnOnce(u32, Result<(), String>),
) -> Result<End, Error> {
    let features = driver::features()?;
    let refused = |what| move |source| Error::Driver { what, source };
    if let Some(id) = former.filter(|id| !driver::exists(*id)) {
        return Err(Error::Deleted(id));
    }
    let known = former.map(|id| UblkCtrl::new_simple(id as i32)).transpose().map_err(refused("find the device"))?;
    let known = known.map(|control| (control.dev_info(), control));
    let count = known.as_ref().map_or_else(|| queue_count(keys), |(info, _)| Ok(info.nr_hw_queues))?;
    if let (None, Some(id)) = (&known, keys.id.filter(|id| driver::exists(*id))) {
        return Err(Error::Taken(id));
    }
    let mut queues = Queues::start(export, count, lasting, told.orders)?;
    let shape = queues.attached(told)?;
    let builder = UblkCtrlBuilder::default().name("cowgate").nr_queues(count);
    let control = match known {
        Some((info, former)) => {
            driver::done(former.start_user_recover()).map_err(refused("begin again with the device"))?;
            builder.id(info.dev_id as i32).depth(info.queue_depth).dev_flags(UblkFlags::UBLK_DEV_F_RECOVER_DEV)
        }
        None => builder
            .id(keys.id.map_or(-1, |id| id as i32)) // below 2^20
            .depth(keys.depth.unwrap_or(DEFAULT_DEPTH))
            .io_buf_bytes(MAX_REQUEST)
            .ctrl_flags(driver::flags(features, keys.zero_copy, queues.kept.is_some()))
            .ctrl_target_flags(driver::OURS)
            .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV),
    };
    let control = control.build().map_err(refused("make the device"))?;
    let id = control.dev_info().dev_id;
    match (&queues.kept, lasting) {
        (Some(kept), Lasting::Yes(config)) => {
            let record = Record::new(config, export.config(), keys, kept.held.clone());
            let record = match former.and_then(Record::read) {
                Some(before) => record.made_as(before),
                None => record,
            };
            if let Err(e) = record.write(id) {
                record::warn_of(&export.config().name, &e);
            }
        }
        // what is left of a former daemon's is not true any more
        _ => record::forget(id),
    }
    let rotational = export.config().rotational;
    let set = |device: &mut UblkDev| {
        device.tgt.dev_size = shape.geometry.size;
        device.tgt.params = params(&shape.geometry, shape.cluster, rotational);
        Ok(())
    };
    let device = Arc::new(UblkDev::new(control.get_name(), set, &control).map_err(refused("open the device"))?);
    let made = queues.make(&device, &control, told);
    let begun = made.and_then(|()| control.start_dev(&device).map_err(refused("start the device")));
    if let Err(e) = begun {
        match former {
            Some(_) => queues.end(),          // it waits as it did
            None => drop(control.kill_dev()), // else its queues would wait for requests
        }
        return Err(e);
    }
    let name = &export.config().name;
    let link = Link::make(name, id);
    if let Err(e) = &link {
        warn!("export {name:?}: no link in {}: {e}", driver::BY_NAME);
    }
    let again = if former.take().is_some() { "again " } else { "" };
    info!("export {name:?}: is {again}{}, {count} queues", driver::node(id).display());
    let fits = fit(&control, features, shape.geometry.size / SECTOR * SECTOR);
    if let Err(why) = &fits {
        warn!("export {name:?}: {why}");
    }
    started(id, fits);
    let holds = control.dev_info().flags & u64::from(sys::UBLK_F_QUIESCE) != 0;
    let mut device = Some(device);
    let claim = match until_stopped(id, queues.kept.is_some(), holds, told) {
        Next::Stop(claim) => claim,
        Next::Ended(served) => {
            let node = driver::node(id);
            match served {
                Ok(()) => info!("export {name:?}: another program has stopped {}", node.display()),
                Err(why) => error!("export {name:?}: {} goes, as it cannot be served: {why}", node.display()),
            }
            // the driver waits for what a queue that has ended had taken, until nobody has the character device open
            queues.end_after(queue::TAKING_BACK);
            device = None;
            None
        }
        Next::HandOver => {
            std::mem::forget(link); // its users find it all the while
            control.disown();
            match holds.then(|| driver::done(control.quiesce_dev(HOLD_MS))) {
                Some(Ok(())) => queues.end(),
                // As after a crash: what is under way is asked for again, and the journals say the rest. The threads
                // end with the process.
                _ => std::mem::forget(queues),
            }
            info!("export {name:?}: {} waits for the next daemon", driver::node(id).display());
            return Ok(End::Left);
        }
        Next::Resize(wanted) => match driver::done(control.quiesce_dev(FOREVER)) {
            Ok(()) => {
                std::mem::forget(link);
                control.disown();
                queues.end();
                told.pass_over();
                return Ok(End::Held(id, wanted));
            }
            Err(e) => {
                // it takes no requests any more
                let why = driver::explain(&e);
                wanted.answer(Err(format!("{} cannot be held still and goes: {why}", driver::node(id).display())));
                None
            }
        },
    };
    if let Err(e) = control.kill_dev() {
        warn!("{}: {}", driver::node(id).display(), driver::explain(&e));
    }
    drop((link, claim));
    queues.join();
    drop(device);
    if let Err(e) = driver::remove(&control) {
        warn!("{}: {}", driver::node(id).display(), driver::explain(&e)); // somebody else has deleted it
    }
    record::forget(id);
    info!("export {name:?}: {} is deleted", driver::node(id).display());
    Ok(End::Gone)
}

/// Has a device that is gone on with get the size in bytes that its disk has by now.
fn fit(control: &UblkCtrl, features: u64, now: u64) -> Result<(), String> {
    let id = control.dev_info().dev_id;
    let Some(before) = driver::size(id).filter(|before| *before != now) else { return Ok(()) };
    let node = driver::node(id);
    let node = node.display();
    if now < before {
        return Err(format!("{node} has {before} bytes and its disk {now}: what is behind them cannot be read"));
    }
    if features & u64::from(sys::UBLK_F_UPDATE_SIZE) == 0 {
        return Err(format!("{node} keeps its {before} bytes: the driver cannot change that before Linux 6.16"));
    }
    driver::done(control.update_size(now))
        .map_err(|e| format!("{node} keeps its {before} bytes: {}", driver::explain(&e)))?;
    info!("{node} has {now} bytes now, and had {before}");
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

/// What is to become of a device.
enum Next {
    /// It goes. What is in here keeps others from opening it meanwhile.
    Stop(Option<Unused>),
    /// It goes, because a queue of it has ended: the driver has taken its commands back, or it has failed.
    Ended(Result<(), String>),
    /// It waits for the next daemon.
    HandOver,
    /// It waits until its disk has another size.
    Resize(Resize),
}

/// Waits until something is to become of the device. `lasts`: it can wait for the next daemon; `holds`: the driver can hold
/// it still.
fn until_stopped(id: u32, lasts: bool, holds: bool, told: &mut Told<'_>) -> Next {
    loop {
        let event = match told.leaving {
            false => told.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            true => match Unused::claim(id) {
                Ok(Some(claim)) => return Next::Stop(Some(claim)),
                // there is nothing that somebody could have open
                Err(e) if is_gone(&e) => return Next::Stop(None),
                Ok(None) | Err(_) => told.events.recv_timeout(LOOK),
            },
        };
        match event {
            Ok(Event::HandOver) if lasts => return Next::HandOver,
            Ok(Event::Resize(resize)) if told.leaving => {
                resize.answer(Err("the device is being deleted".to_owned()));
            }
            Ok(Event::Resize(resize)) if holds => return Next::Resize(resize),
            Ok(Event::Resize(resize)) => resize.answer(Err(NO_HOLD.to_owned())),
            Ok(Event::Stop { force: false } | Event::HandOver) => told.leaving = true,
            Err(RecvTimeoutError::Timeout) => {}
            Ok(Event::Ended(served)) => return Next::Ended(served),
            Ok(Event::Stop { force: true }) => {
                if told.leaving {
                    let node = driver::node(id);
                    error!("{} is still open; what reads or writes it gets errors from now on", node.display());
                }
                return Next::Stop(None);
            }
            Err(RecvTimeoutError::Disconnected) => return Next::Stop(None),
            Ok(Event::Attached(_) | Event::Made(..)) => {}
        }
    }
}

/// Whether a failure to open a device says that there is none.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

/// Why a device cannot be resized now.
const BUSY: &str = "the device is being made; try again";
/// Why a device cannot be resized.
const NO_HOLD: &str = "the device cannot be held still meanwhile, which takes Linux 6.16 and an image whose changes outlive \
                       the daemon; unmount it, remove the export, and use cowgate image resize";

/// The threads of a device's queues.
struct Queues {
    threads: Vec<JoinHandle<()>>,
    /// Where each waits for the device. Dropped: there will be none.
    go: Vec<oneshot::Sender<Arc<UblkDev>>>,
    /// Tells each that it takes no requests any more, and ends when it has done those it has.
    hold: Vec<oneshot::Sender<()>>,
    /// Let go of when the threads have ended, and all is flushed.
    kept: Option<Kept>,
}

impl Queues {
    fn start(export: &Arc<Export>, count: u16, lasting: &Lasting, events: &Sender<Event>) -> Result<Queues, Error> {
        let mut queues = Queues { threads: Vec::new(), go: Vec::new(), hold: Vec::new(), kept: None };
        for id in 0..count {
            let ((go, device), (hold, held)) = (oneshot::channel(), oneshot::channel());
            let (export, events) = (Arc::clone(export), events.clone());
            let lasting = if id == 0 { lasting.clone() } else { Lasting::No }; // one is enough to keep a journal
            let thread = thread::Builder::new().name(format!("cowgate-q{id}")).spawn(move || {
                let serve = || ring::run(serve(id, &export, &lasting, device, held, &events));
                let run = || serve().unwrap_or_else(|e| Err(e.to_string()));
                let ended = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("its thread panicked".into()));
                let _ = events.send(Event::Ended(ended)); // nobody may wait for it any more
            });
            queues.threads.push(thread.map_err(Error::Thread)?);
            queues.go.push(go);
            queues.hold.push(hold);
        }
        Ok(queues)
    }

    /// Waits until every queue has the image open.
    fn attached(&mut self, told: &mut Told<'_>) -> Result<Shape, Error> {
        let mut shape = None;
        for _ in &self.threads {
            match told.heard()? {
                Event::Attached(Ok(found)) => {
                    shape = Some(found.shape);
                    self.kept = self.kept.take().or(found.kept);
                }
                Event::Attached(Err(why)) => return Err(Error::Image(why)),
                _ => return Err(Error::Ended),
            }
        }
        shape.filter(|shape| shape.geometry.size >= SECTOR).ok_or(Error::Size)
    }

    /// Gives each queue the device, and waits until all may be used.
    fn make(&mut self, device: &Arc<UblkDev>, control: &UblkCtrl, told: &mut Told<'_>) -> Result<(), Error> {
        for go in self.go.drain(..) {
            let _ = go.send(Arc::clone(device)); // a thread that has ended says so below
        }
        for _ in &self.threads {
            match told.heard()? {
                // libublk's own record of the device is left out: it would go into a directory that everybody may write
                Event::Made(queue, thread) => control.set_thread_affinity(queue, thread),
                _ => return Err(Error::Ended),
            }
        }
        Ok(())
    }

    /// Has them end with what they have taken; they take nothing more, and what is not answered is asked for again.
    fn end(&mut self) {
        for hold in self.hold.drain(..) {
            let _ = hold.send(()); // it may have ended
        }
        self.join();
    }

    /// Has those end that do not do so by themselves within a time.
    fn end_after(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while !self.threads.iter().all(JoinHandle::is_finished) && Instant::now() < deadline {
            thread::sleep(driver::ASK);
        }
        self.end();
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

/// One queue from the opening of its image to the last flush. `lasting`: it sees to it that what happens to the images
/// outlives the daemon; `held`: it is to end.
async fn serve(
    id: u16,
    export: &Arc<Export>,
    lasting: &Lasting,
    device: oneshot::Receiver<Arc<UblkDev>>,
    held: oneshot::Receiver<()>,
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
    let kept = match (lasting, export.config().client.copy_on_write.is_none()) {
        (Lasting::Yes(config), true) => {
            let kept = record::keep(client.device(), config).await;
            kept.inspect_err(|e| record::warn_of(&export.config().name, e)).ok()
        }
        _ => None,
    };
    tell(Event::Attached(Ok(Attached { shape, kept })));
    let served = match device.await {
        Ok(device) => {
            let made = || tell(Event::Made(id, UblkCtrl::init_queue_thread()));
            let mut serving = pin!(queue::serve(id, &device, &client, held, made));
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
    served
}
