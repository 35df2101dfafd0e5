//! Backup jobs in two calls: `cowgate backup begin` and `cowgate backup end`, with a real daemon and real clients, and
//! everybody killed at any moment.

mod common;

use common::daemon::{Daemon, Setup};
use common::qemu;
use common::root::{self, Mount};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const AGENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/capture_agent.py");
const SIZE: u64 = 48 << 20;

fn command(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    command.args(arguments).env("COWGATE_CONTROL", daemon.control());
    command
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

#[track_caller]
fn done(daemon: &Daemon, arguments: &[&str]) -> Value {
    let output = qemu::output(&mut command(daemon, arguments));
    assert!(output.status.success(), "{arguments:?}: {}", qemu::text(&output.stderr));
    json(&output)
}

/// Waits until the image of an export is flushed and closed, because its writers have left. Not for a line of the log: who
/// looked whether the export is connectable was a writer too, and may be the one that such a line is about.
#[track_caller]
fn closed(daemon: &Daemon, name: &str) {
    let open = || done(daemon, &["export", "show", name, "--json"])["current"]["open"].clone();
    daemon.wait_for("the flush", || open() == false);
}

#[track_caller]
fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    let output = qemu::output(&mut command(daemon, arguments));
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
    qemu::text(&output.stderr)
}

/// A path in the daemon's directory, which lives as long as the test program.
fn path(daemon: &Daemon, name: &str) -> &'static str {
    Box::leak(daemon.dir().join(name).into_os_string().into_string().unwrap().into_boxed_str())
}

/// Arguments of a full backup.
fn full<'a>(image: &'a str, context: &'a str) -> Vec<&'a str> {
    vec!["backup", "begin", "--image", image, "--size", "48M", "--vm-context", context, "--disk", "0"]
}

/// Arguments of an incremental one.
fn incremental<'a>(image: &'a str, parent: &'a str, context: &'a str) -> Vec<&'a str> {
    vec!["backup", "begin", "--image", image, "--parent", parent, "--vm-context", context, "--disk", "0"]
}

fn agent(args: &[&str]) {
    qemu::run(Command::new("/usr/bin/python3").arg(AGENT).args(args));
}

/// A client with two read-write connections.
struct Holder(Child);

impl Holder {
    fn connect(uri: &str) -> Holder {
        let agent = Command::new("/usr/bin/python3")
            .args([AGENT, "hold", uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut holder = Holder(agent.unwrap());
        assert_eq!(holder.line(), "connected");
        holder
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    /// Reads once more and leaves.
    fn leave(mut self) -> String {
        writeln!(self.0.stdin.as_mut().unwrap()).unwrap();
        let line = self.line();
        self.0.wait().unwrap();
        line
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What is in a directory, sorted.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

/// The files of exports. One that a killed daemon had not completed is none: it is never read, and the next one takes its place.
fn exports(daemon: &Daemon) -> Vec<String> {
    let mut names = names(&daemon.dir().join("conf.d"));
    names.retain(|name| name != cowgate::export::store::NEW);
    names
}

/// Everything but configuration, sockets and sources.
fn images(daemon: &Daemon) -> Vec<String> {
    let mut names = names(daemon.dir());
    names.retain(|n| n.contains("qcow2"));
    names
}

/// A disk that differs from seed to seed, with zeroes.
fn disk(path: &Path, seed: u8) {
    let mut bytes = vec![0_u8; SIZE as usize];
    for (index, block) in bytes.chunks_mut(192 << 10).enumerate() {
        if index % 3 != 0 {
            block.fill((index as u8) ^ if index % 16 == 1 { seed } else { 0 } | 1);
        }
    }
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_full_and_an_incremental_job() {
    let daemon = Setup::new().start();
    let [full_image, overlay] = ["full.qcow2", "incr.qcow2"].map(|n| path(&daemon, n));
    let [source, before] = ["source.raw", "before.raw"].map(|n| path(&daemon, n));
    disk(Path::new(source), 0);
    fs::copy(source, before).unwrap();

    let begun = done(&daemon, &full(full_image, "vm-1"));
    let name = begun["name"].as_str().unwrap();
    assert!(name.starts_with("backup-vm-1-disk0-full-"), "{begun}");
    assert_eq!((begun["image"].as_str(), begun["size"].as_u64()), (Some(full_image), Some(SIZE)));
    assert_eq!(begun["uri"].as_str(), Some(daemon.tcp(name).as_str()));
    assert_eq!(done(&daemon, &full(full_image, "vm-1")), begun, "the same job");
    agent(&["full", begun["uri"].as_str().unwrap(), source]);
    assert_eq!(done(&daemon, &full(full_image, "vm-1")), begun, "the same job, which has data by now");
    let ended = done(&daemon, &["backup", "end", name]);
    assert_eq!((ended["state"].as_str(), ended["check"]["result"].as_str()), (Some("ended"), Some("clean")), "{ended}");
    assert_eq!(ended["virtual_size"].as_u64(), Some(SIZE));
    assert!(ended["bytes_written"].as_u64().is_some_and(|n| n > SIZE / 2), "{ended}");
    assert!(ended["allocated_size"].as_u64().is_some_and(|n| n > SIZE / 2), "{ended}");
    qemu::same_content(Path::new(full_image), Path::new(source));
    assert_eq!(done(&daemon, &["backup", "end", name])["state"].as_str(), Some("absent"));
    let message = refused(&daemon, &full(full_image, "vm-1"));
    assert!(message.contains(full_image) && message.contains("holds data"), "{message}");

    disk(Path::new(source), 9);
    let arguments = incremental(overlay, full_image, "vm-1");
    let begun = done(&daemon, &[&arguments[..], &["--time", "@1700000000", "--export", "maxconnections=4"]].concat());
    let name = begun["name"].as_str().unwrap();
    assert_eq!(name, "backup-vm-1-disk0-incr-20231114T221320");
    assert_eq!((begun["parent"].as_str(), begun["size"].as_u64()), (Some(full_image), Some(SIZE)));
    let unix = begun["uris"][1].as_str().unwrap();
    agent(&["incremental", unix, source, before]);
    let ended = done(&daemon, &["backup", "end", name]);
    assert_eq!(ended["state"].as_str(), Some("ended"));
    assert_eq!(exports(&daemon), [] as [&str; 0]);
    let info: Value = serde_json::from_str(&qemu::qemu_img("info --output=json", &[Path::new(overlay)])).unwrap();
    assert_eq!(
        (info["backing-filename"].as_str(), info["backing-filename-format"].as_str()),
        (Some(full_image), Some("qcow2"))
    );
    let (_dir, _) = daemon.stop();
    for image in [full_image, overlay] {
        qemu::check(Path::new(image));
    }
    qemu::same_content(Path::new(full_image), Path::new(before));
    qemu::same_content(Path::new(overlay), Path::new(source));
    assert!(fs::metadata(overlay).unwrap().len() < SIZE / 2, "it holds more than the changes");
}

#[test]
fn another_job_or_file_is_never_taken_over() {
    let daemon = Setup::new().start();
    let image = path(&daemon, "a.qcow2");
    let begun = done(&daemon, &[&full(image, "vm")[..], &["--time", "20250101T000000"]].concat());
    let name = begun["name"].as_str().unwrap();
    assert_eq!(done(&daemon, &full(image, "vm")), begun, "its own time is as good as any");
    for (wrong, word) in [
        (full(image, "other"), name),
        ([&full(image, "vm")[..], &["--time", "20250101T000001"]].concat(), name),
        ([&full(image, "vm")[..], &["--type", "incr"]].concat(), name),
        ([&full(image, "vm")[..], &["--export", "maxconnections=9"]].concat(), "defined otherwise"),
        (vec!["backup", "begin", "--image", image, "--size", "1G", "--vm-context", "vm", "--disk", "0"], "1073741824"),
        (vec!["backup", "begin", "--image", image, "--size", "48M", "--vm-context", "vm", "--disk", "1"], name),
    ] {
        let message = refused(&daemon, &wrong);
        assert!(message.contains(word), "{wrong:?}: {message}");
    }
    // what is no image, or somebody's
    let other = path(&daemon, "b.qcow2");
    fs::write(other, "precious").unwrap();
    let message = refused(&daemon, &full(other, "vm"));
    assert!(message.contains(other) && message.contains("another file"), "{message}");
    assert_eq!(fs::read(other).unwrap(), b"precious");
    fs::remove_file(other).unwrap();
    std::os::unix::fs::symlink(image, other).unwrap();
    assert!(refused(&daemon, &full(other, "vm")).contains("symbolic link"));
    for bad in ["--export=format=raw", "--export=nonsense=1", "--export=maxconnections=x"] {
        let third = path(&daemon, "c.qcow2");
        refused(&daemon, &[&full(third, "vm2")[..], &[bad]].concat());
        assert!(!Path::new(third).exists());
    }
    assert_eq!(exports(&daemon), [format!("{name}.conf")]);
    assert_eq!(done(&daemon, &["backup", "end", name])["state"].as_str(), Some("ended"));
    assert_eq!(images(&daemon), ["a.qcow2", "b.qcow2"]);
}

#[test]
fn wrong_parents_leave_nothing_behind() {
    let daemon = Setup::new().start();
    let elsewhere = tempfile::tempdir().unwrap();
    let overlay = path(&daemon, "overlay.qcow2");
    let raw = path(&daemon, "raw.img");
    fs::write(raw, vec![7; 1 << 20]).unwrap();
    let outside = elsewhere.path().join("outside.qcow2");
    qemu::qemu_img("create -q -f qcow2", &[&outside, Path::new("1M")]);
    let broken = path(&daemon, "broken.qcow2");
    qemu::qemu_img(
        &format!("create -q -u -f qcow2 -F qcow2 -b {}/gone.qcow2", daemon.dir().display()),
        &[Path::new(broken), Path::new("1M")],
    );
    for (parent, word) in [
        (path(&daemon, "missing.qcow2"), "No such file"),
        (raw, "--parent"),
        (outside.to_str().unwrap(), "imageroots"),
        (broken, "gone.qcow2"),
        (daemon.dir().to_str().unwrap(), "directory"),
    ] {
        let message = refused(&daemon, &incremental(overlay, parent, "vm"));
        assert!(message.contains(word), "{parent}: {message}");
        assert_eq!((Path::new(overlay).exists(), exports(&daemon).len()), (false, 0), "{parent}");
    }
    let parent = path(&daemon, "parent.qcow2");
    let begun = done(&daemon, &full(parent, "vm"));
    let holder = Holder::connect(begun["uri"].as_str().unwrap());
    let message = refused(&daemon, &incremental(overlay, parent, "vm"));
    assert!(message.contains(parent), "{message}");
    assert!(!Path::new(overlay).exists() && exports(&daemon).len() == 1);
    assert_eq!(holder.leave(), "still connected");
    done(&daemon, &["backup", "end", begun["name"].as_str().unwrap()]);
    let begun = done(&daemon, &incremental(overlay, parent, "vm"));
    // not even a daemon that is not there
    let dir = daemon.kill();
    let mut lost = Command::new(env!("CARGO_BIN_EXE_cowgate"));
    let lost = qemu::output(
        lost.args(full(&format!("{}/d.qcow2", dir.path().display()), "vm"))
            .arg("--control")
            .arg(dir.path().join("control.sock")),
    );
    assert!(qemu::text(&lost.stderr).contains("no daemon listens"), "{lost:?}");
    assert!(!dir.path().join("d.qcow2").exists());
    drop(begun);
}

#[test]
fn a_full_disk_keeps_nothing_of_a_job() {
    if !root::available("mount a small file system") {
        return;
    }
    let (daemon, mount) = (Setup::new().start(), Mount::tmpfs(2));
    let image = mount.path().join("a.qcow2");
    let image = image.to_str().unwrap();
    let ballast = mount.path().join("ballast");
    // as much as there is room for
    let _ = fs::write(&ballast, vec![1; 4 << 20]);
    let message = refused(&daemon, &full(image, "vm"));
    assert!(message.contains(image) && message.contains("No space"), "{message}");
    assert_eq!((names(&mount.path()), exports(&daemon).len()), (vec!["ballast".to_owned()], 0));
    fs::remove_file(&ballast).unwrap();
    let begun = done(&daemon, &full(image, "vm"));
    assert_eq!(done(&daemon, &["backup", "end", begun["name"].as_str().unwrap()])["state"].as_str(), Some("ended"));
}

#[test]
fn an_end_waits_for_clients_gives_up_in_time_or_sends_them_away() {
    let daemon = Setup::new().start();
    let image = path(&daemon, "a.qcow2");
    let begun = done(&daemon, &full(image, "vm"));
    let (name, uri) = (begun["name"].as_str().unwrap(), begun["uri"].as_str().unwrap());
    let file = format!("{name}.conf");

    let holder = Holder::connect(uri);
    let busy = qemu::output(&mut command(&daemon, &["backup", "end", name, "--timeout", "1"]));
    assert_eq!((busy.status.code(), json(&busy)["state"].as_str()), (Some(1), Some("busy")), "{busy:?}");
    assert_eq!(json(&busy)["clients"].as_u64(), Some(2));
    assert_eq!(exports(&daemon), [file.as_str()], "nothing has changed");
    let second = Holder::connect(uri);
    assert_eq!((second.leave().as_str(), holder.leave().as_str()), ("still connected", "still connected"));

    let holder = Holder::connect(uri);
    let waiting = command(&daemon, &["backup", "end", name]).stdout(Stdio::piped()).spawn().unwrap();
    daemon.wait_for("the record", || exports(&daemon) == [format!("{file}.ending")]);
    let message = refused(&daemon, &full(image, "vm"));
    assert!(message.contains("being ended") && message.contains(name), "{message}");
    let late = qemu::output(Command::new("nbdinfo").arg(uri));
    assert!(!late.status.success(), "no new clients");
    assert_eq!(holder.leave(), "still connected");
    let ended = waiting.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), json(&ended)["state"].as_str()), (Some(0), Some("ended")), "{ended:?}");
    assert_eq!(exports(&daemon), [] as [&str; 0]);

    let begun = done(&daemon, &full(image, "vm"));
    let holder = Holder::connect(begun["uri"].as_str().unwrap());
    let ended = done(&daemon, &["backup", "end", begun["name"].as_str().unwrap(), "--force", "--timeout", "60"]);
    assert_eq!(ended["state"].as_str(), Some("ended"));
    assert_eq!(holder.leave(), "", "it was sent away");
}

#[test]
fn a_damaged_image_keeps_its_record() {
    let daemon = Setup::new().start();
    let image = path(&daemon, "a.qcow2");
    let begun = done(&daemon, &full(image, "vm"));
    let name = begun["name"].as_str().unwrap();
    daemon.python(name, "h.pwrite(b'x' * 65536, 0)\nh.shutdown()");
    closed(&daemon, name);
    let whole = fs::read(image).unwrap();
    // the refcount table leads nowhere
    let mut bytes = whole.clone();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    bytes[table..table + 8].copy_from_slice(&(1_u64 << 40).to_be_bytes());
    fs::write(image, bytes).unwrap();
    for _ in 0..2 {
        let ended = qemu::output(&mut command(&daemon, &["backup", "end", name]));
        assert_eq!((ended.status.code(), json(&ended)["state"].as_str()), (Some(2), Some("damaged")), "{ended:?}");
        let message = qemu::text(&ended.stderr);
        assert!(message.contains("--repair") && message.contains(".ending"), "{message}");
        assert_eq!(exports(&daemon), [format!("{name}.conf.ending")]);
    }
    fs::write(image, whole).unwrap();
    assert_eq!(done(&daemon, &["backup", "end", name])["check"]["result"].as_str(), Some("clean"));
    assert_eq!(exports(&daemon), [] as [&str; 0]);
}

/// Starts a command and kills it after `delay`. Whether it had ended before.
fn cut_short(mut command: Command, delay: Duration) -> bool {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap().success()
}

/// Kills a job's commands later and later, until three in a row were too fast for that.
fn later_and_later(mut step: impl FnMut(usize, Duration) -> bool) {
    let mut finished = 0;
    for round in 0.. {
        finished = if step(round, Duration::from_micros(75 * (round * round) as u64)) { finished + 1 } else { 0 };
        if finished == 3 || round == 60 {
            assert!(round > 3, "nothing was killed");
            return;
        }
    }
}

#[test]
fn a_begin_that_is_killed_is_repeated() {
    let daemon = Setup::new().start();
    later_and_later(|round, delay| {
        let image = path(&daemon, &format!("{round}.qcow2"));
        let arguments = full(image, "vm");
        let finished = cut_short(command(&daemon, &arguments), delay);
        let begun = done(&daemon, &arguments);
        let name = begun["name"].as_str().unwrap();
        assert_eq!(done(&daemon, &arguments), begun);
        assert_eq!(exports(&daemon), [format!("{name}.conf")], "after {delay:?}");
        assert_eq!(images(&daemon), [format!("{round}.qcow2")], "after {delay:?}");
        qemu::check(Path::new(image));
        done(&daemon, &["backup", "end", name]);
        fs::remove_file(image).unwrap();
        finished
    });
}

#[test]
fn an_end_that_is_killed_is_repeated() {
    let daemon = Setup::new().start();
    later_and_later(|round, delay| {
        let image = path(&daemon, &format!("{round}.qcow2"));
        let begun = done(&daemon, &full(image, "vm"));
        let name = begun["name"].as_str().unwrap();
        daemon.python(name, "h.pwrite(b'x' * 65536, 4096)");
        let finished = cut_short(command(&daemon, &["backup", "end", name]), delay);
        let ended = done(&daemon, &["backup", "end", name]);
        let state = ended["state"].as_str().unwrap();
        assert!(state == "ended" || state == "absent", "{ended}");
        assert_eq!(exports(&daemon), [] as [&str; 0], "after {delay:?}");
        assert_eq!(images(&daemon), [format!("{round}.qcow2")], "after {delay:?}");
        qemu::check(Path::new(image));
        fs::remove_file(image).unwrap();
        finished
    });
}

#[test]
fn an_export_add_that_is_killed_is_repeated() {
    let daemon = Setup::new().start();
    let image = daemon.dir().join("a.qcow2");
    qemu::qemu_img("create -q -f qcow2", &[&image, Path::new("1M")]);
    let image = image.to_str().unwrap();
    later_and_later(|round, delay| {
        let name = format!("disk{round}");
        let arguments = ["export", "add", "--json", &name, image];
        let finished = cut_short(command(&daemon, &arguments), delay);
        let added = done(&daemon, &arguments);
        assert_eq!(added["export"]["name"].as_str(), Some(name.as_str()));
        assert_eq!(exports(&daemon), [format!("{name}.conf")], "after {delay:?}");
        let finished_too = cut_short(command(&daemon, &["export", "remove", "--json", &name]), delay);
        qemu::output(&mut command(&daemon, &["export", "remove", &name]));
        assert_eq!(exports(&daemon), [] as [&str; 0], "after {delay:?}");
        finished && finished_too
    });
}

#[test]
fn a_daemon_that_is_killed_between_begin_and_end_and_while_it_ends() {
    let daemon = Setup::new().start();
    let [image, source] = ["a.qcow2", "source.raw"].map(|n| path(&daemon, n));
    disk(Path::new(source), 1);
    let begun = done(&daemon, &full(image, "vm"));
    let name = begun["name"].as_str().unwrap();
    let daemon = Setup::again(daemon.kill()).start();
    let again = done(&daemon, &full(image, "vm"));
    assert_eq!(again["name"], begun["name"]);
    agent(&["full", again["uri"].as_str().unwrap(), source]);
    closed(&daemon, name);

    let holder = Holder::connect(again["uri"].as_str().unwrap());
    let ending = command(&daemon, &["backup", "end", name]).stderr(Stdio::piped()).spawn().unwrap();
    daemon.wait_for("the record", || exports(&daemon) == [format!("{name}.conf.ending")]);
    let dir = daemon.kill();
    let lost = ending.wait_with_output().unwrap();
    // it may have found that nobody serves the image any more, and gone on alone: but its configuration is another
    assert!(!lost.status.success(), "{lost:?}");
    drop(holder);
    let daemon = Setup::again(dir).start();
    assert_eq!(daemon.names(), [] as [&str; 0], "it stays ended");
    let ended = done(&daemon, &["backup", "end", name]);
    assert_eq!((ended["state"].as_str(), ended["check"]["result"].as_str()), (Some("ended"), Some("clean")), "{ended}");
    qemu::check(Path::new(image));
    qemu::same_content(Path::new(image), Path::new(source));

    // and without a daemon
    let second = path(&daemon, "b.qcow2");
    let begun = done(&daemon, &full(second, "vm"));
    let name = begun["name"].as_str().unwrap();
    let write = "for i in range(64):\n  h.pwrite(b'x' * 65536, i << 18)\nh.flush()\n";
    daemon.python(name, write);
    let dir = daemon.kill();
    let (control, base) = (dir.path().join("control.sock"), dir.path().join("cowgate.conf"));
    let end = |base: &Path| {
        let mut end = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        qemu::output(end.args(["backup", "end", name, "--control"]).arg(&control).arg("--config").arg(base))
    };
    let lost = end(Path::new("/nowhere/config"));
    assert!(!lost.status.success() && qemu::text(&lost.stderr).contains("--config"), "{lost:?}");
    let ended = end(&base);
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(json(&ended)["state"].as_str(), Some("ended"));
    assert_eq!(json(&end(&base))["state"].as_str(), Some("absent"));
    qemu::check(Path::new(second));
    assert_eq!(names(&dir.path().join("conf.d")), [] as [&str; 0]);
}

/// A kill of the daemon at any moment of a job: what was told is there, and the job goes on.
#[test]
fn a_daemon_that_is_killed_at_any_moment_of_begin_and_end() {
    let mut dir = Setup::new().start().kill();
    for round in 0..8_u64 {
        let daemon = Setup::again(dir).start();
        let image: PathBuf = daemon.dir().join(format!("{round}.qcow2"));
        let arguments = full(image.to_str().unwrap(), "vm");
        let mut begin = command(&daemon, &arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(2 * round));
        let daemon = Setup::again(daemon.kill()).start();
        begin.wait().unwrap();
        let begun = done(&daemon, &arguments);
        let name = begun["name"].as_str().unwrap().to_owned();
        daemon.python(&name, "h.pwrite(b'y' * 300000, 512)\nh.flush()");
        let mut end =
            command(&daemon, &["backup", "end", &name]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(2 * round));
        let daemon = Setup::again(daemon.kill()).start();
        end.wait().unwrap();
        let ended = done(&daemon, &["backup", "end", &name]);
        let state = ended["state"].as_str().unwrap();
        assert!(state == "ended" || state == "absent", "{ended}");
        assert_eq!(exports(&daemon), [] as [&str; 0]);
        qemu::check(&image);
        dir = daemon.kill();
    }
    assert_eq!(names(dir.path()).iter().filter(|n| n.contains("qcow2")).count(), 8);
}

#[test]
fn callers_at_once() {
    let daemon = Setup::new().start();
    let image = path(&daemon, "a.qcow2");
    let same: Vec<Child> = (0..6)
        .map(|_| command(&daemon, &full(image, "vm")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
        .collect();
    let answers: Vec<Value> = same
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{output:?}");
            json(&output)
        })
        .collect();
    assert!(answers.iter().all(|a| *a == answers[0]), "{answers:?}");
    let others: Vec<Child> = (0..6)
        .map(|i| {
            let image = path(&daemon, &format!("other{i}.qcow2"));
            let context = ["a", "b", "c", "d", "e", "f"][i];
            command(&daemon, &full(image, context)).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in others {
        assert!(child.wait_with_output().unwrap().status.success());
    }
    assert_eq!((exports(&daemon).len(), images(&daemon).len()), (7, 7));
    let name = answers[0]["name"].as_str().unwrap();
    let ends: Vec<Child> = (0..4)
        .map(|_| {
            command(&daemon, &["backup", "end", name]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for child in ends {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert_eq!((exports(&daemon).len(), images(&daemon).len()), (6, 7));
}
