//! Adding, removing and trying exports: the files of `includedir`, and what the daemon makes of them.
//!
//! An export is changed by changing its file and having that file applied, so that what is served and what the next
//! start will serve are the same, whatever the moment of a crash.

use super::State;
use super::routes::{Answer, Json, look_for, not_there, problem, stopping, view};
use super::wire::{AddExport, AddOutcome, Added, Probed, Problem, Removed};
use crate::block::BlockDev;
use crate::export::config::{ExportConfig, Source};
use crate::export::problem::printable;
use crate::export::serialize;
use crate::export::service::{AttachError, Export};
use crate::export::store::{self, StoreError};
use crate::ring::{self, Peer};
use axum::http::StatusCode;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tracing::warn;

/// How long a probe waits for an image that is in use elsewhere.
const PROBE_PATIENCE: Duration = Duration::from_millis(500);

/// Adds an export, or finds that it is served just so.
pub(super) async fn add(state: &State, wanted: &AddExport) -> Answer<Added> {
    let _turn = state.changing.lock().await;
    add_in_turn(state, wanted).await
}

/// The same for who has the turn to change exports.
pub(super) async fn add_in_turn(state: &State, wanted: &AddExport) -> Answer<Added> {
    let config = config(wanted)?;
    let former = state.registry.entry(&config.name);
    if let Some(entry) = &former {
        let (file, line) = (&entry.source.file, entry.source.line);
        let same = entry.serves(&config);
        // a file that has gone is written again: the next reload would end the export
        if same && file.exists() {
            return added(state, &config.name, AddOutcome::Unchanged, file).await;
        }
        if !same && !wanted.replace {
            let name = printable(config.name.as_bytes());
            let detail = format!("{}:{line}: export {name:?} is defined otherwise", file.display());
            return Err(conflict(detail, file, "remove it first, or ask for it to be replaced"));
        }
    }
    let Some(directory) = state.control.include_dir().await else {
        let detail = "the configuration has no includedir, so there is no place for the file of an export";
        let remedy = "set includedir = DIRECTORY in [generic] and reload";
        return Err(Problem { remedy: Some(remedy.into()), ..problem(StatusCode::CONFLICT, detail) });
    };
    let file = directory.join(store::file_name(&config.name));
    if let Some(entry) = former.as_ref().filter(|entry| entry.source.file != file) {
        let (other, line) = (&entry.source.file, entry.source.line);
        let detail =
            format!("{}:{line} defines this export, and only {} could be replaced", other.display(), file.display());
        return Err(conflict(detail, other, "edit that file, or remove the export first"));
    }
    let (name, replace, to_write) = (config.name.clone(), wanted.replace, config.clone());
    let written =
        in_background(move || store::add(&directory, &to_write, replace).map_err(|e| store_problem(&e))).await?;
    let applied = state.control.file(written.clone()).await.ok_or_else(stopping)?;
    let now = state.registry.entry(&name);
    if now.is_some_and(|now| now.source.file == written && now.serves(&config)) {
        let outcome = if former.is_some() { AddOutcome::Replaced } else { AddOutcome::Created };
        return added(state, &name, outcome, &written).await;
    }
    if former.is_none() {
        // all or nothing: an export that was refused must not come up with the next reload
        let source = Source { file: written.clone(), line: 1 };
        let undone = in_background(move || store::remove(&name, &source).map_err(|e| store_problem(&e))).await;
        if let Err(e) = undone {
            warn!("{}: was refused and stays all the same: {}", written.display(), e.detail);
        }
        // it was not served, so that nothing changes but what is known of the file
        let _ = state.control.file(written.clone()).await;
    }
    let detail =
        applied.problems.first().cloned().unwrap_or_else(|| "the file was changed meanwhile; try again".into());
    let path = Some(written.display().to_string().into());
    Err(Problem { path, problems: applied.problems, ..problem(StatusCode::CONFLICT, detail) })
}

/// What is asked for, as the configuration would have it.
fn config(wanted: &AddExport) -> Result<ExportConfig, Problem> {
    let AddExport { name, path, format, readonly, keys, replace: _ } = wanted;
    let unusable = |detail: String| problem(StatusCode::UNPROCESSABLE_ENTITY, detail);
    if !path.starts_with('/') {
        let path = printable(path.as_bytes());
        return Err(unusable(format!("path = {path}: this path is not absolute; write one that begins with /")));
    }
    let own = ["exportname", "format", "readonly"];
    if let Some(key) = keys.keys().find(|key| own.contains(&key.as_str())) {
        return Err(unusable(format!(
            "keys.{key}: this key has a field of its own beside `keys`; use path, format, readonly"
        )));
    }
    let mut group = vec![("exportname".to_owned(), path.clone())];
    if path.contains('%') && !keys.contains_key("virtstyle") {
        // else a % makes it a template
        group.push(("virtstyle".to_owned(), "none".to_owned()));
    }
    group.extend(format.iter().map(|format| ("format".to_owned(), format.clone())));
    if *readonly {
        group.push(("readonly".to_owned(), "true".to_owned()));
    }
    group.extend(keys.iter().map(|(key, value)| (key.clone(), value.to_string())));
    serialize::from_keys(name, &group).map_err(|problems| {
        let detail = problems.first().cloned().unwrap_or_default();
        Problem { problems, ..unusable(detail) }
    })
}

async fn added(state: &State, name: &str, outcome: AddOutcome, file: &Path) -> Answer<Added> {
    let export = view(state, name).await?.and_then(|view| view.current).ok_or_else(|| not_there(name))?;
    let status = if outcome == AddOutcome::Created { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(Added { outcome, file: file.display().to_string(), export })))
}

/// Removes an export's file and the export. One that only drains is as good as removed.
pub(super) async fn remove(state: &State, name: &str, force: bool) -> Result<Removed, Problem> {
    let turn = state.changing.lock().await;
    look_for(state, name).await;
    let mut file = None;
    match state.registry.entry(name) {
        None if drains(state, name).is_empty() => return Err(not_there(name)),
        None => {}
        Some(entry) => {
            let source = entry.source.clone();
            let (owned, path) = (name.to_owned(), source.file.clone());
            in_background(move || store::remove(&owned, &source).map_err(|e| store_problem(&e))).await?;
            let applied = state.control.file(path.clone()).await.ok_or_else(stopping)?;
            if state.registry.get(name).is_some_and(|now| Arc::ptr_eq(&now, &entry.export)) {
                let why = applied.problems.first().cloned().unwrap_or_default();
                let detail = format!("its file is removed, but the export is still served: {why}");
                let path = Some(path.display().to_string().into());
                return Err(Problem { path, problems: applied.problems, ..problem(StatusCode::CONFLICT, detail) });
            }
            file = Some(path.display().to_string());
        }
    }
    drop(turn);
    let draining = drains(state, name);
    let connections: Vec<_> = draining.iter().flat_map(|export| export.connections()).collect();
    if force {
        connections.iter().for_each(|connection| connection.disconnect());
    }
    Ok(Removed {
        name: name.to_owned(),
        file,
        clients: connections.len(),
        drained: drains(state, name).is_empty(),
        failed_flushes: 0,
    })
}

pub(super) fn drains(state: &State, name: &str) -> Vec<Arc<Export>> {
    let mut draining = state.registry.draining();
    draining.retain(|export| export.config().name == name);
    draining
}

/// Takes hold of an export as a client would, and lets it go again.
pub(super) async fn probe(state: &State, export: Arc<Export>) -> Result<Probed, Problem> {
    let (done, answer) = oneshot::channel();
    let load = state.workers.pick();
    let worker = load.index();
    let job = move || {
        ring::spawn(async move {
            let probed = probe_here(&export).await;
            drop(load);
            // who asked may have gone
            let _ = done.send(probed);
        });
    };
    state.workers.run_on(worker, Box::new(job));
    answer.await.map_err(|_| stopping())
}

async fn probe_here(export: &Arc<Export>) -> Probed {
    match attach(export).await {
        Ok((size_bytes, writable)) => {
            Probed { connectable: true, reason: None, size_bytes: Some(size_bytes), writable: Some(writable) }
        }
        Err(e) => Probed { connectable: false, reason: Some(e.to_string()), size_bytes: None, writable: None },
    }
}

async fn attach(export: &Arc<Export>) -> Result<(u64, bool), AttachError> {
    let pid = i32::try_from(std::process::id()).unwrap_or(0);
    let peer = Peer::Unix { pid, uid: nix::unistd::geteuid().as_raw() };
    // whoever is just letting go is waited for; `now` does not mean the end of a long locktimeout
    let begun = Instant::now();
    let pause = async |time: Duration| {
        tokio::time::sleep(time.min(PROBE_PATIENCE)).await;
        begun.elapsed() < PROBE_PATIENCE
    };
    let client = export.attach(peer, pause).await?;
    let geometry = client.device().geometry();
    client.detach().await.run().await;
    Ok((geometry.size, !geometry.read_only))
}

/// Runs what blocks on a thread that may.
pub(super) async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let failed = |e| problem(StatusCode::INTERNAL_SERVER_ERROR, format!("the request ended early: {e}"));
    spawn_blocking(work).await.unwrap_or_else(|e| Err(failed(e)))
}

fn conflict(detail: String, path: &Path, remedy: &str) -> Problem {
    let (path, remedy) = (Some(path.display().to_string().into()), Some(remedy.into()));
    Problem { path, remedy, ..problem(StatusCode::CONFLICT, detail) }
}

pub(super) fn store_problem(error: &StoreError) -> Problem {
    let (status, path): (_, Option<&PathBuf>) = match error {
        StoreError::Unwritable(_) => (StatusCode::UNPROCESSABLE_ENTITY, None),
        StoreError::Exists(file) | StoreError::Changed(file) => (StatusCode::CONFLICT, Some(file)),
        StoreError::Shared { file, .. } | StoreError::NotDefined { file, .. } => (StatusCode::CONFLICT, Some(file)),
        StoreError::Busy(file) => (StatusCode::SERVICE_UNAVAILABLE, Some(file)),
        StoreError::Io { path, .. } => (StatusCode::INTERNAL_SERVER_ERROR, Some(path)),
    };
    Problem { path: path.map(|p| p.display().to_string().into()), ..problem(status, error.to_string()) }
}
