"""A command and what the kernel counted of it: time, processor, memory, under a hard limit that counts the page cache."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")
# between two looks at a process's peak; the peak itself misses nothing but what rises after the last look
LOOK_EVERY_SECONDS = 0.02
# what `Measured.limit` says of a command that nothing limits
NO_LIMIT = "none"


@dataclass
class Measured:
    """What one command cost."""

    exit_code: int
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    limit: str
    events: list[dict[str, Any]] = field(default_factory=list)
    stderr: str = ""

    def figures(self) -> dict[str, Any]:
        """For a report."""
        return {
            "seconds": round(self.seconds, 3), "cpu_seconds": round(self.cpu_seconds, 2),
            "peak_rss_bytes": self.peak_rss_bytes, "limit": self.limit,
        }  # fmt: skip


def measured(
    command: list[str], limit_bytes: int | None = None, beside: Callable[[Callable[[], float]], None] | None = None
) -> Measured:
    """Runs a command that prints JSON lines. Memory is its VmHWM: `exec` begins that anew, unlike what `wait4` hands over.

    Each line gets `seconds_printed`, from the start. `beside` is called at every look at the process, with that clock.
    """
    folder = _limited(limit_bytes) if limit_bytes else None
    prefix = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder)] if folder else []
    # what it prints goes to files, so that it never waits for a reader
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said_of_errors:
        begun = time.monotonic()
        child = subprocess.Popen([*prefix, *command], stdin=subprocess.DEVNULL, stdout=printed, stderr=said_of_errors)
        # when so many bytes had been printed
        marks: list[tuple[float, int]] = []
        try:
            # before it is reaped a process that ended has no memory any more: the last look at it while it lives counts
            peak_rss_bytes = 0
            while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                peak_rss_bytes = max(peak_rss_bytes, _peak_bytes(child.pid))
                marks.append((time.monotonic() - begun, os.fstat(printed.fileno()).st_size))
                if beside:
                    beside(lambda: time.monotonic() - begun)
                # a sample: a peak is asked for while the process lives, and nothing tells that it rose
                time.sleep(LOOK_EVERY_SECONDS)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            seconds = time.monotonic() - begun
            if folder:
                folder.rmdir()
        printed.seek(0)
        said_of_errors.seek(0)
        out, err = printed.read(), said_of_errors.read()
    lines = _stamped(out, [*marks, (seconds, len(out.encode()))])
    said = f"cgroup of {limit_bytes} bytes" if folder else NO_LIMIT
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(child.returncode, seconds, cpu_seconds, peak_rss_bytes, said, lines, err)


def _stamped(out: str, marks: list[tuple[float, int]]) -> list[dict[str, Any]]:
    """The JSON lines, each with the time of the first mark that has all of it."""
    lines: list[dict[str, Any]] = []
    end = number = 0
    for line in out.splitlines(keepends=True):
        end += len(line.encode())
        while marks[number][1] < end:
            number += 1
        if line.startswith("{"):
            lines.append({**json.loads(line), "seconds_printed": round(marks[number][0], 3)})
    return lines


def _peak_bytes(process: int) -> int:
    """VmHWM of a process, in bytes; 0 once it ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def _limited(limit_bytes: int) -> Path | None:
    of_version_1 = (VERSION_1 / "memory.limit_in_bytes").exists()
    folder = (VERSION_1 if of_version_1 else VERSION_2) / f"tidemill-bench-{os.getpid()}"
    try:
        if not of_version_1:
            (VERSION_2 / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if of_version_1 else "memory.max")).write_text(str(limit_bytes))
    except OSError:
        return None
    return folder
