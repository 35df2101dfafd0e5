//! The keys of an export that say how its image is used: ours alone, nbd-server has none of them.

use super::config::Format;
use super::problem::Severity;
use super::reader::{At, Reader};
use crate::image::MIN_CACHE_BYTES;
use crate::qcow2::compress::Compression;
use crate::units::parse_size;
use std::time::Duration;

/// Longest `locktimeout`.
const MAX_LOCK_TIMEOUT: Duration = Duration::from_secs(3600);

/// What becomes of writes that hold nothing but zeroes (`detectzeroes`, as QEMU's `detect-zeroes`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// They are written like any other.
    #[default]
    Off,
    /// They become zeroes that need no new storage; storage that is there stays.
    On,
    /// They become zeroes and give their storage back.
    Unmap,
}

/// How an export's image is used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageKeys {
    /// Store full clusters compressed.
    pub compress: Option<Compression>,
    /// What becomes of writes of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Memory for cached tables of the whole chain, in bytes; `None`: as much as they take, up to a limit.
    pub cache_bytes: Option<u64>,
    /// Serve this internal snapshot, by its ID or name, instead of the disk as it is.
    pub snapshot: Option<String>,
    /// How long a client waits for an image that is in use elsewhere; `None`: as long as the server says.
    pub lock_timeout: Option<Duration>,
}

impl ImageKeys {
    /// Whether what becomes of a write depends on its bytes.
    pub(super) fn look_into_writes(&self) -> bool {
        self.compress.is_some() || self.detect_zeroes != DetectZeroes::Off
    }

    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'_>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "compress" => self.compress = compress(at, reader),
            "detectzeroes" => self.detect_zeroes = detect_zeroes(at, reader).unwrap_or_default(),
            "l2cache" => self.cache_bytes = cache_bytes(at, reader),
            "locktimeout" => self.lock_timeout = lock_timeout(at, reader),
            "snapshot" => self.snapshot = snapshot(at, reader),
            _ => return false,
        }
        true
    }

    /// Complains of keys that the image's format cannot follow. `at` finds a key in the group.
    pub(super) fn check<'a>(&self, format: Format, at: impl Fn(&str) -> Option<At<'a>>, reader: &mut Reader<'_>) {
        if format == Format::Qcow2 {
            return;
        }
        let wrong = [
            ("compress", self.compress.is_some(), Severity::Error),
            ("snapshot", self.snapshot.is_some(), Severity::Error),
            ("l2cache", self.cache_bytes.is_some(), Severity::Warning),
        ];
        for (key, is_set, severity) in wrong {
            if let (true, Some(at)) = (is_set, at(key)) {
                let what = "only a QCOW2 image has this, and the export is raw";
                reader.key(severity, at, what, "remove the key, or write format = qcow2 if it is one");
            }
        }
    }
}

fn compress(at: At<'_>, reader: &mut Reader<'_>) -> Option<Compression> {
    match reader.string(at)?.trim_end() {
        "zstd" => Some(Compression::Zstd),
        "zlib" => Some(Compression::Zlib),
        _ => {
            reader.key(Severity::Error, at, "this way of compressing is not known", "write zstd or zlib");
            None
        }
    }
}

fn detect_zeroes(at: At<'_>, reader: &mut Reader<'_>) -> Option<DetectZeroes> {
    match reader.string(at)?.trim_end() {
        "off" => Some(DetectZeroes::Off),
        "on" => Some(DetectZeroes::On),
        "unmap" => Some(DetectZeroes::Unmap),
        _ => {
            reader.key(Severity::Error, at, "this is no way to detect zeroes", "write off, on or unmap");
            None
        }
    }
}

fn cache_bytes(at: At<'_>, reader: &mut Reader<'_>) -> Option<u64> {
    match parse_size(reader.string(at)?.trim_end()) {
        Ok(bytes) if bytes >= MIN_CACHE_BYTES => Some(bytes),
        Ok(_) => {
            let remedy = format!("write at least {}K, or remove the key", MIN_CACHE_BYTES >> 10);
            reader.key(Severity::Error, at, "this is too little memory for the cached tables", remedy);
            None
        }
        Err(why) => {
            reader.key(Severity::Error, at, why, "write a size such as 16M");
            None
        }
    }
}

fn snapshot(at: At<'_>, reader: &mut Reader<'_>) -> Option<String> {
    let name = reader.string(at)?;
    if name.is_empty() {
        reader.key(Severity::Error, at, "no snapshot is named", "write its ID or name, or remove the key");
        return None;
    }
    Some(name)
}

/// A time in seconds, to the millisecond.
pub(super) fn lock_timeout(at: At<'_>, reader: &mut Reader<'_>) -> Option<Duration> {
    let text = reader.string(at)?;
    match seconds(text.trim_end()) {
        Some(time) if time <= MAX_LOCK_TIMEOUT => Some(time),
        found => {
            let what = if found.is_some() { "this is longer than an hour" } else { "this is no time in seconds" };
            reader.key(Severity::Error, at, what, "write seconds from 0 to 3600, such as 10 or 0.5");
            None
        }
    }
}

/// A number of seconds with up to three decimals.
pub(super) fn seconds(text: &str) -> Option<Duration> {
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 3 {
        return None;
    }
    let thousandths: u64 = format!("{part:0<3}").parse().ok()?;
    Duration::from_secs(whole.parse().ok()?).checked_add(Duration::from_millis(thousandths))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_seconds() {
        let ms = |ms| Some(Duration::from_millis(ms));
        for (text, time) in
            [("0", ms(0)), ("10", ms(10_000)), ("0.5", ms(500)), ("1.05", ms(1050)), ("007.250", ms(7250))]
        {
            assert_eq!(seconds(text), time, "{text}");
        }
        let huge = "9".repeat(30);
        for text in ["", ".", "1.", ".5", "-1", "+1", "1s", "1,5", "1e3", "0.0001", "1.2.3", " 1", "inf", &huge] {
            assert_eq!(seconds(text), None, "{text}");
        }
        assert_eq!(seconds(&u64::MAX.to_string()), Some(Duration::from_secs(u64::MAX)), "too long, but no overflow");
    }
}
