"""Network faults between the program and Kafka, the REST catalog and S3, each at a named request.

A run under a fault ends well or stops with a reason that says "try again later"; the run after it finishes, and the
tables are exact: every event once, every refused place once, a ledger without gaps, no file twice.

`TIDEMILL_NETWORK_CASES` is how many cases of the table run: a number, or `all`. By default a sample of quick ones does.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import pytest

import ledger
import outcomes
from conftest import Corner
from events import event
from job import Job
from readers import PyicebergReader
from services import Broker, Fault, Listener, Proxy, RestCatalog, S3Server, free_ports
from services.proxy import Kind

SEED = 20_260_705
SAMPLE = 12
TRY_AGAIN_LATER = range(10, 20)
PARTITIONS = 2
EVENTS_PER_PARTITION = 150
# A run under a fault that never ends must end: patience of the program, and room for a machine that is busy.
RUN_S_MAX = 900


@dataclass(frozen=True)
class Case:
    """One fault at one moment of one path."""

    path: Literal["kafka", "catalog", "s3"]
    kind: Kind
    requests: str
    first: int = 1
    lasts: bool = False
    status: int = 503
    is_first_run: bool = True

    @property
    def name(self) -> str:
        """Unique in the table."""
        status = f"-{self.status}" if self.kind.startswith("status") else ""
        what = f"{self.path}-{self.kind}{status}-{self.requests}-{self.first}".replace(" ", "_").replace("/", ":")
        return what + ("-lasting" if self.lasts else "") + ("" if self.is_first_run else "-later")

    @property
    def is_slow(self) -> bool:
        """Whether the program's patience is what takes the time."""
        return self.lasts or self.kind.startswith("silence")


# By path: requests as the proxy names them, at which hits of them, and what can go wrong there.
MOMENTS: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "catalog": [
        (r"GET /v1/config", (1,)),
        (r"(HEAD|GET) /v1/namespaces/", (1, 4)),
        (r"POST /v1/namespaces/[^/]+/tables$", (1, 2)),
        (r"POST .*/tables/n\w+_dead_letters$", (1, 2)),
        (r"POST .*/tables/n[^_]+$", (1, 2, 4)),
        (r"GET .*/tables/n[^_]+$", (1, 3, 6)),
    ],
    "s3": [
        (r"PUT .*/data/.*parquet", (1, 3)),
        (r"PUT .*/metadata/.*avro", (1, 4)),
        (r"GET .*/metadata/.*(json|avro)", (1, 3)),
    ],
    "kafka": [
        (r"^ApiVersions$", (1, 3)),
        (r"^Metadata$", (1, 2)),
        (r"^DescribeTopicPartitions$|^DescribeCluster$", (1,)),
        (r"^ListOffsets$", (1, 2)),
        (r"^Fetch$", (1, 2, 4)),
        (r"^(OffsetCommit|FindCoordinator)$", (1,)),
    ],
}
HTTP_KINDS: tuple[tuple[Kind, int], ...] = (
    ("cut", 0), ("drop reply", 0), ("reset", 0), ("truncate", 0), ("delay", 0), ("slow", 0), ("duplicate", 0),
    ("status before", 503), ("status before", 500), ("status before", 429), ("status after", 500),
    ("status after", 503), ("status after", 409), ("garbage before", 0), ("garbage after", 0), ("silence", 0),
    ("silence after", 0),
)  # fmt: skip
KAFKA_KINDS: tuple[tuple[Kind, int], ...] = (
    ("cut", 0), ("drop reply", 0), ("reset", 0), ("delay", 0), ("slow", 0), ("garbage before", 0), ("garbage after", 0),
    ("silence", 0), ("silence after", 0),
)  # fmt: skip

# Those that leave open what was done come first.
KINDS_IN_TURN: tuple[Kind, ...] = (
    "drop reply", "status after", "duplicate", "cut", "garbage after", "reset", "truncate", "status before",
    "garbage before", "delay", "slow", "silence", "silence after",
)  # fmt: skip


def happens(requests: str, kind: Kind, status: int) -> bool:
    """Whether a service can do this to such a request: nothing conflicts with a question, and a store that acknowledges
    what it did not store is outside of what its clients can see."""
    is_post = "POST" in requests
    return not (status == 409 and not is_post) and not (kind == "garbage before" and "PUT" in requests)


def table_of_cases() -> list[Case]:
    """Every path, moment and kind; hit, first run or later and whether the fault lasts are drawn by the seed."""
    draws = random.Random(SEED)
    cases = []
    for path, moments in MOMENTS.items():
        for requests, hits in moments:
            creates = "tables$" in requests
            for kind, status in KAFKA_KINDS if path == "kafka" else HTTP_KINDS:
                if not happens(requests, kind, status):
                    continue
                lasts = kind not in ("delay", "slow", "duplicate") and not kind.startswith("silence")
                cases.append(
                    Case(
                        path, kind, requests, draws.choice(hits), lasts and draws.random() < 0.2, status,  # type: ignore[arg-type]
                        is_first_run=creates or draws.random() < 0.5,
                    )
                )  # fmt: skip
    draws.shuffle(cases)
    return cases


def chosen() -> list[Case]:
    """What this run of the tests does: quick cases first, the paths in turn, and of a path the kinds in turn."""
    asked = os.environ.get("TIDEMILL_NETWORK_CASES", str(SAMPLE))
    cases = sorted(table_of_cases(), key=lambda case: case.is_slow)
    if asked == "all":
        return cases
    # the cases of a path and kind are numbered, quick ones first; those that change something before those that ask
    order: dict[Case, tuple[bool, int, int, str]] = {}
    for path in MOMENTS:
        for place, kind in enumerate(KINDS_IN_TURN):
            of_kind = [case for case in cases if (case.path, case.kind) == (path, kind)]
            of_kind.sort(key=lambda case: (case.is_slow, not re.search("POST|PUT|Fetch", case.requests)))
            order |= {case: (case.is_slow, number, place, path) for number, case in enumerate(of_kind)}
    return sorted(cases, key=order.__getitem__)[: int(asked)]


class Net:
    """The three services with a proxy before each."""

    def __init__(self, broker: Broker, kafka: Listener, catalog: RestCatalog, s3: S3Server, proxies: ExitStack) -> None:
        assert kafka.advertised_port is not None
        self.broker = broker
        self.catalog = catalog
        self.kafka_bootstrap = kafka.bootstrap
        self.kafka = proxies.enter_context(Proxy(kafka.port, "kafka", kafka.advertised_port))
        self.rest = proxies.enter_context(Proxy(catalog.port, "http"))
        self.s3_proxy = proxies.enter_context(Proxy(s3.port, "http"))
        self.s3_properties = s3.properties()

    @property
    def proxies(self) -> dict[str, Proxy]:
        """By the path's name."""
        return {"kafka": self.kafka, "catalog": self.rest, "s3": self.s3_proxy}

    def job(self, place: Corner, topic: str) -> Job:
        """A job that reaches every service through its proxy; the readers of its tables go round them."""
        return NetJob(
            folder=place.folder / "job",
            topics=[topic],
            kafka={"bootstrap.servers": self.kafka_bootstrap},
            # a namespace of its own, so that it is made under the fault too
            table=f"{place.prefix.rsplit('-', 1)[1]}.n{place.prefix.rsplit('-', 1)[1]}",
            catalog={
                "type": "rest",
                "uri": f"http://127.0.0.1:{self.rest.port}",
                "warehouse": self.catalog.warehouse,
                **self.s3_properties,
                "s3.endpoint": f"http://127.0.0.1:{self.s3_proxy.port}",
                "s3.secret-access-key": "env:S3_SECRET_KEY",
            },
            s3=self.s3_properties,
            microbatch={"max_records": 120},
            max_ratio=0.5,
        )


class NetJob(Job):
    """A job whose S3 key stands in the environment."""

    def run(self, *words: str, environment: dict[str, str] | None = None, timeout_s: float = RUN_S_MAX):  # type: ignore[no-untyped-def]  # noqa: ANN201
        secret = {"S3_SECRET_KEY": (self.s3 or {})["s3.secret-access-key"]}
        return super().run(*words, environment={**secret, **(environment or {})}, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Net]:
    """A broker that tells its clients the proxy's port, a catalog, an S3 server, and the proxies."""
    folder = tmp_path_factory.mktemp("net")
    listener = Listener("PROXIED", advertised_port=free_ports(1)[0])
    with (
        Broker(folder / "kafka", listeners=[listener]) as broker,
        RestCatalog(folder / "rest-catalog", s3) as catalog,
        ExitStack() as proxies,
    ):
        yield Net(broker, listener, catalog, s3, proxies)


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_a_network_fault_loses_nothing_and_doubles_nothing(
    net: Net, tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    place = Corner(tmp_path_factory.mktemp("case"), net.broker, "net")
    topic = place.topic(partitions=PARTITIONS)
    job = net.job(place, topic)
    draws = random.Random(f"{SEED} {case.name}")
    sent = 0
    if not case.is_first_run:
        sent = send(place, topic, draws, sent)
        job.run().expect(0)
    send(place, topic, draws, sent)
    fault = net.proxies[case.path].inject(
        Fault(case.kind, case.requests, case.first, None if case.lasts else 1, case.status)
    )
    begun = time.monotonic()
    try:
        under_fault = job.run()
    finally:
        net.proxies[case.path].lift()
    seconds = time.monotonic() - begun
    if under_fault.exit_code != 0:
        stop = under_fault.last
        # bytes of a table that were exchanged on the way can not be told from a table that is damaged
        is_exchanged = case.path == "s3" and case.kind.startswith("garbage") and stop.get("reason") == "UNEXPECTED"
        assert (under_fault.exit_code in TRY_AGAIN_LATER or is_exchanged) and stop.get("event") == "stop", (
            f"{case.name}: {under_fault.stdout[-3000:]}\n{under_fault.stderr[-3000:]}"
        )
        assert stop["what"].strip() and stop["way_out"].strip(), stop
    job.run().expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    table = job.reader().table
    ledger.check_conservation(table, truth)
    files = PyicebergReader(table).files()
    assert len(files) == len(set(files)), "a data file stands twice"
    outcomes.record(
        "network", case.name, path=case.path, kind=case.kind, requests=case.requests, first=case.first, lasts=case.lasts,
        hits=fault.hits, exit_code=under_fault.exit_code, reason=under_fault.last.get("reason"), seconds=round(seconds, 1),
    )  # fmt: skip


def send(place: Corner, topic: str, draws: random.Random, first: int) -> int:
    """Events, repeats of earlier ones and refused rows; the number of the next event."""
    feed = place.feed(topic)
    last = first + PARTITIONS * EVENTS_PER_PARTITION
    for number in range(first, last):
        feed.send(event(number), flush=False)
        if draws.random() < 0.3:
            feed.send(event(draws.randrange(number + 1)), flush=False)
        if draws.random() < 0.05:
            feed.send(event(number, event_type=None), flush=False)
    feed.flush()
    return last


def test_the_table_of_cases_has_every_path_and_kind() -> None:
    cases = table_of_cases()
    assert len(cases) >= 60 and len({case.name for case in cases}) == len(cases)
    assert {case.path for case in cases} == MOMENTS.keys()
    assert {case.kind for case in cases} == {kind for kind, _ in (*HTTP_KINDS, *KAFKA_KINDS)} == set(KINDS_IN_TURN)
