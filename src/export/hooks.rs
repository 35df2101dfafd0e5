//! `prerun` and `postrun`: commands of the administrator that run before and after a client is served.
//!
//! The registry runs them. Promises: a command never keeps a worker busy (a thread waits for it), never runs longer
//! than [`LIMIT`] (its whole process group is killed then), gets no descriptor of ours but the log's, and sees the path
//! of the export only where a shell cannot take it for something else.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;
use tokio::sync::oneshot;

/// How long a command may run.
pub const LIMIT: Duration = Duration::from_secs(60);
/// First and longest pause between two looks at a running command.
const LOOKS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// The thread that waits does nothing else.
const STACK_BYTES: usize = 128 << 10;
/// Longest command in bytes, with its path filled in: the kernel takes no longer argument.
const MAX_COMMAND_BYTES: usize = 128 << 10;

/// Why a command did not succeed.
#[derive(Debug, Error)]
pub enum HookError {
    /// There is no command to run.
    #[error("it cannot be started: {0}")]
    Template(#[from] TemplateError),
    /// There is no shell, no process or no thread for it.
    #[error("it cannot be started: {0}")]
    Start(#[source] io::Error),
    /// It says no.
    #[error("it ended with status {0}")]
    Status(i32),
    /// Something killed it.
    #[error("signal {0} ended it")]
    Signal(i32),
    /// It is still running.
    #[error("it was killed after {} s", .0.as_secs_f32())]
    Late(Duration),
}

/// A command with all that it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// For the shell.
    pub command: String,
    /// Variables of its environment.
    pub variables: Vec<(&'static str, String)>,
}

/// Why a command cannot be made of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum TemplateError {
    /// A `%` that is neither `%s` nor `%%`.
    #[error("a % in it is followed neither by s nor by %")]
    Percent,
    /// The path would mean something to the shell.
    #[error("the path holds characters that a shell would not take as they are")]
    Path,
    /// More than the kernel takes.
    #[error("it is too long")]
    TooLong,
}

/// Fills the path into a command: `%s` stands for it, `%%` for a percent sign.
///
/// A path with characters that mean something to a shell is refused, not quoted: whoever wrote the command may have
/// quoted `%s` already, and quotes within quotes would set the path free. `$COWGATE_PATH` takes any path.
pub fn fill(template: &str, path: &str) -> Result<String, TemplateError> {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        rest = &after[after.chars().next().map_or(0, char::len_utf8)..];
        match after.chars().next() {
            Some('%') => out.push('%'),
            Some('s') if !plain(path) => return Err(TemplateError::Path),
            Some('s') => out.push_str(path),
            _ => return Err(TemplateError::Percent),
        }
        if out.len() > MAX_COMMAND_BYTES {
            return Err(TemplateError::TooLong);
        }
    }
    out.push_str(rest);
    if out.len() >= MAX_COMMAND_BYTES {
        return Err(TemplateError::TooLong);
    }
    Ok(out)
}

/// Whether a path is one word and itself, however it is quoted.
fn plain(path: &str) -> bool {
    path.starts_with('/') && path.chars().all(|c| c.is_alphanumeric() || "/._-+,:=@".contains(c))
}

impl Hook {
    /// Runs the command to its end, or to `limit`.
    pub async fn run(self, limit: Duration) -> Result<(), HookError> {
        let (tell, told) = oneshot::channel();
        let thread = std::thread::Builder::new().name("hook".into()).stack_size(STACK_BYTES);
        let started = thread.spawn(move || {
            // nobody listens any more when the worker is torn down
            let _ = tell.send(self.run_here(limit));
        });
        started.map_err(HookError::Start)?;
        told.await.unwrap_or_else(|_| Err(HookError::Start(io::Error::other("its thread panicked"))))
    }

    /// The same, on this thread.
    fn run_here(self, limit: Duration) -> Result<(), HookError> {
        let status = self.start().and_then(|child| wait(child, limit)).map_err(HookError::Start)?;
        match status {
            None => Err(HookError::Late(limit)),
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(match status.code() {
                Some(code) => HookError::Status(code),
                None => HookError::Signal(status.signal().unwrap_or(0)),
            }),
        }
    }

    fn start(self) -> io::Result<Child> {
        let log = Stdio::from(io::stderr().as_fd().try_clone_to_owned()?);
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(self.command).envs(self.variables);
        // what it says about being ready or stopping is not ours
        shell.env_remove("NOTIFY_SOCKET").stdin(Stdio::null()).stdout(log);
        // a group of its own: it can be killed as a whole, and Ctrl-C in our terminal is not meant for it
        shell.process_group(0).spawn()
    }
}

/// Waits for a process; `None`: it took too long and was killed, with its group.
fn wait(mut child: Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    let mut pause = LOOKS.0;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            // not reaped yet, so the number is still its own
            let group = nix::unistd::Pid::from_raw(child.id() as i32);
            let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(LOOKS.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hook(command: &str) -> Hook {
        Hook { command: command.to_owned(), variables: vec![("COWGATE_EXPORT", "a b".to_owned())] }
    }

    fn run(command: &str) -> Result<(), HookError> {
        hook(command).run_here(LIMIT)
    }

    #[test]
    fn how_commands_end() {
        assert!(run("true").is_ok());
        assert!(matches!(run("exit 7"), Err(HookError::Status(7))));
        assert!(matches!(run("kill -TERM $$"), Err(HookError::Signal(15))));
        assert!(matches!(run("/nowhere/at/all"), Err(HookError::Status(127))));
        assert!(run("test \"$COWGATE_EXPORT\" = 'a b'").is_ok());
    }

    #[test]
    fn what_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let command = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let late = hook(&command).run_here(Duration::from_millis(700));
        assert!(matches!(late, Err(HookError::Late(_))), "{late:?}");
        let stat = format!("/proc/{}/stat", std::fs::read_to_string(pid).unwrap().trim());
        let gone = || std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
        for _ in 0..1000 {
            if gone() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{stat} is still there");
    }

    #[test]
    fn what_goes_on_in_the_background_is_left_alone() {
        // and not waited for
        let start = Instant::now();
        assert!(run("sleep 5 > /dev/null 2>&1 &").is_ok());
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn paths_are_filled_in() {
        let fill = |template: &str| fill(template, "/srv/a.img");
        assert_eq!(fill("check \"%s\" %s"), Ok("check \"/srv/a.img\" /srv/a.img".into()));
        assert_eq!(fill("date +%%F"), Ok("date +%F".into()));
        assert_eq!(fill("%%s"), Ok("%s".into()));
        assert_eq!(fill("plain"), Ok("plain".into()));
        for bad in ["%", "a%", "%d", "%5s", "%\u{e4}"] {
            assert_eq!(fill(bad), Err(TemplateError::Percent), "{bad}");
        }
        assert_eq!(fill(&"%s".repeat(20000)), Err(TemplateError::TooLong));
        assert_eq!(fill(&"x".repeat(MAX_COMMAND_BYTES)), Err(TemplateError::TooLong));
    }

    #[test]
    fn a_path_that_a_shell_would_read_is_not_filled_in() {
        for path in
            ["/a b", "/a;b", "/a'b", "/a\"b", "/$(x)", "/a`b", "/a\\b", "/a*", "/a\nb", "relative", "/a&b", "/~"]
        {
            assert_eq!(fill("check %s", path), Err(TemplateError::Path), "{path}");
            assert_eq!(fill("check $COWGATE_PATH", path), Ok("check $COWGATE_PATH".into()));
        }
    }

    proptest! {
        #[test]
        fn a_path_that_is_filled_in_is_one_word(path in "/\\PC{0,20}") {
            if let Ok(command) = fill("set -- %s \"%s\"; test $# = 2 && test \"$1$2\" = \"$COWGATE_PATH$COWGATE_PATH\"", &path) {
                let variables = vec![("COWGATE_PATH", path.clone())];
                prop_assert!(Hook { command, variables }.run_here(LIMIT).is_ok(), "{path:?}");
            }
        }

        #[test]
        fn any_template_is_survived(template in "\\PC{0,60}", path in "\\PC{0,20}") {
            let _ = fill(&template, &path);
        }
    }
}
