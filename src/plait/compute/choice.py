"""Which dtype ``auto`` stands for: the fastest here, of those as good as fp32.

Good is a mean KL divergence from fp32 of at most 0.005, which fp32, bf16 and int4 (taken
from the file's own codes) keep and int8 does not. Fast is what one row costs in steps of
different numbers of rows, weighed by how often a stage sees them. What is timed is the
multiplication with matrices of the model's width, on the device and with the threads that
will compute; it takes about a second. The outcome is named in the numeric class.

int4 has three kernels: torch's, ggml's and onnxruntime's. Which one a processor gets is a rule
and no timing: replicas on machines of one kind have to be of one numeric class to take over
from each other.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from plait.compute import ggml, ggml_layers, ggml_parts, ort
from plait.compute.linear import (
    Bf16Linear,
    Fp32Linear,
    Int4Linear,
    SumLinear,
    has_bf16,
    nibble_planes,
)
from plait.compute.ort_graph import head_graph, quantised
from plait.model.gguf_types import BY_NAME, NIBBLE_GROUP, Nibbles
from plait.model.weights import Weights
from plait.types import Span

SHARES: Mapping[int, float] = {1: 0.5, 4: 0.3, 16: 0.2}
"""Rows of a step, and the part of all rows that are assumed to come in such steps."""

_WEIGHTS_MAX = 1 << 21  # of one matrix
_MATRICES = 8  # taken in turn, so that a cache does not hold what a model's would not
_PASSES = 5
TORCH_INT4 = "torch"


class Rows(Protocol):
    """Something that multiplies."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, inputs] -> [n, outputs]."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one product in ``dtype`` on ``device`` by the number of rows."""

    dtype: str
    device: str
    step_us: Mapping[int, float]

    @property
    def row_us(self) -> float:
        """What a row costs on average."""
        return sum(share * self.step_us[rows] / rows for rows, share in SHARES.items())


def choose_dtype(weights: Weights, span: Span) -> str:
    """The dtype to load ``span`` in: fp32, bf16, or int4 if the file has codes there that its
    kernel takes: of 4 bits, or of 5 to 8, which cost more."""
    config = weights.config
    dtypes, planes = ["fp32", "bf16"], nibble_planes(weights, f"blk.{span.start}.ffn_gate.weight")
    if planes:
        dtypes.append("int4")
    sizes = (config.hidden_size, config.feed_forward_size)
    return fastest(measured(dtypes, *sizes, planes=len(planes))).dtype


def fastest(table: Sequence[Timing]) -> Timing:
    """The one of the lowest cost of a row; the earlier one among equals."""
    return min(table, key=lambda timing: timing.row_us)


def int4_kernel() -> str:
    """``TORCH_INT4`` where the processor multiplies bf16, which it takes; ggml's on x86 with AVX2,
    which its package is built for; else ``ort.KERNEL``.

    ADR 15 and ADR 19 have what was measured.
    """
    if has_bf16():
        return TORCH_INT4
    avx2 = platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    return ggml_parts.KERNEL if avx2 and ggml.shared_object() is not None else ort.KERNEL


@torch.inference_mode()
def measured(dtypes: Sequence[str], inputs: int, outputs: int, *, planes: int = 1) -> list[Timing]:
    """Time each dtype on this machine, in turns, on matrices of [outputs, inputs] or less.

    ``planes`` of 4 bits make up a matrix in int4: one, or two.
    """
    outputs = _fitting(inputs, outputs)
    matrices = {dtype: _matrices(dtype, inputs, outputs, planes) for dtype in dtypes}
    return [Timing(dtype, "cpu", times) for dtype, times in _timed(matrices, inputs).items()]


def _timed(matrices: Mapping[str, Sequence[Rows]], inputs: int) -> dict[str, dict[int, float]]:
    """Microseconds of a product by name and number of rows."""
    table: dict[str, dict[int, float]] = {name: {} for name in matrices}
    for rows in SHARES:
        given = torch.ones(rows, inputs)
        passes: dict[str, list[float]] = {name: [] for name in matrices}
        for _ in range(1 + _PASSES):
            for name, alike in matrices.items():
                passes[name].append(_pass_us(alike, given))
        for name, times in passes.items():  # the first pass warms up
            table[name][rows] = min(times[1:]) / _MATRICES  # other work only adds
    return table


def _fitting(inputs: int, outputs: int) -> int:
    return max(16, min(outputs, _WEIGHTS_MAX // inputs) // 16 * 16)


def _matrices(dtype: str, inputs: int, outputs: int, planes: int) -> Sequence[Rows]:
    if dtype == "int4":
        return _int4(int4_kernel(), inputs, outputs, planes)
    made: Callable[[torch.Tensor], Rows] = Fp32Linear if dtype == "fp32" else Bf16Linear
    return [made(torch.full((outputs, inputs), 0.1)) for _ in range(_MATRICES)]


def _int4(kernel: str, inputs: int, outputs: int, planes: int) -> Sequence[Rows]:
    codes = np.random.default_rng(1).integers(0, 16, (outputs, inputs), np.uint8)
    scale = np.full((outputs, inputs // NIBBLE_GROUP), 0.1, np.float32)
    weights = [Nibbles(codes, scale, -scale)]
    if planes > 1:
        weights.insert(0, Nibbles(codes, scale * np.float32(16), scale * np.float32(-128)))
    if kernel == ggml_parts.KERNEL and planes == 1:
        blocks = np.random.default_rng(1).integers(0, 64, (outputs, inputs // 32 * 18), np.uint8)
        made = [ggml_layers.Matrix(blocks, BY_NAME["Q4_0"], inputs) for _ in range(_MATRICES)]
        return [ggml_layers.bare_part(one, torch.get_num_threads()) for one in made]
    if kernel == TORCH_INT4:
        terms = [[Int4Linear(plane) for plane in weights] for _ in range(_MATRICES)]
        return [SumLinear(term) for term in terms]
    matrix = quantised(weights)
    assert matrix is not None
    graph = head_graph(matrix)
    return [ort.Part(graph, torch.get_num_threads()) for _ in range(_MATRICES)]


def _pass_us(matrices: Sequence[Rows], given: torch.Tensor) -> float:
    started = time.perf_counter()
    for matrix in matrices:
        matrix.rows(given)
    return (time.perf_counter() - started) * 1e6
