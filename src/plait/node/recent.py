"""The last times that something took, and their quantiles. Pure, bounded."""

from collections import deque
from dataclasses import dataclass, field

KEPT = 512


@dataclass(slots=True)
class RecentTimes:
    """Seconds, the newest ``KEPT`` of them; ``count`` are all that there ever were."""

    count: int = 0
    _times_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def note(self, time_s: float) -> None:
        """One more; below zero counts as zero."""
        self.count += 1
        self._times_s.append(max(0.0, time_s))

    def quantile_ms(self, share: float) -> float | None:
        """What this share of the kept ones took at most, in milliseconds; None of nothing."""
        if not self._times_s:
            return None
        ordered = sorted(self._times_s)
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 3)
