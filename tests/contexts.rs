//! Meta contexts: what qemu-nbd says about the same images, and what an incremental client makes of them.

mod common;

use common::qemu::{qemu_img, run};
use common::zoo;
use cowgate::block::{BlockDev, Context, Run};
use cowgate::image::{Device, Format, reading};
use cowgate::ring;
use cowgate::ring::mem::Seed;
use cowgate::units::ByteRange;
use std::path::Path;
use std::process::Command;

/// Runs of a map: start, end and status, neighbours differing.
type Map = Vec<(u64, u64, u32)>;

fn push(map: &mut Map, start: u64, end: u64, status: u32) {
    match map.last_mut() {
        Some(last) if last.1 == start && last.2 == status => last.1 = end,
        _ if start < end => map.push((start, end, status)),
        _ => {}
    }
}

/// A context as nbdinfo prints it. `server`: a URI, or a command in brackets.
fn map_of(directory: &Path, context: &str, server: &[&str]) -> Map {
    let mut info = Command::new("nbdinfo");
    let text = run(info.current_dir(directory).arg(format!("--map={context}")).arg("--").args(server));
    let mut map = Map::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(|word| word.parse::<u64>());
        let mut next = || words.next().and_then(Result::ok).unwrap_or_else(|| panic!("{context}: {line:?}"));
        let (start, len, status) = (next(), next(), next());
        push(&mut map, start, start + len, status as u32);
    }
    map
}

/// A context as qemu-nbd has it for an image.
fn qemus(directory: &Path, name: &str, context: &str) -> Map {
    let server = ["[", "qemu-nbd", "-r", "-f", zoo::format(name)];
    let what = match context.strip_prefix("qemu:dirty-bitmap:") {
        Some(bitmap) => vec!["-B", bitmap],
        None => vec!["-A"],
    };
    map_of(directory, context, &[&server[..], &what, &[name, "]"]].concat())
}

/// What `cowgate:since-parent` is to say, by the depths that QEMU tells and the size of the parent.
fn since_parent(depths: &Map, parent: u64) -> Map {
    let mut map = Map::new();
    for &(start, end, depth) in depths {
        let cut = parent.clamp(start, end);
        push(&mut map, start, cut, u32::from(depth == 1));
        push(&mut map, cut, end, 1);
    }
    map
}

/// Size of the disk in an image's backing file; `None` without one.
fn parent_size(directory: &Path, name: &str) -> Option<u64> {
    let info = |name: &str| -> serde_json::Value {
        let path = directory.join(name);
        serde_json::from_str(&qemu_img(&format!("info --output=json -f {}", zoo::format(name)), &[&path])).unwrap()
    };
    let backing = info(name)["backing-filename"].as_str()?.to_owned();
    info(&backing)["virtual-size"].as_u64()
}

fn qemu_io(directory: &Path, name: &str, changes: &[String]) {
    let mut io = Command::new("qemu-io");
    io.current_dir(directory).args(["-f", zoo::format(name)]);
    changes.iter().for_each(|change| {
        io.args(["-c", change]);
    });
    run(io.arg(name));
}

fn random_changes(size: u64, dice: &mut Seed, count: usize) -> Vec<String> {
    let mut changes = Vec::new();
    for _ in 0..count {
        let at = dice.below(size / 512);
        let len = 1 + dice.below((size / 512 - at).min(600));
        let (at, len) = (at * 512, len * 512);
        changes.push(match dice.below(4) {
            0 => format!("write -z {at} {len}"),
            1 => format!("discard {at} {len}"),
            _ => format!("write -P 9 {at} {len}"),
        });
    }
    changes
}

/// Images with chains whose layers have other sizes than those above them, and with bitmaps; returns their names.
fn make_more(directory: &Path, dice: &mut Seed) -> Vec<String> {
    let create = |name: &str, options: &str, backing: Option<&str>, size: u64| {
        let mut create = Command::new("qemu-img");
        create.current_dir(directory).args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        if let Some(backing) = backing {
            create.args(["-b", backing, "-F", zoo::format(backing)]);
        }
        run(create.arg(name).arg(size.to_string()));
    };
    let chain: [(&str, &str, Option<&str>, u64); 6] = [
        ("short.qcow2", "", Some("plain.qcow2"), (3 << 20) + 1536),
        ("over-short.qcow2", "cluster_size=4k", Some("short.qcow2"), (9 << 20) + 512),
        ("fine.qcow2", "extended_l2=on,cluster_size=32k", Some("over-short.qcow2"), 10 << 20),
        ("smaller.qcow2", "cluster_size=1M", Some("fine.qcow2"), (5 << 20) + 512),
        ("old.qcow2", "compat=0.10", Some("over-short.qcow2"), 11 << 20),
        ("raw-below.qcow2", "", Some("sparse.raw"), (8 << 20) + 512),
    ];
    let mut names = Vec::new();
    for (name, options, backing, size) in chain {
        create(name, options, backing, size);
        qemu_io(directory, name, &random_changes(size, dice, 12));
        names.push(name.to_owned());
    }
    let bitmaps = [
        ("bits.qcow2", "", None, (40 << 20) + 512, "512 64k 2M"),
        ("tiny-bits.qcow2", "cluster_size=512", None, (9 << 20) + 512, "512 1k 32k"),
        ("over-bits.qcow2", "cluster_size=4k", Some("plain.qcow2"), (7 << 20) + 1024, "4k 128k"),
        ("fine-bits.qcow2", "extended_l2=on", Some("fine.qcow2"), 10 << 20, "64k"),
    ];
    for (name, options, backing, size, granularities) in bitmaps {
        let granularities: Vec<&str> = granularities.split(' ').collect();
        create(name, options, backing, size);
        let image = directory.join(name);
        for granularity in &granularities {
            let bitmap = format!("g {granularity}: \u{e4}");
            qemu_img(&format!("bitmap --add -g {granularity}"), &[&image, Path::new(&bitmap)]);
            qemu_io(directory, name, &random_changes(size, dice, 12));
        }
        qemu_img("bitmap --add --disable -g 64k", &[&image, Path::new("off")]);
        qemu_img("bitmap --merge", &[Path::new(&format!("g {}: \u{e4}", granularities[0])), &image, Path::new("off")]);
        qemu_io(directory, name, &random_changes(size, dice, 5));
        if name == "over-bits.qcow2" {
            qemu_img("bitmap --add", &[&image, Path::new("since-parent")]);
            qemu_io(directory, name, &["write -P 1 2M 64k".to_owned()]);
        }
        names.push(name.to_owned());
    }
    names
}

fn seed() -> u64 {
    let seed = std::env::var("COWGATE_SEED").map_or_else(|_| rand::random(), |s| s.parse().unwrap());
    println!("COWGATE_SEED={seed}");
    seed
}

/// The part of a map in a range, as the first runs of an answer.
fn cut(map: &Map, range: ByteRange, most: usize) -> Vec<Run> {
    let (from, to) = (range.start().0, range.end().0);
    let inside = map.iter().map(|&(start, end, status)| (start.clamp(from, to), end.clamp(from, to), status));
    inside.filter(|(start, end, _)| start < end).take(most).map(|(s, e, status)| Run { len: e - s, status }).collect()
}

async fn device(path: &Path, format: &str) -> Device {
    let disk = reading::open(path, Some(format.parse::<Format>().unwrap()), None).await.unwrap();
    Device::new(path, vec![disk], None).unwrap()
}

async fn whole_map(device: &Device, context: &Context) -> Map {
    let (mut map, mut at) = (Map::new(), 0);
    let size = device.geometry().size;
    while at < size {
        for found in device.status(context, ByteRange::between(at, size), 7).await.unwrap() {
            push(&mut map, at, at + found.len, found.status);
            at += found.len;
        }
    }
    map
}

/// Every context of every image; and from anywhere, in pieces of any length.
#[test]
fn devices_say_what_qemu_says() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let mut dice = Seed::new(seed());
    let mut names = zoo::make(directory);
    names.extend(make_more(directory, &mut dice));
    let mut judged = 0;
    for name in names {
        ring::run(async {
            let device = device(&directory.join(&name), zoo::format(&name)).await;
            let depths = qemus(directory, &name, "qemu:allocation-depth");
            let parent = parent_size(directory, &name);
            let contexts = device.contexts().await;
            assert_eq!(contexts.iter().any(|c| c.name == "cowgate:since-parent"), parent.is_some(), "{name}");
            for named in contexts.iter().filter(|named| named.context != Context::Allocation) {
                let expected = match &named.context {
                    Context::SinceParent => since_parent(&depths, parent.unwrap()),
                    _ => qemus(directory, &name, &named.name),
                };
                assert_eq!(whole_map(&device, &named.context).await, expected, "{name} {}", named.name);
                let size = device.geometry().size;
                for _ in 0..20 {
                    let start = dice.below(size);
                    let range = ByteRange::between(start, start + 1 + dice.below(size - start));
                    let most = 1 + dice.below(4) as usize;
                    let answer = device.status(&named.context, range, most).await.unwrap();
                    assert_eq!(answer, cut(&expected, range, most), "{name} {} {range} {most}", named.name);
                }
                judged += 1;
            }
        })
        .unwrap();
    }
    assert!(judged > 55, "{judged}");
}
