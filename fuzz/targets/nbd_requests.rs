//! The transmission phase: any stream of requests is taken apart, judged and answered, and a client can read the answers.
//!
//! An input is a byte for the form of replies and the export, two for its transmission flags, and what the client sends.

use cowgate::block::{Context, Errno, Geometry, Op, Request, Run, ZeroFlags};
use cowgate::nbd::handshake::{Agreed, Replies, Selected};
use cowgate::nbd::reply::Answer;
use cowgate::nbd::request::{Command, Header, header_len, status_query};
use cowgate::nbd::{MAX_PAYLOAD, NBD_CMD_DISC, NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_DF};

/// Of the export, in bytes.
const SIZE: u64 = 1 << 42;

pub fn run(data: &[u8]) {
    let [server, high, low, stream @ ..] = data else { return };
    let agreed = agree(*server, u16::from_be_bytes([*high, *low]));
    let read_only = agreed.flags & NBD_FLAG_READ_ONLY != 0;
    let min_block = 1 << (server >> 4 & 0xf).min(12);
    let geometry = Geometry { size: SIZE, min_block, preferred_block: 4096, max_payload: 32 << 20, read_only };
    let mut rest = stream;
    while let Some((header, later)) = rest.split_at_checked(header_len(agreed.replies)) {
        let Ok(header) = Header::parse(header, agreed.replies) else { return };
        assert!(header.payload_len() <= MAX_PAYLOAD as usize);
        let Some((payload, later)) = later.split_at_checked(header.payload_len()) else { return };
        rest = later;
        let answer = Answer { replies: agreed.replies, cookie: header.cookie, offset: header.offset };
        match header.command(&agreed) {
            Err(e) => check_error(answer, e),
            Ok(Command::Disc) => return assert_eq!(header.kind, NBD_CMD_DISC),
            Ok(command) => obey(&header, command, payload, answer, &agreed, &geometry),
        }
    }
}

fn agree(server: u8, flags: u16) -> Agreed {
    let replies = [Replies::Simple, Replies::Structured, Replies::Extended][usize::from(server % 3)];
    let contexts: Vec<_> = match replies {
        Replies::Simple => Vec::new(),
        _ => (0..u32::from(server >> 2 & 3)).map(|i| Selected { id: i * 7 + 1, name: format!("x-fuzz:{i}") }).collect(),
    };
    let negotiated = NBD_FLAG_SEND_DF | NBD_FLAG_BLOCK_STATUS_PAYLOAD;
    let chunks = if replies == Replies::Simple { 0 } else { NBD_FLAG_SEND_DF };
    let filter = replies == Replies::Extended && !contexts.is_empty();
    let filter = if filter { NBD_FLAG_BLOCK_STATUS_PAYLOAD } else { 0 };
    Agreed { name: "disk".into(), flags: (flags & !negotiated) | chunks | filter, replies, contexts }
}

/// What the server does with a command whose flags are in order, without a disk.
fn obey(header: &Header, command: Command, payload: &[u8], to: Answer, agreed: &Agreed, geometry: &Geometry) {
    let validated = |op: Op, len: u64| Request::new(op, header.offset, len, header.fua(), geometry);
    let simple = to.replies == Replies::Simple;
    match command {
        Command::Disc => unreachable!("a goodbye is no request"),
        Command::BlockStatus { one, filter } => {
            assert!(!simple && !agreed.contexts.is_empty());
            let query = match filter {
                true => status_query(payload, &agreed.contexts),
                false => Ok((header.length, (0..agreed.contexts.len()).collect())),
            };
            let (len, wanted) = match query {
                Ok(query) => query,
                Err(e) => return check_error(to, e),
            };
            if let Err(e) = validated(Op::Status { context: Context::Allocation, most: 4 }, len) {
                return check_error(to, e);
            }
            let runs = [Run { len: 4096, status: 0 }, Run { len: 1 << 33, status: 3 }, Run { len: SIZE, status: 1 }];
            for place in wanted {
                let id = agreed.contexts[place].id;
                check_status(to, to.status(true, id, &runs, len, one), id, len, one);
            }
        }
        Command::Read { whole } => match validated(Op::Cache, header.length) {
            Err(e) => check_error(to, e),
            Ok(_) if header.length == 0 => check_chunk(to, &to.success(true), 0, 0),
            Ok(_) => {
                let len = usize::try_from(header.length).expect("a read is limited");
                assert!(len <= MAX_PAYLOAD as usize && !(simple && whole));
                check_chunk(to, &to.last_data(header.offset, len), 1, 8 + len);
                if !simple {
                    check_chunk(to, &to.data(header.offset, len), 1, 8 + len);
                    check_chunk(to, &to.hole(true, header.offset, len as u32), 2, 12);
                    let (head, tail) = to.error_at(true, Errno::EIO, header.offset);
                    check_chunk(to, &head, 0x8002, 6 + tail.len());
                }
            }
        },
        Command::Write => {
            assert_eq!(payload.len() as u64, header.length);
            effect(validated(Op::WriteZeroes(ZeroFlags::default()), header.length), to, geometry);
        }
        Command::Flush => effect(validated(Op::Flush, header.length), to, geometry),
        Command::Trim => effect(validated(Op::Discard, header.length), to, geometry),
        Command::Cache => effect(validated(Op::Cache, header.length), to, geometry),
        Command::WriteZeroes(how) => effect(validated(Op::WriteZeroes(how), header.length), to, geometry),
    }
}

fn effect(request: Result<Request, Errno>, to: Answer, geometry: &Geometry) {
    match request {
        Ok(request) => {
            assert!(request.range().end().0 <= geometry.size);
            check_chunk(to, &to.success(false), 0, 0);
        }
        Err(e) => check_error(to, e),
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// A head announces `payload` bytes of this type, and answers the request. A simple reply has no type.
fn check_chunk(to: Answer, head: &[u8], kind: u64, payload: usize) {
    let simple = head[..4] == [0x67, 0x44, 0x66, 0x98];
    assert!(!simple || to.replies != Replies::Extended);
    if simple {
        return assert_eq!((head.len(), number(&head[8..16])), (16, to.cookie));
    }
    assert_eq!((number(&head[6..8]), number(&head[8..16])), (kind, to.cookie));
    let (fixed, length) = match to.replies {
        Replies::Extended => {
            assert_eq!(number(&head[16..24]), to.offset);
            (32, number(&head[24..32]))
        }
        _ => (20, number(&head[16..20])),
    };
    assert_eq!(length, payload as u64);
    assert!(head.len() - fixed <= payload);
}

fn check_error(to: Answer, e: Errno) {
    let (head, tail) = to.error(e);
    if to.replies == Replies::Simple {
        return assert!(tail.is_empty() && number(&head[4..8]) != 0);
    }
    check_chunk(to, &head, 0x8001, 6 + tail.len());
    assert!(std::str::from_utf8(&tail).is_ok());
}

fn check_status(
    to: Answer,
    (head, descriptors): (impl std::ops::Deref<Target = [u8]>, Vec<u8>),
    id: u32,
    len: u64,
    one: bool,
) {
    let extended = to.replies == Replies::Extended;
    let (kind, fixed, size) = if extended { (6, 8, 16) } else { (5, 4, 8) };
    check_chunk(to, &head, kind, fixed + descriptors.len());
    let at = head.len() - fixed;
    assert_eq!(number(&head[at..at + 4]), u64::from(id));
    let lengths: Vec<u64> = descriptors.chunks(size).map(|d| number(&d[..size / 2])).collect();
    assert!(!lengths.is_empty() && lengths.iter().all(|&len| len > 0) && (!one || lengths.len() == 1));
    assert!(lengths.iter().sum::<u64>() <= len);
}
