//! `cowgate reload`: has the running daemon read its configuration again, and says what came of it.

use super::control::{Control, printable};
use super::progress::print_json;
use super::say;
use crate::export::control::Outcome;
use crate::serve::control::wire::ReloadRequest;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Wait until no file looks half-written any more
    #[arg(long)]
    wait: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let outcome: Outcome = args.control.post("/v1/reload", Some(&ReloadRequest { wait: args.wait }))?;
    for problem in &outcome.problems {
        eprintln!("{}", printable(problem));
    }
    for key in &outcome.needs_restart {
        eprintln!("{} has changed; this needs a restart", printable(key));
    }
    if !outcome.settled {
        eprintln!("a file is still being written; its exports stay as they were");
    }
    if args.json {
        print_json(&outcome)?;
    } else {
        let Outcome { generation, added, changed, removed, exports, .. } = &outcome;
        let (added, changed, removed) = (added.len(), changed.len(), removed.len());
        say(&format!(
            "configuration {generation}: {added} added, {changed} changed, {removed} removed; {exports} exports\n"
        ))?;
    }
    Ok(if outcome.complete { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
