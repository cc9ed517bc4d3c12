"""What a session knows while it looks for a way on after trouble. Pure.

It notes who answered the closing of the epoch, whom to leave out, and since when; it names
the stage that holds an unanswered frame; and it asks the router for the next route.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from plait.client.actions import EpochClosed
from plait.client.epoch import Epoch
from plait.client.reroute import Asked, Survivor, plan_again
from plait.client.suspects import Kind, Suspects
from plait.errors import NoRoute
from plait.router.plan import Plan
from plait.router.view import View
from plait.types import PeerId


@dataclass(slots=True)
class Recovery:
    """One session's troubles. ``since_ms`` is None while all is well."""

    suspects: Suspects = field(default_factory=Suspects)
    excluded: set[PeerId] = field(default_factory=set)
    states: dict[PeerId, EpochClosed] = field(default_factory=dict)
    since_ms: int | None = None
    reason: str = ""

    def begin(self, epoch: Epoch, blamed: Mapping[PeerId, Kind], reason: str, now_ms: int) -> None:
        """The epoch cannot go on; without blame, whoever answers is fine."""
        if self.since_ms is None:
            self.since_ms = now_ms
        self.reason = reason
        self.states = {}
        self.excluded = set()
        for peer, kind in blamed.items():
            self.exclude(epoch, peer, kind, now_ms)

    def exclude(self, epoch: Epoch, peer: PeerId, kind: Kind, now_ms: int) -> None:
        """Go on without this peer."""
        self.excluded.add(peer)
        self.suspects.add(peer, kind, epoch.incarnation(peer), now_ms)

    def progressed(self) -> None:
        """A result came: the trouble is over."""
        self.since_ms = None

    def lasted_ms(self, now_ms: int) -> int:
        """How long no result has come; 0 while all is well."""
        return 0 if self.since_ms is None else now_ms - self.since_ms

    def stuck(self, epoch: Epoch, traversal: int) -> PeerId | None:
        """The first stage that has not passed a frame on, if all have answered."""
        for peer in epoch.peers:
            state = self.states.get(peer)
            if state is None:
                return None
            if min(state.traversals_received, state.traversals_sent) <= traversal:
                return peer
        return None

    def route(
        self, epoch: Epoch, asked: Asked, view: View, now_ms: int, *, confirmed: bool
    ) -> tuple[Plan, list[Survivor]]:
        """The way on, and who stays; raises ``NoRoute``.

        A stage that is merely slow is left out only if the rest can do without it.
        """
        survivors = self.survivors(epoch, confirmed=confirmed, slow=False)
        try:
            return self._route(epoch, asked, view, now_ms, survivors, slow=False), survivors
        except NoRoute:
            survivors = self.survivors(epoch, confirmed=confirmed, slow=True)
            return self._route(epoch, asked, view, now_ms, survivors, slow=True), survivors

    def route_without(
        self,
        epoch: Epoch,
        asked: Asked,
        view: View,
        now_ms: int,
        unwanted: Collection[PeerId],
        position: int,
    ) -> Plan:
        """The way on if some stages that still work were left; raises ``NoRoute``."""
        stages = tuple(zip(epoch.terms.stages, epoch.offers, strict=True))
        stay = [
            Survivor(stage, offer, position, position)
            for stage, offer in stages
            if stage.peer not in unwanted
        ]
        leave = [stage for stage, _ in stages if stage.peer in unwanted]
        avoid = self.suspects.avoided(view, now_ms) | frozenset(unwanted)
        return plan_again(asked, view, stay, avoid, leave[0].numeric_class, now_ms)

    def survivors(self, epoch: Epoch, *, confirmed: bool, slow: bool) -> list[Survivor]:
        """The stages that answered; with ``slow`` also those that are slow.

        A stage that was opened in an epoch that was never confirmed has nothing to keep.
        """
        return [
            Survivor(stage, offer, state.positions, state.retained)
            for stage, offer in zip(epoch.terms.stages, epoch.offers, strict=True)
            if (state := self.states.get(stage.peer)) is not None
            and (confirmed or stage.entered_epoch < epoch.number)
            and (stage.peer not in self.excluded or (slow and self._is_slow(stage.peer)))
        ]

    def _route(
        self,
        epoch: Epoch,
        asked: Asked,
        view: View,
        now_ms: int,
        survivors: list[Survivor],
        *,
        slow: bool,
    ) -> Plan:
        kept = {one.terms.peer for one in survivors}
        stages = epoch.terms.stages
        removed = [stage for stage in stages if stage.peer not in kept]
        avoid = self.suspects.avoided(view, now_ms, also_slow=not slow)
        numeric_class = (removed or stages)[0].numeric_class
        return plan_again(asked, view, survivors, avoid, numeric_class, now_ms)

    def _is_slow(self, peer: PeerId) -> bool:
        return self.suspects.kind(peer) == "slow"
