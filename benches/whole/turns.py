"""Two ways of running one job, in turns on the same topic (A B B A ...), so that a shared machine slows both.

`spill`: a probe batch of many events within little memory, against ample memory. `threads`: two threads against one.
`regression`: this program against another commit's. A ratio is that of A to B within one pair of neighbours; DuckDB
compares the rows of every run with what was sent.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import events
from shared import binary, days_ago, drained, event_of, figure_of, good, job_of, options, run_of, say, topic_of

# beside its payload, as the program reckons
PROBE_RECORD_BYTES = 256
RATIOS = ("events_per_second", "cpu_seconds_per_million_events")


@dataclass(frozen=True)
class Way:
    """One side."""

    name: str
    memory: str
    words: tuple[str, ...] = ()
    program: Path | None = None


def once(way: Way, folder: Path, bootstrap: str, stream: events.Stream) -> dict[str, Any]:
    """One run, checked. Its table and state do not outlive it: the next run begins like this one."""
    job = job_of(folder, "turn", bootstrap, way.memory)
    run = good(way.name, run_of(job, way.memory, *way.words, program=way.program))
    figures = {"way": way.name, **drained(job, run, stream)}
    shutil.rmtree(job.folder)
    say(f"{figures}")
    return figures | {"memory_split": event_of(run, "start")["memory"]}


def probe_records(split: str, payload_bytes: int) -> int:
    """Most records of a probe batch, by the split that a run printed: its records' share holds their payload (`src/memory.rs`)."""
    share = re.search(r"records ([\d.]+) (MiB|GiB)", split)
    assert share, f"no share of records in {split}"
    return int(float(share[1]) * (1 << {"MiB": 20, "GiB": 30}[share[2]])) // max(payload_bytes, PROBE_RECORD_BYTES)


def main() -> None:
    """Runs everything and prints one JSON object."""
    kind = sys.argv.pop(1)
    defaults = {"spill": (8e6, "512 MiB"), "threads": (1e7, "1 GiB"), "regression": (5e6, "1 GiB")}
    parser = options(kind, __doc__, *defaults[kind])
    parser.add_argument("--pairs", type=int, default=3, help="pairs of neighbouring runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the job, on both sides"
    )
    if kind == "spill":
        parser.add_argument("--ample", default="4 GiB", help="memory of the other side")
        parser.add_argument("--batch", type=float, default=4e6, help="most records of a microbatch")
    if kind == "regression":
        parser.add_argument(
            "--other", type=Path, required=True, help="program of the other commit; --against builds it"
        )
        parser.add_argument("--against", help="the other commit, as it was asked for")
    asked = parser.parse_args()
    both = tuple(word for one in asked.set for word in ("--set", one))
    ways = {
        "spill": lambda: [
            Way(name, memory, (*both, "--set", f"microbatch.max_records={int(asked.batch)}", *words))
            for name, memory, words in (
                ("little", asked.memory, ("--set", f"dedup.max_probe_records={int(asked.batch)}")),
                ("ample", asked.ample, ()),
            )
        ],
        "threads": lambda: [Way(f"threads={n}", asked.memory, (*both, "--set", f"threads={n}")) for n in (2, 1)],
        "regression": lambda: [
            Way("this", asked.memory, both, binary()),
            Way("other", asked.memory, both, asked.other),
        ],
    }[kind]()
    stream = events.Stream(int(asked.events), 0, days_ago(), far_percent=0, near_percent=6)
    runs: list[dict[str, Any]] = []
    with topic_of(stream, asked) as (folder, broker, payload_bytes):
        for number in range(asked.pairs):
            for way in ways if number % 2 == 0 else reversed(ways):
                runs.append(once(way, folder, broker.bootstrap, stream))
    sides = [[run for run in runs if run["way"] == way.name] for way in ways]
    ratios = {name: [round(one[name] / other[name], 3) for one, other in zip(*sides, strict=True)] for name in RATIOS}
    result = {
        **figure_of(kind, stream, asked), "ways": [way.name for way in ways], "set": asked.set,
        **{f"{name}_ratio_median": statistics.median(of) for name, of in ratios.items()},
        "ratios": ratios, "runs": runs,
    }  # fmt: skip
    if kind == "regression":
        result["against"] = asked.against
    if kind == "spill":
        per_event = payload_bytes // stream.events
        result["probe_records_computed"] = [probe_records(side[0]["memory_split"], per_event) for side in sides]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
