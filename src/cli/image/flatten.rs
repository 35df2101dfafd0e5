//! `cowgate image flatten`.

use super::rebase::report;
use crate::cli::progress::Report;
use crate::image::flatten::flatten;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image, QCOW2
    file: PathBuf,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let meter = args.report.meter("flattening");
    let done = flatten(&args.file, &|done, total| meter.show(done, total)).map_err(|e| e.to_string())?;
    drop(meter);
    report(args.report, &done)
}
