//! `cowgate image convert`.

use super::features;
use crate::cli::progress::Report;
use crate::cli::size;
use crate::image::Format;
use crate::image::convert::{ConvertOptions, convert};
use crate::qcow2::compress::Compression;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image to copy, with its whole backing chain
    source: PathBuf,
    /// The new image: it holds everything itself. A block device is written in place
    dest: PathBuf,
    /// Format of SOURCE: qcow2 or raw [default: qcow2 if it is named or begins like one, else raw]
    #[arg(long, alias = "format", value_name = "FORMAT")]
    source_format: Option<Format>,
    /// Format of DEST [default: as DEST's name ends: .qcow2, .raw or .img]
    #[arg(long, value_name = "FORMAT")]
    output_format: Option<Format>,
    /// Copy this internal snapshot of SOURCE, named by ID or name, instead of its active disk
    #[arg(long, value_name = "NAME")]
    snapshot: Option<String>,
    /// Store clusters compressed: zlib or zstd (QCOW2)
    #[arg(long, value_name = "TYPE", value_parser = features::compression)]
    compress: Option<Compression>,
    #[command(flatten)]
    features: features::FeatureArgs,
    /// Replace DEST if it exists, overwrite it if it is a block device
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    report: Report,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let options = ConvertOptions {
        source: args.source.clone(),
        source_format: args.source_format,
        snapshot: args.snapshot.clone(),
        dest: args.dest.clone(),
        dest_format: args.output_format.map_or_else(|| by_name(&args.dest), Ok)?,
        features: args.features.with(args.compress.unwrap_or(Compression::Zlib)),
        compress: args.compress.is_some(),
        force: args.force,
    };
    let stop = stop_on_signal();
    let meter = args.report.meter("converting");
    let result = convert(&options, &stop, &|done, all| meter.show(done, all));
    drop(meter);
    let done = result.map_err(|e| e.to_string())?;
    args.report.done(&done, || {
        let (disk, data, file) = (done.virtual_size, done.data_size, done.actual_size);
        let (disk, data, file) = (size::show(disk), size::show(data), size::show(file));
        format!("{}: {disk}, {data} of it data; occupies {file}", args.dest.display())
    })
}

fn by_name(dest: &Path) -> Result<Format, String> {
    if dest.metadata().is_ok_and(|meta| meta.file_type().is_block_device()) {
        return Ok(Format::Raw);
    }
    match dest.extension().and_then(|e| e.to_str()) {
        Some("qcow2") => Ok(Format::Qcow2),
        Some("raw" | "img") => Ok(Format::Raw),
        _ => Err(format!("{}: its name does not tell the format; give --output-format qcow2 or raw", dest.display())),
    }
}

/// A flag that SIGINT and SIGTERM set, so that a stopped command can clean up. Without it they end the process at once.
fn stop_on_signal() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    std::thread::spawn(move || {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
        runtime.block_on(async move {
            let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) else {
                return;
            };
            tokio::select! { _ = int.recv() => {}, _ = term.recv() => {} }
            flag.store(true, Ordering::Relaxed);
        });
    });
    stop
}
