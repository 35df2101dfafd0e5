//! One device that belongs to no configuration: whoever makes it says when it goes. Called by `restore`.

use super::device::{self, Event, Lasting};
use super::{driver, reclaim};
use crate::export::device_keys::DeviceKeys;
use crate::export::service::Export;
use caps::{CapSet, Capability};
use libublk::ctrl::UblkCtrl;
use libublk::{UblkError, sys};
use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;

/// A device of this process. Dropped, it stays until the process ends.
pub struct Single {
    id: u32,
    events: Sender<Event>,
}

/// Has this process get memory without waiting for its own device, for as long as this lives: see `reclaim`. To be
/// called by the thread that starts all others, before it does.
#[must_use = "dropped, it lets the process be swapped out to its own device"]
pub fn keep_memory() -> impl Sized {
    reclaim::begin();
    reclaim::Resident::new()
}

impl Single {
    /// Makes the device and serves it on threads of its own. `ended` is called when it has gone: told to, or not. An
    /// error: it was never there, and `ended` is not called.
    pub fn start(
        export: Arc<Export>,
        keys: DeviceKeys,
        ended: impl FnOnce(Result<(), String>) + Send + 'static,
    ) -> Result<Single, String> {
        let (events, heard) = mpsc::channel();
        let (tell, news) = mpsc::channel();
        let orders = events.clone();
        let run = move || {
            let was_there = Cell::new(false);
            let started = |id| {
                was_there.set(true);
                let _ = tell.send(Ok(id)); // it is waited for
            };
            let result =
                device::run(&export, &keys, &Lasting::No, None, &orders, &heard, started).map_err(|e| e.to_string());
            // the image is unlocked before anybody hears of the end
            drop(export);
            match (was_there.get(), result) {
                (true, result) => ended(result),
                (false, Err(why)) => drop(tell.send(Err(why))),
                // the other end of the channel goes, and says it
                (false, Ok(())) => {}
            }
        };
        let thread = thread::Builder::new().name("cowgate-ublk".to_owned()).spawn(run);
        thread.map_err(|e| format!("cannot start a thread: {e}"))?;
        let id = news.recv().unwrap_or_else(|_| Err("the device was never there".to_owned()))?;
        Ok(Single { id, events })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The block device.
    pub fn node(&self) -> PathBuf {
        driver::node(self.id)
    }

    /// Its size in bytes, as the kernel has it.
    pub fn size_bytes(&self) -> Result<u64, String> {
        driver::size(self.id).ok_or_else(|| format!("{} has no size", self.node().display()))
    }

    /// Has it go when nobody has it open any more; with `force` at once, and who has it open gets errors.
    pub fn leave(&self, force: bool) {
        let _ = self.events.send(Event::Stop { force }); // it may have gone by itself
    }
}

/// Keeps the calling thread from being one for whose device the kernel looks for partitions: it does so for devices
/// whose queues belong to threads with CAP_SYS_ADMIN only. What is on the disk may be made to fool that code.
pub(super) fn without_partitions() -> Result<(), caps::errors::CapsError> {
    caps::drop(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)?;
    caps::drop(None, CapSet::Permitted, Capability::CAP_SYS_ADMIN)
}

/// Whether the ublk driver can be used.
pub fn available() -> Result<(), driver::NoDriver> {
    driver::features().map(drop)
}

/// Deletes a device of this program that nobody serves any more. Does not wait for those who still have it open: they
/// get errors, and its number is free when they have let it go. No device of that number is no error.
pub fn forget(node: &Path) -> Result<(), String> {
    let Some(id) = node.to_str().and_then(|node| node.strip_prefix("/dev/ublkb")?.parse::<u32>().ok()) else {
        return Err(format!("{} is no ublk device", node.display()));
    };
    if !driver::exists(id) {
        return Ok(());
    }
    let failed = |e: UblkError| format!("{} cannot be deleted: {}", node.display(), driver::explain(&e));
    let control = UblkCtrl::new_simple(id as i32).map_err(failed)?; // numbers are below 2^20
    let info = control.dev_info();
    // one that lives has taken the number since
    if info.ublksrv_flags == driver::OURS && u32::from(info.state) == sys::UBLK_S_DEV_DEAD {
        driver::forget_links(id);
        driver::done(control.del_dev_async()).map_err(failed)?;
    }
    Ok(())
}
