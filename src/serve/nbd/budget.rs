//! The memory for payload of all connections together (`maxmemory`), shared by all worker threads.
//!
//! Called by each connection's gauge, which counts what its own requests take. Promises: all payload buffers together
//! stay within `maxmemory` plus `SHARE` for each client; and clients that do not take their replies, or trickle what
//! they write, keep no memory that others need.
//!
//! Three kinds of memory:
//!
//! - Its share: every connection has `SHARE` for itself, without asking. A client with few small requests, and a large
//!   structured read or a large write, which go in pieces of this size when there is no other memory, need no more.
//! - The common half of the budget: what goes beyond the share, as long as it is no single large buffer. A connection may
//!   have at most one part in 32 of what is left of it at that moment (`FRACTION`): 16 MiB of the default budget, and a
//!   hundred connections that took all they could leave as much as a busy client needs to the next one, and any number of them
//!   leaves 8 MiB to requests that are above the share and alone on their connection.
//! - The half for large buffers (above `LARGE`): replies that cannot be sent in pieces, because the client has no
//!   structured replies, and writes that must be durable. First come, first served.
//!
//! Why nobody waits for ever: who waits for memory holds none that only its own waiting could free (its earlier requests
//! go on without it), so memory is given back by storage that completes, or by clients that take and send. A client may
//! choose not to. So who waits looks at all connections now and then (`LOOK`), and those that hold more than their
//! share waiting for their client, of which less than a quarter has moved in `STALL`, are disconnected. A connection
//! whose own client keeps that much does not look: it waits for nobody else, and a slow client alone disturbs nobody.
//! The largest buffer fits the half for large ones ([`crate::export::limit_keys::MIN_MEMORY`]), so the first of its
//! queue is served when that is empty. A connection without memory of its own gets a small buffer from its share, or a
//! middling one from the common half, which is not empty for ever for the same reason.
//!
//! The fast path asks nobody: within its share, and within what it took in chunks before, a connection counts for itself.

use crate::export::limit_keys::MIN_MEMORY;
use crate::export::usage::Connection;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
/// How often a connection that waits for memory looks who keeps it.
pub(super) const LOOK: Duration = Duration::from_secs(1);
/// How long a client may keep memory that others wait for.
const STALL: Duration = Duration::from_secs(3);
/// What must have moved in that time, as a part of what waits for the client.
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
    accounts: Mutex<Vec<Entry>>,
}

struct Entry {
    account: Arc<Account>,
    seen: Option<Seen>,
}

/// What waited for a client at some look.
struct Seen {
    at: Instant,
    stuck: usize,
    moved: u64,
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
            is_cut: AtomicBool::new(false),
        });
        self.accounts().push(Entry { account: Arc::clone(&account), seen: None });
        account
    }

    /// Closes an account.
    pub(super) fn close(&self, account: &Arc<Account>) {
        let mut accounts = self.accounts();
        if let Some(at) = accounts.iter().position(|entry| Arc::ptr_eq(&entry.account, account)) {
            accounts.swap_remove(at);
        }
    }

    fn accounts(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `bytes` of the common half for a connection that has `held` of it, if there is room. `alone`: it has no other
    /// small buffer, so that its share cannot be what it goes on with.
    pub(super) fn try_common(&self, held: usize, bytes: usize, alone: bool) -> bool {
        let take = |free: usize| {
            let left = free.checked_sub(bytes)?;
            (alone || held + bytes <= free / FRACTION).then_some(left)
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

    /// Waits for memory for a large buffer of a connection, in order of arrival.
    pub(super) async fn large(&self, bytes: usize, account: &Account) {
        let mut permit = std::pin::pin!(self.large.acquire_many(units(bytes)));
        loop {
            tokio::select! {
                permit = &mut permit => {
                    permit.expect("it is never closed").forget();
                    return;
                }
                () = tokio::time::sleep(LOOK) => self.look(account),
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

    /// The connection of this account has waited for a while: disconnects those who keep memory and do not move.
    pub(super) fn look(&self, account: &Account) {
        if account.stuck() <= SHARE {
            self.look_at(Instant::now());
        }
    }

    fn look_at(&self, now: Instant) {
        self.accounts().iter_mut().for_each(|entry| entry.look(now));
    }
}

impl Entry {
    fn look(&mut self, now: Instant) {
        let (stuck, moved) = (self.account.stuck(), self.account.moved.load(Relaxed));
        match &self.seen {
            // who moved everything since, however long ago that was, has moved enough
            Some(seen) if stuck > SHARE => {
                if now.saturating_duration_since(seen.at) < STALL {
                    return;
                }
                if moved - seen.moved < (stuck.min(seen.stuck) / MOVED_PART) as u64 {
                    self.account.is_cut.store(true, Relaxed);
                    self.account.connection.disconnect();
                }
            }
            _ => {}
        }
        self.seen = (stuck > SHARE).then_some(Seen { at: now, stuck, moved });
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

    /// Bytes that wait for the client.
    fn stuck(&self) -> usize {
        self.receiving.load(Relaxed) + self.sending.load(Relaxed)
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

    #[test]
    fn who_keeps_memory_and_does_not_move_is_cut() {
        let budget = Budget::new(0);
        let open = || {
            let connection = Arc::new(Connection::new(Peer::Unknown));
            (budget.open(Arc::clone(&connection)), connection)
        };
        let all: Vec<_> = (0..6).map(|_| open()).collect();
        let [deaf, slow, busy, small, late, done] = &all[..] else { unreachable!() };
        deaf.0.sending(8 << 20);
        slow.0.receiving(8 << 20);
        busy.0.sending(8 << 20);
        small.0.sending(SHARE);
        done.0.sending(8 << 20);
        let start = Instant::now();
        budget.look_at(start);
        slow.0.moved(100);
        busy.0.moved(2 << 20);
        late.0.sending(8 << 20);
        done.0.sending(0);
        budget.look_at(start + STALL / 2);
        assert!(!all.iter().any(|(account, _)| account.is_cut()), "too early to judge");
        budget.look_at(start + STALL);
        let cut: Vec<bool> = all.iter().map(|(account, _)| account.is_cut()).collect();
        assert_eq!(cut, [true, true, false, false, false, false]);
        for (account, connection) in &all {
            assert_eq!(connection.disconnected().now_or_never().is_some(), account.is_cut());
        }
        late.0.moved(8 << 20);
        budget.look_at(start + 100 * STALL);
        assert!(!late.0.is_cut(), "it is another wait by now");
        all.iter().for_each(|(account, _)| budget.close(account));
        assert!(budget.accounts().is_empty());
    }

    #[test]
    fn who_keeps_memory_does_not_look() {
        let budget = Budget::new(0);
        let account = budget.open(Arc::new(Connection::new(Peer::Unknown)));
        account.sending(8 << 20);
        budget.look(&account);
        assert!(budget.accounts()[0].seen.is_none());
        account.sending(SHARE);
        let other = budget.open(Arc::new(Connection::new(Peer::Unknown)));
        other.sending(8 << 20);
        budget.look(&account);
        assert!(budget.accounts()[1].seen.is_some());
    }

    #[test]
    fn every_greedy_connection_leaves_room_for_the_next() {
        let budget = Budget::new(1 << 30);
        for n in 0..1000 {
            let mut held = 0;
            while budget.try_common(held, CHUNK, false) {
                held += CHUNK;
            }
            assert!(held > 0 || n > 100, "connection {n} has {held}");
        }
        assert!(budget.try_common(0, LARGE, true), "there is always room for who has nothing");
    }
}
