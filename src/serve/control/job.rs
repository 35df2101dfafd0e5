//! Backup jobs: the export of a job is named and found again, put aside when the job ends, and put back when it does not
//! end after all.
//!
//! A job is known by its parts and its image, not by the moment at which somebody asked for it: whoever asks twice,
//! because the first answer was lost, gets the same export. Ending is as patient: the job's record lies in `includedir`
//! until who ends it has examined the image and removes it (`export::store`), so that a crash of either side loses
//! nothing.

use super::State;
use super::change::{add_in_turn, drains, in_background, store_problem};
use super::routes::{Answer, Json, look_for, not_there, problem, stopping};
use super::wire::{AddExport, Added, BeginBackup, EndParams, Ending, Problem, Resumed};
use crate::export::name::{Backup, BackupKind, Disk, Name, NameError, Time};
use crate::export::problem::printable;
use crate::export::service::Export;
use crate::export::store::{self, Record};
use axum::http::StatusCode;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Jobs that are being ended, while this daemon runs: what their exports counted is asked for until the end.
pub(super) type Jobs = Mutex<HashMap<String, Job>>;

/// One of them.
pub(super) struct Job {
    export: Arc<Export>,
    /// Flushes that had failed when the ending began.
    failed_before: usize,
}

/// Adds the export of a job, or finds it.
pub(super) async fn begin(state: &State, wanted: &BeginBackup) -> Answer<Added> {
    let path = Path::new(&wanted.path);
    let (time_given, job) = named(wanted).map_err(|why| problem(StatusCode::UNPROCESSABLE_ENTITY, why))?;
    let name = Name::Backup(job.clone()).to_string();
    let _turn = state.changing.lock().await;
    let found = state.registry.entries().into_iter().find(|entry| entry.export.config().path == path);
    let name = match found.map(|entry| entry.export.config().name.clone()) {
        Some(found) if found == name || (!time_given && is_same_job(&found, &job)) => found,
        Some(found) => {
            let found = printable(found.as_bytes());
            let remedy = format!("end that with `cowgate backup end {found}`, or choose another image");
            return Err(taken(path, &format!("this image is served as export {found:?}"), remedy));
        }
        None => {
            refuse_what_is_ending(state, path, &name).await?;
            if wanted.existing {
                return Err(not_there(&name));
            }
            name
        }
    };
    let BeginBackup { path, keys, .. } = wanted.clone();
    let export = AddExport { name, path, format: Some("qcow2".to_owned()), keys, ..AddExport::default() };
    add_in_turn(state, &export).await
}

/// Whether the time was given, and the job's parts.
fn named(wanted: &BeginBackup) -> Result<(bool, Backup), String> {
    let parts = || -> Result<_, NameError> {
        let disk: Disk = wanted.disk.to_string().parse()?;
        let kind: BackupKind = wanted.kind.parse()?;
        let time = wanted.time.as_deref().map(str::parse::<Time>).transpose()?;
        Ok((disk, kind, time))
    };
    let (disk, kind, given) = parts().map_err(|e| e.to_string())?;
    let now = || {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok();
        since.and_then(|d| i64::try_from(d.as_secs()).ok()).and_then(Time::from_unix)
    };
    let Some(time) = given.or_else(now) else {
        return Err("the clock is not in the years 1970 to 9999; set it, or give the time".to_owned());
    };
    let job = Backup::new(&wanted.context, disk, kind, time).map_err(|e| e.to_string())?;
    Ok((given.is_some(), job))
}

/// Whether an export has the name of this job, at whatever time.
fn is_same_job(name: &str, job: &Backup) -> bool {
    let parts = |b: &Backup| (b.context().to_owned(), b.disk(), b.kind());
    matches!(name.parse(), Ok(Name::Backup(found)) if parts(&found) == parts(job))
}

async fn refuse_what_is_ending(state: &State, image: &Path, name: &str) -> Result<(), Problem> {
    let Some(directory) = state.control.include_dir().await else { return Ok(()) };
    let (name, path) = (name.to_owned(), image.to_owned());
    let find = move || {
        let found = match store::record(&directory, &name) {
            Ok(None) => store::record_of_image(&directory, &path),
            found => found,
        };
        found.map_err(|e| store_problem(&e))
    };
    let Some(record) = in_background(find).await? else { return Ok(()) };
    let ending = printable(record.export.name.as_bytes());
    let remedy = format!("finish that with `cowgate backup end {ending}`");
    Err(taken(image, &format!("the backup {ending:?} is being ended"), remedy))
}

fn taken(image: &Path, why: &str, remedy: String) -> Problem {
    let path = image.display().to_string();
    let detail = format!("{path}: {why}");
    Problem { path: Some(path.into()), remedy: Some(remedy.into()), ..problem(StatusCode::CONFLICT, detail) }
}

/// Takes a job's export away from new clients, and tells how far those it has are. To be asked until they have left.
pub(super) async fn end(state: &State, name: &str, params: EndParams) -> Answer<Ending> {
    let _turn = state.changing.lock().await;
    let directory = directory(state).await?;
    let mut found = record(&directory, name).await?;
    if found.is_none() {
        look_for(state, name).await;
    }
    if let Some(entry) = state.registry.entry(name) {
        let failed_before = state.registry.failed_flushes();
        let (owned, source) = (name.to_owned(), entry.source.clone());
        in_background(move || store::set_aside(&owned, &source).map_err(|e| store_problem(&e))).await?;
        let applied = state.control.file(entry.source.file.clone()).await.ok_or_else(stopping)?;
        if state.registry.get(name).is_some_and(|now| Arc::ptr_eq(&now, &entry.export)) {
            let why = applied.problems.first().cloned().unwrap_or_default();
            let detail = format!("its file is put aside, but the export is still served: {why}");
            return Err(Problem { problems: applied.problems, ..problem(StatusCode::CONFLICT, detail) });
        }
        jobs(state).insert(name.to_owned(), Job { export: entry.export, failed_before });
        found = record(&directory, name).await?;
    }
    let Some(record) = found else { return Err(not_there(name)) };
    let draining = drains(state, name);
    let connections: Vec<_> = draining.iter().flat_map(|export| export.connections()).collect();
    if params.force {
        connections.iter().for_each(|connection| connection.disconnect());
    }
    let mut jobs = jobs(state);
    jobs.retain(|other, _| other == name || store::record_path(&directory, other).exists());
    let job = jobs.get(name);
    let ending = Ending {
        name: name.to_owned(),
        record: record.file.display().to_string(),
        clients: connections.len(),
        drained: draining.is_empty(),
        bytes_written: job.map(|job| job.export.totals().write.bytes),
        failed_flushes: job.map_or(0, |job| state.registry.failed_flushes() - job.failed_before),
    };
    Ok((StatusCode::OK, Json(ending)))
}

/// Makes a job's export what it was before its ending began.
pub(super) async fn resume(state: &State, name: &str) -> Answer<Resumed> {
    let _turn = state.changing.lock().await;
    let directory = directory(state).await?;
    let owned = name.to_owned();
    let back = in_background(move || store::put_back(&directory, &owned).map_err(|e| store_problem(&e))).await?;
    let Some(file) = back else { return Err(not_there(name)) };
    let applied = state.control.file(file.clone()).await.ok_or_else(stopping)?;
    let Some(export) = state.registry.get(name) else {
        let detail = format!("{}: is back, but not served", file.display());
        return Err(Problem { problems: applied.problems, ..problem(StatusCode::CONFLICT, detail) });
    };
    jobs(state).remove(name);
    let clients = export.connections().len();
    Ok((StatusCode::OK, Json(Resumed { name: name.to_owned(), file: file.display().to_string(), clients })))
}

fn jobs(state: &State) -> std::sync::MutexGuard<'_, HashMap<String, Job>> {
    state.jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn directory(state: &State) -> Result<PathBuf, Problem> {
    let none = || problem(StatusCode::CONFLICT, "the configuration has no includedir, where the files of jobs are");
    state.control.include_dir().await.ok_or_else(none)
}

async fn record(directory: &Path, name: &str) -> Result<Option<Record>, Problem> {
    let (directory, name) = (directory.to_owned(), name.to_owned());
    in_background(move || store::record(&directory, &name).map_err(|e| store_problem(&e))).await
}
