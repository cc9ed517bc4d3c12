"""Round trips to peers, measured on their public ports; and who has stopped answering.

A dead process refuses connections at once, so two refusals in a row end it for us; mere
silence may be load and takes longer to believe. The figure kept for a link is the minimum
over a sliding window: queueing only ever adds.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from plait.net.tls import channel
from plait.task_scope import TaskScope
from plait.types import PeerId
from plait.v1 import offer_pb2, offer_pb2_grpc

PERIOD_S = 0.8
TIMEOUT_S = 1.0
WINDOW = 32
REFUSALS_MAX = 2
SILENCES_MAX = 4
CONCURRENT_MAX = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A peer to measure: its public address and pinned certificate (DER)."""

    peer: PeerId
    incarnation: int
    address: str
    certificate: bytes = field(repr=False)


@dataclass(slots=True)
class _Measured:
    target: Target
    channel: grpc.aio.Channel
    rtts_us: deque[int] = field(default_factory=lambda: deque(maxlen=WINDOW))
    refusals: int = 0
    silences: int = 0


class LinkMeter:
    """Measures every target once a period. Run ``run`` in a task of its own.

    ``on_down`` is called once when a target stops answering, with the reason; it is then
    measured again only as a new incarnation, or when ``targets`` drops and returns it.
    ``on_first`` is called when a target has answered for the first time.
    """

    def __init__(
        self,
        targets: Callable[[], Iterable[Target]],
        on_down: Callable[[Target, str], None],
        monotonic_s: Callable[[], float],
        on_first: Callable[[Target], None] = lambda target: None,
    ) -> None:
        self._targets = targets
        self._on_down = on_down
        self._monotonic_s = monotonic_s
        self._on_first = on_first
        self._measured: dict[PeerId, _Measured] = {}
        self._limit = asyncio.Semaphore(CONCURRENT_MAX)
        # Closing a channel cancels who pings over it: one round at a time.
        self._round = asyncio.Lock()

    def rtt_us(self, peer: PeerId) -> int | None:
        """The smallest round trip in the window, microseconds; None if none was measured."""
        measured = self._measured.get(peer)
        return min(measured.rtts_us) if measured and measured.rtts_us else None

    def rtts_us(self) -> dict[PeerId, int]:
        """Every link measured."""
        return {p: min(m.rtts_us) for p, m in self._measured.items() if m.rtts_us}

    async def run(self) -> None:
        """Measure for ever."""
        try:
            while True:
                started_s = self._monotonic_s()
                await self.measure_once()
                await asyncio.sleep(max(0.05, PERIOD_S - (self._monotonic_s() - started_s)))
        finally:
            await self.close()

    async def measure_once(self) -> None:
        """Measure every target once."""
        async with self._round, TaskScope() as tasks:
            await self._reconcile()
            pings = [tasks.create_task(self._ping(m)) for m in tuple(self._measured.values())]
            await asyncio.gather(*pings)

    async def close(self) -> None:
        """Close every channel."""
        while self._measured:
            _, measured = self._measured.popitem()
            await measured.channel.close()

    async def _reconcile(self) -> None:
        wanted = {target.peer: target for target in self._targets()}
        for peer, measured in tuple(self._measured.items()):
            if wanted.get(peer) != measured.target:
                del self._measured[peer]
                await measured.channel.close()
        for peer, target in wanted.items():
            if peer not in self._measured:
                pinned = channel(target.address, target.certificate)
                self._measured[peer] = _Measured(target, pinned)

    async def _ping(self, measured: _Measured) -> None:
        stub = offer_pb2_grpc.DirectoryServiceStub(measured.channel)
        async with self._limit:
            try:
                if not measured.rtts_us:
                    # The first call connects: its time is not the link's.
                    await stub.Probe(offer_pb2.ProbeRequest(), timeout=TIMEOUT_S)
                started_s = self._monotonic_s()
                await stub.Probe(offer_pb2.ProbeRequest(), timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                self._failed(measured, error)
                return
        measured.refusals = measured.silences = 0
        is_first = not measured.rtts_us
        measured.rtts_us.append(max(1, round((self._monotonic_s() - started_s) * 1e6)))
        if is_first:
            self._on_first(measured.target)

    def _failed(self, measured: _Measured, error: grpc.aio.AioRpcError) -> None:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            measured.silences += 1
        else:
            measured.refusals += 1
        down = measured.refusals >= REFUSALS_MAX or measured.silences >= SILENCES_MAX
        if down and self._measured.get(measured.target.peer) is measured:
            self._on_down(measured.target, f"{error.code().name}: {error.details()}")
