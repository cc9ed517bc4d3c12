"""One connection to each peer, watched by pings, and gossip begun anew with each.

py-libp2p keeps every connection, whoever dialled it, lets each stream choose among them, and
ends gossip with a peer when any one stream to it fails. Two peers that dial each other at
once, or again after one of them hung, then close each other's for minutes. Here a second
connection takes the place of the first or is closed, by a rule that both ends follow, and a
connection that ends takes the gossip over it along.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.abc import IHost, INetConn, INetStream, INetwork, INotifee
from libp2p.host.ping import ID as PING
from libp2p.host.ping import perform_ping_roundtrip
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from plait.logs import get_logger
from plait.net.bridge import describe
from plait.net.libp2p_gossip import GuardedPubsub

log = get_logger(__name__)

PING_INTERVAL_S = 1.0
PING_TIMEOUT_S = 1.8
GREETING_TIMEOUT_S = 3.0
CLOSE_TIMEOUT_S = 0.5
TOGETHER_S = 5.0
"""Connections made within this time may come from dials that crossed."""


@dataclass(eq=False, slots=True)
class Link:
    """The connection that counts, and the tasks that live as long as it does."""

    peer: ID
    connection: INetConn
    since_s: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


def replaces(*, age_s: float, old_is_lesser: bool, new_is_lesser: bool) -> bool:
    """Whether a new connection takes the place of a live one that is ``age_s`` old.

    ``…_is_lesser``: whether the peer with the lesser id dialled it. Both ends see the same two
    connections of crossed dials, and both keep the lesser's. A peer that dials although it
    has an older link has lost that link, as after a hang of ours.
    """
    return age_s > TOGETHER_S or new_is_lesser or not old_is_lesser


class Links(INotifee):
    """All links of a host; ``report(peer, linked)`` is told of each that comes or goes."""

    def __init__(
        self,
        host: IHost,
        pubsub: GuardedPubsub,
        report: Callable[[ID, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host = host
        self._network: Any = host.get_network()
        self._pubsub = pubsub
        self._report = report
        self._clock = clock
        self._held: dict[ID, Link] = {}
        self._nursery: trio.Nursery

    def start(self, nursery: trio.Nursery) -> None:
        """Take all connections of the host, each in tasks of ``nursery``."""
        self._nursery = nursery
        self._pubsub.stream_failed = self._ended
        self._network.register_notifee(self)

    async def hang_up(self) -> None:
        """Close all; a host that is only cancelled leaves its peers waiting."""
        async with trio.open_nursery() as nursery:
            for link in list(self._held.values()):
                self._drop(link, nursery)

    def close_sockets(self) -> None:
        """Close what the end of the host would leave open."""
        for connection in self._network.get_connections():
            close_socket(connection)

    async def connected(self, network: INetwork, conn: INetConn) -> None:
        """Take the connection as the link of its peer, or close it."""
        peer = conn.muxed_conn.peer_id
        link = self._held.get(peer)
        if link is not None:
            age_s = self._clock() - link.since_s
            keeps = link.connection.muxed_conn.is_closed or replaces(
                age_s=age_s,
                old_is_lesser=self._is_lesser(link.connection),
                new_is_lesser=self._is_lesser(conn),
            )
            if not keeps:
                self._retire(conn, self._nursery)
                return
            self._drop(link, self._nursery)
        link = self._held[peer] = Link(peer, conn, self._clock())
        self._report(peer, True)
        self._nursery.start_soon(self._watch, link)

    async def disconnected(self, network: INetwork, conn: INetConn) -> None:
        """Drop the link if this was its connection."""
        close_socket(conn)
        self._ended(conn.muxed_conn)

    async def opened_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def closed_stream(self, network: INetwork, stream: INetStream) -> None: ...

    async def listen(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    async def listen_close(self, network: INetwork, multiaddr: Multiaddr) -> None: ...

    def _is_lesser(self, connection: INetConn) -> bool:
        ours = self._host.get_id().to_bytes() < connection.muxed_conn.peer_id.to_bytes()
        return ours == bool(connection.muxed_conn.is_initiator)

    async def _watch(self, link: Link) -> None:
        """Begin gossip and ping; libp2p itself never notices a link that fell silent."""
        with link.scope:
            try:
                with trio.fail_after(GREETING_TIMEOUT_S):
                    await self._pubsub.begin(link.peer)
                with trio.fail_after(PING_TIMEOUT_S):
                    stream = await self._host.new_stream(link.peer, [PING])
                while True:
                    with trio.fail_after(PING_TIMEOUT_S):
                        await perform_ping_roundtrip(stream)
                    await trio.sleep(PING_INTERVAL_S)
            except Exception as error:  # noqa: BLE001 - whatever failed, a new link is due
                log.info("libp2p.link_dead", peer=str(link.peer), error=describe(error))
            self._drop(link, self._nursery)

    def _ended(self, muxed_conn: Any) -> None:
        link = self._held.get(muxed_conn.peer_id)
        if link is not None and link.connection.muxed_conn is muxed_conn:
            self._drop(link, self._nursery)

    def _drop(self, link: Link, nursery: trio.Nursery) -> None:
        if self._held.get(link.peer) is not link:
            return
        del self._held[link.peer]
        self._retire(link.connection, nursery)
        self._pubsub.end(link.peer)
        self._report(link.peer, False)
        link.scope.cancel()

    def _retire(self, connection: INetConn, nursery: trio.Nursery) -> None:
        # Out of the host's table at once: no stream may choose it while it closes.
        self._network.remove_conn(connection)
        nursery.start_soon(_close, connection)


async def _close(connection: INetConn) -> None:
    with trio.move_on_after(CLOSE_TIMEOUT_S), contextlib.suppress(Exception):
        await connection.close()
    close_socket(connection)


def close_socket(connection: INetConn) -> None:
    """Close what libp2p leaves open when the other end closed, or takes no more bytes."""
    if getattr(connection, "_shared_muxed_conn", False):  # a second wrapper of a live one
        return
    layer: Any = getattr(connection.muxed_conn, "secured_conn", None)
    for name in ("conn", "conn", "stream", "stream"):
        layer = getattr(layer, name, None)
    if isinstance(layer, trio.SocketStream):
        layer.socket.close()
