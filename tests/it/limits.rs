//! Limits of accounts and of sizes: a refusal blocks for as long as it says, and one large event holds up nobody.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use drawbridge::config::Transport;
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _, future::join_all};
use loadtest::upstream::{Fault, Kind};
use reqwest::Response;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{
    Message, client::IntoClientRequest as _, protocol::WebSocketConfig,
};

use crate::support::{
    codex_socket::create,
    house::{House, Plan, codex_body, events, text_of},
    wait::until,
};

const CODEX: &str = "/backend-api/codex/responses";
const HUGE: usize = 16 << 20;
const OTHERS: usize = 50;
/// Deltas of each of the others, and milliseconds between two.
const PACED: (usize, u64) = (100, 40);

async fn served(house: &House, thread: &str, turn: &str) -> String {
    let answer = events(house.codex_turn(thread, turn, "hi").await).await;
    assert_eq!(answer.last().unwrap()["type"], "response.completed");
    house.upstream.attempts().last().unwrap().account.clone()
}

/// The blocks that hold or have held: account, seconds, seconds until the end, whether lifted.
async fn blocks(house: &House) -> Vec<(String, f64, f64, bool)> {
    let query = "
        select account_id::text, extract(epoch from blocked_until - blocked_at)::float8,
               extract(epoch from blocked_until - clock_timestamp())::float8, lifted_at is not null
        from quota_blocks";
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let rows = house.client.query(query, &[]).await.unwrap();
        if !rows.is_empty() {
            let block =
                |row: &tokio_postgres::Row| (row.get(0), row.get(1), row.get(2), row.get(3));
            return rows.iter().map(block).collect();
        }
        assert!(Instant::now() < deadline, "no block was written");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn another_account_goes_on_without_the_thoughts_that_it_cannot_read() {
    let house = House::with(&["alice", "bob"]).await;
    let ask = async |body: &Value, thread: &str| {
        let request = house.post(CODEX).header("thread-id", thread);
        let answer = events(request.json(body).send().await.unwrap()).await;
        let last = answer.last().unwrap().clone();
        assert_eq!(last["type"], "response.completed", "{last}");
        last["response"]["output"].as_array().unwrap().clone()
    };
    let mut body = codex_body("think [reasoning]");
    let said = ask(&body, "thread").await;
    assert_eq!(said[0]["type"], "reasoning");
    let input = body["input"].as_array_mut().unwrap();
    let question = input[1].clone();
    input.extend(said.into_iter().chain([question]));
    let home = house.upstream.attempts()[0].account.clone();
    let limit = Fault::once(Kind::RateLimit { resets_in: 600 });
    house.upstream.fault(limit.at(&home));
    ask(&body, "thread").await;

    let attempts = house.upstream.attempts();
    let tried: Vec<_> = attempts[1..].iter().map(|one| one.status).collect();
    assert_eq!(tried, [429, 400, 200], "home, then abroad twice");
    let told = |n: usize| -> Vec<&Value> {
        let history = attempts[n].history.iter();
        history.map(|item| &item["type"]).collect()
    };
    assert_eq!(told(2)[2], "reasoning");
    assert_eq!(told(3), ["message"; 4], "nothing else is left out");
    assert_ne!(attempts[3].account, home);
}

#[tokio::test]
async fn a_refusal_with_retry_after_blocks_for_so_long_and_no_longer() {
    let house = House::with(&["alice", "bob"]).await;
    // Both are known to be at 12 % of a window that resets in 9,000 s.
    let first = served(&house, "thread", "turn-0").await;
    let refusal = Kind::RetryAfter {
        seconds: 60,
        used_percent: 40.0,
    };
    // A turn that begins before the refusal, and ends well after it.
    house
        .upstream
        .fault(Fault::once(Kind::Paced(20, 50)).for_turn("early"));
    house
        .upstream
        .fault(Fault::once(refusal).for_turn("turn-1"));
    let mut early = house.codex_turn("thread", "early", "hi").await;
    early.chunk().await.unwrap().unwrap();
    let other = served(&house, "thread", "turn-1").await;
    let attempts = house.upstream.attempts();
    let tried: Vec<_> = attempts[1..]
        .iter()
        .map(|attempt| (attempt.account.as_str(), attempt.status))
        .collect();
    assert_eq!(
        tried,
        [
            (first.as_str(), 200),
            (first.as_str(), 429),
            (other.as_str(), 200)
        ]
    );
    assert_ne!(first, other);
    assert!(early.text().await.unwrap().contains("response.completed"));

    // Its observation is older than the refusal: the account stays blocked, the other one serves.
    let blocked = house.account_id(&first).await.to_string();
    for turn in ["turn-2", "turn-3"] {
        assert_eq!(served(&house, "thread", turn).await, other);
        let explanation = house.explanation(turn).await;
        assert_eq!(explanation["excluded"], json!({ "blocked": 1 }));
        assert_eq!(explanation["named"], json!([[blocked, "blocked"]]));
        assert_eq!(explanation["chosen"]["sticky"], "detour", "{explanation}");
    }
    let blocks = blocks(&house).await;
    assert_eq!(blocks.len(), 1);
    let (account, length, left, lifted) = &blocks[0];
    assert_eq!(*account, blocked);
    // Deadlines are whole seconds, and never too early.
    assert!((59.0..=62.0).contains(length), "{length}");
    assert!(*left <= 61.0, "{left}");
    assert!(!lifted);
    // The window says what upstream said of it: 40 %, not that it is used up.
    let query = "select used_percent from quota_windows where account_id::text = $1 and window_minutes = 300";
    let row = house.client.query_one(query, &[&blocked]).await.unwrap();
    assert!((row.get::<_, f64>(0) - 40.0).abs() < 0.01);
}

#[tokio::test]
async fn a_pool_that_is_blocked_for_60_s_says_60_s() {
    let house = House::start().await;
    let refusal = Kind::RetryAfter {
        seconds: 60,
        used_percent: 40.0,
    };
    house.upstream.fault(Fault::once(refusal));
    for turn in ["turn-1", "turn-2"] {
        let answer = house.codex_turn("thread", turn, "hi").await;
        assert_eq!(answer.status(), 429);
        let error: Value = answer.json().await.unwrap();
        let now = jiff::Timestamp::now().as_second();
        let left = error["error"]["resets_at"].as_i64().unwrap() - now;
        assert!((50..=61).contains(&left), "{left}");
    }
    assert_eq!(house.upstream.attempts().len(), 1);
    // The documents and the headers say the same, and that the window is not what stands in the way.
    let usage = house.get("/api/codex/usage").send().await.unwrap();
    let usage: Value = usage.json().await.unwrap();
    let limit = &usage["rate_limit"];
    assert_eq!(limit["limit_reached"], true);
    assert_eq!(limit["allowed"], false);
    assert_eq!(limit["primary_window"]["used_percent"], 40);
    let models = house.get("/v1/models").send().await.unwrap();
    assert_eq!(models.headers()["x-codex-primary-used-percent"], "40");
}

#[tokio::test]
async fn an_account_serves_again_when_its_block_has_ended_and_not_before() {
    let house = House::start().await;
    let refusal = Kind::RetryAfter {
        seconds: 2,
        used_percent: 40.0,
    };
    house.upstream.fault(Fault::once(refusal));
    let began = Instant::now();
    until("it serves again", async || {
        house.codex_turn("thread", "turn", "hi").await.status() == 200
    })
    .await;
    // Deadlines are whole seconds.
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!(
        house.upstream.attempts().len(),
        2,
        "nothing was tried in between"
    );
}

#[tokio::test]
async fn what_an_event_says_counts_beside_the_headers_of_its_own_answer() {
    // Only over HTTP answers have headers.
    let house = House::planned(Plan {
        transport: Transport::Http,
        ..Plan::default()
    })
    .await;
    house.upstream.fault(Fault::once(Kind::Told(40.0)));
    served(&house, "thread", "turn").await;
    let query = "select used_percent from quota_windows where window_minutes = 300";
    until(
        "the higher of the two, which began together, is stored",
        async || {
            let row = house.client.query_opt(query, &[]).await.unwrap();
            row.is_some_and(|row| row.get::<_, f64>(0) > 39.0)
        },
    )
    .await;
}

#[tokio::test]
async fn a_document_ends_no_throttle_whatever_its_headers_say() {
    let house = House::start().await;
    let throttled = "
        insert into quota_blocks (account_id, family, blocked_at, blocked_until, reason)
        select account_id, 'codex', clock_timestamp() - interval '1 minute', clock_timestamp() + interval '1 hour', 'rate_limit_exceeded'
        from accounts";
    house.client.batch_execute(throttled).await.unwrap();
    let replica = house.neighbour().await;
    let at = |path: &str| format!("http://{}{path}", replica.address);
    let refresh = house.http.post(at("/api/fleet/refresh"));
    let refreshed = refresh.bearer_auth(house.key()).send().await.unwrap();
    let refreshed: Value = refreshed.json().await.unwrap();
    assert_eq!(refreshed["usageWritten"], true);
    let summary = house.http.get(at("/api/fleet/summary"));
    let summary = summary.bearer_auth(house.key()).send().await.unwrap();
    let summary: Value = summary.json().await.unwrap();
    assert_eq!(summary["accounts"][0]["status"], "rate_limited");
    assert!(!blocks(&house).await[0].3, "nothing has lifted it");
    let query = "select string_agg(distinct source, ',') from quota_windows";
    let sources: String = house.client.query_one(query, &[]).await.unwrap().get(0);
    assert_eq!(sources, "poll", "no turn has told");
}

/// Runs the others, and beside them something large; yields what that came to and how many deltas the others had meanwhile.
async fn beside_others<T>(house: &House, large: impl Future<Output = T>) -> (T, usize) {
    let (deltas, ms) = PACED;
    let arrived = AtomicUsize::new(0);
    let other = async |n: usize| {
        let thread = format!("other-{n}");
        house
            .upstream
            .fault(Fault::once(Kind::Paced(deltas, ms)).for_turn(&thread));
        let mut answer = house.codex_turn(&thread, &thread, "hi").await;
        let (mut text, mut counted) = (String::new(), 0);
        while let Some(chunk) = answer.chunk().await.unwrap() {
            text.push_str(std::str::from_utf8(&chunk).unwrap());
            let seen = text.matches("event: response.output_text.delta\n").count();
            arrived.fetch_add(seen - counted, Ordering::Relaxed);
            counted = seen;
        }
        assert_eq!(counted, deltas, "stream {n}");
        assert!(text.contains("event: response.completed\n"), "stream {n}");
    };
    let others = join_all((0..OTHERS).map(other));
    let large = async {
        // All of them are on their way.
        while arrived.load(Ordering::Relaxed) < OTHERS {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = arrived.load(Ordering::Relaxed);
        let large = large.await;
        (large, arrived.load(Ordering::Relaxed) - before)
    };
    let (_, large) = tokio::join!(others, large);
    large
}

/// Each place where the large text stands has it whole.
fn whole(events: &[Value]) {
    let text = "x".repeat(HUGE);
    let mut places = 0;
    for event in events {
        let places_of = [
            &event["delta"],
            &event["text"],
            &event["part"]["text"],
            &event["item"]["content"][0]["text"],
            &event["response"]["output"][0]["content"][0]["text"],
        ];
        for place in places_of {
            if place.as_str().is_some_and(|place| place.len() > 1000) {
                assert!(place == &text, "{} is not what was sent", event["type"]);
                places += 1;
            }
        }
    }
    assert_eq!(places, 5);
    assert_eq!(events.last().unwrap()["type"], "response.completed");
}

#[tokio::test]
async fn an_event_of_16_mib_passes_whole_while_50_streams_go_on() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Huge(HUGE)).for_turn("huge"));
    let large = async {
        let answer: Response = house.codex_turn("huge", "huge", "hi").await;
        events(answer).await
    };
    let (large, meanwhile) = beside_others(&house, large).await;
    whole(&large);
    assert!(meanwhile >= OTHERS, "{meanwhile} deltas came meanwhile");
    assert_eq!(house.turns().await.len(), OTHERS + 1);
}

#[tokio::test]
async fn a_frame_of_16_mib_passes_whole_while_50_streams_go_on() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Huge(HUGE)).for_turn("huge"));
    let mut request = format!("ws://{}{CODEX}", house.server.address)
        .into_client_request()
        .unwrap();
    let key = format!("Bearer {}", house.key()).parse().unwrap();
    request.headers_mut().insert("authorization", key);
    let config = WebSocketConfig::default()
        .max_frame_size(None)
        .max_message_size(None);
    let connected = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
    let (mut socket, _) = connected.await.unwrap();
    let large = async {
        let create = create("huge", "hi", None).to_string();
        socket.send(Message::text(create)).await.unwrap();
        let mut frames: Vec<Value> = Vec::new();
        while frames
            .last()
            .is_none_or(|frame| frame["type"] != "response.completed")
        {
            let message = socket.next().await.unwrap().unwrap();
            frames.push(serde_json::from_str(message.to_text().unwrap()).unwrap());
        }
        frames
    };
    let (large, meanwhile) = beside_others(&house, large.boxed_local()).await;
    whole(&large);
    assert!(meanwhile >= OTHERS, "{meanwhile} deltas came meanwhile");
}

#[tokio::test]
async fn an_sdk_reads_a_huge_event_too() {
    let house = House::start().await;
    house.upstream.fault(Fault::always(Kind::Huge(HUGE)));
    for stream in [true, false] {
        let body = json!({ "model": "gpt-5.5", "input": "hi", "stream": stream });
        let answer = house
            .post("/v1/responses")
            .json(&body)
            .send()
            .await
            .unwrap();
        if stream {
            let events = events(answer).await;
            assert_eq!(text_of(&events).len(), HUGE);
            whole(&events);
        } else {
            let object: Value = answer.json().await.unwrap();
            let text = &object["output"][0]["content"][0]["text"];
            assert_eq!(text.as_str().unwrap().len(), HUGE);
        }
    }
}
