"""One child process of a test: started, awaited by a condition, ended by its id."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# Below the range from which the kernel takes ports of outgoing connections, so a port stays free until it is bound.
PORTS = range(15_000, 32_000)
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class NotReady(Exception):
    """A service ended or stayed silent; the message carries the end of its log."""


def free_ports(count: int) -> list[int]:
    """Picks loopback ports that nothing listens on. Random, so parallel workers rarely meet."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def wait_until(what: str, condition: Callable[[], T | None], timeout_s: float = 60.0, pause_s: float = 0.05) -> T:
    """Asks `condition` until it answers something true and returns the answer; fails by name after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s in vain: {what}")
        # programs and tables of others tell nobody that they changed: they are asked again
        time.sleep(pause_s)


def http_ok(url: str) -> bool:
    """Whether a GET of `url` is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def cache_folder() -> Path:
    """Where `tests/services/install` put the programs; `tests/run` names it."""
    named = os.environ.get("TIDEMILL_TEST_SERVICES")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "tidemill" / "services"


def _end_with_the_parent() -> None:
    """A test run that is killed leaves no service behind."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Process:
    """A running service. `ready` is asked until it is true; a process that ends before that is an error."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        folder: Path,
        ready: Callable[[Process], bool],
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 240.0,
    ) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self._child = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_the_parent,
            )
        try:
            wait_until(f"{name} to be ready", lambda: self._check(ready), ready_timeout_s)
        except BaseException as error:
            self.kill()
            if isinstance(error, TimeoutError):
                raise NotReady(f"{error}\n{self._log_end()}") from error
            raise

    def _check(self, ready: Callable[[Process], bool]) -> bool:
        if self._child.poll() is not None:
            raise NotReady(f"{self.name} ended with {self._child.returncode} before it was ready\n{self._log_end()}")
        return ready(self)

    @property
    def pid(self) -> int:
        return self._child.pid

    def log(self) -> str:
        """What this life of the service printed so far."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _log_end(self) -> str:
        return self.log()[-4_000:]

    def stop(self, timeout_s: float = 20.0) -> None:
        """Asks the process to end, then ends it."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """`kill -9`, as a crash would."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
