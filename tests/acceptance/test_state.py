"""The local state is disposable: lost, damaged or old, the next run has the keys again, from the table."""

import fcntl
import shutil
import signal
from collections.abc import Callable, Iterable
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


def test_a_damaged_file_is_told_by_its_byte_and_set_aside_once_no_run_uses_the_folder(place: Corner) -> None:
    topic = place.topic()
    feed = place.feed(topic).send(*(event(number) for number in range(3_000)))
    job = place.job(topic)
    job.run().expect(0)
    folder = only(path.parent for path in (job.folder / "state").rglob("lock"))
    segment = only(folder.glob("*.segment"))
    newest = max(folder.glob("*.manifest"))
    whole = tidemill("state", "inspect", segment, newest, "--pages", "--json")
    facts, manifest = whole.expect(0).of("state_file")
    assert (facts["kind"], facts["keys"], facts["pages_read"]) == ("segment", 3_000, True)
    assert (manifest["kind"], manifest["keys"]) == ("manifest", 3_000)
    assert [entry["name"] for entry in manifest["says"]["segments"]] == [segment.name]

    damage(folder)
    damaged = max(folder.glob("*"), key=lambda path: path.stat().st_size)
    told = tidemill("state", "inspect", damaged, "--pages", "--json").expect_stop(14, "STORAGE_FAILED")
    assert "byte" in told["what"]
    with (folder / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        beside = tidemill("state", "verify", job.path, "--json").expect_stop(14, "STORAGE_FAILED")
    assert "stays where it is" in beside["way_out"] and f"state verify {job.path}" in beside["way_out"]
    assert damaged.exists()
    tidemill("state", "verify", job.path, "--json").expect_stop(14, "STORAGE_FAILED")
    aside = damaged.with_name(damaged.name + ".damaged")
    assert aside.exists() and not damaged.exists()
    tidemill("state", "inspect", aside, "--pages", "--json").expect_stop(14, "STORAGE_FAILED")
    other = tidemill("state", "inspect", job.path, folder / "lock", "--json")
    assert "lock of a state folder" in other.expect_stop(2, "USAGE")["what"]
    feed.send(*(event(number) for number in range(3_500)))
    assert job.run().expect(0).last["counts"]["written"] == 500
    tidemill("state", "verify", job.path).expect(0)


def test_a_plan_shows_what_a_state_costs_beside_the_state_that_is_there(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(2_000)))
    job = place.job(topic)
    assert tidemill("state", "plan", job.path, "--json").expect(0).last["actual"] is None
    job.run().expect(0)
    plan = tidemill("state", "plan", job.path, "--keys", "1e9,1e11", "--rate", "1e6/s", "--json").expect(0).last
    assert plan["actual"]["keys"] == 2_000
    disk = [row["sizing"]["disk_live_bytes"] / row["workload"]["keys"] for row in plan["rows"]]
    assert len(disk) == 2 and all(8 < bytes_per_key < 11 for bytes_per_key in disk), disk
    assert plan["rows"][0]["workload"]["repeats"] == "any_time", "the job's own"


def only(paths: Iterable[Path]) -> Path:
    """The one path that there is."""
    (path,) = paths
    return path


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
