//! `cowgate backup`: a backup job in one call at its beginning and one at its end.
//!
//! Both can be killed at any moment and called again with the same arguments: what an earlier call has done is found and
//! taken over, and the answer is the same.

mod begin;
mod end;

use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Make an image and serve it: prints the export's name and URIs as JSON when clients can connect
    Begin(begin::Args),
    /// Wait for clients to leave, examine the image and forget the export: prints what became of it as JSON
    End(end::Args),
}

pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::Begin(args) => begin::run(args),
        Command::End(args) => end::run(args),
    }
}
