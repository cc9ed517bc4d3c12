"""The client's side of the accounting of one epoch: receipts in, vouchers out.

Note each frame ``sent`` and each result ``drawn`` (also an empty one), then
``accept_receipts`` where a chunk closed. No voucher is signed for a receipt that does
not hold.
"""

from collections.abc import Sequence

from plait.envelope import digest, seal
from plait.errors import BadProof, LocalProtocolError, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.handoff import HandoffChain, ids_payload
from plait.ledger.receipt import ChunkClose, check_handoff, check_receipt, check_ring
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import Transcript, amounts_of, voucher_message
from plait.types import Digest, Microcredits, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import StageReceipt


class ClientBooks:
    """The books of the client for one epoch. ``key`` is its ledger key.

    Raises ``LocalProtocolError`` if the terms lack a stage's ledger key.
    """

    def __init__(self, terms: SessionTerms, key: SigningKey) -> None:
        if any(len(stage.ledger_key) != 32 for stage in terms.stages):
            raise LocalProtocolError("the client must know every stage's ledger key")
        if key.public != terms.client_ledger_key:
            raise LocalProtocolError("the terms name another ledger key of the client")
        self._terms = terms
        self._key = key
        self._sent = HandoffChain(terms, 0)
        self._drawn = HandoffChain(terms, len(terms.stages))
        self._next_position = 0
        self._draws = 0
        self._frame_ends: dict[int, tuple[int, int]] = {}
        self._counts: dict[int, TokenCounts] = {}
        self._transcript = Transcript(terms)
        self._previous = [b""] * len(terms.stages)
        self._receipts: list[SignedEnvelope] = []
        self._voucher: SignedEnvelope | None = None
        self._accepted_traversal = -1
        self._cost = Microcredits(0)

    @property
    def cost(self) -> Microcredits:
        """What the last voucher promises all stages together."""
        return self._cost

    @property
    def receipts(self) -> tuple[SignedEnvelope, ...]:
        """All receipts accepted, in chunk then stage order."""
        return tuple(self._receipts)

    @property
    def receipts_verified(self) -> int:
        """How many receipts were accepted."""
        return len(self._receipts)

    @property
    def voucher(self) -> SignedEnvelope | None:
        """The last voucher signed."""
        return self._voucher

    def sent(self, traversal: int, first_position: int, ids: Sequence[int]) -> None:
        """Note a frame sent to stage 0; ``ids`` is empty for a frame that only closes.

        Raises ``LocalProtocolError`` unless it starts at the next position.
        """
        if first_position != self._next_position:
            raise LocalProtocolError(
                f"a frame starts at position {first_position}, not {self._next_position}"
            )
        self._sent.add(traversal, first_position, len(ids), ids_payload(ids))
        self._next_position += len(ids)
        self._frame_ends[traversal] = (first_position, self._next_position)

    def drawn(self, traversal: int, first_position: int, ids: Sequence[int]) -> None:
        """Note the result of a frame, also if it is empty; the position is the frame's.

        Raises ``RemoteProtocolError`` naming the last stage if the frame was not sent or
        the number of ids is not the one it asked for.
        """
        start, end = self._frame_ends.pop(traversal, (-1, -1))
        last = self._terms.stages[-1].peer
        if start != first_position:
            raise RemoteProtocolError(f"no frame {traversal} is under way", peer=last)
        expected = 1 if end > start and end >= self._terms.prompt_tokens else 0
        if len(ids) != expected:
            raise RemoteProtocolError(f"{len(ids)} ids were drawn instead of {expected}", peer=last)
        self._drawn.add(traversal, first_position, len(ids), ids_payload(ids))
        self._draws += len(ids)
        prompt = min(end, self._terms.prompt_tokens)
        self._counts[traversal] = TokenCounts(prompt=prompt, output=self._draws)

    def accept_receipts(
        self, envelopes: Sequence[SignedEnvelope], traversal: int, now_ms: int
    ) -> SignedEnvelope:
        """Check the receipts of a closed chunk and sign the voucher that pays for it.

        ``envelopes`` are one per stage, in order. The same traversal again returns the
        same voucher. Raises ``BadSignature`` or ``BadProof`` naming the stage, and
        ``LocalProtocolError`` if the result of the traversal has not been noted.
        """
        if self._voucher is not None and traversal == self._accepted_traversal:
            return self._voucher
        close = self._close_of(traversal)
        if len(envelopes) != len(self._terms.stages):
            raise BadProof(
                f"{len(envelopes)} receipts for {len(self._terms.stages)} stages: "
                f"stage {min(len(envelopes), len(self._terms.stages) - 1)} owes one"
            )
        receipts = self._check(envelopes, close)
        self._check_ends(receipts, close)
        return self._promise(envelopes, close, now_ms)

    def _close_of(self, traversal: int) -> ChunkClose:
        counts = self._counts.get(traversal)
        if counts is None:
            raise LocalProtocolError(f"no result of traversal {traversal} was noted")
        return ChunkClose(len(self._receipts) // len(self._terms.stages), traversal, counts)

    def _check(self, envelopes: Sequence[SignedEnvelope], close: ChunkClose) -> list[StageReceipt]:
        receipts: list[StageReceipt] = []
        for index, envelope in enumerate(envelopes):
            receipt = check_receipt(envelope, self._terms, index, close, self._previous[index])
            if receipts:
                check_handoff(receipts[-1], receipt, index, close.chunk)
            receipts.append(receipt)
        return receipts

    def _check_ends(self, receipts: Sequence[StageReceipt], close: ChunkClose) -> None:
        sent, drawn = self._sent.commit_at(close.traversal), self._drawn.commit_at(close.traversal)
        if sent is None or drawn is None:
            raise LocalProtocolError(f"traversal {close.traversal} was closed before")
        check_ring(receipts[0], receipts[-1], sent, drawn, close.chunk)

    def _promise(
        self, envelopes: Sequence[SignedEnvelope], close: ChunkClose, now_ms: int
    ) -> SignedEnvelope:
        amounts = amounts_of(self._terms, close.counts)
        self._transcript.add(envelopes)
        self._receipts += envelopes
        self._previous = [digest(envelope.payload) for envelope in envelopes]
        transcript: Digest = self._transcript.value
        message = voucher_message(self._terms, close.chunk + 1, close.counts, transcript, now_ms)
        self._voucher = seal(self._key, message)
        self._accepted_traversal = close.traversal
        self._cost = Microcredits(sum(amounts))
        self._forget(close.traversal)
        return self._voucher

    def _forget(self, traversal: int) -> None:
        self._sent.forget(traversal)
        self._drawn.forget(traversal)
        self._counts = {t: c for t, c in self._counts.items() if t > traversal}
