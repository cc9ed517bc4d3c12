"""Explanations: JSON-ready, complete, and readable; and the span a new node should take."""

import json
from dataclasses import replace
from typing import Any

import pytest

from plait.errors import NoRoute
from plait.router.explain import explain, explain_failure, explain_lines
from plait.router.placement import choose_span, layer_throughput
from plait.router.plan import plan
from plait.router.request import RouteRequest
from plait.router.view import Offer, View
from plait.testing.offers import plain_offer
from plait.types import Digest, ModelShape, PeerId, Prices, Span

MODEL = ModelShape("toy", Digest(b"m" * 32), 6, 0, 0, bytes_per_row=1000)
DRIVER, A, B, C = (PeerId(name) for name in ("driver", "a", "b", "c"))
REQUEST = RouteRequest(prompt_tokens=10, max_tokens=10)


def make_offer(peer: PeerId, start: int, end: int, **changes: Any) -> Offer:
    """An offer of 1 ms per layer."""
    layers = end - start
    given: dict[str, Any] = {"issued_ms": 0, "expires_ms": 100, "region": "eu"}
    given |= {"prices": Prices(prompt=100_000, output=100_000)}
    given |= {"decode_us": 1000 * layers, "prefill_us_per_token": 100 * layers}
    return replace(plain_offer(peer, MODEL.digest, Span(start, end), **given), **changes)


def view_of(*offers: Offer) -> View:
    """Only a's links are measured."""
    links = {(DRIVER, A): 1000, (A, B): 1000, (A, C): 1000}
    return View({offer.peer: offer for offer in offers}, links)


def test_a_plan_is_explained() -> None:
    view = view_of(
        make_offer(A, 0, 3), make_offer(B, 3, 6), make_offer(C, 3, 6, sessions_active=40),
        make_offer(PeerId("d"), 0, 6, state="draining"),
    )  # fmt: skip
    account = explain(plan(view, MODEL, REQUEST, source=DRIVER, now_ms=50))
    assert json.loads(json.dumps(account)) == account
    assert [(s["peer"], s["start"], s["end"]) for s in account["route"]] == [
        ("a", 0, 3),
        ("b", 3, 6),
    ]
    assert account["route"][0]["hop_measured"] and account["route"][1]["compute_ms_per_token"] == 3
    assert account["predicted"]["price_microcredits"] == 12
    assert [r["code"] for r in account["rejected"]] == ["slower", "draining"]
    assert account["alternates"][0]["shared"] == ["a"]
    text = "\n".join(explain_lines(account))
    for part in ("best by latency", "a  layers 0:3", "12 microcredits", "alternate 1: a[0:3]"):
        assert part in text
    assert "rejected  c  slower: for layers 3:6: slower by 30.000 ms per token" in text


def test_a_failure_is_explained() -> None:
    view = view_of(make_offer(A, 0, 3), make_offer(B, 3, 6, expires_ms=40))
    with pytest.raises(NoRoute) as caught:
        plan(view, MODEL, REQUEST, source=DRIVER, now_ms=50)
    account = explain_failure(caught.value, view, MODEL, REQUEST, 50)
    assert json.loads(json.dumps(account)) == account
    assert account["error"]["missing"] == [[3, 6]] and account["route"] == []
    lines = explain_lines(account)
    assert lines[0].startswith("no route for toy: no eligible host for layers 3:6")
    assert lines[1].startswith("  try: ")
    assert lines[2:] == [
        "  able  a  layers 0:3",
        "  rejected  b  expired: its offer expired 0.0 s ago",
    ]


def test_throughput_is_summed_over_the_hosts_of_a_layer() -> None:
    view = view_of(make_offer(A, 0, 2), make_offer(B, 1, 3), make_offer(C, 0, 6, expires_ms=1))
    step = 10**15 // 2_000_000
    assert layer_throughput(view, MODEL, 50) == (step, 2 * step, step, 0, 0, 0)
    assert layer_throughput(view, MODEL, 50, besides=A) == (0, step, step, 0, 0, 0)


@pytest.mark.parametrize(
    ("offers", "fit", "expected"),
    [
        ([], 2, Span(0, 2)),
        ([], 99, Span(0, 6)),
        ([make_offer(A, 0, 3)], 3, Span(3, 6)),
        ([make_offer(A, 0, 4)], 4, Span(2, 6)),
        ([make_offer(A, 0, 2), make_offer(B, 4, 6)], 2, Span(2, 4)),
        # All are covered; the slow host is the bottleneck.
        ([make_offer(A, 0, 3), make_offer(B, 3, 6, decode_us=90_000)], 3, Span(3, 6)),
        # One gap too wide for us: we cover as much of it as we can.
        ([make_offer(A, 0, 2)], 3, Span(2, 5)),
    ],
)
def test_a_new_node_covers_the_weakest_layers(
    offers: list[Offer], fit: int, expected: Span
) -> None:
    assert choose_span(view_of(*offers), MODEL, fit, 50) == expected


def test_ones_own_offer_does_not_count() -> None:
    view = view_of(make_offer(A, 0, 3), make_offer(B, 3, 6))
    assert choose_span(view, MODEL, 3, 50, besides=B) == Span(3, 6)
    with pytest.raises(ValueError, match="no layer fits"):
        choose_span(view, MODEL, 0, 50)
