//! How fast the clients of one export may go together (`bandwidthlimit`, `iopslimit`), shared fairly between them.
//!
//! Asked by the frontends before a request takes memory or work begins: [`Limiter::pay`] returns when the request may go
//! on. Clients live on different threads; a reload changes the rates under them ([`Limiter::set`]), and who waits then
//! waits by the new ones.
//!
//! Rates: for bytes and operations alike the limiter keeps the moment at which everything paid so far has been earned.
//! A payment moves it on by what it costs, and has to wait while that would be more than `BURST` ahead of now.
//! Payments are cut into portions that cost no more than the burst, so nothing is ever owed, and a large request of one
//! client lets those of others in between.
//!
//! Fairness: portions wait in the order of a virtual time. A client's portion is due when its last one was plus what
//! this one costs, but no earlier than what is served now: clients that always want more get equal shares by cost,
//! whatever the sizes of their requests and however many they send at once, and who comes late is neither punished for it
//! nor owed anything. So nobody starves: in front of a portion there is at most about one of each other client.
//!
//! Whoever waits at the head sleeps until its portion is earned, lets everybody go whose turn has come, and wakes the
//! next head; a head that gives up wakes its successor.

use super::limit_keys::LimitKeys;
use super::locked;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// How much may be spent at once after a time of rest, as time at the full rate.
const BURST: Duration = Duration::from_millis(125);
/// Most bytes of a portion; and what counts as one operation of a large read or write.
pub const PORTION: u64 = 256 << 10;
const SECOND: u64 = 1_000_000_000;

/// What a request costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Bytes that are moved.
    pub bytes: u64,
    /// Operations.
    pub operations: u64,
}

impl Cost {
    /// Of a request that moves no data, however large its range.
    pub const OPERATION: Cost = Cost { bytes: 0, operations: 1 };

    /// Of moving `bytes` bytes: an operation for each [`PORTION`] that is begun.
    pub fn data(bytes: u64) -> Cost {
        Cost { bytes, operations: bytes.div_ceil(PORTION).max(1) }
    }
}

/// The limiter of one export, of all definitions of its name that share clients.
#[derive(Debug)]
pub struct Limiter {
    /// There is a limit; read without the lock for each request.
    limited: AtomicBool,
    start: Instant,
    state: Mutex<State>,
}

/// A client's place in the order. Belongs to one limiter.
#[derive(Debug, Default)]
pub struct Flow {
    /// Virtual time at which its last portion was due. Used under the limiter's lock only.
    due: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    limits: LimitKeys,
    /// When all bytes paid so far have been earned, in nanoseconds since the start.
    bytes_earned: u64,
    /// The same for operations.
    operations_earned: u64,
    /// The virtual time of what was let go last.
    virtual_now: u64,
    /// By virtual time, and in order of arrival.
    queue: BTreeMap<(u64, u64), Waiting>,
    arrivals: u64,
}

#[derive(Debug)]
struct Waiting {
    cost: Cost,
    turn: Arc<Turn>,
}

#[derive(Debug, Default)]
struct Turn {
    /// It has been let go. Written under the limiter's lock.
    come: AtomicBool,
    /// Told when it has, or when it is to look again.
    look: Notify,
}

impl Default for Limiter {
    fn default() -> Self {
        Limiter::new(LimitKeys::default())
    }
}

impl Limiter {
    /// A limiter that begins at rest.
    pub fn new(limits: LimitKeys) -> Limiter {
        let limiter = Limiter { limited: AtomicBool::new(false), start: Instant::now(), state: Mutex::default() };
        limiter.set(limits);
        limiter
    }

    /// What is in force.
    pub fn limits(&self) -> LimitKeys {
        locked(&self.state).limits
    }

    /// Other limits from now on, also for those who wait.
    pub fn set(&self, limits: LimitKeys) {
        let mut state = locked(&self.state);
        if state.limits == limits {
            return;
        }
        state.limits = limits;
        let now = self.now();
        (state.bytes_earned, state.operations_earned) = (now, now);
        self.limited.store(limits.bandwidth.is_some() || limits.iops.is_some(), Relaxed);
        state.queue.values().for_each(|waiting| waiting.turn.look.notify_one());
    }

    /// Whether anything is limited: if not, there is nothing to pay.
    pub fn is_limited(&self) -> bool {
        self.limited.load(Relaxed)
    }

    /// Waits until the limits allow what `cost` says, and counts it. May be dropped at any moment; what has been paid by
    /// then is spent.
    pub async fn pay(&self, flow: &Flow, cost: Cost) {
        let Cost { mut bytes, mut operations } = cost;
        while self.is_limited() && (bytes > 0 || operations > 0) {
            let limits = self.limits();
            let portion = limits.bandwidth.map_or(bytes, |rate| bytes.min(portion(rate)));
            // with the last bytes go the operations that are left
            let some = operations.min(1);
            self.pay_portion(flow, Cost { bytes: portion, operations: some }).await;
            bytes -= portion;
            operations -= some;
        }
    }

    async fn pay_portion(&self, flow: &Flow, cost: Cost) {
        let Some(place) = self.line_up(flow, cost) else { return };
        loop {
            match place.look() {
                Look::Come => return,
                Look::Head(pause) => {
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        () = place.turn.look.notified() => {}
                    }
                }
                Look::Behind => place.turn.look.notified().await,
            }
        }
    }

    /// `None`: nobody waits, and it could be paid at once.
    fn line_up(&self, flow: &Flow, cost: Cost) -> Option<Place<'_>> {
        let mut state = locked(&self.state);
        let now = self.now();
        let due = flow.due.load(Relaxed).max(state.virtual_now).saturating_add(state.virtual_cost(cost));
        flow.due.store(due, Relaxed);
        if state.queue.is_empty() && state.pause(cost, now) == 0 {
            state.let_go(due, cost, now);
            return None;
        }
        let key = (due, state.arrivals);
        state.arrivals += 1;
        let turn = Arc::new(Turn::default());
        state.queue.insert(key, Waiting { cost, turn: Arc::clone(&turn) });
        Some(Place { limiter: self, key, turn })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A place in the queue. Dropping it leaves the queue.
struct Place<'a> {
    limiter: &'a Limiter,
    key: (u64, u64),
    turn: Arc<Turn>,
}

enum Look {
    /// It was let go.
    Come,
    /// It is the first, and will be let go after this time.
    Head(Duration),
    /// Somebody else is, and will wake it.
    Behind,
}

impl Place<'_> {
    /// Lets everybody go whose turn has come, and says what is to be done by this one.
    fn look(&self) -> Look {
        let mut state = locked(&self.limiter.state);
        let now = self.limiter.now();
        let mut has_changed = false;
        let pause = loop {
            let Some((key, waiting)) = state.queue.first_key_value() else { break 0 };
            let (key, cost) = (*key, waiting.cost);
            match state.pause(cost, now) {
                0 => {}
                pause => break pause,
            }
            state.let_go(key.0, cost, now);
            if let Some(waiting) = state.queue.remove(&key) {
                waiting.turn.come.store(true, Relaxed);
                if key != self.key {
                    waiting.turn.look.notify_one();
                }
            }
            has_changed = true;
        };
        if has_changed {
            state.wake_head(self.key);
        }
        if self.turn.come.load(Relaxed) {
            return Look::Come;
        }
        match state.queue.first_key_value() {
            Some((key, _)) if *key == self.key => Look::Head(Duration::from_nanos(pause)),
            _ => Look::Behind,
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = locked(&self.limiter.state);
        if state.queue.remove(&self.key).is_some() {
            state.wake_head(self.key);
        }
    }
}

impl State {
    /// Has the first in the queue look, unless that is the one who asks.
    fn wake_head(&self, asking: (u64, u64)) {
        if let Some((_, head)) = self.queue.first_key_value().filter(|(key, _)| **key != asking) {
            head.turn.look.notify_one();
        }
    }

    /// Nanoseconds until this can be paid.
    fn pause(&self, cost: Cost, now: u64) -> u64 {
        let burst = BURST.as_nanos() as u64;
        let one = |earned: u64, rate: Option<u64>, amount: u64| match rate {
            Some(rate) if amount > 0 => {
                let price = price(amount, rate);
                // a single operation may cost more than the burst
                (earned.max(now) - now).saturating_add(price).saturating_sub(burst.max(price))
            }
            _ => 0,
        };
        let bytes = one(self.bytes_earned, self.limits.bandwidth, cost.bytes);
        bytes.max(one(self.operations_earned, self.limits.iops, cost.operations))
    }

    fn let_go(&mut self, due: u64, cost: Cost, now: u64) {
        self.virtual_now = self.virtual_now.max(due);
        if let Some(rate) = self.limits.bandwidth {
            self.bytes_earned = self.bytes_earned.max(now).saturating_add(price(cost.bytes, rate));
        }
        if let Some(rate) = self.limits.iops {
            self.operations_earned = self.operations_earned.max(now).saturating_add(price(cost.operations, rate));
        }
    }

    /// What a portion costs in virtual time: of what is limited, what takes longer.
    fn virtual_cost(&self, cost: Cost) -> u64 {
        let one = |rate: Option<u64>, amount: u64| rate.map_or(0, |rate| price(amount, rate));
        one(self.limits.bandwidth, cost.bytes).max(one(self.limits.iops, cost.operations))
    }
}

/// The time in nanoseconds in which `amount` is earned.
fn price(amount: u64, rate: u64) -> u64 {
    let price = u128::from(amount) * u128::from(SECOND) / u128::from(rate.max(1));
    u64::try_from(price).unwrap_or(u64::MAX)
}

/// The most bytes that are paid at once.
fn portion(rate: u64) -> u64 {
    (rate / (SECOND / BURST.as_nanos() as u64)).clamp(1, PORTION)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use futures_util::future::join_all;
    use std::cell::Cell;

    fn limits(bandwidth: Option<u64>, iops: Option<u64>) -> LimitKeys {
        LimitKeys { bandwidth, iops, idle_timeout: None }
    }

    /// On the machine's clock: nothing here asserts that something took little time.
    fn on_a_runtime<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime").block_on(future)
    }

    #[test]
    fn nothing_is_paid_without_a_limit() {
        let limiter = Limiter::new(LimitKeys::default());
        assert!(!limiter.is_limited());
        assert!(limiter.pay(&Flow::default(), Cost::data(u64::MAX)).now_or_never().is_some());
    }

    #[test]
    fn what_a_request_costs() {
        assert_eq!(Cost::data(0).operations, 1);
        assert_eq!(Cost::data(PORTION).operations, 1);
        assert_eq!(Cost::data(PORTION + 1).operations, 2);
        assert_eq!((portion(8 << 20), portion(1 << 40), portion(4096)), (PORTION, PORTION, 512));
        assert_eq!(price(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn the_rate_holds_and_rest_earns_no_more_than_the_burst() {
        on_a_runtime(async {
            let limiter = Limiter::new(limits(Some(1 << 20), None));
            let flow = Flow::default();
            for _ in 0..2 {
                let start = Instant::now();
                limiter.pay(&flow, Cost::data(512 << 10)).await;
                let least = Duration::from_millis(500) - BURST;
                assert!(start.elapsed() >= least, "{:?}", start.elapsed());
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            let limiter = Limiter::new(limits(None, Some(100)));
            let start = Instant::now();
            for _ in 0..50 {
                limiter.pay(&flow, Cost::OPERATION).await;
            }
            assert!(start.elapsed() >= Duration::from_millis(500) - BURST);
        });
    }

    #[test]
    fn clients_share_by_cost_not_by_the_number_of_requests() {
        on_a_runtime(async {
            let limiter = Limiter::new(limits(Some(4 << 20), None));
            // one sends many large requests at once, one a small request at a time
            let (greedy, modest) = (Flow::default(), Flow::default());
            let (taken, stop) = (Cell::new(0_u64), Cell::new(false));
            let many = join_all((0..20).map(|_| async {
                while !stop.get() {
                    limiter.pay(&greedy, Cost::data(PORTION)).await;
                    taken.set(taken.get() + PORTION);
                }
            }));
            let one = async {
                let mut bytes = 0;
                while bytes < 2 << 20 {
                    limiter.pay(&modest, Cost::data(4096)).await;
                    bytes += 4096;
                }
                stop.set(true);
                bytes
            };
            let (_, bytes) = futures_util::join!(many, one);
            // what the many had under way when the other ended is theirs on top
            assert!(taken.get() <= 2 * bytes + 21 * PORTION, "{} beside {bytes}", taken.get());
        });
    }

    #[test]
    fn a_new_rate_and_the_end_of_one_count_for_those_who_wait() {
        on_a_runtime(async {
            for then in [limits(Some(1 << 40), None), LimitKeys::default()] {
                let limiter = Limiter::new(limits(Some(4096), Some(1)));
                let flows: Vec<Flow> = (0..3).map(|_| Flow::default()).collect();
                let waiting = join_all(flows.iter().map(|flow| limiter.pay(flow, Cost::data(1 << 30))));
                let change = async {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    limiter.set(then);
                };
                let both = futures_util::future::join(waiting, change);
                tokio::time::timeout(Duration::from_secs(60), both).await.expect("days at the former rate");
            }
        });
    }

    #[test]
    fn who_gives_up_leaves_the_others_their_turn() {
        on_a_runtime(async {
            let limiter = Limiter::new(limits(None, Some(20)));
            let (first, second) = (Flow::default(), Flow::default());
            for _ in 0..3 {
                limiter.pay(&first, Cost::OPERATION).await;
            }
            let mut leaves = Box::pin(limiter.pay(&first, Cost::OPERATION));
            let mut stays = Box::pin(limiter.pay(&second, Cost::OPERATION));
            assert!((&mut leaves).now_or_never().is_none() && (&mut stays).now_or_never().is_none());
            drop(leaves);
            tokio::time::timeout(Duration::from_secs(60), stays).await.expect("its turn comes");
            assert!(locked(&limiter.state).queue.is_empty());
        });
    }
}
