//! Probes and metrics.

use std::{sync::Arc, time::Duration};

use axum::{Json, Router, extract::State, response::IntoResponse, routing::get};
use http::{StatusCode, header};
use serde_json::json;

use tokio::time::timeout;

use super::{Phase, gauges::Gauges};
use crate::db::Db;

/// The probes, as served beside the client routes.
pub(super) fn router(phase: Phase, db: Db) -> Router {
    Router::new()
        .route("/livez", get(live))
        .route("/readyz", get(ready))
        .with_state((phase, db))
}

/// Probes and metrics.
pub(super) fn admin_router(gauges: Gauges) -> Router {
    let probes = router(gauges.phase.clone(), gauges.db.clone());
    let metrics = get(metrics).with_state(Arc::new(gauges));
    probes.route("/metrics", metrics)
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
    let there = is_up(&db).await;
    (
        StatusCode::OK,
        Json(json!({ "status": if there { "ok" } else { "degraded" } })),
    )
}

/// Whether Postgres answers within a second.
pub(super) async fn is_up(db: &Db) -> bool {
    let asked = timeout(Duration::from_secs(1), db.vital().learn_time()).await;
    matches!(asked, Ok(Ok(())))
}

async fn metrics(State(gauges): State<Arc<Gauges>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        gauges.page().await,
    )
}
