"""Frames: checked, accounted, queued; their outcomes pushed on; replays to who is rebuilt."""

import contextlib
from collections.abc import Callable

from plait.compute.port import Done
from plait.errors import (
    CapacityError,
    DeadlineExceeded,
    NetworkError,
    Overspend,
    PlaitError,
    RemoteProtocolError,
)
from plait.ledger.handoff import ids_payload
from plait.ledger.stage_books import StageBooks
from plait.logs import get_logger
from plait.node.ports import Job
from plait.node.replay import replay_while_room
from plait.node.retained import Key
from plait.node.sessions import StageSession
from plait.node.stage_faults import FaultedStage
from plait.node.wire import decode_frame, fault_message, onward_frame, result_message, state_of
from plait.types import PeerId, SessionId
from plait.v1 import stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)


class FramedStage(FaultedStage):
    """What a live session does."""

    def on_frame(self, message: stage_pb2.Frame, sender: PeerId, link: object) -> None:
        """Take a frame from upstream: check, account, queue. Faults end only its session."""
        try:
            session = self.sessions.require(SessionId(message.session_id), sender)
            if message.epoch != session.terms.epoch or session.phase == "suspended":
                raise RemoteProtocolError("the frame's epoch is over")
        except RemoteProtocolError as error:
            log.debug("frame dropped", peer=sender, reason=str(error))
            self._disown(message, sender)
            return
        session.link = link
        try:
            if session.phase == "held" and message.replay:
                self._count_bytes(sender, message.ByteSize())
                session.early.append(message)
                return
            self._accept(session, message, sender)
        except PlaitError as error:
            code = "credit" if isinstance(error, Overspend) else error.code
            self._fail(session, code, str(error))

    def _disown(self, message: stage_pb2.Frame, sender: PeerId) -> None:
        """Tell who sends frames of a session that is gone here, instead of leaving it to wait."""
        session_id = SessionId(message.session_id)
        if self.sessions.get(session_id) is not None:
            return
        me = self._identify().peer
        fault = fault_message(session_id, message.epoch, me, "unknown-session", "it is gone here")
        with contextlib.suppress(NetworkError, CapacityError):
            self._links.send_up(sender, stage_pb2.LinkResponse(fault=fault))

    def _accept(self, session: StageSession, message: stage_pb2.Frame, sender: PeerId) -> None:
        if session.phase != "live":
            raise RemoteProtocolError("frames before the session was confirmed")
        frame = decode_frame(
            message,
            first_stage=session.is_first,
            width=self._compute.width,
            vocabulary=self._vocabulary,
            wire_dtype=session.terms.wire_dtype,
        )
        if 0 < frame.deadline_ms < self._clock_ms():
            raise DeadlineExceeded("the frame came after its deadline")
        if session.frames_queued >= self._limits.frames_queued_max and not frame.replay:
            raise RemoteProtocolError("too many frames of one session are queued")
        books = session.require_books()
        if frame.voucher is not None:
            self._accept_voucher(session, books, frame.voucher)
        counts = session.admit_frame(frame)
        books.received(frame.traversal, frame.first_position, frame.rows, frame.payload)
        self.sessions.touch(session, self._clock_ms())
        job = Job(session, frame, counts, sender, self._monotonic_us())
        if frame.rows == 0:
            self._push_on(job, Done())
            return
        self._count_bytes(sender, len(frame.payload))
        try:
            self._worker.submit(job)
        except CapacityError:
            self._uncount_bytes(sender, len(frame.payload))
            raise
        session.frames_queued += 1

    def finish(self, job: Job, done: Done) -> None:
        """Take the outcome of a job from the worker."""
        session, frame = job.session, job.frame
        session.frames_queued -= 1
        self._uncount_bytes(job.sender, len(frame.payload))
        if self.sessions.get(session.id) is not session:
            return
        if done.error is None:
            session.positions = frame.end
        if not job.live:
            return
        try:
            if done.error is not None:
                raise done.error
            self._prefixes.publish_prompt(session)
            self._push_on(job, done)
        except PlaitError as error:
            self._fail(session, error.code, str(error))
        except Exception as error:
            log.exception("a frame failed", session=session.id.hex(), trace=frame.traceparent)
            code = "compute" if error is done.error else "internal"
            self._fail(session, code, type(error).__name__)

    def _push_on(self, job: Job, done: Done) -> None:
        session, frame = job.session, job.frame
        if not job.live:
            return
        if session.replay is not None:
            session.deferred.append(lambda: self._push_on(job, done))
            return
        residence_us = max(0, self._monotonic_us() - job.received_us)
        if frame.sample and frame.first_position >= session.terms.prompt_tokens:
            self._token.note(self._sessions_served(), residence_us)
        if session.is_last:
            if not frame.replay:
                self._answer(job, done, residence_us)
        else:
            onward = onward_frame(
                frame, done.hidden, frame.receipts, residence_us, session.terms.wire_dtype
            )
            key: Key = (session.id, "output")
            self.retained.put(key, frame.first_position, frame.rows, onward.activations.data)
            if session.rebuilds_next or not frame.replay:
                self._pass_on(job, onward)

    def _pass_on(self, job: Job, onward: stage_pb2.Frame) -> None:
        session, frame, books = job.session, job.frame, job.session.require_books()
        place = frame.traversal, frame.first_position, frame.rows
        if frame.close_chunk:
            books.sent(*place, onward.activations.data)
            onward.receipts.append(self._receipt(job))
        request = stage_pb2.LinkRequest(frame=onward)
        self._send(job, lambda: self._links.send_down(session.downstream, request))
        if not frame.close_chunk:  # the next stage need not wait for what nobody signs yet
            books.sent_later(*place, onward.activations.data)
            self._soon(lambda: self._catch_up(session, books))

    def _answer(self, job: Job, done: Done, residence_us: int) -> None:
        session, frame, books = job.session, job.frame, job.session.require_books()
        ids = done.drawn.ids if done.drawn is not None else ()
        place = frame.traversal, frame.first_position, len(ids)
        books.sent(*place, ids_payload(ids))
        receipts = list(frame.receipts)
        if frame.close_chunk:
            books.drew_from(*place, state_of(done))
            receipts.append(self._receipt(job))
        draws = books.draw_statement(frame.traversal) if ids else None
        answer = result_message(frame, done.drawn, receipts, draws, residence_us, done.scored)
        self._send(job, lambda: self._links.send_up(session.terms.client, answer))
        if not frame.close_chunk:  # the client need not wait for what nobody signs yet
            books.drew_from_later(*place, state_of(done))
            self._soon(lambda: self._catch_up(session, books))

    def _catch_up(self, session: StageSession, books: StageBooks) -> None:
        try:
            books.catch_up()
        except PlaitError as error:
            if session.books is books:
                self._fail(session, error.code, str(error))

    def _receipt(self, job: Job) -> SignedEnvelope:
        books, now_ms = job.session.require_books(), self._clock_ms()
        return books.close_chunk(job.frame.traversal, job.counts.counts, now_ms)

    def _send(self, job: Job, send: Callable[[], None]) -> None:
        session = job.session
        try:
            send()
        except (NetworkError, CapacityError) as error:
            self._lose(session, session.downstream, "peer-unreachable", str(error))
        else:
            session.sent = job.frame.traversal + 1

    def on_room(self, peer: PeerId) -> None:
        """The link to a stage that we feed has room again: replays to it go on."""
        for session in self.sessions:
            if session.replay is not None and session.downstream == peer:
                self._replay_on(session)

    def _replay_on(self, session: StageSession) -> None:
        """Send retained rows to a stage that is rebuilt, then what waited behind them."""
        try:
            replay_while_room(session, self._links, self.retained, self._compute.width)
            if session.replay is None:
                waiting, session.deferred = session.deferred, []
                for push in waiting:
                    push()
        except PlaitError as error:
            self._lose(session, session.stage.peer, error.code, str(error))
