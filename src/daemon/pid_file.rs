//! The file that tells others the daemon's process ID.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A written pid file; dropping it removes the file, unless another process has put its own ID there meanwhile.
#[derive(Debug)]
#[must_use = "dropping it removes the file"]
pub struct PidFile {
    path: PathBuf,
    text: String,
}

impl PidFile {
    /// Writes this process's ID. Readers see the old file or the whole new one, never a part.
    pub fn write(path: &Path) -> io::Result<PidFile> {
        let text = format!("{}\n", std::process::id());
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".new");
        fs::write(&temporary, &text)?;
        fs::rename(&temporary, path)?;
        Ok(PidFile { path: path.to_owned(), text })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if fs::read_to_string(&self.path).is_ok_and(|text| text == self.text)
            && let Err(e) = fs::remove_file(&self.path)
        {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_removed_unless_it_is_someone_elses() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("pid");
        let file = PidFile::write(&path).expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), format!("{}\n", std::process::id()));
        drop(file);
        assert!(!path.exists());
        let file = PidFile::write(&path).expect("write");
        fs::write(&path, "1\n").expect("overwrite");
        drop(file);
        assert!(path.exists());
    }
}
