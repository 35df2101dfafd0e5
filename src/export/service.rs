//! One export as it was configured at some time: its clients, from the moment they ask for it until their last flush.
//!
//! A reload never changes an [`Export`]: it puts another one in its place and retires this one, which then takes no new
//! clients and is gone when its last client is. Called by the frontends on their workers.

use super::config::ExportConfig;
use super::images::local_disk;
use super::registry::Shared;
use super::usage::{Connection, Totals};
use super::{locked, write};
use crate::block::{BlockDev, Completion, Errno, Geometry, Op, Request};
use crate::image::{self, Disk, FileId, Image};
use crate::ring::Peer;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};
use thiserror::Error;
use tracing::{error, info, warn};

/// A lock held by somebody else is asked for again this often: `qemu-img` looks at images for moments, and a client
/// that just left may still be letting go.
const LOCK_TRIES: u32 = 10;
/// Pause between two of these tries.
const LOCK_PAUSE: Duration = Duration::from_millis(30);
/// First pause before a flush that found no space is tried again; each further one is twice as long.
const FLUSH_PAUSE: Duration = Duration::from_millis(500);
/// Longest of these pauses.
const FLUSH_PAUSE_MAX: Duration = Duration::from_secs(30);

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
    /// The image, while it is open.
    image: Mutex<Weak<Image>>,
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
    /// A reload came in between: ask the registry again.
    #[error("export {0:?}: its definition has just changed; connect again")]
    Retired(String),
}

/// One connection's hold on an export. Belongs to the worker that made it. End it with [`Client::detach`].
#[must_use = "a client that is dropped without `detach` leaves the image unflushed"]
pub struct Client {
    // in this order: the image is let go before the seat says so
    disk: Rc<Disk>,
    writer: Option<Writer>,
    seat: Seat,
}

/// A place among an export's clients.
struct Seat {
    export: Arc<Export>,
    connection: Arc<Connection>,
}

/// A counted writer of an image.
struct Writer(Arc<Image>);

impl Export {
    pub(super) fn new(
        config: Arc<ExportConfig>,
        generation: u64,
        shared: Arc<Shared>,
        history: Arc<Mutex<Totals>>,
    ) -> Export {
        let (clients, image, failure) = Default::default();
        Export { config, generation, shared, clients, history, image, failure }
    }

    /// How it was configured.
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

    /// The image, if a client has it open.
    pub fn image(&self) -> Option<Arc<Image>> {
        locked(&self.image).upgrade()
    }

    /// Why the last client that asked was not served; `None` when it was.
    pub fn failure(&self) -> Option<Failure> {
        locked(&self.failure).clone()
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

    /// Gives the calling worker's connection a hold on the export; opens and locks the image for the first client.
    pub async fn attach(self: &Arc<Self>, peer: Peer) -> Result<Client, AttachError> {
        let seat = self.seat(peer)?;
        let mut tries = 0;
        let refused = loop {
            match self.open().await {
                Ok((disk, writer)) => {
                    *locked(&self.failure) = None;
                    return Ok(Client { disk, writer, seat });
                }
                Err(AttachError::Draining { .. } | AttachError::Image { source: image::Error::Locked { .. }, .. })
                    if tries < LOCK_TRIES =>
                {
                    tries += 1;
                    tokio::time::sleep(LOCK_PAUSE).await;
                }
                Err(refused) => break refused,
            }
        };
        if let AttachError::Image { .. } = refused {
            error!("{refused}");
            *locked(&self.failure) = Some(Failure { reason: refused.to_string(), at: SystemTime::now() });
        }
        Err(refused)
    }

    /// What a client would get, without taking hold of it: nothing is locked, and what the image names is not opened.
    pub async fn describe(&self) -> Result<Geometry, AttachError> {
        let failed = |source| self.failed(source);
        let (size, corrupt) = match self.shared.images.open_now(&self.config).map_err(failed)? {
            Ok(image) => (image.size(), image.marked_corrupt()),
            Err(opener) => {
                let snapshot = self.config.image.snapshot.as_deref();
                let size = opener.virtual_size(self.config.format, snapshot).await.map_err(failed)?;
                (size, opener.marked_corrupt(self.config.format).await.map_err(failed)?)
            }
        };
        Ok(Disk::geometry_for(size, !self.config.read_only && !corrupt))
    }

    fn seat(self: &Arc<Self>, peer: Peer) -> Result<Seat, AttachError> {
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
                let connection = Arc::new(Connection::new(peer));
                clients.connected.push(Arc::clone(&connection));
                Ok(Seat { export: Arc::clone(self), connection })
            }
        }
    }

    async fn open(&self) -> Result<(Rc<Disk>, Option<Writer>), AttachError> {
        let failed = |source| self.failed(source);
        let image = self.shared.images.open(&self.config).await.map_err(failed)?;
        check_compression(&image, &self.config).map_err(failed)?;
        let writer = self.begin_writing(&image)?;
        match local_disk(&image, writer.is_some()) {
            Ok(disk) => {
                if writer.is_some() {
                    // what fails here fails the first write
                    let _ = disk.mark_bitmaps().await;
                }
                *locked(&self.image) = Arc::downgrade(&image);
                Ok((disk, writer))
            }
            Err(e) => {
                if let Some(writer) = writer {
                    writer.count_out();
                    image.end_writing();
                }
                Err(failed(e))
            }
        }
    }

    /// Counts a writer in, if the export is for writing.
    fn begin_writing(&self, image: &Arc<Image>) -> Result<Option<Writer>, AttachError> {
        if self.config.read_only {
            return Ok(None);
        }
        if image.marked_corrupt() {
            warn!(
                "export {:?}: {}: is marked corrupt and served read-only; see `cowgate image check`",
                self.config.name,
                image.path().display()
            );
            return Ok(None);
        }
        let clients = self.shared.writers_of_former(&self.config.name, self, image.id());
        if clients > 0 {
            return Err(AttachError::Draining { name: self.config.name.clone(), clients });
        }
        image.begin_writing().map_err(|source| self.failed(source))?;
        Ok(Some(Writer(Arc::clone(image))))
    }

    /// How many clients may write the image of this identity. One that is still opening its image may.
    pub(super) fn writers(&self, image: FileId) -> usize {
        let other = locked(&self.image).upgrade().is_some_and(|open| open.id() != image);
        match self.config.read_only || other {
            true => 0,
            false => locked(&self.clients).connected.len(),
        }
    }

    fn failed(&self, source: image::Error) -> AttachError {
        AttachError::Image { name: self.config.name.clone(), source }
    }

    /// Carries out a request on a device of this export: the only way in.
    ///
    /// A request with FUA completes when what it wrote is durable.
    pub async fn submit(&self, disk: &impl BlockDev, request: Request) -> Completion {
        let (range, fua) = (request.range(), request.fua());
        let op = request.into_op();
        let durable = fua && op.writes();
        let mut done = Completion { result: Ok(()), buf: None, extents: Vec::new() };
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
            Op::Extents { .. } if range.is_empty() => done.result = Err(Errno::EINVAL),
            Op::Extents { most } => match disk.extents(range, most).await {
                Ok(extents) => done.extents = extents,
                Err(e) => done.result = Err(e),
            },
            Op::Cache => done.result = disk.cache(range).await,
        }
        if durable && done.result.is_ok() {
            done.result = disk.flush().await;
        }
        done
    }
}

/// All compressed clusters of an image are packed in one way: the export cannot choose another.
fn check_compression(image: &Image, config: &ExportConfig) -> Result<(), image::Error> {
    match (config.image.compress, image.compression()) {
        (Some(wanted), can) if can != Some(wanted) => {
            Err(image::Error::Compression { path: config.path.clone(), wanted, can })
        }
        _ => Ok(()),
    }
}

impl Client {
    /// The export.
    pub fn export(&self) -> &Arc<Export> {
        &self.seat.export
    }

    /// The calling worker's hands on its image.
    pub fn disk(&self) -> &Rc<Disk> {
        &self.disk
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
    pub async fn detach(mut self) {
        let Some(writer) = self.writer.take() else { return };
        let image = Arc::clone(&writer.0);
        if writer.count_out() > 0 {
            return;
        }
        let path = image.path().display();
        let mut pause = FLUSH_PAUSE;
        loop {
            match self.disk.settle().await {
                Ok(()) => info!("{path}: the last writer left, flushed"),
                Err(Errno::ENOSPC | Errno::EDQUOT) => {
                    if pause == FLUSH_PAUSE {
                        error!(
                            "{path}: the last writer left, and there is no space for the flush; free some: it is tried \
                             again until it succeeds"
                        );
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(FLUSH_PAUSE_MAX);
                    continue;
                }
                Err(e) => {
                    self.seat.export.shared.failed_flushes.fetch_add(1, Ordering::Relaxed);
                    error!("{path}: the last writer left, and the flush failed: {e}");
                }
            }
            break;
        }
        image.end_writing();
    }
}

impl Writer {
    /// Counts the writer out; returns how many are left.
    fn count_out(self) -> usize {
        let image = Arc::clone(&self.0);
        drop(self);
        image.writers()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.writer_left();
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
