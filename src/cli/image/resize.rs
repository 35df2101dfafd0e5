//! `cowgate image resize`.

use crate::cli::progress::Report;
use crate::cli::size;
use crate::image::Format;
use crate::image::info::info;
use crate::image::resize::{NewSize, resize};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The image
    file: PathBuf,
    /// The new size in bytes, or with a suffix K, M, G or T (1K is 1024); with + or - before it, so much more or less
    #[arg(value_name = "[+|-]SIZE", value_parser = parse, allow_hyphen_values = true)]
    size: NewSize,
    /// Its format: qcow2 or raw [default: by the file's name, qcow2 if it ends in .qcow2]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,
    /// Allow a smaller disk: what lies behind its new end is lost
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    report: Report,
}

fn parse(text: &str) -> Result<NewSize, String> {
    Ok(match text.split_at_checked(1) {
        Some(("+", more)) => NewSize::More(size::parse(more)?),
        Some(("-", less)) => NewSize::Less(size::parse(less)?),
        _ => NewSize::Exactly(size::parse(text)?),
    })
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let format = match args.format {
        Some(format) => format,
        None => by_name(args)?,
    };
    let meter = args.report.meter("resizing");
    let done = resize(&args.file, format, args.size, args.shrink, &|done, total| meter.show(done, total));
    let done = done.map_err(|e| e.to_string())?;
    drop(meter);
    args.report.done(&done, || {
        let (old, new) = (size::show(done.old_virtual_size), size::show(done.virtual_size));
        format!("{}: {new} ({} bytes), was {old}", done.filename.display(), done.virtual_size)
    })
}

/// The format that the file's name stands for; not when the file looks like another, whose end would be cut off.
fn by_name(args: &Args) -> Result<Format, String> {
    let format = Format::by_name(&args.file);
    let seems = info(&args.file, None).map_err(|e| e.to_string())?.format;
    match seems == format {
        true => Ok(format),
        false => {
            Err(format!("{}: is {format} by its name and {seems} by its content; give --format", args.file.display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_signs() {
        assert_eq!(parse("10G"), Ok(NewSize::Exactly(10 << 30)));
        assert_eq!(parse("+1K"), Ok(NewSize::More(1024)));
        assert_eq!(parse("-512"), Ok(NewSize::Less(512)));
        for bad in ["", "+", "-", "+-1", "1.5G"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
