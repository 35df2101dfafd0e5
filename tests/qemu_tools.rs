//! qemu-img as a client in all its commands that take an NBD export, in both directions, and QEMU's own formats on top of
//! exports: a QCOW2 image inside a raw export, an overlay whose backing file is an export.

mod common;

use common::daemon::Setup;
use common::qemu::{self, qemu_img, run};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

const SIZE: u64 = 32 << 20;

/// A raw disk with data and holes.
fn source(setup: &Setup) -> PathBuf {
    let path = setup.dir().join("source.raw");
    let mut bytes = vec![0u8; SIZE as usize];
    for (i, piece) in bytes.chunks_mut(300 << 10).enumerate().filter(|(i, _)| i % 4 != 1) {
        piece.iter_mut().enumerate().for_each(|(j, b)| *b = (i * 17 + j / 1000) as u8);
    }
    std::fs::write(&path, bytes).unwrap();
    path
}

/// qemu-img with the words of a line, where `{}` stands for the next of `args`.
#[track_caller]
fn img(line: &str, args: &[&str]) -> String {
    let mut args = args.iter();
    let words = line.split(' ').map(|word| match word.split_once("{}") {
        Some((before, after)) => format!("{before}{}{after}", args.next().expect("an argument for each {}")),
        None => word.to_owned(),
    });
    run(Command::new("qemu-img").args(words.collect::<Vec<_>>()))
}

/// The ranges that hold data. Zeroes that have a place in the image count as data over NBD only.
fn data(map: &str) -> Vec<(u64, u64)> {
    let map: Value = serde_json::from_str(map).unwrap();
    let mut out: Vec<(u64, u64)> = Vec::new();
    for entry in map.as_array().unwrap().iter().filter(|e| e["zero"] == false) {
        let (at, length) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        match out.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += length,
            _ => out.push((at, length)),
        }
    }
    out
}

#[test]
fn qemu_img_converts_from_and_to_exports() {
    let setup = Setup::new();
    let source = source(&setup);
    let size = SIZE.to_string();
    let packed = setup.dir().join("packed.qcow2");
    qemu_img("convert -c -f raw -O qcow2", &[&source, &packed]);
    let raw = setup.dir().join("raw.raw");
    std::fs::write(&raw, vec![0x55; SIZE as usize]).unwrap();
    setup.export("raw", &raw, "");
    setup.export("packed", &packed, "readonly = true");
    let names = ["a", "b", "c", "d", "e"];
    let images = names.map(|name| {
        let image = setup.image(&format!("{name}.qcow2"), "", &size);
        setup.export(name, &image, "");
        image
    });
    let daemon = setup.start();
    let file = source.to_str().unwrap();
    // into an export: from a raw file, from a compressed image, from another export, with and without zeroes
    img("convert -n -f raw -O raw {} {}", &[file, &daemon.tcp("a")]);
    img("convert -n -f qcow2 -O raw --target-is-zero {} {}", &[packed.to_str().unwrap(), &daemon.uri("b")]);
    img("convert -n -f raw -O raw -S 0 -m 16 -W {} {}", &[&daemon.uri("packed"), &daemon.tcp("c")]);
    img("convert -n -f raw -O raw -t none {} {}", &[&daemon.tcp("a"), &daemon.tcp("d")]);
    img("convert -n -f raw -O raw {} {}", &[file, &daemon.uri("raw")]);
    img("convert -n -C -f raw -O raw {} {}", &[&daemon.tcp("d"), &daemon.tcp("e")]);
    for name in names {
        img("compare -f raw -F raw {} {}", &[&daemon.tcp(name), &daemon.uri("raw")]);
    }
    // out of one
    for (name, format) in [("a", "qcow2"), ("raw", "raw"), ("packed", "qcow2")] {
        let out = daemon.dir().join(format!("out.{format}"));
        let out = out.to_str().unwrap();
        img("convert -f raw -O {} {} {}", &[format, &daemon.tcp(name), out]);
        img("compare -f {} -F raw {} {}", &[format, out, file]);
    }
    let some = daemon.dir().join("some.qcow2");
    img("dd -f raw -O qcow2 bs=64k count=40 skip=3 if={} of={}", &[&daemon.uri("a"), some.to_str().unwrap()]);
    qemu::check(&some);
    let measured: Value =
        serde_json::from_str(&img("measure -f raw -O qcow2 --output=json {}", &[&daemon.tcp("a")])).unwrap();
    assert!(measured["required"].as_u64().unwrap() < SIZE, "holes are seen: {measured}");
    let (_dir, _) = daemon.stop();
    for image in &images {
        qemu::check(image);
        qemu::same_content(image, &source);
    }
    assert!(std::fs::read(&raw).unwrap() == std::fs::read(&source).unwrap());
    let bytes = std::fs::read(&source).unwrap();
    let dd = guest_content(&some);
    assert!(dd == bytes[3 * 65536..40 * 65536], "dd copied something else");
}

/// The guest's view of a QCOW2 image.
fn guest_content(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("content");
    qemu_img("convert -f qcow2 -O raw", &[image, &raw]);
    std::fs::read(raw).unwrap()
}

#[test]
fn qemu_img_sees_maps_and_sizes_as_in_the_file_itself() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "cluster_size=4k", "6G");
    let change = "-c|write 1M 70k|-c|write 5G 1M|-c|write -z 3M 1M|-c|write 5999M 4k|-c|write -z 5G 64k";
    run(Command::new("qemu-io").args(change.split('|')).arg(&image));
    let direct = img("map -f qcow2 --output=json {}", &[image.to_str().unwrap()]);
    setup.export("disk", &image, "");
    let daemon = setup.start();
    for uri in [daemon.uri("disk"), daemon.tcp("disk")] {
        assert_eq!(data(&img("map -f raw --output=json {}", &[&uri])), data(&direct));
        let part = img("map -f raw --output=json --start-offset=5G --max-length=512k {}", &[&uri]);
        assert_eq!(data(&part), [((5 << 30) + (64 << 10), 448 << 10)]);
        let info: Value = serde_json::from_str(&img("info -f raw --output=json {}", &[&uri])).unwrap();
        assert_eq!(info["virtual-size"], 6u64 << 30);
    }
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
}

#[test]
fn qemu_img_bench_reads_and_writes_with_flushes() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let uri = daemon.tcp("disk");
    img("bench -f raw -t none -w --pattern=90 -c 1000 -d 32 -s 8k -S 12k --flush-interval=100 {}", &[&uri]);
    img("bench -f raw -w --pattern=91 -c 300 -d 8 -s 512 -S 512 -o 40M --no-drain --flush-interval=50 {}", &[&uri]);
    img("bench -f raw -c 1000 -d 64 -s 64k {}", &[&uri]);
    let said = run(Command::new("qemu-io").args([
        "-f",
        "raw",
        "-c",
        "read -P 90 0 8k",
        "-c",
        "read -P 90 11988k 8k",
        "-c",
        "read -P 0 8k 4k",
        "-c",
        "read -P 91 40M 150k",
        &uri,
    ]));
    assert!(!said.contains("failed"), "{said}");
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
}

/// The export is QEMU's disk for metadata, too: its order of writes and flushes must be kept.
#[test]
fn qemu_keeps_an_image_inside_a_raw_export() {
    let setup = Setup::new();
    let raw = setup.dir().join("disk.raw");
    std::fs::File::create(&raw).unwrap().set_len(64 << 20).unwrap();
    setup.export("disk", &raw, "");
    let daemon = setup.start();
    let uri = daemon.tcp("disk");
    img("create -q -f qcow2 -o size=200M {}", &[&uri]);
    let io = "-c|write -P 1 0 3M|-c|write -z 1M 1M|-c|write -P 2 150M 64k|-c|discard 2M 64k|-c|flush";
    run(Command::new("qemu-io").args(["-f", "qcow2"]).args(io.split('|')).arg(&uri));
    img("snapshot -c first {}", &[&uri]);
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 3 0 1M"]).arg(&uri));
    img("check -q -f qcow2 {}", &[&uri]);
    let reads = "-c|read -P 3 0 1M|-c|read -P 0 1M 1M|-c|read -P 2 150M 64k";
    let said = run(Command::new("qemu-io").args(["-f", "qcow2"]).args(reads.split('|')).arg(&uri));
    assert!(!said.contains("failed"), "{said}");
    let (_dir, _) = daemon.stop();
    qemu::check(&raw);
}

#[test]
fn an_overlay_over_an_export_is_committed_into_it() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", &SIZE.to_string());
    let source = source(&setup);
    let overlay = setup.dir().join("overlay.qcow2");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let uri = daemon.tcp("disk");
    img("convert -n -f raw -O raw {} {}", &[source.to_str().unwrap(), &uri]);
    img("create -q -f qcow2 -F raw -b {} {}", &[&uri, overlay.to_str().unwrap()]);
    let io = "-c|write -P 77 5M 100k|-c|write -z 9M 2M|-c|write -P 78 31M 1M";
    for at in [&overlay, &source] {
        let format = if at == &overlay { "qcow2" } else { "raw" };
        run(Command::new("qemu-io").args(["-f", format]).args(io.split('|')).arg(at));
    }
    img("commit -q -f qcow2 {}", &[overlay.to_str().unwrap()]);
    img("compare -f raw -F raw {} {}", &[&uri, source.to_str().unwrap()]);
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
    qemu::same_content(&image, &source);
}
