//! Replies on their way to the socket: a queue that leaves in as few calls as possible.
//!
//! Head and payload go together, and so do replies that are ready together. Who queues does not send: the reader
//! flushes before it waits for its client, and the writer task ([`write_replies`]) flushes for requests that complete
//! while the reader waits; it runs after all of them, because they woke it. Only a large queue is flushed at once, so
//! that its buffers are reused while they are hot in the processor's cache.

use super::gauge::{Gauge, Permit};
use crate::nbd::reply::Head;
use crate::pagebuf::PageBuf;
use crate::ring::Stream;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::rc::Rc;
use tokio::sync::Notify;

/// Pieces of memory handed to the kernel in one call.
const MAX_SLICES: usize = 64;
/// Queued bytes from which waiting for more to send together gains nothing.
const FLUSH_AT: usize = 256 << 10;
/// Queued replies that fill one call.
const FLUSH_AT_REPLIES: usize = MAX_SLICES;
/// Queued bytes from which reads that come in pieces wait for the socket.
pub(super) const HIGH_WATER: usize = 1 << 20;
/// Queue entries an idle connection keeps allocated.
const IDLE_ENTRIES: usize = 16;

/// What follows a head.
pub(super) enum Payload {
    /// Nothing.
    None,
    /// Data of a read.
    Data(PageBuf),
    /// Encoded text or descriptors.
    Bytes(Vec<u8>),
}

impl Payload {
    fn as_slice(&self) -> &[u8] {
        match self {
            Payload::None => &[],
            Payload::Data(buf) => buf,
            Payload::Bytes(bytes) => bytes,
        }
    }
}

/// One reply or chunk, with the permit that is given back when the socket has taken it.
pub(super) struct Reply {
    pub(super) head: Head,
    pub(super) payload: Payload,
    pub(super) _permit: Permit,
}

impl Reply {
    fn len(&self) -> usize {
        self.head.len() + self.payload.as_slice().len()
    }
}

/// The queue of one connection, and its way out.
pub(super) struct Out {
    stream: Rc<Stream>,
    gauge: Rc<Gauge>,
    queue: RefCell<Queue>,
    /// The socket was full at the last flush.
    blocked: Cell<bool>,
    /// The reader is at work and will flush.
    attended: Cell<bool>,
    /// Wakes the writer task.
    work: Notify,
    /// Told when the queue fell below [`HIGH_WATER`].
    drained: Notify,
    /// Told when the client has stopped receiving.
    gone: Notify,
}

#[derive(Default)]
struct Queue {
    replies: VecDeque<Reply>,
    /// Bytes of the first reply the socket has taken.
    sent: usize,
    /// Bytes of all replies the socket has not taken.
    bytes: usize,
    /// Bytes the socket has taken since the beginning.
    total: u64,
    state: State,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// Nothing more will be queued; the writer ends when the queue is empty.
    Closed,
    /// The client does not receive any more; replies are dropped.
    Failed,
}

/// How a flush ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// The queue is empty.
    Empty,
    /// The socket is full; the writer task goes on when it is not.
    Full,
    /// The client does not receive any more.
    Failed,
}

impl Out {
    /// An empty queue before a socket.
    pub(super) fn new(stream: Rc<Stream>, gauge: Rc<Gauge>) -> Self {
        Out {
            stream,
            gauge,
            queue: RefCell::default(),
            blocked: Cell::new(false),
            attended: Cell::new(false),
            work: Notify::new(),
            drained: Notify::new(),
            gone: Notify::new(),
        }
    }

    /// Queues a reply. It leaves with the next flush, which this sees to.
    pub(super) fn push(&self, reply: Reply) {
        let large = {
            let mut q = self.queue.borrow_mut();
            if q.state == State::Failed {
                return;
            }
            q.bytes += reply.len();
            q.replies.push_back(reply);
            q.bytes >= FLUSH_AT || q.replies.len() >= FLUSH_AT_REPLIES
        };
        if large {
            self.flush();
        } else if !self.attended.get() {
            self.work.notify_one();
        }
    }

    /// Sends what the socket takes now.
    pub(super) fn flush(&self) -> Flushed {
        let mut q = self.queue.borrow_mut();
        let (was_high, before) = (q.bytes >= HIGH_WATER, q.total);
        let flushed = loop {
            if q.state == State::Failed {
                break Flushed::Failed;
            }
            if q.replies.is_empty() {
                break Flushed::Empty;
            }
            match q.send(&self.stream) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Flushed::Full,
                Err(_) => {
                    q.fail();
                    break Flushed::Failed;
                }
            }
        };
        let is_high = q.bytes >= HIGH_WATER;
        let (left, sent) = (q.bytes, (q.total - before) as usize);
        drop(q);
        if was_high && !is_high {
            self.drained.notify_waiters();
        }
        let full = flushed == Flushed::Full;
        // who reads as fast as it is answered is not accounted for
        if self.blocked.replace(full) || full {
            self.gauge.account().sending(left);
            self.gauge.account().moved(sent);
        }
        match flushed {
            Flushed::Full => self.work.notify_one(),
            Flushed::Failed => self.gone.notify_waiters(),
            Flushed::Empty => {}
        }
        flushed
    }

    /// Says whether the reader is at work, and so will flush what is queued.
    pub(super) fn attend(&self, attended: bool) {
        self.attended.set(attended);
    }

    /// Whether more pieces of large reads should be queued.
    pub(super) fn takes_more(&self) -> bool {
        let q = self.queue.borrow();
        q.bytes < HIGH_WATER && q.state != State::Failed
    }

    /// Waits until the queue is short enough to queue more pieces of large reads, or replies are dropped anyway.
    pub(super) async fn below_high_water(&self) {
        while self.queue.borrow().bytes >= HIGH_WATER {
            self.drained.notified().await;
        }
    }

    /// Drops what is queued and all that will be: the client does not receive.
    pub(super) fn fail(&self) {
        self.queue.borrow_mut().fail();
        self.gauge.account().sending(0);
        self.drained.notify_waiters();
        self.gone.notify_waiters();
        self.work.notify_one();
    }

    /// Whether the client has stopped receiving.
    pub(super) fn has_failed(&self) -> bool {
        self.queue.borrow().state == State::Failed
    }

    /// Completes when the client has stopped receiving.
    pub(super) async fn gone(&self) {
        while !self.has_failed() {
            self.gone.notified().await;
        }
    }

    /// Lets the writer task end when the queue is empty.
    pub(super) fn close(&self) {
        let mut q = self.queue.borrow_mut();
        if q.state == State::Open {
            q.state = State::Closed;
        }
        self.work.notify_one();
    }

    /// Bytes queued, and bytes the socket has taken since the beginning.
    pub(super) fn progress(&self) -> (usize, u64) {
        let q = self.queue.borrow();
        (q.bytes, q.total)
    }

    /// Gives back memory a busy time needed.
    pub(super) fn trim(&self) {
        let mut q = self.queue.borrow_mut();
        if q.replies.is_empty() && q.replies.capacity() > IDLE_ENTRIES {
            q.replies = VecDeque::new();
        }
    }

    fn is_over(&self) -> bool {
        self.queue.borrow().state != State::Open
    }
}

impl Queue {
    /// One call with as many replies as fit.
    fn send(&mut self, stream: &Stream) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut count = 0;
        let mut skip = self.sent;
        'fill: for reply in &self.replies {
            for part in [&reply.head[..], reply.payload.as_slice()] {
                let (taken, rest) = part.split_at(skip.min(part.len()));
                skip -= taken.len();
                if rest.is_empty() {
                    continue;
                }
                if count == MAX_SLICES {
                    break 'fill;
                }
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        }
        match stream.try_write_vectored(&slices[..count])? {
            0 => Err(io::ErrorKind::WriteZero.into()),
            n => {
                self.advance(n);
                Ok(())
            }
        }
    }

    /// Lets go of the first `n` bytes.
    fn advance(&mut self, n: usize) {
        self.bytes -= n;
        self.total += n as u64;
        self.sent += n;
        while let Some(first) = self.replies.front() {
            let len = first.len();
            if self.sent < len {
                break;
            }
            self.sent -= len;
            self.replies.pop_front();
        }
    }

    fn fail(&mut self) {
        self.state = State::Failed;
        self.replies.clear();
        self.bytes = 0;
        self.sent = 0;
    }
}

/// The writer task: flushes when replies are queued that nobody else flushes. Ends after [`Out::close`] with an empty
/// queue, or when the client does not receive any more.
///
/// It has no part in the session: an image whose last client has gone is not to wait for it.
pub(super) async fn write_replies(out: Rc<Out>) {
    loop {
        match out.flush() {
            Flushed::Empty if out.is_over() => return,
            Flushed::Empty => out.work.notified().await,
            Flushed::Full => {
                // Woken also by `fail`: a client that takes nothing must not keep this task.
                let failed = async {
                    while !out.has_failed() {
                        out.work.notified().await;
                    }
                };
                tokio::select! {
                    ready = out.stream.writable() => if ready.is_err() { out.fail() },
                    () = failed => {}
                }
            }
            Flushed::Failed => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::Replies;
    use crate::nbd::reply::Answer;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn head(cookie: u64) -> Head {
        Answer { replies: Replies::Simple, cookie, offset: 0 }.success(true)
    }

    fn queued(gauge: &Rc<Gauge>, cookie: u64, data: Option<&[u8]>) -> Reply {
        let payload = data.map_or(Payload::None, |data| Payload::Data(PageBuf::copy_of(data)));
        let permit = gauge.try_request(data.map_or(0, <[u8]>::len)).unwrap();
        Reply { head: head(cookie), payload, _permit: permit }
    }

    #[test]
    fn replies_ready_together_arrive_in_order_and_free_their_permits() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        crate::ring::run(async {
            let gauge = Gauge::alone();
            let out = Out::new(Rc::new(Stream::from_std(ours).unwrap()), Rc::clone(&gauge));
            out.attend(true);
            for cookie in 0..100 {
                out.push(queued(&gauge, cookie, (cookie % 2 == 0).then_some(&[cookie as u8; 10])));
            }
            assert_eq!(out.flush(), Flushed::Empty);
            assert!(gauge.is_idle());
        })
        .unwrap();
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        let mut expected = Vec::new();
        for cookie in 0..100 {
            expected.extend_from_slice(&head(cookie));
            expected.extend(std::iter::repeat_n(cookie as u8, if cookie % 2 == 0 { 10 } else { 0 }));
        }
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_full_socket_keeps_the_rest_until_it_is_read() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        crate::ring::run(async {
            let gauge = Gauge::alone();
            let out = Out::new(Rc::new(Stream::from_std(ours).unwrap()), Rc::clone(&gauge));
            let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
            out.push(queued(&gauge, 1, Some(&data)));
            assert!(!out.takes_more() && !gauge.is_idle());
            let mut bytes = Vec::new();
            while bytes.len() < 16 + data.len() {
                match theirs.read_to_end(&mut bytes) {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    other => panic!("{other:?}"),
                }
                out.stream.writable().await.unwrap();
                out.flush();
            }
            assert_eq!(bytes[16..], data);
            assert!(out.takes_more() && gauge.is_idle());
        })
        .unwrap();
    }

    #[test]
    fn a_client_that_left_frees_everything() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        crate::ring::run(async {
            let gauge = Gauge::alone();
            let out = Out::new(Rc::new(Stream::from_std(ours).unwrap()), Rc::clone(&gauge));
            out.push(queued(&gauge, 1, Some(b"data")));
            assert!(!gauge.is_idle());
            assert_eq!(out.flush(), Flushed::Failed);
            out.push(queued(&gauge, 2, None));
            assert!(gauge.is_idle() && out.has_failed() && !out.takes_more());
        })
        .unwrap();
    }
}
