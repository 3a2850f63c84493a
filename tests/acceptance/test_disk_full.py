"""A disk that fills up under the warehouse or the state folder: a named stop, and the next run goes on."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ledger
import snapshots
from conftest import Corner
from events import event
from job import Job, tidemill

DISK_BYTES = 6 << 20
# Enough for the small files of a fence, too little for the data file or the state of what is read then.
LEFT_BYTES = 96 << 10


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A memory disk of `DISK_BYTES`; needs the right to mount."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tidemill-test", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_up(disk: Path) -> Path:
    """Takes all but `LEFT_BYTES` of the disk."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    space = os.statvfs(disk)
    ballast.write_bytes(b"\0" * (space.f_bavail * space.f_frsize - LEFT_BYTES))
    return ballast


def goes_on_after_a_full_disk(place: Corner, disk: Path, job: Job, name: str) -> None:
    topic = job.topics[0]
    feed = place.feed(topic)
    feed.send(*(event(number) for number in range(5_000)))
    job.run().expect(0)
    for number in range(60_000):
        feed.send(event(number), flush=False)
    feed.flush()
    fill_up(disk)
    job.run().expect_stop(14, "STORAGE_FAILED")
    ballast = fill_up(disk)
    for_people = tidemill("run", job.path).expect(14)
    assert str(disk) in for_people.stderr, "the message names the folder"
    snapshots.check(name, for_people.stderr.replace(str(disk), "<disk>"), place.prefix)
    left = {path.name for path in (job.warehouse / "events/notifications/data").rglob("*.parquet")}
    assert left == {Path(path).name for path in job.reader().files()}, "a dropped batch leaves no file that fills the disk"
    ballast.unlink()
    job.run().expect(0)
    truth = place.truth(topic)
    job.check_against(truth)
    ledger.check_chain(job.reader().table)


def test_a_full_disk_under_the_warehouse_stops_the_run_and_the_next_goes_on(place: Corner) -> None:
    with small_disk(place.folder / "disk") as disk:
        job = place.job(
            place.topic(partitions=2),
            catalog={
                "type": "sql",
                "uri": f"sqlite:{place.folder}/catalog.db",
                "warehouse": f"file://{disk}/warehouse",
            },
        )
        goes_on_after_a_full_disk(place, disk, job, "warehouse_disk_full")


def test_a_full_disk_under_the_state_folder_stops_the_run_and_the_next_goes_on(place: Corner) -> None:
    with small_disk(place.folder / "disk") as disk:
        goes_on_after_a_full_disk(
            place, disk, place.job(place.topic(partitions=2), state_dir=disk / "state"), "state_disk_full"
        )
