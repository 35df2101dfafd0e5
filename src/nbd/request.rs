//! One request header: parsed, then judged against what the handshake agreed.
//!
//! Two kinds of wrong: a [`Violation`] loses the byte stream (or would let a client make us hold any amount of
//! memory), so the connection ends; anything else is an errno in the reply, after the payload of a write has been
//! consumed. Offsets and lengths against the device are judged by `Request::new`, not here.

use super::handshake::Agreed;
use super::{
    MAX_PAYLOAD, NBD_CMD_BLOCK_STATUS, NBD_CMD_CACHE, NBD_CMD_DISC, NBD_CMD_FLAG_DF, NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLAG_REQ_ONE, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_TRIM,
    NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_FLAG_READ_ONLY, NBD_FLAG_SEND_CACHE, NBD_FLAG_SEND_DF,
    NBD_FLAG_SEND_FAST_ZERO, NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
};
use crate::block::{Errno, ZeroFlags};
use bytes::Buf;

/// Size of a request header in bytes.
pub const HEADER_LEN: usize = 28;

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
    /// Length in bytes: of the payload for a write, else of the effect.
    pub length: u32,
}

/// What a client did to be disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Not a request: the byte stream is lost.
    #[error("request magic is {0:#010x}")]
    Magic(u32),
    /// A write we would have to swallow or hold.
    #[error("write of {0} bytes, the limit is {MAX_PAYLOAD}")]
    Oversize(u32),
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
    /// Block status; `one` asks for a single extent.
    BlockStatus {
        /// Send one extent only, not longer than the request.
        one: bool,
    },
}

impl Header {
    /// Parses a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Header, Violation> {
        let mut b = &bytes[..];
        let magic = b.get_u32();
        if magic != NBD_REQUEST_MAGIC {
            return Err(Violation::Magic(magic));
        }
        let header = Header {
            flags: b.get_u16(),
            kind: b.get_u16(),
            cookie: b.get_u64(),
            offset: b.get_u64(),
            length: b.get_u32(),
        };
        if header.payload_len() > MAX_PAYLOAD as usize {
            return Err(Violation::Oversize(header.length));
        }
        Ok(header)
    }

    /// Bytes that follow the header on the wire, whatever becomes of the request.
    pub fn payload_len(&self) -> usize {
        if self.kind == NBD_CMD_WRITE { self.length as usize } else { 0 }
    }

    /// Whether the reply must wait until the data is durable.
    pub fn fua(&self) -> bool {
        self.flags & NBD_CMD_FLAG_FUA != 0
    }

    /// What is asked for, or the errno for the client: EINVAL for an unknown command, for a flag that is unknown,
    /// does not belong to the command or was not offered, for a command that was not offered; EOVERFLOW (EINVAL
    /// without structured replies, where the specification forbids it) for a read above the payload limit.
    pub fn command(&self, agreed: &Agreed) -> Result<Command, Errno> {
        let set = |flag: u16| self.flags & flag != 0;
        let offered = |flag: u16| agreed.flags & flag != 0;
        // A read-only export does not offer trim and zeroes, yet EPERM tells its client more than EINVAL:
        // `Request::new` has that word.
        let zeroes_known = offered(NBD_FLAG_SEND_WRITE_ZEROES) || offered(NBD_FLAG_READ_ONLY);
        let trim_known = offered(NBD_FLAG_SEND_TRIM) || offered(NBD_FLAG_READ_ONLY);

        let (command, known, flags) = match self.kind {
            NBD_CMD_READ => {
                let df = if offered(NBD_FLAG_SEND_DF) { NBD_CMD_FLAG_DF } else { 0 };
                (Command::Read { whole: set(NBD_CMD_FLAG_DF) }, true, df)
            }
            NBD_CMD_WRITE => (Command::Write, true, 0),
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
                (Command::BlockStatus { one: set(NBD_CMD_FLAG_REQ_ONE) }, agreed.base_allocation, NBD_CMD_FLAG_REQ_ONE)
            }
            _ => return Err(Errno::EINVAL),
        };

        let fua = if offered(NBD_FLAG_SEND_FUA) { NBD_CMD_FLAG_FUA } else { 0 };
        if !known || self.flags & !(flags | fua) != 0 {
            return Err(Errno::EINVAL);
        }
        match command {
            Command::Read { .. } if self.length > MAX_PAYLOAD => {
                Err(if agreed.structured { Errno::EOVERFLOW } else { Errno::EINVAL })
            }
            // A successful status has at least one extent, and an extent of nothing is not one.
            Command::BlockStatus { .. } if self.length == 0 => Err(Errno::EINVAL),
            _ => Ok(command),
        }
    }
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

    fn agreed(flags: u16) -> Agreed {
        Agreed { name: "disk".into(), flags, structured: true, base_allocation: true }
    }

    fn header(kind: u16, flags: u16, length: u32) -> Header {
        Header { flags, kind, cookie: 0x0102_0304_0506_0708, offset: 512, length }
    }

    fn bytes(magic: u32, h: &Header) -> [u8; HEADER_LEN] {
        let mut v = magic.to_be_bytes().to_vec();
        v.extend(h.flags.to_be_bytes());
        v.extend(h.kind.to_be_bytes());
        v.extend(h.cookie.to_be_bytes());
        v.extend(h.offset.to_be_bytes());
        v.extend(h.length.to_be_bytes());
        v.try_into().unwrap()
    }

    #[test]
    fn a_header_is_read_as_sent() {
        let h = header(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 4096);
        assert_eq!(Header::parse(&bytes(NBD_REQUEST_MAGIC, &h)), Ok(h));
        assert_eq!(h.payload_len(), 4096);
        assert!(h.fua());
        assert_eq!(header(NBD_CMD_READ, 0, 4096).payload_len(), 0);
        assert_eq!(Header::parse(&bytes(0x1256_0953, &h)), Err(Violation::Magic(0x1256_0953)));
    }

    #[test]
    fn only_a_write_can_be_fatally_large() {
        let parse = |kind, length| Header::parse(&bytes(NBD_REQUEST_MAGIC, &header(kind, 0, length)));
        assert!(parse(NBD_CMD_WRITE, MAX_PAYLOAD).is_ok());
        assert_eq!(parse(NBD_CMD_WRITE, MAX_PAYLOAD + 1), Err(Violation::Oversize(MAX_PAYLOAD + 1)));
        for kind in [NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS, 99] {
            assert!(parse(kind, u32::MAX).is_ok());
        }
        assert!(header(NBD_CMD_WRITE_ZEROES, 0, u32::MAX).command(&agreed(ALL)).is_ok());
        assert_eq!(header(NBD_CMD_READ, 0, MAX_PAYLOAD + 1).command(&agreed(ALL)), Err(Errno::EOVERFLOW));
        let simple = Agreed { structured: false, ..agreed(ALL & !NBD_FLAG_SEND_DF) };
        assert_eq!(header(NBD_CMD_READ, 0, MAX_PAYLOAD + 1).command(&simple), Err(Errno::EINVAL));
        assert!(header(NBD_CMD_READ, 0, MAX_PAYLOAD).command(&simple).is_ok());
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
            (NBD_CMD_BLOCK_STATUS, NBD_CMD_FLAG_REQ_ONE, Command::BlockStatus { one: true }),
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
        let no_context = Agreed { base_allocation: false, ..agreed(ALL) };
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
        fn arbitrary_headers_never_panic(raw in any::<[u8; HEADER_LEN]>(), magic in any::<bool>(), flags in any::<u16>()) {
            let mut raw = raw;
            if magic {
                raw[..4].copy_from_slice(&NBD_REQUEST_MAGIC.to_be_bytes());
            }
            if let Ok(h) = Header::parse(&raw) {
                prop_assert!(magic || raw[..4] == NBD_REQUEST_MAGIC.to_be_bytes());
                prop_assert!(h.payload_len() <= MAX_PAYLOAD as usize);
                prop_assert_eq!(bytes(NBD_REQUEST_MAGIC, &h), raw);
                let _ = h.command(&agreed(flags));
            }
        }
    }
}
