"""Graphs of ggml's operations over rows, built once and computed many times.

Addresses and lengths that change from one computation to the next are written into the graph's
tensors (``Moves``). Where ``struct ggml_tensor`` has them is looked up in a tensor made for that,
so that no layout is assumed.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from plait.compute.ggml import (
    ALIGNMENT,
    BF16,
    F32,
    I32,
    I64,
    Arena,
    Constant,
    Foreign,
    InitParams,
    library,
)
from plait.errors import LocalProtocolError

NumberT = TypeVar("NumberT", bound=np.generic)

NODES_MAX = 64
"""Tensors of a layer, or half of one, but for those of each row's attention."""
_WORD = 8
"""Bytes of a size, a stride or an address."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding of the first ``heads`` heads of a row.

    Neighbours turn together, as llama's files have them (ggml's mode 0).
    """

    heads: int
    head_size: int
    base: float
    factors: Constant | None


class Graph:
    """A graph over ``rows`` rows while it is built; then run by ``Arena.compute``.

    Methods add an operation and give its tensor. Tensors are [width, rows] in ggml's order of
    dimensions, which is numpy's [rows, width].
    """

    def __init__(self, arena: Arena, rows: int, nodes: int = NODES_MAX) -> None:
        """``nodes`` is the most tensors that it may have."""
        lib = self.lib = library()
        self.rows, self.nodes = rows, nodes
        self.arena = arena
        self.used, self.limit = 0, arena.size
        """What of the arena is taken, and up to where it may be; whoever builds may go back
        where nothing is needed any more."""
        size = nodes * lib.ggml_tensor_overhead()
        size += lib.ggml_graph_overhead_custom(nodes, False)
        self.words = np.zeros(-(-size // _WORD), np.int64)
        """Where the graph's tensors are described."""
        memory = self.words.ctypes.data
        self.context: int = lib.ggml_init(InitParams(self.words.nbytes, memory, True))
        self.graph: int = lib.ggml_new_graph_custom(self.context, nodes, False)
        self.places: dict[int, int] = {}
        """Addresses of the tensors' data."""

    def __del__(self) -> None:
        if getattr(self, "context", None):
            self.lib.ggml_free(self.context)

    def check_room(self) -> None:
        """Raise ``LocalProtocolError`` if the graph has more tensors than were allowed."""
        used: int = self.lib.ggml_used_mem(self.context)
        spare = self.words.nbytes - used
        if spare < self.lib.ggml_tensor_overhead():
            raise LocalProtocolError(f"a graph of {self.rows} rows has over {self.nodes} tensors")

    def given(self, width: int) -> int:
        """An input, [rows, width] in fp32; positions, [rows] in int32, if ``width`` is 0."""
        if not width:
            return self.numbers(self.rows)
        return self.placed(self.lib.ggml_new_tensor_2d(self.context, F32, width, self.rows))

    def numbers(self, count: int, *, wide: bool = False) -> int:
        """An input of whole numbers, int32 or int64."""
        kind = I64 if wide else I32
        return self.placed(self.lib.ggml_new_tensor_1d(self.context, kind, count))

    def array(self, tensor: int, kind: type[NumberT], *shape: int) -> npt.NDArray[NumberT]:
        """A tensor's numbers where they are, to write before the graph runs or to read after."""
        size = math.prod(shape) * np.dtype(kind).itemsize
        memory = (ctypes.c_char * size).from_address(self.places[tensor])
        return np.frombuffer(memoryview(memory).cast("B"), kind).reshape(shape)

    def finished(self, result: int) -> None:
        """``result``, and what it needs, is computed after all that was so before."""
        self.lib.ggml_build_forward_expand(self.graph, result)

    def product(self, weight: int, rows: int) -> int:
        """Rows times a weight."""
        return self.placed(self.lib.ggml_mul_mat(self.context, weight, rows))

    def group_sums(self, rows: int, width: int, group: int) -> int:
        """[rows, width / group]."""
        lib, context, groups = self.lib, self.context, width // group
        split = self.view(lib.ggml_reshape_3d(context, rows, group, groups, self.rows))
        sums = self.placed(lib.ggml_sum_rows(context, split))
        return self.view(lib.ggml_reshape_2d(context, sums, groups, self.rows))

    def outer(self, weight: int, rows: int) -> int:
        """Rows times a weight of fp32 that is stored [inputs, outputs]."""
        turned = self.view(self.lib.ggml_transpose(self.context, rows))
        return self.placed(self.lib.ggml_out_prod(self.context, weight, turned))

    def added(self, one: int, other: int) -> int:
        """The sum; ``other`` may be one row."""
        return self.placed(self.lib.ggml_add(self.context, one, other))

    def normed(self, rows: int, weight: int, epsilon: float) -> int:
        """RMS norm, times a row of weights."""
        mean = self.placed(self.lib.ggml_rms_norm(self.context, rows, epsilon))
        return self.placed(self.lib.ggml_mul(self.context, mean, weight))

    def gated(self, rows: int) -> int:
        """silu of the first half of each row, times the second."""
        return self.placed(self.lib.ggml_swiglu(self.context, rows))

    def turned(self, rows: int, width: int, positions: int, rotary: Rotary) -> int:
        """The rotary embedding of the first heads of rows, which are changed in their place."""
        lib, size, number = self.lib, rotary.head_size, 4
        strides = (size * number, width * number, 0)
        view = lib.ggml_view_3d(self.context, rows, size, rotary.heads, self.rows, *strides)
        factors = None if rotary.factors is None else rotary.factors.tensor
        plain = (rotary.base, 1.0, 0.0, 1.0, 0.0, 0.0)  # no scaling of positions
        return self.view(
            lib.ggml_rope_ext_inplace(
                self.context, self.view(view), positions, factors, size, 0, 0, *plain
            )
        )

    def rounded(self, rows: int) -> int:
        """Rounded to bf16, to the nearest, ties to even; in fp32 again."""
        half = self.placed(self.lib.ggml_cast(self.context, rows, BF16))
        return self.placed(self.lib.ggml_cast(self.context, half, F32))

    def joined(self, parts: Sequence[int]) -> int:
        """Rows side by side."""
        whole = parts[0]
        for part in parts[1:]:
            whole = self.placed(self.lib.ggml_concat(self.context, whole, part, 0))
        return whole

    def placed(self, tensor: int) -> int:
        """The tensor, with room in the arena."""
        place = self.arena.base + self.used
        self.used += -(-self.lib.ggml_nbytes(tensor) // ALIGNMENT) * ALIGNMENT
        if self.used > self.limit:
            raise LocalProtocolError(f"{self.rows} rows do not fit {self.arena.size} bytes")
        return self.placed_at(tensor, place)

    def placed_at(self, tensor: int, place: int, memory: Foreign | None = None) -> int:
        """The tensor, its data at an address in the arena, or in memory of somebody else's."""
        buffer = (memory or self.arena).buffer
        self.lib.ggml_backend_tensor_alloc(buffer, tensor, place)
        self.places[tensor] = place
        return tensor

    def view(self, tensor: int) -> int:
        """The tensor, a view of one that has room."""
        self.lib.ggml_backend_view_init(tensor)
        return tensor

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What gets room inside leaves it to what comes after."""
        used = self.used
        yield
        self.used = used


class Moves:
    """Sizes, strides and addresses of a graph's tensors that follow two numbers of a row.

    ``starts`` is the slot where a row's keys begin, and ``lengths`` how many it sees.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._added: list[tuple[int, ...]] = []
        self._table: npt.NDArray[np.int64] | None = None

    def size(self, row: int, tensor: int, dimension: int) -> None:
        """The size in a dimension is the row's length."""
        self._add(row, tensor, fields().sizes + dimension, 0, 0, 1)

    def stride(self, row: int, tensor: int, dimension: int, of_one: int) -> None:
        """The stride is so many bytes times the row's length."""
        self._add(row, tensor, fields().strides + dimension, 0, 0, of_one)

    def data(self, row: int, tensor: int, base: int, of_slot: int, of_length: int) -> None:
        """The address is ``base`` plus so many bytes for each slot, and each of the length."""
        self._add(row, tensor, fields().data, base, of_slot, of_length)

    def apply(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> None:
        """Write them, for [rows] each."""
        if self._table is None:
            self._table = np.array(self._added, np.int64).T.copy()
            self._added.clear()
        row, word, constant, of_slot, of_length = self._table
        self._graph.words[word] = constant + of_slot * starts[row] + of_length * lengths[row]

    def _add(self, row: int, tensor: int, field: int, *follows: int) -> None:
        word = (tensor - self._graph.words.ctypes.data) // _WORD + field
        self._added.append((row, word, *follows))


@dataclass(frozen=True, slots=True)
class TensorFields:
    """Where a tensor's description has what, in words from its beginning."""

    sizes: int
    strides: int
    data: int


@cache
def fields() -> TensorFields:
    """Found in a tensor whose sizes occur in nothing else.

    Raises ``LocalProtocolError`` if they are not where this library's tensors have them.
    """
    arena = Arena(1 << 16, 1)
    graph = Graph(arena, 1)
    tensor = graph.placed(graph.lib.ggml_new_tensor_3d(graph.context, F32, 7, 11, 13))
    first = (tensor - graph.words.ctypes.data) // _WORD
    words = graph.words[first : first + graph.lib.ggml_tensor_overhead() // _WORD].tolist()
    wanted = [7, 11, 13, 1, 4, 4 * 7, 4 * 7 * 11, 4 * 7 * 11 * 13]
    starts = [at for at in range(len(words) - 8) if words[at : at + 8] == wanted]
    places = [at for at, word in enumerate(words) if word == graph.places[tensor]]
    if len(starts) != 1 or len(places) != 1:
        raise LocalProtocolError("this ggml describes tensors in a way that is not known")
    return TensorFields(starts[0], starts[0] + 4, places[0])
