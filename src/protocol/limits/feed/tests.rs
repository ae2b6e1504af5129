//! The feeds, one case each.

use http::{HeaderName, HeaderValue};
use serde_json::json;

use super::*;

const NOW: i64 = 1_800_000_000;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let pairs = pairs.iter().map(|(name, value)| {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a header name");
        (name, HeaderValue::from_str(value).expect("a header value"))
    });
    pairs.collect()
}

fn window(window: Window, used_percent: f64, resets_at: Option<i64>) -> WindowSample {
    WindowSample {
        window,
        used_percent,
        window_minutes: window.minutes(),
        resets_at,
    }
}

fn event(value: &Value) -> Vec<Observation> {
    from_event(value.to_string().as_bytes(), NOW)
}

fn usage(value: &Value) -> UsageReport {
    from_usage(value.to_string().as_bytes(), NOW).expect("an object")
}

#[test]
fn the_three_feeds_agree() {
    let reset = NOW + 4_200;
    let expected = vec![
        window(Window::FiveHour, 31.5, Some(reset)),
        window(Window::Weekly, 55.0, Some(reset)),
    ];
    let credits = Some(Credits {
        has_credits: true,
        unlimited: false,
        balance: Some(12.5),
    });

    let at = reset.to_string();
    let [from_headers] = &from_headers(
        &headers(&[
            ("x-codex-primary-used-percent", "31.5"),
            ("x-codex-primary-window-minutes", "300"),
            ("x-codex-primary-reset-at", &at),
            ("x-codex-secondary-used-percent", "55"),
            ("x-codex-secondary-window-minutes", "10080"),
            ("x-codex-secondary-reset-after-seconds", "4200"),
            ("x-codex-credits-has-credits", "True"),
            ("x-codex-credits-unlimited", "false"),
            ("x-codex-credits-balance", "12.5"),
            ("x-codex-plan-type", "pro"),
        ]),
        NOW,
    )[..] else {
        panic!("one family");
    };
    let [from_event] = &event(&json!({
        "type": "codex.rate_limits", "plan_type": "pro",
        "rate_limits": {
            "primary": {"used_percent": 31.5, "window_minutes": 300, "reset_at": reset},
            "secondary": {"used_percent": 55, "window_minutes": 10080, "resets_at": reset}},
        "credits": {"has_credits": true, "unlimited": false, "balance": "12.5"},
    }))[..] else {
        panic!("one family");
    };
    let from_usage = &usage(&json!({
        "plan_type": "pro",
        "rate_limit": {
            "primary_window": {"used_percent": 31.5, "limit_window_seconds": 18_000, "reset_after_seconds": 4200},
            "secondary_window": {"used_percent": 55, "limit_window_seconds": 604_800, "reset_after_seconds": 9, "reset_at": reset}},
        "credits": {"has_credits": true, "unlimited": false, "balance": "12.5"},
    }))
    .observations[0];

    for observation in [from_headers, from_event, from_usage] {
        assert_eq!(observation.family, Family::CODEX);
        assert_eq!(observation.windows, expected);
        assert_eq!(observation.credits, credits);
        assert_eq!(observation.plan_type.as_deref(), Some("pro"));
    }
}

#[test]
fn a_window_is_normalised_by_its_own_evidence() {
    let at = |offset: i64| NOW + offset;
    let cases = [
        // (used, minutes, reset) in the primary slot -> sample
        (
            json!(10),
            json!(10_080),
            json!(at(60)),
            Some(window(Window::Weekly, 10.0, Some(at(60)))),
        ),
        (
            json!(10),
            json!(43_200),
            json!(at(60)),
            Some(window(Window::Monthly, 10.0, Some(at(60)))),
        ),
        (
            json!(10),
            json!(0),
            json!(at(60)),
            Some(window(Window::FiveHour, 10.0, Some(at(60)))),
        ),
        (
            json!(0),
            json!(300),
            json!(null),
            Some(window(Window::FiveHour, 0.0, None)),
        ),
        (json!(0), json!(0), json!(0), None),
        (json!(0), json!(null), json!(null), None),
        (
            json!(99),
            json!(300),
            json!(at(0)),
            Some(window(Window::FiveHour, 0.0, None)),
        ),
        (
            json!(99),
            json!(300),
            json!(15_023_672_358_i64),
            Some(window(Window::FiveHour, 99.0, None)),
        ),
        (
            json!(99),
            json!(300),
            json!(u64::MAX),
            Some(window(Window::FiveHour, 99.0, None)),
        ),
        (
            json!(-4),
            json!(300),
            json!(at(60)),
            Some(window(Window::FiveHour, 0.0, Some(at(60)))),
        ),
        (
            json!(130.5),
            json!(300),
            json!(at(60)),
            Some(window(Window::FiveHour, 130.5, Some(at(60)))),
        ),
        (json!("NaN"), json!(300), json!(at(60)), None),
        (json!("inf"), json!(300), json!(at(60)), None),
        (json!(true), json!(300), json!(at(60)), None),
        (json!(null), json!(300), json!(at(60)), None),
        (
            json!("7"),
            json!("300"),
            json!(at(60).to_string()),
            Some(window(Window::FiveHour, 7.0, Some(at(60)))),
        ),
        (
            json!(7),
            json!(true),
            json!(false),
            Some(window(Window::FiveHour, 7.0, None)),
        ),
    ];
    for (used, minutes, reset, expected) in cases {
        let event = json!({"rate_limits": {"primary": {"used_percent": used, "window_minutes": minutes, "reset_at": reset}}});
        let windows: Vec<_> = from_event(event.to_string().as_bytes(), NOW)
            .into_iter()
            .flat_map(|seen| seen.windows)
            .collect();
        assert_eq!(windows, expected.into_iter().collect::<Vec<_>>(), "{event}");
    }
}

#[test]
fn no_window_comes_twice() {
    let week =
        |used: i64| json!({"used_percent": used, "window_minutes": 10_080, "reset_at": NOW + 60});
    let [seen] = &event(&json!({"rate_limits": {"primary": week(3), "secondary": week(8)}}))[..]
    else {
        panic!("one family");
    };
    assert_eq!(seen.windows, [window(Window::Weekly, 8.0, Some(NOW + 60))]);
}

#[test]
fn headers_of_other_families_stay_apart() {
    let headers = headers(&[
        ("x-codex-primary-used-percent", "20"),
        ("x-codex-primary-window-minutes", "300"),
        ("x-codex-bengalfox-primary-used-percent", "100"),
        ("x-codex-bengalfox-primary-window-minutes", "300"),
        ("x-codex-bengalfox-limit-name", "GPT-5.3-Codex-Spark"),
        ("x-codex-active-limit", "codex_bengalfox"),
        ("x-codex-primary-over-secondary-limit-percent", "0"),
        ("x-ratelimit-used-percent", "9"),
    ]);
    let seen = from_headers(&headers, NOW);
    let families: Vec<_> = seen
        .iter()
        .map(|seen| (seen.family.as_str(), seen.windows[0].used_percent))
        .collect();
    assert_eq!(families, [("codex", 20.0), ("codex_bengalfox", 100.0)]);
    assert_eq!(
        active_family(&headers),
        Some(Family::new("codex_bengalfox"))
    );
}

#[test]
fn an_active_limit_without_windows_is_none() {
    for (limit, family) in [
        ("premium", None),
        ("", None),
        ("codex", Some(Family::CODEX)),
    ] {
        let headers = headers(&[
            ("x-codex-active-limit", limit),
            ("x-codex-primary-used-percent", "20"),
        ]);
        assert_eq!(active_family(&headers), family, "{limit}");
    }
}

#[test]
fn headers_without_windows_still_tell_plan_and_credits() {
    let [seen] = &from_headers(&headers(&[("x-codex-plan-type", "plus")]), NOW)[..] else {
        panic!("one family");
    };
    assert_eq!(seen.plan_type.as_deref(), Some("plus"));
    assert!(from_headers(&headers(&[("content-type", "text/html")]), NOW).is_empty());
}

#[test]
fn events_of_other_families_stay_apart() {
    for name in ["limit_id", "metered_limit_name", "limit_name"] {
        let event = json!({name: "codex_bengalfox", "rate_limits": {"primary": {"used_percent": 5, "window_minutes": 300}}});
        assert_eq!(
            from_event(event.to_string().as_bytes(), NOW)[0].family,
            Family::new("codex_bengalfox"),
            "{name}"
        );
    }
    let seen = event(&json!({
        "rate_limits": {"primary": {"used_percent": 5, "window_minutes": 300}},
        "code_review_rate_limits": {"primary": {"used_percent": 90, "window_minutes": 300}},
    }));
    assert_eq!(
        seen.iter()
            .map(|seen| seen.family.as_str())
            .collect::<Vec<_>>(),
        ["codex", "code_review"]
    );
}

#[test]
fn nonsense_is_no_observation() {
    for data in [
        "",
        "[]",
        "null",
        "{}",
        r#"{"rate_limits":7}"#,
        r#"{"rate_limits":{"primary":[1]}}"#,
    ] {
        assert_eq!(from_event(data.as_bytes(), NOW), [], "{data}");
    }
    assert_eq!(from_usage(b"<html>", NOW), None);
    assert_eq!(from_usage(b"[]", NOW), None);
}

#[test]
fn the_usage_answer_tells_absent_families_from_none() {
    let spark = json!({"limit_name": "Spark", "metered_feature": "codex_bengalfox",
        "rate_limit": {"limit_reached": true, "primary_window": {"used_percent": 100, "limit_window_seconds": 18_000, "reset_after_seconds": 60}}});
    let report = usage(
        &json!({"plan_type": "pro", "workspace_id": "ws_1", "additional_rate_limits": [spark, 7],
        "rate_limit": {"allowed": true, "limit_reached": false}}),
    );
    assert!(report.lists_families);
    assert_eq!(report.workspace_id.as_deref(), Some("ws_1"));
    let [main, spark] = &report.observations[..] else {
        panic!("two families")
    };
    assert_eq!(main.limit_reached, Some(false));
    assert_eq!(spark.family.as_str(), "codex_bengalfox");
    assert_eq!(
        (spark.limit_reached, spark.windows[0].resets_at),
        (Some(true), Some(NOW + 60))
    );

    assert!(usage(&json!({"additional_rate_limits": []})).lists_families);
    for absent in [json!({}), json!({"additional_rate_limits": null})] {
        assert!(!usage(&absent).lists_families, "{absent}");
    }
}

#[test]
fn resets_at_in_year_2446_nan_percent_bool_reset_and_string_balance_are_ignored_safely() {
    let report = |primary: Value, balance: Value| {
        let body =
            json!({"rate_limit": {"primary_window": primary}, "credits": {"balance": balance}});
        usage(&body).observations.remove(0)
    };
    let hour = |used: Value, reset: Value| json!({"used_percent": used, "limit_window_seconds": 18_000, "reset_at": reset});
    let unknown_reset = vec![window(Window::FiveHour, 40.0, None)];
    for (what, primary, windows) in [
        (
            "the year 2446",
            hour(json!(40), json!(15_023_672_358_i64)),
            unknown_reset.clone(),
        ),
        ("a bool", hour(json!(40), json!(true)), unknown_reset),
        (
            "the year 2446, and a time from now",
            json!({"used_percent": 40, "limit_window_seconds": 18_000, "reset_at": 15_023_672_358_i64, "reset_after_seconds": 4_200}),
            vec![window(Window::FiveHour, 40.0, Some(NOW + 4_200))],
        ),
        ("NaN", hour(json!("NaN"), json!(NOW + 60)), vec![]),
    ] {
        assert_eq!(report(primary, json!(null)).windows, windows, "{what}");
    }
    for (balance, expected) in [
        (json!("12.50"), Some(12.5)),
        (json!("lots"), None),
        (json!(true), None),
    ] {
        let credits = report(json!(null), balance.clone()).credits;
        assert_eq!(
            credits.and_then(|credits| credits.balance),
            expected,
            "{balance}"
        );
    }
}
