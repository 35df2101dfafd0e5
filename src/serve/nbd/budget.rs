//! The memory for payload of all connections together (`maxmemory`), shared by all worker threads.
//!
//! Called by each connection's gauge, which counts what its own requests take. Promises: all payload buffers together
//! stay within `maxmemory` plus [`SHARE`] for each client; and clients that do not take their replies, or trickle what
//! they write, keep no memory that others need.
//!
//! Three kinds of memory:
//!
//! - Its share: every connection has [`SHARE`] for itself, without asking. A client with few small requests, and a large
//!   structured read or a large write, which go in pieces of this size when there is no other memory, need no more.
//! - The common half of the budget: what goes beyond the share, as long as it is no single large buffer. A connection may
//!   have at most one part in 32 of what is left of it at that moment ([`FRACTION`]): 16 MiB of the default budget, and a
//!   hundred connections that took all they could leave as much as a busy client needs to the next one.
//! - The half for large buffers (above [`LARGE`]): replies that cannot be sent in pieces, because the client has no
//!   structured replies, and writes that must be durable. First come, first served.
//!
//! Why nobody waits for ever: who waits for memory holds none that only its own waiting could free (its earlier requests
//! go on without it), so memory is given back by storage that completes, or by clients that take and send. A client may
//! choose not to. So a waiter that got nothing for [`STALL`] looks at all connections, and those that hold more than
//! their share waiting for their client, of which less than a quarter has moved since the last look, are disconnected.
//! The largest buffer fits the half for large ones ([`crate::export::limit_keys::MIN_MEMORY`]), so the first of its
//! queue is served when that is empty. A connection without memory of its own gets a small buffer from its share, or a
//! middling one from the common half, which is not empty for ever for the same reason.
//!
//! The fast path asks nobody: within its share, and within what it took in chunks before, a connection counts for itself.

use crate::export::limit_keys::MIN_MEMORY;
use crate::export::usage::Connection;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore};

/// Memory of each connection for itself, in bytes.
pub(super) const SHARE: usize = 256 << 10;
/// Most bytes of a buffer that is no large one.
pub(super) const LARGE: usize = 2 << 20;
/// What connections take from the common half at once, in bytes.
pub(super) const CHUNK: usize = 256 << 10;
/// What is left of the common half in multiples of what one connection may have of it.
const FRACTION: usize = 32;
/// Large buffers are counted in units of so many bytes.
const UNIT: usize = 64 << 10;
/// How long a connection waits for memory before it looks who keeps it.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// What must have moved between two looks, as a part of what waits for the client.
const MOVED_PART: usize = 4;
/// The most that is taken when nothing is said, in bytes.
const DEFAULT_MOST: u64 = 1 << 30;
/// The same as a part of the machine's memory.
const DEFAULT_PART: u64 = 4;

/// All memory for payload.
pub struct Budget {
    /// Bytes of the common half that nobody has.
    common: AtomicUsize,
    large: Semaphore,
    /// Connections that wait for memory of the common half.
    waiting: AtomicUsize,
    /// Told when memory of the common half is given back while somebody waits.
    freed: Notify,
    accounts: Mutex<Accounts>,
}

#[derive(Default)]
struct Accounts {
    all: Vec<Arc<Account>>,
    looked: Option<Instant>,
}

/// What a connection holds that waits for its client. Written by its worker, when it has to wait.
pub(super) struct Account {
    connection: Arc<Connection>,
    /// Bytes of a payload that is being received.
    receiving: AtomicUsize,
    /// Bytes of replies that the socket has not taken.
    sending: AtomicUsize,
    /// Bytes that the client has sent or taken, as far as it was waited for.
    moved: AtomicU64,
    /// What had moved, and what waited, at the last look.
    seen: AtomicU64,
    stuck: AtomicUsize,
    is_cut: AtomicBool,
}

/// What a machine of this size gives when the configuration does not say, in bytes.
pub fn default_memory() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text));
    machine.map_or(DEFAULT_MOST, |bytes| bytes / DEFAULT_PART).clamp(MIN_MEMORY, DEFAULT_MOST)
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

impl Budget {
    /// A budget of `bytes`, at least [`MIN_MEMORY`].
    pub fn new(bytes: u64) -> Arc<Budget> {
        let half = usize::try_from(bytes.max(MIN_MEMORY) / 2).unwrap_or(usize::MAX / 2);
        Arc::new(Budget {
            common: AtomicUsize::new(half),
            large: Semaphore::new((half / UNIT).min(Semaphore::MAX_PERMITS)),
            waiting: AtomicUsize::new(0),
            freed: Notify::new(),
            accounts: Mutex::default(),
        })
    }

    /// Opens the account of a connection. It is closed with [`Budget::close`].
    pub(super) fn open(&self, connection: Arc<Connection>) -> Arc<Account> {
        let account = Arc::new(Account {
            connection,
            receiving: AtomicUsize::new(0),
            sending: AtomicUsize::new(0),
            moved: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            stuck: AtomicUsize::new(0),
            is_cut: AtomicBool::new(false),
        });
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner).all.push(Arc::clone(&account));
        account
    }

    /// Closes an account.
    pub(super) fn close(&self, account: &Arc<Account>) {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = accounts.all.iter().position(|other| Arc::ptr_eq(other, account)) {
            accounts.all.swap_remove(at);
        }
    }

    /// Takes `bytes` of the common half for a connection that has `held` of it, if there is room.
    pub(super) fn try_common(&self, held: usize, bytes: usize) -> bool {
        let take = |free: usize| {
            let left = free.checked_sub(bytes)?;
            (held == 0 || held + bytes <= free / FRACTION).then_some(left)
        };
        // SeqCst: see `Waiter`
        self.common.fetch_update(SeqCst, SeqCst, take).is_ok()
    }

    /// Gives memory of the common half back.
    pub(super) fn give_common(&self, bytes: usize) {
        if bytes > 0 {
            self.common.fetch_add(bytes, SeqCst);
            if self.waiting.load(SeqCst) > 0 {
                self.freed.notify_waiters();
            }
        }
    }

    /// Takes memory for a large buffer, if there is some now.
    pub(super) fn try_large(&self, bytes: usize) -> bool {
        self.large.try_acquire_many(units(bytes)).map(|permit| permit.forget()).is_ok()
    }

    /// Waits for memory for a large buffer, in order of arrival.
    pub(super) async fn large(&self, bytes: usize) {
        let mut permit = std::pin::pin!(self.large.acquire_many(units(bytes)));
        loop {
            tokio::select! {
                permit = &mut permit => {
                    permit.expect("it is never closed").forget();
                    return;
                }
                () = tokio::time::sleep(STALL) => self.look(),
            }
        }
    }

    /// Gives memory of a large buffer back: it had `before` bytes and has `after`.
    pub(super) fn give_large(&self, before: usize, after: usize) {
        self.large.add_permits((units(before) - units(after)) as usize);
    }

    /// Says that a connection waits for memory of the common half, until the waiter is dropped.
    pub(super) fn waiter(&self) -> Waiter<'_> {
        self.waiting.fetch_add(1, SeqCst);
        Waiter(self)
    }

    /// Somebody has waited for long: disconnects those who keep memory and do not move. Every look judges what has
    /// happened since the last one, if that was not long ago.
    pub(super) fn look(&self) {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        let since = accounts.looked.map(|looked| looked.elapsed());
        if since.is_some_and(|since| since < STALL) {
            return;
        }
        accounts.looked = Some(Instant::now());
        let judges = since.is_some_and(|since| since < 3 * STALL);
        for account in &accounts.all {
            account.look(judges);
        }
    }
}

/// A connection that waits for memory of the common half.
///
/// It is counted before it tries, and who gives back looks at the count after: one of the two sees the other.
pub(super) struct Waiter<'a>(&'a Budget);

impl Waiter<'_> {
    /// Completes when memory was given back after this was called.
    pub(super) fn freed(&self) -> tokio::sync::futures::Notified<'_> {
        self.0.freed.notified()
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

impl Account {
    /// A payload of `bytes` bytes waits for the client; 0: it has come.
    pub(super) fn receiving(&self, bytes: usize) {
        self.receiving.store(bytes, Relaxed);
    }

    /// Replies of `bytes` bytes wait for the client.
    pub(super) fn sending(&self, bytes: usize) {
        self.sending.store(bytes, Relaxed);
    }

    /// The client has sent or taken `bytes` bytes.
    pub(super) fn moved(&self, bytes: usize) {
        // one writer: no other addition can come in between
        self.moved.store(self.moved.load(Relaxed) + bytes as u64, Relaxed);
    }

    /// Whether the connection is to end because it kept memory that others waited for.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut.load(Relaxed)
    }

    fn look(&self, judges: bool) {
        let stuck = self.receiving.load(Relaxed) + self.sending.load(Relaxed);
        let moved = self.moved.load(Relaxed);
        let (seen, before) = (self.seen.swap(moved, Relaxed), self.stuck.swap(stuck, Relaxed));
        let held = stuck.min(before);
        if judges && held > SHARE && moved - seen < (held / MOVED_PART) as u64 {
            self.is_cut.store(true, Relaxed);
            self.connection.disconnect();
        }
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Peer;
    use futures_util::FutureExt;

    #[test]
    fn the_memory_of_the_machine() {
        assert_eq!(total_memory("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        for bad in ["", "MemTotal: x kB", "MemTotal: 1", "MemTotal: 99999999999999999999 kB"] {
            assert_eq!(total_memory(bad), None);
        }
        assert!((MIN_MEMORY..=DEFAULT_MOST).contains(&default_memory()));
    }

    /// As if the last look had been some time ago.
    fn look(budget: &Budget, ago: Duration) {
        budget.accounts.lock().unwrap().looked = Instant::now().checked_sub(ago);
        budget.look();
    }

    #[test]
    fn who_keeps_memory_and_does_not_move_is_cut() {
        let budget = Budget::new(0);
        let open = || {
            let connection = Arc::new(Connection::new(Peer::Unknown));
            (budget.open(Arc::clone(&connection)), connection)
        };
        let all: Vec<_> = (0..5).map(|_| open()).collect();
        let [deaf, slow, busy, small, late] = &all[..] else { unreachable!() };
        deaf.0.sending(8 << 20);
        slow.0.receiving(8 << 20);
        busy.0.sending(8 << 20);
        small.0.sending(SHARE);
        budget.look();
        assert!(!all.iter().any(|(account, _)| account.is_cut()), "the first look only sees");
        slow.0.moved(100);
        busy.0.moved(2 << 20);
        late.0.sending(8 << 20);
        budget.look();
        assert!(!deaf.0.is_cut(), "too early to judge");
        look(&budget, STALL);
        let cut: Vec<bool> = all.iter().map(|(account, _)| account.is_cut()).collect();
        assert_eq!(cut, [true, true, false, false, false]);
        for (account, connection) in &all {
            assert_eq!(connection.disconnected().now_or_never().is_some(), account.is_cut());
        }
        look(&budget, 10 * STALL);
        assert!(!late.0.is_cut(), "what was seen long ago says nothing");
        all.iter().for_each(|(account, _)| budget.close(account));
        assert!(budget.accounts.lock().unwrap().all.is_empty());
    }

    #[test]
    fn every_greedy_connection_leaves_room_for_the_next() {
        let budget = Budget::new(1 << 30);
        for n in 0..100 {
            let mut held = 0;
            while budget.try_common(held, CHUNK) {
                held += CHUNK;
            }
            assert!(held >= 2 * CHUNK, "connection {n} has {held}");
        }
    }
}
