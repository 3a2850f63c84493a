"""Every way in which a job can not go on: an exit code, a message that names a command, and the command resolves it.

What a person sees (without `--json`) is kept in `snapshots/`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from pyarrow import parquet
from pyiceberg.schema import Schema
from pyiceberg.types import LongType, NestedField

import snapshots
from conftest import Corner
from events import event
from job import Job, tidemill
from services import Broker, RestCatalog, free_ports, wait_until


def stop_of(job: Job, place: Corner, name: str, exit_code: int, reason: str, *words: str) -> dict[str, Any]:
    """Runs the job twice, for the program's eyes and for a person's, and returns the stop."""
    stop = job.run(*words).expect_stop(exit_code, reason)
    for_people = tidemill("run", job.path, *words).expect(exit_code)
    assert not for_people.stdout.strip() or stop["what"] not in for_people.stdout, "errors belong to stderr"
    snapshots.check(name, for_people.stderr, place.prefix)
    return stop


def filled(place: Corner, count: int = 100, **fields: Any) -> Job:
    """A job on a topic with some events."""
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(count)))
    return place.job(topic, **fields)


def test_a_broker_that_can_not_be_reached_is_waited_for_by_the_scheduler(place: Corner) -> None:
    broker = Broker(place.folder / "second-broker", free_ports(4))
    job = place.job("later", kafka={"bootstrap.servers": broker.bootstrap})
    stop = stop_of(job, place, "broker_unreachable", 11, "SOURCE_AWAY")
    with broker:
        broker.create_topic("later")
        job.follow(stop).expect(0)
        job.run().expect(0)


def test_a_topic_that_does_not_exist_is_named(place: Corner) -> None:
    topic = f"{place.prefix}.missing"
    job = place.job(topic)
    stop = stop_of(job, place, "unknown_topic", 23, "UNKNOWN_TOPIC")
    assert topic in stop["what"]
    place.broker.create_topic(topic)
    job.follow(stop).expect(0)
    job.run().expect(0)


def test_a_principal_without_permission_is_told_what_to_grant(place: Corner) -> None:
    job = filled(place, kafka=place.broker.sasl_properties())
    stop = stop_of(job, place, "no_permission", 28, "NOT_AUTHORIZED")
    assert "reader-secret" not in json.dumps(stop)
    place.broker.allow_reading(*job.topics)
    job.follow(stop).expect(0)
    assert job.run().expect(0).last["event"] == "done"
    assert job.reader().count() == 100


def test_a_table_of_another_schema_is_refused_by_the_names_of_its_columns(place: Corner) -> None:
    job = filled(place)
    catalog = job.open_catalog()
    catalog.create_namespace("events")
    catalog.create_table(job.table, Schema(NestedField(1, "event_id", LongType(), required=True)))
    stop = stop_of(job, place, "another_schema", 26, "SCHEMA_DIFFERS")
    assert "event_id" in stop["what"] and "long" in stop["what"] and "string" in stop["what"]
    job.follow(stop).expect(0)


def test_the_table_of_another_job_is_left_alone(place: Corner) -> None:
    owner = filled(place)
    owner.run().expect(0)
    before = owner.reader().table.metadata_location
    other = place.job(
        *owner.topics, name="second", catalog=owner.catalog, file_name="second.toml", state_dir=place.folder / "second"
    )
    stop = stop_of(other, place, "another_jobs_ledger", 25, "OTHER_JOB")
    assert "notifications" in stop["what"] and "second" in stop["what"]
    assert owner.reader().table.metadata_location == before
    other.follow(stop).expect(0)


def test_a_table_with_rows_and_no_ledger_asks_what_its_rows_mean(place: Corner) -> None:
    job = filled(place)
    model = filled(place_of(place, "model"))
    model.run().expect(0)
    rows = model.reader()
    catalog = job.open_catalog()
    catalog.create_namespace("events")
    table = catalog.create_table(job.table, rows.table.schema(), partition_spec=rows.table.spec())
    foreign = place.folder / "foreign.parquet"
    parquet.write_table(rows.table.scan().to_arrow().slice(0, 10).cast(table.schema().as_arrow()), foreign)
    table.add_files([str(foreign)])
    stop = stop_of(job, place, "rows_without_ledger", 25, "TABLE_NOT_EMPTY")
    assert "--ignore-rows" in stop["way_out"]
    job.run("--ignore-rows").expect(0)
    assert job.reader().count() == 110


def place_of(place: Corner, name: str) -> Corner:
    """A second corner beside the test's."""
    return Corner(place.folder / name, place.broker, name)


def test_a_lost_ledger_is_not_taken_for_a_first_run(place: Corner) -> None:
    job = filled(place)
    job.run().expect(0)
    job.open_catalog().drop_table(job.table)
    stop = stop_of(job, place, "ledger_lost", 25, "LEDGER_LOST")
    job.follow(stop).expect(0)
    job.run().expect(0)
    job.check_against(place.truth(*job.topics))


def test_offsets_that_retention_deleted_are_reported_exactly_and_accepted_by_a_command(place: Corner) -> None:
    job = filled(place)
    job.run().expect(0)
    topic = job.topics[0]
    place.feed(topic).send(*(event(number) for number in range(100, 300)))
    place.broker.delete_records(topic, 0, 150)
    stop = stop_of(job, place, "offsets_lost", 22, "OFFSETS_LOST")
    assert "100" in stop["what"] and "150" in stop["what"]
    job.follow(stop).expect(0)
    job.run().expect(0)
    assert set(job.reader().ids()) == {event(number)["event_id"] for number in (*range(100), *range(150, 300))}
    jump = json.loads(job.reader().table.properties["tidemill.ledger"])
    assert jump["lanes"]["live"]["topics"][topic]["0"]["end"] == 300


def test_a_topic_made_again_under_its_name_stops_until_offsets_are_rebased(place: Corner) -> None:
    job = filled(place)
    job.run().expect(0)
    topic = job.topics[0]
    place.broker.delete_topic(topic)
    recreate(place.broker, topic)
    place.feed(topic).send(*(event(number) for number in range(50, 130)))
    stop = stop_of(job, place, "topic_made_again", 23, "TOPIC_CHANGED")
    job.follow(stop).expect(0)
    counts = job.run().expect(0).last["counts"]
    assert (counts["consumed"], counts["written"], counts["duplicate"]) == (80, 30, 50)


def recreate(broker: Broker, topic: str) -> None:
    """Deletion is asynchronous: creates as soon as the broker has forgotten the old one."""

    def created() -> bool:
        try:
            broker.create_topic(topic)
            return True
        except KafkaException:
            return False

    wait_until(f"{topic} to be created again", created)


def test_a_catalog_that_does_not_answer_is_waited_for_by_the_scheduler(place: Corner) -> None:
    catalog = RestCatalog(place.folder / "rest-catalog", port=free_ports(1)[0])
    job = filled(place, catalog={"type": "rest", "uri": catalog.uri, "warehouse": catalog.warehouse})
    stop = stop_of(job, place, "catalog_unreachable", 12, "CATALOG_AWAY")
    with catalog:
        job.follow(stop).expect(0)
        job.check_against(place.truth(*job.topics))


SPOILED: dict[str, Callable[[str], str]] = {
    "job_file_unknown_field": lambda text: text.replace("memory =", "memmory ="),
    "job_file_wrong_type": lambda text: text.replace('key = ["event_id"]', 'key = "event_id"'),
    "job_file_unknown_column": lambda text: text.replace('column = "event_time"', 'column = "event_tme"'),
    "job_file_secret_in_the_open": lambda text: text.replace(
        "[decode]", '"sasl.password" = "in the open"\n[decode]', 1
    ),
    "job_file_not_toml": lambda text: text + "\n[sink.iceberg\n",
    "job_file_not_built": lambda text: text + "\n[rules]\nwhere = \"event_type <> 'heartbeat'\"\n",
}


def test_a_wrong_job_file_is_refused_with_place_and_nearest_name(tmp_path: Path) -> None:
    job = Job(folder=tmp_path / "job", topics=["t"], kafka={"bootstrap.servers": "127.0.0.1:1"})
    good = job.path.read_text()
    tidemill("check", job.path).expect(0)
    for name, spoil in SPOILED.items():
        spoiled = spoil(good)
        assert spoiled != good, name
        job.path.write_text(spoiled)
        refused = tidemill("check", job.path).expect(2)
        assert f"{job.file_name}:" in refused.stderr, f"{name}: no file and line: {refused.stderr}"
        snapshots.check(name, refused.stderr)
        tidemill("run", job.path).expect(2)
    job.path.write_text(good)
    tidemill("check", job.path).expect(0)
