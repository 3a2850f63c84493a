use std::ops::Range;

use super::slot::differs;
use super::*;
use crate::source::tests::{
    Mock, PATIENCE, QUEUE_BYTES, cluster, connect, drain, expected, job, limits, of_slot, payloads, plan,
    positions, producer, record_batch, send_bytes, send_large,
};

fn tail(offset: i64, hash: u64) -> Tail {
    Tail { offset, hash }
}

#[test]
fn a_tail_that_was_compacted_away_is_no_difference_and_a_record_in_its_gap_is_one() {
    let start = NextOffset::at(20);
    assert!(!differs(tail(10, 7), tail(10, 7), start));
    assert!(differs(tail(10, 7), tail(10, 8), start));
    assert!(!differs(tail(10, 7), tail(20, 1), start));
    assert!(!differs(tail(10, 7), tail(35, 1), start));
    assert!(differs(tail(10, 7), tail(11, 7), start));
    assert!(differs(tail(10, 7), tail(19, 1), start));
}

#[test]
fn a_tail_hash_tells_null_from_empty_and_key_from_payload() {
    let hashes = [
        tail_hash(1, None, None, None),
        tail_hash(2, None, None, None),
        tail_hash(1, Some(0), None, None),
        tail_hash(1, None, Some(b""), None),
        tail_hash(1, None, None, Some(b"")),
        tail_hash(1, None, Some(b"a"), Some(b"b")),
        tail_hash(1, None, Some(b"ab"), Some(b"")),
        tail_hash(1, None, Some(b""), Some(b"ab")),
    ];
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

#[test]
fn the_tail_hash_never_changes_because_ledgers_hold_it() {
    assert_eq!(tail_hash(42, Some(1_700_000_000_000), Some(b"key"), Some(b"payload")), PINNED);
}

/// From the first release; a change here makes every ledger's tail differ.
const PINNED: u64 = 17_878_484_584_324_921_617;

/// A reader that took ten records of one log and then lost its client to a broker whose log has these payloads.
fn moved_to_a_log_of(numbers: Range<u32>) -> (Reader, Mock) {
    let [first, second] = [(); 2].map(|()| cluster(&[("t", 1)]));
    send_bytes(&first, "t", 0, &record_batch(0, &payloads("t", 0, 0..10), 10));
    let count = i32::try_from(numbers.len()).unwrap();
    send_bytes(&second, "t", 0, &record_batch(0, &payloads("t", 0, numbers), count));
    let connection = connect(&first, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = NextOffset::at(count.into());
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    let mut chunk = RecordChunk::default();
    reader.read(&mut chunk, limits(10, 1 << 20)).unwrap();
    assert_eq!((chunk.len(), positions(&reader)), (10, vec![10]));
    reader.config.set("bootstrap.servers", second.bootstrap_servers());
    reader.be_patient(true).unwrap();
    (reader, second)
}

#[test]
fn a_new_client_reads_on_where_the_last_record_taken_is_still_the_same() {
    let (mut reader, _broker) = moved_to_a_log_of(0..15);
    assert_eq!(drain(&mut reader, 100, 1 << 20), expected("t", 0, 0, 10..15));
    assert_eq!(positions(&reader), [15]);
}

#[test]
fn a_new_client_gives_nothing_of_a_log_that_was_cut_and_has_grown_again() {
    let (mut reader, _broker) = moved_to_a_log_of(100..120);
    let mut chunk = RecordChunk::default();
    for _ in 0..2 {
        let error = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap_err();
        let place = (TopicPartition::new("t", 0), 9);
        assert!(matches!(&error, SourceError::TailDiffers { places } if *places == [place]), "{error:?}");
        assert!(chunk.is_empty());
    }
    let error = reader.await_record(Instant::now() + PATIENCE).unwrap_err();
    assert!(matches!(&error, SourceError::TailDiffers { .. }), "{error:?}");
}

#[test]
fn a_new_client_compares_although_nothing_was_taken_since_the_one_before_it_did() {
    let (mut reader, _same) = moved_to_a_log_of(0..15);
    assert!(reader.await_record(Instant::now() + PATIENCE).unwrap());
    assert!(reader.slots[0].unchecked.is_none(), "the second client has compared, and given nothing");
    let other = cluster(&[("t", 1)]);
    send_bytes(&other, "t", 0, &record_batch(0, &payloads("t", 0, 100..120), 20));
    reader.config.set("bootstrap.servers", other.bootstrap_servers());
    reader.be_patient(true).unwrap();
    let mut chunk = RecordChunk::default();
    let error = reader.read(&mut chunk, limits(100, 1 << 20)).unwrap_err();
    assert!(matches!(&error, SourceError::TailDiffers { .. }), "{error:?}");
    assert!(chunk.is_empty());
}

#[test]
fn a_record_that_came_to_stand_between_the_last_one_taken_and_the_start_is_of_another_log() {
    let cluster = cluster(&[("t", 1)]);
    // The broker of the tests answers with one record batch at a time, so what follows the last one taken comes later.
    send_bytes(&cluster, "t", 0, &record_batch(0, &payloads("t", 0, 0..6), 6));
    send_bytes(&cluster, "t", 0, &record_batch(6, &payloads("t", 0, 6..10), 4));
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[0].end = NextOffset::at(10);
    let mut reader = Reader::assign(&connection, plan.clone(), ReaderOptions::default()).unwrap();
    let mut chunk = RecordChunk::default();
    reader.read(&mut chunk, limits(6, 1 << 20)).unwrap();
    plan[0].tail = reader.tails()[0];
    let mut begin_at = |start| {
        plan[0].start = NextOffset::at(start);
        Reader::assign(&connection, plan.clone(), ReaderOptions::default()).unwrap()
    };
    assert_eq!(drain(&mut begin_at(6), 100, 1 << 20), expected("t", 0, 0, 6..10));
    begin_at(6).verify_tails(PATIENCE).unwrap();
    let is_another_log = |error: SourceError| {
        let place = (TopicPartition::new("t", 0), 5);
        assert!(matches!(&error, SourceError::TailDiffers { places } if *places == [place]), "{error:?}");
    };
    for start in [7, 9] {
        is_another_log(begin_at(start).verify_tails(PATIENCE).unwrap_err());
        chunk.clear();
        is_another_log(begin_at(start).read(&mut chunk, limits(100, 1 << 20)).unwrap_err());
        assert!(chunk.is_empty());
    }
    is_another_log(begin_at(10).verify_tails(PATIENCE).unwrap_err());
}

#[test]
fn one_refusal_tells_of_every_last_record_that_was_removed() {
    let cluster = cluster(&[("t", 3)]);
    let sender = producer(cluster.bootstrap_servers());
    (0..2).for_each(|partition| send_large(&sender, "t", partition));
    send_bytes(&cluster, "t", 2, &record_batch(0, &payloads("t", 2, 0..10), 10));
    let connection = connect(&cluster, &["t"]);
    let mut plan = plan(&connection, &BTreeMap::new());
    plan[2].start = NextOffset::at(1);
    let mut reader = Reader::assign(&connection, plan, ReaderOptions::default()).unwrap();
    for slot in &mut reader.slots {
        slot.unchecked = Some(tail(slot.start.get() - 1, 1));
        slot.tail = slot.unchecked;
    }
    reader.out_of_range(0, "refused".to_owned()).unwrap();
    let left: Vec<bool> = reader.slots.iter().map(|slot| slot.unchecked.is_some()).collect();
    assert_eq!(left, [false, false, true], "the last one is still there to be compared");
    assert!(reader.tails().iter().all(Option::is_some), "they were taken, whatever became of them");
}

/// Plans that go on after so many records of each of `partitions`, whose tails are known.
fn plans_after(connection: &Connection, partitions: i32, taken: i64) -> Vec<ReadPlan> {
    let mut first = plan(connection, &BTreeMap::new());
    first.iter_mut().for_each(|plan| plan.end = NextOffset::at(taken));
    let mut reader = Reader::assign(connection, first, ReaderOptions::default()).unwrap();
    drain(&mut reader, 1_000, 1 << 20);
    let tails = reader.tails();
    let start = |partition: i32| {
        let tail = tails[usize::try_from(partition).unwrap()];
        (TopicPartition::new("t", partition), (NextOffset::at(taken), tail))
    };
    plan(connection, &(0..partitions).map(start).collect())
}

#[test]
fn what_arrives_while_tails_are_compared_is_kept_or_fetched_again_and_delivered_once() {
    let cluster = cluster(&[("t", 32)]);
    // Behind the tails stand 50 records of each, which come at once.
    for partition in 0..32 {
        send_bytes(&cluster, "t", partition, &record_batch(0, &payloads("t", partition, 0..10), 10));
        send_bytes(&cluster, "t", partition, &record_batch(10, &payloads("t", partition, 10..60), 50));
    }
    // Room for 8,192 records, then for 64.
    for (queue_bytes, keeps) in [(QUEUE_BYTES, true), (128 << 10, false)] {
        let connection =
            Connection::open(&job(cluster.bootstrap_servers(), &["t"]), queue_bytes, "test").unwrap();
        let mut reader =
            Reader::assign(&connection, plans_after(&connection, 32, 10), ReaderOptions::default()).unwrap();
        reader.verify_tails(PATIENCE).unwrap();
        assert!(
            reader.slots.iter().all(|slot| slot.unchecked.is_none() == keeps),
            "a new client compares again"
        );
        let records = drain(&mut reader, 1_000, 1 << 20);
        for partition in 0..32 {
            let slot = u32::try_from(partition).unwrap();
            assert_eq!(of_slot(&records, slot), expected("t", partition, slot, 10..60));
        }
    }
}
