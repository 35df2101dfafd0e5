//! `cowgate image rebase`.

use crate::cli::progress::Report;
use crate::cli::size;
use crate::image::Format;
use crate::image::rebase::{NewBacking, Rebased, rebase, rename_backing};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image to put on another backing file, QCOW2
    file: PathBuf,
    /// The new backing file, or '' for none. A relative path is relative to FILE's directory
    #[arg(long, value_name = "NEW")]
    backing: OsString,
    /// The new backing file's format; it is never guessed: qcow2 or raw
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
    /// Change the name only, when the new backing file is known to hold the same
    #[arg(long = "unsafe")]
    name_only: bool,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let new = match (args.backing.is_empty(), args.backing_format) {
        (true, None) => None,
        (true, Some(_)) => return Err("without a backing file there is no --backing-format".to_owned()),
        (false, Some(format)) => Some(NewBacking { name: args.backing.clone().into(), format }),
        (false, None) => {
            return Err("give the new backing file's format with --backing-format: qcow2 or raw".to_owned());
        }
    };
    let done = if args.name_only {
        rename_backing(&args.file, new)
    } else {
        let meter = args.report.meter("rebasing");
        rebase(&args.file, new, &|done, total| meter.show(done, total))
    };
    report(args.report, &done.map_err(|e| e.to_string())?)
}

/// Says what was done.
pub(super) fn report(report: Report, done: &Rebased) -> Result<ExitCode, String> {
    report.done(done, || {
        let now = match &done.backing_filename {
            Some(name) => format!("backing file {}", name.display()),
            None => "no backing file".to_owned(),
        };
        format!("{}: {now}; {} of data taken in", done.filename.display(), size::show(done.data))
    })
}
