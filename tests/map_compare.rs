//! `cowgate image map` and `cowgate image compare` beside qemu-img, on a zoo of images.

mod common;

use common::zoo;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn cowgate(directory: &Path, line: &str) -> Output {
    let words = line.split_whitespace();
    Command::new(env!("CARGO_BIN_EXE_cowgate"))
        .current_dir(directory)
        .arg("image")
        .args(words)
        .output()
        .expect("cowgate")
}

fn qemu_img(directory: &Path, line: &str) -> Output {
    Command::new("qemu-img").current_dir(directory).args(line.split_whitespace()).output().expect("qemu-img")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A map without the places that QEMU names for zeroes, which no client can see, in runs as long as possible.
/// `holes`: tell holes of the image file inside data clusters apart, which QEMU looks for in some images only.
fn runs(text: &str, holes: bool) -> Vec<(u64, u64, Value)> {
    let list: Vec<Value> = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let mut out: Vec<(u64, u64, Value)> = Vec::new();
    for mut run in list {
        let fields = run.as_object_mut().expect("an object");
        let take = |fields: &mut serde_json::Map<String, Value>, key: &str| fields.remove(key).and_then(|v| v.as_u64());
        let start = take(fields, "start").expect("start");
        let length = take(fields, "length").expect("length");
        let offset = take(fields, "offset");
        if fields["data"] == true
            && let Some(offset) = offset
        {
            // runs of data continue each other when they lie side by side
            fields.insert("shift".to_owned(), Value::from(offset.wrapping_sub(start)));
            if !holes {
                fields.remove("zero");
            }
        }
        match out.last_mut() {
            Some((_, end, last)) if *end == start && *last == run => *end = start + length,
            _ => out.push((start, start + length, run)),
        }
    }
    out
}

#[test]
fn map_says_what_qemu_says() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    for file in zoo::make(directory) {
        let theirs = stdout(&qemu_img(directory, &format!("map --output=json -f {} {file}", zoo::format(&file))));
        let ours = stdout(&cowgate(directory, &format!("map --json --format {} {file}", zoo::format(&file))));
        let holes = ["metadata.qcow2", "full.qcow2"].contains(&file.as_str());
        assert_eq!(runs(&ours, holes), runs(&theirs, holes), "{file}\n{ours}\n{theirs}");
        let table = stdout(&cowgate(directory, &format!("map --format {} {file}", zoo::format(&file))));
        let their_table = qemu_img(directory, &format!("map -f {} {file}", zoo::format(&file)));
        // QEMU has no table for compressed clusters
        if their_table.status.success() && runs(&ours, true) != runs(&theirs, true) {
            continue;
        } else if their_table.status.success() {
            assert_eq!(table, stdout(&their_table), "{file}");
        } else {
            assert!(table.contains("compressed"), "{file}: {table}");
        }
    }
}

#[test]
fn compare_agrees_with_qemu_on_every_pair() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    let files = zoo::make(directory);
    let (mut same, mut different) = (0, 0);
    for (i, a) in files.iter().enumerate() {
        for b in &files[i..] {
            for (x, y) in [(a, b), (b, a)] {
                let (f, g) = (zoo::format(x), zoo::format(y));
                let theirs = qemu_img(directory, &format!("compare -f {f} -F {g} {x} {y}"));
                let ours = cowgate(directory, &format!("compare --json --format-a {f} --format-b {g} {x} {y}"));
                let (text, their_text) =
                    (String::from_utf8_lossy(&ours.stdout), String::from_utf8_lossy(&theirs.stdout));
                assert_eq!(ours.status.code(), theirs.status.code(), "{x} {y}: {text}{their_text}");
                let answer: Value = serde_json::from_str(&text).expect("JSON");
                let at =
                    their_text.split("mismatch at offset ").nth(1).map(|rest| rest.trim_end().trim_end_matches('!'));
                assert_eq!(answer["offset"].as_u64(), at.map(|at| at.parse().expect("a number")), "{x} {y}");
                let counter = if answer["same"] == true { &mut same } else { &mut different };
                *counter += 1;
                if a == b {
                    break;
                }
            }
        }
    }
    assert!(same > 20 && different > 20, "{same} {different}");
}

#[test]
fn compare_verdicts_have_their_exit_status() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("a.raw"), vec![0; 1 << 20]).expect("file");
    std::fs::write(directory.join("longer.raw"), vec![0; 3 << 20]).expect("file");
    let mut bytes = vec![0; 3 << 20];
    bytes[(2 << 20) + 700] = 1;
    std::fs::write(directory.join("other.raw"), &bytes).expect("file");
    for (line, status, words) in [
        ("a.raw a.raw", 0, "the same"),
        ("a.raw longer.raw", 0, "longer"),
        ("longer.raw a.raw", 0, "longer"),
        ("--strict a.raw longer.raw", 1, "size"),
        ("--strict a.raw a.raw", 0, "the same"),
        ("a.raw other.raw", 1, "byte 2097664"),
        ("longer.raw other.raw", 1, "byte 2097664"),
        ("--quiet longer.raw other.raw", 1, ""),
        ("a.raw missing.raw", 2, ""),
        ("--format-a qcow2 a.raw a.raw", 2, ""),
    ] {
        let output = cowgate(directory, &format!("compare {line}"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(status), "{line}: {text}");
        assert!(text.contains(words) && (!words.is_empty() || text.is_empty()), "{line}: {text}");
        assert_eq!(output.stderr.is_empty(), status < 2, "{line}");
    }
}

#[test]
fn strict_comparison_wants_the_same_allocation() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    for (name, commands) in [("a", vec![]), ("b", vec!["write -z 1M 64k"]), ("c", vec!["write -P 0 1M 64k"])] {
        stdout(&qemu_img(directory, &format!("create -q -f qcow2 {name}.qcow2 4M")));
        for command in commands {
            let file = directory.join(format!("{name}.qcow2"));
            common::qemu::run(Command::new("qemu-io").args(["-c", command]).arg(file));
        }
    }
    for (x, y) in [("a", "a"), ("b", "b"), ("c", "c"), ("a", "b"), ("b", "c"), ("c", "a")] {
        for flags in ["", "--strict "] {
            let theirs =
                qemu_img(directory, &format!("compare {} {x}.qcow2 {y}.qcow2", flags.replace("--strict", "-s")));
            let ours = cowgate(directory, &format!("compare {flags}{x}.qcow2 {y}.qcow2"));
            assert_eq!(
                ours.status.code(),
                theirs.status.code(),
                "{flags}{x} {y}: {}",
                String::from_utf8_lossy(&theirs.stdout)
            );
        }
    }
}

#[test]
fn a_file_that_only_looks_like_an_image_names_nothing() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    std::fs::write(directory.join("secret"), vec![7; 1 << 20]).expect("file");
    stdout(&qemu_img(directory, "create -q -f qcow2 -b secret -F raw guest.img"));
    for line in ["map guest.img", "compare guest.img secret", "convert guest.img out.raw"] {
        let output = cowgate(directory, line);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && error.contains("guest.img") && error.contains("names other files"),
            "{error}"
        );
    }
    assert!(!directory.join("out.raw").exists());
    stdout(&cowgate(directory, "convert --source-format qcow2 guest.img out.raw"));
    assert_eq!(std::fs::read(directory.join("out.raw")).expect("copy"), vec![7; 1 << 20]);
}
