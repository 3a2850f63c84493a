//! `run --continuous`: lives one after another, until somebody asks it to end or a person has to decide.
//!
//! ```text
//! { open -> { await records or a heartbeat -> microbatch or renewal }* }  -- something is away --> pause, open again
//! ```
//! A life is that of a drain but for its end offsets, which it has not. Where Kafka is away the life goes on: its client
//! connects again, and the lease is renewed meanwhile. Where catalog, warehouse or disk fail, or the outcome of a commit
//! is unknown, the life is over and the next begins with the whole start table: nothing is guessed, and what was read
//! and not committed is read again. Pauses between lives grow to [`PAUSE_MAX`], with up to half at random.
//!
//! A lease that ran out during an outage may have a new owner: then this process is fenced and ends.

use std::time::{Duration, Instant};

use super::microbatch::{READ_TURN_MAX, Run};
use super::profile::Stage;
use super::report::{Event, Report, Summary};
use super::requests;
use super::session::{Opened, Session};
use super::watch::{Outage, Seen};
use super::{RunOptions, stops};
use crate::counts::Counts;
use crate::job::file::LoadedJob;
use crate::protocol::{self, Endless, Turn};
use crate::stop::{Reason, Stop};

/// First pause after something was found away.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Longest time in which a signal is not heard during a pause.
const PAUSE_TURN: Duration = Duration::from_millis(100);

/// How often an owner that waits loads its table for what others ask.
const REQUESTS_INTERVAL: Duration = Duration::from_secs(30);

/// What lives of one process hand on.
#[derive(Default)]
struct Chain {
    counts: Counts,
    batches: u64,
    /// Whether a life of it owned the table.
    was_owner: bool,
    outage: Outage,
    /// Lives that ended badly since the last that had something land.
    failures: u32,
}

/// How a life ends well.
enum Ended {
    /// It was asked to.
    Asked(Box<Summary>),
    /// The topics are others: the start table says what that means.
    TopicsChanged,
}

/// Follows a job's topics until it is asked to end.
///
/// # Errors
/// `INTERRUPTED` after a signal; else a [`Stop`] that a person decides on.
pub(super) async fn run(
    loaded: &LoadedJob,
    options: &RunOptions,
    report: &mut dyn Report,
) -> Result<Summary, Stop> {
    let begun = Instant::now();
    let mut chain = Chain::default();
    loop {
        let stop = match live(loaded, options, report, &mut chain).await {
            // The start judges it. Where it finds nothing wrong, what was seen may last, and each life is a commit.
            Ok(Ended::TopicsChanged) => {
                pause(chain.failures, options).await;
                chain.failures += 1;
                continue;
            }
            Ok(Ended::Asked(_)) if options.interrupted() => return Err(stops::interrupted()),
            Ok(Ended::Asked(summary)) => {
                let summary = Summary { seconds: begun.elapsed().as_secs_f64(), ..*summary };
                report.event(&Event::Done(summary.clone()));
                return Ok(summary);
            }
            Err(stop) => stop,
        };
        if stop.reason == Reason::Busy && chain.was_owner {
            return Err(taken_over(stop));
        }
        if !passes(stop.reason) {
            return Err(stop);
        }
        if options.is_ending() {
            return Err(if options.interrupted() { stops::interrupted() } else { stop });
        }
        let what = protocol::stops::chain(&stop);
        chain.outage.begins(stop.reason, "", what, report);
        pause(chain.failures, options).await;
        chain.failures += 1;
    }
}

/// Whether a run that goes on for ever waits for this to pass by itself.
fn passes(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::SourceAway
            | Reason::CatalogAway
            | Reason::StorageFailed
            | Reason::OutcomeUnknown
            | Reason::TableChanged
    )
}

/// Another owner has the table that this process had when something went away.
fn taken_over(stop: Stop) -> Stop {
    Stop::new(
        Reason::Fenced,
        format!("another owner took the table over while this run could not commit: {}", stop.what),
        "everything that this run committed is there, and nothing else of it is visible; do not restart this copy unless \
         the other one is to end",
    )
}

/// Longer with each failure, and up to half of it at random so that two processes do not march in step.
async fn pause(failures: u32, options: &RunOptions) {
    options.profile.turn_to(Stage::Pause);
    let longest = PAUSE_FIRST.saturating_mul(1 << failures.min(6)).min(PAUSE_MAX);
    let until = Instant::now() + longest.mul_f64(0.5 + rand::random::<f64>() / 2.0);
    while Instant::now() < until && !options.is_ending() {
        // A signal is only a flag: nothing wakes this.
        tokio::time::sleep(PAUSE_TURN).await;
    }
}

/// One life, from the lock to the release.
async fn live(
    loaded: &LoadedJob,
    options: &RunOptions,
    report: &mut dyn Report,
    chain: &mut Chain,
) -> Result<Ended, Stop> {
    options.profile.turn_to(Stage::Start);
    let opened = Session::open(loaded, options, report).await;
    options.profile.turn_to(Stage::Other);
    let mut session = match opened? {
        Opened::Session(session) => session,
        Opened::NothingToRead(summary) => return Ok(Ended::Asked(summary)),
    };
    chain.was_owner = true;
    session.watch.outage = std::mem::take(&mut chain.outage);
    // The start has asked the broker everything.
    session.watch.source_answers(report);
    let batches_before = chain.batches;
    let mut run = Run::new(&mut session, report, chain.counts, chain.batches);
    let followed = protocol::follow(&mut run).await;
    options.profile.turn_to(Stage::End);
    options.profile.note_threads();
    let topics_changed = run.topics_changed;
    (chain.counts, chain.batches) = (run.counts, run.batches);
    chain.outage = std::mem::take(&mut session.watch.outage);
    if chain.batches > batches_before {
        chain.failures = 0;
    }
    match followed {
        Ok(()) if topics_changed => Ok(Ended::TopicsChanged),
        // The next life goes on under the lease of this one: nothing is given back.
        Err(stop) if passes(stop.reason) && !options.is_ending() => Err(stop),
        followed => {
            let ended = session.owner.end(followed).await;
            session.finish_copies(report).await;
            ended?;
            Ok(Ended::Asked(Box::new(session.summary(chain.counts, chain.batches))))
        }
    }
}

impl Run<'_, '_> {
    /// Takes up what others ask. What was asked since the last commit shows only when the table is loaded again.
    async fn take_requests(&mut self) -> Result<(), Stop> {
        if self.requests_seen_at.elapsed() >= REQUESTS_INTERVAL {
            self.session.owner.reload().await?;
            self.requests_seen_at = Instant::now();
        }
        requests::take(&mut self.session.owner, self.report).await
    }
}

impl Endless for Run<'_, '_> {
    /// See [`Run::look_around`].
    async fn await_turn(&mut self, heartbeat_ms: i64) -> Result<Turn, Stop> {
        self.session.options.profile.turn_to(Stage::WaitForRecords);
        let turn = self.look_around(heartbeat_ms).await;
        self.session.options.profile.turn_to(Stage::Other);
        turn
    }
}

impl Run<'_, '_> {
    /// Looks at each thing in turn, in turns short enough that a signal is heard.
    async fn look_around(&mut self, heartbeat_ms: i64) -> Result<Turn, Stop> {
        loop {
            if let Some(stop) = self.session.lanes.ends_with.take() {
                return Err(stop);
            }
            if self.is_ending() {
                return Ok(Turn::End);
            }
            if self.session.look(self.report)? == Seen::Others {
                self.topics_changed = true;
                return Ok(Turn::End);
            }
            self.session.pause_unread(self.report).await?;
            self.take_requests().await?;
            self.session.lanes.serve_live();
            if self.session.ahead.is_ready() {
                return Ok(Turn::Microbatch);
            }
            // A backfill does not wait for live, which is looked at first.
            let has_backfills = self.session.lanes.has_backfills(&self.session.owner.record);
            let wait = if has_backfills { Duration::ZERO } else { READ_TURN_MAX };
            let live = self.session.lanes.live_mut();
            match live.await_record(Instant::now() + wait) {
                Ok(live_has_more) => {
                    if live_has_more {
                        self.session.watch.source_answers(self.report);
                    }
                    if self.session.choose_lane(Some(live_has_more), self.report).await? {
                        return Ok(Turn::Microbatch);
                    }
                }
                Err(error) if error.reason() == Reason::SourceAway => {
                    self.session.sit_out(&error, self.report)?;
                }
                Err(error) => return Err(stops::reading(error)),
            }
            if chrono::Utc::now().timestamp_millis() >= heartbeat_ms {
                // A microbatch that gives no table a row takes the place of the heartbeat.
                let trails = self.session.trails();
                return Ok(if trails { Turn::Microbatch } else { Turn::Heartbeat });
            }
        }
    }
}
