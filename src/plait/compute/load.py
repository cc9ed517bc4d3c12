"""Loads a span of a model for computing. Importing this module is cheap; torch
comes with ``preload`` or the first ``load_stage``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from plait.compute.grammar import Vocabulary
from plait.compute.spill import DiskRoom
from plait.errors import ConfigError
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.model.weights import Weights
from plait.types import Span

if TYPE_CHECKING:
    from plait.compute.stage import SpanCompute, TorchStage

KV_TOKENS_MAX = 16_384
DTYPES = ("fp32", "bf16", "int4", "int8")
AUTO = "auto"
"""Chosen when loading; see ``plait.compute.choice``."""


def preload() -> None:
    """Import what computing needs (some seconds), for instance before forking nodes.

    torch's thread pools come with the first computation; the one thread this starts is
    numpy's OpenBLAS, which handles forks.
    """
    import plait.compute.ragged
    import plait.compute.stage  # noqa: F401


def check_loadable(local: LocalModel, span: Span | None, dtype: str) -> None:
    """Raise ``ConfigError`` for a dtype or a span that ``load_stage`` would refuse."""
    layers = local.manifest.layers
    if dtype not in (*DTYPES, AUTO):
        known = ", ".join((*DTYPES, AUTO))
        raise ConfigError(f"there is no dtype {dtype!r}; {known} exist", remedy="--dtype fp32")
    if span is not None and span.end > layers:
        raise ConfigError(f"span {span} does not fit {local.name}, which has layers 0:{layers}")


def load_stage(
    local: LocalModel,
    span: Span,
    dtype: str = "fp32",
    threads: int = 1,
    kv_tokens_max: int = KV_TOKENS_MAX,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    disk: DiskRoom = DiskRoom(),  # noqa: B008 - frozen
) -> "TorchStage":
    """Read, verify and load the span's tensors, and nothing else of the file.

    ``dtype`` is one of ``DTYPES``, or ``AUTO`` to choose the fastest here whose answers are
    as good. ``progress`` gets (layers loaded, layers to load); ``disk`` is where prefixes are
    kept. Sets torch's thread count for the
    whole process. Raises ``ConfigError`` for a span, dtype, or number that cannot be, and
    ``ModelError`` naming the tensor that does not match the manifest.
    """
    check_loadable(local, span, dtype)
    if threads < 1 or kv_tokens_max < 1:
        raise ConfigError("compute threads and KV tokens must be at least 1")

    import torch

    from plait.compute.stage import TorchStage

    torch.set_num_threads(threads)
    return TorchStage(
        load_model(local, span, dtype, progress),
        local.manifest.shape,
        kv_tokens_max=kv_tokens_max,
        threads=threads,
        disk=disk,
        vocabulary=Vocabulary(lambda: Tokenizer.load(local), local.manifest.vocabulary_size),
    )


def load_model(
    local: LocalModel,
    span: Span,
    dtype: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "SpanCompute":
    """The arithmetic of a span alone; raises as ``load_stage`` does."""
    with GgufFile.open(local.weights_path) as gguf:
        return _load_span(Weights(gguf, local.manifest), span, dtype, progress)


def _load_span(
    weights: Weights, span: Span, dtype: str, progress: Callable[[int, int], None]
) -> "SpanCompute":
    if dtype == AUTO:
        from plait.compute.choice import choose_dtype

        dtype = choose_dtype(weights, span)
    from plait.compute.ragged import load_ragged

    return load_ragged(weights, span, dtype, progress)
