"""Loopback ports: chosen once, remembered, and checked before they are used again."""

import errno
import random
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from plait.errors import NetworkError

HOST = "127.0.0.1"

_LOWEST_PORT = 20_000
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PortInUse(NetworkError):
    """Another process listens on a port this testnet has announced."""

    code = "port-in-use"


def choose_ports(count: int) -> list[int]:
    """Find free ports by binding them all at once.

    They lie below the kernel's ephemeral range, so that no outgoing connection takes the
    port of a node while it is down. Raises ``NetworkError`` if there are too few.
    """
    candidates = list(range(_LOWEST_PORT, _ephemeral_start()))
    random.shuffle(candidates)
    chosen: list[int] = []
    with ExitStack() as held:
        for port in candidates:
            if len(chosen) == count:
                break
            bound = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            if _binds(bound, port):
                chosen.append(port)
    if len(chosen) < count:
        raise NetworkError(f"fewer than {count} free ports below {_ephemeral_start()}")
    return chosen


def check_free(ports: Iterable[int]) -> None:
    """Raise ``PortInUse`` naming the first port that cannot be bound."""
    for port in ports:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As a server would: connections in TIME_WAIT do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not _binds(probe, port):
                raise PortInUse(
                    f"port {port} on {HOST} is in use by another process",
                    remedy=f"ss -ltnp 'sport = :{port}'",
                )


def _binds(bound: socket.socket, port: int) -> bool:
    try:
        bound.bind((HOST, port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return False
        raise
    return True


def _ephemeral_start() -> int:
    try:
        start = int(_EPHEMERAL_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        start = 32_768
    # A host that hands out nearly all ports leaves us no quiet range: use any.
    return start if start >= _LOWEST_PORT + 1_000 else 61_000
