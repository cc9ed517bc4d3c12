"""A stage's side of the accounting of one epoch: receipts out, vouchers in.

The order for each frame: ``admit`` its counts, ``received`` what came, compute, ``sent``
what went on, and ``close_chunk`` if the frame says so. A stage works at most one chunk
beyond what the client's best voucher pays for.
"""

from plait.envelope import digest, seal
from plait.errors import LocalProtocolError, Overspend, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.handoff import HandoffChain
from plait.ledger.receipt import ChunkClose, receipt_message
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import amount_for, open_voucher, voucher_counts
from plait.types import Microcredits, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher, SettlementRequest


class StageBooks:
    """The books of one stage for one epoch. ``key`` is its ledger key, ``cap`` its grant."""

    def __init__(
        self, terms: SessionTerms, stage_index: int, key: SigningKey, cap: Microcredits
    ) -> None:
        self._terms = terms
        self._stage_index = stage_index
        self._key = key
        self._cap = cap
        self._input = HandoffChain(terms, stage_index)
        self._output = HandoffChain(terms, stage_index + 1)
        self._next_position = 0
        self._receipted: list[TokenCounts] = []
        self._previous_digest = b""
        self._voucher: SignedEnvelope | None = None
        self._sequence = 0
        self._paid = TokenCounts()
        self._earned = Microcredits(0)
        self.conflict: tuple[SignedEnvelope, SignedEnvelope] | None = None
        """Two different vouchers with one sequence number, both signed by the client."""

    @property
    def voucher(self) -> SignedEnvelope | None:
        """The best voucher so far."""
        return self._voucher

    @property
    def earned(self) -> Microcredits:
        """What the best voucher promises this stage."""
        return self._earned

    @property
    def receipts_signed(self) -> int:
        """Chunks closed so far."""
        return len(self._receipted)

    def admit(self, counts: TokenCounts) -> None:
        """Decide whether to compute up to these cumulative counts.

        Raises ``Overspend`` if more than one decode chunk or one prefill chunk would be
        unpaid, or if the price would exceed the cap.
        """
        terms = self._terms
        prompt = counts.prompt - self._paid.prompt
        output = counts.output - self._paid.output
        # The frame that ends the prompt also draws the first token.
        one_chunk = prompt == 0 or output <= 1
        if prompt > terms.prefill_chunk_tokens or output > terms.chunk_tokens or not one_chunk:
            raise Overspend(f"{prompt} prompt and {output} output tokens would be unpaid")
        if counts.prompt > terms.prompt_tokens or counts.output > terms.max_tokens:
            raise Overspend("the work is beyond the session's terms")
        price = terms.price(self._stage_index, counts)
        if price > self._cap:
            raise Overspend(f"the work would cost {price} microcredits, the cap is {self._cap}")

    def received(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """Note a frame that came in; raises ``RemoteProtocolError`` unless it is the next."""
        if first_position != self._next_position:
            raise RemoteProtocolError(
                f"a frame starts at position {first_position}, not {self._next_position}"
            )
        self._input.add(traversal, first_position, rows, payload)
        self._next_position += rows

    def sent(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """Note what went out for a frame, also if it is empty.

        The last stage notes the drawn ids (``handoff.ids_payload``) with their number as
        ``rows`` and the first position of the frame.
        """
        self._output.add(traversal, first_position, rows, payload)

    def close_chunk(self, traversal: int, counts: TokenCounts, now_ms: int) -> SignedEnvelope:
        """Sign the receipt for all work up to a traversal, with its cumulative counts.

        Raises ``LocalProtocolError`` if the traversal was not both received and sent, or
        the counts fall.
        """
        before = self._receipted[-1] if self._receipted else TokenCounts()
        input_commit = self._input.commit_at(traversal)
        output_commit = self._output.commit_at(traversal)
        if input_commit is None or output_commit is None:
            raise LocalProtocolError(f"traversal {traversal} has not passed this stage")
        if counts.prompt < before.prompt or counts.output < before.output:
            raise LocalProtocolError("cumulative counts cannot fall")
        receipt = receipt_message(
            self._terms,
            self._stage_index,
            ChunkClose(len(self._receipted), traversal, counts),
            input_commit=input_commit,
            output_commit=output_commit,
            previous_digest=self._previous_digest,
            issued_ms=now_ms,
        )
        envelope = seal(self._key, receipt)
        self._previous_digest = digest(envelope.payload)
        self._receipted.append(counts)
        self._input.forget(traversal)
        self._output.forget(traversal)
        return envelope

    def accept_voucher(self, envelope: SignedEnvelope) -> None:
        """Take a voucher if it is better than the best so far; an older one changes nothing.

        Raises ``BadSignature``; ``Overspend`` if it goes beyond the cap;
        ``RemoteProtocolError`` if it is of another session, does not pay exactly for the
        chunks receipted up to its sequence number, or conflicts with an earlier one
        (both are then in ``conflict``).
        """
        voucher = open_voucher(envelope, self._terms)
        if self._voucher is not None and voucher.sequence == self._sequence:
            if envelope.payload != self._voucher.payload:
                self.conflict = (self._voucher, envelope)
                raise RemoteProtocolError("the client signed two vouchers of one number")
            return
        if voucher.sequence <= self._sequence:
            return
        earned = self._checked_amount(voucher)
        self._voucher = envelope
        self._sequence = voucher.sequence
        self._paid = voucher_counts(voucher)
        self._earned = earned

    def settlement(self, now_ms: int, release: bool) -> SignedEnvelope | None:
        """The request to be paid by the best voucher; ``None`` if there is no voucher.

        ``release`` says that this stage wants nothing more of the reservation.
        """
        if self._voucher is None:
            return None
        request = SettlementRequest(
            network_id=self._terms.network_id,
            session_id=self._terms.session_id,
            payee=self._terms.stages[self._stage_index].peer,
            voucher_digest=digest(self._voucher.payload),
            release=release,
            issued_ms=now_ms,
        )
        return seal(self._key, request)

    def _checked_amount(self, voucher: SessionVoucher) -> Microcredits:
        if voucher.sequence > len(self._receipted):
            raise RemoteProtocolError(
                f"a voucher for {voucher.sequence} chunks, but {len(self._receipted)} are receipted"
            )
        counts = voucher_counts(voucher)
        receipted = self._receipted[voucher.sequence - 1]
        if (counts.prompt, counts.output) != (receipted.prompt, receipted.output):
            raise RemoteProtocolError("the voucher does not pay for the tokens receipted")
        amount = amount_for(voucher, self._terms.stages[self._stage_index].peer)
        price = self._terms.price(self._stage_index, counts)
        if amount > self._cap:
            raise Overspend(f"the voucher pays {amount} microcredits, the cap is {self._cap}")
        if amount != price:
            raise RemoteProtocolError(f"the voucher pays {amount} microcredits, not {price}")
        return amount
