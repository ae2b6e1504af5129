//! The fleet API: what the holder of a key may know of each account, for status bars and schedulers. Always by key, also where turns may go
//! without one. Nothing of an account crosses here but what [`Summary`] lists.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, extract,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, header};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use super::{Peer, State, gate};
use crate::{
    account::Listed,
    error::{ApiError, Code},
    ids::{AccountId, ApiKeyId},
    protocol::limits::{Family, QuotaVisibility, Window},
    quota,
    routing::{self, Account, Lifecycle, effective_used},
    telemetry,
    turn::Caller,
};

/// A key may ask for a refresh so often.
const REFRESH_EVERY: Duration = Duration::from_secs(30);

type Shared = extract::State<Arc<State>>;

/// An account as the holder of a key sees it. Its keys are always the same; what may not be seen, or is not known, is null.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    account_id: AccountId,
    display_name: String,
    email: Option<String>,
    status: &'static str,
    plan_type: String,
    /// Five hours.
    primary: Share,
    /// A week, or a month where there is no week.
    secondary: Share,
    /// When its tokens were issued.
    last_refresh_at: Timestamp,
    /// When the newest observation of a window began.
    usage_refreshed_at: Option<Timestamp>,
}

/// A window of an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Share {
    remaining_percent: Option<f64>,
    reset_at: Option<Timestamp>,
    window_minutes: Option<u32>,
}

impl Summary {
    /// `known` is what routing knows of it. That it is exhausted shows in its status only to who may see both sections; everybody else
    /// reads its life cycle.
    fn new(account: Listed, known: Option<&Account>, now: i64, seen: QuotaVisibility<'_>) -> Self {
        let codex = Family::CODEX;
        let window = |kind: Window| {
            let mut windows = known?.windows.iter();
            windows
                .find(|window| window.family == codex.as_str() && window.minutes == kind.minutes())
        };
        let share = |window: Option<&routing::Window>| {
            window.map_or_else(Share::default, |window| Share::new(window, now, seen))
        };
        let lifecycle = account.lifecycle.as_str();
        let derived = known
            .filter(|_| account.lifecycle == Lifecycle::Active)
            .map(|known| routing::status(known, codex.as_str(), now).as_str());
        let windows = known.map(|known| known.windows.iter());
        let newest = windows.and_then(|windows| windows.map(|window| window.observed_at).max());
        let id = account.id;
        Self {
            account_id: id,
            display_name: account
                .label
                .or_else(|| account.email.clone())
                .unwrap_or_else(|| id.to_string()),
            email: account.email,
            status: seen.both(derived).flatten().unwrap_or(lifecycle),
            plan_type: account.plan,
            primary: share(window(Window::FiveHour)),
            secondary: share(window(Window::Weekly).or_else(|| window(Window::Monthly))),
            last_refresh_at: account.refreshed_at,
            usage_refreshed_at: seen.either(newest).flatten().and_then(second),
        }
    }
}

impl Share {
    fn new(window: &routing::Window, now: i64, seen: QuotaVisibility<'_>) -> Self {
        let left = (100.0 - effective_used(window, now)).clamp(0.0, 100.0);
        let reset = window.resets_at.filter(|at| *at > now);
        Self {
            remaining_percent: seen.pool(left),
            reset_at: seen.limits(reset).flatten().and_then(second),
            window_minutes: seen.limits(window.minutes),
        }
    }
}

fn second(epoch: i64) -> Option<Timestamp> {
    Timestamp::from_second(epoch).ok()
}

/// `GET /api/fleet/summary`.
pub(super) async fn summary(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (caller, _) = keyed(&state, peer, &headers).await?;
    let listed = state.accounts.list().await.map_err(|error| {
        tracing::warn!(%error, "the accounts cannot be listed");
        unavailable()
    })?;
    let (view, now) = (state.upstream.view(), state.clock.now().as_second());
    let seen = state.engine.visibility(&caller);
    let accounts: Vec<Summary> = listed
        .into_iter()
        .filter(|account| seen.covers(account.id))
        .map(|account| {
            let known = view.account(account.id);
            Summary::new(account, known, now, seen)
        })
        .collect();
    Ok(document(json!({ "accounts": accounts })))
}

/// `POST /api/fleet/refresh`: asks upstream about the accounts of the key, in a task that outlives the caller.
pub(super) async fn refresh(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (caller, key) = keyed(&state, peer, &headers).await?;
    if state.closing.is_cancelled() {
        return Err(closing());
    }
    let wait = state.keys.claim_refresh(key, REFRESH_EVERY).await;
    let wait = wait.map_err(|error| {
        tracing::warn!(%error, "a refresh cannot be claimed");
        unavailable()
    })?;
    if wait.is_some() {
        telemetry::limit_rejected("refresh");
        let seconds = REFRESH_EVERY.as_secs();
        let why = format!("An API key may refresh its accounts once in {seconds} s.");
        return Err(ApiError::new(Code::RateLimited, why).retry_after(wait));
    }
    let (upstream, stop) = (state.upstream.clone(), state.tasks.stopping());
    let refreshing = state.tasks.spawn("fleet_refresh", async move {
        upstream.refresh_usage(caller.accounts(), stop).await
    });
    // A panic in it is logged and counted there.
    let refreshed = refreshing.await.map_err(|_| unavailable())?;
    let refreshed = refreshed.map_err(|error| {
        tracing::warn!(%error, "the accounts cannot be refreshed");
        unavailable()
    })?;
    if refreshed.cut {
        return Err(closing());
    }
    Ok(document(json!({
        "ok": true,
        "usageWritten": refreshed.written,
        "accountCount": refreshed.accounts,
        "attemptedCount": refreshed.attempted,
        "generatedAt": state.clock.now(),
    })))
}

/// `GET /v1/usage`: what the key has used, and what it may see of the pool.
pub(super) async fn usage(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (caller, key) = keyed(&state, peer, &headers).await?;
    let used = state
        .ledger
        .used(key, &state.tasks)
        .await
        .map_err(|error| {
            tracing::warn!(%error, "the usage of a key cannot be read");
            unavailable()
        })?;
    let seen = state.engine.visibility(&caller);
    let now = state.clock.now().as_second();
    let pool = quota::pool_view(&state.upstream.view(), now, seen);
    let limits = pool.upstream_limits(seen);
    Ok(document(json!({
        "request_count": used.requests,
        "total_tokens": used.tokens,
        "cached_input_tokens": used.cached_input_tokens,
        "total_cost_usd": used.cost_usd(),
        // A key has no limits of its own yet, so these are the pool's.
        "limits": limits,
        "upstream_limits": limits,
        "account_pool_usage": pool.remaining(seen),
    })))
}

/// Who is calling, which must be the holder of a key.
async fn keyed(
    state: &State,
    peer: Peer,
    headers: &HeaderMap,
) -> Result<(Caller, ApiKeyId), ApiError> {
    let caller = gate::authenticate(state, peer, headers).await?;
    let key = caller.api_key().ok_or_else(|| {
        let why = "This path always takes an API key. Send `Authorization: Bearer dbk_...`; `drawbridge keys create --name NAME` makes one.";
        ApiError::new(Code::InvalidApiKey, why)
    })?;
    Ok((caller, key))
}

/// It names people, so nothing in between may keep it.
fn document(body: serde_json::Value) -> Response {
    ([(header::CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

fn closing() -> ApiError {
    ApiError::new(Code::Cancelled, "The service is restarting; try again.")
}

fn unavailable() -> ApiError {
    ApiError::new(
        Code::ContinuityUnavailable,
        "The accounts cannot be read now; try again shortly.",
    )
}

#[cfg(test)]
mod tests;
