"""The 20 TB case in small: a state larger than memory, real Kafka, a hard limit on the process.

A table of many keys is written by pyiceberg. `tidemill state adopt-rows` makes the dedup state of it, then `tidemill run`
takes events from a real broker, some of which repeat rows all over the table, under a hard limit of memory that counts
the page cache. DuckDB reads the result. The same events go into an empty table under the same limit, for comparison, and
a plain in-memory set gets as many keys as it bears.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import events
from limit import measured
from shared import (
    TABLE,
    Job,
    binary,
    bytes_of,
    days_ago,
    drained,
    event_of,
    figure_of,
    good,
    job_of,
    options,
    run_of,
    say,
    topic_of,
)  # fmt: skip

HERE = Path(__file__).resolve().parent


def run_on(job: Job, stream: events.Stream, with_table: bool) -> dict[str, Any]:
    """A drain under the limit, checked by DuckDB, as figures."""
    run = good("run", run_of(job, job.memory))
    summary = event_of(run, "done")
    say(f"run: {run.seconds:.1f} s, {summary['counts']}")
    figures = drained(job, run, stream, with_table)
    return figures | {"counts": summary["counts"], "state_bytes": summary.get("state_bytes", 0)}


def plain_set(keys: int, limit: str) -> dict[str, Any] | None:
    """At which key a set in memory ends under the limit."""
    printed = subprocess.run(
        [HERE.parent / "run", "set", "--keys", str(keys), "--memory", limit.replace(" ", ""), "--json"],
        check=True,
        capture_output=True,
    )
    return json.loads(printed.stdout.splitlines()[-1])


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = options("oom", __doc__, 1e7, "256 MiB")
    parser.add_argument("--keys", type=float, default=1e8, help="rows of the table before the run")
    asked = parser.parse_args()
    stream = events.Stream(events=int(asked.events), table_keys=int(asked.keys), begin_ms=days_ago())
    result = {**figure_of("oom", stream, asked), "table_keys": stream.table_keys}
    with topic_of(stream, asked) as (folder, broker, _):
        empty = job_of(folder, "empty", broker.bootstrap, asked.memory)
        result["on_empty_state"] = run_on(empty, stream, with_table=False)
        full = job_of(folder, "full", broker.bootstrap, asked.memory)
        begun = time.monotonic()
        events.fill_table(full.open_catalog(), TABLE, stream)
        say(f"table: {stream.table_keys} rows of another tool after {time.monotonic() - begun:.0f} s")
        adopt = good(
            "adopt-rows",
            measured([str(binary()), "state", "adopt-rows", str(full.path), "--yes", "--json"], bytes_of(asked.memory)),
        )
        say(f"adopt-rows: {adopt.seconds:.1f} s")
        result["adopt_rows"] = {**adopt.figures(), "keys_per_second": round(stream.table_keys / adopt.seconds)}
        result["on_full_state"] = run_on(full, stream, with_table=True)
    per_second = [result[name]["events_per_second"] for name in ("on_full_state", "on_empty_state")]
    result["full_against_empty"] = round(per_second[0] / per_second[1], 3)
    result["plain_set"] = plain_set(stream.table_keys, asked.memory)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
