"""The margin of a drawn id: 0 for the right one, small for ties, and never an unjust one."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plait.compute.draw_state import DrawState
from plait.compute.judging import draw_margin
from plait.compute.sampling import choose
from plait.types import MILLION, Sampling

VOCABULARY = 40


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    return Sampling(
        temperature_micros=draw(st.sampled_from([0, 300_000, MILLION, 2 * MILLION])),
        top_k=draw(st.sampled_from([0, 1, 3, 10])),
        top_p_micros=draw(st.sampled_from([MILLION, 900_000, 300_000])),
        min_p_micros=draw(st.sampled_from([0, 50_000, 500_000])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


def logits_of(seed: int, *, coarse: bool = False) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(0, 3, VOCABULARY)
    return np.round(drawn) if coarse else drawn


@given(samplings(), st.integers(0, 2**32), st.booleans(), st.integers(0, 500))
def test_the_right_id_has_margin_zero_and_others_more(
    sampling: Sampling, seed: int, coarse: bool, position: int
) -> None:
    logits = logits_of(seed, coarse=coarse)
    right = choose(logits, sampling, position)
    margins = [draw_margin(logits, sampling, position, token) for token in range(VOCABULARY)]
    assert margins[right] == 0.0
    if not coarse:
        assert all(margin > 0 for token, margin in enumerate(margins) if token != right)


@given(samplings(), st.integers(0, 2**32), st.integers(0, 500), st.sampled_from([1e-6, 1e-3, 0.1]))
def test_rounding_alone_never_has_a_margin_beyond_itself(
    sampling: Sampling, seed: int, position: int, error: float
) -> None:
    logits = logits_of(seed)
    noise = np.random.default_rng(seed + 1).uniform(-error, error, VOCABULARY)
    theirs = choose(logits + noise, sampling, position)
    # A score moves by the error, so a difference of two by twice that.
    assert draw_margin(logits, sampling, position, theirs) <= 2 * error * (1 + 1e-9)


def test_another_seed_is_far_off_most_of_the_time() -> None:
    right, wrong = (Sampling(temperature_micros=MILLION, seed=seed) for seed in (1, 2))
    margins = [
        draw_margin(logits, right, position, choose(logits, wrong, position))
        for position in range(100)
        if (logits := logits_of(position)) is not None
    ]
    assert sum(margin > 1e-3 for margin in margins) > 50


def test_an_id_that_can_never_be_drawn_is_infinitely_off() -> None:
    logits = logits_of(1)
    logits[3] = -np.inf
    for token in (3, -1, VOCABULARY):
        assert draw_margin(logits, Sampling(), 0, token) == float("inf")


def test_taking_a_claimed_id_follows_its_history() -> None:
    sampling = Sampling(repetition_penalty_micros=2 * MILLION)
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    honest, audited = (DrawState(sampling, (0,), 1) for _ in range(2))
    drawn = [honest.draw(logits, position).token_id for position in (1, 2, 3)]
    assert drawn == [1, 2, 1]
    margins = [audited.take(logits, 1 + index, token).margin for index, token in enumerate(drawn)]
    assert margins == [0.0, 0.0, 0.0]
    assert DrawState(sampling, (0,), 1).take(logits, 1, 2).margin == 1.0
