//! `tidemill cadence`: what hourly, 5-minute and 10-second microbatches of a job cost. Arithmetic alone.

use std::time::Duration;

use serde::Serialize;

use super::{CadenceArgs, plan, terminal};
use crate::dedup::PENDING_KEY_BYTES;
use crate::job::{Job, MAINTENANCE_COMMITS_DEFAULT};
use crate::memory::MemoryPlan;
use crate::pipeline;
use crate::stop::Stop;

/// Intervals that are shown beside the job's own.
const SHOWN: [Duration; 3] = [Duration::from_secs(3_600), Duration::from_secs(300), Duration::from_secs(10)];
/// Below it a job is told that its tables will have many small files.
const SMALL_FILES_BELOW: Duration = Duration::from_secs(60);
/// Below it tidemill is the wrong tool: the round trips of one commit take as long.
const WRONG_TOOL_BELOW: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Events a second of the table where nobody says how many there are.
pub const RATE_ASSUMED: u64 = 1_000;

/// What microbatches of one length cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cost {
    /// Length of a microbatch, in seconds: the bound that it closes at.
    pub interval_seconds: f64,
    /// Whether it is the job's own.
    pub is_the_jobs: bool,
    /// Commits of the main table in a day without rest.
    pub commits_per_day: u64,
    /// Data files in a day, at least: one for each commit and value of the partition fields.
    pub files_per_day_min: u64,
    /// Records of a microbatch.
    pub records: u64,
    /// What closes a microbatch.
    pub closed_by: &'static str,
    /// Memory of the keys of an open microbatch, at most all of them new.
    pub key_bytes: u64,
    /// Records that are read again after a kill, at most. None of them is written twice.
    pub records_read_again_max: u64,
}

/// What a job's cadence costs at a rate, and what should be known of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cadence {
    /// Records a second that the figures are for.
    pub rate: u64,
    /// Where the rate comes from.
    pub rate_from: &'static str,
    /// Longest to shortest.
    pub costs: Vec<Cost>,
    /// Sentences.
    pub warnings: Vec<String>,
}

/// Computes.
pub fn of(job: &Job, memory: &MemoryPlan, rate: u64, rate_from: &'static str) -> Cadence {
    let own = job.microbatch.open_time_max;
    let mut intervals: Vec<Duration> =
        SHOWN.iter().copied().filter(|shown| *shown != own).chain([own]).collect();
    intervals.sort_unstable_by_key(|interval| std::cmp::Reverse(*interval));
    let costs = intervals.into_iter().map(|interval| cost(job, memory, rate, interval)).collect();
    Cadence { rate, rate_from, costs, warnings: warnings(job) }
}

/// What a microbatch of this length costs; it closes earlier where another bound of the job or its memory is reached.
fn cost(job: &Job, memory: &MemoryPlan, rate: u64, interval: Duration) -> Cost {
    let keys_max = memory.pending_bytes_max() / PENDING_KEY_BYTES;
    let by_time = (rate as f64 * interval.as_secs_f64()).ceil() as u64;
    let (records, closed_by) = [
        (by_time, "time"),
        (job.microbatch.records_max, "max_records"),
        (keys_max, "memory, if all keys are new"),
    ]
    .into_iter()
    .min_by_key(|(records, _)| *records)
    .expect("three bounds");
    let seconds =
        if closed_by == "time" { interval.as_secs_f64() } else { records as f64 / rate.max(1) as f64 };
    let commits = (DAY.as_secs_f64() / seconds.max(0.001)).ceil() as u64;
    Cost {
        interval_seconds: seconds,
        is_the_jobs: interval == job.microbatch.open_time_max,
        commits_per_day: commits,
        files_per_day_min: commits,
        records,
        closed_by,
        key_bytes: records.saturating_mul(PENDING_KEY_BYTES),
        records_read_again_max: records,
    }
}

fn warnings(job: &Job) -> Vec<String> {
    let own = job.microbatch.open_time_max;
    let shown = humantime::format_duration(own);
    let mut warnings = Vec::new();
    if own < WRONG_TOOL_BELOW {
        warnings.push(format!(
            "max_interval = {shown}: a commit takes several round trips of the catalog, often longer than that. For sub-second \
             results read the topic itself, or use a stream processor; tidemill is not made for it"
        ));
    }
    if own < SMALL_FILES_BELOW {
        warnings.push(format!(
            "max_interval = {shown} makes {} commits and as many small files a day, or more; tidemill does not compact data \
             files: let your engine do it (rewrite_data_files), or choose longer batches",
            (DAY.as_secs_f64() / own.as_secs_f64()).ceil() as u64
        ));
    }
    let every = job.sink.maintenance.every_commits;
    if every == 0 {
        warnings.push(format!(
            "maintenance.every_commits = 0: snapshots are never let go, and every commit writes all of them again; the \
             default is {MAINTENANCE_COMMITS_DEFAULT}"
        ));
    }
    warnings
}

/// The table and the warnings, for people.
pub fn print(cadence: &Cadence) {
    println!("cadence at {} records/s ({}):", cadence.rate, cadence.rate_from);
    let mut rows = plan::table([
        "a batch every",
        "closed by",
        "commits/day",
        "files/day at least",
        "records",
        "keys in memory",
    ]);
    for cost in &cadence.costs {
        let interval =
            humantime::format_duration(Duration::from_millis((cost.interval_seconds * 1e3) as u64));
        rows.add_row([
            format!("{interval}{}", if cost.is_the_jobs { " (this job)" } else { "" }),
            cost.closed_by.to_owned(),
            cost.commits_per_day.to_string(),
            cost.files_per_day_min.to_string(),
            cost.records.to_string(),
            bytesize::ByteSize(cost.key_bytes).to_string(),
        ]);
    }
    println!("{rows}");
    for warning in &cadence.warnings {
        println!("warning: {warning}");
    }
}

/// Prints what a job's cadence costs; opens no socket.
pub fn cadence(args: &CadenceArgs, json: bool) -> Result<(), Stop> {
    let loaded = args.job.load()?;
    let memory = pipeline::plan_memory(&loaded)?;
    let (rate, rate_from) =
        args.rate.map_or((RATE_ASSUMED, "assumed; --rate says otherwise"), |rate| (rate, "--rate"));
    let cadence = of(&loaded.job, &memory, rate, rate_from);
    if json {
        terminal::print_json(&serde_json::json!({ "event": "cadence", "cadence": cadence }));
    } else {
        print(&cadence);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::testing;

    fn plan() -> MemoryPlan {
        MemoryPlan::divide(1 << 30).unwrap()
    }

    fn job(interval: Duration, records_max: u64) -> Job {
        let mut job = testing::job(std::path::Path::new("unused"));
        (job.microbatch.open_time_max, job.microbatch.records_max) = (interval, records_max);
        job
    }

    #[test]
    fn a_slow_topic_commits_once_per_interval_and_a_fast_one_closes_at_its_records() {
        let job = job(Duration::from_secs(60), 100_000);
        let cadence = of(&job, &plan(), 100, "test");
        let own = cadence.costs.iter().find(|cost| cost.is_the_jobs).unwrap();
        assert_eq!((own.commits_per_day, own.records, own.closed_by), (1_440, 6_000, "time"));
        assert_eq!(cadence.costs.len(), 4);

        let fast = of(&job, &plan(), 50_000, "test");
        let hourly = &fast.costs[0];
        assert_eq!((hourly.records, hourly.closed_by), (100_000, "max_records"));
        assert_eq!(hourly.commits_per_day, 43_200, "every two seconds, whatever the interval says");
    }

    #[test]
    fn memory_closes_a_batch_whose_keys_fill_half_of_the_dedup_share() {
        let plan = plan();
        let hourly = &of(&job(Duration::from_secs(3_600), u64::MAX), &plan, 1_000_000, "test").costs[0];
        assert!(hourly.closed_by.starts_with("memory"), "{hourly:?}");
        assert!(hourly.key_bytes <= plan.pending_bytes_max());
    }

    #[test]
    fn short_intervals_are_warned_of_and_sub_second_ones_are_sent_elsewhere() {
        let warned = |millis| warnings(&job(Duration::from_millis(millis), 1)).join("\n");
        assert_eq!(warned(300_000), "");
        assert!(warned(10_000).contains("8640 commits"), "{}", warned(10_000));
        assert!(warned(500).contains("not made for it"), "{}", warned(500));
    }
}
