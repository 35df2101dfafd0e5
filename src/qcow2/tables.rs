//! The cache of L2 tables and refcount blocks, in slices.
//!
//! A slice is clean (as on disk), dirty (newer than the disk) or in flight (a copy is being written). Only clean slices
//! that nobody pinned are evicted, so a table is never loaded while a newer form of it is in memory.

use crate::units::HostOffset;
use std::collections::{BTreeSet, HashMap, HashSet};

/// What a slice is part of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum TableKind {
    /// An L2 table.
    L2,
    /// A refcount block.
    Refcount,
}

/// A slice that must be read from the image before the question can be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Table {
    /// What it is part of.
    pub kind: TableKind,
    /// Where it starts.
    pub at: HostOffset,
    /// Its length in bytes.
    pub len: u64,
}

/// Pieces of bytes and where they belong, adjacent ones joined.
pub(super) type Pieces = Vec<(HostOffset, Vec<u8>)>;

struct Slice {
    kind: TableKind,
    bytes: Box<[u8]>,
    dirty: bool,
    in_flight: bool,
    pins: u32,
    used: u64,
}

pub(super) struct Tables {
    slices: HashMap<u64, Slice>,
    loading: HashSet<u64>,
    dirty: [BTreeSet<u64>; 2],
    slice_bytes: u64,
    limit: usize,
    /// So many slices that could be evicted stay in any case.
    floor: usize,
    clock: u64,
}

impl Tables {
    /// A cache of at most `limit_bytes`. Whatever else is in memory, it has room for the slices of a whole table of
    /// `table_bytes` at once, with some to spare: one that is copied needs them together, and would be loaded for ever.
    pub fn new(slice_bytes: u64, limit_bytes: u64, table_bytes: u64) -> Self {
        let table = (table_bytes / slice_bytes) as usize;
        Tables {
            slices: HashMap::new(),
            loading: HashSet::new(),
            dirty: Default::default(),
            slice_bytes,
            limit: (limit_bytes / slice_bytes).max(16) as usize,
            floor: table + table / 4 + 16,
            clock: 0,
        }
    }

    pub fn get(&mut self, at: u64) -> Option<&[u8]> {
        self.clock += 1;
        let slice = self.slices.get_mut(&at)?;
        slice.used = self.clock;
        Some(&slice.bytes)
    }

    /// The slice, to be changed: it becomes dirty. Panics when it is not in memory: look it up first.
    pub fn change(&mut self, at: u64) -> &mut [u8] {
        let slice = self.slices.get_mut(&at).expect("a slice is changed only while in memory");
        if !slice.dirty {
            slice.dirty = true;
            self.dirty[slice.kind as usize].insert(at);
        }
        &mut slice.bytes
    }

    /// Asks for a slice that is not in memory. `None`: somebody is loading it already.
    pub fn want(&mut self, kind: TableKind, at: u64) -> Option<Table> {
        self.loading.insert(at).then_some(Table { kind, at: HostOffset(at), len: self.slice_bytes })
    }

    /// A wanted slice was read (`Some`) or could not be.
    pub fn loaded(&mut self, table: Table, bytes: Option<&[u8]>) {
        // not wanted any more: a new table took its place while it was read
        if !self.loading.remove(&table.at.0) || self.slices.contains_key(&table.at.0) {
            return;
        }
        if let Some(bytes) = bytes {
            self.make_room();
            self.put(table.kind, table.at.0, bytes.into(), false);
        }
    }

    /// Puts a whole new table of `bytes` into memory, dirty.
    pub fn create(&mut self, kind: TableKind, at: u64, bytes: &[u8]) {
        for (i, piece) in bytes.chunks(self.slice_bytes as usize).enumerate() {
            let at = at + i as u64 * self.slice_bytes;
            self.loading.remove(&at);
            self.put(kind, at, piece.into(), true);
        }
    }

    fn put(&mut self, kind: TableKind, at: u64, bytes: Box<[u8]>, dirty: bool) {
        self.clock += 1;
        if dirty {
            self.dirty[kind as usize].insert(at);
        }
        self.slices.insert(at, Slice { kind, bytes, dirty, in_flight: false, pins: 0, used: self.clock });
    }

    /// Forgets the slices in a range: its clusters are free.
    pub fn forget(&mut self, start: u64, len: u64) {
        for at in (start..start + len).step_by(self.slice_bytes as usize) {
            self.loading.remove(&at);
            if let Some(slice) = self.slices.remove(&at) {
                self.dirty[slice.kind as usize].remove(&at);
            }
        }
    }

    /// Keeps a slice in memory until [`Tables::unpin`].
    pub fn pin(&mut self, at: u64) {
        self.slices.get_mut(&at).expect("pinned slices are in memory").pins += 1;
    }

    pub fn unpin(&mut self, at: u64) {
        self.slices.get_mut(&at).expect("pinned slices stay in memory").pins -= 1;
    }

    /// Copies of all dirty slices of a kind; they are in flight until [`Tables::landed`].
    pub fn take_dirty(&mut self, kind: TableKind) -> Pieces {
        let mut pieces = Pieces::new();
        for at in std::mem::take(&mut self.dirty[kind as usize]) {
            let slice = self.slices.get_mut(&at).expect("dirty slices are in memory");
            slice.dirty = false;
            slice.in_flight = true;
            push_piece(&mut pieces, at, &slice.bytes);
        }
        pieces
    }

    /// Pieces of [`Tables::take_dirty`] were written, or not: then they are dirty again. Other bytes among them (root
    /// tables) are none of the cache's business.
    pub fn landed(&mut self, pieces: &[(HostOffset, Vec<u8>)], written: bool) {
        for (start, bytes) in pieces {
            for at in (start.0..start.0 + bytes.len() as u64).step_by(self.slice_bytes as usize) {
                // a slice forgotten meanwhile has nothing to land
                let Some(slice) = self.slices.get_mut(&at) else { continue };
                slice.in_flight = false;
                if !written && !slice.dirty {
                    slice.dirty = true;
                    self.dirty[slice.kind as usize].insert(at);
                }
            }
        }
        // new tables came without asking for room
        self.make_room();
    }

    /// Bytes of slices newer than the disk.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.iter().map(|d| d.len() as u64).sum::<u64>() * self.slice_bytes
    }

    /// Bytes the cache may hold.
    pub fn limit_bytes(&self) -> u64 {
        self.limit as u64 * self.slice_bytes
    }

    /// Bytes of all slices in memory.
    #[cfg(test)]
    pub fn resident_bytes(&self) -> u64 {
        self.slices.len() as u64 * self.slice_bytes
    }

    fn make_room(&mut self) {
        if self.slices.len() < self.limit {
            return;
        }
        // an eighth at once, so that the sort is paid once in many misses
        let mut idle: Vec<(u64, u64)> = self
            .slices
            .iter()
            .filter(|(_, s)| !s.dirty && !s.in_flight && s.pins == 0)
            .map(|(&at, s)| (s.used, at))
            .collect();
        let busy = self.slices.len() - idle.len();
        let keep = self.limit.saturating_sub(busy).max(self.floor);
        if idle.len() < keep {
            return;
        }
        idle.sort_unstable();
        let excess = idle.len() - keep + keep / 8 + 1;
        for (_, at) in idle.into_iter().take(excess) {
            self.slices.remove(&at);
        }
    }
}

/// Appends bytes at an offset, joining them to the last piece when they follow it.
pub(super) fn push_piece(pieces: &mut Pieces, at: u64, bytes: &[u8]) {
    match pieces.last_mut() {
        Some((start, joined)) if start.0 + joined.len() as u64 == at => joined.extend(bytes),
        _ => pieces.push((HostOffset(at), bytes.to_vec())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(t: &mut Tables, at: u64) {
        let table = t.want(TableKind::L2, at).unwrap();
        t.loaded(table, Some(&[1; 512]));
    }

    #[test]
    fn dirty_flying_and_pinned_slices_stay() {
        let mut t = Tables::new(512, 0, 512); // the smallest limit: 16 slices
        for i in 0..3 {
            load(&mut t, i * 512);
        }
        t.change(0)[0] = 9;
        t.change(512)[0] = 8;
        t.pin(1024);
        let flying = t.take_dirty(TableKind::L2);
        assert_eq!(flying, vec![(HostOffset(0), [&[9u8][..], &[1; 511], &[8], &[1; 511]].concat())]);
        t.change(512)[1] = 7;
        for i in 3..100 {
            load(&mut t, i * 512);
        }
        assert!(t.resident_bytes() <= 20 * 512);
        assert_eq!(t.get(0).unwrap()[0], 9);
        assert_eq!(t.get(1024).unwrap()[0], 1);
        t.landed(&flying, true);
        assert_eq!(t.dirty_bytes(), 512, "changed again while it flew");
        t.landed(&flying, false);
        assert_eq!(t.dirty_bytes(), 1024, "not written: dirty again");
    }

    #[test]
    fn a_whole_table_fits_beside_what_is_dirty() {
        let mut t = Tables::new(512, 0, 512 * 512);
        for round in 0..3 {
            let base = round << 20;
            t.create(TableKind::L2, base, &vec![1; 512 * 512]);
            let at = base + (1 << 19);
            (0..520).for_each(|i| load(&mut t, at + i * 512));
            assert!((0..520).all(|i| t.get(at + i * 512).is_some()), "round {round}");
        }
    }

    #[test]
    fn a_late_load_never_replaces_a_new_table() {
        let mut t = Tables::new(512, 0, 512);
        let table = t.want(TableKind::L2, 0).unwrap();
        assert_eq!(t.want(TableKind::L2, 0), None);
        t.create(TableKind::L2, 0, &[5; 512]);
        t.loaded(table, Some(&[1; 512]));
        assert_eq!(t.get(0).unwrap()[0], 5);
        t.forget(0, 512);
        assert_eq!(t.get(0), None);
        assert_eq!(t.dirty_bytes(), 0);
    }
}
