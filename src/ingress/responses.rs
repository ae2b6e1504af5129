//! `POST /responses` and `/responses/compact`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension,
    body::{Body, Bytes},
    extract,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use tokio::time::timeout;

use super::{Dialect, Peer, State, body, encode, gate};
use crate::{
    error::{ApiError, Code},
    ids::TurnId,
    protocol::{
        compact, headers,
        request::{self, Facts, Request, Shape},
    },
    quota, task, telemetry,
    turn::{Ask, Caller, End, Event, Item, Stop, Transport, relay::Receiver},
};

/// How long the head of an answer waits for the first event, so that a refusal can still be a status.
const HEAD_PATIENCE: Duration = Duration::from_secs(20);
/// Bodies above this are parsed off the workers.
const LARGE: usize = 1 << 20;

/// Brings a client back to its conversation.
pub(super) const TURN_STATE: HeaderName = HeaderName::from_static("x-codex-turn-state");

type Shared = extract::State<Arc<State>>;

/// `POST /backend-api/codex/responses`.
pub(super) async fn codex(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, peer, headers, body, Dialect::Codex).await
}

/// `POST /v1/responses`.
pub(super) async fn openai(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    respond(&state, peer, headers, body, Dialect::OpenAi).await
}

/// `POST /backend-api/codex/responses/compact`.
pub(super) async fn compact_codex(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let answer = compacted(&state, peer, headers, body, Dialect::Codex).await;
    answer.unwrap_or_else(|error| error.into_response())
}

/// `POST /v1/responses/compact`.
pub(super) async fn compact_openai(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let answer = compacted(&state, peer, headers, body, Dialect::OpenAi).await;
    answer.unwrap_or_else(|error| error.into_response())
}

async fn respond(
    state: &State,
    peer: Peer,
    headers: HeaderMap,
    body: Body,
    dialect: Dialect,
) -> Response {
    let (route, shape) = match dialect {
        Dialect::Codex => ("codex/responses", Shape::Codex),
        Dialect::OpenAi => ("v1/responses", Shape::OpenAi),
    };
    let arrived = Instant::now();
    let asked = ask(state, peer, headers, body, route, shape, arrived).await;
    let ask = match asked {
        Ok(ask) => ask,
        Err(error) => return error.into_response(),
    };
    let caller = ask.caller.clone();
    let (id, streams) = (
        ask.id,
        dialect == Dialect::Codex || ask.request.facts.stream,
    );
    let items = state.engine.start(ask);
    let answer = if streams {
        stream(state, items, dialect, id).await
    } else {
        collected(state, items).await
    };
    let mut response = answer.unwrap_or_else(|error| error.into_response());
    // Read now: the turn itself has brought news of the limits.
    response.headers_mut().extend(limits(state, &caller));
    response
}

/// From bytes to a question: who asks, what, and whether they may.
async fn ask(
    state: &State,
    peer: Peer,
    headers: HeaderMap,
    body: Body,
    route: &'static str,
    shape: Shape,
    arrived: Instant,
) -> Result<Ask, ApiError> {
    let caller = gate::authenticate(state, peer, &headers).await?;
    let understood = async {
        let (body, held) = body::read(&headers, body, &state.bytes).await?;
        let request = parse(state, body, shape, &headers).await?;
        admit(&caller, &request.facts)?;
        Ok((request, held))
    };
    // A caller who is known reads the pool's limits in every answer.
    let (request, held) = understood
        .await
        .map_err(|error: ApiError| error.headers(limits(state, &caller)))?;
    let turn_state = headers
        .get(TURN_STATE)
        .map(|value| Bytes::copy_from_slice(value.as_bytes()));
    Ok(Ask {
        id: TurnId::new(),
        caller,
        route,
        transport: Transport::Http,
        request,
        headers: headers::detached(&headers),
        turn_state,
        line: None,
        forwarded: None,
        sent: false,
        held,
        arrived,
    })
}

/// Reads a request, for the model that an alias stands for.
pub(super) async fn parse(
    state: &State,
    body: Bytes,
    shape: Shape,
    headers: &HeaderMap,
) -> Result<Request, ApiError> {
    let mut request = if body.len() > LARGE {
        task::blocking(move || request::read(body, shape)).await?
    } else {
        request::read(body, shape)?
    };
    if let Some(model) = state.aliases.get(&request.facts.model) {
        request.redirect(model);
    }
    request.facts.client.with_headers(headers);
    Ok(request)
}

/// What the key's grants say about the request: they name a model, or what it was asked for as.
pub(super) fn admit(caller: &Caller, facts: &Facts) -> Result<(), ApiError> {
    if caller.may_use(&facts.model) || caller.may_use(facts.asked_model()) {
        return Ok(());
    }
    telemetry::limit_rejected("model");
    Err(ApiError::new(
        Code::ModelNotAllowed,
        "This API key may not use the requested model.",
    )
    .param(Some("model".into())))
}

/// The pool's limits as headers.
pub(super) fn limits(state: &State, caller: &Caller) -> Vec<(HeaderName, HeaderValue)> {
    let (seen, now) = (
        state.engine.visibility(caller),
        state.clock.now().as_second(),
    );
    quota::pool_view(&state.upstream.view(), now, seen).headers(seen)
}

/// What a turn showed first.
enum First {
    /// An event, or a completed turn without any.
    Event(Option<Event>),
    /// Nothing yet.
    Silence,
    /// It ended without anything to show.
    End(Stop),
}

/// Waits for what a turn shows first. `head` is filled as it becomes known: the token already when the turn begins.
async fn first(items: &mut Receiver<Item>, head: &mut HeaderMap) -> First {
    loop {
        match items.recv().await {
            Some(Item::Begun(token)) => {
                let value = token.and_then(|token| HeaderValue::try_from(token.text).ok());
                head.extend(value.map(|value| (TURN_STATE, value)));
            }
            Some(Item::Head(headers)) => head.extend(headers),
            Some(Item::Event(event)) => return First::Event(Some(event)),
            Some(Item::End(End::Complete)) => return First::Event(None),
            Some(Item::End(End::Failed(stop))) => return First::End(*stop),
            None => return First::End(Stop::Cancelled),
        }
    }
}

async fn stream(
    state: &State,
    mut items: Receiver<Item>,
    dialect: Dialect,
    id: TurnId,
) -> Result<Response, ApiError> {
    let mut head = HeaderMap::new();
    let first = timeout(HEAD_PATIENCE, first(&mut items, &mut head))
        .await
        .unwrap_or(First::Silence);
    let (event, ended) = match first {
        First::Event(event) => (event, false),
        First::Silence => (None, false),
        First::End(stop) => match encode::explain(stop) {
            // The Codex client reads more out of upstream's own event than out of a status.
            (_, Some(event)) if dialect == Dialect::Codex => (Some(event), true),
            (error, _) => return Err(error.headers(head.iter().map(owned))),
        },
    };
    let turn = items.watch();
    let events = encode::EventStream::new(
        dialect,
        event,
        items,
        &id.to_string(),
        state.clock.now().as_second(),
    );
    let events = if ended { events.ended() } else { events };
    let mut response = Response::new(Body::from_stream(events));
    // For whoever writes it out: while the turn runs, it decides itself about a client that does not read.
    response.extensions_mut().insert(turn);
    let headers = response.headers_mut();
    headers.extend(head);
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-transform"),
    );
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

async fn collected(state: &State, mut items: Receiver<Item>) -> Result<Response, ApiError> {
    let mut head = HeaderMap::new();
    match object(state, &mut items, &mut head).await {
        Ok(object) => Ok(json(head, object)),
        Err(error) => Err(error.headers(head.iter().map(owned))),
    }
}

fn owned((name, value): (&HeaderName, &HeaderValue)) -> (HeaderName, HeaderValue) {
    (name.clone(), value.clone())
}

/// The one object of a turn.
async fn object(
    state: &State,
    items: &mut Receiver<Item>,
    head: &mut HeaderMap,
) -> Result<Bytes, ApiError> {
    let event = match first(items, head).await {
        First::Event(event) => event,
        First::Silence => None,
        First::End(stop) => return Err(stop.into()),
    };
    encode::collect(event, items, state.clock.now().as_second()).await
}

/// Compaction: the same conversation with a trigger, of which one item comes back.
async fn compacted(
    state: &State,
    peer: Peer,
    headers: HeaderMap,
    body: Body,
    dialect: Dialect,
) -> Result<Response, ApiError> {
    let route = match dialect {
        Dialect::Codex => "codex/responses/compact",
        Dialect::OpenAi => "v1/responses/compact",
    };
    let ask = ask(
        state,
        peer,
        headers,
        body,
        route,
        Shape::Compact,
        Instant::now(),
    )
    .await?;
    let caller = ask.caller.clone();
    let answer = async {
        let mut items = state.engine.start(ask);
        let mut head = HeaderMap::new();
        let object = object(state, &mut items, &mut head).await?;
        let answer = compact::answer(&object);
        let answer = answer.ok_or_else(|| {
            ApiError::new(Code::UpstreamError, "Upstream returned no compaction item.")
        })?;
        Ok(json(head, answer))
    };
    let answer: Result<Response, ApiError> = answer.await;
    let mut response = answer.unwrap_or_else(|error| error.into_response());
    response.headers_mut().extend(limits(state, &caller));
    Ok(response)
}

fn json(head: HeaderMap, object: Bytes) -> Response {
    let mut response = Response::new(Body::from(object));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().extend(head);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}
