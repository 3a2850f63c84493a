"""Backfills on a real broker: exactly the records of the range, as an independent consumer counts them, and live stands still.

Larger: `TIDEMILL_TEST_BACKFILL=200000` records.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import NamedTuple

from confluent_kafka import Consumer, KafkaError, TopicPartition

import ledger
from conftest import Corner
from events import NOW_MS, event, event_id
from job import Job, tidemill
from services import RestCatalog, S3Server

SEED = 20_260_301
RECORDS = int(os.environ.get("TIDEMILL_TEST_BACKFILL", "6000"))
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# The range, and what lies around it.
FROM_MS = NOW_MS - 40 * HOUR_MS
TO_MS = NOW_MS - 20 * HOUR_MS
BEGIN_MS = NOW_MS - 60 * HOUR_MS
EMPTY, OLD = 2, 3


class Logged(NamedTuple):
    """A record as an independent consumer found it."""

    partition: int
    offset: int
    timestamp_ms: int
    event_id: str

    @property
    def is_in_range(self) -> bool:
        return FROM_MS <= self.timestamp_ms < TO_MS


def log_of(bootstrap: str, topic: str, partitions: int) -> list[Logged]:
    """Every record of the topic, with its Kafka timestamp."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "truth", "enable.partition.eof": True})
    consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
    log, waiting = [], set(range(partitions))
    try:
        while waiting:
            for message in consumer.consume(10_000, timeout=10):
                if message.error() is not None:
                    assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
                    waiting.discard(message.partition())
                    continue
                place = (message.partition(), message.offset(), message.timestamp()[1])
                log.append(Logged(*place, json.loads(message.value())["event_id"]))
    finally:
        consumer.close()
    return log


def send(place: Corner, topic: str, numbers: Iterable[int]) -> None:
    """Events whose Kafka timestamps are drawn over the range and around it, in two topic partitions; a fourth has old ones."""
    draws = random.Random(SEED)
    feed = place.feed(topic)
    for number in numbers:
        for _ in range(2 if draws.random() < 0.1 else 1):
            time_ms = draws.randrange(BEGIN_MS, NOW_MS)
            feed.send(event(number, ts=time_ms), flush=False, partition=draws.randrange(2), timestamp=time_ms)
        if number % 20 == 0:
            time_ms = draws.randrange(BEGIN_MS, FROM_MS)
            feed.send(event(10**8 + number, ts=time_ms), flush=False, partition=OLD, timestamp=time_ms)
    feed.flush()


def shown(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def ids(records: Iterable[Logged]) -> set[str]:
    return {record.event_id for record in records}


def check_holds(job: Job, expected: set[str]) -> None:
    """pyiceberg and DuckDB see these events, each once, and no other."""
    ours = job.reader()
    found = ours.ids()
    assert len(found) == len(set(found)) == len(expected) and set(found) == expected
    theirs = job.duckdb(ours.table.metadata_location)
    assert theirs.count() == len(expected) and theirs.differences(expected) == (0, 0)


def test_exactly_the_records_of_the_range_are_read_and_live_stands_still(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server
) -> None:
    topic = place.topic(partitions=4)
    catalog = {
        "type": "rest", "uri": rest_catalog.uri, "warehouse": rest_catalog.warehouse,
        **s3.properties(), "s3.secret-access-key": "env:S3_SECRET_KEY",
    }  # fmt: skip
    secrets = {"S3_SECRET_KEY": s3.properties()["s3.secret-access-key"]}
    job = place.job(
        topic, start="latest", catalog=catalog, s3=s3.properties(), microbatch={"max_records": RECORDS // 8}
    )
    send(place, topic, range(RECORDS))
    job.run(environment=secrets).expect(0)
    starts = ledger.full_offsets(ledger.full_record(job.reader().table), "end")
    send(place, topic, range(RECORDS - 50, RECORDS + 50))
    job.run(environment=secrets).expect(0)
    before = ledger.full_record(job.reader().table)
    log = log_of(place.broker.bootstrap, topic, 4)
    live = ids(record for record in log if record.offset >= starts[topic, record.partition])
    check_holds(job, live)

    words = ("backfill", job.path, "--from", shown(FROM_MS), "--to", shown(TO_MS), "--name", "two-days")
    stop = tidemill(*words, "--json", environment=secrets).expect_stop(2, "USAGE")
    assert "--yes" in stop["way_out"]
    plan = tidemill(*words, "--dry-run", "--json", environment=secrets).expect(0).of("backfill_plan")[0]["plan"]
    assert ledger.full_record(job.reader().table) == before, "a plan changes nothing"
    in_range = [record for record in log if record.is_in_range]
    for planned in plan["topic_partitions"]:
        of_partition = [record for record in log if record.partition == planned["partition"]]
        after = [record.offset for record in of_partition if record.timestamp_ms >= FROM_MS]
        assert planned["end"] == len(of_partition)
        assert planned["start"] == (min(after) if after else planned["end"]), planned
    at_most = {planned["partition"]: planned["records_at_most"] for planned in plan["topic_partitions"]}
    assert (at_most[EMPTY], at_most[OLD]) == (0, 0)
    # records are alike here, so what the first ones weigh is what all weigh
    record_bytes = len(json.dumps(event(1, ts=BEGIN_MS)))
    for planned in plan["topic_partitions"]:
        assert abs(planned["bytes_about"] - planned["records_at_most"] * record_bytes) <= planned["bytes_about"] * 0.02

    # Ended after two batches, then gone on with.
    tidemill(*words, "--yes", "--json", "--max-batches", "2", environment=secrets).expect(0)
    done = tidemill("backfill", job.path, "--resume", "two-days", "--json", environment=secrets).expect(0).last
    counts = done["lanes"][0]["counts"]
    scanned = sum(planned["records_at_most"] for planned in plan["topic_partitions"])
    assert done["lanes"][0]["state"] == "done"
    assert (counts["consumed"], counts["outside_range"]) == (scanned, scanned - len(in_range))
    new = ids(in_range) - live
    assert (counts["written"], counts["duplicate"]) == (len(new), len(in_range) - len(new))
    check_holds(job, ids(in_range) | live)
    table = job.reader().table
    assert ledger.full_record(table)["lanes"]["live"] == before["lanes"]["live"]
    ledger.check_chain(table)


def test_live_and_a_backfill_over_all_of_it_together_are_the_log(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch={"max_records": 700})
    send(place, topic, range(RECORDS // 3))
    job.run("--max-batches", "1").expect(0)
    tidemill("backfill", job.path, "--from", shown(BEGIN_MS - HOUR_MS), "--yes", "--json").expect(0)
    log = log_of(place.broker.bootstrap, topic, 4)
    check_holds(job, ids(log))
    assert event_id(0) in ids(log)
    lanes = tidemill("lane", "list", job.path, "--json").expect(0).last["lanes"]
    assert [(lane["state"], lane["left"]) for lane in lanes] == [("done", 0)]
    commits = ledger.check_chain(job.reader().table)
    assert sum(commit.counts["consumed"] for commit in commits if commit.kind == "data") == 2 * len(log)


def test_thirty_days_beyond_a_window_of_seven_are_exact_with_buckets_read_from_the_table(place: Corner) -> None:
    """Live reads the last week, in which events of the month before come again; then that month is read."""
    topic = place.topic(partitions=2)
    draws = random.Random(SEED + 1)
    week_ago = NOW_MS - 7 * DAY_MS
    begin = week_ago - 30 * DAY_MS
    times: list[int] = []
    feed = place.feed(topic)
    for number in range(RECORDS):
        arrived = begin + number * 37 * DAY_MS // RECORDS - draws.randrange(12 * HOUR_MS)
        which = draws.randrange(number) if number and draws.random() < 0.2 else number
        times.append(arrived if which == number else times[which])
        value = event(which, ts=times[which])
        feed.send(value, flush=False, partition=draws.randrange(2), timestamp=arrived)
    feed.flush()
    job = place.job(topic, start=shown(week_ago), microbatch={"max_records": max(500, RECORDS // 10)})
    job.run().expect(0)
    live = set(job.reader().ids())
    words = ("--from", shown(begin - DAY_MS), "--to", shown(week_ago), "--name", "month", "--yes", "--json")
    done = tidemill("backfill", job.path, *words).expect(0).last
    log = log_of(place.broker.bootstrap, topic, 2)
    check_holds(job, ids(log))
    month = [record for record in log if record.timestamp_ms < week_ago]
    counts = done["lanes"][0]["counts"]
    assert (done["lanes"][0]["state"], counts["consumed"] - counts["outside_range"]) == ("done", len(month))
    old = sum(times[int(event_id[6:])] < week_ago for event_id in live)
    assert old > RECORDS // 100, "the table must hold old events before, or nothing is to be found in it"
    assert counts["written"] == len(ids(log)) - len(live)
    assert done["buckets_lent"] > 30 and done["bytes_lent"] > 0
    print(
        f"seed {SEED + 1}: {len(month)} records of 30 days before a window of 7, {old} of their events in the table: "
        f"{done['buckets_lent']} buckets of {shown_width(job)} loaded, {done['bytes_lent']} bytes of data files read for them"
    )


def shown_width(job: Job) -> str:
    return f"{ledger.full_record(job.reader().table)['dedup']['bucket_width_ms'] / HOUR_MS:g} h"


def test_what_is_not_built_or_not_there_is_refused_by_name(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(10)))
    job = place.job(topic)
    job.run().expect(0)
    stop = tidemill("backfill", job.path, "--replace", "--from", shown(FROM_MS), "--json").expect_stop(2, "USAGE")
    assert "--replace" in stop["what"]
    for words in (
        ("--from", shown(FROM_MS), "--to", shown(FROM_MS)),
        ("--from", "yesterday"),
        ("--from", shown(FROM_MS), "--name", "live"),
        ("--resume", "nothing"),
    ):
        tidemill("backfill", job.path, *words, "--yes", "--json").expect_stop(2, "USAGE")
    tidemill("lane", "pause", job.path, "nothing", "--json").expect_stop(2, "USAGE")
    assert list(ledger.full_record(job.reader().table)["lanes"]) == ["live"]
