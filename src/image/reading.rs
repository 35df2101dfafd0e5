//! Opening an image for a command that reads it: the whole chain, or one of its snapshots.

use super::open::{Gate, Opener};
use super::{Disk, Error, Format};
use crate::pagebuf::PageBuf;
use crate::qcow2::header::MAGIC;
use crate::ring;
use crate::units::HostOffset;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Opens an image to be read by the user who runs the command. `format`: as declared; `None`: QCOW2 for a name that
/// ends in `.qcow2` or a file that begins like one, else raw.
///
/// A guest can make its raw disk begin like a QCOW2 image that names any file of the host: where only the content says
/// that it is one, an image that names other files is refused.
pub async fn open(path: &Path, format: Option<Format>, snapshot: Option<&str>) -> Result<Rc<Disk>, Error> {
    let opener = Opener::new(path)?;
    let by_name = path.extension().is_some_and(|e| e == "qcow2").then_some(Format::Qcow2);
    let format = match format.or(by_name) {
        Some(format) => format,
        None => guess(&opener, path).await?,
    };
    let gate = Gate::new(Some(vec!["/".into()]));
    let image = Arc::new(opener.open(format, &gate).await?);
    let image = match snapshot {
        None => image,
        Some(name) => Arc::new(image.snapshot(name, None).await?),
    };
    Disk::open(image, false)
}

async fn guess(opener: &Opener, path: &Path) -> Result<Format, Error> {
    let (read, magic) = opener.ring_file()?.read(HostOffset(0), PageBuf::new(MAGIC.len())).await;
    read.map_err(|e| Error::io(path, "read it")(e.into()))?;
    if magic[..] != MAGIC {
        return Ok(Format::Raw);
    }
    let header = opener.parse().await?.header;
    if header.backing_file.is_some() || header.data_file.is_some() {
        let why =
            "its content alone says that it is a QCOW2 image, and it names other files; say qcow2 or raw".to_owned();
        return Err(Error::Broken { path: path.to_owned(), why });
    }
    Ok(Format::Qcow2)
}

/// Runs a command's work on this thread. `path` is the image that an error names when there is no io_uring.
pub fn run<T>(path: &Path, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    ring::run(work).map_err(Error::io(path, "start reading it"))?.map_err(Error::of_a_command)
}
