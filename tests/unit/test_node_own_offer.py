"""The node's own offer: what is told at once, and how its speed is measured."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.node.own_offer import SpeedMeter, materially_different
from plait.testing.offers import paper_offer
from plait.types import Span

OFFER = replace(
    paper_offer("node", Span(0, 4)), kv_tokens_total=400, kv_tokens_free=400, decode_us=1000
)


@pytest.mark.parametrize(
    ("changes", "told_at_once"),
    [
        ({}, False),
        ({"kv_tokens_free": 350}, False),
        ({"kv_tokens_free": 300}, True),
        ({"sessions_active": 1}, True),
        ({"state": "draining"}, True),
        ({"decode_us": 1900}, False),
        ({"decode_us": 2100}, True),
        ({"decode_us": 400}, True),
    ],
)
def test_only_material_changes_are_told_at_once(
    changes: dict[str, object], told_at_once: bool
) -> None:
    assert materially_different(OFFER, replace(OFFER, **changes)) is told_at_once  # type: ignore[arg-type]


def test_the_first_offer_is_told_at_once() -> None:
    assert materially_different(None, OFFER)


@given(st.lists(st.floats(1, 1e6), max_size=50), st.integers(1, 10**6))
def test_the_speed_stays_within_what_was_measured(steps: list[float], first: int) -> None:
    meter = SpeedMeter(first)
    for step in steps:
        meter.stepped(step)
    assert min([first, *steps]) - 1 <= meter.decode_us <= max([first, *steps]) + 1


def test_a_machine_that_slows_down_shows() -> None:
    meter = SpeedMeter(1000)
    for _ in range(40):
        meter.stepped(3000)
    assert 2900 < meter.decode_us <= 3000
