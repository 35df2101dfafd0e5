//! A whole image: opened, written, zeroed, discarded, written compressed, flushed, and opened again.
//!
//! Whatever the image holds: what was written and accepted reads back, no structure in use is overwritten, the file does
//! not grow beyond what was written. An image that was sound stays sound, and none of its writes fails.

use super::images::{Files, MOST_READ, extents, pieces, read, run as run_future, whole};
use super::input::{Case, Second};
use super::script::{Fill, Model, Op, byte, marked, ops, wrong};
use super::walk::{Use, Walk, walk};
use cowgate::block::{BlockDev, Errno};
use cowgate::image::{Disk, Image};
use cowgate::pagebuf::PageBuf;
use cowgate::qcow2::Header;
use cowgate::units::ByteRange;
use std::rc::Rc;
use std::sync::Arc;

/// What a file may grow by besides what is written: tables.
const GROWTH: u64 = 32 << 20;

struct Session {
    disk: Rc<Disk>,
    model: Model,
    /// The image had no contradiction, so everything must succeed and stay true.
    sound: bool,
    cluster: u64,
    written: u64,
    failed: bool,
}

pub fn run(data: &[u8]) {
    let case = Case::of(data);
    run_future(async {
        let files = Files::of(&case).await;
        let Some(image) = files.open().await else { return };
        let size = image.size();
        let cluster = Header::parse(case.image).map_or(0, |h| h.layout.cluster());
        let found = walk(case.image).filter(|_| case.len == case.image.len() as u64);
        let disk = Disk::open(Arc::clone(&image), true).expect("memory can be opened");
        let before = match size <= MOST_READ && size > 0 {
            true => read(&disk, whole(&disk)).await.ok().map(|buf| buf.to_vec()),
            false => None,
        };
        // rubbish in place of compressed data is no contradiction of structures, and is found when it is read
        let readable = |w: &Walk| before.is_some() || (case.kind == Second::None && !w.has_packed());
        let sound = found.as_ref().is_some_and(|w| sound(w) && readable(w));
        let may_write = image.begin_writing().is_ok();
        let mut session = Session { disk, model: Model::new(size), sound, cluster, written: 0, failed: false };
        for (number, op) in ops(case.ops, size).enumerate() {
            if may_write || matches!(op, Op::Read(_) | Op::Extents(_)) {
                session.perform(number, op).await;
            }
        }
        if size > 0 {
            session.verify(before.as_deref()).await;
        }
        let settled = session.disk.settle().await;
        if sound && may_write {
            assert_eq!(settled, Ok(()), "a sound image is flushed");
        }
        if may_write {
            image.writer_left();
        }
        let Session { disk, model, written, failed, .. } = session;
        drop(disk);
        drop::<Arc<Image>>(image);

        let grown = files.image.len().saturating_sub(case.len);
        assert!(grown <= written * 2 + GROWTH, "{written} bytes written and {grown} grown");
        if files.image.len() > 128 << 20 {
            return; // a long sparse file: too slow to look at
        }
        let after = files.image.content();
        untouched(&case, &after, found.as_ref());
        let reopened = files.open().await.expect("an image that was opened can be opened again");
        assert_eq!(reopened.size(), size);
        if sound {
            let walked = walk(&after).expect("it has a header");
            assert!(walked.errors.is_empty(), "a sound image became unsound: {:#?}", walked.errors);
            let leaked = found.as_ref().map_or(0, |w| w.leaks);
            assert!(walked.leaks <= leaked, "{} clusters leaked, {leaked} before", walked.leaks);
            let disk = Disk::open(reopened, false).expect("memory can be opened");
            let again = Session { disk, model, sound, cluster, written, failed };
            if size > 0 {
                again.verify(before.as_deref()).await;
            }
        }
    });
}

/// Whether an image is as the format wants it and as we write it: then everything must go well.
fn sound(walk: &Walk) -> bool {
    let header = &walk.header;
    walk.errors.is_empty() && !header.dirty && !header.corrupt
}

impl Session {
    async fn perform(&mut self, number: usize, op: Op) {
        match op {
            Op::Write(range) | Op::Packed(range) => {
                self.written += range.len() + 2 * self.cluster;
                let bytes: Vec<u8> = (range.start().0..range.end().0).map(|at| byte(number, at)).collect();
                let buf = PageBuf::copy_of(&bytes);
                let (result, buf) = match op {
                    Op::Packed(_) => self.disk.write_compressed(range.start(), buf).await,
                    _ => self.disk.write(range.start(), buf).await,
                };
                assert!(buf[..] == bytes[..], "a buffer comes back as it was");
                self.note(range, result, Fill::Written(number), "write");
            }
            Op::Zeroes(range, flags) => {
                if !flags.may_unmap {
                    self.written += range.len() + 2 * self.cluster;
                }
                let result = self.disk.write_zeroes(range, flags).await;
                if flags.fast && result == Err(Errno::ENOTSUP) {
                    return; // nothing happened
                }
                self.note(range, result, Fill::Zeroes, "write zeroes");
            }
            Op::Discard(range) => {
                let result = self.disk.discard(range).await;
                self.note(range, result, Fill::Unknown, "discard");
            }
            Op::Flush => {
                let result = self.disk.flush().await;
                assert!(!self.sound || result.is_ok(), "flush: {result:?}");
            }
            Op::Read(range) => drop(read(&self.disk, range).await),
            Op::Extents(range) => extents(&self.disk, range).await,
        }
    }

    fn note(&mut self, range: ByteRange, result: Result<(), Errno>, fill: Fill, what: &str) {
        match result {
            Ok(()) => self.model.set(range, fill),
            Err(e) => {
                let excused = e == Errno::ENOSPC;
                assert!(!self.sound || excused, "{what} of {range:?} to a sound image: {e}");
                self.failed = true;
                self.model.set(range, Fill::Unknown);
            }
        }
    }

    /// What a sound image reads back is what was written. One that is not may use a cluster twice.
    async fn verify(&self, before: Option<&[u8]>) {
        for (range, fill) in self.model.runs() {
            if fill == Fill::Before && before.is_none() {
                continue;
            }
            for piece in pieces(range) {
                let found = read(&self.disk, piece).await;
                if !self.sound {
                    continue;
                }
                match found {
                    Ok(found) => assert_eq!(wrong(piece, fill, &found, before), None, "{fill:?} at {piece:?}"),
                    // the fuzzer's compressed data need not be any: that is no structure
                    Err(e) => assert!(fill == Fill::Before || self.failed, "{fill:?} at {piece:?}: {e}"),
                }
            }
        }
    }
}

/// No structure in use holds what a guest wrote, and what nobody has to change is as it was.
fn untouched(case: &Case<'_>, after: &[u8], before: Option<&Walk>) {
    let old = |range: std::ops::Range<usize>| case.image.get(range);
    assert_eq!(old(0..8), after.get(0..8), "magic and version");
    if let Some(header) = old(0..72) {
        assert_eq!(header[60..72], after[60..72], "the snapshots' place in the header");
        assert_eq!(header[8..36], after[8..36], "the header's fields that never change");
    }
    assert!(!marked(&after[..after.len().min(512)]) || marked(case.image), "guest data in the header");
    let Some(walked) = walk(after) else { return };
    let cluster = walked.header.layout.cluster();
    let bytes = |image: &'_ [u8], index: u64| -> Option<Vec<u8>> {
        let at = usize::try_from(index.checked_mul(cluster)?).ok()?;
        image.get(at..(at + cluster as usize).min(image.len())).map(<[u8]>::to_vec)
    };
    // two uses of one cluster in the image as it came: no telling whose it is
    for (index, what) in walked.structures().filter(|&(index, what)| walked.guarded(index, what)) {
        let (Some(now), was) = (bytes(after, index), bytes(case.image, index)) else { continue };
        let came_so = was.as_ref().is_some_and(|was| marked(was)) || marked(case.image);
        assert!(!marked(&now) || came_so, "guest data in the {what:?} in cluster {index}");
    }
    let Some(before) = before else { return };
    for (index, what) in before.structures() {
        if matches!(what, Use::Snapshots | Use::SnapshotL1) {
            // a file that ends inside the cluster may have become longer
            let was = bytes(case.image, index).unwrap_or_default();
            let kept = bytes(after, index).is_some_and(|now| now.starts_with(&was));
            assert!(kept, "the {what:?} in cluster {index} changed");
        }
    }
}
