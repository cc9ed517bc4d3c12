"""Offers for tests, as values."""

from plait.envelope import digest
from plait.router.view import Offer
from plait.testing.accounting import HOUR_MS, NOW_MS, key_of
from plait.testing.compute import FAKE_SHAPE
from plait.types import Prices, Span

PRICES = Prices(prompt=1_000_000, output=2_000_000)


def paper_offer(name: str, span: Span) -> Offer:
    """A ready offer of the fake model by the peer that ``key_of`` gives for ``name``."""
    return Offer(
        peer=key_of(name).peer_id,
        model_digest=FAKE_SHAPE.digest,
        span=span,
        incarnation=1,
        sequence=1,
        issued_ms=NOW_MS,
        expires_ms=NOW_MS + HOUR_MS,
        state="ready",
        evidence="stage-receipts",
        prices=PRICES,
        numeric_class="fake",
        region="",
        kv_tokens_total=4096,
        kv_tokens_free=4096,
        sessions_active=0,
        decode_us=1,
        prefill_us_per_token=1,
        public_address="",
        peer_address="",
        certificate=b"",
        multiaddrs=(),
        digest=digest(name.encode()),
    )
