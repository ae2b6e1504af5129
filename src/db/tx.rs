//! A transaction that owns its connection.

use std::ops::Deref;

use super::{Connection, Error, Stmt};

/// An open transaction. Dropping it closes its connection, which makes the server roll back.
pub struct Tx(Option<Connection>);

static BEGIN: Stmt = Stmt {
    name: "db.BEGIN",
    sql: "begin",
    types: &[],
};
static COMMIT: Stmt = Stmt {
    name: "db.COMMIT",
    sql: "commit",
    types: &[],
};

impl Tx {
    pub(super) async fn begin(connection: Connection) -> Result<Self, Error> {
        let tx = Self(Some(connection));
        tx.exec(&BEGIN, &[]).await?;
        Ok(tx)
    }

    /// Makes the work durable and gives the connection back.
    ///
    /// # Errors
    /// If the server could not commit, or its answer was lost: then the work may or may not be durable.
    pub async fn commit(mut self) -> Result<(), Error> {
        self.exec(&COMMIT, &[]).await?;
        self.0 = None;
        Ok(())
    }
}

impl Deref for Tx {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.0
            .as_ref()
            .expect("the connection is taken only by `commit`, which consumes")
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        if let Some(Connection(object)) = self.0.take() {
            drop(deadpool_postgres::Object::take(object));
        }
    }
}
