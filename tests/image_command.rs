//! `cowgate image` beside qemu-img.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

fn cowgate(directory: &Path, arguments: &str) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    run(command.current_dir(directory).arg("image").args(arguments.split_whitespace()))
}

fn qemu_img(directory: &Path, arguments: &str) -> Result<String, String> {
    run(Command::new("qemu-img").current_dir(directory).args(arguments.split_whitespace()))
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn what_create_makes_is_what_qemu_sees() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("base.raw"), vec![7; 3 << 20]).expect("base");
    for (arguments, backing, size, cluster) in [
        ("--size 10G a.qcow2", None, 10_u64 << 30, 64 << 10),
        ("--size 1M --cluster-size 512 b.qcow2", None, 1 << 20, 512),
        ("--backing a.qcow2 --backing-format qcow2 c.qcow2", Some(("a.qcow2", "qcow2")), 10_u64 << 30, 64 << 10),
        (
            "--backing base.raw --backing-format raw --size 8M --cluster-size 2M d.qcow2",
            Some(("base.raw", "raw")),
            8 << 20,
            2 << 20,
        ),
    ] {
        cowgate(directory, &format!("create {arguments}")).expect(arguments);
        let file = arguments.rsplit(' ').next().expect("a file");
        qemu_img(directory, &format!("check {file}")).expect(arguments);
        let theirs: Value =
            serde_json::from_str(&qemu_img(directory, &format!("info --output=json {file}")).expect(file))
                .expect("JSON");
        let ours: Value =
            serde_json::from_str(&cowgate(directory, &format!("info --json {file}")).expect(file)).expect("JSON");
        assert_eq!(
            (&ours["virtual-size"], &ours["cluster-size"]),
            (&Value::from(size), &Value::from(cluster)),
            "{arguments}"
        );
        assert_eq!(ours["backing-filename"].as_str(), backing.map(|b| b.0));
        assert_eq!(ours["backing-filename-format"].as_str(), backing.map(|b| b.1));
        for key in [
            "filename",
            "format",
            "virtual-size",
            "actual-size",
            "cluster-size",
            "backing-filename",
            "backing-filename-format",
            "dirty-flag",
        ] {
            assert_eq!(ours[key], theirs[key], "{file}: {key}");
        }
        for key in ["compat", "compression-type", "lazy-refcounts", "refcount-bits", "corrupt"] {
            assert_eq!(ours["format-specific"]["data"][key], theirs["format-specific"]["data"][key], "{file}: {key}");
        }
    }
}

#[test]
fn an_existing_file_is_replaced_on_request_only() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("a.qcow2"), b"precious").expect("file");
    let refused = cowgate(directory, "create --size 1M a.qcow2").expect_err("refused");
    assert!(refused.contains("a.qcow2") && refused.contains("--force"), "{refused}");
    assert_eq!(std::fs::read(directory.join("a.qcow2")).expect("file"), b"precious");
    cowgate(directory, "create --force --size 1M a.qcow2").expect("replaced");
    assert!(cowgate(directory, "info a.qcow2").expect("info").contains("virtual size: 1 MiB (1048576 bytes)"));
    let left: Vec<_> = std::fs::read_dir(directory).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left, ["a.qcow2"], "nothing temporary is left");
}

#[test]
fn errors_name_the_file() {
    let directory = tempfile::tempdir().expect("directory");
    for arguments in [
        "info missing.qcow2",
        "create --size 1M --cluster-size 3K odd.qcow2",
        "create --backing missing.qcow2 --backing-format qcow2 overlay.qcow2",
        "create --size 1M missing/a.qcow2",
    ] {
        let error = cowgate(directory.path(), arguments).expect_err(arguments);
        assert!(error.starts_with("cowgate: ") && error.contains(".qcow2") && error.lines().count() == 1, "{error}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).expect("list").count(), 0);
}

#[test]
fn info_says_what_qemu_says_about_images_it_made() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("content.raw"), [7; 200_000]).expect("content");
    for (file, made_by) in [
        ("v2.qcow2", "create -q -f qcow2 -o compat=0.10 v2.qcow2 10M"),
        ("lazy.qcow2", "create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=1,cluster_size=512 lazy.qcow2 10M"),
        ("wide.qcow2", "create -q -f qcow2 -o refcount_bits=64,cluster_size=2M wide.qcow2 1T"),
        ("zstd.qcow2", "convert -c -f raw -O qcow2 -o compression_type=zstd content.raw zstd.qcow2"),
        ("empty.qcow2", "create -q -f qcow2 empty.qcow2 0"),
        ("snapshots.qcow2", "convert -f raw -O qcow2 content.raw snapshots.qcow2"),
        ("some.raw", "convert -f raw -O raw content.raw some.raw"),
    ] {
        qemu_img(directory, made_by).expect(made_by);
        if file == "snapshots.qcow2" {
            for name in ["one", "two"] {
                qemu_img(directory, &format!("snapshot -c {name} {file}")).expect(name);
            }
        }
        let parse = |text: Result<String, String>| -> Value { serde_json::from_str(&text.expect(file)).expect("JSON") };
        let theirs = parse(qemu_img(directory, &format!("info --output=json {file}")));
        let ours = parse(cowgate(directory, &format!("info --json {file}")));
        for (key, value) in ours.as_object().expect("an object") {
            match key.as_str() {
                "format-specific" => {
                    for (key, value) in value["data"].as_object().expect("data") {
                        let theirs = &theirs["format-specific"]["data"][key];
                        // version 2 has no feature bits, and QEMU says nothing about them
                        let absent = theirs.is_null() && value == false;
                        assert!(absent || value == theirs, "{file}: {key}: {value}, not {theirs}");
                    }
                }
                "snapshots" => {
                    let names = |list: &Value| -> Vec<(String, String, u64)> {
                        let one = |s: &Value| {
                            let text = |key: &str| s[key].as_str().expect(key).to_owned();
                            (text("id"), text("name"), s["date-sec"].as_u64().expect("date"))
                        };
                        list.as_array().expect("snapshots").iter().map(one).collect()
                    };
                    assert_eq!(names(value), names(&theirs[key]), "{file}");
                }
                key => assert_eq!(value, &theirs[key], "{file}: {key}"),
            }
        }
    }
}

#[test]
fn sizes_are_whole_sectors_with_every_cluster_size() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    for (number, (size, cluster)) in
        (9..=21).map(|bits| (1_000_003_u64, 1_u64 << bits)).chain([(0, 65536), (1, 512), (1000, 65536)]).enumerate()
    {
        let file = format!("{number}.qcow2");
        cowgate(directory, &format!("create --size {size} --cluster-size {cluster} {file}")).expect(&file);
        qemu_img(directory, &format!("check {file}")).expect(&file);
        let ours: Value =
            serde_json::from_str(&cowgate(directory, &format!("info --json {file}")).expect(&file)).expect("JSON");
        let theirs: Value =
            serde_json::from_str(&qemu_img(directory, &format!("info --output=json {file}")).expect(&file))
                .expect("JSON");
        assert_eq!((&ours["virtual-size"], &ours["cluster-size"]), (&theirs["virtual-size"], &theirs["cluster-size"]));
        // QEMU would see 1000003 bytes as 999936
        let whole = size.next_multiple_of(512);
        assert_eq!((ours["virtual-size"].as_u64(), ours["cluster-size"].as_u64()), (Some(whole), Some(cluster)));
    }
}

#[test]
fn a_backing_file_name_fits_into_the_first_cluster_or_is_refused() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    // 512-byte clusters leave some 300 bytes; no cluster takes more than 1023
    for (len, small, large) in [(100, true, true), (800, false, true), (1100, false, false)] {
        let mut name = "d/".repeat((len - 5) / 2);
        name.push_str(if len % 2 == 0 { "b.raw" } else { "bb.raw" });
        let base = directory.join(&name);
        std::fs::create_dir_all(base.parent().expect("a parent")).expect("directories");
        std::fs::write(&base, [7; 4096]).expect("base");
        for (cluster, fits) in [("512", small), ("64K", large)] {
            let file = format!("overlay-{len}-{cluster}.qcow2");
            let create = format!("create --backing {name} --backing-format raw --cluster-size {cluster} {file}");
            match (cowgate(directory, &create), fits) {
                (Ok(_), true) => {
                    qemu_img(directory, &format!("check {file}")).expect(&file);
                    qemu_img(directory, &format!("compare {file} {name}")).expect(&file);
                }
                (Err(error), false) => {
                    assert!(error.contains(&file) && error.contains("backing"), "{error}");
                    assert!(!directory.join(&file).exists());
                }
                (result, _) => panic!("{file}: {result:?}"),
            }
        }
    }
}

#[test]
fn what_cannot_be_created_is_refused_in_words() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("base.raw"), [7; 4096]).expect("base");
    for (arguments, words) in [
        ("a.qcow2", "--size"),
        ("--size 1.5G a.qcow2", "whole number"),
        ("--size -1 a.qcow2", "unexpected argument"),
        ("--size 16384P a.qcow2", "too large"),
        ("--size 64P --cluster-size 512 a.qcow2", "larger cluster size"),
        ("--size 1M --cluster-size 256 a.qcow2", "power of two"),
        ("--size 1M --cluster-size 4M a.qcow2", "power of two"),
        ("--size 1M --cluster-size 3000 a.qcow2", "power of two"),
        ("--backing base.raw a.qcow2", "--backing-format"),
        ("--size 1M --backing-format raw a.qcow2", "--backing"),
        ("--backing base.raw --backing-format vmdk a.qcow2", "vmdk"),
        ("--backing base.raw --backing-format qcow2 a.qcow2", "not a QCOW2 image"),
        ("--backing . --backing-format raw a.qcow2", "directory"),
        ("--size 1M --force base.raw/a.qcow2", "Not a directory"),
    ] {
        let error = cowgate(directory, &format!("create {arguments}")).expect_err(arguments);
        assert!(error.contains(words), "{arguments}: {error}");
    }
    let left: Vec<_> = std::fs::read_dir(directory).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left, ["base.raw"], "nothing is left behind");
}

#[test]
fn commands_that_make_and_change_print_json_when_asked() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    let json = |arguments: &str| -> serde_json::Value {
        serde_json::from_str(&cowgate(directory, arguments).expect(arguments)).expect(arguments)
    };
    let made = json("create --size 8M --json a.qcow2");
    assert_eq!(made, json("info --json a.qcow2"));
    assert_eq!(json("bitmap add --json a.qcow2 b")[0]["name"], "b");
    assert_eq!(json("bitmap disable --json a.qcow2 b"), json("bitmap list --json a.qcow2"));
    assert_eq!(json("bitmap remove --json a.qcow2 b"), serde_json::json!([]));
    assert_eq!(json("resize --json a.qcow2 16M")["virtual-size"], 16 << 20);
    assert_eq!(json("check --json a.qcow2")["check-errors"], 0);
    assert_eq!(json("map --json a.qcow2")[0]["length"], 16 << 20);
    assert_eq!(json("convert --json a.qcow2 b.raw")["virtual-size"], 16 << 20);
    assert_eq!(json("compare --json a.qcow2 b.raw")["same"], true);
}
