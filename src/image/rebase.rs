//! `cowgate image rebase`: another backing file, or none, below an image whose content stays.
//!
//! Wherever the old and the new backing file differ and the image has nothing of its own, it takes in what the old one
//! has. While that goes on its content does not change; it is durable before the header names the new backing file,
//! in one write. What an interrupted run took in is not looked at again by the next.

use super::change::{self, BATCH, failed};
use super::commit::refuse_snapshots;
use super::open::{Opener, backing, relative};
use super::{Disk, Error, FileId, Format, Image, Layer, Progress};
use crate::block::{BlockDev, Errno, Extent, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::qcow2::header::{MAX_BACKING_NAME, autoclear};
use crate::qcow2::{HeaderArea, Source};
use crate::units::{ByteRange, GuestOffset};
use serde::Serialize;
use std::cell::Cell;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// Extents asked for at once.
const EXTENTS: usize = 256;

/// A backing file as it is to be stored: a relative name is relative to the image's directory.
#[derive(Clone, Debug)]
pub struct NewBacking {
    /// Its name.
    pub name: PathBuf,
    /// Its format.
    pub format: Format,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Rebased {
    /// The image.
    pub filename: PathBuf,
    /// The backing file's name as stored now.
    pub backing_filename: Option<PathBuf>,
    /// Its format as stored now.
    pub backing_filename_format: Option<Format>,
    /// Bytes of data that the image took in.
    pub data: u64,
    /// Bytes of zeroes that the image took in.
    pub zeroes: u64,
}

impl Rebased {
    fn new(path: &Path, new: Option<&NewBacking>, (data, zeroes): (u64, u64)) -> Rebased {
        Rebased {
            filename: path.to_owned(),
            backing_filename: new.map(|n| n.name.clone()),
            backing_filename_format: new.map(|n| n.format),
            data,
            zeroes,
        }
    }
}

/// Puts the image on another backing file (`None`: on nothing) and keeps its content.
pub fn rebase(path: &Path, new: Option<NewBacking>, progress: Progress<'_>) -> Result<Rebased, Error> {
    change::run(path, async {
        let image = change::open_chain(path, Format::Qcow2).await?;
        check(&image.layers()[0], new.as_ref())?;
        refuse_snapshots(&image.layers()[0], "this")?;
        let below = match &new {
            Some(new) => Some(open_new(&image, new).await?),
            None => None,
        };
        let disk = change::begin(image)?;
        // room in the header is found, or not, before anything is changed
        change::changed_header(&disk, &|area| set_backing(area, new.as_ref())).await?;
        let work = async {
            let taken = take_in(&disk, below.as_deref(), progress).await?;
            change::rewrite_header(&disk, &|area| set_backing(area, new.as_ref())).await?;
            Ok(taken)
        };
        let taken = change::after(&disk, work.await).await?;
        Ok(Rebased::new(path, new.as_ref(), taken))
    })
}

/// Changes the name of the backing file and nothing else: for one that was moved, or converted to another format. What
/// the image reads from below is then whatever the new one holds.
pub fn rename_backing(path: &Path, new: Option<NewBacking>) -> Result<Rebased, Error> {
    change::run(path, async {
        let image = Opener::new(path)?.open_alone(Format::Qcow2, &change::open_gate(), 0).await?;
        check(&image.layers()[0], new.as_ref())?;
        if let Some(new) = &new {
            refuse_loop(path, image.id(), new).await?;
        }
        let disk = change::begin(image)?;
        change::rewrite_header(&disk, &|area| set_backing(area, new.as_ref())).await?;
        Ok(Rebased::new(path, new.as_ref(), (0, 0)))
    })
}

/// Refuses what the format does not allow.
fn check(layer: &Layer, new: Option<&NewBacking>) -> Result<(), Error> {
    let refuse = |why: String| Err(Error::Refused { path: layer.path().to_owned(), why });
    let Some(new) = new else { return Ok(()) };
    let name = new.name.as_os_str().as_bytes();
    if name.len() > MAX_BACKING_NAME as usize {
        let len = name.len();
        return refuse(format!("the backing file's name has {len} bytes; at most {MAX_BACKING_NAME} can be stored"));
    }
    if let Err(why) = relative(layer.path(), name) {
        return refuse(format!("backing file {:?}: {why}", new.name));
    }
    if layer.parsed.as_ref().is_some_and(|p| p.header.raw_data_file()) {
        return refuse("its external data file is a raw image of the whole disk; it cannot have a backing file".into());
    }
    Ok(())
}

fn set_backing(area: &mut HeaderArea, new: Option<&NewBacking>) {
    area.set_backing(new.map(|new| (new.name.as_os_str().as_bytes().to_vec(), new.format.to_string())));
    // what we do not know may not be true any more
    let kept = area.autoclear() & (autoclear::BITMAPS | autoclear::RAW_DATA_FILE);
    if kept != area.autoclear() {
        area.set_autoclear(kept);
    }
}

/// Opens the new backing file with its chain, for reading.
async fn open_new(image: &Image, new: &NewBacking) -> Result<Rc<Disk>, Error> {
    let refuse = |why: String| Error::Refused { path: image.path().to_owned(), why };
    let name = relative(image.path(), new.name.as_os_str().as_bytes()).map_err(refuse)?;
    let below = change::open_chain(&name, new.format).await?;
    for layer in below.layers() {
        if layer.storage.id().map_err(Error::io(layer.path(), "examine it"))? == Some(image.id()) {
            return Err(refuse(loops(new)));
        }
    }
    Disk::open(Arc::new(below), false)
}

fn loops(new: &NewBacking) -> String {
    format!("backing file {:?} is this image, or reads from it: the chain would refer to itself", new.name)
}

/// Refuses a chain that would refer to itself. Whatever else is wrong with it is not looked at: it may not be there yet.
async fn refuse_loop(path: &Path, image: FileId, new: &NewBacking) -> Result<(), Error> {
    let mut seen = vec![image];
    let mut next = relative(path, new.name.as_os_str().as_bytes()).ok().map(|name| (name, new.format));
    while let Some((name, format)) = next.take() {
        let Ok(opener) = Opener::new(&name) else { break };
        if seen.contains(&opener.id()) {
            return Err(Error::Refused { path: path.to_owned(), why: loops(new) });
        }
        seen.push(opener.id());
        if format == Format::Qcow2
            && let Ok(parsed) = opener.parse().await
        {
            next = backing(&name, &parsed.header).ok().flatten();
        }
    }
    Ok(())
}

/// Takes in what differs between what lies below the image and `new`. Returns bytes of data and of zeroes.
async fn take_in(disk: &Disk, new: Option<&Disk>, progress: Progress<'_>) -> Result<(u64, u64), Error> {
    let path = disk.image().path();
    let size = disk.image().size();
    let unit = {
        let mut md = disk.metadata();
        if new.is_some() {
            // zeroes are to stay zeroes whatever the new one holds there
            md.expect_any_backing();
        }
        md.layout().unit()
    };
    let same = new.and_then(|new| same_from(disk, new));
    let taken = Taken::default();
    let move_one = |range: ByteRange, _| take_range(disk, new, range, unit, &taken);
    let mut pieces = Vec::new();
    let mut rest = ByteRange::between(0, size);
    while !rest.is_empty() {
        let mapped = disk.map(0, rest).await.map_err(failed(path, "read its tables"))?;
        let mut run = mapped.range;
        if mapped.source == Source::Unallocated {
            let (len, differs) = may_differ(disk, new, same, run).await.map_err(failed(path, "read its chain"))?;
            run = run.prefix(len);
            if differs {
                // whole units, so that none is taken in by two pieces at the same time
                let (start, end) = (run.start().0 / unit * unit, run.end().0.next_multiple_of(unit));
                let whole = ByteRange::between(start.max(mapped.range.start().0), end.min(mapped.range.end().0));
                run = ByteRange::between(run.start().0, whole.end().0);
                change::push_pieces(&mut pieces, whole, false);
            }
        }
        rest = rest.skip(run.len());
        if pieces.len() > BATCH || rest.is_empty() {
            change::move_all(&mut pieces, move_one).await?;
            progress(size - rest.len(), size);
        }
    }
    Ok((taken.data.get(), taken.zeroes.get()))
}

#[derive(Default)]
struct Taken {
    data: Cell<u64>,
    zeroes: Cell<u64>,
}

/// The layer of the old chain that the new one begins with: from there down nothing can differ.
fn same_from(disk: &Disk, new: &Disk) -> Option<usize> {
    let new = &new.image().layers()[0];
    let id = new.storage.id().ok()??;
    let same = |layer: &Layer| layer.format() == new.format() && matches!(layer.storage.id(), Ok(Some(i)) if i == id);
    disk.image().layers().iter().position(|layer| same(layer)).filter(|&index| index > 0)
}

/// How many bytes from the start of a run that the image does not hold are alike: whether the old and the new backing
/// file may differ there, without a look at their data.
async fn may_differ(
    disk: &Disk,
    new: Option<&Disk>,
    same: Option<usize>,
    run: ByteRange,
) -> Result<(u64, bool), Errno> {
    if let Some(same) = same {
        return between(disk, same, run).await;
    }
    let (mut len, zero) = extent(Some(disk), run).await?;
    if !zero && new.is_none() {
        return Ok((len, true));
    }
    let (new_len, new_zero) = extent(new, run).await?;
    len = len.min(new_len);
    Ok((len, !(zero && new_zero)))
}

/// Whether a layer between the image and the layer `same` provides the first bytes of the run.
async fn between(disk: &Disk, same: usize, run: ByteRange) -> Result<(u64, bool), Errno> {
    let mut run = run;
    for index in 1..same {
        let layer = &disk.image().layers()[index];
        let inside = run.clip(layer.size);
        if inside.is_empty() || layer.format() == Format::Raw {
            return Ok((run.len(), true)); // zeroes behind its end, or its data
        }
        let mapped = disk.map(index, inside).await?;
        run = mapped.range;
        if mapped.source != Source::Unallocated {
            return Ok((run.len(), true));
        }
    }
    Ok((run.len(), false))
}

/// The first extent of a run: its length and whether it reads as zeroes. No disk, or its end, is zeroes.
async fn extent(disk: Option<&Disk>, run: ByteRange) -> Result<(u64, bool), Errno> {
    let Some(disk) = disk else { return Ok((run.len(), true)) };
    let inside = run.clip(disk.image().size());
    if inside.is_empty() {
        return Ok((run.len(), true));
    }
    let found = disk.extents(inside, EXTENTS).await?;
    let zero = found[0].zero;
    let len = found.iter().take_while(|e: &&Extent| e.zero == zero).map(|e| e.len).sum();
    Ok((len, zero))
}

/// Takes in those units of a range in which the old and the new backing file differ.
async fn take_range(disk: &Disk, new: Option<&Disk>, range: ByteRange, unit: u64, taken: &Taken) -> Result<(), Error> {
    let path = disk.image().path();
    let (read, old) = disk.read(range.start(), PageBuf::new(range.len() as usize)).await;
    read.map_err(failed(path, "read its chain"))?;
    let mut other = PageBuf::zeroed(range.len() as usize);
    if let Some(new) = new {
        let inside = range.clip(new.image().size());
        if !inside.is_empty() {
            let part = other.split_to(inside.len() as usize);
            let (read, mut part) = new.read(inside.start(), part).await;
            read.map_err(failed(new.image().path(), "read its chain"))?;
            part.unsplit(other);
            other = part;
        }
    }
    for (from, to, zero) in differing(&old, &other, (unit - range.start().0 % unit) as usize, unit as usize) {
        let part = ByteRange::between(range.start().0 + from as u64, range.start().0 + to as u64);
        let (result, count) = match zero {
            true => {
                (disk.write_zeroes(part, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await, &taken.zeroes)
            }
            false => (disk.write(GuestOffset(part.start().0), PageBuf::copy_of(&old[from..to])).await.0, &taken.data),
        };
        result.map_err(failed(path, "write to it"))?;
        count.set(count.get() + part.len());
    }
    Ok(())
}

/// Runs of units that differ: from, to, and whether the old content is zeroes. The first unit has `first` bytes.
fn differing(old: &[u8], new: &[u8], first: usize, unit: usize) -> Vec<(usize, usize, bool)> {
    let mut runs: Vec<(usize, usize, bool)> = Vec::new();
    let (mut from, mut to) = (0, first.min(old.len()));
    while from < old.len() {
        if old[from..to] != new[from..to] {
            let zero = old[from..to].iter().all(|&b| b == 0);
            match runs.last_mut() {
                Some(last) if last.1 == from && last.2 == zero => last.1 = to,
                _ => runs.push((from, to, zero)),
            }
        }
        (from, to) = (to, (to + unit).min(old.len()));
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_that_differ() {
        let (old, new) = ([1, 1, 0, 0, 0, 0, 5, 5, 6], [1, 1, 0, 7, 7, 7, 5, 6, 5]);
        assert_eq!(differing(&old, &new, 2, 2), [(2, 6, true), (6, 9, false)]);
        assert_eq!(differing(&old, &new, 1, 4), [(1, 9, false)], "the first unit may begin before the range");
        assert_eq!(differing(&old, &old, 2, 2), []);
    }
}
