"""The judges are judged: truth, readers and counters of these tests must notice what they are there to notice."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog as PyicebergRestCatalog
from pyiceberg.catalog.sql import SqlCatalog

from conftest import Corner
from events import event
from readers import DuckdbReader, PyicebergReader
from services import RestCatalog, S3Server
from truth import rows_of

HERE = Path(__file__).parent


def written(folder: Path, ids: list[str]) -> PyicebergReader:
    """A table of these event ids, written by pyiceberg."""
    return append(SqlCatalog("tools", uri=f"sqlite:///{folder}/tools.db", warehouse=f"file://{folder}/warehouse"), ids)


def append(catalog: Catalog, ids: list[str]) -> PyicebergReader:
    """A new table in `catalog` with a row for each of these event ids."""
    catalog.create_namespace("events")
    rows = pa.table(
        {
            "event_id": ids,
            "event_type": ["sent" if number % 2 else "clicked" for number in range(len(ids))],
            "_kafka_topic": ["events"] * len(ids),
            "_kafka_partition": pa.array([0] * len(ids), pa.int32()),
            "_kafka_offset": pa.array(range(len(ids)), pa.int64()),
            "_kafka_index": pa.array([0] * len(ids), pa.int32()),
            "_kafka_timestamp": pa.array([0] * len(ids), pa.timestamp("us", tz="UTC")),
            "_tidemill_batch": pa.array([1] * len(ids), pa.int64()),
        }
    )
    table = catalog.create_table("events.tools", rows.schema)
    table.append(rows)
    return PyicebergReader(table)


def test_both_readers_see_the_same_rows_and_notice_missing_doubled_and_foreign_ones(tmp_path: Path) -> None:
    ours = written(tmp_path, ["a", "b", "b", "d"])
    theirs = DuckdbReader(ours.table.metadata_location)
    ours.check_metadata_columns()
    assert ours.count() == theirs.count() == 4
    assert sorted(ours.ids()) == ["a", "b", "b", "d"] and theirs.distinct() == 3
    assert ours.by_type() == theirs.by_type() == {"clicked": 2, "sent": 2}
    assert theirs.differences({"a", "b", "c"}) == (1, 1)
    assert len(ours.places()) == 4


def test_both_readers_see_a_table_on_the_rest_catalog_and_the_s3_server(
    rest_catalog: RestCatalog, s3: S3Server
) -> None:
    catalog = PyicebergRestCatalog("tools", uri=rest_catalog.uri, warehouse=rest_catalog.warehouse, **s3.properties())
    ours = append(catalog, ["a", "b"])
    assert ours.table.metadata_location.startswith("s3://")
    assert DuckdbReader(ours.table.metadata_location, s3.properties()).differences({"a", "b"}) == (0, 0)
    assert ours.ids() == ["a", "b"]


def test_the_truth_of_a_topic_counts_each_event_once_and_follows_new_records(place: Corner) -> None:
    topic = place.topic(partitions=3)
    feed = place.feed(topic)
    feed.send(event(1), event(2), event(1), [event(3), event(2), 4], None)
    truth = place.truth(topic)
    assert (truth.consumed, truth.good, len(truth.events), truth.duplicates) == (7, 5, 3, 2)
    assert truth.by_reason == {"not_an_object": 1, "tombstone": 1}
    feed.send(event(3), event(4))
    truth.advance()
    assert (truth.consumed, len(truth.events), sum(truth.ends.values())) == (9, 4, 7)
    whole = list(truth.rows_between(truth.starts, truth.ends))
    assert len(whole) == 9 and list(truth.rows_between(truth.ends, truth.ends)) == []


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"event_id":"a","event_type":"sent","ts":1,"ts":2}', "duplicate_field"),
        (b'{"event_id":"a","event_type":"sent","ts":Infinity}', "invalid_json"),
        (b'{"event_id":"a","event_type":"se', "truncated_json"),
        (b'{"event_id":"a","event_type":"sent","ts":true}', "wrong_type"),
        (b'{"event_id":"","event_type":"sent","ts":1}', "empty_key"),
    ],
)
def test_the_truth_refuses_what_pythons_json_would_let_pass(payload: bytes, reason: str) -> None:
    assert [row.reason for row in rows_of(payload, None)] == [reason]


@pytest.mark.parametrize(
    ("attributes", "counts"),
    [
        ('tests="5" failures="1" errors="1" skipped="1"', "2 3"),
        ('tests="3" failures="0" errors="0" skipped="0"', "3 0"),
        ('tests="0" failures="0" errors="0" skipped="0"', "0 0"),
    ],
)
def test_a_skipped_test_counts_as_failed(tmp_path: Path, attributes: str, counts: str) -> None:
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite {attributes}></testsuite></testsuites>")
    command = [sys.executable, str(HERE / "count_results.py"), str(report)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == counts
