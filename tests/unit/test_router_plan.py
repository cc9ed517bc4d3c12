"""The planner against brute force, its bounds, its reasons, and its determinism."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.errors import NoRoute, RouteError
from plait.router import cost, search
from plait.router.bounds import Graph
from plait.router.eligibility import sift
from plait.router.plan import Plan, plan
from plait.router.request import RouteRequest, Sort
from plait.router.search import best_route, goal_of
from plait.router.view import Offer, View
from plait.router.wire_choice import on_wire, rounds
from plait.testing.offers import plain_offer
from plait.types import Digest, Microcredits, ModelShape, PeerId, Prices, Span, WireDtype

MODEL = ModelShape("toy", Digest(b"m" * 32), 6, 1, 2, bytes_per_row=4096)
DRIVER = PeerId("driver")
NOW_MS = 1_000_000
P, Q, R, S, T = (PeerId(name) for name in "pqrst")


def make_offer(peer: PeerId, start: int, end: int, **changes: Any) -> Offer:
    """An eligible offer of 1 ms per cost layer and 1 microcredit per layer and token."""
    span = Span(start, end)
    layers = MODEL.priced_layers(span)
    given: dict[str, Any] = {"issued_ms": NOW_MS, "expires_ms": NOW_MS + 60_000}
    given |= {"prices": Prices(prompt=1_000_000, output=1_000_000), "region": "eu-west"}
    given |= {"decode_us": 1000 * layers, "prefill_us_per_token": 100 * layers}
    return replace(plain_offer(peer, MODEL.digest, span, **given), **changes)


def make_view(*offers: Offer, rtt_us: int | None = 1000, **links: int) -> View:
    """A full mesh at ``rtt_us``; ``links`` like ``p_q=5`` override one round trip."""
    peers = [DRIVER, *(offer.peer for offer in offers)]
    rtts: dict[tuple[PeerId, PeerId], int] = {}
    if rtt_us is not None:
        rtts = {(a, b): rtt_us for a in peers for b in peers if a < b}
    for name, value in links.items():
        a, b = sorted(name.split("_"))
        rtts[PeerId(a), PeerId(b)] = value
    return View({offer.peer: offer for offer in offers}, rtts)


def make_plan(view: View, request: RouteRequest | None = None, **options: Any) -> Plan:
    """Plan for 3 + 4 tokens unless told."""
    return plan(view, MODEL, request or ask(), source=DRIVER, now_ms=NOW_MS, **options)


def ask(**bounds: Any) -> RouteRequest:
    """A request of 3 prompt tokens and 4 to generate."""
    return RouteRequest(prompt_tokens=3, max_tokens=4, **bounds)


def spans_of(planned: Plan) -> list[tuple[PeerId, int, int]]:
    """The route as (peer, start, end)."""
    return [(s.offer.peer, s.span.start, s.span.end) for s in planned.stages]


def every_route(
    offers: list[Offer], request: RouteRequest, start: int = 0
) -> Iterator[list[tuple[Offer, Span]]]:
    """Every complete route that uses a peer at most once and keeps the pins: the oracle."""
    if start == MODEL.layers:
        yield []
    for offer in offers:
        if not offer.span.start <= start < offer.span.end:
            continue
        others = [other for other in offers if other.peer != offer.peer]
        for end in range(start + 1, offer.span.end + 1):
            clash = any(
                span.start < end and start < span.end and peer != offer.peer
                for span, peer in request.pin
            )
            if not clash:
                for rest in every_route(others, request, end):
                    yield [(offer, Span(start, end)), *rest]


def brute_force(view: View, request: RouteRequest) -> tuple[int, ...] | None:
    """The best score of any route within the limits."""
    goal = goal_of(request)
    offers = list(sift(view, MODEL, request, NOW_MS)[0])
    sums = (
        cost.totals(view, route, MODEL, request, DRIVER) for route in every_route(offers, request)
    )
    return min((goal.scores(total) for total in sums if goal.allows(total)), default=None)


@st.composite
def swarms(draw: st.DrawFn) -> View:
    """Up to five peers with overlapping spans, uneven speeds and prices, some links unknown."""
    offers = []
    for peer in [P, Q, R, S, T][: draw(st.integers(1, 5))]:
        start = draw(st.integers(0, 5))
        offers.append(
            make_offer(
                peer,
                start,
                draw(st.integers(start + 1, 6)),
                decode_us=draw(st.sampled_from([0, 600, 1000, 5000, 40_000])),
                prefill_us_per_token=draw(st.sampled_from([0, 100, 3000])),
                sessions_active=draw(st.integers(0, 3)),
                prices=Prices(
                    prompt=draw(st.sampled_from([0, 10_000, 70_000])),
                    output=draw(st.sampled_from([0, 33_333, 90_000, 400_000])),
                ),
            )
        )
    peers = [DRIVER, *(offer.peer for offer in offers)]
    pairs = [(a, b) for a in peers for b in peers if a != b]
    rtts = draw(
        st.dictionaries(st.sampled_from(pairs), st.sampled_from([40, 2000, 90_000, 700_000]))
    )
    bandwidths = draw(st.dictionaries(st.sampled_from(pairs), st.sampled_from([0, 10**5, 10**8])))
    return View({offer.peer: offer for offer in offers}, rtts, bandwidths)


@st.composite
def requests(draw: st.DrawFn) -> RouteRequest:
    """Every objective, every bound."""
    pin = draw(st.sampled_from([(), ((Span(0, 1), P),), ((Span(0, 1), P), (Span(4, 6), Q))]))
    return RouteRequest(
        prompt_tokens=draw(st.sampled_from([1, 7, 600])),
        max_tokens=draw(st.sampled_from([1, 5, 40])),
        sort=draw(st.sampled_from(["latency", "price", "throughput", "weighted"])),
        latency_weight=draw(st.sampled_from([0, 1, 50])),
        max_price=draw(st.none() | st.integers(0, 60).map(Microcredits)),
        ttft_s=draw(st.none() | st.floats(0.0, 3.0)),
        tpot_s=draw(st.none() | st.floats(0.0, 0.6)),
        pin=pin,
        ignore=draw(st.sampled_from([frozenset(), frozenset({R})])),
    )


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(swarms(), requests())
def test_the_plan_is_never_worse_than_brute_force_and_keeps_its_bounds(
    view: View, request: RouteRequest
) -> None:
    best = brute_force(view, request)
    try:
        planned = plan(view, MODEL, request, source=DRIVER, now_ms=NOW_MS)
    except NoRoute as error:
        assert best is None
        check_no_route(view, request, error)
        return
    routes = [planned.stages, *(spare.stages for spare in planned.alternates)]
    totals = [check_route(view, request, [(s.offer, s.span) for s in stages]) for stages in routes]
    assert goal_of(request).scores(totals[0]) == best
    assert planned.predicted.price_microcredits == totals[0].price
    assert all(goal_of(request).allows(total) for total in totals)


@st.composite
def mixed_swarms(draw: st.DrawFn) -> View:
    """Two or three hosts of each half, of which any may round; slow links everywhere."""
    offers = [
        make_offer(
            peer,
            *((0, 3) if peer in (P, R, T) else (3, 6)),
            decode_us=draw(st.sampled_from([1_000, 15_000, 30_000, 60_000])),
            numeric_class=f"w/{draw(st.sampled_from(['int4', 'fp32']))}/k",
        )
        for peer in (P, Q, R, S, T)
    ]
    peers = [DRIVER, *(offer.peer for offer in offers)]
    pairs = {(a, b) for a in peers for b in peers if a != b}
    bandwidths = {pair: draw(st.sampled_from([10**5, 3 * 10**5])) for pair in sorted(pairs)}
    return View({offer.peer: offer for offer in offers}, dict.fromkeys(pairs, 1000), bandwidths)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(mixed_swarms(), st.sampled_from(["latency", "throughput"]), st.none() | st.floats(0, 0.2))
def test_routes_are_compared_by_the_bytes_that_will_cross(
    view: View, sort: Sort, tpot_s: float | None
) -> None:
    """Rows cross a route in bf16 where all of its stages round, else in fp32."""
    request = RouteRequest(prompt_tokens=1, max_tokens=20, sort=sort, tpot_s=tpot_s)
    goal = goal_of(request)
    totals = [
        cost.totals(view, route, on_wire(MODEL, crossing(route)), request, DRIVER)
        for route in every_route(list(sift(view, MODEL, request, NOW_MS)[0]), request)
    ]
    best = min((goal.scores(total) for total in totals if goal.allows(total)), default=None)
    try:
        planned = plan(view, MODEL, request, source=DRIVER, now_ms=NOW_MS)
    except NoRoute:
        assert best is None
        return
    stages = [(stage.offer, stage.span) for stage in planned.stages]
    searched = on_wire(MODEL, crossing(stages))
    assert goal.scores(cost.totals(view, stages, searched, request, DRIVER)) == best
    assert planned.wire_dtype in (crossing(stages), "int8")
    assert planned.predicted == cost.predict(view, stages, planned.costed, request, DRIVER)


def crossing(route: cost.Stages) -> WireDtype:
    """What a search takes to cross the hops of a route."""
    return "bf16" if all(rounds(offer) for offer, _ in route) else "fp32"


def check_route(view: View, request: RouteRequest, route: cost.Stages) -> cost.Totals:
    assert [span.start for _, span in route] == [0, *(span.end for _, span in route[:-1])]
    assert route[-1][1].end == MODEL.layers
    assert all(offer.span.contains(span) for offer, span in route)
    assert len({offer.peer for offer, _ in route}) == len(route)
    for pinned, peer in request.pin:
        assert any(offer.peer == peer and span.contains(pinned) for offer, span in route)
    return cost.totals(view, route, MODEL, request, DRIVER)


def check_no_route(view: View, request: RouteRequest, error: NoRoute) -> None:
    cheapest = brute_force(view, replace(request, sort="price", max_price=None))
    assert error.missing or error.cheapest == (cheapest and cheapest[0])
    offers = sift(view, MODEL, request, NOW_MS)[0]
    pins = {layer: peer for span, peer in request.pin for layer in range(span.start, span.end)}
    for start, end in error.missing:
        for layer in range(start, end):
            hosts = {o.peer for o in offers if o.span.start <= layer < o.span.end}
            assert not hosts or (layer in pins and pins[layer] not in hosts)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(swarms(), requests())
def test_joint_bounds_stay_exact(view: View, request: RouteRequest) -> None:
    best = brute_force(view, request)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "JOINT_LABELS", 0)
        try:
            planned = plan(view, MODEL, request, source=DRIVER, now_ms=NOW_MS, alternates=0)
        except NoRoute:
            assert best is None
            return
    total = check_route(view, request, [(s.offer, s.span) for s in planned.stages])
    assert goal_of(request).scores(total) == best


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(swarms(), requests(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_mappings(
    view: View, request: RouteRequest, shuffler: random.Random
) -> None:
    offers, rtts = list(view.offers.items()), list(view.rtt_us.items())
    shuffler.shuffle(offers)
    shuffler.shuffle(rtts)
    shuffled = View(dict(offers), dict(rtts), view.bandwidth)

    def outcome(seen: View) -> object:
        try:
            planned = plan(seen, MODEL, request, source=DRIVER, now_ms=NOW_MS, alternates=2)
        except NoRoute as error:
            return str(error), error.missing, error.cheapest
        return planned.stages, planned.predicted, planned.alternates, planned.rejections

    assert outcome(view) == outcome(shuffled)


def test_a_sub_span_is_used_and_an_inner_cut_is_found() -> None:
    view = make_view(make_offer(P, 0, 6), make_offer(Q, 0, 6, decode_us=100), driver_q=10**6)
    # One layer on p saves the slow way from the driver to q; q's way back is slow, too.
    planned = make_plan(view, ask(sort="throughput"))
    assert spans_of(planned) == [(P, 0, 6)]
    view = make_view(
        make_offer(P, 0, 6), make_offer(Q, 0, 5, decode_us=60), make_offer(R, 5, 6), driver_q=10**6
    )
    assert spans_of(make_plan(view, ask(sort="throughput"))) == [(P, 0, 1), (Q, 1, 5), (R, 5, 6)]


def test_a_limit_may_cut_inside_spans() -> None:
    cheap = Prices(prompt=0, output=0)
    view = make_view(make_offer(P, 0, 6, prices=cheap), make_offer(Q, 0, 6, decode_us=9))
    request = ask(sort="throughput")
    for layers in range(1, 5):
        limit = 7 * (layers + 2)
        planned = make_plan(view, replace(request, max_price=Microcredits(limit)))
        assert planned.predicted.price_microcredits <= limit
        assert sum(s.priced_layers for s in planned.stages if s.offer.peer == Q) == layers + 2


def test_a_peer_is_never_visited_twice() -> None:
    quick = make_offer(Q, 2, 3, decode_us=10)
    view = make_view(make_offer(P, 0, 6, decode_us=900_000), quick, rtt_us=10)
    assert spans_of(make_plan(view)) == [(P, 0, 6)]
    gap = make_view(make_offer(P, 0, 6), make_offer(Q, 2, 3))
    with pytest.raises(NoRoute, match="each peer once") as caught:
        make_plan(gap, ask(pin=((Span(2, 3), Q),)))
    assert caught.value.missing == ()


def test_missing_layers_are_named_with_the_hosts_that_were_rejected() -> None:
    view = make_view(make_offer(P, 0, 2), make_offer(Q, 3, 5, state="draining"))
    with pytest.raises(NoRoute) as caught:
        make_plan(view)
    assert caught.value.missing == ((2, 6),)
    assert "layers 2:6" in str(caught.value) and "draining ×1" in str(caught.value)
    with pytest.raises(NoRoute) as caught:
        make_plan(View({}, {}))
    assert caught.value.missing == ((0, 6),)
    with pytest.raises(NoRoute, match="pinned: 0:1 to q") as caught:
        make_plan(make_view(make_offer(P, 0, 6)), ask(pin=((Span(0, 1), Q),)))
    assert caught.value.missing == ((0, 1),)


def options_at_fault(view: View, **rules: Any) -> tuple[str, ...]:
    with pytest.raises(NoRoute) as caught:
        make_plan(view, ask(**rules))
    assert caught.value.missing
    return caught.value.options


def test_a_rule_of_the_request_that_no_route_keeps_is_named() -> None:
    view = make_view(make_offer(P, 0, 3), make_offer(Q, 3, 6), make_offer(R, 3, 6, state="loading"))
    assert options_at_fault(view, only=frozenset({P})) == ("only",)
    assert options_at_fault(view, only=frozenset({T})) == ("only",)
    assert options_at_fault(view, ignore=frozenset({P})) == ("ignore",)
    assert options_at_fault(view, only=frozenset({P, Q}), ignore=frozenset({Q})) == (
        "only",
        "ignore",
    )
    assert options_at_fault(view, regions_denied=frozenset({"eu"})) == ("region",)
    # Whom the rules allow may yet come: they are not at fault, nor where nobody has a layer.
    assert options_at_fault(view, only=frozenset({P, R})) == ()
    assert options_at_fault(make_view(make_offer(P, 0, 3)), only=frozenset({Q})) == ()
    assert options_at_fault(make_view(make_offer(P, 0, 6, kv_tokens_free=0))) == ()


@given(swarms(), st.frozensets(st.sampled_from([P, Q, R, S]), max_size=3), st.booleans())
def test_without_its_rules_every_layer_has_a_host_exactly_when_they_are_named(
    view: View, peers: frozenset[PeerId], only: bool
) -> None:
    request = ask(only=peers) if only else ask(ignore=peers)
    try:
        make_plan(view, request)
    except NoRoute as error:
        if error.missing:
            try:
                make_plan(view, ask())
            except NoRoute as without:
                assert bool(without.missing) == (error.options == ())
            else:
                assert error.options == (("only",) if only else ("ignore",))


def test_the_price_bound_names_the_cheapest_route_under_the_other_bounds() -> None:
    slow = make_offer(Q, 0, 6, decode_us=10**7, prices=Prices())
    view = make_view(make_offer(P, 0, 6), slow)
    assert make_plan(view, ask(max_price=Microcredits(0))).stages[0].offer.peer == Q
    with pytest.raises(NoRoute, match="63 microcredits") as caught:
        make_plan(view, ask(max_price=Microcredits(62), tpot_s=0.1))
    assert caught.value.cheapest == 63 and "63" in caught.value.remedy
    assert caught.value.options == ("max_price",)
    assert make_plan(view, ask(max_price=Microcredits(63), tpot_s=0.1)).stages[0].offer.peer == P


def test_the_time_bound_that_failed_is_named() -> None:
    view = make_view(
        make_offer(P, 0, 6), make_offer(Q, 0, 6, prefill_us_per_token=9000, decode_us=9)
    )
    for bounds, name in (
        ({"ttft_s": 0.001}, "time to first token"),
        ({"tpot_s": 0.001}, "time per output token"),
        ({"ttft_s": 0.01, "tpot_s": 0.005}, "keeps both"),
    ):
        with pytest.raises(NoRoute, match=name) as caught:
            make_plan(view, ask(**bounds))
        assert caught.value.cheapest is None


REJECTED = [
    ("wrong-model", {"model_digest": Digest(b"x" * 32)}, {}),
    ("expired", {"expires_ms": NOW_MS}, {}),
    ("draining", {"state": "draining"}, {}),
    ("withdrawn", {"state": "withdrawn"}, {}),
    ("wrong-span", {"span": Span(0, 7)}, {}),
    ("ignored", {}, {"ignore": frozenset({Q})}),
    ("not-in-only", {}, {"only": frozenset({P})}),
    ("region", {"region": "us-east"}, {"regions_allowed": frozenset({"eu"})}),
    ("region", {"region": "us-east"}, {"regions_denied": frozenset({"us"})}),
    ("region", {"region": ""}, {"regions_denied": frozenset({"us"})}),
    ("numeric-class", {"numeric_class": "int4"}, {"numeric_class": "fp32"}),
    ("evidence", {"evidence": "fronting-node"}, {}),
    ("full", {"kv_tokens_free": 6}, {}),
    ("price", {"prices": Prices(output=2**64 - 1)}, {}),
    ("pinned", {"decode_us": 1}, {"pin": ((Span(0, 6), P),)}),
    ("slower", {"decode_us": 10**6}, {}),
    ("dearer", {"prices": Prices(output=10**8)}, {"sort": "price"}),
    ("slower-and-dearer", {"prices": Prices(output=10**8), "decode_us": 10**6}, {}),
]


@pytest.mark.parametrize(("code", "fault", "bounds"), REJECTED)
def test_every_rejected_peer_has_a_reason(
    code: str, fault: dict[str, Any], bounds: dict[str, Any]
) -> None:
    view = make_view(make_offer(P, 0, 6), make_offer(Q, 0, 6, **fault))
    planned = make_plan(view, ask(**bounds))
    assert spans_of(planned) == [(P, 0, 6)]
    (rejection,) = planned.rejections
    assert (rejection.peer, rejection.code) == (Q, code)
    assert rejection.reason


def test_a_fronting_node_may_be_allowed() -> None:
    view = make_view(make_offer(P, 0, 6, evidence="fronting-node"))
    assert make_plan(view, ask(allow_fronting_node=True)).stages[0].offer.peer == P


def test_a_loser_is_compared_in_milliseconds_and_microcredits() -> None:
    view = make_view(make_offer(P, 0, 6), make_offer(Q, 2, 4, decode_us=2 * 4000, prices=Prices()))
    (rejection,) = make_plan(view).rejections
    # Two layers at 3 ms more each, and a round trip from p and back.
    assert rejection.reason.startswith("for layers 2:4: slower by 7.")
    assert "cheaper by 14 microcredits than p" in rejection.reason


def test_alternates_are_disjoint_where_possible() -> None:
    view = make_view(
        make_offer(P, 0, 3), make_offer(Q, 3, 6), make_offer(R, 0, 3, sessions_active=9),
        make_offer(S, 3, 6, sessions_active=9),
    )  # fmt: skip
    planned = make_plan(view, alternates=3)
    assert [s.offer.peer for s in planned.stages] == [P, Q]
    (disjoint,) = planned.alternates
    assert [s.offer.peer for s in disjoint.stages] == [R, S] and disjoint.shared == ()


def test_alternates_share_what_has_no_second_host() -> None:
    view = make_view(make_offer(P, 0, 3), make_offer(Q, 3, 6), make_offer(R, 0, 3, decode_us=10**5))
    (spare,) = make_plan(view).alternates
    assert [s.offer.peer for s in spare.stages] == [R, Q] and spare.shared == (Q,)
    assert make_plan(make_view(make_offer(P, 0, 6))).alternates == ()


def test_alternates_lose_one_peer_where_the_others_do_not_join() -> None:
    view = make_view(
        make_offer(P, 0, 4), make_offer(Q, 4, 6), make_offer(R, 0, 2, decode_us=10**5),
        make_offer(S, 2, 6, decode_us=10**5), make_offer(T, 4, 6, decode_us=10**5),
    )  # fmt: skip
    request = ask(tpot_s=0.12)
    assert [s.offer.peer for s in make_plan(view, request).stages] == [P, Q]
    (spare,) = make_plan(view, request).alternates
    assert spare.shared == (P,) and spare.stages[-1].offer.peer in (S, T)


def test_sorts_choose_differently() -> None:
    view = make_view(
        make_offer(P, 0, 6, prices=Prices(), decode_us=10**6),
        make_offer(Q, 0, 6, prefill_us_per_token=10**6),
        make_offer(R, 0, 6, decode_us=15_000, prices=Prices(output=3_000_000)),
    )
    chosen = {
        sort: make_plan(view, ask(sort=sort, latency_weight=100)).stages[0].offer.peer
        for sort in ("price", "throughput", "latency", "weighted")
    }
    assert chosen == {"price": P, "throughput": Q, "latency": R, "weighted": R}


def test_a_search_without_end_is_given_up() -> None:
    view = make_view(make_offer(P, 0, 6), make_offer(Q, 3, 6))
    graph = Graph(view, list(view.offers.values()), MODEL, ask(), DRIVER)
    with pytest.raises(RouteError, match="too many"):
        best_route(graph, goal_of(ask()), labels_max=0)


def test_absurd_figures_are_harmless() -> None:
    huge = 2**64 - 1
    view = make_view(
        make_offer(P, 0, 6, decode_us=huge, prefill_us_per_token=huge, sessions_active=2**32 - 1),
        make_offer(Q, 0, 6),
        driver_p=huge, p_q=huge,
    )  # fmt: skip
    planned = make_plan(view, ask(sort="weighted", latency_weight=huge))
    assert spans_of(planned) == [(Q, 0, 6)]
    assert make_plan(view, ask(ignore=frozenset({Q}))).predicted.tpot_s > 1e9


def test_requests_are_checked() -> None:
    bad_values: list[dict[str, Any]] = [
        {"prompt_tokens": 0},
        {"max_tokens": 0},
        {"max_price": -1},
        {"ttft_s": float("nan")},
        {"tpot_s": float("inf")},
        {"sort": "luck"},
        {"latency_weight": -1},
    ]
    for bad in bad_values:
        with pytest.raises(ValueError):
            RouteRequest(**{"prompt_tokens": 1, "max_tokens": 1, **bad})


def test_routes_are_in_layer_order() -> None:
    view = make_view(make_offer(P, 0, 2), make_offer(Q, 2, 4), make_offer(R, 4, 6))
    stages = make_plan(view).stages
    assert all(a.span.end == b.span.start for a, b in pairwise(stages))
    assert [s.priced_layers for s in stages] == [3, 2, 4]
