//! The mounts of this process's namespace.

use super::layout::Driver;
use crate::serve::ublk::mountinfo;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::io;
use std::path::{Path, PathBuf};

/// Where a device is mounted, the last mount first.
pub fn of(device: &Path) -> Vec<PathBuf> {
    let mounts = mountinfo::own().unwrap_or_default().into_iter().rev();
    mounts.filter(|mount| mount.source == device).map(|mount| mount.at).collect()
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
        let more = if writable { driver.writable_options } else { "" };
        let options =
            [driver.options, more].into_iter().filter(|option| !option.is_empty()).collect::<Vec<_>>().join(",");
        let options = Some(options.as_str()).filter(|options| !options.is_empty());
        match mount(Some(device), at, Some(driver.name), flags, options) {
            Err(Errno::ENODEV) => {}
            answer => return answer,
        }
    }
    Err(Errno::ENODEV)
}

/// Unmounts what is mounted at a directory. `lazily`: also when it is in use; who uses it keeps it.
pub fn detach(at: &Path, lazily: bool) -> Result<(), Errno> {
    let flags = if lazily { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    umount2(at, flags | MntFlags::UMOUNT_NOFOLLOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_other_directories() {
        assert!(is_mount_point(Path::new("/proc")).unwrap() && !is_mount_point(Path::new("/proc/self")).unwrap());
    }
}
