//! TLS records that the kernel makes and opens on a TCP socket: what is read and written there is plaintext, copied no
//! more often than without TLS. Follows the kernel's Documentation/networking/tls.rst and RFC 8446.
//!
//! rustls makes the handshake and derives the keys; here the kernel gets them, and records that are not data are answered.
//! Promises: as those of `Session` beside it; a connection taken over never ends because its keys are used up, for a kernel
//! that cannot change keys is given none ([`suites`]).

use nix::errno::Errno;
use nix::sys::socket::sockopt::{SocketError, TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SetSockOpt, TlsGetRecordType};
use nix::sys::socket::{getsockopt, recv, recvmsg, sendmsg, setsockopt};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::{AlertDescription, CipherSuite, ConnectionTrafficSecrets, PeerMisbehaved};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Plaintext of one record, in bytes, at most.
const RECORD_BYTES: usize = 16 << 10;
/// Room for a record that is not data, in bytes: an alert has two, an update of keys five, and nothing else may come.
const MESSAGE_BYTES: usize = 32;
/// Records that are not data and follow each other, at most: none of them gets a client any further.
const MAX_MESSAGES: u32 = 32;
/// Type of the records of alerts (RFC 8446, 5.1).
const ALERT: u8 = 21;
/// Type of the records of a handshake and what follows it (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;
/// A KeyUpdate message but for its last byte (RFC 8446, 4 and 4.6.3).
const KEY_UPDATE: [u8; 4] = [24, 0, 0, 1];

/// The cipher suites of TLS 1.3 that this kernel takes over. Errors: why it takes none.
///
/// Asks the kernel with connections over the loopback device, which may make it load a module.
pub fn suites() -> Result<Vec<CipherSuite>, Reason> {
    let candidates = [
        (CipherSuite::TLS13_AES_128_GCM_SHA256, aes_128_gcm([0; 16], [0; 12], 0)),
        (CipherSuite::TLS13_AES_256_GCM_SHA384, aes_256_gcm([0; 32], [0; 12], 0)),
        (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, chacha20_poly1305([0; 32], [0; 12], 0)),
    ];
    let mut found = Vec::new();
    let mut reason = None;
    for (suite, keys) in candidates {
        match changes_keys(&keys) {
            Ok(()) => found.push(suite),
            Err(e) => reason = reason.or(Some(e)),
        }
    }
    match reason {
        Some(reason) if found.is_empty() => Err(reason),
        _ => Ok(found),
    }
}

/// Why the kernel does not take connections over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It has no TLS, or we may not load its module.
    Absent,
    /// The keys that a connection begins with are all that it can have.
    KeysStay,
    /// Another one, in the kernel's words.
    Other(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Absent => f.write_str("the kernel has no TLS loaded (modprobe tls)"),
            Reason::KeysStay => f.write_str("the kernel cannot change keys (Linux can since 6.14)"),
            Reason::Other(what) => write!(f, "the kernel refuses TLS: {what}"),
        }
    }
}

/// Whether a socket takes keys in both directions, and others after them.
fn changes_keys(keys: &TlsCryptoInfo) -> Result<(), Reason> {
    let other = |what: &dyn fmt::Display| Reason::Other(what.to_string());
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok::<_, io::Error>((near, listener.accept()?.0))
    };
    let (near, _far) = pair().map_err(|e| other(&e))?;
    prepare(near.as_fd()).map_err(|e| if e == Errno::ENOENT { Reason::Absent } else { other(&e.desc()) })?;
    let set = || setsockopt(&near, TcpTlsTx, keys).and_then(|()| setsockopt(&near, TcpTlsRx, keys));
    set().map_err(|e| other(&e.desc()))?;
    set().map_err(|e| if e == Errno::EBUSY { Reason::KeysStay } else { other(&e.desc()) })
}

/// Makes a socket one of TLS, which passes everything through until it has keys.
pub(in crate::ring) fn prepare(socket: BorrowedFd<'_>) -> nix::Result<()> {
    setsockopt(&socket, TcpUlp::default(), b"tls")
}

/// The TLS side of a connection whose records are the kernel's.
pub(in crate::ring) struct Kernel {
    connection: KernelConnection<ServerConnectionData>,
    /// Records sent under the present key, at most.
    sealed: u64,
    /// With so many it is time for another key.
    limit: u64,
    /// The other end wants us to have another key before we send more data.
    asked: bool,
    /// Records that were not data, since the last one that was.
    messages: u32,
    /// The other end has said that it sends nothing more.
    ended: bool,
    failed: Option<rustls::Error>,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kernel")
    }
}

impl Kernel {
    /// Takes a connection over after its handshake; `socket` is prepared.
    pub(super) fn new(connection: UnbufferedServerConnection, socket: BorrowedFd<'_>) -> io::Result<Kernel> {
        let (secrets, connection) = connection.dangerous_into_kernel_connection().map_err(io::Error::other)?;
        install(socket, TcpTlsTx, secrets.tx)?;
        install(socket, TcpTlsRx, secrets.rx)?;
        let suite = connection.negotiated_cipher_suite();
        // half of what rustls would allow: a few records more or less make no difference
        let limit = suite.tls13().map_or(0, |suite| suite.common.confidentiality_limit / 2);
        Ok(Kernel { connection, sealed: 0, limit, asked: false, messages: 0, ended: false, failed: None })
    }

    /// Fills `buf` as far as there is something for it; 0 is the end that the other side announced.
    pub(in crate::ring) fn read(&mut self, socket: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
        while !self.ended && !buf.is_empty() {
            self.check()?;
            match recv(socket.as_raw_fd(), buf, MsgFlags::empty()) {
                Ok(0) => {
                    let what = "the client left without TLS close_notify";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
                }
                Ok(n) => {
                    self.messages = 0;
                    return Ok(n);
                }
                Err(Errno::EINTR) => {}
                // so the kernel tells who does not ask for types of records that one has come that is not data
                Err(Errno::EIO) => self.message(socket)?,
                Err(Errno::EBADMSG) => self.refuse(socket, rustls::Error::DecryptError, AlertDescription::BadRecordMac),
                Err(Errno::EMSGSIZE) => {
                    self.refuse(socket, rustls::Error::PeerSentOversizedRecord, AlertDescription::RecordOverflow);
                }
                Err(Errno::EINVAL) => {
                    let what = rustls::Error::General("what came is no record of TLS".to_owned());
                    self.refuse(socket, what, AlertDescription::DecodeError);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(0)
    }

    /// Receives a record that is not data.
    fn message(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let mut bytes = [0; MESSAGE_BYTES];
        let mut control = nix::cmsg_space!(u8);
        let mut room = [IoSliceMut::new(&mut bytes)];
        let received = recvmsg::<()>(socket.as_raw_fd(), &mut room, Some(&mut control), MsgFlags::empty())?;
        let len = received.bytes;
        let kind = received.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
            _ => None,
        });
        self.messages += 1;
        let unexpected = |what: PeerMisbehaved| (rustls::Error::from(what), AlertDescription::UnexpectedMessage);
        let (error, alert) = match (kind, &bytes[..len]) {
            _ if self.messages > MAX_MESSAGES => unexpected(PeerMisbehaved::TooManyKeyUpdateRequests),
            (Some(TlsGetRecordType::Alert), &[_, what]) => match AlertDescription::from(what) {
                AlertDescription::CloseNotify => {
                    self.ended = true;
                    return Ok(());
                }
                // close_notify follows
                AlertDescription::UserCanceled => return Ok(()),
                what => {
                    self.failed = Some(rustls::Error::AlertReceived(what));
                    return Ok(());
                }
            },
            (Some(TlsGetRecordType::Handshake), &[a, b, c, d, wanted @ (0 | 1)]) if [a, b, c, d] == KEY_UPDATE => {
                let keys = self.connection.update_rx_secret().map_err(io::Error::other)?;
                self.asked |= wanted == 1;
                return install(socket, TcpTlsRx, keys);
            }
            _ => {
                let what = "a record that does not belong behind a handshake".to_owned();
                (rustls::Error::General(what), AlertDescription::UnexpectedMessage)
            }
        };
        self.refuse(socket, error, alert);
        Ok(())
    }

    /// Sends what fits, in the order of the slices. WouldBlock: nothing did.
    pub(in crate::ring) fn write(&mut self, socket: BorrowedFd<'_>, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.check()?;
        if self.asked || self.sealed >= self.limit {
            self.change_key(socket)?;
        }
        loop {
            match sendmsg::<()>(socket.as_raw_fd(), bufs, &[], MsgFlags::MSG_NOSIGNAL, None) {
                Ok(n) => {
                    self.sealed += 1 + (n / RECORD_BYTES) as u64;
                    return Ok(n);
                }
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Has what follows sealed with another key. WouldBlock: it is the same still.
    fn change_key(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let [a, b, c, d] = KEY_UPDATE;
        send_record(socket, HANDSHAKE, &[a, b, c, d, 0])?;
        let keys = self.connection.update_tx_secret().map_err(io::Error::other)?;
        install(socket, TcpTlsTx, keys).inspect_err(|_| {
            // the other end expects another key now
            self.failed = Some(rustls::Error::EncryptError);
        })?;
        (self.sealed, self.asked) = (0, false);
        Ok(())
    }

    /// Says that nothing more will come, if the socket takes that now.
    pub(in crate::ring) fn close(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if self.failed.is_some() {
            return Ok(());
        }
        // level "warning", as all alerts of this kind have
        send_record(socket, ALERT, &[1, AlertDescription::CloseNotify.into()])
    }

    /// Ends the connection because of what the other end sent, and says so if the socket takes that now.
    fn refuse(&mut self, socket: BorrowedFd<'_>, error: rustls::Error, alert: AlertDescription) {
        // the socket's own error would keep the words from leaving, until somebody has asked for it
        let _ = getsockopt(&socket, SocketError);
        let _ = send_record(socket, ALERT, &[2, alert.into()]);
        self.failed = Some(error);
    }

    /// Sets after how many records it takes another key.
    #[cfg(test)]
    pub(in crate::ring) fn set_limit(&mut self, records: u64) {
        self.limit = records;
    }

    fn check(&self) -> io::Result<()> {
        super::outcome(self.failed.as_ref())
    }
}

/// Hands the kernel the keys of one direction.
fn install(
    socket: BorrowedFd<'_>,
    direction: impl SetSockOpt<Val = TlsCryptoInfo>,
    (sequence, secrets): (u64, ConnectionTrafficSecrets),
) -> io::Result<()> {
    let keys = match &secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => aes_128_gcm(sized(key)?, sized(iv)?, sequence),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => aes_256_gcm(sized(key)?, sized(iv)?, sequence),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => chacha20_poly1305(sized(key)?, sized(iv)?, sequence),
        _ => return Err(io::Error::other("a cipher that the kernel was not asked about")),
    };
    Ok(setsockopt(&socket, direction, &keys)?)
}

fn sized<const N: usize>(bytes: &impl AsRef<[u8]>) -> io::Result<[u8; N]> {
    bytes.as_ref().try_into().map_err(|_| io::Error::other("a key of an unexpected length"))
}

fn info(cipher_type: u16) -> libc::tls_crypto_info {
    libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type }
}

/// The nonce in the parts that the kernel wants it in.
fn parts<const HEAD: usize, const TAIL: usize>(iv: [u8; 12]) -> ([u8; HEAD], [u8; TAIL]) {
    (std::array::from_fn(|i| iv[i]), std::array::from_fn(|i| iv[HEAD + i]))
}

fn aes_128_gcm(key: [u8; 16], iv: [u8; 12], sequence: u64) -> TlsCryptoInfo {
    let info = info(libc::TLS_CIPHER_AES_GCM_128);
    let ((salt, iv), rec_seq) = (parts(iv), sequence.to_be_bytes());
    TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 { info, iv, key, salt, rec_seq })
}

fn aes_256_gcm(key: [u8; 32], iv: [u8; 12], sequence: u64) -> TlsCryptoInfo {
    let info = info(libc::TLS_CIPHER_AES_GCM_256);
    let ((salt, iv), rec_seq) = (parts(iv), sequence.to_be_bytes());
    TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 { info, iv, key, salt, rec_seq })
}

fn chacha20_poly1305(key: [u8; 32], iv: [u8; 12], sequence: u64) -> TlsCryptoInfo {
    let info = info(libc::TLS_CIPHER_CHACHA20_POLY1305);
    let rec_seq = sequence.to_be_bytes();
    TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 { info, iv, key, salt: [], rec_seq })
}

/// What names the type of a record to be sent: nix has no word for it.
#[repr(C)]
struct RecordType {
    header: libc::cmsghdr,
    kind: u8,
}

/// Sends a record that is not data: all of it or, with an error, nothing.
fn send_record(socket: BorrowedFd<'_>, kind: u8, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: of these plain C structures of integers and pointers, all zeroes is a valid value.
    let (mut control, mut message) = unsafe { (std::mem::zeroed::<RecordType>(), std::mem::zeroed::<libc::msghdr>()) };
    control.header.cmsg_level = libc::SOL_TLS;
    control.header.cmsg_type = libc::TLS_SET_RECORD_TYPE;
    control.header.cmsg_len = size_of::<libc::cmsghdr>() + 1;
    control.kind = kind;
    let mut piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of::<RecordType>();
    // SAFETY: the message names one piece and one control message, which live until the call returns; the kernel reads
    // them only.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    match usize::try_from(sent) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(io::Error::other("a record was sent in part")),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests;
