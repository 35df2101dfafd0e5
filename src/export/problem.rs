//! A finding in the configuration, in words that tell where it is, what it is and what to do about it.
//!
//! `export::config`, `export::load` and `export::plan` collect them; the daemon logs them and `--check` prints them.

use serde::{Serialize, Serializer};
use std::fmt;
use std::path::{Path, PathBuf};

/// What a finding means for the exports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Takes effect anyway; a key that is ignored, for instance.
    Warning,
    /// This export is not served, because serving it would do other than its keys ask. The rest of its file is.
    Refused,
    /// The file is set aside: the exports that it defined last stay as they were. In the base file's `[generic]`:
    /// nothing changes, and a start fails.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Warning => "warning",
            Severity::Refused => "refused",
            Severity::Error => "error",
        })
    }
}

/// One finding. `Display` gives one line: `file:line: error: [group] key = value: what; remedy`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What it means for the exports.
    pub severity: Severity,
    /// The file it was found in.
    #[serde(serialize_with = "as_shown")]
    pub file: PathBuf,
    /// Line in that file, from 1, when one line is to blame.
    pub line: Option<u32>,
    /// The group (export name or `generic`) it concerns, made printable.
    pub group: Option<String>,
    /// The key, made printable.
    pub key: Option<String>,
    /// The key's value, made printable.
    pub value: Option<String>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub remedy: String,
}

impl Problem {
    /// A finding about a whole file.
    pub fn in_file(severity: Severity, file: &Path, what: impl Into<String>, remedy: impl Into<String>) -> Problem {
        Problem {
            severity,
            file: file.to_owned(),
            line: None,
            group: None,
            key: None,
            value: None,
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// The same finding, placed on a line.
    pub fn at(mut self, line: u32) -> Problem {
        self.line = Some(line);
        self
    }

    /// The same finding, about a group.
    pub fn group(mut self, name: &str) -> Problem {
        self.group = Some(printable(name.as_bytes()));
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, "{line}:")?;
        }
        write!(f, " {}: ", self.severity)?;
        if let Some(group) = &self.group {
            write!(f, "[{group}] ")?;
        }
        match (&self.key, &self.value) {
            (Some(key), Some(value)) => write!(f, "{key} = {value}: ")?,
            (Some(key), None) => write!(f, "{key}: ")?,
            (None, Some(value)) => write!(f, "{value}: ")?,
            (None, None) => {}
        }
        write!(f, "{}; {}", self.what, self.remedy)
    }
}

/// A path that is not UTF-8 has no other form in JSON.
fn as_shown<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Text from a file made fit for one line of a message: decoded, shortened, control characters escaped.
pub fn printable(text: &[u8]) -> String {
    const SHOWN_CHARS: usize = 100;
    let text = String::from_utf8_lossy(text);
    let mut out = String::new();
    for c in text.chars().take(SHOWN_CHARS) {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    if text.chars().nth(SHOWN_CHARS).is_some() {
        out.push_str("...");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_everything_on_one_line() {
        let mut problem = Problem::in_file(Severity::Error, Path::new("/etc/x.conf"), "not a boolean", "write true");
        assert_eq!(problem.to_string(), "/etc/x.conf: error: not a boolean; write true");
        problem = problem.at(3).group("a\nb");
        problem.key = Some("readonly".into());
        problem.value = Some("yes".into());
        assert_eq!(problem.to_string(), r"/etc/x.conf:3: error: [a\nb] readonly = yes: not a boolean; write true");
    }
}
