//! Listening Unix sockets with their files: bound by the frontends when the daemon starts.
//!
//! Promises: the file of a server that is no more is replaced, nothing else ever is; at the end our file is removed,
//! unless another one has taken its place; a mode that is asked for holds from the moment the file exists.

use nix::fcntl::AtFlags;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind as bind_to, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchownat};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tokio::net::UnixListener;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// A path that cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum UnixBindError {
    /// Something is at the path that must not be removed.
    #[error("cannot listen on {}: it exists and is not a socket; choose another path or remove it", .0.display())]
    NotASocket(PathBuf),
    /// Another process answers there.
    #[error("cannot listen on {}: another server is listening there", .0.display())]
    InUse(PathBuf),
    /// Anything else.
    #[error("cannot listen on {}: {source}", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens at a path. `mode`: of the file; `None`: as the umask has it. To be called inside a tokio runtime.
pub fn bind(path: &Path, mode: Option<Mode>) -> Result<(UnixListener, SocketFile), UnixBindError> {
    let fault = |source: io::Error| UnixBindError::Io { path: path.into(), source };
    remove_stale(path)?;
    let listening = || {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        if let Some(mode) = mode {
            // before it has a name: the file gets the socket's own mode when it is bound
            fchmod(&fd, mode)?;
        }
        bind_to(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        let file = SocketFile::at(path)?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok((UnixListener::from_std(fd.into())?, file))
    };
    listening().map_err(fault)
}

/// Removes the socket file of a server that is no more. Nothing else is ever removed.
fn remove_stale(path: &Path) -> Result<(), UnixBindError> {
    let fault = |source: io::Error| UnixBindError::Io { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fault(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(UnixBindError::NotASocket(path.into())),
        Ok(_) => {}
    }
    match knock(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(fault),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) if e.kind() != io::ErrorKind::WouldBlock => Err(fault(e)),
        // Connected, or its backlog is full.
        _ => Err(UnixBindError::InUse(path.into())),
    }
}

fn knock(path: &Path) -> io::Result<()> {
    let fd: OwnedFd =
        socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    Ok(connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?)
}

/// The file of our Unix socket. Dropping it removes the file, if it is still ours.
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn at(path: &Path) -> io::Result<Self> {
        Ok(SocketFile { path: path.into(), identity: identity(path)? })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the file to a user and a group. The directory may be somebody else's, who may have put another file there:
    /// only our socket is given away.
    pub fn give_to(&self, user: Option<Uid>, group: Gid) -> Result<(), UnixBindError> {
        let given = || {
            let flags = libc::O_PATH | libc::O_NOFOLLOW;
            let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(&self.path)?;
            let found = file.metadata()?;
            if (found.dev(), found.ino()) != self.identity || !found.file_type().is_socket() {
                return Err(io::Error::other("another file has taken its place"));
            }
            Ok(fchownat(&file, "", user, Some(group), AtFlags::AT_EMPTY_PATH)?)
        };
        given().map_err(|source| UnixBindError::Io { path: self.path.clone(), source })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // A file that stays behind is recognised as stale by the next server.
            drop(fs::remove_file(&self.path));
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn bind(path: &Path) -> Result<(UnixListener, SocketFile), UnixBindError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { super::bind(path, Some(Mode::from_bits_truncate(0o600))) })
    }

    #[test]
    fn a_stale_socket_is_replaced_and_ours_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind");
        let ours = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(bind(&path), Err(UnixBindError::InUse(_))));
        drop(ours);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_not_a_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(bind(&path), Err(UnixBindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let missing = dir.path().join("no/such/dir");
        assert!(matches!(bind(&missing), Err(UnixBindError::Io { .. })));
    }

    #[test]
    fn a_socket_that_replaced_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let ours = bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
        drop(other);
    }
}
