//! Reads the values of one configuration file by type and collects what is wrong with them.
//!
//! `export::config` knows what the keys mean; this knows how a value becomes a boolean, a number or a path, and how a
//! problem names its place.

use crate::export::keyfile::{self, Entry, Group, ValueFault};
use crate::export::problem::{Problem, Severity, printable};
use std::path::{Path, PathBuf};

/// Longest path in bytes that Linux takes (PATH_MAX without its NUL).
pub(super) const MAX_PATH_BYTES: usize = 4095;

/// A key in its group: the place that a problem names.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) group: &'a Group,
    pub(super) entry: &'a Entry,
}

/// Reads values of one file and collects what is wrong with them.
pub(super) struct Reader<'a> {
    pub(super) file: &'a Path,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a Path) -> Self {
        Reader { file, problems: Vec::new() }
    }

    pub(super) fn errors(&self) -> usize {
        self.problems.iter().filter(|p| p.severity == Severity::Error).count()
    }

    pub(super) fn key(&mut self, severity: Severity, at: At<'_>, what: impl Into<String>, remedy: impl Into<String>) {
        let mut problem = Problem::in_file(severity, self.file, what, remedy).at(at.entry.line).group(&at.group.name);
        problem.key = Some(printable(at.entry.key.as_bytes()));
        problem.value = Some(printable(&at.entry.value));
        self.problems.push(problem);
    }

    pub(super) fn group(
        &mut self,
        severity: Severity,
        group: &Group,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.problems.push(Problem::in_file(severity, self.file, what, remedy).at(group.line).group(&group.name));
    }

    /// Merging is nbd-server's rule, but two disks under one name would hide behind it.
    pub(super) fn warn_of_repetition(&mut self, group: &Group) {
        for line in &group.repeated {
            let what =
                format!("this continues the group of line {}; of a key set twice the last value counts", group.line);
            let problem = Problem::in_file(Severity::Warning, self.file, what, "give each group one header");
            self.problems.push(problem.at(*line).group(&group.name));
        }
    }

    fn value<T>(&mut self, at: At<'_>, read: impl FnOnce(&[u8]) -> Result<T, ValueFault>) -> Option<T> {
        match read(&at.entry.value) {
            Ok(value) => Some(value),
            Err(fault) => {
                self.key(Severity::Error, at, fault.what(), fault.remedy());
                None
            }
        }
    }

    pub(super) fn string(&mut self, at: At<'_>) -> Option<String> {
        self.value(at, keyfile::string)
    }

    pub(super) fn boolean(&mut self, at: At<'_>) -> Option<bool> {
        self.value(at, keyfile::boolean)
    }

    /// nbd-server's numbers have 32 bits.
    pub(super) fn integer(&mut self, at: At<'_>) -> Option<i32> {
        let number = self.integer64(at)?;
        let small = i32::try_from(number).ok();
        if small.is_none() {
            self.key(Severity::Error, at, ValueFault::Range.what(), ValueFault::Range.remedy());
        }
        small
    }

    pub(super) fn integer64(&mut self, at: At<'_>) -> Option<i64> {
        let number = self.value(at, keyfile::integer)?;
        if !number.exact {
            let what = format!("this is read as {}, without what follows the blank", number.value);
            self.key(Severity::Warning, at, what, "write the number alone");
        }
        Some(number.value)
    }

    /// A path; a relative one starts at the directory of this file, not at wherever the daemon was started.
    pub(super) fn path(&mut self, at: At<'_>) -> Option<PathBuf> {
        let text = self.string(at)?;
        if text.is_empty() || text.contains('\0') {
            self.key(Severity::Error, at, "this is no path", "write the path behind `=`");
            return None;
        }
        if text.len() > MAX_PATH_BYTES {
            let what = format!("a path has at most {MAX_PATH_BYTES} bytes");
            self.key(Severity::Error, at, what, "choose a shorter path");
            return None;
        }
        if text.ends_with(|c: char| c.is_ascii_whitespace()) {
            let remedy = r"remove them, or write the last one as \s if they are meant";
            if !at.entry.value.ends_with(br"\s") {
                self.key(Severity::Warning, at, "the blanks at the end belong to the path", remedy);
            }
        }
        let path = PathBuf::from(text);
        if path.is_absolute() {
            return Some(path);
        }
        let directory = self.file.parent().unwrap_or(Path::new(""));
        let what = format!("a relative path, read as {}", directory.join(&path).display());
        self.key(Severity::Warning, at, what, "write an absolute path; nbd-server starts at its working directory");
        Some(directory.join(path))
    }

    pub(super) fn unknown(&mut self, at: At<'_>) {
        let what = match at.entry.key.starts_with(';') {
            true => "this key is not known and ignored; `;` does not begin a comment",
            false => "this key is not known and ignored",
        };
        self.key(Severity::Warning, at, what, "check its spelling, or remove it");
    }

    pub(super) fn ignored_string(&mut self, at: At<'_>, what: &str) {
        if self.string(at).is_some_and(|text| !text.is_empty()) {
            self.key(Severity::Warning, at, what, "remove it");
        }
    }

    pub(super) fn ignored_boolean(&mut self, at: At<'_>, what: &str) {
        if self.boolean(at) == Some(true) {
            self.key(Severity::Warning, at, what, "remove it");
        }
    }

    pub(super) fn refuse_if_true(&mut self, at: At<'_>, what: &str) {
        if self.boolean(at) == Some(true) {
            self.refuse(at, what);
        }
    }

    fn refuse(&mut self, at: At<'_>, what: &str) {
        self.key(Severity::Refused, at, format!("{what}, so this export is not served"), "remove the key");
    }
}
