//! `drawbridge keys rotate-master`: seals what is stored under the ring's first key, while the service runs.
//!
//! It begins only when every process that may run seals under that key already, so that nothing is sealed under another one behind its
//! back, and nobody is left who could not open what it writes. It ends with a count, and says of each other key whether it can go.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::bail;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde_json::json;

use crate::{
    cli::Context,
    db::{
        self,
        sealed::{Counts, Done, Pass, SEALED},
    },
    replica::{self, Listed, Timing},
    secret::KeyRing,
};

/// How long a turn-state token finds its conversation by itself.
const TOKENS: SignedDuration = SignedDuration::from_hours(24);
/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// A column and what became of it.
#[derive(Serialize)]
struct Column {
    table: &'static str,
    column: &'static str,
    /// Nothing in a dry run.
    #[serde(flatten)]
    done: Option<Done>,
    /// By key, after the pass.
    values: Counts,
}

/// What is to be known of a key that does not seal any more.
#[derive(Debug, PartialEq, Serialize)]
struct Retiring {
    key: String,
    /// Values under it.
    values: i64,
    /// Whether the ring has it.
    listed: bool,
    /// Until when turn-state tokens that it signed find conversations by themselves; none = there are none.
    tokens_until: Option<Timestamp>,
}

/// Runs it.
///
/// # Errors
/// If a process would be left behind, of the database, or if values stay under another key.
pub(super) async fn run(dry_run: bool, context: &Context) -> anyhow::Result<()> {
    let Context { db, ring, json, .. } = context;
    let replicas = replica::list(db, Timing::FULL).await?;
    let behind = behind(&ring.fingerprints(), &replicas);
    if !dry_run && !behind.is_empty() {
        bail!(
            "nothing was changed: every replica must have `{}` first in its master keys\n  {}\n\
             add the new key behind the others everywhere, restart one replica after the other, put it first, restart again, then come back",
            ring.current_id(),
            behind.join("\n  ")
        );
    }
    let mut columns = Vec::new();
    for sealed in SEALED {
        let mut pass = sealed.pass(db, ring);
        if !dry_run {
            reseal(&mut pass, &format!("{}.{}", sealed.table, sealed.column)).await?;
        }
        columns.push(Column {
            table: sealed.table,
            column: sealed.column,
            done: (!dry_run).then_some(pass.done),
            values: sealed.count(db).await?,
        });
    }
    let retiring = retiring(ring, &columns, &replicas, db.clock().now());
    if *json {
        let keys = json!({ "current": ring.current_id(), "dry_run": dry_run, "behind": behind, "columns": columns, "others": retiring });
        say!("{keys}");
    } else {
        print(ring, &columns, &retiring, &behind);
    }
    let left: i64 = retiring.iter().map(|key| key.values).sum();
    if !dry_run && left > 0 {
        bail!("{left} values are still sealed under another key; what was said above is why");
    }
    Ok(())
}

/// Runs a pass to its end, and tells how it goes. As much rest as work: the service comes first, and a slow database gets more of it.
async fn reseal(pass: &mut Pass<'_>, name: &str) -> Result<(), db::Error> {
    let mut told = Instant::now();
    loop {
        let began = Instant::now();
        let more = pass.step().await?;
        if told.elapsed() > PROGRESS {
            told = Instant::now();
            let Done { seen, resealed, .. } = pass.done;
            eprintln!("{name}: {resealed} of {seen} sealed anew");
        }
        if !more {
            break;
        }
        tokio::time::sleep(began.elapsed()).await;
    }
    for reason in &pass.reasons {
        eprintln!("left as it is: {reason}");
    }
    Ok(())
}

/// The processes that may run and do not seal under the first key of `ring`, in words.
fn behind(ring: &[String], replicas: &[Listed]) -> Vec<String> {
    let first = ring.first().map(String::as_str).unwrap_or_default();
    let id = |fingerprint: &str| fingerprint.split(':').next().unwrap_or_default().to_owned();
    let why = |replica: &Listed| {
        let Some(keys) = &replica.master_keys else {
            return Some("is of a release that does not say which keys it has".to_owned());
        };
        let named: Vec<String> = keys.iter().map(|key| id(key)).collect();
        match keys.iter().position(|key| key == first) {
            Some(0) => None,
            Some(_) => Some(format!("still seals under `{}`", named[0])),
            None if named.contains(&id(first)) => {
                Some(format!("has another key under the id `{}`", id(first)))
            }
            None => Some(format!("has only {}", named.join(", "))),
        }
    };
    replicas
        .iter()
        .filter(|replica| replica.may_run())
        .filter_map(|replica| {
            Some(format!(
                "{} ({}) {}",
                replica.name,
                replica.state,
                why(replica)?
            ))
        })
        .collect()
}

/// Every key but the first: of the ring, and of what is stored.
fn retiring(
    ring: &KeyRing,
    columns: &[Column],
    replicas: &[Listed],
    now: Timestamp,
) -> Vec<Retiring> {
    let mut values: BTreeMap<&str, i64> = ring.ids().map(|id| (id, 0)).collect();
    for (id, count) in columns.iter().flat_map(|column| &column.values) {
        *values.entry(id).or_default() += count;
    }
    values.remove(ring.current_id());
    let signed_until = |key: &str| {
        let signs = |replica: &&Listed| {
            let first = replica.master_keys.as_ref().and_then(|keys| keys.first());
            first.is_none_or(|first| first.split(':').next() == Some(key))
        };
        let ended = replicas
            .iter()
            .filter(signs)
            .map(|replica| replica.dead_at.unwrap_or(now));
        let until = ended.max()?.saturating_add(TOKENS).ok()?;
        (until > now).then_some(until)
    };
    let retiring = values.into_iter().map(|(key, values)| Retiring {
        key: key.to_owned(),
        values,
        listed: ring.ids().any(|id| id == key),
        tokens_until: signed_until(key),
    });
    retiring.collect()
}

fn print(ring: &KeyRing, columns: &[Column], retiring: &[Retiring], behind: &[String]) {
    say!("{:<36}  {:>9}  SEALED UNDER", "COLUMN", "SEALED NOW");
    for column in columns {
        let done = column
            .done
            .map_or_else(|| "-".to_owned(), |done| done.resealed.to_string());
        let values: Vec<_> = column
            .values
            .iter()
            .map(|(key, count)| format!("{key}: {count}"))
            .collect();
        let name = format!("{}.{}", column.table, column.column);
        say!(
            "{name:<36}  {done:>10}  {}",
            if values.is_empty() {
                "-".to_owned()
            } else {
                values.join(", ")
            }
        );
    }
    say!("\n{} seals.", ring.current_id());
    for key in retiring {
        say!("{}", told(key));
    }
    for replica in behind {
        say!("{replica}.");
    }
}

/// What a person should know of a key that does not seal any more.
fn told(retiring: &Retiring) -> String {
    let Retiring {
        key,
        values,
        listed,
        tokens_until,
    } = retiring;
    if *values > 0 {
        let there = if *listed {
            "keep it in the ring"
        } else {
            "it is not in the ring: they cannot be read"
        };
        return format!("{key}: {values} values are sealed under it; {there}.");
    }
    let mut text = format!("{key}: nothing is sealed under it; it may be taken out of the ring.");
    if let Some(until) = tokens_until {
        let until = until.strftime("%Y-%m-%d %H:%M UTC");
        text.push_str(&format!(
            " Turn-state tokens that it signed are good while it is there, until {until} at the latest.\n    Taken out sooner, \
             a conversation that is named by such a token alone begins anew; one that names its response is told again or refused (409)."
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::BootId;

    fn at(hours: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + hours * 3600).unwrap()
    }

    fn replica(keys: Option<&[&str]>, dead_at: Option<Timestamp>) -> Listed {
        Listed {
            boot_id: BootId::new(),
            name: "r0".into(),
            endpoint: None,
            started_at: at(-100),
            heartbeat_age_seconds: 1.0,
            state: "alive".into(),
            dead_at,
            version: None,
            master_keys: keys.map(|keys| keys.iter().map(|key| (*key).to_owned()).collect()),
        }
    }

    #[test]
    fn whoever_does_not_seal_under_the_new_key_is_named() {
        let ring = ["k2:22222222".to_owned(), "k1:11111111".to_owned()];
        for (keys, dead, expected) in [
            (Some(&["k2:22222222", "k1:11111111"][..]), false, None),
            (Some(&["k2:22222222"]), false, None),
            (
                Some(&["k1:11111111", "k2:22222222"]),
                false,
                Some("r0 (alive) still seals under `k1`"),
            ),
            (
                Some(&["k1:11111111"]),
                false,
                Some("r0 (alive) has only k1"),
            ),
            (
                Some(&["k2:33333333", "k1:11111111"]),
                false,
                Some("r0 (alive) has another key under the id `k2`"),
            ),
            (
                None,
                false,
                Some("r0 (alive) is of a release that does not say which keys it has"),
            ),
            (Some(&["k1:11111111"]), true, None),
        ] {
            let replica = replica(keys, dead.then(|| at(0)));
            assert_eq!(behind(&ring, &[replica]), Vec::from_iter(expected));
        }
    }

    #[test]
    fn a_key_can_go_when_nothing_is_sealed_under_it_and_its_tokens_have_a_day() {
        let ring = loop {
            // Two random keys share their short id once in 256 draws.
            let [a, b] = ["k2", "k1"].map(KeyRing::generate);
            let text = format!(
                "{},{}",
                secrecy::ExposeSecret::expose_secret(&a),
                secrecy::ExposeSecret::expose_secret(&b)
            );
            if let Ok(ring) = KeyRing::parse(&text.into()) {
                break ring;
            }
        };
        let column = |values: &[(&str, i64)]| Column {
            table: "t",
            column: "c",
            done: None,
            values: values
                .iter()
                .map(|(key, count)| ((*key).to_owned(), *count))
                .collect(),
        };
        let old = |dead_at| replica(Some(&["k1:11111111"]), dead_at);
        let new = replica(Some(&["k2:22222222"]), None);
        for (values, replicas, expected) in [
            (&[("k2", 3)][..], vec![new.clone()], (0, None)),
            (&[("k2", 3), ("k1", 2)], vec![new.clone()], (2, None)),
            (
                &[("k2", 3)],
                vec![new.clone(), old(Some(at(-1)))],
                (0, Some(at(23))),
            ),
            (&[("k2", 3)], vec![new, old(Some(at(-24)))], (0, None)),
            (
                &[("k2", 3)],
                vec![old(None), old(Some(at(-3)))],
                (0, Some(at(24))),
            ),
            (
                &[("k2", 3)],
                vec![replica(None, Some(at(-2)))],
                (0, Some(at(22))),
            ),
        ] {
            let found = retiring(&ring, &[column(values)], &replicas, at(0));
            let [one] = &found[..] else {
                panic!("{found:?}")
            };
            assert_eq!((one.key.as_str(), one.listed), ("k1", true));
            assert_eq!((one.values, one.tokens_until), expected);
        }
        let lost = retiring(&ring, &[column(&[("k0", 1)])], &[], at(0));
        assert!(told(&lost[0]).contains("k0: 1 values are sealed under it; it is not in the ring"));
    }
}
