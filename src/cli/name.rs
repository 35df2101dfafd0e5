//! `cowgate name`: makes the name of an export from its parts, and tells the parts of a name. Asks no daemon.

use super::progress::print_json;
use super::say;
use crate::export::name::{Backup, BackupKind, Disk, Migration, Name, NameError, Time};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use serde::Serialize;
use std::process::ExitCode;
use std::time::SystemTime;

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["vm_context", "migration", "parse"]))]
pub(super) struct Args {
    #[command(flatten)]
    parts: NameParts,
    /// Print the parts of this name
    #[arg(long, value_name = "NAME", conflicts_with_all = ["disk", "kind", "time"])]
    parse: Option<String>,
    /// Print the name and its parts as JSON
    #[arg(long)]
    json: bool,
}

/// The parts of which a name is made.
#[derive(Debug, clap::Args)]
pub(super) struct NameParts {
    /// Name a backup of the machine with this context: ASCII letters, digits, `-`, `_` and `.`
    #[arg(long, value_name = "ID", requires_all = ["disk", "kind"])]
    vm_context: Option<String>,
    /// Name the target of a disk that moves, of the machine with this UUID
    #[arg(long, value_name = "UUID", requires = "disk", conflicts_with_all = ["vm_context", "kind", "time"])]
    migration: Option<String>,
    /// The disk's number, from 0 to 999
    #[arg(long, value_name = "N")]
    disk: Option<Disk>,
    /// What the backup holds: full, all of the disk; incr, what has changed since the one before
    #[arg(long = "type", value_name = "TYPE", value_parser = kinds())]
    kind: Option<BackupKind>,
    /// When it is made: YYYYMMDDTHHMMSS in UTC, as in RFC 3339, or @SECONDS since 1970 [default: now]
    #[arg(long, value_name = "TIME")]
    time: Option<Time>,
}

/// A closed list, so that shells can complete it.
fn kinds() -> impl TypedValueParser<Value = BackupKind> {
    PossibleValuesParser::new([BackupKind::Full, BackupKind::Incr].map(BackupKind::word))
        .try_map(|word| word.parse::<BackupKind>())
}

impl NameParts {
    /// The name that they make; `None`: no parts are given.
    pub(super) fn name(&self) -> Result<Option<Name>, String> {
        let made = match self {
            NameParts { migration: Some(vm), disk: Some(disk), .. } => Migration::new(vm, *disk).map(Name::Migration),
            NameParts { vm_context: Some(context), disk: Some(disk), kind: Some(kind), time, .. } => {
                let time = time.map_or_else(now, Ok)?;
                Backup::new(context, *disk, *kind, time).map(Name::Backup)
            }
            NameParts { vm_context: None, migration: None, disk: None, kind: None, time: None } => return Ok(None),
            _ => {
                return Err(
                    "--disk, --type and --time are parts of a name: give --vm-context or --migration".to_owned()
                );
            }
        };
        made.map(Some).map_err(|e: NameError| e.to_string())
    }
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let name = name(args)?;
    let parts = Parts::of(&name);
    match (args.json, &args.parse) {
        (true, _) => print_json(&parts)?,
        (false, Some(_)) => say(&parts.lines())?,
        (false, None) => say(&format!("{name}\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn name(args: &Args) -> Result<Name, String> {
    match &args.parse {
        Some(text) => text.parse().map_err(|e: NameError| e.to_string()),
        None => args.parts.name()?.ok_or_else(|| "give --vm-context, --migration or --parse".to_owned()),
    }
}

fn now() -> Result<Time, String> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok();
    let time = since.and_then(|d| i64::try_from(d.as_secs()).ok()).and_then(Time::from_unix);
    time.ok_or_else(|| "the clock is wrong: it is not in the years 1970 to 9999; set it, or give --time".to_owned())
}

/// A name taken apart, as it is printed.
#[derive(Debug, Serialize)]
struct Parts<'a> {
    name: String,
    #[serde(flatten)]
    kind: Kind<'a>,
}

#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Kind<'a> {
    Backup {
        context: &'a str,
        shortened: bool,
        disk: u16,
        #[serde(rename = "type")]
        kind: &'static str,
        time: String,
    },
    Migration {
        vm: &'a str,
        disk: u16,
    },
}

impl<'a> Parts<'a> {
    fn of(name: &'a Name) -> Parts<'a> {
        let kind = match name {
            Name::Backup(backup) => Kind::Backup {
                context: backup.context(),
                shortened: backup.is_shortened(),
                disk: backup.disk().number(),
                kind: backup.kind().word(),
                time: backup.time().rfc3339(),
            },
            Name::Migration(migration) => Kind::Migration { vm: migration.vm(), disk: migration.disk().number() },
        };
        Parts { name: name.to_string(), kind }
    }

    fn lines(&self) -> String {
        match &self.kind {
            Kind::Backup { context, shortened, disk, kind, time } => {
                let note = if *shortened { " (shortened)" } else { "" };
                format!("kind: backup\ncontext: {context}{note}\ndisk: {disk}\ntype: {kind}\ntime: {time}\n")
            }
            Kind::Migration { vm, disk } => format!("kind: migration\nvm: {vm}\ndisk: {disk}\n"),
        }
    }
}
