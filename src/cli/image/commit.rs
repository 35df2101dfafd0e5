//! `cowgate image commit`.

use crate::cli::progress::Report;
use crate::cli::size;
use crate::image::commit::commit;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The overlay, a QCOW2 image
    file: PathBuf,
    /// Leave the data in the overlay too, instead of emptying it
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let meter = args.report.meter("committing");
    let done = commit(&args.file, args.keep, &|done, total| meter.show(done, total)).map_err(|e| e.to_string())?;
    drop(meter);
    args.report.done(&done, || {
        format!(
            "{}: {} committed to {}",
            done.filename.display(),
            size::show(done.data),
            done.backing_filename.display()
        )
    })
}
