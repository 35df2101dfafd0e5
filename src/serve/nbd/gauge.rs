//! What one connection has in flight, counted and bounded: requests not fully answered, and payload memory.
//!
//! A [`Permit`] is held from before memory is allocated until it is free again: through the I/O, and for replies until
//! the socket has taken them. A client that sends without reading therefore stops being read. What a connection may have
//! is bounded here for itself, and by [`super::budget`] for all together.

use super::budget::{Account, Budget, CHUNK, LARGE, LOOK, SHARE};
use crate::export::usage::Connection;
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::Notify;

/// Requests of one connection that may be unanswered at a time.
pub(super) const MAX_IN_FLIGHT: usize = 512;
/// Payload memory of one connection, in bytes: a request of the largest size beside a busy queue of ordinary ones.
pub(super) const MAX_IN_FLIGHT_BYTES: usize = 96 << 20;

/// The counts of one connection.
pub(super) struct Gauge {
    budget: Arc<Budget>,
    account: Arc<Account>,
    requests: Cell<usize>,
    /// Bytes of buffers that are not large.
    small: Cell<usize>,
    /// Bytes of large buffers.
    large: Cell<usize>,
    /// Bytes taken from the common half of the budget for the small ones, in chunks.
    common: Cell<usize>,
    /// Told whenever a permit is given back.
    freed: Notify,
}

/// A share of a connection's gauge. Dropping it gives it back.
#[must_use = "dropping a permit says that the memory it stands for is free"]
pub(super) struct Permit {
    gauge: Rc<Gauge>,
    requests: usize,
    small: usize,
    large: usize,
}

impl Gauge {
    /// Nothing is in flight on a connection.
    pub(super) fn new(budget: &Arc<Budget>, connection: Arc<Connection>) -> Gauge {
        Gauge {
            budget: Arc::clone(budget),
            account: budget.open(connection),
            requests: Cell::new(0),
            small: Cell::new(0),
            large: Cell::new(0),
            common: Cell::new(0),
            freed: Notify::new(),
        }
    }

    /// Where it is noted what waits for the client.
    pub(super) fn account(&self) -> &Account {
        &self.account
    }

    /// A permit for one request and `bytes` of memory, if there is room now.
    ///
    /// A lone request always has room on its connection, so no request waits for ever.
    pub(super) fn try_request(self: &Rc<Self>, bytes: usize) -> Option<Permit> {
        self.try_take(1, bytes)
    }

    /// Waits for room for one request and `bytes` of memory.
    pub(super) async fn request(self: &Rc<Self>, bytes: usize) -> Permit {
        self.wait(1, bytes).await
    }

    /// Memory for a request that has its permit, if there is room now.
    pub(super) fn try_memory(self: &Rc<Self>, bytes: usize) -> Option<Permit> {
        self.try_take(0, bytes)
    }

    /// Waits for room for `bytes` more memory of a request that has its permit.
    ///
    /// Whoever holds memory must not wait here for more: holders of all of it could wait for each other.
    pub(super) async fn memory(self: &Rc<Self>, bytes: usize) -> Permit {
        self.wait(0, bytes).await
    }

    /// The most memory a piece of a request should take: `most`, or a share when there is not so much.
    pub(super) fn piece(&self, most: usize) -> usize {
        if self.take_small(most, false) { most } else { most.min(SHARE) }
    }

    /// Waits until nothing is in flight.
    pub(super) async fn idle(&self) {
        while !self.is_idle() {
            self.freed.notified().await;
        }
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.requests.get() == 0 && self.bytes() == 0
    }

    fn bytes(&self) -> usize {
        self.small.get() + self.large.get()
    }

    /// Whether the connection itself has room.
    fn has_room(&self, requests: usize, bytes: usize) -> bool {
        let in_flight = requests == 0 || self.requests.get() < MAX_IN_FLIGHT;
        in_flight && (self.bytes() == 0 || self.bytes() + bytes <= MAX_IN_FLIGHT_BYTES)
    }

    fn try_take(self: &Rc<Self>, requests: usize, bytes: usize) -> Option<Permit> {
        let is_large = bytes > LARGE;
        let taken = self.has_room(requests, bytes)
            && if is_large { self.budget.try_large(bytes) } else { self.take_small(bytes, true) };
        taken.then(|| self.permit(requests, bytes))
    }

    /// A permit for what there is memory for.
    fn permit(self: &Rc<Self>, requests: usize, bytes: usize) -> Permit {
        let (small, large) = if bytes > LARGE { (0, bytes) } else { (bytes, 0) };
        self.requests.set(self.requests.get() + requests);
        self.small.set(self.small.get() + small);
        self.large.set(self.large.get() + large);
        Permit { gauge: Rc::clone(self), requests, small, large }
    }

    /// Sees to it that there is memory for `bytes` more in small buffers, or (`keep` unset) finds out whether there is.
    fn take_small(&self, bytes: usize, keep: bool) -> bool {
        let had = self.common.get();
        let Some(missing) = (self.small.get() + bytes).checked_sub(SHARE + had).filter(|missing| *missing > 0) else {
            return true;
        };
        let chunks = missing.next_multiple_of(CHUNK);
        let taken = self.budget.try_common(had, chunks, self.small.get() == 0);
        if taken && keep {
            self.common.set(had + chunks);
        } else if taken {
            self.budget.give_common(chunks);
        }
        taken
    }

    async fn wait(self: &Rc<Self>, requests: usize, bytes: usize) -> Permit {
        loop {
            if let Some(permit) = self.try_take(requests, bytes) {
                return permit;
            }
            if !self.has_room(requests, bytes) {
                self.freed.notified().await;
            } else if bytes > LARGE {
                self.budget.large(bytes, &self.account).await;
                if self.has_room(requests, bytes) {
                    return self.permit(requests, bytes);
                }
                self.budget.give_large(bytes, 0);
            } else if let Some(permit) = self.wait_for_common(requests, bytes).await {
                return permit;
            }
        }
    }

    async fn wait_for_common(self: &Rc<Self>, requests: usize, bytes: usize) -> Option<Permit> {
        let waiter = self.budget.waiter();
        let mut freed = pin!(waiter.freed());
        freed.as_mut().enable();
        // what was given back before is there, what is given back from now on wakes
        if let Some(permit) = self.try_take(requests, bytes) {
            return Some(permit);
        }
        tokio::select! {
            () = freed => {}
            () = self.freed.notified() => {}
            () = tokio::time::sleep(LOOK) => self.budget.look(&self.account),
        }
        None
    }

    fn give_back(&self, requests: usize, small: usize, large: (usize, usize)) {
        let (before, after) = large;
        if requests + small + before - after == 0 {
            return;
        }
        self.requests.set(self.requests.get() - requests);
        self.small.set(self.small.get() - small);
        if before > after {
            self.large.set(self.large.get() - (before - after));
            self.budget.give_large(before, after);
        }
        self.give_chunks();
        self.freed.notify_waiters();
    }

    /// Gives back what was taken from the common half and is not needed; one chunk is kept while it may be soon.
    fn give_chunks(&self) {
        let had = self.common.get();
        if had == 0 {
            return;
        }
        let needed = self.small.get().saturating_sub(SHARE).next_multiple_of(CHUNK);
        let keep = if self.small.get() == 0 { 0 } else { had.min(needed + CHUNK) };
        self.common.set(keep);
        self.budget.give_common(had - keep);
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.budget.give_common(self.common.get());
        self.budget.close(&self.account);
    }
}

impl Permit {
    /// Adds another permit of the same connection, to be given back together.
    pub(super) fn join(&mut self, mut other: Permit) {
        debug_assert!(Rc::ptr_eq(&self.gauge, &other.gauge));
        debug_assert!(self.large == 0 || other.large == 0, "no request has two large buffers");
        self.requests += std::mem::take(&mut other.requests);
        self.small += std::mem::take(&mut other.small);
        self.large += std::mem::take(&mut other.large);
    }

    /// Gives back the memory above `bytes`.
    pub(super) fn shrink(&mut self, bytes: usize) {
        let large = self.large.min(bytes);
        let small = self.small.min(bytes - large);
        self.gauge.give_back(0, self.small - small, (self.large, large));
        (self.small, self.large) = (small, large);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gauge.give_back(self.requests, self.small, (self.large, 0));
    }
}

#[cfg(test)]
impl Gauge {
    /// A gauge with a budget of its own.
    pub(super) fn alone() -> Rc<Gauge> {
        Rc::new(Gauge::new(&Budget::new(0), Arc::new(Connection::new(crate::ring::Peer::Unknown))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn requests_are_counted_and_given_back() {
        let gauge = Gauge::alone();
        let mut held: Vec<_> = (0..MAX_IN_FLIGHT).map(|_| gauge.try_request(0).unwrap()).collect();
        assert!(gauge.try_request(0).is_none());
        assert!(gauge.request(0).now_or_never().is_none());
        held.pop();
        assert!(gauge.request(0).now_or_never().is_some());
        drop(held);
        assert!(gauge.is_idle());
    }

    #[test]
    fn memory_is_bounded_but_one_request_always_fits() {
        let gauge = Gauge::alone();
        let large = gauge.try_request(MAX_IN_FLIGHT_BYTES + 1).unwrap();
        assert!(gauge.try_request(1).is_none());
        assert!(gauge.memory(1).now_or_never().is_none());
        drop(large);
        let mut first = gauge.try_request(MAX_IN_FLIGHT_BYTES - 10).unwrap();
        let second = gauge.memory(10).now_or_never().unwrap();
        assert!(gauge.memory(1).now_or_never().is_none());
        first.join(second);
        first.shrink(100);
        assert!(gauge.try_request(MAX_IN_FLIGHT_BYTES - 100).is_some());
        drop(first);
        assert!(gauge.idle().now_or_never().is_some());
    }

    fn pair() -> (Arc<Budget>, Rc<Gauge>, Rc<Gauge>) {
        let budget = Budget::new(0);
        let gauge = || Rc::new(Gauge::new(&budget, Arc::new(Connection::new(crate::ring::Peer::Unknown))));
        let (one, other) = (gauge(), gauge());
        (budget, one, other)
    }

    #[test]
    fn one_connection_leaves_room_for_others() {
        let (budget, one, other) = pair();
        let held: Vec<_> = std::iter::from_fn(|| one.try_request(64 << 10)).take(MAX_IN_FLIGHT).collect();
        let taken = held.len() * (64 << 10);
        assert!((4 << 20..5 << 20).contains(&taken), "{taken}");
        assert!(other.try_request(8 << 20).is_some(), "what is large has a half for itself");
        assert!((0..100).all(|_| other.try_request(LARGE).is_some()), "and the common half has room");
        assert_eq!(other.piece(LARGE), LARGE);
        drop(held);
        // everything was given back
        let (all, rest) = (budget.try_common(0, 128 << 20, true), budget.try_common(0, 1, true));
        assert!(all && !rest);
        assert_eq!(other.piece(LARGE), SHARE, "then each has its share");
        let own: Vec<_> = std::iter::from_fn(|| other.try_request(4096)).collect();
        assert_eq!(own.len() * 4096, SHARE);
        budget.give_common(128 << 20);
    }

    #[test]
    fn who_waits_for_the_memory_of_others_is_told_across_threads() {
        let (budget, one, _) = pair();
        assert!(budget.try_common(0, 128 << 20, true));
        let giver = Arc::clone(&budget);
        let later = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            giver.give_common(128 << 20);
        });
        crate::ring::run(async { drop(one.request(LARGE).await) }).unwrap();
        later.join().unwrap();
        assert!(budget.try_common(0, 128 << 20, true), "all of it is there again");
    }

    #[test]
    fn large_buffers_queue_and_shrink() {
        let (_budget, one, other) = pair();
        let mut status = one.try_request(64 << 20).unwrap();
        let second = other.try_request(64 << 20).unwrap();
        assert!(one.try_request(LARGE + 1).is_none(), "the half for large ones is taken");
        status.shrink(100);
        let mut third = other.try_request(0).unwrap();
        assert!(other.try_request(32 << 20).is_some());
        third.join(second);
        drop(third);
        drop(status);
        assert!(one.try_request(64 << 20).is_some() && one.is_idle() && other.is_idle());
    }

    #[test]
    fn a_waiter_is_told() {
        crate::ring::run(async {
            let gauge = Gauge::alone();
            let held = gauge.try_request(1).unwrap();
            let waiting = Rc::clone(&gauge);
            let waiter = async move { waiting.idle().await };
            let release = async move { drop(held) };
            futures_util::future::join(waiter, release).await;
        })
        .unwrap();
    }
}
