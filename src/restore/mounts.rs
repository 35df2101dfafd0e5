//! The mounts of this process's namespace.

use super::disk::Disk;
use super::layout::Driver;
use crate::image::mountinfo::{self, Mount};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Why something is still mounted.
#[derive(Debug, thiserror::Error)]
pub enum Stays {
    /// Unmounting takes what is on top, which is somebody else's.
    #[error("something else is mounted over {}: unmount that first", .0.display())]
    Covered(PathBuf),
    /// Somebody uses it.
    #[error("{at} is in use: fuser -vm {at} shows by whom; or use --force, and they get errors", at = .0.display())]
    InUse(PathBuf),
    /// The kernel does not do it.
    #[error("{at} cannot be unmounted: {1}", at = .0.display())]
    Refused(PathBuf, Errno),
}

/// Where a disk is mounted, the last mount first. What is mounted from a later disk of the same node is not.
pub fn of(disk: &Disk) -> Vec<Mount> {
    if disk.is_replaced() {
        return Vec::new();
    }
    let mounts = mountinfo::own().unwrap_or_default().into_iter().rev();
    mounts.filter(|mount| mount.source == disk.device).collect()
}

/// Whether something is mounted at a directory, which is given without links.
pub fn is_mount_point(directory: &Path) -> io::Result<bool> {
    Ok(mountinfo::own()?.iter().any(|mount| mount.at == directory))
}

/// Mounts a device with the first of these drivers that the kernel has. Nothing on it is run, is a device, or gives rights.
pub fn attach(device: &Path, at: &Path, drivers: &[Driver], writable: bool) -> Result<(), Errno> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let flags = if writable { safe } else { safe | MsFlags::MS_RDONLY };
    for driver in drivers {
        match mount(Some(device), at, Some(driver.name), flags, Some(driver.options(writable).as_str())) {
            Err(Errno::ENODEV) => {}
            answer => return answer,
        }
    }
    Err(Errno::ENODEV)
}

/// Unmounts a disk wherever it is mounted, and says whether somebody used it. `force`: who uses it keeps what is open, and
/// it goes from the tree all the same. An error tells of the first place where it stays; it is gone from the others.
pub fn unmount(disk: &Disk, force: bool) -> Result<bool, Stays> {
    let mut was_in_use = false;
    let mut stays = None;
    for mount in of(disk) {
        match detach(&mount, force) {
            Ok(in_use) => was_in_use |= in_use,
            // somebody else was faster
            Err(_) if !of(disk).contains(&mount) => {}
            Err(why) => stays = stays.or(Some(why)),
        }
    }
    stays.map_or(Ok(was_in_use), Err)
}

fn detach(mount: &Mount, force: bool) -> Result<bool, Stays> {
    let at = &mount.at;
    if on_top(at).ok() != Some(mount.id) {
        return Err(Stays::Covered(at.clone()));
    }
    let unmount = |flags| umount2(at, MntFlags::UMOUNT_NOFOLLOW | flags);
    match unmount(MntFlags::empty()) {
        Ok(()) => Ok(false),
        Err(Errno::EBUSY) if !force => Err(Stays::InUse(at.clone())),
        Err(Errno::EBUSY) => unmount(MntFlags::MNT_DETACH).map(|()| true).map_err(|e| Stays::Refused(at.clone(), e)),
        Err(e) => Err(Stays::Refused(at.clone(), e)),
    }
}

/// The mount that a path leads to. It is not asked anything: its disk may be dead.
fn on_top(at: &Path) -> io::Result<u64> {
    let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(at)?;
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", place.as_raw_fd()))?;
    let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    number.ok_or_else(|| io::Error::other("the kernel does not tell its mount"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_other_directories() {
        assert!(is_mount_point(Path::new("/proc")).unwrap() && !is_mount_point(Path::new("/proc/self")).unwrap());
    }

    #[test]
    fn the_last_mount_at_a_place_is_on_top() {
        let last = |at: &str| mountinfo::own().unwrap().into_iter().rfind(|mount| mount.at == Path::new(at)).unwrap();
        assert_eq!(on_top(Path::new("/proc")).unwrap(), last("/proc").id);
        assert_ne!(on_top(Path::new("/")).unwrap(), last("/proc").id);
    }
}
