//! `cowgate image`: makes, examines and changes image files, without a daemon. One file per command.

mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod features;
mod flatten;
mod info;
mod map;
mod rebase;
mod resize;

use std::process::ExitCode;

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// Add, remove, list and change persistent dirty bitmaps
    Bitmap(bitmap::Args),
    /// Find errors in an image's metadata, and repair them
    Check(check::Args),
    /// Move an overlay's data into its backing file
    Commit(commit::Args),
    /// Tell whether two images hold the same disk
    Compare(compare::Args),
    /// Copy a disk into a new image that needs no backing file
    Convert(convert::Args),
    /// Make a new, empty QCOW2 image, alone or as an overlay of a backing file
    Create(create::Args),
    /// Take in what the backing chain provides, and do without it from then on
    Flatten(flatten::Args),
    /// Describe an image without opening what it names
    Info(info::Args),
    /// Show which file of an image's chain holds which part of the disk
    Map(map::Args),
    /// Put an image on another backing file
    Rebase(rebase::Args),
    /// Make a disk larger or smaller
    Resize(resize::Args),
}

/// Runs a command; the exit status is the command's own when it has more to say than "done".
pub(super) fn run(command: &Command) -> Result<ExitCode, String> {
    match command {
        Command::Bitmap(args) => bitmap::run(args),
        Command::Check(args) => check::run(args),
        Command::Commit(args) => commit::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Create(args) => create::run(args),
        Command::Flatten(args) => flatten::run(args),
        Command::Info(args) => info::run(args),
        Command::Map(args) => map::run(args),
        Command::Rebase(args) => rebase::run(args),
        Command::Resize(args) => resize::run(args),
    }
}
