//! A conversation is rebuilt whole or not at all, whatever became of its rows.

use bytes::Bytes;
use drawbridge::{
    db::Stmt,
    ids::{AccountId, ChainId, LeaseId, ScopeId},
    protocol::request::history,
    secret::KeyRing,
    snapshot::{
        CHECKPOINT, CONVERSATION, Capture, LINKS, Link, Missing, Mode, Parent, Row, Snapshots, TURN,
    },
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio_postgres::types::Type;

use crate::support::store::Store;

/// What the statement that finishes a turn inserts.
static INSERT: Stmt = Stmt {
    name: "test.INSERT",
    sql: "insert into response_snapshots (scope_id, response_id, parent_response_id, chain_id, lease_id, account_id, model, is_root, \
          complete, bytes, key_id, body) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
    types: &[
        Type::UUID,
        Type::TEXT,
        Type::TEXT,
        Type::UUID,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::BOOL,
        Type::BOOL,
        Type::INT4,
        Type::TEXT,
        Type::BYTEA,
    ],
};

/// One scope's conversation.
struct Talk<'a> {
    store: &'a Store,
    snapshots: Snapshots,
    scope: ScopeId,
    account: AccountId,
    lease: LeaseId,
}

impl<'a> Talk<'a> {
    fn new(store: &'a Store) -> Self {
        Self::with(store, &KeyRing::generate("k"))
    }

    fn with(store: &'a Store, keys: &SecretString) -> Self {
        let keys = KeyRing::parse(keys).unwrap();
        Self {
            store,
            snapshots: Snapshots::new(store.db.clone(), keys, Mode::Auto),
            scope: ScopeId::new(),
            account: AccountId::new(),
            lease: LeaseId::new(),
        }
    }

    /// A turn that asks `input` and is answered with one message.
    async fn turn(&self, id: &str, parent: Option<Parent>, input: &str) -> Row {
        let mut capture = Capture::new(input, parent);
        capture.push_output(answer(id).to_string().as_bytes());
        let kept = capture.finish(id, None).unwrap();
        let (lease, account) = (Some(self.lease), Some(self.account));
        self.snapshots
            .seal(self.scope, kept, lease, account, "gpt-5")
            .await
    }

    /// Makes a turn and stores it; yields what the next one continues.
    async fn say(&self, id: &str, parent: Option<Parent>) -> Parent {
        let row = self.turn(id, parent, &question_list(id)).await;
        self.insert(&row).await;
        row.next
    }

    /// Turns `r1` to `r{count}`, each the parent of the next.
    async fn conversation(&self, count: usize) -> Parent {
        let mut parent = None;
        for number in 1..=count {
            parent = Some(self.say(&format!("r{number}"), parent).await);
        }
        parent.unwrap()
    }

    async fn insert(&self, row: &Row) {
        self.store
            .db
            .exec(
                &INSERT,
                &[
                    &self.scope,
                    &row.response_id,
                    &row.parent_response_id,
                    &row.chain,
                    &row.lease,
                    &row.account,
                    &row.model,
                    &row.is_root,
                    &row.complete,
                    &row.bytes,
                    &row.key_id,
                    &row.body,
                ],
            )
            .await
            .unwrap();
    }

    /// Changes rows behind the service's back.
    async fn tamper(&self, id: &str, change: &str) {
        let sql = format!("update response_snapshots set {change} where response_id = '{id}'");
        assert_eq!(self.store.client.execute(&sql, &[]).await.unwrap(), 1);
    }

    /// The input of a request that continues `id`, rebuilt for the conversation's account.
    async fn rebuilt(&self, id: &str) -> Value {
        let chain = self.snapshots.chain(self.scope, id).await.unwrap();
        let body = json!({"model": "m", "previous_response_id": id, "input": [question("now")]});
        let whole = chain
            .rebuild(&Bytes::from(body.to_string()), self.account)
            .unwrap();
        let mut whole: Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!(whole.get("previous_response_id"), None);
        whole["input"].take()
    }

    async fn is_incomplete(&self, id: &str) -> bool {
        let chain = self.snapshots.chain(self.scope, id).await;
        matches!(chain, Err(Missing::Incomplete))
    }
}

fn question(id: &str) -> Value {
    json!({"role": "user", "content": format!("question é {id}")})
}

fn question_list(id: &str) -> String {
    json!([question(id)]).to_string()
}

fn answer(id: &str) -> Value {
    json!({"type": "message", "role": "assistant", "id": format!("msg_{id}"), "content": [{"type": "output_text", "text": id}]})
}

/// The items of a conversation and the new question.
fn told(numbers: std::ops::RangeInclusive<usize>) -> Value {
    let ids = numbers.map(|number| format!("r{number}"));
    let mut items: Vec<Value> = ids.flat_map(|id| [question(&id), answer(&id)]).collect();
    items.push(question("now"));
    json!(items)
}

#[tokio::test]
async fn a_conversation_is_rebuilt_from_root_to_response() {
    for store in Store::both_ways().await {
        let talk = Talk::new(&store);
        let last = talk.conversation(3).await;
        assert_eq!(talk.rebuilt("r3").await, told(1..=3));
        assert_eq!(
            talk.rebuilt("r1").await,
            told(1..=1),
            "a fork from any link"
        );
        let chain = talk.snapshots.chain(talk.scope, "r3").await.unwrap();
        assert_eq!(
            (chain.account, chain.lease),
            (Some(talk.account), Some(talk.lease))
        );
        assert_eq!((chain.depth, chain.parent()), (3, last));
        let found = talk
            .snapshots
            .find(talk.scope, "r2")
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            (found.account, found.lease),
            (Some(talk.account), Some(talk.lease))
        );
        assert_eq!((found.model.as_str(), found.complete), ("gpt-5", true));
    }
}

#[tokio::test]
async fn what_another_account_wrote_is_told_without_what_only_it_can_read() {
    let store = Store::direct().await;
    let mut talk = Talk::new(&store);
    let mut parent = None;
    for id in ["r1", "r2"] {
        let input =
            json!([question(id), {"type": "reasoning", "summary": [], "encrypted_content": id}]);
        let row = talk.turn(id, parent, &input.to_string()).await;
        talk.insert(&row).await;
        parent = Some(row.next);
        talk.account = AccountId::new();
    }
    let body = json!({"model": "m", "previous_response_id": "r2", "input": []});
    let body = Bytes::from(body.to_string());
    let chain = talk.snapshots.chain(talk.scope, "r2").await.unwrap();
    let whole = |account| {
        let body = chain.rebuild(&body, account).unwrap();
        history::input(&body).unwrap().to_owned()
    };
    let own = whole(chain.account.unwrap());
    assert!(
        !own.contains(r#""encrypted_content":"r1""#) && own.contains(r#""encrypted_content":"r2""#)
    );
    assert!(!own.contains("msg_r1") && own.contains("msg_r2"));
    let foreign = whole(talk.account);
    assert!(!foreign.contains("encrypted_content") && !foreign.contains("msg_"));
    assert!(foreign.contains("question é r1") && foreign.contains("question é r2"));
}

#[tokio::test]
async fn a_conversation_that_is_not_whole_is_not_told() {
    let store = Store::direct().await;
    let corrupt = "body = set_byte(body, 40, get_byte(body, 40) # 1)";
    // What happens to the second of three links.
    for (what, change) in [
        ("gap", "response_id = 'elsewhere'"),
        ("cycle", "parent_response_id = 'r3'"),
        ("not kept", "complete = false"),
        ("no body", "body = null"),
        ("corrupt", corrupt),
        ("another length", "bytes = bytes - 1"),
        ("other scope", "scope_id = gen_random_uuid()"),
        ("other chain", "chain_id = gen_random_uuid()"),
        ("too large", "bytes = 9 * 1024 * 1024"),
        (
            "expired",
            "created_at = created_at - interval '7 days 1 second'",
        ),
    ] {
        let talk = Talk::new(&store);
        talk.conversation(3).await;
        assert_eq!(talk.rebuilt("r3").await, told(1..=3));
        talk.tamper("r2", change).await;
        assert!(talk.is_incomplete("r3").await, "{what}");
        store
            .client
            .execute("delete from response_snapshots", &[])
            .await
            .unwrap();
    }
    let talk = Talk::new(&store);
    talk.conversation(1).await;
    talk.tamper("r1", "parent_response_id = 'r1', is_root = false")
        .await;
    assert!(talk.is_incomplete("r1").await, "its own parent");
    for id in ["unknown", "", "a\0b", &"x".repeat(1 << 20)] {
        assert!(talk.is_incomplete(id).await, "{id:.9}");
        assert_eq!(talk.snapshots.find(talk.scope, id).await.unwrap(), None);
    }
    let other = ScopeId::new();
    assert_eq!(talk.snapshots.find(other, "r1").await.unwrap(), None);
}

#[tokio::test]
async fn a_body_opens_with_any_key_of_the_ring_and_with_no_other() {
    let store = Store::direct().await;
    let (old, new) = (KeyRing::generate("old"), KeyRing::generate("new"));
    let writer = Talk::with(&store, &old);
    writer.conversation(2).await;
    let both = format!("{},{}", new.expose_secret(), old.expose_secret());
    let Ok(rotated) = KeyRing::parse(&SecretString::from(both)) else {
        return; // two random keys share their short id once in 256 draws
    };
    let rotated = Snapshots::new(store.db.clone(), rotated, Mode::Auto);
    assert_eq!(rotated.chain(writer.scope, "r2").await.unwrap().depth, 2);
    let foreign = KeyRing::parse(&new).unwrap();
    let foreign = Snapshots::new(store.db.clone(), foreign, Mode::Auto);
    let chain = foreign.chain(writer.scope, "r2").await;
    assert!(matches!(chain, Err(Missing::Incomplete)));
}

#[tokio::test]
async fn a_long_conversation_is_told_again_as_a_new_root() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    let last = talk.conversation(CHECKPOINT).await;
    assert_eq!(last.link.unwrap().depth, CHECKPOINT);
    let row = talk
        .turn("r33", Some(last.clone()), &question_list("r33"))
        .await;
    assert!(row.is_root && row.complete);
    assert_ne!(row.chain, last.link.unwrap().chain);
    talk.insert(&row).await;
    assert_eq!(row.next.link.unwrap().depth, 1);
    store
        .client
        .execute(
            "delete from response_snapshots where chain_id <> $1",
            &[&row.chain.0],
        )
        .await
        .unwrap();
    assert_eq!(talk.rebuilt("r33").await, told(1..=33));
}

#[tokio::test]
async fn a_chain_is_followed_for_128_links_and_no_more() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    // Checkpoints fail while the database does not have the chain.
    let mut rows: Vec<Row> = Vec::new();
    for number in 1..=LINKS {
        let id = format!("r{number}");
        let parent = rows.last().map(|row| row.next.clone());
        rows.push(talk.turn(&id, parent, &question_list(&id)).await);
    }
    assert!(rows.iter().all(|row| row.complete));
    let past = talk
        .turn("r129", rows.last().map(|row| row.next.clone()), "[]")
        .await;
    assert!(!past.complete && past.body.is_none() && past.next.link.is_none());
    let beyond = talk.turn("r130", Some(past.next.clone()), "[]").await;
    assert!(!beyond.complete && !beyond.is_root);
    for row in &rows {
        talk.insert(row).await;
    }
    assert_eq!(talk.rebuilt("r128").await, told(1..=128));
    // A row that another version wrote.
    let link = Link {
        chain: rows[0].chain,
        depth: 1,
        bytes: 2,
    };
    let parent = Parent {
        response_id: "r128".into(),
        link: Some(link),
    };
    talk.insert(&talk.turn("r129", Some(parent), "[]").await)
        .await;
    assert!(talk.is_incomplete("r129").await);
}

#[tokio::test]
async fn a_conversation_is_kept_up_to_8_mib() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    let large =
        |id| json!([{"role": "user", "content": format!("{id}{}", "x".repeat(TURN - 300))}]);
    let mut parent = None;
    for id in ["r1", "r2", "r3", "r4"] {
        let row = talk.turn(id, parent, &large(id).to_string()).await;
        talk.insert(&row).await;
        parent = Some(row.next);
    }
    let chain = talk.snapshots.chain(talk.scope, "r4").await.unwrap();
    assert!((CONVERSATION - 2000..=CONVERSATION).contains(&chain.bytes));
    assert_eq!(talk.rebuilt("r4").await.as_array().unwrap().len(), 9);
    let ninth = talk.turn("r5", parent, &large("r5").to_string()).await;
    assert!(!ninth.complete);
    talk.insert(&ninth).await;
    assert!(talk.is_incomplete("r5").await);
    let found = talk
        .snapshots
        .find(talk.scope, "r5")
        .await
        .unwrap()
        .unwrap();
    assert_eq!((found.account, found.complete), (Some(talk.account), false));
    // As if another version had kept it.
    let forced = Parent {
        response_id: "r4".into(),
        link: Some(Link {
            chain: chain.chain,
            depth: 4,
            bytes: 0,
        }),
    };
    let row = talk
        .turn("r6", Some(forced), &large("r6").to_string())
        .await;
    assert!(row.complete);
    talk.insert(&row).await;
    assert!(talk.is_incomplete("r6").await);
}

#[tokio::test]
async fn a_chain_is_deleted_whole_a_day_after_its_newest_link_or_a_week_after_its_root() {
    for store in Store::both_ways().await {
        // Ages of the two links of each chain in hours.
        let chains = [
            (23, 1, true),
            (30, 23, true),
            (167, 1, true),
            (25, 24, false),
            (169, 1, false),
        ];
        let mut talks = Vec::new();
        for (root, newest, stays) in chains {
            let talk = Talk::new(&store);
            talk.conversation(2).await;
            for (id, hours) in [("r1", root), ("r2", newest)] {
                let age = format!(
                    "update response_snapshots set created_at = clock_timestamp() - interval '{hours} hours' \
                     where response_id = '{id}' and scope_id = $1"
                );
                store.client.execute(&age, &[&talk.scope.0]).await.unwrap();
            }
            assert_eq!(
                !talk.is_incomplete("r2").await,
                stays,
                "{root} {newest}: read"
            );
            let found = talk.snapshots.find(talk.scope, "r2").await.unwrap();
            assert_eq!(found.is_some(), stays, "{root} {newest}: found");
            talks.push((talk, stays));
        }
        let another = Snapshots::new(
            store.another(),
            KeyRing::parse(&KeyRing::generate("k")).unwrap(),
            Mode::Off,
        );
        let (one, other) = tokio::join!(talks[0].0.snapshots.purge(), another.purge());
        assert_eq!(one.unwrap() + other.unwrap(), 4);
        for (talk, stays) in &talks {
            let left = "select count(*) from response_snapshots where scope_id = $1";
            let left: i64 = store
                .client
                .query_one(left, &[&talk.scope.0])
                .await
                .unwrap()
                .get(0);
            assert_eq!(left, if *stays { 2 } else { 0 });
        }
    }
}

#[tokio::test]
async fn many_old_chains_go_in_batches_and_not_while_another_replica_is_at_it() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    let fill = "insert into response_snapshots (scope_id, response_id, chain_id, model, is_root, complete, bytes, created_at) \
                select gen_random_uuid(), 'r', gen_random_uuid(), 'm', true, false, 0, clock_timestamp() - interval '2 days' \
                from generate_series(1, 250)";
    store.client.execute(fill, &[]).await.unwrap();
    store
        .client
        .batch_execute("begin; select pg_advisory_xact_lock(4714, 2)")
        .await
        .unwrap();
    assert_eq!(talk.snapshots.purge().await.unwrap(), 0);
    store.client.batch_execute("commit").await.unwrap();
    assert_eq!(talk.snapshots.purge().await.unwrap(), 250);
}

#[tokio::test]
async fn a_database_that_is_away_is_not_a_missing_conversation() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    talk.conversation(1).await;
    store.db.close();
    let chain = talk.snapshots.chain(talk.scope, "r1").await;
    assert!(matches!(chain, Err(Missing::Unavailable(_))));
    assert!(talk.snapshots.find(talk.scope, "r1").await.is_err());
}

#[tokio::test]
async fn nothing_that_was_said_stands_in_a_plain_column() {
    let store = Store::direct().await;
    let talk = Talk::new(&store);
    talk.conversation(2).await;
    let rows = store
        .client
        .query(
            "select s::text, encode(body, 'escape') from response_snapshots s",
            &[],
        )
        .await
        .unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let (text, body): (String, String) = (row.get(0), row.get(1));
        assert!(!text.contains("question") && !body.contains("question"));
    }
    // Not even by its chain id may a row be told in another place.
    let chain: ChainId = store
        .client
        .query_one("select distinct chain_id from response_snapshots", &[])
        .await
        .unwrap()
        .get(0);
    let moved = ScopeId::new();
    store
        .client
        .execute(
            "update response_snapshots set scope_id = $1 where chain_id = $2",
            &[&moved.0, &chain.0],
        )
        .await
        .unwrap();
    let chain = talk.snapshots.chain(moved, "r2").await;
    assert!(matches!(chain, Err(Missing::Incomplete)));
}
