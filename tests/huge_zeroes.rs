//! WRITE_ZEROES and TRIM of huge ranges on every kind of export: right to the byte, without data being written.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Loop, Mount};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the disks in bytes.
const SIZE: u64 = (5 << 30) + 512;
/// Bytes that one request may write: tables, and parts of clusters at the ends.
const LIMIT: u64 = 24 << 20;

/// What is expected of an export.
struct Expect {
    /// Fast zeroing succeeds.
    fast: bool,
    /// Lengths that are zeroed with NO_HOLE.
    provision: &'static [u64],
}

const ALL: Expect = Expect { fast: true, provision: &[(64 << 20) + 1, 512 << 20] };

fn sparse(path: &Path, len: u64) {
    File::create(path).unwrap().set_len(len).unwrap();
}

/// Runs the client on the export `disk`, which is empty; returns the model it made.
fn torment(daemon: &Daemon, expect: &Expect) -> PathBuf {
    let model = daemon.dir().join("model.raw");
    sparse(&model, SIZE);
    torment_as(daemon, &model, expect);
    model
}

/// The same on one that is what `model` is.
fn torment_as(daemon: &Daemon, model: &Path, expect: &Expect) {
    let Expect { fast, provision } = expect;
    let fast = if *fast { "True" } else { "False" };
    let prelude = format!(
        "model, pid_file, fast, provision, limit = {model:?}, {:?}, {fast}, {provision:?}, {LIMIT}\n",
        daemon.pid_file()
    );
    daemon.python("disk", &(prelude + include_str!("clients/huge.py")));
}

fn same_raw(disk: &Path, model: &Path) {
    qemu::qemu_img("compare -f raw -F raw", &[disk, model]);
}

fn qcow2(options: &str, expect: &Expect) {
    let setup = Setup::new();
    let options = options.replace("data.bin", &setup.dir().join("data.bin").display().to_string());
    let directory = setup.dir().to_owned();
    let image = setup.image("disk.qcow2", &options, &SIZE.to_string());
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let model = torment(&daemon, expect);
    let _dir = daemon.stop();
    qemu::check(&image);
    match options.contains("data_file_raw=on") {
        true => same_raw(&directory.join("data.bin"), &model),
        false => qemu::same_content(&image, &model),
    }
}

/// Over a backing file with data in many places.
fn overlay(options: &str, expect: &Expect) {
    if !root::available("mount a file system with room for all of the disk") {
        return;
    }
    let room = Mount::ext4(12 << 10);
    let setup = Setup::new();
    let model = setup.dir().join("model.raw");
    sparse(&model, SIZE);
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw"]);
    for i in 0..60 {
        io.args(["-c", &format!("write -P {} {}M 300k", 100 + i, 1 + i * 80)]);
    }
    qemu::run(io.arg(&model));
    let base = room.path().join("base.qcow2");
    qemu::qemu_img("convert -f raw -O qcow2", &[&model, &base]);
    let image = room.path().join("disk.qcow2");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&base);
    if !options.is_empty() {
        create.args(["-o", options]);
    }
    qemu::run(create.arg(&image));
    setup.export("disk", &image, "");
    let daemon = setup.start();
    torment_as(&daemon, &model, expect);
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
    if expect.fast {
        qemu::same_content(&image, &model); // else gigabytes of zeroes would have to be read
    }
}

#[test]
fn ordinary_images() {
    qcow2("", &ALL);
}

#[test]
fn images_with_large_clusters() {
    qcow2("cluster_size=2M", &ALL);
}

#[test]
fn images_with_subclusters() {
    qcow2("extended_l2=on", &ALL);
}

#[test]
fn images_of_the_old_version() {
    qcow2("compat=0.10", &ALL);
}

#[test]
fn images_with_a_data_file() {
    qcow2("data_file=data.bin", &ALL);
}

#[test]
fn images_with_a_raw_data_file() {
    qcow2("data_file=data.bin,data_file_raw=on", &ALL);
}

#[test]
fn images_all_of_whose_clusters_are_allocated() {
    qcow2("preallocation=metadata", &ALL);
}

#[test]
fn overlays() {
    overlay("", &ALL);
}

#[test]
fn overlays_with_subclusters() {
    overlay("extended_l2=on,cluster_size=128k", &ALL);
}

#[test]
fn overlays_of_the_old_version() {
    overlay("compat=0.10", &Expect { fast: false, ..ALL });
}

#[test]
fn compressed_images() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", &SIZE.to_string());
    setup.export("disk", &image, "compress = zlib");
    let daemon = setup.start();
    let model = torment(&daemon, &ALL);
    let _dir = daemon.stop();
    qemu::check(&image);
    qemu::same_content(&image, &model);
}

#[test]
fn raw_files() {
    let setup = Setup::new();
    let file = setup.dir().join("disk.raw");
    sparse(&file, SIZE);
    setup.export("disk", &file, "format = raw");
    let daemon = setup.start();
    let model = torment(&daemon, &ALL);
    let _dir = daemon.stop();
    same_raw(&file, &model);
}

#[test]
fn raw_files_on_tmpfs() {
    let setup = Setup::new();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = memory.path().join("disk.raw");
    sparse(&file, SIZE);
    setup.export("disk", &file, "format = raw");
    let daemon = setup.start();
    let model = torment(&daemon, &Expect { provision: &[(64 << 20) + 1], ..ALL });
    let _dir = daemon.stop();
    same_raw(&file, &model);
}

#[test]
fn block_devices() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(SIZE);
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    let model = torment(&daemon, &Expect { provision: &[(64 << 20) + 1], ..ALL });
    let _dir = daemon.stop();
    same_raw(&disk.file(), &model); // the device does not say where it holds nothing
}

#[test]
fn joined_files() {
    let setup = Setup::new();
    let base = setup.dir().join("disk");
    for (i, len) in [1 << 30, 77 << 20, 3 << 30, SIZE - (4 << 30) - (77 << 20)].into_iter().enumerate() {
        sparse(&base.with_extension(i.to_string()), len);
    }
    setup.export("disk", &base, "format = raw\nmultifile = true");
    let daemon = setup.start();
    let model = torment(&daemon, &ALL);
    qemu::run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &daemon.uri("disk")]).arg(model));
    let _dir = daemon.stop();
}

#[test]
fn temporary_layers() {
    let setup = Setup::new();
    let file = setup.dir().join("disk.raw");
    sparse(&file, SIZE);
    setup.export("disk", &file, "format = raw\ncopyonwrite = true");
    let daemon = setup.start();
    // what a client wrote is gone when it leaves: there is nothing to compare
    torment(&daemon, &Expect { provision: &[(64 << 20) + 1], ..ALL });
    let _dir = daemon.stop();
}

const TIB: u64 = 1 << 40;

/// Zeroes 1 TiB in one request, with data around both ends and in the middle, by QEMU and by hand; another client of the
/// same worker gets its answers meanwhile, and little memory is taken. Returns the directory.
fn a_tebibyte(prepare: impl FnOnce(&Setup) -> PathBuf, export: &str) -> (std::sync::Arc<tempfile::TempDir>, PathBuf) {
    let setup = Setup::new().generic("workers = 1");
    let image = prepare(&setup);
    setup.export("disk", &image, export);
    let daemon = setup.start();
    let io = |commands: &[&str]| {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]);
        commands.iter().for_each(|command| {
            io.args(["-c", command]);
        });
        let text = qemu::run(io.arg(daemon.uri("disk")));
        assert!(!text.contains("fail") && !text.contains("rror"), "{text}");
    };
    let marks = ["write -P 1 0 128k", "write -P 2 512G 128k", "write -P 3 1024G 256k"];
    io(&marks);
    let before = daemon.resident_bytes();
    // from 1000 bytes inside the first mark to 1000 bytes inside the last
    let zero = r#"
import threading
T = 1 << 40
answers = 0
w = Wire()
w.extended()
other = Wire()
other.extended()
over = False
def ask():
    global answers
    while not over:
        other.request64(READ, 1024, 512)
        assert other.chunks()[-1][0] in (DATA, HOLE)
        answers += 1
thread = threading.Thread(target=ask, daemon=True)
thread.start()
for kind, flags in ((ZEROES, FAST), (ZEROES, 0), (TRIM, 0)):
    was = answers
    w.request64(kind, 1000, T, flags)
    chunks = w.chunks()
    if flags == FAST and not fast:
        assert [kind for kind, _ in chunks] == [ERROR], chunks
        continue
    assert chunks == [(NONE, b'')], chunks
    print(kind, flags, answers - was)
over = True
thread.join()
w.request64(DISC)
"#;
    // whether the next part of several can is not known when one is zeroed
    let fast = if export.contains("multifile") { "False" } else { "True" };
    let told = daemon.wire(&format!("fast = {fast}\n{zero}"));
    println!("answers meanwhile: {told}");
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 200 << 20, "{grown} bytes");
    io(&[
        "read -P 1 0 1000",
        "read -P 0 1000 131072",
        "read -P 0 512G 128k",
        "read -P 0 1024G 1000",
        "read -P 3 1099511628776 260000",
    ]);
    // QEMU asks for so much at a time only if it is fast or not done at all
    if fast == "True" {
        io(&marks);
        io(&["write -z -u -n 4k 1T", "read -P 1 0 4k", "read -P 0 4k 124k", "read -P 0 512G 128k", "read -P 0 1T 4k"]);
        io(&["read -P 3 1099511631872 64k", "discard 4k 2000M", "read -P 1 0 4k", "read -P 3 1099511631872 64k"]);
    }
    let (dir, log) = daemon.stop();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    (dir, image)
}

#[test]
fn a_tebibyte_of_a_sparse_image() {
    let (_dir, image) = a_tebibyte(|setup| setup.image("disk.qcow2", "", "2T"), "");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_an_overlay() {
    let prepare = |setup: &Setup| {
        let base = setup.image("base.qcow2", "", "2T");
        let image = setup.dir().join("disk.qcow2");
        qemu::qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &image]);
        image
    };
    let (_dir, image) = a_tebibyte(prepare, "");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_clusters_that_are_allocated() {
    let (_dir, image) = a_tebibyte(|setup| setup.image("disk.qcow2", "preallocation=metadata", "1026G"), "");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_a_raw_file() {
    let prepare = |setup: &Setup| {
        let file = setup.dir().join("disk.raw");
        sparse(&file, 2 * TIB);
        file
    };
    a_tebibyte(prepare, "format = raw");
}

#[test]
fn a_tebibyte_of_an_image_with_subclusters() {
    let prepare = |setup: &Setup| setup.image("disk.qcow2", "extended_l2=on,cluster_size=128k", "2T");
    let (_dir, image) = a_tebibyte(prepare, "");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_an_image_of_the_old_version() {
    let (_dir, image) = a_tebibyte(|setup| setup.image("disk.qcow2", "compat=0.10", "2T"), "");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_data_files() {
    for raw in ["off", "on"] {
        let prepare = |setup: &Setup| {
            let data = setup.dir().join("data.bin");
            setup.image("disk.qcow2", &format!("data_file={},data_file_raw={raw}", data.display()), "2T")
        };
        let (_dir, image) = a_tebibyte(prepare, "");
        qemu::check(&image);
    }
}

#[test]
fn a_tebibyte_of_a_compressed_image() {
    let (_dir, image) = a_tebibyte(|setup| setup.image("disk.qcow2", "", "2T"), "compress = zlib");
    qemu::check(&image);
}

#[test]
fn a_tebibyte_of_a_block_device() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(2 * TIB);
    a_tebibyte(|_| disk.path().to_owned(), "format = raw");
}

#[test]
fn a_tebibyte_of_joined_files() {
    let prepare = |setup: &Setup| {
        let base = setup.dir().join("disk");
        for (part, len) in [300 << 30, 1 << 30, 600 << 30, 500 << 30].into_iter().enumerate() {
            sparse(&base.with_extension(part.to_string()), len);
        }
        base
    };
    a_tebibyte(prepare, "format = raw\nmultifile = true");
}

/// What a client wrote there is gone when it leaves, so one connection does it all.
#[test]
fn a_tebibyte_of_a_temporary_layer() {
    let setup = Setup::new();
    let file = setup.dir().join("disk.raw");
    sparse(&file, 2 * TIB);
    qemu::run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 512G 1M"]).arg(&file));
    setup.export("disk", &file, "format = raw\ncopyonwrite = true");
    let daemon = setup.start();
    daemon.wire(
        r#"
T = 1 << 40
w = Wire()
w.extended()
def read(offset, length):
    w.request64(READ, offset, length)
    return content(offset, length, w.chunks())
for at in (0, T):
    assert w.ask64(WRITE, at, 4096, PAYLOAD, b"x" * 4096) == 0
assert read(T // 2, 4096) == b"\7" * 4096
for kind, flags in ((ZEROES, FAST), (ZEROES, 0), (TRIM, 0)):
    assert w.ask64(kind, 1000, T, flags) == 0
    assert read(0, 4096) == b"x" * 1000 + bytes(3096) and read(T // 2, 4096) == bytes(4096)
    assert read(T, 4096) == bytes(1000) + b"x" * 3096
"#,
    );
    let (_dir, _) = daemon.stop();
    qemu::run(Command::new("qemu-io").args(["-f", "raw", "-c", "read -P 7 512G 1M"]).arg(&file));
}

/// Storage for more than there can be is refused at once: it does not fill the file system first.
#[test]
fn what_cannot_be_reserved_is_refused_before_anything_is() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "200T");
    let file = setup.dir().join("disk.raw");
    sparse(&file, 8 * TIB);
    setup.export("qcow2", &image, "");
    setup.export("raw", &file, "format = raw");
    let daemon = setup.start();
    let stored = |path: &Path| path.metadata().unwrap().blocks() * 512;
    let before = [stored(&image), stored(&file)];
    for (export, length) in [("qcow2", 190 * TIB), ("raw", 7 * TIB)] {
        let program = format!(
            "w = Wire()\nw.extended({export:?})\nw.request64(ZEROES, 5, {length}, NO_HOLE)\n\
             kind, payload = w.chunks()[0]\nassert kind == ERROR and payload[:4] == b'\\0\\0\\0\\x1c', (kind, payload)\n"
        );
        daemon.wire(&program);
    }
    for (path, before) in [&image, &file].into_iter().zip(before) {
        assert!(stored(path) < before + (1 << 20), "{}", path.display());
    }
    daemon.stop();
}
