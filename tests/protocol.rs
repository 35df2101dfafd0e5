//! The protocol byte by byte, where the clients at hand do not reach: extended headers, chunks of all types, metadata
//! contexts side by side, the words of a server that stops.

mod common;

use common::daemon::Setup;
use common::qemu;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Command;

fn qemu_io(image: &Path, command: &str) {
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(image));
}

/// Runs a program against a daemon with one QCOW2 export `disk`, prepared by a command of qemu-io.
fn with_disk(size: &str, prepare: &str, program: &str) {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", size);
    qemu_io(&image, prepare);
    setup.export("disk", &image, "description = the disk of a test");
    let daemon = setup.start();
    daemon.wire(program);
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("panicked"), "{log}");
    qemu::check(&image);
}

#[test]
fn extended_headers_carry_64_bit_lengths() {
    with_disk(
        "8T",
        "write -P 1 1T 1M",
        r#"
T, M = 1 << 40, 1 << 20
w = Wire()
allocation, = w.extended("disk", "base:allocation")
# block status beyond 32 bits, in one descriptor each
assert w.status64(0, 8 * T) == {allocation: [(T, 3), (M, 0), (7 * T - M, 3)]}
assert w.status64(0, 5 << 30, ONE) == {allocation: [(5 << 30, 3)]}
# zeroes and trim of a terabyte and more
assert w.ask64(ZEROES, T // 2, T) == 0
assert w.status64(0, 8 * T) == {allocation: [(8 * T, 3)]}
for flags in (0, FAST, NO_HOLE * 0):
    assert w.ask64(ZEROES, 0, 8 * T, flags) == 0
data = os.urandom(M)
for flags in (PAYLOAD, 0):            # a write has a payload whether it says so or not: QEMU's client does not
    assert w.ask64(WRITE, 3 * T - 4096, len(data), flags, data) == 0
w.request64(READ, 3 * T - 4096, len(data))
assert content(3 * T - 4096, len(data), w.chunks()) == data
assert w.ask64(TRIM, T, 6 * T) == 0
assert w.ask64(CACHE, 0, 8 * T) == 0
w.request64(READ, 3 * T - 4096, len(data))
assert content(3 * T - 4096, len(data), w.chunks()) == bytes(len(data))
assert w.ask64(FLUSH) == 0
# beyond the end, and beyond 64 bits
for offset, length in ((0, 8 * T + 1), (8 * T, 1), (1, (1 << 64) - 1), ((1 << 64) - 1, 1)):
    assert w.ask64(ZEROES, offset, length) == ENOSPC
    assert w.ask64(TRIM, offset, length) == EINVAL
    assert w.ask64(STATUS, offset, length) == EINVAL
for length in ((64 << 20) + 1, 1 << 32, (1 << 64) - 1):
    assert w.ask64(READ, 0, length) == EOVERFLOW
# payload where none belongs is swallowed
for kind in (READ, FLUSH, TRIM, CACHE, ZEROES, 99):
    assert w.ask64(kind, 0, 5000, PAYLOAD, bytes(5000)) == EINVAL, kind
assert w.ask64(WRITE, 0, 3, 0, b"end") == 0
# a payload that is too large to swallow is the end
w.request64(WRITE, 0, (64 << 20) + 1, PAYLOAD)
assert w.closed()
"#,
    );
}

#[test]
fn status_can_be_filtered_by_context() {
    with_disk(
        "64M",
        "write -P 1 1M 1M",
        r#"
w = Wire()
depth, allocation = "qemu:allocation-depth", "base:allocation"
ids = w.extended("disk", depth, "x-none:at-all", allocation)
assert len(set(ids)) == 2
names = dict(zip((allocation, depth), ids))
M = 1 << 20
wanted = {
    names[allocation]: [(M, 3), (M, 0), (62 * M, 3)],
    names[depth]: [(M, 0), (M, 1), (62 * M, 0)],
}
assert w.status64(0, 64 * M) == wanted
def some(length, *ids):
    return w.status64(0, 8 + 4 * len(ids), PAYLOAD, struct.pack(">Q%dI" % len(ids), length, *ids))
assert some(64 * M, *ids) == wanted
for id in ids:
    assert some(64 * M, id) == {id: wanted[id]}
assert some(M // 2, ids[1]) == {ids[1]: [(M // 2, wanted[ids[1]][0][1])]}
for payload in (b"", bytes(7), struct.pack(">Q", M), struct.pack(">QI", 0, ids[0]), struct.pack(">QI", M, 77),
                struct.pack(">QII", M, ids[0], ids[0]), struct.pack(">QIII", M, *ids, ids[0]),
                struct.pack(">QI", 65 * M, ids[0]), bytes(10000)):
    assert w.ask64(STATUS, 0, len(payload), PAYLOAD, payload) == EINVAL, payload
assert w.status64(0, 64 * M) == wanted
# with structured replies every selected context has its chunk
s = Wire()
assert s.answer(OPT_STRUCTURED) == (ACK, b"")
ids = s.select("disk", allocation, depth)
s.go()
s.request(STATUS, 0, 2 * M)
(first, a), (second, b) = s.chunks(s.chunk)
assert first == second == BLOCK_STATUS
assert a == struct.pack(">5I", ids[0], M, 3, M, 0) and b == struct.pack(">5I", ids[1], M, 0, M, 1), (a, b)
s.request(STATUS, 0, 12, PAYLOAD)
(kind, payload), = s.chunks(s.chunk)
assert kind == ERROR and payload[:4] == struct.pack(">I", EINVAL)
# without a context there is no status
n = Wire()
n.extended()
assert n.ask64(STATUS, 0, M) == EINVAL
"#,
    );
}

#[test]
fn options_in_the_wrong_order_are_errors() {
    with_disk(
        "1M",
        "write 0 1M",
        r#"
w = Wire()
for option in (OPT_LIST_META, OPT_SET_META):
    assert w.answer(option, meta("disk", "base:allocation"))[0] == ERR_INVALID
assert w.answer(OPT_STRUCTURED) == (ACK, b"")
assert w.answer(OPT_EXTENDED) == (ACK, b"")
assert w.answer(OPT_STRUCTURED)[0] == ERR_EXT_HEADER_REQD
for option in (OPT_LIST, OPT_STRUCTURED, OPT_EXTENDED, OPT_STARTTLS):
    assert w.answer(option, b"data")[0] == ERR_INVALID, option
for option in (4, 12, 1000, 1 << 31):
    assert w.answer(option, b"data")[0] == ERR_UNSUP, option
w.option(OPT_EXPORT_NAME, b"disk")
assert w.closed(), "it has no answer with extended headers"
"#,
    );
}

#[test]
fn an_export_is_described() {
    with_disk(
        "1M",
        "write 0 1M",
        r#"
w = Wire()
w.option(OPT_LIST)
_, kind, data = w.reply()
assert (kind, data) == (SERVER, struct.pack(">I", 4) + b"disk" + b"the disk of a test")
assert w.reply()[1:] == (ACK, b"")
for option in (OPT_INFO, OPT_GO):
    w.option(option, info("disk", 3) + struct.pack(">HHH", 3, 1, 2))
    items = {}
    while True:
        _, kind, data = w.reply()
        if kind == ACK:
            break
        assert kind == INFO
        items[struct.unpack(">H", data[:2])[0]] = data[2:]
    # has flags, flush, FUA, trim, zeroes, several connections, cache, fast zeroes: neither DF, which needs structured
    # replies, nor a resize
    flags = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048
    assert items[0] == struct.pack(">QH", 1 << 20, flags), items[0]
    assert items[1] == b"disk" and items[2] == b"the disk of a test"
    assert items[3] == struct.pack(">III", 1, 4096, 32 << 20), items[3]

"#,
    );
}

#[test]
fn zeroes_are_read_as_holes() {
    with_disk(
        "64M",
        "write -P 7 1M 1M",
        r#"
M = 1 << 20
def read(w, offset, length, flags=0):
    if w.wide:
        w.request64(READ, offset, length, flags)
        chunks = w.chunks()
    else:
        w.request(READ, offset, length, flags)
        chunks = w.chunks(w.chunk)
    expected = b"".join((b"\7" if M <= at < 2 * M else b"\0") * 512 for at in range(offset, offset + length, 512))
    assert content(offset, length, chunks) == expected
    return [kind for kind, _ in chunks if kind != NONE], sum(len(payload) for _, payload in chunks)
structured, extended = Wire(), Wire()
structured.go(structured=True)
extended.extended()
structured.wide, extended.wide = False, True
for w in structured, extended:
    for length in (512, 4096, 256 << 10, 512 << 10, 32 * M):
        assert read(w, 16 * M, length) == ([HOLE], 12), length
    # a large read tells data from holes, whatever they come in
    kinds, size = read(w, 0, 32 * M)
    assert kinds.count(HOLE) == 2 and set(kinds) == {HOLE, DATA}, kinds
    assert M < size < M + 1000
    kinds, _ = read(w, 512, M)
    assert sorted(set(kinds)) == [DATA, HOLE]
    assert read(w, M, 4096) == ([DATA], 4096 + 8)
    # one content chunk when the client wants one
    for offset, length in ((16 * M, 4096), (0, 2 * M), (16 * M, 32 * M)):
        assert read(w, offset, length, DF) == ([DATA], length + 8)
plain = Wire().go()
cookie = plain.request(READ, 16 * M, M)
assert plain.simple() == (0, cookie)
assert plain.recv(M) == bytes(M)
"#,
    );
}

#[test]
fn nothing_is_done_after_a_goodbye() {
    with_disk(
        "1M",
        "write -P 7 0 1M",
        r#"
for start in (lambda w: w.go(), lambda w: w.go(structured=True)):
    w = Wire()
    start(w)
    head = lambda kind, length: struct.pack(">IHHQQI", MAGIC, 0, kind, 9, 0, length)
    w.send(head(DISC, 0) + head(WRITE, 512) + bytes(512) + head(ZEROES, 4096))
    assert w.closed()
w = Wire()
w.extended()
head = lambda kind, length: struct.pack(">IHHQQQ", 0x21E41C71, 0, kind, 9, 0, length)
w.send(head(DISC, 0) + head(ZEROES, 4096))
assert w.closed()
w = Wire().go()
cookie = w.request(READ, 0, 4096)
assert w.simple() == (0, cookie) and w.recv(4096) == b"\7" * 4096
"#,
    );
}

/// The offset of the only L2 table, and of the data cluster that its entry `index` names.
fn l2_entry(image: &Path, index: u64) -> u64 {
    let mut file = std::fs::File::open(image).unwrap();
    let mut number = |at: u64| {
        let mut bytes = [0; 8];
        file.seek(SeekFrom::Start(at)).unwrap();
        file.read_exact(&mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l1 = number(40);
    (number(l1) & 0x00ff_ffff_ffff_fe00) + 8 * index
}

#[test]
fn an_error_in_a_large_request_has_its_place() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    qemu_io(&image, "write -P 7 0 8M");
    // the cluster at 5 MiB cannot be where this says
    let at = l2_entry(&image, 5 * 16);
    let mut file = std::fs::File::options().write(true).open(&image).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&0x8000_0000_0000_0200_u64.to_be_bytes()).unwrap();
    drop(file);
    setup.export("disk", &image, "readonly = true");
    let daemon = setup.start();
    daemon.wire(
        r#"
M = 1 << 20
def failed(chunks):
    kind, payload = chunks[-1]
    assert kind == ERROR_OFFSET, kind
    error, length = struct.unpack(">IH", payload[:6])
    assert error == EIO and len(payload) == 6 + length + 8 and b"error" in payload[6:6 + length]
    at, = struct.unpack(">Q", payload[-8:])
    assert at <= 5 * M < at + (256 << 10), at
    for kind, payload in chunks[:-1]:
        assert kind == DATA and payload[8:] == b"\7" * (len(payload) - 8)
for offset in (0, 4 * M):
    s = Wire().go(structured=True)
    s.request(READ, offset, 2 * M + 4 * M)
    failed(s.chunks(s.chunk))
    e = Wire()
    e.extended()
    e.request64(READ, offset, 6 * M)
    failed(e.chunks())
# where there are no chunks the errno is all
w = Wire().go()
w.request(READ, 0, 6 * M)
assert w.simple()[0] == EIO
"#,
    );
    let _dir = daemon.stop();
}

#[test]
fn a_server_that_stops_says_so() {
    // Whether a request comes just after the signal is for the scheduler to decide, so there are several attempts.
    let said = (0..10).any(|_| {
        let setup = Setup::new();
        let image = setup.image("disk.qcow2", "", "1M");
        setup.export("disk", &image, "");
        let daemon = setup.start();
        let program = r#"
import signal
plain, wide, talking = Wire().go(), Wire(), Wire()
wide.extended()
os.kill(pid, signal.SIGTERM)
said = [False] * 3
def ask(which, request):
    try:
        while not said[which]:
            said[which] = request()
            time.sleep(0.001)
    except (EOFError, ConnectionResetError, BrokenPipeError):
        pass
import threading
def option():
    kind = talking.answer(OPT_GO, info("nothing"))[0]
    assert kind in (ERR_UNKNOWN, ERR_SHUTDOWN), hex(kind)
    return kind == ERR_SHUTDOWN
def outcome(error):
    assert error in (0, ESHUTDOWN), error
    return error == ESHUTDOWN
requests = [lambda: outcome(plain.ask(FLUSH)), lambda: outcome(wide.ask64(WRITE, 0, 3, PAYLOAD, b"abc")), option]
threads = [threading.Thread(target=ask, args=each) for each in enumerate(requests)]
[t.start() for t in threads]
[t.join() for t in threads]
print(all(said))
"#;
        let said = daemon.wire(program);
        let (_dir, log) = daemon.stop();
        assert!(!log.contains("panicked"), "{log}");
        qemu::check(&image);
        said.trim() == "True"
    });
    assert!(said, "no client was told");
}
