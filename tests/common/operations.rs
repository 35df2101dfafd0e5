//! Random operations on a disk, and what the disk must hold after them.
//!
//! A disk can be larger than memory: operations stay inside a few windows of it, at its start, around the border of an
//! L2 table and at its end. Outside the windows the disk is zero.

use super::features::{DataFile, Features};
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Content of the file that `How::Noise` repeats: no zeroes, and a length that no cluster is a multiple of.
pub fn noise() -> Vec<u8> {
    (0..1021u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 19) as u8 | 1).collect()
}

/// Granularity of bitmaps, in bytes.
pub const GRAIN: u64 = 64 << 10;

/// One operation of a client.
#[derive(Clone, Debug)]
pub struct Op {
    pub kind: Kind,
    pub at: u64,
    pub len: u64,
    /// Durable when it is done.
    pub fua: bool,
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Writes this byte.
    Fill(u8),
    /// Writes the noise, from its start.
    Noise,
    /// Writes this byte as compressed clusters; whole clusters, not over NBD.
    Packed(u8),
    Zero {
        unmap: bool,
    },
    Discard,
    Flush,
}

impl Op {
    /// The command for qemu-io.
    pub fn for_qemu_io(&self, noise: &Path) -> String {
        let (at, len, fua) = (self.at, self.len, if self.fua { "-f " } else { "" });
        match self.kind {
            Kind::Fill(byte) => format!("write {fua}-P {byte} {at} {len}"),
            Kind::Noise => format!("write {fua}-s {} {at} {len}", noise.display()),
            Kind::Packed(byte) => format!("write -c -P {byte} {at} {len}"),
            Kind::Zero { unmap: true } => format!("write {fua}-z -u {at} {len}"),
            Kind::Zero { unmap: false } => format!("write {fua}-z {at} {len}"),
            Kind::Discard => format!("discard {at} {len}"),
            Kind::Flush => "flush".to_owned(),
        }
    }

    /// The line for `clients/replay.py`.
    pub fn line(&self) -> String {
        let (name, how) = match self.kind {
            Kind::Fill(byte) => ("write", byte.to_string()),
            Kind::Noise => ("write", "noise".to_owned()),
            Kind::Packed(_) => unreachable!("NBD has no compressed writes"),
            Kind::Zero { unmap } => ("zero", if unmap { "unmap" } else { "keep" }.to_owned()),
            Kind::Discard => ("discard", "-".to_owned()),
            Kind::Flush => ("flush", "-".to_owned()),
        };
        format!("{name} {} {} {how} {}\n", self.at, self.len, if self.fua { "fua" } else { "-" })
    }
}

/// A part of the disk that operations touch.
#[derive(Clone)]
pub struct Window {
    pub start: u64,
    pub bytes: Vec<u8>,
    /// Bytes that were discarded since they were written: they may also be zero.
    loose: Vec<bool>,
}

/// What a disk must hold.
#[derive(Clone)]
pub struct Model {
    pub size: u64,
    pub windows: Vec<Window>,
    /// Whether anything was discarded: two disks after the same operations may differ then.
    pub discarded: bool,
    /// Blocks of [`GRAIN`] bytes that were written or zeroed.
    pub written: BTreeSet<u64>,
}

impl Model {
    /// A zero disk for an image with these features: its end in the middle of a cluster, behind at least one L2 table
    /// unless that is larger than a test can wait for.
    pub fn new(features: &Features) -> Model {
        // a raw data file is mapped from the beginning, and QEMU then reads every byte of it
        let huge = features.cluster_bits == 21 && features.data_file == DataFile::Raw;
        let (cluster, coverage) = (features.cluster(), if huge { 16 << 20 } else { features.l2_coverage() });
        let tail = match features.cluster_bits {
            21 => cluster + 9 * 512,
            _ => cluster * 5 + cluster / 2 / 512 * 512,
        };
        let size = coverage.max(1 << 20) + tail;
        let (half, last) =
            if cluster > 1 << 16 { (3 << 20, size - 5000 * 512) } else { (600 << 10, size - (200 << 10)) };
        let all = if coverage <= 4 << 20 {
            vec![(0, size)]
        } else {
            vec![(0, 2 * half), (coverage - half, coverage + half.min(tail / 2 / 512 * 512)), (last, size)]
        };
        let mut windows: Vec<(u64, u64)> = Vec::new();
        for (start, end) in all {
            match windows.last_mut() {
                Some(before) if before.1 >= start => before.1 = end,
                _ => windows.push((start, end)),
            }
        }
        let window = |&(start, end): &(u64, u64)| {
            let len = (end - start) as usize;
            Window { start, bytes: vec![0; len], loose: vec![false; len] }
        };
        Model { size, windows: windows.iter().map(window).collect(), discarded: false, written: BTreeSet::new() }
    }

    /// The same disk seen through one of another size above it: cut off, or zero behind its end.
    pub fn seen_with_size(&self, size: u64, like: &Model) -> Model {
        let mut seen = Model { size, ..like.clone() };
        for (to, from) in seen.windows.iter_mut().zip(&self.windows) {
            to.bytes.fill(0);
            let len = to.bytes.len().min(from.bytes.len());
            to.bytes[..len].copy_from_slice(&from.bytes[..len]);
        }
        seen
    }

    /// The part of this model that lies below `size`, for a smaller disk.
    pub fn shortened(&self, size: u64) -> Model {
        let mut short = Model { size, ..self.clone() };
        for window in &mut short.windows {
            let len = size.saturating_sub(window.start).min(window.bytes.len() as u64) as usize;
            window.bytes.truncate(len);
            window.loose.truncate(len);
        }
        short
    }

    /// `[(start, end), ...]` for Python.
    pub fn python_windows(&self) -> String {
        let list = self.windows.iter().map(|w| format!("({}, {})", w.start, w.start + w.bytes.len() as u64));
        format!("[{}]", list.collect::<Vec<_>>().join(", "))
    }

    /// Something random, and the disk as it is afterwards.
    pub fn operate(&mut self, features: &Features, rng: &mut SmallRng, discards: bool) -> Op {
        let kind = match rng.random_range(0..100) {
            0..30 => Kind::Fill(rng.random_range(1..=255)),
            30..60 => Kind::Noise,
            60..72 => Kind::Zero { unmap: true },
            72..84 => Kind::Zero { unmap: false },
            84..95 if discards => Kind::Discard,
            84..95 => Kind::Fill(rng.random_range(1..=255)),
            _ => Kind::Flush,
        };
        let (at, len) = self.place(features, rng, kind == Kind::Discard);
        let (at, len) = if kind == Kind::Flush { (0, 0) } else { (at, len) };
        let op = Op { kind, at, len, fua: !matches!(kind, Kind::Flush | Kind::Discard) && rng.random_bool(0.1) };
        self.apply(&op);
        op
    }

    /// Clusters to write compressed, each once because QEMU refuses more, and the disk afterwards.
    pub fn pack(&mut self, features: &Features, rng: &mut SmallRng, count: usize) -> Vec<Op> {
        let mut ops: Vec<Op> = Vec::new();
        for _ in 0..count {
            let (at, len) = self.place(features, rng, true);
            if ops.iter().all(|op| at + len <= op.at || op.at + op.len <= at) {
                ops.push(Op { kind: Kind::Packed(rng.random_range(1..=255)), at, len, fua: false });
            }
        }
        ops.iter().for_each(|op| self.apply(op));
        ops
    }

    /// A range inside a window; of whole clusters (or up to the disk's end) if asked.
    fn place(&self, features: &Features, rng: &mut SmallRng, whole: bool) -> (u64, u64) {
        let windows: Vec<_> = self.windows.iter().filter(|w| !w.bytes.is_empty()).collect();
        let (cluster, unit) = (features.cluster(), features.unit());
        loop {
            let window = windows[rng.random_range(0..windows.len())];
            let (start, end) = (window.start, window.start + window.bytes.len() as u64);
            let near = match rng.random_range(0..4) {
                0 => start,
                1 => end - 1 - rng.random_range(0..cluster.min(end - start)),
                _ => rng.random_range(start..end),
            };
            let grain = match rng.random_range(0..10) {
                _ if whole => cluster,
                0..3 => cluster,
                3..5 => unit,
                5..8 => 512,
                _ => 1,
            };
            let at = near / grain * grain;
            let len = match rng.random_range(0..10) {
                _ if whole => cluster * rng.random_range(1..=(1 << 19u32.saturating_sub(features.cluster_bits).min(3))),
                0..3 => rng.random_range(1..=600),
                3..5 => unit * rng.random_range(1..=3),
                5..7 => cluster * rng.random_range(1..=3),
                _ => rng.random_range(1..=cluster.max(20_000) + cluster / 2),
            };
            let len = if grain >= 512 && rng.random_bool(0.7) { len.next_multiple_of(512) } else { len };
            let stop = (at + len).min(end);
            let broken = whole && stop != at + len && stop != self.size;
            if at >= start && at < stop && !broken {
                return (at, stop - at);
            }
        }
    }

    /// The disk after an operation.
    pub fn apply(&mut self, op: &Op) {
        if op.kind == Kind::Flush {
            return;
        }
        let end = op.at + op.len;
        if op.kind != Kind::Discard {
            self.written.extend(op.at / GRAIN..=(end - 1) / GRAIN);
        }
        let inside = |w: &&mut Window| w.start <= op.at && end <= w.start + w.bytes.len() as u64;
        let window = self.windows.iter_mut().find(inside).expect("operations stay inside one window");
        let range = (op.at - window.start) as usize..(end - window.start) as usize;
        let (bytes, loose) = (&mut window.bytes[range.clone()], &mut window.loose[range]);
        loose.fill(op.kind == Kind::Discard);
        match op.kind {
            Kind::Fill(byte) | Kind::Packed(byte) => bytes.fill(byte),
            Kind::Noise => bytes.iter_mut().zip(noise().iter().cycle()).for_each(|(b, n)| *b = *n),
            Kind::Zero { .. } => bytes.fill(0),
            Kind::Discard => self.discarded = true,
            Kind::Flush => {}
        }
    }

    /// Whether these dirty ranges cover everything that was written.
    pub fn covered_by(&self, dirty: &[(u64, u64)]) -> Result<(), String> {
        let covers = |block: u64| dirty.iter().any(|(at, len)| *at <= block * GRAIN && block * GRAIN < at + len);
        match self.written.iter().find(|block| !covers(**block)) {
            None => Ok(()),
            Some(block) => Err(format!("byte {} was written and is not marked", block * GRAIN)),
        }
    }

    /// Whether a raw file holds what this disk must hold, everywhere. It may be longer (QEMU's data files end with a
    /// whole cluster).
    pub fn matches_raw(&self, path: &Path) -> Result<(), String> {
        let mut file = File::open(path).map_err(|e| e.to_string())?;
        let len = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
        if len < self.size {
            return Err(format!("{len} bytes instead of {}", self.size));
        }
        let mut found = Vec::new();
        for window in &self.windows {
            found.resize(window.bytes.len(), 0);
            file.read_exact_at(&mut found, window.start).map_err(|e| e.to_string())?;
            window.allows(&found)?;
        }
        self.zero_outside(&file)
    }

    /// Whether these are the windows, one behind the other.
    pub fn matches_windows(&self, mut found: &[u8]) -> Result<(), String> {
        for window in &self.windows {
            let (this, rest) = found.split_at_checked(window.bytes.len()).ok_or("too little was read")?;
            window.allows(this)?;
            found = rest;
        }
        if found.is_empty() { Ok(()) } else { Err("too much was read".to_owned()) }
    }

    fn zero_outside(&self, file: &File) -> Result<(), String> {
        use nix::unistd::{Whence, lseek};
        let mut at = 0;
        let mut chunk = vec![0; 1 << 20];
        while let Ok(data) = lseek(file, at, Whence::SeekData) {
            let hole = lseek(file, data, Whence::SeekHole).map_err(|e| e.to_string())?;
            for from in (data as u64..hole as u64).step_by(chunk.len()) {
                let len = (hole as u64 - from).min(chunk.len() as u64) as usize;
                file.read_exact_at(&mut chunk[..len], from).map_err(|e| e.to_string())?;
                let outside =
                    |at: u64| !self.windows.iter().any(|w| w.start <= at && at < w.start + w.bytes.len() as u64);
                let wrong = chunk[..len].iter().enumerate().find(|(i, b)| **b != 0 && outside(from + *i as u64));
                if let Some((i, byte)) = wrong {
                    return Err(format!("byte {} is {byte:#04x}, and nobody wrote there", from + i as u64));
                }
            }
            at = hole;
        }
        Ok(())
    }
}

impl Window {
    fn allows(&self, found: &[u8]) -> Result<(), String> {
        if found == self.bytes {
            return Ok(());
        }
        let wrong = |i: usize| found[i] != self.bytes[i] && !(self.loose[i] && found[i] == 0);
        match (0..found.len()).find(|&i| wrong(i)) {
            None => Ok(()),
            Some(i) => {
                let count = (i..found.len()).filter(|&i| wrong(i)).count();
                let (at, expected) = (self.start + i as u64, self.bytes[i]);
                Err(format!("byte {at} is {:#04x} instead of {expected:#04x}; {count} bytes are wrong", found[i]))
            }
        }
    }
}
