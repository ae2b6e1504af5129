//! What one turn adds to its conversation, taken while it runs.
//!
//! Owns the text until it is sealed; at most [`TURN`] bytes of it, beyond which only the fact of the turn remains.
//!
//! Invariant: the text is the beginning of a JSON array, its closing bracket missing.

use super::policy::{Parent, TURN, is_key};
use crate::protocol::request::history;

/// What one turn adds, while it runs.
pub struct Capture {
    parent: Option<Parent>,
    /// Without the closing bracket; `None` once it is clear that it cannot be told again.
    items: Option<String>,
    outputs: bool,
}

/// What one turn added.
pub struct Kept {
    pub(super) response_id: String,
    pub(super) parent: Option<Parent>,
    /// A JSON array.
    pub(super) items: Option<String>,
}

impl Capture {
    /// Begins with the request's `input` as JSON (see [`history::input`]), and the response that the request continues: `None` only if the
    /// input is whole by itself.
    #[must_use]
    pub fn new(input: &str, parent: Option<Parent>) -> Self {
        let tellable = parent.as_ref().is_none_or(|parent| parent.link.is_some());
        let items = (tellable && input.len() <= TURN)
            .then(|| history::items(input.trim()))
            .flatten()
            .and_then(|items| items.strip_suffix(']').map(str::to_owned));
        Self {
            parent,
            items,
            outputs: false,
        }
    }

    /// Adds an item of the output when it is done, as JSON.
    pub fn push_output(&mut self, item: &[u8]) {
        self.outputs = true;
        self.push(item);
    }

    /// Ends with the response's id. `output`, the JSON array of the terminal event, is used if no item was pushed. `None` if the id is one
    /// that nobody could come back with.
    #[must_use]
    pub fn finish(mut self, response_id: &str, output: Option<&[u8]>) -> Option<Kept> {
        if let Some(output) = output.filter(|_| !self.outputs) {
            let inner = output.trim_ascii();
            let inner = inner
                .strip_prefix(b"[")
                .and_then(|rest| rest.strip_suffix(b"]"));
            match inner.map(<[u8]>::trim_ascii) {
                Some([]) => {}
                Some(items) => self.push(items),
                None => self.items = None,
            }
        }
        let items = self.items.map(|items| items + "]");
        is_key(response_id).then(|| Kept {
            response_id: response_id.to_owned(),
            parent: self.parent,
            items,
        })
    }

    /// Appends one or more members.
    fn push(&mut self, members: &[u8]) {
        let Some(mut items) = self.items.take() else {
            return;
        };
        if let Ok(members) = std::str::from_utf8(members)
            && items.len() + members.len() + 2 <= TURN
        {
            if !items.trim_end().ends_with('[') {
                items.push(',');
            }
            items.push_str(members);
            self.items = Some(items);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(input: &str, pushed: &[&str], output: Option<&str>) -> Option<String> {
        let mut capture = Capture::new(input, None);
        for item in pushed {
            capture.push_output(item.as_bytes());
        }
        let output = output.map(str::as_bytes);
        capture.finish("resp_1", output).unwrap().items
    }

    #[test]
    fn the_items_of_a_turn_are_one_array() {
        for (input, pushed, output, expected) in [
            ("[]", &[][..], None, "[]"),
            (" [ ] ", &["{}"], None, "[ {}]"),
            (
                r#"[{"a":1} ]"#,
                &["{}", "{ }"],
                Some("[7]"),
                r#"[{"a":1} ,{},{ }]"#,
            ),
            ("[{}]", &[], Some(" [ {},{} ] "), "[{},{},{}]"),
            ("[{}]", &[], Some(" [ ] "), "[{}]"),
            (
                r#""é""#,
                &["{}"],
                None,
                r#"[{"type":"message","role":"user","content":[{"type":"input_text","text":"é"}]},{}]"#,
            ),
        ] {
            assert_eq!(kept(input, pushed, output).as_deref(), Some(expected));
        }
        assert_eq!(kept("7", &[], None), None);
        assert_eq!(kept("[]", &[], Some("null")), None);
    }

    #[test]
    fn a_turn_over_its_limit_leaves_only_its_fact() {
        let large = format!(r#"{{"a":"{}"}}"#, "x".repeat(TURN - 12));
        assert_eq!(
            kept("[]", &[&large], None).map(|items| items.len()),
            Some(TURN - 2)
        );
        assert_eq!(kept("[{}]", &[&large], None), None);
        assert_eq!(kept(&format!("[{large},{{}}]"), &[], None), None);
    }

    #[test]
    fn what_continues_the_untold_is_not_kept_and_an_id_without_a_key_is_none() {
        let capture = || Capture::new("[]", Some(Parent::unknown("resp_0")));
        assert_eq!(capture().finish("resp_1", None).unwrap().items, None);
        for id in ["", "a\0b", &"x".repeat(201)] {
            assert!(capture().finish(id, None).is_none());
        }
    }
}
