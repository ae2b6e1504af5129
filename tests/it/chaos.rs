//! The chaos runs keep working: short ones, at a tenth of the service's times. `make chaos` and `make drills` are the real ones.

use std::time::Duration;

use loadtest::chaos::{Course, Options, Report, run};

/// A course in small.
async fn briefly(course: Course, seed: u64, seconds: u64) -> Report {
    let options = Options {
        drawbridge: env!("CARGO_BIN_EXE_drawbridge").into(),
        course,
        pace: Duration::from_millis(80),
        length: Duration::from_secs(seconds),
        seed,
        replicas: 3,
        clients: 12,
        gap: Duration::from_secs(1),
        scale: Some(0.1),
    };
    let report = run(&options).await.unwrap();
    assert_eq!(report.violations, [], "{report}");
    let completed = report.turns.get("settled completed").copied();
    assert!(completed > Some(20), "{report}");
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_promise_is_broken_while_replicas_and_the_network_fail() {
    let report = briefly(Course::Random, 7, 14).await;
    assert!(report.faults.len() > 3, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_nothing_of_a_rolling_restart() {
    let report = briefly(Course::Rolling, 8, 14).await;
    assert!(report.faults.values().sum::<u64>() >= 3, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conversations_go_on_when_postgres_has_crashed_and_is_back() {
    let report = briefly(Course::Outage, 9, 14).await;
    assert_eq!(report.faults.len(), 1, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_stale_owner_acts_when_a_standby_without_the_last_commits_takes_over() {
    let report = briefly(Course::Promotion, 10, 14).await;
    assert_eq!(report.faults.len(), 1, "{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_see_nothing_of_a_new_master_key() {
    let report = briefly(Course::Rotation, 11, 14).await;
    assert_eq!(report.faults.values().sum::<u64>(), 9, "{report}");
}
