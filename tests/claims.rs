//! Block devices belong to one writer: one that is mounted is refused to writers, and one that a writer has cannot be
//! mounted. Readers share.

mod common;

use common::daemon::{Daemon, Setup};
use common::holder::Holder;
use common::qemu;
use common::root::{self, Loop, Mount};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A loop device with an ext4 file system.
fn formatted() -> Loop {
    let disk = Loop::new(16 * MIB);
    mkfs(disk.path()).unwrap();
    disk
}

fn mkfs(device: &Path) -> Result<(), String> {
    let out = qemu::output(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(device));
    if out.status.success() { Ok(()) } else { Err(qemu::text(&out.stderr)) }
}

/// A client that is refused; the log then holds the words.
#[track_caller]
fn refused(daemon: &Daemon, export: &str, words: &str) {
    assert!(Holder::client(&daemon.uri(export)).is_err(), "{export} was let in");
    daemon.wait_for(words, || daemon.log().contains(words));
}

#[track_caller]
fn connected(daemon: &Daemon, uri: &str) -> Holder {
    Holder::client(uri).unwrap_or_else(|said| panic!("{uri}: {said}\n{}", daemon.log()))
}

/// Waits until a device is nobody's: the last flush is done.
fn wait_until_free(daemon: &Daemon, device: &Path) {
    daemon.wait_for("the device to be given back", || Mount::device(device).is_ok());
}

#[test]
fn a_mounted_device_is_only_read() {
    if !root::available("mount a device") {
        return;
    }
    let disk = formatted();
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    setup.export("reader", disk.path(), "format = raw\nreadonly = true");
    let daemon = setup.start();
    let mount = Mount::device(disk.path()).unwrap();
    fs::write(mount.path().join("file"), "unharmed").unwrap();
    let device = disk.path().display();
    let words = format!("{device}: the device is not free: it is mounted at {}", mount.path().display());
    refused(&daemon, "disk", &words);
    // readers are served, and the log says once what that is worth
    let warning = format!("{device}: it is mounted at {}; what is read", mount.path().display());
    let one = connected(&daemon, &daemon.uri("reader"));
    let other = connected(&daemon, &daemon.tcp("reader"));
    daemon.wait_for(&warning, || daemon.log().contains(&warning));
    refused(&daemon, "disk", &words);
    drop(mount);
    let writer = connected(&daemon, &daemon.uri("disk"));
    assert!(Mount::device(disk.path()).is_err(), "mounted under a writer");
    drop((one, other, writer));
    wait_until_free(&daemon, disk.path());
    let mount = Mount::device(disk.path()).unwrap();
    assert_eq!(fs::read_to_string(mount.path().join("file")).unwrap(), "unharmed");
    let (_dir, log) = daemon.stop();
    assert_eq!(log.matches("what is read of it").count(), 1, "{log}");
}

#[test]
fn a_device_that_is_written_is_not_mounted() {
    if !root::available("mount a device") {
        return;
    }
    let disk = formatted();
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    setup.export("twin", disk.path(), "format = raw");
    setup.export("reader", disk.path(), "format = raw\nreadonly = true");
    let daemon = setup.start();
    let reader = connected(&daemon, &daemon.uri("reader"));
    drop(Mount::device(disk.path()).expect("a reader keeps nobody away"));
    // several writers on several workers, through two exports: one claim
    let uris = [daemon.uri("disk"), daemon.tcp("disk"), daemon.uri("twin"), daemon.tcp("twin")];
    let mut writers: Vec<Holder> = uris.iter().map(|uri| connected(&daemon, uri)).collect();
    while !writers.is_empty() {
        assert!(Mount::device(disk.path()).unwrap_err().contains("busy"));
        assert!(mkfs(disk.path()).unwrap_err().contains("in use"));
        writers.pop();
    }
    wait_until_free(&daemon, disk.path());
    mkfs(disk.path()).unwrap();
    drop(reader);
    // and again: the claim comes and goes with the writers
    let writer = connected(&daemon, &daemon.uri("disk"));
    assert!(Mount::device(disk.path()).is_err());
    drop(writer);
    wait_until_free(&daemon, disk.path());
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("what is read of it"), "{log}");
}

/// The claim ends with the process, whatever ends that.
#[test]
fn a_killed_daemon_claims_nothing() {
    if !root::available("mount a device") {
        return;
    }
    let disk = formatted();
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    let writer = connected(&daemon, &daemon.uri("disk"));
    assert!(Mount::device(disk.path()).is_err());
    let _dir = daemon.kill();
    drop(Mount::device(disk.path()).unwrap());
    drop(writer);
}

#[test]
fn a_data_file_that_is_a_device_is_claimed_too() {
    if !root::available("mount a device") {
        return;
    }
    let disk = formatted();
    let setup = Setup::new().generic("imageroots = /");
    let other = formatted();
    let image = setup.image("disk.qcow2", &format!("data_file={}", other.path().display()), "8M");
    // made on another device, so that the file system of this one stays
    qemu::run(
        Command::new("qemu-img")
            .args(["amend", "-f", "qcow2", "-o"])
            .arg(format!("data_file={}", disk.path().display()))
            .arg(&image),
    );
    setup.export("disk", &image, "");
    setup.export("reader", &image, "readonly = true");
    let daemon = setup.start();
    let mount = Mount::device(disk.path()).unwrap();
    let place = mount.path();
    refused(&daemon, "disk", &format!("the device is not free: it is mounted at {}", place.display()));
    drop(connected(&daemon, &daemon.uri("reader")));
    let words = format!("{}: it is mounted at", disk.path().display());
    daemon.wait_for(&words, || daemon.log().contains(&words));
    drop(mount);
    let writer = connected(&daemon, &daemon.uri("disk"));
    assert!(Mount::device(disk.path()).is_err());
    drop(writer);
    daemon.wait_for("the device to be given back", || Mount::device(disk.path()).is_ok());
    daemon.stop();
}

#[test]
fn what_has_a_device_is_said() {
    if !root::available("use a device as swap") {
        return;
    }
    let disk = Loop::new(16 * MIB);
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    qemu::run(Command::new("mkswap").arg(disk.path()));
    qemu::run(Command::new("swapon").arg(disk.path()));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(&daemon, "disk", "the device is not free: it is used as swap");
    }));
    qemu::run(Command::new("swapoff").arg(disk.path()));
    outcome.unwrap();
    let program = "import os, sys\nf = os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)\nprint('on', flush=True)\n\
                   sys.stdin.read()";
    let exclusive = Holder::python(program, disk.path().to_str().unwrap()).unwrap();
    refused(&daemon, "disk", "the device is not free: another program, or the kernel, has it for itself");
    drop(exclusive);
    drop(connected(&daemon, &daemon.uri("disk")));
    daemon.stop();
}

/// A partition and the disk it lies on.
#[test]
fn a_disk_with_a_mounted_partition_is_only_read() {
    if !root::available("make a partition") {
        return;
    }
    let disk = Loop::new(16 * MIB);
    let partition = disk.partition();
    mkfs(&partition).unwrap();
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    setup.export("part", &partition, "format = raw");
    let daemon = setup.start();
    let mount = Mount::device(&partition).unwrap();
    refused(&daemon, "part", &format!("it is mounted at {}", mount.path().display()));
    let name = partition.file_name().unwrap().display().to_string();
    refused(&daemon, "disk", &format!("its partition {name} is mounted at {}", mount.path().display()));
    drop(mount);
    // the one is part of the other: never two writers
    let writer = connected(&daemon, &daemon.uri("part"));
    refused(&daemon, "disk", "another program, or the kernel, has it for itself");
    drop(writer);
    daemon.wait_for("the partition", || Mount::device(&partition).is_ok());
    let writer = connected(&daemon, &daemon.uri("disk"));
    refused(&daemon, "part", "another program, or the kernel, has it for itself");
    drop(writer);
    daemon.stop();
}

/// The byte locks belong to a device's node, the claim to the device.
#[test]
fn a_device_has_one_writer_by_whatever_name() {
    if !root::available("make a device node") {
        return;
    }
    let disk = formatted();
    let setup = Setup::new();
    let node = setup.dir().join("node");
    fs::write(setup.dir().join("small.raw"), [1; 4096]).unwrap();
    qemu::run(Command::new("cp").arg("-R").arg(disk.path()).arg(&node));
    setup.export("disk", disk.path(), "format = raw");
    setup.export("node", &node, "format = raw");
    let daemon = setup.start();
    let writer = connected(&daemon, &daemon.uri("disk"));
    let through_node = connected(&daemon, &daemon.uri("node")); // found by its number: the same image
    let convert = ["image", "convert", "--force", "--output-format", "raw", "small.raw"];
    let mut cowgate = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    let out = qemu::output(cowgate.current_dir(daemon.dir()).args(convert).arg(&node));
    assert!(qemu::text(&out.stderr).contains("node: the device is not free"), "{}", qemu::text(&out.stderr));
    drop((writer, through_node));
    daemon.stop();
}

#[test]
fn commands_do_not_write_to_a_mounted_device() {
    if !root::available("mount a device") {
        return;
    }
    let disk = formatted();
    let bench = common::qimage::Bench::new();
    let device = disk.path().display();
    bench.qemu_img("create -q -f raw source.raw 8M");
    bench.qemu_img(&format!("create -q -f qcow2 -b {device} -F raw overlay.qcow2"));
    bench.qemu_io("overlay.qcow2", "write -P 5 1M 64k");
    let mount = Mount::device(disk.path()).unwrap();
    fs::write(mount.path().join("file"), "unharmed").unwrap();
    let words = format!("{device}: the device is not free: it is mounted at {}", mount.path().display());
    bench.refused(&format!("convert source.raw {device} --force"), &[&words]);
    bench.refused("commit overlay.qcow2", &[&words]);
    bench.refused(&format!("create {device} --size 1M --force"), &["is no regular file"]);
    assert!(disk.path().metadata().unwrap().file_type().is_block_device());
    assert_eq!(fs::read_to_string(mount.path().join("file")).unwrap(), "unharmed");
    // who only reads may: a command's user knows what is mounted
    bench.cowgate(&format!("convert {device} --format raw copy.raw"));
    drop(mount);
    qemu::run(Command::new("e2fsck").arg("-fn").arg(disk.path()));
    bench.cowgate("commit overlay.qcow2 --quiet");
    bench.cowgate(&format!("convert source.raw {device} --force --quiet"));
    assert!(fs::read(disk.path()).unwrap()[..8 << 20].iter().all(|&b| b == 0));
}

/// What was written and is not on the device yet is in the page cache, and zeroing has to get rid of it.
#[test]
fn unwritten_pages_do_not_keep_a_device_from_being_zeroed() {
    if !root::available("make a loop device") {
        return;
    }
    let disk = Loop::new(16 * MIB);
    let setup = Setup::new();
    setup.export("disk", disk.path(), "format = raw");
    let daemon = setup.start();
    daemon.python(
        "disk",
        "t = nbd.NBD()\nt.connect_uri(uri)\n\
         for i in range(64):\n    at = i * 200000\n    h.pwrite(b'x' * 100000, at)\n    \
         (h.trim if i % 2 else t.zero)(70000, at + 10000)\n    \
         assert t.pread(100000, at)[:10000] == b'x' * 10000\n    \
         assert h.pread(100000, at)[80000:] == b'x' * 20000\n    \
         assert i % 2 or h.pread(70000, at + 10000) == bytes(70000)\n",
    );
    daemon.stop();
}
