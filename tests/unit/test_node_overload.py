"""Early refusal: who is taken, who is told to come back, and when."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.node.overload import PRIORITY, REPLAY_PRIORITY, Limits, Load, too_much
from plait.types import Qos

IDLE = Load(
    kv_tokens_total=1000,
    kv_tokens_free=1000,
    wait_ms=0,
    sessions=0,
    sessions_of_client=0,
    soonest_free_ms=0,
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
        soonest_free_ms=st.integers(0, 100_000),
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


def test_interactive_work_goes_first_and_replays_last() -> None:
    assert sorted(PRIORITY, key=PRIORITY.__getitem__) == ["interactive", "standard", "batch"]
    assert max(PRIORITY.values()) < REPLAY_PRIORITY
