//! How much file work a thread does itself before it lets others have their turn, or leaves the work to the ring.
//!
//! Reads that hit the page cache and small buffered writes are cheapest done in place (`kernel-notes/` has the
//! figures), but a task that never waits would keep the thread to itself, and a write that the kernel holds up
//! (dirty throttling, a full journal) would hold up everything else on the thread. [`super::file`] asks here.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Work done in place, in bytes, after which other tasks get a turn. Sockets and timers are looked at after some
/// sixty turns, so this times sixty is their latency on a busy thread: 2 to 3 ms.
const TURN_BYTES: usize = 256 << 10;
/// What an operation costs beside its bytes: as much as moving this many.
const OPERATION_BYTES: usize = 16 << 10;
/// A write in place that took longer was held up: the kernel throttles in pauses of 10 to 200 ms. A hot write takes
/// 0.1 ms, but on a busy machine the scheduler may put a few milliseconds in between.
const HELD_UP: Duration = Duration::from_millis(5);
/// Held-up writes may take this part of a thread's time: one tenth.
const REST_FACTOR: u32 = 9;

/// One thread's account.
#[derive(Default)]
pub(super) struct Pace {
    /// Until then writes go through the ring, whose kernel threads may be held up instead.
    resting_until: Cell<Option<Instant>>,
    /// Since other tasks last had a turn, in bytes.
    spent: Cell<usize>,
}

thread_local! {
    static PACE: Pace = Pace::default();
}

impl Pace {
    /// Calls `f` with this thread's account.
    pub(super) fn here<T>(f: impl FnOnce(&Pace) -> T) -> T {
        PACE.with(f)
    }

    /// Whether a write may be done in place at `now`.
    pub(super) fn may_write(&self, now: Instant) -> bool {
        self.resting_until.get().is_none_or(|until| now >= until)
    }

    /// A write in place ran from `start` to `end`.
    pub(super) fn wrote(&self, start: Instant, end: Instant) {
        let took = end - start;
        // Kept per thread, not per file: many files on one slow disk would add up to a blocked thread.
        let rest = if took > HELD_UP { end.checked_add(took * REST_FACTOR) } else { None };
        self.resting_until.set(rest);
    }

    /// An operation on `bytes` was done in place. True when it is time to yield.
    pub(super) fn spend(&self, bytes: usize) -> bool {
        let spent = self.spent.get() + bytes + OPERATION_BYTES;
        let over = spent >= TURN_BYTES;
        self.spent.set(if over { 0 } else { spent });
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_up_write_sends_the_next_ones_to_the_ring_for_nine_times_as_long() {
        let pace = Pace::default();
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        assert!(pace.may_write(start));
        pace.wrote(start, after(3));
        assert!(pace.may_write(after(3)), "an ordinary write changes nothing");
        pace.wrote(start, after(200));
        assert!(!pace.may_write(after(201)) && !pace.may_write(after(1999)));
        assert!(pace.may_write(after(2000)));
    }

    #[test]
    fn small_operations_count_too() {
        let pace = Pace::default();
        assert!(pace.spend(TURN_BYTES));
        let operations = (1..).find(|_| pace.spend(512)).unwrap();
        assert!((8..=64).contains(&operations), "{operations}");
        assert!(!pace.spend(0), "a new turn starts from nothing");
    }
}
