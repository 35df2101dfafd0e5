//! `cowgate restore inspect`.

use super::Image;
use crate::cli::control::printable;
use crate::cli::progress::print_json;
use crate::cli::say;
use crate::cli::size::show;
use crate::cli::table::Table;
use crate::restore::layout::{Content, Layout};
use crate::restore::mount;
use crate::restore::source::SCRATCH;
use std::path::Path;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    image: Image,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let source = args.image.source(Path::new(SCRATCH))?;
    let layout = mount::inspect(&source).map_err(|e| printable(&format!("{}: {e}", args.image.what)))?;
    match args.json {
        true => print_json(&layout)?,
        false => say(&text(&layout))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn text(layout: &Layout) -> String {
    let kind = match &layout.table {
        Some(table) => format!("partition table {table}"),
        None => "no partition table".to_owned(),
    };
    let mut table = Table::new(&["PARTITION", "START", "SIZE", "TYPE", "LABEL", "UUID", "NAME", "MOUNTABLE"]);
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    for content in &layout.contents {
        table.row([
            content.partition.map_or("-".to_owned(), |number| number.to_string()),
            content.start_bytes.to_string(),
            show(content.size_bytes),
            or_none(&content.type_name),
            or_none(&content.label),
            or_none(&content.uuid),
            or_none(&content.name),
            if content.mountable { "yes" } else { "no" }.to_owned(),
        ]);
    }
    let note = layout.note.iter().map(|note| format!("{note}\n"));
    let more: String = note.chain(layout.contents.iter().flat_map(lines)).collect();
    format!("{}, {kind}\n{table}{}", show(layout.size_bytes), printable(&more))
}

/// What does not fit into the table.
fn lines(content: &Content) -> Vec<String> {
    let what = content.what();
    let mut lines: Vec<String> = content.note.iter().map(|note| format!("{what}: {note}\n")).collect();
    if let Some(group) = &content.volume_group {
        lines.push(format!("{what}: volume group {group}\n"));
    }
    let volumes = content.logical_volumes.iter();
    lines
        .extend(volumes.map(|volume| format!("{what}: logical volume {}, {}\n", volume.name, show(volume.size_bytes))));
    lines
}
