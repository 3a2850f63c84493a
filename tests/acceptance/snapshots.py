"""What a user sees, kept as text beside the tests. `TIDEMILL_UPDATE_SNAPSHOTS=1` writes them anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"

# What differs from run to run, longest first.
VARIABLE = (
    (r"\x1b\[[0-9;]*m", ""),
    # how often the client library says that it can not connect depends on the moment
    (r"(?m)^\S+ +WARN librdkafka: .*\n", ""),
    (r", \d+ identical error\(s\) suppressed", ""),
    (r"path: [^\s,]+, written: \d+", "path: <path>, written: <bytes>"),
    # other tests' topics
    (r"; nearest: [^\n]*", ""),
    (r"file%3A[^\s'\"`,;:)]*", "<folder>"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z?", "<time>"),
    (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "<uuid>"),
    (r"<uuid>-[0-9a-f]{8}-\d{5}\.parquet", "<uuid>.parquet"),
    (r"127\.0\.0\.1:\d+", "<address>"),
    (r"(localhost|127\.0\.0\.1)/\d+", "<address>"),
    (r"(?<![\w.])/[^\s'\"`,;:)]*?/job/", "<folder>/"),
    (r"(?<![\w.])/[^\s'\"`,;:)]*/test_[^\s'\"`,;:)]*", "<folder>"),
    (r"snapshot \d+", "snapshot <id>"),
    (r"after \d+(\.\d+)? ?(ms|s)\b", "after <duration>"),
    (r"process \d+|pid \d+", "process <pid>"),
)  # fmt: skip


def check(name: str, text: str, prefix: str = "") -> None:
    """Fails with both texts if what the user sees is no longer what the snapshot holds."""
    for pattern, put in VARIABLE:
        text = re.sub(pattern, put, text)
    if prefix:
        text = text.replace(prefix, "<prefix>")
    text = text.strip() + "\n"
    path = FOLDER / f"{name}.txt"
    if os.environ.get("TIDEMILL_UPDATE_SNAPSHOTS") == "1":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists(), f"no snapshot {path.name}; look at this and set TIDEMILL_UPDATE_SNAPSHOTS=1:\n{text}"
    kept = path.read_text()
    assert text == kept, (
        f"{path.name} differs; if this is better, set TIDEMILL_UPDATE_SNAPSHOTS=1\n--- kept\n{kept}--- now\n{text}"
    )
