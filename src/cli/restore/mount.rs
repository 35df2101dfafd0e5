//! `cowgate restore mount`.

use super::Image;
use crate::cli::control::printable;
use crate::cli::progress::print_json;
use crate::cli::say;
use crate::restore::source::SCRATCH;
use crate::restore::state::Entry;
use crate::restore::{expiry, mount};
use jiff::Timestamp;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    image: Image,
    /// The directory to mount at [default: one that is made, for root alone]
    #[arg(long, value_name = "DIR")]
    at: Option<PathBuf>,
    /// The partition to mount [default: the only one with a file system]
    #[arg(long, value_name = "N")]
    partition: Option<u32>,
    /// Mount read-write: what is written goes to a temporary layer, and is thrown away
    #[arg(long)]
    writable_scratch: bool,
    /// Where the temporary layer over the image is kept, if there is to be one
    #[arg(long, value_name = "DIR", default_value = SCRATCH)]
    scratch_dir: PathBuf,
    /// Unmount it after this time, also when it is in use: 30m, 1h, 7d
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Print what is mounted as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let expires = args.expires.as_deref().map(|text| expiry::parse(text, Timestamp::now()));
    let wanted = mount::Wanted {
        source: args.image.source(&args.scratch_dir)?,
        at: args.at.clone(),
        partition: args.partition,
        writable_scratch: args.writable_scratch,
        expires: expires.transpose().map_err(|e| format!("--expires: {e}"))?,
    };
    if !args.scratch_dir.is_dir() {
        return Err(format!("{}: there is no such directory for a temporary layer", args.scratch_dir.display()));
    }
    if let Some(at) = args.at.as_ref().filter(|at| at.read_dir().is_ok_and(|mut found| found.next().is_some())) {
        eprintln!("cowgate: warning: {} is not empty: its files are hidden as long as this is mounted", at.display());
    }
    let name = args.image.what.as_str();
    let (entry, others) = mount::mount(&wanted).map_err(|e| printable(&format!("{name}: {e}")))?;
    for other in others {
        eprintln!("cowgate: there is also {}", printable(&other));
    }
    if args.json {
        print_json(&entry)?;
    } else {
        say(&printable(&line(&entry)))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn line(entry: &Entry) -> String {
    let Entry { id, mount_point, file_system, .. } = entry;
    let what = entry.partition.map(|number| format!(" of partition {number}")).unwrap_or_default();
    let how = match (entry.writable_scratch, entry.layer) {
        (true, _) => ", read-write: what is written is thrown away",
        (false, true) => ", read-only, recovered in a temporary layer",
        (false, false) => ", read-only",
    };
    let expires = entry.expires.as_ref().map(|moment| format!(", until {moment}")).unwrap_or_default();
    let file_system = file_system.as_deref().unwrap_or_default();
    let mount_point = mount_point.display();
    format!("{mount_point}: {file_system}{what}{how}{expires}; end it with cowgate restore umount {id}\n")
}
