//! Which block device of the driver a file lies on, however many other devices are between.
//!
//! Nothing here opens the file, or looks at the file system that it is on: that could wait for the very device.

use crate::image::mountinfo::{self, Mount};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Devices over devices: no stack of a sound machine is higher.
const MOST: usize = 16;

/// The number of the ublk device that the file system of `path` is on, or that `path`, a block device, is or is on.
///
/// Links in `path` are not followed.
pub(super) fn under(path: &Path) -> Option<u32> {
    let mounts = mountinfo::own().ok()?;
    of_file(path, &mounts, MOST)
}

fn of_file(path: &Path, mounts: &[Mount], left: usize) -> Option<u32> {
    let mount = mount_of(path, mounts)?;
    let place = Path::new("/sys/dev/block");
    // a file system with a device number of its own (btrfs) says by its source what it is on
    [place.join(&mount.number), sys_of_node(&mount.source).unwrap_or_default()]
        .into_iter()
        .find_map(|device| of_device(&device, mounts, left))
        .or_else(|| match mount.source.to_str() {
            Some("devtmpfs" | "udev" | "dev") => of_device(&sys_of_node(path)?, mounts, left),
            _ => None,
        })
}

/// `device`: its directory in /sys.
fn of_device(device: &Path, mounts: &[Mount], left: usize) -> Option<u32> {
    let left = left.checked_sub(1)?;
    let device = fs::canonicalize(device).ok()?;
    // the device itself, or the disk of a partition
    let number = |part: &std::path::Component<'_>| part.as_os_str().to_str()?.strip_prefix("ublkb")?.parse().ok();
    if let Some(id) = device.components().find_map(|part| number(&part)) {
        return Some(id);
    }
    let disk = match device.join("partition").exists() {
        true => device.parent()?,
        false => &device,
    };
    let slaves = fs::read_dir(disk.join("slaves")).into_iter().flatten().flatten();
    let loop_file = fs::read_to_string(disk.join("loop/backing_file")).ok();
    let mut below = slaves.map(|slave| slave.path());
    below
        .find_map(|slave| of_device(&slave, mounts, left))
        .or_else(|| of_file(Path::new(loop_file?.trim_end_matches('\n')), mounts, left))
}

/// The directory in /sys of a device node.
fn sys_of_node(node: &Path) -> Option<PathBuf> {
    if !node.starts_with("/dev") {
        return None;
    }
    let found = fs::metadata(node).ok().filter(|found| found.file_type().is_block_device())?;
    let (major, minor) = (nix::sys::stat::major(found.rdev()), nix::sys::stat::minor(found.rdev()));
    Some(PathBuf::from(format!("/sys/dev/block/{major}:{minor}")))
}

/// The mount that a path is in.
fn mount_of<'a>(path: &Path, mounts: &'a [Mount]) -> Option<&'a Mount> {
    let around = mounts.iter().filter(|mount| path.starts_with(&mount.at));
    // the last of several at one place hides the others
    around.max_by_key(|mount| mount.at.as_os_str().len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = r"21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
40 21 259:3 / /srv rw - ext4 /dev/ublkb3 rw
41 21 0:44 /sub /srv/with\040blank rw - btrfs /dev/ublkb4 rw
42 40 8:17 / /srv rw - xfs /dev/sdb1 rw";

    #[test]
    fn the_last_mount_around_a_file_is_found() {
        let mounts = mountinfo::parse(MOUNTS.as_bytes());
        let device = |path: &str| {
            let found = mount_of(Path::new(path), &mounts);
            found.map(|mount| (&*mount.number, mount.source.display().to_string()))
        };
        assert_eq!(device("/etc/a"), Some(("8:1", "/dev/sda1".to_owned())));
        assert_eq!(device("/srv/a"), Some(("8:17", "/dev/sdb1".to_owned())), "what is hidden counts no more");
        assert_eq!(device("/srv/with blank/a"), Some(("0:44", "/dev/ublkb4".to_owned())));
        assert_eq!(device("/srvother"), Some(("8:1", "/dev/sda1".to_owned())));
        assert_eq!(device("relative"), None);
    }

    #[test]
    fn this_file_is_on_no_device_of_the_driver() {
        assert_eq!(under(Path::new("/proc/self/stat")), None);
    }
}
