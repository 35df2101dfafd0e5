//! The handshake, driven by any bytes in any pieces: what it sends is well-formed, and does not depend on the pieces.
//!
//! An input is a byte for the server (TLS, when it begins to stop), a byte for the size of the pieces, and what the
//! client sends.

use cowgate::nbd::handshake::{Agreed, ExportInfo, Handshake, Listed, Refusal, Replies, Step, Tls};
use cowgate::nbd::{
    MAX_LISTED_CONTEXTS, MAX_STRING, NBD_FLAG_BLOCK_STATUS_PAYLOAD, NBD_FLAG_HAS_FLAGS, NBD_FLAG_SEND_DF,
    NBD_OPTION_MAGIC, NBD_REPLY_MAGIC,
};

/// Questions after which the server begins to stop, where the input asks for that.
const STOPS_AFTER: usize = 3;
/// Most bytes that one option may bring about.
const MOST_OUTPUT: usize = MAX_LISTED_CONTEXTS + (128 << 10);

pub fn run(data: &[u8]) {
    let [server, piece, stream @ ..] = data else { return };
    let whole = talk(*server, stream, usize::MAX);
    let pieces = talk(*server, stream, usize::from(*piece).max(1));
    // clear text behind NBD_OPT_STARTTLS is only there when it came with it
    if whole.tls_asked_for || pieces.tls_asked_for {
        return;
    }
    assert_eq!(whole.output, pieces.output);
    assert_eq!(format!("{:?}", whole.steps), format!("{:?}", pieces.steps));
}

struct Talk {
    steps: Vec<Step>,
    output: Vec<u8>,
    tls_asked_for: bool,
}

fn talk(server: u8, stream: &[u8], piece: usize) -> Talk {
    let tls = [Tls::Off, Tls::Offered, Tls::Required][usize::from(server % 3)];
    let mut handshake = Handshake::with_tls(tls);
    let mut talk = Talk { steps: Vec::new(), output: Vec::new(), tls_asked_for: tls != Tls::Off };
    let mut rest = stream;
    loop {
        let step = handshake.step();
        let output = handshake.take_output();
        assert!(output.len() <= MOST_OUTPUT * (1 + piece.min(stream.len()) / 16), "bounded by what was asked");
        talk.output.extend(output);
        match &step {
            Step::Read if rest.is_empty() => break,
            Step::Read => {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                handshake.feed(now);
                rest = later;
                continue;
            }
            Step::Export { name, .. } => handshake.export(export(name)),
            Step::Contexts { name, beyond_base } => handshake.contexts(contexts(name, *beyond_base)),
            Step::List => {
                handshake.listed([
                    Listed { name: "disk".into(), description: Some("words".into()) },
                    Listed { name: String::new(), description: None },
                ]);
                handshake.list(Ok(()));
            }
            Step::StartTls => handshake.tls_started(),
            Step::Transmission(agreed) => {
                agreed_well(agreed);
                talk.steps.push(step);
                break;
            }
            Step::Close(_) => {
                talk.steps.push(step);
                break;
            }
        }
        talk.steps.push(step);
        if server & 0x80 != 0 && talk.steps.len() == STOPS_AFTER {
            handshake.shut_down();
        }
    }
    well_formed(&talk);
    talk
}

fn export(name: &str) -> Result<ExportInfo, Refusal> {
    match name {
        "disk" | "" => Ok(ExportInfo {
            name: "disk".into(),
            description: Some("words".into()),
            size: 1 << 40,
            flags: NBD_FLAG_HAS_FLAGS,
            min_block: 1,
            preferred_block: 4096,
            max_payload: 32 << 20,
        }),
        "secret" => Err(Refusal::Policy("not for you".into())),
        "locked" => Err(Refusal::TlsRequired),
        "late" => Err(Refusal::Shutdown),
        other => Err(Refusal::Unknown(format!("no {other}"))),
    }
}

fn contexts(name: &str, beyond_base: bool) -> Result<Vec<String>, Refusal> {
    export(name)?;
    let base = ["base:allocation".to_owned()].into_iter();
    let others = ["qemu:allocation-depth".into(), "qemu:dirty-bitmap:a".into(), "qemu:dirty-bitmap:".into()];
    let long = (0..300).map(|i| format!("qemu:dirty-bitmap:{i:01000}"));
    Ok(match (name, beyond_base) {
        (_, false) => base.collect(),
        ("", true) => base.chain(long).collect(),
        _ => base.chain(others).collect(),
    })
}

fn agreed_well(agreed: &Agreed) {
    let has = |flag: u16| agreed.flags & flag != 0;
    assert_eq!(has(NBD_FLAG_SEND_DF), agreed.replies != Replies::Simple);
    let filter = agreed.replies == Replies::Extended && !agreed.contexts.is_empty();
    assert_eq!(has(NBD_FLAG_BLOCK_STATUS_PAYLOAD), filter);
    assert!(agreed.replies != Replies::Simple || agreed.contexts.is_empty());
    let mut ids: Vec<u32> = agreed.contexts.iter().map(|c| c.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), agreed.contexts.len());
}

/// The greeting, then option replies that end where the output ends, but for the one answer that has no header.
fn well_formed(talk: &Talk) {
    let greeting = [&b"NBDMAGIC"[..], &NBD_OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat();
    let mut rest = talk.output.strip_prefix(&greeting[..]).expect("a greeting");
    while let Some(body) = rest.strip_prefix(&NBD_REPLY_MAGIC.to_be_bytes()) {
        let number = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().expect("four bytes"));
        let (kind, len) = (number(4), number(8) as usize);
        let data = &body[12..12 + len];
        if kind & 1 << 31 != 0 {
            assert!(len <= MAX_STRING && std::str::from_utf8(data).is_ok(), "an error is a string");
        } else {
            assert!((1..=4).contains(&kind) && (kind != 1 || data.is_empty()), "reply type {kind}");
        }
        rest = &body[12 + len..];
    }
    let entered = matches!(talk.steps.last(), Some(Step::Transmission(_)));
    assert!(rest.is_empty() || (entered && matches!(rest.len(), 10 | 134)), "{} bytes more", rest.len());
}
