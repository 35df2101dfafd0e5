//! A restore's end: asked for, or because its time is over or its process has died.

use super::state::{self, Entry, Phase, Process};
use super::{expiry, mounts};
use crate::serve::ublk::single;
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::ErrorKind;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long a process may take to end what nobody uses any more: longer than it waits for its device.
const PROCESS_LIMIT: Duration = Duration::from_secs(25);
/// Between two looks at it.
const PROCESS_LOOK: Duration = Duration::from_millis(100);

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
        (true, Phase::Starting | Phase::Inspecting) => Health::Starting,
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
///
/// It is looked at anew: since it was listed it may have ended, and its device's number be another disk's.
pub fn unmount_one(id: &str, force: bool) -> Result<(), String> {
    let failed = |e| format!("{id}: {e}");
    let Some(entry) = state::get(id).map_err(failed)? else { return Ok(()) };
    match health(&entry) {
        Health::Dead => return end_dead(id),
        Health::Starting if !force => return Err(format!("{id}: it is about to be mounted; wait, or use --force")),
        Health::Starting | Health::Mounted => {}
    }
    let is_mounted_here = entry.disk.as_ref().is_some_and(|disk| !mounts::of(disk).is_empty());
    if let Some(disk) = &entry.disk {
        mounts::unmount(disk, force).map_err(|why| why.to_string())?;
    }
    if force {
        signal(entry.process);
    }
    let deadline = Instant::now() + PROCESS_LIMIT;
    while state::directory(id).exists() {
        if state::get(id).map_err(failed)?.is_some_and(|entry| !entry.process.is_alive()) {
            return end_dead(id);
        }
        if Instant::now() > deadline {
            return Err(still_there(&entry, is_mounted_here));
        }
        sleep(PROCESS_LOOK);
    }
    Ok(())
}

fn still_there(entry: &Entry, is_mounted_here: bool) -> String {
    let id = &entry.id;
    let device = entry.disk.as_ref().map_or("its device".to_owned(), |disk| disk.device.display().to_string());
    if is_mounted_here {
        return format!(
            "{id}: it is unmounted here, but {device} is still in use: see fuser -v {device}; or use --force"
        );
    }
    format!(
        "{id}: it is not mounted here, but {device} is in use: unmount it in the mount namespace where it is mounted, or \
         use --force"
    )
}

fn end_dead(id: &str) -> Result<(), String> {
    match clean_up(id)? {
        true => Ok(()),
        false => Err(format!("{id}: another process serves it by now; try again")),
    }
}

fn signal(process: Process) {
    if process.is_alive() {
        let _ = kill(Pid::from_raw(process.pid), Signal::SIGTERM); // it may have gone by now
    }
}

/// Ends a restore in the place of its process, which has died. False: it lives.
pub(super) fn clean_up(id: &str) -> Result<bool, String> {
    let failed = |e: std::io::Error| format!("{}: {e}", state::directory(id).display());
    // a process that is about to write its own number there is waited for
    let _lock = state::lock().map_err(failed)?;
    let entry = state::get(id).map_err(failed)?;
    if let Some(entry) = &entry
        && entry.process != Process::this()
        && entry.process.is_alive()
    {
        return Ok(false);
    }
    if let Some(disk) = entry.and_then(|entry| entry.disk).filter(|disk| !disk.is_replaced()) {
        mounts::unmount(&disk, true).map_err(|why| format!("{id}: {why}"))?;
        single::forget(&disk.device)?;
    }
    state::remove(&state::directory(id)).map_err(failed)?;
    Ok(true)
}

/// Ends what nobody is to find any more: restores whose time is over, or that have died before they were mounted. Called
/// by every command. Devices without their processes are deleted by a daemon, too, when it starts.
pub fn sweep() {
    let entries = match state::all() {
        Ok(entries) => entries,
        Err(e) => return warn!("{e}"),
    };
    if let Err(e) = state::remove_unfinished()
        && e.kind() != ErrorKind::NotFound
    {
        warn!("{}: {e}", state::ROOT);
    }
    for entry in entries {
        let is_over = expiry::is_over(entry.expires.as_deref(), Timestamp::now());
        let done = match health(&entry) {
            Health::Dead if is_over || entry.phase != Phase::Mounted => clean_up(&entry.id),
            // it does so itself, unless it hangs
            Health::Mounted if is_over => {
                signal(entry.process);
                continue;
            }
            _ => continue,
        };
        match done {
            Ok(true) => info!("restore {} of {}: its process has died: ended", entry.id, entry.image.display()),
            Ok(false) => {}
            Err(e) => warn!("restore {} of {}: {e}", entry.id, entry.image.display()),
        }
    }
}
