//! The one object of a `/v1/responses` request that does not stream.

use bytes::Bytes;
use serde_json::value::RawValue;

use super::output::{self, Items};
use crate::protocol::event::{ErrorBody, Kind};

/// Why there is no response object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectError {
    /// Upstream failed the response.
    #[error("upstream failed the response")]
    Failed(Box<ErrorBody>),
    /// Upstream sent what is no JSON.
    #[error("upstream sent an event that is not JSON")]
    InvalidJson,
    /// The stream ended without a terminal event.
    #[error("upstream ended the stream without completing the response")]
    Truncated,
}

/// Collects a stream: push every event, then take the result. Only done items and the terminal event are kept.
#[derive(Debug, Default)]
pub struct Collector {
    items: Items,
    result: Option<Result<Bytes, CollectError>>,
}

impl Collector {
    /// A collector for one response.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next event of upstream; those after the first terminal one are ignored.
    pub fn push(&mut self, kind: Kind, data: &[u8]) {
        if self.result.is_some() {
            return;
        }
        match kind {
            Kind::OutputItemDone => self.items.add(data),
            Kind::Completed | Kind::Incomplete => self.result = Some(self.object(data)),
            Kind::Failed | Kind::Error => {
                let error = ErrorBody::parse(data).unwrap_or_default();
                self.result = Some(Err(CollectError::Failed(Box::new(error))));
            }
            Kind::Unknown if !is_json(data) => self.result = Some(Err(CollectError::InvalidJson)),
            _ => {}
        }
    }

    /// The terminal `response` object, its output complete and its null fields left out.
    pub fn finish(self) -> Result<Bytes, CollectError> {
        self.result.unwrap_or(Err(CollectError::Truncated))
    }

    fn object(&self, data: &[u8]) -> Result<Bytes, CollectError> {
        let (_, mut response) = output::response(data).ok_or(CollectError::InvalidJson)?;
        if response.get("status").map(RawValue::get) == Some("\"failed\"") {
            let error = ErrorBody::parse(data).unwrap_or_default();
            return Err(CollectError::Failed(Box::new(error)));
        }
        let output = self.items.backfill(&response);
        if let Some(output) = &output {
            response.set("output", output);
        }
        response.drop_nulls();
        serde_json::to_vec(&response)
            .map(Bytes::from)
            .map_err(|_| CollectError::InvalidJson)
    }
}

fn is_json(data: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok()
}
