//! NBD's meta contexts on the image's side: which ones an image offers, and the status of its disk in each.
//!
//! Promises: `qemu:allocation-depth` and `qemu:dirty-bitmap:NAME` say what `qemu-nbd -A -B NAME` says; an answer takes
//! bounded time and memory however large and fragmented the disk is, and tells less then. The device asks.
//!
//! A temporary layer ([`super::scratch`]) is no layer of the image: what it holds counts as held by the top one, and the
//! bitmaps are those of the image below.

use super::disk::{Disk, From, TURN};
use super::{Format, Image};
use crate::block::{Context, Errno, Extent, NamedContext, Run};
use crate::qcow2::Source;
use crate::ring;
use crate::units::{ByteRange, HostRange};
use tracing::warn;

/// Extents or runs that one answer holds at most.
pub(super) const MAX_RUNS: usize = 1 << 16;
/// Runs of the chain looked at together for the allocation status.
const BATCH: usize = 256;
/// Steps through the chain for one answer.
const STEPS: usize = 1 << 16;
/// Pieces of a bitmap looked at for one answer: pages of bits, or as much as one table entry stands for.
const PIECES: usize = 2048;
/// Most bitmaps that are offered: what each connection that asks has to be told.
const MAX_BITMAPS: usize = 1024;

const BITMAP: &str = "qemu:dirty-bitmap:";
/// The bitmap that is none: another name of `cowgate:since-parent`.
const SINCE_PARENT: &str = "since-parent";

/// What a disk of several parts offers: what can be said of each of them alone.
pub fn of_parts() -> Vec<NamedContext> {
    let named = |name: &str, context| NamedContext { name: name.to_owned(), context };
    vec![named("base:allocation", Context::Allocation), named("qemu:allocation-depth", Context::Depth)]
}

/// What an image offers. `bitmaps`: those it has, and whether they can be used; `parent`: it has a backing file.
pub(super) fn of_image(bitmaps: &[(&[u8], bool)], parent: bool) -> Vec<NamedContext> {
    let mut all = of_parts();
    let text = |name| str::from_utf8(name).ok().filter(|name: &&str| !name.contains('\0'));
    let usable = bitmaps.iter().filter(|(_, usable)| *usable).filter_map(|(name, _)| text(name));
    let named = |name: &str| NamedContext { name: format!("{BITMAP}{name}"), context: Context::Bitmap(name.into()) };
    all.extend(usable.take(MAX_BITMAPS).map(named));
    if parent {
        all.push(NamedContext { name: format!("cowgate:{SINCE_PARENT}"), context: Context::SinceParent });
        // a stored bitmap comes first, and one that cannot be used is not replaced by something else unasked
        if bitmaps.iter().all(|(name, _)| *name != SINCE_PARENT.as_bytes()) {
            all.push(NamedContext { name: format!("{BITMAP}{SINCE_PARENT}"), context: Context::SinceParent });
        }
    }
    all
}

impl Image {
    /// The contexts it offers now.
    pub async fn contexts(&self) -> Vec<NamedContext> {
        let exported = self.below_temporary().map_or(self, |base| base);
        let top = &exported.layers[0];
        let parent = top.format() == Format::Qcow2 && exported.layers.len() > 1;
        let (Some(bitmaps), Some(layout)) = (&top.bitmaps, top.metadata().map(|md| md.layout())) else {
            return of_image(&[], parent);
        };
        let stored = bitmaps.stored.lock().await;
        let usable = |i: usize| stored.good(i, top.size, layout).is_ok();
        let list: Vec<_> = stored.list.iter().enumerate().map(|(i, b)| (&b.name[..], usable(i))).collect();
        of_image(&list, parent)
    }
}

impl Disk {
    /// Status in a context, as [`crate::block::BlockDev::status`] has it.
    pub(super) async fn status_in(&self, context: &Context, r: ByteRange, most: usize) -> Result<Vec<Run>, Errno> {
        let most = most.clamp(1, MAX_RUNS);
        match context {
            Context::Allocation => Ok(self.extents(r, most).await?.into_iter().map(Run::from).collect()),
            Context::Depth => self.chain_status(r, most, false).await,
            Context::SinceParent => match self.parent_layer() {
                Some(_) => self.chain_status(r, most, true).await,
                None => Err(Errno::EINVAL),
            },
            Context::Bitmap(name) => self.bitmap_status(name, r, most).await,
        }
    }

    /// Layers that are not the image's own.
    fn temporary_layers(&self) -> usize {
        usize::from(self.image().ephemeral())
    }

    /// The layer that the exported image's top layer lies over.
    fn parent_layer(&self) -> Option<usize> {
        let top = self.temporary_layers();
        let layers = self.image().layers();
        (layers[top].format() == Format::Qcow2 && layers.len() > top + 1).then_some(top + 1)
    }

    /// Allocation status from the start of a range, contiguous, at least one extent, at most `most`.
    pub async fn extents(&self, r: ByteRange, most: usize) -> Result<Vec<Extent>, Errno> {
        let _operation = self.operation();
        let most = most.min(MAX_RUNS);
        let mut extents: Vec<Extent> = Vec::new();
        let mut rest = r;
        // a batch at a time: who wants one extent of a fragmented disk does not wait for all of them
        for _ in 0..MAX_RUNS / BATCH {
            if rest.is_empty() || extents.len() > most {
                break;
            }
            for piece in self.resolve(rest, BATCH).await? {
                rest = rest.skip(piece.range.len());
                match piece.from {
                    From::Zero { reserved } => add(&mut extents, piece.range.len(), !reserved, true),
                    From::Packed { .. } => add(&mut extents, piece.range.len(), false, false),
                    From::File { layer, host } => {
                        let run = HostRange::new(host, piece.range.len());
                        for (len, hole) in self.file_extents(layer, run, most) {
                            add(&mut extents, len, hole, hole);
                        }
                    }
                }
                if extents.len() > most {
                    break;
                }
            }
        }
        extents.truncate(most);
        Ok(extents)
    }

    /// Which layer holds what: its depth, or only whether it is above the parent.
    ///
    /// A layer that is too short for what lies over it is where the zeroes behind its end come from, as QEMU has it. The
    /// parent's do not count as its own: it has nothing there that a copy of it would have.
    async fn chain_status(&self, r: ByteRange, most: usize, since_parent: bool) -> Result<Vec<Run>, Errno> {
        let _operation = self.operation();
        let layers = self.image().layers();
        let top = self.temporary_layers();
        let held = |layer: usize| match since_parent {
            true => Run::DIRTY,
            false => (layer + 1).saturating_sub(top).max(1) as u32,
        };
        let mut runs: Vec<Run> = Vec::new();
        // what is still to be looked up, last first: (layer, range)
        let mut todo = vec![(0, r)];
        let mut steps = 0;
        while let Some((layer, range)) = todo.pop() {
            if range.is_empty() {
                continue;
            }
            if runs.len() > most || (steps >= STEPS && !runs.is_empty()) {
                break;
            }
            steps += 1;
            if steps % (TURN * 16) == 0 {
                ring::yield_now().await;
            }
            let Some(inside) = layers.get(layer).map(|l| range.clip(l.size())) else {
                Run::push(&mut runs, range.len(), 0);
                continue;
            };
            if since_parent && layer > top {
                Run::push(&mut runs, inside.len(), 0);
                Run::push(&mut runs, range.len() - inside.len(), Run::DIRTY);
                continue;
            }
            if inside.is_empty() {
                Run::push(&mut runs, range.len(), held(layer));
                continue;
            }
            if layers[layer].format() == Format::Raw {
                todo.push((layer, range.skip(inside.len())));
                Run::push(&mut runs, inside.len(), held(layer));
                continue;
            }
            let mapped = self.map(layer, inside).await?;
            todo.push((layer, range.skip(mapped.range.len())));
            match mapped.source {
                Source::Unallocated => todo.push((layer + 1, mapped.range)),
                Source::Data(_) | Source::Zero { .. } | Source::Compressed(_) => {
                    Run::push(&mut runs, mapped.range.len(), held(layer));
                }
            }
        }
        runs.truncate(most);
        Ok(runs)
    }

    async fn bitmap_status(&self, name: &str, r: ByteRange, most: usize) -> Result<Vec<Run>, Errno> {
        let base = self.disk_below_temporary().map_err(|e| {
            warn!("{e}");
            Errno::EIO
        })?;
        let disk = base.as_deref().unwrap_or(self);
        let found = disk.some_dirty_runs(name.as_bytes(), r, most, PIECES).await.map_err(|why| {
            warn!("{}: {why}", disk.image().path().display());
            Errno::EIO
        })?;
        let dirty = |(len, set)| Run { len, status: if set { Run::DIRTY } else { 0 } };
        Ok(found.into_iter().map(dirty).collect())
    }
}

/// Appends an extent, joined to the last of the same kind.
fn add(extents: &mut Vec<Extent>, len: u64, hole: bool, zero: bool) {
    match extents.last_mut() {
        Some(last) if last.hole == hole && last.zero == zero => last.len += len,
        _ => extents.push(Extent { len, hole, zero }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(bitmaps: &[(&[u8], bool)], parent: bool) -> Vec<String> {
        let all = of_image(bitmaps, parent).into_iter().skip(2);
        all.map(|c| format!("{} {:?}", c.name, c.context)).collect()
    }

    #[test]
    fn a_stored_bitmap_comes_before_the_parent() {
        let ours = "cowgate:since-parent SinceParent";
        assert_eq!(names(&[], false), [""; 0]);
        assert_eq!(names(&[], true), [ours, "qemu:dirty-bitmap:since-parent SinceParent"]);
        let stored = "qemu:dirty-bitmap:since-parent Bitmap(\"since-parent\")";
        assert_eq!(names(&[(b"since-parent", true)], true), [stored, ours]);
        assert_eq!(names(&[(b"since-parent", false)], true), [ours]);
    }

    #[test]
    fn only_bitmaps_that_can_be_used_and_named_are_offered() {
        let list: &[(&[u8], bool)] = &[(b"lost", false), (b"\xff", true), (b"a\0b", true), (b"\xc3\xa4 : b", true)];
        assert_eq!(names(list, false), ["qemu:dirty-bitmap:\u{e4} : b Bitmap(\"\u{e4} : b\")"]);
        let many: Vec<String> = (0..2000).map(|i| format!("b{i}")).collect();
        let many: Vec<(&[u8], bool)> = many.iter().map(|name| (name.as_bytes(), true)).collect();
        assert_eq!(names(&many, false).len(), MAX_BITMAPS);
    }
}
