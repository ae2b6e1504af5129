//! The client-facing edge: who is calling, what is asked, and in which form the answer goes out. Everything between belongs to `turn`.
//!
//! Two families of routes: `/backend-api/codex` speaks as the Codex backend does, `/v1` as the OpenAI API does. No account id ever
//! crosses this room towards a client, but through the fleet API.

mod body;
mod documents;
mod encode;
mod fleet;
mod gate;
mod responses;
mod websocket;

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http::{HeaderValue, Method, Uri};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::gate::Gate;
use crate::{
    account::Accounts,
    api_key::ApiKeys,
    db::Clock,
    error::{ApiError, Code},
    ledger::Ledger,
    protocol::trace,
    task::Tasks,
    telemetry::{self, InFlight},
    turn::{Budget, Engine},
    upstream::Upstream,
};

/// What the handlers need.
pub struct State {
    /// Runs turns.
    pub engine: Engine,
    /// The pool's view, and small documents from upstream.
    pub upstream: Upstream,
    /// Client keys.
    pub keys: ApiKeys,
    /// For the fleet API.
    pub accounts: Accounts,
    /// What keys have used.
    pub ledger: Ledger,
    /// The database's clock.
    pub clock: Clock,
    /// What models are called here beside their own names.
    pub aliases: BTreeMap<String, String>,
    /// Who may come in.
    pub gate: Gate,
    /// Bytes of bodies held at once.
    pub bytes: Budget,
    /// Counts the sockets.
    pub tasks: Tasks,
    /// Set when sockets should move elsewhere.
    pub closing: CancellationToken,
}

/// The raw socket address of the caller; forwarded headers never count.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// A connection's place among those served at once; held as long as anything of it lives.
#[derive(Clone, Debug)]
pub struct Place(#[expect(dead_code, reason = "held for its Drop")] Arc<OwnedSemaphorePermit>);

impl Place {
    /// Takes a permit over.
    #[must_use]
    pub fn new(permit: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(permit))
    }
}

/// The two families of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// `/backend-api/codex`: events as the Codex backend sends them.
    Codex,
    /// `/v1`: the contract of the OpenAI SDKs.
    OpenAi,
}

const CODEX: &str = "/backend-api/codex";

/// Every client route.
pub fn router(state: Arc<State>, probes: Router) -> Router {
    let codex = Router::new()
        .route("/responses", post(responses::codex).get(websocket::codex))
        .route("/responses/", post(responses::codex).get(websocket::codex))
        .route("/responses/compact", post(responses::compact_codex))
        .route("/models", get(documents::models_codex));
    let openai = Router::new()
        .route("/responses", post(responses::openai).get(websocket::openai))
        .route(
            "/responses/",
            post(responses::openai).get(websocket::openai),
        )
        .route("/responses/compact", post(responses::compact_openai))
        .route("/models", get(documents::models_openai))
        .route("/usage", get(fleet::usage));
    let fleet = Router::new()
        .route("/summary", get(fleet::summary))
        .route("/refresh", post(fleet::refresh));
    let mut router = Router::new()
        .nest(CODEX, codex.clone())
        .nest("/backend-api/codex/v1", codex)
        .nest("/v1", openai)
        .nest("/api/fleet", fleet);
    for base in ["/backend-api/wham", "/api/codex"] {
        router = router
            .route(&format!("{base}/usage"), get(documents::usage))
            .route(
                &format!("{base}/accounts/check"),
                get(documents::accounts_check),
            )
            .route(
                &format!("{base}/settings/user"),
                get(documents::settings_user),
            );
    }
    with_fallbacks(router.with_state(state).merge(probes))
        .layer(middleware::from_fn(identify))
        .layer(middleware::from_fn(count))
        .layer(DefaultBodyLimit::disable())
}

/// Answers in the envelope of errors where there is nothing, or not by this method.
pub fn with_fallbacks(router: Router) -> Router {
    router
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
}

/// Counts every answer, by the template of its route.
async fn count(request: Request, next: Next) -> Response {
    let method = match *request.method() {
        Method::GET => "GET",
        Method::POST => "POST",
        _ => "other",
    };
    let route = request.extensions().get::<MatchedPath>().cloned();
    let in_flight = InFlight::start("http");
    let response = next.run(request).await;
    drop(in_flight);
    let route = route.as_ref().map_or("unmatched", MatchedPath::as_str);
    telemetry::answered(route, method, response.status().as_u16());
    response
}

/// Gives every answer an `x-request-id`: the caller's, or a new one. A trace is part of the request only if it is one.
async fn identify(mut request: Request, next: Next) -> Response {
    let own = || HeaderValue::from_str(&Uuid::now_v7().to_string()).expect("a UUID is ASCII");
    let given = request
        .headers()
        .get("x-request-id")
        .filter(|id| id.len() <= 128)
        .cloned();
    let id = given.unwrap_or_else(own);
    request.headers_mut().insert("x-request-id", id.clone());
    trace::clean(request.headers_mut());
    let mut response = next.run(request).await;
    response.headers_mut().entry("x-request-id").or_insert(id);
    response
}

/// A fast 404. A client with a wrong base URL is told the right ones.
async fn not_found(uri: Uri) -> Response {
    let path = uri.path();
    let known = [
        "/responses",
        "/models",
        "/chat/completions",
        "/responses/compact",
    ];
    let message = if known.iter().any(|tail| path.ends_with(tail)) {
        format!(
            "There is nothing at this path. Use the base URL http://HOST:PORT{CODEX} for Codex, or http://HOST:PORT/v1 for OpenAI clients."
        )
    } else {
        "There is nothing at this path.".to_owned()
    };
    ApiError::new(Code::NotFound, message).into_response()
}

async fn method_not_allowed() -> Response {
    ApiError::new(Code::MethodNotAllowed, "This path has another method.").into_response()
}
