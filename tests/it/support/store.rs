//! The migrated database of a test, as a store sees it.

use drawbridge::db::{Db, Endpoint, migrate};
use reqwest::Url;
use tokio_postgres::Client;

use super::{chaos::Chaos, pg::TestDb, pgbouncer::PgBouncer};

/// A database with its schema, reached in one of two ways.
pub(crate) struct Store {
    /// For the code under test.
    pub(crate) db: Db,
    /// For looking behind its back.
    pub(crate) client: Client,
    pooled: Endpoint,
    direct: Endpoint,
    _pooler: Option<PgBouncer>,
    test: TestDb,
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

    /// Where the database is, for a program.
    pub(crate) fn url(&self) -> &str {
        &self.test.url
    }

    /// The same database as another process reaches it.
    pub(crate) fn another(&self) -> Db {
        Db::new(&self.pooled, &self.direct).unwrap()
    }

    /// Through a pooler, for a process that knows no other way.
    pub(crate) async fn pooled_alone() -> (Self, Db) {
        let store = Self::open(Some(PgBouncer::start().await)).await;
        let db = Db::new(&store.pooled, &store.pooled).unwrap();
        (store, db)
    }

    /// The same database as a process reaches it behind a network of its own.
    pub(crate) async fn behind_chaos(&self) -> (Db, Chaos) {
        let mut url: Url = self.test.url.parse().unwrap();
        let server = url.socket_addrs(|| Some(5432)).unwrap()[0];
        let chaos = Chaos::before(server).await;
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(chaos.address.port())).unwrap();
        let endpoint = Endpoint::parse(url.as_str()).unwrap();
        (Db::new(&endpoint, &endpoint).unwrap(), chaos)
    }

    async fn open(pooler: Option<PgBouncer>) -> Self {
        let test = TestDb::migrated(async |url| {
            migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
        })
        .await;
        let direct = Endpoint::parse(&test.url).unwrap();
        let pooled = match &pooler {
            Some(pooler) => Endpoint::parse(&pooler.url(&test)).unwrap(),
            None => direct.clone(),
        };
        Self {
            db: Db::new(&pooled, &direct).unwrap(),
            client: test.connect().await,
            pooled,
            direct,
            _pooler: pooler,
            test,
        }
    }
}
