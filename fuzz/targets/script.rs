//! What is done to an image, and the model of what must come of it.

use super::input::{Fields, OP_BYTES};
use cowgate::units::ByteRange;
use std::collections::BTreeMap;

/// Most bytes that one operation writes.
const MOST_WRITTEN: u64 = 128 << 10;
/// Every sector a guest writes begins like this, behind a byte that tells which operation wrote it: nothing else looks so.
const MARK: &[u8; 15] = b"\xc7guest-was-here";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Write(ByteRange),
    Packed(ByteRange),
    Zeroes(ByteRange, cowgate::block::ZeroFlags),
    Discard(ByteRange),
    Read(ByteRange),
    Extents(ByteRange),
    Flush,
}

/// The operations of an input on a disk of `size` bytes.
pub fn ops(bytes: &[u8], size: u64) -> impl Iterator<Item = Op> + '_ {
    bytes.chunks_exact(OP_BYTES).filter_map(move |bytes| op(bytes, size))
}

fn op(bytes: &[u8], size: u64) -> Option<Op> {
    let mut fields = Fields(bytes);
    let (kind, odd) = (fields.u8(), u64::from(fields.u8()));
    let at = u64::from(fields.u32()) * 512 + (odd & 7) * 61;
    let mut len = u64::from(fields.u16()) * 64 + (odd >> 3);
    if size == 0 {
        return None;
    }
    let mut at = at % size;
    if kind & 0x40 != 0 {
        at = size - 1 - at;
    }
    if kind & 0x80 != 0 {
        // whole clusters of most images
        (at, len) = (at & !4095, (len & !4095).max(4096));
    }
    let writes = matches!(kind & 7, 0 | 1 | 4) || (kind & 7 == 2 && kind & 8 == 0) || kind & 7 == 6;
    len = len.clamp(1, if writes { MOST_WRITTEN } else { u64::MAX });
    if !writes && len == 65535 * 64 + 31 {
        len = size; // all of it
    }
    let range = ByteRange::between(at, at.saturating_add(len).min(size));
    Some(match kind & 7 {
        0 | 1 => Op::Write(range),
        2 => Op::Zeroes(
            range,
            cowgate::block::ZeroFlags { may_unmap: kind & 8 != 0, sparse: kind & 16 != 0, fast: kind & 32 != 0 },
        ),
        3 => Op::Discard(range),
        4 => Op::Packed(range),
        5 => Op::Flush,
        6 => Op::Read(range),
        _ => Op::Extents(range),
    })
}

/// What operation `number` writes at a guest offset.
pub fn byte(number: usize, at: u64) -> u8 {
    match at % 16 {
        0 => number as u8,
        i => MARK[i as usize - 1],
    }
}

/// Whether a guest wrote something of this: it does so at a whole sector at least once.
pub fn marked(bytes: &[u8]) -> bool {
    bytes.chunks_exact(16).any(|chunk| chunk[1..] == MARK[..])
}

/// What is known of a run of bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// As the image had it.
    Before,
    /// Written by this operation.
    Written(usize),
    Zeroes,
    /// It may be anything that was there before.
    Unknown,
}

/// The disk as it must be.
pub struct Model(BTreeMap<u64, (u64, Fill)>);

impl Model {
    pub fn new(size: u64) -> Model {
        Model(BTreeMap::from([(0, (size, Fill::Before))]))
    }

    pub fn set(&mut self, range: ByteRange, fill: Fill) {
        let (start, end) = (range.start().0, range.end().0);
        if start >= end {
            return;
        }
        for border in [start, end] {
            if let Some((&from, &(to, old))) = self.0.range(..border).next_back()
                && to > border
            {
                self.0.insert(from, (border, old));
                self.0.insert(border, (to, old));
            }
        }
        let inside: Vec<u64> = self.0.range(start..end).map(|(&at, _)| at).collect();
        for at in inside {
            self.0.remove(&at);
        }
        self.0.insert(start, (end, fill));
    }

    /// The runs of bytes.
    pub fn runs(&self) -> impl Iterator<Item = (ByteRange, Fill)> + '_ {
        self.0.iter().map(|(&start, &(end, fill))| (ByteRange::between(start, end), fill))
    }
}

/// The first byte of `found`, read at `range`, that is not as it must be.
pub fn wrong(range: ByteRange, fill: Fill, found: &[u8], before: Option<&[u8]>) -> Option<u64> {
    let at = |i: usize| range.start().0 + i as u64;
    let bad = |(i, &b): (usize, &u8)| match fill {
        Fill::Written(number) => b != byte(number, at(i)),
        Fill::Zeroes => b != 0,
        Fill::Before => before.is_some_and(|before| b != before[at(i) as usize]),
        Fill::Unknown => false,
    };
    found.iter().enumerate().position(|(i, b)| bad((i, b))).map(at)
}
