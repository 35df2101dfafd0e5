//! `cowgate image commit`, `flatten` and `rebase` beside qemu-img.

mod common;

use common::qemu;
use common::qimage::{Bench, ZOO};
use common::root::{self, Mount};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// What an overlay holds itself: data across clusters, zeroes over data below, parts of clusters, its last sector.
const OVERLAY: &str = "write -P 21 100k 300k; write -z 500k 700k; write -P 22 2000k 512; write -P 23 3147264 512; \
                       write -z 2600k 1k; write -P 24 2900k 64k";

/// A chain: base below middle below top, which is a disk of 3 MiB and 2048 bytes.
struct Chain {
    bench: Bench,
}

impl Chain {
    /// `lengths` of base and middle in bytes; the base is a raw file when `raw`.
    fn new(options: &str, lengths: (u64, u64), raw: bool) -> Chain {
        let bench = Bench::new();
        let (base, middle) = lengths;
        bench.qemu_img(&format!("create -q -f qcow2 base.qcow2 {base}"));
        bench.qemu_io("base.qcow2", &format!("write -P 1 0 {}; write -z 300k 64k", base / 512 * 512));
        let format = if raw { "raw" } else { "qcow2" };
        if raw {
            bench.content("base.qcow2", "base.raw");
        }
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.{format} -F {format} middle.qcow2 {middle}"));
        bench.qemu_io("middle.qcow2", "write -P 11 64k 200k; write -z 1200k 300k; write -P 12 1600k 100k");
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} -b middle.qcow2 -F qcow2 top.qcow2 3147776"));
        bench.qemu_io("top.qcow2", OVERLAY);
        // a compressed cluster is written as a whole
        if bench.info("top.qcow2")["cluster-size"].as_u64().unwrap() > 65536 {
            let backing = "backing_file=middle.qcow2,backing_fmt=qcow2";
            bench.qemu_img(&format!("convert -c -f qcow2 -O qcow2 -o {options},{backing} top.qcow2 packed.qcow2"));
            std::fs::rename(bench.path("packed.qcow2"), bench.path("top.qcow2")).unwrap();
        } else {
            bench.qemu_io("top.qcow2", "write -c -P 25 2M 64k");
        }
        bench.content("top.qcow2", "want.raw");
        bench.content("middle.qcow2", "middle.raw");
        Chain { bench }
    }
}

/// Backing files shorter than, as long as and longer than the disk.
const LENGTHS: &[(u64, u64)] = &[(5 * MIB, 5 * MIB), (MIB + 512, 2 * MIB + 1024), (3_147_776, 3_147_776)];

/// Runs a test for every kind of image over different kinds of chains.
fn zoo(mut test: impl FnMut(&str, (u64, u64), bool)) {
    for (n, options) in ZOO.iter().enumerate() {
        test(options, LENGTHS[n % LENGTHS.len()], n % 2 == 0);
        test(options, LENGTHS[(n + 1) % LENGTHS.len()], n % 2 == 1);
    }
}

#[track_caller]
fn same(bench: &Bench, a: &str, b: &str, keys: &[&str]) {
    let (a, b) = (bench.info(a), bench.info(b));
    for key in keys {
        assert_eq!(a[key], b[key], "{key}");
    }
}

#[test]
fn commit_does_what_qemu_img_does() {
    zoo(|options, lengths, raw| {
        let Chain { bench } = Chain::new(options, lengths, raw);
        for (from, to) in [("middle", "theirs-middle"), ("top", "theirs-top")] {
            bench.copy(&format!("{from}.qcow2"), &format!("{to}.qcow2"));
        }
        bench.qemu_img("rebase -u -f qcow2 -b theirs-middle.qcow2 -F qcow2 theirs-top.qcow2");
        bench.qemu_img("commit -q -f qcow2 theirs-top.qcow2");
        bench.cowgate("commit top.qcow2 --keep --quiet");
        bench.is("top.qcow2", "want.raw");
        bench.content("theirs-middle.qcow2", "middle.raw");
        bench.is("middle.qcow2", "middle.raw");
        bench.cowgate("commit top.qcow2 --quiet");
        bench.is("top.qcow2", "want.raw");
        bench.is("middle.qcow2", "middle.raw");
        same(&bench, "middle.qcow2", "theirs-middle.qcow2", &["virtual-size", "backing-filename", "cluster-size"]);
        same(&bench, "top.qcow2", "theirs-top.qcow2", &["virtual-size", "backing-filename-format", "cluster-size"]);
        let map = bench.qemu_img("map -f qcow2 --output=json top.qcow2");
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let own = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0 && e["data"] == true).count();
        assert_eq!(own, 0, "the overlay is empty: {map}");
        // and once more: nothing is left to do; then down to the base
        let again: serde_json::Value = serde_json::from_str(&bench.cowgate("commit top.qcow2 --json")).unwrap();
        assert_eq!(again["data"], 0);
        bench.cowgate("commit middle.qcow2 --quiet");
        bench.is("middle.qcow2", "middle.raw");
        bench.is("top.qcow2", "want.raw");
    });
}

#[test]
fn flatten_keeps_the_content_and_what_is_zero_sparse() {
    zoo(|options, lengths, raw| {
        let Chain { bench } = Chain::new(options, lengths, raw);
        bench.copy("top.qcow2", "theirs.qcow2");
        bench.qemu_img("rebase -q -f qcow2 -b '' theirs.qcow2");
        bench.cowgate("flatten top.qcow2 --quiet");
        for gone in ["base.qcow2", "middle.qcow2"] {
            std::fs::rename(bench.path(gone), bench.path("elsewhere")).unwrap();
        }
        bench.is("top.qcow2", "want.raw");
        let info = bench.info("top.qcow2");
        assert!(info["backing-filename"].is_null() && info["backing-filename-format"].is_null(), "{info}");
        same(&bench, "top.qcow2", "theirs.qcow2", &["virtual-size", "cluster-size", "backing-filename"]);
        let allocated = |image: &str| -> u64 {
            let map = bench.qemu_img(&format!("map -f qcow2 --output=json {image}"));
            let map: serde_json::Value = serde_json::from_str(&map).unwrap();
            map.as_array().unwrap().iter().filter(|e| e["data"] == true).map(|e| e["length"].as_u64().unwrap()).sum()
        };
        assert!(allocated("top.qcow2") <= allocated("theirs.qcow2"), "{options}");
        let again: serde_json::Value = serde_json::from_str(&bench.cowgate("flatten top.qcow2 --json")).unwrap();
        assert_eq!((&again["data"], &again["backing-filename"]), (&0.into(), &serde_json::Value::Null));
    });
}

#[test]
fn rebase_keeps_the_content_over_any_other_backing_file() {
    zoo(|options, lengths, raw| {
        let Chain { bench } = Chain::new(options, lengths, raw);
        let base = if raw { "base.raw --backing-format raw" } else { "base.qcow2 --backing-format qcow2" };
        // data where the old chain has zeroes or ends, zeroes where it has data, much that is the same
        bench.qemu_img("create -q -f qcow2 other.qcow2 4500K");
        bench.qemu_io("other.qcow2", "write -P 1 0 1M; write -P 31 1M 100k; write -P 32 1200k 3300k");
        bench.qemu_img("create -q -f qcow2 short.qcow2 700K");
        bench.qemu_io("short.qcow2", "write -P 33 0 700k");
        for to in ["other.qcow2 --backing-format qcow2", base, "short.qcow2 --backing-format qcow2"] {
            bench.copy("top.qcow2", "moved.qcow2");
            bench.cowgate(&format!("rebase moved.qcow2 --backing {to} --quiet"));
            bench.is("moved.qcow2", "want.raw");
            let name = to.split(' ').next().unwrap();
            let info = bench.info("moved.qcow2");
            let format = name.rsplit('.').next().unwrap();
            assert_eq!((&info["backing-filename"], &info["backing-filename-format"]), (&name.into(), &format.into()));
            bench.cowgate("rebase moved.qcow2 --backing '' --quiet");
            bench.is("moved.qcow2", "want.raw");
            bench.cowgate(&format!("rebase moved.qcow2 --backing {to} --quiet"));
            bench.is("moved.qcow2", "want.raw");
        }
    });
}

#[test]
fn what_a_new_backing_file_has_already_is_not_copied() {
    let Chain { bench } = Chain::new("cluster_size=64K", (5 * MIB, 5 * MIB), false);
    bench.copy("middle.qcow2", "twin.qcow2");
    let done = bench.cowgate("rebase top.qcow2 --backing twin.qcow2 --backing-format qcow2 --json");
    let done: serde_json::Value = serde_json::from_str(&done).unwrap();
    assert_eq!((&done["data"], &done["zeroes"]), (&0.into(), &0.into()));
    bench.is("top.qcow2", "want.raw");
    // without the middle layer only what that provides is taken in
    let done = bench.cowgate("rebase top.qcow2 --backing base.qcow2 --backing-format qcow2 --json");
    let done: serde_json::Value = serde_json::from_str(&done).unwrap();
    assert!(done["data"].as_u64().unwrap() < MIB, "{done}");
    bench.is("top.qcow2", "want.raw");
}

#[test]
fn unsafe_changes_the_header_only() {
    let Chain { bench } = Chain::new("cluster_size=64K", (5 * MIB, 5 * MIB), false);
    std::fs::create_dir(bench.path("sub")).unwrap();
    std::fs::rename(bench.path("middle.qcow2"), bench.path("sub/moved.qcow2")).unwrap();
    bench.qemu_img("rebase -u -f qcow2 -b ../base.qcow2 -F qcow2 sub/moved.qcow2");
    bench.refused("rebase top.qcow2 --backing sub/moved.qcow2 --backing-format qcow2", &["middle.qcow2"]);
    bench.cowgate("rebase top.qcow2 --backing sub/moved.qcow2 --backing-format qcow2 --unsafe");
    bench.is("top.qcow2", "want.raw");
    bench.cowgate("rebase top.qcow2 --backing not-there-yet.raw --backing-format raw --unsafe");
    let info = bench.info("top.qcow2");
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&"not-there-yet.raw".into(), &"raw".into())
    );
    bench.cowgate("rebase top.qcow2 --backing '' --unsafe");
    assert!(bench.info("top.qcow2")["backing-filename"].is_null());
    qemu::check(&bench.path("top.qcow2"));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let Chain { bench } = Chain::new("cluster_size=512", (5 * MIB, 5 * MIB), false);
    let before = std::fs::read(bench.path("top.qcow2")).unwrap();
    bench.refused("commit base.qcow2", &["base.qcow2", "no backing file"]);
    for how in ["", " --unsafe"] {
        let to = |name: &str| format!("rebase middle.qcow2 --backing {name} --backing-format qcow2{how}");
        bench.refused(&to("middle.qcow2"), &["middle.qcow2", "refer to itself"]);
        bench.refused(&to("top.qcow2"), &["top.qcow2", "refer to itself"]);
        bench.refused(&to(&"x".repeat(1024)), &["1024 bytes", "1023"]);
        bench.refused(&to("nbd://host/x"), &["nbd://host/x", "no protocols"]);
        // tiny clusters have no room for a long name beside the header
        bench.refused(&to(&format!("{}base.qcow2", "./".repeat(250))), &["middle.qcow2", "bytes", "shorter name"]);
    }
    bench.refused("rebase top.qcow2 --backing base.qcow2", &["--backing-format"]);
    bench.refused("rebase top.qcow2 --backing '' --backing-format raw", &["--backing-format"]);
    bench.refused("rebase top.qcow2 --backing missing.qcow2 --backing-format qcow2", &["missing.qcow2"]);
    bench.qemu_img("create -q -f qcow2 -o data_file=d.data,data_file_raw=on d.qcow2 1M");
    bench.refused("rebase d.qcow2 --backing base.qcow2 --backing-format qcow2", &["d.qcow2", "raw image"]);
    assert!(std::fs::read(bench.path("top.qcow2")).unwrap() == before, "nothing was changed");
    bench.qemu_img("snapshot -c one top.qcow2");
    for line in
        ["commit top.qcow2", "flatten top.qcow2", "rebase top.qcow2 --backing base.qcow2 --backing-format qcow2"]
    {
        bench.refused(line, &["top.qcow2", "internal snapshots", "qemu-img snapshot -d"]);
    }
}

#[test]
fn images_in_use_are_left_alone() {
    let Chain { bench } = Chain::new("cluster_size=64K", (MIB, 2 * MIB), false);
    bench.qemu_img("create -q -f qcow2 -b middle.qcow2 -F qcow2 sibling.qcow2");
    let lines = [
        "commit top.qcow2",
        "flatten top.qcow2",
        "rebase top.qcow2 --backing base.qcow2 --backing-format qcow2",
        "rebase top.qcow2 --backing base.qcow2 --backing-format qcow2 --unsafe",
    ];
    for line in lines {
        let _holder = bench.hold("top.qcow2");
        bench.refused(line, &["top.qcow2", "in use by qemu-io (pid ", "stop that program"]);
    }
    for line in &lines[..3] {
        let _holder = bench.hold("middle.qcow2");
        bench.refused(line, &["middle.qcow2", "in use by qemu-io (pid "]);
    }
    {
        // a reader below does not mind a flattening, and does not let the backing file change
        let _holder = bench.hold("sibling.qcow2");
        bench.refused("commit top.qcow2", &["middle.qcow2", "in use by qemu-io (pid "]);
        bench.cowgate("flatten top.qcow2 --quiet");
    }
    bench.is("top.qcow2", "want.raw");
}

#[test]
fn overlays_with_external_data_files_and_backing_files_with_snapshots() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 base.qcow2 4M");
    bench.qemu_io("base.qcow2", "write -P 1 0 4M");
    bench.qemu_img("snapshot -c one base.qcow2");
    bench.content("base.qcow2", "snapshot.raw");
    // QEMU looks for a data file in its own directory, not in the image's
    let data_file = bench.path("top.data");
    bench.qemu_img(&format!(
        "create -q -f qcow2 -o data_file={} -b base.qcow2 -F qcow2 top.qcow2 4M",
        data_file.display()
    ));
    bench.qemu_io("top.qcow2", "write -P 2 1M 1M; write -z 2M 100k");
    bench.content("top.qcow2", "want.raw");
    bench.cowgate("commit top.qcow2 --quiet");
    bench.is("top.qcow2", "want.raw");
    bench.is("base.qcow2", "want.raw");
    bench.qemu_img("convert -l snapshot.name=one -O raw base.qcow2 found.raw");
    bench.qemu_img("compare -f raw -F raw found.raw snapshot.raw");
    bench.cowgate("flatten top.qcow2 --quiet");
    bench.is("top.qcow2", "want.raw");
}

#[test]
fn bitmaps_stay_true() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 base.qcow2 4M");
    bench.qemu_io("base.qcow2", "write -P 1 0 3M");
    bench.qemu_img("create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 4M");
    bench.qemu_img("bitmap --add top.qcow2 above");
    bench.qemu_img("bitmap --add base.qcow2 below");
    bench.qemu_io("top.qcow2", "write -P 2 1M 64k");
    bench.content("top.qcow2", "want.raw");
    let dirty = |image: &str, bitmap: &str| -> u64 {
        let map = qemu::run(
            Command::new("nbdinfo")
                .arg(format!("--map=qemu:dirty-bitmap:{bitmap}"))
                .args(["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", bitmap])
                .arg(bench.path(image))
                .arg("]"),
        );
        let words = map.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        words.filter(|words| words[3] == "dirty").map(|words| words[1].parse::<u64>().unwrap()).sum()
    };
    bench.cowgate("commit top.qcow2 --quiet");
    bench.is("top.qcow2", "want.raw");
    assert_eq!((dirty("top.qcow2", "above"), dirty("base.qcow2", "below")), (65536, 65536));
    bench.cowgate("flatten top.qcow2 --quiet");
    bench.is("top.qcow2", "want.raw");
    assert!(dirty("top.qcow2", "above") >= 65536);
}

/// Images whose commands take a while: small clusters, much data.
fn slow() -> Bench {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 -o cluster_size=4096 base.qcow2 48M");
    let writes = |pattern: u32, from: u64| -> String {
        (0..48).map(|n| format!("write -P {pattern} {}k 500k;", n * 1024 + from)).collect()
    };
    bench.qemu_io("base.qcow2", &writes(1, 500));
    bench.qemu_img("create -q -f qcow2 -o cluster_size=4096 other.qcow2 48M");
    bench.qemu_io("other.qcow2", "write -P 3 20M 28M");
    bench.qemu_img("create -q -f qcow2 -o cluster_size=4096 -b base.qcow2 -F qcow2 top.qcow2 56M");
    bench.qemu_io("top.qcow2", &writes(2, 100));
    bench.content("top.qcow2", "want.raw");
    bench
}

fn killed(line: &str, images: &[&str]) {
    let bench = slow();
    for image in images {
        bench.copy(image, &format!("fresh-{image}"));
    }
    let started = std::time::Instant::now();
    bench.cowgate(&format!("{line} --quiet"));
    let takes = started.elapsed().as_millis() as u64;
    let mut killed = 0;
    for round in 0..18_u64 {
        for image in images {
            bench.copy(&format!("fresh-{image}"), image);
        }
        // anywhere in its run, and a second time while it makes up for that
        for part in [round * 7 % 18, (round * 5 + 3) % 18] {
            killed += u32::from(bench.kill_after(line, takes * part / 18 + 2));
            bench.is_after_a_crash("top.qcow2", "want.raw");
            for image in images {
                qemu::check_leaks_allowed(&bench.path(image));
            }
        }
        if bench.info("top.qcow2")["backing-filename"] == "base.qcow2" {
            bench.cowgate(&format!("{line} --quiet"));
        }
        bench.is_after_a_crash("top.qcow2", "want.raw");
        if line.starts_with("commit") {
            bench.is_after_a_crash("base.qcow2", "want.raw");
        } else {
            assert_ne!(bench.info("top.qcow2")["backing-filename"], "base.qcow2");
        }
    }
    assert!(killed >= 15, "only {killed} of 36 were killed in time");
}

#[test]
fn commit_killed_at_any_moment_is_finished_by_the_next() {
    killed("commit top.qcow2", &["top.qcow2", "base.qcow2"]);
}

#[test]
fn flatten_killed_at_any_moment_is_finished_by_the_next() {
    killed("flatten top.qcow2", &["top.qcow2"]);
}

#[test]
fn rebase_killed_at_any_moment_is_finished_by_the_next() {
    killed("rebase top.qcow2 --backing other.qcow2 --backing-format qcow2", &["top.qcow2"]);
}

/// Runs a command on `top.qcow2` where there is no space, then again when there is.
fn full(line: &str, what_grows: &str) {
    if !root::available("mount a small ext4") {
        return;
    }
    let bench = slow();
    let mount = Mount::ext4(96);
    let place = |name: &str| mount.path().join(name);
    let copy = |name: &str| std::fs::copy(bench.path(name), place(name)).map(drop).unwrap();
    copy("top.qcow2");
    copy("base.qcow2");
    let ballast = place("ballast");
    let free = || -> u64 {
        let out = qemu::run(Command::new("df").args(["--output=avail", "-B1"]).arg(mount.path()));
        out.lines().last().unwrap().trim().parse().unwrap()
    };
    let left = 4 * MIB;
    File::create(&ballast).unwrap().write_all_at(&vec![1; (free() - left) as usize], 0).unwrap();
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        command
            .arg("image")
            .args(line.split(' ').map(|w| w.replace("OTHER", bench.path("other.qcow2").to_str().unwrap())));
        command.current_dir(mount.path()).arg("--quiet");
        command
    };
    let out = qemu::output(&mut command());
    let said = qemu::text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(said.contains(what_grows) && said.contains("No space left on device"), "{said}");
    let sound = |image: &Path| {
        qemu::check_leaks_allowed(image);
        qemu::same_content(image, &bench.path("want.raw"));
    };
    sound(&place("top.qcow2"));
    qemu::check_leaks_allowed(&place("base.qcow2"));
    std::fs::remove_file(&ballast).unwrap();
    qemu::run(&mut command());
    sound(&place("top.qcow2"));
    if line.starts_with("commit") {
        sound(&place("base.qcow2"));
    }
}

#[test]
fn commit_on_a_full_disk_is_finished_when_there_is_space() {
    full("commit top.qcow2", "base.qcow2");
}

#[test]
fn flatten_on_a_full_disk_is_finished_when_there_is_space() {
    full("flatten top.qcow2", "top.qcow2");
}

#[test]
fn rebase_on_a_full_disk_is_finished_when_there_is_space() {
    full("rebase top.qcow2 --backing OTHER --backing-format qcow2", "top.qcow2");
}
