//! The bytes of a new, empty image.

use super::header::{MAGIC, MAX_BACKING_NAME};
use super::layout::{Layout, MAX_L1_BYTES};

/// What a new image shall be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Version, cluster size, refcount width.
    pub layout: Layout,
    /// Virtual size in bytes.
    pub size: u64,
    /// Backing file name as it is to be stored, and its format.
    pub backing: Option<(Vec<u8>, String)>,
}

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
        h.extend([0; 24]); // no feature bits
        h.extend(layout.refcount_order.to_be_bytes());
        h.extend(112u32.to_be_bytes()); // header_length
        h.extend([0; 8]); // compression_type zlib, padding
    }
    if let Some((_, format)) = &new.backing {
        extension(&mut h, 0xe279_2aca, format.as_bytes());
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
            extension(&mut h, 0x6803_f857, &names);
        }
    }
    extension(&mut h, 0, &[]);
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
