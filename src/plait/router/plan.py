"""Plan a route: the best complete pipeline under a request's bounds, and spares for it.

Pure: the same view, model, request, source and time always give the same plan, whatever
the order of the view's mappings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from plait.errors import NoRoute, RouteError
from plait.router import cost
from plait.router.bounds import Graph
from plait.router.compare import outclassed
from plait.router.cost import Prediction, Stages
from plait.router.eligibility import Rejection, sift
from plait.router.request import RouteRequest
from plait.router.search import PRICE, TPOT, TTFT, Goal, best_route, goal_of
from plait.router.view import Offer, View
from plait.types import ModelShape, PeerId, Span

_SPARE_LABELS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage of a route: an offer, the part of its span used, the layers charged."""

    offer: Offer
    span: Span
    priced_layers: int


@dataclass(frozen=True, slots=True)
class Alternate:
    """A spare route; ``shared`` are its peers that the chosen route uses too."""

    stages: tuple[PlannedStage, ...]
    predicted: Prediction
    shared: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen route. What it was chosen from is kept, so that it can be explained."""

    stages: tuple[PlannedStage, ...]
    predicted: Prediction
    alternates: tuple[Alternate, ...]
    view: View = field(repr=False)
    model: ModelShape
    request: RouteRequest
    source: PeerId
    now_ms: int

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Why each peer of the view that is not in the route is not; by peer id."""
        eligible, rejections = sift(self.view, self.model, self.request, self.now_ms)
        stages = [(stage.offer, stage.span) for stage in self.stages]
        chosen = {offer.peer for offer, _ in stages}
        losers = (offer for offer in eligible if offer.peer not in chosen)
        compared = (
            outclassed(offer, stages, self.view, self.model, self.request, self.source)
            for offer in losers
        )
        return tuple(sorted((*rejections, *compared), key=lambda rejection: rejection.peer))


def plan(
    view: View,
    model: ModelShape,
    request: RouteRequest,
    *,
    source: PeerId,
    now_ms: int,
    alternates: int = 1,
) -> Plan:
    """Choose the best route for a driver at ``source``, and up to ``alternates`` spares.

    Spares share no peer with the chosen route or each other, but for peers that serve a
    layer nobody else could; at least one peer of the chosen route is avoided. Raises
    ``NoRoute`` naming the layers or the bound that failed, and ``RouteError`` if bounds
    leave too many comparable routes to compare.
    """
    eligible, rejections = sift(view, model, request, now_ms)
    graph = Graph(view, eligible, model, request, source)
    if missing := graph.missing():
        raise _missing_layers(missing, view, model, request, rejections)
    goal = goal_of(request)
    best = best_route(graph, goal)
    if best is None:
        raise _failed_bound(graph)
    stages = graph.stages(best)
    chosen = {offer.peer for offer, _ in stages}
    spares = tuple(
        Alternate(
            *_planned(graph, spare),
            tuple(offer.peer for offer, _ in spare if offer.peer in chosen),
        )
        for spare in _spare_routes(graph, goal, stages, alternates)
    )
    return Plan(*_planned(graph, stages), spares, view, model, request, source, now_ms)


def _planned(graph: Graph, stages: Stages) -> tuple[tuple[PlannedStage, ...], Prediction]:
    planned = tuple(
        PlannedStage(offer, span, graph.model.priced_layers(span)) for offer, span in stages
    )
    predicted = cost.predict(graph.view, stages, graph.model, graph.request, graph.source)
    return planned, predicted


def _spare_routes(graph: Graph, goal: Goal, best: Stages, count: int) -> list[Stages]:
    """Routes that avoid all peers used so far; where a layer has no other host, the rest."""
    spares: list[Stages] = []
    used = {offer.peer for offer, _ in best}
    while len(spares) < count:
        avoided = used - _irreplaceable(graph, used)
        spare = _best_without(graph, goal, avoided) if avoided else None
        if spare is None:
            break
        spares.append(spare)
        used |= {offer.peer for offer, _ in spare}
    if not spares and count and len(best) > 1:
        # The rest do not join into a route: lose one peer at a time.
        single = (_best_without(graph, goal, {offer.peer}) for offer, _ in best)
        spares = [spare for spare in single if spare is not None][:count]
    return spares


def _best_without(graph: Graph, goal: Goal, avoided: set[PeerId]) -> Stages | None:
    others = graph.without(avoided)
    if others.missing():
        return None
    try:
        route = best_route(others, goal, labels_max=_SPARE_LABELS_MAX)
    except RouteError:
        return None  # Spares are a courtesy: the chosen route stands without them.
    return others.stages(route) if route is not None else None


def _irreplaceable(graph: Graph, used: set[PeerId]) -> set[PeerId]:
    """Those of the used peers that serve some layer which nobody else could."""
    mine = np.array([offer.peer in used for offer in graph.offers])
    alone = ~(graph.run_end[:, ~mine] > 0).any(axis=1)
    needed = (graph.run_end[alone] > 0).any(axis=0)
    return {graph.offers[at].peer for at in np.flatnonzero(needed).tolist()}


def _missing_layers(
    missing: tuple[tuple[int, int], ...],
    view: View,
    model: ModelShape,
    request: RouteRequest,
    rejections: Sequence[Rejection],
) -> NoRoute:
    names = ", ".join(f"{start}:{end}" for start, end in missing)
    message = f"no eligible host for layers {names} of {model.name}"
    barred = [
        rejection
        for rejection in rejections
        if rejection.code != "wrong-model" and _touches(view.offers[rejection.peer].span, missing)
    ]
    if barred:
        codes = sorted(rejection.code for rejection in barred)
        counts = ", ".join(f"{code} ×{len(list(group))}" for code, group in groupby(codes))
        message += f"; hosts that were rejected: {counts}"
    pins = [f"{span} to {peer}" for span, peer in request.pin if _touches(span, missing)]
    if pins:
        message += f"; pinned: {', '.join(pins)}"
    remedy = "see why each peer was rejected: plait route MODEL --explain"
    return NoRoute(message, missing=missing, remedy=remedy)


def _touches(span: Span, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(span.start < end and start < span.end for start, end in ranges)


def _failed_bound(graph: Graph) -> NoRoute:
    """Name the bound that no route keeps: each is lifted or minimised in turn."""
    request = graph.request
    if request.max_price is not None:
        free = goal_of(replace(request, sort="price", max_price=None))
        cheapest = best_route(graph, free)
        if cheapest is not None:
            price = PRICE.of(graph.totals(cheapest))
            return NoRoute(
                f"the cheapest route costs {price} microcredits, over the limit of "
                f"{request.max_price}",
                cheapest=price,
                remedy=f"allow at least {price}: --max-price {price}",
            )
    for measure, bound_s, name in (
        (TTFT, request.ttft_s, "time to first token"),
        (TPOT, request.tpot_s, "time per output token"),
    ):
        fastest = best_route(graph, Goal((measure,)))
        if fastest is None:
            return NoRoute(
                "the hosts of all layers do not join into a pipeline that visits each peer once"
                + (", pins included" if request.pin else ""),
                remedy="see why each peer was rejected: plait route MODEL --explain",
            )
        fastest_s = measure.of(graph.totals(fastest)) / 1e9
        if bound_s is not None and fastest_s > bound_s:
            return NoRoute(
                f"the shortest {name} is {fastest_s:.4f} s, over the limit of {bound_s} s",
                remedy=f"allow at least {fastest_s:.4f} s",
            )
    return NoRoute(
        "no route keeps both the time to first token and the time per output token",
        remedy="loosen one of them",
    )
