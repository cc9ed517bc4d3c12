"""Layers and heads by onnxruntime's 4-bit kernels; ``ort_graph.py`` says what they compute.

A row's result is the same in any company, of its own item too: kernels add up each row by
itself, but the one for a single row may do so in another order than the one for several.
That is tried on every part when it is loaded; where they differ, a single row goes together
with a copy of itself. At most ``TILE_ROWS`` rows go at a time, because larger products are
cut on the way, which may leave a single row.

onnxruntime starts a thread when it is imported, so it is only imported to load weights:
processes that fork before are safe.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.layers import HalvedLayer, tensor_names
from plait.compute.ort_graph import (
    Dense,
    Matrix,
    head_graph,
    layer_end_graph,
    projection_graph,
    quantised,
)
from plait.model.weights import Weights

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

KERNEL = "mlas-w4a8"
"""The kernels' name in the numeric class: 4-bit weights, activations rounded to 8 bits."""
TILE_ROWS = 128


class Part:
    """A graph whose inputs and output are rows of ``widths`` and of some width."""

    def __init__(self, graph: bytes, threads: int) -> None:
        import onnxruntime

        options = _options(threads)
        self._session: InferenceSession = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"]
        )
        # It keeps the bytes to start again on another device: a second copy of the weights.
        vars(self._session).pop("_model_bytes", None)
        self._inputs = [given.name for given in self._session.get_inputs()]
        self._outputs = [found.name for found in self._session.get_outputs()]
        self._fewest_rows = 1 if self._single_row_is_as_others() else 2

    def rows(self, *given: torch.Tensor) -> torch.Tensor:
        """[n, …] each -> [n, outputs]; each row's result is the same in any company."""
        count = given[0].shape[0]
        if count > TILE_ROWS:
            tiles = zip(*(one.split(TILE_ROWS) for one in given), strict=True)
            return torch.cat([self.rows(*tile) for tile in tiles])
        if count < self._fewest_rows:
            pairs = [torch.cat([one, one]) for one in given]
            return torch.from_numpy(self._run([pair.numpy() for pair in pairs]))[:count]
        return torch.from_numpy(self._run([one.numpy() for one in given]))

    def _single_row_is_as_others(self) -> bool:
        chance = np.random.default_rng(1)
        widths = [given.shape[1] for given in self._session.get_inputs()]
        pair = [chance.standard_normal((2, width), np.float32) for width in widths]
        return np.array_equal(self._run([one[:1] for one in pair]), self._run(pair)[:1])

    def _run(self, given: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        found: list[npt.NDArray[np.float32]] = self._session.run(
            self._outputs, dict(zip(self._inputs, given, strict=True))
        )
        return found[0]


def load_ort_layer(weights: Weights, index: int) -> HalvedLayer:
    """Layer ``index`` in int4. Raises ``ModelError`` on a bad tensor."""
    return HalvedLayer(load_projection(weights, index), load_layer_end(weights, index))


def load_projection(weights: Weights, index: int) -> Part:
    """The half before a layer's attention. Raises ``ModelError`` on a bad tensor."""
    (norm,) = tensor_names(index, "attn_norm")
    matrices = [_matrix(weights, n) for n in tensor_names(index, "attn_q", "attn_k", "attn_v")]
    epsilon, bias = weights.config.norm_epsilon, weights.bias(index)
    return _part(projection_graph(weights.fp32(norm), epsilon, matrices, bias))


def load_layer_end(weights: Weights, index: int) -> Part:
    """The half behind a layer's attention. Raises ``ModelError`` on a bad tensor."""
    (norm,) = tensor_names(index, "ffn_norm")
    output, gate, up, down = (
        _matrix(weights, name)
        for name in tensor_names(index, "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    )
    epsilon = weights.config.norm_epsilon
    return _part(layer_end_graph(output, weights.fp32(norm), epsilon, [gate, up], down))


def load_ort_head(weights: Weights, name: str) -> Part:
    """The head's matrix in int4, or in 8 bits if it is stored in as many."""
    return _part(head_graph(_matrix(weights, name)))


def _part(graph: bytes) -> Part:
    return Part(graph, torch.get_num_threads())


def _matrix(weights: Weights, name: str) -> Matrix:
    found = quantised(weights.nibbles(name))
    return Dense(weights.fp32(name)) if found is None else found


def _options(threads: int) -> "SessionOptions":
    from onnxruntime import SessionOptions

    options = SessionOptions()
    options.inter_op_num_threads = 1
    # Each part has a pool of its own: the one of the process could have one size for ever.
    options.intra_op_num_threads = threads
    # Parts would each keep what their largest step took.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
