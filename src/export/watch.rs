//! Which files of a directory have changed, without looking at each: inotify(7).
//!
//! Looking at ten thousand files costs more than reading one. The watch is a shortcut, never the truth: where it cannot
//! know (another file system, a full queue, no watches left, another directory under the same path) it says so, and
//! every file is looked at. Called by `export::load`.

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs,
};
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// File systems that only this machine writes, so that inotify hears of every change.
const LOCAL: [FsType; 5] = [BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC];

/// A watched directory.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    directory: PathBuf,
    identity: (u64, u64),
}

impl Watch {
    /// Watches a directory from now on. Errors: it cannot be watched, or not be relied on.
    pub(super) fn new(directory: &Path) -> io::Result<Watch> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ATTRIB;
        inotify.add_watch(directory, changes | AddWatchFlags::IN_ONLYDIR)?;
        if !LOCAL.contains(&statfs(directory)?.filesystem_type()) {
            return Err(io::Error::other("others may change this file system unnoticed"));
        }
        Ok(Watch { inotify, directory: directory.to_owned(), identity: identity(directory)? })
    }

    /// The names of files that were touched since this was last asked. `None`: not known, look at all of them and make
    /// a new watch first.
    pub(super) fn touched(&self, directory: &Path) -> Option<BTreeSet<OsString>> {
        if directory != self.directory || identity(directory).ok()? != self.identity {
            return None;
        }
        let mut names = BTreeSet::new();
        loop {
            match self.inotify.read_events() {
                // without a name it is about the watch itself: its queue ran over, or the directory has gone
                Ok(events) => {
                    for event in events {
                        let about_itself = AddWatchFlags::IN_Q_OVERFLOW | AddWatchFlags::IN_IGNORED;
                        match event.name {
                            _ if event.mask.intersects(about_itself) => return None,
                            Some(name) => drop(names.insert(name)),
                            None => {}
                        }
                    }
                }
                Err(nix::errno::Errno::EAGAIN) => return Some(names),
                Err(_) => return None,
            }
        }
    }
}

fn identity(directory: &Path) -> io::Result<(u64, u64)> {
    directory.metadata().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn tells_what_was_touched_since_it_was_asked() {
        let dir = tempfile::tempdir().expect("directory");
        let path = |name: &str| dir.path().join(name);
        fs::write(path("old"), "1").expect("write");
        let watch = Watch::new(dir.path()).expect("watch");
        let touched = || watch.touched(dir.path()).expect("known").into_iter().collect::<Vec<_>>();
        assert!(touched().is_empty());
        fs::write(path("old"), "2").expect("write");
        fs::write(path("new"), "").expect("write");
        assert_eq!(touched(), ["new", "old"]);
        fs::rename(path("new"), path("newer")).expect("rename");
        fs::remove_file(path("old")).expect("remove");
        assert_eq!(touched(), ["new", "newer", "old"]);
        assert!(touched().is_empty());
    }

    #[test]
    fn says_when_it_does_not_know() {
        let dir = tempfile::tempdir().expect("directory");
        let (path, other) = (dir.path().join("conf.d"), dir.path().join("other"));
        fs::create_dir(&path).expect("directory");
        let watch = Watch::new(&path).expect("watch");
        assert!(watch.touched(&other).is_none());
        fs::rename(&path, &other).expect("rename");
        assert!(watch.touched(&path).is_none(), "there is none");
        fs::create_dir(&path).expect("directory");
        assert!(watch.touched(&path).is_none(), "there is another one");
        let watch = Watch::new(&path).expect("watch");
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("limit");
        for i in 0..=limit.trim().parse::<usize>().expect("number") / 2 {
            let file = path.join((i % 1000).to_string());
            fs::write(&file, "").and_then(|()| fs::remove_file(&file)).expect("file");
        }
        assert!(watch.touched(&path).is_none(), "its queue ran over");
        assert!(Watch::new(Path::new("/proc/self")).is_err());
        assert!(Watch::new(&dir.path().join("nowhere")).is_err());
    }
}
