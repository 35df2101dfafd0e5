//! Connections to the control socket: who is let in, how many, and how long they may take.
//!
//! Promises: only root and the daemon's own user get more than a refusal; a client that sends slowly, sends too much or
//! sends nothing costs one place until its time is over, or until somebody else needs the place.

use super::State;
use super::routes::{self, refusal};
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::unistd::geteuid;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tower_service::Service;
use tracing::{debug, error, warn};

/// Connections at a time; as many may wait for exports to drain.
const MAX_CONNECTIONS: usize = 256;
/// How long a request's head may take to arrive, and a connection may stay without one.
const HEAD_LIMIT: Duration = Duration::from_secs(15);
/// How long a request's body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(15);
/// Largest body of a request: a name and a path of the greatest length, escaped, have room.
const MAX_BODY_BYTES: usize = 128 << 10;
/// Largest head of a request: a name of the greatest length has room, each of its bytes as three.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// Pause after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Accepts clients for as long as it is polled.
pub(super) async fn accept(listener: &UnixListener, state: &Arc<State>) {
    let router = routes::router(Arc::clone(state));
    let places = Arc::new(Places::default());
    let mut failing = false;
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                failing = false;
                match places.take() {
                    Some(place) => drop(tokio::spawn(serve(client, router.clone(), place))),
                    None => {
                        warn!("control socket: {MAX_CONNECTIONS} requests are under way, closing the newest client")
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(e) => {
                if !failing {
                    error!("control socket: cannot accept clients, will go on trying: {e}");
                    failing = true;
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(client: UnixStream, router: Router, place: Place) {
    let uid = client.peer_cred().map(|peer| peer.uid()).ok();
    let allowed = uid.is_some_and(|uid| uid == 0 || uid == geteuid().as_raw());
    if !allowed {
        warn!("control socket: refused user {uid:?}");
    }
    let answer = service_fn(|request: Request<Incoming>| {
        let (router, seat) = (router.clone(), Arc::clone(&place.seat));
        async move {
            let busy = Busy::begin(&seat);
            let response = match allowed {
                true => answer(request, router).await,
                false => refusal(StatusCode::FORBIDDEN, "only root and the daemon's own user may use this socket"),
            };
            drop(busy);
            Ok::<_, Infallible>(response)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).max_buf_size(MAX_HEAD_BYTES).keep_alive(allowed);
    let connection = http.serve_connection(TokioIo::new(client), answer);
    tokio::select! {
        ended = connection => if let Err(e) = ended {
            debug!("control socket: a client was lost: {e}");
        },
        () = place.seat.wanted.notified() => debug!("control socket: an idle client made room for another"),
    }
}

/// Has the router answer a request once it is there as a whole.
async fn answer(request: Request<Incoming>, mut router: Router) -> Response<Body> {
    let (head, body) = request.into_parts();
    let too_large = || {
        let why = format!("the body is larger than {MAX_BODY_BYTES} bytes");
        closing(refusal(StatusCode::PAYLOAD_TOO_LARGE, &why))
    };
    if body.size_hint().lower() > MAX_BODY_BYTES as u64 {
        return too_large();
    }
    let body = match timeout(BODY_LIMIT, Limited::new(body, MAX_BODY_BYTES).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) if e.is::<http_body_util::LengthLimitError>() => return too_large(),
        Ok(Err(e)) => return closing(refusal(StatusCode::BAD_REQUEST, &format!("the body cannot be read: {e}"))),
        Err(_) => return closing(refusal(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive")),
    };
    match router.call(Request::from_parts(head, Body::from(body))).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// What is left of a body that was not read is no request.
fn closing(mut response: Response<Body>) -> Response<Body> {
    response.headers_mut().insert("connection", axum::http::HeaderValue::from_static("close"));
    response
}

/// Who is connected, the oldest first.
#[derive(Default)]
struct Places(Mutex<VecDeque<Arc<Seat>>>);

/// One connection as others see it.
#[derive(Default)]
struct Seat {
    /// Requests that are being answered.
    busy: AtomicUsize,
    /// Somebody else needs the place.
    wanted: Notify,
}

/// A place that is taken. Dropping it makes it free.
struct Place {
    places: Arc<Places>,
    seat: Arc<Seat>,
}

impl Places {
    /// A place: a free one, or that of the client that has been idle and connected for longest. `None`: all are busy.
    fn take(self: &Arc<Self>) -> Option<Place> {
        let mut seats = self.seats();
        if seats.len() >= MAX_CONNECTIONS {
            let idle = seats.iter().position(|seat| seat.busy.load(Ordering::Relaxed) == 0)?;
            seats.remove(idle)?.wanted.notify_one();
        }
        let seat = Arc::new(Seat::default());
        seats.push_back(Arc::clone(&seat));
        drop(seats);
        Some(Place { places: Arc::clone(self), seat })
    }

    fn seats(&self) -> MutexGuard<'_, VecDeque<Arc<Seat>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.seats().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
    }
}

/// A request that is being answered.
struct Busy<'a>(&'a Seat);

impl Busy<'_> {
    fn begin(seat: &Seat) -> Busy<'_> {
        seat.busy.fetch_add(1, Ordering::Relaxed);
        Busy(seat)
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::Relaxed);
    }
}
