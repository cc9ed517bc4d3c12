"""One connection to each peer: which of two stays, and what ends with it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, cast

import pytest
import trio
import trio.testing
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID

from plait.net.libp2p_links import TOGETHER_S, Links, replaces

LESSER, GREATER = sorted(
    (ID.from_pubkey(create_new_key_pair(bytes([n] * 32)).public_key) for n in (1, 2)),
    key=lambda peer: peer.to_bytes(),
)


@dataclass(eq=False)
class FakeMuxed:
    peer_id: ID
    is_initiator: bool
    is_closed: bool = False


@dataclass(eq=False)
class FakeConnection:
    muxed_conn: FakeMuxed

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.muxed_conn.is_closed = True


@dataclass
class FakeHost:
    """A host whose table of connections the test fills; streams to the other end never open."""

    me: ID
    table: list[FakeConnection] = field(default_factory=list)

    def get_id(self) -> ID:
        return self.me

    def get_network(self) -> "FakeHost":
        return self

    def register_notifee(self, notifee: Links) -> None: ...

    def remove_conn(self, connection: FakeConnection) -> None:
        self.table.remove(connection)

    async def new_stream(self, peer: ID, protocols: list[str]) -> None:
        await trio.sleep_forever()


@dataclass
class FakePubsub:
    gossiping: set[ID] = field(default_factory=set)
    refuses: bool = False
    stream_failed: Callable[[Any], None] = lambda muxed: None

    async def begin(self, peer: ID) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise SwarmException("no such protocol")
        self.gossiping.add(peer)

    def end(self, peer: ID) -> None:
        self.gossiping.discard(peer)


class End:
    """One end: its links, and what they reported."""

    def __init__(self, me: ID, other: ID) -> None:
        self.host, self.pubsub = FakeHost(me), FakePubsub()
        self.other = other
        self.now_s = 0.0
        self.reports: list[bool] = []
        self.links = Links(
            cast(Any, self.host),
            cast(Any, self.pubsub),
            lambda peer, linked: self.reports.append(linked),
            clock=lambda: self.now_s,
        )

    async def connect(self, *, dialled: bool) -> FakeConnection:
        connection = FakeConnection(FakeMuxed(self.other, is_initiator=dialled))
        self.host.table.append(connection)
        await self.links.connected(cast(Any, self.host), cast(Any, connection))
        await trio.testing.wait_all_tasks_blocked()
        return connection


async def _in_nursery(check: Callable[[End], Awaitable[None]], me: ID, other: ID) -> None:
    async with trio.open_nursery() as nursery:
        end = End(me, other)
        end.links.start(nursery)
        await check(end)
        nursery.cancel_scope.cancel()


def at(check: Callable[[End], Awaitable[None]], me: ID = LESSER, other: ID = GREATER) -> None:
    trio.run(_in_nursery, check, me, other)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
@pytest.mark.parametrize("lesser", [True, False])
def test_of_crossed_dials_both_ends_keep_the_lessers(
    order: tuple[bool, bool], lesser: bool
) -> None:
    async def check(end: End) -> None:
        made = {dialled: await end.connect(dialled=dialled) for dialled in order}
        assert end.host.table == [made[lesser]]
        assert made[not lesser].muxed_conn.is_closed
        assert end.reports[-1]
        assert end.pubsub.gossiping == {end.other}

    at(check, *((LESSER, GREATER) if lesser else (GREATER, LESSER)))


@pytest.mark.parametrize(("lesser", "dialled"), list(product([True, False], repeat=2)))
def test_a_peer_that_dials_again_has_lost_its_older_link(lesser: bool, dialled: bool) -> None:
    async def check(end: End) -> None:
        await end.connect(dialled=dialled)
        end.now_s += TOGETHER_S + 1
        again = await end.connect(dialled=False)
        assert end.host.table == [again]
        assert end.reports == [True, False, True]

    at(check, *((LESSER, GREATER) if lesser else (GREATER, LESSER)))


def test_what_ends_elsewhere_leaves_the_link() -> None:
    async def check(end: End) -> None:
        old = await end.connect(dialled=True)
        new = await end.connect(dialled=True)
        await end.links.disconnected(cast(Any, end.host), cast(Any, old))
        end.pubsub.stream_failed(old.muxed_conn)
        assert end.host.table == [new]
        assert end.reports == [True, False, True]
        end.pubsub.stream_failed(new.muxed_conn)
        assert end.host.table == []
        assert end.reports[-1] is False
        assert end.pubsub.gossiping == set()

    at(check)


def test_a_peer_without_gossip_or_answers_is_dropped() -> None:
    async def check(end: End) -> None:
        end.pubsub.refuses = True
        await end.connect(dialled=True)
        assert (end.host.table, end.reports) == ([], [True, False])
        end.pubsub.refuses = False
        await end.connect(dialled=True)
        await trio.sleep(60)  # virtual: no stream opens within the time for it
        assert (end.host.table, end.reports) == ([], [True, False] * 2)

    trio.run(
        partial(_in_nursery, check, LESSER, GREATER),
        clock=trio.testing.MockClock(autojump_threshold=0),
    )


def test_hanging_up_closes_all() -> None:
    async def check(end: End) -> None:
        made = await end.connect(dialled=True)
        await end.links.hang_up()
        assert made.muxed_conn.is_closed
        assert end.reports == [True, False]

    at(check)


@pytest.mark.parametrize("age_s", [0.0, TOGETHER_S, TOGETHER_S + 0.1])
def test_the_same_dialler_again_always_replaces(age_s: float) -> None:
    for lesser in (True, False):
        assert replaces(age_s=age_s, old_is_lesser=lesser, new_is_lesser=lesser)
