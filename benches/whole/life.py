"""Many events through one job in one run: is the last tenth as fast as the first?

The topic is sent whole before the run, so that nothing works beside it. A tenth ends where so many events are committed, by
the time at which the run's own commit lines were printed; between two of them the rate is taken as even. The first tenth
begins with the first commit, so that start-up is not in it.
"""

from __future__ import annotations

import json
from typing import Any

import events
from shared import days_ago, drained, event_of, figure_of, good, job_of, options, run_of, say, topic_of

TENTHS = 10
# event times of the whole stream are spread over so many days, the last of which is yesterday
SPAN_DAYS = 5


def seconds_at(points: list[tuple[int, float]], count: float) -> float:
    """When so many events were committed, between two commits as if the rate were even."""
    for (count_before, before), (count_after, after) in zip(points, points[1:], strict=False):
        if count <= count_after:
            return before + (after - before) * (count - count_before) / (count_after - count_before)
    return points[-1][1]


def tenths(lines: list[dict[str, Any]], total: int) -> list[int]:
    """Events a second in each tenth of the run's events."""
    points: list[tuple[int, float]] = []
    for line in lines:
        if line["event"] == "commit":
            points.append(((points[-1][0] if points else 0) + line["counts"]["consumed"], line["seconds_printed"]))
    if points[-1][0] != total or points[0][0] >= total / TENTHS:
        raise SystemExit(f"of {total} events the first commit has {points[0][0]}, all have {points[-1][0]}")
    bounds = [points[0][0], *(total * number / TENTHS for number in range(1, TENTHS + 1))]
    ends = [seconds_at(points, count) for count in bounds]
    return [round((bounds[n + 1] - bounds[n]) / (ends[n + 1] - ends[n])) for n in range(TENTHS)]


def main() -> None:
    """Runs everything and prints one JSON object."""
    parser = options("life", __doc__, 5e7, "1 GiB")
    parser.add_argument("--batch", type=float, default=1e6, help="most records of a microbatch")
    asked = parser.parse_args()
    stream = events.Stream(
        int(asked.events), 0, days_ago(events.TABLE_DAYS + SPAN_DAYS + 1), far_percent=2, near_percent=4,
        span_ms=SPAN_DAYS * events.DAY_MS,
    )  # fmt: skip
    with topic_of(stream, asked) as (folder, broker, _):
        batch = {"max_records": int(asked.batch)}
        job = job_of(folder, "life", broker.bootstrap, asked.memory, microbatch=batch)
        run = good("run", run_of(job, asked.memory, "--profile"))
        say(f"run: {run.seconds:.1f} s")
        figures = drained(job, run, stream)
    by_tenth = tenths(run.events, stream.events)
    result = {
        **figure_of("life", stream, asked), "batch": int(asked.batch), **figures,
        "tenths_events_per_second": by_tenth, "last_against_first": round(by_tenth[-1] / by_tenth[0], 3),
        "state_bytes": event_of(run, "done")["state_bytes"], "limited_by": event_of(run, "profile").get("limited_by"),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
