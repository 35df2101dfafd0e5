//! One request header: parsed, then judged against what the handshake agreed.
//!
//! Two kinds of wrong: a [`Violation`] loses the byte stream (or would let a client make us hold any amount of
//! memory), so the connection ends; anything else is an errno in the reply, after the payload of a write has been
//! consumed. Offsets and lengths against the device are judged by `Request::new`, not here.

use super::handshake::{Agreed, Replies, Selected};
use super::{
    MAX_PAYLOAD, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_PAYLOAD_LEN, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH,
    NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_EXTENDED_REQUEST_MAGIC,
    NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_DF, NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, NBD_REQUEST_MAGIC,
};
use crate::block::{Errno, ZeroFlags};
use bytes::Buf;

/// Size of a compact request header in bytes.
const COMPACT_LEN: usize = 28;
/// Size of an extended request header in bytes.
const EXTENDED_LEN: usize = 32;

/// Size of a request header in bytes, by the form that was agreed on.
pub fn header_len(replies: Replies) -> usize {
    if replies == Replies::Extended { EXTENDED_LEN } else { COMPACT_LEN }
}

/// A request header as sent. Nothing but the magic and the payload limit has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Command flags.
    pub flags: u16,
    /// Command.
    pub kind: u16,
    /// The client's name for this request, returned in every reply to it.
    pub cookie: u64,
    /// First byte on the virtual disk.
    pub offset: u64,
    /// Length in bytes: of the payload if there is one, else of the effect.
    pub length: u64,
    /// A payload follows.
    pub payload: bool,
}

/// What a client did to be disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a request: the byte stream is lost.
    #[error("request magic is {0:#010x}")]
    Magic(u32),
    /// A payload we would have to swallow or hold.
    #[error("payload of {0} bytes, the limit is {MAX_PAYLOAD}")]
    Oversize(u64),
}

/// A command whose flags are in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Read; `whole` asks for one content chunk (DF).
    Read {
        /// Send one content chunk only.
        whole: bool,
    },
    /// Write the payload that follows the header.
    Write,
    /// Soft disconnect.
    Disc,
    /// Flush.
    Flush,
    /// Trim.
    Trim,
    /// Cache.
    Cache,
    /// Write zeroes.
    WriteZeroes(ZeroFlags),
    /// Block status.
    BlockStatus {
        /// Send one extent only, not longer than the request.
        one: bool,
        /// The payload says which contexts are wanted, and the length of the effect: see [`status_query`].
        filter: bool,
    },
}

impl Header {
    /// Parses a header of [`header_len`] bytes.
    pub fn parse(mut b: &[u8], replies: Replies) -> Result<Header, Violation> {
        let extended = replies == Replies::Extended;
        let magic = b.get_u32();
        if magic != if extended { NBD_EXTENDED_REQUEST_MAGIC } else { NBD_REQUEST_MAGIC } {
            return Err(Violation::Magic(magic));
        }
        let (flags, kind) = (b.get_u16(), b.get_u16());
        let (cookie, offset) = (b.get_u64(), b.get_u64());
        let length = if extended { b.get_u64() } else { u64::from(b.get_u32()) };
        // With extended headers a write is to say that it has a payload; QEMU's client (10.0) does not, and it has one.
        let payload = kind == NBD_CMD_WRITE || (extended && flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0);
        if payload && length > u64::from(MAX_PAYLOAD) {
            return Err(Violation::Oversize(length));
        }
        Ok(Header { flags, kind, cookie, offset, length, payload })
    }

    /// Bytes that follow the header on the wire, whatever becomes of the request.
    pub fn payload_len(&self) -> usize {
        if self.payload { self.length as usize } else { 0 }
    }

    /// Whether the reply must wait until the data is durable.
    pub fn fua(&self) -> bool {
        self.flags & NBD_CMD_FLAG_FUA != 0
    }

    /// What is asked for, or the errno for the client: EINVAL for an unknown command, for a flag that is unknown,
    /// does not belong to the command or was not offered, for a command that was not offered, for a payload where none
    /// belongs; EOVERFLOW (EINVAL with simple replies, where the specification forbids it)
    /// for a read above the payload limit.
    pub fn command(&self, agreed: &Agreed) -> Result<Command, Errno> {
        let set = |flag: u16| self.flags & flag != 0;
        let offered = |flag: u16| agreed.flags & flag != 0;
        // A read-only export does not offer trim and zeroes, yet EPERM tells its client more than EINVAL:
        // `Request::new` has that word.
        let zeroes_known = offered(NBD_FLAG_SEND_WRITE_ZEROES) || offered(NBD_FLAG_READ_ONLY);
        let trim_known = offered(NBD_FLAG_SEND_TRIM) || offered(NBD_FLAG_READ_ONLY);

        let extended = agreed.replies == Replies::Extended;
        let payload = if extended { NBD_CMD_FLAG_PAYLOAD_LEN } else { 0 };

        let (command, known, flags) = match self.kind {
            NBD_CMD_READ => {
                let df = if offered(NBD_FLAG_SEND_DF) { NBD_CMD_FLAG_DF } else { 0 };
                (Command::Read { whole: set(NBD_CMD_FLAG_DF) }, true, df)
            }
            NBD_CMD_WRITE => (Command::Write, true, payload),
            // No reply can carry an error, so flags on a goodbye are not worth one.
            NBD_CMD_DISC => return Ok(Command::Disc),
            NBD_CMD_FLUSH => (Command::Flush, offered(NBD_FLAG_SEND_FLUSH), 0),
            NBD_CMD_TRIM => (Command::Trim, trim_known, 0),
            NBD_CMD_CACHE => (Command::Cache, offered(NBD_FLAG_SEND_CACHE), 0),
            NBD_CMD_WRITE_ZEROES => {
                let fast = if offered(NBD_FLAG_SEND_FAST_ZERO) { NBD_CMD_FLAG_FAST_ZERO } else { 0 };
                let how = ZeroFlags {
                    may_unmap: !set(NBD_CMD_FLAG_NO_HOLE),
                    sparse: false,
                    fast: set(NBD_CMD_FLAG_FAST_ZERO),
                };
                (Command::WriteZeroes(how), zeroes_known, NBD_CMD_FLAG_NO_HOLE | fast)
            }
            NBD_CMD_BLOCK_STATUS => {
                let filter = if offered(NBD_FLAG_BLOCK_STATUS_PAYLOAD) { payload } else { 0 };
                let command = Command::BlockStatus { one: set(NBD_CMD_FLAG_REQ_ONE), filter: self.payload };
                (command, !agreed.contexts.is_empty(), NBD_CMD_FLAG_REQ_ONE | filter)
            }
            _ => return Err(Errno::EINVAL),
        };

        let fua = if offered(NBD_FLAG_SEND_FUA) { NBD_CMD_FLAG_FUA } else { 0 };
        if !known || self.flags & !(flags | fua) != 0 {
            return Err(Errno::EINVAL);
        }
        match command {
            Command::Read { .. } if self.length > u64::from(MAX_PAYLOAD) => {
                Err(if agreed.replies == Replies::Simple { Errno::EINVAL } else { Errno::EOVERFLOW })
            }
            // A successful status has at least one extent, and an extent of nothing is not one.
            Command::BlockStatus { filter: false, .. } if self.length == 0 => Err(Errno::EINVAL),
            // More contexts than there are cannot be named without naming one twice.
            Command::BlockStatus { filter: true, .. } if self.payload_len() > filter_len(agreed.contexts.len()) => {
                Err(Errno::EINVAL)
            }
            _ => Ok(command),
        }
    }
}

/// Size in bytes of the payload of a block status request that names `contexts` contexts.
fn filter_len(contexts: usize) -> usize {
    8 + 4 * contexts
}

/// The payload of a block status request: the length of the effect in bytes, and of the `selected` contexts those that
/// are wanted, by their places. EINVAL: it is malformed, names none, or one that was not selected, or one twice.
pub fn status_query(mut payload: &[u8], selected: &[Selected]) -> Result<(u64, Vec<usize>), Errno> {
    let length = payload.try_get_u64().map_err(|_| Errno::EINVAL)?;
    let mut wanted = Vec::new();
    while !payload.is_empty() {
        let id = payload.try_get_u32().map_err(|_| Errno::EINVAL)?;
        let place = selected.iter().position(|context| context.id == id).ok_or(Errno::EINVAL)?;
        if wanted.contains(&place) {
            return Err(Errno::EINVAL);
        }
        wanted.push(place);
    }
    if length == 0 || wanted.is_empty() { Err(Errno::EINVAL) } else { Ok((length, wanted)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::{NBD_FLAG_CAN_MULTI_CONN, NBD_FLAG_HAS_FLAGS};
    use proptest::prelude::*;

    const ALL: u16 = NBD_FLAG_HAS_FLAGS
        | NBD_FLAG_SEND_FLUSH
        | NBD_FLAG_SEND_FUA
        | NBD_FLAG_SEND_TRIM
        | NBD_FLAG_SEND_WRITE_ZEROES
        | NBD_FLAG_SEND_FAST_ZERO
        | NBD_FLAG_SEND_DF
        | NBD_FLAG_SEND_CACHE
        | NBD_FLAG_CAN_MULTI_CONN;

    const LIMIT: u64 = MAX_PAYLOAD as u64;

    fn context(id: u32) -> Selected {
        Selected { id, name: format!("x-test:{id}") }
    }

    fn agreed(flags: u16) -> Agreed {
        Agreed { name: "disk".into(), flags, replies: Replies::Structured, contexts: vec![context(1)] }
    }

    fn extended(flags: u16) -> Agreed {
        Agreed { replies: Replies::Extended, ..agreed(flags) }
    }

    fn header(kind: u16, flags: u16, length: u64) -> Header {
        Header { flags, kind, cookie: 0x0102_0304_0506_0708, offset: 512, length, payload: kind == NBD_CMD_WRITE }
    }

    fn extended_header(kind: u16, flags: u16, length: u64) -> Header {
        let payload = kind == NBD_CMD_WRITE || flags & NBD_CMD_FLAG_PAYLOAD_LEN != 0;
        Header { payload, ..header(kind, flags, length) }
    }

    fn fields(magic: u32, h: &Header) -> Vec<u8> {
        let mut v = magic.to_be_bytes().to_vec();
        v.extend(h.flags.to_be_bytes());
        v.extend(h.kind.to_be_bytes());
        v.extend(h.cookie.to_be_bytes());
        v.extend(h.offset.to_be_bytes());
        v
    }

    fn bytes(magic: u32, h: &Header) -> Vec<u8> {
        [&fields(magic, h)[..], &u32::try_from(h.length).unwrap().to_be_bytes()].concat()
    }

    fn extended_bytes(h: &Header) -> Vec<u8> {
        [&fields(NBD_EXTENDED_REQUEST_MAGIC, h)[..], &h.length.to_be_bytes()].concat()
    }

    #[test]
    fn a_header_is_read_as_sent() {
        let h = header(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 4096);
        assert_eq!(Header::parse(&bytes(NBD_REQUEST_MAGIC, &h), Replies::Simple), Ok(h));
        assert_eq!(h.payload_len(), 4096);
        assert!(h.fua());
        assert_eq!(header(NBD_CMD_READ, 0, 4096).payload_len(), 0);
        let wrong = |magic| Header::parse(&bytes(magic, &h), Replies::Structured);
        for magic in [0x1256_0953, NBD_EXTENDED_REQUEST_MAGIC] {
            assert_eq!(wrong(magic), Err(Violation::Magic(magic)));
        }
    }

    #[test]
    fn an_extended_header_has_a_payload_when_it_says_so() {
        let parse = |h: &Header| Header::parse(&extended_bytes(h), Replies::Extended);
        for kind in [NBD_CMD_WRITE, NBD_CMD_BLOCK_STATUS, NBD_CMD_READ, 99] {
            let with = extended_header(kind, NBD_CMD_FLAG_PAYLOAD_LEN, 4096);
            assert_eq!((parse(&with), with.payload_len()), (Ok(with), 4096));
            // which a write need not say
            let (len, payload) = if kind == NBD_CMD_WRITE { (4096, 4096) } else { (u64::MAX, 0) };
            let without = extended_header(kind, 0, len);
            assert_eq!((parse(&without), without.payload_len()), (Ok(without), payload));
            let large = extended_header(kind, NBD_CMD_FLAG_PAYLOAD_LEN, LIMIT + 1);
            assert_eq!(parse(&large), Err(Violation::Oversize(LIMIT + 1)));
        }
        let compact = bytes(NBD_REQUEST_MAGIC, &header(NBD_CMD_READ, 0, 1));
        let wrong = Header::parse(&[&compact[..], &[0; 4]].concat(), Replies::Extended);
        assert_eq!(wrong, Err(Violation::Magic(NBD_REQUEST_MAGIC)));
    }

    #[test]
    fn a_payload_belongs_to_writes_and_filtered_status() {
        let all = extended(ALL | NBD_FLAG_BLOCK_STATUS_PAYLOAD);
        let judge = |kind, flags, length, agreed: &Agreed| extended_header(kind, flags, length).command(agreed);
        let with = NBD_CMD_FLAG_PAYLOAD_LEN;
        assert_eq!(judge(NBD_CMD_WRITE, with, 512, &all), Ok(Command::Write));
        assert_eq!(judge(NBD_CMD_WRITE, 0, 512, &all), Ok(Command::Write));
        for kind in [NBD_CMD_READ, NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES] {
            assert!(judge(kind, 0, 512, &all).is_ok());
            assert_eq!(judge(kind, with, 512, &all), Err(Errno::EINVAL), "command {kind}");
        }
        let filtered = Ok(Command::BlockStatus { one: false, filter: true });
        assert_eq!(judge(NBD_CMD_BLOCK_STATUS, with, 12, &all), filtered);
        assert_eq!(judge(NBD_CMD_BLOCK_STATUS, with, 13, &all), Err(Errno::EINVAL), "more than there are");
        assert_eq!(judge(NBD_CMD_BLOCK_STATUS, with, 12, &extended(ALL)), Err(Errno::EINVAL), "not offered");
        let compact = header(NBD_CMD_BLOCK_STATUS, with, 12).command(&agreed(ALL));
        assert_eq!(compact, Err(Errno::EINVAL));
        assert_eq!(header(NBD_CMD_WRITE, with, 12).command(&agreed(ALL)), Err(Errno::EINVAL));
    }

    #[test]
    fn a_status_query_names_selected_contexts_once() {
        let selected = [context(7), context(9)];
        let query = |length: u64, ids: &[u32]| {
            let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_be_bytes()).collect();
            status_query(&[&length.to_be_bytes()[..], &ids].concat(), &selected)
        };
        assert_eq!(query(1 << 40, &[9, 7]), Ok((1 << 40, vec![1, 0])));
        assert_eq!(query(512, &[7]), Ok((512, vec![0])));
        for (length, ids) in [(0, &[7][..]), (512, &[]), (512, &[7, 7]), (512, &[8])] {
            assert_eq!(query(length, ids), Err(Errno::EINVAL), "{length} {ids:?}");
        }
        for short in [0, 7, 9, 11, 13] {
            assert_eq!(status_query(&[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 7, 0][..short], &selected), Err(Errno::EINVAL));
        }
    }

    #[test]
    fn only_a_payload_can_be_fatally_large() {
        let parse =
            |kind, length| Header::parse(&bytes(NBD_REQUEST_MAGIC, &header(kind, 0, length)), Replies::Structured);
        assert!(parse(NBD_CMD_WRITE, LIMIT).is_ok());
        assert_eq!(parse(NBD_CMD_WRITE, LIMIT + 1), Err(Violation::Oversize(LIMIT + 1)));
        for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, 99] {
            assert!(parse(kind, u32::MAX.into()).is_ok());
        }
        assert!(header(NBD_CMD_WRITE_ZEROES, 0, u64::MAX).command(&extended(ALL)).is_ok());
        for replies in [agreed(ALL), extended(ALL)] {
            assert_eq!(header(NBD_CMD_READ, 0, LIMIT + 1).command(&replies), Err(Errno::EOVERFLOW));
        }
        let simple = Agreed { replies: Replies::Simple, ..agreed(ALL & !NBD_FLAG_SEND_DF) };
        assert_eq!(header(NBD_CMD_READ, 0, LIMIT + 1).command(&simple), Err(Errno::EINVAL));
        assert!(header(NBD_CMD_READ, 0, LIMIT).command(&simple).is_ok());
    }

    #[test]
    fn each_command_knows_its_flags() {
        let good = [
            (NBD_CMD_READ, NBD_CMD_FLAG_DF, Command::Read { whole: true }),
            (NBD_CMD_READ, 0, Command::Read { whole: false }),
            (NBD_CMD_WRITE, 0, Command::Write),
            (NBD_CMD_FLUSH, 0, Command::Flush),
            (NBD_CMD_TRIM, 0, Command::Trim),
            (NBD_CMD_CACHE, 0, Command::Cache),
            (NBD_CMD_WRITE_ZEROES, 0, Command::WriteZeroes(ZeroFlags { may_unmap: true, ..ZeroFlags::default() })),
            (
                NBD_CMD_WRITE_ZEROES,
                NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
                Command::WriteZeroes(ZeroFlags { fast: true, ..ZeroFlags::default() }),
            ),
            (NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, Command::BlockStatus { one: true, filter: false }),
        ];
        for (kind, flags, command) in good {
            for fua in [0, NBD_CMD_FLAG_FUA] {
                assert_eq!(header(kind, flags | fua, 512).command(&agreed(ALL)), Ok(command));
            }
            let foreign = match kind {
                NBD_CMD_READ => NBD_CMD_FLAG_REQ_ONE,
                _ => NBD_CMD_FLAG_DF,
            };
            assert_eq!(header(kind, foreign, 512).command(&agreed(ALL)), Err(Errno::EINVAL));
            assert_eq!(header(kind, flags | 1 << 5, 512).command(&agreed(ALL)), Err(Errno::EINVAL));
        }
        assert_eq!(header(8, 0, 512).command(&agreed(ALL)), Err(Errno::EINVAL));
        assert_eq!(header(NBD_CMD_DISC, 0xffff, 512).command(&agreed(0)), Ok(Command::Disc));
    }

    #[test]
    fn what_was_not_offered_is_refused() {
        let refused = |kind, flags, without: u16| {
            assert_eq!(
                header(kind, flags, 512).command(&agreed(ALL & !without)),
                Err(Errno::EINVAL),
                "command {kind} flags {flags:#x}"
            );
        };
        refused(NBD_CMD_FLUSH, 0, NBD_FLAG_SEND_FLUSH);
        refused(NBD_CMD_TRIM, 0, NBD_FLAG_SEND_TRIM);
        refused(NBD_CMD_WRITE_ZEROES, 0, NBD_FLAG_SEND_WRITE_ZEROES);
        refused(NBD_CMD_WRITE_ZEROES, NBD_CMD_FLAG_FAST_ZERO, NBD_FLAG_SEND_FAST_ZERO);
        refused(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, NBD_FLAG_SEND_FUA);
        refused(NBD_CMD_READ, NBD_CMD_FLAG_DF, NBD_FLAG_SEND_DF);
        refused(NBD_CMD_CACHE, 0, NBD_FLAG_SEND_CACHE);
        let no_context = Agreed { contexts: vec![], ..agreed(ALL) };
        assert_eq!(header(NBD_CMD_BLOCK_STATUS, 0, 512).command(&no_context), Err(Errno::EINVAL));
        assert_eq!(header(NBD_CMD_BLOCK_STATUS, 0, 0).command(&agreed(ALL)), Err(Errno::EINVAL));
    }

    #[test]
    fn a_read_only_export_lets_the_device_say_eperm() {
        let read_only = agreed(NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY);
        for kind in [NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES] {
            assert!(header(kind, 0, 512).command(&read_only).is_ok());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(raw in any::<[u8; EXTENDED_LEN]>(), magic in 0..3, flags in any::<u16>()) {
            let mut raw = raw;
            match magic {
                0 => raw[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes()),
                1 => raw[..4].copy_from_slice(&NBD_EXTENDED_REQUEST_MAGIC.to_be_bytes()),
                _ => {}
            }
            if let Ok(h) = Header::parse(&raw[..COMPACT_LEN], Replies::Structured) {
                prop_assert!(magic != 1 && h.payload_len() as u64 <= LIMIT);
                prop_assert_eq!(bytes(NBD_REQUEST_MAGIC, &h), &raw[..COMPACT_LEN]);
                let _ = h.command(&agreed(flags));
            }
            if let Ok(h) = Header::parse(&raw, Replies::Extended) {
                prop_assert!(magic != 0 && h.payload_len() as u64 <= LIMIT);
                prop_assert_eq!(extended_bytes(&h), &raw[..]);
                let _ = h.command(&extended(flags));
            }
            let _ = status_query(&raw, &[context(1), context(u32::from(raw[0]))]);
        }
    }
}
