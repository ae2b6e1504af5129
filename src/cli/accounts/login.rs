//! `drawbridge accounts login`: says what the person has to do, and waits until they have.

use std::{io::Write as _, time::Duration};

use anyhow::{Context as _, bail};
use serde_json::json;

use super::print;
use crate::{
    account::{
        Accounts,
        flow::{Flow, Method, Standing},
    },
    cli::Context,
    ids::AccountId,
    task::{self, Tasks},
    upstream::login::{Begun, Error, Logins},
};

/// Logs an account in. As JSON it prints one line when it has begun and one when it is over.
///
/// # Errors
/// What a person at the terminal should read.
pub(super) async fn run(
    method: Method,
    wanted: Option<AccountId>,
    label: Option<&str>,
    accounts: &Accounts,
    context: &Context,
) -> anyhow::Result<()> {
    let logins = Logins::new(&context.upstream, accounts, &Tasks::new())?;
    let begun = logins.begin(method, wanted, label).await?;
    print(context, &begun, || told(&begun))?;
    let flow = match method {
        Method::Device => approved(&logins, &begun).await?,
        Method::Browser => brought_back(&logins, &begun, context.json).await?,
    };
    let Some(account) = flow.account_id else {
        bail!("{}", ended(&flow));
    };
    let done = match (flow.created, wanted) {
        (Some(true), _) => "logged in",
        (_, None) => "logged in: it was known, its new tokens replace the old ones",
        (_, Some(_)) => "logged in again",
    };
    print(context, &flow, || format!("{account} {done}"))
}

fn told(begun: &Begun) -> String {
    match &begun.user_code {
        Some(code) => format!(
            "Open {} in any browser, log in with the account that Drawbridge should use, and type in this code:\n\n    {code}\n\n\
             Waiting until {} ...",
            begun.url,
            begun.expires_at.strftime("%H:%MZ")
        ),
        None => format!(
            "Open this address in any browser, and log in with the account that Drawbridge should use:\n\n{}\n\n\
             The browser ends at an address that begins with http://localhost:1455/ and that it may not be able to show. \
             Copy all of it from the address bar.",
            begun.url
        ),
    }
}

/// Asks after a device's login until it is over.
async fn approved(logins: &Logins, begun: &Begun) -> anyhow::Result<Flow> {
    let mut interval = begun.interval_seconds;
    loop {
        let seconds = u64::try_from(interval).unwrap_or(1).max(1);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let flow = logins.status(begun.id).await?;
        if flow.status != Standing::Pending {
            return Ok(flow);
        }
        interval = flow.interval_seconds;
    }
}

/// Reads addresses from the terminal until one finishes the login.
async fn brought_back(logins: &Logins, begun: &Begun, json: bool) -> anyhow::Result<Flow> {
    loop {
        if !json {
            print!("Address: ");
            std::io::stdout().flush()?;
        }
        let line = task::blocking(|| {
            let mut line = String::new();
            let read = std::io::stdin().read_line(&mut line);
            read.map(|bytes| (bytes > 0).then_some(line))
        });
        let Some(line) = line.await.context("cannot read the address")? else {
            logins.cancel(begun.id).await?;
            bail!("no address was given; the login is called off");
        };
        match logins.complete(begun.id, &line).await {
            Ok(flow) => return Ok(flow),
            Err(
                error @ (Error::NoCallback | Error::OtherLogin | Error::Busy | Error::Upstream(_)),
            ) if logins.status(begun.id).await?.status == Standing::Pending => {
                if json {
                    say!("{}", json!({ "error": error.to_string() }));
                } else {
                    say!("{error}");
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn ended(flow: &Flow) -> String {
    match (flow.status, flow.error.as_deref()) {
        (Standing::Expired, _) => "the time for this login is over; begin again".to_owned(),
        (Standing::Cancelled, _) => "the login was called off".to_owned(),
        (_, Some("other_seat")) => Error::OtherSeat.to_string(),
        (_, Some(code)) => format!("the login failed ({code})"),
        (_, None) => "the login failed".to_owned(),
    }
}
