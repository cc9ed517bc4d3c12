"""The process that carries a testnet's WAN traffic, as its supervisor sees it.

It is forked before any node, ends when the supervisor's end of the control socket closes,
and dies with the supervisor. One datagram asks, one answers; both are JSON.
"""

import asyncio
import contextlib
import os
import random
import select
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from plait.errors import ConfigError, NetworkError, PlaitError
from plait.net.shaper import Door, Forwarder
from plait.net.shaping import Change, LinkTable
from plait.task_scope import TaskScope
from plait.testnet import tun
from plait.testnet.cluster import Cluster
from plait.testnet.ports import HOST
from plait.testnet.wan import CLIENT_LEG, Wan, private_address

MESSAGE_BYTES_MAX = 1 << 18
ANSWER_TIMEOUT_S = 2.0

Become = Callable[[Callable[[], int]], int]
"""Forks; runs the function in the child and returns the child's pid to the parent."""


class Carrier:
    """Starts the process, talks to it, and moves nodes into their namespaces."""

    def __init__(self, cluster: Cluster, wan: Wan) -> None:
        self._cluster = cluster
        self._wan = wan
        self._legs: list[tun.Leg] = []
        self._control: socket.socket | None = None
        self.pid: int | None = None

    def start(self, become: Become) -> None:
        """Make the network and fork the process; raises ``ConfigError`` if it cannot be made."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = [member.name for member in self._cluster.members]
        draw = random.Random(self._wan.seed).random
        links = LinkTable([*names, CLIENT_LEG], self._wan.shape, draw)
        if self._wan.backend == "tun":
            self._legs = _open_legs(self._cluster, self._wan)

        def run() -> int:
            ours.close()
            if self._wan.backend == "tun":
                tun.carry(self._legs, links, theirs, lambda line: _obey(links, {}, line))
            else:
                asyncio.run(_forward(self._cluster, self._wan, links, theirs))
            return 0

        self.pid = become(run)
        theirs.close()
        for leg in self._legs:
            os.close(leg.device)  # the process holds them now
        self._control = ours

    def enter(self, name: str) -> None:
        """In a forked child: become part of the network as this node."""
        assert self._control is not None
        self._control.close()
        for leg in self._legs:
            if leg.name == name:
                leg.enter()

    def started(self, name: str, pid: int) -> None:
        """Tell which process a node is now: the forwarder knows who dials by that."""
        if self._wan.backend == "forwarder":
            with contextlib.suppress(NetworkError):
                self.ask({"process": name, "pid": pid})

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer.

        Raises ``ConfigError`` with its words, ``NetworkError`` if it does not answer.
        """
        assert self._control is not None
        try:
            self._control.send(msgspec.json.encode(message))
            ready, _, _ = select.select([self._control], [], [], ANSWER_TIMEOUT_S)
            line = self._control.recv(MESSAGE_BYTES_MAX) if ready else b""
        except OSError as error:
            raise NetworkError(f"the WAN process is gone: {error.strerror}") from error
        if not line:
            raise NetworkError("the WAN process does not answer")
        answer: dict[str, Any] = msgspec.json.decode(line)
        if "error" in answer:
            raise ConfigError(answer["error"], remedy=answer.get("remedy", ""))
        return answer

    def close(self) -> None:
        """End the process and let go of the namespaces."""
        if self._control is not None:
            self._control.close()
        for leg in self._legs:
            if leg.namespace is not None:
                os.close(leg.namespace)
        if self.pid is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def _open_legs(cluster: Cluster, wan: Wan) -> list[tun.Leg]:
    legs: list[tun.Leg] = []
    try:
        for number, member in enumerate(cluster.members, 1):
            hidden = member.name == wan.behind_nat
            private = private_address(wan, number) if hidden else ""
            legs.append(
                tun.open_leg(
                    member.name,
                    wan.address(number),
                    own_namespace=True,
                    private=private,
                    gateway=hidden,
                )
            )
        legs.append(tun.open_leg(CLIENT_LEG, wan.client_address, own_namespace=False))
    except OSError as error:
        for leg in legs:
            tun.close_leg(leg)
        raise ConfigError(f"cannot make the testnet's namespaces: {error}") from error
    return legs


def _obey(links: LinkTable, processes: dict[str, int], line: bytes) -> bytes:
    """Perform one request of the supervisor and word the answer."""
    try:
        message = msgspec.json.decode(line, type=dict[str, Any])
        if "process" in message:
            processes[message["process"]] = message["pid"]
            answer: dict[str, Any] = {}
        elif "change" in message:
            change = msgspec.convert(message["change"], Change)
            answer = {"links_changed": links.apply(change)}
        else:
            answer = {"links": links.describe()}
    except PlaitError as error:
        answer = {"error": str(error), "remedy": error.remedy}
    except msgspec.MsgspecError as error:
        answer = {"error": f"not a change of the network: {error}"}
    return msgspec.json.encode(answer)


async def _forward(cluster: Cluster, wan: Wan, links: LinkTable, control: socket.socket) -> None:
    """Forward until the supervisor closes its end."""
    processes: dict[str, int] = {}
    control.setblocking(False)
    loop = asyncio.get_running_loop()

    def identify(dialler: tuple[str, int], door: tuple[str, int]) -> str:
        return _owner(processes, dialler, door)

    async with TaskScope() as tasks:
        forwarder = Forwarder(links, identify, tasks)
        for number, member in enumerate(cluster.members, 1):
            for port in member.ports.used():
                where = (wan.address(number), port)
                await forwarder.open(Door(member.name, where, (HOST, port)))
        while message := await loop.sock_recv(control, MESSAGE_BYTES_MAX):
            await loop.sock_sendall(control, _obey(links, processes, message))


def _owner(processes: dict[str, int], dialler: tuple[str, int], door: tuple[str, int]) -> str:
    """The node whose process holds the dialling socket, by the kernel's tables; else the client."""
    wanted = (_kernel_address(dialler), _kernel_address(door))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if (fields[1], fields[2]) == wanted:
            inode = f"socket:[{fields[9]}]"
            for name, pid in processes.items():
                if _holds(pid, inode):
                    return name
    return CLIENT_LEG


def _kernel_address(address: tuple[str, int]) -> str:
    number = int.from_bytes(socket.inet_aton(address[0]), "little")
    return f"{number:08X}:{address[1]:04X}"


def _holds(pid: int, inode: str) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()) == inode:
                    return True
    return False
