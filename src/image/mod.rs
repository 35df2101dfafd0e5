//! Images: a chain of files opened, locked and read or written as one virtual disk.
//!
//! [`Image`] is what all threads share: the chain, each layer's metadata, the lock. [`Disk`] is one thread's hands:
//! its own file descriptors on its own ring. [`open`] walks the backing chain behind its gate, [`create`] makes new
//! images, [`info`] describes one, [`mod@check`] and [`repair`] find and mend errors. [`Device`] is what a client sees of
//! one disk or several, [`scratch`] a layer that is thrown away; [`recovery`]
//! keeps what was answered over the death of the process.

pub mod bitmap_edit;
mod bitmaps;
pub mod blank;
mod change;
pub mod check;
mod claim;
pub mod commit;
pub mod compare;
pub mod contexts;
pub mod convert;
pub mod create;
pub mod device;
mod direct;
mod disk;
mod error;
pub mod escapes;
pub mod flatten;
mod flush;
mod holders;
pub mod info;
pub mod lock;
pub mod map;
pub mod mountinfo;
pub mod open;
mod packing;
mod place;
mod raw;
pub mod reading;
pub mod rebase;
pub mod recovery;
pub mod repair;
pub mod resize;
pub mod scratch;
mod shared;
mod zero;

pub use device::Device;
pub use direct::{Direct, DirectRun, MAX_DIRECT_RUNS};
pub use disk::Disk;
pub use error::Error;
pub use open::{Gate, MIN_CACHE_BYTES, OpenOptions, Opener};
pub use shared::{FileId, Image, Layer};

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// Told about the progress of a long command: bytes of the disk done, and of all.
pub type Progress<'a> = &'a dyn Fn(u64, u64);

/// What an image file holds. Declared, never probed: a guest can write what looks like a header into a raw file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// A QCOW2 image.
    Qcow2,
    /// The bytes of the disk themselves: a file or a block device.
    Raw,
}

impl Format {
    /// The format of a file for which none is declared. Only its name counts: content is written by guests.
    pub fn by_name(path: &Path) -> Format {
        match path.extension() {
            Some(extension) if extension.eq_ignore_ascii_case("qcow2") => Format::Qcow2,
            _ => Format::Raw,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "qcow2" => Ok(Format::Qcow2),
            "raw" => Ok(Format::Raw),
            other => Err(format!("format {other:?} is not known; qcow2 and raw are")),
        }
    }
}
