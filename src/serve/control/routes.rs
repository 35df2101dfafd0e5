//! What can be asked over the control socket. Each route is described where it is written; `docs/openapi.json` is made
//! of these descriptions.

use super::State;
use super::change;
use super::job;
use super::wire::{
    AddExport, Added, BeginBackup, EndParams, Ending, ExportList, ExportView, Health, ListParams, Probed, Problem,
    ReloadRequest, RemoveParams, Removed, ResizeExport, ResizedExport, Resumed,
};
use crate::export::control::Outcome;
use crate::export::problem::printable;
use crate::export::status::{self, ExportStatus, rfc3339};
use crate::image::resize::NewSize;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query};
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What a route gets.
type Shared = axum::extract::State<Arc<State>>;
/// What a route answers: a value as JSON with its status, or a problem.
pub(super) type Answer<T> = Result<(StatusCode, Json<T>), Problem>;
/// The name in a path.
type Name = Result<Path<String>, PathRejection>;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "cowgate control API",
        description = "HTTP and JSON on a Unix socket (`controlsock` in `[generic]`, /run/cowgate/control.sock by \
                       default), for root and the daemon's own user. Whatever is not carried out is answered with a \
                       problem as RFC 9457 has it."
    ),
    servers((url = "http://localhost")),
    tags((name = "exports"), (name = "backups"), (name = "daemon"))
)]
struct Description;

fn described() -> OpenApiRouter<Arc<State>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(health))
        .routes(routes!(list, add))
        .routes(routes!(show, remove))
        .routes(routes!(probe))
        .routes(routes!(resize))
        .routes(routes!(begin_backup))
        .routes(routes!(end_backup))
        .routes(routes!(resume_backup))
        .routes(routes!(reload))
}

/// The description of all routes, as the text of an OpenAPI document.
pub(super) fn description() -> String {
    let (_, description) = described().split_for_parts();
    let text = description.to_pretty_json().unwrap_or_default(); // strings and numbers: nothing in it can fail
    text + "\n"
}

/// All routes.
pub(super) fn router(state: Arc<State>) -> Router {
    let (router, _) = described().split_for_parts();
    let unknown =
        || async { refusal(StatusCode::NOT_FOUND, "there is no such route; docs/openapi.json lists those there are") };
    let method = || async { refusal(StatusCode::METHOD_NOT_ALLOWED, "this route does not know this method") };
    router.fallback(unknown).method_not_allowed_fallback(method).with_state(state)
}

/// How the daemon is
#[utoipa::path(get, path = "/v1/health", tag = "daemon", responses((status = 200, body = Health)))]
async fn health(axum::extract::State(state): Shared) -> Json<Health> {
    let (generation, exports) = state.registry.generation();
    let draining = state.registry.draining();
    let entries = state.registry.entries();
    let all = entries.iter().map(|entry| &entry.export).chain(&draining);
    Json(Health {
        status: if state.stopping.load(Ordering::Relaxed) { "stopping" } else { "ok" }.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        since: rfc3339(state.since),
        generation,
        exports,
        draining: draining.len(),
        clients: all.map(|export| export.connections().len()).sum(),
        failed_flushes: state.registry.failed_flushes(),
        listening: state.listening.clone(),
    })
}

/// All exports
///
/// Sizes and chains are those of images that a client has open; with `details` of all images.
#[utoipa::path(
    get, path = "/v1/exports", tag = "exports", params(ListParams),
    responses((status = 200, body = ExportList), (status = 400, body = Problem, content_type = "application/problem+json")),
)]
async fn list(
    axum::extract::State(state): Shared,
    params: Result<Query<ListParams>, QueryRejection>,
) -> Answer<ExportList> {
    let details = query(params)?.details;
    let turn = match details {
        true => Some(state.examining.lock().await),
        false => None,
    };
    let (generation, _) = state.registry.generation();
    let exports = examined(&state, None, details).await?;
    drop(turn);
    Ok((StatusCode::OK, Json(ExportList { generation, exports })))
}

/// One export
///
/// An export that is not served is looked for in the configuration first, as for a client that asks for it.
#[utoipa::path(
    get, path = "/v1/exports/{name}", tag = "exports", params(("name" = String, Path, description = "The export's name, percent-encoded")),
    responses((status = 200, body = ExportView), (status = 404, body = Problem, content_type = "application/problem+json")),
)]
async fn show(axum::extract::State(state): Shared, name: Name) -> Answer<ExportView> {
    let name = named(name)?;
    look_for(&state, &name).await;
    Ok((StatusCode::OK, Json(view(&state, &name).await?.ok_or_else(|| not_there(&name))?)))
}

/// Adds an export
///
/// Writes its file into `includedir` and answers when new clients get it. Asking for what is served already is no error.
/// What another file of the configuration says does not matter.
#[utoipa::path(
    post, path = "/v1/exports", tag = "exports", request_body = AddExport,
    responses(
        (status = 200, description = "It is served just so already, or has replaced another definition", body = Added),
        (status = 201, description = "It is new", body = Added),
        (status = 400, description = "The request is not understood", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The name is taken, or there is no `includedir`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "It cannot be served like that", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "Its file cannot be written", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The daemon is stopping, or others are writing", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn add(axum::extract::State(state): Shared, body: Bytes) -> Answer<Added> {
    let wanted = json::<AddExport>(&body)?;
    // on its own: a client that leaves does not stop it half way
    finish(tokio::spawn(async move { change::add(&state, &wanted).await })).await
}

/// Removes an export
///
/// Its file is removed, and new clients do not get it any more. Those it has stay until they leave, unless `force`.
#[utoipa::path(
    delete, path = "/v1/exports/{name}", tag = "exports",
    params(("name" = String, Path, description = "The export's name, percent-encoded"), RemoveParams),
    responses(
        (status = 200, body = Removed),
        (status = 400, description = "The request is not understood", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such export", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Its file defines more than this export", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "Its file cannot be removed", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The daemon is stopping", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn remove(
    axum::extract::State(state): Shared,
    name: Name,
    params: Result<Query<RemoveParams>, QueryRejection>,
) -> Answer<Removed> {
    let (name, params) = (named(name)?, query(params)?);
    let failed_before = state.registry.failed_flushes();
    let removing = (Arc::clone(&state), name.clone());
    let removing = async move { change::remove(&removing.0, &removing.1, params.force).await };
    let mut removed = finish(tokio::spawn(removing)).await?;
    if params.wait {
        state.registry.drained(&name).await;
        removed.drained = true;
    }
    removed.failed_flushes = state.registry.failed_flushes() - failed_before;
    Ok((StatusCode::OK, Json(removed)))
}

/// Tries whether a client could connect
///
/// Attaches to the export on a worker and detaches again, as a client would.
#[utoipa::path(
    post, path = "/v1/exports/{name}/probe", tag = "exports", params(("name" = String, Path, description = "The export's name, percent-encoded")),
    responses((status = 200, body = Probed), (status = 404, body = Problem, content_type = "application/problem+json")),
)]
async fn probe(axum::extract::State(state): Shared, name: Name) -> Answer<Probed> {
    let name = named(name)?;
    look_for(&state, &name).await;
    let export = state.registry.get(&name).ok_or_else(|| not_there(&name))?;
    Ok((StatusCode::OK, Json(change::probe(&state, export).await?)))
}

/// Gives an export's block device another size
///
/// Its disk is resized before if a size is given. Who uses the device waits meanwhile.
#[utoipa::path(
    post, path = "/v1/exports/{name}/resize", tag = "exports", request_body = Option<ResizeExport>,
    params(("name" = String, Path, description = "The export's name, percent-encoded")),
    responses(
        (status = 200, body = ResizedExport),
        (status = 400, description = "The request is not understood", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such export", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It cannot be resized now", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The daemon is stopping", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn resize(axum::extract::State(state): Shared, name: Name, body: Bytes) -> Answer<ResizedExport> {
    let name = named(name)?;
    let wanted = if body.is_empty() { ResizeExport::default() } else { json(&body)? };
    let size = match (wanted.size_bytes, wanted.more_bytes) {
        (None, None) => None,
        (Some(size), None) => Some(NewSize::Exactly(size)),
        (None, Some(more)) => Some(NewSize::More(more)),
        (Some(_), Some(_)) => return Err(problem(StatusCode::BAD_REQUEST, "give size_bytes or more_bytes, not both")),
    };
    state.registry.get(&name).ok_or_else(|| not_there(&name))?;
    let resized = state.control.resize(name.clone(), size).await.ok_or_else(stopping)?;
    let size_bytes = resized.map_err(|why| {
        let name = printable(name.as_bytes());
        problem(StatusCode::CONFLICT, format!("export {name:?} cannot be resized: {why}"))
    })?;
    Ok((StatusCode::OK, Json(ResizedExport { name, size_bytes })))
}

/// Begins a backup job
///
/// Adds the export of a job, named by its parts. Asking again without a time is answered with the export that is there.
#[utoipa::path(
    post, path = "/v1/backups", tag = "backups", request_body = BeginBackup,
    responses(
        (status = 200, description = "It is served already", body = Added),
        (status = 201, description = "It is new", body = Added),
        (status = 400, description = "The request is not understood", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "It was to be found, and is not there", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The image belongs to another export or is being ended, or there is no `includedir`", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "It cannot be served like that", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "Its file cannot be written", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The daemon is stopping, or others are writing", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn begin_backup(axum::extract::State(state): Shared, body: Bytes) -> Answer<Added> {
    let wanted = json::<BeginBackup>(&body)?;
    finish(tokio::spawn(async move { job::begin(&state, &wanted).await })).await
}

/// Ends a backup job
///
/// Its export takes no new clients any more; its file becomes a record that is not loaded. To be asked again until it is
/// drained; whoever then has examined the image removes the record.
#[utoipa::path(
    delete, path = "/v1/backups/{name}", tag = "backups",
    params(("name" = String, Path, description = "The export's name, percent-encoded"), EndParams),
    responses(
        (status = 200, body = Ending),
        (status = 400, description = "The request is not understood", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is neither an export nor a record of it", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Its file defines more than this export", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "Its file cannot be put aside", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The daemon is stopping", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn end_backup(
    axum::extract::State(state): Shared,
    name: Name,
    params: Result<Query<EndParams>, QueryRejection>,
) -> Answer<Ending> {
    let (name, params) = (named(name)?, query(params)?);
    finish(tokio::spawn(async move { job::end(&state, &name, params).await })).await
}

/// Lets a backup job go on
///
/// Undoes the beginning of its end: the record is the export's file again, and clients that have stayed go on.
#[utoipa::path(
    post, path = "/v1/backups/{name}/resume", tag = "backups", params(("name" = String, Path, description = "The export's name, percent-encoded")),
    responses(
        (status = 200, body = Resumed),
        (status = 404, description = "It is not being ended", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Another export has its name", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn resume_backup(axum::extract::State(state): Shared, name: Name) -> Answer<Resumed> {
    let name = named(name)?;
    finish(tokio::spawn(async move { job::resume(&state, &name).await })).await
}

/// Reads the configuration again
///
/// As SIGHUP does. The problems are an answer, not a failed request: everything else has taken effect.
#[utoipa::path(
    post, path = "/v1/reload", tag = "daemon", request_body = Option<ReloadRequest>,
    responses(
        (status = 200, body = Outcome),
        (status = 503, description = "The daemon is stopping", body = Problem, content_type = "application/problem+json"),
    ),
)]
async fn reload(axum::extract::State(state): Shared, body: Bytes) -> Answer<Outcome> {
    let wanted = if body.is_empty() { ReloadRequest::default() } else { json(&body)? };
    let outcome = state.control.reload(wanted.wait).await.ok_or_else(stopping)?;
    Ok((StatusCode::OK, Json(outcome)))
}

/// All definitions of a name, examined.
pub(super) async fn view(state: &State, name: &str) -> Result<Option<ExportView>, Problem> {
    let mut all = examined(state, Some(name.to_owned()), true).await?;
    let current = all.iter().position(|e| e.state != status::State::Draining).map(|at| all.remove(at));
    let is_there = current.is_some() || !all.is_empty();
    Ok(is_there.then_some(ExportView { current, draining: all }))
}

/// Looks for an export that is not served, as for a client that asks for it.
pub(super) async fn look_for(state: &State, name: &str) {
    if state.registry.get(name).is_none() {
        state.control.missing(name).await;
    }
}

/// On a thread that may block: there may be many exports, and their files may be far away.
async fn examined(state: &State, name: Option<String>, closed: bool) -> Result<Vec<ExportStatus>, Problem> {
    let registry = Arc::clone(&state.registry);
    let examine = move || status::examine(status::snapshots(&registry, name.as_deref()), closed);
    let failed = |e| problem(StatusCode::INTERNAL_SERVER_ERROR, format!("images cannot be examined: {e}"));
    tokio::task::spawn_blocking(examine).await.map_err(failed)
}

/// The answer of a task that goes on when nobody waits for it.
async fn finish<T>(task: tokio::task::JoinHandle<Result<T, Problem>>) -> Result<T, Problem> {
    let failed = |e| problem(StatusCode::INTERNAL_SERVER_ERROR, format!("the request ended early: {e}"));
    task.await.unwrap_or_else(|e| Err(failed(e)))
}

fn named(name: Name) -> Result<String, Problem> {
    name.map(|Path(name)| name).map_err(|e| problem(StatusCode::BAD_REQUEST, e.body_text()))
}

fn query<T>(params: Result<Query<T>, QueryRejection>) -> Result<T, Problem> {
    params.map(|Query(params)| params).map_err(|e| problem(StatusCode::BAD_REQUEST, e.body_text()))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let wrong = |e| problem(StatusCode::BAD_REQUEST, format!("the body is not the JSON that is expected here: {e}"));
    serde_json::from_slice(body).map_err(wrong)
}

/// A problem with nothing but words.
pub(super) fn problem(status: StatusCode, detail: impl Into<String>) -> Problem {
    let title = status.canonical_reason().unwrap_or("Problem").to_owned();
    Problem { status: status.as_u16(), title, detail: detail.into(), ..Problem::default() }
}

pub(super) fn not_there(name: &str) -> Problem {
    let name = printable(name.as_bytes());
    Problem {
        remedy: Some("`cowgate export list` shows those there are".into()),
        ..problem(StatusCode::NOT_FOUND, format!("there is no export {name:?}"))
    }
}

pub(super) fn stopping() -> Problem {
    problem(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping")
}

/// A problem as a whole answer.
pub(super) fn refusal(status: StatusCode, detail: &str) -> Response<Body> {
    problem(status, detail).into_response()
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response<Body> {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

/// A value as JSON.
pub(super) struct Json<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response<Body> {
        match serde_json::to_vec(&self.0) {
            Ok(text) => {
                let kind = HeaderValue::from_static("application/json");
                let mut response = Response::new(Body::from(text));
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
        }
    }
}
