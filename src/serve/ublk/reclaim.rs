//! Memory of a process that serves block devices: getting some must never wait for one of those devices.
//!
//! When memory is short, whoever asks for some helps to get it: writes dirty pages back, swaps, has file systems let go
//! of inodes. A thread of ours that is told to do so for a device of ours waits for itself, or for a thread that waits for
//! a lock that it holds. So:
//!
//! - All threads get memory without I/O (PR_SET_IO_FLUSHER), not only those of queues: a worker shares an image's locks
//!   with them. Threads inherit it from the one that starts them, io_uring's own workers too, hence it is the first thing
//!   that the daemon does about devices, before there are threads.
//! - While there are devices, what this process has touched stays in memory (mlockall): its pages are neither swapped out
//!   to a device of ours nor read back through one. Only what was touched: hundreds of threads have stacks of 2 MiB each.
//!
//! What the kernel's own threads do cannot be helped from here: swap on a device whose image is a file still hangs (kernel
//! notes).
//!
//! Neither is a condition: without the rights for it, the devices are served, with a warning that says what to do.

use super::driver;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use std::io;
use tracing::warn;

/// Of the kernel's include/uapi/linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;
/// The same.
const PR_GET_IO_FLUSHER: libc::c_int = 58;

/// Has this thread, and all that are started by it from now on, get memory without I/O, where there may be devices.
///
/// Without the driver nothing changes: a server of NBD alone has memory reclaimed as any program has.
pub(super) fn begin() {
    // the driver itself is not asked: that takes a ring, whose worker would be there before
    if driver::is_there() {
        // what is refused is said when there is a device
        let _ = set_io_flusher();
    }
}

/// Keeps what this process touches in memory for as long as it lives.
#[derive(Debug)]
pub(super) struct Resident(());

impl Resident {
    /// For the first device. What cannot be had is said in the log.
    pub(super) fn new() -> Resident {
        if !is_io_flusher() {
            match set_io_flusher() {
                Ok(()) => warn!(
                    "the driver was loaded after the daemon was started: NBD clients' threads may wait for the block \
                     devices when memory is short; restart the daemon, and load ublk_drv before it"
                ),
                Err(e) => warn!(
                    "cannot have memory without waiting for the block devices (PR_SET_IO_FLUSHER: {e}): when memory is \
                     short, they may hang; give the daemon CAP_SYS_RESOURCE"
                ),
            }
        }
        if let Err(e) = lock() {
            warn!(
                "cannot keep the daemon in memory ({e}): do not swap to its block devices; allow it to lock memory \
                 (LimitMEMLOCK=infinity in its unit, or CAP_SYS_RESOURCE)"
            );
        }
        Resident(())
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: takes no memory from us, and gives none; it cannot fail in a way that matters.
        unsafe { libc::munlockall() };
    }
}

/// Locks what is and will be mapped, each page when it is first touched.
fn lock() -> io::Result<()> {
    // with a limit, the mapping that goes beyond it fails, at any later time: so without one, or not at all
    let unlimited = |(soft, _)| soft == RLIM_INFINITY;
    let limit = Resource::RLIMIT_MEMLOCK;
    if !getrlimit(limit).is_ok_and(unlimited) {
        setrlimit(limit, RLIM_INFINITY, RLIM_INFINITY)?;
    }
    // SAFETY: changes how pages are kept, not what is in them.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set_io_flusher() -> io::Result<()> {
    // SAFETY: takes numbers only.
    match unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_io_flusher() -> bool {
    // SAFETY: takes numbers only.
    unsafe { libc::prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0) == 1 }
}
