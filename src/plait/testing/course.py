"""A whole session in memory that loses stages on its way: several epochs, real books.

Like ``accounting.PaperSession``, but played by the real driver, through any schedule of
cuts and with drafts. It computes no model: what the last stage draws is in the plot.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from plait.client.driver import Accounting, Driver, Finish, SendFrame
from plait.envelope import digest, open_envelope, seal
from plait.ledger.bundle import BundleParts, EpochParts, Frame
from plait.ledger.client_books import ClientBooks
from plait.ledger.handoff import ids_payload
from plait.ledger.journal import Command, Reserve, Settle
from plait.ledger.opening import route_digest
from plait.ledger.progress import Progress
from plait.ledger.reserve import check_grant, check_supplement, make_reservation
from plait.ledger.stage_books import StageBooks
from plait.ledger.terms import SessionTerms, StageTerms
from plait.testing.accounting import (
    END_ID,
    HOUR_MS,
    NETWORK_ID,
    NOW_MS,
    NUMERIC_CLASS,
    Evidence,
    Plot,
    cert_of,
    evidence_of,
    grant_of,
    key_of,
    offer_by,
    opening_of,
    paper_network,
    terms_of,
)
from plait.types import TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation, SessionVoucher, SettlementRequest


@dataclass(frozen=True, slots=True)
class Cut:
    """The epoch ends after so many answered frames, and these stages are gone.

    ``beyond`` lets the others compute one more frame whose result is lost.
    """

    after: int
    lost: frozenset[int]
    beyond: bool = False


@dataclass(slots=True)
class PaperEpoch:
    """One pipeline of the course; stages are known by name."""

    terms: SessionTerms
    names: tuple[str, ...]
    reservation: SignedEnvelope | None
    grant: SignedEnvelope | None
    books: list[StageBooks]
    progress: Progress
    client: ClientBooks
    frames: list[Frame] = field(default_factory=list)


class Script:
    """Drafts the true continuation, with every ``wrong_every``-th id spoilt."""

    def __init__(self, truth: Sequence[int], wrong_every: int) -> None:
        self._truth = [5 if i % wrong_every == 0 else id for i, id in enumerate(truth, 1)]
        self._learnt = 0

    def extend(self, ids: Sequence[int]) -> None:
        """Learn what was drawn."""
        self._learnt += len(ids)

    def propose(self, most: int) -> tuple[int, ...]:
        """What may follow."""
        return tuple(self._truth[self._learnt : self._learnt + min(most, 3)])

    def observe(self, proposed: int, accepted: int, elapsed_ms: float | None) -> None:
        """Nothing is adapted."""


class PaperCourse:
    """A session played to its end; ``wrong_every`` 0 is without drafts."""

    def __init__(self, plot: Plot, cuts: Sequence[Cut] = (), wrong_every: int = 0) -> None:
        self.plot = plot
        self.cuts = list(cuts)
        self.epochs: list[PaperEpoch] = []
        self.promised: dict[str, int] = {}
        self._drafter = Script(plot.drawn_ids, wrong_every) if wrong_every else None
        self.driver = Driver(
            plot.prompt_ids,
            plot.max_tokens,
            frozenset({END_ID}),
            Accounting(plot.chunk_tokens, plot.prefill_chunk_tokens),
            50_000,
            self._drafter,
        )
        self._stage_books: dict[str, StageBooks] = {}

    @property
    def epoch(self) -> PaperEpoch:
        """The newest."""
        return self.epochs[-1]

    def play(self) -> "PaperCourse":
        """Generate to the end; without a stage to take a place, every stage is replaced."""
        names = tuple(f"stage {index}" for index in range(len(self.plot.spans)))
        self._begin(terms_of(self.plot), names)
        actions, answered = self.driver.start(), 0
        while not any(isinstance(action, Finish) for action in actions):
            frames = [action for action in actions if isinstance(action, SendFrame)]
            if self.cuts and answered >= self.cuts[0].after:
                if not self._cut(self.cuts.pop(0), frames):
                    break
                answered = 0
                actions = self.driver.resume(replay=self.epoch.terms.stages[0].rebuilt)
                continue
            for frame in frames:
                ids = self._traverse(frame)
                if not frame.replay:
                    actions = self.driver.on_result(frame.traversal, ids, [0.0] * len(ids))
            answered += 1
        return self

    def bundle_parts(self) -> BundleParts:
        """The evidence, settled and logged."""
        evidence = self.settle()
        drawn = tuple(self.driver.drawn)
        return BundleParts(
            network_id=NETWORK_ID,
            client_cert=cert_of("client"),
            manifest=self.plot.manifest,
            prompt_ids=self.plot.prompt_ids,
            token_ids=drawn,
            text="Hi “there” \u0007\n",
            finish_reason=self.driver.finish or "ended",
            epochs=tuple(_parts(epoch) for epoch in self.epochs),
            entries=evidence.entries,
            proofs=evidence.proofs,
            checkpoint=evidence.checkpoint,
            sealed_ms=NOW_MS + 60_000,
        )

    def settle(self) -> Evidence:
        """Book the session in a fresh ledger: every stage presents its best voucher."""
        commands: list[Command] = []
        for epoch in self.epochs:
            if epoch.reservation is not None:
                reservation = open_envelope(epoch.reservation, BudgetReservation)
                commands.append(Reserve(reservation, digest(epoch.reservation.payload)))
        for books in self._stage_books.values():
            request, voucher = books.settlement(NOW_MS + 40_000, True), books.voucher
            if request is not None and voucher is not None:
                commands.append(
                    Settle(
                        voucher=open_envelope(voucher, SessionVoucher),
                        voucher_digest=digest(voucher.payload),
                        request=open_envelope(request, SettlementRequest),
                        request_digest=digest(request.payload),
                    )
                )
        return evidence_of(commands, self.epochs[0].terms.session_id)

    # Epochs --------------------------------------------------------------------------

    def _begin(self, terms: SessionTerms, names: tuple[str, ...]) -> None:
        number = len(self.epochs) + 1
        reservation = grant = None
        if any(map(terms.entered, range(len(names)))):
            reservation = make_reservation(
                key_of("client ledger"), terms, 0, number, NOW_MS, HOUR_MS, route_digest(terms)
            )
            grant = grant_of(reservation)
        books = []
        for index, name in enumerate(names):
            if terms.entered(index):
                assert reservation is not None and grant is not None
                self._stage_books[name] = _entering(terms, index, name, reservation, grant)
            else:
                self._stage_books[name] = self._stage_books[name].next_epoch(terms, index)
            books.append(self._stage_books[name])
        client = (
            self.epoch.client.next_epoch(terms)
            if self.epochs
            else ClientBooks(terms, key_of("client ledger"))
        )
        self.epochs.append(
            PaperEpoch(terms, names, reservation, grant, books, Progress(terms), client)
        )
        self._pay(client.voucher)

    def _cut(self, cut: Cut, frames: Sequence[SendFrame]) -> bool:
        """Close the epoch and open the next; False when the answer is complete anyhow."""
        epoch, driver = self.epoch, self.driver
        if cut.beyond:
            for frame in frames:
                self._compute(frame, skip=cut.lost)
        receipts = [
            None
            if index in cut.lost
            else books.close_epoch(driver.answered, driver.position, NOW_MS)
            for index, books in enumerate(epoch.books)
        ]
        voucher = epoch.client.close_epoch(receipts, driver.answered, driver.position, NOW_MS)
        if driver.finish is not None:
            if voucher is not None:
                for index, books in enumerate(epoch.books):
                    if index not in cut.lost:
                        books.accept_voucher(voucher)
            return False
        number = len(self.epochs) + 1
        names = tuple(
            f"stage {index} of epoch {number}" if index in cut.lost else name
            for index, name in enumerate(epoch.names)
        )
        start = epoch.client.counts if driver.answered is not None else epoch.terms.start
        stages = tuple(
            self._entering_terms(index, name, number, driver.position, start)
            if index in cut.lost
            else replace(stage, rebuilt=False)
            for index, (name, stage) in enumerate(zip(names, epoch.terms.stages, strict=True))
        )
        self._begin(
            replace(
                epoch.terms,
                epoch=number,
                stages=stages,
                handoff_salt=hashlib.sha256(b"salt %d" % number).digest(),
                resume_position=driver.position,
                start=start,
            ),
            names,
        )
        return True

    def _entering_terms(
        self, index: int, name: str, number: int, position: int, start: TokenCounts
    ) -> StageTerms:
        span = self.plot.spans[index]
        return StageTerms(
            peer=key_of(name).peer_id,
            ledger_key=key_of(f"{name} ledger").public,
            span=span,
            priced_layers=self.plot.shape.priced_layers(span),
            prices=self.plot.prices,
            numeric_class=NUMERIC_CLASS,
            offer_digest=digest(offer_by(name, span, self.plot).payload),
            entered_epoch=number,
            base=start,
            replayed=position,
            rebuilt=True,
        )

    # Frames --------------------------------------------------------------------------

    def _traverse(self, frame: SendFrame) -> tuple[int, ...]:
        epoch = self.epoch
        epoch.client.sent(
            frame.traversal,
            frame.first_position,
            frame.ids,
            drafts=frame.drafts,
            replay=frame.replay,
        )
        ids, receipts = self._compute(frame)
        if frame.replay:
            epoch.frames.append(_frame(frame))
            return ()
        statement = epoch.books[-1].draw_statement(frame.traversal)
        epoch.client.drawn(frame.traversal, frame.first_position, ids, statement)
        epoch.frames.append(_frame(frame))
        if frame.close_chunk:
            self._pay(epoch.client.accept_receipts(receipts, frame.traversal, NOW_MS))
        return ids

    def _compute(
        self, frame: SendFrame, skip: frozenset[int] = frozenset()
    ) -> tuple[tuple[int, ...], list[SignedEnvelope]]:
        """Let every stage work on a frame, up to the first that is gone."""
        epoch = self.epoch
        if frame.replay or (epoch.terms.epoch > 1 and not epoch.frames):
            self._replay(frame)
        if frame.replay:
            return (), []
        taken = epoch.progress.take(
            frame.first_position,
            frame.rows,
            drafts=frame.drafts,
            sample=frame.sample,
            close_chunk=frame.close_chunk,
        )
        ids = self._draws(frame)
        payload, receipts = ids_payload(frame.ids), []
        for index, books in enumerate(epoch.books):
            if index in skip:
                break
            books.admit(taken)
            books.received(frame.traversal, frame.first_position, frame.rows, payload)
            last = index == len(epoch.books) - 1
            payload = ids_payload(ids) if last else _activations(index, frame)
            rows = len(ids) if last else frame.rows
            books.sent(frame.traversal, frame.first_position, rows, payload)
            if frame.close_chunk:
                receipts.append(books.close_chunk(frame.traversal, taken.counts, NOW_MS))
        return ids, receipts

    def _replay(self, frame: SendFrame) -> None:
        """Feed the rebuilt stages; stage 0 by the driver's own replay frames."""
        epoch = self.epoch
        terms = epoch.terms
        if frame.replay:
            epoch.progress.take(
                frame.first_position, frame.rows, sample=False, close_chunk=False, replay=True
            )
            epoch.books[0].received(0, frame.first_position, frame.rows, ids_payload(frame.ids))
        for index, stage in enumerate(terms.stages):
            if index == 0 or not stage.rebuilt or terms.resume_position == 0:
                continue
            if frame.replay != terms.stages[0].rebuilt:
                continue
            payload = _activations(index - 1, frame)
            epoch.books[index - 1].sent(0, 0, terms.resume_position, payload)
            epoch.books[index].received(0, 0, terms.resume_position, payload)

    def _draws(self, frame: SendFrame) -> tuple[int, ...]:
        if not frame.sample:
            return ()
        truth, first = self.plot.drawn_ids, len(self.driver.drawn)
        ids = [truth[first]]
        for draft in frame.draft_ids:
            if draft != ids[-1] or draft == END_ID:
                break
            ids.append(truth[first + len(ids)])
        return tuple(ids)

    def _pay(self, voucher: SignedEnvelope | None) -> None:
        if voucher is not None:
            for index, books in enumerate(self.epoch.books):
                if not self.epoch.terms.entered(index) or self.epoch.frames:
                    books.accept_voucher(voucher)


def _entering(
    terms: SessionTerms,
    index: int,
    name: str,
    reservation: SignedEnvelope,
    grant: SignedEnvelope,
) -> StageBooks:
    """The books of a new stage: in a reroute it starts before it sees the grant."""
    key, authority = key_of(f"{name} ledger"), paper_network().authorities[0]
    if terms.epoch == 1:
        cap = check_grant(grant, reservation, authority, terms, index, NOW_MS)
        return StageBooks(terms, index, key, cap)
    books = StageBooks(terms, index, key, None)
    books.grant(check_supplement(reservation, terms, index, NOW_MS))
    return books


def _parts(epoch: PaperEpoch) -> EpochParts:
    evidence = epoch.client.evidence()
    names, plot_spans = epoch.names, [stage.span for stage in epoch.terms.stages]
    return EpochParts(
        terms=epoch.terms,
        session_open=opening_of(epoch.terms),
        stage_certs=tuple(cert_of(name) for name in names),
        offers=tuple(
            offer_by(name, span, None, stage.prices, epoch.terms.model_digest)
            for name, span, stage in zip(names, plot_spans, epoch.terms.stages, strict=True)
        ),
        frames=tuple(epoch.frames),
        reservation=epoch.reservation,
        grant=epoch.grant,
        receipts=evidence.receipts,
        cut=evidence.cut,
        voucher=evidence.voucher,
    )


def _frame(frame: SendFrame) -> Frame:
    return (
        frame.traversal,
        frame.first_position,
        frame.rows,
        frame.draft_ids,
        frame.sample,
        frame.close_chunk,
        frame.replay,
    )


def _activations(index: int, frame: SendFrame) -> bytes:
    return hashlib.sha256(b"%d %d" % (index, frame.traversal)).digest() * max(frame.rows, 1)


__all__ = ["Cut", "PaperCourse", "PaperEpoch", "seal"]
