//! What one connection has in flight, counted and bounded: requests not fully answered, and payload memory.
//!
//! A [`Permit`] is held from before memory is allocated until it is free again: through the I/O, and for replies until
//! the socket has taken them. A client that sends without reading therefore stops being read.

use std::cell::Cell;
use std::rc::Rc;
use tokio::sync::Notify;

/// Requests of one connection that may be unanswered at a time.
pub(super) const MAX_IN_FLIGHT: usize = 512;
/// Payload memory of one connection, in bytes: a request of the largest size beside a busy queue of ordinary ones.
pub(super) const MAX_IN_FLIGHT_BYTES: usize = 96 << 20;

/// The counts of one connection.
#[derive(Default)]
pub(super) struct Gauge {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    /// Told whenever a permit is given back.
    freed: Notify,
}

/// A share of a connection's gauge. Dropping it gives it back.
#[must_use = "dropping a permit says that the memory it stands for is free"]
pub(super) struct Permit {
    gauge: Rc<Gauge>,
    requests: usize,
    bytes: usize,
}

impl Gauge {
    /// A permit for one request and `bytes` of memory, if there is room now.
    ///
    /// A lone request always has room, so no request waits for ever.
    pub(super) fn try_request(self: &Rc<Self>, bytes: usize) -> Option<Permit> {
        (self.requests.get() < MAX_IN_FLIGHT && self.has_room(bytes)).then(|| self.take(1, bytes))
    }

    /// Waits for room for one request and `bytes` of memory.
    pub(super) async fn request(self: &Rc<Self>, bytes: usize) -> Permit {
        loop {
            match self.try_request(bytes) {
                Some(permit) => return permit,
                None => self.freed.notified().await,
            }
        }
    }

    /// Waits for room for `bytes` more memory of a request that has its permit.
    ///
    /// Whoever holds memory must not wait here for more: holders of all of it could wait for each other.
    pub(super) async fn memory(self: &Rc<Self>, bytes: usize) -> Permit {
        while !self.has_room(bytes) {
            self.freed.notified().await;
        }
        self.take(0, bytes)
    }

    /// Waits until nothing is in flight.
    pub(super) async fn idle(&self) {
        while !self.is_idle() {
            self.freed.notified().await;
        }
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.requests.get() == 0 && self.bytes.get() == 0
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.bytes.get() == 0 || self.bytes.get() + bytes <= MAX_IN_FLIGHT_BYTES
    }

    fn take(self: &Rc<Self>, requests: usize, bytes: usize) -> Permit {
        self.requests.set(self.requests.get() + requests);
        self.bytes.set(self.bytes.get() + bytes);
        Permit { gauge: Rc::clone(self), requests, bytes }
    }
}

impl Permit {
    /// Adds another permit of the same connection, to be given back together.
    pub(super) fn join(&mut self, mut other: Permit) {
        debug_assert!(Rc::ptr_eq(&self.gauge, &other.gauge));
        self.requests += std::mem::take(&mut other.requests);
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Gives back the memory above `bytes`.
    pub(super) fn shrink(&mut self, bytes: usize) {
        let freed = self.bytes.saturating_sub(bytes);
        self.bytes -= freed;
        self.gauge.give_back(0, freed);
    }
}

impl Gauge {
    fn give_back(&self, requests: usize, bytes: usize) {
        if requests + bytes > 0 {
            self.requests.set(self.requests.get() - requests);
            self.bytes.set(self.bytes.get() - bytes);
            self.freed.notify_waiters();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gauge.give_back(self.requests, self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn requests_are_counted_and_given_back() {
        let gauge = Rc::new(Gauge::default());
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
        let gauge = Rc::new(Gauge::default());
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

    #[test]
    fn a_waiter_is_told() {
        crate::ring::run(async {
            let gauge = Rc::new(Gauge::default());
            let held = gauge.try_request(1).unwrap();
            let waiting = Rc::clone(&gauge);
            let waiter = async move { waiting.idle().await };
            let release = async move { drop(held) };
            futures_util::future::join(waiter, release).await;
        })
        .unwrap();
    }
}
