//! SIGHUP: exports come and go while clients stay connected; SIGTERM: nothing is lost.

mod common;

use common::daemon::{Setup, write_export};
use common::qemu;
use std::process::{Command, Stdio};

#[test]
fn clients_stay_while_exports_come_and_go() {
    let setup = Setup::new();
    let (one, two) = (setup.image("one.qcow2", "", "64M"), setup.image("two.qcow2", "", "32M"));
    setup.export("one", &one, "");
    let daemon = setup.start();
    let mut client = Command::new("/usr/bin/python3")
        .args(["-c", STAYING, &daemon.uri("one")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.wait_for("the client", || daemon.log().contains("opened"));
    assert_eq!(daemon.names(), ["one"]);
    daemon.add_export("two", &two, "");
    assert_eq!(daemon.names(), ["one", "two"]);
    qemu::run(Command::new("nbdinfo").arg(daemon.uri("two")));
    std::fs::remove_file(daemon.dir().join("conf.d/one.conf")).unwrap();
    daemon.reload();
    assert_eq!(daemon.names(), ["two"]);
    let gone = qemu::output(Command::new("nbdinfo").arg(daemon.uri("one")));
    assert!(!gone.status.success(), "a removed export takes no new clients");
    for i in 0..20 {
        write_export(daemon.dir(), &format!("more{i}"), &two, "readonly = true");
        daemon.reload();
    }
    drop(client.stdin.take()); // ends its loop
    let out = client.wait_with_output().unwrap();
    assert!(out.status.success(), "the client was disturbed: {}", qemu::text(&out.stdout));
    let (_dir, _) = daemon.stop();
    qemu::check(&one);
}

/// Writes and verifies until its standard input ends.
const STAYING: &str = r#"
import nbd, select, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
i = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    i += 1
    data = bytes([i % 251 + 1]) * 40000
    h.pwrite(data, i % 900 * 70000)
    assert h.pread(40000, i % 900 * 70000) == data
    if i % 50 == 0:
        h.flush()
h.shutdown()
"#;

#[test]
fn a_bad_file_changes_nothing_of_what_it_defined() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("good", &image, "");
    setup.export("other", &image, "");
    let daemon = setup.start();
    std::fs::write(daemon.dir().join("conf.d/good.conf"), "[good]\nexportname = /tmp/x\nreadonly = perhaps\n").unwrap();
    std::fs::remove_file(daemon.dir().join("conf.d/other.conf")).unwrap();
    write_export(daemon.dir(), "new", &image, "");
    daemon.reload();
    assert_eq!(daemon.names(), ["good", "new"]);
    qemu::run(Command::new("nbdinfo").arg(daemon.uri("good")));
    let log = daemon.log();
    let line = log.lines().find(|l| l.contains("readonly") && l.contains("perhaps")).expect("the problem is logged");
    assert!(line.contains("good.conf") && line.contains('3'), "file and line: {line}");
    let _dir = daemon.stop();
}

#[test]
fn no_exports_is_a_normal_state() {
    let daemon = Setup::new().start();
    assert!(daemon.names().is_empty());
    daemon.reload();
    assert!(daemon.names().is_empty());
    let _dir = daemon.stop();
}

#[test]
fn sigterm_finishes_and_flushes() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "512M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    // writes until the daemon closes the connection; prints how many writes were acknowledged
    let client = Command::new("/usr/bin/python3")
        .args(["-c", UNTIL_CLOSED, &daemon.uri("disk")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    daemon.wait_for("some writes", || std::fs::metadata(&image).unwrap().len() > 30 << 20);
    let (_dir, _) = daemon.stop();
    let out = client.wait_with_output().unwrap();
    let acknowledged: usize = qemu::text(&out.stdout).trim().parse().unwrap();
    assert!(acknowledged > 0);
    qemu::check(&image);
    let mut io = Command::new("qemu-io");
    io.args(["-r", "-f", "qcow2"]);
    for i in 0..acknowledged.min(500) {
        io.args(["-c", &format!("read -P {} {} 1M", i % 251 + 1, i << 20)]);
    }
    let said = qemu::run(io.arg(&image));
    assert!(!said.contains("failed"), "{said}");
}

const UNTIL_CLOSED: &str = r#"
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
done = 0
try:
    while done < 500:
        h.pwrite(bytes([done % 251 + 1]) * (1 << 20), done << 20)
        done += 1
except nbd.Error:
    pass
print(done)
"#;
