"""A TCP forwarder that delays, slows and cuts what passes, for machines without privileges.

It stands between whoever dials an announced address and the process that listens behind it,
so everything is shaped alike: TLS handshakes, calls, long streams, libp2p. It sees streams,
not packets: a loss costs the time of its repetition, and a cut holds bytes back until the
link is healed. Opening a connection costs the first round trip, as a handshake would.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import dataclass

from plait.logs import get_logger
from plait.net.shaping import LinkTable, Pipe
from plait.task_scope import TaskScope

log = get_logger(__name__)

CHUNK_BYTES = 16_384
CHUNKS_WAITING_MAX = 64
CUT_POLL_S = 0.02

Identify = Callable[[tuple[str, int], tuple[str, int]], str]
"""The end that dialled, from its address and ours."""


@dataclass(frozen=True, slots=True)
class Door:
    """An announced address, the end behind it, and where that end really listens."""

    name: str
    announced: tuple[str, int]
    behind: tuple[str, int]


class Forwarder:
    """Forwards every connection to one of the doors through the links of a table."""

    def __init__(self, links: LinkTable, identify: Identify, tasks: TaskScope) -> None:
        self._links = links
        self._identify = identify
        self._tasks = tasks

    async def open(self, door: Door) -> None:
        """Listen at a door; raises ``OSError`` if its address cannot be bound."""
        listener = socket.create_server(door.announced, backlog=256)
        listener.setblocking(False)
        self._tasks.create_task(self._accept(listener, door), name=f"door {door.name}")

    async def _accept(self, listener: socket.socket, door: Door) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                connection, address = await loop.sock_accept(listener)
                source = self._identify(address, door.announced)
                task = self._connect(connection, source, door)
                self._tasks.create_task(task, name=f"{source} to {door.name}")

    async def _connect(self, connection: socket.socket, source: str, door: Door) -> None:
        down = self._links.pipe(source, door.name)
        up = self._links.pipe(door.name, source)
        near_reader, near = await asyncio.open_connection(sock=connection)
        if down is None or up is None:
            near.transport.abort()  # an end does not dial itself through the network
            return
        far: asyncio.StreamWriter | None = None
        try:
            for pipe in (down, up):
                await _sleep_until(await _arrival_s(pipe, 1))
            far_reader, far = await asyncio.open_connection(*door.behind)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_pump(near_reader, far, down))
                tasks.create_task(_pump(far_reader, near, up))
        except* OSError as group:  # refused, or one side reset it: so does the other
            log.debug("connection ended", source=source, target=door.name, reason=repr(group))
        finally:
            for writer in (near, far):
                if writer is not None:
                    writer.transport.abort()


async def _arrival_s(pipe: Pipe, size_bytes: int) -> float:
    """When a chunk that is ready now arrives; a cut link is waited for."""
    loop = asyncio.get_running_loop()
    while True:
        arrival_s = pipe.chunk(loop.time(), size_bytes)
        if arrival_s is not None:
            return arrival_s
        await asyncio.sleep(CUT_POLL_S)


async def _sleep_until(when_s: float) -> None:
    await asyncio.sleep(when_s - asyncio.get_running_loop().time())


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pipe: Pipe) -> None:
    """Carry one direction to its end, in order; at most a bounded number of chunks wait."""
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_WAITING_MAX)

    async def take() -> None:
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            await waiting.put((await _arrival_s(pipe, max(1, len(chunk))), chunk))
            if not chunk:
                return

    async def give() -> None:
        while True:
            arrival_s, chunk = await waiting.get()
            await _sleep_until(arrival_s)
            if not chunk:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(take())
        tasks.create_task(give())
