"""When a prompt is asked of a second pipeline too, and which of the two answers. Pure.

A request whose first token is late is given once more, with the same seed, to stages that have
no part in the first (hedged requests: Dean and Barroso, The Tail at Scale, CACM 2013). Whoever
delivers the first token answers alone; the other is cancelled, and paid for what it had
receipted. Hedges cost at most a share of the prompt tokens, and none is made while the network
is short of room: then they would make it worse.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from plait.router.plan import Plan

Side = Literal["first", "second"]

WINDOW_MS = 300_000
NOTES_MAX = 65_536
LATE_FACTOR = 2.0
"""A first token is late after so many times the predicted time."""
LATE_S_MIN = 0.05
ROOM_SHARE = 0.5
"""Every stage of the second pipeline has at least this part of its KV cache free."""


def late_after_s(predicted_ttft_s: float) -> float:
    """How long to wait for the first token before asking a second pipeline, seconds."""
    return max(LATE_S_MIN, LATE_FACTOR * predicted_ttft_s)


def has_room(plan: Plan) -> bool:
    """Whether the stages of a second pipeline have little to do, as far as they say."""
    return all(
        stage.offer.kv_tokens_free >= ROOM_SHARE * stage.offer.kv_tokens_total
        for stage in plan.stages
    )


@dataclass(slots=True)
class HedgeBudget:
    """One client process's prompt tokens of the last five minutes, and those asked twice."""

    _asked: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=NOTES_MAX))
    _again: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=NOTES_MAX))

    def prompted(self, tokens: int, now_ms: int) -> None:
        """A request with so many prompt tokens begins."""
        self._asked.append((now_ms, tokens))

    def take(self, tokens: int, share: float, now_ms: int) -> bool:
        """Whether a hedge of so many tokens keeps within ``share``; spends it if so."""
        for notes in (self._asked, self._again):
            while notes and notes[0][0] <= now_ms - WINDOW_MS:
                notes.popleft()
        asked, again = (sum(count for _, count in notes) for notes in (self._asked, self._again))
        if again + tokens > share * asked:
            return False
        self._again.append((now_ms, tokens))
        return True


@dataclass(slots=True)
class Race:
    """Two sessions for one answer, until one has delivered a token."""

    winner: Side | None = None
    _running: set[Side] = field(default_factory=lambda: {"first"})
    _hedged: bool = False

    @property
    def undecided(self) -> bool:
        """Whether a second pipeline may still be asked."""
        return self.winner is None and not self._hedged and bool(self._running)

    def late(self, *, allowed: bool) -> bool:
        """The first token is late. Whether to ask a second pipeline now; asked once at most."""
        start = self.undecided and allowed
        self._hedged = True
        if start:
            self._running.add("second")
        return start

    def came(self, side: Side) -> Side | None:
        """A token came: the side to cancel, if any. It is delivered if ``winner`` is its side."""
        if self.winner is not None:
            return None
        self.winner = side
        return self._drop_other(side)

    def ended(self, side: Side, *, failed: bool) -> tuple[bool, Side | None]:
        """A session ended: whether its outcome is the request's, and the side to cancel.

        One that failed is waited for no more while the other may still answer.
        """
        self._running.discard(side)
        if self.winner is None and failed and self._running:
            return False, None
        if self.winner is None:
            self.winner = side
        decides = self.winner == side
        return decides, self._drop_other(side) if decides else None

    def _drop_other(self, side: Side) -> Side | None:
        others = sorted(self._running - {side})
        self._running.difference_update(others)
        return others[0] if others else None
