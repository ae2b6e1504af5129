//! Schema migrations: `migrations/V<n>__<what>.sql`, applied once, however many replicas start together.

use std::time::Duration;

use tokio::time::timeout;

use super::{Endpoint, Error, LockClass, Stmt, tls};

mod embedded {
    refinery::embed_migrations!("migrations");
}

/// A migration as the database records it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    /// Its number.
    pub version: i64,
    /// Its name.
    pub name: String,
    /// Of its text.
    pub checksum: String,
}

/// The migrations of this program, in order.
#[must_use]
pub fn migrations() -> Vec<Migration> {
    let runner = embedded::migrations::runner();
    let mut ours: Vec<_> = runner
        .get_migrations()
        .iter()
        .map(|migration| Migration {
            version: i64::from(migration.version()),
            name: migration.name().to_owned(),
            checksum: migration.checksum().to_string(),
        })
        .collect();
    ours.sort_by_key(|migration| migration.version);
    ours
}

static LOCK: Stmt = Stmt {
    name: "db.MIGRATION_LOCK",
    sql: "select pg_advisory_xact_lock($1, 0)",
    types: &[tokio_postgres::types::Type::INT4],
};

/// How long another replica's migration is waited for.
const PATIENCE: Duration = Duration::from_secs(300);

/// Brings the schema up to this program's version; yields the number of migrations applied. A newer schema is left as it is.
///
/// One connection holds a transaction-level advisory lock in an open transaction (which pins it to one server even behind a transaction
/// pooler) while a second one migrates.
///
/// # Errors
/// If Postgres cannot be reached, an applied migration differs from the file of its number, a migration fails, or the lock is not free
/// within 5 minutes.
pub async fn migrate(endpoint: &Endpoint) -> Result<usize, Error> {
    let (holder, driver) = tls::connect(endpoint).await?;
    let holding = driver.run();
    let work = async {
        holder
            .batch_execute("begin")
            .await
            .map_err(|error| Error::postgres("migration lock", error))?;
        timeout(
            PATIENCE,
            holder.query_typed(LOCK.sql, &LOCK.typed(&[&(LockClass::Migrate as i32)])),
        )
        .await
        .map_err(|_| {
            Error::unavailable(
                "migration lock",
                "another replica has been migrating for 5 minutes".into(),
            )
        })?
        .map_err(|error| Error::postgres("migration lock", error))?;
        let (mut client, driver) = tls::connect(endpoint).await?;
        let migrating = async {
            embedded::migrations::runner()
                .set_abort_divergent(true)
                .set_abort_missing(false)
                .run_async(&mut client)
                .await
                .map(|report| report.applied_migrations().len())
                .map_err(|error| Error::bug("migrating", describe(&error)))
        };
        driver.during(migrating).await
    };
    tokio::select! {
        result = work => result,
        () = holding => Err(Error::unavailable("migration lock", "its connection was lost".into())),
    }
}

fn describe(error: &refinery::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
