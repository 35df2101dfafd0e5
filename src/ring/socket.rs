//! [`Stream`]: a connected TCP or Unix socket on a worker.
//!
//! Not through the ring: a socket is tried first and, when it is not ready, waited for with epoll, which costs less than
//! io_uring for the few connections a worker has. The control thread accepts and sends a [`StdStream`] to the worker.
//!
//! A stream may be encrypted midway ([`Stream::start_tls`]); who reads and writes it sees no difference.

use super::tls::kernel::{self, Kernel};
use super::tls::{Acceptor, Handshake, Secured, Session};
use futures_util::FutureExt;
use nix::sys::socket::{MsgFlags, getsockopt, recv, sendmsg, setsockopt, sockopt};
use std::cell::{OnceCell, RefCell};
use std::fmt;
use std::io::{self, IoSlice};
use std::net::{self, Shutdown};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net as unix;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What a reader waits for: also an error alone, as when the kernel cannot open a TLS record.
const RECEIVABLE: Interest = Interest::READABLE.add(Interest::ERROR);
/// Silence on a TCP connection after which the peer is asked for a sign of life, in seconds.
const KEEPALIVE_IDLE: u32 = 60;
/// Seconds between further questions.
const KEEPALIVE_INTERVAL: u32 = 15;
/// Unanswered questions after which the connection is dead: with the above, two minutes after its last sign of life.
const KEEPALIVE_PROBES: u32 = 4;

/// A connected socket that may still move between threads.
#[derive(Debug)]
pub enum StdStream {
    /// From the TCP listener.
    Tcp(net::TcpStream),
    /// From the Unix listener.
    Unix(unix::UnixStream),
}

impl From<net::TcpStream> for StdStream {
    fn from(s: net::TcpStream) -> Self {
        StdStream::Tcp(s)
    }
}

impl From<unix::UnixStream> for StdStream {
    fn from(s: unix::UnixStream) -> Self {
        StdStream::Unix(s)
    }
}

impl StdStream {
    /// The other end.
    pub fn peer(&self) -> Peer {
        match self {
            // it may be gone already; the first read will say so
            StdStream::Tcp(s) => s.peer_addr().map_or(Peer::Unknown, Peer::Tcp),
            StdStream::Unix(s) => match getsockopt(s, sockopt::PeerCredentials) {
                Ok(cred) => Peer::Unix { pid: cred.pid(), uid: cred.uid() },
                Err(_) => Peer::Unknown,
            },
        }
    }
}

/// A connected socket on the worker it will stay on.
#[derive(Debug)]
pub struct Stream {
    /// Watched for reading only: a Unix socket watched for writing too wakes the thread each time the peer takes bytes.
    reading: AsyncFd<OwnedFd>,
    /// A second descriptor of the same socket, watched for writing from the first write that has to wait on.
    writing: OnceCell<AsyncFd<OwnedFd>>,
    peer: Peer,
    tls: OnceCell<Box<Tls>>,
}

/// TLS on top of the socket.
#[derive(Debug)]
struct Tls {
    layer: RefCell<Layer>,
    /// Once the handshake is over.
    secured: OnceCell<Secured>,
}

/// Who makes and opens the records.
#[derive(Debug)]
enum Layer {
    /// We do.
    Session(Box<Session>),
    /// The kernel does.
    Kernel(Box<Kernel>),
    /// Nobody: the kernel was to take over, and did not.
    Nobody,
}

/// The other end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A TCP client.
    Tcp(net::SocketAddr),
    /// A process on this machine.
    Unix {
        /// Its process ID; 0 when it lives in a namespace that we do not see.
        pid: i32,
        /// Its user.
        uid: u32,
    },
    /// A queue of a block device that the export is.
    Queue(u16),
    /// Somebody who was gone before we could ask.
    Unknown,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => write!(f, "{address}"),
            Peer::Unix { pid, uid } => write!(f, "unix pid {pid} uid {uid}"),
            Peer::Queue(id) => write!(f, "block device queue {id}"),
            Peer::Unknown => f.write_str("disconnected"),
        }
    }
}

impl Stream {
    /// Takes a socket over: non-blocking; for TCP no delay (replies are sent whole, waiting to join them only costs
    /// time) and keepalive (a client whose machine died must not hold its export for ever).
    ///
    /// To be called inside the worker's runtime. Errors: the kernel refuses an option or the registration.
    pub fn from_std(stream: impl Into<StdStream>) -> io::Result<Stream> {
        let stream = stream.into();
        let peer = stream.peer();
        let fd: OwnedFd = match stream {
            StdStream::Tcp(s) => {
                s.set_nonblocking(true)?;
                s.set_nodelay(true)?;
                keep_alive(&s)?;
                s.into()
            }
            StdStream::Unix(s) => {
                s.set_nonblocking(true)?;
                s.into()
            }
        };
        Ok(Stream { reading: watch(fd, Interest::READABLE)?, writing: OnceCell::new(), peer, tls: OnceCell::new() })
    }

    /// The other end.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// Encrypts the connection from here on: [`Stream::try_handshake`] is next, before anything is read or written.
    pub fn start_tls(&self, acceptor: &Acceptor) -> io::Result<()> {
        let layer = RefCell::new(Layer::Session(Box::new(Session::new(acceptor)?)));
        let tls = Box::new(Tls { layer, secured: OnceCell::new() });
        self.tls.set(tls).map_err(|_| io::Error::other("TLS was started already"))
    }

    /// Goes on with the TLS handshake as far as the socket allows; says what to wait for.
    pub fn try_handshake(&self) -> io::Result<Handshake> {
        let Some(tls) = self.tls.get() else { return Err(io::Error::other("TLS was not started")) };
        let mut layer = tls.layer.borrow_mut();
        let Layer::Session(session) = &mut *layer else { return Err(io::Error::other("the handshake is over")) };
        let progress = session.handshake(|buf| self.recv(buf), |bytes| self.send(&[IoSlice::new(bytes)]))?;
        if progress == Handshake::Done {
            let mut secured = session.secured();
            // a Unix socket says no here, and so does a kernel that has lost its module meanwhile
            secured.kernel = session.is_for_kernel() && kernel::prepare(self.as_fd()).is_ok();
            if secured.kernel
                && let Layer::Session(session) = std::mem::replace(&mut *layer, Layer::Nobody)
            {
                *layer = Layer::Kernel(Box::new(session.into_kernel(self.as_fd())?));
            }
            // nothing of it changes later
            let _ = tls.secured.set(secured);
        }
        Ok(progress)
    }

    /// How the connection is encrypted, once it is.
    pub fn secured(&self) -> Option<&Secured> {
        self.tls.get()?.secured.get()
    }

    /// Reads what is there; 0 is the end of the stream. Errors: WouldBlock when nothing is, then [`Stream::readable`].
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = self.tls.get() else { return self.recv(buf) };
        match &mut *tls.layer.borrow_mut() {
            Layer::Session(session) => session.read(|buf| self.recv(buf), buf),
            // a short count means little there: a record of another type may be next
            Layer::Kernel(kernel) => self.when_receivable(|fd| kernel.read(fd, buf)),
            Layer::Nobody => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Takes bytes off the socket that nobody will look at, whatever they are; 0 is the end of the stream. Errors: as
    /// [`Stream::try_read`].
    pub fn try_forget(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self.secured() {
            Some(secured) if secured.kernel => self.try_read(buf),
            _ => self.recv(buf),
        }
    }

    fn recv(&self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf.len();
        let count = self.when_receivable(|fd| retry(|| Ok(recv(fd.as_raw_fd(), buf, MsgFlags::empty())?)))?;
        if count > 0 && count < want {
            not_ready(&self.reading, Interest::READABLE);
        }
        Ok(count)
    }

    /// Does what may find nothing to receive, unless it is known that there is neither something nor an error.
    fn when_receivable<T>(&self, mut receive: impl FnMut(BorrowedFd<'_>) -> io::Result<T>) -> io::Result<T> {
        // one after the other, because the reactor answers for one kind of readiness at a time
        match self.reading.try_io(Interest::READABLE, |fd| receive(fd.as_fd())) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.reading.try_io(Interest::ERROR, |fd| receive(fd.as_fd()))
            }
            outcome => outcome,
        }
    }

    /// Waits until a read may succeed. May be wrong: try, and wait again.
    ///
    /// Returns at once while data is there: a task that loops on this and [`Stream::try_read`] under a steady stream
    /// never rests, so it calls [`super::yield_now`] between requests.
    pub async fn readable(&self) -> io::Result<()> {
        if let Some(tls) = self.tls.get()
            && let Layer::Session(session) = &*tls.layer.borrow()
            && session.is_ready()
        {
            return Ok(());
        }
        self.reading.ready(RECEIVABLE).await?.retain_ready();
        Ok(())
    }

    /// Whether the other end has closed the connection, or its half of it, as far as this thread's reactor has been told
    /// (which it is while the thread waits for something). Reads nothing.
    pub fn hung_up(&self) -> bool {
        match self.reading.readable().now_or_never() {
            Some(Ok(mut guard)) => {
                guard.retain_ready();
                guard.ready().is_read_closed()
            }
            Some(Err(_)) => true,
            None => false,
        }
    }

    /// Whether the other end has closed both halves, as far as the kernel knows: of a TCP peer that has closed it knows
    /// only when something was sent that nobody took. A system call.
    pub fn is_gone(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.as_fd().as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid pollfd, for the length of the call, of a descriptor that `self` keeps open.
        let told = unsafe { libc::poll(&mut fd, 1, 0) };
        told > 0 && fd.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
    }

    /// Sends what fits, in the order of the slices. Errors: WouldBlock when nothing fits, then [`Stream::writable`], and
    /// what is written next begins with the same bytes.
    pub fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(tls) = self.tls.get() else { return self.send(bufs) };
        match &mut *tls.layer.borrow_mut() {
            Layer::Session(session) => session.write(|bytes| self.send(&[IoSlice::new(bytes)]), bufs),
            Layer::Kernel(kernel) => match self.writing.get() {
                None => kernel.write(self.as_fd(), bufs),
                Some(writing) => writing.try_io(Interest::WRITABLE, |_| kernel.write(self.as_fd(), bufs)),
            },
            Layer::Nobody => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn send(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        // MSG_NOSIGNAL: a peer that has gone is an error here, not a SIGPIPE
        let send = || retry(|| Ok(sendmsg::<()>(self.reading.as_raw_fd(), bufs, &[], MsgFlags::MSG_NOSIGNAL, None)?));
        let Some(writing) = self.writing.get() else { return send() };
        let count = writing.try_io(Interest::WRITABLE, |_| send())?;
        if count < bufs.iter().map(|b| b.len()).sum() {
            not_ready(writing, Interest::WRITABLE);
        }
        Ok(count)
    }

    /// Waits until a write may succeed. May be wrong: try, and wait again.
    pub async fn writable(&self) -> io::Result<()> {
        let writing = match self.writing.get() {
            Some(writing) => writing,
            None => {
                let fd = self.reading.get_ref().try_clone()?;
                let fresh = watch(fd, Interest::WRITABLE)?;
                self.writing.get_or_init(|| fresh)
            }
        };
        writing.writable().await?.retain_ready();
        Ok(())
    }

    /// Ends one or both directions now, also for tasks that wait on this stream. A socket already closed by the peer
    /// counts as ended. With TLS the other end is told that nothing more comes, if the socket takes that at once.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        use nix::sys::socket::{Shutdown as How, shutdown};
        if let (Some(tls), Shutdown::Write | Shutdown::Both) = (self.tls.get(), how) {
            // a courtesy: there may be nobody who hears it
            let _ = match &mut *tls.layer.borrow_mut() {
                Layer::Session(session) => session.close(|bytes| self.send(&[IoSlice::new(bytes)])),
                Layer::Kernel(kernel) => kernel.close(self.as_fd()),
                Layer::Nobody => Ok(()),
            };
        }
        let how = match how {
            Shutdown::Read => How::Read,
            Shutdown::Write => How::Write,
            Shutdown::Both => How::Both,
        };
        match shutdown(self.as_fd().as_raw_fd(), how) {
            Ok(()) | Err(nix::Error::ENOTCONN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

#[cfg(test)]
impl Stream {
    /// Sets after how many records the kernel gets another key.
    pub(super) fn kernel_key_limit(&self, records: u64) {
        let mut layer = self.tls.get().unwrap().layer.borrow_mut();
        let Layer::Kernel(kernel) = &mut *layer else { panic!("the kernel has no keys") };
        kernel.set_limit(records);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reading.get_ref().as_fd()
    }
}

fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor until it is dropped, which the AsyncFd that owns it does only
    // after it took it out of the reactor; nothing here replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A short count means that the socket has no more for now: saves the call that would only say so. What arrives
/// meanwhile rings again.
fn not_ready(fd: &AsyncFd<OwnedFd>, interest: Interest) {
    let _ = fd.try_io(interest, |_| Err::<(), _>(io::ErrorKind::WouldBlock.into()));
}

fn keep_alive(s: &net::TcpStream) -> io::Result<()> {
    setsockopt(s, sockopt::KeepAlive, &true)?;
    setsockopt(s, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(s, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(s, sockopt::TcpKeepCount, &KEEPALIVE_PROBES)?;
    Ok(())
}

/// A non-blocking call is rarely interrupted, but may be.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::run;
    use std::io::{Read, Write};
    use std::time::Duration;

    fn tcp_pair() -> (net::TcpStream, net::TcpStream) {
        let listener = net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn who_hangs_up_is_noticed_behind_unread_bytes() {
        run(async {
            let (mut near, far) = tcp_pair();
            let stream = Stream::from_std(far).unwrap();
            assert!(!stream.hung_up());
            near.write_all(b"more").unwrap();
            assert!(!stream.hung_up());
            drop(near);
            while !stream.hung_up() {
                tokio::time::sleep(Duration::from_millis(1)).await; // until the kernel has told its other end
            }
            let mut buf = [0; 9];
            assert_eq!(read_some(&stream, &mut buf).await.unwrap(), 4, "nothing was read meanwhile");
            let (near, far) = unix::UnixStream::pair().unwrap();
            let stream = Stream::from_std(far).unwrap();
            assert!(!stream.hung_up() && !stream.is_gone());
            near.shutdown(Shutdown::Write).unwrap();
            assert!(!stream.is_gone(), "it may still read");
            drop(near);
            assert!(stream.is_gone());
            while !stream.hung_up() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .unwrap();
    }

    async fn read_some(stream: &Stream, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match stream.try_read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
                outcome => return outcome,
            }
        }
    }

    async fn write_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match stream.try_write_vectored(&[IoSlice::new(&bytes[..1]), IoSlice::new(&bytes[1..])]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
                outcome => bytes = &bytes[outcome?..],
            }
        }
        Ok(())
    }

    /// More than the socket buffers hold goes out while the peer reads late, and comes back.
    fn echo(client: StdStream, server: StdStream) {
        const LEN: usize = 8 << 20;
        fn talk(mut client: impl Read + Write) {
            std::thread::sleep(Duration::from_millis(50));
            let mut bytes = vec![0; LEN];
            client.read_exact(&mut bytes).unwrap();
            assert!(bytes.iter().enumerate().all(|(i, &b)| b == (i % 251) as u8));
            client.write_all(&bytes[..1000]).unwrap();
        }
        let peer = std::thread::spawn(move || match client {
            StdStream::Tcp(s) => talk(s),
            StdStream::Unix(s) => talk(s),
        });
        run(async {
            let stream = Stream::from_std(server).unwrap();
            let out: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
            write_all(&stream, &out).await.unwrap();
            let mut back = vec![0; 1000];
            let mut got = 0;
            while got < 1000 {
                got += read_some(&stream, &mut back[got..]).await.unwrap();
            }
            assert!(back == out[..1000]);
            assert_eq!(read_some(&stream, &mut back).await.unwrap(), 0, "the peer has closed");
        })
        .unwrap();
        peer.join().unwrap();
    }

    #[test]
    fn tcp_carries_bytes_both_ways() {
        let (client, server) = tcp_pair();
        echo(client.into(), server.into());
    }

    #[test]
    fn unix_carries_bytes_both_ways() {
        let (client, server) = unix::UnixStream::pair().unwrap();
        echo(client.into(), server.into());
    }

    #[test]
    fn options_and_names() {
        let (client, server) = tcp_pair();
        run(async move {
            let stream = Stream::from_std(server).unwrap();
            assert_eq!(stream.peer(), Peer::Tcp(client.local_addr().unwrap()));
            assert!(getsockopt(&stream, sockopt::TcpNoDelay).unwrap());
            assert!(getsockopt(&stream, sockopt::KeepAlive).unwrap());
            assert_eq!(getsockopt(&stream, sockopt::TcpKeepIdle).unwrap(), KEEPALIVE_IDLE);
            let (_other, unix) = unix::UnixStream::pair().unwrap();
            let expected = format!("unix pid {} uid {}", std::process::id(), nix::unistd::getuid());
            assert_eq!(Stream::from_std(unix).unwrap().peer().to_string(), expected);
        })
        .unwrap();
    }

    #[test]
    fn shutdown_ends_a_wait() {
        let (_client, server) = tcp_pair();
        run(async move {
            let stream = std::rc::Rc::new(Stream::from_std(server).unwrap());
            let other = std::rc::Rc::clone(&stream);
            crate::ring::spawn(async move {
                tokio::time::sleep(Duration::from_millis(30)).await;
                other.shutdown(Shutdown::Both).unwrap();
                other.shutdown(Shutdown::Both).unwrap();
            });
            let read = tokio::time::timeout(Duration::from_secs(20), read_some(&stream, &mut [0; 10])).await;
            assert_eq!(read.expect("the shutdown wakes the reader").unwrap(), 0);
        })
        .unwrap();
    }
}
