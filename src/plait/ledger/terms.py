"""What client and stages agreed for one epoch of a session: the base of all accounting."""

from dataclasses import dataclass

from plait.errors import Overspend, RemoteProtocolError
from plait.types import Digest, Microcredits, PeerId, Prices, SessionId, Span, TokenCounts

CHUNK_TOKENS_MAX = 256
"""Largest chunk a stage accepts: it bounds the work that may be unpaid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerms:
    """One stage of the route. ``ledger_key`` is ``b""`` where the holder need not know it."""

    peer: PeerId
    ledger_key: bytes
    span: Span
    priced_layers: int
    prices: Prices
    numeric_class: str
    offer_digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerms:
    """One epoch of a session. Raises ``ValueError`` for terms that no session can have."""

    network_id: str
    session_id: SessionId
    epoch: int
    client: PeerId
    client_ledger_key: bytes
    model_digest: Digest
    stages: tuple[StageTerms, ...]
    prompt_tokens: int
    max_tokens: int
    chunk_tokens: int = 32
    prefill_chunk_tokens: int = 256
    handoff_salt: bytes

    def __post_init__(self) -> None:
        if len(self.session_id) != 16 or len(self.handoff_salt) != 32:
            raise ValueError("a session id is 16 bytes and a hand-off salt 32")
        if not self.stages:
            raise ValueError("a session needs a stage")
        if len({stage.peer for stage in self.stages}) != len(self.stages):
            raise ValueError("a peer serves one stage of a session: payees are distinct")
        if self.prompt_tokens < 1 or self.max_tokens < 1:
            raise ValueError("prompt and answer have at least one token")
        for size in (self.chunk_tokens, self.prefill_chunk_tokens):
            if not 1 <= size <= CHUNK_TOKENS_MAX:
                raise ValueError(f"a chunk has 1 to {CHUNK_TOKENS_MAX} tokens, not {size}")

    def counts_after(self, first_position: int, rows: int, sample: bool) -> TokenCounts:
        """Cumulative counts once the frame of these positions is computed.

        A frame without rows only closes a chunk; its position is the next one to be fed,
        that of the id drawn last. Raises ``RemoteProtocolError`` for a frame that no
        session with these terms has.
        """
        end = first_position + rows
        if first_position < 0 or rows < 0 or (rows == 0 and sample):
            raise RemoteProtocolError(f"no frame covers positions {first_position} to {end}")
        if rows and not sample:
            if end >= self.prompt_tokens:
                raise RemoteProtocolError("a frame that ends the prompt or follows it must sample")
            return TokenCounts(prompt=end)
        output = end - self.prompt_tokens + 1
        if not 1 <= output <= self.max_tokens:
            raise RemoteProtocolError(f"no answer token is drawn at position {end}")
        return TokenCounts(prompt=self.prompt_tokens, output=output)

    def price_max(self, stage_index: int) -> Microcredits:
        """What the stage can earn at most: the whole prompt and ``max_tokens`` outputs."""
        return self.price(
            stage_index, TokenCounts(prompt=self.prompt_tokens, output=self.max_tokens)
        )

    def price(self, stage_index: int, counts: TokenCounts) -> Microcredits:
        """What the stage earns for these cumulative counts; raises ``Overspend`` past 64 bits."""
        stage = self.stages[stage_index]
        try:
            return stage.prices.amount(counts, stage.priced_layers)
        except OverflowError as error:
            raise Overspend(f"stage {stage_index} cannot be paid: {error}") from error
