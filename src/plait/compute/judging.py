"""How far a drawn id is from the one that the rules would have drawn, for audits. Pure.

The margin is the change of logits that would make the id the right draw: 0 for the right
one, about 1e-5 for a tie that rounding broke the other way, whole logits for another model,
seed or temperature. It is never more than that change (an id may win by others dropping out
at an edge of top_k, top_p or min_p, and the way over that edge counts), so that rounding
alone never looks like a lie.
"""

import numpy as np

from plait.compute.sampling import F64, gumbel
from plait.types import MILLION, Sampling


def draw_margin(logits: F64, sampling: Sampling, position: int, token: int) -> float:
    """The margin, in logits, of ``token`` at ``position``; infinite if it can never be drawn.

    ``logits`` have penalties, biases and grammar in them already.
    """
    if not 0 <= token < len(logits) or logits[token] == -np.inf:
        return float("inf")
    if sampling.greedy:
        return float(logits.max() - logits[token])
    temperature = sampling.temperature_micros / MILLION
    scaled = logits / temperature
    slack = _slack(scaled, sampling)
    scores = scaled + gumbel(sampling.seed, position, np.arange(len(scaled)))
    ahead = np.flatnonzero((slack > 0) & (scores > scores[token]))
    to_beat = np.minimum(scores[ahead] - scores[token], slack[ahead])
    return temperature * max(0.0, -float(slack[token]), float(to_beat.max(initial=0.0)))


def _slack(scaled: F64, sampling: Sampling) -> F64:
    """Per id, how far inside all limits it is; negative is outside, 0 or less is not drawn."""
    slack = np.full(len(scaled), np.inf)
    order = np.argsort(-scaled, kind="stable")
    left = order
    if 0 < sampling.top_k < len(scaled):
        left = order[: sampling.top_k]
        best_outside, worst_inside = scaled[order[sampling.top_k]], scaled[left[-1]]
        slack[left] = np.maximum(scaled[left] - best_outside, np.finfo(np.float64).tiny)
        slack[order[sampling.top_k :]] = scaled[order[sampling.top_k :]] - worst_inside
    shared = sampling.top_p_micros < MILLION
    if shared:
        weights = np.exp(scaled[left] - scaled[left[0]])
        before = (np.cumsum(weights) - weights) / weights.sum()
        # The likeliest id is always kept.
        before[0] = -np.inf
        slack[left] = np.minimum(slack[left], sampling.top_p_micros / MILLION - before)
    if sampling.min_p_micros:
        floor = scaled[order[0]] + np.log(sampling.min_p_micros / MILLION)
        tiny = np.finfo(np.float64).tiny
        inside = scaled - floor
        slack = np.minimum(slack, np.where(inside == 0, tiny, inside))
    return slack
