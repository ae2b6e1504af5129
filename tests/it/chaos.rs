//! The chaos run keeps working: a short one, at a tenth of the service's times. `make chaos` is the real one.

use std::time::Duration;

use loadtest::chaos::{Course, Options, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_promise_is_broken_while_replicas_and_the_network_fail() {
    let options = Options {
        drawbridge: env!("CARGO_BIN_EXE_drawbridge").into(),
        course: Course::Random,
        pace: Duration::from_millis(80),
        length: Duration::from_secs(14),
        seed: 7,
        replicas: 3,
        clients: 12,
        gap: Duration::from_secs(1),
        scale: Some(0.1),
    };
    let report = run(&options).await.unwrap();
    assert_eq!(report.violations, [], "{report}");
    let completed = report.turns.get("settled completed").copied();
    assert!(completed > Some(20) && report.faults.len() > 3, "{report}");
}
