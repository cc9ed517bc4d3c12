"""A Link: one long-lived stream per neighbouring pair, frames down, results and faults back.

Each direction has one writer fed by a bounded queue: two writers on one gRPC stream end
the call. A full queue is the slow peer's problem: its sessions fail, nobody waits.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, Protocol, TypeVar

import grpc

from plait.errors import CapacityError, PeerUnreachable
from plait.types import PeerId
from plait.v1 import stage_pb2, stage_pb2_grpc


class Sized(Protocol):
    """A message that knows its length on the wire."""

    def ByteSize(self) -> int:
        """Bytes."""


MessageT = TypeVar("MessageT", bound=Sized)

QUEUE_MAX = 1024
QUEUED_BYTES_MAX = 64 * 1024 * 1024
CONGESTED_BYTES = 2 * 1024 * 1024
"""With so much queued, a link is not given what can wait."""
CONNECT_TIMEOUT_S = 3.0
SESSION_METADATA = "plait-session-bin"
"""Names the one session that a link is for: what concerns others need not come up on it."""


def _ignore_room() -> None:
    """Nobody waits for room."""


class Outbox(Generic[MessageT]):
    """A bounded queue with an end, drained by one writer.

    ``on_room`` is called when it was congested and is no longer.
    """

    def __init__(self, on_room: Callable[[], None] = _ignore_room) -> None:
        self._queue: asyncio.Queue[tuple[MessageT, int] | None] = asyncio.Queue(QUEUE_MAX + 1)
        self._on_room = on_room
        self.queued_bytes = 0
        self.closed = False

    @property
    def congested(self) -> bool:
        """Whether what can wait should wait."""
        return self.queued_bytes > CONGESTED_BYTES

    def put(self, message: MessageT) -> None:
        """Queue a message; raises ``CapacityError`` when full, ``PeerUnreachable`` when closed."""
        if self.closed:
            raise PeerUnreachable("the link is down")
        size = message.ByteSize()
        if self._queue.qsize() >= QUEUE_MAX or self.queued_bytes + size > QUEUED_BYTES_MAX:
            raise CapacityError("the link's queue is full")
        self._queue.put_nowait((message, size))
        self.queued_bytes += size

    def close(self) -> None:
        """Let the writer send what is queued and end."""
        if not self.closed:
            self.closed = True
            self._queue.put_nowait(None)

    async def drain(self) -> AsyncIterator[MessageT]:
        """Yield messages until closed."""
        while (queued := await self._queue.get()) is not None:
            message, size = queued
            yield message
            was_congested = self.congested
            self.queued_bytes -= size
            if was_congested and not self.congested:
                self._on_room()


class OutgoingLink:
    """Our stream to a neighbour downstream, over a channel that it owns and closes.

    ``session`` is the id of the only one it is for, empty if it carries many.
    """

    def __init__(
        self,
        peer: PeerId,
        channel: grpc.aio.Channel,
        on_room: Callable[[], None] = _ignore_room,
        session: bytes = b"",
    ) -> None:
        self.peer = peer
        self._metadata = ((SESSION_METADATA, session),) if session else ()
        self.outbox: Outbox[stage_pb2.LinkRequest] = Outbox(on_room)
        self._channel = channel
        self._opened = asyncio.Event()
        self._reason = ""

    async def run(self, on_response: Callable[[PeerId, stage_pb2.LinkResponse], None]) -> str:
        """Pump both directions until the stream ends; return why it ended."""
        call = stage_pb2_grpc.StageServiceStub(self._channel).Link(metadata=self._metadata)
        self._reason = "the peer closed the link"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await call.initial_metadata()
            self._opened.set()
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(call))
                while (message := await call.read()) is not grpc.aio.EOF:
                    on_response(self.peer, message)
                writer.cancel()
        except* TimeoutError:
            self._reason = "no answer in time"
        except* grpc.aio.AioRpcError as group:
            self._reason = _why(group)
        except* asyncio.InvalidStateError:
            self._reason = "the stream ended while writing"
        finally:
            self.outbox.close()
            self._opened.set()
            call.cancel()
            await self._channel.close()
        return self._reason

    async def _write(
        self, call: "grpc.aio.StreamStreamCall[stage_pb2.LinkRequest, stage_pb2.LinkResponse]"
    ) -> None:
        async for message in self.outbox.drain():
            await call.write(message)
        await call.done_writing()

    async def wait_open(self) -> None:
        """Return once the stream is up; raises ``PeerUnreachable`` with the reason."""
        await self._opened.wait()
        if self.outbox.closed:
            raise PeerUnreachable(f"no link to {self.peer}: {self._reason}")


def _why(group: BaseExceptionGroup[grpc.aio.AioRpcError]) -> str:
    error = group.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return _why(error)
