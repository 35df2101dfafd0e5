//! Opening an image: the gate, the chain, the locks.
//!
//! What an image names is opened only if it lies below the image roots, judged by where the opened file really is, not
//! by how it was spelled; its format is the one the overlay's header declares.

use super::bitmaps;
use super::check::Subject;
use super::claim;
use super::lock;
use super::shared::{Content, DataFile, FileId, Image, Layer, Storage, locked};
use super::{Error, Format, contexts};
use crate::block::NamedContext;
use crate::pagebuf::PageBuf;
use crate::qcow2::bitmap::Bitmap;
use crate::qcow2::header::{MAGIC, PEEK_BYTES, autoclear};
use crate::qcow2::metadata::Surroundings;
use crate::qcow2::snapshot::{self, Snapshot};
use crate::qcow2::{Header, Metadata};
use crate::ring;
use crate::ring::mem::MemDisk;
use crate::units::HostOffset;
use nix::libc;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Longest chain, in layers.
pub const MAX_CHAIN: usize = 256;
/// Most bytes of L1 tables of a chain: they are held in memory as a whole.
const MAX_CHAIN_L1_BYTES: u64 = 256 << 20;
/// Most memory for the cached tables of an image that asks for none, in bytes: QEMU's default.
pub const CACHE_BYTES: u64 = 32 << 20;
/// Least memory for the cached tables of one layer, in bytes.
pub const MIN_CACHE_BYTES: u64 = 64 << 10;

/// How an image is to be opened.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Its format.
    pub format: Format,
    /// Memory for the cached tables of all its layers, in bytes; `None`: enough for all of it, up to [`CACHE_BYTES`].
    pub cache_bytes: Option<u64>,
}

impl From<Format> for OpenOptions {
    fn from(format: Format) -> Self {
        OpenOptions { format, cache_bytes: None }
    }
}

/// Directories below which files that an image names may be opened.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    roots: Option<Vec<PathBuf>>,
}

impl Gate {
    /// `roots`: absolute directories; `None`: the directory of the exported image.
    pub fn new(roots: Option<Vec<PathBuf>>) -> Gate {
        // as the kernel will name what is opened below them; a root that does not exist yet admits nothing
        let real = |root: PathBuf| root.canonicalize().unwrap_or(root);
        Gate { roots: roots.map(|roots| roots.into_iter().map(real).collect()) }
    }

    fn admits(&self, exported: &Path, file: &Path) -> bool {
        match &self.roots {
            Some(roots) => roots.iter().any(|root| file.starts_with(root)),
            None => exported.parent().is_some_and(|dir| file.starts_with(dir)),
        }
    }
}

impl Gate {
    /// Why a file is not opened, and what to do.
    fn refusal(&self, exported: &Path, real: &Path) -> String {
        let roots = match &self.roots {
            Some(roots) => roots.iter().map(|r| r.display().to_string()).collect::<Vec<_>>().join(", "),
            None => exported.parent().unwrap_or(Path::new("/")).display().to_string(),
        };
        let real = real.display();
        format!("{real} lies outside the image roots ({roots}); add its directory to `imageroots` in [generic]")
    }
}

/// A file that was opened and identified, but not locked or read yet.
pub struct Opener {
    path: PathBuf,
    /// Where the file really is.
    real: PathBuf,
    file: File,
    id: FileId,
    block_device: bool,
    len: u64,
}

/// One file of a chain that is not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainLayer {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Storage in bytes that its files occupy.
    pub allocated_bytes: u64,
}

/// A QCOW2 layer's header and what was read along with it.
pub(super) struct Parsed {
    pub header: Header,
    pub snapshots: Vec<Snapshot>,
    pub snapshot_bytes: u64,
    pub file_len: u64,
}

impl Parsed {
    /// An internal snapshot, by its ID, else by its name.
    fn snapshot(&self, path: &Path, name: &str) -> Result<&Snapshot, Error> {
        let find = |key: fn(&Snapshot) -> &str| self.snapshots.iter().find(|s| key(s) == name);
        find(|s| &s.id).or_else(|| find(|s| &s.name)).ok_or_else(|| {
            let names: Vec<_> = self.snapshots.iter().map(|s| format!("{:?}", s.name)).collect();
            let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            let why = format!("the image has no snapshot of this ID or name; it has {known}");
            Error::Snapshot { path: path.to_owned(), snapshot: name.to_owned(), why }
        })
    }
}

impl Opener {
    /// Opens and identifies a file. Nothing is locked, nothing is read.
    pub fn new(path: &Path) -> Result<Opener, Error> {
        // O_NONBLOCK: a FIFO put in the image's place must not stop the worker
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .map_err(Error::io(path, "open it"))?;
        let meta = file.metadata().map_err(Error::io(path, "examine it"))?;
        let kind = meta.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            let kind = match () {
                () if kind.is_dir() => "directory",
                () if kind.is_fifo() => "FIFO",
                () if kind.is_char_device() => "character device",
                () => "special file",
            };
            return Err(Error::FileType { path: path.to_owned(), kind });
        }
        let real = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .map_err(Error::io(path, "find its real place"))?;
        let len = (&file).seek(SeekFrom::End(0)).map_err(Error::io(path, "find its size"))?;
        let id = match block_device {
            true => FileId { device: meta.rdev(), inode: 0 },
            false => FileId { device: meta.dev(), inode: meta.ino() },
        };
        Ok(Opener { path: path.to_owned(), real, file, id, block_device, len })
    }

    /// The file's identity.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// The file's length in bytes.
    #[allow(clippy::len_without_is_empty)] // a length of storage, not of a collection
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Opens the chain that begins with this file, locked for reading. Runs on a worker.
    pub async fn open(self, options: impl Into<OpenOptions>, gate: &Gate) -> Result<Image, Error> {
        self.open_chain(options.into(), gate, None).await
    }

    /// Opens this file without its backing chain: what it does not hold itself reads as zeroes. `backing_size`: size in
    /// bytes of the disk in its backing file, as far as that is known. Runs on a worker.
    pub(super) async fn open_alone(self, format: Format, gate: &Gate, backing_size: u64) -> Result<Image, Error> {
        self.open_chain(format.into(), gate, Some(backing_size)).await
    }

    async fn open_chain(self, options: OpenOptions, gate: &Gate, alone: Option<u64>) -> Result<Image, Error> {
        let OpenOptions { format, cache_bytes } = options;
        let id = self.id;
        let exported = self.real.clone();
        let mut found: Vec<(Opener, Option<Parsed>)> = Vec::new();
        let mut next = Some((self, format));
        let mut l1_bytes = 0;
        while let Some((opener, format)) = next.take() {
            lock::share(&opener.file).map_err(|refused| locked(&opener.path, refused))?;
            let mut parsed = match format {
                Format::Raw => None,
                Format::Qcow2 => Some(opener.parse().await?),
            };
            if let Some(parsed) = &mut parsed {
                l1_bytes += u64::from(parsed.header.l1_entries) * 8;
                if l1_bytes > MAX_CHAIN_L1_BYTES {
                    let why = format!(
                        "the L1 tables of the chain down to here take {l1_bytes} bytes, at most {MAX_CHAIN_L1_BYTES} are \
                         held in memory; merge some layers with `qemu-img commit`"
                    );
                    return Err(Error::Broken { path: opener.path, why });
                }
                if !found.is_empty() {
                    parsed.snapshots = Vec::new(); // nobody asks a layer that is only read for them
                }
            }
            found.push((opener, parsed));
            if alone.is_some() {
                break;
            }
            let (opener, parsed) = found.last().expect("just pushed");
            let Some((name, format)) = parsed.as_ref().map_or(Ok(None), |p| backing(&opener.path, &p.header))? else {
                break;
            };
            next = Some((follow(&found, &exported, &name, gate)?, format));
        }
        let not_writable = match &found[0].1 {
            Some(p) if p.header.corrupt => {
                Some("it is marked corrupt; see `cowgate image check`, which can `--repair` it")
            }
            Some(p) if p.header.dirty => Some(
                "it was not closed and its refcounts may be wrong, and they cannot be rebuilt while readers have it \
                 open; disconnect them, or repair it with `cowgate image check --repair`",
            ),
            _ => None,
        };
        let mut data_files = data_files(&found, &exported, gate)?;
        let chain = found.len() as u64;
        // from the bottom up: an overlay wants to know how large what lies below it is
        let mut layers = Vec::with_capacity(found.len());
        let mut backing_size = alone.unwrap_or(0);
        for (index, (opener, parsed)) in found.into_iter().enumerate().rev() {
            let cache_bytes = cache_share(cache_bytes, chain);
            let around = Around { backing_size, cache_bytes, grows_with_zeroes: !opener.block_device, top: index == 0 };
            let layer = opener.into_layer(parsed, data_files[index].take(), around).await?;
            backing_size = layer.size;
            layers.push(Arc::new(layer));
        }
        layers.reverse();
        Ok(Image::new(layers, id, not_writable))
    }

    /// The chain that begins with this file, as the headers have it; nothing is locked. What cannot be followed ends it,
    /// and is the error beside the layers up to there.
    pub async fn chain(self, format: Format, gate: &Gate) -> (Vec<ChainLayer>, Option<Error>) {
        let exported = self.real.clone();
        let (mut found, mut layers) = (Vec::new(), Vec::new());
        let mut next = Some((self, format));
        while let Some((opener, format)) = next.take() {
            let mut layer = ChainLayer { path: opener.path.clone(), format, size: opener.len, allocated_bytes: 0 };
            let below = opener.chain_layer(&mut layer).await;
            let below = below.and_then(|header| {
                let data = header.as_ref().map_or(Ok(None), |h| data_file(&opener.path, h, &exported, gate))?;
                if let Some(data) = data {
                    layer.allocated_bytes += data.allocated_bytes()?;
                }
                header.map_or(Ok(None), |header| backing(&opener.path, &header))
            });
            layers.push(layer);
            found.push((opener, None));
            match below.and_then(|b| b.map(|(name, f)| Ok((follow(&found, &exported, &name, gate)?, f))).transpose()) {
                Ok(below) => next = below,
                Err(e) => return (layers, Some(e)),
            }
        }
        (layers, None)
    }

    async fn chain_layer(&self, layer: &mut ChainLayer) -> Result<Option<Header>, Error> {
        layer.allocated_bytes = self.allocated_bytes()?;
        if layer.format == Format::Raw {
            return Ok(None);
        }
        let header = self.parse_header().await?;
        layer.size = header.size;
        Ok(Some(header))
    }

    fn allocated_bytes(&self) -> Result<u64, Error> {
        Ok(self.file.metadata().map_err(Error::io(&self.path, "examine it"))?.blocks() * 512)
    }

    /// The file's format: as declared, else QCOW2 when it begins like one. That guess is for commands that a user runs
    /// on a file; nothing the image names is opened by them.
    pub(super) fn format(&self, declared: Option<Format>) -> Result<Format, Error> {
        if let Some(format) = declared {
            return Ok(format);
        }
        let mut magic = [0; 4];
        let read = self.file.read_at(&mut magic, 0).map_err(Error::io(&self.path, "read it"))?;
        Ok(if read == 4 && magic == MAGIC { Format::Qcow2 } else { Format::Raw })
    }

    /// Locks the file as a reader, until it is closed.
    pub(super) fn lock(&self) -> Result<(), Error> {
        lock::share(&self.file).map_err(|refused| locked(&self.path, refused))
    }

    /// Adds a writer's lock to the reader's, and has a block device for itself as long as the file it returns is open.
    pub(super) fn lock_for_writing(&self) -> Result<Option<File>, Error> {
        lock::add_write(&self.file).map_err(|refused| locked(&self.path, refused))?;
        self.block_device.then(|| claim::claim(&self.path, &self.file)).transpose()
    }

    /// Gives the writer's lock back.
    pub(super) fn unlock_for_writing(&self) -> Result<(), Error> {
        lock::drop_write(&self.file).map_err(Error::io(&self.path, "unlock it"))
    }

    /// The file as something to be checked, or repaired when it is opened for writing.
    pub(super) fn subject(&self, write: bool, memory: u64) -> Result<Subject, Error> {
        // the same inode, whatever the path names by now
        let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let opened = File::options().read(true).write(write).open(same);
        let file = opened.map_err(Error::io(&self.path, if write { "open it for writing" } else { "open it" }))?;
        let meta = file.metadata().map_err(Error::io(&self.path, "examine it"))?;
        let stored = if self.block_device { self.len } else { meta.blocks() * 512 };
        let (file, path) = (ring::File::from_std(file), self.path.clone());
        Ok(Subject::new(file, path, self.len, stored, self.block_device, memory))
    }

    /// Takes note that the file has become longer.
    pub(super) fn note_length(&mut self) -> Result<(), Error> {
        self.len = (&self.file).seek(SeekFrom::End(0)).map_err(Error::io(&self.path, "find its size"))?;
        Ok(())
    }

    /// The header alone.
    pub(super) async fn parse_header(&self) -> Result<Header, Error> {
        parse_header(&self.ring_file()?, &self.path, self.len).await
    }

    /// The size in bytes of the disk in this file, or of an internal snapshot, without what the file names. Nothing is
    /// locked.
    pub async fn virtual_size(&self, format: Format, snapshot: Option<&str>) -> Result<u64, Error> {
        if format == Format::Raw {
            return Ok(self.len);
        }
        let parsed = self.parse().await?;
        match snapshot {
            None => Ok(parsed.header.size),
            Some(name) => Ok(parsed.snapshot(&self.path, name)?.disk_size.unwrap_or(parsed.header.size)),
        }
    }

    /// Whether the image is marked corrupt. Nothing is locked.
    pub async fn marked_corrupt(&self, format: Format) -> Result<bool, Error> {
        Ok(format == Format::Qcow2 && self.parse_header().await?.corrupt)
    }

    /// The contexts that the disk in this file, or an internal snapshot of it, offers. Nothing is locked; bitmaps that
    /// cannot be read are none.
    pub async fn contexts(&self, format: Format, snapshot: bool) -> Result<Vec<NamedContext>, Error> {
        if format == Format::Raw {
            return Ok(contexts::of_image(&[], false));
        }
        let header = self.parse_header().await?;
        let list = match snapshot {
            true => None,
            false => bitmaps::read_directory(&self.ring_file()?, &header, self.len).await.ok().flatten(),
        };
        let list = list.unwrap_or_default();
        let usable = |bitmap: &Bitmap| bitmap.unusable(header.size, header.layout).is_none();
        let list: Vec<_> = list.iter().map(|bitmap| (&bitmap.name[..], usable(bitmap))).collect();
        Ok(contexts::of_image(&list, header.backing_file.is_some()))
    }

    pub(super) fn ring_file(&self) -> Result<ring::File, Error> {
        Ok(ring::File::from_std(self.file.try_clone().map_err(Error::io(&self.path, "open it once more"))?))
    }

    pub(super) async fn parse(&self) -> Result<Parsed, Error> {
        parse(&self.ring_file()?, &self.path, self.len).await
    }

    async fn into_layer(self, parsed: Option<Parsed>, data: Option<Opener>, around: Around) -> Result<Layer, Error> {
        let file = self.ring_file()?;
        let storage = Storage::new(self.file, self.block_device);
        let Some(parsed) = parsed else {
            return Ok(raw_layer(self.path, storage, self.len));
        };
        let data = data.map(|data| DataFile {
            path: data.path,
            storage: Storage::new(data.file, data.block_device),
            raw: parsed.header.raw_data_file(),
        });
        qcow2_layer(file, storage, self.path, parsed, data, around).await
    }
}

impl Image {
    /// An image in the test double; a backing chain is given bottom last, each with its format.
    pub async fn in_memory(disks: &[(MemDisk, Format)]) -> Result<Image, Error> {
        Image::in_memory_with_data(disks, None).await
    }

    /// As [`Image::in_memory`], with the external data file of the first image.
    pub async fn in_memory_with_data(disks: &[(MemDisk, Format)], data: Option<&MemDisk>) -> Result<Image, Error> {
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for (index, (disk, format)) in disks.iter().enumerate().rev() {
            let path = PathBuf::from(format!("memory-{index}"));
            let (file, storage) = (ring::File::memory(disk), Storage::Memory(disk.clone()));
            let backing_size = layers.last().map_or(0, |l| l.size);
            layers.push(Arc::new(match format {
                Format::Raw => raw_layer(path, storage, disk.len()),
                Format::Qcow2 => {
                    let parsed = parse(&file, &path, disk.len()).await?;
                    let data = data.filter(|_| index == 0).map(|data| DataFile {
                        path: PathBuf::from("memory-data"),
                        storage: Storage::Memory(data.clone()),
                        raw: parsed.header.raw_data_file(),
                    });
                    if parsed.header.layout.data_file && data.is_none() {
                        return Err(Error::Broken { path, why: "its external data file is not given".to_owned() });
                    }
                    let cache_bytes = cache_share(None, disks.len() as u64);
                    let around = Around { backing_size, cache_bytes, grows_with_zeroes: true, top: index == 0 };
                    qcow2_layer(file, storage, path, parsed, data, around).await?
                }
            }));
        }
        layers.reverse();
        Ok(Image::new(layers, FileId { device: 0, inode: 0 }, None))
    }

    /// An internal snapshot of this image, found by its ID, else by its name, as an image that can only be read.
    ///
    /// `cache_bytes`: memory for its cached tables, as for [`OpenOptions`].
    pub async fn snapshot(self: &Arc<Image>, name: &str, cache_bytes: Option<u64>) -> Result<Image, Error> {
        let active = &self.layers[0];
        let refuse = |why: String| Error::Snapshot { path: active.path.clone(), snapshot: name.to_owned(), why };
        let Some(parsed) = &active.parsed else {
            return Err(refuse("a raw image has no snapshots".to_owned()));
        };
        let found = parsed.snapshot(&active.path, name)?;
        let mut header = parsed.header.clone();
        header.size = found.disk_size.unwrap_or(header.size);
        header.l1_offset = found.l1_offset;
        header.l1_entries = found.l1_entries;
        header.check_tables().map_err(|e| refuse(e.to_string()))?;
        let parsed = Parsed {
            header,
            snapshots: Vec::new(),
            snapshot_bytes: 0,
            file_len: active.file_len().map_err(Error::io(&active.path, "find its size"))?,
        };
        let again = |storage: &Storage| storage.again().map_err(Error::io(&active.path, "open it once more"));
        let around = Around {
            backing_size: self.layers.get(1).map_or(0, |below| below.size),
            cache_bytes: cache_share(cache_bytes, 1),
            grows_with_zeroes: false,
            top: false,
        };
        let file = active.open_file(false)?;
        let top = qcow2_layer(file, again(&active.storage)?, active.path.clone(), parsed, None, around).await?;
        Ok(Image::snapshot_of(self, top))
    }
}

/// The layer in a new QCOW2 file that nobody else knows: it lies over a disk of `backing_size` bytes.
pub(super) async fn new_layer(
    file: File,
    path: PathBuf,
    backing_size: u64,
    cache_bytes: Option<u64>,
) -> Result<Layer, Error> {
    let again = || file.try_clone().map(ring::File::from_std).map_err(Error::io(&path, "open it once more"));
    let (handle, len) = (again()?, file.metadata().map_err(Error::io(&path, "examine it"))?.len());
    let parsed = parse(&handle, &path, len).await?;
    let around = Around { backing_size, cache_bytes: cache_share(cache_bytes, 1), grows_with_zeroes: true, top: true };
    let storage = Storage::new(file, false);
    qcow2_layer(handle, storage, path, parsed, None, around).await
}

/// What a layer needs to know that its own file does not say.
#[derive(Clone, Copy)]
struct Around {
    backing_size: u64,
    cache_bytes: u64,
    grows_with_zeroes: bool,
    /// The layer that is written.
    top: bool,
}

fn raw_layer(path: PathBuf, storage: Storage, size: u64) -> Layer {
    Layer { path, storage, size, content: Content::Raw, data: None, bitmaps: None, parsed: None }
}

/// One layer's part of an image's memory for cached tables: an equal one. A small image never fills it, and has room for
/// new tables all the same, so that its writers need not wait for a flush.
fn cache_share(limit: Option<u64>, layers: u64) -> u64 {
    (limit.unwrap_or(CACHE_BYTES) / layers).max(MIN_CACHE_BYTES)
}

/// Opens the external data files of a chain, if the gate lets them through.
fn data_files(found: &[(Opener, Option<Parsed>)], exported: &Path, gate: &Gate) -> Result<Vec<Option<Opener>>, Error> {
    let mut files: Vec<Option<Opener>> = Vec::with_capacity(found.len());
    for (opener, parsed) in found {
        let path = &opener.path;
        let named = parsed.as_ref().map_or(Ok(None), |parsed| data_file(path, &parsed.header, exported, gate))?;
        let Some(data) = named else {
            files.push(None);
            continue;
        };
        let taken = files.iter().flatten().chain(found.iter().map(|(opener, _)| opener));
        if taken.into_iter().any(|other| other.id == data.id) {
            let why = "the same file is used twice in this chain".to_owned();
            return Err(Error::DataFile { path: path.clone(), data_file: data.path.display().to_string(), why });
        }
        lock::share(&data.file).map_err(|refused| locked(&data.path, refused))?;
        files.push(Some(data));
    }
    Ok(files)
}

/// The external data file that a header names, opened behind the gate.
fn data_file(path: &Path, header: &Header, exported: &Path, gate: &Gate) -> Result<Option<Opener>, Error> {
    if !header.layout.data_file {
        return Ok(None);
    }
    let Some(name) = &header.data_file else {
        let why = "it has an external data file and does not name it; name it with `qemu-img amend -o data_file=FILE`";
        return Err(Error::Broken { path: path.to_owned(), why: why.to_owned() });
    };
    let text = String::from_utf8_lossy(name).into_owned();
    let refuse = |why: String| Error::DataFile { path: path.to_owned(), data_file: text.clone(), why };
    let data = Opener::new(&relative(path, name).map_err(refuse)?)?;
    match gate.admits(exported, &data.real) {
        true => Ok(Some(data)),
        false => Err(refuse(gate.refusal(exported, &data.real))),
    }
}

async fn parse(file: &ring::File, path: &Path, file_len: u64) -> Result<Parsed, Error> {
    let header = parse_header(file, path, file_len).await?;
    let (snapshots, snapshot_bytes) = read_snapshots(file, path, &header).await?;
    Ok(Parsed { header, snapshots, snapshot_bytes, file_len })
}

async fn parse_header(file: &ring::File, path: &Path, file_len: u64) -> Result<Header, Error> {
    let refused = |source| Error::Header { path: path.to_owned(), source };
    let peek = read(file, path, 0, file_len.min(PEEK_BYTES as u64)).await?;
    let cluster = Header::first_cluster(&peek).map_err(refused)?;
    let first = read(file, path, 0, file_len.min(cluster)).await?;
    Header::parse(&first).map_err(refused)
}

async fn read_snapshots(file: &ring::File, path: &Path, header: &Header) -> Result<(Vec<Snapshot>, u64), Error> {
    if header.snapshots == 0 {
        return Ok((Vec::new(), 0));
    }
    let broken = |why: String| Error::Broken { path: path.to_owned(), why };
    let mut len = 64 << 10;
    while len <= snapshot::MAX_TABLE_BYTES {
        let bytes = read(file, path, header.snapshots_offset.0, len).await?;
        match snapshot::parse(&bytes, header.snapshots) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => len *= 4,
            Err(why) => return Err(broken(format!("snapshot table at byte {}: {why}", header.snapshots_offset.0))),
        }
    }
    Err(broken(format!("snapshot table of {} snapshots is larger than 16 MiB", header.snapshots)))
}

async fn qcow2_layer(
    file: ring::File,
    storage: Storage,
    path: PathBuf,
    parsed: Parsed,
    data: Option<DataFile>,
    around: Around,
) -> Result<Layer, Error> {
    let Parsed { header, snapshots, snapshot_bytes, file_len } = &parsed;
    let l1_bytes = u64::from(header.l1_entries) * 8;
    if header.l1_offset.0 + l1_bytes > *file_len && l1_bytes > 0 {
        let why = format!("L1 table at byte {} runs past the end of the file ({file_len} bytes)", header.l1_offset.0);
        return Err(Error::Broken { path, why });
    }
    let l1 = read(&file, &path, header.l1_offset.0, l1_bytes).await?;
    // a layer that is only read never looks at refcounts
    let reftable_bytes = if around.top { u64::from(header.reftable_clusters) * header.layout.cluster() } else { 0 };
    let reftable = read(&file, &path, header.reftable_offset.0, reftable_bytes).await?;
    let mut structures = vec![(header.snapshots_offset.0, *snapshot_bytes, "snapshot table")];
    structures.extend(snapshots.iter().map(|s| (s.l1_offset.0, u64::from(s.l1_entries) * 8, "snapshot's L1 table")));
    let surroundings = Surroundings {
        file_len: *file_len,
        grows_with_zeroes: around.grows_with_zeroes,
        backing_size: around.backing_size,
        cache_bytes: around.cache_bytes,
        maintained: autoclear::RAW_DATA_FILE,
    };
    let mut metadata = Metadata::new(header, &l1, &reftable, &structures, surroundings);
    if around.top
        && let Some(corrupt) = metadata.take_unreported()
    {
        tracing::error!("{}: {corrupt}; the image is served but not written", path.display());
    }
    let bitmaps = match around.top {
        true => bitmaps::load(&file, &path, header, *file_len, &mut metadata).await,
        false => None,
    };
    Ok(Layer {
        path,
        storage,
        size: header.size,
        content: Content::Qcow2 { metadata: Box::new(Mutex::new(metadata)), compression: header.compression },
        data,
        bitmaps,
        parsed: Some(parsed),
    })
}

async fn read(file: &ring::File, path: &Path, at: u64, len: u64) -> Result<PageBuf, Error> {
    let (result, buf) = file.read(HostOffset(at), PageBuf::new(len as usize)).await;
    result.map_err(|e| Error::io(path, "read its metadata")(e.into()))?;
    Ok(buf)
}

/// The backing file an image names, with its declared format.
pub(super) fn backing(path: &Path, header: &Header) -> Result<Option<(PathBuf, Format)>, Error> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let text = String::from_utf8_lossy(name).into_owned();
    let refuse = |why: String| Error::Backing { path: path.to_owned(), backing: text.clone(), why };
    let name = relative(path, name).map_err(refuse)?;
    let Some(format) = &header.backing_format else {
        return Err(Error::NoBackingFormat { path: path.to_owned(), backing: text });
    };
    let format = format.parse().map_err(|why| refuse(format!("{why}; convert it with `qemu-img convert`")))?;
    Ok(Some((name, format)))
}

/// The place of a file that an image names. `Err` says why it is not followed.
pub(super) fn relative(image: &Path, name: &[u8]) -> Result<PathBuf, String> {
    // QEMU reads "word:" as a protocol
    let before_slash = name.split(|&b| b == b'/').next().unwrap_or_default();
    if before_slash.contains(&b':') {
        let why = "only files are followed, no protocols; for a file whose name holds a colon store \"./NAME\"";
        return Err(why.to_owned());
    }
    if name.contains(&0) {
        return Err("the name holds a zero byte".to_owned());
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(Path::new(OsStr::from_bytes(name))))
}

/// Opens the next file of a chain, if the gate lets it through.
fn follow(found: &[(Opener, Option<Parsed>)], exported: &Path, name: &Path, gate: &Gate) -> Result<Opener, Error> {
    let overlay = &found.last().expect("a chain begins somewhere").0;
    let refuse = |why: String| Error::Backing { path: overlay.path.clone(), backing: name.display().to_string(), why };
    if found.len() >= MAX_CHAIN {
        return Err(refuse(format!("the chain is longer than {MAX_CHAIN} layers; merge some with `qemu-img commit`")));
    }
    let opener = Opener::new(name)?;
    if !gate.admits(exported, &opener.real) {
        return Err(refuse(gate.refusal(exported, &opener.real)));
    }
    if found.iter().any(|(earlier, _)| earlier.id == opener.id) {
        return Err(refuse("the chain refers to itself".to_owned()));
    }
    Ok(opener)
}
