"""What this node offers now. Pure: the same figures give the same offer."""

from dataclasses import dataclass

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
    prefill_us_per_token: int
    public_address: str
    peer_address: str
    certificate: bytes
    multiaddrs: tuple[str, ...]


def offer_of(
    config: NodeConfig,
    facts: Facts,
    *,
    decode_us: int,
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
        decode_us=decode_us,
        prefill_us_per_token=facts.prefill_us_per_token,
        public_address=facts.public_address,
        peer_address=facts.peer_address,
        certificate=facts.certificate,
        multiaddrs=facts.multiaddrs,
        digest=_UNSIGNED,
    )


def materially_different(old: Offer | None, new: Offer) -> bool:
    """Whether a change is worth telling at once rather than at the next period.

    State, a quarter of the KV capacity, the first or last session, or half the speed.
    """
    if old is None or old.state != new.state:
        return True
    if (old.sessions_active == 0) != (new.sessions_active == 0):
        return True
    if not new.decode_us / 2 <= old.decode_us <= new.decode_us * 2:
        return True
    step = max(1, new.kv_tokens_total // 4)
    return abs(old.kv_tokens_free - new.kv_tokens_free) >= step


class SpeedMeter:
    """The time of a decode step, from the steps that were computed alone.

    An exponentially weighted mean, so that a burst of load passes and a slower machine shows.
    """

    WEIGHT = 0.1

    def __init__(self, decode_us: int) -> None:
        self._decode_us = float(decode_us)

    @property
    def decode_us(self) -> int:
        """Microseconds, at least 1."""
        return max(1, round(self._decode_us))

    def stepped(self, elapsed_us: float) -> None:
        """Note one step of one row."""
        self._decode_us += self.WEIGHT * (elapsed_us - self._decode_us)
