"""The one cost model, in integers: nanoseconds and microcredits.

Time per output token = Σ stages (cost layers × decode time per cost layer × load) + Σ hops
(half a round trip + bytes ÷ bandwidth), the driver's two hops included. Time to first token
= Σ stages (cost layers × prefill time × prompt tokens × load) + Σ hops, where each frame of
the prompt crosses every hop in turn, because the credit window is one frame. Price = Σ
stages ``Prices.amount`` of the whole request, rounded up per stage exactly as it is charged.
Embedding and head are cost layers of the first and the last layer. The unknown is never
optimistic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.types import Microcredits, ModelShape, PeerId, Span, TokenCounts

UNKNOWN_RTT_US = 300_000
"""A link nobody measured is as slow as one around the globe."""
UNKNOWN_LINK_BANDWIDTH = 1_250_000
"""Bytes per second of a link nobody measured: 10 Mbit/s."""
UNMEASURED_BANDWIDTH = 12_500_000
"""Bytes per second of a link whose round trip alone is known: 100 Mbit/s."""
UNKNOWN_DECODE_US_PER_LAYER = 100_000
"""A stage that does not say how fast it is."""
SESSIONS_PER_STEP = 4
"""Queueing: each active session lengthens a step by 1/4. Steps of concurrent sessions are
batched, and a session spends most of its round at other stages, so it costs less than a
whole step."""
ID_BYTES = 4

Stages = Sequence[tuple[Offer, Span]]


@dataclass(frozen=True, slots=True)
class Totals:
    """Exact sums over a route or the beginning of one."""

    ttft_ns: int = 0
    tpot_ns: int = 0
    price: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.ttft_ns + other.ttft_ns, self.tpot_ns + other.tpot_ns, self.price + other.price
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a route is expected to do, price and energy if ``max_tokens`` are generated.

    ``*_declared`` rest on the operators' word; None if any of them gave no figure.
    """

    ttft_s: float
    tpot_s: float
    price_microcredits: Microcredits
    energy_joules_declared: float | None = None
    carbon_grams_declared: float | None = None


@dataclass(frozen=True, slots=True)
class Link:
    """One direction of a link; ``bandwidth`` None is within one machine, where bytes are free."""

    half_rtt_ns: int
    bandwidth: int | None

    def transfer_ns(self, size_bytes: int) -> int:
        """Time to push ``size_bytes`` through, rounded up."""
        return -(-size_bytes * 1_000_000_000 // self.bandwidth) if self.bandwidth else 0


def link(view: View, a: PeerId, b: PeerId) -> Link:
    """The link from ``a`` to ``b``, pessimistic where it was not measured."""
    if a == b:
        return Link(0, None)
    rtt_us, bandwidth = view.link_rtt_us(a, b), view.link_bandwidth(a, b)
    if rtt_us is None:
        return Link(UNKNOWN_RTT_US * 500, bandwidth or UNKNOWN_LINK_BANDWIDTH)
    return Link(rtt_us * 500, bandwidth or UNMEASURED_BANDWIDTH)


def decode_ns_per_layer(offer: Offer, model: ModelShape) -> int:
    """Loaded time of one decode step through one cost layer."""
    return _loaded_ns(offer, _decode_ns(offer, model))


def prefill_ns_per_layer(offer: Offer, model: ModelShape) -> int:
    """Loaded time of one prompt token through one cost layer; not faster than said.

    A stage that gives no prefill speed is taken to prefill no faster than it decodes.
    """
    if not offer.prefill_us_per_token:
        return decode_ns_per_layer(offer, model)
    layers = model.priced_layers(offer.span)
    return _loaded_ns(offer, -(-offer.prefill_us_per_token * 1000 // layers))


def _decode_ns(offer: Offer, model: ModelShape) -> int:
    if not offer.decode_us:
        return UNKNOWN_DECODE_US_PER_LAYER * 1000
    return -(-offer.decode_us * 1000 // model.priced_layers(offer.span))


def _loaded_ns(offer: Offer, time_ns: int) -> int:
    return -(-time_ns * (SESSIONS_PER_STEP + offer.sessions_active) // SESSIONS_PER_STEP)


def price_per_layer_millionths(offer: Offer, request: RouteRequest) -> int:
    """Millionths of a microcredit for the whole request through one cost layer, unrounded."""
    prices = offer.prices
    return prices.prompt * request.prompt_tokens + prices.output * request.max_tokens


def stage(offer: Offer, span: Span, model: ModelShape, request: RouteRequest) -> Totals:
    """Compute time and price of one stage. Raises ``OverflowError`` beyond 64 bits of price."""
    layers = model.priced_layers(span)
    counts = TokenCounts(prompt=request.prompt_tokens, output=request.max_tokens)
    return Totals(
        ttft_ns=layers * prefill_ns_per_layer(offer, model) * request.prompt_tokens,
        tpot_ns=layers * decode_ns_per_layer(offer, model),
        price=offer.prices.amount(counts, layers),
    )


def hop_between(hop: Link, model: ModelShape, request: RouteRequest) -> Totals:
    """Activations from one stage to the next."""
    row_ns = hop.transfer_ns(model.bytes_per_row)
    return _hop(hop, row_ns * request.prompt_tokens, row_ns, request)


def hop_out(hop: Link, request: RouteRequest) -> Totals:
    """Token ids from the driver to the first stage."""
    id_ns = hop.transfer_ns(ID_BYTES)
    return _hop(hop, id_ns * request.prompt_tokens, id_ns, request)


def hop_back(hop: Link, request: RouteRequest) -> Totals:
    """The drawn id from the last stage to the driver."""
    id_ns = hop.transfer_ns(ID_BYTES)
    return _hop(hop, id_ns, id_ns, request)


def _hop(hop: Link, prompt_ns: int, token_ns: int, request: RouteRequest) -> Totals:
    rounds = request.prefill_rounds
    return Totals(hop.half_rtt_ns * rounds + prompt_ns, hop.half_rtt_ns + token_ns)


def totals(
    view: View, stages: Stages, model: ModelShape, request: RouteRequest, source: PeerId
) -> Totals:
    """Exact sums over a complete route driven from ``source``."""
    first, last = stages[0][0].peer, stages[-1][0].peer
    total = hop_out(link(view, source, first), request)
    for offer, span in stages:
        total += stage(offer, span, model, request)
    for (offer, _), (following, _) in pairwise(stages):
        total += hop_between(link(view, offer.peer, following.peer), model, request)
    return total + hop_back(link(view, last, source), request)


def predict(
    view: View, stages: Stages, model: ModelShape, request: RouteRequest, source: PeerId
) -> Prediction:
    """Predict a complete route driven from ``source``."""
    total = totals(view, stages, model, request, source)
    joules, grams = _declared_energy(stages, model, request)
    return Prediction(
        ttft_s=total.ttft_ns / 1e9,
        tpot_s=total.tpot_ns / 1e9,
        price_microcredits=Microcredits(total.price),
        energy_joules_declared=joules,
        carbon_grams_declared=grams,
    )


def _declared_energy(
    stages: Stages, model: ModelShape, request: RouteRequest
) -> tuple[float | None, float | None]:
    tokens = request.prompt_tokens + request.max_tokens
    joules = [
        offer.millijoules_per_token_layer * tokens * model.priced_layers(span) / 1000
        for offer, span in stages
    ]
    if not all(offer.millijoules_per_token_layer for offer, _ in stages):
        return None, None
    if not all(offer.grams_co2_per_kwh for offer, _ in stages):
        return sum(joules), None
    grams = [
        energy / 3_600_000 * offer.grams_co2_per_kwh
        for energy, (offer, _) in zip(joules, stages, strict=True)
    ]
    return sum(joules), sum(grams)
