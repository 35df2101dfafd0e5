//! Tests of the configuration keys.

use super::*;
use crate::export::client_keys::CopyOnWrite;
use crate::export::image_keys::DetectZeroes;
use crate::export::reader::MAX_PATH_BYTES;
use crate::qcow2::compress::Compression;
use proptest::prelude::*;

const FILE: &str = "/etc/cowgate/config";

fn base(text: &str) -> Parsed {
    parse(text.as_bytes(), Path::new(FILE), Role::Base)
}

fn included(text: &str) -> Parsed {
    parse(text.as_bytes(), Path::new("/etc/cowgate/conf.d/a.conf"), Role::Included)
}

/// The problems as `line severity key`.
fn found(parsed: &Parsed) -> Vec<String> {
    let show = |p: &Problem| format!("{} {} {}", p.line.unwrap_or(0), p.severity, p.key.as_deref().unwrap_or("-"));
    parsed.problems.iter().map(show).collect()
}

#[test]
fn a_complete_configuration() {
    let parsed = base(
        "[generic]\nlistenaddr = 127.0.0.1, ::1, localhost\nport = 10810\nincludedir = /etc/cowgate/conf.d\n\
         allowlist = true\nunixsock = /run/cowgate/nbd.sock\nduallisten = 1\nworkers = 3\n\
         imageroots = /srv/images, /srv/back up\n\
         [disk]\nexportname = /srv/images/disk.qcow2\nreadonly = true\nflush = false\nfua = 1\ntrim = true\n\
         rotational = true\nmaxconnections = 4\n",
    );
    assert_eq!(found(&parsed), [] as [&str; 0]);
    let server = parsed.server.expect("server");
    assert_eq!(server.listen.len(), 3);
    assert_eq!(server.listen[2], Listen::Host("localhost".into()));
    assert_eq!((server.port, server.workers), (10810, Some(3)));
    assert!(server.tcp() && server.list_allowed && server.dual_listen);
    assert_eq!(server.image_roots, Some(vec!["/srv/images".into(), "/srv/back up".into()]));
    let disk = &parsed.exports[0];
    assert_eq!((disk.name.as_str(), disk.format), ("disk", Format::Qcow2));
    assert_eq!((disk.flush, disk.fua, disk.trim), (Some(false), Some(true), Some(true)));
    assert_eq!((disk.read_only, disk.rotational, disk.max_connections), (true, true, Some(4)));
    assert_eq!(disk.source, Source { file: FILE.into(), line: 10 });
}

#[test]
fn a_default_export_is_named() {
    let named = |value: &str| {
        let parsed = base(&format!("[generic]\ndefaultexport = {value}\n"));
        (parsed.server.and_then(|s| s.default_export), parsed.problems.len())
    };
    assert_eq!(named("a disk"), (Some("a disk".into()), 0));
    assert_eq!(named(""), (None, 1));
    assert_eq!(named(&"x".repeat(MAX_NAME_BYTES)).1, 0);
    assert_eq!(named(&"x".repeat(MAX_NAME_BYTES + 1)), (None, 1));
    assert_eq!(base("[generic]\n").server.unwrap().default_export, None);
}

#[test]
fn how_the_image_is_used() {
    let parsed = included(
        "[a]\nexportname=/a.qcow2\ncompress = zstd\ndetectzeroes = unmap\nl2cache = 16M\n\
         [b]\nexportname=/b.qcow2\nsnapshot = before update\n",
    );
    assert_eq!(found(&parsed), [] as [&str; 0]);
    let (a, b) = (&parsed.exports[0], &parsed.exports[1]);
    assert_eq!((a.image.compress, a.image.detect_zeroes), (Some(Compression::Zstd), DetectZeroes::Unmap));
    assert_eq!((a.image.cache_bytes, a.read_only), (Some(16 << 20), false));
    assert_eq!((b.image.snapshot.as_deref(), b.read_only), (Some("before update"), true));
    let parsed = included(
        "[a]\nexportname=/a.qcow2\ncompress=lzo\ndetectzeroes=true\nl2cache=1K\nsnapshot=\n\
         [b]\nexportname=/b\ncompress=zlib\nsnapshot=x\nl2cache=1M\ndetectzeroes=on\n",
    );
    let expected = [
        "3 error compress",
        "4 error detectzeroes",
        "5 error l2cache",
        "6 error snapshot",
        "9 error compress",
        "10 error snapshot",
        "11 warning l2cache",
    ];
    assert_eq!(found(&parsed), expected);
}

#[test]
fn what_each_client_gets() {
    let parsed = included(
        "[a]\nexportname=/srv/a\nauthfile=/etc/allow\nprerun=check %s\npostrun = log \"%s\" 100%%\nfilesize=1099511627776\n\
         multifile=1\ncopyonwrite=true\ncowdir=/tmp\nsparse_cow=true\nsync=true\n\
         [b]\nexportname=/b.qcow2\nsnapshot=x\ncopyonwrite=1\n\
         [c]\nexportname=/c d\nauthfile=\nprerun=\npostrun=look \"$COWGATE_PATH\"\nfilesize=0\nmultifile=0\ncopyonwrite=0\ncowdir=\n",
    );
    assert_eq!(found(&parsed), [] as [&str; 0]);
    let [a, b, c] = &parsed.exports[..] else { panic!("three exports") };
    let expected = ClientKeys {
        auth_file: Some("/etc/allow".into()),
        prerun: Some("check %s".into()),
        postrun: Some("log \"%s\" 100%%".into()),
        file_size: Some(1 << 40),
        multi_file: true,
        copy_on_write: Some(CopyOnWrite { directory: Some("/tmp".into()) }),
        sync: true,
        untrusted: None,
    };
    assert_eq!(a.client, expected);
    assert!(b.client.copy_on_write.is_some() && !b.read_only, "the snapshot is not written, the layer over it is");
    let postrun = Some("look \"$COWGATE_PATH\"".into());
    assert_eq!(c.client, ClientKeys { postrun, ..ClientKeys::default() });
    let parsed = included(
        "[a]\nexportname=/a b\nprerun=check '%s'\n[b]\nexportname=/b.qcow2\nmultifile=1\n\
         [c]\nexportname=/c\nreadonly=1\ncopyonwrite=1\n[d]\nexportname=/d\ncowdir=/tmp\nsparse_cow=1\n\
         [e]\nexportname=/e\nfilesize=-1\n",
    );
    let expected = [
        "3 refused prerun",
        "6 error multifile",
        "10 warning copyonwrite",
        "13 warning cowdir",
        "14 warning sparse_cow",
        "17 refused filesize",
    ];
    assert_eq!(found(&parsed), expected);
}

#[test]
fn what_clients_may_take() {
    let parsed = base(
        "[generic]\nhandshaketimeout = 2.5\nidletimeout = 600\nmaxclients = 5000\nmaxclientsperip = 20\nmaxmemory = 2G\n\
         [a]\nexportname=/a\nbandwidthlimit = 100M\niopslimit = 2000\nidletimeout = 0\n\
         [b]\nexportname=/b\nbandwidthlimit = 0\niopslimit = 0\n",
    );
    assert_eq!(found(&parsed), [] as [&str; 0]);
    let expected = ServerLimits {
        handshake_timeout: Duration::from_millis(2500),
        idle_timeout: Duration::from_secs(600),
        max_clients: 5000,
        max_clients_per_address: Some(20),
        max_memory: Some(2 << 30),
    };
    assert_eq!(parsed.server.expect("server").limits, expected);
    let (a, b) = (&parsed.exports[0], &parsed.exports[1]);
    let expected = LimitKeys { bandwidth: Some(100 << 20), iops: Some(2000), idle_timeout: Some(Duration::ZERO) };
    assert_eq!((a.limits, b.limits), (expected, LimitKeys::default()));
    let bad = [
        ("handshaketimeout", &["0", "0.5", "3601", "x", "", "-1", "10s"][..]),
        ("idletimeout", &["0.5", "-1", "x", "2592001", "1e9"][..]),
        ("maxclients", &["0", "-1", "1000001", "x", "10K"][..]),
        ("maxclientsperip", &["-1", "1000001", "x"][..]),
        ("maxmemory", &["0", "255M", "1.5G", "-1", "99999999999T"][..]),
    ];
    for (key, values) in bad {
        for value in values {
            let parsed = base(&format!("[generic]\n{key} = {value}\n"));
            assert_eq!((parsed.server, parsed.problems.len()), (None, 1), "{key} = {value}");
            assert_eq!((parsed.problems[0].line, parsed.problems[0].key.as_deref()), (Some(2), Some(key)));
        }
    }
    for value in ["4095", "-1", "2P", "fast", "10MB/s", ""] {
        assert_eq!(
            found(&included(&format!("[a]\nexportname=/a\nbandwidthlimit={value}\n"))),
            ["3 error bandwidthlimit"]
        );
    }
    for value in ["-1", "1000000001", "1K", ""] {
        assert_eq!(found(&included(&format!("[a]\nexportname=/a\niopslimit={value}\n"))), ["3 error iopslimit"]);
    }
}

#[test]
fn defaults() {
    let parsed = base("[generic]\n[a]\nexportname=/dev/vg/a\n");
    assert_eq!(parsed.server, Some(ServerConfig::default()));
    let a = &parsed.exports[0];
    assert_eq!((a.format, a.read_only, a.flush, a.max_connections), (Format::Raw, false, None, None));
    assert!(base("[generic]\n").exports.is_empty(), "zero exports is normal");
    assert!(!included("").failed, "an empty included file is fine");
}

#[test]
fn every_problem_of_a_file_is_collected() {
    let parsed = included(
        "[a]\nexportname=/a\nreadonly=yes\nsize=5\n[b]\nflush=TRUE\nmaxconnections=10G\n[c]\nexportname=/c\nformat=vmdk\n",
    );
    let expected = [
        "3 error readonly",
        "4 warning size",
        "5 error -",
        "6 error flush",
        "7 error maxconnections",
        "10 error format",
    ];
    assert_eq!(found(&parsed), expected);
    assert!(parsed.failed);
    assert_eq!(
        parsed.problems[0].to_string(),
        "/etc/cowgate/conf.d/a.conf:3: error: [a] readonly = yes: the value is not a boolean; \
         write true or false, with nothing behind it"
    );
}

#[test]
fn the_base_file_begins_with_generic() {
    for text in ["", "[a]\nexportname=/a\n", "[a]\nexportname=/a\n[generic]\n", "# nothing\n"] {
        let parsed = base(text);
        assert!(parsed.server.is_none() && parsed.failed, "{text:?}");
    }
    let parsed = included("[b]\nexportname=/b\n[generic]\nport=1\n");
    assert!(parsed.failed);
    assert_eq!(found(&parsed), ["3 error -"]);
}

#[test]
fn an_error_in_an_export_of_the_base_file_leaves_generic_usable() {
    let parsed = base("[generic]\nport=1\n[a]\nexportname=/a\nreadonly=no\n");
    assert!(parsed.failed);
    assert_eq!(parsed.server.map(|s| s.port), Some(1));
    assert!(base("[generic]\nallowlist=no\n").server.is_none());
    assert!(base("[generic]\n[a]\nfoo\n").server.is_none(), "broken grammar: trust nothing");
}

#[test]
fn generic_errors_fail_closed() {
    for key in ["oldstyle=true", "force_tls=true", "tlsonly=true", "port=nbdx", "port=65536", "workers=-1"] {
        assert!(base(&format!("[generic]\n{key}\n")).server.is_none(), "{key}");
    }
    for key in ["listenaddr=1.2.3", "listenaddr=a b", "imageroots=", "imageroots=rel", "workers=100000"] {
        assert!(base(&format!("[generic]\n{key}\n")).server.is_none(), "{key}");
    }
    let long = format!("[generic]\nunixsock=/{}\n", "s".repeat(MAX_SOCKET_PATH_BYTES));
    assert!(base(&long).server.is_none());
}

#[test]
fn generic_keys_that_are_ignored_warn() {
    let text = "[generic]\nuser=nbd\ngroup=nbd\nmax_threads=8\ncertfile=/c\nkeyfile=/k\ncacertfile=/a\ntlsprio=N\n\
                force_tls=false\noldstyle=0\nsplice=true\nduallisten=true\n";
    let parsed = base(text);
    let server = parsed.server.expect("usable");
    assert_eq!((server.user.as_deref(), server.group.as_deref()), (Some("nbd"), Some("nbd")));
    let keys: Vec<_> = parsed.problems.iter().map(|p| (p.line.unwrap_or(0), p.severity)).collect();
    let lines = [4, 8, 11, 12];
    assert_eq!(keys, lines.map(|line| (line, Severity::Warning)));
}

#[test]
fn keys_that_restrict_or_redirect_refuse_their_export_only() {
    let keys = [
        "temporary=true",
        "treefiles=true",
        "waitfile=true",
        "tls=on\nforce_tls=true",
        "tls=off\ntlsonly=true",
        "tls=off\ntlsallow=somebody",
        "tlsallow=;",
        "prerun=/bin/check %d",
        "postrun=/bin/check %",
        "filesize=-5",
        "exportname=/srv/%s",
    ];
    for key in keys {
        let parsed = included(&format!("[a]\nexportname=/a\n{key}\n[b]\nexportname=/b\n"));
        assert!(!parsed.failed, "{key}");
        assert_eq!(parsed.exports.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["b"], "{key}");
        assert_eq!(parsed.problems[0].severity, Severity::Refused, "{key}");
    }
    let parsed = included("[a]\nexportname=/a%d\nvirtstyle=none\ncopyonwrite=false\nauthfile=\n[b]\nexportname=/b\n");
    assert_eq!((parsed.exports.len(), found(&parsed).len()), (2, 0));
}

#[test]
fn export_keys_that_are_ignored_warn() {
    let text = "[a]\nexportname=/a\nsplice=true\nsdp=true\nsparse_cow=1\ncowdir=/c\n\
                transactionlog=/t\ndatalog=/d\nlistenaddr=::\nsize=5\n;old=1\nexportname[de]=/x\ntimeout=5\n";
    let parsed = included(text);
    assert_eq!((parsed.exports.len(), parsed.problems.len()), (1, 11));
    assert!(parsed.problems.iter().all(|p| p.severity == Severity::Warning && p.line.is_some()));
    assert_eq!(found(&included("[a]\nexportname=/a\nsync=false\nsdp=0\n")), [] as [&str; 0]);
}

#[test]
fn a_bad_value_of_an_ignored_known_key_is_still_an_error_as_in_nbd_server() {
    for key in ["sync=x", "sdp=x", "treefiles=x", "datalog=\\q", "filesize=10G", "virtstyle=foo", "virtstyle=cidrhash"]
    {
        assert!(included(&format!("[a]\nexportname=/a\n{key}\n")).failed, "{key}");
    }
    assert!(!included("[a]\nexportname=/a\nsize=\\q\n").failed);
}

#[test]
fn paths() {
    let path = |value: &str| included(&format!("[a]\nexportname={value}\n")).exports[0].path.clone();
    assert_eq!(path("/srv/a\\sb"), Path::new("/srv/a b"));
    assert_eq!(path("disks/a.qcow2"), Path::new("/etc/cowgate/conf.d/disks/a.qcow2"));
    assert_eq!(found(&included("[a]\nexportname=a\n")), ["2 warning exportname"]);
    assert_eq!(found(&included("[a]\nexportname=/a \n")), ["2 warning exportname"]);
    assert_eq!(path("/a "), Path::new("/a "));
    assert_eq!(found(&included("[a]\nexportname=/a\\s\n")), [] as [&str; 0]);
    assert!(included("[a]\nexportname=\n").failed);
    assert!(included(&format!("[a]\nexportname=/{}\n", "p".repeat(MAX_PATH_BYTES))).failed);
}

#[test]
fn format_is_declared_or_taken_from_the_name() {
    let format = |keys: &str| included(&format!("[a]\n{keys}\n")).exports[0].format;
    assert_eq!(format("exportname=/a.qcow2"), Format::Qcow2);
    assert_eq!(format("exportname=/a.QCOW2"), Format::Qcow2);
    assert_eq!(format("exportname=/a.qcow2\nformat=raw "), Format::Raw);
    assert_eq!(format("exportname=/a.img\nformat=qcow2"), Format::Qcow2);
    assert_eq!(format("exportname=/qcow2"), Format::Raw);
}

#[test]
fn names_follow_the_protocol() {
    assert!(!included(&format!("[{}]\nexportname=/a\n", "n".repeat(MAX_NAME_BYTES))).failed);
    assert!(included(&format!("[{}]\nexportname=/a\n", "n".repeat(MAX_NAME_BYTES + 1))).failed);
    assert!(included("[a\u{85}b]\nexportname=/a\n").failed);
}

#[test]
fn max_connections_counts_from_one() {
    let limit = |n: &str| included(&format!("[a]\nexportname=/a\nmaxconnections={n}\n")).exports[0].max_connections;
    assert_eq!((limit("1"), limit("0"), limit("-1"), limit("8 ")), (Some(1), None, None, Some(8)));
}

#[test]
fn a_repeated_group_merges_with_a_warning() {
    let parsed = included("[a]\nexportname=/a\n[b]\nexportname=/b\n[a]\nexportname=/c\n");
    assert_eq!(parsed.exports.len(), 2);
    assert_eq!(parsed.exports[0].path, Path::new("/c"));
    assert_eq!(found(&parsed), ["5 warning -"]);
}

#[test]
fn service_is_compared_without_its_place() {
    let a = included("[a]\nexportname=/a\n").exports.remove(0);
    let limited = included("[a]\nexportname=/a\nbandwidthlimit=1M\niopslimit=1\nidletimeout=1\n").exports.remove(0);
    assert!(a.same_service(&limited) && a.limits != limited.limits);
    let moved = included("\n\n[a]\nexportname=/a\n").exports.remove(0);
    assert!(a != moved && a.same_service(&moved));
    for other in [
        "format=qcow2",
        "readonly=1",
        "flush=1",
        "fua=0",
        "trim=1",
        "rotational=1",
        "maxconnections=1",
        "detectzeroes=on",
        "authfile=/x",
        "prerun=x",
        "postrun=x",
        "filesize=1",
        "multifile=1",
        "copyonwrite=1",
        "copyonwrite=1\ncowdir=/x",
        "sync=1",
    ] {
        let other = included(&format!("[a]\nexportname=/a\n{other}\n")).exports.remove(0);
        assert!(!a.same_service(&other));
    }
}

#[test]
fn settings_that_need_a_restart() {
    let a = ServerConfig::default();
    let b = ServerConfig { port: 1, include_dir: Some("/x".into()), workers: Some(1), ..ServerConfig::default() };
    assert_eq!(a.needs_restart(&b), ["port", "workers"]);
    let c = ServerConfig { user: Some("nbd".into()), group: Some("nbd".into()), ..ServerConfig::default() };
    assert_eq!(a.needs_restart(&c), ["user", "group"]);
    let limits = ServerLimits { max_clients: 1, max_memory: Some(1 << 30), ..ServerLimits::default() };
    assert_eq!(a.needs_restart(&ServerConfig { limits, ..ServerConfig::default() }), ["maxmemory"]);
}

#[test]
fn users_and_groups_are_names() {
    for bad in ["", "  ", "a:b", "../a", "a\\nb"] {
        for key in ["user", "group"] {
            let parsed = base(&format!("[generic]\n{key} = {bad}\n"));
            assert!(parsed.server.is_none(), "{key} = {bad:?}");
        }
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), is_base: bool) {
        let role = if is_base { Role::Base } else { Role::Included };
        let parsed = parse(&bytes, Path::new("c"), role);
        for problem in &parsed.problems {
            prop_assert!(!problem.to_string().contains('\n'));
        }
    }

    #[test]
    fn arbitrary_values_never_panic(
        key in "(exportname|port|readonly|workers|imageroots|listenaddr|maxconnections|virtstyle|format|unixsock|\
               handshaketimeout|idletimeout|maxclients|maxclientsperip|maxmemory|bandwidthlimit|iopslimit)",
        value in "[^\n]{0,40}",
    ) {
        let parsed = base(&format!("[generic]\n{key}={value}\n[a]\nexportname=/a\n{key}={value}\n"));
        prop_assert!(parsed.server.is_some() || parsed.failed);
    }
}
