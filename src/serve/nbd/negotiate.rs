//! Drives the handshake: moves its bytes and answers what it asks from the registry.

use super::admission::Place;
use super::conn::Context;
use super::turn_away;
use crate::block::{BlockDev, Geometry};
use crate::export::config::ExportConfig;
use crate::export::service::{AttachError, Client, Export};
use crate::export::tls::{self, Barred, Encrypted, Offer};
use crate::export::tls_keys::TlsMode;
use crate::export::usage::Guest;
use crate::nbd::handshake::{Agreed, Closing, ExportInfo, Handshake, Listed, Purpose, Refusal, Step, Tls, Violation};
use crate::nbd::{
    BASE_ALLOCATION, NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY, NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
};
use crate::ring::Stream;
use crate::ring::tls as secure;
use bytes::BytesMut;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tracing::warn;

/// Exports listed with one call.
const LIST_PORTION: usize = 64;
/// Bytes received with one call.
const RECEIVE_BYTES: usize = 4096;

/// Why a connection ends without transmission phase.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoDeal {
    #[error("client ended the negotiation")]
    Aborted,
    #[error("client closed the connection during the handshake")]
    Closed,
    #[error("handshake took longer than `handshaketimeout` allows")]
    Slow,
    #[error("others need the place")]
    Crowded,
    #[error("server is shutting down")]
    Shutdown,
    #[error("export refused: {0}")]
    Refused(String),
    #[error("protocol violation: {0}")]
    Violation(Violation),
    #[error("TLS handshake failed: {0}")]
    Tls(io::Error),
    #[error("connection failed: {0}")]
    Failed(#[from] io::Error),
}

/// Negotiates until the transmission phase: returns what was agreed, and bytes received beyond the handshake.
///
/// On success `held` is the client's hold on the agreed export; whenever it is set, the caller detaches it.
pub(super) async fn negotiate(
    stream: &Stream,
    context: &Context,
    place: &Place,
    held: &mut Option<Client>,
    stop: Pin<&mut dyn Future<Output = NoDeal>>,
) -> Result<(Agreed, BytesMut), NoDeal> {
    // the same for the whole connection, as the specification wants it
    let offer = context.tls.get();
    let mut guest = Guest::from(stream.peer());
    let mut handshake = Handshake::with_tls(offered(&offer));
    // what is left of it counts, so that no client can make it last by a byte at a time
    let patience = context.limits.get().handshake_timeout;
    let mut wire = Wire { stream, stop, patience, buf: vec![0; RECEIVE_BYTES], ended: None };
    loop {
        let step = handshake.step();
        wire.send(&handshake.take_output()).await?;
        match step {
            Step::Read => match wire.receive().await {
                Ok(bytes) => handshake.feed(bytes),
                Err(end @ NoDeal::Shutdown) => {
                    turn_away::during_handshake(stream, &mut handshake).await;
                    return Err(end);
                }
                Err(end) => return Err(end),
            },
            Step::Export { name, purpose: Purpose::Info } => handshake.export(describe(context, &guest, name).await),
            Step::Export { name, purpose: Purpose::Go } => {
                // from here on it waits for us
                place.settle();
                let opened = open(context, held, &mut wire, &guest, name).await;
                if let Some(end) = wire.ended.take() {
                    return Err(end);
                }
                if opened.is_err() {
                    place.unsettle();
                }
                handshake.export(opened);
            }
            Step::Contexts { name, beyond_base } => {
                handshake.contexts(contexts(context, &guest, &name, beyond_base).await);
            }
            Step::List if context.list_allowed.load(Ordering::Relaxed) => {
                list(context, &guest, &mut wire, &mut handshake).await?;
                handshake.list(Ok(()));
            }
            Step::List => handshake.list(Err(Refusal::Policy("listing exports is turned off on this server".into()))),
            Step::StartTls => {
                guest.tls = Some(Arc::new(wire.start_tls(&offer).await?));
                handshake.tls_started();
            }
            Step::Transmission(agreed) => return Ok((agreed, handshake.into_rest())),
            Step::Close(Closing::Aborted) => return Err(NoDeal::Aborted),
            Step::Close(Closing::Refused(refusal)) => return Err(NoDeal::Refused(words(refusal))),
            Step::Close(Closing::Violation(violation)) => return Err(NoDeal::Violation(violation)),
        }
    }
}

/// The socket during the handshake, with the client's share of patience.
struct Wire<'a> {
    stream: &'a Stream,
    /// Ready when the handshake is to end, with the reason.
    stop: Pin<&'a mut dyn Future<Output = NoDeal>>,
    patience: Duration,
    buf: Vec<u8>,
    /// What ended the handshake while the client waited for its export.
    ended: Option<NoDeal>,
}

impl Wire<'_> {
    async fn receive(&mut self) -> Result<&[u8], NoDeal> {
        loop {
            match self.stream.try_read(&mut self.buf) {
                Ok(0) => return Err(NoDeal::Closed),
                Ok(n) => return Ok(&self.buf[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(self.stream.readable()).await?,
                Err(e) => return Err(e.into()),
            }
        }
    }

    async fn send(&mut self, mut bytes: &[u8]) -> Result<(), NoDeal> {
        while !bytes.is_empty() {
            match self.stream.try_write_vectored(&[IoSlice::new(bytes)]) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.wait(self.stream.writable()).await?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Encrypts the connection. Waiting for the client here takes of the same patience.
    async fn start_tls(&mut self, offer: &Offer) -> Result<Encrypted, NoDeal> {
        let acceptor = offer.acceptor.as_ref().ok_or_else(|| NoDeal::Tls(io::Error::other("there is none")))?;
        self.stream.start_tls(acceptor).map_err(NoDeal::Tls)?;
        loop {
            match self.stream.try_handshake().map_err(NoDeal::Tls)? {
                secure::Handshake::Done => break,
                secure::Handshake::Read => self.wait(self.stream.readable()).await?,
                secure::Handshake::Write => self.wait(self.stream.writable()).await?,
            }
        }
        let secured = self.stream.secured().ok_or_else(|| NoDeal::Tls(io::Error::other("it has no result")))?;
        Ok(Encrypted::new(secured))
    }

    /// Lets time pass while the client waits for its export. `false`: it waits no longer, or we do not.
    async fn pause(&mut self, time: Duration) -> bool {
        self.ended = tokio::select! {
            biased;
            end = &mut self.stop => Some(end),
            () = tokio::time::sleep(time) => self.stream.hung_up().then_some(NoDeal::Closed),
        };
        self.ended.is_none()
    }

    /// Waits for the client. Only this is timed: opening an image may take longer, and is never given up halfway.
    async fn wait(&mut self, ready: impl Future<Output = io::Result<()>>) -> Result<(), NoDeal> {
        let start = Instant::now();
        let outcome = tokio::select! {
            biased;
            end = &mut self.stop => Err(end),
            ready = tokio::time::timeout(self.patience, ready) => match ready {
                Ok(ready) => ready.map_err(NoDeal::from),
                Err(_) => Err(NoDeal::Slow),
            },
        };
        self.patience = self.patience.saturating_sub(start.elapsed());
        outcome
    }
}

/// What the handshake is to say of TLS.
fn offered(offer: &Offer) -> Tls {
    match (&offer.acceptor, offer.mode) {
        (None, _) | (_, TlsMode::Off) => Tls::Off,
        (Some(_), TlsMode::On) => Tls::Offered,
        (Some(_), TlsMode::Required) => Tls::Required,
    }
}

/// The names of the contexts an export offers. Its image is only looked at when it matters: the clients that ask for
/// `base:allocation`, which every export has, are to disturb nobody.
async fn contexts(context: &Context, guest: &Guest, name: &str, beyond_base: bool) -> Result<Vec<String>, Refusal> {
    let export = find(context, guest, name).await?;
    if !beyond_base {
        return Ok(vec![BASE_ALLOCATION.to_owned()]);
    }
    let offered = export.contexts(guest.peer).await.map_err(|e| refused(&e))?;
    Ok(offered.into_iter().map(|context| context.name).collect())
}

/// Lists the exports that this client may use, as far as TLS decides that. A client that takes no replies keeps a portion of
/// the list in memory, not all of it.
async fn list(context: &Context, guest: &Guest, wire: &mut Wire<'_>, handshake: &mut Handshake) -> Result<(), NoDeal> {
    let mut last: Option<String> = None;
    loop {
        let exports = context.registry.after(last.as_deref(), LIST_PORTION);
        let Some(end) = exports.last() else { return Ok(()) };
        last = Some(end.config().name.clone());
        let mine = exports.iter().map(|export| export.config());
        let mine = mine.filter(|config| tls::admit(&config.tls, guest.tls.as_deref()).is_ok());
        handshake.listed(mine.map(|c| Listed { name: c.name.clone(), description: c.description.clone() }));
        wire.send(&handshake.take_output()).await?;
    }
}

/// The export of this name, if it is for this client. One that is not there yet is looked for in the configuration before
/// the client is refused, so that a file can be written and its export asked for at once.
async fn find(context: &Context, guest: &Guest, name: &str) -> Result<Arc<Export>, Refusal> {
    let export = match context.registry.get(name) {
        Some(export) => export,
        None => {
            context.control.missing(name).await;
            let unknown = || Refusal::Unknown(format!("no export named {name:?} on this server"));
            context.registry.get(name).ok_or_else(unknown)?
        }
    };
    match tls::admit(&export.config().tls, guest.tls.as_deref()) {
        Ok(()) => Ok(export),
        Err(Barred::Plain) => Err(Refusal::TlsRequired),
        Err(Barred::Encrypted) => Err(Refusal::Policy(format!("export {name:?} is served without TLS only"))),
        Err(Barred::Subject) => {
            let identity = guest.tls.as_ref().and_then(|tls| tls.identity.as_ref());
            let who = identity.map_or("a client without certificate".to_owned(), ToString::to_string);
            warn!(peer = %guest.peer, "export {name:?}: {who} is not admitted; its `tlsallow` names others");
            Err(Refusal::Policy(format!("export {name:?} is not for {who}; its `tlsallow` names others")))
        }
    }
}

/// Describes an export without taking hold of it: who only asks disturbs nobody, and a listing of all exports works
/// while some of them are in use elsewhere.
async fn describe(context: &Context, guest: &Guest, name: String) -> Result<ExportInfo, Refusal> {
    let export = find(context, guest, &name).await?;
    let geometry = export.describe(guest.peer).await.map_err(|e| refused(&e))?;
    Ok(info(export.config(), geometry))
}

/// Takes hold of the export.
async fn open(
    context: &Context,
    held: &mut Option<Client>,
    wire: &mut Wire<'_>,
    guest: &Guest,
    name: String,
) -> Result<ExportInfo, Refusal> {
    let attached = loop {
        match find(context, guest, &name).await?.attach(guest.clone(), async |time| wire.pause(time).await).await {
            // a reload came between the two steps
            Err(AttachError::Retired(_)) => {}
            attached => break attached,
        }
    };
    let client = held.insert(attached.map_err(|e| refused(&e))?);
    Ok(info(client.export().config(), client.device().geometry()))
}

fn info(config: &ExportConfig, geometry: Geometry) -> ExportInfo {
    ExportInfo {
        flags: offer(config, geometry.read_only),
        name: config.name.clone(),
        description: config.description.clone(),
        size: geometry.size,
        min_block: geometry.min_block,
        preferred_block: geometry.preferred_block,
        max_payload: geometry.max_payload,
    }
}

/// The transmission flags for an export. Everything we can do is offered unless the configuration turns it off with
/// an explicit `false`; unlike nbd-server we do not wait for an explicit `true`.
pub(super) fn offer(config: &ExportConfig, read_only: bool) -> u16 {
    let on = |key: Option<bool>| key != Some(false);
    let flag = |condition: bool, flag: u16| if condition { flag } else { 0 };
    NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_CAN_MULTI_CONN
        | NBD_FLAG_SEND_CACHE
        | flag(read_only, NBD_FLAG_READ_ONLY)
        | flag(config.rotational, NBD_FLAG_ROTATIONAL)
        | flag(on(config.flush), NBD_FLAG_SEND_FLUSH)
        | flag(on(config.fua), NBD_FLAG_SEND_FUA)
        | flag(on(config.trim) && !read_only, NBD_FLAG_SEND_TRIM)
        | flag(!read_only, NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO)
}

fn refused(e: &AttachError) -> Refusal {
    match e {
        AttachError::Full { .. }
        | AttachError::Draining { .. }
        | AttachError::Denied { .. }
        | AttachError::AuthFile { .. }
        | AttachError::Prerun { .. } => Refusal::Policy(e.to_string()),
        AttachError::Image { .. } | AttachError::Retired(_) => Refusal::Unknown(e.to_string()),
    }
}

fn words(refusal: Refusal) -> String {
    match refusal {
        Refusal::Unknown(why) | Refusal::Policy(why) => why,
        Refusal::TlsRequired => "it needs TLS".into(),
        Refusal::Shutdown => "server is shutting down".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::config::Source;

    fn config(switch: Option<bool>, rotational: bool) -> ExportConfig {
        let source = Source { file: "/exports.conf".into(), line: 1 };
        ExportConfig {
            flush: switch,
            fua: switch,
            trim: switch,
            rotational,
            ..ExportConfig::new("disk", "/disk.raw", source)
        }
    }

    #[test]
    fn everything_is_offered_unless_turned_off() {
        let always = NBD_FLAG_HAS_FLAGS | NBD_FLAG_CAN_MULTI_CONN | NBD_FLAG_SEND_CACHE;
        let zeroes = NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
        let switched = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM;
        assert_eq!(offer(&config(None, false), false), always | zeroes | switched);
        assert_eq!(offer(&config(Some(true), true), false), always | zeroes | switched | NBD_FLAG_ROTATIONAL);
        assert_eq!(offer(&config(Some(false), false), false), always | zeroes);
    }

    #[test]
    fn a_read_only_export_offers_nothing_that_writes() {
        let flags = offer(&config(None, false), true);
        assert!(flags & NBD_FLAG_READ_ONLY != 0);
        assert_eq!(flags & (NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO), 0);
    }
}
