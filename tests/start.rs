//! How the daemon starts and what surrounds it: pid file, background, log file, change of user, service manager.

mod common;

use common::daemon::{Setup, write_export};
use common::{qemu, root};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, chown};
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cowgate");
const PATIENCE: Duration = Duration::from_secs(30);

fn raw_image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn uri(dir: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", dir.join("nbd.sock").display())
}

fn size(dir: &Path, export: &str) -> String {
    qemu::run(Command::new("nbdinfo").arg("--size").arg(uri(dir, export))).trim().to_owned()
}

#[track_caller]
fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `cowgate serve` with the arguments that every test daemon needs.
fn serve(setup: &Setup) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("-C").arg(setup.write_base()).arg("-p").arg(setup.dir().join("pid"));
    command
}

/// A daemon that is nobody's child; killed when dropped.
struct Background(Pid);

impl Background {
    /// The one that has written this pid file.
    fn of(pid_file: &Path) -> Background {
        let text = fs::read_to_string(pid_file).expect("the pid file is there before the caller goes on");
        Background(Pid::from_raw(text.trim().parse().unwrap()))
    }

    fn proc(&self, what: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{what}", self.0))
    }

    /// It may be a zombie for a moment, until whoever adopted it looks.
    fn runs(&self) -> bool {
        fs::read_to_string(self.proc("stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    fn stop(self) {
        kill(self.0, Signal::SIGTERM).unwrap();
        wait_for("the daemon's end", || !self.runs());
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.runs() {
            let _ = kill(self.0, Signal::SIGKILL);
        }
    }
}

#[test]
fn nbd_servers_letters_are_understood() {
    let daemon = Setup::new().start_with(|command| {
        command.arg("-d");
    });
    daemon.stop();
    let missing = Command::new(PROGRAM).args(["serve", "-C", "/nowhere/at/all"]).output().unwrap();
    assert_eq!(missing.status.code(), Some(1));
    assert!(stderr(&missing).contains("/nowhere/at/all: error: the configuration file does not exist"));
    let help = qemu::run(Command::new(PROGRAM).args(["serve", "--help"]));
    assert!(help.contains("[default: /etc/cowgate/config]") && !help.contains("background-child"), "{help}");
}

#[test]
fn a_pid_file_in_use_is_left_alone_and_a_stale_one_replaced() {
    let first = Setup::new().start();
    let second = Setup::new();
    let base = second.write_base();
    let output = Command::new(PROGRAM).arg("serve").arg("-c").arg(&base).arg("-p").arg(first.pid_file()).output();
    let output = output.unwrap();
    let expected = format!("process {} holds it, which is running", first.pid());
    assert!(output.status.code() == Some(1) && stderr(&output).contains(&expected), "{}", stderr(&output));
    assert!(!second.dir().join("nbd.sock").exists(), "what did not start leaves nothing behind");
    assert!(first.names().is_empty());
    assert_eq!(fs::metadata(first.pid_file()).unwrap().mode() & 0o777, 0o644);

    let dir = first.kill();
    let stale = fs::read_to_string(dir.path().join("cowgate.pid")).unwrap();
    let again = Setup::again(dir).start();
    assert_ne!(fs::read_to_string(again.pid_file()).unwrap(), stale);
    let pid_file = again.pid_file();
    let (_dir, _) = again.stop();
    assert!(!pid_file.exists());
}

#[test]
fn the_pid_file_of_a_running_nbd_server_is_not_taken_over() {
    let setup = Setup::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let image = raw_image(setup.dir(), "image");
    let config = setup.dir().join("nbd-server.conf");
    let text = format!("[generic]\nlistenaddr=127.0.0.1\nport={port}\n[a]\nexportname={}\n", image.display());
    fs::write(&config, text).unwrap();
    let pid_file = setup.dir().join("pid");
    let mut nbd_server = Command::new("nbd-server");
    nbd_server.arg("-d").arg("-C").arg(&config).arg("-p").arg(&pid_file).stderr(Stdio::null());
    let mut running = nbd_server.spawn().unwrap();
    // it writes its pid file only when it forks
    fs::write(&pid_file, format!("{}\n", running.id())).unwrap();
    wait_for("nbd-server", || fs::read_to_string(format!("/proc/{}/comm", running.id())).unwrap() == "nbd-server\n");
    let output = serve(&setup).output().unwrap();
    let still = fs::read_to_string(&pid_file).unwrap();
    running.kill().unwrap();
    running.wait().unwrap();
    let expected = format!("it belongs to nbd-server, process {}, which is running", running.id());
    assert!(output.status.code() == Some(1) && stderr(&output).contains(&expected), "{}", stderr(&output));
    assert_eq!(still.trim(), running.id().to_string());
    // it has gone, so now the file is anybody's
    let output = serve(&setup).arg("--daemonize").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    Background::of(&pid_file).stop();
}

#[test]
fn the_default_pid_file_is_nbd_servers() {
    if !root::available("put a tmpfs over /run") {
        return;
    }
    let with_default = |setup: &Setup, run: &mut Command| {
        let log = setup.dir().join("log");
        let child = run.arg(PROGRAM).args(["serve", "-c"]).arg(setup.write_base()).arg("--log-file").arg(&log).spawn();
        wait_for("the daemon", || fs::read_to_string(&log).is_ok_and(|log| log.contains("ready")));
        (child.unwrap(), fs::read_to_string(&log).unwrap())
    };
    let (first, second) = (Setup::new(), Setup::new());
    let script = "mount -t tmpfs tmpfs /run && exec \"$@\"";
    let (mut child, log) = with_default(&first, Command::new("unshare").args(["--mount", "sh", "-c", script, "sh"]));
    let pid_file = PathBuf::from(format!("/proc/{}/root", child.id())).join("run/nbd-server.pid");
    assert_eq!(fs::read_to_string(&pid_file).unwrap().trim(), child.id().to_string(), "{log}");

    // the next one serves too, and says that it has none
    let enter = ["--mount", "--target", &child.id().to_string()].map(str::to_owned);
    let (mut other, log) = with_default(&second, Command::new("nsenter").args(&enter));
    assert!(log.contains("no pid file: cannot write /run/nbd-server.pid: process"), "{log}");
    for daemon in [&mut other, &mut child] {
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
        assert!(daemon.wait().unwrap().success());
    }
}

#[test]
fn no_pid_file_is_written_when_none_is_wanted() {
    let setup = Setup::new();
    let log = setup.dir().join("log");
    let base = setup.write_base();
    let mut command = Command::new(PROGRAM);
    command.args(["serve", "-p", "none", "-c"]).arg(base).arg("--log-file").arg(&log).current_dir(setup.dir());
    let mut daemon = command.spawn().unwrap();
    wait_for("the daemon", || fs::read_to_string(&log).is_ok_and(|log| log.contains("ready")));
    assert!(!setup.dir().join("none").exists());
    kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(!fs::read_to_string(&log).unwrap().contains("WARN"));
}

#[test]
fn in_the_background_it_is_ready_when_the_caller_goes_on() {
    let setup = Setup::new();
    setup.export("a", &raw_image(setup.dir(), "image"), "");
    setup.write_base();
    // everything relative to the caller's directory, and descriptors that the caller forgot about
    let script = "exec 7</etc/passwd 8>leak 9>&1; exec \"$0\" \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, PROGRAM, "serve", "--daemonize", "-C", "cowgate.conf", "-p", "pid"]);
    let output = command.args(["--log-file", "log"]).current_dir(setup.dir()).output().unwrap();
    let log = || fs::read_to_string(setup.dir().join("log")).unwrap();
    assert!(output.status.success() && output.stdout.is_empty() && output.stderr.is_empty(), "{}", stderr(&output));
    let daemon = Background::of(&setup.dir().join("pid"));
    assert_eq!(size(setup.dir(), "a"), "1048576");

    assert_eq!(fs::read_link(daemon.proc("cwd")).unwrap(), Path::new("/"));
    assert_eq!(fs::read_to_string(daemon.proc("comm")).unwrap(), "cowgate\n");
    let stat = fs::read_to_string(daemon.proc("stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let [ppid, group, session, terminal] = [fields[1], fields[2], fields[3], fields[4]];
    let own = daemon.0.to_string();
    assert_eq!((group, session, terminal), (own.as_str(), own.as_str(), "0"), "a session without a terminal");
    assert_ne!(ppid, std::process::id().to_string());
    for entry in fs::read_dir(daemon.proc("fd")).unwrap() {
        let entry = entry.unwrap();
        let number: i32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let target = target.to_string_lossy();
        assert_eq!(target == "/dev/null", number <= 2, "{number} is {target}");
        let of_the_caller = ["passwd", "leak", "pipe:", "/dev/pts", "/dev/tty"].iter().find(|t| target.contains(**t));
        assert_eq!(of_the_caller, None, "{number} is {target}");
    }
    let children = fs::read_to_string(daemon.proc(&format!("task/{own}/children"))).unwrap_or_default();
    assert_eq!(children, "");

    // what control planes do
    write_export(setup.dir(), "b", &raw_image(setup.dir(), "other"), "");
    qemu::run(Command::new("sh").arg("-c").arg("kill -HUP $(cat pid)").current_dir(setup.dir()));
    wait_for("the reload", || log().contains("configuration 2 reloaded: 1 added"));
    assert_eq!(size(setup.dir(), "b"), "1048576");
    daemon.stop();
    assert!(log().contains("stopped") && !setup.dir().join("pid").exists() && !setup.dir().join("nbd.sock").exists());
}

#[test]
fn a_start_in_the_background_that_fails_says_so_to_the_caller() {
    let running = Setup::new().start();
    let setup = Setup::new();
    let base = setup.dir().join("base");
    fs::write(&base, format!("[generic]\nlistenaddr = 127.0.0.1\nport = {}\n", running.port())).unwrap();
    let start = |base: &Path| {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--daemonize", "-C"]).arg(base).arg("-p").arg(setup.dir().join("pid"));
        command.output().unwrap()
    };
    let output = start(&base);
    let expected = format!("cowgate: cannot listen on 127.0.0.1:{}", running.port());
    assert!(output.status.code() == Some(1) && stderr(&output).contains(&expected), "{}", stderr(&output));
    fs::write(&base, "[generic]\nport = x\nworkers = -7\n").unwrap();
    let output = start(&base);
    assert_eq!(output.status.code(), Some(1));
    let all = stderr(&output);
    assert!(all.contains("base:2: error: [generic] port = x") && all.contains("base:3: error"), "{all}");
    assert!(!setup.dir().join("pid").exists());
}

/// A start in the background that cannot go on because nobody reads what it says.
fn stuck_start(setup: &Setup) -> (std::process::Child, Pid, OwnedFd) {
    let noise: String = (0..10_000).map(|i| format!("unknown{i} = 1\n")).collect();
    fs::write(setup.dir().join("conf.d/noise.conf"), format!("[a]\nexportname = /a\n{noise}")).unwrap();
    let mut launcher = serve(setup).arg("--daemonize").stderr(Stdio::piped()).spawn().unwrap();
    let unread = launcher.stderr.take().unwrap().into();
    let children = format!("/proc/{0}/task/{0}/children", launcher.id());
    let mut child = None;
    wait_for("the daemon's process", || {
        child = fs::read_to_string(&children).unwrap().trim().parse().ok().map(Pid::from_raw);
        let blocked = |pid: Pid| fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
        child.is_some_and(|pid| blocked(pid).contains("pipe_write"))
    });
    (launcher, child.unwrap(), unread)
}

#[test]
fn a_daemon_that_is_killed_before_it_is_ready_does_not_keep_the_caller() {
    let setup = Setup::new();
    let (mut launcher, daemon, unread) = stuck_start(&setup);
    kill(daemon, Signal::SIGKILL).unwrap();
    let mut said = Vec::new();
    fs::File::from(unread).read_to_end(&mut said).unwrap();
    assert_eq!(launcher.wait().unwrap().code(), Some(1));
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("ended by signal 9 before it was ready"), "{}", &said[said.len().saturating_sub(500)..]);
}

#[test]
fn a_daemon_whose_caller_has_gone_before_it_is_ready_ends() {
    let setup = Setup::new();
    let (mut launcher, daemon, unread) = stuck_start(&setup);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    drop(unread);
    let daemon = Background(daemon);
    wait_for("the daemon's end", || !daemon.runs());
    assert!(!setup.dir().join("pid").exists() && !setup.dir().join("nbd.sock").exists());
}

#[test]
fn a_log_file_can_be_rotated() {
    let setup = Setup::new();
    let log = setup.dir().join("log");
    let mut daemon = serve(&setup).arg("--log-file").arg(&log).stderr(Stdio::null()).spawn().unwrap();
    let pid = Pid::from_raw(daemon.id() as i32);
    let has = |file: &Path, text: &str| fs::read_to_string(file).is_ok_and(|log| log.contains(text));
    wait_for("the daemon", || has(&log, "ready: listening on"));
    for (signal, file) in [(Signal::SIGUSR1, "log.1"), (Signal::SIGHUP, "log.2")] {
        let rotated = setup.dir().join(file);
        fs::rename(&log, &rotated).unwrap();
        kill(pid, signal).unwrap();
        wait_for("a new log file", || log.exists());
        kill(pid, Signal::SIGHUP).unwrap();
        wait_for("the next line", || has(&log, "reloaded"));
        assert!(!fs::read_to_string(&log).unwrap().contains("ready"));
    }
    kill(pid, Signal::SIGTERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(has(&log, "stopped") && has(&setup.dir().join("log.1"), "ready"));
}

/// Uid, Gid and Groups of every thread.
fn identities(pid: u32) -> Vec<[String; 3]> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.map(|t| fs::read_to_string(t.unwrap().path().join("status")).unwrap());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    status.map(|s| ["Uid:", "Gid:", "Groups:"].map(|name| field(&s, name))).collect()
}

#[test]
fn it_becomes_the_user_and_group_of_the_configuration() {
    if !root::available("become another user") {
        return;
    }
    let nobody = User::from_name("nobody").unwrap().unwrap();
    let group = nix::unistd::Group::from_name("daemon").unwrap().unwrap();
    let setup = Setup::new().generic("user = nobody\ngroup = daemon\nworkers = 3");
    // sticky, as /tmp: only owners remove their files
    mode(setup.dir(), 0o1777);
    let secret = raw_image(setup.dir(), "secret");
    mode(&secret, 0o600);
    let theirs = setup.image("theirs.qcow2", "", "1M");
    chown(&theirs, Some(nobody.uid), None).unwrap();
    setup.export("secret", &secret, "");
    setup.export("theirs", &theirs, "");
    let daemon = setup.start();
    let (uid, gid) = (nobody.uid.as_raw(), group.gid.as_raw());
    let expected = [format!("{uid} {uid} {uid} {uid}"), format!("{gid} {gid} {gid} {gid}"), gid.to_string()];
    let threads = identities(daemon.pid());
    assert!(threads.len() >= 4 && threads.iter().all(|t| *t == expected), "{threads:?}");
    let caps = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    assert!(caps.contains("CapEff:\t0000000000000000") && caps.contains("CapPrm:\t0000000000000000"), "{caps}");

    let written = "buf = bytearray(b'x' * 65536)\nh.pwrite(buf, 0)\nh.flush()\nassert h.pread(65536, 0) == buf";
    daemon.python("theirs", written);
    let refused = Command::new("nbdinfo").arg(daemon.uri("secret")).output().unwrap();
    assert!(!refused.status.success());
    let said = || daemon.log().contains("secret") && daemon.log().contains("Permission denied");
    daemon.wait_for("the reason of the refusal", said);

    // a file that it cannot read is a bad file: what it defined stays
    let file = daemon.dir().join("conf.d/theirs.conf");
    fs::write(&file, "[other]\nexportname = /other\n").unwrap();
    mode(&file, 0o600);
    daemon.reload();
    assert!(daemon.log().contains("theirs.conf: error: cannot be read: Permission denied"), "{}", daemon.log());
    assert_eq!(size(daemon.dir(), "theirs"), "1048576");
    mode(&daemon.dir().join("cowgate.conf"), 0o600);
    daemon.reload();
    assert!(daemon.log().contains("configuration 3 not reloaded"), "{}", daemon.log());
    assert_eq!(size(daemon.dir(), "theirs"), "1048576");

    // the pid file stays root's: whom it names, root signals
    let (socket, pid_file) = (daemon.socket(), daemon.pid_file());
    assert_eq!((fs::metadata(&socket).unwrap().uid(), fs::metadata(&pid_file).unwrap().uid()), (uid, 0));
    let (dir, _) = daemon.stop();
    assert!(!socket.exists(), "its owner may remove it");
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), "", "only root may remove it, and it names nobody any more");

    // and where it may not remove its socket either, the next one does
    mode(dir.path(), 0o755);
    let again = Setup::again(dir).generic("user = nobody").start();
    let own_group = nobody.gid.as_raw();
    let threads = identities(again.pid());
    assert!(threads.iter().all(|t| t[1] == format!("{own_group} {own_group} {own_group} {own_group}")), "{threads:?}");
    let (dir, _) = again.stop();
    assert!(dir.path().join("nbd.sock").exists());
    Setup::again(dir).start().stop();
}

#[test]
fn a_user_that_it_cannot_become_stops_the_start() {
    if !root::available("start as another user") {
        return;
    }
    let refused = |lines: &str, expected: &str| {
        let setup = Setup::new().generic(lines);
        let output = serve(&setup).output().unwrap();
        assert!(output.status.code() == Some(1) && stderr(&output).contains(expected), "{}", stderr(&output));
        assert!(!setup.dir().join("pid").exists() && !setup.dir().join("nbd.sock").exists());
    };
    refused("user = no-such-user", "[generic] user = no-such-user: there is no such user");
    refused("group = no-such-group", "[generic] group = no-such-group: there is no such group");
    refused("user =", "[generic] user = : this is no name");

    // without root: the user that it is already, and no other
    let as_nobody = |lines: &str| {
        let setup = Setup::new().generic(lines);
        mode(setup.dir(), 0o777);
        // the program may be where others cannot look
        let program = setup.dir().join("cowgate");
        fs::copy(PROGRAM, &program).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]).arg(program);
        command.args(["serve", "--daemonize", "-c"]).arg(setup.write_base()).arg("-p").arg(setup.dir().join("pid"));
        (command.output().unwrap(), setup)
    };
    let (output, _) = as_nobody("user = root");
    let expected = "[generic] user = root: only root can change to it";
    assert!(output.status.code() == Some(1) && stderr(&output).contains(expected), "{}", stderr(&output));
    let (output, setup) = as_nobody("user = nobody\ngroup = nogroup");
    assert!(output.status.success(), "{}", stderr(&output));
    Background::of(&setup.dir().join("pid")).stop();
}

/// A service manager's socket.
struct Manager(UnixDatagram);

impl Manager {
    fn new(path: &Path) -> Manager {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Manager(socket)
    }

    /// The next message that is no ping, and how many pings came before it.
    fn told(&self) -> (usize, Vec<String>) {
        let mut pings = 0;
        loop {
            let mut buf = [0; 1024];
            let len = self.0.recv(&mut buf).unwrap();
            let message = String::from_utf8(buf[..len].to_vec()).unwrap();
            if message != "WATCHDOG=1" {
                return (pings, message.lines().map(str::to_owned).collect());
            }
            pings += 1;
        }
    }
}

fn monotonic_usec() -> i64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).unwrap();
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000
}

#[test]
fn the_service_manager_is_told_of_every_step() {
    let setup = Setup::new();
    let image = raw_image(setup.dir(), "image");
    setup.export("a", &image, "");
    let path = setup.dir().join("notify");
    let manager = Manager::new(&path);
    let daemon = setup.start_with(|command| {
        command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "100000").env_remove("WATCHDOG_PID");
    });
    assert_eq!(manager.told().1, ["READY=1", "STATUS=1 exports, configuration 1"]);
    let reload = |outcome: &str| {
        let before = monotonic_usec();
        daemon.reload();
        let (_, begun) = manager.told();
        assert_eq!(begun[0], "RELOADING=1");
        let usec: i64 = begun[1].strip_prefix("MONOTONIC_USEC=").unwrap().parse().unwrap();
        assert!((before..=monotonic_usec()).contains(&usec));
        assert_eq!(manager.told().1, ["READY=1", &format!("STATUS={outcome}")]);
    };
    write_export(daemon.dir(), "b", &image, "");
    reload("2 exports, configuration 2");
    let base = daemon.dir().join("cowgate.conf");
    let good = fs::read_to_string(&base).unwrap();
    fs::write(&base, "[generic]\nport = x\n").unwrap();
    reload("2 exports; configuration 3 has errors, see the log");
    fs::write(&base, good).unwrap();
    reload("2 exports, configuration 4");
    // not for long: ten messages fill the socket's queue while nobody reads, and the last one would be lost
    std::thread::sleep(Duration::from_millis(250));
    daemon.stop();
    let (pings, last) = manager.told();
    assert_eq!(last[0], "STOPPING=1");
    assert!(pings >= 2, "{pings} pings in 250 ms that should have one every 50");
}

#[test]
fn the_service_manager_learns_which_process_counts() {
    let setup = Setup::new();
    let path = setup.dir().join("notify");
    let manager = Manager::new(&path);
    let output = serve(&setup).arg("--daemonize").env("NOTIFY_SOCKET", &path).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("nothing will be logged from here on"));
    let daemon = Background::of(&setup.dir().join("pid"));
    assert_eq!(manager.told().1[2], format!("MAINPID={}", daemon.0));
    daemon.stop();
}

#[test]
fn the_unit_files_are_valid() {
    let found = Command::new("systemd-analyze").arg("--version").output();
    if !found.is_ok_and(|output| output.status.success()) {
        println!("skipped: there is no systemd-analyze here");
        return;
    }
    let units = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/systemd");
    let dir = tempfile::tempdir().unwrap();
    for name in ["cowgate.service", "cowgate-forking.service"] {
        let text = fs::read_to_string(units.join(name)).unwrap();
        assert!(text.contains("ExecStart=/usr/local/sbin/cowgate serve"), "{name}");
        // it wants to see the program
        let unit = dir.path().join(name);
        fs::write(&unit, text.replace("/usr/local/sbin/cowgate", PROGRAM)).unwrap();
        let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
        let complaints: Vec<String> = stderr(&output).lines().filter(|l| l.contains(name)).map(str::to_owned).collect();
        assert!(output.status.success() && complaints.is_empty(), "{}", stderr(&output));
    }
}
