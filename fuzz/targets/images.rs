//! Images in memory, and a runtime to use them on.

use super::input::{Case, Second};
use cowgate::block::{BlockDev, Errno};
use cowgate::image::{Disk, Format, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::qcow2::Header;
use cowgate::ring::mem::MemDisk;
use cowgate::units::{ByteRange, GuestOffset};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Far more than any input takes: what is not over by then hangs.
const PATIENCE: Duration = Duration::from_secs(25);
/// Bytes read at once.
const CHUNK: u64 = 1 << 20;
/// Of a larger disk only this many bytes at its start and at its end are read.
pub const MOST_READ: u64 = 4 << 20;

/// Runs a future to its end; panics when it hangs.
pub fn run<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let tasks = tokio::task::LocalSet::new();
    runtime.block_on(tasks.run_until(async { tokio::time::timeout(PATIENCE, future).await })).expect("it hangs")
}

/// The files of one input.
pub struct Files {
    pub image: MemDisk,
    pub second: MemDisk,
    kind: Second,
    /// Only an image that says so is opened with one.
    has_data_file: bool,
}

impl Files {
    pub async fn of(case: &Case<'_>) -> Files {
        let image = MemDisk::new(case.image.to_vec(), 1);
        if case.len > case.image.len() as u64 {
            let file = cowgate::ring::File::memory(&image);
            let all = cowgate::units::HostRange::new(cowgate::units::HostOffset(0), case.len);
            file.allocate(all).await.expect("there is room");
        }
        let has_data_file = Header::parse(case.image).is_ok_and(|h| h.layout.data_file);
        Files { image, second: MemDisk::new(case.second.to_vec(), 1), kind: case.kind, has_data_file }
    }

    pub async fn open(&self) -> Option<Arc<Image>> {
        let mut chain = vec![(self.image.clone(), Format::Qcow2)];
        match self.kind {
            Second::RawBacking => chain.push((self.second.clone(), Format::Raw)),
            Second::Qcow2Backing => chain.push((self.second.clone(), Format::Qcow2)),
            Second::None | Second::DataFile => {}
        }
        let data = (self.kind == Second::DataFile && self.has_data_file).then_some(&self.second);
        Image::in_memory_with_data(&chain, data).await.ok().map(Arc::new)
    }
}

/// Reads a part of the disk.
pub async fn read(disk: &Rc<Disk>, range: ByteRange) -> Result<PageBuf, Errno> {
    let (result, buf) = disk.read(range.start(), PageBuf::new(range.len() as usize)).await;
    assert_eq!(buf.len() as u64, range.len(), "a buffer comes back whole");
    result.map(|()| buf)
}

/// A range in pieces that can be read at once; of a long one its ends only.
pub fn pieces(range: ByteRange) -> Vec<ByteRange> {
    let mut parts = vec![range];
    if range.len() > 2 * MOST_READ {
        parts = vec![range.prefix(MOST_READ), range.skip(range.len() - MOST_READ)];
    }
    let mut out = Vec::new();
    for mut part in parts {
        while !part.is_empty() {
            let piece = part.prefix(CHUNK.min(part.len()));
            out.push(piece);
            part = part.skip(piece.len());
        }
    }
    out
}

/// Asks for the extents of a range and checks that they are an answer.
pub async fn extents(disk: &Rc<Disk>, range: ByteRange) {
    const MOST: usize = 100;
    let Ok(extents) = disk.extents(range, MOST).await else { return };
    assert!(extents.len() <= MOST);
    assert!(!extents.is_empty() && extents.iter().all(|e| e.len > 0), "{extents:?} of {range:?}");
    let total: u64 = extents.iter().map(|e| e.len).sum();
    assert!(total <= range.len(), "{total} of {range:?}");
}

/// All of the disk, as far as it is read.
pub fn whole(disk: &Rc<Disk>) -> ByteRange {
    ByteRange::between(GuestOffset(0).0, disk.image().size())
}
