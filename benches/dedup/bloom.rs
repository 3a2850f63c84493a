//! `bloom`: a textbook Bloom filter alone, beside the filter of the store.
//!
//! Alone, a Bloom filter drops first events: all that it takes for seen and was not. How many is counted against the
//! truth and against the formula. The store's filter answers the same question about sorted batches, and what it takes
//! for seen is looked up in pages before anything is dropped.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher};
use std::hint::black_box;
use std::time::{Duration, Instant};

use probabilistic_collections::bloom::BloomFilter;
use serde_json::{Value, json};
use tidemill::dedup::{FilterAlone, Key};
use tidemill::job::Repeats;

use super::keys::{Clock, Keys, Load, Stream};
use super::{Failure, Settings};

/// The keys are hashes already, so a hasher only hands on one half of the key: the crate's fastest way.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Half(u32);

struct HalfHasher {
    shift: u32,
    bits: u64,
}

impl BuildHasher for Half {
    type Hasher = HalfHasher;

    fn build_hasher(&self) -> HalfHasher {
        HalfHasher { shift: self.0, bits: 0 }
    }
}

impl Hasher for HalfHasher {
    fn write(&mut self, bytes: &[u8]) {
        let mut wide = [0; 16];
        wide[..bytes.len().min(16)].copy_from_slice(&bytes[..bytes.len().min(16)]);
        self.write_u128(u128::from_le_bytes(wide));
    }

    fn write_u128(&mut self, value: u128) {
        self.bits = (value >> self.shift) as u64;
    }

    fn finish(&self) -> u64 {
        self.bits
    }
}

/// False positives of a Bloom filter of `bits` bits and `hashes` functions that holds `keys` keys.
fn predicted_rate(keys: f64, bits: f64, hashes: f64) -> f64 {
    (1.0 - (-hashes * keys / bits).exp()).powf(hashes)
}

/// Fills both filters from empty with the events of one stream.
pub fn bloom(settings: &Settings) -> Result<Value, Failure> {
    let (events, batch_events) = (settings.number("keys"), settings.number("batch").max(1));
    let bits_per_key = settings.number("bits");
    let seed = rand::random();
    let keys = Keys {
        state_seed: seed,
        run_seed: seed,
        prepared: 0,
        clock: Clock::new(events, events, Repeats::AnyTime),
    };
    let mut stream = Stream::new(keys, Load::Mix, Repeats::AnyTime);
    let rate = (-(bits_per_key as f64) * std::f64::consts::LN_2.powi(2)).exp();
    let mut textbook: BloomFilter<u128, Half> =
        BloomFilter::with_hashers(events as usize, rate, [Half(0), Half(64)]);
    let mut own = FilterAlone::new(events, bits_per_key);

    let (mut new_events, mut held, mut event) = (0_u64, 0_u64, 0_u64);
    let (mut predicted, mut false_drops, mut own_false_positives) = (0.0, 0_u64, 0_u64);
    let mut times = [Duration::ZERO; 5];
    let mut batch: Vec<Key> = Vec::new();
    while event < events {
        stream.fill(batch_events.min(events - event), &mut batch);
        let values: Vec<u128> = batch.iter().map(|key| spread(key.fingerprint.value())).collect();
        let is_new: Vec<bool> = (0..batch.len() as u64).map(|index| stream.is_new(event + index)).collect();
        let copies_now = copies_within(&batch);

        // The textbook's way: each event is looked up, and kept if it is not there.
        let probing = Instant::now();
        let seen: Vec<bool> = values.iter().map(|value| textbook.contains(value)).collect();
        times[0] += probing.elapsed();
        let inserting = Instant::now();
        for (value, seen) in values.iter().zip(&seen) {
            if !seen {
                textbook.insert(value);
            }
        }
        times[1] += inserting.elapsed();
        let new_of_batch = is_new.iter().filter(|new| **new).count() as u64;
        false_drops += seen.iter().zip(&is_new).filter(|(seen, new)| **seen && **new).count() as u64;
        let (bits, hashes) = (textbook.len() as f64, textbook.hasher_count() as f64);
        predicted += predicted_rate(held as f64, bits, hashes) * new_of_batch as f64;

        // The store's way: the batch is sorted, and walks the filter forward.
        let sorting = Instant::now();
        batch.sort_unstable_by_key(|key| key.fingerprint);
        times[2] += sorting.elapsed();
        let probing = Instant::now();
        let positives = batch.iter().filter(|key| own.may_contain(key.fingerprint)).count() as u64;
        times[3] += probing.elapsed();
        let inserting = Instant::now();
        batch.iter().for_each(|key| own.insert(key.fingerprint));
        times[4] += inserting.elapsed();
        // Repeats of earlier batches are true positives; those within the batch are not in the filter yet.
        own_false_positives += positives.saturating_sub(batch.len() as u64 - new_of_batch - copies_now);
        new_events += new_of_batch;
        held += new_of_batch;
        event += batch.len() as u64;
    }
    black_box(&own);
    let per_second = |time: Duration| events as f64 / time.as_secs_f64();
    Ok(json!({ "figure": "bloom", "events": events, "bits_per_key": bits_per_key, "seed": seed,
        "textbook": { "crate": "probabilistic-collections", "bits": textbook.len(),
            "hashes": textbook.hasher_count(), "probes_per_second": per_second(times[0]),
            "inserts_per_second": per_second(times[1]), "new_events": new_events, "false_drops": false_drops,
            "false_drops_predicted": predicted.round(), "false_drop_rate": false_drops as f64 / new_events as f64 },
        "own": { "probes_per_second": per_second(times[3]), "inserts_per_second": per_second(times[4]),
            "probes_per_second_with_the_sort": per_second(times[2] + times[3]),
            "false_positives_left_to_the_pages": own_false_positives,
            "false_positive_rate": own_false_positives as f64 / new_events as f64, "false_drops": 0 } }))
}

/// 88 bits as two halves of 64 that differ.
fn spread(value: u128) -> u128 {
    value | (value >> 44) << 88
}

/// Repeats whose first copy stands in the same batch.
fn copies_within(batch: &[Key]) -> u64 {
    let distinct: HashSet<_> = batch.iter().map(|key| key.fingerprint).collect();
    (batch.len() - distinct.len()) as u64
}
