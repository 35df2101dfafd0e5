//! A whole image: checked, repaired, checked again.
//!
//! The check agrees with the second opinion (`walk.rs`) about what is sound. What a repair says it repaired stays repaired,
//! and it changes nothing of a sound image.

use super::images::run as run_future;
use super::input::Case;
use super::walk::walk;
use cowgate::image::check::Subject;
use cowgate::image::repair::Scope;
use cowgate::qcow2::Header;
use cowgate::ring::mem::MemDisk;

/// Memory for counts.
const MEMORY: u64 = 32 << 20;
/// A repair puts new tables behind the last cluster that anything refers to: at most so many behind the end of the file,
/// holes but for the tables.
const GROWTH_CLUSTERS: u64 = 2 * 4096 + 64;
/// Longer ones are too slow to look at.
const MOST_BYTES: u64 = 128 << 20;

pub fn run(data: &[u8]) {
    let case = Case::of(data);
    run_future(async {
        let disk = MemDisk::new(case.image.to_vec(), 1);
        let progress = |_, _| {};
        let Ok(found) = Subject::in_memory(&disk, MEMORY).check(&progress).await else { return };
        assert_eq!(disk.counts().writes, 0, "a check writes nothing");
        let opinion = walk(case.image);
        // flags and feature bits are judged by the check alone
        if let Some(walk) = opinion.as_ref().filter(|_| found.corruptions == 0 && found.check_errors == 0) {
            let missed: Vec<_> = walk.errors.iter().filter(|e| e.contains("users and is counted")).collect();
            assert!(missed.is_empty(), "the check missed {missed:#?}");
        }
        if let Some(walk) = opinion.as_ref().filter(|w| w.errors.is_empty()) {
            let refcounts = found.lines.iter().filter(|l| l.contains("refcount=")).collect::<Vec<_>>();
            assert!(
                found.leaks == walk.leaks_in_file,
                "{} leaks, not {}: {refcounts:#?}",
                walk.leaks_in_file,
                found.leaks
            );
        }
        let before = disk.content();
        for scope in [Scope::Leaks, Scope::All] {
            let so_far = disk.content();
            let mut subject = Subject::in_memory(&disk, MEMORY);
            let Ok((was, now)) = subject.repair(scope, &progress).await else { continue };
            let cluster = Header::parse(case.image).map_or(0, |h| h.layout.cluster());
            let most = before.len() as u64 * 4 + GROWTH_CLUSTERS * cluster + (32 << 20);
            assert!(disk.len() <= most, "it grew to {}", disk.len());
            if disk.len() > MOST_BYTES {
                return;
            }
            let again = Subject::in_memory(&disk, MEMORY).check(&progress).await.expect("it was just checked");
            assert_eq!((again.corruptions, again.leaks), (now.corruptions, now.leaks), "what a repair says holds");
            if (was.corruptions, was.leaks, was.check_errors) == (0, 0, 0) && opinion_sound(&so_far) {
                assert!(disk.content() == so_far, "a sound image was changed");
            }
        }
        assert_eq!(disk.content().get(..8), before.get(..8), "magic and version");
    });
}

/// No contradiction, and nothing that a repair clears: the dirty and corrupt bits, unknown autoclear bits.
fn opinion_sound(image: &[u8]) -> bool {
    walk(image).is_some_and(|w| w.errors.is_empty() && !w.header.dirty && !w.header.corrupt && w.header.autoclear <= 3)
}
