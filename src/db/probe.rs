//! What an operator's check-up asks a database. Nothing here changes anything.

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client};

use super::{Db, Error, Migration};
use crate::statements;

/// How long a notification to ourselves may take.
const ECHO: Duration = Duration::from_secs(1);

statements! { "db";
    /// The far end of a connection, as the server sees it. Behind a pooler that is the pooler's.
    SERVER: [] = "
        select current_setting('server_version_num')::int4, pg_is_in_recovery(),
            coalesce((select ssl from pg_stat_ssl where pid = pg_backend_pid()), false),
            inet_client_addr() is null or inet_client_addr() <<= '127.0.0.0/8' or inet_client_addr() = '::1'
                or inet_client_addr() = inet_server_addr(),
            current_setting('max_connections')::int4 - current_setting('superuser_reserved_connections')::int4,
            (select sum(numbackends)::int8 from pg_stat_database)";

    /// Who serves this connection now.
    BACKEND: [] = "select pg_backend_pid()";

    /// To ourselves.
    ECHO_SENT: [] = "select pg_notify('drawbridge_probe', '')";

    /// Whether there is a schema at all.
    HAS_SCHEMA: [] = "select to_regclass('refinery_schema_history') is not null";

    /// What was applied.
    APPLIED: [] = "select version::int8, name, checksum from refinery_schema_history order by version";

    /// A lease that nobody alive owns is claimed by the next request of its conversation; until then its turn counts as running.
    STORED: [] = "
        select (select count(*) from http_bridge_leases l left join bridge_replicas r on r.boot_id = l.owner_boot
                where l.busy_turn is not null and (r.boot_id is null or r.dead_at is not null)),
            ((clock_timestamp() at time zone 'utc')::date - (select min(day) from request_log))::int4,
            pg_total_relation_size('request_log'), pg_total_relation_size('response_snapshots'), pg_database_size(current_database())";
}

/// A server.
#[derive(Clone, Copy, Debug)]
pub struct Server {
    /// As in `server_version_num`.
    pub version: i32,
    /// It is a standby: it takes no writes.
    pub standby: bool,
    /// The connection is encrypted.
    pub tls: bool,
    /// The connection does not leave this machine.
    pub local: bool,
    /// Connections that ordinary users may have.
    pub connections: i32,
    /// Those that are open, of all databases.
    pub used: i64,
}

/// How the direct URL behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direct {
    /// Each connection has a server process of its own.
    pub sessions: bool,
    /// What is notified is heard.
    pub hears: bool,
}

/// What is stored, where that may be too much or too old.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// Leases with a turn of an owner that is dead.
    pub orphaned_leases: i64,
    /// Age in days of the oldest row of the request log.
    pub log_days: Option<i32>,
    /// Bytes of the request log.
    pub log_bytes: i64,
    /// Bytes of the snapshots.
    pub snapshot_bytes: i64,
    /// Bytes of the database.
    pub database_bytes: i64,
}

/// Asks the server behind the pooled URL; `db.vital()` asks that behind the direct one.
///
/// # Errors
/// If it cannot be asked.
pub async fn server(db: &Db) -> Result<Server, Error> {
    let row = db.one(&SERVER, &[]).await?;
    Ok(Server {
        version: row.try_get(0)?,
        standby: row.try_get(1)?,
        tls: row.try_get(2)?,
        local: row.try_get(3)?,
        connections: row.try_get(4)?,
        used: row.try_get::<_, Option<i64>>(5)?.unwrap_or(0),
    })
}

/// Looks for a pooler on the direct URL: two connections that are open at once never share a server process, unless one is in between.
///
/// # Errors
/// If it cannot be reached.
pub async fn direct(db: &Db) -> Result<Direct, Error> {
    let (one, mut driver) = db.dedicated().await?;
    let (other, other_driver) = db.dedicated().await?;
    let backend = async |client: &Client| -> Result<i32, Error> {
        Ok(client.query_typed(BACKEND.sql, &[]).await?[0].try_get(0)?)
    };
    let asked = async {
        let (first, second) = (backend(&one).await?, backend(&other).await?);
        let sessions = first != second && first == backend(&one).await?;
        one.batch_execute("listen drawbridge_probe").await?;
        one.query_typed(ECHO_SENT.sql, &[]).await?;
        Ok::<_, Error>(sessions)
    };
    let work = async {
        tokio::pin!(asked);
        let (mut sessions, mut hears) = (None, false);
        loop {
            let step = async {
                tokio::select! {
                    result = &mut asked, if sessions.is_none() => result.map(Some),
                    message = driver.next() => match message {
                        Some(AsyncMessage::Notification(_)) => { hears = true; Ok(None) }
                        Some(_) => Ok(None),
                        None => Err(Error::unavailable("connection", "it was lost".into())),
                    },
                }
            };
            match timeout(ECHO, step).await {
                Ok(result) => sessions = result?.or(sessions),
                Err(_) => break,
            }
            if hears && sessions.is_some() {
                break;
            }
        }
        let late = || Error::unavailable("connection", "no answer within a second".into());
        let sessions = sessions.ok_or_else(late)?;
        Ok(Direct { sessions, hears })
    };
    other_driver.during(work).await
}

/// The migrations that were applied, in order.
///
/// # Errors
/// If the database cannot be asked.
pub async fn applied(db: &Db) -> Result<Vec<Migration>, Error> {
    if !db.one(&HAS_SCHEMA, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(Vec::new());
    }
    let rows = db.all(&APPLIED, &[]).await?;
    let read = |row: &tokio_postgres::Row| {
        Ok(Migration {
            version: row.try_get(0)?,
            name: row.try_get(1)?,
            checksum: row.try_get(2)?,
        })
    };
    rows.iter().map(read).collect()
}

/// Looks at what is stored.
///
/// # Errors
/// If the database cannot be asked.
pub async fn stored(db: &Db) -> Result<Stored, Error> {
    let row = db.one(&STORED, &[]).await?;
    Ok(Stored {
        orphaned_leases: row.try_get(0)?,
        log_days: row.try_get(1)?,
        log_bytes: row.try_get(2)?,
        snapshot_bytes: row.try_get(3)?,
        database_bytes: row.try_get(4)?,
    })
}
