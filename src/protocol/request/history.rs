//! A conversation told again: what came before, put in front of what the request brings.
//!
//! Pure edits of JSON text. Items keep their bytes, except where another account would not understand them.

use std::collections::HashSet;

use bytes::Bytes;

use super::{Invalid, splice::Container};

/// One turn of a conversation, as two raw JSON arrays.
#[derive(Clone, Copy, Debug)]
pub struct Turn<'a> {
    /// What its request brought.
    pub input: &'a str,
    /// What upstream answered.
    pub output: &'a str,
}

/// Why a conversation cannot be told again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Untold {
    /// The request leaves a call of a tool without its output.
    Unanswered(Invalid),
    /// What was kept is not what was asked for: it cannot be read, or only the account that sealed it can.
    Sealed,
}

/// The `input` of a normalised body, a raw value.
#[must_use]
pub fn input(body: &Bytes) -> Option<Bytes> {
    let text = std::str::from_utf8(body).ok()?;
    let object = Container::object(text).ok()?;
    let input = object.get("input")?;
    Some(body.slice_ref(input.as_bytes()))
}

/// The items of the history and of the request as one raw array.
///
/// # Errors
/// [`Untold`].
pub fn items(turns: &[Turn<'_>], input: &str, same_account: bool) -> Result<String, Untold> {
    let length: usize = turns
        .iter()
        .map(|turn| turn.input.len() + turn.output.len())
        .sum();
    let mut told = Telling {
        list: String::with_capacity(length + input.len() + 2),
        calls: Vec::new(),
        answered: HashSet::new(),
    };
    told.list.push('[');
    for turn in turns {
        told.add(turn.input, same_account)?;
        told.add(turn.output, same_account)?;
    }
    told.add(input, true)?;
    told.list.push(']');
    let open = told
        .calls
        .iter()
        .find(|call| !told.answered.contains(*call));
    match open {
        None => Ok(told.list),
        Some(call) => Err(Untold::Unanswered(Invalid::new(
            "input",
            format!(
                "No tool output found for the call {}.",
                &call[..call.floor_char_boundary(100)]
            ),
        ))),
    }
}

/// The body with another `input`, and without `previous_response_id`.
///
/// # Panics
/// If the body was not read by [`super::read`].
#[must_use]
pub fn with_input(body: &Bytes, items: String) -> Bytes {
    let text = std::str::from_utf8(body).expect("the body was read as UTF-8");
    let mut object = Container::object(text).expect("the body was read as an object");
    object.remove("previous_response_id");
    object.set("input", items);
    object.finish().map_or_else(|| body.clone(), Bytes::from)
}

struct Telling {
    list: String,
    /// Ids of calls, and those that have an output.
    calls: Vec<String>,
    answered: HashSet<String>,
}

impl Telling {
    fn add(&mut self, list: &str, same_account: bool) -> Result<(), Untold> {
        let list = list.trim();
        if list.starts_with('"') {
            let message = format!(
                r#"{{"type":"message","role":"user","content":[{{"type":"input_text","text":{list}}}]}}"#
            );
            self.push(&message);
            return Ok(());
        }
        let (_, items) = Container::objects(list).map_err(|_| Untold::Sealed)?;
        for mut item in items {
            let kind = item.string("type").unwrap_or_default();
            if let Some(call) = item.string("call_id") {
                if kind.ends_with("_output") {
                    self.answered.insert(call.into_owned());
                } else {
                    self.calls.push(call.into_owned());
                }
            }
            let sealed = item.present("encrypted_content").is_some();
            if kind == "reasoning" && !(sealed && same_account) {
                // Upstream keeps nothing: thoughts that are not in the item are nowhere.
                continue;
            }
            if same_account {
                self.push(item.text());
                continue;
            }
            if sealed {
                return Err(Untold::Sealed);
            }
            item.remove("id");
            for key in ["content", "output"] {
                if let Some(edited) = item.present(key).and_then(without_files) {
                    item.set(key, edited);
                }
            }
            match item.finish() {
                Some(edited) => self.push(&edited),
                None => self.push(item.text()),
            }
        }
        Ok(())
    }

    fn push(&mut self, item: &str) {
        if self.list.len() > 1 {
            self.list.push(',');
        }
        self.list.push_str(item);
    }
}

/// Content parts without those that name a file of the account; `None` where there is none.
fn without_files(parts: &str) -> Option<String> {
    let (mut list, parts) = Container::objects(parts).ok()?;
    for (index, part) in parts.iter().enumerate() {
        if part.present("file_id").is_some() {
            list.remove_at(index);
        }
    }
    list.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: &str =
        r#"[{"type":"message","role":"user","content":[{"type":"input_text","text":"hé\n"}]}]"#;
    const CALLED: &str = r#"[{"type":"reasoning","id":"rs_1","encrypted_content":"x"},{"type":"function_call","id":"fc_1","call_id":"c1","name":"f","arguments":"{}"}]"#;
    const DONE: &str = r#"[ {"type":"function_call_output","call_id":"c1","output":"7"} ]"#;

    fn told(turns: &[Turn<'_>], input: &str, same: bool) -> Result<String, Untold> {
        items(turns, input, same)
    }

    #[test]
    fn the_same_account_is_told_everything_byte_for_byte() {
        let turns = [Turn {
            input: ASKED,
            output: CALLED,
        }];
        let expected = format!(
            "[{},{},{}]",
            &ASKED[1..ASKED.len() - 1],
            &CALLED[1..CALLED.len() - 1],
            DONE.trim_matches(['[', ']', ' '])
        );
        assert_eq!(told(&turns, DONE, true), Ok(expected));
    }

    #[test]
    fn another_account_is_told_what_it_can_understand() {
        let with_file = r#"[{"type":"message","id":"m","role":"user","content":[{"type":"input_file","file_id":"f"},{"type":"input_text","text":"t"}]}]"#;
        let turns = [Turn {
            input: with_file,
            output: CALLED,
        }];
        let expected = concat!(
            r#"[{"type":"message","role":"user","content":[{"type":"input_text","text":"t"}]},"#,
            r#"{"type":"function_call","call_id":"c1","name":"f","arguments":"{}"},"#,
            r#"{"type":"function_call_output","call_id":"c1","output":"7"}]"#
        );
        assert_eq!(told(&turns, DONE, false).as_deref(), Ok(expected));
    }

    #[test]
    fn thoughts_that_upstream_does_not_keep_are_left_out() {
        let thought = r#"[{"type":"reasoning","id":"rs_1","summary":[]}]"#;
        let turns = [Turn {
            input: "[]",
            output: thought,
        }];
        assert_eq!(told(&turns, "[]", true).as_deref(), Ok("[]"));
    }

    #[test]
    fn what_one_account_sealed_is_not_told_to_another_as_if_it_were_nothing() {
        let sealed = r#"[{"type":"compaction","encrypted_content":"x"}]"#;
        let turns = [Turn {
            input: sealed,
            output: "[]",
        }];
        assert!(told(&turns, "[]", true).is_ok());
        assert_eq!(told(&turns, "[]", false), Err(Untold::Sealed));
    }

    #[test]
    fn a_call_without_its_output_is_refused() {
        let turns = [Turn {
            input: ASKED,
            output: CALLED,
        }];
        let refused = told(&turns, ASKED, true);
        let Err(Untold::Unanswered(invalid)) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(invalid.param.as_deref(), Some("input"));
        assert!(invalid.message.contains("c1"));
    }

    #[test]
    fn text_is_a_message_of_the_user() {
        let expected =
            r#"[{"type":"message","role":"user","content":[{"type":"input_text","text":"a\"b"}]}]"#;
        assert_eq!(told(&[], r#""a\"b""#, true).as_deref(), Ok(expected));
    }

    #[test]
    fn the_rest_of_the_body_keeps_its_bytes() {
        let body =
            Bytes::from_static(br#"{"model":"m", "previous_response_id":"r","input":[1],"n":1e1}"#);
        assert_eq!(input(&body).as_deref(), Some(b"[1]".as_slice()));
        assert_eq!(
            with_input(&body, "[]".into()),
            r#"{"model":"m","input":[],"n":1e1}"#
        );
    }
}
