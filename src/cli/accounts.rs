//! `drawbridge accounts`: the operator's hand on the pool. An account is named by its label, by its e-mail address, by
//! its id, or by the start of its id.

mod login;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use zeroize::Zeroizing;

use super::Context;
use crate::{
    account::{
        Accounts, Imported, Listed,
        export::{self, Entry},
        flow::Method,
        merge::Policy,
    },
    ids::AccountId,
};

/// Digits of an id that name an account at least.
const PREFIX: usize = 8;

/// No file of logins is larger.
const LARGEST: u64 = 16 * 1024 * 1024;

/// What a person should know after an import.
const AFTER_IMPORT: &str = r#"
This login now belongs to Drawbridge: do not keep using the same auth.json elsewhere. Its refresh token can be spent
once only, so whoever comes second is logged out. To make a login for Drawbridge alone:

    CODEX_HOME=$(mktemp -d) sh -c 'codex login && drawbridge accounts import "$CODEX_HOME/auth.json"; rm -r "$CODEX_HOME"'"#;

/// Import and manage upstream accounts
#[derive(Debug, Subcommand)]
pub(super) enum AccountsCommand {
    /// Store a login of the Codex CLI, or those of a codex-lb export; a known seat gets the new tokens and is active again
    Import {
        /// The auth.json or the export, or - for standard input
        file: PathBuf,
        /// A name of your own for the account; of an export with several, each keeps its own
        #[arg(long)]
        label: Option<String>,
        /// Keep what is stored of the seat, and store this login beside it; the seat's next login merges them
        #[arg(long)]
        side_by_side: bool,
        /// Also replace an account of the same e-mail address, if it could be the same seat
        #[arg(long)]
        merge_email: bool,
    },
    /// Log an account in, for Drawbridge alone: by a code to type in, or with --browser
    Login {
        /// Log in with a browser, on any machine, and paste the address that it ends at
        #[arg(long)]
        browser: bool,
        /// Renew the login of this account; nothing changes if the login is another seat's
        #[arg(long, value_name = "ACCOUNT")]
        account: Option<String>,
        /// A name of your own for the account
        #[arg(long)]
        label: Option<String>,
    },
    /// Show every account
    List,
    /// Take an account out of service; its login is kept fresh
    Pause {
        /// Label, e-mail address, id, or at least 8 digits of the id's start
        account: String,
    },
    /// Put a paused account back into service
    Resume {
        /// Label, e-mail address, id, or at least 8 digits of the id's start
        account: String,
    },
    /// Delete an account and its login
    Delete {
        /// Label, e-mail address, id, or at least 8 digits of the id's start
        account: String,
    },
}

/// Runs a command.
///
/// # Errors
/// What a person at the terminal should read.
pub(super) async fn run(command: AccountsCommand, context: &Context) -> anyhow::Result<()> {
    let accounts = Accounts::new(
        context.db.clone(),
        context.ring.clone(),
        context.installation.pepper.clone(),
    );
    let (id, done) = match command {
        AccountsCommand::Import {
            file,
            label,
            side_by_side,
            merge_email,
        } => {
            let label = label
                .as_deref()
                .map(str::trim)
                .filter(|label| !label.is_empty());
            let policy = Policy {
                by_seat: !side_by_side,
                by_email: merge_email,
            };
            let entries = export::read(&read(&file)?)
                .with_context(|| format!("cannot import {}", file.display()))?;
            return import(context, &accounts, policy, entries, label).await;
        }
        AccountsCommand::Login {
            browser,
            account,
            label,
        } => {
            let wanted = match account {
                Some(account) => Some(find(&accounts.list().await?, &account)?),
                None => None,
            };
            let method = if browser {
                Method::Browser
            } else {
                Method::Device
            };
            return login::run(method, wanted, label.as_deref(), &accounts, context).await;
        }
        AccountsCommand::List => {
            let listed = accounts.list().await?;
            return print(context, &listed, || table(&listed));
        }
        AccountsCommand::Pause { account } => {
            let id = find(&accounts.list().await?, &account)?;
            accounts.pause(id).await?;
            (id, "paused")
        }
        AccountsCommand::Resume { account } => {
            let id = find(&accounts.list().await?, &account)?;
            accounts.resume(id).await?;
            (id, "resumed")
        }
        AccountsCommand::Delete { account } => {
            let id = find(&accounts.list().await?, &account)?;
            accounts.delete(id).await?;
            (id, "deleted")
        }
    };
    print(context, &json!({"id": id, "done": done}), || {
        format!("{id} {done}")
    })
}

fn read(path: &Path) -> anyhow::Result<Zeroizing<Vec<u8>>> {
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?)
    };
    let mut content = Zeroizing::new(Vec::new());
    source
        .take(LARGEST)
        .read_to_end(&mut content)
        .with_context(|| format!("cannot read {}", path.display()))?;
    Ok(content)
}

/// An entry of a file that was stored.
#[derive(Serialize)]
struct Taken {
    /// From 1, in the order of the file.
    entry: usize,
    #[serde(flatten)]
    imported: Imported,
    /// What was set there and is not taken.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left: Vec<&'static str>,
}

/// An entry of a file that was not.
#[derive(Serialize)]
struct Refused {
    entry: usize,
    why: String,
}

/// Stores each entry whole or not at all, and says what became of it.
///
/// # Errors
/// If anything was not stored.
async fn import(
    context: &Context,
    accounts: &Accounts,
    policy: Policy,
    entries: Vec<Entry>,
    label: Option<&str>,
) -> anyhow::Result<()> {
    let count = entries.len();
    if count > 1 && label.is_some() {
        bail!("a label is for one account; this file has {count}");
    }
    let mut entries: Vec<(usize, Entry)> = (1..).zip(entries).collect();
    entries.sort_by_key(|(_, entry)| entry.issued());
    let (mut taken, mut refused) = (Vec::new(), Vec::new());
    for (entry, read) in entries {
        let stored = match &read.login {
            Ok(login) => {
                let label = label.or(read.label.as_deref());
                let stored = accounts.import_by(policy, login, label).await;
                stored.map_err(|error| error.to_string())
            }
            Err(why) => Err(why.to_string()),
        };
        match stored {
            Ok(imported) => taken.push(Taken {
                entry,
                imported,
                left: read.left,
            }),
            Err(why) => refused.push(Refused { entry, why }),
        }
    }
    match (&taken[..], &refused[..]) {
        ([], [Refused { why, .. }]) => bail!("nothing was imported: {why}"),
        ([one], []) => return print(context, one, || told(one)),
        _ => {}
    }
    taken.sort_by_key(|taken| taken.entry);
    refused.sort_by_key(|refused| refused.entry);
    print(
        context,
        &json!({ "imported": taken, "refused": refused }),
        || {
            let taken = taken
                .iter()
                .map(|one| format!("{}: {}", one.entry, line(one)));
            let refused = refused
                .iter()
                .map(|Refused { entry, why }| format!("{entry}: not imported: {why}"));
            let lines: Vec<String> = taken.chain(refused).collect();
            format!("{}\n{AFTER_IMPORT}", lines.join("\n"))
        },
    )?;
    match refused.len() {
        0 => Ok(()),
        some => bail!("{some} of {count} entries were not imported"),
    }
}

/// The account of that label, else of that e-mail address, that id, or an id that begins so.
pub(super) fn find(accounts: &[Listed], name: &str) -> anyhow::Result<AccountId> {
    let digits = |text: &str| text.replace('-', "").to_ascii_lowercase();
    let prefix = digits(name);
    let long_enough = prefix.len() >= PREFIX;
    let labelled = accounts
        .iter()
        .filter(|account| account.label.as_deref() == Some(name));
    let others = accounts.iter().filter(|account| {
        let email = account.email.as_deref().filter(|_| name.contains('@'));
        email.is_some_and(|email| email.eq_ignore_ascii_case(name))
            || long_enough && digits(&account.id.to_string()).starts_with(&prefix)
    });
    let labelled: Vec<_> = labelled.collect();
    let found = if labelled.is_empty() {
        others.collect()
    } else {
        labelled
    };
    match found[..] {
        [account] => Ok(account.id),
        [] => bail!(
            "no account has the label or the e-mail address {name:?} or an id that begins with it (at least {PREFIX} digits)"
        ),
        _ => bail!(
            "{} accounts are named {name:?}: use more digits of the id",
            found.len()
        ),
    }
}

fn print(
    context: &Context,
    value: &impl Serialize,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    say!(
        "{}",
        if context.json {
            serde_json::to_string(value)?
        } else {
            text()
        }
    );
    Ok(())
}

fn told(taken: &Taken) -> String {
    format!("{}\n{AFTER_IMPORT}", line(taken))
}

/// What became of a login.
fn line(Taken { imported, left, .. }: &Taken) -> String {
    let Imported {
        id,
        created,
        merged,
        email,
        label,
        plan,
    } = imported;
    let what = match (created, merged.len()) {
        (true, _) => "imported".to_owned(),
        (false, 0) => "updated: the new tokens replace the old ones".to_owned(),
        (false, 1) => "updated; another account of the same seat is part of it now".to_owned(),
        (false, others) => {
            format!("updated; {others} other accounts of the same seat are part of it now")
        }
    };
    let email = email.as_deref().unwrap_or("no e-mail address");
    let label = label
        .as_ref()
        .map(|label| format!(", {label}"))
        .unwrap_or_default();
    let left = match &left[..] {
        [] => String::new(),
        left => format!("; not taken: {}", left.join(", ")),
    };
    format!("{id} ({email}, {plan}{label}) {what}{left}")
}

/// One line per account under a heading, columns aligned.
fn table(accounts: &[Listed]) -> String {
    let minute = |time: Timestamp| time.strftime("%Y-%m-%d %H:%MZ").to_string();
    let row = |account: &Listed| {
        [
            account.id.to_string(),
            account.label.clone().unwrap_or_default(),
            account.email.clone().unwrap_or_default(),
            account.plan.clone(),
            account.lifecycle.to_string(),
            minute(account.refreshed_at),
            account.access_expires_at.map(minute).unwrap_or_default(),
            account.reason.clone().unwrap_or_default(),
        ]
    };
    let heading = [
        "ID",
        "LABEL",
        "EMAIL",
        "PLAN",
        "STATUS",
        "REFRESHED",
        "EXPIRES",
        "REASON",
    ]
    .map(str::to_owned);
    let rows: Vec<_> = std::iter::once(heading)
        .chain(accounts.iter().map(row))
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; 8] = std::array::from_fn(width);
    let line = |row: &[String; 8]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Lifecycle;

    fn listed(id: &str, label: Option<&str>) -> Listed {
        Listed {
            id: id.parse().unwrap(),
            email: Some(format!("{id}@example.test")),
            label: label.map(str::to_owned),
            plan: "plus".into(),
            lifecycle: Lifecycle::Active,
            reason: None,
            created_at: Timestamp::UNIX_EPOCH,
            refreshed_at: Timestamp::UNIX_EPOCH,
            access_expires_at: None,
        }
    }

    #[test]
    fn an_account_is_named_by_label_or_by_enough_of_its_id() {
        let (one, two) = (
            "019a0000-0000-7000-8000-000000000001",
            "019a0000-0000-7000-8000-000000000002",
        );
        let accounts = [
            listed(one, Some("mine")),
            listed(two, Some("twice")),
            listed("019b0000-0000-7000-8000-000000000003", Some("twice")),
        ];
        for (name, expected) in [
            ("mine", Some(one)),
            (one, Some(one)),
            (
                "019A0000-0000-7000-8000-000000000001@Example.test",
                Some(one),
            ),
            ("?", None),
            ("019A0000-0000-7000-8000-000000000002", Some(two)),
            ("019a0000000070008000000000000002", Some(two)),
            ("019b0000", Some("019b0000-0000-7000-8000-000000000003")),
            ("019b000", None),
            ("019a0000", None),
            ("twice", None),
            ("", None),
            ("nobody's", None),
        ] {
            assert_eq!(
                find(&accounts, name)
                    .ok()
                    .map(|id| id.to_string())
                    .as_deref(),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&[listed("019a0000-0000-7000-8000-000000000001", Some("mine"))]);
        let [heading, row] = text.lines().collect::<Vec<_>>()[..] else {
            panic!("{text}")
        };
        assert_eq!(
            heading.find("EMAIL"),
            row.find("019a0000-0000-7000-8000-000000000001@")
        );
        assert_eq!(heading.find("REFRESHED"), row.find("1970-01-01 00:00Z"));
    }
}
