//! The migrated database of a test, as a store sees it.

use drawbridge::db::{Db, Endpoint, migrate};
use tokio_postgres::Client;

use super::{pg::TestDb, pgbouncer::PgBouncer};

/// A database with its schema, reached in one of two ways.
pub(crate) struct Store {
    /// For the code under test.
    pub(crate) db: Db,
    /// For looking behind its back.
    pub(crate) client: Client,
    _pooler: Option<PgBouncer>,
    _test: TestDb,
}

impl Store {
    /// Straight to Postgres.
    pub(crate) async fn direct() -> Self {
        Self::open(None).await
    }

    /// Straight to Postgres, and another one through a pooler in transaction mode: what a store promises holds on both.
    pub(crate) async fn both_ways() -> [Self; 2] {
        [
            Self::direct().await,
            Self::open(Some(PgBouncer::start().await)).await,
        ]
    }

    async fn open(pooler: Option<PgBouncer>) -> Self {
        let test = TestDb::migrated(async |url| {
            migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
        })
        .await;
        let direct = Endpoint::parse(&test.url).unwrap();
        let pooled = pooler
            .as_ref()
            .map(|pooler| Endpoint::parse(&pooler.url(&test)).unwrap());
        Self {
            db: Db::new(pooled.as_ref().unwrap_or(&direct), &direct).unwrap(),
            client: test.connect().await,
            _pooler: pooler,
            _test: test,
        }
    }
}
