"""`run --continuous` on the real Kafka: signals and kills at random moments, services that go away, new topic partitions.

`TIDEMILL_TEST_SIGNALS` is the number of random moments of SIGTERM (6), `TIDEMILL_TEST_LIVES` that of `kill -9` (4).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

from confluent_kafka import Producer

import ledger
from conftest import Corner
from events import event
from job import Job, Running, started
from phases import Trace
from services import Broker, RestCatalog, S3Server, wait_until
from sweep import report
from test_random_kills import Load

SEED = 20_261_122
SIGNALS = int(os.environ.get("TIDEMILL_TEST_SIGNALS", "6"))
LIVES = int(os.environ.get("TIDEMILL_TEST_LIVES", "4"))
INTERRUPTED = 13
SECOND_SIGNAL = 130
MOMENT_S_MAX = 1.5
SOON: dict[str, str | int] = {"max_interval": "150ms", "max_records": 2_000}
LOOKS_OFTEN = {"topic.metadata.refresh.interval.ms": "300", "reconnect.backoff.max.ms": "1000"}


def await_rows(job: Job, count: int, run: Running) -> None:
    """Until the table shows so many rows to a reader of another make."""

    def shown() -> bool:
        assert run.poll() is None, run.output()
        # before its first commit there may be no table, nor a catalog
        return '"event":"commit"' in run.output() and job.reader().count() >= count

    wait_until(f"{count} rows", shown, 120)


def await_line(run: Running, word: str, times: int = 1) -> None:
    """Until the run has printed a word so often."""

    def printed() -> bool:
        assert run.poll() is None, run.output()
        return run.output().count(word) >= times

    wait_until(word, printed, 180)


def check(place: Corner, job: Job, topic: str) -> int:
    truth = place.truth(topic)
    job.check_against(truth)
    return len(ledger.check_conservation(job.reader().table, truth))


def test_sigterm_at_random_moments_commits_what_was_read_and_the_next_start_goes_on(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch=SOON, max_ratio=0.5)
    draws = random.Random(SEED)
    last_phases: list[str] = []
    starts: list[float] = []
    load = Load(place, topic)
    load.start()
    try:
        for _ in range(SIGNALS):
            load.add_life()
            trace = Trace(job.folder / "phases")
            begun = time.monotonic()
            with started("run", job.path, "--continuous", "--json", environment=trace.environment) as run:
                assert trace.reached("read", 1, run)
                starts.append(time.monotonic() - begun)
                try:
                    # the moment of the signal is the fault
                    run.wait(timeout_s=draws.uniform(0, MOMENT_S_MAX))
                except subprocess.TimeoutExpired:
                    last_phases.append(trace.phases()[-1])
                    run.send(signal.SIGTERM)
                assert run.wait(60) == INTERRUPTED, run.output()
            assert ledger.full_record(job.reader().table)["released"], "the next start need not wait for the lease"
    finally:
        load.end()
    job.run().expect(0)
    commits = check(place, job, topic)
    print(f"seed {SEED}: {SIGNALS} signals after {last_phases}; from start to reading {max(starts):.2f} s at most")
    report("sigterm", {"seed": SEED, "signals": SIGNALS, "after": last_phases, "start_s": starts, "commits": commits})


def test_kills_at_random_moments_of_a_run_without_end_leave_the_tables_exact(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch=SOON, max_ratio=0.5)
    draws = random.Random(SEED)
    last_phases = []
    load = Load(place, topic)
    load.start()
    try:
        for _ in range(LIVES):
            load.add_life()
            trace = Trace(job.folder / "phases")
            with started("run", job.path, "--continuous", "--json", environment=trace.environment) as run:
                assert trace.reached("read", 1, run)
                try:
                    # the moment of the kill is the fault
                    run.wait(timeout_s=draws.uniform(0, MOMENT_S_MAX))
                except subprocess.TimeoutExpired:
                    run.kill()
                last_phases.append(trace.phases()[-1])
    finally:
        load.end()
    job.run().expect(0)
    commits = check(place, job, topic)
    print(f"seed {SEED}: {LIVES} kills after {last_phases}, {commits} commits")
    report("continuous-kills", {"seed": SEED, "kills": LIVES, "after": last_phases, "commits": commits})


def test_a_second_signal_ends_it_at_once_and_loses_nothing(place: Corner) -> None:
    topic = place.topic()
    job = place.job(topic, microbatch=SOON)
    feed = place.feed(topic)
    for number in range(3_000):
        feed.send(event(number), flush=False)
    feed.flush()
    trace = Trace(job.folder / "phases")
    with started("run", job.path, "--continuous", "--json", environment=trace.environment) as run:
        assert trace.reached("first_data_file_byte", 1, run)
        # asleep, so that both signals wait for it
        run.send(signal.SIGSTOP)
        run.send(signal.SIGTERM)
        run.send(signal.SIGINT)
        run.send(signal.SIGCONT)
        assert run.wait(60) in (SECOND_SIGNAL, INTERRUPTED), run.output()
    job.run().expect(0)
    check(place, job, topic)


def test_topic_partitions_that_are_added_are_read_from_their_beginning(place: Corner) -> None:
    topic = place.topic(partitions=1)
    job = place.job(
        topic, microbatch=SOON, kafka={"bootstrap.servers": place.broker.bootstrap, **LOOKS_OFTEN}
    )
    feed = place.feed(topic)
    with started("run", job.path, "--continuous", "--json") as run:
        for number in range(100):
            feed.send(event(number), flush=False)
        feed.flush()
        await_rows(job, 100, run)
        place.broker.add_partitions(topic, 3)
        again = place.feed(topic)
        # before the run can know of them
        for number in range(50, 200):
            again.send(event(number), partition=number % 3, flush=False)
        again.flush()
        await_rows(job, 200, run)
        assert "new topic partitions" in run.output()
        run.send(signal.SIGTERM)
        assert run.wait(60) == INTERRUPTED, run.output()
    check(place, job, topic)


def test_records_behind_an_open_transaction_are_named(place: Corner) -> None:
    topic = place.topic()
    job = place.job(topic, microbatch=SOON, kafka={"bootstrap.servers": place.broker.bootstrap, **LOOKS_OFTEN})
    hangs = Producer({"bootstrap.servers": place.broker.bootstrap, "transactional.id": topic, "log_level": 2})
    hangs.init_transactions(60)
    with started("run", job.path, "--continuous", "--json") as run:
        send(place, topic, range(0, 10))
        await_rows(job, 10, run)
        hangs.begin_transaction()
        hangs.produce(topic, json.dumps(event(10)))
        hangs.flush(60)
        send(place, topic, range(11, 14))
        await_line(run, "behind an open transaction")
        assert f"{topic}[0] gives nothing beyond offset 10: " in run.output()
        hangs.commit_transaction(60)
        await_rows(job, 14, run)
        run.send(signal.SIGTERM)
        assert run.wait(60) == INTERRUPTED, run.output()
    check(place, job, topic)


def test_a_broker_and_a_catalog_that_go_away_are_said_once_each_and_the_run_goes_on(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server
) -> None:
    with Broker(place.folder / "own-broker") as broker:
        own = Corner(place.folder / "own", broker, "away")
        topic = own.topic(partitions=2)
        job = own.job(
            topic, microbatch=SOON,
            kafka={"bootstrap.servers": broker.bootstrap, "socket.connection.setup.timeout.ms": "2000", **LOOKS_OFTEN},
            catalog={
                "type": "rest", "uri": rest_catalog.uri, "warehouse": rest_catalog.warehouse,
                **s3.properties(), "s3.secret-access-key": "env:S3_SECRET_KEY",
            },
            s3=s3.properties(),
        )  # fmt: skip
        secrets = {"S3_SECRET_KEY": s3.properties()["s3.secret-access-key"]}
        with started("run", job.path, "--continuous", "--json", environment=secrets) as run:
            send(own, topic, range(0, 500))
            await_rows(job, 500, run)
            broker.stop()
            await_line(run, '"event":"away"')
            broker.start()
            send(own, topic, range(300, 900))
            await_line(run, '"event":"back"')
            await_rows(job, 900, run)
            rest_catalog.__exit__(None, None, None)
            send(own, topic, range(700, 1_200))
            await_line(run, '"event":"away"', 2)
            rest_catalog.__enter__()
            await_line(run, '"event":"back"', 2)
            await_rows(job, 1_200, run)
            run.send(signal.SIGTERM)
            assert run.wait(60) == INTERRUPTED, run.output()
            said = [line for line in run.output().splitlines() if '"event":"away"' in line]
        assert len(said) == 2 and "SOURCE_AWAY" in said[0], said
        check(own, job, topic)


def send(place: Corner, topic: str, numbers: range) -> None:
    feed = place.feed(topic)
    for number in numbers:
        feed.send(event(number), flush=False)
    feed.flush()
