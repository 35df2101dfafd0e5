//! What the clients of an export do: who is connected, and how much each has moved.
//!
//! Counted by the frontends on their workers, read by whoever describes the daemon. A client's counters have one writer,
//! its worker, so that counting costs a plain load and store; readers see each number whole, but not all of one moment.

use super::limiter::Flow;
use super::tls::Encrypted;
use crate::ring::Peer;
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;
use utoipa::ToSchema;

/// Kinds of requests that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads; bytes are those sent.
    Read,
    /// Writes; bytes are those stored.
    Write,
    /// Write zeroes; bytes are those of the range.
    WriteZeroes,
    /// Trims; bytes are those of the range.
    Trim,
    /// Flushes.
    Flush,
    /// Block status requests; bytes are those of the range.
    BlockStatus,
    /// Requests to read ahead; bytes are those of the range.
    Cache,
}

const KINDS: usize = 7;

/// Requests and bytes of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Count {
    /// Requests that were answered, failed ones too.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
}

/// Everything counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Reads.
    pub read: Count,
    /// Writes.
    pub write: Count,
    /// Write zeroes.
    pub write_zeroes: Count,
    /// Trims.
    pub trim: Count,
    /// Flushes.
    pub flush: Count,
    /// Block status requests.
    pub block_status: Count,
    /// Requests to read ahead.
    pub cache: Count,
    /// Reads and writes of a block device whose data was not copied.
    pub zero_copy: u64,
    /// Requests of all kinds that were answered with an error.
    pub errors: u64,
    /// When the last request came, in milliseconds since 1970-01-01 UTC; 0: none came yet.
    pub last_io_ms: u64,
}

impl Totals {
    /// Adds what another counted.
    pub fn add(&mut self, other: &Totals) {
        let Totals { read, write, write_zeroes, trim, flush, block_status, cache, zero_copy, errors, last_io_ms } =
            other;
        for (mine, theirs) in [
            (&mut self.read, read),
            (&mut self.write, write),
            (&mut self.write_zeroes, write_zeroes),
            (&mut self.trim, trim),
            (&mut self.flush, flush),
            (&mut self.block_status, block_status),
            (&mut self.cache, cache),
        ] {
            mine.requests += theirs.requests;
            mine.bytes += theirs.bytes;
        }
        self.zero_copy += zero_copy;
        self.errors += errors;
        self.last_io_ms = self.last_io_ms.max(*last_io_ms);
    }
}

/// Who asks for an export.
#[derive(Clone, Debug)]
pub struct Guest {
    /// The other end.
    pub peer: Peer,
    /// How it is encrypted, if it is.
    pub tls: Option<Arc<Encrypted>>,
}

impl From<Peer> for Guest {
    fn from(peer: Peer) -> Guest {
        Guest { peer, tls: None }
    }
}

/// One client of an export.
#[derive(Debug)]
pub struct Connection {
    /// The other end.
    pub peer: Peer,
    /// When it took hold of the export.
    pub since: SystemTime,
    /// Its share of what the export's limits allow.
    pub flow: Flow,
    /// How it is encrypted, if it is.
    pub tls: Option<Arc<Encrypted>>,
    requests: [AtomicU64; KINDS],
    bytes: [AtomicU64; KINDS],
    zero_copy: AtomicU64,
    errors: AtomicU64,
    begun: AtomicU64,
    last_io_ms: AtomicU64,
    kick: Notify,
}

impl Connection {
    /// A client that has just come.
    pub fn new(peer: Peer) -> Connection {
        Connection {
            peer,
            since: SystemTime::UNIX_EPOCH + now(),
            flow: Flow::default(),
            tls: None,
            requests: Default::default(),
            bytes: Default::default(),
            zero_copy: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            begun: AtomicU64::new(0),
            last_io_ms: AtomicU64::new(0),
            kick: Notify::new(),
        }
    }

    /// The same, encrypted.
    pub(super) fn with_tls(mut self, tls: Option<Arc<Encrypted>>) -> Connection {
        self.tls = tls;
        self
    }

    /// A request has come. Each is followed by one [`Connection::end`]. For the client's worker only.
    pub fn begin(&self) {
        add(&self.begun, 1);
        self.last_io_ms.store(now().as_millis() as u64, Relaxed);
    }

    /// A request of `bytes` bytes was answered. For the client's worker only.
    pub fn end(&self, kind: Kind, bytes: u64, succeeded: bool) {
        add(&self.requests[kind as usize], 1);
        match succeeded {
            true => add(&self.bytes[kind as usize], bytes),
            false => add(&self.errors, 1),
        }
    }

    /// A read or write, which [`Connection::end`] counts as well, moved its data without a copy. For the client's worker
    /// only.
    pub fn moved_directly(&self) {
        add(&self.zero_copy, 1);
    }

    /// What was counted so far.
    pub fn totals(&self) -> Totals {
        let count = |kind: Kind| Count {
            requests: self.requests[kind as usize].load(Relaxed),
            bytes: self.bytes[kind as usize].load(Relaxed),
        };
        Totals {
            read: count(Kind::Read),
            write: count(Kind::Write),
            write_zeroes: count(Kind::WriteZeroes),
            trim: count(Kind::Trim),
            flush: count(Kind::Flush),
            block_status: count(Kind::BlockStatus),
            cache: count(Kind::Cache),
            zero_copy: self.zero_copy.load(Relaxed),
            errors: self.errors.load(Relaxed),
            last_io_ms: self.last_io_ms.load(Relaxed),
        }
    }

    /// Requests that have come so far.
    pub fn begun(&self) -> u64 {
        self.begun.load(Relaxed)
    }

    /// Requests that wait for their answer.
    pub fn in_flight(&self) -> u64 {
        // the answered ones first: a request that comes in between is then too many, never too few
        let ended: u64 = self.requests.iter().map(|n| n.load(Relaxed)).sum();
        self.begun.load(Relaxed).saturating_sub(ended)
    }

    /// Asks the frontend to end this connection: what is in flight is completed, nothing more is read.
    pub fn disconnect(&self) {
        self.kick.notify_one();
    }

    /// Completes when the connection is to be ended.
    pub async fn disconnected(&self) {
        self.kick.notified().await;
    }
}

fn add(counter: &AtomicU64, n: u64) {
    // one writer: no other addition can come in between
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// Time since 1970, as exact as the kernel's tick: reading the exact clock for each request would cost more.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind() {
        let connection = Connection::new(Peer::Unknown);
        for (kind, bytes, succeeded) in [(Kind::Read, 10, true), (Kind::Read, 10, false), (Kind::Trim, 5, true)] {
            connection.begin();
            assert_eq!(connection.in_flight(), 1);
            connection.end(kind, bytes, succeeded);
        }
        let totals = connection.totals();
        assert_eq!((totals.read, totals.trim.bytes, totals.errors), (Count { requests: 2, bytes: 10 }, 5, 1));
        assert!(totals.last_io_ms > 1_600_000_000_000 && connection.in_flight() == 0);
        let mut sum = totals;
        sum.add(&totals);
        assert_eq!((sum.read.requests, sum.trim.bytes, sum.errors, sum.last_io_ms), (4, 10, 2, totals.last_io_ms));
    }
}
