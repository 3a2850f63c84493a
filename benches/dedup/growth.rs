//! `growth`: from an empty state through real batches, and what that costs as the state grows.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use tidemill::dedup::Store;

use super::keys::{Clock, Keys, Stream};
use super::ours::{EPOCH, Run, generation_name, spec, tiers};
use super::process::Transferred;
use super::{Failure, Scratch, Settings, compare, device, limit};

const TENTHS: u64 = 10;
/// Bytes of a key as it comes, and the yardstick of write amplification.
const KEY_BYTES: f64 = 16.0;

/// Runs the growth under the limit, in a process of its own.
pub fn growth(settings: &Settings) -> Result<Value, Failure> {
    let scratch = Scratch::of(settings)?;
    let folder = scratch.path().join("growth");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    let mut words = vec!["growth-worker".to_owned(), "--folder".to_owned(), folder.display().to_string()];
    words.extend(settings.words(&["keys", "batch", "repeats", "load", "share", "probe"]));
    let mut result = limit::run(Some(settings.bytes("memory")), &std::env::current_exe()?, &words)?;
    result["figure"] = json!("growth");
    result["device_after"] = device::measure(&folder)?;
    std::fs::remove_dir_all(&folder)?;
    Ok(result)
}

/// Grows a state to that many events.
pub fn work(settings: &Settings) -> Result<Value, Failure> {
    let folder = PathBuf::from(settings.text("folder"));
    let (repeats, share) = (settings.repeats()?, settings.bytes("share"));
    let (events, batch_events) = (settings.number("keys"), settings.number("batch").max(1));
    let seed = rand::random();
    let keys =
        Keys { state_seed: seed, run_seed: seed, prepared: 0, clock: Clock::new(events, events, repeats) };
    let mut store = Store::open(&folder, spec(seed, repeats), None, share)?;
    let mut run = Run::new(Stream::new(keys, settings.load()?, repeats), settings.number("probe"));

    let written_before = Transferred::now().written_bytes;
    let batches = events.div_ceil(batch_events);
    let mut tenths: Vec<Value> = Vec::new();
    let mut kept = Vec::new();
    let (mut seconds_before, mut events_before) = (0.0, 0);
    let mut sweep_seconds = 0.0;
    for batch in 1..=batches {
        let of_batch = batch_events.min(events - (batch - 1) * batch_events);
        kept.push(run.batch(&mut store, of_batch, generation_name(batch))?);
        // The last two generations stay, as a failed commit may need the one before.
        kept.drain(..kept.len().saturating_sub(2));
        let sweeping = Instant::now();
        store.sweep(&kept, EPOCH + 1)?;
        sweep_seconds += sweeping.elapsed().as_secs_f64();

        let events_now = events.min(batch * batch_events);
        if batch * TENTHS / batches > tenths.len() as u64 {
            let rate = (events_now - events_before) as f64 / (run.seconds() - seconds_before);
            (seconds_before, events_before) = (run.seconds(), events_now);
            let live_keys = store.stats().keys;
            let tenth = json!({ "events": events_now, "events_per_second": rate, "keys": live_keys,
                "tiers": tiers(&folder, &kept[kept.len() - 1])?, "disk": disk(&folder, live_keys)?,
                "write_amplification": amplification(written_before, live_keys) });
            eprintln!("growth: {events_now} events, {:.2} M events/s", rate / 1e6);
            tenths.push(tenth);
        }
    }
    let mut result = run.described(&store)?;
    compare::summarize(&mut result, batch_events);
    let stats = &result["store"];
    let number = |name: &str| stats[name].as_f64();
    let written = number("segment_bytes_written").zip(number("merge_bytes_written"));
    let of_segments = written.map(|(segments, merges)| (segments + merges) / segments);
    result["write_amplification"] = json!({
        "all_bytes_of_process_against_16_byte_keys": amplification(written_before, store.stats().keys),
        "segments_and_merges_against_16_byte_keys":
            written.map(|(segments, merges)| (segments + merges) / KEY_BYTES / store.stats().keys as f64),
        "segments_and_merges_against_segments": of_segments });
    result["tenths"] = json!(tenths);
    result["sweep_seconds"] = json!(sweep_seconds);
    result["seed"] = json!(seed);
    Ok(result)
}

/// Bytes that the process wrote so far, in key bytes.
fn amplification(written_before: u64, keys: u64) -> f64 {
    (Transferred::now().written_bytes - written_before) as f64 / (KEY_BYTES * keys.max(1) as f64)
}

fn disk(folder: &Path, keys: u64) -> Result<Value, Failure> {
    let files = device::files_below(folder)?;
    let bytes: u64 = files.iter().map(|(bytes, _)| bytes).sum();
    Ok(
        json!({ "files": files.len(), "bytes": bytes, "bytes_per_live_key": bytes as f64 / keys.max(1) as f64 }),
    )
}
