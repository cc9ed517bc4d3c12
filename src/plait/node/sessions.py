"""The sessions of one stage: held, live, suspended, ended. Pure.

A held session has KV pages but no credit yet and expires after two seconds. A live one
computes frames, and expires when none comes for its idle time. A suspended one computes
nothing and keeps its cache for a while: its client froze the epoch, or a neighbour is lost;
opening a higher epoch makes it held again. Frames count only from the neighbour that the
signed terms name, in the right epoch, with a traversal number not seen before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from plait.errors import CapacityError, RemoteProtocolError
from plait.ledger.progress import FrameCounts, Progress
from plait.ledger.stage_books import StageBooks
from plait.ledger.terms import SessionTerms, StageTerms
from plait.node.wire import StageFrame
from plait.types import PeerId, Sampling, SessionId, Span, TokenCounts
from plait.v1.identity_pb2 import SignedEnvelope
from plait.v1.session_pb2 import CloseEpochResponse
from plait.v1.stage_pb2 import Frame

HOLD_MS = 2_000
IDLE_MS = 60_000
SUSPENDED_MS = 30_000
"""How long a cache is kept for a client that may reroute."""
DRAINED_MS = 5_000
"""The same where the node is draining: the client cannot come back, only close and pay."""
CLIENT_GRACE_MS = 500
"""After the last link of a client, for the next one."""

Phase = Literal["held", "live", "suspended"]


@dataclass(slots=True)
class Replay:
    """What is still to be replayed to the next stage: rows ``[next_position, end)``."""

    end: int
    next_position: int = 0
    traversal: int = 0


@dataclass(slots=True)
class StageSession:
    """One stage's side of one session. ``books`` is set once the grant is shown."""

    terms: SessionTerms
    sampling: Sampling
    stage_index: int
    client_cert: SignedEnvelope
    expires_ms: int
    audit_commit: bytes = b""
    """What the client committed to for audits; empty if it will ask for none."""
    phase: Phase = "held"
    books: StageBooks | None = None
    reservation: SignedEnvelope | None = None
    """What this stage started on when it entered by a reroute."""
    positions: int = 0
    """KV is computed for the positions before this one."""
    prefix: tuple[bytes, ...] = ()
    """Names of the prompt's full pages, until they are published."""
    reusable: int = 0
    """Leading positions that were found in the cache."""
    cached: int = 0
    """Leading positions that its client started behind."""
    frames_queued: int = 0
    received: int = 0
    """Last traversal received in this epoch, plus one."""
    sent: int = 0
    """Last traversal passed on in this epoch, plus one."""
    link: object = None
    """Which of the upstream neighbour's links its frames come on."""
    orphaned: bool = False
    """Our own link to the client is lost; it has a short time to come back."""
    client_gone_upstream: bool = False
    client_gone_downstream: bool = False
    """Whether the first and the last stage miss the client: it is gone if both do."""
    closed: CloseEpochResponse | None = None
    """The answer that froze this epoch."""
    replay: Replay | None = None
    early: list[Frame] = field(default_factory=list)
    """Replayed frames that came before the confirmation."""
    deferred: list[Callable[[], None]] = field(default_factory=list)
    """Results that wait behind the replay."""
    entry_terms: SessionTerms = field(init=False)
    """The terms of the epoch in which this stage entered: its grant is for them."""
    progress: Progress = field(init=False)
    _next_replay: int = 0
    _next_traversal: int = 0
    _closed_counts: TokenCounts = field(default_factory=TokenCounts)
    """The counts at the last frame that closed a chunk."""

    def __post_init__(self) -> None:
        self.entry_terms = self.terms
        self._start_epoch()

    @property
    def id(self) -> SessionId:
        """The session's id."""
        return self.terms.session_id

    @property
    def stage(self) -> StageTerms:
        """Our own part of the terms."""
        return self.terms.stages[self.stage_index]

    @property
    def span(self) -> Span:
        """The layers that this session runs here: a part of those loaded."""
        return self.stage.span

    @property
    def is_first(self) -> bool:
        """Whether the client feeds this stage."""
        return self.stage_index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage draws the tokens."""
        return self.stage_index == len(self.terms.stages) - 1

    @property
    def upstream(self) -> PeerId:
        """Who may send frames: the client at the first stage."""
        if self.is_first:
            return self.terms.client
        return self.terms.stages[self.stage_index - 1].peer

    @property
    def downstream(self) -> PeerId:
        """Who gets the output: the client at the last stage."""
        if self.is_last:
            return self.terms.client
        return self.terms.stages[self.stage_index + 1].peer

    @property
    def rebuilds_next(self) -> bool:
        """Whether the next stage is rebuilt in this epoch, so that replays go there."""
        return not self.is_last and self.terms.stages[self.stage_index + 1].rebuilt

    @property
    def stays(self) -> bool:
        """Whether this stage served the session in an earlier epoch already."""
        return self.terms.epoch > 1 and not self.terms.entered(self.stage_index)

    @property
    def tokens_max(self) -> int:
        """Positions the session may fill."""
        return self.terms.prompt_tokens + self.terms.max_tokens

    @property
    def prompt_rows_left(self) -> int:
        """Rows of the prompt that are still to be computed here."""
        return max(0, self.terms.prompt_tokens - self.positions)

    def require_books(self) -> StageBooks:
        """The books of a session with credit; raises ``RemoteProtocolError`` before."""
        if self.books is None:
            raise RemoteProtocolError("frames before the grant was shown")
        return self.books

    def start_at(self, cached: int) -> None:
        """Begin behind positions that are in the cache; 0 changes nothing.

        Raises ``RemoteProtocolError`` if this stage has not so many, or its epoch began
        elsewhere.
        """
        if not cached:
            return
        if cached > self.reusable or cached >= self.terms.prompt_tokens or self.terms.epoch > 1:
            raise RemoteProtocolError(f"{cached} positions are not cached here for this session")
        self.positions = self.cached = cached
        self.progress = Progress(self.terms, cached)

    def activate(self, books: StageBooks, now_ms: int) -> None:
        """Make a held session live."""
        self.books = books
        self.phase = "live"
        self.expires_ms = now_ms + IDLE_MS
        if self.rebuilds_next and not self.stage.rebuilt:
            self.replay = Replay(self.terms.resume_position)

    def suspend(self, until_ms: int) -> None:
        """Compute no more in this epoch, and keep the cache until then."""
        self.phase = "suspended"
        self.expires_ms = until_ms
        self.replay = None
        self.early.clear()
        self.deferred.clear()

    def reopen(self, terms: SessionTerms, stage_index: int, now_ms: int) -> None:
        """Enter a higher epoch; whatever belongs to the lower one no longer counts."""
        self.suspend(now_ms + SUSPENDED_MS)
        self.terms, self.stage_index, self.phase = terms, stage_index, "held"
        self.closed = None
        self.link = None
        self.orphaned = self.client_gone_upstream = self.client_gone_downstream = False
        self._start_epoch()

    def admit_frame(self, frame: StageFrame) -> FrameCounts:
        """Check a frame's place in the sequence and the credit window; return its counts.

        Raises ``RemoteProtocolError`` or ``Overspend``; on success the frame is taken.
        """
        if frame.epoch != self.terms.epoch:
            raise RemoteProtocolError(f"a frame of epoch {frame.epoch}, not {self.terms.epoch}")
        if frame.replay and not self.stage.rebuilt:
            raise RemoteProtocolError("this stage is not rebuilt")
        due = self._next_replay if frame.replay else self._next_traversal
        if frame.traversal != due:
            raise RemoteProtocolError(f"traversal {frame.traversal} came where {due} was due")
        if frame.end > self.tokens_max:
            raise RemoteProtocolError(f"a frame at position {frame.first_position} does not fit")
        counts = self.progress.take(
            frame.first_position,
            frame.rows,
            drafts=len(frame.drafts),
            sample=frame.sample,
            close_chunk=frame.close_chunk,
            replay=frame.replay,
        )
        if frame.rows == 0 and (counts.counts == self._closed_counts or self.frames_queued):
            raise RemoteProtocolError("there is nothing to close, or not yet")
        self.require_books().admit(counts)
        self._taken(frame, counts)
        return counts

    def _taken(self, frame: StageFrame, counts: FrameCounts) -> None:
        if frame.replay:
            self._next_replay += 1
        else:
            self._next_traversal += 1
        if frame.close_chunk:
            self._closed_counts = counts.counts
        self.received = frame.traversal + 1

    def _start_epoch(self) -> None:
        self.progress = Progress(self.terms)
        self.received = self.sent = self._next_replay = 0
        # The first live frame is numbered by its position, so that it is above all replays.
        self._next_traversal = self.terms.resume_position
        self._closed_counts = self.terms.start


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

    def of_client(self, session_id: SessionId, epoch: int, caller: PeerId) -> StageSession:
        """The session in that epoch, for its client; raises ``RemoteProtocolError``."""
        session = self._sessions.get(session_id)
        if session is None or session.terms.epoch != epoch:
            raise RemoteProtocolError("no such session, or its hold has expired")
        if session.terms.client != caller:
            raise RemoteProtocolError("only its client may speak for a session")
        return session

    def touch(self, session: StageSession, now_ms: int) -> None:
        """Note that a frame came."""
        session.expires_ms = now_ms + IDLE_MS

    def remove(self, session_id: SessionId) -> StageSession | None:
        """Forget a session."""
        return self._sessions.pop(session_id, None)

    def expired(self, now_ms: int) -> list[StageSession]:
        """Sessions past their time."""
        return [session for session in self if session.expires_ms <= now_ms]

    def touching(self, peer: PeerId) -> list[StageSession]:
        """Sessions that cannot go on without a peer."""
        return [session for session in self if peer in (session.upstream, session.downstream)]

    def count_of(self, client: PeerId) -> int:
        """Sessions of one client."""
        return sum(session.terms.client == client for session in self._sessions.values())
