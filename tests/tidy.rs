//! Keeps the house in order: floors, pure cores, places for unsafe, file heads and lengths.
//!
//! Text rules that no compiler checks. Each rule is a function from a file's path and text to complaints, and the
//! tests at the foot show that each one catches a violation.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules from the ground up. A module imports from lower floors and from itself.
const FLOORS: &[&[&str]] = &[
    &["units", "pagebuf", "block"], // these three are one vocabulary and may use each other
    &["nbd", "qcow2"],
    &["ring"],
    &["image"],
    &["export"],
    &["serve"],
    &["restore"],
    &["daemon"],
    &["cli"],
];

/// Floors below this one think and do not act.
const FIRST_FLOOR_WITH_IO: usize = 2;

/// What a pure file does not mention outside its tests.
const IMPURE: &[&str] = &[
    ".await",
    "tokio",
    "std::fs",
    "std::net",
    "std::os::unix::net",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "SystemTime",
    "Instant::now",
    "File::open",
];

/// The only places of `unsafe`.
const UNSAFE: &[&str] = &["src/pagebuf.rs", "src/ring/", "src/serve/ublk/"];

/// Longest source file in lines.
const MAX_LINES: usize = 900;

/// Marks of unfinished work and paths of somebody's machine; in two parts so that this file is clean itself.
const FORBIDDEN: &[[&str; 2]] =
    &[["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["/wo", "rk/"], ["/ro", "ot/"], ["/ho", "me/"]];

type Complaints = Vec<String>;

#[test]
fn the_house_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut complaints = Complaints::new();
    let sources = files(&root.join("src"));
    assert!(!sources.is_empty());
    for file in sources.iter().filter(|f| f.extension().is_some_and(|e| e == "rs")) {
        let text = fs::read_to_string(file).expect("source files are UTF-8");
        complaints.extend(check_source(&relative(root, file), &text));
    }
    for directory in ["src", "tests", "benches", "docs", "fuzz", "tools", "man", "kernel-notes"] {
        for file in files(&root.join(directory)) {
            if let Ok(text) = fs::read_to_string(&file) {
                complaints.extend(forbidden_words(&relative(root, &file), &text));
            }
        }
    }
    for file in ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Cargo.toml"] {
        let text = fs::read_to_string(root.join(file)).expect(file);
        complaints.extend(forbidden_words(file, &text));
    }
    let lib = fs::read_to_string(root.join("src/lib.rs")).expect("src/lib.rs");
    complaints.extend(module_list(&lib));
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn the_tests_that_documents_name_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut complaints = Complaints::new();
    for file in files(&root.join("docs")).into_iter().filter(|f| f.extension().is_some_and(|e| e == "md")) {
        let text = fs::read_to_string(&file).expect("documents are UTF-8");
        let named = named_tests(&text);
        assert!(!named.is_empty(), "{} names no test", file.display());
        for (file_name, test) in named {
            let tests = fs::read_to_string(root.join("tests").join(format!("{file_name}.rs"))).unwrap_or_default();
            // a function, or an entry of a list that a macro makes functions of
            if !tests.contains(&format!("fn {test}(")) && !tests.contains(&format!("    {test}: ")) {
                complaints.push(format!("{}: there is no test {file_name}::{test}", relative(root, &file)));
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn every_constant_of_the_protocol_is_in_its_document() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| fs::read_to_string(root.join(file)).expect(file);
    let (source, document) = (read("src/nbd/mod.rs"), read("docs/nbd.md"));
    let constants = source.lines().filter_map(|line| line.strip_prefix("pub const NBD_")?.split(':').next());
    // magic numbers are no items of their own
    let items: Vec<&str> = constants.filter(|name| !name.ends_with("MAGIC")).collect();
    assert!(items.len() > 50);
    let missing: Vec<&&str> = items.iter().filter(|name| !document.contains(&format!("`NBD_{name}`"))).collect();
    assert!(missing.is_empty(), "docs/nbd.md has nothing of {missing:?}");
}

/// What stands between backquotes as `file::test`.
fn named_tests(text: &str) -> Vec<(&str, &str)> {
    let is_name =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter_map(|q| q.split_once("::")).filter(|(file, test)| is_name(file) && is_name(test)).collect()
}

/// All rules for one file below `src/`.
fn check_source(path: &str, text: &str) -> Complaints {
    let code = without_comments_and_strings(text);
    let mut out = Complaints::new();
    if !text.starts_with("//!") {
        out.push(format!("{path}: begins without a //! that says what the file is"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        out.push(format!("{path}: {lines} lines are more than a reader holds in the head ({MAX_LINES}); split it"));
    }
    if has_word(&code, "unsafe") && !UNSAFE.iter().any(|place| path.starts_with(place)) {
        out.push(format!("{path}: unsafe lives in {}", UNSAFE.join(" ")));
    }
    if let Some((floor, module)) = place(path) {
        out.extend(imports(path, floor, module, &code));
        if floor < FIRST_FLOOR_WITH_IO {
            out.extend(impurities(path, without_tests(&code)));
        }
        out.extend(escapes(path, without_tests(&code)));
    } else if !matches!(path, "src/lib.rs" | "src/main.rs") {
        out.push(format!("{path}: its module is on no floor; add it to FLOORS and to src/lib.rs"));
    }
    out
}

/// Imports go downwards, and siblings do not meet.
fn imports(path: &str, floor: usize, module: &str, code: &str) -> Complaints {
    let mut out = Complaints::new();
    for import in crate_paths(code) {
        let Some(target) = import.first() else { continue };
        let Some(target_floor) = floor_of(target) else {
            // a macro or an item of lib.rs; there are none
            out.push(format!("{path}: crate::{target} is on no floor"));
            continue;
        };
        let same_vocabulary = floor == 0 && target_floor == 0;
        if target != module && target_floor >= floor && !same_vocabulary {
            out.push(format!("{path}: {module} (floor {floor}) imports crate::{target} (floor {target_floor})"));
        }
        // src/serve/nbd/x.rs must not see crate::serve::ublk
        if let (Some(frontend), Some(other)) = (frontend(path), import.get(1))
            && target == "serve"
            && other != frontend
        {
            out.push(format!("{path}: serve::{frontend} imports its sibling serve::{other}"));
        }
    }
    out
}

/// `super::super::x` must not climb out of the floor that `imports` watches.
fn escapes(path: &str, code: &str) -> Complaints {
    let parts: Vec<&str> = path.trim_start_matches("src/").trim_end_matches(".rs").split('/').collect();
    let depth = parts.len() - usize::from(parts.last() == Some(&"mod"));
    // a frontend keeps to its own directory
    let depth = if frontend(path).is_some() { depth - 1 } else { depth };
    let climbs = "super::".repeat(depth.max(1));
    match code.contains(&climbs) {
        true => vec![format!("{path}: `{climbs}` leaves the module; write the crate:: path")],
        false => Vec::new(),
    }
}

/// Pure files hold no file, socket, clock or async body.
fn impurities(path: &str, code: &str) -> Complaints {
    let mut out = Complaints::new();
    for word in IMPURE.iter().filter(|word| code.contains(**word)) {
        out.push(format!("{path}: is pure, but mentions {word}"));
    }
    let mut rest = code;
    while let Some(at) = find_word(rest, "async") {
        rest = &rest[at + "async".len()..];
        // a trait may declare what others do
        let declared = match (rest.find(';'), rest.find('{')) {
            (Some(semicolon), Some(brace)) => semicolon < brace,
            (semicolon, _) => semicolon.is_some(),
        };
        if !declared || !rest.trim_start().starts_with("fn ") {
            out.push(format!("{path}: is pure, but has an async body"));
        }
    }
    out
}

fn forbidden_words(path: &str, text: &str) -> Complaints {
    let mut out = Complaints::new();
    for (index, line) in text.lines().enumerate() {
        for word in FORBIDDEN.iter().map(|parts| parts.concat()) {
            let found = if word.starts_with('/') { line.contains(&word) } else { has_word(line, &word) };
            if found {
                out.push(format!("{path}:{}: holds {word}", index + 1));
            }
        }
    }
    out
}

/// lib.rs lists exactly the modules of FLOORS, in their order.
fn module_list(lib: &str) -> Complaints {
    let listed: Vec<&str> = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let floor_of_listed: Vec<usize> = listed.iter().filter_map(|m| floor_of(m)).collect();
    let mut out = Complaints::new();
    if !floor_of_listed.is_sorted() || floor_of_listed.len() != listed.len() {
        out.push(format!("src/lib.rs: the modules are not in floor order: {}", listed.join(" ")));
    }
    for module in FLOORS.iter().flat_map(|f| f.iter()).filter(|m| !listed.contains(m)) {
        out.push(format!("src/lib.rs: {module} is not listed"));
    }
    out
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Floor and module of a file below src/.
fn place(path: &str) -> Option<(usize, &str)> {
    let first = path.strip_prefix("src/")?.split('/').next()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    Some((floor_of(module)?, module))
}

/// `nbd` for src/serve/nbd/x.rs.
fn frontend(path: &str) -> Option<&str> {
    let (first, _) = path.strip_prefix("src/serve/")?.split_once('/')?;
    Some(first)
}

/// Every path that begins with `crate::`, groups in braces expanded, as its segments.
fn crate_paths(code: &str) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    let mut rest = code;
    while let Some(at) = find_word(rest, "crate") {
        rest = &rest[at + "crate".len()..];
        if let Some(tail) = rest.trim_start().strip_prefix("::") {
            expand(tail, &mut Vec::new(), &mut out);
        }
    }
    out
}

/// Reads one path or group at the start of `text`; returns what follows it.
fn expand<'a>(text: &'a str, prefix: &mut Vec<String>, out: &mut Vec<Vec<String>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix('}') {
                return after;
            }
            let before = rest.len();
            rest = expand(rest, prefix, out).trim_start();
            // past `as name` and the comma
            rest = rest.trim_start_matches(|c: char| !matches!(c, ',' | '}' | '{'));
            rest = rest.strip_prefix(',').unwrap_or(rest);
            if rest.is_empty() || rest.len() == before {
                return rest;
            }
        }
    }
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    prefix.push(text[..end].to_owned());
    let rest = &text[end..];
    let after = match rest.strip_prefix("::") {
        Some(tail) => expand(tail, prefix, out),
        None => {
            out.push(prefix.clone());
            rest
        }
    };
    prefix.pop();
    after
}

/// The text up to the unit tests at the file's foot.
fn without_tests(code: &str) -> &str {
    &code[..code.find("#[cfg(test)]\nmod ").unwrap_or(code.len())]
}

fn find_word(text: &str, word: &str) -> Option<usize> {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .map(|(at, _)| at)
        .find(|at| !text[..*at].ends_with(is_part) && !text[at + word.len()..].starts_with(is_part))
}

fn has_word(text: &str, word: &str) -> bool {
    find_word(text, word).is_some()
}

/// The code alone: comments gone, literals emptied. Line ends stay.
fn without_comments_and_strings(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(len) = raw_string(rest, out.chars().last()) {
            out.push_str("\"\"");
            len
        } else if c == '"' {
            out.push_str("\"\"");
            quoted(rest, '"')
        } else if let Some(len) = char_literal(rest) {
            out.push_str("' '");
            len
        } else {
            out.push(c);
            c.len_utf8()
        };
        rest = &rest[skipped..];
    }
    out
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let (step, change) = match () {
            () if rest.starts_with("/*") => (2, 1),
            () if rest.starts_with("*/") => (2, -1),
            () => (rest.chars().next().map_or(1, char::len_utf8), 0),
        };
        depth += change;
        at += step;
        if depth == 0 {
            break;
        }
    }
    at
}

/// Length of `r"..."`, `br#"..."#` at the start of the text.
fn raw_string(text: &str, before: Option<char>) -> Option<usize> {
    if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let after_r = text.strip_prefix("br").or_else(|| text.strip_prefix("cr")).or_else(|| text.strip_prefix('r'))?;
    let hashes = after_r.len() - after_r.trim_start_matches('#').len();
    let body = after_r[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let len = body.find(&end).map_or(body.len(), |at| at + end.len());
    Some(text.len() - body.len() + len)
}

/// Length of a literal with escapes that begins with `quote`.
fn quoted(text: &str, quote: char) -> usize {
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    text.len()
}

/// Length of a character literal; `None` for a lifetime.
fn char_literal(text: &str) -> Option<usize> {
    let body = text.strip_prefix('\'')?;
    let mut chars = body.chars();
    let first = chars.next()?;
    (first == '\\' || chars.next() == Some('\'')).then(|| quoted(text, '\''))
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let mut out = Vec::new();
    for path in entries.map(|e| e.expect("directory entry").path()) {
        match path.is_dir() {
            true => out.extend(files(&path)),
            false => out.push(path),
        }
    }
    out.sort();
    out
}

fn relative(root: &Path, file: &Path) -> String {
    file.strip_prefix(root).expect("below the root").to_string_lossy().into_owned()
}

/// One line per complaint, to compare with what a self-test expects.
fn complain(path: &str, code: &str) -> String {
    let mut out = String::new();
    for complaint in check_source(path, &format!("//! Head.\n{code}")) {
        writeln!(out, "{complaint}").expect("to a string");
    }
    out
}

#[test]
fn the_checker_catches_imports_that_go_up_or_sideways() {
    for (path, code) in [
        ("src/qcow2/l2.rs", "use crate::nbd::reply;"),
        ("src/nbd/reply.rs", "use crate::{units::ByteRange, ring::{File, mem}};"),
        ("src/ring/file.rs", "fn f() { crate::image::open() }"),
        ("src/image/open.rs", "use crate :: export;"),
        ("src/export/plan.rs", "use crate::daemon::Options as O;"),
        ("src/units.rs", "use crate::nbd;"),
        ("src/serve/nbd/conn.rs", "use crate::serve::ublk::queue;"),
        ("src/serve/nbd/conn.rs", "use super::super::ublk;"),
        ("src/qcow2/l2.rs", "use super::super::nbd;"),
        ("src/qcow2/mod.rs", "use super::nbd;"),
        ("src/stray.rs", ""),
        ("src/image/open.rs", "use crate::stray;"),
    ] {
        assert_ne!(complain(path, code), "", "{path}: {code}");
    }
    for (path, code) in [
        ("src/qcow2/l2.rs", "use crate::units::{ByteRange, GuestOffset}; use super::header; use crate::qcow2::alloc;"),
        ("src/block.rs", "use crate::pagebuf::PageBuf;"),
        ("src/export/plan.rs", "// crate::cli\nconst A: &str = \"crate::cli\"; const B: &str = r#\"crate::\"cli\"#;"),
        (
            "src/serve/nbd/conn.rs",
            "use crate::serve::nbd::out; use super::session; pub(crate) fn f<'a>(c: &'a char) {}",
        ),
        (
            "src/units.rs",
            "const Q: char = '\"'; /* crate::nbd /* nested */ */\n#[cfg(test)]\nmod tests { use super::*; }",
        ),
    ] {
        assert_eq!(complain(path, code), "", "{path}: {code}");
    }
}

#[test]
fn the_checker_catches_impure_cores() {
    for code in [
        "async fn f() { g() }",
        "fn f() { async { 1 } }",
        "fn f() { g().await }",
        "use std::fs;",
        "fn f(now: SystemTime) {}",
    ] {
        assert_ne!(complain("src/qcow2/l2.rs", code), "", "{code}");
        assert_eq!(complain("src/image/disk.rs", code), "", "{code}");
    }
    let trait_only = "pub trait T {\n    async fn read(&self) -> u8;\n    fn size(&self) -> u8 { 1 }\n}";
    assert_eq!(complain("src/block.rs", trait_only), "");
    assert_eq!(complain("src/nbd/reply.rs", "#[cfg(test)]\nmod tests { use std::fs; }"), "");
}

#[test]
fn the_checker_catches_unsafe_heads_lengths_and_words() {
    assert_ne!(complain("src/export/plan.rs", "unsafe { f() }"), "");
    assert_eq!(complain("src/ring/file.rs", "unsafe { f() } // unsafe"), "");
    assert_ne!(check_source("src/units.rs", "use std::fmt;"), Complaints::new());
    assert_ne!(complain("src/units.rs", &"\n".repeat(MAX_LINES)), "");
    let word = FORBIDDEN[0].concat();
    assert_ne!(forbidden_words("x", &format!("a\n// {word}: later")), Complaints::new());
    assert_eq!(forbidden_words("x", "autodotodos"), Complaints::new());
    assert_ne!(module_list("pub mod nbd;\npub mod units;\n"), Complaints::new());
}
