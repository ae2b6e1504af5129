//! A history that keeps every promise, and what each checker says when one is broken.

use serde_json::json;

use super::*;
use crate::{
    chaos::{
        history::{Booked, Struck},
        plan::{Break, Misfortune},
    },
    upstream::{Attempt, Usage},
};

const USAGE: [u64; 4] = [100, 25, 9, 3];

fn call(tag: &str, continues: Option<&str>, meant: &[&str], id: &str) -> Call {
    Call {
        tag: tag.into(),
        key: 0,
        entry: Some(0),
        style: Style::Chain,
        client_turn: None,
        continues: continues.map(str::to_owned),
        meant: meant.iter().map(|line| (*line).to_owned()).collect(),
        intrudes: false,
        healed: false,
        began: 1_000,
        ended: 2_000,
        end: End::Completed {
            id: id.into(),
            text: format!("echo: {tag}.."),
        },
    }
}

fn attempt(n: usize, meant: &[&str], id: &str) -> Attempt {
    let item = |line: &&str| {
        let (role, text) = line.split_once(": ").unwrap();
        json!({ "type": "message", "role": role, "content": [{ "text": text }] })
    };
    serde_json::from_value(json!({
        "n": n, "at": 1_100, "account": "alice", "transport": "websocket", "client_turn_id": null, "model": "m", "status": 200, "headers": {},
        "body": {}, "history": meant.iter().map(item).collect::<Vec<_>>(), "response_id": id, "completed": true, "cut": false, "socket": 1,
        "usage": Usage { input: USAGE[0], cached: USAGE[1], output: USAGE[2], reasoning: USAGE[3] },
    }))
    .unwrap()
}

fn turn(tag: &str, id: &str) -> Turn {
    Turn {
        id: format!("turn of {tag}"),
        tag: Some(tag.into()),
        client_turn: Some(tag.into()),
        state: "settled".into(),
        outcome: Some("completed".into()),
        response: Some(id.into()),
        request: format!("request of {tag}"),
        lease: Some("lease".into()),
        generation: Some(7),
        boot: "boot".into(),
        attempts: vec![Booked {
            account: "alice".into(),
            boot: "boot".into(),
            class: Some("completed".into()),
            usage: USAGE,
            estimated: false,
        }],
        sums: USAGE,
        born: 1_000,
        opened: 1_000,
        settled: Some(1_900),
    }
}

fn lease(generation: i64, owner: &str) -> Lease {
    Lease {
        id: "lease".into(),
        generation,
        owner: Some(owner.into()),
        dead: false,
        busy: None,
    }
}

fn seen(generation: i64, owner: &str) -> Sighting {
    let lease = lease(generation, owner);
    Sighting { at: 1_000, lease }
}

const FIRST: [&str; 1] = ["user: a"];
const SECOND: [&str; 3] = ["user: a", "assistant: echo: a..", "user: b"];

/// Two turns of a conversation, as they should be.
fn good() -> History {
    History {
        calls: vec![
            call("a", None, &FIRST, "resp_1"),
            call("b", Some("resp_1"), &SECOND, "resp_2"),
        ],
        attempts: vec![attempt(0, &FIRST, "resp_1"), attempt(1, &SECOND, "resp_2")],
        turns: vec![turn("a", "resp_1"), turn("b", "resp_2")],
        leases: vec![lease(7, "boot")],
        sightings: vec![seen(7, "boot")],
        boots: [("boot".to_owned(), 0), ("other".to_owned(), 1)].into(),
        accounts: vec!["alice".into(), "bob".into()],
        ..History::default()
    }
}

/// What is found after something was changed.
fn after(change: impl FnOnce(&mut History)) -> Vec<&'static str> {
    let mut history = good();
    change(&mut history);
    let mut rules: Vec<_> = check(&history).iter().map(|found| found.rule).collect();
    rules.dedup();
    rules
}

fn strike(history: &mut History, what: What) {
    history.faults.push(Struck {
        what,
        from: 900,
        to: 2_100,
    });
}

fn fail(call: &mut Call, code: &str) {
    call.end = End::Failed {
        status: 400,
        code: code.into(),
        flaw: None,
    };
}

const NOTHING: [&str; 0] = [];
const AWAY: What = What::Edge(0, Side::Postgres, Break::BlackHole);

#[test]
fn a_good_history_breaks_no_promise() {
    assert_eq!(check(&good()), []);
}

#[test]
fn every_turn_is_closed_and_no_living_replica_keeps_a_lease_busy() {
    assert_eq!(
        after(|history| history.turns[0].state = "open".into()),
        ["open_turn"]
    );
    let busy = |history: &mut History| history.leases[0].busy = Some("request of a".into());
    assert_eq!(after(busy), ["busy_lease"]);
    let buried = |history: &mut History| {
        busy(history);
        history.leases[0].dead = true;
    };
    assert_eq!(after(buried), NOTHING, "whoever claims it wipes that");
    let forgotten = |history: &mut History| {
        busy(history);
        history.leases[0].owner = None;
    };
    assert_eq!(after(forgotten), NOTHING, "as that");
}

#[test]
fn when_everything_has_healed_every_conversation_goes_on() {
    let stuck = |history: &mut History| {
        history.calls[1].healed = true;
        fail(&mut history.calls[1], "continuity_unavailable");
        strike(history, AWAY);
    };
    assert_eq!(after(stuck), ["stuck"]);
}

#[test]
fn a_client_turn_has_a_second_row_only_for_a_reason() {
    let again = |history: &mut History| {
        history.turns[1].client_turn = Some("a".into());
        history.turns[1].born = 2_000;
        history.turns[0].outcome = Some("failed".into());
    };
    assert_eq!(after(again), ["booked_twice"]);
    let blind = |history: &mut History| {
        again(history);
        strike(history, AWAY);
    };
    assert_eq!(after(blind), NOTHING);
    let running = |history: &mut History| {
        again(history);
        history.turns[0].settled = Some(2_500);
    };
    assert_eq!(after(running), NOTHING);
}

#[test]
fn what_a_client_got_is_upstreams_answer_to_it_and_booked() {
    let swapped = |history: &mut History| {
        let (one, other) = history.calls.split_at_mut(1);
        std::mem::swap(&mut one[0].end, &mut other[0].end);
    };
    assert_eq!(after(swapped), ["foreign_answer"]);
    let unbooked = |history: &mut History| history.turns[1].response = None;
    assert_eq!(after(unbooked), ["delivered_unbooked"]);
    let twice = |history: &mut History| history.turns[0].response = Some("resp_2".into());
    assert_eq!(after(twice), ["delivered_unbooked"]);
}

#[test]
fn upstream_sees_the_conversation_that_was_meant() {
    let lost = |history: &mut History| drop(history.attempts[1].history.remove(0));
    assert_eq!(after(lost), ["history"]);
    let doubled = |history: &mut History| {
        let item = history.attempts[1].history[0].clone();
        history.attempts[1].history.insert(0, item);
    };
    assert_eq!(after(doubled), ["history"]);
    let foreign = |history: &mut History| {
        history.attempts[1].history[0]["content"] = "of another conversation".into();
    };
    assert_eq!(after(foreign), ["history"]);
    let unasked = |history: &mut History| drop(history.calls.remove(1));
    assert_eq!(after(unasked), ["foreign_message"]);
}

#[test]
fn the_books_agree_with_upstream_attempt_by_attempt() {
    let unbooked = |history: &mut History| history.attempts.push(attempt(2, &FIRST, "resp_3"));
    assert_eq!(after(unbooked), ["sent_unbooked"]);
    let unsent = |history: &mut History| drop(history.attempts.pop());
    assert_eq!(after(unsent), ["foreign_answer", "booked_unsent"]);
    let wrong = |history: &mut History| history.turns[0].attempts[0].account = "bob".into();
    assert_eq!(after(wrong), ["sent_unbooked", "booked_unsent"]);
    let sum = |history: &mut History| history.turns[0].sums[2] += 1;
    assert_eq!(after(sum), ["sums"]);
}

#[test]
fn usage_is_guessed_only_where_something_was_cut() {
    let guessed = |history: &mut History| {
        history.turns[0].attempts[0].estimated = true;
        history.turns[0].attempts[0].usage[0] += 1;
        history.turns[0].sums[0] += 1;
    };
    assert_eq!(after(guessed), ["sent_unbooked", "booked_unsent"]);
    for what in [What::Kill(0), What::Account(0, Misfortune::Cut)] {
        let cut = |history: &mut History| {
            guessed(history);
            strike(history, what);
        };
        assert_eq!(after(cut), NOTHING);
    }
}

#[test]
fn usage_of_a_turn_whose_client_left_may_be_a_guess() {
    let cancelled = |history: &mut History| {
        let booked = &mut history.turns[0].attempts[0];
        (booked.estimated, booked.class) = (true, Some("cancelled".into()));
    };
    assert_eq!(after(cancelled), ["sent_unbooked", "booked_unsent"]);
    let left = |history: &mut History| {
        cancelled(history);
        history.calls[0].end = End::Left;
    };
    assert_eq!(after(left), NOTHING);
}

#[test]
fn a_turn_is_called_after_what_its_response_answers() {
    let mut turns = [turn("a", "resp_1"), turn("?", "resp_2")];
    turns[1].tag = None;
    history::name(&mut turns, &[attempt(1, &SECOND, "resp_2")]);
    assert_eq!(turns[1].tag.as_deref(), Some("b"));
}

#[test]
fn what_was_delivered_complete_can_be_continued_once_it_is_booked() {
    for code in FORGOTTEN {
        let forgotten = |history: &mut History| {
            fail(&mut history.calls[1], code);
            history.calls[1].began = 1_950;
            strike(history, AWAY);
        };
        assert_eq!(after(forgotten), ["forgotten"], "whatever is away");
        let late = |history: &mut History| {
            forgotten(history);
            history.turns[0].settled = Some(1_960);
        };
        assert_eq!(after(late), NOTHING);
    }
    let repaired = |history: &mut History| {
        fail(&mut history.calls[1], "previous_response_not_found");
        history.calls[1].began = 1_950;
        history.calls[1].style = Style::CodexSocket;
    };
    assert_eq!(after(repaired), ["forgotten"], "for no reason");
    for (what, excused) in [
        (What::Kill(0), true),
        (What::Kill(1), false),
        (What::Redis, false),
    ] {
        let lost = |history: &mut History| {
            repaired(history);
            strike(history, what);
        };
        assert_eq!(after(lost).is_empty(), excused, "{what:?}");
    }
    let elsewhere = |history: &mut History| {
        repaired(history);
        let before = &mut history.turns[0];
        (before.boot, before.lease) = ("other".into(), None);
        history.boots.insert("other".into(), 1);
    };
    assert_eq!(after(elsewhere), ["forgotten"], "for no reason");
    let drained = |history: &mut History| {
        elsewhere(history);
        strike(history, What::Drain(1));
    };
    assert_eq!(after(drained), NOTHING, "where the conversation was");
}

#[test]
fn a_generation_has_one_owner_and_none_comes_back() {
    let back = |history: &mut History| history.sightings.push(seen(6, "boot"));
    assert_eq!(after(back), ["generation"]);
    let two = |history: &mut History| history.sightings.push(seen(7, "other"));
    assert_eq!(after(two), ["two_owners"]);
    let turns = |history: &mut History| history.turns[1].boot = "other".into();
    assert_eq!(after(turns), ["two_owners"]);
    let older = |history: &mut History| {
        history.turns[1].generation = Some(6);
        history.turns[1].opened = 1_500;
    };
    assert_eq!(after(older), ["generation"]);
    let taken = |history: &mut History| {
        history.turns[1].generation = Some(8);
        history.turns[1].boot = "other".into();
        history.sightings.push(seen(8, "other"));
    };
    assert_eq!(after(taken), NOTHING);
}

#[test]
fn errors_are_known_well_formed_and_connections_break_for_a_reason() {
    let unknown = |history: &mut History| fail(&mut history.calls[1], "internal_error");
    assert_eq!(after(unknown), ["error"]);
    // Bob and the other replica had no part in it.
    let table = [
        (
            "upstream_unavailable",
            What::Edge(0, Side::Upstream, Break::Cut),
            true,
        ),
        (
            "upstream_unavailable",
            What::Edge(1, Side::Upstream, Break::Cut),
            false,
        ),
        (
            "upstream_unavailable",
            What::Account(0, Misfortune::Cut),
            true,
        ),
        (
            "upstream_unavailable",
            What::Account(1, Misfortune::Cut),
            false,
        ),
        ("bridge_owner_unreachable", What::Kill(0), true),
        ("bridge_owner_unreachable", What::Kill(1), false),
        (
            "bridge_owner_unreachable",
            What::Edge(0, Side::Peers, Break::Cut),
            true,
        ),
        ("bridge_owner_unreachable", What::Slow(0), true),
        ("continuity_unavailable", What::Postgres(Break::Cut), true),
        ("continuity_unavailable", What::Redis, false),
        (
            "usage_limit_reached",
            What::Account(1, Misfortune::Limited),
            true,
        ),
        (
            "usage_limit_reached",
            What::Account(1, Misfortune::Cut),
            false,
        ),
        ("internal_error", What::Kill(0), false),
    ];
    for (code, what, excused) in table {
        let failed = |history: &mut History| {
            fail(&mut history.calls[1], code);
            strike(history, what);
        };
        assert_eq!(after(failed).is_empty(), excused, "{code} {what:?}");
    }
    // A dead owner is one until somebody may bury it.
    for (code, what, at, excused) in [
        (
            "upstream_unavailable",
            What::Edge(0, Side::Upstream, Break::Cut),
            7_000,
            true,
        ),
        (
            "upstream_unavailable",
            What::Edge(0, Side::Upstream, Break::Cut),
            8_000,
            false,
        ),
        ("bridge_owner_unreachable", What::Kill(0), 25_000, true),
        ("bridge_owner_unreachable", What::Kill(0), 26_000, false),
    ] {
        let over = |history: &mut History| {
            fail(&mut history.calls[1], code);
            strike(history, what);
            (history.calls[1].began, history.calls[1].ended) = (at, at + 1_000);
        };
        assert_eq!(after(over).is_empty(), excused, "{code} at {at}");
    }
    let bare = |history: &mut History| {
        let (code, flaw) = ("server_error".into(), Some("no error.message".into()));
        history.calls[1].end = End::Failed {
            status: 502,
            code,
            flaw,
        };
        strike(history, What::Account(0, Misfortune::Broken));
    };
    assert_eq!(after(bare), ["envelope"]);
    let broken = |history: &mut History| history.calls[1].end = End::Broken("reset".into());
    assert_eq!(after(broken), ["broken"]);
    let table = [
        (What::Kill(0), true),
        (What::Kill(1), false),
        (What::Edge(0, Side::Clients, Break::Cut), true),
        (What::Edge(1, Side::Clients, Break::Cut), false),
        (What::Edge(0, Side::Peers, Break::Cut), false),
        (What::Drain(0), false),
    ];
    for (what, excused) in table {
        let found = after(|history| {
            broken(history);
            strike(history, what);
        });
        assert_eq!(found.is_empty(), excused, "{what:?}");
    }
}

#[test]
fn a_socket_that_closes_as_its_client_speaks_is_no_error_unless_upstream_sees_the_message_twice() {
    let closed = |style, twice| {
        let mut history = good();
        history.calls[1].style = style;
        history.calls[1].end = End::Broken("closed 1012".into());
        if twice {
            let again = history.attempts[1].clone();
            history.attempts.push(again);
        }
        let found = unseen(&history);
        found
            .into_iter()
            .map(|found| found.rule)
            .collect::<Vec<_>>()
    };
    assert_eq!(closed(Style::ChainSocket, false), NOTHING);
    assert_eq!(closed(Style::ChainSocket, true), ["created_twice"]);
    assert_eq!(closed(Style::Chain, false), ["visible"]);
}

#[test]
fn strangers_are_not_served_and_who_lives_is_ready() {
    let served = |history: &mut History| history.calls[1].intrudes = true;
    assert!(after(served).contains(&"scope"));
    assert_eq!(
        after(|history| history.unready.push("r1".into())),
        ["ready"]
    );
    let unforgiven = |history: &mut History| history.upstream_violations.push("two".into());
    assert_eq!(after(unforgiven), ["upstream"]);
}
