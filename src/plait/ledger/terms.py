"""What client and stages agreed for one epoch of a session: the base of all accounting.

Counts are cumulative over the session. A stage's *stint* begins with the epoch in which its
peer entered with this span; what the session had counted by then is its ``base`` and not
its work, and what the peer had been promised by then is ``carried``. So a stage that stays
through a reroute is priced as if nothing had happened, and nobody is paid twice.
"""

from dataclasses import dataclass, field

from plait.errors import Overspend, RemoteProtocolError
from plait.types import (
    Digest,
    Microcredits,
    PeerId,
    Prices,
    Qos,
    SessionId,
    Span,
    TokenCounts,
    WireDtype,
    checked_u64,
)

CHUNK_TOKENS_MAX = 256
"""Largest chunk a stage accepts: it bounds the work that may be unpaid."""
NOTHING = Microcredits(0)

DRAFTS_MAX = 16
"""Most drafted tokens in one frame."""
_WIRE_PART = 3  # weights / dtype / kernels / wire / threads
_ACCELERATORS = ("cuda", "mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTerms:
    """One stage of the route. ``ledger_key`` is ``b""`` where the holder need not know it.

    ``replayed`` positions were fed again to build the stage when it entered; ``rebuilt``
    says that in this epoch the positions before the resume position are fed again.
    """

    peer: PeerId
    ledger_key: bytes
    span: Span
    priced_layers: int
    prices: Prices
    numeric_class: str
    offer_digest: Digest
    entered_epoch: int = 1
    base: TokenCounts = field(default_factory=TokenCounts)
    carried: Microcredits = NOTHING
    replayed: int = 0
    rebuilt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTerms:
    """One epoch of a session. Raises ``ValueError`` for terms that no session can have.

    ``resume_position`` is the first position fed in this epoch, ``start`` the session's
    counts at that moment; both are zero in epoch 1. ``wire_dtype`` is how activations cross
    every hop of the session; stages that compute in fp32 take nothing less.
    """

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
    resume_position: int = 0
    start: TokenCounts = field(default_factory=TokenCounts)
    qos: Qos = "standard"
    wire_dtype: WireDtype = "fp32"

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
        self._check_start()
        for stage in self.stages:
            self._check_stint(stage)
            if self.wire_dtype != "fp32" and dtype_of(stage.numeric_class) == "fp32":
                raise ValueError("what computes in fp32 takes fp32 from the wire")

    def _check_start(self) -> None:
        cached, rejected = self.start.cached_prompt, self.start.rejected_draft
        if self.epoch < 1 or (self.epoch == 1 and (self.resume_position or cached or rejected)):
            raise ValueError("the first epoch is 1 and starts from nothing")
        if self.resume_position < cached:
            raise ValueError("a session resumes behind what it took from caches")
        if self.start != self.counts_at(self.resume_position, cached, rejected):
            raise ValueError("the counts at the start do not fit the resume position")
        if self.start.output >= self.max_tokens:
            raise ValueError("nothing is left to draw")

    def _check_stint(self, stage: StageTerms) -> None:
        if not 1 <= stage.entered_epoch <= self.epoch:
            raise ValueError("a stage entered in an epoch that has not been")
        if stage.entered_epoch == self.epoch and stage.base != self.start:
            raise ValueError("a stage that enters begins where the epoch does")
        if stage.entered_epoch == self.epoch > 1 and not (
            stage.rebuilt and stage.replayed == self.resume_position
        ):
            raise ValueError("a stage that enters is rebuilt up to the resume position")
        if stage.entered_epoch == 1 and (stage.carried or stage.replayed or stage.base.prompt):
            raise ValueError("a stage of the first epoch begins from nothing")
        if self.epoch == 1 and stage.rebuilt:
            raise ValueError("there is nothing to rebuild in the first epoch")
        checked_u64(stage.carried, "carried")

    def entered(self, stage_index: int) -> bool:
        """Whether the stage is new in this epoch."""
        return self.stages[stage_index].entered_epoch == self.epoch

    def counts_at(self, position: int, cached: int = 0, rejected: int = 0) -> TokenCounts:
        """The session's counts when ``position`` is the next to be fed.

        At or past the end of the prompt one token more is drawn than fed.
        """
        return TokenCounts(
            prompt=max(min(position, self.prompt_tokens) - cached, 0),
            output=max(position - self.prompt_tokens + 1, 0),
            cached_prompt=cached,
            rejected_draft=rejected,
        )

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
        """What the peer can have been promised at most by the end: prompt and ``max_tokens``.

        Rejected drafts that are not free come on top; a client that drafts avoids them.
        """
        start = self.start
        # How much is taken from caches shows in epoch 1, and may cost less or more.
        caches = {start.cached_prompt, self.prompt_tokens - 1 if self.epoch == 1 else 0}
        most = (
            TokenCounts(
                prompt=self.prompt_tokens - cached,
                output=self.max_tokens,
                cached_prompt=cached,
                rejected_draft=start.rejected_draft,
            )
            for cached in caches
            if cached >= start.cached_prompt
        )
        return max(self.price(stage_index, counts) for counts in most)

    def price(self, stage_index: int, counts: TokenCounts) -> Microcredits:
        """What the peer has earned in the session at these cumulative counts.

        Raises ``Overspend`` past 64 bits, or for counts from before its stint.
        """
        stage = self.stages[stage_index]
        work = TokenCounts(
            prompt=counts.prompt - stage.base.prompt,
            output=counts.output - stage.base.output,
            cached_prompt=counts.cached_prompt - stage.base.cached_prompt,
            rejected_draft=counts.rejected_draft - stage.base.rejected_draft,
            replayed=stage.replayed,
        )
        if min(work.prompt, work.output, work.cached_prompt, work.rejected_draft) < 0:
            raise Overspend(f"stage {stage_index} was not there at these counts")
        try:
            amount = stage.prices.amount(work, stage.priced_layers)
            return Microcredits(checked_u64(stage.carried + amount, "amount"))
        except OverflowError as error:
            raise Overspend(f"stage {stage_index} cannot be paid: {error}") from error


def dtype_of(numeric_class: str) -> str:
    """The dtype that a numeric class names; ``""`` if it names none."""
    parts = numeric_class.split("/")
    return parts[1] if len(parts) > 1 else ""


def accelerator_of(numeric_class: str) -> str:
    """The kind of accelerator that a numeric class names by its kernels; ``""`` for a CPU's."""
    parts = numeric_class.split("/")
    kernels = parts[2] if len(parts) > 2 else ""
    kind = kernels.partition("-")[0]
    return kind if kind in _ACCELERATORS else ""


def class_on_wire(numeric_class: str, wire_dtype: WireDtype) -> str:
    """The numeric class of a session's stage: the one its offer names, for fp32 on the wire,
    with what is on the session's wire."""
    parts = numeric_class.split("/")
    if wire_dtype == "fp32" or len(parts) < _WIRE_PART + 1:
        return numeric_class
    return "/".join((*parts[:_WIRE_PART], wire_dtype, *parts[_WIRE_PART + 1 :]))
