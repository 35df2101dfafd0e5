//! The mounts of this process's namespace.

use super::layout::Driver;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where a device is mounted, the last mount first.
pub fn of(device: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        table().unwrap_or_default().into_iter().filter(|(source, _)| source == device).map(|(_, at)| at).collect();
    found.reverse();
    found
}

/// Whether something is mounted at a directory, which is given without links.
pub fn is_mount_point(directory: &Path) -> io::Result<bool> {
    Ok(table()?.iter().any(|(_, at)| at == directory))
}

/// What is mounted, with where.
fn table() -> io::Result<Vec<(PathBuf, PathBuf)>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse).collect())
}

/// A line of mountinfo: source and mount point. Follows proc_pid_mountinfo(5).
fn parse(line: &[u8]) -> Option<(PathBuf, PathBuf)> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let at = words.get(4)?;
    let optional = words.iter().position(|word| *word == b"-")?;
    Some((unescaped(words.get(optional + 2)?), unescaped(at)))
}

/// The kernel writes blanks, line ends and backslashes as `\NNN`, octal.
fn unescaped(word: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                out.push(byte);
                rest = &tail[3..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
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
    fn lines_of_mountinfo() {
        let line =
            b"36 35 98:0 /a /mnt/my\\040disk\\134 ro,noatime master:1 shared:2 - ext4 /dev/ublkb0 ro,errors=continue";
        assert_eq!(parse(line), Some(("/dev/ublkb0".into(), "/mnt/my disk\\".into())));
        let line = b"36 35 98:0 / / rw - xfs /dev/sda1 rw";
        assert_eq!(parse(line), Some(("/dev/sda1".into(), "/".into())));
        assert_eq!(parse(b""), None);
        assert_eq!(unescaped(b"\\04"), PathBuf::from("\\04"));
        assert!(is_mount_point(Path::new("/proc")).unwrap() && !is_mount_point(Path::new("/proc/self")).unwrap());
    }
}
