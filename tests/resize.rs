//! `cowgate image resize` beside `qemu-img resize`.

mod common;

use common::qemu;
use common::qimage::{Bench, ZOO};
use common::root::{self, Mount};
use std::fs::File;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

fn set_len(path: &Path, len: u64) {
    File::options().write(true).create(true).truncate(false).open(path).unwrap().set_len(len).unwrap();
}

/// Data to the very end of a disk of 3 MiB and 1536 bytes, zeroes, a compressed part.
fn fill(bench: &Bench, image: &str) {
    bench.qemu_io(
        image,
        "write -P 1 0 200k; write -P 2 1M 1M; write -z 1M 300k; write -P 3 3147264 512; write -P 4 2900k 64k",
    );
}

#[test]
fn every_kind_of_image_grows_and_shrinks_as_with_qemu_img() {
    for options in ZOO {
        let bench = Bench::new();
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} ours.qcow2 3147776"));
        fill(&bench, "ours.qcow2");
        bench.copy("ours.qcow2", "theirs.qcow2");
        bench.content("ours.qcow2", "want.raw");
        let sizes = [
            ("+1536", 3_149_312),
            ("40M", 40 * MIB),
            ("4M --shrink", 4 * MIB),
            ("3147776 --shrink", 3_147_776),
            ("-512 --shrink", 3_147_264),
            ("2900K --shrink", 2900 << 10),
            ("2900K", 2900 << 10),
            ("+100M", (2900 << 10) + 100 * MIB),
            ("512 --shrink", 512),
            ("1M", MIB),
        ];
        for (step, (how, size)) in sizes.into_iter().enumerate() {
            bench.cowgate(&format!("resize ours.qcow2 {how} --quiet"));
            bench.qemu_img(&format!("resize -q -f qcow2 --shrink theirs.qcow2 {size}"));
            set_len(&bench.path("want.raw"), size);
            for key in ["virtual-size", "cluster-size"] {
                assert_eq!(bench.info("ours.qcow2")[key], bench.info("theirs.qcow2")[key], "{options} {how}");
            }
            bench.is("ours.qcow2", "want.raw");
            // grown again inside a cluster, QEMU shows what was behind the end
            if step < 7 {
                bench.is("theirs.qcow2", "want.raw");
            }
        }
    }
}

#[test]
fn what_a_longer_backing_file_has_stays_hidden() {
    for options in ZOO {
        let bench = Bench::new();
        bench.qemu_img("create -q -f qcow2 base.qcow2 9M");
        bench.qemu_io("base.qcow2", "write -P 9 0 9M");
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} -b base.qcow2 -F qcow2 ours.qcow2 3147776"));
        fill(&bench, "ours.qcow2");
        bench.copy("ours.qcow2", "theirs.qcow2");
        for (how, size) in [("5M", 5 * MIB), ("4M --shrink", 4 * MIB), ("+16M", 20 * MIB), ("40M", 40 * MIB)] {
            bench.content("ours.qcow2", "ours.raw");
            bench.cowgate(&format!("resize ours.qcow2 {how} --quiet"));
            set_len(&bench.path("ours.raw"), size);
            bench.is("ours.qcow2", "ours.raw");
            // QEMU does not grow version 2 over a longer backing file
            if !options.contains("compat=0.10") {
                bench.qemu_img(&format!("resize -q -f qcow2 --shrink theirs.qcow2 {size}"));
                bench.is("theirs.qcow2", "ours.raw");
            }
        }
    }
}

#[test]
fn what_was_behind_the_end_never_comes_back() {
    for options in ZOO {
        let bench = Bench::new();
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} ours.qcow2 8M"));
        bench.qemu_io("ours.qcow2", "write -P 1 0 8M");
        // only the size field, as after a kill between the two steps of shrinking
        let header = File::options().read(true).write(true).open(bench.path("ours.qcow2")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&header, &(3 * MIB + 512).to_be_bytes(), 24).unwrap();
        bench.copy("ours.qcow2", "again.qcow2");
        bench.content("ours.qcow2", "want.raw");
        bench.cowgate("resize again.qcow2 3146240 --quiet");
        bench.is("again.qcow2", "want.raw");
        bench.qemu_img("resize -q -f qcow2 again.qcow2 8M");
        set_len(&bench.path("want.raw"), 8 * MIB);
        bench.is("again.qcow2", "want.raw");
        bench.cowgate("resize ours.qcow2 8M --quiet");
        bench.is("ours.qcow2", "want.raw");
    }
}

#[test]
fn snapshots_keep_what_they_have() {
    let bench = Bench::new();
    for options in ["cluster_size=512", "cluster_size=64K", "cluster_size=16K,extended_l2=on"] {
        bench.qemu_img(&format!("create -q -f qcow2 -o {options} a.qcow2 3147776"));
        fill(&bench, "a.qcow2");
        bench.content("a.qcow2", "before.raw");
        bench.qemu_img("snapshot -c one a.qcow2");
        bench.cowgate("resize a.qcow2 20M --quiet");
        bench.content("a.qcow2", "larger.raw");
        bench.cowgate("resize a.qcow2 1M --shrink --quiet");
        qemu::check(&bench.path("a.qcow2"));
        bench.qemu_img("compare -f raw -F raw larger.raw before.raw");
        bench.qemu_img("snapshot -a one a.qcow2");
        assert_eq!(bench.info("a.qcow2")["virtual-size"], 3_147_776);
        bench.is("a.qcow2", "before.raw");
        std::fs::remove_file(bench.path("a.qcow2")).unwrap();
    }
    bench.qemu_img("create -q -f qcow2 -o compat=0.10 old.qcow2 1M");
    bench.qemu_img("snapshot -c one old.qcow2");
    bench.refused("resize old.qcow2 2M", &["old.qcow2", "version 2", "snapshots", "compat=1.1"]);
}

#[test]
fn raw_files_and_external_data_files() {
    let bench = Bench::new();
    std::fs::write(bench.path("a.img"), [7; 3000]).unwrap();
    bench.cowgate("resize a.img 1M");
    let content = std::fs::read(bench.path("a.img")).unwrap();
    assert_eq!((content.len(), &content[..3000]), (1 << 20, &[7; 3000][..]));
    assert!(content[3000..].iter().all(|&b| b == 0));
    bench.cowgate("resize a.img -1000K --shrink --format raw");
    assert_eq!(std::fs::metadata(bench.path("a.img")).unwrap().len(), 24 << 10);
    for (n, raw) in ["on", "off"].into_iter().enumerate() {
        let (image, data) = (format!("d{n}.qcow2"), format!("d{n}.data"));
        // QEMU looks for a data file in its own directory, not in the image's
        let path = bench.path(&data);
        bench.qemu_img(&format!("create -q -f qcow2 -o data_file={},data_file_raw={raw} {image} 1M", path.display()));
        bench.qemu_io(&image, "write -P 5 0 1M");
        bench.cowgate(&format!("resize {image} 3M"));
        assert_eq!(std::fs::metadata(bench.path(&data)).unwrap().len(), 3 * MIB);
        bench.qemu_io(&image, "write -P 6 1M 2M");
        bench.cowgate(&format!("resize {image} 2M --shrink"));
        assert_eq!(std::fs::metadata(bench.path(&data)).unwrap().len(), 2 * MIB);
        bench.is(&image, &data);
        bench.cowgate(&format!("resize {image} 4M"));
        bench.is(&image, &data);
        bench.qemu_io(&image, "read -P 5 0 1M; read -P 6 1M 1M; read -P 0 2M 2M");
    }
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 a.qcow2 4M");
    bench.qemu_img("create -q -f qcow2 -o cluster_size=512 tiny.qcow2 4M");
    bench.copy("a.qcow2", "misnamed.img");
    bench.refused("resize a.qcow2 1M", &["a.qcow2", "--shrink", "4194304", "1048576"]);
    bench.refused("resize a.qcow2 -1M", &["--shrink"]);
    bench.refused("resize a.qcow2 -9M --shrink", &["the new size must be from 1"]);
    bench.refused("resize a.qcow2 0 --shrink", &["the new size must be from 1"]);
    bench.refused("resize a.qcow2 +1", &["multiple of 512"]);
    bench.refused("resize tiny.qcow2 1T", &["tiny.qcow2", "at most 137438953472 bytes"]);
    bench.refused("resize missing.qcow2 1M", &["missing.qcow2"]);
    bench.refused("resize misnamed.img 1M", &["misnamed.img", "--format"]);
    assert_eq!(bench.info("a.qcow2")["virtual-size"], 4 * MIB);
    qemu::check(&bench.path("a.qcow2"));
}

#[test]
fn an_image_in_use_is_left_alone() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 a.qcow2 4M");
    let before = std::fs::read(bench.path("a.qcow2")).unwrap();
    let holder = bench.hold("a.qcow2");
    bench.refused("resize a.qcow2 8M", &["a.qcow2", "in use by qemu-io (pid ", "stop that program"]);
    drop(holder);
    assert_eq!(std::fs::read(bench.path("a.qcow2")).unwrap(), before);
    bench.cowgate("resize a.qcow2 8M");
}

#[test]
fn the_result_as_json() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 a.qcow2 4M");
    let done: serde_json::Value = serde_json::from_str(&bench.cowgate("resize a.qcow2 +4M --json")).unwrap();
    assert_eq!(
        (&done["old-virtual-size"], &done["virtual-size"], &done["format"]),
        (&(4 * MIB).into(), &(8 * MIB).into(), &"qcow2".into())
    );
}

#[test]
fn killed_at_any_moment_it_has_the_old_size_or_the_new() {
    let bench = Bench::new();
    bench.qemu_img("create -q -f qcow2 base.qcow2 64M");
    bench.qemu_io("base.qcow2", "write -P 9 0 64M");
    // version 2 has no zero flag: hiding the backing file takes time
    bench.qemu_img("create -q -f qcow2 -o compat=0.10,cluster_size=4096 -b base.qcow2 -F qcow2 fresh.qcow2 8M");
    bench.qemu_io("fresh.qcow2", "write -P 1 1M 2M");
    bench.content("fresh.qcow2", "small.raw");
    bench.copy("small.raw", "large.raw");
    set_len(&bench.path("large.raw"), 60 * MIB);
    // how long it takes when nobody kills it
    let milliseconds = |command: &str| {
        let start = std::time::Instant::now();
        bench.cowgate(command);
        start.elapsed().as_millis() as u64
    };
    bench.copy("fresh.qcow2", "a.qcow2");
    let (grow, shrink) =
        (milliseconds("resize a.qcow2 60M --quiet"), milliseconds("resize a.qcow2 8M --shrink --quiet"));
    let mut killed = 0;
    for round in 0..16_u64 {
        bench.copy("fresh.qcow2", "a.qcow2");
        killed += u32::from(bench.kill_after("resize a.qcow2 60M", grow * round / 16));
        let grown = bench.info("a.qcow2")["virtual-size"] == 60 * MIB;
        bench.is_after_a_crash("a.qcow2", if grown { "large.raw" } else { "small.raw" });
        bench.cowgate("resize a.qcow2 60M --quiet");
        bench.is_after_a_crash("a.qcow2", "large.raw");
        killed += u32::from(bench.kill_after("resize a.qcow2 8M --shrink", shrink * round / 16));
        let shrunk = bench.info("a.qcow2")["virtual-size"] == 8 * MIB;
        bench.is_after_a_crash("a.qcow2", if shrunk { "small.raw" } else { "large.raw" });
        bench.cowgate("resize a.qcow2 8M --shrink --quiet");
        bench.is_after_a_crash("a.qcow2", "small.raw");
    }
    assert!(killed >= 15, "only {killed} of 32 were killed in time");
}

#[test]
fn on_a_full_disk_the_image_stays_and_a_second_run_finishes() {
    if !root::available("mount a small ext4") {
        return;
    }
    let bench = Bench::new();
    let mount = Mount::ext4(24);
    let dir = mount.path();
    bench.qemu_img("create -q -f qcow2 base.qcow2 64M");
    bench.qemu_io("base.qcow2", "write -P 9 0 64M");
    let image = dir.join("a.qcow2");
    let create = ["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "-F", "qcow2", "-b"];
    qemu::run(Command::new("qemu-img").args(create).arg(bench.path("base.qcow2")).arg(&image).arg("8M"));
    std::fs::write(dir.join("filler"), vec![1; 2 << 20]).unwrap();
    let line = format!("resize {} 60M", image.display());
    bench.refused(&line, &["a.qcow2", "No space left on device"]);
    qemu::check_leaks_allowed(&image);
    std::fs::remove_file(dir.join("filler")).unwrap();
    let smaller = format!("resize {} 18M", image.display());
    bench.cowgate(&smaller);
    qemu::check_leaks_allowed(&image);
    std::fs::write(bench.path("want.raw"), vec![9; 8 << 20]).unwrap();
    set_len(&bench.path("want.raw"), 18 * MIB);
    qemu::same_content(&image, &bench.path("want.raw"));
}
