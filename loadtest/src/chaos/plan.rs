//! What will go wrong, and when: a function of the seed. Nothing is done here.
//!
//! Two faults never strike the same thing at once, so that each ends where it began; different things fail together as they like.

use clap::ValueEnum;
use rand::{Rng, RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

/// What is done to the replicas, and what they stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Course {
    /// Everything at random, by the seed.
    Random,
    /// Each replica in turn is drained and replaced, round after round.
    Rolling,
    /// The master key is replaced, as the runbook says.
    Rotation,
    /// Postgres crashes, and is back after 30 s.
    Outage,
    /// A standby that has not got the last two seconds takes the place of Postgres.
    Promotion,
}

impl Course {
    /// Whether clients are not to see anything of it.
    #[must_use]
    pub fn is_silent(self) -> bool {
        matches!(self, Self::Rolling | Self::Rotation)
    }
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Fault {
    /// When it begins, in milliseconds from the start of the load.
    pub at: u64,
    /// How long it lasts, in milliseconds.
    pub lasts: u64,
    /// What it is.
    pub what: What,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// SIGKILL, and a start when it is over.
    Kill(usize),
    /// SIGSTOP, and SIGCONT when it is over.
    Pause(usize),
    /// SIGTERM, and a start when it has ended and it is over.
    Drain(usize),
    /// The network on one side of a replica.
    Edge(usize, Side, Break),
    /// Postgres, for every replica.
    Postgres(Break),
    /// Postgres crashes, and is started when it is over.
    Stop,
    /// What Postgres commits is lost; when it is over it crashes, and a standby without all of that takes its place.
    Promote,
    /// Redis is killed, and started when it is over.
    Redis,
    /// Something at the account of this number.
    Account(usize, Misfortune),
    /// Not planned but seen: the machine was so busy that a replica without a fault did not answer at once.
    Slow(usize),
}

/// What an edge connects a replica with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Its clients.
    Clients,
    /// The peers that send it turns.
    Peers,
    /// Postgres itself and through the pooler.
    Postgres,
    /// Redis.
    Redis,
    /// The accounts' backend.
    Upstream,
}

/// How an edge fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Break {
    /// Connections are reset once.
    Cut,
    /// Connections are reset, and new ones refused.
    Refuse,
    /// Nothing arrives.
    BlackHole,
    /// Everything arrives late.
    Delay,
    /// Nothing comes back.
    HalfOpen,
}

/// What happens to an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Misfortune {
    /// An operator pauses it, and resumes it when it is over.
    Paused,
    /// It has used up its limit until it is over.
    Limited,
    /// A few answers are a 500.
    Broken,
    /// A few answers are cut in the middle.
    Cut,
    /// A few sockets are closed before the end.
    Closed,
    /// An answer stops until it is over.
    Silent,
    /// Its access token is not accepted any more.
    Expired,
}

/// What there is to break.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Of the load, in milliseconds.
    pub length: u64,
    /// How many.
    pub replicas: usize,
    /// How many.
    pub accounts: usize,
    /// Whether there is one.
    pub redis: bool,
    /// The mean time between two faults, in milliseconds.
    pub gap: u64,
}

const BREAKS: [Break; 5] = [
    Break::Cut,
    Break::Refuse,
    Break::BlackHole,
    Break::Delay,
    Break::HalfOpen,
];
const SIDES: [Side; 5] = [
    Side::Clients,
    Side::Peers,
    Side::Postgres,
    Side::Redis,
    Side::Upstream,
];
const MISFORTUNES: [Misfortune; 7] = [
    Misfortune::Paused,
    Misfortune::Limited,
    Misfortune::Broken,
    Misfortune::Cut,
    Misfortune::Closed,
    Misfortune::Silent,
    Misfortune::Expired,
];

/// The faults of a run, by their beginning. All are over when the load ends.
#[must_use]
pub(super) fn plan(seed: u64, extent: Extent) -> Vec<Fault> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut faults: Vec<Fault> = Vec::new();
    let mut at = extent.gap;
    while at < extent.length {
        let what = draw(&mut random, extent);
        let longest = match what {
            What::Edge(_, Side::Postgres, _) | What::Postgres(_) => 40_000,
            _ => 30_000,
        };
        let longest = longest.min(extent.length / 3).max(1_001);
        let fault = Fault {
            at,
            lasts: random.random_range(1_000..longest),
            what,
        };
        let crowded = faults.iter().any(|other| collide(other, &fault));
        if !crowded && at + fault.lasts <= extent.length {
            faults.push(fault);
        }
        at += random.random_range(extent.gap / 4..extent.gap * 7 / 4);
    }
    faults
}

fn draw(random: &mut impl Rng, extent: Extent) -> What {
    let replica = random.random_range(0..extent.replicas);
    let breaks = BREAKS[random.random_range(0..BREAKS.len())];
    match random.random_range(0..100) {
        0..12 => What::Kill(replica),
        12..24 => What::Pause(replica),
        24..34 => What::Drain(replica),
        34..70 => What::Edge(replica, SIDES[random.random_range(0..SIDES.len())], breaks),
        70..75 => What::Postgres(breaks),
        75..80 if extent.redis => What::Redis,
        _ => What::Account(
            random.random_range(0..extent.accounts),
            MISFORTUNES[random.random_range(0..MISFORTUNES.len())],
        ),
    }
}

/// Whether two faults strike the same thing at once.
fn collide(one: &Fault, other: &Fault) -> bool {
    let apart = one.at + one.lasts < other.at || other.at + other.lasts < one.at;
    !apart && (touches(one.what, other.what) || touches(other.what, one.what))
}

fn touches(one: What, other: What) -> bool {
    match (one, other) {
        (
            What::Kill(a) | What::Pause(a) | What::Drain(a),
            What::Kill(b) | What::Pause(b) | What::Drain(b),
        ) => a == b,
        // A process that ends takes its listeners with it.
        (What::Kill(a) | What::Drain(a), What::Edge(b, Side::Clients | Side::Peers, _)) => a == b,
        (What::Edge(a, side, _), What::Edge(b, other, _)) => a == b && side == other,
        (What::Postgres(_), What::Postgres(_) | What::Edge(_, Side::Postgres, _))
        | (What::Redis, What::Redis | What::Edge(_, Side::Redis, _)) => true,
        (What::Account(a, one), What::Account(b, other)) => a == b && one == other,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Extent = Extent {
        length: 600_000,
        replicas: 3,
        accounts: 3,
        redis: true,
        gap: 3_000,
    };

    #[test]
    fn a_seed_is_a_plan() {
        assert_eq!(plan(7, EXTENT), plan(7, EXTENT));
        assert_ne!(plan(7, EXTENT), plan(8, EXTENT));
    }

    #[test]
    fn nothing_fails_twice_at_once_and_everything_is_over_in_time() {
        for seed in 0..200 {
            let faults = plan(seed, EXTENT);
            assert!(faults.len() > 80, "seed {seed}: {}", faults.len());
            for (index, fault) in faults.iter().enumerate() {
                assert!(fault.at + fault.lasts <= EXTENT.length);
                for other in &faults[index + 1..] {
                    assert!(!collide(fault, other), "seed {seed}: {fault:?} {other:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_there_does_not_fail() {
        let extent = Extent {
            redis: false,
            ..EXTENT
        };
        let faults = plan(1, extent);
        assert!(!faults.iter().any(|fault| fault.what == What::Redis));
    }
}
