//! A connection of the pool, and the one way in which statements run on it.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use deadpool_postgres::Object;
use tokio::time::timeout;
use tokio_postgres::{Row, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{Error, Stmt};
use crate::{task, telemetry};

/// How long a server may take over one statement before it is taken for mute. Turns are far less patient.
const ANSWER: Duration = Duration::from_secs(300);
/// For telling the server that nobody waits for an answer.
const CANCEL: Duration = Duration::from_secs(2);

/// A connection taken from the pool. Dropping it gives it back, unless it owes an answer that nobody waits for any more: the next user
/// would have to, so it is cut.
pub struct Connection {
    client: Option<Object>,
    tls: MakeRustlsConnect,
    /// Statements that were sent and not answered.
    owed: AtomicUsize,
}

impl Connection {
    pub(super) fn new(client: Object, tls: MakeRustlsConnect) -> Self {
        Self {
            client: Some(client),
            tls,
            owed: AtomicUsize::new(0),
        }
    }

    /// Cuts the connection instead of giving it back. The server is told to stop: it would wait for a lock, say, with its connection, while
    /// others are opened for those that ask next.
    pub(super) fn cut(mut self) {
        self.sever();
    }

    fn sever(&mut self) {
        let Some(client) = self.client.take() else {
            return;
        };
        let (token, tls) = (Object::take(client).cancel_token(), self.tls.clone());
        task::errand(async move {
            // PgBouncer does not pass it on; there it is the pooler that bounds what waits.
            drop(timeout(CANCEL, token.cancel_query(tls)).await);
        });
    }

    /// As [`Db::all`](super::Db::all).
    ///
    /// # Errors
    /// Of the statement.
    pub async fn all(
        &self,
        stmt: &Stmt,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let typed = stmt.typed(params);
        self.answer(stmt, self.client().query_typed(stmt.sql, &typed))
            .await
    }

    /// As [`Db::opt`](super::Db::opt).
    ///
    /// # Errors
    /// Of the statement.
    pub async fn opt(
        &self,
        stmt: &Stmt,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Option<Row>, Error> {
        let typed = stmt.typed(params);
        self.answer(stmt, self.client().query_typed_opt(stmt.sql, &typed))
            .await
    }

    /// As [`Db::one`](super::Db::one).
    ///
    /// # Errors
    /// Of the statement, or if there is not one row.
    pub async fn one(&self, stmt: &Stmt, params: &[&(dyn ToSql + Sync)]) -> Result<Row, Error> {
        let typed = stmt.typed(params);
        self.answer(stmt, self.client().query_typed_one(stmt.sql, &typed))
            .await
    }

    /// As [`Db::exec`](super::Db::exec).
    ///
    /// # Errors
    /// Of the statement.
    pub async fn exec(&self, stmt: &Stmt, params: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        let typed = stmt.typed(params);
        self.answer(stmt, self.client().execute_typed(stmt.sql, &typed))
            .await
    }

    /// Asks the server whether it accepts a statement; nothing is executed.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn check(&self, stmt: &Stmt) -> Result<(), Error> {
        let prepared = self.client().prepare_typed(stmt.sql, stmt.types);
        self.answer(stmt, prepared).await.map(drop)
    }

    /// Waits for what the server says to a statement. Whoever stops waiting leaves the answer owed.
    async fn answer<T>(
        &self,
        stmt: &Stmt,
        answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
    ) -> Result<T, Error> {
        telemetry::statement(stmt.name);
        self.owed.fetch_add(1, Ordering::Relaxed);
        let answer = timeout(ANSWER, answer)
            .await
            .map_err(|_| Error::mute(stmt.name))?;
        self.owed.fetch_sub(1, Ordering::Relaxed);
        answer.map_err(|error| Error::statement(stmt, error))
    }

    fn client(&self) -> &Object {
        self.client
            .as_ref()
            .expect("the client is taken only by what ends the connection")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if *self.owed.get_mut() > 0 {
            self.sever();
        }
    }
}
