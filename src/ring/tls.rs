//! TLS of one connection: what [`super::Stream`] does between the socket and its callers once they started it.
//!
//! `Session` moves no bytes itself: it is handed a function that receives and one that sends, both non-blocking, and
//! keeps ciphertext that the socket has not taken, ciphertext that is not a whole record yet, and plaintext that nobody
//! has taken yet, each within a limit. rustls decides what the bytes mean; this decides how many of them are in memory.
//!
//! With a kernel that can, the records of TLS 1.3 on TCP are its own after the handshake ([`kernel`]).
//!
//! Promises: whoever was told that bytes were written knows that the socket has taken all of their ciphertext; a stream
//! that ends without close_notify is an error, never an end; after an error there is nothing but that error.

mod bytes;
pub mod kernel;

use bytes::Bytes;
use kernel::Kernel;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus};
use rustls::{CipherSuite, ProtocolVersion, ServerConfig};
use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Ciphertext received with one call, in bytes: a few records.
const RECEIVE_BYTES: usize = 64 << 10;
/// Ciphertext of one write, in bytes: what a socket that is full leaves behind.
const SEND_BYTES: usize = 64 << 10;
/// Room in it for what TLS itself has to say: an update of keys, an alert.
const CONTROL_BYTES: usize = 1 << 10;
/// Plaintext of one record, in bytes.
const RECORD_BYTES: usize = 16 << 10;
/// What a record adds to its plaintext at most, in bytes.
const RECORD_OVERHEAD: usize = 64;
/// Header of a record, in bytes: type, version, length.
const HEADER_BYTES: usize = 5;
/// What a client may have under way in its handshake, in bytes: a chain of certificates as long as TLS allows.
const HANDSHAKE_BYTES: usize = 96 << 10;

thread_local! {
    /// Where the plaintext of a record is put together from several pieces.
    static GATHER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What this side shows and asks for in a TLS handshake.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    kernel: Arc<[CipherSuite]>,
}

impl Acceptor {
    /// An acceptor with these settings. Connections over TCP with one of the suites `kernel` are handed to the kernel;
    /// they are those of [`kernel::suites`], or fewer.
    pub fn new(mut config: ServerConfig, kernel: Vec<CipherSuite>) -> Acceptor {
        config.enable_secret_extraction = !kernel.is_empty();
        Acceptor { config: Arc::new(config), kernel: kernel.into() }
    }
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Acceptor") // nothing of the key
    }
}

/// What a handshake has agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secured {
    /// The version of TLS, such as `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite by its registered name.
    pub cipher: String,
    /// The client's own certificate (DER), if it has shown one: it was verified.
    pub certificate: Option<Vec<u8>>,
    /// The kernel makes and opens the records.
    pub kernel: bool,
}

/// How far a handshake is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It is over: the connection is encrypted.
    Done,
    /// It goes on when there is something to receive.
    Read,
    /// It goes on when the socket takes more.
    Write,
}

/// The TLS side of one connection.
pub(super) struct Session {
    connection: UnbufferedServerConnection,
    /// Cipher suites for which it may be handed to the kernel.
    kernel: Arc<[CipherSuite]>,
    /// Received ciphertext that was not looked at.
    incoming: Bytes,
    /// Where the record ends that is being received, during the handshake.
    boundary: Boundary,
    /// There may be whole records in `incoming`.
    more: bool,
    /// Decrypted, but nobody had room for it.
    plain: Bytes,
    /// Ciphertext that the socket has not taken.
    outgoing: Bytes,
    /// Plaintext bytes in `outgoing` that the writer does not know to be written.
    owed: usize,
    /// The other end has said that it sends nothing more.
    ended: bool,
    failed: Option<rustls::Error>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    /// A session that waits for the client's first message.
    pub(super) fn new(acceptor: &Acceptor) -> io::Result<Session> {
        let connection = UnbufferedServerConnection::new(Arc::clone(&acceptor.config)).map_err(io::Error::other)?;
        Ok(Session {
            connection,
            kernel: Arc::clone(&acceptor.kernel),
            incoming: Bytes::default(),
            boundary: Boundary::default(),
            more: false,
            plain: Bytes::default(),
            outgoing: Bytes::default(),
            owed: 0,
            ended: false,
            failed: None,
        })
    }

    /// Goes on with the handshake as far as the socket allows.
    ///
    /// Receives record by record, so that nothing of what follows the handshake is taken off the socket.
    pub(super) fn handshake(
        &mut self,
        mut recv: impl FnMut(&mut [u8]) -> io::Result<usize>,
        mut send: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> io::Result<Handshake> {
        loop {
            self.advance(&mut []);
            match self.flush(&mut send) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Handshake::Write),
                flushed => flushed?,
            }
            self.check()?;
            if !self.connection.is_handshaking() {
                return Ok(Handshake::Done);
            }
            match self.receive_of_record(&mut recv) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Handshake::Read),
                Err(e) => return Err(e),
            }
        }
    }

    /// Receives what the record that has begun lacks, or its header.
    fn receive_of_record(&mut self, mut recv: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<()> {
        let want = self.boundary.want();
        if self.incoming.len() + want > HANDSHAKE_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the TLS handshake is too long"));
        }
        let room = &mut self.incoming.room(want)[..want];
        match recv(room)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the client left during the TLS handshake")),
            n => {
                self.boundary.arrived(&room[..n]);
                self.incoming.grow(n);
                Ok(())
            }
        }
    }

    /// What was agreed on.
    pub(super) fn secured(&self) -> Secured {
        let version = match self.connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
            _ => "TLSv1.2",
        };
        let suite = self.connection.negotiated_cipher_suite();
        let cipher = suite.and_then(|suite| suite.suite().as_str().map(|name| name.replace("TLS13_", "TLS_")));
        let chain = self.connection.peer_certificates().unwrap_or_default();
        let certificate = chain.first().map(|certificate| certificate.to_vec());
        Secured { version, cipher: cipher.unwrap_or_default(), certificate, kernel: false }
    }

    /// Whether the kernel may take over now that the handshake is done.
    ///
    /// With TLS 1.3 only: the older one has no other keys when those in use are used up.
    pub(super) fn is_for_kernel(&self) -> bool {
        self.connection.protocol_version() == Some(ProtocolVersion::TLSv1_3)
            && self.connection.negotiated_cipher_suite().is_some_and(|suite| self.kernel.contains(&suite.suite()))
            && self.incoming.is_empty()
            && self.plain.is_empty()
            && self.outgoing.is_empty()
    }

    /// Hands the connection to the kernel; `socket` is prepared.
    pub(super) fn into_kernel(self, socket: BorrowedFd<'_>) -> io::Result<Kernel> {
        Kernel::new(self.connection, socket)
    }

    /// Fills `buf` as far as there is something for it; 0 is the end that the other side announced.
    pub(super) fn read(
        &mut self,
        mut recv: impl FnMut(&mut [u8]) -> io::Result<usize>,
        buf: &mut [u8],
    ) -> io::Result<usize> {
        loop {
            let got = self.take(buf);
            if got > 0 || buf.is_empty() || self.ended {
                return Ok(got);
            }
            self.check()?;
            let room = self.incoming.room_within(RECEIVE_BYTES);
            if room.is_empty() {
                let what = "a message of TLS itself is too long";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            match recv(room) {
                Ok(0) => {
                    let what = "the client left without TLS close_notify";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
                }
                Ok(n) => self.incoming.grow(n),
                Err(e) => {
                    self.incoming.release();
                    self.plain.release();
                    return Err(e);
                }
            }
        }
    }

    /// Moves what is there into `buf`: first what was decrypted before.
    fn take(&mut self, buf: &mut [u8]) -> usize {
        let got = self.plain.take_into(buf);
        match got < buf.len() {
            true => got + self.advance(&mut buf[got..]),
            false => got,
        }
    }

    /// Whether something may be read without receiving.
    pub(super) fn is_ready(&self) -> bool {
        self.more || !self.plain.is_empty()
    }

    /// Sends what the socket takes. WouldBlock may leave ciphertext behind: then the next call is to begin with the same
    /// bytes, and is told how many of them the ciphertext stood for when the socket has taken it.
    pub(super) fn write(
        &mut self,
        mut send: impl FnMut(&[u8]) -> io::Result<usize>,
        bufs: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        self.flush(&mut send)?;
        self.check()?;
        if self.owed == 0 {
            self.owed = self.encrypt(bufs)?;
            self.flush(&mut send)?;
        }
        self.outgoing.release();
        Ok(std::mem::take(&mut self.owed))
    }

    /// Encrypts the beginning of `bufs`; returns how many bytes of them.
    fn encrypt(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        // what was received comes first, or its records would be in the way
        self.advance(&mut []);
        self.check()?;
        let status = self.connection.process_tls_records(self.incoming.as_mut_slice());
        let Ok(ConnectionState::WriteTraffic(mut traffic)) = status.state else {
            return Err(io::Error::other("TLS is not ready for data"));
        };
        let mut pieces = Pieces { bufs, at: 0 };
        let mut done = 0;
        let sealed = GATHER.with_borrow_mut(|gather| {
            loop {
                let room = self.outgoing.room_within(SEND_BYTES);
                let most = room.len().saturating_sub(RECORD_OVERHEAD + CONTROL_BYTES).min(RECORD_BYTES);
                let record = pieces.next(most, gather);
                if record.is_empty() {
                    return Ok(done);
                }
                let sealed = traffic.encrypt(record, room)?;
                done += record.len();
                self.outgoing.grow(sealed);
            }
        });
        sealed.map_err(|e| match e {
            EncryptError::EncryptExhausted => {
                self.failed = Some(rustls::Error::EncryptError);
                io::Error::other("the keys of this TLS 1.2 connection are used up")
            }
            e => io::Error::other(e),
        })
    }

    /// Says that nothing more will come, as far as the socket takes it now.
    pub(super) fn close(&mut self, mut send: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        if self.failed.is_none() {
            self.advance(&mut []);
            let status = self.connection.process_tls_records(self.incoming.as_mut_slice());
            if let Ok(ConnectionState::WriteTraffic(mut traffic)) = status.state {
                let sealed = traffic.queue_close_notify(self.outgoing.room(CONTROL_BYTES)).map_err(io::Error::other)?;
                self.outgoing.grow(sealed);
            }
        }
        self.flush(&mut send)
    }

    fn check(&self) -> io::Result<()> {
        outcome(self.failed.as_ref())
    }

    fn flush(&mut self, mut send: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match send(self.outgoing.as_slice())? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => self.outgoing.consume(n),
            }
        }
        Ok(())
    }

    /// Lets rustls look at what was received: plaintext goes into `buf`, and what it has no room for aside; what TLS has to
    /// say for itself is made ready to be sent. Stops when `buf` is full, unless it was empty from the beginning.
    fn advance(&mut self, buf: &mut [u8]) -> usize {
        let mut got = 0;
        self.more = false;
        while self.failed.is_none() {
            if got > 0 && got == buf.len() {
                self.more = !self.incoming.is_empty();
                break;
            }
            let UnbufferedStatus { mut discard, state } =
                self.connection.process_tls_records(self.incoming.as_mut_slice());
            let mut hungry = false;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                let n = record.payload.len().min(buf.len() - got);
                                buf[got..got + n].copy_from_slice(&record.payload[..n]);
                                got += n;
                                self.plain.push(&record.payload[n..]);
                                discard += record.discard;
                            }
                            Err(e) => self.failed = Some(e),
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    let needed = match data.encode(&mut []) {
                        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => required_size,
                        _ => 0,
                    };
                    match data.encode(self.outgoing.room(needed)) {
                        Ok(n) => self.outgoing.grow(n),
                        Err(e) => self.failed = Some(rustls::Error::General(e.to_string())),
                    }
                }
                // it is in `outgoing`, and leaves in this order
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                Ok(ConnectionState::PeerClosed) => self.ended = true,
                Ok(ConnectionState::Closed) => {
                    self.ended = true;
                    hungry = true;
                }
                Ok(ConnectionState::WriteTraffic(_) | ConnectionState::BlockedHandshake) => hungry = true,
                // early data is never accepted, so there is no such state
                Ok(_) => self.failed = Some(rustls::Error::General("unexpected early data".into())),
                Err(e) => self.failed = Some(e),
            }
            self.incoming.consume(discard);
            if self.failed.is_some() {
                self.last_words();
            }
            if hungry {
                break;
            }
        }
        got
    }

    /// Makes the alert ready that tells the other end what is wrong with what it sent.
    fn last_words(&mut self) {
        if !self.connection.wants_write() {
            return;
        }
        let status = self.connection.process_tls_records(self.incoming.as_mut_slice());
        if let Ok(ConnectionState::EncodeTlsData(mut data)) = status.state
            && let Ok(n) = data.encode(self.outgoing.room(CONTROL_BYTES))
        {
            self.outgoing.grow(n);
        }
    }
}

/// What is told everybody who uses a connection that has failed.
fn outcome(failed: Option<&rustls::Error>) -> io::Result<()> {
    match failed {
        None => Ok(()),
        Some(e) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {e}"))),
    }
}

/// Where one record ends, told from the bytes as they arrive: rustls changes those it was shown.
#[derive(Default)]
struct Boundary {
    header: [u8; HEADER_BYTES],
    have: usize,
    /// What the record lacks behind its header.
    left: usize,
}

impl Boundary {
    /// Bytes up to the end of the header or, with a whole one, of the record.
    fn want(&self) -> usize {
        match self.left {
            0 => HEADER_BYTES - self.have,
            left => left,
        }
    }

    /// That many or fewer have arrived.
    fn arrived(&mut self, bytes: &[u8]) {
        if self.left > 0 {
            self.left -= bytes.len();
            return;
        }
        self.header[self.have..self.have + bytes.len()].copy_from_slice(bytes);
        self.have += bytes.len();
        if self.have == HEADER_BYTES {
            self.have = 0;
            self.left = usize::from(u16::from_be_bytes([self.header[3], self.header[4]]));
        }
    }
}

/// What is to be encrypted, record by record.
struct Pieces<'a> {
    bufs: &'a [IoSlice<'a>],
    /// Bytes of the first buffer that are taken.
    at: usize,
}

impl<'a> Pieces<'a> {
    /// The next bytes, at most `most`: as they are when they lie together, else put together in `gather`.
    fn next<'b>(&mut self, most: usize, gather: &'b mut Vec<u8>) -> &'b [u8]
    where
        'a: 'b,
    {
        gather.clear();
        while gather.len() < most {
            let Some((first, others)) = self.bufs.split_first() else { break };
            let rest = &first[self.at..];
            let take = rest.len().min(most - gather.len());
            if take < rest.len() {
                self.at += take;
            } else {
                self.bufs = others;
                self.at = 0;
            }
            if gather.is_empty() && (take == most || self.bufs.is_empty()) {
                return &rest[..take];
            }
            gather.extend_from_slice(&rest[..take]);
        }
        gather
    }
}

#[cfg(test)]
mod tests;
