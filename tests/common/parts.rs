//! What tests in memory know about a disk that several tasks write, each its own part: what must be durable, what may be.

use cowgate::ring::mem::Seed;
use std::sync::{Arc, Mutex};

/// What one task knows about its part of the disk.
#[derive(Clone)]
pub struct Part {
    /// Where it begins, in bytes.
    pub start: u64,
    /// Flushed content.
    pub stable: Vec<u8>,
    /// Writes since, oldest first; those before the mark were complete when the running flush began.
    pub since: Vec<(usize, Vec<u8>)>,
}

/// The parts of all tasks.
pub type Parts = Arc<Mutex<Vec<Part>>>;

impl Part {
    /// A write that begins now: from here on its bytes may be found.
    pub fn note(&mut self, from: usize, bytes: Vec<u8>) {
        self.since.push((from, bytes));
    }

    /// The first `count` writes are durable.
    pub fn flushed(&mut self, count: usize) {
        for (from, bytes) in self.since.drain(..count) {
            self.stable[from..from + bytes.len()].copy_from_slice(&bytes);
        }
    }

    /// Whether `found` can be what a crash left of this part.
    pub fn allows(&self, found: &[u8]) -> Result<(), String> {
        let mut wrong: Vec<usize> = (0..found.len()).filter(|&i| found[i] != self.stable[i]).collect();
        for (from, bytes) in &self.since {
            wrong.retain(|&i| i < *from || i >= from + bytes.len() || bytes[i - from] != found[i]);
        }
        match wrong.first() {
            None => Ok(()),
            Some(i) => Err(format!(
                "byte {} is {:#04x}, flushed was {:#04x} ({} bytes are wrong)",
                self.start + *i as u64,
                found[*i],
                self.stable[*i],
                wrong.len()
            )),
        }
    }
}

/// Random bytes, none of them zero: zero stands for "nothing was written here".
pub fn noise(seed: &mut Seed, len: usize) -> Vec<u8> {
    (0..len).map(|_| (seed.below(255) + 1) as u8).collect()
}

/// Cuts a disk into parts for `tasks` tasks, at any byte.
pub fn cut_up(content: &[u8], tasks: usize, seed: &mut Seed) -> Vec<Part> {
    let mut borders: Vec<usize> = (1..tasks).map(|_| seed.below(content.len() as u64) as usize).collect();
    borders.extend([0, content.len()]);
    borders.sort_unstable();
    borders.dedup();
    let part = |w: &[usize]| Part { start: w[0] as u64, stable: content[w[0]..w[1]].to_vec(), since: Vec::new() };
    borders.windows(2).map(part).collect()
}
