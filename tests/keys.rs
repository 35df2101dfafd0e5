//! nbd-server's keys that say what each client of an export gets: `sync`, `authfile`, `filesize`, `copyonwrite`,
//! `multifile`, `prerun` and `postrun`; and that no key of nbd-server is passed over in silence.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Loop, Mount};
use cowgate::export::config::{Role, parse};
use cowgate::export::problem::Severity;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// Bytes that repeat nowhere soon.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

fn file(setup: &Setup, name: &str, bytes: &[u8]) -> std::path::PathBuf {
    let path = setup.dir().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

/// Runs a libnbd program that is not connected yet; `uri(name)` and `tcp(name)` lead to exports, `where` is the
/// directory. `refused(h, words)` holds when the server refuses with these words in its log.
#[track_caller]
fn python(daemon: &Daemon, program: &str) -> String {
    let prelude = format!(
        "import nbd, os, socket, struct, time\n\
         where = {:?}\n\
         def uri(name): return {:?}.replace('EXPORT', name)\n\
         def to(name, where=uri):\n    \
             h = nbd.NBD()\n    \
             h.add_meta_context('base:allocation')\n    \
             h.connect_uri(where(name))\n    \
             return h\n\
         def from_address(name, address):\n    \
             s = socket.socket()\n    \
             s.bind((address, 0))\n    \
             s.connect(('127.0.0.1', {}))\n    \
             h = nbd.NBD()\n    \
             h.set_export_name(name)\n    \
             h.connect_socket(os.dup(s.fileno()))\n    \
             return h\n\
         def refused(f, words='policy'):\n    \
             try: f()\n    \
             except nbd.Error as e:\n        \
                 assert words in e.string, e.string\n        \
                 return True\n    \
             return False\n",
        daemon.dir(),
        daemon.uri("EXPORT"),
        daemon.port(),
    );
    qemu::run(Command::new("/usr/bin/python3").args(["-c", &(prelude + program)]))
}

/// The client's view of an export.
fn read_all(daemon: &Daemon, name: &str) -> Vec<u8> {
    let out = daemon.dir().join("read-all.raw");
    qemu::run(Command::new("nbdcopy").arg(daemon.uri(name)).arg(&out));
    let bytes = fs::read(&out).unwrap();
    fs::remove_file(out).unwrap();
    bytes
}

fn size(daemon: &Daemon, name: &str) -> Option<u64> {
    let out = qemu::output(Command::new("nbdinfo").arg("--size").arg(daemon.uri(name)));
    out.status.success().then(|| qemu::text(&out.stdout).trim().parse().unwrap())
}

/// Nobody gets the export, and the log says why.
#[track_caller]
fn assert_refused(daemon: &Daemon, name: &str, words: &str) {
    assert_eq!(size(daemon, name), None, "{name} is served");
    daemon.wait_for(words, || daemon.log().contains(words));
}

#[test]
fn with_sync_what_is_answered_survives_a_kill() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "16M");
    setup.export("disk", &image, "sync = true");
    let daemon = setup.start();
    daemon.python(
        "disk",
        "h.pwrite(b'a' * 300000, 1000)\n\
         h.zero(70000, 65536)\n\
         h.pwrite(b'b' * 512, 9 << 20)\n\
         h.trim(65536, 196608)\n",
    );
    // the client above has left, which flushes; so another one writes and the daemon dies under it
    python(
        &daemon,
        &format!(
            "h = to('disk')\nh.pwrite(b'c' * 100000, 5 << 20)\nh.zero(65536, 9 << 20)\nos.kill({}, 9)\n",
            daemon.pid()
        ),
    );
    let _dir = daemon.kill();
    qemu::check_leaks_allowed(&image);
    let reads = ["read -P 97 1000 60000", "read -P 0 65536 70000", "read -P 0 196608 65536", "read -P 99 5M 100000"];
    let mut io = Command::new("qemu-io");
    io.args(["-f", "qcow2"]);
    for read in reads.iter().chain(&["read -P 0 9M 512"]) {
        io.args(["-c", read]);
    }
    let said = qemu::run(io.arg(&image));
    assert!(!said.contains("verification failed"), "{said}");
}

#[test]
fn an_authfile_lets_in_whom_it_names() {
    let setup = Setup::new();
    let image = file(&setup, "disk.raw", &[1; 4096]);
    let allow = setup.dir().join("allow");
    setup.export("disk", &image, &format!("authfile = {}", allow.display()));
    let daemon = setup.start();
    let program = "allow = os.path.join(where, 'allow')\n\
         def say(text): open(allow, 'w').write(text)\n\
         def served(address): return not refused(lambda: from_address('disk', address))\n\
         assert served('127.0.0.1'), 'no file: everybody'\n\
         say('')\n\
         assert not served('127.0.0.1'), 'an empty file: nobody'\n\
         say('# the backup network\\n\\n127.5.0.0/16   # all of it\\n127.0.0.9\\n::1\\n')\n\
         assert [served(a) for a in ('127.0.0.1', '127.5.1.2', '127.6.0.1', '127.0.0.9')] == [False, True, False, True]\n\
         h = to('disk')\n\
         assert h.pread(1, 0) == b'\\1', 'the Unix socket has permissions of its own'\n\
         say('127.0.0.1\\n')\n\
         assert served('127.0.0.1') and not served('127.5.1.2'), 'an edit counts at once'\n\
         assert h.pread(1, 0) == b'\\1', 'and not for those inside'\n\
         # a question without taking hold is refused too, by the same reply: NBD_OPT_INFO, NBD_REP_ERR_POLICY\n\
         say('10.0.0.0/8\\n')\n\
         def ask(option):\n    \
             s = socket.create_connection(('127.0.0.1', PORT))\n    \
             s.recv(18, socket.MSG_WAITALL)\n    \
             what = struct.pack('>I4sH', 4, b'disk', 0)\n    \
             s.sendall(struct.pack('>I8sII', 3, b'IHAVEOPT', option, len(what)) + what)\n    \
             return struct.unpack('>QIII', s.recv(20, socket.MSG_WAITALL))[2]\n\
         assert [hex(ask(option)) for option in (6, 7)] == ['0x80000002'] * 2\n\
         say('127.0.0.1\\n')\n\
         assert ask(6) == 3\n\
         for bad in ('localhost', '127.0.0.1/33', '127.0.0.1 127.0.0.2', '\\xff'):\n    \
             say('127.0.0.1\\n' + bad + '\\n')\n    \
             assert not served('127.0.0.1'), bad\n\
         os.unlink(allow)\n\
         os.mkfifo(allow)\n\
         assert not served('127.0.0.1')\n\
         os.unlink(allow)\n\
         os.mkdir(allow)\n\
         assert not served('127.0.0.1')\n";
    python(&daemon, &program.replace("PORT", &daemon.port().to_string()));
    let (_dir, log) = daemon.stop();
    let named = format!("{}:2: \"localhost\" in this authfile is not an IP address", allow.display());
    assert!(log.contains(&named), "{log}");
    assert!(log.contains("does not exist, so everybody is admitted") && log.contains("127.6.0.1 is not admitted"));
    assert!(log.contains(&format!("{}: cannot read this authfile", allow.display())), "{log}");
}

#[test]
fn filesize_makes_a_file_and_limits_one() {
    let setup = Setup::new();
    let (made, small, readonly) = ["made.raw", "small.raw", "readonly.raw"].map(|n| setup.dir().join(n)).into();
    let bytes = noise(100_000, 1);
    let large = file(&setup, "large.raw", &bytes);
    fs::write(&small, [1; 10]).unwrap();
    let image = setup.image("disk.qcow2", "", "8M");
    setup.export("made", &made, "filesize = 1000003");
    setup.export("cow", &setup.dir().join("cow.raw"), "filesize = 5000\ncopyonwrite = true");
    setup.export("large", &large, "filesize = 70001");
    setup.export("exact", &large, "filesize = 100000\nreadonly = true");
    setup.export("unset", &large, "filesize = 0\nreadonly = true");
    setup.export("small", &small, "filesize = 11");
    setup.export("readonly", &readonly, "filesize = 11\nreadonly = true");
    setup.export("qcow2", &image, "filesize = 5000000");
    setup.export("beyond", &image, "filesize = 8388609");
    setup.export("missing", &setup.dir().join("missing.qcow2"), "filesize = 4096");
    setup.export("nowhere", &setup.dir().join("no/dir.raw"), "filesize = 4096");
    let daemon = setup.start();
    python(
        &daemon,
        "h = nbd.NBD()\nh.set_opt_mode(True)\nh.connect_unix(os.path.join(where, 'nbd.sock'))\nh.set_export_name('made')\n\
         h.opt_info()\nassert h.get_size() == 1000003\n\
         assert not os.path.exists(os.path.join(where, 'made.raw')), 'a question makes nothing'\n\
         h.opt_abort()\n\
         h = to('made')\nassert h.get_size() == 1000003\nassert h.pread(1000003, 0) == bytes(1000003)\n\
         h.pwrite(b'x', 1000002)\n\
         h = to('large')\n\
         h.zero(1, 70000)\n\
         h.set_strict_mode(0)\n\
         for f in (lambda: h.pread(2, 70000), lambda: h.pwrite(b'xx', 70000), lambda: h.zero(1, 70001)):\n    \
             assert refused(f, '')\n",
    );
    let meta = fs::metadata(&made).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (1_000_003, 0o600));
    assert!(meta.blocks() * 512 < 100_000, "it is sparse");
    for (name, expected) in [("cow", 5000), ("exact", 100_000), ("unset", 100_000), ("qcow2", 5_000_000)] {
        assert_eq!(size(&daemon, name), Some(expected), "{name}");
    }
    assert_refused(&daemon, "small", "small.raw: has 10 bytes, and `filesize = 11` is more");
    assert_refused(&daemon, "beyond", "disk.qcow2: has 8388608 bytes, and `filesize = 8388609` is more");
    assert_refused(&daemon, "readonly", "readonly.raw: cannot open it");
    assert_refused(&daemon, "missing", "missing.qcow2: cannot open it");
    assert_refused(&daemon, "nowhere", "no/dir.raw: cannot create it");
    assert!(!readonly.exists());
    let (_dir, _) = daemon.stop();
    let mut expected = bytes;
    expected[70_000] = 0;
    assert!(fs::read(&large).unwrap() == expected, "nothing behind the end was touched");
    assert_eq!(fs::read(&small).unwrap(), [1; 10]);
}

#[test]
fn filesize_limits_a_device() {
    if !root::available("make loop devices") {
        return;
    }
    let setup = Setup::new();
    let device = Loop::new(4 << 20);
    setup.export("part", device.path(), "filesize = 3000000");
    setup.export("more", device.path(), "filesize = 5000000");
    let daemon = setup.start();
    assert_eq!(size(&daemon, "part"), Some(3_000_000));
    assert_refused(&daemon, "more", "has 4194304 bytes, and `filesize = 5000000` is more");
    daemon.stop();
}

#[test]
fn what_a_client_writes_with_copyonwrite_is_its_own() {
    let setup = Setup::new();
    let bytes = noise(3_000_001, 2);
    let raw = file(&setup, "disk.raw", &bytes);
    let base = setup.image("base.qcow2", "", "4M");
    let fill = ["-f", "qcow2", "-c", "write -P 1 0 4M"];
    qemu::run(Command::new("qemu-io").args(fill).arg(&base));
    let top = setup.image("top.qcow2", &format!("backing_file={},backing_fmt=qcow2", base.display()), "4M");
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 2 1M 100k"]).arg(&top));
    qemu::qemu_img("snapshot -c before", &[&top]);
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 3 1M 1M"]).arg(&top));
    let elsewhere = tempfile::tempdir().unwrap();
    let cowdir = format!("copyonwrite = true\nsparse_cow = true\ncowdir = {}", elsewhere.path().display());
    setup.export("raw", &raw, "copyonwrite = true");
    setup.export("raw-ro", &raw, "readonly = true");
    setup.export("chain", &top, &cowdir);
    setup.export("packed", &top, "copyonwrite = true\ncompress = zstd\ndetectzeroes = unmap\nfilesize = 3000000");
    setup.export("before", &top, "copyonwrite = true\nsnapshot = before");
    let names = |dir: &Path| -> Vec<_> {
        let all = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut images: Vec<_> =
            all.filter(|name| !["cowgate", "control", "nbd"].iter().any(|own| name.starts_with(own))).collect();
        images.sort();
        images
    };
    let names_before = names(setup.dir());
    let before = [&raw, &base, &top].map(|path| fs::read(path).unwrap());
    let daemon = setup.start();
    python(
        &daemon,
        "import random\n\
         random.seed(5)\n\
         models = {}\n\
         files = lambda: sorted(os.listdir(where))\n\
         found = files()\n\
         for name in ('raw', 'raw', 'chain', 'chain', 'packed', 'before', 'before'):\n    \
             h = to(name)\n    \
             assert not h.is_read_only() and h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero()\n    \
             models[h] = bytearray(h.pread(h.get_size(), 0))\n\
         readers = [to('raw-ro')]\n\
         original = readers[0].pread(3000001, 0)\n\
         for round in range(600):\n    \
             h = random.choice(list(models))\n    \
             model = models[h]\n    \
             at = random.randrange(len(model))\n    \
             n = min(random.choice([1, 511, 4096, 65536, 200000]), len(model) - at)\n    \
             kind = random.randrange(5)\n    \
             if kind < 2:\n        \
                 data = os.urandom(n) if kind else bytes([round % 256]) * n\n        \
                 h.pwrite(data, at, nbd.CMD_FLAG_FUA if round % 7 == 0 else 0)\n        \
                 model[at:at + n] = data\n    \
             elif kind == 2:\n        \
                 h.zero(n, at, nbd.CMD_FLAG_NO_HOLE if round % 2 else 0)\n        \
                 model[at:at + n] = bytes(n)\n    \
             elif kind == 3: h.flush()\n    \
             assert h.pread(n, at) == model[at:at + n], round\n\
         for h, model in models.items(): assert h.pread(len(model), 0) == model\n\
         assert readers[0].pread(3000001, 0) == original\n\
         assert files() == found, files()\n\
         status = []\n\
         list(models)[0].block_status(3000001, 0, lambda context, offset, e, err: status.extend(e) or 0)\n\
         assert 0 < sum(status[::2]) <= 3000001\n",
    );
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    assert!(read_all(&daemon, "raw") == bytes, "the next client begins with the image");
    // a kill leaves nothing behind
    python(&daemon, &format!("h = to('chain')\nh.pwrite(b'x' * 1000000, 0)\nos.kill({}, 9)\n", daemon.pid()));
    let dir = daemon.kill();
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    assert_eq!(names(dir.path()), names_before);
    assert!([&raw, &base, &top].map(|path| fs::read(path).unwrap()) == before, "no image was written");
    qemu::check(&top);
}

#[test]
fn a_temporary_layer_over_a_device_is_kept_elsewhere() {
    if !root::available("make loop devices") {
        return;
    }
    let setup = Setup::new();
    let device = Loop::new(4 << 20);
    let bytes = noise(4 << 20, 3);
    fs::write(device.file(), &bytes).unwrap();
    setup.export("device", device.path(), "copyonwrite = true");
    let daemon = setup.start();
    daemon.python("device", "h.pwrite(b'x' * 5000, 100)\nassert h.pread(5002, 99)[1:5001] == b'x' * 5000\n");
    assert!(read_all(&daemon, "device") == bytes);
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("flushed") && fs::read(device.file()).unwrap() == bytes);
}

#[test]
fn nobody_writes_an_image_below_temporary_layers() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "4M");
    setup.export("cow", &image, "copyonwrite = true");
    setup.export("writer", &image, "");
    let nowhere = setup.dir().join("nowhere");
    setup.export("nowhere", &image, &format!("copyonwrite = true\ncowdir = {}", nowhere.display()));
    let daemon = setup.start();
    let theirs = format!("qemu-io -f qcow2 -c 'write 0 512' {} 2>/dev/null", image.display());
    python(
        &daemon,
        &format!(
            "h = to('cow')\n\
             h.pwrite(b'a' * 512, 0)\n\
             assert refused(lambda: to('writer'), '')\n\
             assert os.system({theirs:?}) != 0, 'nor does another program'\n\
             g = to('cow')\n\
             h.shutdown()\n\
             assert refused(lambda: to('writer'), '')\n\
             g.shutdown()\n\
             deadline = time.time() + 30\n\
             while refused(lambda: to('writer'), '') and time.time() < deadline: time.sleep(0.05)\n\
             w = to('writer')\n\
             w.pwrite(b'w' * 512, 0)\n\
             assert refused(lambda: to('cow'), '')\n\
             w.shutdown()\n\
             while refused(lambda: to('cow'), '') and time.time() < deadline: time.sleep(0.05)\n\
             assert to('cow').pread(512, 0) == b'w' * 512\n"
        ),
    );
    assert_refused(&daemon, "nowhere", &format!("{}: cannot keep what a client", nowhere.display()));
    let (_dir, log) = daemon.stop();
    assert!(log.contains("clients of a `copyonwrite` export read it"), "{log}");
    assert!(log.contains("clients of another export are writing it"), "{log}");
    qemu::check(&image);
}

#[test]
fn a_full_directory_for_temporary_layers_concerns_its_client_only() {
    if !root::available("mount a tmpfs") {
        return;
    }
    let mount = Mount::tmpfs(8);
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("small", &image, &format!("copyonwrite = true\ncowdir = {}", mount.path().display()));
    setup.export("roomy", &image, "copyonwrite = true");
    let daemon = setup.start();
    python(
        &daemon,
        "small, roomy = to('small'), to('roomy')\n\
         written = 0\n\
         try:\n    \
             for at in range(0, 64 << 20, 1 << 20):\n        \
                 small.pwrite(os.urandom(1 << 20), at)\n        \
                 roomy.pwrite(b'r' * (1 << 20), at)\n        \
                 written = at + (1 << 20)\n\
         except nbd.Error as e: assert e.errno == 'ENOSPC', e.string\n\
         assert 4 << 20 <= written <= 8 << 20, written\n\
         for at in range(0, 32 << 20, 1 << 20): roomy.pwrite(b'q' * (1 << 20), at)\n\
         assert roomy.pread(1 << 20, 31 << 20) == b'q' * (1 << 20)\n\
         small.pread(1 << 20, 0)\n\
         small.pwrite(b'again', 0)\n\
         small.shutdown()\n\
         # its space is free again for the next one\n\
         deadline = time.time() + 30\n\
         while os.statvfs(SMALL).f_bfree < os.statvfs(SMALL).f_blocks: assert time.time() < deadline\n\
         to('small').pwrite(os.urandom(4 << 20), 0)\n"
            .replace("SMALL", &format!("{:?}", mount.path()))
            .as_str(),
    );
    let _dir = daemon.stop();
    qemu::check(&image);
}

/// Sizes of parts: no sectors, no clusters, nothing at all.
const PARTS: [usize; 6] = [1_000_001, 0, 5000, 777_777, 1, 300_000];

fn parts(setup: &Setup, name: &str) -> Vec<u8> {
    let all: Vec<Vec<u8>> = PARTS.iter().enumerate().map(|(i, len)| noise(*len, i as u64 + 9)).collect();
    for (number, bytes) in all.iter().enumerate() {
        file(setup, &format!("{name}.{number}"), bytes);
    }
    all.concat()
}

fn joined(dir: &Path, name: &str) -> Vec<u8> {
    (0..PARTS.len()).flat_map(|number| fs::read(dir.join(format!("{name}.{number}"))).unwrap()).collect()
}

#[test]
fn multifile_joins_files() {
    let setup = Setup::new();
    let bytes = parts(&setup, "disk");
    let total: usize = PARTS.iter().sum();
    let path = setup.dir().join("disk");
    setup.export("disk", &path, "multifile = true");
    setup.export("ro", &path, "multifile = true\nreadonly = true");
    setup.export("cow", &path, "multifile = true\ncopyonwrite = true");
    setup.export("limited", &path, "multifile = true\nfilesize = 1005050\nreadonly = true");
    setup.export("beyond", &path, &format!("multifile = true\nfilesize = {}\nreadonly = true", total + 1));
    setup.export("part", &setup.dir().join("disk.3"), "readonly = true");
    let daemon = setup.start();
    assert!(read_all(&daemon, "ro") == bytes);
    assert!(read_all(&daemon, "limited") == bytes[..1_005_050]);
    assert!(read_all(&daemon, "part") == noise(777_777, 12));
    assert_refused(&daemon, "beyond", &format!("has {total} bytes, and `filesize = {}` is more", total + 1));
    let program = "import random\n\
         random.seed(8)\n\
         h = to(NAME)\n\
         model = bytearray(h.pread(h.get_size(), 0))\n\
         for round in range(500):\n    \
             at = random.choice([random.randrange(len(model)), 1000001 - 5, 1005001 - 70000, 1782778 - 3])\n    \
             n = min(random.choice([1, 10, 5010, 65536, 1100000]), len(model) - at)\n    \
             kind = random.randrange(5)\n    \
             if kind < 2:\n        \
                 data = os.urandom(n)\n        \
                 h.pwrite(data, at, nbd.CMD_FLAG_FUA if round % 9 == 0 else 0)\n        \
                 model[at:at + n] = data\n    \
             elif kind == 2:\n        \
                 h.zero(n, at)\n        \
                 model[at:at + n] = bytes(n)\n    \
             elif kind == 3:\n        \
                 h.trim(n, at)\n        \
                 model[at:at + n] = h.pread(n, at)\n    \
             told = []\n    \
             h.block_status(n, at, lambda context, offset, e, err: told.extend(e) or 0)\n    \
             assert 0 < sum(told[::2]) <= n\n    \
             assert h.pread(n, at) == model[at:at + n], round\n\
         h.flush()\n\
         assert h.pread(len(model), 0) == model\n\
         open(os.path.join(where, 'model'), 'wb').write(model)\n";
    python(&daemon, &program.replace("NAME", "'cow'"));
    assert!(joined(daemon.dir(), "disk") == bytes, "a temporary layer over each part");
    python(&daemon, &program.replace("NAME", "'disk'"));
    let model = fs::read(daemon.dir().join("model")).unwrap();
    daemon.wait_for("every part to be flushed", || {
        (0..PARTS.len()).all(|n| daemon.log().contains(&format!("disk.{n}: the last writer left, flushed")))
    });
    assert!(joined(daemon.dir(), "disk") == model && read_all(&daemon, "ro") == model);
    // each part has its own lock
    python(
        &daemon,
        "h = to('disk')\n\
         for n in range(6):\n    \
             part = os.path.join(where, 'disk.%d' % n)\n    \
             assert os.system('qemu-io -f raw -c \"write -q 0 512\" %s >&2' % part) != 0, part\n\
         h.shutdown()\n\
         deadline = time.time() + 30\n\
         while os.system('qemu-io -f raw -c \"write -q 0 512\" %s >&2' % os.path.join(where, 'disk.3')) != 0:\n    \
             assert time.time() < deadline\n",
    );
    daemon.stop();
}

#[test]
fn a_set_of_files_that_is_not_whole_is_refused() {
    let setup = Setup::new();
    let path = |name: &str| setup.dir().join(name);
    setup.export("none", &path("none"), "multifile = true");
    file(&setup, "gap.0", &[0; 10]);
    file(&setup, "gap.2", &[0; 10]);
    setup.export("gap", &path("gap"), "multifile = true");
    file(&setup, "twice.0", &[0; 10]);
    fs::hard_link(path("twice.0"), path("twice.1")).unwrap();
    setup.export("twice", &path("twice"), "multifile = true");
    file(&setup, "link.0", &[0; 10]);
    std::os::unix::fs::symlink("nowhere", path("link.1")).unwrap();
    setup.export("link", &path("link"), "multifile = true");
    file(&setup, "dir.0", &[0; 10]);
    fs::create_dir(path("dir.1")).unwrap();
    setup.export("dir", &path("dir"), "multifile = true");
    file(&setup, "grown.0", &[1; 10]);
    setup.export("grown", &path("grown"), "multifile = true");
    let daemon = setup.start();
    assert_refused(&daemon, "none", "none.0: does not exist; it is the first part");
    assert_refused(&daemon, "gap", "gap.1: does not exist, but .2 does");
    assert_refused(&daemon, "twice", "twice.0: is two parts of this `multifile` export");
    assert_refused(&daemon, "link", "link.1: cannot open it");
    assert_refused(&daemon, "dir", "dir.1: is a directory");
    assert_eq!(size(&daemon, "grown"), Some(10));
    fs::write(daemon.dir().join("grown.1"), [2; 5]).unwrap();
    assert_eq!(size(&daemon, "grown"), Some(15), "the parts are looked for at each connect");
    daemon.stop();
}

#[test]
fn hooks_run_before_and_after_a_client() {
    let setup = Setup::new();
    let image = setup.dir().join("disk.raw");
    let odd = file(&setup, "odd name';.raw", &[7; 512]);
    let log = setup.dir().join("hooks.log");
    let at = log.display();
    setup.export(
        "disk",
        &image,
        &format!(
            "prerun = truncate -s 1M \"%s\" && echo pre %s \"$COWGATE_EXPORT\" \"$COWGATE_PEER\" 100%% >> {at}; \
             ls -l /proc/self/fd > {at}.fd\npostrun = cp %s {at}.copy; echo post %s >> {at}; rm %s"
        ),
    );
    setup.export("no", &odd, &format!("prerun = echo no >> {at}; exit 3\npostrun = echo never >> {at}"));
    setup.export("killed", &odd, "prerun = kill -9 $$");
    setup.export("quoted", &odd, &format!("prerun = echo quoted \"$COWGATE_PATH\" >> {at}"));
    setup.export("broken", &setup.dir().join("nowhere.raw"), &format!("prerun = true\npostrun = echo undone >> {at}"));
    setup.export("alone", &setup.dir().join("nowhere.raw"), &format!("postrun = echo never >> {at}"));
    setup.export("filled", &odd, "prerun = check %s");
    let daemon = setup.start();
    let said = || fs::read_to_string(&log).unwrap_or_default();
    daemon.python("disk", "h.pwrite(b'y' * 512, 512)\n");
    daemon.wait_for("postrun", || said().contains("post") && !image.exists());
    let copy = fs::read(log.with_extension("log.copy")).unwrap();
    assert!(copy.len() == 1 << 20 && copy[512..1024] == [b'y'; 512], "it runs when the image is flushed");
    let first = said();
    let expected = format!("pre {} disk unix pid ", image.display());
    assert!(first.starts_with(&expected) && first.contains(" uid ") && first.contains(" 100%\n"), "{first}");
    let descriptors = fs::read_to_string(log.with_extension("log.fd")).unwrap();
    assert!(descriptors.contains(" 0 -> /dev/null"), "{descriptors}");
    for ours in ["socket:", "io_uring", "epoll", "eventfd", ".raw", ".conf"] {
        assert!(!descriptors.contains(ours), "{descriptors}");
    }
    assert_eq!(size(&daemon, "quoted"), Some(512));
    assert!(said().contains(&format!("quoted {}\n", odd.display())));
    python(
        &daemon,
        "for name in ('no', 'killed', 'broken', 'alone'): assert refused(lambda: to(name), '')\n\
         assert refused(lambda: to('no'), 'policy') and refused(lambda: to('killed'), 'policy')\n",
    );
    daemon.wait_for("what prerun did to be taken back", || said().contains("undone"));
    assert!(said().contains("no\n") && !said().contains("never"), "{}", said());
    assert!(daemon.log().contains("ended with status 3") && daemon.log().contains("signal 9 ended it"));
    assert_eq!(size(&daemon, "filled"), None);
    assert!(daemon.log().contains("write \"$COWGATE_PATH\" in the place of %s"));
    daemon.stop();
}

#[test]
fn hooks_keep_nobody_else_waiting_and_are_waited_for_at_the_end() {
    let setup = Setup::new().generic("workers = 1");
    let image = file(&setup, "disk.raw", &[1; 4096]);
    let go = setup.dir().join("go");
    let done = setup.dir().join("done");
    setup.export("disk", &image, "");
    setup.export("slow", &image, &format!("prerun = while ! test -e {}; do sleep 0.05; done", go.display()));
    setup.export("late", &image, &format!("postrun = sleep 1; touch {}", done.display()));
    let daemon = setup.start();
    python(
        &daemon,
        "import threading\n\
         got = []\n\
         t = threading.Thread(target=lambda: got.append(to('slow')))\n\
         t.start()\n\
         for round in range(20):\n    \
             h = to('disk')\n    \
             assert h.pread(4096, 0) == b'\\1' * 4096\n    \
             h.shutdown()\n    \
             time.sleep(0.01)\n\
         assert not got\n\
         open(os.path.join(where, 'go'), 'w')\n\
         t.join()\n\
         assert got[0].pread(1, 0) == b'\\1'\n\
         h = to('late')\n\
         h.shutdown()\n",
    );
    let _dir = daemon.stop();
    assert!(done.exists(), "postrun was waited for");
}

#[test]
fn no_key_of_nbd_server_is_passed_over() {
    // (key, value, what becomes of the export): None: it is done. Every key of nbd-server(5), and those that its
    // program knows besides
    use Severity::{Error, Refused, Warning};
    let keys: &[(&str, &str, Option<Severity>)] = &[
        ("exportname", "/srv/a.raw", None),
        ("exportname", "/srv/%s", Some(Refused)),
        ("readonly", "true", None),
        ("filesize", "4096", None),
        ("multifile", "true", None),
        ("copyonwrite", "true", None),
        ("copyonwrite", "true\ncowdir = /tmp", None),
        ("copyonwrite", "true\nsparse_cow = true", None),
        // fatal in nbd-server
        ("copyonwrite", "true\nsplice = true", Some(Warning)),
        ("cowdir", "/tmp", Some(Warning)),
        ("sparse_cow", "true", Some(Warning)),
        ("temporary", "true", Some(Refused)),
        ("treefiles", "true", Some(Refused)),
        ("waitfile", "true", Some(Refused)),
        ("flush", "true", None),
        ("fua", "true", None),
        ("trim", "true", None),
        ("rotational", "true", None),
        ("sync", "true", None),
        ("authfile", "/etc/nbd-server/allow", None),
        ("maxconnections", "4", None),
        ("virtstyle", "none", None),
        ("virtstyle", "ipliteral", None),
        ("virtstyle", "iphash", None),
        ("virtstyle", "cidrhash 24", None),
        ("virtstyle", "cidrhash 24\nexportname = /srv/%s", Some(Refused)),
        ("virtstyle", "other", Some(Error)),
        ("prerun", "check %s", None),
        ("postrun", "check %s", None),
        ("transactionlog", "/tmp/log", Some(Warning)),
        ("datalog", "/tmp/log", Some(Warning)),
        // whether the server has TLS is seen when everything is put together
        ("force_tls", "true", None),
        ("tlsonly", "true", None),
        ("splice", "true", Some(Warning)),
        ("sdp", "true", Some(Warning)),
        ("timeout", "5", Some(Warning)),
        ("max_threads", "4", Some(Warning)),
        ("listenaddr", "::1", Some(Warning)),
    ];
    for (key, value, expected) in keys {
        let text = format!("[a]\nexportname = /srv/a.raw\n{key} = {value}\n");
        let parsed = parse(text.as_bytes(), Path::new("/etc/a.conf"), Role::Included);
        let worst = parsed.problems.iter().map(|problem| problem.severity).max();
        assert_eq!(worst, *expected, "{key} = {value}: {:?}", parsed.problems);
        assert_eq!(parsed.exports.len(), usize::from(worst.is_none_or(|worst| worst == Warning)), "{key} = {value}");
        for problem in &parsed.problems {
            assert!(problem.line.is_some_and(|line| line >= 3) && problem.key.is_some(), "{problem}");
        }
    }
    // switched off, none of them is worth a word
    for key in ["temporary", "treefiles", "waitfile", "splice", "sdp", "sparse_cow", "force_tls", "copyonwrite", "sync"]
    {
        let text = format!("[a]\nexportname = /srv/a.raw\n{key} = false\n");
        let parsed = parse(text.as_bytes(), Path::new("/etc/a.conf"), Role::Included);
        assert!(parsed.problems.is_empty() && parsed.exports.len() == 1, "{key}");
    }
}
