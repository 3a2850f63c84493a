"""Kafka to committed Iceberg rows, beside a bare librdkafka drain of the same topic.

Drain and run take turns on the same broker, so that a shared machine slows both. Processor time of the broker is counted
beside that of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests"), str(HERE.parents[1] / "tests" / "acceptance")]

import events  # noqa: E402
from job import binary  # noqa: E402
from limit import measured  # noqa: E402
from oom import PARTITIONS, TABLE, good, job_of, say  # noqa: E402
from services import Broker  # noqa: E402


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a living process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = argparse.ArgumentParser(prog="benches/run end_to_end", description=__doc__)
    parser.add_argument("--events", type=float, default=1e7, help="events in the topic")
    parser.add_argument("--memory", default="256 MiB", help="the job's memory and the hard limit of the process")
    parser.add_argument("--compression", default="lz4", help="of the topic")
    parser.add_argument("--rounds", type=int, default=3, help="turns of drain and run")
    parser.add_argument("--drain", required=True, help="the program that only drains; benches/run builds it")
    parser.add_argument("--folder", help="where tables, states and broker lie; by default a temporary folder")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry: the result is always JSON")
    asked = parser.parse_args()
    amount, unit = asked.memory.split()
    limit_bytes = int(amount) << {"MiB": 20, "GiB": 30}[unit]
    begin_ms = (int(time.time() * 1000) // events.DAY_MS - 6) * events.DAY_MS
    # no table before: the share of far repeats repeats events of the topic
    stream = events.Stream(int(asked.events), table_keys=0, begin_ms=begin_ms, far_percent=0, near_percent=6)
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        with Broker(folder / "kafka") as broker:
            broker.create_topic("events", PARTITIONS)
            events.send(broker.bootstrap, "events", PARTITIONS, stream, asked.compression)
            say(f"topic: {events.records_in(broker.bootstrap, 'events', PARTITIONS)} events")
            for number in range(asked.rounds):
                before = cpu_seconds_of(broker.pid)
                drain = good("drain", measured([asked.drain, broker.bootstrap, "events"]))
                between = cpu_seconds_of(broker.pid)
                job = job_of(folder, f"round{number}", broker.bootstrap, "events", asked.memory)
                run = good("run", measured([str(binary()), "run", str(job.path), "--json"], limit_bytes))
                after = cpu_seconds_of(broker.pid)
                table = job.open_catalog().load_table(TABLE)
                files = [task.file.file_path.removeprefix("file://") for task in table.scan().plan_files()]
                million = stream.events / 1e6
                rounds.append(
                    {
                        "drain_events_per_second": round(stream.events / drain.seconds),
                        "drain_cpu_seconds_per_million": round((drain.cpu_seconds + between - before) / million, 3),
                        "run_events_per_second": round(stream.events / run.seconds),
                        "run_cpu_seconds_per_million": round(run.cpu_seconds / million, 3),
                        "run_cpu_seconds_per_million_with_broker": round(
                            (run.cpu_seconds + after - between) / million, 3
                        ),
                        "share_of_drain": round(drain.seconds / run.seconds, 3),
                        "batches": run.events[-1]["batches"],
                        "files": len(files),
                        **run.figures(),
                        "checked": events.check(files, stream, with_table=False),
                    }
                )
                say(f"round {number + 1}: {rounds[-1]}")
    result = {
        "figure": "end_to_end", "events": stream.events, "memory": asked.memory, "near_repeats": 0.06,
        "topic": {"partitions": PARTITIONS, "compression": asked.compression},
        "share_of_drain_median": statistics.median(one["share_of_drain"] for one in rounds), "rounds": rounds,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
