//! `cowgate backup begin`.
//!
//! The order makes it repeatable: first the export, which the daemon gives to one job only; then the image, which
//! appears as a whole and never in the place of another; then a trial. Until the trial has succeeded nobody was told of
//! the export, so a failure takes back what this call has made, and a kill leaves what the next call takes over.

use crate::cli::control::{Control, Failure, export_path, percent_encoded};
use crate::cli::export::key;
use crate::cli::progress::print_json;
use crate::cli::size;
use crate::export::name::{BackupKind, Disk, Time};
use crate::image::blank::{self, Found};
use crate::image::create::{CreateOptions, Features, create};
use crate::image::{Error, Format};
use crate::serve::control::wire::{AddOutcome, Added, BeginBackup, Health, KeyValue, Listening, Probed, Removed};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Virtual sizes are whole multiples of this many bytes.
const SECTOR: u64 = 512;
/// Smallest clusters of an overlay; larger ones are those of its parent.
const CLUSTER_BYTES: u64 = 64 << 10;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("disk_size").required(true).args(["size", "parent"]))]
pub(in crate::cli) struct Args {
    /// The image to make
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Its size in bytes, or with a suffix K, M, G or T (1K is 1024)
    #[arg(long, value_name = "N", value_parser = size::parse)]
    size: Option<u64>,
    /// The image of the backup before, a QCOW2 file: what the new image does not hold is read from it
    #[arg(long, value_name = "FILE")]
    parent: Option<PathBuf>,
    /// The machine's backup context: ASCII letters, digits, `-`, `_` and `.`
    #[arg(long, value_name = "ID")]
    vm_context: String,
    /// The disk's number, from 0 to 999
    #[arg(long, value_name = "N")]
    disk: Disk,
    /// What the backup holds: full or incr [default: incr with --parent, else full]
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<BackupKind>,
    /// When it is made: YYYYMMDDTHHMMSS in UTC, as in RFC 3339, or @SECONDS since 1970 [default: now; of a job that has
    /// begun already, its own]
    #[arg(long, value_name = "TIME")]
    time: Option<Time>,
    /// A further key of the export, as in cowgate.conf(5); may be repeated
    #[arg(long = "export", value_name = "KEY=VALUE", value_parser = key)]
    keys: Vec<(String, String)>,
    /// What the printed URI begins with, such as nbd://backup.example:10809 [default: where the daemon listens]
    #[arg(long, value_name = "URI")]
    uri_base: Option<String>,
    #[command(flatten)]
    control: Control,
}

/// What clients and the control plane need to know.
#[derive(Debug, Serialize)]
struct Begun {
    name: String,
    uri: String,
    uris: Vec<String>,
    image: String,
    parent: Option<String>,
    size: u64,
}

/// The image as it shall be.
struct Wanted {
    path: String,
    parent: Option<String>,
    size: u64,
    cluster_size: u64,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let wanted = Wanted::new(args)?;
    let there = wanted.find()?;
    let control = &args.control;
    let added = add(args, &wanted, there.is_some_and(|found| !found.blank))?;
    let (name, is_new) = (added.export.name.as_str(), added.outcome == AddOutcome::Created);
    let mut made = false;
    let ready = wanted.make(&mut made).and_then(|()| {
        // who is connected has shown that one can
        match is_new || made || added.export.clients.is_empty() {
            true => try_it(control, name, &wanted),
            false => Ok(()),
        }
    });
    if let Err(why) = ready {
        return Err(match is_new {
            true => undo(control, name, &wanted, made, why),
            false => why,
        });
    }
    let uris = match &args.uri_base {
        Some(base) => vec![format!("{}/{name}", base.trim_end_matches('/'))],
        None => uris(&control.get::<Health>("/v1/health")?.listening, name),
    };
    let uri = uris.first().cloned().ok_or("the daemon listens nowhere; give --uri-base")?;
    let Wanted { path, parent, size, .. } = wanted;
    print_json(&Begun { name: name.to_owned(), uri, uris, image: path, parent, size })?;
    Ok(ExitCode::SUCCESS)
}

impl Wanted {
    fn new(args: &Args) -> Result<Wanted, String> {
        let path = real_place(&args.image)?;
        let Some(parent) = &args.parent else {
            let size = args.size.unwrap_or_default(); // one of the two is required
            let size = size.checked_next_multiple_of(SECTOR).ok_or(format!("--size {size} is too large"))?;
            return Ok(Wanted { path, parent: None, size, cluster_size: CLUSTER_BYTES });
        };
        let wrong = |why: String| format!("--parent {why}");
        // where it really is: a link that leads elsewhere one day must not change what the backup holds
        let real = parent.canonicalize().map_err(|e| wrong(format!("{}: {e}", parent.display())))?;
        let found = blank::find(&real).map_err(|e| wrong(e.to_string()))?;
        let found = found.ok_or_else(|| wrong(format!("{}: has just vanished", real.display())))?;
        let real = text(&real)?;
        if real == path {
            return Err(wrong(format!("{real}: is the image itself")));
        }
        let cluster_size = found.cluster_size.max(CLUSTER_BYTES);
        Ok(Wanted { path, parent: Some(real), size: found.size, cluster_size })
    }

    /// The image, if it is there already. Another one is an error.
    fn find(&self) -> Result<Option<Found>, String> {
        let Wanted { path, parent, size, .. } = self;
        let refused = |why: String| format!("{path}: {why}; choose another --image, or remove that file");
        let found = match blank::find(Path::new(path)) {
            Err(e @ (Error::Header { .. } | Error::Broken { .. })) => {
                return Err(refused(format!("is another file ({e})")));
            }
            found => found.map_err(|e| e.to_string())?,
        };
        let Some(found) = found else { return Ok(None) };
        if found.size != *size {
            return Err(refused(format!("is an image of {} bytes, not of {size}", found.size)));
        }
        let backing = found.backing.as_ref().map(|b| b.display().to_string());
        if (&backing, found.backing_format.as_deref()) != (parent, parent.as_ref().map(|_| "qcow2")) {
            let name = |path: &Option<String>| path.clone().unwrap_or("none".to_owned());
            return Err(refused(format!("is an image with parent {}, not {}", name(&backing), name(parent))));
        }
        Ok(Some(found))
    }

    /// Makes the image unless it is there.
    fn make(&self, made: &mut bool) -> Result<(), String> {
        if self.find()?.is_some() {
            return Ok(());
        }
        let options = CreateOptions {
            path: self.path.clone().into(),
            size: Some(self.size),
            features: Features { cluster_size: self.cluster_size, ..Features::default() },
            backing: self.parent.as_ref().map(|parent| (parent.into(), Format::Qcow2)),
            data_file: None,
            data_file_raw: false,
            force: false,
        };
        match create(&options) {
            Ok(()) => {
                *made = true;
                Ok(())
            }
            // the same job's other caller may have been faster
            Err(e) => match self.find() {
                Ok(Some(_)) => Ok(()),
                _ => Err(e.to_string()),
            },
        }
    }
}

/// Has the daemon serve the image. `existing`: the image holds data, so the job must have begun already.
fn add(args: &Args, wanted: &Wanted, existing: bool) -> Result<Added, String> {
    let kind = args.kind.unwrap_or(if wanted.parent.is_some() { BackupKind::Incr } else { BackupKind::Full });
    let job = BeginBackup {
        context: args.vm_context.clone(),
        disk: args.disk.number(),
        kind: kind.word().to_owned(),
        time: args.time.map(|time| time.to_string()),
        path: wanted.path.clone(),
        keys: args.keys.iter().map(|(key, value)| (key.clone(), KeyValue::Text(value.clone()))).collect(),
        existing,
    };
    match args.control.post("/v1/backups", Some(&job)) {
        Err(Failure::Refused(problem)) if existing && problem.status == 404 => {
            let path = &wanted.path;
            Err(format!("{path}: exists, holds data and is not served; choose another --image, or remove that file"))
        }
        added => Ok(added?),
    }
}

/// Connects as a client would.
fn try_it(control: &Control, name: &str, wanted: &Wanted) -> Result<(), String> {
    let probed: Probed = control.post(&format!("{}/probe", export_path(name)), None::<&()>)?;
    match probed {
        Probed { connectable: false, reason, .. } => Err(reason.unwrap_or("the export cannot be used".to_owned())),
        Probed { writable: Some(false), .. } => Err(format!("{}: is served read-only", wanted.path)),
        Probed { size_bytes: Some(size), .. } if size != wanted.size => {
            Err(format!("{}: is served with {size} bytes instead of {}", wanted.path, wanted.size))
        }
        _ => Ok(()),
    }
}

/// Takes back what this call has made: the export, and the image if `made`. Returns what to say.
fn undo(control: &Control, name: &str, wanted: &Wanted, made: bool, why: String) -> String {
    let removed: Result<Removed, Failure> = control.delete(&export_path(name));
    let path = &wanted.path;
    match removed {
        Err(e) => format!("{why}\n  the export {name} stays: {e}"),
        Ok(Removed { drained: false, .. }) => format!("{why}\n  {path} stays: a client of {name} is connected"),
        Ok(_) if !made => why,
        Ok(_) => match blank::remove(Path::new(path)) {
            Ok(true) => why,
            Ok(false) => format!("{why}\n  {path} stays: it was written"),
            Err(e) => format!("{why}\n  {path} stays: {e}"),
        },
    }
}

/// The path by which the daemon and everybody else find an image that may not be there yet.
fn real_place(path: &Path) -> Result<String, String> {
    let name = path.file_name().ok_or_else(|| format!("--image {}: is not a file name", path.display()))?;
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    let real = directory.canonicalize();
    let real =
        real.map_err(|e| format!("--image {}: {}: {e}; make that directory", path.display(), directory.display()))?;
    if path.is_symlink() {
        return Err(format!("--image {}: is a symbolic link; name the file itself", path.display()));
    }
    text(&real.join(name))
}

fn text(path: &Path) -> Result<String, String> {
    let text = path.to_str().map(ToOwned::to_owned);
    text.ok_or_else(|| format!("{}: this path is not UTF-8; rename the file", path.display()))
}

/// URIs of an export: TCP before Unix sockets. Where the daemon listens on all addresses, this machine's own.
fn uris(listening: &Listening, name: &str) -> Vec<String> {
    let tcp = listening.tcp.iter().map(|address| match address.parse::<SocketAddr>() {
        Ok(SocketAddr::V4(v4)) if v4.ip().is_unspecified() => format!("nbd://127.0.0.1:{}/{name}", v4.port()),
        Ok(SocketAddr::V6(v6)) if v6.ip().is_unspecified() => format!("nbd://[::1]:{}/{name}", v6.port()),
        _ => format!("nbd://{address}/{name}"),
    });
    let unix = listening.unix.iter().map(|path| {
        let path = path.split('/').map(percent_encoded).collect::<Vec<_>>().join("/").replace("%2E", ".");
        format!("nbd+unix:///{name}?socket={path}")
    });
    tcp.chain(unix).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_that_clients_can_use() {
        let listening = Listening {
            tcp: vec!["0.0.0.0:10809".into(), "[::]:1".into(), "192.0.2.1:2".into()],
            unix: vec!["/run/a b/nbd.sock".into()],
        };
        let expected = [
            "nbd://127.0.0.1:10809/n~1",
            "nbd://[::1]:1/n~1",
            "nbd://192.0.2.1:2/n~1",
            "nbd+unix:///n~1?socket=/run/a%20b/nbd.sock",
        ];
        assert_eq!(uris(&listening, "n~1"), expected);
    }
}
