//! What exports and their clients are doing, as data for people and programs: what the control API answers.
//!
//! Promises: taking a snapshot locks nothing for longer than a copy takes, and an image that cannot be examined is a
//! field of the answer, not a failure. [`examine`] reads files, so it belongs on a thread that may block.

use crate::export::config::ExportConfig;
use crate::export::registry::Registry;
use crate::export::service::Export;
use crate::export::storage::existing_paths;
use crate::export::tls::Encrypted;
use crate::export::usage::{Connection, Count, Totals};
use crate::image::device::{exported_size, total};
use crate::image::open::ChainLayer;
use crate::image::{Layer, Opener};
use crate::ring;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use utoipa::ToSchema;

/// One definition of an export, and what it is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportStatus {
    /// The name that clients ask for.
    pub name: String,
    /// How it fares.
    pub state: State,
    /// Why the last client that asked was not served, while no client has been since.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureStatus>,
    /// The number of the configuration that defined it.
    pub generation: u64,
    /// Its image.
    pub path: String,
    /// The image's format.
    pub format: String,
    /// Whether clients may write.
    pub mode: Mode,
    /// Bytes a second that its clients together may read and write; missing without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_limit: Option<u64>,
    /// Operations a second of its clients together; missing without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops_limit: Option<u64>,
    /// The configuration file that defines it, or has defined it.
    pub file: String,
    /// The line of its group in that file.
    pub line: u32,
    /// Whether its image is open.
    pub open: bool,
    /// Size of the disk in bytes. Known while the image is open, and when it was examined.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Storage in bytes that the image file and its data file occupy, without the layers below. Known as the size is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    /// The image's files, the exported one first; of a `multifile` export the files of one part after those of another.
    /// Known as the size is.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub chain: Vec<LayerStatus>,
    /// Why the image cannot be examined; what could be found out is there all the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_error: Option<String>,
    /// The lock that is held on the image.
    pub lock: Lock,
    /// Who is connected.
    pub clients: Vec<ClientStatus>,
    /// Everything that clients of this name did since it is served, those included that have left.
    pub totals: Counters,
}

/// How an export fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// New clients get it.
    Serving,
    /// The configuration has another definition of this name by now, or none; the clients it has stay until they leave.
    Draining,
    /// The last client that asked was not served; the next one is tried again.
    Failed,
}

/// Why a client was not served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailureStatus {
    /// The reason, for people.
    pub reason: String,
    /// When it was turned away (RFC 3339).
    pub at: String,
}

/// Whether clients may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Read only.
    Ro,
    /// Read and write.
    Rw,
}

/// A lock on an image, as other programs meet it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Lock {
    /// The image is not open.
    None,
    /// Others may read it.
    Shared,
    /// Nobody else may open it.
    Write,
}

/// One file of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerStatus {
    /// The file.
    pub path: String,
    /// Its format.
    pub format: String,
    /// Size of its disk in bytes.
    pub size_bytes: u64,
    /// Storage in bytes that it and its data file occupy; missing when that cannot be found out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
}

/// One connected client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClientStatus {
    /// Who it is: an address and port, or the process and user at the other end of a Unix socket.
    pub peer: String,
    /// When it took hold of the export (RFC 3339).
    pub since: String,
    /// How its connection is encrypted; missing when it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsStatus>,
    /// Requests that wait for their answer.
    pub in_flight: u64,
    /// What it did so far.
    #[serde(flatten)]
    pub counters: Counters,
}

/// How a client's connection is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TlsStatus {
    /// The version of TLS, such as `TLSv1.3`.
    pub version: String,
    /// The cipher suite by its registered name.
    pub cipher: String,
    /// Whether the kernel encrypts and decrypts, not the daemon.
    pub kernel: bool,
    /// The distinguished name (RFC 4514) in the client's certificate; missing when it has shown none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
}

impl From<&Encrypted> for TlsStatus {
    fn from(tls: &Encrypted) -> TlsStatus {
        TlsStatus {
            version: tls.version.to_owned(),
            cipher: tls.cipher.clone(),
            kernel: tls.kernel,
            subject: tls.identity.as_ref().map(|identity| identity.subject.clone()),
        }
    }
}

/// Requests and bytes by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Reads.
    pub read: Count,
    /// Writes.
    pub write: Count,
    /// Write zeroes.
    pub write_zeroes: Count,
    /// Trims.
    pub trim: Count,
    /// Flushes.
    pub flush: Count,
    /// Block status requests.
    pub block_status: Count,
    /// Requests to read ahead.
    pub cache: Count,
    /// Reads and writes of a block device whose data was not copied.
    pub zero_copy: u64,
    /// Requests of all kinds that were answered with an error.
    pub errors: u64,
    /// When the last request came (RFC 3339); missing before the first one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_io: Option<String>,
}

impl From<Totals> for Counters {
    fn from(totals: Totals) -> Counters {
        let Totals { read, write, write_zeroes, trim, flush, block_status, cache, zero_copy, errors, last_io_ms } =
            totals;
        let last_io = (last_io_ms > 0).then(|| rfc3339_ms(last_io_ms));
        Counters { read, write, write_zeroes, trim, flush, block_status, cache, zero_copy, errors, last_io }
    }
}

impl From<&Connection> for ClientStatus {
    fn from(client: &Connection) -> ClientStatus {
        ClientStatus {
            peer: client.peer.to_string(),
            since: rfc3339(client.since),
            tls: client.tls.as_deref().map(TlsStatus::from),
            in_flight: client.in_flight(),
            counters: client.totals().into(),
        }
    }
}

/// An export and where its status came from, so that its files can be looked at later.
pub struct Snapshot {
    /// What is known without its files.
    pub status: ExportStatus,
    export: Arc<Export>,
}

/// All exports sorted by name; after each its former definitions that still have clients. `name`: of this one only.
pub fn snapshots(registry: &Registry, name: Option<&str>) -> Vec<Snapshot> {
    // what drains first: an export that is retired in between is then there twice rather than missing
    let mut draining = registry.draining();
    draining.retain(|export| name.is_none_or(|name| export.config().name == name));
    let current = match name {
        Some(name) => registry.entry(name).into_iter().collect(),
        None => registry.entries(),
    };
    let mut all: Vec<Snapshot> = Vec::with_capacity(current.len() + draining.len());
    for entry in &current {
        let source = (entry.source.file.as_path(), entry.source.line);
        all.push(Snapshot { status: status(&entry.export, source, false), export: Arc::clone(&entry.export) });
    }
    for export in draining.iter().filter(|export| !current.iter().any(|c| Arc::ptr_eq(&c.export, export))) {
        let source = &export.config().source;
        let status = status(export, (&source.file, source.line), true);
        all.push(Snapshot { status, export: Arc::clone(export) });
    }
    // stable: the current definition stays before the former ones
    all.sort_by(|a, b| a.status.name.cmp(&b.status.name));
    all
}

fn status(export: &Arc<Export>, (file, line): (&Path, u32), draining: bool) -> ExportStatus {
    let config = export.config();
    let failure = export.failure().map(|f| FailureStatus { reason: f.reason, at: rfc3339(f.at) });
    let images = export.images();
    let limits = export.limiter().limits();
    let state = match (&failure, draining) {
        (_, true) => State::Draining,
        (Some(_), false) => State::Failed,
        (None, false) => State::Serving,
    };
    ExportStatus {
        name: config.name.clone(),
        state,
        failure,
        generation: export.generation(),
        path: lossy(&config.path),
        format: config.format.to_string(),
        mode: if config.read_only { Mode::Ro } else { Mode::Rw },
        bandwidth_limit: limits.bandwidth,
        iops_limit: limits.iops,
        file: lossy(file),
        line,
        open: !images.is_empty(),
        size_bytes: None,
        allocated_bytes: None,
        chain: Vec::new(),
        image_error: None,
        lock: match () {
            () if images.is_empty() => Lock::None,
            () if images.iter().any(|image| image.locked_for_writing()) => Lock::Write,
            () => Lock::Shared,
        },
        clients: export.connections().iter().map(|c| ClientStatus::from(&**c)).collect(),
        totals: export.totals().into(),
    }
}

/// Adds what only the files know: of open images always, of others if `closed` ones are wanted too. Blocks.
pub fn examine(snapshots: Vec<Snapshot>, closed: bool) -> Vec<ExportStatus> {
    let is_known = |s: &Snapshot| !closed || s.status.open;
    if snapshots.iter().all(is_known) {
        return snapshots.into_iter().map(Snapshot::with_open_image).collect();
    }
    let mut done = Vec::with_capacity(snapshots.len());
    let mut rest = snapshots.into_iter();
    let examined = ring::run(async {
        for snapshot in rest.by_ref() {
            done.push(match is_known(&snapshot) {
                true => snapshot.with_open_image(),
                false => snapshot.with_file().await,
            });
        }
    });
    if let Err(e) = examined {
        let why = format!("images that are not open cannot be examined: {e}");
        done.extend(rest.map(|s| ExportStatus { image_error: Some(why.clone()), ..s.with_open_image() }));
    }
    done
}

impl Snapshot {
    fn with_open_image(self) -> ExportStatus {
        let mut status = self.status;
        let images = self.export.images();
        let layer = |layer: &Arc<Layer>| LayerStatus {
            path: lossy(layer.path()),
            format: layer.format().to_string(),
            size_bytes: layer.size(),
            allocated_bytes: layer.allocated_bytes().ok(),
        };
        let parts = images.iter().map(|image| image.layers().iter().map(layer).collect());
        status.take(self.export.config(), parts.collect());
        status
    }

    async fn with_file(self) -> ExportStatus {
        let mut status = self.status;
        let config = self.export.config();
        let layer = |layer: &ChainLayer| LayerStatus {
            path: lossy(&layer.path),
            format: layer.format.to_string(),
            size_bytes: layer.size,
            allocated_bytes: Some(layer.allocated_bytes),
        };
        let mut error = None;
        let mut parts = Vec::new();
        let paths = existing_paths(config).unwrap_or_else(|e| {
            error = Some(e);
            Vec::new()
        });
        for path in paths {
            match Opener::new(&path) {
                Ok(opener) => {
                    let (layers, broken) = opener.chain(config.format, self.export.gate()).await;
                    parts.push(layers.iter().map(layer).collect());
                    error = error.or(broken);
                }
                Err(e) => error = error.or(Some(e)),
            }
        }
        status.take(config, parts);
        status.image_error = error.map(|e| e.to_string()).or(status.image_error);
        status
    }
}

impl ExportStatus {
    /// Takes over the chain of each part of the image.
    fn take(&mut self, config: &ExportConfig, parts: Vec<Vec<LayerStatus>>) {
        let tops: Vec<&LayerStatus> = parts.iter().filter_map(|layers| layers.first()).collect();
        if tops.is_empty() {
            return;
        }
        self.allocated_bytes = tops.iter().map(|top| top.allocated_bytes).sum();
        match exported_size(&config.path, total(tops.iter().map(|top| top.size_bytes)), config.client.file_size) {
            Ok(size) => self.size_bytes = Some(size),
            Err(e) => self.image_error = Some(e.to_string()),
        }
        self.chain = parts.into_iter().flatten().collect();
    }
}

/// A moment in the words of RFC 3339, in UTC with milliseconds.
pub fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    rfc3339_ms(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn rfc3339_ms(ms: u64) -> String {
    let at = i64::try_from(ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    // a clock beyond the year 9999
    at.map_or_else(|| "9999-12-31T23:59:59Z".to_owned(), |at| format!("{at:.3}"))
}

fn lossy(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::{ExportConfig, Source};
    use crate::export::plan::Plan;

    #[test]
    fn moments() {
        assert_eq!(rfc3339_ms(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(rfc3339_ms(1_709_251_199_050), "2024-02-29T23:59:59.050Z");
        assert_eq!(rfc3339_ms(u64::MAX), "9999-12-31T23:59:59Z");
        assert_eq!(rfc3339(SystemTime::UNIX_EPOCH - std::time::Duration::from_secs(1)), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn images_that_nobody_has_open_are_examined_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        std::fs::write(&image, [1; 5000]).unwrap();
        let source = || Source { file: "/x.conf".into(), line: 3 };
        let config = |name: &str, path: &Path| Arc::new(ExportConfig::new(name, path, source()));
        let add = vec![config("b", Path::new("/nowhere")), config("a", &image)];
        let registry = Registry::new(None, None);
        registry.apply(&Plan { add, ..Plan::default() }, 7);
        let plain = examine(snapshots(&registry, None), false);
        assert_eq!(
            plain.iter().map(|e| (e.name.as_str(), e.size_bytes)).collect::<Vec<_>>(),
            [("a", None), ("b", None)]
        );
        assert_eq!(
            (plain[0].state, plain[0].generation, plain[0].line, plain[0].lock),
            (State::Serving, 7, 3, Lock::None)
        );
        let full = examine(snapshots(&registry, None), true);
        assert_eq!((full[0].size_bytes, full[0].chain.len(), &full[0].image_error), (Some(5000), 1, &None));
        assert!(full[0].allocated_bytes.is_some_and(|n| n > 0 && n % 512 == 0));
        assert!(full[1].image_error.as_ref().is_some_and(|e| e.contains("/nowhere")));
        assert!(examine(snapshots(&registry, Some("no")), true).is_empty());
    }
}
