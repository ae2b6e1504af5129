//! A transaction that owns its connection.

use std::ops::Deref;

use tokio::sync::watch;

use super::{Connection, Error, Stmt};

/// An open transaction. Dropping it closes its connection, which makes the server roll back.
pub struct Tx {
    connection: Option<Connection>,
    announced: watch::Sender<()>,
}

static BEGIN: Stmt = Stmt {
    name: "db.BEGIN",
    sql: "begin",
    types: &[],
};
/// For this transaction alone, so that a pooler does not matter.
static BOUNDS: Stmt = Stmt {
    name: "db.BOUNDS",
    sql: "select set_config('lock_timeout', '5s', true), set_config('idle_in_transaction_session_timeout', '10s', true)",
    types: &[],
};
static COMMIT: Stmt = Stmt {
    name: "db.COMMIT",
    sql: "commit",
    types: &[],
};

impl Tx {
    pub(super) async fn begin(
        connection: Connection,
        announced: watch::Sender<()>,
    ) -> Result<Self, Error> {
        let tx = Self {
            connection: Some(connection),
            announced,
        };
        tx.exec(&BEGIN, &[]).await?;
        Ok(tx)
    }

    /// See [`Db::begin_bounded`](super::Db::begin_bounded).
    pub(super) async fn bounded(self) -> Result<Self, Error> {
        self.exec(&BOUNDS, &[]).await?;
        Ok(self)
    }

    /// Makes the work durable and gives the connection back.
    ///
    /// # Errors
    /// If the server could not commit, or its answer was lost: then the work may or may not be durable.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.exec(&COMMIT, &[]).await?;
        self.connection = None;
        Ok(())
    }

    /// As [`Tx::commit`]; then [`Db::announced`](super::Db::announced) tells this process that there is something to tell.
    ///
    /// # Errors
    /// As [`Tx::commit`].
    pub async fn commit_and_announce(self) -> Result<(), Error> {
        let announced = self.announced.clone();
        self.commit().await?;
        announced.send_replace(());
        Ok(())
    }
}

impl Deref for Tx {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection
            .as_ref()
            .expect("the connection is taken only by `commit`, which consumes")
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.cut();
        }
    }
}
