//! [`Exclusive`]: the descriptor that has a block device for itself, while there is one.

use crate::units::HostRange;
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Semaphore;

/// A block device's descriptor opened with O_EXCL, shared by all threads, while somebody holds one.
///
/// Zeroing and discarding a device throws away what the page cache has of it. The kernel does that for nobody but the
/// exclusive holder when there is one: through another descriptor the same call fails with EBUSY as long as written
/// pages are not on the device (`kernel-notes/2026-11-23-exclusive-block-devices.md`).
pub struct Exclusive {
    file: Mutex<Option<Arc<File>>>,
    /// The kernel zeroes one range of a device at a time: more threads would only wait.
    turn: Semaphore,
}

impl Default for Exclusive {
    fn default() -> Self {
        Exclusive { file: Mutex::default(), turn: Semaphore::new(1) }
    }
}

impl Exclusive {
    /// From now on `file` has the device.
    pub fn hold(&self, file: File) {
        *self.file() = Some(Arc::new(file));
    }

    /// Closes it. Operations through it have ended before.
    pub fn release(&self) {
        *self.file() = None;
    }

    fn file(&self) -> MutexGuard<'_, Option<Arc<File>>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `fallocate` through it, on a thread beside. `None`: nobody holds the device.
    pub(super) async fn fallocate(&self, r: HostRange, mode: i32) -> Option<io::Result<()>> {
        let file = self.file().clone()?;
        let _turn = self.turn.acquire().await;
        let (at, len) = (r.start().0 as i64, r.len() as i64); // checked to fit
        let done = tokio::task::spawn_blocking(move || {
            let done = fallocate(&*file, FallocateFlags::from_bits_retain(mode), at, len);
            drop(file); // before anybody hears of the end
            done.map_err(io::Error::from)
        });
        Some(done.await.unwrap_or_else(|e| Err(io::Error::other(e))))
    }
}
