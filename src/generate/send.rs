//! Sends generated records to Kafka and answers only when the broker has confirmed every one.
//!
//! Flow: [`GeneratedRecord`] -> [`Sender::send`] -> librdkafka's queue -> broker -> confirmations -> [`Sent`]
//!
//! The producer is idempotent: each topic partition holds the records in the order and number in which they were
//! handed over, also when a request is sent again. A failure therefore leaves a prefix of each topic partition's
//! records in doubt, and the truth no longer describes the topic: the error says so.
//!
//! Bounds: records that wait in the client, [`QUEUE_BYTES_MAX`] and [`QUEUE_RECORDS_MAX`]; the wait for the last
//! confirmation, [`CONFIRM_TIME_MAX`].

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;

use super::{GenerateError, GeneratedRecord, client_error};

/// Most payload that waits in the client.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Most records that wait in the client; a record costs the client about 200 bytes beyond its own.
pub const QUEUE_RECORDS_MAX: usize = 200_000;
/// Longest time from a record's hand-over to its confirmation.
pub const CONFIRM_TIME_MAX: Duration = Duration::from_secs(120);
/// How long a full queue is waited for before it is tried again.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(5);
/// Records between two calls of the progress function.
const PROGRESS_RECORDS: u64 = 4_096;
/// Longest time for an answer about topics.
const ADMIN_TIME_MAX: Duration = Duration::from_secs(30);
/// Pause between two looks whether new topics are known to the brokers.
const TOPIC_KNOWN_WAIT: Duration = Duration::from_millis(200);

/// What [`Sender::send`] did: all of it is confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Records.
    pub records: u64,
    /// Bytes of keys, payloads and headers, before compression.
    pub bytes: u64,
    /// From the first record to the last confirmation.
    pub time: Duration,
}

/// A producer that stays connected from wave to wave.
pub struct Sender {
    producer: ThreadedProducer<Confirmations>,
    confirmations: Arc<Tally>,
}

/// Confirmations since the sender was made.
#[derive(Debug, Default)]
struct Tally {
    confirmed: AtomicU64,
    first_failure: Mutex<Option<String>>,
}

struct Confirmations(Arc<Tally>);

impl ClientContext for Confirmations {}

impl ProducerContext for Confirmations {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        match result {
            Ok(_) => {
                self.0.confirmed.fetch_add(1, Ordering::Release);
            }
            Err((error, _)) => {
                let mut first = self.0.first_failure.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert_with(|| error.to_string());
            }
        }
    }
}

impl Sender {
    /// Makes an idempotent producer. `properties` are librdkafka's own and win over the defaults here; secrets in
    /// them are resolved already.
    ///
    /// # Errors
    /// [`GenerateError::Property`] names a property that the client refuses, [`GenerateError::Client`] says that
    /// it could not be made. A broker that does not answer shows in [`Sender::send`].
    pub fn connect(bootstrap: &str, properties: &BTreeMap<String, String>) -> Result<Self, GenerateError> {
        let mut config = ClientConfig::new();
        config
            .set("enable.idempotence", "true")
            .set("compression.type", "lz4")
            .set("linger.ms", "20")
            .set("queue.buffering.max.kbytes", (QUEUE_BYTES_MAX >> 10).to_string())
            .set("queue.buffering.max.messages", QUEUE_RECORDS_MAX.to_string())
            .set("message.timeout.ms", CONFIRM_TIME_MAX.as_millis().to_string());
        config.extend(properties.clone());
        config.set("bootstrap.servers", bootstrap);
        let confirmations = Arc::new(Tally::default());
        let producer = config
            .create_with_context(Confirmations(Arc::clone(&confirmations)))
            .map_err(|error| client_error("making a producer", bootstrap, error))?;
        Ok(Self { producer, confirmations })
    }

    /// Sends the records in their order and waits until all are confirmed. `progress` is told the number of records
    /// handed over, now and then and at the end.
    ///
    /// # Errors
    /// [`GenerateError::Refused`] or [`GenerateError::NotConfirmed`]: the topics hold an unknown part of the
    /// records; go on with fresh topics and a fresh sender. A failure ends the sending early.
    pub fn send(
        &self,
        records: impl IntoIterator<Item = GeneratedRecord>,
        mut progress: impl FnMut(u64),
    ) -> Result<Sent, GenerateError> {
        let begin = Instant::now();
        let confirmed_before = self.confirmations.confirmed.load(Ordering::Acquire);
        let mut sent = Sent { records: 0, bytes: 0, time: Duration::ZERO };
        for record in records {
            self.hand_over(&record, sent.records)?;
            sent.records += 1;
            sent.bytes += record.bytes();
            if sent.records.is_multiple_of(PROGRESS_RECORDS) {
                progress(sent.records);
                if self.first_failure().is_some() {
                    return Err(self.not_confirmed(sent.records, confirmed_before, None));
                }
            }
        }
        progress(sent.records);
        let flushed = self.producer.flush(CONFIRM_TIME_MAX + QUEUE_FULL_WAIT);
        let confirmed = self.confirmations.confirmed.load(Ordering::Acquire) - confirmed_before;
        if confirmed == sent.records {
            sent.time = begin.elapsed();
            return Ok(sent);
        }
        Err(self.not_confirmed(sent.records, confirmed_before, flushed.err()))
    }

    fn not_confirmed(&self, sent: u64, confirmed_before: u64, flushed: Option<KafkaError>) -> GenerateError {
        let first_failure = self
            .first_failure()
            .or_else(|| flushed.map(|error| error.to_string()))
            .unwrap_or_else(|| "no confirmation came".to_owned());
        let confirmed = self.confirmations.confirmed.load(Ordering::Acquire) - confirmed_before;
        GenerateError::NotConfirmed { sent, confirmed, first_failure }
    }

    fn first_failure(&self) -> Option<String> {
        self.confirmations.first_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Gives one record to the client, waiting while its queue is full: the queue drains by confirmations or by
    /// `message.timeout.ms`, so the wait ends.
    fn hand_over(&self, record: &GeneratedRecord, record_number: u64) -> Result<(), GenerateError> {
        loop {
            match self.producer.send(client_record(record)) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), _)) => {
                    // The producer's own thread makes room; the next try is the condition.
                    std::thread::sleep(QUEUE_FULL_WAIT);
                }
                Err((source, _)) => {
                    return Err(GenerateError::Refused {
                        record_number,
                        topic: record.topic.to_string(),
                        partition: record.partition,
                        source,
                    });
                }
            }
        }
    }
}

/// Shows no property: they may hold secrets.
impl std::fmt::Debug for Sender {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Sender").field("confirmations", &self.confirmations).finish_non_exhaustive()
    }
}

impl GeneratedRecord {
    /// Bytes of key, payload and headers.
    pub fn bytes(&self) -> u64 {
        let length = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let headers: usize = self.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        (length(&self.key) + length(&self.payload) + headers) as u64
    }
}

fn client_record(record: &GeneratedRecord) -> BaseRecord<'_, [u8], [u8]> {
    let mut out = BaseRecord::to(&record.topic).partition(record.partition);
    out.key = record.key.as_deref();
    out.payload = record.payload.as_deref();
    out.timestamp = record.timestamp_ms;
    if !record.headers.is_empty() {
        let headers = OwnedHeaders::new_with_capacity(record.headers.len());
        out.headers = Some(record.headers.iter().fold(headers, |headers, (name, value)| {
            headers.insert(Header { key: name, value: Some(value) })
        }));
    }
    out
}

/// Makes sure that each topic exists with this number of topic partitions. New ones get the broker's replication
/// and keep their records for ever (`retention.ms=-1`): generated records carry timestamps of the past, which a
/// broker's usual retention of seven days would delete at once.
///
/// # Errors
/// [`GenerateError::PartitionsDiffer`] if a topic exists with another number, [`GenerateError::TopicNotCreated`]
/// with the broker's reason, [`GenerateError::Client`] if it does not answer.
pub fn create_topics(
    bootstrap: &str,
    properties: &BTreeMap<String, String>,
    topics: &[String],
    partitions: u32,
) -> Result<(), GenerateError> {
    let mut config = ClientConfig::new();
    config.extend(properties.clone());
    config.set("bootstrap.servers", bootstrap);
    let admin: AdminClient<DefaultClientContext> =
        config.create().map_err(|error| client_error("making an admin client", bootstrap, error))?;
    let missing = missing_topics(&admin, bootstrap, topics, partitions)?;
    if missing.is_empty() {
        return Ok(());
    }
    let new: Vec<NewTopic<'_>> = missing
        .iter()
        .map(|topic| {
            NewTopic::new(topic, partitions as i32, TopicReplication::Fixed(-1)).set("retention.ms", "-1")
        })
        .collect();
    let options =
        AdminOptions::new().request_timeout(Some(ADMIN_TIME_MAX)).operation_timeout(Some(ADMIN_TIME_MAX));
    let results = block_on(admin.create_topics(&new, &options))
        .map_err(|error| client_error("creating topics", bootstrap, error))?;
    for result in results {
        match result {
            // Another one created it between the look and the request: its topic partitions are checked below.
            Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((topic, code)) => {
                return Err(GenerateError::TopicNotCreated { topic, partitions, reason: code.to_string() });
            }
        }
    }
    await_topics(&admin, bootstrap, topics, partitions)
}

/// Waits until the brokers know all topics: a new topic is not known to each at once.
fn await_topics(
    admin: &AdminClient<DefaultClientContext>,
    bootstrap: &str,
    topics: &[String],
    partitions: u32,
) -> Result<(), GenerateError> {
    let begin = Instant::now();
    loop {
        let missing = missing_topics(admin, bootstrap, topics, partitions)?;
        let Some(topic) = missing.into_iter().next() else { return Ok(()) };
        if begin.elapsed() > ADMIN_TIME_MAX {
            let reason = format!("the brokers do not list it after {} s", ADMIN_TIME_MAX.as_secs());
            return Err(GenerateError::TopicNotCreated { topic, partitions, reason });
        }
        // Until the brokers list the topic, which the loop asks again, or the bound above.
        std::thread::sleep(TOPIC_KNOWN_WAIT);
    }
}

/// The topics that do not exist. Asks for all topics of the cluster, because asking for one by name makes some
/// brokers create it with their own number of topic partitions.
fn missing_topics(
    admin: &AdminClient<DefaultClientContext>,
    bootstrap: &str,
    topics: &[String],
    partitions: u32,
) -> Result<Vec<String>, GenerateError> {
    let metadata = admin
        .inner()
        .fetch_metadata(None, ADMIN_TIME_MAX)
        .map_err(|error| client_error("listing topics", bootstrap, error))?;
    let found: BTreeMap<&str, usize> =
        metadata.topics().iter().map(|topic| (topic.name(), topic.partitions().len())).collect();
    let mut missing = Vec::new();
    for topic in topics {
        match found.get(topic.as_str()) {
            Some(count) if *count == partitions as usize => {}
            Some(count) => {
                return Err(GenerateError::PartitionsDiffer {
                    topic: topic.clone(),
                    expected: partitions,
                    found: *count,
                });
            }
            None => missing.push(topic.clone()),
        }
    }
    Ok(missing)
}

/// Waits for a future on this thread, also where the thread belongs to an async runtime. The admin client answers
/// from a thread of its own.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
