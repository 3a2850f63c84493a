"""`kill -9` at random moments while records keep coming: whatever it hits, the tables come out exact.

Two lives of three are killed after they began to read, the others anywhere. `TIDEMILL_TEST_KILLS` is the number of kills.
"""

import os
import random
import signal
import subprocess
import threading
from collections import Counter
from itertools import count

import ledger
from conftest import Corner
from events import event
from job import started
from phases import Trace
from sweep import SOURCE_AWAY, report

SEED = 20_260_505
KILLS = int(os.environ.get("TIDEMILL_TEST_KILLS", "10"))
LIFE_S_MAX = 2.0
# How a life ends that is not killed; a supervisor starts the next one.
DONE = (0, SOURCE_AWAY)
ROWS_PER_BATCH = 1_000
RECORDS_PER_S = 4_000
# Most records that are sent per life, so that lives on a busy machine do not leave a log of millions.
RECORDS_PER_LIFE = 8_000


class Load(threading.Thread):
    """Sends events to a topic until it is told to end, with repeats near and far and refused ones."""

    def __init__(self, place: Corner, topic: str) -> None:
        super().__init__(name="load")
        self._feed = place.feed(topic)
        self._over = threading.Event()
        self._lives = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        draws = random.Random(SEED)
        try:
            for number in count():
                self._feed.send(event(number), flush=False)
                if draws.random() < 0.06:
                    self._feed.send(event(draws.randrange(number + 1)), flush=False)
                if draws.random() < 0.02:
                    self._feed.send(event(number, event_type=None), flush=False)
                while number % (RECORDS_PER_S // 10) == 0:
                    if self._over.wait(0.1):
                        self._feed.flush()
                        return
                    if number <= RECORDS_PER_LIFE * self._lives:
                        break
        except BaseException as error:
            self.failure = error

    def add_life(self) -> None:
        """Lets more records come."""
        self._lives += 1

    def end(self) -> None:
        """Returns when the broker has every record."""
        self._over.set()
        self.join()
        assert self.failure is None, self.failure


def test_random_kills_under_load_leave_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch={"max_records": ROWS_PER_BATCH}, max_ratio=0.5)
    draws = random.Random(SEED)
    last_phases: Counter[str] = Counter()
    lives = 0
    load = Load(place, topic)
    load.start()
    try:
        while last_phases.total() < KILLS:
            trace = Trace(job.folder / "phases")
            with started("run", job.path, "--json", environment=trace.environment) as run:
                lives += 1
                load.add_life()
                if lives % 3 and not trace.reached("read", 1, run, pause_s=0.01):
                    assert run.wait() in DONE, run.output()
                    continue
                try:
                    # the moment of the kill is the fault
                    code = run.wait(timeout_s=draws.uniform(0, LIFE_S_MAX))
                    assert code in DONE, run.output()
                except subprocess.TimeoutExpired:
                    run.send(signal.SIGKILL)
                    run.wait()
                    last_phases[(trace.phases() or ["before start"])[-1]] += 1
    finally:
        load.end()
    # what the lives left, in fewer microbatches than theirs
    job.run("--set", f"microbatch.max_records={50 * ROWS_PER_BATCH}").expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    commits = ledger.check_conservation(job.reader().table, truth)
    assert commits[-1].ends == truth.ends
    epochs = len({commit.epoch for commit in commits})
    print(f"seed {SEED}: {last_phases.total()} kills of {lives} lives, {epochs} of which committed; {dict(last_phases)}")
    print(f"  {truth.consumed} records, {len(truth.events)} events, {truth.duplicates} repeats, {len(truth.letters)} letters")
    report(
        "random-kills",
        {"seed": SEED, "kills": last_phases.total(), "lives": lives, "last_phase": last_phases,
         "records": truth.consumed, "events": len(truth.events), "commits": len(commits)},
    )  # fmt: skip
    assert job.run().expect(0).last["counts"]["consumed"] == 0
