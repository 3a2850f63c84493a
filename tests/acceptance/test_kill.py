"""`kill -9` at sixty moments of several drains: the next run goes on by itself and the tables come out exact."""

import itertools
import random
import time
from collections import Counter

import ledger
from conftest import Corner
from events import event
from job import Job, started
from phases import BEFORE_READ_BACK, BETWEEN_MAIN_AND_SIDE, PHASES, Trace

SEED = 20_260_101
DRAINS = 4
KILLS_PER_DRAIN = 15
KILLS_MAX = 3 * DRAINS * KILLS_PER_DRAIN
BEFORE_READ_BACK_MIN = 20
BETWEEN_MIN = 5
ROWS_PER_BATCH = 1_000
# The moments aimed at, in turn; where a kill hits is what the program's own trace says last.
AIMS = (
    "first_data_file_byte", "main_landed", "data_files_closed", "sides_sent", "state_prepared", "fenced", "main_sent",
    "main_landed", "first_data_file_byte", "start", "main_sent", "sides_landed", "read", "state_prepared", "published",
)  # fmt: skip


def kill_at(job: Job, aim: str, times: int, jitter_s: float) -> str | None:
    """Runs the job and kills it soon after `aim`; the last phase that it passed, or None if it was done before."""
    trace = Trace(job.folder / "phases")
    with started("run", job.path, "--json", environment=trace.environment) as child:
        reached = trace.reached(aim, times, child)
        if reached:
            until = time.monotonic() + jitter_s
            while time.monotonic() < until:
                pass
        if child.poll() is not None:
            assert child.poll() == 0, f"a run after a kill must go on by itself; {child.poll()}:\n{child.output()}"
            return None
        child.kill()
    return (trace.phases() or ["before start"])[-1]


def feed_wave(place: Corner, topic: str, wave: int) -> None:
    """Events with repeats inside the wave and of earlier waves, and a few refused ones in every batch."""
    draws = random.Random(SEED + wave)
    feed = place.feed(topic)
    first = wave * 20_000
    for number in range(first, first + 20_000):
        feed.send(event(number), flush=False)
        if draws.random() < 0.06:
            feed.send(event(draws.randrange(number + 1)), flush=False)
        if draws.random() < 0.01:
            feed.send(event(number, event_type=None), flush=False)
    feed.flush()


def test_sixty_kills_at_named_moments_leave_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch={"max_records": ROWS_PER_BATCH}, max_ratio=0.5)
    truth = place.truth(topic)
    draws = random.Random(SEED)
    aims = itertools.cycle(AIMS)
    hits: Counter[str] = Counter()
    for wave in range(DRAINS):
        feed_wave(place, topic, wave)
        in_this_drain = 0
        while in_this_drain < KILLS_PER_DRAIN and hits.total() < KILLS_MAX:
            phase = kill_at(job, next(aims), draws.randint(1, 2), draws.uniform(0, 0.002))
            if phase is None:
                feed_wave(place, topic, wave)
                continue
            hits[phase] += 1
            in_this_drain += 1
        job.run().expect(0)
        truth.advance()
        job.check_against(truth)
        ledger.check_conservation(job.reader().table, truth)
    before_read_back = sum(hits[phase] for phase in BEFORE_READ_BACK)
    between = sum(hits[phase] for phase in BETWEEN_MAIN_AND_SIDE)
    print(f"seed {SEED}: {hits.total()} kills by the last phase passed:")
    for phase in ("before start", *PHASES):
        print(f"  {phase:22} {hits[phase]:3}")
    print(f"  between first data-file byte and read-back {before_read_back}, between main and side commit {between}")
    assert hits.total() >= DRAINS * KILLS_PER_DRAIN
    assert before_read_back >= BEFORE_READ_BACK_MIN, hits
    assert between >= BETWEEN_MIN, hits
    assert job.run().expect(0).last["counts"]["consumed"] == 0
