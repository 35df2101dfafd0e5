//! Who is let in: clients in all, clients of one address, and what becomes of handshakes that idle when places get scarce.
//!
//! Called by the accept loops, which ask for a [`Place`] for each connection, and by the connection, which holds it to
//! its end. A place begins as that of a handshake. Handshakes have an allowance of their own, a part of all places
//! ([`HANDSHAKE_SHARE`]), because whoever connects and says nothing costs its sender nothing. When the allowance is used
//! up, or all places are taken, the oldest handshake of the address with most handshakes is closed: a flood closes its
//! own, and a client that gets on with its handshake is through long before its turn comes. A handshake that has asked for
//! its export waits for us and not we for it: it is settled ([`Place::settle`]), and as safe as any client.
//!
//! Clients of Unix sockets are not counted by address: the permissions of the socket have let them in, and a proxy would
//! be one user. Among handshakes to close a user counts as an address.

use crate::export::limit_keys::{LiveLimits, ServerLimits};
use crate::ring::Peer;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tracing::warn;

/// All places in multiples of those that handshakes may take.
const HANDSHAKE_SHARE: usize = 4;
/// Handshakes that are allowed however few places there are.
const MIN_HANDSHAKES: usize = 16;
/// Connections that were told to go and have not gone yet; while there are so many, nobody is let in.
const MAX_LEAVING: usize = 1024;
/// Least time between two log lines about clients that were turned away.
const SAY_PAUSE: Duration = Duration::from_secs(10);

/// All places.
pub(super) struct Places {
    limits: Arc<LiveLimits>,
    state: Mutex<State>,
    /// Told when the last place is given back.
    none_left: Notify,
}

#[derive(Default)]
struct State {
    /// Connections there are, those included that were told to go.
    present: usize,
    /// Connections that count.
    clients: usize,
    /// Handshakes that may be closed.
    handshakes: usize,
    sources: HashMap<Source, Crowd>,
    /// Sources with handshakes, by how many.
    by_handshakes: BTreeSet<(usize, Source)>,
    /// Number of the next place: the older one has the smaller.
    next: u64,
    said: Option<Instant>,
    /// Turned away since that was said.
    unsaid: usize,
}

/// Connections of one source.
#[derive(Default)]
struct Crowd {
    clients: usize,
    handshakes: BTreeMap<u64, Arc<Sign>>,
}

/// What tells a handshake to end.
#[derive(Default)]
struct Sign {
    /// It was told, and does not count any more. Written under the lock of the places.
    told: AtomicBool,
    go: Notify,
}

/// Where a client comes from, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Source {
    V4(Ipv4Addr),
    /// A network of 64 bits: what one host can have.
    V6([u16; 4]),
    User(u32),
    Unknown,
}

impl Source {
    fn of(peer: Peer) -> Source {
        match peer {
            Peer::Tcp(address) => match address.ip().to_canonical() {
                IpAddr::V4(ip) => Source::V4(ip),
                IpAddr::V6(ip) => {
                    let [a, b, c, d, ..] = ip.segments();
                    Source::V6([a, b, c, d])
                }
            },
            Peer::Unix { uid, .. } => Source::User(uid),
            Peer::Queue(_) | Peer::Unknown => Source::Unknown,
        }
    }

    fn has_limit(self) -> bool {
        matches!(self, Source::V4(_) | Source::V6(_))
    }
}

impl Places {
    pub(super) fn new(limits: Arc<LiveLimits>) -> Arc<Places> {
        Arc::new(Places { limits, state: Mutex::default(), none_left: Notify::new() })
    }

    /// A place for a client; another's handshake may be closed for it. `None`: there is none, and the client is to go.
    pub(super) fn enter(self: &Arc<Self>, peer: Peer) -> Option<Place> {
        let limits = self.limits.get();
        let source = Source::of(peer);
        let mut state = self.state();
        if let Err(why) = state.make_room(source, &limits) {
            state.say(why, &limits, peer);
            return None;
        }
        let id = state.next;
        state.next += 1;
        let go = Arc::<Sign>::default();
        state.present += 1;
        state.count_in(source);
        state.add_handshake(source, id, Arc::clone(&go));
        Some(Place { places: Arc::clone(self), source, id, go })
    }

    /// Closes a handshake if there is one: descriptors have become scarce.
    pub(super) fn make_room(&self) {
        let mut state = self.state();
        if let Some(source) = state.most_handshakes() {
            state.close_oldest(source);
        }
    }

    /// Waits until every place is given back.
    pub(super) async fn all_gone(&self) {
        loop {
            let none_left = self.none_left.notified();
            if self.state().present == 0 {
                return;
            }
            none_left.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which limit leaves no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Full {
    Address,
    Server,
}

impl State {
    fn make_room(&mut self, source: Source, limits: &ServerLimits) -> Result<(), Full> {
        let own = self.sources.get(&source).map_or(0, |crowd| crowd.clients);
        let crowded = |limit: usize| source.has_limit() && own >= limit;
        if limits.max_clients_per_address.is_some_and(crowded) && !self.close_oldest(source) {
            return Err(Full::Address);
        }
        let allowance = (limits.max_clients / HANDSHAKE_SHARE).max(MIN_HANDSHAKES);
        // those that were told to go need a moment, and there must not be any number of them
        if self.present - self.clients >= MAX_LEAVING {
            return Err(Full::Server);
        }
        if self.clients >= limits.max_clients || self.handshakes >= allowance {
            let crowd = self.most_handshakes().ok_or(Full::Server)?;
            self.close_oldest(crowd);
        }
        Ok(())
    }

    fn most_handshakes(&self) -> Option<Source> {
        self.by_handshakes.last().map(|(_, source)| *source)
    }

    /// Has the oldest handshake of a source end, which does not count any more. `false`: it has none.
    fn close_oldest(&mut self, source: Source) -> bool {
        let oldest = self.sources.get(&source).and_then(|crowd| crowd.handshakes.first_key_value());
        let Some((id, go)) = oldest.map(|(id, go)| (*id, Arc::clone(go))) else { return false };
        self.take_handshake(source, id);
        self.count_out(source);
        go.told.store(true, Relaxed);
        go.go.notify_one();
        true
    }

    fn count_in(&mut self, source: Source) {
        self.clients += 1;
        self.sources.entry(source).or_default().clients += 1;
    }

    fn count_out(&mut self, source: Source) {
        self.clients -= 1;
        if let Some(crowd) = self.sources.get_mut(&source) {
            crowd.clients -= 1;
            if crowd.clients == 0 {
                self.sources.remove(&source);
            }
        }
    }

    fn add_handshake(&mut self, source: Source, id: u64, go: Arc<Sign>) {
        let crowd = self.sources.entry(source).or_default();
        let before = crowd.handshakes.len();
        crowd.handshakes.insert(id, go);
        let after = crowd.handshakes.len();
        self.handshakes += after - before;
        self.by_handshakes.remove(&(before, source));
        self.by_handshakes.insert((after, source));
    }

    /// `false`: it is none, or was told to go.
    fn take_handshake(&mut self, source: Source, id: u64) -> bool {
        let Some(crowd) = self.sources.get_mut(&source) else { return false };
        let before = crowd.handshakes.len();
        if crowd.handshakes.remove(&id).is_none() {
            return false;
        }
        self.handshakes -= 1;
        self.by_handshakes.remove(&(before, source));
        if before > 1 {
            self.by_handshakes.insert((before - 1, source));
        }
        true
    }

    /// Logs that a client is turned away, but not for each of a flood.
    fn say(&mut self, why: Full, limits: &ServerLimits, peer: Peer) {
        self.unsaid += 1;
        if self.said.is_some_and(|said| said.elapsed() < SAY_PAUSE) {
            return;
        }
        let times = std::mem::take(&mut self.unsaid);
        self.said = Some(Instant::now());
        match why {
            Full::Server => {
                warn!(%peer, times, maxclients = limits.max_clients, "too many clients, closing the newest")
            }
            Full::Address => {
                let limit = limits.max_clients_per_address.unwrap_or_default();
                warn!(%peer, times, maxclientsperip = limit, "too many clients of one address, closing the newest");
            }
        }
    }
}

/// One connection's place. Dropping it gives it back.
#[must_use = "dropping it says that the client has gone"]
pub(super) struct Place {
    places: Arc<Places>,
    source: Source,
    id: u64,
    go: Arc<Sign>,
}

impl Place {
    /// Completes when the handshake is to end because others need the place.
    pub(super) async fn wanted(&self) {
        self.go.go.notified().await;
    }

    /// From now on the client is served or waits for us: it is not closed to make room.
    pub(super) fn settle(&self) {
        let mut state = self.places.state();
        state.take_handshake(self.source, self.id);
        if self.go.told.swap(false, Relaxed) {
            // it was told too late
            state.count_in(self.source);
        }
    }

    /// The client has to go on with its handshake: it was not served.
    pub(super) fn unsettle(&self) {
        let mut state = self.places.state();
        if !self.go.told.load(Relaxed) {
            state.add_handshake(self.source, self.id, Arc::clone(&self.go));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.state();
        state.take_handshake(self.source, self.id);
        if !self.go.told.load(Relaxed) {
            state.count_out(self.source);
        }
        state.present -= 1;
        let is_last = state.present == 0;
        drop(state);
        if is_last {
            self.places.none_left.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::net::SocketAddr;

    fn places(max_clients: usize, max_clients_per_address: Option<usize>) -> Arc<Places> {
        let limits = ServerLimits { max_clients, max_clients_per_address, ..ServerLimits::default() };
        Places::new(Arc::new(LiveLimits::new(limits)))
    }

    fn tcp(ip: &str) -> Peer {
        Peer::Tcp(SocketAddr::new(ip.parse().expect("an address"), 1))
    }

    fn is_wanted(place: &Place) -> bool {
        place.wanted().now_or_never().is_some()
    }

    #[test]
    fn where_clients_come_from() {
        let of = |ip| Source::of(tcp(ip));
        assert_eq!(of("192.0.2.1"), of("::ffff:192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert!(!Source::of(Peer::Unix { pid: 1, uid: 0 }).has_limit());
    }

    #[test]
    fn the_oldest_handshake_of_the_largest_crowd_makes_room() {
        let places = places(MIN_HANDSHAKES * HANDSHAKE_SHARE, None);
        let other = places.enter(tcp("192.0.2.2")).expect("a place");
        let mut crowd: Vec<Place> =
            (1..MIN_HANDSHAKES).map(|_| places.enter(tcp("192.0.2.1")).expect("a place")).collect();
        assert!(!crowd.iter().any(is_wanted));
        crowd.push(places.enter(tcp("192.0.2.3")).expect("a place"));
        assert!(is_wanted(&crowd[0]) && !crowd[1..].iter().any(is_wanted) && !is_wanted(&other));
        // who is served is safe, and the allowance of handshakes has room again
        crowd[1].settle();
        let more = places.enter(tcp("192.0.2.1")).expect("a place");
        assert!(!crowd[1..].iter().any(is_wanted));
        // until it has to go on with its handshake
        crowd[1].unsettle();
        let another = places.enter(tcp("192.0.2.1")).expect("a place");
        assert!(is_wanted(&crowd[1]) && !is_wanted(&more));
        drop((other, more, another, crowd));
        assert!(places.all_gone().now_or_never().is_some());
        let state = places.state();
        assert_eq!((state.present, state.clients, state.handshakes), (0, 0, 0));
        assert!(state.sources.is_empty() && state.by_handshakes.is_empty());
    }

    #[test]
    fn clients_that_are_served_are_never_closed() {
        let places = places(2, None);
        let served: Vec<Place> = (0..2).map(|_| places.enter(tcp("192.0.2.1")).expect("a place")).collect();
        served.iter().for_each(Place::settle);
        assert!(places.enter(tcp("192.0.2.2")).is_none());
        assert!(!served.iter().any(is_wanted));
        assert!(places.all_gone().now_or_never().is_none());
        drop(served);
        assert!(places.enter(tcp("192.0.2.2")).is_some());
    }

    #[test]
    fn places_of_one_address() {
        let places = places(100, Some(2));
        let first = places.enter(tcp("192.0.2.1")).expect("a place");
        first.settle();
        let second = places.enter(tcp("192.0.2.1")).expect("a place");
        let third = places.enter(tcp("192.0.2.1")).expect("the place of the handshake");
        assert!(is_wanted(&second) && !is_wanted(&first));
        third.settle();
        assert!(places.enter(tcp("192.0.2.1")).is_none());
        assert!(places.enter(tcp("192.0.2.2")).is_some());
        let unix: Vec<Option<Place>> = (0..9).map(|_| places.enter(Peer::Unix { pid: 1, uid: 0 })).collect();
        assert!(unix.iter().all(Option::is_some), "users are not counted");
    }

    #[test]
    fn who_was_told_too_late_counts_again() {
        let places = places(1, None);
        let first = places.enter(tcp("192.0.2.1")).expect("a place");
        let second = places.enter(tcp("192.0.2.1")).expect("the place of the first");
        first.settle();
        drop(second);
        assert!(places.enter(tcp("192.0.2.1")).is_none(), "the first has the only place");
        drop(first);
        assert_eq!(places.state().clients, 0);
    }

    #[test]
    fn those_told_to_go_are_bounded() {
        let places = places(10, None);
        let all: Vec<Option<Place>> = (0..2000).map(|_| places.enter(tcp("192.0.2.1"))).collect();
        assert_eq!(all.iter().flatten().count(), 10 + MAX_LEAVING);
    }
}
