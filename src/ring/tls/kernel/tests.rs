//! A connection whose records are the kernel's, against rustls' own client. All but the last test run in the guest that the
//! last one starts: few machines have a kernel that does this.

use super::super::tests::{Forger, pattern, settings};
use super::super::{Acceptor, Handshake};
use super::*;
use crate::ring::{Stream, run};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, ContentType, StreamOwned, SupportedCipherSuite};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

type Client = StreamOwned<ClientConnection, TcpStream>;

/// A client and the server's stream, connected; the handshake is over.
async fn connected(suite: SupportedCipherSuite) -> (Client, Stream) {
    let version = if suite.tls13().is_some() { &TLS13 } else { &TLS12 };
    let (server, client) = settings(CryptoProvider { cipher_suites: vec![suite], ..default_provider() }, version);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let client = thread::spawn(move || {
        let connection = ClientConnection::new(Arc::new(client), ServerName::try_from("server").unwrap()).unwrap();
        let mut client = StreamOwned::new(connection, TcpStream::connect(address).unwrap());
        while client.conn.is_handshaking() {
            client.conn.complete_io(&mut client.sock).unwrap();
        }
        client.sock.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        client
    });
    let stream = Stream::from_std(listener.accept().unwrap().0).unwrap();
    stream.start_tls(&Acceptor::new(server, suites().unwrap())).unwrap();
    loop {
        match stream.try_handshake().unwrap() {
            Handshake::Done => break,
            Handshake::Read => stream.readable().await.unwrap(),
            Handshake::Write => stream.writable().await.unwrap(),
        }
    }
    (client.join().unwrap(), stream)
}

async fn with_kernel() -> (Client, Stream) {
    let (client, stream) = connected(cipher_suite::TLS13_AES_256_GCM_SHA384).await;
    assert!(stream.secured().unwrap().kernel);
    (client, stream)
}

async fn read(stream: &Stream, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.try_read(buf) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            outcome => return outcome,
        }
    }
}

async fn read_exact(stream: &Stream, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut got = 0;
    while got < len {
        match read(stream, &mut bytes[got..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => got += n,
        }
    }
    Ok(bytes)
}

async fn write_all(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // in pieces, as a reply's header and its data are
        let (head, tail) = bytes.split_at(bytes.len().min(28));
        match stream.try_write_vectored(&[IoSlice::new(head), IoSlice::new(tail)]) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            outcome => bytes = &bytes[outcome?..],
        }
    }
    Ok(())
}

/// One of the kernel's counters.
fn count(name: &str) -> u64 {
    let all = fs::read_to_string("/proc/net/tls_stat").unwrap();
    let line = all.lines().find(|line| line.split_whitespace().next() == Some(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The error that ends the connection, told again and again, in both directions.
async fn failed(stream: &Stream) -> String {
    let mut buf = [0; 100];
    let error = loop {
        match read(stream, &mut buf).await {
            Ok(n) => assert!(n > 0, "an end instead of an error"),
            Err(e) => break e,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    assert_eq!(stream.try_read(&mut buf).unwrap_err().kind(), io::ErrorKind::InvalidData);
    assert_eq!(stream.try_write_vectored(&[IoSlice::new(b"x")]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    error.to_string()
}

#[test]
#[ignore = "runs in the guest"]
fn data_passes_with_every_cipher() {
    const LEN: usize = 3 << 20;
    let sent = (count("TlsTxSw"), count("TlsRxSw"));
    // one of TLS 1.2, and all that the kernel has
    for suite in [
        cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        cipher_suite::TLS13_AES_128_GCM_SHA256,
        cipher_suite::TLS13_AES_256_GCM_SHA384,
        cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ] {
        run(async {
            let (client, stream) = connected(suite).await;
            assert_eq!(stream.secured().unwrap().kernel, suite.tls13().is_some(), "{suite:?}");
            let client = thread::spawn(move || {
                let mut client = client;
                for piece in pattern(LEN).chunks(100_003) {
                    client.write_all(piece).unwrap();
                }
                // late enough for the server to fill the socket
                thread::sleep(Duration::from_millis(50));
                let mut back = vec![0; LEN];
                client.read_exact(&mut back).unwrap();
                assert!(back == pattern(LEN));
                client.conn.send_close_notify();
                client.conn.complete_io(&mut client.sock).unwrap();
                assert_eq!(client.read(&mut [0; 10]).unwrap(), 0, "an orderly end");
            });
            let got = read_exact(&stream, LEN).await.unwrap();
            assert!(got == pattern(LEN));
            write_all(&stream, &got).await.unwrap();
            assert_eq!(read(&stream, &mut [0; 10]).await.unwrap(), 0);
            stream.shutdown(Shutdown::Write).unwrap();
            client.join().unwrap();
        })
        .unwrap();
    }
    // those of `suites` among them
    assert!(count("TlsTxSw") >= sent.0 + 3 && count("TlsRxSw") >= sent.1 + 3);
}

#[test]
#[ignore = "runs in the guest"]
fn what_comes_right_behind_the_handshake_is_the_kernels() {
    run(async {
        for _ in 0..20 {
            let (mut client, stream) = with_kernel().await;
            client.write_all(b"hello").unwrap();
            assert_eq!(read_exact(&stream, 5).await.unwrap(), b"hello");
        }
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn keys_change_on_the_way() {
    const ROUNDS: usize = 50;
    run(async {
        let (mut client, stream) = with_kernel().await;
        let before = (count("TlsTxRekeyOk"), count("TlsRxRekeyOk"));
        let client = thread::spawn(move || {
            for round in 0..ROUNDS {
                client.conn.refresh_traffic_keys().unwrap();
                let data = pattern(40_000 + round);
                client.write_all(&data).unwrap();
                let mut back = vec![0; data.len()];
                client.read_exact(&mut back).unwrap();
                assert!(back == data);
            }
            client
        });
        for round in 0..ROUNDS {
            let data = read_exact(&stream, 40_000 + round).await.unwrap();
            write_all(&stream, &data).await.unwrap();
        }
        drop(client.join().unwrap());
        let rounds = ROUNDS as u64;
        assert!(count("TlsRxRekeyOk") >= before.1 + rounds);
        assert!(count("TlsTxRekeyOk") >= before.0 + rounds, "it was asked to change its own as well");
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn keys_that_are_used_up_are_changed() {
    const LEN: usize = 8 << 20;
    run(async {
        let (mut client, stream) = with_kernel().await;
        stream.kernel_key_limit(20);
        let before = count("TlsTxRekeyOk");
        let client = thread::spawn(move || {
            let mut got = vec![0; LEN];
            client.read_exact(&mut got).unwrap();
            assert!(got == pattern(LEN));
        });
        write_all(&stream, &pattern(LEN)).await.unwrap();
        client.join().unwrap();
        assert!(count("TlsTxRekeyOk") >= before + 5, "{} changes", count("TlsTxRekeyOk") - before);
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn an_end_is_one_only_when_it_was_announced() {
    run(async {
        let (client, stream) = with_kernel().await;
        drop(client.sock);
        assert_eq!(read(&stream, &mut [0; 10]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        let (mut client, stream) = with_kernel().await;
        client.write_all(b"last").unwrap();
        client.conn.send_close_notify();
        client.conn.complete_io(&mut client.sock).unwrap();
        assert_eq!(read_exact(&stream, 4).await.unwrap(), b"last");
        for _ in 0..3 {
            assert_eq!(read(&stream, &mut [0; 10]).await.unwrap(), 0);
        }
        write_all(&stream, b"still").await.unwrap();
        let mut got = [0; 5];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"still");
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn damage_ends_the_connection_and_is_told() {
    run(async {
        let unsealed = [&[0x17, 3, 3, 0, 30][..], &[9; 30]].concat();
        let long = [&[0x17, 3, 3, 0x7f, 0xff][..], &[0; 0x7fff]].concat();
        for (garbage, told) in [
            (&unsealed[..], "decrypt"),
            (&long, "excess record size"),
            // too short for a seal: there is an error on the socket then, and nothing to read
            (&[0x15, 3, 3, 0, 2, 1, 0], "decrypt"),
            (b"GET / HTTP/1.1", "no record"),
        ] {
            for waits in [false, true] {
                let (mut client, stream) = with_kernel().await;
                client.write_all(b"good").unwrap();
                if waits {
                    assert_eq!(read_exact(&stream, 4).await.unwrap(), b"good");
                    let nothing = stream.try_read(&mut [0; 10]).unwrap_err();
                    assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
                }
                client.sock.write_all(garbage).unwrap();
                if !waits {
                    assert_eq!(read_exact(&stream, 4).await.unwrap(), b"good");
                }
                let error = failed(&stream).await;
                assert!(error.contains(told), "{garbage:?}: {error}");
                let heard = client.read(&mut [0; 10]).unwrap_err();
                assert!(heard.to_string().contains("alert"), "{heard}");
            }
        }
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn records_that_are_not_data() {
    const DATA: ContentType = ContentType::ApplicationData;
    run(async {
        // the types and bytes of records that end a connection, and what is said of them
        let bad: [(ContentType, &[u8], &str); 8] = [
            (ContentType::Alert, &[2, 40], "HandshakeFailure"),
            (ContentType::Alert, &[1], "does not belong"),
            (ContentType::Alert, &[1, 0, 0], "does not belong"),
            (ContentType::Handshake, &[24, 0, 0, 1, 2], "does not belong"),
            (ContentType::Handshake, &[24, 0, 0], "does not belong"),
            (ContentType::Handshake, &[1, 0, 0, 1, 0], "does not belong"),
            (ContentType::Handshake, &[0; 5000], "does not belong"),
            (ContentType::ChangeCipherSpec, &[1], "does not belong"),
        ];
        for (kind, bytes, told) in bad {
            let (Client { conn, mut sock, .. }, stream) = with_kernel().await;
            let mut forger = Forger::new(conn);
            sock.write_all(&forger.seal(DATA, b"data")).unwrap();
            sock.write_all(&forger.seal(kind, bytes)).unwrap();
            assert_eq!(read_exact(&stream, 4).await.unwrap(), b"data");
            let error = failed(&stream).await;
            assert!(error.contains(told), "{kind:?} {bytes:?}: {error}");
        }
        // a warning, then nothing but data of no length
        let (Client { conn, mut sock, .. }, stream) = with_kernel().await;
        let mut forger = Forger::new(conn);
        sock.write_all(&forger.seal(ContentType::Alert, &[1, 90])).unwrap();
        for _ in 0..100 {
            sock.write_all(&forger.seal(DATA, b"")).unwrap();
        }
        sock.write_all(&forger.seal(DATA, b"data")).unwrap();
        assert_eq!(read_exact(&stream, 4).await.unwrap(), b"data");
        // a flood
        for _ in 0..1000 {
            if sock.write_all(&forger.seal(ContentType::Alert, &[1, 90])).is_err() {
                break;
            }
        }
        let error = failed(&stream).await;
        assert!(error.contains("TooMany"), "{error}");
    })
    .unwrap();
}

#[test]
#[ignore = "runs in the guest"]
fn old_kernels_keep_what_they_cannot_change() {
    assert_eq!(suites(), Err(Reason::KeysStay));
}

#[test]
fn in_guests_whose_kernels_have_tls() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = module_path!().split_once("::").unwrap().1;
    for (kernel, tests) in [
        ("6.12", ["--exact", &format!("{here}::old_kernels_keep_what_they_cannot_change")]),
        ("newest", [here, "--skip=old_kernels"]),
    ] {
        let mut vm = Command::new(root.join("tools/vm/run"));
        vm.args(["--kernel", kernel, "--timeout", "600"]).arg(std::env::current_exe().unwrap());
        let out = vm.args(tests).args(["--ignored", "--test-threads=1"]).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        let count = if kernel == "newest" { 7 } else { 1 };
        assert!(out.status.success(), "{said}{}", String::from_utf8_lossy(&out.stderr));
        assert!(said.contains(&format!("test result: ok. {count} passed")), "{said}");
    }
}
