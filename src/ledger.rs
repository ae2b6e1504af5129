//! The ledger: what every turn used, booked once.
//!
//! A row of `turns` is a turn: while it is open it is a reservation, and its attempts are recorded before anything of them is sent. Settling
//! closes it, once. What each attempt used is what upstream reported, or an estimate that is marked as one; the row holds the sums. The
//! rows of `request_log` tell the same per request and are written off the path; both agree by construction, since whoever books a turn
//! writes its log, and a log row that exists is never changed.
//!
//! It knows nothing of clients and connections: callers say what happened.

mod attempt;
mod history;
mod late;
mod log;
pub mod price;
mod record;
mod store;
mod sweep;
mod turn;
mod used;

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

pub use self::{
    attempt::{Attempt, End, Metered, Totals, Try},
    history::STATEMENTS as HISTORY_STATEMENTS,
    log::Entry,
    record::{Record, Turn, record},
    store::STATEMENTS,
    sweep::{Reconciliation, Side},
    turn::{
        Answer, Booked, Bridge, Fence, NotOpened, Opened, Opening, Outcome, Request, Settlement,
        Snapshot, Sticky,
    },
    used::Used,
};
use self::{
    late::{Away, Late},
    log::RequestLog,
    used::Sums,
};
use crate::{
    db::{Class, Db, Error},
    ids::BootId,
    task::Tasks,
    telemetry,
};

/// After so long a statement that was sent has landed, or never will.
const SLOWEST_OPENING: Duration = Duration::from_secs(5);

/// The ledger of one process. Clones share the request log's queue.
#[derive(Clone, Debug)]
pub struct Ledger {
    db: Db,
    /// The present incarnation of this process.
    boot: watch::Receiver<BootId>,
    log: RequestLog,
    away: Arc<Away>,
    sums: Arc<Sums>,
}

impl Ledger {
    /// The ledger as this process writes it, in the name of its present incarnation. The request log is written by a task until [`Ledger::flush`].
    #[must_use]
    pub fn new(db: Db, boot: watch::Receiver<BootId>, tasks: &Tasks) -> Self {
        telemetry::models(price::models());
        let log = RequestLog::new(&db);
        let writer = log.clone();
        tasks.essential("request_log", async move { writer.run().await });
        Self {
            db,
            boot,
            log,
            away: Arc::default(),
            sums: Arc::default(),
        }
    }

    /// Reserves: opens the turn, with its first attempt, before anything is sent. A request that repeats one which did not complete reopens
    /// that turn. With a lease, the reservation and the lease's fence are one fact.
    ///
    /// # Errors
    /// [`NotOpened`]: nothing may be sent. After [`NotOpened::Db`], [`Ledger::withdraw`] takes back what may have been written.
    pub async fn open(&self, opening: Opening) -> Result<Opened, NotOpened> {
        let boot = self.boot();
        let first = Attempt::begin(opening.request.id, boot, opening.first);
        let opened = store::open(&self.db, boot, &opening, &first).await?;
        self.away.answered();
        let (turn, earlier) = opened.ok_or(NotOpened::Fenced)?;
        Ok(Opened::new(opening, turn, earlier, first))
    }

    /// Postgres did not answer what was asked at `asked` within `patience`. Until it does, and for a minute at most, [`Ledger::open_late`]
    /// opens; unless the wait was so long that this process must have been stopped.
    pub fn missed(&self, asked: Instant, patience: Duration) {
        self.away.missed(asked, patience);
    }

    /// Whether Postgres is known to be away, and turns may begin without it.
    #[must_use]
    pub fn is_away(&self) -> bool {
        self.away.is_bridged()
    }

    /// Opens a turn while Postgres is away, without its lease: it is recorded when it is settled. If an opening of the same request has
    /// landed all the same, it becomes that. `None` if Postgres is not away, or for too long, or too many turns wait.
    #[must_use]
    pub fn open_late(&self, opening: Opening) -> Option<Opened> {
        let place = self.away.place()?;
        let first = Attempt::begin(opening.request.id, self.boot(), opening.first);
        Some(Opened::late(Late::new(opening, place), first))
    }

    /// Records a further attempt, before anything of it is sent. False if the turn is no longer ours: nothing may be sent.
    ///
    /// # Errors
    /// Of the statement; then nothing may be sent, and the attempt does not count.
    pub async fn attempt(&self, opened: &mut Opened, next: Try) -> Result<bool, Error> {
        let mut with_next = opened.clone();
        with_next.begin(Attempt::begin(opened.request().id, self.boot(), next));
        let recorded = opened.is_late() || store::attempt(&self.db, &with_next).await?;
        if recorded {
            *opened = with_next;
        }
        Ok(recorded)
    }

    /// Books the turn (one try), moves its lease's head and keeps its snapshot. An attempt that has not ended counts as cut.
    ///
    /// # Errors
    /// Of the statement; whether it was booked is then unknown, and repeating is safe.
    pub async fn settle(&self, opened: &Opened, settlement: &Settlement) -> Result<Booked, Error> {
        let mut opened = opened.closed();
        if let Some(late) = opened.unrecorded() {
            store::open_late(&self.db, self.boot(), late.opening.fence, &opened).await?;
        }
        let mut booked = store::settle(&self.db, &opened, settlement).await?;
        // Where a standby has taken over, it may never have heard of the turn, or not of this retry, which then is a turn of its own.
        if !booked.turn {
            let mut anew = store::open_late(&self.db, opened.boot(), None, &opened).await?;
            if !anew && opened.is_retry() && !store::has_heard(&self.db, &opened).await? {
                opened = Cow::Owned(opened.alone());
                store::open_late(&self.db, opened.boot(), None, &opened).await?;
                anew = true;
            }
            if anew {
                booked = store::settle(&self.db, &opened, settlement).await?;
            }
        }
        self.away.answered();
        // Also when it was booked before: the log ignores what it has.
        let entry = Entry::of_turn(&opened, &settlement.answer);
        entry.count(&opened.request().model);
        self.log.push(entry);
        Ok(booked)
    }

    /// Books the turn in the background, as often as it takes. The sweep books it if this process dies first.
    pub fn settle_until_booked(
        self,
        opened: Opened,
        settlement: Settlement,
        tasks: &Tasks,
    ) -> JoinHandle<()> {
        telemetry::count("drawbridge_ledger_late_settlements_total");
        tasks.spawn("settle", async move {
            let mut backoff = Backoff::default();
            while let Err(error) = self.settle(&opened, &settlement).await {
                if !backoff.pause(&error).await {
                    return;
                }
            }
        })
    }

    /// Takes back, in the background, an opening whose answer was lost: nothing was sent.
    pub fn withdraw(
        self,
        request: &Request,
        fence: Option<Fence>,
        tasks: &Tasks,
    ) -> JoinHandle<()> {
        let request = request.id;
        tasks.spawn("withdraw", async move {
            // Twice: the opening itself may still be on its way when the first finds nothing.
            for pause in [Duration::ZERO, SLOWEST_OPENING] {
                sleep(pause).await;
                let mut backoff = Backoff::default();
                while let Err(error) = store::withdraw(&self.db, request, fence).await {
                    if !backoff.pause(&error).await {
                        return;
                    }
                }
            }
        })
    }

    /// Logs a request that was answered without a turn.
    pub fn refuse(&self, request: &Request, answer: &Answer) {
        self.log.push(Entry::of_request(request, answer));
    }

    /// Turns that run and are recorded only when they are settled.
    #[must_use]
    pub fn unbooked(&self) -> usize {
        self.away.waiting()
    }

    /// Entries of the request log that are not written yet.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.log.waiting()
    }

    /// Writes what is queued, and ends the writer. Called when the last turn has ended.
    pub async fn flush(&self) {
        if timeout(FLUSH_TIME, self.log.close()).await.is_err() {
            tracing::warn!("the request log was not written completely; the ledger has it");
        }
    }

    fn boot(&self) -> BootId {
        *self.boot.borrow()
    }
}

/// How long the end of the process waits for the request log.
const FLUSH_TIME: Duration = Duration::from_secs(5);

/// Between two tries of what must be booked: 100 ms to 5 s.
#[derive(Default)]
struct Backoff {
    tries: u32,
}

impl Backoff {
    /// Waits. False if another try cannot heal the error: then the sweep will book it.
    async fn pause(&mut self, error: &Error) -> bool {
        if *error.class() == Class::Bug {
            tracing::error!(%error, "a turn is left to the sweep");
            return false;
        }
        tracing::debug!(%error, "a turn is not booked yet");
        sleep(Duration::from_millis(100 << self.tries.min(5)).min(Duration::from_secs(5))).await;
        self.tries += 1;
        true
    }
}
