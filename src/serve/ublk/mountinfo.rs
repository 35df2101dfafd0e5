//! What is mounted: the lines of /proc/PID/mountinfo. Follows proc_pid_mountinfo(5).

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

/// All lines that are understood.
pub(super) fn parse(table: &[u8]) -> Vec<Mount> {
    table.split(|&byte| byte == b'\n').filter_map(line).collect()
}

fn line(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let id = std::str::from_utf8(words.first()?).ok()?.parse().ok()?;
    let number = std::str::from_utf8(words.get(2)?).ok()?.to_owned();
    let at = unescaped(words.get(4)?);
    // any number of optional fields, then this
    let separator = words.iter().position(|word| *word == b"-")?;
    Some(Mount { id, number, at, source: unescaped(words.get(separator + 2)?) })
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
        assert_eq!(parsed(b""), None);
        assert_eq!(unescaped(b"\\04"), PathBuf::from("\\04"));
    }

    #[test]
    fn names_that_are_no_text_hide_no_other_mount() {
        let table = b"36 35 8:1 / /mnt/\xff rw - ext4 /dev/sda1 rw\n37 35 8:2 / /srv rw - ext4 /dev/sda2 rw\n";
        let numbers: Vec<String> = parse(table).into_iter().map(|mount| mount.number).collect();
        assert_eq!(numbers, ["8:1", "8:2"]);
    }
}
