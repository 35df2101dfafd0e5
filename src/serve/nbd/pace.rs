//! One client's side of its export's limits: every request is paid for here before it takes memory and work begins.
//!
//! The reader pays for what it reads, and so stops reading a client that goes too fast; pieces of large reads pay for
//! themselves as they are started. Nobody waits here for a client that has gone or a server that stops.

use super::out::Out;
use crate::block::Errno;
use crate::export::limiter::{Cost, Limiter};
use crate::export::usage::Connection;
use crate::nbd::request::Command;
use std::cell::Cell;
use std::sync::Arc;
use tokio::sync::Notify;

/// What holds one client back.
pub(super) struct Pace {
    limiter: Arc<Limiter>,
    connection: Arc<Connection>,
    /// Requests that wait.
    waiting: Cell<usize>,
    /// What waits is given up.
    over: Cell<bool>,
    /// Told when that begins.
    told: Notify,
}

impl Pace {
    pub(super) fn new(limiter: &Arc<Limiter>, connection: &Arc<Connection>) -> Pace {
        let (limiter, connection) = (Arc::clone(limiter), Arc::clone(connection));
        Pace { limiter, connection, waiting: Cell::new(0), over: Cell::new(false), told: Notify::new() }
    }

    /// Whether there is nothing to pay: then nobody need call [`Pace::pay`].
    pub(super) fn is_free(&self) -> bool {
        !self.limiter.is_limited()
    }

    /// Whether nothing is held back here.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.get() == 0
    }

    /// Waits until the limits allow it.
    pub(super) async fn pay(&self, cost: Cost) {
        let _waits = Waits::new(&self.waiting);
        self.limiter.pay(&self.connection.flow, cost).await;
    }

    /// The same for a piece of a request under way. Errors: there is no use in it any more.
    pub(super) async fn pay_piece(&self, cost: Cost, out: &Out) -> Result<(), Errno> {
        if self.is_free() {
            return Ok(());
        }
        if self.over.get() {
            return Err(Errno::ESHUTDOWN);
        }
        tokio::select! {
            biased;
            () = self.told.notified() => Err(Errno::ESHUTDOWN),
            () = out.gone() => Err(Errno::EIO),
            () = self.pay(cost) => Ok(()),
        }
    }

    /// Gives up what waits: the server ends the connection.
    pub(super) fn give_up(&self) {
        self.over.set(true);
        self.told.notify_waiters();
    }
}

/// One request that waits.
struct Waits<'a>(&'a Cell<usize>);

impl<'a> Waits<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Waits(count)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// What a request of `len` bytes costs before it begins. Large writes pay piece by piece, like large reads in pieces.
pub(super) fn cost(command: &Command, len: u64) -> Cost {
    match command {
        // what is read ahead is moved as well
        Command::Read { .. } | Command::Write | Command::Cache => Cost::data(len),
        _ => Cost::OPERATION,
    }
}
