//! Memory that outlives the process: a file, mapped. What is written to it is in the file at once, also when the process is
//! killed in the next moment; on a tmpfs it lasts as long as the machine runs.

use memmap2::MmapMut;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Maps a file, which gets `len` bytes of zeroes that have their storage: memory that cannot be stored would be noticed
/// as a signal, not as an error.
pub fn map(file: &File, len: u64) -> io::Result<MmapMut> {
    file.set_len(0)?;
    let len = i64::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    nix::fcntl::posix_fallocate(file, 0, len)?;
    // SAFETY: the mapping is undefined only where somebody else changes or truncates the file under it. It is ours, in a
    // directory of ours; whoever may write there may also write to this process.
    unsafe { memmap2::MmapOptions::new().map_mut(file.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_in_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "before").unwrap();
        let open = File::options().read(true).write(true).open(file.path()).unwrap();
        let mut memory = map(&open, 4096).unwrap();
        assert_eq!(&memory[..], [0; 4096]);
        memory[5] = 9;
        let found = std::fs::read(file.path()).unwrap();
        assert_eq!((found.len(), found[5]), (4096, 9));
        assert!(map(&open, u64::MAX).is_err());
    }
}
