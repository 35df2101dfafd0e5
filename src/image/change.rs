//! What the commands that change an image where it lies have in common: how they begin, move data and end.
//!
//! They promise that a kill, a full disk or an I/O error at any moment leaves an image that checks without errors and
//! whose content is what it was or what it is to become, and that the same command run again finishes the work. So
//! each of them makes what it copied durable before anything that makes the copy count is written.

use super::open::{Gate, Opener};
use super::{Disk, Error, Format, Image};
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::qcow2::HeaderArea;
use crate::ring;
use crate::units::{ByteRange, HostOffset};
use futures_util::stream::{self, StreamExt};
use std::cell::Cell;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Bytes moved at once. Pieces are cut at multiples of it, so that none of them cuts a cluster.
pub(super) const PIECE: u64 = 2 << 20;
/// Pieces moved at the same time.
const IN_FLIGHT: usize = 8;
/// Pieces decided before they are moved.
pub(super) const BATCH: usize = 64;

/// Files are named by the user who runs the command, whose own permissions are the gate.
pub(super) fn open_gate() -> Gate {
    Gate::new(Some(vec!["/".into()]))
}

/// Runs a command's work on this thread.
pub(super) fn run<T>(path: &Path, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    ring::run(work).map_err(Error::io(path, "start reading it"))?.map_err(Error::of_a_command)
}

/// Opens a chain for reading.
pub(super) async fn open_chain(path: &Path, format: Format) -> Result<Image, Error> {
    Opener::new(path)?.open(format, &open_gate()).await
}

/// The hands on an image that this command alone may change, until they are dropped.
pub(super) fn begin(image: Image) -> Result<Rc<Disk>, Error> {
    image.begin_writing()?;
    Disk::open(Arc::new(image), true)
}

/// Makes everything done durable.
pub(super) async fn settle(disk: &Disk) -> Result<(), Error> {
    disk.settle().await.map_err(failed(disk.image().path(), "make the changes durable"))
}

/// After a failure: keeps what was done as far as that is possible, and gives back what was not needed. The failure
/// itself is what the user is told.
pub(super) async fn after<T>(disk: &Disk, result: Result<T, Error>) -> Result<T, Error> {
    if result.is_err() {
        let _ = disk.settle().await;
    }
    result
}

/// An error of the hands, for people.
pub(super) fn failed(path: &Path, action: &'static str) -> impl FnOnce(Errno) -> Error {
    let path = path.to_owned();
    move |e| Error::Io { path, action, source: e.into() }
}

/// Moves pieces, several at a time.
pub(super) async fn move_all<F: Future<Output = Result<(), Error>>>(
    pieces: &mut Vec<(ByteRange, bool)>,
    move_one: impl Fn(ByteRange, bool) -> F,
) -> Result<(), Error> {
    let failed = Cell::new(false);
    let moves = pieces.drain(..).map(|(range, zero)| {
        let (failed, moving) = (&failed, move_one(range, zero));
        async move {
            // after a failure nothing more is begun; what is under way is waited for, never dropped
            if failed.get() {
                return Ok(());
            }
            let moved = moving.await;
            failed.set(failed.get() || moved.is_err());
            moved
        }
    });
    stream::iter(moves).buffer_unordered(IN_FLIGHT).fold(Ok(()), |all, moved| async { Result::and(all, moved) }).await
}

/// Appends a range to the pieces: joined to the last where that is of the same kind, cut at multiples of [`PIECE`].
/// Zeroes need no buffer and are not cut.
pub(super) fn push_pieces(pieces: &mut Vec<(ByteRange, bool)>, range: ByteRange, zero: bool) {
    let mut rest = range;
    if let Some((last, last_zero)) = pieces.last_mut()
        && *last_zero == zero
        && last.end() >= rest.start()
    {
        let limit = if zero { u64::MAX } else { (last.start().0 / PIECE + 1) * PIECE };
        let end = rest.end().0.min(limit).max(last.end().0);
        *last = ByteRange::between(last.start().0, end);
        rest = ByteRange::between(end.clamp(rest.start().0, rest.end().0), rest.end().0);
    }
    while !rest.is_empty() {
        let end = if zero { rest.end().0 } else { ((rest.start().0 / PIECE + 1) * PIECE).min(rest.end().0) };
        pieces.push((rest.clip(end), zero));
        rest = ByteRange::between(end, rest.end().0);
    }
}

/// The image's header area with a change, as it would be written: `Err` when there is no room for it.
pub(super) async fn changed_header(disk: &Disk, change: &dyn Fn(&mut HeaderArea)) -> Result<Vec<u8>, Error> {
    let path = disk.image().path();
    let cluster = disk.metadata().layout().cluster();
    let (result, first) = disk.file(0).read(HostOffset(0), PageBuf::new(cluster as usize)).await;
    result.map_err(failed(path, "read its header"))?;
    let mut area = HeaderArea::parse(&first).map_err(|source| Error::Header { path: path.to_owned(), source })?;
    change(&mut area);
    area.to_bytes().map_err(|e| {
        let why = format!("{e}; choose a shorter name, or make an image with larger clusters");
        Error::Refused { path: path.to_owned(), why }
    })
}

/// Rewrites the image's header at once: everything before is durable when it is written, and it is when this returns.
pub(super) async fn rewrite_header(disk: &Disk, change: &dyn Fn(&mut HeaderArea)) -> Result<(), Error> {
    settle(disk).await?;
    // read only now: a flush may have changed it
    let bytes = changed_header(disk, change).await?;
    write_header(disk, 0, &bytes).await
}

/// Writes a part of the header and makes it durable.
pub(super) async fn write_header(disk: &Disk, at: u64, bytes: &[u8]) -> Result<(), Error> {
    let path = disk.image().path();
    let (result, _) = disk.file(0).write(HostOffset(at), PageBuf::copy_of(bytes)).await;
    result.map_err(failed(path, "write its header"))?;
    disk.file(0).sync().await.map_err(failed(path, "make its header durable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_join_and_never_cut_a_cluster() {
        let mut pieces = Vec::new();
        let range = ByteRange::between;
        push_pieces(&mut pieces, range(100, 200), false);
        push_pieces(&mut pieces, range(200, PIECE + 5), false);
        assert_eq!(pieces, [(range(100, PIECE), false), (range(PIECE, PIECE + 5), false)]);
        push_pieces(&mut pieces, range(PIECE + 2, PIECE + 9), false);
        push_pieces(&mut pieces, range(PIECE + 9, 9 * PIECE), true);
        push_pieces(&mut pieces, range(9 * PIECE, 10 * PIECE), true);
        assert_eq!(pieces[1..], [(range(PIECE, PIECE + 9), false), (range(PIECE + 9, 10 * PIECE), true)]);
        push_pieces(&mut pieces, range(10 * PIECE, 12 * PIECE + 1), false);
        assert_eq!(pieces[3..].iter().map(|p| p.0.len()).collect::<Vec<_>>(), [PIECE, PIECE, 1]);
    }
}
