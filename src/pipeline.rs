//! The only loop: read, decode, judge time, drop repeats, write, commit. Knows every stage; no stage knows it.
//!
//! A drain freezes the end offsets, then takes microbatches until it has reached them:
//! ```text
//! survey -> start table -> lease -> tails -> fence -> side tables -> state -> { microbatch }* -> release
//! ```
//! A continuous run has no end offsets, and begins again where something was away (`continuous`).
//!
//! The first five change nothing but the local lock file; the fence is the first commit. A stop before it says truthfully
//! that nothing was written.
//!
//! Invariants
//! 1. A batch's rows come from exactly `[start, end)` of each topic partition, where start is the ledger's end (R5).
//! 2. Every refusing stage stands before dedup (R1): what is probed is written, in the same batch.
//! 3. Counts are conserved before a commit is sent: `Counts::conserved`.
//! 4. Main n+1 is not sent before the side tables have n (R10).

mod ahead;
pub mod backfill;
pub mod commands;
mod continuous;
mod copies;
mod gather;
pub mod history;
mod keys;
mod lanes;
mod late;
pub mod maintain;
mod microbatch;
mod owner;
pub mod profile;
mod rebuild;
pub mod report;
pub mod requests;
pub mod requeue;
mod session;
pub mod sides;
mod state;
pub mod stops;
pub mod survey;
mod trouble;
mod watch;
pub(crate) mod world;
mod writing;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use microbatch::Run;
use profile::{Profile, Stage};
use report::{Event, Phases, Report, Summary};
use session::Session;

pub use crate::protocol::start;
pub use owner::{Moved, OffsetCommand, describe as describe_jump, move_offsets};

use crate::commit::request::NewLane;
use crate::counts::Counts;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
use crate::protocol;
use crate::stop::{Reason, Stop};

/// What one run is asked beyond its job.
#[derive(Debug, Default)]
pub struct RunOptions {
    /// Job file as the user named it, for commands in messages.
    pub job_shown: String,
    /// Take the table over from another owner.
    pub takeover: bool,
    /// Start on a table with rows and no ledger.
    pub ignore_rows: bool,
    /// Go on from the ledger's property although no snapshot and no row confirms it.
    pub trust_ledger: bool,
    /// Go on when everything is read, until asked to end.
    pub continuous: bool,
    /// End after this many microbatches.
    pub batches_max: Option<u64>,
    /// End then: the open microbatch is closed and committed.
    pub end_by: Option<Instant>,
    /// How long this owner may be silent before others call it dead; `None` = as the job's microbatches ask.
    pub lease: Option<Duration>,
    /// How long a topic partition may give nothing before that is a fault; `None` = a minute.
    pub stall_after: Option<Duration>,
    /// Phase trace for tests.
    pub phases: Phases,
    /// Where the time goes.
    pub profile: Arc<Profile>,
    /// The backfill that this run is begun for; it goes on until that is done.
    pub backfill: Option<Wish>,
    /// Set by a signal: the open microbatch is closed and committed, the lease released.
    pub interrupt: Arc<AtomicBool>,
}

/// The backfill that a run is begun for.
#[derive(Debug, Clone, PartialEq)]
pub struct Wish {
    /// Name of its lane.
    pub lane: String,
    /// What it is to read, if the ledger does not know it yet.
    pub register: Option<NewLane>,
}

impl RunOptions {
    fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    /// Whether no record is to be read any more.
    fn is_ending(&self) -> bool {
        self.interrupted() || self.end_by.is_some_and(|end_by| Instant::now() >= end_by)
    }
}

/// The memory split of a job.
///
/// # Errors
/// `USAGE` below the minimum, or where the largest record does not fit.
pub fn plan_memory(loaded: &LoadedJob) -> Result<MemoryPlan, Stop> {
    let plan = MemoryPlan::divide(loaded.job.memory_bytes).map_err(|error| {
        Stop::new(
            Reason::Usage,
            error.to_string(),
            "set memory in the job file, or: --set memory=\"256 MiB\"",
        )
    })?;
    let (largest, most) = (loaded.job.source.record_bytes_max, plan.chunk_payload_bytes_max());
    if largest > most {
        let (largest, most) = (bytesize::ByteSize(largest), bytesize::ByteSize(most));
        return Err(Stop::new(
            Reason::Usage,
            format!(
                "decode.max_record = {largest} does not fit into memory = {}",
                bytesize::ByteSize(plan.total)
            ),
            format!(
                "a record may take {most} of it: raise memory, or lower max_record, then:\n  tidemill check JOB"
            ),
        ));
    }
    Ok(plan.for_microbatches_of(loaded.job.microbatch.records_max))
}

/// Drains a job's topics to the end offsets frozen now, or follows them until asked to end.
///
/// # Errors
/// A [`Stop`] that names the reason and the way out. Batches committed before it stay committed.
pub async fn run(loaded: &LoadedJob, options: &RunOptions, report: &mut dyn Report) -> Result<Summary, Stop> {
    options.phases.reach("start");
    if options.continuous {
        continuous::run(loaded, options, report).await
    } else {
        drain(loaded, options, report).await
    }
}

async fn drain(loaded: &LoadedJob, options: &RunOptions, report: &mut dyn Report) -> Result<Summary, Stop> {
    let begun = Instant::now();
    let mut session = match Session::open(loaded, options, report).await? {
        session::Opened::NothingToRead(summary) => {
            report.event(&Event::Done((*summary).clone()));
            return Ok(*summary);
        }
        session::Opened::Session(session) => session,
    };
    options.profile.turn_to(Stage::Other);
    if let Err(stop) = session.begin_backfill(report).await {
        session.owner.release_after(&stop).await;
        return Err(stop);
    }
    let mut run = Run::new(&mut session, report, Counts::default(), 0);
    let drained = protocol::drain(&mut run).await;
    options.profile.turn_to(Stage::End);
    let (counts, batches) = (run.counts, run.batches);
    let was_cut_short = options.interrupted() && session.has_more();
    let drained = if was_cut_short { drained.and(Err(stops::interrupted())) } else { drained };
    let ended = session.owner.end(drained).await;
    session.finish_copies(report).await;
    options.profile.note_threads();
    ended?;
    let summary = Summary { seconds: begun.elapsed().as_secs_f64(), ..session.summary(counts, batches) };
    report.event(&Event::Done(summary.clone()));
    Ok(summary)
}

/// What a run would do now, in a sentence; or the stop that it would end with.
///
/// # Errors
/// The [`Stop`] of the start table.
pub fn describe_start(loaded: &LoadedJob, survey: &survey::Survey, job_shown: &str) -> Result<String, Stop> {
    let options = RunOptions { job_shown: job_shown.to_owned(), ..RunOptions::default() };
    survey.refuse_other_schema(&loaded.job)?;
    let replay = loaded.job.sink.replays();
    let allow = start::Allow { replay, ..start::Allow::default() };
    let record = owner::judge(survey, &loaded.job, &options, allow)?;
    Ok(match record {
        None => "a run would be the first: it records the start offsets, then reads".to_owned(),
        Some(record) => {
            let goes_on = format!("a run would go on from batch {}", record.batch);
            match rebuild::widened(&record, &loaded.job) {
                Some((since, before)) => format!(
                    "{goes_on}; its window was widened: it would first read the keys from {since} to {before} from the table"
                ),
                None => goes_on,
            }
        }
    })
}
