//! `cowgate image bitmap`: bitmaps are added, removed and changed in an image that nobody serves.
//!
//! Everything new is written beside what is there: bits, tables and the directory get new clusters, which are counted
//! and durable before the header refers to the new directory. What the old one held is given back last. A crash leaves
//! the old bitmaps or the new ones, and leaked clusters at worst; only where the header's change does not fit one sector
//! can it also leave the bitmaps marked as outdated.

use super::disk::Disk;
use super::open::{Gate, Opener};
use super::{Error, Format, Image, bitmaps};
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::qcow2::bitmap::{self, Bitmap, Ranges, TableEntry, flag};
use crate::qcow2::header::{BitmapsExtension, Header, autoclear, extension, field};
use crate::qcow2::header_area::HeaderArea;
use crate::ring;
use crate::units::{ByteRange, HostOffset};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// Bytes that a disk writes as a whole or not at all.
const SECTOR: usize = 512;
/// Bits of a source looked at together.
const WINDOW_BITS: u64 = 32_768;

/// A bitmap as `qemu-img info --output=json` describes it.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// `in-use` (not saved, must not be used) and `auto` (enabled).
    pub flags: Vec<&'static str>,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
}

/// A change of one bitmap.
#[derive(Clone, Debug)]
pub enum Edit {
    /// Make it, with no bit set.
    Add {
        /// Bytes of the disk that one bit stands for; `None`: the cluster size within 4 KiB and 64 KiB.
        granularity: Option<u64>,
        /// It does not note changes.
        disabled: bool,
    },
    /// Remove it, whatever its state.
    Remove,
    /// Unset all its bits.
    Clear,
    /// From now on it notes changes.
    Enable,
    /// From now on it notes no changes.
    Disable,
    /// Set the bits that are set in another bitmap.
    Merge {
        /// Name of the other one.
        source: String,
        /// The image that holds it; `None`: the same.
        image: Option<PathBuf>,
    },
}

impl From<&Bitmap> for BitmapInfo {
    fn from(bitmap: &Bitmap) -> Self {
        let flags = [(flag::IN_USE, "in-use"), (flag::AUTO, "auto")];
        BitmapInfo {
            name: bitmap.display_name(),
            flags: flags.into_iter().filter(|&(flag, _)| bitmap.has(flag)).map(|(_, name)| name).collect(),
            granularity: bitmap.granularity(),
        }
    }
}

fn refuse(path: &Path, why: impl Into<String>) -> Error {
    Error::Bitmaps { path: path.to_owned(), why: why.into() }
}

/// The bitmaps of an image. Nothing is locked, and nothing that the image names is opened.
pub fn list(path: &Path) -> Result<Vec<BitmapInfo>, Error> {
    let opener = Opener::new(path)?;
    let listed = async { Ok(listed(&opener, &opener.parse().await?.header).await) };
    ring::run(listed).map_err(Error::io(path, "start reading it"))??.map_err(|why| refuse(path, why))
}

/// The bitmaps of an image, or why its directory is none.
pub(super) async fn listed(opener: &Opener, header: &Header) -> Result<Vec<BitmapInfo>, String> {
    let file = opener.ring_file().map_err(|e| e.to_string())?;
    match bitmaps::read_directory(&file, header, opener.len()).await {
        Ok(list) => Ok(list.iter().flatten().map(BitmapInfo::from).collect()),
        Err(why) => Err(format!("bitmap directory: {why}; the next write marks it as outdated")),
    }
}

/// Changes a bitmap of an image: all of it or nothing.
pub fn edit(path: &Path, name: &str, edit: &Edit) -> Result<(), Error> {
    ring::run(async {
        let (image, disk) = open(path, true).await?;
        let source = match edit {
            Edit::Merge { image: Some(other), .. } if Opener::new(other)?.id() != image.id() => {
                Some(open(other, false).await?.1)
            }
            _ => None,
        };
        image.begin_writing()?;
        let done = edit_open(&disk, name, edit, source.as_deref()).await;
        image.writer_left();
        image.end_writing();
        done
    })
    .map_err(Error::io(path, "start changing it"))?
    .map_err(Error::of_a_command)
}

/// Changes a bitmap of an image that is open for writing, by nobody else and for nothing else: it is to be closed then.
/// `source` is the image that [`Edit::Merge`] names, if it is another one.
pub async fn edit_open(disk: &Disk, name: &str, edit: &Edit, source: Option<&Disk>) -> Result<(), Error> {
    let mut work = Work::new(disk);
    let done = work.carry_out(name.as_bytes(), edit, source).await;
    work.end(done).await
}

/// The bitmaps of a disk whose size is changing: marked as in use, whatever happens, until they fit.
pub(super) struct Resizing {
    directory: HostOffset,
    list: Vec<Bitmap>,
    old_size: u64,
    new_size: u64,
}

/// Before an image's disk gets another size: from now on a crash leaves bitmaps that say that they cannot be used.
/// Refuses a size that they cannot have. `None`: there are none.
pub(super) async fn begin_resize(disk: &Disk, new_size: u64) -> Result<Option<Resizing>, Error> {
    let (path, old_size, layout) = (disk.image().path(), disk.image().size(), disk.metadata().layout());
    let Some(bitmaps) = &disk.image().layers[0].bitmaps else { return Ok(None) };
    let mut all = 0;
    for bitmap in &bitmaps.stored.lock().await.list {
        let entries = bitmap::table_entries(new_size, bitmap.granularity_bits, layout);
        all += entries;
        if entries > bitmap::MAX_DATA_BYTES / layout.cluster() || all > bitmap::MAX_TABLE_ENTRIES {
            let name = bitmap.display_name();
            return Err(refuse(path, format!("bitmap {name:?} would take too much space; remove it first")));
        }
    }
    let retired = disk.retire_bitmaps().await.map_err(io(path))?;
    Ok(retired.map(|(directory, list)| Resizing { directory, list, old_size, new_size }))
}

/// After the disk got its size: gives the bitmaps tables that fit, and makes them good again.
pub(super) async fn end_resize(disk: &Disk, resizing: Resizing) -> Result<(), Error> {
    let mut work = Work::new(disk);
    let done = work.fit_all(resizing).await;
    work.end(done).await
}

/// The disk keeps its size: the bitmaps are as good as they were. As far as that can be said in the image.
pub(super) async fn give_up_resize(disk: &Disk, resizing: Resizing) {
    // on a failure they stay marked as in use, which is safe
    let _ = disk.write_directory(resizing.directory, &resizing.list).await;
}

async fn open(path: &Path, writable: bool) -> Result<(Arc<Image>, Rc<Disk>), Error> {
    // who runs the command may read whatever it names
    let gate = Gate::new(Some(vec![PathBuf::from("/")]));
    let image = Arc::new(Opener::new(path)?.open(Format::Qcow2, &gate).await?);
    let disk = Disk::open(Arc::clone(&image), writable)?;
    Ok((image, disk))
}

fn io(path: &Path) -> impl Fn(Errno) -> Error {
    let path = path.to_owned();
    move |e| Error::io(&path, "change its bitmaps")(e.into())
}

/// A bitmap of another image, of a disk of the same size.
async fn source_in<'a>(disk: &'a Disk, name: &str, size: u64) -> Result<Source<'a>, Error> {
    let path = disk.image().path();
    let missing = || refuse(path, format!("there is no bitmap {name:?}"));
    let stored = disk.image().layers[0].bitmaps.as_ref().ok_or_else(missing)?.stored.lock().await;
    let index = stored.find(name.as_bytes()).ok_or_else(missing)?;
    let (own, layout) = (disk.image().size(), disk.metadata().layout());
    let unusable = |why: &str| refuse(path, format!("bitmap {name:?} cannot be used: {why}"));
    stored.good(index, own, layout).map_err(unusable)?;
    if own != size {
        return Err(unusable(&format!("its disk has {own} bytes, the other one {size}: both must have the same size")));
    }
    Ok(Source { disk, bitmap: stored.list[index].clone() })
}

/// A change under way.
struct Work<'a> {
    disk: &'a Disk,
    path: &'a Path,
    /// Clusters made for it (start, bytes).
    fresh: Vec<(HostOffset, u64)>,
    /// Clusters that nothing refers to when it is done.
    old: Vec<(HostOffset, u64)>,
}

/// Where bits come from.
struct Source<'a> {
    disk: &'a Disk,
    bitmap: Bitmap,
}

impl<'a> Work<'a> {
    fn new(disk: &'a Disk) -> Self {
        Work { disk, path: disk.image().path(), fresh: Vec::new(), old: Vec::new() }
    }

    /// Gives back what is not needed.
    async fn end(mut self, done: Result<(), Error>) -> Result<(), Error> {
        if done.is_err() {
            self.old = std::mem::take(&mut self.fresh); // nothing refers to what was made
        }
        {
            let mut md = self.disk.metadata();
            self.old.iter().for_each(|&(at, len)| md.free_structure(at, len));
        }
        done.and(self.disk.settle().await.map_err(io(self.path)))
    }

    fn refuse(&self, why: impl Into<String>) -> Error {
        refuse(self.path, why)
    }

    async fn carry_out(&mut self, name: &[u8], edit: &Edit, source: Option<&Disk>) -> Result<(), Error> {
        let layer = &self.disk.image().layers[0];
        let header = &layer.parsed.as_ref().expect("a QCOW2 layer").header;
        if header.layout.version < 3 {
            return Err(self.refuse(
                "is a version 2 image, which cannot have bitmaps; upgrade it with `qemu-img amend -o compat=1.1`",
            ));
        }
        let (mut list, directory) = match &layer.bitmaps {
            Some(bitmaps) => {
                let stored = bitmaps.stored.lock().await;
                (stored.list.clone(), Some((stored.directory, bitmap::build(&stored.list).len() as u64)))
            }
            None if header.autoclear & autoclear::BITMAPS != 0 => {
                return Err(self.refuse(
                    "its bitmap directory is broken; the first write marks it as outdated, then new bitmaps can be made",
                ));
            }
            None => (Vec::new(), None),
        };
        let place = list.iter().position(|b| b.name == name);
        let known = place.ok_or_else(|| self.refuse(format!("there is no bitmap {:?}", String::from_utf8_lossy(name))));
        match edit {
            Edit::Add { granularity, disabled } => {
                if place.is_some() {
                    return Err(self.refuse(format!("there is a bitmap {:?} already", String::from_utf8_lossy(name))));
                }
                let added = self.add(name, *granularity, *disabled, &list).await?;
                list.push(added);
            }
            Edit::Remove => {
                let gone = list.remove(known?);
                self.discard(&gone).await?;
            }
            Edit::Clear => {
                let bitmap = self.usable(&mut list, known?)?;
                self.discard(bitmap).await?;
                let table = vec![TableEntry::Zeros; bitmap.table_entries as usize];
                bitmap.table = self.write_new(&bitmap::build_table(&table), "bitmap table").await?;
            }
            Edit::Enable => self.usable(&mut list, known?)?.flags |= flag::AUTO,
            Edit::Disable => self.usable(&mut list, known?)?.flags &= !flag::AUTO,
            Edit::Merge { source: from, .. } => {
                let target = known?;
                let source = match source {
                    Some(disk) => source_in(disk, from, self.disk.image().size()).await?,
                    None => {
                        let Some(index) = list.iter().position(|b| b.name == from.as_bytes()) else {
                            return Err(self.refuse(format!("there is no bitmap {from:?}")));
                        };
                        let bitmap = self.usable(&mut list, index)?.clone();
                        Source { disk: self.disk, bitmap }
                    }
                };
                let bitmap = self.usable(&mut list, target)?;
                self.merge(bitmap, &source).await?;
            }
        }
        self.publish(&list, directory).await
    }

    fn usable<'b>(&self, list: &'b mut [Bitmap], index: usize) -> Result<&'b mut Bitmap, Error> {
        let (size, layout) = (self.disk.image().size(), self.disk.metadata().layout());
        match list[index].unusable(size, layout) {
            None => Ok(&mut list[index]),
            Some(why) => {
                let name = list[index].display_name();
                Err(self.refuse(format!(
                    "bitmap {name:?} cannot be used: {why}; remove it with `cowgate image bitmap remove`"
                )))
            }
        }
    }

    async fn add(
        &mut self,
        name: &[u8],
        granularity: Option<u64>,
        disabled: bool,
        list: &[Bitmap],
    ) -> Result<Bitmap, Error> {
        let (size, layout) = (self.disk.image().size(), self.disk.metadata().layout());
        bitmap::check_name(name).map_err(|why| self.refuse(why))?;
        let granularity_bits = match granularity {
            None => bitmap::default_granularity_bits(layout),
            Some(bytes) => {
                let bits = bytes.trailing_zeros();
                if !bytes.is_power_of_two()
                    || !(bitmap::MIN_GRANULARITY_BITS..=bitmap::MAX_GRANULARITY_BITS).contains(&bits)
                {
                    return Err(self.refuse(format!("granularity {bytes}: a power of two from 512 to 2G is needed")));
                }
                bits
            }
        };
        if size == 0 {
            return Err(self.refuse("a disk of 0 bytes can have no bitmap"));
        }
        let entries = bitmap::table_entries(size, granularity_bits, layout);
        let all = entries + list.iter().map(|b| u64::from(b.table_entries)).sum::<u64>();
        if entries > bitmap::MAX_DATA_BYTES / layout.cluster() || all > bitmap::MAX_TABLE_ENTRIES {
            return Err(self.refuse("the bitmap would take too much space; choose a larger granularity"));
        }
        if list.len() >= bitmap::MAX_BITMAPS as usize {
            return Err(self.refuse(format!("it has {} bitmaps, the most there can be; remove one first", list.len())));
        }
        let table = vec![TableEntry::Zeros; entries as usize];
        Ok(Bitmap {
            table: self.write_new(&bitmap::build_table(&table), "bitmap table").await?,
            table_entries: entries as u32,
            flags: if disabled { 0 } else { flag::AUTO },
            granularity_bits,
            extra: Vec::new(),
            name: name.to_vec(),
        })
    }

    /// Gives a bitmap's clusters back when the change is done.
    async fn discard(&mut self, bitmap: &Bitmap) -> Result<(), Error> {
        let cluster = self.disk.metadata().layout().cluster();
        let table = self.disk.read_table(bitmap).await.map_err(io(self.path))?;
        self.old.push((bitmap.table, u64::from(bitmap.table_entries) * 8));
        self.old.extend(table.iter().filter_map(|entry| match entry {
            TableEntry::Data(at) => Some((*at, cluster)),
            _ => None,
        }));
        Ok(())
    }

    /// Writes bytes to new clusters.
    async fn write_new(&mut self, bytes: &[u8], name: &'static str) -> Result<HostOffset, Error> {
        let layout = self.disk.metadata().layout();
        let clusters = layout.clusters_for(bytes.len() as u64);
        let at = self.disk.new_clusters(clusters, name).await.map_err(io(self.path))?;
        self.fresh.push((at, clusters * layout.cluster()));
        self.disk.write_pieces(&[(at, bytes.to_vec())]).await.map_err(io(self.path))?;
        Ok(at)
    }

    async fn fit_all(&mut self, resizing: Resizing) -> Result<(), Error> {
        let Resizing { directory, mut list, old_size, new_size } = resizing;
        let layout = self.disk.metadata().layout();
        let bytes = bitmap::build(&list).len() as u64;
        for bitmap in &mut list {
            match bitmap.unusable(old_size, layout) {
                None => self.fit(bitmap, old_size, new_size).await?,
                Some(_) => bitmap.flags |= flag::IN_USE,
            }
        }
        self.publish(&list, Some((directory, bytes))).await
    }

    /// Gives a bitmap a table for a disk of another size, with its bits as far as both go.
    async fn fit(&mut self, bitmap: &mut Bitmap, old_size: u64, new_size: u64) -> Result<(), Error> {
        let layout = self.disk.metadata().layout();
        let granularity = bitmap.granularity_bits;
        let mut table = self.disk.read_table(bitmap).await.map_err(io(self.path))?;
        self.old.push((bitmap.table, table.len() as u64 * 8));
        let entries = bitmap::table_entries(new_size, granularity, layout) as usize;
        for entry in table.drain(entries.min(table.len())..) {
            if let TableEntry::Data(at) = entry {
                self.old.push((at, layout.cluster()));
            }
        }
        table.resize(entries, TableEntry::Zeros);
        // the bits behind the last one that is kept are zero from now on, whatever they were
        let kept = bitmap::bits(old_size.min(new_size), granularity);
        let (last, inside) = ((kept / (layout.cluster() * 8)) as usize, (kept % (layout.cluster() * 8)) as usize);
        if inside > 0 && table[last] != TableEntry::Zeros {
            let mut bytes = vec![0; layout.cluster() as usize];
            match table[last] {
                TableEntry::Data(at) => {
                    let old = self.disk.read_exactly(at, layout.cluster()).await.map_err(io(self.path))?;
                    bytes[..inside / 8].copy_from_slice(&old[..inside / 8]);
                    if !inside.is_multiple_of(8) {
                        bytes[inside / 8] = old[inside / 8] & ((1 << (inside % 8)) - 1);
                    }
                    self.old.push((at, layout.cluster()));
                }
                _ => bitmap::set_bits(&mut bytes, 0, inside),
            }
            table[last] = TableEntry::Data(self.write_new(&bytes, "bitmap data").await?);
        }
        bitmap.table = self.write_new(&bitmap::build_table(&table), "bitmap table").await?;
        bitmap.table_entries = entries as u32;
        Ok(())
    }

    /// Gives `target` new clusters that hold its bits and the source's.
    async fn merge(&mut self, target: &mut Bitmap, source: &Source<'_>) -> Result<(), Error> {
        let (size, layout) = (self.disk.image().size(), self.disk.metadata().layout());
        let per_cluster = layout.cluster() * 8;
        let granularity = target.granularity_bits;
        let old = self.disk.read_table(target).await.map_err(io(self.path))?;
        self.discard(target).await?;
        let total = bitmap::bits(size, granularity);
        let window = WINDOW_BITS << granularity.min(source.bitmap.granularity_bits);
        let mut new = vec![TableEntry::Zeros; old.len()];
        for (i, entry) in old.into_iter().enumerate() {
            let first = i as u64 * per_cluster;
            let last = (first + per_cluster).min(total);
            let mut bytes = match entry {
                TableEntry::Data(at) => {
                    self.disk.read_exactly(at, layout.cluster()).await.map_err(io(self.path))?.to_vec()
                }
                _ => vec![0; layout.cluster() as usize],
            };
            if entry == TableEntry::Ones {
                bitmap::set_bits(&mut bytes, 0, (last - first) as usize);
            }
            let (mut at, end) = (first << granularity, (last << granularity).min(size));
            while at < end {
                let part = ByteRange::between(at, (at + window).min(end));
                let runs =
                    source.disk.runs_of(&source.bitmap, &Ranges::default(), part, usize::MAX - 1, usize::MAX).await;
                for (len, set) in runs.map_err(io(source.disk.image().path()))? {
                    if set {
                        let (from, to) = (at >> granularity, ((at + len - 1) >> granularity) + 1);
                        bitmap::set_bits(&mut bytes, (from - first) as usize, (to - first) as usize);
                    }
                    at += len;
                }
            }
            new[i] = match () {
                () if bytes.iter().all(|&b| b == 0) => TableEntry::Zeros,
                () if bytes.iter().all(|&b| b == 0xff) => TableEntry::Ones,
                () => TableEntry::Data(self.write_new(&bytes, "bitmap data").await?),
            };
        }
        target.table = self.write_new(&bitmap::build_table(&new), "bitmap table").await?;
        Ok(())
    }

    /// Makes a list the image's directory.
    async fn publish(&mut self, list: &[Bitmap], old: Option<(HostOffset, u64)>) -> Result<(), Error> {
        let new = match list.is_empty() {
            true => None,
            false => {
                let bytes = bitmap::build(list);
                let directory_bytes = bytes.len() as u64;
                if directory_bytes > bitmap::MAX_DIRECTORY_BYTES {
                    return Err(self.refuse("the bitmap directory would be larger than 64 MiB"));
                }
                let directory_offset = self.write_new(&bytes, "bitmap directory").await?;
                Some(BitmapsExtension { count: list.len() as u32, directory_bytes, directory_offset })
            }
        };
        // refcounts and all that was written are durable before the header refers to them
        self.disk.flush_image().await.map_err(io(self.path))?;
        self.fresh.clear(); // whatever happens now, the header may refer to them
        self.switch(new).await?;
        self.old.extend(old);
        Ok(())
    }

    /// Makes the header refer to a directory, or to none.
    async fn switch(&self, new: Option<BitmapsExtension>) -> Result<(), Error> {
        let failed = io(self.path);
        let cluster = self.disk.metadata().layout().cluster();
        let before = self.disk.read_exactly(HostOffset(0), cluster).await.map_err(&failed)?;
        let header = |source| Error::Header { path: self.path.to_owned(), source };
        let mut area = HeaderArea::parse(&before).map_err(header)?;
        area.set_extension(extension::BITMAPS, new.as_ref().map(bitmap::extension_bytes));
        let others = area.autoclear() & !autoclear::BITMAPS;
        let promise = if new.is_some() { autoclear::BITMAPS } else { 0 };
        area.set_autoclear(others | promise);
        let after = area.to_bytes().map_err(|e| self.refuse(e.to_string()))?;
        let differs = |i: &usize| after[*i] != before[*i];
        let first = (0..after.len()).find(differs).unwrap_or(0) / SECTOR;
        let last = (0..after.len()).rfind(differs).unwrap_or(0) / SECTOR;
        if first == last {
            let sector = first * SECTOR..(first + 1) * SECTOR;
            return self.write_header(sector.start as u64, &after[sector]).await;
        }
        // not all at once: nothing is promised until all of it is there
        self.write_header(field::AUTOCLEAR, &others.to_be_bytes()).await?;
        area.set_autoclear(others);
        let after = area.to_bytes().map_err(|e| self.refuse(e.to_string()))?;
        self.write_header(0, &after).await?;
        match promise {
            0 => Ok(()),
            _ => self.write_header(field::AUTOCLEAR, &(others | promise).to_be_bytes()).await,
        }
    }

    async fn write_header(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let write = self.disk.file(0).write(HostOffset(at), PageBuf::copy_of(bytes));
        write.await.0.map_err(io(self.path))?;
        self.disk.barrier().await.map_err(io(self.path))
    }
}
