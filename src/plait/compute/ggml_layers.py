"""Halves of layers by ggml's kernels, each in one call, over the file's own codes.

ggml has fast layouts for Q4_0 and Q4_K, eight rows together. A Q4_1 matrix is one of Q4_0 with the
same codes and scales, and the offsets, plus 8 scales each, times the sums of each group of inputs,
in fp32. Activations are rounded to 8 bits, as llama.cpp does: per group of 32, of 256 in Q4_K.

A row's result is the same in any company: that is tried with several numbers of rows for each kind
of part when it is loaded, and where it does not hold, single rows go with a copy of themselves, or
rows in fours. At most ``TILE_ROWS`` rows go at a time.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.ggml import F32, Arena, Constant
from plait.compute.ggml_graph import Graph, Rotary
from plait.errors import LocalProtocolError
from plait.model.gguf_types import BY_NAME, TensorType
from plait.model.weights import Weights

TILE_ROWS = 128
_EXACT_ROWS = 16
"""Up to so many rows there is a graph for each number; then for each multiple of four."""
_TRIED = (1, 2, 3, 4, 5, 8)
GROUP = 32
_BARE, _OFFSET = BY_NAME["Q4_0"], BY_NAME["Q4_1"]
FAST = frozenset({"Q4_0", "Q4_1", "Q4_K"})
"""Formats that there are fast layouts for."""


class Matrix:
    """One weight, and what a format's offsets add to its products."""

    def __init__(self, packed: npt.NDArray[np.uint8], kind: TensorType, inputs: int) -> None:
        """``packed`` is [outputs, bytes of a row] as GGUF stores them."""
        self.inputs, self.outputs = inputs, len(packed)
        self._offsets: Constant | None = None
        if kind is _OFFSET:
            blocks = packed.reshape(-1, kind.group_bytes)
            bare = np.concatenate([blocks[:, :2], blocks[:, 4:]], axis=1)
            self._weight = Constant(bare, _BARE.code, self.inputs, self.outputs)
            scale, offset = (
                np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16)
                for start in (0, 2)
            )
            beyond = offset.astype(np.float32) + np.float32(8) * scale.astype(np.float32)
            turned = beyond.reshape(self.outputs, -1).T
            self._offsets = Constant(turned, F32, self.outputs, len(turned))
        else:
            self._weight = Constant(packed, kind.code, self.inputs, self.outputs)

    @classmethod
    def load(cls, weights: Weights, names: Sequence[str]) -> Self:
        """Tensors of one format and one width, joined. Raises ``ModelError`` on a bad one."""
        parts = [weights.rows(name) for name in names]
        packed = np.concatenate([part.packed for part in parts])
        return cls(packed, parts[0].type, parts[0].width)

    def product(self, graph: Graph, rows: int) -> int:
        """The products of rows with the matrix."""
        found = graph.product(self._weight.tensor, rows)
        if self._offsets is None:
            return found
        sums = graph.group_sums(rows, self.inputs, GROUP)
        return graph.added(found, graph.outer(self._offsets.tensor, sums))


def load_matrices(weights: Weights, names: Sequence[str]) -> list[Matrix]:
    """The matrices, neighbours of one format joined. Raises ``ModelError`` on a bad tensor."""
    groups: list[list[str]] = []
    for name in names:
        if groups and weights.type_of(groups[-1][0]) == weights.type_of(name):
            groups[-1].append(name)
        else:
            groups.append([name])
    return [Matrix.load(weights, group) for group in groups]


def _products(graph: Graph, matrices: Sequence[Matrix], rows: int) -> int:
    return graph.joined([matrix.product(graph, rows) for matrix in matrices])


Built = tuple[int, int]
"""The tensor where the result is, and the last operation, if that changes it in its place."""


class Program(Protocol):
    """What a part computes."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the inputs' rows; 0 of the rows' positions."""

    @property
    def outputs(self) -> int:
        """Width of a result's row."""

    def build(self, graph: Graph, given: Sequence[int]) -> Built:
        """Add it to a graph."""


@dataclass(frozen=True, slots=True)
class Projection:
    """(hidden, positions) -> queries, keys and values of its norm, the former two turned."""

    norm: Constant
    epsilon: float
    matrices: Sequence[Matrix]
    bias: Constant | None
    rotary: Rotary

    @property
    def widths(self) -> tuple[int, ...]:
        """See ``Program.widths``."""
        return self.norm.inputs, 0

    @property
    def outputs(self) -> int:
        """See ``Program.outputs``."""
        return sum(matrix.outputs for matrix in self.matrices)

    def build(self, graph: Graph, given: Sequence[int]) -> Built:
        """See ``Program.build``."""
        hidden, positions = given
        normed = graph.normed(hidden, self.norm.tensor, self.epsilon)
        found = _products(graph, self.matrices, normed)
        if self.bias is not None:
            found = graph.added(found, self.bias.tensor)
        return found, graph.turned(found, self.outputs, positions, self.rotary)


@dataclass(frozen=True, slots=True)
class LayerEnd:
    """(attended, hidden) -> hidden behind the layer, rounded to bf16; then the model's last norm,
    if this is its last layer."""

    output: Matrix
    norm: Constant
    epsilon: float
    gate_up: Sequence[Matrix]
    down: Matrix
    final_norm: Constant | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """See ``Program.widths``."""
        return self.output.inputs, self.norm.inputs

    @property
    def outputs(self) -> int:
        """See ``Program.outputs``."""
        return self.down.outputs

    def build(self, graph: Graph, given: Sequence[int]) -> Built:
        """See ``Program.build``."""
        attended, hidden = given
        summed = graph.added(self.output.product(graph, attended), hidden)
        normed = graph.normed(summed, self.norm.tensor, self.epsilon)
        active = graph.gated(_products(graph, self.gate_up, normed))
        result = graph.rounded(graph.added(self.down.product(graph, active), summed))
        if self.final_norm is not None:
            result = graph.normed(result, self.final_norm.tensor, self.epsilon)
        return result, result


@dataclass(frozen=True, slots=True)
class _Built:
    graph: Graph
    inputs: Sequence[int]
    """Addresses."""
    output: int


class Part:
    """A program as graphs for numbers of rows, made when first needed."""

    def __init__(self, program: Program, arena: Arena, pad: Callable[[int], int] | None) -> None:
        """``pad`` gives how many rows to compute for so many; None to find it out."""
        self.program = program
        self._outputs = program.outputs
        self._arena = arena
        self._built: dict[int, _Built] = {}
        self._build(TILE_ROWS)  # that it fits shows when loading
        self.pad = pad or self._padding()

    def rows(self, *given: torch.Tensor) -> torch.Tensor:
        """[n, …] each -> [n, outputs]; each row's result is the same in any company."""
        count = given[0].shape[0]
        if count > TILE_ROWS:
            tiles = zip(*(one.split(TILE_ROWS) for one in given), strict=True)
            return torch.cat([self.rows(*tile) for tile in tiles])
        return self._computed(self.pad(count), given)

    def _computed(self, rows: int, given: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of a graph for ``rows``, of which the first ones are given; others hold anything."""
        built = self._built.get(rows) or self._build(rows)
        for place, one in zip(built.inputs, given, strict=True):
            one = one.contiguous()
            ctypes.memmove(place, one.data_ptr(), one.nbytes)
        self._arena.compute(built.graph.graph)
        result = torch.empty(given[0].shape[0], self._outputs)
        ctypes.memmove(result.data_ptr(), built.output, result.nbytes)
        return result

    def _build(self, rows: int) -> _Built:
        graph = Graph(self._arena, rows)
        given = [graph.given(width) for width in self.program.widths]
        result, last = self.program.build(graph, given)
        graph.finished(last)
        inputs = [graph.places[one] for one in given]
        built = self._built[rows] = _Built(graph, inputs, graph.places[result])
        return built

    def _padding(self) -> Callable[[int], int]:
        """The cheapest of some ways to fill up rows by which a row is the same in any company."""
        chance = torch.Generator().manual_seed(1)
        most = max(_TRIED)
        given = [
            torch.randn(most, width, generator=chance)
            if width
            else torch.arange(most, dtype=torch.int32) * 100
            for width in self.program.widths
        ]
        for pad in (_as_they_are, _at_least_two, _in_fours):
            results = [
                self._computed(pad(count), [one[:count] for one in given]) for count in _TRIED
            ]
            if all(torch.equal(found, results[-1][: len(found)]) for found in results):
                return pad
        raise LocalProtocolError("ggml's products of a row depend on the rows beside it")


def _as_they_are(rows: int) -> int:
    return rows if rows <= _EXACT_ROWS else _in_fours(rows)


def _at_least_two(rows: int) -> int:
    return _as_they_are(max(2, rows))


def _in_fours(rows: int) -> int:
    return -(-rows // 4) * 4


@dataclass(frozen=True, slots=True)
class _Bare:
    """rows -> their products with one matrix."""

    matrix: Matrix

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.matrix.inputs,)

    @property
    def outputs(self) -> int:
        return self.matrix.outputs

    def build(self, graph: Graph, given: Sequence[int]) -> Built:
        result = self.matrix.product(graph, given[0])
        return result, result


def bare_part(matrix: Matrix, threads: int) -> Part:
    """One matrix alone, with an arena of its own: to try and to time it."""
    numbers = 2 * (matrix.inputs + 2 * matrix.outputs)
    return Part(_Bare(matrix), Arena(4 * TILE_ROWS * numbers, threads), None)
