//! Flushing: one write-back cycle at a time per image, shared by everybody who waits.
//!
//! A flush needs a cycle that begins after it was asked for. Whoever finds no cycle running leads the next one; those
//! who come while it runs wait together for the one after it.

use super::Format;
use super::disk::Disk;
use super::shared::unpoisoned;
use crate::block::Errno;
use crate::pagebuf::PageBuf;
use crate::qcow2::{Fault, Step};
use crate::ring;
use crate::units::HostOffset;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::sync::{Arc, OnceLock};
use tracing::error;

/// Concurrent writes of one step.
const STEP_WRITES: usize = 64;
/// Bytes of one of them.
const STEP_WRITE_BYTES: usize = 256 << 10;

/// Who flushes and who waits.
#[derive(Default)]
pub(super) struct FlushState {
    running: bool,
    /// The cycle that has not begun yet.
    next: Arc<Outcome>,
    /// A sync failed: what the kernel dropped then cannot be made durable by trying again.
    lost: bool,
}

#[derive(Default)]
struct Outcome {
    result: OnceLock<Result<(), Errno>>,
}

/// Lets the next leader begin and nobody wait for nothing, also when this one's task is torn down.
struct Leading<'a> {
    disk: &'a Disk,
    cycle: Arc<Outcome>,
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        let image = self.disk.image();
        self.cycle.result.get_or_init(|| Err(Errno::EIO));
        unpoisoned(&image.flush).running = false;
        image.progress.notify_waiters();
    }
}

impl Disk {
    /// Makes everything completed before this call durable: data and metadata.
    pub(super) async fn flush_image(&self) -> Result<(), Errno> {
        let image = self.image();
        let mine = Arc::clone(&unpoisoned(&image.flush).next);
        loop {
            let progress = image.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            if let Some(result) = mine.result.get() {
                return *result;
            }
            let lead = {
                let mut flush = unpoisoned(&image.flush);
                !std::mem::replace(&mut flush.running, true)
            };
            if lead {
                let cycle = std::mem::take(&mut unpoisoned(&image.flush).next);
                let leading = Leading { disk: self, cycle };
                let result = self.write_back().await;
                leading.cycle.result.get_or_init(|| result);
            } else {
                progress.await;
            }
        }
    }

    /// Flushes until no cluster is leaked on disk either: what a quiet image should look like.
    ///
    /// Gives up on that after a few rounds when other clients keep using the image; it is durable all the same.
    ///
    /// The bitmaps are stored too: from then on they can be used, until the next write.
    pub async fn settle(&self) -> Result<(), Errno> {
        self.flush_until_clean().await?;
        if self.store_bitmaps().await {
            self.flush_until_clean().await?;
        }
        Ok(())
    }

    async fn flush_until_clean(&self) -> Result<(), Errno> {
        for _ in 0..4 {
            self.flush_image().await?;
            if self.image().layers[0].metadata().is_none_or(|md| md.is_clean()) {
                break;
            }
        }
        Ok(())
    }

    async fn write_back(&self) -> Result<(), Errno> {
        let image = self.image();
        if unpoisoned(&image.flush).lost {
            return Err(Errno::EIO);
        }
        if image.format() == Format::Raw {
            return self.barrier().await;
        }
        self.metadata().begin_cycle()?;
        loop {
            let progress = image.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let step = self.metadata().next_step();
            let Some(step) = step else {
                self.check_release();
                image.progress.notify_waiters();
                return Ok(());
            };
            let result = match &step {
                Step::Load(table) => {
                    // a table that cannot be read ends the cycle: the next one tries again
                    match self.load(0, *table).await {
                        Ok(()) => continue,
                        Err(e) => Err(e),
                    }
                }
                Step::Wait => {
                    progress.await;
                    continue;
                }
                Step::Pause => {
                    ring::yield_now().await;
                    continue;
                }
                Step::Write(pieces) => self.write_pieces(pieces).await,
                Step::Barrier => self.barrier().await,
                Step::Punch(ranges) => {
                    for &range in ranges {
                        // only storage is at stake: a file system that cannot punch keeps it
                        let _ = self.file(0).punch(range).await;
                    }
                    Ok(())
                }
            };
            self.metadata().step_done(step, result);
            image.progress.notify_waiters();
            result?;
        }
    }

    /// Logs a corruption that taking references back ran into.
    fn check_release(&self) {
        if let Some(corrupt) = self.metadata().take_unreported() {
            self.image().log_corrupt(0, &corrupt);
        }
    }

    pub(super) async fn write_pieces(&self, pieces: &[(HostOffset, Vec<u8>)]) -> Result<(), Errno> {
        let mut result = Ok(());
        let small: Vec<_> = pieces
            .iter()
            .flat_map(|(at, bytes)| {
                let places = (at.0..).step_by(STEP_WRITE_BYTES).map(HostOffset);
                places.zip(bytes.chunks(STEP_WRITE_BYTES))
            })
            .collect();
        for batch in small.chunks(STEP_WRITES) {
            let mut writes: FuturesUnordered<_> =
                batch.iter().map(|(at, bytes)| self.file(0).write(*at, PageBuf::copy_of(bytes))).collect();
            while let Some((written, _)) = writes.next().await {
                result = result.and(written);
            }
        }
        result
    }

    pub(super) async fn barrier(&self) -> Result<(), Errno> {
        if self.image().ephemeral() {
            return Ok(()); // nobody will find it after a crash
        }
        let data = match self.data_file() {
            Some(data) => data.sync().await,
            None => Ok(()),
        };
        let result = data.and(self.file(0).sync().await);
        if let Err(e) = result {
            unpoisoned(&self.image().flush).lost = true;
            error!(
                "{}: sync failed ({e}): data written since the last flush may be lost, and flushes fail until the \
                 image is closed",
                self.image().path().display()
            );
        }
        result
    }

    /// Reports a fault: a corruption ends writing to that layer's image. Returns the errno for the client.
    pub(super) fn fault(&self, layer: usize, fault: Fault) -> Errno {
        match fault {
            Fault::Errno(e) => e,
            Fault::Corrupt(corrupt) => {
                self.image().break_off(layer, corrupt);
                Errno::EIO
            }
        }
    }
}
