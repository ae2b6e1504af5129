//! When the plan that the usage endpoint names is believed. Pure.
//!
//! Upstream degrades at times and calls a paid account free for a moment. A larger plan is believed at once, a smaller one when it is named
//! twice, by two questions; a seat of a workspace does not become free, and a word that nobody knows changes nothing that is known.

use jiff::{SignedDuration, Timestamp};

use crate::routing::{knows_plan, plan_weight};

/// Two questions at least this far apart are two.
const APART: SignedDuration = SignedDuration::from_secs(30);
/// What was named so long ago says nothing any more.
const STALE: SignedDuration = SignedDuration::from_hours(24);

/// What a named plan means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the account's plan; what was named against it is forgotten.
    Same,
    /// It becomes the account's plan.
    Change,
    /// It is remembered, or still is.
    Wait,
    /// It says nothing.
    Ignore,
}

/// `known` is the account's plan, `before` what was named against it and when.
pub(super) fn judge(
    known: &str,
    before: Option<(&str, Timestamp)>,
    named: &str,
    now: Timestamp,
) -> Verdict {
    let bound = matches!(
        known,
        "team" | "business" | "enterprise" | "edu" | "education" | "k12"
    );
    if named == known {
        Verdict::Same
    } else if known == "unknown" {
        Verdict::Change
    } else if !knows_plan(named) || (bound && plan_weight(named) < 1.0) {
        Verdict::Ignore
    } else if plan_weight(named) >= plan_weight(known) {
        Verdict::Change
    } else {
        let again = before.is_some_and(|(plan, at)| {
            let age = now.duration_since(at);
            plan == named && age >= APART && age < STALE
        });
        if again {
            Verdict::Change
        } else {
            Verdict::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upgrades_count_at_once_and_downgrades_when_they_are_named_twice() {
        use Verdict::{Change, Ignore, Same, Wait};
        let at = |seconds: i64| Timestamp::from_second(1_800_000_000 + seconds).unwrap();
        for (what, known, before, named, verdict) in [
            ("nothing changed", "plus", None, "plus", Same),
            ("nothing was known", "unknown", None, "free", Change),
            ("an upgrade", "free", None, "plus", Change),
            ("another upgrade", "plus", None, "pro", Change),
            (
                "another name of the same size",
                "plus",
                None,
                "team",
                Change,
            ),
            ("a stray answer", "plus", None, "free", Wait),
            ("twice", "plus", Some(("free", -60)), "free", Change),
            (
                "the same question",
                "plus",
                Some(("free", -1)),
                "free",
                Wait,
            ),
            (
                "another one each time",
                "pro",
                Some(("free", -60)),
                "plus",
                Wait,
            ),
            ("long ago", "plus", Some(("free", -90_000)), "free", Wait),
            (
                "a seat of a workspace",
                "team",
                Some(("free", -60)),
                "free",
                Ignore,
            ),
            ("no known word", "plus", Some(("gold", -60)), "gold", Ignore),
        ] {
            let before = before.map(|(plan, seconds)| (plan, at(seconds)));
            assert_eq!(judge(known, before, named, at(0)), verdict, "{what}");
        }
    }
}
