"""A whole session in memory that loses stages on its way: several epochs, real books.

Like ``accounting.PaperSession``, but played by the real driver, through any schedule of
cuts and with drafts. It computes no model: what the last stage draws is in the plot.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from plait.client.driver import Accounting, Action, Driver, Finish, SendFrame
from plait.compute.drafts import Took
from plait.envelope import digest, open_envelope
from plait.ledger.bundle import BundleParts, EpochParts, Frame
from plait.ledger.client_books import ClientBooks
from plait.ledger.handoff import ids_payload
from plait.ledger.journal import Command, Reserve
from plait.ledger.opening import route_digest
from plait.ledger.progress import FrameCounts, Progress
from plait.ledger.reserve import check_grant, check_supplement, make_reservation
from plait.ledger.stage_books import StageBooks
from plait.ledger.terms import SessionTerms, StageTerms
from plait.testing.accounting import (
    END_ID,
    HOUR_MS,
    NETWORK_ID,
    NOW_MS,
    Evidence,
    Plot,
    cert_of,
    evidence_of,
    grant_of,
    key_of,
    offer_by,
    opening_of,
    paper_network,
    settlement_of,
    terms_of,
)
from plait.types import Microcredits
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.ledger_pb2 import BudgetReservation

DRAFTS = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """The epoch ends after so many answered frames, and these stages are gone.

    ``beyond`` lets the others compute the next frame too, whose result is lost.
    ``forgot`` are stages that stay, but are rebuilt; ``back`` says that the lost enter
    again under their own names; ``skipped`` epochs are opened and never confirmed.
    ``silent`` are stages that stay, though they sign nothing for the cut: no honest one.
    """

    after: int
    lost: frozenset[int] = frozenset()
    beyond: bool = False
    forgot: frozenset[int] = frozenset()
    back: bool = False
    skipped: int = 0
    silent: frozenset[int] = frozenset()


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


@dataclass(slots=True)
class Stint:
    """A stage's service from the epoch in which it entered, with its newest books."""

    name: str
    entered: int
    books: StageBooks


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
        return tuple(self._truth[self._learnt : self._learnt + min(most, DRAFTS)])

    def late(self) -> tuple[int, ...]:
        """Nothing is waited for."""
        return ()

    def observe(self, proposed: int, accepted: int, took: Took | None) -> None:
        """Nothing is adapted."""


class PaperCourse:
    """A session played to its end; ``wrong_every`` 0 is without drafts.

    ``cached`` prompt positions are in every stage's cache from the start; ``ungranted``
    withholds every grant but the first, so that new stages work on bounded credit.
    """

    def __init__(
        self,
        plot: Plot,
        cuts: Sequence[Cut] = (),
        wrong_every: int = 0,
        *,
        cached: int = 0,
        ungranted: bool = False,
    ) -> None:
        self.plot = plot
        self.epochs: list[PaperEpoch] = []
        self.stints: list[Stint] = []
        self.driver = Driver(
            plot.prompt_ids,
            plot.max_tokens,
            frozenset({END_ID}),
            Accounting(plot.chunk_tokens, plot.prefill_chunk_tokens),
            50_000,
            Script(plot.drawn_ids, wrong_every) if wrong_every else None,
        )
        self._cuts = list(cuts)
        self._cached = cached
        self._ungranted = ungranted

    @property
    def epoch(self) -> PaperEpoch:
        """The newest."""
        return self.epochs[-1]

    def play(self) -> "PaperCourse":
        """Generate to the end, through every cut."""
        names = tuple(f"stage {index}" for index in range(len(self.plot.spans)))
        self._begin(terms_of(self.plot), names)
        actions, answered = self.driver.start(self._cached), 0
        while not any(isinstance(action, Finish) for action in actions):
            frames = [action for action in actions if isinstance(action, SendFrame)]
            if self._cuts and answered >= self._cuts[0].after:
                if not self._cut(self._cuts.pop(0), frames):
                    break
                actions, answered = self._resume(), 0
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
        return BundleParts(
            network_id=NETWORK_ID,
            client_cert=cert_of("client"),
            manifest=self.plot.manifest,
            prompt_ids=self.plot.prompt_ids,
            token_ids=tuple(self.driver.drawn),
            text="Hi “there” \u0007\n",
            finish_reason=self.driver.finish or "ended",
            epochs=tuple(self._parts(epoch) for epoch in self.epochs),
            entries=evidence.entries,
            proofs=evidence.proofs,
            checkpoint=evidence.checkpoint,
            sealed_ms=NOW_MS + 60_000,
        )

    def settle(self) -> Evidence:
        """Book the session in a fresh ledger: every stage presents its best voucher.

        A stage that was lost and came back has settled what it did before it was lost.
        """
        commands: list[Command] = []
        due = list(self.stints)
        for epoch in self.epochs:
            for stint in list(due):
                if stint.entered < epoch.terms.epoch and stint.name in _entering_names(epoch):
                    due.remove(stint)
                    commands += _settlement(stint)
            if epoch.reservation is not None:
                reservation = open_envelope(epoch.reservation, BudgetReservation)
                commands.append(Reserve(reservation, digest(epoch.reservation.payload)))
        for stint in due:
            commands += _settlement(stint)
        return evidence_of(commands, self.epochs[0].terms.session_id)

    # Epochs --------------------------------------------------------------------------

    def _begin(self, terms: SessionTerms, names: tuple[str, ...]) -> None:
        reservation = grant = None
        if any(map(terms.entered, range(len(names)))):
            number = sum(epoch.reservation is not None for epoch in self.epochs) + 1
            reservation = make_reservation(
                key_of("client ledger"), terms, 0, number, NOW_MS, HOUR_MS, route_digest(terms)
            )
            grant = grant_of(reservation)
        books = []
        for index, name in enumerate(names):
            if terms.entered(index):
                assert reservation is not None and grant is not None
                books.append(self._entering(terms, index, name, reservation, grant))
                self.stints.append(Stint(name, terms.epoch, books[-1]))
            else:
                stint = next(one for one in self.stints if one.books is self.epoch.books[index])
                stint.books = stint.books.next_epoch(terms, index)
                books.append(stint.books)
        client = (
            self.epoch.client.next_epoch(terms)
            if self.epochs
            else ClientBooks(terms, key_of("client ledger"))
        )
        progress = Progress(terms, self._cached)
        self.epochs.append(PaperEpoch(terms, names, reservation, grant, books, progress, client))
        self._pay(client.voucher)

    def _entering(
        self,
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
        cap = check_supplement(reservation, terms, index, NOW_MS)
        books = StageBooks(terms, index, key, None)
        if not self._ungranted:
            books.grant(cap)
        return books

    def _resume(self) -> list[Action]:
        """Go on in the new epoch: stages that retained it replay at once, the client after."""
        terms = self.epoch.terms
        position = terms.resume_position
        for index, stage in enumerate(terms.stages):
            if position and index and stage.rebuilt and not terms.stages[index - 1].rebuilt:
                rows = SendFrame(0, 0, (0,) * position, False, False, replay=True)
                self._replay(index, rows, _activations(index - 1, rows))
        return self.driver.resume(replay=terms.stages[0].rebuilt)

    def _cut(self, cut: Cut, frames: Sequence[SendFrame]) -> bool:
        """Close the epoch and open the next; False when the answer is complete anyhow."""
        epoch, driver = self.epoch, self.driver
        if cut.beyond:
            for frame in frames:
                self._send(frame)
                self._compute(frame, skip=cut.lost)
        receipts = [
            None
            if index in cut.lost | cut.silent
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
        self._reroute(cut)
        return True

    def _reroute(self, cut: Cut) -> None:
        epoch = self.epoch
        number = epoch.terms.epoch + 1 + cut.skipped
        names = tuple(
            f"stage {index} of epoch {number}" if index in cut.lost and not cut.back else name
            for index, name in enumerate(epoch.names)
        )
        stages = tuple(
            self._entering_terms(index, name, number)
            if index in cut.lost
            else replace(stage, rebuilt=index in cut.forgot)
            for index, (name, stage) in enumerate(zip(names, epoch.terms.stages, strict=True))
        )
        terms = replace(
            epoch.terms,
            epoch=number,
            stages=stages,
            handoff_salt=hashlib.sha256(b"salt %d" % number).digest(),
            resume_position=self.driver.position,
            start=epoch.client.counts,
        )
        self._begin(self.agreed(terms), names)

    def agreed(self, terms: SessionTerms) -> SessionTerms:
        """The terms of the next epoch; a test that lies about them overrides this."""
        return terms

    def _entering_terms(self, index: int, name: str, number: int) -> StageTerms:
        span, peer = self.plot.spans[index], key_of(name).peer_id
        return StageTerms(
            peer=peer,
            ledger_key=key_of(f"{name} ledger").public,
            span=span,
            priced_layers=self.plot.shape.priced_layers(span),
            prices=self.plot.prices,
            numeric_class=self.plot.numeric_class,
            offer_digest=digest(offer_by(name, span, self.plot).payload),
            entered_epoch=number,
            base=self.epoch.client.counts,
            carried=Microcredits(self.epoch.client.promised(peer)),
            replayed=self.driver.position,
            rebuilt=True,
        )

    # Frames --------------------------------------------------------------------------

    def _send(self, frame: SendFrame) -> None:
        self.epoch.client.sent(
            frame.traversal,
            frame.first_position,
            frame.ids,
            drafts=frame.drafts,
            replay=frame.replay,
        )

    def _traverse(self, frame: SendFrame) -> tuple[int, ...]:
        """Send a frame, take its result, and pay if it closes a chunk."""
        epoch = self.epoch
        self._send(frame)
        ids, receipts = self._compute(frame)
        epoch.frames.append(_frame(frame))
        if frame.replay:
            return ()
        statement = epoch.books[-1].draw_statement(frame.traversal)
        epoch.client.drawn(frame.traversal, frame.first_position, ids, statement)
        if frame.close_chunk:
            self._pay(epoch.client.accept_receipts(receipts, frame.traversal, NOW_MS))
        return ids

    def _compute(
        self, frame: SendFrame, skip: frozenset[int] = frozenset()
    ) -> tuple[tuple[int, ...], list[SignedEnvelope]]:
        """Let every stage work on a frame, up to the first that is gone."""
        epoch = self.epoch
        taken = self._counted(frame)
        if frame.replay:
            self._replay(0, frame, ids_payload(frame.ids), skip)
            return (), []
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
            if last:
                state = _activations(index, frame)
                books.drew_from(frame.traversal, frame.first_position, rows, state)
            if frame.close_chunk:
                receipts.append(books.close_chunk(frame.traversal, taken.counts, NOW_MS))
        return ids, receipts

    def _counted(self, frame: SendFrame) -> FrameCounts:
        return self.epoch.progress.take(
            frame.first_position,
            frame.rows,
            drafts=frame.drafts,
            sample=frame.sample,
            close_chunk=frame.close_chunk,
            replay=frame.replay,
        )

    def _replay(
        self, first: int, frame: SendFrame, payload: bytes, skip: frozenset[int] = frozenset()
    ) -> None:
        """Feed the rebuilt stages from ``first`` on: each computes, and sends it on."""
        epoch = self.epoch
        place = frame.traversal, frame.first_position, frame.rows
        for index in range(first, len(epoch.books)):
            if not epoch.terms.stages[index].rebuilt or index in skip:
                break
            if index:
                epoch.books[index - 1].sent(*place, payload)
            epoch.books[index].received(*place, payload)
            payload = _activations(index, frame)

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
        """Show the stages a voucher; one that only now enters has nothing to get by it."""
        epoch = self.epoch
        if voucher is not None:
            for index, books in enumerate(epoch.books):
                if epoch.frames or not epoch.terms.entered(index):
                    books.accept_voucher(voucher)

    def _parts(self, epoch: PaperEpoch) -> EpochParts:
        evidence = epoch.client.evidence()
        spans = [stage.span for stage in epoch.terms.stages]
        return EpochParts(
            terms=epoch.terms,
            session_open=opening_of(epoch.terms),
            stage_certs=tuple(cert_of(name) for name in epoch.names),
            offers=tuple(
                offer_by(name, span, self.plot)
                for name, span in zip(epoch.names, spans, strict=True)
            ),
            frames=_accepted(epoch.frames),
            reservation=epoch.reservation,
            grant=epoch.grant,
            receipts=evidence.receipts,
            cut=evidence.cut,
            voucher=evidence.voucher,
        )


def _entering_names(epoch: PaperEpoch) -> set[str]:
    entered = map(epoch.terms.entered, range(len(epoch.names)))
    return {name for name, enters in zip(epoch.names, entered, strict=True) if enters}


def _settlement(stint: Stint) -> list[Command]:
    return [] if stint.books.voucher is None else [settlement_of(stint.books)]


def _accepted(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """Frames as a bundle has them: a replay that nothing came of is no part of it."""
    return tuple(frames) if any(not frame[6] for frame in frames) else ()


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
    place = b"%d %d %d" % (index, frame.traversal, frame.first_position)
    return hashlib.sha256(place).digest() * max(frame.rows, 1)
