//! Opening an image: the gate, the chain, the locks.
//!
//! What an image names is opened only if it lies below the image roots, judged by where the opened file really is, not
//! by how it was spelled; its format is the one the overlay's header declares.

use super::lock;
use super::shared::{Content, FileId, Image, Layer, Storage, locked};
use super::{Error, Format};
use crate::pagebuf::PageBuf;
use crate::qcow2::header::PEEK_BYTES;
use crate::qcow2::metadata::Surroundings;
use crate::qcow2::snapshot::{self, Snapshot};
use crate::qcow2::{Header, Metadata};
use crate::ring;
use crate::units::HostOffset;
use nix::libc;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Longest chain, in layers.
pub const MAX_CHAIN: usize = 256;
/// Memory for one layer's cached tables, in bytes: QEMU's default.
pub const CACHE_BYTES: u64 = 32 << 20;

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

/// A QCOW2 layer's header and what was read along with it.
pub(super) struct Parsed {
    pub header: Header,
    pub snapshots: Vec<Snapshot>,
    pub snapshot_bytes: u64,
    pub file_len: u64,
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
    pub async fn open(self, format: Format, gate: &Gate) -> Result<Image, Error> {
        let id = self.id;
        let exported = self.real.clone();
        let mut found: Vec<(Opener, Option<Parsed>)> = Vec::new();
        let mut next = Some((self, format));
        while let Some((opener, format)) = next.take() {
            lock::share(&opener.file).map_err(|refused| locked(&opener.path, refused))?;
            let parsed = match format {
                Format::Raw => None,
                Format::Qcow2 => Some(opener.parse().await?),
            };
            found.push((opener, parsed));
            let (opener, parsed) = found.last().expect("just pushed");
            let Some((name, format)) = parsed.as_ref().map_or(Ok(None), |p| backing(&opener.path, &p.header))? else {
                break;
            };
            next = Some((follow(&found, &exported, &name, gate)?, format));
        }
        let not_writable = match &found[0].1 {
            Some(p) if p.header.corrupt => Some("it is marked corrupt; examine it with `qemu-img check`"),
            Some(p) if p.header.dirty => {
                Some("it was not closed and its refcounts may be wrong; repair it with `qemu-img check -r all`")
            }
            _ => None,
        };
        // from the bottom up: an overlay wants to know how large what lies below it is
        let mut layers = Vec::with_capacity(found.len());
        let mut backing_size = 0;
        for (index, (opener, parsed)) in found.into_iter().enumerate().rev() {
            let layer = opener.into_layer(parsed, backing_size, index == 0).await?;
            backing_size = layer.size;
            layers.push(layer);
        }
        layers.reverse();
        Ok(Image::new(layers, id, not_writable))
    }

    /// The size in bytes of the disk in this file, without what the file names. Nothing is locked.
    pub async fn virtual_size(&self, format: Format) -> Result<u64, Error> {
        match format {
            Format::Raw => Ok(self.len),
            Format::Qcow2 => Ok(self.parse().await?.header.size),
        }
    }

    fn ring_file(&self) -> Result<ring::File, Error> {
        Ok(ring::File::from_std(self.file.try_clone().map_err(Error::io(&self.path, "open it once more"))?))
    }

    pub(super) async fn parse(&self) -> Result<Parsed, Error> {
        parse(&self.ring_file()?, &self.path, self.len).await
    }

    async fn into_layer(self, parsed: Option<Parsed>, backing_size: u64, top: bool) -> Result<Layer, Error> {
        let file = self.ring_file()?;
        let storage = Storage::File { file: self.file, block_device: self.block_device };
        let Some(parsed) = parsed else {
            return Ok(Layer { path: self.path, storage, size: self.len, content: Content::Raw });
        };
        let grows = !self.block_device;
        qcow2_layer(file, storage, self.path, parsed, backing_size, grows, top).await
    }
}

impl Image {
    /// An image in the test double; a backing chain is given bottom last, each with its format.
    pub async fn in_memory(disks: &[(ring::mem::MemDisk, Format)]) -> Result<Image, Error> {
        let mut layers: Vec<Layer> = Vec::new();
        for (index, (disk, format)) in disks.iter().enumerate().rev() {
            let path = PathBuf::from(format!("memory-{index}"));
            let (file, storage) = (ring::File::memory(disk), Storage::Memory(disk.clone()));
            let len = disk.len();
            let backing_size = layers.last().map_or(0, |l| l.size);
            layers.push(match format {
                Format::Raw => Layer { path, storage, size: len, content: Content::Raw },
                Format::Qcow2 => {
                    let parsed = parse(&file, &path, len).await?;
                    qcow2_layer(file, storage, path, parsed, backing_size, true, index == 0).await?
                }
            });
        }
        layers.reverse();
        Ok(Image::new(layers, FileId { device: 0, inode: 0 }, None))
    }
}

async fn parse(file: &ring::File, path: &Path, file_len: u64) -> Result<Parsed, Error> {
    let refused = |source| Error::Header { path: path.to_owned(), source };
    let peek = read(file, path, 0, file_len.min(PEEK_BYTES as u64)).await?;
    let cluster = Header::first_cluster(&peek).map_err(refused)?;
    let first = read(file, path, 0, file_len.min(cluster)).await?;
    let header = Header::parse(&first).map_err(refused)?;
    let (snapshots, snapshot_bytes) = read_snapshots(file, path, &header).await?;
    Ok(Parsed { header, snapshots, snapshot_bytes, file_len })
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
    backing_size: u64,
    grows_with_zeroes: bool,
    top: bool,
) -> Result<Layer, Error> {
    let Parsed { header, snapshots, snapshot_bytes, file_len } = parsed;
    let l1_bytes = u64::from(header.l1_entries) * 8;
    if header.l1_offset.0 + l1_bytes > file_len && l1_bytes > 0 {
        let why = format!("L1 table at byte {} runs past the end of the file ({file_len} bytes)", header.l1_offset.0);
        return Err(Error::Broken { path, why });
    }
    let l1 = read(&file, &path, header.l1_offset.0, l1_bytes).await?;
    // a layer that is only read never looks at refcounts
    let reftable_bytes = if top { u64::from(header.reftable_clusters) * header.layout.cluster() } else { 0 };
    let reftable = read(&file, &path, header.reftable_offset.0, reftable_bytes).await?;
    let mut structures = vec![(header.snapshots_offset.0, snapshot_bytes, "snapshot table")];
    structures.extend(snapshots.iter().map(|s| (s.l1_offset.0, u64::from(s.l1_entries) * 8, "snapshot's L1 table")));
    let around = Surroundings { file_len, grows_with_zeroes, backing_size, cache_bytes: CACHE_BYTES, maintained: 0 };
    let mut metadata = Metadata::new(&header, &l1, &reftable, &structures, around);
    if top && let Some(corrupt) = metadata.take_unreported() {
        tracing::error!("{}: {corrupt}; the image is served but not written", path.display());
    }
    Ok(Layer {
        path,
        storage,
        size: header.size,
        content: Content::Qcow2 { metadata: Box::new(Mutex::new(metadata)), compression: header.compression },
    })
}

async fn read(file: &ring::File, path: &Path, at: u64, len: u64) -> Result<PageBuf, Error> {
    let (result, buf) = file.read(HostOffset(at), PageBuf::new(len as usize)).await;
    result.map_err(|e| Error::io(path, "read its metadata")(e.into()))?;
    Ok(buf)
}

/// The backing file an image names, with its declared format.
fn backing(path: &Path, header: &Header) -> Result<Option<(PathBuf, Format)>, Error> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let text = String::from_utf8_lossy(name).into_owned();
    let refuse = |why: String| Error::Backing { path: path.to_owned(), backing: text.clone(), why };
    // QEMU reads "word:" as a protocol
    let before_slash = name.split(|&b| b == b'/').next().unwrap_or_default();
    if before_slash.contains(&b':') {
        let why = "only files are followed, no protocols; for a file whose name holds a colon store \"./NAME\"";
        return Err(refuse(why.to_owned()));
    }
    if name.contains(&0) {
        return Err(refuse("the name holds a zero byte".to_owned()));
    }
    let Some(format) = &header.backing_format else {
        return Err(Error::NoBackingFormat { path: path.to_owned(), backing: text });
    };
    let format = format.parse().map_err(|why| refuse(format!("{why}; convert it with `qemu-img convert`")))?;
    let name = Path::new(OsStr::from_bytes(name));
    Ok(Some((path.parent().unwrap_or(Path::new("")).join(name), format)))
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
        let roots = match &gate.roots {
            Some(roots) => roots.iter().map(|r| r.display().to_string()).collect::<Vec<_>>().join(", "),
            None => exported.parent().unwrap_or(Path::new("/")).display().to_string(),
        };
        let real = opener.real.display();
        return Err(refuse(format!(
            "{real} lies outside the image roots ({roots}); add its directory to `imageroots` in [generic]"
        )));
    }
    if found.iter().any(|(earlier, _)| earlier.id == opener.id) {
        return Err(refuse("the chain refers to itself".to_owned()));
    }
    Ok(opener)
}
