"""What must be in the tables, recomputed from the topics alone.

Nothing of tidemill is used: confluent-kafka reads (read_committed, its own assignment), Python's json decodes, a
plain dict remembers. The rules below are those of the job that `job.py` writes, stated a second time.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from confluent_kafka import Consumer, IsolationLevel, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

# Far above what is generated: an end that does not come is an error, not a wait.
IDLE_S_MAX = 120.0
ANSWER_S_MAX = 120
AHEAD_MS_MAX = 60 * 60 * 1000
RECORD_BYTES_MAX = 4 << 20
ROWS_PER_RECORD_MAX = 65_536
DEPTH_MAX = 128
# What an unfinished text may end with: a number or literal that is not complete, or an escape.
TOKEN_BEGUN = re.compile(r"|-|\.\d*|\d*\.?\d*[eE][+-]?|tr?u?|fa?l?s?|nu?l?|\\?u?[0-9a-fA-F]{0,3}")


class Place(NamedTuple):
    """Where one row stands: an array record holds several, told apart by their index."""

    topic: str
    partition: int
    offset: int
    row_index: int = 0


class Row(NamedTuple):
    """One row: an event with its id and type, or a reason why it is none."""

    event_id: str | None
    event_type: str | None
    reason: str | None = None


class Refused(ValueError):
    """A value that Python's json takes and the rules do not."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Refused("duplicate_field")
    return members


def _constant(name: str) -> Any:
    raise Refused("invalid_json")


# A number may have as many digits as a record has room for.
sys.set_int_max_str_digits(0)
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Decimal, parse_constant=_constant, strict=True)


def rows_of(payload: bytes | None, timestamp_ms: int | None) -> list[Row]:
    """Splits one record into rows and judges each."""
    if payload is None:
        return [_bad("tombstone")]
    if not payload:
        return [_bad("empty_payload")]
    if len(payload) > RECORD_BYTES_MAX:
        return [_bad("record_too_large")]
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError:
        return [_bad("invalid_utf8")]
    try:
        value = _DECODER.decode(text)
    except Refused as refused:
        return [_bad(refused.reason)]
    except RecursionError:
        return [_bad("too_deep")]
    except json.JSONDecodeError as error:
        rest = text[error.pos :].rstrip()
        cut_short = TOKEN_BEGUN.fullmatch(rest) or error.msg.startswith("Unterminated string")
        return [_bad("truncated_json" if cut_short else "invalid_json")]
    if text.count("{") + text.count("[") > DEPTH_MAX and _depth(value) > DEPTH_MAX:
        return [_bad("too_deep")]
    if "\\u" in text and _has_lone_surrogate(value):
        return [_bad("invalid_json")]
    if isinstance(value, list):
        if len(value) > ROWS_PER_RECORD_MAX:
            return [_bad("record_too_large")]
        return [_judge(element, timestamp_ms) for element in value] or [_bad("empty_array")]
    return [_judge(value, timestamp_ms)]


def _bad(reason: str) -> Row:
    return Row(None, None, reason)


def _judge(event: Any, timestamp_ms: int | None) -> Row:
    """Judges one object: required members first, then types and ranges of all, then the time."""
    if not isinstance(event, dict):
        return _bad("not_an_object")
    for name, if_missing in REQUIRED.items():
        if event.get(name) is None:
            return _bad(if_missing)
    delivery = event.get("delivery") or {}
    if not isinstance(delivery, dict):
        return _bad("wrong_type")
    for name, fits in MEMBERS.items():
        value = (delivery if name in DELIVERY else event).get(name)
        if value is not None and (reason := fits(value)):
            return _bad(reason)
    if not event["event_id"]:
        return _bad("empty_key")
    now_ms = time.time_ns() // 1_000_000
    if event["ts"] > min(now_ms, now_ms if timestamp_ms is None else timestamp_ms) + AHEAD_MS_MAX:
        return _bad("event_time_ahead")
    return Row(event["event_id"], event["event_type"])


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "wrong_type"


def _whole(bits: int, factor: int = 1) -> Callable[[Any], str | None]:
    """A judge of whole numbers that, times `factor`, fit a signed integer of so many bits."""
    limit = 1 << (bits - 1)

    def fits(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
            return "wrong_type"
        exact = value == value.to_integral_value() if isinstance(value, Decimal) else True
        return None if exact and -limit <= value * factor < limit else "out_of_range"

    return fits


def _price(value: Any) -> str | None:
    """decimal(9, 2): nine digits, two of them after the point."""
    if isinstance(value, bool) or not isinstance(value, (int, Decimal)):
        return "wrong_type"
    hundredths = Decimal(value) * 100
    return None if hundredths == hundredths.to_integral_value() and abs(hundredths) < 10**9 else "out_of_range"


REQUIRED = {"event_id": "null_key", "event_type": "missing_required", "ts": "missing_event_time"}
DELIVERY = {"provider", "region", "attempt"}
# Every member that a column reads, with its judge.
MEMBERS: dict[str, Callable[[Any], str | None]] = {
    "event_id": _text,
    "event_type": _text,
    "ts": _whole(64, factor=1000),
    "notification_id": _text,
    "user_id": _whole(64),
    "campaign": _text,
    "channel": _text,
    "provider": _text,
    "region": _text,
    "attempt": _whole(32),
    "price": _price,
    "locale": _text,
}


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


@dataclass
class LogTruth:
    """The topics' truth up to `ends`, the last stable offsets at the latest `advance`."""

    bootstrap: str
    topics: list[str]
    keep_rows: bool = True
    ends: dict[tuple[str, int], int] = field(default_factory=dict)
    starts: dict[tuple[str, int], int] = field(default_factory=dict)
    consumed: int = 0
    good: int = 0
    # event id -> type of the copy read first
    events: dict[str, str] = field(default_factory=dict)
    letters: dict[Place, str] = field(default_factory=dict)
    rows: dict[tuple[str, int], list[tuple[Place, Row]]] = field(default_factory=dict)

    def advance(self) -> LogTruth:
        """Reads what was appended since the last call, to the last stable offsets of this moment."""
        ends = end_offsets(self.bootstrap, self.topics)
        for partition, start in start_offsets(self.bootstrap, self.topics).items():
            self.starts.setdefault(partition, start)
            self.ends.setdefault(partition, start)
        for message in _read(self.bootstrap, self.ends, ends):
            self._take(message)
        self.ends = ends
        return self

    def _take(self, message: Message) -> None:
        kind, timestamp = message.timestamp()
        rows = rows_of(message.value(), timestamp if kind and timestamp >= 0 else None)
        for index, row in enumerate(rows):
            place = Place(*_partition_of(message), _offset_of(message), index)
            self.consumed += 1
            if row.event_id is None:
                assert row.reason is not None, "a row is an event or has a reason"
                self.letters[place] = row.reason
            else:
                self.good += 1
                self.events.setdefault(row.event_id, row.event_type or "")
            if self.keep_rows:
                self.rows.setdefault((place.topic, place.partition), []).append((place, row))

    @property
    def by_type(self) -> dict[str, int]:
        """Distinct events per type."""
        return dict(Counter(self.events.values()))

    @property
    def by_reason(self) -> dict[str, int]:
        """Refused rows per reason."""
        return dict(Counter(self.letters.values()))

    @property
    def duplicates(self) -> int:
        """Rows that repeat an event."""
        return self.good - len(self.events)

    def rows_between(
        self, starts: dict[tuple[str, int], int], ends: dict[tuple[str, int], int]
    ) -> Iterator[tuple[Place, Row]]:
        """Rows whose offset lies in `[start, end)` of their topic partition."""
        for partition, end in ends.items():
            start = starts.get(partition, 0)
            for place, row in self.rows.get(partition, []):
                if start <= place.offset < end:
                    yield place, row


def _partition_of(message: Message) -> tuple[str, int]:
    topic, partition = message.topic(), message.partition()
    assert topic is not None and partition is not None, "a message of an assignment names its topic partition"
    return topic, partition


def _offset_of(message: Message) -> int:
    offset = message.offset()
    assert offset is not None, "a message of an assignment, and an end, has an offset"
    return offset


def partitions_of(bootstrap: str, topics: list[str]) -> list[TopicPartition]:
    """All topic partitions of these topics."""
    metadata = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2}).list_topics(timeout=ANSWER_S_MAX)
    return [TopicPartition(topic, number) for topic in topics for number in sorted(metadata.topics[topic].partitions)]


def end_offsets(bootstrap: str, topics: list[str]) -> dict[tuple[str, int], int]:
    """Last stable offsets: where a read_committed reader ends."""
    return _list_offsets(bootstrap, topics, OffsetSpec.latest())


def start_offsets(bootstrap: str, topics: list[str]) -> dict[tuple[str, int], int]:
    """The oldest offsets that the broker holds."""
    return _list_offsets(bootstrap, topics, OffsetSpec.earliest())


def _list_offsets(bootstrap: str, topics: list[str], which: OffsetSpec) -> dict[tuple[str, int], int]:
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 2})
    asked = {partition: which for partition in partitions_of(bootstrap, topics)}
    answers = admin.list_offsets(asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=ANSWER_S_MAX)
    return {(partition.topic, partition.partition): answer.result().offset for partition, answer in answers.items()}


def _read(bootstrap: str, starts: dict[tuple[str, int], int], ends: dict[tuple[str, int], int]) -> Iterator[Message]:
    """Every committed record in `[start, end)`. The end may be a control record, so only EOF tells that it is reached."""
    waiting = {partition for partition, end in ends.items() if starts.get(partition, 0) < end}
    if not waiting:
        return
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "truth-reads-without-a-group",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "fetch.message.max.bytes": 16 << 20,
        }
    )
    consumer.assign([TopicPartition(topic, number, starts[topic, number]) for topic, number in waiting])
    heard = time.monotonic()
    try:
        while waiting:
            for message in consumer.consume(20_000, timeout=1.0):
                heard = time.monotonic()
                partition, offset, error = _partition_of(message), _offset_of(message), message.error()
                if error is not None and error.code() != KafkaError._PARTITION_EOF:
                    raise RuntimeError(f"{partition}: {error}")
                if error is None and offset < ends[partition]:
                    yield message
                if offset + (error is None) >= ends[partition]:
                    waiting.discard(partition)
            if time.monotonic() - heard > IDLE_S_MAX:
                raise TimeoutError(f"no end of {sorted(waiting)} within {IDLE_S_MAX} s")
    finally:
        consumer.close()
