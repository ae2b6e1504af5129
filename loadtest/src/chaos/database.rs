//! What the database says: leases while the clients talk, and everything at the end.

use std::collections::BTreeMap;

use anyhow::Context as _;
use serde_json::Value;
use tokio_postgres::{Client, NoTls};

use super::history::{Booked, Lease, Turn};

/// A connection past all edges.
pub(super) async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    // Ends with the client.
    tokio::spawn(connection);
    Ok(client)
}

/// Leases that moved in the last seconds, or all.
pub(super) async fn leases(client: &Client, all: bool) -> anyhow::Result<Vec<Lease>> {
    let query = "
        select lease_id::text, generation, owner_boot::text, r.dead_at is not null, busy_turn::text
        from http_bridge_leases l left join bridge_replicas r on r.boot_id = l.owner_boot
        where $1 or last_turn_at > clock_timestamp() - interval '20 s'";
    let rows = client.query(query, &[&all]).await?;
    let lease = |row: &tokio_postgres::Row| Lease {
        id: row.get(0),
        generation: row.get(1),
        owner: row.get(2),
        dead: row.get(3),
        busy: row.get(4),
    };
    Ok(rows.iter().map(lease).collect())
}

/// Which replica an incarnation is of, by the number in its name.
pub(super) async fn boots(client: &Client) -> anyhow::Result<BTreeMap<String, usize>> {
    let query = "select boot_id::text, replica_name from bridge_replicas";
    let rows = client.query(query, &[]).await?;
    let boot = |row: &tokio_postgres::Row| {
        let name: &str = row.get(1);
        let number = name.trim_start_matches(|char: char| !char.is_ascii_digit());
        Ok((row.get(0), number.parse()?))
    };
    rows.iter().map(boot).collect()
}

/// How many turns are open, or leases busy that a living replica owns.
pub(super) async fn unfinished(client: &Client) -> anyhow::Result<i64> {
    let query = "
        select (select count(*) from turns where state = 'open') + (
            select count(*) from http_bridge_leases l left join bridge_replicas r on r.boot_id = l.owner_boot
            where l.busy_turn is not null and r.dead_at is null)";
    Ok(client.query_one(query, &[]).await?.get(0))
}

/// The accounts: name by id.
pub(super) async fn accounts(client: &Client) -> anyhow::Result<BTreeMap<String, String>> {
    let rows = client
        .query("select account_id::text, label from accounts", &[])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// The ledger. Which message a turn answers is known from the client's own word, or from the log of its requests.
pub(super) async fn turns(
    client: &Client,
    accounts: &BTreeMap<String, String>,
) -> anyhow::Result<Vec<Turn>> {
    let query = "
        select to_jsonb(t) || jsonb_build_object(
            'opened', (extract(epoch from opened_at) * 1000)::bigint,
            'settled', (extract(epoch from settled_at) * 1000)::bigint,
            'user_agent', (select max(user_agent) from request_log l where l.turn_id = t.turn_id))
        from turns t order by turn_id";
    let rows = client.query(query, &[]).await?;
    rows.iter().map(|row| turn(&row.get(0), accounts)).collect()
}

fn turn(row: &Value, accounts: &BTreeMap<String, String>) -> anyhow::Result<Turn> {
    let text = |name: &str| row[name].as_str().map(str::to_owned);
    let must = |name: &str| text(name).with_context(|| format!("a turn without {name}"));
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let id = must("turn_id")?;
    let born = id
        .replace('-', "")
        .get(..12)
        .map(|hex| u64::from_str_radix(hex, 16));
    let agent = text("user_agent");
    let told = agent.and_then(|agent| Some(agent.split_once("tag=")?.1.to_owned()));
    let booked = |attempt: &Value| Booked {
        account: attempt["account_id"]
            .as_str()
            .and_then(|id| accounts.get(id))
            .cloned()
            .unwrap_or_default(),
        boot: attempt["boot_id"].as_str().unwrap_or_default().to_owned(),
        class: attempt["class"].as_str().map(str::to_owned),
        usage: ["input", "cached_input", "output", "reasoning"]
            .map(|part| count(&attempt["usage"][part])),
        estimated: attempt["estimated"] == true,
    };
    Ok(Turn {
        tag: text("client_turn_id").or_else(|| told.filter(|_| row["transport"] == "http")),
        client_turn: text("client_turn_id"),
        state: must("state")?,
        outcome: text("outcome"),
        response: text("response_id"),
        request: must("request_id")?,
        lease: text("lease_id"),
        generation: row["generation"].as_i64(),
        boot: must("boot_id")?,
        attempts: row["attempts"]
            .as_array()
            .into_iter()
            .flatten()
            .map(booked)
            .collect(),
        sums: [
            "input_tokens",
            "cached_input_tokens",
            "output_tokens",
            "reasoning_tokens",
        ]
        .map(|part| count(&row[part])),
        born: born.context("a turn's id")??,
        opened: count(&row["opened"]),
        settled: row["settled"].as_u64(),
        id,
    })
}

/// How often conversations came to what, by `bridge_outcome` of the request log.
pub(super) async fn outcomes(client: &Client) -> anyhow::Result<BTreeMap<String, u64>> {
    let query = "
        select coalesce(bridge_outcome, '-') || ' ' || coalesce(bridge_reason, '-'), count(*) from request_log group by 1";
    let rows = client.query(query, &[]).await?;
    let counted = |row: &tokio_postgres::Row| {
        let count = u64::try_from(row.get::<_, i64>(1)).unwrap_or_default();
        (row.get(0), count)
    };
    Ok(rows.iter().map(counted).collect())
}
