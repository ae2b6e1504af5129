//! Encodes a turn for an HTTP client: an event stream, or one collected object.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use tokio::time::{Instant, Sleep, sleep};

use super::Dialect;
use crate::{
    error::{ApiError, Code},
    protocol::{
        contract::{CollectError, Collector, Contract, Relay, failed_event},
        event::{self, Created, Kind},
        failure::{Class, Failure},
        sse,
    },
    telemetry::InFlight,
    turn::{End, Event, Item, Stop, relay::Receiver},
};

/// Between two signs of life while the model thinks.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Small events that are ready together go out in one write of about this size.
const WRITE: usize = 16 << 10;

/// The connection is cut, so that no client takes the stream for complete.
#[derive(Debug, thiserror::Error)]
#[error("the turn ended without an end")]
pub(super) struct Cut;

/// A turn as an event stream.
pub(super) struct EventStream {
    items: Receiver<Item>,
    form: Form,
    /// Bytes that are due before the next item.
    due: VecDeque<Bytes>,
    timer: Pin<Box<Sleep>>,
    last: Instant,
    /// Epoch seconds.
    created_at: i64,
    ended: bool,
    /// Whether whoever fills the queue was given the time to fill it.
    gathered: bool,
    /// Without an end: to be cut once everything due is out.
    cut: bool,
    _counted: InFlight,
}

/// How events are written.
enum Form {
    /// As the Codex backend sends them. What a failure in mid-stream needs is remembered.
    Raw {
        response_id: Option<String>,
        sequence: i64,
    },
    /// As the OpenAI SDKs rely on.
    Contract(Box<Contract>),
}

impl EventStream {
    /// Streams `items`, of which `first` was taken already.
    pub(super) fn new(
        dialect: Dialect,
        first: Option<Event>,
        items: Receiver<Item>,
        request_id: &str,
        now: i64,
    ) -> Self {
        let form = match dialect {
            Dialect::Codex => Form::Raw {
                response_id: None,
                sequence: -1,
            },
            Dialect::OpenAi => {
                Form::Contract(Box::new(Contract::new(format!("resp_{request_id}"), now)))
            }
        };
        let mut stream = Self {
            items,
            form,
            due: VecDeque::new(),
            timer: Box::pin(sleep(KEEPALIVE)),
            last: Instant::now(),
            created_at: now,
            ended: false,
            gathered: false,
            cut: false,
            _counted: InFlight::start("sse"),
        };
        if let Some(event) = first {
            stream.write(event);
        }
        stream
    }

    /// A stream whose first event was its end.
    pub(super) fn ended(mut self) -> Self {
        self.ended = true;
        self
    }

    fn write(&mut self, event: Event) {
        match &mut self.form {
            Form::Raw {
                response_id,
                sequence,
            } => {
                if event.kind() == Kind::Created {
                    *response_id =
                        Created::parse(&event.data()).and_then(|created| created.response_id);
                }
                *sequence = event::sequence_number(&event.data()).unwrap_or(*sequence);
                self.due.push_back(event.into_sse());
            }
            Form::Contract(contract) => {
                let verdict = contract.push(event.kind(), &event.data());
                self.due
                    .extend(verdict.before.iter().map(|made| made.frame()));
                match verdict.event {
                    Relay::Pass => self.due.push_back(event.into_sse()),
                    Relay::Replace(made) => self.due.push_back(made.frame()),
                    Relay::Drop => {}
                }
            }
        }
    }

    /// Ends the stream with a well-formed failure.
    fn fail(&mut self, stop: Stop) {
        let (error, event) = explain(stop);
        if let Some(event) = event {
            return self.write(event);
        }
        match &mut self.form {
            Form::Raw {
                response_id,
                sequence,
            } => {
                let id = response_id.as_deref().unwrap_or("resp_unknown");
                let json = failed_event(id, None, *sequence + 1, self.created_at, &error.object());
                self.due.push_back(sse::encode("response.failed", &json));
            }
            Form::Contract(contract) => {
                let made = contract.fail(&error.object());
                self.due.extend(made.iter().map(|made| made.frame()));
            }
        }
    }

    fn keepalive(&self) -> Bytes {
        match self.form {
            Form::Raw { .. } => sse::KEEPALIVE_DATA,
            Form::Contract(_) => sse::KEEPALIVE_COMMENT,
        }
    }

    /// What is due, small blocks joined.
    fn flush(&mut self) -> Option<Bytes> {
        let first = self.due.pop_front()?;
        if self.due.is_empty() || first.len() >= WRITE {
            return Some(first);
        }
        let mut joined = BytesMut::with_capacity(WRITE);
        joined.extend_from_slice(&first);
        while let Some(next) = self.due.front() {
            if joined.len() + next.len() > WRITE {
                break;
            }
            joined.extend_from_slice(next);
            self.due.pop_front();
        }
        Some(joined.freeze())
    }
}

impl Stream for EventStream {
    type Item = Result<Bytes, Cut>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            // Everything that is ready, up to one write.
            let mut size = self.due.iter().map(Bytes::len).sum::<usize>();
            while !self.ended && size < WRITE {
                match self.items.poll_recv(context) {
                    Poll::Pending => break,
                    Poll::Ready(Some(Item::Event(event))) => {
                        size += event.len();
                        self.write(event);
                    }
                    Poll::Ready(Some(Item::Begun(_) | Item::Head(_))) => {}
                    Poll::Ready(Some(Item::End(end))) => {
                        self.ended = true;
                        if let End::Failed(stop) = end {
                            self.fail(*stop);
                        }
                    }
                    Poll::Ready(None) => {
                        self.ended = true;
                        self.cut = true;
                    }
                }
            }
            // What comes in together comes one by one: let it catch up before the write, which costs more than the detour.
            if size > 0
                && size < WRITE
                && !self.ended
                && !std::mem::replace(&mut self.gathered, true)
            {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(bytes) = self.flush() {
                self.gathered = false;
                self.last = Instant::now();
                return Poll::Ready(Some(Ok(bytes)));
            }
            if std::mem::take(&mut self.cut) {
                return Poll::Ready(Some(Err(Cut)));
            }
            if self.ended {
                return Poll::Ready(None);
            }
            // The timer is moved only when it fires: events merely note the time.
            ready!(self.timer.as_mut().poll(context));
            let due = self.last + KEEPALIVE;
            if Instant::now() >= due {
                let keepalive = self.keepalive();
                self.due.push_back(keepalive);
                self.timer.as_mut().reset(Instant::now() + KEEPALIVE);
            } else {
                self.timer.as_mut().reset(due);
            }
        }
    }
}

/// The error of a stop, and upstream's own `response.failed` where the client reads more out of that. A limit or an account's trouble is
/// told in our words: they are the pool's.
pub(super) fn explain(stop: Stop) -> (ApiError, Option<Event>) {
    match stop {
        Stop::Upstream(failure, event) => {
            let upstreams = matches!(
                failure.class,
                Class::Request | Class::Transient | Class::Overloaded | Class::ModelUnsupported
            );
            let event = event.filter(|event| upstreams && event.kind() == Kind::Failed);
            (failure.into(), event)
        }
        stop => (stop.into(), None),
    }
}

/// Collects a turn into the one object of a request that does not stream.
pub(super) async fn collect(
    first: Option<Event>,
    items: &mut Receiver<Item>,
    now: i64,
) -> Result<Bytes, ApiError> {
    let mut collector = Collector::new();
    if let Some(event) = first {
        collector.push(event.kind(), &event.data());
    }
    loop {
        match items.recv().await {
            Some(Item::Event(event)) => collector.push(event.kind(), &event.data()),
            Some(Item::Begun(_) | Item::Head(_)) => {}
            Some(Item::End(End::Complete)) | None => break,
            Some(Item::End(End::Failed(stop))) => return Err((*stop).into()),
        }
    }
    collector.finish().map_err(|error| match error {
        CollectError::Failed(error) => Failure::from_event(&error, now).into(),
        CollectError::Truncated => Failure::truncated(now).into(),
        CollectError::InvalidJson => ApiError::new(
            Code::UpstreamError,
            "Upstream sent an event that is not JSON.",
        ),
    })
}
