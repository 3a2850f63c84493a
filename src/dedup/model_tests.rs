//! The dedup state against a plain set: long histories with restarts, and fingerprints so narrow that they collide.

use std::collections::HashSet;

use proptest::prelude::*;
use uuid::Uuid;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::corruption_tests::folder_in_memory;
use super::store_tests::NOTHING_PINNED;
use super::*;

const WIDTH_MS: i64 = 1_000;

/// Where a bucket of the grid begins, within the times that there are.
fn grid_time(bucket: i64) -> i64 {
    (i128::from(bucket) * i128::from(WIDTH_MS)).clamp(i64::MIN.into(), i64::MAX.into()) as i64
}

fn spec(repeats: Repeats) -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(11),
        key_spec_hash: "model".into(),
        seed: 5,
        shards: 256,
        bucket_width_ms: WIDTH_MS,
        repeats,
    }
}

/// A key of the model: its number and its event time.
type ModelKey = (u64, i64);

fn keys_of(batch: &[ModelKey]) -> Vec<Key> {
    let key = |(number, time): &ModelKey| Key {
        fingerprint: Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40),
        event_time: EventTimeMs(*time),
    };
    batch.iter().map(key).collect()
}

/// What the documentation says, with plain sets. A key is what may be found together: its number alone with
/// `any_time`, number and bucket with `same_time`.
#[derive(Debug, Clone)]
struct Model {
    repeats: Repeats,
    /// End of the open first bucket, once the first keys have set it.
    floor: Option<i64>,
    seen: HashSet<(u64, i64)>,
    /// Number and bucket of each key that was written, and so counted.
    written: HashSet<(u64, i64)>,
}

impl Model {
    fn new(repeats: Repeats) -> Self {
        Self { repeats, floor: None, seen: HashSet::new(), written: HashSet::new() }
    }

    fn bucket(&self, time: i64) -> i64 {
        match self.floor {
            Some(floor) if time >= floor => grid_time(time.div_euclid(WIDTH_MS)),
            _ => i64::MIN,
        }
    }

    fn probe(&mut self, batch: &[ModelKey]) -> Vec<Verdict> {
        if let (None, Some(largest)) = (self.floor, batch.iter().map(|(_, time)| *time).max()) {
            self.floor = Some(grid_time(largest.div_euclid(WIDTH_MS) - FLOOR_BUCKETS));
        }
        let mut verdicts = Vec::with_capacity(batch.len());
        for (number, time) in batch {
            let bucket = self.bucket(*time);
            let scope = if self.repeats == Repeats::SameTime { bucket } else { 0 };
            let new = self.seen.insert((*number, scope));
            if new {
                self.written.insert((*number, bucket));
            }
            verdicts.push(if new { Verdict::New } else { Verdict::Duplicate });
        }
        verdicts
    }

    fn buckets(&self) -> Vec<(i64, u64)> {
        let mut buckets = std::collections::BTreeMap::new();
        for (_, bucket) in &self.written {
            *buckets.entry(*bucket).or_insert(0) += 1;
        }
        buckets.into_iter().collect()
    }
}

/// What a caller may do, in any order.
#[derive(Debug, Clone)]
enum Step {
    Probe(Vec<ModelKey>),
    /// Commits what was probed.
    Commit,
    /// Commits while the next microbatch is probed; `true` if the commit lands.
    CommitBehind(Vec<ModelKey>, bool),
    /// Gives the microbatch up, written or not.
    Abandon {
        prepared: bool,
    },
    /// Ends the process and opens a kept generation: the newest, or an older one as after a roll-back.
    Restart {
        back: usize,
    },
}

/// Event times: on both sides of bucket boundaries, around the floor, and as far away as numbers go.
fn event_time() -> impl Strategy<Value = i64> {
    let bucket = 10_000 - 70..10_006i64;
    prop_oneof![
        10 => (10_000..10_004i64, 0..WIDTH_MS).prop_map(|(bucket, within)| bucket * WIDTH_MS + within),
        6 => (bucket, prop_oneof![Just(-1), Just(0), Just(1)])
            .prop_map(|(bucket, side)| bucket * WIDTH_MS + side),
        1 => prop_oneof![Just(0), Just(i64::MIN), Just(-5)],
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = || prop::collection::vec((0u64..120, event_time()), 0..50);
    let step = prop_oneof![
        8 => batch().prop_map(Step::Probe),
        8 => Just(Step::Commit),
        3 => (batch(), any::<bool>()).prop_map(|(keys, lands)| Step::CommitBehind(keys, lands)),
        2 => any::<bool>().prop_map(|prepared| Step::Abandon { prepared }),
        2 => (0usize..3).prop_map(|back| Step::Restart { back }),
    ];
    prop::collection::vec(step, 1..90)
}

/// A committed generation and what the model was then.
struct Kept {
    generation: GenerationRef,
    model: Model,
}

fn agree(steps: Vec<Step>, repeats: Repeats, limits: Limits) -> Result<(), TestCaseError> {
    let folder = folder_in_memory();
    let open = |kept: Option<&Kept>| {
        let generation = kept.map(|kept| &kept.generation);
        Store::open_within(folder.path(), spec(repeats), generation, limits).unwrap()
    };
    let mut store = open(None);
    let mut model = Model::new(repeats);
    let mut kept: Vec<Kept> = Vec::new();
    let committed = |kept: &[Kept]| kept.last().map_or(Model::new(repeats), |kept| kept.model.clone());
    let mut epoch = 1;
    for (batch, step) in steps.into_iter().enumerate() {
        let name = GenerationName::new(epoch, batch as u64, Uuid::new_v4());
        match step {
            Step::Probe(keys) => prop_assert_eq!(store.probe(&keys_of(&keys)).unwrap(), model.probe(&keys)),
            Step::Commit => {
                let generation = store.prepare(name).unwrap();
                store.publish();
                kept.push(Kept { generation, model: model.clone() });
            }
            Step::CommitBehind(keys, lands) => {
                let generation = store.prepare(name).unwrap();
                let prepared = model.clone();
                prop_assert_eq!(store.probe(&keys_of(&keys)).unwrap(), model.probe(&keys));
                if lands {
                    store.publish();
                    kept.push(Kept { generation, model: prepared });
                } else {
                    store.abandon();
                    model = committed(&kept);
                }
            }
            Step::Abandon { prepared } => {
                if prepared {
                    store.prepare(name).unwrap();
                }
                store.abandon();
                model = committed(&kept);
            }
            Step::Restart { back } => {
                kept.truncate(kept.len().saturating_sub(back));
                epoch += 1;
                store = open(kept.last());
                model = committed(&kept);
            }
        }
        // Only `prepare` counts keys into buckets, so they are those of the newest generation.
        let counted: Vec<(i64, u64)> =
            store.buckets().iter().map(|bucket| (bucket.from.0, bucket.keys)).collect();
        prop_assert_eq!(counted, committed(&kept).buckets());
    }
    for kept in &kept {
        let keys: u64 = kept.model.buckets().iter().map(|(_, keys)| keys).sum();
        prop_assert_eq!(verify(folder.path(), &kept.generation).unwrap().keys, keys);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Goal: whatever happens between two batches, verdicts, counts and buckets are those of plain sets.
    /// Method: few keys force repeats, many commits force merges of two tiers, times sit on bucket boundaries, processes end
    /// at any point and open the newest or an older generation.
    #[test]
    fn any_history_of_batches_restarts_and_roll_backs_agrees_with_plain_sets(
        steps in steps(),
        repeats in prop_oneof![Just(Repeats::AnyTime), Just(Repeats::SameTime)],
        memory in prop_oneof![Just(NOTHING_PINNED), Just(Limits::of(0)), Just(Limits::of(64 << 20))],
    ) {
        agree(steps, repeats, memory)?;
    }

    /// Goal: both sides of a bucket's boundary are told apart with `same_time` and are one with `any_time`.
    #[test]
    fn a_bucket_begins_at_its_boundary_and_ends_before_the_next(
        bucket in -1_000i64..1_000,
        within in 0..WIDTH_MS,
        commits in any::<bool>(),
    ) {
        for repeats in [Repeats::AnyTime, Repeats::SameTime] {
            let folder = folder_in_memory();
            let mut store = Store::open(folder.path(), spec(repeats), None, 0).unwrap();
            let from = bucket * WIDTH_MS;
            prop_assert_eq!(store.probe(&keys_of(&[(1, from + within)])).unwrap(), [Verdict::New]);
            if commits {
                store.prepare(GenerationName::new(1, 1, Uuid::new_v4())).unwrap();
                store.publish();
            }
            let inside = store.probe(&keys_of(&[(1, from), (1, from + WIDTH_MS - 1)])).unwrap();
            prop_assert_eq!(inside, [Verdict::Duplicate; 2]);
            let outside = store.probe(&keys_of(&[(1, from - 1), (1, from + WIDTH_MS)])).unwrap();
            let expected = if repeats == Repeats::AnyTime { Verdict::Duplicate } else { Verdict::New };
            prop_assert_eq!(outside, [expected; 2]);
        }
    }
}

/// Bits that are kept of a key's hash where collisions are wanted.
const NARROW_BITS: u32 = 32;

/// The hash of a key, cut down.
fn narrow(number: u64) -> u64 {
    xxh3_64(&number.to_le_bytes()) >> (u64::BITS - NARROW_BITS)
}

/// One fingerprint per narrow hash, all 88 bits of it used.
fn widened(narrow: u64) -> Fingerprint {
    let low_bits = 88 - NARROW_BITS;
    let low = u128::from(xxh3_64(&narrow.to_le_bytes())) & ((1 << low_bits) - 1);
    Fingerprint::from_value(u128::from(narrow) << low_bits | low)
}

/// Goal: the chance of a false drop is that of equal fingerprints, and of nothing else in the store.
/// Method: distinct keys with 32 bits of hash, so that some hundred collide; each verdict is compared to a set of the
/// narrow hashes, and their number to n^2 / 2^33, the mean of a Poisson distribution.
#[test]
fn keys_collide_as_often_as_their_fingerprints_and_never_otherwise() {
    const KEYS: u64 = 1_200_000;
    const BATCH_KEYS: u64 = 60_000;
    for (repeats, limits) in [(Repeats::AnyTime, Limits::of(0)), (Repeats::SameTime, NOTHING_PINNED)] {
        let folder = folder_in_memory();
        let mut store = Store::open_within(folder.path(), spec(repeats), None, limits).unwrap();
        let mut model = HashSet::new();
        let mut dropped = 0;
        let mut generation = None;
        for begin in (0..KEYS).step_by(BATCH_KEYS as usize) {
            // With `any_time` a collision is one across buckets too; `same_time` is given one bucket.
            let time =
                |number: u64| if repeats == Repeats::AnyTime { number as i64 % 5 * WIDTH_MS } else { 0 };
            let batch: Vec<Key> = (begin..begin + BATCH_KEYS)
                .map(|number| Key {
                    fingerprint: widened(narrow(number)),
                    event_time: EventTimeMs(time(number)),
                })
                .collect();
            let verdicts = store.probe(&batch).unwrap();
            for (number, verdict) in (begin..).zip(verdicts) {
                let first = model.insert(narrow(number));
                assert_eq!(verdict == Verdict::New, first, "key {number}");
                dropped += u64::from(!first);
            }
            let name = GenerationName::new(1, begin, Uuid::new_v4());
            generation = Some(store.prepare(name).unwrap());
            store.publish();
        }
        let predicted = (KEYS as f64).powi(2) / 2f64.powi(NARROW_BITS as i32 + 1);
        let sigma = predicted.sqrt();
        assert!(
            (dropped as f64 - predicted).abs() < 5.0 * sigma,
            "{dropped} of {KEYS} keys were dropped, {predicted:.0} +- {sigma:.0} are predicted"
        );
        assert_eq!(verify(folder.path(), &generation.unwrap()).unwrap().keys, KEYS - dropped);
    }
}
