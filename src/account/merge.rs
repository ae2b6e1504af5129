//! Which rows are one seat. Pure: rows and a login in, the rows that this login is out; the oldest stays, the others are merged into it.
//!
//! `chatgpt_account_id` is a workspace, which colleagues share; within it `chatgpt_user_id` tells them apart. Two known user ids are never
//! one seat. A row that knows no user id is the seat's where nobody else is known in the workspace, else only by its e-mail address.

use std::collections::BTreeSet;

use jiff::Timestamp;

use crate::{db::LockClass, ids::AccountId, secret};

/// How a login finds the rows that it replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// By the seat. Off: an import stores a row beside the seat's.
    pub by_seat: bool,
    /// By the e-mail address too, where workspace or user is unknown on either side. Only an import asks for it.
    pub by_email: bool,
}

impl Policy {
    /// What every login uses.
    pub const LOGIN: Self = Self {
        by_seat: true,
        by_email: false,
    };
}

/// Who a login or a row is, as far as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Who {
    /// `chatgpt_account_id`.
    pub workspace: Option<String>,
    /// `chatgpt_user_id`.
    pub user: Option<String>,
    /// The keyed hash of the address.
    pub email: Option<Vec<u8>>,
}

impl Who {
    /// Whether the two are certainly different seats.
    fn conflicts(&self, other: &Self) -> bool {
        differ(&self.workspace, &other.workspace) || differ(&self.user, &other.user)
    }

    fn has_email_of(&self, other: &Self) -> bool {
        self.email.is_some() && self.email == other.email
    }

    /// The same text for the same login that names no workspace.
    fn fallback(&self) -> [&[u8]; 2] {
        let user = self.user.as_deref().unwrap_or_default();
        let email = self.email.as_deref().filter(|_| self.user.is_none());
        [user.as_bytes(), email.unwrap_or_default()]
    }
}

/// A row of `accounts`.
#[derive(Clone, Debug)]
pub struct Row {
    /// Its id.
    pub id: AccountId,
    /// Whose it is.
    pub who: Who,
    /// Decides who is the oldest.
    pub created_at: Timestamp,
}

/// The rows that a login is, oldest first; none if it is new. `rows` are all of its workspace and all of its address.
#[must_use]
pub fn rows_of(who: &Who, rows: &[Row], policy: Policy) -> Vec<AccountId> {
    let mut found = match &who.workspace {
        Some(_) if policy.by_seat => of_seat(who, rows),
        None if policy.by_seat => oldest(rows.iter().filter(|row| is_same(who, &row.who))),
        _ => Vec::new(),
    };
    if policy.by_email {
        let also = rows
            .iter()
            .filter(|row| row.who.has_email_of(who) && !row.who.conflicts(who));
        let all: Vec<&Row> = found.iter().copied().chain(also).collect();
        let one_seat = all
            .iter()
            .all(|one| all.iter().all(|other| !one.who.conflicts(&other.who)));
        if one_seat {
            found = all;
        }
    }
    found.sort_unstable_by_key(|row| (row.created_at, row.id));
    found.dedup_by_key(|row| row.id);
    found.into_iter().map(|row| row.id).collect()
}

/// [`rows_of`] a login that is meant for one row: that one must be among them, or prove to be the same person's from when less was known.
/// `None` if it is another seat's.
#[must_use]
pub fn rows_for(target: &Row, who: &Who, rows: &[Row], policy: Policy) -> Option<Vec<AccountId>> {
    let found = rows_of(who, rows, policy);
    if found.contains(&target.id) {
        return Some(found);
    }
    let mut all: Vec<&Row> = rows.iter().filter(|row| found.contains(&row.id)).collect();
    let same = is_same(who, &target.who) && !all.iter().any(|row| row.who.conflicts(&target.who));
    all.push(target);
    all.sort_unstable_by_key(|row| (row.created_at, row.id));
    same.then(|| all.into_iter().map(|row| row.id).collect())
}

/// Whether a row that names no workspace is the same person's.
fn is_same(who: &Who, row: &Who) -> bool {
    row.workspace.is_none()
        && match (&who.user, &row.user) {
            (Some(one), Some(other)) => one == other,
            _ => who.has_email_of(row),
        }
}

/// The advisory locks of a login, in the order in which they are taken: seat, then e-mail address; where neither is at stake, the row.
#[must_use]
pub fn locks(who: &Who, policy: Policy, id: AccountId) -> Vec<(LockClass, i32)> {
    let seat = who.workspace.as_deref().filter(|_| policy.by_seat);
    let email = who.email.as_deref().filter(|_| policy.by_email);
    let seat = seat.map(|workspace| (LockClass::Seat, key(&[workspace.as_bytes()])));
    let email = email.map(|email| (LockClass::Email, key(&[email])));
    let locks: Vec<_> = seat.into_iter().chain(email).collect();
    match locks[..] {
        [] if policy.by_seat => vec![(LockClass::Account, key(&who.fallback()))],
        [] => vec![(LockClass::Account, key(&[id.0.as_bytes()]))],
        _ => locks,
    }
}

fn of_seat<'a>(who: &Who, rows: &'a [Row]) -> Vec<&'a Row> {
    let rows: Vec<&Row> = rows
        .iter()
        .filter(|row| row.who.workspace == who.workspace)
        .collect();
    let users: BTreeSet<&str> = rows
        .iter()
        .filter_map(|row| row.who.user.as_deref())
        .collect();
    let by_email: BTreeSet<&str> = rows
        .iter()
        .filter(|row| row.who.has_email_of(who))
        .filter_map(|row| row.who.user.as_deref())
        .collect();
    // A login that does not say who it is can only be the one who is known there, or the one whose address it has.
    let user = who
        .user
        .as_deref()
        .or_else(|| only(&users))
        .or_else(|| only(&by_email));
    let (own, others): (Vec<&Row>, Vec<&Row>) = rows
        .iter()
        .filter(|row| row.who.user.is_some())
        .partition(|row| row.who.user.as_deref() == user);
    let joins = |row: &&Row| {
        row.who.user.is_none()
            && (others.is_empty()
                || (user.is_none() && row.who.has_email_of(who))
                || (row.who.has_email_of(who)
                    || own.iter().any(|own| own.who.has_email_of(&row.who)))
                    && !others.iter().any(|other| other.who.has_email_of(&row.who)))
    };
    let joining: Vec<&Row> = rows.iter().copied().filter(joins).collect();
    own.into_iter().chain(joining).collect()
}

fn oldest<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<&'a Row> {
    rows.min_by_key(|row| (row.created_at, row.id))
        .into_iter()
        .collect()
}

fn only<'a>(users: &BTreeSet<&'a str>) -> Option<&'a str> {
    users.first().copied().filter(|_| users.len() == 1)
}

fn differ(one: &Option<String>, other: &Option<String>) -> bool {
    matches!((one, other), (Some(one), Some(other)) if one != other)
}

/// The second key of an advisory lock; two that share it only wait for each other.
fn key(parts: &[&[u8]]) -> i32 {
    let [a, b, c, d, ..] = secret::digest(parts);
    i32::from_be_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMAIL: Policy = Policy {
        by_seat: true,
        by_email: true,
    };
    const EMAIL_ALONE: Policy = Policy {
        by_seat: false,
        by_email: true,
    };
    const BESIDE: Policy = Policy {
        by_seat: false,
        by_email: false,
    };

    /// `workspace/user/email`, each `-` if unknown.
    fn who(text: &str) -> Who {
        let mut parts = text.split('/').map(|part| (part != "-").then_some(part));
        let mut part = || parts.next().unwrap();
        Who {
            workspace: part().map(str::to_owned),
            user: part().map(str::to_owned),
            email: part().map(|email| email.as_bytes().to_vec()),
        }
    }

    /// Rows in order of their age; yields the indices of those found.
    fn found(login: &str, rows: &[&str], policy: Policy) -> Vec<usize> {
        let ids: Vec<AccountId> = rows.iter().map(|_| AccountId::new()).collect();
        let mut rows: Vec<Row> = rows
            .iter()
            .zip(&ids)
            .zip(0..)
            .map(|((text, id), age)| Row {
                id: *id,
                who: who(text),
                created_at: Timestamp::from_second(age).unwrap(),
            })
            .collect();
        // The order of the rows says nothing.
        rows.reverse();
        let index = |id| ids.iter().position(|other| *other == id).unwrap();
        rows_of(&who(login), &rows, policy)
            .into_iter()
            .map(index)
            .collect()
    }

    #[test]
    fn the_rows_of_a_login() {
        for (what, login, rows, policy, expected) in [
            ("no match creates", "w/u/e", &[][..], Policy::LOGIN, &[][..]),
            ("the same seat", "w/u/e", &["w/u/e"], Policy::LOGIN, &[0]),
            (
                "under another address",
                "w/u/new",
                &["w/u/e"],
                Policy::LOGIN,
                &[0],
            ),
            (
                "another workspace of the same person",
                "w2/u/e",
                &["w/u/e"],
                Policy::LOGIN,
                &[],
            ),
            ("a colleague", "w/v/f", &["w/u/e"], Policy::LOGIN, &[]),
            (
                "a colleague with the same address",
                "w/v/e",
                &["w/u/e"],
                Policy::LOGIN,
                &[],
            ),
            (
                "oldest first",
                "w/u/e",
                &["w/-/a", "w/u/b", "w/-/c"],
                Policy::LOGIN,
                &[0, 1, 2],
            ),
            (
                "a row that knows no user, alone",
                "w/u/e",
                &["w/-/f"],
                Policy::LOGIN,
                &[0],
            ),
            (
                "... beside a colleague",
                "w/u/e",
                &["w/-/f", "w/v/g"],
                Policy::LOGIN,
                &[],
            ),
            (
                "... by its address",
                "w/u/e",
                &["w/-/e", "w/v/g"],
                Policy::LOGIN,
                &[0],
            ),
            (
                "... by an address that the seat had",
                "w/u/new",
                &["w/-/e", "w/v/g", "w/u/e"],
                Policy::LOGIN,
                &[0, 2],
            ),
            (
                "... by an address that a colleague has, too",
                "w/u/e",
                &["w/-/e", "w/v/e"],
                Policy::LOGIN,
                &[],
            ),
            (
                "a login that knows no user, the only seat",
                "w/-/new",
                &["w/u/e"],
                Policy::LOGIN,
                &[0],
            ),
            (
                "... and rows that do not either",
                "w/-/new",
                &["w/-/e", "w/-/f"],
                Policy::LOGIN,
                &[0, 1],
            ),
            (
                "... one of two seats, by its address",
                "w/-/e",
                &["w/u/e", "w/v/f", "w/-/e"],
                Policy::LOGIN,
                &[0, 2],
            ),
            (
                "... neither of two seats",
                "w/-/new",
                &["w/u/e", "w/v/f"],
                Policy::LOGIN,
                &[],
            ),
            (
                "... an address of both, and a row like it",
                "w/-/e",
                &["w/u/e", "w/v/e", "w/-/e"],
                Policy::LOGIN,
                &[2],
            ),
            (
                "... without an address",
                "w/-/-",
                &["w/u/-", "w/v/-", "w/-/-"],
                Policy::LOGIN,
                &[],
            ),
            (
                "no workspace falls through to the same user",
                "-/u/e",
                &["w/u/e", "-/u/f", "-/v/e"],
                Policy::LOGIN,
                &[1],
            ),
            (
                "... or address",
                "-/-/e",
                &["w/-/e", "-/-/f", "-/-/e"],
                Policy::LOGIN,
                &[2],
            ),
            (
                "... and merges nothing",
                "-/-/e",
                &["-/-/e", "-/-/e"],
                Policy::LOGIN,
                &[0],
            ),
            (
                "an address alone finds nothing",
                "w/u/e",
                &["-/-/e", "w2/u/e"],
                Policy::LOGIN,
                &[],
            ),
            (
                "unless asked for",
                "w/u/e",
                &["-/-/e", "w/u/f"],
                EMAIL,
                &[0, 1],
            ),
            (
                "... and never another seat",
                "w/u/e",
                &["w2/u/e", "w/v/e", "-/v/e", "-/-/e"],
                EMAIL,
                &[3],
            ),
            (
                "... nor one of two",
                "-/-/e",
                &["w/u/e", "w2/u/e"],
                EMAIL,
                &[],
            ),
            (
                "... also without the seat",
                "w/u/e",
                &["w/u/f", "-/-/e"],
                EMAIL_ALONE,
                &[1],
            ),
            ("beside", "w/u/e", &["w/u/e", "-/-/e"], BESIDE, &[]),
        ] {
            assert_eq!(found(login, rows, policy), expected, "{what}");
        }
    }

    #[test]
    fn the_seat_is_locked_before_the_address_and_the_row_where_neither_is_at_stake() {
        use LockClass::{Account, Email, Seat};
        let id = AccountId::new();
        let classes = |login: &str, policy| -> Vec<i32> {
            let locks = locks(&who(login), policy, id);
            locks.into_iter().map(|(class, _)| class as i32).collect()
        };
        for (policy, named, nameless) in [
            (EMAIL, &[Seat, Email][..], &[Email][..]),
            (Policy::LOGIN, &[Seat], &[Account]),
            (EMAIL_ALONE, &[Email], &[Email]),
            (BESIDE, &[Account], &[Account]),
        ] {
            let number = |classes: &[LockClass]| -> Vec<i32> {
                classes.iter().map(|class| *class as i32).collect()
            };
            assert_eq!(classes("w/u/e", policy), number(named), "{policy:?}");
            assert_eq!(classes("-/u/e", policy), number(nameless), "{policy:?}");
        }
        // Logins of one seat under different addresses wait for each other, and so do nameless logins of one person.
        let login = |text| locks(&who(text), Policy::LOGIN, AccountId::new())[0].1;
        assert_eq!(login("w/u/e"), login("w/v/f"));
        assert_eq!(login("-/u/e"), login("-/u/f"));
        assert_ne!(login("w/u/e"), login("w2/u/e"));
    }

    #[test]
    fn a_login_replaces_the_row_that_it_is_meant_for_only_as_the_same_seat() {
        for (login, target, other, expected) in [
            ("w/u/new", "w/u/e", "w/v/f", Some(1)),
            ("w/v/f", "w/u/e", "w/v/f", None),
            ("w/v/f", "w/u/e", "-/-/-", None),
            ("w/u/e", "-/u/f", "w/u/e", Some(2)),
            ("w/u/e", "-/-/e", "w/v/f", Some(1)),
            ("w/-/e", "-/u/e", "w/u/e", Some(2)),
            ("w/-/e", "-/v/e", "w/u/f", None),
            ("w/u/e", "-/v/e", "-/-/-", None),
            ("w/u/e", "-/-/f", "-/-/-", None),
            ("w/u/-", "-/-/-", "-/-/-", None),
            ("w/u/e", "w2/u/e", "-/-/-", None),
        ] {
            let row = |text, age| Row {
                id: AccountId::new(),
                who: who(text),
                created_at: Timestamp::from_second(age).unwrap(),
            };
            let rows = [row(target, 1), row(other, 0)];
            let found = rows_for(&rows[0], &who(login), &rows, Policy::LOGIN);
            assert_eq!(
                found.as_ref().map(Vec::len),
                expected,
                "{login} {target} {other}"
            );
            if let Some(found) = found {
                assert!(
                    found.contains(&rows[0].id) && found.is_sorted_by_key(|id| *id != rows[1].id)
                );
            }
        }
    }
}
