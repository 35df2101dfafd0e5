//! The control thread's part in reloads: who asked, when to look next, who is answered when.
//!
//! Called by the daemon's loop, which hands over signals, requests and the passing of time.

use super::devices::Devices;
use super::notify;
use super::reload::{Pass, Reload};
use crate::export::config::ServerConfig;
use crate::export::control::{Applied, Outcome, Request};
use crate::export::limit_keys::LiveLimits;
use crate::export::registry::Registry;
use crate::export::tls;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::debug;

/// Least time between two looks for exports that clients miss.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// The same in multiples of what a look takes, so that clients who ask for nonsense cost little of the control thread.
const LOOK_SHARE: u32 = 20;
/// How long a client waits for a half-written file that may hold its export.
const MISSING_LIMIT: Duration = Duration::from_secs(2);

/// Settings that a reload changes without a restart, as the frontends see them.
#[derive(Clone)]
pub struct Live {
    /// Follows `allowlist`.
    pub list_allowed: Arc<AtomicBool>,
    /// Follow the keys of limits.
    pub limits: Arc<LiveLimits>,
    /// Follows the keys of TLS and the files they name.
    pub tls: Arc<tls::Current>,
}

impl Live {
    /// The settings of a start.
    pub fn new(server: &ServerConfig) -> Live {
        let list_allowed = Arc::new(AtomicBool::new(server.list_allowed));
        Live { list_allowed, limits: Arc::new(LiveLimits::new(server.limits.clone())), tls: Arc::default() }
    }
}

/// Reloads under way, and who waits for them.
pub struct Control {
    reload: Reload,
    registry: Arc<Registry>,
    devices: Devices,
    live: Live,
    /// The next pass of the series under way.
    next_pass: Option<Instant>,
    /// Clients miss exports that were not looked for yet; from then on they may be.
    look_due: Option<Instant>,
    /// No look before this.
    look_earliest: Instant,
    reloaders: Vec<oneshot::Sender<Outcome>>,
    missing: Vec<Missing>,
}

/// A client that waits for its export.
struct Missing {
    name: String,
    since: Instant,
    done: oneshot::Sender<()>,
}

impl Control {
    /// Takes a start's first pass over, which is applied at once. `live` follows the configuration from then on.
    pub fn new(reload: Reload, first: Pass, registry: Arc<Registry>, devices: Devices, live: Live) -> Control {
        let mut control = Control {
            reload,
            registry,
            devices,
            live,
            next_pass: None,
            look_due: None,
            look_earliest: Instant::now(),
            reloaders: Vec::new(),
            missing: Vec::new(),
        };
        control.apply(first);
        control
    }

    /// Reads the configuration again: somebody who may ask for it did.
    pub fn reload(&mut self) {
        notify::reloading();
        self.reload.begin();
        let pass = self.reload.pass();
        self.apply(pass);
    }

    /// Carries out a request; it is answered now or after a later pass.
    pub fn request(&mut self, request: Request) {
        match request {
            Request::Reload { wait, done } => {
                self.reload();
                match wait && !self.reload.is_settled() {
                    true => self.reloaders.push(done),
                    // who asked may have gone
                    false => drop(done.send(self.reload.outcome())),
                }
            }
            Request::File { file, done } => {
                let (plan, problems) = self.reload.file(&file);
                self.registry.apply(&plan, self.reload.generation());
                self.devices.follow(self.reload.is_whole());
                let problems = problems.iter().map(|p| p.to_string()).collect();
                let _ = done.send(Applied { generation: self.reload.generation(), problems });
                self.answer(|_| false);
            }
            Request::IncludeDir { done } => drop(done.send(self.reload.include_dir().map(Path::to_owned))),
            Request::Resize { name, resize } => self.devices.resize(&name, resize),
            Request::Missing { name, done } => {
                self.missing.push(Missing { name, since: Instant::now(), done });
                if self.look_due.is_none() {
                    self.look_due = Some(self.look_earliest);
                    self.time();
                }
            }
        }
    }

    /// When [`Control::time`] wants to be called; `None`: not before something else happens.
    pub fn wakes_at(&self) -> Option<Instant> {
        [self.next_pass, self.look_due].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn time(&mut self) {
        let now = Instant::now();
        if self.look_due.is_some_and(|due| due <= now) {
            self.look(now);
        } else if self.next_pass.is_some_and(|due| due <= now) {
            let pass = self.reload.follow_up();
            self.apply(pass);
        }
    }

    /// Looks for the exports that clients miss, and again shortly while a half-written file may hold one.
    fn look(&mut self, now: Instant) {
        debug!("looking for exports that clients miss");
        let (plan, settled) = self.reload.additions();
        self.registry.apply(&plan, self.reload.generation());
        if !plan.is_empty() {
            self.devices.follow(self.reload.is_whole());
        }
        self.look_earliest = Instant::now() + LOOK_PAUSE.max(LOOK_SHARE * now.elapsed());
        self.answer(|missing| settled || missing.since.elapsed() > MISSING_LIMIT);
        self.look_due = (!self.missing.is_empty()).then_some(self.look_earliest);
    }

    fn apply(&mut self, pass: Pass) {
        // first: an export that wants TLS must not be there a moment without
        if let Some(offer) = pass.tls {
            self.live.tls.set(offer);
        }
        self.registry.apply(&pass.plan, self.reload.generation());
        self.devices.follow(self.reload.is_whole());
        if let Some(server) = pass.server {
            self.live.list_allowed.store(server.list_allowed, Ordering::Relaxed);
            self.live.limits.set(server.limits);
            self.registry.set_default(server.default_export);
        }
        self.next_pass = pass.again.map(|pause| Instant::now() + pause);
        if let Some(status) = self.reload.concluded() {
            notify::reloaded(&status);
        }
        if self.reload.is_settled() || self.next_pass.is_none() {
            for done in self.reloaders.drain(..) {
                drop(done.send(self.reload.outcome()));
            }
        }
        // the others are looked for, which is due
        self.answer(|_| false);
    }

    /// The block devices, which follow the configuration.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// What is served, for people, in a line.
    pub fn status(&self) -> String {
        self.reload.status()
    }

    /// Answers the clients whose exports are there by now, and those for whom it is no use to wait.
    fn answer(&mut self, in_vain: impl Fn(&Missing) -> bool) {
        let registry = &self.registry;
        for missing in self.missing.extract_if(.., |m| in_vain(m) || registry.get(&m.name).is_some()) {
            // who asked may have gone
            let _ = missing.done.send(());
        }
    }
}
