//! Zero copy: bytes go between a request's pages and image files, with no memory of ours in between.
//!
//! With UBLK_F_AUTO_BUF_REG the driver puts the pages of each request into the buffer table of the queue's ring, at the
//! index of its tag, and takes them out when the request is answered. Reads and writes of files on that ring can use
//! them meanwhile. What comes back short or with an error is nobody's loss: the caller has it done with a buffer.

use crate::block::{Direction, Transfer};
use crate::export::device_keys::MAX_DEPTH;
use crate::image::{self, Direct, DirectRun};
use futures_util::future::join_all;
use io_uring::{opcode, squeue, types};
use libublk::io::UblkQueue;
use libublk::{BufDesc, sys};
use std::cell::Cell;
use std::os::fd::AsRawFd;
use std::ptr;

/// What the fetching of a request under this tag says about its pages.
pub(super) fn buffer(queue: &UblkQueue<'_>, tag: u16) -> BufDesc<'static> {
    match queue.support_auto_buf_zc() {
        // should it not work, the request comes all the same, and its data is copied
        true => BufDesc::AutoReg(sys::ublk_auto_buf_reg {
            index: tag,
            flags: sys::UBLK_AUTO_BUF_REG_FALLBACK as u8,
            ..Default::default()
        }),
        false => BufDesc::Slice(&[]),
    }
}

/// Whether the pages of a request are in the ring's table.
pub(super) fn has_pages(queue: &UblkQueue<'_>, tag: u16) -> bool {
    queue.support_auto_buf_zc() && queue.get_iod(tag).op_flags & sys::UBLK_IO_F_NEED_REG_BUF == 0
}

/// libublk tells the operations of a queue from each other by 16 bits.
const _: () = assert!(image::MAX_DIRECT_RUNS * MAX_DEPTH as usize <= 1 << 16);

/// Writes of fewer bytes are not worth a thread of the kernel's.
const SMALL_WRITE: u64 = 32 << 10;

/// Kinds of transfers: a file may be able to do one and not another. Why these: kernel-notes/2026-11-23-ublk-zero-copy.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The ring reads what is cached at once, and waits for the rest.
    Read,
    /// Only at once: where the file system cannot do that, the kernel would hand the write to a thread of its own, which
    /// costs more than a copy.
    SmallWrite,
    /// At once or not: the copy costs more.
    LargeWrite,
}

impl Way {
    pub(super) const COUNT: usize = 3;

    pub(super) fn of(transfer: &Transfer) -> Way {
        match transfer.direction() {
            Direction::Read => Way::Read,
            Direction::Write if transfer.range().len() < SMALL_WRITE => Way::SmallWrite,
            Direction::Write => Way::LargeWrite,
        }
    }
}

/// What became of moving a request's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    /// All are where they belong.
    All,
    /// Some are not.
    NotAll,
    /// They are not: a file cannot do it this way.
    Never,
}

/// How often transfers of one way have been tried of late, and to what avail.
#[derive(Default)]
pub(super) struct Trial {
    /// One after the other.
    failures: Cell<u32>,
    /// Transfers that are not to be tried.
    left_out: Cell<u32>,
}

/// So many failures one after the other are none of chance.
const IN_VAIN: u32 = 8;
/// Transfers until it is tried again.
const PAUSE: u32 = 1000;

impl Trial {
    /// Whether the next transfer is to be tried.
    pub(super) fn is_due(&self) -> bool {
        let left_out = self.left_out.get();
        self.left_out.set(left_out.saturating_sub(1));
        left_out == 0
    }

    /// What became of one.
    pub(super) fn tell(&self, moved: Moved) {
        let failures = match moved {
            Moved::All => 0,
            Moved::NotAll => self.failures.get() + 1,
            Moved::Never => IN_VAIN,
        };
        let in_vain = failures >= IN_VAIN;
        self.failures.set(if in_vain { 0 } else { failures });
        if in_vain {
            self.left_out.set(PAUSE);
        }
    }
}

/// Moves all bytes of the request under this tag.
pub(super) async fn transfer(queue: &UblkQueue<'_>, tag: u16, way: Way, direct: &Direct<'_>) -> Moved {
    let mut from = 0;
    let entries = direct.runs().iter().map(|run| {
        let entry = entry(run, way, tag, from);
        from += run.host.len();
        (run.host.len(), entry)
    });
    let moves = entries.map(async |(len, entry)| outcome(queue.ublk_submit_sqe(entry).await, len));
    // in the order of the worst
    join_all(moves).await.into_iter().fold(Moved::All, |worst, moved| match (worst, moved) {
        (Moved::Never, _) | (_, Moved::Never) => Moved::Never,
        (Moved::NotAll, _) | (_, Moved::NotAll) => Moved::NotAll,
        (Moved::All, Moved::All) => Moved::All,
    })
}

/// The operation for a run whose first byte is the request's byte `from`.
fn entry(run: &DirectRun<'_>, way: Way, tag: u16, from: u64) -> squeue::Entry {
    let file = types::Fd(run.file.as_raw_fd());
    // in such a buffer places are counted from 0
    let place = from as usize;
    let len = run.host.len() as u32; // at most MAX_REQUEST
    let at = run.host.start().0;
    let write = || opcode::WriteFixed::new(file, ptr::without_provenance(place), len, tag).offset(at);
    match way {
        Way::Read => opcode::ReadFixed::new(file, ptr::without_provenance_mut(place), len, tag).offset(at).build(),
        Way::SmallWrite => write().rw_flags(libc::RWF_NOWAIT).build(),
        Way::LargeWrite => write().build(),
    }
}

/// What the kernel's answer to an operation on `len` bytes says.
fn outcome(result: i32, len: u64) -> Moved {
    match result {
        moved if u64::try_from(moved) == Ok(len) => Moved::All,
        error if [libc::EINVAL, libc::EOPNOTSUPP, libc::EFAULT].contains(&-error) => Moved::Never,
        _ => Moved::NotAll,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Geometry;

    #[test]
    fn small_writes_are_told_from_large_ones() {
        let geometry =
            Geometry { size: 1 << 20, min_block: 1, preferred_block: 4096, max_payload: 1 << 20, read_only: false };
        let way = |direction, len| Way::of(&Transfer::new(direction, 0, len, false, &geometry).unwrap());
        assert_eq!(way(Direction::Write, SMALL_WRITE - 512), Way::SmallWrite);
        assert_eq!(way(Direction::Write, SMALL_WRITE), Way::LargeWrite);
        assert_eq!(way(Direction::Read, 512), Way::Read);
    }

    #[test]
    fn what_is_tried_in_vain_is_left_out_for_a_while() {
        let trial = Trial::default();
        let tries = |count: u32| (0..count).filter(|_| trial.is_due()).count() as u32;
        for _ in 1..IN_VAIN {
            trial.tell(Moved::NotAll);
        }
        trial.tell(Moved::All);
        trial.tell(Moved::NotAll);
        assert_eq!(tries(10), 10, "it works now and then");
        trial.tell(Moved::Never);
        assert_eq!((tries(PAUSE), tries(3)), (0, 3));
        for _ in 0..IN_VAIN {
            trial.tell(Moved::NotAll);
        }
        assert_eq!((tries(PAUSE), tries(3)), (0, 3));
    }

    #[test]
    fn only_whole_moves_count() {
        assert_eq!(outcome(4096, 4096), Moved::All);
        assert_eq!((outcome(0, 4096), outcome(4095, 4096)), (Moved::NotAll, Moved::NotAll), "the file ends there");
        assert_eq!((outcome(-libc::EAGAIN, 1), outcome(-libc::EIO, 1)), (Moved::NotAll, Moved::NotAll));
        assert_eq!((outcome(-libc::EINVAL, 1), outcome(-libc::EFAULT, 1)), (Moved::Never, Moved::Never));
    }
}
