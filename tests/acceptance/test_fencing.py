"""A copy that stands still anywhere in its work, while others take the table over, writes nothing when it wakes.

Each case stops a first copy with SIGSTOP at a crash point, lets another one commit five microbatches, and wakes the first.
The tables are compared before and after it woke, side table included, and in the end with the truth of the topic.
`TIDEMILL_TEST_FENCING` is the number of cases; with `all`, each point has one and the longer chains come on top.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

import ledger
from conftest import Corner
from events import Feed, event
from job import Job, Running, started, tidemill
from preload import build_library
from services import wait_until
from sweep import KILLED, Scene, report

SEED = 20_260_404
CASES = os.environ.get("TIDEMILL_TEST_FENCING", "8")
BUSY, FENCED = 10, 20
BATCHES_OF_THE_OTHER = 5
# Until here a copy has not read the ledger: what it finds when it wakes is news and not a fence.
BEFORE_SURVEY = {"start", "lock_folder_made", "lock_taken", "catalog_file_made"}
# Until here it has not locked its folder: another copy in the same folder gets it.
BEFORE_LOCK = {"start", "lock_folder_made"}
# Where a copy has read everything, and left the other nothing to do.
AT_THE_END = {"release_to_send"}
# Three microbatches of the longest time, the grace of a minute, and some more.
LEASE_OVER_S = 1_200


@dataclass(frozen=True)
class Case:
    """Where copies stop, one after another, and how the last one gets the table."""

    stops: tuple[tuple[str, int], ...]
    way: str

    def __str__(self) -> str:
        return f"{self.way}: {', '.join(f'{point}:{hit}' for point, hit in self.stops)}"


def send(feed: Feed, numbers: range) -> None:
    """Events, and after some of them a repeat or a refused row."""
    for number in numbers:
        feed.send(event(number), flush=False)
        if number % 9 == 0:
            feed.send(event(number // 2), flush=False)
        if number % 20 == 0:
            feed.send(event(number, event_type=None), flush=False)
    feed.flush()


def a_topic_of_many_microbatches(place: Corner) -> Scene:
    """Nothing is there yet, so the first copy makes everything; each microbatch has refused rows."""
    topic = place.topic(partitions=2)
    send(place.feed(topic), range(800))
    job = place.job(topic, microbatch={"max_records": 60}, max_ratio=0.5)
    return Scene(job, place.truth(topic))


def cases(passed: Counter[str], draws: random.Random) -> list[Case]:
    """A case for each point that a run passes; then chains of three and four copies, and leases that ran out."""

    def hit_of(point: str) -> int:
        return draws.randint(1, min(3, passed[point]))

    points = sorted(passed.keys() - {"released"})
    # in an order that spreads any number of cases over the run
    draws.shuffle(points)
    ways = ["elsewhere", "copied_folder", "elsewhere", "same_folder"]
    single = [Case(((point, hit_of(point)),), ways[index % len(ways)]) for index, point in enumerate(points)]
    mid = sorted(point for point in points if passed[point] > BATCHES_OF_THE_OTHER)
    chains = [
        Case(tuple((draws.choice(mid), draws.randint(1, 2)) for _ in range(copies)), "elsewhere")
        for copies in (2, 3, 2, 3, 2, 3)
    ]
    expired = [Case(((draws.choice(mid), draws.randint(1, 3)),), "lease_over") for _ in range(4)]
    if CASES == "all":
        return single + chains + expired
    asked = int(CASES)
    more = min(max(asked // 8, 1), 4)
    return single[: max(asked - 2 * more, 1)] + chains[:more] + expired[:more]


def stopped_copy(stack: ExitStack, job: Job, at: tuple[str, int], *words: str) -> Running:
    """Starts a copy, and returns when it stands still at the point."""
    environment = {"TIDEMILL_STOP_AT": f"{at[0]}:{at[1]}"}
    copy = stack.enter_context(started("run", job.path, "--json", *words, environment=environment))
    wait_until(f"a copy to stand still at {at}", lambda: copy.is_stopped() or copy.poll() is not None, pause_s=0.005)
    assert copy.poll() is None, f"ended before {at}: {copy.output()}"
    return copy


def heads(job: Job) -> list[str]:
    """The metadata files of main and side table: any commit moves one."""
    catalog = job.open_catalog()
    names = (job.table, f"{job.table}_dead_letters")
    return [catalog.load_table(name).metadata_location for name in names if catalog.table_exists(name)]


def owner_of(job: Job) -> str | None:
    """The owner that the ledger names, if there is one."""
    catalog = job.open_catalog()
    if not catalog.table_exists(job.table):
        return None
    table = catalog.load_table(job.table)
    return ledger.full_record(table)["owner"] if "tidemill.ledger" in table.properties else None


class Play:
    """One case."""

    def __init__(self, scene: Scene, case: Case, clock: Path, send_more: Callable[[], None]) -> None:
        self.job = scene.restore().job
        self.send_more = send_more
        self.scene = scene
        self.case = case
        self.environment = {}
        if case.way == "lease_over":
            self.environment = {"LD_PRELOAD": str(clock), "TIDEMILL_CLOCK_AHEAD_S": str(LEASE_OVER_S)}
        self.folders = self._folders()

    def _folders(self) -> Iterator[list[str]]:
        for number in range(10):
            yield ["--set", f"state_dir={self.job.folder}/other-state-{number}"]

    def others(self) -> list[str]:
        """The words with which the last copy starts."""
        if self.case.way == "same_folder":
            return []
        words = next(self.folders)
        if self.case.way == "copied_folder":
            shutil.copytree(self.job.folder / "state", words[1].partition("=")[2], dirs_exist_ok=True)
        return [*words, "--takeover"] if self.case.way == "elsewhere" else words

    def run(self) -> list[int]:
        """Stops the copies, lets the last one work, wakes the others; their exit codes."""
        with ExitStack() as stack:
            copies = []
            owned = []
            for number, at in enumerate(self.case.stops):
                before = owner_of(self.job)
                words = [*next(self.folders), "--takeover"] if number else []
                copies.append(stopped_copy(stack, self.job, at, *words))
                owned.append(owner_of(self.job) != before)
            if any(point in AT_THE_END for point, _ in self.case.stops):
                self.send_more()
            five = ["--max-batches", str(BATCHES_OF_THE_OTHER)]
            last = self.job.run(*self.others(), *five, environment=self.environment)
            if self.case.way == "same_folder" and self.case.stops[0][0] not in BEFORE_LOCK:
                last.expect_stop(BUSY, "BUSY")
            else:
                assert last.expect(0).last["batches"] == BATCHES_OF_THE_OTHER, f"{self.case}: {last.stdout}"
            codes = [self.wake(*copy) for copy in zip(copies, self.case.stops, owned, strict=True)]
        self.job.run(environment=self.environment).expect(0)
        self.scene.check()
        return codes

    def wake(self, copy: Running, at: tuple[str, int], owned: bool) -> int:
        """Lets a copy go on and judges its end."""
        before = heads(self.job)
        copy.send(signal.SIGCONT)
        code = copy.wait()
        if self.case.way == "same_folder" or (at[0] in BEFORE_SURVEY and not owned):
            expected = 0
        else:
            expected = FENCED if owned else BUSY
            assert heads(self.job) == before, f"{self.case}: a copy that lost the table wrote\n{copy.output()}"
        assert code == expected, f"{self.case}: {at} ended with {code}, not {expected}\n{copy.output()}"
        return code


@pytest.fixture(scope="session")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that sets a clock ahead."""
    return build_library("clock_ahead", tmp_path_factory.mktemp("clock"))


def test_a_copy_that_slept_anywhere_while_another_worked_writes_nothing_more(place: Corner, clock: Path) -> None:
    scene = a_topic_of_many_microbatches(place)
    trace = place.folder / "points"
    scene.strike(TIDEMILL_POINTS=str(trace)).expect(0)
    all_cases = cases(Counter(trace.read_text().split()), random.Random(SEED))
    ends: Counter[str] = Counter()
    feed, begins = place.feed(*scene.truth.topics), count(1_000, 400)

    def send_more() -> None:
        begin = next(begins)
        send(feed, range(begin, begin + 400))
        scene.truth.advance()

    for case in all_cases:
        codes = Play(scene, case, clock, send_more).run()
        ends.update(f"{case.way} {code}" for code in codes)
    print(f"seed {SEED}: {len(all_cases)} cases, ends by way and exit code: {dict(ends)}")
    report("fencing", {"seed": SEED, "cases": [str(case) for case in all_cases], "ends": ends})
    fenced = sum(count for end, count in ends.items() if end.endswith(str(FENCED)))
    assert fenced >= len(all_cases) // 2, f"most copies owned the table when they fell asleep: {ends}"


def test_a_supervisor_that_restarts_a_run_that_keeps_dying_gets_the_work_done(place: Corner) -> None:
    scene = a_topic_of_many_microbatches(place)
    trace = place.folder / "points"
    scene.strike(TIDEMILL_POINTS=str(trace)).expect(0)
    passed = Counter(trace.read_text().split())
    # a life that dies at the second hit of a point of a microbatch has committed one
    mortal = sorted(point for point, hits in passed.items() if hits > BATCHES_OF_THE_OTHER)
    draws = random.Random(SEED)
    scene.restore()
    batches = [0]
    while (outcome := scene.strike(TIDEMILL_CRASH_AT=f"{draws.choice(mortal)}:{draws.randint(3, 4)}")).exit_code != 0:
        assert outcome.exit_code == KILLED, outcome.stderr
        batches.append(ledger.full_record(scene.job.reader().table)["batch"])
        assert len(batches) < 40, f"no progress: {batches}"
    print(f"{len(batches) - 1} lives that died, at batches {batches[1:]}")
    assert len(batches) > 2, "more than one life died"
    scene.check()


def test_cron_on_two_machines_in_turn_makes_progress_with_each_start(place: Corner) -> None:
    scene = a_topic_of_many_microbatches(place)
    job = scene.job
    batch = 0
    machines = [["--set", f"state_dir={job.folder}/machine-{number}"] for number in range(2)]
    while (done := job.run(*machines[batch % 2], "--max-batches", "1").expect(0).last)["batches"]:
        batch += 1
        assert done["batch"] == batch
    tidemill("state", "verify", job.path, *machines[1 - batch % 2]).expect(0)
    job.check_against(scene.truth)
    ledger.check_conservation(job.reader().table, scene.truth)
