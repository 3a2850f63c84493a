"""Independent readers of the tables: pyiceberg and DuckDB. Neither shares a line with what wrote them."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from pyiceberg.table import StaticTable, Table

from truth import Place

METADATA_COLUMNS = {
    "_kafka_topic": "string",
    "_kafka_partition": "int",
    "_kafka_offset": "long",
    "_kafka_index": "int",
    "_kafka_timestamp": "timestamptz",
    "_tidemill_batch": "long",
}

# What every engine takes as a column name: Avro's rule, the strictest of those that read the tables.
AVRO_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PyicebergReader:
    """Reads a table through pyiceberg, from a catalog or from one metadata file."""

    def __init__(self, table: Table) -> None:
        self.table = table

    @classmethod
    def of_metadata(cls, location: str, properties: dict[str, str] | None = None) -> PyicebergReader:
        """Reads the table as one metadata file has it."""
        return cls(StaticTable.from_metadata(location, properties or {}))

    def columns(self, *names: str) -> pa.Table:
        """These columns of all rows."""
        return self.table.scan(selected_fields=names).to_arrow()

    def count(self) -> int:
        """Rows, counted by reading them."""
        return self.columns("_kafka_offset").num_rows

    def files(self) -> list[str]:
        """The data files of the current snapshot."""
        return [task.file.file_path for task in self.table.scan().plan_files()]

    def ids(self) -> list[str]:
        """The event id of every row, with whatever repeats there are."""
        return self.columns("event_id")["event_id"].to_pylist()

    def by_type(self) -> dict[str, int]:
        """Rows per event type."""
        return dict(Counter(self.columns("event_type")["event_type"].to_pylist()))

    def places(self) -> dict[Place, int]:
        """The batch that wrote each place; a place that stands twice is an error."""
        rows = self.columns("_kafka_topic", "_kafka_partition", "_kafka_offset", "_kafka_index", "_tidemill_batch")
        columns = [column.to_pylist() for column in rows.columns]
        places = {
            Place(topic, partition, offset, index): batch
            for topic, partition, offset, index, batch in zip(*columns, strict=True)
        }
        assert len(places) == rows.num_rows, f"{rows.num_rows - len(places)} places stand more than once"
        return places

    def check_metadata_columns(self) -> None:
        """Every table of a job carries the columns that audit and recovery need."""
        fields = {field.name: str(field.field_type) for field in self.table.schema().fields}
        found = {name: fields.get(name) for name in METADATA_COLUMNS}
        assert found == METADATA_COLUMNS, found
        refused = [name for name in fields if not AVRO_NAME.fullmatch(name)]
        assert not refused, f"readers that take Avro names only refuse {refused}"


@cache
def _duckdb() -> duckdb.DuckDBPyConnection:
    """DuckDB with its extensions, loaded once per worker: that takes longer than most questions."""
    connection = duckdb.connect()
    for name in ("httpfs", "avro", "iceberg"):
        package = Path(import_module(f"duckdb_extension_{name}").__file__ or "").parent
        binary = next(package.glob(f"extensions/*/{name}.duckdb_extension"))
        connection.execute(f"load '{binary}'")
    return connection


class DuckdbReader:
    """Reads one metadata file with DuckDB's iceberg extension."""

    def __init__(self, metadata_location: str, s3: dict[str, str] | None = None) -> None:
        self.source = f"iceberg_scan('{metadata_location.removeprefix('file://')}')"
        self.connection = _duckdb().cursor()
        self.connection.execute("set timezone = 'UTC'")
        if s3:
            host = s3["s3.endpoint"].removeprefix("http://")
            self.connection.execute(
                f"create or replace secret (type s3, key_id '{s3['s3.access-key-id']}', secret '{s3['s3.secret-access-key']}', "
                f"region '{s3['s3.region']}', endpoint '{host}', url_style 'path', use_ssl false)"
            )

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Runs SQL in which `{table}` stands for the table."""
        return self.connection.execute(sql.replace("{table}", self.source)).fetchall()

    def count(self) -> int:
        """Rows."""
        return self.query("select count(*) from {table}")[0][0]

    def distinct(self) -> int:
        """Distinct event ids."""
        return self.query("select count(distinct event_id) from {table}")[0][0]

    def by_type(self) -> dict[str, int]:
        """Rows per event type."""
        return dict(self.query("select event_type, count(*) from {table} group by 1"))

    def differences(self, ids: set[str]) -> tuple[int, int]:
        """How many of `ids` the table lacks, and how many ids it has beyond them."""
        self.connection.register("expected", pa.table({"event_id": pa.array(ids, pa.string())}))
        missing = self.query("select count(*) from expected anti join (select event_id from {table}) using (event_id)")
        extra = self.query("select count(*) from (select event_id from {table}) anti join expected using (event_id)")
        return missing[0][0], extra[0][0]
