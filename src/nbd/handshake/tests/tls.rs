//! `NBD_OPT_STARTTLS` in the three modes of the specification.

use super::*;

fn with_tls(tls: Tls) -> Handshake {
    let mut h = Handshake::with_tls(tls);
    h.take_output();
    h.feed(&(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES).to_be_bytes());
    assert_eq!(drive(&mut h), Step::Read);
    h
}

/// Started by the client, and done.
fn started(tls: Tls) -> Handshake {
    let mut h = with_tls(tls);
    assert_eq!(exchange(&mut h, NBD_OPT_STARTTLS, b""), (vec![(NBD_REP_ACK, vec![])], Step::StartTls));
    assert_eq!(h.step(), Step::StartTls, "as long as it is not done");
    h.tls_started();
    h
}

#[test]
fn without_tls_it_is_refused_and_never_required() {
    let mut h = with_tls(Tls::Off);
    assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b""), [NBD_REP_ERR_POLICY]);
    assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b"x"), [NBD_REP_ERR_INVALID]);
    assert_eq!(kinds(&mut h, NBD_OPT_LIST, b""), [NBD_REP_SERVER, NBD_REP_SERVER, NBD_REP_ACK]);
}

#[test]
fn a_client_may_start_it_once() {
    for tls in [Tls::Offered, Tls::Required] {
        let mut h = started(tls);
        assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b""), [NBD_REP_ERR_INVALID]);
        assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b"x"), [NBD_REP_ERR_INVALID]);
        let (_, step) = exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[]));
        assert_eq!(agreed(step).name, "disk");
    }
}

#[test]
fn data_with_it_is_an_error_and_starts_nothing() {
    for tls in [Tls::Offered, Tls::Required] {
        let mut h = with_tls(tls);
        assert_eq!(exchange(&mut h, NBD_OPT_STARTTLS, b"x").1, Step::Read);
        assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, &vec![0; MAX_OPTION_DATA + 1]), [NBD_REP_ERR_TOO_BIG]);
        assert_eq!(exchange(&mut h, NBD_OPT_STARTTLS, b"").1, Step::StartTls);
    }
}

#[test]
fn what_was_negotiated_in_clear_text_is_forgotten() {
    let mut h = with_tls(Tls::Offered);
    let meta = meta_data("disk", &["base:allocation"]);
    assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ACK]);
    assert_eq!(kinds(&mut h, NBD_OPT_SET_META_CONTEXT, &meta), [NBD_REP_META_CONTEXT, NBD_REP_ACK]);
    assert_eq!(exchange(&mut h, NBD_OPT_STARTTLS, b"").1, Step::StartTls);
    h.tls_started();
    assert_eq!(kinds(&mut h, NBD_OPT_SET_META_CONTEXT, &meta), [NBD_REP_ERR_INVALID], "no structured replies");
    let agreed = agreed(exchange(&mut h, NBD_OPT_GO, &info_data("disk", &[])).1);
    assert!(agreed.replies == Replies::Simple && agreed.contexts.is_empty());
}

#[test]
fn clear_text_behind_it_is_not_taken_for_anything_else() {
    let start = option(NBD_OPT_STARTTLS, b"");
    for behind in [&option(NBD_OPT_GO, &info_data("disk", &[]))[..], b"\x16", b"\x16\x03\x01"] {
        let mut h = with_tls(Tls::Offered);
        h.feed(&[&start, behind].concat());
        let violation = Violation::PlainText(behind.len());
        assert_eq!(h.step(), Step::Close(Closing::Violation(violation)));
        assert!(h.take_output().is_empty(), "nothing is acknowledged");
    }
}

#[test]
fn nothing_goes_without_it_where_it_is_required() {
    let mut h = with_tls(Tls::Required);
    let go = info_data("disk", &[]);
    for (kind, data) in [
        (NBD_OPT_LIST, &b""[..]),
        (NBD_OPT_LIST, b"malformed"),
        (NBD_OPT_INFO, &go),
        (NBD_OPT_GO, &go),
        (NBD_OPT_GO, &vec![0; MAX_OPTION_DATA + 1]),
        (NBD_OPT_STRUCTURED_REPLY, b""),
        (NBD_OPT_SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])),
        (77, b""),
        (77, &vec![0; MAX_OPTION_DATA + 1]),
    ] {
        assert_eq!(kinds(&mut h, kind, data), [NBD_REP_ERR_TLS_REQD], "option {kind}");
    }
    let mut named = with_tls(Tls::Required);
    let (replies, step) = exchange(&mut named, NBD_OPT_EXPORT_NAME, b"disk");
    assert_eq!((replies, step), (vec![], Step::Close(Closing::Refused(Refusal::TlsRequired))));
    let (replies, step) = exchange(&mut h, NBD_OPT_ABORT, b"");
    assert_eq!((replies, step), (vec![(NBD_REP_ACK, vec![])], Step::Close(Closing::Aborted)));
}

#[test]
fn one_export_may_require_it() {
    let ask = |kind: u32, data: &[u8]| {
        let mut h = with_tls(Tls::Offered);
        assert_eq!(kinds(&mut h, NBD_OPT_STRUCTURED_REPLY, b""), [NBD_REP_ACK]);
        h.feed(&option(kind, data));
        match h.step() {
            Step::Export { .. } => h.export(Err(Refusal::TlsRequired)),
            Step::Contexts { .. } => h.contexts(Err(Refusal::TlsRequired)),
            step => panic!("{step:?}"),
        }
        let step = h.step();
        (h.take_output().get(12..16).map(|kind| u32::from_be_bytes(kind.try_into().unwrap())), step)
    };
    for kind in [NBD_OPT_INFO, NBD_OPT_GO] {
        assert_eq!(ask(kind, &info_data("disk", &[])), (Some(NBD_REP_ERR_TLS_REQD), Step::Read));
    }
    // which is the answer to these two only
    assert_eq!(ask(NBD_OPT_LIST_META_CONTEXT, &meta_data("disk", &[])), (Some(NBD_REP_ERR_POLICY), Step::Read));
    let closed = Step::Close(Closing::Refused(Refusal::TlsRequired));
    assert_eq!(ask(NBD_OPT_EXPORT_NAME, b"disk"), (None, closed));
}

#[test]
fn a_client_that_does_not_speak_fixed_newstyle_has_no_tls() {
    let flags = |tls| {
        let mut h = Handshake::with_tls(tls);
        h.take_output();
        h.feed(&0u32.to_be_bytes());
        let step = h.step();
        (h, step)
    };
    let (mut h, step) = flags(Tls::Offered);
    assert_eq!(step, Step::Read);
    assert_eq!(kinds(&mut h, NBD_OPT_STARTTLS, b""), [NBD_REP_ERR_POLICY]);
    assert_eq!(flags(Tls::Required).1, Step::Close(Closing::Refused(Refusal::TlsRequired)));
}

proptest! {
    #[test]
    fn whatever_is_sent_in_clear_text_brings_nothing_where_tls_is_required(
        options in proptest::collection::vec(plausible_option(), 0..8),
    ) {
        let mut h = with_tls(Tls::Required);
        h.feed(&options.concat());
        let step = h.step();
        prop_assert!(
            matches!(step, Step::Read | Step::StartTls | Step::Close(_)), "neither asked nor served: {step:?}"
        );
    }
}
