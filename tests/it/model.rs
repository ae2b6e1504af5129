//! What replicas, their leases and their turns can come to, explored whole: two replicas on one lease, with messages that are late or lost,
//! a crash, pauses (whoever is slow acts on what it knew long ago), silence and burial. The database does what
//! [`drawbridge::lease::step`] says.

use std::collections::{BTreeMap, BTreeSet};

use drawbridge::lease::step::{self, Boot, Fence, Lease, NotBegun, Request, Seen, Turn};
use stateright::{Checker as _, Model, Property};

/// Seconds. Time passes in leaps, any number of steps apart.
const LEAP: u32 = 9;
const END: u32 = 18;
/// As the service runs.
const TTL: u32 = 15;
const VOUCHED: u32 = 12;
const GRACE: u32 = 2;

/// A statement on its way to the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Statement {
    Beat { sent: u32 },
    Claim,
    Take { generation: u32, turn_seq: u16 },
    Begin(Fence, Request),
    Finish(Fence, Request),
    Withdraw(Fence, Request),
    Release(Fence),
}

/// What a process is about.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Process {
    boot: Boot,
    /// Until when it admits turns, by its own clock.
    deadline: u32,
    held: Option<Fence>,
    seen: Option<Seen>,
    /// The turn that it has sent upstream.
    running: Option<(Fence, Request)>,
    /// It waits for an answer. Heartbeats have a connection of their own.
    waits: bool,
    beats: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    now: u32,
    // The database.
    next: u32,
    replicas: Vec<step::Replica>,
    lease: Option<Lease>,
    turns: BTreeMap<Request, (Turn, Fence)>,
    // The processes, and what is between.
    processes: Vec<Process>,
    /// Statements under way, and whether somebody waits for the answer.
    wire: BTreeSet<(Boot, Statement, bool)>,
    crashes: u8,
    losses: u8,
    // What has happened, for the invariants.
    granted: BTreeMap<u32, Boot>,
    sent: BTreeMap<Request, Fence>,
    broken: Option<&'static str>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Leap,
    /// A process, by its place, says something.
    Say(usize, Statement),
    Look(usize),
    /// A process stops waiting for the answer; the statement may land yet.
    GiveUp(Boot, Statement),
    Land(Boot, Statement, bool),
    Bury(usize, Boot),
    Crash(usize),
}

struct Bridge {
    requests: Request,
    grants: usize,
    crashes: u8,
    losses: u8,
}

impl Bridge {
    fn follow(state: &mut State, action: Action) {
        match action {
            Action::Leap => state.now += LEAP,
            Action::Say(place, statement) => {
                let process = &mut state.processes[place];
                match statement {
                    Statement::Beat { .. } => process.beats = true,
                    _ => process.waits = true,
                }
                state.wire.insert((process.boot, statement, true));
            }
            Action::Look(place) => {
                state.processes[place].seen = state.lease.map(|row| row.seen());
            }
            Action::Bury(_, boot) => {
                let row = &mut state.replicas[usize::from(boot)];
                *row = step::bury(*row, state.now, GRACE).unwrap_or(*row);
            }
            Action::Crash(place) => {
                state.crashes -= 1;
                let boot = u8::try_from(state.replicas.len()).unwrap();
                state.replicas.push(step::Replica {
                    expires: state.now + TTL,
                    dead: false,
                });
                state.processes[place] = Process {
                    boot,
                    deadline: state.now + VOUCHED,
                    held: None,
                    seen: None,
                    running: None,
                    waits: false,
                    beats: false,
                };
            }
            Action::GiveUp(boot, statement) => {
                state.losses -= 1;
                state.wire.remove(&(boot, statement, true));
                state.wire.insert((boot, statement, false));
                if let Statement::Begin(fence, request) = statement {
                    let withdraw = Statement::Withdraw(fence, request);
                    state.wire.insert((boot, withdraw, false));
                }
                let process = state.processes.iter_mut().find(|p| p.boot == boot);
                let Some(process) = process else { return };
                process.waits = false;
                // It may have landed.
                if matches!(statement, Statement::Release(_)) {
                    process.held = None;
                }
            }
            Action::Land(boot, statement, heeded) => {
                state.wire.remove(&(boot, statement, heeded));
                let answer = state.land(boot, statement);
                let process = state.processes.iter_mut().find(|p| p.boot == boot);
                let Some(process) = process.filter(|_| heeded) else {
                    return;
                };
                match answer {
                    Answer::Alive(deadline) => {
                        process.beats = false;
                        process.deadline = deadline.unwrap_or(0);
                        return;
                    }
                    Answer::Held(generation) => {
                        process.held = generation.map(|generation| Fence { generation, boot });
                        process.running = None;
                        process.seen = None;
                    }
                    Answer::Begun(fence, request) => {
                        process.running = Some((fence, request));
                        if state.sent.insert(request, fence).is_some() {
                            state.broken = Some("a request was sent twice");
                        }
                    }
                    Answer::Nothing => process.running = None,
                }
                process.waits = false;
            }
        }
    }
}

impl State {
    /// Drops what can make no difference any more, so that equal futures are one state.
    fn forget(&mut self) {
        let seen = self.lease.map(|row| row.seen());
        for process in &mut self.processes {
            if process.deadline <= self.now {
                process.deadline = 0;
            }
            // A takeover by it would find nothing.
            process.seen.take_if(|old| Some(*old) != seen);
        }
        for row in self.replicas.iter_mut().filter(|row| row.dead) {
            row.expires = 0;
        }
    }

    fn is_dead(&self, boot: Boot) -> bool {
        self.replicas[usize::from(boot)].dead
    }

    fn grant(&mut self, row: Lease) {
        let boot = row.owner.unwrap_or_default();
        let newest = self.granted.last_key_value();
        if newest.is_some_and(|(generation, _)| *generation >= row.generation) {
            self.broken = Some("a generation came twice");
        }
        self.granted.insert(row.generation, boot);
        self.next = row.generation + 1;
        self.lease = Some(row);
    }

    /// The statement as the database executes it; yields what the process learns.
    fn land(&mut self, boot: Boot, statement: Statement) -> Answer {
        let before = self.lease;
        let dead = self.replicas.clone();
        let is_dead = |boot: Boot| dead[usize::from(boot)].dead;
        let answer = match statement {
            Statement::Beat { sent } => {
                let row = &mut self.replicas[usize::from(boot)];
                let beaten = step::beat(*row, self.now, TTL);
                *row = beaten.unwrap_or(*row);
                Answer::Alive(beaten.map(|_| sent + VOUCHED))
            }
            Statement::Claim => {
                let row = step::claim(self.lease, boot, is_dead, self.next);
                if let Some(row) = row {
                    self.grant(row);
                }
                Answer::Held(row.map(|row| row.generation))
            }
            Statement::Take {
                generation,
                turn_seq,
            } => {
                let seen = Seen {
                    generation,
                    turn_seq,
                };
                let row = self
                    .lease
                    .and_then(|row| step::take(row, boot, seen, self.now, self.next));
                if let Some(row) = row {
                    self.grant(row);
                }
                Answer::Held(row.map(|row| row.generation))
            }
            Statement::Begin(fence, request) => {
                let turn = self.turns.get(&request).map(|(turn, _)| *turn);
                match step::begin(self.lease, turn, fence, request, is_dead) {
                    Ok((row, turn)) => {
                        self.lease = Some(row);
                        self.turns.insert(request, (turn, fence));
                        Answer::Begun(fence, request)
                    }
                    Err(NotBegun::Fenced) => Answer::Held(None),
                    Err(NotBegun::Begun) => Answer::Nothing,
                }
            }
            Statement::Finish(fence, request) | Statement::Withdraw(fence, request) => {
                let row = self.turns.get(&request);
                let (booked, moved) = match statement {
                    Statement::Finish(..) => {
                        let turn = row.map(|(turn, _)| *turn);
                        step::finish(self.lease, turn, fence, request, true)
                    }
                    // The statement finds only what was begun under its own fence.
                    _ => {
                        let begun = row.filter(|(_, own)| *own == fence);
                        let turn = begun.map(|(turn, _)| *turn);
                        step::withdraw(self.lease, turn, fence, request)
                    }
                };
                if let Some(turn) = booked {
                    self.turns.insert(request, (turn, fence));
                }
                self.lease = moved.or(self.lease);
                if moved.is_some() {
                    Answer::Nothing
                } else {
                    Answer::Held(None)
                }
            }
            Statement::Release(fence) => {
                let row = self.lease.and_then(|row| step::release(row, fence));
                self.lease = row.or(self.lease);
                Answer::Held(None)
            }
        };
        let fence = match statement {
            Statement::Begin(fence, _)
            | Statement::Finish(fence, _)
            | Statement::Withdraw(fence, _)
            | Statement::Release(fence) => Some(fence),
            _ => None,
        };
        let owns = |row: Lease, fence: Fence| {
            (row.generation, row.owner) == (fence.generation, Some(fence.boot))
        };
        if let (Some(fence), Some(row)) = (fence, before)
            && !owns(row, fence)
            && self.lease != before
        {
            self.broken = Some("a fenced replica wrote");
        }
        answer
    }
}

#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Until when to admit turns; `None`: buried.
    Alive(Option<u32>),
    /// The lease is held, or no longer.
    Held(Option<u32>),
    Begun(Fence, Request),
    Nothing,
}

impl Model for Bridge {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let process = |boot| Process {
            boot,
            deadline: VOUCHED,
            held: None,
            seen: None,
            running: None,
            waits: false,
            beats: false,
        };
        let replica = step::Replica {
            expires: TTL,
            dead: false,
        };
        vec![State {
            now: 0,
            next: 1,
            replicas: vec![replica; 2],
            lease: None,
            turns: BTreeMap::new(),
            processes: vec![process(0), process(1)],
            wire: BTreeSet::new(),
            crashes: self.crashes,
            losses: self.losses,
            granted: BTreeMap::new(),
            sent: BTreeMap::new(),
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // What is broken needs no future; it might have no end.
        if state.broken.is_some() {
            return;
        }
        if state.now < END {
            actions.push(Action::Leap);
        }
        for (place, process) in state.processes.iter().enumerate() {
            let mut say = |statement| actions.push(Action::Say(place, statement));
            if !process.beats && process.deadline < state.now + VOUCHED && state.now < END {
                say(Statement::Beat { sent: state.now });
            }
            if process.waits {
                continue;
            }
            if let Some((fence, request)) = process.running {
                say(Statement::Finish(fence, request));
            } else if let Some(fence) = process.held {
                if state.now < process.deadline {
                    for request in 0..self.requests {
                        say(Statement::Begin(fence, request));
                    }
                }
                say(Statement::Release(fence));
            } else if state.granted.len() < self.grants
                && state.now < process.deadline
                // They are alike: the first is called so.
                && (place == 0 || !state.granted.is_empty())
            {
                say(Statement::Claim);
                if let Some(seen) = process.seen {
                    say(Statement::Take {
                        generation: seen.generation,
                        turn_seq: seen.turn_seq,
                    });
                } else if state.lease.is_some() {
                    actions.push(Action::Look(place));
                }
            }
            for (boot, row) in (0..).zip(&state.replicas) {
                if boot != process.boot && step::bury(*row, state.now, GRACE).is_some() {
                    actions.push(Action::Bury(place, boot));
                }
            }
            if state.crashes > 0 {
                actions.push(Action::Crash(place));
            }
        }
        for &(boot, statement, heeded) in &state.wire {
            actions.push(Action::Land(boot, statement, heeded));
            if heeded && state.losses > 0 && !matches!(statement, Statement::Beat { .. }) {
                actions.push(Action::GiveUp(boot, statement));
            }
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        Self::follow(&mut state, action);
        state.forget();
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("nothing is broken on the way", |_, state: &State| {
                state.broken.is_none()
            }),
            Property::always("what is sent was begun by the owner", |_, state: &State| {
                state.sent.iter().all(|(request, fence)| {
                    let begun = state
                        .turns
                        .get(request)
                        .is_some_and(|(_, own)| own == fence);
                    begun && state.granted.get(&fence.generation) == Some(&fence.boot)
                })
            }),
            Property::always("of one generation one turn runs", |_, state: &State| {
                let open = state.turns.values().filter(|(turn, _)| *turn == Turn::Open);
                let generations: Vec<_> = open.map(|(_, fence)| fence.generation).collect();
                let distinct: BTreeSet<_> = generations.iter().collect();
                distinct.len() == generations.len()
            }),
            Property::always("who admits turns is not buried", |_, state: &State| {
                let mut processes = state.processes.iter();
                processes.all(|p| state.now >= p.deadline || !state.is_dead(p.boot))
            }),
            Property::always(
                "the head is of the newest that moved it",
                |_, state: &State| {
                    let Some(row) = state.lease else { return true };
                    let head = row.head.and_then(|head| state.turns.get(&head));
                    head.is_none_or(|(turn, fence)| {
                        *turn == Turn::Closed && fence.generation <= row.generation
                    })
                },
            ),
            Property::always(
                "a busy lease has an open turn of its generation",
                |_, state: &State| {
                    let busy = state.lease.and_then(|row| Some((row, row.busy?)));
                    busy.is_none_or(|(row, request)| {
                        state.turns.get(&request).is_some_and(|(turn, fence)| {
                            *turn == Turn::Open && fence.generation == row.generation
                        })
                    })
                },
            ),
            Property::sometimes("a lease is taken from the silent", |_, state: &State| {
                state.lease.is_some_and(|row| row.taken_at.is_some())
            }),
            Property::sometimes("a lease is inherited from the dead", |_, state: &State| {
                let owner = state.lease.and_then(|row| row.owner);
                owner.is_some_and(|owner| !state.is_dead(owner))
                    && state.granted.values().any(|boot| state.is_dead(*boot))
            }),
            Property::sometimes(
                "what a fenced replica sent is booked",
                |_, state: &State| {
                    let no_head = state.lease.is_some_and(|row| row.head.is_none());
                    let booked =
                        |request| matches!(state.turns.get(request), Some((Turn::Closed, _)));
                    no_head && state.sent.keys().any(booked)
                },
            ),
            Property::sometimes("every turn is answered", |model: &Self, state: &State| {
                let closed = state
                    .turns
                    .values()
                    .filter(|(turn, _)| *turn == Turn::Closed);
                closed.count() == usize::from(model.requests)
            }),
        ]
    }
}

#[test]
fn replicas_that_crash_sleep_and_are_cut_off_keep_to_one_owner_and_one_sending() {
    // Together all of it would be too much to explore.
    for (requests, grants, crashes, losses) in
        [(1, 3, 0, 0), (2, 2, 0, 0), (1, 2, 1, 0), (1, 2, 0, 1)]
    {
        let bridge = Bridge {
            requests,
            grants,
            crashes,
            losses,
        };
        let checker = bridge.checker().threads(2).spawn_bfs().join();
        println!(
            "{requests} requests, {grants} grants, {crashes} crashes, {losses} losses: {} states",
            checker.unique_state_count()
        );
        checker.assert_properties();
    }
}
