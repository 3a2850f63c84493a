//! Buckets: slices of event time, and what a bucket holds in one number.
//!
//! The grid is aligned to the epoch. Times before the floor fall into one open first bucket `[i64::MIN, floor)`,
//! so event times that are garbage never make more buckets than there are windows. The floor is set once, from
//! the first keys that the state ever sees, and stands in the manifest; so does the width.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::Repeats;

/// Buckets below the first largest event time that stand on their own; older times share the open first bucket.
pub const FLOOR_BUCKETS: i64 = 64;
/// Buckets of one window when every live bucket is probed: few wide ones.
const ANY_TIME_BUCKETS: u128 = 8;
/// Buckets of one window when only a key's own bucket is probed: narrow ones, whose filters stay in memory.
const SAME_TIME_BUCKETS: u128 = 64;
/// Widths are whole hours: nothing expires yet, so a state must not run out of buckets in a few months.
const WIDTH_STEP_MS: u128 = 3_600_000;

/// Width of a bucket, in milliseconds: an eighth of the window with `any_time`, a 64th with `same_time`, rounded
/// up to whole hours.
pub fn bucket_width_ms(window: Duration, repeats: Repeats) -> i64 {
    let parts = match repeats {
        Repeats::AnyTime => ANY_TIME_BUCKETS,
        Repeats::SameTime => SAME_TIME_BUCKETS,
    };
    let width = window.as_millis().div_ceil(parts).max(1).next_multiple_of(WIDTH_STEP_MS);
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

/// How event time is cut into buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    width_ms: i64,
    floor: EventTimeMs,
}

impl Grid {
    /// The grid of a state whose first keys are at most this old.
    pub(super) fn below(largest: EventTimeMs, width_ms: i64) -> Self {
        let start = i128::from(largest.0.div_euclid(width_ms)) - i128::from(FLOOR_BUCKETS);
        Self { width_ms, floor: EventTimeMs(clamp(start * i128::from(width_ms))) }
    }

    /// The grid that a manifest or a ledger names.
    pub(super) fn with_floor(floor: EventTimeMs, width_ms: i64) -> Self {
        Self { width_ms, floor }
    }

    pub(super) fn floor(&self) -> EventTimeMs {
        self.floor
    }

    /// The bucket that a time falls into.
    pub(super) fn bucket_of(&self, time: EventTimeMs) -> Bucket {
        if time < self.floor {
            return Bucket { from: EventTimeMs(i64::MIN), to: self.floor };
        }
        let width = i128::from(self.width_ms);
        let start = i128::from(time.0.div_euclid(self.width_ms)) * width;
        // A floor that is no multiple of the width (named by a ledger of another width) cuts its bucket short.
        let from = EventTimeMs(clamp(start)).max(self.floor);
        Bucket { from, to: EventTimeMs(clamp(start + width)) }
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
        assert_eq!(bucket_width_ms(Duration::ZERO, Repeats::AnyTime), 3_600_000);
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

    proptest! {
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
