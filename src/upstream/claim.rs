//! Work under a claim that ends by itself: it is renewed while the work goes on, and the work never waits for that.

use std::time::Duration;

use tokio::time::sleep;

/// Does `work`, and meanwhile has its claim renewed again and again.
pub(super) async fn kept<T, R: Future<Output = ()>>(
    every: Duration,
    renew: impl Fn() -> R,
    work: impl Future<Output = T>,
) -> T {
    let renewals = async {
        loop {
            sleep(every).await;
            renew().await;
        }
    };
    tokio::select! {
        done = work => done,
        never = renewals => never,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_goes_on_while_its_claim_is_renewed_and_while_that_hangs() {
        let second = Duration::from_secs(1);
        let renewals = AtomicU32::new(0);
        let renew = || async {
            if renewals.fetch_add(1, Ordering::Relaxed) == 2 {
                pending::<()>().await;
            }
        };
        let work = async {
            for _ in 0..10 {
                sleep(second).await;
            }
            "done"
        };
        assert_eq!(kept(second, renew, work).await, "done");
        assert_eq!(renewals.into_inner(), 3);
    }
}
