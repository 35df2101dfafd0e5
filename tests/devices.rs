//! Raw files and block devices, and QCOW2 on a block device: what is written arrives, what is given up gives storage
//! back, and what cannot be served is refused in words.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Loop};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A libnbd program that keeps a model of the export `disk`; `image` is the file or device behind it. Stores the model,
/// if the program does, at the path returned.
fn python(daemon: &Daemon, image: &Path, program: &str) -> PathBuf {
    let raw = daemon.dir().join("model.raw");
    let prelude = format!("image, raw = {image:?}, {raw:?}\n{}", include_str!("clients/modelled.py"));
    daemon.python("disk", &(prelude + program));
    raw
}

fn noise(path: &Path, len: usize) {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(len as u64).fill(&mut bytes[..]);
    fs::write(path, bytes).unwrap();
}

/// Bytes of storage a file occupies.
fn storage(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[track_caller]
fn same_bytes(one: &Path, other: &Path) {
    assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{} is not {}", one.display(), other.display());
}

/// Makes an ext4 image with files in it.
fn ext4_image(path: &Path, mib: u64) {
    let files = tempfile::tempdir().unwrap();
    for (i, len) in [0, 1, 4096, 700_001, 3 << 20].into_iter().enumerate() {
        noise(&files.path().join(format!("file{i}")), len);
    }
    fs::File::create(path).unwrap().set_len(mib << 20).unwrap();
    qemu::run(Command::new("mkfs.ext4").args(["-q", "-d"]).arg(files.path()).arg(path));
}

#[test]
fn raw_files_of_any_length() {
    for len in [1, 511, 4097, 1_000_003, (3 << 20) + 512] {
        let setup = Setup::new();
        let file = setup.dir().join("disk.raw");
        noise(&file, len);
        setup.export("disk", &file, "format = raw");
        let daemon = setup.start();
        let model = python(
            &daemon,
            &file,
            &format!(
                r#"
assert size == {len}
adopt()
torture(150)
h.pwrite(b'\x5a', size - 1, nbd.CMD_FLAG_FUA)
model[-1] = 0x5a
assert open(image, 'rb').read() == model, 'FUA waits for the file'
save()
"#
            ),
        );
        let _dir = daemon.stop();
        same_bytes(&file, &model);
    }
}

#[test]
fn holes_of_a_raw_file_are_seen() {
    let setup = Setup::new();
    let file = setup.dir().join("disk.raw");
    noise(&file, 3 << 20);
    let sparse = fs::File::options().write(true).open(&file).unwrap();
    for (at, len) in [(64 << 10, 1 << 20), (2 << 20, 4096)] {
        nix::fcntl::fallocate(
            &sparse,
            nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE,
            at,
            len,
        )
        .unwrap();
    }
    sparse.set_len((20 << 20) + 77).unwrap();
    setup.export("disk", &file, "format = raw");
    let daemon = setup.start();
    python(
        &daemon,
        &file,
        r#"
data, hole = lambda n: (n, False, False), lambda n: (n, True, True)
assert extents() == [data(64 << 10), hole(1 << 20), data((1 << 20) - (64 << 10)), hole(4096),
                     data((1 << 20) - 4096), hole((17 << 20) + 77)], extents()
# borders of a question are not borders of extents
assert extents((64 << 10) + 1000, 3000) == [hole(3000)]
assert extents((64 << 10) - 10, 30) == [data(10), hole(20)]
h.pwrite(b'x' * 4096, 10 << 20)
assert extents(9 << 20, 2 << 20) == [hole(1 << 20), data(4096), hole((1 << 20) - 4096)]
one = []
h.block_status(20 << 20, 0, lambda c, o, entries, e: one.extend(entries) and 0, nbd.CMD_FLAG_REQ_ONE)
assert one == [64 << 10, 0], one
"#,
    );
    let _dir = daemon.stop();
}

#[test]
fn what_is_given_up_gives_storage_back() {
    const LEN: usize = (8 << 20) + 1000;
    let setup = Setup::new();
    let file = setup.dir().join("disk.raw");
    noise(&file, LEN);
    fs::File::open(&file).unwrap().sync_all().unwrap();
    setup.export("disk", &file, "format = raw");
    let daemon = setup.start();
    let full = storage(&file);
    let model = python(
        &daemon,
        &file,
        r#"
M = 1 << 20
def storage():
    h.flush()
    return os.stat(image).st_blocks * 512
def drop(start, end):
    model[start:end] = bytes(end - start)
adopt()
full = storage()

# whole blocks go, the rest of a trim stays as it is
h.trim(M, 100)
drop(4096, M)
same()
assert full - storage() >= M - 8192, (full, storage())
assert extents(0, 2 * M)[:2] == [(4096, False, False), (M - 4096, True, True)]

# a zeroing makes the rest zero too
h.zero(M - 200, 2 * M + 100)
drop(2 * M + 100, 3 * M - 100)
same()
assert full - storage() >= 2 * M - 16384
h.zero(size - 7 * M - 1, 7 * M + 1)
drop(7 * M + 1, size)
same()
assert full - storage() >= 3 * M - 24576

# less than a block has no storage to give
before = storage()
h.zero(1000, 4 * M + 3000)
drop(4 * M + 3000, 4 * M + 4000)
h.zero(3, size - 3)
h.trim(4000, 4 * M + 5000)
same()
assert storage() == before

# storage that must stay stays, and comes where none was
h.zero(M, 5 * M, nbd.CMD_FLAG_NO_HOLE)
drop(5 * M, 6 * M)
same()
assert storage() >= before
h.zero(M // 2, M // 4, nbd.CMD_FLAG_NO_HOLE)
same()
assert storage() >= before + M // 2
assert os.stat(image).st_size == size
save()
"#,
    );
    let _dir = daemon.stop();
    same_bytes(&file, &model);
    assert!(storage(&file) < full);
}

#[test]
fn a_file_system_goes_through_a_raw_file_unharmed() {
    let setup = Setup::new();
    let (source, target) = (setup.dir().join("source.raw"), setup.dir().join("target.raw"));
    ext4_image(&source, 24);
    fs::write(&target, vec![0xff; 24 << 20]).unwrap(); // nothing of this may be left
    setup.export("disk", &target, "format = raw");
    let daemon = setup.start();
    round_trip(&daemon, &source);
    let _dir = daemon.stop();
    same_bytes(&source, &target);
    qemu::run(Command::new("e2fsck").arg("-fn").arg(&target));
}

/// Copies `source` to the export `disk` and back.
fn round_trip(daemon: &Daemon, source: &Path) {
    let back = daemon.dir().join("back.raw");
    qemu::run(Command::new("nbdcopy").arg("--flush").arg(source).arg(daemon.tcp("disk")));
    for uri in [daemon.tcp("disk"), daemon.uri("disk")] {
        qemu::run(Command::new("nbdcopy").arg(uri).arg(&back));
        same_bytes(source, &back);
        fs::remove_file(&back).unwrap();
    }
}

#[test]
fn a_block_device_is_served_as_it_is() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new((8 << 20) + 3 * 512);
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    let model = python(
        &daemon,
        disk.path(),
        r#"
assert size == (8 << 20) + 3 * 512
assert extents() == [(size, False, False)], 'what a device has allocated is not known'
torture(200)
h.pwrite(b'\x77' * (2 << 20), 4 << 20)
model[4 << 20:6 << 20] = b'\x77' * (2 << 20)
h.flush()
save()
"#,
    );
    assert!(fs::read(disk.file()).unwrap() == fs::read(&model).unwrap(), "flushed is in the device");
    let full = storage(&disk.file());
    let model = python(
        &daemon,
        disk.path(),
        r#"
adopt()
h.trim(1 << 20, 4 << 20)
h.zero(1 << 20, 5 << 20)
h.flush()
model[4 << 20:6 << 20] = bytes(2 << 20)
same()
save()
"#,
    );
    let _dir = daemon.stop();
    same_bytes(&disk.file(), &model);
    assert!(full - storage(&disk.file()) >= 2 << 20, "the device was told what is not needed");
}

#[test]
fn a_file_system_goes_through_a_block_device_unharmed() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(24 << 20);
    let setup = Setup::new();
    let source = setup.dir().join("source.raw");
    ext4_image(&source, 24);
    fs::write(disk.path(), vec![0xff; 24 << 20]).unwrap();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    round_trip(&daemon, &source);
    let _dir = daemon.stop();
    qemu::run(Command::new("e2fsck").arg("-fn").arg(disk.path()));
    same_bytes(&source, disk.path());
}

/// A device neither grows nor reads as zeroes behind what was written: both are different from a file.
#[test]
fn qcow2_on_a_block_device() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(24 << 20);
    fs::write(disk.path(), vec![0xee; 24 << 20]).unwrap();
    qemu::run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(disk.path()).arg("5000000"));
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = qcow2");
    let daemon = setup.start();
    let model = python(&daemon, disk.path(), "torture(300)\nsave()\nh.shutdown()\n");
    let _dir = daemon.stop();
    qemu::check(disk.path());
    qemu::same_content(disk.path(), &model);
}

#[test]
fn qcow2_on_a_block_device_that_is_too_small() {
    if !root::available("make a loop device") {
        return;
    }
    for (options, mib) in [
        ("cluster_size=65536", 6),
        ("cluster_size=4096", 6),
        ("cluster_size=512", 6),
        // one cluster of refcount table describes 2 MiB, and the next one has no place
        ("cluster_size=512,refcount_bits=64", 2),
    ] {
        // not a whole number of clusters
        let disk = Loop::new((mib << 20) + 512);
        let create = ["create", "-q", "-f", "qcow2", "-o", options];
        qemu::run(Command::new("qemu-img").args(create).arg(disk.path()).arg("64M"));
        let setup = Setup::new();
        setup.export("disk", disk.path(), "format = qcow2");
        let daemon = setup.start();
        let model = python(
            &daemon,
            disk.path(),
            &format!(
                "mib = {mib}\n{}",
                r#"
end = fill(1000)
assert end > (mib << 20) * 3 // 4, end
assert not put(block(1), 50 << 20), 'nor is there space elsewhere'
assert not put(block(2), 30 << 20)
assert put(b'in place', 1000)
# what the failed requests had taken is given back with the second flush, and nothing else is changed
h.flush()
h.flush()
check(leaks=False)
same()
# what is given back can be used again
assert zero(1 << 20, 0)
h.flush()
h.flush()
assert put(block(2), 20 << 20)
h.flush()
check()
same()
save()
h.shutdown()
"#
            ),
        );
        let _dir = daemon.stop();
        qemu::check(disk.path());
        qemu::same_content(disk.path(), &model);
    }
}

#[test]
fn what_is_neither_file_nor_block_device_is_refused_in_words() {
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let fifo = dir.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
    noise(&dir.join("good.raw"), 4096);
    let bad = [
        ("directory", dir.clone(), "is a directory"),
        ("fifo", fifo, "is a FIFO"),
        (
            "null",
            PathBuf::from("/dev/null"),
            "is a character device; only regular files and block devices can be served",
        ),
        ("missing", dir.join("missing"), "No such file or directory"),
        ("dangling", dir.join("dangling"), "No such file or directory"),
        ("socket", dir.join("socket"), "cannot open it"),
        ("below", dir.join("good.raw/below"), "Not a directory"),
    ];
    for (name, path, _) in &bad {
        setup.export(name, path, "format = raw");
        setup.export(&format!("{name}-qcow2"), path, "");
    }
    setup.export("good", &dir.join("good.raw"), "format = raw");
    let daemon = setup.start();
    for (name, path, words) in &bad {
        for export in [(*name).to_owned(), format!("{name}-qcow2")] {
            let out = qemu::output(Command::new("nbdinfo").arg(daemon.uri(&export)));
            assert!(!out.status.success(), "{export} is served");
            let named = format!("ERROR export {export:?}: {}: ", path.display());
            daemon.wait_for("the log line", || daemon.log().contains(&named));
            let log = daemon.log();
            let line = log.lines().find(|l| l.contains(&named)).unwrap();
            assert!(line.contains(words), "{line}");
            qemu::run(Command::new("nbdinfo").arg(daemon.uri("good")));
        }
    }
    let _dir = daemon.stop();
}
