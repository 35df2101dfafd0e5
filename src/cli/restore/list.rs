//! `cowgate restore list`.

use crate::cli::progress::print_json;
use crate::cli::say;
use crate::cli::table::Table;
use crate::restore::end::{Health, health};
use crate::restore::state::{self, Entry};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// Print them as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Listed<'a> {
    state: Health,
    #[serde(flatten)]
    entry: &'a Entry,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let entries = state::restores()?;
    let listed: Vec<Listed<'_>> = entries.iter().map(|entry| Listed { state: health(entry), entry }).collect();
    if args.json {
        return print_json(&listed).map(|()| ExitCode::SUCCESS);
    }
    let mut table = Table::new(&["ID", "STATE", "MOUNT POINT", "DEVICE", "MODE", "EXPIRES", "IMAGE"]);
    for Listed { state, entry } in listed {
        let state = match state {
            Health::Starting => "starting",
            Health::Mounted => "mounted",
            Health::Dead => "dead",
        };
        let part = entry.partition.map(|number| format!(", partition {number}")).unwrap_or_default();
        table.row([
            entry.id.clone(),
            state.to_owned(),
            entry.mount_point.display().to_string(),
            entry.disk.as_ref().map_or("-".to_owned(), |disk| disk.device.display().to_string()),
            if entry.writable_scratch { "scratch" } else { "read-only" }.to_owned(),
            entry.expires.clone().unwrap_or_else(|| "-".to_owned()),
            entry.image.display().to_string() + &part,
        ]);
    }
    say(&table.to_string()).map(|()| ExitCode::SUCCESS)
}
