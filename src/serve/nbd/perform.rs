//! Carrying out requests: each is one future that ends with the one answer to its ticket.
//!
//! Large reads and writes are done in pieces: small buffers that are reused while the processor's cache still holds
//! them, the first piece under way while the next is received or read.

use super::gauge::Permit;
use super::out::HIGH_WATER;
use super::session::{Session, Ticket};
use crate::block::{Completion, Context, Errno, Op, Run};
use crate::export::limiter::Cost;
use crate::nbd::MAX_DESCRIPTORS;
use crate::pagebuf::{PAGE, PageBuf, is_zero};
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::cell::Cell;
use std::rc::Rc;

/// Bytes of a piece of a large read.
pub(super) const READ_PIECE: usize = 256 << 10;
/// Pieces of one read under way at a time when the storage does not answer at once.
const READ_AHEAD: usize = 4;
/// Bytes of a piece of a large write.
pub(super) const WRITE_PIECE: usize = 1 << 20;
/// The same where full clusters are compressed: no cluster, however large, is cut in two.
pub(super) const COMPRESSED_WRITE_PIECE: usize = 2 << 20;
/// Extents shorter than this are not expected when memory for a status reply is set aside, in bytes.
const SHORT_EXTENT: u64 = 4096;
/// Memory of one extent on its way through the daemon, in bytes.
const EXTENT_MEMORY: usize = 32;
/// Zeroes of fewer bytes than these are sent like data in a large read: a chunk of their own would cost as much.
const MIN_HOLE: u64 = 32 << 10;
/// Runs of data and zeroes that are told apart in one large read.
const MAX_HOLES: usize = 256;

// A queue held back at its limit must still have room for a whole piece, or large reads would send one at a time.
const _: () = assert!(HIGH_WATER >= 2 * READ_PIECE);

/// The memory a `PageBuf` of `len` bytes takes.
pub(super) fn memory_of(len: usize) -> usize {
    len.max(PAGE).next_power_of_two()
}

/// The most memory a status of `len` bytes is expected to take.
fn status_memory(len: u64) -> usize {
    usize::try_from(len / SHORT_EXTENT).map_or(MAX_DESCRIPTORS, |n| (n + 1).min(MAX_DESCRIPTORS)) * EXTENT_MEMORY
}

/// `len` bytes from `offset` in pieces that end at multiples of `piece`.
pub(super) fn cut(offset: u64, len: usize, piece: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut next = offset;
    let end = offset + len as u64;
    std::iter::from_fn(move || {
        if next == end {
            return None;
        }
        let at = next;
        next = end.min((at / piece as u64 + 1) * piece as u64);
        Some((at, (next - at) as usize))
    })
}

/// A read answered with all its data at once. The ticket holds the permit for the buffer. `holes`: data that is all
/// zeroes may be sent as the hole it may be.
pub(super) async fn read(ticket: Ticket, offset: u64, len: usize, fua: bool, holes: bool) {
    if len == 0 {
        return ticket.succeed();
    }
    match read_bytes(ticket.session(), offset, len, fua).await {
        Ok(buf) if holes && is_zero(&buf) => ticket.last_hole(offset, len as u32),
        Ok(buf) => ticket.data(offset, buf),
        Err(e) => ticket.fail(e),
    }
}

/// A read answered in pieces, each with its own permit, in the order in which they are ready. What is known to be zeroes
/// is not read.
pub(super) async fn read_in_pieces(ticket: Ticket, offset: u64, len: usize) {
    let session = Rc::clone(ticket.session());
    let parts = parts_of(&session, offset, len).await;
    if parts.data.is_empty() {
        // else the pieces pay
        if let Err(e) = session.pace.pay_piece(Cost::OPERATION, &session.out).await {
            return ticket.fail(e);
        }
    }
    let mut unsent = len;
    for &(at, len) in &parts.holes {
        unsent -= len as usize;
        if unsent == 0 {
            return ticket.last_hole(at, len);
        }
        ticket.hole(at, len, session.gauge.memory(0).await);
    }
    let mut pieces = parts.data.into_iter().flat_map(|(at, len)| cut(at, len, READ_PIECE));
    let mut running = FuturesUnordered::new();
    let mut outcome = Ok(());
    loop {
        if running.is_empty() {
            session.out.below_high_water().await;
        }
        // The next piece starts only when those before it have to wait for the storage, not when they wait for the
        // socket: then their buffers will do for it too.
        let more = outcome.is_ok() && session.out.takes_more() && running.len() < READ_AHEAD;
        let started = match if more { pieces.next() } else { None } {
            Some((at, len)) => {
                running.push(read_piece(&session, at, len));
                true
            }
            None => false,
        };
        let ended = match running.next().now_or_never() {
            Some(ended) => ended,
            None if started => continue,
            None => running.next().await,
        };
        match ended {
            Some((at, Ok((buf, permit)))) => {
                unsent -= buf.len();
                match outcome {
                    Ok(()) if unsent == 0 => return ticket.last_piece(at, buf, permit),
                    Ok(()) => ticket.piece(at, buf, permit),
                    // After an error further content may be left out.
                    Err(_) => {}
                }
            }
            Some((at, Err(e))) => outcome = outcome.and(Err((e, at))),
            // The client receives no answer any more, or one piece failed and the others have ended.
            None => {
                let (e, at) = outcome.err().unwrap_or((Errno::EIO, offset));
                return ticket.fail_at(e, at);
            }
        }
    }
}

/// What a large read consists of, in bytes of the disk: offset and length of each part.
struct Parts {
    holes: Vec<(u64, u32)>,
    data: Vec<(u64, usize)>,
}

/// Tells the data of a range from its holes, as far as that is worth it.
async fn parts_of(session: &Session, offset: u64, len: usize) -> Parts {
    let op = Op::Status { context: Context::Allocation, most: MAX_HOLES };
    // Status that cannot be had is no failure of the read, which will come upon the same fault if it matters.
    let runs = session.submit(op, offset, len as u64, false).await.runs;
    let mut parts = Parts { holes: Vec::new(), data: Vec::new() };
    let (mut at, end) = (offset, offset + len as u64);
    let mut data_from = offset;
    for Run { len, status } in runs {
        let run = len.min(end - at);
        if status & Run::ZERO != 0 && run >= MIN_HOLE {
            parts.data.extend((at > data_from).then_some((data_from, (at - data_from) as usize)));
            parts.holes.push((at, run as u32));
            data_from = at + run;
        }
        at += run;
    }
    parts.data.extend((end > data_from).then_some((data_from, (end - data_from) as usize)));
    parts
}

type Piece = (u64, Result<(PageBuf, Permit), Errno>);

async fn read_piece(session: &Rc<Session>, at: u64, len: usize) -> Piece {
    if let Err(e) = session.pace.pay_piece(Cost::data(len as u64), &session.out).await {
        return (at, Err(e));
    }
    let permit = session.gauge.memory(memory_of(len)).await;
    (at, read_bytes(session, at, len, false).await.map(|buf| (buf, permit)))
}

async fn read_bytes(session: &Session, offset: u64, len: usize, fua: bool) -> Result<PageBuf, Errno> {
    let op = Op::Read(PageBuf::new(len));
    let Completion { result, buf, .. } = session.submit(op, offset, len as u64, fua).await;
    result?;
    // A device that loses the buffer has lost the data.
    buf.filter(|buf| buf.len() == len).ok_or(Errno::EIO)
}

/// A write whose payload was received whole. The ticket holds the permit for the buffer.
pub(super) async fn write(ticket: Ticket, offset: u64, buf: PageBuf, fua: bool) {
    let len = buf.len();
    let result = ticket.session().submit(Op::Write(buf), offset, len as u64, fua).await.result;
    ticket.finish(result);
}

/// A large write whose pieces are stored while later ones are received. Shared by its pieces and the reader; when the
/// last lets go of it, the request is answered: with success only if every byte was stored.
pub(super) struct PieceWrite {
    /// `Some` until dropped.
    ticket: Option<Ticket>,
    received: Cell<bool>,
    unstored: Cell<usize>,
    /// What failed first, and where.
    error: Cell<Option<(Errno, u64)>>,
}

impl PieceWrite {
    pub(super) fn new(ticket: Ticket, len: usize) -> Self {
        PieceWrite {
            ticket: Some(ticket),
            received: Cell::new(false),
            unstored: Cell::new(len),
            error: Cell::new(None),
        }
    }

    /// Says that the whole payload has come, so that there is a request to answer.
    pub(super) fn received(&self) {
        self.received.set(true);
    }

    /// Whether a piece failed, so that the others need not be stored.
    pub(super) fn has_failed(&self) -> bool {
        self.error.get().is_some()
    }
}

impl Drop for PieceWrite {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket.take() else { return };
        match self.error.get() {
            _ if !self.received.get() => ticket.forget(),
            Some((e, at)) => ticket.fail_at(e, at),
            None if self.unstored.get() == 0 => ticket.succeed(),
            // A piece panicked.
            None => ticket.fail(Errno::EIO),
        }
    }
}

/// One piece of a large write.
pub(super) async fn write_piece(
    whole: Rc<PieceWrite>,
    session: Rc<Session>,
    offset: u64,
    buf: PageBuf,
    memory: Permit,
) {
    let len = buf.len();
    match session.submit(Op::Write(buf), offset, len as u64, false).await.result {
        Ok(()) => whole.unstored.set(whole.unstored.get() - len),
        Err(e) => whole.error.set(whole.error.get().or(Some((e, offset)))),
    }
    drop(memory);
}

/// A request without payload in either direction.
pub(super) async fn effect(ticket: Ticket, op: Op, offset: u64, len: u64, fua: bool) {
    let result = ticket.session().submit(op, offset, len, fua).await.result;
    ticket.finish(result);
}

/// A block status request in the contexts at these places of the selection, of which there is at least one; `len` is not
/// zero.
pub(super) async fn block_status(ticket: Ticket, offset: u64, len: u64, one: bool, wanted: Vec<usize>) {
    let session = Rc::clone(ticket.session());
    let to = ticket.to();
    let most = if one { 1 } else { MAX_DESCRIPTORS };
    let mut left = wanted.len();
    for place in wanted {
        left -= 1;
        let Some(context) = session.contexts[place].clone() else { return ticket.fail(Errno::EINVAL) };
        let permit = session.gauge.memory(status_memory(len)).await;
        let Completion { result, runs, .. } = session.submit(Op::Status { context, most }, offset, len, false).await;
        if let Err(e) = result {
            return ticket.fail(e);
        }
        if runs.is_empty() {
            return ticket.fail(Errno::EIO);
        }
        let chunk = to.status(left == 0, session.agreed.contexts[place].id, &runs, len, one);
        if left == 0 {
            return ticket.last_status(chunk, permit);
        }
        ticket.status(chunk, permit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_multiples() {
        let pieces = |offset, len| cut(offset, len, 1000).collect::<Vec<_>>();
        assert_eq!(pieces(0, 2000), [(0, 1000), (1000, 1000)]);
        assert_eq!(pieces(500, 2000), [(500, 500), (1000, 1000), (2000, 500)]);
        assert_eq!(pieces(500, 3), [(500, 3)]);
        assert_eq!(pieces(999, 0), []);
    }

    #[test]
    fn memory_is_counted_as_it_is_taken() {
        assert_eq!(memory_of(1), PAGE);
        assert_eq!(memory_of(4097), 2 * PAGE);
        assert_eq!(memory_of(64 << 20), 64 << 20);
        assert_eq!(status_memory(512), EXTENT_MEMORY);
        assert_eq!(status_memory(u32::MAX.into()), 32 << 20);
        assert_eq!(status_memory(u64::MAX), 32 << 20);
    }
}
