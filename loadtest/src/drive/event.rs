//! What matters about an event, found without parsing it.

use memchr::memmem::{Finder, find};

/// An event, as far as the generator cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Some text; when the fake sent it, in microseconds of [`crate::clock`], if it said so.
    Delta(Option<u64>),
    /// The good end, with the response's id.
    Completed(String),
    /// Any other end.
    Failed(String),
    /// Anything else.
    Other,
}

/// Reads one event's JSON.
pub(super) fn read(json: &[u8]) -> Event {
    if is(json, "response.output_text.delta") {
        return Event::Delta(after(json, b"\"sent_us\":").and_then(number));
    }
    if is(json, "response.completed") {
        let id = after(json, b"\"id\":\"resp_")
            .map(|rest| rest.split(|byte| *byte == b'"').next().unwrap_or_default());
        return Event::Completed(format!(
            "resp_{}",
            String::from_utf8_lossy(id.unwrap_or_default())
        ));
    }
    if is(json, "response.failed") || is(json, "response.incomplete") || is(json, "error") {
        let code = after(json, b"\"code\":\"")
            .map(|rest| rest.split(|byte| *byte == b'"').next().unwrap_or_default());
        return Event::Failed(String::from_utf8_lossy(code.unwrap_or(b"failed")).into_owned());
    }
    Event::Other
}

fn is(json: &[u8], kind: &str) -> bool {
    // The type stands near the start or, with sorted keys, near the end.
    let near = |part: &[u8]| find(part, format!("\"type\":\"{kind}\"").as_bytes()).is_some();
    near(&json[..json.len().min(256)]) || near(&json[json.len().saturating_sub(256)..])
}

fn after<'a>(json: &'a [u8], what: &[u8]) -> Option<&'a [u8]> {
    Finder::new(what)
        .find(json)
        .map(|at| &json[at + what.len()..])
}

fn number(digits: &[u8]) -> Option<u64> {
    let end = digits
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(digits.len());
    str::from_utf8(&digits[..end]).ok()?.parse().ok()
}

/// Cuts a stream of server-sent events into the JSON of each.
#[derive(Default)]
pub(super) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Takes a chunk of whatever size and hands over each event that it completes.
    pub(super) fn take(&mut self, mut chunk: &[u8], mut each: impl FnMut(&[u8])) {
        while let Some(end) = memchr::memchr(b'\n', chunk) {
            let line = if self.rest.is_empty() {
                &chunk[..end]
            } else {
                self.rest.extend_from_slice(&chunk[..end]);
                &self.rest
            };
            if let Some(data) = line
                .strip_prefix(b"data: ")
                .or_else(|| line.strip_prefix(b"data:"))
            {
                each(data);
            }
            self.rest.clear();
            chunk = &chunk[end + 1..];
        }
        self.rest.extend_from_slice(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_apart_by_their_type() {
        let table: [(&str, Event); 6] = [
            (
                r#"{"delta":"a","sent_us":17,"type":"response.output_text.delta"}"#,
                Event::Delta(Some(17)),
            ),
            (
                r#"{"type":"response.output_text.delta","delta":"a","sent_us":17}"#,
                Event::Delta(Some(17)),
            ),
            (
                r#"{"type":"response.output_text.delta","delta":"a"}"#,
                Event::Delta(None),
            ),
            (
                r#"{"response":{"id":"resp_7","output":[{"id":"msg_7"}]},"type":"response.completed"}"#,
                Event::Completed("resp_7".into()),
            ),
            (
                r#"{"type":"error","status":429,"error":{"code":"usage_limit_reached"}}"#,
                Event::Failed("usage_limit_reached".into()),
            ),
            (r#"{"type":"response.created"}"#, Event::Other),
        ];
        for (json, event) in table {
            assert_eq!(read(json.as_bytes()), event, "{json}");
        }
    }

    #[test]
    fn lines_do_not_depend_on_where_the_chunks_end() {
        let stream = b"event: a\ndata: {\"a\":1}\n\n: comment\n\ndata: {\"b\":2}\n\n";
        for size in 1..stream.len() {
            let (mut lines, mut seen) = (Lines::default(), Vec::new());
            for chunk in stream.chunks(size) {
                lines.take(chunk, |json| {
                    seen.push(String::from_utf8_lossy(json).into_owned())
                });
            }
            assert_eq!(seen, ["{\"a\":1}", "{\"b\":2}"], "chunks of {size}");
        }
    }
}
