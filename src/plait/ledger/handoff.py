"""Hand-off commitments: both ends of a hop hash what crossed it, and must agree.

Boundary 0 is what the driver sends to stage 0 (token ids), boundary i what stage i-1
sends to stage i (activations), boundary S what the last of S stages draws (token ids), and
boundary S + 1, of which nobody but that stage knows the other end until an audit, what it
draws them from: the final hidden states, and for each draw two numbers of its logits.
Each frame is added, also one without rows or draws. The salt blinds the commitments
from anybody who could guess the ids.
"""

import hashlib
from array import array
from collections.abc import Sequence
from struct import Struct
from sys import byteorder

from plait.errors import RemoteProtocolError
from plait.ledger.terms import SessionTerms
from plait.types import Digest

_START = b"plait.handoff.v1\0"
_NUMBERS = Struct(">QII")
"""Traversal, first position, rows."""

PENDING_FRAMES_MAX = 1024
"""Frames remembered between two closed chunks; an honest chunk has at most 256."""


def ids_payload(ids: Sequence[int]) -> bytes:
    """Token ids as they are hashed: unsigned 32-bit little-endian.

    Raises ``OverflowError`` for an id out of range.
    """
    packed = array("I", ids)
    if packed.itemsize != 4:
        return b"".join(token.to_bytes(4, "little") for token in ids)
    if byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


class HandoffChain:
    """The running hash of one boundary of one epoch."""

    def __init__(self, terms: SessionTerms, boundary: int) -> None:
        position = terms.epoch.to_bytes(4, "big") + boundary.to_bytes(4, "big")
        start = _START + terms.handoff_salt + terms.session_id + position
        self.commit = Digest(hashlib.sha256(start).digest())
        self.traversal = -1
        """The last traversal added; -1 before the first."""
        self._pending: dict[int, Digest] = {}

    def add(self, traversal: int, first_position: int, rows: int, payload: bytes) -> None:
        """Add what crossed in a traversal: rows counts activations or ids.

        Raises ``RemoteProtocolError`` if traversals do not rise or a chunk never closes.
        """
        hashed = Digest(hashlib.sha256(payload).digest())
        self.add_digest(traversal, first_position, rows, hashed)

    def add_digest(
        self, traversal: int, first_position: int, rows: int, payload_digest: Digest
    ) -> None:
        """The same, where only the SHA-256 of what crossed is known."""
        if traversal <= self.traversal:
            raise RemoteProtocolError(f"traversal {traversal} follows {self.traversal}")
        if len(self._pending) >= PENDING_FRAMES_MAX:
            raise RemoteProtocolError("a chunk has too many frames")
        link = self.commit + _NUMBERS.pack(traversal, first_position, rows) + payload_digest
        self.commit = Digest(hashlib.sha256(link).digest())
        self.traversal = traversal
        self._pending[traversal] = self.commit

    def commit_at(self, traversal: int) -> Digest | None:
        """The commitment up to and including a traversal; ``None`` if it is not remembered."""
        return self._pending.get(traversal)

    def forget(self, traversal: int) -> None:
        """Drop the commitments up to and including a traversal: its chunk is closed."""
        self._pending = {t: commit for t, commit in self._pending.items() if t > traversal}
