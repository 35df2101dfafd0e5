//! WRITE_ZEROES and TRIM of huge ranges on every kind of export: right to the byte, without data being written.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Loop, Mount};
use std::fs::File;
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
    let image = setup.image("disk.qcow2", &options, &SIZE.to_string());
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let model = torment(&daemon, expect);
    let _dir = daemon.stop();
    qemu::check(&image);
    qemu::same_content(&image, &model);
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
