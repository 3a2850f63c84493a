"""The local state is disposable: lost, damaged or old, the next run has the keys again, from the table."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import ledger
from conftest import Corner
from events import event
from job import Job, started, tidemill
from phases import Trace

INTERRUPTED = 13


def lose(state: Path) -> None:
    shutil.rmtree(state)


def damage(state: Path) -> None:
    """Changes one byte in the middle of the largest file."""
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x40
    largest.write_bytes(content)


def cut_short(state: Path) -> None:
    """Cuts off the end of every file but the lock, as a disk that lost its last writes does."""
    for path in state.rglob("*"):
        if path.is_file() and path.name != "lock":
            path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("harm", [lose, damage, cut_short])
def test_a_state_that_is_gone_or_damaged_is_rebuilt_and_drops_every_repeat(
    place: Corner, harm: Callable[[Path], None]
) -> None:
    topic = place.topic(partitions=3)
    feed = place.feed(topic).send(*(event(number) for number in range(5_000)))
    job = place.job(topic)
    job.run().expect(0)
    harm(job.folder / "state")
    feed.send(*(event(number) for number in range(4_000, 6_000)))
    if harm is damage:
        # found by the first key that needs the page; the next run rebuilds
        assert "checksum" in job.run().expect_stop(14, "STORAGE_FAILED")["causes"][0]
    counts = job.run().expect(0).last["counts"]
    assert (counts["consumed"], counts["written"], counts["duplicate"]) == (2_000, 1_000, 1_000)
    tidemill("state", "verify", job.path).expect(0)
    feed.send(*(event(number) for number in range(6_000)))
    assert job.run().expect(0).last["counts"]["written"] == 0
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def test_a_state_folder_of_an_earlier_day_does_not_forget_what_was_written_since(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic).send(*(event(number) for number in range(1_000)))
    job = place.job(topic)
    job.run().expect(0)
    shutil.copytree(job.folder / "state", place.folder / "backup")
    feed.send(*(event(number) for number in range(1_000, 2_000)))
    job.run().expect(0)
    shutil.rmtree(job.folder / "state")
    shutil.copytree(place.folder / "backup", job.folder / "state")
    feed.send(*(event(number) for number in range(2_500)))
    assert job.run().expect(0).last["counts"]["written"] == 500
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def test_a_run_that_is_asked_to_end_gives_the_table_back_and_the_next_goes_on(place: Corner) -> None:
    topic = place.topic(partitions=2)
    feed = place.feed(topic)
    for number in range(40_000):
        feed.send(event(number), flush=False)
    feed.flush()
    job = place.job(topic, microbatch={"max_records": 500})
    trace = Trace(place.folder / "phases")
    with started("run", job.path, "--json", environment=trace.environment) as run:
        assert trace.reached("published", 2, run)
        run.send(signal.SIGTERM)
        assert run.wait(60) == INTERRUPTED, run.output()
    assert given_back(job), "a scheduler on another machine need not wait for the lease"
    job.run("--set", f"state_dir={place.folder}/elsewhere").expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def given_back(job: Job) -> bool:
    return ledger.full_record(job.reader().table)["released"]
