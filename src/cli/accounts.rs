//! `drawbridge accounts`: imports, lists, sets aside and removes the pool's accounts.

use std::{io::Read as _, path::PathBuf};

use anyhow::{Context as _, bail};
use clap::Subcommand;
use serde_json::json;

use super::Context;
use crate::{
    account::{Accounts, AuthFile, Listed},
    ids::AccountId,
};

/// What to do with accounts.
#[derive(Debug, Subcommand)]
pub(super) enum AccountsCommand {
    /// Take a login over from the Codex CLI's auth.json
    Import {
        /// The file, or - for standard input
        file: PathBuf,
        /// A name for people
        #[arg(long)]
        label: Option<String>,
    },
    /// List every account
    List,
    /// Set an account aside
    Pause {
        /// Beginning of the id (8 digits or more), or the label
        id: String,
    },
    /// Let a paused account serve again
    Resume {
        /// Beginning of the id (8 digits or more), or the label
        id: String,
    },
    /// Remove an account with its tokens
    Delete {
        /// Beginning of the id (8 digits or more), or the label
        id: String,
    },
}

/// Runs one of them.
///
/// # Errors
/// Of the database or the file, or if no account or several are meant.
pub(super) async fn run(command: AccountsCommand, context: &Context) -> anyhow::Result<()> {
    let accounts = Accounts::new(
        context.db.clone(),
        context.ring.clone(),
        context.installation.pepper.clone(),
    );
    match command {
        AccountsCommand::Import { file, label } => {
            import(&accounts, context, &file, label.as_deref()).await
        }
        AccountsCommand::List => list(&accounts.list().await?, context),
        AccountsCommand::Pause { id } => {
            let id = find(&accounts, &id).await?;
            accounts.pause(id).await?;
            done(context, id, "paused");
            Ok(())
        }
        AccountsCommand::Resume { id } => {
            let id = find(&accounts, &id).await?;
            accounts.resume(id).await?;
            done(context, id, "active");
            Ok(())
        }
        AccountsCommand::Delete { id } => {
            let id = find(&accounts, &id).await?;
            accounts.delete(id).await?;
            done(context, id, "deleted");
            Ok(())
        }
    }
}

async fn import(
    accounts: &Accounts,
    context: &Context,
    file: &PathBuf,
    label: Option<&str>,
) -> anyhow::Result<()> {
    let content = if file.as_os_str() == "-" {
        let mut content = Vec::new();
        std::io::stdin()
            .read_to_end(&mut content)
            .context("standard input")?;
        content
    } else {
        std::fs::read(file).with_context(|| file.display().to_string())?
    };
    let login = AuthFile::parse(&content).with_context(|| file.display().to_string())?;
    let imported = accounts.import(&login, label).await?;
    if context.json {
        println!(
            "{}",
            json!({ "id": imported.id, "created": imported.created })
        );
        return Ok(());
    }
    println!(
        "{} account {}",
        if imported.created {
            "imported"
        } else {
            "renewed the login of"
        },
        imported.id
    );
    println!(
        "\nThis login now belongs to Drawbridge: its refresh token works once, so two holders would log each other out. Delete\n\
         {} and do not use it elsewhere. For a login of its own:\n\n    \
         export CODEX_HOME=$(mktemp -d)\n    codex login\n    drawbridge accounts import \"$CODEX_HOME/auth.json\"\n    rm -r \"$CODEX_HOME\"",
        file.display()
    );
    Ok(())
}

fn list(accounts: &[Listed], context: &Context) -> anyhow::Result<()> {
    if context.json {
        println!("{}", serde_json::to_string(accounts)?);
        return Ok(());
    }
    println!(
        "{:<38}{:<16}{:<30}{:<10}{:<18}ACCESS TOKEN",
        "ID", "LABEL", "E-MAIL", "PLAN", "STATUS"
    );
    for account in accounts {
        println!(
            "{:<38}{:<16}{:<30}{:<10}{:<18}{}",
            account.id.to_string(),
            account.label.as_deref().unwrap_or("-"),
            account.email.as_deref().unwrap_or("-"),
            account.plan,
            account.status,
            account
                .access_expires_at
                .map_or_else(|| "-".into(), |end| format!("until {end:.0}")),
        );
        if let Some(reason) = &account.reason {
            println!("{:<38}{reason}", "");
        }
    }
    Ok(())
}

/// The one account whose label is, or whose id begins with, `text`.
async fn find(accounts: &Accounts, text: &str) -> anyhow::Result<AccountId> {
    let all = accounts.list().await?;
    let prefix = (text.len() >= 8).then_some(text.to_ascii_lowercase());
    let meant = |account: &&Listed| {
        account.label.as_deref() == Some(text)
            || prefix
                .as_ref()
                .is_some_and(|prefix| account.id.to_string().starts_with(prefix.as_str()))
    };
    let found: Vec<_> = all.iter().filter(meant).collect();
    match found.as_slice() {
        [one] => Ok(one.id),
        [] => {
            bail!("no account has the label `{text}`, or an id that begins so (8 digits or more)")
        }
        _ => bail!("`{text}` means several accounts; give more of the id"),
    }
}

fn done(context: &Context, id: AccountId, status: &str) {
    if context.json {
        println!("{}", json!({ "id": id, "status": status }));
    } else {
        println!("account {id} is {status}");
    }
}
