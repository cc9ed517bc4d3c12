"""All layers of a span for items of few rows, by ggml in one call, attention included.

For each number of rows there is a graph, made when first needed, which is told where the rows'
keys lie. A half of a layer that is onnxruntime's ends a graph, and the next one begins behind it.
Items of many rows go half a layer at a time (``ggml_layers.py``), as torch's attention is faster
for those.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.attention import Item
from plait.compute.ggml import ALIGNMENT, Arena
from plait.compute.ggml_attention import NODES_OF_ROW, Attending, Cache, Heads
from plait.compute.ggml_graph import NODES_MAX, Graph, Rotary
from plait.compute.ggml_layers import LayerEnd, Part, Projection
from plait.compute.layers import Half, HalvedLayer

ROWS_MAX = 16
"""Of a graph; more go one graph after the other."""
_GRAPHS_MAX = 64
"""Kept; the one that was not used for longest goes."""
Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A layer in a graph; what is None lies outside, before its attention or behind it."""

    layer: int
    projection: Projection | None
    end: LayerEnd | None


Piece = tuple[Step, ...] | Half
"""Layers in one graph, or a half of one by another library."""


def pieces(layers: Sequence[HalvedLayer], first: int) -> Iterator[Piece]:
    """What runs one after the other for layers, the first of which is the stage's ``first``."""
    together: list[Step] = []
    for index, layer in enumerate(layers, first):
        projection, end = _program(layer.projection), _program(layer.end)
        if projection is None:
            if together:
                yield tuple(together)
            yield layer.projection
            together = []
        assert projection is None or isinstance(projection, Projection)
        assert end is None or isinstance(end, LayerEnd)
        together.append(Step(index, projection, end))
        if end is None:
            yield tuple(together)
            yield layer.end
            together = []
    if together:
        yield tuple(together)


def _program(half: Half) -> object | None:
    return half.program if isinstance(half, Part) else None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a step that one graph takes: positions, and where their keys are."""

    positions: npt.NDArray[np.int32]
    slots: npt.NDArray[np.int64]
    """Where each row's keys begin; all of them, if they are gathered."""
    written: npt.NDArray[np.int64]
    gathered: bool

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """How many positions each row sees."""
        return self.positions.astype(np.int64) + 1

    def padded(self, rows: int) -> "_Rows":
        """Filled up with copies of the last row, which write what it writes."""
        more = rows - len(self.positions)
        if not more:
            return self
        slots = self.slots[-int(self.lengths[-1]) :] if self.gathered else self.slots[-1:]
        return _Rows(
            np.append(self.positions, [self.positions[-1]] * more).astype(np.int32),
            np.concatenate([self.slots, *[slots] * more]),
            np.append(self.written, [self.written[-1]] * more),
            self.gathered,
        )


class GgmlSpan:
    """The layers of a stage for narrow items, whose sessions are of one cache."""

    def __init__(
        self,
        layers: Sequence[HalvedLayer],
        heads: Heads,
        rotary: Rotary,
        hidden_size: int,
        row_bytes: int,
        threads: int,
    ) -> None:
        """``row_bytes`` is what a row takes while half a layer is computed, inputs included."""
        self._layers = layers
        self._heads, self._rotary, self._hidden_size = heads, rotary, hidden_size
        self._layer_bytes, self._threads = 2 * row_bytes, threads
        parts = [half for layer in layers for half in (layer.projection, layer.end)]
        self._pads = {part.pad for part in parts if isinstance(part, Part)}
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self._cache: Cache | None = None
        self._graphs: OrderedDict[tuple[tuple[Step, ...], int, bool], _SpanGraph] = OrderedDict()
        self._arenas: dict[bool, Arena] = {}

    def run(self, items: Sequence[Item], first: int, end: int) -> list[torch.Tensor]:
        """[rows, hidden] of each item behind the layers ``first`` to ``end`` of the stage."""
        self._attach(items[0].kv.cache_data)
        order = sorted(range(len(items)), key=lambda index: items[index].kv.start is None)
        sizes = [items[index].rows for index in order]
        hidden = torch.cat([items[index].hidden for index in order]).numpy()
        results, at = np.empty_like(hidden), 0
        for rows in _tiles([items[index] for index in order]):
            tile = slice(at, at + len(rows.positions))
            results[tile] = self._computed(hidden[tile], rows, first, end)
            at = tile.stop
        found = dict(zip(order, torch.from_numpy(results).split(sizes), strict=True))
        return [found[index] for index in range(len(items))]

    def _computed(self, hidden: Numbers, rows: _Rows, first: int, end: int) -> Numbers:
        known = self._pieces.get((first, end))
        if known is None:
            known = self._pieces[first, end] = list(pieces(self._layers[first:end], first))
        projected = attended = None
        count = len(hidden)
        padded = rows.padded(max((pad(count) for pad in self._pads), default=count))
        for piece in known:
            if isinstance(piece, tuple):
                graph = self._graph(piece, len(padded.positions), rows.gathered)
                hidden, attended = graph.run(hidden, projected, padded)
                projected = None
            elif attended is None:
                projected = piece.rows(torch.from_numpy(hidden)).numpy()
            else:
                ended = piece.rows(torch.from_numpy(attended), torch.from_numpy(hidden))
                hidden, attended = ended.bfloat16().float().numpy(), None
        return hidden

    def _attach(self, data: torch.Tensor) -> None:
        """Graphs hold the cache's address."""
        if self._cache is None or self._cache.data is not data:
            self._graphs.clear()
            self._arenas.clear()
            self._cache = Cache(data)

    def _graph(self, steps: tuple[Step, ...], rows: int, gathered: bool) -> "_SpanGraph":
        key = steps, rows, gathered
        known = self._graphs.get(key)
        if known is None:
            known = self._graphs[key] = self._made(steps, rows, gathered)
            if len(self._graphs) > _GRAPHS_MAX:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return known

    def _made(self, steps: tuple[Step, ...], rows: int, gathered: bool) -> "_SpanGraph":
        assert self._cache is not None
        arena = self._arenas.get(gathered)
        if arena is None:
            slots = self._cache.slots
            size = 2 * self._heads.scratch(slots, gathered=gathered)
            size += self._heads.told(ROWS_MAX, slots, gathered=gathered)
            size += 3 * ROWS_MAX * self._layer_bytes + 6 * NODES_MAX * ALIGNMENT
            arena = self._arenas[gathered] = Arena(size, self._threads)
        nodes = len(steps) * (NODES_MAX + rows * NODES_OF_ROW) + NODES_MAX + rows
        graph = Graph(arena, rows, nodes)
        attending = Attending(graph, self._heads, self._cache, gathered=gathered)
        return _SpanGraph(graph, attending, steps, self._heads, self._rotary, self._hidden_size)


class _SpanGraph:
    """Layers in one graph for so many rows."""

    def __init__(
        self,
        graph: Graph,
        attending: Attending,
        steps: tuple[Step, ...],
        heads: Heads,
        rotary: Rotary,
        hidden_size: int,
    ) -> None:
        self._graph, self._attending = graph, attending
        self._widths = hidden_size, heads.queries * heads.size
        self._positions = graph.given(0)
        self._hidden = graph.given(hidden_size)
        self._projected = graph.given(heads.width) if steps[0].projection is None else None
        self._last: int | None = None
        """Where the hidden rows of the last layer are, if they are changed in the graph."""
        self._attended: int | None = None
        halves = _Halves(graph)
        hidden, projected = self._hidden, self._projected
        for step in steps:
            halves.turn()
            if step.projection is not None:
                projected, turned = step.projection.build(graph, (hidden, self._positions))
            else:
                assert projected is not None
                turned = graph.turned(projected, heads.width, self._positions, rotary)
            graph.finished(turned)
            attended = attending.add(step.layer, projected)
            if step.end is None:
                self._attended = attended
            else:
                hidden, last = step.end.build(graph, (attended, hidden))
                graph.finished(last)
        self._last = None if hidden == self._hidden else hidden

    def run(
        self, hidden: Numbers, projected: Numbers | None, rows: _Rows
    ) -> tuple[Numbers, Numbers | None]:
        """(hidden rows, attended rows if the last layer's end lies outside)."""
        graph, count = self._graph, len(hidden)
        graph.write(self._positions, rows.positions)
        graph.write(self._hidden, _padded(hidden, graph.rows))
        if self._projected is not None:
            assert projected is not None
            graph.write(self._projected, _padded(projected, graph.rows))
        self._attending.place(rows.slots, rows.lengths, rows.written)
        graph.arena.compute(graph.graph)
        if self._last is not None:
            hidden = graph.read(self._last, count, self._widths[0])
        if self._attended is None:
            return hidden, None
        return hidden, graph.read(self._attended, count, self._widths[1])


def _padded(rows: Numbers, count: int) -> Numbers:
    """Filled up with copies of the last row."""
    more = count - len(rows)
    return np.concatenate([rows, *[rows[-1:]] * more]) if more else rows


def _tiles(items: Sequence[Item]) -> Iterator[_Rows]:
    """The rows of items, in order, those whose keys have to be gathered apart."""
    for gathered, same in groupby(items, key=lambda item: item.kv.start is None):
        rows = [row for item in same for row in _rows_of(item)]
        for at in range(0, len(rows), ROWS_MAX):
            tile = rows[at : at + ROWS_MAX]
            yield _Rows(
                np.array([position for position, _, _ in tile], np.int32),
                np.concatenate([slots for _, slots, _ in tile])
                if gathered
                else np.array([slots for _, slots, _ in tile], np.int64),
                np.array([written for _, _, written in tile], np.int64),
                gathered,
            )


def _rows_of(item: Item) -> Iterator[tuple[int, Any, int]]:
    """Each row's position, the slots of all it sees or the first of them, and its own."""
    first, start = item.first_position, item.kv.start
    positions = range(first, first + item.rows)
    if start is not None:
        yield from ((position, start, start + position) for position in positions)
        return
    slots = item.kv.slots(0, positions.stop).numpy()
    yield from ((at, slots[: at + 1], int(slots[at])) for at in positions)


class _Halves:
    """Two halves of an arena behind what a graph has there: layers take turns, as each one needs
    what the one before it gave, and nothing older."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        start, end = graph.used, graph.arena.size
        middle = (start + end) // 2 // ALIGNMENT * ALIGNMENT
        self._halves = [(start, middle), (middle, end)]

    def turn(self) -> None:
        """Place what follows in the other half."""
        self._halves.reverse()
        self._graph.used, self._graph.limit = self._halves[0]
