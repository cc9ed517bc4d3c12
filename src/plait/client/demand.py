"""What one client process may still ask of the network: retries, and who is busy. Pure.

All sessions of a client share one ``Demand``. Two rules keep a crowd of clients from making an
overload worse. Retries have a budget: over a window, openings are at most ``1 + RETRY_SHARE``
times the requests, and a few more so that a quiet client may try again at all (Finagle's
RetryBudget). And a stage that refused for want of capacity is not asked again before the time it
named: until then a request that needs it is refused here, at once and for nothing. Then one
opening asks again, the others wait for its answer; a stage that goes on refusing is asked less
and less often. A session that ends there makes room for one, without waiting.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from plait.router.request import RouteRequest
from plait.router.view import View
from plait.types import Digest, PeerId, Qos

WINDOW_MS = 60_000
RETRY_SHARE = 0.1
RETRIES_FREE = 10
"""Per window, whatever the number of requests."""
BUSY_MS_MIN = 100
BUSY_MS_MAX = 10_000
"""However long a stage says: it is only its word."""
BACKOFF_MS_MAX = 2_000
ASKING_MS = 5_000
"""An opening that asks whether a stage is still busy has an answer by then."""
SHORT_MS = 10_000
ROUTE_LOST_MS = 20_000
"""So long after there was a route another is waited for: a host that fell out of view because its
pings went missing is back with its next offer, which it makes every 15 s."""
MODELS_MAX = 256
PEERS_MAX = 4096
REQUESTS_MAX = 65_536
"""Of a window; more are counted as so many."""

Place = tuple[PeerId, Qos]
"""A stage refuses each class on its own."""


@dataclass(slots=True)
class _Busy:
    """A stage that refused: when to ask again, and how many sessions ended there since."""

    until_ms: int
    refusals: int = 1
    freed: int = 0
    asked: bool = False
    """Whether an opening is out to see if it is still busy."""


@dataclass(slots=True)
class Demand:
    """One client process's requests and what became of them."""

    _requests: deque[int] = field(default_factory=lambda: deque(maxlen=REQUESTS_MAX))
    _retries: deque[int] = field(default_factory=lambda: deque(maxlen=REQUESTS_MAX))
    _busy: dict[Place, _Busy] = field(default_factory=dict)
    _routed_ms: dict[Digest, int] = field(default_factory=dict)
    _used_ms: dict[PeerId, int] = field(default_factory=dict)

    def request(self, now_ms: int) -> None:
        """A request begins: its first opening is free."""
        self._forget(now_ms)
        self._requests.append(now_ms)

    def may_retry(self, now_ms: int) -> bool:
        """Whether another opening for the same request fits the budget; takes it if so."""
        self._forget(now_ms)
        if len(self._retries) >= RETRIES_FREE + int(RETRY_SHARE * len(self._requests)):
            return False
        self._retries.append(now_ms)
        return True

    def routed(self, model: Digest, peers: Iterable[PeerId], now_ms: int) -> None:
        """There is a route for a model, over these peers."""
        if len(self._routed_ms) >= MODELS_MAX:
            self._routed_ms.clear()
        self._routed_ms[model] = now_ms
        if len(self._used_ms) >= PEERS_MAX:
            self._used_ms.clear()
        self._used_ms.update(dict.fromkeys(peers, now_ms))

    def was_routed(self, model: Digest, now_ms: int) -> bool:
        """Whether there was a route for a model a moment ago."""
        routed_ms = self._routed_ms.get(model)
        return routed_ms is not None and now_ms < routed_ms + ROUTE_LOST_MS

    def misses(self, request: RouteRequest, view: View, now_ms: int) -> bool:
        """Whether a peer that the request's rules allow was in a route a moment ago and has
        fallen out of view: then its absence, and not the rules, may be in the way."""
        return any(
            now_ms < used_ms + ROUTE_LOST_MS
            and peer not in view.offers
            and peer not in request.ignore
            and (not request.only or peer in request.only)
            for peer, used_ms in self._used_ms.items()
        )

    def busy(self, qos: Qos, now_ms: int) -> dict[PeerId, int]:
        """The peers not to be asked yet, and in how many milliseconds they may be."""
        return {
            peer: busy.until_ms - now_ms
            for (peer, of), busy in self._busy.items()
            if of == qos and now_ms < busy.until_ms and not busy.freed
        }

    def is_short(self, now_ms: int) -> bool:
        """Whether some stage refused for want of capacity a moment ago."""
        return any(now_ms < busy.until_ms + SHORT_MS for busy in self._busy.values())

    def asking(self, peers: Iterable[PeerId], qos: Qos, now_ms: int) -> None:
        """An opening goes out: it takes the place of one that ended, or asks for all."""
        for busy in self._those(peers, qos):
            if busy.freed:
                busy.freed -= 1
            else:
                busy.asked, busy.until_ms = True, now_ms + ASKING_MS

    def taken(self, peers: Iterable[PeerId], qos: Qos) -> None:
        """The stages took a session: who was asked is busy no more, and nobody goes on refusing."""
        self._settle(peers, qos)
        for busy in self._those(peers, qos):
            busy.refusals = 0

    def let_go(self, peers: Iterable[PeerId], qos: Qos) -> None:
        """An opening failed for another reason: these can be asked again."""
        self._settle(peers, qos)

    def refused(self, peer: PeerId, qos: Qos, retry_after_ms: int, now_ms: int) -> None:
        """A stage refused for want of capacity, until later."""
        before = self._busy.get((peer, qos))
        refusals = 1 if before is None else before.refusals + 1
        backoff_ms = min(BUSY_MS_MIN << min(refusals, 16), BACKOFF_MS_MAX)
        named_ms = min(max(retry_after_ms, BUSY_MS_MIN), BUSY_MS_MAX)
        self._busy[peer, qos] = _Busy(now_ms + max(named_ms, backoff_ms), refusals)

    def ended(self, peers: Iterable[PeerId], qos: Qos) -> None:
        """A session ended there: there is room for another."""
        for busy in self._those(peers, qos):
            busy.freed += 1

    def _those(self, peers: Iterable[PeerId], qos: Qos) -> list[_Busy]:
        return [self._busy[peer, qos] for peer in peers if (peer, qos) in self._busy]

    def _settle(self, peers: Iterable[PeerId], qos: Qos) -> None:
        for peer in peers:
            busy = self._busy.get((peer, qos))
            if busy is not None and busy.asked:
                del self._busy[peer, qos]

    def _forget(self, now_ms: int) -> None:
        """Drop what is older than the window."""
        for times in (self._requests, self._retries):
            while times and times[0] <= now_ms - WINDOW_MS:
                times.popleft()
        old = [place for place, busy in self._busy.items() if busy.until_ms + WINDOW_MS < now_ms]
        for place in old:
            del self._busy[place]
