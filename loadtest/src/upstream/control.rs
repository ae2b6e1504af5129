//! The fake over HTTP, for tests and demos in other processes.

use std::sync::Arc;

use axum::{
    Json, extract,
    response::{IntoResponse as _, Response},
};
use serde::Deserialize;
use serde_json::json;

use super::{Account, Fault, state::Shared};

/// `GET /__fake/state`.
pub(super) async fn state(extract::State(shared): extract::State<Arc<Shared>>) -> Response {
    let body = shared.read(|state| {
        json!({
            "attempts": state.attempts,
            "violations": state.violations,
            "sockets": state.sockets,
            "open_sockets": state.open_sockets,
            "silent": state.silent,
            "exchanges": state.logins.iter().map(|(name, login)| (name.clone(), login.exchanges)).collect::<std::collections::BTreeMap<_, _>>(),
        })
    });
    Json(body).into_response()
}

/// `POST /__fake/faults`.
pub(super) async fn fault(
    extract::State(shared): extract::State<Arc<Shared>>,
    Json(fault): Json<Fault>,
) -> Response {
    shared.change(|state| state.faults.push(fault));
    Json(json!({})).into_response()
}

/// `DELETE /__fake/faults`.
pub(super) async fn no_faults(extract::State(shared): extract::State<Arc<Shared>>) -> Response {
    shared.change(|state| state.faults.clear());
    Json(json!({})).into_response()
}

/// `POST /__fake/release`: responses that a fault keeps silent go on.
pub(super) async fn release(extract::State(shared): extract::State<Arc<Shared>>) -> Response {
    shared.release();
    Json(json!({})).into_response()
}

/// `POST /__fake/accounts/{name}/expire`: its access token is not accepted any more.
pub(super) async fn expire(
    extract::State(shared): extract::State<Arc<Shared>>,
    extract::Path(name): extract::Path<String>,
) -> Response {
    Account::of(&shared, &name).expire();
    Json(json!({})).into_response()
}

/// `GET /__fake/accounts`: what each account has paid for, by name.
pub(super) async fn accounts(extract::State(shared): extract::State<Arc<Shared>>) -> Response {
    let paid = shared.read(|state| {
        let paid = state.logins.iter().map(|(name, login)| (name.clone(), json!({ "turns": login.turns, "tokens": login.tokens, "exchanges": login.exchanges })));
        paid.collect::<std::collections::BTreeMap<_, _>>()
    });
    let paid = paid.into_iter().map(|(name, mut login)| {
        login["used_percent"] = shared.used_percent(&name).into();
        (name, login)
    });
    Json(paid.collect::<serde_json::Map<_, _>>()).into_response()
}

/// The body of `POST /__fake/accounts`.
#[derive(Deserialize)]
pub(super) struct Named {
    name: String,
}

/// `POST /__fake/accounts`: an `auth.json`.
pub(super) async fn account(
    extract::State(shared): extract::State<Arc<Shared>>,
    Json(named): Json<Named>,
) -> Response {
    Account::of(&shared, &named.name)
        .auth_json()
        .into_response()
}
