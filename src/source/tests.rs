//! The source against librdkafka's own broker in this process.
//!
//! That broker knows no transactions, no compaction and no timestamps (librdkafka 2.12.1); those are checked against a
//! real one.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::{BaseProducer, BaseRecord, DefaultProducerContext, Producer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::*;
use crate::job::{KafkaSource, Setting, StartPosition};
use crate::offset::{NextOffset, TopicPartition};
use crate::record::RecordChunk;
use crate::stop::Reason;

pub(super) const QUEUE_BYTES: u64 = 16 << 20;
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) type Mock = MockCluster<'static, DefaultProducerContext>;

pub(super) fn cluster(topics: &[(&str, i32)]) -> Mock {
    let cluster = MockCluster::new(1).unwrap();
    for (topic, partitions) in topics {
        cluster.create_topic(topic, *partitions, 1).unwrap();
    }
    cluster
}

pub(super) fn job(brokers: String, topics: &[&str]) -> KafkaSource {
    KafkaSource {
        topics: topics.iter().map(ToString::to_string).collect(),
        start: StartPosition::Earliest,
        properties: BTreeMap::from([
            ("bootstrap.servers".to_owned(), Setting::Plain(brokers)),
            ("socket.connection.setup.timeout.ms".to_owned(), Setting::Plain("4000".to_owned())),
        ]),
        record_bytes_max: 4 << 20,
    }
}

pub(super) fn connect(cluster: &Mock, topics: &[&str]) -> Connection {
    Connection::open(&job(cluster.bootstrap_servers(), topics), QUEUE_BYTES, "test").unwrap()
}

pub(super) fn producer(brokers: String) -> BaseProducer {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("linger.ms", "1")
        .set("batch.num.messages", "50")
        .create()
        .unwrap()
}

/// Sends records with payloads `from..to` to one topic partition and waits until they are written.
fn send(producer: &BaseProducer, topic: &str, partition: i32, payloads: std::ops::Range<u32>) {
    for number in payloads {
        let payload = format!("{topic}-{partition}-{number}");
        let record: BaseRecord<'_, [u8], str> = BaseRecord::to(topic).partition(partition).payload(&payload);
        producer.send(record).map_err(|(error, _)| error).unwrap();
        producer.poll(Duration::ZERO);
    }
    producer.flush(PATIENCE).unwrap();
}

/// Sends more than the broker in this process keeps of a topic partition (5 MiB): the first records are removed.
pub(super) fn send_large(producer: &BaseProducer, topic: &str, partition: i32) {
    let payload = vec![b'x'; 100_000];
    for _ in 0..80 {
        let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(topic).partition(partition).payload(&payload);
        producer.send(record).map_err(|(error, _)| error).unwrap();
        producer.flush(PATIENCE).unwrap();
    }
}

/// A plan from `starts`, or from low, to the end that is seen now.
pub(super) fn plan(
    connection: &Connection,
    starts: &BTreeMap<TopicPartition, (NextOffset, Option<Tail>)>,
) -> Vec<ReadPlan> {
    let all = connection.describe().unwrap().topic_partitions();
    let held = connection.offsets(&all).unwrap();
    held.into_iter()
        .map(|(topic_partition, range)| {
            let (start, tail) = starts.get(&topic_partition).copied().unwrap_or((range.low, None));
            ReadPlan { topic_partition, start, end: range.end, low: range.low, tail }
        })
        .collect()
}

/// A reader of everything that is held now.
fn from_low(connection: &Connection) -> Reader {
    Reader::assign(connection, plan(connection, &BTreeMap::new()), ReaderOptions::default()).unwrap()
}

pub(super) fn limits(records_max: usize, bytes_max: usize) -> ReadLimits {
    ReadLimits { records_max, bytes_max, deadline: Instant::now() + PATIENCE }
}

/// Everything up to the frozen ends, as (slot, offset, payload), in chunks of at most these sizes.
pub(super) fn drain(reader: &mut Reader, records_max: usize, bytes_max: usize) -> Vec<(u32, i64, String)> {
    let mut records = Vec::new();
    let mut chunk = RecordChunk::default();
    loop {
        chunk.clear();
        let status = reader.read(&mut chunk, limits(records_max, bytes_max)).unwrap();
        assert!(chunk.len() <= records_max);
        assert!(chunk.len() <= 1 || chunk.payload_bytes() <= bytes_max);
        for record in chunk.iter() {
            let payload = String::from_utf8(record.payload().unwrap().to_vec()).unwrap();
            records.push((record.slot(), record.offset(), payload));
        }
        match status {
            ReadStatus::Exhausted => return records,
            ReadStatus::Full => assert!(!chunk.is_empty()),
            ReadStatus::DeadlinePassed => panic!("drain takes longer than {PATIENCE:?}"),
        }
    }
}

pub(super) fn expected(
    topic: &str,
    partition: i32,
    slot: u32,
    offsets: std::ops::Range<i64>,
) -> Vec<(u32, i64, String)> {
    offsets.map(|offset| (slot, offset, format!("{topic}-{partition}-{offset}"))).collect()
}

pub(super) fn of_slot(records: &[(u32, i64, String)], slot: u32) -> Vec<(u32, i64, String)> {
    records.iter().filter(|record| record.0 == slot).cloned().collect()
}

pub(super) fn positions(reader: &Reader) -> Vec<i64> {
    reader.positions().into_iter().map(NextOffset::get).collect()
}

#[test]
fn a_cluster_is_described_with_its_id_and_the_ids_of_its_topics() {
    let cluster = cluster(&[("b", 3), ("a", 2)]);
    let facts = connect(&cluster, &["b", "a"]).describe().unwrap();
    assert!(facts.cluster_id.as_ref().is_some_and(|id| !id.is_empty()));
    let named: Vec<_> = facts.topics.iter().map(|facts| (facts.topic.as_str(), facts.partitions)).collect();
    assert_eq!(named, [("a", 2), ("b", 3)]);
    assert!(facts.topics.iter().all(|facts| facts.id.is_some()), "{facts:?}");
    assert_ne!(facts.topics[0].id, facts.topics[1].id);
    assert_eq!(facts.topic_partitions().len(), 5);
}

#[test]
fn an_unknown_topic_is_named_with_the_nearest_that_exists() {
    let cluster = cluster(&[("notifications.sent", 1), ("orders", 1)]);
    let error = connect(&cluster, &["notification.sent"]).describe().unwrap_err();
    let text = error.to_string();
    assert_eq!(text, "topic notification.sent does not exist on this cluster; nearest: notifications.sent");
    assert_eq!(error.reason(), crate::stop::Reason::UnknownTopic);
}

#[test]
fn a_cluster_that_does_not_answer_is_away_within_the_bound() {
    let begun = Instant::now();
    let connection = Connection::open(&job("127.0.0.1:1".to_owned(), &["t"]), QUEUE_BYTES, "test").unwrap();
    let error = connection.describe().unwrap_err();
    assert!(matches!(&error, SourceError::Away { brokers, .. } if brokers == "127.0.0.1:1"), "{error:?}");
    drop(connection);
    assert!(begun.elapsed() < Duration::from_secs(12), "{:?}", begun.elapsed());
}

#[test]
fn a_drain_ends_at_the_frozen_end_while_more_is_produced() {
    let cluster = cluster(&[("t", 2)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..1_000);
    send(&sender, "t", 1, 0..10);
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    // some before it reads, so that the end of the log is never the frozen end
    send(&sender, "t", 0, 1_000..1_020);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    assert_eq!(reader.lag_left(), 1_010);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = 1_020;
            while !stop.load(Ordering::Relaxed) {
                send(&sender, "t", 0, next..next + 20);
                next += 20;
            }
        });
        let records = drain(&mut reader, 300, 1 << 20);
        stop.store(true, Ordering::Relaxed);
        assert_eq!(of_slot(&records, 0), expected("t", 0, 0, 0..1_000));
        assert_eq!(of_slot(&records, 1), expected("t", 1, 1, 0..10));
        assert_eq!(positions(&reader), [1_000, 10]);
        assert_eq!(reader.lag_left(), 0);
    });
}

#[test]
fn slots_are_places_in_the_sorted_plan_of_all_topics() {
    let cluster = cluster(&[("b", 2), ("a", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "b", 1, 0..5);
    send(&sender, "a", 0, 0..7);
    let connection = connect(&cluster, &["b", "a"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan.reverse();
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let named: Vec<_> = reader.topic_partitions().map(ToString::to_string).collect();
    assert_eq!(named, ["a[0]", "b[0]", "b[1]"]);
    let records = drain(&mut reader, 100, 1 << 20);
    assert_eq!(of_slot(&records, 0), expected("a", 0, 0, 0..7));
    assert_eq!(of_slot(&records, 1), []);
    assert_eq!(of_slot(&records, 2), expected("b", 1, 2, 0..5));
    assert_eq!(reader.tails()[1], None);
    assert_eq!(reader.tails()[2].unwrap().offset, 4);
}

#[test]
fn an_end_event_below_the_frozen_end_does_not_finish_a_topic_partition() {
    let cluster = cluster(&[("t", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = NextOffset::at(15);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let mut chunk = RecordChunk::default();
    let deadline = Instant::now() + Duration::from_secs(2);
    let early =
        reader.read(&mut chunk, ReadLimits { records_max: 100, bytes_max: 1 << 20, deadline }).unwrap();
    assert_eq!((early, chunk.len()), (ReadStatus::DeadlinePassed, 10));
    assert_eq!(reader.at_end(), [true]);
    send(&sender, "t", 0, 10..20);
    assert_eq!(drain(&mut reader, 100, 1 << 20), expected("t", 0, 0, 10..15));
    assert_eq!(positions(&reader), [15]);
}

#[test]
fn a_reader_without_an_end_follows_the_log() {
    let cluster = cluster(&[("t", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = ReadPlan::no_end();
    let options = ReaderOptions { stall_after: Duration::from_secs(1), ..ReaderOptions::default() };
    let mut reader = Reader::assign(&connection, plan, options).unwrap();
    let mut chunk = RecordChunk::default();
    let silent = Instant::now() + Duration::from_secs(2);
    let quiet = reader
        .read(&mut chunk, ReadLimits { records_max: 100, bytes_max: 1 << 20, deadline: silent })
        .unwrap();
    assert_eq!((quiet, chunk.len()), (ReadStatus::DeadlinePassed, 0));
    send(&sender, "t", 0, 0..100);
    let full = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap();
    assert_eq!((full, chunk.len(), positions(&reader)), (ReadStatus::Full, 100, vec![100]));
}

#[test]
fn a_second_run_goes_on_where_the_first_stopped_without_loss_or_repeat() {
    let cluster = cluster(&[("t", 2)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..500);
    send(&sender, "t", 1, 0..300);
    let connection = connect(&cluster, &["t"]);
    let mut starts = BTreeMap::new();
    let mut records = Vec::new();
    for _ in 0..4 {
        let mut reader =
            Reader::assign(&connection, plan(&connection, &starts), ReaderOptions::default()).unwrap();
        reader.verify_tails(PATIENCE).unwrap();
        let mut chunk = RecordChunk::default();
        reader.read(&mut chunk, limits(250, 1 << 20)).unwrap();
        for record in chunk.iter() {
            let payload = String::from_utf8(record.payload().unwrap().to_vec()).unwrap();
            records.push((record.slot(), record.offset(), payload));
        }
        let places: Vec<_> = reader.topic_partitions().cloned().collect();
        for (index, place) in places.into_iter().enumerate() {
            starts.insert(place, (reader.positions()[index], reader.tails()[index]));
        }
    }
    assert_eq!(of_slot(&records, 0), expected("t", 0, 0, 0..500));
    assert_eq!(of_slot(&records, 1), expected("t", 1, 1, 0..300));
}

#[test]
fn a_tail_is_compared_even_where_nothing_is_left_to_read() {
    let cluster = cluster(&[("t", 2)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..10);
    send(&sender, "t", 1, 0..10);
    let connection = connect(&cluster, &["t"]);
    let mut first = from_low(&connection);
    drain(&mut first, 100, 1 << 20);
    let tails = first.tails();
    let start =
        |partition: i32, next: i64, tail| (TopicPartition::new("t", partition), (NextOffset::at(next), tail));

    let same = BTreeMap::from([start(0, 10, tails[0]), start(1, 10, tails[1])]);
    let mut reader = Reader::assign(&connection, plan(&connection, &same), ReaderOptions::default()).unwrap();
    reader.verify_tails(PATIENCE).unwrap();
    assert_eq!(drain(&mut reader, 100, 1 << 20), []);
    assert_eq!(reader.tails(), tails);

    let other = tails[1].map(|tail| Tail { hash: tail.hash ^ 1, ..tail });
    let differing = BTreeMap::from([start(0, 10, tails[0]), start(1, 10, other)]);
    let mut reader =
        Reader::assign(&connection, plan(&connection, &differing), ReaderOptions::default()).unwrap();
    let error = reader.verify_tails(PATIENCE).unwrap_err();
    let place = (TopicPartition::new("t", 1), 9);
    assert!(matches!(&error, SourceError::TailDiffers { places } if *places == [place]), "{error:?}");
}

#[test]
fn a_tail_that_differs_is_found_by_read_as_well_and_nothing_is_delivered() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let tail = Some(Tail { offset: 4, hash: 1 });
    let starts = BTreeMap::from([(TopicPartition::new("t", 0), (NextOffset::at(5), tail))]);
    let mut reader =
        Reader::assign(&connection, plan(&connection, &starts), ReaderOptions::default()).unwrap();
    let mut chunk = RecordChunk::default();
    let error = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap_err();
    assert!(matches!(error, SourceError::TailDiffers { .. }), "{error:?}");
    assert!(chunk.is_empty());
}

#[test]
fn records_keep_null_and_empty_keys_payloads_and_headers_apart() {
    let cluster = cluster(&[("t", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    let headers = OwnedHeaders::new()
        .insert(Header { key: "trace", value: Some("1") })
        .insert(Header { key: "trace", value: None::<&str> })
        .insert(Header { key: "empty", value: Some("") });
    let send = |record: BaseRecord<'_, str, str>| sender.send(record).map_err(|(error, _)| error).unwrap();
    send(BaseRecord::to("t").partition(0).timestamp(1_700_000_000_000));
    send(BaseRecord::to("t").partition(0).key("").payload(""));
    send(BaseRecord::to("t").partition(0).key("k").payload("p").headers(headers));
    sender.flush(PATIENCE).unwrap();
    let connection = connect(&cluster, &["t"]);
    let mut reader = from_low(&connection);
    let mut chunk = RecordChunk::default();
    assert_eq!(reader.read(&mut chunk, limits(100, 1 << 20)).unwrap(), ReadStatus::Exhausted);
    let records: Vec<_> = chunk.iter().collect();
    assert_eq!((records[0].key(), records[0].payload()), (None, None));
    assert_eq!(records[0].timestamp_ms(), Some(1_700_000_000_000));
    assert_eq!((records[1].key(), records[1].payload()), (Some(&b""[..]), Some(&b""[..])));
    assert_eq!((records[2].key(), records[2].payload()), (Some(&b"k"[..]), Some(&b"p"[..])));
    let headers: Vec<_> = records[2].headers().collect();
    assert_eq!(
        headers,
        [(&b"trace"[..], Some(&b"1"[..])), (&b"trace"[..], None), (&b"empty"[..], Some(&b""[..]))]
    );
    assert_eq!(records[0].headers().count(), 0);
    let tail = reader.tails()[0].unwrap();
    let last = records[2];
    assert_eq!(tail.hash, tail_hash(2, last.timestamp_ms(), last.key(), last.payload()));
}

#[test]
fn removed_records_are_lost_exactly_up_to_the_oldest_that_is_held() {
    let cluster = cluster(&[("t", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    send_large(&sender, "t", 0);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    let low = plan[0].start;
    assert!(low > NextOffset::at(0));
    plan[0].start = NextOffset::at(3);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 30)).unwrap_err();
    let SourceError::OffsetsLost { ranges } = &error else { panic!("{error:?}") };
    assert_eq!((ranges[0].from, ranges[0].to, ranges[0].loss), (NextOffset::at(3), low, Loss::Removed));
}

#[test]
fn a_start_past_the_end_of_the_log_is_a_cut_log() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    (plan[0].start, plan[0].end) = (NextOffset::at(12), NextOffset::at(14));
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 20)).unwrap_err();
    let SourceError::OffsetsLost { ranges } = &error else { panic!("{error:?}") };
    let range = (ranges[0].from.get(), ranges[0].to.get(), ranges[0].loss);
    assert_eq!(range, (10, 12, Loss::Truncated));
    assert_eq!(error.reason(), Reason::TopicChanged, "as a start says of the same log");
}

#[test]
fn a_damaged_record_batch_is_read_again_and_not_skipped() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..100);
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    let damaged = RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_MSG;
    cluster.request_errors(RDKafkaApiKey::Fetch, &[damaged, damaged]);
    let mut reader = Reader::assign(&connection, plan.clone(), ReaderOptions::default()).unwrap();
    assert_eq!(drain(&mut reader, 30, 1 << 20), expected("t", 0, 0, 0..100));

    cluster.request_errors(RDKafkaApiKey::Fetch, &[damaged; 50]);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 20)).unwrap_err();
    assert!(matches!(&error, SourceError::Damaged { from, reads: 4, .. } if from.get() == 0), "{error:?}");
}

/// A record batch as brokers keep it, of records with these payloads. `records` is what its head says.
pub(super) fn record_batch(base_offset: i64, payloads: &[String], records: i32) -> Vec<u8> {
    let mut body = Vec::new();
    for (delta, payload) in payloads.iter().enumerate() {
        // Attributes, time, offset, no key, payload, no headers; lengths are zigzag and below 64.
        let zigzag = |number: usize| u8::try_from(2 * number).unwrap();
        let mut record = vec![0, 0, zigzag(delta), 1, zigzag(payload.len())];
        record.extend(payload.as_bytes());
        record.push(0);
        body.push(zigzag(record.len()));
        body.extend(record);
    }
    let times = [1_700_000_000_000_i64.to_be_bytes(); 2].concat();
    // Attributes, last offset, times; producer id, its epoch and its first sequence number: none.
    let checked =
        [&[0; 2], &(records - 1).to_be_bytes()[..], &times, &[0xff; 14], &records.to_be_bytes(), &body];
    let checked = checked.concat();
    let no_epoch = (-1_i32).to_be_bytes();
    let rest = [&no_epoch, &[2][..], &crc32c(&checked).to_be_bytes(), &checked].concat();
    [&base_offset.to_be_bytes(), &length_of(&rest)[..], &rest].concat()
}

fn crc32c(bytes: &[u8]) -> u32 {
    let shifted = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| shifted(crc)))
}

fn length_of(bytes: &[u8]) -> [u8; 4] {
    i32::try_from(bytes.len()).unwrap().to_be_bytes()
}

/// Appends record batches in one request, byte by byte as they are: Produce version 7, written by hand because no producer
/// sends a damaged one. The broker believes the head of the first and gives all of them in one answer.
pub(super) fn send_bytes(cluster: &Mock, topic: &str, partition: i32, batches: &[u8]) {
    // No client id, no transaction; written by all.
    let header = [0_i16, 7, 0, 1, -1, -1, -1].map(i16::to_be_bytes).concat();
    let name = [&i16::try_from(topic.len()).unwrap().to_be_bytes(), topic.as_bytes()].concat();
    let counts = [10_000_i32, 1].map(i32::to_be_bytes).concat();
    let place = [1_i32, partition].map(i32::to_be_bytes).concat();
    let request = [&header, &counts, &name, &place, &length_of(batches)[..], batches].concat();
    let mut broker = TcpStream::connect(cluster.bootstrap_servers()).unwrap();
    broker.set_read_timeout(Some(PATIENCE)).unwrap();
    broker.write_all(&[&length_of(&request), &request[..]].concat()).unwrap();
    let mut length = [0; 4];
    broker.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::try_from(i32::from_be_bytes(length)).unwrap()];
    broker.read_exact(&mut answer).unwrap();
    // Correlation id, topics, name, topic partitions, topic partition, then the error.
    let at = 4 + 4 + name.len() + 4 + 4;
    assert_eq!(answer[at..at + 2], [0, 0], "the broker took it: {answer:?}");
}

/// Payloads as [`send`] makes them.
pub(super) fn payloads(topic: &str, partition: i32, numbers: std::ops::Range<u32>) -> Vec<String> {
    numbers.map(|number| format!("{topic}-{partition}-{number}")).collect()
}

#[test]
fn record_batches_that_are_written_by_hand_are_read_like_any_other() {
    let cluster = cluster(&[("t", 1)]);
    send_bytes(&cluster, "t", 0, &record_batch(0, &payloads("t", 0, 0..15), 15));
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    assert_eq!(drain(&mut reader, 100, 1 << 20), expected("t", 0, 0, 0..15));
}

#[test]
fn who_reads_on_after_a_damaged_record_batch_meets_it_again_and_never_what_stands_behind_it() {
    let cluster = cluster(&[("t", 1)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..10);
    let mut batches = record_batch(10, &payloads("t", 0, 10..15), 15);
    // The last byte of the last payload.
    let at = batches.len() - 2;
    batches[at] ^= 1;
    batches.extend(record_batch(15, &payloads("t", 0, 15..25), 10));
    send_bytes(&cluster, "t", 0, &batches);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    assert_eq!(plan[0].end.get(), 25);
    plan[0].end = ReadPlan::no_end();
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let mut chunk = RecordChunk::default();
    for _ in 0..3 {
        // In short turns, as it is read while a microbatch is being committed.
        let error = loop {
            let deadline = Instant::now() + Duration::from_millis(20);
            match reader.read(&mut chunk, ReadLimits { deadline, ..limits(100, 1 << 20) }) {
                Ok(status) => assert_eq!(status, ReadStatus::DeadlinePassed),
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, SourceError::Damaged { from, .. } if from.get() == 10), "{error:?}");
        assert_eq!((chunk.len(), positions(&reader)), (10, vec![10]));
    }
    let error = reader.await_record(Instant::now() + PATIENCE).unwrap_err();
    assert!(matches!(&error, SourceError::Damaged { .. }), "{error:?}");
}

#[test]
fn who_reads_on_after_lost_offsets_meets_the_loss_again() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    (plan[0].start, plan[0].end) = (NextOffset::at(12), ReadPlan::no_end());
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    for _ in 0..2 {
        let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 20)).unwrap_err();
        assert!(matches!(&error, SourceError::OffsetsLost { .. }), "{error:?}");
    }
}

#[test]
fn a_broker_that_does_not_tell_the_range_of_a_refused_offset_is_away() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    cluster.request_errors(RDKafkaApiKey::Fetch, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_OFFSET_OUT_OF_RANGE]);
    cluster.request_errors(
        RDKafkaApiKey::ListOffsets,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT; 200],
    );
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 20)).unwrap_err();
    let doing = "asking for the range of a log";
    assert!(matches!(&error, SourceError::Away { doing: found, .. } if *found == doing), "{error:?}");
    assert_eq!(error.reason(), crate::stop::Reason::SourceAway);
}

#[test]
fn a_refused_topic_is_not_authorized_with_what_is_needed() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    cluster.request_errors(
        RDKafkaApiKey::Fetch,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED; 20],
    );
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let error = reader.read(&mut RecordChunk::default(), limits(100, 1 << 20)).unwrap_err();
    assert!(error.to_string().contains("needed: operations READ and DESCRIBE on the topic"), "{error}");
    assert_eq!(error.reason(), crate::stop::Reason::NotAuthorized);
}

#[test]
fn passing_errors_and_a_refused_group_do_not_stop_a_drain_or_its_end() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..100);
    let connection = connect(&cluster, &["t"]);
    let plan = plan(&connection, &BTreeMap::new());
    cluster.request_errors(
        RDKafkaApiKey::FindCoordinator,
        &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED; 100],
    );
    cluster.request_errors(
        RDKafkaApiKey::Fetch,
        &[
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__TRANSPORT,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN,
        ],
    );
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    assert_eq!(drain(&mut reader, 30, 1 << 20), expected("t", 0, 0, 0..100));
    connection.commit_group_offsets(&BTreeMap::from([(TopicPartition::new("t", 0), NextOffset::at(100))]));
    let closing = Instant::now();
    drop(reader);
    drop(connection);
    assert!(closing.elapsed() < Duration::from_secs(7), "{:?}", closing.elapsed());
}

#[test]
fn a_broker_that_goes_away_while_reading_is_named_after_the_bound() {
    let cluster = cluster(&[("t", 1)]);
    send(&producer(cluster.bootstrap_servers()), "t", 0, 0..10);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = NextOffset::at(20);
    let options = ReaderOptions { stall_after: Duration::from_secs(1), ..ReaderOptions::default() };
    let mut reader = Reader::assign(&connection, plan.clone(), options).unwrap();
    let mut chunk = RecordChunk::default();
    let error = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap_err();
    assert!(matches!(&error, SourceError::Stalled { next, .. } if next.get() == 10), "{error:?}");
    assert_eq!(chunk.len(), 10);

    cluster.broker_down(1).unwrap();
    let error = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap_err();
    assert!(matches!(error, SourceError::Away { .. }), "{error:?}");
}

#[test]
fn thousands_of_records_of_many_topic_partitions_arrive_through_small_queues() {
    let cluster = cluster(&[("t", 32)]);
    let sender = producer(cluster.bootstrap_servers());
    for partition in 0..32 {
        send(&sender, "t", partition, 0..400);
    }
    let connection = Connection::open(&job(cluster.bootstrap_servers(), &["t"]), 1 << 20, "test").unwrap();
    let mut reader = from_low(&connection);
    let records = drain(&mut reader, 1_000, 1 << 20);
    for partition in 0..32 {
        let slot = u32::try_from(partition).unwrap();
        assert_eq!(of_slot(&records, slot), expected("t", partition, slot, 0..400));
    }
}

#[test]
fn an_end_that_moves_brings_what_was_let_go_behind_the_one_before() {
    let cluster = cluster(&[("t", 2)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..300);
    send(&sender, "t", 1, 0..2_000);
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = NextOffset::at(20);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let mut records = drain(&mut reader, 100, 1 << 20);
    for end in [20, 21, 300] {
        let ends = BTreeMap::from([(TopicPartition::new("t", 0), NextOffset::at(end))]);
        reader.extend(&ends).unwrap();
        records.extend(drain(&mut reader, 100, 1 << 20));
        assert_eq!(positions(&reader), [end, 2_000]);
    }
    assert_eq!(of_slot(&records, 0), expected("t", 0, 0, 0..300));
    assert_eq!(of_slot(&records, 1), expected("t", 1, 1, 0..2_000));
}

#[test]
fn all_topic_partitions_move_while_one_of_them_has_far_more_than_the_queue_holds() {
    let cluster = cluster(&[("t", 8)]);
    let sender = producer(cluster.bootstrap_servers());
    send(&sender, "t", 0, 0..20_000);
    (1..8).for_each(|partition| send(&sender, "t", partition, 0..200));
    let connection = Connection::open(&job(cluster.bootstrap_servers(), &["t"]), 1 << 20, "test").unwrap();
    let mut reader = from_low(&connection);
    let mut chunk = RecordChunk::default();
    while positions(&reader)[1..].iter().any(|&next| next < 200) {
        chunk.clear();
        assert_eq!(reader.read(&mut chunk, limits(500, 1 << 20)).unwrap(), ReadStatus::Full);
    }
    assert!(positions(&reader)[0] < 10_000, "the others wait for all of it: {:?}", positions(&reader));
}

struct SharedLog {
    // Before the cluster: dropped first.
    connection: Connection,
    _cluster: Mock,
}

thread_local! {
    /// One cluster for all cases: starting one takes longer than reading.
    static SHARED: SharedLog = {
        let cluster = cluster(&[("t", 3)]);
        let sender = producer(cluster.bootstrap_servers());
        for partition in 0..3 {
            send(&sender, "t", partition, 0..100);
        }
        SharedLog { connection: connect(&cluster, &["t"]), _cluster: cluster }
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    /// Goal: wherever chunks are cut, together they hold each record once, in order per topic partition.
    /// Method: one log, chunk sizes in records and bytes drawn anew for every read, down to a single record.
    #[test]
    fn the_union_of_chunks_is_the_log_wherever_they_are_cut(
        cuts in prop::collection::vec((1usize..60, 1usize..600), 1..12)
    ) {
        let mut reader = SHARED.with(|log| {
            let plan = plan(&log.connection, &BTreeMap::new());
            Reader::assign(&log.connection, plan, ReaderOptions::default()).unwrap()
        });
        let mut records = Vec::new();
        for (records_max, bytes_max) in cuts.iter().cycle() {
            let mut chunk = RecordChunk::default();
            let status = reader.read(&mut chunk, limits(*records_max, *bytes_max)).unwrap();
            prop_assert!(chunk.len() <= *records_max);
            prop_assert!(chunk.len() <= 1 || chunk.payload_bytes() <= *bytes_max);
            for record in chunk.iter() {
                let payload = String::from_utf8(record.payload().unwrap().to_vec()).unwrap();
                records.push((record.slot(), record.offset(), payload));
            }
            if status == ReadStatus::Exhausted {
                break;
            }
        }
        for partition in 0..3 {
            let slot = u32::try_from(partition).unwrap();
            prop_assert_eq!(of_slot(&records, slot), expected("t", partition, slot, 0..100));
        }
        prop_assert_eq!(positions(&reader), [100, 100, 100]);
    }
}
