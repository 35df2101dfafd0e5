//! The control API: HTTP and JSON on a Unix socket, for root and the daemon's own user.
//!
//! [`Socket::bind`] takes the path when the daemon starts; [`Socket::serve`] runs on the control thread, as tasks that
//! never block it: files are written and examined on threads of their own, images are opened on the workers.
//!
//! - `connection`: who is let in, for how long, and how many
//! - `routes`: what can be asked; `change`: what changes exports; `job`: backup jobs; [`wire`]: the words for it

mod change;
mod connection;
mod job;
mod routes;
pub mod wire;

use crate::export::control::Handle;
use crate::export::registry::Registry;
use crate::ring::Workers;
use crate::ring::unix_listener::{self, SocketFile, UnixBindError};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, chown};
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;
use tokio::net::UnixListener;

/// The bound socket.
pub struct Socket {
    listener: UnixListener,
    file: SocketFile,
    /// Its directory, when it was made for it.
    made: Option<PathBuf>,
}

impl Socket {
    /// Binds the path, for its owner alone from the moment it exists. Its directory is made when that alone is missing.
    /// To be called inside the control thread's tokio runtime.
    pub fn bind(path: &Path) -> Result<Socket, UnixBindError> {
        let fault = |source| UnixBindError::Io { path: path.to_owned(), source };
        let mut made = None;
        if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
            match DirBuilder::new().mode(0o755).create(directory) {
                Ok(()) => made = Some(directory.to_owned()),
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(fault(e)),
            }
        }
        let (listener, file) = unix_listener::bind(path, Some(Mode::S_IRUSR | Mode::S_IWUSR))?;
        Ok(Socket { listener, file, made })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Gives the socket, and the directory that was made for it, to the user that the daemon becomes.
    pub fn give_to(&self, user: Option<Uid>, group: Gid) -> Result<(), UnixBindError> {
        if let Some(directory) = &self.made {
            let given = chown(directory, user, Some(group));
            given.map_err(|e| UnixBindError::Io { path: directory.clone(), source: e.into() })?;
        }
        self.file.give_to(user, group)
    }

    /// Answers requests for as long as it is polled.
    pub async fn serve(self, state: Arc<State>) {
        connection::accept(&self.listener, &state).await;
    }
}

/// What requests are answered from.
pub struct State {
    registry: Arc<Registry>,
    control: Handle,
    workers: Workers,
    listening: wire::Listening,
    since: SystemTime,
    stopping: AtomicBool,
    /// Changes of exports take turns.
    changing: tokio::sync::Mutex<()>,
    /// So do examinations of many images.
    examining: tokio::sync::Mutex<()>,
    /// Taken last of all, and for moments.
    jobs: job::Jobs,
}

impl State {
    /// The state of a daemon that is ready now.
    pub fn new(registry: Arc<Registry>, control: Handle, workers: Workers, listening: wire::Listening) -> Arc<State> {
        Arc::new(State {
            registry,
            control,
            workers,
            listening,
            since: SystemTime::now(),
            stopping: AtomicBool::new(false),
            changing: tokio::sync::Mutex::default(),
            examining: tokio::sync::Mutex::default(),
            jobs: job::Jobs::default(),
        })
    }

    /// No new clients from now on.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }
}

/// The description of all routes, as the text of an OpenAPI document.
pub fn openapi() -> String {
    routes::description()
}
