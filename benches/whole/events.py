"""A table of another tool and a topic of events, both of ids that follow from numbers, so that their truth is arithmetic.

The id of number n is md5(n) in hexadecimal: 32 characters that no dictionary makes smaller. Rows of the table have the
numbers below `table_keys`; events that repeat one of them draw it evenly from all; new events count on from there.
"""

from __future__ import annotations

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
ROWS_PER_CHUNK = 1_000_000
EVENTS_PER_CHUNK = 500_000

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
    """Events of a topic: in each hundred, so many repeat a row of the table or an event of shortly before."""

    events: int
    table_keys: int
    begin_ms: int
    far_percent: int = 4
    near_percent: int = 2

    @property
    def first_ms(self) -> int:
        """Event time of the first event; rows of the table are older."""
        return self.begin_ms + TABLE_DAYS * DAY_MS


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
    return f"""
        SELECT i, CASE
            WHEN i % 100 < {far} AND {stream.table_keys} > 0 THEN (hash(i) % {max(stream.table_keys, 1)})::BIGINT
            WHEN i % 100 < {far + near} AND i >= 1000 THEN {stream.table_keys} + (i - 1 - i % 100) - (hash(i) % 800)::BIGINT
            ELSE {stream.table_keys} + i END AS n
        FROM range({first}, {last}) AS events(i)"""


def events_of(stream: Stream) -> Iterator[pa.Table]:
    """Chunks of payloads in the order of the topic."""
    connection = duckdb.connect()
    connection.execute("SET memory_limit = '1GB'; SET enable_progress_bar = false")
    for first in range(0, stream.events, EVENTS_PER_CHUNK):
        last = min(first + EVENTS_PER_CHUNK, stream.events)
        yield connection.execute(
            f"""
            SELECT '{{"event_id":"' || md5(n::VARCHAR) || '","event_type":"' || {TYPES} || '","ts":' || ts
                || ',"user_id":' || n % 9973 || ',"campaign":"welcome-' || n % 7
                || '","channel":"push","delivery":{{"provider":"fcm","region":"eu-west-1","attempt":1}}'
                || ',"locale":"en-GB","device":"' || md5((n + 1)::VARCHAR) || '","agent":"client/4.2 (build ' || n % 1000 || ')"}}'
                AS payload
            FROM (SELECT i, n, CASE WHEN n < {stream.table_keys} THEN {time_of_row(stream)}
                ELSE {stream.first_ms} + (n - {stream.table_keys}) // 100 END AS ts
                FROM ({numbers_sql(stream, first, last)}))
            ORDER BY i
            """
        ).to_arrow_table()


def send(bootstrap: str, topic: str, partitions: int, stream: Stream, compression: str) -> None:
    """Sends the stream in its order, round robin over the topic partitions."""
    failures: list[KafkaError] = []
    producer = Producer(
        {
            "bootstrap.servers": bootstrap, "linger.ms": 20, "batch.size": 1 << 20, "acks": "all",
            "compression.type": compression, "queue.buffering.max.messages": 2_000_000,
            "on_delivery": lambda error, _message: failures.append(error) if error is not None else None,
        }
    )  # fmt: skip
    sent = 0
    for chunk in events_of(stream):
        for payload in chunk["payload"]:
            while True:
                try:
                    producer.produce(topic, payload.as_py(), partition=sent % partitions)
                    break
                except BufferError:
                    producer.poll(0.1)
            sent += 1
        producer.poll(0)
    left = producer.flush(300)
    if left or failures:
        raise RuntimeError(f"{left} events were not sent; {failures[:3]}")


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
        connection.execute("SET memory_limit = '4GB'; SET preserve_insertion_order = false; SET enable_progress_bar = false")
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
