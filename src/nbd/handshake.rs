//! Fixed newstyle negotiation as a state machine that performs no I/O.
//!
//! The connection feeds what it received ([`Handshake::feed`]) and asks for the next [`Step`]. Before it acts on any
//! step it sends what [`Handshake::take_output`] holds. What the machine cannot know (which exports exist, their size
//! and features) it asks for with [`Step::Export`], [`Step::Contexts`] and [`Step::List`]; the answer comes through
//! [`Handshake::export`], [`Handshake::contexts`] and [`Handshake::list`], and asking for the next step goes on. With [`Step::StartTls`] the
//! connection is to be encrypted; [`Handshake::tls_started`] says that it is, and negotiation begins anew.
//!
//! However the client's bytes are split, the steps and the output are the same. Memory is bounded: option data above
//! [`MAX_OPTION_DATA`] is skipped as it arrives.

use super::options::{self, BadData, InfoQuery, MetaQuery};
use super::{
    MAX_LISTED_CONTEXTS, MAX_OPTION_DATA, MAX_OPTIONS, MAX_STRING, NBD_FLAG_BLOCK_STATUS_PAYLOAD,
    NBD_FLAG_C_FIXED_NEWSTYLE, NBD_FLAG_C_NO_ZEROES, NBD_FLAG_FIXED_NEWSTYLE, NBD_FLAG_NO_ZEROES, NBD_FLAG_SEND_DF,
    NBD_INFO_BLOCK_SIZE, NBD_INFO_DESCRIPTION, NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_MAGIC, NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME, NBD_OPT_EXTENDED_HEADERS, NBD_OPT_GO, NBD_OPT_INFO, NBD_OPT_LIST, NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT, NBD_OPT_STARTTLS, NBD_OPT_STRUCTURED_REPLY, NBD_OPTION_MAGIC, NBD_REP_ACK,
    NBD_REP_ERR_EXT_HEADER_REQD, NBD_REP_ERR_INVALID, NBD_REP_ERR_POLICY, NBD_REP_ERR_SHUTDOWN, NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_TOO_BIG, NBD_REP_ERR_UNKNOWN, NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_META_CONTEXT, NBD_REP_SERVER,
    NBD_REPLY_MAGIC,
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
    replies: Replies,
    selection: Option<Selection>,
    options: u32,
    /// The server is going away.
    shutdown: bool,
    tls: Tls,
}

/// What the server says of TLS, for the whole of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tls {
    /// There is none (NOTLS in the specification).
    #[default]
    Off,
    /// The client may start it, and some exports may want it (SELECTIVETLS).
    Offered,
    /// Nothing is negotiated without it (FORCEDTLS).
    Required,
    /// The connection is encrypted.
    Started,
}

/// The form of the replies, and with it that of the requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Replies {
    /// One reply to a request, data or an error.
    #[default]
    Simple,
    /// Any number of chunks to a request.
    Structured,
    /// The same with 64-bit lengths in requests and replies.
    Extended,
}

/// A metadata context that the client selected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selected {
    /// Its number on this connection.
    pub id: u32,
    /// Its name, as the export gave it.
    pub name: String,
}

/// What a client selected last, and of which export.
struct Selection {
    export: String,
    contexts: Vec<Selected>,
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
    /// Answer with [`Handshake::contexts`].
    Contexts {
        /// The export as the client named it.
        name: String,
        /// Contexts beyond `base:allocation` are asked for.
        beyond_base: bool,
    },
    /// Answer with any number of [`Handshake::listed`] and one [`Handshake::list`].
    List,
    /// Encrypt the connection, then say so with [`Handshake::tls_started`].
    StartTls,
    /// Negotiation is over; bytes already received beyond it are in [`Handshake::into_rest`].
    Transmission(Agreed),
    /// Close the connection.
    Close(Closing),
}

/// Why an export is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
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
    /// Transmission flags without those that depend on the negotiation: `NBD_FLAG_SEND_DF` and
    /// `NBD_FLAG_BLOCK_STATUS_PAYLOAD`.
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
    /// It is, but not without TLS.
    TlsRequired,
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
    /// Form of requests and replies.
    pub replies: Replies,
    /// Of these the client may ask block status.
    pub contexts: Vec<Selected>,
}

/// An export in the list of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Canonical name.
    pub name: String,
    /// Words for people.
    pub description: Option<String>,
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
    /// `NBD_OPT_EXPORT_NAME` with extended headers, to which it has no answer.
    #[error("NBD_OPT_EXPORT_NAME after NBD_OPT_EXTENDED_HEADERS")]
    ExportName,
    /// Something in clear text behind `NBD_OPT_STARTTLS`, which must not be taken for something encrypted.
    #[error("{0} bytes in clear text behind NBD_OPT_STARTTLS")]
    PlainText(usize),
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
    StartTls,
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
    /// A handshake without TLS whose output is the greeting.
    pub fn new() -> Self {
        Self::with_tls(Tls::Off)
    }

    /// The same for a server that may have TLS.
    pub fn with_tls(tls: Tls) -> Self {
        let mut output = Vec::with_capacity(256);
        output.put_u64(NBD_MAGIC);
        output.put_u64(NBD_OPTION_MAGIC);
        output.put_u16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
        Handshake {
            phase: Phase::ClientFlags,
            input: BytesMut::new(),
            output,
            no_zeroes: false,
            replies: Replies::Simple,
            selection: None,
            options: 0,
            shutdown: false,
            tls,
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
                Phase::StartTls => {
                    self.phase = Phase::StartTls;
                    return Step::StartTls;
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
            _ => unreachable!("an answer follows its question"),
        }
    }

    /// Answers [`Step::Contexts`] with the names of the export's contexts. Panics when that was not the latest step.
    pub fn contexts(&mut self, answer: Result<Vec<String>, Refusal>) {
        match std::mem::replace(&mut self.phase, Phase::Option) {
            Phase::Asked(Question::Meta { option, query }) => match answer {
                Ok(known) if option == NBD_OPT_SET_META_CONTEXT => self.select(query, known),
                Ok(known) => self.list_contexts(&query, known),
                Err(refusal) => self.refuse(option, &refusal),
            },
            _ => unreachable!("an answer follows its question"),
        }
    }

    /// Names some of the exports that [`Step::List`] asks for; there may be too many for one output. Panics when that was
    /// not the latest step.
    pub fn listed(&mut self, exports: impl IntoIterator<Item = Listed>) {
        assert!(matches!(self.phase, Phase::Asked(Question::List)), "an answer follows its question");
        for Listed { name, description } in exports {
            let words = description.unwrap_or_default();
            let len = (name.len() as u32).to_be_bytes();
            self.reply(NBD_OPT_LIST, NBD_REP_SERVER, &[&len, name.as_bytes(), words.as_bytes()]);
        }
    }

    /// Ends the answer to [`Step::List`]. Panics when that was not the latest step.
    pub fn list(&mut self, end: Result<(), Refusal>) {
        assert!(matches!(self.phase, Phase::Asked(Question::List)), "an answer follows its question");
        self.phase = Phase::Option;
        match end {
            Ok(()) => self.reply(NBD_OPT_LIST, NBD_REP_ACK, &[]),
            Err(refusal) => self.refuse(NBD_OPT_LIST, &refusal),
        }
    }

    /// Says that the server is going away: from now on every option but `NBD_OPT_ABORT` is answered so.
    pub fn shut_down(&mut self) {
        self.shutdown = true;
    }

    /// Says that [`Step::StartTls`] is done. What was negotiated in clear text is forgotten. Panics when that was not the
    /// latest step.
    pub fn tls_started(&mut self) {
        assert!(matches!(self.phase, Phase::StartTls), "TLS starts when it was asked for");
        self.phase = Phase::Option;
        self.tls = Tls::Started;
        self.replies = Replies::Simple;
        self.selection = None;
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
        self.phase = if flags & !(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES) == 0 {
            self.no_zeroes = flags & NBD_FLAG_C_NO_ZEROES != 0;
            Phase::Option
        } else {
            violation(Violation::ClientFlags(flags))
        };
        // A client without NBD_FLAG_C_FIXED_NEWSTYLE can only use NBD_OPT_EXPORT_NAME by the specification; the server
        // may honour more, and nothing is gained by not doing so. TLS it may not.
        if flags & NBD_FLAG_C_FIXED_NEWSTYLE == 0 {
            match self.tls {
                Tls::Required => self.phase = Phase::Over(Step::Close(Closing::Refused(Refusal::TlsRequired))),
                _ => self.tls = Tls::Off,
            }
        }
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
        if self.shutdown && option != NBD_OPT_ABORT {
            match option {
                NBD_OPT_EXPORT_NAME => self.phase = Phase::Over(Step::Close(Closing::Refused(Refusal::Shutdown))),
                _ => self.refuse(option, &Refusal::Shutdown),
            }
            return None;
        }
        if self.tls == Tls::Required && !matches!(option, NBD_OPT_STARTTLS | NBD_OPT_ABORT) {
            match option {
                NBD_OPT_EXPORT_NAME => self.phase = Phase::Over(Step::Close(Closing::Refused(Refusal::TlsRequired))),
                _ => self.refuse(option, &Refusal::TlsRequired),
            }
            return None;
        }
        match option {
            NBD_OPT_EXPORT_NAME if self.replies == Replies::Extended => self.phase = violation(Violation::ExportName),
            NBD_OPT_EXPORT_NAME => match options::string(data) {
                Ok(name) => return Some(Question::ExportName(name)),
                Err(_) => self.phase = violation(Violation::Name(data.len() as u32)),
            },
            NBD_OPT_ABORT => {
                self.reply(option, NBD_REP_ACK, &[]);
                self.phase = Phase::Over(Step::Close(Closing::Aborted));
            }
            NBD_OPT_LIST | NBD_OPT_STRUCTURED_REPLY | NBD_OPT_STARTTLS | NBD_OPT_EXTENDED_HEADERS
                if !data.is_empty() =>
            {
                self.error(option, NBD_REP_ERR_INVALID, "this option takes no data");
            }
            NBD_OPT_LIST => return Some(Question::List),
            NBD_OPT_STRUCTURED_REPLY if self.replies == Replies::Extended => {
                self.error(option, NBD_REP_ERR_EXT_HEADER_REQD, "extended headers have been agreed on");
            }
            NBD_OPT_STRUCTURED_REPLY | NBD_OPT_EXTENDED_HEADERS => {
                let structured = option == NBD_OPT_STRUCTURED_REPLY;
                self.replies = if structured { Replies::Structured } else { Replies::Extended };
                self.reply(option, NBD_REP_ACK, &[]);
            }
            NBD_OPT_STARTTLS => self.start_tls(),
            NBD_OPT_INFO | NBD_OPT_GO => match options::info_query(data) {
                Ok(query) => return Some(Question::Info { option, query }),
                Err(bad) => self.bad_data(option, bad),
            },
            NBD_OPT_LIST_META_CONTEXT | NBD_OPT_SET_META_CONTEXT => return self.meta_option(option, data),
            _ => self.error(option, NBD_REP_ERR_UNSUP, "unknown option"),
        }
        None
    }

    fn start_tls(&mut self) {
        let option = NBD_OPT_STARTTLS;
        match self.tls {
            Tls::Off => self.error(option, NBD_REP_ERR_POLICY, "TLS is turned off on this server"),
            Tls::Started => self.error(option, NBD_REP_ERR_INVALID, "TLS has been started already"),
            // Nobody may send on before the reply; whoever stands between client and server could.
            _ if !self.input.is_empty() => self.phase = violation(Violation::PlainText(self.input.len())),
            Tls::Offered | Tls::Required => {
                self.reply(option, NBD_REP_ACK, &[]);
                self.phase = Phase::StartTls;
            }
        }
    }

    fn meta_option(&mut self, option: u32, data: &[u8]) -> Option<Question> {
        if option == NBD_OPT_SET_META_CONTEXT {
            // A new selection replaces the old one, also when it fails.
            self.selection = None;
        }
        if self.replies == Replies::Simple {
            self.error(option, NBD_REP_ERR_INVALID, "metadata contexts need structured replies or extended headers");
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
            Question::Meta { option, query } => {
                let beyond_base = query.beyond_base(*option == NBD_OPT_LIST_META_CONTEXT);
                Step::Contexts { name: query.name.clone(), beyond_base }
            }
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

    fn list_contexts(&mut self, query: &MetaQuery, known: Vec<String>) {
        let option = NBD_OPT_LIST_META_CONTEXT;
        let named: Vec<String> = known.into_iter().filter(|name| query.lists(name)).collect();
        if named.iter().map(String::len).sum::<usize>() > MAX_LISTED_CONTEXTS {
            return self.error(
                option,
                NBD_REP_ERR_TOO_BIG,
                "too many contexts for a list: name the one that is wanted",
            );
        }
        for name in named {
            // A list's context ID is reserved.
            self.reply(option, NBD_REP_META_CONTEXT, &[&[0; 4], name.as_bytes()]);
        }
        self.reply(option, NBD_REP_ACK, &[]);
    }

    fn select(&mut self, query: MetaQuery, known: Vec<String>) {
        let option = NBD_OPT_SET_META_CONTEXT;
        let names = known.into_iter().filter(|name| query.selects(name));
        let contexts: Vec<Selected> = names.zip(1..).map(|(name, id)| Selected { id, name }).collect();
        for Selected { id, name } in &contexts {
            self.reply(option, NBD_REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
        }
        self.selection = Some(Selection { export: query.name, contexts });
        self.reply(option, NBD_REP_ACK, &[]);
    }

    fn agreed(&self, name: String, info: &ExportInfo) -> Agreed {
        // A selection made for another export does not count.
        let selection = self.selection.as_ref().filter(|selection| selection.export == name);
        let contexts = selection.map_or_else(Vec::new, |selection| selection.contexts.clone());
        let flag = |condition: bool, flag: u16| if condition { flag } else { 0 };
        let filter = self.replies == Replies::Extended && !contexts.is_empty();
        Agreed {
            name,
            flags: info.flags
                | flag(self.replies != Replies::Simple, NBD_FLAG_SEND_DF)
                | flag(filter, NBD_FLAG_BLOCK_STATUS_PAYLOAD),
            replies: self.replies,
            contexts,
        }
    }

    /// The end of an option whose data was too long to look at.
    fn too_long(&mut self, option: u32) {
        match option {
            _ if self.shutdown || (self.tls == Tls::Required && option != NBD_OPT_STARTTLS) => {
                assert!(self.option(option, &[]).is_none(), "without TLS or a future nothing is asked");
            }
            NBD_OPT_LIST
            | NBD_OPT_STARTTLS
            | NBD_OPT_INFO
            | NBD_OPT_GO
            | NBD_OPT_STRUCTURED_REPLY
            | NBD_OPT_EXTENDED_HEADERS
            | NBD_OPT_LIST_META_CONTEXT
            | NBD_OPT_SET_META_CONTEXT => {
                if option == NBD_OPT_SET_META_CONTEXT {
                    self.selection = None;
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
            // The specification knows this answer to requests to see or use an export, and when nothing goes without.
            Refusal::TlsRequired
                if self.tls == Tls::Required
                    || (self.tls == Tls::Offered && matches!(option, NBD_OPT_INFO | NBD_OPT_GO)) =>
            {
                self.error(option, NBD_REP_ERR_TLS_REQD, "this needs TLS");
            }
            Refusal::TlsRequired => self.error(option, NBD_REP_ERR_POLICY, "this export needs TLS"),
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
mod tests;
