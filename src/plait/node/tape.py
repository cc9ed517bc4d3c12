"""Every frame that a stage committed to, kept until its audit window ends. Pure.

Unlike ``Retained``, which keeps the newest row of each position for a replacement, a tape
keeps frames as they were, rejected drafts included, because the hand-off chains hash those.
Bytes go to spill files, many frames at once, so that a token does not wait for a write; in
memory stay the index and, of each running session, less than ``UNWRITTEN_BYTES_MAX`` a kind. Past
the limit the sessions that ended first are forgotten, then the one that grows: it cannot answer
an audit then, which makes it suspect and nothing worse.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from plait.errors import CapacityError
from plait.ledger.audit_rules import Crossing
from plait.node.retained import KINDS, Key, Kind, SpillStore
from plait.types import Digest, SessionId

SESSIONS_MAX = 4096
UNWRITTEN_BYTES_MAX = 32 * 1024


@dataclass(slots=True)
class _Session:
    client: str
    commitment: bytes
    forget_ms: int | None = None
    """None while the session runs."""
    sizes: dict[Kind, int] = field(default_factory=dict)
    """Bytes kept, those not written yet included."""
    unwritten: dict[Kind, bytearray] = field(default_factory=dict)
    epochs: dict[int, "EpochTape"] = field(default_factory=dict)
    given_up: bool = False


class _Mark(NamedTuple):
    """A crossing, and where its bytes are."""

    traversal: int
    first_position: int
    rows: int
    hashed: Digest
    offset: int
    size: int

    def crossing(self, payload: bytes | None = None) -> Crossing:
        """What an audit compares."""
        return Crossing(self.traversal, self.first_position, self.rows, self.hashed, payload)


class EpochTape:
    """What crossed both ends of a stage in one epoch, in order."""

    def __init__(self, tape: "Tape", session: SessionId) -> None:
        self._tape = tape
        self._session = session
        self.marks: dict[Kind, list[_Mark]] = {kind: [] for kind in KINDS}

    def received(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep a frame that came; ``hashed`` is its payload's SHA-256."""
        self._keep("input", (traversal, first_position, rows, hashed), payload)

    def sent(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep what went out for a frame."""
        self._keep("output", (traversal, first_position, rows, hashed), payload)

    def drew_from(
        self, traversal: int, first_position: int, rows: int, payload: bytes, hashed: Digest
    ) -> None:
        """Keep what the last stage drew ``rows`` ids from."""
        self._keep("state", (traversal, first_position, rows, hashed), payload)

    def _keep(self, kind: Kind, place: tuple[int, int, int, Digest], payload: bytes) -> None:
        offset = self._tape.append((self._session, kind), payload)
        if offset is not None:
            self.marks[kind].append(_Mark(*place, offset, len(payload)))


class Tape:
    """The tapes of all sessions, bounded. Sizes are in bytes, times in milliseconds."""

    def __init__(
        self,
        spill: SpillStore,
        *,
        bytes_max: int,
        window_ms: int,
        sessions_max: int = SESSIONS_MAX,
    ) -> None:
        self._spill = spill
        self._bytes_max = bytes_max
        self._window_ms = window_ms
        self._sessions_max = sessions_max
        self._sessions: dict[SessionId, _Session] = {}
        self.bytes_kept = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def begin(
        self, session: SessionId, epoch: int, client: str, commitment: bytes
    ) -> EpochTape | None:
        """Begin an epoch's tape; None if its client will never ask for an audit."""
        if not commitment:
            return None
        if session not in self._sessions:
            self._make_room(0, sessions=1)
            if len(self._sessions) >= self._sessions_max:
                return None
            self._sessions[session] = _Session(client, commitment)
        held = self._sessions[session]
        tape = held.epochs[epoch] = EpochTape(self, session)
        return tape

    def commitment(self, session: SessionId) -> bytes:
        """What the client committed to; raises ``CapacityError`` for a session not kept."""
        return self._known(session).commitment

    def end(self, session: SessionId, now_ms: int) -> None:
        """The session ended: keep it for the window."""
        held = self._sessions.get(session)
        if held is not None and held.forget_ms is None:
            held.forget_ms = now_ms + self._window_ms
            self._write_all(session, held)

    def expire(self, now_ms: int) -> None:
        """Forget the sessions whose window has ended."""
        due = [s for s, held in self._sessions.items() if (held.forget_ms or now_ms + 1) <= now_ms]
        for session in due:
            self._forget(session)

    def crossings(
        self, session: SessionId, epoch: int, kind: Kind, until: int, opened_from: int
    ) -> list[Crossing]:
        """What crossed up to and including traversal ``until``, with bytes from ``opened_from``.

        Raises ``CapacityError`` if it is not kept.
        """
        held = self._known(session)
        tape = held.epochs.get(epoch)
        if tape is None:
            raise CapacityError("this epoch is not kept for audits")
        self._write_all(session, held)
        return [
            self._opened((session, kind), mark)
            if mark.traversal >= opened_from
            # The bytes before the chunk are hashed, not compared.
            else mark.crossing()
            for mark in tape.marks[kind]
            if mark.traversal <= until
        ]

    def append(self, key: Key, data: bytes) -> int | None:
        """Keep bytes; returns where they begin, None if they are not kept."""
        session, kind = key
        held, size = self._sessions.get(session), len(data)
        if held is None or held.given_up:
            return None
        if self.bytes_kept + size > self._bytes_max:
            self._make_room(size)
        offset = held.sizes.get(kind, 0)
        try:
            if self.bytes_kept + size > self._bytes_max:
                raise CapacityError("no room is left for the tape")
            waiting = held.unwritten.get(kind)
            if waiting is None:
                waiting = held.unwritten[kind] = bytearray()
            waiting += data
            if len(waiting) >= UNWRITTEN_BYTES_MAX:
                self._write(key, held)
        except (OSError, CapacityError):
            self._give_up(session)
            return None
        held.sizes[kind] = offset + size
        self.bytes_kept += size
        return offset

    def _write_all(self, session: SessionId, held: _Session) -> None:
        try:
            for kind in tuple(held.unwritten):
                self._write((session, kind), held)
        except (OSError, CapacityError):
            self._give_up(session)

    def _write(self, key: Key, held: _Session) -> None:
        waiting = held.unwritten.pop(key[1], None)
        if waiting:
            self._spill.append(key, bytes(waiting))

    def _opened(self, key: Key, mark: _Mark) -> Crossing:
        try:
            payload = self._spill.read(key, mark.offset, mark.size) if mark.size else b""
        except OSError as error:
            raise CapacityError(f"the tape cannot be read: {error}") from error
        return mark.crossing(payload)

    def _known(self, session: SessionId) -> _Session:
        held = self._sessions.get(session)
        if held is None or held.given_up:
            raise CapacityError("this session is not kept for audits")
        return held

    def _make_room(self, size: int, sessions: int = 0) -> None:
        ended = (
            sorted(
                (held.forget_ms, session)
                for session, held in self._sessions.items()
                if held.forget_ms is not None
            )
            if self._is_full(size, sessions)
            else []
        )
        for _, session in ended:
            if not self._is_full(size, sessions):
                return
            self._forget(session)

    def _is_full(self, size: int, sessions: int) -> bool:
        return (
            self.bytes_kept + size > self._bytes_max
            or len(self._sessions) + sessions > self._sessions_max
        )

    def _give_up(self, session: SessionId) -> None:
        held = self._sessions[session]
        held.given_up = True
        self._drop_bytes(session, held)

    def _forget(self, session: SessionId) -> None:
        self._drop_bytes(session, self._sessions.pop(session))

    def _drop_bytes(self, session: SessionId, held: _Session) -> None:
        self.bytes_kept -= sum(held.sizes.values())
        held.sizes.clear()
        held.unwritten.clear()
        held.epochs.clear()
        for kind in KINDS:
            self._spill.drop((session, kind))
