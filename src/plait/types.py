"""Shared nouns: spans, prices, token counts, sampling. Values only, no IO."""

from dataclasses import dataclass
from typing import Literal, NewType

from plait.errors import BadSampling

PeerId = NewType("PeerId", str)
"""base58btc identity multihash of an Ed25519 public key, ``12D3Koo…``."""

AccountId = NewType("AccountId", str)
"""A ledger account: a peer id, or a name with a colon for the ledger's own accounts."""

WireDtype = Literal["fp32", "bf16", "int8"]
"""How activations cross a hop; ``int8`` has a scale for every 32 numbers."""

Qos = Literal["interactive", "standard", "batch"]
"""How urgent a session is: its place in queues, and when it is refused first."""

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


BIASES_MAX = 300
TOP_LOGPROBS_MAX = 20
GRAMMAR_CHARACTERS_MAX = 65_536
GrammarKind = Literal["json_schema", "regex", "lark"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like: a JSON schema, a regular expression or a Lark grammar."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        if not 0 < len(self.text) <= GRAMMAR_CHARACTERS_MAX:
            raise ValueError(f"a grammar has 1 to {GRAMMAR_CHARACTERS_MAX} characters")


_INTEGERS = (
    "temperature_micros",
    "top_p_micros",
    "top_k",
    "seed",
    "min_p_micros",
    "presence_penalty_micros",
    "frequency_penalty_micros",
    "repetition_penalty_micros",
    "top_logprobs",
)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the last stage draws tokens. Fixed-point, so that it can be signed.

    ``temperature_micros`` 0 is greedy; ``top_p_micros`` is in (0, 10**6]; ``top_k`` and
    ``min_p_micros`` 0 are no limit. ``logit_bias`` is (id, millionths), ascending by id.
    Presence and frequency penalties are subtracted for ids already in the answer; the
    repetition penalty divides (or multiplies, below zero) for ids in prompt or answer. The
    draw at a position depends only on these values, that position and, with penalties or a
    grammar, the ids before it. Raises ``BadSampling``, a ``ConfigError`` and ``ValueError``.
    """

    temperature_micros: int = 0
    top_p_micros: int = MILLION
    top_k: int = 0
    seed: int = 0
    end_ids: tuple[int, ...] = ()
    min_p_micros: int = 0
    presence_penalty_micros: int = 0
    frequency_penalty_micros: int = 0
    repetition_penalty_micros: int = MILLION
    logit_bias: tuple[tuple[int, int], ...] = ()
    top_logprobs: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            if not isinstance(value := getattr(self, name), int):
                raise BadSampling(f"{name} is an integer, not {value!r}")
        if not 0 <= self.temperature_micros <= 100 * MILLION:
            raise BadSampling("temperature must be between 0 and 100")
        if not 0 < self.top_p_micros <= MILLION:
            raise BadSampling("top_p must be in (0, 1]")
        if self.top_k < 0:
            raise BadSampling("top_k must not be negative")
        if not 0 <= self.min_p_micros <= MILLION:
            raise BadSampling("min_p must be in [0, 1]")
        for penalty in (self.presence_penalty_micros, self.frequency_penalty_micros):
            if abs(penalty) > 2 * MILLION:
                raise BadSampling("a penalty must be between -2 and 2")
        if not 0 < self.repetition_penalty_micros <= 10 * MILLION:
            raise BadSampling("repetition_penalty must be in (0, 10]")
        if not 0 <= self.top_logprobs <= TOP_LOGPROBS_MAX:
            raise BadSampling(f"top_logprobs must be between 0 and {TOP_LOGPROBS_MAX}")
        self._check_bias()
        checked_u64(self.seed, "seed")

    def _check_bias(self) -> None:
        ids = [token for token, _ in self.logit_bias]
        if len(ids) > BIASES_MAX:
            raise BadSampling(f"logit_bias has at most {BIASES_MAX} ids")
        if ids != sorted(set(ids)) or (ids and not 0 <= ids[0] <= ids[-1] < 2**32):
            raise BadSampling("logit_bias is ascending by id")
        if any(abs(bias) > 100 * MILLION for _, bias in self.logit_bias):
            raise BadSampling("a logit bias must be between -100 and 100")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature_micros == 0

    @property
    def penalises(self) -> bool:
        """Whether ids that came before make a difference."""
        return bool(
            self.presence_penalty_micros
            or self.frequency_penalty_micros
            or self.repetition_penalty_micros != MILLION
        )

    @property
    def needs_history(self) -> bool:
        """Whether a draw needs all ids before it."""
        return self.penalises or self.grammar is not None


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
