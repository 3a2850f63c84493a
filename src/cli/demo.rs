//! `tidemill demo`: the whole program at work, with nothing installed.
//!
//! A broker inside this process, waves of events with known repeats, the job file in the demo's folder, and the very
//! commands that a user would type. A second demo on the same folder meets another cluster, as the ledger sees it: it
//! shows the stop, runs `rebase-offsets`, and drops every repeat of the first. Nothing here knows a way around a rule.

use std::collections::BTreeMap;
use std::env;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::Args;
use indicatif::HumanCount;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::generate::{STRETCH_EVENTS, sending_bar, stop_of};
use super::{plan, run, terminal};
use crate::counts::Counts;
use crate::generate::config::bad_of_each_kind;
use crate::generate::{Broker, Generator, GeneratorConfig, Sender, Topics, demo_job_toml};
use crate::job::file::{self, LoadedJob};
use crate::pipeline::history::{self, History};
use crate::pipeline::report::{Event, Report, Summary};
use crate::pipeline::{self, OffsetCommand, RunOptions};
use crate::stop::{Reason, Stop};

/// Topic partitions of each of the four topics.
const PARTITIONS: u32 = 16;
/// Bad records of each kind in every [`STRETCH_EVENTS`] good ones.
const BAD_OF_EACH_KIND: u64 = 20;
/// Waves at least, so that repeats reach across runs.
const WAVES_MIN: u64 = 4;
/// Phases after which a child is killed, in the order of a run.
const KILL_PHASES: [&str; 10] = [
    "fenced",
    "read",
    "first_data_file_byte",
    "data_files_closed",
    "state_prepared",
    "main_sent",
    "main_landed",
    "sides_sent",
    "sides_landed",
    "published",
];
/// Longest random pause between a phase and the kill.
const KILL_DELAY_MS_MAX: u64 = 40;
/// Pause between two looks at the child's phases.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// `demo`.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// Good records to send, repeats included
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..))]
    events: u64,
    /// Folder for job file, catalog, tables and state; kept, and used again by the next demo
    #[arg(long, default_value = "tidemill-demo", value_name = "DIR")]
    dir: PathBuf,
    /// Seed of the events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Kill the working process this many times on the way
    #[arg(long, default_value_t = 0, value_name = "N")]
    kill: u64,
}

/// What earlier demos wrote into this folder, by seed.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Past {
    distinct: BTreeMap<String, u64>,
    distinct_by_type: BTreeMap<String, BTreeMap<String, u64>>,
}

impl Past {
    fn path(dir: &Path) -> PathBuf {
        dir.join("demo.json")
    }

    fn read(dir: &Path) -> Result<Self, Stop> {
        match std::fs::read_to_string(Self::path(dir)) {
            Ok(text) => serde_json::from_str(&text).map_err(|error| {
                Stop::new(
                    Reason::Usage,
                    format!("{} is not of a demo", Self::path(dir).display()),
                    "name another folder: --dir",
                )
                .because(error)
            }),
            Err(_) => Ok(Self::default()),
        }
    }
}

/// Everything that a demo needs while it runs.
struct Demo<'a> {
    args: &'a DemoArgs,
    json: bool,
    job_path: PathBuf,
    loaded: LoadedJob,
    runtime: tokio::runtime::Runtime,
    batch_before: u64,
    run_time: Duration,
    child_rss_bytes: u64,
    kills: Vec<String>,
}

/// Runs the demo.
pub fn demo(args: &DemoArgs, json: bool) -> Result<(), Stop> {
    let past = Past::read(&args.dir)?;
    let config = config_of(args);
    let topics = config.topics.names();
    let broker = Broker::start().map_err(stop_of)?;
    broker.create_topics(&topics, PARTITIONS).map_err(stop_of)?;
    let dir = prepare_folder(&args.dir)?;
    let job_path = dir.join("job.toml");
    std::fs::write(&job_path, demo_job_toml(broker.bootstrap(), &dir, &topics))
        .map_err(|error| unwritable(&dir, error))?;
    let mut demo = Demo::new(args, json, job_path)?;
    demo.say(&format!("broker {} inside this process, folder {}", broker.bootstrap(), dir.display()));
    demo.meet_new_cluster()?;
    let mut generator = Generator::new(&config).map_err(stop_of)?;
    let sender = Sender::connect(broker.bootstrap(), &BTreeMap::new()).map_err(stop_of)?;
    let mut last = Summary::default();
    for (wave, events) in waves(args, &config).into_iter().enumerate() {
        let bar = sending_bar(events, json);
        let sent = sender.send(generator.wave(events), |sent| bar.set_position(sent)).map_err(stop_of)?;
        bar.finish_and_clear();
        demo.say(&format!("wave {}: sent {} records", wave + 1, HumanCount(sent.records)));
        last = demo.drain(wave)?;
    }
    demo.finish(&generator, past, &dir, &last)
}

fn unwritable(dir: &Path, error: std::io::Error) -> Stop {
    Stop::new(
        Reason::StorageFailed,
        format!("{} can not be written", dir.display()),
        "name another folder: --dir",
    )
    .because(error)
}

fn prepare_folder(dir: &Path) -> Result<PathBuf, Stop> {
    std::fs::create_dir_all(dir).map_err(|error| unwritable(dir, error))?;
    std::fs::canonicalize(dir).map_err(|error| unwritable(dir, error))
}

fn config_of(args: &DemoArgs) -> GeneratorConfig {
    GeneratorConfig {
        seed: args.seed,
        events: STRETCH_EVENTS,
        bad: bad_of_each_kind(BAD_OF_EACH_KIND),
        topics: Topics::PerType("notifications".to_owned()),
        partitions_per_topic: PARTITIONS,
        ..GeneratorConfig::default()
    }
}

/// Sizes of waves: as many as the broker's memory asks for, and at least [`WAVES_MIN`].
fn waves(args: &DemoArgs, config: &GeneratorConfig) -> Vec<u64> {
    let most = Broker::wave_records_max(&config.topics, PARTITIONS) * 9 / 10;
    let count = args.events.div_ceil(most).max(WAVES_MIN);
    (0..count).map(|wave| args.events * (wave + 1) / count - args.events * wave / count).collect()
}

impl<'a> Demo<'a> {
    fn new(args: &'a DemoArgs, json: bool, job_path: PathBuf) -> Result<Self, Stop> {
        // Small microbatches when children are killed, so that a kill costs one of many.
        let sets = match args.kill {
            0 => Vec::new(),
            kills => {
                vec![format!("microbatch.max_records={}", (args.events / (2 * kills + WAVES_MIN)).max(1_000))]
            }
        };
        let loaded = file::read(&job_path, &sets, &|_| None)
            .map_err(|errors| Stop::new(Reason::Unexpected, errors.to_string(), "please report this"))?;
        let runtime = run::runtime()?;
        let batch_before = runtime.block_on(history::read(&loaded))?.map_or(0, |history| history.batch);
        Ok(Self {
            args,
            json,
            job_path,
            loaded,
            runtime,
            batch_before,
            run_time: Duration::ZERO,
            child_rss_bytes: 0,
            kills: Vec::new(),
        })
    }

    fn say(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    fn options(&self) -> RunOptions {
        RunOptions { job_shown: self.job_path.display().to_string(), ..RunOptions::default() }
    }

    /// The second demo on a folder: show the stop of an ordinary run, then do what it says.
    fn meet_new_cluster(&mut self) -> Result<(), Stop> {
        if self.batch_before == 0 {
            return Ok(());
        }
        let options = self.options();
        let mut silent = Silent;
        let run = pipeline::run(&self.loaded, &options, &mut silent);
        let stop = match self.runtime.block_on(run) {
            Err(stop) if matches!(stop.reason, Reason::ClusterChanged | Reason::TopicChanged) => stop,
            Err(stop) => return Err(stop),
            Ok(_) => return Ok(()),
        };
        self.say("this folder has the tables of an earlier demo, and its broker is gone; a run stops:");
        terminal::print_stop(&stop.for_job(&self.job_path.display().to_string()), self.json);
        self.say(&format!("$ tidemill rebase-offsets {} --yes", self.job_path.display()));
        let yes = |_: &str| Ok(());
        let options = self.options();
        let moving = pipeline::move_offsets(&self.loaded, &options, OffsetCommand::Rebase, &yes);
        let jumps = self.runtime.block_on(moving)?.jumps;
        self.say(&format!(
            "moved {} topic partitions to their earliest offsets; what was seen stays seen",
            jumps.len()
        ));
        Ok(())
    }

    /// Reads what was sent: in this process, or in children that are killed.
    fn drain(&mut self, wave: usize) -> Result<Summary, Stop> {
        let begun = Instant::now();
        if self.args.kill > 0 {
            self.kill_children(wave)?;
        }
        let options = self.options();
        let mut lines = Lines { silent: self.json };
        let summary = self.runtime.block_on(pipeline::run(&self.loaded, &options, &mut lines));
        self.run_time += begun.elapsed();
        summary
    }

    /// This wave's share of the kills: children that run the job, each killed after a phase drawn at random.
    fn kill_children(&mut self, wave: usize) -> Result<(), Stop> {
        let due = self.args.kill * (wave as u64 + 1) / WAVES_MIN;
        let mut random = StdRng::seed_from_u64(self.args.seed ^ (wave as u64) << 32);
        while (self.kills.len() as u64) < due.min(self.args.kill) {
            let phase = KILL_PHASES[random.random_range(0..KILL_PHASES.len())];
            let delay = Duration::from_millis(random.random_range(0..=KILL_DELAY_MS_MAX));
            let killed = self.kill_one(phase, delay)?;
            match killed {
                Some(last) => {
                    self.say(&format!(
                        "kill -9 number {}: {delay:?} after {phase}, last phase {last}",
                        self.kills.len() + 1
                    ));
                    self.kills.push(last);
                }
                // The wave is read to its end: no phase to kill in. What is due is made up for in the next wave.
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Starts a child and kills it. `None` if it had nothing left to do.
    fn kill_one(&mut self, phase: &str, delay: Duration) -> Result<Option<String>, Stop> {
        let trace = self.job_path.with_file_name("phases");
        let _ = std::fs::remove_file(&trace);
        let mut child = self.spawn_child(&trace)?;
        let mut reached: Option<Instant> = None;
        loop {
            self.child_rss_bytes = self.child_rss_bytes.max(peak_rss_bytes(child.id()));
            let phases = std::fs::read_to_string(&trace).unwrap_or_default();
            if reached.is_none() && phases.lines().any(|line| line == phase) {
                reached = Some(Instant::now());
            }
            if reached.is_some_and(|reached| reached.elapsed() >= delay) {
                break;
            }
            if let Some(status) = child.try_wait().map_err(|error| child_failed(&error.to_string()))? {
                return match status.code() {
                    Some(0) => Ok(None),
                    _ => Err(child_failed(&errors_of(&mut child))),
                };
            }
            // Between two looks at the phases that the child has written: the condition of the kill.
            std::thread::sleep(LOOK_EVERY);
        }
        let _ = child.kill();
        let status = child.wait().map_err(|error| child_failed(&error.to_string()))?;
        if status.code() == Some(0) {
            return Ok(None);
        }
        let phases = std::fs::read_to_string(&trace).unwrap_or_default();
        Ok(Some(phases.lines().last().unwrap_or("start").to_owned()))
    }

    fn spawn_child(&self, trace: &Path) -> Result<Child, Stop> {
        let program = std::env::current_exe().map_err(|error| child_failed(&error.to_string()))?;
        let records = format!("microbatch.max_records={}", self.loaded.job.microbatch.records_max);
        Command::new(program)
            .args(["run", "--set", &records])
            .arg(&self.job_path)
            .env("TIDEMILL_TRACE_PHASES", trace)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| child_failed(&error.to_string()))
    }

    /// The table of counts beside the truth, and what to look at.
    fn finish(&self, generator: &Generator, past: Past, dir: &Path, last: &Summary) -> Result<(), Stop> {
        let truth = generator.truth();
        let seed = self.args.seed.to_string();
        let seen_before = past.distinct.get(&seed).copied().unwrap_or(0);
        let history = self.runtime.block_on(history::read(&self.loaded))?.unwrap_or_default();
        let counts = history.counts_since(self.batch_before);
        let expected_written = truth.distinct.saturating_sub(seen_before);
        let expected = Counts {
            consumed: truth.records,
            written: expected_written,
            duplicate: truth.events - expected_written,
            dead_letter: truth.bad_total(),
            late: counts.late,
            ..Counts::default()
        };
        let mut distinct = past.distinct;
        distinct.insert(seed.clone(), seen_before.max(truth.distinct));
        let mut by_type = past.distinct_by_type;
        if truth.distinct >= seen_before {
            by_type.insert(seed, truth.distinct_by_type.clone());
        }
        let funnel_truth = by_type.values().flatten().fold(BTreeMap::new(), |mut sums, (name, count)| {
            *sums.entry(name.clone()).or_insert(0) += count;
            sums
        });
        let funnel = self.runtime.block_on(history::count_by(&self.loaded, "event_type"))?;
        let past = Past { distinct, distinct_by_type: by_type };
        let text = serde_json::to_string(&past).expect("counts by name");
        std::fs::write(Past::path(dir), text).map_err(|error| unwritable(dir, error))?;
        let exact = counts == expected && funnel == funnel_truth;
        let found = Found { counts, expected, funnel, funnel_truth, last, history: &history, exact };
        self.print(&found);
        if exact {
            return Ok(());
        }
        Err(Stop::new(
            Reason::Unexpected,
            "the counts are not the generator's truth",
            "please report this, with the seed",
        ))
    }

    fn print(&self, found: &Found<'_>) {
        let seconds = self.run_time.as_secs_f64().max(0.001);
        let rate = found.counts.consumed as f64 / seconds;
        let peak = peak_rss_bytes(std::process::id());
        let metadata = found.history.metadata_location.as_str();
        if self.json {
            terminal::print_json(&serde_json::json!({
                "event": "demo", "consumed": found.counts.consumed, "written": found.counts.written,
                "duplicate": found.counts.duplicate, "late": found.counts.late,
                "dead_letter": found.counts.dead_letter, "filtered": found.counts.filtered,
                "expected_written": found.expected.written, "expected_duplicate": found.expected.duplicate,
                "expected_dead_letter": found.expected.dead_letter, "exact": found.exact,
                "events_per_second": rate, "peak_rss_bytes": peak, "child_peak_rss_bytes": self.child_rss_bytes,
                "state_bytes": found.last.state_bytes, "state_keys": found.last.state_keys,
                "rows": found.funnel.values().sum::<u64>(), "by_type": found.funnel, "kills": self.kills,
                "metadata_location": metadata, "job": self.job_path,
            }));
            return;
        }
        let mut table = plan::table(["", "table", "truth"]);
        for (name, now, truth) in [
            ("consumed", found.counts.consumed, found.expected.consumed),
            ("written", found.counts.written, found.expected.written),
            ("duplicate", found.counts.duplicate, found.expected.duplicate),
            ("dead letters", found.counts.dead_letter, found.expected.dead_letter),
        ] {
            table.add_row([name.to_owned(), HumanCount(now).to_string(), HumanCount(truth).to_string()]);
        }
        for name in ["generated", "sent", "delivered", "clicked"] {
            let count = |counts: &BTreeMap<String, u64>| {
                HumanCount(counts.get(name).copied().unwrap_or(0)).to_string()
            };
            table.add_row([format!("rows {name}"), count(&found.funnel), count(&found.funnel_truth)]);
        }
        println!("\n{table}\n");
        println!(
            "{}",
            if found.exact { "every number is the generator's truth" } else { "NOT the generator's truth" }
        );
        if !self.kills.is_empty() {
            println!("{} kills with kill -9, last phases: {}", self.kills.len(), self.kills.join(", "));
        }
        println!("events per second  {}", HumanCount(rate as u64));
        let with_broker = if self.args.kill > 0 {
            ", broker and generator only"
        } else {
            ", broker and generator included"
        };
        println!("peak memory        {} (this process{with_broker})", ByteSize(peak));
        if self.child_rss_bytes > 0 {
            println!("                   {} (largest child)", ByteSize(self.child_rss_bytes));
        }
        println!(
            "dedup state        {} for {} keys, {:.1} bytes a key",
            ByteSize(found.last.state_bytes),
            HumanCount(found.last.state_keys),
            found.last.state_bytes as f64 / found.last.state_keys.max(1) as f64
        );
        println!("\nlook at the table:");
        println!(
            "  duckdb -c \"INSTALL iceberg; LOAD iceberg; SELECT event_type, count(*), count(DISTINCT event_id) \
             FROM iceberg_scan('{metadata}') GROUP BY ALL\""
        );
        println!(
            "  python -c \"from pyiceberg.table import StaticTable; \
             print(StaticTable.from_metadata('{metadata}').scan().to_arrow().num_rows)\""
        );
        println!(
            "  python -c \"import polars as pl; print(pl.scan_iceberg('{metadata}').group_by('event_type').len().collect())\""
        );
        // As it was called: who tries it out by `cargo run` has no `tidemill` on the path.
        let program = env::args().next().unwrap_or_else(|| "tidemill".to_owned());
        println!(
            "the same again, and nothing is written twice:  {} demo --dir {}",
            super::quoted(&program),
            super::quoted(&self.args.dir.display().to_string())
        );
    }
}

struct Found<'a> {
    counts: Counts,
    expected: Counts,
    funnel: BTreeMap<String, u64>,
    funnel_truth: BTreeMap<String, u64>,
    last: &'a Summary,
    history: &'a History,
    exact: bool,
}

fn child_failed(why: &str) -> Stop {
    Stop::new(Reason::Unexpected, format!("the working process failed: {why}"), "please report this")
}

fn errors_of(child: &mut Child) -> String {
    let Some(errors) = child.stderr.take() else { return String::new() };
    BufReader::new(errors).lines().map_while(Result::ok).collect::<Vec<_>>().join("\n")
}

/// Peak resident size of a process so far, from the kernel; 0 where it says nothing.
fn peak_rss_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib =
        line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|kib| kib.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Nothing is shown.
struct Silent;

impl Report for Silent {
    fn event(&mut self, _event: &Event) {}
}

/// One line a commit.
struct Lines {
    silent: bool,
}

impl Report for Lines {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Commit { batch, counts, .. } if !self.silent => println!(
                "  batch {batch}: consumed {} written {} duplicate {} dead letters {}",
                HumanCount(counts.consumed),
                HumanCount(counts.written),
                HumanCount(counts.duplicate),
                HumanCount(counts.dead_letter + counts.dead_letter_known),
            ),
            Event::Notice { text } if !self.silent => println!("  note: {text}"),
            _ => {}
        }
    }
}
