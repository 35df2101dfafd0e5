//! What the reader, the requests and the writer of one connection share, and how a request gets its one answer.

use super::gauge::{Gauge, Permit};
use super::out::{Out, Payload, Reply};
use super::pace::Pace;
use crate::block::{Completion, Context, Errno, Geometry, Op, Request};
use crate::export::service::Export;
use crate::export::usage::{Connection, Kind};
use crate::image::Device;
use crate::nbd::handshake::{Agreed, Replies};
use crate::nbd::reply::Answer;
use crate::nbd::{
    NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, reply,
    request,
};
use crate::pagebuf::PageBuf;
use crate::ring::Stream;
use std::rc::Rc;
use std::sync::Arc;
use tracing::trace;

/// One connection in the transmission phase.
pub(super) struct Session {
    pub(super) stream: Rc<Stream>,
    pub(super) export: Arc<Export>,
    pub(super) device: Rc<Device>,
    pub(super) geometry: Geometry,
    pub(super) agreed: Agreed,
    /// What the selected contexts of the agreement stand for, in its order. `None`: what it was has gone since.
    pub(super) contexts: Vec<Option<Context>>,
    pub(super) out: Rc<Out>,
    pub(super) gauge: Rc<Gauge>,
    pub(super) pace: Rc<Pace>,
    /// Where its requests are counted.
    pub(super) connection: Arc<Connection>,
}

impl Session {
    /// Validates and carries out one request, or a piece of one. A range of no bytes is validated and succeeds with
    /// nothing done; a flush has no range and is always carried out.
    pub(super) async fn submit(&self, op: Op, offset: u64, len: u64, fua: bool) -> Completion {
        let nothing = len == 0 && !matches!(op, Op::Flush);
        match Request::new(op, offset, len, fua, &self.geometry) {
            Ok(_) if nothing => Completion { result: Ok(()), buf: None, runs: Vec::new() },
            Ok(request) => self.export.submit(&*self.device, request).await,
            Err(e) => Completion { result: Err(e), buf: None, runs: Vec::new() },
        }
    }
}

/// An open request: exactly one answer will be given for it.
///
/// Dropping it unanswered (the request's task panicked) answers EIO, so no client waits for ever.
#[must_use = "dropping an unanswered ticket answers EIO"]
pub(super) struct Ticket {
    session: Rc<Session>,
    to: Answer,
    kind: Kind,
    len: u64,
    /// `None` once answered.
    permit: Option<Permit>,
}

impl Ticket {
    pub(super) fn new(session: &Rc<Session>, header: &request::Header, permit: Permit) -> Self {
        session.connection.begin();
        let to = Answer { replies: session.agreed.replies, cookie: header.cookie, offset: header.offset };
        Ticket { session: Rc::clone(session), to, kind: kind(header.kind), len: header.length, permit: Some(permit) }
    }

    pub(super) fn session(&self) -> &Rc<Session> {
        &self.session
    }

    /// Success without payload.
    pub(super) fn succeed(mut self) {
        self.count(true);
        let head = self.to.success(self.kind == Kind::Read);
        self.answer(head, Payload::None);
    }

    /// The error `e`.
    pub(super) fn fail(mut self, e: Errno) {
        self.answer_error(e);
    }

    /// The error `e`, which came up at `offset`.
    pub(super) fn fail_at(mut self, e: Errno, offset: u64) {
        match self.to.replies {
            Replies::Simple => self.answer_error(e),
            _ => self.answer_failed(e, self.to.error_at(true, e, offset)),
        }
    }

    /// The errno of `result`, or success without payload.
    pub(super) fn finish(self, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.succeed(),
            Err(e) => self.fail(e),
        }
    }

    /// All data of a read, `buf` not empty.
    pub(super) fn data(mut self, offset: u64, buf: PageBuf) {
        self.count(true);
        let head = self.to.last_data(offset, buf.len());
        self.answer(head, Payload::Data(buf));
    }

    /// A part of the data of a read, `buf` not empty; more will follow. `permit` stands for the buffer.
    pub(super) fn piece(&self, offset: u64, buf: PageBuf, permit: Permit) {
        self.send(self.to.data(offset, buf.len()), Payload::Data(buf), permit);
    }

    /// The last part of the data of a read, `buf` not empty.
    pub(super) fn last_piece(mut self, offset: u64, buf: PageBuf, permit: Permit) {
        if let Some(own) = &mut self.permit {
            own.join(permit);
        }
        self.data(offset, buf);
    }

    /// A part of a read that is all zeroes; more will follow.
    pub(super) fn hole(&self, offset: u64, len: u32, permit: Permit) {
        self.send(self.to.hole(false, offset, len), Payload::None, permit);
    }

    /// The last part of a read, or all of it, is all zeroes.
    pub(super) fn last_hole(mut self, offset: u64, len: u32) {
        self.count(true);
        if let Some(permit) = &mut self.permit {
            permit.shrink(0);
        }
        self.answer(self.to.hole(true, offset, len), Payload::None);
    }

    /// Status in one context; more will follow. `permit` stands for its memory.
    pub(super) fn status(&self, (head, descriptors): (reply::Head, Vec<u8>), mut permit: Permit) {
        permit.shrink(descriptors.len());
        self.send(head, Payload::Bytes(descriptors), permit);
    }

    /// The last of the status.
    pub(super) fn last_status(mut self, (head, descriptors): (reply::Head, Vec<u8>), mut permit: Permit) {
        self.count(true);
        permit.shrink(descriptors.len());
        if let Some(own) = &mut self.permit {
            own.join(permit);
        }
        self.answer(head, Payload::Bytes(descriptors));
    }

    /// No answer: the request was not received whole, and the client has gone or will be told so by the close.
    pub(super) fn forget(mut self) {
        self.count(false);
        self.permit = None;
    }

    /// How the request is answered.
    pub(super) fn to(&self) -> Answer {
        self.to
    }

    fn answer_error(&mut self, e: Errno) {
        self.answer_failed(e, self.to.error(e));
    }

    fn answer_failed(&mut self, e: Errno, (head, tail): (reply::Head, Vec<u8>)) {
        self.count(false);
        trace!(cookie = self.to.cookie, error = %e, "request failed");
        self.answer(head, Payload::Bytes(tail));
    }

    fn answer(&mut self, head: reply::Head, payload: Payload) {
        let permit = self.permit.take().expect("a request is answered once");
        self.send(head, payload, permit);
    }

    fn send(&self, head: reply::Head, payload: Payload, permit: Permit) {
        self.session.out.push(Reply { head, payload, _permit: permit });
    }

    fn count(&self, succeeded: bool) {
        self.session.connection.end(self.kind, self.len, succeeded);
    }
}

/// How requests of a type are counted. Those of unknown types fail, whatever they count as.
fn kind(of: u16) -> Kind {
    match of {
        NBD_CMD_WRITE => Kind::Write,
        NBD_CMD_WRITE_ZEROES => Kind::WriteZeroes,
        NBD_CMD_TRIM => Kind::Trim,
        NBD_CMD_FLUSH => Kind::Flush,
        NBD_CMD_BLOCK_STATUS => Kind::BlockStatus,
        NBD_CMD_CACHE => Kind::Cache,
        _ => Kind::Read,
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.permit.is_some() {
            self.answer_error(Errno::EIO);
        }
    }
}
