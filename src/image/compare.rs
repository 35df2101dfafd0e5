//! `cowgate image compare`: whether two images hold the same disk.

use super::disk::Disk;
use super::map::MapExtent;
use super::{Error, Progress};
use crate::block::{BlockDev, Errno};
use crate::pagebuf::{PageBuf, is_zero};
use crate::units::ByteRange;
use futures_util::stream::{self, StreamExt};
use std::collections::VecDeque;

/// Bytes compared by one pair of reads.
const CHUNK: u64 = 2 << 20;
/// Pairs of reads in flight.
const IN_FLIGHT: usize = 8;
/// Runs of a disk's map held in memory.
const RUNS: usize = 1024;
/// Sizes and differences are told in sectors, as by QEMU.
const SECTOR: u64 = 512;

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The same disk.
    Same {
        /// One is longer, by zeroes only.
        sizes_differ: bool,
    },
    /// The first sector with different content begins here.
    Content(u64),
    /// Different sizes, which the strict comparison does not allow.
    Size,
    /// The first run that one image holds and the other does not (strict comparison).
    Status(u64),
}

/// Walks over a disk's map; behind the disk's end there are zeroes.
pub(super) struct Runs<'a> {
    disk: &'a Disk,
    known: VecDeque<MapExtent>,
    next: u64,
}

impl<'a> Runs<'a> {
    pub fn new(disk: &'a Disk) -> Runs<'a> {
        Runs { disk, known: VecDeque::new(), next: 0 }
    }

    /// The state at `at`, which never goes back, and how many bytes it lasts.
    pub async fn at(&mut self, at: u64) -> Result<(Option<MapExtent>, u64), Error> {
        let size = self.disk.image().size();
        loop {
            match self.known.front() {
                Some(run) if at < run.start + run.length => return Ok((Some(*run), run.start + run.length - at)),
                Some(_) => drop(self.known.pop_front()),
                None if self.next >= size => return Ok((None, u64::MAX)),
                None => {
                    let rest = ByteRange::between(self.next, size);
                    let runs = self.disk.chain_map(rest, RUNS).await;
                    self.known = runs.map_err(self.disk.failed("map", self.next))?.into();
                    self.next = self.known.back().map_or(size, |last| last.start + last.length);
                }
            }
        }
    }
}

/// Something to be compared by reading.
#[derive(Clone, Copy)]
struct Job {
    range: ByteRange,
    /// Reads are needed of the first, of the second.
    read: (bool, bool),
}

/// Compares two disks. `strict`: sizes, and what is allocated, must be the same too.
pub async fn compare(a: &Disk, b: &Disk, strict: bool, progress: Progress<'_>) -> Result<Verdict, Error> {
    let sectors = |disk: &Disk| disk.image().size().div_ceil(SECTOR);
    let sizes_differ = sectors(a) != sectors(b);
    if strict && sizes_differ {
        return Ok(Verdict::Size);
    }
    let end = a.image().size().max(b.image().size());
    let walk = (Runs::new(a), Runs::new(b), 0);
    // a step yields what has to be read, or the verdict that ends the walk
    let steps = stream::unfold(Some(walk), |walk| async move {
        let (mut left, mut right, mut at) = walk?;
        while at < end {
            let (x, y) = match (left.at(at).await, right.at(at).await) {
                (Ok(x), Ok(y)) => (x, y),
                (Err(e), _) | (_, Err(e)) => return Some((Err(e), None)),
            };
            let len = CHUNK.min(x.1).min(y.1).min(end - at);
            let status = |run: Option<MapExtent>| run.map(|r| (r.present, r.data));
            if strict && status(x.0) != status(y.0) && x.0.is_some() && y.0.is_some() {
                return Some((Ok(Step::Ends(Verdict::Status(at))), None));
            }
            let read = (x.0.is_some_and(|r| !r.zero), y.0.is_some_and(|r| !r.zero));
            let job = Job { range: ByteRange::between(at, at + len), read };
            at += len;
            if read != (false, false) {
                return Some((Ok(Step::Read(job)), Some((left, right, at))));
            }
            // long holes: not a step for each chunk of them
            let hole = x.1.min(y.1).min(end - (at - len)) - len;
            at += hole;
            progress(at, end);
        }
        None
    });
    let results = steps.map(|step| async move {
        match step? {
            Step::Ends(verdict) => Ok((end, Some(verdict))),
            Step::Read(job) => {
                let found = differ(a, b, job).await?;
                Ok((job.range.end().0, found.map(Verdict::Content)))
            }
        }
    });
    let mut results = std::pin::pin!(results.buffered(IN_FLIGHT));
    while let Some(result) = results.next().await {
        let (done, verdict) = result?;
        if let Some(verdict) = verdict {
            return Ok(verdict);
        }
        progress(done, end);
    }
    progress(end, end);
    Ok(Verdict::Same { sizes_differ })
}

enum Step {
    Read(Job),
    Ends(Verdict),
}

/// The first sector of a range that differs.
async fn differ(a: &Disk, b: &Disk, job: Job) -> Result<Option<u64>, Error> {
    let start = job.range.start().0;
    let (left, right) = tokio::join!(take(a, job.range, job.read.0), take(b, job.range, job.read.1));
    let (left, right) = (left?, right?);
    let at = match (&left, &right) {
        (Some(x), Some(y)) => first_difference(x, y),
        (Some(x), None) | (None, Some(x)) => first_data(x),
        (None, None) => None,
    };
    Ok(at.map(|at| (start + at as u64) / SECTOR * SECTOR))
}

/// The content of a range, with zeroes behind the disk's end; `None` where nothing needs to be read.
async fn take(disk: &Disk, range: ByteRange, wanted: bool) -> Result<Option<PageBuf>, Error> {
    if !wanted {
        return Ok(None);
    }
    let (read, buf) = disk.read(range.start(), PageBuf::new(range.len() as usize)).await;
    read.map_err(disk.failed("read", range.start().0))?;
    Ok(Some(buf))
}

/// Whole memory comparisons first: they are much faster than one byte after the other.
fn first_difference(x: &[u8], y: &[u8]) -> Option<usize> {
    if x == y {
        return None;
    }
    x.iter().zip(y).position(|(x, y)| x != y)
}

fn first_data(x: &[u8]) -> Option<usize> {
    if is_zero(x) {
        return None;
    }
    x.iter().position(|&x| x != 0)
}

impl Disk {
    /// Why something in the middle of the disk could not be done: the corruption that was found, else the errno.
    pub(super) fn failed(&self, action: &'static str, at: u64) -> impl FnOnce(Errno) -> Error {
        move |errno| {
            let broken = self.image().layers().iter().find_map(|layer| {
                let corrupt = layer.metadata()?.broken().cloned()?;
                let why = format!("cannot {action} at byte {at} of the disk: {corrupt}");
                Some(Error::Broken { path: layer.path.clone(), why })
            });
            let path = self.image().path().to_owned();
            broken.unwrap_or_else(|| Error::Transfer { path, action, at, source: errno.into() })
        }
    }
}
