//! What goes over the control socket beside the snapshots of `export::status`: requests, answers and problems, as JSON.
//!
//! Both ends use these types: the routes here and the commands of the command line.

use crate::export::status::ExportStatus;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use utoipa::{IntoParams, ToSchema};

/// How the daemon is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`, or `stopping` when no new clients are taken any more.
    pub status: String,
    /// The program's version.
    pub version: String,
    /// Its process ID.
    pub pid: u32,
    /// When it became ready (RFC 3339).
    pub since: String,
    /// The number of the configuration that is served.
    pub generation: u64,
    /// Exports of that configuration.
    pub exports: usize,
    /// Former definitions that still have clients.
    pub draining: usize,
    /// Connected clients, of former definitions too.
    pub clients: usize,
    /// Images that could not be flushed when their last writer left: what clients believe written may be lost.
    pub failed_flushes: usize,
    /// Where clients can connect.
    pub listening: Listening,
}

/// Where clients can connect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Listening {
    /// Addresses and ports.
    pub tcp: Vec<String>,
    /// Paths of Unix sockets.
    pub unix: Vec<String>,
}

/// Many exports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportList {
    /// The number of the configuration that is served.
    pub generation: u64,
    /// All exports by name, each followed by its former definitions that still have clients.
    pub exports: Vec<ExportStatus>,
}

/// All definitions of one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportView {
    /// The one that new clients get; missing when it was removed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<ExportStatus>,
    /// Former ones that still have clients.
    pub draining: Vec<ExportStatus>,
}

/// An export to be added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddExport {
    /// The name that clients will ask for.
    pub name: String,
    /// Its image: an absolute path.
    pub path: String,
    /// The image's format, `qcow2` or `raw`; left out: by the path's extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Refuse writes.
    #[serde(default)]
    pub readonly: bool,
    /// Further keys of an export as cowgate.conf(5) has them: `{"maxconnections": 2}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, KeyValue>,
    /// Take the place of another export of this name.
    #[serde(default)]
    pub replace: bool,
}

/// The value of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum KeyValue {
    /// `true` or `false`.
    Boolean(bool),
    /// A number.
    Number(i64),
    /// Anything.
    Text(String),
}

impl fmt::Display for KeyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyValue::Boolean(value) => write!(f, "{value}"),
            KeyValue::Number(value) => write!(f, "{value}"),
            KeyValue::Text(value) => f.write_str(value),
        }
    }
}

/// An export is served as asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Added {
    /// What it took.
    pub outcome: AddOutcome,
    /// The configuration file that defines it.
    pub file: String,
    /// The export.
    pub export: ExportStatus,
}

/// What it took to serve an export as asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AddOutcome {
    /// It is new.
    Created,
    /// It was served just so already.
    Unchanged,
    /// It has taken the place of another definition.
    Replaced,
}

/// How to remove an export.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct RemoveParams {
    /// Disconnect its clients: what they have in flight is completed and flushed.
    pub force: bool,
    /// Answer only when its last client has left, everything is flushed and its lock is given back.
    pub wait: bool,
}

/// An export takes no new clients any more, and no file defines it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// Its name.
    pub name: String,
    /// The file that was removed; missing when that had been done before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Clients that were connected when it was removed.
    pub clients: usize,
    /// None of them is any more: everything is flushed, and the image's lock is given back.
    pub drained: bool,
    /// Images of any export that could not be flushed between the beginning and the end of this request.
    pub failed_flushes: usize,
}

/// A backup job to be begun: the export that its image is written through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BeginBackup {
    /// The identifier of the machine's backup context.
    pub context: String,
    /// The disk's number.
    pub disk: u16,
    /// `full` or `incr`.
    #[serde(rename = "type")]
    pub kind: String,
    /// When, as export names have it. Left out: now, or the time of the same job's export, if it is there already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// The image, a QCOW2 file: an absolute path.
    pub path: String,
    /// Further keys of the export.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, KeyValue>,
    /// Only find the job's export; add none.
    #[serde(default)]
    pub existing: bool,
}

/// How to end a backup job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EndParams {
    /// Disconnect its clients: what they have in flight is completed and flushed.
    pub force: bool,
}

/// A backup job takes no new clients any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Ending {
    /// Its export's name.
    pub name: String,
    /// What is left of the export's file: to be removed when the image is examined.
    pub record: String,
    /// Clients that are still connected.
    pub clients: usize,
    /// None is any more: everything is flushed, and the image's lock is given back.
    pub drained: bool,
    /// What clients wrote, in bytes; missing when the ending began under another daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_written: Option<u64>,
    /// Images of any export that could not be flushed since the ending began.
    pub failed_flushes: usize,
}

/// A backup job goes on: its export takes new clients again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resumed {
    /// Its export's name.
    pub name: String,
    /// The configuration file that defines it.
    pub file: String,
    /// Clients that stayed connected.
    pub clients: usize,
}

/// How much to tell of exports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListParams {
    /// Examine the images that no client has open, too: their sizes and chains.
    pub details: bool,
}

/// Which size an export's block device and its disk are to have. Neither field: the one that its file or volume has by now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ResizeExport {
    /// So many bytes, and not fewer than now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// So many bytes more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more_bytes: Option<u64>,
}

/// The size that an export's block device has now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ResizedExport {
    /// The export.
    pub name: String,
    /// Size of the device in bytes.
    pub size_bytes: u64,
}

/// Whether a client could connect now: the image was opened, locked as a client would have it, and closed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probed {
    /// It could.
    pub connectable: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Size of the disk in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Whether it could write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub writable: Option<bool>,
}

/// How to reload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReloadRequest {
    /// Answer only when no file looks half-written any more.
    pub wait: bool,
}

/// Why a request was not carried out: a problem as RFC 9457 has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// The kind of problem: the status in words.
    pub title: String,
    /// What is wrong, and what to do, for people.
    pub detail: String,
    /// The file it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub path: Option<Box<str>>,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub remedy: Option<Box<str>>,
    /// All that was found, when that is more than one thing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}
