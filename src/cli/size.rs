//! Sizes as people write them: `512`, `64K`, `10G`.

pub use crate::units::parse_size as parse;

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
    fn shown() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (196_624, "192.02 KiB"), (3 << 29, "1.5 GiB")];
        for (bytes, text) in cases {
            assert_eq!(show(bytes), text);
        }
        assert_eq!(show(u64::MAX), "16 EiB");
    }
}
