"""The real gossip network on loopback: its life, its links, and attacks on it."""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import libp2p
import pytest
import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.io.utils import read_exactly
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.secio.transport import ID as SECIO
from libp2p.security.secio.transport import Transport as SecioTransport
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from plait.errors import NetworkError, PeerUnreachable
from plait.identity import SigningKey
from plait.net import libp2p as real
from plait.net import libp2p_links
from plait.net.bridge import Bridge
from plait.net.libp2p_gossip import GuardedPubsub
from plait.net.libp2p_links import Links, close_socket
from plait.net.port import Message, PeerEvent
from plait.types import PeerId

pytestmark = [
    pytest.mark.slow,
    # libp2p leaves sockets of lost links and timed out dials to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TOPIC = "/plait/test/offers/1"
Plane = real.Libp2pControlPlane
Queue = asyncio.Queue[Message]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()  # not in a later test, which may not ignore the warning


def key(number: int) -> SigningKey:
    return SigningKey.from_seed(bytes([number] * 32))


def accept(data: bytes, forwarder: PeerId) -> bool:
    return not data.startswith(b"bad")


async def next_of(queue: Queue) -> bytes:
    async with asyncio.timeout(20):
        while (data := (await queue.get()).data).startswith(b"probe"):
            pass
        return data


async def until_linked(plane: Plane, peer: PeerId, *, linked: bool = True) -> None:
    async with asyncio.timeout(20):
        while (peer in plane.peers()) != linked:
            await plane.events.get()


async def until_heard(sender: Plane, queue: Queue, topic: str = TOPIC) -> None:
    """Publish until the other end hears it: subscriptions take a moment to spread."""
    async with asyncio.timeout(20):
        for number in range(1000):
            await sender.publish(topic, b"probe %d" % number)
            try:
                async with asyncio.timeout(0.05):
                    await queue.get()
                    return
            except TimeoutError:
                continue


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Plane, Plane, Queue]]:
    """Two linked planes, and the queue of the second."""
    async with Plane(key(1)) as first, Plane(key(2), bootstrap=first.multiaddrs) as second:
        await first.subscribe(TOPIC, accept)
        queue = await second.subscribe(TOPIC, accept)
        await until_linked(first, second.peer)
        await until_heard(first, queue)
        yield first, second, queue


@asynccontextmanager
async def stranger(
    security: Mapping[Any, Any] | None = None,
) -> AsyncIterator[tuple[Bridge, IHost]]:
    """A bare libp2p host that follows no rules."""
    keys = create_new_key_pair(bytes([9] * 32))
    host = libp2p.new_host(key_pair=keys, sec_opt=security)

    host.get_network().register_notifee(_SocketCloser())
    host.set_stream_handler(real.MESHSUB, _swallow)  # or it would be dropped for not gossiping

    async def main(bridge: Bridge, ready: Callable[[], None]) -> None:
        async with host.run([Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            ready()
            await trio.sleep_forever()

    bridge = Bridge(main, "stranger")
    await bridge.start()
    try:
        yield bridge, host
    finally:
        network = host.get_network()
        await bridge.call(_close_all, network)
        await bridge.stop()


async def _swallow(stream: INetStream) -> None:
    with contextlib.suppress(Exception):  # which would stop the bare host
        while await stream.read(4096):
            pass


class _SocketCloser(Links):
    """Takes no links, and closes what libp2p leaves open."""

    def __init__(self) -> None: ...

    async def connected(self, network: INetwork, conn: INetConn) -> None: ...

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        close_socket(conn)


async def _close_all(network: Any) -> None:
    for peer in list(network.connections):
        await network.close_peer(peer)


async def test_messages_arrive_once_and_bad_ones_do_not() -> None:
    async with pair() as (first, second, queue):
        assert first.unreachable() == {}
        for data in (b"one", b"bad", b"two"):
            await first.publish(TOPIC, data)
        assert [await next_of(queue), await next_of(queue)] == [b"one", b"two"]
        assert queue.empty()
        await first.connect(second.multiaddrs[0])
        with pytest.raises(PeerUnreachable):
            await first.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{key(3).peer_id}")
    assert first.peers() == frozenset()


async def test_a_message_passes_on_to_peers_without_a_link() -> None:
    async with pair() as (first, second, _), Plane(key(3)) as third:
        queue = await third.subscribe(TOPIC, accept)
        second.learn(third.multiaddrs)
        await until_linked(second, third.peer)
        await until_heard(first, queue)
        assert first.peers() == {second.peer}


async def test_a_clean_stop_is_seen_at_once_and_a_restart_is_rejoined() -> None:
    async with pair() as (_, second, queue):
        third = Plane(key(3), bootstrap=second.multiaddrs)
        async with third:
            await third.subscribe(TOPIC, accept)
            await until_heard(third, queue)
            listen = third.multiaddrs[0].rpartition("/p2p/")[0]
        async with asyncio.timeout(1.5):  # not after a ping has timed out
            await until_linked(second, third.peer, linked=False)
        async with Plane(key(3), listen=listen, bootstrap=second.multiaddrs) as again:
            await again.subscribe(TOPIC, accept)
            await until_heard(again, queue)


async def test_dials_that_cross_leave_one_link() -> None:
    async with Plane(key(1)) as first, Plane(key(2)) as second:
        queues = [await plane.subscribe(TOPIC, accept) for plane in (first, second)]
        await asyncio.gather(
            first.connect(second.multiaddrs[0]),
            second.connect(first.multiaddrs[0]),
            return_exceptions=True,  # one may lose to the other
        )
        first.learn(second.multiaddrs)
        await until_heard(first, queues[1])
        await until_heard(second, queues[0])
        for plane in (first, second):
            assert len(plane._program._host.get_network().get_connections()) == 1


async def test_a_link_that_is_replaced_leaves_no_sender(monkeypatch: pytest.MonkeyPatch) -> None:
    senders = Counter[GuardedPubsub]()
    send = GuardedPubsub.handle_sending_messages

    async def counted(pubsub: GuardedPubsub, *given: Any) -> None:
        senders[pubsub] += 1
        try:
            await send(pubsub, *given)
        finally:
            senders[pubsub] -= 1

    monkeypatch.setattr(GuardedPubsub, "handle_sending_messages", counted)
    monkeypatch.setattr(libp2p_links, "TOGETHER_S", 0)
    async with pair() as (first, second, queue):
        info = info_from_p2p_addr(Multiaddr(first.multiaddrs[0]))

        async def dial_again() -> None:  # as a peer does that has lost its link
            network: Any = second._program._host.get_network()
            await network.dial_addr(info.addrs[0], info.peer_id)

        for _ in range(3):
            await second._bridge.call(dial_again)
            await until_heard(first, queue)
        async with asyncio.timeout(20):
            while sorted(senders.values()) != [1, 1]:  # noqa: ASYNC110 - in another thread
                await asyncio.sleep(0.02)


async def test_only_those_who_are_linked_count_against_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(real, "CONNECTIONS_MAX", 2)
    async with Plane(key(1)) as first:
        for number in range(2, 6):
            async with Plane(key(number), bootstrap=first.multiaddrs) as other:
                await until_linked(first, other.peer)
            await until_linked(first, other.peer, linked=False)


async def test_sequence_numbers_never_repeat_after_a_restart() -> None:
    # Others drop for two minutes what repeats a number, however much was sent before.
    async with Plane(key(1)) as first:
        before = first._program._pubsub.counter
    async with Plane(key(1)) as first:
        assert first._program._pubsub.counter > before + 1_000_000


async def test_an_unreachable_bootstrap_is_named_and_joined_later() -> None:
    async with Plane(key(1)) as first:
        (multiaddr,) = first.multiaddrs
    listen = multiaddr.rpartition("/p2p/")[0]
    async with Plane(key(2), bootstrap=[multiaddr]) as second:
        with pytest.raises(PeerUnreachable):
            await second.connect(multiaddr)
        assert list(second.unreachable()) == [multiaddr]
        async with Plane(key(1), listen=listen):
            await until_linked(second, key(1).peer_id)
            assert second.unreachable() == {}


async def test_an_occupied_port_is_an_error() -> None:
    async with Plane(key(1)) as first:
        listen = first.multiaddrs[0].rpartition("/p2p/")[0]
        with pytest.raises(NetworkError, match="listen"):
            await Plane(key(2), listen=listen).__aenter__()


async def test_a_broken_host_is_replaced() -> None:
    async with pair() as (first, second, queue):

        async def crash() -> None:
            async def fail() -> None:
                raise RuntimeError("broken")

            second._program._nursery.start_soon(fail)

        before = second.multiaddrs
        await second._bridge.call(crash)
        await until_linked(second, first.peer, linked=False)
        await until_linked(second, first.peer)
        assert second.multiaddrs == before
        await until_heard(first, queue)


async def test_a_silent_link_is_dropped_within_three_seconds_and_redialled() -> None:
    async with (
        Plane(key(1)) as first,
        _Wire(first.multiaddrs[0]) as wire,
        Plane(key(2), bootstrap=[wire.multiaddr]) as second,
    ):
        await until_linked(second, first.peer)
        wire.frozen = True
        async with asyncio.timeout(4.5):  # 3 s, and something for a busy machine
            await until_linked(second, first.peer, linked=False)
            await until_linked(first, second.peer, linked=False)
        wire.frozen = False
        await until_linked(second, first.peer)


class _Wire:
    """A TCP relay that can fall silent without closing."""

    def __init__(self, multiaddr: str) -> None:
        self._parts = multiaddr.split("/")
        self.frozen = False

    async def __aenter__(self) -> "_Wire":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.multiaddr = "/".join([*self._parts[:4], str(port), *self._parts[5:]])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", int(self._parts[4]))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(reader, there[1]))
            tasks.create_task(self._pump(there[0], writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if not self.frozen:
                    writer.write(data)
        except OSError:
            pass
        writer.close()


Attack = Callable[[Plane, IHost], Awaitable[None]]


async def _stream(victim: Plane, host: IHost, protocol: str = real.MESHSUB) -> INetStream:
    info = info_from_p2p_addr(Multiaddr(victim.multiaddrs[0]))
    await host.disconnect(info.peer_id)  # the victim may have dropped us for the last attack
    await host.connect(info)
    return await host.new_stream(info.peer_id, [TProtocol(protocol)])


async def _send(stream: INetStream, rpc: rpc_pb2.RPC) -> None:
    await stream.write(encode_varint_prefixed(rpc.SerializeToString()))


async def junk_bytes(victim: Plane, host: IHost) -> None:
    stream = await _stream(victim, host)
    await stream.write(b"\x08" + b"\xff" * 8)


async def undecodable_key(victim: Plane, host: IHost) -> None:
    message = rpc_pb2.Message(
        from_id=host.get_id().to_bytes(),
        seqno=bytes(8),
        data=b"x",
        topicIDs=[TOPIC],
        key=b"\xff" * 9,
        signature=bytes(64),
    )
    await _send(await _stream(victim, host), rpc_pb2.RPC(publish=[message]))


async def ended_stream(victim: Plane, host: IHost) -> None:
    await (await _stream(victim, host, "/custom/1")).close()


async def hostile_control(victim: Plane, host: IHost) -> None:
    peer = rpc_pb2.PeerInfo(peerID=host.get_id().to_bytes(), signedPeerRecord=b"junk")
    rpc = rpc_pb2.RPC()
    for topic in (TOPIC, "\u0000other"):
        rpc.control.prune.add(topicID=topic, backoff=2**64 - 1, peers=[peer])
        rpc.control.graft.add(topicID=topic)
        rpc.control.ihave.add(topicID=topic, messageIDs=[b"zz", b"00", b"\xff"])
    rpc.control.iwant.add(messageIDs=[b"zz"] * 2000)
    rpc.subscriptions.extend(rpc_pb2.RPC.SubOpts(subscribe=True, topicid=str(n)) for n in range(60))
    await _send(await _stream(victim, host), rpc)


async def oversized(victim: Plane, host: IHost) -> None:
    stream = await _stream(victim, host)
    await stream.write(b"\xff\xff\xff\xff\x0f" + bytes(1000))


@pytest.mark.parametrize(
    "attack", [junk_bytes, undecodable_key, ended_stream, hostile_control, oversized]
)
async def test_a_stranger_cannot_stop_a_host(attack: Attack) -> None:
    async with pair() as (first, _, queue), stranger() as (bridge, host):

        async def careless(stream: INetStream) -> None:
            await read_exactly(stream, 8)

        first._program._host.set_stream_handler(TProtocol("/custom/1"), careless)
        for _ in range(3):
            await bridge.call(attack, first, host)
        await first.publish(TOPIC, b"alive")
        assert await next_of(queue) == b"alive"
        assert not first._bridge.done.done()
        until = [t for peers in first._program._router.back_off.values() for t in peers.values()]
        assert len(first._program._router.back_off) <= 1
        assert all(t < 2**32 for t in until)


async def test_a_validator_that_raises_stops_nothing() -> None:
    async with pair() as (first, second, _):

        def broken(data: bytes, forwarder: PeerId) -> bool:
            if data == b"ok":
                return True
            raise KeyError("bug")

        queue = await second.subscribe("/broken", broken)
        await first.subscribe("/broken", accept)
        async with asyncio.timeout(20):
            while queue.empty():
                await first.publish("/broken", b"boom")
                await first.publish("/broken", b"ok")
                await asyncio.sleep(0.02)
        assert (await queue.get()).data == b"ok"


@pytest.mark.parametrize("security", ["plaintext", "secio"])
async def test_weak_handshakes_are_refused(security: str) -> None:
    keys = create_new_key_pair(bytes([9] * 32))
    weak: dict[str, Mapping[Any, Any]] = {
        "plaintext": {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)},
        "secio": {SECIO: SecioTransport(keys)},
    }
    async with Plane(key(1)) as plane, stranger(weak[security]) as (bridge, host):
        with pytest.raises(Exception, match=r"(?i)unable to connect|fail|upgrade|handshake"):
            await bridge.call(_stream, plane, host)
        assert plane.peers() == frozenset()
        assert plane.events.empty() or (await plane.events.get()) != PeerEvent(
            "connected", PeerId(str(host.get_id()))
        )
