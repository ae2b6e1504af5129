//! What can go wrong with the database, by what a caller can do about it.

use std::error::Error as _;

use deadpool_postgres::PoolError;
use tokio_postgres::error::SqlState;

use super::Stmt;

/// What a caller can do about an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// Postgres cannot be reached, is starting or stopping, or no connection was free in time.
    Unavailable,
    /// A serialisation failure, a deadlock or a lock time-out: the same work may succeed if repeated.
    Retryable,
    /// A named constraint was violated.
    Constraint(String),
    /// Anything else: a mistake of ours or of the set-up.
    Bug,
}

impl Class {
    fn label(&self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Retryable => "retryable",
            Self::Constraint(_) => "constraint",
            Self::Bug => "bug",
        }
    }
}

/// An error of the database. Its text carries the statement's name and the server's message; it never carries parameters.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {detail}")]
pub struct Error {
    class: Class,
    what: &'static str,
    detail: String,
}

impl Error {
    /// What can be done about it.
    #[must_use]
    pub fn class(&self) -> &Class {
        &self.class
    }

    /// Whether Postgres is away.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.class == Class::Unavailable
    }

    /// The name of the violated constraint.
    #[must_use]
    pub fn constraint(&self) -> Option<&str> {
        match &self.class {
            Class::Constraint(name) => Some(name),
            _ => None,
        }
    }

    pub(super) fn statement(stmt: &Stmt, error: tokio_postgres::Error) -> Self {
        let error = Self::postgres(stmt.name, error);
        crate::telemetry::statement_failed(stmt.name, error.class.label());
        error
    }

    pub(super) fn postgres(what: &'static str, error: tokio_postgres::Error) -> Self {
        Self {
            class: classify(&error),
            what,
            detail: describe(&error),
        }
    }

    pub(super) fn pool(error: PoolError) -> Self {
        let error = match error {
            PoolError::Backend(error) => Self::postgres("connecting", error),
            other => Self {
                class: Class::Unavailable,
                what: "connection pool",
                detail: other.to_string(),
            },
        };
        crate::telemetry::statement_failed("pool", error.class.label());
        error
    }

    pub(super) fn config(detail: String) -> Self {
        Self {
            class: Class::Bug,
            what: "database configuration",
            detail,
        }
    }

    pub(super) fn bug(what: &'static str, detail: String) -> Self {
        Self {
            class: Class::Bug,
            what,
            detail,
        }
    }

    pub(super) fn unavailable(what: &'static str, detail: String) -> Self {
        Self {
            class: Class::Unavailable,
            what,
            detail,
        }
    }
}

/// A row whose column has another type than the code reads: a mistake of ours.
impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::postgres("reading a row", error)
    }
}

fn classify(error: &tokio_postgres::Error) -> Class {
    let Some(server) = error.as_db_error() else {
        // No answer of a server: connecting, the socket, or a closed connection; else a value that does not fit.
        let local = error
            .source()
            .is_some_and(|source| source.is::<tokio_postgres::types::WrongType>());
        return if local {
            Class::Bug
        } else {
            Class::Unavailable
        };
    };
    match *server.code() {
        SqlState::T_R_SERIALIZATION_FAILURE
        | SqlState::T_R_DEADLOCK_DETECTED
        | SqlState::LOCK_NOT_AVAILABLE => Class::Retryable,
        SqlState::ADMIN_SHUTDOWN
        | SqlState::CRASH_SHUTDOWN
        | SqlState::CANNOT_CONNECT_NOW
        | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT
        | SqlState::TOO_MANY_CONNECTIONS
        | SqlState::QUERY_CANCELED
        | SqlState::READ_ONLY_SQL_TRANSACTION
        | SqlState::CONNECTION_FAILURE
        | SqlState::CONNECTION_EXCEPTION
        | SqlState::PROTOCOL_VIOLATION => Class::Unavailable,
        SqlState::UNIQUE_VIOLATION
        | SqlState::FOREIGN_KEY_VIOLATION
        | SqlState::CHECK_VIOLATION => {
            Class::Constraint(server.constraint().unwrap_or_default().to_owned())
        }
        _ => Class::Bug,
    }
}

/// The server's message and code, or the chain of local causes. Detail and hint are left out: they may quote values.
fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(server) = error.as_db_error() {
        return format!("{} ({})", server.message(), server.code().code());
    }
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
