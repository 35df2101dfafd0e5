//! `cowgate image info`.

use super::bitmap::describe as describe_bitmap;
use crate::cli::progress::print_json;
use crate::cli::{say, size};
use crate::image::Format;
use crate::image::info::{FormatSpecific, ImageInfo, info};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image to describe
    file: PathBuf,
    /// Print JSON with the keys of `qemu-img info --output=json`
    #[arg(long)]
    json: bool,
    /// Its format: qcow2 or raw [default: qcow2 if the file begins like one, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let info = info(&args.file, args.format).map_err(|e| e.to_string())?;
    match args.json {
        true => print_json(&info)?,
        false => say(&describe(&info))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The description for people, in the order and words of `qemu-img info`.
fn describe(info: &ImageInfo) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        // an image may name anything, but it shall not drive the terminal
        let mut clean = String::new();
        for c in value.chars() {
            match c.is_control() {
                true => clean.extend(c.escape_default()),
                false => clean.push(c),
            }
        }
        let _ = writeln!(out, "{name}: {clean}"); // writing to a string cannot fail
    };
    line("image", info.filename.display().to_string());
    line("file format", info.format.to_string());
    line("virtual size", format!("{} ({} bytes)", size::show(info.virtual_size), info.virtual_size));
    line("disk size", size::show(info.actual_size));
    if let Some(bytes) = info.cluster_size {
        line("cluster size", size::show(bytes));
    }
    if let Some(name) = &info.backing_filename {
        line("backing file", name.clone());
        line("backing file format", info.backing_filename_format.clone().unwrap_or("not declared".into()));
    }
    if info.dirty_flag == Some(true) {
        line("dirty", "yes; repair it with `cowgate image check --repair`".into());
    }
    if let Some(FormatSpecific::Qcow2(qcow2)) = &info.format_specific {
        line("compat", qcow2.compat.into());
        line("compression type", qcow2.compression_type.into());
        line("lazy refcounts", qcow2.lazy_refcounts.to_string());
        line("refcount bits", qcow2.refcount_bits.to_string());
        for bitmap in &qcow2.bitmaps {
            line("bitmap", describe_bitmap(bitmap));
        }
        if let Some(why) = &qcow2.bitmaps_error {
            line("bitmaps", why.clone());
        }
        line("corrupt", qcow2.corrupt.to_string());
        line("extended l2", qcow2.extended_l2.to_string());
        if let Some(name) = &qcow2.data_file {
            line("data file", name.clone());
        }
        if let Some(raw) = qcow2.data_file_raw {
            line("data file raw", raw.to_string());
        }
    }
    for snapshot in &info.snapshots {
        line(
            "snapshot",
            format!("{} {:?}, VM state {}", snapshot.id, snapshot.name, size::show(snapshot.vm_state_size)),
        );
    }
    out
}
