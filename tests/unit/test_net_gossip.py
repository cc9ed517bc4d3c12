"""The gossip shell, on the in-memory network."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from plait.errors import ConfigError
from plait.identity import SigningKey
from plait.net import gossip as module
from plait.net.gossip import Gossip, offers_topic
from plait.net.membership import Change, Membership
from plait.network_file import NetworkFile
from plait.router.view import Offer
from plait.router.wire import seal_offer
from plait.task_scope import TaskScope
from plait.testing.net import MemoryControlPlane, MemoryNetwork
from plait.testing.offers import plain_offer
from plait.types import Digest, Span

NOW_MS = 1_800_000_000_000
INCARNATION = NOW_MS * 1_000_000
MODEL = Digest(b"m" * 32)
KEYS = [SigningKey.from_seed(bytes([n]) * 32) for n in (1, 2, 3)]
NETWORK = NetworkFile("net-1", KEYS[0].peer_id, "open", b"i" * 32, (), ())


class Clock:
    """Wall time that only moves when told."""

    now_ms = NOW_MS

    def __call__(self) -> int:
        return self.now_ms


FRONT, BACK = Span(0, 4), Span(4, 8)


def offer_of(key: SigningKey, *, span: Span = FRONT) -> Offer:
    addresses = (f"/ip4/127.0.0.1/tcp/9/p2p/{key.peer_id}", f"/x/p2p/{KEYS[2].peer_id}")
    return plain_offer(key.peer_id, MODEL, span, certificate=b"c", multiaddrs=addresses)


def gossip_of(control: MemoryControlPlane, key: SigningKey, clock: Clock) -> Gossip:
    return Gossip(control, Membership(NETWORK), NETWORK, key, MODEL, INCARNATION, clock)


@asynccontextmanager
async def swarm(clock: Clock) -> AsyncIterator[tuple[MemoryNetwork, list[Gossip]]]:
    """Three members, all linked, gossiping."""
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(TaskScope())
        planes = [await stack.enter_async_context(network.plane(key.peer_id)) for key in KEYS]
        members = [gossip_of(p, k, clock) for p, k in zip(planes, KEYS, strict=True)]
        for member in members:
            tasks.create_task(member.run())
        await asyncio.sleep(0)
        for other in KEYS[1:]:
            network.link(KEYS[0].peer_id, other.peer_id)
        yield network, members


async def until_told(member: Gossip, kind: str) -> Change:
    with member.subscription() as changes:
        async with asyncio.timeout(5):
            while (change := await changes.get()).kind != kind:
                pass
            return change


async def heard(member: Gossip, author: Gossip, offer: Offer) -> Change:
    """Publish an offer and wait until the member knows it."""
    with member.subscription() as changes:
        author.set_offer(offer, at_once=True)
        async with asyncio.timeout(5):
            return await changes.get()


@pytest.fixture(autouse=True)
def _no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PUBLISH_GAP_S", 0.0)


async def test_an_offer_spreads_at_once_and_later_ones_replace_it() -> None:
    async with swarm(Clock()) as (_, (first, second, third)):
        change = await heard(third, second, offer_of(KEYS[1]))
        assert change.offer is not None
        assert (change.offer.incarnation, change.offer.expires_ms) == (INCARNATION, NOW_MS + 60_000)
        await heard(third, second, offer_of(KEYS[1], span=BACK))
        for member in (first, second, third):
            assert [o.span for o in member.view().offers.values()] == [BACK]
            assert len(member.envelopes()) == 1
        assert len(second.recent_offers) == 2


async def test_only_a_peers_own_addresses_are_learned() -> None:
    async with swarm(Clock()) as (network, (_, second, third)):
        await heard(third, second, offer_of(KEYS[1]))
        learned = network.running[KEYS[2].peer_id].learned
        assert set(learned) == {f"/ip4/127.0.0.1/tcp/9/p2p/{KEYS[1].peer_id}"}


async def test_round_trips_are_reported_nearest_first() -> None:
    async with swarm(Clock()) as (_, (first, second, _third)):
        far = {SigningKey.from_seed(bytes([n]) * 32).peer_id: n * 100 for n in range(4, 40)}
        second.set_links(far)
        await heard(first, second, offer_of(KEYS[1]))
        if not first.view().rtt_us:
            await until_told(first, "links")
        assert sorted(first.view().rtt_us.values()) == [n * 100 for n in range(4, 20)]


async def test_withdrawing_leaves_every_view() -> None:
    async with swarm(Clock()) as (_, (first, second, _third)):
        await heard(first, second, offer_of(KEYS[1]))
        with first.subscription() as changes:
            await second.withdraw()
            assert (await changes.get()).kind == "gone"
        assert first.view().offers == {}


async def test_a_dead_peer_is_dropped_and_watchers_hear_of_it() -> None:
    async with swarm(Clock()) as (_, (first, second, _third)):
        await heard(first, second, offer_of(KEYS[1]))
        with first.subscription() as changes:
            first.peer_down(KEYS[1].peer_id, INCARNATION, "no answer")
            first.peer_down(KEYS[1].peer_id, INCARNATION, "no answer")
            change = changes.get_nowait()
            assert (change.kind, change.peer, changes.empty()) == ("gone", KEYS[1].peer_id, True)
        assert first.view().offers == {}
        await heard(first, second, offer_of(KEYS[1]))
        assert list(first.view().offers) == [KEYS[1].peer_id]


async def test_a_new_neighbour_is_greeted_with_the_offer() -> None:
    async with swarm(Clock()) as (network, (first, second, third)):
        network.cut(KEYS[0].peer_id, KEYS[2].peer_id)
        await heard(first, second, offer_of(KEYS[1]))
        assert third.view().offers == {}
        with third.subscription() as changes:
            network.heal(KEYS[1].peer_id, KEYS[2].peer_id)
            async with asyncio.timeout(5):
                assert (await changes.get()).peer == KEYS[1].peer_id


async def test_offers_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXPIRY_PERIOD_S", 0.0)
    clock = Clock()
    async with swarm(clock) as (network, (first, second, _third)):
        await heard(first, second, offer_of(KEYS[1]))
        network.cut(KEYS[0].peer_id, KEYS[1].peer_id)
        clock.now_ms += 60_000
        assert (await until_told(first, "gone")).reason == "expired"


async def test_forged_offers_are_not_passed_on() -> None:
    async with swarm(Clock()) as (network, (first, second, _third)):
        offer = replace(
            offer_of(KEYS[1]), incarnation=1, issued_ms=NOW_MS, expires_ms=NOW_MS + 1000
        )
        forged = seal_offer(KEYS[1], offer, "net-1")
        forged.signature = bytes(64)
        topic = offers_topic("net-1", MODEL)
        network.flood(KEYS[1].peer_id, topic, forged.SerializeToString())
        assert first.view().offers == second.view().offers == {}


async def test_a_copied_identity_ends_the_gossip() -> None:
    network, clock = MemoryNetwork(), Clock()
    async with network.plane(KEYS[0].peer_id) as plane, network.plane(KEYS[1].peer_id) as other:
        member = gossip_of(plane, KEYS[0], clock)
        member.set_offer(offer_of(KEYS[0]), at_once=True)
        later = replace(
            offer_of(KEYS[0]),
            incarnation=INCARNATION - 10_000_000_000,
            sequence=1,
            issued_ms=NOW_MS + 60_000,
            expires_ms=NOW_MS + 90_000,
        )
        with pytest.raises(ExceptionGroup) as caught:
            async with TaskScope() as tasks:
                running = tasks.create_task(member.run())
                with member.subscription() as changes:
                    await changes.get()
                await other.connect(plane.multiaddrs[0])
                data = seal_offer(KEYS[0], later, "net-1").SerializeToString()
                await other.publish(offers_topic("net-1", MODEL), data)
                await running
        assert caught.group_contains(ConfigError, match="share the identity")
