//! The usual clients against the real daemon: libnbd's tools and library, QEMU's tools, fio.

mod common;

use common::daemon::Setup;
use common::qemu;
use std::process::Command;

#[test]
fn nbdinfo_sees_what_an_export_is() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "5G");
    setup.export("first", &image, "");
    setup.export("second", &image, "readonly = true");
    let daemon = setup.start();
    assert_eq!(daemon.names(), ["first", "second"]);
    for uri in [daemon.uri("first"), daemon.tcp("first")] {
        let text = qemu::run(Command::new("nbdinfo").arg("--json").arg(uri));
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        let export = &info["exports"][0];
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["structured"], true);
        assert_eq!(export["export-size"], 5u64 << 30);
        assert_eq!((&export["block_size_minimum"], &export["block_size_preferred"]), (&1.into(), &4096.into()));
        assert_eq!(export["block_size_maximum"], 32 << 20);
        assert_eq!(export["contexts"][0], "base:allocation");
        for flag in ["flush", "fua", "trim", "zero", "fast_zero", "multi_conn", "df", "cache"] {
            assert_eq!(export[format!("can_{flag}")], true, "{flag}");
        }
        assert_eq!(export["is_read_only"], false);
    }
    let text = qemu::run(Command::new("nbdinfo").arg("--json").arg(daemon.uri("second")));
    assert!(text.contains("\"is_read_only\": true"), "{text}");
    let missing = qemu::output(Command::new("nbdinfo").arg(daemon.uri("third")));
    assert!(!missing.status.success());
}

#[test]
fn nbdcopy_and_qemu_img_copy_in_and_out() {
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let source = dir.join("source.raw");
    let mut bytes = vec![0u8; 96 << 20];
    for (i, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        if i % 3 != 0 {
            piece.iter_mut().enumerate().for_each(|(j, b)| *b = (i * 7 + j / 512) as u8);
        }
    }
    std::fs::write(&source, &bytes).unwrap();
    let images: Vec<_> = ["a", "b", "c"]
        .map(|name| {
            let image = setup.image(&format!("{name}.qcow2"), "", "96M");
            setup.export(name, &image, "");
            image
        })
        .into();
    let daemon = setup.start();
    qemu::run(Command::new("nbdcopy").arg("--flush").arg(&source).arg(daemon.tcp("a")));
    qemu::run(Command::new("nbdcopy").args(["--allocated"]).arg(&source).arg(daemon.uri("b")));
    let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8"];
    qemu::run(Command::new("qemu-img").args(convert).arg(&source).arg(daemon.uri("c")));
    for name in ["a", "b", "c"] {
        qemu::run(
            Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&source).arg(daemon.uri(name)),
        );
        let out = dir.join("out.raw");
        qemu::run(Command::new("nbdcopy").arg(daemon.uri(name)).arg(&out));
        assert!(std::fs::read(&out).unwrap() == bytes, "{name} reads back differently");
        std::fs::remove_file(out).unwrap();
    }
    // holes stay holes, and clients see them
    let map = qemu::run(Command::new("nbdinfo").args(["--map", "--totals", "--json"]).arg(daemon.uri("a")));
    let totals: serde_json::Value = serde_json::from_str(&map).unwrap();
    let hole = totals.as_array().unwrap().iter().find(|t| t["description"] == "hole,zero").unwrap();
    assert_eq!(hole["size"], 32 << 20);
    let _dir = daemon.stop();
    for image in images {
        qemu::check(&image);
        qemu::same_content(&image, &source);
    }
}

#[test]
fn qemu_io_does_every_kind_of_request() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1G");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let script = [
        "write -P 1 0 4M",
        "write -f -P 2 1000 1M",
        "write -z 2M 64k",
        "write -z -u 3M 1000",
        "aio_write -P 5 10M 3M",
        "aio_write -P 6 14M 512",
        "aio_flush",
        "flush",
        "discard 512M 200M",
        "read -P 1 0 1000",
        "read -P 2 1000 1M",
        "read -P 0 2M 64k",
        "read -P 0 3M 1000",
        "read -P 1 3146728 4096",
        "read -P 5 10M 3M",
        "read -P 6 14M 512",
        "read -P 0 14680576 4096",
    ];
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw"]);
    for command in script {
        io.args(["-c", command]);
    }
    let said = qemu::run(io.arg(daemon.uri("disk")));
    assert!(!said.contains("verification failed") && !said.contains("failed"), "{said}");
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn the_errors_are_those_of_the_specification() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("ro", &image, "readonly = true");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
h.set_strict_mode(0)
def expect(errno, what, *args):
    try:
        what(*args)
    except nbd.Error as e:
        assert e.errno == errno, (what, args, e.errno)
    else:
        raise SystemExit('%s%r should fail with %s' % (what, args, errno))
size = h.get_size()
expect('EINVAL', h.pread, 512, size)
expect('EINVAL', h.pread, 1024, size - 512)
expect('ENOSPC', h.pwrite, b'x' * 1024, size - 512)
expect('ENOSPC', h.zero, 1024, size - 512)
expect('EINVAL', h.trim, 1024, size - 512)
expect('EINVAL', h.block_status, 1024, size, lambda *a: 0)
expect('EINVAL', h.pread, 512, (1 << 64) - 512)
h.pwrite(b'fine', size - 4)
assert h.pread(4, size - 4) == b'fine'
ro = nbd.NBD()
ro.connect_uri(uri.replace('///disk', '///ro'))
ro.set_strict_mode(0)
assert ro.is_read_only()
expect('EPERM', ro.pwrite, b'x', 0)
expect('EPERM', ro.zero, 512, 0)
expect('EPERM', ro.trim, 512, 0)
ro.flush()
assert ro.pread(4, size - 4) == b'fine'
ro.shutdown()
"#,
    );
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn fast_zero_is_honest() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    let old = setup.image("old.qcow2", "compat=0.10", "64M");
    let overlay = setup.dir().join("overlay.qcow2");
    let base = setup.image("base.qcow2", "", "64M");
    qemu::qemu_img("create -q -f qcow2 -o compat=0.10 -F qcow2 -b", &[&base, &overlay]);
    setup.export("disk", &image, "");
    setup.export("old", &old, "");
    setup.export("overlay", &overlay, "");
    let daemon = setup.start();
    let program = r#"
FAST = nbd.CMD_FLAG_FAST_ZERO
h.pwrite(b'x' * (1 << 20), 0)
def fast(length, offset):
    try:
        h.zero(length, offset, FAST)
        return True
    except nbd.Error as e:
        assert e.errno == 'ENOTSUP', e
        return False
"#;
    daemon.python(
        "disk",
        &format!(
            "{program}
assert fast(65536, 65536)
assert not fast(1000, 200), 'part of a data cluster must be written'
assert h.pread(2000, 0) == b'x' * 2000, 'a refused fast zero changes nothing'
assert fast(63 << 20, 1 << 20)
assert fast(64 << 20, 0)
assert h.pread(1 << 20, 0) == bytes(1 << 20)
"
        ),
    );
    // version 2 has no zero flag: what is given up reads as zeroes only where nothing lies below
    daemon.python("old", &format!("{program}\nassert fast(65536, 65536) and h.pread(65536, 65536) == bytes(65536)\n"));
    daemon.python("overlay", &format!("{program}\nassert not fast(65536, 65536), 'what is below would show'\n"));
    let _dir = daemon.stop();
    for image in [&image, &old, &overlay] {
        qemu::check(image);
    }
}

#[test]
fn one_hundred_clients_share_an_image() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "256M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
clients = []
for i in range(100):
    c = nbd.NBD()
    c.connect_uri(uri)
    clients.append(c)
for i, c in enumerate(clients):
    c.pwrite(bytes([i + 1]) * 70000, i * 1000003)
clients[0].flush()
for i, c in enumerate(clients):
    other = (i + 37) % 100
    assert c.pread(70000, other * 1000003) == bytes([other + 1]) * 70000
"#,
    );
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn fio_verifies_its_writes() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "cluster_size=16384", "128M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let uri = format!("--uri={}", daemon.uri("disk"));
    qemu::run(Command::new("fio").args([
        "--name=v",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=512-128k",
        "--bs_unaligned=0",
        "--size=96M",
        "--iodepth=32",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--fsync=64",
        "--verify_state_save=0",
    ]));
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn flags_follow_the_configuration() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "flush = false\ntrim = 0\nfua = false\nrotational = true\nmaxconnections = 2");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
assert not h.can_flush() and not h.can_trim() and not h.can_fua()
assert h.is_rotational() and h.can_zero()
second = nbd.NBD()
second.connect_uri(uri)
try:
    third = nbd.NBD()
    third.connect_uri(uri)
    raise SystemExit('a third client was let in')
except nbd.Error:
    pass
second.shutdown()
"#,
    );
    let _dir = daemon.stop();
}

#[test]
fn ipv6_and_listing_can_be_turned_off() {
    let setup = Setup::new().generic("allowlist = false\nlistenaddr = ::1");
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    qemu::run(Command::new("nbdinfo").arg(format!("nbd://[::1]:{}/disk", daemon.port())));
    let list = qemu::output(Command::new("nbdinfo").arg("--list").arg(format!("nbd://[::1]:{}", daemon.port())));
    assert!(!list.status.success());
    let _dir = daemon.stop();
}

#[test]
fn block_status_answers_one_extent_when_one_is_asked_for() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
for i in range(0, 400, 2):
    h.pwrite(b'x' * 65536, i * 65536)
found = []
def note(context, offset, extents, error):
    found.append(list(extents))
h.block_status(32 << 20, 0, note, nbd.CMD_FLAG_REQ_ONE)
h.block_status(32 << 20, 65536, note, nbd.CMD_FLAG_REQ_ONE)
h.block_status(32 << 20, 0, note)
assert found[0] == [65536, 0], found[0]
assert found[1] == [65536, 3], found[1]
assert len(found[2]) == 2 * 400 and sum(found[2][::2]) == 32 << 20, len(found[2])
"#,
    );
    let _dir = daemon.stop();
    qemu::check(&image);
}

/// Each write makes a new L2 table of 2 MiB: 256 MiB of them, which must not all wait in memory.
#[test]
fn memory_stays_bounded_when_a_huge_disk_is_written_all_over() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "cluster_size=2M", "64T");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python(
        "disk",
        "for i in range(128):\n    h.pwrite(bytes([i + 1]) * 512, i << 39)\n\
         for i in range(128):\n    assert h.pread(512, i << 39) == bytes([i + 1]) * 512\n",
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak < 180 << 10, "{peak} KiB");
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn requests_of_every_size_in_every_dialect() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "200M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    daemon.python(
        "disk",
        r#"
def dialect(structured=True, flags=3):
    c = nbd.NBD()
    c.set_request_structured_replies(structured)
    c.set_handshake_flags(flags)          # 0: NBD_OPT_EXPORT_NAME and its 124 zeroes
    c.set_strict_mode(0)
    c.connect_uri(uri)
    assert c.get_structured_replies_negotiated() == (structured and flags != 0)
    return c
clients = [dialect(), dialect(structured=False), dialect(flags=0), dialect(flags=1)]
size = h.get_size()
for i, length in enumerate([1, 511, 512, 4097, 262144, 262145, (1 << 20) + 1, 32 << 20, 64 << 20]):
    at = (i * 7919 * 13) % (size - length)
    data = os.urandom(min(length, 1 << 20)) * (length // (1 << 20) + 1)
    writer, reader = clients[i % 4], clients[(i + 1) % 4]
    writer.pwrite(data[:length], at, nbd.CMD_FLAG_FUA if i % 2 else 0)
    for c in clients:
        c.cache(length, at)
        assert c.pread(length, at) == data[:length], length
    assert clients[0].pread(length, at, nbd.CMD_FLAG_DF) == data[:length]
for c in clients:
    c.shutdown()
"#,
    );
    let _dir = daemon.stop();
    qemu::check(&image);
}
