//! Every property `cowgate image create` can give an image, alone and combined, as qemu-img sees it.

use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

fn run(directory: &Path, program: &str, line: &str) -> Result<String, String> {
    let output = Command::new(program).current_dir(directory).args(line.split_whitespace()).output().expect(program);
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

fn cowgate(directory: &Path, line: &str) -> Result<String, String> {
    run(directory, env!("CARGO_BIN_EXE_cowgate"), &format!("image {line}"))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("list");
    let mut names: Vec<_> = entries.map(|e| e.expect("entry").file_name().into_string().expect("a name")).collect();
    names.sort();
    names
}

#[test]
fn qemu_sees_every_property_in_every_combination() {
    let mut tried = 0;
    for compat in ["v2", "0.10", "v3", "1.1"] {
        for bits in ["16", "1", "64"] {
            for cluster in ["512", "64K", "2M"] {
                for flags in 0..16 {
                    if (bits == "64" || cluster == "2M") && !matches!(flags, 0 | 15) {
                        continue;
                    }
                    let mut ours = format!("--compat {compat} --refcount-bits {bits} --cluster-size {cluster}");
                    let mut theirs = format!("compat={compat},refcount_bits={bits},cluster_size={cluster}");
                    for (bit, our_word, their_word) in [
                        (1, " --extended-l2", ",extended_l2=on"),
                        (2, " --lazy-refcounts", ",lazy_refcounts=on"),
                        (4, " --compression zstd", ",compression_type=zstd"),
                        (8, " --data-file data.raw", ",data_file=data.raw"),
                    ] {
                        if flags & bit != 0 {
                            ours += our_word;
                            theirs += their_word;
                        }
                    }
                    if compat.contains('.') && flags != 0 {
                        continue; // an alias: once is enough
                    }
                    tried += usize::from(same_as_qemu(&ours, &theirs));
                }
            }
        }
    }
    assert!(tried > 50, "{tried}");
    assert!(same_as_qemu("--data-file data.raw --data-file-raw", "data_file=data.raw,data_file_raw=on"));
    assert!(same_as_qemu(
        "--data-file data.raw --data-file-raw --extended-l2 --lazy-refcounts",
        "data_file=data.raw,data_file_raw=on,extended_l2=on,lazy_refcounts=on"
    ));
    assert!(!same_as_qemu(
        "--compat v2 --data-file data.raw --data-file-raw",
        "compat=v2,data_file=data.raw,data_file_raw=on"
    ));
}

/// Whether both can make the image, which then has the same description.
fn same_as_qemu(ours: &str, theirs: &str) -> bool {
    let (left, right) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let made = cowgate(left.path(), &format!("create --size 10000K {ours} a.qcow2"));
    let their = run(right.path(), "qemu-img", &format!("create -q -f qcow2 -o {theirs} a.qcow2 10000K"));
    assert_eq!(made.is_ok(), their.is_ok(), "{ours}: {made:?}, {their:?}");
    if made.is_err() {
        assert!(names(left.path()).is_empty(), "{ours}: nothing is left behind");
        return false;
    }
    let describe = |directory: &Path| -> Value {
        let text = run(directory, "qemu-img", "info --output=json a.qcow2").expect(ours);
        serde_json::from_str(&text).expect("JSON")
    };
    let (left_info, right_info) = (describe(left.path()), describe(right.path()));
    for key in ["virtual-size", "cluster-size", "format", "dirty-flag", "format-specific"] {
        assert_eq!(left_info[key], right_info[key], "{ours}: {key}");
    }
    run(left.path(), "qemu-img", "check -q a.qcow2").expect(ours);
    run(left.path(), "qemu-img", "compare -q a.qcow2 a.qcow2").expect(ours);
    let data = |directory: &Path| fs::metadata(directory.join("data.raw")).ok().map(|m| m.len());
    // a raw data file is rounded up to whole clusters by QEMU
    if !ours.contains("--data-file-raw") {
        assert_eq!(data(left.path()), data(right.path()), "{ours}");
    }
    let told: Value = serde_json::from_str(&cowgate(left.path(), "info --json a.qcow2").expect(ours)).expect("JSON");
    for (key, value) in told["format-specific"]["data"].as_object().expect("data") {
        let theirs = &left_info["format-specific"]["data"][key];
        assert!(value == theirs || (theirs.is_null() && value == false), "{ours}: {key}: {value}, not {theirs}");
    }
    true
}

#[test]
fn a_data_file_lies_beside_its_image_and_replaces_nothing_unasked() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    fs::create_dir(directory.join("sub")).expect("directory");
    cowgate(directory, "create --size 1M --data-file d.raw sub/a.qcow2").expect("created");
    assert_eq!(names(&directory.join("sub")), ["a.qcow2", "d.raw"]);
    // QEMU takes the name relative to its working directory
    run(&directory.join("sub"), "qemu-img", "check -q a.qcow2").expect("QEMU finds the data file");

    fs::write(directory.join("precious"), b"precious").expect("file");
    let refused = cowgate(directory, "create --size 1M --data-file precious b.qcow2").expect_err("refused");
    assert!(refused.contains("precious") && refused.contains("--force"), "{refused}");
    assert_eq!(fs::read(directory.join("precious")).expect("file"), b"precious");
    for (arguments, words) in [
        ("--size 1M --data-file b.qcow2", "image itself"),
        ("--size 1M --data-file ./b.qcow2 --force", "image itself"),
        ("--size 1M --data-file sub --force", "regular file"),
        ("--size 1M --data-file sub/../precious --backing precious --backing-format raw --force", "backing file"),
        ("--size 1M --data-file d --data-file-raw --backing precious --backing-format raw", "cannot be used with"),
        ("--size 1M --data-file-raw", "--data-file"),
        ("--size 1M --data-file missing/d", "missing"),
        ("--size 1M --compat v2 --data-file d", "v3"),
        ("--size 1M --compat v2 --extended-l2", "v3"),
        ("--size 1M --compat v2 --refcount-bits 8", "v3"),
        ("--size 1M --compat v4", "v2"),
        ("--size 1M --refcount-bits 12", "1, 2, 4"),
        ("--size 1M --refcount-bits 128", "1, 2, 4"),
        ("--size 1M --extended-l2 --cluster-size 8K", "16384"),
        ("--size 1M --compression lz4", "zstd"),
    ] {
        let error = cowgate(directory, &format!("create {arguments} b.qcow2")).expect_err(arguments);
        assert!(error.contains(words), "{arguments}: {error}");
        assert_eq!(names(directory), ["precious", "sub"], "{arguments}");
    }
    assert_eq!(fs::read(directory.join("precious")).expect("file"), b"precious");
    cowgate(directory, "create --size 1M --data-file precious --force b.qcow2").expect("replaced");
    run(directory, "qemu-img", "check -q b.qcow2").expect("whole");
    assert_eq!(fs::read(directory.join("precious")).expect("file"), [0; 1 << 20]);
}

#[test]
fn a_long_data_file_name_needs_room_in_the_header() {
    let directory = tempfile::tempdir().expect("directory");
    let name = "x".repeat(250);
    for (cluster, fits) in [("4K", true), ("512", true)] {
        let made = cowgate(
            directory.path(),
            &format!("create --size 1M --cluster-size {cluster} --force --data-file {name} a.qcow2"),
        );
        assert_eq!(made.is_ok(), fits, "{made:?}");
        run(directory.path(), "qemu-img", "check -q a.qcow2").expect(cluster);
    }
    let deep = format!("{}/{}", "y".repeat(200), "z".repeat(200));
    fs::create_dir(directory.path().join("y".repeat(200))).expect("directory");
    let refused = cowgate(directory.path(), &format!("create --size 1M --cluster-size 512 --data-file {deep} b.qcow2"));
    assert!(refused.expect_err("too long").contains("512 bytes"));
}
