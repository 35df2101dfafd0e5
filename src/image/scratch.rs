//! A layer that is thrown away: what is written over an image goes to a file without a name, and the image stays as it
//! is.
//!
//! Promises: nobody else sees what is written, nothing of it is left behind however the process ends, and nobody writes
//! the image below meanwhile. Nothing is synced: nobody will look for it after a crash. The registry makes one for each
//! client of a `copyonwrite` export.

use super::create::write;
use super::open::new_layer;
use super::shared::Storage;
use super::{Error, Image};
use crate::qcow2::compress::Compression;
use crate::qcow2::create::{NewImage, lay_out};
use crate::qcow2::layout::{Layout, MAX_CLUSTER_BITS};
use nix::libc;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where layers over block devices are kept: nothing is kept in the directory of a device.
const DIRECTORY_FOR_DEVICES: &str = "/var/tmp";
/// Clusters of 64 KiB, as far as the disk can be described with them.
const CLUSTER_BITS: u32 = 16;
/// Refcounts of 16 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Other names that are tried where the file system cannot make a file without one.
const NAMES: usize = 16;

/// How a temporary layer is kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options<'a> {
    /// Where; `None`: see [`directory`].
    pub directory: Option<&'a Path>,
    /// How it packs compressed clusters, if any are written.
    pub compression: Option<Compression>,
    /// Memory for its cached tables, in bytes, as in [`super::OpenOptions`].
    pub cache_bytes: Option<u64>,
}

/// Where a temporary layer over an image is kept by default: in the image's directory; for devices in `/var/tmp`.
pub fn directory(base: &Image) -> PathBuf {
    // the layer below an internal snapshot is kept where its image is
    match (&base.layers[0].storage, base.path().parent()) {
        (Storage::File { device: None, .. }, Some(dir)) if dir.as_os_str().is_empty() => PathBuf::from("."),
        (Storage::File { device: None, .. }, Some(dir)) => dir.to_owned(),
        _ => PathBuf::from(DIRECTORY_FOR_DEVICES),
    }
}

/// A temporary image that begins as `base`. Writing it changes nothing of `base`, which nobody can write as long as the
/// new image is open. Runs on a worker.
pub async fn over(base: &Arc<Image>, options: Options<'_>) -> Result<Image, Error> {
    let still = base.hold_still()?;
    let dir = options.directory.map_or_else(|| directory(base), Path::to_owned);
    let failed = |source| Error::Scratch { dir: dir.clone(), source };
    // only for messages: the file has no name
    let path = dir.join(format!("temporary layer over {}", base.path().display().to_string().replace('/', "_")));
    let compression = options.compression.unwrap_or(Compression::Zlib);
    let lay_out =
        |bits| lay_out(&NewImage { compression, ..NewImage::new(Layout::plain(3, bits, REFCOUNT_ORDER), base.size()) });
    let pieces = (CLUSTER_BITS..MAX_CLUSTER_BITS).find_map(|bits| lay_out(bits).ok());
    let refuse = |why| Error::Create { path: path.clone(), why };
    let pieces = pieces.map_or_else(|| lay_out(MAX_CLUSTER_BITS), Ok).map_err(refuse)?;
    let file = nameless(&dir).map_err(failed)?;
    write(&file, &pieces).map_err(failed)?;
    let top = new_layer(file, path, base.size(), options.cache_bytes).await?;
    Ok(Image::over(still, top))
}

/// A file that ends with its last descriptor.
fn nameless(dir: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_CLOEXEC).open(dir) {
        // EISDIR: a kernel or file system that does not know the flag
        Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {}
        answer => return answer,
    }
    named_for_a_moment(dir, &options)
}

fn named_for_a_moment(dir: &Path, options: &std::fs::OpenOptions) -> io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut last = io::ErrorKind::AlreadyExists.into();
    for _ in 0..NAMES {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".cowgate-{}-{number}.tmp", std::process::id()));
        match options.clone().create_new(true).open(&path) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockDev;
    use crate::image::{Disk, Format, Gate, Opener};
    use crate::pagebuf::PageBuf;
    use crate::ring;
    use crate::units::GuestOffset;

    async fn open(path: &Path) -> Arc<Image> {
        Arc::new(Opener::new(path).unwrap().open(Format::Raw, &Gate::new(None)).await.unwrap())
    }

    #[test]
    fn what_is_written_is_seen_here_only_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        // no whole sectors, no whole clusters
        let content: Vec<u8> = (0..300_001u32).map(|i| i as u8).collect();
        std::fs::write(&path, &content).unwrap();
        ring::run(async {
            let base = open(&path).await;
            let mut disks = Vec::new();
            for _ in 0..2 {
                disks.push(Disk::open(Arc::new(over(&base, Options::default()).await.unwrap()), true).unwrap());
            }
            for (disk, byte) in disks.iter().zip([1u8, 2]) {
                let (result, _) = disk.write(GuestOffset(299_990), PageBuf::copy_of(&[byte; 11])).await;
                result.unwrap();
                disk.flush().await.unwrap();
            }
            for (disk, byte) in disks.iter().zip([1u8, 2]) {
                assert_eq!(disk.image().size(), 300_001);
                let (result, all) = disk.read(GuestOffset(0), PageBuf::new(300_001)).await;
                result.unwrap();
                assert!(all[..299_990] == content[..299_990] && all[299_990..].iter().all(|&b| b == byte));
            }
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        })
        .unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), content);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_image_below_is_not_written_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, [0; 512]).unwrap();
        ring::run(async {
            let base = open(&path).await;
            let layer = over(&base, Options::default()).await.unwrap();
            assert!(matches!(base.begin_writing(), Err(Error::Busy { .. })));
            drop(layer);
            base.begin_writing().unwrap();
            assert!(matches!(over(&base, Options::default()).await, Err(Error::Busy { .. })));
            base.writer_left();
            base.end_writing();
            over(&base, Options::default()).await.unwrap();
        })
        .unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        std::fs::write(&path, [0; 512]).unwrap();
        ring::run(async {
            let base = open(&path).await;
            let nowhere = dir.path().join("nowhere");
            let options = Options { directory: Some(&nowhere), ..Options::default() };
            let said = over(&base, options).await.err().unwrap().to_string();
            assert!(said.starts_with(&nowhere.display().to_string()) && said.contains("`cowdir`"), "{said}");
            base.begin_writing().unwrap(); // a failure holds nothing
        })
        .unwrap();
    }

    #[test]
    fn where_files_need_names_they_keep_them_for_a_moment() {
        let dir = tempfile::tempdir().unwrap();
        let file = named_for_a_moment(dir.path(), File::options().read(true).write(true)).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        file.set_len(10).unwrap();
    }
}
