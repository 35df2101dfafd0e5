//! The NBD wire protocol as thought without hands: bytes in, decisions out.
//!
//! No file, socket, clock or await lives here; `serve::nbd` moves the bytes. What a client sends is untrusted: every
//! length has a named limit, arithmetic is checked, and the answer to nonsense is an error or a reason to disconnect.
//!
//! - [`handshake`]: fixed newstyle negotiation, from the greeting to the transmission phase
//! - [`request`]: one request header, and whether it is allowed
//! - [`reply`]: simple replies and structured chunks
//! - [`errno`]: the one table from errno to NBD error values
//!
//! Constants carry the names of the specification (`doc/proto.md` of the NBD project).

pub mod errno;
pub mod handshake;
pub mod reply;
pub mod request;

mod options;

/// First bytes of every server greeting, `NBDMAGIC`.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Newstyle marker in the greeting and before every option, `IHAVEOPT`.
pub const NBD_OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before every reply to an option.
pub const NBD_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before every request.
pub const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before every request with an extended header.
pub const NBD_EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Before every simple reply.
pub const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Before every structured reply chunk.
pub const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Before every reply chunk with an extended header.
pub const NBD_EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: options other than `NBD_OPT_EXPORT_NAME` get replies.
pub const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the 124 reserved zeroes can be left out.
pub const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

/// Client flag: the client speaks fixed newstyle.
pub const NBD_FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client flag: leave out the 124 reserved zeroes.
pub const NBD_FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Transmission flag: always set.
pub const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
/// Transmission flag: writes are refused.
pub const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
/// Transmission flag: `NBD_CMD_FLUSH` is understood.
pub const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
/// Transmission flag: `NBD_CMD_FLAG_FUA` is understood.
pub const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
/// Transmission flag: seeks are slow.
pub const NBD_FLAG_ROTATIONAL: u16 = 1 << 4;
/// Transmission flag: `NBD_CMD_TRIM` is understood.
pub const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
/// Transmission flag: `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_FLAG_NO_HOLE` are understood.
pub const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// Transmission flag: `NBD_CMD_FLAG_DF` is understood (structured replies only).
pub const NBD_FLAG_SEND_DF: u16 = 1 << 7;
/// Transmission flag: a flush on one connection covers what every connection wrote.
pub const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
/// Transmission flag: `NBD_CMD_CACHE` is understood.
pub const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
/// Transmission flag: `NBD_CMD_FLAG_FAST_ZERO` is understood.
pub const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;
/// Transmission flag: `NBD_CMD_BLOCK_STATUS` may name the contexts it wants (extended headers only).
pub const NBD_FLAG_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

/// Option: choose the export without error replies.
pub const NBD_OPT_EXPORT_NAME: u32 = 1;
/// Option: soft disconnect.
pub const NBD_OPT_ABORT: u32 = 2;
/// Option: the names of all exports.
pub const NBD_OPT_LIST: u32 = 3;
/// Option: upgrade to TLS.
pub const NBD_OPT_STARTTLS: u32 = 5;
/// Option: details of an export.
pub const NBD_OPT_INFO: u32 = 6;
/// Option: details of an export, then the transmission phase.
pub const NBD_OPT_GO: u32 = 7;
/// Option: structured replies.
pub const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: which metadata contexts exist.
pub const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
/// Option: select metadata contexts.
pub const NBD_OPT_SET_META_CONTEXT: u32 = 10;
/// Option of the extended headers extension: 64-bit lengths in both directions.
pub const NBD_OPT_EXTENDED_HEADERS: u32 = 11;

/// Option reply: accepted, or the end of a list.
pub const NBD_REP_ACK: u32 = 1;
/// Option reply: one export name.
pub const NBD_REP_SERVER: u32 = 2;
/// Option reply: one information item.
pub const NBD_REP_INFO: u32 = 3;
/// Option reply: one metadata context.
pub const NBD_REP_META_CONTEXT: u32 = 4;
/// Option error: not known here.
pub const NBD_REP_ERR_UNSUP: u32 = (1 << 31) + 1;
/// Option error: known but not allowed.
pub const NBD_REP_ERR_POLICY: u32 = (1 << 31) + 2;
/// Option error: malformed or out of place.
pub const NBD_REP_ERR_INVALID: u32 = (1 << 31) + 3;
/// Option error: not without TLS.
pub const NBD_REP_ERR_TLS_REQD: u32 = (1 << 31) + 5;
/// Option error: the export is not available.
pub const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;
/// Option error: the server is shutting down.
pub const NBD_REP_ERR_SHUTDOWN: u32 = (1 << 31) + 7;
/// Option error: longer than the server accepts.
pub const NBD_REP_ERR_TOO_BIG: u32 = (1 << 31) + 9;
/// Option error: extended headers have been agreed on, and there is no way back.
pub const NBD_REP_ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;

/// Information item: size and transmission flags.
pub const NBD_INFO_EXPORT: u16 = 0;
/// Information item: the canonical name.
pub const NBD_INFO_NAME: u16 = 1;
/// Information item: a description for people.
pub const NBD_INFO_DESCRIPTION: u16 = 2;
/// Information item: size constraints.
pub const NBD_INFO_BLOCK_SIZE: u16 = 3;

/// Command: read.
pub const NBD_CMD_READ: u16 = 0;
/// Command: write, the only one with a payload.
pub const NBD_CMD_WRITE: u16 = 1;
/// Command: soft disconnect, without reply.
pub const NBD_CMD_DISC: u16 = 2;
/// Command: make everything replied to so far durable.
pub const NBD_CMD_FLUSH: u16 = 3;
/// Command: the range's content is no longer needed.
pub const NBD_CMD_TRIM: u16 = 4;
/// Command: the range will be read soon.
pub const NBD_CMD_CACHE: u16 = 5;
/// Command: make the range read as zeroes.
pub const NBD_CMD_WRITE_ZEROES: u16 = 6;
/// Command: report metadata of the range.
pub const NBD_CMD_BLOCK_STATUS: u16 = 7;

/// Command flag: reply only when the data is durable.
pub const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
/// Command flag: zeroes must keep their storage.
pub const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
/// Command flag: one content chunk only.
pub const NBD_CMD_FLAG_DF: u16 = 1 << 2;
/// Command flag: one extent only.
pub const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
/// Command flag: fail rather than be as slow as a write.
pub const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;
/// Command flag: the length is that of a payload behind the header (extended headers only).
pub const NBD_CMD_FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// Chunk flag: the last chunk of this reply.
pub const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing (more) to say.
pub const NBD_REPLY_TYPE_NONE: u16 = 0;
/// Chunk: content at an offset.
pub const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: zeroes at an offset.
pub const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: extents of one metadata context.
pub const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: extents of one metadata context, with 64-bit lengths (extended headers only).
pub const NBD_REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: the request failed.
pub const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) + 1;
/// Chunk: the request failed at an offset.
pub const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) + 2;

/// Longest string of the protocol (export names, queries, messages), in bytes.
pub const MAX_STRING: usize = 4096;
/// Largest data of one option that is looked at, in bytes; longer data is skipped and refused.
pub const MAX_OPTION_DATA: usize = 64 << 10;
/// Most queries in one `NBD_OPT_LIST_META_CONTEXT` or `NBD_OPT_SET_META_CONTEXT`.
pub const MAX_QUERIES: usize = 128;
/// Options after which a handshake that still has not come to an end is cut off. A client that lists a server asks
/// two options per export in one handshake, so thousands are honest.
pub const MAX_OPTIONS: u32 = 20_000;
/// Largest payload of one request or reply, in bytes; twice what is advertised, because clients exceed that.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// Most descriptors in one `NBD_REPLY_TYPE_BLOCK_STATUS` chunk.
pub const MAX_DESCRIPTORS: usize = 1 << 20;

/// Most bytes of names in one list of metadata contexts. An image can have tens of thousands of bitmaps; whoever
/// wants one of so many has to name it.
pub const MAX_LISTED_CONTEXTS: usize = 256 << 10;

/// The metadata context of the specification.
pub const BASE_ALLOCATION: &str = "base:allocation";
