//! W3C trace context: whether a request says which trace it is part of.
//!
//! Nothing is made up: who sends none gets none. What is valid is passed on as it came, since no span of ours stands in between; what is
//! not is as if it were absent, with the state that belongs to it.

use http::HeaderMap;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";

/// The trace id, 32 hexadecimal digits, if there is one valid `traceparent`.
#[must_use]
pub fn id(headers: &HeaderMap) -> Option<&str> {
    let mut given = headers.get_all(PARENT).iter();
    let parent = given.next()?.to_str().ok()?;
    given.next().is_none().then(|| of(parent))?
}

/// The trace id of a `traceparent`, if that is valid.
#[must_use]
pub fn of(parent: &str) -> Option<&str> {
    let mut parts = parent.split('-');
    let mut part = |digits| parts.next().filter(|text| is_hex(text, digits));
    let (version, trace, span, _flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
    // A version that is not known yet may say more; the first one may not.
    let ends = version != "00" || parts.next().is_none();
    let names = |id: &str| id.bytes().any(|digit| digit != b'0');
    (version != "ff" && ends && names(trace) && names(span)).then_some(trace)
}

/// Removes what is not valid.
pub fn clean(headers: &mut HeaderMap) {
    if id(headers).is_none() {
        headers.remove(PARENT);
        headers.remove(STATE);
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn headers(parents: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(STATE, HeaderValue::from_static("vendor=1"));
        for parent in parents {
            headers.append(PARENT, HeaderValue::from_static(parent));
        }
        headers
    }

    #[test]
    fn a_trace_is_one_valid_parent_and_nothing_else_is() {
        for (parents, valid) in [
            (
                &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"][..],
                true,
            ),
            (
                &["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"],
                true,
            ),
            (
                &["cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00-more"],
                true,
            ),
            (
                &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more"],
                false,
            ),
            (
                &["ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"],
                false,
            ),
            (
                &["00-00000000000000000000000000000000-00f067aa0ba902b7-01"],
                false,
            ),
            (
                &["00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"],
                false,
            ),
            (
                &["00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"],
                false,
            ),
            (
                &["00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01"],
                false,
            ),
            (
                &["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"],
                false,
            ),
            (&["4bf92f3577b34da6a3ce929d0e0e4736"], false),
            (&[""], false),
            (&[], false),
            (
                &[
                    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                ],
                false,
            ),
        ] {
            let mut headers = headers(parents);
            assert_eq!(id(&headers), valid.then_some(TRACE), "{parents:?}");
            let before = headers.clone();
            clean(&mut headers);
            assert_eq!(headers == before, valid, "{parents:?}");
            assert_eq!(headers.is_empty(), !valid, "{parents:?}");
        }
    }
}
