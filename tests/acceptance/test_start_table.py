"""Rows of the start table that need another engine's hands: the message a person sees, the command that it names resolves it,
and the next run goes on to the truth, as pyiceberg and DuckDB see it. The time to resume is printed.

Rows without foreign hands stand in `tests/end_to_end/start_table.rs` and in `test_errors.py`.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from pyiceberg.expressions import EqualTo, In
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.transforms import DayTransform

import ledger
import snapshots
from conftest import Corner
from events import event
from hands import forget_history, replace_in_place
from job import Job, named_command, tidemill
from readers import PyicebergReader
from sweep import KILLED


def table_of(job: Job) -> Table:
    """The main table as pyiceberg has it now."""
    return job.open_catalog().load_table(job.table)


def stop_of(job: Job, place: Corner, name: str, exit_code: int, reason: str, *words: str) -> dict[str, Any]:
    """Runs the job for the program's eyes and for a person's, and returns the stop."""
    stop = job.run(*words).expect_stop(exit_code, reason)
    snapshots.check(name, tidemill("run", job.path, *words).expect(exit_code).stderr, place.prefix)
    return stop


def resolve(job: Job, stop: dict[str, Any]) -> dict[str, Any]:
    """Runs the command that a stop names, prints how long that took, and returns its last line of JSON."""
    words = named_command(stop, job.path)
    shown = " ".join(word for word in words if "/" not in word)
    begun = time.monotonic()
    outcome = tidemill(*words, "--json").expect(0)
    print(f"time to resume from {stop['reason']} by {shown}: {time.monotonic() - begun:.2f} s")
    return outcome.last


def filled(place: Corner, count: int = 200, **fields: Any) -> Job:
    """A job that has written some events in two batches."""
    topic = place.topic()
    feed = place.feed(topic).send(*(event(number) for number in range(count // 2)))
    job = place.job(topic, **fields)
    job.run().expect(0)
    feed.send(*(event(number) for number in range(count // 2, count)))
    job.run().expect(0)
    return job


def copy_rows(job: Job) -> None:
    """Drops the main table and makes it again with the same rows and nothing else, as a restore by copy does."""
    catalog, table = job.open_catalog(), table_of(job)
    rows, schema, spec = table.scan().to_arrow(), table.schema(), table.spec()
    catalog.drop_table(job.table)
    made = catalog.create_table(job.table, schema, partition_spec=spec)
    made.append(rows.cast(made.schema().as_arrow()))


def test_rows_of_another_engine_come_to_count_as_seen(place: Corner) -> None:
    model = filled(Corner(place.folder / "model", place.broker, "model"), 100)
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(50, 200)))
    job = place.job(topic, catalog=model.catalog, name="second", file_name="second.toml")
    copy_rows(model)
    model.open_catalog().drop_table(f"{model.table}_dead_letters")
    stop = stop_of(job, place, "rows_to_adopt", 25, "TABLE_NOT_EMPTY")
    done = resolve(job, stop)
    assert (done["command"], done["keys_of_others"]) == ("state adopt-rows", 100), done
    counts = job.run().expect(0).last["counts"]
    assert (counts["written"], counts["duplicate"]) == (100, 50)
    shutil.rmtree(job.folder / "state")
    place.feed(topic).send(*(event(number) for number in range(210)))
    assert job.run().expect(0).last["counts"]["written"] == 10
    check_ids(job, range(210))


def test_a_table_that_never_knew_tidemill_is_adopted_and_goes_on(place: Corner) -> None:
    model = filled(Corner(place.folder / "model", place.broker, "model"), 100)
    rows = table_of(model).scan().to_arrow()
    foreign = [field for field in table_of(model).schema().fields if not field.name.startswith(("_kafka", "_tidemill"))]
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(50, 200)))
    job = place.job(topic, name="second", file_name="second.toml", folder=place.folder / "second")
    catalog = job.open_catalog()
    catalog.create_namespace("events")
    schema = Schema(*foreign)
    day = PartitionField(schema.find_field("event_time").field_id, 1000, DayTransform(), "event_time_day")
    made = catalog.create_table(job.table, schema, partition_spec=PartitionSpec(day))
    made.append(rows.select([field.name for field in foreign]).cast(made.schema().as_arrow()))
    done = resolve(job, job.run().expect_stop(25, "TABLE_NOT_EMPTY"))
    assert (done["command"], done["keys_of_others"]) == ("state adopt-rows", 100), done
    counts = job.run().expect(0).last["counts"]
    assert (counts["written"], counts["duplicate"]) == (100, 50)
    shutil.rmtree(job.folder / "state")
    place.feed(topic).send(*(event(number) for number in range(210)))
    assert job.run().expect(0).last["counts"]["written"] == 10
    check_ids(job, range(210))


def test_a_lost_ledger_is_made_again_from_a_copy_of_the_table(place: Corner) -> None:
    job = filled(place)
    copy_rows(job)
    stop = stop_of(job, place, "ledger_lost_with_rows", 25, "LEDGER_LOST")
    done = resolve(job, stop)
    assert (done["command"], done["keys"]) == ("state adopt", 200), done
    place.feed(job.topics[0]).send(*(event(number) for number in range(150, 300)))
    # the rows do not say how far the topic was read: it is read from its begin
    counts = job.run().expect(0).last["counts"]
    assert (counts["consumed"], counts["written"], counts["duplicate"]) == (350, 100, 250)
    job.check_against(place.truth(*job.topics))


def test_a_key_that_was_changed_on_purpose_is_rebuilt(place: Corner) -> None:
    job = filled(place)
    words = ("--set", 'dedup.key=["event_id", "event_type"]')
    stop = stop_of(job, place, "key_changed", 26, "KEY_SPEC_CHANGED", *words)
    assert "state rekey" in stop["way_out"]
    begun = time.monotonic()
    rekeyed = tidemill("state", "rekey", job.path, *words, "--yes", "--json").expect(0).last
    print(f"time to resume from KEY_SPEC_CHANGED by state rekey: {time.monotonic() - begun:.2f} s")
    assert (rekeyed["keys"], rekeyed["repeats"]) == (200, 0)
    feed = place.feed(job.topics[0])
    feed.send(event(0), event(0, event_type="bounced"), event(0, event_type="bounced"))
    counts = job.run(*words).expect(0).last["counts"]
    assert (counts["written"], counts["duplicate"]) == (1, 2)
    assert job.duckdb().count() == 201


def test_a_table_that_was_rolled_back_is_read_again_from_its_older_batch(place: Corner) -> None:
    job = filled(place)
    feed = place.feed(job.topics[0])
    feed.send(*(event(number) for number in range(200, 300)), b"not an event")
    job.run().expect(0)
    table = table_of(job)
    older = next(
        snapshot.snapshot_id
        for snapshot in table.snapshots()
        if snapshot.summary and snapshot.summary.additional_properties.get("tidemill.batch") == "1"
        and snapshot.summary.additional_properties.get("tidemill.kind") == "data"
    )
    table.manage_snapshots().rollback_to_snapshot(older).commit()
    assert PyicebergReader(table_of(job)).count() == 100
    stop = stop_of(job, place, "rolled_back", 24, "TABLE_ROLLED_BACK")
    done = resolve(job, stop)
    counts = done["counts"]
    assert (counts["consumed"], counts["written"], counts["dead_letter_known"]) == (201, 200, 1), counts
    job.check_against(place.truth(*job.topics))
    feed.send(*(event(number) for number in range(310)))
    assert job.run().expect(0).last["counts"]["written"] == 10
    job.check_against(place.truth(*job.topics))


def test_a_restore_that_a_rollback_undoes_is_gone_on_from_by_rolling_forward_alone(place: Corner) -> None:
    job = filled(place)
    tidemill("savepoint", "create", job.path, "then", "--json").expect(0)
    place.feed(job.topics[0]).send(*(event(number) for number in range(200, 300)), b"not an event")
    job.run().expect(0)
    before = table_of(job).current_snapshot()
    tidemill("savepoint", "restore", job.path, "then", "--yes", "--json").expect(0)
    table = table_of(job)
    restored = table.current_snapshot()
    assert before is not None and restored is not None
    table.manage_snapshots().rollback_to_snapshot(before.snapshot_id).commit()
    assert PyicebergReader(table_of(job)).count() == 300
    # the letter left with the restore, and a replay from batch 3 would not read it again
    stop = stop_of(job, place, "restore_undone", 24, "TABLE_ROLLED_BACK", "--set", "sink.iceberg.on_rollback=replay")
    table_of(job).manage_snapshots().set_current_snapshot(restored.snapshot_id).commit()
    counts = resolve(job, stop)["counts"]
    assert (counts["consumed"], counts["written"], counts["dead_letter"]) == (101, 100, 1), counts
    job.check_against(place.truth(*job.topics))


def test_a_table_that_was_created_or_replaced_by_sql_begins_anew_or_comes_back(place: Corner) -> None:
    job = filled(place)
    catalog, before = job.open_catalog(), table_of(job)
    replace_in_place(job)
    stop = stop_of(job, place, "created_or_replaced", 24, "TABLE_ROLLED_BACK")
    # it was not meant: the metadata of before is registered again
    replaced = table_of(job)
    catalog.drop_table(job.table)
    catalog.register_table(job.table, before.metadata_location)
    assert job.run().expect(0).last["counts"]["written"] == 0
    # it was
    catalog.drop_table(job.table)
    catalog.register_table(job.table, replaced.metadata_location)
    job.run().expect_stop(24, "TABLE_ROLLED_BACK")
    catalog.drop_table(job.table)
    catalog.create_table(job.table, before.schema(), partition_spec=before.spec())
    job.run().expect_stop(25, "LEDGER_LOST")
    resolve(job, stop)
    assert job.run().expect(0).last["counts"]["written"] == 200
    job.check_against(place.truth(*job.topics))


def test_history_that_was_expired_with_the_rows_of_its_last_batch_is_trusted_on_demand(place: Corner) -> None:
    job = filled(place)
    table = table_of(job)
    table.delete(In("_tidemill_batch", [2]))
    forget_history(job)
    place.feed(job.topics[0]).send(*(event(number) for number in range(300)))
    stop = stop_of(job, place, "history_cut_off", 24, "TABLE_ROLLED_BACK")
    done = resolve(job, stop)
    assert done["counts"]["written"] == 100, "what was deleted stays seen: the state still knows it"
    check_ids(job, [*range(100), *range(200, 300)])


def test_rows_that_others_deleted_are_missed_by_a_rebuild_until_that_is_accepted(place: Corner) -> None:
    job = filled(place)
    table_of(job).delete(In("event_id", [event(number)["event_id"] for number in (3, 4)]))
    shutil.rmtree(job.folder / "state")
    feed = place.feed(job.topics[0]).send(event(3), event(200))
    stop = stop_of(job, place, "missing_keys", 29, "MISSING_KEYS")
    assert "2 of 200 keys" in stop["what"], stop
    done = resolve(job, stop)
    assert (done["counts"]["written"], done["counts"]["duplicate"]) == (2, 0)
    record = json.loads(table_of(job).properties["tidemill.ledger"])
    assert record["dedup"]["keys"] == 200
    check_ids(job, [*range(4), *range(5, 201)])
    feed.send(event(3), event(5))
    assert job.run().expect(0).last["counts"]["written"] == 0


def test_a_persons_events_stay_out_after_their_rows_and_the_state_are_gone(place: Corner) -> None:
    job = filled(place)
    person = [number for number in range(200) if event(number)["user_id"] == event(5)["user_id"]]
    keys = place.folder / "keys.jsonl"
    keys.write_text("".join(json.dumps({"event_id": event(number)["event_id"]}) + "\n" for number in person))
    forgotten = tidemill("state", "forget", job.path, "--keys", keys, "--yes", "--json").expect(0).last
    assert forgotten["changed"] and f"{len(person)} keys" in forgotten["notes"][0]
    table_of(job).delete(EqualTo("user_id", event(5)["user_id"]))
    shutil.rmtree(job.folder / "state")
    feed = place.feed(job.topics[0]).send(*(event(number) for number in [*person, 200]))
    counts = job.run().expect(0).last["counts"]
    assert (counts["written"], counts["duplicate"]) == (1, len(person)), "the person's events were sent again"
    check_ids(job, [number for number in range(201) if number not in person])
    # The state is lost once more, and the table of erased keys too.
    catalog = job.open_catalog()
    suppressed = catalog.load_table(f"{job.table}_suppressed")
    assert len(person) == suppressed.scan().to_arrow().num_rows
    assert not any("user" in field.name or "event" in field.name for field in suppressed.schema().fields)
    catalog.drop_table(f"{job.table}_suppressed")
    feed.send(*(event(number) for number in person))
    stop = stop_of(job, place, "erased_keys_missing", 24, "TABLE_REPLACED")
    catalog.register_table(f"{job.table}_suppressed", suppressed.metadata_location)
    shutil.rmtree(job.folder / "state")
    done = resolve(job, stop)
    assert done["counts"]["written"] == 0


def test_a_dead_letter_table_that_is_gone_is_put_back_under_its_name(place: Corner) -> None:
    job = filled(place)
    catalog = job.open_catalog()
    name = f"{job.table}_dead_letters"
    location = catalog.load_table(name).metadata_location
    catalog.drop_table(name)
    place.feed(job.topics[0]).send(event(200))
    stop = stop_of(job, place, "dead_letters_missing", 24, "TABLE_REPLACED")
    catalog.register_table(name, location)
    assert resolve(job, stop)["counts"]["written"] == 1
    job.check_against(place.truth(*job.topics))


def lose_letters(job: Job, place: Corner, numbers: range) -> int:
    """Sends events and refused rows, and takes them; the files of the letters vanish before their table had them. Their number."""
    feed = place.feed(job.topics[0])
    feed.send(*(event(number, event_type=None if number % 10 == 0 else "sent") for number in numbers))
    killed = job.run(environment={"TIDEMILL_CRASH_AT": "main_landed:2"})
    assert killed.exit_code == KILLED, killed.stdout + killed.stderr
    owed = ledger.full_record(table_of(job))["sides"]["dead_letters"]
    assert owed["owed"]
    for file in owed["files"]:
        Path(file["path"].removeprefix("file://")).unlink()
    rows: int = sum(file["rows"] for file in owed["files"])
    return rows


def test_letters_whose_files_are_gone_are_written_again_from_their_records(place: Corner) -> None:
    job = filled(place, max_ratio=0.5)
    lost = lose_letters(job, place, range(200, 300))
    stop = stop_of(job, place, "side_files_lost", 29, "SIDE_FILES_LOST")
    done = resolve(job, stop)
    assert (done["event"], done["rows"], done["batch"]) == ("side_reread", lost, 3), done
    job.check_against(place.truth(*job.topics))
    place.feed(job.topics[0]).send(*(event(number) for number in range(290, 310)))
    job.run().expect(0)
    job.check_against(place.truth(*job.topics))


def test_letters_whose_records_are_gone_too_are_given_up_with_the_number_in_the_ledger(place: Corner) -> None:
    job = filled(place, max_ratio=0.5)
    lost = lose_letters(job, place, range(200, 300))
    truth = place.truth(*job.topics)
    place.broker.delete_records(job.topics[0], 0, 250)
    refused = tidemill("side", "reread", job.path, "--yes").expect(29)
    snapshots.check("side_files_not_reread", refused.stderr, place.prefix)
    stop = tidemill("side", "reread", job.path, "--yes", "--json").expect_stop(29, "SIDE_FILES_LOST")
    done = resolve(job, stop)
    assert [(loss["rows"], loss["batch"]) for loss in done["side_losses"]] == [(lost, 3)], done
    said = [s.summary.additional_properties.get("tidemill.change", "") for s in table_of(job).snapshots() if s.summary]
    assert [json.loads(text)["by"] for text in said if text] == ["accept-loss"]
    assert len(job.letters()) == len(truth.letters) - lost
    place.feed(job.topics[0]).send(*(event(number) for number in range(310)))
    job.run().expect(0)
    check_ids(job, range(310))


def test_a_newer_ledger_is_left_alone(place: Corner) -> None:
    job = filled(place)
    table = table_of(job)
    record = json.loads(table.properties["tidemill.ledger"])
    with table.transaction() as change:
        change.set_properties({"tidemill.ledger": json.dumps({**record, "format": 99, "sequence": 10_000})})
    place.feed(job.topics[0]).send(event(200))
    stop_of(job, place, "ledger_too_new", 27, "FORMAT_TOO_NEW")
    with table_of(job).transaction() as change:
        change.set_properties({"tidemill.ledger": json.dumps(record)})
    job.run().expect(0)
    job.check_against(place.truth(*job.topics))


def test_a_rebuild_says_what_it_kept_and_what_it_read(place: Corner) -> None:
    job = filled(place, 5_000)
    whole = tidemill("state", "rebuild", job.path).expect(0)
    assert "the state is whole: 5000 keys" in whole.stdout
    segment = max((job.folder / "state").rglob("*.segment"), key=lambda path: path.stat().st_size)
    damage(segment)
    done = tidemill("state", "rebuild", job.path, "--json").expect(0).last
    assert done["changed"] and done["keys"] == 5_000
    tidemill("state", "verify", job.path).expect(0)
    place.feed(job.topics[0]).send(*(event(number) for number in range(5_010)))
    assert job.run().expect(0).last["counts"]["written"] == 10


def damage(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def check_ids(job: Job, numbers: Any) -> None:
    """Both readers see exactly these events, each once."""
    wanted = sorted(event(number)["event_id"] for number in numbers)
    assert sorted(job.reader().ids()) == wanted
    assert job.duckdb().count() == len(wanted) == job.duckdb().distinct()
