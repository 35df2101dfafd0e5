//! The bytes of a new, empty image.

use super::compress::Compression;
use super::header::{MAGIC, MAX_BACKING_NAME, autoclear, extension as ext, incompatible};
use super::layout::{Layout, MAX_L1_BYTES, MIN_EXTENDED_CLUSTER_BITS};

/// What a new image shall be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Version, cluster size, refcount width.
    pub layout: Layout,
    /// Virtual size in bytes.
    pub size: u64,
    /// Backing file name as it is to be stored, and its format.
    pub backing: Option<(Vec<u8>, String)>,
    /// How compressed clusters will be packed.
    pub compression: Compression,
    /// Whether refcounts may be written late.
    pub lazy_refcounts: bool,
    /// External data file.
    pub data_file: Option<DataFile>,
}

/// The external data file of a new image.
#[derive(Clone, Debug)]
pub struct DataFile {
    /// Its name as it is to be stored.
    pub name: Vec<u8>,
    /// It is to be a raw image of the disk by itself at all times; it has to read as zeroes now.
    pub raw: bool,
}

impl NewImage {
    /// An image without anything special. `layout.data_file` follows from [`NewImage::data_file`].
    pub fn new(layout: Layout, size: u64) -> NewImage {
        let compression = Compression::Zlib;
        NewImage { layout, size, backing: None, compression, lazy_refcounts: false, data_file: None }
    }

    /// Refuses wishes that contradict each other.
    fn check(&self) -> Result<(), String> {
        let layout = self.layout;
        let plain_refcounts = layout.refcount_order == 4;
        let needs_version_3 = [
            (layout.extended_l2, "extended L2 entries need"),
            (!plain_refcounts, "refcounts of a width other than 16 bits need"),
            (self.lazy_refcounts, "lazy refcounts need"),
            (self.compression != Compression::Zlib, "compression other than zlib needs"),
            (self.data_file.is_some(), "an external data file needs"),
        ];
        if layout.version < 3
            && let Some((_, what)) = needs_version_3.iter().find(|(wanted, _)| *wanted)
        {
            return Err(format!("{what} compatibility level v3 (1.1)"));
        }
        if layout.extended_l2 && layout.cluster_bits < MIN_EXTENDED_CLUSTER_BITS {
            let least = 1 << MIN_EXTENDED_CLUSTER_BITS;
            return Err(format!("extended L2 entries need a cluster size of at least {least}"));
        }
        let Some(data_file) = &self.data_file else { return Ok(()) };
        if data_file.raw && self.backing.is_some() {
            return Err("a raw external data file and a backing file exclude each other".to_owned());
        }
        Ok(())
    }
}

/// Bit of `compatible_features`.
const LAZY_REFCOUNTS: u64 = 1 << 0;

/// Names QEMU also writes, so that an older program can say what it does not know: (type, bit, name).
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// Lays out a new image: pieces to write as (offset in bytes, bytes), the header cluster first. Every piece is whole
/// clusters; what lies between them is not part of the image.
///
/// `Err` says which wish cannot be met and what is possible.
pub fn lay_out(new: &NewImage) -> Result<Vec<(u64, Vec<u8>)>, String> {
    new.check()?;
    let layout = new.layout;
    let cluster = layout.cluster();
    let l1_entries = layout.l1_entries_for(new.size);
    if l1_entries * 8 > MAX_L1_BYTES {
        let max = MAX_L1_BYTES / 8 * layout.l2_coverage();
        return Err(format!(
            "size {} is too large for clusters of {cluster} bytes: at most {max}; take a larger cluster size",
            new.size
        ));
    }
    let l1_clusters = layout.clusters_for(l1_entries * 8);
    // header, refcount table, refcount blocks, L1: the blocks count themselves, so grow until they cover everything
    let (mut reftable_clusters, mut blocks) = (1, 1);
    loop {
        let total = 1 + reftable_clusters + blocks + l1_clusters;
        let need_blocks = total.div_ceil(layout.refblock_entries());
        let need_table = layout.clusters_for(need_blocks * 8);
        if (need_blocks, need_table) == (blocks, reftable_clusters) {
            break;
        }
        (blocks, reftable_clusters) = (need_blocks.max(blocks), need_table.max(reftable_clusters));
    }
    let reftable_at = cluster;
    let blocks_at = reftable_at + reftable_clusters * cluster;
    let l1_at = blocks_at + blocks * cluster;
    let used = l1_at / cluster + l1_clusters;

    let mut reftable = vec![0; (reftable_clusters * cluster) as usize];
    for i in 0..blocks {
        reftable[i as usize * 8..][..8].copy_from_slice(&(blocks_at + i * cluster).to_be_bytes());
    }
    let mut refblocks = vec![0; (blocks * cluster) as usize];
    for i in 0..used {
        layout.set_refcount(&mut refblocks, i as usize, 1);
    }
    let header = header(new, l1_entries as u32, l1_at, reftable_at, reftable_clusters as u32)?;
    let mut pieces = vec![(0, header), (reftable_at, reftable), (blocks_at, refblocks)];
    if l1_clusters > 0 {
        pieces.push((l1_at, vec![0; (l1_clusters * cluster) as usize]));
    }
    Ok(pieces)
}

fn header(new: &NewImage, l1_entries: u32, l1_at: u64, reftable_at: u64, tables: u32) -> Result<Vec<u8>, String> {
    let layout = new.layout;
    let mut h = Vec::new();
    h.extend(MAGIC);
    h.extend(layout.version.to_be_bytes());
    h.extend([0; 12]); // backing file offset and size, filled below
    h.extend(layout.cluster_bits.to_be_bytes());
    h.extend(new.size.to_be_bytes());
    h.extend(0u32.to_be_bytes()); // crypt_method
    h.extend(l1_entries.to_be_bytes());
    h.extend(l1_at.to_be_bytes());
    h.extend(reftable_at.to_be_bytes());
    h.extend(tables.to_be_bytes());
    h.extend([0; 12]); // no snapshots
    if layout.version >= 3 {
        let zstd = new.compression == Compression::Zstd;
        let raw_data_file = new.data_file.as_ref().is_some_and(|d| d.raw);
        let flag = |set: bool, bit: u64| if set { bit } else { 0 };
        let incompatible = flag(new.data_file.is_some(), incompatible::DATA_FILE)
            | flag(zstd, incompatible::COMPRESSION)
            | flag(layout.extended_l2, incompatible::EXTENDED_L2);
        h.extend(incompatible.to_be_bytes());
        h.extend(flag(new.lazy_refcounts, LAZY_REFCOUNTS).to_be_bytes());
        h.extend(flag(raw_data_file, autoclear::RAW_DATA_FILE).to_be_bytes());
        h.extend(layout.refcount_order.to_be_bytes());
        h.extend(112u32.to_be_bytes()); // header_length
        h.extend([u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]); // compression_type, padding
    }
    if let Some((_, format)) = &new.backing {
        extension(&mut h, ext::BACKING_FORMAT, format.as_bytes());
    }
    if let Some(data_file) = &new.data_file {
        extension(&mut h, ext::DATA_FILE, &data_file.name);
    }
    if layout.version >= 3 {
        let mut names = Vec::new();
        for (kind, bit, name) in FEATURE_NAMES {
            let at = names.len();
            names.extend([kind, bit]);
            names.extend(name.as_bytes());
            names.resize(at + 48, 0);
        }
        // 512-byte clusters have no room for both the names and a long backing file name
        let backing_len = new.backing.as_ref().map_or(0, |(name, _)| name.len());
        if h.len() + 8 + names.len() + 8 + backing_len <= layout.cluster() as usize {
            extension(&mut h, ext::FEATURE_NAMES, &names);
        }
    }
    extension(&mut h, ext::END, &[]);
    if h.len() > layout.cluster() as usize {
        return Err(format!("the external data file's name is too long for clusters of {} bytes", layout.cluster()));
    }
    if let Some((name, _)) = &new.backing {
        let at = h.len();
        if name.is_empty() || name.len() > MAX_BACKING_NAME as usize || at + name.len() > layout.cluster() as usize {
            let room = (layout.cluster() as usize - at).min(MAX_BACKING_NAME as usize);
            return Err(format!("backing file name of {} bytes: 1 to {room} bytes fit the header", name.len()));
        }
        h[8..16].copy_from_slice(&(at as u64).to_be_bytes());
        h[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        h.extend(name);
    }
    h.resize(layout.cluster() as usize, 0);
    Ok(h)
}

fn extension(h: &mut Vec<u8>, id: u32, data: &[u8]) {
    h.extend(id.to_be_bytes());
    h.extend((data.len() as u32).to_be_bytes());
    h.extend(data);
    h.resize(h.len().next_multiple_of(8), 0);
}
