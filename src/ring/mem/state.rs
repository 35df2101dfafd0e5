//! The model behind a [`super::MemDisk`]: what readers see, what is durable, and the changes between the two.

use super::change::{Change, Content, Effect};
use super::fault::Fault;
use super::seed::Seed;
use super::{Counts, Kind, SECTOR};
use crate::block::Errno;
use std::collections::BTreeMap;
use std::io;

/// Size above which a disk is full unless told otherwise, in bytes.
const DEFAULT_LIMIT: u64 = 1 << 30;

/// What a disk holds, what it was told to do, and what it has done. Nothing here waits.
pub(super) struct State {
    pub(super) volatile: Content,
    pub(super) durable: Content,
    /// What was done since, in order, and is not known to be durable.
    pub(super) log: Vec<Change>,
    /// Number of the next change.
    pub(super) next_change: u64,
    /// Syncs that failed. As in the kernel, every open file is told once that there was one.
    pub(super) sync_errors: u64,
    pub(super) seed: Seed,
    /// Apart, so that taking crash states does not alter the run.
    pub(super) crash_seed: Seed,
    pub(super) limit: u64,
    pub(super) most_delay: u64,
    pub(super) cut_short: u64,
    pub(super) faults: Vec<Fault>,
    /// Syncs succeed and make nothing durable.
    pub(super) lying: bool,
    pub(super) holds: BTreeMap<Kind, Hold>,
    pub(super) counts: Counts,
}

/// Whether operations of a kind wait.
#[derive(Default)]
pub(super) struct Hold {
    pub(super) on: bool,
    pub(super) waiting: usize,
    /// Operations that may pass although it is on.
    pub(super) passes: usize,
}

impl State {
    pub(super) fn new(content: &[u8], seed: u64) -> State {
        let limit = DEFAULT_LIMIT.max(content.len() as u64);
        let mut durable = Content::default();
        durable.write(0, content);
        let mut seed = Seed::new(seed);
        State {
            volatile: durable.clone(),
            durable,
            log: Vec::new(),
            next_change: 0,
            sync_errors: 0,
            crash_seed: Seed::new(seed.draw()),
            seed,
            limit,
            most_delay: 0,
            cut_short: 0,
            faults: Vec::new(),
            lying: false,
            holds: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    pub(super) fn may_pass(&mut self, kind: Kind, waiting: &mut bool) -> bool {
        let Some(hold) = self.holds.get_mut(&kind) else { return true };
        let pass = !hold.on || hold.passes > 0;
        if hold.on && pass {
            hold.passes -= 1;
        }
        // pass: no longer waiting; else: waiting, counted once
        match (pass, *waiting) {
            (true, true) => hold.waiting -= 1,
            (false, false) => hold.waiting += 1,
            _ => {}
        }
        *waiting = !pass;
        pass
    }

    /// The error a fault has for this operation.
    pub(super) fn fault(&mut self, kind: Kind, at: u64, len: u64) -> io::Result<()> {
        Fault::strike(&mut self.faults, &mut self.seed, kind, at, len).map_or(Ok(()), |errno| Err(errno.into()))
    }

    pub(super) fn room(&self, at: u64, len: u64) -> io::Result<()> {
        let end = at + len;
        if end > self.limit && end > self.volatile.len { Err(Errno::ENOSPC.into()) } else { Ok(()) }
    }

    /// How much of `len` bytes a call does.
    pub(super) fn part_of(&mut self, len: usize) -> usize {
        if self.seed.chance(self.cut_short) { 1 + self.seed.below(len as u64) as usize } else { len }
    }

    /// Whole sectors from the first on, never all of it.
    pub(super) fn stored_by_failed_write(&mut self, at: u64, len: usize, e: &io::Error) -> usize {
        if will_be_retried(e) || self.room(at, len as u64).is_err() {
            return 0;
        }
        let sectors = (len as u64).div_ceil(SECTOR);
        (self.seed.below(sectors) * SECTOR) as usize
    }

    pub(super) fn read(&mut self, at: u64, buf: &mut [u8]) -> usize {
        let count = self.volatile.read(at, buf);
        self.counts.read_bytes += count as u64;
        count
    }

    /// The number of the change, if any byte changes.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) -> Option<u64> {
        self.counts.written_bytes += bytes.len() as u64;
        (!bytes.is_empty()).then(|| self.change(at, Effect::Bytes(bytes.to_vec())))
    }

    pub(super) fn change(&mut self, at: u64, effect: Effect) -> u64 {
        let number = self.next_change;
        self.next_change += 1;
        let change = Change { number, at, effect, completed: false };
        change.apply(&mut self.volatile);
        self.log.push(change);
        number
    }

    pub(super) fn set_completed(&mut self, number: u64) {
        for change in self.log.iter_mut().filter(|change| change.number == number) {
            change.completed = true;
        }
    }

    /// Numbers of the changes a sync asked for now must cover.
    pub(super) fn completed(&self) -> Vec<u64> {
        self.log.iter().filter(|change| change.completed).map(|change| change.number).collect()
    }

    /// Moves the changes numbered (in ascending order) from the log to what is durable.
    pub(super) fn make_durable(&mut self, numbers: &[u64]) {
        let mut rest: Vec<Change> = Vec::new();
        for change in std::mem::take(&mut self.log) {
            if numbers.binary_search(&change.number).is_ok() {
                change.apply(&mut self.durable);
                // An older change that stays in the log must not come back on top of it.
                let covered = change.covers();
                rest = rest.into_iter().flat_map(|older| older.without(&covered)).collect();
            } else {
                rest.push(change);
            }
        }
        self.log = rest;
    }

    /// Of the changes numbered, some reach the disk; the others are no longer even in the cache's books.
    pub(super) fn fail_to_make_durable(&mut self, numbers: &[u64]) {
        self.sync_errors += 1;
        let kept: Vec<u64> = numbers.iter().copied().filter(|_| self.seed.chance(50)).collect();
        self.make_durable(&kept);
        self.log.retain(|change| numbers.binary_search(&change.number).is_err());
    }

    pub(super) fn all_kept(&self) -> Content {
        let mut image = self.durable.clone();
        self.log.iter().for_each(|change| change.apply(&mut image));
        image
    }

    pub(super) fn crash(&self, seed: &mut Seed) -> Vec<u8> {
        // Sometimes nearly all is kept or lost: there the interesting losses are single ones.
        let keep = [5, 50, 50, 95][seed.below(4) as usize];
        let torn = [0, 20, 100][seed.below(3) as usize];
        let mut kept: Vec<&Change> = self.log.iter().filter(|_| seed.chance(keep)).collect();
        if seed.chance(50) {
            seed.shuffle(&mut kept);
        }
        let mut image = self.durable.clone();
        for change in kept {
            if seed.chance(torn) {
                change.apply_torn(&mut image, seed);
            } else {
                change.apply(&mut image);
            }
        }
        image.to_vec()
    }
}

/// [`crate::ring::File`] tries again, so nothing has happened yet.
pub(super) fn will_be_retried(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}
