//! Seeded notification events whose truth is known exactly, their producer, and a broker to try them on.
//!
//! A stream of records in the shape that real topics have: notifications are generated, most are sent and
//! delivered, some are clicked; a share of events comes again, near or far or on another topic partition, some with
//! other bytes; event times are out of order; a chosen number of records of every kind of fault lies between. What
//! a correct job must make of it is counted while it is made, so any run can be judged to the row.
//!
//! Flow: [`GeneratorConfig`] -> [`Generator`] -> [`GeneratedRecord`] -> [`Sender`] -> Kafka, or the in-process
//! [`Broker`] of the demo; [`Generator::truth`] -> [`Truth`] as JSON; [`demo_job_toml`] -> the job that fits.
//!
//! Invariants
//! 1. The stream follows from the configuration alone: same bytes on every machine and in every run. Draws are
//!    integers from ChaCha8; there is no floating-point function whose last bit could differ.
//! 2. Distinct events differ in `event_id` by construction: the id is a bijection of the event's number.
//! 3. Everything about an event follows from its number, so a repeat of any past event costs no memory.
//! 4. Skipping makes the same decisions as generating and only leaves out the bytes.
//!
//! Bounds: memory is events that were made and wait for their time (at most
//! [`EVENTS_PER_SECOND_MAX`](config::EVENTS_PER_SECOND_MAX) times the mean delay, 32 bytes each), the last
//! [`NEAR_EVENTS_MAX`](stream::NEAR_EVENTS_MAX) events, and the client's queue
//! ([`QUEUE_BYTES_MAX`](send::QUEUE_BYTES_MAX)).

pub mod broker;
pub mod config;
pub mod demo_job;
mod draws;
mod event;
mod payload;
pub mod send;
pub mod stream;

pub use broker::Broker;
pub use config::{GeneratorConfig, RepeatSplit, Topics};
pub use demo_job::demo_job_toml;
pub use event::EventType;
pub use send::{Sender, Sent, create_topics};
pub use stream::{GeneratedRecord, Generator, RepeatCounts, RepeatKind, Role, Truth, Wave};

use rdkafka::error::KafkaError;

/// Why events were not generated or not sent. One variant per way the caller must react.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A setting lies outside its range. Nothing was sent.
    #[error("generator setting {setting} is {found}; give {allowed}")]
    Setting {
        /// Field of [`GeneratorConfig`].
        setting: &'static str,
        /// The value found.
        found: String,
        /// What is allowed.
        allowed: String,
    },
    /// The Kafka client refused a property; its value is not repeated here, it may be a secret.
    #[error("kafka client property {property} is refused: {reason}")]
    Property {
        /// Name of the property.
        property: String,
        /// What librdkafka says about it.
        reason: String,
    },
    /// The Kafka client could not be made or asked.
    #[error("kafka client failed while {doing}; check that the broker at {bootstrap} can be reached")]
    Client {
        /// What it was asked to do.
        doing: &'static str,
        /// Bootstrap servers.
        bootstrap: String,
        /// The client's error.
        source: KafkaError,
    },
    /// A record was not taken by the client. Records before it may have been sent.
    #[error(
        "record {record_number} for {topic}[{partition}] was not taken by the client; use a fresh topic to keep \
             the truth exact"
    )]
    Refused {
        /// Number of the record in this wave, from 0.
        record_number: u64,
        /// Topic.
        topic: String,
        /// Topic partition.
        partition: i32,
        /// The client's error.
        source: KafkaError,
    },
    /// The broker did not confirm every record, so what the topic holds is unknown.
    #[error(
        "{confirmed} of {sent} records were confirmed, first failure: {first_failure}; use a fresh topic to keep \
             the truth exact"
    )]
    NotConfirmed {
        /// Records handed to the client.
        sent: u64,
        /// Records that the broker confirmed.
        confirmed: u64,
        /// The first failure, or that the time was over.
        first_failure: String,
    },
    /// A topic exists with another number of topic partitions, so the records would not fit it.
    #[error(
        "topic {topic} has {found} partitions and {expected} are asked for; name another topic or give \
             {found} partitions"
    )]
    PartitionsDiffer {
        /// Topic.
        topic: String,
        /// Topic partitions asked for.
        expected: u32,
        /// Topic partitions found.
        found: usize,
    },
    /// The broker did not create a topic.
    #[error("topic {topic} was not created: {reason}; create it with {partitions} partitions and try again")]
    TopicNotCreated {
        /// Topic.
        topic: String,
        /// Topic partitions asked for.
        partitions: u32,
        /// The broker's reason.
        reason: String,
    },
}

/// Converts an error of the client without repeating the value of a property.
fn client_error(doing: &'static str, bootstrap: &str, error: KafkaError) -> GenerateError {
    match error {
        KafkaError::ClientConfig(_, reason, property, _) => GenerateError::Property { property, reason },
        source => GenerateError::Client { doing, bootstrap: bootstrap.to_owned(), source },
    }
}

#[cfg(test)]
mod tests;
