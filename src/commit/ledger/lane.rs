//! Lanes: cursors over topic partitions, each with a watermark of its own.
//!
//! The live lane follows the topics. A backfill reads from the offsets that belong to a time to ends that were frozen when
//! it was registered, and is done when its cursors have reached them.
//!
//! Packed lanes: `partition:end,delta;...` per topic, where delta is the lane's largest event time less the
//! partition's, in ms, or `-` for none. At most 24 bytes a topic partition up to offsets of 1e12. A backfill adds the
//! frozen end to each: `partition:end,delta,until`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::counts::Counts;
use crate::event_time::EventTimeMs;
use crate::offset::{NextOffset, TopicPartition};

/// A cursor over topic partitions with a watermark of its own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Lane {
    /// Event time held to be complete; never moves back.
    pub watermark: Option<EventTimeMs>,
    /// Cursor by topic and topic partition.
    pub topics: BTreeMap<String, BTreeMap<i32, Cursor>>,
    /// What makes it a backfill; `None` for the live lane.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backfill: Option<Backfill>,
}

/// What a backfill reads, and how far it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Backfill {
    /// First Kafka timestamp of its range, ms since the epoch.
    pub from_ms: i64,
    /// First Kafka timestamp after its range; `None` = up to the frozen ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_ms: Option<i64>,
    /// Whether it is served.
    pub state: LaneState,
    /// One past the last offset that is read, by topic and topic partition: frozen when it was registered.
    #[serde(default)]
    pub ends: BTreeMap<String, BTreeMap<i32, NextOffset>>,
    /// Outcomes of all its microbatches.
    #[serde(default)]
    pub counts: Counts,
    /// Largest share of dead letters that a microbatch of it may have, where whoever resumed it said so; else the job's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub letters_ratio_max: Option<f64>,
}

/// Whether a lane is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LaneState {
    /// It gets its turns.
    Active,
    /// It waits until a person resumes it.
    Paused,
    /// It was read to its frozen ends.
    Done,
}

impl LaneState {
    /// As users read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Done => "done",
        }
    }
}

impl Lane {
    /// All cursors, in order, with what they stand for.
    pub fn cursors(&self) -> impl Iterator<Item = (TopicPartition, &Cursor)> {
        self.topics.iter().flat_map(|(topic, partitions)| {
            let name = |partition: i32| TopicPartition::new(topic.clone(), partition);
            partitions.iter().map(move |(partition, cursor)| (name(*partition), cursor))
        })
    }

    /// Offsets between the cursors and the frozen ends of a backfill, control records and gaps included.
    pub fn offsets_left(&self) -> u64 {
        let Some(backfill) = &self.backfill else { return 0 };
        let left = |(name, cursor): (TopicPartition, &Cursor)| {
            let end = backfill.end(&name.topic, name.partition).unwrap_or(cursor.end);
            u64::try_from(end.get() - cursor.end.get()).unwrap_or(0)
        };
        self.cursors().map(left).sum()
    }
}

impl Backfill {
    /// The frozen end of a topic partition.
    pub fn end(&self, topic: &str, partition: i32) -> Option<NextOffset> {
        self.ends.get(topic)?.get(&partition).copied()
    }

    /// Whether a record with this Kafka timestamp is in the range; one without a timestamp is in none.
    pub fn holds(&self, timestamp_ms: Option<i64>) -> bool {
        let before = |to_ms: Option<i64>, time_ms| to_ms.is_none_or(|to_ms| time_ms < to_ms);
        timestamp_ms.is_some_and(|time_ms| time_ms >= self.from_ms && before(self.to_ms, time_ms))
    }
}

/// How far one topic partition has been read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    /// First offset of the last microbatch.
    pub start: NextOffset,
    /// Next offset to read.
    pub end: NextOffset,
    /// The last record taken, to recognise a log that was cut and written again.
    #[serde(default)]
    pub tail: Option<Tail>,
    /// Largest event time of all records taken.
    pub max_event_time: Option<EventTimeMs>,
}

/// The last record taken from a topic partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// Its offset.
    pub offset: i64,
    /// Hash of its offset, timestamp, key and payload.
    pub hash: u64,
}

/// A lane as the packed record says it.
pub(super) fn pack_lane(lane: &Lane) -> Value {
    let cursors = lane.topics.values().flat_map(BTreeMap::values);
    let leader = cursors.filter_map(|cursor| cursor.max_event_time).max();
    let until = |topic: &str, partition: i32| {
        let end = lane.backfill.as_ref().and_then(|backfill| backfill.end(topic, partition));
        end.map_or_else(String::new, |end| format!(",{end}"))
    };
    let topics = lane.topics.iter().map(|(topic, partitions)| {
        let text: Vec<String> = partitions
            .iter()
            .map(|(partition, cursor)| {
                let delta = match (leader, cursor.max_event_time) {
                    // The table is outside input: times at the ends of the range come back by the same wrapping.
                    (Some(leader), Some(time)) => leader.0.wrapping_sub(time.0).to_string(),
                    _ => "-".to_owned(),
                };
                format!("{partition}:{},{delta}{}", cursor.end, until(topic, *partition))
            })
            .collect();
        (topic.clone(), Value::String(text.join(";")))
    });
    let backfill =
        lane.backfill.as_ref().map(|backfill| Backfill { ends: BTreeMap::new(), ..backfill.clone() });
    serde_json::json!({
        "watermark": lane.watermark, "leader": leader, "topics": Value::Object(topics.collect()),
        "backfill": backfill,
    })
}

/// A lane from the packed record.
pub(super) fn unpack_lane(value: &Value) -> Result<Lane, String> {
    let watermark = value["watermark"].as_i64().map(EventTimeMs);
    let leader = value["leader"].as_i64();
    let mut backfill: Option<Backfill> = match value.get("backfill") {
        None | Some(Value::Null) => None,
        Some(backfill) => {
            Some(serde_json::from_value(backfill.clone()).map_err(|error| format!("bad backfill: {error}"))?)
        }
    };
    let mut topics = BTreeMap::new();
    for (topic, text) in value["topics"].as_object().ok_or("a lane without topics")? {
        let text = text.as_str().ok_or("topic partitions are not text")?;
        let mut partitions = BTreeMap::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let (partition, cursor, until) =
                unpack_cursor(part, leader).ok_or_else(|| format!("bad cursor {part:?}"))?;
            partitions.insert(partition, cursor);
            if let (Some(backfill), Some(until)) = (&mut backfill, until) {
                backfill.ends.entry(topic.clone()).or_default().insert(partition, until);
            }
        }
        topics.insert(topic.clone(), partitions);
    }
    Ok(Lane { watermark, topics, backfill })
}

/// A topic partition, its cursor, and its frozen end if it has one.
fn unpack_cursor(text: &str, leader: Option<i64>) -> Option<(i32, Cursor, Option<NextOffset>)> {
    let (partition, rest) = text.split_once(':')?;
    let (end, rest) = rest.split_once(',')?;
    let (delta, until) = match rest.split_once(',') {
        Some((delta, until)) => (delta, Some(NextOffset::at(until.parse().ok()?))),
        None => (rest, None),
    };
    let end = NextOffset::at(end.parse().ok()?);
    let max_event_time = match delta {
        "-" => None,
        delta => Some(EventTimeMs(leader?.wrapping_sub(delta.parse().ok()?))),
    };
    Some((partition.parse().ok()?, Cursor { start: end, end, tail: None, max_event_time }, until))
}
