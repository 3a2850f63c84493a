//! Buckets: slices of event time, and what a bucket holds in one number.
//!
//! The grid is aligned to the epoch. Times before the floor fall into one open first bucket `[i64::MIN, floor)`,
//! so event times that are garbage never make more buckets than there are windows. The floor is set once, from
//! the first keys that the state ever sees, and stands in the manifest; so do the widths. A new width begins where
//! the last bucket that holds a key ends: the boundaries of buckets that hold keys never move. Until then the widths
//! before it are [`Era`]s, and a bucket ends where its era does.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use super::Key;
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::Repeats;

/// Buckets below the first largest event time that stand on their own; older times share the open first bucket.
pub const FLOOR_BUCKETS: i64 = 64;
/// Buckets of one window when every live bucket is probed: few wide ones.
const ANY_TIME_BUCKETS: u128 = 8;
/// Buckets of one window when only a key's own bucket is probed: narrow ones, whose filters stay in memory.
const SAME_TIME_BUCKETS: u128 = 64;
/// Widths from here on are whole multiples of it.
const WIDTH_STEP_MS: u128 = 3_600_000;
/// Widths below an hour are whole multiples of ten minutes: a backlog of a year still falls into fewer buckets than
/// [`BUCKETS_MAX`](super::BUCKETS_MAX).
const NARROW_WIDTH_STEP_MS: u128 = 600_000;
/// Most earlier widths that a state remembers. They are forgotten with their last bucket; until then a further width
/// waits.
pub const ERAS_MAX: usize = 4;

/// Width of a bucket, in milliseconds: an eighth of the window with `any_time`, a 64th with `same_time`, rounded
/// up to whole hours, or, below an hour, to whole ten minutes.
pub fn bucket_width_ms(window: Duration, repeats: Repeats) -> i64 {
    let parts = match repeats {
        Repeats::AnyTime => ANY_TIME_BUCKETS,
        Repeats::SameTime => SAME_TIME_BUCKETS,
    };
    let width = window.as_millis().div_ceil(parts).max(1);
    let step = if width < WIDTH_STEP_MS { NARROW_WIDTH_STEP_MS } else { WIDTH_STEP_MS };
    let width = width.next_multiple_of(step);
    i64::try_from(width).unwrap_or(i64::MAX)
}

/// A slice of event time, `[from, to)`. The first one is open: its `from` is `i64::MIN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Bucket {
    /// Begin, inclusive.
    pub from: EventTimeMs,
    /// End, exclusive.
    pub to: EventTimeMs,
}

impl Bucket {
    /// A key of this bucket whose event time within it is not known.
    pub(super) fn key(self, fingerprint: Fingerprint) -> Key {
        Key { fingerprint, event_time: self.to.minus_ms(1) }
    }

    /// Whether a time falls into it.
    pub fn holds(&self, time: EventTimeMs) -> bool {
        self.from <= time && time < self.to
    }

    /// Whether another slice lies in it as a whole.
    pub fn covers(&self, other: Bucket) -> bool {
        self.from <= other.from && other.to <= self.to
    }
}

/// An earlier width: buckets before `until` have it, back to the era before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Era {
    /// First event time that no longer has this width; the end of a bucket.
    pub until: EventTimeMs,
    /// Width of a bucket, in milliseconds, at least 1.
    pub bucket_width_ms: i64,
}

/// How event time is cut into buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    floor: EventTimeMs,
    /// Of all times that no era holds.
    width_ms: i64,
    /// The first `era_count` count, ascending.
    eras: [Era; ERAS_MAX],
    era_count: usize,
}

impl Grid {
    /// The grid of a state whose first keys are at most this old.
    pub(super) fn below(largest: EventTimeMs, width_ms: i64) -> Self {
        let start = i128::from(largest.0.div_euclid(width_ms)) - i128::from(FLOOR_BUCKETS);
        Self::with_floor(EventTimeMs(clamp(start * i128::from(width_ms))), width_ms)
    }

    /// The grid of a state whose width never changed.
    pub(super) fn with_floor(floor: EventTimeMs, width_ms: i64) -> Self {
        Self::of(floor, width_ms, &[])
    }

    /// The grid that a manifest or a ledger names; at most [`ERAS_MAX`] eras, ascending.
    pub(super) fn of(floor: EventTimeMs, width_ms: i64, earlier: &[Era]) -> Self {
        let mut eras = [Era { until: EventTimeMs(i64::MIN), bucket_width_ms: 1 }; ERAS_MAX];
        eras[..earlier.len()].copy_from_slice(earlier);
        Self { floor, width_ms, eras, era_count: earlier.len() }
    }

    pub(super) fn floor(&self) -> EventTimeMs {
        self.floor
    }

    /// The bucket that a time falls into.
    pub(super) fn bucket_of(&self, time: EventTimeMs) -> Bucket {
        if time < self.floor {
            return Bucket { from: EventTimeMs(i64::MIN), to: self.floor };
        }
        let eras = &self.eras[..self.era_count];
        let era_index = eras.partition_point(|era| era.until <= time);
        let (width_ms, end) = match eras.get(era_index) {
            Some(era) => (era.bucket_width_ms, era.until),
            None => (self.width_ms, EventTimeMs(i64::MAX)),
        };
        // A floor or an era's begin that is no multiple of the width cuts its first bucket short.
        let begin = era_index.checked_sub(1).map_or(self.floor, |before| eras[before].until.max(self.floor));
        let width = i128::from(width_ms);
        let start = i128::from(time.0.div_euclid(width_ms)) * width;
        let from = EventTimeMs(clamp(start)).max(begin);
        Bucket { from, to: EventTimeMs(clamp(start + width)).min(end) }
    }
}

fn clamp(ms: i128) -> i64 {
    ms.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

/// Sum mod 2^128 of XXH3-128 over fingerprints: the same for the same set in any order. Shown as 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub u128);

impl fmt::Display for Digest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:032x}", self.0)
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(&text, 16) {
            Ok(value) if hex => Ok(Self(value)),
            _ => Err(format!("digest {text:?} is not 32 lower-case hex digits")),
        }
    }
}

/// How many keys, and which ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tally {
    /// Number of keys.
    pub keys: u64,
    /// Which keys.
    pub digest: Digest,
}

impl Tally {
    /// Counts one more key.
    pub fn add(&mut self, fingerprint: Fingerprint) {
        self.keys += 1;
        self.digest.0 = self.digest.0.wrapping_add(xxh3_128(fingerprint.as_bytes()));
    }

    /// Counts the keys of another tally too.
    pub fn add_all(&mut self, other: Tally) {
        self.keys += other.keys;
        self.digest.0 = self.digest.0.wrapping_add(other.digest.0);
    }

    /// Takes back keys that were counted; `None` if they are more than there are.
    pub fn less(self, other: Tally) -> Option<Tally> {
        let keys = self.keys.checked_sub(other.keys)?;
        Some(Tally { keys, digest: Digest(self.digest.0.wrapping_sub(other.digest.0)) })
    }
}

/// A bucket and the keys in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BucketTally {
    /// Begin, inclusive; `i64::MIN` for the open first bucket.
    pub from: EventTimeMs,
    /// End, exclusive.
    pub to: EventTimeMs,
    /// Number of keys.
    pub keys: u64,
    /// Which keys: the same for the same set, in whatever order and files.
    pub digest: Digest,
}

impl BucketTally {
    pub(super) fn new(bucket: Bucket, tally: Tally) -> Self {
        Self { from: bucket.from, to: bucket.to, keys: tally.keys, digest: tally.digest }
    }

    /// The bucket alone.
    pub fn bucket(&self) -> Bucket {
        Bucket { from: self.from, to: self.to }
    }

    /// The keys alone.
    pub fn tally(&self) -> Tally {
        Tally { keys: self.keys, digest: self.digest }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: i64 = 86_400_000;

    #[test]
    fn any_time_buckets_are_an_eighth_of_the_window_and_same_time_ones_narrower() {
        let week = Duration::from_secs(7 * 86_400);
        assert_eq!(bucket_width_ms(week, Repeats::AnyTime), 7 * DAY_MS / 8);
        assert_eq!(bucket_width_ms(week, Repeats::SameTime), 3 * 3_600_000);
        assert_eq!(bucket_width_ms(Duration::from_secs(3_600), Repeats::AnyTime), 600_000);
        assert_eq!(bucket_width_ms(Duration::from_secs(8 * 3_600), Repeats::AnyTime), 3_600_000);
        assert_eq!(bucket_width_ms(Duration::ZERO, Repeats::AnyTime), 600_000);
        assert_eq!(bucket_width_ms(Duration::MAX, Repeats::AnyTime), i64::MAX);
    }

    #[test]
    fn times_before_the_floor_share_one_open_bucket() {
        let grid = Grid::below(EventTimeMs(100 * DAY_MS + 5), DAY_MS);
        assert_eq!(grid.floor(), EventTimeMs(36 * DAY_MS));
        let first = Bucket { from: EventTimeMs(i64::MIN), to: EventTimeMs(36 * DAY_MS) };
        assert_eq!(grid.bucket_of(EventTimeMs(0)), first);
        assert_eq!(grid.bucket_of(EventTimeMs(i64::MIN)), first);
        assert_eq!(grid.bucket_of(EventTimeMs(36 * DAY_MS - 1)), first);
        assert_eq!(grid.bucket_of(EventTimeMs(36 * DAY_MS)).from, EventTimeMs(36 * DAY_MS));
    }

    #[test]
    fn a_digest_does_not_depend_on_order_and_can_be_taken_back() {
        let keys: Vec<Fingerprint> = (0..5u128).map(Fingerprint::from_value).collect();
        let (mut forward, mut backward) = (Tally::default(), Tally::default());
        keys.iter().for_each(|key| forward.add(*key));
        keys.iter().rev().for_each(|key| backward.add(*key));
        assert_eq!(forward, backward);
        let mut one = Tally::default();
        one.add(keys[3]);
        let mut others = Tally::default();
        keys.iter().filter(|key| **key != keys[3]).for_each(|key| others.add(*key));
        assert_eq!(forward.less(one), Some(others));
        assert_eq!(one.less(forward), None);
        assert_eq!(Digest::try_from(forward.digest.to_string()), Ok(forward.digest));
    }

    #[test]
    fn a_new_width_leaves_the_buckets_before_it_as_they_were() {
        let before = Grid::with_floor(EventTimeMs(0), 10);
        let era = Era { until: EventTimeMs(70), bucket_width_ms: 10 };
        let after = Grid::of(EventTimeMs(0), 25, &[era]);
        for time in (-5..70).map(EventTimeMs) {
            assert_eq!(after.bucket_of(time), before.bucket_of(time));
        }
        let bucket = |from, to| Bucket { from: EventTimeMs(from), to: EventTimeMs(to) };
        assert_eq!(after.bucket_of(EventTimeMs(69)), bucket(60, 70));
        assert_eq!(after.bucket_of(EventTimeMs(70)), bucket(70, 75));
        assert_eq!(after.bucket_of(EventTimeMs(75)), bucket(75, 100));
    }

    proptest! {
        /// Goal: buckets of several widths cover all times, end to end.
        #[test]
        fn buckets_of_all_eras_touch(
            floor in -1_000i64..1_000, widths in prop::collection::vec((1i64..300, 1i64..400), 1..=ERAS_MAX + 1)
        ) {
            let mut until = floor;
            let mut eras = Vec::new();
            for (width, span) in &widths[1..] {
                until += span;
                eras.push(Era { until: EventTimeMs(until), bucket_width_ms: *width });
            }
            let grid = Grid::of(EventTimeMs(floor), widths[0].0, &eras);
            let mut time = EventTimeMs(floor - 1);
            while time.0 < until + 1_000 {
                let bucket = grid.bucket_of(time);
                prop_assert!(bucket.holds(time));
                prop_assert_eq!(grid.bucket_of(bucket.to.minus_ms(1)), bucket);
                prop_assert_eq!(grid.bucket_of(bucket.to).from, bucket.to);
                time = bucket.to;
            }
        }

        /// Goal: every time of i64 lies in exactly one bucket, and all times of a bucket agree on it.
        #[test]
        fn buckets_cover_time_without_overlap(time in any::<i64>(), largest in any::<i64>(), width in 1i64..1 << 40) {
            let grid = Grid::below(EventTimeMs(largest), width);
            let bucket = grid.bucket_of(EventTimeMs(time));
            prop_assert!(bucket.from.0 <= time && (time < bucket.to.0 || bucket.to.0 == i64::MAX));
            prop_assert_eq!(grid.bucket_of(bucket.from), bucket);
            prop_assert_eq!(grid.bucket_of(EventTimeMs(bucket.to.0 - 1)), bucket);
        }
    }
}
