//! The daemon: the order in which things start and stop, and what signals do. Runs on the control thread; clients
//! live on the workers. Called by `cowgate serve`.
//!
//! Start: signals, configuration, listeners, pid file, control socket, change of user, registry, workers, "ready". Stop
//! (SIGTERM, SIGINT): no new clients, what is in flight is finished, images are flushed as their last clients leave, workers
//! end. SIGUSR2: the same, but block devices wait for the next daemon. SIGHUP reads the configuration again; nobody is
//! disconnected by it.

pub mod background;
pub mod check;
mod control;
mod devices;
pub mod log_file;
mod notify;
pub mod pid_file;
mod privileges;
mod reload;
mod signals;

use crate::export::config::{ControlSocket, DEFAULT_CONTROL_SOCKET, Listen, ServerConfig};
use crate::export::control::{self as requests, Request};
use crate::export::registry::Registry;
use crate::export::tls_keys::TlsMode;
use crate::ring::Workers;
use crate::ring::unix_listener::UnixBindError;
use crate::serve::control as control_api;
use crate::serve::control::wire::Listening;
use crate::serve::nbd::budget::{self, Budget};
use crate::serve::nbd::conn::Context;
use crate::serve::nbd::listen::{Address, BindError, Listeners};
use control::{Control, Live};
use devices::Devices;
use log_file::LogFile;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::geteuid;
use notify::Watchdog;
use pid_file::{PidFile, Wanted};
use privileges::Identity;
use reload::Reload;
use signals::{Signal, Signals};
use std::fs::File;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

/// How long clients may take to finish what is in flight when the daemon stops.
pub const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long those who have a block device open may take to let it go when the daemon stops.
const DEVICE_PATIENCE: Duration = Duration::from_secs(10);

/// What `cowgate serve` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// The configuration file.
    pub config: PathBuf,
    /// Where to write the process ID.
    pub pid_file: Wanted,
    /// The log, when it is a file.
    pub log: Option<Arc<LogFile>>,
    /// Whoever started the daemon waits in another process until it is ready.
    pub in_background: bool,
}

/// Why the daemon did not start, or did not end cleanly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The base file cannot be relied on.
    #[error("{0}")]
    Configuration(String),
    /// The runtime, its signal handlers or the worker threads cannot be had.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A host name in `listenaddr` has no address.
    #[error("listenaddr {host}: cannot find its address: {source}")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// Every host name in `listenaddr` has no address.
    #[error("there is no address to listen on; check listenaddr")]
    NoAddress,
    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The control socket cannot be had.
    #[error("controlsock: {0}")]
    ControlSocket(#[from] UnixBindError),
    /// The process ID cannot be written.
    #[error("cannot write the pid file {}: {source}", path.display())]
    PidFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `user` or `group` cannot be obeyed.
    #[error(transparent)]
    Privileges(#[from] privileges::Error),
    /// Images could not be flushed when their last writers left.
    #[error("{0} images could not be flushed: see the log; data that clients believe written may be lost")]
    Unflushed(usize),
    /// Clients did not finish in time.
    #[error("connections were still busy after {} s; what they had in flight may not be on disk", STOP_LIMIT.as_secs())]
    Unfinished,
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &Options) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { what: "the control thread's runtime", source })?;
    let mut workers = None;
    let served = runtime.block_on(control(options, &mut workers));
    // joining threads blocks, so it is done out here; with a stuck client they would never end
    if let Some(workers) = workers
        && !matches!(served, Err(Error::Unfinished))
    {
        workers.stop();
    }
    // a thread that examines an image on a file system that does not answer keeps nobody waiting
    runtime.shutdown_background();
    served
}

/// From start to stop. `to_stop` gets the workers, once there are any.
async fn control(options: &Options, to_stop: &mut Option<Workers>) -> Result<(), Error> {
    // first of all: a SIGHUP that comes early must not end the process
    let mut signals =
        Signals::new(options.log.clone()).map_err(|source| Error::Start { what: "signal handling", source })?;
    raise_descriptor_limit();
    devices::sweep();
    let (reload, server, first) = Reload::start(&options.config).map_err(Error::Configuration)?;
    let mut opened = Opened::new(&server, options)?;
    opened.drop_privileges(&server, options)?;
    // from here on there may be threads and open images
    let registry = Registry::new(server.image_roots.clone(), server.lock_timeout);
    let live = Live::new(&server);
    let devices = Devices::new(Arc::clone(&registry), &options.config);
    let control = Control::new(reload, first, Arc::clone(&registry), devices, live.clone());
    let count = server.worker_count();
    let workers = Workers::start(count).map_err(|source| Error::Start { what: "worker threads", source })?;
    *to_stop = Some(workers.clone());
    let (handle, requests) = requests::channel();
    let state =
        control_api::State::new(Arc::clone(&registry), handle.clone(), workers.clone(), opened.listening.clone());
    let Live { list_allowed, limits, tls } = live;
    let budget = Budget::new(server.limits.max_memory.unwrap_or_else(budget::default_memory));
    let context = Arc::new(Context { registry, control: handle, list_allowed, limits, budget, tls });
    // its answers are given by this thread, between everything else that it does
    let api = opened.control.take().map(|socket| tokio::spawn(socket.serve(Arc::clone(&state))));
    let Listening { tcp, unix } = &opened.listening;
    let unix = unix.iter().map(|path| format!("unix:{path}"));
    info!("ready: listening on {}", tcp.iter().cloned().chain(unix).collect::<Vec<_>>().join(", "));
    notify::ready(&control.status(), options.in_background);
    let _watchdog = Watchdog::start(options.in_background);
    if options.in_background {
        let detached = background::detach(options.log.is_some());
        detached.map_err(|source| Error::Start { what: "in the background: whoever started it has gone", source })?;
    }
    let served = serve(opened, &workers, context, &mut signals, control, requests, &state).await;
    if let Some(api) = api {
        // ends it here, so that its socket's file is gone before the process is
        api.abort();
        let _ = api.await;
    }
    served
}

/// What others can see of a running daemon: its sockets and its pid file.
struct Opened {
    listeners: Listeners,
    listening: Listening,
    pid_file: Option<PidFile>,
    control: Option<control_api::Socket>,
}

impl Opened {
    fn new(server: &ServerConfig, options: &Options) -> Result<Opened, Error> {
        let listeners = Listeners::bind(&addresses(server)?)?;
        let tcp = listeners.tcp_addresses().iter().map(ToString::to_string).collect();
        let unix = server.unix_socket.iter().map(|path| path.display().to_string()).collect();
        let listening = Listening { tcp, unix };
        // after the pid file, which says that no other daemon serves this configuration
        let pid_file = pid_file(&options.pid_file)?;
        Ok(Opened { listeners, listening, pid_file, control: control_socket(&server.control_socket)? })
    }

    /// Becomes the configured user and group. The pid file stays root's: root signals whom it names.
    fn drop_privileges(&self, server: &ServerConfig, options: &Options) -> Result<(), Error> {
        let Some(identity) = Identity::wanted(server)? else {
            return Ok(());
        };
        if geteuid().is_root() {
            self.listeners.give_to(identity.uid(), identity.gid())?;
            if let Some(control) = &self.control {
                control.give_to(identity.uid(), identity.gid())?;
            }
        }
        identity.assume()?;
        if let Err(e) = File::open(&options.config) {
            warn!("this user cannot read {}: {e}; a reload will change nothing", options.config.display());
        }
        if let Some(key) = server.tls.key.as_ref().filter(|_| server.tls.mode > TlsMode::Off)
            && let Err(e) = File::open(key)
        {
            warn!("this user cannot read {}: {e}; a new key or certificate will need a restart", key.display());
        }
        Ok(())
    }
}

fn control_socket(wanted: &ControlSocket) -> Result<Option<control_api::Socket>, Error> {
    match wanted {
        ControlSocket::Off => Ok(None),
        ControlSocket::At(path) => Ok(Some(control_api::Socket::bind(path)?)),
        ControlSocket::Default => match control_api::Socket::bind(Path::new(DEFAULT_CONTROL_SOCKET)) {
            Ok(socket) => Ok(Some(socket)),
            Err(e) => {
                warn!("no control API: {e}; choose another place with controlsock in [generic], or controlsock = none");
                Ok(None)
            }
        },
    }
}

fn pid_file(wanted: &Wanted) -> Result<Option<PidFile>, Error> {
    let Some(path) = wanted.path() else {
        return Ok(None);
    };
    match PidFile::write(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if matches!(wanted, Wanted::IfPossible(_)) => {
            warn!("no pid file: cannot write {}: {e}; choose one with -p, or -p none", path.display());
            Ok(None)
        }
        Err(source) => Err(Error::PidFile { path: path.to_owned(), source }),
    }
}

/// From "ready" until the last client has gone.
async fn serve(
    opened: Opened,
    workers: &Workers,
    context: Arc<Context>,
    signals: &mut Signals,
    mut control: Control,
    mut requests: mpsc::Receiver<Request>,
    api: &control_api::State,
) -> Result<(), Error> {
    let Opened { listeners, pid_file, .. } = opened;
    let registry = Arc::clone(&context.registry);
    let (stop, stopped) = watch::channel(false);
    let mut serving = pin!(listeners.serve(workers.clone(), context, stopped));
    let (name, hand_over) = loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Stop(name) => break (name, false),
                Signal::HandOver(name) => break (name, true),
                Signal::Reload => control.reload(),
            },
            // there is always a sender: the context's
            Some(request) = requests.recv() => control.request(request),
            () = at(control.wakes_at()) => control.time(),
            // they serve until they are told to stop, or have nothing to serve
            () = &mut serving => return Err(Error::NoAddress),
        }
    };
    let devices = control.devices().clone();
    // clients that wait for an export are told that there is none
    drop((control, requests));

    info!("{name}: no new clients; finishing what is in flight, for up to {} s", STOP_LIMIT.as_secs());
    notify::stopping();
    api.stop();
    stop.send_replace(true);
    // those before were logged when they happened; the status speaks of this end
    let failed_before = registry.failed_flushes();
    let stopping = tokio::task::spawn_blocking(move || devices.stop(DEVICE_PATIENCE, hand_over));
    let all = async {
        serving.await;
        let _ = stopping.await; // a panic was printed when it happened
    };
    finish(pin!(all), signals, pid_file).await?;
    match registry.failed_flushes() - failed_before {
        0 => Ok(()),
        failed => Err(Error::Unflushed(failed)),
    }
}

/// Waits for the connected clients. A second signal to stop ends the process at once.
async fn finish(
    serving: Pin<&mut impl Future<Output = ()>>,
    signals: &mut Signals,
    pid_file: Option<PidFile>,
) -> Result<(), Error> {
    let mut finishing = pin!(timeout(STOP_LIMIT, serving));
    loop {
        tokio::select! {
            in_time = &mut finishing => {
                if in_time.is_err() {
                    return Err(Error::Unfinished);
                }
                info!("stopped");
                return Ok(());
            }
            signal = signals.next() => if let Signal::Stop(name) | Signal::HandOver(name) = signal {
                warn!("{name} again: stopping at once; what was in flight may not be on disk");
                drop(pid_file);
                std::process::exit(1);
            },
        }
    }
}

/// Completes at `instant`; without one, never.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// Where to listen, with host names looked up.
fn addresses(server: &ServerConfig) -> Result<Vec<Address>, Error> {
    let mut out = Vec::new();
    if server.tcp() {
        if server.listen.is_empty() {
            out.push(Address::Any(server.port));
        }
        for listen in &server.listen {
            match listen {
                Listen::Ip(ip) => out.push(Address::Tcp(SocketAddr::new(*ip, server.port))),
                Listen::Host(host) => {
                    let found = (host.as_str(), server.port).to_socket_addrs();
                    let found = found.map_err(|source| Error::Lookup { host: host.clone(), source })?;
                    out.extend(found.map(Address::Tcp));
                }
            }
        }
    }
    out.extend(server.unix_socket.clone().map(Address::Unix));
    // a name may stand for an address that is listed too
    let mut unique: Vec<Address> = Vec::new();
    for address in out {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    Ok(unique)
}

/// Every client and every open image of every worker costs descriptors; the default limit is for programs that use
/// select(2).
fn raise_descriptor_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(e) = raised {
        warn!("cannot raise the limit of open files: {e}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn server(listen: &[&str], unix: Option<&str>, dual_listen: bool) -> ServerConfig {
        let listen =
            listen.iter().map(|a| a.parse::<IpAddr>().map_or(Listen::Host(a.to_string()), Listen::Ip)).collect();
        ServerConfig { listen, unix_socket: unix.map(PathBuf::from), dual_listen, ..ServerConfig::default() }
    }

    #[test]
    fn a_unix_socket_turns_tcp_off_unless_both_are_wanted() {
        let unix = Address::Unix("/s".into());
        let any = Address::Any(10809);
        let found = |server: ServerConfig| addresses(&server).expect("addresses");
        assert_eq!(found(server(&[], None, false)), std::slice::from_ref(&any));
        assert_eq!(found(server(&[], Some("/s"), false)), std::slice::from_ref(&unix));
        assert_eq!(found(server(&[], Some("/s"), true)), [any, unix]);
    }

    #[test]
    fn host_names_are_looked_up_and_addresses_listed_once() {
        let found = addresses(&server(&["127.0.0.1", "127.0.0.1", "::1"], None, false)).expect("addresses");
        assert_eq!(found, ["127.0.0.1:10809", "[::1]:10809"].map(|a| Address::Tcp(a.parse().expect("address"))));
        let found = addresses(&server(&["localhost"], None, false)).expect("localhost");
        assert!(!found.is_empty());
        let missing = addresses(&server(&["nowhere.invalid"], None, false));
        assert!(matches!(missing, Err(Error::Lookup { .. })));
    }
}
