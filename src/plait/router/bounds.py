"""The search graph of one request, and what is left to pay from each of its states.

A state is (boundary, peer): layers ``[0, boundary)`` are done and the peer did the last of
them. All tables are lower bounds of the remaining cost, exact unless a figure is absurdly
large (it is then cut, which keeps a bound a bound), a link was measured slower than the
pessimistic guess for unmeasured ones, or the cheapest rest would visit a peer twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from plait.router import cost
from plait.router.cost import Link, Totals
from plait.router.request import RouteRequest
from plait.router.view import Integers, Offer, View
from plait.types import MILLION, ModelShape, PeerId, Span

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

    def _run_ends(self) -> Integers:
        """[layers + 1, peers]: how far a stage that starts at a boundary can go; 0: nowhere."""
        starts = np.array([offer.span.start for offer in self.offers], dtype=np.int64)
        ends = np.array([offer.span.end for offer in self.offers], dtype=np.int64)
        run_end = np.zeros((self.layers + 1, self.size), dtype=np.int64)
        for b in range(self.layers - 1, -1, -1):
            hosts = (starts <= b) & (b < ends)
            for span, peer in self.request.pin:
                if span.start <= b < span.end:
                    hosts &= np.arange(self.size) == self.index.get(peer, DRIVER)
            run_end[b] = np.where(hosts, np.maximum(run_end[b + 1], b + 1), 0)
        return run_end

    @cached_property
    def links(self) -> "Links":
        """The measured links among the eligible peers."""
        return Links(self)

    def missing(self) -> tuple[tuple[int, int], ...]:
        """Layers without an eligible host, as half-open ranges."""
        ranges: list[tuple[int, int]] = []
        for b in range(self.layers):
            if self.run_end[b].any():
                continue
            if ranges and ranges[-1][1] == b:
                ranges[-1] = (ranges[-1][0], b + 1)
            else:
                ranges.append((b, b + 1))
        return tuple(ranges)

    def choices(self, boundary: int) -> Choices:
        """All stages that can start at ``boundary``."""
        known = self._choices.get(boundary)
        if known is None:
            run_end = self.run_end[boundary]
            hosts = np.flatnonzero(run_end)
            lengths = run_end[hosts] - boundary
            offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
            end = boundary + 1 + np.arange(len(offsets)) - offsets
            layers = self.prefix[end] - self.prefix[boundary]
            known = self._choices[boundary] = Choices(np.repeat(hosts, lengths), end, layers)
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
        offer, source = self.offers[peer], self.source
        if before == DRIVER:
            hop = cost.hop_out(cost.link(self.view, source, offer.peer), self.request)
        else:
            link = cost.link(self.view, self.offers[before].peer, offer.peer)
            hop = cost.hop_between(link, self.model, self.request)
        return hop + cost.stage(offer, span, self.model, self.request)

    def back(self, peer: int) -> Totals:
        """Exact cost of the hop from the last stage to the driver."""
        link = cost.link(self.view, self.offers[peer].peer, self.source)
        return cost.hop_back(link, self.request)


class Links:
    """Links of a graph: to and from the driver by peer, and measured edges between peers.

    ``starts`` are the offsets of each run of edges with the same source, ``sources`` those
    sources; what is not measured is ``unknown``.
    """

    def __init__(self, graph: Graph) -> None:
        peers = [offer.peer for offer in graph.offers]
        self.out = [cost.link(graph.view, graph.source, peer) for peer in peers]
        self.back = [cost.link(graph.view, peer, graph.source) for peer in peers]
        self.unknown = Link(cost.UNKNOWN_RTT_US * 500, cost.UNKNOWN_LINK_BANDWIDTH)
        table = graph.view.link_table()
        renumber = np.full(len(table.peers), -1, dtype=np.int64)
        for peer, number in table.peers.items():
            renumber[number] = graph.index.get(peer, -1)
        source, target = renumber[table.source], renumber[table.target]
        kept = np.flatnonzero((source >= 0) & (target >= 0))
        # Renumbering may reorder sources: the edges must stay grouped by source.
        kept = kept[np.argsort(source[kept], kind="stable")]
        self.source, self.target = source[kept], target[kept]
        self.half_rtt_ns = table.rtt_us[kept] * 500
        bandwidth = table.bandwidth[kept]
        bandwidth = np.where(bandwidth > 0, bandwidth, cost.UNMEASURED_BANDWIDTH)
        row_bits = graph.model.bytes_per_row * 1_000_000_000
        self.row_ns = -(-row_bits // bandwidth)
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
        self._round = measure.ttft * request.prefill_rounds + measure.tpot
        self._row = measure.ttft * request.prompt_tokens + measure.tpot
        self._unknown = self._cut(measure.of(cost.hop_between(links.unknown, graph.model, request)))
        self._edges = self._edge_costs()
        self._leave = self._sweep()

    def _cut(self, value: int) -> int:
        return min(value, self._hop_max)

    def _edge_costs(self) -> Integers:
        # Each factor is cut first, so that no product leaves 64 bits.
        links, half_max = self._graph.links, self._hop_max // 2
        half = np.minimum(links.half_rtt_ns, half_max // max(1, self._round)) * self._round
        row = np.minimum(links.row_ns, half_max // max(1, self._row)) * self._row
        total: Integers = half + row
        return total

    def _sweep(self) -> Integers:
        graph, links = self._graph, self._graph.links
        back = [self._cut(self._measure.of(graph.back(p))) for p in range(graph.size)]
        leave = np.empty((graph.layers + 1, graph.size), dtype=np.int64)
        leave[-1] = back
        enter = np.full(graph.size, UNREACHABLE, dtype=np.int64)
        for b in range(graph.layers - 1, -1, -1):
            enter = graph.weights[b] * self._rates + np.minimum(leave[b + 1], enter)
            enter = np.where(graph.run_end[b] > 0, enter, UNREACHABLE)
            np.minimum(enter, UNREACHABLE, out=enter)
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
            hops = [self._cut(self._measure.of(cost.hop_out(x, graph.request))) for x in links.out]
            return np.array(hops, dtype=np.int64)
        row = np.full(graph.size, self._unknown, dtype=np.int64)
        first, last = np.searchsorted(links.source, [before, before + 1])
        row[links.target[first:last]] = self._edges[first:last]
        return row


def _rates(graph: Graph, measure: Measure) -> Integers:
    """Cost per cost layer of each peer, cut so that a whole route stays in 64 bits."""
    request, model = graph.request, graph.model
    rate_max = _TABLE_MAX // max(1, int(graph.prefix[-1]))
    rates: list[int] = []
    for offer in graph.offers:
        rate = measure.price // MILLION * cost.price_per_layer_millionths(offer, request)
        if measure.ttft:
            prefill_ns = cost.prefill_ns_per_layer(offer, model)
            rate += measure.ttft * prefill_ns * request.prompt_tokens
        if measure.tpot:
            rate += measure.tpot * cost.decode_ns_per_layer(offer, model)
        rates.append(min(rate, rate_max))
    return np.array(rates, dtype=np.int64)
