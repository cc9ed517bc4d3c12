"""Wall time that does not jump, for what is both dated and waited for.

Sessions sign dates, which others compare with their own clocks, and wait for silence, holds and
idle times. If a system's clock is put back by 20 seconds, waits by wall time would take as much
longer; put forward, they would end at once.
"""

import threading
import time
from collections.abc import Callable

SLEW = 0.1
"""How much faster or slower than real time it runs while it makes up a difference."""
STEP_MS = 60_000
"""A difference above this is taken at once: dates so far off would be refused everywhere."""


class SlewedClock:
    """Milliseconds since 1970, by monotonic time, drawn towards the system's clock.

    Safe to call from several threads. ``wall_ns`` and ``monotonic_ns`` as in ``time``.
    """

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns
        self._lock = threading.Lock()
        self._read_ns = monotonic_ns()
        self._now_ns = wall_ns()

    def __call__(self) -> int:
        """The time now."""
        with self._lock:
            read_ns, wall_ns = self._monotonic_ns(), self._wall_ns()
            passed_ns, self._read_ns = read_ns - self._read_ns, read_ns
            off_ns = wall_ns - (self._now_ns + passed_ns)
            if abs(off_ns) <= STEP_MS * 1_000_000:
                most_ns = int(passed_ns * SLEW)
                off_ns = max(-most_ns, min(most_ns, off_ns))
            self._now_ns += passed_ns + off_ns
            return self._now_ns // 1_000_000


clock_ms = SlewedClock()
"""This process's."""
