//! The stream: which record comes next, and what is true of all records so far.
//!
//! Each step decides what the next record is, counts it, and moves on. Writing the record out is a function of the
//! step, so skipping is stepping without it.
//!
//! ```text
//! notifications begin -> their events wait for their time -> new event      \
//! the last few thousand events, or any past one           -> repeat          > step -> record
//! an event with a fault                                   -> bad record     |
//!                          the same event, a little later -> correction     /
//! ```
//!
//! Invariants
//! 1. Records of a stretch: exactly `events` good ones and exactly the bad ones of each kind. Every bad record
//!    stands before a good one of its stretch, and a promised correction comes within the stretch.
//! 2. Kafka timestamps never decrease. An event's time lies before its first record's timestamp.
//! 3. A repeat's first copy stands before it in the stream, by at most [`NEAR_EVENTS_MAX`] distinct events if near.
//! 4. `records = events + bad`, `events = distinct + repeats`: both by counting each record once.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::GenerateError;
use super::config::{GeneratorConfig, Plan};
use super::draws::{Draws, Millionths};
use super::event::{Event, EventType, Notifications, Origin, SLOTS, Times, hex, refused_notification};
use super::payload::{Form, render, render_bad};
use crate::letter::ReasonCode;

/// How many distinct events a near repeat reaches back at most.
pub const NEAR_EVENTS_MAX: usize = 4_096;
/// A correction comes within so many good records of the bad one.
pub const CORRECTION_EVENTS_MAX: u64 = 3_000;
/// Draws for a past event before a near one is taken; one draw succeeds in about three of five cases.
const FAR_DRAWS_MAX: u32 = 64;
/// Share of repeats with exactly the bytes of the first copy.
const SAME_BYTES: Millionths = Millionths(600_000);
/// Share of repeats with the same bytes or only written differently; the others say a later attempt.
const SAME_VALUES: Millionths = Millionths(800_000);

/// A record to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedRecord {
    /// Topic.
    pub topic: Arc<str>,
    /// Topic partition: a hash of the key, but for repeats across.
    pub partition: i32,
    /// Message key: the id of the notification.
    pub key: Option<Vec<u8>>,
    /// Payload; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// Kafka timestamp in ms since the epoch.
    pub timestamp_ms: Option<i64>,
    /// Headers in their order.
    pub headers: Vec<(&'static str, Vec<u8>)>,
    /// What the record is.
    pub role: Role,
}

/// What a record is to a job that writes each event once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The first copy of an event.
    First,
    /// The first good copy of an event whose first record was bad.
    Corrected,
    /// A copy of an event that stands earlier in the stream.
    Repeat(RepeatKind),
    /// Refused for this reason.
    Bad(ReasonCode),
}

/// Where a repeat's first copy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepeatKind {
    /// Among the last [`NEAR_EVENTS_MAX`] distinct events, on the same topic partition.
    Near,
    /// Anywhere before, on the same topic partition.
    Far,
    /// On another topic partition.
    Across,
}

/// What is true of the records so far, counted from the beginning of the stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Truth {
    /// Seed of the stream.
    pub seed: u64,
    /// All records: `events` and `bad`.
    pub records: u64,
    /// Good records: `distinct` and `repeats`.
    pub events: u64,
    /// Distinct events in good records: the rows that a correct job writes.
    pub distinct: u64,
    /// The same by type.
    pub distinct_by_type: BTreeMap<String, u64>,
    /// Repeats by kind: the rows that a correct job drops.
    pub repeats: RepeatCounts,
    /// Bad records by reason: the rows that a correct job refuses.
    pub bad: BTreeMap<String, u64>,
    /// Distinct events whose first record was bad; contained in `distinct`.
    pub corrected: u64,
}

/// Repeats by kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepeatCounts {
    /// See [`RepeatKind::Near`].
    pub near: u64,
    /// See [`RepeatKind::Far`].
    pub far: u64,
    /// See [`RepeatKind::Across`].
    pub across: u64,
}

impl RepeatCounts {
    /// All repeats.
    pub fn total(&self) -> u64 {
        self.near + self.far + self.across
    }
}

impl Truth {
    /// All bad records.
    pub fn bad_total(&self) -> u64 {
        self.bad.values().sum()
    }

    /// What was added since `earlier`, which is an earlier truth of the same stream.
    pub fn since(&self, earlier: &Truth) -> Truth {
        let less = |now: &BTreeMap<String, u64>, then: &BTreeMap<String, u64>| {
            now.iter()
                .map(|(name, count)| (name.clone(), count - then.get(name).copied().unwrap_or(0)))
                .collect()
        };
        Truth {
            seed: self.seed,
            records: self.records - earlier.records,
            events: self.events - earlier.events,
            distinct: self.distinct - earlier.distinct,
            distinct_by_type: less(&self.distinct_by_type, &earlier.distinct_by_type),
            repeats: RepeatCounts {
                near: self.repeats.near - earlier.repeats.near,
                far: self.repeats.far - earlier.repeats.far,
                across: self.repeats.across - earlier.repeats.across,
            },
            bad: less(&self.bad, &earlier.bad),
            corrected: self.corrected - earlier.corrected,
        }
    }
}

/// The stream of one configuration, from its beginning or from where it was skipped to.
#[derive(Debug, Clone)]
pub struct Generator {
    plan: Plan,
    notifications: Notifications,
    /// Draws for decisions of the stream; each step takes them in order, also when it is skipped.
    control: Draws,
    /// First notification whose events were not yet made.
    next_notification: u64,
    /// Events that were made and wait for their time, earliest first, with their event times.
    waiting: BinaryHeap<Reverse<(Turn, i64)>>,
    /// Turn of the regular event that came last; all with an earlier turn came before.
    last_turn: Option<Turn>,
    /// Kafka timestamp of the record that comes next, at least.
    now_ms: i64,
    /// The last distinct events, a ring of at most [`NEAR_EVENTS_MAX`].
    recent: Vec<Origin>,
    /// Corrections by the number of the good record from which on they are due, and the order of their promise.
    corrections: BinaryHeap<Reverse<Correction>>,
    stretch: Stretch,
    counts: StreamCounts,
}

/// The place of a regular event in the stream: by the time at which it is sent.
type Turn = (i64, u64, u8);

/// (good records before it, notification, slot, event time)
type Correction = (u64, u64, u8, i64);

/// What is left of the current stretch.
#[derive(Debug, Clone, Default)]
struct Stretch {
    events_left: u64,
    bad_left: Vec<(ReasonCode, u64)>,
    bad_left_total: u64,
}

#[derive(Debug, Clone, Default)]
struct StreamCounts {
    distinct_by_type: [u64; EventType::ALL.len()],
    repeats: RepeatCounts,
    bad: BTreeMap<ReasonCode, u64>,
    bad_total: u64,
    corrected: u64,
}

/// A decided record.
#[derive(Debug, Clone, Copy)]
struct Step {
    role: Role,
    origin: Origin,
    form: Form,
    /// Added to the key's topic partition.
    partition_shift: u32,
    timestamp_ms: i64,
    fault_bits: u32,
}

impl StreamCounts {
    fn distinct(&self) -> u64 {
        self.distinct_by_type.iter().sum()
    }

    fn events(&self) -> u64 {
        self.distinct() + self.repeats.total()
    }
}

impl Generator {
    /// The stream from its beginning. Costs a few hundred kilobytes of memory.
    ///
    /// # Errors
    /// [`GenerateError::Setting`] names the setting that lies outside its range.
    pub fn new(config: &GeneratorConfig) -> Result<Self, GenerateError> {
        let plan = Plan::new(config)?;
        let notifications = Notifications::new(&plan);
        Ok(Self {
            control: notifications.control(),
            notifications,
            next_notification: 0,
            waiting: BinaryHeap::new(),
            last_turn: None,
            now_ms: plan.start_ms,
            recent: Vec::new(),
            corrections: BinaryHeap::new(),
            stretch: Stretch::default(),
            counts: StreamCounts::default(),
            plan,
        })
    }

    /// The next records up to and with the `events`-th good one, with the bad ones between. A wave that is dropped
    /// early leaves the rest to the next. Waves one after another are the same records as one wave of their sum.
    pub fn wave(&mut self, events: u64) -> Wave<'_> {
        Wave { generator: self, events_left: events }
    }

    /// Moves on as [`Generator::wave`] does, without making the records.
    pub fn skip(&mut self, events: u64) {
        let mut events_left = events;
        while events_left > 0 {
            if !matches!(self.step().role, Role::Bad(_)) {
                events_left -= 1;
            }
        }
    }

    /// What is true of all records so far, skipped ones too.
    pub fn truth(&self) -> Truth {
        let types = EventType::ALL.iter().zip(self.counts.distinct_by_type);
        Truth {
            seed: self.plan.seed,
            records: self.counts.events() + self.counts.bad_total,
            events: self.counts.events(),
            distinct: self.counts.distinct(),
            distinct_by_type: types
                .map(|(event_type, count)| (event_type.as_str().to_owned(), count))
                .collect(),
            repeats: self.counts.repeats,
            bad: self.counts.bad.iter().map(|(kind, count)| (kind.as_str().to_owned(), *count)).collect(),
            corrected: self.counts.corrected,
        }
    }

    /// Decides and counts the next record.
    fn step(&mut self) -> Step {
        if self.stretch.events_left == 0 {
            self.stretch = Stretch {
                events_left: self.plan.stretch_events,
                bad_left: self.plan.bad.clone(),
                bad_left_total: self.plan.bad_total,
            };
        }
        let step = if self.bad_is_next() {
            self.step_bad()
        } else {
            let step = self.step_good();
            self.stretch.events_left -= 1;
            step
        };
        self.count(&step);
        step
    }

    /// Knuth's selection sampling (The Art of Computer Programming 3.4.2, algorithm S): spreads the bad records
    /// evenly over what is left of the stretch and places exactly all of them. The last record is a good one.
    fn bad_is_next(&mut self) -> bool {
        let bad_left = self.stretch.bad_left_total;
        if bad_left == 0 {
            return false;
        }
        self.stretch.events_left == 1 || self.control.below_64(bad_left + self.stretch.events_left) < bad_left
    }

    fn step_bad(&mut self) -> Step {
        let kind = self.take_bad_kind();
        let notification = refused_notification(self.counts.bad_total);
        let slot = self.control.below(EventType::ALL.len() as u32) as u8;
        let fault_bits = self.control.bits();
        let corrected = self.control.chance(self.plan.corrected);
        let delay_bits = self.control.bits_64();
        let event_time_ms = self.now_ms - 1;
        let room = self.stretch.events_left - self.corrections.len() as u64;
        if corrected && room > 0 {
            let due = self.counts.events() + delay_bits % room.min(CORRECTION_EVENTS_MAX);
            self.corrections.push(Reverse((due, notification, slot, event_time_ms)));
        }
        Step {
            role: Role::Bad(kind),
            origin: Origin { notification, slot, event_time_ms },
            form: Form::First,
            partition_shift: 0,
            timestamp_ms: self.now_ms,
            fault_bits,
        }
    }

    /// Takes one of the bad records left, each equally likely.
    fn take_bad_kind(&mut self) -> ReasonCode {
        let mut at = self.control.below_64(self.stretch.bad_left_total);
        self.stretch.bad_left_total -= 1;
        for (kind, left) in &mut self.stretch.bad_left {
            if at < *left {
                *left -= 1;
                return *kind;
            }
            at -= *left;
        }
        unreachable!("the total is the sum of the kinds")
    }

    fn step_good(&mut self) -> Step {
        if let Some(origin) = self.due_correction() {
            return self.first_copy(Role::Corrected, origin);
        }
        if !self.recent.is_empty() && self.control.chance(self.plan.repeats) {
            return self.step_repeat();
        }
        let origin = self.next_regular();
        self.first_copy(Role::First, origin)
    }

    /// The correction whose time has come, or whose stretch leaves no more room.
    fn due_correction(&mut self) -> Option<Origin> {
        let Reverse((due, ..)) = self.corrections.peek()?;
        let is_due = *due <= self.counts.events();
        if !is_due && self.stretch.events_left > self.corrections.len() as u64 {
            return None;
        }
        let Reverse((_, notification, slot, event_time_ms)) = self.corrections.pop()?;
        Some(Origin { notification, slot, event_time_ms })
    }

    /// The regular event that is sent next.
    fn next_regular(&mut self) -> Origin {
        loop {
            if let Some(Reverse((turn, event_time_ms))) = self.waiting.peek().copied()
                && turn.0 < self.notifications.begins_ms(self.next_notification)
            {
                self.waiting.pop();
                self.now_ms = turn.0;
                self.last_turn = Some(turn);
                return Origin { notification: turn.1, slot: turn.2, event_time_ms };
            }
            let times = self.notifications.times(self.next_notification);
            for (slot, times) in times.into_iter().enumerate() {
                if let Some(Times { event_time_ms, sent_at_ms }) = times {
                    let turn = (sent_at_ms, self.next_notification, slot as u8);
                    self.waiting.push(Reverse((turn, event_time_ms)));
                }
            }
            self.next_notification += 1;
        }
    }

    fn first_copy(&mut self, role: Role, origin: Origin) -> Step {
        if self.recent.len() < NEAR_EVENTS_MAX {
            self.recent.push(origin);
        } else {
            let oldest = (self.counts.distinct() % NEAR_EVENTS_MAX as u64) as usize;
            self.recent[oldest] = origin;
        }
        Step { role, origin, form: Form::First, partition_shift: 0, timestamp_ms: self.now_ms, fault_bits: 0 }
    }

    fn step_repeat(&mut self) -> Step {
        let split = Millionths(self.control.below(1_000_000));
        let (kind, far) = if split < self.plan.near {
            (RepeatKind::Near, false)
        } else if split < self.plan.near_or_far {
            (RepeatKind::Far, true)
        } else {
            (RepeatKind::Across, self.control.bits() & 1 == 0)
        };
        let kind = match kind {
            RepeatKind::Across if self.plan.partitions_per_topic == 1 => {
                if far {
                    RepeatKind::Far
                } else {
                    RepeatKind::Near
                }
            }
            kind => kind,
        };
        let past = if far { self.draw_past() } else { None };
        // A stream so young or so slow that no past event was found within reach has only recent ones.
        let kind = if far && past.is_none() && kind == RepeatKind::Far { RepeatKind::Near } else { kind };
        let origin = past.unwrap_or_else(|| self.control.pick(&self.recent));
        let partition_shift = match kind {
            RepeatKind::Across => 1 + self.control.below(self.plan.partitions_per_topic - 1),
            RepeatKind::Near | RepeatKind::Far => 0,
        };
        let form = Millionths(self.control.below(1_000_000));
        let form = if form < SAME_BYTES {
            Form::First
        } else if form < SAME_VALUES {
            Form::Restyled(self.control.bits())
        } else {
            Form::NextAttempt
        };
        Step {
            role: Role::Repeat(kind),
            origin,
            form,
            partition_shift,
            timestamp_ms: self.now_ms,
            fault_bits: 0,
        }
    }

    /// A regular event of the past within reach, each equally likely: draws a slot of a notification until one is
    /// drawn in which something happened and was sent.
    fn draw_past(&mut self) -> Option<Origin> {
        let last_turn = self.last_turn?;
        let reach_ms = self.now_ms.saturating_sub(self.plan.far_back_ms_max);
        let first = self.notifications.first_beginning_at(reach_ms);
        let notifications = self.next_notification.checked_sub(first).filter(|count| *count > 0)?;
        for _ in 0..FAR_DRAWS_MAX {
            let notification = first + self.control.below_64(notifications);
            let slot = self.control.below(SLOTS.len() as u32) as u8;
            if let Some(times) = self.notifications.times(notification)[usize::from(slot)]
                && (times.sent_at_ms, notification, slot) <= last_turn
            {
                return Some(Origin { notification, slot, event_time_ms: times.event_time_ms });
            }
        }
        None
    }

    fn count(&mut self, step: &Step) {
        let event_type = SLOTS[usize::from(step.origin.slot)] as usize;
        match step.role {
            Role::Bad(kind) => {
                *self.counts.bad.entry(kind).or_default() += 1;
                self.counts.bad_total += 1;
            }
            Role::Repeat(RepeatKind::Near) => self.counts.repeats.near += 1,
            Role::Repeat(RepeatKind::Far) => self.counts.repeats.far += 1,
            Role::Repeat(RepeatKind::Across) => self.counts.repeats.across += 1,
            Role::First => self.counts.distinct_by_type[event_type] += 1,
            Role::Corrected => {
                self.counts.distinct_by_type[event_type] += 1;
                self.counts.corrected += 1;
            }
        }
    }

    /// Writes a decided record out.
    fn render(&self, step: &Step) -> GeneratedRecord {
        let event = self.notifications.event(step.origin);
        let payload = match step.role {
            Role::Bad(kind) => render_bad(&event, kind, step.fault_bits, step.timestamp_ms),
            Role::First | Role::Corrected | Role::Repeat(_) => Some(render(&event, step.form)),
        };
        let partitions = u64::from(self.plan.partitions_per_topic);
        let partition =
            (xxh3_64(&event.notification_id) % partitions + u64::from(step.partition_shift)) % partitions;
        GeneratedRecord {
            topic: Arc::clone(&self.plan.topics[event.event_type as usize]),
            partition: partition as i32,
            key: Some(event.notification_id.to_vec()),
            payload,
            timestamp_ms: Some(step.timestamp_ms),
            headers: traceparent(&event).into_iter().map(|value| ("traceparent", value)).collect(),
            role: step.role,
        }
    }
}

/// The header of W3C Trace Context: version, trace, span, flags.
fn traceparent(event: &Event) -> Option<Vec<u8>> {
    let (trace, span) = event.trace?;
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-01";
    hex((trace >> 64) as u64, &mut text[3..19]);
    hex(trace as u64, &mut text[19..35]);
    hex(span, &mut text[36..52]);
    Some(text.to_vec())
}

/// Records of one wave, in the order in which they are sent.
#[derive(Debug)]
pub struct Wave<'a> {
    generator: &'a mut Generator,
    events_left: u64,
}

impl Iterator for Wave<'_> {
    type Item = GeneratedRecord;

    fn next(&mut self) -> Option<GeneratedRecord> {
        if self.events_left == 0 {
            return None;
        }
        let step = self.generator.step();
        if !matches!(step.role, Role::Bad(_)) {
            self.events_left -= 1;
        }
        Some(self.generator.render(&step))
    }
}
