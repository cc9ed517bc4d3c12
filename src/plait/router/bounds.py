"""The search graph of one request, and what is left to pay from each of its states.

A state is (boundary, peer): layers ``[0, boundary)`` are done and the peer did the last of
them. All tables are lower bounds of the remaining cost, exact unless a figure is absurdly
large (it is then cut, which keeps a bound a bound), a link was measured slower than the
pessimistic guess for unmeasured ones, or the cheapest rest would visit a peer twice.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plait.router import cost
from plait.router.cost import Link, Totals
from plait.router.request import RouteRequest
from plait.router.view import Integers, Offer, View
from plait.types import MILLION, ModelShape, PeerId, Span

Route = tuple[tuple[int, Span], ...]
"""(peer index, sub-span) per stage."""

UNREACHABLE = 2**62
_TABLE_MAX = 2**61
DRIVER = -1
"""Stands for the driver where a peer's index is expected."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A weighted sum of a route's totals, to be minimised or bounded.

    ``price`` is 1 and the times 0 for the price itself; a mixed measure needs a ``price``
    weight divisible by a million, because its table works on unrounded prices.
    """

    price: int = 0
    ttft: int = 0
    tpot: int = 0

    def of(self, totals: Totals) -> int:
        """The value of the measure."""
        return self.price * totals.price + self.ttft * totals.ttft_ns + self.tpot * totals.tpot_ns


@dataclass(frozen=True, slots=True)
class Choices:
    """All stages that can start at one boundary, as parallel arrays.

    ``peer`` (index), ``end`` (boundary) and ``layers`` (cost layers of the stage).
    """

    peer: Integers
    end: Integers
    layers: Integers


class Graph:
    """Eligible offers of one request as arrays. ``offers`` are in peer id order."""

    def __init__(
        self,
        view: View,
        offers: Sequence[Offer],
        model: ModelShape,
        request: RouteRequest,
        source: PeerId,
    ) -> None:
        self.view, self.model, self.request, self.source = view, model, request, source
        self.offers = tuple(offers)
        self.index = {offer.peer: index for index, offer in enumerate(self.offers)}
        self.size = len(self.offers)
        self.layers = model.layers
        weights = [model.priced_layers(Span(b, b + 1)) for b in range(self.layers)]
        self.weights = weights
        self.prefix = np.concatenate(([0], np.cumsum(np.array(weights, dtype=np.int64))))
        self.run_end = self._run_ends()
        self._choices: dict[int, Choices] = {}
        self._tables: dict[Measure, Table] = {}
        self._hops: dict[tuple[int, int], Totals] = {}

    def _run_ends(self) -> Integers:
        """[layers, peers]: how far a stage that starts at a boundary can go; 0: nowhere."""
        starts = np.array([offer.span.start for offer in self.offers], dtype=np.int64)
        ends = np.array([offer.span.end for offer in self.offers], dtype=np.int64)
        boundaries = np.arange(self.layers)[:, None]
        hosts = (starts <= boundaries) & (boundaries < ends)
        if not self.request.pin:
            return np.where(hosts, ends, 0)
        for span, peer in self.request.pin:
            hosts[span.start : span.end] &= np.arange(self.size) == self.index.get(peer, DRIVER)
        run_end = np.zeros((self.layers + 1, self.size), dtype=np.int64)
        for b in range(self.layers - 1, -1, -1):
            run_end[b] = np.where(hosts[b], np.maximum(run_end[b + 1], b + 1), 0)
        return run_end[:-1]

    @cached_property
    def links(self) -> "Links":
        """The measured links among the eligible peers."""
        return Links(self)

    @cached_property
    def speeds(self) -> "Speeds":
        """What the peers can do."""
        return Speeds(self)

    def missing(self) -> tuple[tuple[int, int], ...]:
        """Layers without an eligible host, as half-open ranges."""
        ranges: list[tuple[int, int]] = []
        for b in np.flatnonzero(~self.run_end.any(axis=1)).tolist():
            if ranges and ranges[-1][1] == b:
                ranges[-1] = (ranges[-1][0], b + 1)
            else:
                ranges.append((b, b + 1))
        return tuple(ranges)

    def choices(self, boundary: int) -> Choices:
        """All stages that can start at ``boundary``, the longest first, then by peer."""
        known = self._choices.get(boundary)
        if known is None:
            run_end = self.run_end[boundary]
            ends = np.arange(self.layers, boundary, -1)
            at, peer = np.nonzero(run_end >= ends[:, None])
            layers = self.prefix[ends[at]] - self.prefix[boundary]
            known = self._choices[boundary] = Choices(peer, ends[at], layers)
        return known

    def table(self, measure: Measure) -> "Table":
        """The lower bounds for a measure; built once."""
        known = self._tables.get(measure)
        if known is None:
            is_price = not measure.ttft and not measure.tpot
            known = PriceTable(self) if is_price else LinearTable(self, measure)
            self._tables[measure] = known
        return known

    def step(self, before: int, peer: int, span: Span) -> Totals:
        """Exact cost of the hop from ``before`` (an index or DRIVER) and of the stage."""
        hop = self._hops.get((before, peer))
        if hop is None:
            hop = self._hops[before, peer] = self._hop(before, peer)
        layers, speeds = int(self.prefix[span.end] - self.prefix[span.start]), self.speeds
        return Totals(
            hop.ttft_ns + layers * speeds.prefill_ns[peer],
            hop.tpot_ns + layers * speeds.decode_ns[peer],
            -(-layers * speeds.price_millionths[peer] // MILLION),
        )

    def _hop(self, before: int, peer: int) -> Totals:
        offer = self.offers[peer]
        if before == DRIVER:
            return cost.hop_out(cost.link(self.view, self.source, offer.peer), self.request)
        link = cost.link(self.view, self.offers[before].peer, offer.peer)
        return cost.hop_between(link, self.model, self.request)

    def stages(self, route: Route) -> list[tuple[Offer, Span]]:
        """The route as offers."""
        return [(self.offers[peer], span) for peer, span in route]

    def totals(self, route: Route) -> Totals:
        """Exact sums over a complete route."""
        return cost.totals(self.view, self.stages(route), self.model, self.request, self.source)

    def without(self, peers: Container[PeerId]) -> "Graph":
        """The graph of the other peers."""
        others = [offer for offer in self.offers if offer.peer not in peers]
        return Graph(self.view, others, self.model, self.request, self.source)

    def back(self, peer: int) -> Totals:
        """Exact cost of the hop from the last stage to the driver."""
        link = cost.link(self.view, self.offers[peer].peer, self.source)
        return cost.hop_back(link, self.request)


class Speeds:
    """Per peer and cost layer: what decoding, the whole prompt and the whole request take."""

    def __init__(self, graph: Graph) -> None:
        offers, model, request = graph.offers, graph.model, graph.request
        prompt = request.prompt_tokens
        self.decode_ns = [cost.decode_ns_per_layer(offer, model) for offer in offers]
        self.prefill_ns = [cost.prefill_ns_per_layer(offer, model) * prompt for offer in offers]
        self.price_millionths = [
            cost.price_per_layer_millionths(offer, request) for offer in offers
        ]


class Links:
    """Links of a graph as arrays: of the driver by peer, and measured edges between peers.

    ``source`` and ``target`` are the edges' ends, ``sources`` the peers that have any and
    ``starts`` the offsets of their runs; a link without an edge is ``unknown``. ``*_ns`` are
    half a round trip, one token id, one row of activations.
    """

    def __init__(self, graph: Graph) -> None:
        driver = [cost.link(graph.view, graph.source, offer.peer) for offer in graph.offers]
        self.driver_half_ns = np.array([link.half_rtt_ns for link in driver], dtype=np.int64)
        ids_ns = [link.transfer_ns(cost.ID_BYTES) for link in driver]
        self.driver_id_ns = np.array(ids_ns, dtype=np.int64)
        self.unknown = Link(cost.UNKNOWN_RTT_US * 500, cost.UNKNOWN_LINK_BANDWIDTH)
        table = graph.view.link_table()
        renumber = np.array([graph.index.get(peer, -1) for peer in table.peers], dtype=np.int64)
        source, target = renumber[table.source], renumber[table.target]
        kept = np.flatnonzero((source >= 0) & (target >= 0))
        # Renumbering may reorder sources: the edges must stay grouped by source.
        kept = kept[np.argsort(source[kept], kind="stable")]
        self.source, self.target = source[kept], target[kept]
        self.half_ns = table.rtt_us[kept] * 500
        bandwidth = table.bandwidth[kept]
        bandwidth = np.where(bandwidth > 0, bandwidth, cost.UNMEASURED_BANDWIDTH)
        self.row_ns = -(-graph.model.bytes_per_row * 1_000_000_000 // bandwidth)
        self.sources, self.starts = np.unique(self.source, return_index=True)


class Table:
    """Lower bounds of one measure. ``hop`` rows are by peer index."""

    def rest(self, boundary: int) -> Integers:
        """For each of ``choices(boundary)``: the stage and everything after it."""
        raise NotImplementedError

    def hop(self, before: int) -> Integers:
        """For each peer: the hop to it from ``before``."""
        raise NotImplementedError


class PriceTable(Table):
    """Prices are rounded up stage by stage, and independent of links.

    ``cheapest[b]`` is the lowest price of layers ``[b, layers)`` in microcredits. It is
    found in millionths: rounding up is monotone, so the best rest after rounding is the
    rounded best rest, and one recursion over layers suffices.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._no_hop = np.zeros(graph.size, dtype=np.int64)
        self._rest: dict[int, Integers] = {}
        self._rates = _rates(graph, Measure(price=MILLION))
        self.cheapest = np.zeros(graph.layers + 1, dtype=np.int64)
        going_on = np.full(graph.size, UNREACHABLE, dtype=np.int64)
        for b in range(graph.layers - 1, -1, -1):
            stop = self.cheapest[b + 1] * MILLION
            going_on = graph.weights[b] * self._rates + np.minimum(going_on, stop)
            going_on = np.where(graph.run_end[b] > 0, going_on, UNREACHABLE)
            lowest = going_on.min(initial=UNREACHABLE)
            self.cheapest[b] = -(-lowest // MILLION)

    def rest(self, boundary: int) -> Integers:
        known = self._rest.get(boundary)
        if known is None:
            choices = self._graph.choices(boundary)
            stage = -(-self._rates[choices.peer] * choices.layers // MILLION)
            known = self._rest[boundary] = stage + self.cheapest[choices.end]
        return known

    def hop(self, before: int) -> Integers:
        return self._no_hop


class LinearTable(Table):
    """A measure that adds up layer by layer and hop by hop: one backward sweep.

    ``leave[b, p]`` is the least cost of everything after a stage on ``p`` that ends at
    ``b``, the hop included.
    """

    def __init__(self, graph: Graph, measure: Measure) -> None:
        self._graph, self._measure = graph, measure
        self._rates = _rates(graph, measure)
        self._rest: dict[int, Integers] = {}
        self._hops: dict[int, Integers] = {}
        links, request = graph.links, graph.request
        self._hop_max = _TABLE_MAX // (graph.layers + 2)
        self._rounds = measure.ttft * request.prefill_rounds + measure.tpot
        self._prompt = measure.ttft * request.prompt_tokens + measure.tpot
        unknown = measure.of(cost.hop_between(links.unknown, graph.model, request))
        self._unknown = min(unknown, self._hop_max)
        self._edges = self._cost(links.half_ns, links.row_ns, self._prompt)
        self._leave = self._sweep()

    def _cost(self, half_ns: Integers, bytes_ns: Integers, weight: int) -> Integers:
        """Hops of the measure. Each factor is cut first, so that no product leaves 64 bits."""
        half_max = self._hop_max // 2
        rounds, weight = min(self._rounds, half_max), min(weight, half_max)
        half = np.minimum(half_ns, half_max // max(1, rounds)) * rounds
        total: Integers = half + np.minimum(bytes_ns, half_max // max(1, weight)) * weight
        return total

    def _sweep(self) -> Integers:
        graph, links, measure = self._graph, self._graph.links, self._measure
        leave = np.empty((graph.layers + 1, graph.size), dtype=np.int64)
        back_weight = measure.ttft + measure.tpot
        leave[-1] = self._cost(links.driver_half_ns, links.driver_id_ns, back_weight)
        enter = np.full(graph.size, UNREACHABLE, dtype=np.int64)
        barred = np.where(graph.run_end > 0, 0, UNREACHABLE)
        for b in range(graph.layers - 1, -1, -1):
            enter = graph.weights[b] * self._rates + np.minimum(leave[b + 1], enter)
            np.maximum(enter, barred[b], out=enter)
            np.minimum(enter, UNREACHABLE, out=enter)
            if b:
                leave[b] = self._leave_row(enter, links)
        return leave

    def _leave_row(self, enter: Integers, links: Links) -> Integers:
        best = int(enter.argmin())
        row = np.full(len(enter), enter[best] + self._unknown)
        lowest, enter[best] = int(enter[best]), UNREACHABLE
        row[best] = enter.min() + self._unknown
        enter[best] = lowest
        if len(links.starts):
            measured = np.minimum.reduceat(self._edges + enter[links.target], links.starts)
            row[links.sources] = np.minimum(row[links.sources], measured)
        np.minimum(row, UNREACHABLE, out=row)
        return row

    def rest(self, boundary: int) -> Integers:
        known = self._rest.get(boundary)
        if known is None:
            choices = self._graph.choices(boundary)
            stage = self._rates[choices.peer] * choices.layers
            known = self._rest[boundary] = stage + self._leave[choices.end, choices.peer]
        return known

    def hop(self, before: int) -> Integers:
        known = self._hops.get(before)
        if known is None:
            known = self._hops[before] = self._hop_row(before)
        return known

    def _hop_row(self, before: int) -> Integers:
        graph, links = self._graph, self._graph.links
        if before == DRIVER:
            return self._cost(links.driver_half_ns, links.driver_id_ns, self._prompt)
        row = np.full(graph.size, self._unknown, dtype=np.int64)
        first, last = np.searchsorted(links.source, [before, before + 1])
        row[links.target[first:last]] = self._edges[first:last]
        return row


def _rates(graph: Graph, measure: Measure) -> Integers:
    """Cost per cost layer of each peer, cut so that a whole route stays in 64 bits."""
    speeds, price = graph.speeds, measure.price // MILLION
    rate_max = _TABLE_MAX // max(1, int(graph.prefix[-1]))
    figures = zip(speeds.price_millionths, speeds.prefill_ns, speeds.decode_ns, strict=True)
    rates = [
        min(price * millionths + measure.ttft * prefill_ns + measure.tpot * decode_ns, rate_max)
        for millionths, prefill_ns, decode_ns in figures
    ]
    return np.array(rates, dtype=np.int64)
