"""The cost model, unit by unit, against figures worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from plait.router import cost
from plait.router.cost import Link, Totals
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.testing.offers import plain_offer
from plait.types import Digest, ModelShape, PeerId, Prices, Span, TokenCounts

MODEL = ModelShape("toy", Digest(b"m" * 32), 10, 2, 3, bytes_per_row=1000)
DRIVER, A, B = PeerId("driver"), PeerId("a"), PeerId("b")
REQUEST = RouteRequest(prompt_tokens=300, max_tokens=50)


def make_offer(peer: PeerId, span: Span, **changes: Any) -> Offer:
    """An idle offer of 2 ms decode and 0.5 ms prefill per cost layer."""
    layers = MODEL.priced_layers(span)
    given = {"decode_us": 2000 * layers, "prefill_us_per_token": 500 * layers}
    prices = Prices(prompt=5_000, output=20_000)
    return replace(plain_offer(peer, MODEL.digest, span, prices=prices, **given), **changes)


def test_a_stage_is_charged_for_its_share_of_the_cost_layers() -> None:
    offer = make_offer(A, Span(0, 6))
    first = cost.stage(offer, Span(0, 3), MODEL, REQUEST)
    middle = cost.stage(offer, Span(3, 6), MODEL, REQUEST)
    assert first.tpot_ns == 5 * 2_000_000 and middle.tpot_ns == 3 * 2_000_000
    assert first.ttft_ns == 5 * 500_000 * 300
    assert first.tpot_ns + middle.tpot_ns == offer.decode_us * 1000
    head = cost.stage(make_offer(B, Span(6, 10)), Span(6, 10), MODEL, REQUEST)
    assert head.tpot_ns == 7 * 2_000_000


def test_the_price_is_what_will_be_charged() -> None:
    offer = make_offer(A, Span(0, 6))
    counts = TokenCounts(prompt=300, output=50)
    assert cost.stage(offer, Span(1, 2), MODEL, REQUEST).price == 3  # 2.5, rounded up
    for span in (Span(0, 1), Span(0, 6), Span(3, 5)):
        expected = offer.prices.amount(counts, MODEL.priced_layers(span))
        assert cost.stage(offer, span, MODEL, REQUEST).price == expected


def test_load_lengthens_compute_but_not_price() -> None:
    idle = cost.stage(make_offer(A, Span(3, 6)), Span(3, 6), MODEL, REQUEST)
    busy = make_offer(A, Span(3, 6), sessions_active=4)
    loaded = cost.stage(busy, Span(3, 6), MODEL, REQUEST)
    assert (loaded.tpot_ns, loaded.ttft_ns) == (2 * idle.tpot_ns, 2 * idle.ttft_ns)
    assert loaded.price == idle.price


def test_speeds_not_given_are_pessimistic() -> None:
    silent = make_offer(A, Span(3, 6), decode_us=0, prefill_us_per_token=0)
    assert cost.decode_ns_per_layer(silent, MODEL) == cost.UNKNOWN_DECODE_US_PER_LAYER * 1000
    assert cost.prefill_ns_per_layer(silent, MODEL) == cost.decode_ns_per_layer(silent, MODEL)
    decodes = make_offer(A, Span(3, 6), prefill_us_per_token=0)
    assert cost.prefill_ns_per_layer(decodes, MODEL) == 2_000_000


def test_a_hop_is_half_a_round_trip_and_the_bytes() -> None:
    hop = Link(half_rtt_ns=7_000_000, bandwidth=1_000_000)
    between = cost.hop_between(hop, MODEL, REQUEST)
    # Two frames of the prompt cross the hop; 300 rows of 1000 bytes take 300 ms.
    assert between == Totals(2 * 7_000_000 + 300_000_000, 7_000_000 + 1_000_000)
    assert cost.hop_out(hop, REQUEST) == Totals(2 * 7_000_000 + 300 * 4_000, 7_000_000 + 4_000)
    assert cost.hop_back(hop, REQUEST) == Totals(2 * 7_000_000 + 4_000, 7_000_000 + 4_000)


@pytest.mark.parametrize(
    ("rtts", "bandwidths", "expected"),
    [
        ({}, {}, Link(cost.UNKNOWN_RTT_US * 500, cost.UNKNOWN_LINK_BANDWIDTH)),
        ({(A, B): 800}, {}, Link(400_000, cost.UNMEASURED_BANDWIDTH)),
        ({(B, A): 800, (A, B): 900}, {(B, A): 77}, Link(400_000, 77)),
        ({(A, B): 800}, {(A, B): 10, (B, A): 20}, Link(400_000, 10)),
        ({(A, B): 2**64 - 1}, {(A, B): 2**64 - 1}, Link(2**40 * 500, 2**40)),
    ],
)
def test_links(rtts: dict[Any, int], bandwidths: dict[Any, int], expected: Link) -> None:
    view = View({}, rtts, bandwidths)
    assert cost.link(view, A, B) == cost.link(view, B, A) == expected
    table = view.link_table()
    if rtts:
        at = next(i for i, s in enumerate(table.source) if s == table.peers[A])
        assert int(table.rtt_us[at]) * 500 == expected.half_rtt_ns
        assert int(table.bandwidth[at]) or expected.bandwidth == cost.UNMEASURED_BANDWIDTH


def test_a_link_to_oneself_is_free() -> None:
    hop = cost.link(View({}, {}), A, A)
    assert cost.hop_between(hop, MODEL, REQUEST) == Totals()
    assert View({}, {}).link_rtt_us(A, A) == 0


def test_totals_add_up_both_driver_hops() -> None:
    view = View({}, {(DRIVER, A): 2000, (A, B): 4000, (B, DRIVER): 6000}, {})
    stages = [(make_offer(A, Span(0, 6)), Span(0, 5)), (make_offer(B, Span(5, 10)), Span(5, 10))]
    total = cost.totals(view, stages, MODEL, REQUEST, DRIVER)
    transfers = 2 * 320 + 80_000
    assert total.tpot_ns == 15 * 2_000_000 + 6_000_000 + transfers
    predicted = cost.predict(view, stages, MODEL, REQUEST, DRIVER)
    assert predicted.tpot_s == total.tpot_ns / 1e9 and predicted.ttft_s == total.ttft_ns / 1e9
    assert predicted.price_microcredits == total.price == 18 + 20
    assert predicted.energy_joules_declared is None


def test_declared_energy_and_carbon() -> None:
    offer = make_offer(A, Span(0, 10), millijoules_per_token_layer=10, grams_co2_per_kwh=360)
    predicted = cost.predict(View({}, {}), [(offer, Span(0, 10))], MODEL, REQUEST, DRIVER)
    assert predicted.energy_joules_declared == pytest.approx(0.01 * 350 * 15)
    assert predicted.carbon_grams_declared == pytest.approx(52.5 / 3_600_000 * 360)
    vague = replace(offer, grams_co2_per_kwh=0)
    predicted = cost.predict(View({}, {}), [(vague, Span(0, 10))], MODEL, REQUEST, DRIVER)
    assert predicted.energy_joules_declared is not None and predicted.carbon_grams_declared is None
