//! `cowgate image commit`: an overlay's own data goes into its backing file.
//!
//! While data is copied the overlay still holds it and hides what the backing file has there, so the overlay's content
//! never changes. Only when the backing file is durable is the overlay emptied: cluster by cluster it then shows what
//! the backing file has, which is the same.

use super::change::{self, BATCH, failed};
use super::open::{Opener, backing};
use super::resize::{self, NewSize};
use super::{Disk, Error, Format, Progress};
use crate::block::{BlockDev, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::qcow2::Source;
use crate::units::ByteRange;
use serde::Serialize;
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// What was done.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Committed {
    /// The overlay.
    pub filename: PathBuf,
    /// The backing file.
    pub backing_filename: PathBuf,
    /// Bytes of data copied into it.
    pub data: u64,
    /// Bytes zeroed in it.
    pub zeroes: u64,
    /// The overlay was emptied.
    pub emptied: bool,
}

/// What the chain looks like before anything is changed.
struct Plan {
    size: u64,
    backing: PathBuf,
    format: Format,
    backing_size: u64,
}

/// Commits an overlay into its backing file; `keep`: the overlay keeps its data.
pub fn commit(path: &Path, keep: bool, progress: Progress<'_>) -> Result<Committed, Error> {
    let plan = change::run(path, examine(path))?;
    if plan.backing_size < plan.size {
        resize::resize(&plan.backing, plan.format, NewSize::Exactly(plan.size), false, &|_, _| ())?;
    }
    change::run(path, async {
        let overlay = Opener::new(path)?.open_alone(Format::Qcow2, &change::open_gate(), plan.backing_size).await?;
        let parsed = overlay.layers()[0].parsed.as_ref().expect("a QCOW2 layer has a header");
        if backing(path, &parsed.header)? != Some((plan.backing.clone(), plan.format)) {
            let why = "another program changed its backing file meanwhile; try again".to_owned();
            return Err(Error::Refused { path: path.to_owned(), why });
        }
        let (overlay, backing) =
            (change::begin(overlay)?, change::begin(change::open_chain(&plan.backing, plan.format).await?)?);
        let copied = copy(&overlay, &backing, progress).await;
        let (data, zeroes) = change::after(&backing, copied).await?;
        change::settle(&backing).await?;
        if !keep {
            let emptied = overlay.expose(ByteRange::between(0, plan.size)).await;
            let emptied = emptied.map_err(failed(path, "empty it; the backing file is complete"));
            change::after(&overlay, emptied).await?;
        }
        Ok(Committed {
            filename: path.to_owned(),
            backing_filename: plan.backing.clone(),
            data,
            zeroes,
            emptied: !keep,
        })
    })
}

/// Opens the whole chain once: it is sound, does not refer to itself and nobody writes to it.
async fn examine(path: &Path) -> Result<Plan, Error> {
    let refuse = |why: &str| Error::Refused { path: path.to_owned(), why: why.to_owned() };
    let chain = change::open_chain(path, Format::Qcow2).await?;
    let [overlay, below, ..] = chain.layers() else {
        return Err(refuse("has no backing file to commit to"));
    };
    refuse_snapshots(overlay, "commit")?;
    Ok(Plan { size: overlay.size, backing: below.path().to_owned(), format: below.format(), backing_size: below.size })
}

/// What an internal snapshot does not hold itself is read from the backing file too, and nobody could copy it there.
pub(super) fn refuse_snapshots(overlay: &super::Layer, command: &str) -> Result<(), Error> {
    match &overlay.parsed {
        Some(parsed) if parsed.header.snapshots > 0 && parsed.header.backing_file.is_some() => {
            let why = format!(
                "{command} would change the content of its internal snapshots, which read from the backing file too; \
                 delete them first with `qemu-img snapshot -d`"
            );
            Err(Error::Refused { path: overlay.path().to_owned(), why })
        }
        _ => Ok(()),
    }
}

/// Copies what the overlay holds itself. Returns bytes of data and of zeroes.
async fn copy(overlay: &Disk, backing: &Disk, progress: Progress<'_>) -> Result<(u64, u64), Error> {
    let path = overlay.image().path();
    let size = overlay.image().size();
    let (data, zeroes, done) = (Cell::new(0), Cell::new(0), Cell::new(0));
    let move_one = |range: ByteRange, zero: bool| {
        let (data, zeroes) = (&data, &zeroes);
        async move {
            move_range(overlay, backing, range, zero).await?;
            let count = if zero { zeroes } else { data };
            count.set(count.get() + range.len());
            Ok(())
        }
    };
    let mut pieces = Vec::new();
    let mut rest = ByteRange::between(0, size);
    while !rest.is_empty() {
        let mapped = overlay.map(0, rest).await.map_err(failed(path, "read its tables"))?;
        rest = rest.skip(mapped.range.len());
        match mapped.source {
            Source::Unallocated => {}
            Source::Zero { .. } => change::push_pieces(&mut pieces, mapped.range, true),
            Source::Data(_) | Source::Compressed(_) => change::push_pieces(&mut pieces, mapped.range, false),
        }
        if pieces.len() > BATCH || rest.is_empty() {
            change::move_all(&mut pieces, move_one).await?;
            done.set(size - rest.len());
            progress(done.get(), size);
        }
    }
    Ok((data.get(), zeroes.get()))
}

async fn move_range(overlay: &Disk, backing: &Disk, range: ByteRange, zero: bool) -> Result<(), Error> {
    let target = backing.image().path();
    if zero {
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        return backing.write_zeroes(range, unmap).await.map_err(failed(target, "write to it"));
    }
    let (read, buf) = overlay.read(range.start(), PageBuf::new(range.len() as usize)).await;
    read.map_err(failed(overlay.image().path(), "read it"))?;
    backing.write(range.start(), buf).await.0.map_err(failed(target, "write to it"))
}
