"""All layers of a span for items of few rows, by ggml in one call, attention included.

For each number of rows there is a graph, made when first needed, which is told where the rows'
keys lie. A half of a layer that is onnxruntime's ends a graph, and the next one begins behind it.
Items of many rows go half a layer at a time (``ggml_layers.py``), as torch's attention is faster
for those.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from plait.compute.attention import Item
from plait.compute.ggml import ALIGNMENT, Arena
from plait.compute.ggml_attention import NODES_OF_ROW, Attending, Cache, Heads
from plait.compute.ggml_graph import NODES_MAX, Graph, Rotary, fields
from plait.compute.ggml_layers import LayerEnd, Part, Projection
from plait.compute.layers import Half, HalvedLayer

ROWS_MAX = 16
"""Of a graph; more go one graph after the other."""
_KEPT_NODES_MAX = 400_000
"""Of all graphs, some 150 MB; those that were not used for longest go. All sizes of graphs of 30
layers have room for 70,000."""
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
    """Rows of a step: positions, and where their keys are."""

    positions: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    """Where each row's keys begin, if they lie next to each other."""
    written: npt.NDArray[np.int64]
    """Where its own are."""
    seen: Sequence[npt.NDArray[np.int64]]
    """Where the keys of each row's session are, if they have to be gathered."""

    def cut(self, start: int, end: int) -> "_Rows":
        """Some of them."""
        part = slice(start, end)
        return _Rows(self.positions[part], self.starts[part], self.written[part], self.seen[part])

    def padded(self, rows: int) -> "_Rows":
        """Filled up with copies of the last row, which write what it writes."""
        more = rows - len(self.positions)
        if not more:
            return self
        positions, starts, written = (
            np.append(one, [one[-1]] * more) for one in (self.positions, self.starts, self.written)
        )
        return _Rows(positions, starts, written, [*self.seen, *list(self.seen[-1:]) * more])


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
        fields()  # a library that cannot be told where keys are is refused now
        self._layers = layers
        self._heads, self._rotary, self._hidden_size = heads, rotary, hidden_size
        self._layer_bytes, self._threads = 2 * row_bytes, threads
        parts = [half for layer in layers for half in (layer.projection, layer.end)]
        self._pads = {part.pad for part in parts if isinstance(part, Part)}
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self._cache: Cache | None = None
        self._graphs: OrderedDict[tuple[tuple[Step, ...], int, bool], _SpanGraph] = OrderedDict()
        self._kept_nodes = 0
        self._arenas: dict[bool, Arena] = {}

    def run(self, items: Sequence[Item], first: int, end: int) -> list[torch.Tensor]:
        """[rows, hidden] of each item behind the layers ``first`` to ``end`` of the stage."""
        self._attach(items[0].kv.cache_data)
        if len(items) == 1:
            hidden = items[0].hidden.numpy()
            return [torch.from_numpy(self._in_tiles(hidden, _rows_of(items), first, end))]
        results: dict[int, torch.Tensor] = {}
        for gathered in (False, True):
            indexes = [at for at, item in enumerate(items) if (_start(item) is None) == gathered]
            if not indexes:
                continue
            same = [items[index] for index in indexes]
            hidden = torch.cat([item.hidden for item in same]).numpy()
            found = torch.from_numpy(self._in_tiles(hidden, _rows_of(same), first, end))
            results |= zip(indexes, found.split([item.rows for item in same]), strict=True)
        return [results[index] for index in range(len(items))]

    def _in_tiles(self, hidden: Numbers, rows: _Rows, first: int, end: int) -> Numbers:
        count = len(hidden)
        if count <= ROWS_MAX:
            return self._computed(hidden, rows, first, end)
        cuts = range(0, count, ROWS_MAX)
        tiles = [(hidden[at : at + ROWS_MAX], rows.cut(at, at + ROWS_MAX)) for at in cuts]
        return np.concatenate([self._computed(*tile, first, end) for tile in tiles])

    def _computed(self, hidden: Numbers, rows: _Rows, first: int, end: int) -> Numbers:
        known = self._pieces.get((first, end))
        if known is None:
            known = self._pieces[first, end] = list(pieces(self._layers[first:end], first))
        projected = attended = None
        count = len(hidden)
        padded = rows.padded(max((pad(count) for pad in self._pads), default=count))
        for piece in known:
            if isinstance(piece, tuple):
                graph = self._graph(piece, len(padded.positions), gathered=bool(rows.seen))
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
            self._kept_nodes = 0
            self._arenas.clear()
            self._cache = Cache(data)

    def _graph(self, steps: tuple[Step, ...], rows: int, *, gathered: bool) -> "_SpanGraph":
        key = steps, rows, gathered
        known = self._graphs.get(key)
        if known is None:
            known = self._graphs[key] = self._made(steps, rows, gathered=gathered)
            self._kept_nodes += known.nodes
            while len(self._graphs) > 1 and self._kept_nodes > _KEPT_NODES_MAX:
                _, gone = self._graphs.popitem(last=False)
                self._kept_nodes -= gone.nodes
        self._graphs.move_to_end(key)
        return known

    def _made(self, steps: tuple[Step, ...], rows: int, *, gathered: bool) -> "_SpanGraph":
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
        self.nodes = graph.nodes
        rows, given = graph.rows, graph.given(0)
        self._positions = graph.array(given, np.int32, rows)
        hidden = graph.given(hidden_size)
        self._hidden = graph.array(hidden, np.float32, rows, hidden_size)
        """Rows before the first layer."""
        self._projected: Numbers | None = None
        self._attended: Numbers | None = None
        projected = 0
        if steps[0].projection is None:
            projected = graph.given(heads.width)
            self._projected = graph.array(projected, np.float32, rows, heads.width)
        halves = _Halves(graph)
        for step in steps:
            halves.turn()
            if step.projection is not None:
                projected, turned = step.projection.build(graph, (hidden, given))
            else:
                turned = graph.turned(projected, heads.width, given, rotary)
            graph.finished(turned)
            attended = attending.add(step.layer, projected)
            if step.end is None:
                width = heads.queries * heads.size
                self._attended = graph.array(attended, np.float32, rows, width)
            else:
                hidden, last = step.end.build(graph, (attended, hidden))
                graph.finished(last)
        self._last = graph.array(hidden, np.float32, rows, hidden_size)
        """Rows behind the last layer, or before it if its end lies outside."""
        graph.check_room()

    def run(
        self, hidden: Numbers, projected: Numbers | None, rows: _Rows
    ) -> tuple[Numbers, Numbers | None]:
        """(hidden rows, attended rows if the last layer's end lies outside)."""
        count = len(hidden)
        self._positions[:] = rows.positions
        self._hidden[:count], self._hidden[count:] = hidden, hidden[-1:]
        if self._projected is not None:
            assert projected is not None
            self._projected[:count], self._projected[count:] = projected, projected[-1:]
        self._attending.place(rows.starts, rows.positions + 1, rows.written, rows.seen)
        self._graph.arena.compute(self._graph.graph)
        attended = None if self._attended is None else self._attended[:count].copy()
        return self._last[:count].copy(), attended


def _start(item: Item) -> int | None:
    return item.kv.start(item.first_position + item.rows)


def _rows_of(items: Sequence[Item]) -> _Rows:
    """The rows of items, whose keys all have to be gathered or all have not."""
    if len(items) > 1:
        each = [_rows_of([item]) for item in items]
        return _Rows(
            np.concatenate([rows.positions for rows in each]),
            np.concatenate([rows.starts for rows in each]),
            np.concatenate([rows.written for rows in each]),
            [seen for rows in each for seen in rows.seen],
        )
    item, start = items[0], _start(items[0])
    positions = np.arange(item.first_position, item.first_position + item.rows)
    if start is not None:
        return _Rows(positions, np.full(item.rows, start), positions + start, ())
    slots = item.kv.slots(0, item.first_position + item.rows).numpy()
    return _Rows(positions, np.zeros_like(positions), slots[positions], [slots] * item.rows)


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
