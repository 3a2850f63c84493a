"""A drain of one job every five minutes: Airflow 2.4 or newer, on workers that keep the state folder.

Exit codes decide what becomes of a task: 0 done; 10 skipped, because a run in progress does the work; 11 to 19 retried;
everything else fails at once and is not retried, because a person decides.
"""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta

from airflow.decorators import dag, task
from airflow.exceptions import AirflowException, AirflowFailException, AirflowSkipException

COMMAND = ["tidemill", "run", "/etc/tidemill/small.toml", "--json", "--max-time", "1h"]
BUSY = 10
TRY_AGAIN = range(10, 20)


@dag(
    schedule="*/5 * * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=1)},
    tags=["tidemill"],
)
def tidemill_small() -> None:
    """One task: a drain reads everything that was there when it began."""

    # Airflow ends a task with SIGTERM to its process group: tidemill then commits what was read.
    @task
    def drain() -> None:
        code = subprocess.run(COMMAND, check=False).returncode
        if code == BUSY:
            raise AirflowSkipException("a run in progress does the work")
        if code in TRY_AGAIN:
            raise AirflowException(f"tidemill ended with {code}: tried again")
        if code != 0:
            raise AirflowFailException(f"tidemill ended with {code}: a person decides, see the log")

    drain()


tidemill_small()
