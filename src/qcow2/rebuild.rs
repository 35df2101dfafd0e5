//! Rebuilding refcounts: a completely new refcount table and its blocks, beside the old ones.
//!
//! Nothing that is referred to is overwritten, so the image is what it was until the header points to the new table.

use super::check::Check;
use super::entry::{COMPRESSED, COPIED, OFFSET_MASK, RawEntry, ZERO};
use super::layout::{Layout, MAX_REFTABLE_BYTES};
use super::references::ClusterSet;
use crate::units::HostOffset;

/// What refcounts are set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// To the number of references.
    References,
    /// As [`Mode::References`], but what is in use without a reference stays in use: not every reference could be
    /// followed.
    KeepUnreferenced,
    /// To the number of references where they are too high.
    LeaksOnly,
}

/// The refcount structure that is replaced.
#[derive(Default)]
pub struct Old {
    /// Which blocks of refcounts it has.
    pub blocks: Vec<u64>,
    /// Its clusters, the table's and the blocks'.
    pub clusters: ClusterSet,
}

/// The new refcount structure: a table, and the blocks behind it.
pub struct Rebuild {
    layout: Layout,
    mode: Mode,
    /// First cluster of the table.
    first: u64,
    table_clusters: u64,
    /// Which block of refcounts each block is.
    blocks: Vec<u64>,
    /// Clusters of the old structure, which nobody needs afterwards.
    old: ClusterSet,
}

impl Rebuild {
    /// Plans the structure. `check` has counted what refers to clusters, the `old` refcount structure left out.
    /// `free`: first cluster behind all that is in use. `limit`: clusters there can be.
    pub fn plan(check: &Check, layout: Layout, mode: Mode, old: Old, free: u64, limit: u64) -> Result<Rebuild, String> {
        let per_block = layout.refblock_entries();
        let mut first = free;
        let mut needed: Vec<u64> = Vec::new();
        for (cluster, _) in check.counted().iter().take_while(|&(cluster, _)| cluster < check.far()) {
            first = first.max(cluster + 1);
            if needed.last() != Some(&(cluster / per_block)) {
                needed.push(cluster / per_block);
            }
        }
        if mode == Mode::KeepUnreferenced {
            let last = check.clusters() / per_block;
            needed.extend(old.blocks.iter().copied().filter(|&index| index <= last));
        }
        let mut plan = Rebuild { layout, mode, first, table_clusters: 1, blocks: Vec::new(), old: old.clusters };
        loop {
            // the structure describes itself too: it grows until it does
            let (from, end) = (plan.first / per_block, (plan.end() - 1) / per_block);
            let mut blocks: Vec<u64> = needed.iter().copied().chain(from..=end).collect();
            blocks.sort_unstable();
            blocks.dedup();
            let entries = blocks.last().map_or(0, |last| last + 1);
            let table_clusters = layout.clusters_for(entries * 8);
            if table_clusters * layout.cluster() > MAX_REFTABLE_BYTES {
                return Err("the refcount table that it needs is larger than 8 MiB".to_owned());
            }
            let done = blocks.len() == plan.blocks.len() && table_clusters == plan.table_clusters;
            (plan.blocks, plan.table_clusters) = (blocks, table_clusters);
            if done {
                break;
            }
        }
        match plan.end() > limit {
            true => Err(format!("there is no room behind its last cluster for {} clusters", plan.end() - first)),
            false => Ok(plan),
        }
    }

    fn end(&self) -> u64 {
        self.first + self.table_clusters + self.blocks.len() as u64
    }

    /// Where the table goes, and how many clusters it has.
    pub fn table(&self) -> (HostOffset, u32) {
        (HostOffset(self.first << self.layout.cluster_bits), self.table_clusters as u32)
    }

    /// The table's bytes.
    pub fn table_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; (self.table_clusters * self.layout.cluster()) as usize];
        for (number, &index) in self.blocks.iter().enumerate() {
            let at = index as usize * 8;
            bytes[at..at + 8].copy_from_slice(&self.block_at(number).0.to_be_bytes());
        }
        bytes
    }

    /// Which blocks of refcounts there are.
    pub fn blocks(&self) -> &[u64] {
        &self.blocks
    }

    /// Where block `number` of [`Rebuild::blocks`] goes.
    pub fn block_at(&self, number: usize) -> HostOffset {
        HostOffset((self.first + self.table_clusters + number as u64) << self.layout.cluster_bits)
    }

    /// Whether the new refcounts follow from the old ones.
    pub fn needs_old(&self) -> bool {
        self.mode != Mode::References
    }

    /// The bytes of block `number`, which held `old` before (zeroes where it did not exist).
    pub fn block_bytes(&self, number: usize, check: &Check, old: &[u8]) -> Vec<u8> {
        let layout = self.layout;
        let mut bytes = vec![0; layout.cluster() as usize];
        let first = self.blocks[number] * layout.refblock_entries();
        for index in 0..layout.refblock_entries() {
            let refcount = self.refcount(first + index, check, || layout.refcount(old, index as usize));
            if refcount > 0 {
                layout.set_refcount(&mut bytes, index as usize, refcount);
            }
        }
        bytes
    }

    fn refcount(&self, cluster: u64, check: &Check, old: impl FnOnce() -> u64) -> u64 {
        if (self.first..self.end()).contains(&cluster) {
            return 1;
        }
        let references = check.refcount(cluster);
        let wanted = match self.mode {
            Mode::References => references,
            Mode::KeepUnreferenced if references == 0 && self.old.contains(cluster) => 0,
            Mode::KeepUnreferenced if references == 0 && cluster < check.clusters() => old().min(1),
            Mode::KeepUnreferenced => references,
            Mode::LeaksOnly => references.min(old()),
        };
        wanted.min(self.layout.refcount_max())
    }
}

/// The entry with the COPIED flag that `references` to its cluster ask for; `None`: it is right, or not ours to touch.
pub fn with_right_copied(raw: u64, layout: Layout, references: impl FnOnce(u64) -> u64) -> Option<u64> {
    let at = raw & OFFSET_MASK;
    if raw & COMPRESSED != 0 || at == 0 {
        return None;
    }
    let right = match references(at >> layout.cluster_bits) == 1 {
        true => raw | COPIED,
        false => raw & !COPIED,
    };
    (right != raw).then_some(right)
}

/// A cluster of zeroes without the place reserved for it.
pub fn without_place(layout: Layout) -> RawEntry {
    debug_assert!(!layout.extended_l2);
    RawEntry { descriptor: ZERO, subclusters: 0 }
}
