//! The reader of one connection: takes requests off the socket and starts them, never waiting for one to complete.
//!
//! A request's future is polled once where it is. What the page cache can answer is done then, without a task; the
//! others become tasks that run to completion whatever happens to the connection. The reader stops reading when too
//! much is in flight ([`super::gauge`]), and flushes replies before it waits for anything.

use super::budget::SHARE;
use super::gauge::Permit;
use super::input::Input;
use super::pace::cost;
use super::perform::{self, COMPRESSED_WRITE_PIECE, PieceWrite, READ_PIECE, WRITE_PIECE, cut, memory_of};
use super::session::{Session, Ticket};
use crate::block::{Errno, Op, Request, ZeroFlags};
use crate::export::limiter::Cost;
use crate::nbd::handshake::Replies;
use crate::nbd::request::{Command, Header, Violation, status_query};
use crate::pagebuf::PageBuf;
use crate::ring;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::timeout;
use tracing::trace;

/// Requests after which the other connections of this worker get their turn.
const TURN: u32 = 256;
/// How long a request waits for its export's limits before its client is looked after.
const LOOK: Duration = Duration::from_secs(1);
/// The rest of a payload, in bytes, up to which it is received together with the requests behind it.
const SMALL_REST: usize = 8 << 10;

/// Why no more requests are read.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    #[error("client disconnected")]
    Disconnected,
    #[error("client closed the connection without saying so")]
    Closed,
    #[error("client closed the connection in the middle of a message")]
    Truncated,
    #[error("server is shutting down")]
    Shutdown,
    #[error("the connection was ended on request")]
    Ended,
    #[error("client takes no replies")]
    Deaf,
    #[error("client sent no request for the time that `idletimeout` allows")]
    Idle,
    #[error("client kept memory that others waited for, and hardly moved; see `maxmemory`")]
    Stalled,
    #[error("protocol violation: {0}")]
    Violation(#[from] Violation),
    #[error("connection failed: {0}")]
    Failed(#[from] io::Error),
    #[error("internal error, see the log")]
    Panicked,
}

/// The reader.
pub(super) struct Reader<'a> {
    session: &'a Rc<Session>,
    input: Input,
    /// Ready when no more requests are to be read, with the reason.
    stop: Pin<&'a mut dyn Future<Output = End>>,
    turn: u32,
    /// Nothing of a request was taken that was not started.
    between: bool,
}

impl<'a> Reader<'a> {
    /// A reader that begins with bytes received during the handshake.
    pub(super) fn new(session: &'a Rc<Session>, rest: &[u8], stop: Pin<&'a mut dyn Future<Output = End>>) -> Self {
        Reader { session, input: Input::beginning_with(rest), stop, turn: 0, between: true }
    }

    /// Reads requests and starts them until there is a reason to end. Also returns what was received and not looked at, if
    /// it begins with a request.
    pub(super) async fn run(mut self) -> (End, Option<Input>) {
        self.session.out.attend(true);
        let Err(end) = self.requests().await;
        self.session.out.attend(false);
        (end, self.between.then_some(self.input))
    }

    async fn requests(&mut self) -> Result<Infallible, End> {
        loop {
            while let Some(header) = self.input.take_header(self.session.agreed.replies) {
                self.between = false;
                self.request(header?).await?;
                self.between = true;
                if !self.session.out.takes_more() {
                    // while the processor's cache still holds what was read, and so that its buffers are used again
                    self.flush()?;
                }
            }
            let midway = self.input.len() > 0;
            if !self.input.is_full() {
                self.flush()?;
            }
            match self.receive().await? {
                0 if midway => return Err(End::Truncated),
                0 => return Err(End::Closed),
                _ => {}
            }
        }
    }

    async fn request(&mut self, header: Header) -> Result<(), End> {
        trace!(?header, "request");
        self.turn += 1;
        if self.turn >= TURN {
            self.turn = 0;
            self.wait(ring::yield_now()).await?;
        }
        let Header { offset, length, .. } = header;
        let fua = header.fua();
        let command = match header.command(&self.session.agreed).and_then(|c| self.judge(c, &header)) {
            Ok(command) => command,
            Err(e) => return self.refuse(header, e).await,
        };
        let chunks = self.session.agreed.replies != Replies::Simple;
        let pieces = chunks && length as usize > READ_PIECE;
        match command {
            // these pay as they go on
            Command::Disc | Command::Write => {}
            Command::Read { whole: false } if pieces => {}
            command => self.pay(cost(&command, length)).await?,
        }
        match command {
            Command::Disc => return Err(End::Disconnected),
            Command::Write => return self.write(header).await,
            Command::Read { whole: false } if pieces => {
                let ticket = self.ticket(&header, 0).await?;
                self.start(perform::read_in_pieces(ticket, offset, length as usize)).await;
            }
            Command::Read { whole } => {
                let ticket = self.ticket(&header, memory_of(length as usize)).await?;
                self.start(perform::read(ticket, offset, length as usize, fua, chunks && !whole)).await;
            }
            Command::BlockStatus { one, filter: false } => {
                let ticket = self.ticket(&header, 0).await?;
                let all = (0..self.session.contexts.len()).collect();
                self.start(perform::block_status(ticket, offset, length, one, all)).await;
            }
            Command::BlockStatus { one, filter: true } => return self.filtered_status(header, one).await,
            Command::Flush => self.effect(header, Op::Flush).await?,
            Command::Trim => self.effect(header, Op::Discard).await?,
            Command::Cache => self.effect(header, Op::Cache).await?,
            Command::WriteZeroes(how) => self.effect(header, Op::WriteZeroes(how)).await?,
        }
        Ok(())
    }

    /// Refuses what the device would refuse before memory is taken for it. A cache request has the rules of a read
    /// and zeroing those of a write, and neither needs a buffer.
    fn judge(&self, command: Command, header: &Header) -> Result<Command, Errno> {
        let op = match command {
            Command::Read { .. } => Op::Cache,
            Command::Write => Op::WriteZeroes(ZeroFlags::default()),
            _ => return Ok(command),
        };
        Request::new(op, header.offset, header.length, false, &self.session.geometry).map(|_| command)
    }

    async fn refuse(&mut self, header: Header, e: Errno) -> Result<(), End> {
        // what is swallowed was moved, too
        let cost = if header.payload { Cost::data(header.payload_len() as u64) } else { Cost::OPERATION };
        self.pay(cost).await?;
        let permit = self.permit(0).await?;
        self.skip(header.payload_len()).await?;
        Ticket::new(self.session, &header, permit).fail(e);
        Ok(())
    }

    /// A block status request whose payload says in which contexts.
    async fn filtered_status(&mut self, header: Header, one: bool) -> Result<(), End> {
        let permit = self.permit(memory_of(header.payload_len())).await?;
        let payload = self.payload(header.payload_len()).await?;
        let ticket = Ticket::new(self.session, &header, permit);
        match status_query(&payload, &self.session.agreed.contexts) {
            Ok((len, wanted)) => {
                self.start(perform::block_status(ticket, header.offset, len, one, wanted)).await;
            }
            Err(e) => ticket.fail(e),
        }
        Ok(())
    }

    async fn effect(&mut self, header: Header, op: Op) -> Result<(), End> {
        let ticket = self.ticket(&header, 0).await?;
        self.start(perform::effect(ticket, op, header.offset, header.length, header.fua())).await;
        Ok(())
    }

    async fn write(&mut self, header: Header) -> Result<(), End> {
        let len = header.payload_len();
        let piece = match self.session.export.config().image.compress {
            None => WRITE_PIECE,
            Some(_) => COMPRESSED_WRITE_PIECE,
        };
        // A write that must be durable stays whole: it is to be synced once.
        if len <= piece || header.fua() {
            self.pay(Cost::data(len as u64)).await?;
            let permit = self.permit(memory_of(len)).await?;
            let buf = self.payload(len).await?;
            let ticket = Ticket::new(self.session, &header, permit);
            self.start(perform::write(ticket, header.offset, buf, header.fua())).await;
            return Ok(());
        }
        let ticket = self.ticket(&header, 0).await?;
        let piece = self.session.gauge.piece(piece);
        let whole = Rc::new(PieceWrite::new(ticket, len));
        for (offset, len) in cut(header.offset, len, piece) {
            if whole.has_failed() {
                self.skip(len).await?;
                continue;
            }
            self.pay(Cost::data(len as u64)).await?;
            let memory = self.memory(memory_of(len)).await?;
            let buf = self.payload(len).await?;
            self.start(perform::write_piece(Rc::clone(&whole), Rc::clone(self.session), offset, buf, memory)).await;
        }
        whole.received();
        Ok(())
    }

    /// Polls a request once, and makes it a task if it has to wait. A panic in it is its own: its ticket answers.
    fn start(&mut self, request: impl Future<Output = ()> + 'static) -> impl Future<Output = ()> {
        // boxed before it becomes part of another future: an idle connection would keep room for the largest of them
        let mut request: Pin<Box<dyn Future<Output = ()>>> = Box::pin(request);
        async move {
            let waits = poll_fn(|cx| {
                let polled = catch_unwind(AssertUnwindSafe(|| request.as_mut().poll(cx)));
                Poll::Ready(matches!(polled, Ok(Poll::Pending)))
            });
            if waits.await {
                ring::spawn(request);
            }
        }
    }

    /// A ticket for a request without payload that takes `bytes` of memory, when there is room for it.
    async fn ticket(&mut self, header: &Header, bytes: usize) -> Result<Ticket, End> {
        let permit = self.permit(bytes).await?;
        Ok(Ticket::new(self.session, header, permit))
    }

    /// A permit for a request that takes `bytes` of memory, when there is room for it.
    async fn permit(&mut self, bytes: usize) -> Result<Permit, End> {
        let session = self.session;
        match session.gauge.try_request(bytes) {
            Some(permit) => Ok(permit),
            // boxed, here and below: an idle connection does not keep room for what is rare
            None => self.wait(Box::pin(session.gauge.request(bytes))).await,
        }
    }

    /// Waits until the export's limits allow what this costs.
    async fn pay(&mut self, cost: Cost) -> Result<(), End> {
        let pace = &self.session.pace;
        if pace.is_free() {
            return Ok(());
        }
        let mut paid = Box::pin(pace.pay(cost));
        while self.wait(timeout(LOOK, &mut paid)).await?.is_err() {
            if self.session.stream.is_gone() {
                return Err(End::Closed);
            }
        }
        Ok(())
    }

    async fn memory(&mut self, bytes: usize) -> Result<Permit, End> {
        let session = self.session;
        match session.gauge.try_memory(bytes) {
            Some(permit) => Ok(permit),
            None => self.wait(Box::pin(session.gauge.memory(bytes))).await,
        }
    }

    /// Receives `len` bytes of payload: what the small buffer holds is copied, the rest goes straight to its place.
    async fn payload(&mut self, len: usize) -> Result<PageBuf, End> {
        let mut buf = PageBuf::new(len);
        let mut got = self.input.take_into(&mut buf);
        let mut waited = false;
        while got < len {
            if len - got <= SMALL_REST {
                if self.receive().await? == 0 {
                    return Err(End::Truncated);
                }
                got += self.input.take_into(&mut buf[got..]);
                continue;
            }
            match self.session.stream.try_read(&mut buf[got..]) {
                Ok(0) => return Err(End::Truncated),
                Ok(n) => {
                    got += n;
                    if waited {
                        self.session.gauge.account().moved(n);
                    }
                }
                Err(e) => {
                    if len > SHARE {
                        waited = true;
                        self.session.gauge.account().receiving(len);
                    }
                    self.readable_after(e).await?;
                }
            }
        }
        if waited {
            self.session.gauge.account().receiving(0);
        }
        Ok(buf)
    }

    /// Receives `len` bytes and forgets them.
    async fn skip(&mut self, len: usize) -> Result<(), End> {
        let mut left = len - self.input.skip(len);
        while left > 0 {
            if self.receive().await? == 0 {
                return Err(End::Truncated);
            }
            left -= self.input.skip(left);
        }
        Ok(())
    }

    /// Receives what is there into the small buffer, waiting until something is; zero at the end of the stream.
    async fn receive(&mut self) -> Result<usize, End> {
        loop {
            match self.input.receive(&self.session.stream) {
                Ok(n) => return Ok(n),
                Err(e) => self.readable_after(e).await?,
            }
        }
    }

    /// Waits for the socket if `e` says so, else ends with it.
    async fn readable_after(&mut self, e: io::Error) -> Result<(), End> {
        if e.kind() != io::ErrorKind::WouldBlock {
            return Err(e.into());
        }
        self.input.release();
        let session = self.session;
        if session.gauge.is_idle() {
            session.out.trim();
        }
        Ok(self.wait(session.stream.readable()).await??)
    }

    /// Waits for `future`, with nothing left unsent that could be sent.
    async fn wait<T>(&mut self, future: impl Future<Output = T>) -> Result<T, End> {
        self.flush()?;
        self.session.out.attend(false);
        let outcome = tokio::select! {
            biased;
            end = &mut self.stop => Err(end),
            value = future => Ok(value),
        };
        self.session.out.attend(true);
        outcome
    }

    fn flush(&self) -> Result<(), End> {
        self.session.out.flush();
        if self.session.out.has_failed() { Err(End::Deaf) } else { Ok(()) }
    }
}
