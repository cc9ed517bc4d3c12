"""Talking to a testnet's supervisor: a lock that says it lives, a socket that commands it.

The lock is shared by the supervisor and every node it forks, so it is free exactly when no
process of the testnet is left. Requests and answers are one JSON object on one line.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from plait.errors import ConfigError, DeadlineExceeded, NetworkError
from plait.testnet.folder import CONTROL_SOCKET, LOCK_FILE, log_path, log_tail

REQUEST_BYTES_MAX = 64 * 1024
POLL_S = 0.02

STOP_GRACE_S = 10.0
"""How long a node may take to end after SIGTERM before it is killed."""

DOWN_TIMEOUT_S = STOP_GRACE_S + 10.0

_ANSWER_TIMEOUT_S = 30.0


class NotRunning(ConfigError):
    """No testnet runs in the folder asked about."""

    code = "testnet-not-running"

    def __init__(self, directory: Path) -> None:
        super().__init__(f"no testnet is running in {directory}", remedy="plait testnet up")


class NodeFailed(NetworkError):
    """A node, or the supervisor, ended while it was starting."""

    code = "node-failed"

    def __init__(self, directory: Path, name: str) -> None:
        # Errors are shown in a few hundred characters; the cause stands last.
        tail = " | ".join(log_tail(directory, name, lines=4).splitlines())
        super().__init__(
            f"{name} ended while starting" + (f"; its log ends: {tail}" if tail else ""),
            remedy=f"read {log_path(directory, name)}",
        )


def acquire_lock(directory: Path) -> int:
    """Take a folder's lock and return its descriptor; raises ``ConfigError`` if it is taken."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(
            f"a testnet is already running in {directory}",
            remedy=f"plait testnet down --dir {directory}, or another --dir",
        ) from error
    return descriptor


def is_live(directory: Path) -> bool:
    """Whether any process of a testnet in this folder is left."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def wait_until_gone(directory: Path, timeout_s: float) -> None:
    """Wait until the last process has ended; raises ``DeadlineExceeded``."""
    deadline = time.monotonic() + timeout_s
    while is_live(directory):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"the testnet in {directory} did not end within {timeout_s:g} s")
        time.sleep(POLL_S)


def request(
    directory: Path, command: str, node: str | None = None, **details: object
) -> dict[str, Any]:
    """Send one command, with whatever details it takes, to the supervisor; return its answer.

    A supervisor that is still loading is waited for. Raises ``NotRunning``, ``ConfigError``
    with the supervisor's own words, or ``NetworkError`` if it stops answering.
    """
    message = {"command": command} | ({"node": node} if node else {}) | details
    with _connected(directory) as stream:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
        try:
            line = stream.readline()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the supervisor in {directory} does not answer") from error
    if not line:
        raise NetworkError(f"the supervisor in {directory} ended before it answered")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ConfigError(answer["error"], remedy=answer.get("remedy", ""))
    return answer


def await_node(
    directory: Path, name: str, states: Sequence[str], *, starts: int = 0, timeout_s: float = 60.0
) -> dict[str, Any]:
    """Wait until a node, in its ``starts``-th process or a later one, is in one of the states.

    Raises ``NodeFailed`` if it dies instead, and ``DeadlineExceeded``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = request(directory, "status")["nodes"]
        node: dict[str, Any] = next(node for node in nodes if node["name"] == name)
        # A restart that is still ending the old process is counted as started already.
        if node["starts"] >= starts and node["state"] in states:
            return node
        if node["starts"] >= starts and node["state"] in ("dead", "stopped"):
            raise NodeFailed(directory, name)
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{name} is {node['state']} after {timeout_s:g} s")
        time.sleep(POLL_S)


def down(directory: Path, *, timeout_s: float = DOWN_TIMEOUT_S) -> None:
    """End every process of a testnet and wait until none is left.

    Raises ``NotRunning`` and ``DeadlineExceeded``.
    """
    if not is_live(directory):
        raise NotRunning(directory)
    # The supervisor may end between the two calls: what is asked for has happened then.
    with contextlib.suppress(NotRunning):
        request(directory, "down")
    wait_until_gone(directory, timeout_s)


def listen(directory: Path) -> socket.socket:
    """Open the control socket, replacing a dead one; the caller holds the lock."""
    path = directory / CONTROL_SOCKET
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short_path(path) as short:
        listener.bind(short)
    listener.listen(16)
    return listener


@contextmanager
def _connected(directory: Path) -> Iterator[BinaryIO]:
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ANSWER_TIMEOUT_S)
        while not _connects(connection, directory):
            if not is_live(directory):
                raise NotRunning(directory)
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the supervisor in {directory} does not listen")
            time.sleep(POLL_S)
        with connection.makefile("rwb") as stream:
            yield cast(BinaryIO, stream)


def _connects(connection: socket.socket, directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        with _short_path(directory / CONTROL_SOCKET) as short:
            connection.connect(short)
        return True
    return False


@contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits a socket address (108 bytes), however deep its folder."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
