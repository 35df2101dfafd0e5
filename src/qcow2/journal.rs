//! A journal of what an image's tables in memory are ahead of the disk, so that it outlives the process.
//!
//! A write is answered while its metadata is still in memory. When the process dies and the machine does not, its clients
//! see that as a disk that loses what it has acknowledged, unless they are gone, too. A local block device's are not:
//! file systems stay mounted while the daemon is started again. So for them each change of a table is noted in memory
//! that outlives the process (a file of a tmpfs, see `image::recovery`) before the request is answered, and carried out
//! on the image when it is opened again: in the order of [`super::writeback`], with the same barriers.
//!
//! The memory is a ring of records. Each carries its own checksum and position, so what was being noted when the process
//! died is told from what was. Changes that a write-back cycle began with are dropped from the ring as soon as the cycle
//! has made them durable, and before any cluster that it frees can be used again: else an old table's change could be
//! carried out on somebody's data.
//!
//! A ring without room *lapses*: it says nothing any more, and whoever changes something has it flushed before the answer,
//! until a cycle that began later is durable. A new journal begins like that, so that it needs no clean image.

use super::entry::OFFSET_MASK;
use crate::units::HostOffset;
use std::collections::BTreeMap;

/// What the journal is kept in. Panics of its own apart, it is plain memory.
pub type Memory = Box<dyn AsMut<[u8]> + Send>;

/// Bytes before the ring: two places for the mark, each in a sector of its own.
const HEADER_BYTES: usize = 1024;
const MARKS: [usize; 2] = [0, 512];
/// Bytes of a mark: magic, where the records begin, whether they count, checksum.
const MARK_BYTES: usize = 8 + 8 + 4 + 4;
const MAGIC: [u8; 8] = *b"cgJRNL\0\x01";
/// Bytes of a record before its payload: checksum, payload length, position, place, order and kind.
const RECORD_BYTES: usize = 4 + 4 + 8 + 8 + 8;
/// Least bytes of a ring.
const RING_MIN: usize = 64 << 10;
/// Bytes of one change at most, for whoever reads: more than any table has.
const PATCH_MAX: u64 = 64 << 20;

/// Bytes that the journal of an image with clusters of this size should have: a change may make several tables, and others
/// are under way while it does.
pub fn bytes_for(cluster: u64) -> u64 {
    (16 * cluster).max(1 << 20)
}

/// Which of the steps of a write-back cycle a change belongs to. Those before it are durable when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    /// Refcount blocks, and a refcount table at a new place.
    Refcounts,
    /// Entries of the refcount table, or where it is.
    Reftable,
    /// L2 tables, and an L1 table at a new place.
    L2,
    /// Entries of the L1 table, or where it is.
    L1,
}

impl Order {
    /// All, the first first.
    pub const ALL: [Order; 4] = [Order::Refcounts, Order::Reftable, Order::L2, Order::L1];
}

/// New content of a place of the image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// When it is written.
    pub order: Order,
    /// Where.
    pub at: HostOffset,
    /// What.
    pub bytes: Vec<u8>,
    /// What was there before, as long; empty for a table at a place that nothing referred to.
    pub old: Vec<u8>,
}

impl Patch {
    /// Whether a change at `at` goes on where this one ends.
    fn continues(&self, at: u64, old: &[u8]) -> bool {
        self.at.0 + self.bytes.len() as u64 == at && self.old.is_empty() == old.is_empty()
    }
}

/// The journal of one image, as its metadata writes it.
pub struct Journal {
    memory: Memory,
    /// Bytes of the ring.
    capacity: u64,
    /// Positions count all bytes ever noted; where one is in the ring is the rest by `capacity`.
    start: u64,
    end: u64,
    /// Which place the next mark goes to.
    place: usize,
    /// Noted with the next [`Journal::seal`].
    open: Vec<Patch>,
    /// There was no room.
    lapsed: bool,
    /// Where a write-back cycle began, if one is under way.
    cycle: Option<Begun>,
}

#[derive(Clone, Copy)]
struct Begun {
    at: u64,
    /// It makes everything durable that the ring had no room for.
    heals: bool,
}

impl Journal {
    /// A journal in this memory, lapsed: it begins with the next write-back cycle. Panics when the memory is too small.
    pub fn new(mut memory: Memory) -> Journal {
        let len = (*memory).as_mut().len();
        assert!(len >= HEADER_BYTES + RING_MIN, "a journal has at least {} bytes", HEADER_BYTES + RING_MIN);
        let capacity = (len - HEADER_BYTES) as u64;
        let (open, cycle) = (Vec::new(), None);
        let mut journal = Journal { memory, capacity, start: 0, end: 0, place: 0, open, lapsed: true, cycle };
        journal.mark();
        journal
    }

    /// Takes note of a change, for the next [`Journal::seal`].
    ///
    /// `old`: what the place held before, as long; empty for a new table.
    pub(super) fn note(&mut self, order: Order, at: u64, old: &[u8], bytes: &[u8]) {
        if self.lapsed && self.cycle.is_none_or(|cycle| !cycle.heals) {
            return; // the cycle that ends this begins with it
        }
        if let Some(last) = self.open.last_mut().filter(|last| last.order == order && last.continues(at, old)) {
            last.bytes.extend(bytes);
            last.old.extend(old);
            return;
        }
        self.open.push(Patch { order, at: HostOffset(at), bytes: bytes.to_vec(), old: old.to_vec() });
    }

    /// Notes down what was changed, in order: from here on it outlives the process. Before the answer to whoever asked for
    /// the change.
    pub(super) fn seal(&mut self) {
        for patch in std::mem::take(&mut self.open) {
            if !self.append(&patch) {
                self.lapse();
                return;
            }
        }
    }

    /// Whether it says nothing at the moment: answers wait for a flush.
    pub fn lapsed(&self) -> bool {
        self.lapsed
    }

    /// Whether a write-back should make room.
    pub(super) fn wants_room(&self) -> bool {
        self.end - self.start > self.capacity / 4
    }

    /// Whether so much is noted, or will be, that a change should wait for a write-back: what has no room takes with it
    /// what was noted before, and answered.
    pub(super) fn crowded(&self) -> bool {
        let open: usize = self.open.iter().map(|patch| RECORD_BYTES + patch.bytes.len() + patch.old.len()).sum();
        !self.lapsed && self.end - self.start + open as u64 > self.capacity / 2
    }

    /// A write-back cycle begins with all that was noted so far.
    pub(super) fn begin_cycle(&mut self) {
        self.seal();
        if self.lapsed {
            self.open.clear();
        }
        self.cycle = Some(Begun { at: self.end, heals: self.lapsed });
    }

    /// All that the cycle began with is durable.
    pub(super) fn cycle_durable(&mut self) {
        let Some(cycle) = self.cycle.take() else { return };
        if cycle.heals {
            self.lapsed = false;
        }
        if !self.lapsed {
            self.start = cycle.at;
            self.mark();
        }
    }

    /// The cycle has failed: what it began with is still to be written.
    pub(super) fn cycle_failed(&mut self) {
        if self.cycle.take().is_some_and(|cycle| cycle.heals) {
            self.lapse();
        }
    }

    fn lapse(&mut self) {
        self.open.clear();
        self.lapsed = true;
        self.start = self.end;
        if let Some(cycle) = &mut self.cycle {
            cycle.heals = false;
        }
        self.mark();
    }

    /// What its memory holds, as whoever comes after the process finds it.
    #[cfg(test)]
    pub(super) fn memory(&mut self) -> &[u8] {
        (*self.memory).as_mut()
    }

    fn append(&mut self, patch: &Patch) -> bool {
        let zeroes = patch.bytes.iter().all(|&byte| byte == 0);
        let payload: &[u8] = if zeroes { &[] } else { &patch.bytes };
        let len = (RECORD_BYTES + payload.len() + patch.old.len()) as u64;
        if self.end - self.start + len > self.capacity {
            return false;
        }
        let mut record = Vec::with_capacity(len as usize);
        record.extend([0; 4]);
        record.extend((patch.bytes.len() as u32).to_be_bytes()); // tables are smaller than 4 GiB
        record.extend(self.end.to_be_bytes());
        record.extend(patch.at.0.to_be_bytes());
        record.extend([patch.order as u8, u8::from(zeroes), u8::from(!patch.old.is_empty()), 0, 0, 0, 0, 0]);
        record.extend(payload);
        record.extend(&patch.old);
        let sum = crc32fast::hash(&record[4..]);
        record[..4].copy_from_slice(&sum.to_be_bytes());
        let at = (self.end % self.capacity) as usize;
        let ring = &mut (*self.memory).as_mut()[HEADER_BYTES..];
        let first = record.len().min(ring.len() - at);
        ring[at..at + first].copy_from_slice(&record[..first]);
        ring[..record.len() - first].copy_from_slice(&record[first..]);
        self.end += len;
        true
    }

    /// Says where the records begin: in the place that does not hold the last word on it.
    fn mark(&mut self) {
        let mut mark = Vec::with_capacity(MARK_BYTES);
        mark.extend(MAGIC);
        mark.extend(self.start.to_be_bytes());
        mark.extend(u32::from(!self.lapsed).to_be_bytes());
        mark.extend(crc32fast::hash(&mark).to_be_bytes());
        let memory = (*self.memory).as_mut();
        // a lapse counts at once: neither place may say that the records do
        let places = if self.lapsed { &MARKS[..] } else { &MARKS[self.place..=self.place] };
        for &place in places {
            memory[place..place + MARK_BYTES].copy_from_slice(&mark);
        }
        self.place = (self.place + 1) % MARKS.len();
    }
}

/// The changes that are noted in a journal's memory, in the order in which they were made. `None`: this is no journal.
pub fn read(memory: &[u8]) -> Option<Vec<Patch>> {
    if memory.len() < HEADER_BYTES + RING_MIN {
        return None;
    }
    let marks: Vec<(u64, bool)> = MARKS.iter().filter_map(|&place| read_mark(&memory[place..])).collect();
    if marks.is_empty() {
        return None;
    }
    let ring = Ring(&memory[HEADER_BYTES..]);
    let mut patches = Vec::new();
    let Some((mut position, _)) = marks.into_iter().filter(|mark| mark.1).max() else { return Some(patches) };
    let begin = position;
    while let Some((patch, len)) = ring.record(position) {
        patches.push(patch);
        position += len;
        if position - begin > ring.0.len() as u64 {
            return None; // no journal of ours is fuller than full
        }
    }
    Some(patches)
}

fn read_mark(bytes: &[u8]) -> Option<(u64, bool)> {
    let mark = &bytes[..MARK_BYTES];
    let (said, sum) = mark.split_at(MARK_BYTES - 4);
    let valid = said[..8] == MAGIC && crc32fast::hash(said).to_be_bytes() == sum;
    valid.then(|| (be64(&said[8..]), said[19] != 0))
}

struct Ring<'a>(&'a [u8]);

impl Ring<'_> {
    fn bytes(&self, position: u64, len: usize) -> Vec<u8> {
        let at = (position % self.0.len() as u64) as usize;
        let first = len.min(self.0.len() - at);
        [&self.0[at..at + first], &self.0[..len - first]].concat()
    }

    /// The record at a position, and its length. `None`: there is none yet, or not all of it.
    fn record(&self, position: u64) -> Option<(Patch, u64)> {
        let head = self.bytes(position, RECORD_BYTES);
        let len = u64::from(u32::from_be_bytes(head[4..8].try_into().expect("four bytes")));
        let (zeroes, changed) = (head[25] != 0, head[26] != 0);
        let order = *Order::ALL.get(usize::from(head[24]))?;
        let payload = if zeroes { 0 } else { len as usize };
        let old = if changed { len as usize } else { 0 };
        if be64(&head[8..]) != position || len > PATCH_MAX || RECORD_BYTES + payload + old > self.0.len() {
            return None;
        }
        let record = self.bytes(position, RECORD_BYTES + payload + old);
        if crc32fast::hash(&record[4..]).to_be_bytes() != record[..4] {
            return None;
        }
        let (bytes, old) = record[RECORD_BYTES..].split_at(payload);
        let bytes = if zeroes { vec![0; len as usize] } else { bytes.to_vec() };
        let patch = Patch { order, at: HostOffset(be64(&head[16..])), bytes, old: old.to_vec() };
        Some((patch, record.len() as u64))
    }
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"))
}

/// Changes as one picture of what the file is to hold: of two to the same byte the later one counts.
#[derive(Clone, Debug, Default)]
pub struct Patched {
    /// By place; they do not overlap. A byte that was changed in two orders is written with the later one.
    pieces: BTreeMap<u64, (Order, Vec<u8>)>,
    /// The changes one by one, in the order in which they were made.
    single: Vec<Patch>,
}

impl Patched {
    /// The changes, one after the other. `None`: one lies where no image file reaches.
    pub fn new(patches: Vec<Patch>) -> Option<Patched> {
        let mut all = Patched::default();
        for patch in patches {
            patch.at.0.checked_add(patch.bytes.len() as u64).filter(|&end| end <= i64::MAX as u64)?;
            all.put(&patch);
            all.single.push(patch);
        }
        Some(all)
    }

    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Where the last change ends, in bytes.
    pub fn end(&self) -> u64 {
        self.pieces.last_key_value().map_or(0, |(at, (_, bytes))| at + bytes.len() as u64)
    }

    /// The changes of one order, by place.
    pub fn of(&self, order: Order) -> Vec<(HostOffset, Vec<u8>)> {
        let of = self.pieces.iter().filter(|(_, (found, _))| *found == order);
        of.map(|(&at, (_, bytes))| (HostOffset(at), bytes.clone())).collect()
    }

    /// Carries the changes out on bytes of the file that begin at `at`. Whether there were any.
    pub fn apply(&self, at: u64, bytes: &mut [u8]) -> bool {
        let end = at + bytes.len() as u64;
        let mut changed = false;
        let first = self.pieces.range(..=at).next_back().map_or(at, |(&before, _)| before);
        for (&start, (_, piece)) in self.pieces.range(first..end) {
            let (from, to) = (start.max(at), (start + piece.len() as u64).min(end));
            if from < to {
                let source = &piece[(from - start) as usize..(to - start) as usize];
                bytes[(from - at) as usize..(to - at) as usize].copy_from_slice(source);
                changed = true;
            }
        }
        changed
    }

    /// Where the file has to be looked at for [`Patched::is_ours`]: place and length in bytes.
    pub fn places(&self) -> Vec<(u64, u64)> {
        let mut places: Vec<(u64, u64)> =
            self.pieces.iter().map(|(&at, (_, bytes))| (at, bytes.len() as u64)).collect();
        places.dedup();
        places
    }

    /// Whether the file is as the writer of the journal has left it: at each changed place is what was there before the
    /// first change, or what one of them has made of it. A new table counts where the file refers to it already; nobody
    /// knows what was at its place before. `on_disk` gives the bytes of a place of [`Patched::places`], or a part of it.
    pub fn is_ours(&self, on_disk: impl Fn(u64, u64) -> Vec<u8>) -> bool {
        // by byte: what it may be; nothing in a new table that the file does not refer to yet
        let mut allowed: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
        for patch in &self.single {
            let known = !patch.old.is_empty() || self.is_referred_to(patch, &on_disk);
            for (i, &byte) in patch.bytes.iter().enumerate() {
                let first = || known.then(|| patch.old.get(i).copied().into_iter().collect());
                if let Some(values) = allowed.entry(patch.at.0 + i as u64).or_insert_with(first) {
                    values.push(byte);
                }
            }
        }
        self.places().into_iter().all(|(at, len)| {
            let found = on_disk(at, len);
            (at..).zip(found).all(|(at, byte)| allowed[&at].as_ref().is_none_or(|values| values.contains(&byte)))
        })
    }

    /// Whether an entry in the file names the new table of a patch.
    fn is_referred_to(&self, table: &Patch, on_disk: &impl Fn(u64, u64) -> Vec<u8>) -> bool {
        let pointers = self.single.iter().filter(|patch| matches!(patch.order, Order::Reftable | Order::L1));
        pointers.filter(|patch| patch.old.len() % 8 == 0).any(|patch| {
            let names = |entry: &[u8]| be64(entry) & OFFSET_MASK == table.at.0;
            let entries = (patch.at.0..).step_by(8).zip(patch.bytes.chunks_exact(8));
            let mut ours = entries.filter(|(_, entry)| names(entry));
            ours.any(|(at, _)| on_disk(at, 8).chunks_exact(8).any(names))
        })
    }

    /// Whether anything changes in a range of the file.
    pub fn touches(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        self.pieces.range(..end).next_back().is_some_and(|(&start, (_, piece))| start + piece.len() as u64 > at)
    }

    fn put(&mut self, patch: &Patch) {
        let (at, end) = (patch.at.0, patch.at.0 + patch.bytes.len() as u64);
        let before = self.pieces.range(..at).next_back().map(|(&start, _)| start);
        let touched: Vec<u64> = before.into_iter().chain(self.pieces.range(at..end).map(|(&start, _)| start)).collect();
        for start in touched {
            let (order, piece) = self.pieces.remove(&start).expect("just found");
            let piece_end = start + piece.len() as u64;
            if start < at {
                let keep = (at.min(piece_end) - start) as usize;
                self.pieces.insert(start, (order, piece[..keep].to_vec()));
            }
            if piece_end > end {
                self.pieces.insert(end, (order, piece[(end - start) as usize..].to_vec()));
            }
        }
        self.pieces.insert(at, (patch.order, patch.bytes.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn journal(len: usize) -> Journal {
        let mut journal = Journal::new(Box::new(vec![0; len]));
        assert!(journal.lapsed());
        cycle(&mut journal);
        assert!(!journal.lapsed());
        journal
    }

    fn cycle(journal: &mut Journal) {
        journal.begin_cycle();
        journal.cycle_durable();
    }

    fn found(journal: &mut Journal) -> Vec<Patch> {
        read(journal.memory()).unwrap()
    }

    fn patch(order: Order, at: u64, bytes: &[u8]) -> Patch {
        Patch { order, at: HostOffset(at), bytes: bytes.to_vec(), old: Vec::new() }
    }

    const LEN: usize = HEADER_BYTES + RING_MIN;

    #[test]
    fn what_is_sealed_is_found_until_it_is_durable() {
        let mut j = journal(LEN);
        j.note(Order::Refcounts, 100, &[], &[1, 2]);
        j.note(Order::Refcounts, 102, &[], &[3]);
        j.note(Order::L2, 103, &[], &[0; 4096]);
        assert_eq!(found(&mut j), vec![], "not sealed");
        j.seal();
        let first = [patch(Order::Refcounts, 100, &[1, 2, 3]), patch(Order::L2, 103, &[0; 4096])];
        assert_eq!(found(&mut j), first);
        j.begin_cycle();
        j.note(Order::L1, 8, &[], &[9; 8]);
        j.seal();
        assert_eq!(found(&mut j).len(), 3);
        j.cycle_failed();
        assert_eq!(found(&mut j).len(), 3, "still to be written");
        j.begin_cycle();
        j.note(Order::L1, 16, &[], &[7; 8]);
        j.cycle_durable();
        j.seal();
        assert_eq!(found(&mut j), [patch(Order::L1, 16, &[7; 8])]);
    }

    #[test]
    fn it_goes_round_for_ever() {
        let mut j = journal(LEN);
        for i in 0..5000u32 {
            j.note(Order::L2, u64::from(i) * 4096, &[], &i.to_be_bytes().repeat(20));
            j.seal();
            if j.wants_room() {
                j.begin_cycle();
                j.note(Order::Refcounts, 1, &[], &i.to_be_bytes());
                j.seal();
                j.cycle_durable();
                assert_eq!(found(&mut j), [patch(Order::Refcounts, 1, &i.to_be_bytes())]);
            }
            assert!(!j.lapsed());
        }
    }

    #[test]
    fn what_is_to_be_noted_counts_before_it_is() {
        let mut j = journal(LEN);
        assert!(!j.crowded());
        j.note(Order::L2, 0, &[], &[1; LEN / 2]);
        assert!(j.crowded() && !j.wants_room());
        j.seal();
        assert!(j.crowded() && j.wants_room() && !j.lapsed());
        j.begin_cycle();
        j.cycle_durable();
        assert!(!j.crowded() && !j.wants_room());
    }

    #[test]
    fn without_room_it_says_nothing_until_a_later_cycle() {
        let mut j = journal(LEN);
        j.note(Order::L2, 0, &[], &[1; 100]);
        j.begin_cycle();
        j.note(Order::L2, 512, &[], &vec![2; RING_MIN]);
        j.seal();
        assert!(j.lapsed());
        assert_eq!(found(&mut j), vec![]);
        j.cycle_durable();
        assert!(j.lapsed(), "that cycle began before");
        j.note(Order::L2, 0, &[], &[3; 8]);
        j.begin_cycle();
        j.note(Order::L2, 8, &[], &[4; 8]);
        j.seal();
        assert_eq!(found(&mut j), vec![], "not yet");
        j.cycle_durable();
        assert_eq!(found(&mut j), [patch(Order::L2, 8, &[4; 8])]);
        j.cycle_durable(); // a cycle that is over changes nothing
        assert_eq!(found(&mut j).len(), 1);
    }

    #[test]
    fn a_cycle_that_fails_heals_nothing() {
        let mut j = Journal::new(Box::new(vec![0; LEN]));
        j.begin_cycle();
        j.note(Order::L2, 8, &[], &[4; 8]);
        j.cycle_failed();
        assert!(j.lapsed());
        j.seal();
        assert_eq!(found(&mut j), vec![]);
    }

    #[test]
    fn what_others_have_changed_is_noticed() {
        let entry = |value: u64| value.to_be_bytes();
        let mut j = journal(LEN);
        j.note(Order::Refcounts, 100, &[0, 0], &[0, 1]);
        j.note(Order::L2, 0x10000, &[], &[0; 4096]);
        j.note(Order::L1, 0x200, &entry(0), &entry(0x10000 | 1 << 63));
        j.note(Order::L2, 0x10008, &entry(0), &entry(0x20000));
        j.note(Order::L2, 0x10008, &entry(0x20000), &entry(0x30000));
        j.seal();
        let all = Patched::new(found(&mut j)).unwrap();
        let file = |changes: &[(u64, &[u8])]| {
            let mut file = vec![0u8; 0x12000];
            for (at, bytes) in changes {
                file[*at as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            all.is_ours(|at, len| file[at as usize..(at + len) as usize].to_vec())
        };
        assert!(file(&[]), "nothing was written yet");
        assert!(file(&[(100, &[0, 1]), (0x10008, &entry(0x20000)), (0x10100, &[7])]), "the table is nobody's yet");
        let named: (u64, &[u8]) = (0x200, &entry(0x10000 | 1 << 63));
        assert!(file(&[(100, &[0, 1]), named, (0x10008, &entry(0x30000))]));
        assert!(!file(&[(100, &[0, 2])]), "a refcount that was never ours");
        assert!(!file(&[named, (0x10100, &[7])]), "somebody else's entry in the table");
        assert!(!file(&[(0x200, &entry(0x40000))]), "somebody else's table");
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        assert!(read(&[]).is_none());
        assert!(read(&vec![0; LEN]).is_none());
        let far = vec![patch(Order::L2, u64::MAX - 3, &[1; 8])];
        assert!(Patched::new(far).is_none());
    }

    proptest! {
        #[test]
        fn a_torn_record_ends_it(cut in 0usize..200, byte: u8) {
            let mut j = journal(LEN);
            for i in 0..4u64 {
                j.note(Order::L2, i * 64, &[], &[1 + i as u8; 10]);
                j.seal();
            }
            let whole = found(&mut j);
            let mut memory = j.memory().to_vec();
            memory[HEADER_BYTES + cut] ^= byte;
            let left = read(&memory).unwrap();
            prop_assert!(whole.starts_with(&left));
            prop_assert!(byte == 0 || cut >= 4 * 42 || left.len() == cut / 42);
        }

        #[test]
        fn random_memory_is_read_without_harm(mut memory in proptest::collection::vec(any::<u8>(), LEN..LEN + 9), good: bool) {
            if good {
                memory[..1024].copy_from_slice(&journal(LEN).memory()[..1024]);
            }
            let _ = read(&memory);
        }

        #[test]
        fn changes_come_out_as_if_made_one_by_one(
            patches in proptest::collection::vec((0u64..200, 1usize..60, any::<u8>(), 0usize..4), 0..30),
            at in 0u64..200, len in 1usize..100,
        ) {
            let mut file = vec![0u8; 400];
            let all: Vec<Patch> =
                patches.iter().map(|&(at, len, byte, order)| patch(Order::ALL[order], at, &vec![byte; len])).collect();
            for p in &all {
                file[p.at.0 as usize..][..p.bytes.len()].copy_from_slice(&p.bytes);
            }
            let patched = Patched::new(all).unwrap();
            let mut written = vec![0u8; 400];
            for order in Order::ALL {
                for (at, bytes) in patched.of(order) {
                    written[at.0 as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
            }
            prop_assert_eq!(&written, &file);
            let mut part = vec![0u8; len];
            prop_assert_eq!(patched.apply(at, &mut part), patched.touches(at, len as u64));
            prop_assert_eq!(&part[..], &file[at as usize..at as usize + len]);
        }
    }
}
