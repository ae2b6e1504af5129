//! What can go wrong with the database, by what a caller can do about it.

use std::error::Error as _;

use deadpool_postgres::PoolError;
use tokio_postgres::error::SqlState;

use super::Stmt;

/// What a caller can do about an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Class {
    /// Postgres cannot be reached, is starting or stopping, lacks what it needs, or no connection was free in time: it passes.
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

    /// Whether the same may succeed later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self.class, Class::Unavailable | Class::Retryable)
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

    /// A server that does not say anything to a statement.
    pub(crate) fn mute(statement: &'static str) -> Self {
        crate::telemetry::statement_failed(statement, Class::Unavailable.label());
        Self::unavailable(statement, "the database does not answer".to_owned())
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
    of_code(server.code(), server.constraint())
}

fn of_code(code: &SqlState, constraint: Option<&str>) -> Class {
    match *code {
        SqlState::T_R_SERIALIZATION_FAILURE
        | SqlState::T_R_DEADLOCK_DETECTED
        | SqlState::LOCK_NOT_AVAILABLE => return Class::Retryable,
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT | SqlState::READ_ONLY_SQL_TRANSACTION => {
            return Class::Unavailable;
        }
        SqlState::UNIQUE_VIOLATION
        | SqlState::FOREIGN_KEY_VIOLATION
        | SqlState::CHECK_VIOLATION => {
            return Class::Constraint(constraint.unwrap_or_default().to_owned());
        }
        _ => {}
    }
    match code.code().get(..2) {
        // The connection, who may connect (a password that is being changed), resources, an operator, the system, and Postgres itself.
        Some("08" | "28" | "53" | "57" | "58" | "XX") => Class::Unavailable,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_no_bug() {
        let row = Class::Constraint("rows_key".into());
        for (codes, class) in [
            (&["40001", "40P01", "55P03"][..], Class::Retryable),
            (&["08006", "08P01", "28000", "28P01"], Class::Unavailable),
            (&["53100", "53200", "53300"], Class::Unavailable),
            (&["57014", "57P01", "57P03", "57P05"], Class::Unavailable),
            (&["58030", "58P01", "XX000"], Class::Unavailable),
            (&["25006", "25P03"], Class::Unavailable),
            (&["23503", "23505", "23514"], row),
            (&["22021", "22P05", "23502", "25P02"], Class::Bug),
            (&["42501", "42703", "42P01", "54000"], Class::Bug),
        ] {
            for code in codes {
                let of = of_code(&SqlState::from_code(code), Some("rows_key"));
                assert_eq!(of, class, "{code}");
            }
        }
    }
}
