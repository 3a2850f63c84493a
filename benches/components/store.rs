//! Keys through a small dedup state, beside sorting the same keys. No figure of the whole state: `benches/dedup.rs` is.

use std::hint::black_box;
use std::time::Duration;

use tempfile::TempDir;
use tidemill::dedup::{GenerationName, Key, Store, StoreSpec, Verdict, bucket_width_ms};
use tidemill::event_time::EventTimeMs;
use tidemill::fingerprint::Fingerprint;
use tidemill::job::Repeats;
use uuid::Uuid;

use super::figure::{Figure, Pieces};

const KEYS_PER_BATCH: u64 = 500_000;
const BATCHES: u64 = 6;
const DEDUP_MEMORY_BYTES: u64 = 64 << 20;

/// Probes and prepares all batches against an empty state; gives the number of new keys.
fn probe_and_prepare(batches: &[Vec<Key>], seed: u64) -> u64 {
    let folder = TempDir::new().expect("a temporary folder");
    let window = Duration::from_secs(7 * 24 * 3600);
    let spec = StoreSpec {
        job_id: Uuid::new_v4(),
        key_spec_hash: "bench".to_owned(),
        seed,
        shards: 256,
        bucket_width_ms: bucket_width_ms(window, Repeats::AnyTime),
        repeats: Repeats::AnyTime,
    };
    let mut store = Store::open(folder.path(), spec, None, DEDUP_MEMORY_BYTES).expect("an empty state");
    let mut new = 0;
    for (number, keys) in (1..).zip(batches) {
        let verdicts = store.probe(keys).expect("the state is whole");
        new += verdicts.iter().filter(|verdict| **verdict == Verdict::New).count() as u64;
        store.prepare(GenerationName::new(1, number, Uuid::now_v7())).expect("the disk takes a segment");
        store.publish();
    }
    new
}

/// Measures it: 94 % of the keys are new.
pub fn store() -> Vec<Figure> {
    let seed = rand::random();
    let batches: Vec<Vec<Key>> = (0..BATCHES).map(|batch| batch_of_keys(batch, seed)).collect();
    let first_copies = KEYS_PER_BATCH * BATCHES - repeats_in(BATCHES);
    vec![Figure::measure(
        "store",
        "keys",
        "sorting the same keys in memory",
        Pieces {
            pieces: 1,
            count: KEYS_PER_BATCH * BATCHES,
            work: &mut |_| {
                assert_eq!(probe_and_prepare(&batches, seed), first_copies, "the state is exact");
            },
        },
        Pieces {
            pieces: batches.len(),
            count: KEYS_PER_BATCH,
            work: &mut |batch| {
                let keys = &batches[batch];
                let mut fingerprints: Vec<Fingerprint> = keys.iter().map(|key| key.fingerprint).collect();
                fingerprints.sort_unstable();
                black_box(fingerprints);
            },
        },
    )]
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
