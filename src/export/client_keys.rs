//! The keys of an export that say what each client gets: whether it is let in, which commands run for it, what it reads
//! and where its writes go. All of them are nbd-server's.

use super::config::Format;
use super::hooks::{self, TemplateError};
use super::problem::Severity;
use super::reader::{At, Reader};
use crate::units::ByteRange;
use std::path::{Path, PathBuf};

/// What each client of an export gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientKeys {
    /// The file of addresses that are let in (`authfile`).
    pub auth_file: Option<PathBuf>,
    /// A command that runs before a client is served, and can turn it away.
    pub prerun: Option<String>,
    /// A command that runs when a client has left.
    pub postrun: Option<String>,
    /// Size of the export in bytes; a raw file that does not exist is made (`filesize`). `None`: that of the storage.
    pub file_size: Option<u64>,
    /// The export is the files `exportname.0`, `exportname.1` and so on (`multifile`).
    pub multi_file: bool,
    /// What a client writes is its own, and gone when it leaves (`copyonwrite`).
    pub copy_on_write: Option<CopyOnWrite>,
    /// A write is answered when it is durable.
    pub sync: bool,
    /// What a disk holds is not trusted. No key: `cowgate restore` sets it.
    pub untrusted: Option<Untrusted>,
}

/// A disk that somebody else has written, for one device: the kernel is to look for no partitions on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Untrusted {
    /// The export is this part of the storage alone; `None`: all of it.
    pub window: Option<ByteRange>,
}

/// Where what a client writes is kept meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CopyOnWrite {
    /// The directory; `None`: that of the image, for devices `/var/tmp`.
    pub directory: Option<PathBuf>,
}

/// The keys as they are read, before what they mean together is known.
#[derive(Default)]
pub(super) struct Draft<'a> {
    keys: ClientKeys,
    cow_dir: Option<(At<'a>, Option<PathBuf>)>,
    sparse_cow: Option<At<'a>>,
    hooks: Vec<At<'a>>,
    multi_file: Option<At<'a>>,
    copy_on_write: Option<At<'a>>,
}

impl<'a> Draft<'a> {
    /// Takes a key, if it is one of these.
    pub(super) fn read(&mut self, at: At<'a>, reader: &mut Reader<'_>) -> bool {
        match at.entry.key.as_str() {
            "authfile" => self.keys.auth_file = path(at, reader),
            "prerun" => self.keys.prerun = self.command(at, reader),
            "postrun" => self.keys.postrun = self.command(at, reader),
            "filesize" => self.keys.file_size = size(at, reader),
            "multifile" => self.multi_file = reader.boolean(at).filter(|on| *on).map(|_| at),
            "copyonwrite" => self.copy_on_write = reader.boolean(at).filter(|on| *on).map(|_| at),
            "cowdir" => self.cow_dir = Some((at, path(at, reader))),
            "sparse_cow" => self.sparse_cow = reader.boolean(at).filter(|on| *on).map(|_| at),
            "sync" => self.keys.sync = reader.boolean(at).unwrap_or(false),
            _ => return false,
        }
        true
    }

    fn command(&mut self, at: At<'a>, reader: &mut Reader<'_>) -> Option<String> {
        let command = reader.string(at).filter(|command| !command.trim().is_empty())?;
        self.hooks.push(at);
        Some(command)
    }

    /// The keys, and complaints of those that contradict each other or the rest of the export.
    pub(super) fn finish(self, path: &Path, format: Format, read_only: bool, reader: &mut Reader<'_>) -> ClientKeys {
        let Draft { mut keys, cow_dir, sparse_cow, hooks, multi_file, copy_on_write } = self;
        for at in hooks {
            check_command(at, path, reader);
        }
        keys.multi_file = multi_file.is_some();
        if let (Some(at), Format::Qcow2) = (multi_file, format) {
            let what = "only raw files can be joined, and the export is QCOW2";
            reader.key(Severity::Error, at, what, "remove the key, or write format = raw if they are raw");
        }
        match copy_on_write {
            Some(at) if read_only => {
                let what = "nothing is written to an export that is readonly, so this key is ignored";
                reader.key(Severity::Warning, at, what, "remove one of the two");
            }
            Some(_) => {
                let directory = cow_dir.and_then(|(_, directory)| directory);
                keys.copy_on_write = Some(CopyOnWrite { directory });
            }
            None => {
                let set = cow_dir.filter(|(_, directory)| directory.is_some()).map(|(at, _)| at);
                for at in [set, sparse_cow].into_iter().flatten() {
                    reader.key(Severity::Warning, at, "this key means nothing without copyonwrite", "remove it");
                }
            }
        }
        keys
    }
}

/// A path; an empty value is as good as none.
fn path(at: At<'_>, reader: &mut Reader<'_>) -> Option<PathBuf> {
    match at.entry.value.trim_ascii().is_empty() {
        true => None,
        false => reader.path(at),
    }
}

fn size(at: At<'_>, reader: &mut Reader<'_>) -> Option<u64> {
    let number = reader.integer64(at)?;
    if number < 0 {
        let remedy = "write the size in bytes, or remove the key: an export is as large as its image then";
        reader.key(Severity::Refused, at, "no export is of this size, so this one is not served", remedy);
    }
    u64::try_from(number).ok().filter(|size| *size > 0)
}

fn check_command(at: At<'_>, path: &Path, reader: &mut Reader<'_>) {
    // read without complaint before
    let Some(command) = reader.string(at) else { return };
    let (what, remedy) = match hooks::fill(&command, &path.to_string_lossy()) {
        Ok(_) => return,
        Err(TemplateError::Percent) => {
            ("a % in a command is followed by s, for the path, or by another %", "write %% for a percent sign")
        }
        Err(TemplateError::Path) => (
            "exportname holds characters that a shell would not take as they are, so %s cannot stand for it",
            "write \"$COWGATE_PATH\" in the place of %s, with the quotes",
        ),
        Err(TemplateError::TooLong) => ("the command is too long", "put it into a script"),
    };
    reader.key(Severity::Refused, at, format!("{what}; this export is not served"), remedy);
}
