//! `cowgate status`: what the running daemon, its exports and their clients are doing, once or again and again.

use super::control::Control;
use super::export::{mode, state};
use super::progress::print_json;
use super::say;
use super::size::show as human;
use super::table::Table;
use crate::export::status::{Counters, ExportStatus};
use crate::serve::control::wire::{ExportList, Health};
use serde::Serialize;
use std::collections::HashMap;
use std::fmt::Write;
use std::io::{IsTerminal, stdout};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Show it again every so many seconds, in place, with what was moved per second in between. Needs a terminal, or --json
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = interval)]
    watch: Option<Duration>,
    /// Print it as JSON; with --watch one line each time
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    control: Control,
}

/// Everything there is to know.
#[derive(Debug, Serialize)]
struct Status {
    #[serde(rename = "daemon")]
    health: Health,
    exports: Vec<ExportStatus>,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|s| (0.1..=86_400.0).contains(s));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "write seconds, from 0.1 to 86400".to_owned())
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let mut status = ask(&args.control)?;
    match args.watch {
        Some(pause) if args.json => loop {
            let line = serde_json::to_string(&status).map_err(|e| e.to_string())?;
            say(&(line + "\n"))?;
            std::thread::sleep(pause);
            status = ask(&args.control)?;
        },
        Some(pause) if stdout().is_terminal() => watch(args, pause, status),
        _ if args.json => print_json(&status).map(|()| ExitCode::SUCCESS),
        _ => say(&picture(&status, None)).map(|()| ExitCode::SUCCESS),
    }
}

fn ask(control: &Control) -> Result<Status, String> {
    let health = control.get("/v1/health")?;
    let list: ExportList = control.get("/v1/exports")?;
    Ok(Status { health, exports: list.exports })
}

/// Draws over what was drawn before, in one write, so that nothing flickers. The terminal is left as it is whatever
/// ends the program.
fn watch(args: &Args, pause: Duration, first: Status) -> Result<ExitCode, String> {
    let mut before: Option<(Instant, Moved)> = None;
    let mut status = Ok(first);
    say("\x1b[2J")?;
    loop {
        let now = Instant::now();
        let text = match &status {
            Ok(status) => {
                let text = picture(status, before.as_ref().map(|(then, moved)| (now - *then, moved)));
                before = Some((now, moved(&status.exports)));
                text
            }
            // it may come back
            Err(why) => format!("{why}\n"),
        };
        say(&screen(&text))?;
        std::thread::sleep(pause);
        status = ask(&args.control);
    }
}

/// The text cut to what the terminal shows, as the bytes that draw it from the top.
fn screen(text: &str) -> String {
    let (columns, rows) =
        terminal_size::terminal_size().map_or((80, 24), |(w, h)| (usize::from(w.0), usize::from(h.0)));
    let lines: Vec<&str> = text.lines().collect();
    let shown = if lines.len() < rows { lines.len() } else { rows.saturating_sub(2) };
    let mut out = "\x1b[H".to_owned();
    for line in &lines[..shown] {
        out.extend(line.chars().take(columns));
        out += "\x1b[K\n";
    }
    if shown < lines.len() {
        let _ = writeln!(out, "... {} more lines\x1b[K", lines.len() - shown); // writing to a string cannot fail
    }
    out + "\x1b[J"
}

/// What an export has moved so far: bytes read, bytes written, requests. By name, with former definitions.
type Moved = HashMap<String, [u64; 3]>;

fn moved(exports: &[ExportStatus]) -> Moved {
    // the totals are those of the name, whichever definition has them
    exports.iter().map(|export| (export.name.clone(), sums(&export.totals))).collect()
}

fn sums(totals: &Counters) -> [u64; 3] {
    let Counters { read, write, write_zeroes, trim, flush, block_status, cache, .. } = totals;
    let all = [read, write, write_zeroes, trim, flush, block_status, cache];
    [read.bytes, write.bytes + write_zeroes.bytes, all.iter().map(|count| count.requests).sum()]
}

/// The whole status as text. `before`: what was moved then, and how long ago.
fn picture(status: &Status, before: Option<(Duration, &Moved)>) -> String {
    let Health { version, pid, since, generation, exports, draining, clients, status: state_word, .. } = &status.health;
    let mut out = format!(
        "cowgate {version}, pid {pid}, {state_word} since {since}\nconfiguration {generation}: {exports} exports, \
         {draining} draining, {clients} clients\n"
    );
    if status.health.failed_flushes > 0 {
        let failed = status.health.failed_flushes;
        let _ = writeln!(out, "{failed} images could not be flushed when their last writers left: see the log");
    }
    out.push('\n');
    let heads = if before.is_some() { ["READ/S", "WRITE/S", "REQ/S"] } else { ["READ", "WRITTEN", "REQUESTS"] };
    let [read, written, requests] = heads;
    let mut table =
        Table::new(&["NAME", "STATE", "MODE", "CLIENTS", "IN FLIGHT", read, written, requests, "ALLOCATED"]);
    for export in &status.exports {
        let now = sums(&export.totals);
        let [read, written, requests] = match before {
            None => [human(now[0]), human(now[1]), now[2].to_string()],
            Some((time, before)) => {
                let then = before.get(&export.name).copied().unwrap_or(now);
                let rate = |i: usize| (now[i].saturating_sub(then[i]) as f64 / time.as_secs_f64().max(0.001)) as u64;
                [human(rate(0)), human(rate(1)), rate(2).to_string()]
            }
        };
        table.row([
            export.name.clone(),
            state(export.state).to_owned(),
            mode(export.mode).to_owned(),
            export.clients.len().to_string(),
            export.clients.iter().map(|client| client.in_flight).sum::<u64>().to_string(),
            read,
            written,
            requests,
            export.allocated_bytes.map_or("-".to_owned(), human),
        ]);
    }
    out + &table.to_string()
}
