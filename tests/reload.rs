//! SIGHUP: exports come and go while clients stay connected; SIGTERM: nothing is lost.

mod common;

use common::daemon::{Daemon, Setup, write_export};
use common::nbd::Nbd;
use common::{qemu, root};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

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

#[test]
fn an_export_is_there_as_soon_as_its_file_is() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    let daemon = setup.start();
    // no signal
    for i in 0..20 {
        let name = format!("new{i}");
        write_export(daemon.dir(), &name, &image, "readonly = true");
        Nbd::connect(&daemon.socket()).go(&name).unwrap();
    }
    // half of a file, the rest of which comes while the client waits
    let file = daemon.dir().join("conf.d/late.conf");
    std::fs::write(&file, "[late]\nexportna").unwrap();
    let socket = daemon.socket();
    let client = std::thread::spawn(move || Nbd::connect(&socket).go("late"));
    std::thread::sleep(Duration::from_millis(300));
    write_export(daemon.dir(), "late", &image, "readonly = true");
    client.join().unwrap().unwrap();
    // others are not the client's business: what was changed or removed meanwhile waits for a signal
    std::fs::remove_file(daemon.dir().join("conf.d/new0.conf")).unwrap();
    write_export(daemon.dir(), "new1", Path::new("/nowhere"), "");
    let refused = Nbd::connect(&daemon.socket()).go("nothing").unwrap_err();
    assert!(refused.contains("no export named"), "{refused}");
    Nbd::connect(&daemon.socket()).go("new0").unwrap();
    Nbd::connect(&daemon.socket()).go("new1").unwrap();
    daemon.reload();
    assert!(Nbd::connect(&daemon.socket()).go("new0").is_err());
    assert!(Nbd::connect(&daemon.socket()).go("new1").unwrap_err().contains("/nowhere"));
    let _dir = daemon.stop();
}

#[test]
fn a_missing_export_does_not_cut_a_reload_short() {
    let setup = Setup::new();
    let (small, large) = (setup.image("small.qcow2", "", "1M"), setup.image("large.qcow2", "", "2M"));
    let daemon = setup.start();
    let size = || qemu::run(Command::new("nbdinfo").arg("--size").arg(daemon.uri("disk")));
    for _ in 0..10 {
        write_export(daemon.dir(), "disk", &small, "readonly = true");
        daemon.reload();
        assert_eq!(size().trim(), "1048576");
        // the file changes once more just after the signal, and a client asks for something else meanwhile
        write_export(daemon.dir(), "disk", &large, "readonly = true");
        Nbd::connect(&daemon.socket()).go("nothing").unwrap_err();
        daemon.wait_for("the second change", || size().trim() == "2097152");
    }
    let _dir = daemon.stop();
}

#[test]
fn clients_who_ask_for_nonsense_share_a_look() {
    let daemon = Setup::new().start_with(|command| {
        command.args(["--log", "info,cowgate::daemon=debug"]);
    });
    let asking: Vec<_> = (0..40)
        .map(|_| {
            let socket = daemon.socket();
            std::thread::spawn(move || assert!(Nbd::connect(&socket).go("nonsense").is_err()))
        })
        .collect();
    asking.into_iter().for_each(|thread| thread.join().unwrap());
    let looks = daemon.log().matches("looking for exports that clients miss").count();
    assert!((1..10).contains(&looks), "{looks} looks for 40 clients\n{}", daemon.log());
    let _dir = daemon.stop();
}

#[test]
fn a_removed_export_is_released_when_its_last_client_has_left() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "64M");
    setup.export("disk", &image, "");
    let daemon = setup.start();
    let mut client = writing_client(&daemon, "disk");
    std::fs::remove_file(daemon.dir().join("conf.d/disk.conf")).unwrap();
    daemon.reload();
    assert!(Nbd::connect(&daemon.socket()).go("disk").is_err(), "no new clients");
    let write = ["-f", "qcow2", "-c", "write 60M 1M"];
    let held = qemu::output(Command::new("qemu-io").args(write).arg(&image));
    assert!(!held.status.success(), "the lock is still held");
    assert!(!daemon.log().contains("drained"));
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success(), "the client was served to its end");
    daemon.wait_for("the end of the drain", || {
        daemon.log().contains("drained, ") && daemon.log().contains("is released")
    });
    // from this moment on, without waiting
    qemu::run(Command::new("qemu-io").args(write).arg(&image));
    let said = qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "read -P 7 0 32M"]).arg(&image));
    assert!(!said.contains("failed"), "what was written without a flush is there: {said}");
    let _dir = daemon.stop();
    qemu::check(&image);
}

#[test]
fn a_changed_export_serves_the_old_to_the_old_and_the_new_to_the_new() {
    let setup = Setup::new();
    let (old, new) = (setup.image("old.qcow2", "", "64M"), setup.image("new.qcow2", "", "32M"));
    setup.export("disk", &old, "");
    let daemon = setup.start();
    let mut client = writing_client(&daemon, "disk");
    let size = |daemon: &Daemon| qemu::run(Command::new("nbdinfo").arg("--size").arg(daemon.uri("disk")));
    assert_eq!(size(&daemon).trim(), "67108864");
    // another path: both go on side by side
    daemon.add_export("disk", &new, "");
    assert_eq!(size(&daemon).trim(), "33554432");
    Nbd::connect(&daemon.socket()).go("disk").unwrap();
    // the first path again, with another key: both would write the same image
    daemon.add_export("disk", &old, "detectzeroes = on");
    let refused = Nbd::connect(&daemon.socket()).go("disk").unwrap_err();
    assert!(refused.contains("definition has changed") && refused.contains("1 client"), "{refused}");
    // readers disturb nobody
    daemon.add_export("disk", &old, "readonly = true");
    Nbd::connect(&daemon.socket()).go("disk").unwrap();
    daemon.add_export("disk", &old, "detectzeroes = on");
    assert!(Nbd::connect(&daemon.socket()).go("disk").is_err());
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success());
    daemon.wait_for("the old definition to go", || Nbd::connect(&daemon.socket()).go("disk").is_ok());
    let _dir = daemon.stop();
    qemu::check(&old);
    qemu::check(&new);
}

#[test]
fn maxconnections_counts_the_clients_of_former_definitions() {
    let setup = Setup::new();
    let image = setup.image("disk.qcow2", "", "1M");
    setup.export("disk", &image, "readonly = true\nmaxconnections = 2");
    let daemon = setup.start();
    let connect = || {
        let mut client = Nbd::connect(&daemon.socket());
        client.go("disk").map(|()| client)
    };
    let first = connect().unwrap();
    daemon.add_export("disk", &image, "readonly = true\nmaxconnections = 2\nrotational = true");
    let second = connect().unwrap();
    assert!(connect().err().unwrap().contains("maxconnections"));
    drop(first);
    daemon.wait_for("a place", || connect().is_ok());
    drop(second);
    let _dir = daemon.stop();
}

/// Writes 7 all over the first 32 MiB without a flush, says so, and leaves without a word when its input ends.
fn writing_client(daemon: &Daemon, export: &str) -> Child {
    let program = "import nbd, os, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\n\
                   h.pwrite(bytes([7]) * (32 << 20), 0)\nprint('written', flush=True)\nsys.stdin.read()\n\
                   h.pwrite(bytes([7]) * 4096, 0)\nos._exit(0)\n";
    let mut client = Command::new("/usr/bin/python3")
        .args(["-c", program, &daemon.uri(export)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "written\n");
    client
}

/// The directory of a backup system around us, its files written in pieces over the old ones and followed at once by
/// the signal, five hundred times, with no other waiting than the client's own connection.
#[test]
fn what_a_control_plane_writes_and_signals_is_served_at_once() {
    if !root::available("make a loop device") {
        return;
    }
    let setup = Setup::new();
    let dir = setup.dir().to_owned();
    let device = root::Loop::new(64 << 20);
    let full = setup.image("full.qcow2", "", "64M");
    qemu::run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 1 0 4M"]).arg(&full));
    let overlay = setup.image("incr.qcow2", &format!("backing_file={},backing_fmt=qcow2", full.display()), "64M");
    // the same data under another definition
    symlink(&overlay, dir.join("incr-link.qcow2")).unwrap();
    let daemon = setup.start();
    let program = format!(
        r#"
import nbd, os, signal, struct
conf, pid = {:?}, {}
full, incr, migration = (
    "backup-ctx-pgtest2-disk0-full-20250101T120000", "backup-ctx-pgtest2-disk0-incr-20250102T120000",
    "migration-vm-4c4c4544-0042-3510-8058-b4c04f595831-disk0")

def write(name, path, readonly):
    pieces = ["[%s]\n    exportname = %s\n" % (name, path[:9]), path[9:] + "\n", "    readonly = %s\n" % readonly,
              "    multifile = false\n    copyonwrite = false\n"]
    pieces[0] = pieces[0].rstrip("\n")
    with open("%s/%s.conf" % (conf, name), "w") as f:
        for piece in pieces:
            f.write(piece)
            f.flush()

def connect(name):
    h = nbd.NBD()
    h.connect_uri("nbd://127.0.0.1:%d/%s" % ({}, name))
    return h

write(full, {:?}, "true")
for i in range(500):
    write(incr, ({:?}, {:?})[i % 2], "false")
    os.kill(pid, signal.SIGHUP)
    write(migration, {:?}, "false")
    os.kill(pid, signal.SIGHUP)
    a, b = connect(incr), connect(migration)
    data = struct.pack(">I", i) * 1024
    a.pwrite(data, (i % 1000) * 65536)
    b.pwrite(data, (i % 1000) * 65536)
    assert a.pread(4096, (i % 1000) * 65536) == data and b.pread(4096, (i % 1000) * 65536) == data, i
    assert a.pread(4096, 4096 * 3) == bytes([1]) * 4096, i
    a.shutdown()
    b.shutdown()
    if i % 10 == 0:
        # its file goes and comes
        os.remove("%s/%s.conf" % (conf, migration))
        os.kill(pid, signal.SIGHUP)
"#,
        dir.join("conf.d"),
        daemon.pid(),
        daemon.port(),
        full,
        overlay,
        dir.join("incr-link.qcow2"),
        device.path(),
    );
    qemu::run(Command::new("/usr/bin/python3").args(["-c", &program]));
    let names = daemon.names();
    assert_eq!(names.len(), 3, "{names:?}");
    let (_dir, _) = daemon.stop();
    qemu::check(&overlay);
    let raw = dir.join("incr.raw");
    qemu::qemu_img("convert -f qcow2 -O raw", &[&overlay, &raw]);
    let read = |path: &Path| std::fs::read(path).unwrap();
    let (incr, migration) = (read(&raw), read(&device.file()));
    for i in 0..500_u32 {
        let at = i as usize * 65536;
        assert!(incr[at..at + 4096].chunks(4).all(|word| word == i.to_be_bytes()), "{i}");
        assert!(migration[at..at + 4096].chunks(4).all(|word| word == i.to_be_bytes()), "{i}");
    }
}
