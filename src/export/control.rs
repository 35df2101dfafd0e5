//! Requests to the control thread, which alone reads and applies the configuration: from the frontends' workers and
//! from the control API. Carried out by the daemon.

use crate::image::resize::NewSize;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot};
use utoipa::ToSchema;

/// Requests that may wait for the control thread; who asks when it is full waits.
const QUEUE: usize = 1024;

/// What the control thread can be asked for.
#[derive(Debug)]
pub enum Request {
    /// Read the configuration again and apply it, as SIGHUP does.
    Reload {
        /// Answer only when no file looks half-written any more; otherwise as soon as what is complete is applied.
        wait: bool,
        /// Gets what came of it.
        done: oneshot::Sender<Outcome>,
    },
    /// A file of `includedir` was written or removed as a whole: apply it, and nothing else.
    File {
        /// The file.
        file: PathBuf,
        /// Told when it is applied.
        done: oneshot::Sender<Applied>,
    },
    /// Where are the files of single exports?
    IncludeDir {
        /// Gets the directory; `None`: none is configured.
        done: oneshot::Sender<Option<PathBuf>>,
    },
    /// An export's block device and its disk are to have another size.
    Resize {
        /// The export.
        name: String,
        /// How, and who waits for it.
        resize: Resize,
    },
    /// A client asks for an export that is not there: look whether the configuration has it by now.
    Missing {
        /// The export.
        name: String,
        /// Told when it was looked for.
        done: oneshot::Sender<()>,
    },
}

/// Another size of a disk that is a block device.
#[derive(Debug)]
pub struct Resize {
    /// The size; `None`: the one that its file or block device has by now.
    pub size: Option<NewSize>,
    /// Gets the new size in bytes, or why it is still the old one.
    pub done: oneshot::Sender<Result<u64, String>>,
}

impl Resize {
    /// Tells who asked.
    pub fn answer(self, result: Result<u64, String>) {
        let _ = self.done.send(result); // who asked may have gone
    }
}

/// What came of one file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The configuration's number since.
    pub generation: u64,
    /// What keeps the file from taking effect, a line each.
    pub problems: Vec<String>,
}

/// What came of a reload.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = Reloaded)]
pub struct Outcome {
    /// Its number.
    pub generation: u64,
    /// Names of exports that are served since.
    pub added: Vec<String>,
    /// Names of exports that are served differently since.
    pub changed: Vec<String>,
    /// Names of exports that take no new clients any more.
    pub removed: Vec<String>,
    /// Exports in all.
    pub exports: usize,
    /// What was found in the files, a line each: every error, and the warnings of files that were read anew.
    pub problems: Vec<String>,
    /// Settings that have changed and that only a restart applies.
    pub needs_restart: Vec<String>,
    /// Nothing of the configuration is left unapplied.
    pub complete: bool,
    /// No file looked half-written at the end.
    pub settled: bool,
}

/// Whom to ask. Clones ask the same control thread.
#[derive(Clone, Debug)]
pub struct Handle(mpsc::Sender<Request>);

/// A handle, and what the control thread receives from it and its clones.
pub fn channel() -> (Handle, mpsc::Receiver<Request>) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (Handle(sender), receiver)
}

impl Handle {
    /// Has the configuration read again. `wait`: see [`Request::Reload`]. `None`: the daemon is stopping.
    pub async fn reload(&self, wait: bool) -> Option<Outcome> {
        let (done, outcome) = oneshot::channel();
        self.0.send(Request::Reload { wait, done }).await.ok()?;
        outcome.await.ok()
    }

    /// Has a file of `includedir` applied that was written or removed as a whole. `None`: the daemon is stopping.
    pub async fn file(&self, file: PathBuf) -> Option<Applied> {
        let (done, applied) = oneshot::channel();
        self.0.send(Request::File { file, done }).await.ok()?;
        applied.await.ok()
    }

    /// Has an export's block device get another size. `None`: the daemon is stopping.
    pub async fn resize(&self, name: String, size: Option<NewSize>) -> Option<Result<u64, String>> {
        let (done, answer) = oneshot::channel();
        self.0.send(Request::Resize { name, resize: Resize { size, done } }).await.ok()?;
        answer.await.ok()
    }

    /// `includedir`, as configured now.
    pub async fn include_dir(&self) -> Option<PathBuf> {
        let (done, answer) = oneshot::channel();
        self.0.send(Request::IncludeDir { done }).await.ok()?;
        answer.await.ok().flatten()
    }

    /// Has the configuration looked through for an export that is not served. Returns when that was done.
    pub async fn missing(&self, name: &str) {
        let (done, looked) = oneshot::channel();
        if self.0.send(Request::Missing { name: name.to_owned(), done }).await.is_ok() {
            // an error means that the daemon is stopping: then nothing new is served either
            let _ = looked.await;
        }
    }
}
