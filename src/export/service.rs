//! One export as it was configured at some time: its clients, from the moment they ask for it until their last flush.
//!
//! A reload never changes what an [`Export`] serves: it puts another one in its place and retires this one, which then
//! takes no new clients and is gone when its last client is. Only its limits change under its clients. Called by the frontends on their workers.

use super::authfile::{self, AuthError};
use super::config::ExportConfig;
use super::hooks::{self, Hook, HookError};
use super::limiter::Limiter;
use super::registry::Shared;
use super::storage::Storage;
use super::usage::{Connection, Guest, Totals};
use super::{locked, write};
use crate::block::{BlockDev, Completion, Direction, Errno, Geometry, NamedContext, Op, Request, Transfer};
use crate::image::{self, Device, Direct, FileId, Gate, Image};
use crate::ring::Peer;
use std::rc::Rc;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant, SystemTime};
use thiserror::Error;
use tracing::{debug, error, warn};

/// How long a client waits for an image that is in use elsewhere when nothing else is said: `qemu-img` looks at images for
/// moments, and a client that just left may still be letting go.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_millis(300);
/// Pause before the first further try; each one is twice as long as the one before.
const LOCK_PAUSE: Duration = Duration::from_millis(16);
/// Longest of these pauses.
const LOCK_PAUSE_MAX: Duration = Duration::from_millis(250);
/// One export as it was configured at some time.
///
/// Lock order: `clients`, then `history` or the registry's list of what drains.
pub struct Export {
    config: Arc<ExportConfig>,
    /// The configuration that defined it.
    generation: u64,
    shared: Arc<Shared>,
    clients: Mutex<Clients>,
    /// What clients of this name did that have left, under earlier definitions too.
    history: Arc<Mutex<Totals>>,
    /// How fast its clients may go; shared with earlier definitions that still have clients.
    limiter: Arc<Limiter>,
    /// The images, while they are open.
    images: Mutex<Vec<Weak<Image>>>,
    failure: Mutex<Option<Failure>>,
}

/// Who is connected, or about to be.
#[derive(Default)]
struct Clients {
    connected: Vec<Arc<Connection>>,
    /// The configuration has another definition of this name by now, or none.
    retired: bool,
}

/// Why the last client was not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The reason, for people.
    pub reason: String,
    /// When it was turned away.
    pub at: SystemTime,
}

/// Why a client does not get an export.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The image cannot be opened.
    #[error("export {name:?}: {source}")]
    Image {
        /// The export.
        name: String,
        /// What is wrong with its image.
        source: image::Error,
    },
    /// All places are taken.
    #[error("export {name:?}: {limit} clients are connected, which is its `maxconnections`; disconnect one first")]
    Full {
        /// The export.
        name: String,
        /// Its limit.
        limit: u32,
    },
    /// Clients of an earlier definition still write the image.
    #[error(
        "export {name:?}: its definition has changed, and {clients} clients of the former one still write its image; \
         connect again when they have left"
    )]
    Draining {
        /// The export.
        name: String,
        /// Who is to leave first.
        clients: usize,
    },
    /// The `authfile` does not name the client's address.
    #[error("export {name:?}: {address} is not admitted; its `authfile` does not name this address")]
    Denied {
        /// The export.
        name: String,
        /// The client's address.
        address: String,
    },
    /// The `authfile` cannot be relied on.
    #[error("export {name:?}: {source}")]
    AuthFile {
        /// The export.
        name: String,
        /// What is wrong with it.
        source: AuthError,
    },
    /// The `prerun` command did not succeed.
    #[error("export {name:?}: its `prerun` command did not succeed: {source}")]
    Prerun {
        /// The export.
        name: String,
        /// How it ended.
        source: HookError,
    },
    /// A reload came in between: ask the registry again.
    #[error("export {0:?}: its definition has just changed; connect again")]
    Retired(String),
}

/// One connection's hold on an export. Belongs to the worker that made it. End it with [`Client::detach`].
#[must_use = "a client that is dropped without `detach` leaves the image unflushed"]
pub struct Client {
    // in this order: the image is let go before the seat says so
    storage: Storage,
    seat: Seat,
}

/// What is left to do when a client has left and its image is flushed: its `postrun` command.
#[must_use = "dropping it leaves the command out"]
pub struct Farewell(Option<(String, Hook)>);

/// A place among an export's clients.
struct Seat {
    export: Arc<Export>,
    connection: Arc<Connection>,
}

impl AttachError {
    pub(super) fn image(config: &ExportConfig, source: image::Error) -> AttachError {
        AttachError::Image { name: config.name.clone(), source }
    }

    /// Somebody is in the way, who may leave.
    fn may_end(&self) -> bool {
        match self {
            AttachError::Image { source, .. } => source.is_in_use(),
            AttachError::Draining { .. } => true,
            _ => false,
        }
    }
}

impl Export {
    pub(super) fn new(
        config: Arc<ExportConfig>,
        generation: u64,
        shared: Arc<Shared>,
        history: Arc<Mutex<Totals>>,
        limiter: Arc<Limiter>,
    ) -> Export {
        let (clients, images, failure) = Default::default();
        Export { config, generation, shared, clients, history, limiter, images, failure }
    }

    /// How it was configured. Its limits may have changed since: see [`Export::limiter`].
    pub fn config(&self) -> &Arc<ExportConfig> {
        &self.config
    }

    /// The number of the configuration that defined it.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Its clients, those included that are about to get it.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        locked(&self.clients).connected.clone()
    }

    /// What its clients did, those included that have left or had an earlier definition of the same name.
    pub fn totals(&self) -> Totals {
        let clients = locked(&self.clients);
        let mut totals = *locked(&self.history);
        for connection in &clients.connected {
            totals.add(&connection.totals());
        }
        totals
    }

    /// Its images, in order, if a client has them open: of a `multifile` export one for each part.
    pub fn images(&self) -> Vec<Arc<Image>> {
        locked(&self.images).iter().filter_map(Weak::upgrade).collect()
    }

    /// Why the last client that asked was not served; `None` when it was.
    pub fn failure(&self) -> Option<Failure> {
        locked(&self.failure).clone()
    }

    /// How fast its clients may go, as configured now. Frontends pay there before a request takes memory and is
    /// submitted.
    pub fn limiter(&self) -> &Arc<Limiter> {
        &self.limiter
    }

    /// Whether it is served just as `config` has it.
    pub(super) fn serves(&self, config: &ExportConfig) -> bool {
        self.config.same_service(config) && self.limiter.limits() == config.limits
    }

    /// What its image may name.
    pub(super) fn gate(&self) -> &Gate {
        self.shared.images.gate()
    }

    pub(super) fn history(&self) -> Arc<Mutex<Totals>> {
        Arc::clone(&self.history)
    }

    /// Takes no new clients from now on. `true`: it has some, and goes on until they have left.
    pub(super) fn retire(self: &Arc<Self>) -> bool {
        let mut clients = locked(&self.clients);
        clients.retired = true;
        let drains = !clients.connected.is_empty();
        if drains {
            locked(&self.shared.draining).push(Arc::clone(self));
        }
        drains
    }

    /// Takes new clients again. `false`: its last client has left meanwhile, and it is gone.
    pub(super) fn revive(self: &Arc<Self>) -> bool {
        let mut clients = locked(&self.clients);
        let mut draining = locked(&self.shared.draining);
        let before = draining.len();
        draining.retain(|other| !Arc::ptr_eq(other, self));
        clients.retired = draining.len() == before;
        !clients.retired
    }

    /// Gives the calling worker's connection a hold on the export; opens and locks the image for the first client.
    ///
    /// While somebody is in the way who may leave it tries again, for as long as `locktimeout` says: `pause` passes the
    /// time in between, and says whether the client is still to be served.
    pub async fn attach(
        self: &Arc<Self>,
        guest: impl Into<Guest>,
        pause: impl AsyncFnMut(Duration) -> bool,
    ) -> Result<Client, AttachError> {
        let attached = self.let_in(guest.into(), pause).await;
        match &attached {
            Ok(_) => *locked(&self.failure) = None,
            Err(refused @ AttachError::Denied { .. }) => warn!("{refused}"),
            Err(refused @ (AttachError::Image { .. } | AttachError::AuthFile { .. } | AttachError::Prerun { .. })) => {
                error!("{refused}");
                *locked(&self.failure) = Some(Failure { reason: refused.to_string(), at: SystemTime::now() });
            }
            Err(_) => {}
        }
        attached
    }

    async fn let_in(
        self: &Arc<Self>,
        guest: Guest,
        mut pause: impl AsyncFnMut(Duration) -> bool,
    ) -> Result<Client, AttachError> {
        let peer = guest.peer;
        self.admit(peer)?;
        let seat = self.seat(guest)?;
        self.prerun(peer).await?;
        let start = Instant::now();
        let patience = self.config.image.lock_timeout.unwrap_or(self.shared.lock_timeout);
        let mut length = LOCK_PAUSE;
        let refused = loop {
            let refused = match self.open().await {
                Ok(storage) => return Ok(Client { storage, seat }),
                Err(refused) => refused,
            };
            let left = patience.saturating_sub(start.elapsed());
            if !refused.may_end() || left.is_zero() {
                break refused;
            }
            if length == LOCK_PAUSE {
                debug!(%peer, "client is waiting: {refused}");
            }
            // given up here only, where nothing is held: an image is never dropped while it is being opened
            let wanted = tokio::select! {
                () = seat.connection.disconnected() => false,
                wanted = pause(length.min(left)) => wanted,
            };
            if !wanted {
                break refused;
            }
            if locked(&self.clients).retired {
                break AttachError::Retired(self.config.name.clone());
            }
            length = (length * 2).min(LOCK_PAUSE_MAX);
        };
        let refused = match refused {
            AttachError::Image { name, source } => AttachError::Image { name, source: source.with_holders().await },
            refused => refused,
        };
        if self.config.client.prerun.is_some() {
            // it may have something to take back
            self.postrun(peer).run().await;
        }
        Err(refused)
    }

    /// What a client would get, without taking hold of it: nothing is locked, and what the image names is not opened.
    pub async fn describe(&self, peer: Peer) -> Result<Geometry, AttachError> {
        self.admit(peer)?;
        Storage::describe(&self.shared.images, &self.config).await.map_err(|e| AttachError::image(&self.config, e))
    }

    /// The contexts a client would get, in the same way.
    pub async fn contexts(&self, peer: Peer) -> Result<Vec<NamedContext>, AttachError> {
        self.admit(peer)?;
        Storage::contexts(&self.shared.images, &self.config).await.map_err(|e| AttachError::image(&self.config, e))
    }

    /// Turns a client away whose address the `authfile` does not name.
    fn admit(&self, peer: Peer) -> Result<(), AttachError> {
        let Some(file) = &self.config.client.auth_file else { return Ok(()) };
        let name = || self.config.name.clone();
        if let Peer::Unix { .. } | Peer::Queue(_) = peer {
            return Ok(()); // the permissions of the socket, or of the device, have let it in
        }
        let list = authfile::read(file).map_err(|source| AttachError::AuthFile { name: name(), source })?;
        let Some(list) = list else {
            warn!("export {:?}: its authfile {} does not exist, so everybody is admitted", name(), file.display());
            return Ok(());
        };
        match peer {
            Peer::Tcp(address) if list.admits(address.ip()) => Ok(()),
            peer => {
                let address = match peer {
                    Peer::Tcp(address) => address.ip().to_canonical().to_string(),
                    peer => peer.to_string(),
                };
                Err(AttachError::Denied { name: name(), address })
            }
        }
    }

    async fn prerun(&self, peer: Peer) -> Result<(), AttachError> {
        let Some(template) = &self.config.client.prerun else { return Ok(()) };
        let ran = match self.hook(template, peer) {
            Ok(hook) => hook.run(hooks::LIMIT).await,
            Err(e) => Err(e),
        };
        ran.map_err(|source| AttachError::Prerun { name: self.config.name.clone(), source })
    }

    fn postrun(&self, peer: Peer) -> Farewell {
        let name = self.config.name.clone();
        let hook = self.config.client.postrun.as_ref().map(|template| self.hook(template, peer));
        Farewell(match hook.transpose() {
            Ok(hook) => hook.map(|hook| (name, hook)),
            Err(e) => {
                warn!("export {name:?}: its `postrun` command did not succeed: {e}");
                None
            }
        })
    }

    fn hook(&self, template: &str, peer: Peer) -> Result<Hook, HookError> {
        let path = self.config.path.to_string_lossy().into_owned();
        let command = hooks::fill(template, &path)?;
        let name = self.config.name.clone();
        let variables = [("COWGATE_EXPORT", name), ("COWGATE_PATH", path), ("COWGATE_PEER", peer.to_string())];
        Ok(Hook { command, variables: variables.into() })
    }

    fn seat(self: &Arc<Self>, guest: Guest) -> Result<Seat, AttachError> {
        // counted first: the list's lock comes after the clients'
        let elsewhere =
            self.config.max_connections.map_or(0, |_| self.shared.clients_of_former(&self.config.name, self));
        let mut clients = locked(&self.clients);
        if clients.retired {
            return Err(AttachError::Retired(self.config.name.clone()));
        }
        match self.config.max_connections {
            Some(limit) if clients.connected.len() + elsewhere >= limit as usize => {
                Err(AttachError::Full { name: self.config.name.clone(), limit })
            }
            _ => {
                let connection = Arc::new(Connection::new(guest.peer).with_tls(guest.tls));
                clients.connected.push(Arc::clone(&connection));
                Ok(Seat { export: Arc::clone(self), connection })
            }
        }
    }

    async fn open(&self) -> Result<Storage, AttachError> {
        let storage = Storage::open(&self.shared.images, &self.config, |image| self.may_write(image)).await?;
        *locked(&self.images) = storage.images().iter().map(Arc::downgrade).collect();
        Ok(storage)
    }

    /// Whether an image of this export is written: as a rule, but a corrupt one is served read-only.
    fn may_write(&self, image: &Image) -> Result<bool, AttachError> {
        if image.marked_corrupt() {
            warn!(
                "export {:?}: {}: is marked corrupt and served read-only; see `cowgate image check`",
                self.config.name,
                image.path().display()
            );
            return Ok(false);
        }
        match self.shared.writers_of_former(&self.config.name, self, image.id()) {
            0 => Ok(true),
            clients => Err(AttachError::Draining { name: self.config.name.clone(), clients }),
        }
    }

    /// How many clients may write the image of this identity. One that is still opening its image may.
    pub(super) fn writers(&self, image: FileId) -> usize {
        let open: Vec<FileId> = locked(&self.images).iter().filter_map(Weak::upgrade).map(|open| open.id()).collect();
        let other = !open.is_empty() && !open.contains(&image);
        match !self.config.writes_image() || other {
            true => 0,
            false => locked(&self.clients).connected.len(),
        }
    }

    /// Carries out a request on a device of this export: the only way in.
    ///
    /// A request with FUA completes when what it wrote is durable, and with the key `sync` every one.
    pub async fn submit(&self, disk: &impl BlockDev, request: Request) -> Completion {
        let (range, fua) = (request.range(), request.fua());
        let op = request.into_op();
        let durable = (fua || self.config.client.sync) && op.writes();
        let mut done = Completion { result: Ok(()), buf: None, runs: Vec::new() };
        match op {
            Op::Read(buf) => {
                let (result, buf) = disk.read(range.start(), buf).await;
                (done.result, done.buf) = (result, Some(buf));
            }
            Op::Write(buf) => {
                let (result, buf) = write::write(disk, &self.config.image, range.start(), buf).await;
                (done.result, done.buf) = (result, Some(buf));
            }
            Op::WriteZeroes(flags) => done.result = disk.write_zeroes(range, flags).await,
            Op::Discard => done.result = disk.discard(range).await,
            Op::Flush => done.result = disk.flush().await,
            Op::Status { .. } if range.is_empty() => done.result = Err(Errno::EINVAL),
            Op::Status { context, most } => match disk.status(&context, range, most).await {
                Ok(runs) => done.runs = runs,
                Err(e) => done.result = Err(e),
            },
            Op::Cache => done.result = disk.cache(range).await,
        }
        if durable && done.result.is_ok() {
            done.result = disk.flush().await;
        }
        done
    }

    /// Carries out a read or write whose bytes `moved` moves between the client's memory and the files, all of them or
    /// not (`false`). `None`: that cannot be or was not, and it is for [`Export::submit`].
    pub async fn submit_direct(
        &self,
        device: &Device,
        transfer: Transfer,
        moved: impl AsyncFnOnce(&Direct<'_>) -> bool,
    ) -> Option<Result<(), Errno>> {
        let writes = transfer.direction() == Direction::Write;
        if writes && self.config.image.look_into_writes() {
            return None;
        }
        let direct = device.direct(transfer)?;
        let all = moved(&direct).await;
        direct.finish();
        match all {
            false => None,
            true if writes && (transfer.fua() || self.config.client.sync) => Some(device.flush().await),
            // the clusters that were written to may be no older than a journal without room
            true if writes => Some(device.keep_promise().await),
            true => Some(Ok(())),
        }
    }
}

impl Client {
    /// The export.
    pub fn export(&self) -> &Arc<Export> {
        &self.seat.export
    }

    /// What it reads and writes, for the calling worker.
    pub fn device(&self) -> &Rc<Device> {
        self.storage.device()
    }

    /// Where its requests are counted.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.seat.connection
    }

    /// Ends the hold. The last writer of an image flushes it, data and metadata, and gives the write lock back; the
    /// last client of all closes the image. Call it when no request is in flight any more.
    ///
    /// A flush that finds no space is tried again until there is some: the client was told that its data is written, and
    /// what is still in memory is lost when the image is closed.
    pub async fn detach(self) -> Farewell {
        let Client { storage, seat } = self;
        storage.close(&seat.export.shared.failed_flushes).await;
        let farewell = seat.export.postrun(seat.connection.peer);
        drop(seat);
        farewell
    }
}

impl Farewell {
    /// Runs the command, if there is one. What becomes of it changes nothing but the log.
    pub async fn run(self) {
        let Some((name, hook)) = self.0 else { return };
        if let Err(e) = hook.run(hooks::LIMIT).await {
            warn!("export {name:?}: its `postrun` command did not succeed: {e}");
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let export = &self.export;
        let mut clients = locked(&export.clients);
        clients.connected.retain(|other| !Arc::ptr_eq(other, &self.connection));
        locked(&export.history).add(&self.connection.totals());
        if clients.retired && clients.connected.is_empty() {
            export.shared.drained(export);
        }
    }
}
