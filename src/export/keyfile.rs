//! The key file grammar of nbd-server's configuration (GLib's GKeyFile), with line numbers: bytes in, groups out.
//!
//! Promises: any bytes give an answer, never a panic; every fault is reported with its line, not just the first; what
//! this accepts, nbd-server 3.24 accepts, apart from what its fault messages name (`tests/config_grammar.rs` compares
//! the two). Values stay raw bytes until [`string`], [`boolean`] or [`integer`] is asked, because GLib forgives a bad
//! value of a key that nobody reads. Called by `export::config`.
//!
//! The grammar: lines end in LF or CR LF and lose leading blanks; `#` begins a comment line; `[name]` begins a group,
//! a repeated group continues the first one; `key = value` needs a group; nothing may share a line with a comment.

use std::fmt;

/// Faults kept for one file; a file of garbage would otherwise cost a message per line.
pub const MAX_FAULTS: usize = 50;

/// A parsed file: its groups in the order of their first header.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct KeyFile {
    /// Groups by first appearance; names are unique.
    pub groups: Vec<Group>,
}

/// One group with everything set in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    /// The text between the brackets, blanks included.
    pub name: String,
    /// Line of the first header, from 1.
    pub line: u32,
    /// Lines of further headers of the same name, whose keys are merged into this group.
    pub repeated: Vec<u32>,
    /// Every `key = value` in file order; of entries with the same key the last one counts.
    pub entries: Vec<Entry>,
}

impl Group {
    /// The entries that count (the last of each key), in file order.
    pub fn effective(&self) -> impl Iterator<Item = &Entry> {
        let last: std::collections::HashMap<&str, usize> =
            self.entries.iter().enumerate().map(|(i, e)| (e.key.as_str(), i)).collect();
        self.entries.iter().enumerate().filter(move |(i, e)| last[e.key.as_str()] == *i).map(|(_, e)| e)
    }
}

/// One `key = value` line.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key, with bytes that are not UTF-8 replaced (no known key has any).
    pub key: String,
    /// What follows `=` and blanks, undecoded; trailing blanks belong to it.
    pub value: Vec<u8>,
    /// Line in the file, from 1.
    pub line: u32,
}

/// A line that breaks the grammar. nbd-server refuses the whole file for any of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Line in the file, from 1.
    pub line: u32,
    /// The line as it stands, decoded as far as it is text.
    pub text: String,
    /// What is wrong with it.
    pub kind: FaultKind,
}

/// How a line breaks the grammar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Neither header, nor `key = value`, nor comment.
    NotALine,
    /// Begins with `;`, which is no comment sign here.
    Semicolon,
    /// A header without `]`, or with text behind it.
    Header,
    /// A group name that is empty or holds `[` or a control character.
    GroupName,
    /// A group name that is not UTF-8 (nbd-server takes it, but no NBD client can ask for it).
    GroupNameUtf8,
    /// A key in front of the first group.
    OutsideGroup,
    /// A key that is empty or holds brackets other than a final `[locale]`.
    Key,
    /// `Encoding` in the first group with a value other than UTF-8, a GLib rule.
    Encoding,
    /// A NUL byte: not a text file, or one whose writing was cut short.
    Nul,
    /// The file begins with a byte order mark.
    ByteOrderMark,
    /// More faults than [`MAX_FAULTS`]; the others are not listed.
    TooMany,
}

impl FaultKind {
    /// What is wrong, in words for people.
    pub fn what(self) -> &'static str {
        match self {
            FaultKind::NotALine => "this line is neither [group], key = value nor # comment",
            FaultKind::Semicolon => "`;` does not begin a comment",
            FaultKind::Header => "this group header is not [name] alone on its line",
            FaultKind::GroupName => "a group name is not empty and holds neither `[` nor control characters",
            FaultKind::GroupNameUtf8 => "this group name is not UTF-8, so no client can ask for it",
            FaultKind::OutsideGroup => "a key stands before the first [group]",
            FaultKind::Key => "there is no valid key in front of `=`",
            FaultKind::Encoding => "only UTF-8 is accepted",
            FaultKind::Nul => "this line holds a NUL byte, so this is not a complete text file",
            FaultKind::ByteOrderMark => "the file begins with a byte order mark",
            FaultKind::TooMany => "too many faults to list them all",
        }
    }

    /// What to do about it, in words for people.
    pub fn remedy(self) -> &'static str {
        match self {
            FaultKind::NotALine => "write `key = value`, or begin the line with #",
            FaultKind::Semicolon => "begin the line with #",
            FaultKind::Header => "close the bracket and move everything else to a line of its own",
            FaultKind::GroupName => "choose a name without them",
            FaultKind::GroupNameUtf8 => "save the file as UTF-8",
            FaultKind::OutsideGroup => "put a header line such as [generic] above it",
            FaultKind::Key => "write the key's name in front of `=`",
            FaultKind::Encoding => "remove the key and save the file as UTF-8",
            FaultKind::Nul | FaultKind::TooMany => "write the file again",
            FaultKind::ByteOrderMark => "save it as UTF-8 without one",
        }
    }
}

/// Parses a file. The groups hold everything that could be read; `faults` is empty if and only if the file is valid.
pub fn parse(bytes: &[u8]) -> (KeyFile, Vec<Fault>) {
    let mut parser = Parser::default();
    let body = match bytes.strip_prefix(b"\xef\xbb\xbf") {
        Some(rest) => {
            parser.fault(1, rest.split(|b| *b == b'\n').next().unwrap_or_default(), FaultKind::ByteOrderMark);
            rest
        }
        None => bytes,
    };
    for (index, line) in body.split(|b| *b == b'\n').enumerate() {
        let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
        parser.line(number, line.strip_suffix(b"\r").unwrap_or(line));
    }
    (parser.file, parser.faults)
}

#[derive(Default)]
struct Parser {
    file: KeyFile,
    faults: Vec<Fault>,
    current: Current,
    by_name: std::collections::HashMap<String, usize>,
}

/// The group that the next key belongs to.
#[derive(Default)]
enum Current {
    #[default]
    None,
    Group(usize),
    /// Under a header that was already reported: its keys are dropped without a second message.
    Broken,
}

impl Parser {
    fn fault(&mut self, line: u32, text: &[u8], kind: FaultKind) {
        let kind = match self.faults.len() {
            n if n < MAX_FAULTS => kind,
            MAX_FAULTS => FaultKind::TooMany,
            _ => return,
        };
        self.faults.push(Fault { line, text: String::from_utf8_lossy(text).into_owned(), kind });
    }

    fn line(&mut self, number: u32, line: &[u8]) {
        let text = trim_start(line);
        if line.contains(&0) {
            return self.fault(number, text, FaultKind::Nul);
        }
        match text.first() {
            None | Some(b'#') => {}
            Some(b'[') if is_header(text) => self.header(number, text),
            Some(_) => match text.iter().position(|b| *b == b'=') {
                Some(equals) => self.entry(number, text, equals),
                None => {
                    let kind = match text[0] {
                        b'[' => {
                            self.current = Current::Broken;
                            FaultKind::Header
                        }
                        b';' => FaultKind::Semicolon,
                        _ => FaultKind::NotALine,
                    };
                    self.fault(number, text, kind);
                }
            },
        }
    }

    /// `text` is `[...]` with nothing but blanks behind.
    fn header(&mut self, number: u32, text: &[u8]) {
        let end = text.iter().position(|b| *b == b']').unwrap_or(text.len());
        let name = &text[1..end];
        if name.is_empty() || name.iter().any(|b| *b == b'[' || b.is_ascii_control()) {
            self.current = Current::Broken;
            return self.fault(number, text, FaultKind::GroupName);
        }
        let Ok(name) = std::str::from_utf8(name) else {
            self.current = Current::Broken;
            return self.fault(number, text, FaultKind::GroupNameUtf8);
        };
        let index = match self.by_name.get(name) {
            Some(index) => {
                self.file.groups[*index].repeated.push(number);
                *index
            }
            None => {
                let index = self.file.groups.len();
                let group = Group { name: name.to_owned(), line: number, repeated: Vec::new(), entries: Vec::new() };
                self.file.groups.push(group);
                self.by_name.insert(name.to_owned(), index);
                index
            }
        };
        self.current = Current::Group(index);
    }

    fn entry(&mut self, number: u32, text: &[u8], equals: usize) {
        let key = trim_end(&text[..equals]);
        let value = trim_start(&text[equals + 1..]);
        let index = match self.current {
            Current::Group(index) => index,
            Current::Broken => return,
            Current::None => return self.fault(number, text, FaultKind::OutsideGroup),
        };
        if !is_key(key) {
            return self.fault(number, text, FaultKind::Key);
        }
        if index == 0 && key == b"Encoding" && !value.eq_ignore_ascii_case(b"UTF-8") {
            return self.fault(number, text, FaultKind::Encoding);
        }
        let key = String::from_utf8_lossy(key).into_owned();
        self.file.groups[index].entries.push(Entry { key, value: value.to_vec(), line: number });
    }
}

/// GLib's g_ascii_isspace: no vertical tab.
fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0c | b'\r')
}

fn trim_start(text: &[u8]) -> &[u8] {
    &text[text.iter().take_while(|b| is_blank(**b)).count()..]
}

fn trim_end(text: &[u8]) -> &[u8] {
    &text[..text.len() - text.iter().rev().take_while(|b| is_blank(**b)).count()]
}

fn is_header(text: &[u8]) -> bool {
    match text.iter().position(|b| *b == b']') {
        Some(end) => text[end + 1..].iter().all(|b| matches!(b, b' ' | b'\t')),
        None => false,
    }
}

/// A key holds no brackets, except that it may end in `[locale]` (a translation in GLib, which nothing here reads).
fn is_key(key: &[u8]) -> bool {
    let bracket = key.iter().position(|b| matches!(b, b'[' | b']'));
    let (name, rest) = key.split_at(bracket.unwrap_or(key.len()));
    if name.is_empty() || name.last().is_some_and(|b| is_blank(*b)) {
        return false;
    }
    let Some(locale) = rest.strip_prefix(b"[") else {
        return rest.is_empty();
    };
    let Some(locale) = locale.strip_suffix(b"]") else {
        return false;
    };
    std::str::from_utf8(locale)
        .is_ok_and(|l| l.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '@')))
}

/// Why a value does not have the type that its key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueFault {
    /// Not UTF-8.
    Utf8,
    /// A backslash in front of something other than `s n t r \`.
    Escape,
    /// A backslash at the end.
    EscapeAtEnd,
    /// None of `true false 1 0`.
    Boolean,
    /// Not a decimal number.
    Integer,
    /// A number outside the type's range.
    Range,
}

impl ValueFault {
    /// What is wrong, in words for people.
    pub fn what(self) -> &'static str {
        match self {
            ValueFault::Utf8 => "the value is not UTF-8",
            ValueFault::Escape => "the value holds an unknown escape",
            ValueFault::EscapeAtEnd => "the value ends in a lone backslash",
            ValueFault::Boolean => "the value is not a boolean",
            ValueFault::Integer => "the value is not a plain decimal number",
            ValueFault::Range => "the number is out of range",
        }
    }

    /// What to do about it, in words for people.
    pub fn remedy(self) -> &'static str {
        match self {
            ValueFault::Utf8 => "save the file as UTF-8",
            ValueFault::Escape | ValueFault::EscapeAtEnd => r"the escapes are \s \n \t \r \\; write a backslash as \\",
            ValueFault::Boolean => "write true or false, with nothing behind it",
            ValueFault::Integer => "write digits only, without a unit and with nothing behind them",
            ValueFault::Range => "write a smaller number",
        }
    }
}

impl fmt::Display for ValueFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what(), self.remedy())
    }
}

/// A value as text: UTF-8 with the escapes `\s \n \t \r \\` resolved. Trailing blanks stay.
pub fn string(value: &[u8]) -> Result<String, ValueFault> {
    let text = std::str::from_utf8(value).map_err(|_| ValueFault::Utf8)?;
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match chars.next() {
            Some('s') => ' ',
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('\\') => '\\',
            Some(_) => return Err(ValueFault::Escape),
            None => return Err(ValueFault::EscapeAtEnd),
        });
    }
    Ok(out)
}

/// A value as a boolean: `true`, `false`, `1` or `0`, trailing blanks allowed.
pub fn boolean(value: &[u8]) -> Result<bool, ValueFault> {
    match trim_end(value) {
        b"true" | b"1" => Ok(true),
        b"false" | b"0" => Ok(false),
        _ => Err(ValueFault::Boolean),
    }
}

/// A value as a number: an optional sign and decimal digits, then nothing or blanks.
///
/// As in GLib, anything may stand behind a blank (`10 G` is 10); `exact` tells whether something does, for a warning.
pub fn integer(value: &[u8]) -> Result<Integer, ValueFault> {
    let text = String::from_utf8_lossy(value);
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let count = digits.bytes().take_while(u8::is_ascii_digit).count();
    let rest = &digits[count..];
    if count == 0 || rest.bytes().next().is_some_and(|b| !is_blank(b)) {
        return Err(ValueFault::Integer);
    }
    let magnitude: i64 = digits[..count].parse().map_err(|_| ValueFault::Range)?;
    let value = if text.starts_with('-') { -magnitude } else { magnitude };
    Ok(Integer { value, exact: trim_start(rest.as_bytes()).is_empty() })
}

/// A number read by [`integer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Integer {
    /// The number.
    pub value: i64,
    /// Nothing but blanks followed it.
    pub exact: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn valid(text: &str) -> KeyFile {
        let (file, faults) = parse(text.as_bytes());
        assert_eq!(faults, [], "{text:?}");
        file
    }

    fn kinds(bytes: &[u8]) -> Vec<(u32, FaultKind)> {
        parse(bytes).1.into_iter().map(|f| (f.line, f.kind)).collect()
    }

    fn value<'a>(file: &'a KeyFile, group: &str, key: &str) -> &'a [u8] {
        let group = file.groups.iter().find(|g| g.name == group).expect("group");
        &group.effective().find(|e| e.key == key).expect("key").value
    }

    #[test]
    fn groups_keys_and_comments() {
        let file = valid("# top\n\n[generic]\n  # inside\n port\t= 10 \n  [disk 1]  \t\nexportname=/a=b # c\n");
        assert_eq!(file.groups.len(), 2);
        assert_eq!((file.groups[1].name.as_str(), file.groups[1].line), ("disk 1", 6));
        assert_eq!(value(&file, "generic", "port"), b"10 ");
        assert_eq!(value(&file, "disk 1", "exportname"), b"/a=b # c");
        assert_eq!(file.groups[1].entries[0].line, 7);
    }

    #[test]
    fn line_ends_are_lf_or_crlf() {
        let file = valid("[a]\r\nk = v\r\nlast = 1");
        assert_eq!(value(&file, "a", "k"), b"v");
        assert_eq!(value(&file, "a", "last"), b"1");
        assert_eq!(value(&valid("[a]\nk=x\ry=z\n"), "a", "k"), b"x\ry=z");
    }

    #[test]
    fn duplicates_merge_and_the_last_key_wins() {
        let file = valid("[a]\nk=1\nk=2\n[b]\nk=3\n[a]\nk=4\nz=5\n");
        assert_eq!(file.groups.len(), 2);
        assert_eq!(file.groups[0].repeated, [6]);
        assert_eq!(value(&file, "a", "k"), b"4");
        assert_eq!(file.groups[0].effective().count(), 2);
        assert_eq!(value(&file, "b", "k"), b"3");
    }

    #[test]
    fn every_fault_is_reported_with_its_line() {
        let text = b"x=1\n[a]\n; old\nfoo\n=5\n[b] # c\nunder=broken\n[]\n[c\nk[=1\n[d]\nk=\0\n";
        let expected = [
            (1, FaultKind::OutsideGroup),
            (3, FaultKind::Semicolon),
            (4, FaultKind::NotALine),
            (5, FaultKind::Key),
            (6, FaultKind::Header),
            (8, FaultKind::GroupName),
            (9, FaultKind::Header),
            (12, FaultKind::Nul),
        ];
        assert_eq!(kinds(text), expected);
        assert_eq!(kinds(b"\xef\xbb\xbf[a]\n"), [(1, FaultKind::ByteOrderMark)]);
        assert_eq!(kinds(b"[\xe4]\n"), [(1, FaultKind::GroupNameUtf8)]);
        assert_eq!(kinds(b"[a]\nEncoding=latin1\n"), [(2, FaultKind::Encoding)]);
        assert_eq!(kinds(b"[a]\nEncoding=utf-8\n[b]\nEncoding=latin1\n"), []);
    }

    #[test]
    fn key_names_follow_glib() {
        for good in ["read only", "a[de]", "a[]", "a[d.e@_-]", "\u{e4}", "5", ";a", "a#b", "a[\u{e4}]"] {
            valid(&format!("[g]\n{good} = 1\n"));
        }
        for bad in ["", "a[", "a]", "a[de]x", "a[d!]", "a [de]", "[x]"] {
            assert_eq!(kinds(format!("[g]\n{bad}=1\n").as_bytes()), [(2, FaultKind::Key)], "{bad:?}");
        }
    }

    #[test]
    fn a_file_of_garbage_has_bounded_messages() {
        let (_, faults) = parse("garbage\n".repeat(10_000).as_bytes());
        assert_eq!(faults.len(), MAX_FAULTS + 1);
        assert_eq!(faults[MAX_FAULTS].kind, FaultKind::TooMany);
    }

    #[test]
    fn strings_and_escapes() {
        assert_eq!(string(br"a\sb\\c\td\n\r ").as_deref(), Ok("a b\\c\td\n\r "));
        assert_eq!(string(br"a\q"), Err(ValueFault::Escape));
        assert_eq!(string(br"a\;"), Err(ValueFault::Escape));
        assert_eq!(string(br"a\"), Err(ValueFault::EscapeAtEnd));
        assert_eq!(string(b"\xff"), Err(ValueFault::Utf8));
    }

    #[test]
    fn booleans() {
        for (text, expected) in [("true", true), ("1", true), ("false", false), ("0 \t", false), ("true\r", true)] {
            assert_eq!(boolean(text.as_bytes()), Ok(expected));
        }
        for bad in ["TRUE", "yes", "true # x", "", "01", "on", "true\x0b"] {
            assert_eq!(boolean(bad.as_bytes()), Err(ValueFault::Boolean), "{bad:?}");
        }
    }

    #[test]
    fn integers() {
        let cases = [("10", 10, true), ("010", 10, true), ("+1", 1, true), ("-1 \r", -1, true), ("10 G", 10, false)];
        for (text, value, exact) in cases {
            assert_eq!(integer(text.as_bytes()), Ok(Integer { value, exact }), "{text}");
        }
        for bad in ["10G", "0x10", "", " ", "-", "--1", "ten"] {
            assert_eq!(integer(bad.as_bytes()), Err(ValueFault::Integer), "{bad:?}");
        }
        assert_eq!(integer(b"99999999999999999999"), Err(ValueFault::Range));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (file, _) = parse(&bytes);
            for entry in file.groups.iter().flat_map(Group::effective) {
                let _ = (string(&entry.value), boolean(&entry.value), integer(&entry.value));
            }
        }

        #[test]
        fn arbitrary_lines_never_panic(text in "([\\[\\]a=#;\\\\ \r\t1-]{0,6}\n){0,20}") {
            let (file, faults) = parse(text.as_bytes());
            prop_assert!(faults.iter().all(|f| f.line >= 1));
            prop_assert!(file.groups.iter().all(|g| g.effective().count() <= g.entries.len()));
        }
    }
}
