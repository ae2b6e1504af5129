//! What one turn added, while it runs and as it is stored.
//!
//! Stored form: one version byte, then zstd of two raw JSON arrays, the first after its length (4 bytes, big endian).

use std::io::Read as _;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{CHECKPOINT, Chain, TURN_BYTES};
use crate::protocol::request::history::{self, Turn};

const VERSION: u8 = 1;
/// Text is most of it; more effort gains little.
const LEVEL: i32 = 1;

/// What a turn adds, collected while it runs. The input is a slice of the request's bytes, not a copy.
#[derive(Clone, Debug)]
pub struct Capture {
    parent: Option<String>,
    /// `None`: too large to be kept.
    input: Option<Bytes>,
    output: Vec<Bytes>,
    size: usize,
}

impl Capture {
    /// Begins with a normalised body. `previous` is the response that it continues; where the chain up to there is long, or at hand and long,
    /// the whole conversation is kept anew, as a root.
    #[must_use]
    pub fn new(body: &Bytes, previous: Option<&str>, chain: Option<&Chain>) -> Self {
        let own = history::input(body).unwrap_or_else(|| Bytes::from_static(b"[]"));
        let whole = chain
            .filter(|chain| chain.len() >= CHECKPOINT)
            .and_then(|chain| chain.flat(std::str::from_utf8(&own).ok()?))
            .filter(|whole| whole.len() <= TURN_BYTES);
        let (parent, input) = match whole {
            Some(whole) => (None, Bytes::from(whole)),
            None => (previous.map(str::to_owned), own),
        };
        Self {
            parent,
            size: input.len(),
            input: Some(input).filter(|input| input.len() <= TURN_BYTES),
            output: Vec::new(),
        }
    }

    /// Another attempt begins: what the one before said does not count.
    pub fn restart(&mut self) {
        self.size -= self.output.drain(..).map(|item| item.len()).sum::<usize>();
    }

    /// An item is done. `event` is its `response.output_item.done`.
    pub fn push_output(&mut self, event: &[u8]) {
        #[derive(Deserialize)]
        struct Done<'a> {
            #[serde(borrow)]
            item: &'a RawValue,
        }
        if let Ok(done) = serde_json::from_slice::<Done<'_>>(event)
            && self.size <= TURN_BYTES
        {
            self.size += done.item.get().len();
            self.output
                .push(Bytes::copy_from_slice(done.item.get().as_bytes()));
        }
    }

    pub(super) fn parent(&self) -> Option<&str> {
        self.parent.as_deref()
    }

    /// What is kept; `None` if it is too large. `terminal` is the event that ended the turn: its output counts where no item was seen.
    pub(super) fn finish(mut self, terminal: &[u8]) -> Option<Kept> {
        #[derive(Deserialize)]
        struct Terminal<'a> {
            #[serde(borrow)]
            response: Response<'a>,
        }
        #[derive(Deserialize)]
        struct Response<'a> {
            #[serde(borrow, default)]
            output: Vec<&'a RawValue>,
        }
        let input = self.input.take()?;
        if self.output.is_empty()
            && let Ok(terminal) = serde_json::from_slice::<Terminal<'_>>(terminal)
        {
            for item in terminal.response.output {
                self.size += item.get().len();
                self.output
                    .push(Bytes::copy_from_slice(item.get().as_bytes()));
            }
        }
        if self.size > TURN_BYTES {
            return None;
        }
        let mut output = Vec::with_capacity(self.size - input.len() + self.output.len() + 1);
        output.push(b'[');
        for (index, item) in self.output.iter().enumerate() {
            if index > 0 {
                output.push(b',');
            }
            output.extend_from_slice(item);
        }
        output.push(b']');
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).ok();
        Some(Kept {
            input: text(input.to_vec())?,
            output: text(output)?,
        })
    }
}

/// What one turn added: two raw JSON arrays, or text for the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    input: String,
    output: String,
}

impl Kept {
    pub(super) fn len(&self) -> usize {
        self.input.len() + self.output.len()
    }

    pub(super) fn turn(&self) -> Turn<'_> {
        Turn {
            input: &self.input,
            output: &self.output,
        }
    }

    pub(super) fn pack(&self) -> Vec<u8> {
        let mut plain = Vec::with_capacity(4 + self.len());
        let length = u32::try_from(self.input.len()).expect("a turn is at most 2 MiB");
        plain.extend_from_slice(&length.to_be_bytes());
        plain.extend_from_slice(self.input.as_bytes());
        plain.extend_from_slice(self.output.as_bytes());
        let mut packed = vec![VERSION];
        packed.extend(zstd::bulk::compress(&plain, LEVEL).expect("zstd compresses anything"));
        packed
    }

    /// `None` if it is not what [`Kept::pack`] made, or holds more than `limit` bytes.
    pub(super) fn unpack(packed: &[u8], limit: usize) -> Option<Self> {
        let (&VERSION, packed) = packed.split_first()? else {
            return None;
        };
        let mut plain = Vec::new();
        zstd::Decoder::new(packed)
            .ok()?
            .take(limit as u64 + 5)
            .read_to_end(&mut plain)
            .ok()?;
        let (length, texts) = plain.split_first_chunk::<4>()?;
        if texts.len() > limit {
            return None;
        }
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let (input, output) = texts.split_at_checked(length)?;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok();
        Some(Self {
            input: text(input)?,
            output: text(output)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn body(input: &str) -> Bytes {
        Bytes::from(format!(r#"{{"model":"m","input":{input}}}"#))
    }

    #[test]
    fn the_items_of_the_last_attempt_are_kept() {
        let mut capture = Capture::new(&body("[1]"), None, None);
        capture.push_output(br#"{"type":"response.output_item.done","item":{"id":"lost"}}"#);
        capture.restart();
        capture.push_output(br#"{"type":"response.output_item.done","item":{"id":"a"}}"#);
        capture.push_output(br#"{"type":"response.output_item.done","item":{"id":"b"}}"#);
        let kept = capture.finish(b"{}").unwrap();
        assert_eq!(
            kept,
            Kept {
                input: "[1]".into(),
                output: r#"[{"id":"a"},{"id":"b"}]"#.into()
            }
        );
    }

    #[test]
    fn the_terminal_event_counts_where_no_item_was_seen() {
        let capture = Capture::new(&body(r#""hi""#), Some("r"), None);
        assert_eq!(capture.parent(), Some("r"));
        let kept = capture
            .finish(br#"{"type":"response.completed","response":{"output":[{"id":"a"}]}}"#)
            .unwrap();
        assert_eq!(kept.output, r#"[{"id":"a"}]"#);
    }

    #[test]
    fn what_is_too_large_is_not_kept() {
        let large = format!("[{}]", "1,".repeat(TURN_BYTES / 2) + "1");
        assert!(
            Capture::new(&body(&large), None, None)
                .finish(b"{}")
                .is_none()
        );
        let mut capture = Capture::new(&body("[]"), None, None);
        for _ in 0..3 {
            let item = format!(r#"{{"item":"{}"}}"#, "x".repeat(TURN_BYTES / 2));
            capture.push_output(item.as_bytes());
        }
        assert!(capture.finish(b"{}").is_none());
    }

    #[test]
    fn a_long_chain_is_kept_anew() {
        let turns = (0..CHECKPOINT)
            .map(|turn| Kept {
                input: format!("[{{\"n\":{turn}}}]"),
                output: "[]".into(),
            })
            .collect();
        let chain = Chain {
            account: None,
            turns,
        };
        let capture = Capture::new(&body("[{}]"), Some("r"), Some(&chain));
        assert_eq!(capture.parent(), None, "it is a root");
        let kept = capture.finish(b"{}").unwrap();
        assert!(kept.input.starts_with(r#"[{"n":0},{"n":1}"#) && kept.input.ends_with(",{}]"));
    }

    #[test]
    fn what_was_not_packed_does_not_open() {
        let kept = Kept {
            input: "[1]".into(),
            output: "[2]".into(),
        };
        let packed = kept.pack();
        assert_eq!(Kept::unpack(&packed, 6), Some(kept));
        assert_eq!(Kept::unpack(&packed, 5), None, "a bomb is not unpacked");
        assert_eq!(Kept::unpack(&[], 6), None);
        assert_eq!(Kept::unpack(&[9, 1, 2], 6), None);
    }

    proptest! {
        #[test]
        fn packing_loses_nothing(input in ".*", output in ".*") {
            let kept = Kept { input, output };
            prop_assert_eq!(Kept::unpack(&kept.pack(), 1 << 20), Some(kept));
        }
    }
}
