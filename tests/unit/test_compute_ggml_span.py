"""Layers in one graph of ggml's: what torch computes layer by layer, each row alike in any
company, wherever its session's pages are.

Slow because torch takes seconds to import.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from plait.compute.ggml import shared_object
from plait.errors import LocalProtocolError
from plait.model.config import ModelConfig
from plait.model.gguf_types import BY_NAME
from plait.types import Sampling, SessionId, Span

if TYPE_CHECKING:
    import torch

    from plait.compute.ggml_layers import Matrix
    from plait.compute.ggml_span import GgmlSpan
    from plait.compute.kv import KvCache
    from plait.compute.layers import HalvedLayer
    from plait.compute.ragged import RaggedModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shared_object() is None, reason="ggml's package is not installed"),
]

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, SIZE, LAYERS = 96, 128, 4, 2, 16, 4
WIDTH = (HEADS + 2 * KV_HEADS) * SIZE
CONFIG = ModelConfig(
    architecture="llama",
    layers=LAYERS + 1,  # so that the last norm is not ours
    hidden_size=HIDDEN,
    heads=HEADS,
    kv_heads=KV_HEADS,
    head_size=SIZE,
    feed_forward_size=FEED_FORWARD,
    vocabulary_size=300,
    context_length=512,
    norm_epsilon=1e-5,
    rope_base=10_000.0,
    tied_head=True,
    rotary_factors=False,
)
OUTSIDE = {"none": (), "projections": (0, 2), "ends": (1, 4 + 2), "both": (0, 4, 4 + 3)}
"""Halves that are not ggml's: projections by layer, and ends by layer + 4."""
NEAR = 1e-3
"""Relative error between two ways to add up in fp32, with results rounded to bf16."""


def numbers(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def matrix(name: str, outputs: int, inputs: int, seed: int) -> "Matrix":
    from plait.compute.ggml_layers import Matrix

    kind, chance = BY_NAME[name], np.random.default_rng(seed)
    raw = chance.integers(0, 256, (outputs * inputs // 32, kind.group_bytes), dtype=np.uint8)
    for start in (0,) if name == "Q4_0" else (0, 2):
        scales = chance.uniform(-0.02, 0.02, size=(len(raw), 1)).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8)
    return Matrix(raw.reshape(outputs, -1), kind, inputs)


class Outside:
    """A half of a layer by somebody else."""

    def __init__(self, *sizes: int, seed: int) -> None:
        import torch

        self._weights = [torch.from_numpy(numbers(*sizes, seed=seed)) / 20]

    def rows(self, *given: "torch.Tensor") -> "torch.Tensor":
        """Each row by itself."""
        import torch

        [weight] = self._weights
        whole = torch.cat(given, 1)
        return torch.cat([row[None, :] @ weight for row in whole])


def layers(
    outside: Sequence[int], threads: int = 1, pad: Callable[[int], int] | None = None
) -> "list[HalvedLayer]":
    from plait.compute.ggml import F32, Arena, Constant
    from plait.compute.ggml_layers import LayerEnd, Part, Projection
    from plait.compute.layers import HalvedLayer

    arena = Arena(16 << 20, threads)
    row = Constant(np.abs(numbers(HIDDEN, seed=9)), F32, HIDDEN)
    found = []
    for index in range(LAYERS):
        made = matrix("Q4_1", WIDTH, HIDDEN, index)
        projection: Any = Part(Projection(row, 1e-5, [made], None, rotary()), arena, pad)
        output = matrix("Q4_0", HIDDEN, HEADS * SIZE, index + 10)
        gate = matrix("Q4_1", 2 * FEED_FORWARD, HIDDEN, index + 20)
        down = matrix("Q4_1", HIDDEN, FEED_FORWARD, index + 30)
        end: Any = Part(LayerEnd(output, row, 1e-5, [gate], down), arena, pad)
        ours = index not in outside, index + 4 not in outside
        if not ours[0]:
            projection = Outside(HIDDEN, WIDTH, seed=index)
        if not ours[1]:
            end = Outside(HEADS * SIZE + HIDDEN, HIDDEN, seed=index)
        found.append(HalvedLayer(projection, end, turns=ours[0], rounds=ours[1]))
    return found


def rotary() -> Any:
    from plait.compute.ggml_graph import Rotary

    return Rotary(HEADS + KV_HEADS, SIZE, CONFIG.rope_base, None)


def span_of(made: "Sequence[HalvedLayer]", threads: int = 1) -> "GgmlSpan":
    from plait.compute.ggml_attention import Heads
    from plait.compute.ggml_span import GgmlSpan

    row_bytes = 4 * (12 * HIDDEN + 6 * WIDTH + 8 * FEED_FORWARD + 64)
    return GgmlSpan(made, Heads(HEADS, KV_HEADS, SIZE), rotary(), HIDDEN, row_bytes, threads)


def model(
    outside: Sequence[int] = (),
    threads: int = 1,
    *,
    narrow: bool = True,
    pad: Callable[[int], int] | None = None,
) -> "RaggedModel":
    from plait.compute.ragged import RaggedModel

    made = layers(outside, threads, pad)
    return RaggedModel(
        CONFIG,
        Span(0, LAYERS),
        made,
        "int4",
        "ggml",
        rows=None,
        final_norm=None,
        head=None,
        narrow=span_of(made, threads) if narrow else None,
    )


def cache_for(sessions: int, span: Span | None = None, tokens: int = 160) -> "KvCache":
    from plait.compute.kv import KvCache, KvLayout

    cache = KvCache(KvLayout(Span(0, LAYERS), KV_HEADS, SIZE), sessions * tokens)
    for index in range(sessions):
        cache.reserve(session(index), tokens, Sampling(), span)
    return cache


def session(index: int) -> SessionId:
    return SessionId(bytes([index + 1]) * 16)


def scatter(cache: "KvCache") -> None:
    """Every session's pages apart, and in no order."""
    for index in range(len(cache._sessions)):
        kv = cache._sessions[session(index)]
        kv.pages = tuple(np.random.default_rng(index).permutation(kv.pages).tolist())
        kv.prepare(0, 1)
        assert kv.start(kv.tokens) is None


def run(
    model: "RaggedModel", cache: "KvCache", works: Sequence[tuple[int, int, int]]
) -> "list[torch.Tensor]":
    """Rows of (session, first position, rows) computed together."""
    import torch

    from plait.compute.attention import Item

    items = []
    for index, first, rows in works:
        kv = cache.get(session(index))
        assert kv is not None
        hidden = numbers(200, HIDDEN, seed=100 + index)[first : first + rows]
        items.append(Item(torch.from_numpy(hidden), first, kv))
    with torch.inference_mode():
        return model.run(items)


STEPS = [
    [(0, 0, 9), (1, 0, 1), (2, 0, 40), (3, 0, 32)],
    [(3, 32, 1), (2, 40, 5), (0, 9, 1), (1, 1, 2)],
    [(0, 10, 1), (1, 3, 1), (2, 45, 32), (3, 33, 1)],
]
"""Of more rows than a graph takes, and with one item for torch's attention."""


def all_steps(model: "RaggedModel", cache: "KvCache", *, alone: bool) -> "torch.Tensor":
    import torch

    found = []
    for step in STEPS:
        if alone:
            found += [run(model, cache, [work])[0] for work in step]
        else:
            found += run(model, cache, step)
    return torch.cat(found)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_it_computes_what_is_computed_layer_by_layer(outside: str) -> None:
    wanted = all_steps(model(OUTSIDE[outside], narrow=False), cache_for(4), alone=False)
    found = all_steps(model(OUTSIDE[outside]), cache_for(4), alone=False)
    assert float((found - wanted).norm() / wanted.norm()) < NEAR


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_in_any_company_and_on_any_pages(outside: str, threads: int) -> None:
    import torch

    ours = model(OUTSIDE[outside], threads)
    wanted = all_steps(ours, cache_for(4), alone=True)
    assert torch.equal(all_steps(ours, cache_for(4), alone=False), wanted)
    scattered = cache_for(4)
    scatter(scattered)
    assert torch.equal(all_steps(ours, scattered, alone=False), wanted)
    some = cache_for(4)
    some._sessions[session(1)].pages = some._sessions[session(1)].pages[::-1]
    assert torch.equal(all_steps(ours, some, alone=False), wanted)


def test_a_session_that_grew_is_read_in_place_while_its_first_pages_hold_it() -> None:
    import torch

    cache = cache_for(3, tokens=32)
    cache.free(session(1))
    cache.reserve(session(2), 64, Sampling())  # its second run lies elsewhere
    kv = cache.get(session(2))
    assert kv is not None
    kv.prepare(0, 1)
    runs = [kv.start(end) is None for end in (1, 32, 33, 64)]
    assert runs == [False, False, True, True]
    grown = [run(model(), cache, [(2, first, 16)])[0] for first in (0, 16, 32, 48)]
    whole = cache_for(3)
    wanted = [run(model(), whole, [(2, first, 16)])[0] for first in (0, 16, 32, 48)]
    assert torch.equal(torch.cat(grown), torch.cat(wanted))


def test_few_rows_are_those_rows_one_at_a_time() -> None:
    import torch

    ours = model()
    together = run(ours, cache_for(1), [(0, 0, 32)])[0]
    cache = cache_for(1)
    alone = [run(ours, cache, [(0, at, 1)])[0] for at in range(32)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("way", ["_at_least_two", "_in_fours"])
def test_rows_that_are_filled_up_write_nothing_else(way: str) -> None:
    import torch

    from plait.compute import ggml_layers

    wanted = all_steps(model(), cache_for(4), alone=True)
    padded = cache_for(4)
    padded.data.zero_()
    scatter(padded)
    ours = model(pad=getattr(ggml_layers, way))
    assert torch.equal(all_steps(ours, padded, alone=True), wanted)
    written = sum(max(first + rows for _, first, rows in of) for of in by_session().values())
    assert int((padded.data[0, 0, 0] != 0).any(-1).sum()) == written


def by_session() -> dict[int, list[tuple[int, int, int]]]:
    found: dict[int, list[tuple[int, int, int]]] = {}
    for work in (work for step in STEPS for work in step):
        found.setdefault(work[0], []).append(work)
    return found


def test_sessions_of_some_layers() -> None:
    import torch

    from plait.compute.attention import Item

    ours = model()
    whole = run(ours, cache_for(1), [(0, 0, 3)])[0]
    first = run(ours, cache_for(1, Span(0, 1)), [(0, 0, 3)])[0]
    assert not torch.equal(first, whole)
    kv = cache_for(1, Span(1, LAYERS)).get(session(0))
    assert kv is not None
    with torch.inference_mode():
        (rest,) = ours.run([Item(first, 0, kv)])
    assert torch.equal(rest, whole)


@pytest.mark.parametrize("outside", ["none", "projections"])
def test_the_models_last_norm_is_applied_once_behind_its_last_layer(outside: str) -> None:
    import torch

    from plait.compute.ggml import F32, Arena, Constant
    from plait.compute.ggml_layers import Part
    from plait.compute.ragged import RaggedModel

    weight = np.abs(numbers(HIDDEN, seed=11))
    plain = layers(OUTSIDE[outside])
    end = plain[-1].end
    assert isinstance(end, Part)
    closing: Any = replace(end.program, final_norm=Constant(weight, F32, HIDDEN))  # type: ignore[type-var]
    norming = [
        *plain[:-1],
        replace(plain[-1], end=Part(closing, Arena(16 << 20, 1), None), norms=True),
    ]
    works = [(0, 0, 3), (1, 0, 40), (2, 0, 17)]

    def found(made: "list[HalvedLayer]", works: Sequence[tuple[int, int, int]], to: int) -> Any:
        ours = RaggedModel(
            replace(CONFIG, layers=LAYERS),
            Span(0, LAYERS),
            made,
            "int4",
            "ggml",
            rows=None,
            final_norm=torch.from_numpy(weight),
            head=None,
            narrow=span_of(made),
        )
        return torch.cat(run(ours, cache_for(3, Span(0, to)), works))

    torch.testing.assert_close(found(norming, works, LAYERS), found(plain, works, LAYERS))
    assert torch.equal(found(norming, works, LAYERS - 1), found(plain, works, LAYERS - 1))
    assert not torch.equal(found(plain, works, LAYERS), found(plain, works, LAYERS - 1))


def test_a_graph_that_cannot_be_made_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.compute import ggml_span

    ours, cache = model(), cache_for(1)
    run(ours, cache, [(0, 0, 1)])
    span: Any = ours._narrow
    kept = span._kept_nodes

    def failing(*given: Any) -> Any:
        raise LocalProtocolError("no memory")

    monkeypatch.setattr(ggml_span, "Graph", failing)
    for _ in range(3):
        with pytest.raises(LocalProtocolError, match="no memory"):
            run(ours, cache, [(0, 0, 2)])
    assert span._kept_nodes == kept == sum(graph.nodes for graph in span._graphs.values())


def test_graphs_are_made_again_when_they_had_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from plait.compute import ggml_span
    from plait.compute.attention import Item

    monkeypatch.setattr(ggml_span, "_KEPT_NODES_MAX", 1000)
    ours = span_of(layers(()))
    kv = cache_for(1).get(session(0))
    assert kv is not None

    def computed(rows: int) -> "torch.Tensor":
        hidden = torch.from_numpy(numbers(rows, HIDDEN, seed=1))
        return ours.run([Item(hidden, 0, kv)], 0, LAYERS)[0]

    first = computed(1)
    for rows in (2, 3, 4):
        computed(rows)
    assert 1 <= len(ours._graphs) < 4
    assert ours._kept_nodes == sum(graph.nodes for graph in ours._graphs.values())
    assert torch.equal(computed(1), first)


def test_a_library_with_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.compute import ggml_graph

    placed = ggml_graph.Graph.placed

    def elsewhere(graph: ggml_graph.Graph, tensor: int) -> int:
        graph.places[tensor] = 12_345
        return tensor

    def larger(graph: ggml_graph.Graph, tensor: int) -> int:
        found = placed(graph, tensor)
        graph.words[graph.words == 11] = 12
        return found

    for change in (elsewhere, larger):
        monkeypatch.setattr(ggml_graph.Graph, "placed", change)
        ggml_graph.fields.cache_clear()
        with pytest.raises(LocalProtocolError, match="in a way that is not known"):
            span_of(())
    ggml_graph.fields.cache_clear()
