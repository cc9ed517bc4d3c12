"""The event loop of the simulation: virtual time, one source of chance, one trace.

Events at one instant happen in the order in which they were asked for, so a seed decides
everything. The trace names every event; its hash is the run's fingerprint.
"""

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

RECENT_EVENTS = 60

MS = 1_000
"""Microseconds in a millisecond."""
S = 1_000_000
"""Microseconds in a second."""


class Violation(Exception):
    """An invariant does not hold: ``rule`` names it, the message says what was seen."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"{rule}: {what}")
        self.rule = rule


@dataclass(slots=True)
class Timer:
    """An event to come, unless cancelled."""

    action: Callable[[], None] | None
    what: str

    def cancel(self) -> None:
        """Let it not happen."""
        self.action = None


class Engine:
    """Virtual time in microseconds from 0. ``keep_trace`` keeps every line of the trace."""

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.seed = seed
        self.random = Random(seed)
        self.now_us = 0
        self.steps = 0
        self.recent: deque[str] = deque(maxlen=None if keep_trace else RECENT_EVENTS)
        """The last events, or all of them."""
        self._heap: list[tuple[int, int, Timer]] = []
        self._asked = 0
        self._hash = hashlib.sha256()

    @property
    def fingerprint(self) -> str:
        """Hash of the trace so far."""
        return self._hash.hexdigest()

    def after(self, delay_us: int, what: str, action: Callable[[], None]) -> Timer:
        """Let something happen later; without ``what`` it leaves no line in the trace."""
        return self.at(self.now_us + delay_us, what, action)

    def at(self, when_us: int, what: str, action: Callable[[], None]) -> Timer:
        """Let something happen at a time, not before now."""
        timer = Timer(action, what)
        self._asked += 1
        heapq.heappush(self._heap, (max(when_us, self.now_us), self._asked, timer))
        return timer

    def note(self, what: str) -> None:
        """Add a line to the trace."""
        line = f"{self.now_us / S:.6f} {what}"
        self._hash.update(line.encode() + b"\n")
        self.recent.append(line)

    def run(self, until_us: int, done: Callable[[], bool] = lambda: False) -> None:
        """Let everything happen up to a time, or until ``done`` after some event."""
        while self._heap and self._heap[0][0] <= until_us:
            self.now_us, _, timer = heapq.heappop(self._heap)
            if timer.action is None:
                continue
            self.steps += 1
            if timer.what:
                self.note(timer.what)
            timer.action()
            if done():
                return
        self.now_us = max(self.now_us, until_us)
