//! What is known of each restore: a directory `/run/cowgate/restore/ID` for each, for root alone, with a JSON file, the
//! log of its process, and the mount point if none was named.
//!
//! The command makes the directory; from then on its process writes the file, and removes all of it at its end. When that
//! process has died, whoever finds out ends the restore in its place: see [`super::end`].

use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, geteuid};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use tracing::warn;

/// Where the directories are.
pub const ROOT: &str = "/run/cowgate/restore";
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
    /// The block device.
    pub device: Option<PathBuf>,
    /// Where it is mounted.
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

/// Makes a directory for a new restore; `entry` gets its name and, if it has none, a mount point there.
pub fn create(mut entry: Entry) -> Result<Entry, String> {
    let failed = |e: io::Error| format!("{ROOT}: {e}");
    ready().map_err(failed)?;
    let private = || {
        let mut builder = DirBuilder::new();
        builder.mode(0o700);
        builder
    };
    entry.id = fresh_id().map_err(failed)?;
    let directory = directory(&entry.id);
    // complete before others can see it
    let hidden = Path::new(ROOT).join(format!(".{}", entry.id));
    private().create(&hidden).map_err(failed)?;
    if entry.mount_point.as_os_str().is_empty() {
        private().create(hidden.join(MOUNT_POINT)).map_err(failed)?;
        entry.mount_point = directory.join(MOUNT_POINT);
    }
    write(&hidden, &entry).and_then(|()| fs::rename(&hidden, &directory)).map_err(failed)?;
    Ok(entry)
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
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a restore's file, whole or not at all.
pub fn write(directory: &Path, entry: &Entry) -> io::Result<()> {
    let fresh = directory.join(".state");
    fs::write(&fresh, serde_json::to_string_pretty(entry)? + "\n")?;
    fs::rename(fresh, directory.join(FILE))
}

/// Reads it.
pub fn read(directory: &Path) -> io::Result<Entry> {
    Ok(serde_json::from_slice(&fs::read(directory.join(FILE))?)?)
}

/// All restores, by their names.
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
        match read(&directory(id)) {
            Ok(entry) => found.push(entry),
            // it has just ended
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
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
