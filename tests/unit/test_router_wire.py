"""Offers and link reports across the wire: round trips, and nothing bad let in."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.envelope import digest, seal
from plait.errors import BadSignature, RemoteProtocolError
from plait.identity import SigningKey
from plait.router.view import LinkReport, MeasuredLink, Offer
from plait.router.wire import (
    links_from_envelope,
    offer_digest,
    offer_from_envelope,
    offer_to_message,
    seal_link_report,
    seal_offer,
)
from plait.types import Digest, PeerId, Prices, Span

KEY, OTHER = SigningKey.from_seed(bytes([1]) * 32), SigningKey.from_seed(bytes([2]) * 32)
OFFER = Offer(
    KEY.peer_id, Digest(b"m" * 32), Span(2, 9), 5, 6, 7, 8, "draining", "fronting-node",
    Prices(1, 2, 3, 4, 5), "class", "eu-west", 20, 10, 3, 400, 50, "a:1", "b:2", b"cert",
    ("/ip4/1",), Digest(b""), 9, 11,
)  # fmt: skip
REPORT = LinkReport(KEY.peer_id, 1, 2, 3, 4, (MeasuredLink(OTHER.peer_id, 77, 88),))
u64 = st.integers(0, 2**64 - 1)


@settings(max_examples=50, deadline=None)
@given(u64, u64, st.integers(0, 2**32 - 1), st.sampled_from(["ready", "draining", "withdrawn"]))
def test_an_offer_survives_the_wire(first: int, second: int, sessions: int, state: Any) -> None:
    offer = replace(
        OFFER,
        prices=Prices(first, second),
        decode_us=second,
        sessions_active=sessions,
        state=state,
        millijoules_per_token_layer=first,
    )
    envelope = seal_offer(KEY, offer, "net")
    received = offer_from_envelope(envelope, network_id="net")
    assert received == replace(offer, digest=digest(envelope.payload))
    assert received.digest == offer_digest(offer, "net")


def test_a_link_report_survives_the_wire() -> None:
    envelope = seal_link_report(KEY, REPORT, "net")
    assert links_from_envelope(envelope, network_id="net") == REPORT
    assert links_from_envelope(envelope) == REPORT
    with pytest.raises(RemoteProtocolError, match="another network"):
        links_from_envelope(envelope, network_id="other")


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"network_id": "other"}, "another network"),
    ({"model_digest": b"short"}, "model digest"),
    ({"start_layer": 9}, "impossible span"),
    ({"end_layer": 5000}, "impossible span"),
    ({"incarnation": 0}, "incarnation"),
    ({"issued_ms": 8}, "before it was issued"),
    ({"state": 0}, "unknown state"),
    ({"state": 77}, "unknown state"),
    ({"evidence": 0}, "evidence level"),
    ({"kv_tokens_free": 21}, "more free than all"),
    ({"multiaddrs": ["x"] * 9}, "too many multiaddrs"),
    ({"multiaddrs": ["\n"]}, "unprintable"),
    ({"region": "x" * 256}, "unprintable"),
    ({"public_address": "\x1b[0m"}, "unprintable"),
]


@pytest.mark.parametrize(("fields", "complaint"), BAD_FIELDS)
def test_a_bad_field_is_named_with_its_peer(fields: dict[str, Any], complaint: str) -> None:
    message = offer_to_message(OFFER, "net")
    for name, value in fields.items():
        message.ClearField(name)
        if isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    with pytest.raises(RemoteProtocolError, match=complaint) as caught:
        offer_from_envelope(seal(KEY, message), network_id="net")
    assert caught.value.peer == KEY.peer_id


def test_bad_links_are_refused() -> None:
    for links, complaint in (
        ((MeasuredLink(PeerId("?"), 1),), "bad peer id"),
        ((MeasuredLink(KEY.peer_id, 1),), "bad peer id"),
        ((MeasuredLink(OTHER.peer_id, 0),), "zero"),
        (REPORT.links * 2, "twice"),
        (REPORT.links * 17, "more than 16"),
    ):
        with pytest.raises(RemoteProtocolError, match=complaint):
            links_from_envelope(seal_link_report(KEY, replace(REPORT, links=links), "net"))


def test_signatures_and_types_are_checked() -> None:
    envelope = seal_offer(KEY, OFFER, "net")
    envelope.signer = OTHER.public
    with pytest.raises(BadSignature):
        offer_from_envelope(envelope)
    with pytest.raises(BadSignature):
        offer_from_envelope(seal_link_report(KEY, REPORT, "net"))
