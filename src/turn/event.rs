//! One event of a response, in the bytes in which it came.

use std::{borrow::Cow, fmt};

use bytes::Bytes;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::protocol::{
    event::{self, Kind},
    sse,
};

/// An event. What need not change travels on in the bytes in which it came.
#[derive(Clone)]
pub struct Event {
    kind: Kind,
    form: Form,
}

#[derive(Clone)]
enum Form {
    /// A block of an event stream.
    Sse(sse::Event),
    /// A WebSocket text frame, or JSON of our own.
    Json(Bytes),
}

/// What the model said does not print.
impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} bytes", self.kind, self.len())
    }
}

impl Event {
    /// An event that came over HTTP.
    #[must_use]
    pub fn from_sse(event: sse::Event) -> Self {
        Self {
            kind: event::kind(&event.data()),
            form: Form::Sse(event),
        }
    }

    /// An event that came in a frame, or one of our own.
    #[must_use]
    pub fn from_json(json: impl Into<Bytes>) -> Self {
        let json = json.into();
        Self {
            kind: event::kind(&json),
            form: Form::Json(json),
        }
    }

    /// What it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its JSON.
    #[must_use]
    pub fn data(&self) -> Cow<'_, [u8]> {
        match &self.form {
            Form::Sse(event) => event.data(),
            Form::Json(json) => Cow::Borrowed(json),
        }
    }

    /// Its bytes in memory.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.form {
            Form::Sse(event) => event.raw.len(),
            Form::Json(json) => json.len(),
        }
    }

    /// Whether it carries nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As a block of an event stream.
    #[must_use]
    pub fn into_sse(self) -> Bytes {
        match self.form {
            Form::Sse(event) => event.raw,
            Form::Json(json) => sse::encode(&event::event_type(&json).unwrap_or_default(), &json),
        }
    }

    /// Its JSON, owned.
    #[must_use]
    pub fn into_data(self) -> Bytes {
        match self.form {
            Form::Sse(event) => event.data_bytes(),
            Form::Json(json) => json,
        }
    }

    /// As a text frame; `None` if it is not UTF-8.
    #[must_use]
    pub fn into_text(self) -> Option<Utf8Bytes> {
        Utf8Bytes::try_from(self.into_data()).ok()
    }
}
