//! The statements do what [`step`] says: the same random operations on a model and on Postgres, compared after each.

use std::collections::{BTreeMap, HashMap};

use drawbridge::{
    db::{Db, Stmt},
    ids::{BootId, LeaseId, ScopeId, TurnId},
    lease::{
        Held, Row,
        step::{self, Fence, Lease, NotBegun, Request, Seen, Turn},
    },
    ledger::{self, NotOpened, Opened},
    replica,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio_postgres::types::ToSql;

use super::{Replica, answered, opening, thread};

use crate::support::store::Store;

const STEPS: usize = 1000;
const TTL: u32 = 3600;
const GRACE: u32 = 2;

/// A lease is found by its key in the first slot, by its id in the second.
const SLOTS: usize = 2;

/// Postgres, the model beside it, and what replicas of both remember, be it long untrue.
struct World<'a> {
    store: &'a Store,
    random: StdRng,
    connections: [Db; 2],
    now: u32,
    /// Real generations by the model's.
    generations: BTreeMap<u32, i64>,
    scopes: [ScopeId; SLOTS],
    by_id: LeaseId,
    leases: [Option<Lease>; SLOTS],
    actors: Vec<(Replica, step::Replica)>,
    requests: Vec<TurnId>,
    turns: HashMap<Request, Turn>,
    held: Vec<(usize, Held, Fence)>,
    seen: Vec<(usize, Row, Seen)>,
    opened: Vec<(usize, Opened, Fence, Request)>,
}

fn statement(all: &'static [&Stmt], name: &str) -> &'static Stmt {
    all.iter().find(|stmt| stmt.name == name).unwrap()
}

impl<'a> World<'a> {
    async fn new(store: &'a Store, seed: u64) -> Self {
        let mut world = Self {
            store,
            random: StdRng::seed_from_u64(seed),
            connections: [store.another(), store.another()],
            now: 100,
            generations: BTreeMap::from([(0, 0)]),
            scopes: [ScopeId::new(), ScopeId::new()],
            by_id: LeaseId::new(),
            leases: [None; SLOTS],
            actors: Vec::new(),
            requests: Vec::new(),
            turns: HashMap::new(),
            held: Vec::new(),
            seen: Vec::new(),
            opened: Vec::new(),
        };
        for _ in 0..3 {
            world.register().await;
        }
        world
    }

    async fn register(&mut self) {
        let db = self.connections[self.actors.len() % 2].clone();
        let actor = Replica::over(self.store, db).await;
        let expires = self.now + TTL;
        let row = step::Replica {
            expires,
            dead: false,
        };
        self.actors.push((actor, row));
    }

    /// One of the last few of so many: the present, and what is not long past.
    fn recent(&mut self, len: usize) -> Option<usize> {
        let few = len.min(3);
        (len > 0).then(|| len - 1 - self.random.random_range(0..few))
    }

    fn next(&self) -> u32 {
        self.generations.last_key_value().unwrap().0 + 1
    }

    fn actor(&self, boot: BootId) -> u8 {
        let found = self.actors.iter().position(|(a, _)| a.boot == boot);
        u8::try_from(found.unwrap()).unwrap()
    }

    fn request(&self, id: TurnId) -> Request {
        let found = self.requests.iter().position(|request| *request == id);
        u16::try_from(found.unwrap()).unwrap()
    }

    fn learn(&mut self, generation: i64) {
        let (last, newest) = self.generations.last_key_value().unwrap();
        assert!(generation > *newest, "a generation comes after all others");
        self.generations.insert(last + 1, generation);
    }

    /// A claim or a takeover: both or neither gave the lease.
    fn granted(&mut self, slot: usize, real: Option<Held>, model: Option<Lease>) {
        assert_eq!(real.is_some(), model.is_some(), "{real:?}");
        if let (Some(held), Some(lease)) = (real, model) {
            self.learn(held.generation);
            self.leases[slot] = model;
            let fence = Fence {
                generation: lease.generation,
                boot: self.actor(held.boot),
            };
            self.held.push((slot, held, fence));
        }
    }

    fn closed(&mut self, slot: usize, request: Request, did: (Option<Turn>, Option<Lease>)) {
        if let Some(turn) = did.0 {
            self.turns.insert(request, turn);
        }
        if did.1.is_some() {
            self.leases[slot] = did.1;
        }
    }

    async fn execute(&self, sql: &str, scope: ScopeId) {
        self.store.client.execute(sql, &[&scope]).await.unwrap();
    }

    /// Does something on both sides; yields what it was.
    async fn act(&mut self) -> &'static str {
        let slot = self.random.random_range(0..SLOTS);
        let scope = self.scopes[slot];
        let me = self.recent(self.actors.len()).unwrap();
        let boot = self.actors[me].0.boot;
        let number = u8::try_from(me).unwrap();
        let dead: Vec<bool> = self.actors.iter().map(|(_, row)| row.dead).collect();
        let is_dead = |boot: u8| dead[usize::from(boot)];
        match self.random.random_range(0..100) {
            0..12 => {
                let leases = &self.actors[me].0.leases;
                let real = match slot {
                    0 => leases.claim(boot, scope, thread("t")).await,
                    _ => leases.claim_id(boot, scope, self.by_id).await,
                };
                let model = step::claim(self.leases[slot], number, is_dead, self.next());
                self.granted(slot, real.unwrap(), model);
                "claim"
            }
            12..43 => self.begin().await,
            43..60 => self.finish().await,
            60..70 => {
                let leases = &self.actors[me].0.leases;
                let row = match slot {
                    0 => leases.by_key(boot, scope, thread("t")).await,
                    _ => leases.by_id(boot, scope, self.by_id).await,
                };
                let seen = self.leases[slot].map(|lease| lease.seen());
                if let (Some(row), Some(seen)) = (row.unwrap(), seen) {
                    self.seen.push((slot, row, seen));
                }
                "read"
            }
            70..80 => self.take(me).await,
            80..86 => {
                let Some(which) = self.recent(self.held.len()) else {
                    return "nothing";
                };
                let (slot, held, fence) = self.held[which];
                let owner = &self.actors[usize::from(fence.boot)].0;
                let real = owner.leases.release(&held).await.unwrap();
                let model = self.leases[slot].and_then(|row| step::release(row, fence));
                assert_eq!(real, model.is_some());
                self.leases[slot] = model.or(self.leases[slot]);
                "release"
            }
            86..88 => {
                let old = "update http_bridge_leases set retain_until = clock_timestamp() where scope_id = $1";
                self.execute(old, scope).await;
                let real = self.actors[me].0.leases.purge().await.unwrap();
                let young = "update http_bridge_leases set retain_until = clock_timestamp() + interval '1 hour' where scope_id = $1";
                self.execute(young, scope).await;
                let model = self.leases[slot].is_some_and(|row| step::purge(row, is_dead));
                assert_eq!(real, u64::from(model));
                self.leases[slot].take_if(|_| model);
                "purge"
            }
            88..90 => {
                let Some(lease) = self.leases[slot] else {
                    return "nothing";
                };
                let id = "select lease_id from http_bridge_leases where scope_id = $1";
                let row = self.store.client.query_one(id, &[&scope]).await.unwrap();
                let id: LeaseId = row.get(0);
                assert!(self.actors[me].0.leases.free(id).await.unwrap());
                self.leases[slot] = Some(step::free(lease, self.next()));
                let generation = "select generation from http_bridge_leases where scope_id = $1";
                let row = self.store.client.query_one(generation, &[&scope]).await;
                self.learn(row.unwrap().get(0));
                "free"
            }
            90..93 => {
                self.now += 2 * step::COOLDOWN;
                "wait"
            }
            93..96 => {
                let beat = statement(replica::STATEMENTS, "replica.BEAT");
                let real = self.store.db.opt(beat, &[&boot, &f64::from(TTL)]).await;
                let model = step::beat(self.actors[me].1, self.now, TTL);
                assert_eq!(real.unwrap().is_some(), model.is_some());
                self.actors[me].1 = model.unwrap_or(self.actors[me].1);
                "beat"
            }
            96..98 => {
                let silence = "update bridge_replicas set expires_at = clock_timestamp() - interval '10 s' where boot_id = $1";
                self.store.client.execute(silence, &[&boot]).await.unwrap();
                self.actors[me].1.expires = self.now - 10;
                "fall silent"
            }
            _ => self.bury(me).await,
        }
    }

    async fn begin(&mut self) -> &'static str {
        let Some(which) = self.recent(self.held.len()) else {
            return "nothing";
        };
        let (slot, held, fence) = self.held[which];
        let mut opening = opening(self.scopes[slot], Some(&held));
        let repeated = self.random.random_bool(0.25);
        match self.recent(self.requests.len()).filter(|_| repeated) {
            Some(again) => opening.request.id = self.requests[again],
            None => self.requests.push(opening.request.id),
        }
        let request = self.request(opening.request.id);
        let turn = self.turns.get(&request).copied();
        let owner = &self.actors[usize::from(fence.boot)].0;
        let real = owner.ledger.open(opening).await;
        let is_dead = |boot: u8| self.actors[usize::from(boot)].1.dead;
        let model = step::begin(self.leases[slot], turn, fence, request, is_dead);
        match (real, model) {
            (Ok(opened), Ok((lease, turn))) => {
                self.leases[slot] = Some(lease);
                self.turns.insert(request, turn);
                self.opened.push((slot, opened, fence, request));
                "begin"
            }
            (Err(NotOpened::Fenced), Err(NotBegun::Fenced)) => "begin: fenced",
            (Err(NotOpened::Begun), Err(NotBegun::Begun)) => "begin: begun before",
            (real, model) => panic!("{real:?} and {model:?}"),
        }
    }

    async fn finish(&mut self) -> &'static str {
        let Some(which) = self.recent(self.opened.len()) else {
            return "nothing";
        };
        let (slot, opened, fence, request) = self.opened[which].clone();
        let turn = self.turns.get(&request).copied();
        let owner = &self.actors[usize::from(fence.boot)].0;
        if self.random.random_bool(0.2) {
            let withdraw = statement(ledger::STATEMENTS, "ledger.WITHDRAW");
            let own = self.held.iter().position(|(_, _, held)| *held == fence);
            // Or by another one, to whom the same request was forwarded.
            let other = self.random.random_bool(0.3);
            let which = own
                .filter(|_| !other)
                .or_else(|| self.recent(self.held.len()));
            let (slot, held, named) = self.held[which.unwrap()];
            let request_id = opened.request().id;
            let params: [&(dyn ToSql + Sync); 3] = [&request_id, &held.lease, &held.generation];
            let real = self.store.db.exec(withdraw, &params).await.unwrap();
            let begun = turn.filter(|_| named == fence);
            let model = step::withdraw(self.leases[slot], begun, named, request);
            assert_eq!(real, u64::from(model.0.is_some()));
            self.closed(slot, request, model);
            return match named == fence {
                true => "withdraw",
                false => "withdraw: of another",
            };
        }
        let complete = self.random.random_bool(0.8);
        let response = complete.then(|| request.to_string());
        let settlement = answered(response.as_deref());
        let real = owner.ledger.settle(&opened, &settlement).await.unwrap();
        let model = step::finish(self.leases[slot], turn, fence, request, complete);
        assert_eq!(
            (real.turn, real.lease),
            (model.0.is_some(), model.1.is_some())
        );
        self.closed(slot, request, model);
        "finish"
    }

    async fn take(&mut self, me: usize) -> &'static str {
        let Some(which) = self.recent(self.seen.len()) else {
            return "nothing";
        };
        let (slot, row, seen) = self.seen[which].clone();
        // The model's clock stands while Postgres works; so does that of the row.
        if let Some(taken) = self.leases[slot].and_then(|lease| lease.taken_at) {
            let age = f64::from(self.now - taken);
            let set = "update http_bridge_leases set taken_at = clock_timestamp() - make_interval(secs => $2) where scope_id = $1";
            let scope = self.scopes[slot];
            let set = self.store.client.execute(set, &[&scope, &age]).await;
            assert_eq!(set.unwrap(), 1);
        }
        let actor = &self.actors[me].0;
        let real = actor.leases.take(actor.boot, self.scopes[slot], &row).await;
        let number = u8::try_from(me).unwrap();
        let model = self.leases[slot]
            .and_then(|lease| step::take(lease, number, seen, self.now, self.next()));
        let what = if model.is_some() {
            "take"
        } else {
            "take: none"
        };
        self.granted(slot, real.unwrap(), model);
        what
    }

    async fn bury(&mut self, me: usize) -> &'static str {
        let bury = statement(replica::STATEMENTS, "replica.BURY");
        let boot = self.actors[me].0.boot;
        let grace = f64::from(GRACE);
        let real = self.store.db.exec(bury, &[&boot, &grace]).await.unwrap();
        let mut buried = 0;
        for (number, (_, row)) in self.actors.iter_mut().enumerate() {
            let gone = step::bury(*row, self.now, GRACE).filter(|_| number != me);
            buried += u64::from(gone.is_some());
            *row = gone.unwrap_or(*row);
        }
        assert_eq!(real, buried);
        for _ in 0..buried {
            self.register().await;
        }
        if buried > 0 { "bury" } else { "nothing" }
    }

    /// What Postgres shows is what the model shows.
    async fn compare(&self) {
        let client = &self.store.client;
        for slot in 0..SLOTS {
            let read = "select generation, owner_boot, busy_turn, turn_seq, head_response_id, taken_at is not null
                from http_bridge_leases where scope_id = $1";
            let row = client.query_opt(read, &[&self.scopes[slot]]).await.unwrap();
            let taken_at = self.leases[slot].and_then(|lease| lease.taken_at);
            let real = row.map(|row| Lease {
                generation: *self
                    .generations
                    .iter()
                    .find(|(_, real)| **real == row.get::<_, i64>(0))
                    .unwrap()
                    .0,
                owner: row.get::<_, Option<_>>(1).map(|boot| self.actor(boot)),
                busy: row.get::<_, Option<_>>(2).map(|id| self.request(id)),
                turn_seq: u16::try_from(row.get::<_, i64>(3)).unwrap(),
                head: row
                    .get::<_, Option<String>>(4)
                    .map(|head| head.parse().unwrap()),
                taken_at: taken_at.or(Some(0)).filter(|_| row.get(5)),
            });
            assert_eq!(real, self.leases[slot]);
        }
        let turns = "select count(*), count(*) filter (where state = 'open') from turns";
        let row = client.query_one(turns, &[]).await.unwrap();
        let open = self.turns.values().filter(|turn| **turn == Turn::Open);
        let model = [self.turns.len(), open.count()].map(|n| i64::try_from(n).unwrap());
        assert_eq!([0, 1].map(|n| row.get::<_, i64>(n)), model);
        let tombs = "select count(*) from bridge_replicas where dead_at is not null";
        let row = client.query_one(tombs, &[]).await.unwrap();
        let dead = self.actors.iter().filter(|(_, row)| row.dead).count();
        assert_eq!(row.get::<_, i64>(0), i64::try_from(dead).unwrap());
    }
}

#[tokio::test]
async fn the_statements_of_a_lease_do_what_its_functions_say() {
    let seed = rand::rng().random();
    println!("seed {seed}");
    for store in Store::both_ways().await {
        let mut world = World::new(&store, seed).await;
        let mut done = BTreeMap::<_, usize>::new();
        let wanted = [
            "claim",
            "begin",
            "begin: begun before",
            "begin: fenced",
            "finish",
            "take",
            "withdraw: of another",
        ];
        let mut steps = 0;
        // What is rare may be late.
        while steps < STEPS || wanted.iter().any(|what| !done.contains_key(what)) {
            assert!(steps < 10 * STEPS, "only {done:?}");
            let what = world.act().await;
            println!("{steps}: {what}");
            *done.entry(what).or_default() += 1;
            world.compare().await;
            steps += 1;
        }
    }
}
