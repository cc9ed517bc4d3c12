"""A clock that makes up differences slowly, and large ones at once."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.clock import SLEW, STEP_MS, SlewedClock

MS = 1_000_000


@dataclass
class Times:
    """A system's two clocks."""

    wall_ns: int = 1_700_000_000_000 * MS
    monotonic_ns: int = 5 * MS

    def pass_ms(self, ms: int) -> None:
        self.wall_ns += ms * MS
        self.monotonic_ns += ms * MS

    def clock(self) -> SlewedClock:
        return SlewedClock(lambda: self.wall_ns, lambda: self.monotonic_ns)


@pytest.mark.parametrize("jump_ms", [-15_000, 15_000, -STEP_MS, STEP_MS])
def test_waits_take_their_time_whatever_the_system_clock_does(jump_ms: int) -> None:
    times = Times()
    clock = times.clock()
    began_ms = clock()
    times.wall_ns += jump_ms * MS
    for _ in range(20):
        times.pass_ms(100)
        clock()
    assert abs(clock() - began_ms - 2_000) <= 2_000 * SLEW


@pytest.mark.parametrize("jump_ms", [-15_000, 15_000])
def test_a_difference_is_made_up_in_the_end(jump_ms: int) -> None:
    times = Times()
    clock = times.clock()
    times.wall_ns += jump_ms * MS
    for _ in range(200):
        times.pass_ms(1_000)
        clock()
    assert clock() == times.wall_ns // MS


@pytest.mark.parametrize("jump_ms", [-STEP_MS - 1_000, 10 * STEP_MS])
def test_a_large_difference_is_taken_at_once(jump_ms: int) -> None:
    times = Times()
    clock = times.clock()
    times.wall_ns += jump_ms * MS
    assert clock() == times.wall_ns // MS


@given(st.lists(st.tuples(st.integers(0, 5_000), st.integers(-20_000, 20_000)), max_size=30))
def test_it_never_runs_backwards_for_small_jumps(course: list[tuple[int, int]]) -> None:
    times = Times()
    clock = times.clock()
    before, off_ms = clock(), 0
    for passes_ms, jump_ms in course:
        if abs(off_ms + jump_ms) > STEP_MS // 2:
            continue
        off_ms += jump_ms
        times.wall_ns += jump_ms * MS
        times.pass_ms(passes_ms)
        now = clock()
        assert now >= before
        before = now
