//! A restore's end: asked for, or because its time is over or its process has died.

use super::serve::unmount;
use super::state::{self, Entry, Phase, Process};
use super::{expiry, mounts};
use crate::serve::ublk::single;
use jiff::Timestamp;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long a process may take to end what nobody uses any more.
const PATIENCE: Duration = Duration::from_secs(25);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(100);

/// Whether a restore is served; one that is not gives errors to whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// It is not mounted yet.
    Starting,
    /// It is mounted and served.
    Mounted,
    /// Its process has died.
    Dead,
}

/// How a restore does.
pub fn health(entry: &Entry) -> Health {
    match (entry.process.is_alive(), entry.phase) {
        (false, _) => Health::Dead,
        (true, Phase::Starting) => Health::Starting,
        (true, Phase::Mounted) => Health::Mounted,
    }
}

/// The restore of this name, or at this directory.
pub fn find<'a>(entries: &'a [Entry], what: &str) -> Option<&'a Entry> {
    let directory = std::path::absolute(what).ok();
    // one whose process has died cannot be resolved any further
    let resolved = Path::new(what).parent().and_then(|parent| {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        Some(parent.canonicalize().ok()?.join(Path::new(what).file_name()?))
    });
    let is_at = |entry: &Entry| [&directory, &resolved].into_iter().flatten().any(|path| *path == entry.mount_point);
    entries.iter().find(|entry| entry.id == what || is_at(entry))
}

/// Unmounts a restore and waits until nothing is left of it. `force`: also when somebody uses it.
pub fn unmount_one(entry: &Entry, force: bool) -> Result<(), String> {
    if health(entry) == Health::Dead {
        return clean_up(entry);
    }
    if entry.phase == Phase::Starting && !force {
        return Err(format!("{}: it is about to be mounted; wait, or use --force", entry.id));
    }
    let places = entry.device.as_deref().map(mounts::of).unwrap_or_default();
    for at in &places {
        match mounts::detach(at, false) {
            Ok(()) => {}
            Err(Errno::EBUSY) if !force => {
                let at = at.display();
                return Err(format!(
                    "{at} is in use: fuser -vm {at} shows by whom; or use --force, and they get errors"
                ));
            }
            Err(Errno::EBUSY) => mounts::detach(at, true).map_err(|e| format!("{}: {e}", at.display()))?,
            Err(e) => return Err(format!("{} cannot be unmounted: {e}", at.display())),
        }
    }
    if force {
        signal(entry.process);
    }
    let deadline = Instant::now() + PATIENCE;
    while state::directory(&entry.id).exists() && entry.process.is_alive() {
        if Instant::now() > deadline {
            let device = entry.device.as_deref().unwrap_or(Path::new("its device")).display();
            return Err(match places.is_empty() {
                true => format!(
                    "{}: it is not mounted here, but {device} is in use: unmount it in the mount namespace \
                                 where it is mounted, or use --force",
                    entry.id
                ),
                false => format!(
                    "{}: it is unmounted here, but {device} is still in use: see fuser -v {device}; or use \
                                  --force",
                    entry.id
                ),
            });
        }
        sleep(LOOK);
    }
    // its process has died in between
    if state::directory(&entry.id).exists() { clean_up(entry) } else { Ok(()) }
}

fn signal(process: Process) {
    if process.is_alive() {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGTERM); // it may have gone by now
    }
}

/// Ends a restore whose process has died.
fn clean_up(entry: &Entry) -> Result<(), String> {
    if let Some(device) = &entry.device {
        unmount(device);
        single::forget(device)?;
    }
    let directory = state::directory(&entry.id);
    state::remove(&directory).map_err(|e| format!("{}: {e}", directory.display()))
}

/// Ends what nobody is to find any more: restores whose time is over, or that have died before they were mounted.
pub fn sweep() {
    let entries = match state::all() {
        Ok(entries) => entries,
        Err(e) => return warn!("{e}"),
    };
    for entry in entries {
        let is_over = expiry::is_over(entry.expires.as_deref(), Timestamp::now());
        let done = match health(&entry) {
            Health::Dead if is_over || entry.phase == Phase::Starting => clean_up(&entry),
            // it does so itself, unless it hangs
            Health::Mounted if is_over => {
                signal(entry.process);
                continue;
            }
            _ => continue,
        };
        match done {
            Ok(()) => info!("restore {} of {}: its process has died: ended", entry.id, entry.image.display()),
            Err(e) => warn!("restore {} of {}: {e}", entry.id, entry.image.display()),
        }
    }
}
