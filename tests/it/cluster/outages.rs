//! Redis, Postgres or `PgBouncer` away: running streams go on, leases stay where they are, and everything is booked after.

use std::time::{Duration, Instant};

use loadtest::{
    edge::Mode,
    upstream::{Fault, Kind, Stage, State},
};
use redis::AsyncCommands as _;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::times;
use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    exposition::Page,
    pg,
    wait::until,
};

/// Between two words of a stream.
const PACE: u64 = 20;

/// The turn of a conversation that is called after it.
fn turn(
    cluster: &Cluster,
    number: usize,
    conversation: &str,
    turn: &str,
) -> reqwest::RequestBuilder {
    let metadata = json!({ "turn_id": turn, "session_id": conversation, "request_kind": "turn" });
    cluster
        .post_at(number, "/v1/responses")
        .header("session-id", conversation)
        .header("x-codex-turn-metadata", metadata.to_string())
}

/// Conversations in mid-turn, one on each replica for each number of words; ends with what each client got.
async fn streams(cluster: &Cluster, words: &[usize]) -> JoinSet<(String, Answer, usize)> {
    let mut streams = JoinSet::new();
    for number in 0..cluster.replicas.len() {
        for &words in words {
            let name = format!("stream-{number}-{words}");
            Answer::of(
                turn(cluster, number, &name, &format!("{name}-first"))
                    .json(&script("hi", true))
                    .send()
                    .await
                    .unwrap(),
            )
            .await
            .id();
            let slow = Fault::once(Kind::Paced(words, PACE)).for_turn(&name);
            cluster.home.upstream.fault(slow);
            let request = turn(cluster, number, &name, &name).json(&script("go on", true));
            streams.spawn(
                async move { (name, Answer::of(request.send().await.unwrap()).await, words) },
            );
        }
    }
    let running = 2 * streams.len();
    cluster
        .home
        .upstream
        .wait("every stream", |state| state.attempts.len() == running)
        .await;
    streams
}

/// Every stream was told whole.
async fn whole(cluster: &Cluster, mut streams: JoinSet<(String, Answer, usize)>) {
    while let Some(ended) = streams.join_next().await {
        let (name, answer, words) = ended.unwrap();
        assert!(
            answer.status == 200 && answer.complete,
            "{name}: {answer:#?}\n{}",
            cluster.logs()
        );
        let said = answer.body["output"][0]["content"][0]["text"]
            .as_str()
            .unwrap();
        assert_eq!(said.matches("word").count(), words, "{name}");
    }
}

/// Who owns what, since when.
async fn owners(cluster: &Cluster) -> Vec<Value> {
    let leases = cluster.leases().await;
    let told = leases
        .iter()
        .map(|lease| json!([lease["lease_id"], lease["generation"], lease["owner_boot"]]));
    told.collect()
}

/// No lease has moved. There may be more: a claim may land late.
async fn unmoved(cluster: &Cluster, before: &[Value]) {
    let after = owners(cluster).await;
    for lease in before {
        assert!(after.contains(lease), "{lease} moved\n{}", cluster.logs());
    }
}

/// Each attempt that upstream saw is in the ledger once, with what it reported, and nothing else is: an opening that landed late is taken back.
async fn booked(cluster: &Cluster) {
    let sent = async || {
        let turns = cluster.turns().await;
        let sent = turns
            .into_iter()
            .filter(|turn| turn["attempts"] != json!([]));
        sent.collect::<Vec<_>>()
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let turns = loop {
        let turns = sent().await;
        if turns.len() == cluster.home.upstream.attempts().len()
            && turns.iter().all(|turn| turn["state"] == "settled")
        {
            break turns;
        }
        assert!(
            Instant::now() < deadline,
            "never booked: {turns:#?}\n{}",
            cluster.logs()
        );
        sleep(Duration::from_millis(20)).await;
    };
    for attempt in cluster.home.upstream.attempts() {
        let id = attempt.client_turn_id.as_deref().unwrap_or_default();
        let mut of_it = turns.iter().filter(|turn| turn["client_turn_id"] == id);
        let (turn, usage) = (of_it.next().unwrap(), attempt.usage.unwrap());
        assert!(of_it.next().is_none(), "{id} is booked twice");
        assert_eq!(turn["outcome"], "completed", "{turn:#}\n{}", cluster.logs());
        assert_eq!(turn["input_tokens"], usage.input, "{turn:#}");
        assert_eq!(turn["output_tokens"], usage.output, "{turn:#}");
    }
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn redis_may_die_return_and_lie() {
    let mut cluster = Cluster::start(Plan {
        redis: true,
        accounts: &["alice", "bob"],
        ..Plan::default()
    })
    .await;
    let streams = streams(&cluster, &[300]).await;
    let before = owners(&cluster).await;
    // What each phase does to Redis.
    for phase in ["up", "silent", "gone", "back", "lying"] {
        let edges = || {
            cluster
                .replicas
                .iter()
                .filter_map(|replica| replica.redis.as_ref())
        };
        match phase {
            "silent" => edges().for_each(|edge| edge.set(Mode::BlackHole)),
            "gone" => {
                edges().for_each(|edge| edge.set(Mode::Pass));
                cluster.redis = None;
            }
            "back" => cluster.restart_redis().await,
            "lying" => lie(&cluster).await,
            _ => {}
        }
        for round in 0..times(5, 50) {
            let name = format!("{phase}-{round}");
            let one = turn(&cluster, 0, &name, &format!("{name}-1")).json(&script("one", false));
            let first = Answer::of(one.send().await.unwrap()).await;
            let mut two = script("two", false);
            two["previous_response_id"] = first.id().into();
            let two = turn(&cluster, 1, &name, &format!("{name}-2")).json(&two);
            Answer::of(two.send().await.unwrap()).await.id();
            assert!(cluster.sockets_of(&name).len() <= 1);
        }
        // What one process does is known to all, with Redis or without.
        cluster.home.ok(&["accounts", "pause", "bob"]).await;
        let began = Instant::now();
        let mut others = 0;
        for number in 0.. {
            let name = format!("{phase}-after-{number}");
            let request = turn(&cluster, number % 2, &name, &name).json(&script("hi", false));
            Answer::of(request.send().await.unwrap()).await.id();
            let served = cluster.home.upstream.state();
            let served = served.of_turn(&name)[0].account.clone();
            others = if served == "bob" { 0 } else { others + 1 };
            if others == 12 {
                break;
            }
            assert!(
                began.elapsed() < Duration::from_secs(6),
                "{phase}: bob still serves"
            );
        }
        println!("{phase}: known after {:?} at most", began.elapsed());
        cluster.home.ok(&["accounts", "resume", "bob"]).await;
    }
    unmoved(&cluster, &before).await;
    whole(&cluster, streams).await;
    booked(&cluster).await;
}

/// Forged, damaged and duplicated messages, as fast as they go.
async fn lie(cluster: &Cluster) {
    let edge = cluster.replicas[0].redis.as_ref().unwrap();
    let client = redis::Client::open(format!("redis://{}", edge.address)).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    for number in 0..2000_u32 {
        let lie = match number % 5 {
            0 => "accounts 18446744073709551615".to_owned(),
            1 => format!("accounts {}", number / 10),
            2 => "leases moved".to_owned(),
            3 => "\0\u{1}{}".to_owned(),
            _ => "x".repeat(number as usize),
        };
        let _: i64 = connection.publish("drawbridge", lie).await.unwrap();
    }
}

#[tokio::test]
async fn postgres_may_be_cut_off_in_mid_stream() {
    postgres_away(&[Mode::Refuse]).await;
}

#[tokio::test]
async fn postgres_may_fall_silent_in_mid_stream() {
    postgres_away(&[Mode::BlackHole]).await;
}

async fn postgres_away(modes: &[Mode]) {
    let cluster = Cluster::start(Plan::default()).await;
    let away = Duration::from_secs(times(4, 40) as u64);
    let words = usize::try_from(away.as_millis()).unwrap() / PACE as usize;
    // Of streams that end while it is away, some end early.
    let streams = streams(&cluster, &[words / 8, words / 2, words + words / 2]).await;
    let before = owners(&cluster).await;
    for mode in modes {
        for edge in cluster.postgres() {
            edge.set(*mode);
            if *mode == Mode::Refuse {
                edge.cut();
            }
        }
    }
    let began = Instant::now();
    let mut served = Vec::new();
    for round in 0.. {
        if began.elapsed() > away {
            break;
        }
        for number in [0, 1] {
            // Whoever brings everything is served.
            let name = format!("away-{round}-{number}");
            let asked = Instant::now();
            let answer = turn(&cluster, number, &name, &name)
                .json(&script("hi", false))
                .send();
            let answer = Answer::of(answer.await.unwrap()).await;
            assert!(
                answer.status == 200 && answer.complete,
                "{name}: {answer:#?}\n{}",
                cluster.logs()
            );
            served.push(asked.elapsed());
            // Whoever does not is told so.
            let mut body = script("hi", false);
            body["previous_response_id"] = "resp_of_long_ago".into();
            let answer = turn(&cluster, number, &name, "refused").json(&body).send();
            let answer = Answer::of(answer.await.unwrap()).await;
            let told = (answer.status, answer.code());
            assert_eq!(told, (503, "continuity_unavailable"), "{answer:#?}");
            assert!(answer.headers.contains_key("retry-after"));
            assert_eq!(cluster.service(number).get("/readyz").await.status(), 200);
        }
        sleep(Duration::from_millis(50)).await;
    }
    served.sort();
    let (median, worst) = (served[served.len() / 2], served[served.len() - 1]);
    println!(
        "{} turns without Postgres: median {median:?}, worst {worst:?}",
        served.len()
    );
    assert!(worst < Duration::from_secs(5), "{served:?}");
    for edge in cluster.postgres() {
        edge.set(Mode::Pass);
    }
    whole(&cluster, streams).await;
    unmoved(&cluster, &before).await;
    booked(&cluster).await;
    // And all is as before.
    for number in [0, 1] {
        let name = format!("stream-{number}-{}", words / 8);
        until("it serves with Postgres again", async || {
            let turn_id = format!("{name}-{}", cluster.home.upstream.attempts().len());
            let again = turn(&cluster, 1 - number, &name, &turn_id)
                .json(&script("hi", false))
                .send();
            Answer::of(again.await.unwrap()).await.id();
            cluster.sockets_of("stream").len() <= 12
        })
        .await;
    }
    unmoved(&cluster, &before).await;
}

#[tokio::test]
async fn a_replica_that_postgres_does_not_answer_leaves_all_the_same() {
    for mode in [Mode::HalfOpen, Mode::BlackHole] {
        let mut cluster = Cluster::start(Plan {
            settings: &[("DRAWBRIDGE_DRAIN_DELAY", "0s")],
            ..Plan::default()
        })
        .await;
        let one = turn(&cluster, 0, "c", "t").json(&script("hi", false));
        Answer::of(one.send().await.unwrap()).await.id();
        cluster.postgres().for_each(|edge| edge.set(mode));
        cluster.signal(0, Signal::TERM);
        let service = cluster.replicas[0].service.as_mut().unwrap();
        service.ended().await;
    }
}

#[tokio::test]
async fn a_turn_that_could_not_claim_its_key_holds_up_no_other_of_that_key() {
    let cluster = Cluster::start(Plan {
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let silence = Fault::once(Kind::Silence(Stage::Visible));
    cluster.home.upstream.fault(silence);
    let held = "begin; lock table http_bridge_leases in access exclusive mode";
    cluster.client.batch_execute(held).await.unwrap();
    let unclaimed = turn(&cluster, 0, "s", "t").json(&script("silent", true));
    let unclaimed = tokio::spawn(async { Answer::of(unclaimed.send().await.unwrap()).await });
    let state = |state: &State| state.silent == 1;
    cluster.home.upstream.wait("a silence", state).await;
    cluster.client.batch_execute("commit").await.unwrap();
    let service = cluster.service(0);
    until("turns are claimed again", async || {
        let other = cluster
            .post_at(0, "/v1/responses")
            .json(&script("other", false))
            .header("session-id", rand::random::<u64>().to_string());
        Answer::of(other.send().await.unwrap()).await.id();
        let page = Page::of(&service.http, &service.admin).await;
        let reason = [("outcome", "fresh_start"), ("reason", "owner_free")];
        page.sum("drawbridge_bridge_outcomes_total", &reason) > 0.0
    })
    .await;
    let next = turn(&cluster, 0, "s", "u").json(&script("next", false));
    let next = timeout(Duration::from_secs(20), async {
        Answer::of(next.send().await.unwrap()).await
    });
    next.await.expect("an answer").id();
    cluster.home.upstream.release();
    unclaimed.await.unwrap().id();
    cluster.booked().await;
}

#[tokio::test]
async fn what_a_session_forgets_while_its_row_is_read_is_told_again() {
    let cluster = Cluster::start(Plan {
        replicas: 1,
        ..Plan::default()
    })
    .await;
    let post = |body: &Value| cluster.post_at(0, "/v1/responses").json(body);
    let after = |previous: &Answer, text: &str, stream: bool| {
        let mut body = script(text, stream);
        body["previous_response_id"] = previous.id().into();
        let request = post(&body);
        tokio::spawn(async { Answer::of(request.send().await.unwrap()).await })
    };
    // What is continued has a session from then on.
    let zero = Answer::of(post(&script("zero", false)).send().await.unwrap()).await;
    let one = after(&zero, "one", false).await.unwrap();
    let silence = Fault::once(Kind::Silence(Stage::Visible));
    cluster.home.upstream.fault(silence);
    let two = after(&one, "two", true);
    let state = |state: &State| state.silent == 1;
    cluster.home.upstream.wait("a silence", state).await;
    let held = "begin; lock table http_bridge_leases in access exclusive mode";
    cluster.client.batch_execute(held).await.unwrap();
    cluster.home.upstream.release();
    // The end is waited for as long as the row is: whoever comes a second later sees both.
    let waits = "
        select coalesce(max(clock_timestamp() - query_start) > interval '1 s', false) from pg_stat_activity
        where wait_event_type = 'Lock' and query like '%http_bridge_leases%' and datname = current_database()";
    until("the turn's end has waited for a while", async || {
        let anew = "select pg_stat_clear_snapshot()";
        cluster.client.batch_execute(anew).await.unwrap();
        let row = cluster.client.query_one(waits, &[]).await.unwrap();
        row.get::<_, bool>(0)
    })
    .await;
    let three = after(&one, "three", false);
    let service = cluster.service(0);
    until("the session is idle", async || {
        let page = Page::of(&service.http, &service.admin).await;
        page.sum("drawbridge_sessions_busy", &[]) == 0.0
    })
    .await;
    cluster.client.batch_execute("commit").await.unwrap();
    two.await.unwrap().id();
    let three = three.await.unwrap();
    // A slow machine may have let the read of the row wait for too long.
    let told = three.complete || three.code() == "continuity_unavailable";
    assert!(told, "{three:#?}");
    cluster.booked().await;
}

#[tokio::test]
async fn pgbouncer_may_be_saturated() {
    let cluster = Cluster::start(Plan {
        pooled: true,
        ..Plan::default()
    })
    .await;
    let streams = streams(&cluster, &[50, 300]).await;
    let before = owners(&cluster).await;
    // All the connections that it gives out to one database.
    let mut hogs = Vec::new();
    for _ in 0..20 {
        let hog = pg::connect(cluster.pooler_url.as_deref().unwrap()).await;
        hog.batch_execute("begin").await.unwrap();
        hogs.push(hog);
    }
    let began = Instant::now();
    let mut served = 0;
    while began.elapsed() < Duration::from_secs(times(4, 20) as u64) {
        for number in [0, 1] {
            let name = format!("saturated-{served}");
            let answer = turn(&cluster, number, &name, &name)
                .json(&script("hi", false))
                .send();
            let answer = Answer::of(answer.await.unwrap()).await;
            assert!(answer.complete, "{name}: {answer:#?}\n{}", cluster.logs());
            served += 1;
        }
    }
    println!("{served} turns while it was saturated");
    drop(hogs);
    whole(&cluster, streams).await;
    unmoved(&cluster, &before).await;
    booked(&cluster).await;
}
