//! The keys that make an export a block device of this machine as well, `/dev/ublkbN`. Ours alone, nbd-server has none of
//! them. A change of theirs makes, remakes or removes the device, and leaves NBD clients alone.

use super::problem::Severity;
use super::reader::{At, Reader};
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// Queues of a device when nothing is said: as many as the machine has processors, but not more.
pub const MAX_DEFAULT_QUEUES: u16 = 4;
/// Requests that each queue takes at a time when nothing is said.
pub const DEFAULT_DEPTH: u16 = 64;

/// What `ublkid` may be: the driver's numbers are the minors of character devices.
const IDS: RangeInclusive<i32> = 0..=(1 << 20) - 1;
/// What `ublkqueues` may be; the driver's limit.
const QUEUES: RangeInclusive<i32> = 1..=4096;
/// What `ublkdepth` may be; the driver's limit.
const DEPTHS: RangeInclusive<i32> = 1..=MAX_DEPTH;
/// Requests that a queue takes at a time at most.
pub const MAX_DEPTH: i32 = 4096;

/// A block device over an export. A later version reads what this one has written down: a key that is new has a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceKeys {
    /// Its number, the N of `/dev/ublkbN` (`ublkid`); `None`: any that is free.
    pub id: Option<u32>,
    /// Queues, each with a thread of its own (`ublkqueues`); `None`: by the processors of the machine.
    pub queues: Option<u16>,
    /// Requests that each queue takes at a time (`ublkdepth`).
    pub depth: Option<u16>,
    /// Data is not copied where the kernel and the image make that possible (`ublkzerocopy`).
    pub zero_copy: bool,
}

impl Default for DeviceKeys {
    fn default() -> DeviceKeys {
        DeviceKeys { id: None, queues: None, depth: None, zero_copy: true }
    }
}

/// The keys as they are read, before what they mean together is known.
#[derive(Default)]
pub(super) struct Draft<'a> {
    on: bool,
    keys: DeviceKeys,
    set: Vec<At<'a>>,
    queues: Option<At<'a>>,
}

impl<'a> Draft<'a> {
    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'a>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "ublk" => {
                self.on = reader.boolean(at) == Some(true);
                return true;
            }
            "ublkid" => self.keys.id = number(at, reader, IDS).map(|n| n as u32),
            "ublkqueues" => {
                self.keys.queues = number(at, reader, QUEUES).map(|n| n as u16);
                self.queues = Some(at);
            }
            "ublkdepth" => self.keys.depth = number(at, reader, DEPTHS).map(|n| n as u16),
            "ublkzerocopy" => self.keys.zero_copy = reader.boolean(at).unwrap_or(true),
            _ => return false,
        }
        self.set.push(at);
        true
    }

    /// The keys, if there is to be a device, and complaints of those that contradict the rest of the export.
    pub(super) fn finish(self, copy_on_write: bool, reader: &mut Reader<'_>) -> Option<DeviceKeys> {
        let Draft { on, keys, set, queues } = self;
        if !on {
            for at in set {
                reader.key(Severity::Warning, at, "this key means nothing without ublk = true", "remove it");
            }
            return None;
        }
        if let (Some(at), Some(2..), true) = (queues, keys.queues, copy_on_write) {
            let what = "with copyonwrite each queue would write a layer of its own";
            reader.key(Severity::Error, at, what, "write ublkqueues = 1, or remove the key");
        }
        let queues = if copy_on_write { Some(1) } else { keys.queues };
        Some(DeviceKeys { queues, ..keys })
    }
}

fn number(at: At<'_>, reader: &mut Reader<'_>, allowed: RangeInclusive<i32>) -> Option<i32> {
    let number = reader.integer(at)?;
    if !allowed.contains(&number) {
        let remedy = format!("write a number from {} to {}, or remove the key", allowed.start(), allowed.end());
        reader.key(Severity::Error, at, "this number is out of range", remedy);
        return None;
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::{Parsed, Role, parse};
    use std::path::Path;

    fn export(keys: &str) -> Parsed {
        let text = format!("[a]\nexportname = /a\n{keys}\n");
        parse(text.as_bytes(), Path::new("/conf.d/a.conf"), Role::Included)
    }

    fn device(keys: &str) -> Option<DeviceKeys> {
        export(keys).exports[0].device.clone()
    }

    #[test]
    fn devices_are_asked_for() {
        assert_eq!((device(""), device("ublk = false")), (None, None));
        assert_eq!(device("ublk = true"), Some(DeviceKeys::default()));
        let all = DeviceKeys { id: Some(0), queues: Some(2), depth: Some(128), zero_copy: false };
        assert_eq!(device("ublk = true\nublkid = 0\nublkqueues = 2\nublkdepth = 128\nublkzerocopy = false"), Some(all));
        assert_eq!(device("ublk = true\ncopyonwrite = true").unwrap().queues, Some(1), "each queue is a client");
    }

    #[test]
    fn what_cannot_be_is_said() {
        for keys in [
            "ublkid = -1",
            "ublkid = 2000000",
            "ublkqueues = 0",
            "ublkdepth = 5000",
            "ublkqueues = 2\ncopyonwrite = true",
        ] {
            assert!(export(&format!("ublk = true\n{keys}")).failed, "{keys}");
        }
        let idle = export("ublkqueues = 2");
        assert!(!idle.failed && idle.problems[0].what.contains("without ublk = true"));
    }
}
