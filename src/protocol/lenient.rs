//! Lenient readers of JSON scalars.
//!
//! Upstream writes the same fact as a number, a numeric string or nothing at all. A value of the wrong type reads as
//! absent; a boolean is never a number; NaN and infinities never get in.

use serde_json::Value;
use serde_json::value::RawValue;

/// The furthest deadline that is believed, in seconds: upstream has been seen to send the year 2446.
pub(crate) const HORIZON: i64 = 366 * 24 * 3600;

/// A deadline in epoch seconds, if it lies ahead and within the horizon.
pub(crate) fn deadline(at: i64, now: i64) -> Option<i64> {
    (at > now && at <= now.saturating_add(HORIZON)).then_some(at)
}

/// A raw value as a tree; absent or unreadable is null. For small values only.
pub(crate) fn tree(raw: Option<&RawValue>) -> Value {
    raw.and_then(|raw| serde_json::from_str(raw.get()).ok())
        .unwrap_or(Value::Null)
}

/// A raw value that is a string.
pub(crate) fn string(raw: Option<&RawValue>) -> Option<String> {
    serde_json::from_str(raw?.get()).ok()
}

/// A string that says something.
pub(crate) fn text(value: &Value) -> Option<String> {
    value
        .as_str()
        .map(str::trim)
        .filter(|text| !text.is_empty())
        .map(str::to_owned)
}

/// A finite number, written as a number or as text.
pub(crate) fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

/// A whole number, rounded up; out of range is absent.
pub(crate) fn whole(value: &Value) -> Option<i64> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53: beyond it a float no longer counts in ones
    value.as_i64().or_else(|| {
        number(value)
            .filter(|number| number.abs() <= EXACT)
            .map(|number| number.ceil() as i64)
    })
}

/// A truth value, written as a boolean or as text.
pub(crate) fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::String(text) if text.trim().eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.trim().eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_are_finite_and_never_booleans() {
        let cases = [
            (json!(31), Some(31.0)),
            (json!(" 31.5 "), Some(31.5)),
            (json!("NaN"), None),
            (json!("inf"), None),
            (json!(true), None),
            (json!(null), None),
            (json!([1]), None),
        ];
        for (value, expected) in cases {
            assert_eq!(number(&value), expected, "{value}");
        }
    }

    #[test]
    fn whole_numbers_round_up_and_never_overflow() {
        let cases = [
            (json!(7), Some(7)),
            (json!(7.2), Some(8)),
            (json!("7.2"), Some(8)),
            (json!(-3), Some(-3)),
            (json!(u64::MAX), None),
            (json!(1e300), None),
            (json!(false), None),
        ];
        for (value, expected) in cases {
            assert_eq!(whole(&value), expected, "{value}");
        }
    }

    #[test]
    fn a_deadline_lies_ahead_and_within_a_year() {
        let now = 1_800_000_000;
        for (at, expected) in [
            (now, None),
            (now + 1, Some(now + 1)),
            (now + HORIZON, Some(now + HORIZON)),
            (now + HORIZON + 1, None),
        ] {
            assert_eq!(deadline(at, now), expected, "{at}");
        }
    }
}
