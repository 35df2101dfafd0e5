//! Packing and unpacking of compressed clusters.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

/// How an image's compressed clusters are packed (header field `compression_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (RFC 1951), which QEMU calls zlib.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Compressed data is stored in whole sectors of this many bytes.
pub const SECTOR: usize = 512;
/// log2 of the deflate window: QEMU unpacks with this one.
const WINDOW_BITS: u8 = 12;
/// log2 of the largest zstd window we unpack with: what every zstd decoder is expected to support.
const WINDOW_LOG_MAX: u32 = 23;

impl Compression {
    /// QEMU's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// Packs one cluster, filled up with zeroes to whole sectors. `None`: it would not take fewer sectors than it has.
///
/// Whole sectors cost a quarter of a kilobyte for each cluster on average, and let no two clusters share one: a sector
/// torn by a crash then never costs a cluster that was flushed long ago.
pub fn pack(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    let room = cluster.len().saturating_sub(SECTOR);
    let mut packed = vec![0; room];
    let len = match kind {
        Compression::Zlib => {
            let mut deflate = Compress::new_with_window_bits(flate2::Compression::default(), false, WINDOW_BITS);
            match deflate.compress(cluster, &mut packed, FlushCompress::Finish) {
                Ok(Status::StreamEnd) => deflate.total_out() as usize,
                _ => return None, // no room left
            }
        }
        Compression::Zstd => zstd::bulk::compress_to_buffer(cluster, &mut packed, 0).ok()?, // level 0: zstd's default
    };
    packed.truncate(len);
    packed.resize(len.next_multiple_of(SECTOR), 0);
    Some(packed)
}

/// Unpacks one cluster into `out`, which must come out exactly full. Bytes of `packed` behind the compressed data are
/// ignored: the format only stores a length in sectors. `Err` says what is wrong.
///
/// Never produces more than `out` holds, whatever the input.
pub fn unpack(kind: Compression, packed: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    match kind {
        Compression::Zlib => {
            let mut inflate = Decompress::new(false);
            match inflate.decompress(packed, out, FlushDecompress::Finish) {
                // a full output is enough: the end mark may not have been read yet
                Ok(Status::Ok | Status::BufError | Status::StreamEnd) if inflate.total_out() == out.len() as u64 => {
                    Ok(())
                }
                Ok(_) => Err("deflate stream ends before the cluster is full"),
                Err(_) => Err("not a deflate stream"),
            }
        }
        Compression::Zstd => unpack_zstd(packed, out),
    }
}

fn unpack_zstd(packed: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};
    let mut decoder = Decoder::new().map_err(|_| "no memory for the zstd decoder")?;
    // a frame may ask for a window of 128 MiB; what packs clusters of at most 2 MiB needs none above 8
    decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(|_| "no memory for the zstd decoder")?;
    let mut input = InBuffer::around(packed);
    let size = out.len();
    let mut output = OutBuffer::around(out);
    while output.pos() < size {
        let before = (input.pos(), output.pos());
        decoder.run(&mut input, &mut output).map_err(|_| "not a zstd frame")?;
        if (input.pos(), output.pos()) == before {
            return Err("zstd frame ends before the cluster is full");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflated(data: &[u8]) -> Vec<u8> {
        let mut e = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        e.write_all(data).unwrap();
        e.finish().unwrap()
    }

    #[test]
    fn what_is_packed_unpacks_and_what_does_not_shrink_is_left() {
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .take(65536)
        .collect();
        let text: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            let packed = pack(kind, &text).unwrap();
            assert!(packed.len().is_multiple_of(SECTOR) && packed.len() < text.len() / 2, "{kind:?} {}", packed.len());
            let mut out = vec![0; text.len()];
            unpack(kind, &packed, &mut out).unwrap();
            assert!(out == text);
            assert_eq!(pack(kind, &noise), None, "{kind:?}");
            assert_eq!(pack(kind, &[0; 512]), None, "{kind:?}: nothing is smaller than a sector");
            assert_eq!(pack(kind, &[0; 1024]).unwrap().len(), SECTOR);
        }
    }

    #[test]
    fn both_kinds_come_out_whole_with_trailing_rubbish() {
        let data: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        for (kind, mut packed) in
            [(Compression::Zlib, deflated(&data)), (Compression::Zstd, zstd::bulk::compress(&data, 3).unwrap())]
        {
            packed.extend([0xaa; 300]);
            let mut out = vec![0; data.len()];
            unpack(kind, &packed, &mut out).unwrap();
            assert!(out == data);
        }
    }

    #[test]
    fn short_and_broken_streams_are_refused() {
        let data = vec![5u8; 4096];
        for (kind, packed) in
            [(Compression::Zlib, deflated(&data)), (Compression::Zstd, zstd::bulk::compress(&data, 3).unwrap())]
        {
            let mut bigger = vec![0; 8192];
            assert!(unpack(kind, &packed, &mut bigger).is_err(), "{kind:?} too short");
            assert!(unpack(kind, &[0xff; 100], &mut bigger).is_err(), "{kind:?} rubbish");
            assert!(unpack(kind, &[], &mut bigger).is_err(), "{kind:?} empty");
            let mut smaller = vec![0; 100];
            unpack(kind, &packed, &mut smaller).unwrap();
        }
    }
}
