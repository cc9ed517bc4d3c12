"""A stage's side of the accounting of a session: receipts out, vouchers in.

The order for each frame: ``admit`` its counts, ``received`` what came, compute, ``sent``
what went on, and ``close_chunk`` if the frame says so. A stage works at most one chunk
beyond what the client's best voucher pays for. When an epoch fails, ``close_epoch`` signs
for the chunk that was cut; ``next_epoch`` goes on with the books of a stage that stays.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from plait.envelope import digest, open_envelope, seal
from plait.errors import LocalProtocolError, Overspend, RemoteProtocolError
from plait.identity import SigningKey
from plait.ledger.handoff import HandoffChain
from plait.ledger.progress import FrameCounts
from plait.ledger.receipt import ChunkClose, draw_statement, receipt_message
from plait.ledger.terms import SessionTerms
from plait.ledger.voucher import amount_for, open_voucher, voucher_counts
from plait.types import Digest, Microcredits, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import SessionVoucher, SettlementRequest


@dataclass(frozen=True, slots=True)
class _Signed:
    """A receipt and what it says."""

    close: ChunkClose
    envelope: SignedEnvelope


_Later = tuple[Callable[[int, int, int, bytes], None], int, int, int, bytes]
"""What to add to a chain later."""


class FrameLog(Protocol):
    """Keeps what is committed to, so that it can be opened later."""

    def received(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep a frame that came; ``hashed`` is its payload's SHA-256."""

    def sent(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep what went out for a frame."""

    def drew_from(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep what the last stage drew ``rows`` ids from."""


class StageBooks:
    """The books of one stage for one epoch. ``key`` is its ledger key, ``cap`` its grant.

    Without a cap, the stage entered by a reroute and has seen only the client's
    reservation: until ``grant`` it takes one chunk of new work.
    """

    def __init__(
        self,
        terms: SessionTerms,
        stage_index: int,
        key: SigningKey,
        cap: Microcredits | None,
        frames: FrameLog | None = None,
    ) -> None:
        self._terms = terms
        self._frames = frames
        self._stage_index = stage_index
        self._key = key
        self._cap = cap
        self._input = HandoffChain(terms, stage_index)
        self._output = HandoffChain(terms, stage_index + 1)
        is_last = stage_index == len(terms.stages) - 1
        self._state = HandoffChain(terms, stage_index + 2) if is_last else None
        self._fed: dict[int, tuple[int, int, int]] = {}
        """Traversal to first position, end, and rejected drafts before it; not yet paid for."""
        self._replayed = 0
        self._next = terms.resume_position
        self._rejected = terms.start.rejected_draft
        self._cached = terms.start.cached_prompt
        self._unpaid: list[_Signed] = []
        """Receipts without a voucher, oldest first."""
        self._paid_close: ChunkClose | None = None
        self._paid_digest = b""
        self._cut: tuple[int, int, SignedEnvelope | None] | None = None
        self._voucher: SignedEnvelope | None = None
        self._sequence = 0
        self._earned = Microcredits(0)
        self._later: list[_Later] = []
        self._affordable: TokenCounts | None = None
        """Counts whose price is known to be within the limit."""
        self._before: StageBooks | None = None
        self._conflict: tuple[SignedEnvelope, SignedEnvelope] | None = None

    @property
    def voucher(self) -> SignedEnvelope | None:
        """The best voucher so far, of this epoch or an earlier one."""
        if self._voucher is None and self._before is not None:
            return self._before.voucher
        return self._voucher

    @property
    def conflict(self) -> tuple[SignedEnvelope, SignedEnvelope] | None:
        """Two different vouchers with one number of one epoch, both signed by the client."""
        if self._conflict is None and self._before is not None:
            return self._before.conflict
        return self._conflict

    @property
    def earned(self) -> Microcredits:
        """What the best voucher promises this stage, in the whole session."""
        if self._voucher is not None:
            return self._earned
        if self._before is not None:
            return self._before.earned
        return self._terms.stages[self._stage_index].carried

    @property
    def granted(self) -> bool:
        """Whether the ledger's grant was shown."""
        return self._cap is not None

    @property
    def receipts_signed(self) -> int:
        """Chunks closed so far in this epoch."""
        return self._sequence + len(self._unpaid)

    def grant(self, cap: Microcredits) -> None:
        """The ledger granted the reservation that the stage started on."""
        if self._cap is None:
            self._cap = cap
            self._affordable = None

    def admit(self, frame: FrameCounts) -> None:
        """Decide whether to compute a frame.

        Raises ``Overspend`` if more than one decode chunk or one prefill chunk would be
        unpaid, or not covered by a grant, or if the price would exceed the cap.
        """
        terms, worst = self._terms, frame.worst
        self._check_window(worst, self._paid_counts, "unpaid")
        if self._cap is None:
            self._check_window(worst, terms.stages[self._stage_index].base, "without a grant")
        prompt = worst.prompt + worst.cached_prompt
        if prompt > terms.prompt_tokens or worst.output > terms.max_tokens:
            raise Overspend("the work is beyond the session's terms")
        if not _within(worst, self._affordable):
            self._check_price(worst)

    def received(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """Note a frame that came in.

        Raises ``RemoteProtocolError`` if traversals do not rise, or the session goes on at a
        stage that is to be rebuilt before all was replayed to it: each of its receipts will
        say that it was.
        """
        replay = self._is_replay(traversal)
        due = self._terms.resume_position if self._terms.stages[self._stage_index].rebuilt else 0
        if not replay and self._replayed != due:
            raise RemoteProtocolError(f"{self._replayed} positions were replayed, not {due}")
        hashed = Digest(hashlib.sha256(payload).digest())
        self._input.add_digest(traversal, first_position, rows, hashed)
        if self._frames is not None:
            self._frames.received(traversal, first_position, rows, payload, hashed)
        if replay:
            self._replayed += rows
            return
        if self._terms.epoch == 1 and not self._fed and self._paid_close is None:
            self._next = self._cached = first_position
        self._rejected += max(self._next - first_position, 0)
        self._next = first_position + rows
        self._fed[traversal] = (first_position, self._next, self._rejected)

    def sent(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """Note what went out for a frame, also if it is empty.

        The last stage notes the drawn ids (``handoff.ids_payload``) with their number as
        ``rows`` and the first position of the frame, and with ``drew_from`` what it drew them
        from.
        """
        self.catch_up()
        self._add_sent(traversal, first_position, rows, payload)

    def sent_later(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """The same, of a frame that closes no chunk: hashed with ``catch_up``, or when needed."""
        self._later.append((self._add_sent, traversal, first_position, rows, payload))

    def drew_from(self, traversal: int, first_position: int, rows: int, state: bytes) -> None:
        """Note what the last stage drew a frame's ids from.

        Raises ``LocalProtocolError`` at another stage.
        """
        self.catch_up()
        self._add_state(traversal, first_position, rows, state)

    def drew_from_later(self, traversal: int, first_position: int, rows: int, state: bytes) -> None:
        """The same, of a frame that closes no chunk: hashed with ``catch_up``, or when needed."""
        self._later.append((self._add_state, traversal, first_position, rows, state))

    def catch_up(self) -> None:
        """Hash and keep what was noted for later; raises what the notes would have raised."""
        later, self._later = self._later, []
        for add, traversal, first_position, rows, data in later:
            add(traversal, first_position, rows, data)

    def _add_sent(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        hashed = Digest(hashlib.sha256(payload).digest())
        self._output.add_digest(traversal, first_position, rows, hashed)
        if self._frames is not None:
            self._frames.sent(traversal, first_position, rows, payload, hashed)

    def _add_state(self, traversal: int, first_position: int, rows: int, state: bytes) -> None:
        if self._state is None:
            raise LocalProtocolError("only a last stage draws")
        hashed = Digest(hashlib.sha256(state).digest())
        self._state.add_digest(traversal, first_position, rows, hashed)
        if self._frames is not None:
            self._frames.drew_from(traversal, first_position, rows, state, hashed)

    def draw_statement(self, traversal: int) -> SignedEnvelope:
        """Sign all ids drawn up to a traversal, for the last stage.

        Raises ``LocalProtocolError`` if the draws of the traversal were not noted.
        """
        self.catch_up()
        commit = self._output.commit_at(traversal)
        if commit is None:
            raise LocalProtocolError(f"nothing was drawn in traversal {traversal}")
        return seal(self._key, draw_statement(self._terms, traversal, commit))

    def close_chunk(self, traversal: int, counts: TokenCounts, now_ms: int) -> SignedEnvelope:
        """Sign the receipt for all work up to a traversal, with the session's counts.

        Raises ``LocalProtocolError`` if the traversal was not both received and sent, or
        the counts fall.
        """
        self.catch_up()
        last = self._unpaid[-1].close.counts if self._unpaid else self._paid_counts
        if counts.prompt < last.prompt or counts.output < last.output:
            raise LocalProtocolError("cumulative counts cannot fall")
        signed = self._sign(self.receipts_signed, self._last_digest, traversal, counts, now_ms)
        self._unpaid.append(signed)
        return signed.envelope

    def close_epoch(
        self, traversal: int | None, position: int, now_ms: int
    ) -> SignedEnvelope | None:
        """Sign for the chunk that is cut after a traversal; None if nothing of it is open.

        ``position`` would have been the next to feed. The first answer is final: the same
        question again gets it again. A chunk that was closed beyond the traversal, but never
        paid, is signed for anew up to it. Raises ``RemoteProtocolError`` for a traversal
        that has not passed this stage, or a position that does not fit it.
        """
        self.catch_up()
        if self._cut is not None:
            if self._cut[:2] != (traversal, position) and traversal is not None:
                raise RemoteProtocolError("the epoch was closed at another place")
            return self._cut[2]
        receipt: SignedEnvelope | None = None
        paid = self._paid_close.traversal if self._paid_close is not None else -1
        if traversal is not None and traversal > paid:
            receipt = self._close_cut(traversal, position, now_ms)
        if traversal is not None:
            self._cut = traversal, position, receipt
        # Its client accepted nothing beyond, and so signed for nothing beyond: no hold need wait.
        last = -1 if traversal is None else traversal
        self._unpaid = [one for one in self._unpaid if one.close.traversal <= last]
        return receipt

    def next_epoch(
        self, terms: SessionTerms, stage_index: int, frames: FrameLog | None = None
    ) -> "StageBooks":
        """The books of the epoch that follows, for a stage that stays.

        Raises ``RemoteProtocolError`` if the terms are not those of the same stint.
        """
        old, new = self._terms.stages[self._stage_index], terms.stages[stage_index]
        same = (
            (old.peer, old.span, old.prices, old.priced_layers, old.numeric_class)
            == (new.peer, new.span, new.prices, new.priced_layers, new.numeric_class)
        ) and (
            (old.entered_epoch, old.base, old.carried, old.replayed)
            == (new.entered_epoch, new.base, new.carried, new.replayed)
        )
        if not same or terms.epoch <= self._terms.epoch:
            raise RemoteProtocolError("the terms of a stage that stays cannot change")
        books = StageBooks(terms, stage_index, self._key, self._cap, frames)
        books._before = self
        return books

    def accept_voucher(self, envelope: SignedEnvelope) -> None:
        """Take a voucher if it is better than the best so far; an older one changes nothing.

        It may be of an earlier epoch. Raises ``BadSignature``; ``Overspend`` if it goes
        beyond the cap; ``RemoteProtocolError`` if it is of another session, does not pay
        exactly for the chunks receipted up to its sequence number, or conflicts with an
        earlier one (both are then in ``conflict``).
        """
        key = self._terms.client_ledger_key
        epoch = open_envelope(envelope, SessionVoucher, signer=key).epoch
        if epoch < self._terms.epoch:
            if self._before is not None:
                self._before.accept_voucher(envelope)
            # One from before this stage entered pays for nothing that it did since.
            return
        voucher = open_voucher(envelope, self._terms)
        if self._voucher is not None and voucher.sequence == self._sequence:
            if envelope.payload != self._voucher.payload:
                self._conflict = (self._voucher, envelope)
                raise RemoteProtocolError("the client signed two vouchers of one number")
            return
        if voucher.sequence <= self._sequence:
            return
        earned = self._checked_amount(voucher)
        self._take(envelope, voucher.sequence, earned)

    def settlement(self, now_ms: int, release: bool) -> SignedEnvelope | None:
        """The request to be paid by the best voucher, or without one to be paid nothing;
        ``None`` if it would say nothing.

        ``release`` says that this stage wants nothing more of what is reserved for it so far.
        While a receipt waits for its voucher it does not say so: its client may have signed
        one that never came, and promise it again when this stage enters once more.
        """
        voucher, done = self.voucher, release and not self._owed
        if voucher is None and not done:
            return None
        request = SettlementRequest(
            network_id=self._terms.network_id,
            session_id=self._terms.session_id,
            payee=self._terms.stages[self._stage_index].peer,
            voucher_digest=digest(voucher.payload) if voucher is not None else b"",
            release=done,
            issued_ms=now_ms,
            epoch=self._terms.epoch,
        )
        return seal(self._key, request)

    # Inside --------------------------------------------------------------------------

    @property
    def _owed(self) -> bool:
        """Whether a receipt has no voucher; one of a later epoch pays for all before it."""
        if self._voucher is None and self._before is not None and self._before._owed:
            return True
        return bool(self._unpaid)

    @property
    def _paid_counts(self) -> TokenCounts:
        """The session's counts that are paid for, or were not this stage's work."""
        if self._paid_close is not None:
            return self._paid_close.counts
        if self._before is not None:
            return self._before._paid_counts
        return self._terms.stages[self._stage_index].base

    @property
    def _last_digest(self) -> bytes:
        if self._unpaid:
            return digest(self._unpaid[-1].envelope.payload)
        return self._paid_digest

    @property
    def _limit(self) -> int:
        """What the peer may be promised in the session."""
        stage = self._terms.stages[self._stage_index]
        if self._cap is None:
            return self._terms.price_max(self._stage_index)
        return stage.carried + self._cap

    def _is_replay(self, traversal: int) -> bool:
        # Live frames of an epoch are numbered from its resume position on.
        return self._terms.epoch > 1 and traversal < self._terms.resume_position

    def _check_price(self, worst: TokenCounts) -> None:
        terms, index = self._terms, self._stage_index
        price = terms.price(index, worst)
        if price > self._limit:
            raise Overspend(f"the work would cost {price} microcredits, the cap is {self._limit}")
        # More tokens never cost less: look one chunk ahead, so that not every frame is priced.
        ahead = replace(worst, output=worst.output + terms.chunk_tokens)
        with suppress(Overspend):
            if terms.price(index, ahead) <= self._limit:
                self._affordable = ahead

    def _check_window(self, worst: TokenCounts, since: TokenCounts, what: str) -> None:
        terms = self._terms
        prompt = worst.prompt - since.prompt
        output = worst.output - since.output
        # The frame that ends the prompt also draws the first token.
        one_chunk = prompt == 0 or output <= 1
        if prompt > terms.prefill_chunk_tokens or output > terms.chunk_tokens or not one_chunk:
            raise Overspend(f"{prompt} prompt and {output} output tokens would be {what}")

    def _close_cut(self, traversal: int, position: int, now_ms: int) -> SignedEnvelope:
        same = [one for one in self._unpaid if one.close.traversal == traversal]
        if same:
            return same[0].envelope
        fed = self._fed.get(traversal)
        if fed is None:
            raise RemoteProtocolError(f"traversal {traversal} has not passed this stage")
        first_position, end, rejected = fed
        terms = self._terms
        if first_position < terms.prompt_tokens:
            fits = position == end
        else:
            fits = first_position + min(end - first_position, 1) <= position <= end
        if not fits:
            raise RemoteProtocolError(f"traversal {traversal} does not end at {position}")
        if first_position >= terms.prompt_tokens:
            rejected += end - position
        counts = terms.counts_at(position, self._cached, rejected)
        signed = self._sign(self._sequence, self._paid_digest, traversal, counts, now_ms)
        self._unpaid = [signed]
        return signed.envelope

    def _sign(
        self, chunk: int, previous: bytes, traversal: int, counts: TokenCounts, now_ms: int
    ) -> _Signed:
        input_commit = self._input.commit_at(traversal)
        output_commit = self._output.commit_at(traversal)
        if input_commit is None or output_commit is None:
            raise LocalProtocolError(f"traversal {traversal} has not passed this stage")
        state_commit = self._state.commit_at(traversal) if self._state is not None else b""
        if state_commit is None:
            raise LocalProtocolError("a last stage commits to what it draws from")
        close = ChunkClose(chunk, traversal, counts)
        receipt = receipt_message(
            self._terms,
            self._stage_index,
            close,
            input_commit=input_commit,
            output_commit=output_commit,
            previous_digest=previous,
            issued_ms=now_ms,
            state_commit=state_commit,
        )
        return _Signed(close, seal(self._key, receipt))

    def _take(self, envelope: SignedEnvelope, sequence: int, earned: Microcredits) -> None:
        """A voucher pays for the receipts up to its number: forget what led to them."""
        paid = sequence - self._sequence
        if paid <= len(self._unpaid):
            last = self._unpaid[paid - 1]
            self._unpaid = self._unpaid[paid:]
            self._paid_close = last.close
            self._paid_digest = digest(last.envelope.payload)
            traversal = last.close.traversal
            self._input.forget(traversal)
            self._output.forget(traversal)
            if self._state is not None:
                self._state.forget(traversal)
            self._fed = {t: fed for t, fed in self._fed.items() if t > traversal}
        self._voucher, self._sequence, self._earned = envelope, sequence, earned

    def _checked_amount(self, voucher: SessionVoucher) -> Microcredits:
        amount = amount_for(voucher, self._terms.stages[self._stage_index].peer)
        if amount > self._limit:
            raise Overspend(f"the voucher pays {amount} microcredits, the cap is {self._limit}")
        if voucher.epoch_close and amount == self.earned:
            return amount  # the others are paid for the cut; our receipt came too late, or never
        index = voucher.sequence - self._sequence - 1
        if index >= len(self._unpaid):
            raise RemoteProtocolError(
                f"a voucher for {voucher.sequence} chunks, but {self.receipts_signed} are receipted"
            )
        counts = self._unpaid[index].close.counts
        if voucher_counts(voucher) != counts:
            raise RemoteProtocolError("the voucher does not pay for the tokens receipted")
        price = self._terms.price(self._stage_index, counts)
        if amount != price:
            raise RemoteProtocolError(f"the voucher pays {amount} microcredits, not {price}")
        return amount


def _within(counts: TokenCounts, most: TokenCounts | None) -> bool:
    """Whether no count is above another's; ``replayed`` is the stage's, not the session's."""
    return (
        most is not None
        and counts.output <= most.output
        and counts.prompt <= most.prompt
        and counts.cached_prompt <= most.cached_prompt
        and counts.rejected_draft <= most.rejected_draft
    )
