//! `cowgate image convert`: a disk copied into a new image of its own, whatever chain it comes from.
//!
//! The copy is written beside its place, made durable, and then moved there. Holes and zeroes are neither read nor
//! written; several chunks are on their way at a time, each read, looked at and written.

use super::compare::Runs;
use super::create::{Features, write};
use super::disk::Disk;
use super::open::{Gate, Opener};
use super::place::NewFile;
use super::shared::Storage;
use super::{Error, Format, Progress, reading};
use crate::block::{BlockDev, ZeroFlags};
use crate::pagebuf::{PageBuf, is_zero};
use crate::qcow2::create::lay_out;
use crate::ring;
use crate::units::{ByteRange, GuestOffset};
use futures_util::stream::{self, TryStreamExt};
use serde::Serialize;
use std::cell::Cell;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes copied by one read and its writes.
const CHUNK: u64 = 2 << 20;
/// Chunks on their way.
const IN_FLIGHT: usize = 8;
/// Zeroes of this many bytes in a row are not written to a raw file: a page, a file system's block.
const RAW_GRAIN: u64 = 4096;

/// What is to be copied, and how.
#[derive(Clone, Debug)]
pub struct ConvertOptions {
    /// The image to copy.
    pub source: PathBuf,
    /// Its format; `None`: see [`reading::open`].
    pub source_format: Option<Format>,
    /// The internal snapshot to copy instead of the active disk.
    pub snapshot: Option<String>,
    /// The new image, or a block device.
    pub dest: PathBuf,
    /// Its format.
    pub dest_format: Format,
    /// Properties of a QCOW2 destination.
    pub features: Features,
    /// Store clusters compressed.
    pub compress: bool,
    /// Replace what is at the destination.
    pub force: bool,
}

/// What was done.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Converted {
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Bytes of it that are not zero and were written.
    pub data_size: u64,
    /// Storage that the new image occupies, in bytes.
    pub actual_size: u64,
}

/// Copies the disk. `stop` set from elsewhere ends it with nothing left behind.
pub fn convert(options: &ConvertOptions, stop: &AtomicBool, progress: Progress<'_>) -> Result<Converted, Error> {
    let dest = &options.dest;
    let refuse = |why: &str| Error::Create { path: dest.clone(), why: why.to_owned() };
    if options.dest_format == Format::Raw && options.compress {
        return Err(refuse("a raw image holds no compressed clusters; take the format qcow2"));
    }
    let started = Error::io(dest, "start writing it");
    let work = async {
        let source = reading::open(&options.source, options.source_format, options.snapshot.as_deref()).await?;
        let existing = dest.metadata().ok();
        if existing.as_ref().is_some_and(|meta| is_part(meta, &source)) {
            return Err(refuse("is a file of the source; the copy needs another place"));
        }
        let device = existing.is_some_and(|meta| meta.file_type().is_block_device());
        let new = match device {
            true => None,
            false => Some(prepare(options, source.image().size())?),
        };
        if device {
            check_device(options, source.image().size())?;
        }
        let path = new.as_ref().map_or(dest.as_path(), NewFile::temporary);
        let target = Opener::new(path)?.open(options.dest_format, &Gate::new(Some(Vec::new()))).await?;
        let target = Arc::new(target);
        target.begin_writing()?;
        let disk = Disk::open(Arc::clone(&target), true)?;
        let copy = Copy { source, target: disk, options, device, stop, written: Cell::new(0) };
        copy.run(progress).await?;
        Ok((new, copy.source.image().size(), copy.written.get()))
    };
    // the target's locks end with its descriptors, before others see it
    let (new, virtual_size, data_size) = ring::run(work).map_err(started)?.map_err(Error::of_a_command)?;
    if let Some(new) = new {
        new.put_in_place()?;
    }
    let actual_size = dest.metadata().map_or(0, |meta| meta.blocks() * 512);
    Ok(Converted { virtual_size, data_size, actual_size })
}

/// A new, empty image beside its place.
fn prepare(options: &ConvertOptions, size: u64) -> Result<NewFile, Error> {
    let dest = &options.dest;
    let refuse = |why: String| Error::Create { path: dest.clone(), why };
    let pieces = match options.dest_format {
        Format::Raw => Vec::new(),
        Format::Qcow2 => options.features.image(size).and_then(|new| lay_out(&new)).map_err(refuse)?,
    };
    let new = NewFile::create(dest, options.force)?;
    write(new.file(), &pieces).map_err(Error::io(dest, "create it"))?;
    if options.dest_format == Format::Raw {
        new.file().set_len(size).map_err(Error::io(dest, "give it its size"))?;
    }
    Ok(new)
}

fn check_device(options: &ConvertOptions, size: u64) -> Result<(), Error> {
    let refuse = |why: String| Err(Error::Create { path: options.dest.clone(), why });
    if !options.force {
        return refuse("is a block device; give --force to overwrite it".to_owned());
    }
    if options.dest_format != Format::Raw {
        return refuse("is a block device; only the format raw is written to one".to_owned());
    }
    let room = Opener::new(&options.dest)?.len();
    match room < size {
        true => refuse(format!("has {room} bytes; the disk has {size}")),
        false => Ok(()),
    }
}

/// Whether a file is one that the source is read from.
fn is_part(file: &std::fs::Metadata, source: &Disk) -> bool {
    let layers = source.image().layers().iter();
    let mut storages =
        layers.flat_map(|l| std::iter::once(&l.storage).chain(l.data.as_ref().map(|data| &data.storage)));
    storages.any(|storage| match storage {
        Storage::Memory(_) => false,
        Storage::File { file: part, device: Some(_) } => part.metadata().is_ok_and(|m| m.rdev() == file.rdev()),
        Storage::File { file: part, .. } => {
            part.metadata().is_ok_and(|m| (m.dev(), m.ino()) == (file.dev(), file.ino()))
        }
    })
}

struct Copy<'a> {
    source: Rc<Disk>,
    target: Rc<Disk>,
    options: &'a ConvertOptions,
    /// The target is a block device: zeroes have to be made.
    device: bool,
    stop: &'a AtomicBool,
    /// Bytes of data written.
    written: Cell<u64>,
}

enum Step {
    Data(ByteRange),
    Zero(ByteRange),
}

impl Copy<'_> {
    async fn run(&self, progress: Progress<'_>) -> Result<(), Error> {
        let size = self.source.image().size();
        let done = Cell::new(0);
        let advance = |len: u64| {
            done.set(done.get() + len);
            progress(done.get(), size);
        };
        let walk = (Runs::new(&self.source), 0);
        let steps = stream::try_unfold(walk, |(mut runs, at)| async move {
            let step = self.next(&mut runs, at).await?;
            Ok::<_, Error>(step.map(|(step, end)| (step, (runs, end))))
        });
        let advance = &advance;
        let copied = steps.map_ok(|step| async move {
            let len = match step {
                Step::Zero(range) => {
                    self.zero(range).await?;
                    range.len()
                }
                Step::Data(range) => {
                    self.copy(range).await?;
                    range.len()
                }
            };
            advance(len);
            Ok(())
        });
        copied.try_buffer_unordered(IN_FLIGHT).try_collect::<()>().await?;
        let path: &Path = &self.options.dest;
        self.target.settle().await.map_err(|e| Error::io(path, "make it durable")(e.into()))?;
        progress(size, size);
        let image = self.target.image();
        image.writer_left();
        image.end_writing();
        Ok(())
    }

    /// Bytes that are written or left out together.
    fn grain(&self) -> u64 {
        match self.options.dest_format {
            Format::Raw => RAW_GRAIN,
            Format::Qcow2 => self.options.features.cluster_size,
        }
    }

    /// The step that begins at `at`, a multiple of the grain, and where it ends.
    async fn next(&self, runs: &mut Runs<'_>, at: u64) -> Result<Option<(Step, u64)>, Error> {
        let (size, grain) = (self.source.image().size(), self.grain());
        if at >= size {
            return Ok(None);
        }
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped { path: self.options.dest.clone() });
        }
        let (run, len) = runs.at(at).await?;
        run.map_or(Ok(()), |run| self.check_place(&run))?;
        if run.is_none_or(|run| run.zero) {
            let end = at.saturating_add(len).min(size);
            let end = if end == size { end } else { end / grain * grain };
            if end > at {
                return Ok(Some((Step::Zero(ByteRange::between(at, end)), end)));
            }
        }
        // a chunk of data, with short zeroes in between, up to zeroes that are worth a step of their own
        let limit = ((at / CHUNK + 1) * CHUNK).min(size);
        let mut end = at;
        while end < limit {
            let (run, len) = runs.at(end).await?;
            let Some(run) = run else { break };
            if run.zero && len >= 2 * grain {
                break;
            }
            self.check_place(&run)?;
            end = end.saturating_add(len);
        }
        let end = end.max(at + 1).next_multiple_of(grain).min(limit);
        Ok(Some((Step::Data(ByteRange::between(at, end)), end)))
    }

    /// Data behind the end of an image file would be read as zeroes: a truncated image must not become a good copy.
    fn check_place(&self, run: &super::map::MapExtent) -> Result<(), Error> {
        let layer = &self.source.image().layers()[run.depth];
        let (Some(offset), Some(metadata), None) = (run.offset, layer.metadata(), &layer.data) else { return Ok(()) };
        let len = layer.file_len().map_err(Error::io(&layer.path, "find its size"))?;
        // the last cluster may have been written in part
        if offset + run.length <= len.next_multiple_of(metadata.layout().cluster()) {
            return Ok(());
        }
        let why = format!("data at byte {offset} reaches behind the end of the file ({len} bytes); it is truncated");
        Err(Error::Broken { path: layer.path.clone(), why })
    }

    async fn zero(&self, range: ByteRange) -> Result<(), Error> {
        if !self.device {
            return Ok(()); // a new image is zeroes
        }
        let zeroed = self.target.write_zeroes(range, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await;
        zeroed.map_err(|e| self.write_failed(range.start().0, e))
    }

    async fn copy(&self, range: ByteRange) -> Result<(), Error> {
        let at = range.start().0;
        let (read, mut buf) = self.source.read(range.start(), PageBuf::new(range.len() as usize)).await;
        read.map_err(self.source.failed("read", at))?;
        if self.options.compress {
            self.written.set(self.written.get() + range.len());
            return self.target.write_compressed(range.start(), buf).await.0.map_err(|e| self.write_failed(at, e));
        }
        let grain = self.grain() as usize;
        let mut at = at;
        while !buf.is_empty() {
            // a run of grains of one kind
            let first = is_zero(&buf[..grain.min(buf.len())]);
            let count = buf.chunks(grain).take_while(|part| is_zero(part) == first).count();
            let part = buf.split_to((count * grain).min(buf.len()));
            let len = part.len() as u64;
            if first {
                self.zero(ByteRange::between(at, at + len)).await?;
            } else {
                self.written.set(self.written.get() + len);
                let (written, _) = self.target.write(GuestOffset(at), part).await;
                written.map_err(|e| self.write_failed(at, e))?;
            }
            at += len;
        }
        Ok(())
    }

    fn write_failed(&self, at: u64, e: crate::block::Errno) -> Error {
        Error::Transfer { path: self.options.dest.clone(), action: "write", at, source: e.into() }
    }
}
