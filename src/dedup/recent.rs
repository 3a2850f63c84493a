//! Recent keys: the last ones written, in memory, since most repeats are near.
//!
//! One run per batch and bucket (per batch alone where every bucket is probed), as sorted columns of the highest 64 and
//! the lowest 24 bits: 11 bytes per key. A key that stands here stands in a segment too, so a hit answers a probe and a
//! miss answers nothing.
//!
//! Bounds: `keys_max` keys of at most [`BATCHES_MAX`] batches; the oldest batch leaves when a newer one needs its room.

use std::collections::{BTreeMap, VecDeque};

use super::bucket::Bucket;
use super::lookup::Probe;

/// Most batches: each lookup walks all of them, and small ones take more than their keys.
const BATCHES_MAX: usize = 64;
/// Bytes per key.
pub(super) const RECENT_KEY_BYTES: u64 = 11;

/// Sorted fingerprints.
#[derive(Debug, Default)]
pub(super) struct Run {
    highs: Vec<u64>,
    lows: Vec<[u8; 3]>,
}

impl Run {
    pub(super) fn with_capacity(keys: usize) -> Self {
        Self { highs: Vec::with_capacity(keys), lows: Vec::with_capacity(keys) }
    }

    /// Takes the next fingerprint, in ascending order.
    pub(super) fn push(&mut self, value: u128) {
        self.highs.push((value >> 24) as u64);
        let low = (value as u32).to_le_bytes();
        self.lows.push([low[0], low[1], low[2]]);
    }

    fn mark_found(&self, probes: &mut [Probe]) {
        let mut at = 0;
        for probe in probes {
            let value = probe.value();
            let (high, low) = ((value >> 24) as u64, (value as u32).to_le_bytes());
            at += count_below(&self.highs[at..], high);
            let mut same = at;
            while self.highs.get(same) == Some(&high) {
                if self.lows[same] == low[..3] {
                    probe.mark_found();
                }
                same += 1;
            }
            if at == self.highs.len() {
                return;
            }
        }
    }
}

/// How many of the sorted numbers lie below one: looks near first, in growing steps.
fn count_below(sorted: &[u64], number: u64) -> usize {
    let mut reach = 1;
    while reach <= sorted.len() && sorted[reach - 1] < number {
        reach *= 2;
    }
    let begin = reach / 2;
    begin + sorted[begin..(reach - 1).min(sorted.len())].partition_point(|other| *other < number)
}

/// Runs of one batch. Where every bucket is probed they stand under `None`.
pub(super) type BatchRuns = BTreeMap<Option<Bucket>, Run>;

/// The last batches' keys.
#[derive(Debug)]
pub(super) struct Recent {
    keys_max: u64,
    keys: u64,
    batches: VecDeque<BatchRuns>,
}

impl Recent {
    pub(super) fn new(keys_max: u64) -> Self {
        Self { keys_max, keys: 0, batches: VecDeque::new() }
    }

    /// Whether a batch of so many keys is kept. A larger one is not, and pushes no other out.
    pub(super) fn takes(&self, keys: u64) -> bool {
        keys <= self.keys_max
    }

    pub(super) fn bytes(&self) -> u64 {
        self.keys * RECENT_KEY_BYTES
    }

    /// Takes a batch that was written, all of it or, if it is too large, nothing.
    pub(super) fn push(&mut self, runs: BatchRuns) {
        self.keys += keys_of(&runs);
        self.batches.push_back(runs);
        while self.keys > self.keys_max || self.batches.len() > BATCHES_MAX {
            self.keys -= self.batches.pop_front().as_ref().map_or(0, keys_of);
        }
    }

    /// Drops all: buckets expired, so a key that stands here may no longer be asked for.
    pub(super) fn clear(&mut self) {
        (self.keys, self.batches) = (0, VecDeque::new());
    }

    /// Drops the batch that came last: it was abandoned.
    pub(super) fn forget_last(&mut self) {
        self.keys -= self.batches.pop_back().as_ref().map_or(0, keys_of);
    }

    /// Marks the probes, sorted by fingerprint, that were written lately, in this bucket if one is given.
    pub(super) fn mark_found(&self, bucket: Option<Bucket>, probes: &mut [Probe]) {
        for runs in &self.batches {
            if let Some(run) = runs.get(&bucket) {
                run.mark_found(probes);
            }
        }
    }
}

fn keys_of(runs: &BatchRuns) -> u64 {
    runs.values().map(|run| run.highs.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn runs(values: &BTreeSet<u128>) -> BatchRuns {
        let mut run = Run::default();
        values.iter().for_each(|value| run.push(*value));
        BatchRuns::from([(None, run)])
    }

    proptest! {
        /// Goal: the keys of the last batches that fit are found, and no others.
        #[test]
        fn recent_keys_are_those_of_the_last_batches(
            batches in prop::collection::vec(prop::collection::btree_set(
                prop_oneof![0u128..300, (0u128..40).prop_map(|high| high << 24 | 7)], 0..60), 0..8),
            keys_max in 0u64..120,
        ) {
            let mut recent = Recent::new(keys_max);
            batches.iter().for_each(|batch| recent.push(runs(batch)));
            let (mut kept, mut count) = (BTreeSet::new(), 0);
            for batch in batches.iter().rev() {
                count += batch.len() as u64;
                if count > keys_max {
                    break;
                }
                kept.extend(batch.iter().copied());
            }
            let asked: Vec<u128> = (0..320).chain((0..40).map(|high| high << 24 | 7)).collect::<BTreeSet<_>>()
                .into_iter().collect();
            let mut probes: Vec<Probe> = asked.iter().map(|value| Probe::new(*value, 0)).collect();
            recent.mark_found(None, &mut probes);
            for (value, probe) in asked.iter().zip(&probes) {
                prop_assert_eq!(probe.is_found(), kept.contains(value), "{}", value);
            }
        }
    }

    #[test]
    fn an_abandoned_batch_is_forgotten() {
        let mut recent = Recent::new(10);
        recent.push(runs(&BTreeSet::from([1, 2])));
        recent.push(runs(&BTreeSet::from([3])));
        recent.forget_last();
        let mut probes: Vec<Probe> = (1..4).map(|value| Probe::new(value, 0)).collect();
        recent.mark_found(None, &mut probes);
        assert_eq!(probes.iter().map(|probe| probe.is_found()).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(recent.bytes(), 2 * RECENT_KEY_BYTES);
    }
}
