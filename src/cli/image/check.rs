//! `cowgate image check`.

use crate::cli::progress::{Meter, print_json};
use crate::cli::say;
use crate::image::Format;
use crate::image::check::{Report, check};
use crate::image::repair::{Scope, repair};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit statuses, those of `qemu-img check`; 1 is any failure.
mod status {
    pub const NOT_CHECKED: u8 = 1;
    pub const ERRORS: u8 = 2;
    pub const LEAKS: u8 = 3;
    pub const NO_CHECKS: u8 = 63;
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Repair {
    /// Give leaked clusters back
    Leaks,
    /// Errors too
    All,
}

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image to check
    file: PathBuf,
    /// Repair what can be repaired: leaked clusters only, or errors too [default: all]
    #[arg(long, value_name = "WHAT", value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    repair: Option<Repair>,
    /// Print JSON with the keys of `qemu-img check --output=json`
    #[arg(long)]
    json: bool,
    /// Its format: qcow2 or raw [default: qcow2 if the file begins like one, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Show no progress, and print nothing about an image without errors
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let meter = Meter::new("checking", args.quiet);
    let progress = |done, total| meter.show(done, total);
    let report = match args.repair {
        None => check(&args.file, args.format, &progress),
        Some(Repair::Leaks) => repair(&args.file, args.format, Scope::Leaks, &progress),
        Some(Repair::All) => repair(&args.file, args.format, Scope::All, &progress),
    };
    drop(meter);
    let Some(report) = report.map_err(|e| e.to_string())? else {
        eprintln!("cowgate: {}: this image format does not support checks", args.file.display());
        return Ok(ExitCode::from(status::NO_CHECKS));
    };
    for line in &report.lines {
        eprintln!("{line}");
    }
    let status = verdict(&report);
    match args.json {
        true => print_json(&report)?,
        false if args.quiet && status == 0 => {}
        false => say(&describe(&report))?,
    }
    Ok(ExitCode::from(status))
}

fn verdict(report: &Report) -> u8 {
    match report {
        Report { check_errors: 1.., .. } => status::NOT_CHECKED,
        Report { corruptions: 1.., .. } => status::ERRORS,
        Report { leaks: 1.., .. } => status::LEAKS,
        _ => 0,
    }
}

/// The verdict for people, in the words of `qemu-img check`.
fn describe(report: &Report) -> String {
    let mut out = String::new();
    let Report { corruptions, leaks, check_errors, corruptions_fixed, leaks_fixed, .. } = report;
    // writing to a string cannot fail
    if corruptions_fixed + leaks_fixed > 0 {
        let _ = writeln!(
            out,
            "The following inconsistencies were found and repaired:\n\n    {leaks_fixed} leaked clusters\n    \
             {corruptions_fixed} corruptions\n"
        );
    }
    if corruptions + leaks + check_errors == 0 {
        let _ = writeln!(out, "No errors were found on the image.");
    }
    if *corruptions > 0 {
        let _ = writeln!(
            out,
            "{corruptions} errors were found on the image.\nData may be corrupted, or further writes to the image may \
             corrupt it."
        );
    }
    if *leaks > 0 {
        let _ = writeln!(
            out,
            "{leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data."
        );
    }
    if *check_errors > 0 {
        let _ = writeln!(out, "{check_errors} parts of the image could not be checked.");
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let share = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
        let (allocated, total) = (report.allocated_clusters, report.total_clusters);
        let _ = writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            share(allocated, total),
            share(report.fragmented_clusters, allocated),
            share(report.compressed_clusters, allocated)
        );
    }
    let _ = writeln!(out, "Image end offset: {}", report.image_end_offset);
    out
}
