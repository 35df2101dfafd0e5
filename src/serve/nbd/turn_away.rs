//! Telling clients that the server is going away, before their connection ends: what they ask in the last moment is
//! answered, in the words that the specification has for this, instead of being dropped.
//!
//! Called when the server stops: by the handshake, and after the transmission phase, when nothing of the connection holds
//! the image any more.

use super::input::Input;
use crate::block::Errno;
use crate::nbd::handshake::{Handshake, Replies, Step};
use crate::nbd::reply::Answer;
use crate::nbd::{NBD_CMD_DISC, request::Header};
use crate::ring::Stream;
use std::io::{self, IoSlice};
use std::time::Duration;
use tokio::time::timeout;

/// How long clients are answered so. What a client had sent when the server was stopped has arrived by then.
const FAREWELL: Duration = Duration::from_millis(200);

/// Answers every option with `NBD_REP_ERR_SHUTDOWN`. The client says goodbye, closes the connection, or is late.
pub(super) async fn during_handshake(stream: &Stream, handshake: &mut Handshake) {
    handshake.shut_down();
    let mut buf = [0; 1024];
    let talk = async {
        loop {
            let step = handshake.step();
            send(stream, &handshake.take_output()).await?;
            if step != Step::Read {
                return Ok(());
            }
            match receive(stream, &mut buf).await? {
                0 => return Ok(()),
                n => handshake.feed(&buf[..n]),
            }
        }
    };
    // a client that cannot be told will see the connection end
    let _: Result<io::Result<()>, _> = timeout(FAREWELL, talk).await;
}

/// Answers every request with `NBD_ESHUTDOWN`. `input`: what was received and not looked at; it begins with a request.
pub(super) async fn requests(stream: &Stream, replies: Replies, mut input: Input) {
    let talk = async {
        let mut payload = 0;
        loop {
            let mut answers = Vec::new();
            payload -= input.skip(payload);
            while payload == 0 {
                let header = match input.take_header(replies) {
                    None => break,
                    Some(Ok(header)) if header.kind != NBD_CMD_DISC => header,
                    // the client says goodbye, or its stream is lost
                    Some(_) => return send(stream, &answers).await,
                };
                answers.extend(answer(&header, replies));
                payload = header.payload_len();
                payload -= input.skip(payload);
            }
            send(stream, &answers).await?;
            loop {
                match input.receive(stream) {
                    Ok(0) => return Ok(()),
                    Ok(_) => break,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
                    Err(e) => return Err(e),
                }
            }
        }
    };
    // as above
    let _: Result<io::Result<()>, _> = timeout(FAREWELL, talk).await;
}

fn answer(header: &Header, replies: Replies) -> Vec<u8> {
    let (head, tail) = Answer { replies, cookie: header.cookie, offset: header.offset }.error(Errno::ESHUTDOWN);
    [&head[..], &tail].concat()
}

async fn receive(stream: &Stream, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.try_read(buf) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            received => return received,
        }
    }
}

async fn send(stream: &Stream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.try_write_vectored(&[IoSlice::new(bytes)]) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
