"""Savepoints and copies of the dedup state on a REST catalog and S3, as strangers see them: pyiceberg reads tags, snapshots
and rows; the truth is recomputed from the topic."""

from __future__ import annotations

import json
import random
import shutil
import signal
from typing import Any

import pytest
from pyiceberg.table import Table

import ledger
from conftest import Corner
from events import NOW_MS, event
from job import Job, Outcome, started, tidemill
from services import RestCatalog, S3Server, wait_until
from services.s3 import SECRET_KEY
from truth import LogTruth

SEED = 20_260_303
EVENTS_PER_WAVE = 1_500
BEGIN_MS = NOW_MS - 20 * 24 * 3_600_000
SECRETS = {"S3_SECRET_KEY": SECRET_KEY}
TAG = "tidemill-savepoint-before"
REQUEST = "tidemill.request."


class Story:
    """A job on the REST catalog and S3, with waves of events: repeats near and far, refused ones, and late ones."""

    def __init__(self, place: Corner, rest: RestCatalog, s3: S3Server) -> None:
        self.place, self.topic = place, place.topic(partitions=2)
        self.draws = random.Random(SEED)
        self.next = 0
        self.copies = s3.folder / "data" / s3.bucket / "copies" / place.prefix
        self.copy_to = f"state.copy_to=s3://{s3.bucket}/copies/{place.prefix}"
        self.job: Job = place.job(
            self.topic,
            catalog={"type": "rest", "uri": rest.uri, "warehouse": rest.warehouse, **s3.properties()},
            s3=s3.properties(),
            table=f"events.n_{place.prefix.rsplit('-', 1)[1]}",
            max_ratio=0.5,
        )
        self.job.catalog["s3.secret-access-key"] = "env:S3_SECRET_KEY"
        self.job.write()

    def wave(self) -> None:
        """Events in seven hours of event time, one in fifty a day behind."""
        sender = self.place.feed(self.topic)
        for number in range(self.next, self.next + EVENTS_PER_WAVE):
            ts = BEGIN_MS + number * 17_000 - (24 * 3_600_000 if number % 50 == 7 else 0)
            sender.send(event(number, ts=ts), flush=False)
            if self.draws.random() < 0.2:
                again = self.draws.randrange(number + 1)
                late = 24 * 3_600_000 if again % 50 == 7 else 0
                sender.send(event(again, ts=BEGIN_MS + again * 17_000 - late), flush=False)
            if self.draws.random() < 0.05:
                sender.send(event(number, event_type=None), flush=False)
        sender.flush()
        self.next += EVENTS_PER_WAVE

    def truth(self) -> LogTruth:
        """What the topic holds now."""
        return self.place.truth(self.topic)

    def run(self, *words: str) -> Outcome:
        """One drain."""
        return self.job.run(*words, environment=SECRETS).expect(0)

    def savepoint(self, word: str, *words: str) -> Outcome:
        """A command of savepoints."""
        return tidemill("savepoint", word, self.job.path, *words, "--json", environment=SECRETS)

    def table(self, ending: str = "") -> Table:
        """The main table, or the one with this ending."""
        return self.job.open_catalog().load_table(self.job.table + ending)


@pytest.fixture
def story(place: Corner, rest_catalog: RestCatalog, s3: S3Server) -> Story:
    """See the class."""
    return Story(place, rest_catalog, s3)


def rows_at(table: Table, snapshot_id: int | None = None) -> list[tuple[Any, ...]]:
    """Every row of a snapshot, in an order that depends on nothing else."""
    rows = table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()
    return sorted((tuple(map(str, row.values())) for row in rows), key=str)


def test_a_job_on_rest_and_s3_goes_back_to_its_tags_and_on_to_the_same_tables(story: Story) -> None:
    """After two more waves main, dead letters, offsets and state are what they were, and a replay ends in the same tables."""
    job = story.job
    story.wave()
    story.run("--set", "microbatch.max_records=700")
    made = story.savepoint("create", "before").expect(0).last["savepoint"]
    then, moment = story.truth(), ledger.full_record(story.table())
    rows = {ending: rows_at(story.table(ending)) for ending in ("", "_dead_letters")}
    for ending in rows:
        table = story.table(ending)
        ref = table.metadata.refs[TAG]
        assert str(ref.snapshot_ref_type) == "tag" and ref.max_ref_age_ms == (1 << 63) - 1, ref
        assert ref.snapshot_id == made["tables"][f"{job.table}{ending}"] == table.current_snapshot().snapshot_id

    for _ in range(2):
        story.wave()
        story.run("--set", "microbatch.max_records=900")
    expired = tidemill(
        "table", "expire", job.path, "--json", "--yes", "--older-than", "0s", "--retain-last", "1", environment=SECRETS
    )
    expired.expect(0)
    job.check_against(story.truth())
    end = {ending: rows_at(story.table(ending)) for ending in rows}
    for ending, before in rows.items():
        assert rows_at(story.table(ending), made["tables"][f"{job.table}{ending}"]) == before, "what a tag names stays"

    looked = story.savepoint("restore", "before", "--dry-run").expect(0).last
    assert looked["dry_run"] and len(looked["restoration"]["jumps"]) == 2, looked
    head = story.table().current_snapshot().snapshot_id
    story.savepoint("restore", "before", "--yes").expect(0)
    job.check_against(then)
    for ending, before in rows.items():
        table = story.table(ending)
        assert rows_at(table) == before
        snapshot = table.current_snapshot()
        parents = [snapshot]
        while parents[-1].parent_snapshot_id and (parent := table.snapshot_by_id(parents[-1].parent_snapshot_id)):
            parents.append(parent)
        restored = [found for found in parents if found.summary.operation.value == "overwrite"]
        assert len(restored) == 1, [found.summary for found in parents]
        assert int(restored[0].summary.additional_properties["total-records"]) == len(before)
        assert ending or head in [found.snapshot_id for found in parents], "the head before is an ancestor"
    record = ledger.full_record(story.table())
    assert ledger.full_offsets(record, "end") == ledger.full_offsets(moment, "end") == then.ends
    for member in ("batch", "last_batch_with_rows", "topics"):
        assert record[member] == moment[member], member
    for member in ("generation", "checksum", "keys", "digest", "floor"):
        assert record["dedup"].get(member) == moment["dedup"].get(member), member
    assert record["lanes"]["live"]["watermark"] == moment["lanes"]["live"]["watermark"]
    assert record["epoch"] > moment["epoch"] and record["released"]

    again = story.run()
    assert not any("rebuil" in note["text"] for note in again.of("notice")), again.stdout
    job.check_against(story.truth())
    ids = [sorted(row[0] for row in found) for found in (end[""], rows_at(story.table()))]
    assert ids[0] == ids[1]
    story.savepoint("drop", "before", "--yes").expect(0)
    assert all(TAG not in story.table(ending).metadata.refs for ending in rows)
    assert story.savepoint("list").expect(0).last["savepoints"] == []


def test_a_run_without_end_makes_and_drops_savepoints_on_request_and_is_not_restored_under(story: Story) -> None:
    """Beside a run: the tags stand on the tables of one batch, and what they name is a moment that the job goes back to."""
    job = story.job
    story.wave()
    words = ("run", job.path, "--continuous", "--json", "--set", "microbatch.max_interval=300ms")
    with started(*words, environment=SECRETS) as run:
        wait_until("a commit", lambda: '"event":"commit"' in run.output(), 180)
        with started("savepoint", "create", job.path, "beside", "--json", environment=SECRETS) as create:
            wait_until("the request", lambda: any(name.startswith(REQUEST) for name in story.table().properties), 180)
            # its next batch shows the run what was asked
            story.wave()
            assert create.wait() == 0, create.output()
        assert "savepoint beside was made of batch" in run.output()
        story.savepoint("restore", "beside", "--yes").expect_stop(10, "BUSY")
        story.wave()
        ends = story.truth().ends
        wait_until("all records", lambda: ledger.full_offsets(ledger.full_record(story.table()), "end") == ends, 180)
        assert run.poll() is None, run.output()
        run.send(signal.SIGTERM)
        assert run.wait() == 13, run.output()
    job.check_against(story.truth())
    made = json.loads(create.output().splitlines()[-1])["savepoint"]
    rows = {}
    for ending in ("", "_dead_letters"):
        table = story.table(ending)
        snapshot_id = table.metadata.refs["tidemill-savepoint-beside"].snapshot_id
        assert snapshot_id == made["tables"][f"{job.table}{ending}"]
        assert {row["_tidemill_batch"] for row in table.scan(snapshot_id=snapshot_id).to_arrow().to_pylist()} <= set(
            range(made["batch"] + 1)
        )
        rows[ending] = rows_at(table, snapshot_id)
    story.savepoint("restore", "beside", "--yes").expect(0)
    for ending, before in rows.items():
        assert rows_at(story.table(ending)) == before
    story.run()
    job.check_against(story.truth())
    story.savepoint("drop", "beside", "--yes").expect(0)


def test_pods_without_a_volume_go_on_from_copies_on_s3_and_back_to_a_savepoint_elsewhere(story: Story) -> None:
    """The state folder is lost before every run: copies are taken, one that lags is brought up, and nothing is rebuilt."""
    job, copying = story.job, ("--set", story.copy_to)

    def notes(outcome: Outcome) -> str:
        return " | ".join(note["text"] for note in outcome.of("notice"))

    def lose_state() -> None:
        shutil.rmtree(job.folder / "state")

    story.wave()
    assert "the newest is that of batch 1" in notes(story.run(*copying))
    story.savepoint("create", "before").expect(0)
    then = story.truth()
    lose_state()
    story.wave()
    taken = notes(story.run(*copying))
    assert "took the dedup state of batch 1 from s3://" in taken and "rebuil" not in taken, taken
    job.check_against(story.truth())
    # A run that copies nothing: the copy lags by its batches.
    story.wave()
    story.run("--set", "microbatch.max_records=600")
    lose_state()
    story.wave()
    taken = notes(story.run(*copying))
    assert "made the dedup state again from the copy of batch 2" in taken and "rebuil" not in taken, taken
    job.check_against(story.truth())
    manifests = [path.name for path in story.copies.rglob("*.manifest")]
    assert 1 <= len(manifests) <= 3, f"the last two and that of the savepoint: {manifests}"

    elsewhere = ("--set", f"state_dir={job.folder}/elsewhere", "--set", "memory=768 MiB")
    story.savepoint("restore", "before", "--yes", *elsewhere).expect(0)
    job.check_against(then)
    taken = notes(story.run(*copying, *elsewhere))
    assert "took the dedup state of batch 1" in taken and "rebuil" not in taken, taken
    job.check_against(story.truth())
