//! `cowgate image create`.

use super::features;
use crate::cli::progress::print_json;
use crate::cli::size;
use crate::image::Format;
use crate::image::create::{CreateOptions, create};
use crate::image::info::info;
use crate::qcow2::compress::Compression;
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
    #[command(flatten)]
    features: features::FeatureArgs,
    /// How compressed clusters will be packed: zlib or zstd
    #[arg(long, value_name = "TYPE", value_parser = features::compression, default_value = "zlib")]
    compression: Compression,
    /// Keep the data in this new file of its own, not in FILE. A relative path is relative to FILE's directory
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,
    /// The data file stays a raw image of the disk that can be used by itself
    #[arg(long, requires = "data_file", conflicts_with = "backing")]
    data_file_raw: bool,
    /// Replace FILE, and the data file, if they exist
    #[arg(long)]
    force: bool,
    /// Print what was made as JSON, as `cowgate image info --json` does
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let options = CreateOptions {
        path: args.file.clone(),
        size: args.size,
        features: args.features.with(args.compression),
        backing: args.backing.clone().zip(args.backing_format),
        data_file: args.data_file.clone(),
        data_file_raw: args.data_file_raw,
        force: args.force,
    };
    create(&options).map_err(|e| e.to_string())?;
    if args.json {
        print_json(&info(&args.file, Some(Format::Qcow2)).map_err(|e| e.to_string())?)?;
    }
    Ok(ExitCode::SUCCESS)
}
