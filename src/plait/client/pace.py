"""How fast a pipeline answers: when silence means trouble, and which stage holds it up. Pure.

Time per traversal is compared with the pipeline's own recent past, so that a busy machine
is not taken for a dead one; a stage's share is compared with its own offer.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

SILENCE_MS_MIN = 2_000
"""No answer for less than this is never trouble."""
SILENCE_FIRST_MS_MIN = 5_000
SILENCE_MS_MAX = 60_000
SILENCE_FACTOR = 8
WINDOW = 16
SLOW_FACTOR = 4
SLOW_SHARE = 0.4
SLOW_MS_MIN = 20.0


class Pace:
    """Traversal times of one epoch. ``expected_us`` is each stage's predicted decode step."""

    def __init__(self, expected_us: Sequence[float], first_ms: float) -> None:
        self._expected_us = tuple(expected_us)
        self._first_ms = first_ms
        self._traversal_ms: deque[float] = deque(maxlen=WINDOW)
        self._stage_us: deque[tuple[int, ...]] = deque(maxlen=WINDOW)

    @property
    def traversal_ms(self) -> float | None:
        """The median time of a decode traversal; None before the first."""
        return median(self._traversal_ms) if self._traversal_ms else None

    def note(self, traversal_ms: float, stage_us: Sequence[int]) -> None:
        """Add a decode traversal, with the microseconds each stage had the frame."""
        self._traversal_ms.append(traversal_ms)
        if len(stage_us) == len(self._expected_us):
            self._stage_us.append(tuple(stage_us))

    def patience_ms(self, decode: bool) -> int:
        """How long to wait for the next answer before asking the stages what is wrong."""
        usual = self.traversal_ms
        if not decode or usual is None:
            patience = max(SILENCE_FIRST_MS_MIN, SILENCE_FACTOR * self._first_ms)
        else:
            patience = max(SILENCE_MS_MIN, SILENCE_FACTOR * usual)
        return round(min(patience, SILENCE_MS_MAX))

    def straggler(self) -> int | None:
        """The stage that takes far longer than its offer says and much of the time, if any."""
        if len(self._stage_us) < WINDOW:
            return None
        usual = [median(column) for column in zip(*self._stage_us, strict=True)]
        worst = max(range(len(usual)), key=usual.__getitem__)
        slow_us = max(SLOW_FACTOR * self._expected_us[worst], SLOW_MS_MIN * 1000)
        if usual[worst] > slow_us and usual[worst] > SLOW_SHARE * sum(usual):
            return worst
        return None
