"""What a stage sent, kept byte for byte by position. Pure.

A replacement downstream is rebuilt from it. Rows stay in memory up to a limit for all
sessions together; later rows of a session go to its spill file up to another limit; past
that its rows are given up, and whoever needs them is fed by recomputing. Writing at a
position overwrites it and forgets what lay behind, as in the KV cache.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from plait.errors import CapacityError
from plait.types import SessionId

Kind = Literal["output", "input", "state"]
"""Of a spill file. Here only ``output`` is kept; all three are for audits (``tape.py``)."""

KINDS: tuple[Kind, ...] = get_args(Kind)

Key = tuple[SessionId, Kind]


class SpillStore(Protocol):
    """One growing file per key. Every method may raise ``OSError``."""

    def append(self, key: Key, data: bytes) -> None:
        """Write at the end."""

    def read(self, key: Key, offset: int, size: int) -> bytes:
        """Read exactly ``size`` bytes."""

    def truncate(self, key: Key, size: int) -> None:
        """Forget all but the first ``size`` bytes."""

    def drop(self, key: Key) -> None:
        """Forget the file; nothing happens if there is none. Never raises."""


@dataclass(slots=True)
class _Rows:
    """Rows ``[0, in memory + spilled)`` of one key; the file holds those after the memory's."""

    row_bytes: int
    memory: bytearray = field(default_factory=bytearray)
    spilled_rows: int = 0

    @property
    def memory_rows(self) -> int:
        return len(self.memory) // self.row_bytes

    @property
    def end(self) -> int:
        return self.memory_rows + self.spilled_rows


class Retained:
    """The rows of all sessions, bounded in memory and on disk. Sizes are in bytes."""

    def __init__(self, spill: SpillStore, *, memory_bytes_max: int, spill_bytes_max: int) -> None:
        self._spill = spill
        self._memory_bytes_max = memory_bytes_max
        self._spill_bytes_max = spill_bytes_max
        self._rows: dict[Key, _Rows] = {}
        self._given_up: set[Key] = set()
        self.memory_bytes = 0
        self.spill_bytes = 0

    def put(self, key: Key, first_position: int, rows: int, data: bytes) -> None:
        """Keep rows at their positions. What cannot be kept is given up, silently."""
        if key in self._given_up or not rows:
            return
        row_bytes = len(data) // rows
        kept = self._rows.setdefault(key, _Rows(row_bytes))
        if not row_bytes or kept.row_bytes != row_bytes or first_position > kept.end:
            self._give_up(key)
            return
        try:
            self._cut(key, kept, first_position)
            self._append(key, kept, rows, data)
        except (OSError, CapacityError):
            self._give_up(key)

    def end(self, key: Key) -> int:
        """Positions before this one are kept; 0 if none, or if they were given up."""
        kept = self._rows.get(key)
        return kept.end if kept else 0

    def row_bytes(self, key: Key) -> int:
        """Bytes of one row; 0 while nothing is kept."""
        kept = self._rows.get(key)
        return kept.row_bytes if kept else 0

    def read(self, key: Key, first_position: int, rows: int) -> bytes:
        """The bytes of rows; raises ``CapacityError`` if they are not all kept."""
        kept = self._rows.get(key)
        if kept is None or first_position + rows > kept.end:
            raise CapacityError("these rows are not retained")
        in_memory = max(0, min(first_position + rows, kept.memory_rows) - first_position)
        start = first_position * kept.row_bytes
        data = bytes(kept.memory[start : start + in_memory * kept.row_bytes])
        if in_memory == rows:
            return data
        offset = (first_position + in_memory - kept.memory_rows) * kept.row_bytes
        try:
            return data + self._spill.read(key, offset, (rows - in_memory) * kept.row_bytes)
        except OSError as error:
            self._give_up(key)
            raise CapacityError(f"the spilled rows cannot be read: {error}") from error

    def free(self, session: SessionId) -> None:
        """Forget a session."""
        key: Key = (session, "output")
        self._drop(key)
        self._given_up.discard(key)

    def _append(self, key: Key, kept: _Rows, rows: int, data: bytes) -> None:
        fits = self.memory_bytes + len(data) <= self._memory_bytes_max
        if fits and not kept.spilled_rows:
            kept.memory += data
            self.memory_bytes += len(data)
            return
        if self.spill_bytes + len(data) > self._spill_bytes_max:
            raise CapacityError("no room is left to retain rows")
        self._spill.append(key, data)
        kept.spilled_rows += rows
        self.spill_bytes += len(data)

    def _cut(self, key: Key, kept: _Rows, end: int) -> None:
        if end >= kept.end:
            return
        spilled_rows = max(0, end - kept.memory_rows)
        if spilled_rows != kept.spilled_rows:
            self._spill.truncate(key, spilled_rows * kept.row_bytes)
            self.spill_bytes -= (kept.spilled_rows - spilled_rows) * kept.row_bytes
            kept.spilled_rows = spilled_rows
        if end < kept.memory_rows:
            self.memory_bytes -= len(kept.memory) - end * kept.row_bytes
            del kept.memory[end * kept.row_bytes :]

    def _give_up(self, key: Key) -> None:
        self._drop(key)
        self._given_up.add(key)

    def _drop(self, key: Key) -> None:
        kept = self._rows.pop(key, None)
        if kept is not None:
            self.memory_bytes -= len(kept.memory)
            self.spill_bytes -= kept.spilled_rows * kept.row_bytes
        self._spill.drop(key)
