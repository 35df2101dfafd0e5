//! Who holds a lock that we were refused: looked for once, when the refusal is reported.
//!
//! The kernel does not tell the owner of an open-file-description lock: /proc/locks shows the process id -1 for it. But
//! /proc/PID/fdinfo/FD lists the locks of every open file of the processes that we may examine
//! (`kernel-notes/2026-11-23-who-holds-a-lock.md`). What is found is for people only: a holder in another container,
//! of another user or gone by now is not found, which is no error. The work is bounded in time and in files.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the search goes on.
const PATIENCE: Duration = Duration::from_millis(300);
/// Open files that are looked at.
const MAX_FILES: usize = 200_000;
/// Holders that are named.
const MAX_NAMED: usize = 3;
/// What is read of /proc/locks, in bytes: tens of thousands of locks.
const MAX_LOCKS_BYTES: u64 = 4 << 20;
/// What is read of one open file's description, in bytes: its locks come first.
const MAX_INFO_BYTES: u64 = 8 << 10;
/// What is shown of a name that another process chose, in characters.
const MAX_SHOWN: usize = 256;

/// A lock that somebody else holds, as far as the kernel told us when it was refused.
#[derive(Clone, Debug)]
pub struct Conflict {
    /// The file's `device:inode`, as the kernel writes it in its lists of locks.
    inode: String,
    /// Where the file is, to tell when its holder knows it by another name.
    path: PathBuf,
    /// The byte whose lock contradicts.
    byte: i64,
    /// The owner, if it is one of the old locks that belong to a process.
    pid: Option<i32>,
}

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: i32,
    name: String,
    /// The file's name there, when that is another one.
    known_as: Option<String>,
}

/// Everybody who was found holding a lock.
#[derive(Clone, Debug, Default)]
pub struct Holders {
    others: Vec<Holder>,
    ourselves: bool,
    more: bool,
}

/// One line of a list of locks.
#[derive(Debug, PartialEq, Eq)]
struct Listed<'a> {
    /// Process id; -1 for a lock that belongs to an open file.
    pid: i32,
    inode: &'a str,
    first: i64,
    last: i64,
}

impl Conflict {
    /// Takes down what is known while `file` is still open; `pid`: as the kernel answered, -1 for not known.
    pub(super) fn note(file: &File, byte: i64, pid: i32) -> Conflict {
        let fd = file.as_raw_fd();
        // our own locks are listed with the very words that the kernel has for this file: on some file systems stat
        // gives another device number
        let own = head(Path::new(&format!("/proc/self/fdinfo/{fd}")), MAX_INFO_BYTES).unwrap_or_default();
        let inode = own.lines().find_map(listed_in_fdinfo).map(|lock| lock.inode.to_owned());
        let by_stat = || {
            let meta = file.metadata().ok()?;
            let (major, minor) = (nix::sys::stat::major(meta.dev()), nix::sys::stat::minor(meta.dev()));
            Some(format!("{major:02x}:{minor:02x}:{}", meta.ino()))
        };
        Conflict {
            inode: inode.or_else(by_stat).unwrap_or_default(),
            path: std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default(),
            byte,
            pid: (pid > 0).then_some(pid),
        }
    }

    /// Looks for the holders. Reads much of /proc: not for a thread that others wait for.
    pub fn holders(&self) -> Holders {
        let mut holders = Holders::default();
        let me = std::process::id() as i32;
        let Some(locks) = head(Path::new("/proc/locks"), MAX_LOCKS_BYTES) else { return holders };
        let listed: Vec<_> = locks.lines().filter_map(listed).filter(|lock| self.contradicts(lock)).collect();
        for pid in self.pid.into_iter().chain(listed.iter().map(|lock| lock.pid).filter(|&pid| pid > 0)) {
            holders.add(pid, me, None);
        }
        if listed.iter().any(|lock| lock.pid <= 0) {
            self.search_open_files(me, &mut holders);
        }
        holders
    }

    fn search_open_files(&self, me: i32, holders: &mut Holders) {
        let (start, mut left) = (Instant::now(), MAX_FILES);
        let Ok(processes) = std::fs::read_dir("/proc") else { return };
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        for pid in pids {
            // not ours to examine, or gone
            let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { continue };
            for info in files.filter_map(Result::ok) {
                left -= 1;
                if left == 0 || start.elapsed() > PATIENCE || holders.full() {
                    return;
                }
                let text = head(&info.path(), MAX_INFO_BYTES).unwrap_or_default();
                if text.lines().filter_map(listed_in_fdinfo).any(|lock| self.contradicts(&lock)) {
                    let fd = info.file_name();
                    let path = std::fs::read_link(format!("/proc/{pid}/fd/{}", fd.display())).ok();
                    holders.add(pid, me, path.filter(|path| *path != self.path));
                    break;
                }
            }
        }
    }

    fn contradicts(&self, lock: &Listed<'_>) -> bool {
        lock.inode == self.inode && (lock.first..=lock.last).contains(&self.byte)
    }
}

impl Holders {
    fn add(&mut self, pid: i32, me: i32, path: Option<PathBuf>) {
        if pid == me {
            self.ourselves = true;
        } else if self.others.iter().any(|holder| holder.pid == pid) {
        } else if self.others.len() == MAX_NAMED {
            self.more = true;
        } else {
            let name = head(Path::new(&format!("/proc/{pid}/comm")), 64).unwrap_or_default();
            let name = if name.trim().is_empty() { "a program".to_owned() } else { shown(name.trim()) };
            self.others.push(Holder { pid, name, known_as: path.map(|path| shown(&path.to_string_lossy())) });
        }
    }

    fn full(&self) -> bool {
        self.more
    }

    /// Nobody but this process itself holds it, as far as could be seen.
    pub fn only_ourselves(&self) -> bool {
        self.ourselves && self.others.is_empty()
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names: Vec<String> = Vec::new();
        if self.ourselves {
            names.push("this very process (for another export, or as part of another image's chain)".to_owned());
        }
        names.extend(self.others.iter().map(|Holder { pid, name, known_as }| match known_as {
            Some(path) => format!("{name} (pid {pid}, as {path})"),
            None => format!("{name} (pid {pid})"),
        }));
        if self.more {
            names.push("more".to_owned());
        }
        match names.pop() {
            None => f.write_str("another program"),
            Some(last) if names.is_empty() => f.write_str(&last),
            Some(last) => write!(f, "{} and {last}", names.join(", ")),
        }
    }
}

/// What another program calls itself, or a file, fit for a line of a log.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// The beginning of a file of /proc.
fn head(path: &Path, limit: u64) -> Option<String> {
    let mut bytes = Vec::new();
    // an error after the beginning leaves the beginning
    let _ = File::open(path).ok()?.take(limit).read_to_end(&mut bytes);
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A line of /proc/PID/fdinfo/FD, if it is about a lock.
fn listed_in_fdinfo(line: &str) -> Option<Listed<'_>> {
    listed(line.strip_prefix("lock:")?)
}

/// A line of /proc/locks, if it is about a lock on bytes that is held: not one that is waited for, no lease, no flock.
fn listed(line: &str) -> Option<Listed<'_>> {
    let mut words = line.split_whitespace();
    let _number = words.next()?;
    if !matches!(words.next()?, "OFDLCK" | "POSIX") {
        return None;
    }
    let (_mode, _access) = (words.next()?, words.next()?);
    let pid = words.next()?.parse().ok()?;
    let inode = words.next().filter(|inode| inode.split(':').count() == 3)?;
    let first = words.next()?.parse().ok()?;
    let last = match words.next()? {
        "EOF" => i64::MAX,
        last => last.parse().ok()?,
    };
    Some(Listed { pid, inode, first, last })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::lock::{self, Refused};
    use std::process::{Command, Stdio};

    #[test]
    fn lines_as_linux_writes_them() {
        let ofd = Listed { pid: -1, inode: "fe:00:10166285", first: 100, last: 101 };
        assert_eq!(listed("4: OFDLCK ADVISORY  READ -1 fe:00:10166285 100 101"), Some(ofd));
        let ofd = Listed { pid: -1, inode: "00:06:94", first: 100, last: 100 };
        assert_eq!(listed_in_fdinfo("lock:\t1: OFDLCK ADVISORY  READ -1 00:06:94 100 100"), Some(ofd));
        let posix = Listed { pid: 1166, inode: "103:02:9", first: 0, last: i64::MAX };
        assert_eq!(listed("12: POSIX  ADVISORY  WRITE 1166 103:02:9 0 EOF"), Some(posix));
        for other in [
            "2: FLOCK  ADVISORY  WRITE 716 00:1a:1166 0 EOF",
            "12: -> POSIX  ADVISORY  WRITE 1166 103:02:9 0 EOF",
            "3: LEASE  ACTIVE    READ  716 00:1a:1166 0 EOF",
            "5: POSIX  *NOINODE* READ  716 <none>:0 0 EOF",
            "6: OFDLCK ADVISORY  READ -1 fe:00:1",
            "7: OFDLCK ADVISORY  READ -1 fe:00:1 x 3",
            "flags:\t02100002",
            "",
        ] {
            assert_eq!(listed(other), None, "{other}");
            assert_eq!(listed_in_fdinfo(other), None, "{other}");
        }
    }

    #[test]
    fn names_are_fit_for_a_line() {
        let holder = |pid, name: &str, path: Option<&str>| Holder { pid, name: shown(name), known_as: path.map(shown) };
        let mut holders = Holders::default();
        assert_eq!(holders.to_string(), "another program");
        holders.others.push(holder(7, "evil\nname\x1b[2J", None));
        assert_eq!(holders.to_string(), "evil?name?[2J (pid 7)");
        holders.others.push(holder(8, "qemu-nbd", Some("/srv/other name")));
        holders.more = true;
        assert_eq!(holders.to_string(), "evil?name?[2J (pid 7), qemu-nbd (pid 8, as /srv/other name) and more");
        assert_eq!(shown(&"x".repeat(5000)).len(), MAX_SHOWN);
    }

    fn conflict(path: &Path) -> Conflict {
        let file = File::options().read(true).write(true).open(path).unwrap();
        match lock::share(&file).and_then(|()| lock::add_write(&file)) {
            Err(Refused::Conflict { conflict, .. }) => conflict,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn holders_are_found() {
        let f = tempfile::NamedTempFile::new().unwrap();
        let ours = File::open(f.path()).unwrap();
        lock::share(&ours).unwrap();
        let refused = conflict(f.path());
        assert!(refused.holders().only_ourselves(), "{:?}", refused.holders());
        // the child inherits the open file, and with it the lock
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let both = conflict(f.path()).holders();
        drop(ours);
        let moved = f.path().with_extension("moved");
        std::fs::hard_link(f.path(), &moved).unwrap();
        let (theirs, renamed) = (conflict(f.path()).holders(), conflict(&moved).holders());
        std::fs::remove_file(&moved).unwrap();
        let pid = child.id();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(both.ourselves && !both.only_ourselves(), "{both}");
        assert!(both.to_string().ends_with(&format!(" and sleep (pid {pid})")), "{both}");
        assert_eq!(theirs.to_string(), format!("sleep (pid {pid})"));
        assert_eq!(renamed.to_string(), format!("sleep (pid {pid}, as {})", f.path().display()));
        assert_eq!(refused.holders().to_string(), "another program", "nobody is left");
    }

    /// The locks of processes, not of open files, that programs older than those have.
    #[test]
    fn a_lock_that_belongs_to_a_process_names_it() {
        let f = tempfile::NamedTempFile::new().unwrap();
        let program = "import fcntl, sys\nf = open(sys.argv[1], 'r+b')\nfcntl.lockf(f, fcntl.LOCK_EX)\n\
                       print('on', flush=True)\nsys.stdin.read()";
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", program])
            .arg(f.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0; 3]).unwrap();
        let said = conflict(f.path()).holders().to_string();
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(said, format!("python3 (pid {})", child.id()));
    }
}
