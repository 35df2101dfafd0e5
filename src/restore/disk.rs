//! A block device that is not mistaken for a later one of the same node.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A disk that a restore has made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Its node. When nobody has the disk open any more, the driver gives its number, and so the node, to another one.
    pub device: PathBuf,
    /// The kernel's number of the disk, which no other one gets as long as the machine is up.
    pub diskseq: u64,
}

impl Disk {
    /// The one that has this node now.
    pub fn at(device: PathBuf) -> Result<Disk, String> {
        let diskseq = diskseq(&device).map_err(|e| format!("{}: its diskseq is not known: {e}", device.display()))?;
        Ok(Disk { device, diskseq })
    }

    /// Whether its node is another disk's by now. What is mounted from that node is none of ours then; while it is
    /// nobody's, what is still mounted from it is ours.
    pub fn is_replaced(&self) -> bool {
        diskseq(&self.device).is_ok_and(|now| now != self.diskseq)
    }
}

fn diskseq(device: &Path) -> io::Result<u64> {
    let name = device.file_name().unwrap_or_default();
    let text = fs::read_to_string(Path::new("/sys/block").join(name).join("diskseq"))?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_without_a_disk_is_nobody_elses() {
        let gone = Disk { device: "/dev/no-such-disk".into(), diskseq: 1 };
        assert!(!gone.is_replaced());
        assert!(Disk::at(gone.device).unwrap_err().contains("/dev/no-such-disk: its diskseq"));
    }

    #[test]
    fn a_later_disk_of_the_same_node_is_another_one() {
        let here = fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let disks = here.filter_map(|entry| Disk::at(Path::new("/dev").join(entry.file_name())).ok());
        for disk in disks {
            let former = Disk { diskseq: 0, ..disk.clone() };
            assert!(!disk.is_replaced() && former.is_replaced(), "{disk:?}");
        }
    }
}
