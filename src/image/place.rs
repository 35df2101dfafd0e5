//! A new file that appears at its place whole or not at all: written beside it, made durable, then moved there.

use super::shared::locked;
use super::{Error, lock};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::libc;
use nix::unistd::linkat;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file under a temporary name or none, removed when dropped.
#[must_use = "dropping it removes the file"]
pub(super) struct NewFile {
    path: PathBuf,
    /// `None`: it has no name yet, so that not even SIGKILL leaves something behind.
    temporary: Option<PathBuf>,
    file: File,
    replace: bool,
    placed: bool,
}

impl NewFile {
    /// Creates the temporary file. Refused when `path` exists and is not to be replaced.
    pub fn create(path: &Path, replace: bool) -> Result<NewFile, Error> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let refuse = |why: &str| Error::Create { path: path.to_owned(), why: why.to_owned() };
        if !replace && path.symlink_metadata().is_ok() {
            return Err(refuse("exists already; give --force to replace it"));
        }
        match path.metadata() {
            Ok(meta) if replace && meta.is_file() => check_unused(path)?,
            Ok(_) if replace => {
                return Err(refuse("is no regular file; a new image takes the place of regular files only"));
            }
            _ => {}
        }
        let Some(name) = path.file_name() else { return Err(refuse("is not a file name")) };
        // file systems allow names of 255 bytes
        let mut temporary = OsStr::from_bytes(&name.as_bytes()[..name.len().min(200)]).to_owned();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        temporary.push(format!(".new-{}-{number}", std::process::id()));
        let temporary = dir_of(path).join(temporary);
        let file = File::options().read(true).write(true).create_new(true).open(&temporary);
        let file = file.map_err(Error::io(path, "create it"))?;
        Ok(NewFile { path: path.to_owned(), temporary: Some(temporary), file, replace, placed: false })
    }

    /// The same, never in the place of another file, and without a name where the file system can do that. Such a file
    /// has no temporary name to be opened by.
    pub fn unnamed(path: &Path) -> Result<NewFile, Error> {
        if path.file_name().is_none() || path.symlink_metadata().is_ok() {
            return NewFile::create(path, false); // which refuses it
        }
        let options = File::options().read(true).write(true).custom_flags(libc::O_TMPFILE).open(dir_of(path));
        match options {
            Ok(file) => Ok(NewFile { path: path.to_owned(), temporary: None, file, replace: false, placed: false }),
            // what the kernel and file systems say that do not know such files
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
                NewFile::create(path, false)
            }
            Err(e) => Err(Error::io(path, "create it")(e)),
        }
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its temporary name; its own, if it has none yet.
    pub fn temporary(&self) -> &Path {
        self.temporary.as_deref().unwrap_or(&self.path)
    }

    /// Makes the file durable and moves it to its place.
    pub fn put_in_place(mut self) -> Result<PathBuf, Error> {
        self.place().map_err(Error::io(&self.path, "create it"))?;
        Ok(self.path.clone())
    }

    fn place(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match &self.temporary {
            Some(temporary) if self.replace => std::fs::rename(temporary, &self.path)?,
            // unlike rename, a hard link never replaces a file that appeared meanwhile
            Some(temporary) => {
                std::fs::hard_link(temporary, &self.path)?;
                std::fs::remove_file(temporary)?;
            }
            None => {
                let here = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(AT_FDCWD, here.as_str(), AT_FDCWD, &self.path, AtFlags::AT_SYMLINK_FOLLOW)?;
            }
        }
        self.placed = true;
        File::open(dir_of(&self.path))?.sync_all()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let (Some(temporary), false) = (&self.temporary, self.placed) {
            let _ = std::fs::remove_file(temporary); // nothing more can be done for a leftover
        }
    }
}

/// Refuses to replace an image that somebody uses: they would go on with a file that nobody finds any more.
fn check_unused(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io(path, "open it"))?;
    let taken = lock::share(&file).and_then(|()| lock::add_write(&file));
    taken.map_err(|refused| locked(path, refused).of_a_command())
}

/// Where a file that an image names is: a relative name is relative to the image's directory.
pub(super) fn beside(image: &Path, name: &Path) -> PathBuf {
    dir_of(image).join(name)
}

fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}
