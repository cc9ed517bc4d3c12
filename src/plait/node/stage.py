"""A stage's decisions: admits sessions, orders frames, pushes results on. No IO, no tasks.

Whatever happens is a method call with the clock's time behind ``clock_ms``; whatever is to
be done goes to the ports of ``ports``. The daemon drives it from one event loop
(``stage_shell``), the simulator from virtual time. A fault in one session never touches
another.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plait.compute.port import Done, StageCompute
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
from plait.ledger.stage_books import StageBooks
from plait.logs import get_logger
from plait.network_file import Authority
from plait.node.admission import (
    Credit,
    Refused,
    StageIdentity,
    credit_of,
    examine,
    examine_next,
    read_opening,
    refusal,
)
from plait.node.faults import CLIENT_GONE, DRAINING, fault_of, tell
from plait.node.overload import CostLine, Limits, Load, too_much
from plait.node.ports import Job, Links, Settlement, Worker
from plait.node.prefixes import Prefixes, check_names
from plait.node.replay import replay_while_room
from plait.node.retained import Key, Retained
from plait.node.sessions import (
    CLIENT_GRACE_MS,
    DRAINED_MS,
    SUSPENDED_MS,
    SessionTable,
    StageSession,
)
from plait.node.tape import EpochTape, Tape
from plait.node.wire import (
    decode_frame,
    fault_message,
    onward_frame,
    result_message,
    state_of,
)
from plait.router.view import View
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2
from plait.v1.identity_pb2 import SignedEnvelope

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Confirming:
    """A confirmation that was checked; it counts once ``activate`` is called."""

    session: StageSession
    credit: Credit
    request: session_pb2.ConfirmRequest


class Stage:
    """Everything behind the peer port, but for the waiting.

    ``identify`` gives the identity to examine against; ``speeds_us`` the microseconds of a
    decode step and of a prompt token, for predictions. ``authorities`` are the ledger's,
    ``trusted`` those of them that were not caught lying. ``tape`` keeps what audits ask for;
    None keeps nothing, and no audit can be answered.
    """

    def __init__(
        self,
        *,
        compute: StageCompute,
        authorities: Sequence[Authority],
        trusted: Callable[[], Sequence[Authority]],
        settlement: Settlement,
        links: Links,
        worker: Worker,
        retained: Retained,
        identify: Callable[[], StageIdentity],
        view: Callable[[], View],
        clock_ms: Callable[[], int],
        monotonic_us: Callable[[], int],
        speeds_us: Callable[[], tuple[int, int]],
        vocabulary: int,
        limits: Limits,
        tape: Tape | None = None,
    ) -> None:
        self.sessions = SessionTable(limits.sessions_max)
        self._compute = compute
        self._authorities = authorities
        self._trusted = trusted
        self._settlement = settlement
        self._links = links
        self._worker = worker
        self.retained = retained
        self._identify = identify
        self._view = view
        self._clock_ms = clock_ms
        self._monotonic_us = monotonic_us
        self._speeds_us = speeds_us
        self._vocabulary = vocabulary
        self._limits = limits
        self._prefixes = Prefixes(compute, limits.keep_alive_s_max)
        self.tape = tape
        self._queued_bytes: Counter[PeerId] = Counter()
        self._token = CostLine.guess(speeds_us()[0])
        self._draining = False

    # Load ---------------------------------------------------------------------------

    @property
    def wait_us(self) -> int:
        """Predicted wait of a session that were opened now: the prompts that go before it."""
        decode_us, prefill_us = self._speeds_us()
        rows = sum(s.prompt_rows_left for s in self.sessions if s.phase != "suspended")
        return rows * prefill_us + (decode_us if self._worker.queued else 0)

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that wait."""
        return self._queued_bytes.total()

    def _load(self, client: PeerId) -> Load:
        left = [s.tokens_max - s.positions for s in self.sessions]
        token_us = self._token.cost_us(self._sessions_served() + 1)
        return Load(
            kv_tokens_total=self._compute.kv_tokens_total,
            kv_tokens_free=self._compute.kv_tokens_free,
            wait_ms=self.wait_us // 1000,
            sessions=len(self.sessions),
            sessions_of_client=self.sessions.count_of(client),
            soonest_free_ms=round(min(left, default=0) * token_us) // 1000,
            token_us=token_us,
            token_alone_us=self._token.one_us,
        )

    def _sessions_served(self) -> int:
        return sum(session.phase != "suspended" for session in self.sessions)

    # Opening and closing ------------------------------------------------------------

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
            log.info("session refused", peer=caller, reason=str(error))
            return session_pb2.OpenResponse(refusal=refusal(error))
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
                session.books.accept_voucher(request.voucher)
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
                session.books.accept_voucher(request.voucher)
        except PlaitError as error:
            self._end(session, f"closed in a way that does not hold: {error}")
            raise
        self._prefixes.publish_all(session, request.prefix_digests, request.keep_alive_s)
        self._free(session)
        log.info("session closed", session=session.id.hex(), reason=request.reason[:80])
        return session

    # Frames -------------------------------------------------------------------------

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
            books.accept_voucher(frame.voucher)
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

    def _count_bytes(self, sender: PeerId, size: int) -> None:
        if self._queued_bytes[sender] + size > self._limits.peer_queued_bytes_max:
            raise CapacityError(f"too many bytes of frames from {sender} are queued")
        self._queued_bytes[sender] += size

    def _uncount_bytes(self, sender: PeerId, size: int) -> None:
        self._queued_bytes[sender] -= size
        if not self._queued_bytes[sender]:
            del self._queued_bytes[sender]

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
        payload = onward.activations.data
        books.sent(frame.traversal, frame.first_position, frame.rows, payload)
        onward.receipts.extend(self._receipt(job))
        request = stage_pb2.LinkRequest(frame=onward)
        self._send(job, lambda: self._links.send_down(session.downstream, request))

    def _answer(self, job: Job, done: Done, residence_us: int) -> None:
        session, frame, books = job.session, job.frame, job.session.require_books()
        ids = done.drawn.ids if done.drawn is not None else ()
        place = frame.traversal, frame.first_position
        books.sent(*place, len(ids), ids_payload(ids), state_of(done))
        receipts = [*frame.receipts, *self._receipt(job)]
        draws = books.draw_statement(frame.traversal) if ids else None
        answer = result_message(frame, done.drawn, receipts, draws, residence_us, done.scored)
        self._send(job, lambda: self._links.send_up(session.terms.client, answer))

    def _receipt(self, job: Job) -> list[SignedEnvelope]:
        if not job.frame.close_chunk:
            return []
        books, now_ms = job.session.require_books(), self._clock_ms()
        return [books.close_chunk(job.frame.traversal, job.counts.counts, now_ms)]

    def _send(self, job: Job, send: Callable[[], None]) -> None:
        session = job.session
        try:
            send()
        except (NetworkError, CapacityError) as error:
            self._lose(session, session.downstream, "peer-unreachable", str(error))
        else:
            session.sent = job.frame.traversal + 1

    # Replay -------------------------------------------------------------------------

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

    # Links and faults ---------------------------------------------------------------

    def on_link_lost(
        self, peer: PeerId, link: object, others_left: bool, only: SessionId | None = None
    ) -> None:
        """A peer's link to us ended; ``others_left`` says whether it has more that will do.

        A stage upstream is lost; a client has a short time to come back. Of a link that was
        for one session ``only``, the client's others know nothing.
        """
        for session in self.sessions.touching(peer):
            if session.phase != "live" or (others_left and session.link is not link):
                continue
            if only is not None and session.id != only:
                continue
            if peer != session.terms.client:
                self._lose(session, peer, "peer-unreachable", "the link upstream ended")
                continue
            log.info("client lost", session=session.id.hex())
            session.orphaned = True
            self._suspend(session, CLIENT_GRACE_MS)

    def on_peer_lost(self, peer: PeerId, reason: str) -> None:
        """Our link to a neighbour broke: its sessions wait for their client to reroute."""
        for session in self.sessions.touching(peer):
            if session.phase == "live":
                self._lose(session, peer, "peer-unreachable", reason)

    def on_response(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """A fault comes back from the next stage."""
        if message.WhichOneof("kind") == "fault":
            session = self.sessions.get(SessionId(message.fault.session_id))
            if session is not None and session.downstream == peer:
                self._on_fault(session, message.fault, from_upstream=False)

    def on_upstream_fault(self, fault: stage_pb2.SessionFault, sender: PeerId) -> None:
        """A fault comes from the stage before."""
        session = self.sessions.get(SessionId(fault.session_id))
        if session is not None and session.upstream == sender:
            self._on_fault(session, fault, from_upstream=True)

    def _on_fault(
        self, session: StageSession, fault: stage_pb2.SessionFault, *, from_upstream: bool
    ) -> None:
        """Pass the word on, away from where it came; stop, but keep what a reroute can use."""
        if fault.epoch != session.terms.epoch or session.closed is not None:
            return
        if fault.code == CLIENT_GONE:
            session.client_gone_upstream |= from_upstream
            session.client_gone_downstream |= not from_upstream
            if session.client_gone_upstream and session.client_gone_downstream:
                self._end(session, "the client is gone", fault)
                return
        elif session.phase == "suspended":
            return
        if fault.code != DRAINING and session.phase != "suspended":
            self._suspend(session)  # one that is suspended already keeps its time
        tell(self._links, session, fault, upstream=not from_upstream, downstream=from_upstream)

    def _lose(self, session: StageSession, peer: PeerId, code: str, reason: str) -> None:
        """Suspend a session because ``peer`` is lost to it, and say so both ways."""
        log.info("session suspended", session=session.id.hex(), lost=peer, reason=reason)
        self._suspend(session)
        tell(self._links, session, fault_of(session, peer, code, reason))

    def _fail(self, session: StageSession, code: str, reason: str) -> None:
        """End a session by a fault of its own, and say so both ways."""
        self._end(session, reason, fault_of(session, session.stage.peer, code, reason))

    def _suspend(self, session: StageSession, for_ms: int | None = None) -> None:
        if for_ms is None:
            for_ms = DRAINED_MS if self._draining else SUSPENDED_MS
        early = sum(message.ByteSize() for message in session.early)
        self._uncount_bytes(session.upstream, early)
        session.suspend(self._clock_ms() + for_ms)

    # Ending -------------------------------------------------------------------------

    def expire(self) -> None:
        """End sessions whose time has passed. Call it a few times a second."""
        if self.tape is not None:
            self.tape.expire(self._clock_ms())
        for session in self.sessions.expired(self._clock_ms()):
            if session.orphaned:
                self._client_gone(session)
            elif session.phase == "held" and session.books is None:
                self._end(session, "the hold expired")
            else:
                self._fail(session, "deadline", "nothing was heard of it for too long")

    def _client_gone(self, session: StageSession) -> None:
        """The client did not come back here. It is gone if the other end says so too."""
        session.orphaned = False
        session.client_gone_upstream |= session.is_first
        session.client_gone_downstream |= session.is_last
        fault = fault_of(session, session.terms.client, CLIENT_GONE, "the client is gone")
        if session.client_gone_upstream and session.client_gone_downstream:
            self._end(session, "the client is gone", fault)
        else:
            self._suspend(session)
            tell(self._links, session, fault)

    def drain(self) -> None:
        """Tell every client to move; what runs goes on until it does."""
        self._draining = True
        last_ms = self._clock_ms() + DRAINED_MS
        for session in self.sessions:
            if session.phase == "live":
                self._tell_draining(session)
            elif session.phase == "suspended":
                session.expires_ms = min(session.expires_ms, last_ms)

    def _tell_draining(self, session: StageSession) -> None:
        peer = session.stage.peer
        tell(self._links, session, fault_of(session, peer, DRAINING, "this node is draining"))

    def end_all(self, reason: str) -> None:
        """End every session: the node is stopping."""
        for session in self.sessions:
            self._fail(session, "stopped", reason)

    def _end(
        self, session: StageSession, reason: str, fault: stage_pb2.SessionFault | None = None
    ) -> None:
        """Free a session that did not end well; tell both neighbours once; settle what is owed."""
        if self.sessions.get(session.id) is not session:
            return
        log.info("session ended", session=session.id.hex(), reason=reason[:200])
        self._free(session)
        self._settlement.settle_later(session)
        if fault is not None:
            tell(self._links, session, fault)

    def _free(self, session: StageSession) -> None:
        self._suspend(session, 0)
        self.sessions.remove(session.id)
        self._compute.free(session.id)
        self.retained.free(session.id)
        if self.tape is not None:
            self.tape.end(session.id, self._clock_ms())
