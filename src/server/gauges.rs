//! What is so at the moment, asked when somebody scrapes: nothing keeps it up to date in between, and nothing is left of what is gone.

use super::{Phase, health};
use crate::{
    bus::Bus,
    db::Db,
    ledger::Ledger,
    protocol::limits::Family,
    replica::Replica,
    routing::{self, View},
    telemetry::{self, Scrape},
    turn::{Budget, Engine},
    upstream::Upstream,
};

/// What is asked.
pub(super) struct Gauges {
    pub(super) phase: Phase,
    pub(super) db: Db,
    pub(super) bus: Bus,
    /// Whether one is configured.
    pub(super) redis: bool,
    pub(super) replica: Replica,
    pub(super) engine: Engine,
    pub(super) upstream: Upstream,
    pub(super) ledger: Ledger,
    pub(super) bytes: Budget,
    /// Whether each account's quota is shown.
    pub(super) accounts: bool,
}

impl Gauges {
    /// All metrics, in the Prometheus text format.
    pub(super) async fn page(&self) -> String {
        let up = health::is_up(&self.db).await;
        let mut page = telemetry::scrape();
        page.family("drawbridge_build_info")
            .put(&[("version", env!("CARGO_PKG_VERSION"))], 1);
        page.value("drawbridge_database_up", up);
        self.fleet(&mut page);
        self.turns(&mut page);
        pools(&self.db, &mut page);
        let now = self.db.clock().now().as_second();
        pool(&self.upstream.view(), self.accounts, now, &mut page);
        page.end()
    }

    fn fleet(&self, page: &mut Scrape) {
        let draining = self.phase.draining.is_cancelled();
        let ready = self.phase.ready.is_cancelled() && !draining;
        page.value("drawbridge_ready", ready);
        page.value("drawbridge_draining", draining);
        page.value("drawbridge_admits_turns", self.replica.admits());
        let peers = self.replica.peers();
        let alive = peers.iter().filter(|peer| peer.alive).count();
        page.count("drawbridge_peers_alive", alive);
        let hurry = self.bus.hurry_now();
        page.value(
            "drawbridge_bus_read_age_seconds",
            self.bus.age().as_secs_f64(),
        );
        let mut source = page.family("drawbridge_bus_source");
        for (name, is) in [
            ("listen", hurry.listen),
            ("redis", hurry.redis),
            ("poll", !hurry.listen && !hurry.redis),
        ] {
            source.put(&[("source", name)], is);
        }
        let mut redis = page.family("drawbridge_redis_connected");
        if self.redis {
            redis.put(&[], hurry.redis);
        }
    }

    fn turns(&self, page: &mut Scrape) {
        page.count("drawbridge_turns_running", self.engine.running());
        page.count("drawbridge_unbooked_turns", self.ledger.unbooked());
        page.count("drawbridge_request_log_waiting", self.ledger.waiting());
        let sessions = self.engine.sessions();
        page.count("drawbridge_sessions", sessions.open);
        page.count("drawbridge_sessions_busy", sessions.busy);
        page.count("drawbridge_sessions_limit", sessions.limit);
        let (used, limit) = self.bytes.used();
        page.count("drawbridge_body_bytes", used);
        page.count("drawbridge_body_limit_bytes", limit);
    }
}

/// Connections to the database.
#[expect(clippy::cast_precision_loss, reason = "as Prometheus counts")]
fn pools(db: &Db, page: &mut Scrape) {
    let pools = db.load();
    let mut connections = page.family("drawbridge_db_pool_connections");
    for (pool, load) in &pools {
        for (state, count) in [("in_use", load.in_use), ("idle", load.idle)] {
            connections.put(&[("pool", pool), ("state", state)], count as f64);
        }
    }
    let mut limit = page.family("drawbridge_db_pool_limit");
    for (pool, load) in &pools {
        limit.put(&[("pool", pool)], load.limit as f64);
    }
    let mut waiting = page.family("drawbridge_db_pool_waiting");
    for (pool, load) in &pools {
        waiting.put(&[("pool", pool)], load.waiting as f64);
    }
}

/// Every status that an account can have.
const STATUSES: [&str; 5] = [
    "active",
    "rate_limited",
    "paused",
    "reauth_required",
    "deactivated",
];

/// The accounts, and each one's quota if that is wanted. An account is named by the end of its id: the
/// beginning is a time.
#[expect(clippy::cast_precision_loss, reason = "as Prometheus counts")]
fn pool(view: &View, each: bool, now: i64, page: &mut Scrape) {
    let statuses = view
        .accounts
        .iter()
        .map(|account| routing::status(account, Family::CODEX.as_str(), now).as_str());
    let statuses: Vec<&str> = statuses.collect();
    let mut accounts = page.family("drawbridge_accounts");
    for status in STATUSES {
        let count = statuses.iter().filter(|is| **is == status).count();
        accounts.put(&[("status", status)], count as f64);
    }
    let shown = if each { &view.accounts[..] } else { &[] };
    let windows: Vec<_> = shown
        .iter()
        .flat_map(|account| {
            let id = account.id.to_string();
            let windows = account.windows.iter();
            windows.map(move |window| (short(&id), window.minutes.to_string(), window))
        })
        .collect();
    let mut used = page.family("drawbridge_account_quota_used_ratio");
    for (account, minutes, window) in &windows {
        let labels = [
            ("account", account.as_str()),
            ("family", &window.family),
            ("window_minutes", minutes),
        ];
        used.put(&labels, routing::effective_used(window, now) / 100.0);
    }
    let mut resets = page.family("drawbridge_account_quota_reset_timestamp_seconds");
    for (account, minutes, window) in &windows {
        if let Some(at) = window.resets_at {
            let labels = [
                ("account", account.as_str()),
                ("family", &window.family),
                ("window_minutes", minutes),
            ];
            resets.put(&labels, at as f64);
        }
    }
}

fn short(id: &str) -> String {
    id.rsplit('-').next().unwrap_or(id).to_owned()
}
