//! Component figures: one stage at a time, each beside a floor measured in the same run.
//!
//! `benches/run [decode | store] [--json]`. Ratios are the point; absolute rates are this machine's at this moment. None
//! of these is a figure of the whole program: state is far smaller than memory and no broker takes part.

use std::hint::black_box;
use std::time::Instant;

use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::decode::Decoder;
use tidemill::dedup::{GenerationName, Key, Store, StoreSpec, bucket_width_ms};
use tidemill::event_time::EventTimeMs;
use tidemill::fingerprint::Fingerprint;
use tidemill::generate::{Generator, GeneratorConfig, demo_job_toml};
use tidemill::job::{Repeats, file};
use tidemill::offset::TopicPartition;
use tidemill::record::{RecordChunk, RecordParts};
use uuid::Uuid;

const EVENTS: u64 = 200_000;
const KEYS_PER_BATCH: u64 = 500_000;
const BATCHES: u64 = 6;
const DEDUP_MEMORY_BYTES: u64 = 64 << 20;

/// A figure: what was done per second, and the same of its floor.
struct Figure {
    name: &'static str,
    per_second: f64,
    floor: &'static str,
    floor_per_second: f64,
}

fn rate(count: u64, work: impl FnOnce()) -> f64 {
    let begun = Instant::now();
    work();
    count as f64 / begun.elapsed().as_secs_f64()
}

/// Payloads to Arrow columns, beside parsing the same payloads into a document.
fn decode() -> Figure {
    let mut generator =
        Generator::new(&GeneratorConfig::default()).expect("the default configuration is valid");
    let mut chunk = RecordChunk::default();
    for (offset, record) in (0_i64..).zip(generator.wave(EVENTS)) {
        chunk.push(RecordParts {
            slot: 0,
            offset,
            timestamp_ms: record.timestamp_ms,
            key: record.key.as_deref(),
            payload: record.payload.as_deref(),
        });
    }
    let folder = TempDir::new().expect("a temporary folder");
    let job_path = folder.path().join("job.toml");
    let text = demo_job_toml("localhost:9092", folder.path(), &["t".to_owned()]);
    std::fs::write(&job_path, text).expect("the folder is writable");
    let job = file::read(&job_path, &[], &|_| None).expect("the demo's job is valid").job;
    let mut decoder =
        Decoder::new(&job.decode, &job.dedup.key, &job.event_time.column, job.source.record_bytes_max)
            .expect("the demo's columns can be decoded");
    let assignment = [TopicPartition::new("t", 0)];
    let per_second = rate(EVENTS, || {
        let decoded = decoder.decode(&chunk, &assignment).expect("the chunk is small");
        assert_eq!(decoded.consumed, EVENTS);
        black_box(decoded);
    });
    let floor_per_second = rate(EVENTS, || {
        for record in chunk.iter() {
            let document: Value =
                serde_json::from_slice(record.payload().unwrap_or_default()).expect("good records");
            black_box(document);
        }
    });
    Figure {
        name: "decode",
        per_second,
        floor: "serde_json documents of the same payloads",
        floor_per_second,
    }
}

/// Keys through probe and prepare, 94 % of them new, beside sorting the same keys.
fn store() -> Figure {
    let folder = TempDir::new().expect("a temporary folder");
    let seed = rand::random();
    let window = std::time::Duration::from_secs(7 * 24 * 3600);
    let spec = StoreSpec {
        job_id: Uuid::new_v4(),
        key_spec_hash: "bench".to_owned(),
        seed,
        shards: 256,
        bucket_width_ms: bucket_width_ms(window, Repeats::AnyTime),
        repeats: Repeats::AnyTime,
    };
    let mut store = Store::open(folder.path(), spec, None, DEDUP_MEMORY_BYTES).expect("an empty state");
    let batches: Vec<Vec<Key>> = (0..BATCHES).map(|batch| batch_of_keys(batch, seed)).collect();
    let mut new = 0;
    let per_second = rate(KEYS_PER_BATCH * BATCHES, || {
        for (number, keys) in (1..).zip(&batches) {
            let verdicts = store.probe(keys).expect("the state is whole");
            new +=
                verdicts.iter().filter(|verdict| **verdict == tidemill::dedup::Verdict::New).count() as u64;
            store.prepare(GenerationName::new(1, number, Uuid::now_v7())).expect("the disk takes a segment");
            store.publish();
        }
    });
    let first_copies = KEYS_PER_BATCH * BATCHES - repeats_in(BATCHES);
    assert_eq!(new, first_copies, "the state is exact");
    let floor_per_second = rate(KEYS_PER_BATCH * BATCHES, || {
        for keys in &batches {
            let mut fingerprints: Vec<Fingerprint> = keys.iter().map(|key| key.fingerprint).collect();
            fingerprints.sort_unstable();
            black_box(fingerprints);
        }
    });
    Figure { name: "store", per_second, floor: "sorting the same keys in memory", floor_per_second }
}

/// Every sixteenth key of a batch but the first repeats one of the batch before.
fn batch_of_keys(batch: u64, seed: u64) -> Vec<Key> {
    let number = |index: u64| match batch {
        0 => index,
        batch if index.is_multiple_of(16) => (batch - 1) * KEYS_PER_BATCH + index + 1,
        batch => batch * KEYS_PER_BATCH + index,
    };
    (0..KEYS_PER_BATCH)
        .map(|index| Key {
            fingerprint: Fingerprint::of(&number(index).to_le_bytes(), seed),
            event_time: EventTimeMs(1_735_689_600_000 + (batch * 3_600_000) as i64),
        })
        .collect()
}

fn repeats_in(batches: u64) -> u64 {
    KEYS_PER_BATCH.div_ceil(16) * (batches - 1)
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let json = words.iter().any(|word| word == "--json");
    let name = words.iter().find(|word| !word.starts_with("--"));
    type Measure = fn() -> Figure;
    let known: [(&str, Measure); 2] = [("decode", decode), ("store", store)];
    if words.iter().any(|word| word == "--list") {
        known.iter().for_each(|(name, _)| println!("{name}"));
        return;
    }
    let chosen: Vec<_> = known.iter().filter(|(known, _)| name.is_none_or(|name| name == known)).collect();
    if chosen.is_empty() {
        eprintln!("no figure of this name; see benches/run --list");
        std::process::exit(2);
    }
    for (_, measure) in chosen {
        let figure = measure();
        let ratio = figure.per_second / figure.floor_per_second;
        if json {
            let line = json!({ "figure": figure.name, "kind": "component", "per_second": figure.per_second,
                "floor": figure.floor, "floor_per_second": figure.floor_per_second, "ratio": ratio });
            println!("{line}");
        } else {
            println!(
                "{}: {:.0}/s; {}: {:.0}/s; ratio {ratio:.2}",
                figure.name, figure.per_second, figure.floor, figure.floor_per_second
            );
        }
    }
}
