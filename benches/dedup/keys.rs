//! Keys by arithmetic: a stream whose truth is known without remembering it.
//!
//! Key number `i` is 16 random-looking bytes, a function of `i` and a seed. An event is either the next number, which
//! was never there before, or a number below it, which certainly was. So after any number of events the truth is
//! arithmetic, and the same arithmetic stands in `rocksdb/anchor.cc`, to the bit.
//!
//! Event time grows with the number: the numbers that stand in the state at the begin of a run spread evenly over the
//! buckets of a window, as a real stream leaves them.

use tidemill::dedup::{Key, Verdict};
use tidemill::event_time::EventTimeMs;
use tidemill::fingerprint::Fingerprint;
use tidemill::job::Repeats;

/// Near repeats lie among this many last keys.
pub const NEAR_KEYS: u64 = 5_000_000;
/// Of a hundred events this many are new.
const NEW_PERCENT: u64 = 94;
/// Of a hundred events of the load `mix` those from here on repeat any earlier key.
const ANYWHERE_PERCENT: u64 = 98;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
const FIRST_EVENT_TIME_MS: u64 = 1_735_689_600_000;
/// Width of a bucket: an hour, though no figure depends on it.
pub const BUCKET_WIDTH_MS: u64 = 3_600_000;

/// The finalizer of splitmix64.
fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A number below `below`, from a number of 64 random bits.
fn scaled(draw: u64, below: u64) -> u64 {
    ((u128::from(draw) * u128::from(below)) >> 64) as u64
}

/// The bytes of key number `number`.
pub fn id(seed: u64, number: u64) -> [u8; 16] {
    let step = number.wrapping_mul(STEP);
    let high = mixed(seed.wrapping_add(step));
    let low = mixed(seed.rotate_left(32) ^ step);
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}

/// Where repeats come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// 94 % new, 4 % of the last keys, 2 % of all keys.
    Mix,
    /// 94 % new, 6 % of all keys.
    Worst,
}

/// Event times of a state of `keys` keys.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    keys: u64,
    window_ms: u64,
    /// Event time of one run beyond the state, and its keys.
    run: (u64, u64),
}

impl Clock {
    /// The state's keys fill the buckets of one window. A run adds keys at the same pace, but no more than a quarter of
    /// a window: nothing expires here, and a small state would end up in more buckets than a window has.
    pub fn new(keys: u64, run_keys: u64, repeats: Repeats) -> Self {
        let buckets = match repeats {
            Repeats::AnyTime => 8,
            Repeats::SameTime => 64,
        };
        let (keys, run_keys, window_ms) = (keys.max(1), run_keys.max(1), buckets * BUCKET_WIDTH_MS);
        let same_pace_ms = u128::from(window_ms) * u128::from(run_keys) / u128::from(keys);
        let run_ms = same_pace_ms.min(u128::from(window_ms / 4)) as u64;
        Self { keys, window_ms, run: (run_ms, run_keys) }
    }

    fn event_time(&self, number: u64) -> EventTimeMs {
        let share =
            |of: u64, part: u64, whole: u64| (u128::from(of) * u128::from(part) / u128::from(whole)) as u64;
        let since = if number < self.keys {
            share(self.window_ms, number, self.keys)
        } else {
            self.window_ms + share(self.run.0, number - self.keys, self.run.1)
        };
        EventTimeMs((FIRST_EVENT_TIME_MS + since) as i64)
    }
}

/// Keys of a prepared state and of a run on it. A run has a seed of its own, so that no two runs read the same pages.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    /// Of the numbers below `prepared`, and of the fingerprints.
    pub state_seed: u64,
    /// Of the other numbers, and of what is drawn.
    pub run_seed: u64,
    /// Keys in the state before the run.
    pub prepared: u64,
    /// Event times.
    pub clock: Clock,
}

impl Keys {
    /// The 88 bits of a key.
    pub fn fingerprint(&self, number: u64) -> Fingerprint {
        let seed = if number < self.prepared { self.state_seed } else { self.run_seed };
        Fingerprint::of(&id(seed, number), self.state_seed)
    }

    /// The key as its first copy carries it.
    pub fn first_copy(&self, number: u64) -> Key {
        Key { fingerprint: self.fingerprint(number), event_time: self.clock.event_time(number) }
    }
}

/// Events after each other.
#[derive(Debug, Clone)]
pub struct Stream {
    keys: Keys,
    load: Load,
    repeats: Repeats,
    next_key: u64,
    next_event: u64,
}

impl Stream {
    /// Begins behind the prepared keys.
    pub fn new(keys: Keys, load: Load, repeats: Repeats) -> Self {
        Self { keys, load, repeats, next_key: keys.prepared, next_event: 0 }
    }

    /// Keys that were there so far, those of the state included.
    pub fn keys(&self) -> u64 {
        self.next_key
    }

    /// Replaces `keys` by those of the next events. With `same_time` a repeat carries the event time of its first
    /// copy, with `any_time` the time at which it comes.
    pub fn fill(&mut self, events: u64, keys: &mut Vec<Key>) {
        keys.clear();
        for _ in 0..events {
            let number = self.next_number();
            let mut key = self.keys.first_copy(number);
            if self.repeats == Repeats::AnyTime {
                key.event_time = self.keys.clock.event_time(self.next_key - 1);
            }
            keys.push(key);
        }
    }

    fn next_number(&mut self) -> u64 {
        let kind = self.kind(self.next_event);
        let pick = mixed((self.keys.run_seed ^ 2).wrapping_add(self.next_event.wrapping_mul(STEP)));
        self.next_event += 1;
        if kind < NEW_PERCENT || self.next_key == 0 {
            self.next_key += 1;
            self.next_key - 1
        } else if self.load == Load::Mix && kind < ANYWHERE_PERCENT {
            self.next_key - 1 - scaled(pick, self.next_key.min(NEAR_KEYS))
        } else {
            scaled(pick, self.next_key)
        }
    }

    /// The truth about an event.
    pub fn is_new(&self, event: u64) -> bool {
        self.kind(event) < NEW_PERCENT || (event == 0 && self.keys.prepared == 0)
    }

    fn kind(&self, event: u64) -> u64 {
        scaled(mixed((self.keys.run_seed ^ 1).wrapping_add(event.wrapping_mul(STEP))), 100)
    }
}

/// What was found, beside the truth, event by event.
#[derive(Debug, Clone, Copy, Default)]
pub struct Truth {
    events: u64,
    found: u64,
    expected: u64,
    false_drops: u64,
    missed_repeats: u64,
}

impl Truth {
    /// Compares the verdicts of the next events.
    pub fn compare(&mut self, stream: &Stream, verdicts: &[Verdict]) {
        for verdict in verdicts {
            let (is_new, is_found) = (stream.is_new(self.events), *verdict == Verdict::Duplicate);
            self.events += 1;
            self.found += u64::from(is_found);
            self.expected += u64::from(!is_new);
            self.false_drops += u64::from(is_new && is_found);
            self.missed_repeats += u64::from(!is_new && !is_found);
        }
    }

    /// As JSON.
    ///
    /// # Errors
    /// If a single verdict was wrong: a figure of a wrong program is none.
    pub fn proven(&self) -> Result<serde_json::Value, String> {
        if self.false_drops + self.missed_repeats > 0 {
            return Err(format!("wrong verdicts: {self:?}"));
        }
        Ok(serde_json::json!({ "events": self.events, "found": self.found, "expected": self.expected,
            "false_drops": self.false_drops, "missed_repeats": self.missed_repeats }))
    }
}
