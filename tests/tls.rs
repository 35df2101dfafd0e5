//! TLS against the clients that speak it: libnbd's tools and library, QEMU's tools; and against those that should not get
//! through.

mod common;

use common::certs::{Authority, Certificate, secret};
use common::daemon::{Daemon, Setup};
use common::qemu;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A server's keys in `[generic]`, and its certificate in the daemon's directory.
fn with_tls(setup: Setup, authority: &Authority, more: &str) -> Setup {
    authority.server().install(setup.dir());
    let dir = setup.dir().display();
    let keys = format!("certfile = {dir}/server-cert.pem\nkeyfile = {dir}/server-key.pem\n{more}");
    setup.generic(&keys)
}

/// `more` for clients' certificates.
fn verifying(setup: &Setup, authority: &Authority, more: &str) -> String {
    fs::write(setup.dir().join("clients-ca.pem"), authority.pem()).unwrap();
    format!("cacertfile = {}/clients-ca.pem\n{more}", setup.dir().display())
}

/// URI of an export over TCP, with the certificates in a directory.
fn nbds(daemon: &Daemon, export: &str, certificates: &Path) -> String {
    format!("nbds://127.0.0.1:{}/{export}?tls-certificates={}", daemon.port(), certificates.display())
}

fn nbds_unix(daemon: &Daemon, export: &str, certificates: &Path) -> String {
    let (socket, certificates) = (daemon.socket(), certificates.display());
    format!("nbds+unix:///{export}?socket={}&tls-certificates={certificates}", socket.display())
}

/// The words that name an export to QEMU's tools.
fn qemu_args(daemon: &Daemon, export: &str, certificates: &Path) -> [String; 3] {
    let object =
        format!("--object=tls-creds-x509,id=tls0,endpoint=client,verify-peer=yes,dir={}", certificates.display());
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={},\
         file.export={export},file.tls-creds=tls0,file.tls-hostname=localhost",
        daemon.port()
    );
    [object, "--image-opts".to_owned(), options]
}

#[track_caller]
fn refused(uri: &str) -> String {
    // with what the server said
    let out = qemu::output(Command::new("nbdinfo").arg(uri).env("LIBNBD_DEBUG", "1"));
    assert!(!out.status.success(), "{uri} should have been refused: {}", qemu::text(&out.stdout));
    qemu::text(&out.stderr)
}

#[track_caller]
fn accepted(uri: &str) -> String {
    qemu::run(Command::new("nbdinfo").arg(uri))
}

/// The names that a client sees.
#[track_caller]
fn listed(uri: &str) -> Vec<String> {
    let out = qemu::run(Command::new("nbdinfo").args(["--list", "--json"]).arg(uri));
    let list: serde_json::Value = serde_json::from_str(&out).unwrap();
    list["exports"].as_array().unwrap().iter().map(|e| e["export-name"].as_str().unwrap().to_owned()).collect()
}

/// Content that compresses badly, with holes, and a file with it.
fn content(dir: &Path, len: usize) -> (PathBuf, Vec<u8>) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = vec![0u8; len];
    for (i, piece) in bytes.chunks_mut(1 << 16).enumerate() {
        if i % 5 != 4 {
            for word in piece.chunks_mut(8) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
            }
        }
    }
    let path = dir.join("content.raw");
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

#[test]
fn libnbd_copies_in_and_out() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let (source, bytes) = content(setup.dir(), 96 << 20);
    let image = setup.image("a.qcow2", "", "96M");
    setup.export("a", &image, "");
    let image = setup.image("b.qcow2", "", "96M");
    setup.export("b", &image, "");
    let daemon = setup.start();
    for uri in [nbds(&daemon, "a", &trusted), nbds_unix(&daemon, "b", &trusted)] {
        let info = qemu::run(Command::new("nbdinfo").arg("--json").arg(&uri));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!((&info["TLS"], &info["structured"]), (&true.into(), &true.into()));
        qemu::run(Command::new("nbdcopy").arg("--flush").arg(&source).arg(&uri));
        let out = daemon.dir().join("out.raw");
        qemu::run(Command::new("nbdcopy").arg(&uri).arg(&out));
        assert!(fs::read(&out).unwrap() == bytes, "{uri} reads back differently");
        fs::remove_file(&out).unwrap();
        // through clear text it is the same disk
        let plain = if uri.contains("unix") { daemon.uri("b") } else { daemon.tcp("a") };
        qemu::run(Command::new("nbdcopy").arg(plain).arg(&out));
        assert!(fs::read(&out).unwrap() == bytes);
        fs::remove_file(&out).unwrap();
    }
    let (dir, log) = daemon.stop();
    assert!(log.contains("tls=TLSv1.3 TLS_"), "{log}");
    assert!(!log.contains("connection failed"), "an orderly end is one with TLS too: {log}");
    for name in ["a.qcow2", "b.qcow2"] {
        qemu::check(&dir.path().join(name));
        qemu::same_content(&dir.path().join(name), &source);
    }
}

#[test]
fn qemu_writes_and_reads() {
    let authority = Authority::new("ca");
    let setup = Setup::new();
    let verify = verifying(&setup, &authority, "");
    let setup = with_tls(setup, &authority, &verify);
    let me = authority.client("qemu");
    let mine = authority.directory(setup.dir(), "mine", Some(&me));
    let other = Authority::new("other");
    let theirs = other.directory(setup.dir(), "theirs", Some(&me));
    let (source, _) = content(setup.dir(), 48 << 20);
    let image = setup.image("disk.qcow2", "", "48M");
    setup.export("disk", &image, "tls = required");
    let daemon = setup.start();
    let target = qemu_args(&daemon, "disk", &mine);
    let [object, _, options] = &target;
    let convert = ["convert", "-n", "-W", "-m", "8", "-f", "raw"];
    qemu::run(Command::new("qemu-img").args(convert).args([object, "--target-image-opts"]).arg(&source).arg(options));
    qemu::run(Command::new("qemu-io").args(&target).args([
        "-c",
        "write -P 7 1M 3M",
        "-c",
        "flush",
        "-c",
        "read -P 7 1M 3M",
    ]));
    qemu::run(Command::new("qemu-io").args(["-f", "raw", "-c", "write -P 7 1M 3M"]).arg(&source));
    let copy = daemon.dir().join("copy.raw");
    qemu::run(Command::new("qemu-img").args(["convert", "-O", "raw", "-m", "8"]).args(&target).arg(&copy));
    assert!(fs::read(&copy).unwrap() == fs::read(&source).unwrap());
    // the server's certificate is looked at as well
    let out = qemu::output(Command::new("qemu-img").arg("info").args(qemu_args(&daemon, "disk", &theirs)));
    assert!(!out.status.success());
    let hostname = target[2].replace("tls-hostname=localhost", "tls-hostname=elsewhere.example");
    let out = qemu::output(Command::new("qemu-img").args(["info", object, "--image-opts"]).arg(hostname));
    assert!(!out.status.success() && qemu::text(&out.stderr).contains("does not match"), "{}", qemu::text(&out.stderr));
    let (dir, log) = daemon.stop();
    assert!(log.contains("CN=qemu,O=Example"), "{log}");
    qemu::check(&dir.path().join("disk.qcow2"));
    qemu::same_content(&dir.path().join("disk.qcow2"), &source);
}

#[test]
fn many_requests_at_a_time_keep_their_data() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let program = format!("secure = {:?}\n{MANY}", nbds(&daemon, "disk", &trusted));
    daemon.python("disk", &program);
    let (dir, _) = daemon.stop();
    qemu::check(&dir.path().join("disk.qcow2"));
}

/// Reads and writes of all sizes, up to 32 of them under way, each in a place of its own; then all of it once more.
const MANY: &str = r#"
import random
h2 = nbd.NBD()
h2.set_uri_allow_local_file(True)
h2.connect_uri(secure)
assert h2.get_tls_negotiated()
rand = random.Random(7)
model = bytearray(64 << 20)
def settle(limit):
    while h2.aio_in_flight() > limit:
        h2.poll(-1)
        while h2.aio_in_flight() > 0:
            done = h2.aio_peek_command_completed()
            if done <= 0:
                break
            assert h2.aio_command_completed(done)
for turn in range(60):
    places, reads = rand.sample(range(64), 40), []
    for place in places:
        size = rand.choice((512, 4096, 13000, 100 << 10, 1 << 20))
        at = (place << 20) + rand.randrange(0, (1 << 20) - size + 1, 512)
        if rand.random() < 0.5:
            data = rand.randbytes(size)
            model[at:at + size] = data
            h2.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at)
        else:
            buf = nbd.Buffer(size)
            h2.aio_pread(buf, at)
            reads.append((at, size, buf))
        settle(31)
    settle(0)
    for at, size, buf in reads:
        assert buf.to_bytearray() == model[at:at + size], (turn, at, size)
for at in range(0, 64 << 20, 32 << 20):
    assert h2.pread(32 << 20, at) == bytes(model[at:at + (32 << 20)])
    assert h.pread(32 << 20, at) == bytes(model[at:at + (32 << 20)]), 'in clear text'
h2.shutdown()
"#;

#[test]
fn each_export_says_who_must_use_it() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    for (name, keys) in
        [("any", ""), ("must", "tls = required"), ("forced", "force_tls = true"), ("plain", "tls = off")]
    {
        let image = setup.image(&format!("{name}.qcow2"), "", "1M");
        setup.export(name, &image, keys);
    }
    let daemon = setup.start();
    assert_eq!(listed(&daemon.tcp("")), ["any", "plain"]);
    assert_eq!(listed(&nbds(&daemon, "", &trusted)), ["any", "forced", "must"]);
    accepted(&daemon.tcp("any"));
    accepted(&daemon.uri("plain"));
    for (name, uri) in [("must", daemon.tcp("must")), ("forced", daemon.uri("forced"))] {
        let why = refused(&uri);
        assert!(why.contains("TLS"), "{why}");
        accepted(&nbds(&daemon, name, &trusted));
        accepted(&nbds_unix(&daemon, name, &trusted));
    }
    accepted(&nbds(&daemon, "any", &trusted));
    refused(&nbds(&daemon, "plain", &trusted));
    wire(
        &daemon,
        &trusted,
        r#"
w = Wire()
for option in (OPT_INFO, OPT_GO):
    assert w.answer(option, info('must'))[0] == ERR_TLS_REQD
    assert w.answer(option, info('nonsense'))[0] == ERR_UNKNOWN
assert w.answer(OPT_STRUCTURED) == (ACK, b'')
assert w.answer(OPT_LIST_META, meta('must'))[0] == ERR_POLICY, 'the answer is for INFO and GO only'
w.go('any')
w = Wire()
w.option(OPT_EXPORT_NAME, b'must')
assert w.closed()
# and with TLS
w = Wire()
w.start_tls()
assert w.answer(OPT_GO, info('plain'))[0] == ERR_POLICY
assert w.answer(OPT_GO, info('nonsense'))[0] == ERR_UNKNOWN
w.go('must')
"#,
    );
}

#[test]
fn a_server_may_require_it_of_everybody() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "force_tls = true");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("plain", &image, "tls = off");
    let daemon = setup.start();
    daemon.wait_for("the log", || daemon.log().contains("refused: [plain] it is to be served without TLS"));
    for uri in [daemon.tcp("disk"), daemon.uri("disk")] {
        let why = refused(&uri);
        assert!(why.contains("TLS"), "{why}");
    }
    assert_eq!(listed(&nbds(&daemon, "", &trusted)), ["disk"]);
    accepted(&nbds(&daemon, "disk", &trusted));
    wire(
        &daemon,
        &trusted,
        r#"
w = Wire()
for option, data in ((OPT_LIST, b''), (OPT_INFO, info('disk')), (OPT_GO, info('disk')), (OPT_GO, b'x' * 100000),
                     (OPT_STRUCTURED, b''), (OPT_SET_META, meta('disk', 'base:allocation')), (4711, b'')):
    assert w.answer(option, data)[0] == ERR_TLS_REQD, option
w.start_tls()
w.go()
w = Wire()
w.option(OPT_EXPORT_NAME, b'disk')
assert w.closed()
w = Wire()
assert w.answer(OPT_ABORT) == (ACK, b'')
# who does not speak fixed newstyle cannot start it
w = Wire(greet=False)
w.recv(18)
w.send(bytes(4))
assert w.closed()
"#,
    );
}

#[test]
fn a_server_without_tls_says_so() {
    let authority = Authority::new("ca");
    let setup = Setup::new();
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    setup.export("must", &image, "tls = required");
    let daemon = setup.start();
    daemon.wait_for("the log", || daemon.log().contains("[must] it is to be served with TLS only"));
    assert_eq!(daemon.names(), ["disk"]);
    refused(&nbds(&daemon, "disk", &trusted));
    refused(&daemon.tcp("must"));
    // a client that would like to, but need not
    let program = "h2 = nbd.NBD()\nh2.set_tls(nbd.TLS_ALLOW)\nh2.connect_uri(uri)\nassert not h2.get_tls_negotiated()";
    daemon.python("disk", program);
}

#[test]
fn clients_show_certificates() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let revoked = authority.client("revoked");
    fs::write(dir.join("crl.pem"), authority.revokes(&[&revoked], 4000)).unwrap();
    let verify = verifying(&setup, &authority, &format!("crlfile = {}/crl.pem", dir.display()));
    let setup = with_tls(setup, &authority, &verify);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("all", &image, "readonly = true");
    setup.export("some", &image, "readonly = true\ntlsallow = alice; CN=bob,O=Example; Host.Example");
    let client = |name: &str, own: Option<&Certificate>| authority.directory(&dir, name, own);
    let alice = client("alice", Some(&authority.client("alice")));
    let bob = client("bob", Some(&authority.client("bob")));
    let carol = client("carol", Some(&authority.client("carol")));
    let named = client("named", Some(&authority.client_with_names("somebody", &["host.example"])));
    let strangers = [
        client("none", None),
        client("stranger", Some(&other.client("alice"))),
        client("expired", Some(&authority.expired("alice"))),
        client("revoked", Some(&revoked)),
        // of the right authority, but a server's
        client("server", Some(&authority.server())),
    ];
    let daemon = setup.start();
    for strange in &strangers {
        for export in ["all", "some"] {
            refused(&nbds(&daemon, export, strange));
        }
    }
    daemon.wait_for("the log", || daemon.log().matches("TLS handshake failed").count() >= 10);
    for known in [&alice, &bob, &named] {
        assert_eq!(listed(&nbds(&daemon, "", known)), ["all", "some"]);
        accepted(&nbds(&daemon, "some", known));
    }
    assert_eq!(listed(&nbds(&daemon, "", &carol)), ["all"]);
    accepted(&nbds(&daemon, "all", &carol));
    let why = refused(&nbds(&daemon, "some", &carol));
    assert!(why.contains("CN=carol,O=Example"), "{why}");
    assert_eq!(listed(&daemon.tcp("")), ["all"], "who is nobody is not on the list");
    refused(&daemon.tcp("some"));
    // and whoever looks sees who they are
    let uri = nbds(&daemon, "all", &bob);
    let program = format!(
        "import subprocess\nh2 = nbd.NBD()\nh2.set_uri_allow_local_file(True)\nh2.connect_uri({uri:?})\nprint(subprocess.check_output([{:?}, \
         'export', 'show', 'all', '--json', '--control', {:?}], text=True))",
        env!("CARGO_BIN_EXE_cowgate"),
        daemon.control(),
    );
    let shown = daemon.python("all", &program);
    assert!(
        shown.contains(r#""subject":"CN=bob,O=Example""#) || shown.contains(r#""subject": "CN=bob,O=Example""#),
        "{shown}"
    );
    assert!(shown.contains("TLSv1.3"), "{shown}");
}

#[test]
fn certificates_may_be_shown_but_need_not_be() {
    let authority = Authority::new("ca");
    let setup = Setup::new();
    let verify = verifying(&setup, &authority, "tlsverify = optional\ntlsprio = NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2");
    let setup = with_tls(setup, &authority, &verify);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("all", &image, "");
    setup.export("some", &image, "tlsallow = alice");
    let dir = setup.dir().to_owned();
    let nobody = authority.directory(&dir, "nobody", None);
    let alice = authority.directory(&dir, "alice", Some(&authority.client("alice")));
    let bad = authority.directory(&dir, "bad", Some(&authority.expired("alice")));
    let daemon = setup.start();
    accepted(&nbds(&daemon, "all", &nobody));
    let why = refused(&nbds(&daemon, "some", &nobody));
    assert!(why.contains("without certificate"), "{why}");
    accepted(&nbds(&daemon, "some", &alice));
    refused(&nbds(&daemon, "all", &bad));
    assert!(!daemon.log().contains("TLSv1.3"), "tlsprio leaves 1.2");
}

#[test]
fn a_list_that_is_out_of_date_lets_nobody_in() {
    let authority = Authority::new("ca");
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    fs::write(dir.join("crl.pem"), authority.revokes(&[], 2021)).unwrap();
    let verify = verifying(&setup, &authority, &format!("crlfile = {}/crl.pem", dir.display()));
    let setup = with_tls(setup, &authority, &verify);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    let alice = authority.directory(&dir, "alice", Some(&authority.client("alice")));
    let daemon = setup.start();
    daemon.wait_for("the log", || daemon.log().contains("was to be replaced by"));
    refused(&nbds(&daemon, "disk", &alice));
    fs::write(dir.join("crl.pem"), authority.revokes(&[], 4000)).unwrap();
    daemon.reload();
    accepted(&nbds(&daemon, "disk", &alice));
}

#[test]
fn new_certificates_take_effect_and_bad_ones_do_not() {
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let setup = with_tls(Setup::new(), &first, "");
    let dir = setup.dir().to_owned();
    let (of_first, of_second) = (first.directory(&dir, "first", None), second.directory(&dir, "second", None));
    let image = setup.image("disk.qcow2", "", "8M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    accepted(&nbds(&daemon, "disk", &of_first));
    refused(&nbds(&daemon, "disk", &of_second));
    // a client stays through all that follows
    let uri = nbds(&daemon, "disk", &of_first);
    let mut stays = Command::new("/usr/bin/python3")
        .args(["-c", STAYS, &uri])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    daemon.wait_for("the client", || {
        daemon.log().contains("client connected") && daemon.log().matches("tls=").count() > 1
    });

    // a key that belongs to another certificate
    secret(&dir.join("server-key.pem"), &second.server().key);
    let outcome = reload(&daemon);
    assert!(outcome.contains("does not belong to the certificate") && outcome.contains("stays as it was"), "{outcome}");
    accepted(&nbds(&daemon, "disk", &of_first));
    // nothing that could be one
    fs::write(dir.join("server-cert.pem"), "nonsense").unwrap();
    let outcome = reload(&daemon);
    assert!(outcome.contains("there is no certificate in this file"), "{outcome}");
    fs::remove_file(dir.join("server-key.pem")).unwrap();
    reload(&daemon);
    accepted(&nbds(&daemon, "disk", &of_first));
    // a good pair
    second.server().install(&dir);
    let outcome = reload(&daemon);
    assert!(!outcome.contains("error"), "{outcome}");
    accepted(&nbds(&daemon, "disk", &of_second));
    refused(&nbds(&daemon, "disk", &of_first));
    // the key goes: there is no TLS any more, and whoever has it keeps it
    let base = fs::read_to_string(dir.join("cowgate.conf")).unwrap();
    let without: String = base.lines().filter(|l| !l.contains("server-")).map(|l| format!("{l}\n")).collect();
    fs::write(dir.join("cowgate.conf"), without).unwrap();
    reload(&daemon);
    refused(&nbds(&daemon, "disk", &of_second));
    drop(stays.stdin.take());
    let out = stays.wait_with_output().unwrap();
    assert_eq!(qemu::text(&out.stdout), "well\n");
}

/// Works until its input ends, with the connection it began with.
const STAYS: &str = r#"
import nbd, os, select, sys
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
assert h.get_tls_negotiated()
while True:
    data = os.urandom(300000)
    h.pwrite(data, 12345)
    assert h.pread(len(data), 12345) == data
    if select.select([sys.stdin], [], [], 0.05)[0]:
        break
h.shutdown()
print("well")
"#;

/// Reloads by the control API; what came of it.
fn reload(daemon: &Daemon) -> String {
    let out = qemu::output(
        Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["reload", "--wait", "--control"]).arg(daemon.control()),
    );
    qemu::text(&out.stdout) + &qemu::text(&out.stderr)
}

/// Runs a program that speaks NBD byte by byte, and TLS by Python's own library.
#[track_caller]
fn wire(daemon: &Daemon, trusted: &Path, program: &str) {
    let head = format!("trusted = {:?}", trusted.join("ca-cert.pem"));
    daemon.wire(&format!("{head}\n{}\n{program}", include_str!("clients/wire_tls.py")));
}

#[test]
fn what_is_negotiated_in_clear_text_is_worth_nothing() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    wire(
        &daemon,
        &trusted,
        r#"
# data with it, then twice
w = Wire()
assert w.answer(OPT_STARTTLS, b'data')[0] == ERR_INVALID
w.start_tls()
assert w.answer(OPT_STARTTLS)[0] == ERR_INVALID
assert w.answer(OPT_STARTTLS, b'data')[0] == ERR_INVALID
w.go()

# structured replies and contexts chosen before do not count
w = Wire()
assert w.answer(OPT_STRUCTURED) == (ACK, b'')
assert w.answer(OPT_SET_META, meta('disk', 'base:allocation')) == (ACK, b'')
w.start_tls()
assert w.answer(OPT_SET_META, meta('disk', 'base:allocation'))[0] == ERR_INVALID
w.go()
cookie = w.request(READ, 0, 512)
assert w.simple() == (0, cookie), 'a simple reply'
w.recv(512)

# injected behind STARTTLS, in one piece: closed, nothing is acknowledged or carried out
for behind in (b'IHAVEOPT' + struct.pack('>II', OPT_GO, 10) + info('disk'), b'x', hello()):
    w = Wire()
    w.send(b'IHAVEOPT' + struct.pack('>II', OPT_STARTTLS, 0) + behind)
    assert w.closed()

# injected a moment later: it is not TLS, so there is none
for behind in (b'IHAVEOPT' + struct.pack('>II', OPT_GO, 10) + info('disk'), b'\x16\x03\x01\x02\x00' + b'\xff' * 512):
    w = Wire()
    assert w.answer(OPT_STARTTLS) == (ACK, b'')
    w.send(behind)
    rest = w.until_closed()
    assert b'\x00\x03\xe8\x89\x04\x55\x65\xa9' not in rest, 'no option reply'

# an end without TLS's own is noticed, and one with it is answered
w = Wire().start_tls()
assert w.answer(OPT_ABORT) == (ACK, b'')
assert w.closed(), 'close_notify'
w = Wire().start_tls().go()
w.request(DISC)
assert w.closed()
"#,
    );
    daemon.wait_for("the log", || daemon.log().contains("in clear text behind NBD_OPT_STARTTLS"));
    let (dir, _) = daemon.stop();
    qemu::check(&dir.path().join("disk.qcow2"));
}

#[test]
fn damage_in_the_middle_ends_that_connection_only() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    wire(
        &daemon,
        &trusted,
        r#"
beside = Wire(tcp=True).start_tls().go()
for junk in (b'\x17\x03\x03\x00\x30' + b'j' * 48, b'\x15\x03\x03\x00\x02\x01\x00', b'\x16\x03\x03\x00\x01\x01', b'GET / HTTP/1.1\r\n\r\n',
             b'\x17\x03\x03\xff\xff' + b'j' * 70000, b'\x17\x03\x03\x00\x00' * 1000, bytes(5000)):
    for when in ('idle', 'request', 'payload'):
        w = Wire(tcp=True).start_tls().go()
        w.well()
        if when == 'request':
            w.send(struct.pack('>I', MAGIC))
        if when == 'payload':
            w.request(WRITE, 0, 1 << 20, payload=b'p' * 100000)
        try:
            w.raw.sendall(junk)
        except (ConnectionResetError, BrokenPipeError):
            pass
        w.until_closed()
        beside.well()
# half a record, and then nothing more: no end was announced
w = Wire(tcp=True).start_tls().go()
w.raw.sendall(b'\x17\x03\x03\x40\x00' + b'h' * 1000)
w.raw.shutdown(socket.SHUT_WR)
w.until_closed()
# gone without a word, with replies under way
for _ in range(20):
    w = Wire(tcp=True).start_tls().go()
    for i in range(20):
        w.request(READ, 0, 1 << 20)
    w.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    w.raw.close()
beside.well()
# one who does not read its replies stops nobody, and gets them all when it does
slow = Wire(tcp=True).start_tls().go()
cookies = {slow.request(READ, i << 20, 1 << 20) for i in range(40)}
time.sleep(1)
beside.well()
while cookies:
    error, cookie = slow.simple()
    assert error == 0
    cookies.remove(cookie)
    slow.recv(1 << 20)
beside.well()
"#,
    );
    let (dir, log) = daemon.stop();
    assert!(!log.contains("panicked"), "{log}");
    qemu::check(&dir.path().join("disk.qcow2"));
}

#[test]
fn half_handshakes_cost_little_and_end() {
    let authority = Authority::new("ca");
    let setup = with_tls(Setup::new(), &authority, "handshaketimeout = 3");
    let trusted = authority.directory(setup.dir(), "trusted", None);
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    accepted(&nbds(&daemon, "disk", &trusted));
    let before = daemon.resident_bytes();
    wire(
        &daemon,
        &trusted,
        r#"
half = []
for i in range(200):
    w = Wire(tcp=i % 2 == 0)
    assert w.answer(OPT_STARTTLS) == (ACK, b'')
    hi = hello()
    w.send((b'', hi[:3], hi[:len(hi) // 2], hi)[i % 4])
    half.append(w)
begun = time.monotonic()
Wire(tcp=True).start_tls().go().well_small()
grown = resident()
# a byte now and then does not make it last
for w in half[1::4]:
    try:
        w.send(b'\x01')
    except OSError:
        pass
for w in half:
    w.until_closed()
assert time.monotonic() - begun < PATIENCE
print(grown)
"#,
    );
    let grown = daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more");
    accepted(&nbds(&daemon, "disk", &trusted));
}

#[test]
fn what_is_wrong_is_said_with_a_remedy() {
    let authority = Authority::new("ca");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    authority.server().install(dir.path());
    fs::write(path("ca.pem"), authority.pem()).unwrap();
    fs::write(path("empty.pem"), "").unwrap();
    fs::write(
        path("encrypted.pem"),
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMIIB\n-----END ENCRYPTED PRIVATE KEY-----\n",
    )
    .unwrap();
    secret(&path("other-key.pem"), &authority.server().key);
    fs::write(path("open-key.pem"), fs::read(path("server-key.pem")).unwrap()).unwrap();
    fs::write(path("old.pem"), authority.expired("old").certificate).unwrap();
    let both = [fs::read(path("server-cert.pem")).unwrap(), fs::read(path("server-key.pem")).unwrap()].concat();
    secret(&path("both.pem"), &String::from_utf8(both).unwrap());
    let check = |generic: &str, export: &str| {
        let text = format!("[generic]\n{generic}\n[disk]\nexportname = /srv/disk.raw\n{export}\n");
        let text = text.replace("DIR", dir.path().to_str().unwrap());
        fs::write(path("config"), text).unwrap();
        let out = qemu::output(Command::new(env!("CARGO_BIN_EXE_cowgate")).arg("check-config").arg(path("config")));
        (out.status.success(), qemu::text(&out.stdout))
    };
    let pair = "certfile = DIR/server-cert.pem\nkeyfile = DIR/server-key.pem";
    for (generic, export) in [
        (pair, ""),
        (pair, "tls = required"),
        ("keyfile = DIR/both.pem", "force_tls = true"),
        (&format!("{pair}\ncacertfile = DIR/ca.pem"), "tlsallow = a; CN=b,O=c"),
        (&format!("{pair}\nforce_tls = true\ntlsprio = NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2:%SERVER_PRECEDENCE"), ""),
        ("tls = off", "tls = off"),
    ] {
        let (ok, said) = check(generic, export);
        assert!(ok && !said.contains("warning"), "{generic}\n{export}\n{said}");
    }
    for (generic, export, expected) in [
        ("tls = required", "", "tls = required: there is no TLS without a key"),
        ("force_tls = true", "", "force_tls = true: there is no TLS without a key"),
        ("tls = maybe", "", "this is no way to use TLS; write off, on or required"),
        ("keyfile = DIR/none.pem\ncertfile = DIR/server-cert.pem", "", "none.pem: this file cannot be read"),
        ("keyfile = DIR\ncertfile = DIR/server-cert.pem", "", "not a regular file"),
        ("keyfile = DIR/server-key.pem", "", "there is no certificate in this file; write certificates as PEM"),
        ("keyfile = DIR/server-key.pem\ncertfile = DIR/empty.pem", "", "empty.pem: there is no certificate"),
        ("keyfile = DIR/ca.pem\ncertfile = DIR/server-cert.pem", "", "there is no private key in this file"),
        (
            "keyfile = DIR/encrypted.pem\ncertfile = DIR/server-cert.pem",
            "",
            "this private key is encrypted; decrypt it",
        ),
        (
            "keyfile = DIR/other-key.pem\ncertfile = DIR/server-cert.pem",
            "",
            "this key does not belong to the certificate",
        ),
        (&format!("{pair}\ncacertfile = DIR/empty.pem"), "", "[generic] cacertfile"),
        (&format!("{pair}\ncacertfile = DIR/ca.pem\ncrlfile = DIR/ca.pem"), "", "there are 0 lists of revoked"),
        (&format!("{pair}\ntlsverify = required"), "", "tlsverify = required: there is no authority"),
        (&format!("{pair}\ntls = on\nforce_tls = true"), "", "tls = on: this contradicts force_tls = true"),
        (&format!("{pair}\ntlsprio = NORMAL:-VERS-ALL"), "", "this leaves no version of TLS"),
        ("", "tls = required", "[disk] it is to be served with TLS only, and this server has none"),
        ("", "tlsallow = a", "[disk] it is to be served with TLS only"),
        (pair, "tlsallow = a", "this server asks nobody for a certificate"),
        (pair, "tlsallow = a, b", "separate subjects by semicolons"),
        (pair, "tls = off\ntlsallow = a", "without TLS nobody shows a certificate"),
        (&format!("{pair}\ntls = required"), "tls = off", "this server requires TLS of everybody"),
    ] {
        let (ok, said) = check(generic, export);
        assert!(!ok && said.contains(expected), "{generic}\n{export}\n{said}");
    }
    for (generic, expected) in [
        ("certfile = DIR/server-cert.pem", "a certificate without a key gives no TLS"),
        (&format!("{pair}\ncrlfile = DIR/ca.pem"), "a revoked one makes no difference"),
        (&format!("{pair}\ntlsprio = SECURE256:+VERS-TLS1.2"), "SECURE256 is not followed"),
        (
            "certfile = DIR/server-cert.pem\nkeyfile = DIR/open-key.pem",
            "everybody on this machine can read this private key",
        ),
    ] {
        let (ok, said) = check(generic, "");
        assert!(ok && said.contains("warning") && said.contains(expected), "{generic}\n{said}");
    }
    let (_, said) = check("certfile = DIR/old.pem\nkeyfile = DIR/server-key.pem", "");
    assert!(said.contains("this certificate has expired"), "{said}");
    // a start says the same
    check("keyfile = DIR/none.pem", "");
    let out = qemu::output(
        Command::new(env!("CARGO_BIN_EXE_cowgate")).args(["serve", "-p", "none", "-c"]).arg(path("config")),
    );
    assert!(!out.status.success() && qemu::text(&out.stderr).contains("none.pem: this file cannot be read"));
}

#[test]
fn the_kernel_makes_and_opens_the_records() {
    // the tests above that send most, again, in a guest whose kernel does that
    let again = [
        "libnbd_copies_in_and_out",
        "qemu_writes_and_reads",
        "many_requests_at_a_time_keep_their_data",
        "damage_in_the_middle_ends_that_connection_only",
        "what_is_negotiated_in_clear_text_is_worth_nothing",
        "certificates_may_be_shown_but_need_not_be",
        "the_kernel_can_be_left_out",
    ];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut vm = Command::new(root.join("tools/vm/run"));
    vm.args(["--kernel", "newest", "--memory", "3072", "--timeout", "900", "env", "TMPDIR=/run"]);
    vm.arg(std::env::current_exe().unwrap()).args(["--include-ignored", "--test-threads=2", "--exact"]).args(again);
    let said = qemu::run(&mut vm);
    assert!(said.contains(&format!("test result: ok. {} passed", again.len())), "{said}");
}

#[test]
#[ignore = "runs in the guest that the test above starts"]
fn the_kernel_can_be_left_out() {
    for (key, by_kernel) in [("ktls = true", true), ("ktls = false", false)] {
        let authority = Authority::new("ca");
        let setup = with_tls(Setup::new(), &authority, key);
        let trusted = authority.directory(setup.dir(), "trusted", None);
        let (source, _) = content(setup.dir(), 4 << 20);
        let image = setup.image("disk.qcow2", "", "4M");
        setup.export("disk", &image, "");
        let daemon = setup.start();
        // who says so: the log, the control API, the kernel's own counters
        for (uri, expected) in
            [(nbds(&daemon, "disk", &trusted), by_kernel), (nbds_unix(&daemon, "disk", &trusted), false)]
        {
            let before = kernel_sockets();
            let mut io = Command::new("/usr/bin/python3");
            io.args(["-c", "import nbd, sys\nh = nbd.NBD()\nh.set_uri_allow_local_file(True)\nh.connect_uri(sys.argv[1])\nprint(flush=True)\ninput()"]);
            let mut io = io.arg(&uri).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            BufReader::new(io.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
            let status = qemu::run(
                Command::new(env!("CARGO_BIN_EXE_cowgate"))
                    .args(["export", "show", "disk", "--json", "--control"])
                    .arg(daemon.control()),
            );
            let status: serde_json::Value = serde_json::from_str(&status).unwrap();
            assert_eq!(status["current"]["clients"][0]["tls"]["kernel"], expected, "{status}");
            assert_eq!(kernel_sockets() - before, u64::from(expected), "{uri}");
            drop(io.stdin.take());
            io.wait().unwrap();
            qemu::run(Command::new("nbdcopy").arg(&source).arg(&uri));
        }
        let (dir, log) = daemon.stop();
        assert_eq!(log.contains("(kernel)"), by_kernel, "{log}");
        assert_eq!(log.contains("records of TLS 1.3 over TCP by the kernel"), by_kernel, "{log}");
        qemu::same_content(&dir.path().join("disk.qcow2"), &source);
    }
}

/// Sockets for which the kernel opens records now.
fn kernel_sockets() -> u64 {
    let all = fs::read_to_string("/proc/net/tls_stat").unwrap();
    let line = all.lines().find(|line| line.starts_with("TlsCurrRxSw")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
