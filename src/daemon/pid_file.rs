//! The file that tells others the daemon's process ID, and that a daemon which wrote it still lives.
//!
//! While the daemon lives it holds a write lock (open file description, the whole file) on the file at that path. So a
//! file without such a lock is stale, whatever number is in it, and is replaced in one step; a second daemon finds the
//! lock and leaves the file alone. Only who may write the file can hold a write lock on it: a reader cannot keep a daemon
//! from starting. Nothing but a file that holds a process ID (or nothing) is ever replaced, and no symbolic link is
//! followed: the directory may belong to somebody else. Called by the daemon's start.

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// How often two daemons that start together may get in each other's way.
const ATTEMPTS: u32 = 100;
/// What a process ID can take, with blanks around it.
const MAX_BYTES: u64 = 32;

/// Which pid file is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None.
    None,
    /// This one, if it can be had: a warning otherwise.
    IfPossible(PathBuf),
    /// This one, or the daemon does not start.
    Required(PathBuf),
}

impl Wanted {
    /// The file.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Wanted::None => None,
            Wanted::IfPossible(path) | Wanted::Required(path) => Some(path),
        }
    }
}

/// A written and locked pid file; dropping it removes the file, unless another one is in its place meanwhile.
#[derive(Debug)]
#[must_use = "dropping it removes the file"]
pub struct PidFile {
    path: PathBuf,
    /// Holds the lock.
    file: File,
}

impl PidFile {
    /// Writes this process's ID. Readers see the old file or the whole new one, never a part.
    pub fn write(path: &Path) -> io::Result<PidFile> {
        for _ in 0..ATTEMPTS {
            // held until the new file is in place, so that of two daemons one sees the other
            let Some(stale) = claim(path)? else { continue };
            let Some(file) = put(path, stale.is_some())? else { continue };
            return Ok(PidFile { path: path.to_owned(), file });
        }
        Err(io::Error::other("other processes replace it all the time"))
    }

    fn in_place(&self) -> bool {
        is_at(&self.file, &self.path)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.in_place() || fs::remove_file(&self.path).is_ok() {
            return;
        }
        // After a change of user the directory may not be ours. An empty file names no process that could be signalled
        // by mistake, and the next daemon replaces it.
        if let Err(e) = self.file.set_len(0) {
            tracing::warn!("cannot remove or empty {}: {e}", self.path.display());
        }
    }
}

/// Locks the file that is at the path, after a look at whether it may be replaced. `Some(None)`: there is none.
/// `None`: it was replaced meanwhile.
fn claim(path: &Path) -> io::Result<Option<Option<File>>> {
    // O_NONBLOCK: a FIFO must not wait for its other end
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = match OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Some(None)),
        Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
            return Err(io::Error::other("it is a symbolic link; remove it, or name the file itself"));
        }
        Err(e) => return Err(e),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file; name another one"));
    }
    let held = lock(&file)?;
    let text = content(&file)?;
    if held {
        let who = text.trim();
        let who = if who.is_empty() { "another process".to_owned() } else { format!("process {who}") };
        return Err(io::Error::other(format!("{who} holds it, which is running; stop it, or name another file")));
    }
    let Ok(pid) = text.trim().parse::<u32>() else {
        if text.trim().is_empty() {
            return Ok(is_at(&file, path).then_some(Some(file)));
        }
        return Err(io::Error::other("it does not hold a process ID, so it is not replaced; name another file"));
    };
    if is_nbd_server(pid) {
        // it locks nothing, but whoever signals it finds it by this file
        let what = format!("it belongs to nbd-server, process {pid}, which is running; stop it, or name another file");
        return Err(io::Error::other(what));
    }
    Ok(is_at(&file, path).then_some(Some(file)))
}

fn is_nbd_server(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == "nbd-server")
}

/// At most [`MAX_BYTES`], as text.
fn content(file: &File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Writes a new file beside its place and moves it there. `None`: something came to be there meanwhile.
fn put(path: &Path, replace: bool) -> io::Result<Option<File>> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}.{}.new", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    let beside = PathBuf::from(beside);
    let create = || OpenOptions::new().read(true).write(true).create_new(true).open(&beside);
    let mut file = create().or_else(|e| match e.kind() {
        // left by a process of the same number that was killed
        io::ErrorKind::AlreadyExists => fs::remove_file(&beside).and_then(|()| create()),
        _ => Err(e),
    })?;
    let in_place = (|| {
        // whatever the umask: control planes that are not root read it too
        file.set_permissions(Permissions::from_mode(0o644))?;
        if lock(&file)? {
            return Err(io::Error::other("another process has locked the new file"));
        }
        file.write_all(format!("{}\n", std::process::id()).as_bytes())?;
        match replace {
            true => fs::rename(&beside, path).map(|()| true),
            // unlike a rename this does not replace what has come to be there
            false => match fs::hard_link(&beside, path) {
                Ok(()) => fs::remove_file(&beside).map(|()| true),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(e),
            },
        }
    })();
    if !matches!(in_place, Ok(true)) {
        // it is not in place and nobody else knows it
        drop(fs::remove_file(&beside));
    }
    Ok(in_place?.then_some(file))
}

/// Takes the write lock. True: another process holds it.
fn lock(file: &File) -> io::Result<bool> {
    let mut wanted = whole_file();
    match fcntl(file, FcntlArg::F_OFD_SETLK(&wanted)) {
        Ok(_) => return Ok(false),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => {}
        Err(e) => return Err(e.into()),
    }
    // a reader's lock is in the way, or a writer's; a read lock only meets writers
    wanted.l_type = libc::F_RDLCK as libc::c_short;
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut wanted))?;
    Ok(wanted.l_type != libc::F_UNLCK as libc::c_short)
}

fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0, // required for open file description locks
    }
}

/// Whether the file at the path is this one.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(ours), Ok(there)) = (file.metadata(), fs::symlink_metadata(path)) else {
        return false;
    };
    (ours.dev(), ours.ino()) == (there.dev(), there.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn ours() -> String {
        format!("{}\n", std::process::id())
    }

    fn refused(path: &Path) -> String {
        PidFile::write(path).expect_err("refused").to_string()
    }

    #[test]
    fn is_removed_unless_it_is_someone_elses() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("pid");
        let file = PidFile::write(&path).expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), ours());
        assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 1);
        drop(file);
        assert!(!path.exists());
        let file = PidFile::write(&path).expect("write");
        fs::remove_file(&path).expect("remove");
        fs::write(&path, "1\n").expect("another one");
        drop(file);
        assert_eq!(fs::read_to_string(&path).expect("read"), "1\n");
        assert!(PidFile::write(Path::new("/nowhere/at/all")).is_err());
    }

    #[test]
    fn a_held_file_is_left_alone_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("pid");
        let first = PidFile::write(&path).expect("write");
        let second = refused(&path);
        assert!(second.contains(&format!("process {} holds it", std::process::id())), "{second}");
        assert!(first.in_place());
        drop(first);
        for stale in ["", "\n", " 4194304 \n", &ours()] {
            fs::write(&path, stale).expect("stale");
            // somebody reads it, with a lock
            let reader = File::open(&path).expect("open");
            let shared = libc::flock { l_type: libc::F_RDLCK as libc::c_short, ..whole_file() };
            fcntl(&reader, FcntlArg::F_OFD_SETLK(&shared)).expect("read lock");
            let replaced = PidFile::write(&path).expect("replace");
            assert_eq!(fs::read_to_string(&path).expect("read"), ours());
            drop(replaced);
        }
    }

    #[test]
    fn what_is_no_pid_file_stays() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("precious");
        for precious in ["data", "12 13", "99999999999999999999999999999999999999999", "-1"] {
            fs::write(&path, precious).expect("write");
            assert!(refused(&path).contains("does not hold a process ID"), "{precious}");
            assert_eq!(fs::read_to_string(&path).expect("read"), precious);
        }
        let link = directory.path().join("link");
        fs::write(&path, "1").expect("write");
        symlink(&path, &link).expect("link");
        assert!(refused(&link).contains("symbolic link"));
        assert_eq!(fs::read_to_string(&path).expect("read"), "1");
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        assert!(refused(&fifo).contains("not a regular file"));
        assert!(PidFile::write(directory.path()).is_err());
    }

    #[test]
    fn of_many_that_start_together_one_has_it() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("pid");
        for stale in [false, true] {
            if stale {
                fs::write(&path, "4194304\n").expect("stale");
            }
            let all: Vec<_> = (0..8)
                .map(|_| {
                    let path = path.clone();
                    std::thread::spawn(move || PidFile::write(&path))
                })
                .collect();
            let all: Vec<_> = all.into_iter().map(|t| t.join().expect("no panic")).collect();
            assert_eq!(all.iter().filter(|written| written.is_ok()).count(), 1, "{all:?}");
            drop(all);
            assert_eq!(fs::read_dir(directory.path()).expect("list").count(), 0);
        }
    }
}
