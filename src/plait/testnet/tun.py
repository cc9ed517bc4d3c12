"""Network namespaces joined by TUN devices: every packet between legs passes our hands.

Namespaces are never named: they live as long as a process or a descriptor in them, so
nothing is left behind however the testnet ends. Needs root and Linux.
"""

import ctypes
import fcntl
import heapq
import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from plait.errors import ConfigError
from plait.net.shaping import LinkTable, Pipe
from plait.testnet.nat import Translator

PACKET_BYTES_MAX = 65_536
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS = 0x8916, 0x891C, 0x8914
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
_TUN_DEVICE = Path("/dev/net/tun")
_OWN_NAMESPACE = "/proc/self/ns/net"
_ROUTES = Path("/proc/net/route")
_BURST_MAX = 64
"""Packets read from one leg before the others get their turn."""


@dataclass(frozen=True, slots=True)
class Leg:
    """One end: its namespace (None: the host's) and the far side of its device."""

    name: str
    address: str
    namespace: int | None
    device: int
    translator: Translator | None = None

    def enter(self) -> None:
        """Move this thread into the leg's namespace."""
        if self.namespace is not None:
            enter(self.namespace)


def enter(namespace: int) -> None:
    """Move this thread into a network namespace given by a descriptor; raises ``OSError``."""
    _checked(_libc().setns(namespace, _CLONE_NEWNET), "setns")


def enter_process(pid: int) -> None:
    """Move this thread into a process's network namespace; raises ``OSError``."""
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
    finally:
        os.close(namespace)


def missing() -> str:
    """Why this process cannot make namespaces and TUN devices; empty if it can."""
    if os.geteuid() != 0:
        return "not root"
    if not _TUN_DEVICE.exists():
        return f"there is no {_TUN_DEVICE}"
    home = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device = open_leg("probe", "198.18.0.1", own_namespace=True)
    except OSError as error:
        return f"namespaces or TUN devices are refused: {error.strerror}"
    finally:
        _libc().setns(home, _CLONE_NEWNET)
        os.close(home)
    close_leg(device)
    return ""


def open_leg(
    name: str, address: str, *, own_namespace: bool, private: str = "", gateway: bool = False
) -> Leg:
    """Make one leg with ``address``/24 and leave this thread where it was.

    With ``private`` the node's side has that address instead and its packets are translated.
    ``gateway`` sends everything else through the device too. Raises ``OSError``.
    """
    home = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    namespace = None
    try:
        if own_namespace:
            _checked(_libc().unshare(_CLONE_NEWNET), "unshare")
            namespace = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        device = _open_device(private or address, "lo" if own_namespace else None, gateway)
    finally:
        _libc().setns(home, _CLONE_NEWNET)
        os.close(home)
    translator = None
    if private:
        translator = Translator(socket.inet_aton(private), socket.inet_aton(address))
    return Leg(name, address, namespace, device, translator)


def close_leg(leg: Leg) -> None:
    """Let go of a leg; its device goes with the last descriptor."""
    os.close(leg.device)
    if leg.namespace is not None:
        os.close(leg.namespace)


def free_subnet() -> int:
    """A third byte for which the host has no route into 198.18.x.0/24 (RFC 2544's range).

    Raises ``ConfigError`` if every one is in use.
    """
    routed = {line.split()[1] for line in _ROUTES.read_text().splitlines()[1:]}
    first = 1 + os.getpid() % 200  # two testnets that start at once rarely choose the same
    candidates: list[int] = [*range(first, 255), *range(1, first)]
    for subnet in candidates:
        network = ipaddress.IPv4Address(f"198.18.{subnet}.0")
        if f"{struct.unpack('=I', network.packed)[0]:08X}" not in routed:
            return subnet
    raise ConfigError("every subnet of 198.18.0.0/16 is routed on this host already")


def carry(
    legs: list[Leg], links: LinkTable, control: socket.socket, obey: Callable[[bytes], bytes]
) -> None:
    """Move packets between legs until the other end of ``control`` is closed."""
    router = _Router(legs, links)
    watched = [control.fileno(), *(leg.device for leg in legs)]
    while True:
        ready, _, _ = select.select(watched, [], [], router.wait_s(time.monotonic()))
        for source in ready:
            if source != control.fileno():
                router.read(source)
            elif message := control.recv(PACKET_BYTES_MAX):
                control.send(obey(message))
            else:
                return
        router.release(time.monotonic())


class _Router:
    """Packets on their way: a heap by time of arrival."""

    def __init__(self, legs: list[Leg], links: LinkTable) -> None:
        self._by_device = {leg.device: leg for leg in legs}
        self._by_address = {socket.inet_aton(leg.address): leg for leg in legs}
        self._pipes: dict[tuple[int, int], Pipe] = {}
        for source in legs:
            for target in legs:
                if pipe := links.pipe(source.name, target.name):
                    self._pipes[source.device, target.device] = pipe
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._count = 0

    def wait_s(self, now_s: float) -> float | None:
        return max(0.0, self._queue[0][0] - now_s) if self._queue else None

    def read(self, device: int) -> None:
        """Take what a leg has sent, a burst at a time."""
        for _ in range(_BURST_MAX):
            try:
                packet = os.read(device, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            self._take(self._by_device[device], packet)

    def _take(self, source: Leg, packet: bytes) -> None:
        if packet[0] >> 4 != 4:
            return  # IPv6 neighbours talk to themselves here
        if source.translator is not None:
            translated = source.translator.outgoing(packet)
            if translated is None:
                return
            packet = translated
        target = self._by_address.get(packet[16:20])
        pipe = self._pipes.get((source.device, target.device)) if target else None
        if target is None or pipe is None:
            return
        arrival_s = pipe.packet(time.monotonic(), len(packet))
        if arrival_s is None:
            return
        if target.translator is not None:
            answer = target.translator.incoming(packet)
            if answer is None:
                return
            packet = answer
        self._count += 1
        heapq.heappush(self._queue, (arrival_s, self._count, target.device, packet))

    def release(self, now_s: float) -> None:
        while self._queue and self._queue[0][0] <= now_s:
            _, _, device, packet = heapq.heappop(self._queue)
            try:
                os.write(device, packet)
            except BlockingIOError:
                continue  # the receiver's queue is full: lost, as on any network


def _open_device(address: str, loopback: str | None, gateway: bool) -> int:
    device: int = os.open(_TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        request = struct.pack("16sH22x", b"plait%d", _IFF_TUN | _IFF_NO_PI)
        named: bytes = fcntl.ioctl(device, _TUNSETIFF, request)
        name = named[:16].rstrip(b"\0").decode()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as configuring:
            _set_address(configuring, name, _SIOCSIFADDR, address)
            _set_address(configuring, name, _SIOCSIFNETMASK, "255.255.255.0")
            for interface in (name, loopback):
                if interface is not None:
                    flags = struct.pack("16sH14x", interface.encode(), _IFF_UP | _IFF_RUNNING)
                    fcntl.ioctl(configuring, _SIOCSIFFLAGS, flags)
            if gateway:
                _add_default_route(configuring, name)
    except BaseException:
        os.close(device)
        raise
    else:
        return device


def _set_address(configuring: socket.socket, name: str, request: int, address: str) -> None:
    fields = (name.encode(), socket.AF_INET, 0, socket.inet_aton(address))
    fcntl.ioctl(configuring, request, struct.pack("16sHH4s8x", *fields))


def _add_default_route(configuring: socket.socket, name: str) -> None:
    """Send everything through the device (``SIOCADDRT`` with ``struct rtentry``)."""
    anywhere = struct.pack("HH4s8x", socket.AF_INET, 0, bytes(4))
    device = ctypes.create_string_buffer(name.encode())
    request = struct.pack(
        "L16s16s16sHhLPhPLLH",
        *(0, anywhere, anywhere, anywhere, 0x1, 0, 0, 0, 0, ctypes.addressof(device), 0, 0, 0),
    )
    fcntl.ioctl(configuring, 0x890B, request)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
