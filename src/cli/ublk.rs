//! `cowgate ublk`: the block devices of this machine, with or without a running daemon.

use super::progress::print_json;
use super::say;
use super::size::show;
use super::table::Table;
use crate::serve::ublk::driver::{self, DeleteError, Listed};
use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List the ublk devices of this machine
    List {
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete ublk devices that cowgate has made, for when no daemon does
    Delete {
        /// Their numbers, the N of /dev/ublkbN
        #[arg(required_unless_present = "all", value_name = "NUMBER")]
        ids: Vec<u32>,
        /// All of them
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        /// Also those that are in use: what uses them gets errors
        #[arg(long)]
        force: bool,
    },
}

/// What `--json` prints.
#[derive(serde::Serialize)]
struct Driver {
    devices: Vec<Listed>,
    /// Null: there is no driver that this program can use, or it may not be asked.
    features: Option<Vec<&'static str>>,
}

pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::List { json } => list(*json),
        Command::Delete { ids, all, force } => delete(ids, *all, *force),
    }
}

fn list(json: bool) -> Result<ExitCode, String> {
    let (devices, features) = (listed()?, driver::feature_names());
    if json {
        let features = features.ok();
        return print_json(&Driver { devices, features }).map(|()| ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["ID", "DEVICE", "SIZE", "IN USE", "DAEMON", "QUEUES", "DATA", "EXPORT"]);
    for Listed { id, export, device, size_bytes, in_use, daemon, data, queues } in devices {
        table.row([
            id.to_string(),
            device.map_or("-".to_owned(), |device| device.display().to_string()),
            size_bytes.map_or("-".to_owned(), show),
            if in_use { "yes" } else { "no" }.to_owned(),
            daemon.map_or("waits".to_owned(), |pid| pid.to_string()),
            queues.map_or("-".to_owned(), |queues| queues.to_string()),
            data.map_or("-".to_owned(), |data| data.to_string()),
            export.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let driver = match features {
        Ok(names) => format!("driver: {}", names.join(" ")),
        Err(e) => e.to_string(),
    };
    say(&format!("{table}{driver}\n")).map(|()| ExitCode::SUCCESS)
}

/// Deletes as many as it can; exit status 1 when one is left that was named, or is ours.
fn delete(ids: &[u32], all: bool, force: bool) -> Result<ExitCode, String> {
    let ids = if all { listed()?.into_iter().map(|device| device.id).collect() } else { ids.to_vec() };
    let mut status = ExitCode::SUCCESS;
    for id in ids {
        match driver::delete(id, force) {
            Ok(()) => say(&format!("ublk device {id} is deleted\n"))?,
            Err(DeleteError::Foreign(_)) if all => {}
            Err(e) => {
                eprintln!("cowgate: {e}");
                status = ExitCode::FAILURE;
            }
        }
    }
    Ok(status)
}

fn listed() -> Result<Vec<Listed>, String> {
    driver::list().map_err(|e| format!("cannot look for ublk devices: {e}"))
}
