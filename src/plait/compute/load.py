"""Loads a span of a model for computing. Importing this module is cheap; torch and
transformers come with ``preload`` or the first ``load_stage``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from plait.errors import ConfigError
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.weights import Weights
from plait.types import Span

if TYPE_CHECKING:
    from plait.compute.stage import TorchStage

KV_TOKENS_MAX = 16_384


def preload() -> None:
    """Import what computing needs (some seconds), for instance before forking nodes.

    torch's thread pools come with the first computation; the one thread this starts is
    numpy's OpenBLAS, which handles forks.
    """
    import plait.compute.stage  # noqa: F401


def check_loadable(local: LocalModel, span: Span | None, dtype: str) -> None:
    """Raise ``ConfigError`` for a dtype or a span that ``load_stage`` would refuse."""
    layers = local.manifest.layers
    if dtype != "fp32":
        raise ConfigError(f"there is no dtype {dtype!r} yet; fp32 exists", remedy="--dtype fp32")
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
) -> "TorchStage":
    """Read, verify and load the span's tensors, and nothing else of the file.

    ``progress`` gets (layers loaded, layers to load). Sets torch's thread count for the
    whole process. Raises ``ConfigError`` for a span, dtype, or number that cannot be, and
    ``ModelError`` naming the tensor that does not match the manifest.
    """
    check_loadable(local, span, dtype)
    if threads < 1 or kv_tokens_max < 1:
        raise ConfigError("compute threads and KV tokens must be at least 1")

    import torch

    from plait.compute.hf import load_span
    from plait.compute.stage import TorchStage

    torch.set_num_threads(threads)
    with GgufFile.open(local.weights_path) as gguf:
        model = load_span(Weights(gguf, local.manifest), span, progress)
    shape = local.manifest.shape
    return TorchStage(model, shape, kv_tokens_max=kv_tokens_max, threads=threads)
