"""A table of another tool and a topic of events, both of ids that follow from numbers, so that their truth is arithmetic.

The id of number n is md5(n) in hexadecimal: 32 characters that no dictionary makes smaller. Rows of the table have the
numbers below `table_keys`; events that repeat one of them draw it evenly from all; new events count on from there.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from pyiceberg.catalog import Catalog
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import DayTransform
from pyiceberg.types import LongType, NestedField, StringType, TimestamptzType

DAY_MS = 24 * 3600 * 1000
# the table's rows lie in so many whole days, which a window of seven holds with the events that follow
TABLE_DAYS = 5
# how long a record batch is filled, at most
LINGER_MS = 20
# what a producer sends at most; brokers of the tests take more
RECORD_BYTES_MAX = 8 << 20
ROWS_PER_CHUNK = 1_000_000
EVENTS_PER_CHUNK = 500_000
CHUNK_BYTES = 100 << 20
# large events begin at so many places of one text, so that no two neighbours are alike
SHIFTS = 1000

COLUMNS = """
event_id = { type = "string", required = true }
event_type = { type = "string", required = true }
event_time = { type = "timestamptz", path = "$.ts", unit = "ms", required = true }
user_id = { type = "long" }
campaign = { type = "string" }
channel = { type = "string" }
provider = { type = "string", path = "$.delivery.provider" }
region = { type = "string", path = "$.delivery.region" }
locale = { type = "string" }
"""

SCHEMA = Schema(
    NestedField(1, "event_id", StringType(), required=True),
    NestedField(2, "event_type", StringType(), required=True),
    NestedField(3, "event_time", TimestamptzType(), required=True),
    NestedField(4, "user_id", LongType(), required=False),
    NestedField(5, "campaign", StringType(), required=False),
    NestedField(6, "channel", StringType(), required=False),
    NestedField(7, "provider", StringType(), required=False),
    NestedField(8, "region", StringType(), required=False),
    NestedField(9, "locale", StringType(), required=False),
)
SPEC = PartitionSpec(PartitionField(3, 1000, DayTransform(), "event_time_day"))
# members of an event but for its id, from its number; the payload has about 300 bytes
TYPES = "list_extract(['generated', 'sent', 'delivered', 'clicked'], 1 + n % 4)"


@dataclass(frozen=True)
class Stream:
    """Events of a topic: in each hundred, so many repeat a row of the table or an event of shortly before.

    Without a table, far repeats are of any new event before. Times of new events follow each other, a hundred in a millisecond,
    or are spread evenly over `span_ms`; with `open_days` they are of any of so many days, in no order. One in `large_every`
    events carries `large_bytes` more in a column: of noise, or of one letter.
    """

    events: int
    table_keys: int
    begin_ms: int
    far_percent: int = 4
    near_percent: int = 2
    span_ms: int = 0
    open_days: int = 0
    large_every: int = 0
    large_bytes: int = 0
    large_is_noise: bool = True

    @property
    def first_ms(self) -> int:
        """Event time of the first event; rows of the table are older."""
        return self.begin_ms + TABLE_DAYS * DAY_MS


def time_of_event(stream: Stream) -> str:
    """Event time of the new event n, in SQL."""
    number = f"(n - {stream.table_keys})"
    if stream.open_days:
        return f"({stream.begin_ms} + (hash(n) % {stream.open_days})::BIGINT * {DAY_MS} + {number} % {DAY_MS})"
    if stream.span_ms:
        return f"({stream.first_ms} + {number} * {stream.span_ms} // {stream.events})"
    return f"({stream.first_ms} + {number} // 100)"


def time_of_row(stream: Stream) -> str:
    """Event time of the table's row n, in SQL: spread over the days in the order of n."""
    return f"({stream.begin_ms} + n * {TABLE_DAYS * DAY_MS} // {max(stream.table_keys, 1)})"


def fill_table(catalog: Catalog, name: str, stream: Stream) -> None:
    """Writes the rows with pyiceberg, chunk after chunk."""
    catalog.create_namespace_if_not_exists(name.partition(".")[0])
    table = catalog.create_table(name, SCHEMA, partition_spec=SPEC)
    connection = duckdb.connect()
    connection.execute("SET memory_limit = '1GB'; SET TimeZone = 'UTC'; SET enable_progress_bar = false")
    for first in range(0, stream.table_keys, ROWS_PER_CHUNK):
        rows = connection.execute(
            f"""
            SELECT md5(n::VARCHAR) AS event_id, {TYPES} AS event_type,
                to_timestamp({time_of_row(stream)} / 1000) AS event_time, n % 9973 AS user_id,
                'welcome-' || n % 7 AS campaign, 'push' AS channel, 'fcm' AS provider, 'eu-west-1' AS region, 'en-GB' AS locale
            FROM range({first}, {min(first + ROWS_PER_CHUNK, stream.table_keys)}) AS numbers(n)
            """
        ).to_arrow_table()
        table.append(rows.cast(table.schema().as_arrow()))


def numbers_sql(stream: Stream, first: int, last: int) -> str:
    """The number n behind each event i of [first, last), and its event time."""
    far, near = stream.far_percent, stream.near_percent
    # of the table, or of the new events before this hundred
    before = "(hash(i) % greatest(i - i % 100, 1))::BIGINT"
    new = f"{before} - {before} % 100 + {far + near} + {before} % {100 - far - near}"
    far_one = f"(hash(i) % {stream.table_keys})::BIGINT" if stream.table_keys else new
    return f"""
        SELECT i, CASE
            WHEN i % 100 < {far} AND ({stream.table_keys} > 0 OR i >= 1000) THEN {far_one}
            WHEN i % 100 < {far + near} AND i >= 1000 THEN {stream.table_keys} + (i - 1 - i % 100) - (hash(i) % 800)::BIGINT
            ELSE {stream.table_keys} + i END AS n
        FROM range({first}, {last}) AS events(i)"""


def events_of(stream: Stream) -> Iterator[pa.Table]:
    """Chunks of payloads in the order of the topic."""
    connection = duckdb.connect()
    connection.execute("SET memory_limit = '1GB'; SET enable_progress_bar = false")
    chunk, more, large = EVENTS_PER_CHUNK, "''", ""
    if stream.large_every:
        chunk = min(chunk, max(CHUNK_BYTES * stream.large_every // stream.large_bytes, 1))
        # in the middle of a hundred, where no repeats are
        more = f"CASE WHEN n % {stream.large_every} = {stream.large_every // 2} THEN substr($large, 1 + n % {SHIFTS}, {stream.large_bytes}) ELSE '' END"
        length = stream.large_bytes + SHIFTS
        large = random.Random(1).randbytes(length // 2 + 1).hex() if stream.large_is_noise else "x" * length
    for first in range(0, stream.events, chunk):
        last = min(first + chunk, stream.events)
        yield connection.execute(
            f"""
            SELECT '{{"event_id":"' || md5(n::VARCHAR) || '","event_type":"' || {TYPES} || '","ts":' || ts
                || ',"user_id":' || n % 9973 || ',"campaign":"welcome-' || n % 7 || {more}
                || '","channel":"push","delivery":{{"provider":"fcm","region":"eu-west-1","attempt":1}}'
                || ',"locale":"en-GB","device":"' || md5((n + 1)::VARCHAR) || '","agent":"client/4.2 (build ' || n % 1000 || ')"}}'
                AS payload
            FROM (SELECT i, n, CASE WHEN n < {stream.table_keys} THEN {time_of_row(stream)}
                ELSE {time_of_event(stream)} END AS ts
                FROM ({numbers_sql(stream, first, last)}))
            ORDER BY i
            """,
            {"large": large} if large else None,
        ).to_arrow_table()


def send(
    bootstrap: str, topic: str, partitions: int, stream: Stream, compression: str, linger_ms: int = LINGER_MS
) -> int:
    """Sends the stream in its order, round robin over the topic partitions; the bytes of all payloads."""
    failures: list[KafkaError] = []
    producer = Producer(
        {
            "bootstrap.servers": bootstrap, "linger.ms": linger_ms, "batch.size": 1 << 20, "acks": "all",
            "compression.type": compression, "queue.buffering.max.messages": 2_000_000, "message.max.bytes": RECORD_BYTES_MAX,
            "on_delivery": lambda error, _message: failures.append(error) if error is not None else None,
        }
    )  # fmt: skip
    sent = payload_bytes = 0
    for chunk in events_of(stream):
        for payload in chunk["payload"]:
            text = payload.as_py()
            payload_bytes += len(text)
            while True:
                try:
                    producer.produce(topic, text, partition=sent % partitions)
                    break
                except BufferError:
                    producer.poll(0.1)
            sent += 1
        producer.poll(0)
    left = producer.flush(300)
    if left or failures:
        raise RuntimeError(f"{left} events were not sent; {failures[:3]}")
    return payload_bytes


def records_in(bootstrap: str, topic: str, partitions: int) -> int:
    """Records between the ends of the topic, asked from the broker."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench"})
    try:
        ends = [consumer.get_watermark_offsets(TopicPartition(topic, one)) for one in range(partitions)]
    finally:
        consumer.close()
    return sum(high - low for low, high in ends)


def check(files: list[str], stream: Stream, with_table: bool) -> dict[str, int]:
    """Reads a table's files with DuckDB: each id of the events, and of the rows before them, once, and nothing else.

    In parts by the first digit of the ids, so that it needs memory for one part of them only.
    """
    before = f"SELECT n FROM range(0, {stream.table_keys if with_table else 0}) AS numbers(n)"
    wanted_numbers = f"{before} UNION ALL SELECT n FROM ({numbers_sql(stream, 0, stream.events)})"
    total = {"rows": 0, "ids": 0, "expected": 0, "missing": 0}
    with tempfile.TemporaryDirectory() as folder:
        connection = duckdb.connect(str(Path(folder) / "check.db"))
        # its progress bar would stand among the results
        connection.execute(
            "SET memory_limit = '4GB'; SET preserve_insertion_order = false; SET enable_progress_bar = false"
        )
        for digits in ("0123", "4567", "89ab", "cdef"):
            # halves of the digest: joined as numbers, not as text
            connection.execute(
                "CREATE OR REPLACE TABLE found AS SELECT md5_number(event_id) AS k, count(*) AS copies FROM read_parquet(?) "
                "WHERE contains(?, event_id[1]) GROUP BY ALL",
                [files, digits],
            )
            connection.execute(
                f"CREATE OR REPLACE TABLE expected AS SELECT DISTINCT md5_number(id) AS k FROM "
                f"(SELECT md5(n::VARCHAR) AS id FROM ({wanted_numbers})) WHERE contains(?, id[1])",
                [digits],
            )
            rows, ids = connection.execute("SELECT coalesce(sum(copies), 0)::BIGINT, count(*) FROM found").fetchone()
            (wanted,) = connection.execute("SELECT count(*) FROM expected").fetchone()
            (missing,) = connection.execute("SELECT count(*) FROM expected ANTI JOIN found USING (k)").fetchone()
            for name, count in zip(total, (rows, ids, wanted, missing), strict=True):
                total[name] += count
    if not total["rows"] == total["ids"] == total["expected"] or total["missing"]:
        raise RuntimeError(f"the table is not what was sent: {total}")
    return total
