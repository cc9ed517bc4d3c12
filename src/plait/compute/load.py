"""Loads a span of a model for computing. Importing this module is cheap; torch
comes with ``preload`` or the first ``load_stage``."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from plait.compute.device import CPU, Device, check_dtype, kv_tokens_within
from plait.compute.grammar import Vocabulary
from plait.compute.spill import DiskRoom
from plait.errors import ConfigError
from plait.model.gguf_reader import GgufFile
from plait.model.local import LocalModel
from plait.model.tokenizer import Tokenizer
from plait.model.weights import Weights
from plait.types import Span

if TYPE_CHECKING:
    from plait.compute.device_memory import DeviceMemory
    from plait.compute.stage import SpanCompute, TorchStage

KV_TOKENS_MAX = 16_384
DTYPES = ("fp32", "bf16", "int4", "int8")
ACCELERATOR_DTYPES = (*DTYPES, "fp16")
INT4_KERNELS = {"ggml": "ggml-w4a8-v2", "mlas": "mlas-w4a8", "torch": "torch"}
"""What may multiply int4 on the CPU, by the names that ``int4/NAME`` takes as a dtype; else
``choice.int4_kernel`` says."""
AUTO = "auto"
"""Chosen when loading: see ``plait.compute.choice``. On an accelerator it is the 16-bit type that
it has, by rule: nothing was measured on one."""


def preload() -> None:
    """Import what computing needs (some seconds), for instance before forking nodes.

    torch's thread pools come with the first computation; the one thread this starts is
    numpy's OpenBLAS, which handles forks.
    """
    import plait.compute.ragged
    import plait.compute.stage  # noqa: F401


def check_loadable(
    local: LocalModel, span: Span | None, dtype: str, device: Device | None = CPU
) -> None:
    """Raise ``ConfigError`` for a dtype or a span that ``load_stage`` would refuse.

    ``device`` None is one that is not known yet.
    """
    layers = local.manifest.layers
    kernels = [f"int4/{kernel}" for kernel in INT4_KERNELS]
    if dtype not in (*ACCELERATOR_DTYPES, *kernels, AUTO):
        known = ", ".join((*ACCELERATOR_DTYPES, *kernels, AUTO))
        raise ConfigError(f"there is no dtype {dtype!r}; {known} exist", remedy="--dtype fp32")
    if device is not None:
        check_dtype(device, dtype)
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
    memory: "DeviceMemory | None" = None,
) -> "TorchStage":
    """Read, verify and load the span's tensors, and nothing else of the file.

    ``dtype`` is one of ``DTYPES``, int4 with a kernel's name (``int4/ggml``), or ``AUTO`` to choose
    the fastest here whose answers are as good. ``progress`` gets (layers loaded, layers to load);
    ``disk`` is where prefixes are kept. ``memory`` is that of the device to compute on, the host's
    if it is None; an accelerator's KV cache is made smaller than ``kv_tokens_max`` where its
    memory is.
    Sets torch's thread count for the whole process.

    Raises ``ConfigError`` for a span, dtype, or number that cannot be or where the device has no
    room, and ``ModelError`` naming the tensor that does not match the manifest.
    """
    check_loadable(local, span, dtype, CPU if memory is None else memory.device)
    if threads < 1 or kv_tokens_max < 1:
        raise ConfigError("compute threads and KV tokens must be at least 1")

    import torch

    from plait.compute.device_memory import HOST
    from plait.compute.stage import TorchStage

    torch.set_num_threads(threads)
    memory = memory or HOST
    model = load_model(local, span, dtype, progress, memory)
    return TorchStage(
        model,
        local.manifest.shape,
        kv_tokens_max=kv_tokens_within(
            kv_tokens_max, model.layout.position_bytes, memory.free_bytes()
        ),
        threads=threads,
        disk=disk,
        memory=memory,
        vocabulary=Vocabulary(lambda: Tokenizer.load(local), local.manifest.vocabulary_size),
    )


def load_model(
    local: LocalModel,
    span: Span,
    dtype: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: "DeviceMemory | None" = None,
) -> "SpanCompute":
    """The arithmetic of a span alone; raises as ``load_stage`` does."""
    with GgufFile.open(local.weights_path) as gguf:
        return _load_span(Weights(gguf, local.manifest), span, dtype, progress, memory)


def _load_span(
    weights: Weights,
    span: Span,
    dtype: str,
    progress: Callable[[int, int], None],
    memory: "DeviceMemory | None",
) -> "SpanCompute":
    from plait.compute.choice import choose_dtype, int4_kernel
    from plait.compute.device_memory import HOST
    from plait.compute.ragged import load_ragged

    memory = memory or HOST
    if dtype == AUTO:
        accelerated = memory.device.is_accelerator
        dtype = memory.device.half if accelerated else choose_dtype(weights, span)
    dtype, _, named = dtype.partition("/")
    kernel = ""
    if dtype == "int4" and not memory.device.is_accelerator:
        kernel = INT4_KERNELS[named] if named else int4_kernel()
    return load_ragged(weights, span, dtype, progress, memory, kernel)
