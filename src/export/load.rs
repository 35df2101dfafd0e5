//! Reads the configuration from disk: the base file and, sorted by name, the `*.conf` files of its `includedir`.
//!
//! Promises: reads what is there and never waits (a FIFO or a directory named `x.conf` is an error, not a hang);
//! every file's size and the number of files are limited; one bad file does not hide the others. A file that looks
//! half-written is reported in [`Loaded::unstable`], so that the daemon can read again shortly after; waiting is the
//! daemon's business. The deciding part, `assemble`, is pure.

use crate::export::config::{self, ExportConfig, Parsed, Role, ServerConfig};
use crate::export::problem::{Problem, Severity};
use crate::export::tls_keys;
use crate::export::watch::Watch;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tracing::debug;

/// Largest configuration file in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most `*.conf` files in `includedir`.
pub const MAX_FILES: usize = 65_536;
/// How long after its last change an empty or broken file passes for one that is still being written.
pub const FRESH: Duration = Duration::from_secs(1);
/// Longest time in which a file system may give two changes the same time stamp: FAT counts in two seconds.
const TICK: Duration = Duration::from_secs(2);

/// The whole configuration as found.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The `[generic]` group. `None`: the base file cannot be relied on (the problems say why), so nothing here may
    /// take effect.
    pub server: Option<ServerConfig>,
    /// Every export that can be served, sorted by name; names are unique.
    pub exports: Vec<Arc<ExportConfig>>,
    /// Files whose exports stay what they were: those with errors and those in `unstable`.
    pub failed: BTreeSet<PathBuf>,
    /// Export names that several files define: these exports stay what they were.
    pub contested: BTreeSet<String>,
    /// What was found, file by file: of files that have not changed since the last load only what keeps them from taking
    /// effect.
    pub problems: Vec<Problem>,
    /// Files that look half-written: read again shortly.
    pub unstable: BTreeSet<PathBuf>,
    /// The stamps of files that changed within [`FRESH`]: although they look complete, more may follow.
    pub recent: Stamps,
}

impl Loaded {
    /// Whether something asked for does not take effect.
    pub fn has_errors(&self) -> bool {
        self.problems.iter().any(|p| p.severity > Severity::Warning)
    }
}

/// What files looked like when they were read.
pub type Stamps = BTreeMap<PathBuf, Stamp>;

/// Whether files still look as they did when they were read.
pub fn unchanged(stamps: &Stamps) -> bool {
    stamps.iter().all(|(path, stamp)| stat(path, None) == Some(*stamp))
}

/// Whether one of the files changed within [`FRESH`].
pub fn any_fresh(stamps: &Stamps) -> bool {
    let now = SystemTime::now();
    stamps.values().any(|stamp| stamp.is_fresh(now))
}

/// A file's identity and last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified_ns: i128,
    /// The modification time can be set at will, this one cannot.
    changed_ns: i128,
}

impl Stamp {
    fn of(found: &FileStat) -> Stamp {
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        Stamp {
            device: found.st_dev,
            inode: found.st_ino,
            size_bytes: found.st_size as u64,
            modified_ns: ns(found.st_mtime, found.st_mtime_nsec),
            changed_ns: ns(found.st_ctime, found.st_ctime_nsec),
        }
    }

    /// Modified less than [`FRESH`] before (or, with a clock that was set, after) `now`.
    fn is_fresh(&self, now: SystemTime) -> bool {
        is_within(self.modified_ns, now, FRESH)
    }

    /// Changed so shortly before `now` that a further change might leave the same times.
    fn is_ambiguous(&self, now: SystemTime) -> bool {
        is_within(self.changed_ns, now, TICK)
    }
}

fn is_within(ns: i128, now: SystemTime, distance: Duration) -> bool {
    let now_ns = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as i128);
    (now_ns - ns).unsigned_abs() < distance.as_nanos()
}

/// Reads the base file `path` and what it includes.
pub fn load(path: &Path) -> Loaded {
    Loader::new(path).load()
}

/// Reads the configuration again and again; a file that has not changed since the last time is not read anew.
#[derive(Debug)]
pub struct Loader {
    path: PathBuf,
    /// The base file at the last load.
    base: Option<Arc<Piece>>,
    /// The included files at the last load, sorted by name.
    included: Vec<Arc<Piece>>,
    /// Knows which of them have changed since.
    watch: Option<Watch>,
}

impl Loader {
    /// A loader for the base file `path` that knows nothing yet.
    pub fn new(path: &Path) -> Loader {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Loader { path, base: None, included: Vec::new(), watch: None }
    }

    /// The base file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the base file and what it includes.
    pub fn load(&mut self) -> Loaded {
        let now = SystemTime::now();
        let found = stat(&self.path, None);
        let base = match still(self.base.take(), found) {
            Ok(base) => base,
            Err(seen) => {
                let read = read_and_parse(&self.path, Role::Base, seen, now);
                let what = "the configuration file does not exist";
                let missing = || Piece::unreadable(&self.path, what.into(), "create it, or name another one with -c");
                (Arc::new(read.unwrap_or_else(missing)), true)
            }
        };
        let mut included = Vec::new();
        let mut includedir_problem = None;
        let include_dir = base.0.parsed.server.as_ref().and_then(|s| s.include_dir.as_ref());
        if include_dir.is_none() {
            self.watch = None;
        }
        if let Some(directory) = include_dir {
            match self.load_included(directory, now) {
                Ok(files) => included = files,
                Err(what) => {
                    let what = format!("includedir {}: {what}", directory.display());
                    includedir_problem =
                        Some(Problem::in_file(Severity::Error, &self.path, what, "create it, or change the key"));
                }
            }
        }
        let mut loaded = assemble(std::iter::once(&base).chain(&included));
        if let Some(problem) = includedir_problem {
            // the directory's exports are unknown, which is not the same as none
            loaded.server = None;
            loaded.problems.push(problem);
        }
        self.base = Some(base.0);
        self.included = included.into_iter().map(|(piece, _)| piece).collect();
        loaded
    }

    /// The files of `includedir`, each with whether it was read anew.
    fn load_included(&mut self, directory: &Path, now: SystemTime) -> Result<Vec<Found>, String> {
        let handle = File::open(directory).map_err(|e| e.to_string())?;
        let (known, watch) = (std::mem::take(&mut self.included), self.watch.take());
        let touched = watch.as_ref().and_then(|watch| watch.touched(directory));
        let listed = touched.is_none();
        let (watch, names) = match touched {
            Some(touched) => (watch, touched.into_iter().filter(|name| is_conf(name)).collect()),
            // the watch first: what changes after the listing is not to be missed
            None => {
                (Watch::new(directory).inspect_err(|e| debug!("{}: {e}", directory.display())).ok(), list(directory)?)
            }
        };
        let mut read = Vec::with_capacity(known.len());
        let (mut known, mut names) = (known.into_iter().peekable(), names.into_iter().peekable());
        // both are sorted: the smaller name comes next, the same name from both together
        loop {
            let order = match (known.peek(), names.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(known), Some(name)) => known.name.cmp(name),
            };
            let known = known.next_if(|_| order.is_le());
            match names.next_if(|_| order.is_ge()) {
                // even with the same stamp: it may be that of two changes
                Some(name) if !listed => {
                    read.extend(read_included(directory, &handle, &name, known.and_then(|known| known.stamp), now));
                }
                Some(name) => match still(known, stat(Path::new(&name), Some(&handle))) {
                    Ok(piece) => read.push(piece),
                    Err(seen) => read.extend(read_included(directory, &handle, &name, seen, now)),
                },
                // it was not touched; if it was listed, it has gone
                None => match known.filter(|_| !listed) {
                    Some(known) if known.watched => read.push((known, false)),
                    Some(known) => read.extend(read_included(directory, &handle, &known.name, known.stamp, now)),
                    None => {}
                },
            }
        }
        if read.len() > MAX_FILES {
            return Err(format!("more than {MAX_FILES} .conf files"));
        }
        // only now: with it the next load relies on what this one has found
        self.watch = watch;
        Ok(read)
    }
}

/// A file as it was read, and whether that was just now.
type Found = (Arc<Piece>, bool);

/// Reads a file of `includedir`. `None`: there is no such file (any more).
fn read_included(directory: &Path, handle: &File, name: &OsStr, seen: Option<Stamp>, now: SystemTime) -> Option<Found> {
    let mut piece = read_and_parse(&directory.join(name), Role::Included, seen, now)?;
    piece.watched = piece.complete && is_watchable(handle, name);
    Some((Arc::new(piece), true))
}

/// What a file looks like, by its path or by its name in a directory.
fn stat(path: &Path, directory: Option<&File>) -> Option<Stamp> {
    let found = match directory {
        Some(directory) => fstatat(directory, path, AtFlags::empty()),
        None => nix::sys::stat::stat(path),
    };
    found.ok().map(|found| Stamp::of(&found))
}

/// A file that changes only under its name in this directory: no link, symbolic or hard, leads to it from elsewhere.
fn is_watchable(directory: &File, name: &OsStr) -> bool {
    let found = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
    found.is_ok_and(|found| is_regular(&found) && found.st_nlink == 1)
}

fn is_regular(found: &FileStat) -> bool {
    SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG
}

fn is_conf(name: &OsStr) -> bool {
    name.as_encoded_bytes().ends_with(b".conf")
}

/// The known file, not to be read anew, if it still is what it was. `Err`: what it looked like, if it was known.
fn still(known: Option<Arc<Piece>>, found: Option<Stamp>) -> Result<Found, Option<Stamp>> {
    match known {
        Some(known) if known.certain && known.stamp == found => Ok((known, false)),
        known => Err(known.and_then(|known| known.stamp)),
    }
}

/// The names that end in `.conf` of a directory, in sorted order.
fn list(directory: &Path) -> Result<Vec<OsString>, String> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|e| e.to_string())? {
        let name = entry.map_err(|e| e.to_string())?.file_name();
        if is_conf(&name) {
            files.push(name);
        }
        if files.len() > MAX_FILES {
            return Err(format!("more than {MAX_FILES} .conf files"));
        }
    }
    files.sort_unstable();
    Ok(files)
}

/// One file, read.
#[derive(Debug)]
pub struct Piece {
    path: PathBuf,
    name: OsString,
    parsed: Parsed,
    stamp: Option<Stamp>,
    unstable: bool,
    fresh: bool,
    /// It was read whole.
    complete: bool,
    /// While it has this stamp it has this content.
    certain: bool,
    /// While the watch is silent it has this stamp.
    watched: bool,
}

impl Piece {
    fn unreadable(path: &Path, what: String, remedy: &str) -> Piece {
        let problems = vec![Problem::in_file(Severity::Error, path, what, remedy)];
        let parsed = Parsed { server: None, exports: Vec::new(), defined: Vec::new(), problems, failed: true };
        Piece::new(path, parsed)
    }

    fn new(path: &Path, parsed: Parsed) -> Piece {
        let name = path.file_name().unwrap_or_default().to_owned();
        let (unstable, fresh, complete, certain, watched) = Default::default();
        Piece { path: path.to_owned(), name, parsed, stamp: None, unstable, fresh, complete, certain, watched }
    }
}

/// `seen`: what it looked like at an earlier load. A file whose last line is not ended is complete after all when it has
/// not changed since. `None`: there is no such file (any more).
fn read_and_parse(path: &Path, role: Role, seen: Option<Stamp>, now: SystemTime) -> Option<Piece> {
    let content = match read(path) {
        Ok(content) => content,
        // gone since the directory was listed; a dangling link, however, is there and cannot be read
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.symlink_metadata().is_err() => return None,
        Err(e) => {
            let remedy = "make it a readable file, or remove it";
            return Some(Piece::unreadable(path, format!("cannot be read: {e}"), remedy));
        }
    };
    let parsed = config::parse(&content.text, path, role);
    let fresh = content.stamp.is_fresh(now);
    let unended = content.text.last().is_some_and(|b| *b != b'\n') && seen != Some(content.stamp);
    let incomplete = content.text.is_empty() || parsed.failed || unended;
    let unstable = content.changed || (fresh && incomplete);
    let complete = !unstable && !unended;
    let certain = complete && !content.stamp.is_ambiguous(now);
    Some(Piece { stamp: Some(content.stamp), unstable, fresh, complete, certain, ..Piece::new(path, parsed) })
}

/// What a file holds.
pub(super) struct Content {
    pub(super) text: Vec<u8>,
    pub(super) stamp: Stamp,
    /// It changed while it was read.
    changed: bool,
}

/// Reads a configuration file, if it is one: never waits, and not more than [`MAX_FILE_BYTES`].
pub(super) fn read(path: &Path) -> io::Result<Content> {
    // without O_NONBLOCK a FIFO would wait for a writer
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
    let before = checked_stamp(&file)?;
    let mut text = Vec::new();
    (&mut file).take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    let after = checked_stamp(&file)?;
    let changed = before != after || after.size_bytes != text.len() as u64;
    Ok(Content { text, stamp: after, changed })
}

fn checked_stamp(file: &File) -> io::Result<Stamp> {
    let found = fstat(file)?;
    match is_regular(&found) {
        true => Ok(Stamp::of(&found)),
        false => Err(io::Error::other("not a regular file")),
    }
}

/// Puts the files together, the base file first: finds names defined twice and sets failed files aside. Each comes with
/// whether it was read anew: of the others only what keeps them from taking effect is reported.
fn assemble<'a>(pieces: impl Iterator<Item = &'a Found>) -> Loaded {
    let mut loaded = Loaded::default();
    let mut owners: HashMap<&str, (&Path, u32)> = HashMap::new();
    for (index, (piece, is_new)) in pieces.enumerate() {
        if index == 0 {
            loaded.server = piece.parsed.server.clone();
        }
        if let Some(stamp) = piece.stamp.filter(|_| piece.fresh) {
            loaded.recent.insert(piece.path.clone(), stamp);
        }
        let new = piece.parsed.problems.iter().filter(|p| *is_new || p.severity > Severity::Warning);
        loaded.problems.extend(new.cloned());
        if piece.unstable {
            loaded.unstable.insert(piece.path.clone());
        }
        if piece.unstable || piece.parsed.failed {
            loaded.failed.insert(piece.path.clone());
            continue;
        }
        for (name, line) in &piece.parsed.defined {
            match owners.get(name.as_str()) {
                Some((first_file, first_line)) => {
                    let what = format!("{}:{first_line} defines the same export", first_file.display());
                    let remedy = "remove one of the two; until then this export stays as it was";
                    let problem = Problem::in_file(Severity::Error, &piece.path, what, remedy);
                    loaded.problems.push(problem.at(*line).group(name));
                    loaded.contested.insert(name.clone());
                }
                None => {
                    owners.insert(name, (&piece.path, *line));
                }
            }
        }
        loaded.exports.extend(piece.parsed.exports.iter().cloned());
    }
    let contested = &loaded.contested;
    if !contested.is_empty() {
        loaded.exports.retain(|e| !contested.contains(&e.name));
    }
    if let Some(server) = &loaded.server {
        // every time, not only when their file was read: the base file may have changed
        loaded.exports.retain(|e| match e.tls.conflict(&server.tls) {
            None => true,
            Some(conflict) => {
                loaded.problems.push(tls_keys::refused(&e.source.file, e.source.line, &e.name, conflict));
                false
            }
        });
    }
    loaded.exports.sort_by(|a, b| a.name.cmp(&b.name));
    loaded
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A configuration directory: `config` includes `conf.d`.
    struct Directory(tempfile::TempDir);

    impl Directory {
        fn new() -> Directory {
            let directory = Directory(tempfile::tempdir().expect("temporary directory"));
            fs::create_dir(directory.path("conf.d")).expect("conf.d");
            directory.write("config", "[generic]\nincludedir = conf.d\n");
            directory
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).expect("write");
        }

        /// Makes every file look as if it had been written long ago.
        fn age(&self) {
            let included = fs::read_dir(self.path("conf.d")).expect("list").map(|e| e.expect("entry").path());
            for file in included.chain([self.path("config")]).filter(|p| p.is_file()) {
                let old = SystemTime::now() - 10 * FRESH;
                File::options().write(true).open(file).and_then(|f| f.set_modified(old)).expect("age");
            }
        }

        fn load(&self) -> Loaded {
            load(&self.path("config"))
        }
    }

    fn names(loaded: &Loaded) -> Vec<&str> {
        loaded.exports.iter().map(|e| e.name.as_str()).collect()
    }

    fn errors(loaded: &Loaded) -> Vec<String> {
        loaded.problems.iter().filter(|p| p.severity == Severity::Error).map(|p| p.to_string()).collect()
    }

    #[test]
    fn included_files_are_read_and_others_are_not() {
        let d = Directory::new();
        d.write("conf.d/b.conf", "[b]\nexportname=/b\n");
        d.write("conf.d/a.conf", "[c]\nexportname=/c\n[a]\nexportname=/a\n");
        d.write("conf.d/.hidden.conf", "[h]\nexportname=/h\n");
        d.write("conf.d/x.conf~", "[x]\nexportname=/x\n");
        d.write("conf.d/empty.conf", "");
        fs::create_dir(d.path("conf.d/sub")).expect("sub");
        d.write("conf.d/sub/n.conf", "[n]\nexportname=/n\n");
        d.age();
        let loaded = d.load();
        assert_eq!(names(&loaded), ["a", "b", "c", "h"]);
        // the relative includedir starts at the file that names it, and that is worth a warning
        assert_eq!((loaded.problems.len(), loaded.has_errors(), loaded.recent.len()), (1, false, 0));
        assert_eq!(loaded.exports[1].source.file, d.path("conf.d/b.conf"));
    }

    #[test]
    fn a_bad_file_is_set_aside_alone() {
        let d = Directory::new();
        d.write("conf.d/bad.conf", "[x]\nexportname=/x\nreadonly=maybe\n");
        d.write("conf.d/good.conf", "[a]\nexportname=/a\n");
        d.age();
        let loaded = d.load();
        assert_eq!(names(&loaded), ["a"]);
        assert_eq!(loaded.failed, BTreeSet::from([d.path("conf.d/bad.conf")]));
        assert!(loaded.unstable.is_empty() && loaded.has_errors() && loaded.server.is_some());
    }

    #[test]
    fn the_same_name_in_two_files_names_both() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[x]\nexportname=/1\n[a]\nexportname=/a\n");
        d.write("conf.d/b.conf", "\n[x]\nexportname=/2\nauthfile=/refused\n");
        d.age();
        let loaded = d.load();
        assert_eq!(names(&loaded), ["a"]);
        assert!(loaded.contested.contains("x") && loaded.failed.is_empty());
        let [error] = &errors(&loaded)[..] else { panic!("one error: {:?}", loaded.problems) };
        assert!(error.contains("b.conf:2: error: [x]") && error.contains("a.conf:1 defines"), "{error}");
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_never_a_hang() {
        let d = Directory::new();
        fs::create_dir(d.path("conf.d/dir.conf")).expect("directory");
        std::os::unix::fs::symlink("/nowhere/at/all", d.path("conf.d/link.conf")).expect("link");
        nix::unistd::mkfifo(&d.path("conf.d/fifo.conf"), nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        d.write("conf.d/large.conf", &"#\n".repeat(MAX_FILE_BYTES as usize / 2 + 1));
        d.write("conf.d/ok.conf", "[a]\nexportname=/a\n");
        d.age();
        let loaded = d.load();
        assert_eq!((names(&loaded), loaded.failed.len()), (vec!["a"], 4));
        assert_eq!(errors(&loaded).len(), 4);
    }

    #[test]
    fn a_missing_includedir_or_base_file_leaves_nothing_to_rely_on() {
        let d = Directory::new();
        d.write("config", "[generic]\nincludedir = /nowhere/at/all\n[a]\nexportname=/a\n");
        let loaded = d.load();
        assert!(loaded.server.is_none());
        assert!(errors(&loaded)[0].contains("/nowhere/at/all"));
        let loaded = load(&d.path("nowhere"));
        assert!(loaded.server.is_none() && errors(&loaded)[0].contains("does not exist"));
    }

    #[test]
    fn a_file_that_is_being_written_is_unstable() {
        let d = Directory::new();
        d.write("conf.d/empty.conf", "");
        d.write("conf.d/torn.conf", "[x]\nexportna");
        d.write("conf.d/unended.conf", "[y]\nexportname=/srv/y.qco");
        d.write("conf.d/whole.conf", "[a]\nexportname=/a\n");
        let mut loader = Loader::new(&d.path("config"));
        let first = loader.load();
        assert_eq!(first.unstable.len(), 3);
        assert_eq!(first.failed, first.unstable);
        assert!(first.recent.contains_key(&d.path("conf.d/whole.conf")) && unchanged(&first.recent));
        assert_eq!(names(&first), ["a"]);
        // unchanged since: the last line is simply not ended
        let second = loader.load();
        assert_eq!(names(&second), ["a", "y"]);
        // long unchanged: empty means empty, and an error is an error
        d.age();
        let third = d.load();
        assert!(third.unstable.is_empty() && third.recent.is_empty() && !unchanged(&first.recent));
        assert_eq!(third.failed, BTreeSet::from([d.path("conf.d/torn.conf")]));
    }

    #[test]
    fn only_what_has_changed_is_read_again() {
        let d = Directory::new();
        d.write("conf.d/a.conf", "[a]\nexportname=/a\nsize=5\n");
        d.write("conf.d/bad.conf", "[b]\n");
        let mut loader = Loader::new(&d.path("config"));
        let first = loader.load();
        assert_eq!(first.problems.len(), 3, "includedir is relative, size unknown, b without a path");
        let old = SystemTime::now() - 10 * FRESH;
        File::options().write(true).open(d.path("config")).and_then(|f| f.set_modified(old)).expect("age");
        let second = loader.load();
        assert!(Arc::ptr_eq(&first.exports[0], &second.exports[0]));
        assert_eq!(errors(&second).len(), 1, "a warning is said once, an error as long as it lasts");
        // same size and modification time
        let modified = d.path("conf.d/a.conf").metadata().and_then(|m| m.modified()).expect("modified");
        d.write("conf.d/a.conf", "[a]\nexportname=/b\nsize=5\n");
        let file = File::options().write(true).open(d.path("conf.d/a.conf")).expect("open");
        file.set_modified(modified).expect("set time");
        assert_eq!(loader.load().exports[0].path, Path::new("/b"));
        // a base file that says nothing, and one that says it again
        d.write("config", "");
        assert!(loader.load().exports.is_empty());
        d.write("config", "[generic]\nincludedir = conf.d\n");
        assert_eq!(names(&loader.load()), ["a"]);
        fs::remove_file(d.path("conf.d/a.conf")).expect("remove");
        assert!(loader.load().exports.is_empty());
        // another directory of that name
        fs::rename(d.path("conf.d"), d.path("former")).expect("rename");
        fs::create_dir(d.path("conf.d")).expect("conf.d");
        d.write("conf.d/c.conf", "[c]\nexportname=/c\n");
        assert_eq!(names(&loader.load()), ["c"]);
        // what a link leads to changes unnoticed by the directory
        d.write("elsewhere", "[l]\nexportname=/l\n");
        std::os::unix::fs::symlink(d.path("elsewhere"), d.path("conf.d/l.conf")).expect("link");
        assert_eq!(names(&loader.load()), ["c", "l"]);
        d.write("elsewhere", "[m]\nexportname=/m\n");
        assert_eq!(names(&loader.load()), ["c", "m"]);
    }
}
