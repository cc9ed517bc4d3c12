"""Offers for tests, as values."""

from dataclasses import replace
from typing import Any

from plait.envelope import digest
from plait.router.view import Offer
from plait.testing.accounting import HOUR_MS, NOW_MS, key_of
from plait.testing.compute import FAKE_SHAPE
from plait.types import Digest, PeerId, Prices, Span

PRICES = Prices(prompt=1_000_000, output=2_000_000)


def plain_offer(peer: PeerId, model_digest: Digest, span: Span, **changes: Any) -> Offer:
    """A ready, idle offer that costs and takes little, but for what is changed."""
    offer = Offer(
        peer=peer,
        model_digest=model_digest,
        span=span,
        incarnation=1,
        sequence=1,
        issued_ms=NOW_MS,
        expires_ms=NOW_MS + 60_000,
        state="ready",
        evidence="stage-receipts",
        prices=Prices(prompt=1, output=2),
        numeric_class="fp32",
        region="",
        kv_tokens_total=10_000,
        kv_tokens_free=10_000,
        sessions_active=0,
        decode_us=100,
        prefill_us_per_token=10,
        public_address="127.0.0.1:1",
        peer_address="127.0.0.1:2",
        certificate=b"",
        multiaddrs=(),
        digest=Digest(b""),
    )
    return replace(offer, **changes)


def paper_offer(name: str, span: Span) -> Offer:
    """A ready offer of the fake model by the peer that ``key_of`` gives for ``name``."""
    return plain_offer(
        key_of(name).peer_id,
        FAKE_SHAPE.digest,
        span,
        expires_ms=NOW_MS + HOUR_MS,
        prices=PRICES,
        numeric_class="fake",
        kv_tokens_total=4096,
        kv_tokens_free=4096,
        decode_us=1,
        prefill_us_per_token=1,
        public_address="",
        peer_address="",
        digest=digest(name.encode()),
    )
