"""A foreign hand: someone who works on the job's tables with pyiceberg, by a seed, and remembers what must be true then.

Rows that the hand appends are not ours, and rows that it deletes stay away: `expected` is the one place that says so.
"""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.expressions import AlwaysTrue, EqualTo, In
from pyiceberg.io.pyarrow import ArrowScan, _dataframe_to_data_files
from pyiceberg.table import FileScanTask, Table
from pyiceberg.types import StringType
from sqlalchemy.exc import OperationalError

import ledger
from events import event_id
from job import Job, Running
from readers import PyicebergReader
from truth import LogTruth

T = TypeVar("T")
ROWS_MAX = 20
# Foreign rows take ids of events below this number: some stand already, some are yet to come.
NUMBERS = 5_000
TRIES_MAX = 20
# What the metadata columns of rows say that are not ours: batch 0, none, or one that no job reaches.
FOREIGN_BATCHES = (0, -1, 1 << 40)
PROPERTIES = (
    ("write.target-file-size-bytes", "1000000"),
    ("write.parquet.compression-codec", "gzip"),
    ("write.metadata.compression-codec", "none"),
    ("write.metadata.previous-versions-max", "2"),
    ("write.metadata.delete-after-commit.enabled", "true"),
    ("history.expire.min-snapshots-to-keep", "1"),
    ("commit.manifest-merge.enabled", "false"),
    ("comment", "changed by hand"),
)


def forget_history(job: Job) -> None:
    """Foreign commits on top of a table, and every snapshot below them expired."""
    table = job.open_catalog().load_table(job.table)
    rows = table.scan().to_arrow().slice(0, 1)
    table.append(rows)
    table.delete(EqualTo("event_id", rows["event_id"][0].as_py()))
    table.append(rows)
    table = job.open_catalog().load_table(job.table)
    head = table.current_snapshot()
    assert head is not None
    old = [snapshot.snapshot_id for snapshot in table.snapshots() if snapshot.snapshot_id != head.snapshot_id]
    table.maintenance.expire_snapshots().by_ids(old).commit()


def replace_in_place(job: Job) -> None:
    """CREATE OR REPLACE TABLE as Iceberg's Java library does it: id, properties and snapshots stay, none of them is current."""
    catalog = job.open_catalog()
    table = catalog.load_table(job.table)
    emptied = table.metadata.model_copy(update={"current_snapshot_id": None, "snapshot_log": [], "refs": {}})
    place = f"{table.location()}/metadata/99999-{table.metadata.table_uuid}.metadata.json"
    with table.io.new_output(place).create(overwrite=True) as out:
        out.write(emptied.model_dump_json().encode())
    catalog.drop_table(job.table)
    catalog.register_table(job.table, place)


@dataclass(frozen=True)
class Taken:
    """Rows that were deleted and can be put back."""

    rows: pa.Table
    ours: frozenset[str]
    foreign: Counter[str]


class Hand:
    """Acts on a job's tables; every act is one of `ACTS`, drawn by the seed."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.catalog = job.open_catalog()
        self.draws = random.Random(seed)
        # Events whose row of ours was deleted, and copies that are not ours, by event id.
        self.erased: set[str] = set()
        self.foreign: Counter[str] = Counter()
        self.taken: list[Taken] = []
        self.commits: list[ledger.Commit] = []
        self.log: list[str] = []
        # A run that stands still while the hand acts.
        self.holds: Running | None = None

    def main(self) -> Table:
        """The main table as it stands."""
        return self.catalog.load_table(self.job.table)

    def letters(self) -> Table:
        """The dead-letter table as it stands."""
        return self.catalog.load_table(f"{self.job.table}_dead_letters")

    def expected(self, truth: LogTruth) -> Counter[str]:
        """How often each event id stands in the main table once everything of the log is read."""
        ours = {event_id: 1 for event_id in truth.events if event_id not in self.erased}
        return Counter(ours) + self.foreign

    def check(self, truth: LogTruth) -> None:
        """Both readers see what is expected; the ledger is dense; every refused place stands once."""
        table = self.main()
        self.remember(table)
        expected = self.expected(truth)
        reader = PyicebergReader(table)
        ids = Counter(reader.ids())
        assert ids == expected, f"missing {list((expected - ids).items())[:5]}, extra {list((ids - expected).items())[:5]}"
        files = reader.files()
        assert len(files) == len(set(files)), "a data file stands twice"
        seen = self.job.duckdb(table.metadata_location).query("select event_id, count(*) from {table} group by 1")
        assert Counter(dict(seen)) == expected, "DuckDB sees other rows than pyiceberg"
        self.job.check_letters(truth)
        ledger.check_totals(ledger.check_chain(table, self.commits), truth)

    def remember(self, table: Table) -> None:
        """Keeps what the history says, before it is expired."""
        self.commits = ledger.with_earlier(self.commits, table)

    def act(self, name: str | None = None) -> str:
        """One act on the tables as they stand; one that loses a race against a commit is tried again."""
        name = name or self.draws.choice(list(ACTS))
        done = self._until_it_wins(lambda: ACTS[name](self))
        self.log.append(name if done else f"({name})")
        return name

    def persist(self, change: Callable[[Table], None]) -> None:
        """Changes the main table, again if a commit of the job was faster."""
        self._until_it_wins(lambda: change(self.main()))

    def _until_it_wins(self, change: Callable[[], T]) -> T:
        for _ in range(TRIES_MAX):
            try:
                with self._held_still():
                    return change()
            except (CommitFailedException, ValidationException, OperationalError):
                # a commit was faster, or the program was stopped while it held the catalog's file
                continue
        raise AssertionError(f"the race against the job was lost {TRIES_MAX} times")

    @contextmanager
    def _held_still(self) -> Iterator[None]:
        """Stops the program that is to be acted upon wherever it is, so that it does not outrun the hand."""
        run = self.holds if self.holds and self.holds.poll() is None else None
        if run:
            run.send(signal.SIGSTOP)
        try:
            yield
        finally:
            if run:
                run.send(signal.SIGCONT)

    def _some_rows(self, table: Table) -> pa.Table:
        """A few rows of ours."""
        rows = table.scan().to_arrow()
        rows = rows.filter(pc.is_in(rows["_tidemill_batch"], pa.array(range(1, 100_000), pa.int64())))
        count = min(rows.num_rows, self.draws.randint(1, ROWS_MAX))
        return rows.take(sorted(self.draws.sample(range(rows.num_rows), count)))

    def append(self) -> bool:
        """Rows of others: new events, a copy of one that stands, and one that the topic will bring later."""
        table = self.main()
        rows = self._some_rows(table)
        if rows.num_rows == 0:
            return False
        self.append_as(table, rows, batch=self.draws.choice(FOREIGN_BATCHES), topic="by-hand")
        return True

    def append_as(self, table: Table, rows: pa.Table, batch: int | None = None, topic: str | None = None) -> None:
        """Appends copies of rows under ids of their own, with the batch and topic given or those of the rows."""
        ids = [
            self.draws.choice((f"by-hand-{self.draws.getrandbits(40)}", event_id(self.draws.randrange(NUMBERS)), old))
            for old in rows["event_id"].to_pylist()
        ]
        rows = replaced(rows, "event_id", ids)
        if batch is not None:
            rows = replaced(rows, "_tidemill_batch", [batch] * rows.num_rows)
        if topic is not None:
            rows = replaced(rows, "_kafka_topic", [topic] * rows.num_rows)
        table.append(rows)
        self.foreign.update(ids)

    def delete(self) -> bool:
        """Rows of ours go away, with every copy."""
        table = self.main()
        ids = set(self._some_rows(table)["event_id"].to_pylist())
        if not ids:
            return False
        where = In("event_id", ids)  # type: ignore[arg-type]
        rows = table.scan(row_filter=where).to_arrow()
        table.delete(where)
        self.taken.append(Taken(rows, frozenset(ids), Counter({name: self.foreign[name] for name in ids})))
        self.erased |= ids
        for name in ids:
            del self.foreign[name]
        return True

    def put_back(self) -> bool:
        """Rows that were deleted come back as they were."""
        if not self.taken:
            return False
        taken = self.taken[-1]
        table = self.main()
        table.append(fitted(taken.rows, table))
        self.taken.pop()
        self.erased -= taken.ours
        self.foreign.update(+taken.foreign)
        return True

    def compact(self) -> bool:
        """Some files of one table become as few as its partitions allow, in one commit."""
        table = self.draws.choice((self.main, self.letters))()
        tasks = sorted(table.scan().plan_files(), key=lambda task: task.file.file_path)
        if len(tasks) < 2:
            return False
        chosen = self.draws.sample(tasks, self.draws.randint(2, len(tasks)))
        rewrite(table, chosen, rows_of_files(table, chosen))
        return True

    def update(self) -> bool:
        """A column that is no part of the key changes its value in some rows."""
        table = self.main()
        tasks = list(table.scan().plan_files())
        if not tasks:
            return False
        chosen = [self.draws.choice(tasks)]
        rows = rows_of_files(table, chosen)
        rewrite(table, chosen, replaced(rows, "campaign", ["changed by hand"] * rows.num_rows))
        return True

    def expire(self) -> bool:
        """Every snapshot goes but the last one, of both tables."""
        main = self.main()
        self.remember(main)
        done = False
        for table in (main, self.letters()):
            current = table.metadata.current_snapshot_id
            old = [snapshot.snapshot_id for snapshot in table.metadata.snapshots if snapshot.snapshot_id != current]
            if old:
                table.maintenance.expire_snapshots().by_ids(old).commit()
                done = True
        return done

    def add_column(self) -> bool:
        """The main table gets one more optional column."""
        table = self.main()
        name = f"by_hand_{len(table.schema().fields)}"
        with table.update_schema() as update:
            update.add_column(name, StringType())
        return True

    def change_properties(self) -> bool:
        """Some property of one table changes."""
        table = self.draws.choice((self.main, self.letters))()
        with table.transaction() as change:
            change.set_properties(dict([self.draws.choice(PROPERTIES)]))
        return True


ACTS: dict[str, Callable[[Hand], bool]] = {
    "append": Hand.append,
    "delete": Hand.delete,
    "put back": Hand.put_back,
    "compact": Hand.compact,
    "update": Hand.update,
    "expire": Hand.expire,
    "add a column": Hand.add_column,
    "change properties": Hand.change_properties,
}


def replaced(rows: pa.Table, name: str, values: list[object]) -> pa.Table:
    """The rows with other values in one column."""
    index = rows.schema.get_field_index(name)
    return rows.set_column(index, rows.schema.field(index), pa.array(values, rows.schema.field(index).type))


def fitted(rows: pa.Table, table: Table) -> pa.Table:
    """Rows that were read under an earlier schema, with nulls in the columns that came since."""
    wanted = table.schema().as_arrow()
    missing = [field for field in wanted if field.name not in rows.column_names]
    for field in missing:
        rows = rows.append_column(field, pa.nulls(rows.num_rows, field.type))
    return rows


def rows_of_files(table: Table, tasks: list[FileScanTask]) -> pa.Table:
    """All rows of some files of the current snapshot."""
    scan = ArrowScan(table.metadata, table.io, table.schema(), AlwaysTrue(), case_sensitive=True)
    return scan.to_table(tasks)


def rewrite(table: Table, tasks: list[FileScanTask], rows: pa.Table) -> None:
    """Replaces files by rows, in one snapshot."""
    with table.transaction() as change, change.update_snapshot().overwrite() as files:
        for task in tasks:
            files.delete_data_file(task.file)
        for file in _dataframe_to_data_files(change.table_metadata, rows, table.io):
            files.append_data_file(file)
