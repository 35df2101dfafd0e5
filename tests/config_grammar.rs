//! The configuration grammar against the real nbd-server: what it accepts we accept, what it refuses we refuse.
//!
//! Every case carries both verdicts. Ours is always checked; nbd-server's (recorded with 3.24) is checked again where
//! the program is installed, so that a difference is a known one with a reason and never a surprise. nbd-server has
//! accepted a file once its Unix socket exists, and refused it once it has ended.

use cowgate::export::config::{Role, parse};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// What the two programs do with a file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    /// Both accept it.
    Accepted,
    /// Both refuse it.
    Refused,
    /// Deliberately stricter than nbd-server; the reason is given with the case.
    OnlyNbdServer,
    /// Deliberately more forgiving than nbd-server; the reason is given with the case.
    OnlyOurs,
}

use Verdict::*;

const HEAD: &str = "[generic]\nunixsock=@DIR@/socket\n";
const EXPORT: &str = "[a]\nexportname=@DIR@/image\n";

/// Lines put between `HEAD` and `EXPORT`.
const IN_GENERIC: &[(&str, Verdict)] = &[
    ("", Accepted),
    ("# comment\n   # indented\n \t \n\x0c\n", Accepted),
    ("; comment\n", Refused),
    ("word\n", Refused),
    ("\x0b\n", Refused),
    ("oldstyle=true\n", Refused),
    ("oldstyle=false\n", Accepted),
    ("oldstyle=x\n", Refused),
    ("duallisten=x\n", Refused),
    ("max_threads=x\n", Refused),
    ("listenaddr=\\q\n", Refused),
    ("includedir=/nowhere/at/all\n", Refused),
    ("workers_of_another_program=\\q\n", Accepted),
    ("Encoding=UTF-8\n", Accepted),
    ("Encoding=utf-8\n", Accepted),
    ("Encoding=latin1\n", Refused),
    ("Encoding=\n", Refused),
    ("encoding=latin1\n", Accepted),
    ("[generic]\n", Accepted),
    // nbd-server notices only when it looks up the service name
    ("port=!\n", OnlyNbdServer),
    // nbd-server starts and turns every client away that does not speak TLS; without TLS nobody could connect
    ("force_tls=true\n", OnlyNbdServer),
];

/// Lines put behind `EXPORT`.
const IN_EXPORT: &[(&str, Verdict)] = &[
    ("readonly=true\n", Accepted),
    ("readonly=1\n", Accepted),
    ("readonly=true  \t\n", Accepted),
    ("readonly=true\x0c\n", Accepted),
    ("readonly=TRUE\n", Refused),
    ("readonly=yes\n", Refused),
    ("readonly=true # comment\n", Refused),
    ("readonly=\n", Refused),
    ("readonly=01\n", Refused),
    ("readonly=\\strue\n", Refused),
    ("readonly=true\x0b\n", Refused),
    ("readonly=true\rflush=true\n", Refused),
    ("\x0creadonly=x\n", Refused),
    ("\x0breadonly=x\n", Accepted),
    ("readonly=no\nreadonly=false\n", Accepted),
    ("maxconnections=10\n", Accepted),
    ("maxconnections=10  \n", Accepted),
    ("maxconnections=10 G\n", Accepted),
    ("maxconnections=\x0b10\n", Accepted),
    ("maxconnections=010\n", Accepted),
    ("maxconnections=-1\n", Accepted),
    ("maxconnections=+1\n", Accepted),
    ("maxconnections=10G\n", Refused),
    ("maxconnections=0x10\n", Refused),
    ("maxconnections=\n", Refused),
    ("maxconnections=2147483648\n", Refused),
    ("filesize=1099511627776\n", Accepted),
    ("filesize=10G\n", Refused),
    ("exportname=/a\\sb\\n\\t\\r\\\\\n", Accepted),
    ("exportname=/a\\q\n", Refused),
    ("exportname=/a\\;\n", Refused),
    ("exportname=/a\\\n", Refused),
    ("exportname=relative\n", Accepted),
    ("size=\\q\n", Accepted),
    ("format=qcow2\n", Accepted),
    ("timeout=x\n", Accepted),
    ("virtstyle=none\n", Accepted),
    ("virtstyle=none \n", Accepted),
    ("virtstyle=cidrhash 24\n", Accepted),
    ("virtstyle=cidrhash\n", Refused),
    ("virtstyle=style\n", Refused),
    ("sync=x\n", Refused),
    ("rotational=x\n", Refused),
    ("treefiles=x\n", Refused),
    ("waitfile=x\n", Refused),
    ("sdp=x\n", Refused),
    ("datalog=\\q\n", Refused),
    ("listenaddr=\\q\n", Refused),
    ("=5\n", Refused),
    ("read only=5\n", Accepted),
    ("key   =   value\n", Accepted),
    ("a#b=5\n", Accepted),
    (";a=5\n", Accepted),
    ("\u{e4}=5\n", Accepted),
    ("a[de]=5\n", Accepted),
    ("a[]=5\n", Accepted),
    ("a[d.e@_-]=5\n", Accepted),
    ("a[de]x=5\n", Refused),
    ("a[d!]=5\n", Refused),
    ("a [de]=5\n", Refused),
    ("a[=5\n", Refused),
    ("a]=5\n", Refused),
    ("[x]=5\n", Refused),
    ("  [b]\nexportname=/b\n", Accepted),
    ("[b]  \t\nexportname=/b\n", Accepted),
    ("[ b ]\nexportname=/b\n", Accepted),
    ("[a=b]\nexportname=/b\n", Accepted),
    ("[\u{e4}]\nexportname=/b\n", Accepted),
    ("[b]\nexportname=/b\n[a]\nreadonly=true\n", Accepted),
    ("[b] x\nexportname=/b\n", Refused),
    ("[b] # comment\nexportname=/b\n", Refused),
    ("[b[c]\nexportname=/b\n", Refused),
    ("[b]]\nexportname=/b\n", Refused),
    ("[]\nexportname=/b\n", Refused),
    ("[b\x01]\nexportname=/b\n", Refused),
    ("[b\tc]\nexportname=/b\n", Refused),
    ("[b\x7f]\nexportname=/b\n", Refused),
    ("[b\nexportname=/b\n", Refused),
    ("[b]\nreadonly=true\n", Refused),
    ("[b]\nexportname[de]=/b\n", Refused),
    // fails when a client connects; here it is known at once
    ("exportname=\n", OnlyNbdServer),
    // the NBD protocol wants names without them
    ("[b\u{85}]\nexportname=/b\n", OnlyNbdServer),
    // not a text file; often one whose writing was cut short
    ("readonly=true\0\n", OnlyNbdServer),
    // splice is ignored, so it stands in nobody's way
    ("splice=true\ncopyonwrite=true\n", OnlyOurs),
    ("copyonwrite=true\ncowdir=/tmp\nsparse_cow=1\n", Accepted),
    ("multifile=true\nsync=1\nauthfile=/nowhere\n", Accepted),
    ("prerun=true\npostrun=echo %s\n", Accepted),
    ("copyonwrite=x\n", Refused),
    ("multifile=x\n", Refused),
    ("prerun=\\q\n", Refused),
    ("cowdir=\\q\n", Refused),
    // what cannot be served for the sake of a key refuses its export, not the file
    ("filesize=-5\n", Accepted),
    ("prerun=echo %d\n", Accepted),
    ("sdp=true\n", OnlyOurs),
];

/// Whole files.
const WHOLE: &[(&str, Verdict)] = &[
    ("", Refused),
    ("[a]\nexportname=/a\n", Refused),
    ("[a]\nexportname=/a\n[generic]\nunixsock=@DIR@/socket\n", Refused),
    ("[Generic]\nunixsock=@DIR@/socket\n[a]\nexportname=/a\n", Refused),
    ("x=1\n[generic]\nunixsock=@DIR@/socket\n[a]\nexportname=/a\n", Refused),
    ("\u{feff}[generic]\nunixsock=@DIR@/socket\n[a]\nexportname=/a\n", Refused),
    ("[generic]\r\nunixsock=@DIR@/socket\r\n[a]\r\nexportname=/a\r\nreadonly=true\r\n", Accepted),
    ("[generic]\r\r\nunixsock=@DIR@/socket\n[a]\nexportname=/a\n", Refused),
    ("[generic]\nunixsock=@DIR@/socket\n[a]\nexportname=/a", Accepted),
    // zero exports is a normal state
    ("[generic]\nunixsock=@DIR@/socket\n", OnlyOurs),
];

fn cases() -> Vec<(Vec<u8>, Verdict)> {
    let mut out: Vec<(Vec<u8>, Verdict)> = Vec::new();
    out.extend(IN_GENERIC.iter().map(|(lines, v)| (format!("{HEAD}{lines}{EXPORT}").into_bytes(), *v)));
    out.extend(IN_EXPORT.iter().map(|(lines, v)| (format!("{HEAD}{EXPORT}{lines}").into_bytes(), *v)));
    out.extend(WHOLE.iter().map(|(text, v)| (text.as_bytes().to_vec(), *v)));
    let bytes = |tail: &[u8]| [HEAD.as_bytes(), EXPORT.as_bytes(), tail].concat();
    out.push((bytes(b"# \xe4\n"), Accepted));
    out.push((bytes(b"unknown=\xe4\n"), Accepted));
    out.push((bytes(b"\xe4=5\n"), Accepted));
    out.push((bytes(b"exportname=/\xe4\n"), Refused));
    out.push((bytes(b"a[\xe4]=5\n"), Refused));
    // no client can ask for these names
    out.push((bytes(b"[\xe4]\nexportname=/b\n"), OnlyNbdServer));
    out.push((bytes(format!("[{}]\nexportname=/b\n", "n".repeat(4097)).as_bytes()), OnlyNbdServer));
    out
}

/// Runs our reader the way `--check` does.
fn ours(directory: &Path, text: &[u8]) -> bool {
    let file = directory.join("config");
    std::fs::write(&file, text).expect("write the case");
    let parsed = parse(text, &file, Role::Base);
    let loaded = cowgate::export::load::load(&file);
    let accepted = loaded.server.is_some() && !parsed.failed;
    assert!(accepted || loaded.has_errors(), "a refusal has a reason");
    accepted
}

/// Runs nbd-server on a case. `None`: it neither ended nor listened in time.
fn nbd_server(directory: &Path, text: &[u8]) -> Option<bool> {
    let file = directory.join("config");
    std::fs::write(&file, text).expect("write the case");
    let mut child = Command::new("nbd-server")
        .arg("-d")
        .arg("-C")
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start nbd-server");
    let deadline = Instant::now() + Duration::from_secs(20);
    let verdict = loop {
        if child.try_wait().expect("wait for nbd-server").is_some() {
            break Some(false);
        }
        if directory.join("socket").exists() {
            break Some(true);
        }
        if Instant::now() > deadline {
            break None;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let _ = child.kill();
    let _ = child.wait();
    verdict
}

fn with_directory(text: &[u8], run: impl FnOnce(&Path, &[u8])) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().to_str().expect("UTF-8").to_owned();
    std::fs::write(directory.path().join("image"), [0; 4096]).expect("image");
    let mut filled = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(5).position(|w| w == b"@DIR@") {
        filled.extend_from_slice(&rest[..at]);
        filled.extend_from_slice(path.as_bytes());
        rest = &rest[at + 5..];
    }
    filled.extend_from_slice(rest);
    run(directory.path(), &filled);
}

#[test]
fn our_verdicts() {
    for (text, verdict) in cases() {
        with_directory(&text, |directory, filled| {
            let expected = matches!(verdict, Accepted | OnlyOurs);
            assert_eq!(ours(directory, filled), expected, "{verdict:?}: {}", String::from_utf8_lossy(&text));
        });
    }
}

#[test]
fn nbd_server_verdicts() {
    if Command::new("nbd-server").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        eprintln!("skipped: nbd-server is not installed");
        return;
    }
    let cases = cases();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some((text, verdict)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    with_directory(text, |directory, filled| {
                        let expected = matches!(verdict, Accepted | OnlyNbdServer);
                        let found = nbd_server(directory, filled);
                        assert_eq!(found, Some(expected), "{verdict:?}: {}", String::from_utf8_lossy(text));
                    });
                }
            });
        }
    });
}
