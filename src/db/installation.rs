//! What belongs to the installation as a whole: the canary that proves the master keys, and the pepper of keyed hashes.

use rand::random;
use tokio_postgres::types::Type;

use super::{Db, Error, Stmt};
use crate::secret::{self, KeyRing, Pepper, Place};

/// The opened secrets of the installation.
#[derive(Clone, Debug)]
pub struct Installation {
    /// Under which API keys and e-mails are hashed.
    pub pepper: Pepper,
}

/// Why the installation could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The database.
    #[error(transparent)]
    Db(#[from] Error),
    /// The ring does not open what the installation sealed.
    #[error("the master keys do not belong to this database: {0}")]
    Keys(#[from] secret::Error),
}

static GET: Stmt = Stmt {
    name: "db.INSTALLATION",
    sql: "select sealed from installation where name = $1",
    types: &[Type::TEXT],
};

/// The first replica to start draws the pepper; the others, racing, read what was drawn.
static DRAW: Stmt = Stmt {
    name: "db.INSTALLATION_DRAW",
    sql: "insert into installation (name, sealed) values ($1, $2) on conflict (name) do nothing",
    types: &[Type::TEXT, Type::BYTEA],
};

/// The statements of this file, for the test that prepares them all.
pub static INSTALLATION_STATEMENTS: &[&Stmt] = &[&GET, &DRAW];

const PEPPER: &str = "pepper";
const PLACE: Place<'static> = Place {
    table: "installation",
    row: PEPPER,
    column: "sealed",
};

impl Installation {
    /// Opens the installation's secrets, drawing them if the database is new. The sealed pepper is the canary: a ring that does not open
    /// it is another installation's.
    ///
    /// # Errors
    /// [`OpenError::Keys`] if the ring is not the one of this database.
    pub async fn open(db: &Db, ring: &KeyRing) -> Result<Self, OpenError> {
        let sealed = ring.seal(PLACE, &random::<[u8; 32]>());
        loop {
            if let Some(known) = Self::known(db, ring).await? {
                return Ok(known);
            }
            db.exec(&DRAW, &[&PEPPER, &sealed]).await?;
        }
    }

    /// The same, if they were drawn.
    ///
    /// # Errors
    /// As [`Installation::open`].
    pub async fn known(db: &Db, ring: &KeyRing) -> Result<Option<Self>, OpenError> {
        let Some(row) = db.opt(&GET, &[&PEPPER]).await? else {
            return Ok(None);
        };
        let plain = ring.open(PLACE, row.try_get(0).map_err(Error::from)?)?;
        let bytes = <[u8; 32]>::try_from(plain.as_slice()).map_err(|_| secret::Error::Broken)?;
        Ok(Some(Self {
            pepper: Pepper::new(bytes),
        }))
    }
}
