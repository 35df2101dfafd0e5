//! The image header: parsed once into a value that is valid, or refused by field, value and remedy.

use super::compress::Compression;
use super::layout::{
    Layout, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFTABLE_BYTES, MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
};
use super::snapshot::MAX_SNAPSHOTS;
use crate::units::HostOffset;
use thiserror::Error;

/// `QFI\xfb`.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes that [`Header::first_cluster`] needs.
pub const PEEK_BYTES: usize = 24;
/// Longest backing file name, in bytes.
pub const MAX_BACKING_NAME: u32 = 1023;
/// Length of a version 3 header without additional fields.
const V3_LENGTH: u32 = 104;
const V2_LENGTH: u32 = 72;

/// Byte positions of header fields that change after an image was made.
pub mod field {
    /// `l1_size` (4 bytes) and `l1_table_offset` (8 bytes).
    pub const L1: u64 = 36;
    /// `refcount_table_offset` (8 bytes) and `refcount_table_clusters` (4 bytes).
    pub const REFTABLE: u64 = 48;
    /// `size` (8 bytes): the virtual size.
    pub const SIZE: u64 = 24;
    /// `incompatible_features` (8 bytes).
    pub const INCOMPATIBLE: u64 = 72;
    /// `autoclear_features` (8 bytes).
    pub const AUTOCLEAR: u64 = 88;
}

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be wrong.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data is in an external data file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// `compression_type` is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// What we know.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent with the disk.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image of the disk by itself.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// Types of header extensions.
pub mod extension {
    /// End of the extensions.
    pub const END: u32 = 0;
    /// Format of the backing file.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Where the bitmap directory is.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// A header we can work with.
#[derive(Clone, Debug)]
pub struct Header {
    /// Version, cluster size, refcount width.
    pub layout: Layout,
    /// Virtual size in bytes.
    pub size: u64,
    /// Active L1 table.
    pub l1_offset: HostOffset,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Refcount table.
    pub reftable_offset: HostOffset,
    /// Clusters the refcount table occupies.
    pub reftable_clusters: u32,
    /// Snapshot table.
    pub snapshots_offset: HostOffset,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// How compressed clusters are packed.
    pub compression: Compression,
    /// Name of the backing file as stored: bytes, not necessarily UTF-8.
    pub backing_file: Option<Vec<u8>>,
    /// Its declared format.
    pub backing_format: Option<String>,
    /// Refcounts may be wrong: the image was not closed.
    pub dirty: bool,
    /// Marked corrupt: not to be written.
    pub corrupt: bool,
    /// Compatible feature: lazy refcounts may be used.
    pub lazy_refcounts: bool,
    /// Autoclear feature bits as stored.
    pub autoclear: u64,
    /// Name of the external data file as stored, when the image has one and names it.
    pub data_file: Option<Vec<u8>>,
    /// The bitmaps extension, whether or not its autoclear bit vouches for it.
    pub bitmaps: Option<BitmapsExtension>,
}

/// The bitmaps extension as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Size of the bitmap directory in bytes.
    pub directory_bytes: u64,
    /// Start of the bitmap directory.
    pub directory_offset: HostOffset,
}

/// Why a header is refused. The caller adds the path.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// No QCOW2 magic.
    #[error("not a QCOW2 image: it begins with {0:02x?}, not with \"QFI\\xfb\"; set `format = raw` to serve it as raw")]
    Magic([u8; 4]),
    /// The file ends inside the header.
    #[error("header: the file ends after {have} bytes, {need} are needed; the image is truncated")]
    Truncated {
        /// Bytes there are.
        have: u64,
        /// Bytes the header says there must be.
        need: u64,
    },
    /// A field holds a value that cannot be.
    #[error("header field {field} is {value}: {why}")]
    Field {
        /// Name in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
        /// What is allowed.
        why: String,
    },
    /// A feature we do not have.
    #[error("uses {feature}, which is not supported; {remedy}")]
    Unsupported {
        /// The feature's name.
        feature: String,
        /// What the user can do.
        remedy: &'static str,
    },
    /// A header extension is malformed.
    #[error("header extension {id:#010x} at byte {at}: {why}")]
    Extension {
        /// Its type.
        id: u32,
        /// Where it begins.
        at: u64,
        /// What is wrong.
        why: &'static str,
    },
}

const CONVERT: &str = "convert it with `qemu-img convert -O qcow2`";

impl Header {
    /// How many bytes [`Header::parse`] needs, from the first [`PEEK_BYTES`] of the file: one cluster.
    pub fn first_cluster(peek: &[u8]) -> Result<u64, HeaderError> {
        let r = Fields(peek);
        r.need(PEEK_BYTES as u64)?;
        let magic: [u8; 4] = peek[..4].try_into().expect("four bytes");
        if magic != MAGIC {
            return Err(HeaderError::Magic(magic));
        }
        let version = r.be32(4);
        if !(2..=3).contains(&version) {
            return Err(refuse("version", version, "versions 2 and 3 exist".into()));
        }
        let bits = r.be32(20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
            return Err(refuse("cluster_bits", bits, format!("{MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS} are allowed")));
        }
        Ok(1 << bits)
    }

    /// Parses the first cluster of an image (less, when the file is shorter).
    pub fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
        let cluster = Self::first_cluster(bytes)?;
        let bytes = &bytes[..bytes.len().min(cluster as usize)];
        let r = Fields(bytes);
        r.need(u64::from(V2_LENGTH))?;
        let version = r.be32(4);
        let v3 = version >= 3;
        if v3 {
            r.need(u64::from(V3_LENGTH))?;
        }
        let header_length = if v3 { r.be32(100) } else { V2_LENGTH };
        if v3 && (header_length < V3_LENGTH || header_length % 8 != 0 || u64::from(header_length) > cluster) {
            let why = format!("a multiple of 8 from {V3_LENGTH} to one cluster is allowed");
            return Err(refuse("header_length", header_length, why));
        }
        r.need(u64::from(header_length))?;
        let extensions = parse_extensions(bytes, header_length, r.be64(8))?;

        let features = if v3 { r.be64(field::INCOMPATIBLE as usize) } else { 0 };
        check_features(features, r.be32(32), &extensions)?;
        let refcount_order = if v3 { r.be32(96) } else { 4 };
        if refcount_order > 6 {
            return Err(refuse("refcount_order", refcount_order, "at most 6 (64-bit refcounts) is allowed".into()));
        }
        let layout = Layout {
            version,
            cluster_bits: cluster.trailing_zeros(),
            refcount_order,
            extended_l2: features & incompatible::EXTENDED_L2 != 0,
            data_file: features & incompatible::DATA_FILE != 0,
        };
        if layout.extended_l2 && layout.cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            let why = format!("extended L2 entries need at least {MIN_EXTENDED_CLUSTER_BITS}");
            return Err(refuse("cluster_bits", layout.cluster_bits, why));
        }

        let header = Header {
            layout,
            size: r.be64(24),
            l1_entries: r.be32(36),
            l1_offset: HostOffset(r.be64(40)),
            reftable_offset: HostOffset(r.be64(48)),
            reftable_clusters: r.be32(56),
            snapshots: r.be32(60),
            snapshots_offset: HostOffset(r.be64(64)),
            compression: compression(features, header_length, bytes)?,
            backing_file: backing_file(&r, cluster)?,
            backing_format: extensions.backing_format,
            dirty: features & incompatible::DIRTY != 0,
            corrupt: features & incompatible::CORRUPT != 0,
            lazy_refcounts: v3 && r.be64(80) & 1 != 0,
            autoclear: if v3 { r.be64(88) } else { 0 },
            data_file: extensions.data_file.filter(|_| layout.data_file),
            bitmaps: extensions.bitmaps,
        };
        header.check_tables()?;
        header.check_data_file()?;
        Ok(header)
    }

    /// Whether the external data file is a raw image by itself, and has to stay one.
    pub fn raw_data_file(&self) -> bool {
        self.layout.data_file && self.autoclear & autoclear::RAW_DATA_FILE != 0
    }

    fn check_data_file(&self) -> Result<(), HeaderError> {
        if !self.layout.data_file {
            return Ok(());
        }
        if self.snapshots > 0 {
            let why = "an image with an external data file has no snapshots".to_owned();
            return Err(refuse("nb_snapshots", self.snapshots, why));
        }
        if self.raw_data_file() && self.backing_file.is_some() {
            let why = "a raw external data file and a backing file exclude each other".to_owned();
            return Err(refuse("autoclear_features", self.autoclear, why));
        }
        Ok(())
    }

    /// Whether the tables' places and sizes are possible.
    pub fn check_tables(&self) -> Result<(), HeaderError> {
        let layout = self.layout;
        if layout.l1_entries_for(self.size).saturating_mul(8) > MAX_L1_BYTES {
            let max = MAX_L1_BYTES / 8 * layout.l2_coverage();
            return Err(refuse("size", self.size, format!("at most {max} bytes with this cluster size are allowed")));
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1_BYTES {
            return Err(refuse(
                "l1_size",
                self.l1_entries,
                format!("at most {} entries are allowed", MAX_L1_BYTES / 8),
            ));
        }
        let reftable_bytes = u64::from(self.reftable_clusters) * layout.cluster();
        if reftable_bytes == 0 || reftable_bytes > MAX_REFTABLE_BYTES {
            let why = format!("1 to {} clusters are allowed", MAX_REFTABLE_BYTES / layout.cluster());
            return Err(refuse("refcount_table_clusters", self.reftable_clusters, why));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(refuse("nb_snapshots", self.snapshots, format!("at most {MAX_SNAPSHOTS} are allowed")));
        }
        let tables = [
            ("l1_table_offset", self.l1_offset, self.l1_entries > 0),
            ("refcount_table_offset", self.reftable_offset, true),
            ("snapshots_offset", self.snapshots_offset, self.snapshots > 0),
        ];
        for (name, at, used) in tables {
            if used && (at.0 == 0 || at.0 % layout.cluster() != 0 || at.0 >= MAX_HOST_OFFSET) {
                let why = format!("a multiple of the cluster size ({}) below 2^56 is needed", layout.cluster());
                return Err(refuse(name, at.0, why));
            }
        }
        Ok(())
    }
}

fn refuse(field: &'static str, value: impl Into<u64>, why: String) -> HeaderError {
    HeaderError::Field { field, value: value.into(), why }
}

/// Big endian fields; every read is behind a `need`.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn need(&self, need: u64) -> Result<(), HeaderError> {
        let have = self.0.len() as u64;
        if have < need { Err(HeaderError::Truncated { have, need }) } else { Ok(()) }
    }
    fn be32(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.0[at..at + 4].try_into().expect("four bytes"))
    }
    fn be64(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.0[at..at + 8].try_into().expect("eight bytes"))
    }
}

#[derive(Default)]
struct Extensions {
    backing_format: Option<String>,
    data_file: Option<Vec<u8>>,
    bitmaps: Option<BitmapsExtension>,
    /// (feature type, bit, name)
    names: Vec<(u8, u8, String)>,
}

fn parse_extensions(bytes: &[u8], start: u32, backing_offset: u64) -> Result<Extensions, HeaderError> {
    let mut found = Extensions::default();
    // the backing file name, when there is one, follows the extensions in the same cluster
    let end = match backing_offset {
        0 => bytes.len(),
        at => bytes.len().min(usize::try_from(at).unwrap_or(usize::MAX)),
    };
    let mut at = start as usize;
    while at + 8 <= end {
        let r = Fields(bytes);
        let (id, len) = (r.be32(at), r.be32(at + 4) as usize);
        if id == extension::END {
            break;
        }
        let error = |why| HeaderError::Extension { id, at: at as u64, why };
        let data = at + 8;
        if len > end - data {
            return Err(error("its length runs past the first cluster"));
        }
        let data = &bytes[data..data + len];
        match id {
            extension::BACKING_FORMAT => {
                let name = std::str::from_utf8(data).map_err(|_| error("the format name is not UTF-8"))?;
                found.backing_format = Some(name.trim_end_matches('\0').to_owned());
            }
            extension::FEATURE_NAMES => {
                for entry in data.chunks_exact(48) {
                    let text = entry[2..].split(|&b| b == 0).next().unwrap_or_default();
                    found.names.push((entry[0], entry[1], String::from_utf8_lossy(text).into_owned()));
                }
            }
            extension::DATA_FILE => found.data_file = Some(data.to_vec()),
            extension::BITMAPS => {
                if len != 24 {
                    return Err(error("the bitmaps extension is 24 bytes long"));
                }
                let r = Fields(data);
                found.bitmaps = Some(BitmapsExtension {
                    count: r.be32(0),
                    directory_bytes: r.be64(8),
                    directory_offset: HostOffset(r.be64(16)),
                });
            }
            _ => {} // compatible by definition
        }
        at = (at + 8 + len).next_multiple_of(8);
    }
    Ok(found)
}

fn check_features(bits: u64, crypt_method: u32, extensions: &Extensions) -> Result<(), HeaderError> {
    let unsupported = |feature: &str, remedy| Err(HeaderError::Unsupported { feature: feature.to_owned(), remedy });
    match crypt_method {
        0 => {}
        1 => return unsupported("AES encryption (crypt_method 1)", CONVERT),
        2 => return unsupported("LUKS encryption (crypt_method 2)", "decrypt it with `qemu-img convert`"),
        n => return Err(refuse("crypt_method", n, "0 (none) is supported".into())),
    }
    let unknown = bits & !incompatible::KNOWN;
    if unknown != 0 {
        let bit = unknown.trailing_zeros() as u8;
        let name = extensions.names.iter().find(|(kind, b, _)| *kind == 0 && *b == bit).map(|(_, _, name)| name);
        let feature = match name {
            Some(name) => format!("\"{name}\" (incompatible feature bit {bit})"),
            None => format!("incompatible feature bit {bit}"),
        };
        return unsupported(&feature, CONVERT);
    }
    Ok(())
}

fn compression(features: u64, header_length: u32, bytes: &[u8]) -> Result<Compression, HeaderError> {
    let kind = if header_length > V3_LENGTH { bytes[V3_LENGTH as usize] } else { 0 };
    let flagged = features & incompatible::COMPRESSION != 0;
    match (flagged, kind) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (true, 0) | (false, _) => Err(refuse(
            "compression_type",
            kind,
            "it contradicts incompatible feature bit 3; the header is broken".into(),
        )),
        (true, _) => Err(refuse("compression_type", kind, "0 (zlib) and 1 (zstd) are supported".into())),
    }
}

fn backing_file(r: &Fields<'_>, cluster: u64) -> Result<Option<Vec<u8>>, HeaderError> {
    let (at, len) = (r.be64(8), r.be32(16));
    if at == 0 {
        return Ok(None);
    }
    if len == 0 || len > MAX_BACKING_NAME {
        return Err(refuse("backing_file_size", len, format!("1 to {MAX_BACKING_NAME} bytes are allowed")));
    }
    if at > cluster || at + u64::from(len) > cluster {
        return Err(refuse("backing_file_offset", at, "the name must end within the first cluster".into()));
    }
    r.need(at + u64::from(len))?;
    Ok(Some(r.0[at as usize..at as usize + len as usize].to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::create::{NewImage, lay_out};

    fn fresh() -> Vec<u8> {
        let backing = Some((b"base.qcow2".to_vec(), "qcow2".to_owned()));
        let new = NewImage { backing, ..NewImage::new(Layout::plain(3, 16, 4), 1 << 30) };
        lay_out(&new).unwrap().remove(0).1
    }

    fn patched(at: usize, bytes: &[u8]) -> Result<Header, HeaderError> {
        let mut image = fresh();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        Header::parse(&image)
    }

    #[track_caller]
    fn refused(at: usize, bytes: &[u8], words: &str) {
        let text = patched(at, bytes).expect_err("must be refused").to_string();
        assert!(text.contains(words), "{text:?} should say {words:?}");
    }

    #[test]
    fn a_fresh_header_parses() {
        let h = Header::parse(&fresh()).unwrap();
        assert_eq!(h.size, 1 << 30);
        assert_eq!(h.backing_file.as_deref(), Some(&b"base.qcow2"[..]));
        assert_eq!(h.backing_format.as_deref(), Some("qcow2"));
        assert_eq!(h.l1_entries, 2);
        assert!(!h.dirty && !h.corrupt);
    }

    #[test]
    fn each_field_is_refused_by_name() {
        refused(0, b"QFI\0", "not a QCOW2 image");
        refused(4, &4u32.to_be_bytes(), "version is 4");
        refused(20, &8u32.to_be_bytes(), "cluster_bits is 8");
        refused(20, &22u32.to_be_bytes(), "cluster_bits is 22");
        refused(24, &u64::MAX.to_be_bytes(), "size is");
        refused(32, &1u32.to_be_bytes(), "AES");
        refused(32, &2u32.to_be_bytes(), "LUKS");
        refused(32, &3u32.to_be_bytes(), "crypt_method is 3");
        refused(36, &u32::MAX.to_be_bytes(), "l1_size");
        refused(40, &513u64.to_be_bytes(), "l1_table_offset is 513");
        refused(40, &(1u64 << 56).to_be_bytes(), "l1_table_offset");
        refused(48, &0u64.to_be_bytes(), "refcount_table_offset");
        refused(56, &0u32.to_be_bytes(), "refcount_table_clusters is 0");
        refused(56, &u32::MAX.to_be_bytes(), "refcount_table_clusters");
        refused(60, &u32::MAX.to_be_bytes(), "nb_snapshots");
        refused(72, &(1u64 << 40).to_be_bytes(), "incompatible feature bit 40");
        refused(72, &8u64.to_be_bytes(), "compression_type is 0");
        refused(96, &7u32.to_be_bytes(), "refcount_order is 7");
        refused(100, &96u32.to_be_bytes(), "header_length is 96");
        refused(100, &108u32.to_be_bytes(), "header_length is 108");
        refused(100, &u32::MAX.to_be_bytes(), "header_length");
        refused(16, &1024u32.to_be_bytes(), "backing_file_size is 1024");
        refused(8, &u64::MAX.to_be_bytes(), "backing_file_offset");
        assert!(matches!(Header::parse(&fresh()[..50]), Err(HeaderError::Truncated { .. })));
        assert!(matches!(Header::parse(&fresh()[..90]), Err(HeaderError::Truncated { .. })));
    }

    #[test]
    fn an_unknown_feature_is_named_by_the_table() {
        let mut image = fresh();
        image[72..80].copy_from_slice(&(1u64 << 9).to_be_bytes());
        let at = image[104..].windows(4).position(|w| w == extension::FEATURE_NAMES.to_be_bytes()).unwrap() + 104;
        image[at + 8] = 0;
        image[at + 9] = 9;
        image[at + 10..at + 15].copy_from_slice(b"warp\0");
        assert!(Header::parse(&image).unwrap_err().to_string().contains("\"warp\" (incompatible feature bit 9)"));
    }

    #[test]
    fn an_extension_longer_than_the_cluster_is_refused() {
        let mut image = fresh();
        let len = u32::from_be_bytes(image[100..104].try_into().unwrap()) as usize;
        image[len + 4..len + 8].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(matches!(Header::parse(&image), Err(HeaderError::Extension { .. })));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(noise in proptest::collection::vec((0usize..1200, proptest::num::u8::ANY), 0..12)) {
            let mut image = fresh();
            for (at, byte) in noise {
                image[at] = byte;
            }
            let _ = Header::parse(&image);
        }
    }
}
