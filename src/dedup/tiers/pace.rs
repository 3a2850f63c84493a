//! How fast merges go: as slowly as keeps up.
//!
//! Every key passes once through each tier, so a merge of any tier keeps up if it is as fast as keys come in. It is
//! given eight times that: a merge then takes about as long as one batch of its inputs' size, and in the meantime few
//! segments more than a full tier are probed. With twice the rate, 25 segments stood where 15 do, and every batch paid for
//! them (`benches/run dedup` at 1e8 keys). Large merges are given three times the rate: they take minutes of a core and of
//! the disk, and until they end three or four of their segments more are probed. A `prepare` that has to wait for a merge
//! takes the limit away.

use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Speed of a merge in keys per second when hardly anything comes in: a third of a core, and 80 MB/s of reads and of
/// writes. So a merge of eight batches of a million ends within a second also in a process that lives no longer.
const KEYS_PER_SECOND_MIN: f64 = 8e6;
/// Speed of a merge against that of the keys that come in.
const INGEST_FACTOR: f64 = 8.0;
/// Keys from which on a merge is large, and speed of a large one against that of the keys that come in, and at least.
const LARGE_MERGE_KEYS: u64 = 128 << 20;
const LARGE_INGEST_FACTOR: f64 = 3.0;
const LARGE_KEYS_PER_SECOND_MIN: f64 = 1.5e6;
/// Weight of the last batch in the mean of the ingest rate: a change of the rate is followed within some four
/// batches, half as many as fill a tier.
const LAST_BATCH_WEIGHT: f64 = 0.25;

/// Mean of the keys per second that come in, from one `prepare` to the next.
#[derive(Debug, Default)]
pub(super) struct IngestRate {
    keys_per_second: f64,
    prepared_at: Option<Instant>,
    #[cfg(test)]
    is_held: bool,
}

impl IngestRate {
    /// Counts the keys of a batch that is prepared now. The first one tells nothing: there is no time before it.
    pub(super) fn note(&mut self, keys: u64, now: Instant) {
        if let Some(before) = self.prepared_at.replace(now) {
            let seconds = now.saturating_duration_since(before).as_secs_f64().max(1e-3);
            let last = keys as f64 / seconds;
            self.keys_per_second += (last - self.keys_per_second) * LAST_BATCH_WEIGHT;
        }
    }

    /// Keys per second that a merge of so many keys may take.
    pub(super) fn merge_speed(&self, keys: u64) -> f64 {
        #[cfg(test)]
        if self.is_held {
            return 1e-3;
        }
        let (factor, least) = if keys < LARGE_MERGE_KEYS {
            (INGEST_FACTOR, KEYS_PER_SECOND_MIN)
        } else {
            (LARGE_INGEST_FACTOR, LARGE_KEYS_PER_SECOND_MIN)
        };
        (self.keys_per_second * factor).max(least)
    }

    /// From now on a merge ends only if someone waits for it.
    #[cfg(test)]
    pub(super) fn hold(&mut self) {
        self.is_held = true;
    }
}

/// The speed of one merge, set from outside while it runs.
#[derive(Debug)]
pub(super) struct Pace {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    keys_per_second: f64,
    /// When the keys that were let through so far may be done.
    due: Instant,
    hurries: bool,
    is_cancelled: bool,
}

impl Pace {
    pub(super) fn new(keys_per_second: f64) -> Self {
        let state = State { keys_per_second, due: Instant::now(), hurries: false, is_cancelled: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn set_speed(&self, keys_per_second: f64) {
        self.state().keys_per_second = keys_per_second;
    }

    /// Someone waits: no limit from now on.
    pub(super) fn hurry(&self) {
        self.state().hurries = true;
        self.changed.notify_all();
    }

    /// The merge ends at its next step.
    pub(super) fn cancel(&self) {
        self.state().is_cancelled = true;
        self.changed.notify_all();
    }

    /// Waits until `keys` more may be merged; says whether to go on at all. Time in which the merge was slower than
    /// its limit is not made up for.
    pub(super) fn pass(&self, keys: u64) -> ControlFlow<()> {
        let mut state = self.state();
        let takes = Duration::from_secs_f64(keys as f64 / state.keys_per_second);
        state.due = (state.due + takes).max(Instant::now());
        while !state.hurries && !state.is_cancelled {
            let left = state.due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.is_cancelled { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Plain values: whoever panicked while holding the lock left them whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_are_faster_than_keys_come_in_and_never_slower_than_the_least_speed() {
        let mut rate = IngestRate::default();
        assert_eq!(rate.merge_speed(0), KEYS_PER_SECOND_MIN);
        let begin = Instant::now();
        for second in 0..100 {
            rate.note(5_000_000, begin + Duration::from_secs(second));
        }
        for (keys, factor) in [(1, INGEST_FACTOR), (LARGE_MERGE_KEYS, LARGE_INGEST_FACTOR)] {
            assert!((rate.merge_speed(keys) - 5e6 * factor).abs() < 1e4, "{}", rate.merge_speed(keys));
        }
        for second in 100..200 {
            rate.note(10, begin + Duration::from_secs(second));
        }
        assert_eq!(rate.merge_speed(0), KEYS_PER_SECOND_MIN);
    }

    #[test]
    fn a_merge_that_is_waited_for_is_not_held_up_and_one_that_is_cancelled_stops() {
        let pace = Pace::new(1e-6);
        std::thread::scope(|scope| {
            // A key would take twelve days.
            let merge = scope.spawn(|| (pace.pass(1), pace.pass(1)));
            pace.hurry();
            assert_eq!(merge.join().unwrap(), (ControlFlow::Continue(()), ControlFlow::Continue(())));
        });
        pace.cancel();
        assert_eq!(pace.pass(1), ControlFlow::Break(()));
    }
}
