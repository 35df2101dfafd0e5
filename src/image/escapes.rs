//! Text in which some bytes stand as a mark and their number: of the kernel's lists, and of udev.

/// How a byte is written that cannot stand for itself.
#[derive(Clone, Copy, Debug)]
pub enum Escape {
    /// `\NNN`, octal: lists in /proc, see proc_pid_mountinfo(5).
    Octal,
    /// `\xNN`: properties of udev.
    Hex,
}

impl Escape {
    /// The mark, the number of digits, their base.
    fn form(self) -> (&'static [u8], usize, u32) {
        match self {
            Escape::Octal => (b"\\", 3, 8),
            Escape::Hex => (b"\\x", 2, 16),
        }
    }
}

/// The bytes that a word stands for. What looks like an escape and is none stays as it is.
pub fn unescape(word: &[u8], escape: Escape) -> Vec<u8> {
    let (mark, digits, base) = escape.form();
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let number = rest.strip_prefix(mark).and_then(|tail| tail.get(..digits)).filter(|n| is_number(n, base));
        let byte = number.and_then(|n| u8::from_str_radix(std::str::from_utf8(n).ok()?, base).ok());
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &rest[mark.len() + digits..] } else { tail };
    }
    out
}

fn is_number(digits: &[u8], base: u32) -> bool {
    digits.iter().all(|digit| char::from(*digit).is_digit(base))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_become_bytes_and_nothing_else_changes() {
        let octal = [
            ("/plain", "/plain"),
            ("/a\\040b\\134c", "/a b\\c"),
            ("/line\\012break", "/line\nbreak"),
            ("/odd\\", "/odd\\"),
            ("/odd\\9é\\04", "/odd\\9é\\04"),
            ("\\777", "\\777"),
            ("\\+12", "\\+12"),
        ];
        let hex =
            [("a\\x20b\\x5c\\xff", &b"a b\\\xff"[..]), ("\\x2", b"\\x2"), ("\\x+2", b"\\x+2"), ("\\040", b"\\040")];
        for (word, bytes) in octal {
            assert_eq!(unescape(word.as_bytes(), Escape::Octal), bytes.as_bytes(), "{word}");
        }
        for (word, bytes) in hex {
            assert_eq!(unescape(word.as_bytes(), Escape::Hex), bytes, "{word}");
        }
    }
}
