"""The 20 TB case in small: a state larger than memory, real Kafka, a hard limit on the process.

A table of many keys is written by pyiceberg. `tidemill state adopt-rows` makes the dedup state of it, then `tidemill run`
takes events from a real broker, some of which repeat rows all over the table, under a hard limit of memory that counts
the page cache. DuckDB reads the result. The same events go into an empty table under the same limit, for comparison, and
a plain in-memory set gets as many keys as it bears.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests"), str(HERE.parents[1] / "tests" / "acceptance")]

import events  # noqa: E402
from job import Job, binary  # noqa: E402
from limit import Measured, measured  # noqa: E402
from services import Broker  # noqa: E402

PARTITIONS = 4
TABLE = "events.notifications"
SAID_MAX = 3000


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def good(what: str, run: Measured) -> Measured:
    """Fails with what was printed unless the command ended well."""
    if run.exit_code != 0:
        raise SystemExit(f"{what} ended with {run.exit_code}: {run.events[-1:]}\n{run.stderr[-SAID_MAX:]}")
    return run


def job_of(folder: Path, name: str, bootstrap: str, topic: str, memory: str) -> Job:
    """A job on the topic with a table and a state of its own."""
    return Job(
        folder=folder / name, topics=[topic], kafka={"bootstrap.servers": bootstrap}, name=name, memory=memory,
        columns=events.COLUMNS, table=TABLE, decode={"arrays": "dead_letter"},
    )  # fmt: skip


def drained(job: Job, stream: events.Stream, limit_bytes: int, with_table: bool) -> dict[str, Any]:
    """A drain under the limit, checked by DuckDB, as figures."""
    run = good("run", measured([str(binary()), "run", str(job.path), "--json"], limit_bytes))
    summary = run.events[-1]
    say(f"run: {run.seconds:.1f} s, {summary['counts']}")
    table = job.open_catalog().load_table(TABLE)
    files = [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]
    found = events.check(files, stream, with_table)
    state_bytes = summary.get("state_bytes", 0)
    return {
        **run.figures(), "events_per_second": round(stream.events / run.seconds),
        "cpu_seconds_per_million_events": round(run.cpu_seconds / stream.events * 1e6, 3),
        "batches": summary["batches"], "counts": summary["counts"], "state_bytes": state_bytes, "checked": found,
    }  # fmt: skip


def plain_set(keys: int, limit: str) -> dict[str, Any] | None:
    """At which key a set in memory ends under the limit."""
    printed = subprocess.run(
        [HERE.parent / "run", "set", "--keys", str(keys), "--memory", limit.replace(" ", ""), "--json"], check=True, capture_output=True
    )
    return json.loads(printed.stdout.splitlines()[-1])


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = argparse.ArgumentParser(prog="benches/run oom", description=__doc__)
    parser.add_argument("--keys", type=float, default=1e8, help="rows of the table before the run")
    parser.add_argument("--events", type=float, default=1e7, help="events of the run")
    parser.add_argument("--memory", default="256 MiB", help="the job's memory and the hard limit of the process")
    parser.add_argument("--compression", default="lz4", help="of the topic")
    parser.add_argument("--folder", help="where table, state and broker lie; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the result is always JSON")
    asked = parser.parse_args()
    amount, unit = asked.memory.split()
    limit_bytes = int(amount) << {"MiB": 20, "GiB": 30}[unit]
    begin_ms = (int(time.time() * 1000) // events.DAY_MS - 6) * events.DAY_MS
    stream = events.Stream(events=int(asked.events), table_keys=int(asked.keys), begin_ms=begin_ms)
    result: dict[str, Any] = {
        "figure": "oom", "table_keys": stream.table_keys, "events": stream.events, "memory": asked.memory,
        "topic": {"partitions": PARTITIONS, "compression": asked.compression},
        "far_repeats": stream.far_percent / 100, "near_repeats": stream.near_percent / 100,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        with Broker(folder / "kafka") as broker:
            broker.create_topic("events", PARTITIONS)
            begun = time.monotonic()
            events.send(broker.bootstrap, "events", PARTITIONS, stream, asked.compression)
            sent = events.records_in(broker.bootstrap, "events", PARTITIONS)
            say(f"topic: {sent} events after {time.monotonic() - begun:.0f} s")
            empty = job_of(folder, "empty", broker.bootstrap, "events", asked.memory)
            result["on_empty_state"] = drained(empty, stream, limit_bytes, with_table=False)
            full = job_of(folder, "full", broker.bootstrap, "events", asked.memory)
            begun = time.monotonic()
            events.fill_table(full.open_catalog(), TABLE, stream)
            say(f"table: {stream.table_keys} rows of another tool after {time.monotonic() - begun:.0f} s")
            adopt = good(
                "adopt-rows",
                measured([str(binary()), "state", "adopt-rows", str(full.path), "--yes", "--json"], limit_bytes),
            )
            say(f"adopt-rows: {adopt.seconds:.1f} s")
            result["adopt_rows"] = {**adopt.figures(), "keys_per_second": round(stream.table_keys / adopt.seconds)}
            result["on_full_state"] = drained(full, stream, limit_bytes, with_table=True)
    rates = [result[name]["events_per_second"] for name in ("on_full_state", "on_empty_state")]
    result["full_against_empty"] = round(rates[0] / rates[1], 3)
    result["plain_set"] = plain_set(stream.table_keys, asked.memory)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
