//! libnbd's tools in every mode they have, and nbdkit's NBD plugin, which is libnbd too: the machine's version and a newer
//! one, against QCOW2 and raw exports.

mod common;

use common::daemon::{Daemon, Setup};
use common::libnbd::Libnbd;
use common::qemu;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Data, holes and zeroes whose borders are no cluster's; different ones for each seed.
fn content(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0u8; length];
    for (i, piece) in bytes.chunks_mut(600_064).enumerate() {
        if !(i + usize::from(seed)).is_multiple_of(3) {
            piece.iter_mut().enumerate().for_each(|(j, b)| *b = (i * 31 + j / 512) as u8 ^ seed);
        }
    }
    bytes
}

/// A raw file of this name beside the images.
fn file(setup: &Setup, name: &str, bytes: &[u8]) -> PathBuf {
    let path = setup.dir().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn word(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn nbdinfo_answers_in_every_mode() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    let raw = file(&setup, "disk.raw", &content(1 << 20, 1));
    qemu::run(Command::new("qemu-io").args(["-c", "write 1M 2M", "-c", "write -z 8M 1M"]).arg(&image));
    setup.export("disk", &image, "");
    setup.export("raw", &raw, "readonly = true\nrotational = true");
    let direct: Value = serde_json::from_str(&qemu::qemu_img("map -f qcow2 --output=json", &[&image])).unwrap();
    let daemon = setup.start();
    for libnbd in Libnbd::BOTH {
        let disk = daemon.uri("disk");
        let info = |args: &[&str]| libnbd.run("nbdinfo", args);
        let status = |args: &[&str]| qemu::output(libnbd.tool("nbdinfo").args(args)).status.code();

        assert_eq!(info(&["--size", &disk]), "67108864\n");
        let list = info(&["--list", &daemon.tcp("")]);
        assert!(list.contains("export=\"disk\":") && list.contains("export=\"raw\":"), "{list}");
        let list: Value = serde_json::from_str(&info(&["--list", "--json", &daemon.uri("")])).unwrap();
        assert_eq!(list["exports"].as_array().unwrap().len(), 2);
        assert_eq!(list["exports"][0]["export-size"], 64 << 20);
        let text = info(&["--content", &disk]);
        assert!(text.contains("export-size: 67108864 (64M)") && text.contains("content: data"), "{text}");

        for can in "connect read cache df fast-zero flush fua multi-conn trim write zero structured-reply".split(' ') {
            assert_eq!(status(&["--can", can, &disk]), Some(0), "{libnbd:?} --can {can}");
        }
        if libnbd == Libnbd::Newer {
            assert_eq!(status(&["--can", "extended-headers", &disk]), Some(0));
            // only with contexts, which this does not ask for
            assert_eq!(status(&["--can", "block-status-payload", &disk]), Some(2));
        }
        let raw = daemon.tcp("raw");
        for can in ["fast-zero", "trim", "write", "zero"] {
            assert_eq!(status(&["--can", can, &raw]), Some(2), "{libnbd:?} --can {can} of a read-only export");
        }
        for (is, of_disk) in [("read-only", 2), ("rotational", 2), ("tls", 2)] {
            assert_eq!(status(&["--is", is, &disk]), Some(of_disk), "{libnbd:?} --is {is}");
        }
        assert_eq!((status(&["--is", "read-only", &raw]), status(&["--is", "rotational", &raw])), (Some(0), Some(0)));
        assert_eq!(status(&[&daemon.uri("missing")]), Some(1));

        let map: Value = serde_json::from_str(&info(&["--map", "--json", &disk])).unwrap();
        let totals = info(&["--map", "--totals", &disk]);
        assert!(totals.contains("data") && totals.contains("hole,zero"), "{totals}");
        assert_eq!(runs(&map, "offset", |e| e["type"] == 0), runs(&direct, "start", |e| e["data"] == true));
    }
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
}

/// The ranges of a map whose entries fit, neighbours merged.
fn runs(map: &Value, start: &str, fits: impl Fn(&Value) -> bool) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for entry in map.as_array().unwrap().iter().filter(|e| fits(e)) {
        let (at, length) = (entry[start].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        match out.last_mut() {
            Some(last) if last.0 + last.1 == at => last.1 += length,
            _ => out.push((at, length)),
        }
    }
    out
}

/// Ways to copy; what an export held before must be gone after each.
const WAYS: &[&[&str]] = &[
    &[],
    &["--connections=1", "--requests=1"],
    &["--connections=4", "--requests=64", "--threads=4"],
    &["--synchronous"],
    &["--allocated"],
    &["--sparse=0", "--flush"],
    &["--sparse=65536", "--no-extents"],
    &["--request-size=33554432", "--queue-size=67108864"],
];

#[test]
fn nbdcopy_copies_into_and_out_of_exports_in_every_way() {
    const SIZE: usize = (17 << 20) + 3 * 512;
    for libnbd in Libnbd::BOTH {
        let setup = Setup::new();
        let image = setup.image("disk.qcow2", "", &SIZE.to_string());
        let raw = file(&setup, "disk.raw", &vec![0xaa; SIZE]);
        setup.export("qcow2", &image, "");
        setup.export("raw", &raw, "");
        let daemon = setup.start();
        let (source, out) = (daemon.dir().join("source"), daemon.dir().join("out"));
        for (i, way) in WAYS.iter().enumerate() {
            std::fs::write(&source, content(SIZE, i as u8)).unwrap();
            for (export, uri) in [("qcow2", daemon.tcp("qcow2")), ("raw", daemon.uri("raw"))] {
                qemu::run(libnbd.tool("nbdcopy").args(*way).arg(&source).arg(&uri));
                qemu::run(libnbd.tool("nbdcopy").args(*way).arg(&uri).arg(&out));
                assert!(std::fs::read(&source).unwrap() == std::fs::read(&out).unwrap(), "{libnbd:?} {way:?} {export}");
                std::fs::remove_file(&out).unwrap();
            }
        }
        let (_dir, _) = daemon.stop();
        qemu::check(&image);
        qemu::same_content(&image, &source);
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&raw).unwrap());
    }
}

#[test]
fn nbdcopy_copies_between_exports_and_through_pipes() {
    const SIZE: usize = 20 << 20;
    for libnbd in Libnbd::BOTH {
        let setup = Setup::new();
        let bytes = content(SIZE, 5);
        let raw = file(&setup, "from.raw", &bytes);
        let images = ["one", "two", "zero"].map(|name| {
            let image = setup.image(&format!("{name}.qcow2"), "", &SIZE.to_string());
            setup.export(name, &image, "");
            image
        });
        setup.export("raw", &raw, "");
        let daemon = setup.start();
        libnbd.run("nbdcopy", &[&daemon.uri("raw"), &daemon.tcp("one")]);
        libnbd.run("nbdcopy", &["--connections=3", "--flush", &daemon.tcp("one"), &daemon.tcp("two")]);
        libnbd.run("nbdcopy", &["--destination-is-zero", &daemon.tcp("two"), &daemon.uri("zero")]);
        libnbd.run("nbdcopy", &[&daemon.tcp("zero"), "null:"]);
        // what comes out of one's standard output goes into the other's standard input
        let mut reader = libnbd.tool("nbdcopy").arg(daemon.uri("two")).arg("-").stdout(Stdio::piped()).spawn().unwrap();
        let mut writer = libnbd.tool("nbdcopy");
        qemu::run(writer.arg("-").arg(daemon.uri("raw")).stdin(reader.stdout.take().unwrap()));
        assert!(reader.wait().unwrap().success());
        let (_dir, _) = daemon.stop();
        assert!(std::fs::read(&raw).unwrap() == bytes);
        for image in &images {
            qemu::check(image);
            qemu::same_content(image, &raw);
        }
        assert!(std::fs::metadata(&images[2]).unwrap().len() < SIZE as u64, "zeroes were stored");
    }
}

#[test]
fn nbdsh_negotiates_step_by_step_and_keeps_requests_in_flight() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "96M");
    setup.export("disk", &image, "description = of a disk");
    setup.export("other", &image, "readonly = true\ndescription = the same\\nread-only");
    let daemon = setup.start();
    for libnbd in Libnbd::BOTH {
        let sock = format!("path = {:?}", word(&daemon.socket()));
        libnbd.run("nbdsh", &["-c", &sock, "-c", STEPS]);
        let said = libnbd.run("nbdsh", &["--base-allocation", "-u", &daemon.tcp("disk"), "-c", FLIGHT]);
        assert_eq!(said, "well\n", "{libnbd:?}");
    }
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
}

const STEPS: &str = r#"
h.set_opt_mode(True)
h.set_full_info(True)
h.connect_unix(path)
assert h.get_protocol() == 'newstyle-fixed' and h.get_structured_replies_negotiated()
names = []
assert h.opt_list(lambda name, description: names.append((name, description)) or 0) == 2
assert names == [('disk', 'of a disk'), ('other', 'the same\nread-only')], names
for name, readonly in (('other', True), ('disk', False)):
    h.set_export_name(name)
    h.opt_info()
    assert h.get_size() == 96 << 20 and h.is_read_only() == readonly
    assert (name, h.get_export_description()) in names
    assert h.get_canonical_export_name() == name
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.set_export_name('missing')
try:
    h.opt_info()
    raise SystemExit('there is no export missing')
except nbd.Error as e:
    assert e.errno == 'ENOENT', e
h.set_export_name('disk')
contexts = []
h.add_meta_context('base:')
h.add_meta_context('qemu:')
h.opt_list_meta_context(lambda name: contexts.append(name) or 0)
assert contexts == ['base:allocation', 'qemu:allocation-depth'], contexts
h.clear_meta_contexts()
h.add_meta_context('base:allocation')
h.add_meta_context('qemu:allocation-depth')
h.add_meta_context('none:such')
h.opt_go()
if hasattr(h, 'get_extended_headers_negotiated'):
    assert h.get_extended_headers_negotiated() and h.can_block_status_payload()
    told = []
    h.block_status_filter(96 << 20, 0, ['qemu:allocation-depth'], lambda context, at, entries, error: told.append(context) or 0)
    assert told == ['qemu:allocation-depth'], told
assert h.can_meta_context('base:allocation') and not h.can_meta_context('none:such')
h.pwrite(b'abc', 4095)
assert h.pread(5, 4094) == b'\0abc\0'
h.shutdown()
# another one goes away in the middle
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
h.opt_abort()
"#;

const FLIGHT: &str = r#"
import random
dice = random.Random(7)
MIB = 1 << 20
order = list(range(96))
dice.shuffle(order)
data = {i: dice.randbytes(MIB) for i in order}
ended = []
def note(kind):
    def completion(error):
        assert error.value == 0, (kind, error.value)
        ended.append(kind)
        return 1
    return completion
for i in order:
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[i])), i * MIB, completion=note('write'))
while len(ended) < 96:
    h.poll(-1)
h.aio_flush(completion=note('flush'))
buffers = {}
for i in order:
    buffers[i] = nbd.Buffer(MIB)
    h.aio_pread(buffers[i], i * MIB, completion=note('read'))
while len(ended) < 96 + 1 + 96:
    h.poll(-1)
assert all(buffers[i].to_bytearray() == data[i] for i in order)
pieces = []
buffer = h.pread_structured(2 * MIB, 0, lambda data, at, status, error: pieces.append((at, len(data), status)) or 0)
assert buffer == data[0] + data[1]
assert sum(length for at, length, status in pieces) == 2 * MIB and all(p[2] == nbd.READ_DATA for p in pieces), pieces
h.zero(96 * MIB, 0)
extents = []
h.block_status(96 * MIB, 0, lambda context, at, entries, error: extents.extend(entries) or 0)
assert extents == [96 * MIB, 3], extents
assert h.pread(MIB, 5) == bytes(MIB)
print('well')
"#;

/// A program that serves what another NBD server serves.
fn through_nbdkit(daemon: &Daemon, export: &str, program: &str) -> String {
    let uri = format!("uri={}", daemon.tcp(export));
    qemu::run(Command::new("nbdkit").args(["-U", "-", "nbd", &uri, "--run", program]))
}

#[test]
fn nbdkit_passes_an_export_on() {
    const SIZE: usize = 24 << 20;
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", &SIZE.to_string());
    let source = file(&setup, "source", &content(SIZE, 9));
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let out = daemon.dir().join("out");
    through_nbdkit(&daemon, "disk", &format!("nbdcopy --connections=4 {} \"$uri\"", source.display()));
    through_nbdkit(&daemon, "disk", &format!("nbdcopy \"$uri\" {}", out.display()));
    assert!(std::fs::read(&source).unwrap() == std::fs::read(&out).unwrap());
    let flags = through_nbdkit(&daemon, "disk", "nbdinfo --json \"$uri\"");
    let flags: Value = serde_json::from_str(&flags).unwrap();
    for flag in ["flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "cache"] {
        assert_eq!(flags["exports"][0][format!("can_{flag}")], true, "{flag}");
    }
    let ours: Value =
        serde_json::from_str(&Libnbd::Installed.run("nbdinfo", &["--map", "--json", &daemon.tcp("disk")])).unwrap();
    let theirs: Value =
        serde_json::from_str(&through_nbdkit(&daemon, "disk", "nbdinfo --map --json \"$uri\"")).unwrap();
    assert_eq!(runs(&ours, "offset", |e| e["type"] == 0), runs(&theirs, "offset", |e| e["type"] == 0));
    through_nbdkit(&daemon, "disk", "qemu-io -f raw -c 'write -P 7 1000 70000' -c 'discard 8M 4M' -c flush \"$uri\"");
    let (_dir, _) = daemon.stop();
    qemu::check(&image);
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "read -P 7 1000 70000"]).arg(&image));
}
