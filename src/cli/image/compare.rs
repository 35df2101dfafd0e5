//! `cowgate image compare`.

use crate::cli::progress::{Meter, print_json};
use crate::cli::say;
use crate::image::compare::{Verdict, compare};
use crate::image::{Error, Format, reading};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit status when the images differ, as qemu-img's.
const DIFFER: u8 = 1;
/// Exit status when they could not be compared.
const FAILED: u8 = 2;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// One image
    a: PathBuf,
    /// The other
    b: PathBuf,
    /// Format of A: qcow2 or raw [default: qcow2 if it is named or begins like one, else raw]
    #[arg(long, value_name = "FORMAT")]
    format_a: Option<Format>,
    /// Format of B
    #[arg(long, value_name = "FORMAT")]
    format_b: Option<Format>,
    /// Sizes, and what is allocated, must be the same too
    #[arg(long)]
    strict: bool,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
    /// Print nothing but errors: the exit status tells
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let meter = Meter::new("comparing", args.quiet);
    let work = async {
        let a = reading::open(&args.a, args.format_a, None).await?;
        let b = reading::open(&args.b, args.format_b, None).await?;
        compare(&a, &b, args.strict, &|done, all| meter.show(done, all)).await
    };
    let verdict = reading::run(&args.a, work).map_err(|e: Error| e.to_string());
    drop(meter);
    match verdict.and_then(|verdict| tell(args, verdict)) {
        Ok(status) => Ok(status),
        Err(message) => {
            // 1 would say that the images differ
            eprintln!("cowgate: {message}");
            Ok(ExitCode::from(FAILED))
        }
    }
}

fn tell(args: &Args, verdict: Verdict) -> Result<ExitCode, String> {
    let same = matches!(verdict, Verdict::Same { .. });
    let (line, offset) = match verdict {
        Verdict::Same { sizes_differ: false } => ("The images are the same.".to_owned(), None),
        Verdict::Same { sizes_differ: true } => {
            ("The images are the same, but one is longer, by zeroes only.".to_owned(), None)
        }
        Verdict::Content(at) => (format!("The images differ at byte {at}."), Some(at)),
        Verdict::Size => ("The images differ in size.".to_owned(), None),
        Verdict::Status(at) => (format!("The images differ in what is allocated at byte {at}."), Some(at)),
    };
    let sizes_differ = matches!(verdict, Verdict::Same { sizes_differ: true } | Verdict::Size);
    match (args.json, args.quiet) {
        (true, _) => print_json(&json!({ "same": same, "offset": offset, "sizes-differ": sizes_differ }))?,
        (_, true) => {}
        _ => say(&(line + "\n"))?,
    }
    Ok(if same { ExitCode::SUCCESS } else { ExitCode::from(DIFFER) })
}
