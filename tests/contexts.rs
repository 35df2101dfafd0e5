//! Meta contexts: what qemu-nbd says about the same images, and what an incremental client makes of them.

mod common;

use common::daemon::{Daemon, Setup};
use common::libnbd::Libnbd;
use common::qemu::{qemu_img, qemus_bits, run};
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

/// The contexts of an export as nbdinfo lists them.
fn offered(daemon: &Daemon, export: &str) -> Vec<String> {
    let info = run(Command::new("nbdinfo").arg("--json").arg(daemon.uri(export)));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let contexts = info["exports"][0]["contexts"].as_array().unwrap();
    contexts.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn served(daemon: &Daemon, export: &str, context: &str) -> Map {
    map_of(daemon.dir(), context, &[&daemon.uri(export)])
}

#[test]
fn exports_say_what_qemu_says() {
    let mut dice = Seed::new(seed());
    let setup = Setup::new();
    let mut names = zoo::make(setup.dir());
    names.extend(make_more(setup.dir(), &mut dice));
    for name in &names {
        setup.export(name, &setup.dir().join(name), &format!("format = {}\nreadonly = true", zoo::format(name)));
    }
    let daemon = setup.start();
    for name in &names {
        let depths = qemus(daemon.dir(), name, "qemu:allocation-depth");
        let parent = parent_size(daemon.dir(), name);
        let contexts = offered(&daemon, name);
        assert_eq!(contexts[..2], ["base:allocation", "qemu:allocation-depth"], "{name}");
        for context in &contexts[1..] {
            let stored = name == "over-bits.qcow2" && context == "qemu:dirty-bitmap:since-parent";
            let expected = match context.ends_with(":since-parent") && !stored {
                true => since_parent(&depths, parent.unwrap()),
                false => qemus(daemon.dir(), name, context),
            };
            assert_eq!(served(&daemon, name, context), expected, "{name} {context}");
        }
        let since: Vec<_> = contexts.iter().filter(|context| context.ends_with(":since-parent")).collect();
        let expected: &[&str] = match parent {
            Some(_) if name == "over-bits.qcow2" => &["qemu:dirty-bitmap:since-parent", "cowgate:since-parent"],
            Some(_) => &["cowgate:since-parent", "qemu:dirty-bitmap:since-parent"],
            None => &[],
        };
        assert_eq!(since, expected, "{name}");
    }
    daemon.stop();
}

/// QEMU as the client that asks, of a disk so large that its runs need 64 bits.
#[test]
fn qemu_reads_the_contexts_of_a_huge_disk() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "40T");
    let image = setup.dir().join("disk.qcow2");
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &image, Path::new("41T")]);
    qemu_img("bitmap --add -g 1M", &[&image, Path::new("day")]);
    run(Command::new("qemu-io").args(["-c", "write 20T 64k"]).arg(&image));
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let dirty = |context: &str| -> Map {
        let server = format!("driver=nbd,server.type=unix,server.path={}", daemon.socket().display());
        let options = format!("{server},export=disk,x-dirty-bitmap={context}");
        let mut map = Command::new("qemu-img");
        let text = run(map.args(["map", "--output=json", "--image-opts", &options]));
        let list: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let field = |run: &serde_json::Value, key: &str| run[key].as_u64().unwrap();
        // QEMU shows what is dirty as no data
        let dirty = list.iter().filter(|run| run["data"] == false);
        dirty.map(|run| (field(run, "start"), field(run, "start") + field(run, "length"), 1)).collect()
    };
    let t = 1 << 40;
    assert_eq!(dirty("qemu:dirty-bitmap:day"), [(20 * t, 20 * t + (1 << 20), 1)]);
    assert_eq!(dirty("qemu:dirty-bitmap:since-parent"), [(20 * t, 20 * t + 65536, 1), (40 * t, 41 * t, 1)]);
    // depth 1; QEMU takes the second bit of deeper ones for something else
    assert_eq!(dirty("qemu:allocation-depth"), [(20 * t, 20 * t + 65536, 1)]);
    let depths = served(&daemon, "disk", "qemu:allocation-depth");
    assert_eq!(depths[2..], [(20 * t + 65536, 40 * t, 0), (40 * t, 41 * t, 2)], "the backing file ends there");
    daemon.stop();
}

/// What is written is told at once, before anything of it is stored; a bitmap that is disabled stays as it is.
#[test]
fn bitmaps_are_live() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "8M");
    qemu_img("bitmap --add", &[&image, Path::new("on")]);
    qemu_img("bitmap --add --disable", &[&image, Path::new("off")]);
    setup.export("disk", &image, "");
    setup.export("look", &image, "readonly = true");
    let daemon = setup.start();
    let program = r#"
r = nbd.NBD()
for context in ('on', 'off'):
    r.add_meta_context('qemu:dirty-bitmap:' + context)
r.connect_uri(uri.replace('/disk?', '/look?'))
def dirty():
    found = {}
    def note(context, offset, entries, error):
        found[context[18:]] = list(zip(entries[::2], entries[1::2]))
    r.block_status(8 << 20, 0, note)
    return found
M = 1 << 20
assert dirty() == {'on': [(8 * M, 0)], 'off': [(8 * M, 0)]}, dirty()
h.pwrite(b'x', M)
h.zero(3 * M, 4 * M)
h.trim(100, 8 * M - 100)
page = 65536
assert dirty() == {'on': [(M, 0), (page, 1), (3 * M - page, 0), (3 * M, 1), (M - page, 0), (page, 1)], 'off': [(8 * M, 0)]}, dirty()
"#;
    daemon.python("disk", program);
    let (_dir, _) = daemon.stop();
    assert_eq!(qemus_bits(&image, "on"), [(1 << 20, 65536), (4 << 20, 3 << 20), ((8 << 20) - 65536, 65536)]);
}

/// A bitmap that a crash left behind is offered neither under its own name nor as something else.
#[test]
fn a_bitmap_that_was_not_saved_is_not_offered() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "8M");
    let image = setup.dir().join("disk.qcow2");
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &image]);
    qemu_img("bitmap --add", &[&image, Path::new("since-parent")]);
    qemu_img("bitmap --add", &[&image, Path::new("other")]);
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python("disk", "h.pwrite(b'x' * 4096, 0)\nh.flush()\nos.kill(int(open(os.path.dirname(uri.split('=')[1]) + '/cowgate.pid').read()), 9)");
    let _dir = daemon.kill();
    let setup = Setup::new();
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let offers = ["base:allocation", "qemu:allocation-depth", "cowgate:since-parent"];
    assert_eq!(offered(&daemon, "disk"), offers);
    assert_eq!(served(&daemon, "disk", "cowgate:since-parent"), [(0, 65536, 1), (65536, 8 << 20, 0)]);
    daemon.stop();
}

/// Snapshots, joined files and raw files offer what is true of them.
#[test]
fn other_exports_offer_what_they_can_answer() {
    let setup = Setup::new();
    let at = |name: &str| setup.dir().join(name);
    let base = setup.image("base.qcow2", "", "4M");
    run(Command::new("qemu-io").args(["-c", "write 1M 64k"]).arg(&base));
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &at("disk.qcow2")]);
    qemu_img("bitmap --add", &[&at("disk.qcow2"), Path::new("day")]);
    run(Command::new("qemu-io").args(["-c", "write 2M 64k"]).arg(at("disk.qcow2")));
    qemu_img("snapshot -c before", &[&at("disk.qcow2")]);
    run(Command::new("qemu-io").args(["-c", "write 3M 64k"]).arg(at("disk.qcow2")));
    std::fs::File::create(at("joined.0")).unwrap().set_len(1 << 20).unwrap();
    std::fs::File::create(at("joined.1")).unwrap().set_len(1 << 20).unwrap();
    setup.export("now", &at("disk.qcow2"), "readonly = true");
    setup.export("before", &at("disk.qcow2"), "readonly = true\nsnapshot = before");
    setup.export("joined", &at("joined"), "format = raw\nmultifile = true");
    let daemon = setup.start();
    let common = ["base:allocation", "qemu:allocation-depth"];
    let since = ["cowgate:since-parent", "qemu:dirty-bitmap:since-parent"];
    assert_eq!(offered(&daemon, "now"), [&common[..], &["qemu:dirty-bitmap:day"], &since].concat());
    assert_eq!(offered(&daemon, "before"), [common, since].concat(), "bitmaps belong to the disk as it is");
    assert_eq!(offered(&daemon, "joined"), common);
    let (m, page) = (1 << 20, 65536);
    let here = |at: u64| [(at - m + page, at, 0), (at, at + page, 1)];
    let map = |export: &str, context: &str| served(&daemon, export, context);
    assert_eq!(
        map("now", since[0])[1..],
        [(2 * m, 2 * m + page, 1), here(3 * m)[0], here(3 * m)[1], (3 * m + page, 4 * m, 0)]
    );
    assert_eq!(map("before", since[0]), [(0, 2 * m, 0), (2 * m, 2 * m + page, 1), (2 * m + page, 4 * m, 0)]);
    let depths = map("before", common[1]);
    assert_eq!(depths[1..4], [(m, m + page, 2), (m + page, 2 * m, 0), (2 * m, 2 * m + page, 1)]);
    assert_eq!(map("joined", common[1]), [(0, 2 * m, 1)]);
    daemon.stop();
}

/// A temporary layer is no layer: what its client wrote counts as held by the image, and the bitmaps are the image's.
#[test]
fn temporary_layers_are_not_seen() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "4M");
    run(Command::new("qemu-io").args(["-c", "write 1M 64k"]).arg(&base));
    let image = setup.dir().join("disk.qcow2");
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&base, &image, Path::new("5M")]);
    qemu_img("bitmap --add", &[&image, Path::new("day")]);
    run(Command::new("qemu-io").args(["-c", "write 2M 64k"]).arg(&image));
    setup.export("disk", &image, "copyonwrite = true");
    let daemon = setup.start();
    let program = r#"
c = nbd.NBD()
for context in ('qemu:allocation-depth', 'qemu:dirty-bitmap:day', 'cowgate:since-parent'):
    c.add_meta_context(context)
c.connect_uri(uri)
def status():
    found = {}
    def note(context, offset, entries, error):
        found[context.split(':')[1]] = list(zip(entries[::2], entries[1::2]))
    c.block_status(5 << 20, 0, note)
    return found
M, page = 1 << 20, 65536
rest = M - page
depth = [(M, 0), (page, 2), (rest, 0), (page, 1), (2 * M - page, 0), (M, 2)]
day = [(2 * M, 0), (page, 1), (3 * M - page, 0)]
since = [(2 * M, 0), (page, 1), (2 * M - page, 0), (M, 1)]
assert status() == {'allocation-depth': depth, 'dirty-bitmap': day, 'since-parent': since}, status()
c.pwrite(b'x' * page, 3 * M)
depth[4:] = [(rest, 0), (page, 1), (rest, 0), (M, 2)]
since[2:] = [(rest, 0), (page, 1), (rest, 0), (M, 1)]
assert status() == {'allocation-depth': depth, 'dirty-bitmap': day, 'since-parent': since}, status()
"#;
    daemon.python("disk", program);
    daemon.stop();
}

/// Everything an incremental backup holds and nothing else is pulled, and makes the parent into the image.
#[test]
fn an_incremental_backup_is_pulled_without_a_bitmap() {
    let mut dice = Seed::new(seed());
    for libnbd in Libnbd::BOTH {
        for (size, options) in
            [(60 << 20, ""), ((61 << 20) + 512, "extended_l2=on"), ((40 << 20) + 512, "cluster_size=4k")]
        {
            let setup = Setup::new();
            let parent = setup.image("parent.qcow2", "", "60M");
            qemu_io(setup.dir(), "parent.qcow2", &["write -P 1 0 60M".to_owned()]);
            let image = setup.dir().join("disk.qcow2");
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&parent);
            if !options.is_empty() {
                create.args(["-o", options]);
            }
            run(create.arg(&image).arg(size.to_string()));
            qemu_io(setup.dir(), "disk.qcow2", &random_changes(size, &mut dice, 20));
            let copy = setup.dir().join("copy.raw");
            qemu_img("convert -f qcow2 -O raw", &[&parent, &copy]);
            std::fs::File::options().write(true).open(&copy).unwrap().set_len(size).unwrap();
            setup.export("disk", &image, "readonly = true");
            setup.export("copy", &copy, "format = raw");
            let daemon = setup.start();
            let stored = daemon.dir().join("stored");
            let stored = stored.to_str().unwrap();
            let client = include_str!("clients/pull_backup.py");
            let context = "qemu:dirty-bitmap:since-parent";
            let told = libnbd.python(client, &["pull", &daemon.uri("disk"), stored, context]);
            let dirty: u64 =
                served(&daemon, "disk", context).iter().filter(|run| run.2 == 1).map(|run| run.1 - run.0).sum();
            assert_eq!(told.trim().parse::<u64>().unwrap(), dirty);
            assert!(dirty < size / 2, "{dirty} of {size}");
            libnbd.python(client, &["restore", &daemon.uri("copy"), stored]);
            let (_dir, _) = daemon.stop();
            qemu_img("compare -f qcow2 -F raw", &[&image, &copy]);
        }
    }
}
