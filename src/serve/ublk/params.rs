//! What the driver is told about a device, and what its requests ask for. Pure: numbers in, numbers out.
//!
//! The driver counts in sectors of 512 bytes. Follows the kernel's Documentation/block/ublk.rst and
//! include/uapi/linux/ublk_cmd.h.

use crate::block::{Direction, Geometry, Op, ZeroFlags};
use crate::pagebuf::PageBuf;
use libublk::sys;

/// Bytes of a sector, and of a logical block: every request is a multiple of it.
pub(super) const SECTOR: u64 = 512;
/// Bytes of one read or write at most: what a queue keeps in memory for one request.
pub(super) const MAX_REQUEST: u32 = 512 << 10;
/// Bytes of one discard or zeroing at most. They carry no data; more comes in several.
const MAX_RANGE: u64 = 2 << 30;
/// Bytes of a page, below which the page cache of the machine does not go.
const PAGE_SHIFT: u8 = 12;
/// Least size of clusters that is told as such, and the largest.
const CLUSTERS: std::ops::RangeInclusive<u32> = 4096..=2 << 20;

/// The device's description. `cluster`: bytes that are allocated together, a power of two.
pub(super) fn params(geometry: &Geometry, cluster: u32, rotational: bool) -> sys::ublk_params {
    let cluster = cluster.clamp(*CLUSTERS.start(), *CLUSTERS.end()).next_power_of_two();
    let cluster_shift = cluster.trailing_zeros() as u8;
    // Flush reaches the disk, and a write with FUA does.
    let mut attrs = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    if geometry.read_only {
        attrs |= sys::UBLK_ATTR_READ_ONLY;
    }
    if rotational {
        attrs |= sys::UBLK_ATTR_ROTATIONAL;
    }
    let basic = sys::ublk_param_basic {
        attrs,
        logical_bs_shift: SECTOR.trailing_zeros() as u8,
        physical_bs_shift: PAGE_SHIFT,
        io_opt_shift: cluster_shift,
        io_min_shift: cluster_shift,
        max_sectors: MAX_REQUEST / SECTOR as u32,
        dev_sectors: geometry.size / SECTOR,
        ..sys::ublk_param_basic::default()
    };
    let range_sectors = (MAX_RANGE / SECTOR) as u32;
    let discard = sys::ublk_param_discard {
        discard_granularity: cluster,
        max_discard_sectors: range_sectors,
        max_write_zeroes_sectors: range_sectors,
        max_discard_segments: 1,
        ..sys::ublk_param_discard::default()
    };
    let types = match geometry.read_only {
        true => sys::UBLK_PARAM_TYPE_BASIC,
        false => sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
    };
    sys::ublk_params { types, basic, discard, ..sys::ublk_params::default() }
}

/// One request of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asked {
    /// What for.
    pub kind: Kind,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// It is answered when what it wrote is durable.
    pub fua: bool,
}

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes {
        /// The range may lose its storage.
        may_unmap: bool,
    },
}

impl Asked {
    /// Reads a descriptor. `None`: an operation that the device does not offer, or a length that it was told not to ask
    /// for.
    pub(super) fn parse(descriptor: &sys::ublksrv_io_desc) -> Option<Asked> {
        let flag = |flag: u32| descriptor.op_flags & flag != 0;
        let kind = match descriptor.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => Kind::Read,
            sys::UBLK_IO_OP_WRITE => Kind::Write,
            sys::UBLK_IO_OP_FLUSH => Kind::Flush,
            sys::UBLK_IO_OP_DISCARD => Kind::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => Kind::WriteZeroes { may_unmap: !flag(sys::UBLK_IO_F_NOUNMAP) },
            _ => return None,
        };
        // a flush has no place, and the driver says sector 2^64 - 1
        let is_flush = kind == Kind::Flush;
        let start = if is_flush { 0 } else { descriptor.start_sector.checked_mul(SECTOR)? };
        let len = if is_flush { 0 } else { u64::from(descriptor.nr_sectors) * SECTOR };
        let has_data = matches!(kind, Kind::Read | Kind::Write);
        if has_data && len > u64::from(MAX_REQUEST) {
            return None;
        }
        Some(Asked { kind, start, len, fua: flag(sys::UBLK_IO_F_FUA) })
    }

    /// Which way its data goes, if it has any.
    pub(super) fn direction(&self) -> Option<Direction> {
        match self.kind {
            Kind::Read => Some(Direction::Read),
            Kind::Write => Some(Direction::Write),
            Kind::Flush | Kind::Discard | Kind::WriteZeroes { .. } => None,
        }
    }

    /// The operation, with room for its data.
    pub(super) fn op(&self) -> Op {
        match self.kind {
            Kind::Read => Op::Read(PageBuf::new(self.len as usize)),
            Kind::Write => Op::Write(PageBuf::new(self.len as usize)),
            Kind::Flush => Op::Flush,
            Kind::Discard => Op::Discard,
            Kind::WriteZeroes { may_unmap } => Op::WriteZeroes(ZeroFlags { may_unmap, ..ZeroFlags::default() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(size: u64, read_only: bool) -> Geometry {
        Geometry { size, min_block: 1, preferred_block: 4096, max_payload: 32 << 20, read_only }
    }

    #[test]
    fn the_device_is_described_in_sectors() {
        let told = params(&geometry((1 << 40) + 700, false), 64 << 10, false);
        assert_eq!(told.basic.dev_sectors, (1 << 31) + 1, "what is behind the last whole sector cannot be reached");
        assert_eq!((told.basic.io_min_shift, told.basic.io_opt_shift, told.basic.logical_bs_shift), (16, 16, 9));
        assert_eq!((told.discard.discard_granularity, told.basic.max_sectors), (64 << 10, 1024));
        assert_eq!(told.basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!(params(&geometry(4096, false), 512, false).basic.io_min_shift, 12);
        let read_only = params(&geometry(4096, true), 4096, true);
        assert_eq!(read_only.basic.attrs & 3, sys::UBLK_ATTR_READ_ONLY | sys::UBLK_ATTR_ROTATIONAL);
        assert_eq!(read_only.types, sys::UBLK_PARAM_TYPE_BASIC);
    }

    #[test]
    fn descriptors_are_read_and_bad_ones_refused() {
        let ask = |op_flags, start_sector, nr_sectors| {
            Asked::parse(&sys::ublksrv_io_desc { op_flags, start_sector, nr_sectors, ..Default::default() })
        };
        let read = Asked { kind: Kind::Read, start: 4096, len: 512, fua: false };
        assert_eq!(ask(sys::UBLK_IO_OP_READ, 8, 1), Some(read));
        let fua = ask(sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA, 0, 1024).unwrap();
        assert!(fua.fua && fua.len == 512 << 10);
        let zeroes = |flags| ask(sys::UBLK_IO_OP_WRITE_ZEROES | flags, 0, u32::MAX).unwrap();
        assert_eq!(zeroes(0).kind, Kind::WriteZeroes { may_unmap: true });
        assert_eq!(zeroes(sys::UBLK_IO_F_NOUNMAP).kind, Kind::WriteZeroes { may_unmap: false });
        assert_eq!(zeroes(0).len, (u64::from(u32::MAX)) * 512);
        assert_eq!(ask(sys::UBLK_IO_OP_READ, 0, 1025), None, "larger than the device takes");
        assert_eq!(ask(sys::UBLK_IO_OP_READ, 1 << 60, 1), None);
        assert_eq!(ask(200, 0, 1), None);
        assert_eq!(ask(sys::UBLK_IO_OP_FLUSH, u64::MAX, 0).unwrap().kind, Kind::Flush);
    }
}
