"""Hand-made events for tests that need to know every byte of a topic."""

from __future__ import annotations

import json
import time
from typing import Any

from confluent_kafka import Producer

NOW_MS = time.time_ns() // 1_000_000


def event_id(number: int) -> str:
    """The id of the event of this number."""
    return f"event-{number:09}"


def event(number: int, **members: Any) -> dict[str, Any]:
    """A good event whose id follows from its number; members given replace or add."""
    return {
        "event_id": event_id(number),
        "event_type": ("generated", "sent", "delivered", "clicked")[number % 4],
        "ts": NOW_MS - 3_600_000 + number,
        "notification_id": f"notification-{number // 4}",
        "user_id": number % 97 + (1 << 53),
        "campaign": "welcome-1",
        "channel": "push",
        "price": 12.5,
        "delivery": {"provider": "fcm", "region": "eu-west-1", "attempt": 1},
        "locale": "en-GB",
        **members,
    }


class Feed:
    """A producer to one topic."""

    def __init__(self, bootstrap: str, topic: str, **config: Any) -> None:
        self.topic = topic
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "linger.ms": 5,
                "message.max.bytes": 16 << 20,
                "acks": "all",
                # what went wrong is raised; a broker that ends before its clients is no news
                "log_level": 2,
                **config,
            }
        )
        self._failures: list[str] = []

    def send(self, *values: dict[str, Any] | list[Any] | bytes | str | None, flush: bool = True, **more: Any) -> Feed:
        """Sends values in order: dicts and lists as JSON, bytes and text as they are, None as a tombstone."""
        for value in values:
            payload = value if value is None or isinstance(value, (bytes, str)) else json.dumps(value)
            self._produce(payload, more)
        if flush:
            self.flush()
        return self

    def _produce(self, payload: bytes | str | None, more: dict[str, Any]) -> None:
        while True:
            try:
                self.producer.produce(self.topic, payload, on_delivery=self._delivered, **more)
                return
            except BufferError:
                self.producer.poll(0.1)

    def _delivered(self, error: Any, _message: Any) -> None:
        if error is not None:
            self._failures.append(str(error))

    def flush(self) -> None:
        """Returns when the broker has every record; fails if it refused one."""
        left = self.producer.flush(60)
        assert left == 0 and not self._failures, f"{left} records not sent; {self._failures[:3]}"
