"""Which dtype ``auto`` stands for: the fastest here, of those as good as fp32.

Good is a mean KL divergence from fp32 of at most 0.005, which fp32, bf16 and int4 (taken
from the file's own codes) keep and int8 does not. Fast is what one row costs in steps of
different numbers of rows, weighed by how often a stage sees them. What is timed is the
multiplication with matrices of the model's width, on the device and with the threads that
will compute; it takes about a second. The outcome is named in the numeric class.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from plait.compute.linear import Bf16Linear, Fp32Linear, Int4Linear, Linear
from plait.model.gguf_types import NIBBLE_GROUP, Nibbles
from plait.model.weights import Weights
from plait.types import Span

SHARES: Mapping[int, float] = {1: 0.5, 4: 0.3, 16: 0.2}
"""Rows of a step, and the part of all rows that are assumed to come in such steps."""

_WEIGHTS_MAX = 1 << 21  # of one matrix
_MATRICES = 8  # taken in turn, so that a cache does not hold what a model's would not
_PASSES = 3


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
    """The dtype to load ``span`` in: fp32, bf16, or int4 if the file is in 4 bits there."""
    config = weights.config
    dtypes = ["fp32", "bf16"]
    if len(weights.nibbles(f"blk.{span.start}.ffn_gate.weight")) == 1:
        dtypes.append("int4")
    return fastest(measured(dtypes, config.hidden_size, config.feed_forward_size)).dtype


def fastest(table: Sequence[Timing]) -> Timing:
    """The one of the lowest cost of a row; the earlier one among equals."""
    return min(table, key=lambda timing: timing.row_us)


@torch.inference_mode()
def measured(dtypes: Sequence[str], inputs: int, outputs: int) -> list[Timing]:
    """Time each dtype on this machine, in turns, on matrices of [outputs, inputs] or less."""
    outputs = max(16, min(outputs, _WEIGHTS_MAX // inputs) // 16 * 16)
    matrices = {dtype: _matrices(dtype, inputs, outputs) for dtype in dtypes}
    table: dict[str, dict[int, float]] = {dtype: {} for dtype in dtypes}
    for rows in SHARES:
        given = torch.ones(rows, inputs)
        passes: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
        for _ in range(1 + _PASSES):
            for dtype in dtypes:
                passes[dtype].append(_pass_us(matrices[dtype], given))
        for dtype in dtypes:  # the first pass warms up
            table[dtype][rows] = median(passes[dtype][1:]) / _MATRICES
    return [Timing(dtype, "cpu", table[dtype]) for dtype in dtypes]


def _matrices(dtype: str, inputs: int, outputs: int) -> list[Linear]:
    if dtype == "int4":
        codes = np.full((outputs, inputs), 5, np.uint8)
        scale = np.full((outputs, inputs // NIBBLE_GROUP), 0.1, np.float32)
        return [Int4Linear(Nibbles(codes, scale, -scale)) for _ in range(_MATRICES)]
    made: Callable[[torch.Tensor], Linear] = Fp32Linear if dtype == "fp32" else Bf16Linear
    return [made(torch.full((outputs, inputs), 0.1)) for _ in range(_MATRICES)]


def _pass_us(matrices: Sequence[Linear], given: torch.Tensor) -> float:
    started = time.perf_counter()
    for matrix in matrices:
        matrix.rows(given)
    return (time.perf_counter() - started) * 1e6
