"""Phases that a run passes, as it names them itself in the file of `TIDEMILL_TRACE_PHASES`."""

from __future__ import annotations

import time
from pathlib import Path

from job import Running

PHASES = (
    "start", "fenced", "read", "first_data_file_byte", "data_files_closed", "state_prepared", "main_sent",
    "main_landed", "sides_sent", "sides_landed", "published", "released",
)  # fmt: skip
# Data files exist or are being written, and the commit that names them has not been read back.
BEFORE_READ_BACK = {"first_data_file_byte", "data_files_closed", "state_prepared", "main_sent"}
BETWEEN_MAIN_AND_SIDE = {"main_landed", "sides_sent"}


class Trace:
    """The phases of one life of the program."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        self.environment = {"TIDEMILL_TRACE_PHASES": str(path)}

    def phases(self) -> list[str]:
        """Phases passed so far."""
        try:
            return self.path.read_text().split()
        except FileNotFoundError:
            return []

    def reached(self, phase: str, times: int, child: Running, timeout_s: float = 120.0) -> bool:
        """Watches closely until `phase` was passed so often; false if the program ended before."""
        deadline = time.monotonic() + timeout_s
        while self.phases().count(phase) < times:
            if child.poll() is not None:
                return self.phases().count(phase) >= times
            if time.monotonic() > deadline:
                raise TimeoutError(f"{phase} was not passed {times} times in {timeout_s} s: {self.phases()}")
            time.sleep(0.0002)
        return True
