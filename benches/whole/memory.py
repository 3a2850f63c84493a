"""Peaks of memory: never above the job's number, and alive under a hard limit of the same size that counts the page cache.

Each load is a topic of its own that is read once for each number. DuckDB compares the rows with what was sent. Where commits
take long, the table's catalog is a REST server behind a proxy that holds each of them back.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import events
from limit import NO_LIMIT
from shared import (
    PARTITIONS,
    TABLE,
    Job,
    broker_in,
    bytes_of,
    days_ago,
    drained,
    fill_topic,
    job_of,
    options,
    rates,
    run_of,
    say,
    slow_catalog,
)

MEMORY = "256MiB,1GiB"
# a commit that takes long, of a load that asks for it
COMMIT_SECONDS = 10


@dataclass(frozen=True)
class Load:
    """A topic that is hard on memory in its own way, and what its job needs beside the defaults."""

    stream: events.Stream
    partitions: int = PARTITIONS
    compression: str = "lz4"
    linger_ms: int = events.LINGER_MS
    has_slow_commits: bool = False
    job: dict[str, Any] = field(default_factory=dict)


def loads(share: float) -> dict[str, Load]:
    """All loads, with such a share of their events."""

    def stream(count: float, begin_ms: int, **more: Any) -> events.Stream:
        repeats = {"far_percent": 0, "near_percent": 6}
        return events.Stream(max(int(count * share), 1000), 0, begin_ms, **(repeats | more))

    begin_ms, large = days_ago(), {"job": {"decode": {"max_record": "6 MiB"}}}
    # 16,000 of one letter beside 300 bytes of which the ids are noise: compressed about two hundredfold
    letters = {"large_every": 1, "large_bytes": 16_000, "large_is_noise": False}
    days = stream(1e6, days_ago(401), open_days=400)
    return {
        "ordinary": Load(stream(1e7, begin_ms)),
        "partitions": Load(stream(2e6, begin_ms), partitions=1000),
        "large": Load(stream(2e5, begin_ms, large_every=500, large_bytes=5_000_000), **large),
        "zstd": Load(stream(1e5, begin_ms, **letters), compression="zstd"),
        "gzip": Load(stream(1e5, begin_ms, **letters), compression="gzip"),
        # record batches that are full, of more topic partitions than memory has room for one of each
        "zstd_partitions": Load(
            stream(2e5, begin_ms, **letters), partitions=256, compression="zstd", linger_ms=2000, has_slow_commits=True
        ),
        # as many looked up together as memory holds, of which few are new
        "repeats": Load(
            stream(1e7, begin_ms, far_percent=80, near_percent=0), job={"dedup": {"max_probe_records": 10_000_000}}
        ),
        "days": Load(days, job={"window": "410 days"}),
    }


def log_bytes(broker_folder: Path, topic: str) -> int:
    """Bytes of a topic on the broker's disk."""
    return sum(path.stat().st_size for path in broker_folder.glob(f"data/{topic}-*/*.log"))


def row_of(folder: Path, bootstrap: str, name: str, load: Load, memory: str) -> dict[str, Any]:
    """One run under one number. A run that fails is a row too."""
    most = bytes_of(memory)
    its_catalog = slow_catalog(folder / "catalog", COMMIT_SECONDS) if load.has_slow_commits else nullcontext({})
    with its_catalog as catalog:
        job = job_of(folder, name, bootstrap, f"{most >> 20} MiB", topic=name, catalog=catalog, **load.job)
        row = run_and_check(job, name, load, memory)
    # the disk is for one load at a time
    shutil.rmtree(job.folder)
    shutil.rmtree(folder / "catalog", ignore_errors=True)
    return row


def run_and_check(job: Job, name: str, load: Load, memory: str) -> dict[str, Any]:
    """What came of it."""
    most, run = bytes_of(memory), run_of(job, memory)
    row = {"load": name, "memory": memory, "exit_code": run.exit_code, **rates(run, load.stream)}
    # a run that nothing limits shows half of it
    row["within"] = run.limit != NO_LIMIT and run.peak_rss_bytes <= most
    if run.exit_code == 0:
        row |= drained(job, run, load.stream)
    else:
        row |= {"last_line": run.events[-1:], "stderr": run.stderr[-1000:]}
    say(f"{name} in {memory}: {row}")
    return row


def main() -> None:
    """Runs everything and prints one JSON object. The exit code is 1 if a peak or an exit code is not as promised."""
    parser = options("memory", __doc__, None, None)
    parser.add_argument("--memory", default=MEMORY, help="numbers to run each load under, with commas between")
    parser.add_argument("--load", default=",".join(loads(1)), help="loads to run, with commas between")
    parser.add_argument("--share", type=float, default=1, help="of the events of each load; for a try")
    asked = parser.parse_args()
    known, rows = loads(asked.share), []
    with broker_in(asked.folder) as (folder, broker):
        for name in asked.load.split(","):
            load = known[name]
            payload_bytes = fill_topic(broker, name, load.partitions, load.stream, load.compression, load.linger_ms)
            topic = {
                "events": load.stream.events, "topic_partitions": load.partitions, "compression": load.compression,
                "log_bytes": log_bytes(broker.folder, name), "payload_bytes": payload_bytes,
            }  # fmt: skip
            topic["compressed_to_one"] = round(payload_bytes / topic["log_bytes"], 1)
            for memory in asked.memory.split(","):
                rows.append(row_of(folder, broker.bootstrap, name, load, memory) | {"topic": topic})
            broker.delete_topic(name)
    are_good = all(row["exit_code"] == 0 and row["within"] for row in rows)
    print(json.dumps({"figure": "memory", "table": TABLE, "all_within": are_good, "rows": rows}))
    sys.exit(not are_good)


if __name__ == "__main__":
    main()
