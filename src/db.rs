//! Postgres: pools, statements, transactions, error classes, the database clock, migrations and the embedded cluster.
//!
//! SQL is run in one way only: a [`Stmt`] with its parameter types, as an unnamed statement in one round trip, so that a transaction
//! pooler in between changes nothing. Rooms keep their statements in their `store.rs`, made with [`statements!`](crate::statements).
//!
//! Lock order of everything that takes more than one row lock, also inside a statement: seat, e-mail, accounts by id, their limits, leases,
//! snapshots, turns, `request_log` by key, key counters, `bus_versions` (topics alphabetically, last).

mod clock;
mod connection;
pub mod dependents;
pub mod embedded;
mod error;
mod installation;
mod migrate;
pub mod probe;
pub mod sealed;
mod stmt;
mod tls;
mod tx;

use std::time::{Duration, Instant};

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio::sync::watch;
use tokio_postgres::{Client, Config, Row, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;

pub use self::{
    clock::Clock,
    connection::Connection,
    error::{Class, Error},
    installation::{INSTALLATION_STATEMENTS, Installation, OpenError},
    migrate::{Migration, migrate, migrations},
    stmt::{LockClass, Stmt},
    tls::{Endpoint, EndpointError},
    tx::Tx,
};

/// Largest number of connections of the main pool.
pub const MAIN_CONNECTIONS: usize = 16;
/// Connections for heartbeats alone, on the direct URL.
const VITAL_CONNECTIONS: usize = 2;
/// What a process has open on the direct URL: heartbeats, and LISTEN.
pub const DIRECT_CONNECTIONS: usize = VITAL_CONNECTIONS + 1;

/// A handle to one database; clones share its pools.
#[derive(Clone)]
pub struct Db {
    main: Lender,
    vital: Lender,
    direct: Endpoint,
    clock: Clock,
    /// Moves when a transaction of this process has committed that others should hear of.
    announced: watch::Sender<()>,
}

impl Db {
    /// Pools for a database. `pooled` may lead through a transaction pooler; `direct` leads to Postgres itself.
    /// Nothing connects yet.
    ///
    /// # Errors
    /// If the pool cannot be built (a bad configuration of TLS).
    pub fn new(pooled: &Endpoint, direct: &Endpoint) -> Result<Self, Error> {
        Ok(Self {
            main: Lender::new(pooled, MAIN_CONNECTIONS)?,
            vital: Lender::new(direct, VITAL_CONNECTIONS)?,
            direct: direct.clone(),
            clock: Clock::default(),
            announced: watch::Sender::new(()),
        })
    }

    /// The database's clock as this process has learnt it.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Reads the database's time; the offset is kept in [`Db::clock`].
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn learn_time(&self) -> Result<(), Error> {
        self.clock.learn(&self.connection().await?).await
    }

    /// The same database with heartbeats' own connections as the main pool: two connections that no other work can occupy.
    #[must_use]
    pub fn vital(&self) -> Self {
        Self {
            main: self.vital.clone(),
            ..self.clone()
        }
    }

    /// A connection from the pool, for a few statements in a row.
    ///
    /// # Errors
    /// If none is free within 2 s, or Postgres cannot be reached within 5 s.
    pub async fn connection(&self) -> Result<Connection, Error> {
        let asked = Instant::now();
        let got = self.main.pool.get().await;
        crate::telemetry::pool_waited(asked.elapsed());
        got.map(|client| Connection::new(client, self.main.tls.clone()))
            .map_err(Error::pool)
    }

    /// A connection of its own on the direct URL, with its driver, for `LISTEN`.
    ///
    /// # Errors
    /// If Postgres cannot be reached.
    pub async fn dedicated(&self) -> Result<(Client, tls::Driver), Error> {
        tls::connect(&self.direct).await
    }

    /// Starts a transaction (READ COMMITTED). It is rolled back unless [`Tx::commit`] is called.
    ///
    /// # Errors
    /// As [`Db::connection`].
    pub async fn begin(&self) -> Result<Tx, Error> {
        Tx::begin(self.connection().await?, self.announced.clone()).await
    }

    /// As [`Db::begin`], for work that locks what turns need: it waits at most 5 s for a lock, and if nothing is heard of us for 10 s (a
    /// terminal that sleeps), the server ends it.
    ///
    /// # Errors
    /// As [`Db::connection`].
    pub async fn begin_bounded(&self) -> Result<Tx, Error> {
        self.begin().await?.bounded().await
    }

    /// Changes when a transaction of this process has ended with [`Tx::commit_and_announce`].
    #[must_use]
    pub fn announced(&self) -> watch::Receiver<()> {
        self.announced.subscribe()
    }

    /// Runs a statement that returns any number of rows.
    ///
    /// # Errors
    /// Of the pool or of the statement.
    pub async fn all(
        &self,
        stmt: &Stmt,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        self.connection().await?.all(stmt, params).await
    }

    /// Runs a statement that returns at most one row.
    ///
    /// # Errors
    /// Of the pool or of the statement.
    pub async fn opt(
        &self,
        stmt: &Stmt,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        self.connection().await?.opt(stmt, params).await
    }

    /// Runs a statement that returns exactly one row.
    ///
    /// # Errors
    /// Of the pool or of the statement, or if there is not one row.
    pub async fn one(&self, stmt: &Stmt, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
        self.connection().await?.one(stmt, params).await
    }

    /// Runs a statement for its effect; yields the number of rows it touched.
    ///
    /// # Errors
    /// Of the pool or of the statement.
    pub async fn exec(&self, stmt: &Stmt, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        self.connection().await?.exec(stmt, params).await
    }

    /// How busy each pool is, by its name.
    #[must_use]
    pub fn load(&self) -> [(&'static str, Load); 2] {
        [("main", &self.main), ("vital", &self.vital)].map(|(name, lender)| {
            let status = lender.pool.status();
            let idle = status.available.min(status.size);
            let load = Load {
                in_use: status.size - idle,
                idle,
                waiting: status.waiting,
                limit: status.max_size,
            };
            (name, load)
        })
    }

    /// Closes the pools; running statements end first.
    pub fn close(&self) {
        self.main.pool.close();
        self.vital.pool.close();
    }
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db")
            .field("direct", &self.direct)
            .finish_non_exhaustive()
    }
}

/// A pool, and how it speaks to the server.
#[derive(Clone)]
struct Lender {
    pool: Pool,
    tls: MakeRustlsConnect,
}

impl Lender {
    fn new(endpoint: &Endpoint, size: usize) -> Result<Self, Error> {
        Ok(Self {
            pool: pool(endpoint, size)?,
            tls: endpoint.tls().clone(),
        })
    }
}

/// Connections of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Lent.
    pub in_use: usize,
    /// Open, for the next who asks.
    pub idle: usize,
    /// Those who wait for one.
    pub waiting: usize,
    /// At most.
    pub limit: usize,
}

fn pool(endpoint: &Endpoint, size: usize) -> Result<Pool, Error> {
    let manager = Manager::from_config(
        endpoint.config().clone(),
        endpoint.tls().clone(),
        ManagerConfig {
            recycling_method: RecyclingMethod::Fast,
        },
    );
    Pool::builder(manager)
        .max_size(size)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(Duration::from_secs(2)))
        .create_timeout(Some(Duration::from_secs(5)))
        .recycle_timeout(Some(Duration::from_secs(5)))
        .build()
        .map_err(|error| Error::config(error.to_string()))
}

/// Settings of every connection: a dead peer is noticed, and the server knows who asks.
fn tuned(mut config: Config) -> Config {
    config
        .application_name("drawbridge")
        .connect_timeout(Duration::from_secs(5))
        .keepalives_idle(Duration::from_secs(30))
        .tcp_user_timeout(Duration::from_secs(10));
    config
}
