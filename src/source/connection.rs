//! Facts about the cluster: identities, what the log holds, where to begin. Reads no record.
//!
//! Flow: [`Connection::open`] -> [`Connection::describe`] -> [`Connection::offsets`] -> [`Connection::resolve_start`]
//!
//! Every question is asked again while the answer is a passing error, until `answer_time_max` has passed; offsets of
//! all topic partitions are asked in one request per broker.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{CommitMode, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::job::{KafkaSource, Setting, StartPosition};
use crate::offset::{NextOffset, TopicId, TopicPartition};
use crate::source::client::{KafkaClient, is_tls_alert};
use crate::source::config::client_config;
use crate::source::error::{ACLS_NEEDED, SourceError};
use crate::source::ranges::OffsetRange;
use crate::source::topic_ids::describe_topics;

/// Longest wait for an answer of the cluster, unless the job sets `socket.connection.setup.timeout.ms`.
pub const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a topic may be unknown: one that was just created takes a moment to be known by every broker.
const UNKNOWN_TOPIC_TIME_MAX: Duration = Duration::from_secs(2);
/// Longest single question, so that a refused connection is seen before all time has passed.
const QUESTION_TIME_MAX: Duration = Duration::from_secs(5);
/// From one look for new topic partitions to the next, unless the job sets `topic.metadata.refresh.interval.ms`.
const LOOK_INTERVAL_DEFAULT: Duration = Duration::from_secs(60);
/// Longest single question of a client that may not be connected yet.
const CONNECT_QUESTION_TIME: Duration = Duration::from_secs(1);
/// Pause before a question is asked again.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Most names shown for an unknown topic.
const NEAREST_MAX: usize = 3;
/// Least similarity (Jaro-Winkler) of a name that is shown.
const NEAREST_SIMILARITY_MIN: f64 = 0.8;

/// Identity of a cluster and its topics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterFacts {
    /// The cluster's id; `None` where brokers give none (before Kafka 0.10.1).
    pub cluster_id: Option<String>,
    /// The job's topics, sorted by name.
    pub topics: Vec<TopicFacts>,
}

/// Identity of one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicFacts {
    /// Name of the topic.
    pub topic: String,
    /// Its id (KIP-516); `None` where brokers give none (before Kafka 2.8).
    pub id: Option<TopicId>,
    /// Number of topic partitions; at least 1.
    pub partitions: i32,
}

impl ClusterFacts {
    /// All topic partitions, sorted.
    pub fn topic_partitions(&self) -> Vec<TopicPartition> {
        let of_topic = |facts: &TopicFacts| {
            let topic = facts.topic.clone();
            (0..facts.partitions).map(move |partition| TopicPartition::new(topic.clone(), partition))
        };
        let mut all: Vec<_> = self.topics.iter().flat_map(of_topic).collect();
        all.sort();
        all
    }
}

/// A client of the job's cluster that asks and commits group offsets, and from which readers are made.
pub struct Connection {
    client: KafkaClient,
    pub(super) config: ClientConfig,
    pub(super) queue_bytes: u64,
    pub(super) record_bytes_max: u64,
    topics: Vec<String>,
    pub(super) brokers: String,
    answer_time_max: Duration,
}

impl std::fmt::Debug for Connection {
    /// Shows no configuration: it may hold secrets.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Connection").field("brokers", &self.brokers).field("topics", &self.topics).finish()
    }
}

impl Connection {
    /// Starts the client for a job. Connects in the background: an unreachable cluster shows in the first question.
    ///
    /// `queue_bytes` is what a reader's queues may hold; it belongs to the memory budget of the process.
    ///
    /// # Errors
    /// [`SourceError::Property`]: the job file must change.
    pub fn open(source: &KafkaSource, queue_bytes: u64, job_name: &str) -> Result<Self, SourceError> {
        let config = client_config(source, job_name)?;
        let addresses = ["bootstrap.servers", "metadata.broker.list"];
        let brokers = match addresses.into_iter().find_map(|name| source.properties.get(name)) {
            Some(Setting::Plain(addresses)) => addresses.clone(),
            Some(reference) => format!("{reference:?}"),
            None => {
                let problem = "is missing: name the brokers, as host:port,host:port".to_owned();
                return Err(SourceError::Property { property: "bootstrap.servers".to_owned(), problem });
            }
        };
        let answer_time_max = config
            .get("socket.connection.setup.timeout.ms")
            .and_then(|text| text.parse().ok())
            .map_or(ANSWER_TIME_MAX, Duration::from_millis);
        Ok(Self {
            client: KafkaClient::start(&config)?,
            config,
            queue_bytes,
            record_bytes_max: source.record_bytes_max,
            topics: source.topics.clone(),
            brokers,
            answer_time_max,
        })
    }

    /// From one look for new topic partitions to the next; `None` if the job wants none (-1, as librdkafka has it).
    pub fn look_interval(&self) -> Option<Duration> {
        let asked =
            self.config.get("topic.metadata.refresh.interval.ms").and_then(|text| text.parse::<i64>().ok());
        asked.map_or(Some(LOOK_INTERVAL_DEFAULT), |interval_ms| {
            u64::try_from(interval_ms).ok().map(Duration::from_millis)
        })
    }

    /// Asks for the identity of the cluster and the job's topics. Needs DESCRIBE on the topics and no more.
    ///
    /// # Errors
    /// [`SourceError::Away`] after the bound, [`SourceError::UnknownTopic`] with the nearest names,
    /// [`SourceError::NotAuthorized`].
    pub fn describe(&self) -> Result<ClusterFacts, SourceError> {
        let mut topics = Vec::with_capacity(self.topics.len());
        let mut asked = Question::new(self, "asking for the topics");
        let mut unknown_until = None;
        'ask: loop {
            let answers = self.broker_to_ask(asked.tries, asked.time()).and_then(|broker_id| {
                describe_topics(self.client.consumer().client(), broker_id, &self.topics, asked.time())
            });
            let answers = match answers {
                Ok(answers) => answers,
                Err(code) => {
                    asked.again(code)?;
                    continue;
                }
            };
            let unknown_until = *unknown_until.get_or_insert_with(|| Instant::now() + UNKNOWN_TOPIC_TIME_MAX);
            topics.clear();
            for answer in answers {
                match answer.facts {
                    Ok((id, partitions)) => {
                        topics.push(TopicFacts { topic: answer.topic, id, partitions });
                    }
                    Err(code) if is_unknown_topic(code) && Instant::now() >= unknown_until => {
                        return Err(self.unknown_topic(answer.topic));
                    }
                    Err(RDKafkaErrorCode::TopicAuthorizationFailed) => {
                        return Err(not_authorized(
                            &answer.topic,
                            RDKafkaErrorCode::TopicAuthorizationFailed,
                        ));
                    }
                    Err(code) => {
                        asked.again(code)?;
                        continue 'ask;
                    }
                }
            }
            break;
        }
        topics.sort_by(|one, other| one.topic.cmp(&other.topic));
        // Brokers that gave the topics have given their cluster's id before, if they have one.
        let client = self.client.consumer().client();
        let cluster_id = [CONNECT_QUESTION_TIME, QUESTION_TIME_MAX]
            .into_iter()
            .find_map(|time| client.fetch_cluster_id(time));
        Ok(ClusterFacts { cluster_id, topics })
    }

    /// A broker of the cluster, another one with each try.
    fn broker_to_ask(&self, tries: usize, timeout: Duration) -> Result<i32, RDKafkaErrorCode> {
        let timeout = timeout.min(CONNECT_QUESTION_TIME);
        let metadata = self
            .client
            .consumer()
            .client()
            .fetch_metadata(self.topics.first().map(String::as_str), timeout)
            .map_err(|error| code_of(&error))?;
        let brokers = metadata.brokers();
        brokers
            .get(tries % brokers.len().max(1))
            .map(|broker| broker.id())
            .ok_or(RDKafkaErrorCode::AllBrokersDown)
    }

    /// Asks what the broker holds of each topic partition. `end` is the last stable offset: librdkafka sends the
    /// isolation level of the client, here `read_committed`, with every question for offsets.
    ///
    /// Costs two requests per broker, whatever the number of topic partitions.
    ///
    /// # Errors
    /// As [`Connection::describe`].
    pub fn offsets(
        &self,
        topic_partitions: &[TopicPartition],
    ) -> Result<BTreeMap<TopicPartition, OffsetRange>, SourceError> {
        if topic_partitions.is_empty() {
            return Ok(BTreeMap::new());
        }
        // Low first: the log may only lose at its start and gain at its end in between, so low <= end.
        let lows = self.list_offsets(topic_partitions, Offset::Beginning)?;
        let ends = self.list_offsets(topic_partitions, Offset::End)?;
        let mut held = BTreeMap::new();
        for topic_partition in topic_partitions {
            let (Some(&Some(low)), Some(&Some(end))) = (lows.get(topic_partition), ends.get(topic_partition))
            else {
                let problem = format!("the answer has no offsets for {topic_partition}");
                return Err(SourceError::Client { doing: "asking for offsets", problem });
            };
            held.insert(topic_partition.clone(), OffsetRange { low, end: end.max(low) });
        }
        Ok(held)
    }

    /// Ends of logs with the records of open transactions, which a committed reader does not get to see yet.
    ///
    /// Asks by a client of its own, which lives for one question: librdkafka has one isolation level per client.
    ///
    /// # Errors
    /// As [`Connection::describe`].
    pub fn ends_with_open_transactions(
        &self,
        topic_partitions: &[TopicPartition],
    ) -> Result<BTreeMap<TopicPartition, NextOffset>, SourceError> {
        if topic_partitions.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut config = self.config.clone();
        config.set("isolation.level", "read_uncommitted");
        let asking = Self {
            client: KafkaClient::start(&config)?,
            config,
            topics: self.topics.clone(),
            brokers: self.brokers.clone(),
            ..*self
        };
        let ends = asking.list_offsets(topic_partitions, Offset::End)?;
        Ok(ends.into_iter().filter_map(|(name, end)| Some((name, end?))).collect())
    }

    /// Next offsets for topic partitions that the ledger does not know.
    ///
    /// `held` must have all of them, from [`Connection::offsets`]. A timestamp gives the first offset, in log order,
    /// whose record carries it or a later one; where there is none, the end. Explicit offsets leave topic partitions
    /// that are not named at earliest.
    ///
    /// # Errors
    /// [`SourceError::StartOutOfRange`] and [`SourceError::UnknownPartition`] for explicit offsets; otherwise as
    /// [`Connection::describe`].
    pub fn resolve_start(
        &self,
        start: &StartPosition,
        held: &BTreeMap<TopicPartition, OffsetRange>,
    ) -> Result<BTreeMap<TopicPartition, NextOffset>, SourceError> {
        if let StartPosition::Timestamp(timestamp_ms) = start {
            let topic_partitions: Vec<_> = held.keys().cloned().collect();
            // Negative numbers would be read as "earliest" and "latest"; before 1970 everything is later.
            let found = self.list_offsets(&topic_partitions, Offset::Offset((*timestamp_ms).max(0)))?;
            let next = |(place, range): (&TopicPartition, &OffsetRange)| {
                let offset = found.get(place).copied().flatten().unwrap_or(range.end);
                (place.clone(), offset.clamp(range.low, range.end))
            };
            return Ok(held.iter().map(next).collect());
        }
        start_in(start, held)
    }

    /// One offset per topic partition; `None` where no record has the wanted timestamp.
    fn list_offsets(
        &self,
        topic_partitions: &[TopicPartition],
        wanted: Offset,
    ) -> Result<BTreeMap<TopicPartition, Option<NextOffset>>, SourceError> {
        if topic_partitions.is_empty() {
            return Ok(BTreeMap::new());
        }
        let mut asked = Question::new(self, "asking for offsets");
        'ask: loop {
            let mut list = TopicPartitionList::with_capacity(topic_partitions.len());
            for topic_partition in topic_partitions {
                list.add_partition_offset(&topic_partition.topic, topic_partition.partition, wanted)
                    .map_err(|error| client_error("asking for offsets", &error))?;
            }
            let answer = match self.client.consumer().offsets_for_times(list, asked.time()) {
                Ok(answer) => answer,
                Err(error) => {
                    asked.again(code_of(&error))?;
                    continue;
                }
            };
            let mut offsets = BTreeMap::new();
            for element in answer.elements() {
                if let Err(error) = element.error() {
                    asked.again(code_of(&error))?;
                    continue 'ask;
                }
                let offset = match element.offset() {
                    Offset::Offset(offset) => Some(NextOffset::at(offset)),
                    _ => None,
                };
                offsets.insert(TopicPartition::new(element.topic(), element.partition()), offset);
            }
            return Ok(offsets);
        }
    }

    /// Writes next offsets to the consumer group, for lag tools. Does not wait; nothing reads them back (R4), so a
    /// failure is noted once at debug.
    pub fn commit_group_offsets(&self, positions: &BTreeMap<TopicPartition, NextOffset>) {
        // Replies to earlier commits and to the search for the group's coordinator wait here.
        if let Err(error) = self.client.serve() {
            tracing::debug!(%error, "unexpected event on the client that asks");
        }
        let context = self.client.context();
        if context.is_group_refused() {
            // A commit would wait for a coordinator for ever and hold up the end of the client.
            return context
                .note_failed_commit(&KafkaError::Global(RDKafkaErrorCode::GroupAuthorizationFailed));
        }
        let mut list = TopicPartitionList::with_capacity(positions.len());
        for (topic_partition, next) in positions {
            let TopicPartition { topic, partition } = topic_partition;
            if let Err(error) = list.add_partition_offset(topic, *partition, Offset::Offset(next.get())) {
                return context.note_failed_commit(&error);
            }
        }
        if let Err(error) = self.client.consumer().commit(&list, CommitMode::Async) {
            context.note_failed_commit(&error);
        }
    }

    fn unknown_topic(&self, topic: String) -> SourceError {
        let mut nearest: Vec<(f64, String)> = Vec::new();
        // A principal sees only topics that it may describe, so the list may well be empty.
        if let Ok(metadata) = self.client.consumer().client().fetch_metadata(None, QUESTION_TIME_MAX) {
            for known in metadata.topics() {
                let similarity = strsim::jaro_winkler(&topic, known.name());
                if similarity >= NEAREST_SIMILARITY_MIN {
                    nearest.push((similarity, known.name().to_owned()));
                }
            }
        }
        nearest.sort_by(|one, other| other.0.total_cmp(&one.0).then_with(|| one.1.cmp(&other.1)));
        nearest.truncate(NEAREST_MAX);
        SourceError::UnknownTopic { topic, nearest: nearest.into_iter().map(|(_, name)| name).collect() }
    }
}

/// Start positions that need no question.
fn start_in(
    start: &StartPosition,
    held: &BTreeMap<TopicPartition, OffsetRange>,
) -> Result<BTreeMap<TopicPartition, NextOffset>, SourceError> {
    let mut next_offsets: BTreeMap<_, _> = held
        .iter()
        .map(|(place, range)| {
            (place.clone(), if *start == StartPosition::Latest { range.end } else { range.low })
        })
        .collect();
    let StartPosition::Offsets(named) = start else {
        return Ok(next_offsets);
    };
    for (topic, partitions) in named {
        for (&partition, &offset) in partitions {
            let topic_partition = TopicPartition::new(topic.clone(), partition);
            let Some(range) = held.get(&topic_partition) else {
                // Topics outside the question are known to the ledger already; their start is history.
                if held.keys().any(|place| place.topic == *topic) {
                    let count = held.keys().filter(|place| place.topic == *topic).count();
                    let partitions = i32::try_from(count).unwrap_or(i32::MAX);
                    return Err(SourceError::UnknownPartition { topic_partition, partitions });
                }
                continue;
            };
            let offset = NextOffset::at(offset);
            if offset < range.low || offset > range.end {
                let OffsetRange { low, end } = *range;
                return Err(SourceError::StartOutOfRange { topic_partition, offset, low, end });
            }
            next_offsets.insert(topic_partition, offset);
        }
    }
    Ok(next_offsets)
}

/// A question that is asked until it is answered, refused, or too late.
struct Question<'a> {
    connection: &'a Connection,
    doing: &'static str,
    begun: Instant,
    tries: usize,
}

impl<'a> Question<'a> {
    fn new(connection: &'a Connection, doing: &'static str) -> Self {
        Self { connection, doing, begun: Instant::now(), tries: 0 }
    }

    /// Time for the next try; never zero, so that a last try is a real one.
    fn time(&self) -> Duration {
        let left = self.connection.answer_time_max.saturating_sub(self.begun.elapsed());
        left.clamp(ASK_AGAIN_AFTER, QUESTION_TIME_MAX)
    }

    /// Decides on a failed try: an error, or a pause before the next.
    fn again(&mut self, code: RDKafkaErrorCode) -> Result<(), SourceError> {
        self.tries += 1;
        self.connection.client.serve()?;
        let context = self.connection.client.context();
        if let Some(answer) = context.refused() {
            let needed = needed_to_connect(&answer);
            let what = format!("the connection to {}", self.connection.brokers);
            return Err(SourceError::NotAuthorized { what, answer, needed });
        }
        if code == RDKafkaErrorCode::TopicAuthorizationFailed {
            return Err(not_authorized(&self.connection.topics.join(", "), code));
        }
        let waited = self.begun.elapsed();
        if waited >= self.connection.answer_time_max {
            return Err(SourceError::Away {
                brokers: self.connection.brokers.clone(),
                doing: self.doing,
                waited,
                last: format!("{code}; {}", context.last_error()),
            });
        }
        // The client tells of no condition: the next answer is the condition, and the whole question has a bound.
        thread::sleep(ASK_AGAIN_AFTER);
        Ok(())
    }
}

/// What a refused connection lacks, by the client's words for it, as far as they tell.
fn needed_to_connect(answer: &str) -> &'static str {
    let says = |word: &str| answer.contains(word);
    if says("mechanism handshake failed") || says("Unsupported SASL mechanism") {
        "a sasl.mechanism that the broker offers"
    } else if says("SASL") {
        "the right sasl.username and sasl.password, and a sasl.mechanism that knows them"
    } else if is_tls_alert(answer) {
        "a client certificate that the brokers trust, in ssl.keystore.location, or in ssl.certificate.location and \
         ssl.key.location"
    } else if says("certificate verify failed") {
        "a broker certificate that ssl.ca.location proves, that names the host in bootstrap.servers and has not expired"
    } else {
        "a security.protocol, credentials and certificates in [source.kafka.properties] that the brokers take"
    }
}

/// Whether a code says that a topic or topic partition does not exist.
pub(super) fn is_unknown_topic(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::InvalidTopic
    )
}

pub(super) fn not_authorized(topic: &str, code: RDKafkaErrorCode) -> SourceError {
    SourceError::NotAuthorized {
        what: format!("topic {topic}"),
        answer: code.to_string(),
        needed: ACLS_NEEDED,
    }
}

pub(super) fn code_of(error: &KafkaError) -> RDKafkaErrorCode {
    error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail)
}

pub(super) fn client_error(doing: &'static str, error: &KafkaError) -> SourceError {
    SourceError::Client { doing, problem: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> BTreeMap<TopicPartition, OffsetRange> {
        let range = |low, end| OffsetRange { low: NextOffset::at(low), end: NextOffset::at(end) };
        BTreeMap::from([
            (TopicPartition::new("a", 0), range(5, 10)),
            (TopicPartition::new("a", 1), range(0, 0)),
            (TopicPartition::new("b", 0), range(3, 4)),
        ])
    }

    fn starts(start: &StartPosition) -> Vec<i64> {
        start_in(start, &held()).unwrap().values().map(|next| next.get()).collect()
    }

    fn offsets(named: &[(&str, i32, i64)]) -> StartPosition {
        let mut topics: BTreeMap<String, BTreeMap<i32, i64>> = BTreeMap::new();
        for (topic, partition, offset) in named {
            topics.entry(topic.to_string()).or_default().insert(*partition, *offset);
        }
        StartPosition::Offsets(topics)
    }

    #[test]
    fn a_refused_connection_names_the_fields_that_librdkafkas_words_point_to() {
        for (answer, field) in [
            ("SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism", "sasl.mechanism"),
            (
                "SASL authentication error: Authentication failed: Invalid username or password",
                "sasl.password",
            ),
            (
                "Receive failed: error:0A000412:SSL routines::ssl/tls alert bad certificate: SSL alert number 42",
                "ssl.keystore.location",
            ),
            (
                "SSL handshake failed: error:0A000086:SSL routines::certificate verify failed",
                "ssl.ca.location",
            ),
            (
                "SSL handshake failed: Disconnected: connecting to a PLAINTEXT broker listener?",
                "security.protocol",
            ),
        ] {
            assert!(needed_to_connect(answer).contains(field), "{answer}");
        }
    }

    #[test]
    fn earliest_is_low_and_latest_is_the_end() {
        assert_eq!(starts(&StartPosition::Earliest), [5, 0, 3]);
        assert_eq!(starts(&StartPosition::Latest), [10, 0, 4]);
    }

    #[test]
    fn explicit_offsets_leave_other_topic_partitions_at_earliest() {
        assert_eq!(starts(&offsets(&[("a", 0, 10), ("b", 0, 3)])), [10, 0, 3]);
        assert_eq!(starts(&offsets(&[("a", 0, 7)])), [7, 0, 3]);
    }

    #[test]
    fn an_explicit_offset_outside_the_log_is_refused_with_both_bounds() {
        for outside in [4, 11] {
            let error = start_in(&offsets(&[("a", 0, outside)]), &held()).unwrap_err();
            assert!(error.to_string().contains(&format!("start offset {outside} of a[0]")), "{error}");
            assert!(error.to_string().contains("[5, 10)"), "{error}");
        }
    }

    #[test]
    fn an_explicit_offset_of_a_topic_partition_that_is_not_there_is_refused() {
        let error = start_in(&offsets(&[("a", 2, 0)]), &held()).unwrap_err();
        assert_eq!(error.to_string(), "topic partition a[2] does not exist: the topic has 2 partitions");
    }
}
