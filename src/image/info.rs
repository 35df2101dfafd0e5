//! `cowgate image info`: what an image says about itself, without opening what it names.

use super::bitmap_edit::{BitmapInfo, listed};
use super::open::Opener;
use super::{Error, Format};
use crate::qcow2::header::MAGIC;
use crate::ring;
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A description of an image, with the keys of `qemu-img info --output=json` where it has them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file.
    pub filename: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk in bytes.
    pub virtual_size: u64,
    /// Storage the file occupies, in bytes.
    pub actual_size: u64,
    /// Cluster size in bytes (QCOW2).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Backing file name as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// Backing file format as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The image was not closed: its refcounts may be wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_flag: Option<bool>,
    /// Internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
}

/// One internal snapshot.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Unique ID.
    pub id: String,
    /// Name.
    pub name: String,
    /// Size of the VM state in bytes.
    pub vm_state_size: u64,
    /// Seconds since the epoch.
    pub date_sec: u32,
}

/// Details of a QCOW2 image.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum FormatSpecific {
    /// A QCOW2 image.
    Qcow2(Qcow2Info),
}

/// Details of a QCOW2 image.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` for version 2, `1.1` for version 3, as QEMU names them.
    pub compat: &'static str,
    /// How compressed clusters are packed.
    pub compression_type: &'static str,
    /// Lazy refcounts may be used.
    pub lazy_refcounts: bool,
    /// Persistent dirty bitmaps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
    /// Why the bitmaps cannot be listed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bitmaps_error: Option<String>,
    /// Refcount width in bits.
    pub refcount_bits: u32,
    /// Marked corrupt.
    pub corrupt: bool,
    /// L2 entries have subclusters.
    pub extended_l2: bool,
    /// External data file as stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether the external data file is a raw image by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
}

/// Describes an image. `format`: as declared; `None`: QCOW2 when the file begins like one, else raw. That guess is
/// harmless here, where nothing the image names is opened.
pub fn info(path: &Path, format: Option<Format>) -> Result<ImageInfo, Error> {
    let opener = Opener::new(path)?;
    let file = File::open(path).map_err(Error::io(path, "open it"))?;
    let format = match format {
        Some(format) => format,
        None => {
            let mut magic = [0; 4];
            let read = file.read_at(&mut magic, 0).map_err(Error::io(path, "read it"))?;
            if read == 4 && magic == MAGIC { Format::Qcow2 } else { Format::Raw }
        }
    };
    let actual_size = file.metadata().map_err(Error::io(path, "examine it"))?.blocks() * 512;
    let mut info = ImageInfo {
        filename: path.to_owned(),
        format,
        virtual_size: opener.len(),
        actual_size,
        cluster_size: None,
        backing_filename: None,
        backing_filename_format: None,
        dirty_flag: None,
        snapshots: Vec::new(),
        format_specific: None,
    };
    if format == Format::Raw {
        return Ok(info);
    }
    let read = async {
        let parsed = opener.parse().await?;
        let bitmaps = listed(&opener, &parsed.header).await;
        Ok((parsed, bitmaps))
    };
    let (parsed, bitmaps) = ring::run(read).map_err(Error::io(path, "start reading it"))??;
    let (bitmaps, bitmaps_error) = match bitmaps {
        Ok(bitmaps) => (bitmaps, None),
        Err(why) => (Vec::new(), Some(why)),
    };
    let header = parsed.header;
    let raw_data_file = header.raw_data_file();
    info.virtual_size = header.size;
    info.cluster_size = Some(header.layout.cluster());
    info.backing_filename = header.backing_file.map(|name| String::from_utf8_lossy(&name).into_owned());
    info.backing_filename_format = header.backing_format;
    info.dirty_flag = Some(header.dirty);
    info.snapshots = parsed
        .snapshots
        .into_iter()
        .map(|s| SnapshotInfo { id: s.id, name: s.name, vm_state_size: s.vm_state_bytes, date_sec: s.date_seconds })
        .collect();
    info.format_specific = Some(FormatSpecific::Qcow2(Qcow2Info {
        compat: if header.layout.version == 2 { "0.10" } else { "1.1" },
        compression_type: header.compression.name(),
        lazy_refcounts: header.lazy_refcounts,
        bitmaps,
        bitmaps_error,
        refcount_bits: 1 << header.layout.refcount_order,
        corrupt: header.corrupt,
        extended_l2: header.layout.extended_l2,
        data_file_raw: header.layout.data_file.then_some(raw_data_file),
        data_file: header.data_file.map(|name| String::from_utf8_lossy(&name).into_owned()),
    }));
    Ok(info)
}
