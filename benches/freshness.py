#!/usr/bin/env python3
"""How long a record takes from its producer to the table, and what a continuous run costs: at a steady rate, and at rest.

    TIDEMILL_BIN=target/release/tidemill ~/.cache/tidemill/services/python/bin/python benches/freshness.py \\
        [--rate 20000] [--seconds 600] [--interval "5 seconds"] [--rest-seconds 600]

Broker, catalog (SQLite) and warehouse are on this machine, and the producer takes its share of it. A record is visible
from the time of the snapshot that holds it; its own time is the producer's. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pyarrow

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests/acceptance"), str(ROOT / "tests")]

from conftest import Corner  # noqa: E402
from events import event, event_id  # noqa: E402
from job import started  # noqa: E402
from services import Broker, wait_until  # noqa: E402

SLICE_S = 0.05
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / TICKS_PER_S


def produce(place: Corner, topic: str, rate: int, seconds: float) -> int:
    """Sends at a steady rate; one in twenty is a repeat."""
    feed = place.feed(topic)
    begun, sent = time.monotonic(), 0
    before, after = json.dumps(event(0)).split(event_id(0))
    while (elapsed := time.monotonic() - begun) < seconds:
        while sent < rate * elapsed:
            number = sent - 7 if sent % 20 == 19 else sent
            feed.send(f"{before}{event_id(number)}{after}", flush=False, key=str(number))
            sent += 1
        feed.producer.poll(0)
        # until the next slice is due: a rate is what is asked for
        time.sleep(SLICE_S)
    feed.flush()
    return sent


def quantile(values: list[int], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] / 1_000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rate", type=int, default=20_000)
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--interval", default="5 seconds")
    arguments.add_argument("--rest-seconds", type=float, default=600)
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, Broker(Path(folder) / "broker") as broker:
        place = Corner(Path(folder), broker, "freshness")
        topic = place.topic(partitions=4)
        job = place.job(topic, microbatch={"max_interval": asked.interval}, memory="1 GiB")
        with started("run", job.path, "--continuous", "--json") as run:
            pid = run._child.pid
            wait_until("start", lambda: '"event":"start"' in run.output(), 60)
            before = cpu_s(pid)
            sent = produce(place, topic, asked.rate, asked.seconds)
            distinct = sent - sent // 20
            wait_until("all rows", lambda: '"event":"commit"' in run.output() and job.reader().count() >= distinct, 120)
            busy = cpu_s(pid) - before
            # nothing is to be waited for: rest is what is measured
            before, begun = cpu_s(pid), time.monotonic()
            time.sleep(asked.rest_seconds)
            rest, rest_s = cpu_s(pid) - before, time.monotonic() - begun
            peak = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
            run.send(signal.SIGTERM)
            code = run.wait(60)
        table = job.reader().table
        visible_ms: dict[int, int] = {}
        for snapshot in table.snapshots():
            if snapshot.summary and "tidemill.batch" in snapshot.summary.additional_properties:
                # a renewal and the release carry the batch before them
                batch = int(snapshot.summary.additional_properties["tidemill.batch"])
                visible_ms[batch] = min(visible_ms.get(batch, snapshot.timestamp_ms), snapshot.timestamp_ms)
        rows = table.scan(selected_fields=("_tidemill_batch", "_kafka_timestamp")).to_arrow()
        times = rows["_kafka_timestamp"].cast(pyarrow.timestamp("ms", "UTC"), safe=False).cast("int64").to_pylist()
        late = sorted(
            visible_ms[batch] - at for batch, at in zip(rows["_tidemill_batch"].to_pylist(), times, strict=True)
        )
        print(json.dumps({
            "rate": asked.rate, "seconds": asked.seconds, "interval": asked.interval, "sent": sent, "rows": len(late),
            "exact": len(late) == distinct, "exit_code": code,
            "visible_after_s": {"p50": quantile(late, 0.5), "p99": quantile(late, 0.99), "max": late[-1] / 1_000},
            "commits": len(visible_ms),
            "cpu_s": round(busy, 1), "cpu_share": round(busy / asked.seconds, 3),
            "rest_s": round(rest_s), "rest_cpu_s": round(rest, 2), "memory_peak": peak.split(":")[1].strip(),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
