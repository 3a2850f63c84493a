//! The configuration of librdkafka: the job's properties, then ours, then sizes from the memory budget.
//!
//! Invariants
//! 1. What exactness rests on is set last and can not be overridden by the job: offsets are never stored or committed
//!    by themselves, an offset out of range is an error, only committed records are read, checksums are verified.
//! 2. Nothing here is printed: not the configuration, not a refused value, not the client's text about one.
//!
//! Bounds: [`QueueSizes`] splits the client's share of the memory budget. All topic partitions that are read share one queue,
//! so its limits are those of all of them, however many they are. The limits are soft: a queue below them takes one more
//! response of each broker, whose size is limited as it is on the wire, compressed. The split leaves half for one response
//! at a compression of [`COMPRESSION_MAX`]: it is decompressed as a whole. At twice that it takes the whole share, which the
//! other shares, never full at once, have left free in every measurement (benches/whole/memory.py). Not bounded: a response
//! of each of several brokers, and a single record batch that is larger than a response.

use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;

use crate::job::KafkaSource;
use crate::mutant;
use crate::source::error::SourceError;

/// Bytes that a queued record costs beside its key and payload: librdkafka's operation and its allocation.
const RECORD_OVERHEAD_BYTES: u64 = 512;
/// Fewest queued records: a fetch always brings some.
const QUEUED_RECORDS_MIN: u64 = 16;
/// A log that is compressed better than this takes more memory by as much: 16,000 equal letters beside an event's 300 bytes are
/// compressed two hundredfold. Smaller responses would hold that too, and read a twentieth slower.
const COMPRESSION_MAX: u64 = 100;
/// Smallest and largest request for one topic partition. A larger record batch still comes whole (KIP-74), but only for the
/// first topic partition of a request that has any: with less than a usual batch a thousand of them wait in line.
const FETCH_BYTES_MIN: u64 = 64 << 10;
const FETCH_BYTES_MAX: u64 = 1 << 20;
/// Bounds of one response of a broker: below the least a far broker is slow, librdkafka's own default is the most.
const RESPONSE_BYTES_MIN: u64 = 64 << 10;
const RESPONSE_BYTES_MAX: u64 = 52_428_800;
/// Largest response that is accepted at all; librdkafka's default. A limit against broken lengths, not a reservation.
const RECEIVE_BYTES_DEFAULT: u64 = 100_000_000;
/// Room for the protocol around a record or response.
const PROTOCOL_BYTES: u64 = 1 << 20;
/// How long a topic partition waits before it looks again where the queue is full. librdkafka's default of a second
/// would starve small queues.
const FULL_QUEUE_BACKOFF_MS: u32 = 10;
/// How long a broker holds a request at the end of the log: the delay of the last end event of a drain.
const FETCH_WAIT_MS: u32 = 100;
/// The same for a log that is followed for ever: librdkafka's default. Records end the wait, so it delays none.
const FETCH_WAIT_AT_THE_END_MS: u32 = 500;

/// Properties that exactness rests on. Set after the job's own.
const FIXED: [(&str, &str); 10] = [
    ("enable.auto.commit", "false"),
    ("enable.auto.offset.store", "false"),
    ("auto.offset.reset", "error"),
    ("isolation.level", "read_committed"),
    ("enable.partition.eof", "true"),
    ("check.crcs", "true"),
    ("allow.auto.create.topics", "false"),
    ("statistics.interval.ms", "0"),
    ("log.connection.close", "false"),
    ("log.thread.name", "false"),
];

/// Lets brokers hold requests at the end of a log longer, unless the job says how long.
pub(super) fn wait_at_the_end(config: &mut ClientConfig) {
    if config.get("fetch.wait.max.ms") == Some(&FETCH_WAIT_MS.to_string()) {
        config.set("fetch.wait.max.ms", FETCH_WAIT_AT_THE_END_MS.to_string());
    }
}

/// Sizes of the client's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueSizes {
    /// Records after which the queue is full.
    pub queued_records: u64,
    /// KiB of payload after which the queue is full.
    pub queued_kib: u64,
    /// Bytes asked for per topic partition and request.
    pub fetch_bytes: u64,
    /// Bytes of one broker's response.
    pub response_bytes: u64,
    /// Bytes of the largest response that is accepted.
    pub receive_bytes: u64,
}

impl QueueSizes {
    /// Splits `queue_bytes`: a quarter for payload, a quarter for what records cost beside it, half for the response that
    /// may come on top, decompressed, of which each of the `topic_partitions` may take a part.
    pub fn plan(queue_bytes: u64, topic_partitions: usize, record_bytes_max: u64) -> Self {
        let share = queue_bytes / (topic_partitions.max(1) as u64);
        let response_bytes =
            (queue_bytes / 2 / COMPRESSION_MAX).clamp(RESPONSE_BYTES_MIN, RESPONSE_BYTES_MAX);
        let fetch_bytes = (share / 16).clamp(FETCH_BYTES_MIN, FETCH_BYTES_MAX).min(response_bytes);
        let receive_bytes = (response_bytes + record_bytes_max.saturating_mul(2) + PROTOCOL_BYTES)
            .clamp(RECEIVE_BYTES_DEFAULT, i32::MAX as u64);
        Self {
            queued_records: (queue_bytes / 4 / RECORD_OVERHEAD_BYTES).clamp(QUEUED_RECORDS_MIN, 10_000_000),
            queued_kib: (queue_bytes / 4 / 1024).clamp(1, 2_097_151),
            fetch_bytes,
            response_bytes,
            receive_bytes,
        }
    }

    /// Writes the sizes into a configuration.
    pub fn apply(&self, config: &mut ClientConfig) {
        config
            .set("queued.min.messages", self.queued_records.to_string())
            .set("queued.max.messages.kbytes", self.queued_kib.to_string())
            .set("fetch.message.max.bytes", self.fetch_bytes.to_string())
            .set("fetch.max.bytes", self.response_bytes.to_string())
            // librdkafka refuses a bound of a response that is below this, which otherwise says nothing of a consumer
            .set("message.max.bytes", self.response_bytes.to_string())
            .set("receive.message.max.bytes", self.receive_bytes.to_string())
            .set("fetch.queue.backoff.ms", FULL_QUEUE_BACKOFF_MS.to_string());
    }
}

/// Builds the configuration that both clients of a run share, without queue sizes.
///
/// # Errors
/// [`SourceError::Property`] names the property that can not be read or that librdkafka refuses.
pub(super) fn client_config(source: &KafkaSource, job_name: &str) -> Result<ClientConfig, SourceError> {
    let mut config = ClientConfig::new();
    config
        .set("group.id", format!("tidemill-{job_name}"))
        .set("client.id", format!("tidemill-{job_name}"))
        .set("fetch.wait.max.ms", FETCH_WAIT_MS.to_string())
        .set_log_level(RDKafkaLogLevel::Info);
    for (property, setting) in &source.properties {
        let value = setting
            .resolve()
            .map_err(|problem| SourceError::Property { property: property.clone(), problem })?;
        // The alias would otherwise be a second value for the same setting, in no particular order.
        if property == "metadata.broker.list" {
            config.set("bootstrap.servers", value);
        } else if property != "max.partition.fetch.bytes" {
            config.set(property, value);
        }
    }
    for (property, value) in FIXED {
        let value = mutant!("latest-on-reset", if value == "error" { "latest" } else { value } => value);
        config.set(property, value);
    }
    if config.get("debug").is_some() {
        config.set_log_level(RDKafkaLogLevel::Debug);
    }
    check_each(&config)?;
    Ok(config)
}

/// Tries the configuration, so that a refusal is reported here, by name, and never by the client with the value.
fn check_each(config: &ClientConfig) -> Result<(), SourceError> {
    match config.create_native_config() {
        Ok(_) => Ok(()),
        Err(rdkafka::error::KafkaError::ClientConfig(result, _, property, _)) => {
            let unknown = result == rdkafka::types::RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN;
            let problem =
                if unknown { "is not a property of librdkafka" } else { "has a value that is refused" };
            Err(SourceError::Property { property, problem: problem.to_owned() })
        }
        Err(_) => Err(SourceError::Property {
            property: "(some)".to_owned(),
            problem: "holds a byte 0, which librdkafka can not take".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::job::{Setting, StartPosition};

    fn source(properties: &[(&str, &str)]) -> KafkaSource {
        KafkaSource {
            topics: vec!["t".to_owned()],
            start: StartPosition::Earliest,
            properties: properties
                .iter()
                .map(|(name, value)| (name.to_string(), Setting::Plain(value.to_string())))
                .collect::<BTreeMap<_, _>>(),
            record_bytes_max: 4 << 20,
        }
    }

    #[test]
    fn the_job_can_not_override_what_exactness_rests_on() {
        let source = source(&[
            ("enable.auto.commit", "true"),
            ("isolation.level", "read_uncommitted"),
            ("auto.offset.reset", "latest"),
            ("check.crcs", "false"),
            ("group.id", "mine"),
        ]);
        let config = client_config(&source, "j").unwrap();
        for (property, value) in FIXED {
            assert_eq!(config.get(property), Some(value));
        }
        assert_eq!(config.get("group.id"), Some("mine"));
        assert_eq!(config.get("client.id"), Some("tidemill-j"));
    }

    #[test]
    fn a_refused_value_is_not_repeated() {
        let error = client_config(&source(&[("security.protocol", "s3cret")]), "j").unwrap_err();
        assert!(error.to_string().contains("security.protocol"), "{error}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
        let error = client_config(&source(&[("no.such.property", "s3cret")]), "j").unwrap_err();
        assert!(error.to_string().contains("no.such.property: is not a property"), "{error}");
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error:?}");
    }

    #[test]
    fn a_missing_environment_variable_is_named() {
        let mut source = source(&[]);
        source
            .properties
            .insert("sasl.password".to_owned(), Setting::Env("TIDEMILL_TEST_NOT_SET".to_owned()));
        let error = client_config(&source, "j").unwrap_err();
        assert!(error.to_string().contains("TIDEMILL_TEST_NOT_SET"), "{error}");
    }

    #[test]
    fn the_queue_of_all_topic_partitions_fits_the_budget_and_a_large_record_is_still_received() {
        for partitions in [1, 2, 32, 1_000] {
            for queue_bytes in [32 << 20, 256 << 20, 1 << 30] {
                let sizes = QueueSizes::plan(queue_bytes, partitions, 64 << 20);
                let queued = sizes.queued_kib * 1024 + sizes.queued_records * RECORD_OVERHEAD_BYTES;
                assert!(queued + sizes.response_bytes * COMPRESSION_MAX <= queue_bytes, "{sizes:?}");
                assert!(sizes.fetch_bytes <= sizes.response_bytes, "{sizes:?}");
                assert!(sizes.receive_bytes > 64 << 20);
                assert!(sizes.receive_bytes >= sizes.response_bytes + 512);
                let of_one = QueueSizes::plan(queue_bytes, 1, 64 << 20);
                assert_eq!(
                    (sizes.queued_records, sizes.queued_kib),
                    (of_one.queued_records, of_one.queued_kib)
                );
            }
        }
    }
}
