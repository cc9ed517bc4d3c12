"""Chaos plans: parsed, judged, drawn."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.testnet.chaos_plan import (
    DISRUPTIVE,
    SETTLE_S,
    ChaosPlan,
    Fault,
    check_plan,
    parse_plan,
    random_plan,
)
from plait.types import Span

HOSTS = {
    "node-1": Span(0, 4),
    "node-2": Span(4, 8),
    "node-3": Span(0, 4),
    "node-4": Span(4, 8),
    "ledger-1": None,
}

TEXT = """
duration_s = 60
load = 2
[[fault]]
at_s = 12.5
kind = "restart"
node = "node-1"
[[fault]]
at_s = 5
kind = "kill"
node = "node-1"
[[fault]]
at_s = 30
kind = "cut"
node = "node-2"
direction = "in"
"""


def test_a_plan_is_read_in_order_of_time() -> None:
    plan = parse_plan(TEXT)
    assert plan == ChaosPlan(
        60.0,
        (
            Fault(5.0, "kill", "node-1"),
            Fault(12.5, "restart", "node-1"),
            Fault(30.0, "cut", "node-2", "in"),
        ),
        load=2,
    )
    check_plan(plan, HOSTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("duration_s = ", "not a chaos plan"),
        ("duration_s = 0", "lasts"),
        ("load = 3", "duration_s"),
        (TEXT.replace("kill", "murder"), "murder"),
        (TEXT.replace("at_s = 30", "at_s = 61"), "not in the run"),
        (TEXT.replace("direction", "way"), "way"),
        (TEXT + "factor = 1.0", "factor"),
    ],
)
def test_a_bad_plan_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_plan(text)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault(1, "kill", "node-9")], "no node node-9"),
        ([Fault(1, "kill", "node-1"), Fault(2, "hang", "node-1")], "suffers a kill already"),
        ([Fault(1, "resume", "node-1")], "nothing that a resume ends"),
        ([Fault(1, "kill", "node-1"), Fault(2, "heal", "node-1")], "nothing that a heal ends"),
        ([Fault(1, "kill", "node-1"), Fault(2, "kill", "node-3")], "layer 0 would have no"),
        (
            [
                Fault(1, "kill", "node-1"),
                Fault(2, "restart", "node-1"),
                Fault(2 + SETTLE_S / 2, "hang", "node-3"),
            ],
            "layer 0 would have no",
        ),
        ([Fault(1, "restart", "node-1"), Fault(2, "cut", "node-3")], "layer 0 would have no"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(faults: list[Fault], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plan(ChaosPlan(60, tuple(faults)), HOSTS)


def test_gaps_are_allowed_when_asked_for() -> None:
    faults = (Fault(1, "kill", "node-1"), Fault(2, "kill", "node-3"))
    check_plan(ChaosPlan(60, faults, allow_gaps=True), HOSTS)


def test_a_recovered_node_counts_after_a_while() -> None:
    faults = (
        Fault(1, "slow", "node-1"),
        Fault(2, "heal", "node-1"),
        Fault(2 + SETTLE_S, "hang", "node-3"),
    )
    check_plan(ChaosPlan(60, faults), HOSTS)


@given(seed=st.integers(0, 10_000), every_s=st.floats(1, 30))
def test_a_random_plan_always_leaves_a_host_for_every_layer(seed: int, every_s: float) -> None:
    draw = random.Random(seed).random
    plan = random_plan(draw, HOSTS, duration_s=200, every_s=every_s, load=3)
    check_plan(plan, HOSTS)
    assert plan.faults
    assert {fault.node for fault in plan.faults} <= HOSTS.keys() - {"ledger-1"}
    assert sum(fault.kind in DISRUPTIVE for fault in plan.faults) * 2 == len(plan.faults), (
        "what is done is undone"
    )


def test_a_seed_gives_its_plan_again_and_another_gives_another() -> None:
    def drawn(seed: int) -> ChaosPlan:
        draw = random.Random(seed).random
        return random_plan(draw, HOSTS, duration_s=300, every_s=10, load=1)

    assert drawn(5) == drawn(5) != drawn(6)


def test_nobody_is_hit_where_every_layer_has_one_host() -> None:
    alone = {"node-1": Span(0, 4), "node-2": Span(4, 8)}
    draw = random.Random(1).random
    assert not random_plan(draw, alone, duration_s=60, every_s=5, load=1).faults
    plan = random_plan(draw, alone, duration_s=60, every_s=5, load=1, allow_gaps=True)
    assert plan.faults
    with pytest.raises(ConfigError, match="choose among"):
        random_plan(draw, alone, duration_s=60, every_s=5, load=1, kinds=("heal",))
    with pytest.raises(ConfigError, match="positive"):
        random_plan(draw, alone, duration_s=60, every_s=0, load=1)


def test_only_the_kinds_asked_for_are_drawn() -> None:
    draw = random.Random(1).random
    plan = random_plan(draw, HOSTS, duration_s=300, every_s=10, load=1, kinds=("hang",))
    assert {fault.kind for fault in plan.faults} == {"hang", "resume"}
