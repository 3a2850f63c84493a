//! The only loop: read, decode, judge time, drop repeats, write, commit. Knows every stage; no stage knows it.
//!
//! A drain freezes the end offsets, then takes microbatches until it has reached them:
//! ```text
//! survey -> start table -> lease -> tails -> fence -> side tables -> state -> { microbatch }* -> release
//! ```
//! The first five change nothing but the local lock file; the fence is the first commit. A stop before it says truthfully
//! that nothing was written.
//!
//! Invariants
//! 1. A batch's rows come from exactly `[start, end)` of each topic partition, where start is the ledger's end (R5).
//! 2. Every refusing stage stands before dedup (R1): what is probed is written, in the same batch.
//! 3. Counts are conserved before a commit is sent: [`Counts::conserved`].
//! 4. Main n+1 is not sent before the side tables have n (R10).

pub mod history;
mod keys;
mod microbatch;
mod owner;
mod rebuild;
pub mod report;
mod session;
pub mod start;
pub mod stops;
pub mod survey;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use report::{Event, Phases, Report, Summary};
use session::Session;

pub use owner::{OffsetCommand, describe as describe_jump, move_offsets};

use crate::counts::Counts;
use crate::job::file::LoadedJob;
use crate::memory::MemoryPlan;
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
    /// End after this many microbatches.
    pub batches_max: Option<u64>,
    /// Phase trace for tests.
    pub phases: Phases,
    /// Set by a signal: the open batch is dropped, the lease released.
    pub interrupt: Arc<AtomicBool>,
}

impl RunOptions {
    fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
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
    let (largest, most) = (loaded.job.source.record_bytes_max, plan.probe_payload_bytes_max());
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
    Ok(plan)
}

/// Drains a job's topics to the end offsets frozen now.
///
/// # Errors
/// A [`Stop`] that names the reason and the way out. Batches committed before it stay committed.
pub async fn run(loaded: &LoadedJob, options: &RunOptions, report: &mut dyn Report) -> Result<Summary, Stop> {
    let begun = Instant::now();
    options.phases.reach("start");
    let mut session = match Session::open(loaded, options, report).await? {
        session::Opened::NothingToRead(summary) => {
            report.event(&Event::Done((*summary).clone()));
            return Ok(*summary);
        }
        session::Opened::Session(session) => session,
    };
    let drained = drain(&mut session, options, report).await;
    let result = match drained {
        Ok((counts, batches)) => {
            session.owner.release().await?;
            Ok(Summary { seconds: begun.elapsed().as_secs_f64(), ..session.summary(counts, batches) })
        }
        Err(stop) => {
            session.owner.release_after(&stop).await;
            Err(stop)
        }
    };
    options.phases.reach("released");
    let summary = result?;
    report.event(&Event::Done(summary.clone()));
    Ok(summary)
}

async fn drain(
    session: &mut Session<'_>,
    options: &RunOptions,
    report: &mut dyn Report,
) -> Result<(Counts, u64), Stop> {
    let (mut total, mut batches) = (Counts::default(), 0);
    while session.has_more() && options.batches_max.is_none_or(|most| batches < most) {
        let batch = session.microbatch(total.consumed, report).await?;
        total.add(&batch.counts);
        batches += 1;
        report.event(&batch.event());
    }
    Ok((total, batches))
}

/// What a run would do now, in a sentence; or the stop that it would end with.
///
/// # Errors
/// The [`Stop`] of the start table.
pub fn describe_start(loaded: &LoadedJob, survey: &survey::Survey, job_shown: &str) -> Result<String, Stop> {
    let options = RunOptions { job_shown: job_shown.to_owned(), ..RunOptions::default() };
    survey.refuse_other_schema(&loaded.job)?;
    let record = owner::judge(survey, &loaded.job, &options, start::Allow::default())?;
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
