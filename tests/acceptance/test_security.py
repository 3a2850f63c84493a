"""Who may read, what is believed, and what is never shown: TLS and logins against a real broker, refusals of catalog and
S3, the state folder, names and bombs in the data, and secrets in every field of the job file.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ledger
import outcomes
from conftest import Corner
from events import Feed, event, event_id
from job import Job, Outcome, binary, tidemill
from limits import memory_limit
from services import Broker, Fault, Listener, Proxy, RestCatalog, S3Server
from services.kafka import READER, READER_PASSWORD, make_certificate

USAGE, STORAGE_FAILED, OFFSETS_LOST, NOT_AUTHORIZED = 2, 14, 22, 28
# A refusal is believed at once: the client asks a few addresses and threads, and again while the refusal is on its way to the
# program, which takes longer on a busy machine. Who asked again and again would be at hundreds.
CONNECTIONS_MAX = 60
REFUSED_S_MAX = 180
RUN_S_MAX = 300
PASSWORD = "changeit"


@dataclass(frozen=True)
class Vault:
    """A broker with a listener for each way in, and certificates: its own, a client's, and ones that nobody trusts."""

    broker: Broker
    mutual: Listener
    plain: Listener
    expired: Listener
    client_store: Path
    expired_ca: Path
    stranger_store: Path
    stranger_ca: Path


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    """See `Vault`."""
    keys = tmp_path_factory.mktemp("keys")
    client_ca = make_certificate(keys / "client.p12", "client")
    stranger_ca = make_certificate(keys / "stranger.p12", "stranger")
    expired_ca = make_certificate(keys / "expired.p12", "localhost", "-startdate", "-3d", "-validity", "1")
    mutual = Listener(
        "MUTUAL", "SSL", settings=(
            "listener.name.mutual.ssl.client.auth=required", "listener.name.mutual.ssl.truststore.type=PEM",
            f"listener.name.mutual.ssl.truststore.location={client_ca}",
        ),
    )  # fmt: skip
    plain = Listener(
        "PLAINLOGIN", "SASL_SSL", settings=(
            "listener.name.plainlogin.sasl.enabled.mechanisms=PLAIN",
            "listener.name.plainlogin.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule "
            f'required user_{READER}="{READER_PASSWORD}";',
        ),
    )  # fmt: skip
    expired = Listener(
        "EXPIRED", "SSL", settings=(
            f"listener.name.expired.ssl.keystore.location={keys / 'expired.p12'}",
            "listener.name.expired.ssl.keystore.type=PKCS12", f"listener.name.expired.ssl.keystore.password={PASSWORD}",
        ),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vault") / "kafka"
    with Broker(folder, listeners=[mutual, plain, expired]) as broker:
        yield Vault(
            broker, mutual, plain, expired, keys / "client.p12", expired_ca, keys / "stranger.p12", stranger_ca
        )


def port_of(bootstrap: str) -> int:
    return int(bootstrap.rsplit(":", 1)[1])


def good_ways_in(vault: Vault) -> dict[str, dict[str, str]]:
    """Properties that the broker takes, by the name of the way."""
    ca = {"ssl.ca.location": str(vault.broker.ca_path)}
    mutual = {
        "bootstrap.servers": vault.mutual.bootstrap, "security.protocol": "SSL", **ca,
        "ssl.keystore.location": str(vault.client_store), "ssl.keystore.password": "env:STORE_PASSWORD",
    }  # fmt: skip
    plain = {
        **vault.broker.sasl_properties(tls=True), "bootstrap.servers": vault.plain.bootstrap, "sasl.mechanism": "PLAIN",
    }  # fmt: skip
    return {"scram over tls": vault.broker.sasl_properties(tls=True), "plain over tls": plain, "mutual tls": mutual}


ENVIRONMENT = {"STORE_PASSWORD": PASSWORD}


@pytest.mark.parametrize("way", ["scram over tls", "plain over tls", "mutual tls"])
def test_each_way_in_reads_the_topic(vault: Vault, tmp_path: Path, way: str) -> None:
    place = Corner(tmp_path, vault.broker, "way-in")
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(50)))
    vault.broker.allow_reading(topic)
    vault.broker.allow_reading(topic, principal="CN=client")
    job = place.job(topic, kafka=good_ways_in(vault)[way])
    job.run(environment=ENVIRONMENT).expect(0)
    job.check_against(place.truth(topic))


# What is wrong -> way in, what is changed, and the words that the message must have: the field, or who must act.
REFUSALS: dict[str, tuple[str, dict[str, str], dict[str, str], str]] = {
    "wrong ca": ("scram over tls", {"ssl.ca.location": "{stranger_ca}"}, {}, r"ssl\.ca\.location"),
    "wrong host name": ("scram over tls", {"bootstrap.servers": "127.0.0.2:{port}"}, {}, r"names the host in bootstrap\.servers"),
    "expired certificate": (
        "mutual tls", {"bootstrap.servers": "{expired}", "ssl.ca.location": "{expired_ca}"}, {}, r"expired",
    ),
    "no client certificate": (
        "mutual tls", {"ssl.keystore.location": "", "ssl.keystore.password": ""}, {}, r"ssl\.keystore\.location",
    ),
    "unknown client certificate": (
        "mutual tls", {"ssl.keystore.location": "{stranger_store}"}, {}, r"ssl\.keystore\.location",
    ),
    "wrong password by scram": ("scram over tls", {}, {"KAFKA_PASSWORD": "guessed-canary"}, r"sasl\.password"),
    "wrong password by plain": ("plain over tls", {}, {"KAFKA_PASSWORD": "guessed-canary"}, r"sasl\.password"),
    "unknown user": ("scram over tls", {"sasl.username": "nobody"}, {}, r"sasl\.username"),
    "mechanism that is off": ("scram over tls", {"sasl.mechanism": "PLAIN"}, {}, r"sasl\.mechanism"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", list(REFUSALS))
def test_a_refusal_names_the_field_and_is_not_asked_again_and_again(vault: Vault, tmp_path: Path, wrong: str) -> None:
    way, changes, environment, named = REFUSALS[wrong]
    place = Corner(tmp_path, vault.broker, "refused")
    kafka = good_ways_in(vault)[way]
    target = vault.expired.bootstrap if "{expired}" in changes.values() else kafka["bootstrap.servers"]
    # the broker behind a proxy that counts; it has the proxy's address only as a first one, and there the login fails
    host = "127.0.0.2" if wrong == "wrong host name" else "127.0.0.1"
    with Proxy(port_of(target), "bytes", host=host) as proxy:
        known = {
            "stranger_ca": vault.stranger_ca, "stranger_store": vault.stranger_store, "expired_ca": vault.expired_ca,
            "expired": f"{host}:{proxy.port}", "port": proxy.port,
        }  # fmt: skip
        kafka |= {"bootstrap.servers": f"{host}:{proxy.port}"}
        kafka |= {name: value.format(**known) for name, value in changes.items()}
        kafka = {name: value for name, value in kafka.items() if value}
        job = place.job("any", kafka=kafka)
        outcome = job.run(environment={**ENVIRONMENT, **environment}, timeout_s=REFUSED_S_MAX)
        connections = proxy.connections
    stop = outcome.expect_stop(NOT_AUTHORIZED, "NOT_AUTHORIZED")
    said = f"{stop['what']} {stop['way_out']}"
    assert re.search(named, said), f"{wrong}: {said}"
    assert "tidemill run" in stop["way_out"], stop
    assert 0 < connections <= CONNECTIONS_MAX, f"{wrong}: {connections} connections"
    for secret in (PASSWORD, READER_PASSWORD, "guessed-canary"):
        assert secret not in outcome.stdout + outcome.stderr, "a secret was printed"
    outcomes.record("security", wrong, reason=stop["reason"], what=stop["what"], connections=connections)


DANGEROUS = {
    "plugin.library.paths": "/tmp/evil.so", "ssl.engine.location": "/tmp/evil.so", "ssl.engine.id": "evil",
    "ssl.providers": "evil", "sasl.kerberos.kinit.cmd": "touch {victim}", "enable.sasl.oauthbearer.unsecure.jwt": "true",
    "debug": "all", "internal.termination.signal": "9", "test.mock.num.brokers": "1", "test.mock.broker.rtt": "1",
    "enabled_events": "0", "log.queue": "false", "auto.offset.reset": "latest", "isolation.level": "read_uncommitted",
    "enable.auto.commit": "true", "check.crcs": "false", "statistics.interval.ms": "1", "transactional.id": "x",
}  # fmt: skip


def test_no_property_loads_code_runs_a_command_or_bends_what_exactness_rests_on(tmp_path: Path) -> None:
    job = Job(folder=tmp_path / "job", topics=["t"], kafka={"bootstrap.servers": "127.0.0.1:1"})
    victim = tmp_path / "victim"
    for name, value in DANGEROUS.items():
        for spelled in (name, name.upper()):
            job.kafka = {"bootstrap.servers": "127.0.0.1:1", spelled: value.format(victim=victim)}
            job.write()
            refused = tidemill("run", job.path, timeout_s=REFUSED_S_MAX).expect(USAGE)
            assert spelled in refused.stderr, refused.stderr
    assert not victim.exists()


def test_an_s3_key_that_is_wrong_stops_with_the_field(place: Corner, rest_catalog: RestCatalog, s3: S3Server) -> None:
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(10)))
    catalog = {
        "type": "rest", "uri": rest_catalog.uri, "warehouse": rest_catalog.warehouse, **s3.properties(),
        "s3.secret-access-key": "env:S3_SECRET_KEY",
    }  # fmt: skip
    job = place.job(topic, catalog=catalog, s3=s3.properties())
    wrong = job.run(environment={"S3_SECRET_KEY": "guessed-canary"})
    stop = wrong.expect_stop(NOT_AUTHORIZED, "NOT_AUTHORIZED")
    assert "sink.iceberg.catalog" in stop["way_out"] or "warehouse" in stop["way_out"], stop
    assert "guessed-canary" not in wrong.stdout + wrong.stderr
    job.run(environment={"S3_SECRET_KEY": s3.properties()["s3.secret-access-key"]}).expect(0)
    job.check_against(place.truth(topic))


@pytest.mark.parametrize("status", [401, 403])
def test_a_catalog_that_refuses_stops_and_is_not_asked_again_and_again(
    place: Corner, rest_catalog: RestCatalog, s3: S3Server, status: int
) -> None:
    topic = place.topic()
    with Proxy(rest_catalog.port, "http") as proxy:
        catalog = {
            "type": "rest", "uri": f"http://127.0.0.1:{proxy.port}", "warehouse": rest_catalog.warehouse,
            **s3.properties(), "s3.secret-access-key": "env:S3_SECRET_KEY", "token": "env:CATALOG_TOKEN",
        }  # fmt: skip
        job = place.job(topic, catalog=catalog, s3=s3.properties())
        secrets = {"S3_SECRET_KEY": s3.properties()["s3.secret-access-key"], "CATALOG_TOKEN": "token-canary"}
        proxy.inject(Fault("status before", ".", times=None, status=status))
        refused = job.run(environment=secrets, timeout_s=REFUSED_S_MAX)
        asked = proxy.requests.total()
        proxy.lift()
        stop = refused.expect_stop(NOT_AUTHORIZED, "NOT_AUTHORIZED")
        assert "sink.iceberg.catalog" in stop["way_out"], stop
        assert asked <= CONNECTIONS_MAX, proxy.requests
        assert "canary" not in refused.stdout + refused.stderr
        job.run(environment=secrets).expect(0)


def only_folder(job: Job) -> Path:
    """Where the job's state is."""
    return job.folder / "state" / job.name


def filled(place: Corner, **fields: Any) -> Job:
    """A job that has run once."""
    topic = place.topic()
    place.feed(topic).send(*(event(number) for number in range(500)))
    job = place.job(topic, **fields)
    job.run().expect(0)
    return job


def test_the_state_is_for_its_owner_alone_whatever_the_umask(place: Corner) -> None:
    before = os.umask(0)
    try:
        job = filled(place)
    finally:
        os.umask(before)
    folder = only_folder(job)
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {0o600}, modes


def test_a_state_folder_of_another_user_stops_with_its_name_and_changes_nothing(place: Corner) -> None:
    job = filled(place)
    # as root a foreign folder could be written; as anyone else it can not even be given away
    give_away = ["chown", "-R", "65534"] if os.geteuid() == 0 else ["chmod", "o+w"]
    subprocess.run([*give_away, only_folder(job)], check=True)
    before = {path: path.read_bytes() for path in only_folder(job).iterdir()}
    place.feed(job.topics[0]).send(event(1_000))
    stop = job.run().expect_stop(STORAGE_FAILED, "STORAGE_FAILED")
    assert "state_dir" in stop["way_out"] and str(only_folder(job)) in stop["what"], stop
    assert {path: path.read_bytes() for path in only_folder(job).iterdir()} == before
    take_back = ["chown", "-R", "0"] if os.geteuid() == 0 else ["chmod", "o-w"]
    subprocess.run([*take_back, only_folder(job)], check=True)
    job.run().expect(0)
    job.check_against(place.truth(*job.topics))


def test_a_link_in_the_state_folder_is_not_followed(place: Corner) -> None:
    job = filled(place)
    victim = place.folder / "victim"
    victim.write_text("untouched\n")
    lock = only_folder(job) / "lock"
    lock.unlink()
    lock.symlink_to(victim)
    place.feed(job.topics[0]).send(event(1_000))
    stop = job.run().expect_stop(STORAGE_FAILED, "STORAGE_FAILED")
    assert str(lock) in stop["what"], stop
    assert victim.read_text() == "untouched\n"
    lock.unlink()
    job.run().expect(0)
    job.check_against(place.truth(*job.topics))


WILD = (
    "../../../../tmp/escaped", "/etc/passwd", "a/../../b", "%2e%2e%2f", "..", ".", "", "a" * 3_000, "ä" * 200, "a\\..\\b",
    "new\nline", "null\x00byte", "\x1b[31mred", "emoji \U0001f30a", "file:///etc", "s3://other/bucket", "?a=b#c", " ",
)  # fmt: skip


def test_values_of_events_never_become_paths(place: Corner) -> None:
    topic = place.topic()
    place.feed(topic).send(*(event(number, channel=value) for number, value in enumerate(WILD)))
    job = place.job(topic, partition_by=["channel"])
    outside = {path for path in place.folder.rglob("*") if job.folder not in path.parents}
    job.run().expect(0)
    job.check_against(place.truth(topic))
    found = dict(job.duckdb().query("select event_id, channel from {table}"))
    assert found == {event_id(number): value for number, value in enumerate(WILD)}
    assert {path for path in place.folder.rglob("*") if job.folder not in path.parents} - outside <= {job.folder}
    assert not Path("/tmp/escaped").exists()
    root = job.warehouse.resolve()
    assert all(path.resolve().is_relative_to(root) for path in job.warehouse.rglob("*"))


@pytest.mark.parametrize("name", ["../up", "a/b", "..", "/abs", "a\0b", "", "x" * 300, "%2e%2e"])
def test_a_job_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    job = Job(folder=tmp_path / "job", topics=["t"], kafka={"bootstrap.servers": "127.0.0.1:1"}, name=name)
    tidemill("check", job.path).expect(USAGE)
    assert {path.name for path in tmp_path.iterdir()} == {"job"}


MEMORY_BYTES = 256 << 20
# Room for what is no memory of the program: page cache of the files that it reads and writes.
CGROUP_BYTES = 288 << 20


def bombs() -> dict[str, list[bytes]]:
    """Records that are far larger or deeper than they look."""
    members = ",".join(f'"m{number}":{number}' for number in range(100_000))
    good = json.dumps(event(1))[:-1]
    return {
        "blanks that compress a thousandfold": [b" " * (5 << 20)] * 2,
        "a text of megabytes": [f'{good},"campaign":"{"x" * (3 << 20)}"}}'.encode()] * 3,
        "depth": [(good + ',"x":' + "[" * 1_000_000 + "]" * 1_000_000 + "}").encode()] * 4,
        "an array of tiny rows": [("[" + ",".join(["{}"] * 1_000_000) + "]").encode()] * 3,
        "members by the hundred thousand": [(good + "," + members + "}").encode()] * 8,
        "a number of many digits": [(good + ',"user_id":' + "9" * 100_000 + "}").encode()] * 4,
        "escapes": [(good + ',"campaign":"' + "\\u0061" * 600_000 + '"}').encode()] * 2,
    }


def run_inside(job: Job, limit_bytes: int) -> Outcome:
    """One drain under a hard limit of memory, which the kernel enforces by ending the program."""
    with memory_limit(limit_bytes) as inside:
        done = subprocess.run(
            [*inside, str(binary()), "run", str(job.path), "--json"],
            capture_output=True, text=True, timeout=RUN_S_MAX, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    return Outcome([*inside, "run", str(job.path)], done.returncode, done.stdout, done.stderr)


def send_batch(broker: Broker, topic: str, compression: str, records: list[bytes]) -> None:
    """Sends records as one compressed batch, whatever their size before compression."""
    together = sum(map(len, records)) + (1 << 20)
    Feed(
        broker.bootstrap, topic,
        **{"compression.type": compression, "linger.ms": 2_000, "batch.size": together, "message.max.bytes": together,
           "queue.buffering.max.kbytes": together >> 9},
    ).send(*records)  # fmt: skip


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_bombs_in_the_topics_stay_within_the_memory_of_the_job(place: Corner, compression: str) -> None:
    topics = []
    for name, records in bombs().items():
        topics.append(place.topic(name.replace(" ", "-"), max_message_bytes=str(64 << 20)))
        feed = place.feed(topics[-1]).send(event(len(topics)))
        send_batch(place.broker, topics[-1], compression, records)
        feed.send(event(100 + len(topics)))
    job = place.job(*topics, memory="256 MiB", max_ratio=1.0)
    assert run_inside(job, CGROUP_BYTES).expect(0).last["event"] == "done"
    truth = place.truth(*topics)
    job.check_against(truth)
    ledger.check_conservation(job.reader().table, truth)


def test_a_batch_that_is_far_larger_than_its_bytes_stops_by_name_before_it_takes_the_memory(place: Corner) -> None:
    topic = place.topic(max_message_bytes=str(64 << 20))
    feed = place.feed(topic).send(event(1))
    send_batch(place.broker, topic, "zstd", [b" " * (15 << 20)] * 24)
    feed.send(event(2))
    job = place.job(topic, memory="256 MiB", max_ratio=1.0)
    stop = run_inside(job, CGROUP_BYTES).expect_stop(OFFSETS_LOST, "OFFSETS_LOST")
    assert topic in stop["what"] and "damaged" in stop["what"], stop


CANARY = "canary-7f3a"


def test_secrets_in_any_field_are_printed_by_nothing(place: Corner, vault: Vault, s3: S3Server) -> None:
    secret_file = place.folder / "secret"
    secret_file.write_text(f"{CANARY}-of-a-file")
    secret_file.chmod(0o600)
    kafka = {
        **vault.broker.sasl_properties(tls=True), "sasl.password": "env:CANARY_PASSWORD",
        "ssl.key.password": "env:CANARY_KEY", "sasl.username": "reader",
    }  # fmt: skip
    with Proxy(s3.port, "http") as rest:
        catalog = {
            "type": "rest", "uri": f"http://127.0.0.1:{rest.port}", "warehouse": "s3://warehouse/wh",
            **s3.properties(), "s3.secret-access-key": "env:CANARY_S3", "s3.access-key-id": "env:CANARY_ID",
            "s3.session-token": "env:CANARY_SESSION", "token": f"file:{secret_file}", "header.x-api-key": "env:CANARY_HEADER",
        }  # fmt: skip
        secrets = {
            f"CANARY_{name}": f"{CANARY}-{name.lower()}"
            for name in ("PASSWORD", "KEY", "S3", "ID", "SESSION", "HEADER", "CREDENTIAL")
        }
        job = place.job("any", kafka=kafka, catalog=catalog)
        said = [
            tidemill(*words, "--log", "trace", environment={**secrets, "RUST_BACKTRACE": "full"}, timeout_s=REFUSED_S_MAX)
            for words in (("check", job.path), ("plan", job.path, "--json"), ("run", job.path, "--json"), ("run", job.path))
        ]
        del catalog["token"]
        job.catalog = {**catalog, "credential": "env:CANARY_CREDENTIAL"}
        job.write()
        said.append(tidemill("run", job.path, "--log", "trace", environment=secrets, timeout_s=REFUSED_S_MAX))
    for outcome in said:
        for stream in (outcome.stdout, outcome.stderr):
            at = stream.find(CANARY)
            assert at < 0, f"{outcome.command}: ...{stream[max(0, at - 300) : at + 60]}..."
    assert rest.requests.total() > 0, "the catalog was asked with the secrets"


def test_a_literal_secret_is_refused_and_not_repeated(tmp_path: Path) -> None:
    fields: list[tuple[str, str, str]] = [
        ("kafka", name, CANARY)
        for name in (
            "sasl.password", "ssl.key.password", "ssl.key.pem", "ssl.keystore.password", "sasl.oauthbearer.client.secret",
            "sasl.oauthbearer.config", "sasl.oauthbearer.assertion.private.key.passphrase",
        )
    ] + [
        ("catalog", name, CANARY)
        for name in ("s3.secret-access-key", "s3.session-token", "token", "credential", "header.authorization")
    ] + [
        ("catalog", "uri", f"http://user:{CANARY}@127.0.0.1:1/"),
    ]  # fmt: skip
    for where, name, value in fields:
        rest = {"type": "rest", "uri": "http://127.0.0.1:1", "warehouse": "w"}
        job = Job(
            folder=tmp_path / "job", topics=["t"],
            kafka={"bootstrap.servers": "127.0.0.1:1", **({name: value} if where == "kafka" else {})},
            catalog=rest | ({name: value} if where == "catalog" else {}),
        )  # fmt: skip
        for words in (("check",), ("run",), ("plan",)):
            refused = tidemill(*words, job.path, "--log", "trace", timeout_s=REFUSED_S_MAX).expect(USAGE)
            assert CANARY not in refused.stdout + refused.stderr, f"{name} was printed:\n{refused.stderr}"
            assert name in refused.stderr, f"{name} is not named:\n{refused.stderr}"
        shutil.rmtree(job.folder)


def test_nothing_that_stays_holds_a_secret(place: Corner, vault: Vault) -> None:
    topic = f"{place.prefix}.kept"
    vault.broker.create_topic(topic)
    vault.broker.allow_reading(topic)
    corner = Corner(place.folder, vault.broker, "kept")
    corner.feed(topic).send(*(event(number) for number in range(100)), event(1, event_type=None))
    job = corner.job(topic, kafka=vault.broker.sasl_properties(tls=True), max_ratio=0.5)
    outcome = job.run("--log", "trace").expect(0)
    assert READER_PASSWORD not in outcome.stdout + outcome.stderr
    looked_at = 0
    for path in job.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            assert READER_PASSWORD.encode() not in content, path
            looked_at += 1
    assert looked_at > 5, sorted(job.folder.rglob("*"))
    assert "KAFKA_PASSWORD" in job.path.read_text(), "the job file names the variable only"
