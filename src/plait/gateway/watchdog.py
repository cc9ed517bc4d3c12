"""Silence and stalled writes of one response, noticed by one timer instead of one per token.

The timer looks at what was last noted when it fires, and is set anew for what is due next.
"""

import asyncio
from collections.abc import Callable
from typing import Protocol, Self


class Timer(Protocol):
    """A call that is due later."""

    def cancel(self) -> None:
        """Do not call."""
        ...


class Timers(Protocol):
    """What is needed of an event loop."""

    def time(self) -> float:
        """Seconds, never less than before."""
        ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        """Call at a time."""
        ...


class Watchdog:
    """Calls ``on_quiet`` when nothing was written for ``quiet_s``, again each time, and
    ``on_stall`` once a write has taken ``write_s``.

    A context: it watches inside, and silence counts from its beginning. Both callbacks run
    on the event loop.
    """

    def __init__(
        self,
        quiet_s: float,
        write_s: float,
        *,
        on_quiet: Callable[[], None],
        on_stall: Callable[[], None],
        loop: Timers | None = None,
    ) -> None:
        self._quiet_s, self._write_s = quiet_s, write_s
        self._on_quiet, self._on_stall = on_quiet, on_stall
        self._loop = loop or asyncio.get_running_loop()
        self._since_s = self._loop.time()
        self._writing = False
        self._timer: Timer | None = None

    def __enter__(self) -> Self:
        self.written()
        self._set(self._since_s)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def writing(self) -> None:
        """A write begins."""
        self._since_s, self._writing = self._loop.time(), True

    def written(self) -> None:
        """It is over."""
        self._since_s, self._writing = self._loop.time(), False

    @property
    def _due_s(self) -> float:
        """When what goes on now has lasted too long."""
        return self._since_s + (self._write_s if self._writing else self._quiet_s)

    def _set(self, now_s: float) -> None:
        # What begins right after this look must not be found too late.
        due_s = min(self._due_s, now_s + self._quiet_s, now_s + self._write_s)
        self._timer = self._loop.call_at(due_s, self._look)

    def _look(self) -> None:
        now_s = self._loop.time()
        # By the very sum that the timer was set to: a difference may round to less.
        if now_s >= self._due_s:
            if self._writing:
                self._timer = None
                self._on_stall()
                return
            self._since_s = now_s
            self._on_quiet()
        self._set(now_s)
