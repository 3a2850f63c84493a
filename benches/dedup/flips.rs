//! `flips`: damage, and what the store says of it.
//!
//! A small state with several tiers and buckets is damaged in one place: a byte flipped, a file cut short, a file
//! removed, a file exchanged for an older one. Then all its keys and some new ones are looked up. Allowed is an error
//! that names the file, or the right answer (gaps between sections, and pieces that no lookup needs, are not read).
//! A wrong answer ends the run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rand::Rng;
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::dedup::{GenerationRef, Key, STORE_MEMORY_BYTES_MIN, Store, StoreError, Verdict};
use tidemill::job::Repeats;

use super::keys::{Clock, Keys};
use super::ours::{generation_name, spec};
use super::{Failure, Settings};

const BATCHES: u64 = 75;
const BATCH_KEYS: u64 = 60;
const NEW_KEYS: u64 = 200;

type Outcomes = BTreeMap<String, u64>;

/// Damages the states of both modes, half of the times each, on all cores.
pub fn flips(settings: &Settings) -> Result<Value, Failure> {
    let (count, seed) = (settings.number("count"), rand::random::<u64>());
    let workers = std::thread::available_parallelism().map_or(1, usize::from).max(2) as u64;
    let done = AtomicU64::new(0);
    let outcomes = std::thread::scope(|scope| {
        let works: Vec<_> = (0..workers)
            .map(|worker| {
                let done = &done;
                let repeats = if worker.is_multiple_of(2) { Repeats::AnyTime } else { Repeats::SameTime };
                let share = count / workers + u64::from(worker < count % workers);
                scope.spawn(move || {
                    let state =
                        State::make(seed.wrapping_add(worker), repeats).map_err(|error| error.to_string())?;
                    state.damage_often(share, done, count).map_err(|error| error.to_string())
                })
            })
            .collect();
        let mut all = Outcomes::new();
        for work in works {
            for (outcome, times) in work.join().expect("a worker does not panic")? {
                *all.entry(outcome).or_default() += times;
            }
        }
        Ok::<_, String>(all)
    })?;
    let wrong: u64 = outcomes.iter().filter(|(name, _)| name.contains("WRONG")).map(|(_, times)| times).sum();
    let result = json!({ "figure": "flips", "count": count, "seed": seed, "keys": BATCHES * BATCH_KEYS,
        "wrong": wrong, "outcomes": outcomes });
    if wrong > 0 {
        return Err(format!("damage led to wrong answers: {result}").into());
    }
    Ok(result)
}

/// A state, its files as they are, and what they may be exchanged for.
struct State {
    folder: TempDir,
    seed: u64,
    repeats: Repeats,
    reference: GenerationRef,
    files: Vec<(String, Vec<u8>)>,
    older: Vec<(String, Vec<u8>)>,
    probe: Vec<Key>,
}

impl State {
    fn make(seed: u64, repeats: Repeats) -> Result<Self, Failure> {
        let folder = TempDir::new()?;
        let keys = BATCHES * BATCH_KEYS;
        let clock = Clock::new(keys, NEW_KEYS, repeats);
        let numbers = Keys { state_seed: seed, run_seed: seed, prepared: keys, clock };
        let mut store = Store::open(folder.path(), spec(seed, repeats), None, STORE_MEMORY_BYTES_MIN)?;
        let mut references = Vec::new();
        for batch in 0..BATCHES {
            let of_batch: Vec<Key> = (batch * BATCH_KEYS..(batch + 1) * BATCH_KEYS)
                .map(|number| numbers.first_copy(number))
                .collect();
            store.probe(&of_batch)?;
            references.push(store.prepare(generation_name(batch + 1))?);
            store.publish();
        }
        drop(store);
        let reference = references.pop().ok_or("a state has a batch")?;
        let manifest_name = format!("{}.manifest", reference.name);
        let manifest = std::fs::read_to_string(folder.path().join(&manifest_name))?;
        let (mut files, mut older) = (Vec::new(), Vec::new());
        for entry in std::fs::read_dir(folder.path())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let bytes = std::fs::read(folder.path().join(&name))?;
            let is_live = name == manifest_name || manifest.contains(&name);
            if is_live { files.push((name, bytes)) } else { older.push((name, bytes)) }
        }
        files.sort();
        older.sort();
        let probe = (0..keys + NEW_KEYS).map(|number| numbers.first_copy(number)).collect();
        Ok(Self { folder, seed, repeats, reference, files, older, probe })
    }

    fn damage_often(&self, count: u64, done: &AtomicU64, of: u64) -> Result<Outcomes, Failure> {
        let mut random = rand::rng();
        let mut outcomes = Outcomes::new();
        if self.outcome("")? != "right" {
            return Err("the undamaged state does not give the right answers".into());
        }
        for _ in 0..count {
            let index = random.random_range(0..self.files.len());
            let (name, bytes) = &self.files[index];
            let path = self.folder.path().join(name);
            let kind = self.damage(&path, name, bytes, &mut random)?;
            let outcome = self.outcome(name)?;
            std::fs::write(&path, bytes)?;
            *outcomes.entry(format!("{kind}: {outcome}")).or_default() += 1;
            let all = done.fetch_add(1, Ordering::Relaxed) + 1;
            if (all * 10).is_multiple_of(of) {
                eprintln!("flips: {all} of {of}");
            }
        }
        Ok(outcomes)
    }

    /// Mostly flips; every tenth time a cut, a removal or an older file in the place of this one.
    fn damage(
        &self,
        path: &Path,
        name: &str,
        bytes: &[u8],
        random: &mut impl Rng,
    ) -> Result<&'static str, Failure> {
        match random.random_range(0..30) {
            0 => {
                std::fs::write(path, &bytes[..random.random_range(0..bytes.len())])?;
                Ok("cut")
            }
            1 => {
                std::fs::remove_file(path)?;
                Ok("removed")
            }
            2 => {
                let others: Vec<&Vec<u8>> = self
                    .older
                    .iter()
                    .chain(&self.files)
                    .filter(|(other, _)| other != name && kind_of(other) == kind_of(name))
                    .map(|(_, bytes)| bytes)
                    .collect();
                std::fs::write(path, others[random.random_range(0..others.len())])?;
                Ok("exchanged")
            }
            _ => {
                let mut flipped = bytes.to_vec();
                flipped[random.random_range(0..bytes.len())] ^= random.random_range(1..=255_u8);
                std::fs::write(path, flipped)?;
                Ok("flipped")
            }
        }
    }

    /// Opens the state and looks everything up.
    fn outcome(&self, damaged: &str) -> Result<String, Failure> {
        let named = |when: &str, error: &StoreError| match error {
            error if error.to_string().contains(damaged) => format!("error at {when} names the file"),
            error => format!("WRONG: error at {when} does not name the file: {error}"),
        };
        let spec = spec(self.seed, self.repeats);
        let opened = Store::open(self.folder.path(), spec, Some(&self.reference), STORE_MEMORY_BYTES_MIN);
        let mut store = match opened {
            Err(error) => return Ok(named("open", &error)),
            Ok(store) => store,
        };
        let verdicts = match store.probe(&self.probe) {
            Err(error) => return Ok(named("lookup", &error)),
            Ok(verdicts) => verdicts,
        };
        let keys = (BATCHES * BATCH_KEYS) as usize;
        let (held, new) = verdicts.split_at(keys);
        let is_right = held.iter().all(|verdict| *verdict == Verdict::Duplicate)
            && new.iter().all(|verdict| *verdict == Verdict::New);
        Ok(if is_right { "right" } else { "WRONG: verdicts" }.to_owned())
    }
}

fn kind_of(name: &str) -> Option<PathBuf> {
    Path::new(name).extension().map(PathBuf::from)
}
