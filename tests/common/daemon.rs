//! The real daemon in a directory of its own.

use super::qemu;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long anything the daemon does may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon; killed when dropped.
pub struct Daemon {
    dir: Arc<TempDir>,
    child: Child,
    log: Arc<Mutex<String>>,
    port: u16,
}

/// What a daemon is started with: a directory with a base file and `conf.d`.
pub struct Setup {
    dir: Arc<TempDir>,
    port: u16,
    generic: String,
}

impl Setup {
    /// An empty configuration on a Unix socket and a free TCP port of 127.0.0.1.
    pub fn new() -> Setup {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        fs::create_dir(dir.path().join("conf.d")).unwrap();
        Setup::again(dir)
    }

    /// What an earlier daemon left in its directory, for the next one.
    pub fn again(dir: Arc<TempDir>) -> Setup {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Setup { dir, port, generic: String::new() }
    }

    /// Adds lines to `[generic]`.
    pub fn generic(mut self, lines: &str) -> Setup {
        self.generic.push_str(lines);
        self.generic.push('\n');
        self
    }

    /// The directory for images and configuration.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Creates an empty image in the directory with `qemu-img create -o options`.
    pub fn image(&self, name: &str, options: &str, size: &str) -> PathBuf {
        let path = self.dir().join(name);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2"]);
        if !options.is_empty() {
            create.args(["-o", options]);
        }
        qemu::run(create.arg(&path).arg(size));
        path
    }

    /// Writes one export's file into `conf.d`.
    pub fn export(&self, name: &str, path: &Path, more: &str) {
        write_export(self.dir(), name, path, more);
    }

    /// Writes the base file.
    pub fn write_base(&self) -> PathBuf {
        let base = self.dir().join("cowgate.conf");
        let dir = self.dir().display();
        let text = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {}\nunixsock = {dir}/nbd.sock\nduallisten = true\n\
             allowlist = true\nincludedir = {dir}/conf.d\ncontrolsock = {dir}/control.sock\n{}",
            self.port, self.generic
        );
        fs::write(&base, text).unwrap();
        base
    }

    /// Starts the daemon and waits until it takes connections.
    pub fn start(self) -> Daemon {
        self.start_with(|_| {})
    }

    /// The same with further arguments or environment.
    pub fn start_with(self, prepare: impl FnOnce(&mut Command)) -> Daemon {
        let base = self.write_base();
        let mut command = Command::new(env!("CARGO_BIN_EXE_cowgate"));
        command.args(["serve", "-c"]).arg(base).arg("-p").arg(self.dir.path().join("cowgate.pid"));
        prepare(&mut command);
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, copy) = (BufReader::new(child.stderr.take().unwrap()), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut log = copy.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let daemon = Daemon { dir: self.dir, child, log, port: self.port };
        daemon.wait_for("the daemon to be ready", || daemon.log().contains("ready"));
        daemon
    }
}

/// Writes one export's file into the `conf.d` below a directory, as control planes do: not atomically.
pub fn write_export(dir: &Path, name: &str, path: &Path, more: &str) {
    let text = format!("[{name}]\nexportname = {}\n{more}\n", path.display());
    fs::write(dir.join("conf.d").join(format!("{name}.conf")), text).unwrap();
}

impl Daemon {
    /// The directory for images and configuration.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pid file that it was started with.
    pub fn pid_file(&self) -> PathBuf {
        self.dir().join("cowgate.pid")
    }

    /// TCP port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Path of its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir().join("nbd.sock")
    }

    /// Path of its control socket.
    pub fn control(&self) -> PathBuf {
        self.dir().join("control.sock")
    }

    /// URI of an export over the Unix socket.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket().display())
    }

    /// URI of an export over TCP.
    pub fn tcp(&self, export: &str) -> String {
        format!("nbd://127.0.0.1:{}/{export}", self.port)
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits until `done` holds; panics with the log when that takes too long.
    #[track_caller]
    pub fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}; the daemon says:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Adds or replaces an export's file and reloads, waiting until the reload is done.
    pub fn add_export(&self, name: &str, path: &Path, more: &str) {
        write_export(self.dir(), name, path, more);
        self.reload();
    }

    /// SIGHUP, and waits for the log line that ends the reload.
    #[track_caller]
    pub fn reload(&self) {
        let before = self.log().matches("reloaded").count();
        self.signal("HUP");
        self.wait_for("the reload", || self.log().matches("reloaded").count() > before);
    }

    /// Sends a signal.
    pub fn signal(&self, name: &str) {
        qemu::run(Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]));
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Memory it uses, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    /// Processor time that all its threads have used, in nanoseconds.
    pub fn cpu_ns(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let one = |task: std::io::Result<fs::DirEntry>| -> u64 {
            let stat = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
            stat.split_whitespace().next().map_or(0, |ns| ns.parse().unwrap())
        };
        tasks.map(one).sum()
    }

    /// The names it lists.
    pub fn names(&self) -> Vec<String> {
        let out = qemu::run(Command::new("nbdinfo").args(["--list", "--json"]).arg(self.uri("")));
        let list: serde_json::Value = serde_json::from_str(&out).unwrap();
        let names = list["exports"].as_array().unwrap().iter();
        names.map(|e| e["export-name"].as_str().unwrap().to_owned()).collect()
    }

    /// SIGTERM; it must end with status 0. Returns its directory, so that images can be looked at, and its log.
    #[track_caller]
    pub fn stop(mut self) -> (Arc<TempDir>, String) {
        self.signal("TERM");
        let mut status = None;
        let start = Instant::now();
        while status.is_none() && start.elapsed() < PATIENCE {
            status = self.child.try_wait().unwrap();
            std::thread::sleep(Duration::from_millis(10));
        }
        let log = self.log();
        assert_eq!(status.and_then(|s| s.code()), Some(0), "SIGTERM should end it with status 0; it says:\n{log}");
        (Arc::clone(&self.dir), log)
    }

    /// SIGKILL. Returns its directory.
    pub fn kill(mut self) -> Arc<TempDir> {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Arc::clone(&self.dir)
    }

    /// Runs a Python program with libnbd; `uri` is the Unix socket's for `export`, `h` is connected to it.
    #[track_caller]
    pub fn python(&self, export: &str, program: &str) -> String {
        let prelude = format!(
            "import nbd, os, socket, struct, sys, time\nuri = {:?}\nh = nbd.NBD()\n\
             h.add_meta_context('base:allocation')\nh.connect_uri(uri)\n",
            self.uri(export)
        );
        qemu::run(Command::new("/usr/bin/python3").args(["-c", &(prelude + program)]))
    }

    /// Runs a Python program that speaks the protocol byte by byte, see `clients/wire.py`.
    #[track_caller]
    pub fn wire(&self, program: &str) -> String {
        qemu::run(&mut self.wire_command(program))
    }

    /// The command that runs such a program.
    pub fn wire_command(&self, program: &str) -> Command {
        let wire = include_str!("../clients/wire.py");
        let head = format!("unix, port, pid = {:?}, {}, {}", self.socket(), self.port(), self.pid());
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", &format!("{head}\n{wire}\n{program}")]);
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon said:\n{}", self.log());
        }
    }
}
