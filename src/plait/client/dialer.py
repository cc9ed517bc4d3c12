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


@dataclass(slots=True)
class Dialer:
    """Opens channels for one account on one network."""

    account: Account
    network_id: str
    clock_ms: Callable[[], int]
    _greeted: dict[PeerId, tuple[int, int]] = field(default_factory=dict)
    _unary: dict[PeerId, tuple[str, grpc.aio.Channel]] = field(default_factory=dict)

    def link_channel(self, offer: Offer) -> grpc.aio.Channel:
        """A new channel for a Link; the Link owns and closes it."""
        return channel(offer.peer_address, offer.certificate, self.account.tls)

    def peer_channel(self, offer: Offer) -> grpc.aio.Channel:
        """The shared channel to a node's peer port, for single calls."""
        address, cached = self._unary.get(offer.peer, ("", None))
        if cached is None or address != offer.peer_address:
            cached = channel(offer.peer_address, offer.certificate, self.account.tls)
            self._unary[offer.peer] = (offer.peer_address, cached)
        return cached

    async def greet(self, offer: Offer) -> None:
        """Register our certificate with a node; raises ``PeerUnreachable``."""
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
        """Greet this peer again before the next call: it may have let go of our certificate."""
        self._greeted.pop(peer, None)

    async def close(self) -> None:
        """Close the shared channels."""
        channels = [cached for _, cached in self._unary.values()]
        self._unary.clear()
        await asyncio.gather(*(cached.close() for cached in channels))
