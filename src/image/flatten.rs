//! `cowgate image flatten`: an image takes in what its chain provides and needs its backing file no more.

use super::rebase::{Rebased, rebase};
use super::{Error, Progress};
use std::path::Path;

/// Copies everything that is read from below into the image, then removes the backing file from its header. What reads
/// as zeroes takes no storage.
pub fn flatten(path: &Path, progress: Progress<'_>) -> Result<Rebased, Error> {
    rebase(path, None, progress)
}
