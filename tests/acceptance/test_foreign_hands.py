"""Foreign hands on our tables: others append, delete, compact, expire, change and roll back, between and during batches.

What must hold: our events stand once, rows that were deleted stay away, rows of others are not ours, and a state that is
lost is rebuilt to the truth or the run stops and says why.

`TIDEMILL_FOREIGN_SEEDS` is the number of seeds of each random schedule. A failure names its seed and what was done.
"""

import os
import random
import re
import shutil
from collections import Counter
from typing import Any

import pytest
from pyiceberg.transforms import BucketTransform

import ledger
import outcomes
from conftest import Corner
from events import Feed, event
from hands import ACTS, Hand
from job import started

SEEDS = int(os.environ.get("TIDEMILL_FOREIGN_SEEDS", "2"))
STEPS = 8
FRESH_PER_STEP = 150
REPEATS_PER_STEP = 100
ENDS_WELL = 0
TABLE_CHANGED, SCHEMA_DIFFERS, ROLLED_BACK, MISSING_KEYS = 16, 26, 24, 29


class Stream:
    """Events in order with repeats of any age and refused rows between them."""

    def __init__(self, feed: Feed, seed: int) -> None:
        self.feed = feed
        self.draws = random.Random(seed + 1)
        self.sent = 0

    def send(self, fresh: int = FRESH_PER_STEP, repeats: int = REPEATS_PER_STEP) -> None:
        """New events and as many repeats as are asked for, of any event so far."""
        for number in range(self.sent, self.sent + fresh):
            self.feed.send(event(number), flush=False)
        self.sent += fresh
        for _ in range(repeats):
            self.feed.send(event(self.draws.randrange(self.sent)), flush=False)
        self.feed.send(event(self.sent, event_type=None), event(0, ts="never"), flush=False)
        self.feed.flush()


class Scene:
    """A job, its topic, the foreign hand and the truth."""

    def __init__(self, place: Corner, seed: int, **fields: Any) -> None:
        self.topic = place.topic(partitions=2)
        self.job = place.job(self.topic, max_ratio=0.5, **fields)
        self.stream = Stream(place.feed(self.topic), seed)
        self.truth = place.truth(self.topic)
        self.hand = Hand(self.job, seed)
        self.state = self.job.folder / "state"

    def run_and_check(self) -> None:
        """A clean run, and every oracle."""
        self.job.run().expect(ENDS_WELL)
        self.hand.check(self.truth.advance())

    def lose_state(self) -> None:
        """The state folder is gone. The run that follows rebuilds it, or stops because rows of ours were deleted."""
        lost = self.state.with_name("lost")
        shutil.rmtree(lost, ignore_errors=True)
        self.state.rename(lost)
        if not self.hand.erased:
            return
        rows = Counter(self.job.reader().ids())
        stop = self.job.run().expect_stop(MISSING_KEYS, "MISSING_KEYS")
        assert str(self.job.path) in stop["way_out"] and "state folder" in stop["way_out"], stop
        assert Counter(self.job.reader().ids()) == rows, "a stop writes no row"
        # one of the two ways out that the stop names: bring the folder back
        shutil.rmtree(self.state, ignore_errors=True)
        lost.rename(self.state)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_hands_between_batches_and_a_state_that_is_lost_leave_the_truth(place: Corner, seed: int) -> None:
    scene = Scene(place, seed)
    draws = random.Random(seed)
    scene.stream.send()
    scene.run_and_check()
    losses = stops = 0
    try:
        for _ in range(STEPS):
            for _ in range(draws.randint(1, 3)):
                scene.hand.act()
            scene.stream.send()
            if draws.random() < 0.5:
                scene.hand.log.append("state lost")
                losses += 1
                stops += bool(scene.hand.erased)
                scene.lose_state()
            scene.run_and_check()
    except AssertionError as error:
        raise AssertionError(f"seed {seed} after {scene.hand.log}: {error}") from error
    outcomes.record("foreign-hands", f"between-{seed}", seed=seed, acts=scene.hand.log, losses=losses, stops=stops)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_hands_during_batches_never_tear_one(place: Corner, seed: int) -> None:
    scene = Scene(place, seed, microbatch={"max_records": 40})
    scene.stream.send()
    scene.run_and_check()
    ends: Counter[int] = Counter()
    try:
        for _ in range(3):
            scene.stream.send(fresh=600, repeats=400)
            with started("run", scene.job.path, "--json") as run:
                while run.poll() is None:
                    scene.hand.holds = run if scene.hand.draws.random() < 0.5 else None
                    scene.hand.act()
                code = run.wait()
                assert code in (ENDS_WELL, TABLE_CHANGED), f"exit {code}\n{run.output()[-4000:]}"
            ends[code] += 1
            scene.run_and_check()
    except AssertionError as error:
        raise AssertionError(f"seed {seed} after {scene.hand.log}: {error}") from error
    outcomes.record("foreign-hands", f"during-{seed}", seed=seed, acts=scene.hand.log, ends=ends)


@pytest.mark.parametrize("act", list(ACTS))
def test_after_each_act_alone_a_lost_state_is_rebuilt_to_the_truth(place: Corner, act: str) -> None:
    scene = Scene(place, seed=7)
    for _ in range(2):
        scene.stream.send()
        scene.run_and_check()
    if act == "put back":
        scene.hand.act("delete")
    scene.hand.act(act)
    assert scene.hand.log[-1] == act, "the act did nothing"
    scene.stream.send()
    scene.lose_state()
    scene.run_and_check()


def test_rows_of_others_do_not_hide_that_rows_of_ours_are_gone(place: Corner) -> None:
    scene = Scene(place, seed=3)
    scene.stream.send()
    scene.run_and_check()
    scene.hand.act("delete")
    for _ in range(5):
        scene.hand.act("append")
    assert scene.hand.foreign.total() > len(scene.hand.erased), "more rows of others than were deleted, in the same bucket"
    scene.stream.send(fresh=0, repeats=500)
    scene.lose_state()
    scene.run_and_check()


def test_a_rollback_stops_and_the_way_out_of_its_message_works(place: Corner) -> None:
    scene = Scene(place, seed=1, microbatch={"max_records": 200})
    scene.stream.send()
    scene.run_and_check()
    scene.stream.send()
    scene.run_and_check()
    for commits_back in (2, 5):
        table = scene.hand.main()
        older = ledger.history(table)[-commits_back]
        set_head(scene.hand, older.snapshot_id)
        stop = scene.job.run().expect_stop(ROLLED_BACK, "TABLE_ROLLED_BACK")
        roll_forward(scene.hand, stop)
        scene.stream.send()
        scene.run_and_check()


def test_a_rollback_while_batches_are_written_stops_before_the_next_commit(place: Corner) -> None:
    scene = Scene(place, seed=2, microbatch={"max_records": 20})
    scene.stream.send()
    scene.run_and_check()
    scene.stream.send(fresh=2_000, repeats=0)
    older = ledger.history(scene.hand.main())[-1].snapshot_id
    with started("run", scene.job.path, "--json") as run:
        while len(ledger.history(scene.hand.main())) < len(scene.hand.commits) + 3:
            assert run.poll() is None, run.output()
        scene.hand.remember(scene.hand.main())
        scene.hand.holds = run
        set_head(scene.hand, older)
        assert run.wait() == ROLLED_BACK, run.output()
    stop = scene.job.run().expect_stop(ROLLED_BACK, "TABLE_ROLLED_BACK")
    roll_forward(scene.hand, stop)
    scene.run_and_check()


def set_head(hand: Hand, snapshot_id: int) -> None:
    """Moves the main branch, as an administrator does."""
    hand.persist(lambda table: table.manage_snapshots().set_current_snapshot(snapshot_id).commit())


def roll_forward(hand: Hand, stop: dict[str, Any]) -> None:
    """Does what the message of a rollback says: the snapshot with the attempt that it names becomes the head."""
    attempt = re.search(r"tidemill\.attempt = ([0-9a-f-]{36})", stop["way_out"])
    assert attempt, stop["way_out"]
    for snapshot in hand.main().metadata.snapshots:
        if snapshot.summary and snapshot.summary.additional_properties.get("tidemill.attempt") == attempt.group(1):
            return set_head(hand, snapshot.snapshot_id)
    raise AssertionError(f"no snapshot carries attempt {attempt.group(1)}")


def test_a_partition_field_that_was_added_stops_until_the_job_says_the_same(place: Corner) -> None:
    scene = Scene(place, seed=4)
    scene.stream.send()
    scene.run_and_check()
    by_id = BucketTransform(4)
    scene.hand.persist(lambda table: table.update_spec().add_field("event_id", by_id, "event_id_bucket").commit())
    scene.stream.send()
    stop = scene.job.run().expect_stop(SCHEMA_DIFFERS, "SCHEMA_DIFFERS")
    said = re.search(r"write partition_by = \[(.*?)\] in the job", stop["what"])
    assert said, stop["what"]
    scene.job.partition_by = re.findall(r'"([^"]+)"', said.group(1))
    scene.job.write()
    scene.run_and_check()
    scene.hand.act("compact")
    scene.stream.send()
    scene.lose_state()
    scene.run_and_check()
    assert len(scene.hand.main().specs()) == 2


def test_a_partition_field_added_under_an_open_batch_ends_the_run_with_its_reason(place: Corner) -> None:
    scene = Scene(place, seed=5, microbatch={"max_records": 20})
    scene.stream.send()
    scene.run_and_check()
    scene.stream.send(fresh=2_000, repeats=0)
    with started("run", scene.job.path, "--json") as run:
        while len(ledger.history(scene.hand.main())) < len(scene.hand.commits) + 3:
            assert run.poll() is None, run.output()
        scene.hand.holds = run
        scene.hand.persist(lambda table: table.update_spec().add_field("channel", "identity", "channel").commit())
        assert run.wait() == TABLE_CHANGED, run.output()
    scene.job.run().expect_stop(SCHEMA_DIFFERS, "SCHEMA_DIFFERS")
    scene.job.partition_by.append("channel")
    scene.job.write()
    scene.run_and_check()
