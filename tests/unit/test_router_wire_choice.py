"""What crosses the hops: fp32 where it is promised, int8 only where bytes are what takes time."""

from dataclasses import replace

import pytest

from plait.compute.wire_formats import wire_bytes
from plait.errors import ConfigError
from plait.router.plan import Plan, plan
from plait.router.request import RouteRequest
from plait.router.view import View
from plait.router.wire_choice import choose_wire, row_bytes
from plait.testing.accounting import NOW_MS
from plait.testing.offers import paper_offer
from plait.types import Digest, ModelShape, PeerId, Span, WireDtype

DRIVER = PeerId("driver")
LAN, PHONE = 125_000_000, 20_000  # bytes per second


def planned(
    first: str, second: str, *, bandwidth: int, width: int = 1024, prompt_tokens: int = 8
) -> Plan:
    """A route of two stages of these numeric classes, each 5 ms a token."""
    model = ModelShape("toy", Digest(b"m" * 32), 4, bytes_per_row=4 * width)
    offers = [
        replace(
            paper_offer(name, span),
            model_digest=model.digest,
            numeric_class=numeric_class,
            decode_us=5_000,
            prefill_us_per_token=500,
        )
        for name, span, numeric_class in (
            ("one", Span(0, 2), first),
            ("two", Span(2, 4), second),
        )
    ]
    peers = [DRIVER, *(offer.peer for offer in offers)]
    pairs = {(a, b) for a in peers for b in peers}
    view = View(
        {offer.peer: offer for offer in offers},
        dict.fromkeys(pairs, 1_000),
        dict.fromkeys(pairs, bandwidth),
    )
    request = RouteRequest(prompt_tokens=prompt_tokens, max_tokens=8)
    return plan(view, model, request, source=DRIVER, now_ms=NOW_MS)


INT4, BF16, FP32 = "w/int4/k/f32/t1", "w/bf16/k/f32/t1", "w/fp32/k/f32/t1"


@pytest.mark.parametrize(
    ("first", "second", "bandwidth", "width", "chosen"),
    [
        (INT4, INT4, LAN, 1024, "bf16"),
        (INT4, BF16, LAN, 1024, "bf16"),
        (INT4, INT4, PHONE, 1024, "int8"),
        (INT4, INT4, PHONE, 1000, "bf16"),  # does not divide into groups
        (FP32, FP32, PHONE, 1024, "fp32"),
        (FP32, INT4, PHONE, 1024, "fp32"),
        ("fake", "fake", PHONE, 1024, "fp32"),
    ],
)
def test_the_route_chooses(
    first: str, second: str, bandwidth: int, width: int, chosen: WireDtype
) -> None:
    assert choose_wire(planned(first, second, bandwidth=bandwidth, width=width), None) == chosen


def test_a_long_prompt_makes_bytes_count() -> None:
    bandwidth = 2_200_000  # 0.9 ms of bf16 for each token of the prompt, which takes 1 ms else
    short = planned(INT4, INT4, bandwidth=bandwidth, prompt_tokens=2)
    assert choose_wire(short, None) == "bf16"
    long = planned(INT4, INT4, bandwidth=bandwidth, prompt_tokens=2_000)
    assert choose_wire(long, None) == "int8"


def test_what_is_wanted_is_taken_if_the_stages_take_it() -> None:
    plan_of = planned(INT4, INT4, bandwidth=LAN)
    for wanted in ("fp32", "bf16", "int8"):
        assert choose_wire(plan_of, wanted) == wanted
    assert choose_wire(planned(FP32, FP32, bandwidth=LAN), "fp32") == "fp32"
    with pytest.raises(ConfigError, match="compute in fp32"):
        choose_wire(planned(FP32, FP32, bandwidth=LAN), "bf16")
    with pytest.raises(ConfigError, match="groups of 32"):
        choose_wire(planned(INT4, INT4, bandwidth=LAN, width=1000), "int8")


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int8"])
def test_a_row_is_as_long_as_it_is_encoded(wire_dtype: WireDtype) -> None:
    assert row_bytes(576, wire_dtype) == wire_bytes(1, 576, wire_dtype)


def test_a_route_is_predicted_by_the_bytes_that_will_cross() -> None:
    """On this link fp32 takes 205 ms a row, bf16 102, int8 54; two stages take 10 ms."""
    fp32 = planned(FP32, FP32, bandwidth=PHONE).predicted.tpot_s
    int8 = planned(INT4, INT4, bandwidth=PHONE)
    assert int8.wire_dtype == "int8"
    spared_s = (row_bytes(1024, "fp32") - row_bytes(1024, "int8")) / PHONE
    assert fp32 - int8.predicted.tpot_s == pytest.approx(spared_s, rel=1e-3)
