"""A view of the network without libp2p: from nodes' public ports, believing none of them.

Several bootstrap nodes are watched at once; each envelope passes the same membership rules
as on a node, so a lying directory can at most withhold. Links are measured by ourselves,
which also tells us at once when a peer stops answering.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from plait.errors import PeerUnreachable
from plait.logs import get_logger
from plait.net.links import LinkMeter, Target
from plait.net.membership import Membership
from plait.net.tls import channel, is_address
from plait.network_file import Bootstrap, NetworkFile
from plait.router.view import View
from plait.task_scope import TaskScope
from plait.types import PeerId
from plait.v1 import offer_pb2, offer_pb2_grpc
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

DIRECTORIES_MAX = 4
SETTLE_TIMEOUT_S = 3.0
RETRY_S = 0.5
_EXPIRY_PERIOD_S = 1.0


def targets_of(view: View, besides: PeerId) -> list[Target]:
    """Whom to measure: every peer with an offer that can be dialled."""
    return [
        Target(peer, offer.incarnation, offer.public_address, offer.certificate)
        for peer, offer in view.offers.items()
        if peer != besides and is_address(offer.public_address)
    ]


class NetworkWatch:
    """What a client knows of a network; an async context manager."""

    def __init__(
        self, network: NetworkFile, me: PeerId, clock_ms: Callable[[], int] | None = None
    ) -> None:
        self._network = network
        self._me = me
        self._clock_ms = clock_ms or _clock_ms
        self._membership = Membership(network)
        self._meter = LinkMeter(
            self._targets, self._down, time.monotonic, lambda target: self._changed.set()
        )
        self._scope = TaskScope()
        self._changed = asyncio.Event()
        self._snapshots: set[PeerId] = set()
        self._failed: dict[PeerId, str] = {}

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        for node in self._network.bootstrap[:DIRECTORIES_MAX]:
            self._scope.create_task(self._follow(node), name=f"directory {node.peer}")
        self._scope.create_task(self._meter.run(), name="link meter")
        self._scope.create_task(self._expire_forever(), name="offer expiry")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._scope.__aexit__(kind, error, traceback)

    def view(self) -> View:
        """Valid offers, others' link reports, and our own measurements."""
        known = self._membership.view()
        ours = {(self._me, peer): rtt_us for peer, rtt_us in self._meter.rtts_us().items()}
        return View(known.offers, {**known.rtt_us, **ours}, known.bandwidth)

    def envelopes(self) -> Sequence[SignedEnvelope]:
        """The signed offers and link reports of the view."""
        return self._membership.envelopes()

    def check_reachable(self) -> None:
        """Raise ``PeerUnreachable`` when no bootstrap node answers and nothing is known."""
        nodes = self._network.bootstrap[:DIRECTORIES_MAX]
        if self.view().offers or len(self._failed) < len(nodes):
            return
        reasons = (f"{n.public_address}: {_last_part(self._failed[n.peer])}" for n in nodes)
        raise PeerUnreachable(
            f"no bootstrap node of the network answers ({', '.join(reasons) or 'none is named'})",
            remedy="plait testnet status, or check the addresses with: plait net show",
        )

    async def changed(self) -> None:
        """Return after the next change."""
        self._changed.clear()
        await self._changed.wait()

    async def settled(self) -> None:
        """Return once a directory has answered and every peer it named is measured.

        Gives up waiting after 3 s; returns at once when it was so before.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                while not self._is_settled():
                    await self.changed()

    def _is_settled(self) -> bool:
        nodes = self._network.bootstrap[:DIRECTORIES_MAX]
        if len(self._failed) == len(nodes):
            return True
        measured = self._meter.rtts_us()
        return bool(self._snapshots) and all(t.peer in measured for t in self._targets())

    def _targets(self) -> list[Target]:
        return targets_of(self._membership.view(), self._me)

    def _down(self, target: Target, reason: str) -> None:
        log.info("peer down", peer=target.peer, reason=reason)
        self._membership.peer_down(target.peer, target.incarnation)
        self._changed.set()

    async def _follow(self, node: Bootstrap) -> None:
        while True:
            try:
                async with channel(node.public_address, node.certificate) as public:
                    stub = offer_pb2_grpc.DirectoryServiceStub(public)
                    async for message in stub.Watch(offer_pb2.WatchRequest()):
                        await self._take(node.peer, message)
            except grpc.aio.AioRpcError as error:
                log.info("directory lost", peer=node.peer, reason=error.details())
                self._failed[node.peer] = error.details() or error.code().name
                self._changed.set()
            await asyncio.sleep(RETRY_S)

    async def _take(self, source: PeerId, message: offer_pb2.WatchResponse) -> None:
        self._failed.pop(source, None)
        for envelope in message.envelopes:
            verdict = self._membership.handle_envelope(envelope, self._clock_ms(), source)
            if verdict.outcome == "reject":
                log.info("a directory sent a bad offer", peer=source, reason=verdict.reason)
        if message.snapshot:
            self._snapshots.add(source)
            await self._meter.measure_once()
        self._changed.set()

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_PERIOD_S)
            if self._membership.expire(self._clock_ms()):
                self._changed.set()


def _last_part(details: str) -> str:
    """gRPC lists every attempt; the cause stands last."""
    return details.rpartition(": ")[2]


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
