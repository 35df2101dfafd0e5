//! The background process of a restore: it is the block device. Its caller, the command, tells it over its standard input
//! what to show, looks at that, mounts it, and then says "keep"; before that, the end of the input is its end.
//!
//! From "keep" on it serves until nobody has the device open any more, the time is over, or SIGTERM comes; then it removes
//! the state. It unmounts what is still mounted in its namespace, which is its caller's. The device has no recovery: when
//! this process dies, whoever reads gets errors, and [`super::end`] does the rest.

use super::disk::Disk;
use super::source::Source;
use super::state::{self, Entry, Phase, Process};
use super::{expiry, mounts};
use crate::export::device_keys::DeviceKeys;
use crate::export::plan::Plan;
use crate::export::registry::Registry;
use crate::serve::ublk::single::{self, Single};
use crate::units::ByteRange;
use jiff::Timestamp;
use nix::sys::signal::{SigSet, Signal};
use serde::{Deserialize, Serialize};
use std::io::{self, BufRead, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{error, info, warn};

/// How long a device may take to go.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
/// How often the clock is looked at: it may be set, and the machine may sleep.
const CLOCK_LOOK: Duration = Duration::from_secs(5);

/// What the command says, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Be a block device of this, and of nothing before.
    Show {
        /// The image.
        source: Source,
        /// Where the part of it begins and its length, in bytes; none: all of it.
        window: Option<(u64, u64)>,
        /// What is written goes to a temporary layer; else nothing can be written.
        layer: bool,
    },
    /// It is mounted: go on without the command.
    Keep(Mounted),
}

/// What is mounted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Mounted {
    /// The partition; none: the whole disk.
    pub partition: Option<u32>,
    /// The file system.
    pub file_system: String,
    /// There is a temporary layer over the image.
    pub layer: bool,
}

/// What is answered, a line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The block device is there.
    Device {
        /// Which.
        disk: Disk,
        /// Size in bytes.
        size_bytes: u64,
    },
    /// The command can go. What is known of the restore.
    Kept(Box<Entry>),
    /// It cannot be done.
    Failed(String),
}

enum Event {
    Order(Order),
    /// The command has gone, or talks nonsense.
    HungUp,
    /// The device that was shown as the n-th has gone.
    Gone(u32, Result<(), String>),
    /// SIGTERM.
    Stop,
}

/// Serves one restore. `directory`: where its state is.
pub fn run(directory: &Path) -> Result<(), String> {
    let failed = |e| format!("{}: {e}", directory.display());
    // the command will be gone when somebody asks whether the restore is alive
    let entry = state::update(directory, |entry| entry.process = Process::this()).map_err(failed)?;
    let _memory = single::keep_memory();
    let (tell, events) = mpsc::channel();
    catch_signals(tell.clone())?;
    read_orders(tell.clone())?;
    let mut server = Server { directory, tell, events, shown: 0, device: None, entry };
    let why = server.serve();
    info!("{why}");
    server.end();
    Ok(())
}

/// Before any other thread is made: all inherit what is blocked.
fn catch_signals(tell: Sender<Event>) -> Result<(), String> {
    let mut stops = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        stops.add(signal);
    }
    stops.thread_block().map_err(|e| format!("cannot block signals: {e}"))?;
    let wait = move || while stops.wait().is_ok() && tell.send(Event::Stop).is_ok() {};
    thread::Builder::new().spawn(wait).map(drop).map_err(|e| format!("cannot start a thread: {e}"))
}

fn read_orders(tell: Sender<Event>) -> Result<(), String> {
    let read = move || {
        for line in io::stdin().lock().lines() {
            let order = line.ok().and_then(|line| serde_json::from_str(&line).ok());
            let Some(order) = order else { break };
            if tell.send(Event::Order(order)).is_err() {
                return;
            }
        }
        let _ = tell.send(Event::HungUp); // the other end goes with the process
    };
    thread::Builder::new().spawn(read).map(drop).map_err(|e| format!("cannot start a thread: {e}"))
}

struct Server<'a> {
    directory: &'a Path,
    tell: Sender<Event>,
    events: Receiver<Event>,
    /// Devices that there were.
    shown: u32,
    device: Option<Single>,
    /// As it was written last.
    entry: Entry,
}

impl Server<'_> {
    /// Until it is to end; why, for the log.
    fn serve(&mut self) -> String {
        loop {
            match self.events.recv_timeout(CLOCK_LOOK) {
                Ok(Event::Order(Order::Show { source, window, layer })) => match self.show(&source, window, layer) {
                    Ok(answer) => say(&answer),
                    Err(why) => say(&Answer::Failed(why)),
                },
                Ok(Event::Order(Order::Keep(mounted))) => match self.keep(mounted) {
                    Ok(()) => say(&Answer::Kept(Box::new(self.entry.clone()))),
                    Err(why) => say(&Answer::Failed(why)),
                },
                Ok(Event::HungUp) if !self.is_kept() => return "the command has gone: ending".to_owned(),
                Ok(Event::Gone(number, result)) if number == self.shown => {
                    self.device = None;
                    return match result {
                        Ok(()) => "nobody has the device open any more: ending".to_owned(),
                        Err(why) => format!("the device has failed: {why}"),
                    };
                }
                Ok(Event::Stop) => return "told to stop: ending".to_owned(),
                Ok(Event::HungUp | Event::Gone(..)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return "nobody is left to say anything: ending".to_owned(),
            }
            if self.is_kept() && expiry::is_over(self.entry.expires.as_deref(), Timestamp::now()) {
                return "its time is over: ending".to_owned();
            }
        }
    }

    /// Whether the command was told that it can go.
    fn is_kept(&self) -> bool {
        self.entry.phase == Phase::Mounted
    }

    fn show(&mut self, source: &Source, window: Option<(u64, u64)>, layer: bool) -> Result<Answer, String> {
        self.drop_device();
        let window = match window {
            Some((start, len)) => Some(ByteRange::checked(start, len).ok_or("a part of the disk that cannot be")?),
            None => None,
        };
        // the name of its link in /dev/cowgate/by-name, too
        let name = format!("restore-{}", self.directory.file_name().unwrap_or_default().display());
        let config = source.config(&name, window, layer)?;
        let registry = Registry::new(source.image_roots.clone(), None);
        registry.apply(&Plan { add: vec![Arc::new(config)], ..Plan::default() }, 1);
        let export = registry.get(&name).ok_or("the export is not there")?;
        // each queue would have a layer of its own
        let keys = DeviceKeys { queues: layer.then_some(1), ..DeviceKeys::default() };
        self.shown += 1;
        let (tell, number) = (self.tell.clone(), self.shown);
        let gone = move |result| drop(tell.send(Event::Gone(number, result)));
        let device = self.device.insert(Single::start(export, keys, gone)?);
        let (disk, size_bytes) = (Disk::at(device.node())?, device.size_bytes()?);
        // before anybody can mount it: when this process is killed, somebody has to find what it leaves
        self.update(|entry| entry.disk = Some(disk.clone()))?;
        Ok(Answer::Device { disk, size_bytes })
    }

    fn keep(&mut self, mounted: Mounted) -> Result<(), String> {
        let device = self.device.as_ref().ok_or("there is no device to keep")?;
        // it is mounted: nobody has it open from the moment on when it is not any more
        device.leave(false);
        self.update(|entry| {
            entry.partition = mounted.partition;
            entry.file_system = Some(mounted.file_system);
            entry.layer = mounted.layer;
            entry.phase = Phase::Mounted;
        })?;
        info!("{} is mounted at {}", self.entry.image.display(), self.entry.mount_point.display());
        Ok(())
    }

    fn update(&mut self, change: impl FnOnce(&mut Entry)) -> Result<(), String> {
        let changed = state::update(self.directory, change);
        self.entry = changed.map_err(|e| format!("{}: {e}", self.directory.display()))?;
        Ok(())
    }

    /// Has the device go. One that somebody has open goes by force: only looks can be meant, nothing is mounted.
    fn drop_device(&mut self) {
        let Some(device) = self.device.take() else { return };
        device.leave(false);
        if !self.wait_for_end(DEVICE_LIMIT) {
            device.leave(true);
            self.wait_for_end(DEVICE_LIMIT);
        }
    }

    /// Whether the device has gone in time.
    fn wait_for_end(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Gone(number, result)) if number == self.shown => {
                    if let Err(why) = result {
                        warn!("{why}");
                    }
                    return true;
                }
                // to be heard later, when nothing is waited for
                Ok(event @ (Event::HungUp | Event::Stop)) => drop(self.tell.send(event)),
                Ok(Event::Order(_) | Event::Gone(..)) => {}
                Err(_) => return false,
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Unmounts what is mounted, deletes the device, removes the state. What cannot be unmounted keeps its state, so that
    /// others can go on with it.
    fn end(&mut self) {
        // one that has failed is still mounted
        let unmounted = self.entry.disk.as_ref().map_or(Ok(false), |disk| mounts::unmount(disk, true));
        match &unmounted {
            Ok(false) => {}
            Ok(true) => self.warn_everybody("it was in use: who has files of it open gets errors from now on"),
            Err(why) => self.warn_everybody(&format!("{why}; then use cowgate restore umount {}", self.entry.id)),
        }
        if let Some(device) = self.device.take() {
            device.leave(true);
            if !self.wait_for_end(DEVICE_LIMIT) {
                // the driver waits for those who have it open; what it has to do it does when they let it go
                warn!("{}: somebody still has it open", device.node().display());
            }
        }
        if unmounted.is_ok()
            && let Err(e) = state::remove(self.directory)
        {
            error!("{}: {e}", self.directory.display());
        }
    }

    /// The log is removed with the rest: what somebody will wonder about goes to the machine's, too.
    fn warn_everybody(&self, what: &str) {
        warn!("{what}");
        let Entry { image, mount_point, .. } = &self.entry;
        let name = format!("the restore of {} at {}", image.display(), mount_point.display());
        // facility daemon, severity warning
        let line = format!("<28>cowgate[{}]: {name} has ended: {what}", std::process::id());
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(line.as_bytes(), "/dev/log")); // none may be there
    }
}

/// Whether there is a driver to make devices with.
pub fn driver() -> Result<(), String> {
    single::available().map_err(|e| e.to_string())
}

fn say(answer: &Answer) {
    let Ok(mut line) = serde_json::to_string(answer) else { return };
    line.push('\n');
    let mut out = io::stdout().lock();
    let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush()); // its end is heard by the other way
}
