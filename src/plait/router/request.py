"""What a caller asks of the router: sizes, bounds, preferences."""

from dataclasses import dataclass
from typing import Literal

from plait.types import Microcredits, PeerId, Span, WireDtype

Sort = Literal["latency", "price", "throughput", "weighted"]


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One request. Raises ``ValueError`` for values that make no sense.

    ``sort`` names what is best within the bounds: ``latency`` the shortest time to the
    whole answer, ``throughput`` the most tokens per second once it has started, ``price``
    the lowest price (ties: latency), ``weighted`` the lowest price plus
    ``latency_weight`` microcredits for each second to the whole answer. All assume that
    ``max_tokens`` are generated. ``only`` empty allows every peer. A region ``eu`` covers
    ``eu-west``; a peer without a region fails any region rule. ``pin`` puts all layers of a
    span on one peer.
    """

    prompt_tokens: int
    max_tokens: int
    max_price: Microcredits | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    sort: Sort = "latency"
    latency_weight: int = 10
    pin: tuple[tuple[Span, PeerId], ...] = ()
    only: frozenset[PeerId] = frozenset()
    ignore: frozenset[PeerId] = frozenset()
    numeric_class: str | None = None
    regions_allowed: frozenset[str] = frozenset()
    regions_denied: frozenset[str] = frozenset()
    allow_fronting_node: bool = False
    """Accept offers whose only evidence is the fronting node's word."""
    prefill_chunk_tokens: int = 256
    wire: WireDtype | None = None
    """What hops carry between stages that round; None: see ``wire_choice``."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_tokens < 1 or self.prefill_chunk_tokens < 1:
            raise ValueError("prompt_tokens, max_tokens and prefill_chunk_tokens must be positive")
        if self.sort not in ("latency", "price", "throughput", "weighted"):
            raise ValueError(f"unknown sort: {self.sort}")
        if self.latency_weight < 0:
            raise ValueError("latency_weight must not be negative")
        for name in ("max_price", "ttft_s", "tpot_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative")

    @property
    def prefill_rounds(self) -> int:
        """Frames of the prompt. Each waits for the voucher of the one before."""
        return -(-self.prompt_tokens // self.prefill_chunk_tokens)
