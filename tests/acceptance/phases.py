"""Phases that a run passes, as it names them itself in the file of `TIDEMILL_TRACE_PHASES`."""

from __future__ import annotations

from pathlib import Path

from job import Running
from services import wait_until

# In the order of one life: those of the start, those of each microbatch, those of the end. Every commit names itself
# `main_sent` and `main_landed` in the trace; a fence and a release are told apart from a microbatch by where they stand.
PHASES = (
    "start", "verified", "fence_sent", "fence_landed", "fenced",
    "read", "first_data_file_byte", "data_files_closed", "state_prepared", "main_sent", "main_landed", "sides_sent",
    "sides_landed", "published",
    "release_sent", "release_landed", "released",
)  # fmt: skip


def named(trace: list[str]) -> list[str]:
    """The phases of a trace, with the commits of a fence and of a release under names of their own."""
    names, stage = [], "fence"
    for phase in trace:
        if phase in ("read", "published"):
            stage = "main" if phase == "read" else "release"
        names.append(phase.replace("main_", f"{stage}_") if phase.startswith("main_") else phase)
    return names


def last_batch(names: list[str]) -> list[str]:
    """The phases of the microbatch that was begun last."""
    begun = len(names) - names[::-1].index("read") if "read" in names else len(names)
    return names[begun:]


def is_before_read_back(names: list[str]) -> bool:
    """Data files exist or are being written, and the commit that names them has not been read back."""
    batch = last_batch(names)
    return "first_data_file_byte" in batch and "main_landed" not in batch


def is_between_main_and_side(names: list[str]) -> bool:
    """Main names files that the side table does not have yet. Every microbatch must hold a refused row for this."""
    return names[-1:] in (["main_landed"], ["sides_sent"])


class Trace:
    """The phases of one life of the program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.environment = {"TIDEMILL_TRACE_PHASES": str(path)}

    def phases(self) -> list[str]:
        """Phases passed so far."""
        try:
            return named(self.path.read_text().split())
        except FileNotFoundError:
            return []

    def reached(
        self, phase: str, times: int, child: Running, timeout_s: float = 120.0, pause_s: float = 0.0002
    ) -> bool:
        """Watches closely, unless told to pause longer, until `phase` was passed so often; false if the program ended before."""
        wait_until(
            f"{times} times {phase}",
            lambda: child.poll() is not None or self.phases().count(phase) >= times, timeout_s, pause_s,
        )  # fmt: skip
        return self.phases().count(phase) >= times
