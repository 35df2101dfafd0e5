//! `cowgate image bitmap`.

use crate::cli::progress::print_json;
use crate::cli::{say, size};
use crate::image::bitmap_edit::{BitmapInfo, Edit, edit, list};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a bitmap: it notes what is written from now on
    Add {
        #[command(flatten)]
        which: Which,
        /// Bytes of the disk that one bit stands for, a power of two from 512 to 2G [default: the cluster size, within
        /// 4K and 64K]
        #[arg(long, value_name = "N", value_parser = size::parse)]
        granularity: Option<u64>,
        /// Note nothing until the bitmap is enabled
        #[arg(long)]
        disabled: bool,
    },
    /// Remove a bitmap, also one that a crash has left in use
    Remove(Which),
    /// List the bitmaps
    List {
        /// The image
        file: PathBuf,
        /// Print JSON: what `qemu-img info --output=json` has under `bitmaps`
        #[arg(long)]
        json: bool,
    },
    /// Unset all bits of a bitmap
    Clear(Which),
    /// Note what is written from now on
    Enable(Which),
    /// Note nothing from now on
    Disable(Which),
    /// Set in a bitmap the bits that are set in another one
    Merge {
        #[command(flatten)]
        which: Which,
        /// Name of the bitmap whose bits are taken
        source: String,
        /// The image that holds SOURCE [default: FILE]
        #[arg(long, value_name = "IMAGE")]
        source_image: Option<PathBuf>,
    },
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The image
    file: PathBuf,
    /// The bitmap
    name: String,
    /// Print the image's bitmaps afterwards as JSON, as `list --json` does
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let (which, change) = match &args.command {
        Command::List { file, json } => return show(&list(file).map_err(|e| e.to_string())?, *json),
        Command::Add { which, granularity, disabled } => {
            (which, Edit::Add { granularity: *granularity, disabled: *disabled })
        }
        Command::Remove(which) => (which, Edit::Remove),
        Command::Clear(which) => (which, Edit::Clear),
        Command::Enable(which) => (which, Edit::Enable),
        Command::Disable(which) => (which, Edit::Disable),
        Command::Merge { which, source, source_image } => {
            (which, Edit::Merge { source: source.clone(), image: source_image.clone() })
        }
    };
    edit(&which.file, &which.name, &change).map_err(|e| e.to_string())?;
    match which.json {
        true => show(&list(&which.file).map_err(|e| e.to_string())?, true),
        false => Ok(ExitCode::SUCCESS),
    }
}

fn show(bitmaps: &[BitmapInfo], json: bool) -> Result<ExitCode, String> {
    if json {
        print_json(&bitmaps)?;
    } else {
        say(&bitmaps.iter().map(|bitmap| describe(bitmap) + "\n").collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A bitmap in one line for people; `{:?}` keeps a hostile name from driving the terminal.
pub(super) fn describe(bitmap: &BitmapInfo) -> String {
    let state = match (bitmap.flags.contains(&"in-use"), bitmap.flags.contains(&"auto")) {
        (true, _) => "in use: it was not saved and cannot be used",
        (false, true) => "enabled",
        (false, false) => "disabled",
    };
    format!("{:?}, granularity {}, {state}", bitmap.name, size::show(bitmap.granularity))
}
