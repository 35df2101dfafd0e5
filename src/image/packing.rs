//! Compressed writing: full clusters are packed on a pool of threads beside the workers and stored side by side;
//! everything else is written plainly.

use super::disk::{Disk, join_parts};
use super::shared::Content;
use crate::block::{BlockDev, Errno, ZeroFlags};
use crate::pagebuf::{PageBuf, is_zero};
use crate::qcow2::compress::{self, Compression};
use crate::qcow2::{Packed, Ready};
use crate::units::{ByteRange, GuestOffset};
use futures_util::stream::{self, StreamExt};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;
use tokio::sync::{Semaphore, oneshot};

/// Bytes of clusters that one request has on the way through the pool at most (one cluster in any case).
const IN_FLIGHT_BYTES: u64 = 4 << 20;
/// Clusters waiting for each thread of the pool; their copies bound its memory, at 2 MiB each.
const QUEUE_PER_THREAD: usize = 4;

/// The threads that pack, and room for what they are given.
struct Pool {
    threads: ThreadPool,
    room: Semaphore,
}

fn pool() -> Result<&'static Pool, Errno> {
    static POOL: OnceLock<Option<Pool>> = OnceLock::new();
    let start = || {
        let threads = ThreadPoolBuilder::new().thread_name(|i| format!("pack-{i}")).build().ok()?;
        let room = Semaphore::new(threads.current_num_threads() * QUEUE_PER_THREAD);
        Some(Pool { threads, room })
    };
    POOL.get_or_init(start).as_ref().ok_or(Errno::ENOMEM)
}

/// Packs one cluster on the pool ([`compress::pack`]).
pub(super) async fn pack(kind: Compression, cluster: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let pool = pool()?;
    let room = pool.room.acquire().await.map_err(|_| Errno::EIO)?;
    let bytes = cluster.to_vec();
    let (send, packed) = oneshot::channel();
    pool.threads.spawn(move || {
        // nobody waits any more: nothing is lost
        let _ = send.send(compress::pack(kind, &bytes));
    });
    let packed = packed.await.map_err(|_| Errno::EIO);
    drop(room);
    packed
}

impl Disk {
    /// As a plain write, with full clusters stored compressed where that saves space, and not at all where they are
    /// zero. Only for QCOW2 images.
    pub(super) async fn write_packed(&self, at: GuestOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        let Content::Qcow2 { compression, .. } = self.image().layers[0].content else {
            unreachable!("a raw image is never written compressed");
        };
        let cluster = self.metadata().layout().cluster();
        let end = at.0 + buf.len() as u64;
        let first = at.0.next_multiple_of(cluster).min(end);
        // the last cluster of the disk is full when it is written to the disk's end
        let last = if end == self.image().size() { end } else { (end / cluster * cluster).max(first) };
        let mut parts = vec![(at.0, buf.split_to((first - at.0) as usize), false)];
        let mut next = first;
        while next < last {
            let len = cluster.min(last - next);
            parts.push((next, buf.split_to(len as usize), true));
            next += len;
        }
        parts.push((next, buf, false));
        let in_flight = (IN_FLIGHT_BYTES / cluster).max(1) as usize;
        let writes = stream::iter(parts)
            .filter(|(_, part, _)| std::future::ready(!part.is_empty()))
            .map(|(at, part, full)| async move {
                match full {
                    true => self.write_cluster(GuestOffset(at), part, compression).await,
                    false => self.write_qcow2(GuestOffset(at), part).await,
                }
            })
            .buffered(in_flight);
        join_parts(writes, PageBuf::new(0)).await
    }

    /// Writes one cluster, which at the disk's end may be cut short.
    async fn write_cluster(&self, at: GuestOffset, buf: PageBuf, kind: Compression) -> (Result<(), Errno>, PageBuf) {
        if is_zero(&buf) {
            let range = ByteRange::between(at.0, at.0 + buf.len() as u64);
            return (self.write_zeroes(range, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await, buf);
        }
        let cluster = self.metadata().layout().cluster() as usize;
        let packed = match buf.len() == cluster {
            true => pack(kind, &buf).await,
            false => {
                let mut padded = buf.to_vec();
                padded.resize(cluster, 0);
                pack(kind, &padded).await
            }
        };
        match packed {
            Err(e) => (Err(e), buf),
            Ok(None) => self.write_qcow2(at, buf).await,
            Ok(Some(packed)) => match self.store_packed(at, &packed).await {
                Ok(true) => (Ok(()), buf),
                Ok(false) => self.write_qcow2(at, buf).await,
                Err(e) => (Err(e), buf),
            },
        }
    }

    /// Stores packed bytes (whole sectors) as the guest cluster that begins at `at`. `Ok(false)`: the image has no place
    /// for compressed data there.
    pub(super) async fn store_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<bool, Errno> {
        let cluster = self.metadata().layout().cluster();
        self.note_change(ByteRange::between(at.0, (at.0 + cluster).min(self.image().size()))).await?;
        self.make_room().await?;
        let _operation = self.operation();
        loop {
            let progress = self.image().progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let answer = self.metadata().begin_packed(at, packed.len() as u64);
            match answer {
                Ok(Ready::Done(Packed::Plain)) => return Ok(false),
                Ok(Ready::Done(Packed::Allocate(allocation))) => {
                    let (result, _) = self.file(0).write(allocation.host, PageBuf::copy_of(packed)).await;
                    self.finish(allocation, result);
                    self.start_writeback();
                    return result.and(self.keep_promise().await).map(|()| true);
                }
                Ok(Ready::Load(table)) => self.load(0, table).await?,
                Ok(Ready::Wait) => progress.await,
                Ok(Ready::Prepare) => self.flush_image().await?,
                Err(fault) => return Err(self.fault(0, fault)),
            }
        }
    }
}
