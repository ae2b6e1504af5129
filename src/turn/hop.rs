//! Turns that go to the owner of their lease, and turns that come from a peer: what travels, at both ends.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::Stream;
use http::{HeaderMap, HeaderName, HeaderValue};
use moka::sync::Cache;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::{
    Ask, Budget, Caller, End, Engine, Event, Held, Inner, Item, Reject, Running, Stop, Transport,
    relay::{self, Lost, Receiver, Sender},
    route,
};
use crate::{
    forward::{Answer, Call, Client, Envelope, Failure as Unanswered, Frame, Owner, Refusal},
    ids::{BootId, LeaseId},
    lease,
    protocol::{
        failure::Failure,
        request::{Facts, Invalid, Request},
    },
};

/// How long a peer that gave no answer is spared.
const SPARED: Duration = Duration::from_secs(5);

/// The way to other replicas. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    client: Client,
    /// Those that lately gave no answer.
    silent: Cache<BootId, ()>,
}

impl Peers {
    /// Over a client of the room `forward`.
    #[must_use]
    pub fn new(client: Client) -> Self {
        let silent = Cache::builder().time_to_live(SPARED).build();
        Self { client, silent }
    }

    /// Whether turns that may run elsewhere should: what such a peer is sent it may well serve, for nobody to hear.
    pub(super) fn is_spared(&self, owner: &lease::Owner) -> bool {
        matches!(owner, lease::Owner::Other { boot, .. } if self.silent.contains_key(boot))
    }
}

/// Routes whose turns travel.
const ROUTES: [&str; 4] = [
    "codex/responses",
    "codex/responses/compact",
    "v1/responses",
    "v1/responses/compact",
];

/// What goes with a body, beside what the envelope says itself.
#[derive(Serialize, Deserialize)]
struct Details {
    route: String,
    websocket: bool,
    facts: Facts,
    headers: Vec<(String, String)>,
    turn_state: Option<String>,
}

/// The end of a turn, as it travels.
#[derive(Serialize, Deserialize)]
enum Ended {
    Complete,
    Upstream(Box<Failure>, Option<String>),
    Exhausted {
        resets_at: Option<i64>,
    },
    Nobody {
        why: String,
    },
    Busy,
    PreviousResponseNotFound,
    Rejected(Reject, Option<Duration>),
    Invalid {
        message: String,
        param: Option<String>,
    },
    Unavailable,
    SlowConsumer,
    Cancelled,
}

impl From<End> for Ended {
    fn from(end: End) -> Self {
        let stop = match end {
            End::Complete => return Self::Complete,
            End::Failed(stop) => stop,
        };
        match *stop {
            Stop::Upstream(failure, event) => {
                let json = event.map(|event| String::from_utf8_lossy(&event.data()).into_owned());
                Self::Upstream(Box::new(failure), json)
            }
            Stop::Exhausted { resets_at } => Self::Exhausted { resets_at },
            Stop::Nobody { why } => Self::Nobody { why },
            Stop::Busy => Self::Busy,
            Stop::PreviousResponseNotFound => Self::PreviousResponseNotFound,
            Stop::Rejected(reject, wait) => Self::Rejected(reject, wait),
            Stop::Invalid(invalid) => Self::Invalid {
                message: invalid.message,
                param: invalid.param,
            },
            Stop::Unavailable => Self::Unavailable,
            Stop::SlowConsumer => Self::SlowConsumer,
            Stop::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Ended> for End {
    fn from(ended: Ended) -> Self {
        let stop = match ended {
            Ended::Complete => return Self::Complete,
            Ended::Upstream(failure, json) => Stop::Upstream(*failure, json.map(Event::from_json)),
            Ended::Exhausted { resets_at } => Stop::Exhausted { resets_at },
            Ended::Nobody { why } => Stop::Nobody { why },
            Ended::Busy => Stop::Busy,
            Ended::PreviousResponseNotFound => Stop::PreviousResponseNotFound,
            Ended::Rejected(reject, wait) => Stop::Rejected(reject, wait),
            Ended::Invalid { message, param } => Stop::Invalid(Box::new(Invalid {
                code: "invalid_request_error",
                message,
                param,
            })),
            Ended::Unavailable => Stop::Unavailable,
            Ended::SlowConsumer => Stop::SlowConsumer,
            Ended::Cancelled => Stop::Cancelled,
        };
        Self::Failed(Box::new(stop))
    }
}

/// What became of a turn that was sent to the owner of its lease.
pub(super) enum Sent {
    /// It was served, to whatever end.
    Served,
    /// The lease has another owner.
    NotOwner,
    /// The owner has no room.
    Busy,
    /// It was begun before.
    Begun,
    /// The owner gave no answer, or is leaving.
    Silent,
}

/// Sends a turn to the owner in `row` and relays its answer.
pub(super) async fn forward(
    engine: &Inner,
    ask: &mut Ask,
    out: &Sender<Item>,
    row: &lease::Row,
) -> Sent {
    let lease::Owner::Other {
        boot,
        endpoint: Some(endpoint),
        ..
    } = &row.owner
    else {
        return Sent::NotOwner;
    };
    let Some(Peers { client, silent }) = &engine.peers else {
        return Sent::Silent;
    };
    let envelope = Envelope {
        origin: engine.replica.boot(),
        target: *boot,
        lease: row.lease,
        generation: row.generation,
        scope: ask.caller.scope(),
        api_key: ask.caller.api_key(),
        turn: ask.id,
        details: details(ask),
    };
    let body = ask.request.body.clone();
    match client.send(endpoint, &envelope, body).await {
        Ok(answer) => {
            // The owner has it now.
            ask.request.body = Bytes::new();
            ask.held = Held::default();
            relay(engine, answer, out).await;
            Sent::Served
        }
        Err(Unanswered::Silent) => {
            silent.insert(*boot, ());
            Sent::Silent
        }
        Err(Unanswered::Refused(Refusal::Draining)) => Sent::Silent,
        // So answers also who started anew at the same address.
        Err(Unanswered::Refused(Refusal::NotOwner | Refusal::Invalid)) => Sent::NotOwner,
        Err(Unanswered::Refused(Refusal::Full)) => Sent::Busy,
        Err(Unanswered::Refused(Refusal::Begun)) => Sent::Begun,
    }
}

/// Relays what the owner answers; when our client leaves, so do we.
async fn relay(engine: &Inner, mut answer: Answer, out: &Sender<Item>) {
    let mut heard = false;
    loop {
        let frame = tokio::select! {
            biased;
            frame = answer.next() => frame,
            () = out.abandoned(Duration::ZERO) => return,
            () = engine.cancel.cancelled() => {
                return out.last(Item::End(End::Failed(Box::new(Stop::Cancelled))));
            }
        };
        let item = match frame {
            Ok(Frame::Token(token)) => Item::Begun(serde_json::from_str(&token).ok().flatten()),
            Ok(Frame::Head(headers)) => Item::Head(headers),
            Ok(Frame::Json(json)) => Item::Event(Event::from_json(json)),
            Ok(Frame::End(end)) => {
                let end = serde_json::from_slice::<Ended>(&end);
                let end = end.map_or_else(|_| cut(engine, heard), End::from);
                return out.last(Item::End(end));
            }
            Err(_) => return out.last(Item::End(cut(engine, heard))),
        };
        heard |= !matches!(item, Item::Begun(_));
        match out.send(item).await {
            Ok(()) => {}
            Err(Lost::Gone) => return,
            Err(Lost::Slow) => {
                return out.last(Item::End(End::Failed(Box::new(Stop::SlowConsumer))));
            }
        }
    }
}

/// The owner was lost in mid-turn. What it has begun it books, or whoever buries it. A client that has heard nothing decides whether to
/// ask again.
fn cut(engine: &Inner, heard: bool) -> End {
    let now = engine.upstream.clock().now().as_second();
    End::Failed(Box::new(if heard {
        Stop::Upstream(Failure::truncated(now), None)
    } else {
        Stop::Rejected(Reject::OwnerUnreachable, Some(Duration::from_secs(1)))
    }))
}

fn details(ask: &Ask) -> Box<RawValue> {
    let text = |value: &HeaderValue| value.to_str().ok().map(str::to_owned);
    let headers = ask.headers.iter();
    let turn_state = ask.turn_state.as_deref().map(String::from_utf8_lossy);
    let details = Details {
        route: ask.route.to_owned(),
        websocket: ask.transport == Transport::WebSocket,
        facts: ask.request.facts.clone(),
        headers: headers
            .filter(|(name, _)| !is_secret(name))
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), text(value)?)))
            .collect(),
        turn_state: turn_state.map(|text| text.into_owned()),
    };
    to_raw_value(&details).expect("text and numbers are JSON")
}

/// The owner looks the key up by its id; nobody needs the credential.
fn is_secret(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "authorization" | "x-drawbridge-key" | "cookie" | "proxy-authorization"
    )
}

/// Serves the turns that peers send.
pub struct Receiving {
    /// Runs them.
    pub engine: Engine,
    /// Bytes of bodies held at once, those of clients included.
    pub bytes: Budget,
}

impl Owner for Receiving {
    type Frames = Framed;
    type Room = Held;

    fn room(&self, bytes: usize) -> Option<Held> {
        self.bytes.take(bytes)
    }

    async fn accept(&self, call: Call, held: Held) -> Result<Framed, Refusal> {
        let engine = &self.engine.0;
        let (ask, lease) = ask(engine, call, held)?;
        let (sender, mut items) = relay::channel();
        route::forwarded(engine, Box::new(ask), sender, Running::start(engine), lease);
        // What comes first says whether it has begun; a turn that ends before is told as any other.
        let first = items.recv().await.ok_or(Refusal::Draining)?;
        if let Item::End(End::Failed(stop)) = &first
            && let Some(refusal) = unbegun(stop)
        {
            return Err(refusal);
        }
        Ok(Framed {
            first: Some(first),
            items,
        })
    }
}

/// What a turn that ended before it began leaves its caller to do. What is wrong here alone, the way to Postgres say, is silence to it.
fn unbegun(stop: &Stop) -> Option<Refusal> {
    Some(match stop {
        Stop::Unavailable => Refusal::Draining,
        Stop::Rejected(reject, wait) => match (reject, wait) {
            (Reject::WrongInstance, _) => Refusal::NotOwner,
            (Reject::Draining | Reject::MetadataUnavailable, _) => Refusal::Draining,
            (Reject::Overloaded, _) => Refusal::Full,
            (Reject::OwnerUnreachable, None) => Refusal::Begun,
            // Nobody knows who owns it: it moves at this moment.
            (Reject::OwnerUnreachable, Some(_)) => Refusal::Draining,
            _ => return None,
        },
        _ => return None,
    })
}

fn ask(engine: &Arc<Inner>, call: Call, held: Held) -> Result<(Ask, LeaseId), Refusal> {
    let Call { envelope, body } = call;
    let details = envelope.details.get();
    let details: Details = serde_json::from_str(details).map_err(|_| Refusal::Invalid)?;
    let caller = match envelope.api_key {
        None => Caller::anonymous(),
        Some(id) => Caller::of(&engine.keys.by_id(id).map_err(|_| Refusal::Invalid)?),
    };
    if caller.scope() != envelope.scope {
        return Err(Refusal::Invalid);
    }
    let route = ROUTES.into_iter().find(|route| *route == details.route);
    let headers = details.headers.into_iter();
    let headers: HeaderMap = headers
        .filter_map(|(name, value)| {
            let name = HeaderName::try_from(name).ok()?;
            Some((name, HeaderValue::try_from(value).ok()?))
        })
        .collect();
    let ask = Ask {
        id: envelope.turn,
        caller,
        route: route.ok_or(Refusal::Invalid)?,
        transport: if details.websocket {
            Transport::WebSocket
        } else {
            Transport::Http
        },
        request: Request {
            body,
            facts: details.facts,
        },
        headers,
        turn_state: details.turn_state.map(Bytes::from),
        line: None,
        forwarded: None,
        sent: false,
        held,
        arrived: Instant::now(),
    };
    Ok((ask, envelope.lease))
}

/// What a turn yields, as frames.
pub struct Framed {
    first: Option<Item>,
    items: Receiver<Item>,
}

impl Stream for Framed {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        let item = match self.first.take() {
            Some(first) => Some(first),
            None => std::task::ready!(self.items.poll_recv(context)),
        };
        Poll::Ready(item.map(|item| match item {
            Item::Begun(token) => Frame::Token(text(&token)),
            Item::Head(headers) => Frame::Head(headers),
            Item::Event(event) => Frame::Json(event.into_data()),
            Item::End(end) => Frame::End(text(&Ended::from(end)).into()),
        }))
    }
}

fn text(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("text and numbers are JSON")
}
