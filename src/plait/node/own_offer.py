"""What this node offers now. Pure: the same figures give the same offer."""

from dataclasses import dataclass, replace

from plait.node.config import NodeConfig
from plait.router.view import Offer
from plait.types import Digest, PeerId, Span

OFFER_TTL_MS = 60_000

_UNSIGNED = Digest(bytes(32))
"""Stands for the digest until the offer is signed."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a node runs. Addresses are ``host:port``."""

    peer: PeerId
    incarnation: int
    model_digest: Digest
    span: Span
    numeric_class: str
    kv_tokens_total: int
    decode_us: int
    prefill_us_per_token: int
    public_address: str
    peer_address: str
    certificate: bytes
    multiaddrs: tuple[str, ...]


def offer_of(
    config: NodeConfig,
    facts: Facts,
    *,
    kv_tokens_free: int,
    sessions_active: int,
    draining: bool,
    now_ms: int,
) -> Offer:
    """The offer to sign; gossip sets sequence, times and digest when it publishes."""
    return Offer(
        peer=facts.peer,
        model_digest=facts.model_digest,
        span=facts.span,
        incarnation=facts.incarnation,
        sequence=0,
        issued_ms=now_ms,
        expires_ms=now_ms + OFFER_TTL_MS,
        state="draining" if draining else "ready",
        evidence="stage-receipts",
        prices=config.prices,
        numeric_class=facts.numeric_class,
        region=config.region,
        kv_tokens_total=facts.kv_tokens_total,
        kv_tokens_free=kv_tokens_free,
        sessions_active=sessions_active,
        decode_us=facts.decode_us,
        prefill_us_per_token=facts.prefill_us_per_token,
        public_address=facts.public_address,
        peer_address=facts.peer_address,
        certificate=facts.certificate,
        multiaddrs=facts.multiaddrs,
        digest=_UNSIGNED,
    )


def materially_different(old: Offer | None, new: Offer) -> bool:
    """Whether a change is worth telling at once rather than at the next period.

    State, or a quarter of the KV capacity, or the first or last session.
    """
    if old is None or old.state != new.state:
        return True
    if (old.sessions_active == 0) != (new.sessions_active == 0):
        return True
    step = max(1, new.kv_tokens_total // 4)
    return abs(old.kv_tokens_free - new.kv_tokens_free) >= step


def renewed(offer: Offer, now_ms: int) -> Offer:
    """The same offer with fresh times."""
    return replace(offer, issued_ms=now_ms, expires_ms=now_ms + OFFER_TTL_MS)
