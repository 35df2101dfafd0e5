//! A distinguished name as text (RFC 4514): what `tlsallow` is compared with and people are shown.
//!
//! Pure. Promises: different names have different texts, whatever their values hold, and a text is one line.

use std::fmt::Write;
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// Types of attributes with a name of their own; `openssl x509 -nameopt RFC2253` knows them by the same.
const TYPES: [(&str, &str); 11] = [
    ("2.5.4.3", "CN"),
    ("2.5.4.5", "serialNumber"),
    ("2.5.4.6", "C"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.9", "street"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

/// The name's text: its most specific part first.
pub(super) fn name(name: &X509Name<'_>) -> String {
    let mut parts: Vec<String> = Vec::new();
    for set in name.iter_rdn() {
        let values: Vec<String> = set.iter().map(attribute).collect();
        parts.push(values.join("+"));
    }
    parts.reverse();
    parts.join(",")
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> String {
    let oid = attribute.attr_type().to_id_string();
    let named = TYPES.iter().find(|(known, _)| *known == oid);
    match (named, attribute.as_str()) {
        (Some((_, name)), Ok(text)) => format!("{name}={}", escaped(text)),
        // a value that is no text, or of a type nobody knows
        _ => {
            let value = attribute.attr_value();
            let mut out = format!("{oid}=#{:02x}", value.tag().0);
            let length = value.data.len().to_be_bytes();
            let length = &length[length.iter().take_while(|b| **b == 0).count().min(length.len() - 1)..];
            if value.data.len() >= 0x80 {
                let _ = write!(out, "{:02x}", 0x80 | length.len()); // writing to a string cannot fail
            }
            for byte in length.iter().chain(value.data) {
                let _ = write!(out, "{byte:02x}"); // writing to a string cannot fail
            }
            out
        }
    }
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let last = text.chars().count().saturating_sub(1);
    for (index, c) in text.chars().enumerate() {
        match c {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => out.extend(['\\', c]),
            ' ' if index == 0 || index == last => out.push_str("\\ "),
            '#' if index == 0 => out.push_str("\\#"),
            c if c.is_control() => {
                let mut bytes = [0; 4];
                for byte in c.encode_utf8(&mut bytes).bytes() {
                    let _ = write!(out, "\\{byte:02X}"); // writing to a string cannot fail
                }
            }
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_separates_is_escaped() {
        for (text, expected) in [
            ("plain name", "plain name"),
            ("a,b+c", r"a\,b\+c"),
            (r#"\"<>;"#, r#"\\\"\<\>\;"#),
            (" both ", r"\ both\ "),
            (" ", r"\ "),
            ("#1 of #2", r"\#1 of #2"),
            ("line\nbreak\0", r"line\0Abreak\00"),
            ("München=x", "München=x"),
            ("", ""),
        ] {
            assert_eq!(escaped(text), expected, "{text:?}");
        }
    }
}
