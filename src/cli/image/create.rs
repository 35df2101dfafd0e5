//! `cowgate image create`.

use crate::cli::size;
use crate::image::Format;
use crate::image::create::{CreateOptions, create};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image to make
    file: PathBuf,
    /// Virtual size in bytes, or with a suffix K, M, G or T (1K is 1024) [default: the backing file's]
    #[arg(long, value_name = "N", value_parser = size::parse, required_unless_present = "backing")]
    size: Option<u64>,
    /// Backing file: what the new image does not hold is read from it. A relative path is relative to FILE's directory
    #[arg(long, value_name = "FILE", requires = "backing_format")]
    backing: Option<PathBuf>,
    /// The backing file's format; it is never guessed: qcow2 or raw
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// Cluster size in bytes, a power of two from 512 to 2M
    #[arg(long, value_name = "N", value_parser = size::parse, default_value = "64K")]
    cluster_size: u64,
    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let options = CreateOptions {
        path: args.file.clone(),
        size: args.size,
        cluster_size: args.cluster_size,
        backing: args.backing.clone().zip(args.backing_format),
        force: args.force,
    };
    create(&options).map_err(|e| e.to_string())?;
    Ok(ExitCode::SUCCESS)
}
