//! Each value with its verdict.

use Verdict::{Fail, Ok as Good, Warn};
use jiff::Timestamp;

use super::*;
use crate::ids::BootId;

const SERVER: Server = Server {
    version: 150_004,
    standby: false,
    tls: true,
    local: false,
    connections: 97,
    used: 3,
};

fn migration(version: i64, checksum: &str) -> Migration {
    Migration {
        version,
        name: "x".into(),
        checksum: checksum.into(),
    }
}

fn replica(name: &str, age: f64, version: Option<&str>, keys: &[&str]) -> Listed {
    Listed {
        boot_id: BootId::new(),
        name: name.into(),
        endpoint: None,
        started_at: Timestamp::UNIX_EPOCH,
        heartbeat_age_seconds: age,
        state: "alive".into(),
        dead_at: None,
        version: version.map(Into::into),
        master_keys: Some(keys.iter().map(|key| (*key).to_owned()).collect()),
    }
}

#[test]
fn each_value_that_is_read_has_its_verdict() {
    let counts = |keys: &[&str]| {
        keys.iter()
            .map(|key| ((*key).to_owned(), 1))
            .collect::<Counts>()
    };
    let stored = |orphaned_leases, log_days| Stored {
        orphaned_leases,
        log_days,
        log_bytes: 0,
        snapshot_bytes: 0,
        database_bytes: 0,
    };
    let worst = |findings: Vec<Finding>| {
        findings
            .into_iter()
            .max_by_key(|finding| finding.verdict)
            .unwrap()
    };
    let ms = SignedDuration::from_millis;
    for (finding, expected, says) in [
        (settings(&[]), Good, ""),
        (
            settings(&["X is not a setting".into()]),
            Fail,
            "X is not a setting",
        ),
        (server("s", &SERVER), Good, "Postgres 15.4, TLS"),
        (
            server(
                "s",
                &Server {
                    version: 130_012,
                    ..SERVER
                },
            ),
            Fail,
            "13.12",
        ),
        (
            server(
                "s",
                &Server {
                    standby: true,
                    ..SERVER
                },
            ),
            Fail,
            "a standby",
        ),
        (
            server(
                "s",
                &Server {
                    tls: false,
                    ..SERVER
                },
            ),
            Warn,
            "no TLS",
        ),
        (
            server(
                "s",
                &Server {
                    tls: false,
                    local: true,
                    ..SERVER
                },
            ),
            Good,
            "on this machine",
        ),
        (
            direct(
                Direct {
                    sessions: true,
                    hears: true,
                },
                false,
            ),
            Good,
            "no pooler",
        ),
        (
            direct(
                Direct {
                    sessions: false,
                    hears: false,
                },
                false,
            ),
            Warn,
            "polled",
        ),
        (
            direct(
                Direct {
                    sessions: true,
                    hears: false,
                },
                true,
            ),
            Warn,
            "Redis alone",
        ),
        (connections(&SERVER, 3, false), Good, "needs 81"),
        (connections(&SERVER, 4, false), Fail, "needs 100"),
        (connections(&SERVER, 20, true), Good, "needs 68 beside"),
        (clock(ms(-1_999)), Good, "-1.999"),
        (clock(ms(2_001)), Warn, "+2.001"),
        (clock(ms(-61_000)), Fail, "-61"),
        (
            schema(&[migration(1, "a")], &[migration(1, "a")]),
            Good,
            "V1",
        ),
        (
            schema(
                &[migration(1, "a"), migration(2, "b")],
                &[migration(1, "a")],
            ),
            Fail,
            "V1, this release needs V2",
        ),
        (schema(&[migration(1, "a")], &[]), Fail, "V0"),
        (
            schema(
                &[migration(1, "a")],
                &[migration(1, "a"), migration(2, "b")],
            ),
            Warn,
            "newer",
        ),
        (
            schema(&[migration(1, "a")], &[migration(1, "b")]),
            Fail,
            "another text",
        ),
        (
            sealed(&counts(&["k2"]), "k2", &["k2", "k1"]),
            Good,
            "1 values under `k2`",
        ),
        (
            sealed(&counts(&["k1", "k2"]), "k2", &["k2", "k1"]),
            Warn,
            "`k2` seals",
        ),
        (
            sealed(&counts(&["k0", "k2"]), "k2", &["k2"]),
            Fail,
            "not all",
        ),
        (sealed(&counts(&[]), "k2", &["k2"]), Good, "nothing"),
        (worst(super::stored(&stored(0, Some(30)), 30)), Good, ""),
        (
            worst(super::stored(&stored(2, None), 30)),
            Warn,
            "2 with a turn",
        ),
        (
            worst(super::stored(&stored(0, Some(33)), 30)),
            Warn,
            "33 days",
        ),
        (accounts(&[]), Warn, "none"),
        (accounts(&[Lifecycle::Paused]), Warn, "1 paused"),
        (
            accounts(&[Lifecycle::Active, Lifecycle::Active]),
            Good,
            "2 active",
        ),
        (
            accounts(&[Lifecycle::Active, Lifecycle::ReauthRequired]),
            Warn,
            "1 reauth_required",
        ),
        (
            origin("u", "https://x", Ok((401, Duration::ZERO))),
            Good,
            "401",
        ),
        (
            origin("u", "https://x", Ok((503, Duration::ZERO))),
            Warn,
            "503",
        ),
        (
            origin("u", "https://x", Err("refused".into())),
            Fail,
            "refused",
        ),
        (stream(&[]), Warn, "one piece"),
        (
            stream(&[900, 905].map(Duration::from_millis)),
            Warn,
            "2 pieces over 5 ms",
        ),
        (
            stream(&[300, 305, 900].map(Duration::from_millis)),
            Good,
            "3 pieces over 600 ms",
        ),
        (files(None, 4096), Good, "no limit"),
        (files(Some(1024), 4096), Warn, "need 9216"),
        (files(Some(9216), 4096), Good, "need 9216"),
        (key_file("f", 0o100_600, true), Good, "600"),
        (key_file("f", 0o100_640, true), Fail, "640"),
        (key_file("f", 0o100_644, false), Good, "644"),
        (key_file("f", 0o100_666, false), Fail, "666"),
        (disk(200 << 20, 10 << 30), Fail, "200"),
        (disk(3 << 30, 100 << 30), Warn, "free"),
        (disk(30 << 30, 100 << 30), Good, "free"),
        (peer("r1", None, Err(String::new())), Warn, "takes no turns"),
        (peer("r1", Some("http://a"), Ok(404)), Good, "answers"),
        (peer("r1", Some("http://a"), Ok(200)), Fail, "200"),
        (
            peer("r1", Some("http://a"), Err("timed out".into())),
            Fail,
            "timed out",
        ),
    ] {
        assert_eq!(finding.verdict, expected, "{finding:?}");
        assert!(finding.seen.contains(says), "{finding:?}");
        assert_eq!(finding.advice.is_empty(), expected == Good, "{finding:?}");
    }
}

#[test]
fn the_fleet_is_judged_by_what_it_says_of_itself() {
    let ours = ["k2:2".to_owned(), "k1:1".to_owned()];
    let judge = |listed: &[Listed]| judged(&ours, listed);
    fn judged(ours: &[String], listed: &[Listed]) -> Vec<Verdict> {
        let found = replicas(listed, ours, Duration::from_secs(7));
        found.iter().map(|finding| finding.verdict).collect()
    }
    let now = Some(VERSION);
    let dead = Listed {
        dead_at: Some(Timestamp::UNIX_EPOCH),
        ..replica("r9", 900.0, None, &["k9:9"])
    };
    for (listed, expected) in [
        (vec![], vec![Warn]),
        (vec![dead.clone()], vec![Warn]),
        (
            vec![replica("r0", 1.0, now, &["k2:2", "k1:1"]), dead],
            vec![Good, Good, Good],
        ),
        // The older key was taken away there already.
        (
            vec![replica("r0", 1.0, now, &["k2:2"])],
            vec![Good, Good, Warn],
        ),
        (
            vec![replica("r0", 8.0, now, &["k2:2", "k1:1"])],
            vec![Warn, Good, Good],
        ),
        (
            vec![replica("r0", 1.0, Some("0.0.9"), &["k1:1", "k2:2"])],
            vec![Good, Warn, Good],
        ),
        (vec![replica("r0", 1.0, None, &[])], vec![Good, Warn, Good]),
        // It cannot open what we seal, we cannot open what it seals, and a key of the same name is another.
        (
            vec![replica("r0", 1.0, now, &["k1:1"])],
            vec![Good, Good, Fail],
        ),
        (
            vec![replica("r0", 1.0, now, &["k3:3", "k2:2"])],
            vec![Good, Good, Fail],
        ),
        (
            vec![replica("r0", 1.0, now, &["k2:9"])],
            vec![Good, Good, Fail],
        ),
    ] {
        assert_eq!(judge(&listed), expected, "{listed:?}");
    }
    // In the midst of a rotation: one has missed the new key, and then another one seals under it.
    let begun = ["k1:1".to_owned(), "k2:2".to_owned()];
    let missed = replica("r0", 1.0, now, &["k1:1"]);
    let ahead = replica("r1", 1.0, now, &["k2:2", "k1:1"]);
    assert_eq!(judged(&begun, std::slice::from_ref(&missed))[2], Warn);
    assert_eq!(judged(&begun, &[missed, ahead.clone()])[2], Fail);
    assert_eq!(judged(&begun, &[ahead])[2], Good);
}
