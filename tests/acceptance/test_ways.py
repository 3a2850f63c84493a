"""One log, read in every way that there is: the same keys, the same dead letters, and each row in the table of its verdict.

The log has disorder, late events, repeats near and far, repeats with another time, arrays, records that do not decode,
and a producer whose clock is a year ahead. It is read by (a) one drain, (b) batches cut at random, (c) a run without end that
is killed at random, (d) drains of random length with two backfills over overlapping ranges between them, all with
`late = side`.

An independent consumer and DuckDB say what the log holds, and of each row by which watermark it is late: that of the live
lane, which reads all, or that of the backfill which wrote it. Which of several copies of an event is kept may differ from way
to way, and with it the table in which the event stands: both are counted, and each difference has its reason.

`TIDEMILL_TEST_WAYS` is the number of records (60,000); with 3,000,000 there are 100 cuts.
"""

from __future__ import annotations

import array
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa
from confluent_kafka import Message
from pyiceberg.exceptions import NoSuchTableError

import ledger
from conftest import Corner
from events import NOW_MS, Feed, event_id
from job import Job, Outcome, started, tidemill
from phases import Trace
from readers import DuckdbReader
from services import wait_until
from sweep import report
from test_backfill import shown
from test_late import DELAY_MS, SIDE
from truth import LogTruth, Row, _offset_of, _partition_of, rows_of

SEED = 20_261_123
RECORDS = int(os.environ.get("TIDEMILL_TEST_WAYS", "60000"))
CUTS = max(10, min(100, RECORDS // 6_000))
KILLS = max(5, min(30, RECORDS // 10_000))
MOMENT_S_MAX = 1.0
RUN_S_MAX = 3_000
PARTITIONS = 4
HOUR_MS = 3_600_000
YEAR_MS = 365 * 24 * HOUR_MS
SPAN_MS = 48 * HOUR_MS
BEGIN_MS = NOW_MS - SPAN_MS - HOUR_MS
INTERRUPTED = 13
# Kafka timestamps of the two backfills.
RANGES = {
    "first": (BEGIN_MS + 6 * HOUR_MS, BEGIN_MS + 32 * HOUR_MS),
    "second": (BEGIN_MS + 20 * HOUR_MS, BEGIN_MS + 46 * HOUR_MS),
}
TYPES = ("generated", "sent", "delivered", "clicked")


def send_log(feed: Feed, records: int) -> None:
    """The log, from its seed. Clocks that are a year ahead come in its second half: by Kafka's order of times they stand in every
    range that has no end, and a backfill by time begins at the first of them."""
    draws = random.Random(SEED)
    uniform, whole = draws.random, draws.randrange
    times = array.array("q")

    def text(number: int, ts: int) -> str:
        return (
            f'{{"event_id":"{event_id(number)}","event_type":"{TYPES[number % 4]}","ts":{ts},'
            f'"campaign":"welcome-{number % 7}","delivery":{{"provider":"fcm","attempt":1}}}}'
        )

    def fresh(arrived: int) -> str:
        late = uniform() < 0.1
        times.append(arrived - (whole(10 * HOUR_MS) if late else whole(DELAY_MS)))
        return text(len(times) - 1, times[-1])

    def again() -> str:
        number = max(0, len(times) - 1 - whole(500)) if uniform() < 0.5 else whole(len(times))
        moved = whole(6 * HOUR_MS) if uniform() < 0.1 else 0
        return text(number, times[number] - moved)

    for number in range(records):
        arrived = BEGIN_MS + number * SPAN_MS // records - whole(HOUR_MS // 2)
        draw = uniform()
        payload: str | bytes | None
        if not times or draw < 0.77:
            payload = fresh(arrived)
        elif draw < 0.97:
            payload = again()
        elif draw < 0.98:
            payload = f"[{fresh(arrived)},{again()},17,{fresh(arrived)}]"
        elif draw < 0.999 or number < records // 2:
            # what comes again after it is a corrected resend
            good = fresh(arrived) if uniform() < 0.5 else again()
            payload = (good[:-9], good.replace('"ts":', '"at":'), b"\xff\xfe", "17", None)[whole(5)]
        else:
            payload, arrived = text(records + number, arrived + YEAR_MS), arrived + YEAR_MS
        feed.send(payload, flush=False, partition=whole(PARTITIONS), timestamp=arrived)
    feed.flush()


@dataclass
class Log(LogTruth):
    """The truth of the log, with every good row's place and times in columns."""

    columns: dict[str, array.array[int]] = field(
        default_factory=lambda: {name: array.array("q") for name in ("part", "place", "row", "ts", "arrived")}
    )
    ids: list[str] = field(default_factory=list)

    def _take(self, message: Message) -> None:
        _, timestamp = message.timestamp()
        topic, partition = _partition_of(message)
        offset, payload = _offset_of(message), message.value()
        rows: list[Row] = rows_of(payload, timestamp)
        elements: Any = json.loads(payload or b"") if any(row.event_id for row in rows) else None
        elements = elements if isinstance(elements, list) else [elements]
        for index, row in enumerate(rows):
            self.consumed += 1
            if row.event_id is None:
                self.letters[topic, partition, offset, index] = row.reason or ""  # type: ignore[index]
                continue
            self.good += 1
            self.events.setdefault(row.event_id, row.event_type or "")
            values = (partition, offset, index, elements[index]["ts"], timestamp)
            for column, value in zip(self.columns.values(), values, strict=True):
                column.append(value)
            self.ids.append(row.event_id)

    def table(self) -> pa.Table:
        """The good rows."""
        buffers = {name: pa.py_buffer(column) for name, column in self.columns.items()}
        columns = {
            name: pa.Array.from_buffers(pa.int64(), len(self.ids), [None, buffer]) for name, buffer in buffers.items()
        }
        return pa.table({"id": pa.array(self.ids), **columns})


class Judge:
    """What the log says of each row, and what stands in the tables of each way; asked in SQL."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.sql = duckdb.connect()
        self.sql.register("log_rows", log.table())
        self.sql.execute("create table log as from log_rows")
        self._watermarks("live", "true")
        for lane, (from_ms, to_ms) in RANGES.items():
            self._watermarks(lane, f"arrived >= {from_ms} and arrived < {to_ms}")
        self.sql.execute("create table kept (way text, id text, part int, place long, row int, side long, lane text)")

    def _watermarks(self, lane: str, counts: str) -> None:
        """Of each row the watermark that a lane has before it; those of a backfill are of its range alone."""
        self.sql.execute(
            f"create or replace table judged_{lane} as select *, ts < watermark as is_late from (select *, max(ts) over (partition "
            f"by part order by place, row rows between unbounded preceding and 1 preceding) - {DELAY_MS} as watermark from log "
            f"where {counts})"
        )
        union = "union all".join(
            f" select '{name}' as lane, part, place, row, is_late, watermark from judged_{name} "
            for name in ("live", *RANGES)
            if self.sql.execute(f"from duckdb_tables() where table_name = 'judged_{name}'").fetchall()
        )
        self.sql.execute(f"create or replace view judged as {union}")

    def number(self, question: str) -> int:
        """The answer, if it is one number."""
        row = self.sql.execute(question).fetchone()
        assert row is not None
        return int(row[0])

    def keep(self, way: str, job: Job) -> None:
        """Reads both tables of a way and holds them against the log."""
        catalog = job.open_catalog()
        columns = ("event_id", "_kafka_partition", "_kafka_offset", "_kafka_index", "_tidemill_batch")
        for side, name in enumerate((job.table, f"{job.table}_late")):
            more = ("_tidemill_watermark", "_tidemill_unproven") if side else ()
            table = catalog.load_table(name)
            self.sql.register("found", table.scan(selected_fields=(*columns, *more)).to_arrow())
            theirs = DuckdbReader(table.metadata_location)
            assert theirs.query("select count(*), count(distinct event_id) from {table}") == self.sql.execute(
                "select count(*), count(distinct event_id) from found"
            ).fetchall(), "pyiceberg and DuckDB see the same"
            self.sql.register("lanes", pa.Table.from_pylist(lanes_of_batches(catalog.load_table(job.table))))
            self.sql.execute(
                f"insert into kept select '{way}', event_id, _kafka_partition, _kafka_offset, _kafka_index, {side}, lane "
                "from found join lanes on _tidemill_batch = batch"
            )
            assert self.number(f"select count(*) from kept where way = '{way}' and side = {side}") == theirs.count()
            if side:
                wrong = "select count(*) from found join lanes on _tidemill_batch = batch left join judged on judged.lane = " \
                    "lanes.lane and part = _kafka_partition and place = _kafka_offset and row = _kafka_index where " \
                    "_tidemill_unproven or watermark is distinct from epoch_ms(_tidemill_watermark)"  # fmt: skip
                assert self.number(wrong) == 0, f"{way}: late rows whose watermark is not the log's"
        self._check(way)
        places = sorted((row["topic"], row["partition"], row["offset"], row["index"]) for row in job.letters())
        assert places == sorted(self.log.letters), f"{way}: the dead letters are not the refused rows"

    def _check(self, way: str) -> None:
        ours = f"(select * from kept where way = '{way}')"
        assert self.number(f"select count(*) from {ours}") == len(self.log.events), f"{way}: rows"
        assert self.number(f"select count(distinct id) from {ours}") == len(self.log.events), f"{way}: a key stands twice"
        assert self.number(f"select count(*) from {ours} anti join log using (id)") == 0, f"{way}: keys of no event"
        assert self.number(f"select count(*) from {ours} semi join log using (id, part, place, row)") == len(self.log.events)
        elsewhere = f"select count(*) from {ours} k left join judged j using (lane, part, place, row) where coalesce(is_late, " \
            "false) != (side = 1) or j.part is null"  # fmt: skip
        assert self.number(elsewhere) == 0, f"{way}: rows in the table of another verdict than the log's"

    def differences(self, way: str, other: str) -> dict[str, int]:
        """How two ways differ, in keys."""
        moved, copy = "a.side != b.side", "(a.part, a.place, a.row) != (b.part, b.place, b.row)"
        names = {
            "another_copy": copy,
            "moved": moved,
            "moved_with_another_copy": f"{moved} and {copy}",
            "moved_by_the_watermark_of_a_backfill": f"{moved} and not {copy} and (a.lane != 'live' or b.lane != 'live')",
        }
        counts = ", ".join(f"count(*) filter (where {condition})" for condition in names.values())
        row = self.sql.execute(
            f"select {counts} from kept a join kept b using (id) where a.way = '{way}' and b.way = '{other}'"
        ).fetchone()
        assert row is not None
        return dict(zip(names, map(int, row), strict=True))


def lanes_of_batches(table: Any) -> list[dict[str, Any]]:
    """The lane that each batch read: the one whose offsets its commit moved."""
    found, before, snapshot = [], {}, table.current_snapshot()
    summaries = []
    while snapshot is not None:
        summaries.append(snapshot.summary.additional_properties)
        snapshot = table.snapshot_by_id(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id else None
    for summary in reversed(summaries):
        ends = {name: ends_in(lane) for name, lane in json.loads(summary["tidemill.packed"])["lanes"].items()}
        moved = [name for name in ends if before.get(name) != ends[name]]
        # one that was done before leaves its offsets behind in the packed form
        moved = [name for name in moved if ends[name]] or moved
        if summary["tidemill.kind"] == "data":
            assert len(moved) == 1, f"batch {summary['tidemill.batch']} moved {moved}: {before} -> {ends}"
            found.append({"batch": int(summary["tidemill.batch"]), "lane": moved[0]})
        before = ends
    return found


def ends_in(lane: dict[str, Any]) -> list[str]:
    """Next offsets in a packed lane, as `topic partition:offset`."""
    parts = ((topic, part) for topic, text in lane["topics"].items() for part in text.split(";") if part)
    return sorted(f"{topic} {part.split(',')[0]}" for topic, part in parts)


def run(job: Job, *words: str) -> Outcome:
    return job.run(*SIDE, *words, timeout_s=RUN_S_MAX).expect(0)


def one_drain(job: Job, _log: Log) -> dict[str, Any]:
    """(a)"""
    return {"batches": run(job, "--set", f"microbatch.max_records={max(1, RECORDS // 4)}").last["batches"]}


def random_cuts(job: Job, _log: Log) -> dict[str, Any]:
    """(b)"""
    draws = random.Random(SEED + 1)
    cuts = 0
    while cuts < CUTS:
        # three quarters of the log on average, so that it lasts for all cuts
        size = draws.randrange(1, 3 * RECORDS // (2 * CUTS))
        batches = run(job, "--max-batches", "1", "--set", f"microbatch.max_records={size}").last["batches"]
        assert batches > 0, f"the log ended after {cuts} cuts"
        cuts += batches
    run(job)
    return {"cuts": cuts}


def ends_of(job: Job) -> ledger.Offsets:
    try:
        return ledger.full_offsets(ledger.full_record(job.reader().table), "end")
    except (NoSuchTableError, KeyError):
        return {}


def kills_of_a_run_without_end(job: Job, log: Log) -> dict[str, Any]:
    """(c)"""
    draws = random.Random(SEED + 2)
    words = ("run", job.path, "--continuous", "--json", *SIDE, "--set", f"microbatch.max_records={RECORDS // 50}")
    after: list[str] = []
    while len(after) < KILLS and ends_of(job) != log.ends:
        trace = Trace(job.folder / "phases")
        with started(*words, environment=trace.environment) as follows:
            assert trace.reached("read", 1, follows), follows.output()
            try:
                # the moment of the kill is the fault
                follows.wait(timeout_s=draws.uniform(0, MOMENT_S_MAX))
            except subprocess.TimeoutExpired:
                follows.kill()
            after.append(trace.phases()[-1])
    with started(*words) as follows:

        def is_read() -> bool:
            assert follows.poll() is None, follows.output()
            return ends_of(job) == log.ends

        wait_until("the end of the log", is_read, RUN_S_MAX)
        follows.send(signal.SIGTERM)
        assert follows.wait() == INTERRUPTED, follows.output()
    return {"kills": len(after), "after": {phase: after.count(phase) for phase in sorted(set(after))}}


def drains_and_backfills(job: Job, log: Log) -> dict[str, Any]:
    """(d)"""
    draws = random.Random(SEED + 3)
    lanes: set[str] = set()
    # Live is still before the ranges when they are registered, so that a backfill writes some events first.
    small = RECORDS // 60
    run(job, "--max-batches", "1", "--set", f"microbatch.max_records={small}")
    steps = 1
    while len(lanes) < len(RANGES) or ends_of(job) != log.ends:
        waiting = [lane for lane in RANGES if lane not in lanes]
        most = small if waiting else draws.randrange(small, 4 * small)
        size = ("--set", f"microbatch.max_records={most}")
        steps += 1
        if waiting:
            lane = waiting[0]
            from_ms, to_ms = RANGES[lane]
            tidemill(
                "backfill", job.path, "--from", shown(from_ms), "--to", shown(to_ms), "--name", lane, "--yes", "--json",
                "--max-batches", "12", *SIDE, *size, timeout_s=RUN_S_MAX,
            ).expect(0)  # fmt: skip
            lanes.add(lane)
        else:
            run(job, "--max-batches", str(draws.randrange(1, 12)), *size)
    for lane in RANGES:
        tidemill("backfill", job.path, "--resume", lane, "--json", *SIDE, timeout_s=RUN_S_MAX).expect(0)
    run(job)
    listed = tidemill("lane", "list", job.path, "--json").expect(0).last["lanes"]
    assert [lane["state"] for lane in listed] == ["done", "done"], listed
    return {"steps": steps, "lanes": {lane["lane"]: lane["counts"] for lane in listed}}


Way = Callable[[Job, Log], dict[str, Any]]
WAYS: dict[str, Way] = {
    "one drain": one_drain,
    "random cuts": random_cuts,
    "kills of a run without end": kills_of_a_run_without_end,
    "drains and backfills": drains_and_backfills,
}


def test_every_way_through_one_log_ends_in_the_same_keys_and_dead_letters(place: Corner) -> None:
    # a topic takes records of a producer whose clock is ahead, unless it is told otherwise by its default of one hour
    topic = place.topic(partitions=PARTITIONS, message_timestamp_after_max_ms=str(2 * YEAR_MS))
    send_log(place.feed(topic), RECORDS)
    log = Log(place.broker.bootstrap, [topic], keep_rows=False)
    log.advance()
    judge = Judge(log)
    seconds, facts = {}, {}
    for number, (way, go) in enumerate(WAYS.items()):
        job = place.job(topic, folder=place.folder / f"way-{number}", max_ratio=0.5)
        begun = time.monotonic()
        facts[way] = go(job, log)
        seconds[way] = round(time.monotonic() - begun, 1)
        judge.keep(way, job)
        assert ends_of(job) == log.ends
    base = next(iter(WAYS))
    sides = {way: judge.number(f"select count(*) from kept where way = '{way}' and side = 1") for way in WAYS}
    differences = {way: judge.differences(base, way) for way in WAYS if way != base}
    by_lane = dict(judge.sql.execute("select lane, count(*) from kept where way = 'drains and backfills' group by 1").fetchall())
    for counts in differences.values():
        told = counts["moved_with_another_copy"] + counts["moved_by_the_watermark_of_a_backfill"]
        assert counts["moved"] == told, f"moves without a reason: {counts}"
    assert set(by_lane) > {"live"}, f"the backfills must come first somewhere for this test to say anything: {by_lane}"
    assert min(sides.values()) > RECORDS * 0.03, "the log must hold late rows for this test to say anything"
    assert log.by_reason["event_time_ahead"] > 0
    result = {
        "records": RECORDS, "rows": log.consumed, "events": len(log.events), "repeats": log.duplicates,
        "dead_letters": log.by_reason, "late_rows": sides, "rows_by_lane": by_lane,
        "ways": facts, "seconds": seconds, f"keys against {base}": differences,
    }  # fmt: skip
    report("ways", result)
    print(f"seed {SEED}: the same {len(log.events)} keys and {len(log.letters)} dead letters in every way")
    print(json.dumps(result, indent=1))
