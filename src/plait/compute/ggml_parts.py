"""Loads the layers of a stage for ggml, and its head.

A half of a layer with a matrix of a format that ggml has no fast layout for is onnxruntime's
(``ort.py``), which is faster there, and so is the head.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from plait.compute import ort
from plait.compute.ggml import ALIGNMENT, F32, Arena, Constant
from plait.compute.ggml_attention import Heads
from plait.compute.ggml_graph import NODES_MAX, Rotary
from plait.compute.ggml_layers import (
    FAST,
    GROUP,
    TILE_ROWS,
    LayerEnd,
    Matrix,
    Part,
    Program,
    Projection,
    load_matrices,
)
from plait.compute.ggml_span import GgmlSpan
from plait.compute.layers import Half, HalvedLayer, tensor_names
from plait.model.config import FINAL_NORM
from plait.model.weights import Weights

KERNEL = "ggml-w4a8-v2"
"""The kernels' name in the numeric class: 4-bit weights, activations rounded to 8 bits; since the
second version attention of few rows is ggml's, too."""


class GgmlParts:
    """Loads the layers and the head of one stage; the halves share an arena."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        config = weights.config
        attention = (config.heads + 2 * config.kv_heads) * config.head_size
        # Of a row: inputs, sums and norms; projections with what is added; gates; group sums.
        numbers = 12 * config.hidden_size + 6 * attention + 8 * config.feed_forward_size
        numbers += (config.hidden_size + config.feed_forward_size) // GROUP * 4
        size = 4 * numbers * TILE_ROWS + NODES_MAX * ALIGNMENT
        self._arena = Arena(size, torch.get_num_threads())
        self._row_bytes = 4 * numbers
        self._layers: list[HalvedLayer] = []
        self._pads: dict[tuple[str, ...], Callable[[int], int]] = {}
        factors = weights.rotary_factors()
        self._rotary = Rotary(
            heads=config.heads + config.kv_heads,
            head_size=config.head_size,
            base=config.rope_base,
            factors=None if factors is None else _row(factors),
        )

    def layer(self, index: int) -> HalvedLayer:
        """Layer ``index``. Raises ``ModelError`` on a bad tensor."""
        projection, end = self._projection(index), self._end(index)
        # Ours apply the rotary embedding, round and norm; onnxruntime's leave that to others.
        turns, rounds = isinstance(projection, Part), isinstance(end, Part)
        norms = rounds and self._is_last(index)
        layer = HalvedLayer(projection, end, turns=turns, rounds=rounds, norms=norms)
        self._layers.append(layer)
        return layer

    def head(self) -> ort.Part:
        """The last matrix."""
        return ort.load_ort_head(self._weights, self._weights.config.head_tensor)

    def span(self) -> GgmlSpan:
        """What takes items of few rows through the layers that were loaded, one after the other."""
        config = self._weights.config
        heads = Heads(config.heads, config.kv_heads, config.head_size)
        threads = torch.get_num_threads()
        return GgmlSpan(
            self._layers, heads, self._rotary, config.hidden_size, self._row_bytes, threads
        )

    def kernel(self) -> str:
        """What multiplies."""
        return KERNEL

    def _projection(self, index: int) -> Half:
        names = tensor_names(index, "attn_q", "attn_k", "attn_v")
        if not self._is_fast(names):
            return ort.load_projection(self._weights, index)
        bias = self._weights.bias(index)
        program = Projection(
            _row(self._weights.fp32(*tensor_names(index, "attn_norm"))),
            self._weights.config.norm_epsilon,
            load_matrices(self._weights, names),
            None if bias is None else _row(bias),
            self._rotary,
        )
        return self._part(program, names)

    def _end(self, index: int) -> Half:
        names = tensor_names(index, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        if not self._is_fast(names):
            return ort.load_layer_end(self._weights, index)
        program = LayerEnd(
            Matrix.load(self._weights, names[:1]),
            _row(self._weights.fp32(*tensor_names(index, "ffn_norm"))),
            self._weights.config.norm_epsilon,
            load_matrices(self._weights, names[1:3]),
            Matrix.load(self._weights, names[3:]),
            _row(self._weights.fp32(FINAL_NORM)) if self._is_last(index) else None,
        )
        return self._part(program, names)

    def _is_last(self, index: int) -> bool:
        return index + 1 == self._weights.config.layers

    def _is_fast(self, names: Sequence[str]) -> bool:
        return {self._weights.type_of(name) for name in names} <= FAST

    def _part(self, program: Program, names: Sequence[str]) -> Part:
        """Parts of the same formats are tried once."""
        kinds = (type(program).__name__, *(self._weights.type_of(name) for name in names))
        part = Part(program, self._arena, self._pads.get(kinds))
        self._pads[kinds] = part.pad
        return part


def _row(values: npt.NDArray[np.float32]) -> Constant:
    return Constant(values, F32, len(values))
