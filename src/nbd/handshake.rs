//! Fixed newstyle negotiation as a state machine that performs no I/O.
//!
//! The connection feeds what it received ([`Handshake::feed`]) and asks for the next [`Step`]. Before it acts on any
//! step it sends what [`Handshake::take_output`] holds. What the machine cannot know (which exports exist, their size
//! and features) it asks for with [`Step::Export`] and [`Step::List`]; the answer comes through
//! [`Handshake::export`] and [`Handshake::list`], and asking for the next step goes on.
//!
//! However the client's bytes are split, the steps and the output are the same. Memory is bounded: option data above
//! [`MAX_OPTION_DATA`] is skipped as it arrives.

use super::options::{self, BadData, InfoQuery, MetaQuery};
use super::{
    BASE_ALLOCATION, BASE_ALLOCATION_ID, MAX_OPTION_DATA, MAX_OPTIONS, MAX_STRING, NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES, NBD_FLAG_SEND_DF, NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_MAGIC, NBD_OPT_ABORT, NBD_OPT_EXPORT_NAME, NBD_OPT_GO,
    NBD_OPT_INFO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS,
    NBD_OPT_STRUCTURED_REPLY, NBD_OPTION_MAGIC, NBD_REP_ACK, NBD_REP_ERR_INVALID, NBD_REP_ERR_POLICY,
    NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP, NBD_REP_INFO,
    NBD_REP_META_CONTEXT, NBD_REP_SERVER, NBD_REPLY_MAGIC,
};
use bytes::{Buf, BufMut, BytesMut};

/// Size of an option's header in bytes: magic, option, length.
const OPTION_HEADER: usize = 16;

/// One negotiation with one client.
pub struct Handshake {
    phase: Phase,
    input: BytesMut,
    output: Vec<u8>,
    no_zeroes: bool,
    structured: bool,
    /// The export `base:allocation` was selected for.
    allocation_of: Option<String>,
    options: u32,
}

/// What the connection does next, after sending the output.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive more bytes.
    Read,
    /// Answer with [`Handshake::export`].
    Export {
        /// As the client named it.
        name: String,
        /// Why it asks.
        purpose: Purpose,
    },
    /// Answer with [`Handshake::list`].
    List,
    /// Negotiation is over; bytes already received beyond it are in [`Handshake::into_rest`].
    Transmission(Agreed),
    /// Close the connection.
    Close(Closing),
}

/// Why an export is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Only whether it exists; size and flags of the answer are not used.
    Exists,
    /// To describe it.
    Info,
    /// To serve it at once if the answer allows it.
    Go,
}

/// An export as the handshake describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Canonical name.
    pub name: String,
    /// Words for people.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags without `NBD_FLAG_SEND_DF`, which depends on the negotiation.
    pub flags: u16,
    /// Smallest request and alignment in bytes.
    pub min_block: u32,
    /// Request size in bytes below which work is wasted.
    pub preferred_block: u32,
    /// Largest payload in bytes a client should use.
    pub max_payload: u32,
}

/// Why something is not given; the text is shown to the client's user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The export is not available.
    Unknown(String),
    /// It is, but not to this client or not now.
    Policy(String),
    /// The server is going away.
    Shutdown,
}

/// What both sides agreed on for the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// The export as the client named it.
    pub name: String,
    /// Transmission flags as sent.
    pub flags: u16,
    /// Structured replies.
    pub structured: bool,
    /// Block status of `base:allocation` may be asked for.
    pub base_allocation: bool,
}

/// Why a handshake ends without transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Closing {
    /// The client said goodbye.
    Aborted,
    /// The client asked for an export in the one way that has no error reply.
    Refused(Refusal),
    /// The client broke the protocol.
    Violation(Violation),
}

/// What a client did to be disconnected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Flags beyond those we offered, which the specification wants answered so.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// The byte stream is lost.
    #[error("option magic is {0:#018x}")]
    Magic(u64),
    /// `NBD_OPT_EXPORT_NAME` with a name that cannot be one.
    #[error("export name of {0} bytes is too long or not UTF-8")]
    Name(u32),
    /// More than [`MAX_OPTIONS`].
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
}

#[derive(Debug)]
enum Phase {
    ClientFlags,
    Option,
    Data { option: u32, len: usize },
    Skip { option: u32, left: usize },
    Asked(Question),
    Over(Step),
    Ended,
}

#[derive(Debug)]
enum Question {
    ExportName(String),
    Info { option: u32, query: InfoQuery },
    Meta { option: u32, query: MetaQuery },
    List,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A handshake whose output is the greeting.
    pub fn new() -> Self {
        let mut output = Vec::with_capacity(256);
        output.put_u64(NBD_MAGIC);
        output.put_u64(NBD_OPTION_MAGIC);
        output.put_u16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
        Handshake {
            phase: Phase::ClientFlags,
            input: BytesMut::new(),
            output,
            no_zeroes: false,
            structured: false,
            allocation_of: None,
            options: 0,
        }
    }

    /// Takes received bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The bytes to send before acting on the latest step.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Bytes the client sent beyond the handshake: the beginning of its first requests.
    pub fn into_rest(self) -> BytesMut {
        self.input
    }

    /// The next thing to do. After [`Step::Transmission`] or [`Step::Close`] there is none; asking again panics, and
    /// so does asking while a question is open.
    pub fn step(&mut self) -> Step {
        loop {
            match std::mem::replace(&mut self.phase, Phase::Ended) {
                Phase::ClientFlags => {
                    let Some(flags) = self.take::<4>(Phase::ClientFlags) else { return Step::Read };
                    self.client_flags(u32::from_be_bytes(flags));
                }
                Phase::Option => {
                    let Some(header) = self.take::<OPTION_HEADER>(Phase::Option) else { return Step::Read };
                    self.option_header(&header);
                }
                Phase::Data { option, len } if self.input.len() < len => {
                    self.phase = Phase::Data { option, len };
                    return Step::Read;
                }
                Phase::Data { option, len } => {
                    let data = self.input.split_to(len);
                    if let Some(question) = self.option(option, &data) {
                        return self.ask(question);
                    }
                }
                Phase::Skip { option, left } => {
                    let skipped = left.min(self.input.len());
                    self.input.advance(skipped);
                    if skipped < left {
                        self.phase = Phase::Skip { option, left: left - skipped };
                        return Step::Read;
                    }
                    self.too_long(option);
                }
                Phase::Over(step) => return step,
                Phase::Asked(_) | Phase::Ended => unreachable!("a handshake is driven by its steps"),
            }
        }
    }

    /// Answers [`Step::Export`]. Panics when that was not the latest step.
    pub fn export(&mut self, answer: Result<ExportInfo, Refusal>) {
        match std::mem::replace(&mut self.phase, Phase::Option) {
            Phase::Asked(Question::ExportName(name)) => self.export_name(name, answer),
            Phase::Asked(Question::Info { option, query }) => self.info(option, query, answer),
            Phase::Asked(Question::Meta { option, query }) => self.meta(option, query, answer),
            _ => unreachable!("an answer follows its question"),
        }
    }

    /// Answers [`Step::List`] with the names of all exports. Panics when that was not the latest step.
    pub fn list(&mut self, answer: Result<Vec<String>, Refusal>) {
        assert!(matches!(self.phase, Phase::Asked(Question::List)), "an answer follows its question");
        self.phase = Phase::Option;
        match answer {
            Ok(names) => {
                for name in names {
                    self.reply(NBD_OPT_LIST, NBD_REP_SERVER, &[&(name.len() as u32).to_be_bytes(), name.as_bytes()]);
                }
                self.reply(NBD_OPT_LIST, NBD_REP_ACK, &[]);
            }
            Err(refusal) => self.refuse(NBD_OPT_LIST, &refusal),
        }
    }

    /// Takes `N` bytes; without them stays in `phase`.
    fn take<const N: usize>(&mut self, phase: Phase) -> Option<[u8; N]> {
        let Some(bytes) = self.input.first_chunk::<N>().copied() else {
            self.phase = phase;
            return None;
        };
        self.input.advance(N);
        Some(bytes)
    }

    fn client_flags(&mut self, flags: u32) {
        // A client without NBD_FLAG_C_FIXED_NEWSTYLE can only use NBD_OPT_EXPORT_NAME by the specification; the server
        // may honour more, and nothing is gained by not doing so.
        self.phase = if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) == 0 {
            self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
            Phase::Option
        } else {
            violation(Violation::ClientFlags(flags))
        };
    }

    fn option_header(&mut self, mut header: &[u8]) {
        let magic = header.get_u64();
        let option = header.get_u32();
        let len = header.get_u32();
        self.options += 1;
        self.phase = if magic != NBD_OPTION_MAGIC {
            violation(Violation::Magic(magic))
        } else if self.options > MAX_OPTIONS {
            violation(Violation::TooManyOptions)
        } else if option == NBD_OPT_EXPORT_NAME && len as usize > MAX_STRING {
            violation(Violation::Name(len))
        } else if len as usize > MAX_OPTION_DATA {
            Phase::Skip { option, left: len as usize }
        } else {
            Phase::Data { option, len: len as usize }
        };
    }

    /// Acts on an option with its whole data. Leaves the next phase behind, unless there is something to ask first.
    fn option(&mut self, option: u32, data: &[u8]) -> Option<Question> {
        self.phase = Phase::Option;
        match option {
            NBD_OPT_EXPORT_NAME => match options::string(data) {
                Ok(name) => return Some(Question::ExportName(name)),
                Err(_) => self.phase = violation(Violation::Name(data.len() as u32)),
            },
            NBD_OPT_ABORT => {
                self.reply(option, NBD_REP_ACK, &[]);
                self.phase = Phase::Over(Step::Close(Closing::Aborted));
            }
            NBD_OPT_LIST | NBD_OPT_STRUCTURED_REPLY | NBD_OPT_STARTTLS if !data.is_empty() => {
                self.error(option, NBD_REP_ERR_INVALID, "this option takes no data");
            }
            NBD_OPT_LIST => return Some(Question::List),
            NBD_OPT_STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(option, NBD_REP_ACK, &[]);
            }
            NBD_OPT_STARTTLS => self.error(option, NBD_REP_ERR_UNSUP, "this server does not speak TLS"),
            NBD_OPT_INFO | NBD_OPT_GO => match options::info_query(data) {
                Ok(query) => return Some(Question::Info { option, query }),
                Err(bad) => self.bad_data(option, bad),
            },
            NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => return self.meta_option(option, data),
            _ => self.error(option, NBD_REP_ERR_UNSUP, "unknown option"),
        }
        None
    }

    fn meta_option(&mut self, option: u32, data: &[u8]) -> Option<Question> {
        if option == NBD_OPT_SET_META_CONTEXT {
            // A new selection replaces the old one, also when it fails.
            self.allocation_of = None;
        }
        if !self.structured {
            self.error(option, NBD_REP_ERR_INVALID, "metadata contexts need structured replies first");
            return None;
        }
        match options::meta_query(data) {
            Ok(query) => return Some(Question::Meta { option, query }),
            Err(bad) => self.bad_data(option, bad),
        }
        None
    }

    fn ask(&mut self, question: Question) -> Step {
        let step = match &question {
            Question::List => Step::List,
            Question::ExportName(name) => Step::Export { name: name.clone(), purpose: Purpose::Go },
            Question::Info { option, query } => {
                let purpose = if *option == NBD_OPT_GO { Purpose::Go } else { Purpose::Info };
                Step::Export { name: query.name.clone(), purpose }
            }
            Question::Meta { query, .. } => Step::Export { name: query.name.clone(), purpose: Purpose::Exists },
        };
        self.phase = Phase::Asked(question);
        step
    }

    fn export_name(&mut self, name: String, answer: Result<ExportInfo, Refusal>) {
        self.phase = Phase::Over(match answer {
            Ok(info) => {
                let agreed = self.agreed(name, &info);
                self.output.put_u64(info.size);
                self.output.put_u16(agreed.flags);
                if !self.no_zeroes {
                    self.output.put_bytes(0, 124);
                }
                Step::Transmission(agreed)
            }
            Err(refusal) => Step::Close(Closing::Refused(refusal)),
        });
    }

    fn info(&mut self, option: u32, query: InfoQuery, answer: Result<ExportInfo, Refusal>) {
        let info = match answer {
            Ok(info) => info,
            Err(refusal) => return self.refuse(option, &refusal),
        };
        let agreed = self.agreed(query.name, &info);
        let mut item = |kind: u16, fields: &[&[u8]]| {
            let kind = kind.to_be_bytes();
            let parts: Vec<&[u8]> = std::iter::once(&kind[..]).chain(fields.iter().copied()).collect();
            self.reply(option, NBD_REP_INFO, &parts);
        };
        item(NBD_INFO_EXPORT, &[&info.size.to_be_bytes(), &agreed.flags.to_be_bytes()]);
        if query.want_name {
            item(NBD_INFO_NAME, &[info.name.as_bytes()]);
        }
        if let (true, Some(description)) = (query.want_description, &info.description) {
            item(NBD_INFO_DESCRIPTION, &[description.as_bytes()]);
        }
        if query.want_block_size {
            let sizes = [info.min_block, info.preferred_block, info.max_payload].map(u32::to_be_bytes);
            item(NBD_INFO_BLOCK_SIZE, &[sizes.as_flattened()]);
        }
        self.reply(option, NBD_REP_ACK, &[]);
        if option == NBD_OPT_GO {
            self.phase = Phase::Over(Step::Transmission(agreed));
        }
    }

    fn meta(&mut self, option: u32, query: MetaQuery, answer: Result<ExportInfo, Refusal>) {
        if let Err(refusal) = answer {
            return self.refuse(option, &refusal);
        }
        let set = option == NBD_OPT_SET_META_CONTEXT;
        if query.allocation || (!set && (query.wildcard || query.empty)) {
            // A list's context ID is reserved.
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            self.reply(option, NBD_REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
            if set {
                self.allocation_of = Some(query.name);
            }
        }
        self.reply(option, NBD_REP_ACK, &[]);
    }

    fn agreed(&self, name: String, info: &ExportInfo) -> Agreed {
        let df = if self.structured { NBD_FLAG_SEND_DF } else { 0 };
        Agreed {
            // A selection made for another export does not count.
            base_allocation: self.allocation_of.as_ref() == Some(&name),
            name,
            flags: info.flags | df,
            structured: self.structured,
        }
    }

    /// The end of an option whose data was too long to look at.
    fn too_long(&mut self, option: u32) {
        match option {
            NBD_OPT_LIST
            | NBD_OPT_STARTTLS
            | NBD_OPT_INFO
            | NBD_OPT_GO
            | NBD_OPT_STRUCTURED_REPLY
            | NBD_OPT_LIST_META_CONTEXT
            | NBD_OPT_SET_META_CONTEXT => {
                if option == NBD_OPT_SET_META_CONTEXT {
                    self.allocation_of = None;
                }
                self.phase = Phase::Option;
                self.error(option, NBD_REP_ERR_TOO_BIG, "option data is limited to 64 KiB");
            }
            // Their answer does not depend on the data; NBD_OPT_EXPORT_NAME never comes here.
            _ => assert!(self.option(option, &[]).is_none(), "only an option with data asks"),
        }
    }

    fn bad_data(&mut self, option: u32, bad: BadData) {
        match bad {
            BadData::Malformed(why) => self.error(option, NBD_REP_ERR_INVALID, why),
            BadData::TooBig(why) => self.error(option, NBD_REP_ERR_TOO_BIG, why),
        }
    }

    fn refuse(&mut self, option: u32, refusal: &Refusal) {
        match refusal {
            Refusal::Unknown(why) => self.error(option, NBD_REP_ERR_UNKNOWN, why),
            Refusal::Policy(why) => self.error(option, NBD_REP_ERR_POLICY, why),
            Refusal::Shutdown => self.error(option, NBD_REP_ERR_SHUTDOWN, "the server is shutting down"),
        }
    }

    fn error(&mut self, option: u32, kind: u32, message: &str) {
        let end = (0..=MAX_STRING.min(message.len())).rfind(|&i| message.is_char_boundary(i)).unwrap_or(0);
        self.reply(option, kind, &[&message.as_bytes()[..end]]);
    }

    fn reply(&mut self, option: u32, kind: u32, data: &[&[u8]]) {
        self.output.put_u64(NBD_REPLY_MAGIC);
        self.output.put_u32(option);
        self.output.put_u32(kind);
        self.output.put_u32(data.iter().map(|part| part.len() as u32).sum());
        data.iter().for_each(|part| self.output.extend_from_slice(part));
    }
}

fn violation(v: Violation) -> Phase {
    Phase::Over(Step::Close(Closing::Violation(v)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::{NBD_FLAG_HAS_FLAGS, NBD_OPT_EXTENDED_HEADERS};
    use proptest::prelude::*;

    fn info() -> ExportInfo {
        ExportInfo {
            name: "disk".into(),
            description: Some("a disk".into()),
            size: 1 << 30,
            flags: NBD_FLAG_HAS_FLAGS,
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
        }
    }

    /// Answers like a server with one export, "disk".
    fn drive(h: &mut Handshake) -> Step {
        loop {
            match h.step() {
                Step::Export { name, .. } if name == "disk" => h.export(Ok(info())),
                Step::Export { name, .. } if name == "secret" => h.export(Err(Refusal::Policy("no".into()))),
                Step::Export { name, .. } => h.export(Err(Refusal::Unknown(format!("no export {name}")))),
                Step::List => h.list(Ok(vec!["disk".into(), "".into()])),
                step => return step,
            }
        }
    }

    fn after_flags(flags: u32) -> Handshake {
        let mut h = Handshake::new();
        assert_eq!(h.take_output(), b"NBDMAGICIHAVEOPT\x00\x03");
        h.feed(&flags.to_be_bytes());
        assert_eq!(drive(&mut h), Step::Read);
        h
    }

    fn ready() -> Handshake {
        after_flags(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES)
    }

    fn option(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut v = b"IHAVEOPT".to_vec();
        v.extend(kind.to_be_bytes());
        v.extend((data.len() as u32).to_be_bytes());
        v.extend(data);
        v
    }

    fn counted(s: &str) -> Vec<u8> {
        [&(s.len() as u32).to_be_bytes(), s.as_bytes()].concat()
    }

    fn info_data(name: &str, items: &[u16]) -> Vec<u8> {
        let mut v = counted(name);
        v.extend((items.len() as u16).to_be_bytes());
        items.iter().for_each(|i| v.extend(i.to_be_bytes()));
        v
    }

    fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
        let mut v = counted(name);
        v.extend((queries.len() as u32).to_be_bytes());
        queries.iter().for_each(|q| v.extend(counted(q)));
        v
    }

    /// Sends one option and returns its replies as (type, data).
    fn exchange(h: &mut Handshake, kind: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, Step) {
        h.feed(&option(kind, data));
        let step = drive(h);
        let output = h.take_output();
        let mut b = &output[..];
        let mut replies = Vec::new();
        while !b.is_empty() {
            assert_eq!(b.get_u64(), NBD_REPLY_MAGIC);
            assert_eq!(b.get_u32(), kind);
            let (kind, len) = (b.get_u32(), b.get_u32());
            replies.push((kind, b.split_off(..len as usize).unwrap().to_vec()));
        }
        (replies, step)
    }

    fn kinds(h: &mut Handshake, kind: u32, data: &[u8]) -> Vec<u32> {
        exchange(h, kind, data).0.into_iter().map(|(kind, _)| kind).collect()
    }

    fn agreed(step: Step) -> Agreed {
        match step {
            Step::Transmission(agreed) => agreed,
            other => panic!("expected transmission, got {other:?}"),
        }
    }

    #[test]
    fn unknown_client_flags_end_it() {
        let mut h = Handshake::new();
        h.feed(&7u32.to_be_bytes());
        assert_eq!(h.step(), Step::Close(Closing::Violation(Violation::ClientFlags(7))));
    }

    #[test]
    fn garbage_instead_of_an_option_ends_it() {
        let mut h = ready();
        h.feed(&[0x55; 16]);
        assert_eq!(drive(&mut h), Step::Close(Closing::Violation(Violation::Magic(0x5555_5555_5555_5555))));
    }

    #[test]
    fn export_name_with_and_without_zeroes() {
        for (flags, len) in [(NBD_FLAG_C_FIXED_NEWSTYLE, 134), (NBD_FLAG_C_NO_ZEROES, 10), (0, 134)] {
            let mut h = after_flags(flags);
            h.feed(&option(NBD_OPT_EXPORT_NAME, b"disk"));
            h.feed(b"first request");
            let agreed = agreed(drive(&mut h));
            assert_eq!(agreed, Agreed { name: "disk".into(), flags: 1, structured: false, base_allocation: false });
            let output = h.take_output();
            assert_eq!(output.len(), len);
            assert_eq!(output[..10], [0, 0, 0, 0, 0x40, 0, 0, 0, 0, 1]);
            assert_eq!(&h.into_rest()[..], b"first request");
        }
    }

    #[test]
    fn export_name_has_no_error_but_the_end() {
        let mut h = ready();
        h.feed(&option(NBD_OPT_EXPORT_NAME, b"other"));
        assert_eq!(drive(&mut h), Step::Close(Closing::Refused(Refusal::Unknown("no export other".into()))));
        assert!(h.take_output().is_empty());
        let mut h = ready();
        h.feed(&option(NBD_OPT_EXPORT_NAME, &[b'x'; MAX_STRING + 1])[..OPTION_HEADER]);
        assert_eq!(drive(&mut h), Step::Close(Closing::Violation(Violation::Name(MAX_STRING as u32 + 1))));
        let mut h = ready();
        h.feed(&option(NBD_OPT_EXPORT_NAME, b"\xff"));
        assert_eq!(drive(&mut h), Step::Close(Closing::Violation(Violation::Name(1))));
    }

    #[test]
    fn go_sends_what_was_asked_for() {
        let mut h = ready();
        let (replies, step) = exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[3, 1, 2]));
        assert_eq!(replies[0], (NBD_REP_INFO, vec![0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 1]));
        assert_eq!(replies[1], (NBD_REP_INFO, b"\0\x01disk".to_vec()));
        assert_eq!(replies[2], (NBD_REP_INFO, b"\0\x02a disk".to_vec()));
        assert_eq!(replies[3], (NBD_REP_INFO, vec![0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]));
        assert_eq!(replies[4], (NBD_REP_ACK, vec![]));
        assert!(!agreed(step).structured);
    }

    #[test]
    fn info_then_go_gives_the_same_and_goes_on_after_errors() {
        let mut h = ready();
        assert_eq!(kinds(&mut h, NBD_OPT_INFO, &info_data("other", &[])), [NBD_REP_ERR_UNKNOWN]);
        assert_eq!(kinds(&mut h, NBD_OPT_GO, &info_data("other", &[])), [NBD_REP_ERR_UNKNOWN]);
        assert_eq!(kinds(&mut h, NBD_OPT_GO, &info_data("secret", &[])), [NBD_REP_ERR_POLICY]);
        assert_eq!(kinds(&mut h, NBD_OPT_GO, b"junk"), [NBD_REP_ERR_INVALID]);
        let long = "x".repeat(MAX_STRING + 1);
        assert_eq!(kinds(&mut h, NBD_OPT_GO, &info_data(&long, &[])), [NBD_REP_ERR_TOO_BIG]);
        let (first, step) = exchange(&mut h, NBD_OPT_INFO, &info_data("disk", &[]));
        assert_eq!(step, Step::Read);
        let (second, step) = exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[]));
        assert_eq!(first.iter().map(|r| &r.1).collect::<Vec<_>>(), second.iter().map(|r| &r.1).collect::<Vec<_>>());
        assert_eq!(agreed(step).name, "disk");
    }

    #[test]
    fn structured_replies_bring_df() {
        let mut h = ready();
        assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b"x"), [NBD_REP_ERR_INVALID]);
        assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ACK]);
        assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ACK]);
        let agreed = agreed(exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[])).1);
        assert_eq!(agreed.flags, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF);
        assert!(agreed.structured && !agreed.base_allocation);
    }

    #[test]
    fn options_we_do_not_have() {
        let mut h = ready();
        for unknown in [4, NBD_OPT_STARTTLS, NBD_OPT_EXTENDED_HEADERS, 77, u32::MAX] {
            assert_eq!(kinds(&mut h, unknown, b""), [NBD_REP_ERR_UNSUP]);
        }
        assert_eq!(kinds(&mut h, 77, b"with data"), [NBD_REP_ERR_UNSUP]);
        assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b"x"), [NBD_REP_ERR_INVALID]);
    }

    #[test]
    fn list_names_every_export() {
        let mut h = ready();
        let (replies, _) = exchange(&mut h, NBD_OPT_LIST, b"");
        assert_eq!(
            replies,
            [
                (NBD_REP_SERVER, b"\0\0\0\x04disk".to_vec()),
                (NBD_REP_SERVER, b"\0\0\0\0".to_vec()),
                (NBD_REP_ACK, vec![])
            ]
        );
        assert_eq!(kinds(&mut h, NBD_OPT_LIST, b"x"), [NBD_REP_ERR_INVALID]);
        h.feed(&option(NBD_OPT_LIST, b""));
        assert_eq!(h.step(), Step::List);
        h.list(Err(Refusal::Policy("listing is off".into())));
        assert_eq!(h.step(), Step::Read);
        assert!(h.take_output().ends_with(b"listing is off"));
    }

    #[test]
    fn abort_is_acknowledged_whatever_it_carries() {
        for data in [&b""[..], b"goodbye", &vec![0; MAX_OPTION_DATA + 1]] {
            let (replies, step) = exchange(&mut ready(), NBD_OPT_ABORT, data);
            assert_eq!(replies, [(NBD_REP_ACK, vec![])]);
            assert_eq!(step, Step::Close(Closing::Aborted));
        }
    }

    #[test]
    fn contexts_need_structured_replies() {
        let mut h = ready();
        let data = meta_data("disk", &["base:allocation"]);
        assert_eq!(kinds(&mut h, NBD_OPT_SET_META_CONTEXT, &data), [NBD_REP_ERR_INVALID]);
        assert_eq!(kinds(&mut h, NBD_OPT_LIST_META_CONTEXT, &data), [NBD_REP_ERR_INVALID]);
    }

    fn structured() -> Handshake {
        let mut h = ready();
        assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ACK]);
        h
    }

    #[test]
    fn listing_contexts() {
        let mut h = structured();
        let mut list = |queries: &[&str]| {
            let (replies, _) = exchange(&mut h, NBD_OPT_LIST_META_CONTEXT, &meta_data("disk", queries));
            replies
        };
        let ours = [(NBD_REP_META_CONTEXT, b"\0\0\0\0base:allocation".to_vec()), (NBD_REP_ACK, vec![])];
        assert_eq!(list(&[]), ours);
        assert_eq!(list(&["base:"]), ours);
        assert_eq!(list(&["base:allocation", "base:"]), ours);
        assert_eq!(list(&["qemu:", "base:x", "nocolon"]), ours[1..]);
        assert_eq!(kinds(&mut h, NBD_OPT_LIST_META_CONTEXT, &meta_data("other", &[])), [NBD_REP_ERR_UNKNOWN]);
    }

    #[test]
    fn a_selected_context_belongs_to_its_export() {
        let set = |h: &mut Handshake, name: &str, queries: &[&str]| {
            exchange(h, NBD_OPT_SET_META_CONTEXT, &meta_data(name, queries)).0
        };
        let go = |mut h: Handshake| agreed(exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[])).1).base_allocation;
        let chosen = [(NBD_REP_META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()), (NBD_REP_ACK, vec![])];

        let mut h = structured();
        assert_eq!(set(&mut h, "disk", &["base:allocation"]), chosen);
        assert!(go(h));

        // The wildcard and the empty list select nothing, and replace what was selected.
        for nothing in [&["base:"][..], &[]] {
            let mut h = structured();
            set(&mut h, "disk", &["base:allocation"]);
            assert_eq!(set(&mut h, "disk", nothing), chosen[1..]);
            assert!(!go(h));
        }
        // So does a selection for another export, a failed one, a malformed one and one too long.
        let mut h = structured();
        set(&mut h, "disk", &["base:allocation"]);
        assert_eq!(set(&mut h, "other", &["base:allocation"])[0].0, NBD_REP_ERR_UNKNOWN);
        assert!(!go(h));
        for junk in [&b"junk"[..], &vec![0; MAX_OPTION_DATA + 1]] {
            let mut h = structured();
            set(&mut h, "disk", &["base:allocation"]);
            exchange(&mut h, NBD_OPT_SET_META_CONTEXT, junk);
            assert!(!go(h));
        }
    }

    #[test]
    fn long_data_is_skipped_and_the_next_option_understood() {
        let mut h = structured();
        for kind in [NBD_OPT_GO, NBD_OPT_SET_META_CONTEXT, NBD_OPT_LIST] {
            assert_eq!(kinds(&mut h, kind, &vec![0; MAX_OPTION_DATA + 1]), [NBD_REP_ERR_TOO_BIG]);
        }
        assert_eq!(kinds(&mut h, 77, &vec![0; MAX_OPTION_DATA + 1]), [NBD_REP_ERR_UNSUP]);
        // Skipped data is not kept while it arrives.
        h.feed(&option(NBD_OPT_GO, &[])[..12]);
        h.feed(&u32::MAX.to_be_bytes());
        for _ in 0..100 {
            h.feed(&[0; 100_000]);
            assert_eq!(h.step(), Step::Read);
            assert!(h.input.is_empty());
        }
    }

    #[test]
    fn endless_options_are_cut_off() {
        let mut h = ready();
        for _ in 0..MAX_OPTIONS {
            h.feed(&option(77, b""));
            assert_eq!(h.step(), Step::Read);
            h.take_output();
        }
        h.feed(&option(77, b""));
        assert_eq!(h.step(), Step::Close(Closing::Violation(Violation::TooManyOptions)));
    }

    #[test]
    fn a_long_refusal_fits_a_protocol_string() {
        let mut h = ready();
        h.feed(&option(NBD_OPT_GO, &info_data("disk", &[])));
        assert!(matches!(h.step(), Step::Export { purpose: Purpose::Go, .. }));
        h.export(Err(Refusal::Unknown("ä".repeat(MAX_STRING))));
        assert_eq!(h.take_output().len(), 20 + MAX_STRING);
    }

    /// Feeds `stream` in pieces of the given sizes; returns everything observable.
    fn observe(stream: &[u8], pieces: &[usize]) -> (Vec<u8>, Vec<Step>, Vec<u8>) {
        let mut h = Handshake::new();
        let mut output = Vec::new();
        let mut steps = Vec::new();
        let mut rest = stream;
        let mut sizes = pieces.iter().copied().chain(std::iter::repeat(usize::MAX));
        loop {
            let step = h.step();
            output.extend(h.take_output());
            match step {
                Step::Read if rest.is_empty() => break,
                Step::Read => {
                    let n = sizes.next().unwrap().clamp(1, rest.len());
                    h.feed(&rest[..n]);
                    rest = &rest[n..];
                    continue;
                }
                Step::Export { ref name, .. } if name == "disk" => h.export(Ok(info())),
                Step::Export { .. } => h.export(Err(Refusal::Unknown("none".into()))),
                Step::List => h.list(Ok(vec!["disk".into()])),
                Step::Transmission(_) | Step::Close(_) => {
                    steps.push(step);
                    break;
                }
            }
            steps.push(step);
        }
        let mut left = h.into_rest().to_vec();
        left.extend(rest);
        (output, steps, left)
    }

    fn plausible_option() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![Just("disk"), Just("other"), Just("")];
        let query = prop_oneof![Just("base:allocation"), Just("base:"), Just("x-y:z")];
        prop_oneof![
            (0u32..14, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(k, d)| option(k, &d)),
            (6u32..8, name.clone(), proptest::collection::vec(0u16..5, 0..4))
                .prop_map(|(k, n, items)| option(k, &info_data(n, &items))),
            (9u32..11, name, proptest::collection::vec(query, 0..3))
                .prop_map(|(k, n, queries)| option(k, &meta_data(n, &queries))),
            Just(option(NBD_OPT_STRUCTURED_REPLY, b"")),
            Just(option(NBD_OPT_LIST, b"")),
            Just(option(NBD_OPT_GO, &[0; MAX_OPTION_DATA + 100])),
        ]
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            pieces in proptest::collection::vec(1usize..50, 0..20),
        ) {
            observe(&bytes, &pieces);
            let framed = [&[0, 0, 0, 3], &b"IHAVEOPT\0\0\0"[..], &bytes].concat();
            observe(&framed, &pieces);
        }

        #[test]
        fn any_split_gives_the_same_decisions(
            options in proptest::collection::vec(plausible_option(), 0..8),
            pieces in proptest::collection::vec(1usize..100, 0..60),
        ) {
            let stream = [&[0, 0, 0, 1][..], &options.concat()].concat();
            let whole = observe(&stream, &[]);
            prop_assert_eq!(&observe(&stream, &pieces), &whole);
            prop_assert_eq!(&observe(&stream, &vec![1; stream.len().min(2000)]), &whole);
        }
    }
}
