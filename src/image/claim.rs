//! Block devices that a writer has for itself.
//!
//! The byte locks of [`super::lock`] say nothing to a kernel that mounts a device. So as long as an image has writers,
//! each of its block devices that is written is also claimed, by one descriptor opened with O_EXCL: the kernel grants
//! that to one holder only ([`crate::ring::Exclusive`]), and file systems, swap, device-mapper and md are such holders
//! (`kernel-notes/2026-11-23-exclusive-block-devices.md`). Readers claim nothing, as they harm nobody.

use super::holders::shown;
use super::{Error, mountinfo};
use nix::libc;
use nix::sys::stat::{major, minor};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Who looks whether a device is claimed has it for a moment, which must not be taken for a claim by our own threads.
static LOOKING: Mutex<()> = Mutex::new(());

/// Claims the device that is open as `file`: nobody else can mount or claim it until what this returns is closed.
pub(super) fn claim(path: &Path, file: &File) -> Result<File, Error> {
    let _no_look = LOOKING.lock().unwrap_or_else(PoisonError::into_inner);
    match open_exclusively(file, true) {
        Ok(file) => Ok(file),
        Err(e) if is_busy(&e) => Err(Error::Claimed { path: path.to_owned(), by: user_of(file) }),
        Err(source) => Err(Error::Io { path: path.to_owned(), action: "claim it for a writer", source }),
    }
}

/// What has the device for itself, if anything has. Asks by claiming it for a moment.
pub(super) fn claimed_by(file: &File) -> Option<String> {
    let _no_claim = LOOKING.lock().unwrap_or_else(PoisonError::into_inner);
    match open_exclusively(file, false) {
        Err(e) if is_busy(&e) => Some(user_of(file)),
        _ => None,
    }
}

/// Opens the device once more. Reading is enough for a claim, writing is what a writer also wants to do with it.
fn open_exclusively(file: &File, write: bool) -> io::Result<File> {
    let flags = libc::O_EXCL | libc::O_NONBLOCK | libc::O_CLOEXEC;
    File::options().read(true).write(write).custom_flags(flags).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn is_busy(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EBUSY)
}

/// What uses a device, for people.
fn user_of(file: &File) -> String {
    let unknown = || "another program, or the kernel, has it for itself".to_owned();
    let Ok(meta) = file.metadata() else { return unknown() };
    let device = meta.rdev();
    if let Some(found) = use_of(device) {
        return format!("it is {found}");
    }
    let parts = fs::read_dir(sys(device)).into_iter().flatten().filter_map(Result::ok);
    let used = parts.filter(|part| part.path().join("partition").exists()).find_map(|part| {
        let number = fs::read_to_string(part.path().join("dev")).ok().and_then(|text| parse_number(text.trim()))?;
        Some(format!("its partition {} is {}", part.file_name().display(), use_of(number)?))
    });
    used.unwrap_or_else(unknown)
}

fn use_of(device: u64) -> Option<String> {
    let is_it = |path: &Path| {
        // nothing but device nodes: asking for other paths may take forever
        let meta = path.starts_with("/dev").then(|| path.metadata().ok()).flatten();
        meta.is_some_and(|meta| meta.file_type().is_block_device() && meta.rdev() == device)
    };
    let number = number(device);
    let mounts = mountinfo::own().unwrap_or_default();
    if let Some(mount) = mounts.iter().find(|mount| mount.number == number || is_it(&mount.source)) {
        return Some(format!("mounted at {}", shown(&mount.at.to_string_lossy())));
    }
    if mountinfo::swaps().unwrap_or_default().iter().any(|space| is_it(space)) {
        return Some("used as swap".to_owned());
    }
    let holder = fs::read_dir(sys(device).join("holders")).ok()?.find_map(Result::ok)?.file_name();
    let holder = holder.to_string_lossy().into_owned();
    let name = fs::read_to_string(Path::new("/sys/block").join(&holder).join("dm/name")).ok();
    Some(match name {
        Some(name) => format!("part of {holder} ({})", name.trim()),
        None => format!("part of {holder}"),
    })
}

/// Where the kernel describes a block device.
fn sys(device: u64) -> PathBuf {
    Path::new("/sys/dev/block").join(number(device))
}

/// The number of a device as Linux writes it.
fn number(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

/// A device number as major:minor.
fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
}
