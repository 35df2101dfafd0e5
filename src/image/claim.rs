//! Block devices that a writer has for itself.
//!
//! The byte locks of [`super::lock`] say nothing to a kernel that mounts a device. So as long as an image has writers,
//! each of its block devices that is written is also claimed, by one descriptor opened with O_EXCL: the kernel grants
//! that to one holder only ([`crate::ring::Exclusive`]), and file systems, swap, device-mapper and md are such holders
//! (`kernel-notes/2026-11-23-exclusive-block-devices.md`). Readers claim nothing, as they harm nobody.

use super::Error;
use nix::libc;
use nix::sys::stat::{major, minor};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What is read of a list of the kernel's, in bytes.
const MAX_LIST_BYTES: u64 = 4 << 20;

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
    let parts = std::fs::read_dir(sys(device)).into_iter().flatten().filter_map(Result::ok);
    let used = parts.filter(|part| part.path().join("partition").exists()).find_map(|part| {
        let number = read(&part.path().join("dev")).and_then(|text| parse_number(text.trim()))?;
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
    let mounts = read(Path::new("/proc/self/mountinfo")).unwrap_or_default();
    let mounted = mounts.lines().filter_map(mount).find(|mount| mount.device == device || is_it(&mount.source));
    if let Some(mount) = mounted {
        return Some(format!("mounted at {}", mount.place.display()));
    }
    let swaps = read(Path::new("/proc/swaps")).unwrap_or_default();
    let mut spaces = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    if spaces.any(|space| is_it(&unescaped(space))) {
        return Some("used as swap".to_owned());
    }
    let holder = std::fs::read_dir(sys(device).join("holders")).ok()?.find_map(Result::ok)?.file_name();
    let holder = holder.to_string_lossy().into_owned();
    let name = read(&Path::new("/sys/block").join(&holder).join("dm/name"));
    Some(match name {
        Some(name) => format!("part of {holder} ({})", name.trim()),
        None => format!("part of {holder}"),
    })
}

/// Where the kernel describes a block device.
fn sys(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)))
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_LIST_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A mounted file system.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    device: u64,
    place: PathBuf,
    source: PathBuf,
}

/// A line of /proc/self/mountinfo.
fn mount(line: &str) -> Option<Mounted> {
    let (left, right) = line.split_once(" - ")?;
    let mut words = left.split(' ').skip(2);
    let device = parse_number(words.next()?)?;
    let place = unescaped(words.nth(1)?);
    Some(Mounted { device, place, source: unescaped(right.split(' ').nth(1)?) })
}

/// A device number as major:minor.
fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// A path as the kernel lists it: blanks and what else would end the word are \ooo.
fn unescaped(word: &str) -> PathBuf {
    let (mut out, mut rest) = (String::new(), word);
    while let Some(at) = rest.find('\\') {
        let code = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push_str(&rest[..at]);
        match code {
            // only for people: a line break would not do them good
            Some(code) if code.is_ascii_graphic() || code == b' ' => out.push(char::from(code)),
            Some(_) => out.push('?'),
            None => out.push('\\'),
        }
        rest = &rest[at + if code.is_some() { 4 } else { 1 }..];
    }
    PathBuf::from(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_as_linux_lists_them() {
        let found = |number, place: &str, source: &str| {
            Some(Mounted { device: parse_number(number).unwrap(), place: place.into(), source: source.into() })
        };
        assert_eq!(
            mount("42 27 7:0 / /tmp/a\\040b rw,relatime - ext4 /dev/loop0 rw"),
            found("7:0", "/tmp/a b", "/dev/loop0")
        );
        assert_eq!(
            mount("36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue"),
            found("98:0", "/mnt2", "/dev/root")
        );
        assert_eq!(mount("24 1 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw"), found("0:22", "/sys", "sysfs"));
        for bad in ["", "1 2 3", "36 35 98:0 /mnt1 /mnt2 rw", "36 35 x:0 / /m rw - a b c", "36 35 1:0 - a"] {
            assert_eq!(mount(bad), None, "{bad}");
        }
    }

    #[test]
    fn paths_as_linux_lists_them() {
        for (listed, path) in [
            ("/plain", "/plain"),
            ("/a\\040b\\134c", "/a b\\c"),
            ("/line\\012break", "/line?break"),
            ("/odd\\", "/odd\\"),
            ("/odd\\9é\\04", "/odd\\9é\\04"),
            ("\\777", "\\777"),
        ] {
            assert_eq!(unescaped(listed), Path::new(path), "{listed}");
        }
    }
}
