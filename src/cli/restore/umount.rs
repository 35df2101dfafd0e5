//! `cowgate restore umount`.

use crate::cli::say;
use crate::restore::end::{find, unmount_one};
use crate::restore::state;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// What `restore list` shows: IDs or mount points
    #[arg(required_unless_present = "all", value_name = "ID|DIR")]
    which: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "which")]
    all: bool,
    /// Also those that are in use: who uses them gets errors
    #[arg(long)]
    force: bool,
}

/// Ends as many as it can; exit status 1 when one is left.
pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let entries = state::restores()?;
    let mut status = ExitCode::SUCCESS;
    let mut fail = |why: String| {
        eprintln!("cowgate: {why}");
        status = ExitCode::FAILURE;
    };
    let mut wanted = Vec::new();
    for which in &args.which {
        match find(&entries, which) {
            Some(entry) => wanted.push(entry),
            None => fail(format!("{which}: there is no such restore; see cowgate restore list")),
        }
    }
    if args.all {
        wanted.extend(&entries);
    }
    for entry in wanted {
        match unmount_one(&entry.id, args.force) {
            Ok(()) => say(&format!("{} is unmounted\n", entry.mount_point.display()))?,
            Err(why) => fail(why),
        }
    }
    Ok(status)
}
