//! `cowgate image map`.

use crate::cli::say;
use crate::image::map::MapExtent;
use crate::image::{Disk, Error, Format, reading};
use crate::units::ByteRange;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;

/// Runs looked up, and printed, together.
const BATCH: usize = 4096;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image, which may have a backing chain
    file: PathBuf,
    /// Its format: qcow2 or raw [default: qcow2 if it is named or begins like one, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Print JSON as `qemu-img map --output=json`
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let work = async {
        let disk = reading::open(&args.file, args.format, None).await?;
        Ok(print(&disk, args.json).await)
    };
    reading::run(&args.file, work).map_err(|e: Error| e.to_string())??;
    Ok(ExitCode::SUCCESS)
}

async fn print(disk: &Rc<Disk>, json: bool) -> Result<(), String> {
    let path = disk.image().path().display();
    let mut rest = ByteRange::between(0, disk.image().size());
    let mut held: Option<MapExtent> = None;
    let mut first = true;
    let begin = if json { "[".to_owned() } else { row("Offset", "Length", "Mapped to", "File") };
    say(&begin)?;
    while !rest.is_empty() || held.is_some() {
        let mut text = String::new();
        let mut show = |run: &MapExtent| {
            if json {
                let comma = if std::mem::take(&mut first) { "" } else { ",\n" };
                let run = serde_json::to_string(run).map_err(|e| e.to_string())?;
                text += &format!("{comma}{run}");
            } else if run.data && !run.zero {
                let place = run.offset.map_or("compressed".to_owned(), hex);
                let file = disk.data_path(run.depth).display().to_string();
                text += &row(&hex(run.start), &hex(run.length), &place, &clean(&file));
            }
            Ok::<(), String>(())
        };
        let runs = match rest.is_empty() {
            true => Vec::new(),
            false => {
                let at = rest.start().0;
                let runs = disk.chain_map(rest, BATCH).await;
                runs.map_err(|e| format!("{path}: cannot map the disk from byte {at} on: {e}"))?
            }
        };
        if runs.is_empty() {
            held.take().iter().try_for_each(&mut show)?;
        }
        for run in runs {
            rest = rest.skip(run.length);
            // the last run of a batch may go on in the next one
            if !held.as_mut().is_some_and(|held| held.join(&run)) {
                held.replace(run).iter().try_for_each(&mut show)?;
            }
        }
        say(&text)?;
    }
    say(if json { "]\n" } else { "" })
}

fn row(offset: &str, length: &str, place: &str, file: &str) -> String {
    format!("{offset:<16}{length:<16}{place:<16}{file}\n")
}

fn hex(n: u64) -> String {
    if n == 0 { "0".to_owned() } else { format!("{n:#x}") }
}

/// An image may name anything, but it shall not drive the terminal.
fn clean(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
