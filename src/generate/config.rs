//! What a generated stream is asked to be: plain data, with defaults as named constants, checked before use.
//!
//! Invariant: a `Plan` exists only for a configuration whose every setting lies in its range; shares are whole
//! millionths there, so that no decision depends on floating-point arithmetic of the machine.

use std::collections::BTreeMap;
use std::time::Duration;

use super::GenerateError;
use super::draws::Millionths;
use super::event::{EVENTS_PER_NOTIFICATION, EventType};
use crate::letter::ReasonCode;

/// Good records of one stretch unless said otherwise.
pub const EVENTS_DEFAULT: u64 = 1_000_000;
/// Share of repeats among good records.
pub const REPEATS_DEFAULT: f64 = 0.06;
/// Event time of the first notification: 2025-01-01T00:00:00Z. It lies in the past, because an event ahead of the
/// clock of the reader is refused.
pub const START_MS_DEFAULT: i64 = 1_735_689_600_000;
/// Good records per second of event time: a million of them span two days, so they fall into a few day partitions.
pub const EVENTS_PER_SECOND_DEFAULT: f64 = 1_000_000.0 / (2.0 * 24.0 * 3600.0);
/// Fastest stream: events that wait for their time are held in memory, about 7 minutes of clicks.
pub const EVENTS_PER_SECOND_MAX: f64 = 50_000.0;
/// Slowest stream: one event in about a quarter of an hour.
pub const EVENTS_PER_SECOND_MIN: f64 = 0.001;
/// Share of events that reach Kafka seconds to half an hour later than their like.
pub const DISORDER_DEFAULT: f64 = 0.03;
/// Share of bad records whose good version follows.
pub const CORRECTED_DEFAULT: f64 = 0.25;
/// Far repeats reach back so far in event time. Below the seven days that a job remembers by default, so that a
/// correct job drops every one of them.
pub const FAR_BACK_MAX_DEFAULT: Duration = Duration::from_secs(6 * 24 * 3600);
/// Topic partitions of each topic.
pub const PARTITIONS_PER_TOPIC_DEFAULT: u32 = 16;
/// Most topic partitions of a topic.
pub const PARTITIONS_PER_TOPIC_MAX: u32 = 10_000;
/// Highest share of repeats: above it a stream would hardly move.
pub const REPEATS_MAX: f64 = 0.95;

/// The faults that a payload can have, each named by the reason with which the job of
/// [`demo_job_toml`](super::demo_job_toml) refuses it. The other reasons depend on settings of the job.
pub const BAD_KINDS: [ReasonCode; 16] = [
    ReasonCode::Tombstone,
    ReasonCode::EmptyPayload,
    ReasonCode::InvalidUtf8,
    ReasonCode::TruncatedJson,
    ReasonCode::InvalidJson,
    ReasonCode::TooDeep,
    ReasonCode::NotAnObject,
    ReasonCode::EmptyArray,
    ReasonCode::DuplicateField,
    ReasonCode::WrongType,
    ReasonCode::OutOfRange,
    ReasonCode::MissingRequired,
    ReasonCode::NullKey,
    ReasonCode::EmptyKey,
    ReasonCode::MissingEventTime,
    ReasonCode::EventTimeAhead,
];

/// A stream of notification events. The stream is endless; it follows from these settings alone.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratorConfig {
    /// Seed of everything. Streams of different seeds share no event.
    pub seed: u64,
    /// Good records of one stretch: first copies, corrections and repeats, but not bad ones. At least 1. The bad
    /// records of [`GeneratorConfig::bad`] are spread over each such stretch.
    pub events: u64,
    /// Share of good records that repeat an earlier event, 0 to [`REPEATS_MAX`].
    pub repeats: f64,
    /// What kinds of repeats.
    pub repeat_split: RepeatSplit,
    /// How far back in event time a far repeat reaches at most.
    pub far_back_max: Duration,
    /// Event time of the first notification, in ms since the epoch. Choose it so that the whole stream lies in
    /// the past of the reader's clock.
    pub start_ms: i64,
    /// Good records per second of event time, [`EVENTS_PER_SECOND_MIN`] to [`EVENTS_PER_SECOND_MAX`].
    pub events_per_second: f64,
    /// Share of events that are sent seconds to half an hour late, 0 to 1.
    pub disorder: f64,
    /// Bad records of each kind in each stretch. Kinds are those of [`BAD_KINDS`].
    pub bad: BTreeMap<ReasonCode, u64>,
    /// Share of bad records whose good version comes later in the same stretch and counts as a distinct event,
    /// 0 to 1.
    pub corrected: f64,
    /// Where records go.
    pub topics: Topics,
    /// Topic partitions of each topic, 1 to [`PARTITIONS_PER_TOPIC_MAX`].
    pub partitions_per_topic: u32,
}

/// Shares of the kinds of repeats. They add up to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RepeatSplit {
    /// Repeats of one of the last few thousand events.
    pub near: f64,
    /// Repeats of any past event, each equally likely.
    pub far: f64,
    /// Repeats on another topic partition under the same message key, as after a change of the partitioner;
    /// half of them near, half far. With one topic partition they become near repeats.
    pub across: f64,
}

/// Where records go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Topics {
    /// All types into the topic of this name.
    One(String),
    /// One topic per type: this prefix, a dot, the type.
    PerType(String),
}

impl Default for GeneratorConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            events: EVENTS_DEFAULT,
            repeats: REPEATS_DEFAULT,
            repeat_split: RepeatSplit { near: 0.6, far: 0.3, across: 0.1 },
            far_back_max: FAR_BACK_MAX_DEFAULT,
            start_ms: START_MS_DEFAULT,
            events_per_second: EVENTS_PER_SECOND_DEFAULT,
            disorder: DISORDER_DEFAULT,
            bad: BTreeMap::new(),
            corrected: CORRECTED_DEFAULT,
            topics: Topics::PerType("notifications".to_owned()),
            partitions_per_topic: PARTITIONS_PER_TOPIC_DEFAULT,
        }
    }
}

impl Topics {
    /// The topic of events of one type.
    pub fn of(&self, event_type: EventType) -> String {
        match self {
            Self::One(name) => name.clone(),
            Self::PerType(prefix) => format!("{prefix}.{}", event_type.as_str()),
        }
    }

    /// All topics, each once, in the order of the types.
    pub fn names(&self) -> Vec<String> {
        match self {
            Self::One(name) => vec![name.clone()],
            Self::PerType(_) => EventType::ALL.iter().map(|event_type| self.of(*event_type)).collect(),
        }
    }
}

/// The same number of bad records of every kind that a generator knows.
pub fn bad_of_each_kind(count: u64) -> BTreeMap<ReasonCode, u64> {
    BAD_KINDS.iter().map(|kind| (*kind, count)).collect()
}

/// The kind of bad record of this name, if a generator knows it. Names are those of [`ReasonCode::as_str`].
pub fn bad_kind(name: &str) -> Option<ReasonCode> {
    BAD_KINDS.into_iter().find(|kind| kind.as_str() == name)
}

/// A checked configuration in whole numbers.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) stretch_events: u64,
    pub(super) repeats: Millionths,
    pub(super) near: Millionths,
    pub(super) near_or_far: Millionths,
    pub(super) far_back_ms_max: i64,
    pub(super) start_ms: i64,
    pub(super) interval_us: u32,
    pub(super) disorder: Millionths,
    pub(super) bad: Vec<(ReasonCode, u64)>,
    pub(super) bad_total: u64,
    pub(super) corrected: Millionths,
    pub(super) topics: [std::sync::Arc<str>; EventType::ALL.len()],
    pub(super) partitions_per_topic: u32,
}

impl Plan {
    /// Checks every setting.
    pub(super) fn new(config: &GeneratorConfig) -> Result<Self, GenerateError> {
        let split = config.repeat_split;
        in_range("repeats", config.repeats, 0.0, REPEATS_MAX)?;
        in_range("repeat_split.near", split.near, 0.0, 1.0)?;
        in_range("repeat_split.far", split.far, 0.0, 1.0)?;
        in_range("repeat_split.across", split.across, 0.0, 1.0)?;
        in_range("repeat_split (its sum)", split.near + split.far + split.across, 0.999_999, 1.000_001)?;
        in_range(
            "events_per_second",
            config.events_per_second,
            EVENTS_PER_SECOND_MIN,
            EVENTS_PER_SECOND_MAX,
        )?;
        in_range("disorder", config.disorder, 0.0, 1.0)?;
        in_range("corrected", config.corrected, 0.0, 1.0)?;
        in_range(
            "partitions_per_topic",
            f64::from(config.partitions_per_topic),
            1.0,
            f64::from(PARTITIONS_PER_TOPIC_MAX),
        )?;
        // Years 1970 to 2200: far from every overflow of milliseconds and microseconds.
        in_range("start_ms", config.start_ms as f64, 0.0, 7_258_118_400_000.0)?;
        if config.events == 0 {
            return Err(refused("events", config.events, "at least 1"));
        }
        let bad_total = check_bad(&config.bad)?;
        for topic in config.topics.names() {
            check_topic(&topic)?;
        }
        let notifications_per_second =
            config.events_per_second * (1.0 - config.repeats) / EVENTS_PER_NOTIFICATION;
        Ok(Self {
            seed: config.seed,
            stretch_events: config.events,
            repeats: Millionths::of(config.repeats),
            near: Millionths::of(split.near),
            near_or_far: Millionths::of(split.near + split.far),
            far_back_ms_max: i64::try_from(config.far_back_max.as_millis()).unwrap_or(i64::MAX),
            start_ms: config.start_ms,
            interval_us: (1e6 / notifications_per_second).round().clamp(1.0, f64::from(u32::MAX)) as u32,
            disorder: Millionths::of(config.disorder),
            bad: config.bad.iter().map(|(kind, count)| (*kind, *count)).collect(),
            bad_total,
            corrected: Millionths::of(config.corrected),
            topics: EventType::ALL.map(|event_type| config.topics.of(event_type).into()),
            partitions_per_topic: config.partitions_per_topic,
        })
    }
}

fn in_range(setting: &'static str, found: f64, low: f64, high: f64) -> Result<(), GenerateError> {
    // Written so that NaN is refused.
    if found >= low && found <= high {
        return Ok(());
    }
    Err(refused(setting, found, format!("{low} to {high}")))
}

fn refused(
    setting: &'static str,
    found: impl std::fmt::Display,
    allowed: impl Into<String>,
) -> GenerateError {
    GenerateError::Setting { setting, found: found.to_string(), allowed: allowed.into() }
}

/// Sum of all bad records of a stretch.
fn check_bad(bad: &BTreeMap<ReasonCode, u64>) -> Result<u64, GenerateError> {
    let mut total: u64 = 0;
    for (kind, count) in bad {
        if !BAD_KINDS.contains(kind) {
            let names: Vec<&str> = BAD_KINDS.iter().map(|kind| kind.as_str()).collect();
            return Err(refused("bad", kind, format!("one of {}", names.join(", "))));
        }
        total = total
            .checked_add(*count)
            .filter(|total| *total < 1 << 40)
            .ok_or_else(|| refused("bad", count, "less than 2^40 bad records in all"))?;
    }
    Ok(total)
}

/// Kafka's own rule for names of topics.
fn check_topic(topic: &str) -> Result<(), GenerateError> {
    let legal = topic.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if legal && (1..=249).contains(&topic.len()) && topic != "." && topic != ".." {
        return Ok(());
    }
    Err(refused("topics", format!("{topic:?}"), "1 to 249 of letters, digits, dot, underscore and hyphen"))
}
