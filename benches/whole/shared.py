"""What the benches of the whole program share: their options, the job, a run of it, and what DuckDB says of its rows."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests"), str(HERE.parents[1] / "tests" / "acceptance")]

import events  # noqa: E402
from job import Job, binary  # noqa: E402
from limit import Measured, measured  # noqa: E402
from services import Broker, Fault, Proxy, RestCatalog  # noqa: E402

PARTITIONS = 4
TOPIC = "events"
TABLE = "events.notifications"
SAID_MAX = 3000
# days of the window before today in which events of a stream begin
DAYS_BACK = 6


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def good(what: str, run: Measured) -> Measured:
    """Fails with what was printed unless the command ended well."""
    if run.exit_code != 0:
        raise SystemExit(f"{what} ended with {run.exit_code}: {run.events[-1:]}\n{run.stderr[-SAID_MAX:]}")
    return run


def options(
    name: str, about: str | None, events_default: float | None, memory_default: str | None
) -> argparse.ArgumentParser:
    """The options that all have; `None` = this one has no such option."""
    parser = argparse.ArgumentParser(prog=f"benches/run {name}", description=about)
    if events_default is not None:
        parser.add_argument("--events", type=float, default=events_default, help="events in the topic")
    if memory_default is not None:
        parser.add_argument(
            "--memory", default=memory_default, help="the job's memory and the hard limit of the process"
        )
    parser.add_argument("--compression", default="lz4", help="of the topic")
    parser.add_argument("--folder", help="where tables, states and broker lie; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the result is always JSON")
    return parser


def bytes_of(size: str) -> int:
    """Bytes of a size in words, such as `256 MiB` or `1GiB`."""
    found = re.fullmatch(r"(\d+) ?(MiB|GiB)", size.strip())
    if not found:
        raise SystemExit(f"{size!r} is not a size such as 256MiB or 1GiB")
    return int(found[1]) << {"MiB": 20, "GiB": 30}[found[2]]


def days_ago(days: int = DAYS_BACK) -> int:
    """Midnight before so many days, in milliseconds."""
    return (int(time.time() * 1000) // events.DAY_MS - days) * events.DAY_MS


@contextmanager
def broker_in(folder: str | None) -> Iterator[tuple[Path, Broker]]:
    """A working folder and a broker in it; both are gone at the end."""
    with tempfile.TemporaryDirectory(dir=folder) as name, Broker(Path(name) / "kafka") as broker:
        yield Path(name), broker


@contextmanager
def slow_catalog(folder: Path, commit_seconds: float) -> Iterator[dict[str, str]]:
    """A REST catalog whose commits take so long, as a job names it."""
    with RestCatalog(folder) as catalog, Proxy(catalog.port, "http") as proxy:
        proxy.inject(Fault("delay", r"POST .*/tables/", times=None, delay_s=commit_seconds))
        yield {"type": "rest", "uri": f"http://127.0.0.1:{proxy.port}", "warehouse": catalog.warehouse}


def fill_topic(
    broker: Broker,
    topic: str,
    partitions: int,
    stream: events.Stream,
    compression: str,
    linger_ms: int = events.LINGER_MS,
) -> int:
    """Makes a topic and sends the stream; the bytes of its payloads."""
    broker.create_topic(topic, partitions)
    begun = time.monotonic()
    payload_bytes = events.send(broker.bootstrap, topic, partitions, stream, compression, linger_ms)
    sent = events.records_in(broker.bootstrap, topic, partitions)
    say(f"topic {topic}: {sent} events, {payload_bytes} bytes after {time.monotonic() - begun:.0f} s")
    return payload_bytes


@contextmanager
def topic_of(stream: events.Stream, asked: argparse.Namespace) -> Iterator[tuple[Path, Broker, int]]:
    """A working folder, a broker that has the stream in its only topic, and the bytes of its payloads."""
    with broker_in(asked.folder) as (folder, broker):
        yield folder, broker, fill_topic(broker, TOPIC, PARTITIONS, stream, asked.compression)


def figure_of(name: str, stream: events.Stream, asked: argparse.Namespace) -> dict[str, Any]:
    """How the result of a bench on [`topic_of`] begins."""
    return {
        "figure": name, "events": stream.events, "memory": asked.memory,
        "far_repeats": stream.far_percent / 100, "near_repeats": stream.near_percent / 100,
        "topic": {"partitions": PARTITIONS, "compression": asked.compression},
    }  # fmt: skip


def job_of(folder: Path, name: str, bootstrap: str, memory: str, topic: str = TOPIC, **more: Any) -> Job:
    """A job on the topic with a table and a state of its own."""
    decode = {"arrays": "dead_letter", **more.pop("decode", {})}
    return Job(
        folder=folder / name, topics=[topic], kafka={"bootstrap.servers": bootstrap}, name=name, memory=memory,
        columns=events.COLUMNS, table=TABLE, decode=decode, **more,
    )  # fmt: skip


def run_of(
    job: Job,
    memory: str,
    *words: str,
    program: Path | None = None,
    beside: Callable[[Callable[[], float]], None] | None = None,
) -> Measured:
    """One drain of the job by a program, by default the one under test, under a hard limit."""
    command = [str(program or binary()), "run", str(job.path), "--json", *words]
    return measured(command, bytes_of(memory), beside)


def files_of(job: Job) -> list[str]:
    """The table's data files."""
    table = job.open_catalog().load_table(TABLE)
    return [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]


def rates(run: Measured, stream: events.Stream) -> dict[str, Any]:
    """What a run of a whole stream cost."""
    return {
        **run.figures(), "events_per_second": round(stream.events / run.seconds),
        "cpu_seconds_per_million_events": round(run.cpu_seconds / stream.events * 1e6, 3),
    }  # fmt: skip


def drained(job: Job, run: Measured, stream: events.Stream, with_table: bool = False) -> dict[str, Any]:
    """What a run that ended well cost, and what DuckDB says of all rows."""
    summary, files = event_of(run, "done"), files_of(job)
    return {
        **rates(run, stream), "batches": summary["batches"], "files": len(files),
        "checked": events.check(files, stream, with_table),
    }  # fmt: skip


def event_of(run: Measured, name: str) -> dict[str, Any]:
    """The last line of this kind that a run printed; empty if there is none."""
    return next((line for line in reversed(run.events) if line["event"] == name), {})
