"""How far each dtype's distributions are from fp32's, on real text, teacher-forced.

For every position of the text both predict the next token from the same ids before it; the
figure is the Kullback-Leibler divergence of the dtype from fp32, in nats. Rows go through
the kernels that decoding uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from plait.compute.attention import Item
from plait.compute.kv import KvCache
from plait.compute.load import load_model
from plait.compute.stage import SpanCompute
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.types import Sampling, SessionId, Span

WINDOW_TOKENS = 256
_ROWS = 16
_SESSION = SessionId(b"plait/quality...")


@dataclass(frozen=True, slots=True)
class QualityFigure:
    """One dtype against fp32 over ``tokens`` positions; ``flips`` are other likeliest ids."""

    dtype: str
    tokens: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    flips: int


def default_text() -> str:
    """English prose and code that every Python carries: its own language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in ("objects", "types", "strings", "exprlists"))


@torch.inference_mode()
def measure_quality(
    local: LocalModel,
    dtypes: Sequence[str],
    tokens: int = 2048,
    text: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[QualityFigure]:
    """Compare over ``tokens`` positions, in windows of 256; minutes."""
    ids = Tokenizer.load(local).encode(text or default_text())[:tokens]
    windows = [ids[at : at + WINDOW_TOKENS] for at in range(0, len(ids), WINDOW_TOKENS)]
    span = Span(0, local.manifest.layers)
    exact = load_model(local, span, "fp32")
    models = {dtype: load_model(local, span, dtype) for dtype in dtypes}
    distances: dict[str, list[torch.Tensor]] = {dtype: [] for dtype in dtypes}
    flips = dict.fromkeys(dtypes, 0)
    for done, window in enumerate(windows):
        wanted = _log_probabilities(exact, window)
        for dtype, model in models.items():
            found = _log_probabilities(model, window)
            distances[dtype].append((wanted.exp() * (wanted - found)).sum(-1))
            flips[dtype] += int((wanted.argmax(-1) != found.argmax(-1)).sum())
        progress(done + 1, len(windows))
    return [_figure(dtype, torch.cat(distances[dtype]), flips[dtype]) for dtype in dtypes]


def _figure(dtype: str, distance: torch.Tensor, flips: int) -> QualityFigure:
    return QualityFigure(
        dtype=dtype,
        tokens=len(distance),
        kl_mean=round(float(distance.mean()), 6),
        kl_p99=round(float(distance.quantile(0.99)), 6),
        kl_max=round(float(distance.max()), 6),
        flips=flips,
    )


def _log_probabilities(model: SpanCompute, window: Sequence[int]) -> torch.Tensor:
    cache = KvCache(model.layout, WINDOW_TOKENS)
    cache.reserve(_SESSION, len(window), Sampling())
    kv = cache.get(_SESSION)
    assert kv is not None
    found = []
    for start in range(0, len(window), _ROWS):
        rows = model.embed(window[start : start + _ROWS])
        (normed,) = model.run([Item(rows, start, kv)])
        found.append(model.logits(normed).log_softmax(-1))
    return torch.cat(found)
