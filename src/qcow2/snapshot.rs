//! The table of internal snapshots (section "Snapshots"): read to know which clusters it holds.

use super::layout::MAX_L1_BYTES;
use crate::units::HostOffset;

/// Most snapshots QEMU allows.
pub const MAX_SNAPSHOTS: u32 = 65_536;
/// Largest snapshot table we read, in bytes; QEMU's limit is the same.
pub const MAX_TABLE_BYTES: u64 = 16 << 20;
const FIXED: usize = 40;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique ID string.
    pub id: String,
    /// Name given by the user.
    pub name: String,
    /// Start of its L1 table.
    pub l1_offset: HostOffset,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Seconds since the epoch.
    pub date_seconds: u32,
    /// Size of the saved VM state in bytes.
    pub vm_state_bytes: u64,
    /// Virtual size in bytes, where it is said: when the snapshot was taken.
    pub disk_size: Option<u64>,
}

/// The snapshots and the table's length in bytes. `Ok(None)`: `bytes` ends before the table does, read more.
pub fn parse(bytes: &[u8], count: u32) -> Result<Option<(Vec<Snapshot>, u64)>, String> {
    let mut at = 0usize;
    let mut list = Vec::new();
    for index in 0..count {
        let Some(fixed) = bytes.get(at..at + FIXED) else { return Ok(None) };
        let be32 = |i: usize| u32::from_be_bytes(fixed[i..i + 4].try_into().expect("four bytes"));
        let be16 = |i: usize| usize::from(u16::from_be_bytes(fixed[i..i + 2].try_into().expect("two bytes")));
        let extra = be32(36) as usize;
        if extra > 1024 {
            return Err(format!("snapshot {index}: {extra} bytes of extra data, at most 1024 are allowed"));
        }
        let (id_len, name_len) = (be16(12), be16(14));
        let total = FIXED + extra + id_len + name_len;
        let Some(entry) = bytes.get(at..at + total) else { return Ok(None) };
        let l1_offset = u64::from_be_bytes(fixed[0..8].try_into().expect("eight bytes"));
        let l1_entries = be32(8);
        if u64::from(l1_entries) * 8 > MAX_L1_BYTES {
            return Err(format!("snapshot {index}: L1 table of {l1_entries} entries is above 32 MiB"));
        }
        let vm_state_bytes = match extra {
            8.. => u64::from_be_bytes(entry[FIXED..FIXED + 8].try_into().expect("eight bytes")),
            _ => u64::from(be32(32)),
        };
        let disk_size =
            (extra >= 16).then(|| u64::from_be_bytes(entry[FIXED + 8..FIXED + 16].try_into().expect("eight bytes")));
        let text = |from: usize, len: usize| String::from_utf8_lossy(&entry[from..from + len]).into_owned();
        list.push(Snapshot {
            id: text(FIXED + extra, id_len),
            name: text(FIXED + extra + id_len, name_len),
            l1_offset: HostOffset(l1_offset),
            l1_entries,
            date_seconds: be32(16),
            vm_state_bytes,
            disk_size,
        });
        at = (at + total).next_multiple_of(8);
    }
    Ok(Some((list, at as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(extra: u32, id: &str, name: &str) -> Vec<u8> {
        let mut b = vec![0u8; FIXED];
        b[0..8].copy_from_slice(&0x70000u64.to_be_bytes());
        b[8..12].copy_from_slice(&5u32.to_be_bytes());
        b[12..14].copy_from_slice(&(id.len() as u16).to_be_bytes());
        b[14..16].copy_from_slice(&(name.len() as u16).to_be_bytes());
        b[36..40].copy_from_slice(&extra.to_be_bytes());
        b.extend(vec![0; extra as usize]);
        b.extend(id.bytes().chain(name.bytes()));
        b.resize(b.len().next_multiple_of(8), 0);
        b
    }

    #[test]
    fn entries_of_different_lengths() {
        let bytes = [entry(16, "1", "before update"), entry(0, "22", "x")].concat();
        let (list, len) = parse(&bytes, 2).unwrap().unwrap();
        assert_eq!(len, bytes.len() as u64);
        assert_eq!((list[0].name.as_str(), list[1].id.as_str()), ("before update", "22"));
        assert_eq!((list[0].disk_size, list[1].disk_size), (Some(0), None));
        assert_eq!((list[0].l1_offset, list[0].l1_entries), (HostOffset(0x70000), 5));
        assert_eq!(parse(&bytes[..70], 2).unwrap(), None);
        assert!(parse(&entry(2000, "1", "a"), 1).is_err());
    }
}
