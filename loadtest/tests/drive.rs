//! The load generator sees what a client would have seen.

use std::time::Duration;

use loadtest::{
    drive::{Plan, Transport, drive},
    upstream::{Config, Fault, Kind, Stage, Upstream},
};

fn plan(upstream: &Upstream, transport: Transport) -> Plan {
    let account = upstream.account("alice");
    Plan {
        url: format!("{}/codex", upstream.url()),
        key: account.access_token(),
        account_id: Some(account.id()),
        streams: 4,
        rate: 0.0,
        turns: 3,
        transport,
        body_bytes: 20_000,
        ramp: Duration::ZERO,
        timeout: Duration::from_secs(20),
        pause: Duration::ZERO,
    }
}

const BOTH: [Transport; 2] = [Transport::Sse, Transport::Ws];

#[tokio::test]
async fn every_turn_is_driven_to_its_end_and_measured() {
    for transport in BOTH {
        let upstream = Upstream::start(Config::default()).await;
        let report = drive(&plan(&upstream, transport)).await.unwrap();
        assert_eq!(
            (report.turns, report.completed, report.deltas),
            (12, 12, 48),
            "{transport:?}: {report:?}"
        );
        assert!(report.errors.is_empty(), "{transport:?}: {report:?}");
        assert_eq!(
            (report.ttft.count, report.hop.count),
            (12, 48),
            "{transport:?}"
        );
        assert!(
            report.ttft.p50 > 0 && report.ttft.max < 20_000_000,
            "{transport:?}: {report:?}"
        );

        let state = upstream.state();
        assert_eq!(
            (state.attempts.len(), state.violations.len()),
            (12, 0),
            "{transport:?}"
        );
        let mut turns: Vec<_> = state
            .attempts
            .iter()
            .map(|attempt| attempt.client_turn_id.clone().unwrap())
            .collect();
        turns.sort();
        turns.dedup();
        assert_eq!(turns.len(), 12, "a turn id belongs to one request");
        let follows = state
            .attempts
            .iter()
            .filter(|attempt| attempt.body.get("previous_response_id").is_some())
            .count();
        let (sockets, expected) = if transport == Transport::Ws {
            (4, 8)
        } else {
            (0, 0)
        };
        assert_eq!(
            (state.sockets, follows),
            (sockets, expected),
            "{transport:?}: turns follow each other on one socket"
        );
        for attempt in &state.attempts {
            let bytes = attempt.body.to_string().len();
            assert!((19_000..21_000).contains(&bytes), "{transport:?}: {bytes}");
        }
    }
}

#[tokio::test]
async fn what_goes_wrong_is_counted_by_kind_and_the_stream_goes_on() {
    for transport in BOTH {
        let upstream = Upstream::start(Config::default()).await;
        upstream.fault(Fault::once(Kind::Overloaded));
        upstream.fault(Fault::once(Kind::Cut(Stage::Visible)));
        upstream.fault(Fault::once(Kind::Failed("odd".into())));
        let report = drive(&plan(&upstream, transport)).await.unwrap();
        assert_eq!(
            (report.turns, report.completed),
            (12, 9),
            "{transport:?}: {report:?}"
        );
        assert_eq!(
            report.errors.values().sum::<u64>(),
            3,
            "{transport:?}: {report:?}"
        );
        assert_eq!(report.errors["failed odd"], 1, "{transport:?}: {report:?}");
    }
}

#[tokio::test]
async fn with_a_rate_turns_start_when_they_are_due_whatever_the_answers_do() {
    let upstream = Upstream::start(Config::default()).await;
    let plan = Plan {
        rate: 40.0,
        ..plan(&upstream, Transport::Sse)
    };
    let report = drive(&plan).await.unwrap();
    assert!(report.seconds >= 11.0 / 40.0, "{report:?}");

    // One stream's answers take longer than the time between its turns: what follows is late, and the report says so.
    upstream.fault(Fault::always(Kind::Paced(20, 5)));
    let slow = Plan {
        rate: 40.0,
        streams: 1,
        turns: 5,
        ..plan
    };
    let report = drive(&slow).await.unwrap();
    assert_eq!(report.completed, 5);
    assert!(report.late.max > 100_000, "{report:?}");
}
