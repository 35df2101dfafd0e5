//! What is at a place where a new image shall be: nothing, an image that holds no data yet, or something else.
//!
//! Called by `cowgate backup begin`, which takes over an image that an earlier call has made. Nothing is locked, nothing
//! that the image names is opened, and a snapshot of an image that is being written may say "holds data" too early,
//! never too late: a table that is being changed is not empty.

use super::shared::locked;
use super::{Error, Opener, lock, reading};
use crate::pagebuf::PageBuf;
use crate::qcow2::Header;
use crate::ring;
use crate::units::HostOffset;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Tables are read in pieces of this many bytes.
const PIECE: u64 = 64 << 10;

/// An image as its header and L1 table have it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// Backing file as stored.
    pub backing: Option<PathBuf>,
    /// Its format as stored.
    pub backing_format: Option<String>,
    /// Nothing was written to it: no cluster is allocated, and it has no snapshots and no data file.
    pub blank: bool,
}

/// Looks at a QCOW2 image. `None`: there is no file.
pub fn find(path: &Path) -> Result<Option<Found>, Error> {
    match path.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        _ => {}
    }
    let opener = Opener::new(path)?;
    let work = async {
        let header = opener.parse_header().await?;
        let blank = header.snapshots == 0 && header.data_file.is_none() && !header.layout.data_file;
        let blank = blank && is_empty(&opener.ring_file()?, &header, path).await?;
        let text = |bytes: Vec<u8>| PathBuf::from(OsString::from_vec(bytes));
        Ok(Found {
            size: header.size,
            cluster_size: header.layout.cluster(),
            backing: header.backing_file.map(text),
            backing_format: header.backing_format,
            blank,
        })
    };
    reading::run(path, work).map(Some)
}

/// Removes an image that an attempt has made in vain. `false`: it stays, since something was written to it.
pub fn remove(path: &Path) -> Result<bool, Error> {
    let file = File::open(path).map_err(Error::io(path, "open it"))?;
    // nobody else has it while it is looked at
    let taken = lock::share(&file).and_then(|()| lock::add_write(&file));
    taken.map_err(|refused| locked(path, refused).of_a_command())?;
    if !find(path)?.is_some_and(|found| found.blank) {
        return Ok(false);
    }
    std::fs::remove_file(path).map_err(Error::io(path, "remove it"))?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    File::open(directory).and_then(|d| d.sync_all()).map_err(Error::io(directory, "sync it"))?;
    Ok(true)
}

/// Whether no entry of the L1 table is used.
async fn is_empty(file: &ring::File, header: &Header, path: &Path) -> Result<bool, Error> {
    let end = header.l1_offset.0 + u64::from(header.l1_entries) * 8;
    let mut at = header.l1_offset.0;
    while at < end {
        let len = (end - at).min(PIECE);
        let (result, buf) = file.read(HostOffset(at), PageBuf::new(len as usize)).await;
        result.map_err(|e| Error::io(path, "read its L1 table")(e.into()))?;
        if buf.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::create::{CreateOptions, create};
    use std::os::unix::fs::FileExt;

    #[test]
    fn an_image_is_blank_until_it_is_written() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("a.qcow2");
        assert_eq!(find(&path).expect("looked"), None);
        let options = CreateOptions {
            path: path.clone(),
            size: Some(1 << 40),
            features: Default::default(),
            backing: None,
            data_file: None,
            data_file_raw: false,
            force: false,
        };
        create(&options).expect("created");
        let names: Vec<_> =
            std::fs::read_dir(dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert_eq!(names, ["a.qcow2"]);
        let found = find(&path).expect("looked").expect("there");
        assert!(found.blank && found.size == 1 << 40 && found.backing.is_none(), "{found:?}");
        // its last L1 entry
        let file = File::options().write(true).open(&path).expect("open");
        let l1_bytes = (1 << 40) / (64 << 10) / 8192 * 8;
        let l1_at = {
            let mut raw = [0; 8];
            File::open(&path).and_then(|f| f.read_exact_at(&mut raw, 40)).expect("header");
            u64::from_be_bytes(raw)
        };
        file.write_all_at(&[1], l1_at + l1_bytes - 1).expect("write");
        assert!(!find(&path).expect("looked").expect("there").blank);
        assert!(!remove(&path).expect("looked") && path.exists());
        file.write_all_at(&[0], l1_at + l1_bytes - 1).expect("write");
        assert!(remove(&path).expect("removed") && !path.exists());
        std::fs::write(&path, b"something else").expect("write");
        assert!(find(&path).is_err());
    }
}
