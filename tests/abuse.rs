//! Clients that do not keep to the protocol, and those that do beside them: whatever comes in on one connection, the
//! others are served, the image stays whole, memory stays bounded.
//!
//! `COWGATE_ROUNDS=N` has a crowd of them stay N times as long; from 5 on the speed of a well-behaved client beside them is
//! judged strictly, which a machine that does other work does not allow.

mod common;

use common::daemon::Setup;
use common::qemu;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const STEADY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/steady.py");

/// A client that verifies what it does, until it is told to end.
struct Steady {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Steady {
    fn start(uri: &str, content: &Path) -> Steady {
        let mut child = Command::new("/usr/bin/python3")
            .args([STEADY, uri])
            .arg(content)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut steady = Steady { child, stdin, stdout };
        assert_eq!(steady.said(), "on");
        steady
    }

    fn said(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Some more rounds, now. Returns how many there were so far.
    fn goes_on(&mut self) -> u32 {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        let said = self.said();
        said.parse().unwrap_or_else(|_| panic!("the well-behaved client said {said:?}"))
    }

    /// Rounds a second, for so long, while `meanwhile` is called now and then.
    fn speed(&mut self, time: Duration, mut meanwhile: impl FnMut()) -> f64 {
        let (before, start) = (self.goes_on(), Instant::now());
        while start.elapsed() < time {
            std::thread::sleep(Duration::from_millis(100));
            meanwhile();
        }
        f64::from(self.goes_on() - before) / start.elapsed().as_secs_f64()
    }

    fn end(mut self) {
        drop(self.stdin.take());
        assert_eq!(self.said(), "well");
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program that abuses the export `disk` beside a well-behaved client of it. Returns the daemon's log.
fn abuse(program: &str) -> String {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    let content = setup.dir().join("content.raw");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let mut steady = Steady::start(&daemon.uri("disk"), &content);
    steady.goes_on();
    daemon.wire(program);
    steady.goes_on();
    assert_eq!(daemon.names(), ["disk"], "new clients are served");
    steady.end();
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("panicked"), "{log}");
    qemu::check(&image);
    qemu::same_content(&image, &content);
    log
}

#[test]
fn garbage_instead_of_a_handshake() {
    let log = abuse(
        r#"
for tcp in (False, True):
    for garbage in (b'\0' * 100, b'\xff' * 5000, b'GET / HTTP/1.1\r\nHost: disk\r\n\r\n', os.urandom(100000)):
        w = Wire(tcp, greet=False)
        try:
            w.send(garbage)
        except (BrokenPipeError, ConnectionResetError):
            continue
        try:
            w.recv(18)
        except ConnectionResetError:
            continue
        assert w.closed(), garbage[:10]
    w = Wire(tcp)
    w.send(b'IHAVEOPX' + bytes(8))
    assert w.closed()
    w = Wire(tcp, greet=False)
    w.recv(18)
    w.send(struct.pack('>I', 1 << 31 | 3))
    assert w.closed(), 'unknown client flags'
    # half a greeting, half an option, a whole one without its data
    for part in (b'\0\0', b'\0\0\0\3IHAVE', b'\0\0\0\3IHAVEOPT' + struct.pack('>II', OPT_GO, 100) + b'disk'):
        w = Wire(tcp, greet=False)
        w.send(part)
        w.vanish()
"#,
    );
    assert!(log.contains("client broke the protocol"), "{log}");
}

#[test]
fn clients_that_say_nothing() {
    abuse(
        r#"
silent = [Wire(tcp, greet=False) for tcp in (False, True) for _ in range(150)]
started = [Wire() for _ in range(50)]
idle = [Wire().go() for _ in range(50)]
for w in idle:
    w.well()
"#,
    );
}

#[test]
fn options_without_end() {
    abuse(
        r#"
w = Wire()
for _ in range(200):
    w.option(77, b'x' * 100)
    assert w.reply()[:2] == (77, ERR_UNSUP)
# pipelined, the replies read later
w.send((b'IHAVEOPT' + struct.pack('>II', OPT_LIST, 0)) * 50)
for _ in range(50):
    assert w.reply() == (OPT_LIST, SERVER, b'\0\0\0\4disk')
    assert w.reply() == (OPT_LIST, ACK, b'')
w.go().well()

# more than anybody needs, and nothing read: cut off or held back, not collected
w = Wire()
w.socket.setblocking(False)
flood = (b'IHAVEOPT' + struct.pack('>II', OPT_LIST, 0)) * 10000
before, sent = resident(), 0
deadline = time.time() + 3
while sent < 100 << 20 and time.time() < deadline:
    try:
        sent += w.socket.send(flood[sent % 16:])
    except BlockingIOError:
        time.sleep(0.01)
    except (BrokenPipeError, ConnectionResetError):
        break
assert resident() - before < 50 << 20, (resident(), before)
"#,
    );
}

#[test]
fn options_that_are_wrong_get_their_error_and_the_handshake_goes_on() {
    abuse(
        r#"
w = Wire()
kind, text = w.answer(OPT_GO, info('nonsense'))
assert kind == ERR_UNKNOWN and b'nonsense' in text, (kind, text)
assert w.answer(OPT_INFO, info('nonsense'))[0] == ERR_UNKNOWN
assert w.answer(OPT_LIST, b'data')[0] == ERR_INVALID
assert w.answer(OPT_STARTTLS)[0] == ERR_POLICY
assert w.answer(OPT_STARTTLS, b'data')[0] == ERR_INVALID
for option in (OPT_SET_META, OPT_LIST_META):
    assert w.answer(option, meta('disk', 'base:allocation'))[0] == ERR_INVALID, 'structured replies come first'
assert w.answer(OPT_STRUCTURED, b'data')[0] == ERR_INVALID
assert w.answer(OPT_STRUCTURED)[0] == ACK
assert w.answer(OPT_SET_META, meta('nonsense', 'base:allocation'))[0] == ERR_UNKNOWN
for bad in (b'', b'\0\0\0', b'\xff\xff\xff\xffdisk\0\0', b'\0\0\0\5disk\0\0', info('disk')[:-1], info('disk') + b'\0',
            info('disk', 3), b'\0\0\0\2\xff\xfe\0\0'):
    assert w.answer(OPT_GO, bad)[0] == ERR_INVALID, bad
for bad in (b'', meta('disk', 'a', 'b')[:-3], meta('disk') + b'x', b'\0\0\0\4disk\xff\xff\xff\xff'):
    assert w.answer(OPT_SET_META, bad)[0] in (ERR_INVALID, ERR_TOO_BIG), bad
assert w.answer(OPT_GO, info('x' * 5000))[0] in (ERR_INVALID, ERR_TOO_BIG)
kind, data = w.answer(OPT_GO, b'x' * 100000)
assert kind == ERR_TOO_BIG
assert w.answer(12345, b'x' * 1000000)[0] == ERR_UNSUP
assert w.answer(OPT_INFO, info('disk'))[0] == ACK
# a length that never comes does no harm
long = Wire()
long.option(OPT_LIST, length=(1 << 32) - 1)
long.send(b'x' * 1000000)
before = resident()
long.send(b'x' * (20 << 20))
assert resident() - before < 10 << 20
long.vanish()

# the option without errors: the end of the connection is the answer
for name in (b'nonsense', b'', b'\xff\xfe', b'x' * 4097):
    w = Wire()
    w.option(OPT_EXPORT_NAME, name)
    assert w.closed(), name
w = Wire()
w.option(OPT_EXPORT_NAME, b'disk')
assert struct.unpack('>Q', w.recv(10)[:8])[0] == 64 << 20
w.well()
w = Wire()
w.option(OPT_ABORT)
assert w.reply()[:2] == (OPT_ABORT, ACK) and w.closed()
"#,
    );
}

#[test]
fn requests_that_are_wrong_get_einval_and_the_connection_goes_on() {
    abuse(
        r#"
w = Wire().go()
for kind in (8, 9, 99, 0xffff):
    assert w.ask(kind, MINE, 512) == EINVAL, kind
for kind in (TRIM, FLUSH, CACHE, ZEROES):
    for flags in (1 << 5, 1 << 15, 1 << 2):
        assert w.ask(kind, MINE, 512, flags) == EINVAL, (kind, flags)
# the payload of a refused write is no request
bad = struct.pack('>IHHQQI', MAGIC, 0, TRIM, 1, 0, 64 << 20) * 100
for flags in (1 << 1, 1 << 7, 0xffff):
    assert w.ask(WRITE, MINE, len(bad), flags, bad) == EINVAL
assert w.ask(WRITE, 64 << 20, len(bad), payload=bad) == ENOSPC
assert w.ask(WRITE, (1 << 64) - 10, len(bad), payload=bad) == ENOSPC
for offset, length in ((64 << 20, 1), (0, (64 << 20) + 1), ((1 << 64) - 1, 1), ((1 << 63), 0xffffffff)):
    assert w.ask(READ, offset, length) == EINVAL, (offset, length)
    assert w.ask(TRIM, offset, length) == EINVAL
    assert w.ask(ZEROES, offset, length) == ENOSPC
assert w.ask(STATUS, 0, 512) == EINVAL, 'no context was agreed on'
assert w.ask(READ, MINE, 4096, 1 << 2) == EINVAL, 'DF without structured replies'
for kind in (READ, WRITE, TRIM, ZEROES, CACHE):
    assert w.ask(kind, MINE, 0) == 0, 'nothing is easily done'
assert w.ask(WRITE, MINE, 64 << 20 >> 1, payload=bytes(64 << 20 >> 1)) == 0, 'the largest that fits'
w.well()
"#,
    );
}

#[test]
fn streams_that_are_lost_end() {
    abuse(
        r#"
for tcp in (False, True):
    w = Wire(tcp).go()
    w.request(WRITE, MINE, 65 << 20)
    assert w.closed(), 'a write of 65 MiB'
    w = Wire(tcp).go()
    try:
        w.request(WRITE, MINE, 0xffffffff, payload=bytes(100000))
    except (BrokenPipeError, ConnectionResetError):
        pass                              # it may be gone before all of this is sent
    assert w.closed()

    # bad magic behind good requests: those are done and answered
    w = Wire(tcp).go()
    data = os.urandom(3000)
    w.request(WRITE, MINE, len(data), payload=data)
    w.request(FLUSH)
    w.request(FLUSH, magic=MAGIC ^ 1)
    assert sorted(w.simple() for _ in range(2)) == [(0, 1), (0, 2)]
    assert w.closed()
    w = Wire(tcp).go()
    w.request(READ, MINE, len(data))
    assert w.simple() == (0, 1) and w.recv(len(data)) == data

    # nothing counts behind a goodbye
    w = Wire(tcp).go()
    goodbye = struct.pack('>IHHQQI', MAGIC, 0, DISC, 1, 0, 0)
    trim = struct.pack('>IHHQQI', MAGIC, 0, ZEROES, 2, MINE, len(data))
    w.send(goodbye + trim * 10)
    assert w.closed()
    w = Wire(tcp).go()
    w.request(READ, MINE, len(data))
    assert w.simple() == (0, 1) and w.recv(len(data)) == data
    w.well()
"#,
    );
}

#[test]
fn clients_that_vanish() {
    abuse(
        r#"
for tcp in (False, True):
    # half a header, half a payload small and large
    for head, length in ((20, 0), (28, 5000), (28, 8 << 20), (28, 64 << 20)):
        w = Wire(tcp).go()
        whole = struct.pack('>IHHQQI', MAGIC, 0, WRITE, 1, MINE, length) + bytes(length // 2)
        w.send(whole[:head] if head < 28 else whole)
        w.vanish()
    # questions, and nobody there for the answers
    for structured in (False, True):
        w = Wire(tcp).go(structured=structured)
        for i in range(300):
            w.request(READ, MINE + (i << 16), 1 << 16)
        w.vanish()
        w = Wire(tcp).go(structured=structured)
        for i in range(300):
            w.request(WRITE, MINE + (i << 16), 1 << 12, payload=bytes(1 << 12))
        w.request(FLUSH)
        w.vanish()
        # with the reading side closed first
        w = Wire(tcp).go(structured=structured)
        w.socket.shutdown(socket.SHUT_RD)
        try:
            for i in range(300):
                w.request(READ, MINE, 1 << 20)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        w.vanish()
"#,
    );
}

#[test]
fn valid_requests_byte_by_byte() {
    abuse(
        r#"
for tcp in (False, True):
    w = Wire(tcp, greet=False)
    data = os.urandom(700)
    stream = struct.pack('>I', 3)
    stream += b'IHAVEOPT' + struct.pack('>II', OPT_STRUCTURED, 0)
    stream += b'IHAVEOPT' + struct.pack('>II', OPT_GO, len(info('disk'))) + info('disk')
    stream += struct.pack('>IHHQQI', MAGIC, 0, WRITE, 1, MINE + 100, len(data)) + data
    stream += struct.pack('>IHHQQI', MAGIC, 1, ZEROES, 2, MINE + 50, 50)
    stream += struct.pack('>IHHQQI', MAGIC, 0, FLUSH, 3, 0, 0)
    for i in range(len(stream)):
        w.send(stream[i:i + 1])
    assert w.recv(18) == b'NBDMAGICIHAVEOPT\0\3'
    assert w.reply() == (OPT_STRUCTURED, ACK, b'')
    while w.reply()[1] != ACK:
        pass
    assert sorted(w.simple() for _ in range(3)) == [(0, 1), (0, 2), (0, 3)]
    w.request(READ, MINE + 50, 50 + len(data))
    magic, flags, kind, cookie, length = struct.unpack('>IHHQI', w.recv(20))
    assert (magic, flags, kind, length) == (0x668e33ef, 1, 1, 8 + 50 + len(data))
    assert w.recv(length)[8:] == bytes(50) + data
"#,
    );
}

/// Clients that want everything and take nothing: `count` of them, and what they may cost the daemon in MiB.
fn deaf_clients(count: u32, structured: &str, mib: u32) {
    abuse(&format!(
        r#"
before, most = resident(), 0
deaf = []
for i in range({count}):
    w = Wire(tcp=i % 2 == 0).go(structured={structured})
    w.send(b''.join(struct.pack('>IHHQQI', MAGIC, 0, READ, n, MINE, 32 << 20) for n in range(100)))
    deaf.append(w)
    most = max(most, resident())
for _ in range(40):
    time.sleep(0.05)
    most = max(most, resident())
assert most - before < {mib} << 20, '%d MiB above the start' % ((most - before) >> 20)
Wire().go().well()
for w in deaf:
    w.vanish()
"#
    ));
}

#[test]
fn deaf_clients_do_not_fill_memory() {
    deaf_clients(50, "True", 300);
}

/// A simple reply is read whole before its first byte is sent, because it has no room for a later error: up to 96 MiB of
/// replies wait on each connection, and no more.
#[test]
fn deaf_clients_without_structured_replies_cost_what_their_connections_may() {
    deaf_clients(4, "False", 4 * 96 + 150);
}

/// Abusers of every kind, and how many of each.
const KINDS: u32 = 10;
const CROWD: u32 = 20;
/// Seconds that a crowd stays.
const STAY: u64 = 12;

#[test]
fn a_well_behaved_client_keeps_its_data_and_its_speed_among_two_hundred_abusers() {
    let rounds: u64 = std::env::var("COWGATE_ROUNDS").map_or(1, |s| s.parse().expect("COWGATE_ROUNDS is a number"));
    let seconds = STAY * rounds;
    let setup = Setup::new().generic("maxmemory = 256M\nworkers = 2");
    let image = setup.image("disk.qcow2", "", "64M");
    let content = setup.dir().join("content.raw");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let mut steady = Steady::start(&daemon.uri("disk"), &content);
    steady.speed(Duration::from_secs(2), || {});
    let alone = steady.speed(Duration::from_secs(STAY / 2), || {});
    let (memory, descriptors) = (daemon.resident_bytes(), daemon.descriptors());

    let program = format!("seconds, crowd = {seconds}, {CROWD}\n{}", include_str!("clients/abusers.py"));
    let mut abusers = daemon.wire_command(&program).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(abusers.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "on\n");
    let (mut most_memory, mut most_descriptors) = (0, 0);
    let beside = steady.speed(Duration::from_secs(seconds - 1), || {
        most_memory = most_memory.max(daemon.resident_bytes());
        most_descriptors = most_descriptors.max(daemon.descriptors());
    });
    assert!(abusers.wait().unwrap().success());
    println!(
        "{} abusers for {seconds} s: {beside:.0} rounds a second, {alone:.0} without them ({:.0} %); at most {} MiB more, \
         {most_descriptors} descriptors",
        KINDS * CROWD,
        100.0 * beside / alone,
        most_memory.saturating_sub(memory) >> 20,
    );
    let least = if rounds < 5 { 0.25 } else { 0.5 };
    assert!(beside >= least * alone, "{beside} rounds a second beside them, {alone} alone");
    // the budget, each client's own share, and what each worker keeps for reuse
    let bound = (256 << 20) + u64::from(KINDS * CROWD) * (256 << 10) + 2 * (72 << 20) + (50 << 20);
    assert!(most_memory - memory < bound, "{} MiB more than before", (most_memory - memory) >> 20);
    assert!(most_descriptors < descriptors + 3 * (KINDS * CROWD) as usize, "{most_descriptors} descriptors");
    daemon.wait_for("the abusers to be forgotten", || daemon.descriptors() <= descriptors + 4);
    steady.end();
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("panicked"), "{log}");
    qemu::check(&image);
    qemu::same_content(&image, &content);
}
