"""Where a first run begins: every form of `start` on a real broker, in the ledger before anything is read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

import ledger
from conftest import Corner
from events import NOW_MS, event, event_id
from job import Job

HOUR_MS = 3_600_000
RECORDS = 40
# Kafka timestamps of the records of one topic partition, out of order: hours before now, by offset.
HOURS = [30 - (offset * 7) % 29 for offset in range(RECORDS)]
SINCE_MS = NOW_MS - 5 * HOUR_MS


def sent(place: Corner) -> str:
    """A topic of three partitions: shuffled timestamps, only old ones, nothing."""
    topic = place.topic(partitions=3)
    feed = place.feed(topic)
    for offset, hours in enumerate(HOURS):
        time_ms = NOW_MS - hours * HOUR_MS
        feed.send(event(offset, ts=time_ms), flush=False, partition=0, timestamp=time_ms)
        old_ms = NOW_MS - (40 + offset) * HOUR_MS
        feed.send(event(1_000 + offset, ts=old_ms), flush=False, partition=1, timestamp=old_ms)
    feed.flush()
    return topic


def first_since(since_ms: int) -> int:
    """The first offset whose record carries this time or a later one, as the test sent them."""
    return next(offset for offset, hours in enumerate(HOURS) if NOW_MS - hours * HOUR_MS >= since_ms)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("earliest", [0, 0, 0]),
        ("latest", [RECORDS, RECORDS, 0]),
        ("time", [first_since(SINCE_MS), RECORDS, 0]),
        ("offsets", [7, 0, 0]),
    ],
)
def test_a_first_run_records_its_start_before_it_reads(place: Corner, start: str, expected: list[int]) -> None:
    topic = sent(place)
    job = place.job(topic)
    begin: Any = {"time": rfc3339(SINCE_MS), "offsets": f'{{ "{topic}" = {{ 0 = 7 }} }}'}.get(start, start)
    done = job.run("--set", f"source.kafka.start={begin}").expect(0)
    table = job.reader().table
    commits = ledger.check_chain(table)
    assert commits[0].kind == "start"
    assert commits[0].ends == {(topic, number): offset for number, offset in enumerate(expected)}
    assert done.last["counts"]["consumed"] == 2 * RECORDS - sum(expected[:2])
    check_ids(job, [*range(expected[0], RECORDS), *range(1_000 + expected[1], 1_000 + RECORDS)])

    # Topic partitions that come later begin at their oldest record, whatever the job said of the first run.
    place.broker.add_partitions(topic, 4)
    place.feed(topic).send(event(5_000), partition=3)
    assert job.run("--set", f"source.kafka.start={begin}").expect(0).last["counts"]["consumed"] == 1


def rfc3339(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="milliseconds")


def check_ids(job: Job, numbers: list[int]) -> None:
    assert sorted(job.reader().ids()) == sorted(event_id(number) for number in numbers)
