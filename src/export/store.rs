//! The file of one export in `includedir`: written and removed as a whole.
//!
//! Called by whoever adds and removes exports for a user; blocks, for [`PATIENCE`] at most while others write too.
//! Promises: whatever the moment of a crash, an export's file is there complete or not at all, and once [`add`] or
//! [`remove`] has returned it stays so; definitions of other exports are never lost; different exports have different
//! files. A crash leaves one file [`NEW`] at most, which nobody reads and the next writer takes over.
//!
//! The file of a job that is being ended is put aside by [`set_aside`]: as a *record*, under a name that is not loaded,
//! it tells whoever goes on with the ending after a crash what there is to end. At every moment there is either the file
//! or the record.

use crate::export::config::{self, ExportConfig, Role, Source};
use crate::export::keyfile;
use crate::export::load::{self, Stamps};
use crate::export::problem::printable;
use crate::export::serialize::{Unwritable, serialize};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, RenameFlags, renameat2};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a new file is called until it is complete; also the lock that writers of one directory take turns by. Its name
/// does not end in `.conf`.
pub const NEW: &str = ".cowgate.new";
/// How long to wait for other writers of the same directory.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// What the names of all these files end in.
const SUFFIX: &str = ".conf";
/// What the name of an export's file has in addition while it is only a record.
const ENDING: &str = ".ending";
/// Longest file name in bytes that Linux takes.
const MAX_FILE_NAME_BYTES: usize = 255;
/// Between the beginning of a long name and its digest. Elsewhere two digits follow a `%`.
const DIGEST_MARK: &str = "%-";
const DIGEST_CHARS: usize = 64;
/// The mode of a file that replaces none.
const MODE: u32 = 0o644;

/// Why an export's file was not written or removed. `Display` names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A configuration file cannot express the export.
    #[error(transparent)]
    Unwritable(#[from] Unwritable),
    /// There is a file in its place.
    #[error("{} exists already; remove that export first, or ask for it to be replaced", .0.display())]
    Exists(PathBuf),
    /// The file defines more than this export.
    #[error("{}:{line}: [{other}] is defined in this file too; edit it to take [{export}] out", file.display())]
    Shared {
        /// The file.
        file: PathBuf,
        /// Where the export is defined in it; where the other one is, if it is not.
        line: u32,
        /// The export.
        export: String,
        /// One of the other groups.
        other: String,
    },
    /// The file does not define this export.
    #[error("{} does not define [{export}] (any more); reload the configuration and try again", file.display())]
    NotDefined {
        /// The file.
        file: PathBuf,
        /// The export.
        export: String,
    },
    /// The file has changed meanwhile.
    #[error("{} has just been changed by somebody else; try again", .0.display())]
    Changed(PathBuf),
    /// Others were writing for too long.
    #[error("{}: another process has been writing for {} s; see who it is with fuser(1)", .0.display(), PATIENCE.as_secs())]
    Busy(PathBuf),
    /// The file system refuses.
    #[error("cannot {doing} {}: {source}; {}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The name of an export's file: the export's name with everything percent-encoded that means something to a file
/// system, a shell or a directory listing. One that gets too long ends in a digest.
pub fn file_name(export: &str) -> String {
    let mut name = String::new();
    for (index, byte) in export.bytes().enumerate() {
        let is_plain =
            byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'~') || (byte == b'.' && index > 0);
        match is_plain {
            true => name.push(byte as char),
            false => drop(write!(name, "%{byte:02X}")), // writing to a string cannot fail
        }
    }
    let most = MAX_FILE_NAME_BYTES - SUFFIX.len() - ENDING.len();
    if name.len() > most {
        name.truncate(most - DIGEST_MARK.len() - DIGEST_CHARS);
        // no half of an escape
        if let Some(at) = name.rfind('%').filter(|at| at + 3 > name.len()) {
            name.truncate(at);
        }
        name += DIGEST_MARK;
        for byte in Sha256::digest(export.as_bytes()) {
            let _ = write!(name, "{byte:02x}"); // as above
        }
    }
    name + SUFFIX
}

/// Writes the file of an export into `directory` and returns its path. An existing file is replaced only if `replace`,
/// and only if it defines nothing else.
pub fn add(directory: &Path, config: &ExportConfig, replace: bool) -> Result<PathBuf, StoreError> {
    let text = serialize(config)?;
    let target = directory.join(file_name(&config.name));
    let new = NewFile::begin(directory)?;
    let mode = match target.symlink_metadata() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => MODE,
        Err(source) => return Err(StoreError::Io { doing: "look at", path: target, source }),
        Ok(_) if !replace => return Err(StoreError::Exists(target)),
        Ok(found) => {
            alone(&target, &config.name)?;
            if found.is_file() { found.mode() & 0o777 } else { MODE }
        }
    };
    new.write(text.as_bytes(), mode)?;
    new.place(&target, replace)?;
    sync(directory)?;
    Ok(target)
}

/// Removes the file that defines an export, and nothing but that. `false`: it was gone already.
pub fn remove(export: &str, source: &Source) -> Result<bool, StoreError> {
    let file = &source.file;
    let Some(found) = alone(file, export)? else {
        return Ok(false);
    };
    if !found.defines_it {
        return Err(StoreError::NotDefined { file: file.clone(), export: printable(export.as_bytes()) });
    }
    // between this look and the removal lie microseconds, in which nobody has a reason to write this file
    if !load::unchanged(&found.stamps) {
        return Err(StoreError::Changed(file.clone()));
    }
    match fs::remove_file(file) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(StoreError::Io { doing: "remove", path: file.clone(), source }),
        Ok(()) => {}
    }
    sync(file.parent().unwrap_or(Path::new("/")))?;
    Ok(true)
}

/// The record of a job that is being ended.
#[derive(Debug)]
pub struct Record {
    /// Where it is.
    pub file: PathBuf,
    /// The export that it was.
    pub export: Arc<ExportConfig>,
}

/// Puts the file that defines an export aside, and nothing but that: from then on it is a record. `None`: it was gone
/// already.
pub fn set_aside(export: &str, source: &Source) -> Result<Option<PathBuf>, StoreError> {
    let file = &source.file;
    let Some(found) = alone(file, export)? else {
        return Ok(None);
    };
    if !found.defines_it {
        return Err(StoreError::NotDefined { file: file.clone(), export: printable(export.as_bytes()) });
    }
    if !load::unchanged(&found.stamps) {
        return Err(StoreError::Changed(file.clone())); // as when it is removed
    }
    let directory = file.parent().unwrap_or(Path::new("/"));
    let record = record_path(directory, export);
    // an older record of this name is that of a job whose name was given away since
    match fs::rename(file, &record) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StoreError::Io { doing: "put aside", path: file.clone(), source }),
        Ok(()) => {}
    }
    sync(directory)?;
    Ok(Some(record))
}

/// Makes a record the export's file again. `None`: there is no record.
pub fn put_back(directory: &Path, export: &str) -> Result<Option<PathBuf>, StoreError> {
    let record = record_path(directory, export);
    let target = directory.join(file_name(export));
    // not by a link: two names of one file would be an export that is there and ended
    match renameat2(AT_FDCWD, &record, AT_FDCWD, &target, RenameFlags::RENAME_NOREPLACE) {
        Err(Errno::ENOENT) => return Ok(None),
        Err(Errno::EEXIST) => return Err(StoreError::Exists(target)),
        Err(errno) => return Err(StoreError::Io { doing: "create", path: target, source: errno.into() }),
        Ok(()) => {}
    }
    sync(directory)?;
    Ok(Some(target))
}

/// Removes a record: its job has ended.
pub fn forget(record: &Path) -> Result<(), StoreError> {
    match fs::remove_file(record) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::Io { doing: "remove", path: record.to_owned(), source: e })
        }
        _ => sync(record.parent().unwrap_or(Path::new("/"))),
    }
}

/// The record of an export, if there is one.
pub fn record(directory: &Path, export: &str) -> Result<Option<Record>, StoreError> {
    let found = read_record(&record_path(directory, export))?;
    match found {
        Some(found) if found.export.name != export => {
            Err(StoreError::NotDefined { file: found.file, export: printable(export.as_bytes()) })
        }
        found => Ok(found),
    }
}

/// The record of a job that writes this image, if there is one. Records that cannot be read are not looked at.
pub fn record_of_image(directory: &Path, image: &Path) -> Result<Option<Record>, StoreError> {
    let failed = |source| StoreError::Io { doing: "list", path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let suffix = [SUFFIX, ENDING].concat();
        if !entry.file_name().as_encoded_bytes().ends_with(suffix.as_bytes()) {
            continue;
        }
        if let Ok(Some(record)) = read_record(&entry.path())
            && record.export.path == image
        {
            return Ok(Some(record));
        }
    }
    Ok(None)
}

/// Where the record of an export is, if there is one.
pub fn record_path(directory: &Path, export: &str) -> PathBuf {
    directory.join(file_name(export) + ENDING)
}

fn read_record(file: &Path) -> Result<Option<Record>, StoreError> {
    let failed = |source| StoreError::Io { doing: "read", path: file.to_owned(), source };
    let content = match load::read(file) {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let parsed = config::parse(&content.text, file, Role::Included);
    match &parsed.exports[..] {
        [export] if !parsed.failed => Ok(Some(Record { file: file.to_owned(), export: Arc::clone(export) })),
        _ => Err(failed(io::Error::other("it does not hold one export"))),
    }
}

/// A file that may be removed or replaced for an export.
struct Alone {
    defines_it: bool,
    stamps: Stamps,
}

/// Sees to it that a file defines nothing but this export. `None`: it leads nowhere.
fn alone(file: &Path, export: &str) -> Result<Option<Alone>, StoreError> {
    let content = match load::read(file) {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StoreError::Io { doing: "read", path: file.to_owned(), source }),
    };
    let groups = keyfile::parse(&content.text).0.groups;
    let own = groups.iter().find(|g| g.name == export);
    if let Some(other) = groups.iter().find(|g| g.name != export) {
        return Err(StoreError::Shared {
            file: file.to_owned(),
            line: own.unwrap_or(other).line,
            export: printable(export.as_bytes()),
            other: printable(other.name.as_bytes()),
        });
    }
    let stamps = Stamps::from([(file.to_owned(), content.stamp)]);
    Ok(Some(Alone { defines_it: own.is_some(), stamps }))
}

/// The file that is being written. Dropped before it is placed, it is gone.
#[must_use]
struct NewFile {
    path: PathBuf,
    file: Flock<File>,
    placed: bool,
}

impl NewFile {
    /// Creates it, or takes over what a crash has left, when no other writer of the directory is at work.
    fn begin(directory: &Path) -> Result<NewFile, StoreError> {
        let path = directory.join(NEW);
        let error = |doing, source| StoreError::Io { doing, path: path.clone(), source };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false) // it may be another's, who is at work
                .mode(0o600) // so that only who may write here can hold the lock
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path)
                .map_err(|e| error("create", e))?;
            let found = file.metadata().map_err(|e| error("look at", e))?;
            if !found.is_file() {
                return Err(error("write", io::Error::other("it is not a regular file")));
            }
            let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => file,
                Err((_, Errno::EWOULDBLOCK)) => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                Err((_, errno)) => return Err(error("lock", errno.into())),
            };
            // whoever held the lock before may have placed or removed what was opened here
            let there = path.symlink_metadata().ok();
            if there.as_ref().is_none_or(|t| (t.dev(), t.ino()) != (found.dev(), found.ino())) {
                continue;
            }
            // a crash while it was placed: this is an export's file by another name, which must not be written
            if there.is_some_and(|t| t.nlink() > 1) {
                fs::remove_file(&path).map_err(|e| error("remove", e))?;
                continue;
            }
            file.set_len(0).map_err(|e| error("write", e))?;
            return Ok(NewFile { path, file, placed: false });
        }
        Err(StoreError::Busy(path))
    }

    fn write(&self, text: &[u8], mode: u32) -> Result<(), StoreError> {
        let written = (&*self.file)
            .write_all(text)
            .and_then(|()| self.file.set_permissions(Permissions::from_mode(mode)))
            .and_then(|()| self.file.sync_all());
        written.map_err(|source| StoreError::Io { doing: "write", path: self.path.clone(), source })
    }

    /// Gives it its name. What has that name is replaced, or else it stays and this is an error.
    fn place(mut self, target: &Path, replace: bool) -> Result<(), StoreError> {
        let placed = match replace {
            true => fs::rename(&self.path, target),
            // unlike a rename, a link never takes the place of another file
            false => fs::hard_link(&self.path, target),
        };
        match placed {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(StoreError::Exists(target.to_owned())),
            Err(source) => Err(StoreError::Io { doing: "create", path: target.to_owned(), source }),
            Ok(()) => {
                // after a rename the name NEW is free for the next writer, so it is not this one's to remove
                self.placed = replace;
                Ok(())
            }
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.placed {
            // the lock is still held; what cannot be removed is taken over by the next writer
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes what happened in a directory survive a power failure.
fn sync(directory: &Path) -> Result<(), StoreError> {
    let synced = File::open(directory).and_then(|d| d.sync_all());
    synced.map_err(|source| StoreError::Io { doing: "sync", path: directory.to_owned(), source })
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "create the directory, or change includedir",
        io::ErrorKind::NotADirectory => "includedir must name a directory",
        io::ErrorKind::PermissionDenied => "do this as a user who may write in that directory",
        io::ErrorKind::ReadOnlyFilesystem => "mount the file system writable, or change includedir",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make space in that file system",
        _ => "see to the cause, or remove what is in the way",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn export(name: &str, path: &str) -> ExportConfig {
        ExportConfig::new(name, path, Source { file: "/nowhere".into(), line: 1 })
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().expect("directory")
    }

    fn names_in(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).expect("list").map(|e| e.expect("entry").file_name());
        let mut names: Vec<String> = entries.map(|n| n.into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }

    fn source(file: &Path) -> Source {
        Source { file: file.to_owned(), line: 1 }
    }

    #[test]
    fn file_names() {
        for (export, file) in [
            ("a", "a.conf"),
            ("backup-0b9f4c~x-disk0-full-20250101T120000", "backup-0b9f4c~x-disk0-full-20250101T120000.conf"),
            (".", "%2E.conf"),
            ("..", "%2E..conf"),
            (".hidden", "%2Ehidden.conf"),
            ("a.conf", "a.conf.conf"),
            ("a/../b", "a%2F..%2Fb.conf"),
            ("50% \u{e4}", "50%25%20%C3%A4.conf"),
            ("a*?$'\"\\&|;", "a%2A%3F%24%27%22%5C%26%7C%3B.conf"),
        ] {
            assert_eq!(file_name(export), file);
        }
        let longest = "n".repeat(243);
        assert_eq!(file_name(&longest), format!("{longest}.conf"));
        let longer = file_name(&"n".repeat(244)) + ENDING;
        assert!(longer.len() == MAX_FILE_NAME_BYTES && longer.contains("nnn%-"), "{longer}");
        // the cut falls into an escape: the half of it goes
        for shift in 0..3 {
            let name = file_name(&("n".repeat(175 + shift) + &"/".repeat(100)));
            assert!(name.len() <= MAX_FILE_NAME_BYTES, "{name}");
            let (kept, _) = name.split_once("%-").expect("a digest");
            assert!(kept.ends_with('n') || kept.ends_with("%2F"), "{name}");
        }
    }

    #[test]
    fn what_is_added_is_loaded_and_what_is_removed_is_gone() {
        let d = directory();
        let conf_d = d.path().join("conf.d");
        fs::create_dir(&conf_d).expect("conf.d");
        let base = d.path().join("config");
        fs::write(&base, format!("[generic]\nincludedir = {}\n", conf_d.display())).expect("base");
        let all = [export("a", "/a"), export("..", "/b \\"), export(&"/".repeat(4000), "/c")];
        let files: Vec<PathBuf> = all.iter().map(|e| add(&conf_d, e, false).expect("added")).collect();
        let loaded = load::load(&base);
        assert_eq!((loaded.exports.len(), loaded.has_errors()), (3, false), "{:?}", loaded.problems);
        for (config, file) in all.iter().zip(&files) {
            let found = loaded.exports.iter().find(|e| e.name == config.name).expect("loaded");
            assert!(found.same_service(config) && found.source.file == *file);
            assert!(remove(&config.name, &found.source).expect("removed"));
            assert!(!remove(&config.name, &found.source).expect("gone already"));
        }
        assert_eq!(names_in(&conf_d), [] as [&str; 0]);
    }

    #[test]
    fn a_record_is_found_until_it_is_put_back_or_forgotten() {
        let d = directory();
        let disk = export("a/b", "/images/a b.qcow2");
        let file = add(d.path(), &disk, false).expect("added");
        assert!(record(d.path(), "a/b").expect("read").is_none());
        let aside = set_aside("a/b", &source(&file)).expect("put aside").expect("there was a file");
        assert!(!file.exists() && !aside.to_string_lossy().ends_with(SUFFIX), "{aside:?} is not loaded");
        assert_eq!(set_aside("a/b", &source(&file)).expect("gone already"), None);
        let found = [
            record(d.path(), "a/b").expect("read"),
            record_of_image(d.path(), Path::new("/images/a b.qcow2")).expect("read"),
        ];
        for found in found {
            let found = found.expect("a record");
            assert!(found.file == aside && found.export.same_service(&disk));
        }
        assert!(record_of_image(d.path(), Path::new("/images/b")).expect("read").is_none());
        assert_eq!(put_back(d.path(), "a/b").expect("put back"), Some(file.clone()));
        assert_eq!(put_back(d.path(), "a/b").expect("there is none"), None);
        let aside = set_aside("a/b", &source(&file)).expect("put aside").expect("there was a file");
        add(d.path(), &disk, false).expect("added again");
        assert!(matches!(put_back(d.path(), "a/b"), Err(StoreError::Exists(_))));
        forget(&aside).expect("forgotten");
        forget(&aside).expect("once more");
        assert_eq!(names_in(d.path()), ["a%2Fb.conf"]);
        // a file of several exports is not one job's
        fs::write(&file, "[a/b]\nexportname = /a\n[c]\nexportname = /c\n").expect("write");
        assert!(matches!(set_aside("a/b", &source(&file)), Err(StoreError::Shared { .. })));
    }

    #[test]
    fn an_existing_file_is_replaced_only_when_asked() {
        let d = directory();
        let file = add(d.path(), &export("a", "/old"), false).expect("added");
        assert_eq!(file.metadata().expect("file").mode() & 0o777, MODE);
        fs::set_permissions(&file, Permissions::from_mode(0o640)).expect("mode");
        let error = add(d.path(), &export("a", "/new"), false).expect_err("refused").to_string();
        assert!(error.contains(file.to_str().expect("UTF-8")) && error.contains("exists"), "{error}");
        assert!(fs::read_to_string(&file).expect("file").contains("/old"));
        add(d.path(), &export("a", "/new"), true).expect("replaced");
        assert!(fs::read_to_string(&file).expect("file").contains("/new"));
        assert_eq!(file.metadata().expect("file").mode() & 0o777, 0o640, "its mode stays");
        add(d.path(), &export("b", "/b"), true).expect("nothing to replace");
        assert_eq!(names_in(d.path()), ["a.conf", "b.conf"]);
    }

    #[test]
    fn definitions_of_others_are_never_lost() {
        let d = directory();
        let file = d.path().join("a.conf");
        let text = "# two\n[b]\nexportname = /b\n[a]\nexportname = /a\n";
        fs::write(&file, text).expect("file");
        for error in [remove("a", &source(&file)).err(), add(d.path(), &export("a", "/new"), true).err()] {
            let error = error.expect("refused").to_string();
            assert_eq!(
                error,
                format!("{}:4: [b] is defined in this file too; edit it to take [a] out", file.display())
            );
        }
        assert_eq!(fs::read_to_string(&file).expect("file"), text);
        // nor the base file
        fs::write(&file, "[generic]\n[a]\nexportname = /a\n").expect("file");
        assert!(matches!(remove("a", &source(&file)), Err(StoreError::Shared { line: 2, .. })));
        // nor a file that has become another's
        fs::write(&file, "[b]\nexportname = /b\n").expect("file");
        assert!(matches!(remove("a", &source(&file)), Err(StoreError::Shared { line: 1, .. })));
        fs::write(&file, "").expect("file");
        assert!(matches!(remove("a", &source(&file)), Err(StoreError::NotDefined { .. })));
        // what a crash of somebody else has left half-written can be replaced
        fs::write(&file, "[a]\nexportna").expect("file");
        add(d.path(), &export("a", "/a"), true).expect("replaced");
    }

    #[test]
    fn what_a_crash_leaves_is_not_read_and_does_not_accumulate() {
        let d = directory();
        let new = d.path().join(NEW);
        // before it was complete
        fs::write(&new, "[x]\nexportname = /x\n[y]\nexportname = /y and much more").expect("leftover");
        let a = add(d.path(), &export("a", "/a"), false).expect("added");
        assert_eq!(fs::read_to_string(&a).expect("a"), serialize(&export("a", "/a")).expect("text"));
        assert_eq!(names_in(d.path()), ["a.conf"]);
        // while it was placed: the leftover is an export's file by another name
        fs::hard_link(&a, &new).expect("link");
        let before = fs::read(&a).expect("a");
        add(d.path(), &export("b", "/b"), false).expect("added");
        assert_eq!(fs::read(&a).expect("a"), before);
        assert_eq!(names_in(d.path()), ["a.conf", "b.conf"]);
        // a refusal leaves nothing either
        fs::write(&new, "old").expect("leftover");
        add(d.path(), &export("a", "/a"), false).expect_err("exists");
        assert_eq!(names_in(d.path()), ["a.conf", "b.conf"]);
        assert!(!NEW.ends_with(SUFFIX));
    }

    #[test]
    fn links_are_not_followed_to_what_they_name() {
        let d = directory();
        let (elsewhere, link) = (d.path().join("elsewhere"), d.path().join("a.conf"));
        fs::write(&elsewhere, "[a]\nexportname = /old\n").expect("file");
        symlink(&elsewhere, &link).expect("link");
        assert!(matches!(add(d.path(), &export("a", "/new"), false), Err(StoreError::Exists(_))));
        add(d.path(), &export("a", "/new"), true).expect("replaced");
        assert!(link.symlink_metadata().expect("file").is_file());
        assert_eq!(fs::read_to_string(&elsewhere).expect("file"), "[a]\nexportname = /old\n");
        // one that leads nowhere is there all the same
        fs::remove_file(&link).expect("remove");
        symlink("/nowhere/at/all", &link).expect("link");
        assert!(matches!(add(d.path(), &export("a", "/new"), false), Err(StoreError::Exists(_))));
        add(d.path(), &export("a", "/new"), true).expect("replaced");
        // to remove an export is to remove the link
        fs::remove_file(&link).expect("remove");
        symlink(&elsewhere, &link).expect("link");
        assert!(remove("a", &source(&link)).expect("removed") && elsewhere.exists());
        // a trap in the place of the new file
        symlink(&elsewhere, d.path().join(NEW)).expect("link");
        let error = add(d.path(), &export("b", "/b"), false).expect_err("refused").to_string();
        assert!(error.contains(NEW), "{error}");
        assert_eq!(fs::read_to_string(&elsewhere).expect("file"), "[a]\nexportname = /old\n");
    }

    #[test]
    fn what_is_no_file_is_in_the_way_and_never_a_hang() {
        let d = directory();
        nix::unistd::mkfifo(&d.path().join("a.conf"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        fs::create_dir(d.path().join("b.conf")).expect("directory");
        for name in ["a", "b"] {
            assert!(matches!(add(d.path(), &export(name, "/x"), false), Err(StoreError::Exists(_))));
            let error = add(d.path(), &export(name, "/x"), true).expect_err("in the way").to_string();
            assert!(error.contains(&format!("{name}.conf")) && error.contains("remove what is in the way"), "{error}");
        }
        nix::unistd::mkfifo(&d.path().join(NEW), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        let error = add(d.path(), &export("c", "/x"), false).expect_err("in the way").to_string();
        assert!(error.contains(NEW) && error.contains("not a regular file"), "{error}");
    }

    #[test]
    fn errors_name_the_path_and_the_remedy() {
        let d = directory();
        let missing = d.path().join("nowhere");
        let error = add(&missing, &export("a", "/a"), false).expect_err("missing").to_string();
        assert!(error.contains(missing.to_str().expect("UTF-8")) && error.contains("create the directory"), "{error}");
        // a place where not even root can create files
        let read_only = Path::new("/sys/kernel");
        let error = add(read_only, &export("a", "/a"), false).expect_err("read-only").to_string();
        assert!(error.contains("/sys/kernel/"), "{error}");
        assert!(error.contains("who may write in that directory") || error.contains("writable"), "{error}");
        fs::write(d.path().join("file"), "").expect("file");
        let error = add(&d.path().join("file"), &export("a", "/a"), false).expect_err("a file").to_string();
        assert!(error.contains("must name a directory"), "{error}");
        let error = add(d.path(), &export("a\n", "/a"), false).expect_err("name").to_string();
        assert!(error.contains(r"a\\n") || error.contains(r"a\n"), "{error}");
        assert_eq!(names_in(d.path()), ["file"]);
    }

    /// Counts down when its thread ends, also by a panic.
    struct Countdown<'a>(&'a AtomicUsize);

    impl Drop for Countdown<'_> {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn writers_of_one_directory_take_turns() {
        let d = directory();
        let (won, left) = (AtomicUsize::new(0), AtomicUsize::new(8));
        std::thread::scope(|scope| {
            // nobody ever sees half a file
            scope.spawn(|| {
                let replaced = d.path().join(file_name("replaced"));
                while left.load(Ordering::Relaxed) > 0 {
                    if let Ok(content) = load::read(&replaced) {
                        assert!(content.text.ends_with(b"format = raw\n"));
                    }
                }
            });
            for thread in 0..8 {
                let (d, won) = (d.path(), &won);
                let done = Countdown(&left);
                scope.spawn(move || {
                    let _done = done;
                    for i in 0..10 {
                        add(d, &export(&format!("own-{thread}-{i}"), "/own"), false).expect("added");
                        match add(d, &export(&format!("all-{i}"), &format!("/{thread}")), false) {
                            Ok(_) => drop(won.fetch_add(1, Ordering::Relaxed)),
                            Err(StoreError::Exists(_)) => {}
                            Err(other) => panic!("{other}"),
                        }
                        add(d, &export("replaced", &format!("/{thread}/{i}")), true).expect("replaced");
                    }
                });
            }
        });
        assert_eq!(won.into_inner(), 10, "one writer for each name");
        assert_eq!(names_in(d.path()).len(), 8 * 10 + 10 + 1);
        for name in names_in(d.path()) {
            let text = fs::read_to_string(d.path().join(&name)).expect("file");
            assert!(text.starts_with('[') && text.ends_with("format = raw\n"), "{name}: {text}");
        }
    }

    proptest! {
        #[test]
        fn different_exports_have_different_files(names in proptest::collection::vec(
            prop_oneof![r"[./%~a2E\-]{1,4}", r"n{180,182}[/n%.]{20,90}", "(/{60}|%2F{60}|n{250})(a|%-)?", ".{1,8}"], 2..40,
        )) {
            let mut seen = HashMap::new();
            for name in names {
                let file = file_name(&name);
                prop_assert!(file.len() <= MAX_FILE_NAME_BYTES && file.ends_with(SUFFIX) && !file.starts_with('.'));
                prop_assert!(!file.contains(|c: char| c == '/' || c.is_control() || c == ' '));
                let before = seen.insert(file, name.clone());
                prop_assert!(before.as_ref().is_none_or(|b| *b == name), "{before:?} and {name:?}");
            }
        }
    }
}
