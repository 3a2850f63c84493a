"""What real logs look like: aborted transactions, control records at the end, compaction gaps, quiet topics."""

import json

from confluent_kafka import Producer

import ledger
from conftest import Corner
from events import Feed, event
from services import wait_until
from truth import LogTruth


def transaction(producer: Producer, topic: str, numbers: range, commit: bool) -> None:
    producer.begin_transaction()
    for number in numbers:
        producer.produce(topic, json.dumps(event(number)), key=str(number))
    producer.flush()
    if commit:
        producer.commit_transaction()
    else:
        producer.abort_transaction()


def transactional_producer(place: Corner) -> Producer:
    producer = Producer({"bootstrap.servers": place.broker.bootstrap, "transactional.id": place.prefix})
    producer.init_transactions(60)
    return producer


def test_aborted_records_are_not_written_and_a_control_record_at_the_end_does_not_stop_the_drain(place: Corner) -> None:
    topic = place.topic()
    producer = transactional_producer(place)
    for start, commit in ((0, True), (100, False), (50, True), (200, False)):
        transaction(producer, topic, range(start, start + 100), commit)
    job = place.job(topic)
    job.run(timeout_s=120).expect(0)
    truth = place.truth(topic)
    assert len(truth.events) == 150 and truth.consumed == 200, "the topic has 200 committed records of 150 events"
    job.check_against(truth)
    assert ledger.check_conservation(job.reader().table, truth)[-1].ends == truth.ends
    assert job.run(timeout_s=120).expect(0).last["counts"]["consumed"] == 0


def test_a_topic_of_nothing_but_aborted_records_moves_the_offsets_and_writes_nothing(place: Corner) -> None:
    topic = place.topic()
    transaction(transactional_producer(place), topic, range(500), commit=False)
    job = place.job(topic)
    counts = job.run(timeout_s=120).expect(0).last["counts"]
    assert counts["consumed"] == 0
    table = job.reader().table
    assert ledger.check_chain(table)[-1].ends == {(topic, 0): 501}, "500 records and the abort marker"
    assert job.reader().count() == 0


def test_an_open_transaction_is_read_after_it_is_committed(place: Corner) -> None:
    topic = place.topic()
    Feed(place.broker.bootstrap, topic).send(*(event(number) for number in range(10)))
    producer = transactional_producer(place)
    producer.begin_transaction()
    for number in range(10, 20):
        producer.produce(topic, json.dumps(event(number)), key=str(number))
    producer.flush()
    job = place.job(topic)
    assert job.run(timeout_s=120).expect(0).last["counts"]["written"] == 10
    producer.commit_transaction()

    def written() -> bool:
        # the broker answers before it has written the markers
        return job.run(timeout_s=120).expect(0).last["counts"]["written"] == 10

    wait_until("the transaction to be visible", written)
    job.check_against(place.truth(topic))


def test_gaps_that_compaction_left_are_no_loss(place: Corner) -> None:
    topic = place.topic(
        cleanup_policy="compact", min_cleanable_dirty_ratio="0.01", segment_ms="100", max_compaction_lag_ms="1",
        min_compaction_lag_ms="0",
    )  # fmt: skip
    feed = place.feed(topic)
    job = place.job(topic)
    feed.send(*(event(number) for number in range(100)), key="first")
    job.run(timeout_s=120).expect(0)
    seen = place.truth(topic)
    for number in range(100, 400):
        feed.send(event(number), key=str(number % 7), flush=False)
    feed.flush()

    def compacted() -> LogTruth | None:
        feed.send(event(1_000), key="another record lets the segment close")
        truth = place.truth(topic)
        return truth if truth.consumed < truth.ends[topic, 0] - 250 else None

    wait_until("the broker to compact the topic", compacted)
    transaction(transactional_producer(place), topic, range(2_000, 2_010), commit=True)
    job.run(timeout_s=120).expect(0)
    after = place.truth(topic)
    ids = job.reader().ids()
    assert len(ids) == len(set(ids))
    assert set(ids) == seen.events.keys() | after.events.keys(), "read before compaction, or still there after it"
    assert ledger.check_chain(job.reader().table)[-1].ends == after.ends
    assert job.run(timeout_s=120).expect(0).last["counts"]["consumed"] == 0


def test_a_first_run_with_latest_on_a_quiet_topic_takes_the_fifty_events_that_come_after_it(place: Corner) -> None:
    topic = place.topic(partitions=2)
    feed = place.feed(topic).send(*(event(number) for number in range(30)))
    job = place.job(topic, start="latest")
    assert job.run().expect(0).last["counts"]["consumed"] == 0
    assert ledger.check_chain(job.reader().table)[0].kind == "start", "the first run commits where it begins"
    feed.send(*(event(number) for number in range(100, 150)))
    assert job.run().expect(0).last["counts"]["written"] == 50
    assert set(job.reader().ids()) == {event(number)["event_id"] for number in range(100, 150)}


def test_partitions_added_later_are_read_from_their_beginning(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic).send(*(event(number) for number in range(100)))
    job = place.job(topic)
    job.run().expect(0)
    place.broker.add_partitions(topic, 3)
    feed = place.feed(topic)
    for number in range(50, 300):
        feed.send(event(number), flush=False, partition=number % 3)
    feed.flush()
    job.run().expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    assert ledger.check_chain(job.reader().table)[-1].ends == truth.ends
