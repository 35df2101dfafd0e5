//! One NBD client from greeting to goodbye, on the thread of its worker.
//!
//! Whatever the client does (vanish, stall, send garbage) ends its own connection only. Requests received whole are
//! completed, and then its hold on the export is given up with `Client::detach`, which flushes the image when the last
//! writer leaves. No panic in between skips that: the parts that talk to the client are run apart from it.

use super::admission::Place;
use super::budget::Budget;
use super::gauge::Gauge;
use super::negotiate::{NoDeal, negotiate};
use super::out::{Out, write_replies};
use super::pace::Pace;
use super::receive::{End, Reader};
use super::session::Session;
use super::turn_away;
use crate::block::{BlockDev, Context as MetaContext};
use crate::export::control;
use crate::export::limit_keys::LiveLimits;
use crate::export::registry::Registry;
use crate::export::service::Client;
use crate::export::tls;
use crate::export::usage::Connection;
use crate::nbd::handshake::Agreed;
use crate::ring::{self, Peer, Stream};
use futures_util::FutureExt;
use std::future::Future;
use std::net::Shutdown;
use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, error, info, warn};

/// How long replies may wait for a client that takes none of them, once no more requests are read.
const STALL_LIMIT: Duration = Duration::from_secs(10);
/// How often an idle connection is looked at within its `idletimeout`.
const IDLE_LOOKS: u32 = 8;
/// How long the last replies get to arrive before the connection is reset by requests that were not read.
const LINGER: Duration = Duration::from_secs(1);
/// Bytes of unread requests forgotten with one call meanwhile.
const LINGER_BYTES: usize = 4096;

/// What every connection needs to know.
pub struct Context {
    /// The exports.
    pub registry: Arc<Registry>,
    /// The control thread, which may find more of them.
    pub control: control::Handle,
    /// Whether clients may list them.
    pub list_allowed: Arc<AtomicBool>,
    /// What clients may take.
    pub limits: Arc<LiveLimits>,
    /// The memory for their payload.
    pub budget: Arc<Budget>,
    /// How they are encrypted.
    pub tls: Arc<tls::Current>,
}

/// Serves one client. Ends when the client has gone or `shutdown` turned true, and everything it started is over.
///
/// Runs on a worker: inside `ring::spawn` or `ring::run`.
pub(super) async fn serve(stream: Stream, context: Arc<Context>, place: &Place, mut shutdown: watch::Receiver<bool>) {
    let peer = stream.peer();
    // A daemon that dropped its side of the channel is going away too.
    let mut stop = pin!(async move { drop(shutdown.wait_for(|&stop| stop).await) });
    let mut held = None;
    // Boxed: its memory is not needed any more while the connection lasts.
    let deal = {
        let leave = async {
            tokio::select! {
                () = stop.as_mut() => NoDeal::Shutdown,
                () = place.wanted() => NoDeal::Crowded,
            }
        };
        let talk: Pin<Box<dyn Future<Output = _>>> =
            Box::pin(async { negotiate(&stream, &context, place, &mut held, pin!(leave)).await });
        AssertUnwindSafe(talk).catch_unwind().await
    };
    match (deal, held.take()) {
        (Ok(Ok((agreed, rest))), Some(client)) => {
            place.settle();
            transmit(stream, peer, &context, client, agreed, &rest, stop).await;
        }
        (deal, client) => {
            match deal {
                Ok(Ok(_)) => error!(%peer, "handshake ended without an export"),
                Ok(Err(NoDeal::Tls(e))) => {
                    warn!(%peer, reason = %e, "TLS handshake failed");
                    // what is wrong has been said, and is to arrive
                    linger(&stream).await;
                }
                Ok(Err(reason @ NoDeal::Violation(_))) => warn!(%peer, %reason, "client broke the protocol"),
                Ok(Err(reason)) => debug!(%peer, %reason, "no transmission phase"),
                Err(_) => error!(%peer, "handshake panicked"),
            }
            // an error means that the client closed first
            let _ = stream.shutdown(Shutdown::Write);
            if let Some(client) = client {
                let farewell = Box::pin(client.detach()).await;
                // to the client, which is to wait for nothing of ours
                drop(stream);
                Box::pin(farewell.run()).await;
            }
        }
    }
}

/// The transmission phase, and the end of the connection.
async fn transmit(
    stream: Stream,
    peer: Peer,
    context: &Context,
    client: Client,
    agreed: Agreed,
    rest: &[u8],
    stop: Pin<&mut dyn Future<Output = ()>>,
) {
    let export = agreed.name.clone();
    match &client.connection().tls {
        Some(tls) => info!(%peer, %export, %tls, "client connected"),
        None => info!(%peer, %export, "client connected"),
    }
    let stream = Rc::new(stream);
    let connection = Arc::clone(client.connection());
    let gauge = Rc::new(Gauge::new(&context.budget, Arc::clone(&connection)));
    let pace = Rc::new(Pace::new(client.export().limiter(), &connection));
    let out = Rc::new(Out::new(Rc::clone(&stream), Rc::clone(&gauge)));
    ring::spawn(write_replies(Rc::clone(&out)));
    let contexts = Box::pin(contexts(&client, &agreed)).await;
    let replies = agreed.replies;
    let session = Rc::new(Session {
        stream: Rc::clone(&stream),
        export: Arc::clone(client.export()),
        device: Rc::clone(client.device()),
        geometry: client.device().geometry(),
        agreed,
        contexts,
        out,
        gauge: Rc::clone(&gauge),
        pace: Rc::clone(&pace),
        connection: Arc::clone(&connection),
    });
    let idle_timeout = client.export().limiter().limits().idle_timeout;
    let idle_timeout = idle_timeout.unwrap_or_else(|| context.limits.get().idle_timeout);
    let mut stop = pin!(async {
        tokio::select! {
            () = stop => End::Shutdown,
            () = connection.disconnected() => if gauge.account().is_cut() { End::Stalled } else { End::Ended },
            () = idle(&gauge, &pace, &connection, idle_timeout), if !idle_timeout.is_zero() => End::Idle,
        }
    });

    let reader = Reader::new(&session, rest, stop.as_mut()).run();
    let (end, rest) = AssertUnwindSafe(reader).catch_unwind().await.unwrap_or((End::Panicked, None));
    session.out.attend(false);
    if let End::Violation(violation) = &end {
        warn!(%peer, %export, reason = %violation, "client broke the protocol");
    }
    if let End::Stalled = &end {
        warn!(%peer, %export, reason = %end, "client is disconnected");
        session.out.fail();
    }
    let is_stopped = matches!(end, End::Shutdown | End::Ended | End::Idle | End::Stalled);
    // boxed, here and below: an idle connection does not keep room for its end
    Box::pin(drain(&session, (!is_stopped).then_some(stop))).await;
    let deaf = session.out.has_failed();
    let totals = connection.totals();
    let (bytes_read, bytes_written) = (totals.read.bytes, totals.write.bytes);

    // The image first, then courtesy to the client. Nothing of ours may hold the image when `detach` returns: with
    // everything drained this is the last reference to the session.
    drop(session);
    let farewell = Box::pin(client.detach()).await;
    if let (End::Shutdown, Some(rest), false) = (&end, rest, deaf) {
        Box::pin(turn_away::requests(&stream, replies, rest)).await;
    }
    if matches!(end, End::Shutdown | End::Ended | End::Idle | End::Violation(_)) && !deaf {
        Box::pin(linger(&stream)).await;
    }
    // an error means that the client closed first
    let _ = stream.shutdown(Shutdown::Both);
    info!(%peer, %export, bytes_read, bytes_written, reason = %end, "client left");
    drop(stream);
    Box::pin(farewell.run()).await;
}

/// What the selected contexts are on the export that the client has got.
async fn contexts(client: &Client, agreed: &Agreed) -> Vec<Option<MetaContext>> {
    if agreed.contexts.is_empty() {
        return Vec::new();
    }
    let offered = client.device().contexts().await;
    let named = |name: &str| offered.iter().find(|c| c.name == name).map(|c| c.context.clone());
    agreed.contexts.iter().map(|selected| named(&selected.name)).collect()
}

/// Completes when a client that has nothing in flight has sent no request for `limit`, or a little longer.
async fn idle(gauge: &Gauge, pace: &Pace, connection: &Connection, limit: Duration) {
    // looking now and then costs less than noting the time of each request
    let pause = limit / IDLE_LOOKS;
    let (mut seen, mut quiet) = (connection.begun(), 0);
    while quiet < IDLE_LOOKS {
        tokio::time::sleep(pause).await;
        let begun = connection.begun();
        quiet = if begun == seen && gauge.is_idle() && pace.is_idle() { quiet + 1 } else { 0 };
        seen = begun;
    }
}

/// Completes what is in flight and sends the replies, to a client that takes them. When `stop` becomes ready, or has
/// been (`None`), what the export's limits hold back is given up.
async fn drain(session: &Session, stop: Option<Pin<&mut dyn Future<Output = End>>>) {
    session.out.flush();
    if session.stream.is_gone() {
        session.out.fail();
    }
    let mut all = pin!(async {
        let mut before = session.out.progress();
        while timeout(STALL_LIMIT, session.gauge.idle()).await.is_err() {
            let (queued, sent) = session.out.progress();
            if queued > 0 && before.0 > 0 && sent == before.1 || session.stream.is_gone() {
                session.out.fail();
            }
            before = (queued, sent);
        }
    });
    if let Some(stop) = stop {
        tokio::select! {
            () = &mut all => return session.out.close(),
            _ = stop => {}
        }
    }
    session.pace.give_up();
    all.await;
    session.out.close();
}

/// Says that nothing more will come, and waits a moment for the client to hear it. Closing a TCP socket with unread
/// bytes resets the connection, and the client may lose replies that are still on their way.
async fn linger(stream: &Stream) {
    let _ = stream.shutdown(Shutdown::Write);
    let mut forget = vec![0; LINGER_BYTES];
    let gone = async {
        loop {
            match stream.try_forget(&mut forget) {
                Ok(0) => return,
                Ok(_) => ring::yield_now().await,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    if stream.readable().await.is_err() {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    };
    // Running out of time is the other way to end.
    drop(timeout(LINGER, gone).await);
}
