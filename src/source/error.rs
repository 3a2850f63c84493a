//! Why records could not be read: one variant per way the caller must react.

use std::time::Duration;

use crate::offset::{NextOffset, TopicPartition};
use crate::source::ranges::{Loss, LostRange};
use crate::stop::Reason;

/// What a principal needs on each topic; printed where it lacks it.
pub const ACLS_NEEDED: &str = "operations READ and DESCRIBE on the topic";

/// Why a source could not be opened, described or read.
///
/// No variant carries a client configuration or the text of a refused value: those may hold secrets.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// A property can not be read or is refused by librdkafka. The job file must change.
    #[error("kafka property {property}: {problem}")]
    Property {
        /// Name of the property.
        property: String,
        /// What is wrong, without the value.
        problem: String,
    },
    /// No broker answered in time. Try again later; nothing was read or lost.
    #[error(
        "no answer from kafka at {brokers} while {doing}, after {} s (last: {last}); check the addresses \
         and the network, then run again",
        waited.as_secs()
    )]
    Away {
        /// Bootstrap addresses as the job names them.
        brokers: String,
        /// What was asked.
        doing: &'static str,
        /// How long.
        waited: Duration,
        /// The client's last error, or a sentence that there was none.
        last: String,
    },
    /// A topic does not exist, or exists no longer.
    #[error("topic {topic} does not exist on this cluster{}", said_nearest(nearest))]
    UnknownTopic {
        /// The topic.
        topic: String,
        /// Visible topics with the nearest names, best first; may be empty.
        nearest: Vec<String>,
    },
    /// A topic partition that the job or ledger names does not exist.
    #[error("topic partition {topic_partition} does not exist: the topic has {partitions} partitions")]
    UnknownPartition {
        /// The topic partition.
        topic_partition: TopicPartition,
        /// How many there are.
        partitions: i32,
    },
    /// The broker refuses the principal.
    #[error("kafka refuses {what} ({answer}); needed: {needed}")]
    NotAuthorized {
        /// What was refused: a topic or the connection.
        what: String,
        /// The broker's answer.
        answer: String,
        /// What would be enough.
        needed: &'static str,
    },
    /// Records that were to be read are gone, or the log ends before the place where reading was to go on.
    #[error("offsets to be read are not on the broker: {}", joined(ranges))]
    OffsetsLost {
        /// Exactly what is missing, by topic partition.
        ranges: Vec<LostRange>,
    },
    /// An offset that the job names as start lies outside the log.
    #[error(
        "start offset {offset} of {topic_partition} lies outside the log, which holds [{low}, {end}); \
         name an offset in it"
    )]
    StartOutOfRange {
        /// The topic partition.
        topic_partition: TopicPartition,
        /// The offset that the job names.
        offset: NextOffset,
        /// Oldest offset.
        low: NextOffset,
        /// Last stable offset.
        end: NextOffset,
    },
    /// The last consumed record is another one now: the log was truncated and written again, or the topic was made
    /// again under its name.
    #[error("the record before the next offset is not the one that was consumed: {}", joined_places(places))]
    TailDiffers {
        /// Topic partition and offset of every record that differs.
        places: Vec<(TopicPartition, i64)>,
    },
    /// A topic partition gave neither records nor its end for too long.
    #[error(
        "{topic_partition} gave nothing for {} s at offset {next}{} (last: {last}); records up to there \
         are safe, run again when the broker serves this topic partition",
        waited.as_secs(), said_end(*end)
    )]
    Stalled {
        /// The topic partition.
        topic_partition: TopicPartition,
        /// The next offset.
        next: NextOffset,
        /// Where reading was to end.
        end: NextOffset,
        /// How long it was waited for.
        waited: Duration,
        /// The client's last error, or a sentence that there was none.
        last: String,
    },
    /// A record batch fails its checksum or can not be decompressed, again and again.
    #[error(
        "record batch of {topic_partition} at offset {from} or after is damaged (read {reads} times, last: \
         {problem}); repair or delete it on the broker"
    )]
    Damaged {
        /// The topic partition.
        topic_partition: TopicPartition,
        /// First offset that may be damaged: the next one, or that of the record before where this can not be compared.
        from: NextOffset,
        /// How often it was read.
        reads: u32,
        /// What the client said.
        problem: String,
    },
    /// The client delivered an offset twice or in the wrong order.
    #[error("{topic_partition} went back: offset {found} came where {expected} or later was due; run again")]
    WentBack {
        /// The topic partition.
        topic_partition: TopicPartition,
        /// What was due.
        expected: NextOffset,
        /// What came.
        found: i64,
    },
    /// The client failed in a way that no other variant names.
    #[error("kafka client failed while {doing}: {problem}")]
    Client {
        /// What was done.
        doing: &'static str,
        /// What the client said.
        problem: String,
    },
}

impl SourceError {
    /// Whether what was read before it is as true as ever: the records after it are gone or damaged. Where a log was cut or
    /// written again, those before may be too.
    pub fn spares_what_was_read(&self) -> bool {
        match self {
            Self::OffsetsLost { ranges } => ranges.iter().all(|range| range.loss == Loss::Removed),
            Self::Damaged { .. } => true,
            _ => false,
        }
    }

    /// The named reason with which a run stops on this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Property { .. } | Self::StartOutOfRange { .. } => Reason::Usage,
            Self::Away { .. } | Self::Stalled { .. } => Reason::SourceAway,
            Self::UnknownTopic { .. } | Self::UnknownPartition { .. } => Reason::UnknownTopic,
            Self::NotAuthorized { .. } => Reason::NotAuthorized,
            // A log that was cut is another log, as a start says too.
            Self::OffsetsLost { ranges } if ranges.iter().any(|range| range.loss != Loss::Removed) => {
                Reason::TopicChanged
            }
            Self::OffsetsLost { .. } | Self::Damaged { .. } => Reason::OffsetsLost,
            Self::TailDiffers { .. } => Reason::TopicChanged,
            Self::WentBack { .. } | Self::Client { .. } => Reason::Unexpected,
        }
    }
}

fn said_nearest(nearest: &[String]) -> String {
    if nearest.is_empty() { String::new() } else { format!("; nearest: {}", nearest.join(", ")) }
}

/// A log that is followed for ever has no end to speak of.
fn said_end(end: NextOffset) -> String {
    if end.get() == i64::MAX { String::new() } else { format!(" of {end}") }
}

fn joined(ranges: &[LostRange]) -> String {
    ranges.iter().map(LostRange::to_string).collect::<Vec<_>>().join("; ")
}

fn joined_places(places: &[(TopicPartition, i64)]) -> String {
    places
        .iter()
        .map(|(topic_partition, offset)| format!("{topic_partition} at offset {offset}"))
        .collect::<Vec<_>>()
        .join("; ")
}
