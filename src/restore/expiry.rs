//! Times as people write them, `90s`, `1h 30m`, `7d`, and moments as they are kept. Pure.

use jiff::{SignedDuration, Span, SpanRelativeTo, Timestamp};

/// The moment that is `text` from `now` on.
pub fn parse(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let remedy = "write a time such as 30m, 1h or 7d";
    let no_time = |e: jiff::Error| format!("{text:?} is no length of time: {e}; {remedy}");
    let span: Span = text.trim().parse().map_err(no_time)?;
    let length = span.to_duration(SpanRelativeTo::days_are_24_hours()).map_err(no_time)?;
    if length <= SignedDuration::ZERO {
        return Err(format!("{text:?} is over at once; {remedy}"));
    }
    now.checked_add(length).map_err(|_| format!("{text:?} is longer than the calendar goes; {remedy}"))
}

/// Whether a moment that was kept has come. One that cannot be read has: only root can have written it, and a restore that
/// was to end is not to stay for ever because of that.
pub fn is_over(moment: Option<&str>, now: Timestamp) -> bool {
    moment.is_some_and(|text| text.parse::<Timestamp>().map_or(true, |moment| moment <= now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let after = |text| parse(text, now).map(|then| then.duration_since(now).as_secs());
        assert_eq!(after("90s"), Ok(90));
        assert_eq!(after("1h"), Ok(3600));
        assert_eq!(after("1h 30m"), Ok(5400));
        assert_eq!(after("7d"), Ok(7 * 86400));
        for text in ["", "0", "0s", "-1h", "1", "soon", "1 month", "99999999999h"] {
            let why = after(text).unwrap_err();
            assert!(why.contains("such as 30m"), "{text}: {why}");
        }
    }

    #[test]
    fn moments() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let over = |text| is_over(text, now);
        assert!(!over(None) && !over(Some("2026-01-01T00:00:01Z")));
        assert!(over(Some("2026-01-01T00:00:00Z")) && over(Some("never")));
    }
}
