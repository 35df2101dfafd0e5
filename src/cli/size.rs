//! Sizes as people write them: `512`, `64K`, `10G`.

/// Parses a number of bytes with an optional binary suffix K, M, G, T or P (64K is 65,536), as qemu-img does.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" | "b" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        other => return Err(format!("the suffix {other:?} is not known; K, M, G, T and P are")),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err("write a whole number of bytes, with K, M, G, T or P behind it if you like".to_owned());
    }
    let number: u64 = digits.parse().map_err(|_| "the number is too large".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the number is too large".to_owned())
}

/// Writes a number of bytes for people: `1.5 GiB`.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = (bytes.ilog2() / 10) as usize;
    let scaled = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    let text = format!("{scaled:.2}");
    format!("{} {}", text.trim_end_matches('0').trim_end_matches('.'), UNITS[unit - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("0", 0), ("512", 512), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("2T", 2 << 40)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for bad in ["", "K", "-1", "1.5G", "10X", "10GiB", "1 G", "99999999999999999999", "16384P", "\u{e4}"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (196_624, "192.02 KiB"), (3 << 29, "1.5 GiB")];
        for (bytes, text) in cases {
            assert_eq!(show(bytes), text);
        }
        assert_eq!(show(u64::MAX), "16 EiB");
    }
}
