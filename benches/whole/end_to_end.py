"""Kafka to committed Iceberg rows, beside a bare librdkafka drain of the same topic, and the time to the first rows.

Drain and run take turns on the same broker, so that a shared machine slows both. Processor time of the broker is counted
beside that of each. Rows are visible when pyiceberg, which loads the table again and again from outside, sees a snapshot with
rows: in each round with the batches that the job makes by itself, and once more with a first batch that closes early.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchTableError

import events
from limit import measured
from shared import TABLE, TOPIC, Job, days_ago, drained, figure_of, good, job_of, options, run_of, say, topic_of

# between two looks at the table from outside, until it has rows: each costs a processor some milliseconds
VISIBLE_EVERY_SECONDS = 0.05
# of the first batch, where it is asked for early rows
EARLY = ("--set", "microbatch.max_records=200000", "--max-batches", "1")


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a living process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def has_rows(catalog: Catalog) -> bool:
    """Whether a reader sees a row of the table."""
    try:
        snapshot = catalog.load_table(TABLE).current_snapshot()
    except NoSuchTableError:
        return False
    return bool(snapshot and snapshot.summary and int(snapshot.summary.additional_properties.get("total-records", 0)))


class FirstRows:
    """When rows were first seen, in seconds of the clock that the looks are given."""

    def __init__(self, job: Job) -> None:
        self.seconds: float | None = None
        self._next = 0.0
        # opened before the run: what is opened first makes the catalog's own tables
        self._catalog = job.open_catalog()

    def look(self, clock: Callable[[], float]) -> None:
        """One look, if it is time for one."""
        if self.seconds is None and clock() >= self._next:
            if has_rows(self._catalog):
                self.seconds = round(clock(), 2)
            self._next = clock() + VISIBLE_EVERY_SECONDS


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = options("end_to_end", __doc__, 1e7, "256 MiB")
    parser.add_argument("--rounds", type=int, default=3, help="turns of drain and run")
    parser.add_argument("--drain", required=True, help="the program that only drains; benches/run builds it")
    asked = parser.parse_args()
    # no table before: the share of far repeats repeats events of the topic
    stream = events.Stream(int(asked.events), table_keys=0, begin_ms=days_ago(), far_percent=0, near_percent=6)
    rounds: list[dict[str, Any]] = []
    with topic_of(stream, asked) as (folder, broker, _):
        for number in range(asked.rounds):
            before = cpu_seconds_of(broker.pid)
            drain = good("drain", measured([asked.drain, broker.bootstrap, TOPIC]))
            between = cpu_seconds_of(broker.pid)
            job = job_of(folder, f"round{number}", broker.bootstrap, asked.memory)
            first = FirstRows(job)
            run = good("run", run_of(job, asked.memory, beside=first.look))
            after = cpu_seconds_of(broker.pid)
            million = stream.events / 1e6
            rounds.append(
                {
                    "drain_events_per_second": round(stream.events / drain.seconds),
                    "drain_cpu_seconds_per_million": round((drain.cpu_seconds + between - before) / million, 3),
                    **drained(job, run, stream),
                    "run_cpu_seconds_per_million_with_broker": round((run.cpu_seconds + after - between) / million, 3),
                    "share_of_drain": round(drain.seconds / run.seconds, 3),
                    "first_rows_seconds": first.seconds,
                }
            )
            say(f"round {number + 1}: {rounds[-1]}")
        early: list[float | None] = []
        for number in range(asked.rounds):
            job = job_of(folder, f"early{number}", broker.bootstrap, asked.memory)
            first = FirstRows(job)
            good("run", run_of(job, asked.memory, *EARLY, beside=first.look))
            early.append(first.seconds)
    result = {
        **figure_of("end_to_end", stream, asked),
        "share_of_drain_median": statistics.median(one["share_of_drain"] for one in rounds),
        "first_rows_seconds": {"as_the_job_stands": [one["first_rows_seconds"] for one in rounds], " ".join(EARLY): early},
        "rounds": rounds,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
