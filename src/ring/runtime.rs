//! The runtime of one thread: a tokio current-thread runtime whose files go through one io_uring.
//!
//! Workers ([`super::worker`]) keep one for their life; tools and tests use [`run`]. Both leave only through
//! `Runtime::block_on`, which waits until the kernel has given back every buffer lent to it.

use super::turn::Turn;
use futures_util::FutureExt;
use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::sync::Notify;
use tokio::task::LocalSet;

/// Submission queue entries. The kernel allows `min(entries, 4 * cores)` threads for blocking file work, so this only
/// has to hold what one turn of the event loop submits; a full queue is flushed early, not an error.
const SUBMISSIONS: u32 = 1024;
/// Completion queue entries. Operations in flight may exceed it: the kernel then keeps the rest on a slower list.
const COMPLETIONS: u32 = 4096;

/// Runs `future` to its end on a new runtime on this thread. For tools and tests; servers have workers.
///
/// Tasks it spawned that have not ended by then are dropped. Errors: the kernel refuses an io_uring.
pub fn run<F: Future>(future: F) -> io::Result<F::Output> {
    Ok(Runtime::new()?.block_on(future))
}

/// Starts a task on this thread. Panics outside a runtime. A panic inside the task ends that task only.
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    let task = Held::new(|busy| &busy.tasks);
    // The handle is dropped on purpose: tokio then detaches the task, and keeps a panic to it.
    drop(tokio::task::spawn_local(async move {
        let _task = task;
        future.await;
    }));
}

/// Lets every other ready task of this thread run. For a task that has much to do and never waits.
///
/// Use this, not `tokio::task::yield_now`: while a task is deferred that way tokio does not go to sleep, and file
/// operations queued by other tasks are not submitted (see `Turns`).
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// One io_uring with its event loop.
pub(super) struct Runtime {
    uring: tokio_uring::Runtime,
}

impl Runtime {
    /// Errors: the kernel refuses an io_uring (too old, forbidden by sysctl or a container's filter, no descriptors).
    pub(super) fn new() -> io::Result<Self> {
        let mut ring = tokio_uring::uring_builder();
        // COOP_TASKRUN: completions do not interrupt the thread, it takes them when it enters the kernel anyway.
        // Not DEFER_TASKRUN: completions would then be delivered only inside io_uring_enter, and this loop sleeps in epoll.
        ring.setup_coop_taskrun().setup_cqsize(COMPLETIONS);
        let mut builder = tokio_uring::builder();
        builder.entries(SUBMISSIONS).uring_builder(&ring);
        let uring = tokio_uring::Runtime::new(&builder)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot set up io_uring on this kernel: {e}")))?;
        Ok(Runtime { uring })
    }

    /// Runs `future` to its end, then waits until no buffer of this thread is with the kernel, also after a panic.
    ///
    /// Without that wait dropping the runtime would be unsound: tokio-uring 0.5 frees the buffer of an operation
    /// whose future was dropped before the kernel is done with it.
    pub(super) fn block_on<F: Future>(&self, future: F) -> F::Output {
        let tasks = LocalSet::new();
        let outcome = self.uring.block_on(Turns::new(tasks.run_until(async {
            let outcome = AssertUnwindSafe(future).catch_unwind().await;
            drained(|busy| &busy.buffers).await;
            outcome
        })));
        drop(tasks); // none runs again, so none lends another buffer
        outcome.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// Runs a thread's tasks in turns and has the ring submitted between any two.
///
/// tokio-uring submits when tokio is about to sleep, and tokio does not sleep, nor say so, while its main future asks
/// to be polled again at once. A set of tasks asks that whenever it has more to do than one turn allows, so on a busy
/// thread file operations would never be submitted. Here such a turn queues a no-op instead of asking: the thread
/// goes to sleep, which submits everything, and the no-op's completion wakes it on the spot.
struct Turns<F> {
    tasks: Pin<Box<F>>,
    turn: Turn,
    nudge: Option<Pin<Box<dyn Future<Output = io::Result<()>>>>>,
}

impl<F: Future> Turns<F> {
    fn new(tasks: F) -> Self {
        Turns { tasks: Box::pin(tasks), turn: Turn::default(), nudge: None }
    }
}

impl<F: Future> Future for Turns<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        if let Some(nudge) = &mut this.nudge
            && nudge.as_mut().poll(cx).is_ready()
        {
            this.nudge = None;
        }
        let outcome = this.tasks.as_mut().poll(&mut this.turn.begin(cx));
        if this.turn.end() && outcome.is_pending() && this.nudge.is_none() {
            let mut nudge = Box::pin(tokio_uring::no_op());
            match nudge.as_mut().poll(cx) {
                Poll::Pending => this.nudge = Some(nudge),
                Poll::Ready(_) => cx.waker().wake_by_ref(), // it cannot be, unless the ring refused it
            }
        }
        outcome
    }
}

/// Waits until every task started with [`spawn`] on this thread has ended.
pub(super) async fn tasks_ended() {
    drained(|busy| &busy.tasks).await;
}

/// What this thread has under way.
#[derive(Default)]
struct Busy {
    /// Tasks started with [`spawn`].
    tasks: Cell<usize>,
    /// Buffers the kernel may still read or write.
    buffers: Cell<usize>,
    /// Told whenever one of the counts becomes zero.
    zero: Notify,
}

thread_local! {
    static BUSY: Rc<Busy> = Rc::default();
}

async fn drained(count: fn(&Busy) -> &Cell<usize>) {
    let busy = BUSY.with(Rc::clone);
    while count(&busy).get() != 0 {
        busy.zero.notified().await;
    }
}

/// One task or lent buffer in the thread's count. Dropping it takes it out.
#[must_use = "dropping it says that the work is over"]
pub(super) struct Held {
    busy: Rc<Busy>,
    count: fn(&Busy) -> &Cell<usize>,
}

impl Held {
    fn new(count: fn(&Busy) -> &Cell<usize>) -> Self {
        let busy = BUSY.with(Rc::clone);
        count(&busy).set(count(&busy).get() + 1);
        Held { busy, count }
    }

    /// Counts one buffer lent to the kernel.
    pub(super) fn buffer() -> Self {
        Self::new(|busy| &busy.buffers)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let count = (self.count)(&self.busy);
        count.set(count.get() - 1);
        if count.get() == 0 {
            self.busy.zero.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pagebuf::PageBuf;
    use crate::ring::File;
    use crate::units::HostOffset;
    use std::time::Duration;

    #[test]
    fn a_task_that_panics_harms_no_other() {
        let answer = run(async {
            spawn(async { panic!("expected in this test") });
            let (send, receive) = tokio::sync::oneshot::channel();
            spawn(async move { send.send(7).unwrap() });
            receive.await.unwrap()
        });
        assert_eq!(answer.unwrap(), 7);
    }

    #[test]
    fn a_task_that_never_rests_does_not_starve_the_ring() {
        const PATIENCE: u32 = 3_000_000;
        run(async {
            let turns = Rc::new(Cell::new(0));
            let other = Rc::clone(&turns);
            spawn(async move {
                while other.get() < PATIENCE {
                    other.set(other.get() + 1);
                    yield_now().await;
                }
            });
            let file = File::from_std(tempfile::tempfile().unwrap());
            file.write(HostOffset(1), PageBuf::zeroed(64 << 10)).await.0.unwrap(); // not whole pages: through the ring
            file.sync().await.unwrap();
            assert!(turns.get() < PATIENCE, "files had to wait until the other task ended");
        })
        .unwrap();
    }

    /// The future of a read is dropped and the runtime ends at once: the buffer must outlive the operation.
    #[test]
    fn leaving_waits_for_buffers_the_kernel_has() {
        let (reader, writer) = std::io::pipe().unwrap();
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            std::io::Write::write_all(&mut { writer }, b"late").unwrap();
        });
        let start = std::time::Instant::now();
        run(async move {
            let fd = std::os::fd::OwnedFd::from(reader);
            let file = File::from_std(fd.into());
            let read = file.read(HostOffset(0), PageBuf::zeroed(4));
            assert!(tokio::time::timeout(Duration::from_millis(20), read).await.is_err(), "nothing to read yet");
        })
        .unwrap();
        assert!(start.elapsed() >= Duration::from_millis(150), "left while the kernel had a buffer");
        late.join().unwrap();
    }
}
