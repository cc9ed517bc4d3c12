"""Shaped links: delay, jitter, rate, loss and cut, without a clock."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import ConfigError
from plait.net.shaping import QUEUE_S, RETRANSMIT_S_MIN, Change, LinkTable, Pipe, Shape


def pipe(shape: Shape, seed: int = 1) -> Pipe:
    return Pipe(shape, random.Random(seed).random)


def test_a_packet_arrives_after_the_delay_and_its_own_length() -> None:
    shaped = pipe(Shape(delay_s=0.05, rate_bps=8_000_000))
    assert shaped.packet(10.0, 1_000) == pytest.approx(10.051)
    assert shaped.packet(10.0, 1_000) == pytest.approx(10.052), "it waits for the one before"
    assert shaped.packet(11.0, 1_000) == pytest.approx(11.051), "the line is free again"


def test_a_full_queue_drops_packets_but_only_slows_a_stream() -> None:
    shape = Shape(rate_bps=8_000)
    packets, chunks = pipe(shape), pipe(shape)
    assert packets.packet(0.0, 150) == pytest.approx(0.15)
    assert packets.packet(0.0, 150) is None, f"it would wait beyond {QUEUE_S} s"
    assert packets.dropped == 1
    assert chunks.chunk(0.0, 150) == pytest.approx(0.15)


def test_a_stream_never_gets_more_than_the_rate() -> None:
    shaped = pipe(Shape(rate_bps=8_000))
    last_s = max(shaped.chunk(0.0, 1_000) or 0 for _ in range(10))
    assert last_s == pytest.approx(10.0)


def test_a_cut_lets_nothing_through_until_it_is_healed() -> None:
    shaped = pipe(Shape(cut=True))
    assert shaped.packet(0.0, 100) is None
    assert shaped.chunk(0.0, 100) is None
    shaped.shape = Shape()
    assert shaped.packet(5.0, 100) == shaped.chunk(5.0, 100) == 5.0


def test_loss_is_the_share_of_packets_and_costs_a_stream_time() -> None:
    shaped = pipe(Shape(delay_s=0.01, loss=0.25))
    arrived = sum(shaped.packet(n, 100) is not None for n in range(4_000))
    assert arrived == pytest.approx(3_000, abs=120)
    late = [pipe(Shape(delay_s=0.01, loss=0.25), seed).chunk(0.0, 100) for seed in range(200)]
    assert min(t for t in late if t is not None) == pytest.approx(0.01)
    repeated = [t for t in late if t is not None and t > 0.01]
    assert min(repeated) == pytest.approx(0.01 + RETRANSMIT_S_MIN + 0.02)
    assert len(repeated) == pytest.approx(50, abs=20)


@given(
    seed=st.integers(0, 1000),
    jitter_ms=st.integers(0, 20),
    steps=st.lists(st.tuples(st.floats(0, 0.05), st.integers(1, 65_536)), max_size=60),
)
def test_nothing_overtakes_and_nothing_is_early(
    seed: int, jitter_ms: int, steps: list[tuple[float, int]]
) -> None:
    shape = Shape(delay_s=0.02, jitter_s=jitter_ms / 1000, rate_bps=1e7, loss=0.05)
    shaped = pipe(shape, seed)
    now_s = last_s = 0.0
    for wait_s, size_bytes in steps:
        now_s += wait_s
        arrival_s = shaped.chunk(now_s, size_bytes)
        assert arrival_s is not None
        assert arrival_s >= max(last_s, now_s + shape.delay_s - shape.jitter_s)
        last_s = arrival_s


def test_the_same_seed_gives_the_same_network() -> None:
    shape = Shape(delay_s=0.02, jitter_s=0.01, loss=0.1)
    first, second = pipe(shape, 7), pipe(shape, 7)
    assert [first.packet(n, 9) for n in range(50)] == [second.packet(n, 9) for n in range(50)]


@pytest.mark.parametrize(
    "figures",
    [
        {"delay_s": -1.0},
        {"delay_s": float("nan")},
        {"delay_s": 0.01, "jitter_s": 0.02},
        {"loss": 1.0},
        {"rate_bps": float("inf")},
        {"delay_s": 61.0},
    ],
)
def test_impossible_figures_are_refused(figures: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Shape(**figures)  # type: ignore[arg-type]


def test_a_change_concerns_the_links_it_names_and_only_those() -> None:
    links = LinkTable(["a", "b", "c"], Shape(delay_s=0.01), lambda: 0.5)
    assert links.apply(Change(sources=("a",), cut=True)) == 2
    assert links.apply(Change(targets=("c",), delay_s=0.2)) == 2
    shapes = {(row["source"], row["target"]): row for row in links.describe()}
    assert [pair for pair, row in shapes.items() if row["cut"]] == [("a", "b"), ("a", "c")]
    assert shapes["a", "c"]["delay_s"] == shapes["b", "c"]["delay_s"] == 0.2
    assert shapes["c", "a"]["delay_s"] == 0.01
    assert links.apply(Change(loss=0.1)) == 6
    assert links.pipe("a", "a") is None
    assert links.pipe("a", "z") is None


def test_a_change_that_cannot_be_changes_nothing() -> None:
    links = LinkTable(["a", "b"], Shape(delay_s=0.01), lambda: 0.5)
    before = links.describe()
    with pytest.raises(ConfigError, match="there is no end 'z'; there are a, b"):
        links.apply(Change(sources=("a", "z"), cut=True))
    with pytest.raises(ConfigError):
        links.apply(Change(jitter_s=1.0))
    assert links.describe() == before
