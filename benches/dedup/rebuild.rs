//! `rebuild`: the state made again by `dedup::Builder` from keys in the order in which tables hold them.

use std::path::PathBuf;
use std::time::Instant;

use rayon::prelude::*;
use serde_json::{Value, json};
use tidemill::dedup::{Builder, Key};

use super::keys::{Clock, Keys};
use super::ours::{generation_name, spec, tiers};
use super::{Failure, Scratch, Settings, limit, process};

/// Keys handed over at once.
const CHUNK_KEYS: u64 = 1 << 20;

/// Rebuilds under the limit, in a process of its own.
pub fn rebuild(settings: &Settings) -> Result<Value, Failure> {
    let scratch = Scratch::of(settings)?;
    let folder = scratch.path().join("rebuild");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    let mut words = vec!["rebuild-worker".to_owned(), "--folder".to_owned(), folder.display().to_string()];
    words.extend(settings.words(&["rows", "repeats", "share"]));
    let mut result = limit::run(Some(settings.bytes("memory")), &std::env::current_exe()?, &words)?;
    result["figure"] = json!("rebuild");
    std::fs::remove_dir_all(&folder)?;
    Ok(result)
}

/// Builds one generation; making the keys is not timed.
pub fn work(settings: &Settings) -> Result<Value, Failure> {
    let folder = PathBuf::from(settings.text("folder"));
    let (rows, repeats) = (settings.number("rows"), settings.repeats()?);
    let seed = rand::random();
    let numbers =
        Keys { state_seed: seed, run_seed: seed, prepared: rows, clock: Clock::new(rows, 0, repeats) };
    let mut builder = Builder::create(&folder, spec(seed, repeats), settings.bytes("share"), None)?;
    let mut add_seconds = 0.0;
    let cpu_before = process::cpu_time();
    for begin in (0..rows).step_by(CHUNK_KEYS as usize) {
        let end = rows.min(begin + CHUNK_KEYS);
        let keys: Vec<Key> = (begin..end).into_par_iter().map(|number| numbers.first_copy(number)).collect();
        let adding = Instant::now();
        builder.add(&keys)?;
        add_seconds += adding.elapsed().as_secs_f64();
        if end * 10 / rows > begin * 10 / rows {
            eprintln!("rebuild: {end} of {rows} rows");
        }
    }
    let finishing = Instant::now();
    let (reference, report) = builder.finish(generation_name(1))?;
    let finish_seconds = finishing.elapsed().as_secs_f64();
    if report.keys != rows || report.repeats != 0 {
        return Err(format!("{rows} different rows gave {} keys", report.keys).into());
    }
    Ok(json!({ "rows": rows, "keys_per_second": rows as f64 / (add_seconds + finish_seconds),
        "add_seconds": add_seconds, "finish_seconds": finish_seconds, "share_bytes": settings.bytes("share"),
        "cpu_seconds": (process::cpu_time() - cpu_before).as_secs_f64(), "buckets": report.buckets.len(),
        "peak_rss_bytes": process::peak_rss_bytes(), "tiers": tiers(&folder, &reference)?, "seed": seed }))
}
