"""The sessions of one stage: held, live, ended. Pure.

A held session has KV pages but no credit yet and expires after two seconds; a live one
expires when no frame comes for its idle time. Frames count only from the neighbour that
the signed terms name, in the right epoch, with a traversal number not seen before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from plait.errors import CapacityError, RemoteProtocolError
from plait.ledger.stage_books import StageBooks
from plait.ledger.terms import SessionTerms
from plait.types import PeerId, Sampling, SessionId, Span, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope

HOLD_MS = 2_000
IDLE_MS = 60_000


@dataclass(slots=True)
class StageSession:
    """One stage's side of one session's epoch. ``books`` is set once the grant is shown."""

    terms: SessionTerms
    sampling: Sampling
    stage_index: int
    client_cert: SignedEnvelope
    expires_ms: int
    books: StageBooks | None = None
    next_traversal: int = 0
    next_position: int = 0
    frames_queued: int = 0
    closed: TokenCounts = field(default_factory=TokenCounts)
    """The counts at the last frame that closed a chunk."""

    @property
    def id(self) -> SessionId:
        """The session's id."""
        return self.terms.session_id

    @property
    def span(self) -> Span:
        """The layers that this session runs here: a part of those loaded."""
        return self.terms.stages[self.stage_index].span

    @property
    def is_last(self) -> bool:
        """Whether this stage draws the tokens."""
        return self.stage_index == len(self.terms.stages) - 1

    @property
    def upstream(self) -> PeerId:
        """Who may send frames: the client at the first stage."""
        if self.stage_index == 0:
            return self.terms.client
        return self.terms.stages[self.stage_index - 1].peer

    @property
    def downstream(self) -> PeerId:
        """Who gets the output: the client at the last stage."""
        if self.is_last:
            return self.terms.client
        return self.terms.stages[self.stage_index + 1].peer

    @property
    def tokens_max(self) -> int:
        """Positions the session may fill."""
        return self.terms.prompt_tokens + self.terms.max_tokens

    def require_books(self) -> StageBooks:
        """The books of a live session; raises ``RemoteProtocolError`` before the grant."""
        if self.books is None:
            raise RemoteProtocolError("frames before the grant was shown")
        return self.books

    def admit_frame(
        self,
        *,
        epoch: int,
        traversal: int,
        first_position: int,
        rows: int,
        sample: bool,
        close_chunk: bool,
    ) -> TokenCounts:
        """Check a frame's place in the sequence and the credit window; return the counts after it.

        Raises ``RemoteProtocolError`` or ``Overspend``; on success the frame is taken.
        """
        if epoch != self.terms.epoch:
            raise RemoteProtocolError(f"a frame of epoch {epoch}, not {self.terms.epoch}")
        if traversal != self.next_traversal:
            raise RemoteProtocolError(
                f"traversal {traversal} came where {self.next_traversal} was due"
            )
        if first_position > self.next_position or first_position + rows > self.tokens_max:
            raise RemoteProtocolError(f"a frame at position {first_position} does not fit")
        counts = self.terms.counts_after(first_position, rows, sample)
        if rows == 0 and (counts == self.closed or self.frames_queued):
            raise RemoteProtocolError("there is nothing to close, or not yet")
        self.require_books().admit(counts)
        if close_chunk:
            self.closed = counts
        self.next_traversal += 1
        self.next_position = first_position + rows
        return counts


class SessionTable:
    """All sessions of a stage, bounded."""

    def __init__(self, sessions_max: int) -> None:
        self._sessions_max = sessions_max
        self._sessions: dict[SessionId, StageSession] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[StageSession]:
        return iter(tuple(self._sessions.values()))

    def hold(self, session: StageSession) -> None:
        """Add a held session; raises ``CapacityError``, or ``RemoteProtocolError`` if known."""
        if session.id in self._sessions:
            raise RemoteProtocolError("this session is open already")
        if len(self._sessions) >= self._sessions_max:
            raise CapacityError(f"all {self._sessions_max} sessions are taken")
        self._sessions[session.id] = session

    def confirm(self, session: StageSession, books: StageBooks, now_ms: int) -> None:
        """Make a held session live."""
        session.books = books
        session.expires_ms = now_ms + IDLE_MS

    def get(self, session_id: SessionId) -> StageSession | None:
        """The session, or None when unknown or ended."""
        return self._sessions.get(session_id)

    def require(self, session_id: SessionId, sender: PeerId) -> StageSession:
        """The session, if ``sender`` is its upstream; raises ``RemoteProtocolError``."""
        session = self._sessions.get(session_id)
        if session is None:
            raise RemoteProtocolError("no such session")
        if session.upstream != sender:
            raise RemoteProtocolError("a frame from a peer that is not the neighbour upstream")
        return session

    def touch(self, session: StageSession, now_ms: int) -> None:
        """Note that a frame came."""
        session.expires_ms = now_ms + IDLE_MS

    def remove(self, session_id: SessionId) -> StageSession | None:
        """Forget a session."""
        return self._sessions.pop(session_id, None)

    def expired(self, now_ms: int) -> list[StageSession]:
        """Sessions past their hold or idle time."""
        return [session for session in self if session.expires_ms <= now_ms]

    def touching(self, peer: PeerId) -> list[StageSession]:
        """Sessions that cannot go on without a peer."""
        return [session for session in self if peer in (session.upstream, session.downstream)]
