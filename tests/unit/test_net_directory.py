"""The public port and who watches it, on real loopback servers."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from plait.errors import PeerUnreachable
from plait.identity import SigningKey
from plait.net import directory as module
from plait.net import tls
from plait.net.directory import (
    HELLO_HOSTS_MAX,
    HELLOS_BURST,
    DirectoryServicer,
    HelloRates,
    TrustedCertificates,
)
from plait.net.gossip import Gossip
from plait.net.links import LinkMeter, Target
from plait.net.membership import Membership
from plait.net.watch import NetworkWatch, targets_of
from plait.network_file import Bootstrap, NetworkFile
from plait.router.view import Offer, View
from plait.task_scope import TaskScope
from plait.testing.net import MemoryNetwork
from plait.testing.offers import plain_offer
from plait.types import Digest, PeerId, Span
from plait.v1 import offer_pb2, offer_pb2_grpc

NOW_MS = 1_800_000_000_000
MODEL = Digest(b"m" * 32)
NODE, CLIENT, OTHER = (SigningKey.from_seed(bytes([n]) * 32) for n in (1, 2, 3))
NETWORK = NetworkFile("net-1", NODE.peer_id, "open", b"i" * 32, (), ())


def clock_ms() -> int:
    return NOW_MS


def offer_of(key: SigningKey, address: str, certificate: bytes) -> Offer:
    return plain_offer(
        key.peer_id,
        MODEL,
        Span(0, 4),
        issued_ms=0,
        expires_ms=0,
        public_address=address,
        peer_address=address,
        certificate=certificate,
    )


class Node:
    """A public port with a directory that knows one offer: its own."""

    def __init__(self, key: SigningKey, network: NetworkFile = NETWORK) -> None:
        self.key, self.network = key, network
        self.tls = tls.create_identity(key.peer_id)
        self.trusted = TrustedCertificates()
        self.control = MemoryNetwork().plane(key.peer_id)
        membership = Membership(network)
        self.gossip = Gossip(self.control, membership, network, key, MODEL, 1, clock_ms)

    @asynccontextmanager
    async def serving(self, port: int = 0) -> AsyncIterator["Node"]:
        servicer = DirectoryServicer(
            self.gossip, self.network, self.trusted, lambda request: PROBED, clock_ms
        )
        server = grpc.aio.server(options=tls.server_options())
        offer_pb2_grpc.add_DirectoryServiceServicer_to_server(servicer, server)
        self.port = server.add_secure_port(
            f"127.0.0.1:{port}", tls.server_credentials_public(self.tls)
        )
        self.address = f"127.0.0.1:{self.port}"
        await server.start()
        async with self.control, TaskScope() as tasks:
            self.gossip.set_offer(offer_of(self.key, self.address, self.tls.cert_der), at_once=True)
            with self.gossip.subscription() as changes:
                tasks.create_task(self.gossip.run())
                await changes.get()
            try:
                yield self
            finally:
                await server.stop(None)

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.key.peer_id, "", self.address, self.tls.cert_der)


PROBED = offer_pb2.ProbeResponse(would_accept=True, kv_tokens_free=7)


@contextmanager
def refused(code: grpc.StatusCode) -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() is code


@asynccontextmanager
async def stub_of(node: Node) -> AsyncIterator[offer_pb2_grpc.DirectoryServiceStub]:
    async with tls.channel(node.address, node.tls.cert_der) as channel:
        yield offer_pb2_grpc.DirectoryServiceStub(channel)


async def test_watch_sends_what_is_known_then_changes() -> None:
    async with Node(NODE).serving() as node, stub_of(node) as stub:
        stream = stub.Watch(offer_pb2.WatchRequest())
        first = await stream.read()
        assert (first.snapshot, len(first.envelopes)) == (True, 1)
        node.gossip.peer_down(NODE.peer_id, 1, "test")
        second = await stream.read()
        assert (second.snapshot, list(second.gone_peer_ids)) == (False, [NODE.peer_id])
        assert await stub.Probe(offer_pb2.ProbeRequest()) == PROBED


async def test_watchers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCHERS_MAX", 1)
    async with Node(NODE).serving() as node, stub_of(node) as stub:
        stream = stub.Watch(offer_pb2.WatchRequest())
        await stream.read()
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await stub.Watch(offer_pb2.WatchRequest()).read()


async def test_hello_registers_a_certificate_until_it_expires() -> None:
    identity = tls.create_identity(CLIENT.peer_id)
    async with Node(NODE).serving() as node, stub_of(node) as stub:
        envelope = tls.make_channel_cert(CLIENT, identity, "net-1", NOW_MS, 60_000)
        answer = await stub.Hello(offer_pb2.HelloRequest(channel_cert=envelope))
        assert answer.expires_ms == NOW_MS + 60_000
        assert node.trusted.peer_of(identity.cert_der) == CLIENT.peer_id
        envelope = tls.make_channel_cert(CLIENT, identity, "net-1", NOW_MS, 10**12)
        answer = await stub.Hello(offer_pb2.HelloRequest(channel_cert=envelope))
        assert answer.expires_ms == NOW_MS + module.HELLO_TTL_MS_MAX


async def test_hello_refuses_forgeries_and_the_uninvited() -> None:
    identity = tls.create_identity(CLIENT.peer_id)
    closed = replace(NETWORK, admission="allowlist", allowed_peers=frozenset({NODE.peer_id}))
    async with Node(NODE, closed).serving() as node, stub_of(node) as stub:
        envelope = tls.make_channel_cert(CLIENT, identity, "net-1", NOW_MS, 60_000)
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            await stub.Hello(offer_pb2.HelloRequest(channel_cert=envelope))
        envelope.signature = bytes(64)
        for bad in (envelope, None):
            with refused(grpc.StatusCode.INVALID_ARGUMENT):
                await stub.Hello(offer_pb2.HelloRequest(channel_cert=bad))
        assert node.trusted.certificates() == ()


def view_of(*offers: Offer) -> View:
    return View({offer.peer: offer for offer in offers}, {})


def cert_of(key: SigningKey) -> bytes:
    return tls.create_identity(key.peer_id).cert_der


def test_trust_follows_offers_and_greetings() -> None:
    trusted, old, new, theirs = TrustedCertificates(), cert_of(NODE), cert_of(NODE), cert_of(CLIENT)
    trusted.refresh(view_of(offer_of(NODE, "h:1", old)), NOW_MS)
    trusted.greet(CLIENT.peer_id, theirs, NOW_MS + 10)
    before = trusted.certificates()
    assert set(before) == {old, theirs}
    trusted.refresh(view_of(offer_of(NODE, "h:1", old)), NOW_MS)
    assert trusted.certificates() is before
    # One certificate per peer: the root store would find only one of them.
    trusted.greet(NODE.peer_id, new, NOW_MS + 10)
    assert set(trusted.certificates()) == {new, theirs}
    trusted.refresh(view_of(), NOW_MS + 10)
    assert trusted.certificates() == ()
    assert trusted.peer_of(theirs) is None


def test_a_newer_offer_beats_an_older_greeting() -> None:
    trusted, old, new = TrustedCertificates(), cert_of(NODE), cert_of(NODE)
    trusted.greet(NODE.peer_id, old, NOW_MS + 10)
    trusted.refresh(view_of(offer_of(NODE, "h:1", new)), NOW_MS)
    assert trusted.certificates() == (new,)
    assert (trusted.peer_of(new), trusted.peer_of(old)) == (NODE.peer_id, None)


def test_stolen_and_malformed_certificates_are_left_out() -> None:
    trusted, mine = TrustedCertificates(), cert_of(NODE)
    thief, junk = offer_of(OTHER, "h:1", mine), offer_of(CLIENT, "h:1", b"junk")
    trusted.refresh(view_of(offer_of(NODE, "h:1", mine), thief, junk), NOW_MS)
    assert trusted.certificates() == (mine,)
    assert trusted.peer_of(mine) == NODE.peer_id


def test_callers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALLERS_MAX", 2)
    trusted, certs = TrustedCertificates(), [cert_of(key) for key in (NODE, CLIENT, OTHER)]
    for key, cert in zip((NODE, CLIENT, OTHER), certs, strict=True):
        trusted.greet(key.peer_id, cert, NOW_MS + 10)
    assert set(trusted.certificates()) == set(certs[1:])


def test_odd_addresses_are_never_dialled() -> None:
    bad = ["", "h", "unix:/tmp/x:1", "dns:///h:1", "h:0", "h:70000", "h:1/x", "[::1:1"]
    for address in bad:
        assert targets_of(view_of(offer_of(OTHER, address, b"c")), NODE.peer_id) == []
    for address in ("h:1", "127.0.0.1:65535", "[::1]:80"):
        view = view_of(offer_of(OTHER, address, b"c"), offer_of(NODE, "h:1", b"c"))
        assert [t.address for t in targets_of(view, NODE.peer_id)] == [address]


class Meter:
    """A link meter with its targets, and what it said about them."""

    def __init__(self) -> None:
        self.targets: list[Target] = []
        self.down: list[PeerId] = []
        self.first: list[PeerId] = []
        self.ticks = 0.0
        self.meter = LinkMeter(
            lambda: self.targets,
            lambda target, reason: self.down.append(target.peer),
            self._monotonic_s,
            lambda target: self.first.append(target.peer),
        )

    def _monotonic_s(self) -> float:
        self.ticks += 0.001
        return self.ticks

    def follow(self, node: Node, incarnation: int = 1) -> None:
        self.targets = [Target(node.key.peer_id, incarnation, node.address, node.tls.cert_der)]


async def test_round_trips_are_measured_and_the_dead_named_once() -> None:
    meter, node = Meter(), Node(NODE)
    async with node.serving():
        meter.follow(node)
        for _ in range(3):
            await meter.meter.measure_once()
        assert meter.meter.rtt_us(NODE.peer_id) == meter.meter.rtts_us()[NODE.peer_id] == 1000
        assert (meter.first, meter.down) == ([NODE.peer_id], [])
    await meter.meter.measure_once()
    assert meter.down == []
    await meter.meter.measure_once()
    assert meter.down == [NODE.peer_id]
    meter.targets = []
    await meter.meter.measure_once()
    assert meter.meter.rtt_us(NODE.peer_id) is None
    await meter.meter.close()


async def test_another_holder_of_the_address_does_not_count_as_alive() -> None:
    meter, node = Meter(), Node(NODE)
    async with node.serving():
        meter.follow(node)
        meter.targets = [replace(meter.targets[0], certificate=cert_of(NODE))]
        for _ in range(2):
            await meter.meter.measure_once()
    assert meter.down == [NODE.peer_id]
    await meter.meter.close()


async def test_rounds_do_not_disturb_each_other() -> None:
    meter, node = Meter(), Node(NODE)
    async with node.serving(), TaskScope() as tasks:
        rounds = []
        for incarnation in range(1, 9):
            meter.follow(node, incarnation)
            rounds.append(tasks.create_task(meter.meter.measure_once()))
            await asyncio.sleep(0)
        await asyncio.gather(*rounds)
        assert meter.down == []
    await meter.meter.close()


async def test_a_watch_sees_offers_and_measures_links() -> None:
    async with Node(NODE).serving() as node:
        network = replace(NETWORK, bootstrap=(node.bootstrap,))
        async with NetworkWatch(network, CLIENT.peer_id, clock_ms) as watch:
            await watch.settled()
            view = watch.view()
            assert list(view.offers) == [NODE.peer_id]
            assert view.link_rtt_us(CLIENT.peer_id, NODE.peer_id)
            await node.gossip.withdraw()
            async with asyncio.timeout(5):
                while watch.view().offers:
                    await watch.changed()


@pytest.mark.slow
async def test_a_watch_drops_the_dead_and_finds_the_restarted() -> None:
    async with AsyncExitStack() as stack:
        node = await stack.enter_async_context(Node(NODE).serving())
        network = replace(NETWORK, bootstrap=(node.bootstrap,))
        watch = await stack.enter_async_context(NetworkWatch(network, CLIENT.peer_id, clock_ms))
        await watch.settled()
        async with Node(OTHER).serving() as other:
            data = other.gossip.envelopes()[0].SerializeToString()
            assert node.gossip._validate(data, OTHER.peer_id) is True
            async with asyncio.timeout(5):
                while OTHER.peer_id not in watch.view().offers:
                    await watch.changed()
        async with asyncio.timeout(5):
            while OTHER.peer_id in watch.view().offers:
                await watch.changed()
        assert list(watch.view().offers) == [NODE.peer_id]


async def test_a_watch_names_directories_that_do_not_answer() -> None:
    async with Node(NODE).serving() as node:
        pass
    network = replace(NETWORK, bootstrap=(node.bootstrap,))
    async with NetworkWatch(network, CLIENT.peer_id, clock_ms) as watch:
        await watch.settled()
        with pytest.raises(PeerUnreachable, match=node.address):
            watch.check_reachable()


def test_a_host_says_hello_at_a_bounded_rate() -> None:
    rates = HelloRates()
    assert [rates.take("one", 0) for _ in range(HELLOS_BURST + 1)].count(False) == 1
    assert rates.take("two", 0)
    assert rates.take("one", 50)
    assert not rates.take("one", 50)
    for number in range(HELLO_HOSTS_MAX):
        rates.take(f"host {number}", 50)
    assert rates.take("one", 50), "a host that was forgotten starts anew"
