"""Which span a node should load, so that the swarm gains most.

A layer's throughput is the sum of its hosts' steps per second; the swarm's is that of its
weakest layer. The span is chosen to raise the weakest layer, then the second weakest, and so
on (leximin), so that a node always covers the weakest stretch even when it cannot lift the
minimum alone.
"""

from statistics import median_low

from plait.router import cost
from plait.router.view import Offer, View
from plait.types import ModelShape, PeerId, Span

_STEPS_SCALE = 10**15
"""Throughput is counted in steps per 10**6 seconds: integers, so that ties are exact."""


def layer_throughput(
    view: View, shape: ModelShape, now_ms: int, *, besides: PeerId | None = None
) -> tuple[int, ...]:
    """Decode steps per million seconds that each layer's hosts can do, ``besides`` left out."""
    throughput = [0] * shape.layers
    for offer in _serving(view, shape, now_ms, besides):
        step_ns = cost.decode_ns_per_layer(offer, shape) * shape.priced_layers(offer.span)
        for layer in range(offer.span.start, offer.span.end):
            throughput[layer] += _STEPS_SCALE // step_ns
    return tuple(throughput)


def choose_span(
    view: View,
    shape: ModelShape,
    layers_that_fit: int,
    now_ms: int,
    *,
    besides: PeerId | None = None,
) -> Span:
    """The span of ``layers_that_fit`` layers that raises the weakest layers most.

    The node is taken to be as fast per layer as the median host. Ties go to the earliest
    span. ``besides`` is the node itself, whose present offer must not count. Raises
    ``ValueError`` if no layer fits.
    """
    length = min(layers_that_fit, shape.layers)
    if length < 1:
        raise ValueError("no layer fits")
    present = layer_throughput(view, shape, now_ms, besides=besides)
    speeds = [
        cost.decode_ns_per_layer(offer, shape) for offer in _serving(view, shape, now_ms, besides)
    ]
    layer_ns = median_low(speeds) if speeds else cost.UNKNOWN_DECODE_US_PER_LAYER * 1000
    best: tuple[list[int], Span] | None = None
    for start in range(shape.layers - length + 1):
        span = Span(start, start + length)
        added = _STEPS_SCALE // max(1, layer_ns * shape.priced_layers(span))
        after = sorted(
            steps + (added if span.start <= layer < span.end else 0)
            for layer, steps in enumerate(present)
        )
        if best is None or after > best[0]:
            best = after, span
    assert best is not None
    return best[1]


def _serving(view: View, shape: ModelShape, now_ms: int, besides: PeerId | None) -> list[Offer]:
    return [
        offer
        for _, offer in sorted(view.offers.items())
        if offer.peer != besides
        and offer.model_digest == shape.digest
        and offer.state == "ready"
        and offer.expires_ms > now_ms
        and offer.span.end <= shape.layers
    ]
