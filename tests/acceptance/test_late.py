"""Late rows and dead letters that come in again, on a real broker, a REST catalog and S3, seen by pyiceberg and DuckDB.

What is late is told by an independent consumer: of each topic partition the largest event time of earlier offsets.

`TIDEMILL_TEST_LATE_EVENTS` is the number of records of the log.
"""

import json
import os
import random
from collections.abc import Iterator
from datetime import datetime

import pytest

from conftest import Corner
from events import NOW_MS, Feed, event, event_id
from job import COLUMNS, Job, tidemill
from readers import DuckdbReader
from services import RestCatalog, S3Server
from services.s3 import SECRET_KEY
from truth import LogTruth, Place

EVENTS = int(os.environ.get("TIDEMILL_TEST_LATE_EVENTS", "40000"))
PARTITIONS = 3
DELAY_MS = 600_000
SECRETS = {"S3_SECRET_KEY": SECRET_KEY}
SIDE = ("--set", "event_time.late=side")


def send_disorder(feed: Feed, events: int, seed: int) -> None:
    """Events over two days, most in order, a tenth late by up to ten hours, a fifth repeats of any age."""
    draws = random.Random(seed)
    for number in range(events):
        new = number == 0 or draws.random() > 0.2
        which = number if new else draws.randrange(number)
        at = NOW_MS - 48 * 3_600_000 + which * (47 * 3_600_000 // events)
        late = draws.random() < 0.1
        ts = at - draws.randrange(36_000_000) if late else at
        feed.send(event(which, ts=ts), flush=False, partition=draws.randrange(PARTITIONS))
    feed.flush()


def lake(place: Corner, topic: str, rest_catalog: RestCatalog, s3: S3Server, **fields: object) -> Job:
    """A job on the services."""
    catalog = {
        "type": "rest", "uri": rest_catalog.uri, "warehouse": rest_catalog.warehouse,
        **s3.properties(), "s3.secret-access-key": "env:S3_SECRET_KEY",
    }  # fmt: skip
    return place.job(topic, catalog=catalog, s3=s3.properties(), **fields)


def judged(truth: LogTruth, times: dict[Place, int]) -> Iterator[tuple[Place, int | None]]:
    """Of each good row the watermark behind which it is late, if it is: each topic partition in the order of its offsets."""
    for rows in truth.rows.values():
        largest = None
        for place, row in rows:
            if row.event_id is None:
                continue
            time = times[place]
            watermark = None if largest is None else largest - DELAY_MS
            yield place, watermark if watermark is not None and time < watermark else None
            largest = time if largest is None else max(largest, time)


def event_times(topic: str, bootstrap: str, truth: LogTruth) -> dict[Place, int]:
    """Event times as they stand in the log."""
    from truth import _offset_of, _partition_of, _read

    starts = dict.fromkeys(truth.ends, 0)
    return {
        Place(*_partition_of(message), _offset_of(message)): json.loads(message.value() or b"")["ts"]
        for message in _read(bootstrap, starts, truth.ends)
    }


def check_both_tables(job: Job, truth: LogTruth, times: dict[Place, int]) -> int:
    """Main and late table hold each key once, and each row is in the table in which the log says it must be."""
    catalog = job.open_catalog()
    main = catalog.load_table(job.table)
    late = catalog.load_table(f"{job.table}_late")
    columns = ("event_id", "_kafka_topic", "_kafka_partition", "_kafka_offset", "_kafka_index")
    rows = {"main": main.scan(selected_fields=columns).to_arrow().to_pylist()}
    rows["late"] = late.scan(
        selected_fields=(*columns, "_tidemill_watermark", "_tidemill_unproven")
    ).to_arrow().to_pylist()  # fmt: skip
    ids = [row["event_id"] for table in rows.values() for row in table]
    assert len(ids) == len(set(ids)) == len(truth.events), "a key stands twice, or is missing"
    assert set(ids) == truth.events.keys()
    watermarks = dict(judged(truth, times))
    place_of = lambda row: Place(*(row[name] for name in columns[1:]))  # noqa: E731
    assert all(watermarks[place_of(row)] is None for row in rows["main"]), "a late row stands in main"
    for row in rows["late"]:
        found: datetime = row["_tidemill_watermark"]
        assert round(found.timestamp() * 1_000) == watermarks[place_of(row)]
        assert row["_tidemill_unproven"] is False
    ours, theirs = DuckdbReader(main.metadata_location, job.s3), DuckdbReader(late.metadata_location, job.s3)
    assert (ours.count(), theirs.count()) == (len(rows["main"]), len(rows["late"]))
    sql = "select count(distinct event_id), count(*) filter (where _tidemill_unproven) from {table}"
    assert theirs.query(sql) == [(len(rows["late"]), 0)]
    return len(rows["late"])


def test_late_rows_stand_beside_main_exactly_through_cuts_kills_and_a_lost_state(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server
) -> None:
    topic = place.topic(partitions=PARTITIONS)
    send_disorder(place.feed(topic), EVENTS, seed=7)
    truth = place.truth(topic)
    times = event_times(topic, place.broker.bootstrap, truth)
    job = lake(place, topic, rest_catalog, s3, microbatch={"max_records": EVENTS // 7})
    deaths = ["late_rows_written:2", "main_landed:2", "sides_sent:1", "side_files_closed:2", "sides_landed:1"]
    for point in deaths:
        killed = job.run(*SIDE, environment={**SECRETS, "TIDEMILL_CRASH_AT": point})
        assert killed.exit_code == -9, f"{point}: {killed.exit_code} {killed.stderr[-500:]}"
    for path in (job.folder / "state").rglob("*.segment"):
        path.unlink()
    last = job.run(*SIDE, environment=SECRETS).expect(0).last
    assert last["late_table"] == f"{job.table}_late"
    late = check_both_tables(job, truth, times)
    assert late > EVENTS * 0.03, "the log must hold late rows for this test to say anything"
    again = job.run(*SIDE, environment=SECRETS).expect(0).last
    assert again["counts"]["consumed"] == 0


def test_a_rollback_of_main_that_is_replayed_takes_the_late_table_back_with_it(place: Corner) -> None:
    topic = place.topic(partitions=PARTITIONS)
    feed = place.feed(topic)
    send_disorder(feed, 4_000, seed=8)
    job = place.job(topic, microbatch={"max_records": 1_500})
    job.run(*SIDE).expect(0)
    older = job.reader().table.metadata.current_snapshot_id
    assert older is not None
    late = job.open_catalog().load_table(f"{job.table}_late").scan().to_arrow().num_rows
    send_disorder(feed, 4_000, seed=9)
    feed.send(*(event(number, ts=NOW_MS - 40 * 3_600_000) for number in range(9_000, 9_100)))
    job.run(*SIDE).expect(0)
    assert job.open_catalog().load_table(f"{job.table}_late").scan().to_arrow().num_rows > late
    job.reader().table.manage_snapshots().rollback_to_snapshot(older).commit()

    job.run(*SIDE).expect_stop(24, "TABLE_ROLLED_BACK")
    job.run(*SIDE, "--set", "sink.iceberg.on_rollback=replay").expect(0)
    truth = place.truth(topic)
    check_both_tables(job, truth, event_times(topic, place.broker.bootstrap, truth))


@pytest.mark.parametrize("point", ["marks_written:2", "main_landed:2", "sides_landed:1"])
def test_a_thousand_dead_letters_come_in_once_with_the_mended_job_though_it_is_killed(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server, point: str
) -> None:
    topic = place.topic()
    feed = place.feed(topic)
    feed.send(*(event(number) for number in range(50)), flush=False)
    # 600 that a job with another idea of `attempt` refused, of which 50 repeat main and 50 one another; 400 that are no JSON
    spelt = [*range(50), *(number for number in range(1_000, 1_050) for _ in range(2)), *range(2_000, 2_450)]
    odd = [{**event(number), "surprise": True} for number in spelt]
    broken = [f"broken {number}" for number in range(400)]
    letters = [*odd, *broken]
    random.Random(3).shuffle(letters)
    feed.send(*letters)
    job = lake(place, topic, rest_catalog, s3, max_ratio=1.0, columns=COLUMNS)
    strict = ("--set", "decode.unknown_fields=dead_letter")
    refused = job.run(*strict, environment=SECRETS).expect(0).last
    assert refused["counts"]["dead_letter"] == 1_000

    words = ("dead-letters", "requeue", job.path, "--yes", "--json", "--set", "microbatch.max_records=300")
    before = tidemill("dead-letters", "list", job.path, "--json", environment=SECRETS).expect(0).last
    assert sum(line["waiting"] for line in before["reasons"]) == refused["counts"]["dead_letter"]
    killed = tidemill(*words, environment={**SECRETS, "TIDEMILL_CRASH_AT": point})
    assert killed.exit_code == -9, f"{point}: {killed.stderr[-500:]}"
    tidemill(*words, environment=SECRETS).expect(0)

    ids = job.reader().ids()
    expected = {event_id(number) for number in (*range(50), *spelt)}
    assert len(ids) == len(expected) == 550 and set(ids) == expected
    assert job.duckdb().differences(expected) == (0, 0)
    kinds = [(row["kind"], row["reason_code"]) for row in job.letters()]
    assert kinds.count(("requeued", "unknown_field")) == 600, "each letter that came in is marked once"
    after = tidemill("dead-letters", "list", job.path, "--json", environment=SECRETS).expect(0).last
    waiting = {line["reason"]: line["waiting"] for line in after["reasons"]}
    assert waiting == {"unknown_field": 0, "invalid_json": 400}
