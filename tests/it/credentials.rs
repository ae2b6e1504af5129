//! Fresh credentials: one exchange for all who need it, and what becomes of an account whose login is refused.
//!
//! The token endpoint of most of these tests answers when the test does, so that every race happens in the order that is tested.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{Json, Router, http::StatusCode, routing::post};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    account::{Accounts, AuthFile, Claim},
    bus::{Bus, Topic},
    db::Db,
    ids::AccountId,
    routing::Lifecycle,
    secret::{KeyRing, Pepper},
    task::Tasks,
    upstream::credential::{Credential, CredentialError, Credentials, Freshness},
};
use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use loadtest::upstream::Upstream;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::support::{store::Store, wait::until};

/// What upstream hands out to one person.
struct Login {
    /// Tells the tokens of one login from those of the next.
    serial: u32,
    plan: &'static str,
    /// How long the access token claims to live.
    lifetime: SignedDuration,
}

const FIRST: Login = Login {
    serial: 1,
    plan: "plus",
    lifetime: SignedDuration::from_hours(24),
};
const SECOND: Login = Login { serial: 2, ..FIRST };

impl Login {
    fn tokens(&self, now: Timestamp) -> Value {
        let claims = json!({
            "exp": (now + self.lifetime).as_second(),
            "jti": self.serial,
            "https://api.openai.com/auth": {
                "chatgpt_account_id": "ws",
                "chatgpt_user_id": "alice",
                "chatgpt_plan_type": self.plan,
            },
        });
        let access = format!(
            "e30.{}.c2ln",
            BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        json!({ "access_token": access, "refresh_token": format!("rt_{}", self.serial) })
    }

    async fn import(&self, accounts: &Accounts, store: &Store) -> AccountId {
        let file = json!({ "tokens": self.tokens(store.db.clock().now()) }).to_string();
        import(accounts, &file).await
    }
}

async fn import(accounts: &Accounts, file: &str) -> AccountId {
    let file = AuthFile::parse(file.as_bytes()).ok().unwrap();
    accounts.import(&file, None).await.ok().unwrap().id
}

async fn accounts(store: &Store) -> Accounts {
    accounts_through(&store.db).await
}

async fn accounts_through(db: &Db) -> Accounts {
    static RING: LazyLock<SecretString> = LazyLock::new(|| KeyRing::generate("k1"));
    db.learn_time().await.unwrap();
    let ring = KeyRing::parse(&RING).unwrap();
    Accounts::new(db.clone(), ring, Pepper::new([7; 32]))
}

/// Status, reason and plan of the only account.
async fn state(accounts: &Accounts) -> (Lifecycle, Option<String>, String) {
    let account = accounts.list().await.ok().unwrap().remove(0);
    (account.lifecycle, account.reason, account.plan)
}

/// A token endpoint that answers when the test does.
struct Desk {
    url: String,
    asked: mpsc::UnboundedReceiver<Exchange>,
    server: JoinHandle<()>,
}

/// An exchange that waits for its answer.
struct Exchange {
    refresh: String,
    answer: oneshot::Sender<(StatusCode, Value)>,
}

impl Desk {
    async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, asked) = mpsc::unbounded_channel();
        let token = async move |Json(body): Json<Value>| {
            let (answer, answered) = oneshot::channel();
            let refresh = body["refresh_token"].as_str().unwrap().to_owned();
            sender.send(Exchange { refresh, answer }).ok().unwrap();
            let (status, body) = answered.await.unwrap();
            (status, Json(body))
        };
        let router = Router::new().route("/oauth/token", post(token));
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, asked, server }
    }

    async fn next(&mut self) -> Exchange {
        let next = timeout(Duration::from_secs(10), self.asked.recv()).await;
        next.expect("an exchange").unwrap()
    }

    fn is_quiet(&mut self) -> bool {
        self.asked.try_recv().is_err()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Exchange {
    fn give(self, login: &Login, now: Timestamp) {
        self.answer
            .send((StatusCode::OK, login.tokens(now)))
            .unwrap();
    }

    fn refuse(self, status: StatusCode, code: &str) {
        self.answer
            .send((status, json!({ "error": { "code": code } })))
            .unwrap();
    }
}

/// What one process knows of the pool.
struct Replica {
    credentials: Credentials,
    bus: Bus,
    tasks: Tasks,
}

impl Replica {
    async fn start(store: &Store, accounts: &Accounts, auth_url: &str) -> Self {
        // reqwest asks for one, even where no TLS is spoken; only the first call counts.
        drop(rustls::crypto::ring::default_provider().install_default());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let bus = Bus::connect(&store.db).await.unwrap();
        let tasks = Tasks::new();
        let clock = store.db.clock().clone();
        let credentials = Credentials::new(accounts.clone(), client, auth_url, clock, &bus, &tasks);
        tasks.essential("bus", bus.clone().run(tasks.clone()));
        Self {
            credentials,
            bus,
            tasks,
        }
    }

    /// Asks in a task, so that the test can go on.
    fn ask(
        &self,
        id: AccountId,
        freshness: Freshness,
    ) -> JoinHandle<Result<Arc<Credential>, CredentialError>> {
        let credentials = self.credentials.clone();
        tokio::spawn(async move { credentials.fresh(id, freshness).await })
    }

    async fn any(&self, id: AccountId) -> Result<Arc<Credential>, CredentialError> {
        self.credentials.fresh(id, Freshness::Any).await
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

/// One account, one replica, and the desk that both sides of an exchange are seen from.
async fn set_up() -> (Store, Accounts, AccountId, Desk, Replica) {
    let store = Store::direct().await;
    let accounts = accounts(&store).await;
    let id = FIRST.import(&accounts, &store).await;
    let desk = Desk::open().await;
    let replica = Replica::start(&store, &accounts, &desk.url).await;
    (store, accounts, id, desk, replica)
}

/// Lets every access token end in so many minutes, a day after it came.
async fn end_in(store: &Store, minutes: i32) {
    let update =
        "update account_credentials set refreshed_at = clock_timestamp() - interval '1 day',
        access_expires_at = clock_timestamp() + make_interval(mins => $1)";
    store.client.execute(update, &[&minutes]).await.unwrap();
}

#[tokio::test]
async fn fifty_callers_with_an_expired_or_refused_token_spend_one_refresh_token() {
    let upstream = Upstream::start(loadtest::upstream::Config::default()).await;
    for (name, store) in ["alice", "bob"].iter().zip(Store::both_ways().await) {
        let accounts = accounts(&store).await;
        let account = upstream.account(name);
        let id = import(&accounts, &account.auth_json()).await;
        end_in(&store, -1).await;
        let replica = Replica::start(&store, &accounts, &upstream.auth_url()).await;
        for (freshness, generation) in [(Freshness::Any, 2), (Freshness::NotGeneration(2), 3)] {
            let answers = join_all((0..50).map(|_| replica.credentials.fresh(id, freshness))).await;
            for answer in answers {
                let credential = answer.unwrap();
                assert_eq!(credential.generation, generation);
                assert_eq!(credential.access.expose_secret(), account.access_token());
                assert_eq!(credential.chatgpt_account_id, Some(account.id()));
            }
        }
        assert_eq!((account.exchanges(), account.reuses()), (2, 0));
    }
}

#[tokio::test]
async fn an_exchange_outlives_the_caller_that_began_it() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    let exchange = desk.next().await;
    assert_eq!(exchange.refresh, "rt_1");
    caller.abort();
    assert!(caller.await.unwrap_err().is_cancelled());
    let next = replica.ask(id, Freshness::NotGeneration(1));
    exchange.give(&SECOND, store.db.clock().now());
    assert_eq!(next.await.unwrap().unwrap().generation, 2);
    let stored = accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(
        (stored.generation, stored.refresh.expose_secret()),
        (2, "rt_2")
    );
    assert!(desk.is_quiet());
}

#[tokio::test]
async fn a_spent_token_condemns_nobody_whose_credential_has_changed_meanwhile() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    let exchange = desk.next().await;
    SECOND.import(&accounts, &store).await;
    exchange.refuse(StatusCode::UNAUTHORIZED, "refresh_token_reused");
    assert_eq!(
        caller.await.unwrap().unwrap().generation,
        2,
        "what is stored is adopted"
    );
    assert_eq!(
        state(&accounts).await,
        (Lifecycle::Active, None, "plus".into())
    );
    assert!(desk.is_quiet());
}

#[tokio::test]
async fn a_refused_login_takes_its_account_out_of_service_and_is_not_asked_again() {
    for (code, status) in [
        ("refresh_token_reused", Lifecycle::ReauthRequired),
        ("account_deactivated", Lifecycle::Deactivated),
    ] {
        let (_store, accounts, id, mut desk, replica) = set_up().await;
        let caller = replica.ask(id, Freshness::NotGeneration(1));
        desk.next().await.refuse(StatusCode::UNAUTHORIZED, code);
        let error = caller.await.unwrap().unwrap_err();
        assert!(error.is_final(), "{error}");
        assert_eq!(
            state(&accounts).await,
            (status, Some(code.into()), "plus".into())
        );
        assert!(
            replica
                .credentials
                .fresh(id, Freshness::NotGeneration(1))
                .await
                .unwrap_err()
                .is_final()
        );
        assert!(desk.is_quiet());
    }
}

#[tokio::test]
async fn a_refusal_that_nobody_knows_counts_when_the_next_exchange_of_the_same_login_ends_so_too() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let later = async || {
        let later = "update refresh_claims set claimed_until = clock_timestamp() - interval '1 ms'";
        store.client.execute(later, &[]).await.unwrap();
    };
    let mut replicas = vec![replica];
    for (generation, serving) in [(1, true), (2, true), (2, false)] {
        let replica = replicas.last().unwrap();
        let caller = replica.ask(id, Freshness::NotGeneration(generation));
        desk.next()
            .await
            .refuse(StatusCode::FORBIDDEN, "client_version_unsupported");
        let error = caller.await.unwrap().unwrap_err();
        assert_eq!(error.is_final(), !serving, "{error}");
        let status = state(&accounts).await.0;
        assert_eq!(status == Lifecycle::Active, serving);
        // Nobody asks again for some minutes.
        let another = Replica::start(&store, &accounts, &desk.url).await;
        let wanted = Freshness::NotGeneration(generation);
        assert!(another.credentials.fresh(id, wanted).await.is_err());
        assert!(desk.is_quiet());
        if generation == 1 {
            SECOND.import(&accounts, &store).await;
        }
        later().await;
        replicas.push(Replica::start(&store, &accounts, &desk.url).await);
    }
    let reason = state(&accounts).await.1;
    assert_eq!(reason.as_deref(), Some("client_version_unsupported"));
}

#[tokio::test]
async fn a_token_that_is_good_is_given_out_while_it_is_renewed() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    end_in(&store, 2).await;
    assert_eq!(replica.any(id).await.unwrap().generation, 1);
    assert_eq!(replica.any(id).await.unwrap().generation, 1);
    let exchange = desk.next().await;
    // However long that takes.
    for _ in 0..50 {
        assert_eq!(replica.any(id).await.unwrap().generation, 1);
    }
    let refused = replica.ask(id, Freshness::NotGeneration(1));
    exchange.give(&SECOND, store.db.clock().now());
    assert_eq!(refused.await.unwrap().unwrap().generation, 2);
    assert_eq!(replica.any(id).await.unwrap().generation, 2);
    assert_eq!(state(&accounts).await.0, Lifecycle::Active);
    assert!(desk.is_quiet());
}

#[tokio::test]
async fn logins_that_are_due_do_not_wait_for_each_other() {
    let (store, accounts, _, mut desk, replica) = set_up().await;
    for user in ["bob", "carol"] {
        let file = json!({ "tokens": { "access_token": "opaque", "refresh_token": user, "account_id": user } });
        import(&accounts, &file.to_string()).await;
    }
    end_in(&store, 2).await;
    let credentials = replica.credentials.clone();
    let keeping = tokio::spawn(async move { credentials.keep_fresh().await });
    let exchanges = [desk.next().await, desk.next().await, desk.next().await];
    for exchange in exchanges {
        exchange.refuse(StatusCode::SERVICE_UNAVAILABLE, "later");
    }
    keeping.await.unwrap().unwrap();
}

#[tokio::test]
async fn new_tokens_overrule_the_verdict_of_a_peer_that_came_second() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    let exchange = desk.next().await;
    assert!(
        accounts
            .set_lifecycle(id, Lifecycle::ReauthRequired, "refresh_token_reused", 1)
            .await
            .unwrap()
    );
    exchange.give(&SECOND, store.db.clock().now());
    assert_eq!(caller.await.unwrap().unwrap().generation, 2);
    assert_eq!(
        state(&accounts).await,
        (Lifecycle::Active, None, "plus".into())
    );
}

#[tokio::test]
async fn an_exchange_is_taken_in_while_the_renewal_of_its_claim_hangs() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    let exchange = desk.next().await;
    let (mut other, mut driver) = store.db.dedicated().await.unwrap();
    let driver = tokio::spawn(async move { while driver.next().await.is_some() {} });
    let held = other.transaction().await.unwrap();
    let claims = "select from refresh_claims for update";
    assert_eq!(held.execute(claims, &[]).await.unwrap(), 1);
    let waits = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    until("the renewal waits", async || {
        !store.client.query(waits, &[]).await.unwrap().is_empty()
    })
    .await;
    exchange.give(&SECOND, store.db.clock().now());
    until("the tokens are stored", async || {
        let stored = accounts.credential(id).await.unwrap().unwrap();
        stored.generation == 2
    })
    .await;
    held.commit().await.unwrap();
    assert_eq!(caller.await.unwrap().unwrap().generation, 2);
    driver.abort();
}

#[tokio::test]
async fn a_paused_account_stays_paused_when_its_tokens_are_renewed() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    accounts.pause(id).await.unwrap();
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    desk.next().await.give(&SECOND, store.db.clock().now());
    assert_eq!(caller.await.unwrap().unwrap().generation, 2);
    assert_eq!(state(&accounts).await.0, Lifecycle::Paused);
}

#[tokio::test]
async fn a_failed_exchange_is_not_repeated_and_the_token_is_used_while_it_lasts() {
    for (minutes, usable) in [(2, true), (-1, false)] {
        let (store, accounts, id, mut desk, replica) = set_up().await;
        end_in(&store, minutes).await;
        if usable {
            assert!(replica.any(id).await.is_ok(), "it is read");
        }
        let caller = replica.ask(id, Freshness::Any);
        let exchange = desk.next().await;
        let refused = replica.ask(id, Freshness::NotGeneration(1));
        exchange.refuse(StatusCode::BAD_GATEWAY, "refresh_token_reused");
        assert!(refused.await.unwrap().is_err());
        for answer in [caller.await.unwrap(), replica.any(id).await] {
            match answer {
                Ok(credential) => assert!(usable && credential.generation == 1),
                Err(error) => assert!(!usable && !error.is_final(), "{error}"),
            }
        }
        let refused = replica
            .credentials
            .fresh(id, Freshness::NotGeneration(1))
            .await;
        assert!(
            matches!(refused, Err(CredentialError::Transient)),
            "what upstream refused is not given out"
        );
        assert!(desk.is_quiet());
        assert_eq!(state(&accounts).await.0, Lifecycle::Active);
    }
}

#[tokio::test]
async fn a_token_that_is_born_expired_is_used_and_not_exchanged_again() {
    let (store, _accounts, id, mut desk, replica) = set_up().await;
    let caller = replica.ask(id, Freshness::NotGeneration(1));
    let dead = Login {
        lifetime: SignedDuration::from_hours(-1),
        ..SECOND
    };
    desk.next().await.give(&dead, store.db.clock().now());
    assert_eq!(caller.await.unwrap().unwrap().generation, 2);
    assert_eq!(replica.any(id).await.unwrap().generation, 2);
    assert!(desk.is_quiet());
}

#[tokio::test]
async fn a_replica_adopts_what_its_peer_has_exchanged() {
    let upstream = Upstream::start(loadtest::upstream::Config::default()).await;
    let account = upstream.account("alice");
    let store = Store::direct().await;
    let accounts = accounts(&store).await;
    let id = import(&accounts, &account.auth_json()).await;
    end_in(&store, 60).await;
    let one = Replica::start(&store, &accounts, &upstream.auth_url()).await;
    let other = Replica::start(&store, &accounts, &upstream.auth_url()).await;
    for replica in [&one, &other] {
        assert_eq!(replica.any(id).await.unwrap().generation, 1);
    }
    for replica in [&one, &other] {
        let fresh = replica
            .credentials
            .fresh(id, Freshness::NotGeneration(1))
            .await;
        assert_eq!(fresh.unwrap().generation, 2);
    }
    assert_eq!((account.exchanges(), account.reuses()), (1, 0));
}

#[tokio::test]
async fn a_new_login_brings_an_account_back_everywhere() {
    let (store, accounts, id, mut desk, one) = set_up().await;
    let replicas = [one, Replica::start(&store, &accounts, &desk.url).await];
    assert!(
        accounts
            .set_lifecycle(id, Lifecycle::ReauthRequired, "invalid_grant", 1)
            .await
            .unwrap()
    );
    for replica in &replicas {
        assert!(replica.any(id).await.unwrap_err().is_final());
    }
    SECOND.import(&accounts, &store).await;
    for replica in &replicas {
        assert_eq!(replica.any(id).await.unwrap().generation, 2);
    }
    accounts.delete(id).await.unwrap();
    let deadline = Instant::now() + Duration::from_millis(2_500);
    for replica in &replicas {
        while replica.any(id).await.is_ok() {
            assert!(Instant::now() < deadline, "a deleted account still serves");
            sleep(Duration::from_millis(10)).await;
        }
        let gone = replica.any(id).await;
        assert!(matches!(gone, Err(CredentialError::Unknown)));
    }
    assert!(desk.is_quiet());
}

#[tokio::test]
async fn what_was_read_before_a_change_will_do_while_the_database_is_away() {
    let store = Store::direct().await;
    let accounts = accounts(&store).await;
    let id = FIRST.import(&accounts, &store).await;
    let desk = Desk::open().await;
    let (db, network) = store.behind_chaos().await;
    let replica = Replica::start(&store, &accounts_through(&db).await, &desk.url).await;
    assert_eq!(replica.any(id).await.unwrap().generation, 1);

    network.hang();
    let heard = replica.bus.changes(Topic::Accounts);
    SECOND.import(&accounts, &store).await;
    until("the change is heard", async || {
        replica.bus.changes(Topic::Accounts) > heard
    })
    .await;
    let while_away = timeout(Duration::from_secs(4), replica.any(id)).await;
    assert_eq!(while_away.unwrap().unwrap().generation, 1);

    network.heal();
    until("the new one is read", async || {
        replica.any(id).await.unwrap().generation == 2
    })
    .await;
    accounts.delete(id).await.unwrap();
    until("the account is gone", async || {
        matches!(replica.any(id).await, Err(CredentialError::Unknown))
    })
    .await;
    network.hang();
    let away = replica.any(id).await.unwrap_err();
    assert!(
        matches!(&away, CredentialError::Db(error) if error.is_passing()),
        "{away}"
    );
}

#[tokio::test]
async fn fresh_tokens_replace_the_spent_ones_that_were_imported_again_meanwhile() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let renewed = replica.ask(id, Freshness::NotGeneration(1));
    let exchange = desk.next().await;
    FIRST.import(&accounts, &store).await;
    exchange.give(&SECOND, store.db.clock().now());
    assert_eq!(renewed.await.unwrap().unwrap().generation, 3);
    let stored = accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(stored.refresh.expose_secret(), "rt_2");

    // Another login is another matter.
    let late = replica.ask(id, Freshness::NotGeneration(3));
    let exchange = desk.next().await;
    let third = Login { serial: 3, ..FIRST };
    third.import(&accounts, &store).await;
    exchange.give(&Login { serial: 4, ..FIRST }, store.db.clock().now());
    assert_eq!(late.await.unwrap().unwrap().generation, 4);
    let stored = accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(stored.refresh.expose_secret(), "rt_3");
}

#[tokio::test]
async fn an_exchange_that_may_have_left_is_replayed_by_no_replica() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let other = Replica::start(&store, &accounts, &desk.url).await;
    let asked = [&replica, &other].map(|replica| replica.ask(id, Freshness::NotGeneration(1)));
    // The connection is cut: nobody knows whether the token is spent.
    drop(desk.next().await);
    for answer in asked {
        let error = answer.await.unwrap().err().unwrap();
        assert!(matches!(error, CredentialError::Transient), "{error}");
    }
    assert!(desk.is_quiet(), "neither tries again at once");
    assert_eq!(state(&accounts).await.0, Lifecycle::Active);
}

#[tokio::test]
async fn logins_that_are_due_are_refreshed_though_nobody_uses_them_and_failures_make_them_rare() {
    let (store, accounts, id, mut desk, replica) = set_up().await;
    let day = Duration::from_secs(86_400);
    let due = async || {
        accounts
            .due(Duration::from_secs(300), 8 * day)
            .await
            .unwrap()
    };
    accounts.pause(id).await.unwrap();
    assert!(due().await.is_empty(), "fresh");
    let old = "update account_credentials set refreshed_at = clock_timestamp() - interval '9 days'";
    store.client.execute(old, &[]).await.unwrap();
    assert_eq!(due().await, [id], "old");
    end_in(&store, 4).await;
    assert_eq!(due().await, [id], "about to end");

    let keeping = async |desk: &mut Desk| {
        let credentials = replica.credentials.clone();
        let keeping = tokio::spawn(async move { credentials.keep_fresh().await });
        (desk.next().await, keeping)
    };
    let (exchange, keeping_fresh) = keeping(&mut desk).await;
    exchange.refuse(StatusCode::SERVICE_UNAVAILABLE, "later");
    keeping_fresh.await.unwrap().unwrap();
    assert!(due().await.is_empty(), "not again for some minutes");
    let soon =
        "update refresh_claims set retry_at = clock_timestamp(), claimed_until = clock_timestamp()";
    store.client.execute(soon, &[]).await.unwrap();
    // This replica remembers for some seconds that it failed; another does not.
    let other = Replica::start(&store, &accounts, &desk.url).await;
    let credentials = other.credentials.clone();
    let keeping_fresh = tokio::spawn(async move { credentials.keep_fresh().await });
    let exchange = desk.next().await;
    exchange.give(&SECOND, store.db.clock().now());
    keeping_fresh.await.unwrap().unwrap();
    assert!(due().await.is_empty());
    assert_eq!(state(&accounts).await.0, Lifecycle::Paused);
    let stored = accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(stored.generation, 2);
}

#[tokio::test]
async fn a_claim_is_one_replicas_until_it_is_given_back_or_ends() {
    let (store, accounts, id, _desk, _replica) = set_up().await;
    let claim = async |time| accounts.claim(id, time).await.unwrap();
    let minute = Duration::from_secs(60);
    let racing = join_all((0..8).map(|_| accounts.claim(id, minute))).await;
    let mut won = racing.into_iter().filter_map(|claim| match claim.unwrap() {
        Claim::Mine(claim) => Some(claim),
        other => {
            assert_eq!(other, Claim::Theirs);
            None
        }
    });
    let first = won.next().unwrap();
    assert_eq!(won.next(), None);
    drop(won);
    let end = "update refresh_claims set claimed_until = clock_timestamp() - interval '1 ms'";
    store.client.execute(end, &[]).await.unwrap();
    let Claim::Mine(second) = claim(minute).await else {
        panic!("it had ended")
    };
    // Whoever had it can neither prolong nor end it any more.
    accounts.renew_claim(id, first, minute).await.unwrap();
    accounts.unclaim(id, first).await.unwrap();
    assert_eq!(claim(minute).await, Claim::Theirs);
    accounts.unclaim_failed(id, second, minute).await.unwrap();
    assert_eq!(claim(minute).await, Claim::Failed);
}
