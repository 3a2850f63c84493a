"""The demo needs nothing and tells the truth: what it says it wrote is what two other programs read."""

from pathlib import Path

from job import Outcome, tidemill
from readers import DuckdbReader, PyicebergReader

PROMISED = {
    "consumed", "written", "duplicate", "late", "dead_letter", "filtered", "expected_written", "events_per_second",
    "peak_rss_bytes", "state_bytes", "metadata_location",
}  # fmt: skip


def demo(folder: Path, *words: str) -> Outcome:
    return tidemill("demo", "--dir", folder, "--json", *words)


def count_by_both(metadata_location: str) -> tuple[int, int]:
    """Rows and distinct event ids, on which pyiceberg and DuckDB must agree."""
    ours = PyicebergReader.of_metadata(metadata_location)
    ours.check_metadata_columns()
    ids = ours.ids()
    theirs = DuckdbReader(metadata_location)
    assert (theirs.count(), theirs.distinct()) == (len(ids), len(set(ids)))
    return len(ids), len(set(ids))


def test_the_demo_writes_every_event_of_a_million_once(tmp_path: Path) -> None:
    last = demo(tmp_path / "demo").expect(0).last
    print(last)
    assert last.keys() >= PROMISED, PROMISED - last.keys()
    assert last["written"] == last["expected_written"]
    assert last["consumed"] >= 1_000_000 and last["duplicate"] > 0
    assert last["consumed"] == last["written"] + last["duplicate"] + last["dead_letter"] + last["filtered"]
    assert count_by_both(last["metadata_location"]) == (last["written"], last["written"])


def test_a_second_demo_on_the_same_folder_drops_every_repeat_of_the_first(tmp_path: Path) -> None:
    first = demo(tmp_path / "demo", "--events", "100000", "--seed", "7").expect(0).last
    again = demo(tmp_path / "demo", "--events", "100000", "--seed", "7").expect(0)
    assert "rebase-offsets" in again.stdout + again.stderr, "the way out of a replaced cluster is shown"
    assert again.last["written"] == 0, "every event of the same seed stands in the table already"
    assert count_by_both(again.last["metadata_location"]) == (first["written"], first["written"])


def test_a_demo_that_is_killed_twenty_times_still_writes_every_event_once(tmp_path: Path) -> None:
    last = demo(tmp_path / "demo", "--events", "400000", "--kill", "20").expect(0).last
    print("last phases of the killed children:", ", ".join(last["kills"]))
    assert len(last["kills"]) == 20
    assert last["written"] == last["expected_written"]
    assert count_by_both(last["metadata_location"]) == (last["written"], last["written"])
