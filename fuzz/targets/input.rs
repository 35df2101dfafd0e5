//! How an input is cut up: bytes taken one field after the other, and images with what is done to them.

/// Fields from the front of an input; zeroes when it is used up.
pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    fn number(&mut self, len: usize) -> u64 {
        self.bytes(len).iter().rev().fold(0, |n, &b| n << 8 | u64::from(b))
    }

    /// At most `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &[u8] {
        let (head, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        head
    }
}

/// What the second file of an image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Second {
    None,
    RawBacking,
    Qcow2Backing,
    DataFile,
}

/// Image files and operations: `image | second file | operations | footer`. A plain image file is one too, so that
/// seeds are easily made: the footer is whatever its last four bytes are, most often zeroes.
pub struct Case<'a> {
    pub image: &'a [u8],
    pub second: &'a [u8],
    pub kind: Second,
    /// The image file is longer than its bytes: zeroes up to here.
    pub len: u64,
    /// [`OP_BYTES`] each.
    pub ops: &'a [u8],
}

/// Bytes of one operation.
pub const OP_BYTES: usize = 8;

impl<'a> Case<'a> {
    /// The footer: number of operations, flags, length of the second file in units of 512 bytes (two bytes, lowest first).
    pub fn of(data: &'a [u8]) -> Case<'a> {
        let Some((rest, &[ops, flags, low, high])) = data.split_last_chunk::<4>() else {
            return Case { image: data, second: &[], kind: Second::None, len: data.len() as u64, ops: &[] };
        };
        let (rest, ops) = rest.split_at(rest.len() - (usize::from(ops) * OP_BYTES).min(rest.len()));
        let second = (usize::from(u16::from_le_bytes([low, high])) * 512).min(rest.len());
        let (image, second) = rest.split_at(rest.len() - second);
        let kind = match flags & 3 {
            0 => Second::None,
            1 => Second::RawBacking,
            2 => Second::Qcow2Backing,
            _ => Second::DataFile,
        };
        let longer = if flags >> 4 == 0 { 0 } else { 1u64 << (12 + (flags >> 4)) }; // up to 128 MiB
        Case { image, second, kind, len: longer.max(image.len() as u64), ops }
    }
}
