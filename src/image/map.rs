//! `cowgate image map`: which file of the chain holds which part of the disk, in the words of `qemu-img map`.

use super::disk::Disk;
use super::shared::Storage;
use super::{Format, raw};
use crate::block::Errno;
use crate::qcow2::Source;
use crate::ring;
use crate::units::{ByteRange, GuestOffset, HostOffset, HostRange};
use serde::Serialize;
use std::path::Path;

/// Steps through the chain before other tasks of the thread get a turn.
const TURN: usize = 1024;

/// A run of the disk with one state, with the keys of `qemu-img map --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MapExtent {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// The layer that answers, 0 being the image itself: for unallocated runs the lowest one that was asked.
    pub depth: usize,
    /// Some layer says what is here.
    pub present: bool,
    /// Reads as zeroes, as far as is known without reading: with `data`, in a hole of the image file.
    pub zero: bool,
    /// Held by clusters, or by a raw file where it is not a hole.
    pub data: bool,
    /// Held by compressed clusters.
    pub compressed: bool,
    /// Where in that layer's file (or external data file) the bytes are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl MapExtent {
    /// Takes `next` in when it continues this run in the same state.
    pub fn join(&mut self, next: &MapExtent) -> bool {
        let offset = self.offset.map(|at| at + self.length);
        let joined = MapExtent { start: self.start, length: self.length, offset: self.offset, ..*next };
        let joins = self.start + self.length == next.start && joined == *self && offset == next.offset;
        if joins {
            self.length += next.length;
        }
        joins
    }
}

/// The state of one run.
#[derive(Clone, Copy)]
enum State {
    Unallocated,
    Zero,
    Data { zero: bool, host: HostOffset },
    Hole { host: HostOffset },
    Compressed,
}

impl Disk {
    /// The map of the whole chain from the start of `range`, contiguous, at least one run, at most about `most`.
    pub async fn chain_map(&self, range: ByteRange, most: usize) -> Result<Vec<MapExtent>, Errno> {
        let _operation = self.operation();
        let layers = self.image().layers();
        let mut out: Vec<MapExtent> = Vec::new();
        // what is still to be looked up, last first: (layer, range)
        let mut todo = vec![(0, range)];
        let mut steps = 0;
        while let Some((depth, range)) = todo.pop() {
            if range.is_empty() {
                continue;
            }
            if out.len() > most {
                break;
            }
            steps += 1;
            if steps % TURN == 0 {
                ring::yield_now().await;
            }
            let inside = layers.get(depth).map(|l| range.clip(l.size)).filter(|inside| !inside.is_empty());
            let Some(inside) = inside else {
                add(&mut out, depth.saturating_sub(1), range, State::Unallocated);
                continue;
            };
            if layers[depth].format() == Format::Raw {
                let done = self.map_raw(&mut out, depth, inside, most);
                todo.push((depth, range.skip(done)));
                continue;
            }
            let mapped = self.map(depth, inside).await?;
            if let Source::Data(host) = mapped.source {
                let done = self.map_clusters(&mut out, depth, mapped.range, host, most);
                todo.push((depth, range.skip(done)));
                continue;
            }
            todo.push((depth, range.skip(mapped.range.len())));
            let state = match mapped.source {
                Source::Unallocated => {
                    todo.push((depth + 1, mapped.range));
                    continue;
                }
                Source::Zero { .. } => State::Zero,
                Source::Compressed(_) | Source::Data(_) => State::Compressed,
            };
            add(&mut out, depth, mapped.range, state);
        }
        out.truncate(most.max(1));
        Ok(out)
    }

    /// The file that holds a layer's data.
    pub fn data_path(&self, depth: usize) -> &Path {
        let layer = &self.image().layers()[depth];
        layer.data.as_ref().map_or(layer.path(), |data| &data.path)
    }

    /// Runs of a raw layer; returns how many bytes they cover.
    fn map_raw(&self, out: &mut Vec<MapExtent>, depth: usize, range: ByteRange, most: usize) -> u64 {
        let mut rest = range;
        for (len, hole) in self.file_extents(depth, HostRange::new(HostOffset(range.start().0), range.len()), most) {
            let host = HostOffset(rest.start().0);
            let state = if hole { State::Hole { host } } else { State::Data { zero: false, host } };
            add(out, depth, rest.prefix(len), state);
            rest = rest.skip(len);
        }
        range.len() - rest.len()
    }

    /// A run of data clusters; returns how many bytes of it were looked at. Where the image file has holes, clusters were
    /// allocated and never written: they are zeroes.
    fn map_clusters(
        &self,
        out: &mut Vec<MapExtent>,
        depth: usize,
        range: ByteRange,
        host: HostOffset,
        most: usize,
    ) -> u64 {
        let layer = &self.image().layers()[depth];
        let Storage::File { file, device: None } = layer.data_storage() else {
            add(out, depth, range, State::Data { zero: false, host });
            return range.len();
        };
        let mut rest = range;
        for (len, zero) in raw::holes(file, HostRange::new(host, range.len()), most + 1) {
            let host = HostOffset(host.0 + (rest.start().0 - range.start().0));
            add(out, depth, rest.prefix(len), State::Data { zero, host });
            rest = rest.skip(len);
        }
        range.len() - rest.len()
    }
}

fn add(out: &mut Vec<MapExtent>, depth: usize, range: ByteRange, state: State) {
    let GuestOffset(start) = range.start();
    let blank = MapExtent {
        start,
        length: range.len(),
        depth,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        offset: None,
    };
    let next = match state {
        State::Unallocated => MapExtent { present: false, zero: true, data: false, ..blank },
        State::Zero => MapExtent { zero: true, data: false, ..blank },
        State::Data { zero, host } => MapExtent { zero, offset: Some(host.0), ..blank },
        State::Hole { host } => MapExtent { zero: true, data: false, offset: Some(host.0), ..blank },
        State::Compressed => MapExtent { compressed: true, ..blank },
    };
    if !out.last_mut().is_some_and(|last| last.join(&next)) {
        out.push(next);
    }
}
