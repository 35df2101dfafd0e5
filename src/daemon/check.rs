//! What a start with a configuration would complain of, without a start: every problem of the base file and of what it
//! includes, and what in `[generic]` this machine cannot give.
//!
//! Called by `cowgate check-config` and `cowgate serve --check`. Promises: no image is looked at, because images are
//! opened when a client asks for them; no port is taken and nothing is changed, so that a running daemon notices
//! nothing. Waits for files that look half-written as a start does.

use super::privileges::{self, Identity};
use crate::export::config::{Listen, ServerConfig};
use crate::export::load::{Loaded, load};
use crate::export::problem::{Problem, Severity};
use crate::export::tls;
use std::io;
use std::net::{ToSocketAddrs, UdpSocket};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a file may be written before that is a problem.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two looks at a file that is being written.
const PAUSE: Duration = Duration::from_millis(100);

/// What was found.
#[derive(Debug)]
pub struct Checked {
    /// The base file.
    pub file: PathBuf,
    /// Everything found, file by file.
    pub problems: Vec<Problem>,
    /// How many exports a start would serve.
    pub exports: usize,
    /// A start would succeed.
    pub starts: bool,
}

impl Checked {
    /// Everything that the configuration asks for would take effect.
    pub fn is_complete(&self) -> bool {
        self.starts && self.problems.iter().all(|p| p.severity == Severity::Warning)
    }

    /// How many problems of one kind there are.
    pub fn count(&self, severity: Severity) -> usize {
        self.problems.iter().filter(|p| p.severity == severity).count()
    }
}

/// Examines the base file `path` and what it includes.
pub fn check(path: &Path) -> Checked {
    let file = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let loaded = settled(&file);
    let mut problems = loaded.problems;
    for unstable in &loaded.unstable {
        let what = "this file is being written all the time, so nothing of it would take effect";
        problems.push(Problem::in_file(Severity::Error, unstable, what, "check again when it is complete"));
    }
    let mut of_machine = loaded.server.as_ref().map_or(Vec::new(), |server| settings(server, &file));
    of_machine.extend(loaded.server.as_ref().map_or(Vec::new(), |server| tls::load(server, &file).problems));
    let starts = loaded.server.is_some() && of_machine.iter().all(|p| p.severity == Severity::Warning);
    let exports = if starts { loaded.exports.len() } else { 0 };
    problems.extend(of_machine);
    Checked { file, problems, exports, starts }
}

/// The configuration once no file looks half-written any more.
fn settled(file: &Path) -> Loaded {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let loaded = load(file);
        if loaded.unstable.is_empty() || Instant::now() >= deadline {
            return loaded;
        }
        sleep(PAUSE);
    }
}

/// What a start would trip over in `[generic]`.
fn settings(server: &ServerConfig, file: &Path) -> Vec<Problem> {
    let mut out = Vec::new();
    let mut say = |severity, key: &str, value: String, what: String, remedy: &str| {
        let mut problem = Problem::in_file(severity, file, what, remedy).group("generic");
        problem.key = Some(key.to_owned());
        problem.value = Some(value);
        out.push(problem);
    };
    for listen in server.listen.iter().filter(|_| server.tcp()) {
        let (what, remedy) = match listen {
            Listen::Host(host) => match (host.as_str(), server.port).to_socket_addrs() {
                Ok(_) => continue,
                Err(e) => (format!("cannot find its address: {e}"), "correct the name, or write the address"),
            },
            // the kernel knows without a packet being sent, and no server's port is touched
            Listen::Ip(ip) => match UdpSocket::bind((*ip, 0)) {
                Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {
                    ("this machine does not have this address".to_owned(), "write one that `ip address` shows")
                }
                _ => continue,
            },
        };
        say(Severity::Error, "listenaddr", listen.to_string(), what, remedy);
    }
    let user = ServerConfig { group: None, ..server.clone() };
    let group = ServerConfig { user: None, ..server.clone() };
    for (key, value, alone) in [("user", &server.user, &user), ("group", &server.group, &group)] {
        let what = match Identity::wanted(alone) {
            Ok(_) => continue,
            Err(privileges::Error::Unknown { .. }) => format!("there is no such {key} on this machine"),
            Err(other) => other.to_string(),
        };
        say(Severity::Error, key, value.clone().unwrap_or_default(), what, "create it or change the key");
    }
    if let Some(socket) = &server.unix_socket {
        let value = socket.display().to_string();
        match (socket.symlink_metadata(), socket.parent()) {
            (Ok(found), _) if !found.file_type().is_socket() => {
                let what = "this exists and is not a socket".to_owned();
                say(Severity::Error, "unixsock", value, what, "choose another path or remove it");
            }
            // the system may make it when it starts the daemon
            (_, Some(parent)) if !parent.is_dir() => {
                let what = format!("there is no directory {} yet, without which a start fails", parent.display());
                say(Severity::Warning, "unixsock", value, what, "create it, or see that it is created before");
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn checked(generic: &str) -> Checked {
        let d = tempfile::tempdir().expect("directory");
        let file = d.path().join("config");
        fs::write(&file, format!("[generic]\n{}\n", generic.replace("DIR", d.path().to_str().expect("UTF-8"))))
            .expect("config");
        check(&file)
    }

    #[test]
    fn what_the_machine_cannot_give_is_an_error() {
        let checked = checked(
            "user = no-such-user\ngroup = no-such-group\nlistenaddr = 127.0.0.1, 192.0.2.1, nowhere.invalid\nunixsock = DIR/config\nduallisten = 1",
        );
        let keys: Vec<_> = checked.problems.iter().map(|p| (p.key.as_deref(), p.value.as_deref())).collect();
        assert_eq!(keys.len(), 5, "{:?}", checked.problems);
        assert_eq!(keys[0], (Some("listenaddr"), Some("192.0.2.1")));
        assert_eq!(keys[1], (Some("listenaddr"), Some("nowhere.invalid")));
        assert_eq!(keys[2], (Some("user"), Some("no-such-user")));
        assert_eq!(keys[3], (Some("group"), Some("no-such-group")));
        assert_eq!(keys[4].0, Some("unixsock"));
        assert!(!checked.starts && !checked.is_complete());
        assert_eq!((checked.count(Severity::Error), checked.count(Severity::Warning)), (5, 0));
    }

    #[test]
    fn addresses_that_are_not_used_are_no_problem() {
        assert!(checked("listenaddr = 192.0.2.1\nunixsock = DIR/socket").is_complete());
        assert!(checked("listenaddr = 127.0.0.1, localhost").is_complete());
        let checked = checked("unixsock = DIR/later/socket");
        assert!(checked.is_complete() && checked.count(Severity::Warning) == 1);
    }
}
