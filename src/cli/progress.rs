//! What a long image command shows: a bar on stderr while it runs, if somebody watches; one line or JSON at its end.
//!
//! A command flattens [`Report`] into its arguments, gives [`Meter::show`] to the image layer as its
//! [`Progress`](crate::image::Progress), and ends with [`Report::done`].

use super::say;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::process::ExitCode;

/// How a command reports.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub(super) struct Report {
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Show no progress and print no line when done
    #[arg(long, short)]
    quiet: bool,
}

impl Report {
    /// The bar of a command that is doing `what` ("converting").
    pub fn meter(self, what: &'static str) -> Meter {
        Meter::new(what, self.quiet)
    }

    /// Prints the result of a command that succeeded: as JSON, or as one line for people.
    pub fn done<T: Serialize>(self, result: &T, line: impl FnOnce() -> String) -> Result<ExitCode, String> {
        match self {
            Report { json: true, .. } => print_json(result)?,
            Report { quiet: true, .. } => {}
            _ => say(&(line() + "\n"))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints a value as JSON on stdout.
pub(super) fn print_json<T: Serialize>(value: &T) -> Result<(), String> {
    say(&(serde_json::to_string_pretty(value).map_err(|e| e.to_string())? + "\n"))
}

/// A bar on stderr; invisible when stderr is no terminal. Dropped, it leaves no trace there.
pub(super) struct Meter {
    bar: ProgressBar,
}

impl Meter {
    /// A bar for a command that is doing `what`, in bytes; never shown when `quiet`.
    pub fn new(what: &'static str, quiet: bool) -> Meter {
        // indicatif draws nothing where stderr is no terminal
        let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template("{msg} [{wide_bar}] {percent:>3}% {binary_bytes_per_sec}, {eta} left");
        let style = style.expect("the template is well-formed").progress_chars("=> ");
        let bar = ProgressBar::with_draw_target(None, target).with_style(style).with_message(what);
        Meter { bar }
    }

    /// Moves the bar: bytes done, and of all. Cheap enough for every request.
    pub fn show(&self, done: u64, total: u64) {
        if self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Progress;

    #[test]
    fn a_meter_is_a_progress_callback() {
        let meter = Meter::new("testing", true);
        let callback: Progress<'_> = &|done, total| meter.show(done, total);
        callback(5, 10);
        callback(10, 20);
        assert_eq!((meter.bar.position(), meter.bar.length()), (10, Some(20)));
        assert!(meter.bar.is_hidden());
    }
}
