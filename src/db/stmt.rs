//! A statement with the types of its parameters.

use tokio_postgres::types::{ToSql, Type};

/// One SQL statement. `name` is the label of metrics and errors.
#[derive(Debug)]
pub struct Stmt {
    /// `room.statement`.
    pub name: &'static str,
    /// The text, with `$1`...
    pub sql: &'static str,
    /// Types of the parameters, in order.
    pub types: &'static [Type],
}

impl Stmt {
    /// Pairs values with their types.
    ///
    /// # Panics
    /// If the numbers differ: a mistake at the call site, found by the first test that runs it.
    pub(super) fn typed<'a>(
        &self,
        params: &'a [&'a (dyn ToSql + Sync)],
    ) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
        assert_eq!(
            params.len(),
            self.types.len(),
            "parameters of {}",
            self.name
        );
        params
            .iter()
            .copied()
            .zip(self.types.iter().cloned())
            .collect()
    }
}

/// Classes of transaction-level advisory locks; the second key is a hash within the class.
#[derive(Clone, Copy, Debug)]
#[repr(i32)]
pub enum LockClass {
    /// Schema migrations.
    Migrate = 4711,
    /// One upstream identity (`chatgpt_account_id`).
    Seat = 4712,
    /// One e-mail address.
    Email = 4713,
    /// One periodic job.
    Job = 4714,
    /// One row of `accounts`, where neither of the first two is at stake.
    Account = 4716,
}

/// Declares the statements of a store and lists them all in `STATEMENTS`, which a test prepares against the migrated schema.
///
/// ```text
/// statements! { "bus";
///     /// Reads every version.
///     READ: [] = "select topic, version from bus_versions";
/// }
/// ```
#[macro_export]
macro_rules! statements {
    ($room:literal; $($(#[$doc:meta])* $name:ident: [$($ty:ident),* $(,)?] = $sql:expr;)+) => {
        $(
            $(#[$doc])*
            static $name: $crate::db::Stmt = $crate::db::Stmt {
                name: concat!($room, ".", stringify!($name)),
                sql: $sql,
                types: &[$(tokio_postgres::types::Type::$ty),*],
            };
        )+
        /// Every statement of this store.
        pub static STATEMENTS: &[&$crate::db::Stmt] = &[$(&$name),+];
    };
}
