"""One request at work: a session and, if it is hedged and its first token is late, a second.

The rules are production's (``client.hedging``: when, with whom, who answers); this performs
them as ``client.hedged`` does: the loser is cancelled, and the request is over once both ended.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from plait.client.actions import Failed, Finished
from plait.client.demand import Demand
from plait.client.epoch import Order
from plait.client.hedging import HedgeBudget, Race, Side, has_room, late_after_s
from plait.client.reroute import Asked, plan_first
from plait.client.session import SessionCore
from plait.errors import PlaitError
from plait.router.plan import Plan
from plait.router.view import View
from plait.sim.engine import S
from plait.sim.host import Host
from plait.types import PeerId

Ended = Finished | Failed


class Session(Protocol):
    """A session of the simulated client."""

    core: SessionCore

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The stages of its pipeline."""

    def start(self) -> None:
        """Begin."""

    def cancel(self) -> None:
        """Nobody wants its answer any more."""

    def view_changed(self) -> None:
        """The view may have changed."""


Make = Callable[[Order, Callable[[int], None], Callable[[Ended], None]], Session]
"""Makes a session that tells of each token, and of its end."""


class Asking:
    """Runs one order. ``deliver`` takes the answer's tokens, ``over`` what came of it.

    ``share`` is ``Options.hedge_share``; ``view`` the client's, asked each time.
    """

    def __init__(
        self,
        host: Host,
        order: Order,
        make: Make,
        *,
        me: PeerId,
        view: Callable[[], View],
        demand: Demand,
        hedges: HedgeBudget,
        share: float,
        deliver: Callable[[int], None],
        over: Callable[[SessionCore, Ended], None],
    ) -> None:
        self._host, self._order, self._make = host, order, make
        self._asked = Asked(order.model, order.route, me)
        self._view, self._demand, self._hedges, self._share = view, demand, hedges, share
        self._deliver, self._over = deliver, over
        self._race = Race()
        self._running: dict[Side, Session] = {}
        self._outcome: tuple[SessionCore, Ended] | None = None
        self.cores: list[SessionCore] = []
        """Of every session begun for the request."""

    def start(self) -> None:
        """Ask the first pipeline."""
        tokens, now_ms = len(self._order.prompt_ids), self._host.now_ms()
        self._hedges.prompted(tokens, now_ms)
        plan = self._plan(frozenset()) if self._share else None
        if plan is not None:
            late_us = round(late_after_s(plan.predicted.ttft_s) * S)
            self._host.after(late_us, "", self._late)
        self._begin("first", self._order)

    def view_changed(self) -> None:
        """The view may have changed."""
        for session in tuple(self._running.values()):
            session.view_changed()

    def _begin(self, side: Side, order: Order) -> None:
        session = self._make(
            order, lambda token: self._came(side, token), lambda end: self._ended(side, end)
        )
        self._running[side] = session
        self.cores.append(session.core)
        session.start()

    def _plan(self, avoid: frozenset[PeerId]) -> Plan | None:
        try:
            return plan_first(self._asked, self._view(), avoid, self._host.now_ms())
        except PlaitError:
            return None

    def _late(self) -> None:
        if not self._race.undecided:
            return
        peers = frozenset(self._running["first"].peers)
        if self._race.late(allowed=bool(peers) and self._allowed(peers)):
            self._host.engine.note(f"{self._host.name}: hedged")
            route = replace(self._order.route, ignore=self._order.route.ignore | peers)
            self._begin("second", replace(self._order, route=route))

    def _allowed(self, peers: frozenset[PeerId]) -> bool:
        now_ms = self._host.now_ms()
        second = None if self._demand.is_short(now_ms) else self._plan(peers)
        tokens = len(self._order.prompt_ids)
        return (
            second is not None
            and has_room(second)
            and self._hedges.take(tokens, self._share, now_ms)
        )

    def _came(self, side: Side, token: int) -> None:
        self._cancel(self._race.came(side))
        if self._race.winner == side:
            self._deliver(token)

    def _ended(self, side: Side, end: Ended) -> None:
        session = self._running.pop(side)
        if self._outcome is None:
            decides, loser = self._race.ended(side, failed=isinstance(end, Failed))
            if decides:
                self._outcome = session.core, end
            self._cancel(loser)
        if self._outcome is not None and not self._running:
            self._over(*self._outcome)

    def _cancel(self, side: Side | None) -> None:
        if side is not None and side in self._running:
            self._running[side].cancel()
