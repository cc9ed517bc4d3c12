"""Channels to nodes: pinned, cached, and introduced by Hello before the peer port is used."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from plait.client.account import Account
from plait.errors import PeerUnreachable
from plait.net.tls import channel, make_channel_cert
from plait.router.view import Offer
from plait.types import PeerId
from plait.v1 import offer_pb2, offer_pb2_grpc

HELLO_TTL_MS = 3_600_000
HELLO_TIMEOUT_S = 3.0
RETIRED_MS = 10_000


@dataclass(slots=True)
class Dialer:
    """Opens channels for one account on one network."""

    account: Account
    network_id: str
    clock_ms: Callable[[], int]
    _greeted: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    _unary: dict[PeerId, tuple[str, int, grpc.aio.Channel]] = field(default_factory=dict)
    _retired: list[tuple[int, grpc.aio.Channel]] = field(default_factory=list)
    """Channels no longer used, and when they may be closed: calls may still be under way."""

    def link_channel(self, offer: Offer) -> grpc.aio.Channel:
        """A new channel for a Link; the Link owns and closes it."""
        return channel(offer.peer_address, offer.certificate, self.account.tls)

    def peer_channel(self, offer: Offer) -> grpc.aio.Channel:
        """The shared channel to a node's peer port, for single calls.

        A node that started again gets a new one: the old one waits ever longer between its
        attempts to connect, and fails every call meanwhile.
        """
        address, incarnation, cached = self._unary.get(offer.peer, ("", 0, None))
        if cached is None or (address, incarnation) != (offer.peer_address, offer.incarnation):
            if cached is not None:
                self._retire(cached)
            cached = channel(offer.peer_address, offer.certificate, self.account.tls)
            self._unary[offer.peer] = (offer.peer_address, offer.incarnation, cached)
        return cached

    def is_connected(self, offer: Offer) -> bool:
        """Whether a call to this life of a node needs no new connection."""
        _, incarnation, _ = self._unary.get(offer.peer, ("", 0, None))
        return incarnation == offer.incarnation == self._greeted.get(offer.peer, (0, 0))[0]

    async def greet(self, offer: Offer) -> None:
        """Register our certificate with a node; raises ``PeerUnreachable``."""
        await self._close_retired()
        incarnation, expires_ms = self._greeted.get(offer.peer, (0, 0))
        if incarnation == offer.incarnation and expires_ms > self.clock_ms() + 60_000:
            return
        cert = make_channel_cert(
            self.account.peer_key, self.account.tls, self.network_id, self.clock_ms(), HELLO_TTL_MS
        )
        async with channel(offer.public_address, offer.certificate) as public:
            stub = offer_pb2_grpc.DirectoryServiceStub(public)
            try:
                response = await stub.Hello(
                    offer_pb2.HelloRequest(channel_cert=cert), timeout=HELLO_TIMEOUT_S
                )
            except grpc.aio.AioRpcError as error:
                raise PeerUnreachable(f"{offer.peer}: {error.details()}") from error
        self._greeted[offer.peer] = (offer.incarnation, response.expires_ms)

    def forget(self, peer: PeerId) -> None:
        """Connect and greet anew before the next call: the peer may have let go of us."""
        self._greeted.pop(peer, None)
        forgotten = self._unary.pop(peer, None)
        if forgotten is not None:
            self._retire(forgotten[2])

    def _retire(self, unused: grpc.aio.Channel) -> None:
        self._retired.append((self.clock_ms() + RETIRED_MS, unused))

    async def _close_retired(self) -> None:
        due = [one for due_ms, one in self._retired if due_ms <= self.clock_ms()]
        self._retired = [(due_ms, one) for due_ms, one in self._retired if one not in due]
        await asyncio.gather(*(one.close() for one in due))

    async def close(self) -> None:
        """Close the shared channels."""
        channels = [cached for _, _, cached in self._unary.values()]
        channels += [unused for _, unused in self._retired]
        self._unary.clear()
        self._retired.clear()
        await asyncio.gather(*(cached.close() for cached in channels))
