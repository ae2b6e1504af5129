//! `drawbridge keys`: makes, renews, lists and takes back client keys.

use clap::Subcommand;
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use serde_json::json;

use super::Context;
use crate::api_key::{self, Created, Expiry, Grants, Listed, NewKey};

/// What to do with keys.
#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Make a key and show it, once
    Create {
        /// For people; need not be unique
        #[arg(long)]
        name: String,
        /// When it ends: a time with any offset (2030-01-31T12:00:00+02:00), or a span from now (30d)
        #[arg(long, value_name = "TIME")]
        expires_at: Option<Expiry>,
        /// Share the conversations of another key, by id or name
        #[arg(long, value_name = "ID")]
        scope_of: Option<String>,
        /// Print the key alone
        #[arg(long, conflicts_with = "json")]
        quiet: bool,
    },
    /// Give a key a new secret; the old one is dead at once, conversations go on
    Rotate {
        /// Beginning of the id (8 digits or more), or the name
        id: String,
        /// Print the key alone
        #[arg(long, conflicts_with = "json")]
        quiet: bool,
    },
    /// List every key, also those that were taken back
    List,
    /// Take a key back, for good
    Revoke {
        /// Beginning of the id (8 digits or more), or the name
        id: String,
    },
}

/// Runs one of them.
///
/// # Errors
/// Of the database, or if no key or several keys are meant.
pub(super) async fn run(command: KeysCommand, context: &Context) -> anyhow::Result<()> {
    let Context {
        db, installation, ..
    } = context;
    match command {
        KeysCommand::Create {
            name,
            expires_at,
            scope_of,
            quiet,
        } => {
            let scope_of = match scope_of {
                Some(text) => Some(api_key::find(db, &text).await?),
                None => None,
            };
            let now = db.clock().now();
            let new = NewKey {
                name,
                expires_at: expires_at.map(|expiry| expiry.resolve(now)).transpose()?,
                scope_of,
                grants: Grants::default(),
            };
            let created = api_key::create(db, &installation.pepper, &new).await?;
            print_secret(&created, context.json, quiet);
        }
        KeysCommand::Rotate { id, quiet } => {
            let id = api_key::find(db, &id).await?;
            let created = api_key::rotate(db, &installation.pepper, id).await?;
            print_secret(&created, context.json, quiet);
        }
        KeysCommand::List => {
            let keys = api_key::list(db).await?;
            if context.json {
                println!("{}", json!(keys));
            } else {
                print_table(&keys, db.clock().now());
            }
        }
        KeysCommand::Revoke { id } => {
            let key = api_key::revoke(db, api_key::find(db, &id).await?).await?;
            if context.json {
                println!("{}", json!(key));
            } else {
                println!("key {} ({}) is revoked", key.id, key.name);
            }
        }
    }
    Ok(())
}

fn print_secret(Created { key, secret }: &Created, as_json: bool, quiet: bool) {
    let secret = secret.expose_secret();
    if as_json {
        let mut shown = json!(key);
        shown["key"] = json!(secret);
        println!("{shown}");
    } else if quiet {
        println!("{secret}");
    } else {
        println!(
            "key {} ({}), shown this once:\n\n    {secret}\n",
            key.id, key.name
        );
    }
}

fn print_table(keys: &[Listed], now: Timestamp) {
    let time = |at: Option<Timestamp>| {
        at.map_or_else(
            || "-".to_owned(),
            |at| at.strftime("%Y-%m-%d %H:%M").to_string(),
        )
    };
    println!(
        "{:<36}  {:<10}  {:<7}  {:<16}  {:<16}  NAME",
        "ID", "KEY", "STATUS", "EXPIRES (UTC)", "LAST USED (UTC)"
    );
    for key in keys {
        println!(
            "{:<36}  {:<10}  {:<7}  {:<16}  {:<16}  {}",
            key.id.to_string(),
            key.prefix,
            key.status(now),
            time(key.expires_at),
            time(key.last_used_at),
            key.name,
        );
    }
}
