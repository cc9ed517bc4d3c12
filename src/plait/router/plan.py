"""Plan a route: the best complete pipeline under a request's bounds, and spares for it.

Pure: the same view, model, request, source and time always give the same plan, whatever
the order of the view's mappings.

What a hop costs depends on the whole route: only where all stages round do rows cross it in
fewer bytes. So where both kinds of stages are on offer, the best route of rounding stages, at
their bytes, is held against the best of all, at fp32's: no third can be better.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np

from plait.errors import NoRoute, RouteError
from plait.router import cost
from plait.router.bounds import Graph, Route
from plait.router.compare import outclassed
from plait.router.cost import Prediction, Stages
from plait.router.eligibility import Rejection, rules_in_the_way, sift
from plait.router.request import RouteRequest
from plait.router.search import PRICE, TPOT, TTFT, Goal, best_route, goal_of
from plait.router.view import Offer, View
from plait.router.wire_choice import on_wire, rounds, wire_of
from plait.types import ModelShape, PeerId, Span, WireDtype

_SPARE_LABELS_MAX = 2_000
_SEE_WHY = "see why each peer was rejected: `explain`"


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
    wire_dtype: WireDtype = "fp32"
    """What it was predicted for."""

    @property
    def costed(self) -> ModelShape:
        """The model as the cost model has to see it: rows as long as they are on the wire."""
        return on_wire(self.model, self.wire_dtype)

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """Why each peer of the view that is not in the route is not; by peer id."""
        eligible, rejections = sift(self.view, self.model, self.request, self.now_ms)
        stages = [(stage.offer, stage.span) for stage in self.stages]
        chosen = {offer.peer for offer, _ in stages}
        losers = (offer for offer in eligible if offer.peer not in chosen)
        compared = (
            outclassed(offer, stages, self.view, self.costed, self.request, self.source)
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
    goal = goal_of(request)
    graph, best = _best(_graphs(view, eligible, model, request, source), goal)
    if missing := graph.missing():
        raise _missing_layers(missing, view, model, request, rejections)
    if best is None:
        raise _failed_bound(graph)
    stages = graph.stages(best)
    chosen = {offer.peer for offer, _ in stages}
    spares = tuple(
        Alternate(
            *_planned(graph, spare, model),
            tuple(offer.peer for offer, _ in spare if offer.peer in chosen),
        )
        for spare in _spare_routes(graph, goal, stages, alternates)
    )
    wire = wire_of(view, stages, model, request, source)
    planned, predicted = _planned(graph, stages, model)
    return Plan(planned, predicted, spares, view, model, request, source, now_ms, wire)


def _graphs(
    view: View,
    eligible: Sequence[Offer],
    model: ModelShape,
    request: RouteRequest,
    source: PeerId,
) -> list[Graph]:
    """The offers to search among, with what their rows cost on the wire; all of them last."""
    rounding = [offer for offer in eligible if rounds(offer)]
    fewer_bytes = on_wire(model, request.wire or "bf16")
    graphs = []
    if rounding:
        graphs.append(Graph(view, rounding, fewer_bytes, request, source))
    if len(rounding) < len(eligible) or not rounding:
        graphs.append(Graph(view, eligible, model, request, source))
    return graphs


def _best(graphs: Sequence[Graph], goal: Goal) -> tuple[Graph, Route | None]:
    """The best route of all, and where it was found; the first of equals."""
    found = [
        (goal.scores(graph.totals(route)), number, graph, route)
        for number, graph in enumerate(graphs)
        if not graph.missing() and (route := best_route(graph, goal)) is not None
    ]
    if not found:
        return graphs[-1], None
    _, _, graph, route = min(found, key=lambda one: one[:2])
    return graph, route


def _planned(
    graph: Graph, stages: Stages, model: ModelShape
) -> tuple[tuple[PlannedStage, ...], Prediction]:
    planned = tuple(PlannedStage(offer, span, model.priced_layers(span)) for offer, span in stages)
    wire = wire_of(graph.view, stages, model, graph.request, graph.source)
    costed = on_wire(model, wire)
    predicted = cost.predict(graph.view, stages, costed, graph.request, graph.source)
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
    rules = rules_in_the_way(view, model, request)
    remedy = (
        f"allow more peers: {' or '.join(f'`{rule}`' for rule in rules)}" if rules else _SEE_WHY
    )
    return NoRoute(message, missing=missing, options=rules, remedy=remedy)


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
                options=("max_price",),
                remedy=f"allow at least {price}: `max_price`",
            )
    for measure, bound_s, name, option in (
        (TTFT, request.ttft_s, "time to first token", "ttft_s"),
        (TPOT, request.tpot_s, "time per output token", "tpot_s"),
    ):
        fastest = best_route(graph, Goal((measure,)))
        if fastest is None:
            return NoRoute(
                "the hosts of all layers do not join into a pipeline that visits each peer once"
                + (", pins included" if request.pin else ""),
                options=("pin",) if request.pin else (),
                remedy=_SEE_WHY,
            )
        fastest_s = measure.of(graph.totals(fastest)) / 1e9
        if bound_s is not None and fastest_s > bound_s:
            return NoRoute(
                f"the shortest {name} is {fastest_s:.4f} s, over the limit of {bound_s} s",
                options=(option,),
                remedy=f"allow at least {fastest_s:.4f} s: `{option}`",
            )
    return NoRoute(
        "no route keeps both the time to first token and the time per output token",
        options=("ttft_s", "tpot_s"),
        remedy="loosen one of them: `ttft_s`, `tpot_s`",
    )
