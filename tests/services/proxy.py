"""A proxy that does to a connection what networks and tired servers do: between a client and one service, by request.

It understands where a request and its answer end (HTTP/1.1, or Kafka's length-prefixed frames), so a fault can hit a
named request at a named moment: before it is forwarded, after it took effect, or in the middle of its answer.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from services.process import free_ports

LINE_BYTES_MAX = 1 << 20
SLOW_CHUNK_BYTES = 512
# Names of Kafka's requests, https://kafka.apache.org/protocol.html#protocol_api_keys.
KAFKA_REQUESTS = {
    1: "Fetch", 2: "ListOffsets", 3: "Metadata", 8: "OffsetCommit", 9: "OffsetFetch", 10: "FindCoordinator",
    17: "SaslHandshake", 18: "ApiVersions", 36: "SaslAuthenticate", 60: "DescribeCluster", 75: "DescribeTopicPartitions",
}  # fmt: skip
GARBAGE = b'{"metadata-location": 7, "metadata": "<html>\xff'

Kind = Literal[
    "cut",  # the connection ends before the request is forwarded
    "drop reply",  # the request takes effect, the connection ends without its answer
    "reset",  # the request takes effect, the connection is reset in the middle of its answer
    "truncate",  # the request takes effect, the answer ends in order before it is whole
    "silence",  # the request is not forwarded, and nothing is ever said
    "silence after",  # the request takes effect, and nothing is ever said
    "delay",  # the request is forwarded late
    "slow",  # the answer trickles
    "duplicate",  # the request is sent twice, the client gets the answer to the second
    "status before",  # an HTTP error instead of forwarding
    "status after",  # the request takes effect, and an HTTP error is the answer
    "garbage before",  # an answer that means nothing instead of forwarding
    "garbage after",  # the request takes effect, and the answer means nothing
]


@dataclass
class Fault:
    """What goes wrong with requests whose name matches, from the `first` on, `times` times (None: until it is lifted)."""

    kind: Kind
    requests: str
    first: int = 1
    times: int | None = 1
    status: int = 503
    delay_s: float = 1.5
    hits: int = field(default=0, init=False)
    _met: int = field(default=0, init=False)

    def takes(self, name: str) -> bool:
        """Whether this request is hit. Counts."""
        if not re.search(self.requests, name):
            return False
        self._met += 1
        if self._met < self.first or (self.times is not None and self._met >= self.first + self.times):
            return False
        self.hits += 1
        return True


@dataclass
class _Request:
    name: str
    content: bytes
    expects_body: bool = True


class Proxy:
    """Listens on a port and forwards to another one of this machine."""

    def __init__(self, upstream_port: int, protocol: Literal["http", "kafka", "bytes"], port: int | None = None,
                 host: str = "127.0.0.1") -> None:  # fmt: skip
        self.upstream_port = upstream_port
        self.protocol = protocol
        self.host = host
        self.port = port or free_ports(1)[0]
        self.fault: Fault | None = None
        self.connections = 0
        self.requests: Counter[str] = Counter()
        self._lifted = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=f"proxy-{self.port}", daemon=True)
        self._is_up = threading.Event()

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._is_up.wait(10), "the proxy does not listen"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def inject(self, fault: Fault) -> Fault:
        """From now on requests meet this fault."""
        self._lifted.clear()
        self.fault = fault
        return fault

    def lift(self) -> None:
        """From now on everything is forwarded; what is held in silence is closed."""
        self.fault = None
        self._loop.call_soon_threadsafe(self._lifted.set)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, self.host, self.port, limit=LINE_BYTES_MAX)
        )
        self._is_up.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        above: asyncio.StreamWriter | None = None
        try:
            up_reader, above = await asyncio.open_connection("127.0.0.1", self.upstream_port, limit=LINE_BYTES_MAX)
            if self.protocol == "bytes":
                await asyncio.gather(_pump(reader, above), _pump(up_reader, writer))
            else:
                await self._converse(reader, writer, up_reader, above)
        except (OSError, EOFError, asyncio.CancelledError):
            # one side went away, or the proxy ends
            pass
        finally:
            for stream in (writer, above):
                if stream is not None:
                    stream.close()

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        above: asyncio.StreamWriter,
    ) -> None:
        read_request, read_reply = (
            (_http_request, _http_reply) if self.protocol == "http" else (_kafka_request, _kafka_reply)
        )

        async def forward(request: _Request) -> bytes:
            above.write(request.content)
            await above.drain()
            return await read_reply(up_reader, request)

        while True:
            request = await read_request(reader)
            self.requests[request.name] += 1
            fault = self.fault
            if fault is None or not fault.takes(request.name):
                writer.write(await forward(request))
                await writer.drain()
            elif not await self._hit(fault, request, forward, writer):
                return

    async def _hit(
        self,
        fault: Fault,
        request: _Request,
        forward: Callable[[_Request], Awaitable[bytes]],
        writer: asyncio.StreamWriter,
    ) -> bool:
        """Does what the fault says; whether the connection goes on."""
        if fault.kind == "cut":
            return False
        if fault.kind == "silence":
            await self._lifted.wait()
            return False
        if fault.kind == "delay":
            # the time is the fault, here and where it is slow
            await asyncio.sleep(fault.delay_s)
        if fault.kind in ("status before", "garbage before"):
            answer = self._answer(fault, request)
        else:
            answer = await forward(request)
        if fault.kind == "duplicate":
            answer = await forward(request)
        elif fault.kind in ("status after", "garbage after"):
            answer = self._answer(fault, request)
        elif fault.kind == "drop reply":
            return False
        elif fault.kind == "silence after":
            await self._lifted.wait()
            return False
        elif fault.kind in ("reset", "truncate"):
            writer.write(answer[: max(1, len(answer) // 2)])
            await writer.drain()
            if fault.kind == "reset":
                writer.transport.abort()
            return False
        elif fault.kind == "slow":
            pieces = [answer[at : at + SLOW_CHUNK_BYTES] for at in range(0, len(answer), SLOW_CHUNK_BYTES)]
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                # the time is the fault
                await asyncio.sleep(fault.delay_s / len(pieces))
            return True
        writer.write(answer)
        await writer.drain()
        return True

    def _answer(self, fault: Fault, request: _Request) -> bytes:
        """An answer that the service did not give."""
        if self.protocol == "kafka":
            return len(GARBAGE).to_bytes(4, "big") + GARBAGE
        if fault.kind.startswith("garbage"):
            return _http_answer("200 OK", GARBAGE if request.expects_body else b"")
        return _http_answer(f"{fault.status} Fault", b'{"error":{"message":"fault","type":"Fault","code":503}}')


def _http_answer(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(1 << 16):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def _http_request(reader: asyncio.StreamReader) -> _Request:
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    name = f"{method} {target.split('?', 1)[0]}"
    return _Request(name, head + await _http_body(reader, head, until_close=False), expects_body=method != "HEAD")


async def _http_reply(reader: asyncio.StreamReader, request: _Request) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status == 100:
        return await _http_reply(reader, request)
    if not request.expects_body or status in (204, 304):
        return head
    return head + await _http_body(reader, head, until_close=True)


async def _http_body(reader: asyncio.StreamReader, head: bytes, until_close: bool) -> bytes:
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    if length:
        return await reader.readexactly(int(length.group(1)))
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        body = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            chunk = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
            body += line + chunk
            if chunk == b"\r\n":
                return body
    return await reader.read() if until_close else b""


async def _kafka_request(reader: asyncio.StreamReader) -> _Request:
    content = await _kafka_frame(reader)
    key = int.from_bytes(content[4:6], "big")
    return _Request(KAFKA_REQUESTS.get(key, f"request {key}"), content)


async def _kafka_reply(reader: asyncio.StreamReader, _request: _Request) -> bytes:
    return await _kafka_frame(reader)


async def _kafka_frame(reader: asyncio.StreamReader) -> bytes:
    size = await reader.readexactly(4)
    return size + await reader.readexactly(int.from_bytes(size, "big"))
