//! `tidemill state plan`: what a dedup state costs, computed.

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;

use super::super::plan::table;
use super::super::{JobArgs, terminal};
use super::bytes;
use crate::dedup::sizing::{Advice, Device, Sizing, Workload, advise, size};
use crate::dedup::{self, GenerationName};
use crate::job::{self, Repeats};
use crate::pipeline::{self, stops, survey};
use crate::stop::Stop;

/// Numbers of keys that are shown unless some are named.
const KEYS_SHOWN: [f64; 4] = [1e8, 1e9, 1e10, 1e11];
/// Share of events that repeat a recent key, and any key, unless they are named: the load of the measurements.
const NEAR_SHARE_DEFAULT: f64 = 0.04;
const FAR_SHARE_DEFAULT: f64 = 0.02;
/// A day of keys that took 20 TB of executor memory in a streaming engine that holds keys as objects.
const LARGE_DAY_KEYS: f64 = 1e11;
const DAY: Duration = Duration::from_secs(86_400);

/// `state plan`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlanArgs {
    /// Job file: its window, repeats, batch and memory share are taken, and its state is shown beside the plan
    #[arg(value_name = "JOB")]
    job: Option<PathBuf>,
    /// Set a field of the job
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "job")]
    sets: Vec<String>,
    /// Live keys: `1e11`, or several: `1e8,1e9`
    #[arg(long, value_delimiter = ',', value_parser = count)]
    keys: Vec<f64>,
    /// How long a key is remembered: `7d`
    #[arg(long, value_parser = humantime::parse_duration)]
    window: Option<Duration>,
    /// Events per second that must be kept up with: `1e6`, `1e6/s`
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// The dedup share of the memory: `1GiB`
    #[arg(long, value_parser = size_of)]
    memory: Option<f64>,
    /// nvme (300 k reads/s, 3 GB/s), ssd (60 k, 0.95 GB/s), network (10 k, 0.6 GB/s), or READS,BYTES: `80000,1.2GB/s`
    #[arg(long, default_value = "ssd", value_parser = device)]
    device: Device,
    /// `any_time` or `same_time`; both are shown unless one is named
    #[arg(long, value_parser = repeats)]
    repeats: Option<Repeats>,
    /// Events of one probe batch
    #[arg(long, value_parser = count)]
    batch: Option<f64>,
    /// Share of events that repeat a recent key
    #[arg(long, value_parser = share, default_value_t = NEAR_SHARE_DEFAULT)]
    near: f64,
    /// Share of events that repeat a key of any age
    #[arg(long, value_parser = share, default_value_t = FAR_SHARE_DEFAULT)]
    far: f64,
}

impl PlanArgs {
    /// The job that is named, if one is.
    pub(crate) fn job(&self) -> Option<JobArgs> {
        self.job.clone().map(|job| JobArgs { job, sets: self.sets.clone() })
    }
}

/// What is printed.
#[derive(Debug, Serialize)]
struct StatePlan {
    event: &'static str,
    memory_bytes: f64,
    device: Device,
    rows: Vec<Row>,
    large_day: LargeDay,
    actual: Option<Actual>,
}

#[derive(Debug, Serialize)]
struct Row {
    workload: Workload,
    sizing: Sizing,
    /// For the rate asked for, `any_time` and `same_time`.
    advice: Option<[Advice; 2]>,
}

/// The case that a streaming engine needs 20 TB of memory for.
#[derive(Debug, Serialize)]
struct LargeDay {
    keys: f64,
    events_per_second_needed: f64,
    sizing: Sizing,
    advice: [Advice; 2],
}

/// The state that a job has now.
#[derive(Debug, Serialize)]
struct Actual {
    generation: GenerationName,
    keys: u64,
    segment_bytes: u64,
    bytes_per_key: f64,
    computed: Sizing,
    /// How a batch would go through it now; `None` if a file of it is missing or damaged, as `unreadable` says.
    access: Option<dedup::AccessPlan>,
    unreadable: Option<String>,
}

/// Computes and prints.
pub fn plan(args: &PlanArgs, json: bool) -> Result<(), Stop> {
    let plan = build(args)?;
    if json {
        terminal::print_json(&plan);
    } else {
        print(&plan, args.rate);
    }
    Ok(())
}

fn build(args: &PlanArgs) -> Result<StatePlan, Stop> {
    let loaded = args.job().map(|job| job.load()).transpose()?;
    let shares_of_job = loaded.as_ref().map(pipeline::plan_memory).transpose()?;
    let memory_of_job = shares_of_job.as_ref().map(|shares| shares.dedup_lookup_bytes() as f64);
    let memory_bytes = args.memory.or(memory_of_job).unwrap_or(job::MEMORY_BYTES_DEFAULT as f64);
    // What is looked up together is bounded by the memory of keys, not only by the microbatch.
    let batch_of_job = loaded.as_ref().zip(shares_of_job).map(|(loaded, shares)| {
        let said = loaded.job.dedup.probe_records_max.map_or(u64::MAX, std::num::NonZeroU64::get);
        loaded.job.microbatch.records_max.min(said).min(shares.gathered_keys_max(0)) as f64
    });
    let job = loaded.as_ref().map(|loaded| &loaded.job);
    let base = Workload {
        keys: KEYS_SHOWN[0],
        window: args.window.or(job.map(|job| job.dedup.window)).unwrap_or(job::WINDOW_DEFAULT),
        batch_events: args.batch.or(batch_of_job).unwrap_or(job::RECORDS_MAX_DEFAULT as f64),
        repeats: Repeats::AnyTime,
        near_share: args.near,
        far_share: args.far,
        memory_bytes,
        device: args.device,
    };
    let repeats_shown = match args.repeats.or(job.map(|job| job.dedup.repeats)) {
        Some(repeats) => vec![repeats],
        None => vec![Repeats::AnyTime, Repeats::SameTime],
    };
    let keys_shown = if args.keys.is_empty() { KEYS_SHOWN.to_vec() } else { args.keys.clone() };
    let mut rows = Vec::new();
    for keys in keys_shown {
        for repeats in &repeats_shown {
            let workload = Workload { keys, repeats: *repeats, ..base };
            let advice = args.rate.map(|rate| advise(&workload, rate));
            rows.push(Row { workload, sizing: size(&workload), advice });
        }
    }
    let actual = match job {
        Some(job) => actual(job, &base)?,
        None => None,
    };
    Ok(StatePlan {
        event: "state_plan",
        memory_bytes,
        device: args.device,
        rows,
        large_day: large_day(&base),
        actual,
    })
}

fn large_day(base: &Workload) -> LargeDay {
    let workload = Workload { keys: LARGE_DAY_KEYS, window: DAY, repeats: Repeats::SameTime, ..*base };
    let new_share = 1.0 - base.near_share - base.far_share;
    let events_per_second_needed = LARGE_DAY_KEYS / DAY.as_secs_f64() / new_share.max(0.01);
    LargeDay {
        keys: LARGE_DAY_KEYS,
        events_per_second_needed,
        sizing: size(&workload),
        advice: advise(&workload, events_per_second_needed),
    }
}

/// The newest generation of a job's state folder, and what is computed for as many keys.
fn actual(job: &job::Job, base: &Workload) -> Result<Option<Actual>, Stop> {
    let folder = survey::state_folder(job);
    let generations = dedup::list_generations(&folder, None).map_err(|error| stops::state(&folder, error))?;
    let Some(newest) = generations.last().filter(|newest| newest.keys > 0) else { return Ok(None) };
    let workload = Workload { keys: newest.keys as f64, repeats: job.dedup.repeats, ..*base };
    let (memory_bytes, probes) = (base.memory_bytes as u64, base.batch_events as u64);
    let planned = dedup::access_plan(&folder, &newest.reference, memory_bytes, probes);
    let (access, unreadable) = match planned {
        Ok(access) => (Some(access), None),
        // A run in progress may let a file go meanwhile; what a damaged one means, verify says.
        Err(error) if error.is_rebuildable() => (None, Some(error.to_string())),
        Err(error) => return Err(stops::state(&folder, error)),
    };
    Ok(Some(Actual {
        generation: newest.reference.name,
        keys: newest.keys,
        segment_bytes: newest.segment_bytes,
        bytes_per_key: newest.segment_bytes as f64 / newest.keys as f64,
        computed: size(&workload),
        access,
        unreadable,
    }))
}

fn print(plan: &StatePlan, rate: Option<f64>) {
    let device = plan.device;
    say!(
        "computed, not measured: {} for dedup, {:.0} k reads/s, {}/s; batches of {} events, window {}\n",
        bytes(plan.memory_bytes),
        device.reads_per_second / 1e3,
        bytes(device.bytes_per_second),
        short(plan.rows[0].workload.batch_events),
        humantime::format_duration(plan.rows[0].workload.window),
    );
    let mut rows = table([
        "keys",
        "repeats",
        "disk",
        "at most",
        "memory: least",
        "best",
        "events/s",
        "with merges",
        "s/batch",
        "written/key",
        "rebuild",
        "open",
    ]);
    for Row { workload, sizing, .. } in &plan.rows {
        rows.add_row([
            short(workload.keys),
            name(workload.repeats).to_owned(),
            bytes(sizing.disk_live_bytes),
            bytes(sizing.disk_peak_bytes),
            bytes(sizing.memory_floor_bytes),
            bytes(sizing.memory_useful_bytes),
            short(sizing.events_per_second),
            short(sizing.events_per_second_sustained),
            format!("{:.2}", sizing.lookup.seconds),
            format!("{:.0} B", sizing.writes_per_key * sizing.bytes_per_key),
            seconds(sizing.rebuild_seconds),
            seconds(sizing.open_seconds),
        ]);
    }
    say!("{rows}\n");
    if let Some(rate) = rate {
        let mut told = None;
        for Row { workload, advice, .. } in &plan.rows {
            if let Some(advice) = advice
                && told != Some(workload.keys)
            {
                told = Some(workload.keys);
                say!("{} keys at {} events/s:\n{}", short(workload.keys), short(rate), advised(advice));
            }
        }
        say!();
    }
    let day = &plan.large_day;
    say!(
        "A day of {} keys, which took 20 TB of executor memory: {} of disk ({} at most), {} of memory at least.\n\
         {} events/s must be kept up with:\n{}",
        short(day.keys),
        bytes(day.sizing.disk_live_bytes),
        bytes(day.sizing.disk_peak_bytes),
        bytes(day.sizing.memory_floor_bytes),
        short(day.events_per_second_needed),
        advised(&day.advice),
    );
    if let Some(actual) = &plan.actual {
        print_actual(actual);
    }
}

/// The state that the job has, beside what is computed for it.
fn print_actual(actual: &Actual) {
    say!(
        "\nThe state now: {}\n{} keys in {}, {:.2} bytes each; computed {}, {:.2} each",
        actual.generation,
        actual.keys,
        bytes(actual.segment_bytes as f64),
        actual.bytes_per_key,
        bytes(actual.computed.disk_live_bytes),
        actual.computed.bytes_per_key,
    );
    if let Some(access) = &actual.access {
        print_access(access);
    }
    if let Some(unreadable) = &actual.unreadable {
        say!("The way of a batch through it is not shown: {unreadable}");
    }
}

/// One line per section: which way a batch goes through it, and what that costs.
fn print_access(access: &dedup::AccessPlan) {
    let mut rows = table(["bucket", "tier", "keys", "probes", "filter", "in memory", "way", "seconds"]);
    for section in &access.sections {
        let way = match section.access {
            dedup::Access::Filter => "filter in memory, pages of positives",
            dedup::Access::Stream => "filter streamed, pages of positives",
            dedup::Access::Pages => "straight to the pages",
        };
        rows.add_row([
            section.bucket_from.to_string(),
            section.tier.to_string(),
            short(section.keys as f64),
            short(section.probes as f64),
            bytes(section.filter_bytes as f64),
            bytes(section.filter_bytes_held as f64),
            way.to_owned(),
            format!("{:.4}", section.seconds),
        ]);
    }
    say!(
        "A batch goes through it in {:.2} s if nothing overlaps, at {:.0} k reads/s and {}/s ({}):\n{rows}",
        access.seconds,
        access.reads_per_second / 1e3,
        bytes(access.bytes_per_second),
        if access.is_measured { "measured now" } else { "not measured: the state is small" },
    );
}

/// What each mode comes to, and which to take.
fn advised(advice: &[Advice; 2]) -> String {
    let line = |advice: &Advice| {
        format!(
            "  {:9}  {} events/s in batches of {}: {}",
            name(advice.repeats),
            short(advice.events_per_second),
            short(advice.batch_events),
            if advice.holds_rate { "enough" } else { "not enough" },
        )
    };
    let [any_time, same_time] = advice;
    let verdict = match (any_time.holds_rate, same_time.holds_rate) {
        (true, _) => "any_time will do: it asks no promise of the producer",
        (false, true) => "repeats = \"same_time\", if a resend carries the event time of its first copy",
        (false, false) => "more memory, a faster disk, or more machines",
    };
    format!("{}\n{}\n  -> {verdict}", line(any_time), line(same_time))
}

fn name(repeats: Repeats) -> &'static str {
    match repeats {
        Repeats::AnyTime => "any_time",
        Repeats::SameTime => "same_time",
    }
}

/// A count in three digits: `940 k`, `1.16 M`, `100 G`.
fn short(count: f64) -> String {
    for (unit, symbol) in [(1e9, " G"), (1e6, " M"), (1e3, " k")] {
        if count >= unit {
            let scaled = count / unit;
            let digits = if scaled >= 100.0 || scaled.fract() == 0.0 {
                0
            } else if scaled >= 10.0 {
                1
            } else {
                2
            };
            return format!("{scaled:.digits$}{symbol}");
        }
    }
    format!("{count:.0}")
}

fn seconds(count: f64) -> String {
    if count < 10.0 {
        return format!("{count:.1}s");
    }
    let text = humantime::format_duration(Duration::from_secs(count as u64)).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn count(text: &str) -> Result<f64, String> {
    match text.replace('_', "").parse::<f64>() {
        Ok(count) if (1.0..=1e15).contains(&count) => Ok(count),
        _ => Err("a number from 1 to 1e15, such as 1e9 or 4_000_000".to_owned()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    count(text.trim_end_matches("/s"))
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=0.5).contains(&share) => Ok(share),
        _ => Err("a share from 0 to 0.5".to_owned()),
    }
}

fn size_of(text: &str) -> Result<f64, String> {
    let size: ByteSize = text.parse().map_err(|_| "a size, such as 512MiB or 1GiB".to_owned())?;
    if size.as_u64() == 0 { Err("at least 1 B".to_owned()) } else { Ok(size.as_u64() as f64) }
}

fn repeats(text: &str) -> Result<Repeats, String> {
    match text {
        "any_time" => Ok(Repeats::AnyTime),
        "same_time" => Ok(Repeats::SameTime),
        _ => Err("any_time or same_time".to_owned()),
    }
}

fn device(text: &str) -> Result<Device, String> {
    match text {
        "nvme" => Ok(Device::NVME),
        "ssd" => Ok(Device::SSD),
        "network" => Ok(Device::NETWORK),
        own => {
            let (reads, bytes) =
                own.split_once(',').ok_or("nvme, ssd, network, or READS,BYTES such as 80000,1.2GB/s")?;
            Ok(Device {
                reads_per_second: rate(reads)?,
                bytes_per_second: size_of(bytes.trim_end_matches("/s"))?,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_people_write_them() {
        assert_eq!(count("1e11"), Ok(1e11));
        assert_eq!(count("4_000_000"), Ok(4e6));
        assert_eq!(rate("1e6/s"), Ok(1e6));
        assert_eq!(size_of("1GiB"), Ok((1u64 << 30) as f64));
        assert_eq!(device("nvme"), Ok(Device::NVME));
        let own = device("80000,1.2GB/s").unwrap();
        assert_eq!((own.reads_per_second, own.bytes_per_second), (80e3, 1.2e9));
        for bad in ["", "0", "-1", "NaN", "inf", "1e16", "many"] {
            assert!(count(bad).is_err(), "{bad}");
        }
        assert!(device("tape").is_err() && device("1,").is_err() && share("0.6").is_err());
    }

    #[test]
    fn counts_and_times_are_short() {
        let counts = [999.0, 1e3, 940e3, 1.157e6, 4e6, 12.34e6, 1e11].map(short);
        assert_eq!(counts, ["999", "1 k", "940 k", "1.16 M", "4 M", "12.3 M", "100 G"]);
        assert_eq!(
            (seconds(0.24), seconds(90.0), seconds(90_061.0)),
            ("0.2s".into(), "1m 30s".into(), "1day 1h".into())
        );
    }

    #[test]
    fn a_plan_without_a_job_shows_both_modes_for_every_number_of_keys() {
        let args = PlanArgs {
            job: None,
            sets: Vec::new(),
            keys: Vec::new(),
            window: None,
            rate: Some(1e6),
            memory: None,
            device: Device::NVME,
            repeats: None,
            batch: None,
            near: NEAR_SHARE_DEFAULT,
            far: FAR_SHARE_DEFAULT,
        };
        let plan = build(&args).unwrap();
        assert_eq!(plan.rows.len(), 2 * KEYS_SHOWN.len());
        assert!(plan.rows.iter().all(|row| row.advice.is_some()));
        assert!(plan.actual.is_none());
        let day = plan.large_day;
        assert!(day.sizing.disk_peak_bytes < 2.5e12, "20 TB of memory become less than 2.5 TB of disk");
        assert!(day.sizing.memory_floor_bytes < 2e9, "{day:?}");
    }
}
