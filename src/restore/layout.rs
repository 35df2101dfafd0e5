//! What is on a disk, from what the tools of util-linux say, and which part of it is to be mounted. Pure: text in,
//! decisions out. All of it comes from a disk that somebody else has written.

use crate::image::escapes::{Escape, unescape};
use crate::units::ByteRange;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The type of a partition that a machine's firmware starts from: of a disk with one more file system, it is not meant.
const EFI_SYSTEM: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

/// A partition as its table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it is, in bytes.
    pub start: u64,
    /// Its size in bytes.
    pub len: u64,
    /// Its type, as the kind of table writes it.
    pub kind: String,
    /// Its name in the table.
    pub name: Option<String>,
}

/// What a piece of a disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A file system.
    FileSystem,
    /// A physical volume of LVM.
    Lvm,
    /// Data that cannot be read without a key.
    Encrypted,
    /// A part of a RAID or another pool.
    Raid,
    /// Swap space.
    Swap,
    /// Partitions.
    Partitions,
    /// Something else, or nothing.
    Unknown,
}

/// What blkid finds at the beginning of a disk or partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Signature {
    /// `ID_FS_TYPE`.
    pub kind: Option<String>,
    /// `ID_FS_LABEL_ENC`.
    pub label: Option<String>,
    /// `ID_FS_UUID_ENC`.
    pub uuid: Option<String>,
    /// `ID_PART_TABLE_TYPE`.
    pub table: Option<String>,
}

/// A disk or partition with what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Content {
    /// Its number; none: the whole disk.
    pub partition: Option<u32>,
    /// Where it begins, in bytes.
    pub start_bytes: u64,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its name in the partition table.
    pub name: Option<String>,
    /// What it holds.
    pub kind: Kind,
    /// The file system, or what else it is.
    #[serde(rename = "type")]
    pub type_name: Option<String>,
    /// Its label.
    pub label: Option<String>,
    /// Its UUID.
    pub uuid: Option<String>,
    /// It can be mounted.
    pub mountable: bool,
    /// It can be mounted, but is meant only when it is named.
    #[serde(skip)]
    pub aside: bool,
    /// What to know about it, or why it cannot be mounted.
    pub note: Option<String>,
    /// The volume group of an LVM physical volume.
    pub volume_group: Option<String>,
    /// Its logical volumes.
    pub logical_volumes: Vec<LogicalVolume>,
}

/// A volume that LVM has made of physical ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LogicalVolume {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Size in bytes.
    pub size_bytes: u64,
    /// The kind of its partition table, as sfdisk calls it: `gpt`, `dos`.
    pub table: Option<String>,
    /// Its partitions, or the disk itself when it has none.
    pub contents: Vec<Content>,
    /// What to know about the disk.
    pub note: Option<String>,
}

/// Which driver of the kernel mounts a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Its name for mount(2).
    pub name: &'static str,
    /// Options of every mount.
    pub options: &'static str,
    /// Further options of a mount that does not write.
    pub read_only_options: &'static str,
    /// Further options of a mount that writes.
    pub writable_options: &'static str,
}

impl Driver {
    /// The options of a mount for mount(2).
    pub fn options(&self, writable: bool) -> String {
        let more = if writable { self.writable_options } else { self.read_only_options };
        let options = [self.options, more].into_iter().filter(|options| !options.is_empty());
        options.collect::<Vec<_>>().join(",")
    }
}

/// The drivers of a file system as blkid names it, to be tried one after the other. The list is short on purpose: what is
/// mounted here is hostile as long as nobody knows better, and these drivers are looked after.
pub fn drivers(kind: &str) -> &'static [Driver] {
    const fn plain(name: &'static str) -> Driver {
        Driver { name, options: "", read_only_options: "", writable_options: "" }
    }
    match kind {
        // the file system itself says what errors do if we do not, and may say "panic"
        "ext2" | "ext3" | "ext4" => {
            const EXT4: Driver =
                Driver { read_only_options: "errors=continue", writable_options: "errors=remount-ro", ..plain("ext4") };
            &[EXT4]
        }
        // the original may be mounted on this machine
        "xfs" => const { &[Driver { options: "nouuid", ..plain("xfs") }] },
        "btrfs" => const { &[plain("btrfs")] },
        // a disk of a machine that was running is dirty; a kernel has one of the two drivers, the second since 7.1
        "ntfs" => const { &[Driver { writable_options: "force", ..plain("ntfs3") }, plain("ntfs")] },
        "vfat" => const { &[plain("vfat")] },
        _ => &[],
    }
}

/// Whether a file system that was not mounted would be from a disk that can be written: it has something to replay.
pub fn wants_to_write(kind: &str, why_not: Errno) -> bool {
    match why_not {
        Errno::EROFS => true,
        // its log tree; the kernel's word for it is that of any other fault
        Errno::EIO => kind == "btrfs",
        _ => false,
    }
}

/// Reads what `sfdisk --json` prints. A partition that is not on the disk is an error that names it.
pub fn parse_table(json: &str, disk_bytes: u64) -> Result<(String, Vec<Partition>), String> {
    #[derive(Deserialize)]
    struct Printed {
        partitiontable: Table,
    }
    #[derive(Deserialize)]
    struct Table {
        label: String,
        #[serde(default = "sector")]
        sectorsize: u64,
        #[serde(default)]
        partitions: Vec<Row>,
    }
    #[derive(Deserialize)]
    struct Row {
        node: String,
        start: u64,
        size: u64,
        #[serde(rename = "type")]
        kind: String,
        name: Option<String>,
    }
    fn sector() -> u64 {
        512
    }
    let Printed { partitiontable: table } =
        serde_json::from_str(json).map_err(|e| format!("sfdisk's answer is not understood: {e}"))?;
    let mut partitions = Vec::new();
    for row in table.partitions {
        let digits = row.node.bytes().rev().take_while(u8::is_ascii_digit).count();
        let number: u32 = row.node[row.node.len() - digits..]
            .parse()
            .map_err(|_| format!("sfdisk names a partition {:?}, which has no number", row.node))?;
        let bytes = |sectors: u64| sectors.checked_mul(table.sectorsize);
        let on_disk = || {
            let (start, len) = (bytes(row.start)?, bytes(row.size)?);
            (start.checked_add(len)? <= disk_bytes && len > 0).then_some((start, len))
        };
        let Some((start, len)) = on_disk() else {
            return Err(format!(
                "the partition table is wrong: partition {number} is {} sectors from sector {} on, and the disk ends at \
                 byte {disk_bytes}; is this all of the disk?",
                row.size, row.start
            ));
        };
        partitions.push(Partition { number, start, len, kind: row.kind, name: row.name.filter(|n| !n.is_empty()) });
    }
    partitions.sort_by_key(|partition| partition.number);
    Ok((table.label, partitions))
}

/// Reads what `blkid -o udev` prints: unlike the form for shells it leaves UTF-8 as it is.
pub fn parse_signature(text: &str) -> Signature {
    let mut found: BTreeMap<&str, String> = BTreeMap::new();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        found.insert(key, unescaped(value));
    }
    let mut take = |key| found.remove(key).filter(|value| !value.is_empty());
    Signature {
        kind: take("ID_FS_TYPE"),
        label: take("ID_FS_LABEL_ENC"),
        uuid: take("ID_FS_UUID_ENC"),
        table: take("ID_PART_TABLE_TYPE"),
    }
}

/// udev's form of a text. Labels are bytes of any kind.
fn unescaped(value: &str) -> String {
    String::from_utf8_lossy(&unescape(value.as_bytes(), Escape::Hex)).into_owned()
}

impl Content {
    /// The whole disk.
    pub fn disk(size_bytes: u64, signature: Signature) -> Content {
        Content::new(None, ByteRange::between(0, size_bytes), None, signature)
    }

    /// A partition.
    pub fn partition(partition: &Partition, signature: Signature) -> Content {
        let place = ByteRange::between(partition.start, partition.start + partition.len);
        let aside = partition.kind.eq_ignore_ascii_case(EFI_SYSTEM) || partition.kind == "ef";
        Content { aside, ..Content::new(Some(partition.number), place, partition.name.clone(), signature) }
    }

    fn new(partition: Option<u32>, place: ByteRange, name: Option<String>, signature: Signature) -> Content {
        let Signature { kind: type_name, label, uuid, table } = signature;
        let (kind, note) = judge(type_name.as_deref(), table.as_deref());
        let mountable = type_name.as_deref().is_some_and(|name| !drivers(name).is_empty());
        Content {
            partition,
            start_bytes: place.start().0,
            size_bytes: place.len(),
            name,
            kind,
            type_name: type_name.or(table),
            label,
            uuid,
            mountable,
            aside: false,
            note,
            volume_group: None,
            logical_volumes: Vec::new(),
        }
    }

    /// Where it is.
    pub fn place(&self) -> ByteRange {
        ByteRange::between(self.start_bytes, self.start_bytes + self.size_bytes)
    }

    /// In words: `partition 2`, `the disk`.
    pub fn what(&self) -> String {
        self.partition.map_or("the disk".to_owned(), |number| format!("partition {number}"))
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let type_name = self.type_name.as_deref().unwrap_or("nothing that is known");
        let label = self.label.as_ref().map(|label| format!(" {label:?}")).unwrap_or_default();
        let note = self.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
        format!("{}: {type_name}{label}, {} bytes{note}", self.what(), self.size_bytes)
    }

    fn why_not(&self) -> String {
        match (&self.type_name, &self.note) {
            (None, _) => format!("{} holds no file system that blkid knows", self.what()),
            (Some(name), Some(note)) => format!("{} is {name}: {note}", self.what()),
            (Some(name), None) => format!("{} is {name}, which cannot be mounted here", self.what()),
        }
    }
}

/// What a signature means, and what is to be said about it.
fn judge(kind: Option<&str>, table: Option<&str>) -> (Kind, Option<String>) {
    let said = |kind, note: &str| (kind, Some(note.to_owned()));
    match kind {
        Some("LVM2_member") => said(
            Kind::Lvm,
            "an LVM physical volume; its logical volumes are not mounted by this command: make a block device of the \
             image (ublk = true in cowgate.conf(5)) and use lvm's tools on it",
        ),
        Some("crypto_LUKS") => said(Kind::Encrypted, "encrypted with LUKS; it takes its key and cryptsetup to read it"),
        Some("BitLocker") => {
            said(Kind::Encrypted, "encrypted with BitLocker; it takes its key and cryptsetup to read it")
        }
        Some("linux_raid_member") => said(Kind::Raid, "a member of a Linux RAID, whose other members belong to it"),
        Some("zfs_member") => said(Kind::Raid, "a part of a ZFS pool, which ZFS's own tools import"),
        Some(name) if name.ends_with("_raid_member") => said(Kind::Raid, "a member of a RAID"),
        Some("swap") => said(Kind::Swap, "swap space, which holds no files"),
        Some(name) if !drivers(name).is_empty() => (Kind::FileSystem, None),
        Some(_) => said(Kind::Unknown, "not one of ext2, ext3, ext4, xfs, btrfs, ntfs and vfat"),
        None if table.is_some() => said(Kind::Partitions, "a container of further partitions"),
        None => (Kind::Unknown, None),
    }
}

impl Layout {
    /// A disk with what blkid finds at its beginning, and its partitions, if it has a table of those.
    ///
    /// Partitions go before what else is found: whoever makes them over a file system leaves its signature there, while one
    /// that is made over them hides nothing but a partition that nobody sees any more.
    pub fn new(size_bytes: u64, whole: Signature, partitions: Option<(String, Vec<Content>)>) -> Layout {
        match partitions {
            Some((table, contents)) => {
                let note = whole.kind.map(|kind| {
                    format!("the disk has the signature of {kind}, too, which is probably older than its partitions")
                });
                Layout { size_bytes, table: Some(table), contents, note }
            }
            None => Layout { size_bytes, table: None, contents: vec![Content::disk(size_bytes, whole)], note: None },
        }
    }

    /// What is to be mounted: the partition that is named, or the only thing that can be.
    pub fn choose(&self, wanted: Option<u32>) -> Result<&Content, String> {
        if let Some(number) = wanted {
            let Some(found) = self.contents.iter().find(|content| content.partition == Some(number)) else {
                return Err(match self.table {
                    None => format!("there is no partition {number}: the disk has no partition table"),
                    Some(_) => format!("there is no partition {number}; {}", self.listed()),
                });
            };
            return if found.mountable { Ok(found) } else { Err(found.why_not()) };
        }
        if let ([only], None) = (&self.contents[..], &self.table) {
            return if only.mountable { Ok(only) } else { Err(only.why_not()) };
        }
        let candidates: Vec<&Content> = self.contents.iter().filter(|content| content.mountable).collect();
        let meant: Vec<&Content> = candidates.iter().filter(|content| !content.aside).copied().collect();
        match (&meant[..], &candidates[..]) {
            ([only], _) | ([], [only]) => Ok(only),
            ([], []) => Err(format!("no partition can be mounted; {}", self.listed())),
            _ => Err(format!("choose one with --partition N; {}", self.listed())),
        }
    }

    /// What holds data and cannot be mounted, beside what is chosen: it may have been meant. A line for people each.
    pub fn out_of_reach(&self) -> Vec<String> {
        let is_data = |content: &&Content| matches!(content.kind, Kind::Lvm | Kind::Encrypted | Kind::Raid);
        self.contents.iter().filter(is_data).map(Content::line).collect()
    }

    fn listed(&self) -> String {
        if self.contents.is_empty() {
            return "its partition table is empty".to_owned();
        }
        let lines: String = self.contents.iter().map(|content| format!("\n  {}", content.line())).collect();
        format!("there are:{lines}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT: &str = r#"{"partitiontable": {"label":"gpt","id":"X","device":"/dev/ublkb0","unit":"sectors",
        "firstlba":2048,"lastlba":131038,"sectorsize":512,"partitions": [
        {"node": "/dev/ublkb0p2","start": 67584,"size": 61440,"type": "0FC63DAF-8483-4772-8E79-3D69D8477DE4","uuid":"A","name":"data"},
        {"node": "/dev/ublkb0p1","start": 2048,"size": 65536,"type": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B","uuid":"B"}]}}"#;

    fn signature(kind: &str) -> Signature {
        Signature { kind: Some(kind.to_owned()), ..Signature::default() }
    }

    fn layout(kinds: &[&str]) -> Layout {
        let (table, partitions) = parse_table(GPT, 64 << 20).unwrap();
        let contents = partitions.iter().zip(kinds).map(|(p, kind)| Content::partition(p, signature(kind)));
        Layout::new(64 << 20, Signature::default(), Some((table, contents.collect())))
    }

    #[test]
    fn tables() {
        let (label, found) = parse_table(GPT, 64 << 20).unwrap();
        assert_eq!((label.as_str(), found.len()), ("gpt", 2));
        assert_eq!((found[0].number, found[0].start, found[0].len), (1, 1 << 20, 32 << 20));
        assert_eq!(found[1].name.as_deref(), Some("data"));
        let empty = parse_table(r#"{"partitiontable": {"label":"dos"}}"#, 512).unwrap();
        assert_eq!(empty, ("dos".to_owned(), vec![]));
    }

    #[test]
    fn options_of_mounts() {
        let options = |kind, writable| drivers(kind)[0].options(writable);
        assert_eq!(
            (options("ext4", false), options("ext2", true)),
            ("errors=continue".into(), "errors=remount-ro".into())
        );
        assert_eq!((options("xfs", true), options("btrfs", false)), ("nouuid".into(), String::new()));
        assert_eq!((options("ntfs", true), options("ntfs", false)), ("force".into(), String::new()));
    }

    #[test]
    fn what_is_to_be_replayed_asks_for_a_layer() {
        assert!(wants_to_write("xfs", Errno::EROFS) && wants_to_write("btrfs", Errno::EIO));
        assert!(!wants_to_write("ext4", Errno::EIO) && !wants_to_write("btrfs", Errno::EINVAL));
    }

    #[test]
    fn partitions_that_cannot_be_are_named() {
        let why = parse_table(GPT, 40 << 20).unwrap_err();
        assert!(why.contains("partition 2 is 61440 sectors from sector 67584"), "{why}");
        let wrap = r#"{"partitiontable":{"label":"gpt","partitions":[{"node":"/dev/a1","start":36028797018963968,"size":1,"type":"x"}]}}"#;
        assert!(parse_table(wrap, u64::MAX).is_err(), "times 512 it is zero");
        assert!(parse_table(&wrap.replace("a1", "a"), u64::MAX).unwrap_err().contains("has no number"));
        assert!(parse_table("sfdisk: oh", 1).is_err());
    }

    #[test]
    fn signatures() {
        let text = "ID_FS_LABEL=Donn\u{e9}_\nID_FS_LABEL_ENC=Donn\u{e9}\\x20\\x5cx41\\xff\\x\nID_FS_UUID_ENC=ab-c\nID_FS_TYPE=ext4\n";
        let found = parse_signature(text);
        assert_eq!(found.label.as_deref(), Some("Donn\u{e9} \\x41\u{fffd}\\x"));
        assert_eq!((found.kind.as_deref(), found.table), (Some("ext4"), None));
        assert_eq!(parse_signature(""), Signature::default());
    }

    #[test]
    fn the_only_file_system_is_meant() {
        assert_eq!(layout(&["swap", "xfs"]).choose(None).unwrap().partition, Some(2));
        assert_eq!(layout(&["vfat", "ext4"]).choose(None).unwrap().partition, Some(2), "nobody means the ESP");
        assert_eq!(layout(&["vfat", "ext4"]).choose(Some(1)).unwrap().partition, Some(1));
        let boot = layout(&["ext4", "LVM2_member"]);
        assert_eq!(boot.choose(None).unwrap().partition, Some(1));
        let others = boot.out_of_reach();
        assert!(others.len() == 1 && others[0].starts_with("partition 2: LVM2_member"), "{others:?}");
        let disk = Layout::new(5, signature("ntfs"), None);
        assert_eq!(disk.choose(None).unwrap().place(), ByteRange::between(0, 5));
        assert!(disk.choose(Some(1)).unwrap_err().contains("no partition table"));
    }

    #[test]
    fn partitions_go_before_what_was_there_before_them() {
        let partitions = layout(&["vfat", "ext4"]).contents;
        let found = Layout::new(64 << 20, signature("btrfs"), Some(("gpt".to_owned(), partitions)));
        assert_eq!(found.choose(None).unwrap().partition, Some(2));
        assert!(found.note.unwrap().contains("the signature of btrfs"));
    }

    #[test]
    fn what_cannot_be_mounted_is_said() {
        let both = Layout { contents: vec![], ..layout(&[]) };
        assert!(both.choose(None).unwrap_err().contains("table is empty"));
        let many = Content { aside: false, ..layout(&["ext4"]).contents.remove(0) };
        let mut two = layout(&["ext4", "xfs"]);
        two.contents[0] = many;
        let why = two.choose(None).unwrap_err();
        assert!(why.contains("--partition N") && why.contains("partition 2: xfs"), "{why}");
        assert!(two.choose(Some(7)).unwrap_err().contains("there is no partition 7; there are:\n  partition 1: ext4"));
        let luks = layout(&["crypto_LUKS", "LVM2_member"]);
        assert!(luks.choose(Some(1)).unwrap_err().contains("encrypted with LUKS"));
        assert!(luks.choose(Some(2)).unwrap_err().contains("LVM physical volume"));
        assert!(luks.choose(None).unwrap_err().contains("no partition can be mounted"));
        let nothing = Layout::new(5, Signature::default(), None);
        assert!(nothing.choose(None).unwrap_err().contains("no file system that blkid knows"));
        assert!(layout(&["reiserfs"]).choose(Some(1)).unwrap_err().contains("not one of ext2"));
    }
}
