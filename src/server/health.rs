//! Probes and metrics.

use std::time::Duration;

use axum::{Json, Router, extract::State, response::IntoResponse, routing::get};
use http::{StatusCode, header};
use serde_json::json;

use super::Phase;
use crate::{db::Db, telemetry};

/// The probes, as served beside the client routes.
pub(super) fn router(phase: Phase, db: Db) -> Router {
    Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state((phase, db))
}

/// Probes and metrics.
pub(super) fn admin_router(phase: Phase, db: Db) -> Router {
    router(phase, db).route("/metrics", get(metrics))
}

async fn live() -> impl IntoResponse {
    Json(json!({ "status": "ok" }))
}

/// 503 only while starting or draining. Postgres away is 200 `degraded`: taking every replica out of service would help nobody.
async fn ready(State((phase, db)): State<(Phase, Db)>) -> impl IntoResponse {
    if !phase.ready.is_cancelled() {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "status": "starting" })),
        );
    }
    if phase.draining.is_cancelled() {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            Json(json!({ "status": "draining" })),
        );
    }
    let asked = tokio::time::timeout(Duration::from_secs(1), db.vital().learn_time()).await;
    let there = matches!(asked, Ok(Ok(())));
    telemetry::set("drawbridge_database_up", u64::from(there));
    (
        StatusCode::OK,
        Json(json!({ "status": if there { "ok" } else { "degraded" } })),
    )
}

async fn metrics() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        telemetry::render_metrics(),
    )
}
