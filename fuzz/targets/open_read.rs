//! A whole image: opened, read, asked for its extents. Nothing may be written to it by that.

use super::images::{Files, extents, pieces, read, run as run_future, whole};
use super::input::Case;
use super::script::{Op, ops};
use cowgate::image::Disk;
use std::sync::Arc;

pub fn run(data: &[u8]) {
    let case = Case::of(data);
    run_future(async {
        let files = Files::of(&case).await;
        let Some(image) = files.open().await else { return };
        let disk = Disk::open(Arc::clone(&image), false).expect("memory can be opened");
        if image.size() == 0 {
            return;
        }
        for piece in pieces(whole(&disk)) {
            let _ = read(&disk, piece).await;
        }
        extents(&disk, whole(&disk)).await;
        for op in ops(case.ops, image.size()) {
            match op {
                Op::Read(range) => drop(read(&disk, range).await),
                Op::Extents(range) | Op::Discard(range) => extents(&disk, range).await,
                _ => {}
            }
        }
        // every snapshot is an image of its own
        for name in ["1", "2", "a", "b"] {
            let Ok(snapshot) = image.snapshot(name, None).await else { continue };
            let disk = Disk::open(Arc::new(snapshot), false).expect("memory can be opened");
            if disk.image().size() > 0 {
                let all = whole(&disk);
                let _ = read(&disk, all.prefix(all.len().min(1 << 20))).await;
                extents(&disk, all).await;
            }
        }
        assert_eq!(files.image.counts().writes + files.second.counts().writes, 0, "reading writes nothing");
    });
}
