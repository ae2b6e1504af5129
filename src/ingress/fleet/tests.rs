//! The field matrix: what each key sees of each account.

use serde_json::Value;

use super::*;
use crate::{protocol::limits::Section, routing::Block};

const NOW: i64 = 1_800_000_000;
const SEEN: i64 = NOW - 60;

const FIELDS: [&str; 9] = [
    "accountId",
    "displayName",
    "email",
    "lastRefreshAt",
    "planType",
    "primary",
    "secondary",
    "status",
    "usageRefreshedAt",
];
const WINDOW: [&str; 3] = ["remainingPercent", "resetAt", "windowMinutes"];

fn listed(lifecycle: Lifecycle) -> Listed {
    Listed {
        id: AccountId::new(),
        email: Some("u@example.test".into()),
        label: None,
        plan: "plus".into(),
        lifecycle,
        reason: Some("token_revoked".into()),
        created_at: Timestamp::UNIX_EPOCH,
        refreshed_at: Timestamp::UNIX_EPOCH,
        access_expires_at: None,
    }
}

fn window(minutes: u32, used_percent: f64, resets_in: i64) -> routing::Window {
    routing::Window {
        family: "codex".into(),
        minutes,
        used_percent,
        resets_at: Some(NOW + resets_in),
        observed_at: SEEN,
    }
}

fn known(listed: &Listed, windows: &[routing::Window], blocked: bool) -> Account {
    let block = Block {
        family: "codex".into(),
        until: NOW + 60,
        reason: "usage_limit_reached".into(),
    };
    Account {
        id: listed.id,
        lifecycle: listed.lifecycle,
        plan: listed.plan.clone(),
        weight: 1.0,
        credits: None,
        windows: windows.to_vec(),
        blocks: Vec::from_iter(blocked.then_some(block)),
        models: None,
        load: Default::default(),
    }
}

fn keys(json: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    keys
}

#[test]
fn the_field_matrix_of_sections_switch_and_status() {
    use Section::{Limits, Pool};
    let statuses = [
        // Stored, blocked by upstream: derived.
        (Lifecycle::Active, false, "active"),
        (Lifecycle::Active, true, "rate_limited"),
        (Lifecycle::Paused, false, "paused"),
        (Lifecycle::Paused, true, "paused"),
        (Lifecycle::ReauthRequired, true, "reauth_required"),
        (Lifecycle::Deactivated, true, "deactivated"),
    ];
    let sections: [&[Section]; 4] = [&[], &[Pool], &[Limits], &[Pool, Limits]];
    for (lifecycle, blocked, derived) in statuses {
        for granted in sections {
            for hidden in [false, true] {
                let account = listed(lifecycle);
                let windows = [window(300, 100.0, 900), window(10_080, 25.0, 9_000)];
                let known = known(&account, &windows, blocked);
                let seen = QuotaVisibility::new(Some(granted), None, hidden);
                let json = json!(Summary::new(account, Some(&known), NOW, seen));
                let case = format!("{lifecycle} {blocked} {granted:?} {hidden}: {json}");

                let sees = |section| !hidden && granted.contains(&section);
                let (pool, limits) = (sees(Pool), sees(Limits));
                assert_eq!(keys(&json), FIELDS, "{case}");
                for (name, left, reset, minutes) in [
                    ("primary", 0.0, "2027-01-15T08:15:00Z", 300),
                    ("secondary", 75.0, "2027-01-15T10:30:00Z", 10_080),
                ] {
                    let share = &json[name];
                    assert_eq!(keys(share), WINDOW, "{case}");
                    assert_eq!(
                        share["remainingPercent"],
                        json!(pool.then_some(left)),
                        "{case}"
                    );
                    assert_eq!(share["resetAt"], json!(limits.then_some(reset)), "{case}");
                    assert_eq!(
                        share["windowMinutes"],
                        json!(limits.then_some(minutes)),
                        "{case}"
                    );
                }
                let observed = (pool || limits).then_some("2027-01-15T07:59:00Z");
                assert_eq!(json["usageRefreshedAt"], json!(observed), "{case}");
                let status = if pool && limits {
                    derived
                } else {
                    lifecycle.as_str()
                };
                assert_eq!(json["status"], status, "{case}");
                for always in [
                    "accountId",
                    "displayName",
                    "email",
                    "planType",
                    "lastRefreshAt",
                ] {
                    assert!(json[always].is_string(), "{case}");
                }
            }
        }
    }
}

#[test]
fn who_may_not_see_that_an_account_is_exhausted_reads_the_same_as_if_it_were_not() {
    use Section::{Limits, Pool};
    let sections: [&[Section]; 3] = [&[], &[Pool], &[Limits]];
    for granted in sections {
        let seen = QuotaVisibility::new(Some(granted), None, false);
        let account = listed(Lifecycle::Active);
        let [open, blocked] = [false, true].map(|blocked| {
            let known = known(&account, &[window(300, 40.0, 900)], blocked);
            json!(Summary::new(account.clone(), Some(&known), NOW, seen))
        });
        assert_eq!(open, blocked, "{granted:?}");
    }
}

#[test]
fn a_window_is_shown_by_its_length_and_what_is_unknown_is_null() {
    let seen = QuotaVisibility::new(None, None, false);
    let cases = [
        ("nothing is known", vec![], json!(null), json!(null)),
        (
            "free",
            vec![window(43_200, 10.0, 900)],
            json!(null),
            json!([90.0, 43_200]),
        ),
        (
            "weekly",
            vec![window(10_080, 10.0, 900)],
            json!(null),
            json!([90.0, 10_080]),
        ),
        (
            "five hours",
            vec![window(300, 10.0, 900)],
            json!([90.0, 300]),
            json!(null),
        ),
        (
            "over",
            vec![window(300, 104.0, 900)],
            json!([0.0, 300]),
            json!(null),
        ),
        (
            "passed",
            vec![window(300, 90.0, 0)],
            json!([100.0, 300]),
            json!(null),
        ),
        (
            "all",
            vec![
                window(300, 1.0, 9),
                window(10_080, 2.0, 9),
                window(43_200, 3.0, 9),
            ],
            json!([99.0, 300]),
            json!([98.0, 10_080]),
        ),
    ];
    for (case, windows, primary, secondary) in cases {
        let account = listed(Lifecycle::Active);
        let known = known(&account, &windows, false);
        let known = (!windows.is_empty()).then_some(&known);
        let summary = json!(Summary::new(account, known, NOW, seen));
        for (name, expected) in [("primary", primary), ("secondary", secondary)] {
            let share = &summary[name];
            assert_eq!(share["remainingPercent"], expected[0], "{case}: {summary}");
            assert_eq!(share["windowMinutes"], expected[1], "{case}: {summary}");
        }
    }
}

#[test]
fn an_account_is_called_by_its_label_its_address_or_its_id() {
    let seen = QuotaVisibility::new(None, None, true);
    let named = |label: Option<&str>, email: Option<&str>| {
        let account = Listed {
            label: label.map(str::to_owned),
            email: email.map(str::to_owned),
            ..listed(Lifecycle::Active)
        };
        let summary = Summary::new(account, None, NOW, seen);
        (summary.display_name == summary.account_id.to_string())
            .then(String::new)
            .unwrap_or(summary.display_name)
    };
    assert_eq!(named(Some("work"), Some("u@example.test")), "work");
    assert_eq!(named(None, Some("u@example.test")), "u@example.test");
    assert_eq!(named(None, None), "", "its id");
}
