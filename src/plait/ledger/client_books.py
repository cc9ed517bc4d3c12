"""The client's side of the accounting of a session: receipts in, vouchers out.

Note each frame ``sent`` and each result ``drawn`` (also an empty one), then
``accept_receipts`` where a chunk closed. No voucher is signed for a receipt that does
not hold. When an epoch fails, ``close_epoch`` pays those who signed for the cut chunk, and
``next_epoch`` goes on: what a peer has been promised only ever grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.envelope import digest, open_envelope, seal
from plait.errors import (
    BadProof,
    LocalProtocolError,
    PlaitError,
    RemoteProtocolError,
    VerificationError,
)
from plait.identity import SigningKey
from plait.ledger.handoff import HandoffChain, ids_payload
from plait.ledger.receipt import (
    ChunkClose,
    check_handoff,
    check_receipt,
    check_ring,
    draw_statement,
)
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import Transcript, amounts_of, voucher_message
from plait.types import Digest, Microcredits, PeerId, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import DrawStatement, StageReceipt


@dataclass(frozen=True, slots=True)
class CutEvidence:
    """What the stages signed for a chunk that was cut short, in stage order; None did not.

    ``draws`` is the last stage's statement of the ids drawn, where it gave no receipt.
    """

    traversal: int
    receipts: tuple[SignedEnvelope | None, ...]
    draws: SignedEnvelope | None


@dataclass(frozen=True, slots=True)
class EpochEvidence:
    """What is left of an epoch: receipts in chunk then stage order, the cut, the voucher."""

    receipts: tuple[SignedEnvelope, ...]
    cut: CutEvidence | None
    voucher: SignedEnvelope | None


@dataclass(frozen=True, slots=True)
class _Sent:
    """A frame that waits for its result."""

    first_position: int
    end: int
    drafts: int
    rejected: int


class ClientBooks:
    """The books of the client for one epoch. ``key`` is its ledger key.

    Raises ``LocalProtocolError`` if the terms lack a stage's ledger key.
    """

    def __init__(self, terms: SessionTerms, key: SigningKey) -> None:
        if any(len(stage.ledger_key) != 32 for stage in terms.stages):
            raise LocalProtocolError("the client must know every stage's ledger key")
        if key.public != terms.client_ledger_key:
            raise LocalProtocolError("the terms name another ledger key of the client")
        self.counts: TokenCounts = terms.start
        """The session's counts after the last result noted."""
        self.faults: set[PeerId] = set()
        """Stages whose evidence did not hold, of the last ``accept_receipts`` or close."""
        self._terms = terms
        self._key = key
        self._sent = HandoffChain(terms, 0)
        self._drawn = HandoffChain(terms, len(terms.stages))
        self._next = terms.resume_position
        self._cached = terms.start.cached_prompt
        self._rejected = terms.start.rejected_draft
        self._waiting: dict[int, _Sent] = {}
        self._counts_at: dict[int, TokenCounts] = {}
        self._fed_any = False
        self._transcript = Transcript(terms)
        self._previous = [b""] * len(terms.stages)
        self._receipts: list[SignedEnvelope] = []
        self._statement: tuple[int, SignedEnvelope | None] = (-1, None)
        self._cut: CutEvidence | None = None
        self._voucher: SignedEnvelope | None = None
        self._accepted_traversal = -1
        self._promised: dict[PeerId, Microcredits] = {}
        self._verified_before = 0
        self._voucher_before: SignedEnvelope | None = None

    @property
    def cost(self) -> Microcredits:
        """What the session's vouchers promise all payees together."""
        return Microcredits(sum(self._promised.values()))

    @property
    def receipts(self) -> tuple[SignedEnvelope, ...]:
        """All receipts of the epoch's whole chunks, in chunk then stage order."""
        return tuple(self._receipts)

    @property
    def receipts_verified(self) -> int:
        """How many receipts of the session were accepted."""
        cut = sum(one is not None for one in self._cut.receipts) if self._cut else 0
        return self._verified_before + len(self._receipts) + cut

    @property
    def voucher(self) -> SignedEnvelope | None:
        """The last voucher signed, of this epoch or an earlier one."""
        return self._voucher or self._voucher_before

    def promised(self, peer: PeerId) -> Microcredits:
        """What a peer has been promised in the session."""
        return self._promised.get(peer, Microcredits(0))

    def sent(
        self,
        traversal: int,
        first_position: int,
        ids: Sequence[int],
        *,
        drafts: int = 0,
        replay: bool = False,
    ) -> None:
        """Note a frame sent to stage 0; ``ids`` is empty for a frame that only closes.

        Raises ``LocalProtocolError`` for a live frame that leaves positions out.
        """
        if not replay and first_position > self._next and self._fed_any:
            raise LocalProtocolError(
                f"a frame starts at position {first_position}, not {self._next}"
            )
        self._sent.add(traversal, first_position, len(ids), ids_payload(ids))
        if replay:
            return
        if not self._fed_any and self._terms.epoch == 1:
            self._next = self._cached = first_position
        self._fed_any = True
        self._rejected += max(self._next - first_position, 0)
        self._next = first_position + len(ids)
        self._waiting[traversal] = _Sent(first_position, self._next, drafts, self._rejected)

    def drawn(
        self,
        traversal: int,
        first_position: int,
        ids: Sequence[int],
        statement: SignedEnvelope | None = None,
    ) -> None:
        """Note the result of a frame, also if it is empty; the position is the frame's.

        ``statement`` is what the last stage signed for its draws; it is looked at only if
        the chunk is cut. Raises ``RemoteProtocolError`` naming the last stage if the frame
        was not sent or the number of ids is not one it asked for.
        """
        sent, last = self._waiting.get(traversal), self._terms.stages[-1].peer
        if sent is None or sent.first_position != first_position:
            raise RemoteProtocolError(f"no frame {traversal} is under way", peer=last)
        samples = sent.end > first_position and sent.end >= self._terms.prompt_tokens
        most = 1 + sent.drafts if samples else 0
        if not min(most, 1) <= len(ids) <= most:
            raise RemoteProtocolError(
                f"{len(ids)} ids were drawn instead of {most} at most", peer=last
            )
        del self._waiting[traversal]
        self._drawn.add(traversal, first_position, len(ids), ids_payload(ids))
        self.counts = self._counts_at[traversal] = self._counts_after(sent, len(ids))
        self._statement = traversal, statement

    def accept_receipts(
        self, envelopes: Sequence[SignedEnvelope], traversal: int, now_ms: int
    ) -> SignedEnvelope:
        """Check the receipts of a closed chunk and sign the voucher that pays for it.

        ``envelopes`` are one per stage, in order. The same traversal again returns the
        same voucher. Raises ``BadSignature`` or ``BadProof`` naming the stage (its peer is
        then in ``faults``), and ``LocalProtocolError`` if the result of the traversal has
        not been noted.
        """
        if self._voucher is not None and traversal == self._accepted_traversal:
            return self._voucher
        self.faults = set()
        close = self._close_of(traversal)
        stages = self._terms.stages
        if len(envelopes) != len(stages):
            owes = min(len(envelopes), len(stages) - 1)
            self.faults.add(stages[owes].peer)
            raise BadProof(
                f"{len(envelopes)} receipts for {len(stages)} stages: stage {owes} owes one"
            )
        receipts: list[StageReceipt | None] = []
        for index, envelope in enumerate(envelopes):
            receipts.append(self._checked(index, envelope, close, receipts))
        amounts = amounts_of(self._terms, close.counts)
        return self._promise(envelopes, close, amounts, now_ms)

    def close_epoch(
        self,
        envelopes: Sequence[SignedEnvelope | None],
        traversal: int | None,
        position: int,
        now_ms: int,
    ) -> SignedEnvelope | None:
        """Pay for the chunk that is cut after a traversal; None if nothing of it is open.

        ``envelopes`` are one per stage; None of one that did not answer. A receipt that does
        not hold counts as none, and its peer is in ``faults``. A stage without a receipt
        keeps what it had been promised.
        """
        self.faults = set()
        if traversal is None or traversal == self._accepted_traversal or self._cut is not None:
            return None
        close = self._close_of(traversal)
        if close.counts != self._cut_counts(close.counts, position):
            raise LocalProtocolError(f"traversal {traversal} does not end at {position}")
        kept = self._receipts_that_hold(envelopes, close)
        draws = None if kept[-1] is not None else self._draws(traversal)
        self._cut = CutEvidence(traversal, kept, draws)
        amounts = [
            self._terms.price(index, close.counts)
            if kept[index] is not None
            else self._amount_before(index)
            for index in range(len(kept))
        ]
        signed = [envelope for envelope in kept if envelope is not None]
        return self._promise(signed, close, amounts, now_ms, cut=True) if signed else None

    def next_epoch(self, terms: SessionTerms) -> "ClientBooks":
        """The books of the epoch that follows."""
        books = ClientBooks(terms, self._key)
        books._promised = dict(self._promised)
        books._verified_before = self.receipts_verified
        books._voucher_before = self.voucher
        return books

    def evidence(self) -> EpochEvidence:
        """What the epoch leaves behind."""
        return EpochEvidence(self.receipts, self._cut, self._voucher)

    # Inside --------------------------------------------------------------------------

    def _counts_after(self, sent: _Sent, draws: int) -> TokenCounts:
        """Counts once the result of a frame is known: rows behind its draws are rejected."""
        terms = self._terms
        if sent.first_position < terms.prompt_tokens:
            return terms.counts_at(sent.end, self._cached, sent.rejected)
        position = sent.first_position + draws
        return terms.counts_at(position, self._cached, sent.rejected + sent.end - position)

    def _cut_counts(self, counts: TokenCounts, position: int) -> TokenCounts:
        return self._terms.counts_at(position, counts.cached_prompt, counts.rejected_draft)

    def _close_of(self, traversal: int) -> ChunkClose:
        counts = self._counts_at.get(traversal)
        if counts is None:
            raise LocalProtocolError(f"no result of traversal {traversal} was noted")
        return ChunkClose(len(self._receipts) // len(self._terms.stages), traversal, counts)

    def _checked(
        self,
        index: int,
        envelope: SignedEnvelope,
        close: ChunkClose,
        before: Sequence[StageReceipt | None],
    ) -> StageReceipt:
        """A receipt that holds, with the one before it and the ends; notes whose fault it is."""
        try:
            receipt = check_receipt(envelope, self._terms, index, close, self._previous[index])
            if before and (upstream := before[-1]) is not None:
                check_handoff(upstream, receipt, index, close.chunk)
            self._check_end(index, receipt, close)
        except PlaitError:
            self.faults.add(self._terms.stages[index].peer)
            raise
        return receipt

    def _check_end(self, index: int, receipt: StageReceipt, close: ChunkClose) -> None:
        sent, drawn = self._sent.commit_at(close.traversal), self._drawn.commit_at(close.traversal)
        if sent is None or drawn is None:
            raise LocalProtocolError(f"traversal {close.traversal} was closed before")
        ours_in = sent if index == 0 else Digest(receipt.input_commit)
        is_last = index == len(self._terms.stages) - 1
        ours_out = drawn if is_last else Digest(receipt.output_commit)
        check_ring(receipt, receipt, ours_in, ours_out, close.chunk)

    def _receipts_that_hold(
        self, envelopes: Sequence[SignedEnvelope | None], close: ChunkClose
    ) -> tuple[SignedEnvelope | None, ...]:
        receipts: list[StageReceipt | None] = []
        kept: list[SignedEnvelope | None] = []
        for index, envelope in enumerate(envelopes):
            receipt: StageReceipt | None = None
            if envelope is not None:
                try:
                    receipt = self._checked(index, envelope, close, receipts)
                except (VerificationError, RemoteProtocolError):
                    envelope = None
            receipts.append(receipt)
            kept.append(envelope)
        return tuple(kept)

    def _draws(self, traversal: int) -> SignedEnvelope | None:
        """The last stage's statement, if it signed exactly what was drawn."""
        noted, envelope = self._statement
        if envelope is None or noted != traversal:
            return None
        last = self._terms.stages[-1]
        try:
            statement = open_envelope(envelope, DrawStatement, signer=last.ledger_key)
        except (VerificationError, RemoteProtocolError):
            self.faults.add(last.peer)
            return None
        expected = draw_statement(self._terms, traversal, self._drawn.commit)
        if statement != expected:
            self.faults.add(last.peer)
            return None
        return envelope

    def _amount_before(self, index: int) -> Microcredits:
        stage = self._terms.stages[index]
        return max(self._promised.get(stage.peer, Microcredits(0)), stage.carried)

    def _promise(
        self,
        envelopes: Sequence[SignedEnvelope],
        close: ChunkClose,
        amounts: Sequence[Microcredits],
        now_ms: int,
        *,
        cut: bool = False,
    ) -> SignedEnvelope:
        self._transcript.add(envelopes)
        if not cut:
            self._receipts += envelopes
            self._previous = [digest(envelope.payload) for envelope in envelopes]
        message = voucher_message(
            self._terms,
            close.chunk + 1,
            close.counts,
            self._transcript.value,
            now_ms,
            cut_amounts=amounts if cut else None,
        )
        self._voucher = seal(self._key, message)
        self._accepted_traversal = close.traversal
        for stage, amount in zip(self._terms.stages, amounts, strict=True):
            self._promised[stage.peer] = amount
        self._forget(close.traversal)
        return self._voucher

    def _forget(self, traversal: int) -> None:
        self._sent.forget(traversal)
        self._drawn.forget(traversal)
        self._counts_at = {t: c for t, c in self._counts_at.items() if t > traversal}
