"""The forwarder between real sockets on loopback."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from plait.net.shaper import Door, Forwarder
from plait.net.shaping import Change, LinkTable, Shape
from plait.task_scope import TaskScope

DELAY_S = 0.03


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def forwarded(links: LinkTable) -> AsyncIterator[tuple[int, asyncio.Server]]:
    """A door to an echo server; everybody who dials it is ``a``, it is ``b``."""
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    behind = server.sockets[0].getsockname()
    port: int = behind[1]
    async with TaskScope() as tasks, server:
        forwarder = Forwarder(links, lambda dialler, door: "a", tasks)
        await forwarder.open(Door("b", ("127.0.0.2", port), behind))
        yield port, server


def test_bytes_pass_whole_and_each_way_costs_the_delay() -> None:
    async def main() -> None:
        links = LinkTable(["a", "b"], Shape(delay_s=DELAY_S), lambda: 0.5)
        async with forwarded(links) as (port, _):
            loop = asyncio.get_running_loop()
            started_s = loop.time()
            reader, writer = await asyncio.open_connection("127.0.0.2", port)
            payload = bytes(range(256)) * 1_000
            writer.write(payload)
            assert await reader.readexactly(len(payload)) == payload
            # The forwarder's own opening takes a round trip, as a handshake does.
            assert loop.time() - started_s >= 4 * DELAY_S
            writer.write_eof()
            assert await reader.read() == b"", "the end of the stream passes too"
            writer.close()

    asyncio.run(main())


def test_a_cut_holds_one_direction_until_it_is_healed() -> None:
    async def main() -> None:
        links = LinkTable(["a", "b"], Shape(), lambda: 0.5)
        async with forwarded(links) as (port, _):
            reader, writer = await asyncio.open_connection("127.0.0.2", port)
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            links.apply(Change(sources=("b",), cut=True))
            writer.write(b"two")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await reader.readexactly(3)
            links.apply(Change(cut=False))
            assert await reader.readexactly(3) == b"two"
            writer.close()

    asyncio.run(main())


def test_a_dead_server_is_noticed_by_the_dialler() -> None:
    async def main() -> None:
        links = LinkTable(["a", "b"], Shape(), lambda: 0.5)
        async with forwarded(links) as (port, server):
            server.close()
            reader, writer = await asyncio.open_connection("127.0.0.2", port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(main())


def test_a_reset_server_side_ends_the_connection_and_nothing_else() -> None:
    async def main() -> None:
        links = LinkTable(["a", "b"], Shape(), lambda: 0.5)
        async with TaskScope() as tasks:

            async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.read(1)
                writer.transport.abort()

            server = await asyncio.start_server(reset, "127.0.0.1", 0)
            behind = server.sockets[0].getsockname()
            forwarder = Forwarder(links, lambda dialler, door: "a", tasks)
            await forwarder.open(Door("b", ("127.0.0.2", behind[1]), behind))
            for _ in range(3):  # it survives each
                reader, writer = await asyncio.open_connection("127.0.0.2", behind[1])
                writer.write(b"x")
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
            server.close()

    asyncio.run(main())
