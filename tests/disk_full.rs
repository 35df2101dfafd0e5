//! The disk below an image is full: clients get ENOSPC and stay connected, others are served on, nothing that was
//! flushed is lost, and when there is space again everything goes on.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Mount};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the image's disk: more than the file system holds.
const SIZE: &str = "96M";
/// Bytes of the file that is deleted when space is needed.
const BALLAST: usize = 16 << 20;

/// A daemon that serves "full", an image on a small file system, and "other", one that has space.
struct Scene {
    daemon: Daemon,
    image: PathBuf,
    other: PathBuf,
    ballast: PathBuf,
    _mount: Mount,
}

impl Scene {
    fn new(mount: Mount, options: &str, export: &str) -> Scene {
        let setup = Setup::new();
        let (image, ballast) = (mount.path().join("full.qcow2"), mount.path().join("ballast"));
        let created = setup.image("created.qcow2", options, SIZE);
        std::fs::copy(&created, &image).unwrap();
        let other = setup.image("other.qcow2", "", SIZE);
        std::fs::write(&ballast, vec![1; BALLAST]).unwrap();
        setup.export("full", &image, export);
        setup.export("other", &other, "");
        Scene { daemon: setup.start(), image, other, ballast, _mount: mount }
    }

    /// A libnbd program that knows the files and keeps a model of the disk.
    fn python(&self, program: &str) -> String {
        let prelude = format!(
            "image, ballast, raw = {:?}, {:?}, {:?}\n{}",
            self.image,
            self.ballast,
            self.model(),
            include_str!("clients/modelled.py")
        );
        self.daemon.python("full", &(prelude + program))
    }

    /// Where a program stores what the disk must hold.
    fn model(&self) -> PathBuf {
        self.daemon.dir().join("model.raw")
    }

    /// Waits until no client is left: only then is the image QEMU's to look at.
    fn wait_until_closed(&self) {
        let closed = format!("{}: closed", self.image.display());
        self.daemon.wait_for("the image to be closed", || self.daemon.log().contains(&closed));
    }

    /// Stops the daemon; what the program stored as model is in the image.
    fn end(self, check: fn(&Path)) {
        let model = self.model();
        let (_dir, log) = self.daemon.stop();
        assert!(!log.contains("panicked"), "{log}");
        check(&self.image);
        qemu::same_content(&self.image, &model);
        qemu::check(&self.other);
    }
}

/// One client writes until there is no space, and goes on when there is.
fn goes_on_when_there_is_space(mount: Mount, options: &str, export: &str) {
    let scene = Scene::new(mount, options, export);
    scene.python(
        r#"
for at in range(1000, 8 << 20, STEP):
    assert put(block(at), at)
h.flush()
flushed = bytes(model[:8 << 20])
end = fill(8 << 20)

# the connection, the image and the other export go on
assert not put(b'\xee' * (24 << 20), end + STEP), 'a write in pieces'
zeroed = zero(24 << 20, end + STEP, nbd.CMD_FLAG_NO_HOLE)
assert not zeroed, 'storage that does not exist was reserved'
assert h.pread(8 << 20, 0) == flushed
assert put(b'in place', 1000)
assert h.pread(end, 0) == model[:end]
other = nbd.NBD()
other.connect_uri(uri.replace('///full', '///other'))
other.pwrite(b'other' * 100000, 777)
other.flush()
assert other.pread(500000, 777) == b'other' * 100000
other.shutdown()
try_flush()
check()

os.remove(ballast)
for at in range(end, end + (4 << 20), STEP):
    assert put(block(at), at), 'there is space again'
h.flush()
check()
assert put(b'behind the flush', 5 << 20)
same()
save()
h.shutdown()
"#,
    );
    scene.end(qemu::check);
}

/// A client that vanishes on a full disk loses nothing that it was told is written: the flush for it waits for space.
fn a_client_leaves_on_a_full_disk(mount: Mount, options: &str) {
    let scene = Scene::new(mount, options, "");
    scene.python(
        r#"
for at in range(1000, 8 << 20, STEP):
    assert put(block(at), at)
h.flush()
fill(8 << 20)
save()
os._exit(0)
"#,
    );
    scene.daemon.wait_for("the flush for the client that left", || scene.daemon.log().contains("the last writer left"));
    std::fs::remove_file(&scene.ballast).unwrap();
    scene.wait_until_closed();
    qemu::check_leaks_allowed(&scene.image);
    qemu::same_content(&scene.image, &scene.model());
    scene.python(
        r#"
adopt()
for at in range(1000, 20 << 20, STEP):
    assert put(block(at + 7), at)
h.flush()
check()
same()
save()
"#,
    );
    scene.end(qemu::check_leaks_allowed);
}

/// Data has space and the tables that lead to it do not: the flush says so, and a later one makes up for it.
fn a_flush_finds_no_space(mount: Mount) {
    // the first tables of an empty image lie in clusters that have no storage yet
    let scene = Scene::new(mount, "cluster_size=65536", "");
    scene.python(
        r#"
for at in range(0, 6 << 20, 1 << 16):
    assert put(block(at)[:1 << 16], at)
# every block that is left
crumb = image + '.crumbs'
with open(crumb, 'ab', buffering=0) as f:
    for length in (1 << 20, 4096, 4096):
        try:
            while True:
                f.write(b'x' * length)
        except OSError as e:
            assert e.errno == errno.ENOSPC, e
        os.sync()
assert not try_flush(), 'the flush should find no space'
assert not try_flush(), 'nor the next'
check()
same()
assert put(b'in place', 12345)
os.remove(crumb)
h.flush()
check()
save()
"#,
    );
    // flushed is flushed: a daemon that is killed now loses nothing
    let (image, model) = (scene.image.clone(), scene.model());
    let _dir = scene.daemon.kill();
    qemu::check_leaks_allowed(&image);
    qemu::same_content(&image, &model);
}

/// A backup tool writes a disk into an export, fails for lack of space, and is run again when there is space.
fn a_backup_is_taken_again(options: &str, export: &str) {
    let scene = Scene::new(Mount::ext4(64), options, export);
    let source = scene.daemon.dir().join("source.raw");
    // a quarter of each 4 KiB compresses: compressed or not, it fits without the ballast and not beside it
    let mut word = 88_172_645_463_325_252u64;
    let mut disk = vec![1u8; 96 << 20];
    for block in disk[..40 << 20].chunks_mut(4096) {
        block[..3072].fill_with(|| {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word as u8
        });
    }
    disk[40 << 20..].fill(0);
    std::fs::write(&source, disk).unwrap();
    std::fs::write(&scene.ballast, vec![1; 34 << 20]).unwrap();
    let copy = || qemu::output(Command::new("nbdcopy").arg(&source).arg(scene.daemon.uri("full")));
    let first = copy();
    let said = qemu::text(&first.stderr);
    assert!(!first.status.success() && said.contains("No space left on device"), "{said}");
    // what was written before is an image without errors, and other exports are served
    scene.python("check()");
    qemu::run(Command::new("nbdcopy").arg(&source).arg(scene.daemon.uri("other")));
    std::fs::remove_file(&scene.ballast).unwrap();
    let closed = || scene.daemon.log().matches("full.qcow2: closed").count();
    let before = closed();
    let second = copy();
    assert!(second.status.success(), "{}", qemu::text(&second.stderr));
    scene.daemon.wait_for("the image to be closed", || closed() > before);
    std::fs::rename(source, scene.model()).unwrap();
    scene.end(qemu::check_leaks_allowed);
}

#[test]
fn tmpfs_full_and_freed() {
    if root::available("mount a small tmpfs") {
        goes_on_when_there_is_space(Mount::tmpfs(48), "", "");
    }
}

#[test]
fn tmpfs_full_and_freed_with_tiny_clusters() {
    if root::available("mount a small tmpfs") {
        goes_on_when_there_is_space(Mount::tmpfs(48), "cluster_size=2048", "");
    }
}

#[test]
fn ext4_full_and_freed() {
    if root::available("mount a small ext4") {
        goes_on_when_there_is_space(Mount::ext4(64), "", "");
    }
}

#[test]
fn a_client_leaves_on_a_full_tmpfs() {
    if root::available("mount a small tmpfs") {
        a_client_leaves_on_a_full_disk(Mount::tmpfs(48), "");
    }
}

#[test]
fn a_client_leaves_on_a_full_ext4() {
    if root::available("mount a small ext4") {
        a_client_leaves_on_a_full_disk(Mount::ext4(64), "cluster_size=4096");
    }
}

#[test]
fn a_flush_finds_no_space_on_tmpfs() {
    if root::available("mount a small tmpfs") {
        a_flush_finds_no_space(Mount::tmpfs(48));
    }
}

#[test]
fn a_flush_finds_no_space_on_ext4() {
    if root::available("mount a small ext4") {
        a_flush_finds_no_space(Mount::ext4(64));
    }
}

#[test]
fn tmpfs_full_and_freed_with_subclusters() {
    if root::available("mount a small tmpfs") {
        goes_on_when_there_is_space(Mount::tmpfs(48), "extended_l2=on", "");
    }
}

#[test]
fn ext4_full_and_freed_with_a_compressed_export() {
    if root::available("mount a small ext4") {
        goes_on_when_there_is_space(Mount::ext4(64), "compression_type=zstd", "compress = zstd");
    }
}

#[test]
fn a_backup_on_a_full_ext4_is_taken_again() {
    if root::available("mount a small ext4") {
        a_backup_is_taken_again("", "");
    }
}

#[test]
fn a_backup_with_subclusters_is_taken_again() {
    if root::available("mount a small ext4") {
        a_backup_is_taken_again("extended_l2=on,cluster_size=16384", "");
    }
}

#[test]
fn a_compressed_backup_is_taken_again() {
    if root::available("mount a small ext4") {
        a_backup_is_taken_again("", "compress = zlib");
    }
}
