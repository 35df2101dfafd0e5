//! What is mounted and what is swapped to: the lines of /proc/PID/mountinfo and /proc/swaps. Follows
//! proc_pid_mountinfo(5) and proc_swaps(5).

use super::escapes::{Escape, unescape};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A mount. Its paths may have any bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number.
    pub id: u64,
    /// The file system's device number, `major:minor`; one of its own with some (btrfs).
    pub number: String,
    /// Where.
    pub at: PathBuf,
    /// What: the device, as it was named to the kernel.
    pub source: PathBuf,
}

/// All mounts that a process sees, in order. `process`: its directory in /proc.
pub fn of_process(process: &Path) -> io::Result<Vec<Mount>> {
    fs::read(process.join("mountinfo")).map(|table| parse(&table))
}

/// The same of this process.
pub fn own() -> io::Result<Vec<Mount>> {
    of_process(Path::new("/proc/self"))
}

/// What is swapped to: devices and files.
pub fn swaps() -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/swaps")?;
    let spaces = table.split(|&byte| byte == b'\n').skip(1).filter(|line| !line.is_empty());
    Ok(spaces.filter_map(|line| line.split(|byte| byte.is_ascii_whitespace()).next()).map(path).collect())
}

/// All lines that are understood.
pub fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|&byte| byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let id = std::str::from_utf8(words.first()?).ok()?.parse().ok()?;
    let number = std::str::from_utf8(words.get(2)?).ok()?.to_owned();
    let at = path(words.get(4)?);
    // any number of optional fields, then this
    let separator = words.iter().position(|word| *word == b"-")?;
    Some(Mount { id, number, at, source: path(words.get(separator + 2)?) })
}

fn path(word: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(word, Escape::Octal)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let parsed = |line| parse(line).pop().map(|mount| (mount.source, mount.at));
        let line =
            b"36 35 98:0 /a /mnt/my\\040disk\\134 ro,noatime master:1 shared:2 - ext4 /dev/ublkb0 ro,errors=continue";
        assert_eq!(parsed(line), Some(("/dev/ublkb0".into(), "/mnt/my disk\\".into())));
        let line = b"36 35 98:0 / / rw - xfs /dev/sda1 rw";
        assert_eq!(parsed(line), Some(("/dev/sda1".into(), "/".into())));
        let line = b"24 1 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw";
        assert_eq!(parsed(line), Some(("sysfs".into(), "/sys".into())));
        for bad in ["", "1 2 3", "36 35 98:0 /mnt1 /mnt2 rw", "36 35 1:0 - a"] {
            assert_eq!(parsed(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn names_that_are_no_text_hide_no_other_mount() {
        let table = b"36 35 8:1 / /mnt/\xff rw - ext4 /dev/sda1 rw\n37 35 8:2 / /srv rw - ext4 /dev/sda2 rw\n";
        let numbers: Vec<String> = parse(table).into_iter().map(|mount| mount.number).collect();
        assert_eq!(numbers, ["8:1", "8:2"]);
    }
}
