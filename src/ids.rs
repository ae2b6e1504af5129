//! Newtypes for the identities of the system. No behaviour: they parse, print and travel to Postgres as `uuid`.
//!
//! Time-ordered ids (version 7) are used where rows are written in order of time; random ones (version 4) where the moment of creation
//! is nobody's business.

use std::{error::Error, fmt, str::FromStr};

use bytes::BytesMut;
use tokio_postgres::types::{FromSql, IsNull, ToSql, Type, to_sql_checked};
use uuid::Uuid;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $make:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id that no other process will draw.
            #[must_use]
            #[expect(clippy::new_without_default, reason = "a default id would be a fixed one")]
            pub fn new() -> Self {
                Self(Uuid::$make())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }

        impl<'a> FromSql<'a> for $name {
            fn from_sql(ty: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
                Uuid::from_sql(ty, raw).map(Self)
            }

            fn accepts(ty: &Type) -> bool {
                <Uuid as FromSql<'_>>::accepts(ty)
            }
        }

        impl ToSql for $name {
            fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn Error + Sync + Send>> {
                self.0.to_sql(ty, out)
            }

            fn accepts(ty: &Type) -> bool {
                <Uuid as ToSql>::accepts(ty)
            }

            to_sql_checked!();
        }
    };
}

id!(
    /// One upstream login: a row of `accounts`.
    AccountId,
    now_v7
);
id!(
    /// One client credential: a row of `api_keys`.
    ApiKeyId,
    new_v4
);
id!(
    /// Whose conversations these are; survives the rotation of a key.
    ScopeId,
    new_v4
);
id!(
    /// One client request that generates a response: a row of `turns`. Ordered by time.
    TurnId,
    now_v7
);
id!(
    /// One start of a process: a row of `bridge_replicas`.
    BootId,
    new_v4
);

id!(
    /// The durable right to own a bridge session: a row of `http_bridge_leases`.
    LeaseId,
    new_v4
);
id!(
    /// A login under way: a row of `login_flows`.
    FlowId,
    new_v4
);
id!(
    /// A conversation's snapshots up to a checkpoint.
    ChainId,
    new_v4
);

impl ScopeId {
    /// The scope of callers that may go without a key.
    pub const ANONYMOUS: Self = Self(Uuid::nil());
}
