//! What is known of each restore: a directory `/run/cowgate-restore/ID` for each, for root alone, with a JSON file, the
//! log of its process, and the mount point if none was named.
//!
//! The command makes the directory; from then on its process writes the file, and removes all of it at its end. When that
//! process has died, whoever finds out ends the restore in its place: see [`super::end`].
//!
//! The [`Lock`] makes these one after the other: making a directory, writing a file anew, ending in another's place. It is
//! held for moments, never while a device is made or mounted.

use super::disk::Disk;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, DirEntry, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use tracing::warn;

/// Where the directories are.
///
/// Not below /run/cowgate, which belongs to the user that a daemon's configuration names: what is in here is believed.
pub const ROOT: &str = "/run/cowgate-restore";
const FILE: &str = "state.json";
const LOG: &str = "log";
const MOUNT_POINT: &str = "mnt";

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It is not mounted yet.
    Starting,
    /// It was mounted.
    Mounted,
    /// It is only looked at, by a command that waits for it.
    Inspecting,
}

/// A process that is not mistaken for a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it was started, in ticks since the machine was.
    pub started: u64,
}

/// A restore.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// Its name.
    pub id: String,
    /// The image.
    pub image: PathBuf,
    /// The export that was asked for, if it was one.
    pub export: Option<String>,
    /// The partition; none: the whole disk.
    pub partition: Option<u32>,
    /// The file system.
    pub file_system: Option<String>,
    /// The block device; none: there is none yet.
    #[serde(flatten)]
    pub disk: Option<Disk>,
    /// Where it is mounted, or will be.
    pub mount_point: PathBuf,
    /// What is written is thrown away; else nothing can be.
    pub writable_scratch: bool,
    /// There is a temporary layer over the image, because the file system had to be recovered or is written.
    pub layer: bool,
    /// The process that serves it, or prepares that.
    pub process: Process,
    /// How far it has come.
    pub phase: Phase,
    /// When it was made.
    pub created: String,
    /// When it ends by itself.
    pub expires: Option<String>,
}

impl Process {
    /// This one.
    pub fn this() -> Process {
        let pid = Pid::this().as_raw();
        Process { pid, started: started(pid).unwrap_or_default() }
    }

    /// Whether it is still there.
    pub fn is_alive(self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

/// When a process was started: see proc_pid_stat(5). A zombie is none any more.
fn started(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // its name may hold anything
    let (_, behind) = text.rsplit_once(')')?;
    let mut words = behind.split_whitespace();
    match words.next()? {
        "Z" | "X" => None,
        _ => words.nth(18)?.parse().ok(),
    }
}

/// The directory of a restore.
pub fn directory(id: &str) -> PathBuf {
    Path::new(ROOT).join(id)
}

/// The log of its process.
pub fn log(directory: &Path) -> PathBuf {
    directory.join(LOG)
}

/// Of all restores' state; see above.
#[must_use = "dropped, it lets others change the state"]
pub struct Lock(#[expect(dead_code, reason = "held")] Flock<File>);

/// Waits for the lock.
pub fn lock() -> io::Result<Lock> {
    ready()?;
    Flock::lock(File::open(ROOT)?, FlockArg::LockExclusive).map(Lock).map_err(|(_, e)| e.into())
}

/// Makes a directory for a new restore; `entry` gets its name and, if it is to be mounted and has none, a mount point there.
pub fn create(_lock: &Lock, mut entry: Entry) -> io::Result<Entry> {
    let private = || {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
    };
    entry.id = fresh_id()?;
    let directory = directory(&entry.id);
    // complete before others can see it
    let hidden = Path::new(ROOT).join(format!(".{}", entry.id));
    private().create(&hidden)?;
    if entry.phase == Phase::Starting && entry.mount_point.as_os_str().is_empty() {
        private().create(hidden.join(MOUNT_POINT))?;
        entry.mount_point = directory.join(MOUNT_POINT);
    }
    write(&hidden, &entry)?;
    fs::rename(&hidden, &directory)?;
    Ok(entry)
}

/// Removes directories that were not complete when whoever made them was killed.
pub fn remove_unfinished() -> io::Result<()> {
    let unfinished = || -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(ROOT)?.collect::<io::Result<Vec<_>>>()?;
        let hidden = entries.iter().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"."));
        Ok(hidden.map(DirEntry::path).collect())
    };
    if unfinished()?.is_empty() {
        return Ok(());
    }
    // whoever makes one holds the lock until it is complete
    let _lock = lock()?;
    unfinished()?.iter().try_for_each(|directory| remove(directory))
}

/// The directory of all restores, made if it is not there. Others than root must not have put anything into it.
fn ready() -> io::Result<()> {
    let before = umask(Mode::from_bits_truncate(0o022));
    let made = fs::create_dir_all(ROOT);
    umask(before);
    made?;
    let found = fs::symlink_metadata(ROOT)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("it is not a directory that only root can write; remove it"));
    }
    Ok(())
}

fn fresh_id() -> io::Result<String> {
    let mut bytes = [0; 4];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a restore's file, whole or not at all.
fn write(directory: &Path, entry: &Entry) -> io::Result<()> {
    let fresh = directory.join(".state");
    fs::write(&fresh, serde_json::to_string_pretty(entry)? + "\n")?;
    fs::rename(fresh, directory.join(FILE))
}

/// Changes it. One that has been removed is an error.
pub fn update(directory: &Path, change: impl FnOnce(&mut Entry)) -> io::Result<Entry> {
    let _lock = lock()?;
    let mut entry = read(directory)?;
    change(&mut entry);
    write(directory, &entry)?;
    Ok(entry)
}

fn read(directory: &Path) -> io::Result<Entry> {
    Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
}

/// What is known of a restore now. None: it has ended.
pub fn get(id: &str) -> io::Result<Option<Entry>> {
    match read(&directory(id)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// All restores that somebody has mounted, or is about to mount, by their age.
pub fn restores() -> Result<Vec<Entry>, String> {
    let all = all()?.into_iter();
    Ok(all.filter(|entry| entry.phase != Phase::Inspecting).collect())
}

/// The same with those that are only looked at.
pub fn all() -> Result<Vec<Entry>, String> {
    let failed = |e: io::Error| format!("{ROOT}: {e}");
    match fs::symlink_metadata(ROOT) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        _ => ready().map_err(failed)?,
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(ROOT).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(id) = name.to_str().filter(|id| !id.starts_with('.')) else { continue };
        match get(id) {
            Ok(entry) => found.extend(entry),
            Err(e) => warn!("{}: {e}; unmount what is mounted there, and remove it", directory(id).display()),
        }
    }
    found.sort_by(|a, b| a.created.cmp(&b.created).then_with(|| a.id.cmp(&b.id)));
    Ok(found)
}

/// Removes what is known of a restore that has ended. What is still mounted there is an error.
pub fn remove(directory: &Path) -> io::Result<()> {
    let gone = |result: io::Result<()>| match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    };
    gone(fs::remove_dir(directory.join(MOUNT_POINT)))?;
    for file in [LOG, ".state", FILE] {
        gone(fs::remove_file(directory.join(file)))?;
    }
    gone(fs::remove_dir(directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_apart() {
        let this = Process::this();
        assert!(this.started > 0 && this.is_alive());
        assert!(!Process { started: this.started + 1, ..this }.is_alive(), "a later one of the same number");
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let gone = Process { pid, started: started(pid).unwrap_or(1) };
        child.wait().unwrap();
        assert!(!gone.is_alive());
    }
}
