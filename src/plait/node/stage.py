"""A stage's decisions: admits sessions, orders frames, pushes results on. No IO, no tasks.

Whatever happens is a method call with the clock's time behind ``clock_ms``; whatever is to
be done goes to the ports of ``ports``. The daemon drives it from one event loop
(``stage_shell``), the simulator from virtual time. A fault in one session never touches
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from plait.errors import CapacityError, PlaitError, RemoteProtocolError, VerificationError
from plait.ledger.stage_books import StageBooks
from plait.logs import get_logger
from plait.node.admission import (
    Credit,
    Refused,
    credit_of,
    examine,
    examine_next,
    glimpse,
    read_opening,
    refusal,
)
from plait.node.overload import too_much
from plait.node.prefixes import check_names
from plait.node.sessions import SUSPENDED_MS, StageSession
from plait.node.stage_frames import FramedStage
from plait.node.tape import EpochTape
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Confirming:
    """A confirmation that was checked; it counts once ``activate`` is called."""

    session: StageSession
    credit: Credit
    request: session_pb2.ConfirmRequest


class Stage(FramedStage):
    """Everything behind the peer port, but for the waiting; see ``StageState`` for its making."""

    def refuse(
        self, request: session_pb2.OpenRequest, caller: PeerId
    ) -> session_pb2.OpenResponse | None:
        """Refuse at sight who cannot be taken, before anything is verified; None: ``open`` tells.

        Most openings of an overload end here: a no costs nothing, and binds nobody.
        """
        seen = glimpse(request)
        if seen is None or self._draining or self.sessions.get(seen.session_id) is not None:
            return None
        load = self._load(caller)
        refused = too_much(load, self._limits, seen.qos, seen.tokens, resumes=seen.resumes)
        if refused is None:
            return None
        return self._refusal(Refused("capacity", refused.reason, refused.retry_after_ms), caller)

    def _refusal(self, error: Refused | CapacityError, caller: PeerId) -> session_pb2.OpenResponse:
        log.info("session refused", peer=caller, reason=str(error))
        return session_pb2.OpenResponse(refusal=refusal(error))

    def open(self, request: session_pb2.OpenRequest, caller: PeerId) -> session_pb2.OpenResponse:
        """Hold KV pages for a session, or take it into a higher epoch, or refuse."""
        now_ms = self._clock_ms()
        try:
            opening = read_opening(request, caller, self._identify(), now_ms)
            session = self.sessions.get(opening.session_id)
            if session is not None and opening.is_above(session):
                if session.books is None:
                    self._free(session)  # never confirmed: nothing of it is worth keeping
                    session = None
                elif opening.enters:
                    # It could not be told of its epoch's end, and begins anew.
                    self._end(session, "its client begins anew here")
                    session = None
            if session is None:
                session = examine(opening, self._identify(), self._view(), now_ms)
                check_names(request.prefix_digests, session.terms.prompt_tokens)
                self._hold(session, request.context_ids)
                self._prefixes.adopt(session, request.prefix_digests)
            else:
                terms = examine_next(opening, session, self._view())
                self._suspend(session)
                session.reopen(terms, opening.stage_index, now_ms)
                self._reserve(session, request.context_ids)
        except (Refused, CapacityError) as error:
            return self._refusal(error, caller)
        log.info(
            "session held",
            session=session.id.hex(),
            epoch=session.terms.epoch,
            peer=caller,
            tokens=session.tokens_max,
        )
        return session_pb2.OpenResponse(
            hold_expires_ms=session.expires_ms,
            stage_cert=self._settlement.cert,
            reusable_tokens=session.reusable,
        )

    def _hold(self, session: StageSession, context_ids: Sequence[int]) -> None:
        load = self._load(session.terms.client)
        resumes = session.terms.epoch > 1
        refused = too_much(
            load, self._limits, session.terms.qos, session.tokens_max, resumes=resumes
        )
        if refused is not None:
            raise Refused("capacity", refused.reason, refused.retry_after_ms)
        self.sessions.hold(session)
        try:
            self._reserve(session, context_ids)
        except PlaitError:
            self.sessions.remove(session.id)
            raise

    def _reserve(self, session: StageSession, context_ids: Sequence[int]) -> None:
        """Hold pages; for those already held, renew what the sampling knows of the past."""
        self._compute.reserve(
            session.id,
            session.tokens_max,
            session.sampling,
            session.span,
            context_ids,
            session.terms.prompt_tokens,
        )

    def check_confirm(
        self, request: session_pb2.ConfirmRequest, caller: PeerId
    ) -> Confirming | session_pb2.ConfirmResponse:
        """Check a confirmation; ``activate`` it once the link downstream is up.

        Returns a refusal, after which the session is gone, if the credit does not hold.
        """
        session = self.sessions.of_client(SessionId(request.session_id), request.epoch, caller)
        if session.phase == "suspended":
            # A grant that was overtaken by the end of its epoch: what is cached stays.
            return session_pb2.ConfirmResponse(
                refusal=refusal(Refused("terms", "this epoch is closed"))
            )
        try:
            credit = credit_of(
                request, session, self._authorities, self._trusted(), self._clock_ms()
            )
            if request.HasField("voucher") and session.books is not None:
                self._accept_voucher(session, session.books, request.voucher)
            if session.phase == "held":
                session.start_at(request.cached_tokens)
        except (VerificationError, RemoteProtocolError) as error:
            self._end(session, f"credit refused: {error}")
            return session_pb2.ConfirmResponse(refusal=refusal(Refused("credit", str(error))))
        return Confirming(session, credit, request)

    def unlinked(self, confirming: Confirming, reason: str) -> session_pb2.ConfirmResponse:
        """The next stage cannot be reached: refuse. What was computed earlier is kept."""
        session = confirming.session
        if self._is_current(confirming):
            if session.stays:
                session.suspend(self._clock_ms() + SUSPENDED_MS)
            else:
                self._end(session, f"no link downstream: {reason}")
        return session_pb2.ConfirmResponse(refusal=refusal(Refused("neighbour", reason)))

    def activate(self, confirming: Confirming) -> session_pb2.ConfirmResponse:
        """Make a held session live, or take the grant of one that is; start its replay."""
        session, credit = confirming.session, confirming.credit
        if not self._is_current(confirming):
            reason = "the hold expired while it was confirmed"
            return session_pb2.ConfirmResponse(refusal=refusal(Refused("capacity", reason)))
        if session.books is None:
            key = self._settlement.key
            frames = self._frame_log(session)
            books = StageBooks(session.terms, session.stage_index, key, credit.cap, frames)
        elif session.phase == "held":
            frames = self._frame_log(session)
            books = session.books.next_epoch(session.terms, session.stage_index, frames)
        else:
            books = session.books
        if credit.cap is not None and not books.granted:
            books.grant(credit.cap)
        if session.phase == "held":
            session.activate(books, self._clock_ms())
            self._start(session)
        return session_pb2.ConfirmResponse()

    def _frame_log(self, session: StageSession) -> EpochTape | None:
        if self.tape is None:
            return None
        client = session.terms.client
        return self.tape.begin(session.id, session.terms.epoch, client, session.audit_commit)

    def _is_current(self, confirming: Confirming) -> bool:
        session = confirming.session
        return (
            self.sessions.get(session.id) is session
            and session.terms.epoch == confirming.request.epoch
            and session.phase != "suspended"
        )

    def _start(self, session: StageSession) -> None:
        if self._draining:
            self._tell_draining(session)
        self._replay_on(session)
        early, session.early = session.early, []
        for message in early:
            self._uncount_bytes(session.upstream, message.ByteSize())
            if session.phase == "live":
                self.on_frame(message, session.upstream, session.link)

    def close_epoch(
        self, request: session_pb2.CloseEpochRequest, caller: PeerId
    ) -> session_pb2.CloseEpochResponse:
        """Freeze an epoch at what its client has accepted. The same answer each time."""
        session = self.sessions.of_client(SessionId(request.session_id), request.epoch, caller)
        if session.closed is not None:
            return session.closed
        traversal = request.traversal if request.HasField("traversal") else None
        receipt = None
        # A stage that stays has the books of the epoch before until it is confirmed.
        if session.books is not None and session.phase != "held":
            receipt = session.books.close_epoch(traversal, request.position, self._clock_ms())
        self._suspend(session)
        session.orphaned = False
        session.closed = session_pb2.CloseEpochResponse(
            receipt=receipt,
            positions=session.positions,
            retained=self.retained.end((session.id, "output")),
            traversals_received=session.received,
            traversals_sent=session.sent,
        )
        log.info("epoch closed", session=session.id.hex(), epoch=session.terms.epoch)
        return session.closed

    def close(self, request: session_pb2.CloseRequest, caller: PeerId) -> StageSession | None:
        """End a session for its client; returns it, to be settled, or None if unknown."""
        session = self.sessions.get(SessionId(request.session_id))
        if session is None:
            return None
        # Its client may have gone on to an epoch that never began here.
        epoch = min(session.terms.epoch, request.epoch)
        session = self.sessions.of_client(session.id, epoch, caller)
        try:
            check_names(request.prefix_digests, session.tokens_max)
            if request.HasField("voucher") and session.books is not None:
                self._accept_voucher(session, session.books, request.voucher)
        except PlaitError as error:
            self._end(session, f"closed in a way that does not hold: {error}")
            raise
        self._prefixes.publish_all(session, request.prefix_digests, request.keep_alive_s)
        self._free(session)
        log.info("session closed", session=session.id.hex(), reason=request.reason[:80])
        return session
