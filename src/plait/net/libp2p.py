"""The real gossip network: py-libp2p 0.8.1, hardened, in a trio thread behind a bridge.

Only this module imports libp2p, and importing it takes about a second: import it late.
Out of the box one stranger's bytes can stop py-libp2p or impersonate a peer, silent links
go unnoticed and lost ones stay lost; each guard below says which of these it is for.
"""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import libp2p
import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.ping import ID as PING
from libp2p.host.ping import perform_ping_roundtrip
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
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
MESSAGE_BYTES_MAX = 4096
RPC_BYTES_MAX = 64 * 1024
TOPICS_PER_PEER_MAX = 64
CONTROL_IDS_MAX = 512
PRUNE_BACKOFF_S_MAX = 120
CONNECTIONS_MAX = 128

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 1.8
FLUSH_S = 0.1
DIAL_TIMEOUT_S = 5.0
RESTART_BACKOFF_S_MAX = 15.0


class _Router(GossipSub):
    """GossipSub that takes nothing on trust from a control message."""

    async def heartbeat(self) -> None:
        """Beat on: one bad beat must not stop the host."""
        while True:
            with _guarded("heartbeat"):
                await super().heartbeat()
            await trio.sleep(self.heartbeat_interval)

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        with _guarded("on_peer_subscribed"):
            await super().on_peer_subscribed(peer_id, topic)

    async def flush_pending_messages(self, peer_id: ID) -> None:
        with _guarded("flush_pending_messages"):
            await super().flush_pending_messages(peer_id)

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        if ihave_msg.topicID in self.mesh:
            del ihave_msg.messageIDs[CONTROL_IDS_MAX:]
            await super().handle_ihave(ihave_msg, sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        del iwant_msg.messageIDs[CONTROL_IDS_MAX:]
        await super().handle_iwant(iwant_msg, sender_peer_id)

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        if graft_msg.topicID in self.mesh:  # topics we never joined would only fill memory
            await super().handle_graft(graft_msg, sender_peer_id)

    async def handle_prune(self, prune_msg: rpc_pb2.ControlPrune, sender_peer_id: ID) -> None:
        if prune_msg.topicID in self.mesh:
            prune_msg.backoff = min(prune_msg.backoff, PRUNE_BACKOFF_S_MAX)
            del prune_msg.peers[:]  # addresses a stranger wants us to dial
            await super().handle_prune(prune_msg, sender_peer_id)


class _Pubsub(Pubsub):
    """Pubsub that survives any message and looks at each only once at a time."""

    def __init__(self, host: IHost, router: GossipSub) -> None:
        super().__init__(
            host,
            router,
            max_concurrent_validator_count=64,
            max_subscriptions_per_rpc=TOPICS_PER_PEER_MAX,
            max_subscriptions_per_peer=TOPICS_PER_PEER_MAX,
            max_inbound_rpc_size=RPC_BYTES_MAX,
        )
        # Seconds, the default, repeat after a restart and lose messages to others' caches.
        self.counter = time.time_ns()
        self._in_flight: set[bytes] = set()

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        name = msg.from_id + msg.seqno
        if name in self._in_flight or len(msg.topicIDs) != 1 or len(msg.data) > MESSAGE_BYTES_MAX:
            return
        self._in_flight.add(name)
        try:
            with _guarded("message"):
                await super().push_msg(msg_forwarder, msg)
        finally:
            self._in_flight.discard(name)


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Log an exception instead of letting it cancel the host: a task boundary."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        log.debug("libp2p.refused", what=what, error=describe(error))


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
    # It dials whatever addresses strangers told us, whatever the watermarks say.
    network.auto_connector.maybe_connect = trio.lowlevel.checkpoint
    return host


class _Links(INotifee):
    """Tells the host program of connections that come and go."""

    def __init__(self, changed: Callable[[ID], None]) -> None:
        self._changed = changed

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        self._changed(conn.muxed_conn.peer_id)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        _close_socket(conn)
        self._changed(conn.muxed_conn.peer_id)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...


def _close_socket(connection: INetConn) -> None:
    """Close what libp2p leaves open when the other end closed, or takes no more bytes."""
    if getattr(connection, "_shared_muxed_conn", False):  # a second wrapper of a live one
        return
    layer: Any = getattr(connection.muxed_conn, "secured_conn", None)
    for name in ("conn", "conn", "stream", "stream"):
        layer = getattr(layer, name, None)
    if isinstance(layer, trio.SocketStream):
        layer.socket.close()


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
        self._router = _Router(
            protocols=[MESHSUB],
            degree=DEGREE,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=1,
            spam_protection_enabled=False,  # it counts forwarders, not authors, and drops
        )
        self._pubsub = _Pubsub(self._host, self._router)
        self._listen = Multiaddr(listen)
        self._linked: set[ID] = set()
        self._nursery: trio.Nursery

    async def run(self, bridge: Bridge, ready: Callable[[], None]) -> None:
        """Run until cancelled."""
        self._bridge = bridge
        check_free(str(self._listen))
        self._host.get_network().register_notifee(_Links(self._changed))
        # One stack in strict order, or trio finds its nurseries misnested.
        async with contextlib.AsyncExitStack() as stack:
            self._nursery = await stack.enter_async_context(trio.open_nursery())
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
                for conn in self._host.get_network().get_connections():
                    _close_socket(conn)

    async def hang_up(self) -> None:
        """Close all links; a host that is only cancelled leaves its peers waiting."""
        await trio.sleep(FLUSH_S)
        async with trio.open_nursery() as nursery:
            for peer in list(self._host.get_network().connections):
                nursery.start_soon(self._disconnect, peer)

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

    async def _drain(self, subscription: Any) -> None:
        while True:  # its queue holds 32 and then complains; delivery was in the validator
            await subscription.get()

    def _is_linked(self, peer: ID) -> bool:
        return any(
            not conn.muxed_conn.is_closed for conn in self._host.get_network().get_connections(peer)
        )

    def _changed(self, peer: ID) -> None:
        linked = self._is_linked(peer)
        if linked and peer not in self._linked:
            self._linked.add(peer)
            self._bridge.post(self._plane.link_changed, PeerId(str(peer)), True)
            self._nursery.start_soon(self._watch, peer)
        elif not linked and peer in self._linked:
            self._linked.discard(peer)
            self._bridge.post(self._plane.link_changed, PeerId(str(peer)), False)

    async def _watch(self, peer: ID) -> None:
        """Ping a linked peer; libp2p itself never notices a link that fell silent."""
        stream: INetStream | None = None
        failures = 0
        while peer in self._linked:
            await trio.sleep(PING_INTERVAL_S)
            try:
                with trio.fail_after(PING_TIMEOUT_S):
                    stream = stream or await self._host.new_stream(peer, [PING])
                    await perform_ping_roundtrip(stream)
                failures = 0
            except trio.TooSlowError:
                break
            except Exception as error:  # noqa: BLE001 - a closed stream may be opened again
                log.debug("libp2p.ping", peer=str(peer), error=describe(error))
                stream, failures = None, failures + 1
                if failures == 2:
                    break
                # The connection under it may have been replaced, as after a hang of ours:
                # gossip would go on writing to the old one, so it must begin anew too.
                self._pubsub._handle_dead_peer(peer)
        await self._drop(peer)

    async def _drop(self, peer: ID) -> None:
        if peer not in self._linked:
            return
        log.info("libp2p.link_dead", peer=str(peer))
        self._linked.discard(peer)
        self._bridge.post(self._plane.link_changed, PeerId(str(peer)), False)
        await self._disconnect(peer)
        self._pubsub._handle_dead_peer(peer)

    async def _disconnect(self, peer: ID) -> None:
        network = self._host.get_network()
        connections = network.get_connections(peer)
        with trio.move_on_after(0.5), contextlib.suppress(Exception):
            await self._host.disconnect(peer)
        for connection in connections:
            _close_socket(connection)
        network.connections.pop(peer, None)


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
            problem = str(error)
        except NetworkError:  # our own host is down: says nothing about the address
            target.dialling = False
            return
        if self._book.dialled(target, problem, time.monotonic()) and target.bootstrap:
            log.warning("libp2p.bootstrap_unreachable", multiaddr=target.multiaddr, error=problem)
