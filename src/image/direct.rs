//! Where the bytes of a read or write are, for who can move them there without our memory in between.
//!
//! Decided from what is in memory: a range that is not wholly data of files, or whose tables would have to be read
//! first, is for [`BlockDev::read`](crate::block::BlockDev::read) and `write`, and so is a write that changes metadata
//! or a bitmap.

use super::disk::Operation;
use super::{Device, Disk, Format};
use crate::block::{Direction, Transfer};
use crate::qcow2::Source;
use crate::ring;
use crate::units::{ByteRange, HostOffset, HostRange};
use std::os::fd::BorrowedFd;

/// Most runs of one request: with more it is in small pieces, and each is an operation.
pub const MAX_DIRECT_RUNS: usize = 16;

/// Where all bytes of a range are, for as long as this lives: clusters are not reused meanwhile.
///
/// Dropped without [`Direct::finish`] it keeps them until the image is closed, because nobody knows when the kernel has
/// done with them.
#[must_use = "finish it when the bytes have been moved"]
pub struct Direct<'a> {
    runs: Vec<DirectRun<'a>>,
    operation: Option<Operation<'a>>,
}

/// Bytes that lie one after the other in a file.
pub struct DirectRun<'a> {
    /// Open on the calling thread with the access that it takes.
    pub file: BorrowedFd<'a>,
    /// Where they are in it.
    pub host: HostRange,
}

impl<'a> Direct<'a> {
    /// The runs, in the order of the range's bytes, which they make up completely.
    pub fn runs(&self) -> &[DirectRun<'a>] {
        &self.runs
    }

    /// No I/O on them is under way any more.
    pub fn finish(mut self) {
        drop(self.operation.take());
    }
}

impl Drop for Direct<'_> {
    fn drop(&mut self) {
        std::mem::forget(self.operation.take());
    }
}

impl Device {
    /// Where the bytes of a transfer are, when they can be moved as they are.
    pub fn direct(&self, transfer: Transfer) -> Option<Direct<'_>> {
        let (disk, range) = self.part_of(transfer.range())?;
        disk.direct(transfer.direction(), range)
    }
}

impl Disk {
    fn direct(&self, direction: Direction, range: ByteRange) -> Option<Direct<'_>> {
        if range.is_empty() {
            return None;
        }
        let operation = self.operation();
        let mut direct = Direct { runs: Vec::with_capacity(1), operation: None };
        let mut rest = range;
        while !rest.is_empty() {
            if direct.runs.len() == MAX_DIRECT_RUNS {
                return None;
            }
            let (file, host) = match direction {
                Direction::Read => self.data_at(rest)?,
                Direction::Write => self.in_place_at(rest)?,
            };
            rest = rest.skip(host.len());
            direct.runs.push(DirectRun { file: file.descriptor()?, host });
        }
        direct.operation = operation;
        Some(direct)
    }

    /// The first run of data of a range: down the chain to the layer that has it.
    fn data_at(&self, range: ByteRange) -> Option<(&ring::File, HostRange)> {
        let mut range = range;
        for (layer, of) in self.image().layers().iter().enumerate() {
            range = range.clip(of.size());
            if range.is_empty() {
                return None;
            }
            if of.format() == Format::Raw {
                return Some((self.guest_file(layer), HostRange::new(HostOffset(range.start().0), range.len())));
            }
            let mapped = of.metadata()?.map_at_hand(range)?;
            match mapped.source {
                Source::Data(host) => return Some((self.guest_file(layer), HostRange::new(host, mapped.range.len()))),
                Source::Unallocated => range = mapped.range,
                Source::Zero { .. } | Source::Compressed(_) => return None,
            }
        }
        None
    }

    /// The first run of a range whose clusters can be written, while an [`Operation`] lives.
    pub(super) fn in_place_at(&self, range: ByteRange) -> Option<(&ring::File, HostRange)> {
        if range.is_empty() {
            return None;
        }
        if self.is_raw() {
            return Some((self.file(0), HostRange::new(HostOffset(range.start().0), range.len())));
        }
        if self.image().layers()[0].bitmaps.is_some() {
            return None; // a change is noted there first
        }
        let run = self.metadata().in_place(range)?;
        Some((self.guest_file(0), run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BlockDev, ZeroFlags};
    use crate::image::bitmap_edit::{Edit, edit};
    use crate::image::create::{CreateOptions, Features, create};
    use crate::image::scratch::{self, Options};
    use crate::image::{Gate, Opener};
    use crate::pagebuf::PageBuf;
    use crate::qcow2::journal::Journal;
    use crate::units::GuestOffset;
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};
    use std::rc::Rc;
    use std::sync::Arc;

    const CLUSTER: u64 = 64 << 10;

    fn image(dir: &Path, name: &str, backing: Option<&str>) -> PathBuf {
        let path = dir.join(name);
        let backing = backing.map(|name| (name.into(), Format::Qcow2));
        let (size, features) = (Some(4 << 20), Features::default());
        let (data_file, data_file_raw, force) = (None, false, false);
        create(&CreateOptions { path: path.clone(), size, features, backing, data_file, data_file_raw, force })
            .unwrap();
        path
    }

    async fn disk(path: &Path, format: Format) -> Rc<Disk> {
        let image = Opener::new(path).unwrap().open(format, &Gate::new(None)).await.unwrap();
        Disk::open(Arc::new(image), true).unwrap()
    }

    async fn write(disk: &Disk, cluster: u64, byte: u8) {
        let (result, _) =
            disk.write(GuestOffset(cluster * CLUSTER), PageBuf::copy_of(&vec![byte; CLUSTER as usize])).await;
        result.unwrap();
    }

    fn clusters(first: u64, end: u64) -> ByteRange {
        ByteRange::between(first * CLUSTER, end * CLUSTER)
    }

    /// The byte that fills each run, which the run's place in its file says.
    fn bytes(direct: &Direct<'_>) -> Vec<(u8, u64)> {
        let byte = |run: &DirectRun<'_>| {
            let mut bytes = vec![0; run.host.len() as usize];
            File::from(run.file.try_clone_to_owned().unwrap()).read_exact_at(&mut bytes, run.host.start().0).unwrap();
            assert!(bytes.iter().all(|b| *b == bytes[0]));
            (bytes[0], run.host.len() / CLUSTER)
        };
        direct.runs().iter().map(byte).collect()
    }

    #[test]
    fn data_of_files_is_found_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (image(dir.path(), "base", None), image(dir.path(), "top", Some("base")));
        ring::run(async {
            let below = disk(&base, Format::Qcow2).await;
            write(&below, 0, 7).await;
            write(&below, 1, 7).await;
            write(&below, 3, 7).await;
            below.flush().await.unwrap();
            drop(below);
            let disk = disk(&top, Format::Qcow2).await;
            write(&disk, 1, 9).await;
            disk.write_zeroes(clusters(3, 4), ZeroFlags::default()).await.unwrap();

            let found =
                |direction, range| disk.direct(direction, range).map(|direct| (bytes(&direct), direct.finish()).0);
            assert_eq!(found(Direction::Read, clusters(0, 1)), None, "the base's table is not in memory");
            let (result, _) = disk.read(GuestOffset(0), PageBuf::new(512)).await;
            result.unwrap();
            assert_eq!(found(Direction::Read, clusters(0, 2)), Some(vec![(7, 1), (9, 1)]));
            assert_eq!(found(Direction::Read, clusters(1, 3)), None, "nothing is stored in the last cluster");
            assert_eq!(found(Direction::Read, clusters(3, 4)), None, "zeroes are in no file");
            assert_eq!(found(Direction::Write, clusters(1, 2)), Some(vec![(9, 1)]));
            for other in [clusters(0, 1), clusters(0, 2), clusters(1, 3), clusters(3, 4)] {
                assert_eq!(found(Direction::Write, other), None, "{other:?} takes more than data");
            }
            write(&disk, 0, 5).await;
            assert_eq!(found(Direction::Write, clusters(0, 2)).map(|runs| runs[0].0), Some(5));
        })
        .unwrap();
    }

    #[test]
    fn what_is_being_read_stays_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "disk", None);
        ring::run(async {
            let disk = disk(&path, Format::Qcow2).await;
            write(&disk, 0, 1).await;
            disk.flush().await.unwrap();
            let direct = disk.direct(Direction::Read, clusters(0, 1)).unwrap();
            let host = direct.runs()[0].host;
            disk.discard(clusters(0, 1)).await.unwrap();
            disk.settle().await.unwrap();
            assert_eq!(bytes(&direct), [(1, 1)], "the cluster was given up, and is not given back yet");
            direct.finish();
            disk.settle().await.unwrap();
            let mut now = vec![1; host.len() as usize];
            File::open(&path).unwrap().read_at(&mut now, host.start().0).unwrap();
            assert_eq!(now[0], 0, "its storage is given back");

            write(&disk, 1, 1).await;
            disk.flush().await.unwrap();
            let direct = disk.direct(Direction::Read, clusters(1, 2)).unwrap();
            let (file, host) = (File::from(direct.runs()[0].file.try_clone_to_owned().unwrap()), direct.runs()[0].host);
            drop(direct);
            disk.discard(clusters(1, 2)).await.unwrap();
            disk.settle().await.unwrap();
            file.read_exact_at(&mut now[..512], host.start().0).unwrap();
            assert_eq!(now[0], 1, "nobody knows whether the kernel still reads it");
        })
        .unwrap();
    }

    #[test]
    fn what_rests_on_a_journal_without_room_is_flushed() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "disk", None);
        ring::run(async {
            let disk = disk(&path, Format::Qcow2).await;
            disk.metadata().keep_journal(Journal::new(Box::new(vec![0; 1 << 20])));
            write(&disk, 0, 1).await;
            assert!(!disk.metadata().journal_lapsed(), "the write was flushed, and the journal begins");
            disk.metadata().keep_journal(Journal::new(Box::new(vec![0; 1 << 20])));
            disk.direct(Direction::Write, clusters(0, 1)).unwrap().finish();
            let device = Device::new(&path, vec![disk], None).unwrap();
            device.keep_promise().await.unwrap();
            assert!(device.disks().all(|disk| !disk.metadata().journal_lapsed()));
            let disk = device.disks().next().unwrap();
            disk.metadata().keep_journal(Journal::new(Box::new(vec![0; 1 << 20])));
            write(disk, 0, 2).await;
            assert!(!disk.metadata().journal_lapsed(), "the same for a write in place");
        })
        .unwrap();
    }

    #[test]
    fn a_change_that_a_bitmap_notes_is_not_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "disk", None);
        let add = Edit::Add { granularity: None, disabled: false };
        edit(&path, "b", &add).unwrap();
        ring::run(async {
            let disk = disk(&path, Format::Qcow2).await;
            write(&disk, 0, 1).await;
            assert!(disk.direct(Direction::Write, clusters(0, 1)).is_none());
            disk.direct(Direction::Read, clusters(0, 1)).unwrap().finish();
        })
        .unwrap();
    }

    #[test]
    fn raw_files_are_all_data_and_joined_ones_are_not_crossed() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a", "b"].map(|name| dir.path().join(name));
        std::fs::write(&paths[0], vec![1; 8192]).unwrap();
        std::fs::write(&paths[1], vec![2; 8192]).unwrap();
        ring::run(async {
            let disks = vec![disk(&paths[0], Format::Raw).await, disk(&paths[1], Format::Raw).await];
            let device = Device::new(Path::new("/joined"), disks, None).unwrap();
            let geometry = device.geometry();
            let found = |start, len| {
                let direct = device.direct(Transfer::new(Direction::Write, start, len, false, &geometry).unwrap())?;
                let place = direct.runs()[0].host;
                direct.finish();
                Some((place.start().0, place.len()))
            };
            assert_eq!((found(512, 1024), found(8192, 8192)), (Some((512, 1024)), Some((0, 8192))));
            assert_eq!((found(8191, 2), found(4096, 0)), (None, None));
        })
        .unwrap();
    }

    #[test]
    fn a_temporary_layer_is_read_and_written_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![3; 4 << 20]).unwrap();
        ring::run(async {
            let base = Arc::new(Opener::new(&path).unwrap().open(Format::Raw, &Gate::new(None)).await.unwrap());
            let over = scratch::over(&base, Options::default()).await.unwrap();
            let disk = Disk::open(Arc::new(over), true).unwrap();
            let direct = disk.direct(Direction::Read, clusters(0, 1)).unwrap();
            assert_eq!(bytes(&direct), [(3, 1)]);
            direct.finish();
            assert!(disk.direct(Direction::Write, clusters(0, 1)).is_none(), "the file below is not written");
            write(&disk, 0, 4).await;
            disk.direct(Direction::Write, clusters(0, 1)).unwrap().finish();
        })
        .unwrap();
        assert!(std::fs::read(&path).unwrap().iter().all(|b| *b == 3));
    }
}
