//! A lease has one owner, a turn is begun by it alone, and what a fenced replica says afterwards moves nothing.

mod crowd;
mod meaning;
mod requests;

use std::{collections::HashSet, time::Duration};

use drawbridge::{
    db::{Db, Error},
    ids::{AccountId, BootId, ChainId, LeaseId, ScopeId, TurnId},
    lease::{Held, Key, Kind, Leases, Owner, Row},
    ledger::{
        Answer, Booked, Fence, Ledger, NotOpened, Opened, Opening, Outcome, Request, Settlement,
        Snapshot, Try,
    },
    task::Tasks,
};
use futures_util::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::watch, time::sleep};

use crate::support::store::Store;

const RACERS: usize = 24;

/// A replica as the database knows it: a registered incarnation, and connections of its own.
pub(crate) struct Replica {
    pub(crate) boot: BootId,
    pub(crate) leases: Leases,
    pub(crate) ledger: Ledger,
}

impl Replica {
    pub(crate) async fn new(store: &Store) -> Self {
        Self::over(store, store.another()).await
    }

    /// One that shares its connections with others.
    pub(crate) async fn over(store: &Store, db: Db) -> Self {
        let boot = BootId::new();
        let register = "insert into bridge_replicas (boot_id, replica_name, expires_at)
            values ($1, 'test', clock_timestamp() + interval '1 hour')";
        store.client.execute(register, &[&boot]).await.unwrap();
        Self {
            boot,
            leases: Leases::new(db.clone()),
            ledger: Ledger::new(db, watch::channel(boot).1, &Tasks::new()),
        }
    }

    async fn claim(&self, scope: ScopeId, key: Key) -> Option<Held> {
        self.leases.claim(self.boot, scope, key).await.unwrap()
    }

    async fn claim_id(&self, scope: ScopeId, lease: LeaseId) -> Option<Held> {
        self.leases.claim_id(self.boot, scope, lease).await.unwrap()
    }

    async fn take(&self, scope: ScopeId, seen: &Row) -> Option<Held> {
        self.leases.take(self.boot, scope, seen).await.unwrap()
    }

    async fn row(&self, scope: ScopeId, lease: LeaseId) -> Option<Row> {
        self.leases.by_id(self.boot, scope, lease).await.unwrap()
    }

    async fn begin(&self, scope: ScopeId, held: &Held) -> Opened {
        self.ledger.open(opening(scope, Some(held))).await.unwrap()
    }

    async fn finish(&self, opened: &Opened, settlement: &Settlement) -> (bool, bool) {
        let Booked { turn, lease } = self.ledger.settle(opened, settlement).await.unwrap();
        (turn, lease)
    }
}

pub(crate) async fn bury(store: &Store, boot: BootId) {
    let bury = "update bridge_replicas set dead_at = clock_timestamp() where boot_id = $1 and dead_at is null";
    assert_eq!(store.client.execute(bury, &[&boot]).await.unwrap(), 1);
}

pub(crate) fn opening(scope: ScopeId, held: Option<&Held>) -> Opening {
    Opening {
        request: Request {
            id: TurnId::new(),
            scope,
            api_key: None,
            route: "/v1/responses",
            transport: "http",
            model: "gpt-5.2".into(),
            user_agent: None,
        },
        client_turn: None,
        fence: held.map(|held| Fence {
            lease: held.lease,
            generation: held.generation,
            retain: held.key.kind.retain(),
        }),
        first: Try {
            account: AccountId::new(),
            transport: "websocket",
            request_bytes: 400,
        },
    }
}

pub(crate) fn answered(response: Option<&str>) -> Settlement {
    Settlement {
        answer: Answer {
            outcome: Outcome::Completed,
            status: 200,
            reason: None,
            error_code: None,
            first_event: None,
            total: Duration::from_millis(9),
            bridge: None,
            explanation: None,
        },
        response_id: response.map(Into::into),
        sticky: None,
        complete: response.is_some(),
        snapshot: Some(Snapshot {
            parent: None,
            chain: ChainId::new(),
            lease: None,
            is_root: true,
            complete: true,
            bytes: 2,
            key_id: Some("k".into()),
            body: Some(b"{}".to_vec()),
        }),
    }
}

fn thread(name: &str) -> Key {
    Key::new(Kind::Thread, name)
}

async fn number(store: &Store, query: &str) -> i64 {
    store.client.query_one(query, &[]).await.unwrap().get(0)
}

async fn head(store: &Store, lease: LeaseId) -> Option<String> {
    let head = "select head_response_id from http_bridge_leases where lease_id = $1";
    store
        .client
        .query_one(head, &[&lease])
        .await
        .unwrap()
        .get(0)
}

/// Of several ways to one lease, as many processes go them at once.
async fn race(
    store: &Store,
    go: impl AsyncFn(&Replica) -> Result<Option<Held>, Error>,
) -> (Vec<Replica>, usize, Held) {
    let connections = [store.another(), store.another()];
    let mut racers = Vec::new();
    for number in 0..RACERS {
        racers.push(Replica::over(store, connections[number % 2].clone()).await);
    }
    let results = join_all(racers.iter().map(async |racer| go(racer).await)).await;
    let won: Vec<_> = results
        .into_iter()
        .enumerate()
        .filter_map(|(number, result)| Some((number, result.unwrap()?)))
        .collect();
    let [(winner, held)] = won[..] else {
        panic!("{} winners", won.len());
    };
    (racers, winner, held)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_all_who_claim_a_fresh_key_one_owns_it_and_the_others_see_whom_to_ask() {
    for store in Store::both_ways().await {
        let (scope, key) = (ScopeId::new(), thread("fresh"));
        let (racers, winner, held) = race(&store, async |racer| {
            racer.leases.claim(racer.boot, scope, key).await
        })
        .await;
        assert_eq!(held.boot, racers[winner].boot);
        for (number, racer) in racers.iter().enumerate() {
            let row = racer.leases.by_key(racer.boot, scope, key).await.unwrap();
            let row = row.unwrap();
            assert_eq!((row.lease, row.generation), (held.lease, held.generation));
            match row.owner {
                Owner::Me => assert_eq!(number, winner),
                Owner::Other {
                    boot, alive_for, ..
                } => assert!(boot == held.boot && alive_for > Duration::from_secs(3000)),
                owner => panic!("{owner:?}"),
            }
        }
        assert_eq!(
            number(&store, "select count(*) from http_bridge_leases").await,
            1
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_all_who_inherit_from_the_dead_one_wins_with_a_new_generation() {
    for store in Store::both_ways().await {
        let (scope, key) = (ScopeId::new(), thread("inherited"));
        let owner = Replica::new(&store).await;
        let old = owner.claim(scope, key).await.unwrap();
        owner.begin(scope, &old).await;
        bury(&store, owner.boot).await;
        let (.., held) = race(&store, async |racer| {
            racer.leases.claim(racer.boot, scope, key).await
        })
        .await;
        assert_eq!(held.lease, old.lease);
        assert!(held.generation > old.generation);
    }
}

#[tokio::test]
async fn a_lease_is_claimed_when_it_is_free_mine_and_idle_or_its_owner_is_dead() {
    for store in Store::both_ways().await {
        let (scope, key) = (ScopeId::new(), thread("t"));
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let first = one.claim(scope, key).await.unwrap();
        assert!(other.claim(scope, key).await.is_none(), "its owner lives");
        assert!(other.claim_id(scope, first.lease).await.is_none());

        let again = one.claim(scope, key).await.expect("mine and idle");
        assert!(again.generation > first.generation && again.lease == first.lease);
        assert!(!one.leases.release(&first).await.unwrap(), "a late release");
        let turn = one.begin(scope, &again).await;
        assert!(one.claim(scope, key).await.is_none(), "mine and busy");
        assert!(one.claim_id(scope, first.lease).await.is_none());
        assert!(!one.leases.release(&again).await.unwrap(), "busy");
        assert_eq!(one.finish(&turn, &answered(None)).await, (true, true));

        assert!(one.leases.release(&again).await.unwrap());
        assert!(!one.leases.release(&again).await.unwrap());
        let row = other.row(scope, first.lease).await.unwrap();
        assert_eq!((row.owner, row.turn_seq), (Owner::Nobody, 1));
        let freed = other.claim(scope, key).await.expect("free");
        assert!(freed.generation > again.generation);

        other.begin(scope, &freed).await;
        assert!(one.claim(scope, key).await.is_none());
        bury(&store, other.boot).await;
        let row = one.row(scope, first.lease).await.unwrap();
        assert_eq!(row.owner, Owner::Dead);
        let inherited = one.claim_id(scope, first.lease).await.expect("dead");
        assert!(inherited.generation > freed.generation);
        let row = one.row(scope, first.lease).await.unwrap();
        assert_eq!((row.owner, row.busy_turn), (Owner::Me, None));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purged_lease_is_made_again_once_whoever_asks_for_it() {
    for store in Store::both_ways().await {
        let (scope, lease) = (ScopeId::new(), LeaseId::new());
        let (_, _, held) = race(&store, async |racer| {
            racer.leases.claim_id(racer.boot, scope, lease).await
        })
        .await;
        assert_eq!((held.lease, held.key), (lease, Key::of_lease(lease)));
        let stranger = Replica::new(&store).await;
        let elsewhere = ScopeId::new();
        assert!(stranger.claim_id(elsewhere, lease).await.is_none());
        assert!(stranger.row(elsewhere, lease).await.is_none());
        bury(&store, held.boot).await;
        assert!(
            stranger.claim_id(elsewhere, lease).await.is_none(),
            "free, and still another scope's"
        );
        let row = stranger.row(scope, lease).await.unwrap();
        assert_eq!((row.generation, row.owner), (held.generation, Owner::Dead));
        assert_eq!(
            number(&store, "select count(*) from http_bridge_leases").await,
            1
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_beginning_and_a_takeover_exactly_one_happens() {
    const LANES: usize = 8;
    const RACES: usize = 125;
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for store in Store::both_ways().await {
        let (owner, taker) = (Replica::new(&store).await, Replica::new(&store).await);
        let scope = ScopeId::new();
        let lane = async |mut random: StdRng| {
            let mut begun = 0;
            for _ in 0..RACES {
                let held = owner.claim(scope, Key::fork()).await.unwrap();
                let seen = taker.row(scope, held.lease).await.unwrap();
                let opening = opening(scope, Some(&held));
                let request = opening.request.id;
                let mut pause = || Duration::from_micros(random.random_range(0..3000));
                let (before, after) = (pause(), pause());
                let (begins, takes) = tokio::join!(
                    async {
                        sleep(before).await;
                        owner.ledger.open(opening).await
                    },
                    async {
                        sleep(after).await;
                        taker.take(scope, &seen).await
                    }
                );
                let row = taker.row(scope, held.lease).await.unwrap();
                match (begins, takes) {
                    (Ok(_), None) => {
                        assert_eq!(row.busy_turn, Some(request));
                        assert_eq!((row.generation, row.turn_seq), (held.generation, 1));
                        begun += 1;
                    }
                    (Err(NotOpened::Fenced), Some(taken)) => {
                        assert_eq!(row.busy_turn, None);
                        assert_eq!((row.generation, row.turn_seq), (taken.generation, 0));
                        assert!(taken.generation > held.generation);
                    }
                    both_or_none => panic!("{both_or_none:?}"),
                }
            }
            begun
        };
        let lanes = (0..LANES).map(|_| lane(StdRng::seed_from_u64(random.random())));
        let begun: usize = join_all(lanes).await.into_iter().sum();
        println!("{begun} of {} races begun", LANES * RACES);
        assert!(0 < begun && begun < LANES * RACES, "no race");
        let turns = number(&store, "select count(*) from turns").await;
        assert_eq!(turns, i64::try_from(begun).unwrap());
    }
}

#[tokio::test]
async fn a_lease_that_was_used_since_it_was_seen_is_not_taken() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let idle = other.row(scope, held.lease).await.unwrap();
        let turn = one.begin(scope, &held).await;
        let busy = other.row(scope, held.lease).await.unwrap();
        assert_eq!(busy.busy_turn, Some(turn.request().id));
        assert!(other.take(scope, &idle).await.is_none());
        assert!(other.take(scope, &busy).await.is_none(), "a turn runs");
        one.finish(&turn, &answered(Some("r"))).await;
        assert!(other.take(scope, &idle).await.is_none(), "a turn ran");

        let seen = other.row(scope, held.lease).await.unwrap();
        assert!(other.take(ScopeId::new(), &seen).await.is_none());
        let taken = other.take(scope, &seen).await.expect("idle as it was seen");
        assert!(taken.generation > held.generation && taken.boot == other.boot);
        assert!(other.take(scope, &seen).await.is_none(), "moved on");

        let seen = one.row(scope, held.lease).await.unwrap();
        assert!(one.take(scope, &seen).await.is_none(), "taken just now");
        let age = "update http_bridge_leases set taken_at = taken_at - make_interval(secs => $1)";
        store.client.execute(age, &[&3.0]).await.unwrap();
        assert!(one.take(scope, &seen).await.is_none());
        store.client.execute(age, &[&2.1]).await.unwrap();
        assert!(one.take(scope, &seen).await.is_some(), "after 5 s");
    }
}

#[tokio::test]
async fn a_beginning_that_is_fenced_writes_nothing() {
    for store in Store::both_ways().await {
        let (home, key) = (ScopeId::new(), thread("t"));
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let old = one.claim(home, key).await.unwrap();
        let held = one.claim(home, key).await.unwrap();
        let foreign = Held {
            boot: other.boot,
            ..held
        };
        for (what, replica, scope, held) in [
            ("an old generation", &one, home, &old),
            ("another owner", &other, home, &foreign),
            ("another scope", &one, ScopeId::new(), &held),
        ] {
            let refused = replica.ledger.open(opening(scope, Some(held))).await;
            assert!(matches!(refused, Err(NotOpened::Fenced)), "{what}");
            let row = one.row(home, held.lease).await.unwrap();
            assert_eq!((row.busy_turn, row.turn_seq), (None, 0), "{what}");
        }
        let running = one.begin(home, &held).await;
        let mut second = opening(home, Some(&held));
        second.client_turn = Some("t".into());
        let refused = one.ledger.open(second).await;
        assert!(matches!(refused, Err(NotOpened::Fenced)), "one at a time");
        let row = one.row(home, held.lease).await.unwrap();
        assert_eq!(row.busy_turn, Some(running.request().id));
        assert_eq!(row.turn_seq, 1);
        assert_eq!(number(&store, "select count(*) from turns").await, 1);
    }
}

#[tokio::test]
async fn a_fenced_retry_does_not_reopen_the_turn() {
    for store in Store::both_ways().await {
        let (scope, key) = (ScopeId::new(), thread("t"));
        let one = Replica::new(&store).await;
        let old = one.claim(scope, key).await.unwrap();
        let with = |held| Opening {
            client_turn: Some("turn".into()),
            ..opening(scope, Some(held))
        };
        let first = one.ledger.open(with(&old)).await.unwrap();
        let mut failed = answered(None);
        failed.answer.outcome = Outcome::Failed;
        one.finish(&first, &failed).await;
        let held = one.claim(scope, key).await.unwrap();
        let refused = one.ledger.open(with(&old)).await;
        assert!(matches!(refused, Err(NotOpened::Fenced)));
        let open = "select count(*) from turns where state = 'open' or requests > 1";
        assert_eq!(number(&store, open).await, 0);
        let retry = one.ledger.open(with(&held)).await.unwrap();
        assert!(retry.is_retry());
        assert_eq!(one.finish(&retry, &answered(Some("r"))).await, (true, true));
    }
}

#[tokio::test]
async fn an_answer_moves_the_head_once_and_is_kept_where_it_has_an_id() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let one = Replica::new(&store).await;
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let turn = one.begin(scope, &held).await;
        assert_eq!(one.finish(&turn, &answered(Some("r1"))).await, (true, true));
        assert_eq!(head(&store, held.lease).await.as_deref(), Some("r1"));
        let next = one.begin(scope, &held).await;
        let (repeated, lease) = one.finish(&turn, &answered(Some("r0"))).await;
        assert!(!repeated && !lease, "nothing of the first is open");
        let row = one.row(scope, held.lease).await.unwrap();
        assert_eq!(row.busy_turn, Some(next.request().id), "the next one runs");
        assert_eq!((row.turn_seq, row.account.is_some()), (2, true));

        assert_eq!(one.finish(&next, &answered(None)).await, (true, true));
        let row = one.row(scope, held.lease).await.unwrap();
        assert_eq!(row.busy_turn, None);
        assert_eq!(head(&store, held.lease).await.as_deref(), Some("r1"));
        let kept = "select count(*) from response_snapshots where response_id in ('r0', 'r1')";
        assert_eq!(number(&store, kept).await, 2);
        let all = "select count(*) from response_snapshots";
        assert_eq!(number(&store, all).await, 2, "none without an id");
    }
}

#[tokio::test]
async fn what_a_fenced_replica_used_is_booked_and_kept_but_the_head_stays() {
    for store in Store::both_ways().await {
        let (scope, key) = (ScopeId::new(), thread("t"));
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let old = one.claim(scope, key).await.unwrap();
        let turn = one.begin(scope, &old).await;
        bury(&store, one.boot).await;
        let held = other.claim(scope, key).await.unwrap();
        let mut paused = turn.clone();
        let next = opening(scope, None).first;
        assert!(!one.ledger.attempt(&mut paused, next).await.unwrap());
        let theirs = other.begin(scope, &held).await;
        assert_eq!(
            one.finish(&turn, &answered(Some("old"))).await,
            (true, false)
        );
        assert_eq!(
            one.finish(&turn, &answered(Some("old"))).await,
            (false, false)
        );
        let row = other.row(scope, held.lease).await.unwrap();
        assert_eq!(row.busy_turn, Some(theirs.request().id));
        assert_eq!(head(&store, held.lease).await, None);
        let kept = "select count(*) from response_snapshots where response_id = 'old' and complete";
        assert_eq!(number(&store, kept).await, 1, "it stays readable");
        assert_eq!(
            other.finish(&theirs, &answered(Some("new"))).await,
            (true, true)
        );
        assert_eq!(head(&store, held.lease).await.as_deref(), Some("new"));
        assert!(!one.leases.release(&old).await.unwrap());
        let open = "select count(*) from turns where state = 'open'";
        assert_eq!(number(&store, open).await, 0);
    }
}

#[tokio::test]
async fn an_operator_frees_a_lease_under_the_hands_of_its_owner() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let one = Replica::new(&store).await;
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let turn = one.begin(scope, &held).await;
        assert!(one.leases.free(held.lease).await.unwrap());
        assert!(!one.leases.free(LeaseId::new()).await.unwrap());
        assert_eq!(one.finish(&turn, &answered(Some("r"))).await, (true, false));
        let row = one.row(scope, held.lease).await.unwrap();
        assert_eq!((row.owner, row.busy_turn), (Owner::Nobody, None));
        assert!(row.generation > held.generation);
    }
}

#[tokio::test]
async fn only_old_leases_of_nobody_are_purged_and_come_back_under_a_new_generation() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let (one, dead) = (Replica::new(&store).await, Replica::new(&store).await);
        let mut names = Vec::new();
        for (name, owner, old, free) in [
            ("free and old", &one, true, true),
            ("of the dead and old", &dead, true, false),
            ("free and young", &one, false, true),
            ("of the dead and young", &dead, false, false),
            ("owned and old", &one, true, false),
        ] {
            let held = owner.claim(scope, thread(name)).await.unwrap();
            if old {
                let age = "update http_bridge_leases set retain_until = clock_timestamp() where lease_id = $1";
                store.client.execute(age, &[&held.lease]).await.unwrap();
            }
            if free {
                assert!(owner.leases.release(&held).await.unwrap());
            }
            names.push((name, held));
        }
        bury(&store, dead.boot).await;
        assert_eq!(one.leases.purge().await.unwrap(), 2);
        assert_eq!(one.leases.purge().await.unwrap(), 0);
        let mut left = HashSet::new();
        for (name, held) in &names {
            if one.row(scope, held.lease).await.is_some() {
                left.insert(*name);
            }
        }
        let expected = ["free and young", "of the dead and young", "owned and old"];
        assert_eq!(left, HashSet::from(expected));
        let newest = names.iter().map(|(_, held)| held.generation).max();
        let again = one.claim_id(scope, names[0].1.lease).await.unwrap();
        assert!(Some(again.generation) > newest, "it never repeats");
    }
}
