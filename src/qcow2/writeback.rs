//! What reaches the disk, in which order: one write-back cycle.
//!
//! A cycle copies everything that is newer than the disk at one moment and writes it in steps with barriers between:
//!
//! 1. autoclear bits, before anything else was ever written;
//! 2. refcount blocks (and a moved refcount table); the barrier behind them also covers all data committed so far;
//! 3. entries of the refcount table, or the header's pointer to the moved one;
//! 4. L2 tables (and a moved L1 table);
//! 5. entries of the L1 table, or the header's pointer to the moved one;
//! 6. then references that were given up are taken back, and clusters nobody refers to are punched and reused.
//!
//! A structure is thus on disk before anything points to it, and a cluster is counted before it is used: a crash at any
//! point leaves clusters that are counted and unused (leaks), never one that is used and not counted. Freed clusters
//! wait in step 6 until the tables that freed them are durable and every operation that might still read or write them
//! is over. What changes while a cycle runs belongs to the next one.

use super::header::field;
use super::metadata::{Corrupt, Metadata, Root, RootKind, Stop};
use super::tables::{Pieces, Table, TableKind, push_piece};
use crate::block::Errno;
use crate::units::{HostOffset, HostRange};
use std::collections::{BTreeSet, VecDeque};

/// Clusters freed and not yet written back that make [`Metadata::wants_writeback`] true.
const FREED_LIMIT: usize = 16_384;

/// The same, so much that who frees more waits: what is freed is taken back while the metadata is locked.
const FREED_MAX: usize = 32 * FREED_LIMIT;
/// References taken back before others get their turn.
const RELEASE_TURN: usize = 4096;

/// One step of a write-back cycle, to be carried out and reported to [`Metadata::step_done`].
#[derive(Debug)]
pub enum Step {
    /// Write these bytes at these places, in any order.
    Write(Vec<(HostOffset, Vec<u8>)>),
    /// Make everything written so far durable.
    Barrier,
    /// Give this storage back to the file system; failure is of no consequence.
    Punch(Vec<HostRange>),
    /// Read this table and hand it in; no report, ask for the next step.
    Load(Table),
    /// Somebody else is reading that table: wait for progress, ask for the next step.
    Wait,
    /// Others want to have the metadata too: give them a turn and ask for the next step.
    Pause,
}

/// A root table's part of a cycle.
#[derive(Default)]
struct Publish {
    /// The whole table at its new place.
    table: Pieces,
    /// What makes it, or its changed entries, valid.
    pointer: Pieces,
    /// To take back when the cycle fails.
    dirty: BTreeSet<usize>,
    moved: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Phase {
    Autoclear,
    Refcounts,
    Reftable,
    L2,
    L1,
    Free,
    FreeWritten,
    Done,
}

pub(super) struct Cycle {
    phase: Phase,
    /// The phase's bytes, once they are written: its barrier is next.
    written: Option<Pieces>,
    autoclear: u64,
    refblocks: Pieces,
    reftable: Publish,
    l2: Pieces,
    l1: Publish,
    freed: Vec<u64>,
    release: Release,
}

/// Step 6 in progress.
#[derive(Default)]
struct Release {
    /// References to take back: cluster and how many.
    taking: VecDeque<(u64, u64)>,
    /// Clusters that lose their last reference and are punched first, so that nobody owns them while that happens.
    punching: Vec<u64>,
    /// Punched: their refcount becomes 0.
    clearing: VecDeque<u64>,
    /// Refcount blocks with references taken back.
    refblocks: Pieces,
}

impl Metadata {
    /// Begins a cycle with everything newer than the disk at this moment. Panics when one is under way.
    ///
    /// EIO on a broken image with changes that must not be written any more.
    pub fn begin_cycle(&mut self) -> Result<(), Errno> {
        assert!(self.cycle.is_none(), "one write-back cycle at a time");
        if self.broken.is_some() && !self.is_clean() {
            return Err(Errno::EIO);
        }
        let cluster = self.layout.cluster();
        if let Some(journal) = &mut self.journal {
            journal.begin_cycle();
        }
        self.cycle = Some(Cycle {
            phase: Phase::Autoclear,
            written: None,
            autoclear: if self.first_write { self.autoclear } else { 0 },
            refblocks: self.tables.take_dirty(TableKind::Refcount),
            reftable: self.reftable.publish(RootKind::Reftable, cluster),
            l2: self.tables.take_dirty(TableKind::L2),
            l1: self.l1.publish(RootKind::L1, cluster),
            freed: std::mem::take(&mut self.freed),
            release: Release::default(),
        });
        Ok(())
    }

    /// The next step of the cycle; `None` when it is complete and everything it began with is durable.
    pub fn next_step(&mut self) -> Option<Step> {
        let mut cycle = self.cycle.take().expect("a cycle is under way");
        let step = self.step(&mut cycle);
        if step.is_some() {
            self.cycle = Some(cycle);
        }
        step
    }

    fn step(&mut self, cycle: &mut Cycle) -> Option<Step> {
        loop {
            if cycle.written.is_some() {
                return Some(Step::Barrier);
            }
            let mut pieces = match cycle.phase {
                Phase::Autoclear if cycle.autoclear != 0 => {
                    vec![(HostOffset(field::AUTOCLEAR), self.kept.to_be_bytes().to_vec())]
                }
                Phase::Autoclear => vec![],
                Phase::Refcounts => std::mem::take(&mut cycle.refblocks),
                Phase::Reftable => std::mem::take(&mut cycle.reftable.pointer),
                Phase::L2 => std::mem::take(&mut cycle.l2),
                Phase::L1 => std::mem::take(&mut cycle.l1.pointer),
                Phase::Free => match self.release(&mut cycle.release) {
                    Some(step) => return Some(step),
                    None => {
                        cycle.phase = Phase::FreeWritten;
                        continue;
                    }
                },
                Phase::FreeWritten => std::mem::take(&mut cycle.release.refblocks),
                Phase::Done => return None,
            };
            match cycle.phase {
                Phase::Refcounts => pieces.append(&mut cycle.reftable.table),
                Phase::L2 => pieces.append(&mut cycle.l1.table),
                _ => {}
            }
            if !pieces.is_empty() {
                return Some(Step::Write(pieces));
            }
            // this barrier runs even without metadata: it is what makes data durable
            if cycle.phase == Phase::Refcounts {
                return Some(Step::Barrier);
            }
            self.advance(cycle);
        }
    }

    /// The step last returned by [`Metadata::next_step`] was carried out, or failed: then the cycle is over, and what
    /// it would have written belongs to the next one.
    pub fn step_done(&mut self, step: Step, result: Result<(), Errno>) {
        let mut cycle = self.cycle.take().expect("a cycle is under way");
        match (step, result) {
            (Step::Punch(_), _) => cycle.release.clearing.extend(cycle.release.punching.drain(..)),
            (Step::Write(pieces), Err(_)) => {
                cycle.written = Some(pieces);
                return self.give_up(cycle);
            }
            (_, Err(_)) => return self.give_up(cycle),
            (Step::Barrier, Ok(())) => {
                self.tables.landed(&cycle.written.take().unwrap_or_default(), true);
                self.advance(&mut cycle);
            }
            // what was taken back needs no barrier: a crash would only leak
            (Step::Write(pieces), Ok(())) if cycle.phase == Phase::FreeWritten => {
                self.tables.landed(&pieces, true);
                self.advance(&mut cycle);
            }
            (Step::Write(pieces), Ok(())) => cycle.written = Some(pieces),
            (Step::Load(_) | Step::Wait | Step::Pause, Ok(())) => {}
        }
        self.cycle = Some(cycle);
    }

    /// A phase is durable: on to the next.
    fn advance(&mut self, cycle: &mut Cycle) {
        cycle.phase = match cycle.phase {
            Phase::Autoclear => {
                self.autoclear &= !cycle.autoclear;
                Phase::Refcounts
            }
            Phase::Refcounts => Phase::Reftable,
            Phase::Reftable => {
                cycle.reftable = Publish::default();
                Phase::L2
            }
            Phase::L2 => Phase::L1,
            Phase::L1 => {
                cycle.l1 = Publish::default();
                // before a cluster can be used again that it speaks of
                if let Some(journal) = &mut self.journal {
                    journal.cycle_durable();
                }
                let epoch = self.next_epoch();
                if !cycle.freed.is_empty() {
                    self.freed_durable.push_back((epoch, std::mem::take(&mut cycle.freed)));
                }
                self.collect_drained(&mut cycle.release);
                Phase::Free
            }
            Phase::Free | Phase::FreeWritten | Phase::Done => Phase::Done,
        };
    }

    fn give_up(&mut self, mut cycle: Cycle) {
        if let Some(journal) = &mut self.journal {
            journal.cycle_failed();
        }
        for pieces in [&cycle.written.unwrap_or_default(), &cycle.refblocks, &cycle.l2, &cycle.release.refblocks] {
            self.tables.landed(pieces, false);
        }
        self.reftable.take_back(cycle.reftable);
        self.l1.take_back(cycle.l1);
        self.freed.append(&mut cycle.freed);
        // durable already, only their references are still counted: at the end of the next cycle
        let mut left = cycle.release.punching;
        left.extend(cycle.release.clearing);
        left.extend(cycle.release.taking.iter().flat_map(|&(c, n)| std::iter::repeat_n(c, n as usize)));
        if !left.is_empty() {
            self.freed_durable.push_front((0, left));
        }
    }

    /// Takes up what was freed by durable tables and that no operation can still point at.
    fn collect_drained(&mut self, release: &mut Release) {
        let mut references = Vec::new();
        while let Some((epoch, _)) = self.freed_durable.front() {
            if !self.drained(*epoch) {
                break;
            }
            let (_, clusters) = self.freed_durable.pop_front().expect("looked at");
            references.extend(clusters);
        }
        // quick where whole ranges were given up: they are in order already
        references.sort_unstable();
        release.taking.extend(references.chunk_by(|a, b| a == b).map(|same| (same[0], same.len() as u64)));
    }

    /// Takes references back. `None`: all done, the changed refcount blocks are ready to be written.
    fn release(&mut self, release: &mut Release) -> Option<Step> {
        let mut turn = 0;
        while let Some(&(cluster, references)) = release.taking.front() {
            turn += 1;
            if turn > RELEASE_TURN {
                return Some(Step::Pause);
            }
            let count = match self.refcount(cluster) {
                Ok(count) => count,
                Err(stop) => match self.or_step(stop) {
                    Some(step) => return Some(step),
                    None => 0,
                },
            };
            release.taking.pop_front();
            if count > references {
                self.set_refcount(cluster, count - references).expect("the refcount was just read");
            } else if count == references {
                if self.pack.is_some_and(|at| at >> self.layout.cluster_bits == cluster) {
                    self.pack = None;
                }
                release.punching.push(cluster);
            } else {
                let at = cluster << self.layout.cluster_bits;
                self.break_off_later(Corrupt {
                    structure: "refcount block",
                    at,
                    why: "the refcount of the cluster here is lower than the number of its users",
                });
            }
        }
        if !release.punching.is_empty() {
            return Some(Step::Punch(self.ranges(&release.punching)));
        }
        while let Some(&cluster) = release.clearing.front() {
            turn += 1;
            if turn > RELEASE_TURN {
                return Some(Step::Pause);
            }
            match self.set_refcount(cluster, 0) {
                Ok(()) => self.reuse(cluster),
                Err(stop) => {
                    if let Some(step) = self.or_step(stop) {
                        return Some(step);
                    }
                }
            }
            release.clearing.pop_front();
        }
        // what is on disk is always in the journal, too: else it would look like somebody else's
        self.seal_journal();
        release.refblocks = match self.broken {
            None => self.tables.take_dirty(TableKind::Refcount),
            Some(_) => Pieces::new(),
        };
        None
    }

    /// A stop as a step; a fault ends writing to the image instead.
    fn or_step(&mut self, stop: Stop) -> Option<Step> {
        match stop {
            Stop::Load(table) => Some(Step::Load(table)),
            Stop::Wait => Some(Step::Wait),
            Stop::Fault(super::metadata::Fault::Corrupt(corrupt)) => {
                self.break_off_later(corrupt);
                None
            }
            Stop::Fault(super::metadata::Fault::Errno(_)) => None,
        }
    }

    /// Sorted clusters as byte ranges.
    fn ranges(&self, clusters: &[u64]) -> Vec<HostRange> {
        let bits = self.layout.cluster_bits;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for &cluster in clusters {
            match ranges.last_mut() {
                Some((start, count)) if *start + *count == cluster => *count += 1,
                _ => ranges.push((cluster, 1)),
            }
        }
        ranges.into_iter().map(|(start, count)| HostRange::new(HostOffset(start << bits), count << bits)).collect()
    }

    /// Whether the disk holds everything, but for references that are still to be taken back.
    pub fn is_written(&self) -> bool {
        let root_clean = |root: &Root| root.dirty.is_empty() && !root.moved;
        self.tables.dirty_bytes() == 0 && root_clean(&self.l1) && root_clean(&self.reftable) && self.cycle.is_none()
    }

    /// Whether the disk holds everything and no cluster is leaked.
    pub fn is_clean(&self) -> bool {
        self.is_written() && self.freed.is_empty() && self.freed_durable.is_empty()
    }

    /// Whether more waits in memory than may.
    pub fn overfull(&self) -> bool {
        let much = self.tables.dirty_bytes() > self.tables.limit_bytes() || self.freed.len() > FREED_MAX;
        let no_room = self.journal_crowded();
        self.broken.is_none() && (much || no_room)
    }

    /// Whether so much waits in memory that a cycle should run without anybody asking for a flush.
    pub fn wants_writeback(&self) -> bool {
        let much = self.tables.dirty_bytes() > self.tables.limit_bytes() / 4 || self.freed.len() > FREED_LIMIT;
        let little_room = self.journal.as_ref().is_some_and(|journal| journal.wants_room());
        self.cycle.is_none() && self.broken.is_none() && (much || little_room)
    }
}

impl Root {
    /// Takes what is newer than the disk.
    fn publish(&mut self, kind: RootKind, cluster: u64) -> Publish {
        let dirty = std::mem::take(&mut self.dirty);
        let moved = std::mem::take(&mut self.moved);
        let mut publish = Publish { moved, ..Publish::default() };
        let len = self.entries.len() as u64 * 8;
        if moved {
            publish.table.push((self.at, self.bytes(len.next_multiple_of(cluster))));
            let (at, bytes) = kind.header_field(self.at, len / 8, cluster);
            publish.pointer.push((HostOffset(at), bytes));
        } else {
            for &index in &dirty {
                let at = self.at.0 + index as u64 * 8;
                push_piece(&mut publish.pointer, at, &self.entries[index].to_be_bytes());
            }
        }
        publish.dirty = dirty;
        publish
    }

    fn take_back(&mut self, mut publish: Publish) {
        self.dirty.append(&mut publish.dirty);
        self.moved |= publish.moved;
    }
}
