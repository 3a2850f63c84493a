"""A job as a test writes it, the program that runs it, and what came of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.catalog.rest import RestCatalog as PyicebergRestCatalog
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import NoSuchTableError

from readers import DuckdbReader, PyicebergReader
from services.kafka import READER_PASSWORD
from truth import LogTruth

RUN_S_MAX = 600


def binary() -> Path:
    """The program under test; `tests/run` names it."""
    named = os.environ.get("TIDEMILL_BIN")
    target = os.environ.get("CARGO_TARGET_DIR") or Path.home() / ".cache/tidemill/target"
    path = Path(named) if named else Path(target) / "release" / "tidemill"
    assert path.exists(), f"{path} does not exist; run tests/run, or cargo build --release"
    return path


@dataclass(frozen=True)
class Outcome:
    """What a finished command left: its exit code and what it printed."""

    command: list[str]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON objects of `--json`, in order."""
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    def of(self, event: str) -> list[dict[str, Any]]:
        """The objects of one kind."""
        return [line for line in self.events if line.get("event") == event]

    @property
    def last(self) -> dict[str, Any]:
        """The last object."""
        return self.events[-1]

    def expect(self, exit_code: int) -> Outcome:
        """Fails with everything that was printed unless the exit code is this one."""
        assert self.exit_code == exit_code, (
            f"{' '.join(self.command)} ended with {self.exit_code}, not {exit_code}\n"
            f"--- stdout\n{self.stdout[-6000:]}\n--- stderr\n{self.stderr[-6000:]}"
        )
        return self

    def expect_stop(self, exit_code: int, reason: str) -> dict[str, Any]:
        """The stop object; it must carry this reason and code, say what happened and how to go on."""
        self.expect(exit_code)
        stop = self.last
        assert (stop.get("event"), stop.get("reason"), stop.get("exit_code")) == ("stop", reason, exit_code), stop
        assert stop["what"].strip() and stop["way_out"].strip(), stop
        return stop


def tidemill(*words: str | Path, environment: dict[str, str] | None = None, timeout_s: float = RUN_S_MAX) -> Outcome:
    """Runs a command to its end."""
    command = [str(binary()), *map(str, words)]
    child = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=_environment(environment),
        stdin=subprocess.DEVNULL,
    )
    return Outcome(command, child.returncode, child.stdout, child.stderr)


class Running:
    """A command that runs beside the test. What it prints goes to a file, so it never waits for a reader."""

    def __init__(self, words: tuple[str | Path, ...], environment: dict[str, str] | None) -> None:
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self._child = subprocess.Popen(
            [str(binary()), *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=self._printed, stderr=subprocess.STDOUT, env=_environment(environment),
        )  # fmt: skip

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._child.poll()

    def wait(self, timeout_s: float = RUN_S_MAX) -> int:
        """The exit code."""
        return self._child.wait(timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal."""
        self._child.send_signal(number)

    def is_stopped(self) -> bool:
        """Whether SIGSTOP holds it."""
        return Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def kill(self) -> None:
        """`kill -9`, and waits until it is gone."""
        self._child.kill()
        self._child.wait()

    def output(self) -> str:
        """What it printed, on both streams."""
        self._printed.seek(0)
        return self._printed.read()


@contextmanager
def started(*words: str | Path, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """Starts a command; it is killed at the end if it still runs."""
    running = Running(words, environment)
    try:
        yield running
    finally:
        if running.poll() is None:
            running.kill()


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "KAFKA_PASSWORD": READER_PASSWORD, "NO_COLOR": "1", **(more or {})}


# The columns of generated events, and of those of `events.py`.
COLUMNS = """
event_id = { type = "string", required = true }
event_type = { type = "string", required = true }
event_time = { type = "timestamptz", path = "$.ts", unit = "ms", required = true }
notification_id = { type = "string" }
user_id = { type = "long" }
campaign = { type = "string" }
channel = { type = "string" }
provider = { type = "string", path = "$.delivery.provider" }
region = { type = "string", path = "$.delivery.region" }
attempt = { type = "int", path = "$.delivery.attempt" }
price = { type = "decimal(9, 2)" }
locale = { type = "string" }
trace_id = { type = "string", from = "header:traceparent" }
"""


@dataclass
class Job:
    """A job file in a folder of its own, with everything that it writes beside it."""

    folder: Path
    topics: list[str]
    kafka: dict[str, str]
    name: str = "notifications"
    start: str = "earliest"
    window: str = "7 days"
    memory: str = "512 MiB"
    columns: str = COLUMNS
    table: str = "events.notifications"
    catalog: dict[str, str] = field(default_factory=dict)
    microbatch: dict[str, str | int] = field(default_factory=dict)
    partition_by: list[str] = field(default_factory=lambda: ["day(event_time)"])
    max_ratio: float = 0.05
    # most tests read the whole history of a table; maintenance runs, and lets no snapshot go
    maintenance: dict[str, str | int] = field(default_factory=lambda: {"max_snapshots": 1_000_000})
    table_properties: dict[str, str] = field(default_factory=dict)
    decode: dict[str, str] = field(default_factory=dict)
    dedup: dict[str, str | int] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    state_dir: Path | None = None
    s3: dict[str, str] | None = None
    file_name: str = "job.toml"

    def __post_init__(self) -> None:
        if not self.catalog:
            self.catalog = {
                "type": "sql",
                "uri": f"sqlite:{self.folder}/catalog.db",
                "warehouse": f"file://{self.folder}/warehouse",
            }
        self.write()

    @property
    def path(self) -> Path:
        """The job file."""
        return self.folder / self.file_name

    @property
    def warehouse(self) -> Path:
        """The folder of a local warehouse."""
        return Path(self.catalog["warehouse"].removeprefix("file://"))

    def write(self) -> Job:
        """Writes the job file as the fields now say."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            "version = 1",
            f"name = {_toml(self.name)}",
            f"memory = {_toml(self.memory)}",
            f"state_dir = {_toml(self.state_dir or self.folder / 'state')}",
            "[source.kafka]",
            f"topics = {json.dumps(self.topics)}",
            f"start = {_toml(self.start)}",
            *_members(self.source),
            "[source.kafka.properties]",
            *_members(self.kafka),
            "[decode]",
            'format = "json"',
            *_members({"arrays": "split", **self.decode}),
            "[decode.columns]",
            self.columns.strip(),
            "[event_time]",
            'column = "event_time"',
            "[dedup]",
            'key = ["event_id"]',
            f"window = {_toml(self.window)}",
            *_members(self.dedup),
            "[microbatch]",
            *_members(self.microbatch),
            "[sink.iceberg]",
            f"table = {_toml(self.table)}",
            f"partition_by = {json.dumps(self.partition_by)}",
            "catalog = { " + ", ".join(_members(self.catalog)) + " }",
            f"dead_letters = {{ max_ratio = {self.max_ratio} }}",
            "maintenance = { " + ", ".join(_members(self.maintenance)) + " }",
            "table_properties = { " + ", ".join(_members(self.table_properties)) + " }",
        ]
        self.path.write_text("\n".join(lines) + "\n")
        return self

    def run(self, *words: str, environment: dict[str, str] | None = None, timeout_s: float = RUN_S_MAX) -> Outcome:
        """One drain."""
        return tidemill("run", self.path, "--json", *words, environment=environment, timeout_s=timeout_s)

    def follow(self, stop: dict[str, Any]) -> Outcome:
        """Runs the command that a stop names, as the user would type it."""
        return tidemill(*named_command(stop, self.path))

    def open_catalog(self) -> Catalog:
        """The job's catalog, through pyiceberg."""
        kind, uri, warehouse = (self.catalog[name] for name in ("type", "uri", "warehouse"))
        if kind == "rest":
            return PyicebergRestCatalog("test", uri=uri, warehouse=warehouse, **(self.s3 or {}))
        path = uri.removeprefix("sqlite:")
        return SqlCatalog("tidemill", uri=f"sqlite:///{path}", warehouse=warehouse)

    def reader(self) -> PyicebergReader:
        """The main table through the catalog and pyiceberg."""
        return PyicebergReader(self.open_catalog().load_table(self.table))

    def letters(self) -> list[dict[str, Any]]:
        """The rows of the dead-letter table; none if the table is not there."""
        try:
            table = self.open_catalog().load_table(f"{self.table}_dead_letters")
        except NoSuchTableError:
            return []
        return table.scan().to_arrow().to_pylist()

    def duckdb(self, metadata_location: str | None = None) -> DuckdbReader:
        """The main table through DuckDB."""
        return DuckdbReader(metadata_location or self.reader().table.metadata_location, self.s3)

    def check_against(self, truth: LogTruth) -> None:
        """Both readers see exactly the truth: every event once, none more, by type, and each refused place once."""
        ours = self.reader()
        ours.check_metadata_columns()
        ids = ours.ids()
        assert len(ids) == len(truth.events), f"pyiceberg counts {len(ids)} rows, the truth is {len(truth.events)}"
        assert set(ids) == truth.events.keys(), "pyiceberg sees other events than the topics hold"
        assert ours.by_type() == truth.by_type
        theirs = self.duckdb(ours.table.metadata_location)
        assert theirs.count() == len(truth.events)
        assert theirs.distinct() == len(truth.events)
        assert theirs.by_type() == truth.by_type
        assert theirs.differences(set(truth.events)) == (0, 0), "(missing, extra) as DuckDB sees them"
        self.check_letters(truth)

    def check_letters(self, truth: LogTruth) -> None:
        """Each refused place of the topics stands once in the dead-letter table, and no other."""
        places = sorted((row["topic"], row["partition"], row["offset"], row["index"]) for row in self.letters())
        assert places == sorted(tuple(place) for place in truth.letters), "the dead letters are not the refused rows"


# `tidemill COMMAND... JOB --option value`, as it stands in a sentence or on a line of its own
COMMAND = re.compile(r"\btidemill ((?:[a-z-]+ )+(?:JOB|\S+\.toml)(?: --[a-z-]+(?:[ =][^\s;,)`]+)?)*)")
ASKING = (
    "accept-loss", "rebase-offsets", "side reread", "state discard", "state adopt", "state rekey", "state forget",
    "watermark set",
)  # fmt: skip


def named_command(stop: dict[str, Any], job_path: Path) -> list[str]:
    """The words after `tidemill` of the first command that a stop names. A question is answered with yes."""
    found = COMMAND.search(stop["way_out"])
    assert found, f"the way out of {stop['reason']} names no command on the job: {stop['way_out']}"
    words = [str(job_path) if word == "JOB" else word for word in found.group(1).split()]
    asks = found.group(1).startswith(ASKING) and "--yes" not in words
    return [*words, "--yes"] if asks else words


def _members(values: dict[str, Any]) -> list[str]:
    return [f'"{name}" = {_toml(value)}' for name, value in values.items()]


def _toml(value: Any) -> str:
    return str(value) if isinstance(value, (int, float)) else json.dumps(str(value), ensure_ascii=False)
