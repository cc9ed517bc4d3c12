"""Drawing a token: greedy, or by a generator that has no state.

A draw is a function of (logits, sampling, position) alone, so any stage on any pipeline
draws alike and an auditor can replay it. ``position`` is that of the drawn token.

1. Greedy takes the largest logit, the lowest id among equals.
2. Otherwise logits are divided by the temperature; ``top_k`` keeps the k largest, then
   ``top_p`` the smallest set of largest ones that holds that probability (of what top_k
   left), then ``min_p`` those with at least that share of the largest one's probability.
   Equal logits are ordered by ascending id.
3. Token i of those left scores logit_i + G_i with Gumbel noise G_i = -ln(-ln u_i), and the
   highest score wins: exactly a draw from their softmax (the Gumbel-max trick). A margin
   between the two highest scores makes the choice robust against rounding.
4. u_i = (w + 1/2) / 2^52, w being the upper 52 bits of the first two words (high, low) of
   Philox-4x32-10 (Salmon et al., SC'11) at counter (i, position, 0, 0) and key
   (seed mod 2^32, seed div 2^32).

Everything that decides a draw is in float64. The reported log-probability is the model's
own: before temperature and truncation.
"""

import numpy as np
import numpy.typing as npt

from plait.errors import RemoteProtocolError
from plait.types import MILLION, Sampling

Words = npt.NDArray[np.uint64]
F64 = npt.NDArray[np.float64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def draw(logits: npt.NDArray[np.float32], sampling: Sampling, position: int) -> tuple[int, float]:
    """Draw the token at ``position`` without a history; returns its id and log-probability.

    Raises ``RemoteProtocolError`` if a logit is not finite: activations overflowed.
    """
    exact = exact_logits(logits)
    token = choose(exact, sampling, position)
    return token, float(exact[token] - log_total(exact))


def exact_logits(logits: npt.NDArray[np.float32]) -> F64:
    """Logits in float64; raises ``RemoteProtocolError`` unless all are finite."""
    if not np.isfinite(logits).all():
        raise RemoteProtocolError("activations that lead to logits which are not finite")
    return logits.astype(np.float64)


def log_total(logits: F64) -> float:
    """The logarithm of the sum of exponentials: a logit minus it is a log-probability."""
    top = logits.max()
    # Exponentials in float32, in one buffer: a third of the time, and an error of 1e-7.
    away = np.empty(len(logits), np.float32)
    np.subtract(logits, top, out=away, casting="same_kind")
    np.exp(away, out=away)
    return float(top + np.log(away.sum(dtype=np.float64)))


def top_logprobs(logits: F64, total: float, count: int) -> tuple[tuple[int, float], ...]:
    """The ``count`` likeliest ids with log-probabilities, the lower id first among equals."""
    count = min(count, len(logits))
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    ids = np.flatnonzero(logits >= least)
    order = ids[np.argsort(-logits[ids], kind="stable")][:count]
    return tuple((int(token), min(0.0, float(logits[token] - total))) for token in order)


def score(
    logits: npt.NDArray[np.float32], token: int, tops: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """A token's log-probability, and the ``tops`` likeliest tokens; raises
    ``RemoteProtocolError`` if a logit is not finite."""
    exact = exact_logits(logits)
    total = log_total(exact)
    likeliest = top_logprobs(exact, total, tops) if tops else ()
    return min(0.0, float(exact[token] - total)), likeliest


def choose(logits: F64, sampling: Sampling, position: int) -> int:
    """The id drawn from logits, of which some may be minus infinity: those never are."""
    return int(np.argmax(logits)) if sampling.greedy else _sample(logits, sampling, position)


def _sample(logits: F64, sampling: Sampling, position: int) -> int:
    scaled = logits / (sampling.temperature_micros / MILLION)
    candidates = _candidates(scaled, sampling)
    scores = scaled[candidates] + gumbel(sampling.seed, position, candidates)
    return int(candidates[int(np.argmax(scores))])


def _candidates(scaled: F64, sampling: Sampling) -> npt.NDArray[np.int64]:
    """Ids that may be drawn, most likely first (all of them, by id, without limits)."""
    limited = 0 < sampling.top_k < len(scaled)
    shared = sampling.top_p_micros < MILLION or sampling.min_p_micros
    if not limited and not shared:
        return np.arange(len(scaled))
    order = np.argsort(-scaled, kind="stable")
    if limited:
        order = order[: sampling.top_k]
    if not shared:
        return order
    weights = np.exp(scaled[order] - scaled[order[0]])
    kept = len(order)
    if sampling.top_p_micros < MILLION:
        total = np.cumsum(weights)
        kept = int(np.searchsorted(total, total[-1] * (sampling.top_p_micros / MILLION))) + 1
    if sampling.min_p_micros:
        kept = min(kept, int((weights >= sampling.min_p_micros / MILLION).sum()))
    return order[:kept]


def gumbel(seed: int, position: int, ids: npt.NDArray[np.int64]) -> F64:
    """Standard Gumbel noise for each token id at one position."""
    counter = np.zeros((4, len(ids)), np.uint64)
    counter[0] = ids
    counter[1] = position
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    mantissa = ((words[0] << _SHIFT) | words[1]) >> np.uint64(12)
    noise: F64 = -np.log(-np.log((mantissa.astype(np.float64) + 0.5) * 2.0**-52))
    return noise


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox-4x32-10: [4, n] counters of 32-bit words and a key to [4, n] random words."""
    a, b, c, d = counter
    for turn in range(10):
        keys = [
            np.uint64((word + turn * step) & 0xFFFFFFFF)
            for word, step in zip(key, _WEYL, strict=True)
        ]
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _SHIFT) ^ b ^ keys[0],
            second & _LOW,
            (first >> _SHIFT) ^ d ^ keys[1],
            first & _LOW,
        )
    return np.stack([a, b, c, d])
