"""Early refusal: who is taken, who is told to come back, and when."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.node.overload import PRIORITY, REPLAY_PRIORITY, CostLine, Limits, Load, too_much
from plait.types import Qos

IDLE = Load(
    kv_tokens_total=1000,
    kv_tokens_free=1000,
    wait_ms=0,
    sessions=0,
    sessions_of_client=0,
    clients=1,
    soonest_free_ms=0,
    token_us=10_000.0,
    token_alone_us=10_000.0,
)
LIMITS = Limits(sessions_max=4, sessions_per_client_max=3)
CLASSES: tuple[Qos, ...] = ("batch", "standard", "interactive")


@pytest.mark.parametrize(
    ("changes", "qos", "tokens", "reason"),
    [
        ({}, "batch", 1000, ""),
        ({"sessions": 4}, "interactive", 1, "all 4 sessions"),
        ({"sessions": 3, "sessions_of_client": 3}, "interactive", 1, "one client"),
        ({"kv_tokens_free": 10}, "interactive", 11, "10 are free"),
        ({"kv_tokens_free": 10}, "interactive", 10, ""),
        ({"kv_tokens_free": 300}, "batch", 51, "above class batch"),
        ({"kv_tokens_free": 300}, "batch", 50, ""),
        ({"kv_tokens_free": 300}, "standard", 251, "above class standard"),
        ({"wait_ms": 2_001}, "interactive", 1, "2001 ms"),
        ({"wait_ms": 2_001}, "standard", 1, ""),
        (
            {"sessions": 2, "sessions_of_client": 1, "clients": 2, "token_us": 100_001},
            "standard",
            1,
            "100 ms",
        ),
        (
            {"sessions": 2, "sessions_of_client": 1, "clients": 2, "token_us": 100_000},
            "standard",
            1,
            "",
        ),
        (
            {"sessions": 2, "sessions_of_client": 1, "clients": 2, "token_us": 40_001},
            "interactive",
            1,
            "40 ms",
        ),
        (
            {"sessions": 2, "sessions_of_client": 1, "clients": 2, "token_us": 99_000},
            "batch",
            1,
            "",
        ),
        # Who has less than its equal part is given a little more room,
        ({"sessions": 2, "token_us": 125_000}, "standard", 1, ""),
        ({"sessions": 2, "token_us": 125_001}, "standard", 1, "125 ms"),
        # the first sessions are always taken, or a slow moment would be believed for ever,
        ({"sessions": 1, "token_us": 900_000}, "standard", 1, ""),
        # and a stage that is very fast alone may be a little slower for everybody.
        (
            {
                "sessions": 2,
                "sessions_of_client": 1,
                "clients": 2,
                "token_us": 10_000,
                "token_alone_us": 1_000,
            },
            "interactive",
            1,
            "",
        ),
    ],
)
def test_who_is_taken(changes: dict[str, int], qos: Qos, tokens: int, reason: str) -> None:
    refusal = too_much(replace(IDLE, **changes), LIMITS, qos, tokens)
    assert (refusal.reason if refusal else "") == reason or (refusal and reason in refusal.reason)
    assert (refusal is None) == (not reason)


@given(
    st.builds(
        Load,
        kv_tokens_total=st.just(1000),
        kv_tokens_free=st.integers(0, 1000),
        wait_ms=st.integers(0, 60_000),
        sessions=st.integers(0, 5),
        sessions_of_client=st.integers(0, 5),
        clients=st.integers(1, 5),
        soonest_free_ms=st.integers(0, 100_000),
        token_us=st.floats(1, 1e7),
        token_alone_us=st.floats(1, 1e5),
    ),
    st.integers(1, 1200),
)
def test_a_refusal_names_a_bounded_time_and_more_room_never_refuses(
    load: Load, tokens: int
) -> None:
    for qos in CLASSES:
        refusal = too_much(load, LIMITS, qos, tokens)
        if refusal is not None:
            assert 250 <= refusal.retry_after_ms <= 10_000
            continue
        assert tokens <= load.kv_tokens_free
        roomier = replace(load, kv_tokens_free=1000, wait_ms=0, sessions=0, sessions_of_client=0)
        assert too_much(roomier, LIMITS, qos, tokens) is None
        assert too_much(load, LIMITS, qos, tokens, resumes=True) is None


@pytest.mark.parametrize(
    ("of_client", "clients", "taken"),
    [(0, 2, True), (3, 2, True), (4, 2, False), (5, 2, False), (2, 3, True), (3, 3, False)],
)
def test_beyond_the_limit_only_who_has_less_than_an_equal_part_is_taken(
    of_client: int, clients: int, taken: bool
) -> None:
    crowded = replace(IDLE, sessions=8, sessions_of_client=of_client, clients=clients)
    limits = Limits(sessions_max=64, sessions_per_client_max=48)
    assert too_much(replace(crowded, token_us=100_000), limits, "standard", 1) is None
    beyond = too_much(replace(crowded, token_us=125_000), limits, "standard", 1)
    assert (beyond is None) == taken
    assert too_much(replace(crowded, token_us=125_001), limits, "standard", 1) is not None


def test_what_was_begun_elsewhere_is_only_refused_for_want_of_room() -> None:
    crowded = replace(IDLE, sessions=3, token_us=1e6, wait_ms=60_000, kv_tokens_free=40)
    assert too_much(crowded, LIMITS, "batch", 40) is not None
    assert too_much(crowded, LIMITS, "batch", 40, resumes=True) is None
    assert too_much(crowded, LIMITS, "batch", 41, resumes=True) is not None
    assert too_much(replace(crowded, sessions=4), LIMITS, "batch", 1, resumes=True) is not None


def test_the_cost_of_one_more_is_learnt_from_what_was_measured() -> None:
    line = CostLine.guess(10_000)
    assert line.cost_us(5) == 20_000
    for _ in range(500):
        line.note(3, 50_000)
        line.note(1, 10_000)
    assert line.cost_us(1) == pytest.approx(10_000)
    assert line.cost_us(3) == pytest.approx(50_000, rel=0.2)
    assert line.cost_us(5) == pytest.approx(90_000, rel=0.2)


@pytest.mark.parametrize("count", [2, 8, 48])
def test_one_bad_step_says_little_however_many_it_served(count: int) -> None:
    line = CostLine.guess(10_000)
    for _ in range(count):
        line.note(count, 10_000 + (count - 1) * 12_500)
    assert 0.08 < (line.more_us - 2_500) / 10_000 < 0.1


@settings(deadline=None)  # a busy machine must not fail it
@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1, 1e7)), max_size=50))
def test_a_cost_never_falls_with_the_count_and_a_bad_moment_is_forgotten(
    notes: list[tuple[int, float]],
) -> None:
    line = CostLine.guess(10_000)
    for count, cost_us in notes:
        line.note(count, cost_us)
        assert line.cost_us(1) <= line.cost_us(2) <= line.cost_us(64)
    for _ in range(3000):
        line.note(1, 10_000)
    assert line.cost_us(2) == pytest.approx(12_500, rel=0.01)


def test_interactive_work_goes_first_and_replays_last() -> None:
    assert sorted(PRIORITY, key=PRIORITY.__getitem__) == ["interactive", "standard", "batch"]
    assert max(PRIORITY.values()) < REPLAY_PRIORITY
