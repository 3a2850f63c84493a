"""Four topics full of repeats, read wave by wave by a principal that may only read them.

`TIDEMILL_TEST_EVENTS` is the number of good records of all waves together.
"""

import json
import os
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AdminClient

import ledger
from conftest import Corner
from events import event
from job import Job, tidemill
from services import Broker, RestCatalog, S3Server
from services.s3 import SECRET_KEY
from truth import LogTruth

EVENTS = int(os.environ.get("TIDEMILL_TEST_EVENTS", "3000000"))
WAVES = 4
PARTITIONS = 8
TYPES = ("generated", "sent", "delivered", "clicked")


def generate(broker: Broker, prefix: str, events: int, skip: int = 0, *words: str) -> dict[str, Any]:
    """Sends a stretch of a seeded stream, one topic per type, and returns what the generator says is true of it."""
    done = tidemill(
        "generate", "--brokers", broker.bootstrap, "--topic-prefix", prefix, "--partitions", str(PARTITIONS),
        "--events", str(events), "--skip", str(skip), "--seed", "42", "--repeats", "0.06", "--create-topics",
        "--json", *words,
    ).expect(0)  # fmt: skip
    return done.last


def topics_of(prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name in TYPES]


def check_offsets(job: Job, truth: LogTruth) -> None:
    """The ledger has no gap and ends where an independent client sees the topics end."""
    table = job.reader().table
    commits = ledger.check_chain(table)
    assert commits[-1].ends == truth.ends
    assert commits[0].ends == truth.starts, "the first run began elsewhere than at the oldest records"
    consumed = sum(commit.counts["consumed"] for commit in commits if commit.kind == "data")
    assert consumed == truth.consumed, "batches together consumed other than the topics hold"


def test_four_waves_of_four_topics_become_an_exact_table_for_a_principal_that_only_reads(place: Corner) -> None:
    prefix, wave = place.prefix, EVENTS // WAVES
    topics = topics_of(prefix)
    for topic in topics:
        place.broker.create_topic(topic, PARTITIONS)
    place.broker.allow_reading(*topics)
    job = place.job(*topics, kafka=place.broker.sasl_properties(), memory="1 GiB")
    truth = place.truth(*topics, keep_rows=False)
    for number in range(WAVES):
        generate(place.broker, prefix, wave, number * wave)
        outcome = job.run().expect(0)
        truth.advance()
        done = outcome.last
        assert done["event"] == "done"
        print(f"wave {number + 1}: {json.dumps(done['counts'])}, distinct so far {len(truth.events)}")
        job.check_against(truth)
        check_offsets(job, truth)
    assert truth.duplicates > EVENTS * 0.05, "the topics must be full of repeats for this test to say anything"
    nothing = job.run().expect(0)
    assert nothing.last["counts"]["consumed"] == 0 and not nothing.of("commit"), "a run without news commits nothing"


def test_deleting_or_resetting_the_consumer_group_changes_nothing(place: Corner) -> None:
    topic = place.topic(partitions=2)
    feed = place.feed(topic).send(*(event(number) for number in range(2_000)))
    job = place.job(topic)
    job.run().expect(0)
    admin = place.broker.admin
    rewind = [TopicPartition(topic, partition, 0) for partition in range(2)]
    groups = groups_with_offsets_of(admin, topic) | {f"tidemill-{job.name}"}
    for group in groups:
        admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, rewind)])[group].result(30)
    feed.send(*(event(number) for number in range(1_000, 3_000)))
    after_reset = job.run().expect(0).last["counts"]
    assert (after_reset["consumed"], after_reset["written"], after_reset["duplicate"]) == (2_000, 1_000, 1_000)
    for group, answer in admin.delete_consumer_groups(sorted(groups)).items():
        assert answer.result(30) is None, group
    assert job.run().expect(0).last["counts"]["consumed"] == 0
    job.check_against(place.truth(topic))


def groups_with_offsets_of(admin: AdminClient, topic: str) -> set[str]:
    """Groups that hold an offset of the topic: those that the job wrote for lag tools."""
    found = set()
    for group in admin.list_consumer_groups().result(30).valid:
        asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group.group_id)])
        partitions = asked[group.group_id].result(30).topic_partitions
        if any(partition.topic == topic for partition in partitions):
            found.add(group.group_id)
    return found


def test_a_wave_through_tls_a_rest_catalog_and_s3_is_exact(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server
) -> None:
    prefix = place.prefix
    topics = topics_of(prefix)
    for topic in topics:
        place.broker.create_topic(topic, PARTITIONS)
    place.broker.allow_reading(*topics)
    job = place.job(
        *topics,
        kafka=place.broker.sasl_properties(tls=True),
        catalog={
            "type": "rest",
            "uri": rest_catalog.uri,
            "warehouse": rest_catalog.warehouse,
            **s3.properties(),
            "s3.secret-access-key": "env:S3_SECRET_KEY",
        },
        s3=s3.properties(),
        memory="1 GiB",
    )
    generate(place.broker, prefix, EVENTS // WAVES)
    plan = tidemill("plan", job.path, environment={"S3_SECRET_KEY": SECRET_KEY}).expect(0)
    outcome = job.run(environment={"S3_SECRET_KEY": SECRET_KEY}).expect(0)
    for text in (plan.stdout, plan.stderr, outcome.stdout, outcome.stderr):
        assert SECRET_KEY not in text and "reader-secret" not in text, "a secret was printed"
    truth = place.truth(*topics, keep_rows=False)
    job.check_against(truth)
    check_offsets(job, truth)
