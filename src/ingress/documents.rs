//! Small documents: models, usage, and what a ChatGPT-login client asks before its first turn.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{self, Query},
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::{Peer, State, gate, responses};
use crate::{quota, secret, turn::Caller};

type Shared = extract::State<Arc<State>>;
type Parameters = Query<BTreeMap<String, String>>;

/// `GET /backend-api/codex/models`.
pub(super) async fn models_codex(
    state: Shared,
    peer: Extension<Peer>,
    headers: HeaderMap,
) -> Response {
    models(state, peer, headers, true).await
}

/// `GET /v1/models`; in the Codex shape for a client that says its version.
pub(super) async fn models_openai(
    state: Shared,
    peer: Extension<Peer>,
    Query(query): Parameters,
    headers: HeaderMap,
) -> Response {
    let codex = query
        .get("client_version")
        .is_some_and(|version| !version.is_empty());
    models(state, peer, headers, codex).await
}

/// The union of the catalogues of the caller's accounts. Never an error of ours and never slow: it is read from memory.
async fn models(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    codex: bool,
) -> Response {
    let caller = match gate::authenticate(&state, peer, &headers).await {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    let mut entries = state.upstream.models(caller.accounts());
    let named = |slug: &str| entries.iter().find(|entry| entry["slug"] == slug);
    // Under its other name a model is what it is.
    let others: Vec<Value> = state
        .aliases
        .iter()
        .filter(|(alias, slug)| {
            named(alias).is_none() && (caller.may_use(slug) || caller.may_use(alias))
        })
        .filter_map(|(alias, slug)| {
            let mut entry = named(slug)?.clone();
            entry["slug"] = alias.as_str().into();
            entry["display_name"] = alias.as_str().into();
            Some(entry)
        })
        .collect();
    entries.retain(|entry| {
        let slug = entry["slug"].as_str();
        slug.is_some_and(|slug| caller.may_use(slug))
    });
    entries.extend(others);
    let list: Vec<Value> = entries
        .iter()
        .filter(|entry| entry["visibility"] != "hide")
        .map(|entry| json!({ "id": entry["slug"], "object": "model", "created": 0, "owned_by": "drawbridge" }))
        .collect();
    let body = if codex {
        json!({ "models": entries, "object": "list", "data": list })
    } else {
        json!({ "object": "list", "data": list })
    };
    document(&state, &caller, &headers, body.to_string().into())
}

/// A document with a strong `ETag` and the pool's limits.
fn document(state: &State, caller: &Caller, headers: &HeaderMap, body: Bytes) -> Response {
    let digest = secret::digest(&[&body]);
    let hex: String = digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let etag = HeaderValue::from_str(&format!("\"{hex}\"")).expect("hexadecimal is ASCII");
    let unchanged = headers.get(header::IF_NONE_MATCH) == Some(&etag);
    let mut response = if unchanged {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        body.into_response()
    };
    let out = response.headers_mut();
    out.insert(header::ETAG, etag);
    out.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    out.extend(responses::limits(state, caller));
    response
}

/// `GET .../usage`: the pool's windows as one account's.
pub(super) async fn usage(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Response {
    let caller = match gate::authenticate(&state, peer, &headers).await {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    let now = state.clock.now().as_second();
    let seen = state.engine.visibility(&caller);
    let body = quota::pool_view(&state.upstream.view(), now, seen).usage(now, seen);
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// `GET .../accounts/check`: says back who the caller says it is, and that it may stay where it is. No key: nothing is revealed.
pub(super) async fn accounts_check(headers: HeaderMap) -> Response {
    let id = headers
        .get("chatgpt-account-id")
        .and_then(|id| id.to_str().ok())
        .unwrap_or("drawbridge");
    Json(json!({
        "accounts": [{
            "id": id,
            "workspace_backend_origin": "NO_CONSTRAINT",
            "account_routing_override": "NO_CONSTRAINT",
            "structure": "personal",
            "plan_type": "pro",
        }],
        "account_ordering": [id],
        "default_account_id": id,
    }))
    .into_response()
}

/// `GET .../settings/user`: nothing is set.
pub(super) async fn settings_user() -> Response {
    Json(json!({})).into_response()
}
