//! The names of backup and migration exports: made from their parts, and parsed back.
//!
//! ```text
//! backup-{context}-disk{N}-{full|incr}-{YYYYMMDDTHHMMSS}        time in UTC
//! migration-vm-{uuid}-disk{N}
//! ```
//!
//! Pure; called by the commands that name exports. Promises: a name has at most [`MAX_BYTES`] bytes, all of them safe in
//! an NBD URI, in a file name and in a group header of the configuration; different parts give different names;
//! `parse(format(x)) = x`. A context that does not fit is shortened to its beginning, [`MARK`] and a digest of all of
//! it. No context can hold the mark, so a shortened one is never taken for a plain one. How it is shortened must never
//! change: existing backups are found by their names.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

/// Longest name in bytes.
pub const MAX_BYTES: usize = 63;
/// Highest disk number.
pub const MAX_DISK: u16 = 999;
/// Stands in a shortened context between its beginning and the digest, and in no other.
pub const MARK: char = '~';

/// How much of a shortened context is its own beginning.
const KEPT_BYTES: usize = 6;
/// Characters of the digest, of five bits each: 100 bits, so that two contexts meet by chance in no installation.
const DIGEST_CHARS: usize = 20;
/// The digits of RFC 4648's base 32, in lower case.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
/// `YYYYMMDDTHHMMSS`
const TIME_BYTES: usize = 15;
const UUID_BYTES: usize = 36;

/// What an export is for, as its name tells.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// A backup of one disk.
    Backup(Backup),
    /// The target of a disk that moves.
    Migration(Migration),
}

/// The parts of a backup's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    context: String,
    disk: Disk,
    kind: BackupKind,
    time: Time,
}

/// The parts of a migration's name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Migration {
    vm: String,
    disk: Disk,
}

/// What a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BackupKind {
    /// All of the disk.
    Full,
    /// What has changed since the backup before.
    Incr,
}

/// The number of a disk, at most [`MAX_DISK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Disk(u16);

/// A second in UTC, of the years 1970 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(DateTime);

/// Why there is no such name. `Display` says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No context.
    #[error("the context is empty; give the identifier of the machine's backup context")]
    EmptyContext,
    /// A context with a character that names do not hold.
    #[error("the context holds {found:?}; it may hold ASCII letters, digits, `-`, `_` and `.`")]
    Character {
        /// The first such character.
        found: char,
    },
    /// A context that is one of ours already, shortened.
    #[error("the context holds `~`, which marks a shortened one; give the context as it was before that")]
    Shortened,
    /// A disk number that is none, or too high.
    #[error("{found:?} is no number of a disk; write one from 0 to {MAX_DISK}")]
    Disk {
        /// What was given.
        found: String,
    },
    /// A type of backup that is none.
    #[error("{found:?} is no type of backup; write full or incr")]
    Kind {
        /// What was given.
        found: String,
    },
    /// A time that is none.
    #[error(
        "{found:?} is no time from 1970 to 9999; write YYYYMMDDTHHMMSS (UTC), 2025-01-31T12:00:00Z (RFC 3339), \
         or @SECONDS since 1970"
    )]
    Time {
        /// What was given.
        found: String,
    },
    /// A UUID that is none.
    #[error("{found:?} is no UUID; write it as 8-4-4-4-12 hexadecimal digits")]
    Uuid {
        /// What was given.
        found: String,
    },
    /// A text that no name looks like.
    #[error("{found:?} is no name of a backup or migration export: {why}")]
    Shape {
        /// What was given.
        found: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

impl Backup {
    /// Names a backup. A context that does not fit is shortened.
    pub fn new(context: &str, disk: Disk, kind: BackupKind, time: Time) -> Result<Backup, NameError> {
        if context.contains(MARK) {
            return Err(NameError::Shortened);
        }
        if context.is_empty() {
            return Err(NameError::EmptyContext);
        }
        if let Some(found) = context.chars().find(|c| !is_plain(*c)) {
            return Err(NameError::Character { found });
        }
        let context = if context.len() > disk.room() { shorten(context) } else { context.to_owned() };
        Ok(Backup { context, disk, kind, time })
    }

    /// The context as it stands in the name; maybe shortened.
    pub fn context(&self) -> &str {
        &self.context
    }

    /// Whether the context was shortened, so that the whole of it cannot be told from the name.
    pub fn is_shortened(&self) -> bool {
        self.context.contains(MARK)
    }

    /// The disk.
    pub fn disk(&self) -> Disk {
        self.disk
    }

    /// What it holds.
    pub fn kind(&self) -> BackupKind {
        self.kind
    }

    /// When it was made.
    pub fn time(&self) -> Time {
        self.time
    }
}

impl Migration {
    /// Names the target of a disk that moves. The UUID stays as it is written: case matters.
    pub fn new(vm: &str, disk: Disk) -> Result<Migration, NameError> {
        match is_uuid(vm) {
            true => Ok(Migration { vm: vm.to_owned(), disk }),
            false => Err(NameError::Uuid { found: shown(vm) }),
        }
    }

    /// The machine's UUID.
    pub fn vm(&self) -> &str {
        &self.vm
    }

    /// The disk.
    pub fn disk(&self) -> Disk {
        self.disk
    }
}

impl BackupKind {
    /// The word in the name.
    pub fn word(self) -> &'static str {
        match self {
            BackupKind::Full => "full",
            BackupKind::Incr => "incr",
        }
    }
}

impl FromStr for BackupKind {
    type Err = NameError;

    fn from_str(text: &str) -> Result<BackupKind, NameError> {
        match text {
            "full" => Ok(BackupKind::Full),
            "incr" => Ok(BackupKind::Incr),
            _ => Err(NameError::Kind { found: shown(text) }),
        }
    }
}

impl Disk {
    /// The disk of this number.
    pub fn new(number: u16) -> Option<Disk> {
        (number <= MAX_DISK).then_some(Disk(number))
    }

    /// Its number.
    pub fn number(self) -> u16 {
        self.0
    }

    /// How many bytes of a backup's name are left for the context.
    fn room(self) -> usize {
        MAX_BYTES - "backup-".len() - "-disk".len() - self.to_string().len() - "-full-".len() - TIME_BYTES
    }
}

impl Time {
    /// The second that began this long after 1970.
    pub fn from_unix(seconds: i64) -> Option<Time> {
        Timestamp::from_second(seconds).ok().and_then(Time::from_timestamp)
    }

    /// In the form of RFC 3339: `2025-01-31T12:00:00Z`.
    pub fn rfc3339(self) -> String {
        format!("{}Z", self.0)
    }

    fn from_timestamp(time: Timestamp) -> Option<Time> {
        let time = TimeZone::UTC.to_datetime(time);
        // whole seconds; a fraction belongs to the second that it is in
        let time = DateTime::new(time.year(), time.month(), time.day(), time.hour(), time.minute(), time.second(), 0);
        time.ok().filter(|t| t.year() >= 1970).map(Time)
    }

    /// `YYYYMMDDTHHMMSS`
    fn from_compact(text: &str) -> Option<Time> {
        let bytes = text.as_bytes();
        let is_shaped = bytes.len() == TIME_BYTES
            && bytes.iter().enumerate().all(|(i, b)| if i == 8 { *b == b'T' } else { b.is_ascii_digit() });
        if !is_shaped {
            return None;
        }
        let two = |at: usize| text[at..at + 2].parse::<i8>().ok();
        let year = text[..4].parse::<i16>().ok().filter(|year| *year >= 1970)?;
        DateTime::new(year, two(4)?, two(6)?, two(9)?, two(11)?, two(13)?, 0).ok().map(Time)
    }

    /// `YYYY-MM-DDTHH:MM:SS`, maybe a fraction, and `Z` or an offset.
    fn from_rfc3339(text: &str) -> Option<Time> {
        let shape = b"0000-00-00T00:00:00";
        let bytes = text.as_bytes();
        let is_shaped = bytes.len() > shape.len()
            && bytes.len() <= "2025-01-31T12:00:00.123456789+00:00".len()
            && shape.iter().zip(bytes).all(|(s, b)| match s {
                b'0' => b.is_ascii_digit(),
                b'T' => matches!(b, b'T' | b't' | b' '),
                other => other == b,
            })
            // no [Zone/Name], which would be read over
            && bytes[shape.len()..].iter().all(|b| b.is_ascii_digit() || b".+-:Zz".contains(b));
        // a leap second has no name of its own: it would be read as the second before
        if !is_shaped || &bytes[17..19] == b"60" {
            return None;
        }
        text.parse().ok().and_then(Time::from_timestamp)
    }
}

impl FromStr for Time {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Time, NameError> {
        let time = match text.strip_prefix('@') {
            Some(seconds) if seconds.bytes().all(|b| b.is_ascii_digit()) => {
                seconds.parse().ok().and_then(Time::from_unix)
            }
            Some(_) => None,
            None => Time::from_compact(text).or_else(|| Time::from_rfc3339(text)),
        };
        time.ok_or_else(|| NameError::Time { found: shown(text) })
    }
}

impl FromStr for Disk {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Disk, NameError> {
        // one way to write each number: 01 would be a second name for disk 1
        let is_canonical = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        let number = if is_canonical { text.parse().ok().and_then(Disk::new) } else { None };
        number.ok_or_else(|| NameError::Disk { found: shown(text) })
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Name, NameError> {
        let wrong = |why| NameError::Shape { found: shown(text), why };
        if text.len() > MAX_BYTES {
            return Err(wrong("it is longer than 63 bytes"));
        }
        if let Some(rest) = text.strip_prefix("backup-") {
            // from the end, where every part has a fixed shape: a context may look like anything
            let (rest, time) = rest.rsplit_once('-').ok_or(wrong("there is no -YYYYMMDDTHHMMSS at its end"))?;
            let time = Time::from_compact(time).ok_or(wrong("there is no -YYYYMMDDTHHMMSS at its end"))?;
            let (rest, kind) = rest.rsplit_once('-').ok_or(wrong("there is no -full or -incr before the time"))?;
            let kind = kind.parse().map_err(|_| wrong("there is no -full or -incr before the time"))?;
            let (context, disk) = split_disk(rest).ok_or(wrong("there is no -diskN before the type"))?;
            if !is_context(context) {
                return Err(wrong("its context holds other than ASCII letters, digits, `-`, `_` and `.`"));
            }
            let backup = Backup { context: context.to_owned(), disk, kind, time };
            return Ok(Name::Backup(backup));
        }
        if let Some(rest) = text.strip_prefix("migration-vm-") {
            let (vm, disk) = split_disk(rest).ok_or(wrong("there is no -diskN at its end"))?;
            return match is_uuid(vm) {
                true => Ok(Name::Migration(Migration { vm: vm.to_owned(), disk })),
                false => Err(wrong("there is no UUID behind migration-vm-")),
            };
        }
        Err(wrong("it begins with neither `backup-` nor `migration-vm-`"))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Backup(Backup { context, disk, kind, time }) => {
                write!(f, "backup-{context}-disk{disk}-{}-{time}", kind.word())
            }
            Name::Migration(Migration { vm, disk }) => write!(f, "migration-vm-{vm}-disk{disk}"),
        }
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// `YYYYMMDDTHHMMSS`
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = &self.0;
        write!(f, "{:04}{:02}{:02}T", t.year(), t.month(), t.day())?;
        write!(f, "{:02}{:02}{:02}", t.hour(), t.minute(), t.second())
    }
}

/// What a context may hold. All of these stand for themselves in a URI, in a file name and in a group header.
fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// A context as it may stand in a name: plain, or shortened.
fn is_context(text: &str) -> bool {
    let plain = |text: &str| !text.is_empty() && text.chars().all(is_plain);
    match text.split_once(MARK) {
        Some((kept, digest)) => {
            plain(kept)
                && (kept.len(), digest.len()) == (KEPT_BYTES, DIGEST_CHARS)
                && digest.bytes().all(|b| DIGITS.contains(&b))
        }
        None => plain(text),
    }
}

/// The beginning of a plain context, the mark and a digest of all of it; the same for every disk.
fn shorten(context: &str) -> String {
    let digest = Sha256::digest(context.as_bytes());
    let bits = digest.iter().take(16).fold(0_u128, |bits, byte| (bits << 8) | u128::from(*byte));
    let digits = (0..DIGEST_CHARS).map(|i| DIGITS[(bits >> (123 - 5 * i)) as usize & 31] as char);
    let kept = &context[..KEPT_BYTES];
    format!("{kept}{MARK}{}", digits.collect::<String>())
}

/// What stands before `-diskN`, and the disk.
fn split_disk(text: &str) -> Option<(&str, Disk)> {
    let (before, number) = text.rsplit_once("-disk")?;
    Some((before, number.parse().ok()?))
}

fn is_uuid(text: &str) -> bool {
    text.len() == UUID_BYTES
        && text.bytes().enumerate().all(|(i, b)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => b.is_ascii_hexdigit(),
        })
}

/// As much of a text as a message shows.
fn shown(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn backup(context: &str, disk: u16, kind: BackupKind, time: &str) -> Result<Name, NameError> {
        let disk = Disk::new(disk).expect("disk");
        Backup::new(context, disk, kind, time.parse().expect("time")).map(Name::Backup)
    }

    fn text(context: &str, disk: u16) -> String {
        backup(context, disk, BackupKind::Full, "20250101T120000").expect("name").to_string()
    }

    #[test]
    fn the_shape_of_names() {
        assert_eq!(text("ctx-pgtest2", 0), "backup-ctx-pgtest2-disk0-full-20250101T120000");
        let incremental = backup("a", 12, BackupKind::Incr, "@1735732801").expect("name");
        assert_eq!(incremental.to_string(), "backup-a-disk12-incr-20250101T120001");
        let uuid = "0b9f4c6e-3c1d-4E57-9f3e-0a1b2c3d4e5f";
        let migration = Migration::new(uuid, Disk(999)).expect("name");
        assert_eq!(Name::Migration(migration).to_string(), format!("migration-vm-{uuid}-disk999"));
    }

    /// These never change: existing backups are found by them.
    #[test]
    fn a_context_is_shortened_only_when_it_must_be_and_always_alike() {
        let fits = "c".repeat(29);
        assert_eq!(text(&fits, 9), format!("backup-{fits}-disk9-full-20250101T120000"));
        assert_eq!(text(&fits, 9).len(), MAX_BYTES);
        let uuid = "0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5f";
        assert_eq!(text(uuid, 0), "backup-0b9f4c~vvqechmxm6ahhap5yg4v-disk0-full-20250101T120000");
        assert_eq!(text(uuid, 999), "backup-0b9f4c~vvqechmxm6ahhap5yg4v-disk999-full-20250101T120000");
        let shortened = text(&fits, 10);
        assert!(shortened.starts_with("backup-cccccc~") && shortened.len() < MAX_BYTES, "{shortened}");
    }

    #[test]
    fn a_context_has_safe_characters_only() {
        let refused = |context: &str| backup(context, 0, BackupKind::Full, "@0").expect_err(context);
        for bad in ["a/b", "a b", "a%41", "a]", "a[", "\u{e4}", "a\n", "a\0", "a:b", "a?b", "a#b", "a@b", "a\\"] {
            assert!(matches!(refused(bad), NameError::Character { .. }), "{bad:?}");
        }
        assert_eq!(refused("a~b"), NameError::Shortened);
        assert_eq!(refused(""), NameError::EmptyContext);
        assert!(refused("a\u{7f}").to_string().contains("'\\u{7f}'"), "a message is printable");
        for good in ["..", "-", "A.b_C-9", "a-disk1-full-20250101T120000"] {
            assert!(backup(good, 0, BackupKind::Full, "@0").is_ok(), "{good}");
        }
    }

    #[test]
    fn times() {
        let time = |text: &str| text.parse::<Time>().map(|t| t.to_string());
        for same in [
            "20240229T235959",
            "2024-02-29T23:59:59Z",
            "2024-02-29t23:59:59.999999999z",
            "2024-03-01T01:29:59+01:30",
            "2024-02-29 12:59:59-11:00",
            "@1709251199",
        ] {
            assert_eq!(time(same).as_deref(), Ok("20240229T235959"), "{same}");
        }
        assert_eq!(time("99991231T235959").as_deref(), Ok("99991231T235959"));
        assert_eq!(time("@0").as_deref(), Ok("19700101T000000"));
        assert_eq!("@0".parse::<Time>().expect("time").rfc3339(), "1970-01-01T00:00:00Z");
        for bad in [
            "",
            "now",
            "20230229T000000",
            "20241301T000000",
            "20240101T240000",
            "20240101T006000",
            "20161231T235960",
            "2016-12-31T23:59:60Z",
            "19691231T235959",
            "1969-12-31T23:59:59Z",
            "20240101T00000",
            "20240101t000000",
            "2024010 T000000",
            "+2024101T000000",
            "2024-01-01",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00Z[UTC]",
            "2024-01-01T00:00:00+25:00x",
            "@",
            "@-1",
            "@+1",
            "@1.5",
            "@99999999999999999999",
            "@9223372036854775807",
            "\u{661}0240101T000000",
        ] {
            assert!(matches!(time(bad), Err(NameError::Time { .. })), "{bad}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "",
            "backup-",
            "backup--disk0-full-20250101T120000",
            "backup-a-disk0-full-20250101T120000 ",
            "backup-a-disk00-full-20250101T120000",
            "backup-a-disk01-full-20250101T120000",
            "backup-a-disk+1-full-20250101T120000",
            "backup-a-disk1000-full-20250101T120000",
            "backup-a-disk-full-20250101T120000",
            "backup-a-disk0-Full-20250101T120000",
            "backup-a-disk0-full-20250230T120000",
            "backup-a b-disk0-full-20250101T120000",
            "backup-a~b-disk0-full-20250101T120000",
            "backup-~aaaaaaaaaaaaaaaaaaaa-disk0-full-20250101T120000",
            "backup-abcdef~AAAAAAAAAAAAAAAAAAAA-disk0-full-20250101T120000",
            "backup-abcdef~aaaaaaaaaaaaaaaaaaa~-disk0-full-20250101T120000",
            "Backup-a-disk0-full-20250101T120000",
            "migration-vm-0-disk0",
            "migration-vm-0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5f",
            "migration-vm-0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5g-disk0",
            "migration-vm-{0b9f4c6e-3c1d-4e57-9f3e-0a1b2c3d4e5f}-disk0",
        ] {
            assert!(matches!(bad.parse::<Name>(), Err(NameError::Shape { .. })), "{bad}");
        }
        let long = format!("backup-{}-disk0-full-20250101T120000", "c".repeat(30));
        assert!(long.parse::<Name>().expect_err("long").to_string().contains("63"));
        assert_eq!(Disk::new(1000), None);
        assert!(Migration::new("a", Disk(0)).is_err());
    }

    /// Contexts made to collide: long common beginnings, look-alikes of shortened ones, whole tails of names inside.
    fn context() -> impl Strategy<Value = String> {
        prop_oneof![
            "[a-c]{1,3}",
            "[ab]{1,3}(-disk[0-9]{1,3}-(full|incr)-2025010[12]T12000[01]){0,2}",
            "common-beginning-of-the-name-[ab]{0,3}",
            "c{25,31}",
            "abcdef[._-][a-d2-3]{20}",
            "[A-Za-z0-9._-]{1,80}",
            // what shortening makes of another, without and with the mark's place taken by a plain character
            "[a-c]{28,40}".prop_map(|c| shorten(&c).replace(MARK, "-")),
            "[a-c]{28,40}".prop_map(|c| shorten(&c).replace(MARK, "")),
        ]
    }

    fn parts() -> impl Strategy<Value = (String, u16, bool, u32)> {
        (context(), prop_oneof![0..3_u16, 9..12_u16, 99..102_u16, 0..=MAX_DISK], any::<bool>(), 0..3_u32)
    }

    fn made((context, disk, full, second): &(String, u16, bool, u32)) -> Name {
        let kind = if *full { BackupKind::Full } else { BackupKind::Incr };
        backup(context, *disk, kind, &format!("2025010{}T120001", second + 1)).expect("name")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn different_parts_give_different_names(all in proptest::collection::vec(parts(), 2..60)) {
            let mut seen = HashMap::new();
            for parts in all {
                let name = made(&parts).to_string();
                let before = seen.insert(name.clone(), parts.clone());
                prop_assert!(before.as_ref().is_none_or(|b| *b == parts), "{name}: {before:?} and {parts:?}");
            }
        }

        #[test]
        fn names_are_parsed_back(parts in parts()) {
            let name = made(&parts);
            let text = name.to_string();
            prop_assert!(text.len() <= MAX_BYTES);
            prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.~".contains(&b)));
            prop_assert_eq!(text.parse::<Name>(), Ok(name.clone()));
            let Name::Backup(backup) = name else { panic!("a backup") };
            prop_assert_eq!(backup.is_shortened(), backup.context() != parts.0);
            prop_assert_eq!(backup.disk().number(), parts.1);
        }

        #[test]
        fn migrations_are_parsed_back(vm in "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", disk in 0..=MAX_DISK) {
            let name = Name::Migration(Migration::new(&vm, Disk(disk)).expect("name"));
            prop_assert_eq!(name.to_string().parse::<Name>(), Ok(name));
        }

        #[test]
        fn what_is_parsed_is_printed_the_same(
            text in "((backup|migration-vm)-)?[a-f0-9~_. -]{0,40}(-disk[0-9]{0,4})?(-(full|incr)-20250[1-9]3[01]T1[0-9]{5})?",
        ) {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,70}") {
            let _ = (text.parse::<Name>(), text.parse::<Time>(), text.parse::<Disk>());
            let _ = (Backup::new(&text, Disk(0), BackupKind::Full, Time::from_unix(0).expect("time")), Migration::new(&text, Disk(0)));
        }
    }
}
