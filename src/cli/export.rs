//! `cowgate export`: adds, removes and shows exports of the running daemon, over its control socket.

use super::control::{Control, export_path, printable};
use super::name::NameParts;
use super::progress::print_json;
use super::say;
use super::size::{parse as parse_size, show as human_size};
use super::table::Table;
use crate::export::status::{ClientStatus, ExportStatus, LayerStatus, Lock, Mode, State};
use crate::image::Format;
use crate::serve::control::wire::{
    AddExport, AddOutcome, Added, ExportList, ExportView, KeyValue, Removed, ResizeExport, ResizedExport,
};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Serve an image under a name: write its file and wait until clients get it
    Add(Add),
    /// Remove an export and its file
    Remove(Remove),
    /// List the exports
    List(List),
    /// Show everything about one export
    Show(Show),
    /// Make an export's block device larger, and its disk
    Resize(Resize),
}

#[derive(Debug, clap::Args)]
pub(super) struct Add {
    /// The name that clients will ask for, and the image; with --vm-context the image alone
    #[arg(value_names = ["NAME", "PATH"], num_args = 1..=2, required = true)]
    what: Vec<String>,
    /// The image's format [default: by its name]
    #[arg(long)]
    format: Option<Format>,
    /// Refuse writes
    #[arg(long)]
    readonly: bool,
    /// Take the place of another export of this name
    #[arg(long)]
    replace: bool,
    /// A further key of the export, as in cowgate.conf(5); may be repeated
    #[arg(long = "key", value_name = "KEY=VALUE", value_parser = key)]
    keys: Vec<(String, String)>,
    #[command(flatten)]
    parts: NameParts,
    /// Print what is served as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

#[derive(Debug, clap::Args)]
pub(super) struct Remove {
    /// Its name
    name: String,
    /// Disconnect its clients: what they have in flight is completed and flushed
    #[arg(long)]
    force: bool,
    /// Return when its last client has left, everything is flushed and the image's lock is given back
    #[arg(long)]
    wait: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Also examine the images that no client has open: their sizes
    #[arg(long)]
    details: bool,
    /// Print the list as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    /// Its name
    name: String,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

#[derive(Debug, clap::Args)]
pub(super) struct Resize {
    /// Its name
    name: String,
    /// The new size, like 20G, or how much it is to grow, like +5G [default: what its file or volume has by now]
    #[arg(value_parser = larger)]
    size: Option<ResizeExport>,
    /// Print the new size as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

/// `SIZE` or `+SIZE`.
fn larger(text: &str) -> Result<ResizeExport, String> {
    Ok(match text.strip_prefix('+') {
        Some(more) => ResizeExport { more_bytes: Some(parse_size(more)?), ..ResizeExport::default() },
        None => ResizeExport { size_bytes: Some(parse_size(text)?), ..ResizeExport::default() },
    })
}

pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::Add(args) => add(args),
        Command::Remove(args) => remove(args),
        Command::List(args) => list(args),
        Command::Show(args) => show(args),
        Command::Resize(args) => resize(args),
    }
    .map(|()| ExitCode::SUCCESS)
}

/// `KEY=VALUE`.
pub(super) fn key(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim_start().to_owned()))
}

fn add(args: &Add) -> Result<(), String> {
    let (name, path) = match (args.parts.name()?, &args.what[..]) {
        (None, [name, path]) => (name.clone(), path),
        (Some(name), [path]) => (name.to_string(), path),
        (None, _) => return Err("give NAME and PATH, or PATH with --vm-context or --migration".to_owned()),
        (Some(_), _) => return Err("the name is made of the parts that are given: give the PATH alone".to_owned()),
    };
    let path = std::path::absolute(path).map_err(|e| format!("{path}: {e}"))?;
    let path = path.into_os_string().into_string();
    let wanted = AddExport {
        name,
        path: path.map_err(|p| format!("{}: this path is not UTF-8; rename the file", PathBuf::from(p).display()))?,
        format: args.format.map(|format| format.to_string()),
        readonly: args.readonly,
        keys: args.keys.iter().map(|(key, value)| (key.clone(), KeyValue::Text(value.clone()))).collect(),
        replace: args.replace,
    };
    let added: Added = args.control.post("/v1/exports", Some(&wanted))?;
    if args.json {
        return print_json(&added);
    }
    let what = match added.outcome {
        AddOutcome::Created => "added",
        AddOutcome::Unchanged => "is served already",
        AddOutcome::Replaced => "replaced",
    };
    say(&format!("{}: {what}\n", printable(&added.export.name)))
}

fn remove(args: &Remove) -> Result<(), String> {
    let path = format!("{}?force={}&wait={}", export_path(&args.name), args.force, args.wait);
    let removed: Removed = args.control.delete(&path)?;
    if args.json {
        return print_json(&removed);
    }
    let name = printable(&removed.name);
    say(&match (removed.drained, removed.clients) {
        (true, _) => format!("{name}: removed, its image is released\n"),
        (false, clients) => format!("{name}: removed; {clients} clients stay connected until they leave\n"),
    })
}

fn resize(args: &Resize) -> Result<(), String> {
    let wanted = args.size.unwrap_or_default();
    let resized: ResizedExport = args.control.post(&format!("{}/resize", export_path(&args.name)), Some(&wanted))?;
    if args.json {
        return print_json(&resized);
    }
    let size = human_size(resized.size_bytes);
    say(&format!("{}: {size} ({} bytes)\n", printable(&resized.name), resized.size_bytes))
}

fn list(args: &List) -> Result<(), String> {
    let list: ExportList = args.control.get(&format!("/v1/exports?details={}", args.details))?;
    if args.json {
        return print_json(&list);
    }
    let mut table = Table::new(&["NAME", "STATE", "MODE", "FORMAT", "CLIENTS", "SIZE", "ALLOCATED", "PATH"]);
    for export in &list.exports {
        let bytes = |bytes: Option<u64>| bytes.map_or("-".to_owned(), human_size);
        table.row([
            export.name.clone(),
            state(export.state).to_owned(),
            mode(export.mode).to_owned(),
            export.format.clone(),
            export.clients.len().to_string(),
            bytes(export.size_bytes),
            bytes(export.allocated_bytes),
            export.path.clone(),
        ]);
    }
    say(&table.to_string())
}

fn show(args: &Show) -> Result<(), String> {
    let view: ExportView = args.control.get(&export_path(&args.name))?;
    if args.json {
        return print_json(&view);
    }
    let all: Vec<String> = view.current.iter().chain(&view.draining).map(description).collect();
    say(&all.join("\n"))
}

pub(super) fn state(state: State) -> &'static str {
    match state {
        State::Serving => "serving",
        State::Draining => "draining",
        State::Failed => "failed",
    }
}

pub(super) fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Ro => "ro",
        Mode::Rw => "rw",
    }
}

/// One definition of an export in lines.
fn description(export: &ExportStatus) -> String {
    let mut out = String::new();
    // writing to a string cannot fail
    let mut line = |key: &str, value: String| {
        let _ = writeln!(out, "{key}: {}", printable(&value));
    };
    line("name", export.name.clone());
    line("state", state(export.state).to_owned());
    if let Some(failure) = &export.failure {
        line("failure", format!("{}: {}", failure.at, failure.reason));
    }
    line("path", export.path.clone());
    line("format", export.format.clone());
    line("mode", mode(export.mode).to_owned());
    if let Some(rate) = export.bandwidth_limit {
        line("bandwidth limit", format!("{} a second", human_size(rate)));
    }
    if let Some(rate) = export.iops_limit {
        line("limit of operations", format!("{rate} a second"));
    }
    line("defined", format!("{}:{} (configuration {})", export.file, export.line, export.generation));
    for (key, bytes) in [("size", export.size_bytes), ("allocated", export.allocated_bytes)] {
        if let Some(bytes) = bytes {
            line(key, format!("{} ({bytes} bytes)", human_size(bytes)));
        }
    }
    for LayerStatus { path, format, size_bytes, .. } in &export.chain {
        line("layer", format!("{path} ({format}, {})", human_size(*size_bytes)));
    }
    if let Some(error) = &export.image_error {
        line("image error", error.clone());
    }
    let lock = match export.lock {
        Lock::None => "none",
        Lock::Shared => "shared",
        Lock::Write => "write",
    };
    line("lock", lock.to_owned());
    for client in &export.clients {
        line("client", client_line(client));
    }
    let totals = &export.totals;
    line("read", format!("{} in {} requests", human_size(totals.read.bytes), totals.read.requests));
    line("written", format!("{} in {} requests", human_size(totals.write.bytes), totals.write.requests));
    let zeroed = totals.write_zeroes.bytes + totals.trim.bytes;
    let requests = totals.write_zeroes.requests + totals.trim.requests;
    line("zeroed or trimmed", format!("{} in {requests} requests", human_size(zeroed)));
    line("flushes", totals.flush.requests.to_string());
    line("errors", totals.errors.to_string());
    line("last request", totals.last_io.clone().unwrap_or_else(|| "none yet".to_owned()));
    out
}

fn client_line(client: &ClientStatus) -> String {
    let ClientStatus { peer, since, tls, in_flight, counters } = client;
    let (read, written) = (human_size(counters.read.bytes), human_size(counters.write.bytes));
    let secured = tls.as_ref().map_or(String::new(), |tls| {
        let subject = tls.subject.as_ref().map_or(String::new(), |subject| format!(" {subject}"));
        format!(", {} {}{subject}", tls.version, tls.cipher)
    });
    format!("{peer} since {since}, {read} read, {written} written, {in_flight} in flight{secured}")
}
