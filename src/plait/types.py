"""Shared nouns: spans, prices, token counts, sampling. Values only, no IO."""

from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)
"""base58btc identity multihash of an Ed25519 public key, ``12D3Koo…``."""

AccountId = NewType("AccountId", str)
"""A ledger account: a peer id, or a name with a colon for the ledger's own accounts."""

Microcredits = NewType("Microcredits", int)

SessionId = NewType("SessionId", bytes)
"""16 random bytes."""

Digest = NewType("Digest", bytes)
"""SHA-256, 32 bytes."""

U64_MAX = 2**64 - 1
MILLION = 1_000_000


def checked_u64(value: int, what: str) -> int:
    """Return ``value`` if it fits an unsigned 64-bit integer; raise ``OverflowError`` if not."""
    if not 0 <= value <= U64_MAX:
        raise OverflowError(f"{what} does not fit an unsigned 64-bit integer: {value}")
    return value


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Half-open range of layers ``[start, end)``. Raises ``ValueError`` if empty or negative."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"not a span: {self.start}:{self.end}")

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end}"

    def contains(self, other: "Span") -> bool:
        """Whether every layer of ``other`` is in this span."""
        return self.start <= other.start and other.end <= self.end

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Parse ``"a:b"``; raises ``ValueError``."""
        start, colon, end = text.partition(":")
        if not colon:
            raise ValueError(f"a span is written start:end, not {text!r}")
        return cls(int(start), int(end))


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Cumulative tokens of a session, by how they are priced."""

    prompt: int = 0
    output: int = 0
    cached_prompt: int = 0
    rejected_draft: int = 0
    replayed: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """Integer microcredits per million tokens per layer."""

    prompt: int = 0
    output: int = 0
    cached_prompt: int = 0
    rejected_draft: int = 0
    replayed: int = 0

    def amount(self, counts: TokenCounts, layers: int) -> Microcredits:
        """Microcredits for ``counts`` tokens through ``layers`` priced layers.

        Computed on cumulative counts and rounded up once, so that rounding never
        accumulates. Raises ``OverflowError`` beyond 64 bits.
        """
        total = layers * (
            self.prompt * counts.prompt
            + self.output * counts.output
            + self.cached_prompt * counts.cached_prompt
            + self.rejected_draft * counts.rejected_draft
            + self.replayed * counts.replayed
        )
        return Microcredits(checked_u64(-(-total // MILLION), "amount"))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage draws tokens. Fixed-point, so that it can be signed.

    ``temperature_micros`` 0 is greedy; ``top_p_micros`` is in (0, 10**6]; ``top_k`` 0 is
    no limit. The draw at a position depends only on ``seed`` and that position.
    """

    temperature_micros: int = 0
    top_p_micros: int = MILLION
    top_k: int = 0
    seed: int = 0
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature_micros <= 100 * MILLION:
            raise ValueError("temperature must be between 0 and 100")
        if not 0 < self.top_p_micros <= MILLION:
            raise ValueError("top_p must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError("top_k must not be negative")
        checked_u64(self.seed, "seed")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature_micros == 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the router and the ledger need to know of a model.

    ``embedding_cost_layers`` and ``head_cost_layers`` are what embedding and head cost,
    in layers; they are priced and timed with the span that hosts them.
    """

    name: str
    digest: Digest
    layers: int
    embedding_cost_layers: int = 0
    head_cost_layers: int = 0
    bytes_per_row: int = 0
    """Activation bytes per token between stages."""

    def priced_layers(self, span: Span) -> int:
        """Layers charged for ``span``, embedding and head included by cost."""
        extra = self.embedding_cost_layers if span.start == 0 else 0
        extra += self.head_cost_layers if span.end == self.layers else 0
        return len(span) + extra
