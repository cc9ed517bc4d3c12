"""Whom a session avoids, and for how long. Pure.

Only this session avoids them: one bad session never bans a peer for others. A peer that
starts again (a new incarnation) is a new peer.
"""

from dataclasses import dataclass, field
from typing import Literal

from plait.router.view import View
from plait.types import PeerId

Kind = Literal["gone", "refused", "slow", "leaving"]
"""It did not answer or broke a rule; it said no; it is far slower than it said; it drains."""

AVOID_MS = {"gone": 2_000, "refused": 400, "slow": 60_000, "leaving": 600_000}
"""A peer that is really gone leaves the view meanwhile; one that refused may not any more."""


@dataclass(slots=True)
class Suspects:
    """Peers to avoid, by incarnation."""

    _entries: dict[PeerId, tuple[Kind, int, int]] = field(default_factory=dict)

    def add(self, peer: PeerId, kind: Kind, incarnation: int, now_ms: int) -> None:
        """Avoid a peer from now on."""
        self._entries[peer] = (kind, incarnation, now_ms + AVOID_MS[kind])

    def kind(self, peer: PeerId) -> Kind | None:
        """Why a peer was last avoided."""
        entry = self._entries.get(peer)
        return entry[0] if entry is not None else None

    def avoided(self, view: View, now_ms: int, *, also_slow: bool = True) -> frozenset[PeerId]:
        """The peers to leave out; without ``also_slow`` those that are merely slow may serve."""
        return frozenset(
            peer
            for peer, (kind, incarnation, until_ms) in self._entries.items()
            if now_ms < until_ms
            and (also_slow or kind != "slow")
            and (peer not in view.offers or view.offers[peer].incarnation == incarnation)
        )
