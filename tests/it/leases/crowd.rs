//! Replicas that do as they please at once, on old knowledge too: what each was told is put in order, and nothing in it contradicts.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use drawbridge::{
    db::Stmt,
    ids::{BootId, LeaseId, ScopeId, TurnId},
    lease::Held,
    ledger::NotOpened,
    replica,
};
use futures_util::future::join_all;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{Replica, answered, bury, opening};
use crate::support::store::Store;

const ACTORS: usize = 6;
const STEPS: usize = 250;
const LEASES: usize = 2;

/// What somebody was told, between two ticks of one clock.
#[derive(Clone, Copy, Debug)]
struct Told {
    from: u64,
    to: u64,
    lease: LeaseId,
    generation: i64,
    boot: BootId,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Granted,
    Begun(TurnId),
    /// The head moved.
    Moved(TurnId),
    Released,
}

#[derive(Default)]
struct History {
    clock: AtomicU64,
    told: Mutex<Vec<Told>>,
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn tell(&self, from: u64, held: &Held, what: What) {
        self.told.lock().unwrap().push(Told {
            from,
            to: self.now(),
            lease: held.lease,
            generation: held.generation,
            boot: held.boot,
            what,
        });
    }
}

/// One replica after another at the same place: each lives until it is buried, and its successor still speaks in its name at times.
async fn act(
    store: &Store,
    history: &History,
    graves: &Mutex<BTreeMap<BootId, u64>>,
    scopes: [(ScopeId, LeaseId); LEASES],
    mut random: StdRng,
) {
    let beat: &'static Stmt = replica::STATEMENTS
        .iter()
        .find(|stmt| stmt.name == "replica.BEAT")
        .unwrap();
    let db = store.another();
    let mut me = Replica::over(store, db.clone()).await;
    let mut before = Replica::over(store, db.clone()).await;
    let (mut held, mut seen, mut open) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STEPS {
        let (scope, lease) = scopes[random.random_range(0..LEASES)];
        let actor = if random.random_bool(0.1) {
            &before
        } else {
            &me
        };
        let from = history.now();
        match random.random_range(0..100) {
            0..20 => {
                if let Some(grant) = actor.claim_id(scope, lease).await {
                    history.tell(from, &grant, What::Granted);
                    held.push((scope, grant));
                }
            }
            20..45 if !held.is_empty() => {
                let which = held.len() - 1 - random.random_range(0..held.len().min(3));
                let (scope, grant) = held[which];
                let opening = opening(scope, Some(&grant));
                let owner = if grant.boot == before.boot {
                    &before
                } else {
                    &me
                };
                if grant.boot != owner.boot {
                    continue;
                }
                match owner.ledger.open(opening).await {
                    Ok(opened) => {
                        history.tell(from, &grant, What::Begun(opened.request().id));
                        open.push((grant, opened));
                    }
                    Err(NotOpened::Fenced) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            45..75 if !open.is_empty() => {
                let last = open.len() - 1;
                let which = if random.random_bool(0.8) { last } else { 0 };
                let (grant, opened) = open.remove(which);
                let id = opened.request().id;
                let (turn, lease) = me.finish(&opened, &answered(Some(&id.to_string()))).await;
                assert!(turn, "it was not booked before");
                if lease {
                    history.tell(from, &grant, What::Moved(id));
                }
            }
            75..80 => seen.extend(actor.row(scope, lease).await.map(|row| (scope, row))),
            80..90 if !seen.is_empty() => {
                let (scope, row) = seen.swap_remove(random.random_range(0..seen.len()));
                if let Some(grant) = actor.take(scope, &row).await {
                    history.tell(from, &grant, What::Granted);
                    held.push((scope, grant));
                }
            }
            90..94 if !held.is_empty() => {
                let (_, grant) = held[held.len() - 1];
                if me.leases.release(&grant).await.unwrap() {
                    history.tell(from, &grant, What::Released);
                }
            }
            94..96 => {
                bury(store, me.boot).await;
                graves.lock().unwrap().insert(me.boot, history.now());
                let next = Replica::over(store, db.clone()).await;
                before = std::mem::replace(&mut me, next);
            }
            96..98 => {
                let known = graves.lock().unwrap().get(&actor.boot).copied();
                let alive = store.db.opt(beat, &[&actor.boot, &3600.0]).await.unwrap();
                let dead = known.is_some_and(|at| at < from);
                assert!(!(dead && alive.is_some()), "back from the dead");
            }
            _ => {
                // Takeovers are rare by rule; here time flies.
                let age = "update http_bridge_leases set taken_at = taken_at - interval '6 s' where lease_id = $1";
                store.client.execute(age, &[&lease]).await.unwrap();
            }
        }
    }
}

/// The invariants, on what everybody was told of one lease.
fn check(mut told: Vec<Told>) -> [usize; 3] {
    told.sort_by_key(|told| told.from);
    let of = |wanted: fn(What) -> bool| told.iter().filter(move |told| wanted(told.what));
    let grants: Vec<_> = of(|what| what == What::Granted).collect();
    let begun: Vec<_> = of(|what| matches!(what, What::Begun(_))).collect();
    let moved: Vec<_> = of(|what| matches!(what, What::Moved(_))).collect();

    // A generation is granted once, and later ones are greater.
    let distinct: BTreeSet<_> = grants.iter().map(|grant| grant.generation).collect();
    assert_eq!(distinct.len(), grants.len());
    for (earlier, later) in grants.iter().zip(grants.iter().skip(1)) {
        assert!(earlier.to > later.from || earlier.generation < later.generation);
    }
    for told in &told {
        // Only its owner writes under it,
        let grant = grants
            .iter()
            .find(|grant| grant.generation == told.generation);
        assert_eq!(grant.unwrap().boot, told.boot);
        // and not when a later one was granted before: it is fenced.
        let later = grants
            .iter()
            .find(|grant| grant.generation > told.generation && grant.to < told.from);
        assert!(later.is_none(), "{told:?} after {later:?}");
    }
    // Of the turns of one generation, one runs at a time.
    for (number, first) in begun.iter().enumerate() {
        let end = moved.iter().find(|end| match (end.what, first.what) {
            (What::Moved(end), What::Begun(begun)) => end == begun,
            _ => false,
        });
        for next in &begun[number + 1..] {
            let apart = end.is_some_and(|end| end.from < next.to);
            let same = first.generation == next.generation;
            assert!(
                !same || apart || next.from < first.to,
                "{first:?} and {next:?}"
            );
        }
    }
    [grants.len(), begun.len(), moved.len()]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_act_at_once_never_own_write_or_begin_what_is_anothers() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for store in Store::both_ways().await {
        let scopes = [(); LEASES].map(|()| (ScopeId::new(), LeaseId::new()));
        let (history, graves) = (History::default(), Mutex::default());
        let actors = (0..ACTORS).map(|_| {
            let random = StdRng::seed_from_u64(random.random());
            act(&store, &history, &graves, scopes, random)
        });
        join_all(actors.collect::<Vec<_>>()).await;
        let told = history.told.into_inner().unwrap();
        for (_, lease) in scopes {
            let of_lease: Vec<_> = told
                .iter()
                .filter(|told| told.lease == lease)
                .copied()
                .collect();
            let begun = |told: &&Told| matches!(told.what, What::Begun(_));
            let turns = of_lease.iter().filter(begun).count();
            let newest = of_lease
                .iter()
                .filter(|told| matches!(told.what, What::Moved(_)));
            let newest = newest.map(|told| told.generation).max().unwrap();
            let heads: Vec<_> = of_lease
                .iter()
                .filter(|told| told.generation == newest)
                .filter_map(|told| match told.what {
                    What::Moved(turn) => Some(turn.to_string()),
                    _ => None,
                })
                .collect();
            let row =
                "select turn_seq, head_response_id from http_bridge_leases where lease_id = $1";
            let row = store.client.query_one(row, &[&lease]).await.unwrap();
            assert_eq!(row.get::<_, i64>(0), i64::try_from(turns).unwrap());
            let head: String = row.get(1);
            assert!(heads.contains(&head), "the head is of the newest owner");
            let counts = check(of_lease);
            println!("grants, turns, heads: {counts:?}");
            assert!(
                counts.iter().all(|count| *count > 5),
                "{counts:?} is no crowd"
            );
        }
        for boot in graves.into_inner().unwrap().keys() {
            let dead = "select dead_at is not null from bridge_replicas where boot_id = $1";
            let row = store.client.query_one(dead, &[boot]).await.unwrap();
            assert!(row.get::<_, bool>(0));
        }
    }
}
