"""The real gossip network: py-libp2p 0.8.1, hardened, in a trio thread behind a bridge.

Only this module, ``libp2p_gossip`` and ``libp2p_links`` import libp2p, and importing it takes
about a second: import them late. Out of the box one stranger's bytes can stop py-libp2p or
impersonate a peer, silent links go unnoticed and lost ones stay lost; each guard says which of
these it is for.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import libp2p
import trio
from libp2p.abc import IHost, INetStream, IRawConnection
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.rcmgr import new_resource_manager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from plait.errors import NetworkError, PeerUnreachable
from plait.identity import SigningKey
from plait.logs import get_logger
from plait.net.bridge import Bridge, describe
from plait.net.dialing import DialBook, Target
from plait.net.libp2p_gossip import GuardedPubsub, GuardedRouter
from plait.net.libp2p_links import Links
from plait.net.port import (
    QUEUE_LENGTH,
    Message,
    PeerEvent,
    Validator,
    put_latest,
)
from plait.types import PeerId

log = get_logger(__name__)

MESHSUB = TProtocol("/meshsub/1.1.0")
"""Later versions cost twice the time per message for nothing at our sizes."""

DEGREE = 6
CONNECTIONS_MAX = 128

FLUSH_S = 0.1
DIAL_TIMEOUT_S = 5.0
RESTART_BACKOFF_S_MAX = 15.0


def _make_host(seed: bytes) -> IHost:
    """Make a host that only speaks Noise and that no stream can stop."""
    keys = create_new_key_pair(seed)
    host = libp2p.new_host(
        key_pair=keys,
        # Without this, /plaintext and secio are accepted, and with them any claimed identity.
        sec_opt={NOISE: NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)},
        # A node lives near its memory limit, and must not refuse peers for it.
        resource_manager=new_resource_manager(enable_memory_limits=False),
        connection_config=ConnectionConfig(
            min_connections=0,
            low_watermark=0,
            max_connections=CONNECTIONS_MAX,
            high_watermark=CONNECTIONS_MAX,
            dial_timeout=DIAL_TIMEOUT_S,
            inbound_upgrade_timeout=DIAL_TIMEOUT_S,
            outbound_upgrade_timeout=DIAL_TIMEOUT_S,
            inbound_stream_protocol_negotiation_timeout=3.0,
            outbound_stream_protocol_negotiation_timeout=3.0,
        ),
        disable_identify_address_discovery=True,  # others would choose what we announce
    )
    handle = host._swarm_stream_handler  # type: ignore[attr-defined]

    async def guard(stream: INetStream) -> None:
        try:
            await handle(stream)
        except Exception as error:  # noqa: BLE001 - otherwise it cancels the whole host
            log.debug("libp2p.refused", what="stream", error=describe(error))
            with contextlib.suppress(Exception):
                await stream.reset()

    network: Any = host.get_network()
    network.set_stream_handler(guard)
    upgrade = network.upgrade_inbound_raw_conn

    async def upgrade_and_wait(raw: IRawConnection, listener: Multiaddr) -> None:
        # It counts everybody who ever dialled in against the limit: make its task end.
        connection = await upgrade(raw, listener)
        await connection.event_closed.wait()
        raise SwarmException("the connection ended")

    network.upgrade_inbound_raw_conn = upgrade_and_wait
    # It dials whatever addresses strangers told us, whatever the watermarks say.
    network.auto_connector.maybe_connect = trio.lowlevel.checkpoint
    return host


def check_free(listen: str) -> None:
    """Raise ``NetworkError`` if a port is taken: libp2p would silently share it.

    ``listen`` reads ``/ip4|ip6/<address>/tcp/<port>``.
    """
    _, family, address, _, port, *_ = listen.split("/")
    with socket.socket(socket.AF_INET6 if family == "ip6" else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, int(port)))
        except OSError as error:
            raise NetworkError(
                f"cannot listen on {listen}: {error.strerror}",
                remedy="stop what uses it, or choose another --p2p-port (0 takes a free one)",
            ) from error


class _HostProgram:
    """The trio half: one host, its gossip, its links. One life; a crash needs a new one."""

    def __init__(self, plane: "Libp2pControlPlane", seed: bytes, listen: str) -> None:
        self._plane = plane
        self._host = _make_host(seed)
        self._router = GuardedRouter(
            protocols=[MESHSUB],
            degree=DEGREE,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            spam_protection_enabled=False,  # it counts forwarders, not authors, and drops
        )
        self._pubsub = GuardedPubsub(self._host, self._router)
        self._links = Links(self._host, self._pubsub, self._linked)
        self._listen = Multiaddr(listen)
        self._nursery: trio.Nursery

    async def run(self, bridge: Bridge, ready: Callable[[], None]) -> None:
        """Run until cancelled."""
        self._bridge = bridge
        check_free(str(self._listen))
        # One stack in strict order, or trio finds its nurseries misnested.
        async with contextlib.AsyncExitStack() as stack:
            self._nursery = await stack.enter_async_context(trio.open_nursery())
            self._links.start(self._nursery)
            await stack.enter_async_context(self._host.run([self._listen]))
            if not self._host.get_transport_addrs():
                raise NetworkError(f"cannot listen on {self._listen}")
            await stack.enter_async_context(background_trio_service(self._pubsub))
            await stack.enter_async_context(background_trio_service(self._router))
            await self._pubsub.wait_until_ready()
            ready()
            try:
                await trio.sleep_forever()
            finally:
                self._links.close_sockets()

    async def hang_up(self) -> None:
        """Close all links, after a moment for what was just published to leave."""
        await trio.sleep(FLUSH_S)
        await self._links.hang_up()

    def multiaddrs(self) -> tuple[str, ...]:
        """Our own addresses."""
        return tuple(str(multiaddr) for multiaddr in self._host.get_addrs())

    async def subscribe(self, topic: str) -> None:
        """Join a topic; the validator also takes delivery."""

        async def validate(forwarder: ID, message: rpc_pb2.Message) -> bool:
            if forwarder == self._host.get_id():
                return True
            peer = PeerId(str(forwarder))
            return await self._bridge.ask(self._plane.receive, topic, message.data, peer)

        self._pubsub.set_topic_validator(topic, validate, True)
        subscription = await self._pubsub.subscribe(topic)
        self._nursery.start_soon(self._drain, subscription)

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to the mesh."""
        await self._pubsub.publish(topic, data)

    async def connect(self, multiaddr: str) -> None:
        """Dial an address; raises ``PeerUnreachable``."""
        try:
            info = info_from_p2p_addr(Multiaddr(multiaddr))
            network = self._host.get_network()
            network.unblock_peer(info.peer_id)  # type: ignore[attr-defined] # one failure bans for 60 s
            if not network.get_connections(info.peer_id):
                # Only the address given: a peer's own record may name any.
                self._host.get_peerstore().clear_addrs(info.peer_id)
            with trio.fail_after(DIAL_TIMEOUT_S):
                await self._host.connect(info)
        except Exception as error:
            raise PeerUnreachable(f"cannot reach {multiaddr}: {describe(error)}") from error

    def _linked(self, peer: ID, linked: bool) -> None:
        self._bridge.post(self._plane.link_changed, PeerId(str(peer)), linked)

    async def _drain(self, subscription: Any) -> None:
        while True:  # its queue holds 32 and then complains; delivery was in the validator
            await subscription.get()


class Libp2pControlPlane:
    """A ``ControlPlane`` over libp2p. A broken host is replaced; the callers notice nothing."""

    def __init__(
        self,
        key: SigningKey,
        *,
        listen: str = "/ip4/127.0.0.1/tcp/0",
        bootstrap: Iterable[str] = (),
        announce: Iterable[str] = (),
    ) -> None:
        """``listen`` reads ``/ip4|ip6/<address>/tcp/<port>``, port 0 lets the kernel choose.

        ``announce`` replaces the multiaddrs shown to others, for hosts behind a mapping.
        """
        self.peer = key.peer_id
        self.events: asyncio.Queue[PeerEvent] = asyncio.Queue(QUEUE_LENGTH)
        self._seed = key.seed
        self._listen = listen
        self._announce = tuple(announce)
        self._book = DialBook(key.peer_id, bootstrap, DEGREE, random.random)
        self._topics: dict[str, tuple[Validator, asyncio.Queue[Message]]] = {}
        self._linked: set[PeerId] = set()
        self._stack = contextlib.AsyncExitStack()
        self._program: _HostProgram
        self._bridge: Bridge

    @property
    def multiaddrs(self) -> tuple[str, ...]:
        """Where others reach us."""
        return self._announce or self._program.multiaddrs()

    async def __aenter__(self) -> Self:
        """Start listening; raises ``NetworkError`` when that fails."""
        await self._start()
        # From now on the same port, also after a restart of the host.
        self._listen = self._program.multiaddrs()[0].rpartition("/p2p/")[0]
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        self._jobs = [
            tasks.create_task(self._supervise(), name="libp2p supervisor"),
            tasks.create_task(self._dial_forever(tasks), name="libp2p dialler"),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop; what was just published gets a moment to leave."""
        for job in self._jobs:
            job.cancel()
        with contextlib.suppress(NetworkError):
            await self._bridge.call(self._program.hang_up)
        await self._bridge.stop()
        await self._stack.aclose()

    async def subscribe(self, topic: str, validator: Validator) -> "asyncio.Queue[Message]":
        """Join a topic, now and after every restart of the host."""
        queue: asyncio.Queue[Message] = asyncio.Queue(QUEUE_LENGTH)
        self._topics[topic] = (validator, queue)
        with contextlib.suppress(NetworkError):  # a restart in progress joins all topics
            await self._bridge.call(self._program.subscribe, topic)
        return queue

    async def publish(self, topic: str, data: bytes) -> None:
        """Send to all subscribers; raises ``NetworkError`` while the host restarts."""
        await self._bridge.call(self._program.publish, topic, data)

    async def connect(self, multiaddr: str) -> None:
        """Dial now; raises ``PeerUnreachable``."""
        await self._bridge.call(self._program.connect, multiaddr)

    def learn(self, multiaddrs: Iterable[str]) -> None:
        """Note addresses of members, dialled while there are fewer links than the degree."""
        self._book.learn(multiaddrs, time.monotonic())

    def peers(self) -> frozenset[PeerId]:
        """Peers with a live link."""
        return frozenset(self._linked)

    def tasks(self) -> int:
        """The trio tasks of the host."""
        return self._bridge.tasks

    def unreachable(self) -> Mapping[str, str]:
        """Bootstrap multiaddrs without a link, and why the last dial failed."""
        return self._book.unreachable(self._linked)

    def receive(self, topic: str, data: bytes, forwarder: PeerId) -> bool:
        """Validate a message and take delivery; called by the host program."""
        validator, queue = self._topics[topic]
        if validator(data, forwarder) is not True:
            return False
        put_latest(queue, Message(data, forwarder))
        return True

    def link_changed(self, peer: PeerId, linked: bool) -> None:
        """Note a link that came or went; called by the host program."""
        if linked == (peer in self._linked):
            return
        (self._linked.add if linked else self._linked.discard)(peer)
        put_latest(self.events, PeerEvent("connected" if linked else "disconnected", peer))

    async def _start(self) -> None:
        self._program = _HostProgram(self, self._seed, self._listen)
        self._bridge = Bridge(self._program.run, "libp2p")
        await self._bridge.start()
        for topic in self._topics:
            await self._bridge.call(self._program.subscribe, topic)

    async def _supervise(self) -> None:
        failures = 0
        while True:
            end = describe(await asyncio.shield(self._bridge.done))
            log.error("libp2p.ended", error=end)
            for peer in self.peers():
                self.link_changed(peer, linked=False)
            await asyncio.sleep(min(RESTART_BACKOFF_S_MAX, 0.25 * 2**failures))
            try:
                await self._start()
                failures = 0
            except NetworkError as error:
                log.error("libp2p.restart_failed", error=str(error))
                failures = min(failures + 1, 10)

    async def _dial_forever(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            for target in self._book.due(time.monotonic(), self._linked):
                tasks.create_task(self._dial(target))
            await asyncio.sleep(0.25)

    async def _dial(self, target: Target) -> None:
        problem = None
        try:
            await self.connect(target.multiaddr)
        except PeerUnreachable as error:
            if target.peer not in self._linked:  # else it dialled us meanwhile
                problem = str(error)
        except NetworkError:  # our own host is down: says nothing about the address
            target.dialling = False
            return
        if self._book.dialled(target, problem, time.monotonic()) and target.bootstrap:
            log.warning("libp2p.bootstrap_unreachable", multiaddr=target.multiaddr, error=problem)
