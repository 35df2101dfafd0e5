//! The keys that limit what clients may take: of the whole server, in `[generic]`, and of one export. Ours alone,
//! nbd-server has none of them.
//!
//! Every one but `maxmemory` applies to a running daemon: those of the server to clients that come after a reload, the
//! rates of an export to its connected clients at once.

use super::image_keys::seconds;
use super::locked;
use super::problem::Severity;
use super::reader::{At, Reader};
use crate::units::parse_size;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::Duration;

/// How long a client may keep the server waiting during its handshake, when nothing else is said.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Clients at a time, all exports together, when nothing else is said.
pub const MAX_CLIENTS: usize = 4096;
/// Least `maxmemory` in bytes: room for a request of the largest size beside everything else.
pub const MIN_MEMORY: u64 = 256 << 20;

/// What `handshaketimeout` may be, in seconds.
const HANDSHAKE_SECONDS: RangeInclusive<u64> = 1..=3600;
/// What `idletimeout` may be beside 0, in seconds.
const IDLE_SECONDS: RangeInclusive<u64> = 1..=30 * 86_400;
/// What `maxclients` may be.
const CLIENTS: RangeInclusive<u64> = 1..=1_000_000;
/// What `bandwidthlimit` may be beside 0, in bytes a second.
const BANDWIDTH: RangeInclusive<u64> = 4 << 10..=1 << 50;
/// What `iopslimit` may be beside 0.
const IOPS: RangeInclusive<u64> = 1..=1_000_000_000;

/// Limits of the whole server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLimits {
    /// How long a client may keep the server waiting during its handshake, altogether (`handshaketimeout`).
    pub handshake_timeout: Duration,
    /// How long a client that has nothing in flight may send nothing (`idletimeout`); zero: for ever.
    pub idle_timeout: Duration,
    /// Clients at a time, all exports together (`maxclients`).
    pub max_clients: usize,
    /// Clients of one address at a time (`maxclientsperip`); `None`: no limit.
    pub max_clients_per_address: Option<usize>,
    /// Memory for the payload of all clients in bytes (`maxmemory`); `None`: by the memory of the machine.
    pub max_memory: Option<u64>,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            handshake_timeout: HANDSHAKE_TIMEOUT,
            idle_timeout: Duration::ZERO,
            max_clients: MAX_CLIENTS,
            max_clients_per_address: None,
            max_memory: None,
        }
    }
}

impl ServerLimits {
    /// Takes a key, if it is one of these. A value that cannot be understood is a problem and leaves the default.
    pub(super) fn read(&mut self, at: At<'_>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "handshaketimeout" => {
                self.handshake_timeout = time(at, reader, false, HANDSHAKE_SECONDS).unwrap_or(HANDSHAKE_TIMEOUT);
            }
            "idletimeout" => self.idle_timeout = idle_timeout(at, reader).unwrap_or_default(),
            "maxclients" => {
                self.max_clients = number(at, reader, false, CLIENTS).map_or(MAX_CLIENTS, |n| n as usize);
            }
            "maxclientsperip" => {
                self.max_clients_per_address = number(at, reader, true, CLIENTS).filter(|n| *n > 0).map(|n| n as usize);
            }
            "maxmemory" => self.max_memory = memory(at, reader),
            _ => return false,
        }
        true
    }
}

/// The limits of the server as configured now: the control thread sets them, frontends ask for each new client.
#[derive(Debug)]
pub struct LiveLimits(Mutex<ServerLimits>);

impl LiveLimits {
    /// These, until others are set.
    pub fn new(limits: ServerLimits) -> LiveLimits {
        LiveLimits(Mutex::new(limits))
    }

    /// What is in force.
    pub fn get(&self) -> ServerLimits {
        locked(&self.0).clone()
    }

    /// Others from now on.
    pub fn set(&self, limits: ServerLimits) {
        *locked(&self.0) = limits;
    }
}

/// Limits of one export. A reload changes them without retiring the export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitKeys {
    /// Bytes a second that all its clients together may read and write (`bandwidthlimit`); `None`: no limit.
    pub bandwidth: Option<u64>,
    /// Operations a second of all its clients together (`iopslimit`); `None`: no limit.
    pub iops: Option<u64>,
    /// How long a client that has nothing in flight may send nothing (`idletimeout`); zero: for ever; `None`: as the
    /// server says.
    pub idle_timeout: Option<Duration>,
}

impl LimitKeys {
    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'_>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "bandwidthlimit" => self.bandwidth = bandwidth(at, reader).filter(|rate| *rate > 0),
            "iopslimit" => self.iops = number(at, reader, true, IOPS).filter(|rate| *rate > 0),
            "idletimeout" => self.idle_timeout = idle_timeout(at, reader),
            _ => return false,
        }
        true
    }
}

fn idle_timeout(at: At<'_>, reader: &mut Reader<'_>) -> Option<Duration> {
    time(at, reader, true, IDLE_SECONDS)
}

/// A time in seconds, to the millisecond; zero if that means something too.
fn time(at: At<'_>, reader: &mut Reader<'_>, or_zero: bool, range: RangeInclusive<u64>) -> Option<Duration> {
    let text = reader.string(at)?;
    let (least, most) = (Duration::from_secs(*range.start()), Duration::from_secs(*range.end()));
    match seconds(text.trim_end()) {
        Some(time) if (least..=most).contains(&time) || or_zero && time.is_zero() => Some(time),
        found => {
            let what = if found.is_some() { "this time is out of range" } else { "this is no time in seconds" };
            let zero = if or_zero { ", or 0 for no limit" } else { "" };
            let remedy = format!("write seconds from {} to {}, such as 10 or 2.5{zero}", range.start(), range.end());
            reader.key(Severity::Error, at, what, remedy);
            None
        }
    }
}

/// A number in a range; zero if that means something too.
fn number(at: At<'_>, reader: &mut Reader<'_>, or_zero: bool, range: RangeInclusive<u64>) -> Option<u64> {
    let found = u64::try_from(reader.integer64(at)?).ok();
    let number = found.filter(|n| range.contains(n) || or_zero && *n == 0);
    if number.is_none() {
        let zero = if or_zero { ", or 0 for no limit" } else { "" };
        let remedy = format!("write a number from {} to {}{zero}", range.start(), range.end());
        reader.key(Severity::Error, at, "this number is out of range", remedy);
    }
    number
}

fn bandwidth(at: At<'_>, reader: &mut Reader<'_>) -> Option<u64> {
    let remedy = "write bytes a second from 4K to 1024T, such as 100M, or 0 for no limit";
    match parse_size(reader.string(at)?.trim_end()) {
        Ok(rate) if rate == 0 || BANDWIDTH.contains(&rate) => Some(rate),
        Ok(_) => {
            reader.key(Severity::Error, at, "this rate is out of range", remedy);
            None
        }
        Err(why) => {
            reader.key(Severity::Error, at, why, remedy);
            None
        }
    }
}

fn memory(at: At<'_>, reader: &mut Reader<'_>) -> Option<u64> {
    let remedy = format!("write a size of at least {}M, such as 2G, or remove the key", MIN_MEMORY >> 20);
    match parse_size(reader.string(at)?.trim_end()) {
        Ok(bytes) if bytes >= MIN_MEMORY => Some(bytes),
        Ok(_) => {
            reader.key(Severity::Error, at, "this is too little memory for requests of the largest size", remedy);
            None
        }
        Err(why) => {
            reader.key(Severity::Error, at, why, remedy);
            None
        }
    }
}
