//! The handshake, driven by bytes as a client sends them.

use super::*;
use crate::nbd::{BASE_ALLOCATION, NBD_FLAG_HAS_FLAGS};
use proptest::prelude::*;

mod tls;

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

fn listed(name: &str, description: Option<&str>) -> Listed {
    Listed { name: name.into(), description: description.map(str::to_owned) }
}

fn contexts(name: &str, beyond_base: bool) -> Result<Vec<String>, Refusal> {
    let all = [BASE_ALLOCATION, "qemu:allocation-depth", "qemu:dirty-bitmap:a"];
    match name {
        "disk" => Ok(all.iter().take(if beyond_base { 3 } else { 1 }).map(ToString::to_string).collect()),
        "many" => Ok((0..300).map(|i| format!("qemu:dirty-bitmap:{}{i}", "x".repeat(1000))).collect()),
        _ => Err(Refusal::Unknown("none".into())),
    }
}

/// Answers like a server with one export, "disk".
fn drive(h: &mut Handshake) -> Step {
    loop {
        match h.step() {
            Step::Export { name, .. } if name == "disk" => h.export(Ok(info())),
            Step::Export { name, .. } if name == "secret" => h.export(Err(Refusal::Policy("no".into()))),
            Step::Export { name, .. } => h.export(Err(Refusal::Unknown(format!("no export {name}")))),
            Step::Contexts { name, beyond_base } => h.contexts(contexts(&name, beyond_base)),
            Step::List => {
                h.listed([listed("disk", Some("a disk"))]);
                h.listed([listed("", None)]);
                h.list(Ok(()));
            }
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
        assert_eq!(agreed, Agreed { name: "disk".into(), flags: 1, replies: Replies::Simple, contexts: vec![] });
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
    assert_eq!(agreed(step).replies, Replies::Simple);
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
    assert!(agreed.replies == Replies::Structured && agreed.contexts.is_empty());
}

#[test]
fn extended_headers_take_precedence() {
    let mut h = ready();
    assert_eq!(kinds(&mut h, NBD_OPT_EXTENDED_HEADERS, b"x"), [NBD_REP_ERR_INVALID]);
    assert_eq!(kinds(&mut h, NBD_OPT_EXTENDED_HEADERS, &vec![0; MAX_OPTION_DATA + 1]), [NBD_REP_ERR_TOO_BIG]);
    assert_eq!(kinds(&mut h, NBD_OPT_EXTENDED_HEADERS, b""), [NBD_REP_ACK]);
    assert_eq!(kinds(&mut h, NBD_OPT_EXTENDED_HEADERS, b""), [NBD_REP_ACK]);
    assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ERR_EXT_HEADER_REQD]);
    // the filter of block status is offered when there is something to filter
    let go = |h: &mut Handshake| agreed(exchange(h, NBD_OPT_GO, &info_data("disk", &[])).1);
    let without = go(&mut extended());
    assert_eq!((without.replies, without.flags), (Replies::Extended, NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_DF));
    let set = meta_data("disk", &["base:allocation"]);
    assert_eq!(kinds(&mut h, NBD_OPT_SET_META_CONTEXT, &set), [NBD_REP_META_CONTEXT, NBD_REP_ACK]);
    let with = go(&mut h);
    assert_eq!(with.flags, without.flags | NBD_FLAG_BLOCK_STATUS_PAYLOAD);
    assert_eq!(with.contexts, [Selected { id: 1, name: BASE_ALLOCATION.into() }]);
    // which extended headers bring, and structured replies do not
    let mut h = structured();
    assert_eq!(kinds(&mut h, NBD_OPT_SET_META_CONTEXT, &set), [NBD_REP_META_CONTEXT, NBD_REP_ACK]);
    assert_eq!(go(&mut h).flags, without.flags);
}

#[test]
fn extended_headers_rule_the_old_way_out() {
    let mut h = extended();
    let (replies, step) = exchange(&mut h, NBD_OPT_EXPORT_NAME, b"disk");
    assert_eq!((replies, step), (vec![], Step::Close(Closing::Violation(Violation::ExportName))));
}

#[test]
fn a_server_that_goes_away_says_so() {
    let mut h = structured();
    h.shut_down();
    for (kind, data) in [
        (NBD_OPT_LIST, vec![]),
        (NBD_OPT_GO, info_data("disk", &[])),
        (NBD_OPT_SET_META_CONTEXT, meta_data("disk", &[])),
        (NBD_OPT_GO, vec![0; MAX_OPTION_DATA + 1]),
        (77, vec![]),
    ] {
        assert_eq!(kinds(&mut h, kind, &data), [NBD_REP_ERR_SHUTDOWN], "option {kind}");
    }
    let (replies, step) = exchange(&mut h, NBD_OPT_ABORT, b"");
    assert_eq!((replies, step), (vec![(NBD_REP_ACK, vec![])], Step::Close(Closing::Aborted)));
    let mut h = ready();
    h.shut_down();
    let (replies, step) = exchange(&mut h, NBD_OPT_EXPORT_NAME, b"disk");
    assert_eq!((replies, step), (vec![], Step::Close(Closing::Refused(Refusal::Shutdown))));
}

#[test]
fn options_we_do_not_have() {
    let mut h = ready();
    for unknown in [4, 12, 77, u32::MAX] {
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
            (NBD_REP_SERVER, b"\0\0\0\x04diska disk".to_vec()),
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

fn extended() -> Handshake {
    let mut h = ready();
    assert_eq!(kinds(&mut h, NBD_OPT_EXTENDED_HEADERS, b""), [NBD_REP_ACK]);
    h
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
    let named = |name: &str| (NBD_REP_META_CONTEXT, [&[0; 4], name.as_bytes()].concat());
    let (base, depth, bitmap) =
        (named("base:allocation"), named("qemu:allocation-depth"), named("qemu:dirty-bitmap:a"));
    let end = (NBD_REP_ACK, vec![]);
    assert_eq!(list(&[]), [base.clone(), depth.clone(), bitmap.clone(), end.clone()]);
    assert_eq!(list(&["base:"]), [base.clone(), end.clone()]);
    assert_eq!(list(&["base:allocation", "base:"]), [base, end.clone()]);
    assert_eq!(list(&["qemu:"]), [depth, bitmap.clone(), end.clone()]);
    assert_eq!(list(&["qemu:dirty-bitmap:"]), [bitmap, end.clone()]);
    assert_eq!(list(&["base:x", "x-other:", "nocolon"]), [end]);
    let all = meta_data("many", &[]);
    assert_eq!(kinds(&mut h, NBD_OPT_LIST_META_CONTEXT, &all), [NBD_REP_ERR_TOO_BIG]);
    let one = meta_data("many", &[&format!("qemu:dirty-bitmap:{}7", "x".repeat(1000))]);
    assert_eq!(kinds(&mut h, NBD_OPT_LIST_META_CONTEXT, &one), [NBD_REP_META_CONTEXT, NBD_REP_ACK]);
    assert_eq!(kinds(&mut h, NBD_OPT_LIST_META_CONTEXT, &meta_data("other", &[])), [NBD_REP_ERR_UNKNOWN]);
}

#[test]
fn a_selected_context_belongs_to_its_export() {
    let set = |h: &mut Handshake, name: &str, queries: &[&str]| {
        exchange(h, NBD_OPT_SET_META_CONTEXT, &meta_data(name, queries)).0
    };
    let selected = |mut h: Handshake| agreed(exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[])).1).contexts;
    let go = |h: Handshake| !selected(h).is_empty();
    let chosen = [(NBD_REP_META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()), (NBD_REP_ACK, vec![])];

    let mut h = structured();
    assert_eq!(set(&mut h, "disk", &["base:allocation"]), chosen);
    assert!(go(h));

    // Several, by their names, each once, in the export's order.
    let mut h = structured();
    let asked = ["qemu:dirty-bitmap:a", "qemu:", "base:allocation", "qemu:dirty-bitmap:a", "x-other:b"];
    let replies = set(&mut h, "disk", &asked);
    let second = (NBD_REP_META_CONTEXT, b"\0\0\0\x02qemu:dirty-bitmap:a".to_vec());
    assert_eq!(replies, [chosen[0].clone(), second, chosen[1].clone()]);
    let contexts = [(1, "base:allocation"), (2, "qemu:dirty-bitmap:a")];
    assert_eq!(selected(h), contexts.map(|(id, name)| Selected { id, name: name.into() }));

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
            Step::Contexts { ref name, beyond_base } => h.contexts(contexts(name, beyond_base)),
            Step::List => {
                h.listed([listed("disk", None)]);
                h.list(Ok(()));
            }
            Step::StartTls => h.tls_started(),
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
        Just(option(NBD_OPT_EXTENDED_HEADERS, b"")),
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
