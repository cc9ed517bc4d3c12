"""Drawing tokens: published vectors, exact distributions, and nothing but the key matters."""

import math

import numpy as np
import pytest

from plait.compute.sampling import draw, gumbel, philox
from plait.errors import RemoteProtocolError
from plait.types import Sampling

FULL = 0xFFFFFFFF
LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, philox 4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = philox(np.array(counter, np.uint64)[:, None], key)
    assert tuple(int(word) for word in found[:, 0]) == words


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    token, logprob = draw(logits, Sampling(), 5)
    assert token == 1
    assert logprob == pytest.approx(2 - math.log(1 + 2 * math.e**2 + math.e))


def test_draws_follow_the_softmax() -> None:
    sampling = Sampling(temperature_micros=1_000_000, seed=1)
    counts = np.bincount([draw(LOGITS, sampling, i)[0] for i in range(800)], minlength=4)
    expected = 800 * np.exp(LOGITS)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, p = 0.001


def test_temperature_sharpens() -> None:
    sampling = Sampling(temperature_micros=500_000, seed=2)
    counts = np.bincount([draw(LOGITS, sampling, i)[0] for i in range(500)], minlength=4)
    squared = np.exp(2 * LOGITS)
    assert counts[0] / 500 == pytest.approx(squared[0] / squared.sum(), abs=0.07)


@pytest.mark.parametrize(
    ("top_k", "top_p_micros", "allowed"),
    [
        (1, 1_000_000, {0}),
        (2, 1_000_000, {0, 1}),
        (9, 1_000_000, {0, 1, 2, 3}),
        (0, 1, {0}),
        (0, 390_000, {0}),
        (0, 410_000, {0, 1}),
        (0, 890_000, {0, 1, 2}),
        (2, 560_000, {0}),  # 0.4 of what top_k left is 0.571
    ],
)
def test_limits_leave_just_the_likeliest(top_k: int, top_p_micros: int, allowed: set[int]) -> None:
    sampling = Sampling(1_000_000, top_p_micros, top_k, seed=3)
    assert {draw(LOGITS, sampling, i)[0] for i in range(150)} == allowed


def test_top_k_among_equals_keeps_the_lowest_ids() -> None:
    sampling = Sampling(temperature_micros=1_000_000, top_k=2)
    logits = np.zeros(8, np.float32)
    assert {draw(logits, sampling, i)[0] for i in range(60)} == {0, 1}


def test_a_draw_is_a_function_of_seed_and_position() -> None:
    def draws(seed: int) -> list[int]:
        sampling = Sampling(temperature_micros=900_000, seed=seed)
        return [draw(np.zeros(1000, np.float32), sampling, i)[0] for i in range(20)]

    assert draws(7) == draws(7)
    assert len({tuple(draws(seed)) for seed in (0, 1, 7, 2**32, 2**64 - 1)}) == 5
    assert len(set(draws(7))) > 15


def test_noise_belongs_to_the_token_whatever_else_may_be_drawn() -> None:
    every = gumbel(11, 3, np.arange(100))
    assert gumbel(11, 3, np.array([42, 7])).tolist() == every[[42, 7]].tolist()
    assert np.isfinite(every).all()


def test_the_log_probability_is_the_models_own() -> None:
    sampling = Sampling(temperature_micros=300_000, top_k=1)
    assert draw(LOGITS, sampling, 0)[1] == pytest.approx(math.log(0.4), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_are_refused(bad: float) -> None:
    with pytest.raises(RemoteProtocolError, match="not finite"):
        draw(np.array([0, bad], np.float32), Sampling(), 0)
