//! What the reader, the requests and the writer of one connection share, and how a request gets its one answer.

use super::gauge::{Gauge, Permit};
use super::out::{Out, Payload, Reply};
use super::pace::Pace;
use crate::block::{Completion, Errno, Geometry, Op, Request};
use crate::export::service::Export;
use crate::export::usage::{Connection, Kind};
use crate::image::Device;
use crate::nbd::handshake::Agreed;
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
    pub(super) out: Rc<Out>,
    pub(super) gauge: Rc<Gauge>,
    pub(super) pace: Pace,
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
    cookie: u64,
    kind: Kind,
    len: u32,
    /// `None` once answered.
    permit: Option<Permit>,
}

impl Ticket {
    pub(super) fn new(session: &Rc<Session>, header: &request::Header, permit: Permit) -> Self {
        session.connection.begin();
        let (cookie, len, kind) = (header.cookie, header.length, kind(header.kind));
        Ticket { session: Rc::clone(session), cookie, kind, len, permit: Some(permit) }
    }

    pub(super) fn session(&self) -> &Rc<Session> {
        &self.session
    }

    /// Success without payload.
    pub(super) fn succeed(mut self) {
        self.count(true);
        let head = if self.kind == Kind::Read && self.session.agreed.structured {
            reply::none(self.cookie)
        } else {
            reply::simple(self.cookie, Ok(()))
        };
        self.answer(head, Payload::None);
    }

    /// The error `e`.
    pub(super) fn fail(mut self, e: Errno) {
        self.answer_error(e);
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
        let head = if self.session.agreed.structured {
            reply::offset_data(self.cookie, offset, buf.len(), true)
        } else {
            reply::simple(self.cookie, Ok(()))
        };
        self.answer(head, Payload::Data(buf));
    }

    /// A part of the data of a read, `buf` not empty; more will follow. `permit` stands for the buffer.
    pub(super) fn piece(&self, offset: u64, buf: PageBuf, permit: Permit) {
        let head = reply::offset_data(self.cookie, offset, buf.len(), false);
        self.send(head, Payload::Data(buf), permit);
    }

    /// The last part of the data of a read, `buf` not empty.
    pub(super) fn last_piece(mut self, offset: u64, buf: PageBuf, permit: Permit) {
        if let Some(own) = &mut self.permit {
            own.join(permit);
        }
        self.data(offset, buf);
    }

    /// A structured reply of one chunk.
    pub(super) fn chunk(mut self, head: reply::Head, payload: Vec<u8>) {
        self.count(true);
        if let Some(permit) = &mut self.permit {
            permit.shrink(payload.len());
        }
        self.answer(head, Payload::Bytes(payload));
    }

    /// No answer: the request was not received whole, and the client has gone or will be told so by the close.
    pub(super) fn forget(mut self) {
        self.count(false);
        self.permit = None;
    }

    /// The client's name for the request.
    pub(super) fn cookie(&self) -> u64 {
        self.cookie
    }

    fn answer_error(&mut self, e: Errno) {
        self.count(false);
        trace!(cookie = self.cookie, error = %e, "request failed");
        if self.session.agreed.structured {
            let (head, message) = reply::error(self.cookie, e);
            self.answer(head, Payload::Bytes(message));
        } else {
            self.answer(reply::simple(self.cookie, Err(e)), Payload::None);
        }
    }

    fn answer(&mut self, head: reply::Head, payload: Payload) {
        let permit = self.permit.take().expect("a request is answered once");
        self.send(head, payload, permit);
    }

    fn send(&self, head: reply::Head, payload: Payload, permit: Permit) {
        self.session.out.push(Reply { head, payload, _permit: permit });
    }

    fn count(&self, succeeded: bool) {
        self.session.connection.end(self.kind, u64::from(self.len), succeeded);
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
