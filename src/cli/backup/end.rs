//! `cowgate backup end`.
//!
//! The daemon puts the export's file aside as a record, which outlives a crash of either side; the image is examined
//! when its last client has left and its lock is given back; only then the record goes. Without a daemon nobody serves
//! the image, so the same is done to the files alone.

use crate::cli::control::{Control, Failure, percent_encoded};
use crate::cli::progress::print_json;
use crate::cli::serve::DEFAULT_CONFIG;
use crate::export::load;
use crate::export::problem::Severity;
use crate::export::store::{self, Record};
use crate::image::check::{Report, check};
use crate::image::info::info;
use crate::image::repair::{Scope, repair};
use crate::image::{Error, Format};
use crate::serve::control::wire::{Ending, Resumed};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// First pause before the daemon is asked again whether clients have left; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest of these pauses.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Exit status of a damaged image, as that of `cowgate image check`.
const DAMAGED: u8 = 2;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The export's name
    name: String,
    /// Disconnect clients: what they have in flight is completed and flushed
    #[arg(long)]
    force: bool,
    /// Give up after this many seconds. The export is then as it was before; with --force it stays ended
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The daemon's configuration file, for when it is not running
    #[arg(short, short_alias = 'C', long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,
    #[command(flatten)]
    control: Control,
}

/// What became of a job.
#[derive(Debug, Serialize)]
struct Ended {
    name: String,
    state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    virtual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated_size: Option<u64>,
    /// What clients wrote, as far as a running daemon has counted it.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_written: Option<u64>,
    /// Clients that are still connected.
    #[serde(skip_serializing_if = "Option::is_none")]
    clients: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Checked>,
    /// What is left of the job's export while it has not ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    duration_seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// All is done.
    Ended,
    /// There is no such job, or it had ended before.
    Absent,
    /// Clients did not leave in time, and the export is what it was.
    Busy,
    /// The export is removed, but not everything is flushed in time.
    Draining,
    /// The image has errors; the record stays.
    Damaged,
    /// Writes that a client was told are done may be lost; the record stays.
    Unflushed,
}

#[derive(Debug, Serialize)]
struct Checked {
    result: Verdict,
    corruptions: u64,
    leaks: u64,
    leaks_fixed: u64,
    check_errors: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// No errors.
    Clean,
    /// Wasted space, which somebody who has the image open kept from being given back; no harm to data.
    Leaks,
    /// Errors.
    Damaged,
    /// Parts could not be checked.
    Incomplete,
}

pub(super) fn run(args: &Args) -> Result<ExitCode, String> {
    let began = Instant::now();
    let mut ended = Ended {
        name: args.name.clone(),
        state: State::Absent,
        image: None,
        virtual_size: None,
        allocated_size: None,
        bytes_written: None,
        clients: None,
        check: None,
        record: None,
        duration_seconds: 0.0,
    };
    let finished = finish(args, began, &mut ended);
    ended.duration_seconds = began.elapsed().as_secs_f64();
    let status = finished?;
    print_json(&ended)?;
    Ok(status)
}

fn finish(args: &Args, began: Instant, ended: &mut Ended) -> Result<ExitCode, String> {
    let record = match let_go(args, began, ended) {
        Ok(Some(record)) => record,
        Ok(None) => return Ok(if ended.state == State::Absent { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Err(Failure::Absent(why)) => match without_daemon(args, &why)? {
            Some(record) => record,
            None => return Ok(ExitCode::SUCCESS),
        },
        Err(Failure::Refused(problem)) if problem.status == 404 => return Ok(ExitCode::SUCCESS),
        Err(e) => return Err(e.to_string()),
    };
    let image = &record.export.path;
    ended.image = Some(image.display().to_string());
    let unfinished = |why: String| {
        let (name, file) = (&args.name, record.file.display());
        format!(
            "{why}\n  the backup has not ended: see to that and repeat `cowgate backup end {name}`, or remove {file}"
        )
    };
    if record.export.format == Format::Qcow2 {
        let checked = examine(image).map_err(|e| unfinished(e.to_string()))?;
        let verdict = checked.result;
        ended.check = Some(checked);
        if matches!(verdict, Verdict::Damaged | Verdict::Incomplete) {
            ended.state = State::Damaged;
            ended.record = Some(record.file.display().to_string());
            let image = image.display();
            let why = format!("{image}: has errors; `cowgate image check --repair {image}` can repair some");
            eprintln!("cowgate: {}", unfinished(why));
            return Ok(ExitCode::from(DAMAGED));
        }
    }
    let about = info(image, Some(record.export.format)).map_err(|e| unfinished(e.to_string()))?;
    (ended.virtual_size, ended.allocated_size) = (Some(about.virtual_size), Some(about.actual_size));
    if ended.state == State::Unflushed {
        ended.record = Some(record.file.display().to_string());
        let why = format!("{}: could not be flushed: what clients believe written may be lost", image.display());
        eprintln!("cowgate: {}", unfinished(why));
        return Ok(ExitCode::FAILURE);
    }
    store::forget(&record.file).map_err(|e| unfinished(e.to_string()))?;
    ended.state = State::Ended;
    Ok(ExitCode::SUCCESS)
}

/// Has the daemon let go of the image. `None`: it did not in time.
fn let_go(args: &Args, began: Instant, ended: &mut Ended) -> Result<Option<Record>, Failure> {
    let path = format!("/v1/backups/{}", percent_encoded(&args.name));
    let deadline = args.timeout.map(|seconds| began + Duration::from_secs(seconds.min(u64::from(u32::MAX))));
    let mut pause = PAUSE;
    let mut ending: Ending = args.control.delete(&format!("{path}?force={}", args.force))?;
    while !ending.drained {
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return too_late(args, &path, &ending, ended).map(|()| None);
        }
        std::thread::sleep(deadline.map_or(pause, |deadline| pause.min(deadline - now)));
        pause = (pause * 2).min(PAUSE_MAX);
        ending = args.control.delete(&format!("{path}?force={}", args.force))?;
    }
    ended.bytes_written = ending.bytes_written;
    if ending.failed_flushes > 0 {
        ended.state = State::Unflushed;
    }
    read(Path::new(&ending.record), &args.name).map_err(Failure::Lost)
}

fn too_late(args: &Args, path: &str, ending: &Ending, ended: &mut Ended) -> Result<(), Failure> {
    ended.clients = Some(ending.clients);
    let (name, clients) = (&args.name, ending.clients);
    let seconds = args.timeout.unwrap_or_default();
    if args.force {
        (ended.state, ended.record) = (State::Draining, Some(ending.record.clone()));
        eprintln!(
            "cowgate: {name}: not everything is flushed after {seconds} s; the export is removed, and its image is not \
             released yet: repeat `cowgate backup end {name}`"
        );
        return Ok(());
    }
    let _: Resumed = args.control.post(&format!("{path}/resume"), None::<&()>)?;
    ended.state = State::Busy;
    eprintln!(
        "cowgate: {name}: {clients} clients are still connected after {seconds} s, and the export is served as before; \
         end it when they have left, or with --force"
    );
    Ok(())
}

/// The same when no daemon runs: nobody has the image.
fn without_daemon(args: &Args, why: &str) -> Result<Option<Record>, String> {
    let loaded = load::load(&args.config);
    let Some(directory) = loaded.server.as_ref().and_then(|server| server.include_dir.clone()) else {
        let error = loaded.problems.iter().find(|p| p.severity == Severity::Error);
        let error = error.map_or("it has no includedir".to_owned(), ToString::to_string);
        let config = args.config.display();
        return Err(format!(
            "{why}\n  and its configuration {config} cannot be used: {error}; name another with --config"
        ));
    };
    if let Some(export) = loaded.exports.iter().find(|export| export.name == args.name) {
        store::set_aside(&args.name, &export.source).map_err(|e| e.to_string())?;
    }
    store::record(&directory, &args.name).map_err(|e| e.to_string())
}

fn read(record: &Path, name: &str) -> Result<Option<Record>, String> {
    let directory = record.parent().unwrap_or(Path::new("/"));
    let found = store::record(directory, name).map_err(|e| e.to_string())?;
    // another `end` was faster
    Ok(found)
}

/// Checks the image. Leaked clusters, which a crash of the daemon may leave, are given back if nobody reads it.
fn examine(image: &Path) -> Result<Checked, Error> {
    let quiet = |_, _| {};
    let qcow2 = Some(Format::Qcow2);
    let mut report = check(image, qcow2, &quiet)?;
    if report.as_ref().is_some_and(|r| r.leaks > 0 && r.corruptions + r.check_errors == 0) {
        match repair(image, qcow2, Scope::Leaks, &quiet) {
            Err(Error::Locked { .. } | Error::Busy { .. }) => {}
            repaired => report = repaired?,
        }
    }
    let report = report.as_ref();
    let count = |field: fn(&Report) -> u64| report.map_or(0, field);
    let (corruptions, leaks) = (count(|r| r.corruptions), count(|r| r.leaks));
    let check_errors = count(|r| r.check_errors);
    let result = match () {
        () if corruptions > 0 => Verdict::Damaged,
        () if check_errors > 0 => Verdict::Incomplete,
        () if leaks > 0 => Verdict::Leaks,
        () => Verdict::Clean,
    };
    Ok(Checked { result, corruptions, leaks, leaks_fixed: count(|r| r.leaks_fixed), check_errors })
}
