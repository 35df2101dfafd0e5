//! Zeroing and discarding a range of a disk, however large it is.
//!
//! Promises: no zero byte is written where the format or the file system can say zero; the work takes bounded memory and
//! gives the thread's other tasks their turn; as after any other write, a crash leaves each cluster as it was or zeroed.
//! What is asked to be fast is refused, with nothing changed, where it would not be.

use super::disk::{Disk, From, TURN};
use super::raw;
use crate::block::{BlockDev, Errno, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::qcow2::{Allocation, Source, Write, Zero, ZeroMode};
use crate::ring;
use crate::units::{ByteRange, HostOffset, HostRange};

/// Decisions made for one request before other tasks of the worker get a turn: each changes up to 4 KiB of tables.
const ZERO_TURN: usize = 16;
/// Zeroes that become data are written as bytes up to this length; of a longer range the file system makes them.
const SHORT: u64 = 256 << 10;

impl Disk {
    /// Makes a range of the disk read as zeroes.
    pub(super) async fn zero(&self, range: ByteRange, f: ZeroFlags) -> Result<(), Errno> {
        if self.is_raw() {
            return raw::write_zeroes(self.file(0), range, f).await;
        }
        let mode = match f {
            ZeroFlags { may_unmap: true, .. } => ZeroMode::Unmap,
            ZeroFlags { sparse: true, .. } => ZeroMode::Keep,
            _ => ZeroMode::Provision,
        };
        if f.fast && !self.zeroes_fast(range, mode).await? {
            return Err(Errno::ENOTSUP);
        }
        if mode == ZeroMode::Provision || !self.metadata().zeroes_fast(range, mode) {
            self.check_space(range).await?;
        }
        self.zero_qcow2(range, mode).await
    }

    /// Zeroes a range of a QCOW2 image; it may lie behind the size that the image was opened with.
    pub(super) async fn zero_qcow2(&self, range: ByteRange, mode: ZeroMode) -> Result<(), Errno> {
        self.note_change(range).await?;
        let mode = self.zero_data_file(range, mode).await?;
        self.zero_metadata(range, mode).await
    }

    /// Makes whole clusters of a range unallocated, durably. For content that does not change by that, because what
    /// lies below is the same.
    pub(super) async fn expose(&self, range: ByteRange) -> Result<(), Errno> {
        self.zero_metadata(range, ZeroMode::Expose).await?;
        self.settle().await?;
        // not before the tables are durable: until then they lead to what the data file holds
        self.zero_data_file(range, ZeroMode::Expose).await.map(drop)
    }

    /// Zeroes a range as far as the image file says so; what an external data file holds stays.
    pub(super) async fn zero_metadata(&self, range: ByteRange, mode: ZeroMode) -> Result<(), Errno> {
        let mut rest = range;
        let mut decisions = 0;
        while !rest.is_empty() {
            decisions += 1;
            self.turn(decisions).await?;
            let operation = self.operation();
            let progress = self.image().progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let answer = self.metadata().begin_zero(rest, mode);
            match answer {
                Ok(Zero::Done(len)) => rest = rest.skip(len),
                Ok(Zero::Data(len)) => {
                    drop(operation); // the write is an operation of its own
                    self.fill_with_zeroes(rest.prefix(len)).await?;
                    rest = rest.skip(len);
                }
                Ok(Zero::Allocate(allocation)) => {
                    let len = allocation.range.len();
                    let host = HostRange::new(allocation.host, allocation.span.len());
                    let result = raw::reserve(self.guest_file(0), host).await;
                    self.finish(allocation, result);
                    result?;
                    rest = rest.skip(len);
                }
                Ok(Zero::Load(table)) => self.load(0, table).await?,
                Ok(Zero::Prepare) => {
                    drop(operation);
                    self.flush_image().await?;
                }
                Ok(Zero::Wait) => {
                    drop(operation);
                    progress.await;
                }
                Err(fault) => return Err(self.fault(0, fault)),
            }
        }
        self.start_writeback();
        self.keep_promise().await
    }

    /// Before a decision of a long request: room for what it changes, and now and then a turn for others.
    async fn turn(&self, decisions: usize) -> Result<(), Errno> {
        if decisions.is_multiple_of(ZERO_TURN) {
            self.start_writeback();
            ring::yield_now().await;
        }
        self.make_room().await
    }

    /// Zeroes a range of the external data file, before the metadata says so: what lies there is the guest's to lose.
    /// Returns what is left for the metadata.
    ///
    /// A raw one must read as the disk does at any moment. So its mapping stays: a cluster with the zero flag would
    /// differ from its bytes in the file from the next write on until that write's metadata is flushed. From another
    /// one whole clusters are only given back.
    async fn zero_data_file(&self, range: ByteRange, mode: ZeroMode) -> Result<ZeroMode, Errno> {
        let (Some(file), Some(data)) = (self.data_file(), &self.image().layers[0].data) else { return Ok(mode) };
        let (cluster, broken) = {
            let md = self.metadata();
            (md.layout().cluster(), md.broken().is_some())
        };
        if broken {
            return Err(Errno::EIO);
        }
        let clusters = self.whole_clusters(range, cluster);
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        match (data.raw, mode) {
            (true, ZeroMode::Unmap) => raw::write_zeroes(file, range, unmap).await?,
            (true, ZeroMode::Discard | ZeroMode::Expose) => raw::write_zeroes(file, clusters, unmap).await?,
            (true, ZeroMode::Provision | ZeroMode::Keep | ZeroMode::InPlace) => {
                raw::write_zeroes(file, range, ZeroFlags::default()).await?;
            }
            (false, ZeroMode::Provision | ZeroMode::Keep | ZeroMode::InPlace) => {}
            (false, _) => raw::discard(file, clusters).await?,
        }
        Ok(if data.raw { ZeroMode::InPlace } else { mode })
    }

    /// The whole clusters of a range; the one that holds the end of the disk counts as whole.
    fn whole_clusters(&self, range: ByteRange, cluster: u64) -> ByteRange {
        let end = range.end().0;
        let first = range.start().0.next_multiple_of(cluster).min(end);
        let last = if end == self.image().size() { end } else { (end / cluster * cluster).max(first) };
        ByteRange::between(first, last)
    }

    /// Zeroes that have to be data.
    async fn fill_with_zeroes(&self, range: ByteRange) -> Result<(), Errno> {
        if range.len() <= SHORT {
            return self.write(range.start(), PageBuf::zeroed(range.len() as usize)).await.0;
        }
        let mut rest = range;
        let mut decisions = 0;
        while !rest.is_empty() {
            decisions += 1;
            self.turn(decisions).await?;
            let operation = self.operation();
            let progress = self.image().progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let answer = self.metadata().begin_write(rest);
            match answer {
                Ok(Write::InPlace { host, len }) => {
                    self.zero_host(HostRange::new(host, len)).await?;
                    rest = rest.skip(len);
                }
                Ok(Write::Allocate(allocation)) => {
                    let len = allocation.range.len();
                    let result = self.zero_allocation(&allocation).await;
                    self.give_back_unused(&allocation, result).await;
                    self.finish(allocation, result);
                    result?;
                    rest = rest.skip(len);
                }
                Ok(Write::Load(table)) => self.load(0, table).await?,
                Ok(Write::Prepare) => {
                    drop(operation);
                    self.flush_image().await?;
                }
                Ok(Write::Wait) => {
                    drop(operation);
                    progress.await;
                }
                Err(fault) => return Err(self.fault(0, fault)),
            }
        }
        self.keep_promise().await
    }

    /// Fills an allocation: zeroes, and around them the old content.
    async fn zero_allocation(&self, a: &Allocation) -> Result<(), Errno> {
        self.zero_host(HostRange::new(a.data_host(), a.range.len())).await?;
        let tail = a.tail();
        self.copy_old(a, a.head(), a.host).await?;
        self.copy_old(a, tail, HostOffset(a.host.0 + (tail.start().0 - a.span.start().0))).await
    }

    /// Zeroes bytes of the file that holds the guest's data. Their storage stays, and the file reaches behind them.
    async fn zero_host(&self, host: HostRange) -> Result<(), Errno> {
        let range = ByteRange::between(host.start().0, host.end().0);
        raw::write_zeroes(self.guest_file(0), range, ZeroFlags::default()).await
    }

    /// Whether zeroing `range` takes less than writing it would: whole clusters need no data written, and there are some,
    /// or there is nothing to be done. Parts of clusters at the ends are written either way.
    async fn zeroes_fast(&self, range: ByteRange, mode: ZeroMode) -> Result<bool, Errno> {
        let (unit, fast) = {
            let md = self.metadata();
            (md.layout().cluster(), md.zeroes_fast(range, mode))
        };
        if !fast {
            return Ok(false);
        }
        let data = &self.image().layers[0].data;
        if mode == ZeroMode::Provision || data.as_ref().is_some_and(|data| data.raw) {
            // reserves what is there: only to see whether the file system knows how
            let file = self.guest_file(0);
            if !file.is_device() && file.allocate(HostRange::new(HostOffset(0), 1)).await.is_err() {
                return Ok(false);
            }
        }
        if !self.whole_clusters(range, unit).is_empty() {
            return Ok(true);
        }
        let pieces = self.resolve(range, usize::MAX).await?;
        Ok(pieces.iter().all(|p| matches!(p.from, From::Zero { .. })))
    }

    /// Refuses to reserve more than there can be room for, before it has filled the file system.
    async fn check_space(&self, range: ByteRange) -> Result<(), Errno> {
        let file = self.guest_file(0);
        if range.len() <= raw::AT_ONCE || file.may_hold(range.len()) {
            return Ok(());
        }
        let (mut rest, mut missing, mut decisions) = (range, 0, 0);
        while !rest.is_empty() {
            decisions += 1;
            if decisions % TURN == 0 {
                ring::yield_now().await;
            }
            let mapped = self.map(0, rest).await?;
            if !matches!(mapped.source, Source::Data(_) | Source::Zero { reserved: true }) {
                missing += mapped.range.len();
                if !file.may_hold(missing) {
                    return Err(Errno::ENOSPC);
                }
            }
            rest = rest.skip(mapped.range.len());
        }
        Ok(())
    }
}
