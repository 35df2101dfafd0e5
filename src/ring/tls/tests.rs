//! A session against rustls' own client, through a wire that takes and gives as little as it likes.

use super::*;
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use rustls::crypto::CryptoProvider;
use rustls::crypto::cipher::{OutboundChunks, OutboundPlainMessage};
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, ConnectionTrafficSecrets, ContentType, RootCertStore};
use rustls::{SupportedCipherSuite, SupportedProtocolVersion};
use std::collections::VecDeque;
use std::io::{Read, Write};

type Version = &'static SupportedProtocolVersion;

/// Both ends' settings.
pub(super) fn settings(provider: CryptoProvider, version: Version) -> (ServerConfig, ClientConfig) {
    let issuer = CertifiedIssuer::self_signed(CertificateParams::default(), KeyPair::generate().unwrap());
    // one certificate is its own authority: who vouches for whom is tested elsewhere
    let key = KeyPair::generate().unwrap();
    let issuer = issuer.unwrap();
    let certificate = CertificateParams::new(vec!["server".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(provider);
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        .unwrap();
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    let mut roots = RootCertStore::empty();
    roots.add(issuer.der().clone()).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    (server, client)
}

fn pair(version: Version) -> (Acceptor, Arc<ClientConfig>) {
    let (server, client) = settings(rustls::crypto::ring::default_provider(), version);
    (Acceptor::new(server, Vec::new()), Arc::new(client))
}

/// The bytes under way, and how many of them move at a time.
#[derive(Default)]
struct Wire {
    to_server: VecDeque<u8>,
    to_client: VecDeque<u8>,
    /// What the server's socket takes before it is full.
    room: usize,
    step: usize,
}

struct Talk {
    session: Session,
    client: ClientConnection,
    wire: Wire,
}

fn would_block<T>() -> io::Result<T> {
    Err(io::ErrorKind::WouldBlock.into())
}

impl Wire {
    fn recv(from: &mut VecDeque<u8>, step: usize, buf: &mut [u8]) -> io::Result<usize> {
        match from.len().min(step).min(buf.len()) {
            0 => would_block(),
            n => {
                from.drain(..n).zip(buf).for_each(|(byte, place)| *place = byte);
                Ok(n)
            }
        }
    }

    fn send(to: &mut VecDeque<u8>, room: &mut usize, step: usize, bytes: &[u8]) -> io::Result<usize> {
        match bytes.len().min(step).min(*room) {
            0 => would_block(),
            n => {
                *room -= n;
                to.extend(&bytes[..n]);
                Ok(n)
            }
        }
    }
}

impl Talk {
    fn new(version: Version, step: usize) -> Talk {
        let (acceptor, client) = pair(version);
        let client = ClientConnection::new(client, ServerName::try_from("server").unwrap()).unwrap();
        let wire = Wire { room: usize::MAX, step, ..Wire::default() };
        Talk { session: Session::new(&acceptor).unwrap(), client, wire }
    }

    /// After the handshake.
    fn ready(version: Version, step: usize) -> Talk {
        let mut talk = Talk::new(version, step);
        while talk.handshake().unwrap() != Handshake::Done || talk.client.is_handshaking() {
            talk.client_turn();
        }
        talk
    }

    fn handshake(&mut self) -> io::Result<Handshake> {
        let Wire { to_server, to_client, room, step } = &mut self.wire;
        self.session
            .handshake(|buf| Wire::recv(to_server, *step, buf), |bytes| Wire::send(to_client, room, *step, bytes))
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Wire { to_server, step, .. } = &mut self.wire;
        self.session.read(|buf| Wire::recv(to_server, *step, buf), buf)
    }

    fn write(&mut self, bufs: &[&[u8]]) -> io::Result<usize> {
        let Wire { to_client, room, step, .. } = &mut self.wire;
        let slices: Vec<_> = bufs.iter().map(|b| IoSlice::new(b)).collect();
        self.session.write(|bytes| Wire::send(to_client, room, *step, bytes), &slices)
    }

    /// The client sends what it has and receives what is there.
    fn client_turn(&mut self) {
        let mut out = Vec::new();
        while self.client.wants_write() {
            self.client.write_tls(&mut out).unwrap();
        }
        self.wire.to_server.extend(out);
        while self.client.wants_read() && !self.wire.to_client.is_empty() {
            self.client.read_tls(&mut self.wire.to_client).unwrap();
            if self.client.process_new_packets().is_err() {
                return;
            }
        }
    }

    fn client_sends(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let n = self.client.writer().write(bytes).unwrap();
            bytes = &bytes[n..];
            self.client_turn();
        }
    }

    fn client_receives(&mut self, into: &mut Vec<u8>) {
        self.client_turn();
        let mut buf = [0; 5000];
        while let Ok(n @ 1..) = self.client.reader().read(&mut buf) {
            into.extend(&buf[..n]);
            self.client_turn();
        }
    }
}

pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

const VERSIONS: [Version; 2] = [&TLS12, &TLS13];

#[test]
fn a_handshake_takes_nothing_that_follows_it() {
    for version in VERSIONS {
        for step in [1, 7, usize::MAX] {
            let mut talk = Talk::new(version, step);
            let mut done = false;
            while !done {
                done = talk.handshake().unwrap() == Handshake::Done;
                talk.client_turn();
                if !talk.client.is_handshaking() && !talk.wire.to_server.is_empty() {
                    // right behind the client's last message
                    talk.client_sends(b"hello");
                    while talk.handshake().unwrap() != Handshake::Done {}
                    assert!(talk.session.incoming.is_empty() && talk.session.plain.is_empty());
                    break;
                }
            }
            if done {
                talk.client_sends(b"hello");
            }
            let mut buf = [0; 100];
            let mut got = 0;
            while got < 5 {
                match talk.read(&mut buf[got..]) {
                    Ok(n) => got += n,
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
            assert_eq!(&buf[..got], b"hello");
            let secured = talk.session.secured();
            assert_eq!(secured.version, if std::ptr::eq(version, &TLS13) { "TLSv1.3" } else { "TLSv1.2" });
            assert!(secured.cipher.starts_with("TLS_") && secured.certificate.is_none(), "{secured:?}");
        }
    }
}

#[test]
fn bytes_arrive_whatever_the_socket_takes_and_gives() {
    for version in VERSIONS {
        for (step, len) in [(1, 3000), (977, 300_000), (70_000, 1 << 20)] {
            let mut talk = Talk::ready(version, step);
            let data = pattern(len);
            talk.client_sends(&data);
            let mut got: Vec<u8> = Vec::new();
            let mut sizes = [1, 28, 16384, 100, 200_000].into_iter().cycle();
            while got.len() < data.len() {
                let mut buf = vec![0; sizes.next().unwrap()];
                match talk.read(&mut buf) {
                    Ok(n) => got.extend(&buf[..n]),
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
            assert!(got == data);
            assert!(!talk.session.is_ready());
            // the other way, in pieces of all sizes
            let mut back = Vec::new();
            let mut sent = 0;
            while sent < data.len() {
                let rest = &data[sent..];
                let cut = rest.len().min(16);
                talk.wire.room = step * 3 / 2 + 1;
                match talk.write(&[&rest[..cut], &[], &rest[cut..]]) {
                    Ok(n) => sent += n,
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
                if sent == data.len() {
                    assert!(talk.session.outgoing.is_empty(), "who is told so may close the socket");
                }
                talk.client_receives(&mut back);
            }
            assert!(back == data);
            assert!(talk.session.outgoing.buf_len() == 0, "an idle session holds no buffers");
        }
    }
}

#[test]
fn what_the_socket_has_not_taken_is_not_written() {
    let mut talk = Talk::ready(&TLS13, usize::MAX);
    talk.wire.room = 10;
    let data = pattern(1000);
    assert_eq!(talk.write(&[&data]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(talk.write(&[&data]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    talk.wire.room = usize::MAX;
    // more has been queued meanwhile: it is not in that ciphertext
    assert_eq!(talk.write(&[&data, b"more"]).unwrap(), 1000);
    assert_eq!(talk.write(&[b"more"]).unwrap(), 4);
    let mut got: Vec<u8> = Vec::new();
    talk.client_receives(&mut got);
    assert_eq!(got, [&data[..], b"more"].concat());
}

#[test]
fn an_end_is_announced_or_an_error() {
    for version in VERSIONS {
        let mut talk = Talk::ready(version, usize::MAX);
        talk.client_sends(b"last");
        talk.client.send_close_notify();
        talk.client_turn();
        let mut buf = [0; 10];
        assert_eq!(talk.read(&mut buf).unwrap(), 4);
        assert_eq!(talk.read(&mut buf).unwrap(), 0);
        assert_eq!(talk.read(&mut buf).unwrap(), 0);
        let Talk { session, wire, .. } = &mut talk;
        session.close(|bytes| Wire::send(&mut wire.to_client, &mut wire.room, usize::MAX, bytes)).unwrap();
        talk.client_turn();
        assert_eq!(talk.client.reader().read(&mut buf).unwrap(), 0, "announced here too");

        let mut talk = Talk::ready(version, usize::MAX);
        talk.client_sends(b"last");
        assert_eq!(talk.read(&mut buf).unwrap(), 4);
        let cut = talk.session.read(|_| Ok(0), &mut buf);
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn damage_ends_it_for_good_and_the_client_is_told() {
    for version in VERSIONS {
        for garbage in
            [&b"\x17\x03\x03\x00\x20garbage garbage garbage garbage "[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 99]]
        {
            let mut talk = Talk::ready(version, usize::MAX);
            talk.client_sends(b"good");
            talk.wire.to_server.extend(garbage);
            talk.client_sends(b"behind");
            let mut buf = [0; 100];
            assert_eq!(talk.read(&mut buf).unwrap(), 4);
            for _ in 0..3 {
                assert_eq!(talk.read(&mut buf).unwrap_err().kind(), io::ErrorKind::InvalidData);
                assert_eq!(talk.write(&[b"x"]).unwrap_err().kind(), io::ErrorKind::InvalidData);
            }
            assert!(!talk.wire.to_client.is_empty());
            talk.client.read_tls(&mut talk.wire.to_client).unwrap();
            let told = talk.client.process_new_packets();
            assert!(matches!(told, Err(rustls::Error::AlertReceived(_))), "{told:?}");
        }
    }
}

#[test]
fn garbage_instead_of_a_handshake_is_an_error() {
    for garbage in [
        &b"IHAVEOPT\0\0\0\x03\0\0\0\0"[..],
        &[0; 50],
        &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3],
        b"\x16\x03\x01\0\0\0\0\0\0\0",
    ] {
        let mut talk = Talk::new(&TLS13, 3);
        talk.wire.to_server.extend(garbage);
        let mut outcome = Ok(Handshake::Read);
        for _ in 0..50 {
            outcome = talk.handshake();
            if outcome.is_err() {
                break;
            }
        }
        assert!(outcome.is_err() || garbage[0] == 0x16, "{garbage:?}: {outcome:?}");
    }
    // a first message that never ends
    let mut talk = Talk::new(&TLS13, usize::MAX);
    let mut ended = None;
    for _ in 0..100 {
        let record = [&[0x16, 3, 1, 0x20, 0][..], &[1, 0, 0xff, 0xff], &[0; 0x1ffc]].concat();
        talk.wire.to_server.extend(record);
        if let Err(e) = talk.handshake() {
            ended = Some(e);
            break;
        }
    }
    assert!(ended.is_some() && talk.session.incoming.len() <= HANDSHAKE_BYTES);
}

#[test]
fn keys_are_renewed_on_the_way() {
    let mut talk = Talk::ready(&TLS13, 1000);
    for round in 0..100 {
        talk.client.refresh_traffic_keys().unwrap();
        let data = pattern(3000 + round);
        talk.client_sends(&data);
        let mut got: Vec<u8> = Vec::new();
        while got.len() < data.len() {
            let mut buf = vec![0; 5000];
            match talk.read(&mut buf) {
                Ok(n) => got.extend(&buf[..n]),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert!(got == data);
        let mut back = Vec::new();
        assert_eq!(talk.write(&[&data]).unwrap(), data.len());
        talk.client_receives(&mut back);
        assert!(back == data);
    }
}

#[test]
fn a_flood_of_messages_without_data_is_cut_off() {
    let mut talk = Talk::ready(&TLS13, usize::MAX);
    let mut outcome = Ok(0);
    for _ in 0..1000 {
        talk.client.refresh_traffic_keys().unwrap();
        talk.client_turn();
        outcome = talk.read(&mut [0; 10]);
        if !matches!(&outcome, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            break;
        }
    }
    assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert!(talk.session.outgoing.len() < 4096);
}

/// Seals any record, as a client does that does not go by the rules.
pub(super) struct Forger {
    sealer: Box<dyn rustls::crypto::cipher::MessageEncrypter>,
    sequence: u64,
}

impl Forger {
    pub(super) fn new(client: ClientConnection) -> Forger {
        let suite = match client.negotiated_cipher_suite().unwrap() {
            SupportedCipherSuite::Tls13(suite) => suite,
            SupportedCipherSuite::Tls12(_) => unreachable!(),
        };
        let (sequence, secrets) = client.dangerous_extract_secrets().unwrap().tx;
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv }) = secrets
        else {
            unreachable!()
        };
        Forger { sealer: suite.aead_alg.encrypter(key, iv), sequence }
    }

    pub(super) fn seal(&mut self, typ: ContentType, bytes: &[u8]) -> Vec<u8> {
        let version = ProtocolVersion::TLSv1_2;
        let plain = OutboundPlainMessage { typ, version, payload: OutboundChunks::Single(bytes) };
        self.sequence += 1;
        self.sealer.encrypt(plain, self.sequence - 1).unwrap().encode()
    }
}

#[test]
fn a_message_of_tls_in_fragments_stops_nothing_meanwhile() {
    let talk = Talk::ready(&TLS13, usize::MAX);
    let Talk { mut session, client, .. } = talk;
    let mut forger = Forger::new(client);
    let mut sent = Vec::new();
    let mut step = |session: &mut Session, bytes: Vec<u8>| {
        let mut bytes = VecDeque::from(bytes);
        let got = session.read(|buf| Wire::recv(&mut bytes, usize::MAX, buf), &mut [0; 100]);
        let wrote = session.write(
            |out| {
                sent.extend_from_slice(out);
                Ok(out.len())
            },
            &[IoSlice::new(b"reply")],
        );
        (got.map_err(|e| e.kind()), wrote.map_err(|e| e.kind()))
    };
    let blocked = Err(io::ErrorKind::WouldBlock);
    // an update of keys (type 24, 1 byte: not asked for in return), a byte at a time, with replies in between
    for byte in [24, 0, 0, 1] {
        let record = forger.seal(ContentType::Handshake, &[byte]);
        assert_eq!(step(&mut session, record), (blocked, Ok(5)));
    }
    // anything else in between is against the rules
    let record = forger.seal(ContentType::ApplicationData, b"data");
    let (got, wrote) = step(&mut session, record);
    assert_eq!((got, wrote), (Err(io::ErrorKind::InvalidData), Err(io::ErrorKind::InvalidData)));
}

#[test]
fn a_message_of_tls_that_never_ends_is_cut_off() {
    let Talk { mut session, client, .. } = Talk::ready(&TLS13, usize::MAX);
    let mut forger = Forger::new(client);
    let mut outcome = Ok(0);
    for _ in 0..10_000 {
        // it says that it has 60,000 bytes
        let mut bytes = VecDeque::from(forger.seal(ContentType::Handshake, &[24, 0, 0xea, 0x60]));
        outcome = session.read(|buf| Wire::recv(&mut bytes, usize::MAX, buf), &mut [0; 100]);
        if !matches!(&outcome, Err(e) if e.kind() == io::ErrorKind::WouldBlock) {
            break;
        }
    }
    assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert!(session.incoming.len() <= RECEIVE_BYTES);
}
