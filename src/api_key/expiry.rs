//! When a key ends, as an operator writes it.

use std::str::FromStr;

use jiff::{Span, Timestamp, tz::TimeZone};

/// An instant, or a time from now.
#[derive(Clone, Copy, Debug)]
pub enum Expiry {
    /// RFC 3339 with any offset.
    At(Timestamp),
    /// A span such as `30d`, `12h` or `1y`.
    In(Span),
}

/// What is wrong with an [`Expiry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadExpiry {
    /// Neither form.
    #[error(
        "is neither a time with an offset, such as 2030-01-31T12:00:00+02:00, nor a span, such as 30d"
    )]
    Unreadable,
    /// It would be over before it begins.
    #[error("does not lie in the future")]
    Past,
}

impl FromStr for Expiry {
    type Err = BadExpiry;

    fn from_str(text: &str) -> Result<Self, BadExpiry> {
        text.parse()
            .map(Self::At)
            .or_else(|_| text.parse().map(Self::In))
            .map_err(|_| BadExpiry::Unreadable)
    }
}

impl Expiry {
    /// The instant, as seen from `now`.
    ///
    /// # Errors
    /// [`BadExpiry::Past`]; [`BadExpiry::Unreadable`] beyond the year 9999.
    pub fn resolve(self, now: Timestamp) -> Result<Timestamp, BadExpiry> {
        let end = match self {
            Self::At(end) => end,
            Self::In(span) => now
                .to_zoned(TimeZone::UTC)
                .checked_add(span)
                .map_err(|_| BadExpiry::Unreadable)?
                .timestamp(),
        };
        if end > now {
            Ok(end)
        } else {
            Err(BadExpiry::Past)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_the_same_instant_in_every_offset_and_never_past() {
        let now: Timestamp = "2030-01-01T00:00:00Z".parse().unwrap();
        for (text, expected) in [
            ("2030-01-01T02:00:00+01:00", Ok("2030-01-01T01:00:00Z")),
            ("2029-12-31T20:00:00-05:00", Ok("2030-01-01T01:00:00Z")),
            ("2030-01-01T06:45:00+05:45", Ok("2030-01-01T01:00:00Z")),
            ("2030-01-01T01:00:00.5Z", Ok("2030-01-01T01:00:00.5Z")),
            ("30d", Ok("2030-01-31T00:00:00Z")),
            ("1y 2mo", Ok("2031-03-01T00:00:00Z")),
            ("90 minutes", Ok("2030-01-01T01:30:00Z")),
            ("PT1H", Ok("2030-01-01T01:00:00Z")),
            ("2030-01-01T00:00:00Z", Err(BadExpiry::Past)),
            ("0d", Err(BadExpiry::Past)),
            ("-1d", Err(BadExpiry::Past)),
            ("2030-01-01T02:00:00", Err(BadExpiry::Unreadable)),
            ("2030-01-01", Err(BadExpiry::Unreadable)),
            ("tomorrow", Err(BadExpiry::Unreadable)),
            ("19000y", Err(BadExpiry::Unreadable)),
            ("", Err(BadExpiry::Unreadable)),
        ] {
            let found = text
                .parse::<Expiry>()
                .and_then(|expiry| expiry.resolve(now));
            assert_eq!(found, expected.map(|end| end.parse().unwrap()), "{text}");
        }
    }
}
