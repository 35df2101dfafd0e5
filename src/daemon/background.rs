//! `--daemonize`: the daemon without the terminal, the pipes and the directory of whoever started it.
//!
//! Forking is not for programs with a runtime, so the caller's process starts this program anew, as a child that knows
//! by a hidden option what it is, and waits until that says "ready" over its standard output, or ends: the caller can
//! rely on the exit status. The child is in a session of its own and keeps none of the caller's descriptors but its
//! standard error, which it needs for its last words until it is ready. Called by `cowgate serve` ([`launch`], [`enter`])
//! and by the daemon when it is ready ([`detach`]).

use nix::sys::stat::fstat;
use nix::unistd::{chdir, close, dup2_stderr, dup2_stdout, setsid};
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use tracing::warn;

/// The hidden option that tells the child what it is.
pub const CHILD_OPTION: &str = "--background-child";
/// What the child says when clients can connect.
const READY: &str = "ready\n";

/// How it went.
#[derive(Debug)]
pub enum Launched {
    /// Clients can connect.
    Ready,
    /// It ended and has said why on standard error.
    Failed,
}

/// Starts the daemon in the background, with the arguments of this process, and waits until it is ready or has ended.
pub fn launch() -> Result<Launched, String> {
    let mut arguments = env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(arguments.next().unwrap_or_else(|| "cowgate".into()));
    // behind the subcommand: at the end it could follow a `--`
    command.args(arguments.next()).arg(CHILD_OPTION).args(arguments);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let mut child = child.map_err(|e| format!("cannot start the daemon in the background: {e}"))?;
    let mut said = String::new();
    if let Some(pipe) = child.stdout.take() {
        // it ends with the child if not before; what it cannot be read for is not "ready"
        drop(pipe.take(READY.len() as u64 + 1).read_to_string(&mut said));
    }
    if said == READY {
        return Ok(Launched::Ready);
    }
    let status = child.wait().map_err(|e| format!("the daemon did not start, and its status cannot be had: {e}"))?;
    failed(status)
}

fn failed(status: ExitStatus) -> Result<Launched, String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => Err("the daemon was stopped before it was ready".to_owned()),
        (Some(_), _) => Ok(Launched::Failed),
        (None, signal) => {
            Err(format!("the daemon was ended by signal {} before it was ready", signal.unwrap_or_default()))
        }
    }
}

/// The child's first steps. Nothing of this process may be open or running yet, and paths must not be relative any more.
pub fn enter() -> io::Result<()> {
    close_inherited()?;
    setsid()?;
    chdir("/")?;
    // it would be "exe", after the link that was executed; tools look for the program's name
    fs::write("/proc/self/comm", "cowgate")
}

/// Closes everything but the standard streams.
fn close_inherited() -> io::Result<()> {
    let mut open = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        open.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    for descriptor in open.into_iter().filter(|fd| *fd > 2) {
        // the directory that was just read is closed already, which is an error that does not matter
        let _ = close(descriptor);
    }
    Ok(())
}

/// Tells the caller that clients can connect, and lets go of its standard streams.
///
/// An error: the caller has gone before, so nobody expects this daemon to serve.
pub fn detach(logs_to_file: bool) -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut caller = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    dup2_stdout(&null)?;
    if !stderr_lasts() {
        if !logs_to_file {
            warn!("nothing will be logged from here on; --log-file FILE, or 2>FILE, keeps the log");
        }
        dup2_stderr(&null)?;
    }
    caller.write_all(READY.as_bytes())
}

/// Whether standard error is a file or the journal, not something of the caller that goes away.
fn stderr_lasts() -> bool {
    stderr_is_journal() || fstat(io::stderr().as_fd()).is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFREG)
}

/// Whether standard error is what systemd has connected with the journal.
pub fn stderr_is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    fstat(io::stderr().as_fd()).is_ok_and(|found| stream == format!("{}:{}", found.st_dev, found.st_ino))
}
