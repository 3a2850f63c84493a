"""One owner: later copies end busy, a takeover fences the first, and the table is exact whatever happened."""

import signal
import time
from contextlib import ExitStack

import ledger
import snapshots
from conftest import Corner
from events import event
from job import started, tidemill
from phases import Trace
from services import wait_until

BUSY = 10
FENCED = 20


def fill(place: Corner, topic: str, numbers: range) -> None:
    feed = place.feed(topic)
    for number in numbers:
        feed.send(event(number), flush=False)
        if number % 16 == 0:
            feed.send(event(number // 2), flush=False)
    feed.flush()


def next_second(due: float) -> None:
    """What cron does: waits for a moment of the clock."""
    wait_until("the next second", lambda: time.monotonic() >= due)


def test_a_copy_that_starts_while_another_works_ends_busy_and_the_work_gets_done(place: Corner) -> None:
    topic = place.topic(partitions=4)
    fill(place, topic, range(20_000))
    job = place.job(topic, microbatch={"max_records": 2_000})
    trace = Trace(place.folder / "phases")
    with started("run", job.path, "--json", environment=trace.environment) as first:
        assert trace.reached("first_data_file_byte", 1, first)
        first.send(signal.SIGSTOP)
        on_this_host = job.run(timeout_s=120).expect_stop(BUSY, "BUSY")
        elsewhere = job.run("--set", f"state_dir={place.folder}/other-state", timeout_s=120).expect_stop(BUSY, "BUSY")
        assert "in use" in on_this_host["what"] and "--takeover" in elsewhere["way_out"]
        snapshots.check("busy", tidemill("run", job.path).expect(BUSY).stderr)
        other_state = f"state_dir={place.folder}/other-state"
        snapshots.check("busy_elsewhere", tidemill("run", job.path, "--set", other_state).expect(BUSY).stderr)
        first.send(signal.SIGCONT)
        assert first.wait(120) == 0, first.output()
    job.check_against(place.truth(topic))


def test_copies_that_start_at_the_same_moment_never_both_write(place: Corner) -> None:
    topic = place.topic(partitions=4)
    job = place.job(topic, microbatch={"max_records": 1_000})
    codes: list[int] = []
    for round_number in range(3):
        fill(place, topic, range(round_number * 8_000, (round_number + 1) * 8_000))
        states = ["--set", f"state_dir={place.folder}/other-state"] if round_number == 2 else []
        with (
            started("run", job.path, "--json") as one,
            started("run", job.path, "--json", *states) as two,
            started("run", job.path, "--json") as three,
        ):
            codes_now = [child.wait() for child in (one, two, three)]
            assert set(codes_now) <= {0, BUSY}, [child.output() for child in (one, two, three)]
        codes += codes_now
        job.run("--set", f"state_dir={job.folder}/state").expect(0)
        truth = place.truth(topic)
        job.check_against(truth)
        ledger.check_conservation(job.reader().table, truth)
    print("exit codes of copies started together:", codes)
    assert 0 in codes and BUSY in codes


def test_a_scheduler_that_starts_a_run_every_second_gets_the_work_done(place: Corner) -> None:
    topic = place.topic(partitions=4)
    fill(place, topic, range(40_000))
    job = place.job(topic, microbatch={"max_records": 500})
    ticks = 10
    begin = time.monotonic()
    with ExitStack() as stack:
        children = []
        for tick in range(ticks):
            next_second(begin + tick)
            fill(place, topic, range(40_000 + tick * 200, 40_000 + (tick + 1) * 200))
            children.append(stack.enter_context(started("run", job.path, "--json")))
        codes = [child.wait() for child in children]
        assert set(codes) <= {0, BUSY}, [child.output() for child in children]
    print("exit codes, one start a second:", codes)
    assert BUSY in codes, "a start fell into the first run"
    job.run().expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def test_a_takeover_fences_the_first_owner(place: Corner) -> None:
    topic = place.topic(partitions=4)
    fill(place, topic, range(20_000))
    job = place.job(topic, microbatch={"max_records": 2_000})
    trace = Trace(place.folder / "phases")
    with started("run", job.path, "--json", environment=trace.environment) as first:
        assert trace.reached("first_data_file_byte", 2, first)
        first.send(signal.SIGSTOP)
        job.run("--takeover", "--set", f"state_dir={place.folder}/other-state").expect(0)
        first.send(signal.SIGCONT)
        assert first.wait(120) == FENCED, first.output()
        assert "FENCED" in first.output()
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)
    fill(place, topic, range(20_000, 21_000))
    job.run().expect(0)
    job.check_against(place.truth(topic))
