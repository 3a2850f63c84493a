"""Every call that changes a file fails once, or ends the process: a named stop, and the next run goes on exactly.

`io_faults.c` counts the calls of a run of three microbatches and of the run that recovers from a kill with its state lost,
and lets the i-th fail. Files of state and warehouse are one sweep, those of the SQLite catalog another.

By default lives follow one another on the same tables, and each has a fault of its own: at the number of every sync and rename
that an undisturbed life makes, and of a sample of the rest. `TIDEMILL_TEST_IO_CALLS=all` strikes every call with every fault
that fits it, each time from where the scene begins, and has everything compared after each.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Corner
from events import event
from preload import build_library
from sweep import KILLED, SOURCE_AWAY, Scene, report

SEED = 20_260_303
ALL = os.environ.get("TIDEMILL_TEST_IO_CALLS") == "all"
SAMPLE = int(os.environ.get("TIDEMILL_TEST_IO_SAMPLE", "12"))
# Which faults fit which call.
FAULTS = {
    "open": ("eio", "enospc", "full", "kill"),
    "open_read": ("eio", "kill"),
    "write": ("eio", "enospc", "full", "short", "kill", "torn"),
    "sync": ("eio", "enospc", "kill"),
    "rename": ("eio", "enospc", "kill"),
    "unlink": ("eio", "kill"),
    "resize": ("eio", "enospc", "full", "kill"),
    "mkdir": ("eio", "enospc", "full", "kill"),
}
# Calls that make bytes or names durable: all of them are struck in every run of the tests.
DURABLE = ("sync", "rename")
# A life may make fewer calls than the undisturbed one; then everything is put back, and it is struck there.
TRIES_MAX = 3


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that strikes, compiled."""
    return build_library("io_faults", tmp_path_factory.mktemp("shim"))


def three_microbatches(place: Corner) -> Scene:
    """A first run: catalog, tables and state are made too. The second microbatch has refused rows. Lives that follow one
    another find more of the same, so that each has records to read."""
    topic = place.topic()
    feed = place.feed(topic)
    for first in range(0, 320 if ALL else 10 * 320, 320):
        feed.send(*(event(first + number) for number in range(100)), *(event(first + number) for number in range(50, 150)))
        feed.send(*(event(first + number, event_type=None) for number in range(20)), event(first + 7))
        feed.send(*(event(first + number) for number in range(150, 320)))
    job = place.job(topic, microbatch={"max_records": 150}, max_ratio=0.5)
    return Scene(job, place.truth(topic))


def a_recovery(place: Corner) -> Scene:
    """The run after a kill between main and side table, with the state lost and records left to read."""
    scene = three_microbatches(place)
    killed = scene.strike(TIDEMILL_CRASH_AT="main_landed:3")
    assert killed.exit_code == KILLED, killed.stderr
    for path in (scene.job.folder / "state").rglob("*.segment"):
        path.unlink()
    shutil.rmtree(f"{scene.job.folder}.kept")
    return Scene(scene.job, scene.truth)


def rows_that_wait(place: Corner) -> Scene:
    """Microbatches of several chunks whose keys are looked up together, while the rows wait in a file without a name. A few
    large records fill a chunk."""
    topic = place.topic()
    feed = place.feed(topic)
    for first in range(0, 3 * 60 if ALL else 10 * 60, 60):
        feed.send(*(event(first + number, padding="x" * 600_000 * (number % 2)) for number in range(40)))
        feed.send(*(event(first + number) for number in range(20, 60)))
    job = place.job(topic, microbatch={"max_records": 80}, max_ratio=0.5, memory="256 MiB", dedup={"max_probe_records": 1_000})
    return Scene(job, place.truth(topic))


SCENES = (three_microbatches, a_recovery, rows_that_wait)
# Below the job's folder, what is struck.
PLACES = {"files": ("state", "warehouse"), "catalog": ("catalog.db",)}
# A catalog that stays full is asked again for two minutes, as any that does not say yes: once for every call is too long.
LONG = ("catalog", "full")


class Shim:
    """Runs a scene with the library, and knows what it did."""

    def __init__(self, library: Path, scene: Scene, places: tuple[str, ...], trace: Path) -> None:
        self.scene = scene
        self.trace = trace
        below = ":".join(str(scene.job.folder / place) for place in places)
        self.environment = {
            "LD_PRELOAD": str(library), "TIDEMILL_IO_BELOW": below, "TIDEMILL_IO_TRACE": str(trace),
        }  # fmt: skip

    def calls(self) -> list[str]:
        """The kinds of the calls of an undisturbed run of three microbatches, in order."""
        self.trace.unlink(missing_ok=True)
        self.scene.restore().strike("--max-batches", "3", **self.environment).expect(0)
        return [line.split()[0] for line in self.trace.read_text().splitlines()]

    def strike(self, number: int, fault: str) -> tuple[str | None, bool]:
        """Runs with the fault at the call of this number; the kind of the call that was struck, and whether the run came to
        its end all the same, with everything compared."""
        self.trace.unlink(missing_ok=True)
        at = {"TIDEMILL_IO_AT": str(number), "TIDEMILL_IO_FAULT": fault}
        outcome = self.scene.strike(**self.environment, **at)
        struck = [line.split(maxsplit=2) for line in self.trace.read_text().splitlines() if line.startswith("struck ")]
        if not struck and outcome.exit_code == SOURCE_AWAY:
            return None, False
        if not struck:
            outcome.expect(0)
            self.scene.check()
            return None, True
        _, kind, path = struck[0]
        what = f"{fault} at call {number}, {kind} {path}"
        if fault in ("kill", "torn"):
            assert outcome.exit_code == -signal.SIGKILL, f"{what}: {outcome.exit_code}\n{outcome.stderr}"
        elif outcome.exit_code != 0:
            assert fault != "short", f"{what}: what is left of a write is written\n{outcome.stderr}"
            assert 10 <= outcome.exit_code <= 29, f"{what}: {outcome.exit_code}\n{outcome.stdout}\n{outcome.stderr}"
            outcome.expect_stop(outcome.exit_code, outcome.last["reason"])
        assert "panicked" not in outcome.stderr, f"{what}: {outcome.stderr}"
        try:
            if outcome.exit_code == 0:
                self.scene.check()
            if ALL:
                self.scene.go_on_and_check()
        except AssertionError as error:
            raise AssertionError(f"{what}: exit code {outcome.exit_code}\n{outcome.stdout}\n{error}") from error
        return kind, outcome.exit_code == 0


def cases(kinds: list[str], where: str, draws: random.Random) -> list[tuple[int, str]]:
    """Number of the call and fault: all, or one fault for each durable call and a sample of the others."""
    numbered = list(enumerate(kinds, 1))
    every = [(number, fault) for number, kind in numbered for fault in FAULTS[kind] if (where, fault) != LONG]
    if ALL:
        return every
    durable = [(number, draws.choice(FAULTS[kind])) for number, kind in numbered if kind in DURABLE]
    others = [(number, fault) for number, fault in every if kinds[number - 1] not in DURABLE]
    return sorted(durable + draws.sample(others, min(SAMPLE, len(others))))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("build", SCENES, ids=lambda build: build.__name__)
def test_a_failed_call_ends_with_a_named_stop_and_the_next_run_goes_on(
    place: Corner, shim: Path, build: Callable[[Corner], Scene], where: str
) -> None:
    striker = Shim(shim, build(place), PLACES[where], place.folder / "calls")
    kinds = striker.calls()
    assert {"open", "write", "sync"} <= set(kinds), Counter(kinds)
    assert (".waiting" in striker.trace.read_text()) == (build is rows_that_wait and where == "files")
    struck: Counter[str] = Counter()
    striker.scene.restore()
    for number, fault in cases(kinds, where, random.Random(SEED)):
        for _ in range(TRIES_MAX):
            kind, is_done = striker.strike(number, fault)
            if ALL or is_done:
                striker.scene.restore()
            if kind:
                struck[f"{kind} {fault}"] += 1
                break
    striker.scene.go_on_and_check()
    print(f"seed {SEED}: {len(kinds)} calls {dict(Counter(kinds))}; {struck.total()} struck: {dict(struck)}")
    facts = {"seed": SEED, "calls": Counter(kinds), "struck": struck, "every_call_with_every_fault": ALL}
    report(f"io-calls-{build.__name__}-{where}", facts)
    assert struck.total() >= len([kind for kind in kinds if kind in DURABLE])
