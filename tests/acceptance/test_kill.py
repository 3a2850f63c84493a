"""`kill -9` at sixty moments of several drains: the next run goes on by itself and the tables come out exact."""

import itertools
import random
import time
from collections import Counter

import ledger
from conftest import Corner
from events import event
from job import Job, started
from phases import PHASES, Trace, is_before_read_back, is_between_main_and_side

SEED = 20_260_101
DRAINS = 4
KILLS_PER_DRAIN = 15
KILLS_MAX = 3 * DRAINS * KILLS_PER_DRAIN
BEFORE_READ_BACK_MIN = 20
BETWEEN_MIN = 5
ROWS_PER_BATCH = 1_000
EVENTS_PER_WAVE = 20_000
# The moments aimed at, in turn; where a kill hits is what the program's own trace says last.
AIMS = (
    "first_data_file_byte", "main_landed", "data_files_closed", "sides_sent", "state_prepared", "fence_sent",
    "main_sent", "main_landed", "first_data_file_byte", "start", "main_sent", "sides_landed", "fenced",
    "state_prepared", "published",
)  # fmt: skip

# Phases that a life passes once.
ONCE = ("start", "fence_sent", "fenced")


def kill_at(job: Job, aim: str, times: int, jitter_s: float) -> list[str] | None:
    """Runs the job and kills it soon after `aim`; the phases that it passed, or None if it was done before."""
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
    return trace.phases()


def feed_wave(place: Corner, topic: str, wave: int) -> None:
    """Events with repeats inside the wave and of earlier waves, and a few refused ones in every batch."""
    draws = random.Random(SEED + wave)
    feed = place.feed(topic)
    first = wave * EVENTS_PER_WAVE
    for number in range(first, first + EVENTS_PER_WAVE):
        feed.send(event(number), flush=False)
        if draws.random() < 0.06:
            feed.send(event(draws.randrange(number + 1)), flush=False)
        if draws.random() < 0.02:
            feed.send(event(number, event_type=None), flush=False)
    feed.flush()


def test_sixty_kills_at_named_moments_leave_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch={"max_records": ROWS_PER_BATCH}, max_ratio=0.5)
    truth = place.truth(topic)
    draws = random.Random(SEED)
    aims, waves = itertools.cycle(AIMS), itertools.count()
    hits: Counter[str] = Counter()
    before_read_back = between = 0
    for _ in range(DRAINS):
        feed_wave(place, topic, next(waves))
        in_this_drain = 0
        while in_this_drain < KILLS_PER_DRAIN and hits.total() < KILLS_MAX:
            aim = next(aims)
            names = kill_at(job, aim, 1 if aim in ONCE else draws.randint(1, 2), draws.uniform(0, 0.002))
            if names is None:
                feed_wave(place, topic, next(waves))
                continue
            hits[names[-1] if names else "before start"] += 1
            before_read_back += is_before_read_back(names)
            between += is_between_main_and_side(names)
            in_this_drain += 1
        job.run().expect(0)
        truth.advance()
        job.check_against(truth)
        ledger.check_conservation(job.reader().table, truth)
    print(f"seed {SEED}: {hits.total()} kills in {DRAINS} drains, by the last phase passed:")
    for phase in ("before start", *PHASES):
        print(f"  {phase:22} {hits[phase]:3}")
    print(f"  between first data-file byte and read-back {before_read_back}, between main and side commit {between}")
    print(f"  {len(truth.events)} events written, {truth.duplicates} repeats, {len(truth.letters)} dead letters: exact")
    assert hits.total() >= DRAINS * KILLS_PER_DRAIN
    assert before_read_back >= BEFORE_READ_BACK_MIN, hits
    assert between >= BETWEEN_MIN, hits
    assert job.run().expect(0).last["counts"]["consumed"] == 0
