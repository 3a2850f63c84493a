"""What the sweeps share: a job whose folder is put back before every fault, how it goes on afterwards, how it is judged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ledger
from job import Job, Outcome, tidemill
from truth import LogTruth

# A job that is not done after so many lives in peace makes no progress.
LIVES_MAX = 4
KILLED = -9
# How a run ends when the tests' broker does not answer in time, as it may on a busy machine. A supervisor starts it again.
SOURCE_AWAY = 11


@dataclass
class Scene:
    """A job before the command that a fault strikes; what the topics hold then, and stops that belong to the story."""

    job: Job
    truth: LogTruth
    command: list[str] = field(default_factory=lambda: ["run", "--json"])
    exit_code: int = 0
    stops: Collection[str] = ()
    # What the command is refused with where a life that was killed had done all of it.
    is_done: str | None = None
    # Whether no snapshot expires, so that every commit can be compared with the ranges that it names.
    is_history_kept: bool = True
    # What the command finds in its environment, besides the fault.
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Tables name their files by absolute paths: what is put back stands where it stood.
        self._kept = self.job.folder.with_name(f"{self.job.folder.name}.kept")
        shutil.copytree(self.job.folder, self._kept)

    def restore(self) -> Scene:
        """Everything as it was before the command, but for group offsets, which nothing reads."""
        shutil.rmtree(self.job.folder)
        shutil.copytree(self._kept, self.job.folder)
        return self

    def strike(self, *more: str, **environment: str) -> Outcome:
        """The command, with a fault that the environment names."""
        word, *options = self.command
        words = [*word.split(), self.job.path, *options, *more]
        return tidemill(*words, environment={**self.environment, **environment})

    def go_on(self) -> int:
        """Runs the job as its user would until it is done, following the commands that stops name; the number of runs."""
        for life in range(1, LIVES_MAX + 1):
            outcome = self.job.run()
            if outcome.exit_code == 0:
                return life
            stop = outcome.last
            if outcome.exit_code == SOURCE_AWAY:
                continue
            assert stop.get("reason") in self.stops, f"{outcome.command}: {outcome.stdout}\n{outcome.stderr}"
            self.job.follow(stop)
        raise AssertionError(f"not done after {LIVES_MAX} runs: {stop}")

    def check(self) -> None:
        """The tables, as others read them, are what the topics say; batches add up; the state is whole."""
        self.job.check_against(self.truth)
        table = self.job.reader().table
        if self.is_history_kept:
            ledger.check_conservation(table, self.truth)
        ends = ledger.full_offsets(ledger.full_record(table), "end")
        assert ends == self.truth.ends, "the ledger ends elsewhere than the topics"
        tidemill("state", "verify", self.job.path).expect(0)

    def go_on_and_check(self) -> None:
        """What must hold after any fault."""
        self.go_on()
        self.check()


def report(name: str, facts: dict[str, Any]) -> None:
    """Leaves the figures of a sweep for the reliability report, if a folder for them is named."""
    if folder := os.environ.get("TIDEMILL_REPORT_DIR"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
