"""One Apache Kafka broker (KRaft, combined mode) with an open, a SASL_PLAINTEXT and a SASL_SSL listener and ACLs.

The open listener's principal is a super user: tests arrange and inspect through it. Principals of the SASL listeners
may do only what `allow_reading` grants, as in a cluster that is run with care.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    NewTopic,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
)

from services.process import Process, cache_folder, free_ports, wait_until

CLUSTER_ID = "4L6g3nShT-eMCtK--X86sw"
READER, READER_PASSWORD = "reader", "reader-secret"
# Guards against hanging, far above what a busy machine takes.
ANSWER_S_MAX = 120
TOOL_S_MAX = 600
NOT_LED_YET = (
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError.FENCED_LEADER_EPOCH, KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError._NOENT,
)  # fmt: skip
JAVA = ["java", "-Xms64m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]

LOG4J2 = """
Configuration:
  Appenders:
    Console:
      name: out
      target: SYSTEM_OUT
      PatternLayout: {pattern: "%d %p %m (%c)%n"}
  Loggers:
    Root:
      level: INFO
      AppenderRef: [{ref: out}]
"""

SERVER = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{plain},SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{ssl},CONTROLLER://127.0.0.1:{controller}{more_listeners}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{ssl}{more_advertised}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT{more_protocols}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={folder}/data
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
message.max.bytes=16777216
replica.fetch.max.bytes=16777216
log.segment.bytes=67108864
log.cleaner.dedupe.buffer.size=8388608
# a compacted topic is cleaned as soon as it is dirty
log.cleaner.backoff.ms=100
# event times of generated records lie in the past; nothing is old here
log.retention.ms=-1
# long enough that a broker on a busy machine is not taken for dead, which leaves its topics without leaders
broker.session.timeout.ms=9000
broker.heartbeat.interval.ms=500
num.network.threads=2
num.io.threads=2
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
allow.everyone.if.no.acl.found=false
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PKCS12
ssl.keystore.location={folder}/broker.p12
ssl.keystore.password=changeit
ssl.client.auth=none
{more_settings}
"""


@dataclass(frozen=True)
class Listener:
    """One more listener of a broker, which may tell its clients another port than its own: that of a proxy before it."""

    name: str
    protocol: str = "PLAINTEXT"
    port: int = field(default_factory=lambda: free_ports(1)[0])
    advertised_port: int | None = None
    settings: tuple[str, ...] = ()

    @property
    def bootstrap(self) -> str:
        """Address that clients are told."""
        return f"127.0.0.1:{self.advertised_port or self.port}"


class Broker:
    """A broker that is up between `__enter__` and `__exit__`, or `start` and `stop`; its data outlives a restart."""

    def __init__(self, folder: Path, ports: list[int] | None = None, listeners: Sequence[Listener] = ()) -> None:
        self.folder = folder
        self._process: Process | None = None
        self._admin: AdminClient | None = None
        plain, sasl, ssl, controller = ports or free_ports(4)
        self.bootstrap = f"127.0.0.1:{plain}"
        self.sasl_bootstrap = f"127.0.0.1:{sasl}"
        self.ssl_bootstrap = f"127.0.0.1:{ssl}"
        self.ca_path = folder / "ca.pem"
        folder.mkdir(parents=True)
        (folder / "log4j2.yaml").write_text(LOG4J2)
        (folder / "server.properties").write_text(
            SERVER.format(
                plain=plain, sasl=sasl, ssl=ssl, controller=controller, folder=folder,
                more_listeners="".join(f",{one.name}://127.0.0.1:{one.port}" for one in listeners),
                more_advertised="".join(f",{one.name}://{one.bootstrap}" for one in listeners),
                more_protocols="".join(f",{one.name}:{one.protocol}" for one in listeners),
                more_settings="\n".join(line for one in listeners for line in one.settings),
            )
        )  # fmt: skip
        self._make_certificate()
        self._format()

    @property
    def pid(self) -> int:
        """Process id of the broker that is up."""
        assert self._process, "the broker is down"
        return self._process.pid

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the broker and returns when it serves."""
        self._process = Process(
            "kafka",
            [*self._java(), "kafka.Kafka", self.folder / "server.properties"],
            self.folder,
            ready=lambda process: "Kafka Server started" in process.log(),
        )

    def stop(self) -> None:
        """Ends the broker in order."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    @property
    def admin(self) -> AdminClient:
        """An administrator on the open listener. Kept: a client that is dropped forgets its requests."""
        if self._admin is None:
            self._admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 2})
        return self._admin

    def create_topic(self, name: str, partitions: int = 1, **config: str) -> None:
        """Creates a topic; returns when the broker answered. Underscores in names of settings stand for dots."""
        settings = {key.replace("_", "."): value for key, value in config.items()}
        made = self.admin.create_topics([NewTopic(name, partitions, 1, config=settings)])
        made[name].result(timeout=ANSWER_S_MAX)
        wait_until(f"leaders of {name}", lambda: self._is_led(name, partitions), pause_s=0.05)

    def _is_led(self, topic: str, partitions: int) -> bool:
        """Whether the broker leads every partition: that follows the answer to a creation a little later."""
        asked = {TopicPartition(topic, number): OffsetSpec.latest() for number in range(partitions)}
        try:
            return all(answer.result(timeout=ANSWER_S_MAX) for answer in self.admin.list_offsets(asked).values())
        except KafkaException as error:
            if error.args[0].code() not in NOT_LED_YET:
                raise
            # a client that met a partition before its leader may answer from that memory for ever
            self._admin = None
            return False

    def add_partitions(self, topic: str, count: int) -> None:
        """Raises the number of a topic's partitions to `count`."""
        self.admin.create_partitions([NewPartitions(topic, count)])[topic].result(timeout=ANSWER_S_MAX)

    def delete_topic(self, topic: str) -> None:
        """Deletes a topic."""
        self.admin.delete_topics([topic])[topic].result(timeout=ANSWER_S_MAX)

    def delete_records(self, topic: str, partition: int, before: int) -> None:
        """Deletes the records below an offset, as retention does."""
        place = TopicPartition(topic, partition, before)
        self.admin.delete_records([place])[place].result(timeout=ANSWER_S_MAX)

    def allow_reading(self, *topics: str, principal: str = READER) -> None:
        """Grants a principal READ and DESCRIBE on these topics, and nothing else."""
        grants = [
            AclBinding(
                ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{principal}", "*", operation,
                AclPermissionType.ALLOW,
            )
            for topic in topics
            for operation in (AclOperation.READ, AclOperation.DESCRIBE)
        ]  # fmt: skip
        for answer in self.admin.create_acls(grants).values():
            answer.result(timeout=ANSWER_S_MAX)

    def sasl_properties(self, tls: bool = False) -> dict[str, str]:
        """librdkafka properties of the principal `reader`; the password stands in `KAFKA_PASSWORD`."""
        properties = {
            "bootstrap.servers": self.ssl_bootstrap if tls else self.sasl_bootstrap,
            "security.protocol": "SASL_SSL" if tls else "SASL_PLAINTEXT",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": READER,
            "sasl.password": "env:KAFKA_PASSWORD",
        }
        if tls:
            properties["ssl.ca.location"] = str(self.ca_path)
        return properties

    def _java(self) -> list[str]:
        jars = cache_folder() / "kafka" / "*"
        return [*JAVA, "-cp", str(jars), f"-Dlog4j2.configurationFile={self.folder}/log4j2.yaml"]

    def _format(self) -> None:
        user = f"SCRAM-SHA-512=[name={READER},password={READER_PASSWORD}]"
        config = self.folder / "server.properties"
        _run(
            [
                *self._java(),
                "kafka.tools.StorageTool",
                "format",
                "-t",
                CLUSTER_ID,
                "-c",
                str(config),
                "--add-scram",
                user,
            ]
        )

    def _make_certificate(self) -> None:
        self.ca_path = make_certificate(self.folder / "broker.p12", "localhost").replace(self.ca_path)


def make_certificate(store_path: Path, name: str, *more: str) -> Path:
    """Makes a key with a certificate that it signed itself, for 30 days from now, in a PKCS12 store whose password is
    `changeit`; returns the certificate beside it. `more` are words for keytool, such as another validity."""
    store = ["-alias", "one", "-keystore", str(store_path), "-storepass", "changeit"]
    _run(
        ["keytool", "-genkeypair", *store, "-storetype", "PKCS12", "-keyalg", "EC", "-groupname", "secp256r1",
         "-sigalg", "SHA256withECDSA", "-dname", f"CN={name}", "-ext", "san=dns:localhost,ip:127.0.0.1",
         *(more or ("-validity", "30"))]
    )  # fmt: skip
    certificate = store_path.with_suffix(".pem")
    _run(["keytool", "-exportcert", "-rfc", *store, "-file", str(certificate)])
    return certificate


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S_MAX)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
