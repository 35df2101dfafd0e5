//! Listening sockets and the accept loop, on the control thread.
//!
//! [`Listeners::bind`] takes the addresses when the daemon starts, so that it can say "ready" truthfully;
//! [`Listeners::serve`] hands each client to a worker and ends when, after shutdown, the last client has gone.

use super::admission::Places;
use super::conn::{self, Context};
use crate::ring::unix_listener::{self, SocketFile, UnixBindError};
use crate::ring::{self, StdStream, Stream, Workers};
use futures_util::future::join_all;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use nix::unistd::{Gid, Uid};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tracing::{debug, error, info};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Pause after an accept that failed, so that a lack of descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Every IPv6 and IPv4 address of the machine, on this port (0: one the kernel chooses).
    Any(u16),
    /// One IP address and port.
    Tcp(SocketAddr),
    /// A Unix socket at this path.
    Unix(PathBuf),
}

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// TCP.
    #[error("cannot listen on {address}: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Unix socket.
    #[error(transparent)]
    Unix(#[from] UnixBindError),
}

/// Bound sockets.
pub struct Listeners {
    sockets: Vec<Listening>,
}

enum Listening {
    Tcp(TcpListener),
    Unix { listener: UnixListener, file: SocketFile },
}

impl Listeners {
    /// Binds every address or none. Must be called inside the control thread's tokio runtime.
    pub fn bind(addresses: &[Address]) -> Result<Listeners, BindError> {
        let mut sockets = Vec::new();
        for address in addresses {
            match address {
                Address::Any(port) => bind_any(*port, &mut sockets)?,
                Address::Tcp(address) => sockets.push(Listening::Tcp(bind_tcp(*address)?)),
                Address::Unix(path) => {
                    let (listener, file) = unix_listener::bind(path, None)?;
                    sockets.push(Listening::Unix { listener, file });
                }
            }
        }
        Ok(Listeners { sockets })
    }

    /// The TCP addresses in use, with the ports the kernel chose.
    pub fn tcp_addresses(&self) -> Vec<SocketAddr> {
        let addresses = self.sockets.iter().map(|socket| match socket {
            Listening::Tcp(listener) => listener.local_addr().ok(),
            Listening::Unix { .. } => None,
        });
        addresses.flatten().collect()
    }

    /// Gives the files of the Unix sockets to a user and a group: that user may connect, and may remove them at the end
    /// where the directory allows only a file's owner to do so.
    pub fn give_to(&self, user: Option<Uid>, group: Gid) -> Result<(), BindError> {
        for socket in &self.sockets {
            if let Listening::Unix { file, .. } = socket {
                file.give_to(user, group)?;
            }
        }
        Ok(())
    }

    /// Accepts clients until `shutdown` turns true, then waits until those connected have gone.
    pub async fn serve(self, workers: Workers, context: Arc<Context>, shutdown: watch::Receiver<bool>) {
        let places = Places::new(Arc::clone(&context.limits));
        let door = Door { workers, context, shutdown, places };
        let mut stop = door.shutdown.clone();
        let accepting = join_all(self.sockets.iter().map(|socket| door.accept_from(socket)));
        tokio::select! {
            _ = stop.wait_for(|&stop| stop) => {}
            _ = accepting => {}
        }
        // New clients are refused from here on, not left waiting in the backlog.
        drop(self);
        door.places.all_gone().await;
    }
}

/// What the accept loops share.
struct Door {
    workers: Workers,
    context: Arc<Context>,
    shutdown: watch::Receiver<bool>,
    places: Arc<Places>,
}

impl Door {
    async fn accept_from(&self, socket: &Listening) {
        let mut failing = false;
        loop {
            match accept(socket).await {
                Ok(client) => {
                    failing = false;
                    self.admit(client);
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    if !failing {
                        error!(error = %e, "cannot accept clients; will go on trying");
                        failing = true;
                    }
                    if is_lack_of_descriptors(&e) {
                        self.places.make_room();
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn admit(&self, client: StdStream) {
        let Some(place) = self.places.enter(client.peer()) else { return };
        let (context, shutdown) = (Arc::clone(&self.context), self.shutdown.clone());
        let load = self.workers.pick();
        let worker = load.index();
        let job = move || {
            ring::spawn(async move {
                match Stream::from_std(client) {
                    Ok(stream) => conn::serve(stream, context, &place, shutdown).await,
                    Err(e) => debug!(error = %e, "client lost before it was served"),
                }
                drop((load, place));
            });
        };
        self.workers.run_on(worker, Box::new(job));
    }
}

async fn accept(socket: &Listening) -> io::Result<StdStream> {
    Ok(match socket {
        Listening::Tcp(listener) => listener.accept().await?.0.into_std()?.into(),
        Listening::Unix { listener, .. } => listener.accept().await?.0.into_std()?.into(),
    })
}

/// Whether there would be room for a client if another went.
fn is_lack_of_descriptors(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

fn bind_any(port: u16, sockets: &mut Vec<Listening>) -> Result<(), BindError> {
    // Two sockets, so that IPv4 clients are logged as such and a machine without IPv6 is served too.
    let v6 = bind_tcp(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    let port = match v6 {
        Ok(listener) => {
            let port = listener.local_addr().map_or(port, |address| address.port());
            sockets.push(Listening::Tcp(listener));
            port
        }
        Err(BindError::Tcp { source, .. }) if has_no_ipv6(&source) => {
            info!("this machine has no IPv6, listening on IPv4 only");
            port
        }
        Err(e) => return Err(e),
    };
    sockets.push(Listening::Tcp(bind_tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))?));
    Ok(())
}

fn has_no_ipv6(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL | libc::EPROTONOSUPPORT))
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener, BindError> {
    listening_tcp(address).map_err(|source| BindError::Tcp { address, source })
}

fn listening_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    // A restarted daemon must not wait for connections of its predecessor to time out.
    setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &true)?;
    }
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    TcpListener::from_std(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(addresses: &[Address]) -> Result<Listeners, BindError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { Listeners::bind(addresses) })
    }

    #[test]
    fn every_address_family_on_one_port() {
        let listeners = bind(&[Address::Any(0)]).unwrap();
        let addresses = listeners.tcp_addresses();
        assert!(addresses.iter().any(SocketAddr::is_ipv4));
        let first = addresses[0].port();
        assert!(first != 0 && addresses.iter().all(|a| a.port() == first));
        let taken = bind(&[Address::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), first))]);
        assert!(matches!(taken, Err(BindError::Tcp { .. })));
    }
}
