//! What only root can make: file systems of a certain size, loop devices. Each is gone when its guard is dropped.

use super::qemu;
use nix::unistd::geteuid;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Whether a test that needs root can run. Fails the test without root, unless `COWGATE_TESTS_WITHOUT_ROOT` is set:
/// then the answer is no, and the output says so.
#[track_caller]
pub fn available(what_for: &str) -> bool {
    if std::env::var_os("COWGATE_TESTS_WITHOUT_ROOT").is_some() {
        println!("skipped: COWGATE_TESTS_WITHOUT_ROOT is set, and root is needed to {what_for}");
        return false;
    }
    assert!(
        geteuid().is_root(),
        "root is needed to {what_for}; run the tests as root, or leave those out that need it with \
         COWGATE_TESTS_WITHOUT_ROOT=1"
    );
    true
}

/// A mounted file system.
#[derive(Debug)]
pub struct Mount {
    dir: TempDir,
}

impl Mount {
    /// A tmpfs of `mib` MiB.
    pub fn tmpfs(mib: u32) -> Mount {
        let mount = Mount::place();
        let size = format!("size={mib}m");
        qemu::run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(mount.path()));
        mount
    }

    /// An ext4 file system in a file of `mib` MiB, all of it for files.
    pub fn ext4(mib: u32) -> Mount {
        let mount = Mount::place();
        let disk = mount.dir.path().join("disk");
        std::fs::File::create(&disk).unwrap().set_len(u64::from(mib) << 20).unwrap();
        qemu::run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&disk));
        qemu::run(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(&disk).arg(mount.path()));
        mount
    }

    /// What is on a device. `Err`: why it cannot be mounted.
    pub fn device(device: &Path) -> Result<Mount, String> {
        let mount = Mount::place();
        let out = qemu::output(Command::new("mount").args(["-t", "ext4"]).arg(device).arg(mount.path()));
        if out.status.success() { Ok(mount) } else { Err(qemu::text(&out.stderr)) }
    }

    fn place() -> Mount {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        Mount { dir }
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // lazily: a test that fails may have left a daemon behind that still looks at it
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// A loop device before a file of its own.
pub struct Loop {
    dir: TempDir,
    device: PathBuf,
}

impl Loop {
    /// A device of `bytes` bytes.
    pub fn new(bytes: u64) -> Loop {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        std::fs::File::create(&file).unwrap().set_len(bytes).unwrap();
        let device = qemu::run(Command::new("losetup").args(["--partscan", "--find", "--show"]).arg(&file));
        Loop { dir, device: PathBuf::from(device.trim()) }
    }

    /// Makes all of it but its first MiB a partition; returns that one's device.
    pub fn partition(&self) -> PathBuf {
        const START: u64 = 2048; // in sectors
        let sectors = std::fs::metadata(self.file()).unwrap().len() / 512 - START;
        // told, not found: not every kernel knows every kind of partition table
        let numbers = ["1".to_owned(), START.to_string(), sectors.to_string()];
        qemu::run(Command::new("addpart").arg(&self.device).args(numbers));
        PathBuf::from(format!("{}p1", self.device.display()))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file behind it.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}
