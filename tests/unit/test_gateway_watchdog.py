"""One timer for the silences and stalled writes of a response, on a clock of the test's own."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.gateway.watchdog import Watchdog

QUIET_S, WRITE_S = 5.0, 60.0


@dataclass
class Timer:
    """A call that is due; None once it was made or cancelled."""

    at_s: float
    callback: Callable[[], None] | None

    def cancel(self) -> None:
        self.callback = None


@dataclass
class Clock:
    """An event loop's time and timers."""

    now_s: float = 100.0
    timers: list[Timer] = field(default_factory=list)
    looks: int = 0

    def time(self) -> float:
        return self.now_s

    def call_at(self, when: float, callback: Callable[[], None], /) -> Timer:
        self.timers.append(Timer(when, callback))
        return self.timers[-1]

    def advance(self, seconds: float) -> None:
        """Let time pass, and call what is due meanwhile."""
        end_s = self.now_s + seconds
        while due := [one for one in self.timers if one.callback and one.at_s <= end_s]:
            first = min(due, key=lambda one: one.at_s)
            self.now_s = max(self.now_s, first.at_s)
            callback, first.callback = first.callback, None
            assert callback is not None
            self.looks += 1
            callback()
        self.now_s = end_s


class Watched:
    """A watchdog, and when it called."""

    def __init__(self, quiet_s: float = QUIET_S, write_s: float = WRITE_S) -> None:
        self.clock = Clock()
        self.quiet: list[float] = []
        self.stalls: list[float] = []
        self.dog = Watchdog(
            quiet_s,
            write_s,
            on_quiet=lambda: self.quiet.append(self.clock.now_s),
            on_stall=lambda: self.stalls.append(self.clock.now_s),
            loop=self.clock,
        )


def test_silence_is_told_each_time_and_a_write_begins_it_anew() -> None:
    watched = Watched()
    with watched.dog:
        watched.clock.advance(11)
        assert watched.quiet == [105, 110]
        watched.clock.advance(1)
        watched.dog.writing()
        watched.dog.written()
        watched.clock.advance(4.9)
        assert watched.quiet == [105, 110]
        watched.clock.advance(0.2)
        assert watched.quiet == [105, 110, 117]
    watched.clock.advance(100)
    assert len(watched.quiet) == 3


def test_a_write_that_stays_open_is_no_silence_but_a_stall() -> None:
    watched = Watched()
    with watched.dog:
        watched.clock.advance(2)
        watched.dog.writing()
        watched.clock.advance(59)
        assert (watched.quiet, watched.stalls) == ([], [])
        watched.clock.advance(100)
        assert (watched.quiet, watched.stalls) == ([], [162])


@given(
    st.sampled_from([(5.0, 60.0), (60.0, 5.0), (1.0, 1.0)]),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), max_size=20),
)
def test_nothing_is_told_late_or_for_nothing(
    limits: tuple[float, float], writes: list[tuple[float, float]]
) -> None:
    quiet_s, write_s = limits
    watched = Watched(quiet_s, write_s)
    clock, since_s = watched.clock, watched.clock.now_s
    with watched.dog:
        for pause_s, write_for_s in writes:
            before = len(watched.quiet)
            clock.advance(pause_s)
            told = watched.quiet[before:]
            # Each silence is told when it has lasted, and the next counts from there.
            expected = int((clock.now_s - since_s) / quiet_s + 1e-9)
            assert len(told) in (expected, max(0, expected - 1), expected + 1)
            assert all(
                at == pytest.approx(since_s + quiet_s * (k + 1)) for k, at in enumerate(told)
            )
            began_s = clock.now_s
            watched.dog.writing()
            clock.advance(write_for_s)
            if write_for_s >= write_s + 1e-6:
                assert watched.stalls == [pytest.approx(began_s + write_s)]
                return
            assert watched.stalls == [] or write_for_s >= write_s - 1e-6
            if watched.stalls:
                return
            watched.dog.written()
            since_s = clock.now_s


def test_tokens_set_no_timers() -> None:
    watched = Watched()
    with watched.dog:
        for _ in range(1000):
            watched.dog.writing()
            watched.dog.written()
            watched.clock.advance(0.02)
        assert watched.clock.looks <= 5
        assert watched.quiet == []
