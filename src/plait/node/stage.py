"""A stage at work: admits sessions, computes frames in batches, pushes them on, gets paid.

The decisions are in ``admission``, ``sessions``, ``scheduler`` and the ledger's books; this
shell moves messages between links, the compute thread and the ledger. Torch runs on one
thread; the event loop never computes. A fault in one session never touches its batch mates.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from plait.compute.port import Done, StageCompute, Work
from plait.errors import (
    CapacityError,
    DeadlineExceeded,
    NetworkError,
    Overspend,
    PlaitError,
    RemoteProtocolError,
    VerificationError,
)
from plait.ledger.handoff import ids_payload
from plait.ledger.reserve import check_grant
from plait.ledger.stage_books import StageBooks
from plait.logs import get_logger
from plait.net.link_stream import Outbox
from plait.network_file import NetworkFile
from plait.node.admission import Refused, StageIdentity, examine, refusal
from plait.node.compute_thread import ComputeThread
from plait.node.neighbours import Neighbours
from plait.node.scheduler import Scheduler
from plait.node.sessions import HOLD_MS, SessionTable, StageSession
from plait.node.settlement import Settler
from plait.node.wire import StageFrame, decode_frame, onward_frame
from plait.router.view import View
from plait.types import PeerId, SessionId, TokenCounts
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)

ResponseOutbox = Outbox[stage_pb2.LinkResponse]

_CONFIRM_LINK_TIMEOUT_S = 3.0

FRAMES_QUEUED_MAX = 16
"""Frames of one session that may wait; a driver has one traversal in flight."""


@dataclass(frozen=True, slots=True)
class _Job:
    session: StageSession
    frame: StageFrame
    counts: TokenCounts


class Stage:
    """Everything behind the peer port.

    ``identify`` gives the identity to examine against; ``on_step`` is told the microseconds
    of each decode step that was computed alone.
    """

    def __init__(
        self,
        *,
        compute: StageCompute,
        network: NetworkFile,
        settler: Settler,
        neighbours: Neighbours,
        identify: Callable[[], StageIdentity],
        view: Callable[[], View],
        clock_ms: Callable[[], int],
        vocabulary: int,
        sessions_max: int,
        on_step: Callable[[float], None] = lambda elapsed_us: None,
    ) -> None:
        self.sessions = SessionTable(sessions_max)
        self._compute = compute
        self._network = network
        self._settler = settler
        self._neighbours = neighbours
        self._identify = identify
        self._view = view
        self._clock_ms = clock_ms
        self._vocabulary = vocabulary
        self._thread: ComputeThread[_Job] = ComputeThread(
            compute.step,
            Scheduler(key=lambda job: job.session.id, rows=lambda job: job.frame.rows),
            _work,
            self._finish,
            on_step,
        )
        self._callers: dict[PeerId, list[ResponseOutbox]] = {}
        self._arrival: dict[SessionId, ResponseOutbox] = {}
        neighbours.on_response = self.on_response
        neighbours.on_broken = self.on_peer_lost

    @property
    def frames_queued(self) -> int:
        """Frames that wait for the compute thread."""
        return self._thread.queued

    # Opening and closing ------------------------------------------------------------

    def open(self, request: session_pb2.OpenRequest, caller: PeerId) -> session_pb2.OpenResponse:
        """Hold KV pages for a session, or refuse with a reason."""
        try:
            session = examine(request, caller, self._identify(), self._view(), self._clock_ms())
            self.sessions.hold(session)
            try:
                self._compute.reserve(
                    session.id, session.tokens_max, session.sampling, session.span
                )
            except CapacityError:
                self.sessions.remove(session.id)
                raise
        except (Refused, CapacityError) as error:
            log.info("session refused", peer=caller, reason=str(error))
            return session_pb2.OpenResponse(refusal=refusal(error))
        log.info("session held", session=session.id.hex(), peer=caller, tokens=session.tokens_max)
        return session_pb2.OpenResponse(
            hold_expires_ms=self._clock_ms() + HOLD_MS, stage_cert=self._settler.cert
        )

    async def confirm(
        self, request: session_pb2.ConfirmRequest, caller: PeerId
    ) -> session_pb2.ConfirmResponse:
        """Check the ledger's grant, link to the next stage, make the session live."""
        session = self._session_of(request.session_id, request.epoch, caller)
        now_ms = self._clock_ms()
        try:
            cap = check_grant(
                request.grant,
                request.reservation,
                self._network.authorities,
                session.terms,
                session.stage_index,
                now_ms,
            )
            if not session.is_last:
                async with asyncio.timeout(_CONFIRM_LINK_TIMEOUT_S):
                    await self._neighbours.ensure(session.downstream)
        except (VerificationError, RemoteProtocolError) as error:
            self._end(session, f"grant refused: {error}")
            return session_pb2.ConfirmResponse(refusal=refusal(Refused("credit", str(error))))
        except (NetworkError, TimeoutError) as error:
            self._end(session, f"no link downstream: {error}")
            return session_pb2.ConfirmResponse(refusal=refusal(Refused("neighbour", str(error))))
        books = StageBooks(session.terms, session.stage_index, self._settler.key, cap)
        self.sessions.confirm(session, books, self._clock_ms())
        return session_pb2.ConfirmResponse()

    async def close(
        self, request: session_pb2.CloseRequest, caller: PeerId
    ) -> session_pb2.CloseResponse:
        """End a session for its client and settle at once."""
        session = self.sessions.get(SessionId(request.session_id))
        if session is None:
            return session_pb2.CloseResponse(settled=False)
        session = self._session_of(request.session_id, request.epoch, caller)
        try:
            if request.HasField("voucher") and session.books is not None:
                session.books.accept_voucher(request.voucher)
        except PlaitError as error:
            self._end(session, f"closed with a bad voucher: {error}")
            raise
        self._free(session)
        log.info("session closed", session=session.id.hex(), reason=request.reason[:80])
        return session_pb2.CloseResponse(settled=await self._settler.settle(session))

    def _session_of(self, session_id: bytes, epoch: int, caller: PeerId) -> StageSession:
        session = self.sessions.get(SessionId(session_id))
        if session is None or session.terms.epoch != epoch:
            raise RemoteProtocolError("no such session, or its hold has expired")
        if session.terms.client != caller:
            raise RemoteProtocolError("only its client may confirm or close a session")
        return session

    # Frames -------------------------------------------------------------------------

    def on_frame(self, message: stage_pb2.Frame, sender: PeerId, link: ResponseOutbox) -> None:
        """Take a frame from upstream: check, account, queue. Faults end only its session."""
        try:
            session = self.sessions.require(SessionId(message.session_id), sender)
        except RemoteProtocolError as error:
            log.debug("frame dropped", peer=sender, reason=str(error))
            return
        self._arrival[session.id] = link
        try:
            self._accept(session, message)
        except PlaitError as error:
            code = "credit" if isinstance(error, Overspend) else error.code
            self._fail(session, code, str(error))

    def _accept(self, session: StageSession, message: stage_pb2.Frame) -> None:
        frame = decode_frame(
            message,
            first_stage=session.stage_index == 0,
            width=self._compute.width,
            vocabulary=self._vocabulary,
        )
        if 0 < frame.deadline_ms < self._clock_ms():
            raise DeadlineExceeded("the frame came after its deadline")
        if session.frames_queued >= FRAMES_QUEUED_MAX:
            raise RemoteProtocolError("too many frames of one session are queued")
        books = session.require_books()
        if frame.voucher is not None:
            books.accept_voucher(frame.voucher)
        counts = session.admit_frame(
            epoch=frame.epoch,
            traversal=frame.traversal,
            first_position=frame.first_position,
            rows=frame.rows,
            sample=frame.sample,
            close_chunk=frame.close_chunk,
        )
        books.received(frame.traversal, frame.first_position, frame.rows, frame.payload)
        self.sessions.touch(session, self._clock_ms())
        job = _Job(session, frame, counts)
        if frame.rows == 0:
            self._push_on(job, Done(hidden=None, drawn=None, error=None))
            return
        self._thread.submit(job)
        session.frames_queued += 1

    async def compute_forever(self) -> None:
        """Compute what is queued until cancelled."""
        await self._thread.run()

    def _finish(self, job: _Job, done: Done) -> None:
        job.session.frames_queued -= 1
        if self.sessions.get(job.session.id) is not job.session:
            self._compute.free(job.session.id)
            return
        if done.error is not None:
            log.warning(
                "step failed",
                session=job.session.id.hex(),
                trace=job.frame.traceparent,
                error=repr(done.error),
            )
            code = done.error.code if isinstance(done.error, PlaitError) else "compute"
            self._fail(job.session, code, str(done.error))
            return
        try:
            self._push_on(job, done)
        except PlaitError as error:
            self._fail(job.session, error.code, str(error))
        except Exception as error:
            log.exception("a result could not be passed on", session=job.session.id.hex())
            self._fail(job.session, "internal", type(error).__name__)

    def _push_on(self, job: _Job, done: Done) -> None:
        session, frame, books = job.session, job.frame, job.session.require_books()
        drawn = done.drawn.ids if done.drawn is not None else ()
        onward = onward_frame(frame, done.hidden, ())
        if session.is_last:
            books.sent(frame.traversal, frame.first_position, len(drawn), ids_payload(drawn))
        else:
            payload = onward.activations.data
            books.sent(frame.traversal, frame.first_position, frame.rows, payload)
        receipts = list(frame.receipts)
        if frame.close_chunk:
            receipts.append(books.close_chunk(frame.traversal, job.counts, self._clock_ms()))
        if session.is_last:
            self._answer(session, frame, done, receipts)
            return
        onward.receipts.extend(receipts)
        self._neighbours.send(session.downstream, stage_pb2.LinkRequest(frame=onward))

    def _answer(
        self, session: StageSession, frame: StageFrame, done: Done, receipts: list[SignedEnvelope]
    ) -> None:
        result = stage_pb2.TokenResult(
            session_id=session.id,
            epoch=frame.epoch,
            traversal=frame.traversal,
            ids=done.drawn.ids if done.drawn is not None else (),
            logprobs=done.drawn.logprobs if done.drawn is not None else (),
            receipts=receipts,
        )
        self._respond(session.terms.client, stage_pb2.LinkResponse(result=result))

    # Links and faults ---------------------------------------------------------------

    def attach(self, caller: PeerId) -> ResponseOutbox:
        """A peer opened a Link to us; what we put in the outbox goes back on it.

        A client may open several, one per process that uses its identity.
        """
        outbox: ResponseOutbox = Outbox()
        self._callers.setdefault(caller, []).append(outbox)
        return outbox

    def detach(self, caller: PeerId, outbox: ResponseOutbox) -> None:
        """A peer's Link to us ended: so do the sessions whose frames came on it."""
        outbox.close()
        links = self._callers.get(caller, [])
        if outbox in links:
            links.remove(outbox)
        if not links:
            self._callers.pop(caller, None)
        for session in self.sessions.touching(caller):
            if self._arrival.get(session.id) is outbox or (not links and session.books is not None):
                self._fail(session, "peer-unreachable", f"{caller}: the link upstream ended")

    def _respond(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        links = self._callers.get(peer)
        if not links:
            raise NetworkError(f"no link from {peer}")
        for outbox in links:
            outbox.put(message)

    def on_response(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """A fault comes back from the next stage: end the session and pass it up."""
        if message.WhichOneof("kind") != "fault":
            return
        session = self.sessions.get(SessionId(message.fault.session_id))
        if session is not None and session.downstream == peer:
            self._end(session, message.fault.reason, fault=message.fault, tell_downstream=False)

    def on_upstream_fault(self, fault: stage_pb2.SessionFault, sender: PeerId) -> None:
        """The session ended upstream: free it and pass the word on."""
        session = self.sessions.get(SessionId(fault.session_id))
        if session is not None and session.upstream == sender:
            self._end(session, fault.reason, fault=fault, tell_upstream=False)

    def on_peer_lost(self, peer: PeerId, reason: str) -> None:
        """A neighbour's link broke: its sessions cannot go on."""
        for session in self.sessions.touching(peer):
            if session.books is not None:
                self._fail(session, "peer-unreachable", f"{peer}: {reason}")

    def _fail(self, session: StageSession, code: str, reason: str) -> None:
        fault = stage_pb2.SessionFault(
            session_id=session.id,
            epoch=session.terms.epoch,
            peer_id=session.terms.stages[session.stage_index].peer,
            code=code,
            reason=reason[:500],
        )
        self._end(session, reason, fault=fault)

    def _end(
        self,
        session: StageSession,
        reason: str,
        *,
        fault: stage_pb2.SessionFault | None = None,
        tell_upstream: bool = True,
        tell_downstream: bool = True,
    ) -> None:
        """Free a session that did not end well; tell both neighbours once; settle what is owed."""
        if self.sessions.get(session.id) is not session:
            return
        log.info("session ended", session=session.id.hex(), reason=reason[:200])
        self._free(session)
        self._settler.settle_later(session)
        if fault is None:
            return
        if tell_upstream:
            self._tell(lambda: self._respond(session.upstream, stage_pb2.LinkResponse(fault=fault)))
        if tell_downstream and not session.is_last:
            message = stage_pb2.LinkRequest(fault=fault)
            self._tell(lambda: self._neighbours.send(session.downstream, message))

    def _tell(self, send: Callable[[], None]) -> None:
        try:
            send()
        except PlaitError as error:
            log.debug("fault not passed on", reason=str(error))

    def _free(self, session: StageSession) -> None:
        self.sessions.remove(session.id)
        self._arrival.pop(session.id, None)
        self._compute.free(session.id)

    def expire(self) -> None:
        """End sessions whose hold or idle time has passed."""
        for session in self.sessions.expired(self._clock_ms()):
            if session.books is None:
                self._end(session, "the hold expired")
            else:
                self._fail(session, "deadline", "no frame for too long")

    def end_all(self, reason: str) -> None:
        """End every session: the node is stopping."""
        for session in self.sessions:
            self._fail(session, "draining", reason)


def _work(job: _Job) -> Work:
    return Work(
        session=job.session.id,
        first_position=job.frame.first_position,
        ids=job.frame.ids,
        hidden=job.frame.hidden,
        sample=job.frame.sample,
    )
