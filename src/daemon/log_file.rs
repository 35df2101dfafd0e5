//! `--log-file`: the log in a file that can be rotated.
//!
//! Whole lines are appended. After the file was moved away, [`LogFile::reopen`] goes on in a new one of the old name; when
//! that fails, in the old one. The directory may belong to the user that the daemon becomes: as root, no link is followed.
//! Made by `cowgate serve`; the daemon's signals call `reopen`.

use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An open log file.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: Mutex<File>,
}

impl LogFile {
    /// Opens or creates it. The path is best absolute, for a later `reopen`.
    pub fn open(path: &Path) -> io::Result<LogFile> {
        Ok(LogFile { path: path.to_owned(), file: Mutex::new(open(path)?) })
    }

    /// Opens the file of that name anew if it is not the open one any more. A failure is logged, to the old file.
    pub fn reopen(&self) {
        if self.in_place() {
            return;
        }
        match open(&self.path) {
            Ok(file) => *self.file() = file,
            Err(e) => tracing::warn!(
                "cannot open the log file {} anew, still writing to the old one: {e}",
                self.path.display()
            ),
        }
    }

    fn in_place(&self) -> bool {
        let (Ok(ours), Ok(there)) = (self.file().metadata(), fs::symlink_metadata(&self.path)) else {
            return false;
        };
        (ours.dev(), ours.ino()) == (there.dev(), there.ino())
    }

    fn file(&self) -> MutexGuard<'_, File> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // all of it under one lock: lines of several threads do not mix
        self.file().write_all(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().append(true).create(true).mode(0o640).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io::Error::other("it is not a regular file with one name; choose another one"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_in_a_new_file_when_the_old_one_was_moved() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("log");
        let moved = directory.path().join("log.1");
        let read = |path: &Path| fs::read_to_string(path).expect("read");
        fs::write(&path, "earlier\n").expect("write");
        let log = LogFile::open(&path).expect("open");
        let say = |line: &str| (&log).write_all(line.as_bytes()).expect("write");
        say("one\n");
        log.reopen();
        fs::rename(&path, &moved).expect("rotate");
        say("two\n");
        log.reopen();
        say("three\n");
        assert_eq!((read(&moved).as_str(), read(&path).as_str()), ("earlier\none\ntwo\n", "three\n"));
        // a new one cannot be had
        fs::rename(&path, &moved).expect("rotate");
        std::os::unix::fs::symlink(&moved, &path).expect("link");
        log.reopen();
        say("four\n");
        assert_eq!(read(&moved), "three\nfour\n");
    }

    #[test]
    fn only_a_file_of_its_own_is_written() {
        let directory = tempfile::tempdir().expect("directory");
        let precious = directory.path().join("precious");
        fs::write(&precious, "data").expect("write");
        let at = |name: &str| directory.path().join(name);
        std::os::unix::fs::symlink(&precious, at("symlink")).expect("link");
        fs::hard_link(&precious, at("hard link")).expect("link");
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        for name in ["symlink", "hard link", "fifo", "no/where", "."] {
            assert!(LogFile::open(&at(name)).is_err(), "{name}");
        }
        assert_eq!(fs::read(&precious).expect("read"), b"data");
    }
}
