//! What was seen, and what that means: functions of values, without I/O.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use jiff::SignedDuration;
use serde::Serialize;

use crate::{
    db::{
        DIRECT_CONNECTIONS, MAIN_CONNECTIONS, Migration,
        probe::{Direct, Server, Stored},
        sealed::Counts,
    },
    replica::{Listed, VERSION},
    routing::Lifecycle,
};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// As it should be.
    Ok,
    /// It works, and should be looked at.
    Warn,
    /// Something does not work.
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Finding {
    pub(super) verdict: Verdict,
    /// What was looked at.
    pub(super) name: String,
    pub(super) seen: String,
    /// What to do; empty where there is nothing to do.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub(super) advice: &'static str,
}

const UNBUFFERED: &str = "do not buffer answers (nginx: proxy_buffering off)";

/// Nothing to do.
pub(super) fn ok(name: impl Into<String>, seen: impl Into<String>) -> Finding {
    find(Verdict::Ok, name, seen, "")
}

/// To be looked at.
pub(super) fn warn(
    name: impl Into<String>,
    seen: impl Into<String>,
    advice: &'static str,
) -> Finding {
    find(Verdict::Warn, name, seen, advice)
}

/// Broken.
pub(super) fn fail(
    name: impl Into<String>,
    seen: impl Into<String>,
    advice: &'static str,
) -> Finding {
    find(Verdict::Fail, name, seen, advice)
}

fn find(
    verdict: Verdict,
    name: impl Into<String>,
    seen: impl Into<String>,
    advice: &'static str,
) -> Finding {
    Finding {
        verdict,
        name: name.into(),
        seen: seen.into(),
        advice,
    }
}

/// `unknown`: sentences about names that are no settings.
pub(super) fn settings(unknown: &[String]) -> Finding {
    match unknown {
        [] => ok("settings", "every name is known"),
        names => fail(
            "settings",
            names.join("; "),
            "correct or remove these names: they have no effect",
        ),
    }
}

/// The server behind one of the URLs.
pub(super) fn server(name: &str, server: &Server) -> Finding {
    let Server {
        version,
        standby,
        tls,
        local,
        ..
    } = server;
    let protected = match (tls, local) {
        (true, _) => "TLS",
        (false, true) => "no TLS, on this machine",
        (false, false) => "no TLS",
    };
    let seen = format!(
        "Postgres {}.{}, {protected}",
        version / 10_000,
        version % 10_000
    );
    if *version < 140_000 {
        fail(name, seen, "use Postgres 14 or newer")
    } else if *standby {
        fail(
            name,
            format!("{seen}, a standby"),
            "point the URL at the primary, or promote this server",
        )
    } else if !tls && !local {
        warn(
            name,
            seen,
            "add sslmode=verify-full (or require) to the URL",
        )
    } else {
        ok(name, seen)
    }
}

/// The direct URL. `same`: it is the pooled one.
pub(super) fn direct(direct: Direct, redis: bool) -> Finding {
    let name = "direct-url";
    match (direct, redis) {
        (
            Direct {
                sessions: true,
                hears: true,
            },
            _,
        ) => ok(name, "no pooler in between; notifications arrive"),
        (_, false) => warn(
            name,
            "a pooler: notifications do not arrive, so changes are polled for every 500 ms",
            "set DRAWBRIDGE_DATABASE_DIRECT_URL to Postgres itself, or DRAWBRIDGE_REDIS_URL",
        ),
        (_, true) => warn(
            name,
            "a pooler: heartbeats queue behind other work, notifications come by Redis alone",
            "set DRAWBRIDGE_DATABASE_DIRECT_URL to Postgres itself",
        ),
    }
}

/// Whether the server has room for the fleet. `pooled`: ordinary work goes through a pooler.
pub(super) fn connections(server: &Server, replicas: usize, pooled: bool) -> Finding {
    let each = if pooled {
        DIRECT_CONNECTIONS
    } else {
        DIRECT_CONNECTIONS + MAIN_CONNECTIONS
    };
    // One more is rolled in while another leaves, and commands need some, too.
    let needed = (replicas + 1) * each + 5;
    let beside = if pooled {
        " beside the pooler's own"
    } else {
        ""
    };
    let seen = format!(
        "{} allowed, {} open; a rollout of {replicas} needs {needed}{beside}",
        server.connections, server.used
    );
    if usize::try_from(server.connections).unwrap_or(0) < needed {
        fail(
            "connections",
            seen,
            "raise max_connections, or put a pooler in between",
        )
    } else {
        ok("connections", seen)
    }
}

/// How far this host's clock is from the database's.
pub(super) fn clock(offset: SignedDuration) -> Finding {
    let seen = format!(
        "the database is {:+.3} s from this host",
        offset.as_secs_f64()
    );
    match offset.unsigned_abs() {
        off if off > Duration::from_secs(60) => fail(
            "clock",
            seen,
            "run NTP on both: limits and expiries are counted by the database's clock",
        ),
        off if off > Duration::from_secs(2) => warn("clock", seen, "run NTP on both"),
        _ => ok("clock", seen),
    }
}

/// What was applied against what this program brings.
pub(super) fn schema(ours: &[Migration], applied: &[Migration]) -> Finding {
    let name = "schema";
    let of = |version| {
        ours.iter()
            .find(|migration: &&Migration| migration.version == version)
    };
    let divergent = applied
        .iter()
        .find(|one| of(one.version).is_some_and(|ours| ours != *one));
    let newest = applied.last().map_or(0, |migration| migration.version);
    let known = ours.last().map_or(0, |migration| migration.version);
    if let Some(Migration { version, .. }) = divergent {
        let seen = format!("V{version} was applied with another text than this release has");
        fail(
            name,
            seen,
            "use the release that migrated this database; never edit a migration",
        )
    } else if newest > known {
        warn(
            name,
            format!("V{newest} is of a newer release; this one knows V{known}"),
            "finish the rollout",
        )
    } else if newest < known {
        fail(
            name,
            format!("V{newest}, this release needs V{known}"),
            "run `drawbridge migrate`",
        )
    } else {
        ok(name, format!("V{newest}, as this release has it"))
    }
}

/// The master keys against what is stored: `counts` over all sealed columns, `current` seals, `ring` opens.
pub(super) fn sealed(counts: &Counts, current: &str, ring: &[&str]) -> Finding {
    let listed: Vec<String> = counts
        .iter()
        .map(|(key, count)| format!("{count} values under `{key}`"))
        .collect();
    let seen = if listed.is_empty() {
        "nothing is sealed yet".to_owned()
    } else {
        listed.join(", ")
    };
    if counts.keys().any(|key| !ring.contains(&key.as_str())) {
        fail(
            "sealed",
            format!("{seen}; not all of these keys are in the ring"),
            "put the missing key back behind the others, then run `drawbridge keys rotate-master`",
        )
    } else if counts.keys().any(|key| key != current) {
        warn(
            "sealed",
            format!("{seen}; `{current}` seals"),
            "run `drawbridge keys rotate-master` when every replica has the first key first",
        )
    } else {
        ok("sealed", seen)
    }
}

/// The processes that share the database, by what they say of themselves. `keys`: fingerprints of our ring.
pub(super) fn replicas(listed: &[Listed], keys: &[String], late: Duration) -> Vec<Finding> {
    let running: Vec<&Listed> = listed.iter().filter(|replica| replica.may_run()).collect();
    if running.is_empty() {
        return vec![warn("replicas", "none runs", "start `drawbridge serve`")];
    }
    let ages = running.iter().map(|replica| {
        format!(
            "{} {} {:.1} s",
            replica.name, replica.state, replica.heartbeat_age_seconds
        )
    });
    let ages = ages.collect::<Vec<_>>().join(", ");
    let silent = |replica: &&Listed| {
        replica.state == "silent" || replica.heartbeat_age_seconds > late.as_secs_f64()
    };
    let beats = if running.iter().any(silent) {
        warn(
            "heartbeats",
            ages,
            "look into the log of those that are late; peers declare them dead within seconds",
        )
    } else {
        ok("heartbeats", ages)
    };
    let mut versions: BTreeMap<&str, usize> = BTreeMap::new();
    for replica in &running {
        *versions
            .entry(replica.version.as_deref().unwrap_or("unknown"))
            .or_default() += 1;
    }
    let told: Vec<String> = versions
        .iter()
        .map(|(version, count)| format!("{count} of {version}"))
        .collect();
    let versions = if versions.len() > 1 || !versions.contains_key(VERSION) {
        warn(
            "versions",
            format!("{}; this program is {VERSION}", told.join(", ")),
            "finish the rollout; two releases side by side are fine meanwhile",
        )
    } else {
        ok("versions", told.join(", "))
    };
    vec![beats, versions, rings(&running, keys)]
}

/// Whether everybody opens what anybody seals, which is under a ring's first key, and will when another key comes first.
fn rings(running: &[&Listed], ours: &[String]) -> Finding {
    let theirs = running.iter().filter_map(|replica| {
        let keys = replica.master_keys.as_deref()?;
        (!keys.is_empty()).then_some((replica.name.as_str(), keys))
    });
    let rings: Vec<(&str, &[String])> = [("this ring", ours)].into_iter().chain(theirs).collect();
    let lacking = |wanted: &BTreeSet<&String>| {
        let lacks = |(name, keys): &(&str, &[String])| {
            let missing = wanted.iter().filter(|key| !keys.contains(key));
            let missing: Vec<&str> = missing.map(|key| key.as_str()).collect();
            (!missing.is_empty()).then(|| format!("{name} lacks {}", missing.join(", ")))
        };
        rings
            .iter()
            .filter_map(lacks)
            .collect::<Vec<_>>()
            .join("; ")
    };
    let sealing = lacking(&rings.iter().filter_map(|(_, keys)| keys.first()).collect());
    let known = lacking(&rings.iter().flat_map(|(_, keys)| *keys).collect());
    if !sealing.is_empty() {
        fail(
            "rings",
            format!("{sealing}, under which others seal"),
            "give all the same master keys; add a new one behind the others first",
        )
    } else if !known.is_empty() {
        warn(
            "rings",
            known,
            "put no key first that somebody lacks; once all have the same, every replica opens what the others seal",
        )
    } else {
        ok("rings", "every replica opens what the others seal")
    }
}

/// Whether another replica answers at its internal URL.
pub(super) fn peer(name: &str, endpoint: Option<&str>, answer: Result<u16, String>) -> Finding {
    let line = format!("peer {name}");
    match (endpoint, answer) {
        (None, _) => warn(
            line,
            "takes no turns from others",
            "set DRAWBRIDGE_INTERNAL_LISTEN, so that conversations need not move to where a request arrives",
        ),
        // The internal listener serves one path by POST and knows no other.
        (Some(url), Ok(404)) => ok(line, format!("{url} answers")),
        (Some(url), Ok(status)) => fail(
            line,
            format!("{url} answers {status}, which no replica does"),
            "correct DRAWBRIDGE_INTERNAL_URL, or what stands in between",
        ),
        (Some(url), Err(error)) => fail(
            line,
            format!("{url} does not answer: {error}"),
            "open the internal port between replicas (run doctor where they run)",
        ),
    }
}

/// What is stored. `retention` in days.
pub(super) fn stored(stored: &Stored, retention: u16) -> Vec<Finding> {
    let Stored {
        orphaned_leases,
        log_days,
        log_bytes,
        snapshot_bytes,
        database_bytes,
    } = stored;
    let leases = match orphaned_leases {
        0 => ok("leases", "none waits for a dead owner"),
        some => warn(
            "leases",
            format!("{some} with a turn of an owner that is dead"),
            "their next requests claim them; if one is refused, `drawbridge leases release`",
        ),
    };
    let mib = |bytes: &i64| bytes >> 20;
    let seen = format!(
        "request log {} MiB, {} days old of {retention}; snapshots {} MiB; database {} MiB",
        mib(log_bytes),
        log_days.unwrap_or(0),
        mib(snapshot_bytes),
        mib(database_bytes),
    );
    let volume = if log_days.unwrap_or(0) > i32::from(retention) + 2 {
        warn(
            "volume",
            seen,
            "old rows are not deleted: does a replica run, and what does its log say?",
        )
    } else {
        ok("volume", seen)
    };
    vec![leases, volume]
}

/// The pool.
pub(super) fn accounts(lifecycles: &[Lifecycle]) -> Finding {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for lifecycle in lifecycles {
        *counts.entry(lifecycle.to_string()).or_default() += 1;
    }
    let told: Vec<String> = counts
        .iter()
        .map(|(status, count)| format!("{count} {status}"))
        .collect();
    if !lifecycles.contains(&Lifecycle::Active) {
        let seen = if told.is_empty() {
            "none".to_owned()
        } else {
            told.join(", ")
        };
        return warn(
            "accounts",
            seen,
            "nobody is served: `drawbridge accounts login`, or `accounts import`",
        );
    }
    if lifecycles.contains(&Lifecycle::ReauthRequired) {
        return warn(
            "accounts",
            told.join(", "),
            "`drawbridge accounts login --account ACCOUNT` renews a login",
        );
    }
    ok("accounts", told.join(", "))
}

/// An origin that the service asks, and its answer to a question without credentials.
pub(super) fn origin(name: &str, url: &str, answer: Result<(u16, Duration), String>) -> Finding {
    match answer {
        Ok((status, took)) if status < 500 => ok(
            name,
            format!(
                "{url} answers {status} in {} ms (asked without credentials)",
                took.as_millis()
            ),
        ),
        Ok((status, _)) => warn(
            name,
            format!("{url} answers {status}"),
            "upstream, or a proxy in between, has trouble",
        ),
        Err(error) => fail(
            name,
            format!("{url}: {error}"),
            "open the way out (DNS, firewall, HTTPS_PROXY and NO_PROXY, DRAWBRIDGE_CA_FILE)",
        ),
    }
}

/// When the pieces of an answer came, counted from the question.
pub(super) fn stream(arrived: &[Duration]) -> Finding {
    let [first, .., last] = arrived else {
        return warn(
            "through-sse",
            "the whole answer came as one piece",
            UNBUFFERED,
        );
    };
    let spread = last.saturating_sub(*first);
    let seen = format!("{} pieces over {} ms", arrived.len(), spread.as_millis());
    if spread < Duration::from_millis(10) {
        warn("through-sse", seen, UNBUFFERED)
    } else {
        ok("through-sse", seen)
    }
}

/// Open files of this process' kind; none = unlimited.
pub(super) fn files(limit: Option<u64>, sessions: usize) -> Finding {
    // Client and upstream sockets of every session, and what else is open: requests without a session, peers, databases.
    let needed = sessions as u64 * 2 + 1024;
    match limit {
        None => ok("files", "no limit"),
        Some(limit) if limit < needed => warn(
            "files",
            format!("{limit} at once here; {sessions} sessions need {needed}"),
            "raise the limit of the service (LimitNOFILE=, ulimit -n), or lower DRAWBRIDGE_MAX_SESSIONS",
        ),
        Some(limit) => ok(
            "files",
            format!("{limit} at once here; {sessions} sessions need {needed}"),
        ),
    }
}

/// Who may read the file with the master keys, by its mode. `generated`: it is ours alone.
pub(super) fn key_file(path: &str, mode: u32, generated: bool) -> Finding {
    let seen = format!("{path} has mode {:03o}", mode & 0o777);
    // Secrets that Kubernetes mounts are readable by all of their pod.
    let open = if generated { 0o077 } else { 0o022 };
    if mode & open == 0 {
        ok("key-file", seen)
    } else {
        fail(
            "key-file",
            seen,
            "chmod 600: whoever has it and the database has every login",
        )
    }
}

/// Room on the disk of an embedded database, in bytes.
pub(super) fn disk(free: u64, total: u64) -> Finding {
    let seen = format!("{} of {} MiB free", free >> 20, total >> 20);
    if free < 256 << 20 {
        fail(
            "disk",
            seen,
            "make room: Postgres stops when the disk is full",
        )
    } else if free < 1 << 30 || free < total / 20 {
        warn("disk", seen, "make room")
    } else {
        ok("disk", seen)
    }
}

#[cfg(test)]
mod tests;
