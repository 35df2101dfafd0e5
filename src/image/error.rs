//! Why an image cannot be opened or made: always with its path, and what to do.

use super::Format;
use super::holders::{Conflict, Holders};
use crate::qcow2::HeaderError;
use crate::qcow2::compress::Compression;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// An image that cannot be opened, created or described.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call on the file failed.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{}: is a {kind}; only regular files and block devices can be served", path.display())]
    FileType {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The header does not describe an image we can serve.
    #[error("{}: {source}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// A table outside the header is broken.
    #[error("{}: {why}", path.display())]
    Broken {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The image must not be written.
    #[error("{}: cannot be opened for writing: {why}", path.display())]
    NotWritable {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        why: &'static str,
    },
    /// The backing file's format is not in the header.
    #[error(
        "{}: names the backing file {backing:?} without its format, which is not guessed; \
         store it with `qemu-img rebase -u -b {backing} -F FORMAT {}`", path.display(), path.display()
    )]
    NoBackingFormat {
        /// The overlay.
        path: PathBuf,
        /// The name it stores.
        backing: String,
    },
    /// The backing file's name or format is one we do not follow.
    #[error("{}: backing file {backing:?}: {why}", path.display())]
    Backing {
        /// The overlay.
        path: PathBuf,
        /// The name it stores.
        backing: String,
        /// Why it is refused, and what to do.
        why: String,
    },
    /// The external data file's name is one we do not follow.
    #[error("{}: external data file {data_file:?}: {why}", path.display())]
    DataFile {
        /// The image.
        path: PathBuf,
        /// The name it stores.
        data_file: String,
        /// Why it is refused, and what to do.
        why: String,
    },
    /// The bitmaps cannot be listed or changed like that.
    #[error("{}: {why}", path.display())]
    Bitmaps {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// An internal snapshot that cannot be opened.
    #[error("{}: snapshot {snapshot:?}: {why}", path.display())]
    Snapshot {
        /// The image.
        path: PathBuf,
        /// The snapshot asked for.
        snapshot: String,
        /// Why it cannot be opened.
        why: String,
    },
    /// Another program uses the file.
    #[error("{}: is in use by {holders}: its {lock} lock is held; {remedy}", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Which of QEMU's permissions clashes.
        lock: &'static str,
        /// Where to look for the holders.
        conflict: Box<Conflict>,
        /// Who holds it, as far as that was looked for: see [`Error::with_holders`].
        holders: Box<Holders>,
        /// What to do.
        remedy: &'static str,
    },
    /// Clients that need the image as it is and clients that write it exclude each other.
    #[error("{}: {why}", path.display())]
    Busy {
        /// The image.
        path: PathBuf,
        /// Who is there, and what to do.
        why: &'static str,
    },
    /// There is no place for a temporary layer.
    #[error(
        "{}: cannot keep what a client of a `copyonwrite` export writes in this directory: {source}; name another one \
         with `cowdir`", dir.display()
    )]
    Scratch {
        /// The directory.
        dir: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another program, or the kernel, has the block device for itself.
    #[error("{}: the device is not free: {by}; free it first, only readers can share it", path.display())]
    Claimed {
        /// The device.
        path: PathBuf,
        /// What has it.
        by: String,
    },
    /// The export asks for a way of compressing that the image does not have.
    #[error(
        "{}: `compress = {}`, but {}", path.display(), wanted.name(),
        can.map_or("an image with an external data file cannot hold compressed clusters; remove the key".to_owned(),
            |can| format!("its header says {0}; write `compress = {0}`, or make the image with that compression type", can.name()))
    )]
    Compression {
        /// The image.
        path: PathBuf,
        /// What the export asks for.
        wanted: Compression,
        /// What the image holds.
        can: Option<Compression>,
    },
    /// One file is wanted in two formats at the same time.
    #[error("{}: is being served as {served}, it cannot be served as {wanted} at the same time", path.display())]
    TwoFormats {
        /// The file.
        path: PathBuf,
        /// The format in use.
        served: Format,
        /// The format asked for.
        wanted: Format,
    },
    /// Reading or writing the disk failed somewhere in the middle.
    #[error("{}: cannot {action} at byte {at} of the disk: {source}", path.display())]
    Transfer {
        /// The image.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Where on the disk.
        at: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The user ended it.
    #[error("{}: stopped by a signal; nothing is left behind", path.display())]
    Stopped {
        /// What was being made.
        path: PathBuf,
    },
    /// The image is not to be changed this way.
    #[error("{}: {why}", path.display())]
    Refused {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// A new image cannot be as wished.
    #[error("{}: {why}", path.display())]
    Create {
        /// The image.
        path: PathBuf,
        /// What is wrong with the wish, and what is possible.
        why: String,
    },
}

impl Error {
    /// Somebody uses the file in a way that excludes ours, which may end.
    pub fn is_in_use(&self) -> bool {
        matches!(self, Error::Locked { .. } | Error::Claimed { .. } | Error::Busy { .. })
    }

    /// Looks who holds the lock that this error is about, if it is about one, to say it with the error. Call it once, when
    /// the error is reported: the search takes a while, which the other tasks of this thread do not notice.
    pub async fn with_holders(self) -> Error {
        let Error::Locked { conflict, .. } = &self else { return self };
        let conflict = conflict.clone();
        match tokio::task::spawn_blocking(move || conflict.holders()).await {
            Ok(found) => self.held_by(found),
            Err(_) => self, // the runtime ends
        }
    }

    fn held_by(mut self, found: Holders) -> Error {
        if let Error::Locked { holders, remedy, .. } = &mut self {
            **holders = found;
            if holders.only_ourselves() {
                *remedy = "disconnect the clients there first";
            }
        }
        self
    }

    /// The same error of a command that a user runs, not of a server.
    pub(super) fn of_a_command(mut self) -> Error {
        let Error::Locked { conflict, remedy, .. } = &mut self else { return self };
        *remedy = "stop that program first";
        let found = conflict.holders();
        self.held_by(found)
    }

    pub(super) fn io(path: &std::path::Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    }
}
