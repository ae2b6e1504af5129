//! Every column that holds sealed values, and how they pass from one master key to another while the service runs.
//!
//! A value says under which key it is sealed, so a pass may stop anywhere and begin again: what is sealed under the current key is left
//! alone. Each value is replaced by a statement of its own, and only if it still is what was read, so that whoever writes at the same time
//! wins and no two locks are held. A test walks the schema and fails on a binary column that is neither listed here nor a hash.

use std::collections::BTreeMap;

use tokio_postgres::types::Type;

use super::{Db, Error, Stmt};
use crate::secret::{self, KeyRing, Place};

/// Rows that one statement looks at. The largest values have some megabytes.
const BATCH: i32 = 32;
/// So many reasons are kept.
const REASONS: usize = 10;
/// Below every row.
const FIRST: &str = "00000000-0000-0000-0000-000000000000/";

/// A column that holds sealed values. An empty value holds nothing.
#[derive(Debug)]
pub struct Sealed {
    /// The table.
    pub table: &'static str,
    /// The column.
    pub column: &'static str,
    count: Stmt,
    read: Stmt,
    write: Stmt,
}

/// The id of the key in a sealed value, as text, whatever its bytes are; null where nothing is sealed. Only the first bytes are read.
macro_rules! key_of {
    ($value:literal) => {
        concat!(
            "case when octet_length(",
            $value,
            ") > 2 then encode(substr(",
            $value,
            ", 3, get_byte(substr(",
            $value,
            ", 2, 1), 0)), 'escape') end"
        )
    };
}

/// `row` is the row's key as [`Place`] has it, `key` its columns, `at` the same made of the text `$1`.
macro_rules! sealed {
    ($($table:literal $column:literal row $row:literal key $key:literal at $at:literal $(also $also:expr)?;)+) => {
        /// The registry.
        pub static SEALED: &[Sealed] = &[$(Sealed {
            table: $table,
            column: $column,
            // A plain read of each value's first bytes.
            count: Stmt {
                name: "db.SEALED_COUNT",
                sql: concat!("select ", key_of!($column), " as id, count(*) from ", $table, " where octet_length(", $column, ") > 2 group by id"),
                types: &[],
            },
            // A plain read along the primary key; values under the current key are not sent.
            read: Stmt {
                name: "db.SEALED_READ",
                sql: concat!(
                    "select ", $row, ", case when ", key_of!($column), " <> $2 then ", $column, " end from ", $table,
                    " where (", $key, ") > (", $at, ") order by ", $key, " limit $3"
                ),
                types: &[Type::TEXT, Type::TEXT, Type::INT4],
            },
            // A compare-and-set on the head of what was read, which no other sealing shares.
            write: Stmt {
                name: "db.SEALED_WRITE",
                sql: concat!(
                    "update ", $table, " set ", $column, " = $3", $(", ", $also,)? " where (", $key, ") = (", $at,
                    ") and substr(", $column, ", 1, octet_length($2)) = $2"
                ),
                types: &[Type::TEXT, Type::BYTEA, Type::BYTEA],
            },
        }),+];
    };
}

sealed! {
    "installation" "sealed" row "name" key "name" at "$1";
    "accounts" "email_sealed" row "account_id::text" key "account_id" at "left($1, 36)::uuid";
    "account_credentials" "access_sealed" row "account_id::text" key "account_id" at "left($1, 36)::uuid";
    "account_credentials" "refresh_sealed" row "account_id::text" key "account_id" at "left($1, 36)::uuid";
    "account_credentials" "id_sealed" row "account_id::text" key "account_id" at "left($1, 36)::uuid";
    "login_flows" "secrets_sealed" row "flow_id::text" key "flow_id" at "left($1, 36)::uuid";
    "response_snapshots" "body" row "scope_id || '/' || response_id" key "scope_id, response_id" at "left($1, 36)::uuid, substr($1, 38)"
        also concat!("key_id = ", key_of!("$3"));
}

/// How many values are sealed under which key, by its id.
pub type Counts = BTreeMap<String, i64>;

/// What a pass over a column has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Done {
    /// Rows looked at.
    pub seen: u64,
    /// Sealed anew.
    pub resealed: u64,
    /// Replaced or deleted by others meanwhile.
    pub overtaken: u64,
    /// Left as they are: they do not open, because their key is not in the ring or they are damaged.
    pub unopened: u64,
}

/// A pass over one column.
pub struct Pass<'a> {
    db: &'a Db,
    ring: &'a KeyRing,
    sealed: &'static Sealed,
    after: String,
    /// So far.
    pub done: Done,
    /// Why the first few that were left do not open.
    pub reasons: Vec<String>,
}

impl Sealed {
    /// Its statements, for the test that prepares them all.
    #[must_use]
    pub fn statements(&self) -> [&Stmt; 3] {
        [&self.count, &self.read, &self.write]
    }

    /// Counts the values by the key that sealed them; reads the first bytes of each.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn count(&self, db: &Db) -> Result<Counts, Error> {
        let rows = db.all(&self.count, &[]).await?;
        let count = |row: &tokio_postgres::Row| Ok((row.try_get(0)?, row.try_get(1)?));
        rows.iter().map(count).collect()
    }

    /// Begins to seal every value of the column under the ring's current key.
    #[must_use]
    pub fn pass<'a>(&'static self, db: &'a Db, ring: &'a KeyRing) -> Pass<'a> {
        Pass {
            db,
            ring,
            sealed: self,
            after: FIRST.to_owned(),
            done: Done::default(),
            reasons: Vec::new(),
        }
    }
}

impl Pass<'_> {
    /// Looks at the next rows; false after the last. A pass that is given up half-way has lost nothing.
    ///
    /// # Errors
    /// Of a statement.
    pub async fn step(&mut self) -> Result<bool, Error> {
        let Sealed {
            table,
            column,
            read,
            write,
            ..
        } = self.sealed;
        let current = self.ring.current_id();
        let rows = self.db.all(read, &[&self.after, &current, &BATCH]).await?;
        for row in &rows {
            let row_id: String = row.try_get(0)?;
            if let Some(old) = row.try_get::<_, Option<&[u8]>>(1)? {
                let place = Place {
                    table,
                    row: &row_id,
                    column,
                };
                match self.ring.open(place, old) {
                    Ok(plain) => {
                        let new = self.ring.seal(place, &plain);
                        let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
                            [&row_id, &secret::head(old), &new];
                        match self.db.exec(write, &params).await? {
                            0 => self.done.overtaken += 1,
                            _ => self.done.resealed += 1,
                        }
                    }
                    Err(error) => {
                        self.done.unopened += 1;
                        if self.reasons.len() < REASONS {
                            self.reasons
                                .push(format!("{table}.{column} of {row_id}: {error}"));
                        }
                    }
                }
            }
            self.done.seen += 1;
            self.after = row_id;
        }
        Ok(rows.len() == BATCH as usize)
    }
}
