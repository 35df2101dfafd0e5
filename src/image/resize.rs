//! `cowgate image resize`: a larger or smaller disk in the same image.
//!
//! Growing: the tables get room and everything that will be exposed is made to read as zeroes, durably; then one write
//! of the header's `size` field makes the disk larger. Shrinking: that field comes first, then what lies behind the new
//! end is given back. A crash in between leaves the old size, or storage behind the end that the same command run
//! again gives back; what it may still hold is never seen, because growing zeroes it.

use super::change::{self, failed};
use super::shared::{Layer, Storage};
use super::{Disk, Error, Format, Progress, bitmap_edit};
use crate::block::{BlockDev, Errno};
use crate::pagebuf::PageBuf;
use crate::qcow2::header::field;
use crate::qcow2::layout::MAX_L1_BYTES;
use crate::qcow2::{Ready, Source, ZeroMode};
use crate::units::{ByteRange, GuestOffset};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// QEMU knows whole sectors only.
const SECTOR: u64 = 512;
/// Largest disk in bytes: file offsets are signed.
const MAX_SIZE: u64 = i64::MAX as u64 / SECTOR * SECTOR;
/// Bytes of the disk zeroed or given back between two calls of the progress callback.
const STEP: u64 = 1 << 30;

/// The size wished for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many bytes more.
    More(u64),
    /// So many bytes less.
    Less(u64),
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Resized {
    /// The image.
    pub filename: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes, before.
    pub old_virtual_size: u64,
    /// Size of the disk in bytes, now.
    pub virtual_size: u64,
}

impl NewSize {
    /// The new size of a disk of `old` bytes.
    fn of(self, old: u64) -> Option<u64> {
        match self {
            NewSize::Exactly(size) => Some(size),
            NewSize::More(bytes) => old.checked_add(bytes),
            NewSize::Less(bytes) => old.checked_sub(bytes),
        }
    }
}

/// Resizes an image; `shrink` allows to lose what lies behind the new end.
pub fn resize(
    path: &Path,
    format: Format,
    size: NewSize,
    shrink: bool,
    progress: Progress<'_>,
) -> Result<Resized, Error> {
    change::run(path, async {
        let image = change::open_chain(path, format).await?;
        let old = image.size();
        let new = wanted(path, old, size, shrink)?;
        check(&image.layers()[0], old, new)?;
        let disk = change::begin(image)?;
        match format {
            Format::Raw => set_len(path, &disk.image().layers[0].storage, new)?,
            Format::Qcow2 => resize_open(&disk, new, progress).await?,
        }
        Ok(Resized { filename: path.to_owned(), format, old_virtual_size: old, virtual_size: new })
    })
}

fn wanted(path: &Path, old: u64, size: NewSize, shrink: bool) -> Result<u64, Error> {
    let refuse = |why: String| Error::Refused { path: path.to_owned(), why };
    let Some(new) = size.of(old).filter(|new| (1..=MAX_SIZE).contains(new)) else {
        return Err(refuse(format!("the new size must be from 1 to {MAX_SIZE} bytes; the disk has {old}")));
    };
    if new < old && !shrink {
        return Err(refuse(format!(
            "shrinking the disk from {old} to {new} bytes loses everything behind its new end; give --shrink if \
             nothing there is needed"
        )));
    }
    Ok(new)
}

/// Refuses what cannot be done before anything is changed.
fn check(layer: &Layer, old: u64, new: u64) -> Result<(), Error> {
    let refuse = |why: String| Err(Error::Refused { path: layer.path().to_owned(), why });
    if new != old {
        for storage in [layer.data_storage(), &layer.storage] {
            let Storage::File { device: Some(_), .. } = storage else { continue };
            let holds_the_disk = layer.parsed.is_none() || layer.data.is_some();
            if holds_the_disk && new > storage.len().map_err(Error::io(layer.path(), "find its size"))? {
                return refuse("the disk lies on a block device, which has no room for the new size".to_owned());
            }
            if layer.parsed.is_none() {
                return refuse("is a block device, whose size is not changed here".to_owned());
            }
        }
    }
    let (Some(parsed), Some(md)) = (&layer.parsed, layer.metadata()) else { return Ok(()) };
    if !new.is_multiple_of(SECTOR) {
        return refuse(format!("the new size must be a multiple of {SECTOR} bytes, not {new}"));
    }
    let max = (MAX_L1_BYTES / 8).saturating_mul(md.layout().l2_coverage()).min(MAX_SIZE);
    if new > max {
        return refuse(format!("at most {max} bytes are possible with its cluster size"));
    }
    if new != old && parsed.header.snapshots > 0 && md.layout().version < 3 {
        return refuse(
            "a version 2 image with internal snapshots cannot be resized; delete them with `qemu-img snapshot -d`, or \
             make it version 3 with `qemu-img amend -o compat=1.1`"
                .to_owned(),
        );
    }
    Ok(())
}

fn set_len(path: &Path, storage: &Storage, len: u64) -> Result<(), Error> {
    if let Storage::File { device: Some(_), .. } = storage {
        return Ok(());
    }
    storage.set_len(len).map_err(Error::io(path, "change its length"))
}

/// Resizes a QCOW2 image that is open for writing and that nobody else uses; the size is not judged.
pub async fn resize_open(disk: &Disk, new: u64, progress: Progress<'_>) -> Result<(), Error> {
    let old = disk.image().size();
    let bitmaps = match new != old {
        true => bitmap_edit::begin_resize(disk, new).await?,
        false => None,
    };
    if new > old {
        return match (grow(disk, new, progress).await, bitmaps) {
            (Ok(()), Some(bitmaps)) => bitmap_edit::end_resize(disk, bitmaps).await,
            // nothing is flushed: what was prepared behind the old end is no part of the image on disk, and a flush that
            // finds no space would leave its clusters counted
            (Err(e), Some(bitmaps)) => {
                bitmap_edit::give_up_resize(disk, bitmaps).await;
                Err(e)
            }
            (grown, None) => grown,
        };
    }
    let done = match (shorten(disk, new, progress).await, bitmaps) {
        (Ok(()), Some(bitmaps)) => bitmap_edit::end_resize(disk, bitmaps).await,
        (done, _) => done,
    };
    change::after(disk, done).await
}

async fn grow(disk: &Disk, new: u64, progress: Progress<'_>) -> Result<(), Error> {
    let path = disk.image().path();
    let old = disk.image().size();
    if let Some(data) = &disk.image().layers[0].data
        && data.storage.len().map_err(Error::io(&data.path, "find its size"))? < new
    {
        set_len(&data.path, &data.storage, new)?;
    }
    make_room(disk, new).await.map_err(failed(path, "make its tables larger"))?;
    // whatever was left behind the old end, and what the backing file has there
    in_steps(old, new, progress, |range| disk.zero_qcow2(range, ZeroMode::Unmap))
        .await
        .map_err(failed(path, "zero the new part of the disk"))?;
    change::settle(disk).await?;
    change::write_header(disk, field::SIZE, &new.to_be_bytes()).await
}

async fn shorten(disk: &Disk, new: u64, progress: Progress<'_>) -> Result<(), Error> {
    let path = disk.image().path();
    if new < disk.image().size() {
        // the disk ends with a flush: no write of before is to be found behind the new end
        change::settle(disk).await?;
        change::write_header(disk, field::SIZE, &new.to_be_bytes()).await?;
    }
    let (cluster, mapped) = {
        let md = disk.metadata();
        (md.layout().cluster(), md.mapped_end())
    };
    if mapped > new {
        make_room(disk, mapped).await.map_err(failed(path, "examine its tables"))?;
        let end = new.next_multiple_of(cluster).min(mapped);
        let given_back = async {
            zero_tail(disk, ByteRange::between(new, end)).await?;
            in_steps(end, mapped, progress, |range| disk.zero_metadata(range, ZeroMode::Expose)).await
        };
        given_back.await.map_err(failed(path, "give back what lies behind the new end"))?;
    }
    change::settle(disk).await?;
    if let Some(data) = &disk.image().layers[0].data
        && data.storage.len().map_err(Error::io(&data.path, "find its size"))? > new
    {
        set_len(&data.path, &data.storage, new)?;
    }
    Ok(())
}

/// Zeroes what the last cluster holds behind the end of the disk: not every program does that when the disk grows.
async fn zero_tail(disk: &Disk, tail: ByteRange) -> Result<(), Errno> {
    let mut rest = tail;
    while !rest.is_empty() {
        let mapped = disk.map(0, rest).await?;
        rest = rest.skip(mapped.range.len());
        if matches!(mapped.source, Source::Data(_) | Source::Compressed(_)) {
            let zeroes = PageBuf::zeroed(mapped.range.len() as usize);
            disk.write(GuestOffset(mapped.range.start().0), zeroes).await.0?;
        }
    }
    Ok(())
}

/// Tells the brain about a size, which makes the L1 table large enough for it.
async fn make_room(disk: &Disk, size: u64) -> Result<(), Errno> {
    loop {
        let image = disk.image();
        let happened = image.progress.notified();
        let mut happened = std::pin::pin!(happened);
        happened.as_mut().enable();
        let answer = disk.metadata().resize(size);
        match answer {
            Ok(Ready::Done(())) => return Ok(()),
            Ok(Ready::Load(table)) => disk.load(0, table).await?,
            Ok(Ready::Wait) => happened.await,
            Ok(Ready::Prepare) => disk.flush_image().await?,
            Err(fault) => return Err(disk.fault(0, fault)),
        }
    }
}

/// Carries out `step` for a range of the disk, part by part.
async fn in_steps<F: Future<Output = Result<(), Errno>>>(
    start: u64,
    end: u64,
    progress: Progress<'_>,
    step: impl Fn(ByteRange) -> F,
) -> Result<(), Errno> {
    let mut at = start;
    while at < end {
        progress(at - start, end - start);
        let next = at.saturating_add(STEP).min(end);
        step(ByteRange::between(at, next)).await?;
        at = next;
    }
    progress(end - start, end - start);
    Ok(())
}
