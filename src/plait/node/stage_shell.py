"""A ``Stage`` at work on one event loop: its links, its compute thread, its settlement.

Torch runs on one thread; the event loop never computes, so that a refusal is quick however
busy the stage is.
"""

import asyncio
import time
from collections.abc import Callable

from plait.compute.port import Done, StageCompute
from plait.errors import CapacityError, NetworkError
from plait.ledger.fork import VoucherFork
from plait.net.link_stream import Outbox
from plait.network_file import Authority, NetworkFile
from plait.node.admission import StageIdentity
from plait.node.audit_shell import AuditJob
from plait.node.compute_thread import ComputeThread
from plait.node.neighbours import Neighbours
from plait.node.overload import Limits
from plait.node.ports import Job
from plait.node.recent import RecentTimes
from plait.node.retained import Retained
from plait.node.scheduler import PIECE_ROWS, Scheduler
from plait.node.settlement import Settler
from plait.node.stage import Confirming, Stage
from plait.node.tape import Tape
from plait.router.view import View
from plait.types import PeerId, SessionId
from plait.v1 import session_pb2, stage_pb2

ResponseOutbox = Outbox[stage_pb2.LinkResponse]

LINKS_PER_PEER_MAX = 256
LINKS_MAX = 1024
_CONFIRM_LINK_TIMEOUT_S = 3.0


class CallerLinks:
    """The links that peers opened to us: what goes back up.

    A link that is for one session is given that session's messages alone: a client with
    many sessions would else be sent each message once for every one of them.
    """

    def __init__(self) -> None:
        self._outboxes: dict[PeerId, list[ResponseOutbox]] = {}
        self._session_of: dict[ResponseOutbox, SessionId] = {}

    def __len__(self) -> int:
        return sum(len(links) for links in self._outboxes.values())

    def attach(self, caller: PeerId, session: SessionId | None = None) -> ResponseOutbox:
        """Add a link; a client may have several, for each of its processes and sessions.

        Raises ``CapacityError`` when there are too many.
        """
        links = self._outboxes.get(caller, [])
        if len(links) >= LINKS_PER_PEER_MAX or len(self) >= LINKS_MAX:
            raise CapacityError("too many links are open")
        outbox: ResponseOutbox = Outbox()
        if session is not None:
            self._session_of[outbox] = session
        self._outboxes[caller] = [*links, outbox]
        return outbox

    def detach(self, caller: PeerId, outbox: ResponseOutbox) -> tuple[bool, SessionId | None]:
        """Remove a link; returns whether others can take its place, and which session it was for.

        The links of other sessions cannot.
        """
        outbox.close()
        session = self._session_of.pop(outbox, None)
        links = [link for link in self._outboxes.get(caller, []) if link is not outbox]
        if links:
            self._outboxes[caller] = links
        else:
            self._outboxes.pop(caller, None)
        if session is None:
            return bool(links), None
        return any(self._session_of.get(link, session) == session for link in links), session

    def send(self, peer: PeerId, message: stage_pb2.LinkResponse) -> None:
        """Queue a message on every link of the peer that may be for its session.

        Raises ``NetworkError`` when there is none.
        """
        session = _session_of(message)
        links = [
            outbox
            for outbox in self._outboxes.get(peer, ())
            if self._session_of.get(outbox, session) == session
        ]
        if not links:
            raise NetworkError(f"no link from {peer}")
        for outbox in links:
            outbox.put(message)


def _session_of(message: stage_pb2.LinkResponse) -> SessionId:
    kind = message.fault if message.HasField("fault") else message.result
    return SessionId(kind.session_id)


class _Links:
    """The core's ``Links``: callers above, neighbours below."""

    def __init__(self, callers: CallerLinks, neighbours: Neighbours) -> None:
        self.send_up = callers.send
        self.send_down = neighbours.send
        self.has_room = neighbours.has_room


def _after_the_writers(call: Callable[[], None]) -> None:
    """The writers of links were woken before: the loop runs them first."""
    asyncio.get_running_loop().call_soon(call)


class StageShell:
    """Everything behind the peer port. ``core`` decides; this waits, and moves messages.

    ``on_step`` is told the microseconds of each decode step that was computed alone.
    """

    def __init__(
        self,
        *,
        compute: StageCompute,
        network: NetworkFile,
        settler: Settler,
        neighbours: Neighbours,
        retained: Retained,
        identify: Callable[[], StageIdentity],
        view: Callable[[], View],
        clock_ms: Callable[[], int],
        speeds_us: Callable[[], tuple[int, int]],
        vocabulary: int,
        limits: Limits,
        tape: Tape | None = None,
        on_step: Callable[[float], None] = lambda elapsed_us: None,
        trusted: Callable[[], tuple[Authority, ...]] | None = None,
        caught: Callable[[VoucherFork], object] | None = None,
    ) -> None:
        self.callers = CallerLinks()
        self.refusals = RecentTimes()
        """Of openings refused at sight: from the call to the answer, on the event loop."""
        self._settler = settler
        self._neighbours = neighbours
        self._thread: ComputeThread[Job | AuditJob] = ComputeThread(
            compute.step,
            Scheduler(
                key=lambda job: job.key,
                rows=lambda job: job.rows,
                client=lambda job: job.client,
                priority=lambda job: job.priority,
                piece_rows=PIECE_ROWS,
            ),
            lambda job: job.work(),
            self._finish,
            on_step,
        )
        self.core = Stage(
            compute=compute,
            authorities=network.authorities,
            trusted=trusted or (lambda: network.authorities),
            settlement=settler,
            links=_Links(self.callers, neighbours),
            worker=self._thread,
            retained=retained,
            identify=identify,
            view=view,
            clock_ms=clock_ms,
            monotonic_us=lambda: time.monotonic_ns() // 1000,
            speeds_us=speeds_us,
            vocabulary=vocabulary,
            limits=limits,
            tape=tape,
            caught=caught,
            soon=_after_the_writers,
        )
        neighbours.on_response = self.core.on_response
        neighbours.on_broken = self.core.on_peer_lost
        neighbours.on_room = self.core.on_room

    @property
    def frames_queued(self) -> int:
        """Frames that wait for the compute thread."""
        return self._thread.queued

    @property
    def links(self) -> int:
        """Links open in either direction."""
        return len(self.callers) + len(self._neighbours)

    async def compute_forever(self) -> None:
        """Compute what is queued until cancelled."""
        await self._thread.run()

    def _finish(self, job: Job | AuditJob, done: Done) -> None:
        if isinstance(job, AuditJob):
            job.finish(done)
        else:
            self.core.finish(job, done)

    def submit_audit(self, job: AuditJob) -> None:
        """Queue a frame of an audit behind the sessions'; raises ``CapacityError``."""
        self._thread.submit(job)

    async def confirm(
        self, request: session_pb2.ConfirmRequest, caller: PeerId
    ) -> session_pb2.ConfirmResponse:
        """Check the credit, link to the next stage, make the session live."""
        checked = self.core.check_confirm(request, caller)
        if not isinstance(checked, Confirming):
            return checked
        session = checked.session
        try:
            if not session.is_last:
                async with asyncio.timeout(_CONFIRM_LINK_TIMEOUT_S):
                    await self._neighbours.ensure(session.downstream)
        except (NetworkError, TimeoutError) as error:
            return self.core.unlinked(checked, str(error) or "no answer in time")
        return self.core.activate(checked)

    async def close(
        self, request: session_pb2.CloseRequest, caller: PeerId
    ) -> session_pb2.CloseResponse:
        """End a session for its client and settle at once."""
        session = self.core.close(request, caller)
        settled = session is not None and await self._settler.settle(session)
        return session_pb2.CloseResponse(settled=settled)

    def attach(self, caller: PeerId, session: SessionId | None = None) -> ResponseOutbox:
        """A peer opened a link to us; what is put in the outbox goes back on it.

        Raises ``CapacityError``.
        """
        return self.callers.attach(caller, session)

    def detach(self, caller: PeerId, outbox: ResponseOutbox) -> None:
        """A peer's link to us ended."""
        others_left, session = self.callers.detach(caller, outbox)
        self.core.on_link_lost(caller, outbox, others_left, session)
