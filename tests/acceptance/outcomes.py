"""What a sweep found, as JSON for a report: one file per case below `TIDEMILL_REPORT_DIR`, none if that is not set."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def record(sweep: str, case: str, **facts: Any) -> None:
    """Keeps the facts of one case of a sweep that was judged by its oracles."""
    named = os.environ.get("TIDEMILL_REPORT_DIR")
    if not named:
        return
    folder = Path(named) / sweep
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', case)}.json"
    path.write_text(json.dumps({"sweep": sweep, "case": case, **facts}, indent=1, sort_keys=True) + "\n")
