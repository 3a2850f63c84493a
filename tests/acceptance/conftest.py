"""What every acceptance test gets: real services, started once per worker, and topics and folders of its own."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from events import Feed
from job import Job
from services import Broker, RestCatalog, S3Server
from truth import LogTruth

# Started first, so that no worker is left with a long test at the end.
LONG = (
    "test_a_kill_at_every_point", "test_a_failed_call_ends", "test_a_copy_that_slept", "test_four_waves",
    "test_sixty_kills", "test_a_broker_and_a_catalog", "test_a_wave_through", "test_the_demo_writes", "test_a_demo_that_is",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first; the others stay as they stand."""
    items.sort(
        key=lambda item: next((place for place, name in enumerate(LONG) if item.name.startswith(name)), len(LONG))
    )


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """One broker for all tests of this worker; each test has topics of its own."""
    with Broker(tmp_path_factory.mktemp("broker") / "kafka") as broker:
        yield broker


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for all tests of this worker."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def rest_catalog(tmp_path: Path, s3: S3Server) -> Iterator[RestCatalog]:
    """A REST catalog with its warehouse on the S3 server."""
    with RestCatalog(tmp_path / "rest-catalog", s3) as catalog:
        yield catalog


class Corner:
    """A test's corner: a folder, a prefix for its topics, and makers of jobs, feeds and truths on them."""

    def __init__(self, folder: Path, broker: Broker, name: str) -> None:
        self.folder = folder
        self.broker = broker
        self.prefix = f"{name}-{uuid.uuid4().hex[:6]}"

    def topic(self, name: str = "events", partitions: int = 1, **config: str) -> str:
        """Creates a topic under the test's prefix."""
        self.broker.create_topic(f"{self.prefix}.{name}", partitions, **config)
        return f"{self.prefix}.{name}"

    def feed(self, topic: str) -> Feed:
        """A producer of hand-made events."""
        return Feed(self.broker.bootstrap, topic)

    def truth(self, *topics: str, keep_rows: bool = True) -> LogTruth:
        """The truth of these topics as far as they hold anything yet."""
        return LogTruth(self.broker.bootstrap, list(topics), keep_rows).advance()

    def job(self, *topics: str, **fields: object) -> Job:
        """A job on these topics with an embedded catalog and local warehouse."""
        defaults = {"kafka": {"bootstrap.servers": self.broker.bootstrap}, "folder": self.folder / "job"}
        return Job(topics=list(topics), **{**defaults, **fields})  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path, broker: Broker, request: pytest.FixtureRequest) -> Corner:
    """The test's corner."""
    return Corner(tmp_path, broker, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40])
