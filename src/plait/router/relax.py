"""Tighter bounds under limits: what a limit is worth, found by Lagrangian relaxation.

For any worth ``w >= 0`` of a measure ``m`` limited to ``limit``, every route within the limit
has ``score >= score + w * (m - limit)``, and the right side is additive, so the table of
``score + w * m`` bounds the score. The best worth is approached by secants between a route
that breaks the limit and one that keeps it (Handler and Zang 1980); a poor worth makes the
search slower, never wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.router.bounds import DRIVER, UNREACHABLE, Graph, Measure
from plait.router.cost import Totals
from plait.types import MILLION, Span

_ROUNDS_MAX = 4
_VALUE_MAX = 2**56
"""Values of a mixed measure are scaled to about this: precise, and far from overflow."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Within the limits, ``scale * score >= measure - offset``."""

    measure: Measure
    scale: int
    offset: int


def cuts_for(
    graph: Graph,
    score: Measure,
    limits: Sequence[tuple[Measure, int]],
) -> tuple[Cut, ...]:
    """Cuts for the limits that the best unlimited route breaks, each on top of those before."""
    base = Cut(score, 1, 0)
    cuts: list[Cut] = []
    for measure, limit in limits:
        stronger = _strengthen(graph, base, measure, limit)
        if stronger is not None:
            base = stronger
            cuts.append(stronger)
    return tuple(cuts)


def _strengthen(graph: Graph, base: Cut, measure: Measure, limit: int) -> Cut | None:
    over = _dive(graph, base.measure)
    if over is None or measure.of(over) <= limit:
        return None
    under = _dive(graph, measure)
    if under is None:
        return None
    best: Cut | None = None
    for _ in range(_ROUNDS_MAX):
        rise = base.measure.of(under) - base.measure.of(over)
        fall = measure.of(over) - measure.of(under)
        if rise <= 0 or fall <= 0:
            break
        best = _mixed(base, measure, limit, rise, fall, base.measure.of(under))
        between = _dive(graph, best.measure)
        # No route lies below the line through the two: the worth is found.
        if between is None or best.measure.of(between) >= best.measure.of(over) * 0.999:
            break
        if measure.of(between) > limit:
            over = between
        else:
            under = between
    return best if best is not None and 0 <= best.offset < UNREACHABLE // 2 else None


def _mixed(base: Cut, measure: Measure, limit: int, rise: int, fall: int, value: int) -> Cut:
    """The cut that prices ``measure`` at ``rise / fall`` of the base."""
    scale = max(1, _VALUE_MAX // max(1, value))
    if base.measure.price % MILLION:
        scale = max(1, scale // MILLION) * MILLION
    worth = scale * rise // fall
    if measure.price:
        worth = worth // MILLION * MILLION
    mixed = Measure(
        scale * base.measure.price + worth * measure.price,
        scale * base.measure.ttft + worth * measure.ttft,
        scale * base.measure.tpot + worth * measure.tpot,
    )
    return Cut(mixed, scale * base.scale, scale * base.offset + worth * limit)


def _dive(graph: Graph, measure: Measure) -> Totals | None:
    """Totals of the route found by always taking what the table calls best."""
    table, totals = graph.table(measure), Totals()
    boundary, before = 0, DRIVER
    while boundary < graph.layers:
        choices = graph.choices(boundary)
        bounds = table.hop(before)[choices.peer] + table.rest(boundary)
        bounds[choices.peer == before] = UNREACHABLE
        at = int(bounds.argmin())
        if bounds[at] >= UNREACHABLE:
            return None
        peer, end = int(choices.peer[at]), int(choices.end[at])
        totals += graph.step(before, peer, Span(boundary, end))
        boundary, before = end, peer
    return totals + graph.back(before)
