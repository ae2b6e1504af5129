//! What a response has put out, as it stands in its events.

use serde::Deserialize;
use serde_json::value::RawValue;

/// The item of a `response.output_item.done`.
pub fn done_item(data: &[u8]) -> Option<&[u8]> {
    #[derive(Deserialize)]
    struct Done<'a> {
        #[serde(borrow)]
        item: &'a RawValue,
    }
    let done: Done<'_> = serde_json::from_slice(data).ok()?;
    Some(done.item.get().as_bytes())
}

/// The `output` of a terminal event's response; `None` where it has none.
pub fn output(data: &[u8]) -> Option<&[u8]> {
    #[derive(Deserialize)]
    struct Terminal<'a> {
        #[serde(borrow)]
        response: Response<'a>,
    }
    #[derive(Deserialize)]
    struct Response<'a> {
        #[serde(borrow)]
        output: Option<&'a RawValue>,
    }
    let terminal: Terminal<'_> = serde_json::from_slice(data).ok()?;
    terminal.response.output.map(|raw| raw.get().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_found_as_they_stand() {
        let done =
            br#"{"type":"response.output_item.done","output_index":0,"item": { "a" : 1.0 } }"#;
        assert_eq!(done_item(done), Some(&br#"{ "a" : 1.0 }"#[..]));
        for (event, expected) in [
            (r#"{"response":{"id":"r","output":[ {} ]}}"#, Some("[ {} ]")),
            (r#"{"response":{"id":"r","output":null}}"#, None),
            (r#"{"response":{"id":"r"}}"#, None),
            (r#"{"type":"error"}"#, None),
            ("not JSON", None),
        ] {
            assert_eq!(
                output(event.as_bytes()),
                expected.map(str::as_bytes),
                "{event}"
            );
            assert_eq!(done_item(event.as_bytes()), None);
        }
    }
}
