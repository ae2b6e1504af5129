//! Puts the process together: boot order, listeners, health, drain.
//!
//! Boot: database, secrets, bus, replica, state, view, listeners, ready. Drain, on SIGTERM or SIGINT: unready, every answer carries
//! `Connection: close`, new turns are still served (lame duck); then the listener closes and running turns may end; then what is left is
//! cancelled with a terminal event, booked, and the process leaves. A second signal goes to the last step at once.

mod connection;
mod gauges;
mod health;
mod operator;
mod stream;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{net::TcpListener, signal::unix::SignalKind, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    account::{Accounts, sticky::Sticky},
    api_key::ApiKeys,
    bus::{Bus, Redis},
    config::{Config, Drain},
    db::{self, Db, Installation},
    forward, ingress, jobs,
    lease::Leases,
    ledger::Ledger,
    quota::Quota,
    replica::{Replica, Timing},
    secret::KeyRing,
    snapshot::Snapshots,
    task::Tasks,
    telemetry, token, turn,
    upstream::{Upstream, login::Logins},
};

/// How long what remains after the grace may take to book itself.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// How long Postgres may take to be told a thing at the end: one that does not answer keeps nobody from leaving.
const FAREWELL: Duration = Duration::from_secs(2);

/// The phases of a process, each entered once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Phase {
    /// Boot is over.
    pub(crate) ready: CancellationToken,
    /// Lame duck: unready, connections close after their answer.
    pub(crate) draining: CancellationToken,
    /// No new connections; idle ones close.
    pub(crate) closing: CancellationToken,
}

/// Runs the service until a signal ends it. True if everything that ran could end by itself.
///
/// # Errors
/// If it cannot start.
pub async fn run(
    config: Config,
    db: Db,
    ring: KeyRing,
    installation: Installation,
) -> anyhow::Result<bool> {
    let mut signals = signals()?;
    let client = bind("DRAWBRIDGE_LISTEN", config.listen).await?;
    let admin = bind("DRAWBRIDGE_ADMIN_LISTEN", config.admin_listen).await?;
    let internal = match &config.internal {
        Some(internal) => Some(bind("DRAWBRIDGE_INTERNAL_LISTEN", internal.listen).await?),
        None => None,
    };
    let listeners = Listeners {
        client,
        admin,
        internal,
    };
    let server = tokio::select! {
        server = Server::start(&config, db, ring, installation, listeners) => server?,
        // Nothing was served yet, so nothing is left behind.
        () = signals.next() => return Ok(true),
    };
    welcome(&server, &config).await;
    Ok(server.until(signals, config.drain).await)
}

/// Bound sockets.
pub struct Listeners {
    /// For clients.
    pub client: TcpListener,
    /// For metrics and probes.
    pub admin: TcpListener,
    /// For other replicas.
    pub internal: Option<TcpListener>,
}

/// A started service. Tests start several in one process.
pub struct Server {
    /// Where clients are served.
    pub address: SocketAddr,
    /// Where metrics and probes are served.
    pub admin_address: SocketAddr,
    tasks: Tasks,
    phase: Phase,
    engine: turn::Engine,
    replica: Replica,
    ledger: Ledger,
    quota: Quota,
    keys: ApiKeys,
    accounts: Accounts,
    db: Db,
}

impl Server {
    /// Boots on bound listeners; when this returns, requests are served.
    ///
    /// # Errors
    /// If the database cannot be used.
    pub async fn start(
        config: &Config,
        db: Db,
        ring: KeyRing,
        installation: Installation,
        listeners: Listeners,
    ) -> anyhow::Result<Self> {
        let Listeners {
            client,
            admin,
            internal,
        } = listeners;
        telemetry::recorder();
        let tasks = Tasks::new();
        let phase = Phase::default();
        db.learn_time().await?;
        let bus = Bus::connect(&db).await?;
        let endpoint = match (&config.internal, &internal) {
            (Some(config), Some(bound)) => Some(config.endpoint(bound.local_addr()?)),
            _ => None,
        };
        let timing = Timing::FULL.scaled(config.time_scale);
        let name = &config.replica_name;
        let replica = Replica::register(&db, name, endpoint, ring.fingerprints(), timing).await?;
        let accounts = Accounts::new(db.clone(), ring.clone(), installation.pepper.clone());
        let leases = Leases::new(db.clone());
        let snapshots = Snapshots::new(db.clone(), ring.clone(), config.snapshots);
        let sticky = Sticky::new(db.clone());
        let quota = Quota::load(&db, &bus, &tasks).await?;
        let keys = ApiKeys::load(&db, &bus, installation.pepper, &tasks).await?;
        let ledger = Ledger::new(db.clone(), replica.boots(), &tasks);
        let upstream =
            Upstream::start(&config.upstream, &db, &accounts, &quota, &bus, &tasks).await?;
        let forwarding = forward::Keys::new(&ring);
        let peers = internal.as_ref().map(|_| {
            let patience = forward::Patience::default();
            let client = forward::Client::new(forwarding.clone(), db.clock().clone(), patience);
            turn::Peers::new(client)
        });
        let engine = turn::Engine::new(
            turn::Parts {
                upstream: upstream.clone(),
                accounts: accounts.clone(),
                quota: quota.clone(),
                sticky: sticky.clone(),
                ledger: ledger.clone(),
                replica: replica.clone(),
                leases: leases.clone(),
                snapshots: snapshots.clone(),
                tokens: token::Keys::new(ring.derived("bridge-turn-token/v3")),
                keys: keys.clone(),
                peers,
                max_sessions: config.max_sessions,
                hide_quota: config.hide_quota,
                policy: config.routing,
            },
            &tasks,
        );
        let (mut boots, stop) = (replica.boots(), tasks.stopping());
        let (retiring, doubting) = (engine.clone(), bus.clone());
        drop(tasks.spawn("incarnations", async move {
            let follow = async {
                while boots.changed().await.is_ok() {
                    retiring.retire_others(*boots.borrow_and_update());
                    // It may be one on another timeline of the database.
                    doubting.doubt();
                }
            };
            stop.run_until_cancelled(follow).await;
        }));
        let bytes = turn::Budget::default();
        if let Some(internal) = internal {
            let owner = Arc::new(turn::Receiving {
                engine: engine.clone(),
                bytes: bytes.clone(),
            });
            let router = forward::router(owner, forwarding, replica.boots(), db.clock().clone());
            tasks.essential(
                "peers",
                connection::accept(internal, router, phase.clone(), tasks.clone()),
            );
        }
        if let Some(url) = &config.redis {
            let redis = Redis::new(&url.0).context("DRAWBRIDGE_REDIS_URL")?;
            tasks.essential("redis", bus.clone().over_redis(redis, tasks.clone()));
        }
        tasks.essential("bus", bus.clone().run(tasks.clone()));
        tasks.essential("heartbeat", replica.clone().beat(tasks.clone()));
        let parts = jobs::Parts {
            db: db.clone(),
            ledger: ledger.clone(),
            accounts: accounts.clone(),
            sticky,
            leases,
            snapshots,
            quota: quota.clone(),
            upstream: upstream.clone(),
        };
        let periods = jobs::Periods {
            retention_days: config.retention_days,
            usage_poll: config.upstream.usage_poll,
        };
        jobs::start(&tasks, &parts, &periods);

        let (address, admin_address) = (client.local_addr()?, admin.local_addr()?);
        let state = Arc::new(ingress::State {
            engine: engine.clone(),
            upstream,
            keys: keys.clone(),
            accounts: accounts.clone(),
            ledger: ledger.clone(),
            clock: db.clock().clone(),
            aliases: config.model_aliases.clone(),
            gate: ingress::Gate::new(config.key_rule, address),
            bytes,
            tasks: tasks.clone(),
            closing: phase.closing.clone(),
        });
        let router = ingress::router(
            Arc::clone(&state),
            health::router(phase.clone(), db.clone()),
        );
        tasks.essential(
            "clients",
            connection::accept(client, router, phase.clone(), tasks.clone()),
        );
        let gauges = gauges::Gauges {
            phase: phase.clone(),
            db: db.clone(),
            bus,
            redis: config.redis.is_some(),
            replica: replica.clone(),
            engine: engine.clone(),
            upstream: state.upstream.clone(),
            ledger: ledger.clone(),
            bytes: state.bytes.clone(),
            accounts: config.metrics_accounts,
        };
        let mut router = health::admin_router(gauges);
        if let Some(token) = &config.operator_token {
            let logins = Logins::new(&config.upstream, &accounts, &tasks)?;
            router = router.merge(operator::router(&token.0, logins));
        }
        let router = ingress::with_fallbacks(router);
        // Whoever watches sees a long drain to its end.
        let watched = Phase {
            closing: tasks.stopping(),
            ..Phase::default()
        };
        tasks.essential(
            "admin",
            connection::accept(admin, router, watched, tasks.clone()),
        );
        phase.ready.cancel();
        Ok(Self {
            address,
            admin_address,
            tasks,
            phase,
            engine,
            replica,
            ledger,
            quota,
            keys,
            accounts,
            db,
        })
    }

    /// Serves until `stop` ends, then drains. True if everything that ran could end by itself.
    async fn until(self, mut stop: Signals, drain: Drain) -> bool {
        let stopping = self.tasks.stopping();
        tokio::select! {
            () = stop.next() => {}
            // Without its heartbeat or its view there is nothing to drain for.
            () = stopping.cancelled() => {
                self.end().await;
                return false;
            }
        }
        tracing::info!(turns = self.engine.running(), "draining");
        tokio::select! {
            clean = self.drain(drain) => clean,
            () = stop.next() => {
                tracing::warn!("a second signal: running turns are cancelled");
                self.end().await;
                false
            }
        }
    }

    /// Lame duck, then the listener closes, then running turns may end, then the rest is cancelled.
    async fn drain(&self, drain: Drain) -> bool {
        self.phase.draining.cancel();
        farewell("that this replica drains", Box::pin(self.replica.drain())).await;
        tokio::time::sleep(drain.delay).await;
        self.phase.closing.cancel();
        self.engine.close();
        let clean = self.engine.idle(drain.grace).await;
        if !clean {
            tracing::warn!(
                turns = self.engine.running(),
                "the grace is over: running turns are cancelled"
            );
        }
        self.end().await && clean && !self.tasks.failed()
    }

    /// Cancels what runs, books it, and leaves.
    async fn end(&self) -> bool {
        self.phase.draining.cancel();
        self.phase.closing.cancel();
        self.engine.close();
        self.engine.cancel_all();
        let booked = self.engine.idle(LAST_WORDS).await;
        self.tasks.stop();
        let (quota, keys) = (self.quota.flush(), self.keys.flush());
        let written = async {
            tokio::join!(quota, keys);
            Ok(())
        };
        farewell("what was seen last", Box::pin(written)).await;
        self.ledger.flush().await;
        let ended = self.tasks.drained(LAST_WORDS).await;
        // Last: from here on peers settle what is still open.
        farewell("that this replica is gone", Box::pin(self.replica.leave())).await;
        self.db.close();
        if !ended {
            tracing::warn!(tasks = self.tasks.running(), "some tasks did not end");
        }
        booked && ended
    }

    /// Waits until no turn runs, at most `patience`. True if none does.
    pub async fn idle(&self, patience: Duration) -> bool {
        self.engine.idle(patience).await
    }

    /// Drains with a given patience and stops; what tests call instead of a signal.
    pub async fn stop(self, drain: Drain) -> bool {
        self.drain(drain).await
    }
}

/// Tells Postgres something at the end, if it listens.
async fn farewell(what: &str, telling: impl Future<Output = Result<(), db::Error>>) {
    match timeout(FAREWELL, telling).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "Postgres is not told {what}"),
        Err(_) => tracing::warn!("Postgres is not told {what}: it does not answer"),
    }
}

/// SIGTERM and SIGINT, each counted.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn signals() -> anyhow::Result<Signals> {
    let listen = |kind| tokio::signal::unix::signal(kind).context("cannot listen for signals");
    Ok(Signals {
        terminate: listen(SignalKind::terminate())?,
        interrupt: listen(SignalKind::interrupt())?,
    })
}

async fn bind(name: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("{name}: cannot listen on {address}"))
}

/// Tells a person at a terminal what to do next.
async fn welcome(server: &Server, config: &Config) {
    let address = server.address;
    tracing::info!(%address, admin = %server.admin_address, replica = config.replica_name, "ready");
    let accounts = server
        .accounts
        .list()
        .await
        .map_or(0, |accounts| accounts.len());
    let keyless = !server.keys.any_created() && address.ip().is_loopback();
    let mut steps = Vec::new();
    if accounts == 0 {
        steps.push("log an account in:  drawbridge accounts login".to_owned());
    }
    if keyless {
        steps.push(
            "create a key (needed from other machines):  drawbridge keys create --name laptop"
                .to_owned(),
        );
    }
    if !steps.is_empty() {
        steps.push(format!(
            "point Codex here, in ~/.codex/config.toml:\n\n    model_provider = \"drawbridge\"\n\n    [model_providers.drawbridge]\n    \
             name = \"drawbridge\"\n    base_url = \"http://{address}/backend-api/codex\"\n    wire_api = \"responses\"\n    \
             supports_websockets = true{}\n",
            if keyless { "" } else { "\n    env_key = \"DRAWBRIDGE_KEY\"" }
        ));
        tracing::info!("next steps\n  - {}", steps.join("\n  - "));
    }
}
