//! `dedup`: our store and RocksDB on the same keys under the same hard limit, one after the other.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ours::{Prepared, worker_words};
use super::{Failure, Scratch, Settings, device, limit};

/// Memory that a batch takes in the anchor beside its cache: ids twice, and what was found.
const ANCHOR_BYTES_PER_EVENT: u64 = 40;
/// Names the program that `benches/run --rocksdb` builds.
const ANCHOR_VARIABLE: &str = "TIDEMILL_BENCH_ANCHOR";

/// Runs both engines with every size of batch.
pub fn compare(settings: &Settings) -> Result<Value, Failure> {
    let (repeats, keys) = (settings.repeats()?, settings.number("keys"));
    settings.load()?;
    let scratch = Scratch::of(settings)?;
    let seed = scratch.seed()?;
    let ours = scratch.path().join(format!("ours-{}-{keys}", settings.text("repeats")));
    let prepared = Prepared::in_folder(&ours, seed, keys, repeats, settings.bytes("share"))?;
    let rocksdb =
        if settings.is_set("rocksdb") { Some(Anchor::loaded(&scratch, seed, settings)?) } else { None };

    let mut runs = Vec::new();
    for batch in settings.numbers("batch")? {
        // Both engines see the same events; no two runs see the same.
        let settings = settings.with("run-seed", rand::random::<u64>().to_string());
        let mut run = json!({ "batch": batch, "run_seed": settings.number("run-seed") });
        prepared_again(&ours, &prepared, &settings)?;
        run["ours"] = engine(&ours, batch, &settings, |limit| {
            let program = std::env::current_exe()?;
            limit::run(limit, &program, &worker_words(&ours, &prepared, batch, &settings))
        })?;
        prepared_again(&ours, &prepared, &settings)?;
        if let Some(anchor) = &rocksdb {
            run["rocksdb"] = engine(&anchor.folder, batch, &settings, |limit| {
                limit::run(limit, &anchor.program, &anchor.run_words(seed, keys, batch, &settings))
            })?;
            let rate = |engine: &str| run[engine]["events_per_second"]["total"].as_f64();
            run["ratio"] = match (rate("ours"), rate("rocksdb")) {
                (Some(ours), Some(rocksdb)) => json!(ours / rocksdb),
                _ => Value::Null,
            };
        }
        runs.push(run);
    }
    Ok(
        json!({ "figure": "dedup", "keys": keys, "repeats": settings.text("repeats"), "load": settings.text("load"),
        "memory_bytes": settings.bytes("memory"), "share_bytes": settings.bytes("share"), "state_seed": seed,
        "state": prepared.described(&ours)?, "runs": runs }),
    )
}

/// Takes away what a run added to the state.
fn prepared_again(folder: &Path, prepared: &Prepared, settings: &Settings) -> Result<(), Failure> {
    Prepared::in_folder(folder, prepared.seed, prepared.keys, prepared.repeats, settings.bytes("share"))?;
    Ok(())
}

/// One engine: its files out of the page cache, the device measured, then the run under the limit.
fn engine(
    folder: &Path,
    batch: u64,
    settings: &Settings,
    run: impl FnOnce(Option<u64>) -> Result<Value, Failure>,
) -> Result<Value, Failure> {
    device::forget_cached(folder)?;
    let device = device::measure(folder)?;
    let mut result = run(Some(settings.bytes("memory")))?;
    result["device"] = device;
    if result["found"] != result["expected"] {
        return Err(format!("wrong verdicts: {result}").into());
    }
    summarize(&mut result, batch);
    Ok(result)
}

/// Turns the seconds of the batches into rates.
pub fn summarize(result: &mut Value, batch: u64) {
    let Some(seconds) = result["seconds"].as_array() else { return };
    let mut rates: Vec<f64> = seconds.iter().flat_map(Value::as_f64).map(|one| batch as f64 / one).collect();
    let all_seconds: f64 = seconds.iter().flat_map(Value::as_f64).sum();
    let events = batch as f64 * rates.len() as f64;
    rates.sort_unstable_by(f64::total_cmp);
    let at = |percent: usize| rates.get((rates.len().saturating_sub(1)) * percent / 100).copied();
    result["events_per_second"] =
        json!({ "total": events / all_seconds, "median": at(50), "p10": at(10), "p90": at(90) });
    let cpu_seconds = result["cpu_seconds"].as_f64().unwrap_or_default();
    result["cpu_seconds_per_million_events"] = json!(cpu_seconds / events * 1e6);
    for (bytes, keys) in [("/store/segment_bytes", "/store/keys"), ("/disk_bytes", "/keys")] {
        let number = |pointer| result.pointer(pointer).and_then(Value::as_f64);
        if let (Some(bytes), Some(keys)) = (number(bytes), number(keys)) {
            result["bytes_per_key"] = json!(bytes / keys);
        }
    }
}

/// RocksDB, as a program of its own.
struct Anchor {
    program: PathBuf,
    folder: PathBuf,
}

impl Anchor {
    fn loaded(scratch: &Scratch, seed: u64, settings: &Settings) -> Result<Self, Failure> {
        let keys = settings.number("keys");
        let program = std::env::var_os(ANCHOR_VARIABLE)
            .ok_or_else(|| format!("{ANCHOR_VARIABLE} names no program; benches/run --rocksdb builds it"))?;
        let anchor = Self { program: program.into(), folder: scratch.path().join(format!("rocksdb-{keys}")) };
        if !anchor.folder.join("loaded").exists() {
            if anchor.folder.exists() {
                std::fs::remove_dir_all(&anchor.folder)?;
            }
            let words = anchor.words("load", seed, keys, &[cache_bytes(keys, 0, settings)]);
            let status = std::process::Command::new(&anchor.program).args(words).status()?;
            if !status.success() {
                return Err(format!("loading RocksDB ended with {status}").into());
            }
        }
        Ok(anchor)
    }

    fn words(&self, command: &str, seed: u64, keys: u64, others: &[(&str, String)]) -> Vec<String> {
        let mut words = vec![command.to_owned()];
        let own = [
            ("state", self.folder.display().to_string()),
            ("keys", keys.to_string()),
            ("state-seed", seed.to_string()),
        ];
        for (name, value) in own.iter().chain(others) {
            words.extend([format!("--{name}"), value.clone()]);
        }
        words
    }

    fn run_words(&self, seed: u64, keys: u64, batch: u64, settings: &Settings) -> Vec<String> {
        let others = [
            ("run-seed", settings.number("run-seed").to_string()),
            ("batch", batch.to_string()),
            ("batches", settings.number("batches").to_string()),
            ("load", settings.text("load").to_owned()),
            cache_bytes(keys, batch, settings),
        ];
        self.words("run", seed, keys, &others)
    }
}

/// Of 1 GiB 490 MB while all filters fit, 330 MB when they do not, and less for batches that take more than 1 M events
/// themselves: with more it is killed at the limit, at the latest after some tens of batches.
fn cache_bytes(keys: u64, batch: u64, settings: &Settings) -> (&'static str, String) {
    let percent = if keys < 500_000_000 { 46 } else { 31 };
    let bytes = settings.bytes("memory") / 100 * percent;
    let of_batch = batch.saturating_sub(1_000_000) * ANCHOR_BYTES_PER_EVENT;
    ("cache-bytes", bytes.saturating_sub(of_batch).max(bytes / 4).to_string())
}
