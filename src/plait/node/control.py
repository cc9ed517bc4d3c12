"""A running node's control socket: one JSON object a line, asked by its own machine's commands.

The socket lies in the data folder with mode 0600: who may use it is who may read the keys.
``answer`` is pure; the rest moves lines.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

from plait.errors import ConfigError, NetworkError

SOCKET_NAME = "control.sock"
LINE_BYTES_MAX = 64 * 1024
ANSWER_TIMEOUT_S = 5.0


class Controlled(Protocol):
    """What can be asked of a node."""

    def status(self) -> dict[str, Any]:
        """Figures for people and scripts."""

    def drain(self) -> None:
        """Take nothing new, tell the clients to move, end when nothing is left."""


def answer(line: bytes, node: Controlled) -> bytes:
    """Obey one request line and return the answer's line."""
    try:
        message = json.loads(line)
        command = message["command"]
    except (ValueError, KeyError, TypeError):
        return _line({"error": "not a command"})
    match command:
        case "status":
            return _line(node.status())
        case "drain":
            node.drain()
            return _line(node.status())
    return _line({"error": f"there is no command {command!r}"})


@contextlib.asynccontextmanager
async def serve_control(data_dir: Path, node: Controlled) -> AsyncIterator[None]:
    """Answer on the folder's socket while the context is open.

    The caller holds the folder's lock, so that a socket found there is a dead one's.
    """

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                writer.write(answer(await reader.readline(), node))
                await writer.drain()
        writer.close()

    path = data_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _reachable(path) as short:
        mask = os.umask(0o177)
        try:
            listener.bind(short)
        finally:
            os.umask(mask)
    server = await asyncio.start_unix_server(talk, sock=listener, limit=LINE_BYTES_MAX)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def ask(data_dir: Path, command: str) -> dict[str, Any]:
    """Send one command to the node that uses a folder and return its answer.

    Raises ``ConfigError`` if none runs there and ``NetworkError`` if it does not answer.
    """
    path = data_dir / SOCKET_NAME
    try:
        with (
            _reachable(path) as short,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
        ):
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.connect(short)
            connection.sendall(_line({"command": command}))
            with connection.makefile("rb") as stream:
                line = stream.readline(LINE_BYTES_MAX)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConfigError(
            f"no node runs in {data_dir}",
            remedy="plait node run, or name its folder with --data-dir",
        ) from error
    except OSError as error:
        raise NetworkError(f"the node in {data_dir} does not answer: {error}") from error
    if not line:
        raise NetworkError(f"the node in {data_dir} ended before it answered")
    told: dict[str, Any] = json.loads(line)
    if "error" in told:
        raise NetworkError(f"the node in {data_dir} says: {told['error']}")
    return told


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """A name for the socket that fits: the kernel takes 107 bytes, folders may be deeper."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
