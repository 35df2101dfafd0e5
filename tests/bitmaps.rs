//! Persistent dirty bitmaps: QEMU's view of what a session through cowgate leaves behind, crashes, and the commands.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu::{self, qemu_img, qemus_bits, qemus_list, run};
use cowgate::block::BlockDev;
use cowgate::image::bitmap_edit::{Edit, edit_open};
use cowgate::image::{Disk, Format, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::ring;
use cowgate::ring::mem::{MemDisk, Seed};
use cowgate::units::{ByteRange, GuestOffset};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

fn cowgate(line: &str, paths: &[&Path]) -> std::process::Output {
    let mut words: Vec<std::ffi::OsString> = Vec::new();
    let mut paths = paths.iter();
    for word in line.split_whitespace() {
        words.push(if word == "@" { paths.next().unwrap().into() } else { word.into() });
    }
    qemu::output(Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["image", "bitmap"]).args(words))
}

#[track_caller]
fn bitmap(line: &str, paths: &[&Path]) -> String {
    let out = cowgate(line, paths);
    assert!(out.status.success(), "bitmap {line}: {}", qemu::text(&out.stderr));
    qemu::text(&out.stdout)
}

#[track_caller]
fn refused(line: &str, paths: &[&Path], words: &str) {
    let out = cowgate(line, paths);
    let text = qemu::text(&out.stderr);
    assert!(out.status.code() == Some(1) && text.contains(words), "bitmap {line}: {text:?} should say {words:?}");
}

/// Random changes as commands of qemu-io.
fn random_changes(size: u64, seed: &mut Seed, count: usize) -> Vec<String> {
    let mut changes = Vec::new();
    for _ in 0..count {
        let sectors = size / 512;
        let at = seed.below(sectors);
        let longest = if seed.chance(20) { 4096 } else { 40 };
        let len = 1 + seed.below((sectors - at).min(longest));
        let (at, len) = (at * 512, len * 512);
        changes.push(match seed.below(10) {
            0..6 => format!("write -P {} {at} {len}", 1 + seed.below(250)),
            6 => format!("write -z {at} {len}"),
            7 => format!("write -z -u {at} {len}"),
            _ => format!("discard {at} {len}"),
        });
    }
    changes
}

fn qemu_io(target: &str, format: &str, changes: &[String]) {
    let mut io = Command::new("qemu-io");
    io.args(["-f", format]);
    changes.iter().for_each(|change| {
        io.args(["-c", change]);
    });
    run(io.arg(target));
}

/// The writer has left and the image is settled.
fn wait_settled(daemon: &Daemon, times: usize) {
    daemon
        .wait_for("the last writer's flush", || daemon.log().matches("the last writer left, flushed").count() >= times);
}

fn seed() -> u64 {
    let seed = std::env::var("COWGATE_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    println!("COWGATE_SEED={seed}");
    seed
}

/// What sessions through cowgate leave behind is, bit for bit, what QEMU leaves behind when it makes the same changes.
fn as_qemu(cluster: &str, granularities: [&str; 2], size: u64) {
    let mut dice = Seed::new(seed());
    let setup = Setup::new();
    let image = setup.image("image.qcow2", &format!("cluster_size={cluster}"), &size.to_string());
    let [one, two] = granularities;
    qemu_img(&format!("bitmap --add -g {one}"), &[&image, Path::new("one")]);
    qemu_img(&format!("bitmap --add -g {two}"), &[&image, Path::new("two")]);
    qemu_io(image.to_str().unwrap(), "qcow2", &random_changes(size, &mut dice, 5));
    qemu_img(&format!("bitmap --add --disable -g {one}"), &[&image, Path::new("off")]);
    qemu_img("bitmap --merge one", &[&image, Path::new("off")]);
    let twin = setup.dir().join("twin.qcow2");
    fs::copy(&image, &twin).unwrap();
    setup.export("x", &image, "");
    let daemon = setup.start();
    for session in 1..=3 {
        let changes = random_changes(size, &mut dice, 25);
        qemu_io(&daemon.uri("x"), "raw", &changes);
        qemu_io(twin.to_str().unwrap(), "qcow2", &changes);
        wait_settled(&daemon, session);
        assert_eq!(qemus_list(&image), qemus_list(&twin), "no flag is left");
    }
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("image.qcow2");
    fs::copy(&image, &copy).unwrap();
    for name in ["one", "two", "off"] {
        assert_eq!(qemus_bits(&copy, name), qemus_bits(&twin, name), "bitmap {name}");
    }
    qemu::check(&copy);
    qemu_img("compare -f qcow2 -F qcow2", &[&copy, &twin]);
}

#[test]
fn ordinary_clusters() {
    as_qemu("64k", ["64k", "512"], (20 << 20) + 512);
}

#[test]
fn small_clusters() {
    as_qemu("4k", ["4k", "2M"], (9 << 20) + 1536);
}

#[test]
fn tiny_clusters_with_many_pieces_of_bits() {
    as_qemu("512", ["512", "1k"], (11 << 20) + 512);
}

#[test]
fn large_clusters() {
    as_qemu("2M", ["512", "128k"], (33 << 20) + 512);
}

#[test]
fn looking_changes_nothing() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "4M");
    bitmap("add @ b", &[&image]);
    let before = fs::read(&image).unwrap();
    setup.export("x", &image, "");
    let daemon = setup.start();
    qemu_io(&daemon.uri("x"), "raw", &["read 0 1M".to_owned(), "flush".to_owned()]);
    wait_settled(&daemon, 1);
    assert!(fs::read(&image).unwrap() == before);
}

/// Two clients on one image, and the daemon is told to stop while they are connected.
#[test]
fn sigterm_stores_the_bitmaps() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "64M");
    bitmap("add @ b", &[&image]);
    setup.export("x", &image, "");
    let daemon = setup.start();
    let uri = daemon.uri("x");
    let client = |from: u64| {
        let mut io = Command::new("qemu-io");
        io.args(["-f", "raw"]);
        for i in 0..30 {
            io.args(["-c", &format!("write -P 9 {}M 64k", from + 2 * i)]);
        }
        io.args(["-c", "sleep 60000", &uri]).stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut clients = [client(0), client(1)];
    let written = || {
        let bytes = fs::read(&image).unwrap();
        bytes.chunks(4096).filter(|c| c.iter().all(|&b| b == 9)).count() == 60 * 16
    };
    daemon.wait_for("the writes", written);
    assert_eq!(qemus_list(&image)[0]["flags"], serde_json::json!(["in-use", "auto"]));
    let (dir, _) = daemon.stop();
    for client in &mut clients {
        let _ = client.kill();
        client.wait().unwrap();
    }
    assert_eq!(qemus_list(&image)[0]["flags"], serde_json::json!(["auto"]));
    assert_eq!(qemus_bits(&image, "b"), (0..60).map(|i| (i << 20, 64 << 10)).collect::<Vec<_>>());
    qemu::check(&image);
    drop(dir);
}

#[test]
fn a_writer_that_only_connects_marks_them_and_takes_the_marks_back() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "8M");
    bitmap("add @ b", &[&image]);
    setup.export("x", &image, "");
    setup.export("reader", &image, "readonly = true");
    let daemon = setup.start();
    let flags = || qemus_list(&image)[0]["flags"].clone();
    let mut reader = Command::new("qemu-io");
    let mut reader = reader.args(["-r", "-f", "raw", "-c", "sleep 60000", &daemon.uri("reader")]).spawn().unwrap();
    daemon.wait_for("the reader", || daemon.log().contains("client connected"));
    assert_eq!(flags(), serde_json::json!(["auto"]));
    let mut writer = Command::new("qemu-io");
    let mut writer = writer.args(["-f", "raw", "-c", "sleep 60000", &daemon.uri("x")]).spawn().unwrap();
    daemon.wait_for("the bitmap to be marked", || flags() == serde_json::json!(["in-use", "auto"]));
    for client in [&mut writer, &mut reader] {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    daemon.wait_for("the mark to be taken back", || flags() == serde_json::json!(["auto"]));
    daemon.stop();
}

#[test]
fn a_bitmap_that_a_crash_left_in_use_stays_so() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "8M");
    bitmap("add @ lost", &[&image]);
    bitmap("add @ off --disabled", &[&image]);
    setup.export("x", &image, "");
    let daemon = setup.start();
    let uri = daemon.uri("x");
    let mut client = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 1M 1M", "-c", "flush", "-c", "sleep 60000", &uri])
        .spawn()
        .unwrap();
    let in_use = || qemus_list(&image)[0]["flags"] == serde_json::json!(["in-use", "auto"]);
    daemon.wait_for("the bitmap to be marked", in_use);
    daemon.wait_for("the write", || fs::read(&image).unwrap().windows(4096).step_by(4096).any(|w| w == [0xcd; 4096]));
    let dir = daemon.kill();
    let _ = client.kill();
    client.wait().unwrap();
    assert!(in_use());
    qemu::check_leaks_allowed(&image);
    bitmap("add @ new", &[&image]);

    let setup = Setup::new();
    setup.export("x", &image, "");
    let daemon = setup.start();
    qemu_io(&daemon.uri("x"), "raw", &["write 4M 64k".to_owned()]);
    wait_settled(&daemon, 1);
    assert!(daemon.log().contains("bitmap \"lost\" is not used"), "{}", daemon.log());
    drop(daemon);
    assert!(in_use());
    assert_eq!(qemus_list(&image)[1]["flags"], serde_json::json!([]));
    assert_eq!(qemus_list(&image)[2]["flags"], serde_json::json!(["auto"]));
    assert_eq!(qemus_bits(&image, "new"), vec![(4 << 20, 64 << 10)]);
    qemu::check_leaks_allowed(&image);
    for line in ["clear @ lost", "merge @ new lost", "merge @ lost new", "enable @ lost"] {
        refused(line, &[&image], "\"lost\" cannot be used");
    }
    bitmap("remove @ lost", &[&image]);
    assert_eq!(qemus_list(&image).as_array().unwrap().len(), 2);
    drop(dir);
}

#[test]
fn a_broken_directory_is_given_up_by_the_first_write() {
    let setup = Setup::new();
    let image = setup.image("image.qcow2", "", "8M");
    bitmap("add @ b", &[&image]);
    patch_directory(&image, |directory| directory[16] = 7);
    setup.export("x", &image, "");
    let daemon = setup.start();
    qemu_io(&daemon.uri("x"), "raw", &["read 0 1M".to_owned()]);
    wait_settled(&daemon, 1);
    assert!(daemon.log().contains("type is 7"), "{}", daemon.log());
    assert_eq!(fs::read(&image).unwrap()[95], 1, "nothing was written yet");
    refused("list @", &[&image], "type is 7");
    qemu_io(&daemon.uri("x"), "raw", &["write 0 1M".to_owned()]);
    wait_settled(&daemon, 2);
    assert_eq!(fs::read(&image).unwrap()[95], 0);
    qemu::check_leaks_allowed(&image);
    assert_eq!(bitmap("list @", &[&image]), "");
}

/// Changes the directory of an image with one small bitmap.
fn patch_directory(image: &Path, patch: impl FnOnce(&mut [u8])) {
    let mut bytes = fs::read(image).unwrap();
    let at = bytes.windows(8).position(|w| w == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24]).unwrap();
    let directory = u64::from_be_bytes(bytes[at + 24..at + 32].try_into().unwrap()) as usize;
    patch(&mut bytes[directory..]);
    fs::write(image, bytes).unwrap();
}

#[test]
fn overlaps_and_wrong_sizes_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    qemu_img("create -q -f qcow2", &[&image, Path::new("8M")]);
    bitmap("add @ b", &[&image]);
    let good = fs::read(&image).unwrap();
    let told = |patch: &dyn Fn(&mut [u8]), words: &str| {
        fs::write(&image, &good).unwrap();
        patch_directory(&image, patch);
        let setup = Setup::new();
        setup.export("x", &image, "");
        let daemon = setup.start();
        qemu_io(&daemon.uri("x"), "raw", &["write 0 1M".to_owned()]);
        wait_settled(&daemon, 1);
        assert!(daemon.log().contains(words), "{words:?} is not in {}", daemon.log());
        drop(daemon);
        qemu::check_leaks_allowed(&image);
    };
    // its table in the place of the L1 table
    told(&|d| d[..8].copy_from_slice(&0x30000u64.to_be_bytes()), "another structure");
    told(&|d| d[..8].copy_from_slice(&(1u64 << 40).to_be_bytes()), "past the end of the file");
    told(&|d| d[8..12].copy_from_slice(&2u32.to_be_bytes()), "its size is not that of the disk");
    told(&|d| d[20..24].copy_from_slice(&u32::MAX.to_be_bytes()), "the directory ends");
}

#[test]
fn the_commands_are_those_of_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours.qcow2"), dir.path().join("theirs.qcow2"));
    for image in [&ours, &theirs] {
        qemu_img("create -q -f qcow2 -o cluster_size=4k", &[image, Path::new("10M")]);
    }
    let same = |steps: &str| {
        assert_eq!(qemus_list(&ours), qemus_list(&theirs), "after {steps}");
        let listed: Value = serde_json::from_str(&bitmap("list --json @", &[&ours])).unwrap();
        let qemus = qemus_list(&ours);
        assert_eq!(listed, if qemus.is_null() { serde_json::json!([]) } else { qemus });
        for name in listed.as_array().unwrap().iter().map(|b| b["name"].as_str().unwrap().to_owned()) {
            assert_eq!(qemus_bits(&ours, &name), qemus_bits(&theirs, &name), "{name} after {steps}");
        }
        qemu::check(&ours);
    };
    let steps = [
        ("add @ a", "--add", "a"),
        ("add @ b --granularity 512 --disabled", "--add --disable -g 512", "b"),
        ("add @ c --granularity 256K", "--add -g 256k", "c"),
        ("write", "", ""),
        ("merge @ b a", "--merge a", "b"),
        ("clear @ a", "--clear", "a"),
        ("disable @ a", "--disable", "a"),
        ("write", "", ""),
        ("merge @ a c", "--merge c", "a"),
        ("enable @ b", "--enable", "b"),
        ("merge @ c b", "--merge b", "c"),
        ("write", "", ""),
        ("remove @ b", "--remove", "b"),
        ("remove @ a", "--remove", "a"),
        ("remove @ c", "--remove", "c"),
    ];
    let mut dice = Seed::new(seed());
    for (ours_line, theirs_line, name) in steps {
        if ours_line == "write" {
            let changes = random_changes(10 << 20, &mut dice, 12);
            for image in [&ours, &theirs] {
                qemu_io(image.to_str().unwrap(), "qcow2", &changes);
            }
        } else {
            bitmap(ours_line, &[&ours]);
            qemu_img(&format!("bitmap {theirs_line}"), &[&theirs, Path::new(name)]);
        }
        same(ours_line);
    }
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours.qcow2"), dir.path().join("theirs.qcow2"));
    qemu_img("create -q -f qcow2 -o cluster_size=512", &[&ours, Path::new("5M")]);
    bitmap("add @ fine --granularity 512", &[&ours]);
    bitmap("add @ coarse --granularity 64K", &[&ours]);
    fs::copy(&ours, &theirs).unwrap();
    let mut dice = Seed::new(seed());
    let mut size: u64 = 5 << 20;
    for step in 0..8 {
        let changes = random_changes(size, &mut dice, 12);
        for image in [&ours, &theirs] {
            qemu_io(image.to_str().unwrap(), "qcow2", &changes);
        }
        size = (1 + dice.below(16_000)) * 512;
        let to = size.to_string();
        let mut resize = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        run(resize.args(["image", "resize", "--shrink", "--quiet"]).arg(&ours).arg(&to));
        qemu_img("resize -q -f qcow2 --shrink", &[&theirs, Path::new(&to)]);
        assert_eq!(qemus_list(&ours), qemus_list(&theirs), "step {step}");
        for name in ["fine", "coarse"] {
            assert_eq!(qemus_bits(&ours, name), qemus_bits(&theirs, name), "{name} after step {step}, {size} bytes");
        }
        qemu::check(&ours);
        qemu_img("compare -f qcow2 -F qcow2", &[&ours, &theirs]);
    }
}

#[test]
fn bits_come_from_another_image_too() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b, short) = (dir.path().join("a.qcow2"), dir.path().join("b.qcow2"), dir.path().join("short.qcow2"));
    for (image, size) in [(&a, "10M"), (&b, "10M"), (&short, "9M")] {
        qemu_img("create -q -f qcow2", &[image, Path::new(size)]);
        bitmap("add @ b --granularity 4K", &[image]);
        qemu_io(image.to_str().unwrap(), "qcow2", &["write 3M 5k".to_owned()]);
    }
    qemu_img("bitmap --clear", &[&a, Path::new("b")]);
    bitmap("merge @ b b --source-image @", &[&a, &b]);
    assert_eq!(qemus_bits(&a, "b"), vec![(3 << 20, 8192)]);
    bitmap("merge @ b b --source-image @", &[&a, &a]);
    refused("merge @ b b --source-image @", &[&a, &short], "same size");
    qemu::check(&a);
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    qemu_img("create -q -f qcow2", &[&image, Path::new("10M")]);
    bitmap("add @ b", &[&image]);
    let before = fs::read(&image).unwrap();
    refused("add @ b", &[&image], "a bitmap \"b\" already");
    refused("add @ c --granularity 1000", &[&image], "granularity 1000");
    refused("add @ c --granularity 256", &[&image], "granularity 256");
    refused("add @ c --granularity 4G", &[&image], "granularity 4294967296");
    refused(&format!("add @ {}", "x".repeat(1024)), &[&image], "a name of 1024 bytes");
    for line in ["remove @ c", "clear @ c", "merge @ b c", "merge @ c b", "disable @ c"] {
        refused(line, &[&image], "there is no bitmap \"c\"");
    }
    assert!(fs::read(&image).unwrap() == before);
    let old = dir.path().join("old.qcow2");
    qemu_img("create -q -f qcow2 -o compat=0.10", &[&old, Path::new("1M")]);
    refused("add @ b", &[&old], "version 2");
    let empty = dir.path().join("empty.qcow2");
    qemu_img("create -q -f qcow2", &[&empty, Path::new("0")]);
    refused("add @ b", &[&empty], "0 bytes");
    let huge = dir.path().join("huge.qcow2");
    qemu_img("create -q -f qcow2", &[&huge, Path::new("10T")]);
    refused("add @ b --granularity 512", &[&huge], "larger granularity");
}

// ---- in the test double

fn made(size: u64, cluster: &str, granularity: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    qemu_img(&format!("create -q -f qcow2 -o cluster_size={cluster}"), &[&image, Path::new(&size.to_string())]);
    qemu_img(&format!("bitmap --add -g {granularity}"), &[&image, Path::new("b")]);
    fs::read(image).unwrap()
}

async fn opened(bytes: Vec<u8>) -> (MemDisk, Arc<Image>, Rc<Disk>) {
    let mem = MemDisk::new(bytes, 1);
    let image = Arc::new(Image::in_memory(&[(mem.clone(), Format::Qcow2)]).await.unwrap());
    image.begin_writing().unwrap();
    let disk = Disk::open(Arc::clone(&image), true).unwrap();
    (mem, image, disk)
}

async fn bits(disk: &Disk, name: &str) -> Result<Vec<(u64, u64)>, String> {
    let all = ByteRange::between(0, disk.image().size());
    let (mut at, mut dirty) = (0, Vec::new());
    for (len, set) in disk.dirty_runs(name.as_bytes(), all, usize::MAX - 1).await? {
        if set {
            dirty.push((at, len));
        }
        at += len;
    }
    Ok(dirty)
}

/// Writes the image to a file; QEMU finds no error in it, and no leak unless they are allowed.
fn judged(dir: &Path, image: &[u8], leaks: bool) -> std::path::PathBuf {
    let path = dir.join("image.qcow2");
    fs::write(&path, image).unwrap();
    if leaks {
        qemu::check_leaks_allowed(&path)
    } else {
        qemu::check(&path)
    }
    path
}

/// Cut off at every barrier of sessions that write and store: a bitmap is marked as in use, or exactly right.
fn cut_off(cluster: &str, granularity: u64, size: u64) {
    let seed = seed();
    let mut dice = Seed::new(seed);
    let bytes = made(size, cluster, &granularity.to_string());
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    ring::run(async {
        let (mem, _image, disk) = opened(bytes).await;
        mem.delay(4);
        let states = Arc::new(Mutex::new(Vec::new()));
        let (kept, mut cuts) = (Arc::clone(&states), Seed::new(seed ^ 0xc0ffee));
        mem.on_barrier(move |mem| {
            for _ in 0..2 {
                kept.lock().unwrap().push(mem.crash(&mut cuts));
            }
        });
        let mut right = vec![bits(&disk, "b").await.unwrap()];
        for _ in 0..3 {
            for _ in 0..10 {
                let at = dice.below(size);
                let len = 1 + dice.below((size - at).min(60_000));
                let range = ByteRange::between(at, at + len);
                match dice.below(4) {
                    0 => disk.discard(range).await.unwrap(),
                    1 => disk.flush().await.unwrap(),
                    _ => disk.write(GuestOffset(at), PageBuf::copy_of(&vec![7; len as usize])).await.0.unwrap(),
                }
            }
            disk.settle().await.unwrap();
            right.push(bits(&disk, "b").await.unwrap());
        }
        let path = judged(dir.path(), &mem.content(), false);
        assert_eq!(&qemus_bits(&path, "b"), right.last().unwrap());
        let states = std::mem::take(&mut *states.lock().unwrap());
        let (mut in_use, mut good) = (0, 0);
        for state in states {
            judged(dir.path(), &state, true);
            let (_, _, disk) = opened(state).await;
            match bits(&disk, "b").await {
                Err(why) if why.contains("not saved") => in_use += 1,
                Err(why) => panic!("{why}"),
                Ok(found) => {
                    good += 1;
                    assert!(right.contains(&found), "{found:?} is none of {right:?}");
                    // whatever was written is told
                    let (read, data) = disk.read(GuestOffset(0), PageBuf::new(size as usize)).await;
                    read.unwrap();
                    let told = |at: u64| found.iter().any(|&(start, len)| (start..start + len).contains(&at));
                    for (i, chunk) in data.chunks(512).enumerate() {
                        assert!(chunk.iter().all(|&b| b == 0) || told(i as u64 * 512) || told(i as u64 * 512 + 511));
                    }
                }
            }
        }
        assert!(in_use > 5 && good > 2, "{in_use} in use, {good} good");
    })
    .unwrap();
}

#[test]
fn cut_off_with_ordinary_clusters() {
    cut_off("64k", 65536, 3 << 20);
}

#[test]
fn cut_off_with_tiny_clusters() {
    for _ in 0..3 {
        cut_off("512", 512, (4 << 20) + 512);
    }
}

/// Cut off at every barrier of every command: the old bitmaps, the new ones, or none that are vouched for.
#[test]
fn cut_off_commands() {
    let seed = seed();
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let add = |granularity| Edit::Add { granularity: Some(granularity), disabled: false };
    let steps = [
        ("two", add(4096)),
        ("b", Edit::Disable),
        ("two", Edit::Merge { source: "b".into(), image: None }),
        ("b", Edit::Clear),
        ("b", Edit::Remove),
        ("two", Edit::Remove),
        ("three", add(512)),
    ];
    ring::run(async {
        let (mem, _image, disk) = opened(made(6 << 20, "4k", "4096")).await;
        let buf = PageBuf::copy_of(&[1; 70_000]);
        disk.write(GuestOffset(1 << 20), buf).await.0.unwrap();
        disk.settle().await.unwrap();
        let mut bytes = mem.content();
        for (name, edit) in steps {
            let before = qemus_list(&judged(dir.path(), &bytes, false));
            let (mem, _image, disk) = opened(bytes).await;
            let states = Arc::new(Mutex::new(Vec::new()));
            let (kept, mut cuts) = (Arc::clone(&states), Seed::new(seed));
            mem.on_barrier(move |mem| {
                for _ in 0..4 {
                    kept.lock().unwrap().push(mem.crash(&mut cuts));
                }
            });
            edit_open(&disk, name, &edit, None).await.unwrap();
            bytes = mem.content();
            let after = qemus_list(&judged(dir.path(), &bytes, false));
            assert_ne!(before.to_string() + &name.repeat(2), after.to_string());
            for state in std::mem::take(&mut *states.lock().unwrap()) {
                let list = qemus_list(&judged(dir.path(), &state, true));
                let none = list.is_null() && (before.is_null() || after.is_null());
                assert!(list == before || list == after || none, "{edit:?}: {list} is neither {before} nor {after}");
            }
        }
    })
    .unwrap();
}

#[test]
fn bits_that_find_no_space_leave_the_bitmap_in_use() {
    let dir = tempfile::tempdir().unwrap();
    ring::run(async {
        let (mem, _image, disk) = opened(made(8 << 20, "4k", "512")).await;
        disk.write(GuestOffset(0), PageBuf::copy_of(&[1; 4096])).await.0.unwrap();
        disk.flush().await.unwrap();
        mem.limit(mem.len());
        disk.settle().await.unwrap();
        mem.limit(u64::MAX);
        let path = judged(dir.path(), &mem.content(), true);
        assert_eq!(qemus_list(&path)[0]["flags"], serde_json::json!(["in-use", "auto"]));
        // and the image is written as before
        disk.write(GuestOffset(1 << 20), PageBuf::copy_of(&[2; 4096])).await.0.unwrap();
        disk.settle().await.unwrap();
        assert!(bits(&disk, "b").await.is_err());
        assert_eq!(qemus_list(&judged(dir.path(), &mem.content(), true))[0]["flags"][0], "in-use");
    })
    .unwrap();
}

/// More ranges than are held in memory go to the image early.
#[test]
fn many_ranges() {
    const COUNT: u64 = 300_000;
    let dir = tempfile::tempdir().unwrap();
    ring::run(async {
        let (mem, _image, disk) = opened(made(COUNT * 1024, "4k", "512")).await;
        for i in 0..COUNT {
            disk.discard(ByteRange::between(i * 1024, i * 1024 + 1)).await.unwrap();
        }
        assert_eq!(bits(&disk, "b").await.unwrap().len() as u64, COUNT, "noted and stored together");
        disk.settle().await.unwrap();
        let found = bits(&disk, "b").await.unwrap();
        assert!(found.iter().enumerate().all(|(i, &run)| run == (i as u64 * 1024, 512)));
        let path = judged(dir.path(), &mem.content(), false);
        assert_eq!(qemus_bits(&path, "b"), found);
        // all of the disk at once: whole pieces of bits need no cluster any more
        disk.discard(ByteRange::between(0, COUNT * 1024)).await.unwrap();
        disk.settle().await.unwrap();
        let path = judged(dir.path(), &mem.content(), false);
        assert_eq!(qemus_bits(&path, "b"), vec![(0, COUNT * 1024)]);
    })
    .unwrap();
}
