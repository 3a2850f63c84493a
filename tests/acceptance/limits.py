"""A hard limit of memory for one process: the kernel ends it there, page cache counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION_1 = Path("/sys/fs/cgroup/memory")
VERSION_2 = Path("/sys/fs/cgroup")


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[tuple[str, ...]]:
    """Makes a cgroup and gives the words to put before a command, so that it runs inside."""
    of_version_1 = (VERSION_1 / "memory.limit_in_bytes").exists()
    if not of_version_1:
        # refused where it is on already; the write of the limit tells
        (VERSION_2 / "cgroup.subtree_control").write_text("+memory")
    folder = (VERSION_1 if of_version_1 else VERSION_2) / f"tidemill-test-{os.getpid()}-{limit_bytes}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if of_version_1 else "memory.max")).write_text(str(limit_bytes))
        yield ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder))
    finally:
        folder.rmdir()
