//! `drawbridge keys`: makes, renews, lists and takes back client keys.

mod rotate_master;

use std::collections::HashMap;

use anyhow::bail;
use clap::{Args, Subcommand};
use jiff::Timestamp;
use secrecy::ExposeSecret as _;
use serde_json::json;

use super::{Context, accounts};
use crate::{
    account::{self, Accounts},
    api_key::{self, Change, Created, Expiry, Grant, Grants, Listed, NewKey},
    ids::AccountId,
    protocol::limits::Section,
};

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
        #[command(flatten)]
        may: May,
        /// Print the key alone
        #[arg(long, conflicts_with = "json")]
        quiet: bool,
    },
    /// Change what a key may use and see; what is not named stays as it is
    Grant {
        /// Beginning of the id (8 digits or more), or the name
        id: String,
        #[command(flatten)]
        may: May,
    },
    /// Give a key a new secret; the old one is dead at once, conversations go on
    Rotate {
        /// Beginning of the id (8 digits or more), or the name
        id: String,
        /// Print the key alone
        #[arg(long, conflicts_with = "json")]
        quiet: bool,
    },
    /// Seal everything that is stored under the first master key, while the service runs; then the others can go
    RotateMaster {
        /// Only count what is sealed under which key
        #[arg(long)]
        dry_run: bool,
    },
    /// List every key, also those that were taken back
    List,
    /// Take a key back, for good
    Revoke {
        /// Beginning of the id (8 digits or more), or the name
        id: String,
    },
}

/// What a key may use and see. A kind that is not named is not restricted in a new key.
#[derive(Args, Debug)]
pub(super) struct May {
    /// An account that may serve it (label, e-mail address or id), several times for several; or any, or none
    #[arg(long = "account", value_name = "ACCOUNT")]
    accounts: Vec<String>,
    /// A model that it may use, by its name or an alias, several times for several; or any, or none
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    /// What it sees of quota: pool (how much is used), limits (windows and their resets), both; or any, or none
    #[arg(long, value_name = "SECTION", value_parser = ["pool", "limits", "any", "none"])]
    quota: Vec<String>,
}

impl May {
    fn read(self, listed: &[account::Listed]) -> anyhow::Result<Change> {
        let section = |word: &str| {
            let known = Section::ALL.into_iter();
            let mut known = known.filter(|section| section.as_str() == word);
            known
                .next()
                .ok_or_else(|| anyhow::anyhow!("{word:?} is no section of quota"))
        };
        Ok(Change {
            accounts: only(self.accounts, |name| accounts::find(listed, name))?,
            models: only(self.models, |model| Ok(model.to_owned()))?,
            quota: only(self.quota, section)?,
        })
    }
}

/// One kind of grant as it is written.
fn only<T>(
    words: Vec<String>,
    read: impl Fn(&str) -> anyhow::Result<T>,
) -> anyhow::Result<Grant<T>> {
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok(Grant::Same),
        ["any"] => Ok(Grant::Any),
        ["none"] => Ok(Grant::Only(Vec::new())),
        ref words if words.iter().any(|word| ["any", "none"].contains(word)) => {
            bail!("`any` and `none` stand alone")
        }
        ref words => Ok(Grant::Only(
            words
                .iter()
                .map(|word| read(word))
                .collect::<Result<_, _>>()?,
        )),
    }
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
            may,
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
                grants: may.read(&all_accounts(context).await?)?.set(),
            };
            let created = api_key::create(db, &installation.pepper, &new).await?;
            print_secret(&created, context.json, quiet);
        }
        KeysCommand::Grant { id, may } => {
            let listed = all_accounts(context).await?;
            let change = may.read(&listed)?;
            if change == Change::default() {
                bail!("nothing to change: name --account, --model or --quota");
            }
            let key = api_key::grant(db, api_key::find(db, &id).await?, &change).await?;
            if context.json {
                say!("{}", json!(key));
            } else {
                let grants = told(&key.grants, &names(listed));
                say!("key {} ({}) now has: {grants}", key.id, key.name);
            }
        }
        KeysCommand::Rotate { id, quiet } => {
            let id = api_key::find(db, &id).await?;
            let created = api_key::rotate(db, &installation.pepper, id).await?;
            print_secret(&created, context.json, quiet);
        }
        KeysCommand::RotateMaster { dry_run } => rotate_master::run(dry_run, context).await?,
        KeysCommand::List => {
            let keys = api_key::list(db).await?;
            if context.json {
                say!("{}", json!(keys));
            } else {
                print_table(
                    &keys,
                    &names(all_accounts(context).await?),
                    db.clock().now(),
                );
            }
        }
        KeysCommand::Revoke { id } => {
            let key = api_key::revoke(db, api_key::find(db, &id).await?).await?;
            if context.json {
                say!("{}", json!(key));
            } else {
                say!("key {} ({}) is revoked", key.id, key.name);
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
        say!("{shown}");
    } else if quiet {
        say!("{secret}");
    } else {
        say!(
            "key {} ({}), shown this once:\n\n    {secret}\n",
            key.id,
            key.name
        );
    }
}

async fn all_accounts(context: &Context) -> anyhow::Result<Vec<account::Listed>> {
    let accounts = Accounts::new(
        context.db.clone(),
        context.ring.clone(),
        context.installation.pepper.clone(),
    );
    Ok(accounts.list().await?)
}

/// What operators call the accounts.
fn names(listed: Vec<account::Listed>) -> HashMap<AccountId, String> {
    let named = |account: account::Listed| Some((account.id, account.label.or(account.email)?));
    listed.into_iter().filter_map(named).collect()
}

/// The restrictions of a key in words.
fn told(grants: &Grants, names: &HashMap<AccountId, String>) -> String {
    let kind = |kind: &str, these: Option<Vec<String>>| {
        these.map(|these| match &these[..] {
            [] => format!("no {kind}"),
            these => format!("{kind} {}", these.join(", ")),
        })
    };
    let name = |id: &AccountId| names.get(id).cloned().unwrap_or_else(|| id.to_string());
    let word = |section: &Section| section.as_str().to_owned();
    let kinds = [
        kind(
            "accounts",
            grants
                .accounts
                .as_ref()
                .map(|ids| ids.iter().map(name).collect()),
        ),
        kind("models", grants.models.clone()),
        kind(
            "quota",
            grants
                .quota
                .as_ref()
                .map(|these| these.iter().map(word).collect()),
        ),
    ];
    let kinds: Vec<String> = kinds.into_iter().flatten().collect();
    if kinds.is_empty() {
        "everything".to_owned()
    } else {
        kinds.join("; ")
    }
}

fn print_table(keys: &[Listed], names: &HashMap<AccountId, String>, now: Timestamp) {
    let time = |at: Option<Timestamp>| {
        at.map_or_else(
            || "-".to_owned(),
            |at| at.strftime("%Y-%m-%d %H:%M").to_string(),
        )
    };
    let width = keys.iter().map(|key| key.name.chars().count()).max();
    let width = width.unwrap_or_default().max("NAME".len());
    say!(
        "{:<36}  {:<10}  {:<7}  {:<16}  {:<16}  {:<width$}  MAY USE AND SEE",
        "ID",
        "KEY",
        "STATUS",
        "EXPIRES (UTC)",
        "LAST USED (UTC)",
        "NAME"
    );
    for key in keys {
        say!(
            "{:<36}  {:<10}  {:<7}  {:<16}  {:<16}  {:<width$}  {}",
            key.id.to_string(),
            key.prefix,
            key.status(now),
            time(key.expires_at),
            time(key.last_used_at),
            key.name,
            told(&key.grants, names),
        );
    }
}
