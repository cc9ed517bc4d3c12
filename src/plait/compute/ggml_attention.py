"""Attention in a graph, each row over its own positions of the KV cache.

Three operations a row (scores, softmax, sum), whatever rows are beside it, so a row's result is
the same in any company. Where a session's pages lie next to each other, keys and values are read
in their place; else a graph of the other kind puts them together first, once for the rows of a
session that follow each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.ggml import F32, Foreign
from plait.compute.ggml_graph import Graph, Moves

NODES_OF_ROW = 9
"""Tensors that attention of a row takes at most."""
_NUMBER = 4
"""Bytes of one."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Query heads, the heads of keys and values that they share evenly, and numbers of each."""

    queries: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        """Query heads for each of keys and values."""
        return self.queries // self.kv

    @property
    def width(self) -> int:
        """Of a row of queries, keys and values."""
        return (self.queries + 2 * self.kv) * self.size

    def scratch(self, slots: int, *, gathered: bool) -> int:
        """Bytes that a row's attention takes while it is computed."""
        each = self.queries + (2 * self.kv * self.size if gathered else 0)
        return each * slots * _NUMBER

    def told(self, rows: int, slots: int, *, gathered: bool) -> int:
        """Bytes of what rows are told of the cache."""
        return rows * (2 * _NUMBER + (2 * self.kv * slots * _NUMBER if gathered else 0))


class Cache:
    """A stage's KV cache, [layers, 2, heads, slots, head size] in fp32, as ggml's memory."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data  # kept, so that the memory stays
        self.slots = data.shape[3]
        self._memory = Foreign(data.data_ptr(), data.nbytes)

    def layer(self, graph: Graph, index: int) -> int:
        """All sessions' keys, then values, of a layer: [2 * heads, slots, head size]."""
        of_layer = self.data[index].flatten(0, 1)
        heads, slots, size = of_layer.shape
        tensor = graph.lib.ggml_new_tensor_3d(graph.context, F32, size, slots, heads)
        return graph.placed_at(tensor, of_layer.data_ptr(), self._memory)


class Attending:
    """The attention of a graph's rows while it is built, and where they are when it runs."""

    def __init__(self, graph: Graph, heads: Heads, cache: Cache, *, gathered: bool) -> None:
        """``gathered``: the slots of each row's positions are told one by one."""
        self._graph, self._heads, self._cache = graph, heads, cache
        self._moves = Moves(graph)
        self._written = graph.numbers(graph.rows, wide=True)
        self._own = graph.array(self._written, np.int64, graph.rows)
        entries = cache.slots * 2 * heads.kv  # as ggml counts; of which those of one head are used
        self._gathered = [graph.numbers(entries) for _ in range(graph.rows if gathered else 0)]
        self._seen = [graph.array(one, np.int32, cache.slots) for one in self._gathered]

    def place(
        self,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        written: npt.NDArray[np.int64],
        seen: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        """For the next computation: where each row's keys begin, how many positions it sees, and
        the slot of its own, [rows] each.

        If gathered, the slots of each row's session, the same array for rows of one session,
        which follow each other: its keys are put together for the first of them, as far as the
        last one sees, and stay where they are.
        """
        self._own[:] = written
        if not seen:
            self._moves.apply(starts, lengths)
            return
        together, read = lengths.copy(), lengths.copy()
        for row in reversed(range(len(seen) - 1)):
            if seen[row] is seen[row + 1]:
                together[row] = together[row + 1]
        for row, slots in enumerate(seen):
            is_first = not row or slots is not seen[row - 1]
            read[row] = together[row] if is_first else 0
            self._seen[row][: read[row]] = slots[: read[row]]
        everything = np.concatenate([lengths, read, together])
        self._moves.apply(np.zeros_like(everything), everything)

    def add(self, layer: int, projected: int) -> int:
        """Queries, keys and values of the rows, turned -> [rows, queries * head size].

        Keys and values are written to the cache's ``layer`` first.
        """
        graph, heads = self._graph, self._heads
        lib, context, width = graph.lib, graph.context, heads.queries * heads.size
        cached = self._cache.layer(graph, layer)
        strides = (heads.width * _NUMBER, heads.size * _NUMBER, width * _NUMBER)
        written = graph.view(
            lib.ggml_view_3d(context, projected, heads.size, graph.rows, 2 * heads.kv, *strides)
        )
        graph.finished(graph.view(lib.ggml_set_rows(context, cached, written, self._written)))
        attended = graph.given(width)
        for row in range(graph.rows):
            with graph.scratch():
                sums = self._row(row, projected, cached)
            graph.placed_at(sums, graph.places[attended] + row * width * _NUMBER)
            graph.finished(sums)
        return attended

    def _row(self, row: int, projected: int, cached: int) -> int:
        """The row's operations, but for the room of the last one."""
        graph, heads, moves = self._graph, self._heads, self._moves
        lib, context, size, group = graph.lib, graph.context, heads.size, heads.group
        keys, values = self._read(row, cached)
        strides = (size * _NUMBER, group * size * _NUMBER, row * heads.width * _NUMBER)
        queries = graph.view(lib.ggml_view_3d(context, projected, size, group, heads.kv, *strides))
        scores = graph.placed(lib.ggml_mul_mat(context, keys, queries))
        scale = 1 / math.sqrt(size)
        shares = graph.view(lib.ggml_soft_max_ext_inplace(context, scores, None, scale, 0.0))
        turned = graph.view(lib.ggml_transpose(context, shares))
        for tensor in (scores, shares):  # [kv heads, group, length]
            moves.size(row, tensor, 0)
            moves.stride(row, tensor, 1, _NUMBER)
            moves.stride(row, tensor, 2, group * _NUMBER)
            moves.stride(row, tensor, 3, heads.queries * _NUMBER)
        moves.size(row, turned, 1)
        moves.stride(row, turned, 0, _NUMBER)
        moves.stride(row, turned, 2, group * _NUMBER)
        moves.stride(row, turned, 3, heads.queries * _NUMBER)
        return int(lib.ggml_out_prod(context, values, turned))

    def _read(self, row: int, cached: int) -> tuple[int, int]:
        """Keys and values that a row sees, [kv heads, length, head size] each."""
        graph, heads, moves = self._graph, self._heads, self._moves
        position = heads.size * _NUMBER
        source, slots, base = cached, self._cache.slots, graph.places[cached]
        if self._gathered:
            source = self._together(row, cached)
            base = graph.places[source]
        halves = []
        for start in (0, heads.kv):
            view = graph.lib.ggml_view_3d(
                graph.context,
                source,
                heads.size,
                slots,
                heads.kv,
                position,
                slots * position,
                start * slots * position,
            )
            moves.size(row, graph.view(view), 1)
            if self._gathered:
                together = row + 2 * graph.rows
                moves.stride(together, view, 2, position)
                moves.data(together, view, base, 0, start * position)
            else:
                moves.data(row, view, base + start * slots * position, position, 0)
            halves.append(view)
        return halves[0], halves[1]

    def _together(self, row: int, cached: int) -> int:
        """What is read for a row of the cache, [2 * kv heads, length, head size]; of every row in
        the same place."""
        graph, heads, moves = self._graph, self._heads, self._moves
        lib, slots, position = graph.lib, self._cache.slots, heads.size * _NUMBER
        # The same slots for each head: a view whose second stride is none.
        each = lib.ggml_view_3d(graph.context, self._gathered[row], slots, 2 * heads.kv, 1, 0, 0, 0)
        read = row + graph.rows  # nothing is where an earlier row of the session has read it
        moves.size(read, graph.view(each), 0)
        found = graph.placed(lib.ggml_get_rows(graph.context, cached, each))
        moves.size(read, found, 1)
        moves.stride(read, found, 2, position)
        moves.stride(read, found, 3, 2 * heads.kv * position)
        return int(found)
