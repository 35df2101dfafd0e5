//! One queue of a device, on a thread of its own: takes requests from the driver and has the export answer them.
//!
//! The thread has a runtime like a worker's, for the image, and the driver's ring, which libublk keeps; this drives the one
//! from within the other. Where the driver can do it, data moves between its pages and the image's files without a copy
//! (`direct`). Else, and whatever is more than moving bytes, it is copied between the driver's pages and ours with pread
//! and pwrite on the device's character device (UBLK_F_USER_COPY), so that a request has memory only while it is under
//! way.
//!
//! Promises: every request of the driver gets one answer, unless the driver takes its commands back first: then it will ask
//! again, or has no use for answers. A panic while a request is carried out is an I/O error of that request.

use super::direct::{self, Moved, Trial, Way};
use super::driver;
use super::params::{Asked, Kind};
use super::single;
use crate::block::{BlockDev, Errno, Geometry, Op, Request, Transfer};
use crate::export::limiter::Cost;
use crate::export::service::Client;
use crate::export::usage;
use crate::image::Direct;
use crate::pagebuf::PageBuf;
use crate::ring::Turn;
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use io_uring::{IoUring, types};
use libublk::UblkError;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue, ublk_init_task_ring, with_task_io_ring, with_task_io_ring_mut};
use libublk::uring_async::ublk_wake_task;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::uio::{pread, pwrite};
use std::cell::{Cell, RefCell};
use std::future::{Future, pending, poll_fn};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tracing::error;

/// Turns of a queue between two looks at what else its thread has to do.
const TURNS: usize = 16;
/// How long everything else of a queue's thread may have to wait for a request that does not come, in nanoseconds.
const MOMENT_NS: u32 = 200_000;
/// How long the driver may take from the first command that it takes back to the last.
pub(super) const TAKING_BACK: Duration = Duration::from_secs(1);

/// Serves one queue until the device is stopped, and everything under way has ended. `made` is called when the driver may
/// be told to start the device.
///
/// Runs on the queue's thread, inside `ring::run`. Errors: the queue cannot be made, or its ring fails.
///
/// `held`: the driver holds the device still. No more is answered then, and the queue ends with what is being carried out.
pub(super) async fn serve(
    id: u16,
    device: &UblkDev,
    client: &Client,
    held: oneshot::Receiver<()>,
    made: impl FnOnce(),
) -> Result<(), UblkError> {
    make_ring(device)?;
    if client.export().config().client.untrusted.is_some() {
        single::without_partitions().map_err(io::Error::other)?;
    }
    let queue = UblkQueue::new(id, device)?;
    let pump = Pump::new(&queue)?;
    made();
    let geometry = client.device().geometry();
    let (trials, busy, is_held) = Default::default();
    let session = Session { client, geometry, device, queue: &queue, trials, busy, is_held };
    let held = async {
        if held.await.is_err() {
            pending::<()>().await; // nobody will say so any more
        }
    };
    let mut held = pin!(held.fuse());
    let mut tags: FuturesUnordered<_> = queue.tags().map(|tag| answer(&session, tag)).collect();
    let turn = Turn::default();
    let mut taking_back = None;
    poll_fn(|cx| {
        if held.as_mut().poll(cx).is_ready() {
            session.is_held.set(true);
        }
        for _ in 0..TURNS {
            let mut within = turn.begin(cx);
            let ended = loop {
                match tags.poll_next_unpin(&mut within) {
                    Poll::Ready(Some(())) => {}
                    Poll::Ready(None) => break true,
                    Poll::Pending => break false,
                }
            };
            // The driver takes its commands back one after the other, and a ring that goes meanwhile is in its way. A
            // command that came when the others were taken back is never answered.
            let mut taken_back = || {
                let time = taking_back.get_or_insert_with(|| Box::pin(sleep(TAKING_BACK)));
                time.as_mut().poll(cx).is_ready()
            };
            let is_over = session.is_held.get() || queue.is_stopping() && taken_back();
            if ended || is_over && session.busy.get() == 0 {
                return Poll::Ready(Ok(()));
            }
            // what they have queued is submitted, and answers are for them
            let at_rest = session.busy.get() == 0;
            if pump.turn(at_rest)? || turn.end() || pump.has_news(cx)? {
                continue;
            }
            return Poll::Pending;
        }
        turn.end();
        // others have their turn: what goes through the runtime's ring, too
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Makes the thread's ring, which libublk keeps.
///
/// The driver's requests come as task work of this thread. With DEFER_TASKRUN it is done when the thread asks for it, and
/// the kernel does what is left of it before it takes back the commands of a process that is killed. Without, kernels as
/// late as 6.12 take the command back first, and then touch what they have freed. With TASKRUN_FLAG the ring says that
/// there is such work, and each submission sees to it.
fn make_ring(device: &UblkDev) -> Result<(), UblkError> {
    let depth = u32::from(device.dev_info.queue_depth);
    ublk_init_task_ring(|cell| {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(2 * depth).setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        let ring = builder.build(depth).map_err(UblkError::IOError)?;
        cell.set(RefCell::new(ring)).map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
}

/// The requests that come under one tag, one after the other.
async fn answer(session: &Session<'_>, tag: u16) {
    let queue = session.queue;
    let buffer = direct::buffer(queue, tag);
    let mut come = queue.submit_io_prep_cmd(tag, buffer.clone(), 0, None).await;
    loop {
        match come {
            Ok(0) => {}
            Err(UblkError::QueueIsDown) => return,
            failed => {
                let why = failed.map_or_else(|e| driver::explain(&e), |e| io::Error::from_raw_os_error(-e).to_string());
                let (queue, id) = (queue.get_qid(), session.device.dev_info.dev_id);
                return error!(
                    "queue {queue} of ublk device {id}: the driver gives no requests under tag {tag}: {why}"
                );
            }
        }
        let asked = Asked::parse(queue.get_iod(tag));
        session.pay(asked).await;
        if session.takes_no_more() {
            return; // what is not answered is asked for again by the next daemon
        }
        session.busy.update(|busy| busy + 1);
        let result = AssertUnwindSafe(session.perform(tag, asked)).catch_unwind().await;
        session.busy.update(|busy| busy - 1);
        if session.takes_no_more() {
            return;
        }
        let result = result.unwrap_or(Err(Errno::EIO)).unwrap_or_else(|e| -e.0);
        come = queue.submit_io_commit_cmd(tag, buffer.clone(), result).await;
    }
}

/// What a queue's requests are carried out on.
struct Session<'a> {
    client: &'a Client,
    geometry: Geometry,
    device: &'a UblkDev,
    queue: &'a UblkQueue<'a>,
    /// Whether it is worth while to try without a copy, for each way.
    trials: [Trial; Way::COUNT],
    /// Requests that are being carried out.
    busy: Cell<usize>,
    /// The driver holds the device still.
    is_held: Cell<bool>,
}

impl Session<'_> {
    /// Whether nothing is answered any more: the driver has taken its commands back, or is about to.
    fn takes_no_more(&self) -> bool {
        self.is_held.get() || self.queue.is_stopping()
    }

    /// Waits as long as the export's limits ask for.
    async fn pay(&self, asked: Option<Asked>) {
        let limiter = self.client.export().limiter();
        if let Some(asked) = asked.filter(|_| limiter.is_limited()) {
            limiter.pay(&self.client.connection().flow, usage_of(asked).1).await;
        }
    }

    /// Carries out a request. The bytes that were moved, or the errno for the driver.
    async fn perform(&self, tag: u16, asked: Option<Asked>) -> Result<i32, Errno> {
        let Some(asked) = asked else { return Err(Errno::ENOTSUP) };
        let connection = self.client.connection();
        connection.begin();
        let result = self.carry_out(tag, asked).await;
        connection.end(usage_of(asked).0, asked.len, result.is_ok());
        result
    }

    async fn carry_out(&self, tag: u16, asked: Asked) -> Result<i32, Errno> {
        if let Some(direction) = asked.direction()
            && direct::has_pages(self.queue, tag)
        {
            let transfer = Transfer::new(direction, asked.start, asked.len, asked.fua, &self.geometry)?;
            if let Some(done) = self.move_directly(tag, transfer).await {
                return done.map(|()| asked.len as i32); // at most MAX_REQUEST
            }
        }
        self.copy(tag, asked).await
    }

    /// Has the bytes moved without a copy. `None`: they are to be copied.
    async fn move_directly(&self, tag: u16, transfer: Transfer) -> Option<Result<(), Errno>> {
        let way = Way::of(&transfer);
        let trial = &self.trials[way as usize];
        if !trial.is_due() {
            return None;
        }
        let move_all = async |direct: &Direct<'_>| {
            let moved = direct::transfer(self.queue, tag, way, direct).await;
            trial.tell(moved);
            moved == Moved::All
        };
        let export = self.client.export();
        let done = export.submit_direct(self.client.device(), transfer, move_all).await;
        if done == Some(Ok(())) {
            self.client.connection().moved_directly();
        }
        done
    }

    /// Carries a request out with memory of ours for its data.
    async fn copy(&self, tag: u16, asked: Asked) -> Result<i32, Errno> {
        let mut op = asked.op();
        if let Op::Write(buf) = &mut op {
            self.fetch(tag, buf)?;
        }
        let request = Request::new(op, asked.start, asked.len, asked.fua, &self.geometry)?;
        let done = self.client.export().submit(&**self.client.device(), request).await;
        done.result?;
        match (asked.kind, done.buf) {
            (Kind::Read, Some(buf)) => self.store(tag, &buf),
            (Kind::Write, _) => Ok(asked.len as i32), // at most MAX_REQUEST
            _ => Ok(0),
        }
    }

    /// Copies what a request is to write out of the driver's pages.
    fn fetch(&self, tag: u16, buf: &mut PageBuf) -> Result<(), Errno> {
        let want = buf.len();
        match pread(self.pages(), buf, self.place(tag)) {
            Ok(got) if got == want => Ok(()),
            _ => Err(Errno::EIO),
        }
    }

    /// Copies what a request has read into the driver's pages.
    fn store(&self, tag: u16, buf: &PageBuf) -> Result<i32, Errno> {
        match pwrite(self.pages(), buf, self.place(tag)) {
            Ok(put) if put == buf.len() => Ok(put as i32), // at most MAX_REQUEST
            _ => Err(Errno::EIO),
        }
    }

    /// Where the pages of a tag's request are, in the character device.
    fn place(&self, tag: u16) -> i64 {
        UblkIOCtx::ublk_user_copy_pos(self.queue.get_qid(), tag, 0) as i64 // below 2^63 by the driver's definition
    }

    /// The character device.
    fn pages(&self) -> BorrowedFd<'_> {
        // SAFETY: libublk keeps this descriptor of the character device open for as long as the UblkDev lives, which
        // the borrow of `self` covers; it stands at index 0 of its table.
        unsafe { BorrowedFd::borrow_raw(self.device.tgt.fds[0]) }
    }
}

/// What a request is counted as, and what it costs.
fn usage_of(asked: Asked) -> (usage::Kind, Cost) {
    match asked.kind {
        Kind::Read => (usage::Kind::Read, Cost::data(asked.len)),
        Kind::Write => (usage::Kind::Write, Cost::data(asked.len)),
        Kind::Flush => (usage::Kind::Flush, Cost::OPERATION),
        Kind::Discard => (usage::Kind::Trim, Cost::OPERATION),
        Kind::WriteZeroes { .. } => (usage::Kind::WriteZeroes, Cost::OPERATION),
    }
}

/// Moves commands and answers of the queue's ring.
struct Pump<'a> {
    queue: &'a UblkQueue<'a>,
    /// Told of all that the ring has for the thread: work to be done, and answers.
    news: AsyncFd<EventFd>,
}

impl<'a> Pump<'a> {
    fn new(queue: &'a UblkQueue<'a>) -> io::Result<Pump<'a>> {
        // the ring's own descriptor is readable when there are answers, but not on every kernel when there is work put off
        let news = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        with_task_io_ring(|ring| ring.submitter().register_eventfd(news.as_fd().as_raw_fd()))?;
        // SAFETY: an EventFd owns its descriptor, and keeps the same one.
        let news = unsafe { AsyncFd::register_with_interest(news, Interest::READABLE) }?;
        Ok(Pump { queue, news })
    }

    /// Submits what is queued, and wakes whoever waits for answers that there are. `false`: there was nothing to do.
    ///
    /// `at_rest`: no request is under way. Who has had one answer, and one alone, may well ask for the next thing at once:
    /// that is waited for in the ring for a moment, which costs less than to go to sleep in the runtime and be woken.
    fn turn(&self, at_rest: bool) -> Result<bool, UblkError> {
        let idle = with_task_io_ring_mut(|ring| {
            if at_rest && ring.submission().len() == 1 && ring.completion().is_empty() {
                let moment = types::Timespec::new().nsec(MOMENT_NS);
                // a failure that lasts is the next submission's, too
                ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&moment)).ok();
            }
            let queued = ring.submission();
            let idle = queued.is_empty() && !queued.taskrun() && !queued.cq_overflow();
            drop(queued);
            idle && ring.completion().is_empty()
        });
        if idle {
            return Ok(false);
        }
        match self.queue.flush_and_wake_io_tasks(|data, done, _| ublk_wake_task(data, done), 0) {
            // the driver waits for no answer any more, but what was begun is ended, and files are read and written here, too
            Err(UblkError::QueueIsDown) => self.end_the_rest()?,
            Err(UblkError::IOError(e)) if passes(&e) => {}
            flushed => drop(flushed?),
        }
        Ok(true)
    }

    fn end_the_rest(&self) -> io::Result<()> {
        let done = with_task_io_ring_mut(|ring| {
            ring.submit().map(drop).or_else(|e| if passes(&e) { Ok(()) } else { Err(e) })?;
            Ok::<_, io::Error>(ring.completion().collect::<Vec<_>>())
        })?;
        done.iter().for_each(|done| ublk_wake_task(done.user_data(), done));
        Ok(())
    }

    /// Whether the ring has told of something since the last look; the task is woken when it does.
    fn has_news(&self, cx: &mut Context<'_>) -> io::Result<bool> {
        match self.news.poll_read_ready(cx) {
            // each signal is a new event, whatever its counter says
            Poll::Ready(ready) => ready.map(|mut ready| ready.clear_ready()).map(|()| true),
            Poll::Pending => Ok(false),
        }
    }
}

/// Whether what the kernel could not do now is to be tried again: it had no memory, or was interrupted.
fn passes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ENOMEM))
}
