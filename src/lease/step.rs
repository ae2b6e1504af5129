//! What the statements of a lease do, as functions of values.
//!
//! Each function is one statement: it is given the row as the statement finds it when it has the lock, and yields the row as it leaves it, or
//! nothing where it writes nothing. Nobody decides by them at run time, since only the database knows the row: they are the meaning of the
//! SQL. Tests hold them against Postgres, step by step, and explore on them what replicas can come to.

/// An incarnation.
pub type Boot = u8;

/// A request, also as the name of its turn and of its response.
pub type Request = u16;

/// Seconds after a takeover in which there is no other.
pub const COOLDOWN: u32 = 5;

/// A row of `bridge_replicas`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    /// Until when its last heartbeat vouches for it, in seconds.
    pub expires: u32,
    /// It has a tombstone.
    pub dead: bool,
}

/// A row of `http_bridge_leases`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The fencing token.
    pub generation: u32,
    /// Whose it is.
    pub owner: Option<Boot>,
    /// Whose turn runs on it.
    pub busy: Option<Request>,
    /// Turns begun so far.
    pub turn_seq: u16,
    /// When it was last taken, in seconds.
    pub taken_at: Option<u32>,
    /// The last finished response.
    pub head: Option<Request>,
}

/// What an owner knows of its lease and names in everything that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fence {
    /// The fencing token.
    pub generation: u32,
    /// Who owns.
    pub boot: Boot,
}

/// What somebody else saw of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    /// The fencing token.
    pub generation: u32,
    /// Turns begun until then.
    pub turn_seq: u16,
}

/// A row of `turns`, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Turn {
    /// Begun: a reservation.
    Open,
    /// Booked.
    Closed,
}

/// Why a turn does not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NotBegun {
    /// The lease is not ours any more, or busy.
    Fenced,
    /// The request began before.
    Begun,
}

impl Lease {
    fn is_held(&self, fence: Fence) -> bool {
        self.generation == fence.generation && self.owner == Some(fence.boot)
    }

    /// What an onlooker remembers.
    #[must_use]
    pub fn seen(&self) -> Seen {
        Seen {
            generation: self.generation,
            turn_seq: self.turn_seq,
        }
    }
}

/// BEAT: the living go on for `ttl` seconds.
#[must_use]
pub fn beat(row: Replica, now: u32, ttl: u32) -> Option<Replica> {
    let expires = now + ttl;
    (!row.dead).then_some(Replica { expires, ..row })
}

/// BURY: whoever is silent beyond the grace gets a tombstone.
#[must_use]
pub fn bury(row: Replica, now: u32, grace: u32) -> Option<Replica> {
    (!row.dead && row.expires + grace <= now).then_some(Replica { dead: true, ..row })
}

/// CLAIM, by key or by id: `next` is the next generation.
#[must_use]
pub fn claim(
    row: Option<Lease>,
    me: Boot,
    is_dead: impl Fn(Boot) -> bool,
    next: u32,
) -> Option<Lease> {
    let fresh = Lease {
        generation: next,
        owner: Some(me),
        busy: None,
        turn_seq: 0,
        taken_at: None,
        head: None,
    };
    let Some(row) = row else {
        return Some(fresh);
    };
    let claimable = match row.owner {
        None => true,
        Some(owner) => (owner == me && row.busy.is_none()) || is_dead(owner),
    };
    claimable.then_some(Lease {
        turn_seq: row.turn_seq,
        taken_at: row.taken_at,
        head: row.head,
        ..fresh
    })
}

/// TAKE.
#[must_use]
pub fn take(row: Lease, me: Boot, seen: Seen, now: u32, next: u32) -> Option<Lease> {
    let cold = row.taken_at.is_none_or(|taken| taken + COOLDOWN <= now);
    (row.seen() == seen && row.busy.is_none() && cold).then_some(Lease {
        generation: next,
        owner: Some(me),
        taken_at: Some(now),
        ..row
    })
}

/// RELEASE.
#[must_use]
pub fn release(row: Lease, fence: Fence) -> Option<Lease> {
    (row.is_held(fence) && row.busy.is_none()).then_some(Lease { owner: None, ..row })
}

/// FREE.
#[must_use]
pub fn free(row: Lease, next: u32) -> Lease {
    Lease {
        generation: next,
        owner: None,
        busy: None,
        ..row
    }
}

/// PURGE, of a row that is old enough: whether it goes.
#[must_use]
pub fn purge(row: Lease, is_dead: impl Fn(Boot) -> bool) -> bool {
    row.owner.is_none_or(is_dead)
}

/// BEGIN: the lease and the turn, both or none. `turn` is the row of this request; the dead begin nothing.
///
/// # Errors
/// [`NotBegun`]: nothing was written, nothing may be sent.
pub fn begin(
    row: Option<Lease>,
    turn: Option<Turn>,
    fence: Fence,
    request: Request,
    is_dead: impl Fn(Boot) -> bool,
) -> Result<(Lease, Turn), NotBegun> {
    let row = row
        .filter(|row| row.is_held(fence) && row.busy.is_none() && !is_dead(fence.boot))
        .ok_or(NotBegun::Fenced)?;
    if turn.is_some() {
        return Err(NotBegun::Begun);
    }
    let begun = Lease {
        busy: Some(request),
        turn_seq: row.turn_seq + 1,
        ..row
    };
    Ok((begun, Turn::Open))
}

/// FINISH: the turn if this call booked it, and the lease if it was still ours. `complete`: the response is the new head.
#[must_use]
pub fn finish(
    row: Option<Lease>,
    turn: Option<Turn>,
    fence: Fence,
    request: Request,
    complete: bool,
) -> (Option<Turn>, Option<Lease>) {
    let booked = (turn == Some(Turn::Open)).then_some(Turn::Closed);
    let moved = row
        .filter(|row| row.is_held(fence) && row.busy == Some(request))
        .map(|row| Lease {
            busy: None,
            head: if complete { Some(request) } else { row.head },
            ..row
        });
    (booked, moved)
}

/// WITHDRAW: as FINISH of a turn of which nothing was sent.
#[must_use]
pub fn withdraw(
    row: Option<Lease>,
    turn: Option<Turn>,
    fence: Fence,
    request: Request,
) -> (Option<Turn>, Option<Lease>) {
    finish(row, turn, fence, request, false)
}
