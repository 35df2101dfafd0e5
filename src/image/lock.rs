//! QEMU's image locks, so that its tools refuse what we hold and we refuse what they hold.
//!
//! QEMU (file-posix.c's documented protocol, `qemu-img(1)` "--force-share") marks each permission it uses with a shared
//! open-file-description lock on byte 100 + n of the image, and each permission it does not let others have with one on
//! byte 200 + n; n is 0 for consistent read, 1 for write, 3 for resize. After taking its own marks it asks whether
//! somebody else's contradict them. The locks belong to the open file and end when it is closed, however that happens.

use super::holders::Conflict;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

const USES: i64 = 100;
const DENIES: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Why a lock was not granted.
#[derive(Debug)]
pub enum Refused {
    /// Another open file holds a contradicting mark for this permission.
    Conflict {
        /// The permission.
        lock: &'static str,
        /// What the kernel says of the mark.
        conflict: Conflict,
    },
    /// The file system cannot lock.
    Io(io::Error),
}

/// Takes a reader's lock: others may read, nobody may write.
pub fn share(file: &File) -> Result<(), Refused> {
    take(file, &[USES + READ, DENIES + WRITE, DENIES + RESIZE], &[DENIES + READ, USES + WRITE, USES + RESIZE])
}

/// Adds a writer's lock to a reader's: others who deny writing, as every QEMU tool does without `--force-share`, and we
/// exclude each other.
pub fn add_write(file: &File) -> Result<(), Refused> {
    take(file, &[USES + WRITE, USES + RESIZE], &[DENIES + WRITE, DENIES + RESIZE])
}

/// Goes back from a writer's lock to a reader's.
pub fn drop_write(file: &File) -> io::Result<()> {
    for byte in [USES + WRITE, USES + RESIZE] {
        set(file, byte, libc::F_UNLCK)?;
    }
    Ok(())
}

fn take(file: &File, marks: &[i64], contradicting: &[i64]) -> Result<(), Refused> {
    let result = marks
        .iter()
        .try_for_each(|&byte| mark(file, byte))
        .and_then(|()| contradicting.iter().try_for_each(|&byte| check(file, byte)));
    if result.is_err() {
        for &byte in marks {
            // best effort: closing the file unlocks it too
            let _ = set(file, byte, libc::F_UNLCK);
        }
    }
    result
}

/// Takes one mark. Marks are shared: only somebody who locks these bytes for another purpose is in the way.
fn mark(file: &File, byte: i64) -> Result<(), Refused> {
    set(file, byte, libc::F_RDLCK).map_err(|e| match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EAGAIN | Errno::EACCES) => {
            check(file, byte).err().unwrap_or_else(|| conflict(file, byte, -1)) // let go meanwhile
        }
        _ => Refused::Io(e),
    })
}

fn conflict(file: &File, byte: i64, pid: i32) -> Refused {
    let lock = match byte % 100 {
        READ => "read",
        WRITE => "write",
        _ => "resize",
    };
    Refused::Conflict { lock, conflict: Conflict::note(file, byte, pid) }
}

fn set(file: &File, byte: i64, kind: libc::c_int) -> io::Result<()> {
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&request(byte, kind)))?;
    Ok(())
}

fn check(file: &File, byte: i64) -> Result<(), Refused> {
    let mut request = request(byte, libc::F_WRLCK);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut request)).map_err(|e| Refused::Io(e.into()))?;
    if i32::from(request.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    Err(conflict(file, byte, request.l_pid))
}

fn request(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_or_many_readers() {
        let f = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(f.path()).unwrap();
        let (a, b) = (open(), open());
        share(&a).unwrap();
        share(&b).unwrap();
        assert!(matches!(add_write(&a), Err(Refused::Conflict { lock: "write", .. })));
        drop(b);
        add_write(&a).unwrap();
        let c = open();
        assert!(matches!(share(&c), Err(Refused::Conflict { lock: "write", .. })));
        drop_write(&a).unwrap();
        share(&c).unwrap();
    }

    #[test]
    fn a_lock_for_another_purpose_is_a_conflict_too() {
        let f = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(f.path()).unwrap();
        let other = open();
        set(&other, USES + READ, libc::F_WRLCK).unwrap();
        assert!(matches!(share(&open()), Err(Refused::Conflict { lock: "read", .. })));
        drop(other);
        share(&open()).unwrap();
    }
}
