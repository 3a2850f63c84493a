//! Places in Kafka: which topic partition, which offset, which row of a record.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A topic and the number of one of its partitions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicPartition {
    /// Name of the topic.
    pub topic: String,
    /// Number of the topic partition, from 0.
    pub partition: i32,
}

impl TopicPartition {
    /// Names one topic partition.
    pub fn new(topic: impl Into<String>, partition: i32) -> Self {
        Self { topic: topic.into(), partition }
    }
}

impl fmt::Display for TopicPartition {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}[{}]", self.topic, self.partition)
    }
}

/// The next Kafka offset to read: one past the last record taken. Never "the last offset".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default)]
#[serde(transparent)]
pub struct NextOffset(i64);

impl NextOffset {
    /// An offset that a broker or the ledger already calls "next".
    pub fn at(offset: i64) -> Self {
        Self(offset)
    }

    /// The offset after the record at `offset`. The only `+ 1` on offsets in the program.
    pub fn after(offset: i64) -> Self {
        Self(offset + 1)
    }

    /// The bare number, for a client or a file.
    pub fn get(self) -> i64 {
        self.0
    }
}

impl fmt::Display for NextOffset {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// Identity of a topic (KIP-516): survives nothing, so a topic made again under its old name differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TopicId(pub uuid::Uuid);

impl fmt::Display for TopicId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(out)
    }
}

/// Where one row came from. Orders rows the way R2 of the design breaks ties.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Slot: index into the assignment of the run, which is sorted by topic and partition.
    pub slot: u32,
    /// Kafka offset of the record.
    pub offset: i64,
    /// Index of the row in its record: 0 unless the record was an array that was split.
    pub row_index: i32,
}
