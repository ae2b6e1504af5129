//! What an operator can ask and do about conversations, beside replicas that run.

use std::time::Duration;

use loadtest::upstream::{Fault, Kind};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    wait::until,
};

#[tokio::test]
async fn explain_tells_a_forwarded_turn_and_a_refused_request() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = ask(&cluster, 0, &script("one", false)).await;
    let mut body = script("two", false);
    body["previous_response_id"] = first.id().into();
    let second = ask(&cluster, 1, &body).await;
    assert_eq!(second.status, 200, "{second:#?}");
    body["previous_response_id"] = "resp_nobody".into();
    let refused = ask(&cluster, 1, &body).await;
    assert_eq!(refused.status, 400, "{refused:#?}");

    let mut logged = Vec::new();
    until("the requests are logged", async || {
        let query = "select request_id::text from request_log order by request_id";
        let rows = cluster.client.query(query, &[]).await.unwrap();
        logged = rows.iter().map(|row| row.get::<_, String>(0)).collect();
        logged.len() == 3
    })
    .await;
    let told = cluster.home.json(&["explain", &logged[1]]).await;
    let attempt = &told["turn"]["attempts"][0];
    assert_eq!(told["turn"]["response_id"], second.id(), "{told:#}");
    assert_eq!(attempt["class"], "completed");
    assert_eq!(told["requests"][0]["bridge_outcome"], "live_alias_reuse");
    assert_eq!(
        told["requests"][0]["explanation"]["chosen"]["account"],
        attempt["account_id"]
    );
    assert_eq!(told["lease"]["owner"], "r0");
    assert_eq!(told["snapshot"], "kept");
    let text = cluster.home.ok(&["explain", &logged[1]]).await;
    for part in [
        "v1/responses over http, model gpt-5.5",
        "completed with 200",
        "it went on in the session that this replica had open",
        "alice by capacity: 1 of 1 accounts could serve it",
        "alice over websocket: completed",
        "unchanged since; r0",
        "kept: ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    let told = cluster.home.json(&["explain", &logged[2]]).await;
    assert_eq!(told["turn"], Value::Null);
    assert_eq!(
        told["requests"][0]["error_code"],
        "previous_response_not_found"
    );
    let text = cluster.home.ok(&["explain", &logged[2]]).await;
    assert!(
        text.contains("refused: nobody knows the response"),
        "{text}"
    );

    let unknown = "019a0000-0000-7000-8000-000000000001";
    let said = cluster.home.run(&["explain", unknown]).await;
    assert_eq!(said.code, Some(1));
    assert!(
        said.err.contains(unknown) && said.out.is_empty(),
        "{}",
        said.err
    );
}

#[tokio::test]
async fn a_released_lease_fences_its_owner_and_the_conversation_goes_on() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = ask(&cluster, 0, &script("one", false)).await;
    let listed = cluster.home.json(&["leases", "list"]).await;
    let [lease] = &listed.as_array().unwrap()[..] else {
        panic!("{listed:#}")
    };
    let id = lease["lease_id"].as_str().unwrap();
    assert_eq!(
        (&lease["owner"], &lease["owner_state"]),
        (&json!("r0"), &json!("alive"))
    );
    assert_eq!(cluster.home.json(&["leases", "show", id]).await, *lease);
    let shown = cluster.home.ok(&["leases", "show", id]).await;
    assert!(
        shown.contains("r0 (") && shown.contains(first.id()),
        "{shown}"
    );
    let table = cluster.home.ok(&["leases", "list"]).await;
    assert!(table.starts_with("LEASE") && table.contains(id), "{table}");

    let said = cluster.home.ok(&["leases", "release", id]).await;
    assert!(
        said.contains("is free") && said.contains("r0 is fenced"),
        "{said}"
    );
    let freed = cluster.home.json(&["leases", "show", id]).await;
    assert_eq!(freed["owner_state"], "free");
    assert_ne!(freed["generation"], lease["generation"]);
    let again = cluster.home.ok(&["leases", "release", id]).await;
    assert!(again.contains("free already"), "{again}");

    let mut body = script("two", false);
    body["previous_response_id"] = first.id().into();
    let second = ask(&cluster, 1, &body).await;
    assert_eq!(second.status, 200, "{second:#?}");
    let taken = cluster.home.json(&["leases", "show", id]).await;
    assert_eq!(taken["owner"], "r1");

    // An owner that finds itself fenced begins nothing, claims the lease again, and holds nothing against the account.
    cluster.home.ok(&["leases", "release", id]).await;
    body["previous_response_id"] = second.id().into();
    let third = ask(&cluster, 1, &body).await;
    assert_eq!(third.status, 200, "{third:#?}");
    cluster.booked().await;
    let turns = cluster.turns().await;
    assert_eq!(turns.len(), 3);
    let turn = turns[2]["turn_id"].as_str().unwrap();
    until("the turn is logged", async || {
        let told = cluster.home.json(&["explain", turn]).await;
        let explained = told["requests"].as_array().unwrap().first();
        explained.is_some_and(|request| {
            assert_eq!(request["explanation"]["eligible"], 1, "{told:#}");
            assert_eq!(request["explanation"]["penalised"], Value::Null, "{told:#}");
            true
        })
    })
    .await;

    for command in ["show", "release"] {
        let said = cluster
            .home
            .run(&["leases", command, "019a0000-0000-4000-8000-000000000001"])
            .await;
        assert_eq!(said.code, Some(1), "{command}: {}", said.err);
        assert!(said.err.contains("no lease 019a0000"), "{}", said.err);
    }
}

#[tokio::test]
async fn a_released_lease_is_claimed_by_the_next_request_even_where_its_turn_still_runs() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = ask(&cluster, 0, &script("one", false)).await;
    let endless = Fault::once(Kind::Paced(3000, 20));
    cluster.home.upstream.fault(endless);
    let stuck = cluster
        .post_at(0, "/v1/responses")
        .json(&script("stuck", true));
    let stuck = stuck
        .header("session-id", "conversation")
        .send()
        .await
        .unwrap();
    let mut listed = Value::Null;
    until("it is in a turn", async || {
        listed = cluster
            .home
            .json(&["leases", "list", "--busy", "--owner", "r0"])
            .await;
        listed[0].is_object()
    })
    .await;
    let id = listed[0]["lease_id"].as_str().unwrap();
    cluster.home.ok(&["leases", "release", id]).await;
    let none = cluster
        .home
        .json(&["leases", "list", "--owner", "r0"])
        .await;
    assert_eq!(none, json!([]));

    let mut body = script("two", false);
    body["previous_response_id"] = first.id().into();
    let second = timeout(Duration::from_secs(10), ask(&cluster, 0, &body)).await;
    second.expect("it does not wait for the stuck turn").id();
    let claimed = cluster.home.json(&["leases", "show", id]).await;
    assert_eq!(claimed["owner"], "r0");
    assert_ne!(claimed["generation"], listed[0]["generation"]);
    drop(stuck);
    cluster.booked().await;
    let head = cluster.home.json(&["leases", "show", id]).await;
    assert_eq!(
        head["head_response_id"], claimed["head_response_id"],
        "the fenced turn moves nothing"
    );
}

/// A request of one conversation, to one replica.
async fn ask(cluster: &Cluster, replica: usize, body: &Value) -> Answer {
    let request = cluster.post_at(replica, "/v1/responses").json(body);
    let request = request.header("session-id", "conversation");
    Answer::of(request.send().await.unwrap()).await
}
