"""Exact search for the best route: label setting with resource bounds.

Labels are beginnings of routes at a state (boundary, last peer), expanded best first by a
lower bound on the complete score, so the first complete label taken is the best. A label is
dropped when its bound breaks a limit, or when another at its state is no worse in every
measure in use. Each layer boundary is a possible cut: cuts only where some span starts or
ends would not do, since a limit, a price rounded up per stage, or a stage of one layer that
saves a slow hop can make an inner cut the best.

A peer serves at most one stage. That is enforced by relaxation: the search first forbids
only to stay on a peer under another name, and where the best route visits a peer twice,
that peer's visits become part of the labels (dominance then compares them) and the search
is repeated. Limits are relaxed alike: one comes into force when the best route breaks it. A
relaxed optimum that visits no peer twice and keeps every limit is the true optimum, and what
is watched only grows, so this ends. (Boland et al. 2006; Righini and Salani 2008.)
"""

from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from plait.errors import RouteError
from plait.router.bounds import DRIVER, UNREACHABLE, Choices, Graph, Measure, Route, Table
from plait.router.cost import Totals
from plait.router.relax import Cut, cuts_for
from plait.router.request import RouteRequest
from plait.router.view import Integers
from plait.types import Span

LABELS_MAX = 100_000
"""Beyond this a search is given up: hostile offers must not hold a driver."""
JOINT_LABELS = 600
"""A search under several limits that takes more gets joint bounds."""

PRICE = Measure(price=1)
TTFT = Measure(ttft=1)
TPOT = Measure(tpot=1)
_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Goal:
    """What to minimise, in order of importance, and (measure, greatest value) limits."""

    score: tuple[Measure, ...]
    limits: tuple[tuple[Measure, int], ...] = ()

    def scores(self, totals: Totals) -> tuple[int, ...]:
        """The score of a complete route: smaller is better."""
        return tuple(measure.of(totals) for measure in self.score)

    def allows(self, totals: Totals) -> bool:
        """Whether a complete route keeps every limit."""
        return all(measure.of(totals) <= limit for measure, limit in self.limits)


def goal_of(request: RouteRequest) -> Goal:
    """The goal a request's ``sort`` and bounds stand for."""
    whole = Measure(ttft=1, tpot=request.max_tokens - 1)
    weight = request.latency_weight
    score = {
        "latency": (whole,),
        "throughput": (TPOT, TTFT),
        "price": (PRICE, whole),
        "weighted": (Measure(_NANO, weight, weight * whole.tpot),) if weight else (PRICE, whole),
    }[request.sort]
    limits: list[tuple[Measure, int]] = []
    if request.max_price is not None:
        limits.append((PRICE, request.max_price))
    if request.ttft_s is not None:
        limits.append((TTFT, int(request.ttft_s * _NANO)))
    if request.tpot_s is not None:
        limits.append((TPOT, int(request.tpot_s * _NANO)))
    return Goal(score, tuple(limits))


@dataclass(slots=True)
class _Label:
    peer: int
    span: Span | None
    totals: Totals
    parent: "_Label | None"
    watched: int = 0
    """Bit set of the watched peers visited."""

    def route(self) -> Route:
        stages: list[tuple[int, Span]] = []
        label: _Label | None = self
        while label is not None and label.span is not None:
            stages.append((label.peer, label.span))
            label = label.parent
        return tuple(reversed(stages))


@dataclass(slots=True)
class _Cursor:
    """A label's possible next stages, taken one by one in order of promise.

    ``bounds`` are lower bounds of the score for each choice; the first is set to
    UNREACHABLE where a choice is forbidden or was taken.
    """

    label: _Label
    boundary: int
    choices: Choices
    bounds: list[Integers]
    at: int = -1

    def advance(self) -> bool:
        """Move to the most promising choice left; False if there is none."""
        first = self.bounds[0]
        if self.at >= 0:
            first[self.at] = UNREACHABLE
        self.at = int(first.argmin())
        if first[self.at] >= UNREACHABLE:
            return False
        if len(self.bounds) > 1:
            equal = np.flatnonzero(first == first[self.at])
            self.at = int(equal[self.bounds[1][equal].argmin()])
        return True


@dataclass(slots=True)
class _Frontier:
    """Vectors of the labels kept at each state."""

    kept: dict[tuple[int, int], list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)

    def admit(self, state: tuple[int, int], vector: tuple[int, ...], watched: int) -> bool:
        """Keep the vector unless a kept one dominates it."""
        others = self.kept.setdefault(state, [])
        for other, other_watched in others:
            if not other_watched & ~watched and all(
                a <= b for a, b in zip(other, vector, strict=True)
            ):
                return False
        others.append((vector, watched))
        return True


def best_route(graph: Graph, goal: Goal, *, labels_max: int = LABELS_MAX) -> Route | None:
    """The best complete route on the graph, or None.

    Ties go to the route whose stages are longer, then to the lower peer ids. Raises
    ``RouteError`` if a search would take more than ``labels_max`` labels.
    """
    watched: frozenset[int] = frozenset()
    active, bounds = Goal(goal.score), _Bounds(labels_max)
    while True:
        search = _Search(graph, active, watched, bounds)
        route = search.run()
        if search.gave_up:
            bounds = _joint_bounds(bounds, graph, active, labels_max)
            continue
        if route is None:
            return None
        broken = [pair for pair in goal.limits if pair[0].of(graph.totals(route)) > pair[1]]
        peers = [peer for peer, _ in route]
        repeated = frozenset(peer for peer in peers if peers.count(peer) > 1)
        if broken:
            active = Goal(goal.score, (*active.limits, broken[0]))
            first_max = labels_max if len(active.limits) == 1 else min(labels_max, JOINT_LABELS)
            bounds = _Bounds(first_max, cuts_for(graph, goal.score[0], active.limits))
        elif not repeated:
            return route
        watched |= repeated


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What a search prunes with, beyond the plain tables, and when it gives up.

    ``cuts`` bound the score under the limits in force. ``joint`` limits what each limited
    measure costs in terms of the others, for limits that are each in reach and not together;
    it takes several sweeps, so it is made only when a search drags on.
    """

    labels_max: int
    cuts: tuple[Cut, ...] = ()
    joint: tuple[tuple[Measure, int], ...] = ()


def _joint_bounds(bounds: _Bounds, graph: Graph, goal: Goal, labels_max: int) -> _Bounds:
    if bounds.labels_max >= labels_max:
        raise RouteError(
            "too many comparable routes under these bounds",
            remedy="loosen a bound, or restrict the peers: `only`",
        )
    joint = tuple(
        (cut.measure, cut.scale * limit + cut.offset)
        for number, (measure, limit) in enumerate(goal.limits[:-1], 1)
        for cut in cuts_for(graph, measure, goal.limits[number:])
    )
    return _Bounds(labels_max, bounds.cuts, joint)


class _Search:
    def __init__(
        self,
        graph: Graph,
        goal: Goal,
        watched: frozenset[int],
        bounds: _Bounds,
    ) -> None:
        self._graph, self._goal = graph, goal
        self._bit = {peer: 1 << position for position, peer in enumerate(sorted(watched))}
        self._score = [graph.table(measure) for measure in goal.score]
        self._cuts = [(graph.table(cut.measure), cut) for cut in bounds.cuts]
        self._limits = [
            (graph.table(m), m, min(limit, UNREACHABLE - 1))
            for m, limit in (*goal.limits, *bounds.joint)
        ]
        limited = [m for m, _ in goal.limits if m not in goal.score]
        self._vector = (*goal.score, *limited)
        self._frontier = _Frontier()
        self._heap: list[tuple[tuple[int, ...], int, int, _Cursor | _Label]] = []
        self._serial = 0
        self._labels_max = bounds.labels_max
        self.gave_up = False

    def run(self) -> Route | None:
        self._expand(_Label(DRIVER, None, Totals(), None), 0)
        while self._heap:
            if self._serial > self._labels_max:
                self.gave_up = True
                return None
            *_, item = heappop(self._heap)
            if isinstance(item, _Label):
                return item.route()
            self._take(item)
        return None

    def _push_next(self, cursor: _Cursor) -> None:
        if cursor.advance():
            self._serial += 1
            bounds = tuple(int(bound[cursor.at]) for bound in cursor.bounds)
            # Among equals the route that is furthest first.
            depth = -int(cursor.choices.end[cursor.at])
            heappush(self._heap, (bounds, depth, self._serial, cursor))

    def _take(self, cursor: _Cursor) -> None:
        """Turn the cursor's next choice into a label, and move the cursor on."""
        parent, at = cursor.label, cursor.at
        peer, end = int(cursor.choices.peer[at]), int(cursor.choices.end[at])
        self._push_next(cursor)
        span = Span(cursor.boundary, end)
        totals = parent.totals + self._graph.step(parent.peer, peer, span)
        watched = parent.watched | self._bit.get(peer, 0)
        label = _Label(peer, span, totals, parent, watched)
        if end == self._graph.layers:
            self._complete(label)
            return
        vector = tuple(measure.of(totals) for measure in self._vector)
        if self._frontier.admit((end, peer), vector, watched):
            self._expand(label, end)

    def _complete(self, label: _Label) -> None:
        label.totals += self._graph.back(label.peer)
        if self._goal.allows(label.totals):
            self._serial += 1
            score = self._goal.scores(label.totals)
            entry = (score, -self._graph.layers - 1, self._serial, label)
            heappush(self._heap, entry)

    def _expand(self, label: _Label, boundary: int) -> None:
        choices = self._graph.choices(boundary)
        forbidden = choices.peer == label.peer
        barred = [peer for peer, bit in self._bit.items() if label.watched & bit]
        for peer in barred:
            forbidden |= choices.peer == peer
        for table, measure, limit in self._limits:
            bound = self._bound(table, measure, label, boundary, choices.peer)
            forbidden |= bound > limit
        scores = [
            self._bound(table, measure, label, boundary, choices.peer)
            for table, measure in zip(self._score, self._goal.score, strict=True)
        ]
        for table, cut in self._cuts:
            bound = self._bound(table, cut.measure, label, boundary, choices.peer)
            np.maximum(scores[0], -((cut.offset - bound) // cut.scale), out=scores[0])
        scores[0][forbidden] = UNREACHABLE
        self._push_next(_Cursor(label, boundary, choices, scores))

    def _bound(
        self, table: Table, measure: Measure, label: _Label, boundary: int, peers: Integers
    ) -> Integers:
        """A lower bound on the complete route's measure for each choice at the boundary."""
        # Three terms of at most 2**61 and 2**62 stay in 64 bits.
        spent = min(measure.of(label.totals), UNREACHABLE // 4)
        return spent + table.hop(label.peer)[peers] + table.rest(boundary)
