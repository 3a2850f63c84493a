//! Cost of a commit on one table over its life: `benches/run commits [--commits N] [--partitions N] [--json]`.
//!
//! Real microbatches through the program's own path: in-process broker, SQLite catalog, local warehouse, maintenance as
//! it is by default. A microbatch is small, so the figure is what a commit costs beside its rows. Timed is the main
//! commit, from its first request to its read-back; counted are the bytes of all files that appear in the folder
//! `metadata` from one microbatch to the next (metadata file, manifest list, manifest).
//!
//! Flat = the medians of the last hundred are those of the first hundred. Before the first of them a run reads every topic
//! partition once: a cursor that has moved is longer in the record than one that stands at zero.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::generate::{Broker, Generator, GeneratorConfig, Sender, Topics, demo_job_toml};
use tidemill::job::file;
use tidemill::pipeline::report::{Event, Report};
use tidemill::pipeline::{self, RunOptions};
use tracing::field::{Field, Visit};
use tracing::span;

/// Records of one microbatch.
const BATCH_RECORDS: u64 = 200;
/// Records of each topic partition that are read before anything is counted; enough that chance leaves none out.
const WARM_UP_RECORDS: u64 = 30;
/// Commits at each end that are compared.
const END: usize = 100;
/// Largest wave, in microbatches, so that a drain's state stays small.
const WAVE_COMMITS_MAX: u64 = 2_500;

/// When the phases of the last main commit were reached.
static COMMIT: Mutex<(Option<Instant>, f64)> = Mutex::new((None, 0.0));

/// Notes the phases of commits, which the pipeline tells its log.
struct Clock;

#[derive(Default)]
struct Phase(String);

impl Visit for Phase {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "phase" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl tracing::Subscriber for Clock {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "tidemill::pipeline::report"
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut phase = Phase::default();
        event.record(&mut phase);
        let mut commit = COMMIT.lock().expect("nothing panics while it holds this");
        match phase.0.as_str() {
            "main_sent" => commit.0 = Some(Instant::now()),
            "main_landed" => commit.1 = commit.0.take().map_or(0.0, |sent| sent.elapsed().as_secs_f64()),
            _ => {}
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// What was measured.
struct Costs {
    metadata: PathBuf,
    known: HashSet<PathBuf>,
    seconds: Vec<f64>,
    bytes: Vec<f64>,
    passes: u64,
    pass_seconds: f64,
    begun: Instant,
}

impl Costs {
    /// Bytes of files that appeared since the last look.
    fn new_bytes(&mut self) -> u64 {
        let mut bytes = 0;
        let mut present = HashSet::new();
        for entry in std::fs::read_dir(&self.metadata).into_iter().flatten().flatten() {
            let path = entry.path();
            if !self.known.contains(&path) {
                bytes += entry.metadata().map_or(0, |metadata| metadata.len());
            }
            present.insert(path);
        }
        self.known = present;
        bytes
    }
}

impl Report for Costs {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Commit { .. } => {
                let bytes = self.new_bytes();
                self.bytes.push(bytes as f64);
                self.seconds.push(COMMIT.lock().expect("nothing panics while it holds this").1);
                if self.seconds.len().is_multiple_of(500) {
                    let (count, seconds) = (self.seconds.len(), self.begun.elapsed().as_secs_f64());
                    eprintln!("{count} commits in {seconds:.0} s, the last {bytes} bytes");
                }
            }
            Event::Maintained { seconds, table, .. } => {
                self.new_bytes();
                if !table.ends_with("_dead_letters") {
                    self.passes += 1;
                    self.pass_seconds += seconds;
                }
            }
            Event::Notice { text } => panic!("a run without faults has nothing to say: {text}"),
            Event::Start { .. } => drop(self.new_bytes()),
            _ => {}
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn files_below(folder: &Path) -> (u64, u64) {
    let (mut count, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            let (more, larger) = files_below(&entry.path());
            (count, bytes) = (count + more, bytes + larger);
        } else {
            (count, bytes) = (count + 1, bytes + entry.metadata().map_or(0, |metadata| metadata.len()));
        }
    }
    (count, bytes)
}

fn measure(commits: u64, partitions: u32) -> Value {
    let folder = TempDir::new().expect("a temporary folder");
    let warm_up = WARM_UP_RECORDS * u64::from(partitions);
    let config = GeneratorConfig {
        events: commits * BATCH_RECORDS + warm_up,
        topics: Topics::One("n".to_owned()),
        partitions_per_topic: partitions,
        ..GeneratorConfig::default()
    };
    let broker = Broker::start().expect("a broker");
    broker.create_topics(&config.topics.names(), partitions).expect("topics");
    let sender = Sender::connect(broker.bootstrap(), &BTreeMap::new()).expect("a producer");
    let mut generator = Generator::new(&config).expect("a valid configuration");
    let text = demo_job_toml(broker.bootstrap(), folder.path(), &config.topics.names());
    let text: Vec<&str> = text.lines().filter(|line| !line.starts_with("maintenance")).collect();
    let job_path = folder.path().join("job.toml");
    std::fs::write(&job_path, text.join("\n")).expect("the folder is writable");
    let sets = [format!("microbatch.max_records={BATCH_RECORDS}")];
    let loaded = file::read(&job_path, &sets, &|_| None).expect("the demo's job is valid");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("threads");
    let table = folder.path().join("warehouse/demo/notifications");
    let mut costs = Costs {
        metadata: table.join("metadata"),
        known: HashSet::new(),
        seconds: Vec::new(),
        bytes: Vec::new(),
        passes: 0,
        pass_seconds: 0.0,
        begun: Instant::now(),
    };
    let wave_max =
        (Broker::wave_records_max(&config.topics, partitions) / BATCH_RECORDS).min(WAVE_COMMITS_MAX);
    let options = RunOptions { job_shown: "job.toml".to_owned(), ..RunOptions::default() };
    let at_once = file::read(&job_path, &[], &|_| None).expect("the demo's job is valid");
    sender.send(generator.wave(warm_up), |_| {}).expect("the broker takes all");
    runtime.block_on(pipeline::run(&at_once, &options, &mut costs)).expect("a run without faults");
    (costs.seconds, costs.bytes, costs.passes, costs.pass_seconds) = (Vec::new(), Vec::new(), 0, 0.0);
    costs.begun = Instant::now();
    while (costs.seconds.len() as u64) < commits {
        let wave = wave_max.min(commits - costs.seconds.len() as u64);
        sender.send(generator.wave(wave * BATCH_RECORDS), |_| {}).expect("the broker takes all");
        runtime.block_on(pipeline::run(&loaded, &options, &mut costs)).expect("a run without faults");
    }
    let (first, last) = (..END, costs.seconds.len() - END..);
    let (seconds, bytes) = (&costs.seconds, &costs.bytes);
    let (metadata_files, metadata_bytes) = files_below(&costs.metadata);
    let (data_files, _) = files_below(&table.join("data"));
    json!({
        "figure": "commits", "commits": seconds.len(), "topic_partitions": partitions,
        "commit_ms_first": median(&seconds[first]) * 1e3, "commit_ms_last": median(&seconds[last.clone()]) * 1e3,
        "commit_ratio": median(&seconds[last.clone()]) / median(&seconds[first]),
        "metadata_bytes_first": median(&bytes[first]), "metadata_bytes_last": median(&bytes[last.clone()]),
        "metadata_bytes_ratio": median(&bytes[last]) / median(&bytes[first]),
        "metadata_files": metadata_files, "metadata_folder_bytes": metadata_bytes, "data_files": data_files,
        "passes": costs.passes, "pass_ms_mean": costs.pass_seconds / costs.passes.max(1) as f64 * 1e3,
        "seconds": costs.begun.elapsed().as_secs_f64(),
        "commit": std::env::var("TIDEMILL_BENCH_COMMIT").unwrap_or_default(),
    })
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    if words.iter().any(|word| word == "--list") {
        println!(
            "commits   time and metadata bytes of a commit, the last hundred against the first: --commits 5000 --partitions 8"
        );
        return;
    }
    let option = |name: &str, default: u64| {
        let value = words.iter().position(|word| word == name).and_then(|place| words.get(place + 1));
        value.map_or(default, |text| {
            text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text}"))
        })
    };
    tracing::subscriber::set_global_default(Clock).expect("no other subscriber is set");
    let commits = option("--commits", 5_000).max(2 * END as u64);
    let partitions = u32::try_from(option("--partitions", 8)).expect("fewer topic partitions than 2^32");
    let figure = measure(commits, partitions);
    if words.iter().any(|word| word == "--json") {
        println!("{figure}");
    } else {
        println!("{figure:#}");
    }
}
