//! `cowgate image`: makes, examines and changes image files, without a daemon. One file per command.

mod bitmap;
mod create;
mod features;
mod info;

use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Add, remove, list and change persistent dirty bitmaps
    Bitmap(bitmap::Args),
    /// Make a new, empty QCOW2 image, alone or as an overlay of a backing file
    Create(create::Args),
    /// Describe an image without opening what it names
    Info(info::Args),
}

/// Runs a command; the exit status is the command's own when it has more to say than "done".
pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::Bitmap(args) => bitmap::run(args),
        Command::Create(args) => create::run(args),
        Command::Info(args) => info::run(args),
    }
}
