//! When upstream wants to be asked again.
//!
//! A named instant comes before a number of seconds, a header before a sentence. Nothing is believed that lies in the past
//! or beyond 366 days; nothing is jittered here.

use std::time::Duration;

use jiff::fmt::rfc2822;

use crate::protocol::event::ErrorBody;
use crate::protocol::lenient::{HORIZON, deadline};
use crate::protocol::limits;

/// When the limit resets: `resets_at`, else `resets_in_seconds` from now.
pub(super) fn resets_at(error: &ErrorBody, now: i64) -> Option<i64> {
    let absolute = error.resets_at.and_then(|at| deadline(at, now));
    absolute.or_else(|| deadline(now.checked_add(error.resets_in_seconds?)?, now))
}

/// When the last exhausted window of the refused family resets, by the headers of a refusal for usage.
pub(super) fn exhausted_until(error: &ErrorBody, now: i64) -> Option<i64> {
    let usage = [&error.code, &error.kind]
        .into_iter()
        .flatten()
        .any(|name| name == "usage_limit_reached");
    let family = limits::active_family(&error.headers).unwrap_or_default();
    let seen = limits::from_headers(&error.headers, now)
        .into_iter()
        .filter(|seen| usage && seen.family == family);
    seen.flat_map(|seen| seen.windows)
        .filter(|window| window.used_percent >= 100.0)
        .filter_map(|w| w.resets_at)
        .max()
}

/// How long to wait: `Retry-After`, else "try again in ..." of the message.
pub(super) fn retry_after(error: &ErrorBody, now: i64) -> Option<Duration> {
    let header = error
        .headers
        .get(http::header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok());
    let said = || error.message.as_deref().and_then(try_again_in);
    header
        .and_then(|value| from_header(value.trim(), now))
        .or_else(said)
        .filter(|wait| believable(*wait))
}

fn believable(wait: Duration) -> bool {
    !wait.is_zero() && wait.as_secs() <= HORIZON.unsigned_abs()
}

/// Seconds, or an HTTP date.
fn from_header(value: &str, now: i64) -> Option<Duration> {
    if let Ok(seconds) = value.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let date = rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    Some(Duration::from_secs(
        u64::try_from(date.as_second().checked_sub(now)?).ok()?,
    ))
}

/// The wait in "Please try again in 1h2m3.5s."; every unit must be a whole word, so that a month is not a minute.
fn try_again_in(message: &str) -> Option<Duration> {
    const PHRASE: &str = "try again in";
    let at = message.to_ascii_lowercase().find(PHRASE)?;
    let mut rest = message[at + PHRASE.len()..].trim_start();
    let mut wait = Duration::ZERO;
    loop {
        let digits = rest
            .bytes()
            .take_while(|byte| byte.is_ascii_digit() || *byte == b'.')
            .count();
        let Ok(count) = rest[..digits].parse::<f64>() else {
            break;
        };
        let unit = rest[digits..].trim_start();
        let letters = unit.bytes().take_while(u8::is_ascii_alphabetic).count();
        let Some(seconds) = unit_seconds(&unit[..letters]) else {
            break;
        };
        wait = wait.checked_add(Duration::try_from_secs_f64(count * seconds).ok()?)?;
        rest = unit[letters..].trim_start_matches([' ', ',']);
        rest = rest.strip_prefix("and ").unwrap_or(rest);
    }
    Some(wait).filter(|wait| !wait.is_zero())
}

fn unit_seconds(unit: &str) -> Option<f64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "ms" | "millisecond" | "milliseconds" => 0.001,
        "s" | "sec" | "secs" | "second" | "seconds" => 1.0,
        "m" | "min" | "mins" | "minute" | "minutes" => 60.0,
        "h" | "hr" | "hrs" | "hour" | "hours" => 3_600.0,
        "d" | "day" | "days" => 86_400.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    const NOW: i64 = 1_800_000_000; // Fri, 15 Jan 2027 08:00:00 GMT

    #[test]
    fn a_reset_is_exact_or_absent() {
        let cases = [
            (Some(NOW + 60), Some(5), Some(NOW + 60)),
            (Some(NOW), Some(5), Some(NOW + 5)),
            (Some(15_023_672_358), Some(5), Some(NOW + 5)),
            (Some(15_023_672_358), None, None),
            (None, Some(HORIZON), Some(NOW + HORIZON)),
            (None, Some(HORIZON + 1), None),
            (None, Some(i64::MAX), None),
            (None, Some(0), None),
            (None, Some(-5), None),
            (None, None, None),
        ];
        for (at, within, expected) in cases {
            let error = ErrorBody {
                resets_at: at,
                resets_in_seconds: within,
                ..ErrorBody::default()
            };
            assert_eq!(resets_at(&error, NOW), expected, "{at:?} {within:?}");
        }
    }

    #[test]
    fn a_wait_is_read_from_the_header_first() {
        let said = "Rate limit reached. Please try again in 7s.";
        let cases = [
            ("3", said, Some(3.0)),
            ("1.5", said, Some(1.5)),
            ("Fri, 15 Jan 2027 08:01:00 GMT", said, Some(60.0)),
            ("Fri, 15 Jan 2027 07:59:00 GMT", said, Some(7.0)),
            ("soon", said, Some(7.0)),
            ("-1", said, Some(7.0)),
            ("NaN", "", None),
            ("inf", "", None),
            ("0", "", None),
            ("99999999999", "", None),
        ];
        for (header, message, expected) in cases {
            let mut error = ErrorBody {
                message: Some(message.to_owned()),
                ..ErrorBody::default()
            };
            error
                .headers
                .insert("retry-after", HeaderValue::from_static(header));
            assert_eq!(
                retry_after(&error, NOW),
                expected.map(Duration::from_secs_f64),
                "{header}"
            );
        }
    }

    #[test]
    fn a_sentence_tells_a_compound_wait() {
        let cases = [
            ("Please try again in 1.5s.", Some(1.5)),
            ("try again in 1500ms", Some(1.5)),
            ("Try Again In 30s or later", Some(30.0)),
            ("try again in 6m0s", Some(360.0)),
            ("try again in 1h2m3s.", Some(3_723.0)),
            (
                "try again in 1 hour, 2 minutes and 3 seconds",
                Some(3_723.0),
            ),
            ("try again in 6 days 1 hr", Some(522_000.0)),
            ("try again in 2 months", None),
            ("try again in a minute", None),
            ("try again later", None),
            ("in 5s", None),
            ("try again in 1.2.3s", None),
            ("İ try again in 5s", Some(5.0)),
        ];
        for (message, expected) in cases {
            assert_eq!(
                try_again_in(message),
                expected.map(Duration::from_secs_f64),
                "{message}"
            );
        }
    }
}
