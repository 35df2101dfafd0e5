//! The control API and its commands: a real daemon, real NBD clients, and whoever else finds the socket.

mod common;

use common::daemon::{Daemon, Setup};
use common::{qemu, root};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// An ordinary HTTP client.
const ASK: &str = include_str!("clients/control.py");
/// A user who is neither root nor the daemon's.
const STRANGER: &str = "65534";

fn cowgate(daemon: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    qemu::output(command.args(arguments).env("COWGATE_CONTROL", daemon.control()))
}

#[track_caller]
fn done(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = cowgate(daemon, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", qemu::text(&output.stderr));
    qemu::text(&output.stdout)
}

#[track_caller]
fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = cowgate(daemon, arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", qemu::text(&output.stdout));
    qemu::text(&output.stderr)
}

/// Sends one request with an ordinary HTTP client; returns the status, the content type and the answer.
#[track_caller]
fn ask(daemon: &Daemon, method: &str, path: &str, body: Value) -> (u16, String, Value) {
    let mut client = Command::new("/usr/bin/python3")
        .args(["-c", ASK])
        .arg(daemon.control())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let request = json!({"method": method, "path": path, "body": body});
    writeln!(client.stdin.take().unwrap(), "{request}").unwrap();
    let output = client.wait_with_output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{method} {path}: {e}"));
    (
        u16::try_from(answer[0].as_u64().unwrap()).unwrap(),
        answer[1].as_str().unwrap_or_default().to_owned(),
        answer[2].clone(),
    )
}

/// The same with nothing but bytes; returns everything that comes back until the daemon closes.
fn exchange(daemon: &Daemon, bytes: &[u8]) -> String {
    let mut socket = UnixStream::connect(daemon.control()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // it may have heard enough before the end
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn view(daemon: &Daemon, name: &str) -> Value {
    serde_json::from_str(&done(daemon, &["export", "show", name, "--json"])).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A client that writes without end once it is told to, and says when it has begun and how it ended.
struct Writer {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Writer {
    fn start(daemon: &Daemon, export: &str) -> Writer {
        let mut child = Command::new("/usr/bin/python3")
            .args(["-c", WRITER, &daemon.uri(export)])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut writer = Writer { output: BufReader::new(child.stdout.take().unwrap()), child };
        assert_eq!(writer.line(), "begun");
        writer
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes 64 KiB after 64 KiB, a number in each; in the end how many were acknowledged.
const WRITER: &str = r#"
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size = h.get_size()
done = 0
try:
    while True:
        h.pwrite(bytes([done % 251 + 1]) * 65536, done * 65536 % size)
        done += 1
        if done == 20:
            print("begun", flush=True)
except nbd.Error:
    pass
print(done, flush=True)
"#;

#[test]
fn an_export_is_added_tried_used_and_removed() {
    let setup = Setup::new();
    let base = setup.image("base.qcow2", "", "64M");
    let backing = format!("backing_file={},backing_fmt=qcow2", text(&base));
    let image = setup.image("disk.qcow2", &backing, "64M");
    let daemon = setup.start();
    assert_eq!(done(&daemon, &["export", "list", "--json"]), done(&daemon, &["export", "list", "--json", "--details"]));

    let body = json!({"name": "disk", "path": text(&image), "keys": {"maxconnections": 2, "trim": false}});
    let (status, kind, added) = ask(&daemon, "POST", "/v1/exports", body.clone());
    assert_eq!((status, kind.as_str(), &added["outcome"]), (201, "application/json", &json!("created")), "{added}");
    assert_eq!(daemon.names(), ["disk"], "served when it answers");
    let file = PathBuf::from(added["file"].as_str().unwrap());
    assert_eq!(file, daemon.dir().join("conf.d/disk.conf"));
    let stored = fs::read_to_string(&file).unwrap();
    assert!(stored.contains("maxconnections = 2") && stored.contains("trim = false"), "{stored}");

    // nobody has it open: its size and chain are in the file
    let export = &view(&daemon, "disk")["current"];
    assert_eq!(
        (&export["state"], &export["lock"], &export["open"]),
        (&json!("serving"), &json!("none"), &json!(false))
    );
    assert_eq!((&export["size_bytes"], &export["mode"], &export["line"]), (&json!(64 << 20), &json!("rw"), &json!(1)));
    let chain = export["chain"].as_array().unwrap();
    assert_eq!((chain.len(), &chain[1]["path"], &chain[1]["format"]), (2, &json!(text(&base)), &json!("qcow2")));
    let info: Value =
        serde_json::from_str(&qemu::run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&image))).unwrap();
    assert_eq!(export["allocated_bytes"], info["actual-size"], "as qemu-img has it");

    // the same again is no change; something else is a conflict, unless it is to be replaced
    let (status, _, again) = ask(&daemon, "POST", "/v1/exports", body.clone());
    assert_eq!(
        (status, &again["outcome"], &again["export"]["generation"]),
        (200, &json!("unchanged"), &export["generation"])
    );
    let other = json!({"name": "disk", "path": text(&image), "readonly": true});
    let (status, kind, problem) = ask(&daemon, "POST", "/v1/exports", other.clone());
    assert_eq!((status, kind.as_str()), (409, "application/problem+json"));
    assert!(problem["detail"].as_str().unwrap().contains("disk.conf:1") && problem["remedy"].is_string(), "{problem}");
    let mut replacing = other;
    replacing["replace"] = json!(true);
    let (status, _, replaced) = ask(&daemon, "POST", "/v1/exports", replacing);
    assert_eq!((status, &replaced["outcome"], &replaced["export"]["mode"]), (200, &json!("replaced"), &json!("ro")));

    let (status, _, probed) = ask(&daemon, "POST", "/v1/exports/disk/probe", Value::Null);
    assert_eq!((status, probed), (200, json!({"connectable": true, "size_bytes": 64 << 20, "writable": false})));
    assert!(done(&daemon, &["export", "remove", "disk", "--wait"]).contains("released"));
    assert!(daemon.names().is_empty() && !file.exists());
    assert_eq!(ask(&daemon, "GET", "/v1/exports/disk", Value::Null).0, 404);
    assert_eq!(ask(&daemon, "POST", "/v1/exports/disk/probe", Value::Null).0, 404);
    assert!(refused(&daemon, &["export", "remove", "disk"]).contains("there is no export"));
    let _dir = daemon.stop();
}

#[test]
fn a_probe_tells_what_a_client_would_meet() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let missing = setup.dir().join("missing.qcow2");
    setup.export("disk", &image, "");
    setup.export("missing", &missing, "");
    let daemon = setup.start();
    let probe = |name: &str| ask(&daemon, "POST", &format!("/v1/exports/{name}/probe"), Value::Null).2;
    assert_eq!(probe("disk"), json!({"connectable": true, "size_bytes": 1 << 20, "writable": true}));
    let gone = probe("missing");
    assert!(
        gone["connectable"] == json!(false) && gone["reason"].as_str().unwrap().contains("missing.qcow2"),
        "{gone}"
    );
    // someone else writes the image
    let mut holder = Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(&image)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    input.write_all(b"write 0 512\n").unwrap();
    let mut output = BufReader::new(holder.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("wrote") {
        line.clear();
        assert!(output.read_line(&mut line).unwrap() > 0);
    }
    let locked = probe("disk");
    assert!(locked["connectable"] == json!(false) && locked["reason"].as_str().unwrap().contains("lock"), "{locked}");
    let failed = &view(&daemon, "disk")["current"];
    assert!(failed["state"] == json!("failed") && failed["failure"]["at"].is_string(), "{failed}");
    drop(input);
    holder.wait().unwrap();
    assert_eq!(probe("disk")["connectable"], json!(true));
    assert_eq!(view(&daemon, "disk")["current"]["state"], json!("serving"));
    let _dir = daemon.stop();
}

#[test]
fn what_clients_do_is_counted_and_kept() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let mut client = Command::new("/usr/bin/python3")
        .args([
            "-c",
            "import nbd, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\nh.pwrite(b'x' * 65536, 0)\nh.pread(4096, 0)\n\
             h.zero(65536, 1 << 20)\nh.flush()\nprint('done', flush=True)\nsys.stdin.read()\nh.shutdown()",
            &daemon.uri("disk"),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let export = &view(&daemon, "disk")["current"];
    assert_eq!((&export["lock"], &export["open"]), (&json!("write"), &json!(true)));
    let connected = &export["clients"][0];
    assert_eq!(connected["peer"], json!(format!("unix pid {} uid 0", client.id())));
    assert_eq!((&connected["in_flight"], &connected["errors"]), (&json!(0), &json!(0)));
    assert_eq!(connected["write"], json!({"requests": 1, "bytes": 65536}));
    let last = connected["last_io"].as_str().unwrap().to_owned();
    assert!(last.ends_with('Z') && connected["since"].as_str().unwrap().ends_with('Z'));
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success());
    daemon.wait_for("it to leave", || view(&daemon, "disk")["current"]["clients"] == json!([]));
    let totals = &view(&daemon, "disk")["current"]["totals"];
    assert_eq!(totals["read"], json!({"requests": 1, "bytes": 4096}));
    assert_eq!(totals["write"], json!({"requests": 1, "bytes": 65536}));
    assert_eq!(totals["write_zeroes"], json!({"requests": 1, "bytes": 65536}));
    assert_eq!((&totals["flush"]["requests"], &totals["last_io"]), (&json!(1), &json!(last)));
    let table = done(&daemon, &["status"]);
    assert!(table.contains("NAME") && table.contains("disk") && table.contains("128 KiB"), "{table}");
    let status: Value = serde_json::from_str(&done(&daemon, &["status", "--json"])).unwrap();
    assert_eq!((&status["daemon"]["status"], &status["exports"][0]["name"]), (&json!("ok"), &json!("disk")));
    let _dir = daemon.stop();
}

#[test]
fn a_removed_export_drains_or_is_emptied_by_force() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    let daemon = setup.start();
    done(&daemon, &["export", "add", "disk", text(&image)]);
    let mut writer = Writer::start(&daemon, "disk");
    let removed = done(&daemon, &["export", "remove", "disk"]);
    assert!(removed.contains("1 clients stay"), "{removed}");
    assert!(daemon.names().is_empty());
    let drains = view(&daemon, "disk");
    assert!(drains["current"].is_null() && drains["draining"][0]["state"] == json!("draining"), "{drains}");
    assert_eq!(drains["draining"][0]["lock"], json!("write"));
    // a new one beside it: both are listed
    done(&daemon, &["export", "add", "disk", text(&image), "--readonly"]);
    let both = done(&daemon, &["export", "list"]);
    assert!(both.contains("serving") && both.contains("draining"), "{both}");
    done(&daemon, &["export", "remove", "disk", "--force", "--wait"]);
    // released: who asked for it may write it at once
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 77 63M 64K"]).arg(&image));
    let acknowledged: u64 = writer.line().parse().unwrap();
    assert!(acknowledged >= 20);
    qemu::check(&image);
    let mut io = Command::new("qemu-io");
    io.args(["-r", "-f", "qcow2"]);
    for i in acknowledged.saturating_sub(900)..acknowledged {
        let at = i * 65536 % (64 << 20);
        if at < 63 << 20 {
            io.args(["-c", &format!("read -P {} {at} 64K", i % 251 + 1)]);
        }
    }
    let said = qemu::run(io.arg(&image));
    assert!(!said.contains("failed"), "what it was told is written is there: {said}");
    assert_eq!(ask(&daemon, "GET", "/v1/exports/disk", Value::Null).0, 404);
    let _dir = daemon.stop();
}

#[test]
fn other_files_neither_hinder_an_export_nor_are_touched() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let daemon = setup.start();
    let conf_d = daemon.dir().join("conf.d");
    fs::write(conf_d.join("bad.conf"), "[bad]\nreadonly = perhaps\n").unwrap();
    let two = format!("[one]\nexportname = {0}\nreadonly=true\n[two]\nexportname = {0}\nreadonly=true\n", text(&image));
    fs::write(conf_d.join("two.conf"), two).unwrap();
    done(&daemon, &["export", "add", "disk", text(&image), "--readonly"]);
    assert!(daemon.names().contains(&"disk".to_owned()));
    // a file of two exports is not ours to remove
    let shared = refused(&daemon, &["export", "remove", "one"]);
    assert!(shared.contains("two.conf:1") && shared.contains("[two]"), "{shared}");
    assert!(daemon.names().contains(&"one".to_owned()));
    // nor is the base file
    let base = daemon.dir().join("cowgate.conf");
    let more = format!("{}[inbase]\nexportname = {}\n", fs::read_to_string(&base).unwrap(), text(&image));
    fs::write(&base, more).unwrap();
    assert_eq!(cowgate(&daemon, &["reload", "--wait"]).status.code(), Some(1), "of bad.conf");
    let in_base = refused(&daemon, &["export", "remove", "inbase"]);
    assert!(in_base.contains("cowgate.conf:"), "{in_base}");
    // a file of that name that is no export's
    fs::write(conf_d.join("taken.conf"), "").unwrap();
    assert!(refused(&daemon, &["export", "add", "taken", text(&image)]).contains("taken.conf"));
    // what another file has is not defined a second time
    let defined = refused(&daemon, &["export", "add", "one", text(&image), "--replace"]);
    assert!(defined.contains("two.conf:1"), "{defined}");
    let outcome = cowgate(&daemon, &["reload", "--json"]);
    assert!(qemu::text(&outcome.stderr).contains("bad.conf:2"));
    let outcome: Value = serde_json::from_slice(&outcome.stdout).unwrap();
    assert_eq!(outcome["complete"], json!(false));
    fs::remove_file(conf_d.join("bad.conf")).unwrap();
    done(&daemon, &["reload", "--wait"]);
    let _dir = daemon.stop();
}

#[test]
fn nothing_that_cannot_be_served_is_stored() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let daemon = setup.start();
    let path = text(&image);
    let long = "n".repeat(5000);
    for (body, part) in [
        (json!({"name": "a", "path": "relative"}), "absolute"),
        (json!({"name": "a", "path": path, "format": "vmdk"}), "vmdk"),
        (json!({"name": "a", "path": path, "keys": {"no_such": 1}}), "no_such"),
        (json!({"name": "a", "path": path, "keys": {"exportname": "/etc/passwd"}}), "exportname"),
        (json!({"name": "a", "path": path, "keys": {"a\n[b]\nexportname": "/x"}}), "key"),
        (json!({"name": "a", "path": format!("{path}\u{0}")}), ""),
        (json!({"name": "a]\n[b", "path": path}), "name"),
        (json!({"name": "", "path": path}), ""),
        (json!({"name": "generic", "path": path}), ""),
        (json!({"name": "a\u{7}", "path": path}), ""),
        (json!({"name": long, "path": path}), "4096"),
        (json!({"name": "a", "path": path, "keys": {"readonly": "x", "flush": "y"}}), ""),
    ] {
        let (status, _, problem) = ask(&daemon, "POST", "/v1/exports", body.clone());
        assert_eq!(status, 422, "{body}: {problem}");
        assert!(problem["detail"].as_str().unwrap().contains(part), "{problem}");
    }
    let several = json!({"name": "a", "path": path, "keys": {"fua": "x", "flush": "y", "sync": "z"}});
    let (_, _, problem) = ask(&daemon, "POST", "/v1/exports", several);
    assert_eq!(problem["problems"].as_array().map(Vec::len), Some(3), "all of them: {problem}");
    for body in ["", "{", "[]", r#"{"name": "a"}"#, r#"{"name": 1, "path": "/"}"#, r#"{"name":"a","path":"/","x":1}"#] {
        assert_eq!(ask(&daemon, "POST", "/v1/exports", json!(body)).0, 400, "{body}");
    }
    assert_eq!(fs::read_dir(daemon.dir().join("conf.d")).unwrap().count(), 0);
    // names that look like paths are names
    for name in ["../x", "a/b", "..", ".", "a b%2F?#", "\u{e4}", &"n".repeat(4096)] {
        done(&daemon, &["export", "add", name, path, "--readonly"]);
        assert_eq!(view(&daemon, name)["current"]["name"], json!(name));
    }
    assert_eq!(daemon.names().len(), 7);
    assert!(!daemon.dir().join("x.conf").exists());
    for name in daemon.names() {
        done(&daemon, &["export", "remove", &name]);
    }
    assert_eq!(fs::read_dir(daemon.dir().join("conf.d")).unwrap().count(), 0);
    let _dir = daemon.stop();
}

#[test]
fn without_includedir_there_is_no_place_for_exports() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let base = setup.write_base();
    let daemon = setup.start();
    let text_of_base = fs::read_to_string(&base).unwrap();
    let without: String =
        text_of_base.lines().filter(|l| !l.starts_with("includedir")).map(|l| format!("{l}\n")).collect();
    fs::write(&base, without).unwrap();
    done(&daemon, &["reload"]);
    let message = refused(&daemon, &["export", "add", "disk", text(&image)]);
    assert!(message.contains("set includedir"), "{message}");
    // a directory that has gone
    fs::write(&base, text_of_base.replace("/conf.d", "/other.d")).unwrap();
    fs::create_dir(daemon.dir().join("other.d")).unwrap();
    done(&daemon, &["reload"]);
    fs::remove_dir(daemon.dir().join("other.d")).unwrap();
    let message = refused(&daemon, &["export", "add", "disk", text(&image)]);
    assert!(message.contains("other.d"), "{message}");
    let _dir = daemon.stop();
}

#[test]
fn strangers_are_refused() {
    if !root::available("become another user") {
        return;
    }
    let daemon = Setup::new().start();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.control()), 0o600);
    let stranger = |path: &str| {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={STRANGER}"), "--clear-groups", "/usr/bin/python3", "-c", ASK]);
        command.arg(daemon.control()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut client = command.spawn().unwrap();
        writeln!(client.stdin.take().unwrap(), "{}", json!({"method": "GET", "path": path})).unwrap();
        client.wait_with_output().unwrap()
    };
    fs::set_permissions(daemon.dir(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(!stranger("/v1/health").status.success(), "the mode keeps them out");
    // and if somebody opens the door
    fs::set_permissions(daemon.control(), fs::Permissions::from_mode(0o666)).unwrap();
    for path in ["/v1/health", "/v1/exports", "/nowhere"] {
        let answer = stranger(path);
        assert!(qemu::text(&answer.stdout).starts_with("[403, "), "{}", qemu::text(&answer.stdout));
    }
    done(&daemon, &["status"]);
    let _dir = daemon.stop();
}

#[test]
fn whatever_comes_over_the_socket_costs_nothing() {
    let daemon = Setup::new().start();
    for (request, answer) in [
        (b"\x00\xff\x80garbage\r\n\r\n".as_slice(), "400"),
        (b"GET /v1/health HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", "400"),
        (b"GET /v1/exports/%ff%fe HTTP/1.0\r\nhost: x\r\n\r\n", "400"),
        (b"GET /v1/exports?details=perhaps HTTP/1.0\r\n\r\n", "400"),
        (b"GET /v1/exports?unknown=1 HTTP/1.0\r\n\r\n", "400"),
        (b"GET /v1/exports/../../etc/passwd HTTP/1.0\r\n\r\n", "404"),
        (b"GET / HTTP/1.0\r\n\r\n", "404"),
        (b"PUT /v1/health HTTP/1.0\r\n\r\n", "405"),
        (b"BREW /v1/exports HTTP/1.0\r\n\r\n", "405"),
        (b"POST /v1/reload HTTP/1.1\r\nhost: x\r\ncontent-length: 10000000000\r\n\r\n{", "413"),
    ] {
        let got = exchange(&daemon, request);
        let line = got.lines().next().unwrap_or_default();
        assert!(line.contains(answer), "{:?}: {got}", String::from_utf8_lossy(request));
    }
    let endless =
        [b"POST /v1/exports HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_vec(), b"10000\r\n".to_vec()];
    let chunk = [vec![b'x'; 0x10000], b"\r\n10000\r\n".to_vec()].concat();
    let body = [endless.concat(), chunk.repeat(20)].concat();
    let got = exchange(&daemon, &body);
    // it may close before all of it was sent, and then the answer may be lost
    assert!(got.is_empty() || got.contains("413"), "{got}");
    let head = [b"GET /v1/health HTTP/1.1\r\nx: ".to_vec(), vec![b'x'; 1 << 20]].concat();
    let got = exchange(&daemon, &head);
    assert!(got.is_empty() || got.contains("431") || got.contains("400"), "{got}");
    let many = [b"GET /v1/health HTTP/1.1\r\n".to_vec(), b"a: b\r\n".repeat(5000)].concat();
    let got = exchange(&daemon, &many);
    assert!(got.is_empty() || got.contains("431") || got.contains("400"), "{got}");

    // clients that only stay are no hindrance, and go when others come
    let begun = Instant::now();
    let idle: Vec<UnixStream> = (0..400).map(|_| UnixStream::connect(daemon.control()).unwrap()).collect();
    let mut slow = UnixStream::connect(daemon.control()).unwrap();
    slow.write_all(b"POST /v1/exports HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").unwrap();
    for _ in 0..20 {
        done(&daemon, &["status"]);
    }
    assert!(begun.elapsed() < Duration::from_secs(60));
    // the slow one is told in the end
    slow.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut answer = String::new();
    let _ = slow.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.contains("408"), "{answer}");
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    drop(idle);
    daemon.wait_for("the connections to be gone", || descriptors() < 60);
    let (_dir, log) = daemon.stop();
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_kill_at_any_moment_leaves_all_or_nothing() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let mut daemon = setup.start();
    for round in 0..6_u64 {
        let socket = daemon.control();
        let path = text(&image).to_owned();
        let adding = std::thread::spawn(move || {
            let mut answered = Vec::new();
            for i in 0..1000 {
                let name = format!("r{round}-{i}");
                let mut add = Command::new(env!("CARGO_BIN_EXE_cowgate"));
                add.args(["export", "add", &name, &path, "--readonly", "--control"]).arg(&socket);
                if !qemu::output(&mut add).status.success() {
                    break;
                }
                answered.push(name);
            }
            answered
        });
        std::thread::sleep(Duration::from_millis(40 + round * 37));
        let dir = daemon.kill();
        let answered = adding.join().unwrap();
        daemon = Setup::again(dir).start();
        let names = daemon.names();
        for name in &answered {
            assert!(names.contains(name), "{name} was answered and is gone; there are {names:?}");
        }
        assert!(!daemon.log().contains("ERROR") && !daemon.log().contains(" WARN"), "{}", daemon.log());
        let unknown = names.iter().filter(|name| name.starts_with(&format!("r{round}-"))).count() - answered.len();
        assert!(unknown <= 1, "one at most was under way");
    }
    let _dir = daemon.stop();
}

#[test]
fn names_are_made_of_their_parts() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let daemon = setup.start();
    let parts = ["--vm-context", "ctx", "--disk", "1", "--type", "incr", "--time", "20250101T120000"];
    let mut add = vec!["export", "add", text(&image), "--json"];
    add.extend(parts);
    let added: Value = serde_json::from_str(&done(&daemon, &add)).unwrap();
    assert_eq!(added["export"]["name"], json!("backup-ctx-disk1-incr-20250101T120000"));
    assert!(refused(&daemon, &["export", "add", text(&image)]).contains("--vm-context"));
    assert!(refused(&daemon, &["export", "add", "x", text(&image), "--disk", "1"]).contains("--vm-context"));
    let nowhere = cowgate(&daemon, &["status", "--control", "/nowhere/at/all"]);
    assert!(qemu::text(&nowhere.stderr).contains("no daemon listens there"));
    let _dir = daemon.stop();
}

#[test]
fn the_socket_is_where_the_configuration_has_it() {
    let daemon = Setup::new().generic("# the last one counts\ncontrolsock = none").start();
    assert!(!daemon.control().exists());
    let _dir = daemon.stop();
    let setup = Setup::new();
    fs::write(setup.dir().join("control.sock"), "precious").unwrap();
    let base = setup.write_base();
    let mut serve = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    let output = qemu::output(serve.args(["serve", "-p", "none", "-c"]).arg(&base));
    assert_eq!(output.status.code(), Some(1));
    assert!(qemu::text(&output.stderr).contains("controlsock: cannot listen on"), "{}", qemu::text(&output.stderr));
    assert_eq!(fs::read(setup.dir().join("control.sock")).unwrap(), b"precious");
    // a directory of its own is made, and a socket left by a daemon that was killed is taken over
    let setup = Setup::new();
    let path = setup.dir().join("made/c.sock");
    let daemon = setup.generic(&format!("controlsock = {}", path.display())).start();
    let dir = daemon.kill();
    assert!(path.exists());
    let daemon = Setup::again(dir).generic(&format!("controlsock = {}", path.display())).start();
    let health = cowgate(&daemon, &["status", "--control", text(&path)]);
    assert!(health.status.success());
    let (_dir, _) = daemon.stop();
    assert!(!path.exists(), "removed at the end");
}

#[test]
fn a_directory_that_cannot_be_written_changes_nothing() {
    if !root::available("mount file systems") {
        return;
    }
    let place = root::Mount::tmpfs(1);
    let setup = Setup::new().generic(&format!("includedir = {}", place.path().display()));
    let image = setup.image("disk.qcow2", "", "1M");
    let daemon = setup.start();
    done(&daemon, &["export", "add", "disk", text(&image)]);
    qemu::run(Command::new("mount").args(["-o", "remount,ro"]).arg(place.path()));
    for arguments in [["export", "add", "more", text(&image)].as_slice(), &["export", "remove", "disk"]] {
        let message = refused(&daemon, arguments);
        assert!(message.contains("mount the file system writable"), "{message}");
    }
    assert_eq!(daemon.names(), ["disk"]);
    qemu::run(Command::new("mount").args(["-o", "remount,rw"]).arg(place.path()));
    // no space is left either
    let mut filler = fs::File::create(place.path().join("filler")).unwrap();
    while filler.write_all(&[1; 4096]).is_ok() {}
    let (status, _, problem) = ask(&daemon, "POST", "/v1/exports", json!({"name": "more", "path": text(&image)}));
    assert!(status == 500 && problem["detail"].as_str().unwrap().contains("make space"), "{problem}");
    assert_eq!(daemon.names(), ["disk"]);
    drop(filler);
    fs::remove_file(place.path().join("filler")).unwrap();
    done(&daemon, &["export", "add", "more", text(&image)]);
    done(&daemon, &["export", "remove", "disk"]);
    assert_eq!(daemon.names(), ["more"]);
    let _dir = daemon.stop();
}

/// Judges answers by the description: a JSON list of [schema, answer] on standard input. Unknown fields are errors.
const JUDGE: &str = r##"
import json, sys
from jsonschema import Draft202012Validator
description = json.load(open(sys.argv[1]))
for schema in description["components"]["schemas"].values():
    Draft202012Validator.check_schema(schema)
    if schema.get("type") == "object":
        schema["unevaluatedProperties"] = False
description["components"]["schemas"]["Counters"].pop("unevaluatedProperties")  # a part of others
for name, answer in json.load(sys.stdin):
    whole = {"$ref": "#/components/schemas/" + name, "components": description["components"]}
    for error in Draft202012Validator(whole).iter_errors(answer):
        sys.exit(f"{name}: {error.json_path}: {error.message}\n{json.dumps(answer)}")
for path, routes in description["paths"].items():
    for method, route in routes.items():
        if not route.get("summary") or not route.get("responses"):
            sys.exit(f"{method} {path} is not described")
"##;

#[test]
fn answers_are_what_the_description_says() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("missing", &setup.dir().join("missing"), "");
    let daemon = setup.start();
    let probe = |name: &str| ask(&daemon, "POST", &format!("/v1/exports/{name}/probe"), Value::Null).2;
    let add =
        json!({"name": "disk", "path": text(&image), "keys": {"maxconnections": 5, "sync": true, "flush": "true"}});
    let mut answers = vec![json!(["AddExport", add])];
    let mut judge = |schema: &str, answer: Value| answers.push(json!([schema, answer]));
    judge("Health", ask(&daemon, "GET", "/v1/health", Value::Null).2);
    judge("Added", ask(&daemon, "POST", "/v1/exports", add.clone()).2);
    judge("Probed", probe("disk"));
    judge("Probed", probe("missing"));
    let writer = Writer::start(&daemon, "disk");
    judge("ExportView", view(&daemon, "disk"));
    judge("ExportView", view(&daemon, "missing"));
    let (status, _, refused) = ask(&daemon, "POST", "/v1/exports/disk/resize", json!({"size_bytes": 1}));
    assert_eq!(status, 409, "it is no block device: {refused}");
    judge("Problem", refused);
    judge("Problem", ask(&daemon, "POST", "/v1/exports/disk/resize", json!({"size_bytes": 1, "more_bytes": 1})).2);
    judge("Removed", ask(&daemon, "DELETE", "/v1/exports/disk", Value::Null).2);
    judge("ExportList", ask(&daemon, "GET", "/v1/exports?details=true", Value::Null).2);
    judge("ExportList", ask(&daemon, "GET", "/v1/exports", Value::Null).2);
    drop(writer);
    judge("Reloaded", ask(&daemon, "POST", "/v1/reload", json!({"wait": true})).2);
    judge("Reloaded", ask(&daemon, "POST", "/v1/reload", Value::Null).2);
    judge("Problem", ask(&daemon, "GET", "/v1/exports/no", Value::Null).2);
    judge("Problem", ask(&daemon, "POST", "/v1/exports", json!({"name": "x", "path": "x"})).2);
    judge("Problem", ask(&daemon, "POST", "/v1/nowhere", Value::Null).2);
    let mut python = Command::new("/usr/bin/python3");
    python.args(["-c", JUDGE, concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json")]);
    let mut child = python.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(json!(answers).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", qemu::text(&output.stderr));
    let _dir = daemon.stop();
}

#[test]
fn the_description_in_docs_is_that_of_the_code() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
    let made = cowgate::serve::control::openapi();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        fs::write(file, &made).unwrap();
    }
    assert!(fs::read_to_string(file).unwrap_or_default() == made, "run this test with UPDATE_OPENAPI=1 and look at it");
}
