//! `cowgate image convert` beside qemu-img: every kind of image into every kind, and what must not happen on the way.

mod common;

use common::qemu::{check, run, text};
use common::root::{Loop, Mount, available};
use common::zoo;
use serde_json::Value;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn command(directory: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    command.current_dir(directory).args(["image", "convert"]).args(line.split_whitespace());
    command
}

fn convert(directory: &Path, line: &str) -> Output {
    command(directory, line).output().expect("cowgate")
}

#[track_caller]
fn converts(directory: &Path, line: &str) -> String {
    let output = convert(directory, line);
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn refused(directory: &Path, line: &str) -> String {
    let output = convert(directory, line);
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{line}: {error}");
    assert!(error.starts_with("cowgate: ") && error.lines().count() == 1, "{line}: {error}");
    error
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("list");
    let mut names: Vec<_> = entries.map(|e| e.expect("entry").file_name().into_string().expect("a name")).collect();
    names.sort();
    names
}

fn qemu(directory: &Path, line: &str) -> String {
    run(Command::new("qemu-img").current_dir(directory).args(line.split_whitespace()))
}

/// A program's output that compresses by half, with zeroes here and there.
fn content(bytes: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match state % 5 {
            0 => out.extend([0; 40_000]),
            1 => out.extend(state.to_le_bytes().repeat(700)),
            _ => out.extend((0..3000_u64).flat_map(|i| (state.wrapping_mul(i * 2 + 1) as u16).to_le_bytes())),
        }
    }
    out.truncate(bytes);
    out
}

#[test]
fn every_image_into_every_kind() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    let kinds = [
        ("raw", "--output-format raw"),
        ("qcow2", "--output-format qcow2"),
        ("qcow2", "--output-format qcow2 --cluster-size 512 --refcount-bits 1"),
        ("qcow2", "--output-format qcow2 --cluster-size 2M --compat v2"),
        ("qcow2", "--output-format qcow2 --extended-l2 --lazy-refcounts"),
        ("qcow2", "--output-format qcow2 --compress zlib"),
        ("qcow2", "--output-format qcow2 --compress zstd --cluster-size 4K"),
        ("qcow2", "--output-format qcow2 --compress zstd --cluster-size 2M"),
        ("qcow2", "--output-format qcow2 --compress zlib --extended-l2 --cluster-size 16K"),
    ];
    for (number, file) in zoo::make(directory).into_iter().enumerate() {
        let from = zoo::format(&file);
        // all kinds of destination with some images, a changing few with the others
        for (k, (to, options)) in kinds.iter().enumerate() {
            if !["zlib.qcow2", "third.qcow2"].contains(&file.as_str()) && (number + k) % 3 != 0 {
                continue;
            }
            let line = format!("--source-format {from} {options} --quiet --force {file} out");
            assert_eq!(converts(directory, &line), "");
            qemu(directory, &format!("compare -q -f {from} -F {to} {file} out"));
            if *to == "qcow2" {
                check(&directory.join("out"));
                let info: Value = serde_json::from_str(&qemu(directory, "info --output=json out")).expect("JSON");
                assert!(info.get("backing-filename").is_none(), "{file}");
            }
        }
        assert!(!names(directory).iter().any(|n| n.contains(".new-")), "nothing temporary is left");
    }
}

#[test]
fn a_snapshot_can_be_copied() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    zoo::make(directory);
    converts(directory, "--snapshot before snapshot.qcow2 ours.raw");
    qemu(directory, "convert -l before -f qcow2 -O raw snapshot.qcow2 theirs.raw");
    qemu(directory, "compare -q -f raw -F raw ours.raw theirs.raw");
    assert!(refused(directory, "--snapshot after snapshot.qcow2 no.raw").contains("before"));
}

#[test]
fn sizes_off_the_grid() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    for size in [0, 1, 511, 512, 65_537, 1_000_003, (2 << 20) + 512] {
        fs::write(directory.join("a.raw"), content(size)).expect("file");
        for options in ["", "--cluster-size 512", "--cluster-size 2M --compress zstd", "--compress zlib"] {
            converts(directory, &format!("--force {options} a.raw b.qcow2"));
            check(&directory.join("b.qcow2"));
            qemu(directory, "compare -q -f raw -F qcow2 a.raw b.qcow2");
        }
        converts(directory, "--force a.raw c.raw");
        assert_eq!(fs::read(directory.join("a.raw")).expect("a"), fs::read(directory.join("c.raw")).expect("c"));
    }
}

#[test]
fn compressed_output_is_small_and_zeroes_take_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(40 << 20)).expect("file");
    converts(directory, "a.raw plain.qcow2");
    let size = |name: &str| fs::metadata(directory.join(name)).expect(name).len();
    for kind in ["zlib", "zstd"] {
        let report = converts(directory, &format!("--json --force --compress {kind} a.raw packed.qcow2"));
        let report: Value = serde_json::from_str(&report).expect("JSON");
        assert_eq!(report["virtual-size"], 40 << 20);
        let judged: Value = serde_json::from_str(&qemu(directory, "check --output=json packed.qcow2")).expect("JSON");
        assert!(judged["compressed-clusters"].as_u64() > Some(300), "{judged}");
        qemu(directory, "compare -q -f raw -F qcow2 a.raw packed.qcow2");
        assert!(size("packed.qcow2") * 10 < size("plain.qcow2") * 9, "{kind}");
        qemu(directory, &format!("convert -c -f raw -O qcow2 -o compression_type={kind} a.raw theirs.qcow2"));
        assert!(size("packed.qcow2") <= size("theirs.qcow2") * 11 / 10, "about as small as QEMU's");
    }
    // zeroes as data do not become data
    fs::write(directory.join("zero.raw"), vec![0; 20 << 20]).expect("file");
    converts(directory, "zero.raw zero.qcow2");
    assert!(size("zero.qcow2") < 1 << 20);
    converts(directory, "zero.qcow2 again.raw");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(directory.join("again.raw")).expect("file").blocks(), 0);
}

#[test]
fn what_must_not_be_replaced_stays() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(100_000)).expect("file");
    fs::write(directory.join("b.qcow2"), b"precious").expect("file");
    qemu(directory, "create -q -f qcow2 -b a.raw -F raw top.qcow2");
    fs::hard_link(directory.join("a.raw"), directory.join("other.raw")).expect("link");
    let before = names(directory);
    for (line, words) in [
        ("a.raw b.qcow2", "--force"),
        ("--force a.raw a.raw", "file of the source"),
        ("--force a.raw other.raw", "file of the source"),
        ("--force top.qcow2 a.raw", "file of the source"),
        ("--force top.qcow2 top.qcow2", "file of the source"),
        ("a.raw c", "--output-format"),
        ("a.raw missing/c.raw", "No such file"),
        ("missing.raw c.raw", "missing.raw"),
        ("--compress zstd a.raw c.raw", "qcow2"),
        ("--compress zstd --compat v2 a.raw c.qcow2", "v3"),
        ("--cluster-size 3K a.raw c.qcow2", "power of two"),
        ("--source-format qcow2 a.raw c.raw", "not a QCOW2 image"),
    ] {
        let error = refused(directory, line);
        assert!(error.contains(words), "{line}: {error}");
        assert_eq!(names(directory), before, "{line}");
    }
    assert_eq!(fs::read(directory.join("b.qcow2")).expect("file"), b"precious");
    // an image that somebody writes is neither copied nor replaced
    qemu(directory, "create -q -f qcow2 used.qcow2 1M");
    let mut user = Command::new("qemu-io")
        .current_dir(directory)
        .arg("used.qcow2")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-io");
    std::thread::sleep(Duration::from_secs(1));
    assert!(refused(directory, "used.qcow2 c.raw").contains("in use"));
    assert!(refused(directory, "--force a.raw used.qcow2").contains("in use"));
    drop(user.stdin.take());
    user.wait().expect("qemu-io");
}

#[test]
fn a_broken_source_makes_no_copy() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(8 << 20)).expect("file");
    qemu(directory, "convert -f raw -O qcow2 a.raw whole.qcow2");
    qemu(directory, "convert -c -f raw -O qcow2 a.raw packed.qcow2");
    let whole = fs::read(directory.join("whole.qcow2")).expect("image");
    let packed = fs::read(directory.join("packed.qcow2")).expect("image");
    let l1 = u64::from_be_bytes(whole[40..48].try_into().expect("eight bytes")) as usize;
    let l2 = (u64::from_be_bytes(whole[l1..l1 + 8].try_into().expect("eight bytes")) & 0x00ff_ffff_ffff_fe00) as usize;
    let mut patched = whole.clone();
    patched[l2..l2 + 8].copy_from_slice(&(1u64 << 63 | 0x0012_3456_7890_1200).to_be_bytes());
    let mut noise = packed.clone();
    let at = noise.len() / 2;
    noise[at..at + 100_000].fill(0xa5);
    let before = names(directory);
    for (bytes, words) in [
        (&whole[..whole.len() / 2], "truncated"),
        (&whole[..100], "truncated"),
        (&packed[..packed.len() / 2], "byte"),
        (&patched[..], "byte"),
        (&noise[..], "compressed cluster"),
    ] {
        fs::write(directory.join("broken.qcow2"), bytes).expect("file");
        for options in ["b.raw", "b.qcow2", "--compress zstd b.qcow2"] {
            let (options, dest) = options.rsplit_once(' ').unwrap_or(("", options));
            let error = refused(directory, &format!("{options} broken.qcow2 {dest}"));
            assert!(error.contains("broken.qcow2") && error.contains(words), "{error}");
        }
        fs::remove_file(directory.join("broken.qcow2")).expect("removed");
        assert_eq!(names(directory), before);
    }
}

#[test]
fn a_copy_that_is_ended_leaves_no_image() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(200 << 20)).expect("file");
    for (signal, leftover) in [("KILL", true), ("INT", false), ("TERM", false)] {
        let mut child =
            command(directory, "--compress zlib a.raw b.qcow2").stderr(Stdio::piped()).spawn().expect("cowgate");
        let begun = || {
            names(directory)
                .iter()
                .any(|n| n.contains("b.qcow2.new-") && fs::metadata(directory.join(n)).is_ok_and(|m| m.len() > 4 << 20))
        };
        while !begun() {
            assert!(child.try_wait().expect("status").is_none(), "it ended before it could be stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
        run(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]));
        let ended = child.wait_with_output().expect("status");
        assert!(!ended.status.success());
        assert!(!directory.join("b.qcow2").exists(), "{signal}");
        let left: Vec<_> = names(directory).into_iter().filter(|n| n != "a.raw").collect();
        assert_eq!(!left.is_empty(), leftover, "{signal}: {left:?}");
        if !leftover {
            assert!(text(&ended.stderr).contains("stopped"), "{}", text(&ended.stderr));
        }
        left.iter().for_each(|n| fs::remove_file(directory.join(n)).expect("removed"));
    }
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(40 << 20)).expect("file");
    if !available("mount a small file system") {
        return;
    }
    for mount in [Mount::tmpfs(8), Mount::ext4(12)] {
        let small = mount.path();
        let before = names(&small);
        for options in ["", "--output-format raw", "--compress zstd"] {
            let line = format!("--output-format qcow2 {options} a.raw {}/b", small.display());
            let line = if options.ends_with("raw") { line.replace("--output-format qcow2 ", "") } else { line };
            let error = refused(directory, &line);
            assert!(error.contains("/b: ") && error.contains("No space left"), "{line}: {error}");
            assert_eq!(names(&small), before, "{line}");
        }
    }
}

#[test]
fn a_block_device_is_written_in_place() {
    if !available("make a loop device") {
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(6 << 20)).expect("file");
    fs::write(directory.join("large.raw"), content(20 << 20)).expect("file");
    qemu(directory, "convert -f raw -O qcow2 a.raw a.qcow2");
    let device = Loop::new(8 << 20);
    fs::write(device.path(), vec![0xee; 8 << 20]).expect("old content");
    let to = device.path().display();
    assert!(refused(directory, &format!("a.qcow2 {to}")).contains("--force"));
    assert!(refused(directory, &format!("--force large.raw {to}")).contains("8388608 bytes"));
    assert!(refused(directory, &format!("--force --output-format qcow2 a.qcow2 {to}")).contains("only the format raw"));
    converts(directory, &format!("--force a.qcow2 {to}"));
    let bytes = fs::read(device.path()).expect("device");
    assert!(bytes[..6 << 20] == fs::read(directory.join("a.raw")).expect("a")[..]);
    assert!(bytes[6 << 20..].iter().all(|&b| b == 0xee), "what lies behind the disk stays");
    assert!(refused(directory, &format!("--force --source-format raw {to} {to}")).contains("file of the source"));
    converts(directory, &format!("--source-format raw {to} from-device.qcow2"));
    qemu(directory, &format!("compare -q -f raw -F qcow2 {to} from-device.qcow2"));
}

#[test]
fn a_terminal_sees_progress_and_nobody_else_does() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::write(directory.join("a.raw"), content(60 << 20)).expect("file");
    let quiet = convert(directory, "a.raw b.qcow2");
    assert!(quiet.stderr.is_empty(), "{}", text(&quiet.stderr));
    assert_eq!(text(&quiet.stdout).lines().count(), 1, "{}", text(&quiet.stdout));
    assert!(text(&quiet.stdout).starts_with("b.qcow2: 60 MiB"), "{}", text(&quiet.stdout));
    let program = env!("CARGO_BIN_EXE_cowgate");
    for (options, bar) in [("", true), ("--quiet", false)] {
        let line = format!("{program} image convert --force --compress zlib {options} a.raw b.qcow2");
        let mut script = Command::new("script");
        script.current_dir(directory).args(["-qec", &line, "/dev/null"]).env("TERM", "xterm").stdin(Stdio::null());
        script.process_group(0);
        let Ok(output) = script.output() else {
            eprintln!("skipped: there is no script(1)");
            return;
        };
        let seen = text(&output.stdout);
        assert_eq!(seen.contains("converting ["), bar, "{options}: {seen:?}");
        assert!(output.status.success(), "{seen}");
    }
}
