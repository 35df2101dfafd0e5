//! The daemon's life as its operator sees it: start, reload, stop, and what it says about each.

mod common;

use common::daemon::{Daemon, Setup, write_export};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

fn cowgate(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_cowgate")).args(arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn raw_image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// A minimal client: one export, one request at a time.
struct Client {
    socket: UnixStream,
    size: u64,
}

impl Client {
    /// NBD_OPT_EXPORT_NAME; `None` when the server does not serve it.
    fn open(daemon: &Daemon, name: &str) -> Option<Client> {
        let mut socket = UnixStream::connect(daemon.socket()).unwrap();
        let (client_flags, option) = (3_u32, 1_u32);
        socket.read_exact(&mut [0; 18]).unwrap();
        let head = [&client_flags.to_be_bytes()[..], b"IHAVEOPT", &option.to_be_bytes()].concat();
        socket.write_all(&[&head, &(name.len() as u32).to_be_bytes()[..], name.as_bytes()].concat()).unwrap();
        let mut reply = [0; 10];
        // this option knows no error but the end of the connection
        socket.read_exact(&mut reply).ok()?;
        Some(Client { socket, size: u64::from_be_bytes(reply[..8].try_into().unwrap()) })
    }

    /// NBD_CMD_WRITE, and its success. The offset serves as cookie.
    fn write(&mut self, at: u64, data: &[u8]) {
        let head = [&0x2560_9513_u32.to_be_bytes()[..], &1_u32.to_be_bytes(), &at.to_be_bytes()].concat();
        let rest = [&at.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat();
        self.socket.write_all(&[head, rest].concat()).unwrap();
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply).unwrap();
        let expected = [&0x6744_6698_u32.to_be_bytes()[..], &0_u32.to_be_bytes(), &at.to_be_bytes()].concat();
        assert_eq!(reply[..], expected[..], "a simple reply without error");
    }
}

#[test]
fn a_reload_counts_what_it_added_changed_and_removed() {
    let setup = Setup::new();
    let image = raw_image(setup.dir(), "image", 1 << 20);
    setup.export("a", &image, "");
    setup.export("b", &image, "");
    let daemon = setup.start();
    assert!(daemon.log().contains("configuration 1 loaded: 2 exports"));
    write_export(daemon.dir(), "b", &image, "readonly = true");
    write_export(daemon.dir(), "c", &image, "");
    fs::remove_file(daemon.dir().join("conf.d/a.conf")).unwrap();
    daemon.reload();
    assert_eq!(daemon.names(), ["b", "c"]);
    let (_, log) = daemon.stop();
    assert!(log.contains("configuration 2 reloaded: 1 added, 1 changed, 1 removed; 2 exports"), "{log}");
}

#[test]
fn a_client_keeps_its_export_when_it_is_changed_or_removed() {
    let setup = Setup::new();
    let (old, new) = (raw_image(setup.dir(), "old", 1 << 20), raw_image(setup.dir(), "new", 2 << 20));
    setup.export("a", &old, "");
    let daemon = setup.start();
    let mut client = Client::open(&daemon, "a").unwrap();
    client.write(0, b"before");

    write_export(daemon.dir(), "a", &new, "");
    daemon.reload();
    client.write(4096, b"changed");
    assert_eq!(Client::open(&daemon, "a").unwrap().size, 2 << 20);

    fs::remove_file(daemon.dir().join("conf.d/a.conf")).unwrap();
    daemon.reload();
    client.write(8192, b"removed");
    assert!(Client::open(&daemon, "a").is_none(), "new clients are refused");
    assert_eq!(client.size, 1 << 20);
    drop(client);
    let (_dir, _) = daemon.stop();
    let image = fs::read(&old).unwrap();
    assert_eq!(
        (&image[..6], &image[4096..4103], &image[8192..8199]),
        (&b"before"[..], &b"changed"[..], &b"removed"[..])
    );
}

#[test]
fn a_stop_does_not_wait_for_clients_that_only_stay_connected() {
    let setup = Setup::new();
    let image = raw_image(setup.dir(), "image", 1 << 20);
    setup.export("a", &image, "");
    let daemon = setup.start();
    let mut client = Client::open(&daemon, "a").unwrap();
    let in_handshake = UnixStream::connect(daemon.socket()).unwrap();
    client.write(0, b"written");
    let begun = Instant::now();
    let (_dir, _) = daemon.stop();
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(&fs::read(&image).unwrap()[..7], b"written");
    drop((client, in_handshake));
}

#[test]
fn a_file_that_is_written_while_the_signal_arrives_is_read_again() {
    let setup = Setup::new();
    let image = raw_image(setup.dir(), "image", 1 << 20);
    setup.export("a", &image, "");
    let daemon = setup.start();
    // a control plane signals too early: one file is empty so far, the other torn
    fs::write(daemon.dir().join("conf.d/a.conf"), "").unwrap();
    fs::write(daemon.dir().join("conf.d/b.conf"), "[b]\nexportn").unwrap();
    daemon.signal("HUP");
    daemon.wait_for("it to notice", || daemon.log().contains("seems to be half-written"));
    assert_eq!(daemon.names(), ["a"]);
    write_export(daemon.dir(), "a", &image, "readonly = true");
    write_export(daemon.dir(), "b", &image, "");
    daemon.wait_for("the whole files", || daemon.log().contains("reloaded: 1 added, 1 changed, 0 removed"));
    assert_eq!(daemon.names(), ["a", "b"]);
    let (_, log) = daemon.stop();
    assert!(!log.contains("ERROR"), "what a torn file seems to say is not reported: {log}");
}

#[test]
fn a_bad_base_file_changes_nothing() {
    let setup = Setup::new();
    let image = raw_image(setup.dir(), "image", 1 << 20);
    setup.export("a", &image, "");
    let daemon = setup.start();
    fs::write(daemon.dir().join("cowgate.conf"), "[generic]\nforce_tls = true\n").unwrap();
    daemon.reload();
    assert_eq!(daemon.names(), ["a"]);
    let (_, log) = daemon.stop();
    assert!(log.contains("cowgate.conf:2: error: [generic] force_tls = true"), "{log}");
    assert!(log.contains("configuration 2 not reloaded"), "{log}");
}

#[test]
fn changes_that_need_a_restart_are_named() {
    let daemon = Setup::new().start();
    let base = daemon.dir().join("cowgate.conf");
    let text = fs::read_to_string(&base).unwrap();
    fs::write(&base, format!("{text}workers = 7\n")).unwrap();
    daemon.reload();
    let (_, log) = daemon.stop();
    assert!(log.contains("workers has changed; this needs a restart"), "{log}");
}

#[test]
fn it_says_when_it_is_ready_and_leaves_nothing_behind() {
    let setup = Setup::new();
    let notify = setup.dir().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let told = || {
        let mut buf = [0; 64];
        let len = manager.recv(&mut buf).unwrap();
        String::from_utf8_lossy(&buf[..len]).into_owned()
    };
    let daemon = setup.start_with(|command| {
        command.env("NOTIFY_SOCKET", &notify);
    });
    let pid_file = daemon.pid_file();
    assert_eq!(told(), "READY=1\nSTATUS=0 exports, configuration 1");
    let addresses = format!("ready: listening on 127.0.0.1:{}, unix:{}", daemon.port(), daemon.socket().display());
    assert!(daemon.log().contains(&addresses), "{}", daemon.log());
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), format!("{}\n", daemon.pid()));
    let socket = daemon.socket();
    let (_dir, _) = daemon.stop();
    assert_eq!(told(), "STOPPING=1\nSTATUS=finishing what is in flight");
    assert!(!socket.exists() && !pid_file.exists());
}

#[test]
fn an_address_in_use_is_named() {
    let first = Setup::new().start();
    let second = Setup::new();
    let base = second.dir().join("config");
    fs::write(&base, format!("[generic]\nlistenaddr = 127.0.0.1\nport = {}\n", first.port())).unwrap();
    let (code, _, stderr) = cowgate(&["serve", "-c", base.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains(&format!("cannot listen on 127.0.0.1:{}", first.port())), "{stderr}");
    fs::write(&base, format!("[generic]\nunixsock = {}\n", first.socket().display())).unwrap();
    let (code, _, stderr) = cowgate(&["serve", "-c", base.to_str().unwrap()]);
    assert!(code == Some(1) && stderr.contains("another server is listening there"), "{stderr}");
    assert!(first.names().is_empty(), "the first one is not disturbed");
}

#[test]
fn check_prints_every_problem_and_starts_nothing() {
    let setup = Setup::new().generic("certfile = /etc/certificate");
    let base = setup.write_base();
    let check = || cowgate(&["serve", "--check", "-c", base.to_str().unwrap()]);
    let file = setup.dir().join("conf.d/a.conf");
    fs::write(&file, "[a]\nexportname = /a\ntreefiles = true\n[b]\nflush = no\n").unwrap();
    let (code, stdout, _) = check();
    assert_eq!(code, Some(1));
    for part in ["warning: [generic] certfile", "a.conf:3: refused: [a] treefiles", "a.conf:5: error: [b] flush = no"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
    fs::write(&file, "[a]\nexportname = /a\n").unwrap();
    let (code, stdout, _) = check();
    assert_eq!(code, Some(0), "warnings alone are no failure");
    assert!(stdout.contains("complete, 1 exports"), "{stdout}");
    let text = fs::read_to_string(&base).unwrap();
    fs::write(&base, text + "user = no-such-user\n").unwrap();
    let (code, stdout, _) = check();
    assert!(code == Some(1) && stdout.contains("[generic] user = no-such-user: there is no such user"), "{stdout}");
}

#[test]
fn it_does_not_start_with_a_configuration_that_it_cannot_keep() {
    let setup = Setup::new().generic("force_tls = true");
    let (code, _, stderr) = cowgate(&["serve", "-c", setup.write_base().to_str().unwrap()]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("error: [generic] force_tls = true"), "{stderr}");
    let (code, _, stderr) = cowgate(&["serve", "-c", "/nowhere/at/all"]);
    assert!(code == Some(1) && stderr.contains("/nowhere/at/all"), "{stderr}");
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    assert_eq!(cowgate(&["serve", "--serve"]).0, Some(2));
    assert_eq!(cowgate(&["serve", "-c", "x", "--log", "a=b=c"]).0, Some(2));
    assert_eq!(cowgate(&["image", "create", "--size", "1X", "file"]).0, Some(2));
    let (code, stdout, _) = cowgate(&["--version"]);
    assert!(code == Some(0) && stdout.starts_with("cowgate "));
}
