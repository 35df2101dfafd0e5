//! One thread's hands on an image: reads, writes and flushes, with its own descriptors on its own ring.
//!
//! The brain ([`crate::qcow2::Metadata`]) says where bytes are and where they may go; here they are moved. Its mutex is
//! taken for each decision and never held while I/O runs.

use super::shared::{Content, Image, Storage};
use super::{Error, Format, raw};
use crate::block::{BlockDev, Context, Errno, Geometry, Run, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::qcow2::{Allocation, CompressedRange, Map, Mapped, Metadata, Source, Table, Write, ZeroMode, compress};
use crate::ring;
use crate::units::{ByteRange, GuestOffset, HostOffset, HostRange};
use futures_util::future::join_all;
use futures_util::stream::{self, Stream, StreamExt};
use std::cell::{Cell, OnceCell};
use std::rc::{Rc, Weak};
use std::sync::{Arc, MutexGuard};

/// Largest payload frontends should advertise, in bytes.
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// What file systems allocate together as a rule, in bytes.
const RAW_CLUSTER: u32 = 4096;
/// I/O operations of one request in flight together.
const PIECES_IN_FLIGHT: usize = 64;
/// Runs of the chain that are read into the page cache for one request.
const MAX_CACHED: usize = 1 << 16;
/// A write into new clusters of at most this many bytes goes out as one piece with what surrounds it.
const ONE_PIECE: u64 = 256 << 10;
/// Decisions made for one long request before other tasks of the worker get a turn.
pub(super) const TURN: usize = 64;

/// An image as one thread uses it.
pub struct Disk {
    image: Arc<Image>,
    files: Vec<ring::File>,
    /// External data files, where layers have one.
    data_files: Vec<Option<ring::File>>,
    writable: bool,
    /// The image that this one is a temporary layer over, opened when somebody asks for something of its own.
    below: OnceCell<Rc<Disk>>,
    /// A write-back nobody waits for is running from this disk.
    writing_back: Cell<bool>,
    me: Weak<Disk>,
}

/// Where a run of a request comes from, through the whole chain.
#[derive(Clone, Copy, Debug)]
pub(super) enum From {
    Zero { reserved: bool },
    File { layer: usize, host: HostOffset },
    Packed { layer: usize, packed: CompressedRange },
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub range: ByteRange,
    pub from: From,
}

/// Keeps host clusters of the exported layer from being reused while an operation may touch them.
#[must_use = "dropping it says that the operation is over"]
pub(super) struct Operation<'a> {
    disk: &'a Disk,
    token: u64,
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.disk.metadata().leave(self.token);
    }
}

/// One part of a write, decided.
enum Job {
    InPlace(HostOffset, PageBuf),
    Allocate(Allocation, PageBuf),
}

/// What stops a round of decisions.
enum Pause {
    Load(Table),
    Wait,
    Prepare,
}

impl Disk {
    /// Opens the calling thread's descriptors for an image. `writable` wants a counted writer
    /// ([`Image::begin_writing`]) for as long as the disk is used.
    pub fn open(image: Arc<Image>, writable: bool) -> Result<Rc<Disk>, Error> {
        let (mut files, mut data_files) = (Vec::with_capacity(image.layers.len()), Vec::new());
        for (i, layer) in image.layers.iter().enumerate() {
            let write = writable && i == 0;
            files.push(layer.open_file(write)?);
            data_files.push(layer.open_data_file(write)?);
        }
        let (below, writing_back) = (OnceCell::new(), Cell::new(false));
        Ok(Rc::new_cyclic(|me| Disk { image, files, data_files, writable, below, writing_back, me: me.clone() }))
    }

    /// The image that this one is a temporary layer over, if it is one.
    pub(super) fn disk_below_temporary(&self) -> Result<Option<Rc<Disk>>, Error> {
        let Some(base) = self.image.below_temporary() else { return Ok(None) };
        if let Some(below) = self.below.get() {
            return Ok(Some(Rc::clone(below)));
        }
        let below = Disk::open(Arc::clone(base), false)?;
        Ok(Some(Rc::clone(self.below.get_or_init(|| below))))
    }

    /// What a disk of `size` bytes offers.
    pub fn geometry_for(size: u64, writable: bool) -> Geometry {
        Geometry { size, min_block: 1, preferred_block: 4096, max_payload: MAX_PAYLOAD, read_only: !writable }
    }

    /// Bytes that its storage allocates together; a power of two.
    pub fn cluster(&self) -> u32 {
        match self.is_raw() {
            true => RAW_CLUSTER,
            false => self.metadata().layout().cluster() as u32, // at most 2 MiB
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether writes are accepted.
    pub fn writable(&self) -> bool {
        self.writable
    }

    pub(super) fn file(&self, layer: usize) -> &ring::File {
        &self.files[layer]
    }

    /// The exported layer's external data file.
    pub(super) fn data_file(&self) -> Option<&ring::File> {
        self.data_files[0].as_ref()
    }

    /// Where a layer's guest data is.
    pub(super) fn guest_file(&self, layer: usize) -> &ring::File {
        self.data_files[layer].as_ref().unwrap_or(&self.files[layer])
    }

    /// The exported layer's metadata. Panics for a raw image.
    pub(super) fn metadata(&self) -> MutexGuard<'_, Metadata> {
        self.image.layers[0].metadata().expect("only for QCOW2 layers")
    }

    pub(super) fn is_raw(&self) -> bool {
        self.image.format() == Format::Raw
    }

    pub(super) fn operation(&self) -> Option<Operation<'_>> {
        if self.is_raw() {
            return None;
        }
        let token = self.metadata().enter();
        Some(Operation { disk: self, token })
    }

    /// Reads a table and hands it to the brain.
    pub(super) async fn load(&self, layer: usize, table: Table) -> Result<(), Errno> {
        let (result, buf) = self.files[layer].read(table.at, PageBuf::new(table.len as usize)).await;
        if let Some(mut md) = self.image.layers[layer].metadata() {
            md.loaded(table, result.map(|()| &buf[..]));
        }
        self.image.progress.notify_waiters();
        result
    }

    // ---- reading

    /// The first run of `range` in a QCOW2 layer, by what that layer says alone.
    pub(super) async fn map(&self, layer: usize, range: ByteRange) -> Result<Mapped, Errno> {
        loop {
            let progress = self.image.progress.notified();
            let mut progress = std::pin::pin!(progress);
            let answer = {
                let mut md = self.image.layers[layer].metadata().expect("only for QCOW2 layers");
                let answer = md.map(range);
                if matches!(answer, Ok(Map::Wait)) {
                    progress.as_mut().enable(); // before the lock is let go, so that no progress is missed
                }
                answer
            };
            match answer {
                Ok(Map::Extent(mapped)) => return Ok(mapped),
                Ok(Map::Load(table)) => self.load(layer, table).await?,
                Ok(Map::Wait) => progress.await,
                Err(fault) => return Err(self.fault(layer, fault)),
            }
        }
    }

    /// Resolves a range through the chain, at most `limit` pieces from its start, and fewer when that takes long: runs that
    /// are joined cost too.
    pub(super) async fn resolve(&self, range: ByteRange, limit: usize) -> Result<Vec<Piece>, Errno> {
        let mut pieces: Vec<Piece> = Vec::new();
        // what is still to be resolved, last first: (layer, range)
        let mut todo = vec![(0, range)];
        let mut decisions = 0;
        while let Some((layer, range)) = todo.pop() {
            if range.is_empty() {
                continue;
            }
            if pieces.len() >= limit || (!pieces.is_empty() && decisions >= limit.saturating_mul(TURN)) {
                break;
            }
            decisions += 1;
            if decisions % (TURN * 16) == 0 {
                ring::yield_now().await;
            }
            let Some(inside) = self.image.layers.get(layer).map(|l| range.clip(l.size)) else {
                push(&mut pieces, range, From::Zero { reserved: false });
                continue;
            };
            if inside.is_empty() {
                push(&mut pieces, range, From::Zero { reserved: false });
                continue;
            }
            if self.image.layers[layer].format() == Format::Raw {
                todo.push((layer, range.skip(inside.len())));
                push(&mut pieces, inside, From::File { layer, host: HostOffset(inside.start().0) });
                continue;
            }
            let mapped = self.map(layer, inside).await?;
            todo.push((layer, range.skip(mapped.range.len())));
            match mapped.source {
                Source::Unallocated => todo.push((layer + 1, mapped.range)),
                Source::Zero { reserved } => push(&mut pieces, mapped.range, From::Zero { reserved }),
                Source::Data(host) => push(&mut pieces, mapped.range, From::File { layer, host }),
                Source::Compressed(packed) => {
                    pieces.push(Piece { range: mapped.range, from: From::Packed { layer, packed } });
                }
            }
        }
        Ok(pieces)
    }

    async fn read_range(&self, range: ByteRange, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        let pieces = match self.resolve(range, usize::MAX).await {
            Ok(pieces) => pieces,
            Err(e) => return (Err(e), buf),
        };
        if let [piece] = pieces[..] {
            return self.read_piece(piece, buf).await;
        }
        let mut cut = Vec::with_capacity(pieces.len());
        for piece in pieces {
            cut.push((piece, buf.split_to(piece.range.len() as usize)));
        }
        let reads = stream::iter(cut).map(|(piece, part)| self.read_piece(piece, part)).buffered(PIECES_IN_FLIGHT);
        join_parts(reads, buf).await
    }

    async fn read_piece(&self, piece: Piece, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        match piece.from {
            From::Zero { .. } => {
                buf.fill(0);
                (Ok(()), buf)
            }
            From::File { layer, host } => {
                let file = self.guest_file(layer);
                match file.read_cached(host, &mut buf) {
                    Some(result) => (result, buf),
                    None => file.read(host, buf).await,
                }
            }
            From::Packed { layer, packed } => {
                let result = self.unpack(layer, packed, piece.range, &mut buf).await;
                (result, buf)
            }
        }
    }

    /// The runs of a layer's file as (length in bytes, hole): a QCOW2 layer's clusters are data whatever its file holds,
    /// a raw layer's holes are holes.
    pub(super) fn file_extents(&self, layer: usize, run: HostRange, most: usize) -> Vec<(u64, bool)> {
        let layer = &self.image.layers[layer];
        match (&layer.content, &layer.storage) {
            (Content::Raw, Storage::File { file, device: None }) => raw::holes(file, run, most + 1),
            _ => vec![(run.len(), false)],
        }
    }

    async fn unpack(
        &self,
        layer: usize,
        packed: CompressedRange,
        range: ByteRange,
        out: &mut [u8],
    ) -> Result<(), Errno> {
        let Content::Qcow2 { compression, .. } = self.image.layers[layer].content else {
            unreachable!("raw layers hold no compressed clusters");
        };
        let cluster = self.image.layers[layer].metadata().expect("a QCOW2 layer").layout().cluster();
        let (read, bytes) = self.files[layer].read(packed.start, PageBuf::new(packed.len as usize)).await;
        read?;
        let mut whole = PageBuf::new(cluster as usize);
        compress::unpack(compression, &bytes, &mut whole).map_err(|why| {
            let structure = "compressed cluster";
            self.fault(layer, crate::qcow2::Corrupt { structure, at: packed.start.0, why }.into())
        })?;
        let skip = (range.start().0 % cluster) as usize;
        out.copy_from_slice(&whole[skip..skip + out.len()]);
        Ok(())
    }

    // ---- writing

    /// Decides how to write as much of `rest` as can be decided at once.
    fn decide(&self, at: &mut u64, rest: &mut PageBuf) -> (Vec<Job>, Result<Option<Pause>, Errno>) {
        let mut jobs = Vec::new();
        while !rest.is_empty() && jobs.len() < PIECES_IN_FLIGHT {
            let range = ByteRange::between(*at, *at + rest.len() as u64);
            let answer = self.metadata().begin_write(range);
            let len = match answer {
                Ok(Write::InPlace { host, len }) => {
                    jobs.push(Job::InPlace(host, rest.split_to(len as usize)));
                    len
                }
                Ok(Write::Allocate(allocation)) => {
                    let len = allocation.range.len();
                    jobs.push(Job::Allocate(allocation, rest.split_to(len as usize)));
                    len
                }
                Ok(Write::Load(table)) => return (jobs, Ok(Some(Pause::Load(table)))),
                Ok(Write::Wait) => return (jobs, Ok(Some(Pause::Wait))),
                Ok(Write::Prepare) => return (jobs, Ok(Some(Pause::Prepare))),
                Err(fault) => return (jobs, Err(self.fault(0, fault))),
            };
            *at += len;
        }
        (jobs, Ok(None))
    }

    pub(super) async fn write_qcow2(&self, at: GuestOffset, mut rest: PageBuf) -> (Result<(), Errno>, PageBuf) {
        let range = ByteRange::between(at.0, at.0 + rest.len() as u64);
        rest = match self.write_in_place(range, rest).await {
            Ok(done) => return done,
            Err(buf) => buf,
        };
        if let Err(e) = self.note_change(range).await.and(self.make_room().await) {
            return (Err(e), rest);
        }
        let _operation = self.operation();
        let mut at = at.0;
        let mut done = rest.split_to(0);
        let mut result = Ok(());
        while !rest.is_empty() && result.is_ok() {
            let progress = self.image.progress.notified();
            let mut progress = std::pin::pin!(progress);
            progress.as_mut().enable();
            let (jobs, pause) = self.decide(&mut at, &mut rest);
            // what was decided is done before anything is waited for: two writers that each hold an allocation and
            // wait for the other's would wait for ever
            let decided = !jobs.is_empty();
            for (written, part) in join_all(jobs.into_iter().map(|job| self.perform(job))).await {
                result = result.and(written);
                done.unsplit(part);
            }
            result = result.and(match pause {
                Err(e) => Err(e),
                Ok(Some(Pause::Load(table))) => self.load(0, table).await,
                Ok(Some(Pause::Prepare)) => self.flush_image().await,
                Ok(Some(Pause::Wait)) if !decided => {
                    progress.await;
                    Ok(())
                }
                Ok(Some(Pause::Wait) | None) => Ok(()),
            });
        }
        done.unsplit(rest);
        self.start_writeback();
        (result.and(self.keep_promise().await), done)
    }

    /// Writes what changes no metadata, as most writes do. `Err`: this one does.
    async fn write_in_place(&self, range: ByteRange, buf: PageBuf) -> Result<(Result<(), Errno>, PageBuf), PageBuf> {
        let _operation = self.operation();
        let whole = |(_, run): &(&ring::File, HostRange)| run.len() == range.len();
        let Some((file, run)) = self.in_place_at(range).filter(whole) else { return Err(buf) };
        let (written, buf) = file.write(run.start(), buf).await;
        Ok((written.and(self.keep_promise().await), buf))
    }

    async fn perform(&self, job: Job) -> (Result<(), Errno>, PageBuf) {
        let (allocation, buf) = match job {
            Job::InPlace(host, buf) => return self.guest_file(0).write(host, buf).await,
            Job::Allocate(allocation, buf) => (allocation, buf),
        };
        let (result, buf) = self.fill_allocation(&allocation, buf).await;
        self.give_back_unused(&allocation, result).await;
        self.finish(allocation, result);
        (result, buf)
    }

    /// Gives the storage of an allocation back that could not be filled: nothing refers to its clusters yet, and a full
    /// file system needs what was stored there for the tables of the writes that succeeded.
    pub(super) async fn give_back_unused(&self, allocation: &Allocation, result: Result<(), Errno>) {
        if let (Err(_), None, Some(stored)) = (result, self.data_file(), allocation.fresh()) {
            let _ = self.file(0).punch(stored).await;
        }
    }

    /// Commits or aborts an allocation and lets those who wait for it go on.
    pub(super) fn finish(&self, allocation: Allocation, result: Result<(), Errno>) {
        {
            let mut md = self.metadata();
            match result {
                Ok(()) => md.commit(allocation),
                Err(_) => md.abort(allocation),
            }
        }
        self.image.progress.notify_waiters();
    }

    /// Writes an allocation's data and, around it, the old content of its clusters.
    async fn fill_allocation(&self, a: &Allocation, buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        let (head, tail) = (a.head(), a.tail());
        let nothing_around = (head.is_empty() && tail.is_empty()) || (a.zero_around && a.untouched);
        if nothing_around {
            return self.guest_file(0).write(a.data_host(), buf).await;
        }
        if a.span.len() <= ONE_PIECE {
            let mut whole = PageBuf::new(a.span.len() as usize);
            let rest = &mut whole[head.len() as usize..];
            rest[..buf.len()].copy_from_slice(&buf);
            let mut before = whole.split_to(head.len() as usize);
            let data = whole.split_to(buf.len());
            let mut after = whole;
            for (range, part) in [(head, &mut before), (tail, &mut after)] {
                let old = std::mem::replace(part, PageBuf::new(0));
                let (result, old) = self.read_old(a, range, old).await;
                *part = old;
                if let Err(e) = result {
                    return (Err(e), buf);
                }
            }
            before.unsplit(data);
            before.unsplit(after);
            return (self.guest_file(0).write(a.host, before).await.0, buf);
        }
        let tail_host = HostOffset(a.host.0 + (tail.start().0 - a.span.start().0));
        let around = join_all([(head, a.host), (tail, tail_host)].map(|(range, host)| self.copy_old(a, range, host)));
        let (around, (data, buf)) = tokio::join!(around, self.guest_file(0).write(a.data_host(), buf));
        (around.into_iter().fold(data, Result::and), buf)
    }

    pub(super) async fn copy_old(&self, a: &Allocation, range: ByteRange, host: HostOffset) -> Result<(), Errno> {
        if range.is_empty() {
            return Ok(());
        }
        let (result, old) = self.read_old(a, range, PageBuf::new(range.len() as usize)).await;
        result?;
        self.guest_file(0).write(host, old).await.0
    }

    /// The content around an allocation before the write; zeroes beyond the end of the disk.
    async fn read_old(&self, a: &Allocation, range: ByteRange, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if a.zero_around || range.is_empty() {
            buf.fill(0);
            return (Ok(()), buf);
        }
        let inside = range.clip(self.image.size());
        let mut part = buf.split_to(inside.len() as usize);
        buf.fill(0);
        let mut result = Ok(());
        if !inside.is_empty() {
            (result, part) = self.read_range(inside, part).await;
        }
        part.unsplit(buf);
        (result, part)
    }

    // ---- write-back nobody waits for

    /// Waits for a write-back when more metadata waits in memory than may: a client that writes all over a huge disk
    /// makes it faster than it can be written.
    pub(super) async fn make_room(&self) -> Result<(), Errno> {
        if self.metadata().overfull() {
            self.flush_image().await?;
        }
        Ok(())
    }

    /// Starts a write-back when much waits in memory, so that a flush later is short and memory stays bounded.
    pub(super) fn start_writeback(&self) {
        if self.writing_back.get() || !self.metadata().wants_writeback() {
            return;
        }
        let Some(me) = self.me.upgrade() else { return };
        self.writing_back.set(true);
        ring::spawn(async move {
            // its error is the next flush's to report: what could not be written is still to be written
            let _ = me.flush_image().await;
            me.writing_back.set(false);
        });
    }
}

/// The buffer that adjacent parts come from, in order, and the first error; `empty` when there are none.
pub(super) async fn join_parts(
    parts: impl Stream<Item = (Result<(), Errno>, PageBuf)>,
    empty: PageBuf,
) -> (Result<(), Errno>, PageBuf) {
    let mut parts = std::pin::pin!(parts);
    let mut result = Ok(());
    let mut whole: Option<PageBuf> = None;
    while let Some((done, part)) = parts.next().await {
        result = result.and(done);
        match &mut whole {
            Some(whole) => whole.unsplit(part),
            None => whole = Some(part),
        }
    }
    (result, whole.unwrap_or(empty))
}

/// Appends a piece, joined to the last where they continue each other.
fn push(pieces: &mut Vec<Piece>, range: ByteRange, from: From) {
    if let Some(last) = pieces.last_mut() {
        let joins = match (last.from, from) {
            (From::Zero { reserved: a }, From::Zero { reserved: b }) => a == b,
            (From::File { layer: a, host: x }, From::File { layer: b, host: y }) => {
                a == b && x.0 + last.range.len() == y.0
            }
            _ => false,
        };
        if joins {
            last.range = ByteRange::between(last.range.start().0, range.end().0);
            return;
        }
    }
    pieces.push(Piece { range, from });
}

impl BlockDev for Disk {
    fn geometry(&self) -> Geometry {
        Disk::geometry_for(self.image.size(), self.writable)
    }

    async fn read(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if buf.is_empty() {
            return (Ok(()), buf);
        }
        let _operation = self.operation();
        self.read_range(ByteRange::between(at.0, at.0 + buf.len() as u64), buf).await
    }

    async fn write(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        match self.is_raw() {
            true => self.files[0].write(HostOffset(at.0), buf).await,
            false => self.write_qcow2(at, buf).await,
        }
    }

    async fn write_compressed(&self, at: GuestOffset, buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        match self.is_raw() {
            true => self.write(at, buf).await,
            false => self.write_packed(at, buf).await,
        }
    }

    async fn write_zeroes(&self, r: ByteRange, f: ZeroFlags) -> Result<(), Errno> {
        self.zero(r, f).await
    }

    async fn discard(&self, r: ByteRange) -> Result<(), Errno> {
        match self.is_raw() {
            true => raw::discard(&self.files[0], r).await,
            false => self.zero_qcow2(r, ZeroMode::Discard).await,
        }
    }

    async fn flush(&self) -> Result<(), Errno> {
        match self.writable && !self.image.ephemeral() {
            true => self.flush_image().await,
            false => Ok(()),
        }
    }

    async fn status(&self, context: &Context, r: ByteRange, most: usize) -> Result<Vec<Run>, Errno> {
        self.status_in(context, r, most).await
    }

    async fn cache(&self, r: ByteRange) -> Result<(), Errno> {
        let _operation = self.operation();
        for piece in self.resolve(r, MAX_CACHED).await? {
            if let From::File { layer, host } = piece.from
                && let Storage::File { file, .. } = self.image.layers[layer].data_storage()
            {
                raw::will_need(file, HostRange::new(host, piece.range.len()));
            }
        }
        Ok(())
    }
}
