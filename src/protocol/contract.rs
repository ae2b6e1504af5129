//! What SDK clients of `/v1` rely on, kept over a Codex upstream.
//!
//! A stream begins with `response.created`, carries no `codex.*`, ends with one terminal event whose `output` is complete,
//! and fails as `response.failed` with an integer `sequence_number`. [`Contract`] watches a stream and says per event what to
//! send; [`Collector`] makes the one object of a request that does not stream; [`failed_event`] and [`error_frame`] write
//! failures for any client. It knows no transport: what it makes is JSON, framed by the caller.
//!
//! Invariant: an event that needs nothing is passed as it came, unparsed where it is no life-cycle event.

mod collect;
mod failed;
mod output;

use bytes::Bytes;
use serde_json::value::{RawValue, to_raw_value};

use super::event::{Created, ErrorBody, Kind, sequence_number};
use super::sse;
pub use collect::{CollectError, Collector};
pub use failed::{ErrorObject, created_event, error_frame, failed_event};
use output::{Fields, Items};

/// An event of our own making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synthetic {
    /// Its type, for the `event:` line.
    pub event_type: &'static str,
    /// The event, one line of JSON.
    pub json: Bytes,
}

impl Synthetic {
    /// The event as an SSE frame.
    pub fn frame(&self) -> Bytes {
        sse::encode(self.event_type, &self.json)
    }
}

/// What becomes of the event that was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relay {
    /// Send it as it came.
    Pass,
    /// Do not send it.
    Drop,
    /// Send this in its place.
    Replace(Synthetic),
}

/// What to send for one event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What goes out first; mostly empty, which allocates nothing.
    pub before: Vec<Synthetic>,
    /// What becomes of the event itself.
    pub event: Relay,
}

impl From<Relay> for Verdict {
    fn from(event: Relay) -> Self {
        Self {
            before: Vec::new(),
            event,
        }
    }
}

/// Early text that could not be placed yet; more than this is given up and comes with the terminal event.
const HELD_EVENTS: usize = 64;

/// The contract of one streamed response.
#[derive(Debug)]
pub struct Contract {
    response_id: String,
    model: Option<String>,
    created_at: i64,
    created: bool,
    ended: bool,
    done: bool,
    /// A text delta has gone out.
    text: bool,
    first_sequence: Option<i64>,
    last_sequence: Option<i64>,
    items: Items,
    /// Text deltas that came before the response had a name.
    held: Vec<Bytes>,
}

impl Contract {
    /// `response_id` and `created_at` (epoch seconds) name the response where upstream never does.
    pub fn new(response_id: impl Into<String>, created_at: i64) -> Self {
        Self {
            response_id: response_id.into(),
            model: None,
            created_at,
            created: false,
            ended: false,
            done: false,
            text: false,
            first_sequence: None,
            last_sequence: None,
            items: Items::default(),
            held: Vec::new(),
        }
    }

    /// Whether the terminal event has gone out.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Takes the next event of upstream: its kind and its data.
    pub fn push(&mut self, kind: Kind, data: &[u8]) -> Verdict {
        match kind {
            // The end marker follows the terminal event, once; nothing else does.
            Kind::Done if self.ended && !std::mem::replace(&mut self.done, true) => {
                return Relay::Pass.into();
            }
            _ if self.ended => return Relay::Drop.into(),
            // Codex's own language. `response.metadata` reached the client as headers.
            Kind::Codex | Kind::RateLimits | Kind::Metadata | Kind::Done => {
                return Relay::Drop.into();
            }
            _ => {}
        }
        if let Some(sequence) = sequence_number(data) {
            self.first_sequence.get_or_insert(sequence);
            self.last_sequence = self.last_sequence.max(Some(sequence));
        }
        if kind == Kind::OutputItemDone {
            self.items.add(data);
        }
        match kind {
            Kind::Created if self.created => Relay::Drop.into(),
            Kind::Created => {
                self.name(data);
                self.created = true;
                Relay::Pass.into()
            }
            Kind::Error => {
                let error = ErrorBody::parse(data).unwrap_or_default();
                let mut before = self.fail(&ErrorObject::from(&error));
                before.pop().map_or(Relay::Drop.into(), |failed| Verdict {
                    before,
                    event: Relay::Replace(failed),
                })
            }
            Kind::Failed => {
                let before = self.introduce(data);
                self.ended = true;
                Verdict {
                    before,
                    event: Relay::Pass,
                }
            }
            Kind::Completed | Kind::Incomplete => self.complete(kind, data),
            _ if self.created => {
                self.text |= kind == Kind::TextDelta;
                Relay::Pass.into()
            }
            Kind::InProgress => Verdict {
                before: self.introduce(data),
                event: Relay::Pass,
            },
            Kind::TextDelta if self.held.len() < HELD_EVENTS && !output::has_index(data) => {
                self.held.push(Bytes::copy_from_slice(data));
                Relay::Drop.into()
            }
            // Nothing that refers to an output can be understood before the response.
            _ => Relay::Drop.into(),
        }
    }

    /// Ends the stream with a failure of ours: what to send, `response.failed` last. Empty where the stream has ended.
    pub fn fail(&mut self, error: &ErrorObject<'_>) -> Vec<Synthetic> {
        if self.ended {
            return Vec::new();
        }
        let mut events = self.announce();
        self.ended = true;
        let json = failed_event(
            &self.response_id,
            self.model.as_deref(),
            self.next_sequence(),
            self.created_at,
            error,
        );
        events.push(Synthetic {
            event_type: "response.failed",
            json,
        });
        events
    }

    fn next_sequence(&self) -> i64 {
        self.last_sequence.map_or(0, |last| last.saturating_add(1))
    }

    /// Learns the response's name from an event that carries it.
    fn name(&mut self, data: &[u8]) {
        let created = Created::parse(data).unwrap_or_default();
        if let Some(id) = created.response_id {
            self.response_id = id;
        }
        self.model = created.model.or_else(|| self.model.take());
    }

    /// The `response.created` that is missing before an event with a `response`, and the text that waited for it.
    fn introduce(&mut self, data: &[u8]) -> Vec<Synthetic> {
        if self.created {
            return Vec::new();
        }
        self.name(data);
        self.announce()
    }

    fn announce(&mut self) -> Vec<Synthetic> {
        if std::mem::replace(&mut self.created, true) {
            return Vec::new();
        }
        // One before the first that was seen: below zero if need be, but never taken.
        let sequence = self
            .first_sequence
            .map_or(0, |first| first.saturating_sub(1));
        self.last_sequence = self.last_sequence.max(Some(sequence));
        let json = created_event(
            &self.response_id,
            self.model.as_deref(),
            sequence,
            self.created_at,
        );
        self.text |= !self.held.is_empty();
        let held = self.held.drain(..).map(|json| Synthetic {
            event_type: "response.output_text.delta",
            json,
        });
        std::iter::once(Synthetic {
            event_type: "response.created",
            json,
        })
        .chain(held)
        .collect()
    }

    /// The terminal event: outputs that it left out are put back, text that never streamed comes before it.
    fn complete(&mut self, kind: Kind, data: &[u8]) -> Verdict {
        let mut before = self.introduce(data);
        self.ended = true;
        if self.text && self.items.is_empty() {
            return Verdict {
                before,
                event: Relay::Pass,
            };
        }
        let Some((event, response)) = output::response(data) else {
            return Verdict {
                before,
                event: Relay::Pass,
            };
        };
        let output = self.items.backfill(&response);
        let late = if self.text {
            None
        } else {
            output::text(output.as_deref().or_else(|| response.get("output")))
        };
        if output.is_none() && late.is_none() {
            return Verdict {
                before,
                event: Relay::Pass,
            };
        }
        let sequence = sequence_number(data).unwrap_or_else(|| self.next_sequence());
        if let Some(late) = &late {
            before.push(Synthetic {
                event_type: "response.output_text.delta",
                json: late.delta(sequence),
            });
        }
        let event_type = if kind == Kind::Completed {
            "response.completed"
        } else {
            "response.incomplete"
        };
        match rewrite(
            event,
            response,
            output.as_deref(),
            sequence + i64::from(late.is_some()),
        ) {
            Some(json) => Verdict {
                before,
                event: Relay::Replace(Synthetic { event_type, json }),
            },
            None => Verdict {
                before,
                event: Relay::Pass,
            },
        }
    }
}

/// A terminal event with its output and its number replaced, everything else as it came.
fn rewrite<'a>(
    event: Fields<'a>,
    mut response: Fields<'a>,
    output: Option<&'a RawValue>,
    sequence: i64,
) -> Option<Bytes> {
    if let Some(output) = output {
        response.set("output", output);
    }
    let response = to_raw_value(&response).ok()?;
    let sequence = to_raw_value(&sequence).ok()?;
    let mut event: Fields<'_> = event;
    event.set("response", &response);
    event.set("sequence_number", &sequence);
    serde_json::to_vec(&event).ok().map(Bytes::from)
}

#[cfg(test)]
mod tests;
