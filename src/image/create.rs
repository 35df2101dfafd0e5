//! `cowgate image create`: a new, empty QCOW2 image, whole or not at all.

use super::{Error, Format};
use crate::qcow2::create::{NewImage, lay_out};
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
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Backing file, as it is to be stored (a relative name is relative to the new image), and its format.
    pub backing: Option<(PathBuf, Format)>,
    /// Replace an existing file.
    pub force: bool,
}

/// Creates the image: written beside its place, made durable, then moved there, so that a crash or an error leaves
/// either the old state or the whole new image.
pub fn create(options: &CreateOptions) -> Result<(), Error> {
    let path = &options.path;
    let refuse = |why: String| Error::Create { path: path.clone(), why };
    let bits = options.cluster_size.trailing_zeros();
    if !options.cluster_size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        let size = options.cluster_size;
        return Err(refuse(format!("cluster size {size}: a power of two from 512 to 2097152 is needed")));
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let backing_size = match &options.backing {
        Some((name, format)) => Some(size_of(&dir.join(name), *format)?),
        None => None,
    };
    let Some(size) = options.size.or(backing_size) else {
        return Err(refuse("a size is needed: give --size, or a backing file to take it from".to_owned()));
    };
    // QEMU knows sectors only, and would not see the rest of one at the end of the disk
    let Some(size) = size.checked_next_multiple_of(SECTOR) else {
        return Err(refuse(format!("size {size} is too large")));
    };
    let new = NewImage {
        layout: Layout::plain(3, bits, 4),
        size,
        backing: options.backing.as_ref().map(|(p, f)| (p.as_os_str().as_bytes().to_vec(), f.to_string())),
    };
    let pieces = lay_out(&new).map_err(refuse)?;
    if !options.force && path.exists() {
        return Err(refuse("exists already; give --force to replace it".to_owned()));
    }
    let Some(name) = path.file_name() else { return Err(refuse("is not a file name".to_owned())) };
    let mut temporary = name.to_owned();
    temporary.push(format!(".new-{}", std::process::id()));
    let temporary = dir.join(temporary);
    let written = write(&temporary, &pieces).and_then(|()| put_in_place(&temporary, path, dir, options.force));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary); // nothing more can be done for a leftover
    }
    written.map_err(Error::io(path, "create it"))
}

fn write(path: &Path, pieces: &[(u64, Vec<u8>)]) -> io::Result<()> {
    let file = File::options().write(true).create_new(true).open(path)?;
    for (at, bytes) in pieces {
        file.write_all_at(bytes, *at)?;
    }
    file.sync_all()
}

fn put_in_place(temporary: &Path, path: &Path, dir: &Path, replace: bool) -> io::Result<()> {
    if replace {
        std::fs::rename(temporary, path)?;
    } else {
        // unlike rename, a hard link never replaces a file that appeared meanwhile
        std::fs::hard_link(temporary, path)?;
        std::fs::remove_file(temporary)?;
    }
    File::open(dir)?.sync_all()
}

/// Virtual size in bytes of a backing file.
fn size_of(path: &Path, format: Format) -> Result<u64, Error> {
    let opener = super::Opener::new(path)?;
    ring::run(opener.virtual_size(format, None)).map_err(Error::io(path, "start reading it"))?
}
