"""The ledger as a stranger reads it: table properties and snapshot summaries, through pyiceberg."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from pyiceberg.table import Table

from readers import PyicebergReader
from truth import LogTruth, Place

Offsets = dict[tuple[str, int], int]


@dataclass(frozen=True)
class Commit:
    """One commit of the job, from the summary of its snapshot."""

    snapshot_id: int
    kind: str
    epoch: int
    batch: int
    sequence: int
    attempt: str
    counts: dict[str, int]
    ends: Offsets


def full_record(table: Table) -> dict[str, Any]:
    """The record in the table property."""
    return json.loads(table.properties["tidemill.ledger"])


def full_offsets(record: dict[str, Any], which: str) -> Offsets:
    """`start` or `end` of every topic partition of the live lane in a full record."""
    return {
        (topic, int(partition)): cursor[which]
        for topic, partitions in record["lanes"]["live"]["topics"].items()
        for partition, cursor in partitions.items()
    }


def history(table: Table) -> list[Commit]:
    """The job's commits on the ancestry of the current snapshot, oldest first."""
    commits = []
    snapshot = table.current_snapshot()
    while snapshot is not None:
        summary = snapshot.summary.additional_properties if snapshot.summary else {}
        if "tidemill.packed" in summary:
            commits.append(_commit(snapshot.snapshot_id, summary))
        parent = snapshot.parent_snapshot_id
        snapshot = table.snapshot_by_id(parent) if parent is not None else None
    return commits[::-1]


def _commit(snapshot_id: int, summary: dict[str, str]) -> Commit:
    packed = json.loads(summary["tidemill.packed"])
    ends = {
        (topic, int(part.split(":")[0])): int(part.split(":")[1].split(",")[0])
        for topic, text in packed["lanes"].get("live", {"topics": {}})["topics"].items()
        for part in text.split(";")
        if part
    }
    return Commit(
        snapshot_id=snapshot_id,
        kind=summary["tidemill.kind"],
        epoch=int(summary["tidemill.epoch"]),
        batch=int(summary["tidemill.batch"]),
        sequence=packed["sequence"],
        attempt=summary["tidemill.attempt"],
        counts=json.loads(summary["tidemill.counts"]),
        ends=ends,
    )


def with_earlier(earlier: list[Commit], table: Table) -> list[Commit]:
    """The history with the commits that stood in it before someone expired them."""
    commits = {commit.sequence: commit for commit in earlier}
    for commit in history(table):
        assert commits.setdefault(commit.sequence, commit) == commit, f"commit {commit.sequence} was rewritten"
    return [commits[sequence] for sequence in sorted(commits)]


def check_chain(table: Table, earlier: list[Commit] | None = None) -> list[Commit]:
    """The history has no gap: dense sequence and batches, rising epochs, fresh attempts, offsets that only grow.

    `earlier` are commits that were seen before their snapshots were expired.
    """
    commits = with_earlier(earlier or [], table)
    assert commits, "the table carries no commit of the job"
    assert commits[0].kind == "start", f"the first commit is {commits[0].kind}"
    for before, after in itertools.pairwise(commits):
        step = f"snapshot {after.snapshot_id} ({after.kind}) after {before.snapshot_id} ({before.kind})"
        assert after.sequence == before.sequence + 1, f"{step}: sequence {before.sequence} -> {after.sequence}"
        assert after.batch == before.batch + (after.kind == "data"), f"{step}: batch {before.batch} -> {after.batch}"
        # a process that ended between its line in the lock file and its fence leaves an epoch that nobody has
        assert after.epoch > before.epoch if after.kind == "fence" else after.epoch == before.epoch, (
            f"{step}: epoch {before.epoch} -> {after.epoch}"
        )
        if after.kind not in ("data", "jump"):
            assert after.ends == before.ends, f"{step} moved offsets"
        for partition, end in before.ends.items():
            assert after.ends[partition] >= end, f"{step}: {partition} went from {end} to {after.ends[partition]}"
    assert len({commit.attempt for commit in commits}) == len(commits), "an attempt landed twice"
    record = full_record(table)
    assert record["attempt"] == commits[-1].attempt, "the property is not the head's"
    assert full_offsets(record, "end") == commits[-1].ends, "property and summary disagree on offsets"
    return commits


def check_totals(commits: list[Commit], truth: LogTruth) -> None:
    """All batches together read every row once and wrote every event once, whatever others did to the rows since."""
    counts = [commit.counts for commit in commits if commit.kind == "data"]
    total = {outcome: sum(count[outcome] for count in counts) for outcome in ("consumed", "written", "duplicate")}
    total["refused"] = sum(count["dead_letter"] + count["dead_letter_known"] for count in counts)
    assert total == {
        "consumed": truth.consumed,
        "written": len(truth.events),
        "duplicate": truth.duplicates,
        "refused": len(truth.letters),
    }, total
    assert commits[-1].ends == truth.ends, f"read to {commits[-1].ends}, the log ends at {truth.ends}"


def check_conservation(table: Table, truth: LogTruth) -> list[Commit]:
    """Every batch's counts follow from an independent read of its offset ranges and of its rows in the table.

    A key counts as a repeat in a batch if it stood in an earlier row that was read; which of two copies in one batch
    is kept is left open.
    """
    assert truth.keep_rows, "conservation needs every row"
    commits = check_chain(table)
    written_by_batch: dict[int, set[Place]] = {}
    for place, batch in PyicebergReader(table).places().items():
        written_by_batch.setdefault(batch, set()).add(place)
    seen: set[str] = set()
    for before, commit in itertools.pairwise(commits):
        if commit.kind != "data":
            continue
        rows = list(truth.rows_between(before.ends, commit.ends))
        good = {place: row.event_id for place, row in rows if row.event_id is not None}
        fresh = set(good.values()) - seen
        counts = commit.counts
        name = f"batch {commit.batch} (snapshot {commit.snapshot_id})"
        outcomes = ("written", "duplicate", "late_side", "late_dropped", "dead_letter", "dead_letter_known",
                    "filtered", "outside_range")  # fmt: skip
        assert counts["consumed"] == sum(counts[outcome] for outcome in outcomes), f"{name}: {counts}"
        assert counts["consumed"] == len(rows), f"{name}: consumed {counts['consumed']}, the log has {len(rows)}"
        bad = len(rows) - len(good)
        assert counts["dead_letter"] + counts["dead_letter_known"] == bad, f"{name}: {counts}, the log has {bad} bad"
        written = written_by_batch.pop(commit.batch, set())
        assert written <= good.keys(), f"{name}: rows in the table that are not good rows of its ranges"
        assert sorted(str(good[place]) for place in written) == sorted(map(str, fresh)), f"{name}: not the new events"
        assert counts["written"] == len(written), f"{name}: {counts}, the table has {len(written)} rows"
        assert counts["duplicate"] == len(good) - len(fresh), f"{name}: {counts}"
        seen |= fresh
    assert not written_by_batch, f"rows of batches that no commit names: {sorted(written_by_batch)}"
    return commits
