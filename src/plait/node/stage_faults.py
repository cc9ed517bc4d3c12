"""Links that break, faults that come from neighbours, time that passes, and the node's end."""

from plait.logs import get_logger
from plait.node.faults import CLIENT_GONE, DRAINING, fault_of, tell
from plait.node.sessions import CLIENT_GRACE_MS, DRAINED_MS, StageSession
from plait.node.stage_state import StageState
from plait.types import PeerId, SessionId
from plait.v1 import stage_pb2

log = get_logger(__name__)


class FaultedStage(StageState):
    """Who is told that something went wrong, and what is kept for a reroute."""

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

    def end_all(self, reason: str) -> None:
        """End every session: the node is stopping."""
        for session in self.sessions:
            self._fail(session, "stopped", reason)
