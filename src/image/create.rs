//! `cowgate image create`: a new, empty QCOW2 image, whole or not at all.

use super::place::{NewFile, beside};
use super::{Error, FileId, Format, Opener};
use crate::qcow2::compress::Compression;
use crate::qcow2::create::{DataFile, NewImage, lay_out};
use crate::qcow2::layout::{Layout, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use crate::ring;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Virtual sizes are whole multiples of this many bytes.
const SECTOR: u64 = 512;

/// What a new image shall be.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Where.
    pub path: PathBuf,
    /// Virtual size in bytes, rounded up to whole sectors; with a backing file its size is the default.
    pub size: Option<u64>,
    /// Cluster size and what else is chosen once.
    pub features: Features,
    /// Backing file, as it is to be stored (a relative name is relative to the new image), and its format.
    pub backing: Option<(PathBuf, Format)>,
    /// External data file, as it is to be stored (relative to the new image); it is created too.
    pub data_file: Option<PathBuf>,
    /// The data file is to be a raw image by itself.
    pub data_file_raw: bool,
    /// Replace existing files.
    pub force: bool,
}

/// Properties of an image that are chosen when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// 2 (QEMU: 0.10) or 3 (1.1).
    pub version: u32,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Refcount width in bits, a power of two up to 64.
    pub refcount_bits: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// Subclusters.
    pub extended_l2: bool,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
}

impl Default for Features {
    fn default() -> Self {
        let compression = Compression::Zlib;
        let cluster_size = 64 << 10;
        Features { version: 3, cluster_size, refcount_bits: 16, compression, extended_l2: false, lazy_refcounts: false }
    }
}

impl Features {
    /// An image of `size` bytes with these properties. `Err` says what is possible.
    pub(super) fn image(&self, size: u64) -> Result<NewImage, String> {
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
            let size = self.cluster_size;
            return Err(format!("cluster size {size}: a power of two from 512 to 2097152 is needed"));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(format!("refcounts of {} bits: 1, 2, 4, 8, 16, 32 or 64 are possible", self.refcount_bits));
        }
        // QEMU knows sectors only, and would not see the rest of one at the end of the disk
        let Some(size) = size.checked_next_multiple_of(SECTOR) else {
            return Err(format!("size {size} is too large"));
        };
        let mut layout = Layout::plain(self.version, bits, self.refcount_bits.trailing_zeros());
        layout.extended_l2 = self.extended_l2;
        let (compression, lazy_refcounts) = (self.compression, self.lazy_refcounts);
        Ok(NewImage { compression, lazy_refcounts, ..NewImage::new(layout, size) })
    }
}

/// Creates the image: written beside its place, made durable, then moved there, so that a crash or an error leaves
/// either the old state or the whole new image.
pub fn create(options: &CreateOptions) -> Result<(), Error> {
    let path = &options.path;
    let refuse = |why: String| Error::Create { path: path.clone(), why };
    let backing_path = options.backing.as_ref().map(|(name, format)| (beside(path, name), *format));
    let backing = match &backing_path {
        Some((path, format)) => Some(examine(path, *format)?),
        None => None,
    };
    let Some(size) = options.size.or(backing.map(|(_, size)| size)) else {
        return Err(refuse("a size is needed: give --size, or a backing file to take it from".to_owned()));
    };
    let mut new = options.features.image(size).map_err(refuse)?;
    new.backing = options.backing.as_ref().map(|(p, f)| (p.as_os_str().as_bytes().to_vec(), f.to_string()));
    new.data_file = options
        .data_file
        .as_ref()
        .map(|name| DataFile { name: name.as_os_str().as_bytes().to_vec(), raw: options.data_file_raw });
    let pieces = lay_out(&new).map_err(refuse)?;
    let data_file = match &options.data_file {
        Some(name) => {
            let at = beside(path, name);
            check_data_file(path, &at, backing.map(|(id, _)| id))?;
            let file = NewFile::create(&at, options.force)?;
            file.file().set_len(new.size).map_err(Error::io(&at, "give it its size"))?;
            Some(file)
        }
        None => None,
    };
    let image = if options.force { NewFile::create(path, true)? } else { NewFile::unnamed(path)? };
    write(image.file(), &pieces).map_err(Error::io(path, "create it"))?;
    // the data file first: an image without it could not be opened
    let undo = data_file.map(NewFile::put_in_place).transpose()?;
    if let Err(e) = image.put_in_place() {
        if let (Some(at), false) = (undo, options.force) {
            let _ = std::fs::remove_file(at); // it was not there before
        }
        return Err(e);
    }
    Ok(())
}

/// Writes a new image's pieces.
pub(super) fn write(file: &File, pieces: &[(u64, Vec<u8>)]) -> io::Result<()> {
    pieces.iter().try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))
}

/// Creates a raw image of `size` zeroes that takes no space yet, for its owner alone. Does nothing if there is a file.
pub fn create_raw(path: &Path, size: u64) -> Result<(), Error> {
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let new = NewFile::create(path, false)?;
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    new.file().set_permissions(owner_only).map_err(Error::io(path, "create it"))?;
    new.file().set_len(size).map_err(Error::io(path, "give it the size that `filesize` says"))?;
    match new.put_in_place() {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        placed => placed.map(drop),
    }
}

/// Identity and virtual size in bytes of a backing file.
fn examine(path: &Path, format: Format) -> Result<(FileId, u64), Error> {
    let opener = Opener::new(path)?;
    let id = opener.id();
    let size = ring::run(opener.virtual_size(format, None)).map_err(Error::io(path, "start reading it"))??;
    Ok((id, size))
}

/// Refuses a data file that would replace what must stay.
fn check_data_file(image: &Path, at: &Path, backing: Option<FileId>) -> Result<(), Error> {
    let refuse = |why: &str| Err(Error::Create { path: at.to_owned(), why: why.to_owned() });
    let real = |path: &Path| {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        dir.canonicalize().ok().zip(path.file_name().map(ToOwned::to_owned))
    };
    if real(image) == real(at) {
        return refuse("is the image itself; its data file needs another name");
    }
    let Ok(meta) = at.metadata() else { return Ok(()) };
    if !meta.is_file() {
        return refuse("is no regular file; a new data file takes the place of regular files only");
    }
    if backing.is_some() && Opener::new(at).ok().map(|o| o.id()) == backing {
        return refuse("is the backing file; the data file needs another name");
    }
    Ok(())
}
