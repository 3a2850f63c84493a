"""Maintenance as strangers see it: pyiceberg and DuckDB read the same rows, nothing that is named is missing, and nothing
that is not named is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table

from conftest import Corner
from events import event
from job import Job, Outcome, tidemill
from readers import DuckdbReader
from services import RestCatalog, S3Server
from services.s3 import SECRET_KEY
from truth import LogTruth

ROWS_PER_BATCH = 50
# commits that may follow the last pass over a table before its owner ends
LATER_COMMITS_MAX = 2
SECRETS = {"S3_SECRET_KEY": SECRET_KEY}
# manifests are merged early, and few metadata files are kept, so that a short test sees all of it
SMALL_TABLE = {"commit.manifest.min-count-to-merge": "5", "write.metadata.previous-versions-max": "4"}


class Warehouse:
    """A job, and the files of its tables as the storage has them."""

    def __init__(self, job: Job, root: str, folder: Path) -> None:
        self.job, self.root, self.folder = job, root, folder

    def table(self, name: str = "") -> Table:
        """The main table, or the one with this ending."""
        return self.job.open_catalog().load_table(self.job.table + name)

    def path(self, location: str) -> Path:
        """Where the storage keeps a file."""
        assert location.startswith(self.root), f"{location} is not below {self.root}"
        return self.folder / location.removeprefix(self.root).lstrip("/")

    def stored(self, table: Table) -> set[Path]:
        """Every file below the table's folder."""
        top = self.path(table.metadata.location)
        return {path for path in top.rglob("*") if path.is_file() and not path.name.endswith(".crc")}

    def named(self, table: Table) -> set[Path]:
        """Every file that the table's metadata names: of all snapshots, and the log of metadata files."""
        locations = {table.metadata_location, *(entry.metadata_file for entry in table.metadata.metadata_log)}
        for snapshot in table.snapshots():
            locations.add(snapshot.manifest_list)
            for manifest in snapshot.manifests(table.io):
                locations.add(manifest.manifest_path)
                locations |= {
                    entry.data_file.file_path for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                }
        return {self.path(location) for location in locations}

    def check(self, truth: LogTruth | None = None) -> None:
        """Nothing named is missing, nothing else is there, and both readers see the truth."""
        for name in ("", "_dead_letters"):
            table = self.table(name)
            named, stored = self.named(table), self.stored(table)
            assert not named - stored, f"{name}: named and gone: {sorted(map(str, named - stored))[:5]}"
            # a metadata file leaves the log with every commit, also with the release after the last pass
            old = {path for path in stored - named if path.name.endswith(".metadata.json")}
            assert len(old) <= LATER_COMMITS_MAX, f"{name}: old metadata files: {sorted(map(str, old))}"
            left = stored - named - old
            assert not left, f"{name}: there and not named: {sorted(map(str, left))[:5]}"
            assert table.metadata_location.endswith(".gz.metadata.json"), table.metadata_location
        if truth is not None:
            self.job.check_against(truth)

    def expire(self, *words: str, **more: Any) -> Outcome:
        """`table expire`."""
        return tidemill("table", "expire", self.job.path, "--json", "--yes", *words, **more)


@pytest.fixture(params=["sql and files", "rest and S3"])
def corner(request: pytest.FixtureRequest, place: Corner) -> Iterator[Any]:
    """Makes warehouses: on the embedded catalog, and on a REST catalog with S3."""
    if request.param == "sql and files":
        yield lambda topic, **fields: local(place, topic, **fields)
        return
    rest: RestCatalog = request.getfixturevalue("rest_catalog")
    s3: S3Server = request.getfixturevalue("s3")

    def on_s3(topic: str, **fields: Any) -> Warehouse:
        job = place.job(
            topic,
            catalog={
                "type": "rest",
                "uri": rest.uri,
                "warehouse": rest.warehouse,
                **s3.properties(),
            },
            s3=s3.properties(),
            # the tests of a worker share one bucket, and each has a catalog of its own
            table=f"events.n_{place.prefix.rsplit('-', 1)[1]}",
            **settings(fields),
        )
        job.catalog["s3.secret-access-key"] = "env:S3_SECRET_KEY"
        return Warehouse(job.write(), "s3://", s3.folder / "data")

    yield on_s3


def settings(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a job with small batches and a small table."""
    return {
        "microbatch": {"max_records": ROWS_PER_BATCH},
        "max_ratio": 0.5,
        "table_properties": SMALL_TABLE,
        "maintenance": {"every_commits": 0},
        **fields,
    }


def local(place: Corner, topic: str, **fields: Any) -> Warehouse:
    """A warehouse on the embedded catalog and a local folder."""
    return Warehouse(place.job(topic, **settings(fields)), "file://", Path("/"))


def feed(place: Corner, topic: str, first: int, batches: int) -> None:
    """So many batches of events, a refused one in each."""
    events = place.feed(topic)
    for number in range(first, first + batches * ROWS_PER_BATCH):
        bad = number % ROWS_PER_BATCH == 7
        events.send(event(number, event_type=None) if bad else event(number), flush=False)
    events.flush()


def test_after_expiry_the_tables_read_the_same_and_hold_nothing_else(place: Corner, corner: Any) -> None:
    topic = place.topic()
    home: Warehouse = corner(topic)
    feed(place, topic, 0, 6)
    home.job.run(environment=SECRETS).expect(0)
    tagged = home.table().current_snapshot()
    rows_tagged = home.table().scan().to_arrow().num_rows
    home.table().manage_snapshots().create_tag(tagged.snapshot_id, "savepoint").commit()
    feed(place, topic, 1_000, 12)
    home.job.run(environment=SECRETS).expect(0)
    truth = place.truth(topic)
    before = {snapshot.snapshot_id: snapshot for snapshot in home.table().snapshots()}

    would = home.expire("--older-than", "0s", "--retain-last", "3", "--dry-run", environment=SECRETS).expect(0).last
    assert {snapshot.snapshot_id for snapshot in home.table().snapshots()} == before.keys(), "a dry run changed it"
    done = home.expire("--older-than", "0s", "--retain-last", "3", environment=SECRETS).expect(0).last

    # the tagged one stays, and the ancestry down to the third dedup generation: the release and three microbatches
    assert would["dry_run"] and would["tables"][0]["snapshots_expired"] == len(before) - 1 - 4
    assert done["tables"][0]["snapshots_expired"] == len(before) - 1 - 4, "the fence stays with the newest generation"
    assert done["tables"][0]["manifests_merged"] == 18 and done["tables"][0]["manifests_written"] == 1, done
    home.check(truth)
    after = home.table()
    assert tagged.snapshot_id in {snapshot.snapshot_id for snapshot in after.snapshots()}
    assert after.scan(snapshot_id=tagged.snapshot_id).to_arrow().num_rows == rows_tagged
    for snapshot in after.snapshots():
        rows = after.scan(snapshot_id=snapshot.snapshot_id).to_arrow().num_rows
        assert rows == int(snapshot.summary.additional_properties["total-records"])

    feed(place, topic, 2_000, 2)
    home.job.run(environment=SECRETS).expect(0)
    home.job.check_against(truth.advance())


def test_a_run_maintains_by_itself_and_the_tables_stay_small(place: Corner, corner: Any) -> None:
    topic = place.topic(partitions=2)
    home: Warehouse = corner(topic, maintenance={"every_commits": 5, "max_snapshots": 12})
    sizes = []
    for wave in range(3):
        feed(place, topic, wave * 10_000, 15)
        outcome = home.job.run(environment=SECRETS).expect(0)
        assert outcome.of("maintained"), "a wave has more commits than one maintenance waits for"
        assert not outcome.of("notice"), outcome.of("notice")
        table = home.table()
        sizes.append(
            (len(table.snapshots()), len(table.metadata.metadata_log), len(table.current_snapshot().manifests(table.io)))
        )
    assert max(snapshots for snapshots, _, _ in sizes) <= 12 + 5 + 2, sizes
    assert max(log for _, log, _ in sizes) <= 4 and max(manifests for _, _, manifests in sizes) <= 12, sizes
    truth = place.truth(topic)
    home.job.check_against(truth)
    home.expire("--older-than", "0s", "--retain-last", "1", environment=SECRETS).expect(0)
    home.check(truth)


def test_what_other_engines_did_is_kept_and_what_only_they_forgot_is_let_be(place: Corner) -> None:
    topic = place.topic()
    home = local(place, topic)
    feed(place, topic, 0, 8)
    home.job.run().expect(0)
    table = home.table()
    rows = table.scan().to_arrow()
    removed = {home.path(task.file.file_path) for task in table.scan().plan_files()}
    table.delete(EqualTo("event_id", "event-000000003"))
    removed -= {home.path(task.file.file_path) for task in home.table().scan().plan_files()}
    assert len(removed) == 1, "a copy-on-write delete replaces one file"
    feed(place, topic, 1_000, 8)
    home.job.run().expect(0)
    table = home.table()
    foreign = rows.slice(0, 1).set_column(
        rows.schema.get_field_index("event_id"), rows.schema.field("event_id"), pa.array(["by hand"])
    )
    table.append(foreign)
    stray = home.path(table.metadata.location) / "data" / "part-00000-of-somebody.parquet"
    stray.write_bytes(b"not ours")

    home.expire("--older-than", "0s", "--retain-last", "1").expect(0)

    assert not any(path.exists() for path in removed), "the file of the deleted row had its last reader"
    assert stray.exists(), "files of other programs are left alone"
    stray.unlink()
    home.check()
    ids = home.job.reader().ids()
    truth = place.truth(topic)
    assert set(ids) == truth.events.keys() - {"event-000000003"} | {"by hand"} and len(ids) == len(set(ids))
    assert DuckdbReader(home.table().metadata_location).count() == len(ids)
    assert home.job.run().expect(0).last["counts"]["consumed"] == 0


# The places of a pass where a process may die, each with what it must leave: the rows, and a pass that cleans up.
PLACES = (
    "maintenance_intended", "maintenance_merged", "main_sent:2", "main_landed:2", "maintenance_landed",
    "maintenance_deleting", "maintenance_deleting:7", "maintenance_deleted", "maintenance_finished",
    "maintenance_swept",
)  # fmt: skip


def age(folder: Path, hours: int) -> None:
    """Lets every file look as if it were written so many hours earlier."""
    for path in folder.rglob("*"):
        if path.is_file():
            earlier = path.stat().st_mtime - hours * 3_600
            os.utime(path, (earlier, earlier))


def test_a_kill_at_each_step_of_maintenance_loses_nothing_and_the_next_cleans_up(place: Corner) -> None:
    topic = place.topic()
    home = local(place, topic)
    truth = place.truth(topic)
    for number, at in enumerate(PLACES):
        feed(place, topic, number * 1_000, 7)
        home.job.run().expect(0)
        truth.advance()
        words = ("--older-than", "0s", "--retain-last", "2")
        killed = home.expire(*words, environment={"TIDEMILL_CRASH_AT": at})
        assert killed.exit_code == -9, f"{at} was not reached (a build without the feature faults?)\n{killed.stderr}"
        home.job.check_against(truth)
        named, stored = home.named(home.table()), home.stored(home.table())
        assert not named - stored, f"after a kill at {at}: named and gone: {sorted(map(str, named - stored))[:5]}"
        # what a failed commit left is young, and nobody may ask for files that may be in the making: it is made older
        age(home.path(home.table().metadata.location).parent, hours=2)
        home.expire(*words, "--orphans-older-than", "1h").expect(0)
        home.check(truth)


def test_a_table_that_can_not_be_followed_or_expired_is_said_so(place: Corner) -> None:
    topic = place.topic()
    home = local(place, topic, maintenance={"every_commits": 3, "max_snapshots": 5})
    stop = home.expire().expect_stop(2, "USAGE")
    assert "no ledger" in stop["what"], stop
    feed(place, topic, 0, 2)
    home.job.run().expect(0)
    with home.table().transaction() as transaction:
        transaction.set_properties({"commit.manifest.min-count-to-merge": "many"})
    feed(place, topic, 1_000, 8)
    notices = home.job.run().expect(0).of("notice")
    assert notices and "commit.manifest.min-count-to-merge" in notices[0]["text"], "said, and the run goes on"
    assert len(notices) <= 3, "not once a batch"
    stop = home.expire().expect_stop(2, "USAGE")
    assert "can not be maintained" in stop["what"], stop
    with home.table().transaction() as transaction:
        transaction.set_properties({"commit.manifest.min-count-to-merge": "100", "gc.enabled": "false"})
    before = len(home.table().snapshots())
    home.expire().expect(0)
    assert len(home.table().snapshots()) >= before, "gc.enabled = false: nothing expires"
    home.job.check_against(place.truth(topic))
