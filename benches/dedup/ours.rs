//! Our own store: states as real batches leave them, and batches on them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tidemill::dedup::{GenerationName, GenerationRef, Key, Store, StoreSpec, sweep};
use tidemill::job::Repeats;
use uuid::Uuid;

use super::device::files_below;
use super::keys::{BUCKET_WIDTH_MS, Clock, Keys, Load, Stream, Truth};
use super::process::{self, Transferred};
use super::{Failure, Settings};

/// Keys of a batch of a prepared state.
const PREPARED_BATCH_KEYS: u64 = 1_000_000;
/// Batches between two sweeps of files that no generation needs.
const SWEEP_BATCHES: u64 = 16;
const PREPARED_FILE: &str = "prepared.json";
/// Epoch of all states of these benches.
pub const EPOCH: u64 = 1;

/// The spec of all states of these benches.
pub fn spec(seed: u64, repeats: Repeats) -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(u128::from(seed)),
        key_spec_hash: "bench".to_owned(),
        seed,
        shards: 256,
        bucket_width_ms: BUCKET_WIDTH_MS as i64,
        repeats,
    }
}

/// A name for the next generation.
pub fn generation_name(batch: u64) -> GenerationName {
    GenerationName::new(EPOCH, batch, Uuid::now_v7())
}

/// A state that stands in a folder for runs to begin from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepared {
    /// Of its keys.
    pub seed: u64,
    /// Their number.
    pub keys: u64,
    /// How repeats are looked for.
    pub repeats: Repeats,
    reference: GenerationRef,
    files: Vec<PathBuf>,
    stats: Value,
    seconds: f64,
}

impl Prepared {
    /// Finds the state in the folder, rid of what an earlier run added; or makes it: batch by batch, without looking
    /// keys up, since all are new, but with all segments, merges and generations of real batches.
    pub fn in_folder(
        folder: &Path,
        seed: u64,
        keys: u64,
        repeats: Repeats,
        share: u64,
    ) -> Result<Self, Failure> {
        if let Ok(text) = std::fs::read(folder.join(PREPARED_FILE)) {
            let found: Self = serde_json::from_slice(&text)?;
            if (found.seed, found.keys, found.repeats) != (seed, keys, repeats) {
                return Err(format!("{} holds another state; name another folder", folder.display()).into());
            }
            found.remove_others(folder)?;
            return Ok(found);
        }
        if folder.exists() {
            // What a run that was ended left half made.
            std::fs::remove_dir_all(folder)?;
        }
        let prepared = Self::make(folder, seed, keys, repeats, share)?;
        std::fs::write(folder.join(PREPARED_FILE), serde_json::to_vec(&prepared)?)?;
        Ok(prepared)
    }

    fn make(folder: &Path, seed: u64, keys: u64, repeats: Repeats, share: u64) -> Result<Self, Failure> {
        let clock = Clock::new(keys, 0, repeats);
        let numbers = Keys { state_seed: seed, run_seed: seed, prepared: keys, clock };
        let mut store = Store::open(folder, spec(seed, repeats), None, share)?;
        let begun = Instant::now();
        let mut reference = None;
        for batch in 0..keys.div_ceil(PREPARED_BATCH_KEYS).max(1) {
            let begin = batch * PREPARED_BATCH_KEYS;
            let end = keys.min(begin + PREPARED_BATCH_KEYS);
            let batch_keys: Vec<Key> =
                (begin..end).into_par_iter().map(|number| numbers.first_copy(number)).collect();
            store.append_unprobed(&batch_keys)?;
            let made = store.prepare(generation_name(batch + 1))?;
            store.publish();
            if (batch + 1) % SWEEP_BATCHES == 0 {
                store.sweep(std::slice::from_ref(&made), EPOCH + 1)?;
                eprintln!("state: {} of {} M keys", end / 1_000_000, keys / 1_000_000);
            }
            reference = Some(made);
        }
        let reference = reference.ok_or("a state takes at least one batch")?;
        let (stats, seconds) = (serde_json::to_value(store.stats())?, begun.elapsed().as_secs_f64());
        drop(store);
        sweep(folder, std::slice::from_ref(&reference), EPOCH + 1)?;
        let files = files_below(folder)?.into_iter().map(|(_, path)| path).collect();
        Ok(Self { seed, keys, repeats, reference, files, stats, seconds })
    }

    fn remove_others(&self, folder: &Path) -> Result<(), Failure> {
        for (_, path) in files_below(folder)? {
            if !self.files.contains(&path) && path != folder.join(PREPARED_FILE) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// What stands on disk.
    pub fn described(&self, folder: &Path) -> Result<Value, Failure> {
        let number = |name: &str| self.stats[name].as_u64().unwrap_or_default();
        Ok(json!({ "keys": self.keys, "segment_bytes": number("segment_bytes"),
            "bytes_per_key": number("segment_bytes") as f64 / self.keys.max(1) as f64,
            "buckets": number("buckets"), "tiers": tiers(folder, &self.reference)?,
            "prepare_seconds": self.seconds }))
    }
}

/// Segments per tier, and their keys, as the manifest lists them.
pub fn tiers(folder: &Path, reference: &GenerationRef) -> Result<Value, Failure> {
    let text = std::fs::read_to_string(folder.join(format!("{}.manifest", reference.name)))?;
    let (_, body) = text.split_once('\n').ok_or("a manifest has a first line")?;
    let manifest: Value = serde_json::from_str(body)?;
    let mut tiers: Vec<(u64, u64)> = Vec::new();
    for segment in manifest["segments"].as_array().into_iter().flatten() {
        let tier = segment["tier"].as_u64().unwrap_or_default() as usize;
        tiers.resize(tiers.len().max(tier + 1), (0, 0));
        tiers[tier].0 += 1;
        tiers[tier].1 += segment["keys"].as_u64().unwrap_or_default();
    }
    Ok(tiers.iter().map(|(files, keys)| json!({ "files": files, "keys": keys })).collect())
}

/// The arguments by which a run is handed to a process of its own.
pub fn worker_words(folder: &Path, prepared: &Prepared, batch: u64, settings: &Settings) -> Vec<String> {
    let mut words = vec!["dedup-worker".to_owned(), "--folder".to_owned(), folder.display().to_string()];
    for (name, value) in [
        ("keys", prepared.keys.to_string()),
        ("batch", batch.to_string()),
        ("repeats", settings.text("repeats").to_owned()),
        ("load", settings.text("load").to_owned()),
        ("share", settings.bytes("share").to_string()),
        ("batches", settings.number("batches").to_string()),
        ("probe", settings.number("probe").to_string()),
        ("run-seed", settings.number("run-seed").to_string()),
    ] {
        words.extend([format!("--{name}"), value]);
    }
    words
}

/// Opens the prepared state cold and runs batches on it. This is the process that the limit holds.
pub fn work(settings: &Settings) -> Result<Value, Failure> {
    let folder = PathBuf::from(settings.text("folder"));
    let prepared: Prepared = serde_json::from_slice(&std::fs::read(folder.join(PREPARED_FILE))?)?;
    let (batches, batch_events) = (settings.number("batches"), settings.number("batch"));
    let (repeats, load) = (settings.repeats()?, settings.load()?);
    let keys = Keys {
        state_seed: prepared.seed,
        run_seed: settings.number("run-seed"),
        prepared: prepared.keys,
        clock: Clock::new(prepared.keys, batches * batch_events, repeats),
    };
    let read_before = Transferred::now();
    let opening = Instant::now();
    let spec = spec(prepared.seed, repeats);
    let mut store = Store::open(&folder, spec, Some(&prepared.reference), settings.bytes("share"))?;
    let open_seconds = opening.elapsed().as_secs_f64();
    let read_by_open = Transferred::now().read_bytes;

    let mut run = Run::new(Stream::new(keys, load, repeats), settings.number("probe"));
    for batch in 1..=batches {
        run.batch(&mut store, batch_events, generation_name(1_000_000 + batch))?;
        eprintln!("ours: batch {batch} of {batches}, {:.2} M events/s", run.last_rate() / 1e6);
    }
    let mut result = run.described(&store)?;
    result["open_seconds"] = json!(open_seconds);
    result["open_read_bytes"] = json!(read_by_open - read_before.read_bytes);
    result["read_bytes"] = json!(Transferred::now().read_bytes - read_by_open);
    Ok(result)
}

/// Batches on an open store, each timed from its keys to the generation in use.
#[derive(Debug)]
pub struct Run {
    stream: Stream,
    truth: Truth,
    keys: Vec<Key>,
    /// Keys that are looked up together; 0 for the whole batch.
    probe_keys: u64,
    seconds: Vec<f64>,
    probe_seconds: Vec<f64>,
    cpu_seconds: f64,
    /// Of the last batch.
    events: u64,
}

impl Run {
    /// Begins where the stream stands.
    pub fn new(stream: Stream, probe_keys: u64) -> Self {
        Self {
            stream,
            truth: Truth::default(),
            keys: Vec::new(),
            probe_keys,
            seconds: Vec::new(),
            probe_seconds: Vec::new(),
            cpu_seconds: 0.0,
            events: 0,
        }
    }

    /// One batch: probe, prepare, publish. Making its keys and checking its verdicts is not timed; keys are made for one
    /// probe at a time, so that they do not take the memory of the state.
    pub fn batch(
        &mut self,
        store: &mut Store,
        events: u64,
        name: GenerationName,
    ) -> Result<GenerationRef, Failure> {
        let together = if self.probe_keys == 0 { events } else { self.probe_keys };
        let (mut left, mut seconds) = (events, 0.0);
        while left > 0 {
            let of_probe = together.min(left);
            left -= of_probe;
            self.stream.fill(of_probe, &mut self.keys);
            let (cpu_before, begun) = (process::cpu_time(), Instant::now());
            let verdicts = store.probe(&self.keys)?;
            seconds += begun.elapsed().as_secs_f64();
            self.cpu_seconds += (process::cpu_time() - cpu_before).as_secs_f64();
            self.truth.compare(&self.stream, &verdicts);
        }
        self.truth.proven()?;
        self.probe_seconds.push(seconds);
        let (cpu_before, begun) = (process::cpu_time(), Instant::now());
        let reference = store.prepare(name)?;
        store.publish();
        self.seconds.push(seconds + begun.elapsed().as_secs_f64());
        self.cpu_seconds += (process::cpu_time() - cpu_before).as_secs_f64();
        self.events = events;
        Ok(reference)
    }

    /// Events per second of the last batch.
    pub fn last_rate(&self) -> f64 {
        self.events as f64 / self.seconds.last().copied().unwrap_or(f64::INFINITY)
    }

    /// Time of all batches so far.
    pub fn seconds(&self) -> f64 {
        self.seconds.iter().sum()
    }

    /// Figures so far.
    pub fn described(&self, store: &Store) -> Result<Value, Failure> {
        Ok(json!({ "seconds": self.seconds, "probe_seconds": self.probe_seconds.iter().sum::<f64>(),
            "cpu_seconds": self.cpu_seconds, "truth": self.truth.proven()?, "keys": self.stream.keys(),
            "peak_rss_bytes": process::peak_rss_bytes(), "store": store.stats() }))
    }
}

/// A load by its name.
pub fn load_of(name: &str) -> Option<Load> {
    match name {
        "mix" => Some(Load::Mix),
        "worst" => Some(Load::Worst),
        _ => None,
    }
}
