//! `cowgate check-config`, which is also `cowgate serve --check`: every problem at once, and a verdict.

use super::progress::print_json;
use super::say;
use crate::daemon::check::{Checked, check};
use crate::export::problem::{Problem, Severity};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The configuration file, in nbd-server's format; see cowgate.conf(5)
    file: PathBuf,
    /// Print the problems and the verdict as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    report(&args.file, args.json)
}

/// Prints what there is to say about a configuration. The status is success if all of it would take effect.
pub(super) fn report(file: &Path, json: bool) -> Result<ExitCode, String> {
    let checked = check(file);
    match json {
        true => print_json(&Verdict::of(&checked))?,
        false => {
            let lines: String = checked.problems.iter().map(|problem| format!("{problem}\n")).collect();
            say(&(lines + &summary(&checked) + "\n"))?;
        }
    }
    Ok(if checked.is_complete() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The last line.
fn summary(checked: &Checked) -> String {
    let (file, exports) = (checked.file.display(), checked.exports);
    let (errors, refused) = (checked.count(Severity::Error), checked.count(Severity::Refused));
    let warnings = match checked.count(Severity::Warning) {
        0 => String::new(),
        n => format!(", {n} warnings"),
    };
    if checked.is_complete() {
        return format!("{file}: complete, {exports} exports{warnings}");
    }
    let rest = match checked.starts {
        true => format!("{exports} exports would be served"),
        false => "a start would fail".to_owned(),
    };
    format!("{file}: not complete, {errors} errors, {refused} exports refused{warnings}; {rest}")
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Verdict<'a> {
    file: String,
    /// All of it would take effect.
    complete: bool,
    /// A start would succeed.
    starts: bool,
    /// How many exports would be served.
    exports: usize,
    errors: usize,
    refused: usize,
    warnings: usize,
    problems: &'a [Problem],
}

impl<'a> Verdict<'a> {
    fn of(checked: &'a Checked) -> Verdict<'a> {
        Verdict {
            file: checked.file.display().to_string(),
            complete: checked.is_complete(),
            starts: checked.starts,
            exports: checked.exports,
            errors: checked.count(Severity::Error),
            refused: checked.count(Severity::Refused),
            warnings: checked.count(Severity::Warning),
            problems: &checked.problems,
        }
    }
}
