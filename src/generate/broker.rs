//! A Kafka broker inside this process, for the demo and for tests: nothing to install, nothing left behind.
//!
//! It is librdkafka's own mock cluster: real sockets on localhost, the real protocol, records in memory.
//!
//! Limits, all of them silent
//! 1. A topic partition holds [`LOG_BYTES_MAX`] of record batches as they were sent, and at most
//!    [`LOG_BATCHES_MAX`] batches; the oldest are dropped to make room. So more than
//!    [`Broker::wave_records_max`] is sent in waves, each read before the next.
//! 2. Offsets for a timestamp are always the end; transactions are not isolated; topics are not made by request.
//! 3. Everything is gone when the [`Broker`] is dropped.

use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, Producer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::config::Topics;
use super::{GenerateError, client_error};

/// Record batches that a topic partition of the broker holds, in bytes (rdkafka_mock.c, librdkafka 2.12.1).
pub const LOG_BYTES_MAX: u64 = 5 << 20;
/// Record batches that a topic partition of the broker holds.
pub const LOG_BATCHES_MAX: u64 = 100_000;
/// Most bytes that a generated record takes in a record batch on average, uncompressed: about 340 of payload, 18 of
/// key, 66 of header on half of them, up to 20 of its own. Bad records that are too deep need more: 2.4 KB each.
pub const RECORD_BYTES_IN_LOG: u64 = 420;
/// Largest share of the records that goes to one of the topics per type, in hundredths: a third are `generated`.
const LARGEST_TYPE_PERCENT: u64 = 34;
/// How much of a log is filled: keys are hashed, so topic partitions differ by some hundredths.
const FILL_PERCENT: u64 = 85;

/// The only broker of the cluster.
const BROKER_ID: i32 = 1;

/// The broker. Lives as long as this value.
pub struct Broker {
    /// The client that the mock cluster belongs to; never used to send.
    owner: BaseProducer,
    bootstrap: String,
}

impl Broker {
    /// Starts a cluster of one broker on a free port of localhost.
    ///
    /// # Errors
    /// [`GenerateError::Client`] if the client library can not start it.
    pub fn start() -> Result<Self, GenerateError> {
        let failed = |error| client_error("starting the in-process broker", "localhost", error);
        let owner: BaseProducer =
            ClientConfig::new().set("test.mock.num.brokers", "1").create().map_err(failed)?;
        let bootstrap = owner
            .client()
            .mock_cluster()
            .expect("a client with mock brokers has a mock cluster")
            .bootstrap_servers();
        Ok(Self { owner, bootstrap })
    }

    /// Addresses for `bootstrap.servers`.
    pub fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    /// Creates topics with this number of topic partitions each.
    ///
    /// # Errors
    /// [`GenerateError::TopicNotCreated`] if a topic exists already or the number is not possible.
    pub fn create_topics(&self, topics: &[String], partitions: u32) -> Result<(), GenerateError> {
        let cluster = self.owner.client().mock_cluster().expect("the cluster lives as long as its client");
        for topic in topics {
            let refused =
                |reason: String| GenerateError::TopicNotCreated { topic: topic.clone(), partitions, reason };
            let count = i32::try_from(partitions).map_err(|error| refused(error.to_string()))?;
            cluster.create_topic(topic, count, 1).map_err(|error| refused(error.to_string()))?;
        }
        Ok(())
    }

    /// Takes the broker away, or brings it back with everything that it held. Connections are closed and refused meanwhile.
    ///
    /// # Errors
    /// [`GenerateError::Client`] if the client library refuses.
    pub fn set_away(&self, is_away: bool) -> Result<(), GenerateError> {
        let cluster = self.owner.client().mock_cluster().expect("the cluster lives as long as its client");
        let set = if is_away { cluster.broker_down(BROKER_ID) } else { cluster.broker_up(BROKER_ID) };
        set.map_err(|error| client_error("taking the in-process broker away", &self.bootstrap, error))
    }

    /// Refuses to give records, or gives them again: what is sent meanwhile pushes older records out unread.
    pub fn refuse_fetches(&self, is_refusing: bool) {
        /// More than a client asks in an hour: it waits half a second after each refusal.
        const REFUSALS: usize = 10_000;
        let cluster = self.owner.client().mock_cluster().expect("the cluster lives as long as its client");
        cluster.clear_request_errors(RDKafkaApiKey::Fetch);
        if is_refusing {
            let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT;
            cluster.request_errors(RDKafkaApiKey::Fetch, &[refusal; REFUSALS]);
        }
    }

    /// Refuses the next request for records as if it were not allowed. The one after it is answered as ever.
    pub fn forbid_one_fetch(&self) {
        let cluster = self.owner.client().mock_cluster().expect("the cluster lives as long as its client");
        let refusal = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
        cluster.request_errors(RDKafkaApiKey::Fetch, &[refusal]);
    }

    /// Most generated records that may be sent before they are read, so that none is dropped. Counts on no
    /// compression; the lz4 of [`Sender`](super::Sender) makes about 130 bytes of a record's 400.
    pub fn wave_records_max(topics: &Topics, partitions_per_topic: u32) -> u64 {
        let share_percent = match topics {
            Topics::One(_) => 100,
            Topics::PerType(_) => LARGEST_TYPE_PERCENT,
        };
        let topic_bytes = LOG_BYTES_MAX * u64::from(partitions_per_topic) * FILL_PERCENT / 100;
        topic_bytes / RECORD_BYTES_IN_LOG * 100 / share_percent
    }
}

/// The client inside has nothing to show.
impl std::fmt::Debug for Broker {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Broker").field("bootstrap", &self.bootstrap).finish_non_exhaustive()
    }
}
