//! What a client reads and writes: one disk or several, one behind the other, as much of them as is exported.
//!
//! Every part is an image of its own, with its own lock and metadata. Promises: parts may have any size; a request that
//! crosses a border is cut there; the answer is the same as one large disk would give. The registry makes them.

use super::disk::{MAX_PAYLOAD, join_parts};
use super::{Disk, Error, contexts};
use crate::block::{BlockDev, Context, Errno, Geometry, NamedContext, Run, ZeroFlags};
use crate::pagebuf::PageBuf;
use crate::units::{ByteRange, GuestOffset};
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Most parts that are joined: each costs a descriptor on each worker.
pub const MAX_PARTS: usize = 1024;
/// Largest size in bytes: NBD's.
const MAX_SIZE: u64 = i64::MAX as u64;
/// Parts of one request that are worked on together.
const PARTS_IN_FLIGHT: usize = 16;

/// One disk, or several that are joined.
pub struct Device {
    /// Never empty; in order.
    parts: Vec<Part>,
    /// Where on them it begins.
    start: u64,
    size: u64,
}

struct Part {
    /// Where it begins.
    start: u64,
    /// Where it ends.
    end: u64,
    disk: Rc<Disk>,
}

/// The files `path.0`, `path.1` and so on, as far as they go without a gap.
pub fn parts_of(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let part = |number: usize| {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    };
    // a link that leads nowhere is there: opening it will say so
    let exists = |number: &usize| part(*number).symlink_metadata().is_ok();
    let found: Vec<PathBuf> = (0..=MAX_PARTS).take_while(exists).map(part).collect();
    let refuse = |number: usize, why: String| Err(Error::Refused { path: part(number), why });
    if found.len() > MAX_PARTS {
        return refuse(
            MAX_PARTS,
            format!("a `multifile` export has at most {MAX_PARTS} parts, .0 to .{}", MAX_PARTS - 1),
        );
    }
    if let Some(behind) = (found.len() + 1..=MAX_PARTS).find(exists) {
        let why =
            format!("does not exist, but .{behind} does; the parts of a `multifile` export are numbered without gaps");
        return refuse(found.len(), why);
    }
    match found.is_empty() {
        true => refuse(0, "does not exist; it is the first part of a `multifile` export".to_owned()),
        false => Ok(found),
    }
}

/// The size of an export of `size` bytes on storage of `total`. `path`: the export's.
pub fn exported_size(path: &Path, total: u64, size: Option<u64>) -> Result<u64, Error> {
    let refuse = |why: String| Err(Error::Refused { path: path.to_owned(), why });
    match size {
        Some(size) if size > total => {
            refuse(format!("has {total} bytes, and `filesize = {size}` is more; make it larger, or write what it has"))
        }
        None if total > MAX_SIZE => refuse(format!("has {total} bytes, more than the NBD protocol can name")),
        size => Ok(size.unwrap_or(total)),
    }
}

/// The bytes of all parts together.
pub fn total(sizes: impl IntoIterator<Item = u64>) -> u64 {
    sizes.into_iter().fold(0, u64::saturating_add)
}

impl Device {
    /// Joins disks; `size`: the export has only so many bytes of them. `path`: the export's, for messages.
    pub fn new(path: &Path, disks: Vec<Rc<Disk>>, size: Option<u64>) -> Result<Device, Error> {
        assert!(!disks.is_empty(), "a device has a disk");
        let size = exported_size(path, total(disks.iter().map(|disk| disk.image().size())), size)?;
        let mut parts: Vec<Part> = Vec::with_capacity(disks.len());
        for disk in disks {
            if parts.iter().any(|part| part.disk.image().id() == disk.image().id()) {
                let why =
                    "is two parts of this `multifile` export, under two names; a file can be one part only".to_owned();
                return Err(Error::Refused { path: disk.image().path().to_owned(), why });
            }
            let start = parts.last().map_or(0, |part| part.end);
            let end = start.saturating_add(disk.image().size());
            parts.push(Part { start, end, disk });
        }
        Ok(Device { parts, start: 0, size })
    }

    /// A part of it alone. `path`: the export's, for messages.
    pub fn window(self, path: &Path, window: ByteRange) -> Result<Device, Error> {
        if window.end().0 > self.size {
            let why = format!("has {} bytes, and a part of it ends at byte {}", self.size, window.end().0);
            return Err(Error::Refused { path: path.to_owned(), why });
        }
        Ok(Device { start: self.start + window.start().0, size: window.len(), ..self })
    }

    /// The disks, in order.
    pub fn disks(&self) -> impl Iterator<Item = &Rc<Disk>> {
        self.parts.iter().map(|part| &part.disk)
    }

    /// Bytes that its storage allocates together, at least; a power of two.
    pub fn cluster(&self) -> u32 {
        self.parts[0].disk.cluster()
    }

    /// The contexts it offers.
    pub async fn contexts(&self) -> Vec<NamedContext> {
        match &self.parts[..] {
            [part] => part.disk.image().contexts().await,
            _ => contexts::of_parts(),
        }
    }

    /// The parts that a range touches, each with the range in it.
    fn cut(&self, range: ByteRange) -> impl Iterator<Item = (&Rc<Disk>, ByteRange)> {
        let (start, end) = (self.start + range.start().0, self.start + range.end().0);
        let first = self.parts.partition_point(|part| part.end <= start);
        let touched = self.parts[first..].iter().take_while(move |part| part.start < end);
        touched.filter(|part| part.start < part.end).map(move |part| {
            (&part.disk, ByteRange::between(start.max(part.start) - part.start, end.min(part.end) - part.start))
        })
    }

    /// The disk that holds all of a range, and where in it.
    fn whole(&self, at: u64, len: u64) -> Option<(&Rc<Disk>, u64)> {
        let at = self.start + at;
        let first = self.parts.partition_point(|part| part.end <= at);
        // a request of no bytes may stand at the very end
        let part = self.parts.get(first).or(self.parts.last())?;
        (at + len <= part.end).then(|| (&part.disk, at - part.start))
    }

    /// The disk that holds all of a range, and the range in it.
    pub(super) fn part_of(&self, range: ByteRange) -> Option<(&Disk, ByteRange)> {
        let (disk, at) = self.whole(range.start().0, range.len())?;
        Some((disk, ByteRange::between(at, at + range.len())))
    }

    fn split(&self, at: u64, buf: &mut PageBuf) -> Vec<(&Rc<Disk>, GuestOffset, PageBuf)> {
        let cut = self.cut(ByteRange::between(at, at + buf.len() as u64));
        cut.map(|(disk, range)| (disk, range.start(), buf.split_to(range.len() as usize))).collect()
    }
}

impl BlockDev for Device {
    fn geometry(&self) -> Geometry {
        let writable = self.disks().all(|disk| disk.writable());
        debug_assert_eq!(self.parts[0].disk.geometry().max_payload, MAX_PAYLOAD);
        Disk::geometry_for(self.size, writable)
    }

    async fn read(&self, at: GuestOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if let Some((disk, at)) = self.whole(at.0, buf.len() as u64) {
            return disk.read(GuestOffset(at), buf).await;
        }
        let pieces = self.split(at.0, &mut buf);
        let reads = stream::iter(pieces).map(|(disk, at, part)| disk.read(at, part)).buffered(PARTS_IN_FLIGHT);
        join_parts(reads, buf).await
    }

    async fn write(&self, at: GuestOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if let Some((disk, at)) = self.whole(at.0, buf.len() as u64) {
            return disk.write(GuestOffset(at), buf).await;
        }
        let pieces = self.split(at.0, &mut buf);
        let writes = stream::iter(pieces).map(|(disk, at, part)| disk.write(at, part)).buffered(PARTS_IN_FLIGHT);
        join_parts(writes, buf).await
    }

    async fn write_compressed(&self, at: GuestOffset, mut buf: PageBuf) -> (Result<(), Errno>, PageBuf) {
        if let Some((disk, at)) = self.whole(at.0, buf.len() as u64) {
            return disk.write_compressed(GuestOffset(at), buf).await;
        }
        let pieces = self.split(at.0, &mut buf);
        let writes =
            stream::iter(pieces).map(|(disk, at, part)| disk.write_compressed(at, part)).buffered(PARTS_IN_FLIGHT);
        join_parts(writes, buf).await
    }

    async fn write_zeroes(&self, r: ByteRange, f: ZeroFlags) -> Result<(), Errno> {
        if f.fast && self.whole(r.start().0, r.len()).is_none() {
            // one part may be able to and the next one not, and then nothing may have changed
            return Err(Errno::ENOTSUP);
        }
        let mut result = Ok(());
        for (disk, range) in self.cut(r) {
            result = result.and(disk.write_zeroes(range, f).await);
        }
        result
    }

    async fn discard(&self, r: ByteRange) -> Result<(), Errno> {
        let mut result = Ok(());
        for (disk, range) in self.cut(r) {
            result = result.and(disk.discard(range).await);
        }
        result
    }

    async fn flush(&self) -> Result<(), Errno> {
        if let [part] = &self.parts[..] {
            return part.disk.flush().await;
        }
        join_all(self.disks().map(|disk| disk.flush())).await.into_iter().fold(Ok(()), Result::and)
    }

    async fn status(&self, context: &Context, r: ByteRange, most: usize) -> Result<Vec<Run>, Errno> {
        if let [part] = &self.parts[..] {
            let start = self.start + r.start().0;
            return part.disk.status(context, ByteRange::between(start, start + r.len()), most).await;
        }
        if matches!(context, Context::Bitmap(_) | Context::SinceParent) {
            return Err(Errno::EINVAL);
        }
        let mut runs: Vec<Run> = Vec::new();
        for (disk, range) in self.cut(r) {
            let found = disk.status(context, range, most).await?;
            let told: u64 = found.iter().map(|run| run.len).sum();
            found.into_iter().for_each(|run| Run::push(&mut runs, run.len, run.status));
            if told < range.len() || runs.len() > most {
                break;
            }
        }
        runs.truncate(most);
        Ok(runs)
    }

    async fn cache(&self, r: ByteRange) -> Result<(), Errno> {
        for (disk, range) in self.cut(r) {
            disk.cache(range).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Format, Image};
    use crate::ring::mem::MemDisk;
    use proptest::prelude::*;
    use std::sync::Arc;

    async fn device(sizes: &[usize], limit: Option<u64>) -> Result<Device, Error> {
        let mut disks = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let mut image = Image::in_memory(&[(MemDisk::new(vec![0; size], 7), Format::Raw)]).await?;
            image.id.inode = index as u64;
            disks.push(Disk::open(Arc::new(image), true)?);
        }
        Device::new(Path::new("/joined"), disks, limit)
    }

    #[test]
    fn a_window_is_a_part_of_the_disk() {
        crate::ring::run(async {
            let all = device(&[5000, 3000], None).await.unwrap();
            let disks = all.disks().cloned().collect();
            let path = Path::new("/joined");
            let window = ByteRange::between(4500, 7500);
            let part = Device::new(path, disks, None).unwrap().window(path, window).unwrap();
            assert_eq!(part.geometry().size, 3000);
            let (result, _) = part.write(GuestOffset(400), PageBuf::copy_of(&[7; 200])).await;
            result.unwrap();
            part.discard(ByteRange::between(0, 0)).await.unwrap();
            let (result, seen) = part.read(GuestOffset(0), PageBuf::new(3000)).await;
            result.unwrap();
            let (result, whole) = all.read(GuestOffset(0), PageBuf::new(8000)).await;
            result.unwrap();
            assert!(whole[4500..7500] == seen[..] && whole.iter().filter(|&&b| b == 7).count() == 200);
            assert_eq!((whole[4900], whole[5099]), (7, 7));
            assert!(part.window(path, ByteRange::between(2999, 3001)).is_err(), "a part of the part");
        })
        .unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Against one vector of bytes.
        #[test]
        fn joined_disks_are_one_disk(
            sizes in proptest::collection::vec(0usize..6000, 1..6),
            ops in proptest::collection::vec((0u8..5, any::<u16>(), 0usize..9000, 1u8..), 1..30),
            cut_off in 0u64..500,
        ) {
            let total: usize = sizes.iter().sum();
            let size = (total as u64).saturating_sub(cut_off);
            crate::ring::run(async {
                let device = device(&sizes, (size > 0).then_some(size)).await.unwrap();
                let size = device.geometry().size as usize;
                let mut model = vec![0u8; size];
                for (op, at, len, byte) in ops {
                    let at = at as usize % (size + 1);
                    let len = len.min(size - at);
                    let (offset, range) = (GuestOffset(at as u64), ByteRange::between(at as u64, (at + len) as u64));
                    match op {
                        0 | 1 => {
                            let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                            let (result, back) = device.write(offset, PageBuf::copy_of(&bytes)).await;
                            assert!(result.is_ok() && back[..] == bytes[..]);
                            model[at..at + len].copy_from_slice(&bytes);
                        }
                        2 => {
                            device.write_zeroes(range, ZeroFlags::default()).await.unwrap();
                            model[at..at + len].fill(0);
                        }
                        3 => {
                            let (result, back) = device.read(offset, PageBuf::new(len)).await;
                            assert!(result.is_ok() && back[..] == model[at..at + len]);
                        }
                        _ => {
                            for context in [Context::Allocation, Context::Depth] {
                                let runs = device.status(&context, range, 100).await.unwrap();
                                assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), len as u64);
                                assert!(runs.windows(2).all(|pair| pair[0].status != pair[1].status));
                            }
                        }
                    }
                }
                device.flush().await.unwrap();
                let (result, all) = device.read(GuestOffset(0), PageBuf::new(size)).await;
                assert!(result.is_ok() && all[..] == model[..]);
            }).unwrap();
        }
    }

    #[test]
    fn sizes_are_checked() {
        crate::ring::run(async {
            assert_eq!(device(&[10, 20], Some(25)).await.unwrap().geometry().size, 25);
            let said = device(&[10, 20], Some(31)).await.err().unwrap().to_string();
            assert!(said.contains("/joined: has 30 bytes, and `filesize = 31` is more"), "{said}");
        })
        .unwrap();
        assert!(exported_size(Path::new("/a"), total([u64::MAX, 5]), None).is_err());
        assert_eq!(exported_size(Path::new("/a"), u64::MAX, Some(5)).unwrap(), 5);
    }

    #[test]
    fn zeroing_fast_across_a_border_changes_nothing() {
        crate::ring::run(async {
            let device = device(&[8192, 8192], None).await.unwrap();
            let fast = ZeroFlags { fast: true, may_unmap: true, ..ZeroFlags::default() };
            assert_eq!(device.write_zeroes(ByteRange::between(4096, 12288), fast).await, Err(Errno::ENOTSUP));
        })
        .unwrap();
    }

    #[test]
    fn the_parts_of_a_set() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("disk");
        let make = |number: &str| std::fs::write(dir.path().join(format!("disk.{number}")), "").unwrap();
        assert!(parts_of(&base).unwrap_err().to_string().contains("disk.0: does not exist"));
        make("1");
        assert!(parts_of(&base).unwrap_err().to_string().contains("disk.0: does not exist, but .1 does"));
        make("0");
        for other in ["01", "00", "x", "+2", "2 "] {
            make(other);
        }
        assert_eq!(parts_of(&base).unwrap(), ["disk.0", "disk.1"].map(|name| dir.path().join(name)));
        make("10");
        assert!(parts_of(&base).unwrap_err().to_string().contains("disk.2: does not exist, but .10 does"));
        (2..=MAX_PARTS).for_each(|number| make(&number.to_string()));
        assert!(parts_of(&base).unwrap_err().to_string().contains("at most 1024 parts"));
        std::fs::remove_file(dir.path().join(format!("disk.{MAX_PARTS}"))).unwrap();
        assert_eq!(parts_of(&base).unwrap().len(), MAX_PARTS);
    }
}
