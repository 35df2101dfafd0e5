//! What a [`super::MemDisk`] stores and what happens to it: sparse bytes, and changes that can be applied whole, torn, or
//! without what newer ones decide.

use super::SECTOR;
use super::seed::Seed;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Unit of storage, in bytes; a block never written takes none.
const BLOCK: usize = 4096;

/// One change of the content, or what is left of it.
#[derive(Clone)]
pub(super) struct Change {
    /// Shared by the parts a change was cut into.
    pub(super) number: u64,
    pub(super) at: u64,
    pub(super) effect: Effect,
    /// Its caller was told, so the next sync covers it.
    pub(super) completed: bool,
}

#[derive(Clone)]
pub(super) enum Effect {
    Bytes(Vec<u8>),
    /// So many bytes become zeroes; the file does not grow.
    Punch(u64),
    /// So many bytes become zeroes; the file grows as needed.
    Zero(u64),
    /// The file grows so as to hold so many bytes.
    Extend(u64),
}

impl Change {
    fn len(&self) -> u64 {
        match &self.effect {
            Effect::Bytes(bytes) => bytes.len() as u64,
            Effect::Punch(len) | Effect::Zero(len) | Effect::Extend(len) => *len,
        }
    }

    pub(super) fn apply(&self, content: &mut Content) {
        self.apply_part(content, self.at..self.at + self.len());
    }

    /// Applies what falls into `part`, which lies inside the change.
    fn apply_part(&self, content: &mut Content, part: Range<u64>) {
        match &self.effect {
            Effect::Bytes(bytes) => {
                let (from, to) = (part.start - self.at, part.end - self.at);
                content.write(part.start, &bytes[from as usize..to as usize]);
            }
            Effect::Punch(_) => content.zero(part),
            Effect::Zero(_) => {
                content.zero(part.clone());
                content.grow(part.end);
            }
            Effect::Extend(_) => content.grow(part.end),
        }
    }

    /// Applies a random choice of its sectors.
    pub(super) fn apply_torn(&self, content: &mut Content, seed: &mut Seed) {
        let end = self.at + self.len();
        let mut at = self.at;
        while at < end {
            let next = (at / SECTOR + 1).saturating_mul(SECTOR).min(end);
            if seed.chance(50) {
                self.apply_part(content, at..next);
            }
            at = next;
        }
    }

    /// The bytes it decides.
    pub(super) fn covers(&self) -> Range<u64> {
        match self.effect {
            Effect::Extend(_) => self.at..self.at,
            _ => self.at..self.at + self.len(),
        }
    }

    /// What is left of it outside `gone`: up to two parts.
    pub(super) fn without(self, gone: &Range<u64>) -> Vec<Change> {
        let end = self.at + self.len();
        let extends_only = matches!(self.effect, Effect::Extend(_));
        if extends_only || gone.is_empty() || gone.end <= self.at || end <= gone.start {
            return vec![self];
        }
        let part = |r: Range<u64>| Change {
            number: self.number,
            at: r.start,
            completed: self.completed,
            effect: match &self.effect {
                Effect::Bytes(bytes) => {
                    Effect::Bytes(bytes[(r.start - self.at) as usize..(r.end - self.at) as usize].to_vec())
                }
                Effect::Punch(_) => Effect::Punch(r.end - r.start),
                Effect::Zero(_) => Effect::Zero(r.end - r.start),
                Effect::Extend(_) => Effect::Extend(r.end - r.start),
            },
        };
        let parts = [self.at..gone.start.max(self.at), gone.end.min(end)..end];
        parts.into_iter().filter(|r| !r.is_empty()).map(part).collect()
    }
}

/// Bytes of a sparse file.
#[derive(Clone, Default)]
pub(super) struct Content {
    pub(super) len: u64,
    /// By number; a block that is absent is all zeroes. Shared until written, so that a copy of a disk is cheap.
    blocks: BTreeMap<u64, Arc<[u8; BLOCK]>>,
}

impl Content {
    /// Fills a first part of `buf`, up to the end of the file.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> usize {
        let count = self.len.saturating_sub(at).min(buf.len() as u64);
        for (number, inside, place) in pieces(at, count) {
            match self.blocks.get(&number) {
                Some(block) => buf[place].copy_from_slice(&block[inside]),
                None => buf[place].fill(0),
            }
        }
        count as usize
    }

    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) {
        for (number, inside, place) in pieces(at, bytes.len() as u64) {
            let block = self.blocks.entry(number).or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(block)[inside].copy_from_slice(&bytes[place]);
        }
        self.grow(at + bytes.len() as u64);
    }

    fn zero(&mut self, r: Range<u64>) {
        let numbers: Vec<u64> = self
            .blocks
            .range(r.start / BLOCK as u64..r.end.div_ceil(BLOCK as u64))
            .map(|(&number, _)| number)
            .collect();
        for number in numbers {
            let start = number * BLOCK as u64;
            let inside = r.start.saturating_sub(start) as usize..(r.end - start).min(BLOCK as u64) as usize;
            if inside == (0..BLOCK) {
                self.blocks.remove(&number);
            } else if let Some(block) = self.blocks.get_mut(&number) {
                Arc::make_mut(block)[inside].fill(0);
            }
        }
    }

    fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        for (&number, block) in &self.blocks {
            let start = number as usize * BLOCK;
            let end = bytes.len().min(start + BLOCK);
            bytes[start..end].copy_from_slice(&block[..end - start]);
        }
        bytes
    }
}

/// Cuts `len` bytes from `at` at block borders: block number, range inside the block, range inside the buffer.
fn pieces(at: u64, len: u64) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let end = at + len;
    let mut next = at;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let start = next;
        let number = start / BLOCK as u64;
        next = ((number + 1) * BLOCK as u64).min(end);
        let first = (start % BLOCK as u64) as usize;
        let length = (next - start) as usize;
        let place = (start - at) as usize;
        Some((number, first..first + length, place..place + length))
    })
}
